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
	"time"
)

const (
	// batchSize is how much small frames are gathered for one write.
	batchSize = 16 << 10
	// maxPending is how many bytes may wait to be written before senders wait, too.
	maxPending = 256 << 10
	// maxReplyStall is how long none of them is written before the client is given up: it is not listening.
	maxReplyStall = time.Minute
	// maxReplying is how many handlers of one connection may have returned without their replies being written: a
	// client that does not read its replies is not read from either.
	maxReplying = 64
)

// frameQueue gathers the frames of many senders into few writes (group commit): a sender appends its frame, and who
// finds no write in progress writes what has gathered.
type frameQueue struct {
	c *frameConn

	mu        sync.Mutex
	pending   [][]byte // in order; each holds whole frames
	spare     [][]byte
	size      int  // bytes in pending
	writing   bool // somebody is in flush, or is about to be
	finishing bool // no frame comes after those in pending
	room      chan struct{}
	appended  uint64 // frames
	taken     uint64 // frames that were taken to be written
	touched   uint64 // frames of which a byte may have been written
}

var batchBuffers = sync.Pool{New: func() any { return new([batchSize]byte) }}

// waitRoom returns when little is waiting to be written, or when the connection has ended. It gives up when ctx ends, and
// when late is sent to.
func (q *frameQueue) waitRoom(ctx context.Context, late <-chan time.Time) error {
	for {
		q.mu.Lock()
		if q.size <= maxPending {
			q.mu.Unlock()
			return nil
		}
		if q.room == nil {
			q.room = make(chan struct{})
		}
		room := q.room
		q.mu.Unlock()
		select {
		case <-room:
		case <-q.c.done:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-late:
			return context.DeadlineExceeded
		}
	}
}

// append adds a frame, whose bytes it keeps if they are more than batchSize. It returns the frame's number; mustFlush says that the
// caller has to see to it that flush is called.
func (q *frameQueue) append(frame []byte) (number uint64, mustFlush bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.appended++
	q.size += len(frame)
	last := len(q.pending) - 1
	switch {
	case len(frame) > batchSize:
		q.pending = append(q.pending, frame)
	case last >= 0 && cap(q.pending[last]) == batchSize && len(q.pending[last])+len(frame) <= batchSize:
		q.pending[last] = append(q.pending[last], frame...)
	default:
		gather := batchBuffers.Get().(*[batchSize]byte)
		q.pending = append(q.pending, append(gather[:0], frame...))
	}
	return q.appended, q.startWriting()
}

// startWriting tells whether nobody was writing. The caller holds mu.
func (q *frameQueue) startWriting() bool {
	started := !q.writing
	q.writing = true
	return started
}

// finish makes the queue close the sending direction after what has been appended.
func (q *frameQueue) finish() (mustFlush bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.finishing = true
	return q.startWriting()
}

// flush writes until nothing is pending. After an error, which ends the connection, nobody writes any more.
func (q *frameQueue) flush() {
	for {
		// Those who are about to append get the chance to: with many callers that makes one write of many, and is worth a
		// factor of three; with one caller it costs nothing that can be measured.
		runtime.Gosched()
		batch, finished := q.take()
		for i, frames := range batch {
			if touched, err := q.c.writeTouching(frames); err != nil {
				q.noteFailure(touched || i > 0)
				return
			}
			if batch[i] = nil; cap(frames) == batchSize {
				batchBuffers.Put((*[batchSize]byte)(frames[:batchSize]))
			}
		}
		switch {
		case finished:
			q.c.shutWrite()
			q.c.setReadDeadline(time.Now().Add(lingerTime))
			return
		case batch == nil:
			return
		}
		q.mu.Lock()
		q.spare, q.touched = batch[:0], q.taken
		q.mu.Unlock()
	}
}

// noteFailure notes whether some of what was taken last may have been written.
func (q *frameQueue) noteFailure(touched bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if touched {
		q.touched = q.taken
	}
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
	if q.room != nil {
		close(q.room)
		q.room = nil
	}
	return batch, false
}

// untouched tells, after flush has ended, whether no byte of the frame with this number was written.
func (q *frameQueue) untouched(number uint64) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return number > q.touched
}

// appendCall appends a call frame whose id and body are still to come.
func appendCall(b []byte, timeout time.Duration, method string) []byte {
	b = binary.BigEndian.AppendUint64(appendHeader(b, frameCall, 0), 0)
	return appendRequest(b, timeout, method, nil)
}

func putCallID(frame []byte, id uint64) { binary.BigEndian.PutUint64(frame[headerSize:], id) }

// controlClient is the client's end of a control connection.
type controlClient struct {
	c           *frameConn
	q           frameQueue
	idleTimeout time.Duration
	answered    chan struct{} // closed when the server's answer was read
	flushers    sync.WaitGroup

	mu        sync.Mutex
	calls     map[uint64]*pendingCall // awaited
	spare     []*pendingCall
	lastID    uint64
	refusal   error // why no call begins any more, nil while they do: errGoaway, errNotBegun, or cause
	cause     error // of the connection's end: nothing is written any more
	replies   uint64
	users     int       // callers that are in call
	used      bool      // somebody has been
	idleSince time.Time // since users is 0
	idleTimer *time.Timer
}

// pendingCall is a call that waits for its reply. It is used again when that has been fetched.
type pendingCall struct {
	number uint64        // of its frame in the queue
	done   chan struct{} // gets one element when result is set
	result result
	timer  *time.Timer // of calls whose ctx has no deadline; made on first use
}

// limit returns what is sent to when the time is over; 0 is no limit.
func (p *pendingCall) limit(d time.Duration) <-chan time.Time {
	switch {
	case d == 0:
		return nil
	case p.timer == nil:
		p.timer = time.NewTimer(d)
	default:
		p.timer.Reset(d)
	}
	return p.timer.C
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
		c: c, idleTimeout: idleTimeout, answered: make(chan struct{}),
		calls: make(map[uint64]*pendingCall), idleSince: time.Now(),
	}
	cc.q.c = c
	cc.idleTimer = time.AfterFunc(math.MaxInt64, cc.closeIfIdle) // run sets it
	cc.q.append(preface)                                         // run flushes it, together with what comes until then
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
		close(cc.answered)
		err = cc.readFrames()
	}
	cc.c.stopPulse()
	ended(err)
	cc.mu.Lock()
	if cc.cause = err; cc.refusal == nil || err != errPolite {
		cc.refusal = err
	}
	cc.mu.Unlock()
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
	cc.mu.Lock()
	expected := err == io.EOF && cc.refusal != nil && len(cc.calls) == 0
	cc.mu.Unlock()
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
	cc.mu.Lock()
	used := id >= 1 && id <= cc.lastID
	cc.mu.Unlock()
	if !used {
		return cc.c.violation("reply to call " + strconv.FormatUint(id, 10) + ", which was never made")
	}
	body, failed, err := cc.c.outcome(size - 8)
	if err != nil {
		return err
	}
	cc.mu.Lock()
	call := cc.forgetLocked(id)
	cc.replies++
	cc.mu.Unlock()
	if call != nil {
		call.result = result{body: body, failed: failed}
		call.done <- struct{}{}
	}
	return nil
}

// readGoaway takes note that calls above last will never be started.
func (cc *controlClient) readGoaway() error {
	last, err := cc.c.readUint64()
	if err != nil {
		return err
	}
	cc.mu.Lock()
	defer cc.mu.Unlock()
	if cc.refusal == errGoaway {
		return cc.c.violation("a second goaway")
	}
	cc.refusal = errGoaway
	cc.replies++ // the server is well: its end is no failure
	for id, call := range cc.calls {
		if id > last {
			cc.forgetLocked(id)
			call.result = unstarted(errGoaway, true)
			call.done <- struct{}{}
		}
	}
	return nil
}

// end gives every call that still waits the cause of the connection's end.
func (cc *controlClient) end(cause error) {
	cc.mu.Lock()
	defer cc.mu.Unlock()
	cc.idleTimer.Stop()
	connected := cc.connected()
	for id, call := range cc.calls {
		cc.forgetLocked(id)
		call.result = result{err: cause}
		if !connected && nothingRan(cause) || cc.q.untouched(call.number) {
			call.result = unstarted(cause, connected)
		}
		call.done <- struct{}{}
	}
}

// connected tells whether the server has answered.
func (cc *controlClient) connected() bool {
	select {
	case <-cc.answered:
		return true
	default:
		return false
	}
}

// forgetLocked takes a call off those that are awaited, and returns it. Who takes it off is who gives it its result.
func (cc *controlClient) forgetLocked(id uint64) *pendingCall {
	call := cc.calls[id]
	delete(cc.calls, id)
	return call
}

// enter notes that the connection is in use, unless no call begins any more.
func (cc *controlClient) enter() (*pendingCall, error) {
	cc.mu.Lock()
	defer cc.mu.Unlock()
	if cc.refusal != nil {
		return nil, cc.refusal
	}
	cc.users++
	cc.used = true
	if last := len(cc.spare) - 1; last >= 0 {
		call := cc.spare[last]
		cc.spare = cc.spare[:last]
		return call, nil
	}
	return &pendingCall{done: make(chan struct{}, 1)}, nil
}

func (cc *controlClient) leave(call *pendingCall) {
	if call.timer != nil {
		call.timer.Stop()
	}
	call.result = result{}
	cc.mu.Lock()
	defer cc.mu.Unlock()
	cc.spare = append(cc.spare, call)
	cc.users--
	cc.idleSince = time.Now()
	if cc.users == 0 && cc.idleTimeout < 0 && cc.refusal == nil {
		cc.refusal = errNotBegun
		cc.flushers.Go(cc.c.close) // waits for nothing but a TLS alert, for five seconds at the most
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
	cc.mu.Lock()
	defer cc.mu.Unlock()
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
	cc.mu.Lock()
	defer cc.mu.Unlock()
	if cc.users == 0 && cc.refusal == nil {
		cc.refusal = errNotBegun
	}
	return cc.users == 0
}

// proved tells whether the connection was of use.
func (cc *controlClient) proved() bool {
	cc.mu.Lock()
	defer cc.mu.Unlock()
	return cc.replies > 0
}

// usable tells whether calls can begin.
func (cc *controlClient) usable() bool {
	cc.mu.Lock()
	defer cc.mu.Unlock()
	return cc.refusal == nil
}

// tryCall makes a call over this connection.
func (cc *controlClient) tryCall(ctx context.Context, limit time.Duration, method string, req Message) result {
	timeout := limit
	if timeout == 0 {
		timeout = timeoutOf(ctx)
	}
	buf := frameBuffers.Get().(*[]byte)
	frame := appendCall((*buf)[:0], timeout, method)
	fields := len(frame)
	frame, err := appendMessage(frame, req)
	if err != nil {
		return unstarted(err, false)
	}
	r := cc.call(ctx, limit, finishFrame(frame, 0), len(frame)-fields)
	putFrameBuffer(buf, frame)
	return r
}

// call sends a frame made by appendCall, which it keeps if it is large, and waits for the reply. bodySize is that of its
// body, limit the time for a ctx without a deadline, or 0.
func (cc *controlClient) call(ctx context.Context, limit time.Duration, frame []byte, bodySize int) result {
	call, err := cc.enter()
	if err != nil {
		return unstarted(err, cc.connected())
	}
	defer cc.leave(call)
	late := call.limit(limit)
	if err := cc.mayBegin(ctx, late, bodySize); err != nil {
		return unstarted(err, cc.connected())
	}
	id, err := cc.begin(call, frame)
	if err != nil {
		return unstarted(err, cc.connected())
	}
	select {
	case <-call.done:
		return call.result
	case <-ctx.Done():
		return cc.cancel(ctx.Err(), id, call)
	case <-late:
		return cc.cancel(context.DeadlineExceeded, id, call)
	}
}

// mayBegin waits until a body of this size may be sent, and until there is room for it.
func (cc *controlClient) mayBegin(ctx context.Context, late <-chan time.Time, bodySize int) error {
	if bodySize > minMessageSize {
		select {
		case <-cc.answered:
		case <-cc.c.done:
			return cc.c.ended()
		case <-ctx.Done():
			return ctx.Err()
		case <-late:
			return context.DeadlineExceeded
		}
		if err := checkBody(bodySize, cc.c.theirs.maxBody); err != nil {
			return err
		}
	}
	return cc.q.waitRoom(ctx, late)
}

// begin gives a call its id and its place in the queue.
func (cc *controlClient) begin(call *pendingCall, frame []byte) (id uint64, err error) {
	cc.mu.Lock()
	defer cc.mu.Unlock()
	if cc.refusal != nil {
		return 0, cc.refusal
	}
	cc.lastID++
	id = cc.lastID
	putCallID(frame, id)
	cc.calls[id] = call
	number, mustFlush := cc.q.append(frame)
	call.number = number
	cc.flushLocked(mustFlush)
	return id, nil
}

// cancel gives a call up, unless its result is there.
func (cc *controlClient) cancel(why error, id uint64, call *pendingCall) result {
	cc.mu.Lock()
	if cc.forgetLocked(id) == nil {
		cc.mu.Unlock()
		<-call.done
		return call.result
	}
	_, mustFlush := cc.q.append(uint64Frame(frameCancel, id))
	cc.flushLocked(mustFlush)
	cc.mu.Unlock()
	return result{err: why}
}

// callHandler decodes the body of a call, runs the handler and appends the encoded result to out.
type callHandler func(ctx context.Context, body, out []byte) ([]byte, error)

// callMethod is a method that is served.
type callMethod struct {
	name   string
	handle callHandler
}

// callDispatcher is what the calls of a connection are given to.
type callDispatcher interface {
	// acceptCall finds a method and takes a place for its handler, or says why not.
	acceptCall(name []byte) (*callMethod, error)
	// runCall runs the handler, and gives the place back.
	runCall(ctx context.Context, m *callMethod, body, out []byte) ([]byte, error)
}

// controlServer is the server's end of a control connection.
type controlServer struct {
	c        *frameConn
	q        frameQueue
	dispatch callDispatcher
	handlers sync.WaitGroup
	places   chan struct{} // bounds handlers that run or whose replies are not written

	mu       sync.Mutex
	running  map[uint64]*serverCall // calls without a reply
	lastID   uint64
	draining bool
}

// serverCall is a call that a server has begun. It is the context of its handler.
type serverCall struct {
	requestContext
	id     uint64
	method *callMethod
	body   []byte
}

func newControlServer(c *frameConn, maxHandlers int, dispatch callDispatcher) *controlServer {
	s := &controlServer{
		c: c, dispatch: dispatch, places: make(chan struct{}, min(maxHandlers, math.MaxInt16)+maxReplying),
		running: make(map[uint64]*serverCall),
	}
	s.q.c = c
	return s
}

// serve reads until the connection ends, then ends the handlers' contexts and waits for them. It returns why the
// connection ended.
func (s *controlServer) serve(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s.c.startPulse()
	err := s.readFrames(ctx)
	s.c.stopPulse()
	cancel()
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
	s.mu.Lock()
	idle := len(s.running) == 0
	lingered := s.draining && idle && errors.Is(err, os.ErrDeadlineExceeded)
	s.mu.Unlock()
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
	s.mu.Lock()
	seen, call := id >= 1 && id <= s.lastID, s.running[id]
	s.mu.Unlock()
	if !seen {
		return s.c.violation("cancel of call " + strconv.FormatUint(id, 10) + ", which was never made")
	}
	if call != nil {
		call.end(context.Canceled)
	}
	return nil
}

func (s *controlServer) readCall(ctx context.Context, size int) error {
	id, err := s.c.readUint64()
	if err != nil {
		return err
	}
	s.mu.Lock()
	rises := id > s.lastID
	s.mu.Unlock()
	if !rises {
		return s.c.violation("call " + strconv.FormatUint(id, 10) + " does not rise above the last one")
	}
	q, err := s.c.request(size - 8)
	if err != nil {
		return err
	}
	if err := s.c.awaitAnswered(); err != nil {
		return err
	}
	call := &serverCall{id: id, body: q.body}
	call.parent = ctx
	if q.timeout != 0 {
		call.deadline = time.Now().Add(q.timeout)
	}
	if !s.begin(call) {
		return nil
	}
	return s.start(call, q.name)
}

// begin notes that a call is to get a reply; after goaway none does.
func (s *controlServer) begin(call *serverCall) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lastID = call.id
	if !s.draining {
		s.running[call.id] = call
	}
	return !s.draining
}

// start runs the handler of a call in a goroutine of its own, which ends with the handler and the writing of its
// reply; serve waits for it.
func (s *controlServer) start(call *serverCall, name []byte) (err error) {
	if err := s.takePlace(); err != nil {
		return err
	}
	s.handlers.Add(1)
	if call.method, err = s.dispatch.acceptCall(name); err != nil {
		go s.refuse(call, err)
	} else {
		go s.run(call)
	}
	return nil
}

// takePlace waits until few replies wait to be written.
func (s *controlServer) takePlace() error {
	select {
	case s.places <- struct{}{}:
		return nil
	default:
	}
	timer := time.NewTimer(maxReplyStall)
	defer timer.Stop()
	select {
	case s.places <- struct{}{}:
		return nil
	case <-s.c.done:
		return s.c.ended()
	case <-timer.C:
		return s.c.violation("the client does not read its replies")
	}
}

// refuse replies to a call that has no handler.
func (s *controlServer) refuse(call *serverCall, err error) {
	s.q.waitRoom(call.parent, nil)
	s.reply(call, appendReply(nil, call.id, err))
	<-s.places
	s.handlers.Done()
}

func (s *controlServer) run(call *serverCall) {
	returned := false
	defer func() {
		if !returned { // the handler has called runtime.Goexit
			s.reply(call, appendReply(nil, call.id, errNoReturn))
		}
		<-s.places
		s.handlers.Done()
	}()
	buf := frameBuffers.Get().(*[]byte)
	out := appendReply((*buf)[:0], call.id, nil)
	start := len(out)
	out, err := s.dispatch.runCall(call, call.method, call.body, out)
	returned = true
	recycleBody(call.body)
	if err == nil {
		err = checkBody(len(out)-start, s.c.theirs.maxBody)
	}
	if err != nil {
		out = appendReply((*buf)[:0], call.id, err)
	}
	s.q.waitRoom(call.parent, nil)
	s.reply(call, finishFrame(out, 0))
	putFrameBuffer(buf, out)
}

// appendReply appends a reply: an error, or one of success, to which the body is still to be appended.
func appendReply(b []byte, id uint64, err error) []byte {
	b = binary.BigEndian.AppendUint64(appendHeader(b, frameReply, 0), id)
	if err == nil {
		return append(b, byte(OK))
	}
	return finishFrame(appendError(b, err), 0)
}

// reply sends the one reply of a call, and after the last one that is due closes the sending direction.
func (s *controlServer) reply(call *serverCall, frame []byte) {
	call.end(context.Canceled)
	s.mu.Lock()
	delete(s.running, call.id)
	_, mustFlush := s.q.append(frame)
	if s.draining && len(s.running) == 0 {
		mustFlush = s.q.finish() || mustFlush
	}
	s.mu.Unlock()
	if mustFlush {
		s.q.flush()
	}
}

// drain says goaway: calls that were read get their replies, later ones are dropped. It waits until that is written.
func (s *controlServer) drain() {
	s.mu.Lock()
	if s.draining {
		s.mu.Unlock()
		return
	}
	s.draining = true
	_, mustFlush := s.q.append(uint64Frame(frameGoaway, s.lastID))
	if len(s.running) == 0 {
		mustFlush = s.q.finish() || mustFlush
	}
	s.mu.Unlock()
	if mustFlush {
		s.q.flush()
	}
}
