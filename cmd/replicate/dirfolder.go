package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strings"
	"syscall"

	"example.org/rpc"
)

// Missing folders on the way to a filesystem.
type missing int

const (
	mustExist   missing = 0
	makeMissing missing = 1
)

// folder opens the folder of a filesystem: each name on the way is looked at, so that no symbolic link is followed. What
// is done in it then names files by their plain names. The caller closes it.
func (s *dirStore) folder(filesystem string, missing missing) (*os.Root, error) {
	if err := checkPath(filesystem); err != nil {
		return nil, rpc.Errorf(rpc.InvalidArgument, "%v", err)
	}
	folder, err := s.root.OpenRoot(".")
	if err != nil {
		return nil, fmt.Errorf("open the store: %w", withoutPath(err))
	}
	if filesystem == storeItself {
		return folder, nil
	}
	for name := range strings.SplitSeq(filesystem, "/") {
		next, err := openFolder(folder, name, missing)
		folder.Close()
		if err != nil {
			return nil, err
		}
		folder = next
	}
	return folder, nil
}

// openFolder opens the folder of that name, spelled so, and nothing that is only reached by that name.
func openFolder(parent *os.Root, name string, missing missing) (*os.Root, error) {
	info, err := parent.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) && missing == makeMissing {
		if err := parent.Mkdir(name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, spaceError(err)
		}
		if err := syncFolder(parent); err != nil {
			return nil, err
		}
		info, err = parent.Lstat(name)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, rpc.Errorf(rpc.NotFound, "there is no filesystem %q", name)
	case err != nil:
		return nil, fmt.Errorf("open folder %q: %w", name, withoutPath(err))
	case !info.IsDir():
		return nil, rpc.Errorf(rpc.FailedPrecondition, "%q is in the way: it is no folder", name)
	}
	if err := checkSpelling(parent, name, info); err != nil {
		return nil, err
	}
	folder, err := parent.OpenRoot(name)
	if err != nil {
		return nil, fmt.Errorf("open folder %q: %w", name, withoutPath(err))
	}
	return folder, nil
}

// checkSpelling refuses a name that reached a file whose name is spelled differently: where the file system ignores case,
// "Client" must not get into the folder of "client".
func checkSpelling(parent *os.Root, name string, info fs.FileInfo) error {
	swapped := swapCase(name)
	if other, err := parent.Lstat(swapped); swapped == name || err != nil || !os.SameFile(info, other) {
		return nil // the name has no case, or case matters here
	}
	entries, err := fs.ReadDir(parent.FS(), ".")
	if err != nil {
		return fmt.Errorf("read the folder of %q: %w", name, withoutPath(err))
	}
	for _, entry := range entries {
		if entry.Name() == name {
			return nil
		}
	}
	return rpc.Errorf(rpc.AlreadyExists, "%q is there under a name that differs only in case", name)
}

// syncFolder makes the names in the folder durable, where the system can do that.
func syncFolder(folder *os.Root) error {
	if runtime.GOOS == "windows" {
		return nil // it cannot, and does not need to: NTFS keeps a journal of names
	}
	f, err := folder.Open(".")
	if err != nil {
		return fmt.Errorf("sync folder: %w", withoutPath(err))
	}
	defer f.Close()
	if err := f.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, errors.ErrUnsupported) {
		return spaceError(err)
	}
	return nil
}

// withoutPath leaves the path out of a file system's error: where the store lies is not a peer's business.
func withoutPath(err error) error {
	if p := (*fs.PathError)(nil); errors.As(err, &p) {
		return p.Err
	}
	if l := (*os.LinkError)(nil); errors.As(err, &l) {
		return l.Err
	}
	return err
}

// spaceError is withoutPath, with the code for a full disk if it is one.
func spaceError(err error) error {
	err = withoutPath(err)
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return rpc.Errorf(rpc.ResourceExhausted, "%v", err)
	}
	return err
}
