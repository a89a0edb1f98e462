// Command bench measures the library side by side with what people would otherwise use, and says which of its budgets
// are met. Run it in its own folder, on a quiet machine:
//
//	go run .                  everything, ten minutes; writes results.md and results.svg
//	go run . -only 'bulk|64'  the scenarios whose names match
//	go run . -quick           less than a minute, to see that it works
//
// Both ends of everything run in one process over the loopback, and contestants take turns within a round. It needs some
// 10,000 descriptors and a Unix.
package main

import (
	"cmp"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// bench is a run of this program.
type bench struct {
	rounds int
	bytes  int64         // of a bulk transfer
	time   time.Duration // of a turn of calls
	tls    transport
	dir    string // temporary, with the certificates
	report report
}

// enoughRounds is how many a ratio needs to be judged by.
const enoughRounds = 9

var scenarios = []struct {
	name string
	run  func(b *bench)
}{
	{"bulk-tcp", (*bench).bulkTCP},
	{"bulk-tls", (*bench).bulkTLS},
	{"pipe-to-pipe", (*bench).pipeToPipe},
	{"file-to-discard", (*bench).fileToDiscard},
	{"file-to-file", (*bench).fileToFile},
	{"streams", (*bench).streams},
	{"unary", (*bench).unaryTCP},
	{"unary-tls", (*bench).unaryTLS},
	{"unary-64-callers", (*bench).callers},
	{"clients", (*bench).clients},
	{"first-byte", (*bench).firstByte},
	{"download-4k", (*bench).download4K},
	{"messages", (*bench).messages},
	{"memory", (*bench).memory},
	{"size", (*bench).size},
}

func main() {
	if len(os.Args) > 1 && strings.HasPrefix(os.Args[1], "memory-") {
		runChild(os.Args[1], os.Args[2], os.Args[3])
		return
	}
	only := flag.String("only", "", "run the scenarios whose names match this `regexp`, and write no files")
	quick := flag.Bool("quick", false, "see that everything works; the figures mean little; files are written only with -out")
	out := flag.String("out", "", "the `folder` for results.md and results.svg; empty: this one, if the run is a full one")
	rounds := flag.Int("rounds", 0, "how many rounds; 0: 9, or 3 with -quick")
	flag.Parse()
	pattern, err := regexp.Compile(*only)
	if err == nil && *out != "" {
		err = os.MkdirAll(*out, 0o755) // before the measuring, which takes minutes
	}
	if err != nil || flag.NArg() > 0 || *rounds < 0 {
		fmt.Fprintln(os.Stderr, cmp.Or(err, fmt.Errorf("bad arguments")))
		flag.Usage()
		os.Exit(2)
	}
	b := newBench(*quick, *rounds)
	defer os.RemoveAll(b.dir)
	for _, s := range scenarios {
		if pattern.MatchString(s.name) {
			fmt.Fprintf(os.Stderr, "%s %s\n", time.Now().Format(time.TimeOnly), s.name)
			s.run(b)
		}
	}
	b.report.print(os.Stdout)
	if *only == "" && (!*quick || *out != "") {
		b.report.save(filepath.Join(*out, "results.md"))
		b.report.draw(filepath.Join(*out, "results.svg"))
	}
}

func newBench(quick bool, rounds int) *bench {
	b := &bench{rounds: cmp.Or(rounds, enoughRounds), bytes: 512 << 20, time: 300 * time.Millisecond}
	if quick {
		b.rounds, b.bytes, b.time = cmp.Or(rounds, 3), 32<<20, 20*time.Millisecond
	}
	b.report = report{rounds: b.rounds, quick: quick, results: make(map[string][]result)}
	b.dir = must(os.MkdirTemp("", "bench"))
	certs := filepath.Join(b.dir, "certs")
	check(os.Mkdir(certs, 0o700))
	writeCertificates(certs)
	b.tls = tlsFrom(certs)
	return b
}
