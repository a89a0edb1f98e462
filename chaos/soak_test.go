//go:build !rpc_notls

package chaos_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.org/rpc"
)

// soakRun is everything at once: clients, a network that fails, a server that is restarted, and what has to be true of
// all of it in the end.
type soakRun struct {
	t    testing.TB
	tr   transport
	seed uint64
	addr string // of the server, also after a restart
	prox *proxy

	mu     sync.Mutex
	server *rpc.Server
	served <-chan error
	lanes  []*lane
	conns  []*rpc.Client

	nextID  atomic.Uint64
	uploads sync.Map // id: *soakUpload
	calls   sync.Map // id: *atomic.Int64, how often it ran

	wrong atomic.Int64

	retiring []soakRetired
}

// soakRetired is an operation that is over, but may still be on its way to the server.
type soakRetired struct {
	of   *sync.Map
	id   uint64
	when time.Time
}

// retire forgets an operation, a while later.
func (r *soakRun) retire(of *sync.Map, id uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	for len(r.retiring) > 0 && now.Sub(r.retiring[0].when) > 20*time.Second {
		r.retiring[0].of.Delete(r.retiring[0].id)
		r.retiring = r.retiring[1:]
	}
	r.retiring = append(r.retiring, soakRetired{of, id, now})
}

// soakUpload is what the server has seen of an upload.
type soakUpload struct {
	complete atomic.Bool // a clean end, and all bytes right
}

// bad reports what must not be.
func (r *soakRun) bad(format string, args ...any) {
	r.wrong.Add(1)
	count("losses: streams or results that were wrong", 1)
	r.t.Errorf("over "+r.tr.name+": "+format, args...)
}

// soakRequest is what a request says: who, which stream, how long, and how it ends.
type soakRequest struct {
	id, seed uint64
	size     int64
	mode     string
}

func (q soakRequest) String() string { return fmt.Sprint(q.id, " ", q.seed, " ", q.size, " ", q.mode) }

func parseSoak(s string) (q soakRequest, err error) {
	_, err = fmt.Sscan(s, &q.id, &q.seed, &q.size, &q.mode)
	return q, err
}

// source is the stream of a request: "fail" is an error in the middle, "stall" no end.
func (q soakRequest) source() io.ReadCloser {
	all := content(q.seed, q.size)
	switch q.mode {
	case "fail":
		failing := readerFunc(func([]byte) (int, error) { return 0, fmt.Errorf("the source of %d failed", q.id) })
		return io.NopCloser(io.MultiReader(io.LimitReader(all, q.size/2), failing))
	case "stall":
		return newGated(io.LimitReader(all, q.size/2), all)
	case "steps":
		return io.NopCloser(steps{all, 1 + int(q.seed%5000)})
	}
	return io.NopCloser(all)
}

func (r *soakRun) service() service {
	return service{
		call: func(ctx context.Context, req string) (string, error) {
			q, err := parseSoak(req)
			if err != nil {
				return req, nil // useAll's
			}
			if ran, ok := r.calls.Load(q.id); !ok && q.id > r.nextID.Load() {
				r.bad("a call that nobody made: %q", req)
			} else if ok && ran.(*atomic.Int64).Add(1) > 1 {
				r.bad("call %d ran twice", q.id)
			}
			switch q.mode {
			case "block":
				<-ctx.Done()
				return "", ctx.Err()
			case "panic":
				panic("soak")
			}
			return req + " " + strings.Repeat("x", int(q.size)), nil
		},
		get: func(ctx context.Context, req string) (string, io.ReadCloser, error) {
			q, err := parseSoak(req)
			if err != nil {
				return echo.get(ctx, req)
			}
			return req, q.source(), nil
		},
		put: func(ctx context.Context, req string, in io.Reader) (string, error) {
			q, err := parseSoak(req)
			if err != nil {
				return echo.put(ctx, req, in)
			}
			if q.mode == "refuse" {
				io.CopyN(io.Discard, in, q.size/2)
				return "", rpc.Errorf(rpc.Aborted, "enough of %d", q.id)
			}
			v := newVerifier(q.seed)
			_, err = io.Copy(v, in)
			count("soak: bytes of uploads that were checked", v.n)
			known, _ := r.uploads.Load(q.id)
			u, ok := known.(*soakUpload)
			if !ok {
				u = &soakUpload{} // long given up
			}
			switch {
			case !ok && q.id > r.nextID.Load():
				r.bad("an upload that nobody made: %q", req)
			case v.wrong:
				r.bad("upload %d has wrong bytes", q.id)
			case err == nil && (v.n != q.size || q.mode == "fail" || q.mode == "stall"):
				r.bad("upload %d (%s) ended cleanly after %d bytes of %d", q.id, q.mode, v.n, q.size)
			case err == nil:
				u.complete.Store(true)
			}
			return req, err
		},
		own: echo.own,
	}
}

// start starts the server; the address is the same each time.
func (r *soakRun) start() {
	var l *rpc.Listener
	eventually(r.t, "listening again", func() bool {
		var err error
		if r.tr.name == "tls" {
			l, err = rpc.ListenTLS(r.addr, theCA().server(r.t, "server"), "tester")
		} else {
			l, err = rpc.ListenTCP(r.addr, map[string]string{"127.0.0.0/8": "host-*"})
		}
		return err == nil
	})
	s := r.service().server(rpc.ServerConfig{HeartbeatInterval: 200 * time.Millisecond})
	r.mu.Lock()
	defer r.mu.Unlock()
	r.addr = l.Addr().String()
	r.server = s
	r.served = async(func() error { return s.Serve(l) })
}

// restart ends the server, politely or not, and starts another.
func (r *soakRun) restart(polite bool) {
	r.mu.Lock()
	s, served := r.server, r.served
	r.mu.Unlock()
	if polite {
		ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
		s.Shutdown(ctx)
		cancel()
	}
	within(r.t, "Close of the server", async(s.Close))
	within(r.t, "Serve", served)
	if n := s.Stats().OpenConns; n != 0 {
		r.bad("%d connections are left of a server", n)
	}
	count("soak: restarts of the server", 1)
	r.start()
}

func (r *soakRun) client(i int) *rpc.Client {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.conns[i]
}

func (r *soakRun) newClient(i int) *rpc.Client {
	return rpc.NewClient(r.tr.connect(r.t, r.prox.addr(), r.lanes[i].ip), rpc.ClientConfig{HeartbeatInterval: 200 * time.Millisecond})
}

// disturb does one thing to the network, the server or a client, and heals the network again.
func (r *soakRun) disturb(rng *rand.Rand) {
	ln := r.lanes[rng.IntN(len(r.lanes))]
	switch rng.IntN(8) {
	case 0, 1, 2:
		ln.drop()
	case 3, 4:
		ln.hole.close()
		<-time.After(time.Duration(rng.IntN(1200)) * time.Millisecond)
		ln.hole.open()
	case 5:
		r.restart(rng.IntN(2) == 0)
		return
	case 6:
		i := rng.IntN(len(r.conns))
		r.mu.Lock()
		old := r.conns[i]
		r.conns[i] = r.newClient(i)
		r.mu.Unlock()
		within(r.t, "Close of a client", async(old.Close))
	case 7:
		r.client(rng.IntN(len(r.conns))).ResetConnectBackoff()
		return
	}
	count("soak: faults injected (resets, holes, clients closed)", 1)
}

// plan is what happens to new connections by chance.
func (r *soakRun) plan() func(n int) (up, down fault) {
	var mu sync.Mutex
	rng := rand.New(rand.NewPCG(r.seed, rand.Uint64()))
	return func(int) (up, down fault) {
		mu.Lock()
		defer mu.Unlock()
		switch rng.IntN(12) {
		case 0:
			up = fault{cut: true, after: int64(rng.IntN(1 << 20)), how: rng.IntN(3)}
		case 1:
			down = fault{cut: true, after: int64(rng.IntN(1 << 20)), how: rng.IntN(3)}
		case 2:
			up.segment, down.segment = 1+rng.IntN(3000), 1+rng.IntN(3000)
		}
		return up, down
	}
}

// operate does one operation of a client, and checks it.
func (r *soakRun) operate(c *rpc.Client, rng *rand.Rand) {
	q := soakRequest{id: r.nextID.Add(1), seed: rng.Uint64(), size: int64(rng.IntN(1 << rng.IntN(22)))}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if rng.IntN(5) == 0 {
		timer := time.AfterFunc(time.Duration(rng.IntN(30))*time.Millisecond, cancel)
		defer timer.Stop()
	}
	modes := []string{"all", "all", "steps", "steps", "fail", "stall", "refuse"}
	q.mode = modes[rng.IntN(len(modes))]
	if q.mode == "stall" { // somebody has to end it
		timer := time.AfterFunc(50*time.Millisecond, cancel)
		defer timer.Stop()
	}
	var err error
	switch op := rng.IntN(8); op {
	case 0, 1, 2:
		q.mode, q.size = []string{"echo", "echo", "echo", "block", "panic"}[rng.IntN(5)], q.size%(128<<10)
		if q.mode == "block" {
			timer := time.AfterFunc(10*time.Millisecond, cancel)
			defer timer.Stop()
		}
		r.calls.Store(q.id, new(atomic.Int64))
		var res string
		res, err = doCall(ctx, c, q.String())
		if err == nil && (q.mode != "echo" || res != q.String()+" "+strings.Repeat("x", int(q.size))) {
			r.bad("call %v returned %d bytes that are wrong", q, len(res))
		}
		r.retire(&r.calls, q.id)
	case 3, 4, 5:
		v := newVerifier(q.seed)
		_, err = doGet(ctx, c, q.String(), v)
		count("soak: bytes of downloads that were checked", v.n)
		switch {
		case v.wrong:
			r.bad("download %v has wrong bytes", q)
		case err == nil && (v.n != q.size || q.mode == "fail" || q.mode == "stall"):
			r.bad("download %v ended cleanly after %d bytes", q, v.n)
		}
	case 6:
		u := &soakUpload{}
		r.uploads.Store(q.id, u)
		_, err = doPut(ctx, c, q.String(), q.source())
		r.retire(&r.uploads, q.id)
		if err == nil && !u.complete.Load() {
			r.bad("upload %v succeeded, but the server does not have it", q)
		}
	case 7:
		err = r.dial(ctx, c)
	}
	switch {
	case err == nil:
		count("soak: operations that succeeded", 1)
	case errors.Is(err, io.EOF):
		r.bad("%v failed with io.EOF: %v", q, err)
	default:
		count("soak: operations that failed", 1)
	}
}

// dial exchanges a few bytes on a connection of the user's own.
func (r *soakRun) dial(ctx context.Context, c *rpc.Client) error {
	conn, err := c.Dial(ctx, "own")
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err = io.WriteString(conn, "hello"); err != nil {
		return err
	}
	b := make([]byte, 5)
	if _, err := io.ReadFull(conn, b); err != nil {
		return fmt.Errorf("the user's own: %v", err)
	}
	if string(b) != "hello" {
		r.bad("a connection of the user's own said %q", b)
	}
	return nil
}

// TestSoak: all at once, for as long as -soak says.
func TestSoak(t *testing.T) {
	leaks(t)
	debug.SetGCPercent(100) // as in life: what grows is to be seen
	length := *soak
	if length == 0 {
		length = 4 * time.Second
	}
	seed := *soakSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d (-soakseed)", seed)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	var runs []*soakRun
	for _, tr := range transports {
		r := &soakRun{t: t, tr: tr, seed: seed, addr: ownAddr()}
		r.start()
		r.prox = newProxy(t, r.addr)
		for i := range 4 {
			r.lanes = append(r.lanes, r.prox.lane(r.plan()))
			r.conns = append(r.conns, r.newClient(i))
		}
		runs = append(runs, r)
		for i := range 8 {
			rng := rand.New(rand.NewPCG(seed, uint64(i)))
			wg.Go(func() {
				for !isClosed(stop) {
					r.operate(r.client(i%len(r.conns)), rng)
				}
			})
		}
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, 1000))
			for !isClosed(stop) {
				select {
				case <-stop:
				case <-time.After(time.Duration(rng.IntN(200)) * time.Millisecond):
				}
				r.disturb(rng)
			}
		})
	}
	began := time.Now()
	early := soakMemory(length/4, began, stop)
	<-time.After(length - time.Since(began))
	late := soakMemory(0, began, stop)
	close(stop)
	within(t, "the workers of the soak", async(func() error { wg.Wait(); return nil }))
	for _, r := range runs {
		r.finish()
	}
	count("soak: seconds", int64(time.Since(began).Seconds()))
	t.Logf("memory after a quarter of the time: %v, at its end: %v", early, late)
	if long() && late.heap > early.heap+16<<20 {
		t.Errorf("the heap has grown from %d to %d KiB", early.heap>>10, late.heap>>10)
	}
	if long() && late.goroutines > 2*early.goroutines+200 {
		t.Errorf("from %d to %d goroutines", early.goroutines, late.goroutines)
	}
}

type soakState struct {
	heap                uint64
	goroutines, sockets int
}

func soakMemory(after time.Duration, began time.Time, stop <-chan struct{}) (st soakState) {
	select {
	case <-time.After(after - time.Since(began)):
	case <-stop:
	}
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	c := takeCensus()
	return soakState{m.HeapAlloc, c.goroutines, c.sockets}
}

// finish heals everything, wants all to work, and ends it.
func (r *soakRun) finish() {
	for i, ln := range r.lanes {
		ln.hole.open()
		ln.mu.Lock()
		ln.plan = nil
		ln.mu.Unlock()
		ln.drop()
		c := r.client(i)
		recoveredIn(r.t, "the soak", func() error {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			return useAll(ctx, c)
		})
		within(r.t, "Close of a client", async(c.Close))
		if n := c.Stats().OpenConns; n != 0 {
			r.bad("%d connections are left of a client", n)
		}
	}
	within(r.t, "Close of the server", async(r.server.Close))
	within(r.t, "Serve", r.served)
	if n := r.server.Stats().OpenConns; n != 0 {
		r.bad("%d connections are left of a server", n)
	}
	count("soak: bytes through the proxy, to the server", r.moved(up))
	count("soak: bytes through the proxy, to the clients", r.moved(down))
	count("losses: streams or results that were wrong", 0)
}

func (r *soakRun) moved(dir int) (n int64) {
	for _, ln := range r.lanes {
		n += ln.bytes[dir].Load()
	}
	return n
}

func recoveredIn(t testing.TB, what string, f func() error) {
	began := time.Now()
	for err := f(); err != nil; err = f() {
		if time.Since(began) > patience {
			t.Errorf("%s: no recovery: %v", what, err)
			return
		}
		pause()
	}
}

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}
