package main

import (
	"cmp"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"example.org/rpc"
)

// btrfsStore is a Store in a folder on btrfs: a filesystem is a subvolume, its versions are the read-only snapshots in the
// folder of its name in the folder .snapshots beside it. A sink has only the snapshots, not the subvolume.
//
// The names of folders are looked at as in a dirStore, so that no symbolic link is followed: what clients send lies below,
// and may be anything.
type btrfsStore struct {
	rpc.UnimplementedHandler

	btrfs  string // the program
	path   string // absolute
	root   *os.Root
	prefix string // where this store is in the one that was opened, "" or "client/"
	busy   *busyPaths
	log    *slog.Logger
}

const btrfsSnapshots = ".snapshots"

func openBtrfsStore(path string, log *slog.Logger) (*btrfsStore, error) {
	program, err := findProgram("btrfs")
	if err != nil {
		return nil, fmt.Errorf("store btrfs:%s: %w", path, err)
	}
	absolute, err := filepath.Abs(path)
	if err == nil {
		absolute, err = filepath.EvalSymlinks(absolute)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("store btrfs:%s: there is no such folder (it is not made for you)", path)
	}
	if err != nil {
		return nil, fmt.Errorf("store btrfs:%s: %w", path, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), toolTimeout)
	defer cancel()
	if _, err := runTool(ctx, program, "inspect-internal", "rootid", absolute); err != nil {
		return nil, fmt.Errorf("store btrfs:%s: %w", path, err)
	}
	root, err := os.OpenRoot(absolute)
	if err != nil {
		return nil, fmt.Errorf("store btrfs:%s: %w", path, err)
	}
	return &btrfsStore{btrfs: program, path: absolute, root: root, busy: new(busyPaths), log: log}, nil
}

func (s *btrfsStore) Close() error { return s.root.Close() }

func (s *btrfsStore) Lineage() lineage { return chained }

func (s *btrfsStore) Sub(name string) (Store, error) {
	if err := checkArgument(name); err != nil {
		return nil, rpc.Errorf(rpc.InvalidArgument, "%v", err)
	}
	root, err := openFolder(s.root, name, makeMissing)
	if err != nil {
		return nil, err
	}
	return &btrfsStore{btrfs: s.btrfs, path: filepath.Join(s.path, name), root: root, prefix: s.prefix + name + "/", busy: s.busy, log: s.log}, nil
}

func (s *btrfsStore) ParseResumeToken(token string) (ResumePoint, error) {
	return ResumePoint{}, fmt.Errorf("resume token %.100q: btrfs has none", token)
}

// checkBtrfsPath tells what is wrong with a filesystem's path. The store itself is none: its snapshots would be outside.
func checkBtrfsPath(path string) error {
	if path == storeItself {
		return errors.New("the folder of a btrfs: store is not a filesystem of it")
	}
	return checkPathOf(path, checkArgument) // arguments have absolute paths, but names are also in messages and streams
}

// versionsPath is the folder of a filesystem's versions, below the store's.
func versionsPath(filesystem string) string {
	return path.Join(path.Dir(filesystem), btrfsSnapshots, path.Base(filesystem))
}

// argument is the path of a version, or with "" of the folder of all versions, for btrfs.
func (s *btrfsStore) argument(filesystem, version string) string {
	return filepath.Join(s.path, filepath.FromSlash(versionsPath(filesystem)), version)
}

// folder opens the folder of a filesystem's versions. Every folder on the way to a missing one gets a folder for snapshots:
// the list looks only into such. The caller closes it.
func (s *btrfsStore) folder(filesystem string, missing missing) (*os.Root, error) {
	if err := checkBtrfsPath(filesystem); err != nil {
		return nil, rpc.Errorf(rpc.InvalidArgument, "%v", err)
	}
	folder, err := s.root.OpenRoot(".")
	if err != nil {
		return nil, fmt.Errorf("open the store: %w", withoutPath(err))
	}
	names := strings.Split(filesystem, "/")
	for i, name := range names {
		snapshots, err := openFolder(folder, btrfsSnapshots, missing)
		switch {
		case err == nil && i == len(names)-1:
			folder.Close()
			folder = snapshots
		case err == nil:
			snapshots.Close()
		case missing == makeMissing || i == len(names)-1 || rpc.CodeOf(err) != rpc.NotFound:
			folder.Close()
			return nil, err
		}
		next, err := openFolder(folder, name, missing)
		folder.Close()
		if err != nil {
			return nil, err
		}
		folder = next
	}
	return folder, nil
}

// ListFilesystems looks into the store's folder and, below it, into subvolumes and folders that have snapshots.
func (s *btrfsStore) ListFilesystems(ctx context.Context, _ *rpc.ListFilesystemReq) (*rpc.ListFilesystemRes, error) {
	res := new(rpc.ListFilesystemRes)
	if err := s.walk(ctx, s.root, "", res); err != nil {
		return nil, fmt.Errorf("list the store: %w", withoutPath(err))
	}
	slices.SortFunc(res.Filesystems, func(a, b rpc.Filesystem) int { return cmp.Compare(a.Path, b.Path) })
	return res, nil
}

func (s *btrfsStore) walk(ctx context.Context, folder *os.Root, prefix string, res *rpc.ListFilesystemRes) error {
	names, err := folders(folder, btrfsSnapshots)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, name := range names {
		if err := checkBtrfsPath(prefix + name); err != nil {
			s.log.Warn("left out", "folder", s.prefix+prefix+name, "reason", err)
			continue
		}
		res.Filesystems = append(res.Filesystems, rpc.Filesystem{Path: prefix + name})
	}
	if names, err = folders(folder, "."); err != nil {
		return err
	}
	for _, name := range names {
		if checkArgument(name) != nil || !leadsOn(folder, name) {
			continue
		}
		next, err := openFolder(folder, name, mustExist)
		if err == nil {
			err = s.walk(ctx, next, prefix+name+"/", res)
			next.Close()
		}
		if err = cmp.Or(ctx.Err(), err); err != nil {
			return err
		}
	}
	return nil
}

// leadsOn tells whether there may be filesystems below a folder: only subvolumes and those that have snapshots are looked
// into, because a folder of files may be as large as it likes.
func leadsOn(folder *os.Root, name string) bool {
	if info, err := folder.Lstat(name); err == nil && isSubvolume(info) {
		return true
	}
	info, err := folder.Lstat(path.Join(name, btrfsSnapshots))
	return err == nil && info.IsDir()
}

// folders are the names of the folders that are not hidden.
func folders(root *os.Root, name string) ([]string, error) {
	if info, err := root.Lstat(name); err != nil || !info.IsDir() {
		return nil, cmp.Or(err, error(fs.ErrNotExist))
	}
	entries, err := fs.ReadDir(root.FS(), name)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, entry := range entries {
		if entry.IsDir() && entry.Name()[0] != '.' {
			names = append(names, entry.Name())
		}
	}
	return names, nil
}

func (s *btrfsStore) ListFilesystemVersions(ctx context.Context, req *rpc.ListFilesystemVersionsReq) (*rpc.ListFilesystemVersionsRes, error) {
	folder, err := s.folder(req.Filesystem, mustExist)
	if err != nil {
		return nil, err
	}
	defer folder.Close()
	names, err := folders(folder, ".")
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", req.Filesystem, withoutPath(err))
	}
	res := new(rpc.ListFilesystemVersionsRes)
	for _, name := range names {
		if isArriving(folder, name) {
			continue
		}
		v, err := s.version(ctx, req.Filesystem, name)
		if err == nil {
			err = checkArgument(name)
		}
		if err != nil {
			s.log.Warn("left out", "filesystem", s.prefix+req.Filesystem, "folder", name, "reason", err)
			continue
		}
		res.Versions = append(res.Versions, v)
	}
	slices.SortFunc(res.Versions, byAge)
	return res, ctx.Err()
}

// version is the version that the snapshot is, if it is one.
func (s *btrfsStore) version(ctx context.Context, filesystem, name string) (rpc.FilesystemVersion, error) {
	out, err := runTool(ctx, s.btrfs, "subvolume", "show", s.argument(filesystem, name))
	if err != nil {
		return rpc.FilesystemVersion{}, err
	}
	v, err := parseBtrfsShow(out)
	v.Name = name
	return v, err
}

// parseBtrfsShow reads what "btrfs subvolume show" says of a read-only snapshot. A subvolume that can be written to is none,
// and so is one that is being received.
func parseBtrfsShow(out string) (rpc.FilesystemVersion, error) {
	values := make(map[string]string)
	for line := range strings.Lines(out) {
		if name, value, ok := strings.Cut(line, ":"); ok {
			values[strings.TrimSpace(name)] = strings.TrimSpace(value)
		}
	}
	if !strings.Contains(values["Flags"], "readonly") {
		return rpc.FilesystemVersion{}, errors.New("it is not a read-only snapshot")
	}
	uuid := values["UUID"]
	if received := values["Received UUID"]; received != "-" && received != "" {
		uuid = received
	}
	guid, err := parseUUID(uuid)
	if err != nil {
		return rpc.FilesystemVersion{}, err
	}
	generation, err := strconv.ParseUint(values["Gen at creation"], 10, 64)
	if err != nil {
		return rpc.FilesystemVersion{}, fmt.Errorf("generation: %w", err)
	}
	creation, err := time.Parse("2006-01-02 15:04:05 -0700", values["Creation time"])
	if err != nil {
		return rpc.FilesystemVersion{}, fmt.Errorf("creation time: %w", err)
	}
	return rpc.FilesystemVersion{Type: rpc.VersionSnapshot, GUID: guid, CreateTXG: generation, Creation: creation.UTC()}, nil
}

func parseUUID(text string) (uint64, error) {
	b, err := hex.DecodeString(strings.ReplaceAll(text, "-", ""))
	if err != nil || len(b) != 16 {
		return 0, fmt.Errorf("%q is not a UUID", text)
	}
	return uuidGUID(b), nil
}

// uuidGUID folds a UUID into the 64 bits of a GUID.
func uuidGUID(uuid []byte) uint64 {
	return max(binary.BigEndian.Uint64(uuid)^binary.BigEndian.Uint64(uuid[8:]), 1) // 0 reads as none
}

// find is the version that the peer saw in the list, as an argument of btrfs.
func (s *btrfsStore) find(ctx context.Context, filesystem string, want rpc.FilesystemVersion) (string, error) {
	if err := checkArgument(want.Name); err != nil {
		return "", rpc.Errorf(rpc.InvalidArgument, "%v", err)
	}
	folder, err := s.folder(filesystem, mustExist)
	if err != nil {
		return "", err
	}
	defer folder.Close()
	if info, err := folder.Lstat(want.Name); err != nil || !info.IsDir() || isArriving(folder, want.Name) {
		return "", rpc.Errorf(rpc.NotFound, "there is no version %q", want.Name)
	}
	v, err := s.version(ctx, filesystem, want.Name)
	if err != nil {
		return "", fmt.Errorf("version %q: %w", want.Name, err)
	}
	if v.GUID != want.GUID {
		return "", rpc.Errorf(rpc.NotFound, "version %q is %016x now, asked for is %016x", want.Name, v.GUID, want.GUID)
	}
	return s.argument(filesystem, want.Name), nil
}

// DestroySnapshots destroys snapshots that still are what the caller thinks.
func (s *btrfsStore) DestroySnapshots(ctx context.Context, req *rpc.DestroySnapshotsReq) (*rpc.DestroySnapshotsRes, error) {
	return destroyEach(ctx, req, func(v rpc.FilesystemVersion) error {
		name, err := s.find(ctx, req.Filesystem, v)
		if err == nil {
			_, err = runTool(ctx, s.btrfs, "subvolume", "delete", name)
		}
		return err
	})
}
