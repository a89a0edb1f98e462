// Package rpc connects two daemons: an active side, the [Client], that coordinates, and a passive side, the [Server],
// that holds or takes the data. It carries two kinds of traffic to one address:
//
//   - control: many small calls at once over one connection ([Client.Call], [HandleCall]);
//   - data: an io.Reader copied over a connection of its own ([Client.Download], [Client.Upload], [HandleDownload],
//     [HandleUpload]). io.EOF of the source is io.EOF at the sink, any other error of the source reaches the sink as an
//     error, and what was cut short never looks complete.
//
// Connections to labels of the user's own are handed over as they are ([Client.Dial], [Server.HandleLabel]). The service
// that replicates snapshots, as of ZFS, comes with it, typed: [Handler] and the methods of Client that bear its names.
// [ListenTCP] and [ListenTLS] know who connects; any other net.Listener makes a [Listener], any function a [Connecter].
//
// # Protocol, version 1
//
// Integers are big-endian and of fixed width; str8 is a length in one byte, and that many bytes. This is a whole session
// over a control connection, with the call of "ping"; C is what the client sends, S the server:
//
//	C  "ZREPL-RPC 1-1 hb=5000 max=67108864\n"      banner
//	C  "zrepl_control" 00*51                       label
//	C  10 00 0000 00000019                         call: 25 bytes
//	C     0000000000000001 0000000000000000        id 1, no timeout
//	C     04 "ping" 0a 02 "hi"                     method, body (PingReq{Message: "hi"})
//	S  "ZREPL-RPC 1 ok hb=5000 max=67108864\n"     answer
//	S  11 00 0000 0000000d                         reply: 13 bytes
//	S     0000000000000001 00                      id 1, code 0
//	S     0a 02 "hi"                               body (PingRes{Echo: "hi"})
//
// Preface. The client writes a banner and a label, and goes on with frames at once: that costs no round trip. The banner
// names the range of versions spoken, and parameters: hb is the longest silence in ms that the speaker keeps while
// something is in progress (10 to 300000, default 5000), max the largest message body in bytes that it accepts (at
// least 65536, default 67108864); until it has read the answer, a client sends none over 65536. A label is 1 to 64 bytes
// of [a-z0-9_.-], padded with NULs. The server answers with the version and its parameters, or refuses:
//
//	S  "ZREPL-RPC 1-1 refused permission-denied client \"db7\" is not allowed\n"
//
// and half-closes, drains for a second at most, and closes. A line is printable ASCII, at most 512 bytes with its newline,
// with single spaces; unknown parameters are ignored. A malformed banner is answered by closing.
//
// Frames. A header of 8 bytes, type u8, flags u8 = 0, reserved u16 = 0, length u32, then the payload:
//
//	0x01 heartbeat  both
//	0x10 call       C to S   id u64, timeout u64 in ns (0: none), method str8, body
//	0x11 reply      S to C   id u64, code u8, body (code 0) or error text
//	0x12 cancel     C to S   id u64
//	0x13 goaway     S to C   last u64: later calls, or requests counted from 1, were not started and never will be
//	0x20 download   C to S   timeout u64 in ns, endpoint str8, body
//	0x21 upload     C to S   the same
//	0x22 result     S to C   code u8, body (code 0) or error text
//	0x23 data       sender   1 byte to 1 MiB of the stream
//	0x24 end        sender   total u64: the bytes of the whole stream
//	0x25 fail       sender   code u8 (not 0), error text
//
// Anything else is a protocol error, and the connection is closed. Codes are those of gRPC. Error texts are UTF-8 of at
// most 4 KiB.
//
// Control connections (label zrepl_control). Ids rise strictly. Replies come in any order, one for each call that
// goaway did not exclude. After goaway and the last reply the server half-closes.
//
// Data connections (label zrepl_data). One request at a time. A download is answered by a result and, if its code is 0,
// by data frames and end or fail. An upload is followed by data frames and end or fail, and answered by a result; one with
// an error may come early, and ends the connection. A wrong total is data loss, the end of the connection before end
// or fail a failure. Giving up is closing the connection.
//
// Liveness. While something is in progress, or a control connection is open, each side sends a heartbeat when it has sent
// nothing for its hb. A side that listens and hears nothing for three times the other's hb gives the connection up
// ([ErrPeerTimeout]). A stream that stalls for as long as it likes is alive.
//
// The messages of the replication service are encoded as in proto3; pdu.go has the field numbers.
//
// # Limits
//
// Messages have MaxMessageSize (64 MiB); what is longer is an error at the sender and a protocol error at the receiver.
// Memory for a message grows as it arrives. The server holds 64 handshakes, 1024 connections, 256 of them per client, and
// 256 running handlers, unless [ServerConfig] says otherwise. A stream has no limit, and takes less than 128 KiB.
package rpc

import (
	"context"
	"encoding"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"reflect"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

// Limits of the protocol that both sides hold.
const (
	defaultHeartbeat = 5 * time.Second
	minHeartbeat     = 10 * time.Millisecond // less would be spent on heartbeats
	maxHeartbeat     = 5 * time.Minute       // more would leave dead peers unnoticed for a quarter of an hour

	defaultHandshakeTimeout = 10 * time.Second

	tlsRecord = 16 << 10 // the most that one record of TLS carries (RFC 8446, 5.1)

	defaultMessageSize = 64 << 20
	minMessageSize     = 65536                                             // what may be sent before the other side's limit is known
	maxName            = 255                                               // bytes of a method or an endpoint, a str8
	maxFrameFields     = 8 + 8 + 1 + maxName                               // id, timeout and method of a call: the most that stands beside a body
	maxMessageSize     = min(math.MaxUint32, math.MaxInt) - maxFrameFields // a frame's length is a u32
)

// Message is a request or a result. AppendBinary appends the encoded message to b and returns the extended slice;
// UnmarshalBinary replaces the receiver with what data encodes and must copy what it keeps, because data is reused.
type Message interface {
	encoding.BinaryAppender
	encoding.BinaryUnmarshaler
}

// Code says what kind of error an [Error] is. Numbers and meanings are those of the gRPC status codes
// (https://grpc.io/docs/guides/status-codes/).
type Code uint8

// The codes. OK is no error and never the Code of one.
const (
	OK                 Code = 0
	Canceled           Code = 1
	Unknown            Code = 2
	InvalidArgument    Code = 3
	DeadlineExceeded   Code = 4
	NotFound           Code = 5
	AlreadyExists      Code = 6
	PermissionDenied   Code = 7
	ResourceExhausted  Code = 8
	FailedPrecondition Code = 9
	Aborted            Code = 10
	OutOfRange         Code = 11
	Unimplemented      Code = 12
	Internal           Code = 13
	Unavailable        Code = 14
	DataLoss           Code = 15
	Unauthenticated    Code = 16
)

// codeNames are the names that a refusal carries on the wire, by code.
var codeNames = [...]string{
	"ok", "canceled", "unknown", "invalid-argument", "deadline-exceeded", "not-found", "already-exists",
	"permission-denied", "resource-exhausted", "failed-precondition", "aborted", "out-of-range", "unimplemented",
	"internal", "unavailable", "data-loss", "unauthenticated",
}

// String returns the gRPC name of the code in lower case with hyphens, such as "not-found".
func (c Code) String() string {
	if int(c) < len(codeNames) {
		return codeNames[c]
	}
	return "code-" + strconv.Itoa(int(c))
}

// parseCode reads a code's name. A name that it does not know is Unknown, as is "ok": only errors have a name on the wire.
func parseCode(name string) Code {
	for code, known := range codeNames {
		if name == known && code != int(OK) {
			return Code(code)
		}
	}
	if name == "cancelled" { // the spelling of the gRPC specification
		return Canceled
	}
	return Unknown
}

// errorCode is the code of an error as it came from, or goes onto, the wire: never OK, and Unknown if there is no such code.
func errorCode(c Code) Code {
	if c == OK || int(c) >= len(codeNames) {
		return Unknown
	}
	return c
}

// Error is an error that came from, or goes to, the other side.
type Error struct {
	Code    Code
	Message string // the text as the other side gave it: untrusted, may be empty or hold what does not print
}

// Errorf returns an [*Error] with a text as of [fmt.Sprintf], for handlers to return. A handler's error of another type
// reaches the caller with its text and the code that [CodeOf] gives.
func Errorf(code Code, format string, args ...any) error {
	return &Error{Code: errorCode(code), Message: fmt.Sprintf(format, args...)}
}

// Error returns code and message; what does not print is escaped.
func (e *Error) Error() string {
	if e == nil {
		return "rpc: unknown: a nil *Error"
	}
	if e.Message == "" {
		return "rpc: " + e.Code.String() + " (no text)"
	}
	return "rpc: " + e.Code.String() + ": " + printable(e.Message)
}

// Is makes errors.Is(err, context.Canceled) and errors.Is(err, context.DeadlineExceeded) hold for the codes that say so.
func (e *Error) Is(target error) bool {
	return e != nil && (e.Code == Canceled && target == context.Canceled ||
		e.Code == DeadlineExceeded && target == context.DeadlineExceeded)
}

// Timeout tells whether the code is DeadlineExceeded.
func (e *Error) Timeout() bool { return e != nil && e.Code == DeadlineExceeded }

// CodeOf returns what kind of error err is: OK for nil; the code of an [*Error] or a [*HandshakeError] in its chain;
// Unavailable for a connection that was lost or could not be made; Canceled and DeadlineExceeded for the errors of a
// context; otherwise Unknown.
func CodeOf(err error) Code {
	if err == nil {
		return OK
	}
	var op *opError // a net.Error for the sake of its Timeout, whatever is in it
	for errors.As(err, &op) {
		err = op.err
	}
	var remote *Error
	var refused *HandshakeError
	var lost *lostError
	var netErr net.Error
	switch {
	case errors.As(err, &remote) && remote != nil:
		return errorCode(remote.Code)
	case errors.As(err, &refused) && refused != nil:
		return errorCode(refused.Code)
	case errors.As(err, &lost):
		return Unavailable
	case errors.Is(err, context.Canceled):
		return Canceled
	case errors.Is(err, context.DeadlineExceeded):
		return DeadlineExceeded
	case errors.As(err, &netErr), errors.Is(err, ErrClosed), errors.Is(err, io.ErrUnexpectedEOF):
		return Unavailable
	}
	var protocol *ProtocolError
	if errors.As(err, &protocol) {
		return Unavailable
	}
	return Unknown
}

// ProtocolError means that the peer broke the protocol. The connection is gone.
type ProtocolError struct {
	Reason string // what was wrong; the peer's own bytes are quoted and cut
}

// Error says what the peer did.
func (e *ProtocolError) Error() string { return "rpc: protocol error: " + e.Reason }

// HandshakeError means that the server refused the connection: nothing was started.
type HandshakeError struct {
	Code   Code   // why; Unknown for a code that this version does not know
	Reason string // the server's words
	Label  string // what was asked for, such as "zrepl_data"
	Local  string // the versions that this side speaks, such as "1-1"
	Remote string // the versions that the server speaks
}

// Error says who refused what, and which versions both sides speak.
func (e *HandshakeError) Error() string {
	return "rpc: " + e.Label + " refused: " + e.Code.String() + ": " + printable(e.Reason) +
		" (versions: ours " + e.Local + ", the server's " + e.Remote + ")"
}

// ErrClosed is returned by what is used after its Close, or after the server's Shutdown.
var ErrClosed = errors.New("rpc: closed")

// ErrPeerTimeout means that the peer's process or host fell silent: nothing at all was heard from it for three times
// the interval in which it promised to be heard. It is a [net.Error] whose Timeout is true.
var ErrPeerTimeout error = peerTimeout{}

type peerTimeout struct{}

func (peerTimeout) Error() string {
	return "rpc: peer timeout: nothing heard for three heartbeat intervals"
}
func (peerTimeout) Timeout() bool   { return true }
func (peerTimeout) Temporary() bool { return false }

// Logger takes what a Client or a Server has to report. *slog.Logger is one; args are its alternating keys and values.
// It must be safe for concurrent use.
type Logger interface {
	DebugContext(ctx context.Context, msg string, args ...any)
	InfoContext(ctx context.Context, msg string, args ...any)
	WarnContext(ctx context.Context, msg string, args ...any)
	ErrorContext(ctx context.Context, msg string, args ...any)
}

// Stats are counters of a Client or a Server since its start, as they stood at one moment. Connections are those
// whose handshake succeeded.
type Stats struct {
	OpenConns         int64  // connections that are open now
	Conns             uint64 // connections that were opened
	HandshakesRefused uint64 // of a Server: connections that were not admitted; of a Client: that were refused with a reason
	Calls             uint64 // calls that were started
	CallsFailed       uint64 // calls that ended with an error
	Streams           uint64 // downloads and uploads that were started
	StreamsFailed     uint64 // downloads and uploads that did not end well
	BytesRead         uint64 // bytes of frames that were read, headers included; TLS and TCP have more
	BytesWritten      uint64 // bytes of frames that were written
}

// Connecter makes connections to one server. Connect is called from several goroutines at once; the caller closes the
// connection. Deadlines and a Close that unblocks Read and Write must work on it; where it has a CloseWrite, as TCP and
// TLS do, refusals are delivered more reliably.
type Connecter interface {
	Connect(ctx context.Context) (net.Conn, error)
}

// ConnecterFunc makes a function a [Connecter].
type ConnecterFunc func(ctx context.Context) (net.Conn, error)

// Connect calls f.
func (f ConnecterFunc) Connect(ctx context.Context) (net.Conn, error) {
	if f == nil {
		return nil, errors.New("rpc: the ConnecterFunc is nil")
	}
	return f(ctx)
}

// Listener is a net.Listener that knows who connects.
type Listener struct {
	net.Listener

	// Authenticate secures a new connection and says who is at its other end, or why that one may not connect. It is
	// called in a goroutine of the connection's own; ctx ends at the handshake's deadline, and conn is closed then.
	// The identity is fixed from here on: 1 to 255 of the letters, digits and -_.: of ASCII, but not "." or ".."; it is
	// safe as a file name. After an error the peer is told, over secured if that is not nil, otherwise over conn, with the
	// code of an [*Error] or PermissionDenied. Must not be nil.
	Authenticate func(ctx context.Context, conn net.Conn) (secured net.Conn, identity string, err error)
}

// lostError is a connection that could not be made, or that ended before its time. Its code is Unavailable.
type lostError struct {
	what  string // such as "connection lost"
	cause error
}

func (e *lostError) Error() string   { return "rpc: " + e.what + ": " + bareText(e.cause) }
func (e *lostError) Unwrap() error   { return e.cause }
func (e *lostError) Timeout() bool   { return isTimeout(e.cause) }
func (e *lostError) Temporary() bool { return false }

// detailError adds to an error what went wrong with what.
type detailError struct {
	what  string
	cause error
}

func (e *detailError) Error() string { return "rpc: " + e.what + ": " + bareText(e.cause) }
func (e *detailError) Unwrap() error { return e.cause }
func (e *detailError) Timeout() bool { return isTimeout(e.cause) }

// opError says what was being done when err came up.
type opError struct {
	op     string // "call", "download", "upload", "connect"
	target string // the method, the endpoint or the label
	label  string // the connection's label
	peer   string // the peer's address, "" if there is none yet
	fate   string // whether the handler may have run, "" where err says it
	err    error
}

func (e *opError) Error() string {
	s := "rpc: " + e.op + " " + printable(e.target)
	if e.peer != "" {
		s += " at " + e.peer
	}
	if e.label != "" && e.label != e.target {
		s += " (" + e.label + ")"
	}
	s += ": " + bareText(e.err)
	if e.fate != "" {
		s += "; " + e.fate
	}
	return s
}

func (e *opError) Unwrap() error { return e.err }
func (e *opError) Timeout() bool { return isTimeout(e.err) }

// Temporary makes opError a net.Error, so that errors.As finds its Timeout.
func (e *opError) Temporary() bool { return false }

// The fates of a request, for opError.
const (
	fateNotRun = "the handler did not run"
	fateMayRun = "the handler may have run"
)

func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}

// bareText is the text of err without this package's prefix, to stand in another of its errors.
func bareText(err error) string { return strings.TrimPrefix(err.Error(), "rpc: ") }

// printable escapes what does not print in a peer's text.
func printable(s string) string {
	plain := func(r rune) bool { return r == '"' || r == '\\' || strconv.IsPrint(r) && r != utf8.RuneError }
	if strings.IndexFunc(s, func(r rune) bool { return !plain(r) }) < 0 {
		return s
	}
	quoted := strconv.Quote(s)
	return quoted[1 : len(quoted)-1]
}

// maxQuoted is how much of a peer's text logs and errors show: enough to recognise it, too little to flood a log.
const maxQuoted = 128

// quoted is a peer's text for logs and errors: quoted, and cut.
func quoted(s string) string {
	if len(s) > maxQuoted {
		return strconv.QuoteToASCII(s[:maxQuoted]) + "..."
	}
	return strconv.QuoteToASCII(s)
}

// validIdentity tells whether a client may bear the name: it becomes part of paths.
func validIdentity(name string) bool {
	if len(name) < 1 || len(name) > 255 || name == "." || name == ".." {
		return false
	}
	for i := range len(name) {
		if c := name[i]; !isAlnum(c) && !strings.ContainsRune("-_.:", rune(c)) {
			return false
		}
	}
	return true
}

func isAlnum(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
}

// counters are the Stats of a Client or a Server while they change.
type counters struct {
	openConns                                           atomic.Int64
	conns, refused, calls, callsFailed, streams, failed atomic.Uint64
	read, written                                       atomic.Uint64
}

func (c *counters) snapshot() Stats {
	return Stats{
		OpenConns: c.openConns.Load(), Conns: c.conns.Load(), HandshakesRefused: c.refused.Load(),
		Calls: c.calls.Load(), CallsFailed: c.callsFailed.Load(),
		Streams: c.streams.Load(), StreamsFailed: c.failed.Load(),
		BytesRead: c.read.Load(), BytesWritten: c.written.Load(),
	}
}

// appendMessage appends an encoded message; nil is empty.
func appendMessage(b []byte, m Message) ([]byte, error) {
	if isNil(m) {
		return b, nil
	}
	out, err := m.AppendBinary(b)
	switch {
	case err != nil:
		return b, &detailError{"cannot encode the message", err}
	case len(out) < len(b):
		return b, errors.New("rpc: AppendBinary did not append")
	}
	return out, nil
}

// promises are the parameters that one side announces.
type promises struct {
	heartbeat time.Duration // the longest silence that it will keep while something is in progress
	maxBody   int           // the largest message body that it accepts, in bytes
}

// isNil tells whether a value is a nil interface or a nil pointer.
func isNil(value any) bool {
	v := reflect.ValueOf(value)
	return !v.IsValid() || v.Kind() == reflect.Pointer && v.IsNil()
}

// checkLimits says what is wrong with the configuration that Client and Server have in common.
func checkLimits(handshake, heartbeat time.Duration, maxMessage int) error {
	switch {
	case handshake < 0:
		return errors.New("rpc: HandshakeTimeout " + handshake.String() + " is negative")
	case heartbeat < minHeartbeat || heartbeat > maxHeartbeat || heartbeat%time.Millisecond != 0:
		return errors.New("rpc: HeartbeatInterval " + heartbeat.String() + " is not 10ms to 5m in whole milliseconds")
	case maxMessage < minMessageSize || int64(maxMessage) > maxMessageSize:
		return errors.New("rpc: MaxMessageSize " + strconv.Itoa(maxMessage) + " is not 65536 to " +
			strconv.FormatInt(maxMessageSize, 10))
	}
	return nil
}

// silent is the Logger of those who have none.
type silent struct{}

func (silent) DebugContext(context.Context, string, ...any) {}
func (silent) InfoContext(context.Context, string, ...any)  {}
func (silent) WarnContext(context.Context, string, ...any)  {}
func (silent) ErrorContext(context.Context, string, ...any) {}

// orDefault is value, or fallback for the zero value.
func orDefault[T comparable](value, fallback T) T {
	var zero T
	if value == zero {
		return fallback
	}
	return value
}
