package rpc

import (
	"encoding/binary"
	"strings"
	"time"
	"unicode/utf8"
)

// This file holds the messages of the replication service and their encoding, which is that of Protocol Buffers
// (proto3): fields in the order of their numbers, defaults left out. First come the messages, each with its methods;
// then the encoder and the decoder that these are made of; last the times.

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
	return noFields(data, "ListFilesystemReq")
}

// AppendBinary appends the encoded message to b.
func (m *ListFilesystemRes) AppendBinary(b []byte) ([]byte, error) {
	var e encoder
	return e.result(b, m.append(reserve(b, m.texts(), restOfFilesystem*len(m.Filesystems)), &e))
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *ListFilesystemRes) UnmarshalBinary(data []byte) error {
	*m = ListFilesystemRes{}
	d := newDecoder(data)
	if m.merge(&d); d.err != nil {
		*m = ListFilesystemRes{}
	}
	return d.result()
}

func (m *ListFilesystemRes) texts() int {
	n := 0
	for i := range m.Filesystems {
		n += m.Filesystems[i].texts()
	}
	return n
}

func (m *ListFilesystemRes) append(b []byte, e *encoder) []byte {
	if len(m.Filesystems) > maxList {
		e.fail("ListFilesystemRes.Filesystems", reasonList)
		return b
	}
	for i := range m.Filesystems {
		start := len(b)
		b = closeField(m.Filesystems[i].append(openField(b, 1), e), start)
	}
	return b
}

func (m *ListFilesystemRes) merge(d *decoder) {
	outer := d.enter()
	m.Filesystems = newList[Filesystem](d.count(1, "ListFilesystemRes.Filesystems"))
	element := 0
	for d.next() {
		if d.number == 1 && d.isMessage("ListFilesystemRes.Filesystems") {
			m.Filesystems[element].merge(d)
			element++
		}
	}
	d.leave(outer, "ListFilesystemRes")
}

// AppendBinary appends the encoded message to b.
func (m *Filesystem) AppendBinary(b []byte) ([]byte, error) {
	var e encoder
	return e.result(b, m.append(reserve(b, m.texts(), restOfFilesystem), &e))
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *Filesystem) UnmarshalBinary(data []byte) error {
	*m = Filesystem{}
	d := newDecoder(data)
	if m.merge(&d); d.err != nil {
		*m = Filesystem{}
	}
	return d.result()
}

func (m *Filesystem) texts() int { return len(m.Path) + len(m.ResumeToken) }

func (m *Filesystem) append(b []byte, e *encoder) []byte {
	b = e.text(b, 1, "Filesystem.Path", m.Path)
	b = e.text(b, 2, "Filesystem.ResumeToken", m.ResumeToken)
	b = appendFlag(b, 3, m.IsPlaceholder)
	return b
}

func (m *Filesystem) merge(d *decoder) {
	outer := d.enter()
	for d.next() {
		switch d.number {
		case 1:
			m.Path = d.text("Filesystem.Path")
		case 2:
			m.ResumeToken = d.text("Filesystem.ResumeToken")
		case 3:
			m.IsPlaceholder = d.flag("Filesystem.IsPlaceholder")
		}
	}
	d.leave(outer, "Filesystem")
}

// AppendBinary appends the encoded message to b.
func (m *ListFilesystemVersionsReq) AppendBinary(b []byte) ([]byte, error) {
	return appendOnlyText(b, "ListFilesystemVersionsReq.Filesystem", m.Filesystem)
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *ListFilesystemVersionsReq) UnmarshalBinary(data []byte) (err error) {
	m.Filesystem, err = onlyText(data, "ListFilesystemVersionsReq", "ListFilesystemVersionsReq.Filesystem")
	return err
}

// AppendBinary appends the encoded message to b.
func (m *ListFilesystemVersionsRes) AppendBinary(b []byte) ([]byte, error) {
	var e encoder
	return e.result(b, m.append(reserve(b, textsOf(m.Versions), restOfVersion*len(m.Versions)), &e))
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *ListFilesystemVersionsRes) UnmarshalBinary(data []byte) error {
	*m = ListFilesystemVersionsRes{}
	d := newDecoder(data)
	if m.merge(&d); d.err != nil {
		*m = ListFilesystemVersionsRes{}
	}
	return d.result()
}

func (m *ListFilesystemVersionsRes) append(b []byte, e *encoder) []byte {
	if len(m.Versions) > maxList {
		e.fail("ListFilesystemVersionsRes.Versions", reasonList)
		return b
	}
	for i := range m.Versions {
		start := len(b)
		b = closeField(m.Versions[i].append(openField(b, 1), e), start)
	}
	return b
}

func (m *ListFilesystemVersionsRes) merge(d *decoder) {
	outer := d.enter()
	m.Versions = newList[FilesystemVersion](d.count(1, "ListFilesystemVersionsRes.Versions"))
	element := 0
	for d.next() {
		if d.number == 1 && d.isMessage("ListFilesystemVersionsRes.Versions") {
			m.Versions[element].merge(d)
			element++
		}
	}
	d.leave(outer, "ListFilesystemVersionsRes")
}

// AppendBinary appends the encoded message to b.
func (m *FilesystemVersion) AppendBinary(b []byte) ([]byte, error) {
	var e encoder
	return e.result(b, m.append(reserve(b, m.texts(), restOfVersion), &e))
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *FilesystemVersion) UnmarshalBinary(data []byte) error {
	*m = FilesystemVersion{}
	d := newDecoder(data)
	if m.merge(&d); d.err != nil {
		*m = FilesystemVersion{}
	}
	return d.result()
}

// texts is the length of the strings in the message, as is that of the others, for reserve.
func (m *FilesystemVersion) texts() int {
	if m == nil {
		return 0
	}
	return len(m.Name)
}

// rest is about what the message takes beside its strings.
func (m *FilesystemVersion) rest() int {
	if m == nil {
		return 0
	}
	return restOfVersion
}

func textsOf(versions []FilesystemVersion) int {
	n := 0
	for i := range versions {
		n += versions[i].texts()
	}
	return n
}

func (m *FilesystemVersion) append(b []byte, e *encoder) []byte {
	b = appendUint(b, 1, uint64(m.Type))
	b = e.text(b, 2, "FilesystemVersion.Name", m.Name)
	b = appendUint(b, 3, m.GUID)
	b = appendUint(b, 4, m.CreateTXG)
	b = e.time(b, 5, "FilesystemVersion.Creation", m.Creation)
	return b
}

func (m *FilesystemVersion) merge(d *decoder) {
	outer := d.enter()
	for d.next() {
		switch d.number {
		case 1:
			m.Type = VersionType(d.uint("FilesystemVersion.Type"))
		case 2:
			m.Name = d.text("FilesystemVersion.Name")
		case 3:
			m.GUID = d.uint("FilesystemVersion.GUID")
		case 4:
			m.CreateTXG = d.uint("FilesystemVersion.CreateTXG")
		case 5:
			m.Creation = d.time("FilesystemVersion.Creation")
		}
	}
	d.leave(outer, "FilesystemVersion")
}

// AppendBinary appends the encoded message to b.
func (m *SendReq) AppendBinary(b []byte) ([]byte, error) {
	var e encoder
	return e.result(b, m.append(reserve(b, m.texts(), m.rest()), &e))
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *SendReq) UnmarshalBinary(data []byte) error {
	*m = SendReq{}
	d := newDecoder(data)
	if m.merge(&d); d.err != nil {
		*m = SendReq{}
	}
	return d.result()
}

func (m *SendReq) texts() int {
	if m == nil {
		return 0
	}
	return len(m.Filesystem) + m.From.texts() + m.To.texts() + len(m.ResumeToken)
}

func (m *SendReq) rest() int {
	if m == nil {
		return 0
	}
	return restOfRequest + m.From.rest() + m.To.rest()
}

func (m *SendReq) append(b []byte, e *encoder) []byte {
	b = e.text(b, 1, "SendReq.Filesystem", m.Filesystem)
	if m.From != nil {
		start := len(b)
		b = closeField(m.From.append(openField(b, 2), e), start)
	}
	if m.To != nil {
		start := len(b)
		b = closeField(m.To.append(openField(b, 3), e), start)
	}
	b = e.text(b, 4, "SendReq.ResumeToken", m.ResumeToken)
	if m.ReplicationConfig != nil {
		start := len(b)
		b = closeField(m.ReplicationConfig.append(openField(b, 6), e), start)
	}
	return b
}

func (m *SendReq) merge(d *decoder) {
	outer := d.enter()
	for d.next() {
		switch d.number {
		case 1:
			m.Filesystem = d.text("SendReq.Filesystem")
		case 2:
			if d.isMessage("SendReq.From") {
				m.From = orNew(m.From)
				m.From.merge(d)
			}
		case 3:
			if d.isMessage("SendReq.To") {
				m.To = orNew(m.To)
				m.To.merge(d)
			}
		case 4:
			m.ResumeToken = d.text("SendReq.ResumeToken")
		case 6:
			if d.isMessage("SendReq.ReplicationConfig") {
				if m.ReplicationConfig == nil {
					m.ReplicationConfig = d.newConfig()
				}
				m.ReplicationConfig.merge(d)
			}
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
func (m *ReplicationConfig) UnmarshalBinary(data []byte) error {
	*m = ReplicationConfig{}
	d := newDecoder(data)
	if m.merge(&d); d.err != nil {
		*m = ReplicationConfig{}
	}
	return d.result()
}

func (m *ReplicationConfig) append(b []byte, e *encoder) []byte {
	if m.Protection != nil {
		start := len(b)
		b = closeField(m.Protection.append(openField(b, 1), e), start)
	}
	return b
}

func (m *ReplicationConfig) merge(d *decoder) {
	outer := d.enter()
	for d.next() {
		if d.number == 1 && d.isMessage("ReplicationConfig.Protection") {
			if m.Protection == nil {
				m.Protection = d.newProtection()
			}
			m.Protection.merge(d)
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
func (m *ReplicationConfigProtection) UnmarshalBinary(data []byte) error {
	*m = ReplicationConfigProtection{}
	d := newDecoder(data)
	if m.merge(&d); d.err != nil {
		*m = ReplicationConfigProtection{}
	}
	return d.result()
}

func (m *ReplicationConfigProtection) append(b []byte, e *encoder) []byte {
	b = appendUint(b, 1, uint64(m.Initial))
	b = appendUint(b, 2, uint64(m.Incremental))
	return b
}

func (m *ReplicationConfigProtection) merge(d *decoder) {
	outer := d.enter()
	for d.next() {
		switch d.number {
		case 1:
			m.Initial = GuaranteeKind(d.uint("ReplicationConfigProtection.Initial"))
		case 2:
			m.Incremental = GuaranteeKind(d.uint("ReplicationConfigProtection.Incremental"))
		}
	}
	d.leave(outer, "ReplicationConfigProtection")
}

// AppendBinary appends the encoded message to b.
func (m *SendRes) AppendBinary(b []byte) ([]byte, error) {
	var e encoder
	return e.result(b, m.append(b, &e))
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *SendRes) UnmarshalBinary(data []byte) error {
	*m = SendRes{}
	d := newDecoder(data)
	if m.merge(&d); d.err != nil {
		*m = SendRes{}
	}
	return d.result()
}

func (m *SendRes) append(b []byte, e *encoder) []byte {
	b = appendFlag(b, 1, m.UsedResumeToken)
	b = appendUint(b, 2, m.ExpectedSize)
	return b
}

func (m *SendRes) merge(d *decoder) {
	outer := d.enter()
	for d.next() {
		switch d.number {
		case 1:
			m.UsedResumeToken = d.flag("SendRes.UsedResumeToken")
		case 2:
			m.ExpectedSize = d.uint("SendRes.ExpectedSize")
		}
	}
	d.leave(outer, "SendRes")
}

// AppendBinary appends the encoded message to b.
func (m *SendCompletedReq) AppendBinary(b []byte) ([]byte, error) {
	var e encoder
	return e.result(b, m.append(reserve(b, m.OriginalReq.texts(), m.OriginalReq.rest()), &e))
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *SendCompletedReq) UnmarshalBinary(data []byte) error {
	*m = SendCompletedReq{}
	d := newDecoder(data)
	if m.merge(&d); d.err != nil {
		*m = SendCompletedReq{}
	}
	return d.result()
}

func (m *SendCompletedReq) append(b []byte, e *encoder) []byte {
	if m.OriginalReq != nil {
		start := len(b)
		b = closeField(m.OriginalReq.append(openField(b, 2), e), start)
	}
	return b
}

func (m *SendCompletedReq) merge(d *decoder) {
	outer := d.enter()
	for d.next() {
		if d.number == 2 && d.isMessage("SendCompletedReq.OriginalReq") {
			m.OriginalReq = orNew(m.OriginalReq)
			m.OriginalReq.merge(d)
		}
	}
	d.leave(outer, "SendCompletedReq")
}

// AppendBinary returns b: the message has no fields.
func (m *SendCompletedRes) AppendBinary(b []byte) ([]byte, error) { return b, nil }

// UnmarshalBinary checks data, all of whose fields are unknown.
func (m *SendCompletedRes) UnmarshalBinary(data []byte) error {
	return noFields(data, "SendCompletedRes")
}

// AppendBinary appends the encoded message to b.
func (m *ReceiveReq) AppendBinary(b []byte) ([]byte, error) {
	var e encoder
	return e.result(b, m.append(reserve(b, len(m.Filesystem)+m.To.texts(), restOfRequest+m.To.rest()), &e))
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *ReceiveReq) UnmarshalBinary(data []byte) error {
	*m = ReceiveReq{}
	d := newDecoder(data)
	if m.merge(&d); d.err != nil {
		*m = ReceiveReq{}
	}
	return d.result()
}

func (m *ReceiveReq) append(b []byte, e *encoder) []byte {
	b = e.text(b, 1, "ReceiveReq.Filesystem", m.Filesystem)
	if m.To != nil {
		start := len(b)
		b = closeField(m.To.append(openField(b, 2), e), start)
	}
	b = appendFlag(b, 3, m.ClearResumeToken)
	if m.ReplicationConfig != nil {
		start := len(b)
		b = closeField(m.ReplicationConfig.append(openField(b, 4), e), start)
	}
	return b
}

func (m *ReceiveReq) merge(d *decoder) {
	outer := d.enter()
	for d.next() {
		switch d.number {
		case 1:
			m.Filesystem = d.text("ReceiveReq.Filesystem")
		case 2:
			if d.isMessage("ReceiveReq.To") {
				m.To = orNew(m.To)
				m.To.merge(d)
			}
		case 3:
			m.ClearResumeToken = d.flag("ReceiveReq.ClearResumeToken")
		case 4:
			if d.isMessage("ReceiveReq.ReplicationConfig") {
				if m.ReplicationConfig == nil {
					m.ReplicationConfig = d.newConfig()
				}
				m.ReplicationConfig.merge(d)
			}
		}
	}
	d.leave(outer, "ReceiveReq")
}

// AppendBinary returns b: the message has no fields.
func (m *ReceiveRes) AppendBinary(b []byte) ([]byte, error) { return b, nil }

// UnmarshalBinary checks data, all of whose fields are unknown.
func (m *ReceiveRes) UnmarshalBinary(data []byte) error { return noFields(data, "ReceiveRes") }

// AppendBinary appends the encoded message to b.
func (m *DestroySnapshotsReq) AppendBinary(b []byte) ([]byte, error) {
	var e encoder
	return e.result(b, m.append(reserve(b, len(m.Filesystem)+textsOf(m.Snapshots), restOfRequest+restOfVersion*len(m.Snapshots)), &e))
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *DestroySnapshotsReq) UnmarshalBinary(data []byte) error {
	*m = DestroySnapshotsReq{}
	d := newDecoder(data)
	if m.merge(&d); d.err != nil {
		*m = DestroySnapshotsReq{}
	}
	return d.result()
}

func (m *DestroySnapshotsReq) append(b []byte, e *encoder) []byte {
	b = e.text(b, 1, "DestroySnapshotsReq.Filesystem", m.Filesystem)
	if len(m.Snapshots) > maxList {
		e.fail("DestroySnapshotsReq.Snapshots", reasonList)
		return b
	}
	for i := range m.Snapshots {
		start := len(b)
		b = closeField(m.Snapshots[i].append(openField(b, 2), e), start)
	}
	return b
}

func (m *DestroySnapshotsReq) merge(d *decoder) {
	outer := d.enter()
	m.Snapshots = newList[FilesystemVersion](d.count(2, "DestroySnapshotsReq.Snapshots"))
	element := 0
	for d.next() {
		switch d.number {
		case 1:
			m.Filesystem = d.text("DestroySnapshotsReq.Filesystem")
		case 2:
			if d.isMessage("DestroySnapshotsReq.Snapshots") {
				m.Snapshots[element].merge(d)
				element++
			}
		}
	}
	d.leave(outer, "DestroySnapshotsReq")
}

// AppendBinary appends the encoded message to b.
func (m *DestroySnapshotsRes) AppendBinary(b []byte) ([]byte, error) {
	var e encoder
	return e.result(b, m.append(reserve(b, m.texts(), (restOfVersion+restOfText)*len(m.Results)), &e))
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *DestroySnapshotsRes) UnmarshalBinary(data []byte) error {
	*m = DestroySnapshotsRes{}
	d := newDecoder(data)
	if m.merge(&d); d.err != nil {
		*m = DestroySnapshotsRes{}
	}
	return d.result()
}

func (m *DestroySnapshotsRes) texts() int {
	n := 0
	for i := range m.Results {
		n += m.Results[i].texts()
	}
	return n
}

func (m *DestroySnapshotsRes) append(b []byte, e *encoder) []byte {
	if len(m.Results) > maxList {
		e.fail("DestroySnapshotsRes.Results", reasonList)
		return b
	}
	for i := range m.Results {
		start := len(b)
		b = closeField(m.Results[i].append(openField(b, 1), e), start)
	}
	return b
}

func (m *DestroySnapshotsRes) merge(d *decoder) {
	outer := d.enter()
	m.Results = newList[DestroySnapshotRes](d.count(1, "DestroySnapshotsRes.Results"))
	element := 0
	for d.next() {
		if d.number == 1 && d.isMessage("DestroySnapshotsRes.Results") {
			m.Results[element].merge(d)
			element++
		}
	}
	d.leave(outer, "DestroySnapshotsRes")
}

// AppendBinary appends the encoded message to b.
func (m *DestroySnapshotRes) AppendBinary(b []byte) ([]byte, error) {
	var e encoder
	return e.result(b, m.append(reserve(b, m.texts(), m.rest()), &e))
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *DestroySnapshotRes) UnmarshalBinary(data []byte) error {
	*m = DestroySnapshotRes{}
	d := newDecoder(data)
	if m.merge(&d); d.err != nil {
		*m = DestroySnapshotRes{}
	}
	return d.result()
}

func (m *DestroySnapshotRes) rest() int { return restOfText + m.Snapshot.rest() }

func (m *DestroySnapshotRes) texts() int { return m.Snapshot.texts() + len(m.Error) }

func (m *DestroySnapshotRes) append(b []byte, e *encoder) []byte {
	if m.Snapshot != nil {
		start := len(b)
		b = closeField(m.Snapshot.append(openField(b, 1), e), start)
	}
	b = e.text(b, 2, "DestroySnapshotRes.Error", m.Error)
	return b
}

func (m *DestroySnapshotRes) merge(d *decoder) {
	outer := d.enter()
	for d.next() {
		switch d.number {
		case 1:
			if d.isMessage("DestroySnapshotRes.Snapshot") {
				m.Snapshot = orNew(m.Snapshot)
				m.Snapshot.merge(d)
			}
		case 2:
			m.Error = d.text("DestroySnapshotRes.Error")
		}
	}
	d.leave(outer, "DestroySnapshotRes")
}

// AppendBinary appends the encoded message to b.
func (m *ReplicationCursorReq) AppendBinary(b []byte) ([]byte, error) {
	return appendOnlyText(b, "ReplicationCursorReq.Filesystem", m.Filesystem)
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *ReplicationCursorReq) UnmarshalBinary(data []byte) (err error) {
	m.Filesystem, err = onlyText(data, "ReplicationCursorReq", "ReplicationCursorReq.Filesystem")
	return err
}

// AppendBinary appends the encoded message to b.
func (m *ReplicationCursorRes) AppendBinary(b []byte) ([]byte, error) {
	var e encoder
	return e.result(b, m.append(b, &e))
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *ReplicationCursorRes) UnmarshalBinary(data []byte) error {
	*m = ReplicationCursorRes{}
	d := newDecoder(data)
	if m.merge(&d); d.err != nil {
		*m = ReplicationCursorRes{}
	}
	return d.result()
}

func (m *ReplicationCursorRes) append(b []byte, e *encoder) []byte {
	if m.GUID != 0 && m.NotExist {
		e.fail("ReplicationCursorRes", "both GUID and NotExist are set")
	}
	b = appendUint(b, 1, m.GUID)
	b = appendFlag(b, 2, m.NotExist)
	return b
}

func (m *ReplicationCursorRes) merge(d *decoder) {
	outer := d.enter()
	for d.next() {
		switch d.number {
		case 1: // a member of the oneof takes the place of the other
			*m = ReplicationCursorRes{GUID: d.uint("ReplicationCursorRes.GUID")}
		case 2:
			*m = ReplicationCursorRes{NotExist: d.flag("ReplicationCursorRes.NotExist")}
		}
	}
	d.leave(outer, "ReplicationCursorRes")
}

// AppendBinary appends the encoded message to b.
func (m *PingReq) AppendBinary(b []byte) ([]byte, error) {
	return appendOnlyText(b, "PingReq.Message", m.Message)
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *PingReq) UnmarshalBinary(data []byte) (err error) {
	m.Message, err = onlyText(data, "PingReq", "PingReq.Message")
	return err
}

// AppendBinary appends the encoded message to b.
func (m *PingRes) AppendBinary(b []byte) ([]byte, error) {
	return appendOnlyText(b, "PingRes.Echo", m.Echo)
}

// UnmarshalBinary replaces m with what data encodes; after an error m is the zero value.
func (m *PingRes) UnmarshalBinary(data []byte) (err error) {
	m.Echo, err = onlyText(data, "PingRes", "PingRes.Echo")
	return err
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
)

// appendOnlyText, onlyText and noFields are the methods of messages that have one string or nothing.
func appendOnlyText(b []byte, where, s string) ([]byte, error) {
	var e encoder
	return e.result(b, e.text(reserve(b, len(s), restOfText), 1, where, s))
}

func onlyText(data []byte, message, where string) (string, error) {
	var s string
	d := newDecoder(data)
	outer := d.enter()
	for d.next() {
		if d.number == 1 {
			s = d.text(where)
		}
	}
	d.leave(outer, message)
	if d.err != nil {
		return "", d.err
	}
	return s, nil
}

func noFields(data []byte, message string) error {
	d := newDecoder(data)
	outer := d.enter()
	for d.next() {
	}
	d.leave(outer, message)
	return d.result()
}

// encoder keeps the first error, so that appending a field is one line. What was appended after an error is dropped.
type encoder struct {
	err error

	// The day of the last time that was appended, and its date: in a list of versions the next is mostly of the same day.
	day  int64 // since January 1 of the year 0
	date [len("2006-01-02T")]byte
}

// fail records what is wrong at where; the first to do so wins.
func (e *encoder) fail(where, reason string) {
	if e.err == nil {
		e.err = &messageError{where, reason}
	}
}

// result is what AppendBinary returns: b with the message, or b as it came and why.
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
	b = appendVarint(appendTag(b, number, wireBytes), uint64(len(s)))
	b = append(b, s...)
	if !validText(b[len(b)-len(s):]) {
		e.fail(where, reasonUTF8)
	}
	return b
}

// time appends a time as a string field.
func (e *encoder) time(b []byte, number byte, where string, t time.Time) []byte {
	if t.IsZero() {
		return b
	}
	if !validTime(t.Unix()) {
		e.fail(where, reasonYear)
		return b
	}
	start := len(b)
	return closeField(e.appendTime(openField(b, number), t), start)
}

func appendFlag(b []byte, number byte, set bool) []byte {
	if !set {
		return b
	}
	return append(appendTag(b, number, wireVarint), 1)
}

func appendUint(b []byte, number byte, n uint64) []byte {
	if n == 0 {
		return b
	}
	return appendVarint(appendTag(b, number, wireVarint), n)
}

// appendTag starts a field. All numbers here are below 16, so that a tag is one byte.
func appendTag(b []byte, number byte, wire wireType) []byte { return append(b, number<<3|byte(wire)) }

func appendVarint(b []byte, n uint64) []byte {
	for n >= 0x80 {
		b = append(b, byte(n)|0x80)
		n >>= 7
	}
	return append(b, byte(n))
}

// openField starts an embedded message, with one byte of room for its length. What follows is the message, and then
// closeField.
func openField(b []byte, number byte) []byte { return append(appendTag(b, number, wireBytes), 0) }

// closeField writes the length of the embedded message that openField started at start.
func closeField(b []byte, start int) []byte {
	n := len(b) - start - 2
	if n >= 0x80 {
		return closeLongField(b, start+2)
	}
	b[start+1] = byte(n)
	return b
}

// closeLongField moves the message at body up, to make room for a length of more than one byte. That is seldom, and
// cheaper than to work out every length beforehand.
func closeLongField(b []byte, body int) []byte {
	n := len(b) - body
	var length [binary.MaxVarintLen64]byte
	more := binary.PutUvarint(length[:], uint64(n)) - 1
	b = append(b, length[:more]...)
	copy(b[body+more:], b[body:body+n])
	copy(b[body-1:], length[:more+1])
	return b
}

// What messages take beside their texts (tags, lengths, numbers, a time): not the most, but seldom more, for reserve.
const (
	restOfText       = 4
	restOfFilesystem = 10
	restOfVersion    = 48
	restOfRequest    = 24 // beside the versions in it
)

// reserve makes room in b for a message whose strings have the length texts, and the rest of which is hardly longer
// than rest, so that nearly always it is allocated once. If only the texts do not fit is it sure that b must grow: where
// there is room for the message, nothing is allocated.
func reserve(b []byte, texts, rest int) []byte {
	if texts <= cap(b)-len(b) {
		return b
	}
	return append(make([]byte, 0, len(b)+texts+rest), b...)
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
	number uint64
	wire   wireType
	n      uint64 // the value of a wireVarint
	start  int    // the value of a wireBytes is data[start:pos]

	// For the strings and the messages to be made, see keep and newConfig.
	textLeft   int // strings can take no more bytes than this
	block      strings.Builder
	protection *ReplicationConfigProtection
}

// newDecoder starts on a message as if it were embedded in another, so that all of them begin with enter.
func newDecoder(data []byte) decoder {
	return decoder{data: data, pos: len(data), end: len(data), textLeft: len(data)}
}

// enter goes on to the fields of the message that is the current value. What it returns is for leave.
func (d *decoder) enter() (outer int) {
	outer = d.end
	d.pos, d.end = d.start, d.pos
	return outer
}

// leave goes back to the message around the one that has the given name.
func (d *decoder) leave(outer int, message string) {
	d.end = outer
	if d.err != nil && d.err.where == "" {
		d.err.where = message
	}
}

// fail records what is wrong at where; the first to do so wins. If where is empty, leave will name the message. It
// returns false, as next then does.
func (d *decoder) fail(where, reason string) bool {
	if d.err == nil {
		d.err = &messageError{where, reason}
	}
	return false
}

// result is what UnmarshalBinary returns.
func (d *decoder) result() error {
	if d.err != nil {
		return d.err
	}
	return nil
}

// next goes on to the next field of the message. It is false at the end and after an error.
func (d *decoder) next() bool {
	if d.pos >= d.end || d.err != nil {
		return false
	}
	data := d.data[:d.end]
	tag, pos := uint64(data[d.pos]), d.pos+1
	if tag >= 0x80 { // it is one byte in all fields that are known
		tag, pos = varint(data, d.pos)
	}
	d.number, d.wire = tag>>3, wireType(tag&7)
	var length uint64 // of the value, if it is no varint
	switch d.wire {
	case wireVarint, wireBytes:
		if pos < len(data) && data[pos] < 0x80 {
			d.n, pos = uint64(data[pos]), pos+1
		} else {
			d.n, pos = varint(data, pos)
		}
		if d.wire == wireBytes {
			length = d.n
		}
	case wireFixed64:
		length = 8
	case wireFixed32:
		length = 4
	default:
		return d.fail("", "a group or an unknown wire type")
	}
	const maxNumber = 1<<29 - 1
	switch {
	case pos > len(data):
		return d.fail("", "a varint that is cut short or has more than 64 bits")
	case d.number < 1 || d.number > maxNumber:
		return d.fail("", "a field number out of range")
	case length > uint64(len(data)-pos):
		return d.fail("", "a field that is cut short")
	}
	d.start, d.pos = pos, pos+int(length)
	return true
}

// varint reads the number at pos and returns where it ends. After an error that is behind the end of data, from where
// on there are only errors.
func varint(data []byte, pos int) (n uint64, end int) {
	if pos > len(data) {
		return 0, pos
	}
	n, size := binary.Uvarint(data[pos:])
	if size <= 0 {
		return 0, len(data) + 1
	}
	return n, pos + size
}

// value is the current field's, if its wire type is wireBytes.
func (d *decoder) value() []byte { return d.data[d.start:d.pos] }

// is tells whether the current field has the wire type that it should have.
func (d *decoder) is(wire wireType, where string) bool {
	return d.wire == wire || d.fail(where, "the wrong wire type")
}

// isMessage tells whether the current field can be a message, for its merge to go on with.
func (d *decoder) isMessage(where string) bool { return d.is(wireBytes, where) }

// uint returns the current field as a number. An enum takes the low 32 bits of it, as Protocol Buffers have it.
func (d *decoder) uint(where string) uint64 {
	if !d.is(wireVarint, where) {
		return 0
	}
	return d.n
}

func (d *decoder) flag(where string) bool { return d.uint(where) != 0 }

func (d *decoder) text(where string) string {
	if !d.is(wireBytes, where) {
		return ""
	}
	if !validText(d.value()) {
		d.fail(where, reasonUTF8)
		return ""
	}
	return d.keep(d.value())
}

func (d *decoder) time(where string) time.Time {
	if !d.is(wireBytes, where) || len(d.value()) == 0 {
		return time.Time{}
	}
	t, ok := parseTime(d.value())
	if !ok {
		d.fail(where, "not a time as of RFC 3339 in the years 0 to 9999")
	}
	return t
}

// keep copies a string out of the message. Short ones share a block, for fewer allocations, so a string that outlives
// its message holds on to at most textBlock bytes.
func (d *decoder) keep(s []byte) string {
	const textBlock, maxShared = 1024, 256
	d.textLeft -= len(s)
	if len(s) > maxShared {
		return string(s)
	}
	if len(s) > d.block.Cap()-d.block.Len() {
		d.block = strings.Builder{}
		d.block.Grow(min(textBlock, len(s)+d.textLeft))
	}
	start := d.block.Len()
	d.block.Write(s)
	return d.block.String()[start:]
}

// count returns how many elements the list with the given number has in the message just entered, for it to be
// allocated at once; 0 after an error.
func (d *decoder) count(number uint64, where string) int {
	start := d.pos
	n := 0
	for d.next() {
		if d.number == number {
			n++
		}
	}
	d.pos = start
	if n > maxList {
		d.fail(where, reasonList)
	}
	if d.err != nil {
		return 0
	}
	return n
}

// validText tells whether s is valid UTF-8. It looks at eight bytes at a time as long as all are ASCII, which for a name is
// three times as fast as package utf8.
func validText(s []byte) bool {
	for len(s) >= 8 && binary.LittleEndian.Uint64(s)&0x8080808080808080 == 0 {
		s = s[8:]
	}
	var all byte
	for _, c := range s[:min(len(s), 8)] {
		all |= c
	}
	return len(s) < 8 && all < 0x80 || utf8.Valid(s)
}

// newList allocates a list of n elements; one of none is nil.
func newList[T any](n int) []T {
	if n == 0 {
		return nil
	}
	return make([]T, n)
}

// orNew returns p, or a new T for it to point to: a message that comes again is merged into what is there.
func orNew[T any](p *T) *T {
	if p == nil {
		return new(T)
	}
	return p
}

// newConfig allocates a configuration together with the protection that nearly always comes in it.
func (d *decoder) newConfig() *ReplicationConfig {
	both := new(struct {
		config     ReplicationConfig
		protection ReplicationConfigProtection
	})
	d.protection = &both.protection
	return &both.config
}

func (d *decoder) newProtection() *ReplicationConfigProtection {
	p := orNew(d.protection)
	d.protection = nil
	return p
}

// reasonYear is why a time can not be encoded.
const reasonYear = "a time outside the years 0 to 9999"

const (
	secsOfDay = 24 * 60 * 60
	year0     = -62167219200 // the Unix time of January 1 of the year 0
	year10000 = 253402300800 // and of the year 10000
)

// validTime tells whether a Unix time is in the years 0 to 9999 of UTC, which is what RFC 3339 can write.
func validTime(unix int64) bool { return year0 <= unix && unix < year10000 }

// appendTime appends a time in UTC as of RFC 3339, with as few digits of a fraction as it needs.
func (e *encoder) appendTime(b []byte, t time.Time) []byte {
	unix := t.Unix() - year0
	if day := unix / secsOfDay; day != e.day || e.date[0] == 0 {
		e.setDate(t.UTC().Date())
		e.day = day
	}
	second := int(unix % secsOfDay)
	b = append(b, e.date[:]...)
	b = append(appendTwoDigits(b, second/3600), ':')
	b = append(appendTwoDigits(b, second/60%60), ':')
	b = appendTwoDigits(b, second%60)
	if nanos := t.Nanosecond(); nanos != 0 {
		b = appendFraction(b, nanos)
	}
	return append(b, 'Z')
}

func (e *encoder) setDate(year int, month time.Month, day int) {
	b := appendTwoDigits(appendTwoDigits(e.date[:0], year/100), year%100)
	b = appendTwoDigits(append(b, '-'), int(month))
	b = appendTwoDigits(append(b, '-'), day)
	copy(e.date[len(b):], "T")
}

func appendFraction(b []byte, nanos int) []byte {
	b = append(b, '.')
	for unit := 100_000_000; nanos != 0; unit /= 10 {
		b = append(b, '0'+byte(nanos/unit))
		nanos %= unit
	}
	return b
}

func appendTwoDigits(b []byte, n int) []byte { return append(b, '0'+byte(n/10), '0'+byte(n%10)) }

// daysBefore is how many days of the year come before a month, and for February and later also a leap day if there is one.
var daysBefore = [...]int{0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334, 365}

// daysSince is how many days a date is after January 1 of the year 0, and whether there is such a date.
func daysSince(year, month, day int) (days int, ok bool) {
	if month < 1 || month > 12 || day < 1 {
		return 0, false
	}
	leap := 0
	if year%4 == 0 && (year%100 != 0 || year%400 == 0) {
		leap = 1
	}
	length := daysBefore[month] - daysBefore[month-1]
	if month == 2 {
		length += leap
	}
	days = year*365 + (year+3)/4 - (year+99)/100 + (year+399)/400 + daysBefore[month-1] + day - 1
	if month > 2 {
		days += leap
	}
	return days, day <= length
}

// parseTime reads a time such as 2006-01-02T15:04:05.999999999+07:00 as of RFC 3339 and returns it in UTC. It is
// stricter than time.Parse (two digits for the hour, no comma), and it allocates nothing for the zone. Digits after the
// ninth of the fraction are dropped. Leap seconds are refused, as package time has no place for them.
func parseTime(s []byte) (t time.Time, ok bool) {
	const layout = "2006-01-02T15:04:05"
	if len(s) <= len(layout) || s[4] != '-' || s[7] != '-' || s[10] != 'T' || s[13] != ':' || s[16] != ':' {
		return time.Time{}, false
	}
	century, year := twoDigits(s), twoDigits(s[2:])
	days, ok := daysSince(century*100+year, twoDigits(s[5:]), twoDigits(s[8:]))
	hour, minute, second := twoDigits(s[11:]), twoDigits(s[14:]), twoDigits(s[17:])
	if !ok || century > 99 || year > 99 || hour > 23 || minute > 59 || second > 59 {
		return time.Time{}, false
	}
	nanos, zone, ok := parseFraction(s[len(layout):])
	if !ok {
		return time.Time{}, false
	}
	offset, ok := parseZone(zone)
	unix := year0 + int64(days)*secsOfDay + int64(hour*3600+minute*60+second-offset)
	if !ok || !validTime(unix) {
		return time.Time{}, false
	}
	return time.Unix(unix, int64(nanos)).UTC(), true
}

// parseFraction reads the fraction of a second, which may be missing, and returns what is behind it.
func parseFraction(s []byte) (nanos int, rest []byte, ok bool) {
	if s[0] != '.' {
		return 0, s, true
	}
	i := 1
	for unit := 100_000_000; i < len(s) && '0' <= s[i] && s[i] <= '9'; i++ {
		nanos += int(s[i]-'0') * unit
		unit /= 10
	}
	return nanos, s[i:], i > 1
}

// parseZone reads Z or an offset from UTC such as +07:00, which it returns in seconds.
func parseZone(s []byte) (offset int, ok bool) {
	if len(s) == 1 {
		return 0, s[0] == 'Z'
	}
	if len(s) != len("+07:00") || s[0] != '+' && s[0] != '-' || s[3] != ':' {
		return 0, false
	}
	hours, minutes := twoDigits(s[1:]), twoDigits(s[4:])
	offset = hours*3600 + minutes*60
	if s[0] == '-' {
		offset = -offset
	}
	return offset, hours <= 23 && minutes <= 59
}

// twoDigits is the number that s starts with. If that is none, it is 100: out of every range.
func twoDigits(s []byte) int {
	tens, ones := s[0]-'0', s[1]-'0'
	if tens > 9 || ones > 9 {
		return 100
	}
	return int(tens)*10 + int(ones)
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
