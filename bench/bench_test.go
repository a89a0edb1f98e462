package main

import (
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// tlsFor is TLS with certificates that go away with the test.
func tlsFor(t testing.TB) transport {
	dir := t.TempDir()
	writeCertificates(dir)
	return tlsFrom(dir)
}

// skipWithRaceDetector: with it everything allocates more, and pools forget on purpose.
func skipWithRaceDetector(t *testing.T) {
	info, _ := debug.ReadBuildInfo()
	if info != nil && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		t.Skip("built with -race")
	}
}

func startedLibrary(t testing.TB, over transport) *library {
	lib := startLibrary(over)
	t.Cleanup(lib.close)
	return lib
}

// What 255 MiB more of a stream allocate, at both ends together, is nothing: buffers are there before the first frame.
func TestStreamsDoNotAllocatePerFrame(t *testing.T) {
	skipWithRaceDetector(t)
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // a collection empties pools, which is not the frames' doing
	lib := startedLibrary(t, transport{})
	for way, transfer := range map[string]func(int64){"download": lib.bulk, "upload": lib.upload} {
		short := testing.AllocsPerRun(5, func() { transfer(1 << 20) })
		long := testing.AllocsPerRun(1, func() { transfer(256 << 20) })
		t.Logf("%s: 1 MiB allocates %v times, 256 MiB %v", way, short, long)
		if long-short > 20 {
			t.Errorf("%s: 255 MiB more allocate %v times more", way, long-short)
		}
	}
}

// The budget of a call is 6 allocations, both ends together, the messages included.
func TestCallAllocations(t *testing.T) {
	skipWithRaceDetector(t)
	lib := startedLibrary(t, transport{})
	n := testing.AllocsPerRun(2000, lib.call)
	t.Logf("a call allocates %v times", n)
	if n > 6 {
		t.Errorf("a call allocates %v times, budget 6", n)
	}
}

// Every scenario that needs no other process runs to its end, and all is reported and drawn; the figures mean nothing.
func TestScenariosRun(t *testing.T) {
	defer func(streams, clients []int) { streamSteps, clientSteps = streams, clients }(streamSteps, clientSteps)
	streamSteps, clientSteps = []int{1, 64}, []int{1, 16} // fewer descriptors
	b := newBench(true, 1)
	defer os.RemoveAll(b.dir)
	b.bytes, b.time = 4<<20, time.Millisecond
	for _, s := range scenarios {
		if s.name != "memory" && s.name != "size" {
			s.run(b)
		}
	}
	var text strings.Builder
	b.report.print(&text)
	for _, want := range []string{"64 streams at once, rpc upload", "× gRPC", "new connection: round trips", "storj.io/drpc", "loopback"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("the report says nothing of %q:\n%s", want, text.String())
		}
	}
	b.report.draw(filepath.Join(t.TempDir(), "chart.svg"))
}

func benchmarkBulk(b *testing.B, over transport, others ...func(transport) *peer) {
	const size = 256 << 20
	run := func(name string, transfer func(n int64)) {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(size)
			b.ReportAllocs()
			for b.Loop() {
				transfer(size)
			}
		})
	}
	lib := startedLibrary(b, over)
	run("rpc-download", lib.bulk)
	run("rpc-upload", lib.upload)
	for _, buffer := range bareSizes {
		others = append(others, func(t transport) *peer { return startBare(t, buffer) })
	}
	for _, start := range others {
		p := start(over)
		run(p.name, p.bulk)
		p.close()
	}
}

func BenchmarkBulkTCP(b *testing.B) {
	benchmarkBulk(b, transport{}, startHTTP, startHTTPTuned, startGRPC, startDRPC, startYamux)
}

func BenchmarkBulkTLS(b *testing.B) {
	benchmarkBulk(b, tlsFor(b), startHTTP, startHTTPTuned, startGRPC, startDRPC, startYamux)
}

// eachCaller runs a benchmark for every peer that can do what of returns.
func eachCaller(b *testing.B, of func(p *peer) func(), f func(b *testing.B, call func())) {
	starts := []func(transport) *peer{func(t transport) *peer { return &startLibrary(t).peer }, func(t transport) *peer { return startBare(t, 4096) },
		startHTTP, startGRPC, startTTRPC, startDRPC, startNetRPC, startYamux}
	for _, start := range starts {
		p := start(transport{})
		if call := of(p); call != nil {
			b.Run(p.name, func(b *testing.B) {
				b.ReportAllocs()
				f(b, call)
			})
		}
		p.close()
	}
}

func one(b *testing.B, call func()) {
	for b.Loop() {
		call()
	}
}

func BenchmarkCall(b *testing.B) {
	eachCaller(b, func(p *peer) func() { return p.call }, one)
}

func BenchmarkCallParallel64(b *testing.B) {
	eachCaller(b, func(p *peer) func() { return p.call }, func(b *testing.B, call func()) {
		var left atomic.Int64
		left.Store(int64(b.N))
		atOnce(64, func(int) {
			for left.Add(-1) >= 0 {
				call()
			}
		})
	})
}

func BenchmarkDownload4K(b *testing.B) {
	eachCaller(b, func(p *peer) func() {
		if p.bulk == nil {
			return nil
		}
		return func() { p.bulk(4096) }
	}, one)
}
