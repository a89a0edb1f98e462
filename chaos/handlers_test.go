//go:build !rpc_notls

package chaos_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"example.org/rpc"
)

// oddSource is a source whose methods are given.
type oddSource struct {
	read  func(p []byte) (int, error)
	close func() error
}

func (s oddSource) Read(p []byte) (int, error) { return s.read(p) }
func (s oddSource) Close() error               { return s.close() }

// odd are handlers that do what they should not, by the request.
type odd struct {
	release chan struct{} // closed: who blocks for ever goes on
	closes  atomic.Int64
}

func (o *odd) calls(ctx context.Context, req string) (string, error) {
	switch req {
	case "panic":
		panic("a handler's")
	case "panic with nil":
		panic(error(nil))
	case "exit":
		runtime.Goexit()
	case "error without a text":
		return "", errors.New("")
	case "rpc error without a text":
		return "", &rpc.Error{Code: rpc.NotFound}
	case "nil *Error":
		var e *rpc.Error
		return "", e
	case "code 0":
		return "", &rpc.Error{Code: rpc.OK, Message: "fine"}
	case "code 200":
		return "", &rpc.Error{Code: 200, Message: "beyond"}
	case "long error":
		return "", errors.New(strings.Repeat("long ", 10_000))
	case "no UTF-8":
		return "\xff", nil // cannot be encoded
	case "error that is no UTF-8":
		return "", errors.New("\xff\x00\x1b[2J")
	case "for ever":
		<-o.release
	case "EOF":
		return "", io.EOF
	}
	return req, nil
}

func (o *odd) source(read func(p []byte) (int, error)) io.ReadCloser {
	return oddSource{read, func() error { o.closes.Add(1); return nil }}
}

func (o *odd) gets(ctx context.Context, req string) (string, io.ReadCloser, error) {
	some := strings.NewReader("some")
	switch req {
	case "nil":
		return req, nil, nil
	case "nil file":
		var f *os.File
		return req, f, nil
	case "a stream and an error":
		return req, o.source(some.Read), errors.New("and yet")
	case "closed already":
		s := o.source(some.Read)
		s.Close()
		return req, s, nil
	case "panic in Read":
		return req, o.source(func([]byte) (int, error) { panic("a source's") }), nil
	case "panic in Close":
		return req, oddSource{some.Read, func() error { panic("a source's") }}, nil
	case "exit in Read":
		return req, o.source(func([]byte) (int, error) { runtime.Goexit(); return 0, nil }), nil
	case "too much":
		return req, o.source(func(p []byte) (int, error) { return len(p) + 1, nil }), nil
	case "less than nothing":
		return req, o.source(func([]byte) (int, error) { return -1, nil }), nil
	case "nothing for ever":
		return req, o.source(func([]byte) (int, error) { return 0, nil }), nil
	case "unexpected EOF":
		return req, o.source(func([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }), nil
	case "wrapped EOF":
		return req, o.source(func([]byte) (int, error) { return 0, &os.PathError{Op: "read", Path: "x", Err: io.EOF} }), nil
	case "bytes and an error":
		return req, o.source(func(p []byte) (int, error) { return copy(p, "half"), errors.New("then this") }), nil
	case "bytes and EOF":
		return req, o.source(func(p []byte) (int, error) { return copy(p, "all"), io.EOF }), nil
	case "error in Close":
		return req, oddSource{some.Read, func() error { return errors.New("cannot close") }}, nil
	}
	_, err := o.calls(ctx, req)
	return req, nil, err
}

func (o *odd) puts(ctx context.Context, req string, r io.Reader) (string, error) {
	switch req {
	case "nothing read":
		return req, nil
	case "half read":
		_, err := io.CopyN(io.Discard, r, 1000)
		return req, err
	case "all bytes, but not the end":
		_, err := io.ReadFull(r, make([]byte, len(oddUpload)))
		return req, err
	case "read after the end":
		io.Copy(io.Discard, r)
		if n, err := r.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			return "", errors.New("not the end again")
		}
		return req, nil
	case "close twice":
		if c, ok := r.(io.Closer); ok {
			c.Close()
			c.Close()
		}
		_, err := io.Copy(io.Discard, r)
		return req, err
	case "half read, error":
		io.CopyN(io.Discard, r, 1000)
		return "", errors.New("enough")
	case "panic in a sink":
		io.Copy(writerFunc(func([]byte) (int, error) { panic("a sink's") }), r)
	case "sink that lies":
		_, err := io.Copy(writerFunc(func(p []byte) (int, error) { return len(p) + 1, nil }), r)
		return req, err
	case "short writes":
		_, err := io.Copy(writerFunc(func(p []byte) (int, error) { return len(p) / 2, nil }), r)
		return req, err
	case "read by two":
		done := async(func() error { _, err := io.Copy(io.Discard, r); return err })
		io.Copy(io.Discard, r)
		<-done
		return req, nil
	}
	if _, err := o.calls(ctx, req); err != nil {
		return "", err
	}
	_, err := io.Copy(io.Discard, r)
	return req, err
}

var oddUpload = strings.Repeat("x", 100_000)

// own closes its connection twice, and panics.
func (o *odd) own(_ context.Context, conn net.Conn) {
	conn.Close()
	conn.Close()
	panic("a label's")
}

// TestOddHandlers: handlers that panic, return nil, read half, block for ever, have no text for their errors, close
// twice: each is an error for its caller, or no harm; everybody else is served.
func TestOddHandlers(t *testing.T) {
	leaks(t)
	const ok = 255
	cases := []struct {
		op, req string
		want    rpc.Code // ok: success
	}{
		{"call", "panic", rpc.Internal}, {"call", "panic with nil", rpc.Internal}, {"call", "exit", rpc.Internal},
		{"call", "error without a text", rpc.Unknown}, {"call", "rpc error without a text", rpc.NotFound},
		{"call", "nil *Error", rpc.Internal}, {"call", "code 0", rpc.Unknown}, {"call", "code 200", rpc.Unknown},
		{"call", "long error", rpc.Unknown}, {"call", "no UTF-8", rpc.Unknown}, {"call", "error that is no UTF-8", rpc.Unknown},
		{"call", "for ever", rpc.DeadlineExceeded}, {"call", "EOF", rpc.Unknown},
		{"get", "panic", rpc.Internal}, {"get", "exit", rpc.Unavailable}, {"get", "error without a text", rpc.Unknown},
		{"get", "rpc error without a text", rpc.NotFound}, {"get", "for ever", rpc.DeadlineExceeded}, {"get", "EOF", rpc.Unknown},
		{"get", "nil", ok}, {"get", "nil file", rpc.Unknown}, {"get", "a stream and an error", rpc.Unknown}, {"get", "closed already", ok},
		{"get", "panic in Read", rpc.Internal}, {"get", "panic in Close", ok}, {"get", "exit in Read", rpc.Unavailable},
		{"get", "too much", rpc.Unknown}, {"get", "less than nothing", rpc.Unknown}, {"get", "nothing for ever", rpc.Unknown},
		{"get", "unexpected EOF", rpc.Unavailable}, {"get", "wrapped EOF", rpc.Unknown}, {"get", "bytes and an error", rpc.Unknown}, {"get", "bytes and EOF", ok},
		{"get", "error in Close", ok},
		{"put", "panic", rpc.Internal}, {"put", "exit", rpc.Unavailable}, {"put", "error without a text", rpc.Unknown},
		{"put", "rpc error without a text", rpc.NotFound}, {"put", "for ever", rpc.DeadlineExceeded}, {"put", "EOF", rpc.Unknown},
		{"put", "nothing read", rpc.FailedPrecondition}, {"put", "half read", rpc.FailedPrecondition},
		{"put", "all bytes, but not the end", ok}, {"put", "read after the end", ok}, {"put", "close twice", ok}, {"put", "half read, error", rpc.Unknown},
		{"put", "panic in a sink", rpc.Internal}, {"put", "sink that lies", rpc.Unknown}, {"put", "short writes", rpc.Unknown}, {"put", "read by two", ok},
	}
	for _, tr := range transports {
		t.Run(tr.name, func(t *testing.T) {
			o := &odd{release: make(chan struct{})}
			s := service{call: o.calls, get: o.gets, put: o.puts, own: o.own}.server(rpc.ServerConfig{})
			l := tr.listen(t)
			serve(t, s, l)
			t.Cleanup(func() { close(o.release) })
			c := newClient(t, tr.connect(t, l.Addr().String(), nil), rpc.ClientConfig{})
			for _, x := range cases {
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				if x.want == rpc.DeadlineExceeded {
					cancel()
					ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
				}
				var err error
				for range 5 {
					switch x.op {
					case "call":
						_, err = doCall(ctx, c, x.req)
					case "get":
						_, err = doGet(ctx, c, x.req, io.Discard)
					case "put":
						_, err = doPut(ctx, c, x.req, strings.NewReader(oddUpload))
					}
					if x.op != "put" || rpc.CodeOf(err) != rpc.Unavailable {
						break
					}
					// A client that is held up for a second finds the early result of an upload gone.
				}
				cancel()
				if code := rpc.CodeOf(err); x.want == ok && err != nil || x.want != ok && code != x.want {
					t.Errorf("%s %s: %v (%v), want %v", x.op, x.req, err, code, x.want)
				}
				if err != nil && (errors.Is(err, io.EOF) || len(err.Error()) > 5<<10 || strings.ContainsAny(err.Error(), "\x1b\x00")) {
					t.Errorf("%s %s: the error is %.200q", x.op, x.req, err)
				}
				if res, err := doCall(t.Context(), c, "hello"); err != nil || res != "hello" {
					t.Errorf("after %s %s: %q, %v", x.op, x.req, res, err)
				}
				count("handlers that do what they should not, after each of which the next call was served", 1)
			}
			conn, err := c.Dial(t.Context(), "own")
			check(t, err)
			conn.SetDeadline(time.Now().Add(patience))
			if _, err := conn.Read(make([]byte, 1)); err == nil {
				t.Error("a closed connection can be read")
			}
			conn.Close()
		})
	}
}

// TestCloseWaitsForAHandlerThatIgnoresItsContext: it is documented that it does; and ends when that one does.
func TestCloseWaitsForAHandlerThatIgnoresItsContext(t *testing.T) {
	leaks(t)
	o := &odd{release: make(chan struct{})}
	s := service{call: o.calls}.server(rpc.ServerConfig{})
	l := overTCP.listen(t)
	served := async(func() error { return s.Serve(l) })
	c := newClient(t, overTCP.connect(t, l.Addr().String(), nil), rpc.ClientConfig{})
	called := async(func() error { _, err := doCall(t.Context(), c, "for ever"); return err })
	eventually(t, "the call", func() bool { return s.Stats().Calls == 1 })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Shutdown returned %v", err)
	}
	closed := async(s.Close)
	if err := within(t, "the call", called); err == nil {
		t.Error("the call succeeded")
	}
	if isDone(closed) {
		t.Error("Close has not waited for the handler")
	}
	close(o.release)
	check(t, within(t, "Close", closed))
	within(t, "Serve", served)
}

// isDone tells whether something is there to be received, for a moment.
func isDone[T any](ch <-chan T) bool {
	select {
	case <-ch:
		return true
	case <-time.After(50 * time.Millisecond):
		return false
	}
}
