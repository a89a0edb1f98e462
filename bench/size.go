package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// size compares programs that send a stream, with the library and on the standard library alone.
func (b *bench) size() {
	rows := [][]string{{"", "alone, kB", "with the library, kB", "more, kB"}}
	for _, p := range []struct {
		what, alone, with, tags string
		limit                   float64
	}{
		{"over net and crypto/tls alone", "base", "rpc", "", 150},
		{"over net alone, with rpc_notls", "netbase", "netrpc", "rpc_notls", 200},
	} {
		alone, err := b.build(p.alone, "")
		if err != nil {
			b.report.add("Size of a program", fmt.Sprintf("Skipped: %v", err), [][]string{{""}})
			return
		}
		with := must(b.build(p.with, p.tags))
		b.report.atMost("binary, "+p.what+": kB more", exactly(with-alone), p.limit, "")
		rows = append(rows, []string{p.what, number(alone), number(with), number(with - alone)})
	}
	b.report.add("Size of a program", "Built with -ldflags='-s -w', without cgo.", rows)
}

// build returns the size of a program of testdata, in kB.
func (b *bench) build(name, tags string) (float64, error) {
	binary := filepath.Join(b.dir, name)
	build := exec.Command("go", "build", "-tags", tags, "-ldflags=-s -w", "-o", binary, "./testdata/size/"+name)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("go build ./testdata/size/%s: %w: %s", name, err, out)
	}
	info, err := os.Stat(binary)
	if err != nil {
		return 0, err
	}
	return float64(info.Size()) / 1000, nil
}
