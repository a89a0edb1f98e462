//go:build !rpc_notls

package chaos_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.org/rpc"
)

// The sweeps do the same small session again and again, each time with a fault at another place.

// sweepSize is the length of the streams of a session, sweepStep that of their frames.
const (
	sweepSize = 200
	sweepStep = 40
)

// sweepCase is what the server has seen of one session.
type sweepCase struct {
	mu       sync.Mutex
	calls    map[string]int // runs, by request
	complete int            // uploads that were read to io.EOF and were right
	wrong    []string       // what must not be
}

func (x *sweepCase) fail(format string, args ...any) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.wrong = append(x.wrong, fmt.Sprintf(format, args...))
}

// sweeper is a server behind a proxy, for many sessions at once. Requests begin with the session's number.
type sweeper struct {
	proxy *proxy
	tr    transport
	rpc   *rpc.Server
	dir   string // of files that streams are spliced into
	cases sync.Map
	next  atomic.Int64

	strange atomic.Int64 // requests that nobody has made
}

func newSweeper(t testing.TB, tr transport, config rpc.ServerConfig) *sweeper {
	w := &sweeper{tr: tr, dir: t.TempDir()}
	w.rpc = service{call: w.call, get: w.get, put: w.put}.server(config)
	l := tr.listen(t)
	serve(t, w.rpc, l)
	w.proxy = newProxy(t, l.Addr().String())
	return w
}

// split takes a request apart: the session, what is to be done, and the number of the operation.
func (w *sweeper) split(req string) (x *sweepCase, id, sink string) {
	words := bytes.Split([]byte(req), []byte(" "))
	if len(words) == 3 {
		if found, ok := w.cases.Load(string(words[0])); ok {
			return found.(*sweepCase), string(words[0]), string(words[1])
		}
	}
	w.strange.Add(1)
	return nil, "", ""
}

var errWrongRequest = rpc.Errorf(rpc.InvalidArgument, "a request that nobody has made")

func (w *sweeper) call(_ context.Context, req string) (string, error) {
	x, _, _ := w.split(req)
	if x == nil {
		return "", errWrongRequest
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.calls[req]++
	return req, nil
}

func (w *sweeper) get(_ context.Context, req string) (string, io.ReadCloser, error) {
	x, _, _ := w.split(req)
	if x == nil {
		return "", nil, errWrongRequest
	}
	return req, io.NopCloser(steps{content(sweepSeed, sweepSize), sweepStep}), nil
}

func (w *sweeper) put(_ context.Context, req string, r io.Reader) (string, error) {
	x, id, kind := w.split(req)
	if x == nil {
		return "", errWrongRequest
	}
	got, err := w.drain(id+".up", kind, r)
	switch {
	case errors.Is(err, io.EOF):
		x.fail("an upload's sink got io.EOF as an error: %v", err)
	case err == nil && got != sweepContent:
		x.fail("an upload's sink saw a clean end after %d bytes: %q", len(got), got)
	case err == nil:
		x.mu.Lock()
		x.complete++
		x.mu.Unlock()
	}
	return req, err
}

const sweepSeed = 7

var sweepContent = func() string { b, _ := io.ReadAll(content(sweepSeed, sweepSize)); return string(b) }()

// The kinds of sinks: Read in small steps, WriteTo a buffer, WriteTo a file.
const (
	sinkRead = "read"
	sinkCopy = "copy"
	sinkFile = "file"
)

var sinks = []string{sinkRead, sinkCopy, sinkFile}

// drain reads a stream into a sink of a kind. Its error is nil after a clean end.
func (w *sweeper) drain(name, kind string, r io.Reader) (string, error) {
	switch kind {
	case sinkRead:
		var got []byte
		for b := make([]byte, 7); ; {
			n, err := r.Read(b)
			got = append(got, b[:n]...)
			if err == io.EOF {
				return string(got), nil
			}
			if err != nil {
				return string(got), err
			}
		}
	case sinkFile:
		f, err := os.Create(filepath.Join(w.dir, name))
		if err != nil {
			return "", err
		}
		defer os.Remove(f.Name())
		defer f.Close()
		_, err = io.Copy(f, r)
		got, _ := os.ReadFile(f.Name())
		return string(got), err
	}
	var got bytes.Buffer
	_, err := io.Copy(&got, r)
	return got.String(), err
}

// sweepOps are the sessions: each a few requests, over one connection if all goes well. They return the first error.
var sweepOps = []struct {
	name string
	run  func(ctx context.Context, w *sweeper, x *sweepCase, c *rpc.Client, id, sink string) error
}{
	{"calls", func(ctx context.Context, w *sweeper, x *sweepCase, c *rpc.Client, id, sink string) error {
		for i := range 3 {
			req := id + " call " + strconv.Itoa(i)
			res, err := doCall(ctx, c, req)
			if err != nil {
				return err
			}
			if res != req {
				x.fail("a call of %q returned %q", req, res)
			}
		}
		return nil
	}},
	{"downloads", func(ctx context.Context, w *sweeper, x *sweepCase, c *rpc.Client, id, sink string) error {
		for i := range 2 {
			req := id + " " + sink + " " + strconv.Itoa(i)
			var res rpc.PingRes
			stream, err := c.Download(ctx, "get", &rpc.PingReq{Message: req}, &res)
			if err != nil {
				return err
			}
			got, err := w.drain(id+".down", sink, stream)
			_, again := stream.Read(make([]byte, 1))
			stream.Close()
			switch {
			case err == nil && (got != sweepContent || res.Echo != req):
				x.fail("a download's sink saw a clean end after %d bytes: %q, result %q", len(got), got, res.Echo)
			case err == nil && again != io.EOF:
				x.fail("a download ended cleanly, then with %v", again)
			case err != nil && (errors.Is(err, io.EOF) || again == io.EOF || again == nil):
				x.fail("a download ended with %v, then %v", err, again)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}},
	{"uploads", func(ctx context.Context, w *sweeper, x *sweepCase, c *rpc.Client, id, sink string) error {
		for i := range 2 {
			req := id + " " + sink + " " + strconv.Itoa(i)
			res, err := doPut(ctx, c, req, steps{content(sweepSeed, sweepSize), sweepStep})
			if err != nil {
				return err
			}
			x.mu.Lock()
			complete := x.complete
			x.mu.Unlock()
			if complete != i+1 || res != req {
				x.fail("upload %d succeeded (result %q), but the server has %d complete ones", i, res, complete)
			}
		}
		return nil
	}},
}

// session runs an operation over a lane of its own, and returns its error and what must not be.
func (w *sweeper) session(t testing.TB, op int, sink string, timeout time.Duration, heartbeat time.Duration, plan func(n int) (up, down fault)) (ln *lane, err error) {
	t.Helper()
	id := strconv.FormatInt(1000000+w.next.Add(1), 10)
	x := &sweepCase{calls: map[string]int{}}
	w.cases.Store(id, x)
	ln = w.proxy.lane(plan)
	defer ln.shutdown()
	c := rpc.NewClient(w.tr.connect(t, w.proxy.addr(), ln.ip), rpc.ClientConfig{HeartbeatInterval: heartbeat})
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	done := async(func() error {
		err := sweepOps[op].run(ctx, w, x, c, id, sink)
		c.Close()
		return err
	})
	select {
	case err = <-done:
	case <-time.After(timeout + patience):
		x.fail("hangs")
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	for req, n := range x.calls {
		if n > 1 {
			x.wrong = append(x.wrong, fmt.Sprintf("call %q ran %d times", req, n))
		}
	}
	for _, wrong := range x.wrong {
		count("losses: streams or results that were wrong", 1)
		t.Errorf("%s over %s into %s: %s (error %v)", sweepOps[op].name, w.tr.name, sink, wrong, err)
	}
	return ln, err
}

// traffic is how many bytes a clean session has in each direction, at the most.
func (w *sweeper) traffic(t testing.TB, op int) (n [2]int64) {
	for range 5 {
		ln, err := w.session(t, op, sinkRead, patience, 5*time.Second, nil)
		check(t, err)
		for dir := range n {
			n[dir] = max(n[dir], ln.bytes[dir].Load())
		}
	}
	return n
}

// TestTruncation: whatever byte a connection is cut after, in whatever way: no sink sees a clean end unless it has
// all, and no upload is a success unless its sink has confirmed.
func TestTruncation(t *testing.T) {
	leaks(t)
	for _, tr := range transports {
		t.Run(tr.name, func(t *testing.T) {
			w := newSweeper(t, tr, rpc.ServerConfig{})
			type point struct {
				op, dir, how int
				sink         string
				after        int64
			}
			var points []point
			for op := range sweepOps {
				traffic := w.traffic(t, op)
				for dir := range traffic {
					for after := range traffic[dir] {
						if tr.name == "tcp" || long() {
							for how := range cutNames {
								for _, sink := range sinksOf(op, tr) {
									points = append(points, point{op, dir, how, sink, after})
								}
							}
						} else { // each byte once
							list := sinksOf(op, tr)
							points = append(points, point{op, dir, int(after) % len(cutNames), list[int(after)/3%len(list)], after})
						}
					}
				}
			}
			var failed atomic.Int64
			points = thinned(points)
			parallel(len(points), 16, func(i int) {
				p := points[i]
				_, err := w.session(t, p.op, p.sink, patience, 5*time.Second, func(n int) (up, down fault) {
					f := fault{cut: n == 0, after: p.after, how: p.how}
					if p.dir == 0 {
						return f, fault{}
					}
					return fault{}, f
				})
				if err != nil {
					failed.Add(1)
				}
			})
			count("truncation sweep over "+tr.name+": sessions cut, each after another byte, direction, way or sink", int64(len(points)))
			count("truncation sweep over "+tr.name+": of these ended with an error (the others were retried, or needed no more)", failed.Load())
			if failed.Load() < int64(len(points))/2 {
				t.Errorf("%d of %d sessions failed: does the proxy cut at all?", failed.Load(), len(points))
			}
		})
	}
}

// thinned are all the points of a sweep; of a short run under the race detector, which is slow, one in five.
func thinned[T any](points []T) []T {
	if !raceEnabled || long() {
		return points
	}
	var some []T
	for i := rand.IntN(5); i < len(points); i += 5 {
		some = append(some, points[i])
	}
	return some
}

// sinksOf are the kinds of sinks that make a difference.
func sinksOf(op int, tr transport) []string {
	switch {
	case sweepOps[op].name == "calls":
		return []string{sinkRead}
	case tr.name == "tls":
		return []string{sinkRead, sinkCopy}
	}
	return sinks
}

// TestCorruption: whatever bit of what is not payload flips: an error, or the right result.
func TestCorruption(t *testing.T) {
	leaks(t)
	w := newSweeper(t, overTCP, rpc.ServerConfig{HeartbeatInterval: 20 * time.Millisecond})
	type point struct {
		op, dir   int
		at        int64
		bit       int
		heartbeat time.Duration
	}
	var points []point
	for op := range sweepOps {
		// With heartbeats, too, which a frame that claims too much would swallow.
		for _, heartbeat := range []time.Duration{5 * time.Second, 10 * time.Millisecond} {
			for dir, offsets := range w.headers(t, op, heartbeat) {
				for _, at := range offsets {
					for bit := range 8 {
						points = append(points, point{op, dir, at, bit, heartbeat})
					}
				}
			}
		}
	}
	var late, failed atomic.Int64
	points = thinned(points)
	parallel(len(points), 48, func(i int) {
		p := points[i]
		_, err := w.session(t, p.op, sinks[i%len(sinks)], 400*time.Millisecond, p.heartbeat, func(n int) (up, down fault) {
			f := fault{flip: 1 << p.bit, flipAt: p.at}
			switch {
			case n > 0:
			case p.dir == 0:
				up = f
			default:
				down = f
			}
			return up, down
		})
		switch {
		case errors.Is(err, context.DeadlineExceeded):
			late.Add(1)
			fallthrough
		case err != nil:
			failed.Add(1)
		}
	})
	if n := w.strange.Load(); n > 0 {
		count("losses: streams or results that were wrong", n)
		t.Errorf("%d handlers got requests that nobody has made", n)
	}
	count("corruption sweep over tcp: sessions with one bit flipped outside the payloads", int64(len(points)))
	count("corruption sweep over tcp: of these ended with an error", failed.Load())
	count("corruption sweep over tcp: of these at the operation's deadline", late.Load())
	if failed.Load() < int64(len(points))/4 {
		t.Errorf("%d of %d sessions failed: does the proxy flip at all?", failed.Load(), len(points))
	}
}

// headers are the offsets of a session's bytes that are no payload, in each direction: lines, label, headers, and
// fields, but not bodies, streams and error texts.
func (w *sweeper) headers(t testing.TB, op int, heartbeat time.Duration) (offsets [2][]int64) {
	var mu sync.Mutex
	var said [2][]byte
	id := strconv.FormatInt(1000000+w.next.Add(1), 10)
	x := &sweepCase{calls: map[string]int{}}
	w.cases.Store(id, x)
	ln := w.proxy.lane(nil)
	defer ln.shutdown()
	for dir := range said {
		ln.transmit[dir] = func(p []byte) {
			mu.Lock()
			defer mu.Unlock()
			said[dir] = append(said[dir], p...)
		}
	}
	c := newClient(t, overTCP.connect(t, w.proxy.addr(), ln.ip), rpc.ClientConfig{HeartbeatInterval: heartbeat})
	check(t, sweepOps[op].run(t.Context(), w, x, c, id, sinkRead))
	mu.Lock()
	defer mu.Unlock()
	for dir, b := range said {
		o, at := newOffsets(dir), bytes.IndexByte(b, '\n')+1
		if dir == up {
			at += 64
		}
		for fixed, i := at, 0; i < len(b); i++ {
			if i == at { // a frame begins
				at += 8 + int(binary.BigEndian.Uint32(b[i+4:]))
				fixed = i + 8 + map[byte]int{tCall: 8 + 8 + 1 + 4, tReply: 9, tDownload: 9 + 3, tUpload: 9 + 3, tResult: 1, tEnd: 8}[b[i]]
			}
			if offset, ok := o.next(b[i]); ok && i < fixed {
				offsets[dir] = append(offsets[dir], offset)
			}
		}
	}
	return offsets
}

// ---- Fail at every step -------------------------------------------------------------------------------------------

// errStep is what a failing step returns.
var errStep = errors.New("the step that fails")

// stepper makes the n-th Read or Write of all its connections fail, and those after it.
type stepper struct {
	n     atomic.Int64 // steps so far
	fails int64        // 0: none
	after bool         // the failing step does its work first, or half of it
	at    func()       // called at the failing step, instead of an error, if not nil
}

type stepConn struct {
	memOrTCP
	s *stepper
}

// memOrTCP is what connections have beyond a net.Conn.
type memOrTCP interface {
	io.ReadWriteCloser
	connRest
	CloseWrite() error
}

func (s *stepper) step() (fail bool) {
	n := s.n.Add(1)
	if s.at != nil {
		if n == s.fails {
			s.at()
		}
		return false
	}
	return s.fails > 0 && n >= s.fails
}

func (c stepConn) Read(p []byte) (int, error) {
	if !c.s.step() {
		return c.memOrTCP.Read(p)
	}
	if c.s.after {
		n, _ := c.memOrTCP.Read(p)
		return n, errStep
	}
	return 0, errStep
}

func (c stepConn) Write(p []byte) (int, error) {
	if !c.s.step() {
		return c.memOrTCP.Write(p)
	}
	if c.s.after {
		n, _ := c.memOrTCP.Write(p[:len(p)/2])
		return n, errStep
	}
	return 0, errStep
}

// stepPair is a server and a client of which one's connections count their steps.
func (w *sweeper) stepPair(s *stepper, role int) (*rpc.Client, *rpc.Server, *memListener) {
	l := newMemListener(64 << 10)
	l.pair = func() (clientEnd, serverEnd netConn) {
		c, sv := memPair(64 << 10)
		if role == up {
			return stepConn{c, s}, sv
		}
		return c, stepConn{sv, s}
	}
	server := service{call: w.call, get: w.get, put: w.put}.server(rpc.ServerConfig{})
	return rpc.NewClient(l, rpc.ClientConfig{}), server, l
}

// TestFailAtEveryStep: the n-th Read or Write of a connection fails, for all n, at either side, with all or nothing
// of it done.
func TestFailAtEveryStep(t *testing.T) {
	leaks(t)
	w := &sweeper{dir: t.TempDir()}
	type kind struct {
		op, role int
		sink     string
		after    bool
	}
	var kinds []kind
	for op := range sweepOps {
		for role := range 2 {
			for _, sink := range []string{sinkRead, sinkCopy} {
				kinds = append(kinds, kind{op, role, sink, false}, kind{op, role, sink, true})
			}
		}
	}
	parallel(len(kinds), len(kinds), func(i int) { // most of the time they wait: a second for words that may still come
		k := kinds[i]
		for n := int64(1); n < 500; n++ {
			s := &stepper{fails: n, after: k.after}
			if w.stepSession(t, k.op, k.sink, k.role, s) == nil && s.n.Load() < n {
				return
			}
			count("fail at every step: sessions in which the n-th Read or Write failed", 1)
		}
		t.Errorf("the session %v does not end", k)
	})
}

func (w *sweeper) stepSession(t testing.TB, op int, sink string, role int, s *stepper) error {
	id := strconv.FormatInt(1000000+w.next.Add(1), 10)
	x := &sweepCase{calls: map[string]int{}}
	w.cases.Store(id, x)
	c, server, l := w.stepPair(s, role)
	served := async(func() error { return server.Serve(l.listener()) })
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	err := within(t, fmt.Sprintf("%s with step %d of role %d failing", sweepOps[op].name, s.fails, role), async(func() error {
		return sweepOps[op].run(ctx, w, x, c, id, sink)
	}))
	if errors.Is(err, context.DeadlineExceeded) {
		x.fail("ended only at its deadline")
	}
	within(t, "Close of the client", async(c.Close))
	within(t, "Close of the server", async(server.Close))
	within(t, "Serve", served)
	for req, n := range x.calls {
		if n > 1 {
			x.fail("call %q ran %d times", req, n)
		}
	}
	for _, wrong := range x.wrong {
		count("losses: streams or results that were wrong", 1)
		t.Errorf("%s into %s, role %d, step %d (after: %v): %s (error %v)", sweepOps[op].name, sink, role, s.fails, s.after, wrong, err)
	}
	if err := server.Stats(); err.OpenConns != 0 {
		t.Errorf("%d connections are left", err.OpenConns)
	}
	return err
}

// TestCloseAtEveryStep: Close and Shutdown, of either side, at the n-th Read or Write of a session, for all n.
func TestCloseAtEveryStep(t *testing.T) {
	leaks(t)
	w := &sweeper{dir: t.TempDir()}
	ends := []struct {
		name string
		end  func(c *rpc.Client, s *rpc.Server) error
	}{
		{"Close of the client", func(c *rpc.Client, _ *rpc.Server) error { return c.Close() }},
		{"Close of the server", func(_ *rpc.Client, s *rpc.Server) error { return s.Close() }},
		{"Shutdown", func(_ *rpc.Client, s *rpc.Server) error { return s.Shutdown(context.Background()) }},
		{"Shutdown and Close", func(_ *rpc.Client, s *rpc.Server) error {
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			s.Shutdown(ctx)
			return s.Close()
		}},
	}
	step := int64(1)
	if !long() {
		step = 2
	}
	for op := range sweepOps {
		for role := range 2 {
			for e, end := range ends {
				for n := 1 + int64(e)%step; ; n += step {
					if !w.endSession(t, op, role, n, end.name, end.end) {
						break
					}
					count("Close or Shutdown at the n-th Read or Write: sessions", 1)
				}
			}
		}
	}
}

// endSession tells whether step n was reached.
func (w *sweeper) endSession(t *testing.T, op, role int, n int64, name string, end func(*rpc.Client, *rpc.Server) error) bool {
	id := strconv.FormatInt(1000000+w.next.Add(1), 10)
	x := &sweepCase{calls: map[string]int{}}
	w.cases.Store(id, x)
	s := &stepper{fails: n}
	c, server, l := w.stepPair(s, role)
	ended := make(chan error, 1)
	reached := false
	s.at = func() { reached = true; go func() { ended <- end(c, server) }() }
	served := async(func() error { return server.Serve(l.listener()) })
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	what := fmt.Sprintf("%s at step %d of role %d during %s", name, n, role, sweepOps[op].name)
	err := within(t, what, async(func() error { return sweepOps[op].run(ctx, w, x, c, id, sinkRead) }))
	if errors.Is(err, context.DeadlineExceeded) {
		x.fail("ended only at its deadline")
	}
	within(t, "then the client's Close", async(c.Close))
	within(t, "then the server's Close", async(server.Close))
	within(t, "Serve", served)
	if reached {
		check(t, within(t, name, ended))
	}
	for _, wrong := range x.wrong {
		count("losses: streams or results that were wrong", 1)
		t.Errorf("%s: %s (error %v)", what, wrong, err)
	}
	return reached
}
