package rpc

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"time"
)

const (
	defaultCallTimeout      = 5 * time.Minute
	defaultIdleTimeout      = time.Minute
	defaultMaxIdleDataConns = 4

	// watchDelay is how long a data connection is idle before somebody watches it: streams that follow each other closely
	// are spared that.
	watchDelay = 5 * time.Millisecond

	// Waits between attempts to connect: short enough not to be noticed, long enough not to load a server that is in
	// trouble.
	minBackoff = 100 * time.Millisecond
	maxBackoff = 30 * time.Second
)

// ClientConfig configures a [Client]. The zero value works.
type ClientConfig struct {
	// CallTimeout bounds a Call whose ctx has no deadline. 0 means 5 minutes, a negative value no bound.
	CallTimeout time.Duration
	// HandshakeTimeout bounds connecting, with TLS and all, and the wait for the server's answer. 0 means 10 seconds.
	HandshakeTimeout time.Duration
	// HeartbeatInterval is the longest silence that the client keeps while something is in progress, 10 ms to 5 minutes,
	// in whole milliseconds; the server gives it up after three. 0 means 5 seconds.
	HeartbeatInterval time.Duration
	// IdleTimeout is how long unused connections are kept. 0 means a minute; with a negative value they are closed at
	// once.
	IdleTimeout time.Duration
	// MaxMessageSize is the largest result that is accepted, in bytes, at least 65536. 0 means 64 MiB.
	MaxMessageSize int
	// MaxIdleDataConns is how many unused data connections are kept. 0 means 4, a negative value none.
	MaxIdleDataConns int
	// Logger takes reports; nil is silent.
	Logger Logger
}

// withDefaults fills in the defaults and says what is wrong with the rest.
func (config ClientConfig) withDefaults() (ClientConfig, error) {
	config.CallTimeout = orDefault(config.CallTimeout, defaultCallTimeout)
	config.HandshakeTimeout = orDefault(config.HandshakeTimeout, defaultHandshakeTimeout)
	config.HeartbeatInterval = orDefault(config.HeartbeatInterval, defaultHeartbeat)
	config.IdleTimeout = orDefault(config.IdleTimeout, defaultIdleTimeout)
	config.MaxMessageSize = orDefault(config.MaxMessageSize, defaultMessageSize)
	config.MaxIdleDataConns = orDefault(config.MaxIdleDataConns, defaultMaxIdleDataConns)
	if isNil(config.Logger) {
		config.Logger = silent{}
	}
	return config, checkLimits(config.HandshakeTimeout, config.HeartbeatInterval, config.MaxMessageSize)
}

// Client is the active side of a pair of daemons. It keeps one connection for calls, and one for each stream that is
// in progress, and connects when it has to. Its methods are safe for concurrent use. Close it when it is no longer used.
type Client struct {
	connecter Connecter
	config    ClientConfig
	invalid   error // what is wrong with the configuration
	ours      promises
	stats     counters

	ctx    context.Context // ends with Close
	cancel context.CancelFunc

	goroutines sync.WaitGroup // Add only with mu held, and not after Close

	mu       sync.Mutex
	closed   bool
	conns    map[*frameConn]struct{} // that are open
	control  *controlClient
	dialing  *controlDial
	failures int           // of the control connection, in a row
	retryAt  time.Time     // no dialing before
	reset    chan struct{} // closed and replaced by ResetConnectBackoff
	idle     []*dataClient // the latest last
}

// controlDial is an attempt to connect that all callers wait for.
type controlDial struct {
	done chan struct{} // closed when one of the others is set
	cc   *controlClient
	err  error
}

// NewClient returns a client of the server that connecter connects to. It dials nothing yet. What is wrong with its
// arguments is the error of all that is done with it.
func NewClient(connecter Connecter, config ClientConfig) *Client {
	config, invalid := config.withDefaults()
	if isNil(connecter) {
		invalid = errors.New("rpc: NewClient: the Connecter is nil")
	}
	// Connections outlive the calls that they were made for: their context begins here.
	ctx, cancel := context.WithCancel(context.Background())
	return &Client{
		connecter: connecter, config: config, invalid: invalid, ctx: ctx, cancel: cancel,
		ours:  promises{config.HeartbeatInterval, config.MaxMessageSize},
		conns: make(map[*frameConn]struct{}), reset: make(chan struct{}),
	}
}

// Close closes all connections and returns when the client's goroutines are gone. What was in progress ends with
// ErrClosed, as does what is begun later. Connections made with Dial are their owner's.
func (c *Client) Close() error {
	c.mu.Lock()
	c.closed = true
	control, idle, conns := c.control, c.idle, c.conns
	c.idle, c.conns = nil, nil
	c.mu.Unlock()
	if control != nil && control.unused() {
		control.c.close()
	}
	for _, d := range idle {
		d.watchTimer.Stop()
		d.c.close()
		if d.watched == nil {
			c.forget(d.c)
		}
	}
	for fc := range conns {
		fc.fail(ErrClosed)
	}
	c.cancel()
	c.goroutines.Wait()
	return nil
}

// Stats returns the client's counters.
func (c *Client) Stats() Stats { return c.stats.snapshot() }

// ResetConnectBackoff ends the wait after failed attempts to connect: the next one is made at once. To be called when
// the network has changed.
func (c *Client) ResetConnectBackoff() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failures, c.retryAt = 0, time.Time{}
	close(c.reset)
	c.reset = make(chan struct{})
}

// Call has the server handle a call: it sends req and waits for the result, which res then holds. A nil req is sent as
// an empty message, for a nil res the result is ignored. Connecting and back-off are within ctx; CallTimeout bounds a
// ctx without a deadline. When ctx ends, the handler's context ends, too.
//
// An error of the handler is an [*Error]. Otherwise the error says whether the handler may have run; a call that
// was not started, because the server was stopping, is retried once, no other is.
func (c *Client) Call(ctx context.Context, method string, req, res Message) error {
	c.stats.calls.Add(1)
	err := c.call(ctx, method, req, res)
	if err != nil {
		c.stats.callsFailed.Add(1)
	}
	return err
}

func (c *Client) call(ctx context.Context, method string, req, res Message) error {
	if err := c.check(ctx, method); err != nil {
		return callError(method, nil).with(err, fateNotRun)
	}
	deadline := c.callDeadline(ctx)
	for retried := false; ; {
		cc, err := c.controlConn(ctx, deadline)
		if err != nil {
			return callError(method, nil).with(err, fateNotRun)
		}
		r := cc.tryCall(ctx, deadline, method, req)
		switch {
		case r.err == errNotBegun && ctx.Err() == nil:
			continue
		case r.again && !retried && ctx.Err() == nil:
			retried = true
			continue
		case r.err != nil && c.ctx.Err() != nil:
			r.err = ErrClosed
		}
		return callError(method, cc).outcome(ctx, r, res)
	}
}

// callDeadline is that of a call whose ctx has none, or zero.
func (c *Client) callDeadline(ctx context.Context) time.Time {
	if _, ok := ctx.Deadline(); ok || c.config.CallTimeout < 0 {
		return time.Time{}
	}
	return time.Now().Add(c.config.CallTimeout)
}

// callError says what was being done.
func callError(method string, cc *controlClient) opError {
	e := opError{op: "call", target: method, label: labelControl}
	if cc != nil {
		e.peer = cc.c.peer
	}
	return e
}

// check returns why a request cannot even be tried.
func (c *Client) check(ctx context.Context, name string) error {
	switch {
	case c.invalid != nil:
		return c.invalid
	case len(name) < 1 || len(name) > maxName:
		return &Error{Code: InvalidArgument, Message: "the name " + quoted(name) + " is not 1 to 255 bytes long"}
	}
	return ctx.Err()
}

// with returns the error, complete.
func (e opError) with(err error, fate string) error {
	e.err, e.fate = err, fate
	return &e
}

// outcome decodes the result into res, or returns why there is none.
func (e opError) outcome(ctx context.Context, r result, res Message) error {
	switch {
	case r.failed != nil:
		return e.with(r.failed, "")
	case r.err != nil:
		fate := fateMayRun
		if r.notStarted {
			fate = fateNotRun
		}
		if ctx.Err() != nil {
			r.err = ctx.Err()
		}
		return e.with(r.err, fate)
	}
	var err error
	if res != nil {
		err = res.UnmarshalBinary(r.body)
	}
	recycleBody(r.body)
	if err != nil {
		return e.with(&detailError{"cannot decode the result", err}, "")
	}
	return nil
}

// Download has the server send a stream. It sends req and waits for the result, which res then holds, and returns the
// stream: io.EOF at its end means that it is complete, any other error that it is not. The stream is tied to ctx, and
// the caller closes it; closed before its end, it ends the handler's context. It is an io.WriterTo, which io.Copy uses;
// one goroutine at a time may read it, and any may close it. For nil messages and errors see Call.
func (c *Client) Download(ctx context.Context, endpoint string, req, res Message) (io.ReadCloser, error) {
	c.stats.streams.Add(1)
	stream, err := c.download(ctx, endpoint, req, res)
	if err != nil {
		c.stats.failed.Add(1)
		return nil, err
	}
	return stream, nil
}

func (c *Client) download(ctx context.Context, endpoint string, req, res Message) (*downloadStream, error) {
	op := opError{op: "download", target: endpoint, label: labelData}
	body, err := c.encode(ctx, endpoint, req)
	if err != nil {
		return nil, op.with(err, fateNotRun)
	}
	connect := c.dataConn
	for retried := false; ; retried, connect = true, c.dialData {
		d, err := connect(ctx)
		if err != nil {
			return nil, op.with(err, fateNotRun)
		}
		op.peer = d.c.peer
		release := whenDone(ctx, func() { d.c.fail(ctx.Err()) })
		r := d.roundTrip(frameDownload, ctx, endpoint, body)
		if r.again && !retried && ctx.Err() == nil {
			release()
			c.settle(d)
			continue
		}
		if err = c.downloadOutcome(ctx, op, d, r, res, release); err != nil {
			return nil, err
		}
		d.c.grow()
		return &downloadStream{
			streamReader: streamReader{c: d.c, client: true, goaway: d.goaway}, d: d, ctx: ctx, release: release,
			wrap: func(err error) error { return op.with(err, "") },
			settle: func(ok bool) {
				c.settle(d)
				if !ok {
					c.stats.failed.Add(1)
				}
			},
		}, nil
	}
}

// downloadOutcome decodes the result of a download, or gives the connection back.
func (c *Client) downloadOutcome(ctx context.Context, op opError, d *dataClient, r result, res Message, release func() bool) (err error) {
	wanted := false
	defer func() {
		if wanted {
			return
		}
		if r.failed == nil && !r.notStarted {
			d.c.fail(errUnwanted) // also if res could not be decoded: the stream that follows is not wanted
		}
		release()
		c.settle(d)
	}()
	err = op.outcome(ctx, r, res)
	wanted = err == nil
	return err
}

// errUnwanted is why a connection ends whose stream nobody wants.
var errUnwanted error = &lostError{what: "the stream is not wanted", cause: net.ErrClosed}

// encode returns the body of a request that may be tried.
func (c *Client) encode(ctx context.Context, name string, req Message) ([]byte, error) {
	if err := c.check(ctx, name); err != nil {
		return nil, err
	}
	return appendMessage(nil, req)
}

// Upload sends req and all that r has, and waits for the result, which res then holds. It returns nil only when r has
// ended with io.EOF and the handler has read all of it and returned success. An error of r reaches the handler as the
// error of its stream. An error of the handler stops the upload at once. Upload closes r on every path if it is an
// io.Closer, also in the middle of a Read, to end one that blocks; without Close such a Read holds Upload up. For nil
// messages and errors see Call; an upload is never retried, because r may have been read from.
func (c *Client) Upload(ctx context.Context, endpoint string, req Message, r io.Reader, res Message) error {
	c.stats.streams.Add(1)
	err := c.upload(ctx, endpoint, req, r, res)
	if err != nil {
		c.stats.failed.Add(1)
	}
	return err
}

func (c *Client) upload(ctx context.Context, endpoint string, req Message, r io.Reader, res Message) error {
	closer := &sourceCloser{source: r, panicked: func(p any) {
		c.config.Logger.ErrorContext(ctx, "closing a source panicked", "panic", p)
	}}
	defer closer.close()
	op := opError{op: "upload", target: endpoint, label: labelData}
	if r == nil {
		return op.with(errors.New("rpc: the source is nil"), fateNotRun)
	}
	body, err := c.encode(ctx, endpoint, req)
	if err != nil {
		return op.with(err, fateNotRun)
	}
	connect := c.dataConn
	for retried := false; ; retried, connect = true, c.dialData {
		d, err := connect(ctx)
		if err != nil {
			return op.with(err, fateNotRun)
		}
		op.peer = d.c.peer
		result, sourceErr, begun := c.uploadOver(ctx, d, endpoint, body, r, closer)
		if !begun && result.again && !retried && ctx.Err() == nil {
			continue
		}
		if sourceErr != nil {
			return op.with(&detailError{"the source failed", sourceErr}, "")
		}
		return op.outcome(ctx, result, res)
	}
}

// uploadOver uploads over a data connection, and gives that back. begun tells whether r may have been read from.
func (c *Client) uploadOver(ctx context.Context, d *dataClient, endpoint string, body []byte, r io.Reader, closer *sourceCloser) (res result, sourceErr error, begun bool) {
	defer c.settle(d)
	release := whenDone(ctx, func() {
		d.c.fail(ctx.Err())
		closer.close()
	})
	defer release()
	res, begun = d.begin(frameUpload, timeoutOf(ctx), endpoint, body)
	if begun {
		res, sourceErr = d.upload(r, closer)
	}
	if res.failed != nil || sourceErr != nil {
		d.c.close() // as the server does: what was sent may have crossed its result
	}
	return res, sourceErr, begun
}

// Dial connects to a label of the user's own, which the server serves with HandleLabel, and returns the connection
// when the server has agreed. It is the caller's: the Client neither watches nor closes it.
func (c *Client) Dial(ctx context.Context, label string) (net.Conn, error) {
	op := opError{op: "connect to", target: label}
	if c.invalid != nil {
		return nil, op.with(c.invalid, "")
	}
	if wrong := userLabel(label); wrong != "" {
		return nil, op.with(&Error{Code: InvalidArgument, Message: wrong}, "")
	}
	if c.ctx.Err() != nil {
		return nil, op.with(ErrClosed, "")
	}
	ctx, cancel := c.untilClosed(ctx)
	defer cancel()
	within, cancelWithin := context.WithTimeout(ctx, c.config.HandshakeTimeout)
	defer cancelWithin()
	nc, err := c.open(ctx, within)
	if err != nil {
		return nil, op.with(err, "")
	}
	op.peer = addrString(nc.RemoteAddr())
	release := whenDone(within, func() { nc.Close() })
	_, err = nc.Write(c.preface(label))
	if err == nil {
		_, err = c.readAnswer(&exactReader{r: nc}, label)
	}
	if release() {
		err = c.handshakeEnded(ctx)
	}
	if err != nil {
		nc.Close()
		return nil, op.with(err, "")
	}
	c.stats.conns.Add(1)
	return nc, nil
}

// untilClosed returns a ctx that ends with the client, too.
func (c *Client) untilClosed(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(c.ctx, func() { cancel(ErrClosed) })
	return ctx, func() {
		stop()
		cancel(nil)
	}
}

// preface is what a client says first.
func (c *Client) preface(label string) []byte {
	return appendLabel(appendBanner(make([]byte, 0, 256), c.ours), label)
}

// open connects. within is ctx with the handshake's timeout.
func (c *Client) open(ctx, within context.Context) (net.Conn, error) {
	nc, err := c.callConnect(within)
	if err != nil && nc != nil {
		nc.Close()
	}
	deadline, _ := within.Deadline() // of which a dialer may know before within does
	switch {
	case err != nil && (within.Err() != nil || isTimeout(err) && !time.Now().Before(deadline)):
		return nil, c.handshakeEnded(ctx)
	case err != nil:
		return nil, &lostError{what: "cannot connect", cause: err}
	case nc == nil:
		return nil, errors.New("rpc: the Connecter returned neither a connection nor an error")
	}
	return nc, nil
}

// callConnect calls the Connecter, and contains its panic.
func (c *Client) callConnect(ctx context.Context) (nc net.Conn, err error) {
	defer func() {
		if p := recover(); p != nil {
			c.config.Logger.ErrorContext(ctx, "Connect panicked", "panic", p, "stack", string(debug.Stack()))
			err = errors.New("rpc: Connect panicked")
		}
	}()
	return c.connecter.Connect(ctx)
}

// handshakeEnded is the error for a handshake during which ctx or the handshake's time has ended.
func (c *Client) handshakeEnded(ctx context.Context) error {
	if ctx.Err() != nil {
		if errors.Is(context.Cause(ctx), ErrClosed) {
			return ErrClosed
		}
		return ctx.Err()
	}
	if deadline, ok := ctx.Deadline(); ok && !time.Now().Before(deadline) {
		return context.DeadlineExceeded
	}
	return &lostError{what: "handshake not done within " + c.config.HandshakeTimeout.String(), cause: os.ErrDeadlineExceeded}
}

// readAnswer reads the server's answer to the preface.
func (c *Client) readAnswer(r lineSource, label string) (promises, error) {
	line, err := readLine(r)
	var protocol *ProtocolError
	switch {
	case err == io.EOF, err == io.ErrUnexpectedEOF: // and no other: one that wraps it says why
		return promises{}, &lostError{what: "the server closed the connection without an answer; does it speak " +
			protocolName + ", and both sides TLS or neither?", cause: io.ErrUnexpectedEOF}
	case errors.As(err, &protocol):
		return promises{}, err
	case err != nil:
		return promises{}, &lostError{what: "connection lost before the server answered", cause: err}
	}
	theirs, err := parseAnswer(line)
	var refused *HandshakeError
	if errors.As(err, &refused) {
		refused.Label = label
		c.stats.refused.Add(1)
	}
	return theirs, err
}

// connect opens a connection for frames. The preface is still to be written; readAnswer then has to be called.
func (c *Client) connect(ctx context.Context, label string) (fc *frameConn, readAnswer func() error, err error) {
	began := time.Now()
	within, cancel := context.WithTimeout(ctx, c.config.HandshakeTimeout)
	defer cancel()
	nc, err := c.open(ctx, within)
	if err != nil {
		return nil, nil, err
	}
	fc = newFrameConn(nc, c.ours, &c.stats)
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil, nil, fc.fail(ErrClosed)
	}
	c.conns[fc] = struct{}{}
	c.mu.Unlock()
	late := time.AfterFunc(c.config.HandshakeTimeout-time.Since(began), func() { fc.fail(c.handshakeEnded(c.ctx)) })
	return fc, func() error {
		theirs, err := c.readAnswer(fc, label)
		late.Stop()
		if err != nil {
			return fc.fail(err)
		}
		fc.setPromises(theirs)
		c.noteOpen(fc, label)
		return nil
	}, nil
}

// noteOpen counts a connection whose handshake has succeeded.
func (c *Client) noteOpen(fc *frameConn, label string) {
	c.stats.conns.Add(1)
	c.stats.openConns.Add(1)
	c.config.Logger.DebugContext(c.ctx, "connected", "peer", fc.peer, "label", label)
}

// forget notes that a connection has ended.
func (c *Client) forget(fc *frameConn) {
	if fc.theirs.heartbeat != 0 {
		c.stats.openConns.Add(-1)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.conns, fc)
}

// controlConn returns the control connection, and makes it if there is none. One dials for all; during back-off all
// wait. The deadline is for a ctx that has none, zero for none at all.
func (c *Client) controlConn(ctx context.Context, deadline time.Time) (*controlClient, error) {
	c.mu.Lock()
	cc := c.control
	c.mu.Unlock()
	if cc != nil && !cc.refused.Load() {
		return cc, nil
	}
	if !deadline.IsZero() {
		within, cancel := context.WithDeadline(ctx, deadline)
		defer cancel()
		ctx = within
	}
	return c.awaitControl(ctx)
}

func (c *Client) awaitControl(ctx context.Context) (*controlClient, error) {
	for {
		c.mu.Lock()
		if c.closed {
			c.mu.Unlock()
			return nil, ErrClosed
		}
		if c.control != nil && !c.control.refused.Load() {
			defer c.mu.Unlock()
			return c.control, nil
		}
		wait := time.Until(c.retryAt)
		if c.dialing == nil && wait <= 0 {
			c.dialing = &controlDial{done: make(chan struct{})}
			dial := c.dialing
			c.goroutines.Go(func() { c.runControl(dial) }) // ends with the connection; Close waits for it
		}
		dial, reset := c.dialing, c.reset
		c.mu.Unlock()
		if dial != nil {
			select {
			case <-dial.done:
				return dial.cc, dial.err // though the connection may have ended again: why it did is the call's error
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		if err := c.sleep(ctx, wait, reset); err != nil {
			return nil, err
		}
	}
}

// sleep returns after the wait, and when reset is closed or the client is. Its error is that of ctx.
func (c *Client) sleep(ctx context.Context, wait time.Duration, reset <-chan struct{}) error {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-reset:
	case <-c.ctx.Done():
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

// runControl makes the control connection and reads from it until it ends.
func (c *Client) runControl(dial *controlDial) {
	fc, readAnswer, err := c.connect(c.ctx, labelControl)
	if err != nil {
		if c.ctx.Err() != nil {
			err = ErrClosed
		}
		c.mu.Lock()
		report := c.backOffLocked(err)
		dial.err = err
		c.dialing = nil
		c.mu.Unlock()
		close(dial.done)
		report()
		return
	}
	cc := newControlClient(fc, c.preface(labelControl), c.config.IdleTimeout)
	c.mu.Lock()
	c.control, c.dialing = cc, nil
	dial.cc = cc
	c.mu.Unlock()
	close(dial.done)
	cc.run(readAnswer, func(cause error) { c.controlEnded(cc, cause) })
	c.forget(fc)
}

// controlEnded begins the back-off if the connection was of no use.
func (c *Client) controlEnded(cc *controlClient, cause error) {
	c.mu.Lock()
	if c.control == cc {
		c.control = nil
	}
	report := func() {}
	switch {
	case cause != errPolite && !cc.hasProved():
		report = c.backOffLocked(cause)
	case cause != errPolite && !c.closed:
		report = func() {
			c.config.Logger.WarnContext(c.ctx, "control connection lost", "peer", cc.c.peer, "error", cause)
		}
		fallthrough
	default:
		c.failures, c.retryAt = 0, time.Time{}
	}
	c.mu.Unlock()
	report()
}

// backOffLocked notes a failure to connect. It returns what logs it, to be called without the lock.
func (c *Client) backOffLocked(err error) (report func()) {
	if c.closed {
		return func() {}
	}
	c.failures++
	failures, wait := c.failures, backoff(c.failures)
	c.retryAt = time.Now().Add(wait)
	return func() {
		c.config.Logger.WarnContext(c.ctx, "cannot connect", "label", labelControl, "error", err, "failures", failures, "retry_in", wait)
	}
}

// backoff is how long to wait after so many failures in a row: twice as long after each, of which the upper half is
// random, so that the clients of a server that comes back do not come all at once.
func backoff(failures int) time.Duration {
	most := min(maxBackoff, minBackoff<<min(failures, 16))
	return most/2 + rand.N(most/2)
}

// dataConn returns a data connection on which nothing is in progress.
func (c *Client) dataConn(ctx context.Context) (*dataClient, error) {
	for {
		c.mu.Lock()
		if c.closed {
			c.mu.Unlock()
			return nil, ErrClosed
		}
		last := len(c.idle) - 1
		if last < 0 {
			c.mu.Unlock()
			return c.dialData(ctx)
		}
		d := c.idle[last]
		c.idle = c.idle[:last]
		watched := d.watched
		d.watched = nil
		c.mu.Unlock()
		if watched != nil && !d.stopWatch(watched) {
			continue // the watcher has forgotten it
		}
		if d.c.nothingWaits() {
			return d, nil
		}
		d.c.close()
		c.forget(d.c)
	}
}

func (c *Client) dialData(ctx context.Context) (*dataClient, error) {
	ctx, cancel := c.untilClosed(ctx)
	defer cancel()
	fc, readAnswer, err := c.connect(ctx, labelData)
	if err != nil {
		return nil, err
	}
	return &dataClient{c: fc, preface: c.preface(labelData), readAnswer: readAnswer, spawn: c.spawn}, nil
}

// spawn runs f in a goroutine that Close waits for.
func (c *Client) spawn(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed { // its connection has ended, so f ends at once
		go f()
		return
	}
	c.goroutines.Go(f)
}

// settle takes back a data connection whose request is over: it is kept, or forgotten.
func (c *Client) settle(d *dataClient) {
	d.rest()
	c.mu.Lock()
	if c.closed || !d.reusable() || c.config.IdleTimeout < 0 || len(c.idle) >= c.config.MaxIdleDataConns {
		c.mu.Unlock()
		d.c.close()
		c.forget(d.c)
		return
	}
	defer c.mu.Unlock()
	c.idle = append(c.idle, d)
	d.idleSince = time.Now()
	c.watchSoon(d)
}

// watchSoon sets the timer for startWatch, unless it is set. It is left running when the connection is used: the next
// request may be over before it fires. The caller holds mu.
func (c *Client) watchSoon(d *dataClient) {
	switch {
	case d.watchSet:
		return
	case d.watchTimer == nil:
		d.watchTimer = time.AfterFunc(watchDelay, func() { c.startWatch(d) })
	default:
		d.watchTimer.Reset(watchDelay)
	}
	d.watchSet = true
}

// startWatch begins to watch a data connection, if it is still idle. The timer calls it.
func (c *Client) startWatch(d *dataClient) {
	c.mu.Lock()
	defer c.mu.Unlock()
	d.watchSet = false
	if c.closed || d.watched != nil || !slices.Contains(c.idle, d) {
		return
	}
	if time.Since(d.idleSince) < watchDelay {
		c.watchSoon(d)
	} else {
		watched := make(chan struct{})
		d.watched = watched
		c.goroutines.Go(func() { c.watch(d, watched) }) // ends when the connection is used again or ends; Close waits for it
	}
}

// watch keeps an idle data connection until it is used again, ends, or has been idle for too long.
func (c *Client) watch(d *dataClient, watched chan<- struct{}) {
	defer close(watched)
	if d.watchIdle(c.config.IdleTimeout) {
		return
	}
	c.mu.Lock()
	c.idle = slices.DeleteFunc(c.idle, func(other *dataClient) bool { return other == d })
	c.mu.Unlock()
	d.c.close()
	c.forget(d.c)
}

// WaitForConnectivity returns when the server has answered a ping on both channels, the one for calls and the one for
// streams. It tries again until ctx ends; its error then holds the last failure, too.
func (c *Client) WaitForConnectivity(ctx context.Context) error {
	for failures := 1; ; failures++ {
		err := c.ping(ctx)
		if err == nil || errors.Is(err, ErrClosed) || c.invalid != nil {
			return err
		}
		c.mu.Lock()
		reset := c.reset
		c.mu.Unlock()
		if ctxErr := c.sleep(ctx, backoff(failures), reset); ctxErr != nil {
			return &detailError{"no connectivity: " + bareText(err), ctxErr}
		}
	}
}

func (c *Client) ping(ctx context.Context) error {
	req := &PingReq{Message: "ping " + strconv.FormatInt(time.Now().UnixNano(), 10)}
	var control, data PingRes
	if err := c.Call(ctx, methodPing, req, &control); err != nil {
		return err
	}
	stream, err := c.Download(ctx, methodPing, req, &data)
	if err != nil {
		return err
	}
	defer stream.Close()
	if _, err := io.Copy(io.Discard, stream); err != nil {
		return err
	}
	if control.Echo != req.Message || data.Echo != req.Message {
		return &ProtocolError{Reason: "a ping was answered with something else"}
	}
	return nil
}

// callFor is Call with a result of its own.
func callFor[T any, Res interface {
	*T
	Message
}](ctx context.Context, c *Client, method string, req Message) (Res, error) {
	res := Res(new(T))
	if err := c.Call(ctx, method, req, res); err != nil {
		return nil, err
	}
	return res, nil
}

// ListFilesystems returns the filesystems that the server has. For errors of this and the following calls see Call.
func (c *Client) ListFilesystems(ctx context.Context, req *ListFilesystemReq) (*ListFilesystemRes, error) {
	return callFor[ListFilesystemRes](ctx, c, methodListFilesystems, req)
}

// ListFilesystemVersions returns the versions of a filesystem.
func (c *Client) ListFilesystemVersions(ctx context.Context, req *ListFilesystemVersionsReq) (*ListFilesystemVersionsRes, error) {
	return callFor[ListFilesystemVersionsRes](ctx, c, methodListFilesystemVersions, req)
}

// DestroySnapshots destroys snapshots; the result says for each how it went.
func (c *Client) DestroySnapshots(ctx context.Context, req *DestroySnapshotsReq) (*DestroySnapshotsRes, error) {
	return callFor[DestroySnapshotsRes](ctx, c, methodDestroySnapshots, req)
}

// ReplicationCursor returns up to where a filesystem has been replicated.
func (c *Client) ReplicationCursor(ctx context.Context, req *ReplicationCursorReq) (*ReplicationCursorRes, error) {
	return callFor[ReplicationCursorRes](ctx, c, methodReplicationCursor, req)
}

// SendDry returns what Send would, without a stream.
func (c *Client) SendDry(ctx context.Context, req *SendReq) (*SendRes, error) {
	return callFor[SendRes](ctx, c, methodSendDry, req)
}

// SendCompleted tells the server that what it sent for a request has arrived.
func (c *Client) SendCompleted(ctx context.Context, req *SendCompletedReq) (*SendCompletedRes, error) {
	return callFor[SendCompletedRes](ctx, c, methodSendCompleted, req)
}

// Send has the server send a snapshot, as Download does; the caller closes the stream.
func (c *Client) Send(ctx context.Context, req *SendReq) (*SendRes, io.ReadCloser, error) {
	res := new(SendRes)
	stream, err := c.Download(ctx, endpointSend, req, res)
	if err != nil {
		return nil, nil, err
	}
	return res, stream, nil
}

// Receive has the server receive a snapshot from stream, as Upload does, which closes stream if it is an io.Closer.
func (c *Client) Receive(ctx context.Context, req *ReceiveReq, stream io.Reader) (*ReceiveRes, error) {
	res := new(ReceiveRes)
	if err := c.Upload(ctx, endpointReceive, req, stream, res); err != nil {
		return nil, err
	}
	return res, nil
}
