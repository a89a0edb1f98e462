//go:build !rpc_notls

package chaos_test

import (
	"encoding/binary"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// proxy is the hostile network between a client and a server. Clients that come from different addresses of the
// loopback are on different lanes, each with faults of its own.
type proxy struct {
	l      net.Listener
	target string
	wg     sync.WaitGroup

	mu    sync.Mutex
	lanes map[string]*lane
	next  int
	done  bool
}

// lane is the way of the connections of one client.
type lane struct {
	p    *proxy
	ip   net.IP
	hole gate // while shut nothing passes, in no direction, not even an end

	// plan says what happens to the n-th connection, counted from 0; nil is nothing.
	plan func(n int) (up, down fault)

	mu       sync.Mutex
	conns    map[net.Conn]struct{}
	n        int
	bytes    [2]atomic.Int64 // to the server, to the client
	transmit [2]func(p []byte)
}

// The directions.
const (
	up   = 0 // to the server
	down = 1 // to the client
)

// The ways to cut.
const (
	cutEnd   = 0 // both ends see the end of the stream
	cutReset = 1 // both ends see a reset
	cutHalf  = 2 // the receiver sees the end of the stream, the other direction lives on
)

var cutNames = [...]string{"end", "reset", "half"}

// fault is what happens to one direction of one connection. The zero value is nothing.
type fault struct {
	cut     bool
	after   int64 // bytes that pass before the cut
	how     int
	flip    byte          // what to xor
	flipAt  int64         // where: heartbeats are not counted
	segment int           // the most bytes that pass at a time
	delay   time.Duration // before each of those
	stall   *gate         // while shut nothing passes
}

// gate holds up who waits at it while it is shut.
type gate struct {
	mu   sync.Mutex
	shut chan struct{} // nil: open
}

func (g *gate) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.shut == nil {
		g.shut = make(chan struct{})
	}
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.shut != nil {
		close(g.shut)
		g.shut = nil
	}
}

func (g *gate) wait() {
	if g == nil {
		return
	}
	for {
		g.mu.Lock()
		shut := g.shut
		g.mu.Unlock()
		if shut == nil {
			return
		}
		<-shut
	}
}

// newProxy forwards to target until the test ends.
func newProxy(t testing.TB, target string) *proxy {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	p := &proxy{l: l, target: target, lanes: map[string]*lane{}}
	p.wg.Go(p.accept)
	t.Cleanup(p.close)
	return p
}

func (p *proxy) close() {
	p.l.Close()
	p.mu.Lock()
	p.done = true
	lanes := p.lanes
	p.mu.Unlock()
	for _, ln := range lanes {
		ln.shutdown()
	}
	p.wg.Wait()
}

// addr is where to connect to.
func (p *proxy) addr() string { return p.l.Addr().String() }

// lane makes a new one.
func (p *proxy) lane(plan func(n int) (up, down fault)) *lane {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.next++
	ip := net.IPv4(127, byte(1+p.next>>16), byte(p.next>>8), byte(p.next))
	ln := &lane{p: p, ip: ip, plan: plan, conns: map[net.Conn]struct{}{}}
	p.lanes[ip.String()] = ln
	return ln
}

func (p *proxy) accept() {
	for {
		c, err := p.l.Accept()
		if err != nil {
			return
		}
		p.mu.Lock()
		ln := p.lanes[c.RemoteAddr().(*net.TCPAddr).IP.String()]
		p.mu.Unlock()
		if ln == nil {
			c.Close()
			continue
		}
		p.wg.Go(func() { ln.serve(c) })
	}
}

// shutdown ends the lane's connections, and lets no more begin.
func (ln *lane) shutdown() {
	ln.mu.Lock()
	conns := ln.conns
	ln.conns = nil
	ln.mu.Unlock()
	for c := range conns {
		c.Close()
	}
	ln.hole.open()
}

// drop ends the lane's connections with a reset, as a router does that has lost its mind.
func (ln *lane) drop() {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	for c := range ln.conns {
		reset(c)
	}
}

func (ln *lane) add(c net.Conn) bool {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	if ln.conns == nil {
		return false
	}
	ln.conns[c] = struct{}{}
	return true
}

func (ln *lane) remove(c net.Conn) {
	c.Close()
	ln.mu.Lock()
	defer ln.mu.Unlock()
	if ln.conns != nil {
		delete(ln.conns, c)
	}
}

func (ln *lane) serve(client net.Conn) {
	defer ln.remove(client)
	if !ln.add(client) {
		return
	}
	ln.mu.Lock()
	n, plan := ln.n, ln.plan
	ln.n++
	ln.mu.Unlock()
	ln.hole.wait()
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: ln.ip}}
	server, err := dialer.Dial("tcp", ln.p.target)
	if err != nil {
		return
	}
	defer ln.remove(server)
	if !ln.add(server) {
		return
	}
	var faults [2]fault
	if plan != nil {
		faults[up], faults[down] = plan(n)
	}
	both := sync.WaitGroup{}
	both.Go(func() { ln.pump(up, client, server, faults[up]) })
	both.Go(func() { ln.pump(down, server, client, faults[down]) })
	both.Wait()
}

// pump carries one direction.
func (ln *lane) pump(dir int, from, to net.Conn, f fault) {
	size := 32 << 10
	if f.segment > 0 {
		size = f.segment
	}
	buf := make([]byte, size)
	var passed int64
	at := newOffsets(dir)
	for {
		if f.cut && passed >= f.after {
			count("connections cut", 1)
			cut(from, to, f.how)
			return
		}
		most := len(buf)
		if f.cut {
			most = int(min(int64(most), f.after-passed))
		}
		n, err := from.Read(buf[:most])
		ln.hole.wait()
		f.stall.wait()
		if f.delay > 0 {
			<-time.After(f.delay)
		}
		if f.flip != 0 {
			for i, b := range buf[:n] {
				if offset, ok := at.next(b); ok && offset == f.flipAt {
					buf[i] ^= f.flip
					count("bits flipped", 1)
				}
			}
		}
		passed += int64(n)
		ln.bytes[dir].Add(int64(n))
		if tap := ln.transmit[dir]; tap != nil {
			tap(buf[:n])
		}
		if n > 0 {
			if _, werr := to.Write(buf[:n]); werr != nil {
				reset(from)
				return
			}
		}
		switch {
		case err == io.EOF:
			closeWrite(to)
			return
		case err != nil:
			reset(to)
			return
		}
	}
}

// offsets counts the bytes of one direction of a session without its heartbeats, which come when they like.
type offsets struct {
	n      int64
	lines  int // of the preface that are still to come
	label  int // bytes of it that are still to come
	header []byte
	left   int // bytes of the payload
}

func newOffsets(dir int) *offsets {
	o := &offsets{lines: 1}
	if dir == up {
		o.label = 64
	}
	return o
}

// next takes note of the next byte and returns its offset, unless it is a heartbeat's.
func (o *offsets) next(b byte) (int64, bool) {
	switch {
	case o.lines > 0:
		if b == '\n' {
			o.lines--
		}
	case o.label > 0:
		o.label--
	case o.left > 0:
		o.left--
	default:
		o.header = append(o.header, b)
		heartbeat := o.header[0] == tHeartbeat
		if len(o.header) == 8 {
			o.left = int(binary.BigEndian.Uint32(o.header[4:]))
			o.header = o.header[:0]
		}
		if heartbeat {
			return 0, false
		}
	}
	o.n++
	return o.n - 1, true
}

func cut(from, to net.Conn, how int) {
	switch how {
	case cutReset:
		reset(from)
		reset(to)
	case cutEnd:
		closeWrite(from)
		fallthrough
	case cutHalf:
		closeWrite(to)
		io.Copy(io.Discard, from) // until its end: closing with something unread would be a reset
	}
}

func closeWrite(c net.Conn) { c.(*net.TCPConn).CloseWrite() }

func reset(c net.Conn) {
	c.(*net.TCPConn).SetLinger(0)
	c.Close()
}
