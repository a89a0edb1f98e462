package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"example.org/rpc"
)

// dirStore is a Store in a folder: a filesystem is a folder below it, a version is a file in that.
//
// All access goes through an os.Root, which no path and no symbolic link leaves, and besides that names are checked, and
// symbolic links are never followed inside.
type dirStore struct {
	rpc.UnimplementedHandler

	root   *os.Root
	prefix string // where this store is in the one that was opened, "" or "client/"
	busy   *busyPaths
	log    *slog.Logger
}

func openDirStore(path string, log *slog.Logger) (*dirStore, error) {
	root, err := os.OpenRoot(path)
	if errors.Is(err, fs.ErrNotExist) {
		// A missing folder is often a disk that is not mounted; making it would fill the wrong disk.
		return nil, fmt.Errorf("store dir:%s: there is no such folder (it is not made for you)", path)
	}
	if err != nil {
		return nil, fmt.Errorf("store dir:%s: %w", path, err)
	}
	return &dirStore{root: root, busy: new(busyPaths), log: log}, nil
}

func (s *dirStore) Close() error { return s.root.Close() }

func (s *dirStore) Lineage() lineage { return independent }

func (s *dirStore) Sub(name string) (Store, error) {
	if err := checkName(name); err != nil {
		return nil, rpc.Errorf(rpc.InvalidArgument, "%v", err)
	}
	root, err := openFolder(s.root, name, makeMissing)
	if err != nil {
		return nil, err
	}
	return &dirStore{root: root, prefix: s.prefix + name + "/", busy: s.busy, log: s.log}, nil
}

// ListFilesystems walks the folders once. Those without a version are placeholders.
func (s *dirStore) ListFilesystems(ctx context.Context, _ *rpc.ListFilesystemReq) (*rpc.ListFilesystemRes, error) {
	found := make(map[string]*rpc.Filesystem)
	err := fs.WalkDir(s.root.FS(), ".", func(p string, entry fs.DirEntry, err error) error {
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil && p == storeItself:
			return err
		case err != nil: // it is listed, so that the attempt to replicate it fails and is seen to fail
			found[p] = &rpc.Filesystem{Path: p}
			return fs.SkipDir
		}
		return s.visit(found, p, entry)
	})
	if err != nil {
		return nil, fmt.Errorf("list the store: %w", withoutPath(err))
	}
	return foundRes(found), nil
}

// visit adds what one entry of a folder tells. WalkDir comes to a folder before it comes to what is in it.
func (s *dirStore) visit(found map[string]*rpc.Filesystem, p string, entry fs.DirEntry) error {
	hidden := p != storeItself && entry.Name()[0] == '.'
	switch {
	case entry.IsDir() && hidden:
		return fs.SkipDir
	case entry.IsDir():
		if err := checkPath(p); err != nil {
			s.log.Warn("left out", "folder", s.prefix+p, "reason", err)
			return fs.SkipDir
		}
		found[p] = &rpc.Filesystem{Path: p, IsPlaceholder: true}
	case !entry.Type().IsRegular():
	case hidden:
		s.visitHidden(found[path.Dir(p)], entry.Name())
	default: // ListFilesystemVersions warns if it cannot be a version
		found[path.Dir(p)].IsPlaceholder = false
	}
	return nil
}

// visitHidden takes note of a partial file. Of several, which only several clients at once can leave, one is enough: the
// next is found when that is complete.
func (s *dirStore) visitHidden(parent *rpc.Filesystem, name string) {
	version, guid, ok := parsePartialName(name)
	if !ok || parent.ResumeToken != "" {
		return
	}
	folder, err := s.folder(parent.Path, mustExist)
	if err != nil {
		return
	}
	defer folder.Close()
	if offset := syncedBytes(folder, version, guid); offset > 0 {
		parent.ResumeToken = resumeToken(ResumePoint{Name: version, GUID: guid, Offset: uint64(offset)})
	}
}

func (s *dirStore) ListFilesystemVersions(ctx context.Context, req *rpc.ListFilesystemVersionsReq) (*rpc.ListFilesystemVersionsRes, error) {
	folder, err := s.folder(req.Filesystem, mustExist)
	if err != nil {
		return nil, err
	}
	defer folder.Close()
	entries, err := fs.ReadDir(folder.FS(), ".")
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", req.Filesystem, withoutPath(err))
	}
	res := new(rpc.ListFilesystemVersionsRes)
	for _, entry := range entries {
		if !entry.Type().IsRegular() || entry.Name()[0] == '.' {
			continue
		}
		if version, ok := s.version(folder, req.Filesystem, entry.Name()); ok {
			res.Versions = append(res.Versions, version)
		}
	}
	slices.SortFunc(res.Versions, byAge)
	return res, ctx.Err()
}

// version is what the file is as a version, if it can be one. That it cannot is worth a warning: the user means to have
// it replicated.
func (s *dirStore) version(folder *os.Root, filesystem, name string) (rpc.FilesystemVersion, bool) {
	info, err := folder.Lstat(name) // not DirEntry.Info: in a Root's Root, Go 1.25 looks for the file in the wrong place
	if errors.Is(err, fs.ErrNotExist) || err == nil && !info.Mode().IsRegular() {
		return rpc.FilesystemVersion{}, false // it has just been removed or replaced
	}
	if err == nil {
		err = checkName(name)
	}
	if err == nil {
		err = checkTime(info.ModTime())
	}
	if err != nil {
		s.log.Warn("left out", "filesystem", s.prefix+filesystem, "file", name, "reason", err)
		return rpc.FilesystemVersion{}, false
	}
	return versionOf(name, info), true
}

func versionOf(name string, info fs.FileInfo) rpc.FilesystemVersion {
	t := info.ModTime().UTC()
	return rpc.FilesystemVersion{
		Type:      rpc.VersionSnapshot,
		Name:      name,
		GUID:      versionGUID(name, info.Size(), t),
		CreateTXG: uint64(max(t.UnixMicro(), 0)),
		Creation:  t,
	}
}

// versionGUID identifies a version. Time counts in microseconds: more than that is lost by too many file systems.
func versionGUID(name string, size int64, t time.Time) uint64 {
	b := append([]byte(name), 0)
	b = binary.BigEndian.AppendUint64(b, uint64(size))
	b = binary.BigEndian.AppendUint64(b, uint64(t.UnixMicro()))
	sum := sha256.Sum256(b)
	return max(binary.BigEndian.Uint64(sum[:]), 1) // 0 reads as none
}

// checkTime refuses times that a message cannot carry.
func checkTime(t time.Time) error {
	if y := t.UTC().Year(); y < 1 || y > 9999 || t.IsZero() {
		return fmt.Errorf("its time is in the year %d", y)
	}
	return nil
}

// byAge orders versions from the oldest to the newest.
func byAge(a, b rpc.FilesystemVersion) int {
	return cmp.Or(cmp.Compare(a.CreateTXG, b.CreateTXG), cmp.Compare(a.Name, b.Name))
}

// SendDry says what Send would send.
func (s *dirStore) SendDry(_ context.Context, req *rpc.SendReq) (*rpc.SendRes, error) {
	res, stream, err := s.open(req)
	if err != nil {
		return nil, err
	}
	return res, stream.Close()
}

// Send gives a version as a stream: a header, then the file from where the resume token says, else from its beginning.
// Every version is sent whole: From means nothing here.
func (s *dirStore) Send(_ context.Context, req *rpc.SendReq) (*rpc.SendRes, io.ReadCloser, error) {
	res, stream, err := s.open(req)
	if err != nil {
		return nil, nil, err // not stream: a nil *versionStream would be a stream
	}
	return res, stream, nil
}

// SendCompleted has nothing to do: nothing was held for the transfer.
func (s *dirStore) SendCompleted(context.Context, *rpc.SendCompletedReq) (*rpc.SendCompletedRes, error) {
	return new(rpc.SendCompletedRes), nil
}

func (s *dirStore) open(req *rpc.SendReq) (*rpc.SendRes, *versionStream, error) {
	point, err := wanted(req)
	if err != nil {
		return nil, nil, err
	}
	folder, err := s.folder(req.Filesystem, mustExist)
	if err != nil {
		return nil, nil, err
	}
	defer folder.Close()
	stream, err := openVersion(folder, point)
	if err != nil {
		return nil, nil, err
	}
	return &rpc.SendRes{UsedResumeToken: req.ResumeToken != "", ExpectedSize: stream.size()}, stream, nil
}

// wanted is the version that a request means and where in it to begin.
func wanted(req *rpc.SendReq) (ResumePoint, error) {
	var point ResumePoint
	switch {
	case req.ResumeToken != "":
		var err error
		if point, err = parseDirToken(req.ResumeToken); err != nil {
			return ResumePoint{}, rpc.Errorf(rpc.InvalidArgument, "%v", err)
		}
		if req.To != nil && (req.To.Name != point.Name || req.To.GUID != point.GUID) {
			return ResumePoint{}, rpc.Errorf(rpc.InvalidArgument, "the resume token is of version %q (%016x), asked for is %q (%016x)",
				point.Name, point.GUID, req.To.Name, req.To.GUID)
		}
	case req.To != nil:
		point = ResumePoint{Name: req.To.Name, GUID: req.To.GUID}
	default:
		return ResumePoint{}, rpc.Errorf(rpc.InvalidArgument, "send without a version")
	}
	if err := checkName(point.Name); err != nil {
		return ResumePoint{}, rpc.Errorf(rpc.InvalidArgument, "%v", err)
	}
	return point, nil
}

// openVersion opens the version for sending. It must still be what the peer saw in the list.
func openVersion(folder *os.Root, point ResumePoint) (*versionStream, error) {
	named, err := folder.Lstat(point.Name)
	if err != nil || !named.Mode().IsRegular() {
		return nil, rpc.Errorf(rpc.NotFound, "there is no version %q", point.Name)
	}
	file, err := folder.Open(point.Name)
	if err != nil {
		return nil, fmt.Errorf("open version %q: %w", point.Name, withoutPath(err))
	}
	stream, err := newVersionStream(file, point)
	if err != nil {
		file.Close()
		return nil, err
	}
	if !os.SameFile(named, stream.info) { // a symbolic link slipped in between
		file.Close()
		return nil, rpc.Errorf(rpc.NotFound, "there is no version %q", point.Name)
	}
	return stream, nil
}

const tokenKind = "dir1"

// resumeToken is a text that any dirStore can read: the kind, GUID, offset, and at the end the name, which may hold colons.
func resumeToken(p ResumePoint) string {
	return fmt.Sprintf("%s:%016x:%d:%s", tokenKind, p.GUID, p.Offset, p.Name)
}

func (s *dirStore) ParseResumeToken(token string) (ResumePoint, error) { return parseDirToken(token) }

func parseDirToken(token string) (ResumePoint, error) {
	fields := strings.SplitN(token, ":", 4)
	if len(fields) != 4 || fields[0] != tokenKind {
		return ResumePoint{}, fmt.Errorf("resume token %.100q is not one of a dir: store", token)
	}
	guid, guidErr := strconv.ParseUint(fields[1], 16, 64)
	offset, offsetErr := strconv.ParseInt(fields[2], 10, 64)
	if err := cmp.Or(guidErr, offsetErr, checkName(fields[3])); err != nil || offset < 0 {
		return ResumePoint{}, fmt.Errorf("resume token %.100q is malformed", token)
	}
	return ResumePoint{Name: fields[3], GUID: guid, Offset: uint64(offset)}, nil
}

// busyPaths are the filesystems that are being received by this process; see lockFolder for others.
type busyPaths struct {
	mu    sync.Mutex
	paths map[string]bool
}

// acquire reserves the path of a filesystem, unless it is taken.
func (b *busyPaths) acquire(path, filesystem string) (release func(), err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.paths[path] {
		return nil, rpc.Errorf(rpc.Aborted, "filesystem %q is being received by another transfer", filesystem)
	}
	if b.paths == nil {
		b.paths = make(map[string]bool)
	}
	b.paths[path] = true
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.paths, path)
	}, nil
}
