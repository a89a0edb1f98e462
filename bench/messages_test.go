package main

import (
	"bytes"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"example.org/rpc"
	"example.org/rpc/bench/pdupb"
	"google.golang.org/protobuf/proto"
)

var messageSeed = flag.Uint64("messages.seed", 0, "seed of the random messages; 0: a new one")

// message is one type of message, here and in google.golang.org/protobuf.
type message struct {
	name   string
	ours   func() rpc.Message
	theirs func() proto.Message
	random func(r *random) rpc.Message
}

var messages = []message{
	{"ListFilesystemReq", ours[rpc.ListFilesystemReq], theirs[pdupb.ListFilesystemReq], func(r *random) rpc.Message { return &rpc.ListFilesystemReq{} }},
	{"ListFilesystemRes", ours[rpc.ListFilesystemRes], theirs[pdupb.ListFilesystemRes], func(r *random) rpc.Message {
		return &rpc.ListFilesystemRes{Filesystems: list(r, r.filesystem)}
	}},
	{"Filesystem", ours[rpc.Filesystem], theirs[pdupb.Filesystem], func(r *random) rpc.Message { m := r.filesystem(); return &m }},
	{"ListFilesystemVersionsReq", ours[rpc.ListFilesystemVersionsReq], theirs[pdupb.ListFilesystemVersionsReq], func(r *random) rpc.Message {
		return &rpc.ListFilesystemVersionsReq{Filesystem: r.text()}
	}},
	{"ListFilesystemVersionsRes", ours[rpc.ListFilesystemVersionsRes], theirs[pdupb.ListFilesystemVersionsRes], func(r *random) rpc.Message {
		return &rpc.ListFilesystemVersionsRes{Versions: list(r, r.version)}
	}},
	{"FilesystemVersion", ours[rpc.FilesystemVersion], theirs[pdupb.FilesystemVersion], func(r *random) rpc.Message { m := r.version(); return &m }},
	{"SendReq", ours[rpc.SendReq], theirs[pdupb.SendReq], func(r *random) rpc.Message { return r.sendReq() }},
	{"ReplicationConfig", ours[rpc.ReplicationConfig], theirs[pdupb.ReplicationConfig], func(r *random) rpc.Message { return r.config() }},
	{"ReplicationConfigProtection", ours[rpc.ReplicationConfigProtection], theirs[pdupb.ReplicationConfigProtection], func(r *random) rpc.Message {
		return r.protection()
	}},
	{"SendRes", ours[rpc.SendRes], theirs[pdupb.SendRes], func(r *random) rpc.Message {
		return &rpc.SendRes{UsedResumeToken: r.coin(), ExpectedSize: r.number()}
	}},
	{"SendCompletedReq", ours[rpc.SendCompletedReq], theirs[pdupb.SendCompletedReq], func(r *random) rpc.Message {
		return &rpc.SendCompletedReq{OriginalReq: maybe(r, r.sendReq)}
	}},
	{"SendCompletedRes", ours[rpc.SendCompletedRes], theirs[pdupb.SendCompletedRes], func(r *random) rpc.Message { return &rpc.SendCompletedRes{} }},
	{"ReceiveReq", ours[rpc.ReceiveReq], theirs[pdupb.ReceiveReq], func(r *random) rpc.Message {
		return &rpc.ReceiveReq{Filesystem: r.text(), To: maybe(r, r.versionPtr), ClearResumeToken: r.coin(), ReplicationConfig: maybe(r, r.config)}
	}},
	{"ReceiveRes", ours[rpc.ReceiveRes], theirs[pdupb.ReceiveRes], func(r *random) rpc.Message { return &rpc.ReceiveRes{} }},
	{"DestroySnapshotsReq", ours[rpc.DestroySnapshotsReq], theirs[pdupb.DestroySnapshotsReq], func(r *random) rpc.Message {
		return &rpc.DestroySnapshotsReq{Filesystem: r.text(), Snapshots: list(r, r.version)}
	}},
	{"DestroySnapshotsRes", ours[rpc.DestroySnapshotsRes], theirs[pdupb.DestroySnapshotsRes], func(r *random) rpc.Message {
		return &rpc.DestroySnapshotsRes{Results: list(r, r.destroyed)}
	}},
	{"DestroySnapshotRes", ours[rpc.DestroySnapshotRes], theirs[pdupb.DestroySnapshotRes], func(r *random) rpc.Message { m := r.destroyed(); return &m }},
	{"ReplicationCursorReq", ours[rpc.ReplicationCursorReq], theirs[pdupb.ReplicationCursorReq], func(r *random) rpc.Message {
		return &rpc.ReplicationCursorReq{Filesystem: r.text()}
	}},
	{"ReplicationCursorRes", ours[rpc.ReplicationCursorRes], theirs[pdupb.ReplicationCursorRes], func(r *random) rpc.Message {
		if r.coin() {
			return &rpc.ReplicationCursorRes{NotExist: true}
		}
		return &rpc.ReplicationCursorRes{GUID: r.number()}
	}},
	{"PingReq", ours[rpc.PingReq], theirs[pdupb.PingReq], func(r *random) rpc.Message { return &rpc.PingReq{Message: r.text()} }},
	{"PingRes", ours[rpc.PingRes], theirs[pdupb.PingRes], func(r *random) rpc.Message { return &rpc.PingRes{Echo: r.text()} }},
}

func ours[T any, M interface {
	*T
	rpc.Message
}]() rpc.Message {
	return M(new(T))
}

// random makes messages: defaults, extremes and the ordinary.
type random struct{ *rand.Rand }

func newRandom(t testing.TB) *random {
	seed := *messageSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("-messages.seed=%d", seed)
	return &random{rand.New(rand.NewPCG(seed, 0))}
}

func (r *random) coin() bool { return r.IntN(2) == 0 }

func (r *random) number() uint64 {
	if r.IntN(4) == 0 {
		return 0
	}
	return r.Uint64() >> r.IntN(64)
}

func (r *random) text() string {
	switch r.IntN(5) {
	case 0:
		return ""
	case 1:
		return strings.Repeat("ä€𝄞\x00", r.IntN(200))
	case 2:
		return strings.Repeat("x", r.IntN(140))
	}
	return "pool/data/" + fmt.Sprint(r.IntN(1e6))
}

func (r *random) enum() int32 {
	if r.IntN(4) == 0 {
		return int32(r.Uint32())
	}
	return r.Int32N(4)
}

func (r *random) creation() time.Time {
	const year0, year10000 = -62167219200, 253402300800
	switch r.IntN(5) {
	case 0:
		return time.Time{}
	case 1:
		return time.Unix(year0+r.Int64N(year10000-year0), r.Int64N(1e9)).In(time.FixedZone("", (r.IntN(2*23*60)-23*60)*60))
	case 2:
		return time.Unix(r.Int64N(2e9), r.Int64N(1e3)*1e6)
	}
	return time.Unix(r.Int64N(2e9), 0)
}

func (r *random) filesystem() rpc.Filesystem {
	return rpc.Filesystem{Path: r.text(), ResumeToken: r.text(), IsPlaceholder: r.coin()}
}

func (r *random) version() rpc.FilesystemVersion {
	return rpc.FilesystemVersion{Type: rpc.VersionType(r.enum()), Name: r.text(), GUID: r.number(), CreateTXG: r.number(), Creation: r.creation()}
}

func (r *random) versionPtr() *rpc.FilesystemVersion { v := r.version(); return &v }

func (r *random) protection() *rpc.ReplicationConfigProtection {
	return &rpc.ReplicationConfigProtection{Initial: rpc.GuaranteeKind(r.enum()), Incremental: rpc.GuaranteeKind(r.enum())}
}

func (r *random) config() *rpc.ReplicationConfig {
	return &rpc.ReplicationConfig{Protection: maybe(r, r.protection)}
}

func (r *random) sendReq() *rpc.SendReq {
	return &rpc.SendReq{Filesystem: r.text(), From: maybe(r, r.versionPtr), To: maybe(r, r.versionPtr), ResumeToken: r.text(), ReplicationConfig: maybe(r, r.config)}
}

func (r *random) destroyed() rpc.DestroySnapshotRes {
	return rpc.DestroySnapshotRes{Snapshot: maybe(r, r.versionPtr), Error: r.text()}
}

func maybe[T any](r *random, f func() *T) *T {
	if r.IntN(4) == 0 {
		return nil
	}
	return f()
}

func list[T any](r *random, f func() T) []T {
	var l []T
	for range r.IntN(5) {
		l = append(l, f())
	}
	return l
}

// canonical rewrites what protobuf leaves to its users as this library does: times are written in UTC with the fewest
// digits, and a member of the oneof that is set to its default is as good as not set.
func canonical(t *testing.T, m proto.Message) proto.Message {
	version := func(v *pdupb.FilesystemVersion) {
		if v.GetCreation() == "" {
			return
		}
		creation, err := time.Parse(time.RFC3339Nano, v.Creation)
		if err != nil {
			t.Errorf("accepted the time %q", v.Creation)
		}
		v.Creation = creationText(creation)
	}
	sendReq := func(m *pdupb.SendReq) { version(m.GetFrom()); version(m.GetTo()) }
	switch m := m.(type) {
	case *pdupb.FilesystemVersion:
		version(m)
	case *pdupb.ListFilesystemVersionsRes:
		for _, v := range m.Versions {
			version(v)
		}
	case *pdupb.SendReq:
		sendReq(m)
	case *pdupb.SendCompletedReq:
		sendReq(m.OriginalReq)
	case *pdupb.ReceiveReq:
		version(m.To)
	case *pdupb.DestroySnapshotsReq:
		for _, v := range m.Snapshots {
			version(v)
		}
	case *pdupb.DestroySnapshotsRes:
		for _, res := range m.Results {
			version(res.Snapshot)
		}
	case *pdupb.DestroySnapshotRes:
		version(m.Snapshot)
	case *pdupb.ReplicationCursorRes:
		if m.GetGUID() == 0 && !m.GetNotExist() {
			m.Result = nil
		}
	}
	return m
}

func encodeOurs(t testing.TB, m rpc.Message) []byte {
	t.Helper()
	b, err := m.AppendBinary(nil)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func encodeTheirs(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Both encoders give the same bytes, and each decoder reads what the other side wrote.
func TestMessagesAgreeWithProtobuf(t *testing.T) {
	r := newRandom(t)
	for _, kind := range messages {
		for range 2000 {
			m := kind.random(r)
			want := toProto(m)
			encoded := encodeOurs(t, m)
			if protoBytes := encodeTheirs(t, want); !bytes.Equal(encoded, protoBytes) {
				t.Fatalf("%s: %+v\nencoded  %x\nprotobuf %x", kind.name, m, encoded, protoBytes)
			}
			got := kind.theirs()
			if err := proto.Unmarshal(encoded, got); err != nil || !proto.Equal(got, want) {
				t.Fatalf("%s: protobuf read %v, %v from %x, want %v", kind.name, got, err, encoded, want)
			}
			back := kind.ours()
			if err := back.UnmarshalBinary(encoded); err != nil || !proto.Equal(toProto(back), want) {
				t.Fatalf("%s: decoded %+v, %v from %x, want %v", kind.name, back, err, encoded, want)
			}
		}
	}
}

// deliberate are the differences from protobuf: known fields of the wrong wire type are refused where protobuf takes
// them for unknown ones; groups, which it skips, are refused; and Creation must be a time.
var deliberate = []string{"the wrong wire type", "a group or an unknown wire type", "not a time"}

// Whatever is accepted protobuf accepts too, with the same meaning; what only protobuf accepts is one of deliberate.
func TestMessagesMutatedAgreeWithProtobuf(t *testing.T) {
	r := newRandom(t)
	var accepted, refused, stricter int
	for _, kind := range messages {
		for range 20_000 {
			data := mutate(r, encodeOurs(t, kind.random(r)), encodeOurs(t, kind.random(r)))
			m, theirs := kind.ours(), kind.theirs()
			err := m.UnmarshalBinary(data)
			protoErr := proto.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(data, theirs)
			switch {
			case err == nil && protoErr == nil:
				accepted++
				if want := canonical(t, theirs); !proto.Equal(toProto(m), want) {
					t.Fatalf("%s: %x\ndecoded  %v\nprotobuf %v", kind.name, data, toProto(m), want)
				}
			case err == nil:
				t.Fatalf("%s: %x: accepted, but protobuf says %v", kind.name, data, protoErr)
			case protoErr != nil:
				refused++
			case !slices.ContainsFunc(deliberate, func(s string) bool { return strings.Contains(err.Error(), s) }):
				t.Fatalf("%s: %x: %v, but protobuf accepts it", kind.name, data, err)
			default:
				stricter++
			}
		}
	}
	t.Logf("accepted by both %d, refused by both %d, refused on purpose %d", accepted, refused, stricter)
	if accepted < 1000 || refused < 1000 {
		t.Error("the mutations are too weak or too strong to tell anything")
	}
}

// mutate changes a few bytes of data, or puts parts of other into it.
func mutate(r *random, data, other []byte) []byte {
	for range r.IntN(4) {
		if len(data) == 0 {
			return append(other, byte(r.Uint32()), byte(r.IntN(4)))
		}
		i := r.IntN(len(data))
		switch r.IntN(6) {
		case 0:
			data[i] = byte(r.Uint32())
		case 1:
			data[i] ^= 1 << r.IntN(8)
		case 2:
			data = slices.Delete(data, i, min(i+1+r.IntN(3), len(data)))
		case 3:
			data = slices.Insert(data, i, byte(r.Uint32()))
		case 4: // both messages, one after the other: lists grow, messages merge
			data = append(data, other...)
		case 5:
			data = data[:i]
		}
	}
	return data
}

// The budgets of allocations: none to encode where there is room, and to decode at most 0.6 of protobuf's. A message of a
// single string can do no better than its string.
func TestMessageAllocations(t *testing.T) {
	for _, s := range samples() {
		encoded := encodeOurs(t, s.Message)
		room := make([]byte, 0, len(encoded))
		if n := testing.AllocsPerRun(100, func() { s.AppendBinary(room) }); n != 0 {
			t.Errorf("%s: encoding allocates %v times though there is room", s.name, n)
		}
		oursAllocs, theirsAllocs := decodeAllocs(s)
		t.Logf("%-16s decoding allocates %6v, protobuf %6v: %.2f", s.name, oursAllocs, theirsAllocs, oursAllocs/max(theirsAllocs, 1))
		if budget := 0.6 * theirsAllocs; oursAllocs > budget && (oursAllocs > 1 || theirsAllocs > 1) {
			t.Errorf("%s: decoding allocates %v times, budget %v", s.name, oursAllocs, budget)
		}
	}
}

func BenchmarkMessages(b *testing.B) {
	for _, s := range samples() {
		for _, op := range operations(s) {
			b.Run(op.name+"/"+s.name+"/ours", func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					op.ours()
				}
			})
			b.Run(op.name+"/"+s.name+"/protobuf", func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					op.theirs()
				}
			})
		}
	}
}
