//go:build !rpc_notls

package chaos_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"math/big"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.org/rpc"
)

// ---- Flags, figures, roles ----------------------------------------------------------------------------------------

var (
	soak     = flag.Duration("soak", 0, "how long the soak runs (0: a few seconds), for which go test needs a longer -timeout; other tests try more, too")
	soakSeed = flag.Uint64("soakseed", 0, "the seed of the soak (0: another each time)")
)

// long tells whether everything is to be tried rather than what fits two minutes.
func long() bool { return *soak > 0 }

// TestMain runs a helper process if it was started as one, and otherwise the tests; it prints the figures at the end.
func TestMain(m *testing.M) {
	flag.Parse()
	if role := os.Getenv(roleVariable); role != "" {
		runRole(role)
		return
	}
	if warmUp(); long() {
		patience = 10 * time.Minute
	}
	code := m.Run()
	printFigures()
	os.Exit(code)
}

// warmUp has the runtime open what it keeps for good, so that no test is blamed for it.
func warmUp() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err == nil {
		l.Close()
	}
}

// figures are what the tests have counted.
var figures struct {
	mu    sync.Mutex
	names []string // in the order of their first mention
	n     map[string]int64
	max   map[string]bool
}

// count adds to a figure.
func count(what string, n int64) { note(what, n, false) }

// most notes the largest value of a figure.
func most(what string, n int64) { note(what, n, true) }

func note(what string, n int64, max bool) {
	figures.mu.Lock()
	defer figures.mu.Unlock()
	if figures.n == nil {
		figures.n, figures.max = map[string]int64{}, map[string]bool{}
	}
	old, known := figures.n[what]
	if !known {
		figures.names = append(figures.names, what)
	}
	switch {
	case !max:
		figures.n[what] = old + n
	case !known || n > old:
		figures.n[what] = n
	}
}

// printFigures prints a table for the README.
func printFigures() {
	figures.mu.Lock()
	defer figures.mu.Unlock()
	if len(figures.names) == 0 {
		return
	}
	fmt.Printf("figures:\n| what | number |\n|---|---|\n")
	for _, name := range figures.names {
		fmt.Printf("| %s | %d |\n", name, figures.n[name])
	}
}

// ---- Leaks --------------------------------------------------------------------------------------------------------

// census is what a test may not leave more of.
type census struct {
	goroutines, sockets, pipes, others int
	links                              []string
}

func takeCensus() (c census) {
	c.goroutines = runtime.NumGoroutine()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return c // no such system: goroutines only
	}
	for _, e := range entries {
		link, err := os.Readlink("/proc/self/fd/" + e.Name())
		switch {
		case err != nil: // the directory's own descriptor
		case strings.HasPrefix(link, "socket:"):
			c.sockets++
		case strings.HasPrefix(link, "pipe:"):
			c.pipes++
		default:
			c.others++
		}
		c.links = append(c.links, e.Name()+" "+link)
	}
	return c
}

func (c census) within(before census) bool {
	return c.goroutines <= before.goroutines && c.sockets <= before.sockets && c.pipes <= before.pipes && c.others <= before.others
}

// leaks fails the test if it leaves goroutines or descriptors behind, after its other cleanups. Every test begins with
// it. A descriptor that the garbage collector would close is a leak: there is no collection below a GiB meanwhile. Only
// pipes may need one, of which the runtime keeps some for splicing.
func leaks(t testing.TB) {
	t.Helper()
	runtime.GC()
	before := takeCensus()
	percent, limit := debug.SetGCPercent(-1), debug.SetMemoryLimit(1<<30)
	t.Cleanup(func() {
		defer debug.SetMemoryLimit(limit)
		defer debug.SetGCPercent(percent)
		deadline := time.Now().Add(15 * time.Second)
		for {
			now := takeCensus()
			if now.within(before) {
				count("tests after which goroutines and descriptors were counted", 1)
				return
			}
			if now.sockets <= before.sockets && now.pipes > before.pipes {
				runtime.GC() // splice's pipes
			}
			if time.Now().After(deadline) {
				stacks := make([]byte, 1<<20)
				t.Errorf("left behind: before %+v\nafter %+v\n%s", before, now, stacks[:runtime.Stack(stacks, true)])
				return
			}
			pause()
		}
	})
}

// TestEveryTestCountsWhatItLeaves: each test and fuzz target begins with leaks.
func TestEveryTestCountsWhatItLeaves(t *testing.T) {
	leaks(t)
	files, err := filepath.Glob("*_test.go")
	check(t, err)
	for _, name := range files {
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		check(t, err)
		for _, d := range file.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok || f.Recv != nil || f.Name.Name == "TestMain" || !strings.HasPrefix(f.Name.Name, "Test") {
				continue
			}
			if len(f.Body.List) == 0 || !callsLeaks(f.Body.List[0]) {
				t.Errorf("%s: %s does not begin with leaks(t)", name, f.Name.Name)
			}
		}
	}
}

func callsLeaks(s ast.Stmt) bool {
	e, ok := s.(*ast.ExprStmt)
	if !ok {
		return false
	}
	call, ok := e.X.(*ast.CallExpr)
	if !ok {
		return false
	}
	f, ok := call.Fun.(*ast.Ident)
	return ok && f.Name == "leaks"
}

// ---- Waiting ------------------------------------------------------------------------------------------------------

// pause is the step of a poll that has a deadline.
func pause() { <-time.After(500 * time.Microsecond) }

// patience is how long a test waits for what has to happen, on a machine that is busy with other things. A long run may
// even be stopped for a while.
var patience = 30 * time.Second

// eventually polls until cond holds.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !cond(); pause() {
		if time.Now().After(deadline) {
			stacks := make([]byte, 1<<20)
			t.Fatalf("not within %v: %s\n%s", patience, what, stacks[:runtime.Stack(stacks, true)])
		}
	}
}

// within receives from ch.
func within[T any](t testing.TB, what string, ch <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-ch:
	case <-time.After(patience):
		stacks := make([]byte, 1<<20)
		t.Fatalf("hangs: %s\n%s", what, stacks[:runtime.Stack(stacks, true)])
	}
	return v
}

// async runs f in a goroutine, whose result is to be received.
func async[T any](f func() T) <-chan T {
	ch := make(chan T, 1)
	go func() { ch <- f() }()
	return ch
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// parallel runs f for 0 to n-1, a few at a time, and returns when all are done.
func parallel(n, atOnce int, f func(i int)) {
	var next atomic.Int64
	var wg sync.WaitGroup
	for range atOnce {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				f(i)
			}
		})
	}
	wg.Wait()
}

// newRand prints the seed that it is made of.
func newRand(t testing.TB) *rand.Rand {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// ---- Streams whose every byte is known ----------------------------------------------------------------------------

// content is the stream of a seed: n bytes that no other seed has.
func content(seed uint64, n int64) io.Reader { return io.LimitReader(contentForever(seed), n) }

func contentForever(seed uint64) io.Reader {
	var key [32]byte
	binary.BigEndian.PutUint64(key[:], seed)
	return rand.NewChaCha8(key)
}

// verifier is a sink that knows what has to come.
type verifier struct {
	want  io.Reader
	n     int64 // bytes that came and were right
	wrong bool
	buf   []byte
}

func newVerifier(seed uint64) *verifier { return &verifier{want: contentForever(seed)} }

// Write compares.
func (v *verifier) Write(p []byte) (int, error) {
	v.buf = slices.Grow(v.buf[:0], len(p))[:len(p)]
	io.ReadFull(v.want, v.buf)
	if !bytes.Equal(v.buf, p) {
		v.wrong = true
	}
	v.n += int64(len(p))
	return len(p), nil
}

// steps reads at most n bytes at a time, so that a stream has many frames.
type steps struct {
	r io.Reader
	n int
}

func (s steps) Read(p []byte) (int, error) { return s.r.Read(p[:min(len(p), s.n)]) }

// gated is a source that has given head, and gives tail only when it is opened. Close unblocks it.
type gated struct {
	head, tail io.Reader
	open       chan struct{}
	closed     chan struct{}
	once       sync.Once
	opened     sync.Once
	reached    chan struct{} // closed when the head has been read
	at         sync.Once
}

func newGated(head, tail io.Reader) *gated {
	return &gated{head: head, tail: tail, open: make(chan struct{}), closed: make(chan struct{}), reached: make(chan struct{})}
}

func (g *gated) Read(p []byte) (int, error) {
	if n, err := g.head.Read(p); err != io.EOF {
		return n, err
	}
	g.at.Do(func() { close(g.reached) })
	select {
	case <-g.open:
		return g.tail.Read(p)
	case <-g.closed:
		return 0, os.ErrClosed
	}
}

func (g *gated) goOn()        { g.opened.Do(func() { close(g.open) }) }
func (g *gated) Close() error { g.once.Do(func() { close(g.closed) }); return nil }

// writerFunc is a sink.
type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// readerFunc is a source.
type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// ---- A service ----------------------------------------------------------------------------------------------------

// service is what a test's server does. Requests and results are those of ping, which are encoded as all messages of
// the replication service are.
type service struct {
	call func(ctx context.Context, req string) (string, error)
	get  func(ctx context.Context, req string) (string, io.ReadCloser, error)
	put  func(ctx context.Context, req string, r io.Reader) (string, error)
	own  func(ctx context.Context, conn net.Conn)
}

func (v service) server(config rpc.ServerConfig) *rpc.Server {
	s := rpc.NewServer(nil, config)
	if v.call != nil {
		rpc.HandleCall(s, "call", func(ctx context.Context, req *rpc.PingReq) (*rpc.PingRes, error) {
			res, err := v.call(ctx, req.Message)
			return &rpc.PingRes{Echo: res}, err
		})
	}
	if v.get != nil {
		rpc.HandleDownload(s, "get", func(ctx context.Context, req *rpc.PingReq) (*rpc.PingRes, io.ReadCloser, error) {
			res, stream, err := v.get(ctx, req.Message)
			return &rpc.PingRes{Echo: res}, stream, err
		})
	}
	if v.put != nil {
		rpc.HandleUpload(s, "put", func(ctx context.Context, req *rpc.PingReq, r io.Reader) (*rpc.PingRes, error) {
			res, err := v.put(ctx, req.Message, r)
			return &rpc.PingRes{Echo: res}, err
		})
	}
	if v.own != nil {
		s.HandleLabel("own", v.own)
	}
	return s
}

// doCall, doGet and doPut are what a client does with it.
func doCall(ctx context.Context, c *rpc.Client, req string) (string, error) {
	var res rpc.PingRes
	err := c.Call(ctx, "call", &rpc.PingReq{Message: req}, &res)
	return res.Echo, err
}

func doGet(ctx context.Context, c *rpc.Client, req string, sink io.Writer) (string, error) {
	var res rpc.PingRes
	stream, err := c.Download(ctx, "get", &rpc.PingReq{Message: req}, &res)
	if err != nil {
		return "", err
	}
	defer stream.Close()
	_, err = io.Copy(sink, stream)
	return res.Echo, err
}

func doPut(ctx context.Context, c *rpc.Client, req string, source io.Reader) (string, error) {
	var res rpc.PingRes
	err := c.Upload(ctx, "put", &rpc.PingReq{Message: req}, source, &res)
	return res.Echo, err
}

// echo is a service whose calls are echoed, whose downloads are as many bytes as the request has, and whose uploads
// are read to their end.
var echo = service{
	call: func(_ context.Context, req string) (string, error) { return req, nil },
	get: func(_ context.Context, req string) (string, io.ReadCloser, error) {
		return req, io.NopCloser(strings.NewReader(req)), nil
	},
	put: func(_ context.Context, req string, r io.Reader) (string, error) {
		_, err := io.Copy(io.Discard, r)
		return req, err
	},
	own: func(_ context.Context, conn net.Conn) { io.Copy(conn, conn) },
}

// useAll does one of everything, and checks it: the client and the server are well.
func useAll(ctx context.Context, c *rpc.Client) error {
	if res, err := doCall(ctx, c, "hello"); err != nil || res != "hello" {
		return fmt.Errorf("a call returned %q, %w", res, err)
	}
	var sink bytes.Buffer
	if res, err := doGet(ctx, c, "hello", &sink); err != nil || res != "hello" || sink.String() != "hello" {
		return fmt.Errorf("a download returned %q, %q, %w", res, &sink, err)
	}
	if res, err := doPut(ctx, c, "hello", strings.NewReader("some")); err != nil || res != "hello" {
		return fmt.Errorf("an upload returned %q, %w", res, err)
	}
	return nil
}

// serve runs s on l until the test ends.
func serve(t testing.TB, s *rpc.Server, l *rpc.Listener) {
	t.Helper()
	served := async(func() error { return s.Serve(l) })
	t.Cleanup(func() {
		within(t, "Close of the server", async(func() error { return s.Close() }))
		if err := within(t, "Serve", served); !errors.Is(err, rpc.ErrClosed) {
			t.Errorf("Serve returned %v", err)
		}
	})
}

// newClient is closed when the test ends.
func newClient(t testing.TB, c rpc.Connecter, config rpc.ClientConfig) *rpc.Client {
	client := rpc.NewClient(c, config)
	t.Cleanup(func() { within(t, "Close of the client", async(client.Close)) })
	return client
}

// ---- Transports ---------------------------------------------------------------------------------------------------

// transport makes a listener, and connecters to an address that come from another.
type transport struct {
	name    string
	listen  func(t testing.TB) *rpc.Listener
	connect func(t testing.TB, addr string, from net.IP) rpc.Connecter
}

var overTCP = transport{
	"tcp",
	func(t testing.TB) *rpc.Listener {
		l, err := rpc.ListenTCP("127.0.0.1:0", map[string]string{"127.0.0.0/8": "host-*"})
		check(t, err)
		return l
	},
	func(t testing.TB, addr string, from net.IP) rpc.Connecter {
		return &rpc.TCPConnecter{Addr: addr, Dialer: dialerFrom(from)}
	},
}

var overTLS = transport{
	"tls",
	func(t testing.TB) *rpc.Listener {
		l, err := rpc.ListenTLS("127.0.0.1:0", theCA().server(t, "server"), "tester")
		check(t, err)
		return l
	},
	func(t testing.TB, addr string, from net.IP) rpc.Connecter {
		return &rpc.TLSConnecter{Addr: addr, Config: theCA().client(t, "tester", "server"), Dialer: dialerFrom(from)}
	},
}

var transports = []transport{overTCP, overTLS}

// ownAddr is where nobody else listens: who comes back to an address like that finds its port free, and who does not come back
// has nobody there in its place.
func ownAddr() string {
	return fmt.Sprintf("127.%d.%d.%d:0", 64+rand.IntN(128), rand.IntN(256), 1+rand.IntN(254))
}

func dialerFrom(ip net.IP) net.Dialer {
	if ip == nil {
		return net.Dialer{}
	}
	return net.Dialer{LocalAddr: &net.TCPAddr{IP: ip}}
}

// authority signs certificates. Keys are made once for each name: it is not they that are tested.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool

	mu     sync.Mutex
	issued map[string]tls.Certificate
}

var theCA = sync.OnceValue(newAuthority)

func newKey() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		panic(err)
	}
	return key
}

func newAuthority() *authority {
	key := newKey()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "chaos CA"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: time.Now().Add(240 * time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(crand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		panic(err)
	}
	ca := &authority{key: key, pool: x509.NewCertPool(), issued: map[string]tls.Certificate{}}
	ca.cert, _ = x509.ParseCertificate(der)
	ca.pool.AddCert(ca.cert)
	return ca
}

// issue makes a certificate that a name can use as a client and as a server, changed as told.
func (ca *authority) issue(t testing.TB, name string, change ...func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	ca.mu.Lock()
	defer ca.mu.Unlock()
	if cert, ok := ca.issued[name]; ok && change == nil {
		return cert
	}
	key := newKey()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(rand.Int64()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(240 * time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	if name == "server" {
		template.DNSNames = []string{name}
	}
	for _, f := range change {
		f(template)
	}
	der, err := x509.CreateCertificate(crand.Reader, template, ca.cert, &key.PublicKey, ca.key)
	check(t, err)
	cert := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	if change == nil {
		ca.issued[name] = cert
	}
	return cert
}

func (ca *authority) server(t testing.TB, name string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{ca.issue(t, name)},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: ca.pool, SessionTicketsDisabled: true,
	}
}

func (ca *authority) client(t testing.TB, name, serverName string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{ca.issue(t, name)},
		RootCAs: ca.pool, ServerName: serverName,
	}
}

// ---- Connections in memory ----------------------------------------------------------------------------------------

// memConn is a connection in memory that behaves like TCP: buffers, half-close, deadlines. It works in synctest.
type memConn struct {
	in, out *memPipe
	from    memAddr
}

type memAddr string

func (memAddr) Network() string  { return "mem" }
func (a memAddr) String() string { return string(a) }

// memPipe is one direction.
type memPipe struct {
	mu             sync.Mutex
	change         *sync.Cond
	buf            []byte
	room           int
	eof, broken    bool // the writer or the reader has closed its side
	readBy, writBy time.Time
	timers         [2]*time.Timer
}

func newMemPipe(room int) *memPipe {
	p := &memPipe{room: room}
	p.change = sync.NewCond(&p.mu)
	return p
}

// memPair returns the two ends of a connection whose buffers hold so many bytes.
func memPair(room int) (client, server *memConn) {
	a, b := newMemPipe(room), newMemPipe(room)
	return &memConn{a, b, "server:1"}, &memConn{b, a, "client:1"}
}

func passed(t time.Time) bool { return !t.IsZero() && !time.Now().Before(t) }

func (c *memConn) Read(b []byte) (int, error) {
	p := c.in
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		switch {
		case p.broken:
			return 0, net.ErrClosed
		case passed(p.readBy):
			return 0, os.ErrDeadlineExceeded
		case len(p.buf) > 0:
			n := copy(b, p.buf)
			p.buf = p.buf[n:]
			p.change.Broadcast()
			return n, nil
		case p.eof:
			return 0, io.EOF
		}
		p.change.Wait()
	}
}

func (c *memConn) Write(b []byte) (n int, err error) {
	p := c.out
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		switch {
		case p.eof || p.broken:
			return n, net.ErrClosed
		case passed(p.writBy):
			return n, os.ErrDeadlineExceeded
		case len(b) == 0:
			return n, nil
		}
		if m := min(len(b), p.room-len(p.buf)); m > 0 {
			p.buf = append(p.buf, b[:m]...)
			n, b = n+m, b[m:]
			p.change.Broadcast()
			continue
		}
		p.change.Wait()
	}
}

func (p *memPipe) set(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
	p.change.Broadcast()
}

func (c *memConn) CloseWrite() error { c.out.set(func() { c.out.eof = true }); return nil }
func (c *memConn) Close() error {
	for _, p := range []*memPipe{c.in, c.out} {
		p.set(func() {
			for _, timer := range p.timers {
				if timer != nil {
					timer.Stop()
				}
			}
			p.broken = p.broken || p == c.in
			p.eof = p.eof || p == c.out
		})
	}
	return nil
}
func (c *memConn) LocalAddr() net.Addr  { return memAddr("here:1") }
func (c *memConn) RemoteAddr() net.Addr { return c.from }
func (c *memConn) SetDeadline(t time.Time) error {
	c.SetReadDeadline(t)
	return c.SetWriteDeadline(t)
}
func (c *memConn) SetReadDeadline(t time.Time) error  { return c.in.deadline(&c.in.readBy, 0, t) }
func (c *memConn) SetWriteDeadline(t time.Time) error { return c.out.deadline(&c.out.writBy, 1, t) }

func (p *memPipe) deadline(by *time.Time, timer int, t time.Time) error {
	p.set(func() {
		*by = t
		if p.timers[timer] != nil {
			p.timers[timer].Stop()
		}
		if !t.IsZero() && !p.broken {
			p.timers[timer] = time.AfterFunc(time.Until(t), func() { p.set(func() {}) })
		}
	})
	return nil
}

// memListener is a listener in memory; Connect makes it a Connecter, too.
type memListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
	pair   func() (client, server net.Conn)
}

func newMemListener(room int) *memListener {
	return &memListener{conns: make(chan net.Conn), closed: make(chan struct{}), pair: func() (net.Conn, net.Conn) { return memPair(room) }}
}

func (l *memListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *memListener) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *memListener) Addr() net.Addr { return memAddr("listener:1") }

// Connect hands one end to Accept.
func (l *memListener) Connect(ctx context.Context) (net.Conn, error) {
	client, server := l.pair()
	select {
	case l.conns <- server:
		return client, nil
	case <-l.closed:
		return nil, errors.New("connection refused")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l *memListener) listener() *rpc.Listener {
	return &rpc.Listener{Listener: l, Authenticate: func(_ context.Context, c net.Conn) (net.Conn, string, error) {
		return c, "tester", nil
	}}
}

// ---- Frames by hand -----------------------------------------------------------------------------------------------

const (
	tHeartbeat = 0x01
	tCall      = 0x10
	tReply     = 0x11
	tCancel    = 0x12
	tGoaway    = 0x13
	tDownload  = 0x20
	tUpload    = 0x21
	tResult    = 0x22
	tData      = 0x23
	tEnd       = 0x24
	tFail      = 0x25
)

const (
	banner = "ZREPL-RPC 1-1 hb=5000 max=67108864\n"
	answer = "ZREPL-RPC 1 ok hb=5000 max=67108864\n"
)

// frame is a frame whose payload is made of string (bytes), int (u8) and uint64 (u64).
func frame(kind byte, parts ...any) string {
	return head(kind, int64(len(payload(parts...)))) + payload(parts...)
}

// head is a header that claims a length.
func head(kind byte, length int64) string {
	return string(binary.BigEndian.AppendUint32([]byte{kind, 0, 0, 0}, uint32(length)))
}

func payload(parts ...any) string {
	var b []byte
	for _, part := range parts {
		switch part := part.(type) {
		case string:
			b = append(b, part...)
		case int:
			b = append(b, byte(part))
		case uint64:
			b = binary.BigEndian.AppendUint64(b, part)
		default:
			panic("a part is a string, an int (u8) or a uint64")
		}
	}
	return string(b)
}

func str8(s string) string  { return string([]byte{byte(len(s))}) + s }
func label(s string) string { return s + strings.Repeat("\x00", 64-len(s)) }

// ping is the body of a message of the service.
func ping(s string) string {
	b, _ := (&rpc.PingReq{Message: s}).AppendBinary(nil)
	return string(b)
}

func callFrame(id uint64, req string) string {
	return frame(tCall, id, uint64(0), str8("call"), ping(req))
}
func getFrame(req string) string { return frame(tDownload, uint64(0), str8("get"), ping(req)) }
func putFrame(req string) string { return frame(tUpload, uint64(0), str8("put"), ping(req)) }

// readFrame reads one frame that is no heartbeat.
func readFrame(r io.Reader) (kind byte, body string, err error) {
	for {
		var header [8]byte
		if _, err := io.ReadFull(r, header[:]); err != nil {
			return 0, "", err
		}
		b := make([]byte, binary.BigEndian.Uint32(header[4:]))
		if _, err := io.ReadFull(r, b); err != nil || header[0] != tHeartbeat {
			return header[0], string(b), err
		}
	}
}

// readAnswer reads a line.
func readAnswer(r io.Reader) (string, error) {
	var line []byte
	for b := make([]byte, 1); ; {
		if _, err := io.ReadFull(r, b); err != nil {
			return string(line), err
		}
		if b[0] == '\n' {
			return string(line), nil
		}
		line = append(line, b[0])
	}
}

// netConn and connRest let a connection be embedded whose Read and Write are replaced.
type netConn = net.Conn

type connRest interface {
	LocalAddr() net.Addr
	RemoteAddr() net.Addr
	SetDeadline(t time.Time) error
	SetReadDeadline(t time.Time) error
	SetWriteDeadline(t time.Time) error
}
