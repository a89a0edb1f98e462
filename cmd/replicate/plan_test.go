package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"example.org/rpc"
)

func version(name string, guid, txg uint64) rpc.FilesystemVersion {
	return rpc.FilesystemVersion{Name: name, GUID: guid, CreateTXG: txg, Creation: epoch}
}

// text is a plan in one line: the versions in order, with "+offset" where one is resumed and "!" where partials are dropped.
func (p plan) text() string {
	var b strings.Builder
	for _, s := range p.steps {
		if s.clear {
			b.WriteString("!")
		}
		b.WriteString(s.to.Name)
		if s.token != "" {
			fmt.Fprintf(&b, "+%d", s.offset)
		}
		b.WriteString(" ")
	}
	if p.conflict != nil {
		b.WriteString("conflict")
	}
	return strings.TrimSpace(b.String())
}

func TestPlan(t *testing.T) {
	a, b, c := version("a", 1, 10), version("b", 2, 20), version("c", 3, 30)
	type versions = []rpc.FilesystemVersion
	bookmark := version("mark", 9, 5)
	bookmark.Type = rpc.VersionBookmark
	for name, test := range map[string]struct {
		source, sink versions
		token        string
		want         string
	}{
		"nothing anywhere":             {},
		"all of it, oldest first":      {source: versions{c, a, b}, want: "a b c"},
		"equal ages in order of names": {source: versions{version("z", 8, 10), version("a", 9, 10)}, want: "a z"},
		"all there":                    {source: versions{a, b}, sink: versions{b, a}},
		"the rest":                     {source: versions{a, b, c}, sink: versions{a}, want: "b c"},
		"a gap":                        {source: versions{a, b, c}, sink: versions{a, c}, want: "b"},
		"the sink has more":            {source: versions{b}, sink: versions{a, b, c}},
		"bookmarks are not sent":       {source: versions{bookmark, a}, want: "a"},
		"bookmarks are not there":      {source: versions{version("mark", 9, 5)}, sink: versions{bookmark}, want: "mark"},
		"renamed is still the same":    {source: versions{version("x", 1, 10)}, sink: versions{a}},
		"resume first":                 {source: versions{a, b, c}, token: resumeToken(ResumePoint{Name: "b", GUID: 2, Offset: 77}), want: "b+77 a c"},
		"resume the last":              {source: versions{a, b, c}, sink: versions{a, b}, token: resumeToken(ResumePoint{Name: "c", GUID: 3, Offset: 5}), want: "c+5"},
		"partial of what is gone":      {source: versions{a, b}, token: resumeToken(ResumePoint{Name: "x", GUID: 99, Offset: 5}), want: "!a b"},
		"partial of what is there":     {source: versions{a, b}, sink: versions{a}, token: resumeToken(ResumePoint{Name: "a", GUID: 1, Offset: 5}), want: "!b"},
		"partial of another GUID":      {source: versions{a}, token: resumeToken(ResumePoint{Name: "a", GUID: 99, Offset: 5}), want: "!a"},
		"token of another kind":        {source: versions{a}, token: "1-abc-zfs", want: "!a"},
		"partial, but nothing to do":   {source: versions{a}, sink: versions{a}, token: resumeToken(ResumePoint{Name: "x", GUID: 99, Offset: 5})},
		"conflict":                     {source: versions{version("a", 99, 10), b}, sink: versions{a}, want: "b conflict"},
	} {
		if got := makePlan("f", test.source, sinkState{test.sink, test.token}, parseDirToken).text(); got != test.want {
			t.Errorf("%s: %q, want %q", name, got, test.want)
		}
	}
}

func TestConflictNamesBothSides(t *testing.T) {
	p := makePlan("f", []rpc.FilesystemVersion{version("dump", 0xabc, 1)}, sinkState{versions: []rpc.FilesystemVersion{version("dump", 0xdef, 1)}}, parseDirToken)
	for _, part := range []string{"dump", "0000000000000abc", "0000000000000def"} {
		if p.conflict == nil || !strings.Contains(p.conflict.Error(), part) {
			t.Errorf("conflict %v does not name %s", p.conflict, part)
		}
	}
}

// replicator replicates from one store here to another, without a network between them.
func replicator(t *testing.T, source, sink rpc.Handler) (r *replication, out, status *strings.Builder) {
	out, status = new(strings.Builder), new(strings.Builder)
	r = &replication{source: source, sink: sink, parse: parseDirToken, jobs: 2,
		retry: retries{max: 3, first: time.Microsecond}, reconnect: func() {}}
	r.report = newReporter(output{out, status}, false)
	t.Cleanup(r.report.close)
	return r, out, status
}

// flaky is a source whose streams lose the connection after some bytes, as long as there are entries in cuts.
type flaky struct {
	Store
	cuts  []int
	sends atomic.Int32
	err   error
}

func (f *flaky) Send(ctx context.Context, req *rpc.SendReq) (*rpc.SendRes, io.ReadCloser, error) {
	n := int(f.sends.Add(1)) - 1
	res, stream, err := f.Store.Send(ctx, req)
	if err != nil || n >= len(f.cuts) {
		return res, stream, err
	}
	broken := io.MultiReader(io.LimitReader(stream, int64(f.cuts[n])), readerFunc(func([]byte) (int, error) { return 0, f.err }))
	return res, struct {
		io.Reader
		io.Closer
	}{broken, stream}, nil
}

func TestLostConnectionsAreResumed(t *testing.T) {
	source, sourceDir := tempStore(t)
	sink, sinkDir := tempStore(t)
	for i := range 3 {
		put(t, sourceDir, fmt.Sprintf("f/v%d", i), noise(10_000+i), i)
	}
	// More often than -retry allows without progress, but each time it gets further.
	lossy := &flaky{Store: source, cuts: []int{1000, 2000, 3000, 70, 80, 90, 4000}, err: io.ErrUnexpectedEOF}
	r, _, status := replicator(t, lossy, sink)
	if err := r.run(context.Background(), nil); err != nil {
		t.Fatal(err, status)
	}
	if a, b := tree(t, sourceDir), tree(t, sinkDir); fmt.Sprint(a) != fmt.Sprint(b) {
		t.Error("content differs, or something was left behind:", hiddenFiles(t, sinkDir))
	}
	if r.report.resumed == 0 || r.report.bytes > 30_003+10*int64(streamHeaderLen) {
		t.Errorf("%d bytes were sent, %d resumed", r.report.bytes, r.report.resumed)
	}
}

func TestRetriesEndWithoutProgress(t *testing.T) {
	source, dir := tempStore(t)
	sink, _ := tempStore(t)
	put(t, dir, "f/v", noise(1000), 1)
	lossy := &flaky{Store: source, cuts: make([]int, 100), err: io.ErrUnexpectedEOF}
	r, _, status := replicator(t, lossy, sink)
	if err := r.run(context.Background(), nil); !errors.Is(err, errReported) {
		t.Errorf("error is %v", err)
	}
	if n := lossy.sends.Load(); n != 4 {
		t.Errorf("%d attempts, want 1 and 3 retries", n)
	}
	if !strings.Contains(status.String(), "f: FAILED: ") {
		t.Errorf("the user sees %q", status)
	}
}

func TestOtherFailuresAreNotRetriedAndStopNobodyElse(t *testing.T) {
	source, dir := tempStore(t)
	sink, sinkDir := tempStore(t)
	put(t, dir, "bad/v", noise(1000), 1)
	put(t, dir, "good/v", noise(1000), 1)
	put(t, dir, "worse/v", noise(1000), 1)
	put(t, sinkDir, "bad", noise(5), 1)      // a file where the folder should be
	put(t, sinkDir, "worse/v", noise(99), 1) // a conflict
	put(t, dir, "worse/w", noise(1000), 2)
	r, _, status := replicator(t, source, sink)
	if err := r.run(context.Background(), nil); !errors.Is(err, errReported) {
		t.Errorf("error is %v", err)
	}
	if r.report.failures != 2 || r.report.versions != 2 {
		t.Errorf("%d failed, %d versions:\n%s", r.report.failures, r.report.versions, status)
	}
	got := tree(t, sinkDir)
	if got["good/v"] != string(noise(1000)) || got["worse/w"] != string(noise(1000)) || got["worse/v"] != string(noise(99)) {
		t.Errorf("the sink has %d files", len(got))
	}
	if strings.Contains(status.String(), "trying again") {
		t.Errorf("it was tried again: %s", status)
	}
}

func TestSelectionIsObeyedAndUnknownOnesFail(t *testing.T) {
	source, dir := tempStore(t)
	sink, sinkDir := tempStore(t)
	put(t, dir, "a/v", noise(10), 1)
	put(t, dir, "b/v", noise(10), 1)
	put(t, dir, "b/c/v", noise(10), 1)
	r, _, status := replicator(t, source, sink)
	if err := r.run(context.Background(), []string{"b", "no-such", "b"}); !errors.Is(err, errReported) {
		t.Errorf("error is %v", err)
	}
	if got := tree(t, sinkDir); len(got) != 1 || got["b/v"] == "" {
		t.Errorf("the sink has %d files", len(got))
	}
	if !strings.Contains(status.String(), "no-such: FAILED") {
		t.Errorf("the user sees %q", status)
	}
}

func TestSecondRunHasNothingToDo(t *testing.T) {
	source, dir := tempStore(t)
	sink, _ := tempStore(t)
	for i := range 4 {
		put(t, dir, fmt.Sprintf("f%d/v", i), noise(100), 1)
		put(t, dir, "v", noise(100), 1)
	}
	for i, want := range []int{5, 0} {
		r, _, status := replicator(t, source, sink)
		if err := r.run(context.Background(), nil); err != nil || r.report.versions != want {
			t.Errorf("run %d: %d versions, %v\n%s", i, r.report.versions, err, status)
		}
	}
}

func TestDryRunShowsThePlanAndChangesNothing(t *testing.T) {
	source, dir := tempStore(t)
	sink, sinkDir := tempStore(t)
	put(t, dir, "f/old", noise(100), 1)
	put(t, dir, "f/new", noise(3000), 2)
	r, out, _ := replicator(t, source, sink)
	if err := r.show(context.Background(), nil); err != nil {
		t.Fatal(err)
	}
	want := "f old: 167 B\nf new: 3.0 KiB\nto be transferred: 2 versions, 3.2 KiB\n"
	if got := out.String(); got != want && streamHeaderLen == 67 {
		t.Errorf("%q, want %q", got, want)
	}
	if got := tree(t, sinkDir); len(got) != 0 {
		t.Errorf("the sink has %v", got)
	}
}

func TestCancelledReplicationLeavesAPartialThatIsResumed(t *testing.T) {
	source, dir := tempStore(t)
	sink, sinkDir := tempStore(t)
	put(t, dir, "f/v", noise(10_000), 1)
	ctx, cancel := context.WithCancel(context.Background())
	stopping := &flaky{Store: source, cuts: []int{5000}, err: context.Canceled}
	r, _, status := replicator(t, &cancelling{stopping, cancel}, sink)
	if err := r.run(ctx, nil); !errors.Is(err, errReported) {
		t.Errorf("error is %v", err)
	}
	if !strings.Contains(status.String(), "interrupted") {
		t.Errorf("the user sees %q", status)
	}
	if exists(filepath.Join(sinkDir, "f", "v")) || tokenOf(t, sink, "f") == "" {
		t.Error("there is no partial version")
	}
	r, _, _ = replicator(t, source, sink)
	if err := r.run(context.Background(), nil); err != nil || r.report.resumed == 0 {
		t.Errorf("resumed %d, %v", r.report.resumed, err)
	}
	if got, _ := os.ReadFile(filepath.Join(sinkDir, "f", "v")); string(got) != string(noise(10_000)) {
		t.Error("content differs")
	}
}

// cancelling is a source with which everything is cancelled as soon as something is sent.
type cancelling struct {
	*flaky
	cancel context.CancelFunc
}

func (c *cancelling) Send(ctx context.Context, req *rpc.SendReq) (*rpc.SendRes, io.ReadCloser, error) {
	res, stream, err := c.flaky.Send(ctx, req)
	c.cancel()
	return res, stream, err
}

func TestRetriesBackOffAndForgiveAfterProgress(t *testing.T) {
	lost := fmt.Errorf("wrapped: %w", io.ErrUnexpectedEOF)
	r := retries{max: 3, first: time.Second}
	var waits []time.Duration
	for {
		wait, ok := r.next(lost)
		if !ok {
			break
		}
		waits = append(waits, wait)
	}
	if len(waits) != 3 {
		t.Fatalf("waits are %v", waits)
	}
	for i, wait := range waits {
		if longest := time.Second << i; wait > longest || wait < longest*3/4 {
			t.Errorf("wait %d is %v", i, wait)
		}
	}
	r.progressed()
	if _, ok := r.next(lost); !ok {
		t.Error("progress is not forgiven")
	}
	r = retries{max: 1000, first: time.Second}
	for range 1000 {
		if wait, ok := r.next(lost); !ok || wait > maxBackoff || wait <= 0 {
			t.Fatalf("wait is %v, %v", wait, ok)
		}
	}
}

func TestBusyFilesystemIsWaitedForLongerThanADeadPeerTakes(t *testing.T) {
	busy := rpc.Errorf(rpc.Aborted, "being received")
	r := retries{max: 1, first: time.Second}
	for range 100 {
		if _, ok := r.next(busy); !ok {
			t.Fatal("given up")
		}
	}
	r.busySince = time.Now().Add(-busyPatience)
	if _, ok := r.next(busy); !ok {
		t.Error("the retries that are allowed are not counted")
	}
	if _, ok := r.next(busy); ok {
		t.Error("it is tried for ever")
	}
}

func TestWhatIsWorthRetrying(t *testing.T) {
	for _, err := range []error{
		io.ErrUnexpectedEOF, rpc.ErrPeerTimeout, rpc.Errorf(rpc.Unavailable, "stopping"), rpc.Errorf(rpc.Aborted, "busy"),
		&rpc.HandshakeError{Code: rpc.Unavailable}, &rpc.HandshakeError{Code: rpc.ResourceExhausted},
	} {
		if !worthRetrying(fmt.Errorf("x: %w", err)) {
			t.Errorf("%v is not", err)
		}
	}
	for _, err := range []error{
		errors.New("x"), os.ErrPermission, context.Canceled, rpc.Errorf(rpc.ResourceExhausted, "disk full"),
		rpc.Errorf(rpc.NotFound, "gone"), &rpc.HandshakeError{Code: rpc.PermissionDenied}, &rpc.ProtocolError{},
	} {
		if worthRetrying(fmt.Errorf("x: %w", err)) {
			t.Errorf("%v is", err)
		}
	}
}
