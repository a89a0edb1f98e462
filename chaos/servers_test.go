//go:build !rpc_notls

package chaos_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.org/rpc"
)

// The same care for the client: servers that do what they like.

// evilServer speaks a script on each connection.
type evilServer struct {
	l  net.Listener
	wg sync.WaitGroup
	mu sync.Mutex
	cs map[net.Conn]struct{}
	n  atomic.Int64
}

func newEvilServer(t testing.TB, speak func(c net.Conn, n int)) *evilServer {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	e := &evilServer{l: l, cs: map[net.Conn]struct{}{}}
	e.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			e.mu.Lock()
			e.cs[c] = struct{}{}
			e.mu.Unlock()
			n := int(e.n.Add(1))
			e.wg.Go(func() {
				speak(c, n)
				io.Copy(io.Discard, c)
				c.Close()
				e.mu.Lock()
				delete(e.cs, c)
				e.mu.Unlock()
			})
		}
	})
	return e
}

func (e *evilServer) close() {
	e.l.Close()
	e.mu.Lock()
	for c := range e.cs {
		c.Close()
	}
	e.mu.Unlock()
	e.wg.Wait()
}

// evilOps are what a client asks of them.
var evilOps = map[string]func(ctx context.Context, c *rpc.Client) error{
	"call": func(ctx context.Context, c *rpc.Client) error { _, err := doCall(ctx, c, "hello"); return err },
	"get": func(ctx context.Context, c *rpc.Client) error {
		_, err := doGet(ctx, c, "hello", io.Discard)
		return err
	},
	"put": func(ctx context.Context, c *rpc.Client) error {
		_, err := doPut(ctx, c, "hello", content(1, 100<<10))
		return err
	},
	"own": func(ctx context.Context, c *rpc.Client) error {
		conn, err := c.Dial(ctx, "own")
		if err == nil {
			conn.Close()
		}
		return err
	},
	"put endless": func(ctx context.Context, c *rpc.Client) error {
		_, err := doPut(ctx, c, "hello", struct{ io.Reader }{contentForever(1)})
		return err
	},
}

// afterRequest reads until the client has said so much that its request is there: the preface and a frame.
func afterRequest(c net.Conn) {
	r := bufio.NewReader(c)
	readAnswer(r)
	io.ReadFull(r, make([]byte, 64))
	readFrame(r)
}

// evil is what a server says. It ends the operation with an error before its deadline; if "late" at it.
type evil struct {
	name, op string
	late     bool
	says     string
}

var evils = []evil{
	// Instead of an answer.
	{"nothing", "call", false, ""},
	{"nothing", "get", false, ""},
	{"nothing", "put", false, ""},
	{"nothing", "own", false, ""},
	{"garbage", "call", false, "\x00\xff\xfegarbage\x00"},
	{"HTTP", "get", false, "HTTP/1.1 400 Bad Request\r\n\r\n"},
	{"TLS", "put", false, "\x15\x03\x01\x00\x02\x02\x28"},
	{"SSH", "own", false, "SSH-2.0-OpenSSH_9.9\r\n"},
	{"half of an answer", "call", false, answer[:9]},
	{"an answer without an end", "get", false, "ZREPL-RPC 1 ok " + strings.Repeat("a", 8<<20)},
	{"an answer of 513 bytes", "put", false, "ZREPL-RPC 1 ok a=" + strings.Repeat("a", 513-18) + "\n"},
	{"control characters", "own", false, "ZREPL-RPC 1 ok a=\x1b[2J\n"},
	{"version 2", "call", false, "ZREPL-RPC 2 ok\n"},
	{"version 0", "get", false, "ZREPL-RPC 0 ok\n"},
	{"a version too long", "put", false, "ZREPL-RPC 18446744073709551617 ok\n"},
	{"hb of 0", "call", false, "ZREPL-RPC 1 ok hb=0\n"},
	{"hb of an hour", "get", false, "ZREPL-RPC 1 ok hb=3600000\n"},
	{"hb twice", "put", false, "ZREPL-RPC 1 ok hb=5000 hb=5000\n"},
	{"max too small", "call", false, "ZREPL-RPC 1 ok max=1\n"},
	{"max negative", "get", false, "ZREPL-RPC 1 ok max=-1\n"},
	{"two spaces", "put", false, "ZREPL-RPC 1  ok\n"},
	{"refused with nothing", "call", false, "ZREPL-RPC 1-1 refused\n"},
	{"refused without a reason", "get", false, "ZREPL-RPC 1-1 refused ok\n"},
	{"refused with a code that nobody knows", "own", false, "ZREPL-RPC 1-1 refused because I can\n"},
	{"refused by a range that is none", "call", false, "ZREPL-RPC 9-1 refused unavailable x\n"},

	// On a control connection.
	{"unknown type", "call", false, answer + head(0x7f, 0)},
	{"flags", "call", false, answer + "\x01\x01\x00\x00\x00\x00\x00\x00"},
	{"reserved", "call", false, answer + "\x01\x00\x00\x01\x00\x00\x00\x00"},
	{"reply of 4 GiB", "call", false, answer + head(tReply, 1<<32-1)},
	{"reply of 64 MiB and a byte", "call", false, answer + head(tReply, 9+64<<20+1)},
	{"reply of 64 MiB, of which a byte comes", "call", true, answer + head(tReply, 9+60<<20) + payload(uint64(1), 0, "x")},
	{"reply without fields", "call", false, answer + head(tReply, 8)},
	{"reply to call 0", "call", false, answer + frame(tReply, uint64(0), 0)},
	{"reply to a call never made", "call", false, answer + frame(tReply, uint64(2), 0)},
	{"reply that is no message", "call", false, answer + frame(tReply, uint64(1), 0, "\xff\xff\xff")},
	{"error text of 4 KiB and a byte", "call", false, answer + frame(tReply, uint64(1), 5, strings.Repeat("x", 4097))},
	{"error text that is no UTF-8, and a code that nobody knows", "call", false, answer + frame(tReply, uint64(1), 99, "\xff\x00\x1b[2J")},
	{"a call from the server", "call", false, answer + callFrame(1, "hello")},
	{"a cancel from the server", "call", false, answer + frame(tCancel, uint64(1))},
	{"a result", "call", false, answer + frame(tResult, 0)},
	{"data", "call", false, answer + frame(tData, "x")},
	{"goaway too short", "call", false, answer + frame(tGoaway, "x")},
	{"two goaways", "call", false, answer + frame(tGoaway, uint64(1)) + frame(tGoaway, uint64(1))},
	{"goaway for what was asked, again and again", "call", false, answer + frame(tGoaway, uint64(0))},
	{"goaway, then silence", "call", true, answer + frame(tGoaway, uint64(5))},
	{"heartbeats without an end", "call", true, answer + strings.Repeat(frame(tHeartbeat), 100_000)},

	// On a data connection: downloads.
	{"data before the result", "get", false, answer + frame(tData, "x")},
	{"end before the result", "get", false, answer + frame(tEnd, uint64(0))},
	{"two results", "get", false, answer + frame(tResult, 0) + frame(tResult, 0)},
	{"result of 4 GiB", "get", false, answer + head(tResult, 1<<32-1)},
	{"result without a code", "get", false, answer + head(tResult, 0)},
	{"result that is no message", "get", false, answer + frame(tResult, 0, "\xff")},
	{"data of nothing", "get", false, answer + frame(tResult, 0) + head(tData, 0)},
	{"data over a MiB", "get", false, answer + frame(tResult, 0) + head(tData, 1<<20+1)},
	{"data of 4 GiB", "get", false, answer + frame(tResult, 0) + head(tData, 1<<32-1)},
	{"end with a total too large", "get", false, answer + frame(tResult, 0) + frame(tData, "abc") + frame(tEnd, uint64(4))},
	{"end with a total too small", "get", false, answer + frame(tResult, 0) + frame(tData, "abc") + frame(tEnd, uint64(2))},
	{"end without a total", "get", false, answer + frame(tResult, 0) + head(tEnd, 0)},
	{"fail with code 0", "get", false, answer + frame(tResult, 0) + frame(tFail, 0, "fine")},
	{"fail of 4 GiB", "get", false, answer + frame(tResult, 0) + head(tFail, 1<<32-1)},
	{"a request from the server", "get", false, answer + getFrame("hello")},
	{"a reply", "get", false, answer + frame(tReply, uint64(1), 0)},
	{"two goaways", "get", false, answer + frame(tGoaway, uint64(1)) + frame(tGoaway, uint64(1)) + frame(tResult, 0) + frame(tEnd, uint64(0))},
	{"goaway for what was asked, again and again", "get", false, answer + frame(tGoaway, uint64(0))},
	{"a stream that never ends", "get", true, answer + frame(tResult, 0) + strings.Repeat(frame(tData, strings.Repeat("x", 1000)), 1000)},

	// Uploads.
	{"success before the end", "put endless", false, answer + frame(tResult, 0)},
	{"an error before the end", "put endless", false, answer + frame(tResult, 9, "enough")},
	{"success twice, before the end", "put endless", false, answer + frame(tResult, 0) + frame(tResult, 0)},
	{"data during an upload", "put", false, answer + frame(tData, "x")},
	{"end during an upload", "put", false, answer + frame(tEnd, uint64(1))},
	{"result of 4 GiB", "put", false, answer + head(tResult, 1<<32-1)},
	{"goaway for what was asked", "put", false, answer + frame(tGoaway, uint64(0))},
	{"never a result, and nothing read", "put endless", true, answer},
}

// TestMaliciousServers: each ends the operation that it was about with an error; the same client works with an honest
// server afterwards.
func TestMaliciousServers(t *testing.T) {
	leaks(t)
	good := overTCP.listen(t)
	serve(t, echo.server(rpc.ServerConfig{}), good)
	var memory runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&memory)
	before := memory.TotalAlloc
	var attempts atomic.Int64
	parallel(len(evils), len(evils), func(i int) {
		// On a busy machine what is early comes after the deadline, and what is late does not get through its handshake.
		for deadline := 2 * time.Second; ; deadline *= 3 {
			attempts.Add(1)
			last := deadline > 15*time.Second
			if tryEvil(t, evils[i], good.Addr().String(), deadline, last) || last {
				break
			}
		}
		count("malicious servers: scripts, after each of which the client had an error, and worked again elsewhere", 1)
	})
	runtime.ReadMemStats(&memory)
	allocated := int64(memory.TotalAlloc-before) / attempts.Load()
	most("malicious servers: allocated for each on the average, in KiB, our own side included", allocated>>10)
	if allocated > 32<<20 {
		t.Errorf("%d KiB were allocated for each", allocated>>10)
	}
}

// tryEvil has a client meet an evil server, with a deadline to which all other times are in proportion, and then a good one.
// It tells whether the operation ended when it should; that it did not is an error if there is no other try.
func tryEvil(t *testing.T, e evil, good string, deadline time.Duration, last bool) bool {
	bad := newEvilServer(t, func(c net.Conn, n int) {
		afterRequest(c)
		c.SetWriteDeadline(time.Now().Add(deadline))
		io.WriteString(c, strings.Replace(e.says, "hb=5000", fmt.Sprint("hb=", deadline.Milliseconds()/2), 1)) // not to wait for long
		if e.late || e.says == "" || strings.HasPrefix(e.name, "nothing") {
			if e.op == "put endless" {
				<-time.After(deadline + time.Second) // and reads nothing
			}
			return // goes on to read, and says nothing
		}
		if !strings.HasPrefix(e.name, "half") {
			return
		}
		c.Close()
	})
	defer bad.close()
	var addr atomic.Value
	addr.Store(bad.l.Addr().String())
	c := rpc.NewClient(rpc.ConnecterFunc(func(ctx context.Context) (net.Conn, error) {
		return (&rpc.TCPConnecter{Addr: addr.Load().(string)}).Connect(ctx)
	}), rpc.ClientConfig{HandshakeTimeout: deadline / 4})
	defer func() { within(t, "Close of a client, "+e.name, async(c.Close)) }()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	began := time.Now()
	err := within(t, e.op+": "+e.name, async(func() error { return evilOps[e.op](ctx, c) }))
	cancel()
	took := time.Since(began)
	inTime := err != nil && errors.Is(err, context.DeadlineExceeded) == e.late
	switch {
	case err == nil:
		t.Errorf("%s: %s is success", e.op, e.name)
	case !inTime && last:
		t.Errorf("%s: %s ended after %v with %v", e.op, e.name, took, err)
	case errors.Is(err, io.EOF) || strings.ContainsAny(err.Error(), "\x1b\x00\n") || len(err.Error()) > 8<<10:
		t.Errorf("%s: %s: the error is %q", e.op, e.name, err)
	}
	if n := bad.n.Load(); n > 8 {
		t.Errorf("%s: %s: %d connections for one operation", e.op, e.name, n)
	}
	addr.Store(good)
	c.ResetConnectBackoff()
	recoveredIn(t, "after "+e.name, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		return useAll(ctx, c)
	})
	return inTime || err == nil
}

// TestAServerOfAByteASecond: the handshake's deadline holds, whatever trickles in.
func TestAServerOfAByteASecond(t *testing.T) {
	leaks(t)
	bad := newEvilServer(t, func(c net.Conn, n int) {
		for i := range answer {
			if _, err := c.Write([]byte{answer[i]}); err != nil {
				return
			}
			<-time.After(100 * time.Millisecond)
		}
	})
	defer bad.close()
	for op, f := range evilOps {
		c := rpc.NewClient(&rpc.TCPConnecter{Addr: bad.l.Addr().String()}, rpc.ClientConfig{HandshakeTimeout: 300 * time.Millisecond})
		began := time.Now()
		err := within(t, op, async(func() error { return f(t.Context(), c) }))
		if took := time.Since(began); rpc.CodeOf(err) != rpc.Unavailable || took > 300*time.Millisecond+holeSlack {
			t.Errorf("%s: %v after %v", op, err, took)
		}
		check(t, c.Close())
	}
}

// TestAServerThatHangsUp: a client does not dial as fast as it can.
func TestAServerThatHangsUp(t *testing.T) {
	leaks(t)
	bad := newEvilServer(t, func(c net.Conn, n int) { c.Close() })
	defer bad.close()
	c := rpc.NewClient(&rpc.TCPConnecter{Addr: bad.l.Addr().String()}, rpc.ClientConfig{})
	defer c.Close()
	began := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	calls := 0
	for ctx.Err() == nil {
		if _, err := doCall(ctx, c, "hello"); err == nil {
			t.Fatal("a call succeeded")
		}
		calls++
	}
	// Back-off: at least 50, 100, 200, 400 ms.
	if n, limit := bad.n.Load(), int64(6); n > limit && time.Since(began) < 2*time.Second {
		t.Errorf("%d connections within a second, for %d calls", n, calls)
	}
}

// TestAFloodOfReplies: replies to calls that nobody awaits any more, and a million heartbeats, are thrown away.
func TestAFloodOfReplies(t *testing.T) {
	leaks(t)
	flood := strings.Repeat(frame(tReply, uint64(1), 0, strings.Repeat("x", 1000))+frame(tHeartbeat), 100)
	var sent atomic.Int64
	bad := newEvilServer(t, func(c net.Conn, n int) {
		r := bufio.NewReader(c)
		readAnswer(r)
		io.ReadFull(r, make([]byte, 64))
		readFrame(r)
		io.WriteString(c, answer)
		for range 500 {
			m, err := io.WriteString(c, flood)
			if sent.Add(int64(m)); err != nil {
				return
			}
		}
		for { // until the second call
			if kind, body, err := readFrame(r); err != nil || kind == tCall && body[7] == 2 {
				break
			}
		}
		io.WriteString(c, frame(tReply, uint64(2), 0, ping("hello")))
	})
	defer bad.close()
	c := rpc.NewClient(&rpc.TCPConnecter{Addr: bad.l.Addr().String()}, rpc.ClientConfig{})
	defer c.Close()
	ctx, cancel := context.WithCancel(t.Context())
	first := async(func() error { _, err := doCall(ctx, c, "hello"); return err })
	eventually(t, "the flood", func() bool { return sent.Load() > 0 })
	cancel()
	<-first // a reply or its cancel
	if res, err := doCall(t.Context(), c, "hello"); err != nil || res != "hello" {
		t.Errorf("the second call returned %q, %v", res, err)
	}
	count("malicious servers: bytes of replies that nobody awaited", sent.Load())
}
