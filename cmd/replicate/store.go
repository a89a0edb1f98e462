package main

import (
	"log/slog"
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
	// ParseResumeToken says what a token goes on with. Any store of a kind can read the tokens of all of that kind.
	ParseResumeToken(token string) (ResumePoint, error)
	// Close frees what the store holds open. Streams and transfers that run are not ended by it.
	Close() error
}

// ResumePoint is what a resume token means.
type ResumePoint struct {
	Name   string // of the version
	GUID   uint64 // of the version
	Offset uint64 // bytes that need not be sent again
}

const aboutStores = `
A STORE is dir:PATH, a folder that must exist. Every folder below it that has files in it is a filesystem, named by
its path (the store's own folder is "."), and every file a version of it, which must never change again. Write files
under a name that begins with a dot and rename them when they are complete: such names, symbolic links and anything
that is not a regular file are left out. Two versions are the same if name, size and modification time are.
`

// openStore opens what the user calls a STORE.
func openStore(name string, log *slog.Logger) (Store, error) {
	kind, path, found := strings.Cut(name, ":")
	switch {
	case name == "":
		return nil, usagef("no STORE is given, such as dir:/var/backups")
	case !found || kind != "dir":
		return nil, usagef("store %q: only dir:PATH is known", name)
	case path == "":
		return nil, usagef("store %q has no path", name)
	}
	store, err := openDirStore(path, log)
	if err != nil {
		return nil, err // not store: a nil *dirStore would be a Store
	}
	return store, nil
}
