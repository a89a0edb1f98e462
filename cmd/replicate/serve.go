package main

import (
	"context"
	"errors"
	"flag"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"

	"example.org/rpc"
)

var serveCommand = command{
	name:     "serve",
	synopsis: "-listen ADDR -tls DIR | -listen ADDR -clients MAP | -stdio -stdio-identity NAME  [-sink STORE] [-source STORE]",
	brief:    "be the passive side: take pushes, serve pulls",
	about: `The passive side. A sink takes pushes: each client has a folder of its own in it, named by its identity, and sees and
changes nothing outside of that; nothing is ever overwritten or destroyed, and only the owner of the server's process
can read what was received. A source serves pulls of the whole store to
every client that is let in, read only. With both, pushes and what push looks at go to the sink, pulls and what pull and
list look at to the source ("list -side sink" shows the other).

With -tls, clients show certificates of the CA, and their names are their identities. Without TLS, -clients maps
addresses, networks and zones to identities, the longest prefix wins, and * stands for the address:

  -clients 10.0.0.0/24=lan-*,192.0.2.7=db7,fd00::/8=lab

With -stdio there is one client, at the other end of stdin and stdout, whose name is given. That is for ssh: a line such as

  restrict,command="replicate serve -stdio -stdio-identity laptop -sink zfs:tank/backups" ssh-ed25519 AAAA...

in authorized_keys lets the owner of the key push, and do nothing else.

An interrupt or SIGTERM stops taking in new work and waits for what runs; a second one ends the process at once. What
breaks off is resumed by the next push.
` + aboutStores,
	run: runServe,
}

// serveFlags are the flags of serve.
type serveFlags struct {
	listen, sink, source, tls, name, allow, clients string
	stdioIdentity                                   string
	stdio, json, verbose                            bool
}

func (f *serveFlags) add(flags *flag.FlagSet) {
	flags.StringVar(&f.listen, "listen", "", "`address` to listen on, [HOST]:PORT")
	flags.StringVar(&f.sink, "sink", "", "`STORE` that takes pushes")
	flags.StringVar(&f.source, "source", "", "`STORE` that serves pulls")
	flags.StringVar(&f.tls, "tls", "", "`DIR` with ca.crt, NAME.crt and NAME.key as \"replicate certs\" makes them")
	flags.StringVar(&f.name, "name", defaultServer, "the `NAME` of the server's certificate")
	flags.StringVar(&f.allow, "allow", "", "the clients' `NAMES` that may connect, with commas between them (default: all that the CA made a certificate for)")
	flags.StringVar(&f.clients, "clients", "", "plain TCP: a `MAP` from addresses to identities")
	flags.BoolVar(&f.stdio, "stdio", false, "serve the one client at the other end of stdin and stdout, then end")
	flags.StringVar(&f.stdioIdentity, "stdio-identity", "", "the `NAME` of that client, who is whoever may run this command")
	flags.BoolVar(&f.json, "json", false, "log as JSON")
	flags.BoolVar(&f.verbose, "v", false, "log every call too")
}

func (f *serveFlags) check() error {
	switch {
	case f.stdio:
		return f.checkStdio()
	case f.stdioIdentity != "":
		return usagef("-stdio-identity %q is for -stdio", f.stdioIdentity)
	case f.listen == "":
		return usagef("-listen is missing (or -stdio)")
	case f.sink == "" && f.source == "":
		return usagef("-sink or -source is missing")
	case f.tls == "" && f.clients == "":
		return usagef("-tls is missing (or -clients, for plain TCP)")
	case f.tls != "" && f.clients != "":
		return usagef("-tls and -clients exclude each other")
	case f.tls == "" && f.allow != "":
		return usagef("-allow %q is for -tls", f.allow)
	}
	return nil
}

func (f *serveFlags) checkStdio() error {
	for name, value := range map[string]string{"listen": f.listen, "tls": f.tls, "allow": f.allow, "clients": f.clients} {
		if value != "" {
			return usagef("-stdio and -%s %q exclude each other", name, value)
		}
	}
	if f.sink == "" && f.source == "" {
		return usagef("-sink or -source is missing")
	}
	if err := checkCertName(f.stdioIdentity); err != nil {
		return usagef("-stdio-identity: %v", err)
	}
	return nil
}

func (f *serveFlags) logger(w io.Writer) *slog.Logger {
	options := &slog.HandlerOptions{Level: slog.LevelInfo}
	switch {
	case f.verbose:
		options.Level = slog.LevelDebug
	case f.stdio: // it goes to whoever runs the client
		options.Level = slog.LevelWarn
	}
	if f.json {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

func runServe(ctx context.Context, o output, flags *flag.FlagSet, args []string) error {
	var f serveFlags
	f.add(flags)
	if err := parse(flags, args); err != nil {
		return err
	}
	if err := errors.Join(noArguments(flags), f.check()); err != nil {
		return err
	}
	log := f.logger(o.status)
	service := &service{log: log}
	defer service.close()
	if err := service.open(f.sink, f.source); err != nil {
		return err
	}
	listener, err := f.listener()
	if err != nil {
		return err
	}
	log.Info("listening", "addr", listener.Addr().String(), "sink", f.sink, "source", f.source)
	return serve(ctx, service, listener)
}

func (f *serveFlags) listener() (*rpc.Listener, error) {
	if f.stdio {
		return listenStdio(f.stdioIdentity)
	}
	if _, _, err := net.SplitHostPort(f.listen); err != nil {
		return nil, usagef("-listen %q: %v; it is [HOST]:PORT", f.listen, err)
	}
	if f.clients != "" {
		clients, err := parseClients(f.clients)
		if err != nil {
			return nil, err
		}
		return rpc.ListenTCP(f.listen, clients)
	}
	allowed, err := parseNames(f.allow)
	if err != nil {
		return nil, err
	}
	files, err := certFiles(f.tls, f.name)
	if err != nil {
		return nil, err
	}
	config, err := rpc.ServerTLSConfig(files.ca, files.cert, files.key)
	if err != nil {
		return nil, err
	}
	return rpc.ListenTLS(f.listen, config, allowed...)
}

// parseNames reads NAME,... or nothing.
func parseNames(text string) ([]string, error) {
	if text == "" {
		return nil, nil
	}
	names := strings.Split(text, ",")
	for _, name := range names {
		if err := checkCertName(name); err != nil {
			return nil, usagef("-allow: %v", err)
		}
	}
	return names, nil
}

// parseClients reads ADDRESS=IDENTITY,... An identity is a folder's name, and the address may be put into one.
func parseClients(text string) (map[string]string, error) {
	clients := make(map[string]string)
	for pair := range strings.SplitSeq(text, ",") {
		addr, identity, ok := strings.Cut(pair, "=")
		if !ok {
			return nil, usagef("-clients: %q is not ADDRESS=IDENTITY", pair)
		}
		_, addrErr := netip.ParseAddr(addr)
		if _, err := netip.ParsePrefix(addr); err != nil && addrErr != nil {
			return nil, usagef("-clients: %q is neither an address nor a network such as 10.0.0.0/24", addr)
		}
		if err := checkCertName(strings.ReplaceAll(identity, "*", "x")); err != nil {
			return nil, usagef("-clients: %q: %v", pair, err)
		}
		if _, twice := clients[addr]; twice {
			return nil, usagef("-clients: %q is there twice", addr)
		}
		clients[addr] = identity
	}
	return clients, nil
}

// serve serves until ctx ends; then it lets what runs come to its end.
func serve(ctx context.Context, service *service, listener *rpc.Listener) error {
	server := service.server()
	stopped := make(chan struct{})
	release := context.AfterFunc(ctx, func() { // Serve returns when it begins; it is waited for below
		defer close(stopped)
		service.log.Info("stopping: waiting for what runs; once more ends it")
		server.Shutdown(context.Background())
	})
	err := server.Serve(listener)
	if !release() { // ctx has ended
		<-stopped
	}
	server.Close()
	if errors.Is(err, rpc.ErrClosed) || errors.Is(err, net.ErrClosed) { // the latter when the client of -stdio is gone
		stats := server.Stats()
		service.log.Info("stopped", "connections", stats.Conns, "refused", stats.HandshakesRefused, "calls", stats.Calls,
			"streams", stats.Streams, "failed_streams", stats.StreamsFailed, "bytes_in", stats.BytesRead, "bytes_out", stats.BytesWritten)
		return nil
	}
	return err
}
