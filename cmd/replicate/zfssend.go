package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"

	"example.org/rpc"
)

// zfsSend is what "zfs send" is to send.
type zfsSend struct {
	dataset  string
	to, from string // full names; from "": all of it
	args     []string
	resumed  bool
}

func (s *zfsStore) SendDry(ctx context.Context, req *rpc.SendReq) (*rpc.SendRes, error) {
	send, err := s.prepare(ctx, req)
	if err != nil {
		return nil, err
	}
	return &rpc.SendRes{UsedResumeToken: send.resumed, ExpectedSize: s.estimate(ctx, send)}, nil
}

// Send gives the stream of a version, from the one that the request names or whole. The snapshots are held meanwhile.
func (s *zfsStore) Send(ctx context.Context, req *rpc.SendReq) (*rpc.SendRes, io.ReadCloser, error) {
	send, err := s.prepare(ctx, req)
	if err != nil {
		return nil, nil, err
	}
	release, err := s.hold(ctx, send)
	if err != nil {
		return nil, nil, err
	}
	res := &rpc.SendRes{UsedResumeToken: send.resumed, ExpectedSize: s.estimate(ctx, send)}
	stream, err := startStream(s.zfs.program, send.args, zfsError, release)
	if err != nil {
		return nil, nil, err // not stream: a nil *childStream would be a stream
	}
	return res, stream, nil
}

// prepare finds out what a request means. Both versions must still be what the peer saw in the list.
func (s *zfsStore) prepare(ctx context.Context, req *rpc.SendReq) (*zfsSend, error) {
	dataset, err := s.dataset(req.Filesystem)
	if err != nil {
		return nil, err
	}
	if req.To == nil || req.To.Type != rpc.VersionSnapshot {
		return nil, rpc.Errorf(rpc.InvalidArgument, "send without a snapshot")
	}
	send := &zfsSend{dataset: dataset, args: []string{"send"}}
	if send.to, err = s.zfs.find(ctx, dataset, *req.To); err != nil {
		return nil, err
	}
	if req.From != nil {
		if send.from, err = s.zfs.find(ctx, dataset, *req.From); err != nil {
			return nil, err
		}
	}
	raw, err := s.zfs.encrypted(ctx, dataset)
	if err != nil {
		return nil, fmt.Errorf("is %q encrypted: %w", req.Filesystem, err)
	}
	if s.resumable(req, send.to, raw) {
		send.resumed = true
		send.args = append(send.args, "-t", req.ResumeToken)
		return send, nil
	}
	if raw {
		send.args = append(send.args, "-w")
	}
	if send.from != "" {
		send.args = append(send.args, "-i", send.from)
	}
	send.args = append(send.args, send.to)
	return send, nil
}

// resumable tells whether the token is of just this step. A token names the dataset and could name any of the pool; one of
// a dataset that has been renamed since is of no use. It also says whether what is encrypted is sent so, and "send -t" does
// as it says: whoever pulls could write one that has it decrypted. Without a token the step begins anew.
func (s *zfsStore) resumable(req *rpc.SendReq, to string, raw bool) bool {
	if req.ResumeToken == "" || !s.zfs.resume {
		return false
	}
	token, err := parseZFSToken(req.ResumeToken)
	from := uint64(0)
	if req.From != nil {
		from = req.From.GUID
	}
	if err != nil || token.toName != to || token.toGUID != req.To.GUID || token.fromGUID != from || token.raw != raw {
		s.log.Warn("what broke off begins anew: the resume token is of something else", "version", to, "token", token.toName, "error", err)
		return false
	}
	return true
}

// encrypted tells whether the dataset has to be sent as it is, because the receiver is not to have the key. If that cannot
// be found out, nothing may be sent.
func (t *zfsTool) encrypted(ctx context.Context, dataset string) (bool, error) {
	if !t.raw {
		return false, nil
	}
	rows, err := t.table(ctx, 1, "get", "-H", "-p", "-o", "value", "encryption", dataset)
	if err != nil {
		return false, err
	}
	return len(rows) != 1 || rows[0][0] != "off" && rows[0][0] != "-", nil
}

// estimate is how many bytes will be sent, or 0 if zfs cannot say.
func (s *zfsStore) estimate(ctx context.Context, send *zfsSend) uint64 {
	if s.zfs.dry {
		out, err := s.zfs.run(ctx, append([]string{"send", "-n", "-v", "-P"}, send.args[1:]...)...)
		if err != nil {
			return 0 // Send will tell what is wrong
		}
		return parseZFSEstimate(out)
	}
	if send.from != "" {
		return 0
	}
	rows, err := s.zfs.table(ctx, 1, "get", "-H", "-p", "-o", "value", "referenced", send.to)
	if err != nil || len(rows) != 1 {
		return 0
	}
	n, _ := strconv.ParseUint(rows[0][0], 10, 64)
	return n
}

// parseZFSEstimate reads the line "size", or else the last field of a line "full" or "incremental": with a resume token
// some versions have only that, after what the token says.
func parseZFSEstimate(out string) uint64 {
	var estimate uint64
	for line := range strings.Lines(out) {
		fields := strings.Split(strings.TrimSpace(line), "\t")
		switch fields[0] {
		case "size", "full", "incremental":
			if n, err := strconv.ParseUint(fields[len(fields)-1], 10, 64); err == nil {
				estimate = n
			}
		}
	}
	return estimate
}

// holdTag is the name of the holds on what is being sent. What another process, or one that was killed, holds under it is
// held: sending the same again, or the next version, releases that.
const holdTag = "replicate"

// releaseTimeout bounds the release of a hold; a stream is closed whether or not anybody waits for it any more.
const releaseTimeout = 30 * time.Second

// zfsHolds counts the streams for which a snapshot is held in this process.
type zfsHolds struct {
	mu    sync.Mutex // also held while zfs holds and releases: a release must not overtake the next hold
	count map[string]int
}

// hold keeps the snapshots of a step from being destroyed until release is called.
func (s *zfsStore) hold(ctx context.Context, send *zfsSend) (release func(), err error) {
	if !s.zfs.holds {
		return func() {}, nil
	}
	var held []string
	release = func() {
		ctx, cancel := context.WithTimeout(context.Background(), releaseTimeout)
		defer cancel()
		for _, name := range held {
			s.release(ctx, name)
		}
	}
	for _, name := range []string{send.to, send.from} {
		if !strings.Contains(name, "@") {
			continue // a bookmark needs none
		}
		if err := s.holdOne(ctx, name); err != nil {
			release()
			return nil, fmt.Errorf("hold %s: %w", name, err)
		}
		held = append(held, name)
	}
	return release, nil
}

func (s *zfsStore) holdOne(ctx context.Context, name string) error {
	h := &s.shared.holds
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.count[name] == 0 {
		_, err := s.zfs.run(ctx, "hold", holdTag, name)
		if err != nil && !strings.Contains(err.Error(), "already exists") {
			return err
		}
	}
	if h.count == nil {
		h.count = make(map[string]int)
	}
	h.count[name]++
	return nil
}

func (s *zfsStore) release(ctx context.Context, name string) {
	h := &s.shared.holds
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.count[name]--; h.count[name] > 0 {
		return
	}
	delete(h.count, name)
	_, err := s.zfs.run(ctx, "release", holdTag, name)
	if err != nil && !strings.Contains(err.Error(), "no such tag") {
		s.log.Warn("a hold is still there", "snapshot", name, "tag", holdTag, "error", err)
	}
}

// cursorPrefix begins the names of the bookmarks that say what each receiver has.
const cursorPrefix = "replicate_cursor_"

// receiverKey is the key of the receiver's name in a context.
type receiverKey struct{}

// withReceiver says to which peer a push goes: each has cursors of its own.
func withReceiver(ctx context.Context, peer string) context.Context {
	sum := sha256.Sum256([]byte(peer))
	return context.WithValue(ctx, receiverKey{}, hex.EncodeToString(sum[:4]))
}

// cursorOf is the part of a cursor's name that says whose it is. A receiver that pulls has an identity; one that is pushed to
// is known by its address.
func cursorOf(ctx context.Context) string {
	if identity := rpc.ClientIdentity(ctx); identity != "" {
		return cursorPrefix + identity + "_"
	}
	receiver, _ := ctx.Value(receiverKey{}).(string)
	return cursorPrefix + "push-" + receiver + "_"
}

// SendCompleted moves the cursor: a bookmark of what the receiver has now, from which the next increment can be sent even if
// the snapshot is destroyed meanwhile.
func (s *zfsStore) SendCompleted(ctx context.Context, req *rpc.SendCompletedReq) (*rpc.SendCompletedRes, error) {
	res := new(rpc.SendCompletedRes)
	if !s.zfs.bookmarks || req.OriginalReq == nil || req.OriginalReq.To == nil {
		return res, nil
	}
	dataset, err := s.dataset(req.OriginalReq.Filesystem)
	if err != nil {
		return nil, err
	}
	snapshot, err := s.zfs.find(ctx, dataset, *req.OriginalReq.To)
	if err != nil {
		return nil, err
	}
	prefix := cursorOf(ctx)
	cursor := fmt.Sprintf("%s%016x", prefix, req.OriginalReq.To.GUID)
	if len(dataset)+1+len(cursor) > maxZFSName {
		s.log.Warn("no cursor: its name would be too long", "dataset", dataset)
		return res, nil
	}
	if _, err := s.zfs.run(ctx, "bookmark", snapshot, dataset+"#"+cursor); err != nil && !strings.Contains(err.Error(), "exists") {
		return nil, fmt.Errorf("set the replication cursor: %w", err)
	}
	return res, s.dropCursors(ctx, dataset, prefix, cursor)
}

// dropCursors destroys the bookmarks of the same receiver that the new one replaces.
func (s *zfsStore) dropCursors(ctx context.Context, dataset, prefix, except string) error {
	versions, err := s.zfs.versions(ctx, dataset)
	if err != nil {
		return err
	}
	for _, v := range versions {
		if v.Type != rpc.VersionBookmark || v.Name == except || !isCursor(v, prefix) {
			continue
		}
		if _, err := s.zfs.run(ctx, "destroy", dataset+"#"+v.Name); err != nil && rpc.CodeOf(err) != rpc.NotFound {
			return fmt.Errorf("drop an old replication cursor: %w", err)
		}
	}
	return nil
}

// isCursor tells whether the bookmark is a cursor with that prefix: the GUID is the rest of its name, so that no identity
// that begins with another's is taken for it.
func isCursor(v rpc.FilesystemVersion, prefix string) bool {
	return v.Type == rpc.VersionBookmark && v.Name == fmt.Sprintf("%s%016x", prefix, v.GUID)
}

// ReplicationCursor is the GUID of what the receiver is known to have.
func (s *zfsStore) ReplicationCursor(ctx context.Context, req *rpc.ReplicationCursorReq) (*rpc.ReplicationCursorRes, error) {
	dataset, err := s.dataset(req.Filesystem)
	if err != nil {
		return nil, err
	}
	versions, err := s.zfs.versions(ctx, dataset)
	if err != nil {
		return nil, err
	}
	res := &rpc.ReplicationCursorRes{NotExist: true}
	for _, v := range versions { // the oldest first
		if isCursor(v, cursorOf(ctx)) {
			res = &rpc.ReplicationCursorRes{GUID: v.GUID}
		}
	}
	return res, nil
}
