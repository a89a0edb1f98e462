//go:build !rpc_notls

package chaos_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"runtime/metrics"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.org/rpc"
)

// ---- The target: a server in a process of its own, which tells what it holds --------------------------------------

// roleTarget serves until its standard input ends.
func roleTarget() {
	var running, peak, ended atomic.Int64
	enter := func() func() {
		n := running.Add(1)
		for old := peak.Load(); n > old && !peak.CompareAndSwap(old, n); old = peak.Load() {
		}
		return func() { running.Add(-1); ended.Add(1) }
	}
	v := echo
	v.call = func(ctx context.Context, req string) (string, error) {
		defer enter()()
		switch req {
		case "block":
			<-ctx.Done()
		case "linger": // a handler that takes its time to notice
			<-ctx.Done()
			<-time.After(2 * time.Millisecond)
		case "large":
			return strings.Repeat("x", 32<<10), nil
		}
		return req, ctx.Err()
	}
	v.get = func(ctx context.Context, req string) (string, io.ReadCloser, error) {
		if req != "endless" {
			return echo.get(ctx, req)
		}
		leave := enter()
		return "", &programSource{Reader: contentForever(1), closed: leave}, nil
	}
	v.put = func(ctx context.Context, req string, r io.Reader) (string, error) {
		defer enter()()
		if req == "unread" {
			<-ctx.Done()
			return "", ctx.Err()
		}
		_, err := io.Copy(io.Discard, r)
		return req, err
	}
	s := v.server(rpc.ServerConfig{HeartbeatInterval: time.Second, HandshakeTimeout: 5 * time.Second, MaxHandlersPerClient: clientHandlers})
	rpc.HandleCall(s, "state", func(context.Context, *rpc.PingReq) (*rpc.PingRes, error) {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		st := s.Stats()
		live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}} // of the collection: what came since may be garbage
		metrics.Read(live)
		return &rpc.PingRes{Echo: fmt.Sprint(live[0].Value.Uint64()+m.StackInuse, runtime.NumGoroutine(), running.Load(), peak.Load(), ended.Load(),
			st.OpenConns, st.HandshakesRefused)}, nil
	})
	l := roleListen()
	say("listening", l.Addr())
	go s.Serve(l)
	io.Copy(io.Discard, os.Stdin)
}

// targetState is what a target says of itself.
type targetState struct {
	memory                                             int64
	goroutines, running, peak, ended, conns, refusedHS int64
}

// clientHandlers is how many handlers the targets run for one client at most.
const clientHandlers = 192

// target is a server under attack, and an honest client of it.
type target struct {
	t      testing.TB
	tr     transport
	addr   string
	honest *rpc.Client
	before targetState
}

func newTarget(t testing.TB, tr transport) *target {
	g := &target{t: t, tr: tr}
	p := startChild(t, "target", nil, tlsVariable+"="+tlsDir(t, tr), addrVariable+"=127.0.0.1:0")
	g.addr = p.line("listening")
	g.honest = newClient(t, tr.connect(t, g.addr, net.IPv4(127, 0, 0, 1)), rpc.ClientConfig{})
	for range 3 {
		check(t, useAll(t.Context(), g.honest))
	}
	g.before = g.state()
	return g
}

func (g *target) state() (st targetState) {
	g.t.Helper()
	var res rpc.PingRes
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := g.honest.Call(ctx, "state", nil, &res); err != nil {
		g.t.Fatalf("the honest client: %v", err)
	}
	_, err := fmt.Sscan(res.Echo, &st.memory, &st.goroutines, &st.running, &st.peak, &st.ended, &st.conns, &st.refusedHS)
	check(g.t, err)
	return st
}

// serves has a new honest client do one of everything.
func (g *target) serves(name string) {
	g.t.Helper()
	took, err := g.served(honest)
	if err != nil {
		g.t.Errorf("%s: an honest client: %v", name, err)
	}
	count("attacks: honest clients served meanwhile, each with new connections, a call and two streams", 1)
	most("attacks: longest time until such a client was served, in ms (promised: 1000)", took.Milliseconds())
	if took > 10*time.Second { // a busy machine is granted the difference
		g.t.Errorf("%s: an honest client was served after %v", name, took)
	}
}

// servesThere is serves for a client at the attackers' own address. Who comes from there may have to give way to them, and
// then comes again.
func (g *target) servesThere(name string) {
	g.t.Helper()
	began := time.Now()
	recoveredIn(g.t, name, func() error {
		_, err := g.served(attackers)
		return err
	})
	most("attacks: the same for a client at the attackers' own address, which may have to try again", time.Since(began).Milliseconds())
}

func (g *target) served(from net.IP) (time.Duration, error) {
	c := rpc.NewClient(g.tr.connect(g.t, g.addr, from), rpc.ClientConfig{})
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	began := time.Now()
	err := useAll(ctx, c)
	return time.Since(began), err
}

// flat checks that the server's memory has not grown.
func (g *target) flat(name string, limit int64) {
	g.t.Helper()
	grown := g.state().memory - g.before.memory
	for try := 0; try < 5 && grown > limit; try++ { // what comes during a collection is not found to be garbage
		pause()
		grown = min(grown, g.state().memory-g.before.memory)
	}
	most("attacks: most memory that a server had more than before, in KiB", grown>>10)
	if grown > limit {
		g.t.Errorf("%s: the server's memory grew by %d KiB", name, grown>>10)
	}
}

// clean checks that nothing is left of an attack.
func (g *target) clean(name string) {
	g.t.Helper()
	var now targetState
	for deadline := time.Now().Add(patience); ; pause() {
		now = g.state()
		if now.goroutines <= g.before.goroutines+4 && now.conns <= g.before.conns && now.running <= 1 {
			break
		}
		if time.Now().After(deadline) {
			g.t.Errorf("%s has left: %+v, before %+v", name, now, g.before)
			return
		}
	}
	count("attacks: servers of which nothing was left over afterwards", 1)
}

// Where they come from.
var (
	honest    = net.IPv4(127, 0, 0, 1)
	attackers = net.IPv4(127, 0, 0, 2)
)

func attack(addr string) (net.Conn, error) {
	d := dialerFrom(attackers)
	d.Timeout = patience
	c, err := d.Dial("tcp", addr)
	if err == nil {
		enemies.mu.Lock()
		enemies.conns = append(enemies.conns, c)
		enemies.mu.Unlock()
	}
	return c, err
}

// clientHello is what a TLS client says first.
func clientHello() []byte {
	a, b := memPair(1 << 16)
	defer a.Close()
	go func() {
		tls.Client(a, &tls.Config{ServerName: "server"}).Handshake()
	}()
	buf := make([]byte, 4096)
	n, _ := b.Read(buf)
	b.Close()
	return buf[:n]
}

// TestBeforeAuthentication: a thousand peers that never get through a handshake keep nobody out, and cost nothing.
func TestBeforeAuthentication(t *testing.T) {
	leaks(t)
	hello := clientHello()
	slowly := func(text string) func(c net.Conn, stop <-chan struct{}) {
		return func(c net.Conn, stop <-chan struct{}) {
			for i := range text {
				if _, err := c.Write([]byte{text[i]}); err != nil {
					return
				}
				select {
				case <-stop:
				case <-time.After(time.Second):
				}
			}
		}
	}
	once := func(b []byte) func(c net.Conn, stop <-chan struct{}) {
		return func(c net.Conn, stop <-chan struct{}) { c.Write(b) }
	}
	var moved atomic.Int64
	for _, a := range []struct {
		name  string
		tr    transport
		speak func(c net.Conn, stop <-chan struct{})
	}{
		{"silent", overTCP, once(nil)},
		{"silent", overTLS, once(nil)},
		{"in mid TLS handshake", overTLS, once(hello[:len(hello)/2])},
		{"after a TLS ClientHello", overTLS, once(hello)},
		{"TLS on a plain port", overTCP, once(hello)},
		{"one byte a second", overTCP, slowly(banner + label("zrepl_control"))},
		{"one byte a second", overTLS, slowly(string(hello))},
		{"in mid preface", overTCP, once([]byte(banner + "zrepl_data"))},
		{"garbage", overTCP, func(c net.Conn, _ <-chan struct{}) {
			b := make([]byte, 1+rand.IntN(4096))
			io.ReadFull(contentForever(rand.Uint64()), b)
			c.Write(b)
		}},
		{"garbage", overTLS, once([]byte(strings.Repeat("garbage", 100)))},
		{"HTTP", overTCP, once([]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"))},
		{"other versions", overTCP, once([]byte("ZREPL-RPC 7-9 hb=5000\n" + label("zrepl_control")))},
		{"unknown label", overTCP, once([]byte(banner + label("nobody")))},
		{"megabytes without a newline", overTCP, func(c net.Conn, stop <-chan struct{}) {
			b := bytes.Repeat([]byte("a"), 1<<16)
			copy(b, "ZREPL-RPC 1-1 a=")
			for range 64 {
				n, err := c.Write(b)
				if moved.Add(int64(n)); err != nil {
					return
				}
			}
		}},
	} {
		t.Run(a.name+" over "+a.tr.name, func(t *testing.T) {
			g := newTarget(t, a.tr)
			stop := make(chan struct{})
			var wg sync.WaitGroup
			var opened atomic.Int64
			const peers = 1000
			comeback := time.Second
			if raceEnabled { // the race detector makes a handshake of TLS cost ten times as much
				comeback = 20 * time.Second
			}
			for range peers {
				wg.Go(func() {
					for { // who is thrown out comes back
						c, err := attack(g.addr)
						if err != nil {
							return
						}
						opened.Add(1)
						gone := make(chan struct{})
						go func() {
							defer close(gone)
							go a.speak(c, stop)
							io.Copy(io.Discard, c)
						}()
						select {
						case <-stop:
						case <-gone:
						}
						c.Close()
						<-gone
						select {
						case <-stop:
							return
						case <-time.After(comeback):
						}
					}
				})
			}
			eventually(t, "the peers' connections", func() bool { return opened.Load() >= peers })
			rounds := 3
			if long() {
				rounds = 30
			}
			for range rounds {
				g.serves(a.name)
				g.servesThere(a.name)
			}
			g.flat(a.name, 24<<20)
			close(stop)
			wg.Wait()
			g.clean(a.name)
			count("attacks before authentication: kinds", 1)
			count("attacks before authentication: connections", opened.Load())
		})
	}
	count("attacks before authentication: megabytes without a newline that were sent", moved.Load()>>20)
}

// enemyConn is an authenticated peer that does what it likes.
type enemyConn struct {
	net.Conn
	r *bufio.Reader
}

func (g *target) enemy(name string) *enemyConn {
	g.t.Helper()
	c, err := attack(g.addr)
	check(g.t, err)
	g.t.Cleanup(func() { c.Close() })
	_, err = io.WriteString(c, "ZREPL-RPC 1-1 hb=300000 max=67108864\n"+label(name))
	check(g.t, err)
	e := &enemyConn{c, bufio.NewReader(c)}
	line, err := readAnswer(e.r)
	if err != nil || !strings.HasPrefix(line, "ZREPL-RPC 1 ok") {
		g.t.Fatalf("the server answered %q, %v", line, err)
	}
	return e
}

const (
	control = "zrepl_control"
	data    = "zrepl_data"
)

// violations are bytes that end a connection, and nothing else.
var violations = []struct {
	name, label, bytes string
}{
	{"unknown type 0", control, head(0, 0)},
	{"unknown type 0", data, head(0, 0)},
	{"unknown type 0x02", control, head(2, 0)},
	{"unknown type 0x26", data, head(0x26, 4) + "abcd"},
	{"unknown type 0xff", control, head(0xff, 0)},
	{"flags", control, "\x01\x01\x00\x00\x00\x00\x00\x00"},
	{"flags", data, "\x20\x80\x00\x00\x00\x00\x00\x0d"},
	{"reserved, first byte", control, "\x01\x00\x01\x00\x00\x00\x00\x00"},
	{"reserved, second byte", data, "\x01\x00\x00\x01\x00\x00\x00\x00"},
	{"heartbeat with a payload", control, head(tHeartbeat, 1) + "x"},
	{"heartbeat of 4 GiB", data, head(tHeartbeat, 1<<32-1)},
	{"call of 4 GiB", control, head(tCall, 1<<32-1)},
	{"call over the limit", control, head(tCall, 8+8+1+255+64<<20+1)},
	{"call with a body over the limit", control, head(tCall, 8+8+1+4+64<<20+1) + payload(uint64(1), uint64(0), str8("call"))},
	{"call without fields", control, head(tCall, 0)},
	{"call cut in its fields", control, frame(tCall, uint64(1), uint64(0))},
	{"call whose name is longer than it", control, frame(tCall, uint64(1), uint64(0), 255, "call")},
	{"call 0", control, callFrame(0, "hello")},
	{"call id reused", control, callFrame(5, "block") + callFrame(5, "block")},
	{"call id falls", control, callFrame(5, "hello") + callFrame(4, "hello")},
	{"cancel of call 0", control, frame(tCancel, uint64(0))},
	{"cancel of a call never made", control, callFrame(1, "hello") + frame(tCancel, uint64(2))},
	{"cancel too short", control, frame(tCancel, "1234567")},
	{"cancel too long", control, frame(tCancel, "123456789")},
	{"reply from a client", control, frame(tReply, uint64(1), 0, "x")},
	{"goaway from a client", control, frame(tGoaway, uint64(1))},
	{"download on a control connection", control, getFrame("hello")},
	{"upload on a control connection", control, putFrame("hello")},
	{"result on a control connection", control, frame(tResult, 0)},
	{"data on a control connection", control, frame(tData, "x")},
	{"end on a control connection", control, frame(tEnd, uint64(0))},
	{"fail on a control connection", control, frame(tFail, 1)},
	{"call on a data connection", data, callFrame(1, "hello")},
	{"cancel on a data connection", data, frame(tCancel, uint64(1))},
	{"reply on a data connection", data, frame(tReply, uint64(1), 0, "x")},
	{"result from a client", data, frame(tResult, 0)},
	{"goaway on a data connection", data, frame(tGoaway, uint64(1))},
	{"data before a request", data, frame(tData, "x")},
	{"end before a request", data, frame(tEnd, uint64(0))},
	{"fail before a request", data, frame(tFail, 1)},
	{"download of 4 GiB", data, head(tDownload, 1<<32-1)},
	{"download over the limit", data, head(tDownload, 8+1+255+64<<20+1)},
	{"download whose name is longer than it", data, frame(tDownload, uint64(0), 200, "get")},
	{"download without fields", data, head(tDownload, 0)},
	{"second request during a download", data, getFrame("endless") + getFrame("hello")},
	{"upload during a download", data, getFrame("endless") + putFrame("hello")},
	{"data during a download", data, getFrame("endless") + frame(tData, "x")},
	{"upload of 4 GiB", data, head(tUpload, 1<<32-1)},
	{"upload without fields", data, head(tUpload, 0)},
	{"empty data", data, putFrame("hello") + head(tData, 0)},
	{"data over a MiB", data, putFrame("hello") + head(tData, 1<<20+1)},
	{"data of 4 GiB", data, putFrame("hello") + head(tData, 1<<32-1)},
	{"end without a total", data, putFrame("hello") + head(tEnd, 0)},
	{"end with more than a total", data, putFrame("hello") + frame(tEnd, uint64(0), "x")},
	{"end with a total too large", data, putFrame("hello") + frame(tData, "abc") + frame(tEnd, uint64(4))},
	{"end with a total too small", data, putFrame("hello") + frame(tData, "abc") + frame(tEnd, uint64(2))},
	{"fail with code 0", data, putFrame("hello") + frame(tFail, 0, "fine")},
	{"fail without a code", data, putFrame("hello") + head(tFail, 0)},
	{"fail with 4 KiB and a byte", data, putFrame("hello") + frame(tFail, 1, strings.Repeat("x", 4097))},
	{"fail of 4 GiB", data, putFrame("hello") + head(tFail, 1<<32-1)},
	{"request in the middle of an upload", data, putFrame("hello") + frame(tData, "abc") + getFrame("hello")},
	{"call in the middle of an upload", data, putFrame("hello") + callFrame(1, "hello")},
	{"goaway in the middle of an upload", data, putFrame("hello") + frame(tGoaway, uint64(1))},
	{"result in the middle of an upload", data, putFrame("hello") + frame(tResult, 0)},
	{"half of a header, then the end", control, "\x10\x00\x00"},
	{"half of a call, then the end", control, callFrame(1, "hello")[:20]},
	{"half of an upload, then the end", data, putFrame("hello") + frame(tData, "abc")[:9]},
}

// TestEveryViolationEndsItsConnectionOnly: each violation, on a connection of its own.
func TestEveryViolationEndsItsConnectionOnly(t *testing.T) {
	leaks(t)
	g := newTarget(t, overTCP)
	for _, v := range violations {
		e := g.enemy(v.label)
		io.WriteString(e, v.bytes)
		if strings.HasSuffix(v.name, "then the end") {
			e.Conn.(*net.TCPConn).CloseWrite()
		}
		e.SetReadDeadline(time.Now().Add(patience))
		for {
			kind, body, err := readFrame(e.r)
			if err != nil {
				var late net.Error
				if errors.As(err, &late) && late.Timeout() {
					t.Errorf("%s on %s: the connection is open still", v.name, v.label)
				}
				break
			}
			if kind == tResult && body[0] == 0 && strings.HasPrefix(v.bytes, "\x21") {
				t.Errorf("%s on %s: success", v.name, v.label)
			}
		}
		e.Close()
		count("violations of the protocol by a client, each of which ended its connection and nothing else", 1)
	}
	g.serves("violations")
	g.flat("violations", 8<<20)
	g.clean("violations")
}

// TestAuthenticatedEnemies: what a client can do within the protocol, and what it costs the others.
func TestAuthenticatedEnemies(t *testing.T) {
	leaks(t)
	million := 1_000_000
	if raceEnabled && !long() {
		million = 100_000
	}
	endless := frame(tData, strings.Repeat("x", 32<<10))
	for _, a := range []struct {
		name  string
		limit int64 // of the memory's growth
		run   func(t *testing.T, g *target)
	}{
		{"a million calls at once", 48 << 20, func(t *testing.T, g *target) {
			e := g.enemy(control)
			var replies atomic.Int64
			done := async(func() error {
				for range million {
					kind, body, err := readFrame(e.r)
					if err != nil || kind != tReply {
						return fmt.Errorf("%#x %q %w", kind, body, err)
					}
					replies.Add(1)
				}
				return nil
			})
			go func() {
				w := bufio.NewWriterSize(e, 1<<16)
				for i := range million {
					w.WriteString(callFrame(uint64(i+1), "hello"))
				}
				w.Flush()
			}()
			g.serves("a million calls at once")
			g.flat("a million calls at once", 48<<20)
			if err := <-async(func() error {
				select {
				case err := <-done:
					return err
				case <-time.After(3 * patience):
					return fmt.Errorf("%d replies", replies.Load())
				}
			}); err != nil {
				t.Error(err)
			}
			count("attacks after authentication: calls at once, each with a reply", replies.Load())
		}},
		{"cancels as fast as calls", 48 << 20, func(t *testing.T, g *target) {
			e := g.enemy(control)
			n := million / 4
			go func() {
				w := bufio.NewWriterSize(e, 1<<16)
				for i := range n {
					w.WriteString(callFrame(uint64(i+1), "linger") + frame(tCancel, uint64(i+1)))
				}
				w.Flush()
			}()
			for range n {
				if kind, _, err := readFrame(e.r); err != nil || kind != tReply {
					t.Fatalf("%#x %v", kind, err)
				}
			}
			peak := g.state().peak
			if most("attacks after authentication: handlers of one client that ran at once (limit 192, and 1 of an honest client)", peak); peak > clientHandlers+1 {
				t.Errorf("%d handlers ran at once", peak)
			}
			count("attacks after authentication: calls cancelled at once", int64(n))
		}},
		{"replies never read", 64 << 20, func(t *testing.T, g *target) {
			for range 8 {
				e := g.enemy(control)
				e.SetWriteDeadline(time.Now().Add(time.Second))
				w := bufio.NewWriterSize(e, 1<<16)
				for i := range million / 10 {
					if _, err := w.WriteString(callFrame(uint64(i+1), "large")); err != nil {
						break
					}
				}
			}
		}},
		{"claims of 64 MiB, of which a byte comes", 48 << 20, func(t *testing.T, g *target) {
			for i := range 200 {
				name, claim := control, head(tCall, 60<<20)+payload(uint64(1), uint64(0), str8("call"), "x")
				if i%2 == 0 {
					name, claim = data, head(tDownload, 60<<20)+payload(uint64(0), str8("get"), "x")
				}
				io.WriteString(g.enemy(name), claim)
			}
		}},
		{"uploads that never end", 24 << 20, func(t *testing.T, g *target) {
			var wg sync.WaitGroup
			var sent atomic.Int64
			for range 16 {
				e := g.enemy(data)
				wg.Go(func() {
					e.SetWriteDeadline(time.Now().Add(time.Second))
					io.WriteString(e, putFrame("hello"))
					for {
						n, err := io.WriteString(e, endless)
						if sent.Add(int64(n)); err != nil {
							return
						}
					}
				})
			}
			<-time.After(500 * time.Millisecond)
			g.serves("uploads that never end")
			g.flat("uploads that never end", 24<<20)
			wg.Wait()
			count("attacks after authentication: bytes of uploads without an end", sent.Load())
		}},
		{"uploads that nobody reads", 48 << 20, func(t *testing.T, g *target) {
			for range 50 {
				e := g.enemy(data)
				io.WriteString(e, putFrame("unread"))
				e.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
				for _, err := io.WriteString(e, endless); err == nil; _, err = io.WriteString(e, endless) {
				}
			}
		}},
		{"downloads that are not read", 48 << 20, func(t *testing.T, g *target) {
			for range 100 {
				io.WriteString(g.enemy(data), getFrame("endless"))
			}
		}},
		{"as many connections as it likes", 24 << 20, func(t *testing.T, g *target) {
			open := 0
			for range 300 {
				c, err := attack(g.addr)
				check(t, err)
				t.Cleanup(func() { c.Close() })
				io.WriteString(c, banner+label(data))
				if line, _ := readAnswer(c); strings.HasPrefix(line, "ZREPL-RPC 1 ok") {
					open++
				} else if !strings.Contains(line, "refused resource-exhausted") {
					t.Fatalf("the server said %q", line)
				}
			}
			if open > 256 {
				t.Errorf("%d connections of one client", open)
			}
			c := rpc.NewClient(g.tr.connect(t, g.addr, net.IPv4(127, 0, 0, 3)), rpc.ClientConfig{})
			defer c.Close()
			check(t, useAll(t.Context(), c))
		}},
		{"as many handlers as it likes", 24 << 20, func(t *testing.T, g *target) {
			for range 4 {
				e := g.enemy(control)
				for i := range 1000 {
					io.WriteString(e, callFrame(uint64(i+1), "block"))
				}
			}
			eventually(t, "as many handlers as one client may have", func() bool { return g.state().running >= clientHandlers })
			if n := g.state().running; n > clientHandlers+1 {
				t.Errorf("%d handlers run", n)
			}
			c := rpc.NewClient(g.tr.connect(g.t, g.addr, net.IPv4(127, 0, 0, 3)), rpc.ClientConfig{})
			defer c.Close()
			check(t, useAll(t.Context(), c))
		}},
	} {
		t.Run(a.name, func(t *testing.T) {
			g := newTarget(t, overTCP)
			a.run(t, g)
			g.serves(a.name)
			g.flat(a.name, a.limit)
			g.hangUp(a.name)
			count("attacks after authentication: kinds", 1)
		})
	}
}

// hangUp ends the attackers' connections, and wants nothing of them left.
func (g *target) hangUp(name string) {
	enemies.mu.Lock()
	for _, c := range enemies.conns {
		c.Close()
	}
	enemies.conns = nil
	enemies.mu.Unlock()
	g.clean(name)
}

// enemies are the connections of the current attack.
var enemies struct {
	mu    sync.Mutex
	conns []net.Conn
}

// TestAClientThatSendsNoHeartbeats: it is given up as soon as it has promised.
func TestAClientThatSendsNoHeartbeats(t *testing.T) {
	leaks(t)
	g := newTarget(t, overTCP)
	for _, name := range []string{control, data} {
		c, err := attack(g.addr)
		check(t, err)
		defer c.Close()
		request := callFrame(1, "block")
		if name == data {
			request = putFrame("hello") + frame(tData, "x")
		}
		began := time.Now()
		io.WriteString(c, "ZREPL-RPC 1-1 hb=100\n"+label(name)+request)
		c.SetReadDeadline(began.Add(patience))
		io.Copy(io.Discard, c)
		took := time.Since(began)
		if took < 300*time.Millisecond || took > 400*time.Millisecond+holeSlack {
			t.Errorf("a silent client that has promised a heartbeat every 100ms was given up after %v", took)
		}
	}
	g.clean("no heartbeats")
}
