package main

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"sync"
	"sync/atomic"

	"example.org/rpc"
)

// killer is a Connecter whose connections can be cut, as a broken cable would.
type killer struct {
	rpc.Connecter

	mu    sync.Mutex
	conns []net.Conn
}

func (k *killer) Connect(ctx context.Context) (net.Conn, error) {
	conn, err := k.Connecter.Connect(ctx)
	if err == nil {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.conns = append(k.conns, conn)
	}
	return conn, err
}

// kill closes the sockets below TLS, so that no end of anything is said to the other side.
func (k *killer) kill() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, conn := range k.conns {
		if secured, ok := conn.(*tls.Conn); ok {
			conn = secured.NetConn()
		}
		if socket, ok := conn.(*net.TCPConn); ok {
			socket.SetLinger(0)
		}
		conn.Close()
	}
	return len(k.conns)
}

// tripwire is a source that does something, once, when so many bytes have been read from its streams.
type tripwire struct {
	Store
	left  int64
	trip  func()
	spent atomic.Int64
	once  sync.Once
}

func (w *tripwire) Send(ctx context.Context, req *rpc.SendReq) (*rpc.SendRes, io.ReadCloser, error) {
	res, stream, err := w.Store.Send(ctx, req)
	if err != nil {
		return nil, nil, err
	}
	return res, &tripwireStream{stream, w}, nil
}

type tripwireStream struct {
	io.ReadCloser
	wire *tripwire
}

func (s *tripwireStream) Read(p []byte) (int, error) {
	n, err := s.ReadCloser.Read(p)
	if s.wire.spent.Add(int64(n)) > s.wire.left {
		s.wire.once.Do(s.wire.trip)
	}
	return n, err
}
