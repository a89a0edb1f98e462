package rpc

import (
	"cmp"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// chunkSize is the most of a stream that one frame of ours carries: with its header a segment of a loopback, which is
	// the best that was measured. A little more would be the worst; real networks do not care.
	chunkSize = 65483 - headerSize
	// streamBuffer is the read buffer of a connection that receives a stream: more than a frame, so that the next header
	// comes with it, and less than a stream may cost.
	streamBuffer = 96 << 10

	// tlsChunkSize is chunkSize over TLS: three whole records. In front of it, in a buffer of the same size, is room for
	// what encryption adds.
	tlsChunkSize = 3*tlsRecord - headerSize
	// tlsStreamBuffer is streamBuffer over TLS: crypto/tls reads a record at a time, and has large buffers of its own.
	tlsStreamBuffer = tlsRecord + 1<<10

	// maxEmptyReads is how often in a row a source may return nothing and no error.
	maxEmptyReads = 100
	// serverIdleTimeout is how long a server keeps a data connection on which nothing is in progress. A client closes
	// it much earlier.
	serverIdleTimeout = 10 * time.Minute
)

var (
	chunkBuffers  = sync.Pool{New: func() any { return new([headerSize + chunkSize]byte) }}
	streamBuffers = sync.Pool{New: func() any { return new([streamBuffer]byte) }}

	tlsStreamBuffers = sync.Pool{New: func() any { return new([tlsStreamBuffer]byte) }}
)

// sendStream sends what src has as data frames. readErr is the error that ended the source, nil for io.EOF; writeErr
// is one of the connection.
func (c *frameConn) sendStream(src io.Reader, spawn func(func())) (total uint64, readErr, writeErr error) {
	b := chunkBuffers.Get().(*[headerSize + chunkSize]byte)
	defer chunkBuffers.Put(b)
	start := headerSize // of the data, with the frame's header in front of it
	if c.over != nil {
		start = len(b) - tlsChunkSize
	}
	for empty := 0; ; {
		n, err := src.Read(b[start:])
		if n < 0 || n > len(b)-start {
			return total, errors.New("rpc: the source returned an impossible count from Read"), nil
		}
		if n > 0 {
			appendHeader(b[:start-headerSize], frameData, n)
			if total += uint64(n); total < batchSize { // all there is, perhaps
				writeErr = c.writeSoon(b[start-headerSize:start+n], spawn)
			} else {
				writeErr = c.writeEndOf(b[:start+n], start-headerSize)
			}
			if writeErr != nil {
				return total, nil, writeErr
			}
			empty = 0
		}
		switch {
		case err == io.EOF: // and nothing else: a wrapped one is a failure
			return total, nil, nil
		case err != nil:
			return total, err, nil
		case n == 0:
			if empty++; empty == maxEmptyReads {
				return total, io.ErrNoProgress, nil
			}
		}
	}
}

// sourceCloser closes a source once, whoever is first. A panic of its Close is reported, and goes no further: it may be
// in a goroutine of ours.
type sourceCloser struct {
	source   io.Reader
	panicked func(p any)
	once     sync.Once
}

// close returns when the source is closed.
func (s *sourceCloser) close() { s.once.Do(s.closeSource) }

func (s *sourceCloser) closeSource() {
	closer, ok := s.source.(io.Closer)
	if !ok {
		return
	}
	defer func() {
		if p := recover(); p != nil {
			s.panicked(p)
		}
	}()
	closer.Close()
}

// streamReader reads the stream that the frames of a connection carry.
type streamReader struct {
	c      *frameConn
	left   int // of the data frame at hand
	total  uint64
	err    error // how the stream ended; io.EOF after an end with the right total
	client bool  // goaway may come
	goaway bool  // it came
}

// Read returns io.EOF only when the stream is complete.
func (s *streamReader) Read(p []byte) (int, error) {
	if s.err != nil || len(p) == 0 {
		return 0, s.err
	}
	if s.left == 0 {
		if s.err = s.advance(); s.err != nil {
			return 0, s.err
		}
	}
	n, err := s.c.readPayload(p[:min(len(p), s.left)])
	s.consumed(n)
	if err != nil {
		s.err = s.readFailed(err)
	}
	return n, s.err
}

func (s *streamReader) consumed(n int) {
	s.left -= n
	s.total += uint64(n)
}

// WriteTo writes the rest of the stream to w, from the buffer that it was read into, or without one if w is a file.
func (s *streamReader) WriteTo(w io.Writer) (written int64, err error) {
	write := func() (int, error) { return s.writeBuffered(w) }
	if f, ok := w.(*os.File); ok && s.c.startSplice() {
		defer s.c.stopSplice()
		write = func() (int, error) { return s.writeFile(f) }
	}
	for s.err == nil {
		if s.left == 0 {
			if s.err = s.advance(); s.err != nil {
				break
			}
		}
		n, err := write()
		s.consumed(n)
		written += int64(n)
		if err != nil {
			return written, err
		}
	}
	if s.err == io.EOF {
		return written, nil
	}
	return written, s.err
}

// writeBuffered writes some of the data frame at hand to w. Its error is that of w; s.err is that of the stream.
func (s *streamReader) writeBuffered(w io.Writer) (int, error) {
	if err := s.c.fill(1); err != nil {
		s.err = s.readFailed(noEOF(err))
		return 0, nil
	}
	b := s.c.buffered()
	b = b[:min(len(b), s.left)]
	n, err := w.Write(b)
	switch {
	case n < 0 || n > len(b):
		return 0, errors.New("rpc: the sink returned an impossible count from Write")
	case err == nil && n < len(b):
		err = io.ErrShortWrite
	}
	s.c.r += n
	return n, err
}

// writeFile is writeBuffered for a file.
func (s *streamReader) writeFile(f *os.File) (int, error) {
	if len(s.c.buffered()) > 0 {
		return s.writeBuffered(f)
	}
	n, sinkErr, err := s.c.spliceTo(f, s.left)
	if err != nil {
		s.err = s.readFailed(err)
	}
	return n, sinkErr
}

// advance reads frames up to the next that carries data, and returns how the stream ended if none does.
func (s *streamReader) advance() error {
	for {
		h, err := s.c.next()
		if err != nil {
			return s.readFailed(noEOF(err))
		}
		switch {
		case h.kind == frameData:
			s.left = h.size
			return nil
		case h.kind == frameEnd:
			return s.readEnd()
		case h.kind == frameFail:
			return s.readFail(h.size)
		case h.kind == frameGoaway && s.client:
			if err := s.readGoaway(); err != nil {
				return s.readFailed(err)
			}
		default:
			return s.c.violation(h.kind.String() + " in the middle of a stream")
		}
	}
}

// endAtHand tells whether the stream's end is in the buffer already.
func (s *streamReader) endAtHand() bool {
	b := s.c.buffered()
	return s.err == nil && s.left == 0 && len(b) >= headerSize+8 && frameType(b[0]) == frameEnd
}

func (s *streamReader) readEnd() error {
	total, err := s.c.readUint64()
	if err != nil {
		return s.readFailed(err)
	}
	if total != s.total {
		return s.c.fail(&Error{Code: DataLoss, Message: "the stream has " + strconv.FormatUint(total, 10) +
			" bytes, but " + strconv.FormatUint(s.total, 10) + " came"})
	}
	return io.EOF
}

func (s *streamReader) readFail(size int) error {
	_, failed, err := s.c.outcome(size)
	switch {
	case err != nil:
		return s.readFailed(err)
	case failed == nil:
		return s.c.violation("fail with code 0")
	}
	return failed
}

// readGoaway notes that the connection serves no further request; this one was started.
func (s *streamReader) readGoaway() error {
	if s.goaway {
		return s.c.violation("a second goaway")
	}
	s.goaway = true
	_, err := s.c.readUint64()
	return err
}

func (s *streamReader) readFailed(err error) error {
	if err == errInterrupted {
		return err
	}
	return s.c.lost(err)
}

// outcomeFrame returns a result or a fail: with the code and the text of err, or with a body.
func outcomeFrame(kind frameType, body []byte, err error) []byte {
	b := appendHeader(make([]byte, 0, headerSize+1+len(body)), kind, 0)
	if err != nil {
		b = appendError(b, err)
	} else {
		b = append(append(b, byte(OK)), body...)
	}
	return finishFrame(b, 0)
}

// grow gives the connection a large read buffer for the time of a stream.
func (c *frameConn) grow() {
	switch {
	case c.small != nil:
	case c.encrypted:
		c.small = c.buf
		c.swapBuffer(tlsStreamBuffers.Get().(*[tlsStreamBuffer]byte)[:])
	default:
		c.small = c.buf
		c.swapBuffer(streamBuffers.Get().(*[streamBuffer]byte)[:])
	}
}

// shrink takes it away again, unless it holds more than fits a small one.
func (c *frameConn) shrink() {
	large := c.buf
	if c.small == nil || c.w-c.r > smallBuffer {
		return
	}
	c.swapBuffer(c.small)
	c.small = nil
	if c.encrypted {
		tlsStreamBuffers.Put((*[tlsStreamBuffer]byte)(large))
	} else {
		streamBuffers.Put((*[streamBuffer]byte)(large))
	}
}

func (c *frameConn) swapBuffer(b []byte) {
	c.w = copy(b, c.buf[c.r:c.w])
	c.r = 0
	c.buf = b
}

// dataClient is the client's end of a data connection. One request at a time is in progress on it.
type dataClient struct {
	c          *frameConn
	preface    []byte       // not written yet; nil afterwards
	readAnswer func() error // reads the server's answer; nil when that was read
	requests   uint64       // that were sent
	goaway     bool         // the server takes no further request

	spawn func(func()) // runs a function in a goroutine

	// While idle, guarded by the client's mu.
	idleSince  time.Time
	watchTimer *time.Timer   // starts the watcher
	watchSet   bool          // the timer is
	watched    chan struct{} // closed when the watcher has returned; nil if there is none
}

// begin sends a request. Its result is that of the request if that could not be sent.
func (d *dataClient) begin(kind frameType, timeout time.Duration, endpoint string, body []byte) (r result, ok bool) {
	if len(body) > minMessageSize {
		if err := d.awaitAnswer(); err != nil {
			return unstarted(err, false), false
		}
		if err := checkBody(len(body), d.c.theirs.maxBody); err != nil {
			return unstarted(err, false), false
		}
	}
	start := len(d.preface)
	b := slices.Grow(d.preface, headerSize+8+1+len(endpoint)+len(body))
	b = appendHeader(b, kind, 0)
	b = finishFrame(appendRequest(b, timeout, endpoint, body), start)
	fresh := d.preface != nil
	d.preface = nil
	d.requests++
	d.c.startPulse()
	if err := d.c.lockWrites(); err != nil {
		return unstarted(err, !fresh), false
	}
	if fresh { // the server may not read before its answer is read
		d.spawn(func() { d.c.writeLocked(b) }) // ends with the connection at the latest; an error is one of that, too
	} else if touched, err := d.c.writeLocked(b); err != nil && touched {
		return result{err: err}, false
	} else if err != nil {
		return unstarted(err, true), false
	}
	return result{}, true
}

// roundTrip sends a request and reads its result.
func (d *dataClient) roundTrip(kind frameType, ctx context.Context, endpoint string, body []byte) result {
	if r, ok := d.begin(kind, timeoutOf(ctx), endpoint, body); !ok {
		return r
	}
	return d.awaitResult()
}

// awaitAnswer reads the server's answer to the preface unless that was done.
func (d *dataClient) awaitAnswer() error {
	if d.readAnswer == nil {
		return nil
	}
	if d.preface != nil {
		if err := d.c.write(d.preface); err != nil {
			return err
		}
		d.preface = nil
	}
	err := d.readAnswer()
	if err == nil {
		d.readAnswer = nil
	}
	return err
}

// awaitResult reads the result of the request.
func (d *dataClient) awaitResult() result {
	if err := d.awaitAnswer(); err != nil {
		if nothingRan(err) {
			return unstarted(err, false)
		}
		return result{err: err}
	}
	for {
		h, err := d.c.next()
		if err != nil {
			return result{err: d.c.lost(err)}
		}
		switch {
		case h.kind == frameResult:
			body, failed, err := d.c.outcome(h.size)
			if err != nil {
				err = d.c.lost(err)
			}
			return result{body: body, failed: failed, err: err}
		case h.kind == frameGoaway && !d.goaway:
			last, err := d.c.readUint64()
			if err != nil {
				return result{err: d.c.lost(err)}
			}
			if last < d.requests {
				return unstarted(d.c.fail(errGoaway), true)
			}
			d.goaway = true
		default:
			return result{err: d.c.violation("a server sent " + h.kind.String() + " instead of a result")}
		}
	}
}

// reusable tells whether the connection can serve another request.
func (d *dataClient) reusable() bool { return !d.goaway && d.c.ended() == nil }

// rest begins the time between two requests.
func (d *dataClient) rest() {
	d.c.stopPulse()
	if d.c.ended() == nil { // otherwise somebody may still be reading into the buffer
		d.c.shrink()
	}
}

// watchIdle returns when the idle connection ended, said anything but heartbeats, was idle for too long, or was
// interrupted. It tells whether it can be used again.
func (d *dataClient) watchIdle(timeout time.Duration) bool {
	d.c.setReadDeadline(d.idleSince.Add(timeout))
	_, err := d.c.next()
	return err == errInterrupted
}

// stopWatch ends the watch and tells whether it has left the connection alive.
func (d *dataClient) stopWatch(watched <-chan struct{}) bool {
	d.c.interrupt()
	<-watched
	if d.c.ended() != nil {
		return false
	}
	d.c.resume()
	return true
}

// upload sends r and returns the result. closer closes r; ctx's end must close both r and the connection.
// sourceErr is the error that ended r, if that is the first cause.
func (d *dataClient) upload(r io.Reader, closer *sourceCloser) (res result, sourceErr error) {
	var complete atomic.Bool // nothing but the end is left to be sent
	listened := make(chan struct{})
	d.spawn(func() { // ends with the result or the connection; upload waits for it
		defer close(listened)
		res = d.awaitResult()
		if complete.Load() {
			res.err = cmp.Or(res.err, d.c.followed())
			return
		}
		if res.err == nil && res.failed == nil {
			res.err = d.c.violation("success for an upload that has not ended")
		}
		d.c.fail(errEarlyResult)
		closer.close()
	})
	returned := false
	defer func() {
		if !returned { // r panicked
			d.c.fail(ErrClosed)
			<-listened
		}
	}()
	total, readErr, writeErr := d.c.sendStream(r, d.spawn)
	if readErr != nil && d.c.ended() == nil {
		complete.Store(true)
		if d.c.write(outcomeFrame(frameFail, nil, readErr)) == nil {
			sourceErr = readErr
		}
	} else if readErr == nil && writeErr == nil {
		complete.Store(true)
		d.c.write(uint64Frame(frameEnd, total))
	}
	returned = true
	<-listened
	return res, sourceErr
}

// errEarlyResult is why a connection ends whose upload was answered before its end.
var errEarlyResult error = &lostError{what: "the upload was answered before its end", cause: net.ErrClosed}

// downloadStream is the stream of a download, as the client's user has it. Read and WriteTo belong to one goroutine;
// Close may come from any.
type downloadStream struct {
	streamReader
	d       *dataClient
	ctx     context.Context
	release func() bool           // of what watches ctx
	wrap    func(err error) error // says what was being done
	settle  func(ok bool)         // gives the connection back
	over    atomic.Bool           // the stream has ended or was closed: who sets it, settles
	final   error                 // what Read returns from now on
}

// Read reads from the stream. io.EOF means that it is complete.
func (s *downloadStream) Read(p []byte) (int, error) {
	if s.isOver() {
		return 0, s.final
	}
	n, err := s.streamReader.Read(p)
	if err == nil && s.endAtHand() {
		s.err = s.advance()
		s.finish(s.err) // the next Read tells
		return n, nil
	}
	if err != nil {
		s.finish(err)
		err = s.final
	}
	return n, err
}

// WriteTo writes the rest of the stream to w; io.Copy calls it.
func (s *downloadStream) WriteTo(w io.Writer) (int64, error) {
	var n int64
	if !s.isOver() {
		var err error
		if n, err = s.streamReader.WriteTo(w); s.err == nil {
			return n, err // the sink's error
		}
		s.finish(s.err)
	}
	if s.final == io.EOF {
		return n, nil
	}
	return n, s.final
}

// isOver tells whether nothing more can be read, and final says why.
func (s *downloadStream) isOver() bool {
	if s.final == nil && s.over.Load() {
		s.final = s.wrap(ErrClosed)
	}
	return s.final != nil
}

// finish settles the stream, whose reader has met its end.
func (s *downloadStream) finish(err error) {
	if !s.over.CompareAndSwap(false, true) {
		s.final = s.wrap(ErrClosed)
		return
	}
	if s.release() && err != io.EOF {
		err = s.ctx.Err()
	}
	if s.goaway {
		s.d.goaway = true
	}
	s.settle(err == io.EOF)
	if err != io.EOF {
		err = s.wrap(err)
	}
	s.final = err
}

// Close ends the stream. Before its end that closes the connection, which tells the server.
func (s *downloadStream) Close() error {
	if s.over.CompareAndSwap(false, true) {
		s.release()
		s.d.c.fail(ErrClosed)
		s.settle(false)
	}
	return nil
}

// dataServer is the server's end of a data connection. Its own goroutine reads; a worker runs the handler, and reads
// in its stead while an upload's stream arrives.
type dataServer struct {
	c        *frameConn
	dispatch dispatcher
	// panicked is told of a panic of a source's Close.
	panicked func(p any)

	mu       sync.Mutex
	busy     bool // a request is in progress
	ending   bool // it is over, but its last frame is not written
	draining bool // no further request is started
	spent    bool // an upload failed: the client may still be sending, so that no further request can be found
	lingers  bool // the connection's goroutine reads no requests any more
	served   uint64

	flushers sync.WaitGroup     // of frames that were held back
	idle     *time.Timer        // drains the connection when nothing was in progress for serverIdleTimeout
	ended    time.Time          // when the latest request ended; zero while one is in progress, and guarded by mu
	worker   chan struct{}      // closed when the latest worker has returned; nil before the first
	cancel   context.CancelFunc // ends the latest worker's context
}

// serverStream is a request in progress on a data connection.
type serverStream struct {
	d       *dataServer
	kind    frameType
	ctx     context.Context
	body    []byte // of the request
	result  []byte
	begun   bool   // the result of a download was sent
	total   uint64 // of a download
	limited bool   // writes have a deadline

	// Of an upload.
	streamReader
	ended   chan struct{} // closed when nothing of the stream is left to be read
	release func() bool   // of what interrupts reads when ctx ends
	reading sync.Mutex    // held by the handler's reads
	handled atomic.Bool   // the handler has returned: it may not read any more
}

// serve reads requests until the connection ends, then ends the handler's context and waits for it. It returns why
// the connection ended.
func (d *dataServer) serve(ctx context.Context) error {
	d.ended = time.Now()
	d.idle = time.AfterFunc(serverIdleTimeout, d.closeIfIdle)
	defer d.flushers.Wait()
	defer d.idle.Stop()
	for {
		if err := d.awaitRequest(); err != nil {
			return d.end(err)
		}
		if err := d.readRequest(ctx); err != nil {
			return d.end(err)
		}
	}
}

// awaitRequest returns when the first byte of a request is there and the previous one has ended.
func (d *dataServer) awaitRequest() error {
	for {
		if err := d.c.fill(1); err != nil {
			return err
		}
		if frameType(d.c.buffered()[0]) != frameHeartbeat {
			break
		}
		if err := d.c.skipHeartbeat(); err != nil {
			return err
		}
	}
	if d.isBusy() {
		return d.c.violation("a request before the end of the previous one")
	}
	d.join()
	return nil
}

func (d *dataServer) isBusy() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.busy
}

// join waits for the worker.
func (d *dataServer) join() {
	if d.worker != nil {
		<-d.worker
	}
}

// end ends the connection after an error of reading it: in a way that the client expects, if nothing is in progress.
func (d *dataServer) end(err error) error {
	if err != errInterrupted && (err != io.EOF || d.isBusy()) {
		err = d.c.lost(err)
		if d.cancel != nil {
			d.cancel()
		}
		d.join()
		d.c.stopPulse()
		return err
	}
	d.join()
	d.c.stopPulse()
	d.mu.Lock()
	d.lingers = true
	d.mu.Unlock()
	switch {
	case err == io.EOF:
	case d.spent:
		d.c.linger()
	default:
		d.sayGoaway()
	}
	return d.c.fail(errPolite)
}

// sayGoaway ends the connection after its last request. The client may still be reading the stream of that from the
// kernel's buffers: then it sends heartbeats, and closing would make TCP throw the rest away. So it is left alone until it
// ends the connection or falls silent.
func (d *dataServer) sayGoaway() {
	d.c.resume()
	said := make(chan struct{})
	go func() { // ends with the write or the connection; sayGoaway waits for it
		defer close(said)
		d.c.write(uint64Frame(frameGoaway, d.served))
		d.c.shutWrite()
	}()
	heartbeat := d.c.theirs.heartbeat
	wait := max(lingerTime, heartbeat+heartbeat/watchesPerInterval-time.Since(d.ended))
	const watches = patience * watchesPerInterval
	for quiet := 0; quiet < watches; { // they are counted as those of the pulse are, and for the same reason
		d.c.setReadDeadline(time.Now().Add(wait / watches))
		n, err := d.c.readSome(d.c.buf)
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if quiet++; n > 0 {
			quiet, wait = 0, patience*heartbeat
		}
	}
	d.c.close()
	<-said
}

// readRequest reads a request and starts its worker.
func (d *dataServer) readRequest(ctx context.Context) error {
	d.mu.Lock()
	d.ended = time.Time{}
	d.mu.Unlock()
	d.c.startPulse()
	h, err := d.c.next()
	if err != nil {
		return noEOF(err)
	}
	if h.kind != frameDownload && h.kind != frameUpload {
		return d.c.violation("a client sent " + h.kind.String() + " instead of a request")
	}
	q, err := d.c.request(h.size)
	if err != nil {
		return err
	}
	if err := d.c.awaitAnswered(); err != nil {
		return err
	}
	if !d.begin() {
		return errInterrupted
	}
	s := &serverStream{streamReader: streamReader{c: d.c}, d: d, kind: h.kind, body: q.body, ended: make(chan struct{})}
	s.ctx, d.cancel = callContext(ctx, q.timeout)
	worker := make(chan struct{})
	d.worker = worker
	go func() { // ends with the handler; join waits for it
		defer close(worker)
		d.work(s, q.name)
	}()
	if h.kind == frameUpload {
		return d.lendReader(s)
	}
	return nil
}

// begin tells whether the request may be started.
func (d *dataServer) begin() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.draining || d.spent {
		return false
	}
	d.served++
	d.busy = true
	return true
}

// lendReader waits until the worker has read the stream of an upload, or has given up.
func (d *dataServer) lendReader(s *serverStream) error {
	select {
	case <-s.ended:
		return nil
	case <-d.worker:
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.spent {
			return errInterrupted
		}
		return nil
	case <-d.c.done:
		return d.c.ended()
	}
}

// work runs the handler of a request and sends the last frame.
func (d *dataServer) work(s *serverStream, endpoint []byte) {
	returned := false
	cancel := d.cancel
	defer func() {
		cancel()
		if !returned { // the handler has called runtime.Goexit
			d.c.fail(errNoReturn)
		}
	}()
	h, err := d.dispatch.accept(s.kind, endpoint)
	if err == nil {
		err = d.dispatch.run(s.ctx, h, s)
	}
	recycleBody(s.body)
	returned = true
	last, reusable := s.lastFrame(err)
	d.mu.Lock()
	d.busy = false // before the client can know that it is over, and send its next request
	d.ending = true
	d.spent = !reusable
	d.mu.Unlock()
	if s.limited {
		s.limitWrites() // closing the source may have taken its time
	}
	d.c.write(last)
	if s.limited {
		d.c.nc.SetWriteDeadline(time.Time{})
	}
	d.mu.Lock()
	d.ended = time.Now()
	d.ending = false
	d.mu.Unlock()
	d.c.stopPulse()
	d.stopIfIdle()
}

// drain lets the request in progress end and starts no other: goaway, then the end of the connection.
func (d *dataServer) drain() {
	d.mu.Lock()
	d.draining = true
	d.mu.Unlock()
	d.stopIfIdle()
}

// closeIfIdle drains a connection on which nothing was in progress for a long time. The timer calls it.
func (d *dataServer) closeIfIdle() {
	d.mu.Lock()
	left := serverIdleTimeout - time.Since(d.ended)
	if d.ended.IsZero() { // from the first byte of a request until its last is written
		left = serverIdleTimeout
	}
	d.mu.Unlock()
	switch {
	case left <= 0:
		d.drain()
	case d.c.ended() == nil:
		d.idle.Reset(left)
	}
}

// stopIfIdle wakes the connection's goroutine when no further request is to be served. While the last frame is written, that
// goes on listening: otherwise nobody would notice a client that dies without reading it.
func (d *dataServer) stopIfIdle() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.busy && !d.ending && !d.lingers && (d.spent || d.draining) {
		d.c.interrupt()
	}
}

// handle runs the handler of a download or an upload.
func (s *serverStream) handle(ctx context.Context, h *handler) error {
	if s.kind == frameUpload {
		return s.receive(ctx, h)
	}
	res, stream, err := h.run(ctx, s.body, nil)
	closer := &sourceCloser{source: stream, panicked: s.d.panicked}
	defer closer.close() // also if the result panics
	if err == nil {
		s.result, err = appendResult(nil, res)
	}
	if err != nil {
		return err
	}
	return s.send(ctx, stream, closer)
}

// receive has the handler read the stream of an upload, until it returns. The end of ctx makes its reads end.
func (s *serverStream) receive(ctx context.Context, h *handler) error {
	s.c.grow()
	s.ctx = ctx
	s.release = whenDone(ctx, s.c.interrupt)
	returned := false
	defer func() {
		if !returned { // it panicked
			s.handled.Store(true)
		}
	}()
	res, _, err := h.run(ctx, s.body, uploadBody{s})
	if err == nil {
		s.result, err = appendResult(nil, res)
	}
	if err == nil {
		err = checkBody(len(s.result), s.c.theirs.maxBody)
	}
	returned = true
	s.handled.Store(true)
	if !s.reading.TryLock() { // a Read was left behind, and has the connection
		s.c.interrupt()
		return cmp.Or(err, errUnread)
	}
	defer s.reading.Unlock()
	if err == nil {
		err = s.complete()
	}
	if !s.hasEnded() {
		s.release()
	}
	return err
}

// lastFrame is what ends a request whose handler returned err, and whether the connection can serve another.
func (s *serverStream) lastFrame(err error) (frame []byte, reusable bool) {
	switch {
	case s.kind == frameUpload:
		return outcomeFrame(frameResult, s.result, err), err == nil
	case !s.begun && err == nil:
		err = &Error{Code: Internal, Message: "the handler returned nothing"}
		fallthrough
	case !s.begun:
		return outcomeFrame(frameResult, nil, err), true
	case err != nil:
		return outcomeFrame(frameFail, nil, err), true
	}
	return uint64Frame(frameEnd, s.total), true
}

// send sends the result of a download, then the stream, which the end of ctx closes. A nil stream is an empty one.
func (s *serverStream) send(ctx context.Context, stream io.Reader, closer *sourceCloser) error {
	if stream == nil {
		return s.sendResult()
	}
	release := whenDone(ctx, func() {
		// What is left to say gets a little time to be written, though the client may not be reading.
		s.limitWrites()
		closer.close()
	})
	defer release()
	if err := s.sendResult(); err != nil {
		return err
	}
	total, readErr, writeErr := s.c.sendStream(stream, s.d.flushers.Go)
	s.total = total
	switch {
	case writeErr != nil:
		return writeErr
	case ctx.Err() != nil: // also if the source calls its closing io.EOF
		return ctx.Err()
	}
	return readErr
}

// limitWrites gives what is left to be said a little time to be written.
func (s *serverStream) limitWrites() {
	s.c.nc.SetWriteDeadline(time.Now().Add(lingerTime))
	s.limited = true
}

func (s *serverStream) sendResult() error {
	if err := checkBody(len(s.result), s.c.theirs.maxBody); err != nil {
		return err
	}
	s.begun = true
	return s.c.writeSoon(outcomeFrame(frameResult, s.result, nil), s.d.flushers.Go)
}

// uploadBody is the stream of an upload, as its handler has it.
type uploadBody struct{ s *serverStream }

// Read reads from the stream. io.EOF means that it is complete.
func (b uploadBody) Read(p []byte) (int, error) {
	b.s.reading.Lock()
	defer b.s.reading.Unlock()
	if b.s.handled.Load() {
		return 0, ErrClosed
	}
	n, err := b.s.streamReader.Read(p)
	return n, b.s.noteEnd(err)
}

// WriteTo writes the rest of the stream to w; io.Copy calls it.
func (b uploadBody) WriteTo(w io.Writer) (int64, error) {
	b.s.reading.Lock()
	defer b.s.reading.Unlock()
	if b.s.handled.Load() {
		return 0, ErrClosed
	}
	n, err := b.s.streamReader.WriteTo(w)
	return n, b.s.noteEnd(err)
}

// noteEnd gives the reader back to the connection's goroutine when the stream has ended. It returns the error for
// the handler's Read.
func (s *serverStream) noteEnd(err error) error {
	if s.err != nil && s.err != errInterrupted && !s.hasEnded() {
		if s.release() {
			s.c.resume()
		}
		s.c.shrink()
		close(s.ended)
	}
	if err == errInterrupted {
		return cmp.Or(s.ctx.Err(), ErrClosed) // never nil, which would be a clean end
	}
	return err
}

func (s *serverStream) hasEnded() bool {
	select {
	case <-s.ended:
		return true
	default:
		return false
	}
}

// errUnread is the error for a handler that calls an upload a success of which it has not seen the end.
var errUnread error = &Error{Code: FailedPrecondition, Message: "the handler did not read the stream to its end"}

// complete makes sure that a handler which returned success has missed nothing: it may have read all bytes without
// having seen the end, which then has to be next.
func (s *serverStream) complete() error {
	if s.err == nil && s.left == 0 {
		s.readEndSoon()
	}
	switch {
	case s.err == io.EOF:
		return nil
	case s.err == nil, s.err == errInterrupted && s.ctx.Err() == nil:
		return errUnread
	case s.err == errInterrupted:
		return s.ctx.Err()
	}
	return s.err
}

// readEndSoon reads the next frame of the stream if it comes at once.
func (s *serverStream) readEndSoon() {
	soon, cancel := context.WithTimeout(s.ctx, lingerTime)
	defer cancel()
	release := whenDone(soon, s.c.interrupt)
	s.err = s.advance()
	if release() && s.err != errInterrupted {
		s.c.resume()
	}
	s.noteEnd(nil)
}
