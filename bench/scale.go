package main

import "fmt"

// The steps in which costs grow.
var (
	streamSteps = []int{1, 4, 64, 512}
	clientSteps = []int{1, 16, 256}
)

// streams is bulk data over ever more streams at once. Buffers of bare copies stay within what so many may hold.
func (b *bench) streams() {
	for _, n := range streamSteps {
		bares, ours, others := b.bulk(n, transport{}, bareSizes[:4], startHTTP, startGRPC)
		bare := fastest(bares)
		b.report.keep(fmt.Sprint("streams-", n), append(append([]result{bare}, ours...), others...)...)
		b.report.add(fmt.Sprintf("Streams at once, over TCP: %d", n), "", bulkTable(bare, bares, ours, others))
		for _, r := range ours {
			if n >= 64 {
				b.report.atLeast(fmt.Sprintf("%d streams at once, %s: speed", n, r.name), r.over(bare, speed), 0.90, "× as many bare copies")
			}
		}
	}
}

// clients is calls from ever more clients of one server, each with a connection and a caller.
func (b *bench) clients() {
	for _, n := range clientSteps {
		bare, lib, netRPC, grpc := startBare(transport{}, 0), startLibrary(transport{}), startNetRPC(transport{}), startGRPC(transport{})
		var contestants []contestant
		for _, p := range []*peer{bare, &lib.peer, netRPC, grpc} {
			defer p.close()
			calls := make([]func(), n)
			for i := range calls {
				call, disconnect := p.client()
				defer disconnect()
				calls[i] = call
			}
			contestants = append(contestants, parallel(p.name, n, b.time, func(i int) { calls[i]() }))
		}
		contestants[0].name = "bare ping-pong"
		results := b.compete(contestants...)
		b.report.keep(fmt.Sprint("clients-", n), results...)
		b.report.add(fmt.Sprintf("Clients of one server that call 64 bytes, over TCP: %d", n), "", callTable(results[0], speed, results))
	}
}
