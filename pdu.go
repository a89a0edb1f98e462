package rpc

import (
	"encoding/binary"
	"math/bits"
	"strings"
	"time"
	"unicode/utf8"
)

// This file holds the messages of the replication service and their encoding, which is that of Protocol Buffers
// (proto3): fields in the order of their numbers, defaults left out. First come the messages, then the methods of each,
// then the encoder and the decoder that these are made of; last the times. It is kept small in machine code: there is one
// function for each kind of field, and it is not inlined where that gains nothing.

// VersionType is what a [FilesystemVersion] is. Values that have no name here are kept as they came.
type VersionType int32

// The version types.
const (
	VersionSnapshot VersionType = 0
	VersionBookmark VersionType = 1
)

// GuaranteeKind is what a replication step must leave possible. Values that have no name here are kept as they came.
type GuaranteeKind int32

// The guarantees.
const (
	GuaranteeInvalid                GuaranteeKind = 0 // not set
	GuaranteeResumability           GuaranteeKind = 1 // an interrupted step can be resumed
	GuaranteeIncrementalReplication GuaranteeKind = 2 // the next step can be incremental
	GuaranteeNothing                GuaranteeKind = 3 // nothing need be left possible
)

// ListFilesystemReq asks for all filesystems that the caller may see. It has no fields.
type ListFilesystemReq struct{}

// ListFilesystemRes answers a [ListFilesystemReq].
type ListFilesystemRes struct {
	Filesystems []Filesystem // nil if there are none; at most 4 Mi
}

// Filesystem is one filesystem of the other side.
type Filesystem struct {
	Path          string // its full name
	ResumeToken   string // of an interrupted receive; empty: there is none to resume
	IsPlaceholder bool   // it was made only to hold others and has no data of its own
}

// ListFilesystemVersionsReq asks for the snapshots and bookmarks of a filesystem.
type ListFilesystemVersionsReq struct {
	Filesystem string // its full name
}

// ListFilesystemVersionsRes answers a [ListFilesystemVersionsReq].
type ListFilesystemVersionsRes struct {
	Versions []FilesystemVersion // nil if there are none; at most 4 Mi
}

// FilesystemVersion is a snapshot or a bookmark.
type FilesystemVersion struct {
	Type      VersionType
	Name      string    // without the filesystem and without "@" or "#"
	GUID      uint64    // the same on both sides; 0: unknown
	CreateTXG uint64    // the transaction group of its creation, by which versions are ordered; 0: unknown
	Creation  time.Time // of years 0 to 9999, to the nanosecond, decoded as UTC; zero: unknown
}

// SendReq asks for the stream of a version, or in a dry run for its size.
type SendReq struct {
	Filesystem        string             // its full name
	From              *FilesystemVersion // what the stream builds on; nil: nothing, it is a full one
	To                *FilesystemVersion // what is sent; nil: not given
	ResumeToken       string             // resume the stream that it stands for; empty: start one
	ReplicationConfig *ReplicationConfig // nil: not given
}

// ReplicationConfig is how a filesystem is replicated.
type ReplicationConfig struct {
	Protection *ReplicationConfigProtection // nil: not given
}

// ReplicationConfigProtection is what steps must leave possible. The zero value means that it is not set.
type ReplicationConfigProtection struct {
	Initial     GuaranteeKind // of the first, full step
	Incremental GuaranteeKind // of the steps after it
}

// SendRes comes before the stream that a [SendReq] asked for.
type SendRes struct {
	UsedResumeToken bool   // the stream goes on where the token of the request says
	ExpectedSize    uint64 // of the stream, in bytes, an estimate; 0: unknown
}

// SendCompletedReq tells the sender that the receiver has the whole stream.
type SendCompletedReq struct {
	OriginalReq *SendReq // the request that the stream was sent for; nil: not given
}

// SendCompletedRes answers a [SendCompletedReq]. It has no fields.
type SendCompletedRes struct{}

// ReceiveReq comes before a stream to be received.
type ReceiveReq struct {
	Filesystem        string             // where it goes
	To                *FilesystemVersion // what the stream makes; nil: not given
	ClearResumeToken  bool               // drop what an interrupted receive left before this one starts
	ReplicationConfig *ReplicationConfig // nil: not given
}

// ReceiveRes answers a [ReceiveReq] once the stream is received. It has no fields.
type ReceiveRes struct{}

// DestroySnapshotsReq asks to destroy versions of one filesystem.
type DestroySnapshotsReq struct {
	Filesystem string              // its full name
	Snapshots  []FilesystemVersion // nil if there are none; at most 4 Mi
}

// DestroySnapshotsRes answers a [DestroySnapshotsReq].
type DestroySnapshotsRes struct {
	Results []DestroySnapshotRes // one for each version of the request; nil if there are none; at most 4 Mi
}

// DestroySnapshotRes is what became of one version.
type DestroySnapshotRes struct {
	Snapshot *FilesystemVersion // nil: not given
	Error    string             // why it is still there; empty: it is destroyed
}

// ReplicationCursorReq asks up to which version a filesystem is replicated.
type ReplicationCursorReq struct {
	Filesystem string // its full name
}

// ReplicationCursorRes answers a [ReplicationCursorReq] with one of its two fields. To set both is an error.
type ReplicationCursorRes struct {
	GUID     uint64 // of the version; 0: not given
	NotExist bool   // there is no cursor
}

// PingReq asks for an echo.
type PingReq struct {
	Message string // any text
}

// PingRes answers a [PingReq].
type PingRes struct {
	Echo string // the text of the request
}

// AppendBinary returns b: the message has no fields.
func (m *ListFilesystemReq) AppendBinary(b []byte) ([]byte, error) { return b, nil }

// UnmarshalBinary checks data, all of whose fields are unknown.
func (m *ListFilesystemReq) UnmarshalBinary(data []byte) error {
	return onlyText(data, "ListFilesystemReq", "", nil)
}

// AppendBinary appends the encoded message to b.
func (m *ListFilesystemRes) AppendBinary(b []byte) ([]byte, error) {
	var e encoder
	out := e.filesystems(b, 1, "ListFilesystemRes.Filesystems", m.Filesystems)
	return e.result(b, out)
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *ListFilesystemRes) UnmarshalBinary(data []byte) error { return unmarshal(data, m) }

func (m *ListFilesystemRes) merge(d *decoder) {
	outer := d.enter()
	for d.next() {
		if d.number == 1 {
			d.filesystems("ListFilesystemRes.Filesystems", &m.Filesystems)
		}
	}
	d.leave(outer, "ListFilesystemRes")
}

// AppendBinary appends the encoded message to b.
func (m *Filesystem) AppendBinary(b []byte) ([]byte, error) {
	var e encoder
	return e.result(b, m.append(reserve(b, len(m.Path)+len(m.ResumeToken), restOfFilesystem), &e))
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *Filesystem) UnmarshalBinary(data []byte) error { return unmarshal(data, m) }

func (m *Filesystem) append(b []byte, e *encoder) []byte {
	b = e.text(b, 1, "Filesystem.Path", m.Path)
	b = e.text(b, 2, "Filesystem.ResumeToken", m.ResumeToken)
	return appendFlag(b, 3, m.IsPlaceholder)
}

func (m *Filesystem) merge(d *decoder) {
	outer := d.enter()
	for d.next() {
		switch d.number {
		case 1:
			d.text("Filesystem.Path", &m.Path)
		case 2:
			d.text("Filesystem.ResumeToken", &m.ResumeToken)
		case 3:
			d.flag("Filesystem.IsPlaceholder", &m.IsPlaceholder)
		}
	}
	d.leave(outer, "Filesystem")
}

// AppendBinary appends the encoded message to b.
func (m *ListFilesystemVersionsReq) AppendBinary(b []byte) ([]byte, error) {
	return appendOnlyText(b, "ListFilesystemVersionsReq.Filesystem", m.Filesystem)
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *ListFilesystemVersionsReq) UnmarshalBinary(data []byte) error {
	return onlyText(data, "ListFilesystemVersionsReq", "ListFilesystemVersionsReq.Filesystem", &m.Filesystem)
}

// AppendBinary appends the encoded message to b.
func (m *ListFilesystemVersionsRes) AppendBinary(b []byte) ([]byte, error) {
	var e encoder
	out := e.versions(b, 1, "ListFilesystemVersionsRes.Versions", m.Versions)
	return e.result(b, out)
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *ListFilesystemVersionsRes) UnmarshalBinary(data []byte) error { return unmarshal(data, m) }

func (m *ListFilesystemVersionsRes) merge(d *decoder) {
	outer := d.enter()
	for d.next() {
		if d.number == 1 {
			d.versions("ListFilesystemVersionsRes.Versions", &m.Versions)
		}
	}
	d.leave(outer, "ListFilesystemVersionsRes")
}

// AppendBinary appends the encoded message to b.
func (m *FilesystemVersion) AppendBinary(b []byte) ([]byte, error) {
	var e encoder
	texts, rest := m.sizes()
	return e.result(b, m.append(reserve(b, texts, rest), &e))
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *FilesystemVersion) UnmarshalBinary(data []byte) error { return unmarshal(data, m) }

func (m *FilesystemVersion) append(b []byte, e *encoder) []byte {
	b = appendNumber(b, 1, uint64(m.Type))
	b = e.text(b, 2, "FilesystemVersion.Name", m.Name)
	b = appendNumber(b, 3, m.GUID)
	b = appendNumber(b, 4, m.CreateTXG)
	return e.time(b, 5, "FilesystemVersion.Creation", m.Creation)
}

func (m *FilesystemVersion) merge(d *decoder) {
	outer := d.enter()
	for d.next() {
		switch d.number {
		case 1:
			d.enum("FilesystemVersion.Type", (*int32)(&m.Type))
		case 2:
			d.text("FilesystemVersion.Name", &m.Name)
		case 3:
			d.uint("FilesystemVersion.GUID", &m.GUID)
		case 4:
			d.uint("FilesystemVersion.CreateTXG", &m.CreateTXG)
		case 5:
			d.time("FilesystemVersion.Creation", &m.Creation)
		}
	}
	d.leave(outer, "FilesystemVersion")
}

// AppendBinary appends the encoded message to b.
func (m *SendReq) AppendBinary(b []byte) ([]byte, error) {
	var e encoder
	texts, rest := m.sizes()
	return e.result(b, m.append(reserve(b, texts, rest), &e))
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *SendReq) UnmarshalBinary(data []byte) error { return unmarshal(data, m) }

func (m *SendReq) append(b []byte, e *encoder) []byte {
	b = e.text(b, 1, "SendReq.Filesystem", m.Filesystem)
	b = e.version(b, 2, m.From)
	b = e.version(b, 3, m.To)
	b = e.text(b, 4, "SendReq.ResumeToken", m.ResumeToken)
	return e.config(b, 6, m.ReplicationConfig)
}

func (m *SendReq) merge(d *decoder) {
	outer := d.enter()
	for d.next() {
		switch d.number {
		case 1:
			d.text("SendReq.Filesystem", &m.Filesystem)
		case 2:
			d.version("SendReq.From", &m.From)
		case 3:
			d.version("SendReq.To", &m.To)
		case 4:
			d.text("SendReq.ResumeToken", &m.ResumeToken)
		case 6:
			d.config("SendReq.ReplicationConfig", &m.ReplicationConfig)
		}
	}
	d.leave(outer, "SendReq")
}

// AppendBinary appends the encoded message to b.
func (m *ReplicationConfig) AppendBinary(b []byte) ([]byte, error) {
	var e encoder
	return e.result(b, m.append(b, &e))
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *ReplicationConfig) UnmarshalBinary(data []byte) error { return unmarshal(data, m) }

func (m *ReplicationConfig) append(b []byte, e *encoder) []byte {
	if m.Protection == nil {
		return b
	}
	start := len(b)
	return e.closeField(m.Protection.append(openField(b, 1), e), start)
}

func (m *ReplicationConfig) merge(d *decoder) {
	outer := d.enter()
	for d.next() {
		if d.number == 1 {
			d.protection("ReplicationConfig.Protection", &m.Protection)
		}
	}
	d.leave(outer, "ReplicationConfig")
}

// AppendBinary appends the encoded message to b.
func (m *ReplicationConfigProtection) AppendBinary(b []byte) ([]byte, error) {
	var e encoder
	return e.result(b, m.append(b, &e))
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *ReplicationConfigProtection) UnmarshalBinary(data []byte) error { return unmarshal(data, m) }

func (m *ReplicationConfigProtection) append(b []byte, e *encoder) []byte {
	return appendNumber(appendNumber(b, 1, uint64(m.Initial)), 2, uint64(m.Incremental))
}

func (m *ReplicationConfigProtection) merge(d *decoder) {
	outer := d.enter()
	for d.next() {
		switch d.number {
		case 1:
			d.enum("ReplicationConfigProtection.Initial", (*int32)(&m.Initial))
		case 2:
			d.enum("ReplicationConfigProtection.Incremental", (*int32)(&m.Incremental))
		}
	}
	d.leave(outer, "ReplicationConfigProtection")
}

// AppendBinary appends the encoded message to b.
func (m *SendRes) AppendBinary(b []byte) ([]byte, error) {
	return appendNumber(appendFlag(b, 1, m.UsedResumeToken), 2, m.ExpectedSize), nil
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *SendRes) UnmarshalBinary(data []byte) error { return unmarshal(data, m) }

func (m *SendRes) merge(d *decoder) {
	outer := d.enter()
	for d.next() {
		switch d.number {
		case 1:
			d.flag("SendRes.UsedResumeToken", &m.UsedResumeToken)
		case 2:
			d.uint("SendRes.ExpectedSize", &m.ExpectedSize)
		}
	}
	d.leave(outer, "SendRes")
}

// AppendBinary appends the encoded message to b.
func (m *SendCompletedReq) AppendBinary(b []byte) ([]byte, error) {
	var e encoder
	texts, rest := m.OriginalReq.sizes()
	return e.result(b, m.append(reserve(b, texts, rest), &e))
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *SendCompletedReq) UnmarshalBinary(data []byte) error { return unmarshal(data, m) }

func (m *SendCompletedReq) append(b []byte, e *encoder) []byte {
	if m.OriginalReq == nil {
		return b
	}
	start := len(b)
	return e.closeField(m.OriginalReq.append(openField(b, 2), e), start)
}

func (m *SendCompletedReq) merge(d *decoder) {
	outer := d.enter()
	for d.next() {
		if d.number == 2 {
			d.sendReq("SendCompletedReq.OriginalReq", &m.OriginalReq)
		}
	}
	d.leave(outer, "SendCompletedReq")
}

// AppendBinary returns b: the message has no fields.
func (m *SendCompletedRes) AppendBinary(b []byte) ([]byte, error) { return b, nil }

// UnmarshalBinary checks data, all of whose fields are unknown.
func (m *SendCompletedRes) UnmarshalBinary(data []byte) error {
	return onlyText(data, "SendCompletedRes", "", nil)
}

// AppendBinary appends the encoded message to b.
func (m *ReceiveReq) AppendBinary(b []byte) ([]byte, error) {
	var e encoder
	texts, rest := m.To.sizes()
	out := reserve(b, texts+len(m.Filesystem), rest+restOfRequest)
	out = e.text(out, 1, "ReceiveReq.Filesystem", m.Filesystem)
	out = e.version(out, 2, m.To)
	out = appendFlag(out, 3, m.ClearResumeToken)
	out = e.config(out, 4, m.ReplicationConfig)
	return e.result(b, out)
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *ReceiveReq) UnmarshalBinary(data []byte) error { return unmarshal(data, m) }

func (m *ReceiveReq) merge(d *decoder) {
	outer := d.enter()
	for d.next() {
		switch d.number {
		case 1:
			d.text("ReceiveReq.Filesystem", &m.Filesystem)
		case 2:
			d.version("ReceiveReq.To", &m.To)
		case 3:
			d.flag("ReceiveReq.ClearResumeToken", &m.ClearResumeToken)
		case 4:
			d.config("ReceiveReq.ReplicationConfig", &m.ReplicationConfig)
		}
	}
	d.leave(outer, "ReceiveReq")
}

// AppendBinary returns b: the message has no fields.
func (m *ReceiveRes) AppendBinary(b []byte) ([]byte, error) { return b, nil }

// UnmarshalBinary checks data, all of whose fields are unknown.
func (m *ReceiveRes) UnmarshalBinary(data []byte) error { return onlyText(data, "ReceiveRes", "", nil) }

// AppendBinary appends the encoded message to b.
func (m *DestroySnapshotsReq) AppendBinary(b []byte) ([]byte, error) {
	var e encoder
	out := e.text(b, 1, "DestroySnapshotsReq.Filesystem", m.Filesystem)
	out = e.versions(out, 2, "DestroySnapshotsReq.Snapshots", m.Snapshots)
	return e.result(b, out)
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *DestroySnapshotsReq) UnmarshalBinary(data []byte) error { return unmarshal(data, m) }

func (m *DestroySnapshotsReq) merge(d *decoder) {
	outer := d.enter()
	for d.next() {
		switch d.number {
		case 1:
			d.text("DestroySnapshotsReq.Filesystem", &m.Filesystem)
		case 2:
			d.versions("DestroySnapshotsReq.Snapshots", &m.Snapshots)
		}
	}
	d.leave(outer, "DestroySnapshotsReq")
}

// AppendBinary appends the encoded message to b.
func (m *DestroySnapshotsRes) AppendBinary(b []byte) ([]byte, error) {
	var e encoder
	out := e.destroyed(b, 1, "DestroySnapshotsRes.Results", m.Results)
	return e.result(b, out)
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *DestroySnapshotsRes) UnmarshalBinary(data []byte) error { return unmarshal(data, m) }

func (m *DestroySnapshotsRes) merge(d *decoder) {
	outer := d.enter()
	for d.next() {
		if d.number == 1 {
			d.destroyed("DestroySnapshotsRes.Results", &m.Results)
		}
	}
	d.leave(outer, "DestroySnapshotsRes")
}

// AppendBinary appends the encoded message to b.
func (m *DestroySnapshotRes) AppendBinary(b []byte) ([]byte, error) {
	var e encoder
	texts, rest := m.Snapshot.sizes()
	return e.result(b, m.append(reserve(b, texts+len(m.Error), rest+restOfDestroyed), &e))
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *DestroySnapshotRes) UnmarshalBinary(data []byte) error { return unmarshal(data, m) }

func (m *DestroySnapshotRes) append(b []byte, e *encoder) []byte {
	b = e.version(b, 1, m.Snapshot)
	return e.text(b, 2, "DestroySnapshotRes.Error", m.Error)
}

func (m *DestroySnapshotRes) merge(d *decoder) {
	outer := d.enter()
	for d.next() {
		switch d.number {
		case 1:
			d.version("DestroySnapshotRes.Snapshot", &m.Snapshot)
		case 2:
			d.text("DestroySnapshotRes.Error", &m.Error)
		}
	}
	d.leave(outer, "DestroySnapshotRes")
}

// AppendBinary appends the encoded message to b.
func (m *ReplicationCursorReq) AppendBinary(b []byte) ([]byte, error) {
	return appendOnlyText(b, "ReplicationCursorReq.Filesystem", m.Filesystem)
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *ReplicationCursorReq) UnmarshalBinary(data []byte) error {
	return onlyText(data, "ReplicationCursorReq", "ReplicationCursorReq.Filesystem", &m.Filesystem)
}

// AppendBinary appends the encoded message to b.
func (m *ReplicationCursorRes) AppendBinary(b []byte) ([]byte, error) {
	var e encoder
	if m.GUID != 0 && m.NotExist {
		e.fail("ReplicationCursorRes", "both GUID and NotExist are set")
	}
	return e.result(b, appendFlag(appendNumber(b, 1, m.GUID), 2, m.NotExist))
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *ReplicationCursorRes) UnmarshalBinary(data []byte) error { return unmarshal(data, m) }

func (m *ReplicationCursorRes) merge(d *decoder) {
	outer := d.enter()
	for d.next() {
		switch d.number {
		case 1:
			m.NotExist = false // a member of the oneof takes the place of the other
			d.uint("ReplicationCursorRes.GUID", &m.GUID)
		case 2:
			m.GUID = 0
			d.flag("ReplicationCursorRes.NotExist", &m.NotExist)
		}
	}
	d.leave(outer, "ReplicationCursorRes")
}

// AppendBinary appends the encoded message to b.
func (m *PingReq) AppendBinary(b []byte) ([]byte, error) {
	return appendOnlyText(b, "PingReq.Message", m.Message)
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *PingReq) UnmarshalBinary(data []byte) error {
	return onlyText(data, "PingReq", "PingReq.Message", &m.Message)
}

// AppendBinary appends the encoded message to b.
func (m *PingRes) AppendBinary(b []byte) ([]byte, error) {
	return appendOnlyText(b, "PingRes.Echo", m.Echo)
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *PingRes) UnmarshalBinary(data []byte) error {
	return onlyText(data, "PingRes", "PingRes.Echo", &m.Echo)
}

// unmarshal is UnmarshalBinary of any message.
func unmarshal(data []byte, m any) error {
	d := decoder{data: data, end: len(data), pos: len(data), n: uint64(len(data))}
	if d.message(m); d.err != nil {
		(&decoder{}).message(m) // nothing is left
	}
	return d.result()
}

// result is what UnmarshalBinary returns.
func (d *decoder) result() error {
	if d.err != nil {
		return d.err
	}
	return nil
}

// message replaces any message with the one that d starts on. It is a switch and no interface, for the compiler to see
// that d is not kept: then it need not be allocated.
func (d *decoder) message(m any) {
	switch m := m.(type) {
	case *ListFilesystemRes:
		*m = ListFilesystemRes{}
		m.merge(d)
	case *Filesystem:
		*m = Filesystem{}
		m.merge(d)
	case *ListFilesystemVersionsRes:
		*m = ListFilesystemVersionsRes{}
		m.merge(d)
	case *FilesystemVersion:
		*m = FilesystemVersion{}
		m.merge(d)
	case *SendReq:
		*m = SendReq{}
		m.merge(d)
	case *ReplicationConfig:
		*m = ReplicationConfig{}
		m.merge(d)
	case *ReplicationConfigProtection:
		*m = ReplicationConfigProtection{}
		m.merge(d)
	case *SendRes:
		*m = SendRes{}
		m.merge(d)
	case *SendCompletedReq:
		*m = SendCompletedReq{}
		m.merge(d)
	case *ReceiveReq:
		*m = ReceiveReq{}
		m.merge(d)
	case *DestroySnapshotsReq:
		*m = DestroySnapshotsReq{}
		m.merge(d)
	case *DestroySnapshotsRes:
		*m = DestroySnapshotsRes{}
		m.merge(d)
	case *DestroySnapshotRes:
		*m = DestroySnapshotRes{}
		m.merge(d)
	case *ReplicationCursorRes:
		*m = ReplicationCursorRes{}
		m.merge(d)
	}
}

// appendOnlyText and onlyText are the methods of messages that have one string, or nothing: then s is nil.
func appendOnlyText(b []byte, where, s string) ([]byte, error) {
	var e encoder
	return e.result(b, e.text(b, 1, where, s))
}

func onlyText(data []byte, message, where string, s *string) error {
	var text string
	d := decoder{data: data, end: len(data), pos: len(data), n: uint64(len(data))}
	outer := d.enter()
	for d.next() {
		if s != nil && d.number == 1 {
			d.text(where, &text)
		}
	}
	if d.leave(outer, message); d.err != nil {
		text = ""
	}
	if s != nil {
		*s = text
	}
	return d.result()
}

// maxList is the most elements that a list may have, so that what the smallest encoding of one (2 bytes an element) makes
// of the receiver's memory has a bound that does not depend on MaxMessageSize: 256 MiB.
const maxList = 4 << 20

// messageError says what is wrong with a message. Its text holds none of the peer's bytes.
type messageError struct {
	where  string // the message, or the message and the field with a dot between them
	reason string
}

func (e *messageError) Error() string { return "rpc: " + e.where + ": " + e.reason }

// What is wrong with a field, both for the encoder and the decoder.
const (
	reasonUTF8 = "not valid UTF-8"
	reasonList = "a list of more than 4194304 elements"
)

// wireType is how the value of a field is encoded. Groups (3 and 4) were given up before proto3 and are refused.
type wireType uint8

const (
	wireVarint  wireType = 0
	wireFixed64 wireType = 1
	wireBytes   wireType = 2
	wireFixed32 wireType = 5
	wireNone    wireType = 7 // of no field: there was an error
)

// encoder is what appending a field needs beside the slice. It keeps the first error; what was appended then is dropped.
type encoder struct {
	err *messageError

	// The last date that was appended: in a list of versions the next is mostly of the same day.
	date int   // where in the slice it is; 0: nowhere
	day  int64 // since January 1 of the year 0
}

// fail records what is wrong at where; the first to do so wins.
//
//go:noinline
func (e *encoder) fail(where, reason string) {
	if e.err == nil {
		e.err = &messageError{where, reason}
	}
}

// result is what AppendBinary returns: b with the message, or b as it came and why.
//
//go:noinline
func (e *encoder) result(b, extended []byte) ([]byte, error) {
	if e.err != nil {
		return b, e.err
	}
	return extended, nil
}

// text appends a string field.
func (e *encoder) text(b []byte, number byte, where, s string) []byte {
	if s == "" {
		return b
	}
	if !validText([]byte(s)) {
		e.fail(where, reasonUTF8)
	}
	b = appendTag(b, number<<3|byte(wireBytes), uint64(len(s)), len(s))
	start := len(b)
	b = b[:start+len(s)]
	copy(b[start:], s)
	return b
}

// appendNumber appends a number or an enum.
func appendNumber(b []byte, number byte, n uint64) []byte {
	if n == 0 {
		return b
	}
	return appendTag(b, number<<3|byte(wireVarint), n, 0)
}

func appendFlag(b []byte, number byte, set bool) []byte {
	if !set {
		return b
	}
	return appendTag(b, number<<3|byte(wireVarint), 1, 0)
}

// appendTag appends a tag and a number (a value, or the length of one), and sees to it that there is room for what comes behind them. All numbers of
// fields are below 16, so that a tag is one byte.
func appendTag(b []byte, tag byte, n uint64, room int) []byte {
	size := varintSize(n)
	if more := 1 + size + room; more > cap(b)-len(b) {
		b = append(b, make([]byte, more)...)[:len(b)]
	}
	i := len(b) + 1
	b = b[:i+size]
	b[i-1] = tag
	for ; n >= 0x80; i++ {
		b[i] = byte(n) | 0x80
		n >>= 7
	}
	b[i] = byte(n)
	return b
}

func varintSize(n uint64) int { return (bits.Len64(n|1) + 6) / 7 }

// openField starts an embedded message, with one byte of room for its length. What follows is the message, and then
// closeField.
func openField(b []byte, number byte) []byte { return append(b, number<<3|byte(wireBytes), 0) }

// closeField writes the length of the embedded message that openField started at start.
func (e *encoder) closeField(b []byte, start int) []byte {
	if n := len(b) - start - 2; n < 0x80 {
		b[start+1] = byte(n)
		return b
	}
	return e.closeLongField(b, start+2)
}

// closeLongField moves the message at body up, to make room for a length of more than one byte. That is seldom, and
// cheaper than to work out every length beforehand.
func (e *encoder) closeLongField(b []byte, body int) []byte {
	n := uint64(len(b) - body)
	more := varintSize(n) - 1
	b = reserve(b, more, 0)[:len(b)+more]
	copy(b[body+more:], b[body:])
	appendTag(b[:body-2], b[body-2], n, 0) // in place
	e.date = 0
	return b
}

// version appends an embedded version, if there is one.
func (e *encoder) version(b []byte, number byte, m *FilesystemVersion) []byte {
	if m == nil {
		return b
	}
	start := len(b)
	return e.closeField(m.append(openField(b, number), e), start)
}

func (e *encoder) config(b []byte, number byte, m *ReplicationConfig) []byte {
	if m == nil {
		return b
	}
	start := len(b)
	return e.closeField(m.append(openField(b, number), e), start)
}

// sizes returns what the version takes for its texts and for the rest, for reserve.
func (m *FilesystemVersion) sizes() (texts, rest int) {
	if m == nil {
		return 0, 0
	}
	return len(m.Name), restOfVersion
}

//go:noinline
func (m *SendReq) sizes() (texts, rest int) {
	if m == nil {
		return 0, 0
	}
	from, restOfFrom := m.From.sizes()
	to, restOfTo := m.To.sizes()
	return len(m.Filesystem) + from + to + len(m.ResumeToken), restOfRequest + restOfFrom + restOfTo
}

func (e *encoder) versions(b []byte, number byte, where string, list []FilesystemVersion) []byte {
	texts := 0
	for i := range list {
		texts += len(list[i].Name)
	}
	if b = e.list(b, where, len(list), texts, restOfVersion*len(list)); e.err != nil {
		return b
	}
	for i := range list {
		b = e.version(b, number, &list[i])
	}
	return b
}

func (e *encoder) filesystems(b []byte, number byte, where string, list []Filesystem) []byte {
	texts := 0
	for i := range list {
		texts += len(list[i].Path) + len(list[i].ResumeToken)
	}
	if b = e.list(b, where, len(list), texts, restOfFilesystem*len(list)); e.err != nil {
		return b
	}
	for i := range list {
		start := len(b)
		b = e.closeField(list[i].append(openField(b, number), e), start)
	}
	return b
}

func (e *encoder) destroyed(b []byte, number byte, where string, list []DestroySnapshotRes) []byte {
	texts, rest := 0, 0
	for i := range list {
		texts, rest = texts+len(list[i].Error), rest+restOfDestroyed
		if v := list[i].Snapshot; v != nil {
			texts, rest = texts+len(v.Name), rest+restOfVersion
		}
	}
	if b = e.list(b, where, len(list), texts, rest); e.err != nil {
		return b
	}
	for i := range list {
		start := len(b)
		b = e.closeField(list[i].append(openField(b, number), e), start)
	}
	return b
}

// list makes room in b for a list of n elements that have the given sizes, unless that is too long.
func (e *encoder) list(b []byte, where string, n, texts, rest int) []byte {
	if n > maxList {
		e.fail(where, reasonList)
		return b
	}
	return reserve(b, texts, rest)
}

// What messages take beside their texts (tags, lengths, numbers, a time): not the most, but seldom more.
const (
	restOfFilesystem = 8
	restOfVersion    = 48
	restOfRequest    = 24
	restOfDestroyed  = 4
)

// reserve makes room in b for a message whose strings have the length texts, and the rest of which is hardly longer
// than rest, so that nearly always it is allocated once. If only the texts do not fit is it sure that b must grow: where
// there is room for the message, nothing is allocated.
//
//go:noinline
func reserve(b []byte, texts, rest int) []byte {
	if texts > cap(b)-len(b) {
		b = append(b, make([]byte, texts+rest)...)[:len(b)]
	}
	return b
}

// decoder walks over the fields of a message, and of those embedded in it, and keeps the first error: after it next is
// false and nothing is to be used. Where it is, it keeps as numbers: pointers would cost a write barrier each.
//
// It allocates at most 40 bytes for each byte of the message and 2 KiB: an element of a list takes at least 2 bytes on
// the wire and at most 64 in memory, and texts are no longer than they are on the wire, but share blocks.
type decoder struct {
	data []byte // the whole message
	pos  int    // what is read next
	end  int    // where the message that is being read ends, which may be one embedded in another
	err  *messageError

	// The field that next went on to.
	number uint32
	wire   wireType
	n      uint64 // the value of a wireVarint; of another the length of the value, which ends at pos

	element int // how many elements of the list were read; no message has two lists
	block   strings.Builder

	// The last date that was read: in a list of versions the next is mostly of the same day.
	date int   // where in data it is; 0: nowhere
	day  int64 // since January 1 of the year 0
}

// enter goes on to the fields of the message that is the current value. What it returns is for leave. The outermost one
// is entered as if it were embedded in another.
func (d *decoder) enter() (outer int) {
	outer = d.end
	d.pos, d.end = d.pos-int(d.n), d.pos
	return outer
}

// fail records what is wrong at where, and has next find no more; the first to do so wins. If where is empty, leave
// will name the message.
//
//go:noinline
func (d *decoder) fail(where, reason string) {
	if d.err == nil {
		d.err = &messageError{where, reason}
	}
	d.pos, d.wire = len(d.data), wireNone
}

// next goes on to the next field of the message. It is false at the end and after an error.
func (d *decoder) next() bool {
	data, pos := d.data[:d.end], d.pos
	if pos >= len(data) {
		return false
	}
	tag := uint64(data[pos])
	pos++
	if tag >= 0x80 { // it is one byte in all fields that are known
		tag, pos = varint(data, pos-1)
	}
	wire := wireType(tag & 7)
	n := uint64(8)
	switch wire {
	case wireVarint, wireBytes:
		if pos < len(data) && data[pos] < 0x80 {
			n, pos = uint64(data[pos]), pos+1
		} else {
			n, pos = varint(data, pos)
		}
	case wireFixed64:
	case wireFixed32:
		n = 4
	default:
		d.fail("", "a group or an unknown wire type")
		return false
	}
	const maxTag = 1<<32 - 1 // of number 1<<29 - 1
	switch {
	case pos > len(data):
		d.fail("", "a varint that is cut short or has more than 64 bits")
		return false
	case tag>>3 == 0 || tag > maxTag:
		d.fail("", "a field number out of range")
		return false
	case wire != wireVarint:
		if n > uint64(len(data)-pos) {
			d.fail("", "a field that is cut short")
			return false
		}
		pos += int(n)
	}
	d.number, d.wire, d.n, d.pos = uint32(tag>>3), wire, n, pos
	return true
}

// leave goes back to the message around the one that has the given name.
//
//go:noinline
func (d *decoder) leave(outer int, message string) {
	d.end = outer
	if d.err != nil && d.err.where == "" {
		d.err.where = message
	}
}

// varint reads the number at pos and returns where it ends. After an error that is behind the end of data, from where
// on there are only errors.
func varint(data []byte, pos int) (n uint64, end int) {
	for shift := uint(0); pos < len(data) && shift < 64; shift += 7 {
		b := uint64(data[pos])
		pos++
		n |= b & 0x7f << (shift & 63) // which spares the check for 64
		if b < 0x80 {
			if shift == 63 && b > 1 {
				break
			}
			return n, pos
		}
	}
	return 0, len(data) + 1
}

// value is the current field's, if its wire type is wireBytes.
func (d *decoder) value() []byte { return d.data[d.pos-int(d.n) : d.pos] }

// is tells whether the current field has the wire type that it should have.
func (d *decoder) is(wire wireType, where string) bool {
	if d.wire != wire {
		d.fail(where, "the wrong wire type")
		return false
	}
	return true
}

// uint reads a number.
//
//go:noinline
func (d *decoder) uint(where string, n *uint64) {
	if d.is(wireVarint, where) {
		*n = d.n
	}
}

// enum reads an enum, which takes the low 32 bits of a number, as Protocol Buffers have it.
//
//go:noinline
func (d *decoder) enum(where string, e *int32) {
	if d.is(wireVarint, where) {
		*e = int32(d.n)
	}
}

//go:noinline
func (d *decoder) flag(where string, set *bool) {
	if d.is(wireVarint, where) {
		*set = d.n != 0
	}
}

func (d *decoder) text(where string, s *string) {
	if !d.is(wireBytes, where) {
		return
	}
	value := d.value()
	if !validText(value) {
		d.fail(where, reasonUTF8)
		return
	}
	*s = d.keep(value)
}

// keep copies the current value out of the message. Short ones share a block, for fewer allocations, so a string that
// outlives its message holds on to at most textBlock bytes. No block is made for a long string, nor where hardly another
// can come.
func (d *decoder) keep(s []byte) string {
	const textBlock, maxShared = 1024, 256
	if len(s) > d.block.Cap()-d.block.Len() {
		left := len(d.data) - d.pos
		if len(s) > maxShared || 2*len(s) > left {
			return string(s)
		}
		d.block = strings.Builder{}
		d.block.Grow(min(textBlock, len(s)+left))
	}
	start := d.block.Len()
	d.block.Write(s)
	return d.block.String()[start:]
}

// version reads an embedded message. One that comes again is merged into what is there.
func (d *decoder) version(where string, m **FilesystemVersion) {
	if d.is(wireBytes, where) {
		if *m == nil {
			*m = new(FilesystemVersion)
		}
		(*m).merge(d)
	}
}

func (d *decoder) sendReq(where string, m **SendReq) {
	if d.is(wireBytes, where) {
		if *m == nil {
			*m = new(SendReq)
		}
		(*m).merge(d)
	}
}

func (d *decoder) protection(where string, m **ReplicationConfigProtection) {
	if d.is(wireBytes, where) {
		if *m == nil {
			*m = new(ReplicationConfigProtection)
		}
		(*m).merge(d)
	}
}

// config allocates a configuration together with the protection, which is all that can come in it.
func (d *decoder) config(where string, m **ReplicationConfig) {
	if !d.is(wireBytes, where) {
		return
	}
	if *m == nil {
		both := new(struct {
			config     ReplicationConfig
			protection ReplicationConfigProtection
		})
		if *m = &both.config; d.n > 0 && d.value()[0]>>3 == 1 { // the protection comes first
			both.config.Protection = &both.protection
		}
	}
	(*m).merge(d)
}

func (d *decoder) filesystems(where string, list *[]Filesystem) {
	if d.element == 0 {
		*list = make([]Filesystem, d.count(where))
	}
	if d.is(wireBytes, where) {
		d.element++
		(*list)[d.element-1].merge(d)
	}
}

func (d *decoder) versions(where string, list *[]FilesystemVersion) {
	if d.element == 0 {
		*list = make([]FilesystemVersion, d.count(where))
	}
	if d.is(wireBytes, where) {
		d.element++
		(*list)[d.element-1].merge(d)
	}
}

func (d *decoder) destroyed(where string, list *[]DestroySnapshotRes) {
	if d.element == 0 {
		*list = make([]DestroySnapshotRes, d.count(where))
	}
	if d.is(wireBytes, where) {
		d.element++
		(*list)[d.element-1].merge(d)
	}
}

// count returns how many elements the list of which the current field is the first has, for it to be allocated at once; 0
// after an error.
func (d *decoder) count(where string) int {
	number, wire, n, pos := d.number, d.wire, d.n, d.pos
	count := 1
	for d.next() {
		if d.number == number {
			count++
		}
	}
	if count > maxList {
		d.fail(where, reasonList)
	}
	if d.err != nil {
		return 0
	}
	d.number, d.wire, d.n, d.pos = number, wire, n, pos
	return count
}

const highBits = 0x8080808080808080

// validText tells whether s is valid UTF-8. It looks at eight bytes at a time and sees first whether all are ASCII, which
// for a name is three times as fast as package utf8.
func validText(s []byte) bool {
	var all uint64
	if len(s) >= 8 {
		for i := 0; i < len(s)-8; i += 8 {
			all |= binary.LittleEndian.Uint64(s[i:])
		}
		all |= binary.LittleEndian.Uint64(s[len(s)-8:])
	} else {
		for _, b := range s {
			all |= uint64(b)
		}
	}
	return all&highBits == 0 || utf8.Valid(s)
}

const (
	secsOfDay = 24 * 60 * 60
	year0     = -62167219200 // the Unix time of January 1 of the year 0
	year10000 = 253402300800 // and of the year 10000
)

// validTime tells whether a Unix time is in the years 0 to 9999 of UTC, which is what RFC 3339 can write.
func validTime(unix int64) bool { return year0 <= unix && unix < year10000 }

// dateLayout and timeLayout are the parts of a time as of RFC 3339; what follows them are a fraction and the zone.
const (
	dateLayout = "2006-01-02T"
	timeLayout = dateLayout + "15:04:05"
)

// time appends a time as a string field: in UTC, with as few digits of a fraction as it needs.
func (e *encoder) time(b []byte, number byte, where string, t time.Time) []byte {
	if t.IsZero() {
		return b
	}
	unix, fraction := t.Unix(), t.Nanosecond()
	if !validTime(unix) {
		e.fail(where, "a time outside the years 0 to 9999")
		return b
	}
	size := len(timeLayout + "Z")
	if fraction != 0 {
		for size += len(".999999999"); fraction%10 == 0; fraction /= 10 {
			size--
		}
	}
	b = appendTag(b, number<<3|byte(wireBytes), uint64(size), size)
	start := len(b)
	b = b[:start+size]
	s := b[start:]
	copy(s, timeLayout+".000000000Z")
	for i := size - 2; i > len(timeLayout); i-- {
		s[i] = '0' + byte(fraction%10)
		fraction /= 10
	}
	s[size-1] = 'Z'
	day, second := (unix-year0)/secsOfDay, uint32((unix-year0)%secsOfDay)
	if day == e.day && e.date != 0 {
		copy(s, b[e.date:e.date+len(dateLayout)])
	} else {
		putDate(s, day)
		e.date, e.day = start, day
	}
	putDigits(s[11:], second/3600)
	putDigits(s[14:], second/60%60)
	putDigits(s[17:], second%60)
	return b
}

// putDate writes a day, counted from January 1 of the year 0, as a date to the start of s. The arithmetic is that of Neri
// and Schneider, "Euclidean affine functions and their application to calendar algorithms" (2021), with years that start
// in March and 400 years more, so that nothing is negative.
func putDate(s []byte, day int64) {
	const days400, days4 = 146097, 1461 // in as many years
	n := 4*(uint64(day)+days400-60) + 3
	century, n := n/days400, n%days400|3
	product := n * (1<<32/days4 + 1)
	year, dayOfYear := 100*century+product>>32-400, uint64(uint32(product))/(4*(1<<32/days4+1))
	n = 2141*dayOfYear + 197913
	month := n >> 16
	if dayOfYear >= 306 { // since January
		year++
		month -= 12
	}
	putDigits(s, uint32(year/100))
	putDigits(s[2:], uint32(year%100))
	putDigits(s[5:], uint32(month))
	putDigits(s[8:], uint32(n&0xffff/2141+1))
}

// putDigits writes two digits to the start of s.
func putDigits(s []byte, n uint32) { s[0], s[1] = '0'+byte(n/10), '0'+byte(n%10) }

func (d *decoder) time(where string, t *time.Time) {
	if !d.is(wireBytes, where) {
		return
	}
	var ok bool
	if *t, ok = d.parseTime(d.value()); !ok {
		d.fail(where, "not a time as of RFC 3339 in the years 0 to 9999")
	}
}

// parseTime reads a time such as 2006-01-02T15:04:05.999999999+07:00 as of RFC 3339, the current value, and returns it
// in UTC; an empty one is the zero time. It is stricter than time.Parse (two digits for the hour, no comma), and it
// allocates nothing for the zone. Digits after the ninth of the fraction are dropped. Leap seconds are refused, as package
// time has no place for them.
func (d *decoder) parseTime(s []byte) (t time.Time, ok bool) {
	if len(s) == 0 {
		return time.Time{}, true
	}
	if len(s) <= len(timeLayout) || !d.parseDate(s) {
		return time.Time{}, false
	}
	clock, isClock := pairs(s[len(dateLayout):], clockZero, clockMore)
	hour, minute, second := int(clock&0xff), int(clock>>24&0xff), int(clock>>48&0xff)
	nanos, zone := parseFraction(s[len(timeLayout):])
	offset, ok := parseZone(zone)
	unix := year0 + d.day*secsOfDay + int64(hour*3600+minute*60+second-offset)
	if !ok || !isClock || hour > 23 || minute > 59 || second > 59 || !validTime(unix) {
		return time.Time{}, false
	}
	return time.Unix(unix, nanos).UTC(), true
}

// daysBefore is how many days of the year come before a month, if February has 28.
var daysBefore = [...]uint16{1: 0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334, 365}

// parseDate reads the date that the current value starts with, unless it is the last one again.
func (d *decoder) parseDate(s []byte) bool {
	if d.date != 0 && string(s[:len(dateLayout)]) == string(d.data[d.date:d.date+len(dateLayout)]) {
		return true
	}
	date, ok := pairs(s, monthZero, monthMore)
	year, month, day := int(date&0xff*100+date>>16&0xff), int(date>>40&0xff), digits(s, 8)
	if !ok || s[10] != 'T' || month < 1 || month > 12 || day < 1 {
		return false
	}
	leap := 0
	if year%4 == 0 && (year%100 != 0 || year%400 == 0) {
		leap = 1
	}
	before, length := int(daysBefore[month]), int(daysBefore[month+1]-daysBefore[month])
	switch {
	case month == 2:
		length += leap
	case month > 2:
		before += leap
	}
	d.date = d.pos - len(s)
	d.day = int64(year*365 + (year+3)/4 - (year+99)/100 + (year+399)/400 + before + day - 1)
	return day <= length
}

// What pairs takes for a year and a month, "0000-00-", and for "00:00:00": these bytes, the first being the lowest, and
// what lifts a byte over 127 that is more than 9 above, or for a separator any above.
const (
	monthZero, monthMore = 0x2d30302d30303030, 0x7f76767f76767676
	clockZero, clockMore = 0x30303a30303a3030, 0x76767f76767f7676
)

// pairs returns the numbers of two digits that the first eight bytes of s hold, in the bytes where their first digits are,
// and whether s has digits and separators where zero has them. It looks at all of them at once, which is three times as
// fast as one after the other.
func pairs(s []byte, zero, more uint64) (numbers uint64, ok bool) {
	above := binary.LittleEndian.Uint64(s) - zero // a byte that is below its zero has its high bit set now
	return above*10 + above>>8, (above|(above+more))&highBits == 0
}

// digits is the number of two digits at s[i]. If there is none, it is 100: out of every range.
//
//go:noinline
func digits(s []byte, i int) int {
	tens, ones := s[i]-'0', s[i+1]-'0'
	if tens > 9 || ones > 9 {
		return 100
	}
	return int(tens)*10 + int(ones)
}

// parseFraction reads the fraction of a second, which may be missing, and returns what is behind it: nothing, and so no
// zone, if it is wrong.
func parseFraction(s []byte) (nanos int64, rest []byte) {
	if s[0] != '.' {
		return 0, s
	}
	i := 1
	for unit := int64(100_000_000); i < len(s) && '0' <= s[i] && s[i] <= '9'; i++ {
		nanos += int64(s[i]-'0') * unit
		unit /= 10
	}
	if i == 1 {
		return 0, nil
	}
	return nanos, s[i:]
}

// parseZone reads Z or an offset from UTC such as +07:00, which it returns in seconds.
func parseZone(s []byte) (offset int, ok bool) {
	if len(s) == 1 {
		return 0, s[0] == 'Z'
	}
	if len(s) != len("+07:00") || s[0] != '+' && s[0] != '-' || s[3] != ':' {
		return 0, false
	}
	hours, minutes := digits(s, 1), digits(s, 4)
	offset = hours*3600 + minutes*60
	if s[0] == '-' {
		offset = -offset
	}
	return offset, hours <= 23 && minutes <= 59
}

// The names of the service's calls and endpoints.
const (
	methodPing                   = "ping" // also an endpoint for downloads
	methodListFilesystems        = "list_filesystems"
	methodListFilesystemVersions = "list_filesystem_versions"
	methodDestroySnapshots       = "destroy_snapshots"
	methodReplicationCursor      = "replication_cursor"
	methodSendDry                = "send_dry"
	methodSendCompleted          = "send_completed"
	endpointSend                 = "send"
	endpointReceive              = "receive"
)
