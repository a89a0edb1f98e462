package rpc

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxPending is how many bytes may wait to be written before senders wait, too.
	maxPending = 256 << 10
	// maxReplyStall is how long a client may leave its replies unread, when so many wait that no call is read any more.
	maxReplyStall = time.Minute
	// maxReplying is how many calls of one connection may have been read beyond those that can have a handler.
	maxReplying = 64
)

// frameQueue gathers the frames of many senders into few writes (group commit): a sender appends its frame, and who
// finds no write in progress writes what has gathered.
type frameQueue struct {
	c *frameConn

	mu        sync.Mutex // guards what follows, and what the queue's owner knows of its calls
	pending   [][]byte   // in order; each holds whole frames
	spare     [][]byte
	size      int           // bytes in pending
	reserved  int           // bytes of replies that were promised room, and are not in pending yet
	writing   bool          // somebody is in flush, or is about to be
	finishing bool          // no frame comes after those in pending
	room      chan struct{} // closed when waiting may be over; nil if nobody waits
	appended  uint64        // frames
	crowded   bool          // other calls are in flight
	seen      uint64        // frames, by expectsMore
	taken     uint64        // frames that were taken to be written
	touched   uint64        // frames of which a byte may have been written
}

// appendLocked adds a frame, whose bytes it keeps if they are more than batchSize. mustFlush says that the caller has to
// see to it that flush is called.
func (q *frameQueue) appendLocked(frame []byte) (mustFlush bool) {
	q.appended++
	q.size += len(frame)
	if last := len(q.pending) - 1; last >= 0 && len(frame) <= cap(q.pending[last])-len(q.pending[last]) {
		q.pending[last] = append(q.pending[last], frame...)
	} else {
		if len(frame) <= batchSize {
			frame = append(batchBuffers.Get().(*[batchSize]byte)[:0], frame...)
		}
		q.pending = append(q.pending, frame)
	}
	return q.startLocked()
}

// startLocked tells whether nobody was writing.
func (q *frameQueue) startLocked() (mustFlush bool) {
	if q.writing {
		return false
	}
	q.writing = true
	if q.seen = q.appended; q.crowded {
		q.seen-- // as if one had just come
	}
	return true
}

// finishLocked closes the sending direction after what has been appended.
func (q *frameQueue) finishLocked() (mustFlush bool) {
	q.finishing = true
	return q.startLocked()
}

// waitLocked returns when full is false. It gives up when ctx ends, and when done is closed, with the cause of the
// connection's end. Meanwhile mu is not held.
func (q *frameQueue) waitLocked(ctx context.Context, done <-chan struct{}, full func() bool) (err error) {
	for err == nil && full() {
		if q.room == nil {
			q.room = make(chan struct{})
		}
		room := q.room
		q.mu.Unlock()
		select {
		case <-room:
		case <-done:
			err = q.c.ended()
		case <-ctx.Done():
			err = ctx.Err()
		}
		q.mu.Lock()
	}
	return err
}

// waitRoomLocked returns when little waits to be written. It gives up when ctx or the connection ends.
func (q *frameQueue) waitRoomLocked(ctx context.Context) {
	q.waitLocked(ctx, q.c.done, func() bool { return q.size+q.reserved > maxPending })
}

// wakeLocked has those who wait look again.
func (q *frameQueue) wakeLocked() {
	if q.room != nil {
		close(q.room)
		q.room = nil
	}
}

// flush writes until nothing is pending. After an error, which ends the connection, nobody writes any more.
func (q *frameQueue) flush() {
	for {
		// Those who are about to append get the chance to: with many callers that makes one write of many, and is worth a
		// factor of three. As long as it helps, they get another one.
		for q.expectsMore() {
			runtime.Gosched()
		}
		batch, finished := q.take()
		switch {
		case finished:
			q.c.shutWrite()
			q.c.setReadDeadline(time.Now().Add(lingerTime))
			return
		case batch == nil:
			return
		}
		for i, frames := range batch {
			if touched, err := q.c.writeTouching(frames); err != nil {
				q.written(nil, touched || i > 0)
				return
			}
			if batch[i] = nil; cap(frames) == batchSize {
				batchBuffers.Put((*[batchSize]byte)(frames[:batchSize]))
			}
		}
		q.written(batch[:0], true)
	}
}

// expectsMore tells whether frames are likely to be appended soon, and there is room for them in a batch: some were since
// it was asked last, or other calls were in flight when the writing began.
func (q *frameQueue) expectsMore() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	more := q.appended != q.seen
	q.seen = q.appended
	return more && q.size < batchSize
}

// written notes whether some of what was taken last may have been written.
func (q *frameQueue) written(spare [][]byte, touched bool) {
	q.mu.Lock()
	q.spare = spare
	if touched {
		q.touched = q.taken
	}
	q.mu.Unlock()
}

// take returns what is pending. When that is nothing, the caller is no longer writing.
func (q *frameQueue) take() (batch [][]byte, finished bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.pending) == 0 {
		q.writing = q.finishing
		return nil, q.finishing
	}
	batch, q.pending, q.spare = q.pending, q.spare, nil
	q.size, q.taken = 0, q.appended
	q.wakeLocked()
	return batch, false
}

// appendCall appends a call frame whose id and body are still to come.
func appendCall(b []byte, timeout time.Duration, method string) []byte {
	b = binary.BigEndian.AppendUint64(appendHeader(b, frameCall, 0), 0)
	return appendRequest(b, timeout, method, nil)
}

// controlClient is the client's end of a control connection.
type controlClient struct {
	c           *frameConn
	idleTimeout time.Duration
	flushers    sync.WaitGroup
	refused     atomic.Bool   // refusal is set
	lastID      atomic.Uint64 // set with q.mu held

	q         frameQueue // whose mu guards what follows, too
	calls     map[uint64]*pendingCall
	spare     []*pendingCall
	answered  bool      // the server's answer was read
	refusal   error     // why no call begins any more, nil while they do: errGoaway, errNotBegun, or cause
	cause     error     // of the connection's end: nothing is written any more
	proved    bool      // the server has replied, or said goaway: it is well
	users     int       // callers that are in tryCall
	used      bool      // somebody has been
	idleSince time.Time // since users is 0
	idleTimer *time.Timer
}

// pendingCall is a call that waits for its reply. It is used again when that has been fetched.
type pendingCall struct {
	id     uint64        // 0 when it is not awaited any more: who sets that sets result
	number uint64        // of its frame in the queue
	done   chan struct{} // gets one element when result is set
	result result

	// Of a call whose ctx has no deadline. The timer is left running from one call to the next: setting it costs more than
	// to find, a few minutes later, that it was not needed.
	deadline time.Time // zero: none
	timer    *time.Timer
	fires    time.Time // zero: the timer is not set
}

// frameBuffers holds *[]byte for frames that are copied when they are sent.
var frameBuffers = sync.Pool{New: func() any { b := make([]byte, 0, 512); return &b }}

// putFrameBuffer takes back what a frame was made in, unless the queue has kept it.
func putFrameBuffer(buf *[]byte, frame []byte) {
	if cap(frame) <= batchSize {
		*buf = frame[:0]
		frameBuffers.Put(buf)
	}
}

// errNotBegun is why a call was not even tried on a connection: that was about to be closed.
var errNotBegun = errors.New("rpc: the connection was idle and about to be closed")

func newControlClient(c *frameConn, preface []byte, idleTimeout time.Duration) *controlClient {
	cc := &controlClient{
		c: c, idleTimeout: idleTimeout, calls: make(map[uint64]*pendingCall), idleSince: time.Now(),
	}
	cc.q.c = c
	cc.idleTimer = time.AfterFunc(math.MaxInt64, cc.closeIfIdle) // run sets it
	cc.q.appendLocked(preface)                                   // nobody else has it yet; run flushes it, with what comes until then
	return cc
}

// run reads until the connection ends. readAnswer reads the server's answer and sets its promises; ended is called
// with the cause of the end, before the calls that still wait get it.
func (cc *controlClient) run(readAnswer func() error, ended func(cause error)) {
	cc.idleTimer.Reset(cc.grace())
	cc.c.startPulse()
	cc.flushers.Go(cc.q.flush)
	err := readAnswer()
	if err == nil {
		cc.q.mu.Lock()
		cc.answered = true
		cc.q.wakeLocked()
		cc.q.mu.Unlock()
		err = cc.readFrames()
	}
	cc.c.stopPulse()
	ended(err)
	cc.q.mu.Lock()
	if cc.cause = err; cc.refusal == nil || err != errPolite {
		cc.refuseLocked(err)
	}
	cc.q.mu.Unlock()
	cc.flushers.Wait()
	cc.end(err)
}

// flushLocked writes in a goroutine of its own, so that the caller can leave when its ctx ends: half a frame cannot
// be taken back. The goroutine ends when nothing is pending or the connection has ended; run waits for it.
func (cc *controlClient) flushLocked(mustFlush bool) {
	if mustFlush && cc.cause == nil {
		cc.flushers.Add(1)
		go cc.flush()
	}
}

func (cc *controlClient) flush() {
	cc.q.flush()
	cc.flushers.Done()
}

func (cc *controlClient) readFrames() error {
	for {
		h, err := cc.c.next()
		if err == nil {
			err = cc.readFrame(h)
		}
		if err != nil {
			return cc.readFailed(err)
		}
	}
}

// readFailed ends the connection for an error of reading it.
func (cc *controlClient) readFailed(err error) error {
	cc.q.mu.Lock()
	expected := err == io.EOF && cc.refusal != nil && len(cc.calls) == 0
	cc.q.mu.Unlock()
	if expected {
		return cc.c.fail(errPolite)
	}
	return cc.c.lost(err)
}

func (cc *controlClient) readFrame(h frameHeader) error {
	switch h.kind {
	case frameReply:
		return cc.readReply(h.size)
	case frameGoaway:
		return cc.readGoaway()
	}
	return cc.c.violation("a server sent " + h.kind.String() + " on a control connection")
}

func (cc *controlClient) readReply(size int) error {
	id, err := cc.c.readUint64()
	if err != nil {
		return err
	}
	if id == 0 || id > cc.lastID.Load() {
		return cc.c.violation("reply to call " + strconv.FormatUint(id, 10) + ", which was never made")
	}
	body, failed, err := cc.c.outcome(size - 8)
	if err == nil {
		err = cc.c.followed()
	}
	if err != nil {
		return err
	}
	cc.q.mu.Lock()
	cc.proved = true
	cc.settleLocked(cc.calls[id], result{body: body, failed: failed})
	cc.q.mu.Unlock()
	return nil
}

// settleLocked gives a call its result, unless it is nil: nobody awaits it.
func (cc *controlClient) settleLocked(call *pendingCall, r result) {
	if call == nil {
		return
	}
	delete(cc.calls, call.id)
	call.id = 0
	call.result = r
	call.done <- struct{}{}
}

// readGoaway takes note that calls above last will never be started.
func (cc *controlClient) readGoaway() error {
	last, err := cc.c.readUint64()
	if err != nil {
		return err
	}
	cc.q.mu.Lock()
	defer cc.q.mu.Unlock()
	if cc.refusal == errGoaway {
		return cc.c.violation("a second goaway")
	}
	cc.refuseLocked(errGoaway)
	cc.proved = true
	for id, call := range cc.calls {
		if id > last {
			cc.settleLocked(call, unstarted(errGoaway, true))
		}
	}
	return nil
}

// refuseLocked has no call begin any more.
func (cc *controlClient) refuseLocked(why error) {
	cc.refusal = why
	cc.refused.Store(true)
	cc.q.wakeLocked()
}

// end gives every call that still waits the cause of the connection's end.
func (cc *controlClient) end(cause error) {
	cc.q.mu.Lock()
	defer cc.q.mu.Unlock()
	cc.idleTimer.Stop()
	for _, call := range cc.calls {
		r := result{err: cause}
		if !cc.answered && nothingRan(cause) || call.number > cc.q.touched {
			r = unstarted(cause, cc.answered)
		}
		cc.settleLocked(call, r)
	}
	for _, call := range cc.spare {
		call.stopTimer()
	}
}

// closeIfIdle closes a connection that was not used for idleTimeout. The timer calls it.
func (cc *controlClient) closeIfIdle() {
	if left := cc.idleLeft(); left > 0 {
		cc.idleTimer.Reset(left)
	} else if cc.unused() {
		cc.c.close()
	}
}

// idleLeft is how long the connection is to be kept at least.
func (cc *controlClient) idleLeft() time.Duration {
	cc.q.mu.Lock()
	defer cc.q.mu.Unlock()
	switch {
	case cc.users > 0:
		return cc.grace()
	case !cc.used:
		return cc.grace() - time.Since(cc.idleSince)
	}
	return cc.idleTimeout - time.Since(cc.idleSince)
}

// grace is how long a connection is kept at least that nobody has used yet: somebody waits for it.
func (cc *controlClient) grace() time.Duration { return max(cc.idleTimeout, time.Second) }

// unused tells whether nobody uses the connection; then nobody can begin to, either.
func (cc *controlClient) unused() bool {
	cc.q.mu.Lock()
	defer cc.q.mu.Unlock()
	if cc.users == 0 && cc.refusal == nil {
		cc.refuseLocked(errNotBegun)
	}
	return cc.users == 0
}

// hasProved tells whether the connection was of use.
func (cc *controlClient) hasProved() bool {
	cc.q.mu.Lock()
	defer cc.q.mu.Unlock()
	return cc.proved
}

// tryCall makes a call over this connection. The deadline is for a ctx that has none, zero for none at all.
func (cc *controlClient) tryCall(ctx context.Context, deadline time.Time, method string, req Message) result {
	timeout := timeoutOf(ctx)
	if !deadline.IsZero() {
		timeout = max(time.Until(deadline), 1)
	}
	buf := frameBuffers.Get().(*[]byte)
	frame := appendCall((*buf)[:0], timeout, method)
	fields := len(frame)
	frame, err := appendMessage(frame, req)
	if err != nil {
		return unstarted(err, false)
	}
	call, r := cc.begin(ctx, finishFrame(frame, 0), len(frame)-fields, deadline)
	if call == nil {
		return r
	}
	putFrameBuffer(buf, frame)
	if ctx.Done() == nil {
		<-call.done
	} else {
		select {
		case <-call.done:
		case <-ctx.Done():
			cc.cancel(call, ctx.Err())
			<-call.done
		}
	}
	return cc.leave(call)
}

// begin sends a call, when its turn has come. The frame is kept if it is large; bodySize is that of its body.
func (cc *controlClient) begin(ctx context.Context, frame []byte, bodySize int, deadline time.Time) (*pendingCall, result) {
	cc.q.mu.Lock()
	defer cc.q.mu.Unlock()
	if cc.refusal != nil {
		return nil, unstarted(cc.refusal, cc.answered)
	}
	cc.users++
	cc.used = true
	if err := cc.awaitTurnLocked(ctx, bodySize, deadline); err != nil {
		cc.departLocked()
		return nil, unstarted(err, cc.answered)
	}
	call := cc.newCallLocked()
	call.id = cc.lastID.Add(1)
	binary.BigEndian.PutUint64(frame[headerSize:], call.id)
	cc.calls[call.id] = call
	cc.q.crowded = len(cc.calls) > 1
	cc.flushLocked(cc.q.appendLocked(frame))
	call.number = cc.q.appended
	call.deadline = deadline
	cc.setTimerLocked(call)
	return call, result{}
}

// awaitTurnLocked waits until a body of this size may be sent, and until there is room for it. At the connection's end it
// waits for the refusal: until then a call that is tried again would get the same connection.
func (cc *controlClient) awaitTurnLocked(ctx context.Context, bodySize int, deadline time.Time) error {
	large := bodySize > minMessageSize
	full := func() bool { return cc.refusal == nil && (cc.q.size > maxPending || large && !cc.answered) }
	if full() {
		if !deadline.IsZero() {
			within, cancel := context.WithDeadline(ctx, deadline)
			defer cancel()
			ctx = within
		}
		if err := cc.q.waitLocked(ctx, nil, full); err != nil {
			return err
		}
	}
	if cc.refusal == nil && large {
		return checkBody(bodySize, cc.c.theirs.maxBody)
	}
	return cc.refusal
}

func (cc *controlClient) newCallLocked() *pendingCall {
	last := len(cc.spare) - 1
	if last < 0 {
		return &pendingCall{done: make(chan struct{}, 1)}
	}
	call := cc.spare[last]
	cc.spare = cc.spare[:last]
	return call
}

// setTimerLocked sees to it that expire is called at the call's deadline at the latest.
func (cc *controlClient) setTimerLocked(call *pendingCall) {
	switch {
	case call.deadline.IsZero(), !call.fires.IsZero() && !call.deadline.Before(call.fires):
		return
	case call.timer == nil:
		call.timer = time.AfterFunc(time.Until(call.deadline), func() { cc.expire(call) })
	default:
		call.timer.Reset(time.Until(call.deadline))
	}
	call.fires = call.deadline
}

// expire gives a call up if its time is over. The timer calls it.
func (cc *controlClient) expire(call *pendingCall) {
	cc.q.mu.Lock()
	defer cc.q.mu.Unlock()
	call.fires = time.Time{}
	switch {
	case call.id == 0:
	case time.Now().Before(call.deadline):
		cc.setTimerLocked(call)
	case !call.deadline.IsZero():
		cc.cancelLocked(call, context.DeadlineExceeded)
	}
}

func (call *pendingCall) stopTimer() {
	if call.timer != nil {
		call.timer.Stop()
	}
}

// cancel gives a call up, unless its result is there.
func (cc *controlClient) cancel(call *pendingCall, why error) {
	cc.q.mu.Lock()
	defer cc.q.mu.Unlock()
	if call.id != 0 {
		cc.cancelLocked(call, why)
	}
}

func (cc *controlClient) cancelLocked(call *pendingCall, why error) {
	cc.flushLocked(cc.q.appendLocked(uint64Frame(frameCancel, call.id)))
	cc.settleLocked(call, result{err: why})
}

// leave returns the result of a call that is over.
func (cc *controlClient) leave(call *pendingCall) result {
	cc.q.mu.Lock()
	defer cc.q.mu.Unlock()
	r := call.result
	call.result = result{}
	if cc.cause == nil {
		cc.spare = append(cc.spare, call)
	} else {
		call.stopTimer()
	}
	cc.departLocked()
	return r
}

func (cc *controlClient) departLocked() {
	if cc.users--; cc.users > 0 {
		return
	}
	cc.idleSince = time.Now()
	if cc.idleTimeout < 0 && cc.refusal == nil {
		cc.refuseLocked(errNotBegun)
		cc.flushers.Go(cc.c.close) // waits for nothing but a TLS alert, for five seconds at the most
	}
}

// controlServer is the server's end of a control connection.
type controlServer struct {
	c          *frameConn
	dispatch   dispatcher
	maxRunning int // calls without a reply
	handlers   sync.WaitGroup

	// Owned by the reader.
	read   uint64 // bytes, when readAt was
	readAt time.Time

	q        frameQueue             // whose mu guards what follows, too
	running  map[uint64]*serverCall // calls without a reply
	lastID   uint64                 // written by the reader only
	draining bool
}

// serverCall is a call that a server has begun. It is the context of its handler.
type serverCall struct {
	requestContext
	id      uint64
	handler *handler
	refusal error // why there is no handler
	body    []byte
	reply   []byte // the frame
	q       *frameQueue
	room    int // bytes that are reserved in q
}

func newControlServer(c *frameConn, maxHandlers int, dispatch dispatcher) *controlServer {
	s := &controlServer{
		c: c, dispatch: dispatch, maxRunning: min(maxHandlers, math.MaxInt16) + maxReplying,
		running: make(map[uint64]*serverCall),
	}
	s.q.c = c
	return s
}

// serve reads until the connection ends, then ends the handlers' contexts and waits for them. It returns why the
// connection ended.
func (s *controlServer) serve(ctx context.Context) error {
	s.c.startPulse()
	err := s.readFrames(ctx)
	s.c.stopPulse()
	s.q.mu.Lock()
	for _, call := range s.running {
		call.end(context.Canceled)
	}
	s.q.mu.Unlock()
	s.handlers.Wait()
	return err
}

func (s *controlServer) readFrames(ctx context.Context) error {
	for {
		h, err := s.c.next()
		if err == nil {
			err = s.readFrame(ctx, h)
		}
		if err != nil {
			return s.readFailed(err)
		}
	}
}

// readFailed ends the connection for an error of reading it: a client that has nothing in progress may leave.
func (s *controlServer) readFailed(err error) error {
	s.q.mu.Lock()
	idle := len(s.running) == 0
	lingered := s.draining && idle && errors.Is(err, os.ErrDeadlineExceeded)
	s.q.mu.Unlock()
	if idle && err == io.EOF || lingered {
		return s.c.fail(errPolite)
	}
	return s.c.lost(err)
}

func (s *controlServer) readFrame(ctx context.Context, h frameHeader) error {
	switch h.kind {
	case frameCall:
		return s.readCall(ctx, h.size)
	case frameCancel:
		return s.readCancel()
	}
	return s.c.violation("a client sent " + h.kind.String() + " on a control connection")
}

func (s *controlServer) readCancel() error {
	id, err := s.c.readUint64()
	if err != nil {
		return err
	}
	if id == 0 || id > s.lastID {
		return s.c.violation("cancel of call " + strconv.FormatUint(id, 10) + ", which was never made")
	}
	s.q.mu.Lock()
	call := s.running[id]
	s.q.mu.Unlock()
	if call != nil {
		call.end(context.Canceled)
	}
	return nil
}

// readCall starts the handler of a call in a goroutine of its own, which ends with the handler and the writing of its
// reply; serve waits for it.
func (s *controlServer) readCall(ctx context.Context, size int) error {
	id, err := s.c.readUint64()
	if err != nil {
		return err
	}
	if id <= s.lastID {
		return s.c.violation("call " + strconv.FormatUint(id, 10) + " does not rise above the last one")
	}
	q, err := s.c.request(size - 8)
	if err != nil {
		return err
	}
	if err := s.c.awaitAnswered(); err != nil {
		return err
	}
	call := &serverCall{id: id, body: q.body, q: &s.q}
	call.parent = ctx
	if q.timeout != 0 {
		call.deadline = s.arrival().Add(q.timeout)
	}
	if begun, err := s.begin(call); !begun {
		return err
	}
	call.handler, call.refusal = s.dispatch.accept(frameCall, q.name)
	s.handlers.Add(1)
	go s.run(call)
	return nil
}

// arrival is when what was read last has come. With many calls to a read, to ask for the time is not for nothing.
func (s *controlServer) arrival() time.Time {
	if read := s.c.read.Load(); read != s.read {
		s.read, s.readAt = read, time.Now()
	}
	return s.readAt
}

// begin notes that a call is to get a reply, when there is room for that; after goaway none does.
func (s *controlServer) begin(call *serverCall) (begun bool, err error) {
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	full := func() bool { return !s.draining && len(s.running) >= s.maxRunning }
	if full() {
		within, cancel := context.WithTimeout(call.parent, maxReplyStall)
		defer cancel()
		if err := s.q.waitLocked(within, s.c.done, full); err == context.DeadlineExceeded {
			return false, s.c.violation("the client does not read its replies")
		} else if err != nil {
			return false, err
		}
	}
	s.lastID = call.id
	if !s.draining {
		s.running[call.id] = call
	}
	return !s.draining, nil
}

func (s *controlServer) run(call *serverCall) {
	replied := false
	defer func() {
		if !replied { // the handler has called runtime.Goexit
			s.reply(call, finishFrame(appendReply(nil, call.id, errNoReturn), 0))
		}
		s.handlers.Done()
	}()
	buf := frameBuffers.Get().(*[]byte)
	call.reply = (*buf)[:0]
	err := call.refusal
	if err == nil {
		err = s.dispatch.run(call, call.handler, call)
	}
	if err == nil {
		err = checkBody(len(call.reply)-headerSize-8-1, s.c.theirs.maxBody)
	}
	if err != nil {
		call.reply = appendReply(call.reply[:0], call.id, err)
	}
	replied = true
	recycleBody(call.body)
	s.reply(call, finishFrame(call.reply, 0))
	putFrameBuffer(buf, call.reply)
}

// handle runs the handler of a call.
func (call *serverCall) handle(ctx context.Context, h *handler) error {
	res, _, err := h.run(ctx, call.body, nil)
	if err == nil {
		call.reply, err = appendResult(appendReply(call.reply, call.id, nil), res)
	}
	return err
}

// reserveRoom waits until there is room for a large reply, with the handler's place still taken: otherwise a client that does
// not read its replies could have a server hold more of them than it runs handlers. From then on no code of the user's may
// run before the reply: all others wait for the room.
func (call *serverCall) reserveRoom() {
	if len(call.reply) <= smallBody {
		return
	}
	q := call.q
	q.mu.Lock()
	defer q.mu.Unlock()
	q.waitRoomLocked(call.parent)
	call.room = len(call.reply)
	q.reserved += call.room
}

// appendReply appends a reply: an error, or one of success, to which the body is still to be appended.
func appendReply(b []byte, id uint64, err error) []byte {
	b = binary.BigEndian.AppendUint64(appendHeader(b, frameReply, 0), id)
	if err == nil {
		return append(b, byte(OK))
	}
	return appendError(b, err)
}

// reply sends the one reply of a call, and after the last one that is due closes the sending direction. Until there is
// room it waits, and the call counts as running: meanwhile others are read, and the client is heard.
func (s *controlServer) reply(call *serverCall, frame []byte) {
	call.end(context.Canceled)
	s.q.mu.Lock()
	if call.room == 0 {
		s.q.waitRoomLocked(call.parent)
	}
	s.q.reserved -= call.room
	delete(s.running, call.id)
	s.q.crowded = len(s.running) > 0
	mustFlush := s.q.appendLocked(frame)
	if s.q.wakeLocked(); s.draining && len(s.running) == 0 {
		mustFlush = s.q.finishLocked() || mustFlush
	}
	s.q.mu.Unlock()
	if mustFlush {
		s.q.flush()
	}
}

// drain says goaway: calls that were read get their replies, later ones are dropped. It waits until that is written.
func (s *controlServer) drain() {
	s.q.mu.Lock()
	mustFlush := false
	if !s.draining {
		s.draining = true
		s.q.wakeLocked()
		mustFlush = s.q.appendLocked(uint64Frame(frameGoaway, s.lastID))
		if len(s.running) == 0 {
			mustFlush = s.q.finishLocked() || mustFlush
		}
	}
	s.q.mu.Unlock()
	if mustFlush {
		s.q.flush()
	}
}
