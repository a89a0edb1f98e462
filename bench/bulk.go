package main

// bulkTCP is memory to discard over TCP.
func (b *bench) bulkTCP() {
	bares, ours, others := b.bulk(1, transport{}, bareSizes, startHTTP, startHTTPTuned, startGRPC, startDRPC, startYamux)
	bare := fastest(bares)
	b.report.keep("bulk-tcp", append(append([]result{bare}, ours...), others...)...)
	b.report.add("Bulk over TCP, memory to discard", "", bulkTable(bare, bares, ours, others))
	for _, r := range ours {
		b.report.atLeast("bulk, TCP, "+r.name+": speed", r.over(bare, speed), 0.95, "× bare")
		b.report.atMost("bulk, TCP, "+r.name+": CPU per GiB", r.over(bare, cpuEach), 1.10, "× bare")
		b.report.atMost("bulk, TCP, "+r.name+": allocations per frame", r.spread(allocsPerFrame), 0.01, "(none but those of the request)")
	}
}

// allocsPerFrame takes frames to be of 32 KiB.
func allocsPerFrame(t turn) float64 { return allocEach(t) * (32 << 10) }

// bulkTLS is the same over mutual TLS 1.3.
func (b *bench) bulkTLS() {
	bares, ours, others := b.bulk(1, b.tls, bareSizes, startHTTP, startHTTPTuned, startGRPC, startDRPC, startYamux)
	bare := fastest(bares)
	b.report.keep("bulk-tls", append(append([]result{bare}, ours...), others...)...)
	b.report.add("Bulk over TLS, memory to discard", "Mutual TLS 1.3, the same config and so the same cipher for all.", bulkTable(bare, bares, ours, others))
	for _, r := range ours {
		b.report.atLeast("bulk, TLS, "+r.name+": speed", r.over(bare, speed), 1.15, "× bare crypto/tls")
		b.report.atMost("bulk, TLS, "+r.name+": CPU per GiB", r.over(bare, cpuEach), 0.90, "× bare crypto/tls")
	}
}

// bulk has the library in both directions, bare copies with each of the sizes, and others transfer as much each, over so
// many streams at once.
func (b *bench) bulk(streams int, t transport, sizes []int, others ...func(transport) *peer) (bareResults, ourResults, otherResults []result) {
	var contestants []contestant
	add := func(name string, transfer func(n int64)) {
		contestants = append(contestants, contestant{name, func() turn {
			atOnce(streams, func(int) { transfer(b.bytes / int64(streams)) })
			return turn{amount: float64(b.bytes)}
		}})
	}
	for _, size := range sizes {
		p := startBare(t, size)
		defer p.close()
		add(p.name, p.bulk)
	}
	lib := startLibrary(t)
	defer lib.close()
	add("rpc download", lib.bulk)
	add("rpc upload", lib.upload)
	for _, start := range others {
		p := start(t)
		defer p.close()
		add(p.name, p.bulk)
	}
	results := b.compete(contestants...)
	n := len(sizes)
	return results[:n], results[n : n+2], results[n+2:]
}
