package main

import (
	"sync/atomic"
	"time"
)

// unaryTCP is one caller.
func (b *bench) unaryTCP() {
	results := b.unary(transport{}, startHTTP, startGRPC, startTTRPC, startDRPC, startNetRPC)
	bare, ours := results[0], results[1]
	b.report.keep("unary", results...)
	b.report.add("Calls of 64 bytes, one caller, TCP", "", callTable(bare, p50, results))
	b.report.atMost("unary, 1 caller: p50", ours.over(bare, p50), 1.6, "× bare ping-pong")
	b.report.atMost("unary, 1 caller: mean", ours.over(bare, mean), 2.0, "× bare ping-pong")
	b.report.atMost("unary, 1 caller: allocations per call, both ends", ours.spread(allocEach), 6, "")
}

// unaryTLS is the same over mutual TLS 1.3.
func (b *bench) unaryTLS() {
	results := b.unary(b.tls, startHTTP, startGRPC, startTTRPC, startDRPC, startNetRPC)
	b.report.add("Calls of 64 bytes, one caller, TLS", "", callTable(results[0], p50, results))
}

// unary has a bare ping-pong, the library, and others call for as long.
func (b *bench) unary(t transport, others ...func(transport) *peer) []result {
	bare, lib := startBare(t, 0), startLibrary(t)
	defer bare.close()
	defer lib.close()
	contestants := []contestant{sequential("bare ping-pong", b.time, bare.call), sequential("rpc", b.time, lib.call)}
	for _, start := range others {
		p := start(t)
		defer p.close()
		contestants = append(contestants, sequential(p.name, b.time, p.call))
	}
	return b.compete(contestants...)
}

// callers is 64 callers on one client.
func (b *bench) callers() {
	const callers = 64
	lib := startLibrary(transport{})
	defer lib.close()
	contestants := []contestant{parallel("rpc", callers, b.time, func(int) { lib.call() })}
	for _, start := range []func(transport) *peer{startNetRPC, startGRPC, startTTRPC, startDRPC, startHTTP} {
		p := start(transport{})
		defer p.close()
		contestants = append(contestants, parallel(p.name, callers, b.time, func(int) { p.call() }))
	}
	results := b.compete(contestants...)
	ours, netRPC, grpc := results[0], results[1], results[2]
	b.report.keep("unary-64-callers", results...)
	b.report.add("Calls of 64 bytes, 64 callers on one client, TCP",
		"HTTP/1.1 and drpc need a connection for each caller.", callTable(ours, speed, results))
	b.report.atLeast("unary, 64 callers: calls per second", ours.over(netRPC, speed), 4.5, "× net/rpc")
	b.report.atLeast("unary, 64 callers: calls per second", ours.over(grpc, speed), 11, "× gRPC")
}

// sequential is calls one after the other, for a while.
func sequential(name string, while time.Duration, call func()) contestant {
	times := make([]float64, 0, 1<<18) // in one piece, so that it does not grow while it counts
	return contestant{name, func() turn {
		times = times[:0]
		for start, last := time.Now(), time.Duration(0); last < while; {
			call()
			now := time.Since(start)
			times = append(times, (now - last).Seconds())
			last = now
		}
		return turn{amount: float64(len(times)), times: times}
	}}
}

// parallel is callers that call one after the other, for a while.
func parallel(name string, callers int, while time.Duration, call func(caller int)) contestant {
	return contestant{name, func() turn {
		var calls atomic.Int64
		var over atomic.Bool
		time.AfterFunc(while, func() { over.Store(true) })
		atOnce(callers, func(i int) {
			n := int64(0)
			for done := false; !done; n++ { // one at least
				call(i)
				done = over.Load()
			}
			calls.Add(n)
		})
		return turn{amount: float64(calls.Load())}
	}}
}
