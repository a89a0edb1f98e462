//go:build !rpc_notls

package chaos_test

import (
	"context"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"example.org/rpc"
)

// failures is how many of each kind of failure leave nothing.
const failures = 10_000

// fewer is what a short run does of what is slow.
func fewer(n int) int {
	switch {
	case long():
		return n
	case raceEnabled:
		return n / 16
	}
	return n / 4
}

// TestTenThousandFailedDials: refused connections, by all that connects.
func TestTenThousandFailedDials(t *testing.T) {
	leaks(t)
	l, err := net.Listen("tcp", ownAddr())
	check(t, err)
	addr := l.Addr().String()
	l.Close()
	for _, tr := range transports {
		c := newClient(t, tr.connect(t, addr, nil), rpc.ClientConfig{})
		parallel(failures/2, 16, func(i int) {
			var err error
			switch i % 3 {
			case 0:
				_, err = doGet(t.Context(), c, "hello", io.Discard)
			case 1:
				_, err = doPut(t.Context(), c, "hello", content(1, 10))
			case 2:
				_, err = c.Dial(t.Context(), "own")
			}
			if rpc.CodeOf(err) != rpc.Unavailable {
				t.Errorf("%v", err)
			}
		})
		count("failed dials that left nothing", failures/2)
	}
}

// TestTenThousandFailedHandshakes: a server that refuses, or hangs up in the middle.
func TestTenThousandFailedHandshakes(t *testing.T) {
	leaks(t)
	n := fewer(failures)
	l, err := rpc.ListenTLS("127.0.0.1:0", theCA().server(t, "server"), "somebody")
	check(t, err)
	serve(t, echo.server(rpc.ServerConfig{}), l)
	ln := newProxy(t, l.Addr().String()).lane(func(n int) (up, down fault) {
		return fault{cut: n%2 == 0, after: int64(n % 3000), how: n % 3}, fault{}
	})
	c := newClient(t, overTLS.connect(t, ln.p.addr(), ln.ip), rpc.ClientConfig{})
	parallel(n, 16, func(i int) {
		var err error
		if i%2 == 0 {
			_, err = doGet(t.Context(), c, "hello", io.Discard)
		} else {
			_, err = c.Dial(t.Context(), "own")
		}
		if err == nil {
			t.Error("somebody was let in")
		}
	})
	count("failed handshakes that left nothing", int64(n))
}

// TestTenThousandFailedCalls: of all the ways in which a call can fail while its connection lives.
func TestTenThousandFailedCalls(t *testing.T) {
	leaks(t)
	v := service{call: func(ctx context.Context, req string) (string, error) {
		switch req {
		case "error":
			return "", errors.New("no")
		case "panic":
			panic("no")
		}
		<-ctx.Done()
		return "", ctx.Err()
	}}
	l := overTCP.listen(t)
	s := v.server(rpc.ServerConfig{})
	serve(t, s, l)
	c := newClient(t, overTCP.connect(t, l.Addr().String(), nil), rpc.ClientConfig{})
	parallel(failures, 32, func(i int) {
		var err error
		switch i % 5 {
		case 0:
			_, err = doCall(t.Context(), c, "error")
		case 1:
			_, err = doCall(t.Context(), c, "panic")
		case 2:
			err = c.Call(t.Context(), "nobody's", nil, nil)
		case 3:
			ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
			_, err = doCall(ctx, c, "block")
			cancel()
		case 4:
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			_, err = doCall(ctx, c, "block")
		}
		if err == nil {
			t.Error("a call succeeded")
		}
	})
	count("failed calls that left nothing", failures)
	check(t, c.Close())
	eventually(t, "the end of the handlers", func() bool { return s.Stats().OpenConns == 0 })
}

// TestTenThousandFailedStreams: of all the ways in which a stream can fail.
func TestTenThousandFailedStreams(t *testing.T) {
	leaks(t)
	var opened, closed atomic.Int64
	v := service{
		get: func(ctx context.Context, req string) (string, io.ReadCloser, error) {
			if req == "error" {
				return "", nil, errors.New("no")
			}
			opened.Add(1)
			g := newGated(content(1, 1000), content(1, 0)) // and no end
			var r io.Reader = g
			if req == "source" {
				r = readerFunc(func([]byte) (int, error) { return 0, errors.New("no") })
			}
			return "", &programSource{Reader: r, closed: func() { g.Close(); closed.Add(1) }}, nil
		},
		put: func(ctx context.Context, req string, r io.Reader) (string, error) {
			if req == "error" {
				return "", errors.New("no")
			}
			_, err := io.Copy(io.Discard, r)
			return "", err
		},
	}
	for _, tr := range transports {
		n := failures / 2
		if tr.name == "tls" || raceEnabled {
			n = fewer(n)
		}
		l := tr.listen(t)
		serve(t, v.server(rpc.ServerConfig{}), l)
		c := newClient(t, tr.connect(t, l.Addr().String(), nil), rpc.ClientConfig{})
		parallel(n, 16, func(i int) {
			var err error
			var read, closes int
			source := oddSource{
				read:  func(p []byte) (int, error) { read++; return len(p), nil },
				close: func() error { closes++; return nil },
			}
			switch i % 7 {
			case 0:
				_, err = doGet(t.Context(), c, "error", io.Discard)
			case 1:
				_, err = doGet(t.Context(), c, "source", io.Discard)
			case 2: // closed in the middle
				var stream io.ReadCloser
				if stream, err = c.Download(t.Context(), "get", nil, nil); err == nil {
					stream.Read(make([]byte, 100))
					err = errors.Join(errors.New("closed"), stream.Close())
				}
			case 3: // the sink fails
				_, err = doGet(t.Context(), c, "", writerFunc(func(p []byte) (int, error) { return 0, errors.New("no") }))
			case 4:
				ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
				_, err = doPut(ctx, c, "", source)
				cancel()
			case 5:
				_, err = doPut(t.Context(), c, "error", source)
			case 6:
				_, err = doPut(t.Context(), c, "", readerFunc(func([]byte) (int, error) { return 0, errors.New("no") }))
			}
			if err == nil {
				t.Errorf("stream %d succeeded", i)
			}
			if (i%7 == 4 || i%7 == 5) && closes != 1 {
				t.Errorf("stream %d: its source was closed %d times", i, closes)
			}
		})
		count("failed streams that left nothing", int64(n))
	}
	eventually(t, "the end of the sources", func() bool { return opened.Load() == closed.Load() })
}

// TestStreamsThatNobodyReads: downloads that are abandoned without a Close end with their ctx.
func TestStreamsThatNobodyReads(t *testing.T) {
	leaks(t)
	var opened, closed atomic.Int64
	v := service{get: func(context.Context, string) (string, io.ReadCloser, error) {
		opened.Add(1)
		return "", &programSource{Reader: contentForever(1), closed: func() { closed.Add(1) }}, nil
	}}
	l := overTCP.listen(t)
	serve(t, v.server(rpc.ServerConfig{}), l)
	c := newClient(t, overTCP.connect(t, l.Addr().String(), nil), rpc.ClientConfig{})
	ctx, cancel := context.WithCancel(t.Context())
	const streams = 50
	for range streams {
		_, err := c.Download(ctx, "get", nil, nil)
		check(t, err)
	}
	cancel()
	eventually(t, "the end of the sources", func() bool { return closed.Load() == streams })
	count("streams that were abandoned, and ended with their context", streams)
}

// TestCloseMeansGone: when Close returns, no goroutine of the value is in anybody's code any more, however slow that is to
// notice.
func TestCloseMeansGone(t *testing.T) {
	leaks(t)
	var inside atomic.Int64
	slowly := func(ctx context.Context) error {
		inside.Add(1)
		defer inside.Add(-1)
		<-ctx.Done()
		<-time.After(20 * time.Millisecond)
		return ctx.Err()
	}
	for range 10 {
		c := rpc.NewClient(rpc.ConnecterFunc(func(ctx context.Context) (net.Conn, error) { return nil, slowly(ctx) }), rpc.ClientConfig{})
		called := async(func() error { _, err := doCall(t.Context(), c, ""); return err })
		eventually(t, "Connect", func() bool { return inside.Load() == 1 })
		check(t, c.Close())
		if inside.Load() != 0 {
			t.Fatal("the client's Close has not waited for Connect")
		}
		<-called

		v := service{call: func(ctx context.Context, _ string) (string, error) { return "", slowly(ctx) }}
		l := overTCP.listen(t)
		l.Authenticate = func(ctx context.Context, conn net.Conn) (net.Conn, string, error) {
			if conn.RemoteAddr().(*net.TCPAddr).IP.Equal(attackers) {
				return nil, "", slowly(ctx)
			}
			return conn, "tester", nil
		}
		s := v.server(rpc.ServerConfig{})
		served := async(func() error { return s.Serve(l) })
		c = rpc.NewClient(overTCP.connect(t, l.Addr().String(), nil), rpc.ClientConfig{})
		called = async(func() error { _, err := doCall(t.Context(), c, ""); return err })
		conn, err := attack(l.Addr().String())
		check(t, err)
		eventually(t, "the handler and Authenticate", func() bool { return inside.Load() == 2 })
		check(t, s.Close())
		if inside.Load() != 0 {
			t.Fatal("the server's Close has not waited for a handler, or for Authenticate")
		}
		<-served
		<-called
		conn.Close()
		check(t, c.Close())
		count("closes that waited for what the value had started", 2)
	}
}
