package main

import (
	"context"
	"fmt"
	"testing"
	"time"

	"example.org/rpc"
	"example.org/rpc/bench/pdupb"
	"google.golang.org/protobuf/proto"
)

// sample is a message for comparisons: all fields set to what a replication would have there.
type sample struct {
	name string
	rpc.Message
	decodeOurs func(data []byte) error // into a receiver of its own, as users do
	theirs     func() proto.Message
}

func decode[T any, M interface {
	*T
	rpc.Message
}](data []byte) error {
	return M(new(T)).UnmarshalBinary(data)
}

func sampleVersion(i int) rpc.FilesystemVersion {
	creation := time.Date(2024, 5, 17, 13, 4, 5, 0, time.UTC).Add(time.Duration(i) * 10 * time.Minute)
	return rpc.FilesystemVersion{Name: "zrepl_" + creation.Format("20060102_150405") + "_000", GUID: 0xdbe3a5b0c1d2e3f4 + uint64(i)<<20, CreateTXG: 48_121_001 + uint64(i)*977, Creation: creation}
}

func samples() []sample {
	from, to := sampleVersion(1), sampleVersion(2)
	config := &rpc.ReplicationConfig{Protection: &rpc.ReplicationConfigProtection{Initial: rpc.GuaranteeResumability, Incremental: rpc.GuaranteeIncrementalReplication}}
	token := "1-16ce2a1e8b-108-789c636064000310a501c49c50360710a715e5e7a69766a63040c1"
	send := &rpc.SendReq{Filesystem: "pool/home/alice", From: &from, To: &to, ResumeToken: token, ReplicationConfig: config}
	full := &rpc.SendReq{Filesystem: "pool/home/alice", To: &to, ReplicationConfig: config}
	var versions rpc.ListFilesystemVersionsRes
	var filesystems, resumable rpc.ListFilesystemRes
	var destroyed rpc.DestroySnapshotsRes
	for i := range 1000 {
		v := sampleVersion(i)
		versions.Versions = append(versions.Versions, v)
		path := fmt.Sprintf("pool/home/user%04d", i)
		filesystems.Filesystems = append(filesystems.Filesystems, rpc.Filesystem{Path: path})
		resumable.Filesystems = append(resumable.Filesystems, rpc.Filesystem{Path: path, ResumeToken: token})
		destroyed.Results = append(destroyed.Results, rpc.DestroySnapshotRes{Snapshot: &v, Error: "dataset is busy"})
	}
	destroy := &rpc.DestroySnapshotsReq{Filesystem: "pool/home/alice", Snapshots: versions.Versions}
	return []sample{
		{"versions1000", &versions, decode[rpc.ListFilesystemVersionsRes], theirs[pdupb.ListFilesystemVersionsRes]},
		{"filesystems1000", &filesystems, decode[rpc.ListFilesystemRes], theirs[pdupb.ListFilesystemRes]},
		{"resumable1000", &resumable, decode[rpc.ListFilesystemRes], theirs[pdupb.ListFilesystemRes]},
		{"destroy1000", destroy, decode[rpc.DestroySnapshotsReq], theirs[pdupb.DestroySnapshotsReq]},
		{"destroyed1000", &destroyed, decode[rpc.DestroySnapshotsRes], theirs[pdupb.DestroySnapshotsRes]},
		{"version", &to, decode[rpc.FilesystemVersion], theirs[pdupb.FilesystemVersion]},
		{"send", send, decode[rpc.SendReq], theirs[pdupb.SendReq]},
		{"send_full", full, decode[rpc.SendReq], theirs[pdupb.SendReq]},
		{"send_completed", &rpc.SendCompletedReq{OriginalReq: send}, decode[rpc.SendCompletedReq], theirs[pdupb.SendCompletedReq]},
		{"receive", &rpc.ReceiveReq{Filesystem: "pool/home/alice", To: &to, ReplicationConfig: config}, decode[rpc.ReceiveReq], theirs[pdupb.ReceiveReq]},
		{"cursor", &rpc.ReplicationCursorRes{GUID: to.GUID}, decode[rpc.ReplicationCursorRes], theirs[pdupb.ReplicationCursorRes]},
		{"send_res", &rpc.SendRes{ExpectedSize: 1 << 33}, decode[rpc.SendRes], theirs[pdupb.SendRes]},
		{"ping", &rpc.PingReq{Message: "hello, are you there?"}, decode[rpc.PingReq], theirs[pdupb.PingReq]},
	}
}

// operation is one thing done in both ways.
type operation struct {
	name         string
	ours, theirs func()
}

func operations(s sample) []operation {
	encoded := must(s.AppendBinary(nil))
	room := make([]byte, 0, len(encoded))
	pb := toProto(s.Message)
	return []operation{
		{"encode", func() { s.AppendBinary(room) }, func() { proto.MarshalOptions{}.MarshalAppend(room, pb) }},
		{"encode_new", func() { s.AppendBinary(nil) }, func() { proto.Marshal(pb) }},
		{"decode", func() { s.decodeOurs(encoded) }, func() { proto.Unmarshal(encoded, s.theirs()) }},
	}
}

// messages compares encoding and decoding with google.golang.org/protobuf, message by message; the worst one counts.
func (b *bench) messages() {
	rows := [][]string{{"", "", "ns", "protobuf, ns", "times as fast"}}
	worst := map[string]spread{}
	var worstAllocs float64
	for _, s := range samples() {
		for _, op := range operations(s) {
			ours, protobuf := b.race(op)
			faster := ours.over(protobuf, speed)
			rows = append(rows, []string{op.name, s.name, number(ours.median(mean) * 1e9), number(protobuf.median(mean) * 1e9), faster.String()})
			if w, ok := worst[op.name]; !ok || faster.median < w.median {
				worst[op.name] = faster
			}
		}
		if ours, protobuf := decodeAllocs(s); ours > 1 || protobuf > 1 { // a message of one string can do no better
			worstAllocs = max(worstAllocs, ours/protobuf)
		}
	}
	b.report.add("Messages", "encode is into a buffer with room, encode_new into none.", rows)
	b.report.atLeast("messages, the worst of all: encode", worst["encode"], 2, "× protobuf")
	b.report.atLeast("messages, the worst of all: encode_new", worst["encode_new"], 2, "× protobuf")
	b.report.atLeast("messages, the worst of all: decode", worst["decode"], 1.5, "× protobuf")
	b.report.atMost("messages, the worst of all: allocations to decode", exactly(worstAllocs), 0.6, "× protobuf")
	b.report.atLeast("messages: versions in one list", exactly(float64(millionVersions())), 1e6, "")
}

// race has both ways do an operation, many times a turn.
func (b *bench) race(op operation) (ours, protobuf result) {
	start := time.Now()
	for range 100 {
		op.theirs()
	}
	times := int(100*b.time/15/time.Since(start)) + 1
	results := b.compete(contestant{"rpc", repeated(times, op.ours)}, contestant{"protobuf", repeated(times, op.theirs)})
	return results[0], results[1]
}

func repeated(times int, f func()) func() turn {
	return func() turn {
		for range times {
			f()
		}
		return turn{amount: float64(times)}
	}
}

// decodeAllocs is how often decoding allocates. The receivers are reused on both sides, so that they do not count.
func decodeAllocs(s sample) (ours, protobuf float64) {
	encoded := must(s.AppendBinary(nil))
	theirs := s.theirs()
	ours = testing.AllocsPerRun(100, func() { s.UnmarshalBinary(encoded) })
	return ours, testing.AllocsPerRun(100, func() { proto.Unmarshal(encoded, theirs) })
}

// millionVersions is how many versions arrive when a call returns a million of them, MaxMessageSize being raised.
func millionVersions() int {
	const raised = 256 << 20
	s := rpc.NewServer(nil, rpc.ServerConfig{MaxMessageSize: raised})
	rpc.HandleCall(s, "versions", func(context.Context, *nothing) (*rpc.ListFilesystemVersionsRes, error) {
		list := make([]rpc.FilesystemVersion, 1e6)
		for i := range list {
			list[i] = sampleVersion(i)
		}
		return &rpc.ListFilesystemVersionsRes{Versions: list}, nil
	})
	l := transport{}.listenRPC()
	go s.Serve(l) // until Close
	defer s.Close()
	c := rpc.NewClient(transport{}.connecter(l.Addr().String()), rpc.ClientConfig{MaxMessageSize: raised})
	defer c.Close()
	var res rpc.ListFilesystemVersionsRes
	check(c.Call(context.Background(), "versions", nil, &res))
	return len(res.Versions)
}

func theirs[T any, M interface {
	*T
	proto.Message
}]() proto.Message {
	return M(new(T))
}

// toProto is the same message as protobuf has it.
func toProto(m rpc.Message) proto.Message {
	switch m := m.(type) {
	case *rpc.ListFilesystemReq:
		return &pdupb.ListFilesystemReq{}
	case *rpc.ListFilesystemRes:
		return &pdupb.ListFilesystemRes{Filesystems: each(m.Filesystems, filesystemProto)}
	case *rpc.Filesystem:
		return filesystemProto(m)
	case *rpc.ListFilesystemVersionsReq:
		return &pdupb.ListFilesystemVersionsReq{Filesystem: m.Filesystem}
	case *rpc.ListFilesystemVersionsRes:
		return &pdupb.ListFilesystemVersionsRes{Versions: each(m.Versions, versionProto)}
	case *rpc.FilesystemVersion:
		return versionProto(m)
	case *rpc.SendReq:
		return sendReqProto(m)
	case *rpc.ReplicationConfig:
		return configProto(m)
	case *rpc.ReplicationConfigProtection:
		return protectionProto(m)
	case *rpc.SendRes:
		return &pdupb.SendRes{UsedResumeToken: m.UsedResumeToken, ExpectedSize: m.ExpectedSize}
	case *rpc.SendCompletedReq:
		return &pdupb.SendCompletedReq{OriginalReq: sendReqProto(m.OriginalReq)}
	case *rpc.SendCompletedRes:
		return &pdupb.SendCompletedRes{}
	case *rpc.ReceiveReq:
		return &pdupb.ReceiveReq{Filesystem: m.Filesystem, To: versionProto(m.To), ClearResumeToken: m.ClearResumeToken, ReplicationConfig: configProto(m.ReplicationConfig)}
	case *rpc.ReceiveRes:
		return &pdupb.ReceiveRes{}
	case *rpc.DestroySnapshotsReq:
		return &pdupb.DestroySnapshotsReq{Filesystem: m.Filesystem, Snapshots: each(m.Snapshots, versionProto)}
	case *rpc.DestroySnapshotsRes:
		return &pdupb.DestroySnapshotsRes{Results: each(m.Results, destroyedProto)}
	case *rpc.DestroySnapshotRes:
		return destroyedProto(m)
	case *rpc.ReplicationCursorReq:
		return &pdupb.ReplicationCursorReq{Filesystem: m.Filesystem}
	case *rpc.ReplicationCursorRes:
		return cursorProto(m)
	case *rpc.PingReq:
		return &pdupb.PingReq{Message: m.Message}
	case *rpc.PingRes:
		return &pdupb.PingRes{Echo: m.Echo}
	}
	panic(fmt.Sprintf("no protobuf for %T", m))
}

func each[A, B any](list []A, f func(*A) *B) []*B {
	var out []*B
	for i := range list {
		out = append(out, f(&list[i]))
	}
	return out
}

func filesystemProto(m *rpc.Filesystem) *pdupb.Filesystem {
	return &pdupb.Filesystem{Path: m.Path, ResumeToken: m.ResumeToken, IsPlaceholder: m.IsPlaceholder}
}

func versionProto(m *rpc.FilesystemVersion) *pdupb.FilesystemVersion {
	if m == nil {
		return nil
	}
	return &pdupb.FilesystemVersion{Type: pdupb.FilesystemVersion_VersionType(m.Type), Name: m.Name, GUID: m.GUID, CreateTXG: m.CreateTXG, Creation: creationText(m.Creation)}
}

func creationText(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339Nano)
}

func sendReqProto(m *rpc.SendReq) *pdupb.SendReq {
	if m == nil {
		return nil
	}
	return &pdupb.SendReq{Filesystem: m.Filesystem, From: versionProto(m.From), To: versionProto(m.To), ResumeToken: m.ResumeToken, ReplicationConfig: configProto(m.ReplicationConfig)}
}

func configProto(m *rpc.ReplicationConfig) *pdupb.ReplicationConfig {
	if m == nil {
		return nil
	}
	return &pdupb.ReplicationConfig{Protection: protectionProto(m.Protection)}
}

func protectionProto(m *rpc.ReplicationConfigProtection) *pdupb.ReplicationConfigProtection {
	if m == nil {
		return nil
	}
	return &pdupb.ReplicationConfigProtection{Initial: pdupb.ReplicationGuaranteeKind(m.Initial), Incremental: pdupb.ReplicationGuaranteeKind(m.Incremental)}
}

func destroyedProto(m *rpc.DestroySnapshotRes) *pdupb.DestroySnapshotRes {
	return &pdupb.DestroySnapshotRes{Snapshot: versionProto(m.Snapshot), Error: m.Error}
}

func cursorProto(m *rpc.ReplicationCursorRes) *pdupb.ReplicationCursorRes {
	switch {
	case m.NotExist:
		return &pdupb.ReplicationCursorRes{Result: &pdupb.ReplicationCursorRes_NotExist{NotExist: true}}
	case m.GUID != 0:
		return &pdupb.ReplicationCursorRes{Result: &pdupb.ReplicationCursorRes_GUID{GUID: m.GUID}}
	}
	return &pdupb.ReplicationCursorRes{}
}
