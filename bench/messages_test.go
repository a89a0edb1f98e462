package bench

import (
	"bytes"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"example.org/rpc"
	"example.org/rpc/bench/pdupb"
	"google.golang.org/protobuf/proto"
)

var (
	messageSeed   = flag.Uint64("messages.seed", 0, "seed of the random messages; 0: a new one")
	messageRounds = flag.Int("messages.rounds", 0, "how many rounds TestMessageSpeed takes; 0: it is skipped")
)

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

func theirs[T any, M interface {
	*T
	proto.Message
}]() proto.Message {
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

// The budgets of allocations: none to encode where there is room, and to decode at most 0.6 of protobuf's. The receivers
// are reused on both sides, so that they do not count. A message of a single string can do no better than its string.
func TestMessageAllocations(t *testing.T) {
	for _, s := range samples() {
		encoded := encodeOurs(t, s.Message)
		room := make([]byte, 0, len(encoded))
		if n := testing.AllocsPerRun(100, func() { s.AppendBinary(room) }); n != 0 {
			t.Errorf("%s: encoding allocates %v times though there is room", s.name, n)
		}
		m, theirs := s.Message, s.theirs()
		oursAllocs := testing.AllocsPerRun(100, func() { m.UnmarshalBinary(encoded) })
		theirsAllocs := testing.AllocsPerRun(100, func() { proto.Unmarshal(encoded, theirs) })
		t.Logf("%-16s decoding allocates %6v, protobuf %6v: %.2f", s.name, oursAllocs, theirsAllocs, oursAllocs/max(theirsAllocs, 1))
		if budget := 0.6 * theirsAllocs; oursAllocs > budget && (oursAllocs > 1 || theirsAllocs > 1) {
			t.Errorf("%s: decoding allocates %v times, budget %v", s.name, oursAllocs, budget)
		}
	}
}

func BenchmarkMessages(b *testing.B) {
	for _, s := range samples() {
		for _, op := range operations(b, s) {
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

// operation is one thing done in both ways.
type operation struct {
	name         string
	budget       float64 // how many times as fast as protobuf
	ours, theirs func()
}

func operations(t testing.TB, s sample) []operation {
	encoded := encodeOurs(t, s.Message)
	room := make([]byte, 0, len(encoded))
	pb := toProto(s.Message)
	return []operation{
		{"encode", 2, func() { s.AppendBinary(room) }, func() { proto.MarshalOptions{}.MarshalAppend(room, pb) }},
		{"encode_new", 2, func() { s.AppendBinary(nil) }, func() { proto.Marshal(pb) }},
		{"decode", 1.5, func() { s.decodeOurs(encoded) }, func() { proto.Unmarshal(encoded, s.theirs()) }},
	}
}

// TestMessageSpeed prints the medians of interleaved rounds. It judges nothing unless there are enough of them.
func TestMessageSpeed(t *testing.T) {
	if *messageRounds == 0 {
		t.Skip("no -messages.rounds")
	}
	fmt.Fprintf(os.Stderr, "%-10s %-16s %10s %10s %6s\n", "", "", "ours ns", "protobuf", "ratio")
	for _, s := range samples() {
		for _, op := range operations(t, s) {
			oursNs, theirsNs := compare(op, *messageRounds)
			fmt.Fprintf(os.Stderr, "%-10s %-16s %10.0f %10.0f %6.2f\n", op.name, s.name, oursNs, theirsNs, theirsNs/oursNs)
			if *messageRounds >= 9 && theirsNs < op.budget*oursNs {
				t.Errorf("%s %s: %.2f times as fast as protobuf, budget %v", op.name, s.name, theirsNs/oursNs, op.budget)
			}
		}
	}
}

// compare returns the median times of both ways in nanoseconds, of rounds that take turns.
func compare(op operation, rounds int) (ours, theirs float64) {
	times := max(1, int(20*time.Millisecond/max(timed(op.theirs, 3), 1)))
	var a, b []float64
	for range rounds {
		runtime.GC()
		a = append(a, float64(timed(op.ours, times)))
		runtime.GC()
		b = append(b, float64(timed(op.theirs, times)))
	}
	slices.Sort(a)
	slices.Sort(b)
	return a[len(a)/2], b[len(b)/2]
}

// timed is how long f takes, on average, in nanoseconds.
func timed(f func(), times int) time.Duration {
	start := time.Now()
	for range times {
		f()
	}
	return time.Since(start) / time.Duration(times)
}
