package rpc

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode/utf8"
)

// frameType is the first byte of a frame. Directions: C is the client, S the server, "sender" the side that the
// stream comes from.
type frameType uint8

const (
	frameHeartbeat frameType = 0x01 // both:   nothing
	frameCall      frameType = 0x10 // C to S: id u64, timeout u64 ns (0: none), method str8, body
	frameReply     frameType = 0x11 // S to C: id u64, code u8, body (code 0) or error text
	frameCancel    frameType = 0x12 // C to S: id u64
	frameGoaway    frameType = 0x13 // S to C: last u64: what is above it was not started and never will be
	frameDownload  frameType = 0x20 // C to S: timeout u64 ns, endpoint str8, body
	frameUpload    frameType = 0x21 // C to S: timeout u64 ns, endpoint str8, body
	frameResult    frameType = 0x22 // S to C: code u8, body or error text
	frameData      frameType = 0x23 // sender: 1 byte to 1 MiB of the stream
	frameEnd       frameType = 0x24 // sender: total u64: the bytes of the whole stream
	frameFail      frameType = 0x25 // sender: code u8, error text
)

const (
	headerSize   = 8       // type u8, flags u8 = 0, reserved u16 = 0, length u32
	maxData      = 1 << 20 // bytes in a data frame: a receiver can buffer one, a sender interleaves heartbeats
	maxErrorText = 4 << 10 // bytes: an error is for people to read

	// lingerTime is how long bytes are read and thrown away before a connection is closed whose peer may still be
	// sending: closing at once would make TCP drop the last words to it.
	lingerTime = time.Second

	// smallBuffer is the read buffer of a connection: small, because idle connections keep it.
	smallBuffer = 2 << 10

	// bodyStep is what is allocated at first for a body: more comes as its bytes arrive.
	bodyStep = 64 << 10

	// batchSize is how much small frames are gathered for one write.
	batchSize = 16 << 10

	// patience is how many of its promised intervals a peer may be silent.
	patience = 3
	// watchesPerInterval is how often silence is looked for in one interval.
	watchesPerInterval = 4
)

var batchBuffers = sync.Pool{New: func() any { return new([batchSize]byte) }}

// frameHeader is a frame's header after its checks.
type frameHeader struct {
	kind frameType
	size int // of the payload, in bytes
}

// errInterrupted is what a read returns after interrupt.
var errInterrupted = errors.New("rpc: interrupted")

// frameConn sends and receives frames over a connection and watches over its life. One goroutine at a time reads;
// any may write. The first cause of its end is the one that everybody gets.
type frameConn struct {
	nc        net.Conn
	peer      string // the address of the other end
	stats     *counters
	ours      promises
	raw       interface{ bytesRead() uint64 } // counts bytes below TLS, whose records come late; may be nil
	socket    syscall.RawConn                 // beneath nc, nil if there is none
	encrypted bool                            // there is TLS between nc and socket
	over      overWriter                      // nc, if it is one
	started   time.Time                       // what times below are relative to

	// theirs are the peer's promises: set once, by the reader, before it reads a frame.
	theirs promises

	// Owned by the reader.
	buf     []byte
	small   []byte // the small one while buf is a large one
	r, w    int    // buf[r:w] is read but not consumed
	readErr error
	name    []byte // of the latest request
	splice  spliceState

	answered  chan struct{} // of a server: closed when its answer is written; nil for a client
	writing   chan struct{} // the write lock, a channel so that waiting for it can be given up
	held      []byte        // frames that wait for others; guarded by the write lock
	scratch   []byte        // ends with the frames that are about to be written, and may be spoilt; nil for others
	lastWrite atomic.Int64  // when the last write ended
	begun     atomic.Bool   // what is said first was written

	deadlineMu  sync.Mutex // guards SetReadDeadline against interrupt
	interrupted bool

	pulseMu sync.Mutex // never held during I/O
	pulse   pulseState

	read      atomic.Uint64 // bytes
	listening atomic.Bool   // a Read of nc is under way

	endMu sync.Mutex
	cause error
	done  chan struct{} // closed when cause is set
}

// pulseState is guarded by pulseMu.
type pulseState struct {
	on        bool
	timer     *time.Timer   // left running when the pulse stops: requests follow each other more closely than beats
	fires     time.Duration // when the timer does; 0: it is not set
	nextWatch time.Duration
	heard     uint64 // bytes read at the last watch
	quiet     int    // watches in a row at which the reader waited and nothing had come
}

func newFrameConn(nc net.Conn, ours promises, stats *counters) *frameConn {
	c := &frameConn{
		nc: nc, peer: addrString(nc.RemoteAddr()), ours: ours, stats: stats, started: time.Now(),
		buf: make([]byte, smallBuffer), writing: make(chan struct{}, 1), done: make(chan struct{}),
	}
	c.raw, _ = nc.(interface{ bytesRead() uint64 })
	c.over, _ = nc.(overWriter)
	c.findSocket()
	return c
}

// overWriter is a connection that can write b[from:] faster if it may spoil b.
type overWriter interface {
	writeOver(b []byte, from int) (int, error)
}

func addrString(a net.Addr) string {
	if a == nil {
		return ""
	}
	return a.String()
}

// fail ends the connection for the given cause, unless it has ended before, and returns the cause of the end.
func (c *frameConn) fail(cause error) error {
	c.endMu.Lock()
	first := c.cause == nil
	if first {
		c.cause = cause
		close(c.done)
	}
	cause = c.cause
	c.endMu.Unlock()
	if first {
		c.stopTimer()
		// Below TLS first: tls.Conn.Close waits up to five seconds to send an alert through a full pipe.
		if t, ok := c.nc.(interface{ NetConn() net.Conn }); ok && !errors.Is(cause, errPolite) {
			t.NetConn().Close()
		}
		c.nc.Close()
	}
	return cause
}

// errGoaway is why a request was not started by a server that stops.
var errGoaway = &Error{Code: Unavailable, Message: "the server is shutting down"}

// errNoReturn is the error for a handler whose goroutine has ended in it.
var errNoReturn = &Error{Code: Internal, Message: "the handler did not return"}

// errPolite is the cause of an end that both sides expect.
var errPolite error = &lostError{what: "connection closed", cause: net.ErrClosed}

// close ends a connection on which nothing is in progress.
func (c *frameConn) close() { c.fail(errPolite) }

// ended returns the cause of the connection's end, nil while it lives.
func (c *frameConn) ended() error {
	c.endMu.Lock()
	defer c.endMu.Unlock()
	return c.cause
}

// lost ends the connection for an error of reading or writing it. An EOF where none belongs is io.ErrUnexpectedEOF.
func (c *frameConn) lost(err error) error {
	return c.fail(&lostError{what: "connection lost", cause: noEOF(err)})
}

// violation ends the connection because the peer broke the protocol.
func (c *frameConn) violation(reason string) error {
	return c.fail(&ProtocolError{Reason: reason})
}

// shutWrite tells the peer that nothing more will come. It keeps the write lock for good.
func (c *frameConn) shutWrite() {
	if c.write(nil) == nil && c.lockWrites() == nil {
		closeWrite(c.nc)
	}
}

func closeWrite(nc net.Conn) {
	if w, ok := nc.(interface{ CloseWrite() error }); ok {
		w.CloseWrite()
	}
}

// linger closes the sending direction, throws away what still comes for a short time, and closes. A peer that does not
// read cannot hold it up.
func (c *frameConn) linger() {
	c.nc.SetWriteDeadline(time.Now().Add(lingerTime))
	c.shutWrite()
	discard(c.nc, math.MaxInt64)
	c.close()
}

// discard reads and throws away what still comes, for a short time.
func discard(nc net.Conn, most int64) {
	nc.SetReadDeadline(time.Now().Add(lingerTime))
	io.Copy(io.Discard, io.LimitReader(nc, most))
}

// write sends whole frames. A write that fails, or of which a part was sent, ends the connection.
func (c *frameConn) write(frames []byte) error {
	_, err := c.writeTouching(frames)
	return err
}

// writeTouching is write; it tells whether some of the frames may have been written.
func (c *frameConn) writeTouching(frames []byte) (touched bool, err error) {
	if err := c.lockWrites(); err != nil {
		return false, err
	}
	return c.writeLocked(frames)
}

// lockWrites takes the write lock, unless the connection has ended.
func (c *frameConn) lockWrites() error {
	select {
	case c.writing <- struct{}{}: // nearly always, and cheaper than to wait for two
		return nil
	default:
	}
	select {
	case c.writing <- struct{}{}:
		return nil
	case <-c.done:
		return c.ended()
	}
}

// writeSoon is write for frames that others are likely to follow at once, to share a system call with: they are held
// back until the goroutine that spawn starts comes to it, or somebody writes. An error is one of the connection, and
// what is written later gets it, too.
func (c *frameConn) writeSoon(frames []byte, spawn func(func())) error {
	if err := c.lockWrites(); err != nil {
		return err
	}
	if len(c.held)+len(frames) > batchSize {
		_, err := c.writeLocked(frames)
		return err
	}
	first := c.held == nil
	if first {
		c.held = batchBuffers.Get().(*[batchSize]byte)[:0]
	}
	c.held = append(c.held, frames...)
	<-c.writing
	if first {
		spawn(c.flushHeld)
	}
	return nil
}

func (c *frameConn) flushHeld() {
	if runtime.Gosched(); c.lockWrites() == nil {
		c.writeLocked(nil)
	}
}

// writeLocked writes for who holds the write lock, and releases it unless that fails. What is held back goes first.
func (c *frameConn) writeLocked(frames []byte) (touched bool, err error) {
	scratch := c.scratch
	c.scratch = nil
	if held := c.held; held != nil {
		c.held = nil
		defer batchBuffers.Put((*[batchSize]byte)(held[:batchSize]))
		if len(held)+len(frames) <= batchSize {
			frames, scratch = append(held, frames...), nil
		} else if touched, err = c.writeOut(held, nil); err != nil {
			return touched, err
		}
	}
	if len(frames) > 0 {
		touched, err = c.writeOut(frames, scratch)
	}
	if err == nil {
		<-c.writing
	}
	return touched, err
}

// writeOut writes some whole frames, which scratch ends with if it is not nil. After an error the write lock stays taken.
func (c *frameConn) writeOut(frames, scratch []byte) (touched bool, err error) {
	var n int
	if scratch != nil {
		n, err = c.over.writeOver(scratch, len(scratch)-len(frames))
	} else {
		n, err = c.nc.Write(frames)
	}
	c.lastWrite.Store(int64(time.Since(c.started)))
	c.begun.Store(true)
	c.stats.written.Add(uint64(max(n, 0)))
	if err == nil && n != len(frames) {
		err = io.ErrShortWrite
	}
	if err == nil {
		return true, nil
	}
	// The lock stays taken: nothing may follow half a frame. Why a server left may be on its way to the client's reader.
	if c.answered == nil && c.listening.Load() {
		c.awaitEnd(lingerTime)
	}
	// A TLS connection that writes several records at once does not know which the peer has; half a record is none.
	return n != 0 || c.raw != nil && len(frames) > tlsRecord, c.lost(err)
}

// writeEndOf is write for the frames that b ends with, from there on. It spoils b.
func (c *frameConn) writeEndOf(b []byte, from int) error {
	if err := c.lockWrites(); err != nil {
		return err
	}
	if c.over != nil {
		c.scratch = b
	}
	_, err := c.writeLocked(b[from:])
	return err
}

// awaitEnd waits for the connection's end, but not for long.
func (c *frameConn) awaitEnd(most time.Duration) {
	timer := time.NewTimer(most)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-c.done:
	}
}

// awaitAnswered returns when the answer of a server is written: before that, nothing is acted on. When it cannot be
// written, the connection has ended.
func (c *frameConn) awaitAnswered() error {
	<-c.answered
	select {
	case <-c.done:
		return c.ended()
	default:
		return nil
	}
}

// startPulse begins to send heartbeats and to watch for the peer's: something is in progress.
func (c *frameConn) startPulse() {
	c.pulseMu.Lock()
	defer c.pulseMu.Unlock()
	if c.pulse.on {
		return
	}
	now := time.Since(c.started)
	c.pulse.on, c.pulse.quiet, c.pulse.heard = true, 0, c.heard()
	c.pulse.nextWatch = c.nextWatch(now)
	c.setTimer(now)
}

// stopPulse ends heartbeats and watching: nothing is in progress any more.
func (c *frameConn) stopPulse() {
	c.pulseMu.Lock()
	defer c.pulseMu.Unlock()
	c.pulse.on = false
}

// stopTimer lets go of the connection: it has ended.
func (c *frameConn) stopTimer() {
	c.pulseMu.Lock()
	defer c.pulseMu.Unlock()
	if c.pulse.timer != nil {
		c.pulse.timer.Stop()
	}
}

// setPromises takes note of what the peer announced. Before that it is not watched.
func (c *frameConn) setPromises(theirs promises) {
	c.pulseMu.Lock()
	defer c.pulseMu.Unlock()
	c.theirs = theirs
	if c.pulse.on {
		now := time.Since(c.started)
		c.pulse.nextWatch = c.nextWatch(now)
		c.setTimer(now)
	}
}

// setTimer sees to it that beat is called when something is due. The caller holds pulseMu.
func (c *frameConn) setTimer(now time.Duration) {
	wait := c.nextPulse(now)
	switch p := &c.pulse; {
	case p.fires != 0 && p.fires <= now+wait:
		return
	case p.timer == nil:
		p.timer = time.AfterFunc(wait, c.beat)
	default:
		p.timer.Reset(wait)
	}
	c.pulse.fires = now + wait
}

// nextWatch is when silence is to be looked for. The caller holds pulseMu.
func (c *frameConn) nextWatch(now time.Duration) time.Duration {
	if c.theirs.heartbeat == 0 {
		return math.MaxInt64
	}
	return now + c.theirs.heartbeat/watchesPerInterval
}

// nextPulse is the time until a heartbeat is due or silence is looked for. The caller holds pulseMu.
func (c *frameConn) nextPulse(now time.Duration) time.Duration {
	due := time.Duration(c.lastWrite.Load()) + c.ours.heartbeat
	if due <= now { // a write is under way; it counts when it ends
		due = now + c.ours.heartbeat
	}
	return max(0, min(due, c.pulse.nextWatch)-now)
}

// beat is called by the timer, in a goroutine of its own. The next one is set before anything is written: a write
// that blocks must not hold up the watch.
func (c *frameConn) beat() {
	c.pulseMu.Lock()
	c.pulse.fires = 0
	if !c.pulse.on || c.ended() != nil {
		c.pulseMu.Unlock()
		return
	}
	now := time.Since(c.started)
	dead := c.watch(now)
	due := now >= time.Duration(c.lastWrite.Load())+c.ours.heartbeat
	c.setTimer(now)
	c.pulseMu.Unlock()
	if dead {
		c.fail(&lostError{what: "connection lost", cause: ErrPeerTimeout})
		return
	}
	if due {
		c.writeHeartbeat()
	}
}

// watch tells whether the peer has been silent for too long while the reader listened. Silent watches are counted,
// not time, so that a pause of this process is not taken for silence of the other. The caller holds pulseMu.
func (c *frameConn) watch(now time.Duration) (dead bool) {
	p := &c.pulse
	if now < p.nextWatch {
		return false
	}
	p.nextWatch = c.nextWatch(now)
	heard := c.heard()
	if heard != p.heard || !c.listening.Load() {
		p.heard, p.quiet = heard, 0
		return false
	}
	p.quiet++
	return p.quiet > patience*watchesPerInterval
}

// heard counts the bytes that came.
func (c *frameConn) heard() uint64 {
	if c.raw != nil {
		return c.raw.bytesRead()
	}
	return c.read.Load()
}

// writeHeartbeat sends one unless a write is under way: its bytes are as good.
func (c *frameConn) writeHeartbeat() {
	select {
	case c.writing <- struct{}{}:
		if !c.begun.Load() { // the preface comes first
			<-c.writing
			return
		}
		c.writeLocked([]byte{byte(frameHeartbeat), 0, 0, 0, 0, 0, 0, 0})
	default:
	}
}

// setReadDeadline is that of the connection, except that it cannot undo an interrupt. The zero time is none.
func (c *frameConn) setReadDeadline(t time.Time) {
	c.deadlineMu.Lock()
	defer c.deadlineMu.Unlock()
	if !c.interrupted {
		c.nc.SetReadDeadline(t)
	}
}

// interrupt makes reads return errInterrupted, now and until resume.
func (c *frameConn) interrupt() {
	c.deadlineMu.Lock()
	defer c.deadlineMu.Unlock()
	c.interrupted = true
	c.nc.SetReadDeadline(time.Unix(1, 0))
}

// resume undoes interrupt and takes away the deadline.
func (c *frameConn) resume() {
	c.deadlineMu.Lock()
	defer c.deadlineMu.Unlock()
	c.interrupted = false
	c.nc.SetReadDeadline(time.Time{})
}

func (c *frameConn) isInterrupted() bool {
	c.deadlineMu.Lock()
	defer c.deadlineMu.Unlock()
	return c.interrupted
}

// readSome reads once from the connection.
func (c *frameConn) readSome(p []byte) (int, error) {
	if c.readErr != nil {
		return 0, c.readErr
	}
	c.listening.Store(true)
	n, err := c.nc.Read(p)
	c.listening.Store(false)
	if n > 0 {
		c.read.Add(uint64(n))
		c.stats.read.Add(uint64(n))
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			c.readErr = err
		}
		return n, nil
	}
	switch {
	case err == nil:
		return 0, nil
	case c.ended() != nil && err != io.EOF:
		return 0, c.ended()
	case errors.Is(err, os.ErrDeadlineExceeded) && c.isInterrupted():
		return 0, errInterrupted
	case errors.Is(err, os.ErrDeadlineExceeded) && c.splice.on:
		c.armSplice(time.Now()) // it was for spliceTo; the pulse watches here
		return 0, nil
	}
	return 0, err
}

// fill reads until n bytes are in the buffer, which must have room for them. It returns io.EOF only when the stream
// ends with the buffer empty.
func (c *frameConn) fill(n int) error {
	if c.w-c.r >= n {
		return nil
	}
	if c.r > 0 {
		c.w = copy(c.buf, c.buf[c.r:c.w])
		c.r = 0
	}
	for c.w < n {
		most := len(c.buf)
		if c.splice.on {
			most = n // what follows is not for this buffer
		}
		m, err := c.readSome(c.buf[c.w:most])
		if err == io.EOF && c.w > 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
		c.w += m
	}
	return nil
}

// buffered are the bytes that are at hand without reading.
func (c *frameConn) buffered() []byte { return c.buf[c.r:c.w] }

// ReadByte makes the handshake's line readable.
func (c *frameConn) ReadByte() (byte, error) {
	if err := c.fill(1); err != nil {
		return 0, err
	}
	c.r++
	return c.buf[c.r-1], nil
}

// next reads the header of the next frame that is not a heartbeat. io.EOF means that the peer ended the stream
// between frames.
func (c *frameConn) next() (frameHeader, error) {
	for {
		if err := c.fill(headerSize); err != nil {
			return frameHeader{}, err
		}
		h, err := c.parseHeader(c.buf[c.r:])
		if err != nil {
			return frameHeader{}, err
		}
		c.r += headerSize
		if h.kind != frameHeartbeat {
			return h, nil
		}
	}
}

func (c *frameConn) parseHeader(b []byte) (frameHeader, error) {
	kind, size := frameType(b[0]), binary.BigEndian.Uint32(b[4:])
	low, high := c.sizes(kind)
	switch {
	case high < 0:
		return frameHeader{}, c.violation("frame of unknown type 0x" + strconv.FormatUint(uint64(kind), 16))
	case b[1] != 0 || b[2] != 0 || b[3] != 0:
		return frameHeader{}, c.violation("frame " + kind.String() + " with flags or reserved bytes set")
	case int64(size) < low || int64(size) > high:
		return frameHeader{}, c.violation("frame " + kind.String() + " of " + strconv.FormatUint(uint64(size), 10) + " bytes")
	}
	return frameHeader{kind, int(size)}, nil
}

// sizes are the least and the most bytes that the payload of a frame may have; -1, -1 for an unknown type. For those
// with a name or with an error text, more is checked when these are known.
func (c *frameConn) sizes(kind frameType) (low, high int64) {
	body := int64(c.ours.maxBody)
	switch kind {
	case frameHeartbeat:
		return 0, 0
	case frameCall:
		return 8 + 8 + 1, 8 + 8 + 1 + maxName + body
	case frameReply:
		return 8 + 1, 8 + 1 + max(body, maxErrorText)
	case frameCancel, frameGoaway, frameEnd:
		return 8, 8
	case frameDownload, frameUpload:
		return 8 + 1, 8 + 1 + maxName + body
	case frameResult:
		return 1, 1 + max(body, maxErrorText)
	case frameData:
		return 1, maxData
	case frameFail:
		return 1, 1 + maxErrorText
	}
	return -1, -1
}

// String names a frame type as the specification does.
func (t frameType) String() string {
	switch t {
	case frameHeartbeat:
		return "heartbeat"
	case frameCall:
		return "call"
	case frameReply:
		return "reply"
	case frameCancel:
		return "cancel"
	case frameGoaway:
		return "goaway"
	case frameDownload:
		return "download"
	case frameUpload:
		return "upload"
	case frameResult:
		return "result"
	case frameData:
		return "data"
	case frameEnd:
		return "end"
	case frameFail:
		return "fail"
	}
	return "0x" + strconv.FormatUint(uint64(t), 16)
}

// field reads n bytes of the payload, which are valid until the next read. n is small.
func (c *frameConn) field(n int) ([]byte, error) {
	if err := c.fill(n); err != nil {
		return nil, noEOF(err)
	}
	c.r += n
	return c.buf[c.r-n : c.r], nil
}

func (c *frameConn) readUint64() (uint64, error) {
	b, err := c.field(8)
	if err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint64(b), nil
}

// smallBody is the size of the bodies that are used again.
const smallBody = 4 << 10

var smallBodies = sync.Pool{New: func() any { return new([smallBody]byte) }}

// recycleBody takes back a body that nobody uses any more.
func recycleBody(b []byte) {
	if cap(b) == smallBody {
		smallBodies.Put((*[smallBody]byte)(b[:smallBody]))
	}
}

// body reads the last n bytes of a payload. Memory grows as they arrive. It may be given back with recycleBody.
func (c *frameConn) body(n int) ([]byte, error) {
	var b []byte
	if n <= smallBody {
		b = smallBodies.Get().(*[smallBody]byte)[:0]
	} else {
		b = make([]byte, 0, min(n, bodyStep))
	}
	for len(b) < n {
		if len(b) == cap(b) {
			b = slices.Grow(b, min(n-len(b), len(b)))
		}
		m, err := c.readPayload(b[len(b):min(cap(b), n)])
		if err != nil {
			return nil, err
		}
		b = b[:len(b)+m]
	}
	return b, nil
}

// followed makes sure that what is at hand behind a message looks like a frame. If the message's length was changed on
// the way it is the rest of the message, and nothing else would tell: a message has no total, as a stream has.
func (c *frameConn) followed() error {
	b := c.buffered()
	if len(b) == 0 {
		return nil
	}
	_, high := c.sizes(frameType(b[0]))
	for _, reserved := range b[1:min(len(b), 4)] {
		if reserved != 0 {
			high = -1
		}
	}
	if high < 0 {
		return c.violation("a message is not followed by a frame")
	}
	return nil
}

// readPayload reads some bytes of a payload, at least one if p is not empty.
func (c *frameConn) readPayload(p []byte) (int, error) {
	for len(p) > 0 {
		if c.r < c.w {
			n := copy(p, c.buf[c.r:c.w])
			c.r += n
			return n, nil
		}
		if len(p) >= len(c.buf) {
			n, err := c.readSome(p)
			if n > 0 || err != nil {
				return n, noEOF(err)
			}
		} else if err := c.fill(1); err != nil {
			return 0, noEOF(err)
		}
	}
	return 0, nil
}

// outcome reads the last n bytes of a reply, a result or a fail: a code, then a body or an error text. failed is that
// error. err is one of the connection.
func (c *frameConn) outcome(n int) (body []byte, failed *Error, err error) {
	b, err := c.field(1)
	if err != nil {
		return nil, nil, err
	}
	code := Code(b[0])
	n--
	switch {
	case code == OK && n > c.ours.maxBody:
		return nil, nil, c.tooLong("body", n)
	case code != OK && n > maxErrorText:
		return nil, nil, c.tooLong("error text", n)
	}
	if body, err = c.body(n); err != nil || code == OK {
		return body, nil, err
	}
	failed = &Error{Code: errorCode(code), Message: strings.ToValidUTF8(string(body), "\uFFFD")}
	recycleBody(body)
	return nil, failed, nil
}

func (c *frameConn) tooLong(what string, n int) error {
	return c.violation(what + " of " + strconv.Itoa(n) + " bytes is over the limit")
}

// request is what a call, a download or an upload carries.
type request struct {
	timeout time.Duration // 0: none
	name    []byte        // the method or the endpoint; valid until the next request is read
	body    []byte
}

// request reads the last n bytes of a call, a download or an upload.
func (c *frameConn) request(n int) (request, error) {
	timeout, err := c.readUint64()
	if err != nil {
		return request{}, err
	}
	b, err := c.field(1)
	if err != nil {
		return request{}, err
	}
	size := int(b[0])
	n -= 8 + 1 + size
	switch {
	case n < 0:
		return request{}, c.violation("a name is longer than its frame")
	case n > c.ours.maxBody:
		return request{}, c.tooLong("body", n)
	}
	name, err := c.field(size)
	if err != nil {
		return request{}, err
	}
	q := request{timeout: time.Duration(min(timeout, uint64(maxTimeout))), name: append(c.name[:0], name...)}
	c.name = q.name
	if q.body, err = c.body(n); err == nil {
		err = c.followed()
	}
	return q, err
}

// maxTimeout is as good as none, and can be added to the present time.
const maxTimeout = 100 * 365 * 24 * time.Hour

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// appendHeader appends a frame's header.
func appendHeader(b []byte, kind frameType, size int) []byte {
	b = append(b, byte(kind), 0, 0, 0)
	return binary.BigEndian.AppendUint32(b, uint32(size))
}

// finishFrame writes the size of the frame that begins at start and ends with b into its header.
func finishFrame(b []byte, start int) []byte {
	binary.BigEndian.PutUint32(b[start+4:], uint32(len(b)-start-headerSize))
	return b
}

// uint64Frame returns a frame whose payload is one number.
func uint64Frame(kind frameType, n uint64) []byte {
	b := make([]byte, 0, headerSize+8)
	return binary.BigEndian.AppendUint64(appendHeader(b, kind, 8), n)
}

// appendRequest appends what a call, a download and an upload have in common.
func appendRequest(b []byte, timeout time.Duration, name string, body []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, uint64(timeout))
	b = append(append(b, byte(len(name))), name...)
	return append(b, body...)
}

// appendError appends the code and the text of an error, for a reply, a result or a fail.
func appendError(b []byte, err error) []byte {
	return append(append(b, byte(CodeOf(err))), wireText(err)...)
}

// wireText is the text of an error as it goes onto the wire.
func wireText(err error) string {
	text := ""
	var e *Error
	if errors.As(err, &e) && err == error(e) {
		text = e.Message
	} else if text = err.Error(); e != nil { // whose code goes by itself
		text = strings.Replace(text, e.Error(), e.Message, 1)
	}
	text = strings.ToValidUTF8(text, "\uFFFD")
	if len(text) <= maxErrorText {
		return text
	}
	cut := maxErrorText
	for !utf8.RuneStart(text[cut]) {
		cut--
	}
	return text[:cut]
}

// of returns the counters of the requests of a kind, and of those that failed.
func (c *counters) of(kind frameType) (all, failed *atomic.Uint64) {
	if kind == frameCall {
		return &c.calls, &c.callsFailed
	}
	return &c.streams, &c.failed
}

// handlerFunc decodes a request and handles it. stream is an upload's, out a download's.
type handlerFunc func(ctx context.Context, body []byte, stream io.Reader) (res Message, out io.ReadCloser, err error)

// handler serves a method or an endpoint.
type handler struct {
	kind frameType // of the request
	name string
	run  handlerFunc
}

// task is a request for which a handler is run.
type task interface {
	handle(ctx context.Context, h *handler) error
}

// dispatcher is what the requests of a server's connection are given to.
type dispatcher interface {
	// accept finds a handler and takes a place for it, or says why not.
	accept(kind frameType, name []byte) (*handler, error)
	// run has a task handled, and gives the place back.
	run(ctx context.Context, h *handler, t task) error
}

// appendResult appends a handler's result.
func appendResult(b []byte, res Message) ([]byte, error) {
	if isNil(res) {
		return nil, &Error{Code: Internal, Message: "the handler returned neither a result nor an error"}
	}
	return appendMessage(b, res)
}

// timeoutOf is the time that ctx leaves, for a request: 0 for none, and never 0 for little.
func timeoutOf(ctx context.Context) time.Duration {
	deadline, ok := ctx.Deadline()
	if !ok {
		return 0
	}
	return max(time.Until(deadline), 1)
}

// requestContext is the context of a request's handler. Unlike those of package context it costs nothing until somebody
// waits for its end. Who made it ends it, with the connection at the latest.
type requestContext struct {
	parent   context.Context // of the connection, for its values
	deadline time.Time       // zero for none

	mu    sync.Mutex
	err   error
	done  chan struct{} // made when somebody asks for it
	timer *time.Timer   // of the deadline
}

// Deadline returns the caller's deadline.
func (r *requestContext) Deadline() (time.Time, bool) { return r.deadline, !r.deadline.IsZero() }

// Value returns what the connection's context has.
func (r *requestContext) Value(key any) any { return r.parent.Value(key) }

// Err returns why the context has ended.
func (r *requestContext) Err() error {
	if !r.deadline.IsZero() && !time.Now().Before(r.deadline) {
		r.end(context.DeadlineExceeded)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

// Done returns a channel that is closed when the context ends.
func (r *requestContext) Done() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.done != nil {
		return r.done
	}
	r.done = make(chan struct{})
	if r.err != nil {
		close(r.done)
	} else if !r.deadline.IsZero() {
		r.timer = time.AfterFunc(time.Until(r.deadline), func() { r.end(context.DeadlineExceeded) })
	}
	return r.done
}

// end ends the context, unless it has ended.
func (r *requestContext) end(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		return
	}
	r.err = err
	if r.done != nil {
		close(r.done)
	}
	if r.timer != nil {
		r.timer.Stop()
	}
}

// callContext is the context of a request's handler; 0 is no timeout.
func callContext(ctx context.Context, timeout time.Duration) (context.Context, context.CancelFunc) {
	if timeout == 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, timeout)
}

// whenDone calls f in a goroutine of its own when ctx ends. release undoes that; when f has been called it waits
// for it to return, and tells so.
func whenDone(ctx context.Context, f func()) (release func() (called bool)) {
	if ctx.Done() == nil {
		return func() bool { return false }
	}
	ran := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ran)
		f()
	})
	return func() bool {
		if stop() {
			return false
		}
		<-ran
		return true
	}
}

// nothingWaits tells whether nothing but heartbeats has come on a connection that nobody reads, without waiting for it.
func (c *frameConn) nothingWaits() bool {
	if !c.onlyHeartbeats() {
		return false
	}
	n, err := c.readWaiting()
	if err != nil && err != syscall.EAGAIN && !isTimeout(err) || n == 0 && err == nil {
		return false // it has ended
	}
	c.w += max(n, 0)
	return c.onlyHeartbeats()
}

// onlyHeartbeats empties the buffer, unless there is something else than whole heartbeats in it.
func (c *frameConn) onlyHeartbeats() bool {
	for c.w-c.r >= headerSize && frameType(c.buf[c.r]) == frameHeartbeat {
		if c.skipHeartbeat() != nil {
			return false
		}
	}
	return c.r == c.w
}

// readWaiting reads into the empty buffer what is there already. Where there is a socket it is asked directly; other
// connections are given a moment.
func (c *frameConn) readWaiting() (n int, err error) {
	c.r, c.w = 0, 0
	if c.socket == nil {
		c.setReadDeadline(time.Now().Add(time.Millisecond))
		defer c.setReadDeadline(time.Time{})
		return c.readSome(c.buf)
	}
	rawErr := c.socket.Read(func(fd uintptr) bool {
		n, err = readDescriptor(syscall.Read, fd, c.buf)
		return true
	})
	if rawErr != nil {
		err = rawErr
	}
	if c.encrypted && n > 0 {
		return 0, nil // ciphertext: whatever it is, it is lost
	}
	c.stats.read.Add(uint64(max(n, 0)))
	return n, err
}

// findSocket finds the socket beneath a connection, if there is one that can be read like a file.
func (c *frameConn) findSocket() {
	nc := c.nc
	under, ok := nc.(interface{ NetConn() net.Conn })
	if ok {
		nc, c.encrypted = under.NetConn(), true
	}
	if socket, ok := nc.(syscall.Conn); ok && runtime.GOOS != "windows" {
		c.socket, _ = socket.SyscallConn()
	}
}

// readDescriptor calls syscall.Read, whose descriptor is of another type on Windows.
func readDescriptor[FD ~int | ~uintptr](read func(FD, []byte) (int, error), fd uintptr, p []byte) (int, error) {
	return read(FD(fd), p)
}

// skipHeartbeat reads a heartbeat of which the first byte is in the buffer.
func (c *frameConn) skipHeartbeat() error {
	if err := c.fill(headerSize); err != nil {
		return noEOF(err)
	}
	if _, err := c.parseHeader(c.buf[c.r:]); err != nil {
		return err
	}
	c.r += headerSize
	return nil
}

// result is how a request ended: with a body, with an error of the handler, or with one of the connection.
type result struct {
	body       []byte
	failed     *Error
	err        error
	notStarted bool // err, and the server has not started the request and never will
	again      bool // the request can be tried again
}

// nothingRan tells whether an error of a handshake means that the server has acted on nothing: it sent something else than
// an answer, or left without one. When the connection broke, its answer may have been lost.
func nothingRan(err error) bool {
	var refused *HandshakeError
	var protocol *ProtocolError
	var alert *net.OpError
	return errors.As(err, &refused) || errors.As(err, &protocol) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.As(err, &alert) && alert.Op == "remote error" // as crypto/tls calls them
}

// unstarted is the result of a request that the server has not started. It can be tried again unless err is one of
// connecting: those are the request's own.
func unstarted(err error, connected bool) result {
	var refused *HandshakeError
	var protocol *ProtocolError
	again := connected && CodeOf(err) == Unavailable && !errors.As(err, &protocol)
	if errors.As(err, &refused) {
		again = refused.Code == Unavailable
	}
	return result{err: err, notStarted: true, again: again}
}

// checkBody holds the limit of the receiver on the sender's side.
func checkBody(size, limit int) error {
	if size <= limit {
		return nil
	}
	return &Error{Code: ResourceExhausted, Message: "a message of " + strconv.Itoa(size) +
		" bytes is too large: the peer accepts " + strconv.Itoa(limit)}
}

// spliceState is that of a connection whose payloads go to a file without passing through this process. Reads then have
// a deadline that is far shorter than the peer may be silent, because nothing is heard of them before they return.
type spliceState struct {
	on    bool
	armed time.Time
	quiet int // deadlines in a row before which nothing came
}

// startSplice tells whether payloads can go from the connection to a file directly, and prepares for it.
func (c *frameConn) startSplice() bool {
	_, tcp := c.nc.(*net.TCPConn)
	c.splice = spliceState{on: tcp && runtime.GOOS == "linux"}
	return c.splice.on
}

func (c *frameConn) stopSplice() {
	c.splice.on = false
	c.setReadDeadline(time.Time{})
}

func (c *frameConn) armSplice(now time.Time) {
	c.splice.armed = now
	c.setReadDeadline(now.Add(c.theirs.heartbeat / watchesPerInterval))
}

// spliceTo moves up to n bytes of a payload to f. sinkErr is an error of f, err one of the connection.
func (c *frameConn) spliceTo(f *os.File, n int) (moved int, sinkErr, err error) {
	if now := time.Now(); now.Sub(c.splice.armed) > c.theirs.heartbeat/watchesPerInterval/2 {
		c.armSplice(now)
	}
	m, err := f.ReadFrom(&io.LimitedReader{R: c.nc, N: int64(n)})
	c.read.Add(uint64(m))
	c.stats.read.Add(uint64(m))
	switch {
	case c.ended() != nil:
		return int(m), nil, c.ended()
	case errors.Is(err, os.ErrDeadlineExceeded):
		return int(m), nil, c.spliceLate(m > 0)
	case err == nil && int(m) < n:
		return int(m), nil, io.ErrUnexpectedEOF
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.ETIMEDOUT), errors.Is(err, syscall.EHOSTUNREACH):
		return int(m), nil, err
	}
	c.splice.quiet = 0
	return int(m), err, nil
}

// spliceLate is called when a deadline has passed, which may be because f was slow: then some bytes were moved.
func (c *frameConn) spliceLate(moved bool) error {
	if c.isInterrupted() {
		return errInterrupted
	}
	if c.splice.quiet++; moved {
		c.splice.quiet = 0
	}
	if c.splice.quiet > patience*watchesPerInterval {
		return c.fail(&lostError{what: "connection lost", cause: ErrPeerTimeout})
	}
	c.armSplice(time.Now())
	return nil
}
