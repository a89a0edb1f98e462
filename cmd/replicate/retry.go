package main

import (
	"context"
	"crypto/tls"
	"errors"
	"math/rand/v2"
	"net"
	"time"

	"example.org/rpc"
)

const (
	firstBackoff = time.Second
	maxBackoff   = 30 * time.Second
	// busyPatience is longer than a server takes to notice that a client fell silent, three heartbeats of 5 s: until then the
	// filesystem is still being received for the connection that was lost.
	busyPatience = 30 * time.Second
)

// retries bounds how often something is tried again without getting further.
type retries struct {
	max       int
	first     time.Duration // wait before the first; it doubles from there
	failed    int
	busySince time.Time
}

// next tells how long to wait before the next attempt, and false if there is to be none.
func (r *retries) next(err error) (time.Duration, bool) {
	if !worthRetrying(err) {
		return 0, false
	}
	if rpc.CodeOf(err) == rpc.Aborted {
		if r.busySince.IsZero() {
			r.busySince = time.Now()
		}
		if time.Since(r.busySince) < busyPatience && r.max > 0 {
			return r.first, true
		}
	}
	if r.failed >= r.max {
		return 0, false
	}
	wait := min(r.first<<min(r.failed, 20), maxBackoff)
	r.failed++
	return wait - time.Duration(rand.Int64N(int64(wait)/4+1)), true // not all clients at the same moment
}

// progressed starts the count anew.
func (r *retries) progressed() { r.failed, r.busySince = 0, time.Time{} }

// worthRetrying tells whether the same may work a moment later: after a lost connection, but not after a refusal or with
// a certificate that does not verify.
func worthRetrying(err error) bool {
	var refused *rpc.HandshakeError
	var protocol *rpc.ProtocolError
	var cert *tls.CertificateVerificationError
	var notTLS tls.RecordHeaderError
	var op *net.OpError
	var ssh *sshError
	switch {
	case errors.As(err, &ssh) && ssh.hopeless():
		return false
	case errors.As(err, &refused):
		return refused.Code == rpc.Unavailable || refused.Code == rpc.ResourceExhausted
	case errors.As(err, &protocol), errors.As(err, &cert), errors.As(err, &notTLS):
		return false
	case errors.As(err, &op) && op.Op == "remote error": // a TLS alert
		return false
	}
	code := rpc.CodeOf(err)
	return code == rpc.Unavailable || code == rpc.Aborted
}

// sleep waits, unless ctx ends first.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
