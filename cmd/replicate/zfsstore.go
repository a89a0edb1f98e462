package main

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"time"

	"example.org/rpc"
)

// zfsStore is a Store below a dataset: filesystems and volumes are its filesystems, snapshots and bookmarks their versions.
type zfsStore struct {
	rpc.UnimplementedHandler

	zfs    *zfsTool
	root   string // the dataset
	shared *zfsShared
	log    *slog.Logger
}

// zfsShared is what a store has in common with the parts of it that Sub gives.
type zfsShared struct {
	busy  busyPaths // datasets that are being received
	holds zfsHolds
}

// placeholderProperty marks a dataset that is there only for those below it, made by Receive. Only a local value counts:
// those below inherit it.
const placeholderProperty = "replicate:placeholder"

func openZFSStore(root string, log *slog.Logger) (*zfsStore, error) {
	for name := range strings.SplitSeq(root, "/") {
		if err := checkZFSName(name); err != nil {
			return nil, usagef("store zfs:%s: %v; it is POOL or POOL/DATASET", root, err)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), toolTimeout)
	defer cancel()
	zfs, err := findZFS(ctx, log)
	if err != nil {
		return nil, fmt.Errorf("store zfs:%s: %w", root, err)
	}
	s := &zfsStore{zfs: zfs, root: root, shared: new(zfsShared), log: log}
	if _, err := s.zfs.run(ctx, "list", "-H", "-o", "name", root); err != nil {
		return nil, fmt.Errorf("store zfs:%s (it is not made for you): %w", root, err)
	}
	return s, nil
}

func (s *zfsStore) Close() error { return nil }

func (s *zfsStore) Lineage() lineage { return linear }

// Sub is the dataset of that name. It is not mounted, and what is received below it is not either: what clients send is not
// to appear in this host's tree of files.
func (s *zfsStore) Sub(name string) (Store, error) {
	if err := checkZFSName(name); err != nil {
		return nil, rpc.Errorf(rpc.InvalidArgument, "%v", err)
	}
	sub := &zfsStore{zfs: s.zfs, root: s.root + "/" + name, shared: s.shared, log: s.log}
	ctx, cancel := context.WithTimeout(context.Background(), toolTimeout)
	defer cancel()
	if err := s.zfs.makePlaceholder(ctx, sub.root, "-o", "mountpoint=none"); err != nil {
		return nil, err
	}
	return sub, nil
}

// makePlaceholder makes a dataset unless it is there.
func (t *zfsTool) makePlaceholder(ctx context.Context, dataset string, options ...string) error {
	there, err := t.exists(ctx, dataset)
	if there || err != nil {
		return err
	}
	args := append([]string{"create", "-o", "canmount=off", "-o", placeholderProperty + "=on"}, options...)
	_, failure := t.run(ctx, append(args, dataset)...)
	if there, err := t.exists(ctx, dataset); there && err == nil {
		return nil // made by this one or, a moment ago, by another
	}
	return failure
}

func (t *zfsTool) exists(ctx context.Context, dataset string) (bool, error) {
	_, err := t.run(ctx, "list", "-H", "-o", "name", dataset)
	if rpc.CodeOf(err) == rpc.NotFound {
		return false, nil
	}
	return err == nil, err
}

// dataset is the dataset of a filesystem.
func (s *zfsStore) dataset(filesystem string) (string, error) {
	if err := checkZFSPath(filesystem); err != nil {
		return "", rpc.Errorf(rpc.InvalidArgument, "%v", err)
	}
	if filesystem == storeItself {
		return s.root, nil
	}
	dataset := s.root + "/" + filesystem
	if len(dataset) > maxZFSName {
		return "", rpc.Errorf(rpc.InvalidArgument, "filesystem %q: its dataset's name has %d bytes, at most %d are allowed", filesystem, len(dataset), maxZFSName)
	}
	return dataset, nil
}

func (s *zfsStore) ListFilesystems(ctx context.Context, _ *rpc.ListFilesystemReq) (*rpc.ListFilesystemRes, error) {
	properties := "type," + placeholderProperty
	args := []string{"get", "-H", "-p", "-r", "-o", "name,property,value,source"}
	if s.zfs.resume {
		properties += ",receive_resume_token"
	}
	if s.zfs.typed {
		args = append(args, "-t", "filesystem,volume")
	}
	rows, err := s.zfs.table(ctx, 4, append(args, properties, s.root)...)
	if err != nil {
		return nil, fmt.Errorf("list the store: %w", err)
	}
	found := make(map[string]*rpc.Filesystem)
	for _, row := range rows {
		s.addFilesystem(found, row[0], row[1], row[2], row[3])
	}
	return foundRes(found), nil
}

// addFilesystem takes note of one property of one dataset.
func (s *zfsStore) addFilesystem(found map[string]*rpc.Filesystem, dataset, property, value, source string) {
	path, ok := s.path(dataset)
	if !ok {
		return
	}
	if property == "type" { // each has one, and it is asked for first
		if err := checkZFSPath(path); err != nil {
			s.log.Warn("left out", "dataset", dataset, "reason", err)
			return
		}
		found[path] = &rpc.Filesystem{Path: path}
	}
	f := found[path]
	switch {
	case f == nil || value == "-" || value == "":
	case property == placeholderProperty && source == "local":
		f.IsPlaceholder = value == "on"
	case property == "receive_resume_token":
		f.ResumeToken = value
	}
}

// path is the filesystem that a dataset of this store is. Snapshots are none.
func (s *zfsStore) path(dataset string) (string, bool) {
	if dataset == s.root {
		return storeItself, true
	}
	path, below := strings.CutPrefix(dataset, s.root+"/")
	return path, below && !strings.ContainsAny(path, "@#%")
}

func (s *zfsStore) ListFilesystemVersions(ctx context.Context, req *rpc.ListFilesystemVersionsReq) (*rpc.ListFilesystemVersionsRes, error) {
	dataset, err := s.dataset(req.Filesystem)
	if err != nil {
		return nil, err
	}
	versions, err := s.zfs.versions(ctx, dataset)
	if err != nil {
		return nil, fmt.Errorf("list the versions of %q: %w", req.Filesystem, err)
	}
	versions = slices.DeleteFunc(versions, func(v rpc.FilesystemVersion) bool {
		err := checkZFSName(v.Name)
		if err != nil {
			s.log.Warn("left out", "dataset", dataset, "version", v.Name, "reason", err)
		}
		return err != nil
	})
	return &rpc.ListFilesystemVersionsRes{Versions: versions}, nil
}

// versions are the snapshots and bookmarks of a dataset, the oldest first.
func (t *zfsTool) versions(ctx context.Context, dataset string) ([]rpc.FilesystemVersion, error) {
	rows, err := t.versionRows(ctx, dataset)
	if err != nil {
		return nil, err
	}
	var versions []rpc.FilesystemVersion
	for _, row := range rows {
		v, err := parseZFSVersion(strings.TrimPrefix(row[0], dataset), row[1:])
		if err != nil {
			return nil, fmt.Errorf("%s: %w", row[0], err)
		}
		versions = append(versions, v)
	}
	slices.SortFunc(versions, byAge)
	return versions, nil
}

// versionRows gives name, guid, createtxg and creation of each version. An old "zfs list" rounds numbers, "zfs get" does
// not, but gives them one a line.
func (t *zfsTool) versionRows(ctx context.Context, dataset string) ([][]string, error) {
	if t.list {
		types := "snapshot"
		if t.bookmarks {
			types += ",bookmark"
		}
		return t.table(ctx, 4, "list", "-H", "-p", "-d", "1", "-t", types, "-o", "name,guid,createtxg,creation", dataset)
	}
	properties := []string{"guid", "createtxg", "creation"}
	lines, err := t.table(ctx, 3, "get", "-H", "-p", "-r", "-d", "1", "-o", "name,property,value", strings.Join(properties, ","), dataset)
	if err != nil {
		return nil, err
	}
	var rows [][]string
	for _, line := range lines {
		if !strings.HasPrefix(line[0], dataset+"@") {
			continue // the dataset itself, and those below it
		}
		if len(rows) == 0 || rows[len(rows)-1][0] != line[0] {
			rows = append(rows, []string{line[0], "", "", ""})
		}
		if i := slices.Index(properties, line[1]); i >= 0 {
			rows[len(rows)-1][1+i] = line[2]
		}
	}
	return rows, nil
}

// parseZFSVersion reads @NAME or #NAME, and the values.
func parseZFSVersion(name string, values []string) (rpc.FilesystemVersion, error) {
	var numbers [3]uint64
	for i, value := range values {
		n, err := strconv.ParseUint(value, 10, 64)
		if err != nil {
			return rpc.FilesystemVersion{}, err
		}
		numbers[i] = n
	}
	v := rpc.FilesystemVersion{GUID: numbers[0], CreateTXG: numbers[1], Creation: time.Unix(int64(numbers[2]), 0).UTC()}
	switch {
	case strings.HasPrefix(name, "@"):
		v.Type = rpc.VersionSnapshot
	case strings.HasPrefix(name, "#"):
		v.Type = rpc.VersionBookmark
	default:
		return rpc.FilesystemVersion{}, fmt.Errorf("%q is neither a snapshot nor a bookmark", name)
	}
	v.Name = name[1:]
	return v, checkTime(v.Creation)
}

// find is the version of that name, type and GUID, as an argument of zfs.
func (t *zfsTool) find(ctx context.Context, dataset string, want rpc.FilesystemVersion) (string, error) {
	if err := checkZFSName(want.Name); err != nil {
		return "", rpc.Errorf(rpc.InvalidArgument, "%v", err)
	}
	mark := "@"
	if want.Type == rpc.VersionBookmark {
		mark = "#"
	}
	name := dataset + mark + want.Name
	if len(name) > maxZFSName {
		return "", rpc.Errorf(rpc.InvalidArgument, "version %q: with its dataset's, its name has %d bytes, at most %d are allowed", want.Name, len(name), maxZFSName)
	}
	rows, err := t.table(ctx, 1, "get", "-H", "-p", "-o", "value", "guid", name)
	if err != nil {
		return "", err
	}
	if len(rows) != 1 || rows[0][0] != strconv.FormatUint(want.GUID, 10) {
		return "", rpc.Errorf(rpc.NotFound, "version %q is %v now, asked for is %d", want.Name, rows, want.GUID)
	}
	return name, nil
}

// DestroySnapshots destroys snapshots that still are what the caller thinks.
func (s *zfsStore) DestroySnapshots(ctx context.Context, req *rpc.DestroySnapshotsReq) (*rpc.DestroySnapshotsRes, error) {
	dataset, err := s.dataset(req.Filesystem)
	if err != nil {
		return nil, err
	}
	return destroyEach(ctx, req, func(v rpc.FilesystemVersion) error {
		name, err := s.zfs.find(ctx, dataset, v)
		if err == nil {
			_, err = s.zfs.run(ctx, "destroy", name)
		}
		return err
	})
}

func (s *zfsStore) ParseResumeToken(token string) (ResumePoint, error) {
	t, err := parseZFSToken(token)
	return t.point(), err
}
