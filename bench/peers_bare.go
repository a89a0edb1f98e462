package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
)

// bareSizes are the buffers of bare copies. 65483 is a segment of the loopback.
var bareSizes = []int{32 << 10, 65483, 128 << 10, 256 << 10, 1 << 20}

// bare is a plain copy or ping-pong over connections that are kept, as the library keeps its own.
type bare struct {
	t      transport
	addr   string
	buffer int

	mu   sync.Mutex
	idle []*bareConn
}

// bareConn is an end of a connection with the buffer that copies over it use.
type bareConn struct {
	net.Conn
	buffer  []byte
	message [64]byte
}

// startBare starts a server that answers 64 bytes with 64 bytes, the first 8 being how many more it is to send.
func startBare(t transport, buffer int) *peer {
	l := t.listen()
	b := &bare{t: t, addr: l.Addr().String(), buffer: buffer}
	go acceptEach(l, b.serve) // until Close
	return &peer{name: fmt.Sprintf("bare, %s buffer", sizeText(buffer)), call: func() { b.transfer(0) }, bulk: b.transfer, client: func() (call, disconnect func()) {
		c := b.dial()
		return func() { c.transfer(0) }, func() { c.Close() }
	}, close: func() {
		l.Close()
		for _, c := range b.idle {
			c.Close()
		}
	}}
}

func sizeText(n int) string {
	if n%1024 == 0 {
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d B", n)
}

func (b *bare) serve(c net.Conn) {
	buffer := make([]byte, b.buffer)
	message := make([]byte, 64)
	for {
		if _, err := io.ReadFull(c, message); err != nil {
			return
		}
		n := int64(binary.BigEndian.Uint64(message))
		if n == 0 {
			must(c.Write(message))
			continue
		}
		must(plainCopy(c, &memory{left: n}, buffer))
	}
}

// transfer takes a connection that nobody uses.
func (b *bare) transfer(n int64) {
	b.mu.Lock()
	var c *bareConn
	if last := len(b.idle) - 1; last >= 0 {
		c, b.idle = b.idle[last], b.idle[:last]
	}
	b.mu.Unlock()
	if c == nil {
		c = b.dial()
	}
	c.transfer(n)
	b.mu.Lock()
	b.idle = append(b.idle, c)
	b.mu.Unlock()
}

func (b *bare) dial() *bareConn {
	return &bareConn{Conn: must(b.t.dial(b.addr)), buffer: make([]byte, b.buffer)}
}

// transfer is a ping-pong for n = 0, and otherwise a copy of n bytes.
func (c *bareConn) transfer(n int64) {
	binary.BigEndian.PutUint64(c.message[:], uint64(n))
	must(c.Write(c.message[:]))
	if n == 0 {
		must(io.ReadFull(c, c.message[:]))
		return
	}
	expect("bare copy", must(plainCopy(io.Discard, io.LimitReader(c, n), c.buffer)), n)
}
