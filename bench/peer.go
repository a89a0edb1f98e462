package main

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"sync"
)

// peer is a client and its server, both in this process, over the loopback. Its functions may be called from several
// goroutines at once; they are nil for what it cannot do.
type peer struct {
	name   string
	call   func()                           // 64 bytes there and back
	client func() (call, disconnect func()) // another client of the same server
	bulk   func(n int64)                    // n bytes from the server's memory to io.Discard
	upload func(n int64)                    // n bytes from the client's memory to io.Discard
	close  func()
}

// transport is plain TCP, or mutual TLS 1.3 with the configs that the library makes; all peers use the same.
type transport struct {
	server, client *tls.Config // nil: plain
}

func (t transport) listen() net.Listener {
	l := must(net.Listen("tcp", "127.0.0.1:0"))
	if t.server != nil {
		l = tls.NewListener(l, t.server)
	}
	return l
}

func (t transport) dial(addr string) (net.Conn, error) {
	if t.client != nil {
		return tls.Dial("tcp", addr, t.client)
	}
	return net.Dial("tcp", addr)
}

// acceptEach serves each connection of l in a goroutine of its own, until l is closed. A connection is closed when its
// goroutine returns, which is when its client has gone.
func acceptEach(l net.Listener, serve func(net.Conn)) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			serve(c)
		}()
	}
}

// payload is what calls carry, there and back.
var payload = make([]byte, 64)

// block is the memory that bulk data comes from. It is read from changing places, so that large and small buffers
// touch as much of it.
var block = make([]byte, 2<<20)

// memory is a source of n bytes. It has no WriterTo: who reads chooses the size.
type memory struct {
	left int64
	at   int
}

func (m *memory) Read(p []byte) (int, error) {
	if m.left == 0 {
		return 0, io.EOF
	}
	n := copy(p[:min(int64(len(p)), m.left)], block[m.at:])
	m.left -= int64(n)
	m.at = (m.at + n) % (1 << 20)
	return n, nil
}

// plainCopy copies with the given buffer and nothing else: neither side may take a shorter way.
func plainCopy(dst io.Writer, src io.Reader, buffer []byte) (int64, error) {
	return io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, buffer)
}

// check panics: a peer that fails has no figures.
func check(err error) {
	if err != nil {
		panic(err)
	}
}

func must[T any](v T, err error) T {
	check(err)
	return v
}

func expect(what string, got, want int64) {
	if got != want {
		panic(fmt.Sprintf("%s: %d bytes instead of %d", what, got, want))
	}
}

// atOnce runs f n times at once, and returns when all have ended.
func atOnce(n int, f func(i int)) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { f(i) })
	}
	wg.Wait()
}
