package main

import (
	"math"
	"runtime"
	"slices"
	"syscall"
	"time"
)

// contestant is one way to do what a scenario is about. run does it once and says how much it did.
type contestant struct {
	name string
	run  func() turn
}

// turn is what a contestant did in one turn. Processor time and allocations are those of the process: of both ends.
type turn struct {
	amount float64   // bytes or calls
	times  []float64 // seconds of each call where calls follow one another; gone once p50 is known
	p50    float64
	wall   float64 // seconds
	cpu    float64 // seconds
	allocs float64
}

// result is all turns of a contestant, by round.
type result struct {
	name  string
	turns []turn
}

// metric is a figure of a turn.
type metric func(turn) float64

func speed(t turn) float64     { return t.amount / t.wall }
func mean(t turn) float64      { return t.wall / t.amount }
func p50(t turn) float64       { return t.p50 }
func cpuEach(t turn) float64   { return t.cpu / t.amount }
func allocEach(t turn) float64 { return t.allocs / t.amount }

// compete has the contestants take turns. Who begins, and who follows whom, changes from round to round.
func (b *bench) compete(contestants ...contestant) []result {
	results := make([]result, len(contestants))
	for i, c := range contestants {
		results[i].name = c.name
		c.run() // connections are made and buffers grow outside of the competition
	}
	for round := range b.rounds {
		for i := range contestants {
			k := (i + round/2) % len(contestants)
			if round%2 == 1 {
				k = len(contestants) - 1 - k
			}
			results[k].turns = append(results[k].turns, measure(contestants[k].run))
		}
	}
	return results
}

// measure adds time, processor time and allocations to a turn. The garbage of others is collected before.
func measure(run func() turn) turn {
	runtime.GC()
	allocs, cpu, start := mallocs(), cpuTime(), time.Now()
	t := run()
	t.wall = time.Since(start).Seconds()
	t.cpu = cpuTime() - cpu
	t.allocs = float64(mallocs() - allocs)
	if t.times != nil {
		t.p50, t.times = spreadOf(t.times).median, nil
	}
	return t
}

func mallocs() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.Mallocs
}

// cpuTime is the processor time of this process, user and system, in seconds.
func cpuTime() float64 {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		panic(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano()).Seconds()
}

// spread is a median and the quartiles around it.
type spread struct{ median, low, high float64 }

func spreadOf(values []float64) spread {
	v := slices.Sorted(slices.Values(values))
	at := func(q float64) float64 {
		i, frac := math.Modf(q * float64(len(v)-1))
		low, high := v[int(i)], v[min(int(i)+1, len(v)-1)]
		if low == high { // also both infinite
			return low
		}
		return low + frac*(high-low)
	}
	return spread{at(0.5), at(0.25), at(0.75)}
}

// exactly is a spread of something that is not measured in rounds.
func exactly(v float64) spread { return spread{v, v, v} }

func (r result) spread(m metric) spread {
	var values []float64
	for _, t := range r.turns {
		values = append(values, m(t))
	}
	return spreadOf(values)
}

func (r result) median(m metric) float64 { return r.spread(m).median }

// over is the ratio to another's figure, taken round by round: what slows a whole round down leaves it as it is.
func (r result) over(other result, m metric) spread {
	var ratios []float64
	for i, t := range r.turns {
		ratios = append(ratios, m(t)/m(other.turns[i]))
	}
	return spreadOf(ratios)
}

// fastest is the result with the best median speed.
func fastest(results []result) result {
	return slices.MaxFunc(results, func(a, b result) int {
		return int(math.Copysign(1, a.median(speed)-b.median(speed)))
	})
}
