package main

import (
	"context"
	"flag"
	"net"
	"path/filepath"
	"slices"
	"strings"

	"example.org/rpc"
)

// defaultServer is the NAME of a server's certificate unless something else is said.
const defaultServer = "server"

// peerFlags say how to reach the passive side.
type peerFlags struct {
	addr, tls, name, serverName string
	identityFile, ssh, remote   string
	dialer                      *sshDialer // of an ssh: peer, once it is used
}

func (p *peerFlags) add(flags *flag.FlagSet) {
	flags.StringVar(&p.addr, "peer", "", "`address` of the passive side, HOST:PORT or ssh:[USER@]HOST[:PORT]")
	flags.StringVar(&p.tls, "tls", "", "`DIR` with ca.crt, NAME.crt and NAME.key as \"replicate certs\" makes them; without it: plain TCP")
	flags.StringVar(&p.name, "name", "", "the `NAME` of the certificate to show (default: the only one in DIR besides \""+defaultServer+"\")")
	flags.StringVar(&p.serverName, "server-name", defaultServer, "the `NAME` that the peer's certificate must have")
	flags.StringVar(&p.identityFile, "identity-file", "", "ssh: the `FILE` with the private key (default: as ssh is configured)")
	flags.StringVar(&p.ssh, "ssh", defaultSSH, "ssh: the `PROGRAM` that connects")
	flags.StringVar(&p.remote, "remote", defaultRemote, "ssh: the `COMMAND` to run there; a forced command in authorized_keys takes its place")
}

// client makes a client of the peer; it connects when it is used.
func (p *peerFlags) client(config rpc.ClientConfig) (*rpc.Client, error) {
	connecter, err := p.connecter()
	if err != nil {
		return nil, err
	}
	return rpc.NewClient(connecter, config), nil
}

func (p *peerFlags) connecter() (rpc.Connecter, error) {
	if p.addr == "" {
		return nil, usagef("-peer is missing")
	}
	if destination, ok := strings.CutPrefix(p.addr, "ssh:"); ok {
		return p.sshConnecter(destination)
	}
	if p.identityFile != "" {
		return nil, usagef("-identity-file %q: it is for -peer ssh:HOST", p.identityFile)
	}
	if _, _, err := net.SplitHostPort(p.addr); err != nil {
		return nil, usagef("-peer %q: %v; it is HOST:PORT or ssh:[USER@]HOST[:PORT]", p.addr, err)
	}
	if p.tls == "" {
		if p.name != "" {
			return nil, usagef("-name %q: certificates need -tls", p.name)
		}
		return &rpc.TCPConnecter{Addr: p.addr}, nil
	}
	name := p.name
	if name == "" {
		var err error
		if name, err = onlyCert(p.tls); err != nil {
			return nil, err
		}
	}
	files, err := certFiles(p.tls, name)
	if err != nil {
		return nil, err
	}
	config, err := rpc.ClientTLSConfig(files.ca, files.cert, files.key, p.serverName)
	if err != nil {
		return nil, err
	}
	return &rpc.TLSConnecter{Addr: p.addr, Config: config}, nil
}

type tlsFiles struct{ ca, cert, key string }

func certFiles(dir, name string) (tlsFiles, error) {
	if err := checkCertName(name); err != nil {
		return tlsFiles{}, usageError{err.Error()}
	}
	in := func(file string) string { return filepath.Join(dir, file) }
	files := tlsFiles{in(caName + ".crt"), in(name + ".crt"), in(name + ".key")}
	for _, file := range []string{files.ca, files.cert, files.key} {
		if !exists(file) {
			return tlsFiles{}, usagef("-tls %s with name %q: there is no %s; \"replicate certs -dir %s %s\" makes it", dir, name, file, dir, name)
		}
	}
	return files, nil
}

// onlyCert is the name of the client's certificate if there can be no doubt which one is meant.
func onlyCert(dir string) (string, error) {
	found, err := filepath.Glob(filepath.Join(dir, "*.crt"))
	if err != nil {
		return "", usagef("-tls %q: %v", dir, err)
	}
	var names []string
	for _, file := range found {
		if name := strings.TrimSuffix(filepath.Base(file), ".crt"); name != caName && name != defaultServer {
			names = append(names, name)
		}
	}
	switch len(names) {
	case 0:
		return "", usagef("-tls %s: there is no client's certificate in it; \"replicate certs -dir %s NAME\" makes one", dir, dir)
	case 1:
		return names[0], nil
	}
	slices.Sort(names)
	return "", usagef("-tls %s: it has certificates for %s; say which one with -name", dir, strings.Join(names, ", "))
}

// The calls of our own with which a client asks for the lists of a server's sink: the calls of the service give those of
// its source if it has both.
const (
	sinkFilesystemsCall = "sink_list_filesystems"
	sinkVersionsCall    = "sink_list_filesystem_versions"
)

// sinkPeer is a peer that is pushed to: a client whose lists are those of the server's sink. A server that does not know
// the calls for it has nothing to keep apart.
type sinkPeer struct{ *rpc.Client }

func (p sinkPeer) ListFilesystems(ctx context.Context, req *rpc.ListFilesystemReq) (*rpc.ListFilesystemRes, error) {
	res := new(rpc.ListFilesystemRes)
	err := p.Call(ctx, sinkFilesystemsCall, req, res)
	if rpc.CodeOf(err) == rpc.Unimplemented {
		return p.Client.ListFilesystems(ctx, req)
	}
	if err != nil {
		return nil, err
	}
	return res, nil
}

func (p sinkPeer) ListFilesystemVersions(ctx context.Context, req *rpc.ListFilesystemVersionsReq) (*rpc.ListFilesystemVersionsRes, error) {
	res := new(rpc.ListFilesystemVersionsRes)
	err := p.Call(ctx, sinkVersionsCall, req, res)
	if rpc.CodeOf(err) == rpc.Unimplemented {
		return p.Client.ListFilesystemVersions(ctx, req)
	}
	if err != nil {
		return nil, err
	}
	return res, nil
}
