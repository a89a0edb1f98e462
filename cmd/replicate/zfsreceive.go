package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"example.org/rpc"
)

// What "zfs receive" makes of a stream is decided by the stream, not by the request, and with -F it may be much. So its
// first record is read here and must say just what the request says, before zfs gets to see a byte: one snapshot, whole or
// from the newest one that is here.
//
// The record, in the byte order of the sender's host, which the magic number shows:
//
//	 0  type u32 = 0, payload u32, magic u64
//	16  version u64: the lowest two bits are 1 for one snapshot, 2 for a package of several
//	24  creation time u64, type of the dataset u32, flags u32
//	40  GUID u64, GUID of the snapshot that the increment is from u64 (0: whole), name [256]byte
const (
	zfsRecordLen     = 312
	zfsMagic         = 0x2F5bacbac
	zfsSingle        = 1
	zfsKindMask      = 3
	zfsMagicOffset   = 8
	zfsVersionOffset = 16
	zfsToOffset      = 40
	zfsFromOffset    = 48
)

// zfsBegin is what the first record says.
type zfsBegin struct{ to, from uint64 }

// readZFSBegin reads the first record; record is to be passed on.
func readZFSBegin(r io.Reader) (begin zfsBegin, record []byte, err error) {
	record = make([]byte, zfsRecordLen)
	if _, err := io.ReadFull(r, record); err == io.EOF {
		return zfsBegin{}, nil, rpc.Errorf(rpc.DataLoss, "the stream is empty")
	} else if err != nil {
		return zfsBegin{}, nil, fmt.Errorf("first record of the stream: %w", err)
	}
	var order binary.ByteOrder = binary.LittleEndian
	if order.Uint64(record[zfsMagicOffset:]) != zfsMagic {
		order = binary.BigEndian
	}
	switch {
	case order.Uint64(record[zfsMagicOffset:]) != zfsMagic || order.Uint32(record) != 0:
		return zfsBegin{}, nil, rpc.Errorf(rpc.InvalidArgument, "this is not the stream of a zfs: store: it begins with %q", record[:16])
	case order.Uint64(record[zfsVersionOffset:])&zfsKindMask != zfsSingle:
		return zfsBegin{}, nil, rpc.Errorf(rpc.InvalidArgument, "the stream is a package; only single snapshots are received")
	}
	return zfsBegin{to: order.Uint64(record[zfsToOffset:]), from: order.Uint64(record[zfsFromOffset:])}, record, nil
}

// zfsTarget is the dataset that is to receive.
type zfsTarget struct {
	dataset, snapshot string // snapshot: of the version, the whole name
	exists            bool
	placeholder       bool
	token             string
	versions          []rpc.FilesystemVersion
}

// Receive takes a stream of Send. Nothing that is here is destroyed for it: not a snapshot, nor what was changed since the
// newest one.
func (s *zfsStore) Receive(ctx context.Context, req *rpc.ReceiveReq, r io.Reader) (*rpc.ReceiveRes, error) {
	t, err := s.target(req)
	if err != nil {
		return nil, err
	}
	release, err := s.shared.busy.acquire(t.dataset, req.Filesystem)
	if err != nil {
		return nil, err
	}
	defer release()
	if err := s.look(ctx, t); err != nil {
		return nil, err
	}
	if req.ClearResumeToken && t.token != "" {
		if err := s.clear(ctx, t); err != nil {
			return nil, err
		}
	}
	begin, record, err := readZFSBegin(r)
	if err != nil {
		return nil, err
	}
	if err := t.check(*req.To, begin); err != nil {
		return nil, err
	}
	if err := s.makeParents(ctx, t.dataset); err != nil {
		return nil, err
	}
	if err := feedChild(ctx, s.zfs.program, s.zfs.receiveArgs(t), record, r, nil); err != nil {
		return nil, zfsError(err)
	}
	return new(rpc.ReceiveRes), s.settle(ctx, t, *req.To)
}

func (s *zfsStore) target(req *rpc.ReceiveReq) (*zfsTarget, error) {
	if err := checkReceive(req); err != nil {
		return nil, rpc.Errorf(rpc.InvalidArgument, "%v", err)
	}
	dataset, err := s.dataset(req.Filesystem)
	if err == nil {
		err = checkZFSName(req.To.Name)
	}
	if err != nil {
		return nil, rpc.Errorf(rpc.InvalidArgument, "%v", err)
	}
	t := &zfsTarget{dataset: dataset, snapshot: dataset + "@" + req.To.Name}
	if len(t.snapshot) > maxZFSName {
		return nil, rpc.Errorf(rpc.InvalidArgument, "version %q of %q: the snapshot's name has %d bytes here, at most %d are allowed",
			req.To.Name, req.Filesystem, len(t.snapshot), maxZFSName)
	}
	return t, nil
}

// look finds out what is there.
func (s *zfsStore) look(ctx context.Context, t *zfsTarget) error {
	properties := placeholderProperty
	if s.zfs.resume {
		properties += ",receive_resume_token"
	}
	rows, err := s.zfs.table(ctx, 3, "get", "-H", "-p", "-o", "property,value,source", properties, t.dataset)
	if rpc.CodeOf(err) == rpc.NotFound {
		return s.checkUnmounted(ctx)
	}
	if err != nil {
		return err
	}
	t.exists = true
	for _, row := range rows {
		switch {
		case row[0] == placeholderProperty:
			t.placeholder = row[1] == "on" && row[2] == "local"
		case row[1] != "-":
			t.token = row[1]
		}
	}
	t.versions, err = s.zfs.versions(ctx, t.dataset)
	t.versions = slices.DeleteFunc(t.versions, func(v rpc.FilesystemVersion) bool { return v.Type != rpc.VersionSnapshot })
	return err
}

// checkUnmounted makes sure that what is received anew will not be mounted: a filesystem that is read changes (its times of
// access do), and then it takes no increment any more.
func (s *zfsStore) checkUnmounted(ctx context.Context) error {
	if s.zfs.unmounted {
		return nil
	}
	rows, err := s.zfs.table(ctx, 1, "get", "-H", "-o", "value", "mountpoint", s.root)
	if err != nil {
		return err
	}
	if len(rows) == 1 && (rows[0][0] == "none" || rows[0][0] == "legacy") {
		return nil
	}
	return rpc.Errorf(rpc.FailedPrecondition, "this zfs would mount what it receives, below the mount point of %s; \"zfs set mountpoint=none %s\" prevents that", s.root, s.root)
}

// clear drops what had arrived of something else.
func (s *zfsStore) clear(ctx context.Context, t *zfsTarget) error {
	if _, err := s.zfs.run(ctx, "receive", "-A", t.dataset); err != nil {
		return fmt.Errorf("drop what had arrived: %w", err)
	}
	placeholder := t.placeholder
	*t = zfsTarget{dataset: t.dataset, snapshot: t.snapshot} // a first version that was incomplete is gone with its dataset
	err := s.look(ctx, t)
	t.placeholder = t.placeholder || placeholder && t.exists
	return err
}

// check makes sure that the stream is what the request says and fits what is here.
func (t *zfsTarget) check(to rpc.FilesystemVersion, begin zfsBegin) error {
	if begin.to != to.GUID {
		return rpc.Errorf(rpc.InvalidArgument, "the stream is of version %d, not of %q, which is %d", begin.to, to.Name, to.GUID)
	}
	if slices.ContainsFunc(t.versions, func(v rpc.FilesystemVersion) bool { return v.GUID == to.GUID }) {
		return rpc.Errorf(rpc.Aborted, "version %q has arrived already", to.Name)
	}
	var newest rpc.FilesystemVersion
	if len(t.versions) > 0 {
		newest = t.versions[len(t.versions)-1]
	}
	switch {
	case begin.from == newest.GUID && begin.from != 0:
	case begin.from != 0:
		return rpc.Errorf(rpc.FailedPrecondition, "the stream is an increment from %d, but the newest version here is %q (%d); nothing is destroyed", begin.from, newest.Name, newest.GUID)
	case newest.GUID != 0:
		return rpc.Errorf(rpc.AlreadyExists, "the stream is a whole version, but there are others already, the newest is %q (%d); nothing is overwritten", newest.Name, newest.GUID)
	case t.exists && !t.placeholder && t.token == "":
		return rpc.Errorf(rpc.AlreadyExists, "there is another %s already, without a version; nothing is overwritten", t.dataset)
	}
	return nil
}

// makeParents makes placeholders of the datasets between the store's and the one that is to come.
func (s *zfsStore) makeParents(ctx context.Context, dataset string) error {
	var missing []string
	for parent := path.Dir(dataset); strings.HasPrefix(parent, s.root+"/"); parent = path.Dir(parent) {
		missing = append(missing, parent)
	}
	for _, parent := range slices.Backward(missing) {
		if err := s.zfs.makePlaceholder(ctx, parent); err != nil {
			return fmt.Errorf("make a placeholder: %w", err)
		}
	}
	return nil
}

// receiveArgs has -F only where there is nothing to lose: a placeholder.
func (t *zfsTool) receiveArgs(target *zfsTarget) []string {
	args := []string{"receive"}
	if t.resume {
		args = append(args, "-s")
	}
	if t.unmounted {
		args = append(args, "-u")
	}
	if target.placeholder && len(target.versions) == 0 {
		args = append(args, "-F")
	}
	return append(args, target.snapshot)
}

// settleTimeout bounds what is done after a version has arrived, whether or not the peer is still there.
const settleTimeout = time.Minute

// settle looks whether what arrived is what was to arrive, and marks the dataset: it is no placeholder any more, and it is
// not for writing.
func (s *zfsStore) settle(ctx context.Context, t *zfsTarget, to rpc.FilesystemVersion) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTimeout)
	defer cancel()
	if _, err := s.zfs.find(ctx, t.dataset, to); err != nil {
		return fmt.Errorf("what was received is not what was sent: %w", err)
	}
	if t.placeholder {
		if _, err := s.zfs.run(ctx, "inherit", placeholderProperty, t.dataset); err != nil {
			return err
		}
	}
	if len(t.versions) == 0 {
		_, err := s.zfs.run(ctx, "set", "readonly=on", t.dataset)
		return err
	}
	return nil
}
