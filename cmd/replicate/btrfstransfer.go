package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"

	"example.org/rpc"
)

// SendDry looks whether the step can be sent. How much that is, btrfs does not say.
func (s *btrfsStore) SendDry(ctx context.Context, req *rpc.SendReq) (*rpc.SendRes, error) {
	if _, err := s.sendArgs(ctx, req); err != nil {
		return nil, err
	}
	return new(rpc.SendRes), nil
}

// Send gives the stream of a version, from the one that the request names or whole.
func (s *btrfsStore) Send(ctx context.Context, req *rpc.SendReq) (*rpc.SendRes, io.ReadCloser, error) {
	args, err := s.sendArgs(ctx, req)
	if err != nil {
		return nil, nil, err
	}
	stream, err := startStream(s.btrfs, args, btrfsError, func() {}) // btrfs itself keeps what is being sent
	if err != nil {
		return nil, nil, err // not stream: a nil *childStream would be a stream
	}
	return new(rpc.SendRes), stream, nil
}

func (s *btrfsStore) sendArgs(ctx context.Context, req *rpc.SendReq) ([]string, error) {
	if req.To == nil {
		return nil, rpc.Errorf(rpc.InvalidArgument, "send without a version")
	}
	to, err := s.find(ctx, req.Filesystem, *req.To)
	if err != nil {
		return nil, err
	}
	args := []string{"send", "-q"}
	if req.From != nil {
		from, err := s.find(ctx, req.Filesystem, *req.From)
		if err != nil {
			return nil, err
		}
		args = append(args, "-p", from)
	}
	return append(args, to), nil
}

// SendCompleted has nothing to do: nothing was held for the transfer.
func (s *btrfsStore) SendCompleted(context.Context, *rpc.SendCompletedReq) (*rpc.SendCompletedRes, error) {
	return new(rpc.SendCompletedRes), nil
}

// btrfsError gives a failure of btrfs the code that its words mean.
func btrfsError(err error) error {
	var failed *childError
	if !errors.As(err, &failed) {
		return err
	}
	for _, words := range []string{"No space left on device", "Disk quota exceeded"} {
		if strings.Contains(failed.stderr, words) {
			return &toolFailure{failed, rpc.ResourceExhausted}
		}
	}
	return err
}

// A stream begins with a magic text and a version, and then there are commands: length u32 without what stands before the
// attributes, command u16, checksum u32; attributes are type u16, length u16, and the value. All of it is little-endian.
// The first command makes the subvolume: its path is the name of it, its UUID the identity.
const (
	btrfsMagic         = "btrfs-stream\x00"
	btrfsStreamHeader  = len(btrfsMagic) + 4
	btrfsCommandHeader = 10
	btrfsSubvolume     = 1  // command: of nothing
	btrfsSnapshot      = 2  // command: of one that the receiver has
	btrfsUUID          = 1  // attribute
	btrfsPath          = 15 // attribute
	// maxBtrfsFirst is far above what the first command has: a name and three identities.
	maxBtrfsFirst = 16 << 10
)

// readBtrfsFirst reads the first command: which version the stream is of. head is to be passed on.
func readBtrfsFirst(r io.Reader) (name string, guid uint64, head []byte, err error) {
	head = make([]byte, btrfsStreamHeader+btrfsCommandHeader)
	if _, err := io.ReadFull(r, head); err == io.EOF {
		return "", 0, nil, rpc.Errorf(rpc.DataLoss, "the stream is empty")
	} else if err != nil {
		return "", 0, nil, fmt.Errorf("first command of the stream: %w", err)
	}
	if !bytes.HasPrefix(head, []byte(btrfsMagic)) {
		return "", 0, nil, rpc.Errorf(rpc.InvalidArgument, "this is not the stream of a btrfs: store: it begins with %q", head[:16])
	}
	if version := binary.LittleEndian.Uint32(head[len(btrfsMagic):]); version != btrfsVersion {
		return "", 0, nil, rpc.Errorf(rpc.InvalidArgument, "the stream is of version %d, not %d", version, btrfsVersion)
	}
	length := binary.LittleEndian.Uint32(head[btrfsStreamHeader:])
	command := binary.LittleEndian.Uint16(head[btrfsStreamHeader+4:])
	if length > maxBtrfsFirst || command != btrfsSubvolume && command != btrfsSnapshot {
		return "", 0, nil, rpc.Errorf(rpc.InvalidArgument, "the stream does not begin with a subvolume or a snapshot but with command %d of %d bytes", command, length)
	}
	attributes := make([]byte, length)
	if _, err := io.ReadFull(r, attributes); err != nil {
		return "", 0, nil, fmt.Errorf("first command of the stream: %w", noEOF(err))
	}
	values := parseBtrfsAttributes(attributes)
	if len(values[btrfsUUID]) != 16 {
		return "", 0, nil, rpc.Errorf(rpc.InvalidArgument, "the stream's first command has no UUID")
	}
	return string(values[btrfsPath]), uuidGUID(values[btrfsUUID]), append(head, attributes...), nil
}

func parseBtrfsAttributes(b []byte) map[uint16][]byte {
	values := make(map[uint16][]byte)
	for len(b) >= 4 {
		kind, length := binary.LittleEndian.Uint16(b), int(binary.LittleEndian.Uint16(b[2:]))
		if b = b[4:]; length > len(b) {
			break
		}
		values[kind], b = b[:length], b[length:]
	}
	return values
}

// noEOF makes an end in the middle of something one that cannot be taken for a good end.
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// How a version arrives: btrfs makes a subvolume under its name, which becomes a read-only snapshot with an identity at the
// end. So that nothing else is ever taken for a version, a hidden file says meanwhile that it is arriving; what is found
// with such a file later is the rest of a transfer that broke off, and is deleted.
const arrivingSuffix = ".arriving"

func arrivingName(version string) string { return "." + version + arrivingSuffix }

func isArriving(folder *os.Root, version string) bool {
	_, err := folder.Lstat(arrivingName(version))
	return !errors.Is(err, fs.ErrNotExist) // in doubt it is
}

// Receive takes a stream of Send. One transfer at a time goes into a filesystem.
//
// What a stream does is up to whoever made it, and it is done as root: so btrfs is confined to the folder of this
// filesystem's versions, and gets to see only what is harmless there.
func (s *btrfsStore) Receive(ctx context.Context, req *rpc.ReceiveReq, r io.Reader) (*rpc.ReceiveRes, error) {
	err := checkReceive(req)
	if err == nil {
		err = checkArgument(req.To.Name)
	}
	if err != nil {
		return nil, rpc.Errorf(rpc.InvalidArgument, "%v", err)
	}
	folder, lock, release, err := openLocked(s.busy, s.prefix, req.Filesystem, s.folder)
	if err != nil {
		return nil, err
	}
	defer release()
	if err := s.dropArriving(ctx, folder, req.Filesystem); err != nil {
		return nil, err
	}
	if err := s.checkFree(ctx, folder, req.Filesystem, *req.To); err != nil {
		return nil, err
	}
	if err := s.receiveVersion(ctx, folder, lock, req.Filesystem, *req.To, r); err != nil {
		return nil, err
	}
	return new(rpc.ReceiveRes), nil
}

// checkFree makes sure that nothing has the name yet.
func (s *btrfsStore) checkFree(ctx context.Context, folder *os.Root, filesystem string, to rpc.FilesystemVersion) error {
	_, err := folder.Lstat(to.Name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if v, err := s.version(ctx, filesystem, to.Name); err == nil && v.GUID == to.GUID {
		return rpc.Errorf(rpc.Aborted, "version %q has arrived already", to.Name)
	}
	return rpc.Errorf(rpc.AlreadyExists, "there is another %q already; nothing is overwritten", to.Name)
}

func (s *btrfsStore) receiveVersion(ctx context.Context, folder *os.Root, lock *os.File, filesystem string, to rpc.FilesystemVersion, r io.Reader) error {
	name, guid, head, err := readBtrfsFirst(r)
	if err != nil {
		return err
	}
	if name != to.Name || guid != to.GUID {
		return rpc.Errorf(rpc.InvalidArgument, "the stream is of version %q (%016x), not of %q (%016x)", name, guid, to.Name, to.GUID)
	}
	if err := markArriving(folder, to.Name); err != nil {
		return err
	}
	commands := &btrfsCommands{r: r, devices: withoutDevices(s.path)}
	// If this process is killed, the child goes on until it has read what it was sent: meanwhile nothing may be received
	// under the same name.
	err = feedChild(ctx, s.btrfs, []string{"receive", "-q", "-e", "-C", s.argument(filesystem, "")}, head, commands, lock)
	// Whether or not the peer is still there: what arrived is kept, the rest is deleted.
	// Each command has its own time: what is still to be written may be gigabytes, on a slow disk.
	ctx = context.WithoutCancel(ctx)
	if err == nil {
		err = s.settle(ctx, folder, filesystem, to)
	}
	if err != nil {
		return also(btrfsError(err), s.dropArriving(ctx, folder, filesystem))
	}
	return nil
}

// markArriving says that what is there under that name from now on is no version.
func markArriving(folder *os.Root, version string) error {
	f, err := folder.OpenFile(arrivingName(version), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return spaceError(err)
	}
	if err := f.Close(); err != nil {
		return spaceError(err)
	}
	return syncFolder(folder)
}

// syncTimeout bounds the writing of what has arrived: all that the kernel holds in memory, which would have to be sent again.
const syncTimeout = time.Hour

// settle makes a version of what arrived, if it is what was to arrive.
func (s *btrfsStore) settle(ctx context.Context, folder *os.Root, filesystem string, to rpc.FilesystemVersion) error {
	v, err := s.version(ctx, filesystem, to.Name)
	if err != nil {
		return fmt.Errorf("what was received: %w", err)
	}
	if v.GUID != to.GUID {
		return rpc.Errorf(rpc.DataLoss, "what was received is %016x, not %016x", v.GUID, to.GUID)
	}
	if _, err := runToolWithin(ctx, syncTimeout, s.btrfs, "filesystem", "sync", s.argument(filesystem, to.Name)); err != nil {
		return err
	}
	if err := folder.Remove(arrivingName(to.Name)); err != nil {
		return withoutPath(err)
	}
	return syncFolder(folder)
}

// dropArriving deletes what arrived only in part. The caller has the lock of the folder.
func (s *btrfsStore) dropArriving(ctx context.Context, folder *os.Root, filesystem string) error {
	entries, err := fs.ReadDir(folder.FS(), ".")
	if err != nil {
		return withoutPath(err)
	}
	for _, entry := range entries {
		version, ok := strings.CutSuffix(entry.Name(), arrivingSuffix)
		if version = strings.TrimPrefix(version, "."); !ok || checkArgument(version) != nil {
			continue
		}
		if _, err := folder.Lstat(version); !errors.Is(err, fs.ErrNotExist) {
			if _, err := runTool(ctx, s.btrfs, "subvolume", "delete", s.argument(filesystem, version)); err != nil {
				return fmt.Errorf("delete what arrived only in part: %w", err)
			}
			s.awaitSpace(ctx, filesystem)
		}
		if err := folder.Remove(entry.Name()); err != nil {
			return withoutPath(err)
		}
	}
	return nil
}

// spacePatience is how long the space of what was deleted is waited for: btrfs gives it back some time later.
const spacePatience = 20 * time.Second

// awaitSpace lets what is received next have the space of what was deleted. If that takes long, the next goes without.
func (s *btrfsStore) awaitSpace(ctx context.Context, filesystem string) {
	ctx, cancel := context.WithTimeout(ctx, spacePatience)
	defer cancel()
	// The first makes the kernel begin, the second waits for it, and with the third what it freed can be used.
	for _, what := range []string{"filesystem", "subvolume", "filesystem"} {
		_, err := runTool(ctx, s.btrfs, what, "sync", s.argument(filesystem, ""))
		if err == nil {
			continue
		}
		s.log.Warn("the space of what arrived only in part is not free yet", "filesystem", s.prefix+filesystem, "error", err)
		return
	}
}
