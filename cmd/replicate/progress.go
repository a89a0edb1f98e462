package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"text/tabwriter"
	"time"
)

// How often progress is shown.
const (
	liveInterval = 200 * time.Millisecond
	jsonInterval = time.Second
	lineInterval = 10 * time.Second
)

// maxLeft is how much time left is still told. What takes longer has sent no more than its header yet, and the number could be
// more than a Duration holds.
const maxLeft = 1000 * time.Hour

// reporter tells how a replication goes: on a terminal with a line per transfer that is kept up to date, elsewhere with a
// line now and then, or in JSON. It is safe for concurrent use.
type reporter struct {
	o          output
	json, live bool
	begun      time.Time
	quit, done chan struct{}
	closing    sync.Once

	mu       sync.Mutex // held while writing, so that lines do not mix
	active   []*transfer
	drawn    int // lines of active transfers that stand on the terminal now
	versions int // that were transferred
	bytes    int64
	resumed  int64 // bytes that did not have to be sent again
	results  map[string]*result
	steps    int // that were planned
	planSize uint64
	failures int
}

// result is what came of a filesystem.
type result struct {
	versions int
	bytes    int64
	took     time.Duration // sending
	broken   bool          // the last transfer did not come to its end
	failed   bool
}

// transfer is one version on its way.
type transfer struct {
	filesystem, version string
	offset, size        int64 // where it began, and the bytes to come from there; size 0: not known
	begun               time.Time
	done                atomic.Int64
}

// event is a line of JSON.
type event struct {
	Event      string  `json:"event"` // planned, started, progress, finished, broken, retrying, failed, summary
	Filesystem string  `json:"filesystem,omitempty"`
	Version    string  `json:"version,omitempty"`
	Offset     int64   `json:"offset,omitempty"`   // bytes that were there before
	Bytes      int64   `json:"bytes,omitempty"`    // bytes that were sent
	Size       int64   `json:"size,omitempty"`     // bytes to be sent
	Seconds    float64 `json:"seconds,omitempty"`  // that it took, or that are waited for
	Versions   int     `json:"versions,omitempty"` // the rest is of the summary
	Total      int     `json:"filesystems,omitempty"`
	Failed     int     `json:"failed,omitempty"`
	Error      string  `json:"error,omitempty"`
}

// newReporter starts to show progress; close ends that.
func newReporter(o output, asJSON bool) *reporter {
	r := &reporter{o: o, json: asJSON, live: !asJSON && isTerminal(o.status), begun: time.Now(),
		quit: make(chan struct{}), done: make(chan struct{}), results: make(map[string]*result)}
	interval := lineInterval
	switch {
	case r.json:
		interval = jsonInterval
	case r.live:
		interval = liveInterval
	}
	go r.tick(interval) // ends with quit; close waits for it
	return r
}

func (r *reporter) tick(interval time.Duration) {
	defer close(r.done)
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		select {
		case <-r.quit:
			return
		case <-ticker.C:
			r.showActive()
		}
	}
}

// close ends the progress and clears its lines.
func (r *reporter) close() {
	r.closing.Do(func() {
		close(r.quit)
		<-r.done
		r.mu.Lock()
		defer r.mu.Unlock()
		r.erase()
	})
}

func (r *reporter) showActive() {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.live:
		r.erase()
		r.draw()
	case r.json:
		for _, t := range r.active {
			r.emit(t.event("progress"))
		}
	default:
		for _, t := range r.active {
			fmt.Fprintln(r.o.status, t.line())
		}
	}
}

// erase removes the lines of draw from the terminal. The lock is held.
func (r *reporter) erase() {
	if r.drawn > 0 {
		fmt.Fprintf(r.o.status, "\x1b[%dA\r\x1b[J", r.drawn)
		r.drawn = 0
	}
}

// draw shows a line for every active transfer; too long a line is cut by the terminal, not continued on the next. The
// lock is held.
func (r *reporter) draw() {
	if !r.live || len(r.active) == 0 {
		return
	}
	var b strings.Builder
	b.WriteString("\x1b[?7l")
	for _, t := range r.active {
		b.WriteString(t.line() + "\n")
	}
	b.WriteString("\x1b[?7h")
	io.WriteString(r.o.status, b.String())
	r.drawn = len(r.active)
}

// print writes a line of its own, above those of the active transfers. The lock is held.
func (r *reporter) print(w io.Writer, format string, args ...any) {
	r.erase()
	fmt.Fprintf(w, format+"\n", args...)
	r.draw()
}

// Write writes what is logged, above the lines of the active transfers.
func (r *reporter) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.erase()
	defer r.draw()
	return r.o.status.Write(p)
}

// emit writes an event. The lock is held.
func (r *reporter) emit(e event) {
	line, err := json.Marshal(e)
	if err == nil {
		_, err = r.o.out.Write(append(line, '\n'))
	}
	if err != nil {
		fmt.Fprintln(r.o.status, "replicate: write JSON:", err)
	}
}

func (r *reporter) start(filesystem string, s step, size uint64) *transfer {
	t := &transfer{filesystem: filesystem, version: s.to.Name, offset: int64(s.offset), size: int64(size), begun: time.Now()}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.active = append(r.active, t)
	if r.json {
		r.emit(t.event("started"))
	}
	return t
}

// finish ends a transfer. That it failed is told by failed or retrying.
func (r *reporter) finish(t *transfer, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.erase()
	r.active = slices.DeleteFunc(r.active, func(other *transfer) bool { return other == t })
	r.bytes += t.done.Load()
	of := r.result(t.filesystem)
	of.bytes += t.done.Load()
	of.took += time.Since(t.begun)
	of.broken = err != nil
	if err == nil {
		of.versions++
		r.versions++
		r.resumed += t.offset
	}
	switch {
	case r.json && err == nil:
		r.emit(t.event("finished"))
	case r.json:
		r.emit(t.event("broken"))
	case err == nil:
		took := time.Since(t.begun)
		from := ""
		if t.offset > 0 {
			from = ", resumed at " + size(t.offset)
		}
		fmt.Fprintf(r.o.out, "%s: %s in %s (%s)%s\n", t.title(), size(t.done.Load()), short(took), speed(t.done.Load(), took), from)
	}
	r.draw()
}

// result is the entry of that filesystem, new or not. The lock is held.
func (r *reporter) result(filesystem string) *result {
	if r.results[filesystem] == nil {
		r.results[filesystem] = new(result)
	}
	return r.results[filesystem]
}

// retrying tells that the filesystem (or, with no name, listing) is tried again.
func (r *reporter) retrying(filesystem string, err error, wait time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.json {
		r.emit(event{Event: "retrying", Filesystem: filesystem, Seconds: wait.Seconds(), Error: err.Error()})
		return
	}
	r.print(r.o.status, "%s%v; trying again in %s", prefix(filesystem), err, short(wait))
}

func (r *reporter) failed(filesystem string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failures++
	r.result(filesystem).failed = true
	if r.json {
		r.emit(event{Event: "failed", Filesystem: filesystem, Error: err.Error()})
		return
	}
	r.print(r.o.status, "%sFAILED: %v", prefix(filesystem), err)
}

// planned shows a plan.
func (r *reporter) planned(p plan) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range p.steps {
		r.steps++
		r.planSize += s.size
		switch {
		case r.json:
			r.emit(event{Event: "planned", Filesystem: p.filesystem, Version: s.to.Name, Offset: int64(s.offset), Size: int64(s.size)})
		case s.offset > 0:
			r.print(r.o.out, "%s: %s, the rest after %s", title(p.filesystem, s.to.Name), size(int64(s.size)), size(int64(s.offset)))
		default:
			r.print(r.o.out, "%s: %s", title(p.filesystem, s.to.Name), size(int64(s.size)))
		}
	}
}

// plannedAll ends the showing of plans.
func (r *reporter) plannedAll() error {
	r.close()
	switch {
	case r.json:
		r.emit(event{Event: "summary", Versions: r.steps, Size: int64(r.planSize), Failed: r.failures})
	case r.steps == 0 && r.failures == 0:
		fmt.Fprintln(r.o.out, "nothing to do")
	default:
		fmt.Fprintf(r.o.out, "to be transferred: %s, %s\n", count(r.steps, "version"), size(int64(r.planSize)))
	}
	return r.outcome(false)
}

// summary ends a replication and says what came of it.
func (r *reporter) summary(filesystems int, interrupted bool) error {
	r.close()
	took := time.Since(r.begun)
	if r.json {
		e := event{Event: "summary", Total: filesystems, Versions: r.versions, Bytes: r.bytes, Offset: r.resumed,
			Seconds: took.Seconds(), Failed: r.failures}
		if interrupted {
			e.Error = errInterrupted.Error()
		}
		r.emit(e)
		return r.outcome(interrupted)
	}
	r.summarize(filesystems, took, interrupted)
	if interrupted {
		fmt.Fprintln(r.o.status, "interrupted; the next run goes on from here")
	}
	return r.outcome(interrupted)
}

// table shows what came of each filesystem that was not up to date.
func (r *reporter) table() {
	if len(r.results) == 0 {
		return
	}
	w := tabwriter.NewWriter(r.o.out, 0, 0, 2, ' ', 0)
	fmt.Fprint(w, "\nFILESYSTEM\tVERSIONS\tSENT\tTIME\tRATE\tRESULT\n")
	for _, name := range slices.Sorted(maps.Keys(r.results)) {
		of := r.results[name]
		outcome := "done"
		switch {
		case of.failed:
			outcome = "FAILED"
		case of.broken:
			outcome = "broke off"
		}
		fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%s\n", shown(name), of.versions, size(of.bytes), short(of.took), speed(of.bytes, of.took), outcome)
	}
	w.Flush()
	fmt.Fprintln(r.o.out)
}

func (r *reporter) summarize(filesystems int, took time.Duration, interrupted bool) {
	r.table()
	switch {
	case r.versions > 0 && r.resumed > 0:
		fmt.Fprintf(r.o.out, "transferred %s: %s in %s (%s); %s did not have to be sent again\n",
			count(r.versions, "version"), size(r.bytes), short(took), speed(r.bytes, took), size(r.resumed))
	case r.versions > 0:
		fmt.Fprintf(r.o.out, "transferred %s: %s in %s (%s)\n", count(r.versions, "version"), size(r.bytes), short(took), speed(r.bytes, took))
	case r.failures == 0 && !interrupted:
		fmt.Fprintf(r.o.out, "nothing to do: the other side has all of %s\n", count(filesystems, "filesystem"))
	}
	if r.failures > 0 {
		fmt.Fprintf(r.o.status, "%s FAILED\n", count(r.failures, "filesystem"))
	}
}

func (r *reporter) outcome(interrupted bool) error {
	if r.failures > 0 || interrupted {
		return errReported
	}
	return nil
}

func (t *transfer) event(kind string) event {
	return event{Event: kind, Filesystem: t.filesystem, Version: t.version, Offset: t.offset, Bytes: t.done.Load(),
		Size: t.size, Seconds: time.Since(t.begun).Seconds()}
}

func (t *transfer) title() string { return title(t.filesystem, t.version) }

// line is the progress of the transfer: bytes, percent, rate and time left.
func (t *transfer) line() string {
	done, took := t.done.Load(), time.Since(t.begun)
	if t.size == 0 {
		return fmt.Sprintf("%s: %s, %s", t.title(), size(t.offset+done), speed(done, took))
	}
	left, expected := "?", max(t.size, done) // an estimate may be too low
	if done > 0 {
		if nanos := float64(took) * float64(expected-done) / float64(done); nanos < float64(maxLeft) {
			left = time.Duration(nanos).Round(time.Second).String()
		}
	}
	whole := t.offset + expected
	return fmt.Sprintf("%s: %s of %s, %d%%, %s, %s left", t.title(), size(t.offset+done), size(whole),
		100*(t.offset+done)/max(whole, 1), speed(done, took), left)
}

// title names a version. Names come from peers: what is not a good name is quoted.
func title(filesystem, version string) string { return shown(filesystem) + " " + shown(version) }

func prefix(filesystem string) string {
	if filesystem == "" {
		return ""
	}
	return shown(filesystem) + ": "
}

func shown(name string) string {
	if checkPath(name) != nil {
		return strconv.Quote(name)
	}
	return name
}

// size is a number of bytes for people.
func size(n int64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return strconv.FormatInt(n, 10) + " B"
	}
	f, i := float64(n)/1024, 0
	for f >= 1023.95 && i < len(units)-1 {
		f, i = f/1024, i+1
	}
	return fmt.Sprintf("%.1f %ciB", f, units[i])
}

func speed(n int64, took time.Duration) string {
	return size(int64(float64(n)/max(took.Seconds(), 1e-6))) + "/s"
}

// short is a duration without digits that nobody needs.
func short(d time.Duration) string {
	switch {
	case d < 10*time.Second:
		return d.Round(10 * time.Millisecond).String()
	case d < time.Hour:
		return d.Round(time.Second).String()
	}
	return strings.TrimSuffix(d.Round(time.Minute).String(), "0s")
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return strconv.Itoa(n) + " " + what + "s"
}

// isTerminal tells whether what is written there can be overwritten in place. (Windows' consoles need asking first.)
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok || runtime.GOOS == "windows" || os.Getenv("TERM") == "" || os.Getenv("TERM") == "dumb" {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}
