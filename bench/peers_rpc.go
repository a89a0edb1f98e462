package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"

	"example.org/rpc"
)

// library is the library as a peer, with what scenarios of its own need.
type library struct {
	peer
	server *rpc.Server
	client *rpc.Client
	addr   string
}

// ball is what calls throw: 64 bytes, without further allocations.
type ball [64]byte

func (m *ball) AppendBinary(b []byte) ([]byte, error) { return append(b, m[:]...), nil }

func (m *ball) UnmarshalBinary(b []byte) error {
	if copy(m[:], b) != len(b) || len(b) != len(m) {
		return fmt.Errorf("a ball of %d bytes", len(b))
	}
	return nil
}

// nothing is a message where there is nothing to say.
type nothing struct{}

func (nothing) AppendBinary(b []byte) ([]byte, error) { return b, nil }
func (nothing) UnmarshalBinary([]byte) error          { return nil }

// count is a message of one number.
type count int64

func (m count) AppendBinary(b []byte) ([]byte, error) {
	return binary.BigEndian.AppendUint64(b, uint64(m)), nil
}

func (m *count) UnmarshalBinary(b []byte) error {
	if len(b) != 8 {
		return fmt.Errorf("a count of %d bytes", len(b))
	}
	*m = count(binary.BigEndian.Uint64(b))
	return nil
}

// startLibrary starts a server and a client, with room for all scenarios where the defaults are for one device.
func startLibrary(t transport) *library {
	addr, s := serveLibrary(t)
	p := &library{server: s, addr: addr}
	p.client = rpc.NewClient(t.connecter(addr), rpc.ClientConfig{MaxIdleDataConns: 1024})
	p.peer = peer{name: "rpc", call: func() { echo(p.client) }, bulk: p.download, upload: p.upload, client: func() (call, disconnect func()) {
		c := rpc.NewClient(t.connecter(addr), rpc.ClientConfig{})
		return func() { echo(c) }, func() { c.Close() }
	}, close: func() {
		p.client.Close()
		p.server.Close()
	}}
	return p
}

func serveLibrary(t transport) (addr string, s *rpc.Server) {
	s = rpc.NewServer(nil, rpc.ServerConfig{MaxHandshakes: 1024, MaxConns: 4096, MaxConnsPerClient: 4096, MaxHandlers: 4096})
	rpc.HandleCall(s, "echo", func(_ context.Context, req *ball) (*ball, error) { return req, nil })
	rpc.HandleDownload(s, "memory", func(_ context.Context, n *count) (*nothing, io.ReadCloser, error) {
		return &nothing{}, io.NopCloser(&memory{left: int64(*n)}), nil
	})
	rpc.HandleUpload(s, "discard", func(_ context.Context, n *count, r io.Reader) (*nothing, error) {
		got, err := io.Copy(io.Discard, r)
		if err == nil && got != int64(*n) {
			err = fmt.Errorf("%d bytes instead of %d", got, *n)
		}
		return &nothing{}, err
	})
	l := t.listenRPC()
	go s.Serve(l) // until Close
	return l.Addr().String(), s
}

func (t transport) listenRPC() *rpc.Listener {
	if t.server != nil {
		return must(rpc.ListenTLS("127.0.0.1:0", t.server))
	}
	return must(rpc.ListenTCP("127.0.0.1:0", map[string]string{"127.0.0.1": "bench"}))
}

func (t transport) connecter(addr string) rpc.Connecter {
	if t.client != nil {
		return &rpc.TLSConnecter{Addr: addr, Config: t.client}
	}
	return &rpc.TCPConnecter{Addr: addr}
}

var thrown ball

func echo(c *rpc.Client) {
	var res ball
	check(c.Call(context.Background(), "echo", &thrown, &res))
}

func download(c *rpc.Client, n int64) io.ReadCloser {
	req := count(n)
	return must(c.Download(context.Background(), "memory", &req, nil))
}

func (p *library) download(n int64) {
	stream := download(p.client, n)
	got := must(io.Copy(io.Discard, stream))
	check(stream.Close())
	expect("rpc download", got, n)
}

func (p *library) upload(n int64) {
	req := count(n)
	check(p.client.Upload(context.Background(), "discard", &req, &memory{left: n}, nil))
}
