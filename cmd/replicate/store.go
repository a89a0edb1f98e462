package main

import (
	"cmp"
	"context"
	"log/slog"
	"slices"
	"strings"

	"example.org/rpc"
)

// Store holds filesystems and their versions. The methods of rpc.Handler are what a peer may ask for, and what this side
// asks for when the store is its own. A Store is safe for concurrent use.
//
// Of a Handler's contract it makes precise: ListFilesystems gives the ResumeToken of what a filesystem received only in
// part, and Send takes it to send the rest. The stream is the store's own format: what Send gives, Receive of a store of
// the same kind takes. A stream that ends early, for whatever reason, never becomes a version. Receive with
// ClearResumeToken first drops what had arrived. Paths and names are checked by the store.
type Store interface {
	rpc.Handler

	// Sub is the part of the store below the folder of that name, made if need be: nothing above it can be reached
	// through it. The caller closes it.
	Sub(name string) (Store, error)
	// Lineage says how the versions of one filesystem depend on each other.
	Lineage() lineage
	// ParseResumeToken says what a token goes on with. Any store of a kind can read the tokens of all of that kind.
	ParseResumeToken(token string) (ResumePoint, error)
	// Close frees what the store holds open. Streams and transfers that run are not ended by it.
	Close() error
}

// ResumePoint is what a resume token means.
type ResumePoint struct {
	Name   string // of the version
	GUID   uint64 // of the version
	From   uint64 // GUID of the version that the increment is from; 0: the version is sent whole
	Offset uint64 // bytes that need not be sent again
}

// lineage is how the versions of one filesystem depend on each other.
type lineage int

const (
	independent lineage = 0 // each is sent whole
	chained     lineage = 1 // an increment from any version that both sides have
	linear      lineage = 2 // an increment only from the newest version that the sink has
)

const aboutStores = `
A STORE is one of these; replication is between two of a kind.

dir:PATH is a folder that must exist. Every folder below it that has files in it is a filesystem, named by
its path (the store's own folder is "."), and every file a version of it, which must never change again. Write files
under a name that begins with a dot and rename them when they are complete: such names, symbolic links and anything
that is not a regular file are left out. Two versions are the same if name, size and modification time are.

zfs:POOL/DATASET is a dataset that must exist: the filesystems and volumes below it (itself is "."), their snapshots and
bookmarks. The first snapshot is sent whole, then increments; the last one that was sent leaves a bookmark, and snapshots
are held while they are sent. Encrypted ones are sent raw. What is received is read-only and not mounted.

btrfs:PATH is a folder that must exist, on btrfs. A filesystem is a subvolume PATH/FILESYSTEM, its versions are the
read-only snapshots of it in the folder .snapshots beside it: PATH/home has them in PATH/.snapshots/home/, PATH/a/b in
PATH/a/.snapshots/b/. Snapshots with devices in them are
taken only if PATH is mounted with nodev: whoever sends one could write to it. Plain folders that have no .snapshots are not looked into. What breaks off begins anew.
`

// openStore opens what the user calls a STORE.
func openStore(name string, log *slog.Logger) (Store, error) {
	kind, path, found := strings.Cut(name, ":")
	switch {
	case name == "":
		return nil, usagef("no STORE is given, such as dir:/var/backups")
	case !found:
		return nil, usagef("store %q: it is dir:PATH, zfs:POOL/DATASET or btrfs:PATH", name)
	case path == "":
		return nil, usagef("store %q has no path", name)
	}
	switch kind {
	case "dir":
		return opened(openDirStore(path, log))
	case "zfs":
		return opened(openZFSStore(path, log))
	case "btrfs":
		return opened(openBtrfsStore(path, log))
	}
	return nil, usagef("store %q: only dir:PATH, zfs:POOL/DATASET and btrfs:PATH are known", name)
}

// opened makes a Store of a store of some kind: a nil pointer would be a Store.
func opened[S Store](store S, err error) (Store, error) {
	if err != nil {
		return nil, err
	}
	return store, nil
}

// parseToken reads a resume token of any kind of store.
func parseToken(token string) (ResumePoint, error) {
	if point, err := parseDirToken(token); err == nil {
		return point, nil
	}
	t, err := parseZFSToken(token)
	return t.point(), err
}

// foundRes is the answer of ListFilesystems. The store itself is a filesystem only if there is something in it.
func foundRes(found map[string]*rpc.Filesystem) *rpc.ListFilesystemRes {
	if own := found[storeItself]; own != nil && own.IsPlaceholder && own.ResumeToken == "" {
		delete(found, storeItself)
	}
	res := new(rpc.ListFilesystemRes)
	for _, f := range found {
		res.Filesystems = append(res.Filesystems, *f)
	}
	slices.SortFunc(res.Filesystems, func(a, b rpc.Filesystem) int { return cmp.Compare(a.Path, b.Path) })
	return res
}

// destroyEach is DestroySnapshots with destroy for one: it says of each why it was not destroyed. The passive side does not let
// clients do that.
func destroyEach(ctx context.Context, req *rpc.DestroySnapshotsReq, destroy func(rpc.FilesystemVersion) error) (*rpc.DestroySnapshotsRes, error) {
	res := new(rpc.DestroySnapshotsRes)
	for _, v := range req.Snapshots {
		result := rpc.DestroySnapshotRes{Snapshot: &v}
		if err := destroy(v); err != nil {
			result.Error = err.Error()
		}
		res.Results = append(res.Results, result)
	}
	return res, ctx.Err()
}
