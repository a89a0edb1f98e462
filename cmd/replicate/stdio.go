package main

import (
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"time"

	"example.org/rpc"
)

// pipeConn is a connection over two pipes.
type pipeConn struct {
	in, out *os.File // what is read and what is written
	addr    pipeAddr // of the peer
}

// pipeAddr names what is at the other end of pipes.
type pipeAddr string

func (a pipeAddr) Network() string { return "pipe" }
func (a pipeAddr) String() string  { return string(a) }

func (c *pipeConn) Read(p []byte) (int, error)  { return c.in.Read(p) }
func (c *pipeConn) Write(p []byte) (int, error) { return c.out.Write(p) }
func (c *pipeConn) LocalAddr() net.Addr         { return pipeAddr("stdio") }
func (c *pipeConn) RemoteAddr() net.Addr        { return c.addr }

// CloseWrite lets the peer read to the end of what was written.
func (c *pipeConn) CloseWrite() error { return c.out.Close() }

// Close unblocks Read and Write.
func (c *pipeConn) Close() error {
	err := errors.Join(c.in.Close(), c.out.Close())
	if errors.Is(err, os.ErrClosed) { // after CloseWrite
		return nil
	}
	return err
}

func (c *pipeConn) SetReadDeadline(t time.Time) error  { return c.in.SetReadDeadline(t) }
func (c *pipeConn) SetWriteDeadline(t time.Time) error { return c.out.SetWriteDeadline(t) }
func (c *pipeConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// stdioListener is a listener with one connection, over stdin and stdout. When that ends, it is closed.
type stdioListener struct {
	conn  chan net.Conn // of the one that is still to be accepted
	ended chan struct{}
	end   func() // closes ended, once
}

// listenStdio makes stdin and stdout a connection from whoever is at the other end, who has that identity.
func listenStdio(identity string) (*rpc.Listener, error) {
	outliveStderr()
	in, err := pollable(os.Stdin)
	if err != nil {
		return nil, err
	}
	out, err := pollable(os.Stdout)
	if err != nil {
		in.Close()
		return nil, err
	}
	l := &stdioListener{conn: make(chan net.Conn, 1), ended: make(chan struct{})}
	l.end = sync.OnceFunc(func() { close(l.ended) })
	l.conn <- &stdioConn{pipeConn{in, out, pipeAddr("stdio")}, l.end}
	return &rpc.Listener{Listener: l, Authenticate: func(_ context.Context, conn net.Conn) (net.Conn, string, error) {
		return conn, identity, nil
	}}, nil
}

// stdioConn tells when it is closed.
type stdioConn struct {
	pipeConn
	end func()
}

func (c *stdioConn) Close() error {
	defer c.end()
	return c.pipeConn.Close()
}

func (l *stdioListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conn:
		return conn, nil
	default:
	}
	<-l.ended
	return nil, net.ErrClosed
}

func (l *stdioListener) Close() error {
	l.end()
	return nil
}

func (l *stdioListener) Addr() net.Addr { return pipeAddr("stdio") }
