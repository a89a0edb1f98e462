package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"

	"example.org/rpc"
)

// How a version arrives: its bytes go into a hidden file that bears its name and GUID, and what is known to be on the disk
// is noted in a second one. When all of it has arrived, the file gets its time, is synced, and only then renamed. So
// whatever happens, a version is complete or not there; and of a partial file only that counts which survives a loss of
// power.
const (
	partialSuffix = ".partial"
	syncedSuffix  = ".synced"
	// syncInterval is how often the partial file is synced: what is lost if this process is killed.
	syncInterval = 2 * time.Second
)

func partialName(version string, guid uint64) string {
	return fmt.Sprintf(".%s.%016x%s", version, guid, partialSuffix)
}

func syncedName(version string, guid uint64) string {
	return fmt.Sprintf(".%s.%016x%s", version, guid, syncedSuffix)
}

func parsePartialName(name string) (version string, guid uint64, ok bool) {
	name, isPartial := strings.CutSuffix(name, partialSuffix)
	dot := strings.LastIndexByte(name, '.')
	if !isPartial || dot < 1 || len(name)-dot-1 != 16 {
		return "", 0, false
	}
	version = name[1:dot]
	digits, err := hex.DecodeString(name[dot+1:])
	if err != nil || checkName(version) != nil {
		return "", 0, false
	}
	for _, d := range digits {
		guid = guid<<8 | uint64(d)
	}
	return version, guid, true
}

// syncedBytes is how much of a partial file can be built upon.
func syncedBytes(folder *os.Root, version string, guid uint64) int64 {
	info, err := folder.Lstat(partialName(version, guid))
	if err != nil || !info.Mode().IsRegular() {
		return 0
	}
	note, err := folder.ReadFile(syncedName(version, guid))
	if err != nil {
		return 0
	}
	synced, err := strconv.ParseInt(strings.TrimSuffix(string(note), "\n"), 10, 64)
	if err != nil || synced < 0 {
		return 0
	}
	return min(synced, info.Size())
}

// Receive takes a stream of Send. One transfer at a time goes into a filesystem.
func (s *dirStore) Receive(_ context.Context, req *rpc.ReceiveReq, r io.Reader) (*rpc.ReceiveRes, error) {
	if err := checkReceive(req); err != nil {
		return nil, rpc.Errorf(rpc.InvalidArgument, "%v", err)
	}
	folder, _, release, err := openLocked(s.busy, s.prefix, req.Filesystem, s.folder)
	if err != nil {
		return nil, err
	}
	defer release()
	if req.ClearResumeToken {
		if err := dropPartials(folder); err != nil {
			return nil, err
		}
	}
	if err := receiveVersion(folder, *req.To, r); err != nil {
		return nil, err
	}
	return new(rpc.ReceiveRes), nil
}

// openLocked opens the folder of a filesystem, made if need be, and keeps other transfers out of it until release is called:
// those of this process and of others. lock is for children that work on the folder, nil where there is none. release closes
// both.
func openLocked(busy *busyPaths, prefix, filesystem string, open func(string, missing) (*os.Root, error)) (folder *os.Root, lock *os.File, release func(), err error) {
	free, err := busy.acquire(prefix+filesystem, filesystem)
	if err != nil {
		return nil, nil, nil, err
	}
	folder, err = open(filesystem, makeMissing)
	if err != nil {
		free()
		return nil, nil, nil, err
	}
	if lock, err = lockFolder(folder); err != nil {
		folder.Close()
		free()
		return nil, nil, nil, err
	}
	return folder, lock, func() { lock.Close(); folder.Close(); free() }, nil
}

// also adds an error that came up while another was dealt with.
func also(err, other error) error {
	if other == nil {
		return err
	}
	return errors.Join(err, withoutPath(other))
}

func checkReceive(req *rpc.ReceiveReq) error {
	switch {
	case req.To == nil:
		return errors.New("receive without a version")
	case req.To.Type != rpc.VersionSnapshot:
		return fmt.Errorf("version %q is not a snapshot", req.To.Name)
	}
	return errors.Join(checkPath(req.Filesystem), checkName(req.To.Name), checkTime(req.To.Creation))
}

func receiveVersion(folder *os.Root, to rpc.FilesystemVersion, r io.Reader) error {
	if err := checkFree(folder, to); err != nil {
		return err
	}
	header, err := readStreamHeader(r)
	if err != nil {
		return err
	}
	if header.guid != to.GUID || versionGUID(to.Name, header.size, to.Creation) != to.GUID {
		return rpc.Errorf(rpc.InvalidArgument, "the stream is of version %016x with %d bytes, which is not %016x of %v",
			header.guid, header.size, to.GUID, to.Creation)
	}
	p, err := openPartial(folder, to, header.offset)
	if err != nil {
		return err
	}
	if err := p.fill(r, header.size); err != nil {
		return also(err, p.keep())
	}
	if err := p.commit(); err != nil {
		return also(err, p.drop()) // there is nothing left to resume
	}
	return nil
}

// checkFree makes sure that nothing has the name yet, in whatever spelling the file system takes for the same. If it is the
// version itself, the list that the peer acts upon is old: what it sent before a connection was lost did arrive.
func checkFree(folder *os.Root, to rpc.FilesystemVersion) error {
	info, err := folder.Lstat(to.Name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return withoutPath(err)
	}
	if err := checkSpelling(folder, to.Name, info); err != nil {
		return err
	}
	if info.Mode().IsRegular() && versionOf(to.Name, info).GUID == to.GUID {
		return rpc.Errorf(rpc.Aborted, "version %q has arrived already", to.Name)
	}
	return rpc.Errorf(rpc.AlreadyExists, "there is another %q already; nothing is overwritten", to.Name)
}

// dropPartials removes what had arrived of any version. The notes go first and for good: a note must never be there
// with another partial file than it was made for.
func dropPartials(folder *os.Root) error {
	entries, err := fs.ReadDir(folder.FS(), ".")
	if err != nil {
		return withoutPath(err)
	}
	var partials []string
	for _, entry := range entries {
		if version, guid, ok := parsePartialName(entry.Name()); ok {
			partials = append(partials, entry.Name())
			if err := dropNote(folder, version, guid); err != nil {
				return err
			}
		}
	}
	for _, name := range partials {
		if err := folder.Remove(name); err != nil {
			return withoutPath(err)
		}
	}
	return nil
}

// dropNote removes the note of what is synced, durably.
func dropNote(folder *os.Root, version string, guid uint64) error {
	err := folder.Remove(syncedName(version, guid))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return withoutPath(err)
	}
	return syncFolder(folder)
}

// partial is a version that is arriving.
type partial struct {
	folder *os.Root
	to     rpc.FilesystemVersion
	name   string // of the partial file
	file   *os.File
	start  int64 // where this transfer began
}

// openPartial opens the partial file to go on at offset, which must be where the synced part of it ends. If it is not, the
// lists were read before another transfer ended or the disk lost something, and listing again helps; a sender that cannot
// resume says so with ClearResumeToken.
func openPartial(folder *os.Root, to rpc.FilesystemVersion, offset int64) (*partial, error) {
	if have := syncedBytes(folder, to.Name, to.GUID); offset != have {
		return nil, rpc.Errorf(rpc.Aborted, "the stream begins at byte %d, but what arrived ends at %d", offset, have)
	}
	if offset == 0 { // a note of another file of that name would not be true of what is written now
		if err := dropNote(folder, to.Name, to.GUID); err != nil {
			return nil, err
		}
	}
	p := &partial{folder: folder, to: to, name: partialName(to.Name, to.GUID), start: offset}
	var err error
	if p.file, err = folder.OpenFile(p.name, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, spaceError(err)
	}
	if err = p.file.Truncate(offset); err == nil {
		_, err = p.file.Seek(offset, io.SeekStart)
	}
	if err == nil {
		err = p.note(offset)
	}
	if err != nil {
		p.file.Close()
		return nil, spaceError(err)
	}
	return p, nil
}

// fill takes the rest of the version from the stream, which must have just that.
func (p *partial) fill(r io.Reader, size int64) error {
	stop := p.syncMeanwhile()
	n, err := io.Copy(p.file, r)
	stop()
	switch {
	case err != nil:
		return spaceError(err)
	case p.start+n < size:
		return rpc.Errorf(rpc.DataLoss, "%d bytes arrived of %d", p.start+n, size)
	case p.start+n > size:
		err := rpc.Errorf(rpc.DataLoss, "%d bytes arrived of %d", p.start+n, size)
		return also(err, p.file.Truncate(0)) // who knows which of them belong to it
	}
	return nil
}

// syncMeanwhile syncs the file at intervals until stop is called.
func (p *partial) syncMeanwhile() (stop func()) {
	quit, done := make(chan struct{}), make(chan struct{})
	go func() { // ends with quit; stop waits for it
		defer close(done)
		tick := time.NewTicker(syncInterval)
		defer tick.Stop()
		for {
			select {
			case <-quit:
				return
			case <-tick.C:
				p.sync() // if it fails, the last sync will too, and that one counts
			}
		}
	}()
	return func() { close(quit); <-done }
}

// sync brings the file to the disk and then takes a note of it.
func (p *partial) sync() error {
	info, err := p.file.Stat()
	if err != nil {
		return withoutPath(err)
	}
	if err := p.file.Sync(); err != nil {
		return spaceError(err)
	}
	return p.note(info.Size())
}

// note writes down how many bytes are on the disk. Its file keeps its length, so that it can be written on a full disk.
func (p *partial) note(synced int64) error {
	f, err := p.folder.OpenFile(syncedName(p.to.Name, p.to.GUID), os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return spaceError(err)
	}
	_, err = f.WriteAt(fmt.Appendf(nil, "%019d\n", synced), 0)
	if err = errors.Join(err, f.Close()); err != nil {
		return spaceError(err)
	}
	return nil
}

// keep ends a transfer that failed: what arrived is kept to go on from there.
func (p *partial) keep() error {
	defer p.file.Close()
	info, err := p.file.Stat()
	if err == nil && info.Size() == 0 {
		return p.drop()
	}
	return p.sync()
}

// drop removes what arrived.
func (p *partial) drop() error {
	p.file.Close() // it may be closed already
	if err := dropNote(p.folder, p.to.Name, p.to.GUID); err != nil {
		return err
	}
	if err := p.folder.Remove(p.name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return withoutPath(err)
	}
	return nil
}

// commit makes a version of the complete file.
func (p *partial) commit() error {
	if err := errors.Join(p.file.Sync(), p.file.Close()); err != nil {
		return spaceError(err)
	}
	if err := p.setTime(); err != nil {
		return err
	}
	if err := checkFree(p.folder, p.to); err != nil {
		return err
	}
	if err := p.folder.Rename(p.name, p.to.Name); err != nil {
		return withoutPath(err)
	}
	if err := p.folder.Remove(syncedName(p.to.Name, p.to.GUID)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return withoutPath(err)
	}
	return syncFolder(p.folder)
}

// setTime gives the file the time that makes it the version it is, and looks whether it now is that. The file is opened
// anew for it: closing one that was written to may set its time on some systems.
func (p *partial) setTime() error {
	if err := p.folder.Chtimes(p.name, time.Now(), p.to.Creation); err != nil {
		return withoutPath(err)
	}
	f, err := p.folder.OpenFile(p.name, os.O_RDWR, 0)
	if err != nil {
		return withoutPath(err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return spaceError(err)
	}
	info, err := f.Stat()
	if err != nil {
		return withoutPath(err)
	}
	if got := versionOf(p.to.Name, info); got.GUID != p.to.GUID {
		return rpc.Errorf(rpc.DataLoss, "it is %016x with %d bytes of %v here, not %016x of %v: does this file system keep microseconds?",
			got.GUID, info.Size(), got.Creation, p.to.GUID, p.to.Creation)
	}
	return nil
}
