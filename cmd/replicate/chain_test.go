package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"

	"example.org/rpc"
)

// chainText is a plan in one line: each step as from>to, with "+offset" where it is resumed and "!" where partials are dropped;
// a bookmark has a # before its name.
func chainText(p plan) string {
	var parts []string
	for _, s := range p.steps {
		text := ">" + s.to.Name
		if s.from != nil {
			text = s.from.Name + text
			if s.from.Type == rpc.VersionBookmark {
				text = "#" + text
			}
		}
		if s.clear {
			text = "!" + text
		}
		if s.token != "" {
			text += fmt.Sprintf("+%d", s.offset)
		}
		parts = append(parts, text)
	}
	if p.conflict != nil {
		word, _, _ := strings.Cut(p.conflict.Error(), ":")
		parts = append(parts, word)
	}
	return strings.Join(parts, " ")
}

func TestChain(t *testing.T) {
	a, b, c, d := version("a", 1, 10), version("b", 2, 20), version("c", 3, 30), version("d", 4, 40)
	mark := func(name string, of rpc.FilesystemVersion) rpc.FilesystemVersion {
		of.Name, of.Type = name, rpc.VersionBookmark
		return of
	}
	type versions = []rpc.FilesystemVersion
	// The sink counts its transactions itself.
	at := func(txg uint64, v rpc.FilesystemVersion) rpc.FilesystemVersion { v.CreateTXG = txg; return v }
	for name, test := range map[string]struct {
		source, sink versions
		token        string
		linear       string
		chained      string // "" as linear
	}{
		"nothing anywhere":                     {},
		"whole, then increments":               {source: versions{c, a, b}, linear: ">a a>b b>c"},
		"from the newest that both have":       {source: versions{a, b, c, d}, sink: versions{at(900, a), at(901, b)}, linear: "b>c c>d"},
		"all there":                            {source: versions{a, b}, sink: versions{b, a}},
		"the source forgot the old ones":       {source: versions{c, d}, sink: versions{a, b, c}, linear: "c>d"},
		"the sink forgot the old ones":         {source: versions{a, b, c}, sink: versions{b}, linear: "b>c"},
		"the base is only a bookmark":          {source: versions{mark("m", b), c}, sink: versions{a, b}, linear: "#m>c"},
		"a snapshot rather than its bookmark":  {source: versions{mark("a", b), b, mark("z", b), c}, sink: versions{b}, linear: "b>c"},
		"a bookmark newer than a snapshot":     {source: versions{a, mark("m", b), c}, sink: versions{a, b}, linear: "#m>c"},
		"bookmarks alone are nothing to send":  {source: versions{mark("m", a), mark("n", b)}},
		"bookmarks at the sink count for none": {source: versions{a, b}, sink: versions{mark("m", a)}, linear: ">a a>b"},
		"renamed is still the same":            {source: versions{version("x", 1, 10), b}, sink: versions{a}, linear: "x>b"},
		"nothing in common":                    {source: versions{c, d}, sink: versions{a, b}, linear: "diverged"},
		"the sink went on by itself":           {source: versions{a, c}, sink: versions{a, at(15, b)}, linear: "diverged", chained: "a>c"},
		"the sink went on, the source did not": {source: versions{a}, sink: versions{a, b}},
		"the name is taken":                    {source: versions{a, c, version("b", 9, 35), d}, sink: versions{at(1, b), at(2, a)}, linear: "a>c conflict"},
		"resume the first":                     {source: versions{a, b}, token: "1/0/70", linear: ">a+70 a>b"},
		"resume an increment":                  {source: versions{a, b, c}, sink: versions{a}, token: "2/1/70", linear: "a>b+70 b>c"},
		"partial of what is gone":              {source: versions{a, b}, token: "9/0/70", linear: "!>a a>b"},
		"partial from another version":         {source: versions{a, b, c}, sink: versions{a}, token: "2/9/70", linear: "!a>b b>c"},
		"partial of a later one":               {source: versions{a, b, c}, sink: versions{a}, token: "3/1/70", linear: "!a>b b>c"},
		"partial whose token cannot be read":   {source: versions{a}, token: "x", linear: "!>a"},
		"partial, but nothing to do":           {source: versions{a}, sink: versions{a}, token: "2/1/70"},
	} {
		for _, l := range []lineage{linear, chained} {
			want := test.linear
			if l == chained && test.chained != "" {
				want = test.chained
			}
			before := slices.Clone(test.source)
			if got := chainText(makeChain("f", test.source, sinkState{test.sink, test.token}, l, parseTestToken)); got != want {
				t.Errorf("%s (%d): %q, want %q", name, l, got, want)
			}
			if !slices.Equal(before, test.source) {
				t.Errorf("%s: the list was changed", name)
			}
		}
	}
}

// parseTestToken reads GUID/FROM/OFFSET.
func parseTestToken(token string) (p ResumePoint, err error) {
	_, err = fmt.Sscanf(token, "%d/%d/%d", &p.GUID, &p.From, &p.Offset)
	return p, err
}

func TestDivergedNamesBothSidesVersions(t *testing.T) {
	source := []rpc.FilesystemVersion{version("old", 0xa1, 1), version("new-there", 0xa2, 5)}
	sink := []rpc.FilesystemVersion{version("old", 0xa1, 1), version("new-here", 0xb2, 3)}
	p := makeChain("f", source, sinkState{versions: sink}, linear, parseTestToken)
	for _, part := range []string{"diverged", `"old" (00000000000000a1)`, `"new-there" (00000000000000a2`, `"new-here" (00000000000000b2`, "nothing is destroyed"} {
		if p.conflict == nil || !strings.Contains(p.conflict.Error(), part) {
			t.Errorf("%v does not have %s", p.conflict, part)
		}
	}
	if len(p.steps) > 0 {
		t.Errorf("steps: %s", chainText(p))
	}
}

func TestParentsComeBeforeChildrenAndSoManyAtATime(t *testing.T) {
	names := []string{"a", "a/b", "a/b/c", "a/d", "e", "e/f/g", "h", "i", "."}
	for _, jobs := range []int{1, 2, 3, 64} {
		var mu sync.Mutex
		done, running, most := make(map[string]bool), 0, 0
		all := make(chan struct{}) // closed when as many run as may, so that it is seen that they do
		r := &replication{jobs: jobs}
		r.eachAfterParent(names, func(i int) {
			mu.Lock()
			for _, parent := range parents(names[i]) {
				if slices.Contains(names, parent) && !done[parent] {
					t.Errorf("%d jobs: %s before %s", jobs, names[i], parent)
				}
			}
			running++
			if most = max(most, running); running == min(jobs, 4) && i != len(names)-1 {
				select {
				case <-all:
				default:
					close(all)
				}
			}
			mu.Unlock()
			if names[i] == "a" || names[i] == "e" || names[i] == "h" || names[i] == "i" {
				<-all // these four are free to run together
			}
			mu.Lock()
			running--
			done[names[i]] = true
			mu.Unlock()
		})
		if len(done) != len(names) || most > jobs {
			t.Errorf("%d jobs: %d done, %d at a time", jobs, len(done), most)
		}
	}
}

// chainStore is a sink and a source in memory whose versions depend on each other, with resume tokens that only sinks give.
type chainStore struct {
	rpc.UnimplementedHandler
	mu       sync.Mutex
	versions map[string][]rpc.FilesystemVersion
	tokens   map[string]string
	sent     []string // what was asked for
	received []string
	unusable bool // tokens are not used
	lost     int  // so many streams break off
}

func (s *chainStore) ListFilesystems(context.Context, *rpc.ListFilesystemReq) (*rpc.ListFilesystemRes, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	res := new(rpc.ListFilesystemRes)
	for name := range s.versions {
		res.Filesystems = append(res.Filesystems, rpc.Filesystem{Path: name, ResumeToken: s.tokens[name]})
	}
	return res, nil
}

func (s *chainStore) ListFilesystemVersions(_ context.Context, req *rpc.ListFilesystemVersionsReq) (*rpc.ListFilesystemVersionsRes, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &rpc.ListFilesystemVersionsRes{Versions: slices.Clone(s.versions[req.Filesystem])}, nil
}

func (s *chainStore) Send(_ context.Context, req *rpc.SendReq) (*rpc.SendRes, io.ReadCloser, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	from := ""
	if req.From != nil {
		from = req.From.Name
	}
	s.sent = append(s.sent, from+">"+req.To.Name+req.ResumeToken)
	return &rpc.SendRes{UsedResumeToken: req.ResumeToken != "" && !s.unusable}, io.NopCloser(strings.NewReader("data")), nil
}

func (s *chainStore) Receive(_ context.Context, req *rpc.ReceiveReq, r io.Reader) (*rpc.ReceiveRes, error) {
	if _, err := io.Copy(io.Discard, r); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	what := req.To.Name
	if req.ClearResumeToken {
		what = "!" + what
	}
	if s.received = append(s.received, what); s.lost > 0 {
		s.lost--
		return nil, io.ErrUnexpectedEOF
	}
	delete(s.tokens, req.Filesystem)
	s.versions[req.Filesystem] = append(s.versions[req.Filesystem], *req.To)
	return new(rpc.ReceiveRes), nil
}

func TestResumeTokenThatTheSourceCannotUseIsDroppedAtTheSink(t *testing.T) {
	a, b := version("a", 1, 10), version("b", 2, 20)
	for _, unusable := range []bool{false, true} {
		source := &chainStore{versions: map[string][]rpc.FilesystemVersion{"f": {a, b}}, unusable: unusable}
		sink := &chainStore{versions: map[string][]rpc.FilesystemVersion{"f": {a}}, tokens: map[string]string{"f": "2/1/70"}}
		r, _, status := replicator(t, source, sink)
		r.lineage, r.parse = linear, parseTestToken
		if err := r.run(context.Background(), nil); err != nil {
			t.Fatal(err, status)
		}
		want := map[bool]string{false: "[b]", true: "[!b]"}[unusable]
		if got := fmt.Sprint(sink.received); got != want || fmt.Sprint(source.sent) != "[a>b2/1/70]" {
			t.Errorf("unusable %v: sent %v, received %s, want %s", unusable, source.sent, got, want)
		}
	}
}

func TestChainGoesOnAfterLostConnectionsFromWhatArrived(t *testing.T) {
	a, b, c := version("a", 1, 10), version("b", 2, 20), version("c", 3, 30)
	source := &chainStore{versions: map[string][]rpc.FilesystemVersion{"f": {a, b, c}, "g": {a}}}
	sink := &chainStore{versions: map[string][]rpc.FilesystemVersion{"g": {version("x", 9, 1)}}, lost: 2}
	r, out, status := replicator(t, source, sink)
	r.lineage, r.parse = linear, parseTestToken
	if err := r.run(context.Background(), nil); !errors.Is(err, errReported) {
		t.Errorf("error is %v", err)
	}
	if got := fmt.Sprint(sink.received); got != "[a a a b c]" {
		t.Errorf("received %s", got)
	}
	if !strings.Contains(status.String(), "g: FAILED: diverged") {
		t.Errorf("the user sees %q", status)
	}
	// One line for each in the table at the end.
	for _, want := range []string{"FILESYSTEM", "\nf           3  ", "done\n", "\ng           0  ", "FAILED\n"} {
		if !strings.Contains(strings.Join(strings.Fields(out.String()), " "), strings.Join(strings.Fields(want), " ")) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
}

func TestSourceThatNamesAFilesystemTwiceIsReplicatedOnce(t *testing.T) {
	source := &twice{&chainStore{versions: map[string][]rpc.FilesystemVersion{"f": {version("a", 1, 10)}}}}
	sink := &chainStore{versions: map[string][]rpc.FilesystemVersion{}}
	r, _, status := replicator(t, source, sink)
	r.lineage, r.parse = linear, parseTestToken
	if err := r.run(context.Background(), nil); err != nil || len(sink.received) != 1 {
		t.Errorf("%v, received %v\n%s", err, sink.received, status)
	}
}

type twice struct{ *chainStore }

func (s *twice) ListFilesystems(ctx context.Context, req *rpc.ListFilesystemReq) (*rpc.ListFilesystemRes, error) {
	res, err := s.chainStore.ListFilesystems(ctx, req)
	res.Filesystems = append(res.Filesystems, res.Filesystems...)
	return res, err
}

// cursorStore is a source with a cursor.
type cursorStore struct {
	*chainStore
	cursor uint64
}

func (s *cursorStore) ReplicationCursor(context.Context, *rpc.ReplicationCursorReq) (*rpc.ReplicationCursorRes, error) {
	return &rpc.ReplicationCursorRes{GUID: s.cursor, NotExist: s.cursor == 0}, nil
}

func (s *cursorStore) SendCompleted(_ context.Context, req *rpc.SendCompletedReq) (*rpc.SendCompletedRes, error) {
	s.cursor = req.OriginalReq.To.GUID
	return new(rpc.SendCompletedRes), nil
}

// deafSink takes what it is sent, but its first answer is lost.
type deafSink struct {
	*chainStore
	answers int
}

func (s *deafSink) Receive(ctx context.Context, req *rpc.ReceiveReq, r io.Reader) (*rpc.ReceiveRes, error) {
	res, err := s.chainStore.Receive(ctx, req, r)
	if s.answers++; s.answers == 1 {
		return nil, rpc.Errorf(rpc.Unavailable, "connection lost")
	}
	return res, err
}

func TestCursorIsMovedToWhatArrivedBeforeAConnectionWasLost(t *testing.T) {
	source := &cursorStore{chainStore: &chainStore{versions: map[string][]rpc.FilesystemVersion{"f": {version("a", 1, 10)}}}}
	sink := &deafSink{chainStore: &chainStore{versions: map[string][]rpc.FilesystemVersion{}}}
	r, _, status := replicator(t, source, sink)
	r.lineage, r.parse = linear, parseTestToken
	if err := r.run(context.Background(), nil); err != nil {
		t.Fatal(err, status)
	}
	if source.cursor != 1 || len(sink.received) != 1 {
		t.Errorf("the cursor is at %d, received %v", source.cursor, sink.received)
	}
}
