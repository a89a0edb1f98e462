package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"

	"example.org/rpc"
)

const aboutTransfer = `
It lists both sides, sends what is missing, oldest first, and first of all what broke off before. Snapshots of ZFS and
btrfs are sent as increments from the newest one that both sides have; if the other side has newer ones of its own, or
none in common, it has diverged: that fails, and names both sides' versions. A version that is there under the same name
but is not the same is a conflict: it fails too. Nothing is ever overwritten or destroyed, and what the source no longer
has stays at the other side. Filesystems come after those above them. A filesystem that fails does not stop the others. FILESYSTEMs are named as list
shows them; none means all.

On a terminal every transfer has a line with bytes, percent, rate and time left, otherwise there is one every ten
seconds.
` + aboutStores

var pushCommand = command{
	name:     "push",
	synopsis: "-peer ADDR -store STORE [flags] [FILESYSTEM...]",
	brief:    "replicate from here to a server's sink",
	about:    "Replicates from STORE to the peer's sink, into the folder of this client there.\n" + aboutTransfer,
	run:      runPush,
}

var pullCommand = command{
	name:     "pull",
	synopsis: "-peer ADDR -store STORE [flags] [FILESYSTEM...]",
	brief:    "replicate from a server's source to here",
	about:    "Replicates from the peer's source to STORE.\n" + aboutTransfer,
	run:      runPull,
}

func runPush(ctx context.Context, o output, flags *flag.FlagSet, args []string) error {
	return transferCommand(ctx, o, flags, args, func(r *replication, store Store, peer *rpc.Client) {
		r.source, r.sink = store, sinkPeer{peer}
	})
}

func runPull(ctx context.Context, o output, flags *flag.FlagSet, args []string) error {
	return transferCommand(ctx, o, flags, args, func(r *replication, store Store, peer *rpc.Client) {
		r.source, r.sink = peer, store
	})
}

// transferFlags are the flags of push and pull.
type transferFlags struct {
	peer        peerFlags
	store       string
	jobs, retry int
	dry, json   bool
}

func (f *transferFlags) add(flags *flag.FlagSet) {
	f.peer.add(flags)
	flags.StringVar(&f.store, "store", "", "the `STORE` on this side")
	flags.IntVar(&f.jobs, "jobs", 2, "`N` filesystems at a time")
	flags.IntVar(&f.retry, "retry", 3, "try again up to `N` times after a lost connection; getting further in between starts the count anew")
	flags.BoolVar(&f.dry, "n", false, "only show what would be transferred")
	flags.BoolVar(&f.json, "json", false, "results and progress as JSON, an object a line")
}

func (f *transferFlags) check() error {
	switch {
	case f.jobs < 1 || f.jobs > maxJobs:
		return usagef("-jobs %d: 1 to %d", f.jobs, maxJobs)
	case f.retry < 0:
		return usagef("-retry %d: 0 or more", f.retry)
	}
	return nil
}

// transferCommand is push and pull; connect says which side is which.
func transferCommand(ctx context.Context, o output, flags *flag.FlagSet, args []string,
	connect func(r *replication, store Store, peer *rpc.Client)) error {
	var f transferFlags
	f.add(flags)
	if err := parse(flags, args); err != nil {
		return err
	}
	if err := cmp.Or(f.check(), checkSelection(flags.Args())); err != nil {
		return err
	}
	report := newReporter(o, f.json)
	defer report.close()
	store, err := openStore(f.store, warnings(report))
	if err != nil {
		return err
	}
	defer store.Close()
	client, err := f.peer.client(rpc.ClientConfig{MaxIdleDataConns: f.jobs}) // its errors come back: it has nothing to log
	if err != nil {
		return err
	}
	defer f.peer.wait()
	defer client.Close()
	r := &replication{lineage: store.Lineage(), parse: store.ParseResumeToken, jobs: f.jobs,
		retry: retries{max: f.retry, first: firstBackoff}, reconnect: client.ResetConnectBackoff, report: report}
	connect(r, store, client)
	ctx = withReceiver(ctx, f.peer.addr)
	if f.dry {
		return r.show(ctx, flags.Args())
	}
	return r.run(ctx, flags.Args())
}

var errInterrupted = errors.New("interrupted")

const maxJobs = 64 // a quarter of the connections that a server allows a client

// warnings is a log for people at a terminal.
func warnings(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{
		Level: slog.LevelWarn,
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		},
	}))
}

func checkSelection(filesystems []string) error {
	for _, name := range filesystems {
		if len(name) > 0 && name[0] == '-' {
			return usagef("%q: flags stand before the FILESYSTEMs", name)
		}
		if err := checkPath(name); err != nil {
			return usagef("FILESYSTEM %q: %v", name, err)
		}
	}
	return nil
}

// replication brings what the source has to the sink. Either may be a store here or a peer.
type replication struct {
	source, sink rpc.Handler
	lineage      lineage // of both
	parse        func(token string) (ResumePoint, error)
	jobs         int
	retry        retries // what each filesystem starts with
	reconnect    func()  // ends the client's own waiting before it connects again
	report       *reporter
}

// run replicates the filesystems of those names, or all.
func (r *replication) run(ctx context.Context, selected []string) error {
	found, err := r.list(ctx, selected)
	if err != nil {
		return err
	}
	r.eachAfterParent(found.names, func(i int) {
		if ctx.Err() != nil {
			return
		}
		err := r.filesystem(ctx, found.names[i], found.tokens)
		if err != nil && ctx.Err() == nil { // that it was interrupted is said in the summary
			r.report.failed(found.names[i], err)
		}
	})
	return r.report.summary(len(found.names), ctx.Err() != nil)
}

// listing is what both sides have.
type listing struct {
	names  []string          // of the source's filesystems that are to be replicated
	tokens map[string]string // of the sink's filesystems: what broke off, "" if nothing did
}

// list lists both sides; a connection that cannot be made is tried again.
func (r *replication) list(ctx context.Context, selected []string) (listing, error) {
	for again := r.retry; ; {
		found, err := r.listOnce(ctx)
		if err == nil {
			return r.choose(found, selected), nil
		}
		if err := r.pause(ctx, &again, "", err); err != nil {
			return listing{}, err
		}
	}
}

func (r *replication) listOnce(ctx context.Context) (listing, error) {
	source, err := r.source.ListFilesystems(ctx, new(rpc.ListFilesystemReq))
	if err != nil {
		return listing{}, fmt.Errorf("list the source: %w", err)
	}
	tokens, err := r.sinkTokens(ctx)
	if err != nil {
		return listing{}, err
	}
	found := listing{tokens: tokens}
	for _, f := range source.Filesystems {
		if !f.IsPlaceholder && !slices.Contains(found.names, f.Path) {
			found.names = append(found.names, f.Path)
		}
	}
	return found, nil
}

func (r *replication) sinkTokens(ctx context.Context) (map[string]string, error) {
	sink, err := r.sink.ListFilesystems(ctx, new(rpc.ListFilesystemReq))
	if err != nil {
		return nil, fmt.Errorf("list the sink: %w", err)
	}
	tokens := make(map[string]string, len(sink.Filesystems))
	for _, f := range sink.Filesystems {
		tokens[f.Path] = f.ResumeToken
	}
	return tokens, nil
}

// choose leaves the selected filesystems; one that the source does not have is a failure, but not the others'.
func (r *replication) choose(found listing, selected []string) listing {
	if len(selected) == 0 {
		return found
	}
	var names []string
	for _, name := range selected {
		switch {
		case !slices.Contains(found.names, name):
			r.report.failed(name, errors.New("the source has no filesystem of that name"))
		case !slices.Contains(names, name):
			names = append(names, name)
		}
	}
	found.names = names
	return found
}

// each calls f with 0 to n-1, jobs of them at a time.
func (r *replication) each(n int, f func(i int)) {
	next := make(chan int)
	var running sync.WaitGroup
	for range min(r.jobs, n) {
		running.Go(func() { // ends when next is closed; waited for below
			for i := range next {
				f(i)
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	running.Wait()
}

// eachAfterParent calls f with 0 to len(names)-1, jobs of them at a time, and with a filesystem only when f has returned for
// those above it: a sink may not be able to put one around another later. That a parent failed is no hindrance.
func (r *replication) eachAfterParent(names []string, f func(i int)) {
	done := make(map[string]chan struct{}, len(names))
	for _, name := range names {
		done[name] = make(chan struct{})
	}
	free := make(chan struct{}, r.jobs)
	var running sync.WaitGroup
	for i, name := range names {
		running.Go(func() { // ends after its parents' and f; waited for below
			defer close(done[name])
			for _, parent := range parents(name) {
				if finished, listed := done[parent]; listed {
					<-finished
				}
			}
			free <- struct{}{}
			defer func() { <-free }()
			f(i)
		})
	}
	running.Wait()
}

// parents are the paths above the filesystem's.
func parents(name string) []string {
	if name == storeItself {
		return nil
	}
	above := []string{storeItself}
	for i, r := range name {
		if r == '/' {
			above = append(above, name[:i])
		}
	}
	return above
}

// filesystem replicates one filesystem and goes on after lost connections, from a new plan each time: what the other
// side got is known only to it.
func (r *replication) filesystem(ctx context.Context, name string, tokens map[string]string) error {
	again := r.retry
	var before plan
	for attempt := 0; ; attempt++ {
		p, err := r.plan(ctx, name, tokens)
		if err == nil {
			if attempt > 0 && p.further(before) {
				again.progressed()
			}
			before = p
			if err = r.settleCursor(ctx, p); err == nil {
				err = r.steps(ctx, p, &again)
			}
		}
		if err == nil {
			return p.conflict
		}
		if err := r.pause(ctx, &again, name, err); err != nil {
			return err
		}
		tokens = nil // they are old now
	}
}

// pause waits before the next attempt after err, or returns why there is none.
func (r *replication) pause(ctx context.Context, again *retries, name string, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	wait, ok := again.next(err)
	if !ok {
		return err
	}
	r.report.retrying(name, err, wait)
	if err := sleep(ctx, wait); err != nil {
		return err
	}
	r.reconnect()
	return nil
}

// plan lists the versions of both sides and makes a plan of them. Without tokens it asks for them.
func (r *replication) plan(ctx context.Context, name string, tokens map[string]string) (plan, error) {
	source, err := r.source.ListFilesystemVersions(ctx, &rpc.ListFilesystemVersionsReq{Filesystem: name})
	if err != nil {
		return plan{}, fmt.Errorf("list the source's versions: %w", err)
	}
	if tokens == nil {
		if tokens, err = r.sinkTokens(ctx); err != nil {
			return plan{}, err
		}
	}
	var have sinkState
	if token, there := tokens[name]; there {
		res, err := r.sink.ListFilesystemVersions(ctx, &rpc.ListFilesystemVersionsReq{Filesystem: name})
		if err != nil {
			return plan{}, fmt.Errorf("list the sink's versions: %w", err)
		}
		have = sinkState{versions: res.Versions, token: token}
	}
	if r.lineage == independent {
		return makePlan(name, source.Versions, have, r.parse), nil
	}
	return makeChain(name, source.Versions, have, r.lineage, r.parse), nil
}

func (r *replication) steps(ctx context.Context, p plan, again *retries) error {
	for _, s := range p.steps {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := r.step(ctx, p.filesystem, s); err != nil {
			return fmt.Errorf("version %q: %w", s.to.Name, err)
		}
		again.progressed()
	}
	return nil
}

func (s step) request(filesystem string) *rpc.SendReq {
	return &rpc.SendReq{Filesystem: filesystem, From: s.from, To: &s.to, ResumeToken: s.token}
}

// step copies one version: the source's stream is what the sink reads.
func (r *replication) step(ctx context.Context, filesystem string, s step) error {
	req := s.request(filesystem)
	res, stream, err := r.source.Send(ctx, req)
	if err != nil {
		return err
	}
	defer stream.Close() // again, if the sink has done so: that is harmless
	if !res.UsedResumeToken {
		s.offset = 0
	}
	t := r.report.start(filesystem, s, res.ExpectedSize)
	unused := s.token != "" && !res.UsedResumeToken // the source cannot go on: the sink would wait for the rest
	_, err = r.sink.Receive(ctx, &rpc.ReceiveReq{Filesystem: filesystem, To: &s.to, ClearResumeToken: s.clear || unused},
		&countedStream{stream, t})
	r.report.finish(t, err)
	if err != nil {
		return err
	}
	return r.completed(ctx, req)
}

// settleCursor moves the source's cursor to what both sides have, if it is somewhere else: the last version has arrived, but this
// side did not come to say so before its connection was lost, or it was ended. Otherwise, once the source has destroyed that
// version, nothing could be sent any more.
func (r *replication) settleCursor(ctx context.Context, p plan) error {
	if r.lineage != linear || p.both == nil || p.both.Type != rpc.VersionSnapshot {
		return nil
	}
	at, err := r.source.ReplicationCursor(ctx, &rpc.ReplicationCursorReq{Filesystem: p.filesystem})
	if rpc.CodeOf(err) == rpc.Unimplemented || err == nil && !at.NotExist && at.GUID == p.both.GUID {
		return nil
	}
	if err != nil {
		return fmt.Errorf("ask for the replication cursor: %w", err)
	}
	return r.completed(ctx, &rpc.SendReq{Filesystem: p.filesystem, To: p.both})
}

// completed tells the source that the sink has it.
func (r *replication) completed(ctx context.Context, req *rpc.SendReq) error {
	_, err := r.source.SendCompleted(ctx, &rpc.SendCompletedReq{OriginalReq: req})
	if rpc.CodeOf(err) == rpc.Unimplemented {
		return nil
	}
	return err
}

// countedStream is a stream whose progress is shown.
type countedStream struct {
	io.ReadCloser
	t *transfer
}

func (c *countedStream) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.t.done.Add(int64(n))
	return n, err
}

// show prints the plan of every filesystem, with the sizes that the source gives.
func (r *replication) show(ctx context.Context, selected []string) error {
	found, err := r.list(ctx, selected)
	if err != nil {
		return err
	}
	plans := make([]plan, len(found.names))
	r.each(len(plans), func(i int) {
		p, err := r.plan(ctx, found.names[i], found.tokens)
		if err == nil {
			err = r.estimate(ctx, p)
		}
		if err = cmp.Or(err, p.conflict); err != nil {
			r.report.failed(found.names[i], err)
		}
		plans[i] = p
	})
	for _, p := range plans {
		r.report.planned(p)
	}
	return r.report.plannedAll()
}

// estimate asks the source how much each step would send.
func (r *replication) estimate(ctx context.Context, p plan) error {
	for i, s := range p.steps {
		res, err := r.source.SendDry(ctx, s.request(p.filesystem))
		if err != nil {
			return fmt.Errorf("version %q: %w", s.to.Name, err)
		}
		p.steps[i].size = res.ExpectedSize
	}
	return nil
}
