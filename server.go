package rpc

import (
	"context"
	"errors"
	"io"
	"maps"
	"net"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	defaultMaxHandshakes     = 64
	defaultMaxConns          = 1024
	defaultMaxConnsPerClient = 256
	defaultMaxHandlers       = 256

	// maxLingerBytes is how much is read from a client that was refused.
	maxLingerBytes = 1 << 20

	// Waits after errors of Accept, which are mostly a lack of descriptors.
	minAcceptBackoff = 5 * time.Millisecond
	maxAcceptBackoff = time.Second
)

// Handler serves the replication calls. Its methods run concurrently, in goroutines of their own. ctx ends with the
// caller's deadline, when the caller gives up, and when the connection is lost; it carries the ClientIdentity. Errors
// reach the caller as described at [Errorf], panics as Internal.
type Handler interface {
	// ListFilesystems returns the filesystems that the server has.
	ListFilesystems(ctx context.Context, req *ListFilesystemReq) (*ListFilesystemRes, error)
	// ListFilesystemVersions returns the versions of a filesystem.
	ListFilesystemVersions(ctx context.Context, req *ListFilesystemVersionsReq) (*ListFilesystemVersionsRes, error)
	// DestroySnapshots destroys snapshots and says for each how it went.
	DestroySnapshots(ctx context.Context, req *DestroySnapshotsReq) (*DestroySnapshotsRes, error)
	// ReplicationCursor returns up to where a filesystem has been replicated.
	ReplicationCursor(ctx context.Context, req *ReplicationCursorReq) (*ReplicationCursorRes, error)
	// SendDry returns what Send would, without a stream.
	SendDry(ctx context.Context, req *SendReq) (*SendRes, error)
	// SendCompleted is told that what was sent for a request has arrived.
	SendCompleted(ctx context.Context, req *SendCompletedReq) (*SendCompletedRes, error)
	// Send returns the stream of a snapshot; nil is an empty one. The server reads it until io.EOF or an error, and
	// closes it on every path, in the middle of a Read if ctx ends.
	Send(ctx context.Context, req *SendReq) (*SendRes, io.ReadCloser, error)
	// Receive reads the stream of a snapshot, which it may not use after its return. It must read up to io.EOF to return
	// success; any other error means that the stream is not complete.
	Receive(ctx context.Context, req *ReceiveReq, stream io.Reader) (*ReceiveRes, error)
}

// UnimplementedHandler refuses all calls as Unimplemented. Embed it, and override what you serve.
type UnimplementedHandler struct{}

func unimplemented(what string) error {
	return &Error{Code: Unimplemented, Message: quoted(what) + " is not implemented"}
}

// ListFilesystems is not implemented.
func (UnimplementedHandler) ListFilesystems(context.Context, *ListFilesystemReq) (*ListFilesystemRes, error) {
	return nil, unimplemented(methodListFilesystems)
}

// ListFilesystemVersions is not implemented.
func (UnimplementedHandler) ListFilesystemVersions(context.Context, *ListFilesystemVersionsReq) (*ListFilesystemVersionsRes, error) {
	return nil, unimplemented(methodListFilesystemVersions)
}

// DestroySnapshots is not implemented.
func (UnimplementedHandler) DestroySnapshots(context.Context, *DestroySnapshotsReq) (*DestroySnapshotsRes, error) {
	return nil, unimplemented(methodDestroySnapshots)
}

// ReplicationCursor is not implemented.
func (UnimplementedHandler) ReplicationCursor(context.Context, *ReplicationCursorReq) (*ReplicationCursorRes, error) {
	return nil, unimplemented(methodReplicationCursor)
}

// SendDry is not implemented.
func (UnimplementedHandler) SendDry(context.Context, *SendReq) (*SendRes, error) {
	return nil, unimplemented(methodSendDry)
}

// SendCompleted is not implemented.
func (UnimplementedHandler) SendCompleted(context.Context, *SendCompletedReq) (*SendCompletedRes, error) {
	return nil, unimplemented(methodSendCompleted)
}

// Send is not implemented.
func (UnimplementedHandler) Send(context.Context, *SendReq) (*SendRes, io.ReadCloser, error) {
	return nil, nil, unimplemented(endpointSend)
}

// Receive is not implemented.
func (UnimplementedHandler) Receive(context.Context, *ReceiveReq, io.Reader) (*ReceiveRes, error) {
	return nil, unimplemented(endpointReceive)
}

// CallInfo says what a handler is about to handle.
type CallInfo struct {
	Label      string   // of the connection: "zrepl_control" for calls, "zrepl_data" for streams, or one of the user's own
	Method     string   // the method or the endpoint; empty for a label of the user's own
	Identity   string   // of the client
	RemoteAddr net.Addr // of the client
}

// ServerConfig configures a [Server]. The zero value works.
type ServerConfig struct {
	// HandshakeTimeout bounds TLS, authentication, banner and label of a new connection. 0 means 10 seconds.
	HandshakeTimeout time.Duration
	// HeartbeatInterval is the longest silence that the server keeps while something is in progress, 10 ms to 5 minutes,
	// in whole milliseconds; clients give it up after three. 0 means 5 seconds.
	HeartbeatInterval time.Duration
	// MaxMessageSize is the largest request that is accepted, in bytes, at least 65536. 0 means 64 MiB.
	MaxMessageSize int
	// MaxHandshakes is how many handshakes are in progress at most. To a new one the oldest of the address that has most
	// of them gives way. 0 means 64.
	MaxHandshakes int
	// MaxConns is how many connections are open at most; more are refused. 0 means 1024.
	MaxConns int
	// MaxConnsPerClient is how many of them one identity may have. 0 means 256.
	MaxConnsPerClient int
	// MaxHandlers is how many handlers run at most, of all connections; further requests are refused. 0 means 256.
	MaxHandlers int
	// MaxHandlersPerClient is how many of them run for one identity, so that one leaves some to the others. 0 means
	// MaxHandlers.
	MaxHandlersPerClient int
	// Intercept, if not nil, is called around every handler. It must call handle, with ctx or one derived from it, and
	// return after it; while handle runs, a download's stream is sent, too. If it does not, the caller gets
	// PermissionDenied. Pings of the library are not intercepted.
	Intercept func(ctx context.Context, call CallInfo, handle func(context.Context))
	// Logger takes reports; nil is silent.
	Logger Logger
}

// withDefaults fills in the defaults and says what is wrong with the rest.
func (config ServerConfig) withDefaults() (ServerConfig, error) {
	config.HandshakeTimeout = orDefault(config.HandshakeTimeout, defaultHandshakeTimeout)
	config.HeartbeatInterval = orDefault(config.HeartbeatInterval, defaultHeartbeat)
	config.MaxMessageSize = orDefault(config.MaxMessageSize, defaultMessageSize)
	config.MaxHandshakes = orDefault(config.MaxHandshakes, defaultMaxHandshakes)
	config.MaxConns = orDefault(config.MaxConns, defaultMaxConns)
	config.MaxConnsPerClient = orDefault(config.MaxConnsPerClient, defaultMaxConnsPerClient)
	config.MaxHandlers = orDefault(config.MaxHandlers, defaultMaxHandlers)
	config.MaxHandlersPerClient = orDefault(config.MaxHandlersPerClient, config.MaxHandlers)
	if isNil(config.Logger) {
		config.Logger = silent{}
	}
	if min(config.MaxHandshakes, config.MaxConns, config.MaxConnsPerClient, config.MaxHandlers, config.MaxHandlersPerClient) < 0 {
		return config, errors.New("rpc: a limit of the ServerConfig is negative")
	}
	return config, checkLimits(config.HandshakeTimeout, config.HeartbeatInterval, config.MaxMessageSize)
}

// Server is the passive side of a pair of daemons. Its methods are safe for concurrent use; handlers may be added at any
// time.
type Server struct {
	config  ServerConfig
	invalid error // what is wrong with the configuration
	ours    promises
	stats   counters
	labels  labelMux

	ctx    context.Context // ends with Close
	cancel context.CancelFunc

	goroutines sync.WaitGroup // Add only with mu held, and not after Close

	handlersMu sync.RWMutex
	handlers   map[handlerKey]*handler

	mu         sync.Mutex
	state      serverState
	listeners  map[*Listener]func() error // to close each, once
	handshakes []*handshake               // in the order of their arrival
	conns      map[*serverConn]struct{}
	perClient  map[string]*clientUse
	lingering  int           // connections that were refused and are not closed yet
	running    int           // handlers
	changed    chan struct{} // closed and replaced when a connection ends
}

type serverState uint8

const (
	stateOpen     serverState = 0
	stateDraining serverState = 1 // Shutdown was called
	stateClosed   serverState = 2
)

// NewServer returns a server of h's calls. h may be nil: HandleCall, HandleDownload, HandleUpload and HandleLabel add
// others. What is wrong with the configuration is the error of Serve.
func NewServer(h Handler, config ServerConfig) *Server {
	config, invalid := config.withDefaults()
	// Connections belong to no caller: their context begins here.
	ctx, cancel := context.WithCancel(context.Background())
	s := &Server{
		config: config, invalid: invalid, ours: promises{config.HeartbeatInterval, config.MaxMessageSize},
		ctx: ctx, cancel: cancel,
		handlers:  make(map[handlerKey]*handler),
		listeners: make(map[*Listener]func() error), conns: make(map[*serverConn]struct{}),
		perClient: make(map[string]*clientUse), changed: make(chan struct{}),
	}
	HandleCall(s, methodPing, func(_ context.Context, req *PingReq) (*PingRes, error) {
		return &PingRes{Echo: req.Message}, nil
	})
	HandleDownload(s, methodPing, func(_ context.Context, req *PingReq) (*PingRes, io.ReadCloser, error) {
		return &PingRes{Echo: req.Message}, nil, nil
	})
	if h != nil {
		HandleCall(s, methodListFilesystems, h.ListFilesystems)
		HandleCall(s, methodListFilesystemVersions, h.ListFilesystemVersions)
		HandleCall(s, methodDestroySnapshots, h.DestroySnapshots)
		HandleCall(s, methodReplicationCursor, h.ReplicationCursor)
		HandleCall(s, methodSendDry, h.SendDry)
		HandleCall(s, methodSendCompleted, h.SendCompleted)
		HandleDownload(s, endpointSend, h.Send)
		HandleUpload(s, endpointReceive, h.Receive)
	}
	return s
}

// HandleCall has f handle the calls of a method, a name of 1 to 255 bytes. f returns a result or an error; req and the
// result are not used by the library after f's result was sent. It panics if the name is taken or malformed, or f nil.
func HandleCall[T any, Req interface {
	*T
	Message
}, Res Message](s *Server, method string, f func(context.Context, Req) (Res, error)) {
	s.register(frameCall, method, f == nil, func(ctx context.Context, body []byte, _ io.Reader) (Message, io.ReadCloser, error) {
		req := Req(new(T))
		if err := decodeRequest(req, body); err != nil {
			return nil, nil, err
		}
		res, err := f(ctx, req)
		return res, nil, err
	})
}

// HandleDownload has f handle the downloads of an endpoint, a name of 1 to 255 bytes. f returns a result and a stream,
// of which nil is an empty one, or an error. The server reads the stream until io.EOF or an error, and closes it on every
// path, in the middle of a Read if ctx ends. It panics if the name is taken or malformed, or f nil.
func HandleDownload[T any, Req interface {
	*T
	Message
}, Res Message](s *Server, endpoint string, f func(context.Context, Req) (Res, io.ReadCloser, error)) {
	s.register(frameDownload, endpoint, f == nil, func(ctx context.Context, body []byte, _ io.Reader) (Message, io.ReadCloser, error) {
		req := Req(new(T))
		if err := decodeRequest(req, body); err != nil {
			return nil, nil, err
		}
		return f(ctx, req)
	})
}

// HandleUpload has f handle the uploads of an endpoint, a name of 1 to 255 bytes. f reads the stream, which it may not
// use after its return. It must read up to io.EOF to return success: any other error means that the stream is not
// complete. It panics if the name is taken or malformed, or f nil.
func HandleUpload[T any, Req interface {
	*T
	Message
}, Res Message](s *Server, endpoint string, f func(context.Context, Req, io.Reader) (Res, error)) {
	s.register(frameUpload, endpoint, f == nil, func(ctx context.Context, body []byte, r io.Reader) (Message, io.ReadCloser, error) {
		req := Req(new(T))
		if err := decodeRequest(req, body); err != nil {
			return nil, nil, err
		}
		res, err := f(ctx, req, r)
		return res, nil, err
	})
}

// HandleLabel has f serve the connections to a label of the user's own, 1 to 64 bytes of a-z, 0-9, _, . and -. The
// connection is closed when f returns. ctx ends with Close, and carries the ClientIdentity. It panics if the label is
// taken, malformed or the library's own, or f nil.
func (s *Server) HandleLabel(label string, f func(ctx context.Context, conn net.Conn)) {
	wrong := userLabel(label)
	switch {
	case f == nil:
		wrong = "the handler is nil"
	case wrong == "" && !s.labels.add(label, f):
		wrong = "label " + quoted(label) + " has a handler already"
	}
	if wrong != "" {
		panic("rpc: HandleLabel: " + wrong)
	}
}

// handlerKey is how a handler is found.
type handlerKey struct {
	kind frameType
	name string
}

func (s *Server) register(kind frameType, name string, isNil bool, run handlerFunc) {
	s.handlersMu.Lock()
	defer s.handlersMu.Unlock()
	key := handlerKey{kind, name}
	switch {
	case isNil:
		panic("rpc: the handler for " + quoted(name) + " is nil")
	case len(name) < 1 || len(name) > maxName:
		panic("rpc: the name " + quoted(name) + " is not 1 to 255 bytes long")
	case s.handlers[key] != nil:
		panic("rpc: " + quoted(name) + " has a handler already")
	}
	s.handlers[key] = &handler{kind, name, run}
}

func decodeRequest(req Message, body []byte) error {
	if err := req.UnmarshalBinary(body); err != nil {
		return &Error{Code: InvalidArgument, Message: "cannot decode the request: " + err.Error()}
	}
	return nil
}

// Stats returns the server's counters.
func (s *Server) Stats() Stats { return s.stats.snapshot() }

type identityKey struct{}

// ClientIdentity returns the identity of the client on whose behalf ctx is, in a handler or in Intercept; otherwise "".
func ClientIdentity(ctx context.Context) string {
	identity, _ := ctx.Value(identityKey{}).(string)
	return identity
}

// Serve accepts connections of l and serves them, each in goroutines of its own, until l fails for good or the server
// ends: then it returns ErrClosed. Errors of Accept other than net.ErrClosed are logged, and tried again. Serve closes l
// when it returns. Several listeners may be served at once.
func (s *Server) Serve(l *Listener) error {
	switch {
	case l == nil || l.Listener == nil:
		return errors.New("rpc: Serve: the Listener is nil")
	case l.Authenticate == nil:
		return errors.New("rpc: Serve: the Listener's Authenticate is nil")
	case s.invalid != nil:
		return s.invalid
	}
	closeListener := sync.OnceValue(l.Close)
	defer closeListener()
	if !s.addListener(l, closeListener) {
		return ErrClosed
	}
	defer s.removeListener(l)
	s.config.Logger.InfoContext(s.ctx, "serving", "address", addrString(l.Addr()))
	return s.accept(l)
}

func (s *Server) addListener(l *Listener, closeListener func() error) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state != stateOpen {
		return false
	}
	s.listeners[l] = closeListener
	return true
}

func (s *Server) removeListener(l *Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.listeners, l)
}

// accept never waits for a peer.
func (s *Server) accept(l *Listener) error {
	wait := minAcceptBackoff
	for {
		nc, err := l.Accept()
		switch {
		case err == nil:
			wait = minAcceptBackoff
			s.admit(l, nc)
			continue
		case s.stopping():
			return ErrClosed
		case errors.Is(err, net.ErrClosed):
			return &detailError{"accepting connections at " + addrString(l.Addr()), err}
		}
		s.config.Logger.WarnContext(s.ctx, "cannot accept a connection", "address", addrString(l.Addr()), "error", err, "retry_in", wait)
		if !s.sleep(wait) {
			return ErrClosed
		}
		wait = min(2*wait, maxAcceptBackoff)
	}
}

// sleep tells whether the server is still open after the wait.
func (s *Server) sleep(wait time.Duration) bool {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-s.ctx.Done():
	}
	return !s.stopping()
}

func (s *Server) stopping() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state != stateOpen
}

// handshake is a connection that has not been admitted yet.
type handshake struct {
	nc     net.Conn
	host   string // the address without the port
	ctx    context.Context
	cancel context.CancelFunc // ends ctx, and with it the handshake
}

// admit starts the handshake of a new connection.
func (s *Server) admit(l *Listener, nc net.Conn) {
	h := &handshake{nc: nc, host: hostOf(nc)}
	h.ctx, h.cancel = context.WithTimeout(s.ctx, s.config.HandshakeTimeout)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state == stateClosed {
		h.cancel()
		nc.Close()
		return
	}
	if len(s.handshakes) >= s.config.MaxHandshakes {
		s.giveWayLocked()
	}
	s.handshakes = append(s.handshakes, h)
	s.goroutines.Go(func() { s.handle(l, h) }) // ends with the connection, at the latest with Close, which waits for it
}

func hostOf(nc net.Conn) string {
	address := addrString(nc.RemoteAddr())
	if host, _, err := net.SplitHostPort(address); err == nil {
		return host
	}
	return address
}

// giveWayLocked ends the oldest handshake of the address that has most of them, so that silent peers cannot keep others
// out.
func (s *Server) giveWayLocked() {
	counts := make(map[string]int)
	most := 0
	for _, h := range s.handshakes {
		counts[h.host]++
		most = max(most, counts[h.host])
	}
	for _, h := range s.handshakes {
		if counts[h.host] == most {
			s.leaveLocked(h)
			h.cancel() // closes nc, in another goroutine
			return
		}
	}
}

// leaveLocked takes a handshake off those in progress, and tells whether it was one.
func (s *Server) leaveLocked(h *handshake) bool {
	for i, other := range s.handshakes {
		if other == h {
			s.handshakes = append(s.handshakes[:i], s.handshakes[i+1:]...)
			return true
		}
	}
	return false
}

// clientUse is what one identity has of a server.
type clientUse struct{ conns, running int }

// serverConn is a connection that was admitted.
type serverConn struct {
	s        *Server
	nc       net.Conn
	identity string
	use      *clientUse // of identity; guarded by the server's mu
	label    string
	theirs   promises
	fc       *frameConn    // nil for a label of the user's own
	drain    func()        // makes it end when its work is done; nil for a label of the user's own
	serveOwn labelHandler  // serves a label of the user's own
	answered chan struct{} // closed when the answer is written, or cannot be
	refused  error         // why it cannot be
}

// handle does the handshake of a connection, and serves it.
func (s *Server) handle(l *Listener, h *handshake) {
	release := whenDone(h.ctx, func() { h.nc.Close() })
	conn, refusal := s.shakeHands(h.ctx, l, h)
	if refusal == nil {
		refusal = s.admitConn(h, conn)
	}
	if refusal != nil {
		lingers := s.startLingering(h)
		release()
		h.cancel()
		s.refuse(h, conn, refusal, lingers)
		return
	}
	s.goroutines.Go(func() { // ends with the write, which the handshake's end ends; this goroutine holds off Close's wait
		conn.answer(s.ours)
		release()
		h.cancel()
	})
	s.serveConn(conn)
	<-conn.answered
	s.removeConn(conn)
}

var errHandshakeLate = errors.New("rpc: the handshake took too long")

// refusalError is a refusal of which the peer is told.
type refusalError struct {
	code   Code
	reason string
}

func (e *refusalError) Error() string { return "rpc: refused: " + e.code.String() + ": " + e.reason }

// shakeHands authenticates a connection and reads what the client says first. The connection is returned with an error,
// too, if a refusal can be sent over it.
func (s *Server) shakeHands(ctx context.Context, l *Listener, h *handshake) (*serverConn, error) {
	conn := &serverConn{s: s, nc: h.nc, answered: make(chan struct{})}
	secured, identity, authErr := s.authenticate(ctx, l, h.nc)
	if secured != nil {
		conn.nc = secured
	}
	conn.identity = identity
	r := &exactReader{r: conn.nc, ahead: labelSize}
	line, err := readLine(r)
	if err != nil {
		if authErr != nil {
			err = authErr
		}
		return conn, err
	}
	theirVersions, theirs, err := parseBanner(line)
	if err != nil {
		return conn, err
	}
	if _, ok := spoken.common(theirVersions); !ok {
		return conn, &refusalError{FailedPrecondition, "no common version: the client speaks " + theirVersions.String() +
			", the server " + spoken.String()}
	}
	conn.theirs = theirs
	if conn.label, err = readLabel(r); err != nil {
		return conn, err
	}
	return conn, s.judge(conn, authErr)
}

// authenticate calls Authenticate and contains its panic.
func (s *Server) authenticate(ctx context.Context, l *Listener, nc net.Conn) (secured net.Conn, identity string, err error) {
	defer func() {
		if p := recover(); p != nil {
			s.logPanic(ctx, "Authenticate", p)
			err = errors.New("rpc: Authenticate panicked")
		}
	}()
	secured, identity, err = l.Authenticate(ctx, nc)
	if err != nil {
		_, _ = CodeOf(err), err.Error() // here, where their panics are contained
	}
	if err == nil && secured == nil {
		err = errors.New("rpc: Authenticate returned neither a connection nor an error")
	}
	return secured, identity, err
}

// judge tells whether a client that has said what it wants may have it.
func (s *Server) judge(conn *serverConn, authErr error) error {
	var reason *Error
	switch {
	case errors.As(authErr, &reason):
		return &refusalError{errorCode(reason.Code), reason.Message}
	case authErr != nil:
		return &refusalError{PermissionDenied, bareText(authErr)}
	case !validIdentity(conn.identity):
		return &refusalError{PermissionDenied, "the identity " + quoted(conn.identity) + " is not a valid one"}
	case conn.label == labelControl || conn.label == labelData:
		return nil
	}
	if conn.serveOwn = s.labels.lookup(conn.label); conn.serveOwn == nil {
		return &refusalError{NotFound, "nobody serves the label " + quoted(conn.label)}
	}
	return nil
}

// admitConn makes a connection one of the open ones, if there is room.
func (s *Server) admitConn(h *handshake, conn *serverConn) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	use := s.perClient[conn.identity]
	if use == nil {
		use = new(clientUse)
	}
	switch {
	case s.state != stateOpen:
		return &refusalError{Unavailable, "the server is shutting down"}
	case len(s.conns) >= s.config.MaxConns:
		return &refusalError{ResourceExhausted, "the server has " + strconv.Itoa(len(s.conns)) + " connections open"}
	case use.conns >= s.config.MaxConnsPerClient:
		return &refusalError{ResourceExhausted, "client " + quoted(conn.identity) + " has " +
			strconv.Itoa(use.conns) + " connections open"}
	case !s.leaveLocked(h):
		return errHandshakeLate
	}
	conn.use = use
	if conn.serveOwn != nil {
		if err := conn.takePlaceLocked(); err != nil {
			return &refusalError{ResourceExhausted, err.(*Error).Message}
		}
	} else {
		conn.fc = newFrameConn(conn.nc, s.ours, &s.stats)
		conn.fc.theirs = conn.theirs
		conn.fc.answered = conn.answered
		conn.fc.writing <- struct{}{} // for the answer
	}
	s.conns[conn] = struct{}{}
	s.perClient[conn.identity] = use
	use.conns++
	s.stats.conns.Add(1)
	s.stats.openConns.Add(1)
	return nil
}

// answer tells the client that it is admitted. It holds the write lock from the connection's begin, so that it is
// first, and reading goes on meanwhile: the client may not read before its first frame is read.
func (conn *serverConn) answer(ours promises) {
	version, _ := spoken.common(spoken)
	line := appendAnswer(nil, version, ours)
	var err error
	if conn.fc != nil {
		_, err = conn.fc.writeLocked(line)
	} else {
		_, err = conn.nc.Write(line)
	}
	conn.refused = err
	close(conn.answered)
}

// removeConn undoes admitConn.
func (s *Server) removeConn(conn *serverConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, conn)
	if conn.serveOwn != nil {
		conn.releasePlaceLocked()
	}
	if conn.use.conns--; conn.use.conns == 0 {
		delete(s.perClient, conn.identity)
	}
	s.stats.openConns.Add(-1)
	s.notifyLocked()
}

// notifyLocked wakes Shutdown.
func (s *Server) notifyLocked() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// refuse ends a connection that is not admitted. The client is told why if it has said what it wants, and there is room
// to wait until it has read that.
func (s *Server) refuse(h *handshake, conn *serverConn, err error, lingers bool) {
	s.stats.refused.Add(1)
	var refusal *refusalError
	var protocol *ProtocolError
	if lingers && !errors.As(err, &protocol) {
		stop := context.AfterFunc(s.ctx, func() { h.nc.Close() })
		if errors.As(err, &refusal) {
			conn.nc.SetWriteDeadline(time.Now().Add(lingerTime))
			conn.nc.Write(appendRefusal(nil, refusal.code, refusal.reason))
		}
		closeWrite(conn.nc)
		closeWrite(h.nc)
		discard(h.nc, maxLingerBytes)
		stop()
	}
	h.nc.Close()
	if conn.nc != h.nc {
		conn.nc.Close()
	}
	if lingers {
		s.stopLingering()
	}
	s.logRefusal(h, conn, err)
}

// logRefusal logs at a level that neither a probe of the port nor Close is worth more than.
func (s *Server) logRefusal(h *handshake, conn *serverConn, err error) {
	log := s.config.Logger.WarnContext
	if errors.Is(err, io.EOF) || s.ctx.Err() != nil {
		log = s.config.Logger.DebugContext
	}
	log(s.ctx, "connection refused", "peer", h.host, "identity", quoted(conn.identity), "label", quoted(conn.label), "error", err)
}

// startLingering ends a handshake, and tells whether there is room for another connection that was refused: it costs a goroutine, and
// nobody else is to be kept out.
func (s *Server) startLingering(h *handshake) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leaveLocked(h)
	s.notifyLocked()
	if s.lingering >= s.config.MaxHandshakes {
		return false
	}
	s.lingering++
	return true
}

func (s *Server) stopLingering() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lingering--
	s.notifyLocked()
}

// serveConn serves an admitted connection until it ends.
func (s *Server) serveConn(conn *serverConn) {
	ctx := context.WithValue(s.ctx, identityKey{}, conn.identity)
	peer := addrString(conn.nc.RemoteAddr())
	s.config.Logger.DebugContext(ctx, "connection open", "peer", peer, "identity", conn.identity, "label", conn.label)
	err := errPolite
	switch conn.label {
	case labelControl:
		cs := newControlServer(conn.fc, s.config.MaxHandlers, conn)
		s.setDrain(conn, cs.drain)
		err = cs.serve(ctx)
	case labelData:
		ds := &dataServer{c: conn.fc, dispatch: conn, panicked: func(p any) { s.logPanic(ctx, "closing a source", p) }}
		s.setDrain(conn, ds.drain)
		err = ds.serve(ctx)
	default:
		s.serveLabel(ctx, conn)
	}
	if err != errPolite && s.ctx.Err() == nil {
		s.config.Logger.WarnContext(ctx, "connection lost", "peer", peer, "identity", conn.identity, "label", conn.label, "error", err)
		return
	}
	s.config.Logger.DebugContext(ctx, "connection closed", "peer", peer, "identity", conn.identity, "label", conn.label)
}

// setDrain tells how a connection is made to end when its work is done, and does it at once if Shutdown was called in
// the meantime.
func (s *Server) setDrain(conn *serverConn, drain func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	conn.drain = drain
	if s.state == stateDraining {
		s.goroutines.Go(drain)
	}
}

// serveLabel runs the handler of a label of the user's own, whose place is taken.
func (s *Server) serveLabel(ctx context.Context, conn *serverConn) {
	defer conn.nc.Close()
	if <-conn.answered; conn.refused != nil {
		return
	}
	err := conn.intercept(ctx, &handler{}, conn)
	if err != nil {
		s.config.Logger.WarnContext(ctx, "label handler failed", "label", conn.label, "identity", conn.identity, "error", err)
	}
}

// handle is what a label's handler is run by.
func (conn *serverConn) handle(ctx context.Context, _ *handler) error {
	conn.serveOwn(ctx, conn.nc)
	return nil
}

func (conn *serverConn) takePlaceLocked() error {
	s := conn.s
	switch {
	case s.running >= s.config.MaxHandlers:
		return &Error{Code: ResourceExhausted, Message: "the server runs " + strconv.Itoa(s.running) + " handlers already"}
	case conn.use.running >= s.config.MaxHandlersPerClient:
		return &Error{Code: ResourceExhausted, Message: "the server runs " + strconv.Itoa(conn.use.running) + " handlers of this client already"}
	}
	s.running++
	conn.use.running++
	return nil
}

func (conn *serverConn) releasePlaceLocked() {
	conn.s.running--
	conn.use.running--
}

// accept finds a handler and takes a place for it. Pings need none.
func (conn *serverConn) accept(kind frameType, name []byte) (*handler, error) {
	s := conn.s
	count, _ := s.stats.of(kind)
	count.Add(1)
	s.handlersMu.RLock()
	h := s.handlers[handlerKey{kind, string(name)}]
	s.handlersMu.RUnlock()
	var err error
	if h == nil {
		err = unimplemented(string(name))
	} else if !isPing(h) {
		s.mu.Lock()
		err = conn.takePlaceLocked()
		s.mu.Unlock()
	}
	if err != nil {
		s.countFailure(kind)
	}
	return h, err
}

// isPing tells whether a handler is one of the library's own. An upload of that name is the user's.
func isPing(h *handler) bool { return h.name == methodPing && h.kind != frameUpload }

func (s *Server) countFailure(kind frameType) {
	_, failures := s.stats.of(kind)
	failures.Add(1)
}

// run runs a handler, and gives its place back.
func (conn *serverConn) run(ctx context.Context, h *handler, t task) error {
	run := conn.contain
	if !isPing(h) {
		defer conn.releasePlace()
		run = conn.intercept
	}
	err := run(ctx, h, t)
	if err != nil {
		conn.s.countFailure(h.kind)
	} else if call, ok := t.(*serverCall); ok {
		call.reserveRoom() // after Intercept, and before the place is free
	}
	return err
}

func (conn *serverConn) releasePlace() {
	conn.s.mu.Lock()
	conn.releasePlaceLocked()
	conn.s.mu.Unlock()
}

// intercept is contain through Intercept, if there is one.
func (conn *serverConn) intercept(ctx context.Context, h *handler, t task) error {
	s := conn.s
	if s.config.Intercept == nil {
		return conn.contain(ctx, h, t)
	}
	i := &interception{conn: conn, t: t, err: &Error{Code: PermissionDenied, Message: "the call was not let through"}}
	if panicked := conn.contain(ctx, h, i); panicked != nil {
		return panicked
	}
	return i.err
}

// interception is a task that is handled through Intercept.
type interception struct {
	conn   *serverConn
	t      task
	called bool
	err    error
}

func (i *interception) handle(ctx context.Context, h *handler) error {
	info := CallInfo{Label: i.conn.label, Method: h.name, Identity: i.conn.identity, RemoteAddr: i.conn.nc.RemoteAddr()}
	i.conn.s.config.Intercept(ctx, info, func(ctx context.Context) {
		if i.called {
			panic("rpc: Intercept called handle twice")
		}
		i.called = true
		i.err = i.conn.contain(ctx, h, i.t)
	})
	return nil
}

// contain handles a task, makes a panic an Internal error, and logs it.
func (conn *serverConn) contain(ctx context.Context, h *handler, t task) (err error) {
	defer func() {
		if p := recover(); p != nil {
			conn.s.logPanic(ctx, "the handler of "+orDefault(h.name, conn.label), p)
			err = &Error{Code: Internal, Message: "the handler panicked"}
		}
	}()
	return forTheWire(t.handle(ctx, h))
}

// forTheWire makes a handler's error one whose methods are ours: those of others may panic.
func forTheWire(err error) error {
	if err == nil {
		return nil
	}
	return &Error{Code: CodeOf(err), Message: wireText(err)}
}

func (s *Server) logPanic(ctx context.Context, who string, p any) {
	s.config.Logger.ErrorContext(ctx, who+" panicked", "panic", p, "stack", strings.TrimSpace(string(debug.Stack())))
}

// Shutdown ends the server without ending its work: no connection, call or stream is begun any more, clients are told so,
// what runs goes on to its end, and then the connections are closed. It returns nil when none is left. When ctx ends, it
// returns its error, and leaves what still runs to itself, or to Close.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	if s.state == stateOpen {
		s.state = stateDraining
		for conn := range s.conns {
			if conn.drain != nil {
				s.goroutines.Go(conn.drain) // ends when goaway is written or the connection ends; Close waits for it
			}
		}
	}
	s.mu.Unlock()
	s.closeListeners()
	courtesy := time.NewTimer(lingerTime) // for those who are to hear that they come too late
	defer courtesy.Stop()
	for polite := true; ; {
		s.mu.Lock()
		left, late, changed := len(s.conns), len(s.handshakes)+s.lingering, s.changed
		s.mu.Unlock()
		if left == 0 && (late == 0 || !polite) {
			return s.Close()
		}
		select {
		case <-changed:
		case <-courtesy.C:
			polite = false
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (s *Server) closeListeners() {
	s.mu.Lock()
	closers := slices.Collect(maps.Values(s.listeners))
	s.mu.Unlock()
	for _, closeListener := range closers {
		closeListener()
	}
}

// Close ends the server at once: it closes listeners and connections, ends the contexts of handlers, and returns when all
// goroutines of the server are gone. A handler that ignores its context holds it up.
func (s *Server) Close() error {
	s.mu.Lock()
	s.state = stateClosed
	handshakes, conns := slices.Clone(s.handshakes), slices.Collect(maps.Keys(s.conns))
	s.mu.Unlock()
	s.closeListeners()
	for _, h := range handshakes {
		h.nc.Close()
	}
	for _, conn := range conns {
		if conn.fc != nil {
			conn.fc.fail(ErrClosed)
		} else {
			conn.nc.Close()
		}
	}
	s.cancel() // after the connections: that it was Close is no news for the clients
	s.goroutines.Wait()
	return nil
}
