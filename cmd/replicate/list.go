package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"text/tabwriter"
	"time"

	"example.org/rpc"
)

var listCommand = command{
	name:     "list",
	synopsis: "[-peer ADDR] [-store STORE] [flags] [FILESYSTEM...]",
	brief:    "show what a server and a store have",
	about: `Shows the filesystems and versions of the peer, of STORE, or with both: of each version where it is. Of a peer that has a
source and a sink the source is shown, unless -side says sink. Of a sink only this client's folder can be seen.
` + aboutStores,
	run: runList,
}

// listed is a version in the output.
type listed struct {
	Filesystem string    `json:"filesystem"`
	Version    string    `json:"version"`
	Creation   time.Time `json:"creation,omitzero"`
	GUID       string    `json:"guid"`
	Here       bool      `json:"here"`
	Peer       bool      `json:"peer"`
	Partial    uint64    `json:"partial,omitempty"` // bytes that arrived before it broke off
}

// listFlags are the flags of list.
type listFlags struct {
	peer        peerFlags
	store, side string
	json        bool
}

func (f *listFlags) add(flags *flag.FlagSet) {
	f.peer.add(flags)
	flags.StringVar(&f.store, "store", "", "the `STORE` on this side")
	flags.StringVar(&f.side, "side", "source", "which of the peer's stores: `source or sink`")
	flags.BoolVar(&f.json, "json", false, "as JSON, an object a line")
}

func (f *listFlags) check() error {
	switch {
	case f.peer.addr == "" && f.store == "":
		return usagef("-peer or -store is missing")
	case f.side != "source" && f.side != "sink":
		return usagef("-side %q: source or sink", f.side)
	}
	return nil
}

func runList(ctx context.Context, o output, flags *flag.FlagSet, args []string) error {
	var f listFlags
	f.add(flags)
	if err := parse(flags, args); err != nil {
		return err
	}
	if err := errors.Join(f.check(), checkSelection(flags.Args())); err != nil {
		return err
	}
	l := &lister{selected: flags.Args(), versions: make(map[[2]string]*listed)}
	if f.store != "" {
		if err := l.addStore(ctx, f.store, warnings(o.status)); err != nil {
			return err
		}
	}
	if f.peer.addr != "" {
		if err := l.addPeer(ctx, &f); err != nil {
			return err
		}
	}
	show := l.printTable
	if f.json {
		show = l.printJSON
	}
	return errors.Join(show(o.out), l.missing())
}

// lister collects what both sides have.
type lister struct {
	selected    []string // filesystems; none: all
	filesystems []string
	versions    map[[2]string]*listed // by filesystem and name and GUID
}

func (l *lister) addStore(ctx context.Context, name string, log *slog.Logger) error {
	store, err := openStore(name, log)
	if err != nil {
		return err
	}
	defer store.Close()
	return l.add(ctx, store, func(v *listed) { v.Here = true })
}

func (l *lister) addPeer(ctx context.Context, f *listFlags) error {
	client, err := f.peer.client(rpc.ClientConfig{})
	if err != nil {
		return err
	}
	defer f.peer.wait()
	defer client.Close()
	var peer rpc.Handler = client
	if f.side == "sink" {
		peer = sinkPeer{client}
	}
	return l.add(ctx, peer, func(v *listed) { v.Peer = true })
}

func (l *lister) add(ctx context.Context, from rpc.Handler, mark func(*listed)) error {
	res, err := from.ListFilesystems(ctx, new(rpc.ListFilesystemReq))
	if err != nil {
		return err
	}
	for _, f := range res.Filesystems {
		if len(l.selected) > 0 && !slices.Contains(l.selected, f.Path) {
			continue
		}
		l.filesystems = append(l.filesystems, f.Path)
		if err := l.addVersions(ctx, from, f, mark); err != nil {
			return err
		}
	}
	return nil
}

func (l *lister) addVersions(ctx context.Context, from rpc.Handler, f rpc.Filesystem, mark func(*listed)) error {
	if f.ResumeToken != "" {
		if point, err := parseToken(f.ResumeToken); err == nil {
			v := l.version(f.Path, rpc.FilesystemVersion{Name: point.Name, GUID: point.GUID})
			v.Partial = point.Offset
		}
	}
	res, err := from.ListFilesystemVersions(ctx, &rpc.ListFilesystemVersionsReq{Filesystem: f.Path})
	if err != nil {
		return fmt.Errorf("filesystem %q: %w", f.Path, err)
	}
	for _, v := range res.Versions {
		mark(l.version(f.Path, v))
	}
	return nil
}

// version is the entry of that version, new or not.
func (l *lister) version(filesystem string, v rpc.FilesystemVersion) *listed {
	guid := fmt.Sprintf("%016x", v.GUID)
	key := [2]string{filesystem, v.Name + "\x00" + guid}
	if l.versions[key] == nil {
		l.versions[key] = &listed{Filesystem: filesystem, Version: v.Name, GUID: guid}
	}
	entry := l.versions[key]
	if entry.Creation.IsZero() {
		entry.Creation = v.Creation
	}
	return entry
}

// missing is an error if something was asked for that nobody has.
func (l *lister) missing() error {
	var missing []error
	for _, name := range l.selected {
		if !slices.Contains(l.filesystems, name) {
			missing = append(missing, fmt.Errorf("there is no filesystem %q", name))
		}
	}
	return errors.Join(missing...)
}

func (l *lister) sorted() []*listed {
	var all []*listed
	for _, v := range l.versions {
		all = append(all, v)
	}
	slices.SortFunc(all, func(a, b *listed) int {
		return cmp.Or(cmp.Compare(a.Filesystem, b.Filesystem), a.Creation.Compare(b.Creation),
			cmp.Compare(a.Version, b.Version), cmp.Compare(a.GUID, b.GUID))
	})
	return all
}

func (l *lister) printJSON(w io.Writer) error {
	encoder := json.NewEncoder(w)
	for _, v := range l.sorted() {
		if err := encoder.Encode(v); err != nil {
			return err
		}
	}
	return nil
}

func (l *lister) printTable(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprint(w, "FILESYSTEM\tVERSION\tCREATED\tGUID\tWHERE\n")
	for _, v := range l.sorted() {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", shown(v.Filesystem), shown(v.Version), v.created(), v.GUID, v.where())
	}
	return w.Flush()
}

func (v *listed) created() string {
	if v.Creation.IsZero() {
		return "-"
	}
	return v.Creation.UTC().Format("2006-01-02 15:04:05")
}

func (v *listed) where() string {
	where := "-"
	switch {
	case v.Here && v.Peer:
		where = "both"
	case v.Here:
		where = "here"
	case v.Peer:
		where = "peer"
	}
	if v.Partial > 0 {
		where += ", " + size(int64(v.Partial)) + " arrived"
	}
	return where
}
