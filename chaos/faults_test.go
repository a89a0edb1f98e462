//go:build !rpc_notls

package chaos_test

import (
	"bytes"
	"context"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"example.org/rpc"
)

// Faults that were found here, and stay fixed. What was found by fuzzing is among the seeds, too.

// TestNothingIsServedBehindAFailedUpload: a request that follows an upload that failed at once used to be started,
// with a stream that ended cleanly at nothing.
func TestNothingIsServedBehindAFailedUpload(t *testing.T) {
	leaks(t)
	for range 200 {
		synctest.Test(t, func(t *testing.T) {
			v := service{put: func(_ context.Context, req string, r io.Reader) (string, error) {
				n, err := io.Copy(io.Discard, r)
				if err == nil {
					t.Errorf("%s: a clean end after %d bytes of a stream that has none", req, n)
				}
				return "", err
			}}
			s, l := v.server(rpc.ServerConfig{}), newMemListener(64<<10)
			served := async(func() error { return s.Serve(l.listener()) })
			conn, err := l.Connect(t.Context())
			check(t, err)
			io.WriteString(conn, banner+label("zrepl_data")+putFrame("first")+frame(tFail, 5, "gone")+putFrame("second"))
			conn.SetReadDeadline(time.Now().Add(time.Minute))
			said, _ := io.ReadAll(conn)
			if n := bytes.Count(said, []byte{tResult, 0, 0, 0}); n > 1 {
				t.Errorf("%d results", n)
			}
			conn.Close()
			check(t, s.Close())
			<-served
		})
	}
}

// TestACopyLeftBehindSeesNoCleanEnd: a handler gives up on a copy of its stream, and returns; the copy must not take that
// for a clean end, which it could.
func TestACopyLeftBehindSeesNoCleanEnd(t *testing.T) {
	leaks(t)
	synctest.Test(t, func(t *testing.T) {
		copied := make(chan error, 1)
		v := service{put: func(_ context.Context, req string, r io.Reader) (string, error) {
			go func() {
				_, err := io.Copy(io.Discard, r)
				copied <- err
			}()
			synctest.Wait() // it reads
			return "", rpc.Errorf(rpc.Aborted, "too slow")
		}}
		s, l := v.server(rpc.ServerConfig{}), newMemListener(64<<10)
		served := async(func() error { return s.Serve(l.listener()) })
		c := rpc.NewClient(l, rpc.ClientConfig{})
		source := newGated(content(1, 100), content(2, 100))
		if _, err := doPut(t.Context(), c, "slow", source); rpc.CodeOf(err) != rpc.Aborted {
			t.Errorf("the upload returned %v", err)
		}
		if err := <-copied; err == nil {
			t.Error("the copy saw a clean end")
		}
		check(t, c.Close())
		check(t, s.Close())
		<-served
	})
}
