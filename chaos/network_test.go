//go:build !rpc_notls

package chaos_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"example.org/rpc"
)

// TestBadNetworksDamageNothing: one byte at a time, slow, and late: everything arrives, and is right.
func TestBadNetworksDamageNothing(t *testing.T) {
	leaks(t)
	shapes := []struct {
		name string
		size int64
		f    fault
	}{
		{"one byte at a time", 20 << 10, fault{segment: 1}},
		{"odd segments", 4 << 20, fault{segment: 1449}},
		{"late", 1 << 20, fault{segment: 64 << 10, delay: 5 * time.Millisecond}},
		{"slow", 20 << 10, fault{segment: 512, delay: 10 * time.Millisecond}},
	}
	var wg sync.WaitGroup
	for _, tr := range transports {
		for _, shape := range shapes {
			wg.Go(func() {
				if shape.size = shape.size >> 3; long() {
					shape.size <<= 3
				}
				v := service{
					call: echo.call,
					get: func(context.Context, string) (string, io.ReadCloser, error) {
						return "", io.NopCloser(content(1, shape.size)), nil
					},
					put: func(_ context.Context, _ string, r io.Reader) (string, error) {
						w := newVerifier(2)
						_, err := io.Copy(w, r)
						if err == nil && (w.n != shape.size || w.wrong) {
							t.Errorf("%s over %s: an upload of %d bytes ended cleanly after %d, wrong: %v", shape.name, tr.name, shape.size, w.n, w.wrong)
						}
						return "", err
					},
				}
				l := tr.listen(t)
				serve(t, v.server(rpc.ServerConfig{}), l)
				ln := newProxy(t, l.Addr().String()).lane(func(int) (up, down fault) { return shape.f, shape.f })
				c := newClient(t, tr.connect(t, ln.p.addr(), ln.ip), rpc.ClientConfig{})
				ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
				defer cancel()
				for i := range 3 {
					if res, err := doCall(ctx, c, "hello"); err != nil || res != "hello" {
						t.Errorf("%s over %s: call %d returned %q, %v", shape.name, tr.name, i, res, err)
					}
				}
				w := newVerifier(1)
				if _, err := doGet(ctx, c, "", w); err != nil || w.n != shape.size || w.wrong {
					t.Errorf("%s over %s: a download of %d bytes gave %d, wrong: %v, %v", shape.name, tr.name, shape.size, w.n, w.wrong, err)
				}
				if _, err := doPut(ctx, c, "", content(2, shape.size)); err != nil {
					t.Errorf("%s over %s: an upload returned %v", shape.name, tr.name, err)
				}
				count("bad networks (single bytes, odd segments, late, slow): bytes moved", 2*shape.size)
			})
		}
	}
	wg.Wait()
}

// TestStallsAreNoDeath: source, sink, or both stall for twenty times as long as a dead peer would get.
func TestStallsAreNoDeath(t *testing.T) {
	leaks(t)
	const (
		heartbeat = 150 * time.Millisecond
		stall     = 20 * 3 * heartbeat
		headSize  = 1 << 20
		size      = 16 << 20 // more than two kernels hold
	)
	newSource := func(stalls bool) (io.Reader, *gated) {
		all := content(3, size)
		g := newGated(io.LimitReader(all, headSize), all)
		if !stalls {
			g.goOn()
			return g, g
		}
		return g, g
	}
	newSink := func(stalls bool) (io.Writer, *verifier) {
		v := newVerifier(3)
		return writerFunc(func(p []byte) (int, error) {
			if stalls && v.n >= headSize/2 {
				stalls = false
				<-time.After(stall)
			}
			return v.Write(p)
		}), v
	}
	var wg sync.WaitGroup
	for _, tr := range transports {
		wg.Go(func() {
			v := service{call: func(_ context.Context, req string) (string, error) { <-time.After(stall); return req, nil }}
			l := tr.listen(t)
			serve(t, v.server(rpc.ServerConfig{HeartbeatInterval: heartbeat}), l)
			c := newClient(t, tr.connect(t, l.Addr().String(), nil), rpc.ClientConfig{HeartbeatInterval: heartbeat})
			if res, err := doCall(t.Context(), c, "slow"); err != nil || res != "slow" {
				t.Errorf("a slow call over %s returned %q, %v", tr.name, res, err)
			}
			count("stalls of twenty heartbeat timeouts that were survived", 1)
		})
		for _, who := range []string{"source", "sink", "both"} {
			sourceStalls, sinkStalls := who != "sink", who != "source"
			for dir := range 2 {
				wg.Go(func() {
					what := fmt.Sprintf("%s stalls over %s, direction %d", who, tr.name, dir)
					source, gate := newSource(sourceStalls)
					sink, verify := newSink(sinkStalls)
					v := service{
						get: func(context.Context, string) (string, io.ReadCloser, error) { return "", source.(io.ReadCloser), nil },
						put: func(_ context.Context, _ string, r io.Reader) (string, error) {
							_, err := io.Copy(sink, r)
							return "", err
						},
					}
					l := tr.listen(t)
					serve(t, v.server(rpc.ServerConfig{HeartbeatInterval: heartbeat}), l)
					c := newClient(t, tr.connect(t, l.Addr().String(), nil), rpc.ClientConfig{HeartbeatInterval: heartbeat})
					ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
					defer cancel()
					go func() {
						<-gate.reached
						<-time.After(stall)
						gate.goOn()
					}()
					var err error
					if dir == up {
						_, err = doPut(ctx, c, "", source)
					} else {
						_, err = doGet(ctx, c, "", sink)
					}
					if err != nil || verify.n != size || verify.wrong {
						t.Errorf("%s: %d bytes of %d, wrong: %v, %v", what, verify.n, size, verify.wrong, err)
					}
					count("stalls of twenty heartbeat timeouts that were survived", 1)
					count("stalls: bytes moved", verify.n)
				})
			}
		}
	}
	wg.Wait()
}

// ---- Black holes --------------------------------------------------------------------------------------------------

const (
	holeHeartbeat = 400 * time.Millisecond
	holePatience  = 4 * holeHeartbeat // what is promised
	holeSlack     = 4 * time.Second   // what a busy machine is granted beyond it
)

// holeTest is a state that a connection is in when the network goes away. It runs until both sides have given up.
type holeTest struct {
	t       *testing.T
	name    string
	server  *rpc.Server
	lane    *lane
	client  *rpc.Client
	ctx     context.Context
	begun   chan struct{} // the handler runs
	ended   chan error    // the handler's ctx or stream has ended
	read    chan struct{} // closed when who did not read reads again
	source  *gated
	endless func() io.Reader
}

// service blocks in the ways that the states want.
func (h *holeTest) service() service {
	return service{
		call: func(ctx context.Context, req string) (string, error) {
			if req == "hello" {
				return req, nil
			}
			close(h.begun)
			<-ctx.Done()
			h.ended <- ctx.Err()
			return "", ctx.Err()
		},
		get: func(ctx context.Context, req string) (string, io.ReadCloser, error) {
			r := io.Reader(h.source)
			if req == "full" {
				r = h.endless()
			}
			close(h.begun)
			return "", &programSource{Reader: r, closed: func() { h.source.Close(); h.ended <- nil }}, nil
		},
		put: func(ctx context.Context, req string, r io.Reader) (string, error) {
			close(h.begun)
			if req == "full" {
				<-h.read
			}
			_, err := io.Copy(io.Discard, r)
			if req == "result" && err == nil {
				<-ctx.Done()
				err = ctx.Err()
			}
			h.ended <- err
			return "", err
		},
	}
}

// fall lets the network go away when a pipe is full, or at once.
func (h *holeTest) fall(full bool) time.Time {
	within(h.t, "the handler of "+h.name, h.begun)
	if full { // until nothing moves any more
		moved := func() int64 { return h.lane.bytes[up].Load() + h.lane.bytes[down].Load() }
		for last := int64(-1); moved() != last; <-time.After(100 * time.Millisecond) {
			last = moved()
		}
	} else {
		<-time.After(2 * holeHeartbeat)
	}
	h.lane.hole.close()
	return time.Now()
}

// gaveUp checks how long a side took.
func (h *holeTest) gaveUp(side string, since time.Time) {
	took := time.Since(since)
	most("black hole: longest time until a side gave up, in hundredths of a heartbeat interval (promised: 400)", int64(100*took/holeHeartbeat))
	count("black hole: sides that gave up", 1)
	if took > holePatience {
		h.t.Logf("%s: the %s gave up after %v, promised are %v: a busy machine?", h.name, side, took, holePatience)
	}
	if took > holePatience+holeSlack {
		h.t.Errorf("%s: the %s gave up after %v, promised are %v", h.name, side, took, holePatience)
	}
}

func (h *holeTest) wantTimeout(side string, err error) {
	if !errors.Is(err, rpc.ErrPeerTimeout) && !errors.Is(err, context.Canceled) {
		h.t.Errorf("%s: the %s's error is %v", h.name, side, err)
	}
}

var holeStates = []struct {
	name string
	run  func(h *holeTest)
}{
	{"idle control connection", func(h *holeTest) {
		if _, err := doCall(h.ctx, h.client, "hello"); err != nil {
			h.t.Error(err)
		}
		close(h.begun)
		since := h.fall(false)
		h.both(since, func(s rpc.Stats) bool { return s.OpenConns == 0 })
	}},
	{"call pending", func(h *holeTest) {
		h.op(false, func() error { _, err := doCall(h.ctx, h.client, "block"); return err })
	}},
	{"source of a download idle, sink waiting", func(h *holeTest) {
		h.op(false, func() error { _, err := doGet(h.ctx, h.client, "idle", io.Discard); return err })
	}},
	{"source of an upload idle, sink waiting", func(h *holeTest) {
		h.op(false, func() error { _, err := doPut(h.ctx, h.client, "idle", h.source); return err })
	}},
	{"result of an upload pending", func(h *holeTest) {
		h.op(false, func() error { _, err := doPut(h.ctx, h.client, "result", strings.NewReader("all")); return err })
	}},
	{"pipe of an upload full", func(h *holeTest) { // the sink finds out when it reads again
		done := async(func() error {
			_, err := doPut(h.ctx, h.client, "full", struct{ io.Reader }{h.endless()})
			return err
		})
		since := h.fall(true)
		h.wantTimeout("client", within(h.t, h.name, done))
		h.gaveUp("client", since)
		since = time.Now()
		close(h.read)
		h.wantTimeout("server", within(h.t, h.name, h.ended))
		h.gaveUp("server", since)
	}},
	{"pipe of a download full", func(h *holeTest) {
		done := async(func() error {
			_, err := doGet(h.ctx, h.client, "full", writerFunc(func(p []byte) (int, error) {
				<-h.read
				return len(p), nil
			}))
			return err
		})
		since := h.fall(true)
		within(h.t, h.name, h.ended)
		h.gaveUp("server", since)
		since = time.Now()
		close(h.read)
		h.wantTimeout("client", within(h.t, h.name, done))
		h.gaveUp("client", since)
	}},
}

// op falls into the hole during an operation.
func (h *holeTest) op(full bool, f func() error) {
	done := async(f)
	since := h.fall(full)
	var wg sync.WaitGroup
	wg.Go(func() {
		h.wantTimeout("client", within(h.t, h.name, done))
		h.gaveUp("client", since)
	})
	wg.Go(func() {
		within(h.t, h.name, h.ended)
		h.gaveUp("server", since)
	})
	wg.Wait()
}

func (h *holeTest) both(since time.Time, over func(rpc.Stats) bool) {
	var wg sync.WaitGroup
	for side, stats := range map[string]func() rpc.Stats{"client": h.client.Stats, "server": h.server.Stats} {
		wg.Go(func() {
			for !over(stats()) && time.Since(since) < patience {
				pause()
			}
			h.gaveUp(side, since)
		})
	}
	wg.Wait()
}

// TestBlackHole: the network swallows everything, and says nothing of it: both sides give up, in every state.
func TestBlackHole(t *testing.T) {
	leaks(t)
	var wg sync.WaitGroup
	for _, tr := range transports {
		for _, state := range holeStates {
			h := &holeTest{
				t: t, name: state.name + " over " + tr.name, begun: make(chan struct{}), ended: make(chan error, 1), read: make(chan struct{}),
				source: newGated(content(4, 1000), content(4, 0)), endless: func() io.Reader { return contentForever(5) },
			}
			h.server = h.service().server(rpc.ServerConfig{HeartbeatInterval: holeHeartbeat})
			l := tr.listen(t)
			serve(t, h.server, l)
			h.lane = newProxy(t, l.Addr().String()).lane(nil)
			h.client = newClient(t, tr.connect(t, h.lane.p.addr(), h.lane.ip), rpc.ClientConfig{HeartbeatInterval: holeHeartbeat})
			var cancel context.CancelFunc
			h.ctx, cancel = context.WithTimeout(context.Background(), patience)
			t.Cleanup(cancel)
			wg.Go(func() { state.run(h) })
		}
	}
	wg.Wait()
}

// TestBlackHoleInMidPreface: what is bounded before anything is promised is the handshake; with the defaults that is
// half of four heartbeat intervals, and so it is here.
func TestBlackHoleInMidPreface(t *testing.T) {
	leaks(t)
	const handshake = 2 * holeHeartbeat
	var wg sync.WaitGroup
	for _, tr := range transports {
		l := tr.listen(t)
		s := echo.server(rpc.ServerConfig{HandshakeTimeout: handshake, HeartbeatInterval: holeHeartbeat})
		serve(t, s, l)
		p := newProxy(t, l.Addr().String())
		config := rpc.ClientConfig{HandshakeTimeout: handshake, HeartbeatInterval: holeHeartbeat}
		h := &holeTest{t: t, name: "mid preface over " + tr.name}
		for op := range 3 { // nothing comes from the server at all
			wg.Go(func() {
				shut := &gate{shut: make(chan struct{})}
				defer shut.open()
				ln := p.lane(func(int) (up, down fault) { return fault{}, fault{stall: shut} })
				c := newClient(t, tr.connect(t, p.addr(), ln.ip), config)
				began := time.Now()
				err := []func() error{
					func() error { _, err := doCall(t.Context(), c, "hello"); return err },
					func() error { _, err := doGet(t.Context(), c, "hello", io.Discard); return err },
					func() error { _, err := doPut(t.Context(), c, "hello", strings.NewReader("x")); return err },
				}[op]()
				if rpc.CodeOf(err) != rpc.Unavailable {
					t.Errorf("%s: %v", h.name, err)
				}
				h.gaveUp("client", began)
			})
		}
		for _, said := range []string{"", "Z", banner[:20], banner, banner + "zrepl_control", "\x16\x03\x01\x02\x00\x01"} {
			wg.Go(func() { // nothing more comes from the client
				conn, err := net.Dial("tcp", l.Addr().String())
				if err != nil {
					t.Error(err)
					return
				}
				defer conn.Close()
				began := time.Now()
				io.WriteString(conn, said)
				conn.SetReadDeadline(began.Add(patience))
				if _, err := io.Copy(io.Discard, conn); errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("%s: after %q the server hangs", h.name, said)
				}
				h.gaveUp("server", began)
			})
		}
	}
	wg.Wait()
}
