package main

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"regexp"
	"runtime"
	"runtime/debug"
	"strings"
	"time"
)

// report is what a run has found.
type report struct {
	rounds  int
	quick   bool
	budgets []budget
	tables  []table
	results map[string][]result // by scenario, for the chart
}

type budget struct {
	what, limit string
	got         spread
	met         bool
}

type table struct {
	title, note string
	rows        [][]string // the first is the header
}

func (r *report) atLeast(what string, got spread, limit float64, of string) {
	r.budgets = append(r.budgets, budget{what, fmt.Sprintf("≥ %g %s", limit, of), got, got.median >= limit})
}

func (r *report) atMost(what string, got spread, limit float64, of string) {
	r.budgets = append(r.budgets, budget{what, fmt.Sprintf("≤ %g %s", limit, of), got, got.median <= limit})
}

func (r *report) add(title, note string, rows [][]string) {
	r.tables = append(r.tables, table{title, note, rows})
}

// keep is for the chart.
func (r *report) keep(scenario string, results ...result) { r.results[scenario] = results }

// bulkTable has a line for each result, beside the reference.
func bulkTable(reference result, lists ...[]result) [][]string {
	rows := [][]string{{"", "MiB/s", "× bare", "CPU s/GiB", "× bare", "allocations/MiB"}}
	for _, results := range lists {
		for _, r := range results {
			rows = append(rows, []string{mark(r, reference), number(r.median(speed) / (1 << 20)), r.over(reference, speed).String(),
				number(r.median(cpuEach) * (1 << 30)), r.over(reference, cpuEach).String(), number(r.median(allocEach) * (1 << 20))})
		}
	}
	return rows
}

// callTable is the same for calls; m is what is compared.
func callTable(reference result, m metric, results []result) [][]string {
	rows := [][]string{{"", "calls/s", "p50 µs", "mean µs", "ratio", "CPU µs/call", "allocations/call"}}
	for _, r := range results {
		half, whole := "–", "–" // of callers side by side only the sum is known
		if r.median(p50) > 0 {
			half, whole = number(r.median(p50)*1e6), number(r.median(mean)*1e6)
		}
		rows = append(rows, []string{mark(r, reference), number(r.median(speed)), half, whole, r.over(reference, m).String(),
			number(r.median(cpuEach) * 1e6), number(r.median(allocEach))})
	}
	return rows
}

func mark(r, reference result) string {
	if r.name == reference.name {
		return r.name + " (reference)"
	}
	return r.name
}

// number has three digits that count, and none after the point where there are more before it.
func number(v float64) string {
	switch {
	case v == 0:
		return "0"
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	case v >= 0.1:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.4f", v)
}

func (s spread) String() string {
	if s.low == s.high {
		return number(s.median)
	}
	return fmt.Sprintf("%s (%s–%s)", number(s.median), number(s.low), number(s.high))
}

func (r *report) print(w io.Writer) {
	fmt.Fprint(w, r.head())
	if len(r.budgets) > 0 {
		rows := [][]string{{"what", "measured", "budget", ""}}
		for _, b := range r.budgets {
			verdict := "met"
			if !b.met {
				verdict = "**not met**"
			}
			rows = append(rows, []string{b.what, b.got.String(), b.limit, verdict})
		}
		printTable(w, table{"Budgets", "", rows})
	}
	for _, t := range r.tables {
		printTable(w, t)
	}
}

func printTable(w io.Writer, t table) {
	fmt.Fprintf(w, "\n## %s\n\n", t.title)
	if t.note != "" {
		fmt.Fprintf(w, "%s\n\n", t.note)
	}
	widths := make([]int, len(t.rows[0]))
	for _, row := range t.rows {
		for i, cell := range row {
			widths[i] = max(widths[i], len([]rune(cell)))
		}
	}
	for n, row := range t.rows {
		for i, cell := range row {
			fmt.Fprintf(w, "| %-*s ", widths[i], cell)
		}
		fmt.Fprintln(w, "|")
		if n == 0 {
			for _, width := range widths {
				fmt.Fprint(w, "|", strings.Repeat("-", width+2))
			}
			fmt.Fprintln(w, "|")
		}
	}
}

// head says where the figures come from, and what they cannot show.
func (r *report) head() string {
	met := 0
	for _, b := range r.budgets {
		if b.met {
			met++
		}
	}
	warning := ""
	if r.quick || r.rounds < enoughRounds {
		warning = "\nThis was a short run: its figures show that everything works, and nothing else.\n"
	}
	return fmt.Sprintf(`# Results

%d of %d budgets are met. %s, %s %s/%s; %s, %d cores, kernel %s.
Medians of %d rounds, in brackets the quartiles. Contestants take turns within a round, in changing order; ratios are taken
round by round. "Bare" is a plain copy or ping-pong over the same kind of connection, with the buffer that was fastest.
Processor time and allocations are those of both ends together. Peers: %s.
%s
What this cannot show: it is the loopback of one machine, without a network's delay, loss or real cards, and both ends share
its %d cores, so that processor time decides what elsewhere the wire may. The library's author wrote the programs around the
peers, knows the library best, and chose what is measured; the peers do other things besides. All of it is in this folder.
`, met, len(r.budgets), time.Now().UTC().Format(time.DateOnly), runtime.Version(), runtime.GOOS, runtime.GOARCH,
		cpuModel(), runtime.NumCPU(), kernel(), r.rounds, peerVersions(), warning, runtime.NumCPU())
}

func cpuModel() string {
	info, _ := os.ReadFile("/proc/cpuinfo") // where there is none, that is said
	if m := regexp.MustCompile(`(?m)^model name\s*: (.*)$`).FindSubmatch(info); m != nil {
		return strings.TrimSpace(string(m[1]))
	}
	return "unknown CPU"
}

func kernel() string {
	release, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return cmp.Or(strings.TrimSpace(string(release)), "unknown")
}

// peerVersions are those of the modules that were built in.
func peerVersions() string {
	peers := regexp.MustCompile(`/(grpc|protobuf|ttrpc|drpc|yamux)$`)
	list := []string{"net/http, net/rpc and crypto/tls of " + runtime.Version()}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range info.Deps {
			if peers.MatchString(m.Path) {
				list = append(list, m.Path+" "+m.Version)
			}
		}
	}
	return strings.Join(list, ", ")
}

func (r *report) save(file string) {
	f := must(os.Create(file))
	r.print(f)
	fmt.Fprint(f, "\n![chart](results.svg)\n")
	check(f.Close())
}
