//go:build !rpc_notls

// The tests of the library, through its public API and raw bytes on connections. In order: examples, the kit, layout,
// the wire, behaviour in time, the API, transports, messages, fuzzing.
package rpc_test

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
	"encoding/hex"
	"encoding/pem"
	"errors"
	"expvar"
	"flag"
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"hash/crc32"
	"io"
	"io/fs"
	"iter"
	"log"
	"log/slog"
	"math"
	"math/big"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"example.org/rpc"
)

// ---- Examples -----------------------------------------------------------------------------------------------------

// A server that serves a stream, and a client that copies it to its standard output. The type text is a message of the
// program's own, in two lines:
//
//	func (m *text) AppendBinary(b []byte) ([]byte, error) { return append(b, *m...), nil }
//	func (m *text) UnmarshalBinary(b []byte) error        { *m = text(b); return nil }
func Example() {
	// The server: who may connect, and what is served.
	l, err := rpc.ListenTCP("127.0.0.1:0", map[string]string{"127.0.0.1": "db7"})
	if err != nil {
		log.Fatal(err)
	}
	s := rpc.NewServer(nil, rpc.ServerConfig{})
	rpc.HandleDownload(s, "backup", func(ctx context.Context, req *rpc.SendReq) (*rpc.SendRes, io.ReadCloser, error) {
		data := strings.NewReader(req.Filesystem + ", for " + rpc.ClientIdentity(ctx))
		return &rpc.SendRes{ExpectedSize: uint64(data.Len())}, io.NopCloser(data), nil
	})
	go s.Serve(l)
	defer s.Close()

	// The client, in another process.
	c := rpc.NewClient(&rpc.TCPConnecter{Addr: l.Addr().String()}, rpc.ClientConfig{})
	defer c.Close()
	var res rpc.SendRes
	stream, err := c.Download(context.Background(), "backup", &rpc.SendReq{Filesystem: "tank/home"}, &res)
	if err != nil {
		log.Fatal(err) // says who refused what, and whether the handler ran
	}
	defer stream.Close()
	if _, err = io.Copy(os.Stdout, stream); err != nil {
		log.Fatal(err) // nil means that all of it has arrived
	}
	// Output:
	// tank/home, for db7
}

// A server with TLS that logs, limits and measures, and stops without breaking off what is running.
func ExampleServer() {
	config, err := rpc.ServerTLSConfig("ca.pem", "server.pem", "server.key")
	if err != nil {
		fmt.Println("no certificates here")
		return
	}
	listener, err := rpc.ListenTLS(":8443", config, "backup1", "backup2")
	if err != nil {
		log.Fatal(err)
	}
	server := rpc.NewServer(rpc.UnimplementedHandler{}, rpc.ServerConfig{
		Logger:            slog.Default(),
		MaxConnsPerClient: 16,
		Intercept: func(ctx context.Context, call rpc.CallInfo, handle func(context.Context)) {
			start := time.Now()
			handle(ctx)
			slog.Info("served", "client", call.Identity, "method", call.Method, "took", time.Since(start))
		},
	})
	time.AfterFunc(time.Hour, func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		server.Shutdown(ctx) // a minute for what is running,
		server.Close()       // then it is broken off
	})
	log.Fatal(server.Serve(listener)) // rpc.ErrClosed after Shutdown or Close
	// Output: no certificates here
}

// A client waits for the server to be there, calls it, and tells errors apart.
func ExampleClient() {
	connecter := rpc.ConnecterFunc(func(ctx context.Context) (net.Conn, error) {
		return nil, fmt.Errorf("the cable is out")
	})
	client := rpc.NewClient(connecter, rpc.ClientConfig{CallTimeout: time.Second})
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if err := client.WaitForConnectivity(ctx); err != nil {
		fmt.Println("not there")
	}
	var res text
	switch err := client.Call(ctx, "hello", textOf("world"), &res); rpc.CodeOf(err) {
	case rpc.OK:
		fmt.Println(res)
	case rpc.Unavailable, rpc.DeadlineExceeded:
		fmt.Println("try again later")
	default:
		fmt.Println("it does not work:", err)
	}
	// Output:
	// not there
	// try again later
}

// exampleStart serves what register registers and returns a client of it.
func exampleStart(handler rpc.Handler, register func(s *rpc.Server)) (client *rpc.Client, stop func()) {
	listener, err := rpc.ListenTCP("127.0.0.1:0", map[string]string{"127.0.0.1": "tester"})
	if err != nil {
		log.Fatal(err)
	}
	server := rpc.NewServer(handler, rpc.ServerConfig{})
	register(server)
	go server.Serve(listener)
	client = rpc.NewClient(&rpc.TCPConnecter{Addr: listener.Addr().String()}, rpc.ClientConfig{})
	return client, func() { client.Close(); server.Close() }
}

// A call and its errors.
func ExampleHandleCall() {
	client, stop := exampleStart(nil, func(s *rpc.Server) {
		rpc.HandleCall(s, "hello", func(ctx context.Context, req *text) (*text, error) {
			if *req == "" {
				return nil, rpc.Errorf(rpc.InvalidArgument, "hello %s, who is there?", rpc.ClientIdentity(ctx))
			}
			return textOf("hello " + string(*req)), nil
		})
	})
	defer stop()
	var res text
	fmt.Println(client.Call(context.Background(), "hello", textOf("world"), &res), res)
	fmt.Println(rpc.CodeOf(client.Call(context.Background(), "hello", textOf(""), &res)))
	// Output:
	// <nil> hello world
	// invalid-argument
}

// The server's side of a download: the stream is any io.ReadCloser, such as the output of a command, and closed by the
// server on every path.
func ExampleHandleDownload() {
	client, stop := exampleStart(nil, func(s *rpc.Server) {
		rpc.HandleDownload(s, "count", func(ctx context.Context, req *text) (*text, io.ReadCloser, error) {
			r, w := io.Pipe()
			go func() {
				for i := range 3 {
					fmt.Fprint(w, i, " ")
				}
				w.CloseWithError(fmt.Errorf("tired")) // Close would end the stream well
			}()
			return new(text), r, nil
		})
	})
	defer stop()
	stream, err := client.Download(context.Background(), "count", new(text), new(text))
	if err != nil {
		log.Fatal(err)
	}
	defer stream.Close()
	b, err := io.ReadAll(stream)
	fmt.Printf("%q, tired: %v\n", b, strings.Contains(err.Error(), "tired"))
	// Output: "0 1 2 ", tired: true
}

// The server's side of an upload reads the stream to io.EOF; only then it is complete.
func ExampleHandleUpload() {
	client, stop := exampleStart(nil, func(s *rpc.Server) {
		rpc.HandleUpload(s, "checksum", func(ctx context.Context, req *text, r io.Reader) (*text, error) {
			hash := crc32.NewIEEE()
			if _, err := io.Copy(hash, r); err != nil {
				return nil, err
			}
			return textOf(fmt.Sprintf("%08x", hash.Sum32())), nil
		})
	})
	defer stop()
	var res text
	err := client.Upload(context.Background(), "checksum", new(text), strings.NewReader("123456789"), &res)
	fmt.Println(res, err)
	// Output: cbf43926 <nil>
}

// exampleMeter tells how far a stream has come, and holds it back to a rate.
type exampleMeter struct {
	io.Reader
	start            time.Time
	perSecond, total int // bytes
	progress         func(total int)
}

func (m *exampleMeter) Read(p []byte) (int, error) {
	time.Sleep(time.Duration(m.total)*time.Second/time.Duration(m.perSecond) - time.Since(m.start))
	n, err := m.Reader.Read(p[:min(len(p), m.perSecond/10)]) // no more than a tenth of a second at once
	m.total += n
	m.progress(m.total)
	return n, err
}

func exampleSink(s *rpc.Server) {
	rpc.HandleUpload(s, "sink", func(ctx context.Context, req *text, r io.Reader) (*text, error) {
		n, err := io.Copy(io.Discard, r)
		return textOf(fmt.Sprint(n)), err
	})
}

// A reader around the stream shows progress and limits the rate; the stream of a download is wrapped in the same way.
func ExampleClient_Upload() {
	client, stop := exampleStart(nil, exampleSink)
	defer stop()
	start, last := time.Now(), 0
	data := &exampleMeter{
		Reader: strings.NewReader(strings.Repeat("x", 100_000)), start: start, perSecond: 1 << 20,
		progress: func(total int) { last = total },
	}
	var res text
	err := client.Upload(context.Background(), "sink", new(text), data, &res)
	fmt.Println(last, res, time.Since(start) > 50*time.Millisecond, err)
	// Output: 100000 100000 true <nil>
}

// exampleStdio is a net.Conn over two pipes, such as a process's standard input and output.
type exampleStdio struct{ in, out *os.File }

func (c exampleStdio) Read(p []byte) (int, error)         { return c.in.Read(p) }
func (c exampleStdio) Write(p []byte) (int, error)        { return c.out.Write(p) }
func (c exampleStdio) Close() error                       { return errors.Join(c.in.Close(), c.out.Close()) }
func (c exampleStdio) LocalAddr() net.Addr                { return &net.UnixAddr{Name: "stdio"} }
func (c exampleStdio) RemoteAddr() net.Addr               { return &net.UnixAddr{Name: "stdio"} }
func (c exampleStdio) SetReadDeadline(t time.Time) error  { return c.in.SetReadDeadline(t) }
func (c exampleStdio) SetWriteDeadline(t time.Time) error { return c.out.SetWriteDeadline(t) }
func (c exampleStdio) SetDeadline(t time.Time) error {
	return errors.Join(c.in.SetReadDeadline(t), c.out.SetWriteDeadline(t))
}

// A transport of one's own: every connection is a command's standard input and output, as of "ssh host daemon --stdio".
// Here both ends of the pipes are in one process; with a command, in1 and out2 are the Stdin and Stdout of its exec.Cmd,
// and the daemon serves the pipes it was started with. (There, syscall.SetNonblock before os.NewFile gives them deadlines.)
func ExampleConnecterFunc() {
	listener := newMemListener() // hands out what is sent to its channel conns
	server := rpc.NewServer(nil, rpc.ServerConfig{})
	exampleSink(server)
	go server.Serve(&rpc.Listener{Listener: listener,
		Authenticate: func(_ context.Context, conn net.Conn) (net.Conn, string, error) {
			return conn, "ssh-user", nil // sshd has seen to that
		}})
	defer server.Close()
	client := rpc.NewClient(rpc.ConnecterFunc(func(ctx context.Context) (net.Conn, error) {
		in1, out1, err1 := os.Pipe()
		in2, out2, err2 := os.Pipe()
		if err1 == nil && err2 == nil {
			listener.conns <- exampleStdio{in1, out2}
		}
		return exampleStdio{in2, out1}, errors.Join(err1, err2)
	}), rpc.ClientConfig{})
	defer client.Close()
	var res text
	err := client.Upload(context.Background(), "sink", new(text), strings.NewReader("hello"), &res)
	fmt.Println(res, err)
	// Output: 5 <nil>
}

// Counters for a monitoring system.
func ExampleClient_Stats() {
	client, stop := exampleStart(nil, exampleSink)
	defer stop()
	expvar.Publish("rpc", expvar.Func(func() any { return client.Stats() })) // at /debug/vars
	client.Upload(context.Background(), "sink", new(text), strings.NewReader("hello"), new(text))
	fmt.Println(strings.Contains(expvar.Get("rpc").String(), `"Streams":1`))
	// Output: true
}

// exampleStorage serves the one replication call it knows; the others are Unimplemented.
type exampleStorage struct{ rpc.UnimplementedHandler }

func (exampleStorage) Send(ctx context.Context, req *rpc.SendReq) (*rpc.SendRes, io.ReadCloser, error) {
	snapshot := strings.NewReader("all of " + req.Filesystem + "@" + req.To.Name) // zfs send
	return &rpc.SendRes{ExpectedSize: uint64(snapshot.Len())}, io.NopCloser(snapshot), nil
}

// The active side pulls a snapshot.
func ExampleClient_Send() {
	client, stop := exampleStart(exampleStorage{}, func(*rpc.Server) {})
	defer stop()
	res, stream, err := client.Send(context.Background(), &rpc.SendReq{
		Filesystem: "pool/home",
		To:         &rpc.FilesystemVersion{Type: rpc.VersionSnapshot, Name: "monday", GUID: 17},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer stream.Close()
	b, err := io.ReadAll(stream) // zfs recv
	fmt.Printf("%d bytes expected: %q %v\n", res.ExpectedSize, b, err)
	// Output: 23 bytes expected: "all of pool/home@monday" <nil>
}

// ---- The kit: connections in memory, transports, certificates, and frames by hand ---------------------------------

// pipeSize is how much a memConn holds before its writer waits, like a socket buffer.
const pipeSize = 64 << 10

// memPipe is one direction of a connection in memory.
type memPipe struct {
	mu     sync.Mutex
	buf    []byte
	eof    bool          // the writer has closed its side
	broken bool          // the reader has closed its side
	change chan struct{} // closed and replaced at every change
}

func newMemPipe() *memPipe { return &memPipe{change: make(chan struct{})} }

func (p *memPipe) changed() {
	close(p.change)
	p.change = make(chan struct{})
}

func (p *memPipe) set(f func(p *memPipe)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f(p)
	p.changed()
}

func (p *memPipe) read(b []byte, d *memDeadline) (int, error) {
	for {
		if d.passed() {
			return 0, os.ErrDeadlineExceeded
		}
		p.mu.Lock()
		switch {
		case p.broken:
			p.mu.Unlock()
			return 0, net.ErrClosed
		case len(p.buf) > 0:
			n := copy(b, p.buf)
			p.buf = p.buf[n:]
			p.changed()
			p.mu.Unlock()
			return n, nil
		case p.eof:
			p.mu.Unlock()
			return 0, io.EOF
		}
		change := p.change
		p.mu.Unlock()
		d.wait(change)
	}
}

func (p *memPipe) write(b []byte, d *memDeadline) (n int, err error) {
	for len(b) > 0 {
		if d.passed() {
			return n, os.ErrDeadlineExceeded
		}
		p.mu.Lock()
		if p.eof || p.broken {
			p.mu.Unlock()
			return n, net.ErrClosed
		}
		m := min(len(b), pipeSize-len(p.buf))
		p.buf = append(p.buf, b[:m]...)
		if m > 0 {
			p.changed()
		}
		change := p.change
		p.mu.Unlock()
		n, b = n+m, b[m:]
		if m == 0 {
			d.wait(change)
		}
	}
	return n, nil
}

// memDeadline is a deadline that can be moved while somebody waits.
type memDeadline struct {
	mu     sync.Mutex
	at     time.Time
	change chan struct{}
}

func newMemDeadline() *memDeadline { return &memDeadline{change: make(chan struct{})} }

func (d *memDeadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.at = t
	close(d.change)
	d.change = make(chan struct{})
}

func (d *memDeadline) passed() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return !d.at.IsZero() && !time.Now().Before(d.at)
}

// wait returns when change is closed, and when the deadline passes or moves.
func (d *memDeadline) wait(change <-chan struct{}) {
	d.mu.Lock()
	at, moved := d.at, d.change
	d.mu.Unlock()
	var passes <-chan time.Time
	if !at.IsZero() {
		t := time.NewTimer(time.Until(at))
		defer t.Stop()
		passes = t.C
	}
	select {
	case <-change:
	case <-moved:
	case <-passes:
	}
}

// memConn is a connection in memory that behaves like TCP: buffers, deadlines, half-close. It works in synctest.
type memConn struct {
	in, out         *memPipe
	readBy, writeBy *memDeadline
	local, remote   memAddr
}

type memAddr string

func (memAddr) Network() string  { return "mem" }
func (a memAddr) String() string { return string(a) }

// newMemConns returns the two ends of a connection.
func newMemConns() (client, server *memConn) {
	a, b := newMemPipe(), newMemPipe()
	client = &memConn{in: a, out: b, readBy: newMemDeadline(), writeBy: newMemDeadline(), local: "client", remote: "server"}
	server = &memConn{in: b, out: a, readBy: newMemDeadline(), writeBy: newMemDeadline(), local: "server", remote: "client"}
	return client, server
}

func (c *memConn) Read(b []byte) (int, error)  { return c.in.read(b, c.readBy) }
func (c *memConn) Write(b []byte) (int, error) { return c.out.write(b, c.writeBy) }
func (c *memConn) CloseWrite() error           { c.out.set(func(p *memPipe) { p.eof = true }); return nil }
func (c *memConn) Close() error {
	c.in.set(func(p *memPipe) { p.broken = true })
	return c.CloseWrite()
}
func (c *memConn) LocalAddr() net.Addr                { return c.local }
func (c *memConn) RemoteAddr() net.Addr               { return c.remote }
func (c *memConn) SetDeadline(t time.Time) error      { c.readBy.set(t); c.writeBy.set(t); return nil }
func (c *memConn) SetReadDeadline(t time.Time) error  { c.readBy.set(t); return nil }
func (c *memConn) SetWriteDeadline(t time.Time) error { c.writeBy.set(t); return nil }

// memListener is a net.Listener for connections in memory; Connect makes it an rpc.Connecter, too.
type memListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
	pipe   func() (client, server net.Conn)
}

func newMemListener() *memListener {
	return &memListener{
		conns: make(chan net.Conn), closed: make(chan struct{}),
		pipe: func() (net.Conn, net.Conn) { c, s := newMemConns(); return c, s },
	}
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
func (l *memListener) Addr() net.Addr { return memAddr("listener") }

func (l *memListener) Connect(ctx context.Context) (net.Conn, error) {
	client, server := l.pipe()
	select {
	case l.conns <- server:
		return client, nil
	case <-l.closed:
		return nil, errors.New("connection refused")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// listener is l with everybody being "tester".
func (l *memListener) listener() *rpc.Listener {
	return &rpc.Listener{Listener: l, Authenticate: func(_ context.Context, c net.Conn) (net.Conn, string, error) {
		return c, "tester", nil
	}}
}

// transport makes a listener and what connects to it. The client's identity is "tester".
type transport struct {
	name string
	make func(t testing.TB) (*rpc.Listener, rpc.Connecter)
}

var transports = []transport{
	{"mem", func(testing.TB) (*rpc.Listener, rpc.Connecter) {
		l := newMemListener()
		return l.listener(), l
	}},
	{"pipe", func(testing.TB) (*rpc.Listener, rpc.Connecter) { // net.Pipe: no buffer, no half-close
		l := newMemListener()
		l.pipe = net.Pipe
		return l.listener(), l
	}},
	{"tcp", func(t testing.TB) (*rpc.Listener, rpc.Connecter) {
		l, err := rpc.ListenTCP("127.0.0.1:0", map[string]string{"127.0.0.1": "tester"})
		check(t, err)
		return l, &rpc.TCPConnecter{Addr: l.Addr().String()}
	}},
	{"tls", func(t testing.TB) (*rpc.Listener, rpc.Connecter) {
		ca := newTestCA(t)
		l, err := rpc.ListenTLS("127.0.0.1:0", ca.server(t, "server"), "tester")
		check(t, err)
		return l, &rpc.TLSConnecter{Addr: l.Addr().String(), Config: ca.client(t, "tester", "server")}
	}},
}

// overTransports runs a test over each transport, with a server that setup fills and a client of it. Both are closed
// afterwards, and no goroutine may be left.
func overTransports(t *testing.T, setup func(s *rpc.Server), test func(t *testing.T, c *rpc.Client)) {
	for _, tr := range transports {
		t.Run(tr.name, func(t *testing.T) {
			noLeak(t)
			l, connecter := tr.make(t)
			s := rpc.NewServer(nil, rpc.ServerConfig{})
			setup(s)
			serve(t, s, l)
			c := rpc.NewClient(connecter, rpc.ClientConfig{})
			t.Cleanup(func() { check(t, c.Close()) })
			test(t, c)
		})
	}
}

// serve runs s on l until the test ends.
func serve(t testing.TB, s *rpc.Server, l *rpc.Listener) {
	t.Helper()
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		check(t, s.Close())
		if err := <-served; !errors.Is(err, rpc.ErrClosed) {
			t.Errorf("Serve returned %v, want ErrClosed", err)
		}
	})
}

// noLeak fails the test if goroutines are left after its other cleanups.
func noLeak(t testing.TB) {
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		for deadline := time.Now().Add(30 * time.Second); runtime.NumGoroutine() > before; runtime.Gosched() {
			if time.Now().After(deadline) {
				stacks := make([]byte, 1<<20)
				t.Errorf("%d goroutines before, %d after:\n%s", before, runtime.NumGoroutine(),
					stacks[:runtime.Stack(stacks, true)])
				return
			}
		}
	})
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// text is a message for tests: it is its bytes.
type text string

func (m *text) AppendBinary(b []byte) ([]byte, error) { return append(b, *m...), nil }
func (m *text) UnmarshalBinary(b []byte) error        { *m = text(b); return nil }

func textOf(s string) *text { return (*text)(&s) }

// testCA signs certificates.
type testCA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newTestCA(t testing.TB) *testCA {
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	check(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(crand.Reader, template, template, &key.PublicKey, key)
	check(t, err)
	cert, err := x509.ParseCertificate(der)
	check(t, err)
	ca := &testCA{cert: cert, key: key, pool: x509.NewCertPool()}
	ca.pool.AddCert(cert)
	return ca
}

// issue makes a certificate that name can use as a client and as a server.
func (ca *testCA) issue(t testing.TB, name string, change ...func(*x509.Certificate)) tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	check(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{name},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	for _, f := range change {
		f(template)
	}
	der, err := x509.CreateCertificate(crand.Reader, template, ca.cert, &key.PublicKey, ca.key)
	check(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func (ca *testCA) server(t testing.TB, name string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{ca.issue(t, name)},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: ca.pool, SessionTicketsDisabled: true,
	}
}

func (ca *testCA) client(t testing.TB, name, serverName string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{ca.issue(t, name)},
		RootCAs: ca.pool, ServerName: serverName,
	}
}

// The frames, by hand from the specification.
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

// frame is a frame whose payload is made of the parts: string (bytes), byte (u8), uint64 (u64).
func frame(kind byte, parts ...any) string {
	payload := payload(parts...)
	header := []byte{kind, 0, 0, 0, 0, 0, 0, 0}
	binary.BigEndian.PutUint32(header[4:], uint32(len(payload)))
	return string(header) + payload
}

func payload(parts ...any) string {
	var b []byte
	for _, part := range parts {
		switch part := part.(type) {
		case string:
			b = append(b, part...)
		case byte:
			b = append(b, part)
		case int:
			b = append(b, byte(part))
		case uint64:
			b = binary.BigEndian.AppendUint64(b, part)
		default:
			panic("a part is a string, a byte, an int (u8) or a uint64")
		}
	}
	return string(b)
}

// str8 is a length byte and the string.
func str8(s string) string { return string([]byte{byte(len(s))}) + s }

// label is a label of 64 bytes.
func label(s string) string { return s + strings.Repeat("\x00", 64-len(s)) }

// banner and answer are the lines of peers with default parameters.
const (
	banner = "ZREPL-RPC 1-1 hb=5000 max=67108864\n"
	answer = "ZREPL-RPC 1 ok hb=5000 max=67108864\n"
)

// expect reads exactly want from r.
func expect(t testing.TB, r io.Reader, want string) {
	t.Helper()
	got := make([]byte, len(want))
	n, err := io.ReadFull(r, got)
	if string(got[:n]) != want {
		t.Fatalf("read %q (%v), want %q", got[:n], err, want)
	}
}

// expectEOF wants r to end without another byte.
func expectEOF(t testing.TB, r io.Reader) {
	t.Helper()
	if rest, err := io.ReadAll(r); err != nil || len(rest) > 0 {
		t.Fatalf("read %q (%v), want the end", rest, err)
	}
}

// say writes s to w.
func say(t testing.TB, w io.Writer, s string) {
	t.Helper()
	if _, err := io.WriteString(w, s); err != nil {
		t.Fatalf("writing %q: %v", s, err)
	}
}

// readFrame reads one frame, heartbeats too.
func readFrame(r io.Reader) (kind byte, payload string, err error) {
	var header [8]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return 0, "", err
	}
	b := make([]byte, binary.BigEndian.Uint32(header[4:]))
	_, err = io.ReadFull(r, b)
	return header[0], string(b), err
}

// ---- Layout: which file may use which -----------------------------------------------------------------------------

// layoutUses is the table of the design: which files each source file may use, those that these use included.
var layoutUses = map[string]string{
	"rpc.go":           "",
	"handshake.go":     "rpc.go",
	"mux.go":           "rpc.go",
	"frame.go":         "rpc.go",
	"pdu.go":           "rpc.go",
	"control.go":       "frame.go rpc.go",
	"dataconn.go":      "frame.go rpc.go",
	"transport_tcp.go": "rpc.go",
	"transport_tls.go": "transport_tcp.go rpc.go",
	"client.go":        "rpc.go handshake.go mux.go frame.go pdu.go control.go dataconn.go transport_tcp.go",
	"server.go":        "rpc.go handshake.go mux.go frame.go pdu.go control.go dataconn.go transport_tcp.go",
}

// layoutImporter imports what the package uses from the export data in the build cache.
func layoutImporter(t *testing.T, fset *token.FileSet) types.Importer {
	list, err := exec.Command("go", "list", "-export", "-deps", "-f", "{{.ImportPath}} {{.Export}}", ".").Output()
	check(t, err)
	exports := map[string]string{}
	for line := range strings.Lines(string(list)) {
		path, file, _ := strings.Cut(strings.TrimSpace(line), " ")
		exports[path] = file
	}
	return importer.ForCompiler(fset, "gc", func(path string) (io.ReadCloser, error) { return os.Open(exports[path]) })
}

// layoutFiles parses the source files.
func layoutFiles(t *testing.T, fset *token.FileSet) (files []*ast.File) {
	names, _ := filepath.Glob("*.go")
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		if _, ok := layoutUses[name]; !ok {
			t.Errorf("%s has no place in the layout", name)
		}
		file, err := parser.ParseFile(fset, name, nil, parser.ParseComments)
		check(t, err)
		files = append(files, file)
	}
	if len(files) != len(layoutUses) {
		t.Errorf("%d source files, want %d", len(files), len(layoutUses))
	}
	return files
}

func TestFilesUseOnlyWhatStandsAboveThem(t *testing.T) {
	fset := token.NewFileSet()
	files := layoutFiles(t, fset)
	info := &types.Info{Uses: map[*ast.Ident]types.Object{}, Selections: map[*ast.SelectorExpr]*types.Selection{}}
	pkg, err := (&types.Config{Importer: layoutImporter(t, fset)}).Check("example.org/rpc", fset, files, info)
	check(t, err)
	fileOf := func(pos token.Pos) string { return filepath.Base(fset.Position(pos).Filename) }
	seen := map[string]bool{} // each is told once
	uses := func(at token.Pos, what types.Object) {
		if what.Pkg() != pkg || !what.Pos().IsValid() {
			return
		}
		user, declarer := fileOf(at), fileOf(what.Pos())
		if message := user + " uses " + what.Name() + " of " + declarer; user != declarer && !seen[message] &&
			!slices.Contains(strings.Fields(layoutUses[user]), declarer) {
			seen[message] = true
			t.Errorf("%v: %s", fset.Position(at), message)
		}
	}
	for ident, object := range info.Uses { // functions, types, variables, fields, methods
		uses(ident.Pos(), object)
	}
	for selector, selection := range info.Selections { // the embedded fields on the way
		step := selection.Recv()
		for _, i := range selection.Index()[:len(selection.Index())-1] {
			if pointer, ok := step.Underlying().(*types.Pointer); ok {
				step = pointer.Elem()
			}
			uses(selector.Pos(), step.Underlying().(*types.Struct).Field(i))
			step = step.Underlying().(*types.Struct).Field(i).Type()
		}
	}
}

func TestOnlyTransportTLSHasTLS(t *testing.T) {
	fset := token.NewFileSet()
	for _, file := range layoutFiles(t, fset) {
		name := fset.Position(file.Package).Filename
		for _, spec := range file.Imports {
			if strings.HasPrefix(spec.Path.Value, `"crypto/tls`) && name != "transport_tls.go" || strings.Contains(spec.Path.Value, ".") {
				t.Errorf("%s imports %s", name, spec.Path.Value)
			}
		}
		if name == "transport_tls.go" && (len(file.Comments) == 0 || file.Comments[0].List[0].Text != "//go:build !rpc_notls") {
			t.Errorf("%s cannot be left out by -tags rpc_notls", name)
		}
	}
}

func TestModuleRequiresNothing(t *testing.T) {
	mod, _ := os.ReadFile("go.mod")
	if string(mod) != "module example.org/rpc\n\ngo 1.25\n" {
		t.Errorf("go.mod: %s", mod)
	}
}

// ---- Package doc --------------------------------------------------------------------------------------------------

// TestTheSessionInThePackageDocIsReal decodes the annotated session of the package doc, and plays its client to a Server.
func TestTheSessionInThePackageDocIsReal(t *testing.T) {
	source, err := os.ReadFile("rpc.go")
	check(t, err)
	said := map[string]string{}
	for _, line := range regexp.MustCompile(`(?m)^//\t([CS])  +(.*)$`).FindAllStringSubmatch(string(source), -1) {
		if strings.Contains(line[2], "refused") {
			break
		}
		said[line[1]] += docBytes(t, line[2])
	}
	noLeak(t)
	l := newMemListener()
	serve(t, rpc.NewServer(nil, rpc.ServerConfig{}), l.listener())
	conn, err := l.Connect(t.Context())
	check(t, err)
	defer conn.Close()
	say(t, conn, said["C"])
	expect(t, conn, said["S"])
}

// TestTheCodeInTheREADMEIsExample keeps the README's program one that compiles and runs.
func TestTheCodeInTheREADMEIsExample(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	check(t, err)
	_, rest, _ := strings.Cut(string(readme), "```go\n")
	code, _, found := strings.Cut(rest, "```\n")
	source, err := os.ReadFile("rpc_test.go")
	check(t, err)
	_, example, _ := strings.Cut(string(source), "func Example() {\n")
	example, _, _ = strings.Cut(example, "\t// Output:")
	if example = strings.ReplaceAll("\n"+example, "\n\t", "\n")[1:]; !found || code != example {
		t.Errorf("README has\n%s\nExample is\n%s", code, example)
	}
}

// docBytes reads strings in quotes, hex digits, and hex digits with a repeat count, up to the remark behind two spaces.
func docBytes(t *testing.T, line string) (bytes string) {
	line, _, _ = strings.Cut(line, "   ")
	for _, word := range regexp.MustCompile(`"(?:[^"\\]|\\.)*"|\S+`).FindAllString(line, -1) {
		if word[0] == '"' {
			s, err := strconv.Unquote(word)
			check(t, err)
			bytes += s
			continue
		}
		digits, times, repeated := strings.Cut(word, "*")
		b, err := hex.DecodeString(digits)
		check(t, err)
		count := 1
		if repeated {
			count, err = strconv.Atoi(times)
			check(t, err)
		}
		bytes += strings.Repeat(string(b), count)
	}
	return bytes
}

// ---- Preface and frames on the wire -------------------------------------------------------------------------------

// wireTest runs f as a subtest in a bubble of fake time and wants no goroutine left.
func wireTest(t *testing.T, name string, f func(t *testing.T)) {
	t.Run(name, func(t *testing.T) {
		noLeak(t)
		synctest.Test(t, f)
	})
}

// wireServer runs a server that serves the calls echo and wait (for the end of ctx), the download get and the upload
// put (both carry the request's text), and what setup adds.
func wireServer(t *testing.T, config rpc.ServerConfig, setup ...func(*rpc.Server)) *memListener {
	s, l := rpc.NewServer(nil, config), newMemListener()
	rpc.HandleCall(s, "echo", func(_ context.Context, req *text) (*text, error) { return req, nil })
	rpc.HandleCall(s, "wait", func(ctx context.Context, req *text) (*text, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	})
	rpc.HandleDownload(s, "get", func(_ context.Context, req *text) (*text, io.ReadCloser, error) {
		return req, io.NopCloser(strings.NewReader(string(*req))), nil
	})
	rpc.HandleUpload(s, "put", func(_ context.Context, _ *text, r io.Reader) (*text, error) {
		b, err := io.ReadAll(r)
		return textOf(string(b)), err
	})
	for _, f := range setup {
		f(s)
	}
	serve(t, s, l.listener())
	return l
}

// wireConnect is a raw connection to l's server.
func wireConnect(t *testing.T, l *memListener) *memConn {
	t.Helper()
	conn, err := l.Connect(t.Context())
	check(t, err)
	return wireRaw(t, conn)
}

// wireRaw closes conn after the test; what waits for ever on it fails.
func wireRaw(t *testing.T, conn net.Conn) *memConn {
	conn.SetDeadline(time.Now().Add(time.Hour))
	t.Cleanup(func() { conn.Close() })
	return conn.(*memConn)
}

// wireOpen is a raw connection to l's server whose handshake is done.
func wireOpen(t *testing.T, l *memListener, name string) *memConn {
	t.Helper()
	conn := wireConnect(t, l)
	say(t, conn, banner+label(name))
	expect(t, conn, "ZREPL-RPC 1 ok hb=5000 max=")
	for b := []byte{0}; b[0] != '\n'; {
		_, err := conn.Read(b)
		check(t, err)
	}
	return conn
}

// wireNext reads the next frame that is not a heartbeat.
func wireNext(t *testing.T, r io.Reader) (kind byte, body string) {
	t.Helper()
	for kind = tHeartbeat; kind == tHeartbeat; {
		var err error
		kind, body, err = readFrame(r)
		check(t, err)
	}
	return kind, body
}

// wireWant reads the next frame that is not a heartbeat and wants it to be want.
func wireWant(t *testing.T, r io.Reader, want string) {
	t.Helper()
	if kind, body := wireNext(t, r); frame(kind, body) != want {
		t.Fatalf("read %.200q, want %.200q", frame(kind, body), want)
	}
}

// wirePending tells how many bytes the peer has sent that were not read, once it has nothing more to do.
func wirePending(conn *memConn) int {
	synctest.Wait()
	conn.in.mu.Lock()
	defer conn.in.mu.Unlock()
	return len(conn.in.buf)
}

// wireClosed wants the peer to have closed conn, both ways, at once, and without another byte.
func wireClosed(t *testing.T, conn *memConn) {
	t.Helper()
	start := time.Now()
	expectEOF(t, conn)
	if d := time.Since(start); d >= time.Second {
		t.Errorf("closed after %v, want at once", d)
	}
	synctest.Wait()
	if _, err := conn.Write([]byte{0}); err == nil {
		t.Error("only half of the connection is closed")
	}
}

// wirePeer is a client whose server is the test.
type wirePeer struct {
	*rpc.Client
	l *memListener
}

func wireClient(t *testing.T, config rpc.ClientConfig) wirePeer {
	l := newMemListener()
	c := rpc.NewClient(l, config)
	t.Cleanup(func() { check(t, c.Close()) })
	return wirePeer{c, l}
}

// accept is the next connection of the client.
func (p wirePeer) accept(t *testing.T) *memConn {
	t.Helper()
	select {
	case conn := <-p.l.conns:
		return wireRaw(t, conn)
	case <-time.After(time.Hour):
		t.Fatal("the client does not connect")
		return nil
	}
}

// open is the next connection of the client, its handshake done.
func (p wirePeer) open(t *testing.T, name string) *memConn {
	t.Helper()
	conn := p.accept(t)
	expect(t, conn, banner+label(name))
	say(t, conn, answer)
	return conn
}

// wireResult is how a call or a stream of the client ended.
type wireResult struct {
	text string
	err  error
}

// wireGo runs f in a goroutine.
func wireGo(f func(res *text) error) <-chan wireResult {
	done := make(chan wireResult, 1)
	go func() {
		var res text
		err := f(&res)
		done <- wireResult{string(res), err}
	}()
	return done
}

func (p wirePeer) call(ctx context.Context, method, req string) <-chan wireResult {
	return wireGo(func(res *text) error { return p.Call(ctx, method, textOf(req), res) })
}

// get is a download; its text is that of the stream.
func (p wirePeer) get(ctx context.Context, req string) <-chan wireResult {
	return wireGo(func(res *text) error {
		r, err := p.Download(ctx, "get", textOf(req), res)
		if err != nil {
			return err
		}
		defer r.Close()
		b, err := io.ReadAll(r)
		*res = text(b)
		return err
	})
}

func (p wirePeer) put(ctx context.Context, req string, r io.Reader) <-chan wireResult {
	return wireGo(func(res *text) error { return p.Upload(ctx, "put", textOf(req), r, res) })
}

// wireCall, wireGet and wirePut are request frames.
func wireCall(id, timeout uint64, method, body string) string {
	return frame(tCall, id, timeout, str8(method), body)
}
func wireGet(body string) string { return frame(tDownload, uint64(0), str8("get"), body) }
func wirePut(body string) string { return frame(tUpload, uint64(0), str8("put"), body) }

const wireDefault = uint64(5 * time.Minute) // of CallTimeout

func TestWirePrefaceOfClient(t *testing.T) {
	for op, start := range wireOps {
		wireTest(t, op, func(t *testing.T) {
			p := wireClient(t, rpc.ClientConfig{})
			start(p, t.Context(), "hi")
			expect(t, p.accept(t), "ZREPL-RPC 1-1 hb=5000 max=67108864\n"+label(wireLabel(op))+wireRequest(op, "hi"))
		})
	}
	wireTest(t, "config", func(t *testing.T) {
		p := wireClient(t, rpc.ClientConfig{HeartbeatInterval: 1234 * time.Millisecond, MaxMessageSize: 70000})
		p.call(t.Context(), "echo", "hi")
		expect(t, p.accept(t), "ZREPL-RPC 1-1 hb=1234 max=70000\n"+label("zrepl_control"))
	})
	wireTest(t, "label", func(t *testing.T) { // Dial waits for the answer; the bytes after it are the user's
		p := wireClient(t, rpc.ClientConfig{})
		done := wireGo(func(res *text) error {
			conn, err := p.Dial(t.Context(), "my.label-1_x")
			if err != nil {
				return err
			}
			b, err := io.ReadAll(conn)
			*res = text(b)
			return errors.Join(err, conn.Close())
		})
		srv := p.accept(t)
		expect(t, srv, banner+label("my.label-1_x"))
		if n := wirePending(srv); n > 0 || len(done) > 0 {
			t.Errorf("Dial has sent %d more bytes (returned: %d) before the answer", n, len(done))
		}
		say(t, srv, answer+"any bytes")
		srv.Close()
		if r := <-done; r.err != nil || r.text != "any bytes" {
			t.Errorf("got %+v", r)
		}
	})
}

func TestWirePrefaceOfServer(t *testing.T) {
	pad := func(n int) string { return "ZREPL-RPC 1-1 pad=" + strings.Repeat("x", n-len("ZREPL-RPC 1-1 pad=")) }
	const ok, either = "ZREPL-RPC 1 ok hb=5000 max=67108864\n", "(ZREPL-RPC 1-1 refused [ -~]+\n)?"
	for says, want := range map[string]string{ // want is a regexp for all that is said
		banner + label("zrepl_control"):                                             ok,
		banner + label("zrepl_data"):                                                ok,
		"ZREPL-RPC 1-1\n" + label("zrepl_data"):                                     ok, // the defaults
		"ZREPL-RPC 1-1 x=1 max=65536 x=2 zstd= hb=10 a=b=c\n" + label("zrepl_data"): ok, // unknown keys
		"ZREPL-RPC 1-1 hb=300000 max=4294967296\n" + label("zrepl_data"):            ok,
		pad(511) + "\n" + label("zrepl_data"):                                       ok,
		"ZREPL-RPC 1-9\n" + label("zrepl_data"):                                     ok,
		banner + label("nope"):                                                      "ZREPL-RPC 1-1 refused not-found [ -~]+\n",
		banner + label("ZREPL_DATA"):                                                either,
		banner + label(""):                                                          either,
		banner + label("zrepl_data\x00x"):                                           either,
		"ZREPL-RPC 2-3\n":/* before the label */ "ZREPL-RPC 1-1 refused failed-precondition [ -~]*2-3[ -~]*\n",
	} {
		wireTest(t, fmt.Sprintf("%.50q", says), func(t *testing.T) {
			conn := wireConnect(t, wireServer(t, rpc.ServerConfig{}))
			say(t, conn, says)
			said := make([]byte, wirePending(conn))
			if n, err := conn.Read(said); !regexp.MustCompile("^" + want + "$").Match(said) {
				t.Errorf("got %q (%d, %v), want %q", said, n, err, want)
			}
		})
	}
	const start, hello = "ZREPL-RPC 1-1", "ZREPL-RPC 1-1 x="
	for _, says := range []string{ // closed at once, without a line
		"G", "\x16\x03\x01\x02\x00\x01\x00", "GET / HTTP/1.1\r\n\r\n", "SSH-2.0-x\r\n", "ZREPL-RPX", "zrepl-rpc 1-1\n", "\n",
		"ZREPL-RPC\n", "ZREPL-RPC 1\n", "ZREPL-RPC 1-\n", "ZREPL-RPC -1\n", "ZREPL-RPC a-b\n", "ZREPL-RPC 9-1\n",
		pad(512), pad(512) + "\n", // too long
		start + "  hb=5000\n", "ZREPL-RPC  1-1\n", start + "  ", " " + start + "\n", start + " \n", // spaces
		hello + "\x01", hello + "\x00", hello + "\x7f", hello + "\xc3\xa9", start + "\thb=5000", start + "\r", // not printable
		start + " hb=5000 hb=5000\n", start + " max=65536 x=1 max=65536\n", start + " hb\n", start + " zstd\n",
		start + " hb=9\n", start + " hb=300001\n", start + " hb=abc\n", start + " hb=\n", start + " hb=-5000\n",
		start + " max=65535\n", start + " max=0x10000\n",
	} {
		wireTest(t, fmt.Sprintf("%.30q", says), func(t *testing.T) {
			conn := wireConnect(t, wireServer(t, rpc.ServerConfig{}))
			say(t, conn, says)
			wireClosed(t, conn)
		})
	}
	wireTest(t, "config", func(t *testing.T) {
		l := wireServer(t, rpc.ServerConfig{HeartbeatInterval: time.Second, MaxMessageSize: 70000})
		conn := wireConnect(t, l)
		say(t, conn, banner+label("zrepl_data"))
		expect(t, conn, "ZREPL-RPC 1 ok hb=1000 max=70000\n")
	})
}

func TestWireRefusal(t *testing.T) {
	for _, test := range []struct {
		name string
		err  error
		want string
	}{
		{"error", rpc.Errorf(rpc.PermissionDenied, `client "db7" is not allowed`), "permission-denied client \"db7\" is not allowed\n"},
		{"code", rpc.Errorf(rpc.Unauthenticated, "who?"), "unauthenticated who?\n"},
		{"other error", errors.New("no"), "permission-denied "},
		{"does not print", rpc.Errorf(rpc.Internal, "no\n\xff\x00é  a  b %s", strings.Repeat("x", 1000)), "internal no"},
		{"bad identity", nil, ""},
	} {
		wireTest(t, test.name, func(t *testing.T) {
			s, l := rpc.NewServer(nil, rpc.ServerConfig{}), newMemListener()
			serve(t, s, &rpc.Listener{Listener: l, Authenticate: func(_ context.Context, c net.Conn) (net.Conn, string, error) {
				return c, "a/b", test.err // and that is no identity
			}})
			conn := wireConnect(t, l)
			say(t, conn, banner+label("zrepl_control"))
			line, err := io.ReadAll(conn)
			printed := strings.IndexFunc(string(line), func(r rune) bool { return r < ' ' || r > '~' })
			if err != nil || !strings.HasPrefix(string(line), "ZREPL-RPC 1-1 refused "+test.want) || len(line) > 512 || printed != len(line)-1 ||
				strings.Contains(string(line), "  ") {
				t.Errorf("got %q, %v, want %q", line, err, test.want)
			}
		})
	}
}

func TestWireDrain(t *testing.T) {
	refused := func(t *testing.T, l *memListener) *memConn {
		conn, start := wireConnect(t, l), time.Now()
		say(t, conn, banner+label("nope"))
		line, err := io.ReadAll(conn)
		if err != nil || !strings.Contains(string(line), " refused not-found ") || time.Since(start) > 0 {
			t.Fatalf("got %q, %v, after %v", line, err, time.Since(start))
		}
		return conn
	}
	wireTest(t, "time", func(t *testing.T) { // half-closed for a second, then closed
		conn := refused(t, wireServer(t, rpc.ServerConfig{}))
		say(t, conn, "in flight")
		time.Sleep(900 * time.Millisecond)
		say(t, conn, "in flight")
		time.Sleep(101 * time.Millisecond)
		synctest.Wait()
		if _, err := conn.Write([]byte{0}); err == nil {
			t.Error("still open after a second")
		}
	})
	wireTest(t, "bytes", func(t *testing.T) {
		conn, start := refused(t, wireServer(t, rpc.ServerConfig{})), time.Now()
		n, err := conn.Write(make([]byte, 4<<20))
		if err == nil || n < pipeSize || n > 1<<20+2*pipeSize || time.Since(start) >= time.Second {
			t.Errorf("the server has taken %d bytes (%v) in %v", n, err, time.Since(start))
		}
	})
	for i, config := range []rpc.ServerConfig{{MaxConns: 2}, {MaxConnsPerClient: 2}} {
		wireTest(t, []string{"MaxConns", "MaxConnsPerClient"}[i], func(t *testing.T) {
			l := wireServer(t, config)
			for range 3 {
				refused(t, l) // not open while it is drained
			}
			first := wireOpen(t, l, "zrepl_data")
			wireOpen(t, l, "zrepl_control")
			for range 2 {
				conn := wireConnect(t, l)
				say(t, conn, banner+label("zrepl_data"))
				expect(t, conn, "ZREPL-RPC 1-1 refused resource-exhausted ")
			}
			first.Close()
			synctest.Wait()
			wireOpen(t, l, "zrepl_data")
		})
	}
}

func TestWireClientRefused(t *testing.T) {
	for _, test := range []struct {
		remote, name, reason string
		code                 rpc.Code
	}{
		{"1-1", "permission-denied", `client "db7" is not allowed`, rpc.PermissionDenied},
		{"1-1", "quota-exceeded", "come back later", rpc.Unknown},
		{"2-3", "failed-precondition", "no common version", rpc.FailedPrecondition},
	} {
		for _, op := range []string{"call", "download", "dial"} {
			wireTest(t, test.name+" "+op, func(t *testing.T) {
				p, name := wireClient(t, rpc.ClientConfig{}), wireLabel(op)
				var done <-chan wireResult
				if start := wireOps[op]; start != nil {
					done = start(p, t.Context(), "hi")
				} else {
					name = "mine"
					done = wireGo(func(*text) error { _, err := p.Dial(t.Context(), name); return err })
				}
				srv := p.accept(t)
				expect(t, srv, banner+label(name))
				synctest.Wait()
				say(t, srv, "ZREPL-RPC "+test.remote+" refused "+test.name+" "+test.reason+"\n")
				var refused *rpc.HandshakeError
				err := (<-done).err
				if !errors.As(err, &refused) {
					t.Fatalf("got %v, want a HandshakeError", err)
				}
				want := rpc.HandshakeError{Code: test.code, Reason: test.reason, Label: name, Local: "1-1", Remote: test.remote}
				if s := p.Stats(); *refused != want || rpc.CodeOf(err) != want.Code || s.Conns != 0 || s.HandshakesRefused != 1 {
					t.Errorf("got %+v (%v), want %+v; %+v", *refused, rpc.CodeOf(err), want, s)
				}
				for _, part := range []string{want.Code.String(), want.Reason, name, want.Local, want.Remote} {
					if !strings.Contains(err.Error(), part) {
						t.Errorf("%q is not in %q", part, err)
					}
				}
			})
		}
	}
	for name, last := range map[string]string{ // of a server that stops: the call is retried once
		"retried": answer + frame(tReply, uint64(1), 0, "ho"), "retried once": "ZREPL-RPC 1-1 refused unavailable bye\n",
	} {
		wireTest(t, name, func(t *testing.T) {
			p := wireClient(t, rpc.ClientConfig{})
			done := p.call(t.Context(), "echo", "hi")
			for _, line := range []string{"ZREPL-RPC 1-1 refused unavailable shutting down\n", last} {
				srv := p.accept(t)
				expect(t, srv, banner+label("zrepl_control"))
				synctest.Wait()
				say(t, srv, line)
			}
			var refused *rpc.HandshakeError
			if r := <-done; name == "retried" && (r.err != nil || r.text != "ho") ||
				name != "retried" && (!errors.As(r.err, &refused) || refused.Reason != "bye" || refused.Code != rpc.Unavailable) {
				t.Errorf("got %+v", r)
			}
		})
	}
}

// TestWireEarlyAnswer: an answer that is there before the call is, is no reason to dial again.
func TestWireEarlyAnswer(t *testing.T) {
	for i, says := range []string{"ZREPL-RPC 1-1 refused permission-denied no\n", "HTTP/1.1 400 Bad Request\r\n", "" /* lost */} {
		wireTest(t, fmt.Sprintf("%.9q", says), func(t *testing.T) {
			for range 20 {
				var dials int
				c := rpc.NewClient(rpc.ConnecterFunc(func(context.Context) (net.Conn, error) {
					dials++
					conn, srv := newMemConns()
					_, err := io.WriteString(srv, says)
					return conn, errors.Join(err, srv.CloseWrite())
				}), rpc.ClientConfig{})
				err := c.Call(t.Context(), "echo", textOf("hi"), nil)
				check(t, c.Close())
				if dials < 1 || dials > 1+i/2 { // a call that was not written is tried twice
					t.Fatalf("%d dials, then %v", dials, err)
				}
			}
		})
	}
}

func TestWireMalformedAnswer(t *testing.T) {
	for says, speaks := range map[string]string{ // what the peer says, and what the error names
		"HTTP/1.1 400 Bad Request\r\n\r\n": "HTTP", "\x15\x03\x01\x00\x02\x02\x46": "TLS", "SSH-2.0-OpenSSH_9.6\r\n": "SSH",
		"\x00": "", "ZREPL-RPC 2 ok hb=5000\n": "2", "ZREPL-RPC 1  ok\n": "", "ZREPL-RPC 1 ok hb=9\n": "", "ZREPL-RPC 1 no\n": "",
		"ZREPL-RPC 1-1 ok\n": "", "ZREPL-RPC 1 ok max=65536 max=65536\n": "", "ZREPL-RPC 1 ok \n": "", "ZREPL-RPC 1 ok\r": "",
		"ZREPL-RPC 1 ok x=" + strings.Repeat("x", 512): "", banner: "",
	} {
		wireTest(t, fmt.Sprintf("%.30q", says), func(t *testing.T) {
			p, start := wireClient(t, rpc.ClientConfig{}), time.Now()
			done := p.call(t.Context(), "echo", "hi")
			srv := p.accept(t)
			synctest.Wait()
			say(t, srv, says)
			var protocol *rpc.ProtocolError
			if r := <-done; !errors.As(r.err, &protocol) || !strings.Contains(r.err.Error(), speaks) {
				t.Errorf("got %v, want a ProtocolError that names %q", r.err, speaks)
			}
			if _, err := io.ReadAll(srv); err != nil || time.Since(start) >= time.Second {
				t.Errorf("reading: %v, after %v", err, time.Since(start))
			}
		})
	}
}

// wireDrip is a connection whose reads give one byte.
type wireDrip struct{ *memConn }

func (c wireDrip) Read(b []byte) (int, error) { return c.memConn.Read(b[:min(len(b), 1)]) }

func TestWireByteByByte(t *testing.T) {
	wireTest(t, "session", func(t *testing.T) {
		l := wireServer(t, rpc.ServerConfig{}, func(s *rpc.Server) {
			s.HandleLabel("mine", func(_ context.Context, conn net.Conn) { io.Copy(conn, conn) })
		})
		l.pipe = func() (net.Conn, net.Conn) { c, s := newMemConns(); return wireDrip{c}, wireDrip{s} }
		p := wirePeer{rpc.NewClient(l, rpc.ClientConfig{}), l}
		defer p.Close()
		body := strings.Repeat("0123456789", 200)
		for i, done := range []<-chan wireResult{p.call(t.Context(), "echo", body), p.get(t.Context(), body),
			p.put(t.Context(), "", strings.NewReader(body)), p.call(t.Context(), "echo", body)} {
			if r := <-done; r.err != nil || r.text != body {
				t.Errorf("%d: got %.99q, %v", i, r.text, r.err)
			}
		}
		conn, err := p.Dial(t.Context(), "mine")
		check(t, err)
		defer conn.Close()
		say(t, conn, body)
		expect(t, conn, body)
	})
}

// ---- Control connections on the wire ------------------------------------------------------------------------------

// wireHead is the header of a frame whose payload is still to come.
func wireHead[N int | int64](kind byte, length N) string {
	return string(binary.BigEndian.AppendUint32([]byte{kind, 0, 0, 0}, uint32(length)))
}

// wireBent is frame with another byte in its header.
func wireBent(frame string, at int) string { return frame[:at] + "\x01" + frame[at+1:] }

// wireOps are the client's requests.
var wireOps = map[string]func(p wirePeer, ctx context.Context, req string) <-chan wireResult{
	"call":     func(p wirePeer, ctx context.Context, req string) <-chan wireResult { return p.call(ctx, "echo", req) },
	"download": func(p wirePeer, ctx context.Context, req string) <-chan wireResult { return p.get(ctx, req) },
	"upload": func(p wirePeer, ctx context.Context, req string) <-chan wireResult {
		return p.put(ctx, req, strings.NewReader(""))
	},
}

// wireRequest is the frame of that request, the first on its connection, and wireLabel its connection's label.
func wireRequest(op, req string) string {
	return map[string]string{"call": wireCall(1, wireDefault, "echo", req), "download": wireGet(req), "upload": wirePut(req)}[op]
}
func wireLabel(op string) string {
	return map[bool]string{true: "zrepl_control", false: "zrepl_data"}[op == "call"]
}

func TestWireBodyLimit(t *testing.T) {
	const least = 65536 // of max; more is sent only when the answer has been read
	small, large := strings.Repeat("s", least), strings.Repeat("l", least+1)
	for op, start := range wireOps {
		wireTest(t, op+" before the answer", func(t *testing.T) {
			p := wireClient(t, rpc.ClientConfig{})
			start(p, t.Context(), small)
			expect(t, p.accept(t), banner+label(wireLabel(op))+wireRequest(op, small))
			p = wireClient(t, rpc.ClientConfig{})
			start(p, t.Context(), large)
			srv := p.accept(t)
			expect(t, srv, banner+label(wireLabel(op)))
			if n := wirePending(srv); n > 0 {
				t.Errorf("%d bytes were sent before the answer", n)
			}
			say(t, srv, answer)
			expect(t, srv, wireRequest(op, large))
		})
		wireTest(t, op+" too large for the server", func(t *testing.T) {
			p := wireClient(t, rpc.ClientConfig{})
			done := start(p, t.Context(), large)
			srv := p.accept(t)
			expect(t, srv, banner+label(wireLabel(op)))
			say(t, srv, "ZREPL-RPC 1 ok max=65536\n")
			if r := <-done; rpc.CodeOf(r.err) != rpc.ResourceExhausted || wirePending(srv) > 0 {
				t.Errorf("got %v, and %d bytes were sent", r.err, wirePending(srv))
			}
			if op == "call" { // the connection goes on
				start(p, t.Context(), small)
				if kind, body := wireNext(t, srv); frame(kind, body)[16:] != wireRequest(op, small)[16:] { // any id
					t.Errorf("read a frame %x of %d bytes", kind, len(body))
				}
			}
		})
		wireTest(t, op+" at the server's limit", func(t *testing.T) {
			l := wireServer(t, rpc.ServerConfig{MaxMessageSize: least})
			conn := wireOpen(t, l, wireLabel(op))
			say(t, conn, wireRequest(op, small)+map[string]string{"upload": frame(tEnd, uint64(0))}[op])
			kind, body := wireNext(t, conn)
			if body = strings.TrimPrefix(body, payload(uint64(1))); body != payload(0, small) && op != "upload" || body[0] != 0 {
				t.Fatalf("read a frame %x of %d bytes: %.99q", kind, len(body), body)
			}
			conn = wireOpen(t, l, wireLabel(op))
			say(t, conn, wireRequest(op, large)[:8+17+4]) // known before the body, and before the longest method name
			wireClosed(t, conn)
			conn = wireOpen(t, l, wireLabel(op))
			say(t, conn, wireHead(wireRequest(op, "")[0], 17+255+least+1))
			wireClosed(t, conn)
		})
	}
	for _, op := range []string{"call", "download"} {
		wireTest(t, op+" with a result too large for the client", func(t *testing.T) {
			conn := wireConnect(t, wireServer(t, rpc.ServerConfig{}))
			say(t, conn, "ZREPL-RPC 1-1 max=65536\n"+label(wireLabel(op)))
			expect(t, conn, answer)
			say(t, conn, wireRequest(op, large))
			_, body := wireNext(t, conn)
			if body = strings.TrimPrefix(body, payload(uint64(1))); body[0] != 8 || len(body) > 4097 {
				t.Errorf("got %.99q", body)
			}
			next := map[string]string{"call": wireCall(2, 0, "echo", small), "download": wireGet(small)}
			say(t, conn, next[op]) // the connection goes on
			if _, body = wireNext(t, conn); strings.TrimPrefix(body, payload(uint64(2))) != payload(0, small) {
				t.Errorf("got %.99q", body)
			}
		})
	}
}

func TestWireViolations(t *testing.T) {
	one, zero, seven := uint64(1), uint64(0), "7 bytes"
	call, get, put, beat := wireCall(1, 0, "echo", "x"), wireGet("x"), wirePut("x"), frame(tHeartbeat)
	cancel, reply, goaway, result := frame(tCancel, one), frame(tReply, one, 0), frame(tGoaway, zero), frame(tResult, 0)
	data, end, fail, long := frame(tData, "x"), frame(tEnd, one), frame(tFail, 2, "x"), strings.Repeat("x", 4097)
	all := []string{
		wireHead(0, 0), wireHead(0x02, 0), wireHead(0x0f, 0), wireHead(0x14, 0), wireHead(0x26, 0), wireHead(0xff, 0),
		wireBent(beat, 1), wireBent(beat, 2), wireBent(beat, 3), frame(tHeartbeat, 0), wireHead(tHeartbeat, int64(1<<32-1)),
	}
	inStream := []string{ // whoever receives it
		frame(tData), wireHead(tData, 1<<20+1), wireHead(tData, int64(1<<32-1)), wireBent(data, 1), frame(tEnd, seven), frame(tEnd, zero, 0),
		wireBent(end, 2), frame(tFail), frame(tFail, 0, "x"), frame(tFail, 2, long), wireBent(fail, 3), get, put, call,
	}
	for _, test := range []struct {
		name, first string // what is sent before
		op          string // the client's; of no matter to the server except for its label
		server      bool   // who has to see it
		rows        []string
	}{
		{"server control", "", "call", true, append([]string{
			frame(tCall), frame(tCall, one, zero), frame(tCall, one, zero, "\x05echo"), wireBent(call, 1), wireBent(call, 3),
			wireHead(tCall, int64(1<<32-1)), wireCall(0, 0, "echo", ""), cancel, frame(tCancel), frame(tCancel, seven),
			frame(tCancel, one, 0), reply, goaway, get, put, result, data, end, fail}, all...)},
		{"server data", "", "download", true, append([]string{
			frame(tDownload), frame(tDownload, seven), frame(tDownload, zero), frame(tUpload, zero, "\x04put"), wireBent(get, 1),
			wireBent(put, 2), wireHead(tDownload, int64(1<<32-1)), wireHead(tUpload, int64(1<<32-1)), call, cancel, reply, goaway, result, data, end,
			fail}, all...)},
		{"server upload", put, "upload", true, append(append([]string{result, goaway}, all...), inStream...)},
		{"server upload going on", put + data, "upload", true, append([]string{result}, inStream...)},
		{"client control", "", "call", false, append([]string{
			frame(tReply), frame(tReply, seven), frame(tReply, one), frame(tReply, uint64(2), 0), frame(tReply, zero, 0),
			frame(tReply, one, 2, long), wireHead(tReply, 9+65536+1), wireHead(tReply, int64(1<<32-1)), wireBent(reply, 1),
			frame(tGoaway), frame(tGoaway, seven), frame(tGoaway, one, 0), frame(tGoaway, one) + frame(tGoaway, one),
			call, cancel, get, put, result, data, end, fail}, all...)},
		{"client data", "", "download", false, append([]string{
			frame(tResult), frame(tResult, 2, long), wireHead(tResult, 1+65536+1), wireBent(result, 1), frame(tGoaway, seven),
			frame(tGoaway, one) + frame(tGoaway, one), call, cancel, reply, get, put, data, end, fail}, all...)},
		{"client download", result, "download", false, append(append([]string{result, reply}, all...), inStream...)},
		{"client download going on", result + data, "download", false, append([]string{result}, inStream...)},
		{"client upload", "", "upload, going on", false, append([]string{result, data, end, fail}, all...)},
	} {
		for i, row := range test.rows {
			wireTest(t, fmt.Sprintf("%s %d %.24q", test.name, i, row), func(t *testing.T) {
				if test.server {
					l := wireServer(t, rpc.ServerConfig{})
					conn := wireOpen(t, l, wireLabel(test.op))
					say(t, conn, test.first+row)
					wireClosed(t, conn)
					conn = wireOpen(t, l, "zrepl_control") // the server goes on
					say(t, conn, call)
					wireWant(t, conn, frame(tReply, one, 0, "x"))
					return
				}
				p := wireClient(t, rpc.ClientConfig{MaxMessageSize: 65536})
				var done <-chan wireResult
				if op := wireOps[test.op]; op != nil {
					done = op(p, t.Context(), "x")
				} else {
					r, w := io.Pipe()
					defer w.Close()
					done = p.put(t.Context(), "x", r)
				}
				srv, start := p.accept(t), time.Now()
				synctest.Wait() // until the request is written
				say(t, srv, answer+test.first+row)
				var protocol *rpc.ProtocolError
				if r := <-done; !errors.As(r.err, &protocol) {
					t.Errorf("got %v, want a ProtocolError", r.err)
				}
				if _, err := io.ReadAll(srv); err != nil || time.Since(start) >= time.Second {
					t.Errorf("reading: %v, after %v", err, time.Since(start))
				}
			})
		}
	}
}

func TestWireControlServer(t *testing.T) {
	one, beat, bytes4k := uint64(1), frame(tHeartbeat), strings.Repeat("x", 4096)
	var ended chan error // one for each test
	setup := func(s *rpc.Server) {
		rpc.HandleCall(s, "deadline", func(ctx context.Context, req *text) (*text, error) {
			if d, ok := ctx.Deadline(); ok && time.Until(d) < 100*365*24*time.Hour {
				return textOf(time.Until(d).String()), ctx.Err()
			}
			return textOf("none"), ctx.Err()
		})
		rpc.HandleCall(s, "fail", func(_ context.Context, req *text) (*text, error) {
			return nil, &rpc.Error{Code: rpc.Code((*req)[0]), Message: string((*req)[1:])}
		})
		rpc.HandleCall(s, "error", func(_ context.Context, req *text) (*text, error) { return nil, errors.New(string(*req)) })
		rpc.HandleCall(s, "picky", func(_ context.Context, req *wirePicky) (*text, error) { return &req.text, nil })
		rpc.HandleCall(s, "ended", func(ctx context.Context, req *text) (*text, error) {
			<-ctx.Done()
			ended <- ctx.Err()
			return req, nil
		})
	}
	for _, test := range []struct {
		name, says string
		code       byte
		want       string // a regexp
	}{
		{"heartbeats", beat + wireCall(1, 0, "echo", "x") + beat + beat, 0, "x"},
		{"no body", wireCall(1, 0, "echo", ""), 0, ""},
		{"cancelled", wireCall(1, 0, "wait", "") + frame(tCancel, one), 1, "context canceled"},
		{"cancelled twice", wireCall(1, 0, "ended", "x") + frame(tCancel, one) + frame(tCancel, one), 0, "x"},
		{"unknown method", wireCall(1, 0, "nope", "x"), 12, ".+"},
		{"no method", wireCall(1, 0, "", "x"), 12, ".*"},
		{"endpoint as method", wireCall(1, 0, "get", "x"), 12, ".+"},
		{"service without handler", wireCall(1, 0, "list_filesystems", ""), 12, ".+"},
		{"undecodable", wireCall(1, 0, "picky", "bad"), 3, ".+"},
		{"no deadline", wireCall(1, 0, "deadline", ""), 0, "none"},
		{"deadline", wireCall(1, 1.5e9, "deadline", ""), 0, "1.5s"},
		{"longest deadline", wireCall(1, 1<<64-1, "deadline", ""), 0, "none"},
		{"deadline of 2^63", wireCall(1, 1<<63, "deadline", ""), 0, "none"},
		{"deadline passes", wireCall(1, 2e9, "wait", ""), 4, "context deadline exceeded"},
		{"error", wireCall(1, 0, "error", "why"), 2, "why"},
		{"code", wireCall(1, 0, "fail", "\x10why"), 16, "why"},
		{"code 0", wireCall(1, 0, "fail", "\x00why"), 2, "why"},
		{"code 17", wireCall(1, 0, "fail", "\x11why"), 2, "why"},
		{"error without text", wireCall(1, 0, "fail", "\x05"), 5, ""},
		{"error not UTF-8", wireCall(1, 0, "fail", "\x05a\xffb"), 5, "a\uFFFDb"},
		{"error of 4096", wireCall(1, 0, "fail", "\x05"+bytes4k), 5, bytes4k},
		{"error of more", wireCall(1, 0, "fail", "\x05a"+strings.Repeat("é", 3000)), 5, "aé{1000}é{1000}é{40,47}.{0,5}"},
		{"repair makes it longer", wireCall(1, 0, "fail", "\x05"+strings.Repeat("\xffa", 2000)), 5, "(\uFFFDa){1000}.{0,48}"},
		{"ping", wireCall(1, 0, "ping", "\x0a\x02hi"), 0, "\x0a\x02hi"},
		{"ping undecodable", wireCall(1, 0, "ping", "\x0a\x02h"), 3, ".+"},
	} {
		wireTest(t, test.name, func(t *testing.T) {
			ended = make(chan error, 1)
			conn, start := wireOpen(t, wireServer(t, rpc.ServerConfig{}, setup), "zrepl_control"), time.Now()
			say(t, conn, test.says)
			kind, body := wireNext(t, conn)
			head, text := body[:9], body[9:]
			if kind != tReply || head != payload(one, test.code) || !regexp.MustCompile("(?s)^"+test.want+"$").MatchString(text) ||
				!utf8.ValidString(text) || test.code != 0 && len(text) > 4096 {
				t.Errorf("got %q %.200q, want %q", head, text, test.want)
			}
			if d := time.Since(start); d != 0 && (test.name != "deadline passes" || d != 2*time.Second) {
				t.Errorf("that took %v", d)
			}
			say(t, conn, frame(tCancel, one)+wireCall(1<<60, 0, "echo", "x")) // cancels nothing any more; a gap
			wireWant(t, conn, frame(tReply, uint64(1<<60), 0, "x"))           // the connection goes on
			if n := wirePending(conn); n > 0 {
				t.Errorf("%d bytes more", n)
			}
		})
	}
	for name, says := range map[string]string{
		"repeated id": wireCall(5, 0, "echo", ""), "falling id": wireCall(4, 0, "echo", ""), "cancel of unseen": frame(tCancel, uint64(6)),
	} {
		wireTest(t, name, func(t *testing.T) {
			ended = make(chan error, 1)
			conn := wireOpen(t, wireServer(t, rpc.ServerConfig{}, setup), "zrepl_control")
			say(t, conn, wireCall(3, 0, "ended", "")+wireCall(5, 0, "echo", ""))
			wireWant(t, conn, frame(tReply, uint64(5), 0))
			say(t, conn, says)
			wireClosed(t, conn)
			if err := <-ended; err == nil {
				t.Error("the handler's context goes on")
			}
		})
	}
	wireTest(t, "half-close", func(t *testing.T) {
		ended = make(chan error, 1)
		conn := wireOpen(t, wireServer(t, rpc.ServerConfig{}, setup), "zrepl_control")
		say(t, conn, wireCall(1, 0, "ended", ""))
		synctest.Wait()
		start := time.Now()
		conn.CloseWrite()
		if err := <-ended; err == nil || time.Since(start) > 0 {
			t.Errorf("the handler's context ended with %v after %v", err, time.Since(start))
		}
		if _, err := io.ReadAll(conn); err != nil || time.Since(start) > 0 {
			t.Errorf("closed with %v after %v", err, time.Since(start))
		}
	})
}

// wirePicky does not decode "bad".
type wirePicky struct{ text }

func (m *wirePicky) UnmarshalBinary(b []byte) error {
	if string(b) == "bad" {
		return errors.New("no")
	}
	return m.text.UnmarshalBinary(b)
}

func TestWireShutdown(t *testing.T) {
	wireTest(t, "running", func(t *testing.T) {
		var s *rpc.Server
		release := make(chan struct{})
		l := wireServer(t, rpc.ServerConfig{}, func(server *rpc.Server) {
			s = server
			rpc.HandleCall(s, "hold", func(_ context.Context, req *text) (*text, error) { <-release; return req, nil })
		})
		conn, idle, late := wireOpen(t, l, "zrepl_control"), wireOpen(t, l, "zrepl_control"), wireConnect(t, l)
		say(t, conn, wireCall(3, 0, "hold", "x")+wireCall(5, 0, "hold", "x"))
		synctest.Wait()
		done := make(chan error, 1)
		go func() { done <- s.Shutdown(t.Context()) }()
		wireWant(t, conn, frame(tGoaway, uint64(5)))
		expect(t, idle, frame(tGoaway, uint64(0)))
		expectEOF(t, idle)
		io.WriteString(late, banner+label("zrepl_control"))
		expect(t, late, "ZREPL-RPC 1-1 refused unavailable ")
		say(t, conn, wireCall(6, 0, "echo", "")+frame(tCancel, uint64(6))) // dropped, both
		if n := wirePending(conn); n > 0 || len(done) > 0 {
			t.Errorf("%d bytes sent, Shutdown returned: %d", n, len(done))
		}
		close(release)
		replies := frame(tReply, uint64(3), 0, "x") + frame(tReply, uint64(5), 0, "x")
		kind, body := wireNext(t, conn)
		if first := frame(kind, body); strings.HasSuffix(replies, first) {
			replies = first + strings.TrimSuffix(replies, first)
		}
		wireWant(t, conn, strings.TrimPrefix(replies, frame(kind, body)))
		expectEOF(t, conn)
		conn.Close()
		idle.Close()
		check(t, <-done)
	})
}

func TestWireControlClient(t *testing.T) {
	// ask starts a call and wants its frame, the id of which it returns.
	ask := func(t *testing.T, p wirePeer, srv io.Reader, req string) (done <-chan wireResult, id uint64) {
		t.Helper()
		done = p.call(t.Context(), "echo", req)
		kind, body := wireNext(t, srv)
		if kind != tCall || len(body) < 8 || body[8:] != payload(wireDefault, str8("echo"), req) {
			t.Fatalf("read %x %.99q", kind, body)
		}
		return done, binary.BigEndian.Uint64([]byte(body))
	}
	want := func(t *testing.T, done <-chan wireResult, text string) {
		t.Helper()
		if r := <-done; r.err != nil || r.text != text {
			t.Errorf("got %+v, want %q", r, text)
		}
	}
	// none wants no more connection.
	none := func(t *testing.T, p wirePeer) {
		t.Helper()
		select {
		case <-p.l.conns:
			t.Error("the client connects again")
		case <-time.After(2 * time.Minute):
		}
	}
	// begin starts a call, a, on a new connection.
	begin := func(t *testing.T) (p wirePeer, srv *memConn, a <-chan wireResult) {
		p = wireClient(t, rpc.ClientConfig{})
		a = p.call(t.Context(), "echo", "a")
		srv = p.open(t, "zrepl_control")
		expect(t, srv, wireCall(1, wireDefault, "echo", "a")) // ids start at 1
		return p, srv, a
	}
	wireTest(t, "ids, order, heartbeats, replies to nobody", func(t *testing.T) {
		p, srv, a := begin(t)
		b, second := ask(t, p, srv, "b")
		c, third := ask(t, p, srv, "c")
		if second <= 1 || third <= second {
			t.Errorf("ids 1, %d, %d", second, third)
		}
		beat := frame(tHeartbeat)
		say(t, srv, beat+frame(tReply, third, 0, "c")+beat+beat+frame(tReply, second, 0, "b"))
		want(t, b, "b")
		want(t, c, "c")
		say(t, srv, frame(tReply, third, 0, "again")+frame(tReply, uint64(1), 0, "a"))
		want(t, a, "a")
	})
	wireTest(t, "cancel", func(t *testing.T) {
		p, srv, a := begin(t)
		ctx, cancel := context.WithCancel(t.Context())
		start, b := time.Now(), p.call(ctx, "echo", "b")
		_, body := wireNext(t, srv)
		cancel()
		if r := <-b; !errors.Is(r.err, context.Canceled) || rpc.CodeOf(r.err) != rpc.Canceled || time.Since(start) > 0 {
			t.Errorf("got %v after %v", r.err, time.Since(start))
		}
		wireWant(t, srv, frame(tCancel, body[:8]))
		say(t, srv, frame(tReply, body[:8], 0, "late")+frame(tReply, uint64(1), 0, "a"))
		want(t, a, "a")
		c, id := ask(t, p, srv, "c") // the connection goes on
		say(t, srv, frame(tReply, id, 0, "c"))
		want(t, c, "c")
	})
	for name, test := range map[string]struct {
		config   time.Duration
		deadline time.Duration
		wire     uint64
	}{
		"deadline": {0, 7 * time.Second, 7e9}, "long deadline": {time.Second, 10 * time.Minute, 600e9},
		"CallTimeout": {3 * time.Second, 0, 3e9}, "no timeout": {-1, 0, 0},
	} {
		wireTest(t, name, func(t *testing.T) {
			p, ctx := wireClient(t, rpc.ClientConfig{CallTimeout: test.config}), t.Context()
			if test.deadline != 0 {
				var cancel func()
				ctx, cancel = context.WithTimeout(ctx, test.deadline)
				defer cancel()
			}
			start, a := time.Now(), p.call(ctx, "echo", "a")
			srv := p.open(t, "zrepl_control")
			wireWant(t, srv, wireCall(1, test.wire, "echo", "a"))
			if test.wire == 7e9 || test.wire == 3e9 {
				if r := <-a; !errors.Is(r.err, context.DeadlineExceeded) || time.Since(start) != time.Duration(test.wire) {
					t.Errorf("got %v after %v", r.err, time.Since(start))
				}
				wireWant(t, srv, frame(tCancel, uint64(1)))
			}
		})
	}
	bytes4k := strings.Repeat("x", 4096)
	for name, test := range map[string]struct{ code, text, want string }{
		"code 16": {"\x10", "why", "why"}, "code 17": {"\x11", "why", "why"}, "code 255": {"\xff", "why", "why"},
		"no text": {"\x05", "", ""}, "not UTF-8": {"\x05", "a\xffb", "a\uFFFDb"}, "4096": {"\x05", bytes4k, bytes4k},
		"does not print": {"\x05", "a\x1b[1m\n", "a\x1b[1m\n"},
	} {
		wireTest(t, name, func(t *testing.T) {
			p, srv, a := begin(t)
			say(t, srv, frame(tReply, uint64(1), test.code, test.text))
			err, code := (<-a).err, rpc.Code(test.code[0])
			if code > 16 {
				code = rpc.Unknown
			}
			var remote *rpc.Error
			if !errors.As(err, &remote) || remote.Code != code || remote.Message != test.want || rpc.CodeOf(err) != code ||
				strings.ContainsAny(err.Error(), "\x1b\n") {
				t.Errorf("got %.99q", err)
			}
			b, id := ask(t, p, srv, "b")
			say(t, srv, frame(tReply, id, 0, "b"))
			want(t, b, "b")
		})
	}
	wireTest(t, "lost", func(t *testing.T) { // a call that was sent is not sent again
		p, srv, a := begin(t)
		srv.Close()
		if r := <-a; rpc.CodeOf(r.err) != rpc.Unavailable || errors.Is(r.err, io.EOF) {
			t.Errorf("got %v", r.err)
		}
		none(t, p)
	})
	for _, again := range []bool{false, true} {
		wireTest(t, fmt.Sprint("goaway, again: ", again), func(t *testing.T) {
			p, srv, a := begin(t)
			b, second := ask(t, p, srv, "b")
			c, _ := ask(t, p, srv, "c")
			say(t, srv, frame(tGoaway, second-1))
			srv2 := p.open(t, "zrepl_control")
			calls := map[string]uint64{}
			for range 2 {
				_, body := wireNext(t, srv2)
				calls[body[len(body)-1:]] = binary.BigEndian.Uint64([]byte(body))
			}
			if calls["b"]+calls["c"] != 3 || len(a) > 0 {
				t.Fatalf("sent again: %v", calls)
			}
			if again { // retried once
				say(t, srv2, frame(tGoaway, uint64(0)))
				for _, done := range []<-chan wireResult{b, c} {
					if r := <-done; rpc.CodeOf(r.err) != rpc.Unavailable {
						t.Errorf("got %v", r.err)
					}
				}
			} else {
				say(t, srv2, frame(tReply, calls["c"], 0, "c")+frame(tReply, calls["b"], 0, "b"))
				want(t, b, "b")
				want(t, c, "c")
			}
			say(t, srv, frame(tReply, uint64(1), 0, "a"))
			want(t, a, "a")
			srv.CloseWrite()
			expectEOF(t, srv)
			if again {
				none(t, p)
			}
		})
	}
}

// ---- Data connections on the wire ---------------------------------------------------------------------------------

// dataRun runs f in a bubble of its own and wants all its goroutines gone afterwards.
func dataRun(t *testing.T, name string, f func(t *testing.T)) {
	t.Run(name, func(t *testing.T) {
		noLeak(t)
		synctest.Test(t, f)
	})
}

// dataKind is an error in short: ok, protocol, lost, timeout, or its code, with the text of an *rpc.Error.
func dataKind(err error) string {
	var protocol *rpc.ProtocolError
	var remote *rpc.Error
	switch {
	case err == nil:
		return "ok"
	case errors.As(err, &protocol):
		return "protocol"
	case rpc.CodeOf(err) == rpc.Unavailable && !errors.Is(err, rpc.ErrPeerTimeout) && !errors.Is(err, io.EOF):
		return "lost"
	case errors.As(err, &remote):
		return remote.Code.String() + ": " + remote.Message
	case errors.Is(err, io.EOF):
		return "EOF!"
	case errors.Is(err, rpc.ErrPeerTimeout):
		return "timeout"
	}
	return rpc.CodeOf(err).String()
}

// dataEnv is a Server or a Client, and the raw other end of its connection.
type dataEnv struct {
	t *testing.T
	*memConn
	start  time.Time
	s      *rpc.Server
	l      *memListener
	source *io.PipeWriter // feeds the stream of "pipe"
	closed chan struct{}  // gets one when that stream is closed, or the source of an upload
	read   chan error     // what the handler of "put" got after the data, nil for io.EOF
	c      *rpc.Client
	conns  chan *memConn
	got    chan string // what became of a request: result|body|kind of error
}

type dataStream struct {
	io.Reader
	close func() error
}

func (s dataStream) Close() error { return s.close() }

// dataServer is a Server with some endpoints.
func dataServer(t *testing.T) *dataEnv {
	e := &dataEnv{t: t, start: time.Now(), s: rpc.NewServer(nil, rpc.ServerConfig{}), l: newMemListener(),
		closed: make(chan struct{}, 1000), read: make(chan error, 1000)}
	rpc.HandleDownload(e.s, "get", func(_ context.Context, req *text) (*text, io.ReadCloser, error) {
		if *req == "" {
			return textOf("r:"), nil, nil
		}
		return textOf("r:" + string(*req)), io.NopCloser(strings.NewReader(string(*req))), nil
	})
	rpc.HandleDownload(e.s, "err", func(ctx context.Context, req *text) (*text, io.ReadCloser, error) {
		if *req == "" {
			<-ctx.Done()
			return nil, nil, ctx.Err()
		}
		return nil, nil, rpc.Errorf(rpc.NotFound, "%s", *req)
	})
	rpc.HandleDownload(e.s, "bad", func(_ context.Context, req *text) (*text, io.ReadCloser, error) {
		fault := errors.New(string(*req))
		if *req == "disk" {
			fault = rpc.Errorf(rpc.DataLoss, "disk")
		}
		return textOf("r"), io.NopCloser(io.MultiReader(strings.NewReader("abc"), iotest.ErrReader(fault))), nil
	})
	rpc.HandleDownload(e.s, "pipe", func(context.Context, *text) (*text, io.ReadCloser, error) {
		r, w := io.Pipe()
		e.source = w
		return textOf("r"), dataStream{r, func() error { e.closed <- struct{}{}; return r.Close() }}, nil
	})
	rpc.HandleUpload(e.s, "put", func(_ context.Context, _ *text, r io.Reader) (*text, error) {
		b, err := io.ReadAll(r)
		e.read <- err
		return textOf("n:" + string(b[:min(len(b), 20)])), err
	})
	rpc.HandleUpload(e.s, "some", func(_ context.Context, req *text, r io.Reader) (*text, error) { // reads as much as req has
		_, err := io.ReadFull(r, make([]byte, len(*req)))
		return textOf("some"), err
	})
	rpc.HandleUpload(e.s, "err", func(_ context.Context, req *text, _ io.Reader) (*text, error) {
		return nil, rpc.Errorf(rpc.NotFound, "%s", *req)
	})
	serve(t, e.s, e.l.listener())
	return e
}

func (e *dataEnv) dial() {
	conn, err := e.l.Connect(context.Background())
	check(e.t, err)
	e.t.Cleanup(func() { conn.Close() })
	e.memConn = conn.(*memConn)
}

// dataClient is a Client of raw servers.
func dataClient(t *testing.T) *dataEnv {
	e := &dataEnv{t: t, start: time.Now(), conns: make(chan *memConn, 10), got: make(chan string, 10), closed: make(chan struct{}, 10)}
	e.c = rpc.NewClient(rpc.ConnecterFunc(func(context.Context) (net.Conn, error) {
		client, server := newMemConns()
		e.conns <- server
		return client, nil
	}), rpc.ClientConfig{})
	t.Cleanup(func() { check(t, e.c.Close()) })
	return e
}

// The steps of a test: a string is said by the raw end, a time.Duration slept, a func(*dataEnv) called; and
type (
	dataWant string                    // exactly these bytes come
	dataCode struct{ kind, code byte } // a frame with that code and some text comes
	dataTest = map[string][]any        // steps by the name of the test
	dataStep = func(e *dataEnv)        // something else
)

func (e *dataEnv) run(steps []any) {
	e.t.Helper()
	for i, step := range steps {
		switch step := step.(type) {
		case string:
			say(e.t, e, step)
		case dataWant:
			expect(e.t, e, string(step))
		case time.Duration:
			time.Sleep(step)
		case dataCode:
			if kind, text, _ := readFrame(e); kind != step.kind || text == "" || text[0] != step.code || !utf8.ValidString(text[1:]) || len(text) > 1+4096 {
				e.t.Errorf("step %d: got frame %#x %.50q, want %v", i, kind, text, step)
			}
		default:
			step.(dataStep)(e)
		}
		if e.t.Failed() {
			e.t.Fatalf("at step %d", i)
		}
	}
}

var dataPreface, dataResult, dataABC = banner + label("zrepl_data"), frame(tResult, 0, "r"), frame(tData, "abc")

func dataDown(endpoint, body string) string { return frame(tDownload, uint64(0), str8(endpoint), body) }
func dataUp(endpoint, body string) string   { return frame(tUpload, uint64(0), str8(endpoint), body) }

// dataOf is a whole stream of these chunks.
func dataOf(chunks ...string) (s string) {
	for _, c := range chunks {
		s += frame(tData, c)
	}
	return s + frame(tEnd, uint64(len(strings.Join(chunks, ""))))
}

// Steps of both sides.
func dataFIN(e *dataEnv)    { e.CloseWrite() }
func dataEnds(e *dataEnv)   { expectEOF(e.t, e) }
func dataClosed(e *dataEnv) { <-e.closed }

// dataBreaks wants the connection to end, with nothing before that but perhaps a result that is an error.
func dataBreaks(e *dataEnv) {
	got, err := io.ReadAll(e)
	rest := strings.ReplaceAll(string(got), frame(tHeartbeat), "")
	if err != nil || rest != "" && (len(rest) < 9 || rest[0] != tResult || rest[8] == 0 || int(rest[7])+8 != len(rest)) {
		e.t.Errorf("read %q, %v, want the end", got, err)
	}
}

// dataTook wants that much time to have passed, or a little more.
func dataTook(d time.Duration) dataStep {
	return func(e *dataEnv) {
		if took := time.Since(e.start); took < d || took > d+d/4 {
			e.t.Errorf("took %v, want %v", took, d)
		}
	}
}

// dataServes wants the server to serve another request on the connection.
func dataServes(e *dataEnv) {
	say(e.t, e, dataDown("get", "ok"))
	expect(e.t, e, frame(tResult, 0, "r:ok")+dataOf("ok"))
}

// dataRead wants the handler of "put" to have got that.
func dataRead(kind string) dataStep {
	return func(e *dataEnv) {
		if got := dataKind(<-e.read); !strings.HasPrefix(got, kind) {
			e.t.Errorf("the handler read %q, want %q", got, kind)
		}
	}
}

// dataBroken are frames that no side may send at any time; dataBrokenStream those that no receiver of data takes.
var dataBroken = map[string]string{
	"unknown type": frame(0x7f, "abc"), "type 0": frame(0), "call": frame(tCall, uint64(1), uint64(0), str8("ping")),
	"reply": frame(tReply, uint64(1), 0), "cancel": frame(tCancel, uint64(1)), "heartbeat with payload": frame(tHeartbeat, 0),
	"flags": "\x01\x01\x00\x00\x00\x00\x00\x00", "reserved": "\x01\x00\x00\x01\x00\x00\x00\x00",
	"short goaway": frame(tGoaway, "1234567"), "result without a code": frame(tResult),
}
var dataBrokenStream = map[string]string{
	"data of 0 bytes": frame(tData), "data of over 1 MiB": "\x23\x00\x00\x00\x00\x10\x00\x01",
	"end of 7 bytes": frame(tEnd, "1234567"), "end of 9 bytes": frame(tEnd, uint64(3), 0),
	"fail with code 0": frame(tFail, 0, "fine"), "fail without a code": frame(tFail),
}

func TestDataServer(t *testing.T) {
	long, put := strings.Repeat("x", 1<<20), dataUp("put", "")
	limited := func(kind byte, endpoint string) string { return frame(kind, uint64(time.Second), str8(endpoint)) }
	piped := []any{dataDown("pipe", ""), dataWant(dataResult)}
	endPipe := func(e *dataEnv) { say(e.t, e.source, "abc"); check(e.t, e.source.Close()) }
	shutdown := func(e *dataEnv) { go func() { check(e.t, e.s.Shutdown(context.Background())) }() }
	some := dataUp("some", "abc") + dataABC // is read, but the end is not
	tests := dataTest{
		"download":           {dataDown("get", "abc"), dataWant(frame(tResult, 0, "r:abc") + dataOf("abc")), dataServes},
		"longest timeout":    {frame(tDownload, ^uint64(0), str8("get"), "abc"), dataWant(frame(tResult, 0, "r:abc") + dataOf("abc")), dataServes},
		"empty download":     {dataDown("get", ""), dataWant(frame(tResult, 0, "r:") + dataOf()), dataServes},
		"refused download":   {dataDown("err", "gone"), dataWant(frame(tResult, 5, "gone")), dataServes},
		"failing download":   {dataDown("bad", "disk"), dataWant(dataResult + dataABC + frame(tFail, 15, "disk")), dataServes},
		"failing silently":   {dataDown("bad", ""), dataWant(dataResult + dataABC + frame(tFail, 2)), dataServes},
		"text not UTF-8":     {dataDown("bad", "a\xff\x80b"), dataWant(dataResult + dataABC), dataCode{tFail, 2}, dataServes},
		"long text":          {dataDown("bad", strings.Repeat("é", 5000)), dataWant(dataResult + dataABC), dataCode{tFail, 2}, dataServes},
		"long error":         {dataDown("err", strings.Repeat("é", 5000)), dataCode{tResult, 5}, dataServes},
		"ping":               {dataDown("ping", "\x0a\x02hi"), dataWant(frame(tResult, 0, "\x0a\x02hi") + dataOf()), dataServes},
		"broken ping":        {dataDown("ping", "\xff"), dataCode{tResult, 3}, dataServes},
		"unknown endpoint":   {dataDown("nowhere", "x"), dataCode{tResult, 12}, dataDown("put", ""), dataCode{tResult, 12}, dataServes},
		"unknown upload":     {dataUp("get", "") + dataABC, dataCode{tResult, 12}, dataEnds},
		"upload":             {put + dataOf("abc", "de"), dataWant(frame(tResult, 0, "n:abcde")), dataRead("ok"), dataServes},
		"empty upload":       {put + dataOf(), dataWant(frame(tResult, 0, "n:")), dataRead("ok"), put + dataOf(), dataWant(frame(tResult, 0, "n:")), dataServes},
		"largest data":       {put + dataOf(long, "x"), dataWant(frame(tResult, 0, "n:"+long[:20])), dataServes},
		"failing upload":     {put + dataABC + frame(tFail, 5, "gone"), dataRead("not-found: gone"), dataWant(frame(tResult, 5, "gone")), dataEnds},
		"strange code":       {put + frame(tFail, 99, "x"), dataRead("unknown: x"), dataWant(frame(tResult, 2, "x")), dataEnds},
		"fail without text":  {put + frame(tFail, 2), dataRead("unknown: "), dataWant(frame(tResult, 2)), dataEnds},
		"refused upload":     {dataUp("err", "gone") + dataOf("abc"), dataWant(frame(tResult, 5, "gone")), dataEnds},
		"unread end":         {some + frame(tHeartbeat) + frame(tEnd, uint64(3)), dataWant(frame(tResult, 0, "some")), dataServes},
		"unread data":        {some + dataOf("d"), dataCode{tResult, 9}, dataEnds},
		"unread wrong total": {some + frame(tEnd, uint64(2)), dataBreaks},
		"unread fail":        {some + frame(tFail, 5, "gone"), dataBreaks},
		"nothing read":       {dataUp("some", "") + dataOf(), dataWant(frame(tResult, 0, "some")), dataServes},
		"wrong total":        {put + dataABC + frame(tEnd, uint64(4)), dataBreaks, dataRead("data-loss: ")},
		"two uploads":        {put + put, dataBreaks, dataRead("protocol")},
		"short request":      {frame(tDownload, uint64(0)), dataEnds},
		"cut endpoint":       {frame(tUpload, uint64(0), 5, "put"), dataEnds},
		"body over max":      {"\x20\x00\x00\x00\x04\x00\x00\x0d" + payload(uint64(0), str8("get")), dataEnds},

		"FIN in a download": append(piped, dataFIN, dataEnds, dataClosed),
		"timeouts": {limited(tDownload, "err"), dataCode{tResult, 4}, limited(tDownload, "pipe"), dataWant(dataResult), dataCode{tFail, 4}, dataClosed,
			dataServes, limited(tUpload, "put") + dataABC, dataCode{tResult, 4}, dataTook(3 * time.Second), dataEnds, dataRead("deadline-exceeded")},
		"idle":                         {dataServes, dataServes, dataWant(frame(tGoaway, uint64(2))), dataTook(10 * time.Minute), dataEnds}, // and no heartbeats
		"peer timeout":                 {put + dataABC, dataBreaks, dataRead("timeout"), dataTook(15 * time.Second)},
		"shutdown":                     {dataServes, dataServes, shutdown, dataWant(frame(tGoaway, uint64(2))), dataEnds},
		"shutdown of a new connection": {shutdown, dataWant(frame(tGoaway, uint64(0))), dataEnds},
		"shutdown in a download": {dataServes, piped[0], piped[1], shutdown, time.Second, endPipe, func(e *dataEnv) {
			got, err := io.ReadAll(e)
			goaway := frame(tGoaway, uint64(2)) // wherever it comes
			if rest := strings.Replace(string(got), goaway, "", 1); err != nil || rest != dataOf("abc") || len(rest) == len(got) {
				e.t.Errorf("read %q, %v", got, err)
			}
		}},
		"heartbeats": {piped[0], piped[1], func(e *dataEnv) {
			for last := e.start; time.Since(e.start) < time.Minute; last = time.Now() {
				if expect(e.t, e, frame(tHeartbeat)); time.Since(last) > 5*time.Second {
					e.t.Errorf("silent for %v", time.Since(last))
				}
				say(e.t, e, frame(tHeartbeat))
			}
		}, endPipe, dataWant(dataOf("abc"))},
		"draining": {dataUp("err", "gone"), dataWant(frame(tResult, 5, "gone")), dataEnds, frame(tData, strings.Repeat("x", 300<<10)), 1100 * time.Millisecond, func(e *dataEnv) {
			if _, err := e.Write([]byte("x")); err == nil {
				e.t.Error("drained for more than a second")
			}
		}},
	}
	for _, broken := range []map[string]string{dataBroken, dataBrokenStream, {"result from a client": frame(tResult, 0), "goaway from a client": frame(tGoaway, uint64(0))}} {
		for name, bad := range broken {
			tests["idle/"+name] = []any{bad, dataEnds}
			tests["up/"+name] = []any{put + dataABC + bad, dataBreaks, dataRead("protocol")}
			tests["down/"+name] = append(piped, bad, dataEnds, dataClosed)
		}
	}
	for name, bad := range map[string]string{"data": dataABC, "download": dataDown("get", "x"), "upload": put, "end": frame(tEnd, uint64(0))} {
		tests["down/"+name] = append(piped, bad, dataEnds, dataClosed)
	}
	for name, steps := range tests {
		dataRun(t, name, func(t *testing.T) {
			e := dataServer(t)
			e.dial()
			e.run(append([]any{dataPreface, dataWant(answer)}, steps...))
		})
	}
}

// TestDataServerFIN ends the client's side after each byte, and delivers the bytes one by one.
func TestDataServerFIN(t *testing.T) {
	upload := dataUp("put", "") + frame(tHeartbeat) + dataABC + frame(tHeartbeat) + frame(tData, "de") + frame(tHeartbeat) + frame(tEnd, uint64(5))
	done := frame(tResult, 0, "n:abcde")
	dataRun(t, "cut", func(t *testing.T) {
		e := dataServer(t)
		for session, success := range map[string]string{dataPreface + upload: done, dataPreface + dataDown("pipe", ""): "\x24"} {
			for i := range 2 * len(session) {
				e.dial()
				say(t, e, session[:i/2])
				if i%2 == 0 {
					e.CloseWrite()
					if got, err := io.ReadAll(e); err != nil || strings.Contains(string(got), success) || len(got) > 0 && i/2 < len(dataPreface) {
						t.Fatalf("after %d bytes: read %q, %v", i/2, got, err)
					}
				}
				e.Close()
				if synctest.Wait(); e.s.Stats().OpenConns != 0 {
					t.Fatalf("after %d bytes: still open", i/2)
				}
			}
		}
		for len(e.read) > 0 {
			dataRead("lost")(e)
		}
	})
	dataRun(t, "byte by byte", func(t *testing.T) {
		e := dataServer(t)
		e.dial()
		for _, b := range []byte(dataPreface + frame(tHeartbeat) + upload + frame(tHeartbeat) + dataDown("get", "abc")) {
			say(t, e, string([]byte{b}))
			synctest.Wait()
		}
		expect(t, e, answer+done+frame(tResult, 0, "r:abc")+dataOf("abc"))
	})
}

// Steps of a client's test. dataGet starts a download, dataPut an upload, dataAccept has the raw server take the
// client's next connection, dataGot wants an outcome with that in it.
func dataGet(req string) dataStep {
	return func(e *dataEnv) {
		go func() {
			var res text
			var body []byte
			stream, err := e.c.Download(context.Background(), "get", textOf(req), &res)
			if err == nil {
				body, err = io.ReadAll(stream)
				stream.Close()
			}
			e.got <- string(res) + "|" + string(body) + "|" + dataKind(err)
		}()
	}
}

func dataPut(r io.Reader) dataStep {
	return func(e *dataEnv) {
		go func() {
			var res text
			err := e.c.Upload(context.Background(), "put", textOf("req"), r, &res)
			e.got <- string(res) + "||" + dataKind(err)
		}()
	}
}

func dataConnected(e *dataEnv) {
	select {
	case e.memConn = <-e.conns:
		expect(e.t, e, dataPreface)
	case <-time.After(time.Minute):
		e.t.Error("no new connection")
	}
}

func dataAccept(e *dataEnv) { e.run([]any{dataConnected, answer}) }

func dataGot(want string) dataStep {
	return func(e *dataEnv) {
		if got := <-e.got; !strings.Contains(got, want) {
			e.t.Errorf("got %.100q, want %.100q", got, want)
		}
	}
}

// dataReused wants the client to use the connection again, dataRedials to have closed it.
func dataReused(e *dataEnv) {
	e.run([]any{dataGet("next"), dataWant(dataDown("get", "next")), frame(tResult, 0, "n") + dataOf("ok"), dataGot("n|ok|ok")})
}

func dataRedials(e *dataEnv) {
	e.run([]any{func(e *dataEnv) {
		e.start = time.Now()
		expectEOF(e.t, e)
		if _, err := e.Write([]byte("x")); err == nil || time.Since(e.start) > time.Second {
			e.t.Error("the client has not closed the connection, or not at once")
		}
	}, dataGet("next"), dataAccept, dataWant(dataDown("get", "next")), frame(tResult, 0, "n") + dataOf("ok"), dataGot("n|ok|ok")})
}

func TestDataClient(t *testing.T) {
	long, goaway0, goaway1 := strings.Repeat("x", 1<<20), frame(tGoaway, uint64(0)), frame(tGoaway, uint64(1))
	noMore := func(e *dataEnv) {
		if synctest.Wait(); len(e.conns) > 0 {
			e.t.Error("one attempt too many")
		}
	}
	request := []any{dataGet("req"), dataAccept, dataWant(dataDown("get", "req"))}
	down := func(answer, got string, then dataStep) []any { return append(request, answer, dataGot(got), then) }
	up := func(answer, got string, then dataStep) []any {
		return []any{dataPut(strings.NewReader("abc")), dataAccept, dataWant(dataUp("put", "req") + dataOf("abc")), answer, dataGot(got), then}
	}
	tests := dataTest{
		"download":                 down(dataResult+dataOf("abc", "de"), "r|abcde|ok", dataReused),
		"empty download":           down(dataResult+dataOf(), "r||ok", dataReused),
		"largest data":             down(dataResult+dataOf(long, "x"), "r|"+long+"x|ok", dataReused),
		"heartbeats":               down(frame(tHeartbeat)+dataResult+frame(tHeartbeat)+dataABC+frame(tHeartbeat)+frame(tEnd, uint64(3))+frame(tHeartbeat), "r|abc|ok", dataReused),
		"refused download":         down(frame(tResult, 5, "gone"), "||not-found: gone", dataReused),
		"refused with odd code":    down(frame(tResult, 200, "x"), "||unknown: x", dataReused),
		"failing download":         down(dataResult+dataABC+frame(tFail, 15, "disk"), "r|abc|data-loss: disk", dataReused),
		"failing silently":         down(dataResult+frame(tFail, 2), "r||unknown: ", dataReused),
		"failing with odd text":    down(dataResult+frame(tFail, 2, "\xff"), "r||unknown: ", dataReused),
		"failing with an odd code": down(dataResult+frame(tFail, 17, "x"), "r||unknown: x", dataReused),
		"stale data":               down(dataResult+dataOf("abc")+dataABC, "r|abc|ok", dataRedials),
		"stale result":             down(dataResult+dataOf("abc")+frame(tHeartbeat)+dataResult, "r|abc|ok", dataRedials),
		"wrong total":              down(dataResult+dataABC+frame(tEnd, uint64(2)), "r|abc|data-loss: ", dataRedials),
		"data before the result":   down(dataABC+dataResult+dataOf("abc"), "||protocol", dataRedials),
		"end before the result":    down(dataOf(), "||protocol", dataRedials),
		"fail before the result":   down(frame(tFail, 5, "x"), "||protocol", dataRedials),
		"two results":              down(dataResult+dataResult, "r||protocol", dataRedials),
		"result over max":          down("\x22\x00\x00\x00\x04\x00\x00\x02", "||protocol", dataRedials),
		"request from a server":    down(dataResult+dataDown("get", ""), "r||protocol", dataRedials),
		"upload":                   up(dataResult, "r||ok", dataReused),
		"upload with heartbeats":   up(frame(tHeartbeat)+dataResult+frame(tHeartbeat), "r||ok", dataReused),
		"stale after an upload":    up(dataResult+dataResult, "r||ok", dataRedials),
		"refused upload":           up(frame(tResult, 5, "gone"), "||not-found: gone", dataRedials),
		"refused with an odd code": up(frame(tResult, 17, "x"), "||unknown: x", dataRedials),
		"end in an upload":         up(dataOf(), "||protocol", dataRedials),
		"data in an upload":        up(dataABC, "||protocol", dataRedials),
		"fail in an upload":        up(frame(tFail, 5, "x"), "||protocol", dataRedials),
		"idle goaway":              append(request, dataResult+dataOf("abc"), dataGot("r|abc|ok"), dataReused, time.Second, frame(tGoaway, uint64(2)), dataRedials),
		"idle data":                append(request, dataResult+dataOf("abc"), dataGot("r|abc|ok"), time.Second, dataABC, dataRedials),
		"idle FIN":                 append(request, dataResult+dataOf("abc"), dataGot("r|abc|ok"), time.Second, dataFIN, dataRedials),
		"goaway first":             down(goaway1+dataResult+dataOf("abc"), "r|abc|ok", dataRedials),
		"goaway after the result":  down(dataResult+goaway1+dataOf("abc"), "r|abc|ok", dataRedials),
		"goaway before the end":    down(dataResult+dataABC+goaway1+frame(tEnd, uint64(3)), "r|abc|ok", dataRedials),
		"goaway after the end":     down(dataResult+dataOf("abc")+goaway1, "r|abc|ok", dataRedials),
		"goaway in an upload":      up(goaway1+dataResult, "r||ok", dataRedials),
		"not started":              append(request, goaway0, dataEnds, dataAccept, request[2], dataResult+dataOf("abc"), dataGot("r|abc|ok"), dataReused),
		"not started twice":        append(request, goaway0, dataEnds, dataAccept, request[2], goaway0, dataGot("||lost"), dataEnds, noMore),
		"body of 65536":            {dataGet(long[:65536]), dataConnected, dataWant(dataDown("get", long[:65536])), answer, frame(tResult, 5, "x"), dataGot("||not-found")},
		"body of 65537": {dataGet(long[:65537]), dataConnected, time.Second, func(e *dataEnv) {
			e.in.set(func(p *memPipe) {
				if len(p.buf) > 0 {
					e.t.Error("a large body was sent before the answer")
				}
			})
		}, answer, dataWant(dataDown("get", long[:65537])), frame(tResult, 5, "x"), dataGot("||not-found")},
		"failing source": {dataPut(io.MultiReader(strings.NewReader("abc"), iotest.ErrReader(errors.New("disk")))), dataAccept,
			dataWant(dataUp("put", "req") + dataABC + frame(tFail, 2, "disk")), frame(tResult, 5, "x"), func(e *dataEnv) { <-e.got }, dataRedials},
	}
	for early, got := range map[string]string{frame(tResult, 8, "full"): "||resource-exhausted: full", dataResult: "||protocol", goaway0: "||lost"} {
		tests["early "+got] = []any{func(e *dataEnv) {
			r, w := io.Pipe()
			dataPut(dataStream{r, func() error { e.closed <- struct{}{}; return r.Close() }})(e)
			go w.Write([]byte("abc"))
		}, dataAccept, dataWant(dataUp("put", "req") + dataABC), early, dataGot(got), dataClosed, dataRedials} // and no end is sent
	}
	for name, bad := range dataBroken {
		tests["down/"+name], tests["up/"+name] = down(bad, "||protocol", dataRedials), up(bad, "||protocol", dataRedials)
		tests["stream/"+name] = down(dataResult+bad, "r||protocol", dataRedials)
	}
	for name, bad := range dataBrokenStream {
		tests["stream/"+name] = append(request, dataResult+bad, dataGot("r||protocol"), dataRedials)
	}
	for session, start := range map[string]any{dataResult + frame(tHeartbeat) + dataOf("abc", "de"): request[0],
		frame(tHeartbeat) + dataResult: dataPut(strings.NewReader("abc"))} {
		for n := range len(answer + session) {
			said := (answer + session)[:n]
			tests[fmt.Sprintf("FIN/%d of %d/%q", n, len(session), said)] = []any{start, dataConnected, said, dataFIN, dataGot("|lost"), noMore}
		}
	}
	for name, steps := range tests {
		dataRun(t, name, func(t *testing.T) { dataClient(t).run(steps) })
	}
}

// ---- Golden transcripts -------------------------------------------------------------------------------------------

var goldenUpdate = flag.Bool("update", false, "rewrite testdata/*.hex from what client and server exchange")

// goldenStep is what a side ('C' or 'S') writes.
type goldenStep struct {
	side  byte
	bytes string
}

// goldenRead parses a transcript: lines such as "C> 01 02  # comment".
func goldenRead(t testing.TB, name string) (steps []goldenStep) {
	b, err := os.ReadFile("testdata/" + name + ".hex")
	check(t, err)
	for line := range strings.Lines(string(b)) {
		line, _, _ = strings.Cut(line, "#")
		if side, digits, found := strings.Cut(line, "> "); found {
			bytes, err := hex.DecodeString(strings.Join(strings.Fields(digits), ""))
			check(t, err)
			steps = append(steps, goldenStep{side[0], string(bytes)})
		}
	}
	return steps
}

// goldenFrames are the names of the frames and their fields.
var goldenFrames = map[byte]string{
	tHeartbeat: "heartbeat", tCall: "call id timeout method body", tReply: "reply id code body", tCancel: "cancel id",
	tGoaway: "goaway last", tDownload: "download timeout endpoint body", tUpload: "upload timeout endpoint body",
	tResult: "result code body", tData: "data bytes", tEnd: "end total", tFail: "fail code text",
}

// goldenWrite writes a transcript, with each field on a line of its own.
func goldenWrite(t *testing.T, name string, steps []goldenStep) {
	out := "# What a client (C) and a server (S) write. TestGolden plays both sides; with -update it writes this file.\n"
	for _, step := range steps {
		rest := step.bytes
		line := func(n int, comment string) {
			out += fmt.Sprintf("%c> % x  # %s\n", step.side, rest[:n], comment)
			rest = rest[n:]
		}
		if out += "\n"; strings.HasPrefix(rest, "ZREPL-RPC ") {
			if line(strings.Index(rest, "\n")+1, rest[:strings.Index(rest, "\n")]); step.side == 'C' {
				line(64, "label "+strings.TrimRight(rest[:64], "\x00"))
			}
		}
		for rest != "" {
			fields, size := strings.Fields(goldenFrames[rest[0]]), int(binary.BigEndian.Uint32([]byte(rest[4:])))
			line(8, fmt.Sprintf("%s, %d bytes", fields[0], size))
			for _, field := range fields[1:] {
				n := size
				switch field {
				case "id", "timeout", "last", "total":
					line(8, fmt.Sprint(field, " ", binary.BigEndian.Uint64([]byte(rest))))
					size -= 8
					continue
				case "code":
					n = 1
				case "method", "endpoint":
					n = 1 + int(rest[0])
				}
				line(n, fmt.Sprintf("%s %q", field, rest[:n]))
				size -= n
			}
		}
	}
	check(t, os.WriteFile("testdata/"+name+".hex", []byte(out), 0o666))
}

// goldenConn is a client's connection that tells what is written and read.
type goldenConn struct {
	*memConn
	note func(side byte, b []byte)
}

func (c goldenConn) Write(b []byte) (int, error) { c.note('C', b); return c.memConn.Write(b) }
func (c goldenConn) Read(b []byte) (n int, err error) {
	defer func() { c.note('S', b[:n]) }()
	return c.memConn.Read(b)
}

// goldenSessions are what the client of each transcript does, and what comes of it: method, request, outcome.
var goldenSessions = map[string][][3]string{
	"control":  {{"echo", "hello", "hello||ok"}, {"fail", "gone", "||not-found: gone"}, {"wait", "", "||canceled"}, {"bye", "later", "later||ok"}},
	"download": {{"get", "abc", "r:abc|abc|ok"}, {"bad", "disk", "r|abc|data-loss: disk"}, {"err", "gone", "||not-found: gone"}, {"ping", "", "||ok"}},
	"upload":   {{"put", "abc", "n:abc||ok"}, {"put", "disk", "||unknown"}},
	"refused":  {{"get", "abc", `||permission-denied`}},
}

// goldenClient runs a session over one connection.
func goldenClient(t *testing.T, name string, conn net.Conn) {
	connect := sync.OnceValue(func() net.Conn { return conn })
	c := rpc.NewClient(rpc.ConnecterFunc(func(context.Context) (net.Conn, error) { return connect(), nil }), rpc.ClientConfig{})
	for i, step := range goldenSessions[name] {
		ctx, cancel := context.WithCancel(context.Background())
		if i == 0 { // on a new connection, where nothing takes time
			ctx, cancel = context.WithTimeout(ctx, time.Minute)
		}
		res, body, err := text(""), []byte(nil), error(nil)
		switch endpoint, req := step[0], textOf(step[1]); name {
		case "control":
			time.AfterFunc(time.Second, cancel)
			err = c.Call(ctx, endpoint, req, &res)
			time.Sleep(time.Second) // for the reply to what was cancelled
		case "upload":
			fault := map[string]error{"abc": io.EOF, "disk": errors.New("disk")}[step[1]]
			err = c.Upload(ctx, endpoint, req, io.MultiReader(strings.NewReader(step[1]), iotest.ErrReader(fault)), &res)
		default:
			var stream io.ReadCloser
			if stream, err = c.Download(ctx, endpoint, req, &res); err == nil {
				body, err = io.ReadAll(stream)
				stream.Close()
			}
		}
		if got := string(res) + "|" + string(body) + "|" + dataKind(err); got != step[2] {
			t.Errorf("%v got %q, %v", step, got, err)
		}
		cancel()
	}
	check(t, c.Close())
}

func goldenServer(t *testing.T, name string) *memConn {
	e := dataServer(t)
	rpc.HandleCall(e.s, "echo", func(_ context.Context, req *text) (*text, error) { return req, nil })
	rpc.HandleCall(e.s, "fail", func(context.Context, *text) (*text, error) { return nil, rpc.Errorf(rpc.NotFound, "gone") })
	rpc.HandleCall(e.s, "wait", func(ctx context.Context, _ *text) (*text, error) { <-ctx.Done(); return nil, ctx.Err() })
	rpc.HandleCall(e.s, "bye", func(_ context.Context, req *text) (*text, error) { // says goaway, then replies
		go e.s.Shutdown(context.Background())
		time.Sleep(time.Second / 2)
		return req, nil
	})
	if name == "refused" {
		e.l = newMemListener()
		serve(t, e.s, &rpc.Listener{Listener: e.l, Authenticate: func(context.Context, net.Conn) (net.Conn, string, error) {
			return nil, "", rpc.Errorf(rpc.PermissionDenied, `client "db7" is not allowed`)
		}})
	}
	e.dial()
	return e.memConn
}

func TestGolden(t *testing.T) {
	for name := range goldenSessions {
		if *goldenUpdate {
			dataRun(t, name+" update", func(t *testing.T) {
				var mu, steps = new(sync.Mutex), []goldenStep(nil)
				goldenClient(t, name, goldenConn{goldenServer(t, name), func(side byte, b []byte) {
					mu.Lock()
					defer mu.Unlock()
					if n := len(steps); n == 0 || steps[n-1].side != side {
						steps = append(steps, goldenStep{side: side})
					}
					steps[len(steps)-1].bytes += string(b)
				}})
				goldenWrite(t, name, steps)
			})
		}
		play := func(t *testing.T, self byte, conn *memConn) {
			for _, step := range goldenRead(t, name) {
				if step.side == self {
					time.Sleep(time.Millisecond)
					say(t, conn, step.bytes)
				} else {
					expect(t, conn, step.bytes)
				}
			}
			conn.CloseWrite()
			expectEOF(t, conn)
		}
		dataRun(t, name+" server", func(t *testing.T) { play(t, 'C', goldenServer(t, name)) })
		dataRun(t, name+" client", func(t *testing.T) {
			client, server := newMemConns()
			var wg sync.WaitGroup
			defer wg.Wait()
			wg.Go(func() { goldenClient(t, name, client) })
			play(t, 'S', server)
		})
	}
}

// ---- Liveness and cancel ------------------------------------------------------------------------------------------

const liveHB = 5 * time.Second // the default heartbeat interval

// liveConn notes when something is written, and can become a black hole: writes vanish, reads wait, and nobody learns
// of a Close at the other end.
type liveConn struct {
	net.Conn
	readBy, writeBy *memDeadline
	gone            chan struct{} // closed by Close
	mu              sync.Mutex
	holed, broken   bool
	first           []byte // the first bytes that were written
	sent            []time.Time
}

type liveHalf struct{ *liveConn } // one that has CloseWrite

func (c liveHalf) CloseWrite() error {
	if c.inHole() {
		return nil
	}
	return c.Conn.(interface{ CloseWrite() error }).CloseWrite()
}

func newLiveConn(c net.Conn) (*liveConn, net.Conn) {
	l := &liveConn{Conn: c, readBy: newMemDeadline(), writeBy: newMemDeadline(), gone: make(chan struct{})}
	if _, ok := c.(interface{ CloseWrite() error }); ok {
		return l, liveHalf{l}
	}
	return l, l
}

func (c *liveConn) inHole() bool   { c.mu.Lock(); defer c.mu.Unlock(); return c.holed }
func (c *liveConn) isBroken() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.broken }

var errLiveBroken = errors.New("broken pipe")

func (c *liveConn) hole() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.holed = true
	c.Conn.SetDeadline(time.Unix(1, 0))
}

func (c *liveConn) stuck(d *memDeadline) error {
	for !liveDone(c.gone) {
		if d.passed() {
			return os.ErrDeadlineExceeded
		}
		d.wait(c.gone)
	}
	return net.ErrClosed
}

func (c *liveConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n == 0 && c.inHole() {
		err = c.stuck(c.readBy)
	}
	return n, err
}

func (c *liveConn) Write(b []byte) (int, error) {
	if c.inHole() && !liveDone(c.gone) {
		return len(b), nil
	}
	if c.isBroken() {
		return 0, errLiveBroken
	}
	c.mu.Lock()
	c.first = append(c.first, b[:min(len(b), 200-len(c.first))]...)
	c.mu.Unlock()
	n, err := c.Conn.Write(b)
	if err != nil && c.inHole() {
		return n, c.stuck(c.writeBy)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if n > 0 {
		c.sent = append(c.sent, time.Now())
	}
	return n, err
}

func (c *liveConn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !liveDone(c.gone) {
		close(c.gone)
	}
	if c.holed {
		return nil
	}
	return c.Conn.Close()
}

func (c *liveConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}
func (c *liveConn) SetReadDeadline(t time.Time) error {
	return c.setDeadline(c.readBy, t, c.Conn.SetReadDeadline)
}
func (c *liveConn) SetWriteDeadline(t time.Time) error {
	return c.setDeadline(c.writeBy, t, c.Conn.SetWriteDeadline)
}
func (c *liveConn) setDeadline(d *memDeadline, t time.Time, inner func(time.Time) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	d.set(t)
	if c.holed {
		return nil
	}
	return inner(t)
}

// silence is the longest time without a write since from.
func (c *liveConn) silence(from time.Time) (longest time.Duration, writes int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, at := range c.sent {
		if at.After(from) {
			longest, from, writes = max(longest, at.Sub(from)), at, writes+1
		}
	}
	return max(longest, time.Since(from)), writes
}

func liveDone(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

// liveSource gives head, waits until it is let go (for ever, if not), gives tail and ends. Close ends the waiting.
type liveSource struct {
	head, tail io.Reader
	goOn, shut chan struct{}
	once, ends sync.Once
}

// newLiveSource makes a source of so many bytes; if tail is negative, it does not wait.
func newLiveSource(head, tail int) *liveSource {
	s := &liveSource{head: bytes.NewReader(make([]byte, head)), tail: bytes.NewReader(make([]byte, max(tail, 0))),
		goOn: make(chan struct{}), shut: make(chan struct{})}
	if tail < 0 {
		s.end()
	}
	return s
}

func (s *liveSource) Read(b []byte) (int, error) {
	if n, err := s.head.Read(b); err == nil {
		return n, nil
	}
	select {
	case <-s.goOn:
		return s.tail.Read(b)
	case <-s.shut:
		return 0, errors.New("the source was closed")
	}
}

func (s *liveSource) end()         { s.ends.Do(func() { close(s.goOn) }) }
func (s *liveSource) Close() error { s.once.Do(func() { close(s.shut) }); return nil }

// liveBed is a server and its client in a bubble.
type liveBed struct {
	*memListener
	s      *rpc.Server
	c      *rpc.Client
	mu     sync.Mutex
	cs, ss []*liveConn // the ends of the connections, in the order of dialing
	ran    atomic.Int64
	ctxs   chan context.Context    // of the handlers that started
	pass   chan struct{}           // closed to let the call "wait" and the download "late" go on
	source *liveSource             // of the download "get"
	sunk   chan error              // what sink returned
	sink   func(r io.Reader) error // of the uploads
}

type liveConfig struct {
	client rpc.ClientConfig
	server rpc.ServerConfig
	pipe   func() (client, server net.Conn)
}

func liveMem() (net.Conn, net.Conn) { c, s := newMemConns(); return c, s }

var livePipes = map[string]func() (client, server net.Conn){"mem": liveMem, "pipe": net.Pipe}

// liveTest runs test in a bubble.
func liveTest(t *testing.T, config liveConfig, test func(t *testing.T, b *liveBed)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		b := &liveBed{memListener: newMemListener(), ctxs: make(chan context.Context, 1000), pass: make(chan struct{}),
			sunk: make(chan error, 1000)}
		if config.pipe == nil {
			config.pipe = liveMem
		}
		b.memListener.pipe = func() (net.Conn, net.Conn) {
			c, s := config.pipe()
			lc, c := newLiveConn(c)
			ls, s := newLiveConn(s)
			b.mu.Lock()
			defer b.mu.Unlock()
			b.cs, b.ss = append(b.cs, lc), append(b.ss, ls)
			return c, s
		}
		b.source = newLiveSource(4, 4)
		b.sink = func(r io.Reader) error { _, err := io.Copy(io.Discard, r); return err }
		b.s = b.server(config.server)
		serve(t, b.s, b.listener())
		b.c = rpc.NewClient(b, config.client)
		t.Cleanup(func() { check(t, b.c.Close()) })
		t.Cleanup(func() { // after a failure nobody may be left waiting
			if !liveDone(b.pass) {
				close(b.pass)
			}
		})
		test(t, b)
	})
}

func (b *liveBed) server(config rpc.ServerConfig) *rpc.Server {
	s := rpc.NewServer(nil, config)
	wait := func(ctx context.Context) error {
		select {
		case <-b.pass:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	begin := func(ctx context.Context) {
		b.ran.Add(1)
		select {
		case b.ctxs <- ctx:
		default:
		}
	}
	rpc.HandleCall(s, "echo", func(ctx context.Context, req *text) (*text, error) { begin(ctx); return req, nil })
	rpc.HandleCall(s, "wait", func(ctx context.Context, req *text) (*text, error) { begin(ctx); return req, wait(ctx) })
	rpc.HandleDownload(s, "get", func(ctx context.Context, req *text) (*text, io.ReadCloser, error) {
		begin(ctx)
		return req, b.source, nil
	})
	rpc.HandleDownload(s, "file", func(ctx context.Context, req *text) (*text, io.ReadCloser, error) {
		begin(ctx)
		return req, io.NopCloser(bytes.NewReader(make([]byte, 100_000))), nil
	})
	rpc.HandleDownload(s, "late", func(ctx context.Context, req *text) (*text, io.ReadCloser, error) {
		begin(ctx)
		return req, nil, wait(ctx)
	})
	for endpoint, stall := range map[string]struct{ before, after bool }{"put": {}, "put late": {before: true}, "put slow": {after: true}} {
		rpc.HandleUpload(s, endpoint, func(ctx context.Context, req *text, r io.Reader) (*text, error) {
			begin(ctx)
			if stall.before {
				wait(ctx)
			}
			err := b.sink(r)
			b.sunk <- err
			if err == nil && stall.after {
				err = wait(ctx)
			}
			return req, err
		})
	}
	return s
}

// last returns both ends of the last connection to a label, and how many there were.
func (b *liveBed) last(label string) (client, server *liveConn, dials int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i, c := range b.cs {
		c.mu.Lock()
		if strings.Contains(string(c.first), label) {
			client, server, dials = c, b.ss[i], dials+1
		}
		c.mu.Unlock()
	}
	return client, server, dials
}

func (b *liveBed) hole() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := range b.cs {
		b.cs[i].hole()
		b.ss[i].hole()
	}
}

func (b *liveBed) call(ctx context.Context, method string) error {
	return b.c.Call(ctx, method, textOf("q"), textOf(""))
}

// get runs a download to its end.
func (b *liveBed) get(ctx context.Context, endpoint string) error {
	r, err := b.c.Download(ctx, endpoint, textOf("q"), textOf(""))
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = io.Copy(io.Discard, struct{ io.Reader }{r})
	return err
}

func (b *liveBed) put(ctx context.Context, endpoint string, r io.Reader) error {
	return b.c.Upload(ctx, endpoint, textOf("q"), r, textOf(""))
}

func liveGo(f func() error) <-chan error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	return done
}

// liveWithin waits at most d (in the bubble's time).
func liveWithin[T any](t *testing.T, what string, ch <-chan T, d time.Duration) (v T) {
	t.Helper()
	start := time.Now()
	select {
	case v = <-ch:
	case <-time.After(d):
		t.Fatalf("%s: nothing happened for %v", what, time.Since(start))
	}
	return v
}

// liveRequests are all that a client can ask for, whether or not it is served. Of a liveBed they use the client only.
var liveRequests = []struct {
	name string
	run  func(ctx context.Context, b *liveBed) error
}{
	{"call", func(ctx context.Context, b *liveBed) error { return b.call(ctx, "echo") }},
	{"download", func(ctx context.Context, b *liveBed) error { return b.get(ctx, "file") }},
	{"upload", func(ctx context.Context, b *liveBed) error { return b.put(ctx, "put", newLiveSource(1<<20, -1)) }},
	{"Dial", func(ctx context.Context, b *liveBed) error { _, err := b.c.Dial(ctx, "mine"); return err }},
	{"big call", func(ctx context.Context, b *liveBed) error {
		return b.c.Call(ctx, "echo", textOf(strings.Repeat("x", 1<<20)), textOf(""))
	}},
	{"WaitForConnectivity", func(ctx context.Context, b *liveBed) error { return b.c.WaitForConnectivity(ctx) }},
}

// liveOps are operations that never end by themselves (but for the first), in all states in which silence matters.
var liveOps = []struct {
	name, label    string
	client, server bool // not: blocked in a write for ever, because the other side does not read
	source         int  // bytes before the source goes quiet
	run            func(ctx context.Context, b *liveBed) error
}{
	{"idle", "zrepl_control", true, true, 0, func(ctx context.Context, b *liveBed) error { return b.call(ctx, "echo") }},
	{"call", "zrepl_control", true, true, 0, func(ctx context.Context, b *liveBed) error { return b.call(ctx, "wait") }},
	{"download not begun", "zrepl_data", true, true, 0, func(ctx context.Context, b *liveBed) error { return b.get(ctx, "late") }},
	{"download, quiet", "zrepl_data", true, true, 4, func(ctx context.Context, b *liveBed) error { return b.get(ctx, "get") }},
	{"download, full", "zrepl_data", true, false, 1 << 20, func(ctx context.Context, b *liveBed) error {
		r, err := b.c.Download(ctx, "get", textOf("q"), textOf(""))
		if err == nil {
			<-b.pass
			_, err = io.Copy(io.Discard, r)
			r.Close()
		}
		return err
	}},
	{"upload, quiet", "zrepl_data", true, true, 4, func(ctx context.Context, b *liveBed) error { return b.put(ctx, "put", b.source) }},
	{"upload, full", "zrepl_data", false, true, 1 << 20, func(ctx context.Context, b *liveBed) error { return b.put(ctx, "put late", b.source) }},
	{"upload, result awaited", "zrepl_data", true, true, 4, func(ctx context.Context, b *liveBed) error {
		b.source.end()
		return b.put(ctx, "put slow", b.source)
	}},
}

func TestHeartbeatsKeepTheIntervalOfTheirSender(t *testing.T) {
	for _, op := range liveOps {
		t.Run(op.name, func(t *testing.T) {
			liveTest(t, liveConfig{
				client: rpc.ClientConfig{HeartbeatInterval: 2 * time.Second},
				server: rpc.ServerConfig{HeartbeatInterval: 3 * time.Second},
			}, func(t *testing.T, b *liveBed) {
				b.source = newLiveSource(op.source, 0)
				done := liveGo(func() error { return op.run(t.Context(), b) })
				synctest.Wait()
				start := time.Now()
				time.Sleep(50 * time.Second)
				client, server, _ := b.last(op.label)
				if longest, _ := client.silence(start); op.client && longest > 2*time.Second {
					t.Errorf("the client was silent for %v", longest)
				}
				if longest, _ := server.silence(start); op.server && longest > 3*time.Second {
					t.Errorf("the server was silent for %v", longest)
				}
				close(b.pass)
				b.source.end()
				check(t, <-done)
			})
		})
	}
}

func TestIdleDataConnectionIsSilent(t *testing.T) {
	liveTest(t, liveConfig{client: rpc.ClientConfig{IdleTimeout: time.Hour}}, func(t *testing.T, b *liveBed) {
		close(b.source.goOn)
		check(t, b.get(t.Context(), "get"))
		start := time.Now()
		time.Sleep(9 * time.Minute)
		client, server, _ := b.last("zrepl_data")
		_, fromClient := client.silence(start)
		if _, fromServer := server.silence(start); fromClient+fromServer > 0 || liveDone(client.gone) {
			t.Errorf("%d writes of the client, %d of the server, closed: %v", fromClient, fromServer, liveDone(client.gone))
		}
		time.Sleep(2 * time.Minute)
		if !liveDone(client.gone) || !liveDone(server.gone) {
			t.Error("still open after eleven idle minutes")
		}
	})
}

func livePeerTimeout(t *testing.T, who string, err error) {
	t.Helper()
	var netErr net.Error
	if !errors.Is(err, rpc.ErrPeerTimeout) || !errors.As(err, &netErr) || !netErr.Timeout() || rpc.CodeOf(err) != rpc.Unavailable {
		t.Errorf("%s: %v (code %v), want ErrPeerTimeout", who, err, rpc.CodeOf(err))
	}
}

func TestBlackHoleIsPeerTimeoutOnBothSides(t *testing.T) {
	for _, op := range liveOps {
		for pipe, newPipe := range livePipes {
			t.Run(op.name+"/"+pipe, func(t *testing.T) {
				liveTest(t, liveConfig{pipe: newPipe}, func(t *testing.T, b *liveBed) {
					b.source = newLiveSource(op.source, 0)
					done := liveGo(func() error { return op.run(t.Context(), b) })
					ctx := <-b.ctxs
					time.Sleep(17 * time.Second)
					client, server, _ := b.last(op.label)
					b.hole()
					holed := time.Now()
					left := func() time.Duration { return 4*liveHB - time.Since(holed) }
					if op.name == "idle" {
						check(t, <-done)
					} else if op.server {
						livePeerTimeout(t, "client", liveWithin(t, "client", done, left()))
						if after := time.Since(holed); after < 2*liveHB {
							t.Errorf("gave up after %v of silence", after)
						}
					}
					if op.client {
						liveWithin(t, "the handler's context", ctx.Done(), left())
					}
					if op.source > 0 {
						liveWithin(t, "closing the source", b.source.shut, left())
					}
					time.Sleep(left())
					if op.client && op.server && (!liveDone(client.gone) || !liveDone(server.gone)) {
						t.Errorf("closed: client %v, server %v", liveDone(client.gone), liveDone(server.gone))
					}
					close(b.pass) // now who stalled reads again
					if !op.server {
						livePeerTimeout(t, "client", liveWithin(t, "client", done, 4*liveHB))
					}
					if strings.HasPrefix(op.name, "upload") && op.name != "upload, result awaited" {
						livePeerTimeout(t, "server", liveWithin(t, "server", b.sunk, 4*liveHB))
					}
				})
			})
		}
	}
}

// liveSlow reads everything from r, but stops for a while after the first and at some later byte.
func liveSlow(r io.Reader, stall time.Duration) error {
	var total int64
	for _, n := range []int64{1, 200_000, 1 << 62} {
		m, err := io.CopyN(io.Discard, r, n)
		if total += m; err == io.EOF && total == 600_000 {
			return nil
		} else if err != nil {
			return errors.Join(errors.New("cut short"), err)
		}
		time.Sleep(stall)
	}
	return errors.New("no end")
}

func TestStallsOfAnyLengthAreNoDeath(t *testing.T) {
	const long = 20 * 3 * liveHB
	for _, stall := range []struct {
		name         string
		source, sink time.Duration
	}{{"source", long, 0}, {"sink", 0, long}, {"both", long, long}, {"sink longer", long, long * 2}} {
		for pipe, newPipe := range livePipes {
			source := func() *liveSource {
				s := newLiveSource(300_000, 300_000)
				go func() { time.Sleep(stall.source); close(s.goOn) }()
				return s
			}
			t.Run("download/"+stall.name+"/"+pipe, func(t *testing.T) {
				liveTest(t, liveConfig{pipe: newPipe}, func(t *testing.T, b *liveBed) {
					b.source = source()
					r, err := b.c.Download(t.Context(), "get", textOf("q"), textOf(""))
					check(t, err)
					defer r.Close()
					check(t, liveSlow(r, stall.sink))
				})
			})
			t.Run("upload/"+stall.name+"/"+pipe, func(t *testing.T) {
				liveTest(t, liveConfig{pipe: newPipe}, func(t *testing.T, b *liveBed) {
					b.sink = func(r io.Reader) error { return liveSlow(r, stall.sink) }
					check(t, b.put(t.Context(), "put", source()))
				})
			})
		}
	}
}

// liveRaw runs test with a client whose server is the test's; the connections arrive in the channel.
func liveRaw(t *testing.T, config rpc.ClientConfig, test func(t *testing.T, c *rpc.Client, conns <-chan net.Conn)) {
	synctest.Test(t, func(t *testing.T) {
		conns := make(chan net.Conn, 100)
		c := rpc.NewClient(rpc.ConnecterFunc(func(context.Context) (net.Conn, error) {
			c, s := newMemConns()
			conns <- s
			return c, nil
		}), config)
		t.Cleanup(func() { check(t, c.Close()) })
		test(t, c, conns)
	})
}

// liveFrame reads the next frame that is no heartbeat.
func liveFrame(t *testing.T, r io.Reader) (kind byte, payload string) {
	t.Helper()
	for {
		kind, payload, err := readFrame(r)
		check(t, err)
		if kind != tHeartbeat {
			return kind, payload
		}
	}
}

func liveDrip(t *testing.T, w io.Writer, s string) {
	for i := range len(s) {
		time.Sleep(liveHB)
		say(t, w, s[i:i+1])
	}
}

func TestSilenceCountsBytes(t *testing.T) {
	t.Run("reply", func(t *testing.T) {
		liveRaw(t, rpc.ClientConfig{}, func(t *testing.T, c *rpc.Client, conns <-chan net.Conn) {
			done := liveGo(func() error { return c.Call(t.Context(), "m", textOf("q"), textOf("")) })
			conn := <-conns
			expect(t, conn, banner+label("zrepl_control"))
			say(t, conn, answer)
			liveFrame(t, conn)
			go io.Copy(io.Discard, conn)
			liveDrip(t, conn, frame(tReply, uint64(1), 0, strings.Repeat("x", 30)))
			check(t, <-done)
		})
	})
	t.Run("upload", func(t *testing.T) {
		liveTest(t, liveConfig{}, func(t *testing.T, b *liveBed) {
			conn, err := b.Connect(t.Context())
			check(t, err)
			defer conn.Close()
			say(t, conn, banner+label("zrepl_data"))
			liveDrip(t, conn, frame(tUpload, uint64(0), str8("put"), "q")+frame(tData, "data")+frame(tEnd, uint64(4)))
			expect(t, conn, answer)
			if kind, got := liveFrame(t, conn); kind != tResult || got != "\x00q" {
				t.Errorf("result %#x %q", kind, got)
			}
		})
	})
	t.Run("half a request", func(t *testing.T) {
		liveTest(t, liveConfig{}, func(t *testing.T, b *liveBed) {
			conn, err := b.Connect(t.Context())
			check(t, err)
			defer conn.Close()
			say(t, conn, banner+label("zrepl_data")+"\x20")
			closed := liveGo(func() error { _, err := io.Copy(io.Discard, conn); return err })
			check(t, liveWithin(t, "closing the silent connection", closed, 4*liveHB))
		})
	})
}

// liveLink is a connection whose bytes take 100 ms.
func liveLink() (net.Conn, net.Conn) {
	client, a := newMemConns()
	b, server := newMemConns()
	carry := func(to, from *memConn) {
		type packet struct {
			at    time.Time
			bytes []byte
		}
		packets := make(chan packet, 10_000)
		go func() {
			defer close(packets)
			for {
				buf := make([]byte, 32<<10)
				n, err := from.Read(buf)
				if err != nil {
					return
				}
				packets <- packet{time.Now().Add(100 * time.Millisecond), buf[:n]}
			}
		}()
		defer to.CloseWrite()
		for p := range packets {
			time.Sleep(time.Until(p.at))
			to.Write(p.bytes)
		}
	}
	go carry(a, b)
	go carry(b, a)
	return client, server
}

func TestEachSideKeepsItsOwnInterval(t *testing.T) {
	const short, long = 10 * time.Millisecond, 5 * time.Second
	for name, config := range map[string]liveConfig{
		"client short":      {client: rpc.ClientConfig{HeartbeatInterval: short}, server: rpc.ServerConfig{HeartbeatInterval: long}},
		"server short":      {client: rpc.ClientConfig{HeartbeatInterval: long}, server: rpc.ServerConfig{HeartbeatInterval: short}},
		"both short, 200ms": {client: rpc.ClientConfig{HeartbeatInterval: short}, server: rpc.ServerConfig{HeartbeatInterval: short}, pipe: liveLink},
		"client short, 200ms": {client: rpc.ClientConfig{HeartbeatInterval: short},
			server: rpc.ServerConfig{HeartbeatInterval: long}, pipe: liveLink},
	} {
		t.Run(name, func(t *testing.T) {
			liveTest(t, config, func(t *testing.T, b *liveBed) {
				up := newLiveSource(300_000, 300_000)
				ops := []<-chan error{
					liveGo(func() error { return b.call(t.Context(), "wait") }),
					liveGo(func() error { return b.get(t.Context(), "get") }),
					liveGo(func() error { return b.put(t.Context(), "put", up) }),
				}
				time.Sleep(11 * time.Second)
				close(b.pass)
				close(b.source.goOn)
				close(up.goOn)
				for _, done := range ops {
					check(t, liveWithin(t, "ending", done, 2*time.Second))
				}
				b.c.Close()
				b.s.Close()
				time.Sleep(time.Second) // what is under way arrives
			})
		})
	}
}

// liveEnds are the ways in which operations are ended, and what the caller sees.
var liveEnds = []struct {
	name string
	end  func(b *liveBed, label string, cancel func())
	ok   func(err error) bool
}{
	{"cancel", func(_ *liveBed, _ string, cancel func()) { cancel() },
		func(err error) bool { return errors.Is(err, context.Canceled) && rpc.CodeOf(err) == rpc.Canceled }},
	{"deadline", func(*liveBed, string, func()) { time.Sleep(time.Minute) }, func(err error) bool {
		return errors.Is(err, context.DeadlineExceeded) && rpc.CodeOf(err) == rpc.DeadlineExceeded
	}},
	{"client's Close", func(b *liveBed, _ string, _ func()) { b.c.Close() },
		func(err error) bool { return errors.Is(err, rpc.ErrClosed) }},
	{"server's Close", func(b *liveBed, _ string, _ func()) { b.s.Close() }, func(err error) bool { return err != nil }},
	{"lost connection", func(b *liveBed, label string, _ func()) {
		client, server, _ := b.last(label)
		client.Conn.(*memConn).Close() // both ends fail, like after a reset
		server.Conn.(*memConn).Close()
	}, func(err error) bool { return rpc.CodeOf(err) == rpc.Unavailable && !errors.Is(err, io.EOF) }},
}

func TestEveryEndUnblocksBothSides(t *testing.T) {
	for _, op := range liveOps[1:] {
		for _, end := range liveEnds {
			t.Run(op.name+"/"+end.name, func(t *testing.T) {
				liveTest(t, liveConfig{}, func(t *testing.T, b *liveBed) {
					start := time.Now()
					ctx, cancel := context.WithDeadline(t.Context(), start.Add(time.Minute))
					defer cancel()
					b.source = newLiveSource(op.source, 0)
					done := liveGo(func() error { return op.run(ctx, b) })
					handler := <-b.ctxs
					synctest.Wait()
					if at, ok := handler.Deadline(); !ok || at.Sub(start) != time.Minute {
						t.Errorf("the handler's deadline is after %v", at.Sub(start))
					}
					end.end(b, op.label, cancel)
					ended := func() {
						if err := liveWithin(t, "the operation", done, 1500*time.Millisecond); !end.ok(err) {
							t.Errorf("the operation ended with %v", err)
						}
					}
					if op.server {
						ended()
					}
					liveWithin(t, "the handler's context", handler.Done(), 2*liveHB)
					if op.source > 0 {
						liveWithin(t, "closing the source", b.source.shut, 2*liveHB)
					}
					close(b.pass) // now who stalled reads again
					if !op.server {
						ended()
					}
					if end.name == "client's Close" {
						for _, f := range liveOps[:6] {
							if err := f.run(t.Context(), b); !errors.Is(err, rpc.ErrClosed) {
								t.Errorf("%s after Close: %v", f.name, err)
							}
						}
					}
				})
			})
		}
	}
}

// liveDumb is a Connecter that does not come back, or connects to nobody.
func liveDumb(connects bool) rpc.Connecter {
	return rpc.ConnecterFunc(func(ctx context.Context) (net.Conn, error) {
		if connects {
			c, _ := newMemConns()
			return c, nil
		}
		<-ctx.Done()
		return nil, ctx.Err()
	})
}

// TestEveryEndUnblocksWhoWaitsForTheServer is about a server that takes connections and never says a word.
func TestEveryEndUnblocksWhoWaitsForTheServer(t *testing.T) {
	for _, request := range liveRequests {
		for _, end := range liveEnds[:3] {
			for _, connects := range []bool{true, false} {
				t.Run(request.name+"/"+end.name, func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						b := &liveBed{c: rpc.NewClient(liveDumb(connects), rpc.ClientConfig{HandshakeTimeout: time.Hour})}
						ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
						defer cancel()
						done := liveGo(func() error { return request.run(ctx, b) })
						synctest.Wait()
						end.end(b, "", cancel)
						if err := liveWithin(t, "the operation", done, time.Second); !end.ok(err) {
							t.Errorf("ended with %v", err)
						}
						b.c.Close()
						if err := request.run(t.Context(), b); !errors.Is(err, rpc.ErrClosed) {
							t.Errorf("after Close: %v", err)
						}
					})
				})
			}
		}
	}
}

func TestCallTimeoutBoundsCallsOnly(t *testing.T) {
	for timeout, want := range map[time.Duration]time.Duration{0: 5 * time.Minute, 7 * time.Second: 7 * time.Second, -1: 0} {
		liveTest(t, liveConfig{client: rpc.ClientConfig{CallTimeout: timeout}}, func(t *testing.T, b *liveBed) {
			start := time.Now()
			up := newLiveSource(4, 0)
			streams := []<-chan error{
				liveGo(func() error { return b.get(context.Background(), "get") }),
				liveGo(func() error { return b.put(context.Background(), "put", up) }),
			}
			for range streams {
				if at, ok := (<-b.ctxs).Deadline(); ok {
					t.Errorf("CallTimeout %v: a stream has the deadline %v", timeout, at.Sub(start))
				}
			}
			call := liveGo(func() error { return b.call(context.Background(), "wait") })
			if at, ok := (<-b.ctxs).Deadline(); ok != (want > 0) || ok && at.Sub(start) != want {
				t.Errorf("CallTimeout %v: the handler's deadline is after %v (%v)", timeout, at.Sub(start), ok)
			}
			if want > 0 {
				if err := <-call; !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != want {
					t.Errorf("CallTimeout %v: %v after %v", timeout, err, time.Since(start))
				}
			}
			time.Sleep(time.Hour)
			close(b.pass)
			close(b.source.goOn)
			close(up.goOn)
			check(t, <-streams[0])
			check(t, <-streams[1])
			if want == 0 {
				check(t, <-call)
			}
		})
	}
}

func TestDeadlineOfARequestEndsItAtTheServer(t *testing.T) {
	liveTest(t, liveConfig{}, func(t *testing.T, b *liveBed) {
		conn, err := b.Connect(t.Context())
		check(t, err)
		defer conn.Close()
		say(t, conn, banner+label("zrepl_data")+frame(tDownload, uint64(time.Second), str8("get"), "q"))
		expect(t, conn, answer+frame(tResult, 0, "q")+frame(tData, "\x00\x00\x00\x00"))
		kind, payload := liveFrame(t, conn)
		if kind != tFail || payload[0] != byte(rpc.DeadlineExceeded) {
			t.Errorf("frame %#x %q, want fail deadline-exceeded", kind, payload)
		}
		if ctx := <-b.ctxs; !errors.Is(ctx.Err(), context.DeadlineExceeded) || !liveDone(b.source.shut) {
			t.Errorf("context: %v, source closed: %v", ctx.Err(), liveDone(b.source.shut))
		}
	})
	liveTest(t, liveConfig{}, func(t *testing.T, b *liveBed) {
		conn, err := b.Connect(t.Context())
		check(t, err)
		defer conn.Close()
		say(t, conn, banner+label("zrepl_control")+frame(tCall, uint64(1), uint64(time.Second), str8("wait"), "q")+
			frame(tCall, uint64(2), uint64(0), str8("wait"), "q")+frame(tCancel, uint64(2)))
		expect(t, conn, answer)
		for range 2 {
			kind, payload := liveFrame(t, conn)
			want := map[byte]rpc.Code{1: rpc.DeadlineExceeded, 2: rpc.Canceled}[payload[7]]
			if ctx := <-b.ctxs; kind != tReply || payload[8] != byte(want) {
				t.Errorf("frame %#x %q, want a reply %v (%v)", kind, payload, want, ctx.Err())
			}
		}
	})
}

// TestCancelLeavesOtherCallsAlone cancels calls while the server reads nothing and the connection is full.
func TestCancelLeavesOtherCallsAlone(t *testing.T) {
	liveRaw(t, rpc.ClientConfig{}, func(t *testing.T, c *rpc.Client, conns <-chan net.Conn) {
		call := func(ctx context.Context, method string, size int) <-chan error {
			done := liveGo(func() error { return c.Call(ctx, method, textOf(strings.Repeat("x", size)), textOf("")) })
			synctest.Wait()
			return done
		}
		before := call(t.Context(), "before", 1)
		conn := <-conns
		expect(t, conn, banner+label("zrepl_control"))
		say(t, conn, answer)
		liveFrame(t, conn)
		ctx, cancel := context.WithCancel(t.Context())
		cancelled := []<-chan error{call(ctx, "big", 300_000), call(ctx, "small", 1), call(ctx, "big", 300_000)}
		after := call(t.Context(), "after", 300_000)
		time.Sleep(time.Second)
		cancel()
		for _, done := range cancelled {
			if err := liveWithin(t, "cancelling", done, time.Millisecond); !errors.Is(err, context.Canceled) {
				t.Errorf("cancelled: %v", err)
			}
		}
		for range 20 { // for a minute and more nothing is read, but the server lives
			time.Sleep(liveHB)
			say(t, conn, frame(tHeartbeat))
		}
		if len(before)+len(after) > 0 {
			t.Fatal("another call has ended")
		}
		say(t, conn, frame(tReply, uint64(1), 0))
		check(t, liveWithin(t, "the call before", before, time.Second))
		seen := map[string]string{} // method by id
		for {
			kind, payload := liveFrame(t, conn)
			id := payload[:8]
			if kind == tCall {
				seen[id] = payload[17 : 17+payload[16]]
			} else if _, ok := seen[id]; kind != tCancel || !ok {
				t.Fatalf("frame %#x %.20q", kind, payload)
			} else {
				say(t, conn, frame(tReply, id, int(rpc.Canceled), "too late"))
			}
			if kind == tCall && seen[id] == "after" {
				say(t, conn, frame(tReply, id, 0))
				break
			}
		}
		check(t, liveWithin(t, "the call after", after, time.Second))
		if len(conns) > 0 {
			t.Errorf("%d more connections", len(conns))
		}
	})
}

// ---- Reconnect ----------------------------------------------------------------------------------------------------

// liveDialer is a Connecter whose dials fail, until ok is set; it notes when they were.
type liveDialer struct {
	rpc.Connecter
	mu   sync.Mutex
	ok   bool
	at   []time.Time
	slow time.Duration
}

var errLiveDial = errors.New("no route to the host")

func (d *liveDialer) Connect(ctx context.Context) (net.Conn, error) {
	time.Sleep(d.slow)
	d.mu.Lock()
	d.at = append(d.at, time.Now())
	ok := d.ok
	d.mu.Unlock()
	if ok {
		return d.Connecter.Connect(ctx)
	}
	return nil, errLiveDial
}

func (d *liveDialer) set(ok bool) { d.mu.Lock(); defer d.mu.Unlock(); d.ok = ok }
func (d *liveDialer) dials() int  { d.mu.Lock(); defer d.mu.Unlock(); return len(d.at) }

// liveDialTest runs test with a client that dials through d.
func liveDialTest(t *testing.T, config liveConfig, test func(t *testing.T, b *liveBed, d *liveDialer)) {
	liveTest(t, config, func(t *testing.T, b *liveBed) {
		check(t, b.c.Close())
		d := &liveDialer{Connecter: b.memListener}
		b.c = rpc.NewClient(d, config.client)
		test(t, b, d)
	})
}

func TestOneDialForAllOnFirstUse(t *testing.T) {
	liveDialTest(t, liveConfig{}, func(t *testing.T, b *liveBed, d *liveDialer) {
		d.set(true)
		d.slow = time.Second
		time.Sleep(time.Hour)
		if d.dials() > 0 {
			t.Error("dialed before the first use")
		}
		var calls []<-chan error
		for range 50 {
			calls = append(calls, liveGo(func() error { return b.call(t.Context(), "echo") }))
		}
		for _, done := range calls {
			check(t, <-done)
		}
		if d.dials() != 1 || b.ran.Load() != 50 {
			t.Errorf("%d dials and %d handlers for 50 calls", d.dials(), b.ran.Load())
		}
	})
}

func TestFailedDialIsTheCallsError(t *testing.T) {
	liveDialTest(t, liveConfig{}, func(t *testing.T, b *liveBed, d *liveDialer) {
		start := time.Now()
		err := b.call(t.Context(), "echo")
		if !errors.Is(err, errLiveDial) || rpc.CodeOf(err) != rpc.Unavailable || time.Since(start) > 0 {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		err = b.get(t.Context(), "get")
		if !errors.Is(err, errLiveDial) || rpc.CodeOf(err) != rpc.Unavailable {
			t.Errorf("download: %v", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := b.c.WaitForConnectivity(ctx); !errors.Is(err, context.DeadlineExceeded) || ctx.Err() == nil {
			t.Errorf("WaitForConnectivity: %v", err)
		}
		wait := liveGo(func() error { return b.c.WaitForConnectivity(t.Context()) })
		time.Sleep(time.Minute)
		d.set(true)
		check(t, liveWithin(t, "connectivity", wait, time.Minute+time.Second))
	})
}

func TestBackoffGrowsWithJitter(t *testing.T) {
	var all [2][]time.Duration
	for i := range all {
		liveDialTest(t, liveConfig{}, func(t *testing.T, b *liveBed, d *liveDialer) {
			for range 15 {
				if err := b.call(t.Context(), "echo"); !errors.Is(err, errLiveDial) {
					t.Errorf("%v", err)
				}
			}
			if len(d.at) != 15 {
				t.Errorf("%d dials for 15 calls", len(d.at))
			}
			for j := range d.at[1:] {
				all[i] = append(all[i], d.at[j+1].Sub(d.at[j]))
			}
		})
		waits := all[i]
		if slices.Min(waits) < 50*time.Millisecond || slices.Max(waits) > 45*time.Second || // room for jitter on both sides
			waits[0] > 200*time.Millisecond || slices.Min(waits[11:]) < 10*time.Second {
			t.Errorf("waited %v", waits)
		}
	}
	if slices.Equal(all[0], all[1]) {
		t.Errorf("no jitter: %v", all[0])
	}
}

func TestCallsDuringBackoff(t *testing.T) {
	liveDialTest(t, liveConfig{}, func(t *testing.T, b *liveBed, d *liveDialer) {
		for range 12 {
			b.call(t.Context(), "echo")
		}
		dials, start := d.dials(), time.Now() // the back-off is long now
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := b.call(ctx, "echo"); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != time.Second {
			t.Errorf("a call with a deadline: %v after %v", err, time.Since(start))
		}
		ctx, cancel = context.WithCancel(t.Context())
		cancelled := liveGo(func() error { return b.call(ctx, "echo") })
		waits := liveGo(func() error { return b.call(t.Context(), "echo") })
		synctest.Wait()
		cancel()
		if err := liveWithin(t, "cancelling", cancelled, time.Millisecond); !errors.Is(err, context.Canceled) {
			t.Errorf("a cancelled call: %v", err)
		}
		d.set(true)
		time.Sleep(time.Second)
		if d.dials() != dials || len(waits) > 0 {
			t.Errorf("%d dials during back-off", d.dials()-dials)
		}
		b.c.ResetConnectBackoff()
		check(t, liveWithin(t, "a call after the reset", waits, time.Millisecond))
	})
}

func TestLostCallIsUnavailableAndNotRetried(t *testing.T) {
	liveTest(t, liveConfig{}, func(t *testing.T, b *liveBed) {
		b.source.end()
		for i, run := range []func() error{
			func() error { return b.call(t.Context(), "wait") },
			func() error { return b.get(t.Context(), "late") },
			func() error { return b.put(t.Context(), "put slow", b.source) },
		} {
			done := liveGo(run)
			<-b.ctxs
			synctest.Wait()
			for _, label := range []string{"zrepl_control", "zrepl_data"} {
				if _, server, _ := b.last(label); server != nil {
					server.Close()
				}
			}
			synctest.Wait()
			err := liveWithin(t, "the call", done, time.Second)
			if rpc.CodeOf(err) != rpc.Unavailable || errors.Is(err, io.EOF) || b.ran.Load() != int64(2*i+1) {
				t.Errorf("%d: %v; %d handlers ran", i, err, b.ran.Load())
			}
			start := time.Now()
			check(t, b.call(t.Context(), "echo"))
			<-b.ctxs
			if time.Since(start) > 200*time.Millisecond {
				t.Errorf("the next call came through after %v", time.Since(start))
			}
		}
	})
}

func TestHandshakeTimeout(t *testing.T) {
	failed := func(t *testing.T, what string, err error) {
		var netErr net.Error
		if rpc.CodeOf(err) != rpc.Unavailable || !errors.As(err, &netErr) || !netErr.Timeout() {
			t.Errorf("%s: %v (%v)", what, err, rpc.CodeOf(err))
		}
	}
	for timeout, want := range map[time.Duration]time.Duration{0: 10 * time.Second, 3 * time.Second: 3 * time.Second} {
		for _, request := range liveRequests[:5] {
			for _, connects := range []bool{true, false} {
				synctest.Test(t, func(t *testing.T) {
					b := &liveBed{c: rpc.NewClient(liveDumb(connects), rpc.ClientConfig{HandshakeTimeout: timeout})}
					defer b.c.Close()
					start := time.Now()
					failed(t, request.name, request.run(context.Background(), b))
					if time.Since(start) != want {
						t.Errorf("%s, HandshakeTimeout %v: ended after %v", request.name, timeout, time.Since(start))
					}
				})
			}
		}
	}
	t.Run("tls", func(t *testing.T) {
		noLeak(t)
		l, err := net.Listen("tcp", "127.0.0.1:0") // connections are made, but nobody answers
		check(t, err)
		defer l.Close()
		b := &liveBed{c: rpc.NewClient(&rpc.TLSConnecter{Addr: l.Addr().String(), Config: &tls.Config{ServerName: "server"}},
			rpc.ClientConfig{HandshakeTimeout: 50 * time.Millisecond})}
		defer b.c.Close()
		for _, request := range liveRequests[:5] {
			failed(t, request.name, request.run(context.Background(), b))
		}
	})
}

func TestIdleConnectionsAreClosed(t *testing.T) {
	for timeout, want := range map[time.Duration]time.Duration{0: time.Minute, 7 * time.Second: 7 * time.Second, -1: 0} {
		liveTest(t, liveConfig{client: rpc.ClientConfig{IdleTimeout: timeout}}, func(t *testing.T, b *liveBed) {
			for range 5 { // use keeps a connection alive
				check(t, b.call(t.Context(), "echo"))
				check(t, b.get(t.Context(), "file"))
				time.Sleep(want * 2 / 3)
			}
			synctest.Wait()
			time.Sleep(want/3 - want/60)
			for _, label := range []string{"zrepl_control", "zrepl_data"} {
				client, _, dials := b.last(label)
				if want > 0 && (liveDone(client.gone) || dials != 1) {
					t.Errorf("%s: closed before %v or dialed again (%d)", label, want, dials)
				}
			}
			time.Sleep(want / 30)
			synctest.Wait()
			for _, label := range []string{"zrepl_control", "zrepl_data"} {
				if client, server, _ := b.last(label); !liveDone(client.gone) || !liveDone(server.gone) {
					t.Errorf("%s: not closed after %v", label, want)
				}
			}
			dials := len(b.cs)
			time.Sleep(time.Hour)
			if len(b.cs) > dials {
				t.Error("an idle client dialed")
			}
			check(t, b.call(t.Context(), "echo"))
		})
	}
}

func TestBusyConnectionIsNotIdle(t *testing.T) {
	liveTest(t, liveConfig{client: rpc.ClientConfig{CallTimeout: -1}}, func(t *testing.T, b *liveBed) {
		up := newLiveSource(4, 4)
		ops := []<-chan error{
			liveGo(func() error { return b.call(t.Context(), "wait") }),
			liveGo(func() error { return b.get(t.Context(), "get") }),
			liveGo(func() error { return b.put(t.Context(), "put", up) }),
		}
		time.Sleep(time.Hour)
		close(b.pass)
		close(b.source.goOn)
		close(up.goOn)
		for _, done := range ops {
			check(t, <-done)
		}
	})
}

func TestDataConnectionsAreReused(t *testing.T) {
	liveTest(t, liveConfig{}, func(t *testing.T, b *liveBed) {
		for range 10 {
			check(t, b.get(t.Context(), "file"))
			check(t, b.put(t.Context(), "put", strings.NewReader("data")))
			if err := b.get(t.Context(), "unknown"); rpc.CodeOf(err) != rpc.Unimplemented {
				t.Errorf("an unknown endpoint: %v", err)
			}
		}
		if _, _, dials := b.last("zrepl_data"); dials != 1 {
			t.Errorf("%d data connections for streams one after another", dials)
		}
	})
	for config, want := range map[int]int{0: 4, 2: 2} {
		liveTest(t, liveConfig{client: rpc.ClientConfig{MaxIdleDataConns: config}}, func(t *testing.T, b *liveBed) {
			for round := range 2 {
				var streams []io.ReadCloser
				for range 10 {
					r, err := b.c.Download(t.Context(), "file", textOf("q"), textOf(""))
					check(t, err)
					streams = append(streams, r)
				}
				for _, r := range streams {
					_, err := io.ReadAll(r)
					check(t, errors.Join(err, r.Close()))
				}
				synctest.Wait()
				open := 0
				for _, c := range b.cs {
					if !liveDone(c.gone) {
						open++
					}
				}
				if dialed := 10 + round*(10-want); open != want || len(b.cs) != dialed {
					t.Errorf("MaxIdleDataConns %d: %d open of %d, want %d of %d", config, open, len(b.cs), want, dialed)
				}
			}
		})
	}
}

func TestEndedIdleDataConnectionIsNotUsed(t *testing.T) {
	for name, wait := range map[string]func(){"noticed": synctest.Wait, "waiting": func() {}} {
		t.Run(name, func(t *testing.T) {
			liveTest(t, liveConfig{}, func(t *testing.T, b *liveBed) {
				for i := range 100 {
					if i%2 == 0 {
						check(t, b.get(t.Context(), "file"))
					} else {
						check(t, b.put(t.Context(), "put", strings.NewReader("data")))
					}
					_, server, dials := b.last("zrepl_data")
					if dials != i+1 {
						t.Fatalf("%d dials before stream %d", dials, i)
					}
					server.Close()
					wait()
				}
			})
		})
	}
}

func TestWhatWasNeverWrittenIsRetried(t *testing.T) {
	for _, request := range liveRequests[:3] {
		t.Run(request.name, func(t *testing.T) {
			liveTest(t, liveConfig{}, func(t *testing.T, b *liveBed) {
				for i := range 5 {
					check(t, request.run(t.Context(), b))
					c := b.cs[i]
					c.mu.Lock()
					c.broken = true
					c.mu.Unlock()
				}
				if ran := b.ran.Load(); ran != 5 {
					t.Errorf("%d handlers ran for 5 requests", ran)
				}
			})
		})
	}
}

// liveEcho answers the request on a raw connection.
func liveEcho(t *testing.T, conn net.Conn) {
	t.Helper()
	switch kind, payload := liveFrame(t, conn); kind {
	case tCall:
		say(t, conn, frame(tReply, payload[:8], 0))
	case tDownload:
		say(t, conn, frame(tResult, 0)+frame(tEnd, uint64(0)))
	default:
		t.Fatalf("frame %#x %q", kind, payload)
	}
}

func TestWhatWasNotStartedIsRetriedOnce(t *testing.T) {
	for _, request := range liveRequests[:2] {
		const refusal = "ZREPL-RPC 1-1 refused unavailable stopping\n"
		for _, no := range []string{refusal, answer + frame(tGoaway, uint64(0))} {
			for refusals := range 3 {
				t.Run(request.name+map[bool]string{true: "/refused", false: "/goaway"}[no == refusal], func(t *testing.T) {
					liveRaw(t, rpc.ClientConfig{}, func(t *testing.T, c *rpc.Client, conns <-chan net.Conn) {
						done := liveGo(func() error { return request.run(t.Context(), &liveBed{c: c}) })
						for range refusals {
							conn := (<-conns).(*memConn)
							say(t, conn, no)
							conn.CloseWrite()
							go io.Copy(io.Discard, conn)
						}
						if refusals < 2 {
							conn := <-conns
							say(t, conn, answer)
							expect(t, conn, banner)
							expect(t, conn, label(map[bool]string{true: "zrepl_control", false: "zrepl_data"}[request.name == "call"]))
							liveEcho(t, conn)
							check(t, liveWithin(t, "the retry", done, time.Second))
						} else if err := liveWithin(t, "the failure", done, time.Second); rpc.CodeOf(err) != rpc.Unavailable {
							t.Errorf("%v", err)
						}
						if len(conns) > 0 {
							t.Error("retried twice")
						}
					})
				})
			}
		}
	}
}

// liveSwitch is a Connecter of the latest of several servers.
type liveSwitch struct {
	mu sync.Mutex
	l  *memListener
}

func (s *liveSwitch) latest() *memListener { s.mu.Lock(); defer s.mu.Unlock(); return s.l }

func (s *liveSwitch) Connect(ctx context.Context) (net.Conn, error) {
	for {
		l := s.latest()
		if c, err := l.Connect(ctx); err == nil || l == s.latest() {
			return c, err
		}
	}
}

func TestGracefulRestartIsNotNoticed(t *testing.T) {
	liveTest(t, liveConfig{}, func(t *testing.T, b *liveBed) {
		check(t, b.c.Close())
		latest := &liveSwitch{l: b.memListener}
		b.c = rpc.NewClient(latest, rpc.ClientConfig{})
		stop := make(chan struct{})
		var users sync.WaitGroup
		var done atomic.Int64
		for i := range 6 {
			users.Go(func() {
				for n := 0; !liveDone(stop); n++ {
					var err error
					if i%2 == 0 {
						err = b.call(t.Context(), "echo")
					} else {
						err = b.get(t.Context(), "file")
					}
					if done.Add(1); err != nil {
						t.Errorf("user %d, request %d: %v", i, n, err)
						return
					}
					time.Sleep(time.Duration(1+n*i%7) * time.Millisecond)
				}
			})
		}
		for range 5 {
			time.Sleep(20 * time.Millisecond)
			old, next := b.s, newMemListener()
			b.s = b.server(rpc.ServerConfig{})
			serve(t, b.s, next.listener())
			latest.mu.Lock()
			latest.l = next
			latest.mu.Unlock()
			check(t, old.Shutdown(t.Context()))
		}
		close(stop)
		users.Wait()
		if b.ran.Load() != done.Load() {
			t.Errorf("%d handlers ran for %d requests", b.ran.Load(), done.Load())
		}
	})
}

func TestCloseWaitsForTheConnecter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := newMemConns()
		connected := make(chan struct{})
		c := rpc.NewClient(rpc.ConnecterFunc(func(context.Context) (net.Conn, error) {
			time.Sleep(3 * time.Second) // whatever ctx says
			close(connected)
			return client, nil
		}), rpc.ClientConfig{})
		call := liveGo(func() error { return c.Call(t.Context(), "m", textOf("q"), textOf("")) })
		synctest.Wait()
		check(t, c.Close())
		if !liveDone(connected) {
			t.Error("Close has returned while Connect was running")
		}
		if err := liveWithin(t, "the call", call, time.Millisecond); !errors.Is(err, rpc.ErrClosed) {
			t.Errorf("the call: %v", err)
		}
		if _, err := io.ReadAll(server); err != nil { // the connection that came too late is closed
			t.Error(err)
		}
	})
}

func TestWaitForConnectivityNeedsBothChannels(t *testing.T) {
	for _, deaf := range []string{"zrepl_control", "zrepl_data"} {
		liveTest(t, liveConfig{}, func(t *testing.T, b *liveBed) {
			check(t, b.c.Close())
			var hears atomic.Bool
			b.c = rpc.NewClient(rpc.ConnecterFunc(func(context.Context) (net.Conn, error) {
				mine, theirs := newMemConns()
				go func() { // finds out what is asked for, and says nothing to one of the two
					defer theirs.Close()
					preface := make([]byte, len(banner)+64)
					if _, err := io.ReadFull(theirs, preface); err != nil || strings.Contains(string(preface), deaf) && !hears.Load() {
						io.Copy(io.Discard, theirs)
						return
					}
					to, err := b.Connect(context.Background())
					check(t, err)
					defer to.Close()
					say(t, to, string(preface))
					go func() { io.Copy(to, theirs); to.Close() }()
					io.Copy(theirs, to)
				}()
				return mine, nil
			}), rpc.ClientConfig{})
			done := liveGo(func() error { return b.c.WaitForConnectivity(t.Context()) })
			time.Sleep(10 * time.Minute)
			if len(done) > 0 {
				t.Fatalf("%s is deaf: %v", deaf, <-done)
			}
			hears.Store(true)
			check(t, liveWithin(t, "connectivity", done, time.Minute))
		})
	}
}

func TestCloseLeavesNoGoroutine(t *testing.T) {
	overTransports(t, func(s *rpc.Server) {
		rpc.HandleCall(s, "wait", func(ctx context.Context, req *text) (*text, error) { <-ctx.Done(); return nil, ctx.Err() })
		rpc.HandleDownload(s, "get", func(context.Context, *text) (*text, io.ReadCloser, error) {
			return textOf(""), newLiveSource(1<<20, 0), nil
		})
		rpc.HandleUpload(s, "put", func(ctx context.Context, _ *text, r io.Reader) (*text, error) {
			_, err := io.Copy(io.Discard, r)
			return nil, err
		})
	}, func(t *testing.T, c *rpc.Client) {
		ctx, begun := context.Background(), make(chan struct{}, 9)
		var done []<-chan error
		for range 3 {
			done = append(done, liveGo(func() error { begun <- struct{}{}; return c.Call(ctx, "wait", textOf(""), textOf("")) }),
				liveGo(func() error {
					begun <- struct{}{}
					return c.Upload(ctx, "put", textOf(""), newLiveSource(1<<20, 0), textOf(""))
				}),
				liveGo(func() error {
					r, err := c.Download(ctx, "get", textOf(""), textOf(""))
					begun <- struct{}{}
					if err == nil {
						_, err = io.Copy(io.Discard, r)
						r.Close()
					}
					return err
				}))
		}
		for range done {
			<-begun
		}
		check(t, c.Close())
		for _, done := range done {
			if err := <-done; !errors.Is(err, rpc.ErrClosed) {
				t.Errorf("%v, want ErrClosed", err)
			}
		}
	})
}

// ---- The API over every transport ---------------------------------------------------------------------------------

// apiData is what streams carry here: pieces of it are told apart.
var apiData = func() []byte {
	b := make([]byte, 1<<20+1)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}()

// apiSteps reads at most step bytes at a time.
type apiSteps struct {
	r    io.Reader
	step int
}

func (s apiSteps) Read(p []byte) (int, error) { return s.r.Read(p[:min(len(p), s.step)]) }

// apiSource counts its closes. Close unblocks what blocks on closed.
type apiSource struct {
	io.Reader
	closes atomic.Int32
	closed chan struct{}
}

func newAPISource(r io.Reader) *apiSource { return &apiSource{Reader: r, closed: make(chan struct{})} }

// apiBlocked is a source that gives start and then blocks until it is closed.
func apiBlocked(start string) *apiSource {
	s := newAPISource(nil)
	s.Reader = io.MultiReader(strings.NewReader(start), apiReader(func([]byte) (int, error) {
		<-s.closed
		return 0, errors.New("read of a closed source")
	}))
	return s
}

func (s *apiSource) Close() error {
	if s.closes.Add(1) == 1 {
		close(s.closed)
	}
	return nil
}

type apiReader func(p []byte) (int, error)

func (f apiReader) Read(p []byte) (int, error) { return f(p) }

type apiWriter func(p []byte) (int, error)

func (f apiWriter) Write(p []byte) (int, error) { return f(p) }

// apiEndless never ends.
var apiEndless = apiReader(func(p []byte) (int, error) { return len(p), nil })

// apiSetup serves "echo" of each kind, which gives back the request, the download "get" of a piece of apiData, and the
// upload "put", which returns the stream.
func apiSetup(s *rpc.Server) {
	rpc.HandleCall(s, "echo", func(_ context.Context, req *text) (*text, error) { return req, nil })
	rpc.HandleDownload(s, "echo", func(_ context.Context, req *text) (*text, io.ReadCloser, error) { return req, nil, nil })
	rpc.HandleUpload(s, "echo", func(_ context.Context, req *text, r io.Reader) (*text, error) {
		_, err := io.Copy(io.Discard, r)
		return req, err
	})
	rpc.HandleDownload(s, "get", func(_ context.Context, req *text) (*text, io.ReadCloser, error) {
		var size, step int
		if _, err := fmt.Sscan(string(*req), &size, &step); err != nil {
			return nil, nil, rpc.Errorf(rpc.InvalidArgument, "%v", err)
		}
		return req, io.NopCloser(apiSteps{bytes.NewReader(apiData[:size]), step}), nil
	})
	rpc.HandleUpload(s, "put", func(_ context.Context, req *text, r io.Reader) (*text, error) {
		b, err := io.ReadAll(apiSteps{r, 4093})
		return textOf(string(*req) + string(b)), err
	})
	s.HandleLabel("echo", func(_ context.Context, conn net.Conn) { io.Copy(conn, conn) })
}

// apiStreams serves the download "get" of the source that open makes, and the upload "put", which gives what it reads
// to sink.
func apiStreams(s *rpc.Server, open func() (*text, io.ReadCloser, error), sink func(r io.Reader) error) {
	rpc.HandleDownload(s, "get", func(context.Context, *text) (*text, io.ReadCloser, error) { return open() })
	rpc.HandleUpload(s, "put", func(_ context.Context, _ *text, r io.Reader) (*text, error) {
		return textOf("done"), sink(r)
	})
}

func apiSame(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		t.Errorf("%s: %d bytes that differ from the %d wanted", what, len(got), len(want))
	}
}

func apiGet(t *testing.T, c *rpc.Client, req string) (io.ReadCloser, *text) {
	t.Helper()
	var res text
	stream, err := c.Download(t.Context(), "get", textOf(req), &res)
	check(t, err)
	return stream, &res
}

func TestEverySizeComesThrough(t *testing.T) {
	sizes := []int{0, 1}
	for _, n := range []int{32 << 10, 48<<10 - 8, 64 << 10, 1 << 20} {
		sizes = append(sizes, n-1, n, n+1)
	}
	overTransports(t, apiSetup, func(t *testing.T, c *rpc.Client) {
		for i, size := range sizes {
			step, data, res := []int{4093, 16376, 32769, 1<<20 + 3}[i%4], apiData[:size], new(text)
			check(t, c.Call(t.Context(), "echo", textOf(string(data)), res))
			apiSame(t, "call", []byte(*res), data)

			stream, res := apiGet(t, c, fmt.Sprint(size, " ", step))
			got, err := io.ReadAll(apiSteps{stream, step ^ 6})
			check(t, err)
			check(t, stream.Close())
			apiSame(t, "download", got, data)
			if want := fmt.Sprint(size, " ", step); string(*res) != want {
				t.Errorf("the result of the download is %q, want %q", *res, want)
			}

			check(t, c.Upload(t.Context(), "put", textOf("got "), apiSteps{bytes.NewReader(data), step}, res))
			apiSame(t, "upload", []byte(*res), append([]byte("got "), data...))

			conn, err := c.Dial(t.Context(), "echo")
			check(t, err)
			written := make(chan error, 1)
			go func() {
				_, err := io.Copy(conn, apiSteps{bytes.NewReader(data), step})
				written <- err
			}()
			got = make([]byte, size)
			_, err = io.ReadFull(conn, got)
			check(t, err)
			check(t, <-written)
			check(t, conn.Close())
			apiSame(t, "label", got, data)
		}
	})
}

func TestDownloadIsAProperReader(t *testing.T) {
	overTransports(t, apiSetup, func(t *testing.T, c *rpc.Client) {
		stream, _ := apiGet(t, c, "70001 511")
		check(t, iotest.TestReader(stream, apiData[:70001]))
		for range 2 {
			if n, err := stream.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Errorf("a read after the end: %d, %v", n, err)
			}
		}
		check(t, stream.Close())
	})
}

func TestDownloadWritesItself(t *testing.T) {
	const size = 1 << 20
	overTransports(t, apiSetup, func(t *testing.T, c *rpc.Client) {
		write := func(w io.Writer) (int64, error) {
			stream, _ := apiGet(t, c, fmt.Sprint(size, " 30011"))
			defer stream.Close()
			if _, err := io.ReadFull(stream, make([]byte, 3)); err != nil { // from the middle of a frame
				return 0, err
			}
			return stream.(io.WriterTo).WriteTo(w)
		}
		var buffer bytes.Buffer
		n, err := write(&buffer)
		check(t, err)
		apiSame(t, fmt.Sprint("buffer ", n), buffer.Bytes(), apiData[3:size])

		file, err := os.Create(filepath.Join(t.TempDir(), "sink"))
		check(t, err)
		n, err = write(file)
		check(t, errors.Join(err, file.Close()))
		got, err := os.ReadFile(file.Name())
		check(t, err)
		apiSame(t, fmt.Sprint("file ", n), got, apiData[3:size])

		r, w, err := os.Pipe()
		check(t, err)
		read := make(chan []byte)
		go func() { b, _ := io.ReadAll(r); r.Close(); read <- b }()
		n, err = write(w)
		check(t, errors.Join(err, w.Close()))
		apiSame(t, fmt.Sprint("pipe ", n), <-read, apiData[3:size])

		full := errors.New("disk full")
		if n, err = write(apiWriter(func([]byte) (int, error) { return 0, full })); n != 0 || !errors.Is(err, full) {
			t.Errorf("to a full disk: %d, %v", n, err)
		}
		if _, err = write(apiWriter(func(p []byte) (int, error) { return 1, nil })); !errors.Is(err, io.ErrShortWrite) {
			t.Errorf("a short write: %v", err)
		}
		if _, err = write(file); !errors.Is(err, os.ErrClosed) {
			t.Errorf("to a closed file: %v", err)
		}
	})
}

// apiSources are sources, what of them must arrive and how they end: "" for well, otherwise with that text.
var apiSources = []struct {
	name, data, end string
	make            func() io.Reader
}{
	{"one byte", "abcdef", "", func() io.Reader { return iotest.OneByteReader(strings.NewReader("abcdef")) }},
	{"half", "abcdef", "", func() io.Reader { return iotest.HalfReader(strings.NewReader("abcdef")) }},
	{"data with EOF", "abcdef", "", func() io.Reader { return iotest.DataErrReader(strings.NewReader("abcdef")) }},
	{"error", "", "disk on fire", func() io.Reader { return iotest.ErrReader(errors.New("disk on fire")) }},
	{"no text", "", "no text", func() io.Reader { return iotest.ErrReader(errors.New("")) }},
	{"not UTF-8", "", "a\ufffdb", func() io.Reader { return iotest.ErrReader(errors.New("a\xffb")) }},
	{"timeout", "abc", "timeout", func() io.Reader { return iotest.TimeoutReader(strings.NewReader("abc")) }},
	{"no progress", "", io.ErrNoProgress.Error(), func() io.Reader {
		return apiReader(func([]byte) (int, error) { return 0, nil })
	}},
	{"error with data", "abc", "late", func() io.Reader {
		return apiReader(func(p []byte) (int, error) { return copy(p, "abc"), errors.New("late") })
	}},
	{"unexpected EOF", "abc", "unexpected EOF", func() io.Reader {
		return io.MultiReader(strings.NewReader("abc"), iotest.ErrReader(io.ErrUnexpectedEOF))
	}},
	{"wrapped EOF", "abc", "half: EOF", func() io.Reader {
		return io.MultiReader(strings.NewReader("abc"), iotest.ErrReader(fmt.Errorf("half: %w", io.EOF)))
	}},
}

func TestSinkSeesHowTheSourceEnds(t *testing.T) {
	var source io.Reader
	var put []byte
	var putErr error
	overTransports(t, func(s *rpc.Server) {
		apiStreams(s, func() (*text, io.ReadCloser, error) { return new(text), io.NopCloser(source), nil },
			func(r io.Reader) error { put, putErr = io.ReadAll(r); return putErr })
	}, func(t *testing.T, c *rpc.Client) {
		for _, src := range apiSources {
			arrived := func(side string, got []byte, err error) {
				t.Helper()
				var remote *rpc.Error
				ok := err == nil
				if src.end != "" {
					ok = errors.As(err, &remote) && !errors.Is(err, io.EOF) &&
						(remote.Message == src.end || src.end == src.name && remote.Message == "")
				}
				if string(got) != src.data || !ok {
					t.Errorf("%s %s: %q, %v; want %q and %q", side, src.name, got, err, src.data, src.end)
				}
			}
			source = src.make()
			stream, _ := apiGet(t, c, "")
			got, err := io.ReadAll(stream)
			arrived("download of", got, err)
			if _, again := stream.Read(make([]byte, 1)); fmt.Sprint(again) != fmt.Sprint(err) && err != nil {
				t.Errorf("%s: first %v, then %v", src.name, err, again)
			}
			check(t, stream.Close())

			source = src.make()
			if err = c.Upload(t.Context(), "put", new(text), source, new(text)); err == nil && src.end != "" ||
				src.name == "timeout" && !errors.Is(err, iotest.ErrTimeout) {
				t.Errorf("%s: Upload returned %v", src.name, err)
			}
			arrived("upload of", put, putErr)
		}
	})
}

func TestSinkErrorStopsTheSource(t *testing.T) {
	overTransports(t, func(s *rpc.Server) {
		apiStreams(s, nil, func(r io.Reader) error {
			io.CopyN(io.Discard, r, 100_000)
			return rpc.Errorf(rpc.OutOfRange, "pool is full")
		})
	}, func(t *testing.T, c *rpc.Client) {
		for _, source := range []*apiSource{newAPISource(apiEndless), apiBlocked(strings.Repeat("x", 200_000))} {
			err := c.Upload(t.Context(), "put", new(text), source, new(text))
			if n := source.closes.Load(); n != 1 || rpc.CodeOf(err) != rpc.OutOfRange || !strings.Contains(err.Error(), "pool is full") {
				t.Errorf("the source was closed %d times, Upload returned %v", n, err)
			}
		}
	})
}

// apiBad can be neither encoded nor decoded.
type apiBad struct{}

func (apiBad) AppendBinary([]byte) ([]byte, error) { return nil, errors.New("does not encode") }
func (apiBad) UnmarshalBinary([]byte) error        { return errors.New("does not decode") }

func TestUploadClosesItsSourceOnce(t *testing.T) {
	overTransports(t, apiSetup, func(t *testing.T, c *rpc.Client) {
		canceled, cancel := context.WithCancel(t.Context())
		cancel()
		dead := rpc.NewClient(rpc.ConnecterFunc(func(context.Context) (net.Conn, error) {
			return nil, errors.New("no route")
		}), rpc.ClientConfig{})
		defer dead.Close()
		for name, u := range map[string]struct {
			c        *rpc.Client
			ctx      context.Context
			endpoint string
			req, res rpc.Message
			r        io.Reader
		}{
			"well":                    {c, t.Context(), "put", new(text), new(text), strings.NewReader("abc")},
			"unknown endpoint":        {c, t.Context(), "nowhere", new(text), new(text), apiEndless},
			"source fails":            {c, t.Context(), "put", new(text), new(text), iotest.ErrReader(errors.New("x"))},
			"canceled before":         {c, canceled, "put", new(text), new(text), strings.NewReader("abc")},
			"no connection":           {dead, t.Context(), "put", new(text), new(text), strings.NewReader("abc")},
			"request does not encode": {c, t.Context(), "put", apiBad{}, new(text), strings.NewReader("abc")},
			"result does not decode":  {c, t.Context(), "put", new(text), apiBad{}, strings.NewReader("abc")},
			"endpoint too long":       {c, t.Context(), strings.Repeat("x", 256), new(text), new(text), apiEndless},
		} {
			source := newAPISource(u.r)
			err := u.c.Upload(u.ctx, u.endpoint, u.req, source, u.res)
			if n := source.closes.Load(); n != 1 || (err == nil) != (name == "well") {
				t.Errorf("%s: closed %d times, error %v", name, n, err)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		source := apiBlocked("")
		source.Reader = io.MultiReader(apiReader(func([]byte) (int, error) { cancel(); return 0, io.EOF }), source.Reader)
		if err := c.Upload(ctx, "put", new(text), source, new(text)); !errors.Is(err, context.Canceled) {
			t.Errorf("canceled while the source blocks: %v", err)
		}
		if n := source.closes.Load(); n != 1 {
			t.Errorf("canceled while the source blocks: closed %d times", n)
		}
	})
}

func TestServerClosesASourceOnce(t *testing.T) {
	kinds := map[string]func() *apiSource{
		"well":    func() *apiSource { return newAPISource(strings.NewReader("abc")) },
		"refused": func() *apiSource { return newAPISource(strings.NewReader("abc")) },
		"fails":   func() *apiSource { return newAPISource(iotest.ErrReader(errors.New("x"))) },
		"panics":  func() *apiSource { return newAPISource(apiReader(nil)) },
		"endless": func() *apiSource { return newAPISource(apiEndless) },
		"blocks":  func() *apiSource { return apiBlocked("abc") },
	}
	var sources []*apiSource
	ended := make(chan bool, 1)
	overTransports(t, func(s *rpc.Server) {
		rpc.HandleDownload(s, "get", func(ctx context.Context, req *text) (rpc.Message, io.ReadCloser, error) {
			kind, end, _ := strings.Cut(string(*req), " ")
			source := kinds[kind]()
			sources = append(sources, source)
			context.AfterFunc(ctx, func() { ended <- true })
			if kind == "refused" {
				return req, source, errors.New("no")
			} else if end == "encodes badly" {
				return apiBad{}, source, nil
			}
			return req, source, nil
		})
	}, func(t *testing.T, c *rpc.Client) {
		for kind := range kinds {
			for _, end := range []string{"reads", "encodes badly", "closes", "cancels"} {
				ctx, cancel := context.WithCancel(t.Context())
				stream, err := c.Download(ctx, "get", textOf(kind+" "+end), new(text))
				if (err == nil) == (kind == "refused" || end == "encodes badly") && kind != "panics" {
					t.Errorf("%s, %s: %v", kind, end, err)
				}
				if err == nil {
					stuck := kind == "endless" || kind == "blocks"
					if end == "cancels" {
						cancel()
					}
					if end == "cancels" || end == "reads" && !stuck {
						_, err = io.Copy(io.Discard, stream)
					}
					if end == "cancels" && stuck && !errors.Is(err, context.Canceled) {
						t.Errorf("%s, canceled: %v", kind, err)
					}
					stream.Close()
					stream.Close()
				}
				<-ended // the handler's ctx ends, whatever happened; the client's has not, if it only closed the stream
				cancel()
			}
		}
	})
	for _, s := range sources {
		if n := s.closes.Load(); n != 1 {
			t.Errorf("a source was closed %d times", n)
		}
	}
}

// ---- Calls and errors ---------------------------------------------------------------------------------------------

func TestCodeOf(t *testing.T) {
	for _, c := range []struct {
		err  error
		want rpc.Code
	}{
		{nil, rpc.OK},
		{errors.New("plain"), rpc.Unknown},
		{context.Canceled, rpc.Canceled},
		{context.DeadlineExceeded, rpc.DeadlineExceeded},
		{rpc.Errorf(rpc.NotFound, "%d", 1), rpc.NotFound},
		{fmt.Errorf("wrapped: %w", rpc.Errorf(rpc.DataLoss, "")), rpc.DataLoss},
		{&rpc.Error{Code: 77}, rpc.Unknown},
		{&rpc.HandshakeError{Code: rpc.PermissionDenied}, rpc.PermissionDenied},
		{rpc.ErrPeerTimeout, rpc.Unavailable},
		{&rpc.ProtocolError{}, rpc.Unavailable},
		{&net.OpError{Op: "read", Err: errors.New("reset")}, rpc.Unavailable},
	} {
		if got := rpc.CodeOf(c.err); got != c.want {
			t.Errorf("CodeOf(%v) = %v, want %v", c.err, got, c.want)
		}
	}
	var timeout net.Error
	if !errors.As(rpc.ErrPeerTimeout, &timeout) || !timeout.Timeout() {
		t.Error("ErrPeerTimeout is no net.Error with Timeout")
	}
}

// apiFail serves the call, the download and the upload "fail", which fail with err().
func apiFail(s *rpc.Server, err func() error) {
	rpc.HandleCall(s, "fail", func(context.Context, *text) (*text, error) { return nil, err() })
	rpc.HandleDownload(s, "fail", func(context.Context, *text) (*text, io.ReadCloser, error) { return nil, nil, err() })
	rpc.HandleUpload(s, "fail", func(context.Context, *text, io.Reader) (*text, error) { return nil, err() })
}

// apiEach runs a request for method as a call, a download and an upload.
func apiEach(ctx context.Context, c *rpc.Client, method string, req *text, f func(kind string, err error)) {
	f("call", c.Call(ctx, method, req, new(text)))
	stream, err := c.Download(ctx, method, req, new(text))
	if err == nil {
		_, err = io.Copy(io.Discard, stream)
		stream.Close()
	}
	f("download", err)
	f("upload", c.Upload(ctx, method, req, strings.NewReader("abc"), new(text)))
}

func TestHandlerErrorsCrossTheWire(t *testing.T) {
	var fail error
	overTransports(t, func(s *rpc.Server) { apiFail(s, func() error { return fail }) }, func(t *testing.T, c *rpc.Client) {
		for _, e := range []struct {
			err  error
			want rpc.Error
			is   error
		}{
			{errors.New("plain"), rpc.Error{Code: rpc.Unknown, Message: "plain"}, nil},
			{errors.New(""), rpc.Error{Code: rpc.Unknown}, nil},
			{io.EOF, rpc.Error{Code: rpc.Unknown, Message: "EOF"}, nil},
			{rpc.Errorf(rpc.AlreadyExists, ""), rpc.Error{Code: rpc.AlreadyExists}, nil},
			{rpc.Errorf(rpc.Unauthenticated, "\x1b[2J\"who?\"\n"),
				rpc.Error{Code: rpc.Unauthenticated, Message: "\x1b[2J\"who?\"\n"}, nil},
			{errors.New("a\xffb"), rpc.Error{Code: rpc.Unknown, Message: "a\ufffdb"}, nil},
			{context.Canceled, rpc.Error{Code: rpc.Canceled, Message: "context canceled"}, context.Canceled},
			{context.DeadlineExceeded, rpc.Error{Code: rpc.DeadlineExceeded, Message: "context deadline exceeded"},
				context.DeadlineExceeded},
		} {
			fail = e.err
			apiEach(t.Context(), c, "fail", new(text), func(kind string, err error) {
				var remote *rpc.Error
				if !errors.As(err, &remote) || *remote != e.want || e.is != nil && !errors.Is(err, e.is) || errors.Is(err, io.EOF) {
					t.Errorf("%s: %v came as %#v", kind, e.err, err)
				} else if strings.ContainsAny(err.Error(), "\x1b\n") || !strings.Contains(err.Error(), "fail") {
					t.Errorf("%s: %q has control characters or does not name the method", kind, err.Error())
				}
			})
		}
		fail = errors.New(strings.Repeat("€", 4096))
		apiEach(t.Context(), c, "fail", new(text), func(kind string, err error) {
			var remote *rpc.Error
			if !errors.As(err, &remote) || len(remote.Message) > 4096 || !strings.HasPrefix(remote.Message, "€€€") {
				t.Errorf("%s: a long text came as %v", kind, err)
			}
		})
		apiEach(t.Context(), c, "nowhere", new(text), func(kind string, err error) {
			if rpc.CodeOf(err) != rpc.Unimplemented {
				t.Errorf("%s of what nobody serves: %v", kind, err)
			}
		})
	})
}

func TestErrorsNamePeerMethodAndFate(t *testing.T) {
	l, err := rpc.ListenTCP("127.0.0.1:0", map[string]string{"127.0.0.1": "tester"})
	check(t, err)
	s := rpc.NewServer(nil, rpc.ServerConfig{})
	running := make(chan net.Conn, 1)
	wait := func(ctx context.Context) error {
		(<-running).Close()
		<-ctx.Done()
		return ctx.Err()
	}
	rpc.HandleCall(s, "m_wait", func(ctx context.Context, _ *text) (*text, error) { return nil, wait(ctx) })
	rpc.HandleUpload(s, "m_wait", func(ctx context.Context, _ *text, _ io.Reader) (*text, error) { return nil, wait(ctx) })
	serve(t, s, l)
	c := rpc.NewClient(rpc.ConnecterFunc(func(ctx context.Context) (net.Conn, error) {
		conn, err := (&rpc.TCPConnecter{Addr: l.Addr().String()}).Connect(ctx)
		running <- conn
		return conn, err
	}), rpc.ClientConfig{})
	defer c.Close()
	call := c.Call(t.Context(), "m_wait", new(text), new(text))
	upload := c.Upload(t.Context(), "m_wait", new(text), apiBlocked(""), new(text))
	for err, label := range map[error]string{call: "zrepl_control", upload: "zrepl_data"} {
		for _, part := range []string{l.Addr().String(), "m_wait", label, "may have run"} {
			if rpc.CodeOf(err) != rpc.Unavailable || !strings.Contains(err.Error(), part) {
				t.Errorf("%v (%v) does not say %q", err, rpc.CodeOf(err), part)
			}
		}
	}
	noRoute := &net.OpError{Op: "dial", Err: errors.New("no route")}
	dead := rpc.NewClient(rpc.ConnecterFunc(func(context.Context) (net.Conn, error) { return nil, noRoute }), rpc.ClientConfig{})
	defer dead.Close()
	apiEach(t.Context(), dead, "m", new(text), func(kind string, err error) {
		if !errors.Is(err, noRoute) || rpc.CodeOf(err) != rpc.Unavailable || !strings.Contains(err.Error(), "not run") {
			t.Errorf("%s: %v (%v)", kind, err, rpc.CodeOf(err))
		}
	})
}

func TestTooLargeAMessageIsTheSendersError(t *testing.T) {
	const small = 65536 // the smallest maximum that may be set
	for _, tr := range transports {
		t.Run(tr.name, func(t *testing.T) {
			for max, tooLarge := range map[[2]int]bool{{small, small + 1}: true, {small + 1, small}: true, {small + 1, small + 1}: false} {
				l, connecter := tr.make(t)
				s := rpc.NewServer(nil, rpc.ServerConfig{MaxMessageSize: max[0]})
				apiSetup(s)
				serve(t, s, l)
				c := rpc.NewClient(connecter, rpc.ClientConfig{MaxMessageSize: max[1]})
				defer c.Close()
				apiEach(t.Context(), c, "echo", textOf(strings.Repeat("x", small)), func(kind string, err error) { check(t, err) })
				before := c.Stats().Conns
				apiEach(t.Context(), c, "echo", textOf(strings.Repeat("x", small+1)), func(kind string, err error) {
					var typed *rpc.Error
					if errors.As(err, &typed) != tooLarge || (err != nil) != tooLarge || tooLarge && rpc.CodeOf(err) == rpc.Unknown {
						t.Errorf("%s with maxima %v: %v", kind, max, err)
					}
					check(t, c.Call(t.Context(), "echo", new(text), new(text)))
					if after := c.Stats().Conns; kind == "call" && after != before {
						t.Errorf("maxima %v: the connection was lost", max)
					}
				})
			}
		})
	}
}

// apiHandler answers each method of the replication service and keeps the request.
type apiHandler struct{ got any }

var (
	apiVersion  = rpc.FilesystemVersion{Type: rpc.VersionBookmark, Name: "b", GUID: 1 << 63, CreateTXG: 7, Creation: time.Unix(1e9, 5).UTC()}
	apiSendReq  = &rpc.SendReq{Filesystem: "pool/a", From: &apiVersion, To: &apiVersion, ResumeToken: "tok"}
	apiFS       = &rpc.ListFilesystemRes{Filesystems: []rpc.Filesystem{{Path: "pool/a", IsPlaceholder: true}, {Path: "é"}}}
	apiVersions = &rpc.ListFilesystemVersionsRes{Versions: []rpc.FilesystemVersion{apiVersion, {}}}
	apiDestroy  = &rpc.DestroySnapshotsRes{Results: []rpc.DestroySnapshotRes{{Snapshot: &apiVersion, Error: "busy"}}}
)

func (h *apiHandler) ListFilesystems(_ context.Context, r *rpc.ListFilesystemReq) (*rpc.ListFilesystemRes, error) {
	h.got = r
	return apiFS, nil
}
func (h *apiHandler) ListFilesystemVersions(_ context.Context, r *rpc.ListFilesystemVersionsReq) (*rpc.ListFilesystemVersionsRes, error) {
	h.got = r
	return apiVersions, nil
}
func (h *apiHandler) DestroySnapshots(_ context.Context, r *rpc.DestroySnapshotsReq) (*rpc.DestroySnapshotsRes, error) {
	h.got = r
	return apiDestroy, nil
}
func (h *apiHandler) ReplicationCursor(_ context.Context, r *rpc.ReplicationCursorReq) (*rpc.ReplicationCursorRes, error) {
	h.got = r
	return &rpc.ReplicationCursorRes{GUID: 9}, nil
}
func (h *apiHandler) SendDry(_ context.Context, r *rpc.SendReq) (*rpc.SendRes, error) {
	h.got = r
	return &rpc.SendRes{ExpectedSize: 1}, nil
}
func (h *apiHandler) SendCompleted(_ context.Context, r *rpc.SendCompletedReq) (*rpc.SendCompletedRes, error) {
	h.got = r
	return &rpc.SendCompletedRes{}, nil
}
func (h *apiHandler) Send(_ context.Context, r *rpc.SendReq) (*rpc.SendRes, io.ReadCloser, error) {
	if h.got = r; r.ResumeToken == "" {
		return &rpc.SendRes{}, nil, nil // a nil stream is an empty one
	}
	return &rpc.SendRes{UsedResumeToken: true}, io.NopCloser(strings.NewReader("stream")), nil
}
func (h *apiHandler) Receive(_ context.Context, r *rpc.ReceiveReq, stream io.Reader) (*rpc.ReceiveRes, error) {
	h.got = r
	if b, err := io.ReadAll(stream); string(b) != "stream" || err != nil {
		return nil, rpc.Errorf(rpc.DataLoss, "%q, %v", b, err)
	}
	return &rpc.ReceiveRes{}, nil
}

// apiReplication makes each of the replication calls with the zero request of its type or the given ones.
func apiReplication(ctx context.Context, c *rpc.Client, f func(got, want any, req any, err error)) {
	versions := &rpc.ListFilesystemVersionsReq{Filesystem: "pool/a"}
	destroy := &rpc.DestroySnapshotsReq{Filesystem: "pool/a", Snapshots: apiVersions.Versions}
	cursor, completed := &rpc.ReplicationCursorReq{Filesystem: "x"}, &rpc.SendCompletedReq{OriginalReq: apiSendReq}
	receive := &rpc.ReceiveReq{Filesystem: "pool/b", To: &apiVersion, ClearResumeToken: true}
	r1, err := c.ListFilesystems(ctx, &rpc.ListFilesystemReq{})
	f(r1, apiFS, &rpc.ListFilesystemReq{}, err)
	r2, err := c.ListFilesystemVersions(ctx, versions)
	f(r2, apiVersions, versions, err)
	r3, err := c.DestroySnapshots(ctx, destroy)
	f(r3, apiDestroy, destroy, err)
	r4, err := c.ReplicationCursor(ctx, cursor)
	f(r4, &rpc.ReplicationCursorRes{GUID: 9}, cursor, err)
	r5, err := c.SendDry(ctx, apiSendReq)
	f(r5, &rpc.SendRes{ExpectedSize: 1}, apiSendReq, err)
	r6, err := c.SendCompleted(ctx, completed)
	f(r6, &rpc.SendCompletedRes{}, completed, err)
	r7, err := c.Receive(ctx, receive, strings.NewReader("stream"))
	f(r7, &rpc.ReceiveRes{}, receive, err)
	for token, want := range map[string]string{"tok": "stream", "": ""} {
		req := &rpc.SendReq{Filesystem: "pool/a", To: &apiVersion, ResumeToken: token}
		r8, stream, err := c.Send(ctx, req)
		if err == nil {
			b, err := io.ReadAll(stream)
			f(string(b), want, req, errors.Join(err, stream.Close()))
		}
		f(r8, &rpc.SendRes{UsedResumeToken: token != ""}, req, err)
	}
}

func TestReplicationCalls(t *testing.T) {
	for name, h := range map[string]rpc.Handler{"all": new(apiHandler), "nil": nil, "unimplemented": rpc.UnimplementedHandler{}} {
		t.Run(name, func(t *testing.T) {
			l := newMemListener()
			serve(t, rpc.NewServer(h, rpc.ServerConfig{}), l.listener())
			c := rpc.NewClient(l, rpc.ClientConfig{})
			defer c.Close()
			check(t, c.WaitForConnectivity(t.Context()))
			apiReplication(t.Context(), c, func(got, want, req any, err error) {
				if all, ok := h.(*apiHandler); !ok {
					if rpc.CodeOf(err) != rpc.Unimplemented {
						t.Errorf("%T: %v", req, err)
					}
				} else if err != nil || !reflect.DeepEqual(got, want) || !reflect.DeepEqual(all.got, req) {
					t.Errorf("%+v: the handler got %+v; %+v, %v; want %+v", req, all.got, got, err, want)
				}
			})
		})
	}
}

func TestBadLabelsAreRefused(t *testing.T) {
	s := rpc.NewServer(nil, rpc.ServerConfig{})
	c := rpc.NewClient(rpc.ConnecterFunc(func(context.Context) (net.Conn, error) {
		t.Error("dialed for a bad label")
		return nil, errors.New("no")
	}), rpc.ClientConfig{})
	defer c.Close()
	for _, l := range []string{"", "zrepl_control", "zrepl_data", "A", "a b", "a/b", "é", "a\x00", "a\n", strings.Repeat("a", 65)} {
		if _, err := c.Dial(t.Context(), l); err == nil {
			t.Errorf("Dial takes %q", l)
		}
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("HandleLabel takes %q", l)
				}
			}()
			s.HandleLabel(l, func(context.Context, net.Conn) {})
		}()
	}
	s.HandleLabel(strings.Repeat("a", 64), func(context.Context, net.Conn) {})
	check(t, s.Close())
}

func TestDialOfAnUnknownLabel(t *testing.T) {
	overTransports(t, apiSetup, func(t *testing.T, c *rpc.Client) {
		_, err := c.Dial(t.Context(), "nobody.serves_this-1")
		var refused *rpc.HandshakeError
		if !errors.As(err, &refused) || refused.Code != rpc.NotFound || rpc.CodeOf(err) != rpc.NotFound ||
			!strings.Contains(err.Error(), "nobody.serves_this-1") {
			t.Errorf("%v", err)
		}
	})
}

func TestNilMessagesDoNotPanic(t *testing.T) {
	overTransports(t, apiSetup, func(t *testing.T, c *rpc.Client) {
		for name, f := range map[string]func(){
			"Call":            func() { c.Call(t.Context(), "echo", nil, nil) },
			"Upload":          func() { c.Upload(t.Context(), "put", nil, strings.NewReader("abc"), nil) },
			"nil source":      func() { c.Upload(t.Context(), "put", new(text), nil, new(text)) },
			"Download":        func() { apiClose(c.Download(t.Context(), "get", nil, nil)) },
			"ListFilesystems": func() { c.ListFilesystems(t.Context(), nil) },
			"SendDry":         func() { c.SendDry(t.Context(), nil) },
			"Receive":         func() { c.Receive(t.Context(), nil, nil) },
			"Send": func() {
				_, stream, err := c.Send(t.Context(), nil)
				apiClose(stream, err)
			},
		} {
			func() {
				defer func() {
					if p := recover(); p != nil {
						t.Errorf("%s: %v", name, p)
					}
				}()
				f()
			}()
		}
		check(t, c.Call(t.Context(), "echo", new(text), new(text)))
	})
}

func apiClose(stream io.Closer, err error) {
	if err == nil {
		stream.Close()
	}
}

func TestStatsCount(t *testing.T) {
	l := newMemListener()
	s := rpc.NewServer(nil, rpc.ServerConfig{})
	apiSetup(s)
	serve(t, s, l.listener())
	c := rpc.NewClient(l, rpc.ClientConfig{})
	defer c.Close()
	if c.Stats() != (rpc.Stats{}) || s.Stats() != (rpc.Stats{}) {
		t.Errorf("at first: %+v, %+v", c.Stats(), s.Stats())
	}
	check(t, c.Call(t.Context(), "echo", textOf(strings.Repeat("x", 1000)), new(text)))
	check(t, c.Upload(t.Context(), "put", new(text), strings.NewReader(strings.Repeat("x", 2000)), new(text)))
	c.Call(t.Context(), "nowhere", new(text), new(text))
	apiClose(c.Download(t.Context(), "nowhere", new(text), new(text)))
	c.Dial(t.Context(), "nowhere")
	for name, s := range map[string]rpc.Stats{"client": c.Stats(), "server": s.Stats()} {
		if s.Calls != 2 || s.CallsFailed != 1 || s.Streams != 2 || s.StreamsFailed != 1 || s.Conns < 2 ||
			s.OpenConns < 1 || s.HandshakesRefused != 1 || s.BytesRead < 3000 || s.BytesWritten < 3000 {
			t.Errorf("%s: %+v", name, s)
		}
	}
}

func TestSixtyFourGoroutinesDoEverythingAtOnce(t *testing.T) {
	overTransports(t, apiSetup, func(t *testing.T, c *rpc.Client) {
		var wg sync.WaitGroup
		defer wg.Wait()
		for i := range 64 {
			wg.Go(func() {
				for j := range 4 {
					id, size := fmt.Sprint(i, " ", j, " "), (i*j*257)%100_000
					var res text
					var got []byte
					want, err := id, error(nil)
					switch (i + j) % 4 {
					case 0:
						err = c.Call(t.Context(), "echo", textOf(id), &res)
						got = []byte(res)
					case 1:
						var stream io.ReadCloser
						if stream, err = c.Download(t.Context(), "get", textOf(fmt.Sprint(size, " ", 977)), &res); err == nil {
							got, err = io.ReadAll(stream)
							stream.Close()
						}
						want = string(apiData[:size])
					case 2:
						want = id + string(apiData[:size])
						err = c.Upload(t.Context(), "put", textOf(id), strings.NewReader(want[len(id):]), &res)
						got = []byte(res)
					case 3:
						var conn net.Conn
						if conn, err = c.Dial(t.Context(), "echo"); err == nil {
							io.WriteString(conn, id)
							got = make([]byte, len(id))
							_, err = io.ReadFull(conn, got)
							conn.Close()
						}
					}
					if string(got) != want || err != nil {
						t.Errorf("%d, %d: %d bytes, wanted %d, %v", i, j, len(got), len(want), err)
					}
				}
			})
		}
	})
}

// ---- The server: handlers and admission ---------------------------------------------------------------------------

// srvStart serves what setup registers, until the test ends, to the client it returns.
func srvStart(t *testing.T, config rpc.ServerConfig, setup func(s *rpc.Server)) (*rpc.Server, *rpc.Client, *memListener) {
	l, s := newMemListener(), rpc.NewServer(nil, config)
	setup(s)
	serve(t, s, l.listener())
	c := rpc.NewClient(l, rpc.ClientConfig{})
	t.Cleanup(func() { check(t, c.Close()) })
	return s, c, l
}

// srvPeer is a raw connection to l that comes from addr.
func srvPeer(t *testing.T, l *memListener, addr string) net.Conn {
	client, server := newMemConns()
	server.remote = memAddr(addr)
	t.Cleanup(func() { client.Close() })
	select {
	case l.conns <- server:
	case <-time.After(time.Minute):
		t.Fatal("nobody accepts")
	}
	return client
}

// srvLog is a Logger that keeps what it is told.
type srvLog struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *srvLog) log(msg string, args []any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	fmt.Fprintln(&l.text, msg, fmt.Sprintf("%s", args))
}

func (l *srvLog) DebugContext(_ context.Context, msg string, args ...any) { l.log(msg, args) }
func (l *srvLog) InfoContext(_ context.Context, msg string, args ...any)  { l.log(msg, args) }
func (l *srvLog) WarnContext(_ context.Context, msg string, args ...any)  { l.log(msg, args) }
func (l *srvLog) ErrorContext(_ context.Context, msg string, args ...any) { l.log(msg, args) }

// take returns what was logged since the last take.
func (l *srvLog) take() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.text.Reset()
	return l.text.String()
}

// srvPanic is a message, a source and a sink that panic.
type srvPanic struct{ name string }

func (m *srvPanic) AppendBinary([]byte) ([]byte, error) { panic("boom in AppendBinary") }
func (m *srvPanic) UnmarshalBinary([]byte) error        { panic("boom in UnmarshalBinary") }
func (m *srvPanic) Read([]byte) (int, error) {
	if m.name == "close" {
		return 0, io.EOF
	}
	panic("boom in Read")
}
func (m *srvPanic) Close() error { panic("boom in Close") }

func TestPanicsAreContained(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := new(srvLog)
		_, c, _ := srvStart(t, rpc.ServerConfig{Logger: log}, func(s *rpc.Server) {
			apiSetup(s)
			apiFail(s, func() error { panic("boom in srvHandler") })
			rpc.HandleCall(s, "req", func(context.Context, *srvPanic) (*text, error) { return new(text), nil })
			rpc.HandleCall(s, "res", func(context.Context, *text) (*srvPanic, error) { return new(srvPanic), nil })
			rpc.HandleDownload(s, "source", func(_ context.Context, req *text) (*text, io.ReadCloser, error) {
				return req, &srvPanic{string(*req)}, nil
			})
			s.HandleLabel("label", func(context.Context, net.Conn) { panic("boom in srvHandler") })
		})
		download := func(endpoint, req string) error {
			stream, err := c.Download(t.Context(), endpoint, textOf(req), new(text))
			if err == nil {
				_, err = io.ReadAll(stream)
				stream.Close()
			}
			return err
		}
		for name, try := range map[string]func() error{
			"call":        func() error { return c.Call(t.Context(), "fail", new(text), new(text)) },
			"download":    func() error { return download("fail", "") },
			"upload":      func() error { return c.Upload(t.Context(), "fail", new(text), apiBlocked("abc"), new(text)) },
			"request":     func() error { return c.Call(t.Context(), "req", new(text), new(text)) },
			"result":      func() error { return c.Call(t.Context(), "res", new(text), new(text)) },
			"source read": func() error { return download("source", "read") },
			"source close": func() error {
				if err := download("source", "close"); err != nil { // the stream may have ended well before
					return err
				}
				return rpc.Errorf(rpc.Internal, "")
			},
			"label": func() error {
				conn, err := c.Dial(t.Context(), "label")
				check(t, err)
				defer conn.Close()
				if _, err := io.ReadAll(conn); err != nil {
					t.Errorf("the connection of a label that panicked ends with %v", err)
				}
				return rpc.Errorf(rpc.Internal, "")
			},
		} {
			err := try()
			synctest.Wait()
			if logged := log.take(); rpc.CodeOf(err) != rpc.Internal || !strings.Contains(logged, "boom in") ||
				!strings.Contains(logged, "_test.go:") {
				t.Errorf("%s: %v; logged: %s", name, err, logged)
			}
		}
		check(t, c.Call(t.Context(), "echo", new(text), new(text)))
	})
}

func TestNilResultIsAnError(t *testing.T) {
	overTransports(t, func(s *rpc.Server) {
		rpc.HandleCall(s, "nil", func(context.Context, *text) (*text, error) { return nil, nil })
		rpc.HandleDownload(s, "nil", func(context.Context, *text) (*text, io.ReadCloser, error) {
			return nil, io.NopCloser(strings.NewReader("abc")), nil
		})
		rpc.HandleUpload(s, "nil", func(_ context.Context, _ *text, r io.Reader) (rpc.Message, error) {
			_, err := io.ReadAll(r)
			return nil, err
		})
	}, func(t *testing.T, c *rpc.Client) {
		apiEach(t.Context(), c, "nil", new(text), func(kind string, err error) {
			if rpc.CodeOf(err) != rpc.Internal {
				t.Errorf("%s: %v", kind, err)
			}
		})
	})
}

func TestUploadThatWasNotReadToItsEndFails(t *testing.T) {
	overTransports(t, func(s *rpc.Server) {
		rpc.HandleUpload(s, "put", func(_ context.Context, req *text, r io.Reader) (*text, error) {
			_, err := io.ReadFull(r, make([]byte, len(*req)))
			return new(text), err
		})
	}, func(t *testing.T, c *rpc.Client) {
		for _, u := range []struct {
			read, stream string
			r            io.Reader
			want         rpc.Code
		}{
			{"abc", "abc", nil, rpc.OK}, // all but the end, which the library finds
			{"", "", nil, rpc.OK},
			{"abc", "abcdef", nil, rpc.FailedPrecondition},
			{"", "a", nil, rpc.FailedPrecondition},
			{"abc", "abc", apiEndless, rpc.FailedPrecondition},
			{"abc", "abc", apiBlocked("x"), rpc.FailedPrecondition},
			{"abc", "abc", iotest.ErrReader(errors.New("source")), rpc.Unknown}, // any error will do
		} {
			r := io.Reader(strings.NewReader(u.stream))
			if u.r != nil {
				r = srvSource{io.MultiReader(r, u.r), u.r}
			}
			err := c.Upload(t.Context(), "put", textOf(u.read), r, new(text))
			if rpc.CodeOf(err) != u.want && (u.want != rpc.Unknown || err == nil) {
				t.Errorf("%q of %q was read: %v, want %v", u.read, u.stream, err, u.want)
			}
		}
	})
}

func TestSuccessBeforeTheEndDoesNotWaitForIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, c, _ := srvStart(t, rpc.ServerConfig{}, func(s *rpc.Server) {
			rpc.HandleUpload(s, "put", func(_ context.Context, req *text, r io.Reader) (*text, error) {
				_, err := io.ReadFull(r, make([]byte, 3))
				return req, err
			})
		})
		start := time.Now()
		err := c.Upload(t.Context(), "put", new(text), apiBlocked("abc"), new(text))
		if took := time.Since(start); rpc.CodeOf(err) != rpc.FailedPrecondition || took > 2*time.Second {
			t.Errorf("%v after %v", err, took)
		}
	})
}

// srvSource closes what it is made of.
type srvSource struct {
	io.Reader
	r io.Reader
}

func (s srvSource) Close() error {
	if c, ok := s.r.(io.Closer); ok {
		return c.Close()
	}
	return nil
}

type srvKey struct{}

func TestInterceptIsAroundEveryHandler(t *testing.T) {
	var infos []rpc.CallInfo
	seen := make(chan string, 1)
	say := func(ctx context.Context) { seen <- fmt.Sprint(ctx.Value(srvKey{}), " ", rpc.ClientIdentity(ctx)) }
	config := rpc.ServerConfig{Intercept: func(ctx context.Context, call rpc.CallInfo, handle func(context.Context)) {
		infos = append(infos, call)
		if call.Method != "drop" && call.Label != "drop" {
			handle(context.WithValue(ctx, srvKey{}, call.Method))
		}
	}}
	_, c, _ := srvStart(t, config, func(s *rpc.Server) {
		for _, name := range []string{"m", "drop"} {
			rpc.HandleCall(s, name, func(ctx context.Context, m *text) (*text, error) { say(ctx); return m, nil })
			rpc.HandleDownload(s, name, func(ctx context.Context, m *text) (*text, io.ReadCloser, error) { say(ctx); return m, nil, nil })
			rpc.HandleUpload(s, name, func(ctx context.Context, m *text, _ io.Reader) (*text, error) { say(ctx); return m, errors.New("x") })
			s.HandleLabel(name, func(ctx context.Context, conn net.Conn) { say(ctx) })
		}
	})
	check(t, c.WaitForConnectivity(t.Context()))
	if len(infos) > 0 {
		t.Errorf("pings are intercepted: %v", infos)
	}
	dial := func(label string) {
		conn, err := c.Dial(t.Context(), label)
		check(t, err)
		expectEOF(t, conn)
		conn.Close()
	}
	apiEach(t.Context(), c, "m", new(text), func(kind string, err error) {
		if got := <-seen; got != "m tester" {
			t.Errorf("%s: the handler saw %q", kind, got)
		}
	})
	dial("m")
	if got := <-seen; got != " tester" {
		t.Errorf("the label's handler saw %q", got)
	}
	apiEach(t.Context(), c, "drop", new(text), func(kind string, err error) {
		if err == nil {
			t.Errorf("%s: no error though its handler was not called", kind)
		}
	})
	dial("drop")
	for i, label := range []string{"zrepl_control", "zrepl_data", "zrepl_data", "m", "zrepl_control", "zrepl_data", "zrepl_data", "drop"} {
		want := rpc.CallInfo{Label: label, Method: "m", Identity: "tester", RemoteAddr: memAddr("client")}
		if i > 3 {
			want.Method = "drop"
		}
		if i%4 == 3 {
			want.Method = ""
		}
		if infos[i] != want {
			t.Errorf("intercepted %+v, want %+v", infos[i], want)
		}
	}
}

func TestSilentPeersKeepNobodyOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, c, l := srvStart(t, rpc.ServerConfig{MaxHandshakes: 4}, apiSetup)
		slow := srvPeer(t, l, "10.0.0.1:1")
		synctest.Wait()
		for i := range 100 { // they push each other out, not the slow one
			srvPeer(t, l, fmt.Sprint("10.0.0.2:", i))
			synctest.Wait()
		}
		check(t, c.Call(t.Context(), "echo", new(text), new(text)))
		say(t, slow, banner+label("echo"))
		expect(t, slow, answer)
		say(t, slow, "hello")
		expect(t, slow, "hello")
		if stats := s.Stats(); stats.HandshakesRefused < 96 || stats.OpenConns != 2 {
			t.Errorf("%+v", stats)
		}
		start := time.Now()
		check(t, s.Close())
		if took := time.Since(start); took > time.Second {
			t.Errorf("Close waited %v for silent peers", took)
		}
	})
}

func TestOneDeadlineForTheWholeHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _, l := srvStart(t, rpc.ServerConfig{HandshakeTimeout: 3 * time.Second}, apiSetup)
		stuck := &rpc.Listener{Listener: newMemListener(), Authenticate: func(ctx context.Context, c net.Conn) (net.Conn, string, error) {
			_, err := c.Read(make([]byte, 1)) // is unblocked at the deadline
			<-ctx.Done()
			return nil, "", err
		}}
		serve(t, s, stuck)
		start := time.Now()
		conns := []net.Conn{srvPeer(t, l, "a"), srvPeer(t, l, "b"), srvPeer(t, l, "c"), srvPeer(t, stuck.Listener.(*memListener), "d")}
		go func() {
			for _, b := range []byte(banner[:20]) { // a byte at a time gains nothing
				conns[1].Write([]byte{b})
				time.Sleep(time.Second)
			}
		}()
		say(t, conns[2], banner+"echo")
		for i, conn := range conns {
			io.Copy(io.Discard, conn)
			if took := time.Since(start); took < 3*time.Second || took > 5*time.Second {
				t.Errorf("peer %d was cut after %v", i, took)
			}
		}
		time.Sleep(time.Minute)
		if stats := s.Stats(); stats.HandshakesRefused != 4 || stats.OpenConns != 0 {
			t.Errorf("%+v", stats)
		}
	})
}

func TestLimitsAreRefusedAsResourceExhausted(t *testing.T) {
	for name, config := range map[string]rpc.ServerConfig{
		"MaxConns": {MaxConns: 2}, "MaxConnsPerClient": {MaxConnsPerClient: 2}, "MaxHandlers": {MaxHandlers: 2},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, c, _ := srvStart(t, config, func(s *rpc.Server) {
					apiSetup(s)
					s.HandleLabel("hold", func(_ context.Context, conn net.Conn) { io.Copy(io.Discard, conn) })
				})
				other := newMemListener()
				serve(t, s, &rpc.Listener{Listener: other, Authenticate: func(_ context.Context, c net.Conn) (net.Conn, string, error) {
					return c, "other", nil
				}})
				o := rpc.NewClient(other, rpc.ClientConfig{})
				defer o.Close()
				held, err := c.Dial(t.Context(), "hold")
				check(t, err)
				second, err := c.Dial(t.Context(), "hold")
				check(t, err)
				defer second.Close()
				apiEach(t.Context(), c, "echo", new(text), func(kind string, err error) {
					if rpc.CodeOf(err) != rpc.ResourceExhausted {
						t.Errorf("%s: %v", kind, err)
					}
				})
				if _, err := c.Dial(t.Context(), "hold"); rpc.CodeOf(err) != rpc.ResourceExhausted {
					t.Errorf("label: %v", err)
				}
				if err := o.Call(t.Context(), "echo", new(text), new(text)); (err == nil) != (name == "MaxConnsPerClient") {
					t.Errorf("another client: %v", err)
				}
				held.Close()
				synctest.Wait()
				time.Sleep(time.Minute) // the back-off
				check(t, c.Call(t.Context(), "echo", new(text), new(text)))
			})
		})
	}
}

func TestAHandlersPlaceIsFreeBeforeItsReply(t *testing.T) {
	for _, tr := range transports {
		t.Run(tr.name, func(t *testing.T) {
			l, connecter := tr.make(t)
			s := rpc.NewServer(nil, rpc.ServerConfig{MaxHandlers: 1})
			apiSetup(s)
			serve(t, s, l)
			var mu sync.Mutex // one request at a time
			var wg sync.WaitGroup
			defer wg.Wait()
			for range 4 {
				c := rpc.NewClient(connecter, rpc.ClientConfig{})
				t.Cleanup(func() { c.Close() })
				wg.Go(func() {
					for i := range 100 {
						mu.Lock()
						var err error
						switch i % 3 {
						case 0:
							err = c.Call(t.Context(), "echo", new(text), new(text))
						case 1:
							err = c.Upload(t.Context(), "put", new(text), strings.NewReader("abc"), new(text))
						case 2:
							var stream io.ReadCloser
							if stream, err = c.Download(t.Context(), "get", textOf("10 10"), new(text)); err == nil {
								_, err = io.ReadAll(stream)
								stream.Close()
							}
						}
						mu.Unlock()
						if err != nil {
							t.Errorf("request %d: %v", i, err)
						}
					}
				})
			}
		})
	}
}

// ---- Shutdown and Close -------------------------------------------------------------------------------------------

// srvFailing is a listener whose Accept fails a few times first.
type srvFailing struct {
	*memListener
	failures int
}

func (l *srvFailing) Accept() (net.Conn, error) {
	if l.failures--; l.failures >= 0 {
		return nil, errors.New("too many open files")
	}
	return l.memListener.Accept()
}

func TestAcceptErrorsDoNotEndServe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newMemListener()
		listener := l.listener()
		listener.Listener = &srvFailing{l, 10}
		s := rpc.NewServer(nil, rpc.ServerConfig{})
		apiSetup(s)
		served := make(chan error, 1)
		start := time.Now()
		go func() { served <- s.Serve(listener) }()
		c := rpc.NewClient(l, rpc.ClientConfig{HandshakeTimeout: time.Minute})
		check(t, c.Call(t.Context(), "echo", new(text), new(text)))
		if waited := time.Since(start); waited < 100*time.Millisecond || waited > 30*time.Second {
			t.Errorf("ten failures took %v", waited)
		}
		check(t, l.Close())
		if err := <-served; err == nil || errors.Is(err, rpc.ErrClosed) && !errors.Is(err, net.ErrClosed) {
			t.Errorf("Serve on a closed listener: %v", err)
		}
		check(t, c.Call(t.Context(), "echo", new(text), new(text))) // what is connected goes on
		check(t, errors.Join(c.Close(), s.Close()))
	})
}

func TestOnlyGoodIdentitiesComeIn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := rpc.NewServer(nil, rpc.ServerConfig{})
		rpc.HandleCall(s, "who", func(ctx context.Context, _ *text) (*text, error) { return textOf(rpc.ClientIdentity(ctx)), nil })
		try := func(identity string, fail func() error) (string, error) {
			l := newMemListener()
			serve(t, s, &rpc.Listener{Listener: l, Authenticate: func(_ context.Context, c net.Conn) (net.Conn, string, error) {
				return c, identity, fail()
			}})
			c := rpc.NewClient(l, rpc.ClientConfig{})
			defer c.Close()
			var res text
			err := c.Call(t.Context(), "who", new(text), &res)
			return string(res), err
		}
		for _, identity := range []string{"a", "...", "A-b_c.d:0", "fe80::1", strings.Repeat("x", 255)} {
			if got, err := try(identity, func() error { return nil }); got != identity || err != nil {
				t.Errorf("%q came in as %q, %v", identity, got, err)
			}
		}
		for _, identity := range []string{"", ".", "..", "a/b", "a b", "a\x00", "a\n", "é", "a%", "\\", strings.Repeat("x", 256)} {
			if _, err := try(identity, func() error { return nil }); rpc.CodeOf(err) != rpc.PermissionDenied {
				t.Errorf("%q: %v", identity, err)
			}
		}
		for want, fail := range map[rpc.Code]func() error{
			rpc.PermissionDenied: func() error { return errors.New("no") },
			rpc.Unauthenticated:  func() error { return rpc.Errorf(rpc.Unauthenticated, "who?") },
			rpc.Internal:         func() error { panic("boom") },
		} {
			if _, err := try("a", fail); rpc.CodeOf(err) != want && (want != rpc.Internal || err == nil) {
				t.Errorf("%v: %v", want, err)
			}
		}
	})
}

func TestMisuseIsAnErrorAtOnce(t *testing.T) {
	s, l := rpc.NewServer(nil, rpc.ServerConfig{}), newMemListener()
	for name, listener := range map[string]*rpc.Listener{
		"nil": nil, "no Authenticate": {Listener: l}, "no Listener": {Authenticate: l.listener().Authenticate},
	} {
		if err := s.Serve(listener); err == nil || errors.Is(err, rpc.ErrClosed) {
			t.Errorf("Serve of a Listener, %s: %v", name, err)
		}
	}
	if l, err := rpc.ListenTCP("127.0.0.1:0", nil); err == nil {
		l.Close()
		t.Error("ListenTCP takes a nil map")
	}
	if l, err := rpc.ListenTLS("127.0.0.1:0", nil); err == nil {
		l.Close()
		t.Error("ListenTLS takes a nil configuration")
	}
	for name, f := range map[string]func(){
		"HandleCall":  func() { rpc.HandleCall[text, *text, *text](s, "m", nil) },
		"HandleLabel": func() { s.HandleLabel("m", nil) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s takes a nil function", name)
				}
			}()
			f()
		}()
	}
	check(t, s.Close())
}

func TestServeOnSeveralListeners(t *testing.T) {
	noLeak(t)
	s := rpc.NewServer(nil, rpc.ServerConfig{})
	apiSetup(s)
	served := make(chan error, len(transports))
	for _, tr := range transports {
		l, connecter := tr.make(t)
		go func() { served <- s.Serve(l) }()
		c := rpc.NewClient(connecter, rpc.ClientConfig{})
		defer c.Close()
		check(t, c.Call(t.Context(), "echo", new(text), new(text)))
	}
	check(t, errors.Join(s.Close(), s.Close(), s.Shutdown(t.Context())))
	for range transports {
		if err := <-served; !errors.Is(err, rpc.ErrClosed) {
			t.Errorf("Serve after Close: %v", err)
		}
	}
	l := newMemListener()
	if err := s.Serve(l.listener()); !errors.Is(err, rpc.ErrClosed) {
		t.Errorf("Serve on a closed server: %v", err)
	}
	if _, err := l.Accept(); err == nil {
		t.Error("a listener given to a closed server stays open")
	}
}

// srvRunning is a request of each kind that waits in its handler until release.
type srvRunning struct {
	release chan bool
	results map[string]chan error // by kind, what the client sees
	ended   chan error            // what the handlers' ctx say at the end
}

func (r *srvRunning) setup(s *rpc.Server) {
	apiSetup(s)
	r.release, r.ended = make(chan bool), make(chan error, 4)
	wait := func(ctx context.Context) error {
		select {
		case <-r.release:
		case <-ctx.Done():
			time.Sleep(time.Second) // Close waits for that
		}
		r.ended <- ctx.Err()
		return ctx.Err()
	}
	rpc.HandleCall(s, "wait", func(ctx context.Context, req *text) (*text, error) { return req, wait(ctx) })
	rpc.HandleDownload(s, "wait", func(ctx context.Context, req *text) (*text, io.ReadCloser, error) {
		return req, io.NopCloser(io.MultiReader(strings.NewReader("abc"), apiReader(func([]byte) (int, error) {
			if err := wait(ctx); err != nil {
				return 0, err
			}
			return 0, io.EOF
		}))), nil
	})
	rpc.HandleUpload(s, "wait", func(ctx context.Context, req *text, stream io.Reader) (*text, error) {
		_, err := io.Copy(io.Discard, stream)
		return req, errors.Join(err, wait(ctx))
	})
	s.HandleLabel("wait", func(ctx context.Context, conn net.Conn) {
		if wait(ctx) == nil {
			io.WriteString(conn, "done")
		}
	})
}

func (r *srvRunning) start(t *testing.T, c *rpc.Client) {
	r.results = map[string]chan error{}
	for kind, do := range map[string]func() error{
		"call": func() error { return c.Call(context.Background(), "wait", new(text), new(text)) },
		"upload": func() error {
			return c.Upload(context.Background(), "wait", new(text), strings.NewReader("abc"), new(text))
		},
		"download": func() error {
			stream, err := c.Download(context.Background(), "wait", new(text), new(text))
			if err == nil {
				defer stream.Close()
				_, err = io.Copy(io.Discard, stream)
			}
			return err
		},
		"label": func() error {
			conn, err := c.Dial(context.Background(), "wait")
			if err == nil {
				defer conn.Close()
				_, err = io.ReadFull(conn, make([]byte, 4))
			}
			return err
		},
	} {
		result := make(chan error, 1)
		r.results[kind] = result
		go func() { result <- do() }()
	}
	synctest.Wait()
}

func TestShutdownLetsRunningWorkEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r srvRunning
		s, c, l := srvStart(t, rpc.ServerConfig{}, r.setup)
		r.start(t, c)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Shutdown with a ctx that ends: %v", err)
		}
		down := make(chan error)
		go func() { down <- s.Shutdown(context.Background()) }()
		synctest.Wait()
		if _, err := l.Accept(); err == nil {
			t.Error("it still listens")
		}
		apiEach(t.Context(), c, "echo", new(text), func(kind string, err error) {
			if rpc.CodeOf(err) != rpc.Unavailable {
				t.Errorf("a new %s: %v", kind, err)
			}
		})
		close(r.release)
		for kind, result := range r.results {
			if err := <-result; err != nil {
				t.Errorf("%s: %v", kind, err)
			}
		}
		check(t, <-down)
		if stats := s.Stats(); stats.OpenConns != 0 {
			t.Errorf("%+v", stats)
		}
	})
}

func TestCloseEndsRunningWork(t *testing.T) {
	for _, side := range []string{"server", "client"} {
		t.Run(side, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var r srvRunning
				s, c, _ := srvStart(t, rpc.ServerConfig{}, r.setup)
				r.start(t, c)
				if side == "server" {
					check(t, errors.Join(s.Close(), s.Close()))
					if n := len(r.ended); n != 4 {
						t.Errorf("%d of 4 handlers have ended when Close returns", n)
					}
				} else {
					check(t, errors.Join(c.Close(), c.Close()))
					apiEach(t.Context(), c, "echo", new(text), func(kind string, err error) {
						if !errors.Is(err, rpc.ErrClosed) {
							t.Errorf("a new %s: %v", kind, err)
						}
					})
				}
				n := 4
				for kind, result := range r.results {
					if kind == "label" && side == "client" {
						n-- // that connection is the user's
						continue
					}
					if err := <-result; err == nil || side == "client" && !errors.Is(err, rpc.ErrClosed) {
						t.Errorf("%s: %v", kind, err)
					}
				}
				for range n {
					if err := <-r.ended; err == nil {
						t.Error("the ctx of a handler did not end")
					}
				}
				close(r.release)
			})
		})
	}
}

func TestCloseAtRandomMoments(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	noLeak(t)
	defer time.AfterFunc(2*time.Minute, func() { panic(fmt.Sprint("something does not return; seed ", seed)) }).Stop()
	for start := time.Now(); time.Since(start) < 2*time.Second; {
		l, connecter := transports[random.IntN(3)].make(t)
		s := rpc.NewServer(nil, rpc.ServerConfig{})
		apiSetup(s)
		rpc.HandleDownload(s, "wait", func(_ context.Context, req *text) (*text, io.ReadCloser, error) {
			return req, apiBlocked("abc"), nil
		})
		rpc.HandleCall(s, "wait", func(ctx context.Context, req *text) (*text, error) { <-ctx.Done(); return req, ctx.Err() })
		served := make(chan error)
		go func() { served <- s.Serve(l) }()
		c := rpc.NewClient(connecter, rpc.ClientConfig{})
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for range 10 {
			ops := random.Perm(8)
			wg.Go(func() {
				for _, op := range ops {
					srvOperation(ctx, c, op)
				}
			})
		}
		ends := []func(){func() { c.Close() }, func() { s.Close() }, func() { s.Shutdown(ctx) }, cancel}
		for _, i := range random.Perm(len(ends)) {
			moment := time.Duration(random.IntN(10_000)) * time.Microsecond
			wg.Go(func() { <-time.After(moment); ends[i]() })
		}
		wg.Wait()
		if err := <-served; !errors.Is(err, rpc.ErrClosed) {
			t.Errorf("Serve: %v", err)
		}
	}
}

func srvOperation(ctx context.Context, c *rpc.Client, op int) {
	switch op {
	case 0:
		c.Call(ctx, "echo", new(text), new(text))
	case 1:
		c.Call(ctx, "wait", new(text), new(text))
	case 2:
		if stream, err := c.Download(ctx, "wait", new(text), new(text)); err == nil {
			io.Copy(io.Discard, stream)
			stream.Close()
		}
	case 3:
		c.Upload(ctx, "echo", new(text), apiEndless, new(text))
	case 4:
		c.Upload(ctx, "echo", new(text), apiBlocked("abc"), new(text))
	case 5:
		if conn, err := c.Dial(ctx, "echo"); err == nil {
			io.WriteString(conn, "abc")
			io.CopyN(io.Discard, conn, 3)
			conn.Close()
		}
	case 6:
		c.WaitForConnectivity(ctx)
	case 7:
		c.ResetConnectBackoff()
		c.Stats()
	}
}

// ---- Transports ---------------------------------------------------------------------------------------------------

// Addresses.

// transportAddr is the address of a transportAddrConn. It is no *net.TCPAddr.
type transportAddr string

func (transportAddr) Network() string  { return "tcp" }
func (a transportAddr) String() string { return string(a) }

type transportAddrConn struct {
	net.Conn
	remote net.Addr
}

func (c transportAddrConn) RemoteAddr() net.Addr { return c.remote }

func transportTCP(addr string) net.Addr {
	a, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		panic(err)
	}
	return a
}

func TestTransportTCPIdentities(t *testing.T) {
	clients := map[string]string{
		"10.1.2.3":            "db7",
		"10.1.0.0/16":         "site-*",
		"10.0.0.0/8":          "ten",
		"10.1.2.4/32":         "host-*",
		"192.168.7.9/24":      "lan-*", // host bits do not matter
		"::ffff:172.16.0.1":   "mapped",
		"::ffff:172.17.0/112": "",
		"2001:db8::/32":       "doc-*",
		"2001:db8::1":         "one",
		"fe80::/10":           "link-*",
		"fe80::1":             "anywhere",
		"fe80::1%eth0":        "here",
		"*":                   "",
	}
	delete(clients, "*")
	delete(clients, "::ffff:172.17.0/112")
	clients["::ffff:172.17.0.0/112"] = "mapped-*"
	l := transportListenTCP(t, clients)
	for _, c := range []struct {
		remote net.Addr
		want   string // "" for refused
		text   string // in the refusal
	}{
		{transportTCP("10.1.2.3:40000"), "db7", ""},
		{transportTCP("10.1.2.4:40000"), "host-10.1.2.4", ""},
		{transportTCP("10.1.2.5:40000"), "site-10.1.2.5", ""},
		{transportTCP("10.2.0.1:40000"), "ten", ""},
		{transportTCP("192.168.7.200:1"), "lan-192.168.7.200", ""},
		{transportTCP("192.168.8.1:1"), "", `client "192.168.8.1" is not allowed`},
		{transportAddr("10.1.2.3:1"), "db7", ""},
		{transportAddr("10.1.2.3"), "db7", ""},
		{transportAddr("[::ffff:10.1.2.3]:1"), "db7", ""},
		{&net.TCPAddr{IP: net.ParseIP("10.1.2.3").To16(), Port: 1}, "db7", ""},
		{transportTCP("172.16.0.1:1"), "mapped", ""},
		{transportAddr("[::ffff:172.16.0.1]:1"), "mapped", ""},
		{transportTCP("172.17.3.4:1"), "mapped-172.17.3.4", ""},
		{transportTCP("172.18.0.1:1"), "", `client "172.18.0.1" is not allowed`},
		{transportTCP("[2001:db8::1]:1"), "one", ""},
		{transportTCP("[2001:db8::2]:1"), "doc-2001:db8::2", ""},
		{transportAddr("[fe80::1%eth0]:1"), "here", ""},
		{transportAddr("[fe80::1%eth1]:1"), "anywhere", ""},
		{transportAddr("[fe80::1]:1"), "anywhere", ""},
		{transportAddr("[fe80::2%eth0]:1"), "link-fe80::2-eth0", ""},
		{transportAddr("[fe80::2%e/0]:1"), "", `client "fe80::2%e/0" is not allowed`},
		{transportAddr("[fe80::2%" + strings.Repeat("e", 300) + "]:1"), "", "is not allowed"},
		{transportAddr("@pipe\n"), "", `client "@pipe\n" is not allowed`},
		{transportAddr(""), "", "is not allowed"},
		{nil, "", "is not allowed"},
	} {
		conn := transportAddrConn{nil, c.remote}
		secured, identity, err := l.Authenticate(t.Context(), conn)
		if secured != net.Conn(conn) {
			t.Errorf("%v: the connection returned is another one", c.remote)
		}
		if identity != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%v: identity %q, %v; want %q", c.remote, identity, err, c.want)
		}
		if c.want == "" {
			transportRefused(t, err, c.text)
		}
	}
}

func transportListenTCP(t *testing.T, clients map[string]string) *rpc.Listener {
	t.Helper()
	l, err := rpc.ListenTCP("127.0.0.1:0", clients)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// transportRefused checks a refusal: PermissionDenied, and these words.
func transportRefused(t *testing.T, err error, text string) {
	t.Helper()
	var refusal *rpc.Error
	if !errors.As(err, &refusal) || refusal.Code != rpc.PermissionDenied || !strings.Contains(refusal.Message, text) {
		t.Errorf("got %v, want a refusal with %q", err, text)
	}
}

func TestTransportTCPSinglesWinOverAll(t *testing.T) {
	l := transportListenTCP(t, map[string]string{"0.0.0.0/0": "v4-*", "::/0": "v6-*", "::1": "local"})
	for remote, want := range map[string]string{
		"1.2.3.4:1": "v4-1.2.3.4", "[::ffff:1.2.3.4]:1": "v4-1.2.3.4", "[::1]:1": "local", "[::2]:1": "v6-::2",
	} {
		_, identity, err := l.Authenticate(t.Context(), transportAddrConn{nil, transportAddr(remote)})
		if identity != want || err != nil {
			t.Errorf("%s: %q, %v; want %q", remote, identity, err, want)
		}
	}
}

func TestTransportTCPBadEntriesAreErrorsAtOnce(t *testing.T) {
	long := strings.Repeat("x", 256)
	for _, c := range []struct {
		clients map[string]string
		want    []string
	}{
		{nil, []string{"no clients"}},
		{map[string]string{}, []string{"no clients"}},
		{map[string]string{"10.0.0": "a"}, []string{`"10.0.0"`}},
		{map[string]string{"db7.example.org": "a"}, []string{`"db7.example.org"`}},
		{map[string]string{"10.0.0.1:80": "a"}, []string{`"10.0.0.1:80"`}},
		{map[string]string{" 10.0.0.1": "a"}, []string{`" 10.0.0.1"`}},
		{map[string]string{"": "a"}, []string{`""`}},
		{map[string]string{"10.0.0.0/33": "a"}, []string{`"10.0.0.0/33"`}},
		{map[string]string{"10.0.0.0/-1": "a"}, []string{`"10.0.0.0/-1"`}},
		{map[string]string{"fe80::%eth0/64": "a"}, []string{`"fe80::%eth0/64"`}},
		{map[string]string{"::ffff:10.0.0.0/95": "a"}, []string{`"::ffff:10.0.0.0/95"`, "96"}},
		{map[string]string{"10.0.0.1": ""}, []string{`"10.0.0.1"`, `""`}},
		{map[string]string{"10.0.0.1": ".."}, []string{`"10.0.0.1"`, `".."`}},
		{map[string]string{"10.0.0.1": "a/b"}, []string{`"10.0.0.1"`, `"a/b"`}},
		{map[string]string{"10.0.0.1": "lan-*"}, []string{`"10.0.0.1"`, `"lan-*"`}},
		{map[string]string{"10.0.0.0/24": "lan *"}, []string{`"10.0.0.0/24"`, `"lan *"`}},
		{map[string]string{"10.0.0.0/24": long}, []string{`"10.0.0.0/24"`}},
		{map[string]string{"10.0.0.0/24": long[:241] + "*"}, []string{`"10.0.0.0/24"`}},
		{map[string]string{"::/0": long[:217] + "*"}, []string{`"::/0"`}},
		{map[string]string{"10.0.0.1/24": "a", "10.0.0.0/24": "b"}, []string{`"10.0.0.1/24"`, `"10.0.0.0/24"`}},
		{map[string]string{"10.0.0.1/32": "a", "10.0.0.1": "b"}, []string{`"10.0.0.1/32"`, `"10.0.0.1"`}},
		{map[string]string{"::ffff:10.0.0.1": "a", "10.0.0.1": "a"}, []string{`"::ffff:10.0.0.1"`, `"10.0.0.1"`}},
		{map[string]string{"fe80::1%a": "a", "fe80:0::1%a": "a", "fe80::1": "b"}, []string{`"fe80::1%a"`, `"fe80:0::1%a"`}},
	} {
		l, err := rpc.ListenTCP("127.0.0.1:0", c.clients)
		if err == nil {
			l.Close()
			t.Errorf("%v: no error", c.clients)
			continue
		}
		transportErrorHas(t, err, c.want...)
	}
	for _, clients := range []map[string]string{
		{"10.0.0.0/24": long[:240] + "*"}, {"::/0": long[:216] + "*"}, {"10.0.0.0/24": "*"}, {"10.0.0.1": long[:255]},
		{"fe80::1%a": "a", "fe80::1%b": "b"},
	} {
		transportListenTCP(t, clients)
	}
}

// transportErrorHas checks that an error is this package's and says all of that.
func transportErrorHas(t *testing.T, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one with %q", words)
	}
	for _, word := range append(words, "rpc: ") {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("error %q does not say %q", err, word)
		}
	}
}

func TestTransportTCPErrorsNameTheAddress(t *testing.T) {
	_, err := (&rpc.TCPConnecter{}).Connect(t.Context())
	transportErrorHas(t, err, "Addr is empty")

	l := transportListenTCP(t, map[string]string{"127.0.0.1": "me"})
	addr := l.Addr().String()
	_, err = rpc.ListenTCP(addr, map[string]string{"127.0.0.1": "me"})
	transportErrorHas(t, err, "listen on "+addr)
	var netErr *net.OpError
	if !errors.As(err, &netErr) {
		t.Errorf("%v does not wrap the error of package net", err)
	}

	l.Close()
	_, err = (&rpc.TCPConnecter{Addr: addr}).Connect(t.Context())
	if !strings.Contains(err.Error(), addr) {
		t.Errorf("%v does not name %s", err, addr)
	}
	if !errors.As(err, &netErr) || rpc.CodeOf(err) != rpc.Unavailable {
		t.Errorf("%v: code %v", err, rpc.CodeOf(err))
	}

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err = (&rpc.TCPConnecter{Addr: addr}).Connect(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("%v is not context.Canceled", err)
	}
	ctx, cancel = context.WithDeadline(t.Context(), time.Unix(1, 0))
	defer cancel()
	_, err = (&rpc.TCPConnecter{Addr: addr}).Connect(ctx)
	var timeout net.Error
	if !errors.As(err, &timeout) || !timeout.Timeout() || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v is no timeout", err)
	}
}

func TestTransportTCPConnects(t *testing.T) {
	l := transportListenTCP(t, map[string]string{"127.0.0.0/8": "lo-*"})
	client, server := transportConnect(t, l, &rpc.TCPConnecter{Addr: l.Addr().String()})
	if server.err != nil || server.identity != "lo-127.0.0.1" {
		t.Fatalf("identity %q, %v", server.identity, server.err)
	}
	transportPingPong(t, client, server.conn)
}

// Both ends of a connection.

type transportServerEnd struct {
	conn     net.Conn // what Authenticate returned
	identity string
	err      error
}

// transportConnect connects, accepts and authenticates. Both ends are closed with the test.
func transportConnect(t *testing.T, l *rpc.Listener, c rpc.Connecter) (net.Conn, transportServerEnd) {
	t.Helper()
	client, server, err := transportTry(t, l, c)
	if err != nil {
		t.Fatalf("client: %v; server: %v", err, server.err)
	}
	return client, server
}

func transportTry(t *testing.T, l *rpc.Listener, c rpc.Connecter) (net.Conn, transportServerEnd, error) {
	t.Helper()
	accepted := transportAccept(t, l)
	client, err := c.Connect(t.Context())
	if err == nil {
		t.Cleanup(func() { client.Close() })
	}
	return client, <-accepted, err
}

// transportAccept authenticates the next connection, and closes it at once if that fails, as a server does.
func transportAccept(t *testing.T, l *rpc.Listener) <-chan transportServerEnd {
	accepted := make(chan transportServerEnd, 1)
	go func() { // ends with the connection, or with the listener
		conn, err := l.Accept()
		if err != nil {
			accepted <- transportServerEnd{err: err}
			return
		}
		t.Cleanup(func() { conn.Close() })
		var end transportServerEnd
		end.conn, end.identity, end.err = l.Authenticate(t.Context(), conn)
		if end.err != nil {
			end.conn.Write([]byte("refused"))
			end.conn.Close()
		}
		accepted <- end
	}()
	return accepted
}

func transportPingPong(t *testing.T, a, b net.Conn) {
	t.Helper()
	for _, ends := range [][2]net.Conn{{a, b}, {b, a}} {
		if _, err := ends[0].Write([]byte("ping")); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 4)
		if _, err := io.ReadFull(ends[1], got); err != nil || string(got) != "ping" {
			t.Fatalf("%q, %v", got, err)
		}
	}
}

// Certificates.

type transportCA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func transportKey() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		panic(err)
	}
	return key
}

// transportTemplate is a certificate for both sides, that is valid now.
func transportTemplate(name string) *x509.Certificate {
	serial, _ := crand.Int(crand.Reader, big.NewInt(1<<62))
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
}

func transportNewCA() *transportCA {
	template := transportTemplate("test CA")
	template.IsCA, template.BasicConstraintsValid = true, true
	template.KeyUsage |= x509.KeyUsageCertSign
	template.ExtKeyUsage = nil
	ca := &transportCA{template, transportKey()}
	ca.cert = ca.issue(template, ca.key)
	return ca
}

func (ca *transportCA) issue(template *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	der, err := x509.CreateCertificate(crand.Reader, template, ca.cert, &key.PublicKey, ca.key)
	if err != nil {
		panic(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	return cert
}

// make issues a certificate that is the template after change.
func (ca *transportCA) make(name string, change func(*x509.Certificate)) tls.Certificate {
	template, key := transportTemplate(name), transportKey()
	if change != nil {
		change(template)
	}
	cert := ca.issue(template, key)
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
}

func (ca *transportCA) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	return pool
}

// serverConfig has a certificate for 127.0.0.1 and localhost.
func (ca *transportCA) serverConfig() *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{ca.make("server", transportLocal)},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    ca.pool(),
	}
}

func transportLocal(c *x509.Certificate) {
	c.DNSNames, c.IPAddresses = []string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1)}
}

func (ca *transportCA) clientConfig(cert ...tls.Certificate) *tls.Config {
	return &tls.Config{Certificates: cert, RootCAs: ca.pool()}
}

func transportListenTLS(t *testing.T, config *tls.Config, identities ...string) *rpc.Listener {
	t.Helper()
	l, err := rpc.ListenTLS("127.0.0.1:0", config, identities...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func TestTransportTLSClientCertificates(t *testing.T) {
	ca, other := transportNewCA(), transportNewCA()
	named := func(name string) tls.Certificate { return ca.make(name, nil) }
	with := func(change func(*x509.Certificate)) tls.Certificate { return ca.make("db7", change) }
	var unknownAuthority x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	for _, c := range []struct {
		name       string
		cert       []tls.Certificate
		identities []string
		identity   string // "" for an error
		refused    string // what the refusal says
		as         any    // what the handshake's error is
	}{
		{name: "any", cert: []tls.Certificate{named("db7")}, identity: "db7"},
		{name: "listed", cert: []tls.Certificate{named("db7")}, identities: []string{"db6", "db7"}, identity: "db7"},
		{name: "unlisted", cert: []tls.Certificate{named("db7")}, identities: []string{"db", "DB7", "db77"}, refused: `client "db7" is not allowed`},
		{name: "longest name", cert: []tls.Certificate{named(strings.Repeat("x", 255))}, identity: strings.Repeat("x", 255)},
		{name: "dots", cert: []tls.Certificate{named("..")}, refused: `client ".." is not allowed`},
		{name: "slash", cert: []tls.Certificate{named("a/b")}, refused: `client "a/b" is not allowed`},
		{name: "control", cert: []tls.Certificate{named("a\x00\x1b\n")}, refused: `client "a\x00\x1b\n" is not allowed`},
		{name: "not ASCII", cert: []tls.Certificate{named("dé")}, refused: `client "d\u00e9" is not allowed`},
		{name: "256", cert: []tls.Certificate{named(strings.Repeat("x", 256))}, refused: "is not allowed"},
		{name: "64 KiB", cert: []tls.Certificate{named(strings.Repeat("x", 64<<10))}, refused: `xxx"... is not allowed`},
		{name: "no name", cert: []tls.Certificate{named("")}, refused: "no Common Name"},
		{name: "DNS name", identity: "first.example", cert: []tls.Certificate{ca.make("", func(c *x509.Certificate) {
			c.DNSNames = []string{"first.example", "second.example"}
		})}},
		{name: "DNS name beside a bad name", refused: `client "a/b" is not allowed`, cert: []tls.Certificate{ca.make("a/b", func(c *x509.Certificate) {
			c.DNSNames = []string{"first.example"}
		})}},
		{name: "second DNS name listed", identities: []string{"second.example"}, refused: `client "first.example" is not allowed`,
			cert: []tls.Certificate{ca.make("", func(c *x509.Certificate) { c.DNSNames = []string{"first.example", "second.example"} })}},
		{name: "none"},
		{name: "other CA", cert: []tls.Certificate{other.make("db7", nil)}, as: &unknownAuthority},
		{name: "expired", as: &invalid, cert: []tls.Certificate{with(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })}},
		{name: "not yet valid", as: &invalid, cert: []tls.Certificate{with(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) })}},
		{name: "usage", as: &invalid, cert: []tls.Certificate{with(func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] })}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := transportListenTLS(t, ca.serverConfig(), c.identities...)
			config := ca.clientConfig()
			config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				if len(c.cert) == 0 {
					return new(tls.Certificate), nil
				}
				return &c.cert[0], nil // even if the server did not ask for it
			}
			client, server := transportConnect(t, l, &rpc.TLSConnecter{Addr: l.Addr().String(), Config: config})
			if server.identity != c.identity || (server.err == nil) != (c.identity != "") {
				t.Fatalf("identity %q, %v", server.identity, server.err)
			}
			if c.identity != "" {
				transportPingPong(t, client, server.conn)
				return
			}
			text, err := io.ReadAll(io.LimitReader(client, 7))
			if c.refused != "" {
				transportRefused(t, server.err, c.refused)
				if string(text) != "refused" || err != nil {
					t.Errorf("the refusal did not arrive: %q, %v", text, err)
				}
			} else {
				transportErrorHas(t, server.err, "TLS handshake", "certificate")
				if c.as != nil && !errors.As(server.err, c.as) {
					t.Errorf("%v is no %T", server.err, c.as)
				}
				if err == nil || len(text) > 0 {
					t.Errorf("the client reads %q, %v", text, err)
				}
			}
		})
	}
}

func TestTransportTLSAnyVerifiesInEveryCase(t *testing.T) {
	ca := transportNewCA()
	lax := ca.serverConfig()
	lax.ClientAuth = tls.RequireAnyClientCert
	strict := ca.serverConfig()
	strict.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return lax, nil }
	l := transportListenTLS(t, strict)
	config := ca.clientConfig(transportNewCA().make("db7", nil))
	_, server := transportConnect(t, l, &rpc.TLSConnecter{Addr: l.Addr().String(), Config: config})
	if rpc.CodeOf(server.err) != rpc.Unauthenticated || server.identity != "" {
		t.Errorf("%q, %v", server.identity, server.err)
	}
}

func TestTransportTLSServerCertificates(t *testing.T) {
	ca := transportNewCA()
	var unknownAuthority x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	var hostname x509.HostnameError
	for _, c := range []struct {
		name       string
		cert       tls.Certificate
		serverName string
		as         any // nil: fine
	}{
		{name: "address", cert: ca.make("", transportLocal)},
		{name: "name", cert: ca.make("", transportLocal), serverName: "localhost"},
		{name: "wrong name", cert: ca.make("", transportLocal), serverName: "db8.example", as: &hostname},
		{name: "wrong address", cert: ca.make("127.0.0.1", nil), as: &hostname},
		{name: "other CA", cert: transportNewCA().make("", transportLocal), as: &unknownAuthority},
		{name: "expired", as: &invalid, cert: ca.make("", func(c *x509.Certificate) {
			transportLocal(c)
			c.NotAfter = time.Now().Add(-time.Minute)
		})},
		{name: "usage", as: &invalid, cert: ca.make("", func(c *x509.Certificate) {
			transportLocal(c)
			c.ExtKeyUsage = c.ExtKeyUsage[1:]
		})},
	} {
		t.Run(c.name, func(t *testing.T) {
			server := ca.serverConfig()
			server.Certificates = []tls.Certificate{c.cert}
			l := transportListenTLS(t, server)
			config := ca.clientConfig(ca.make("db7", nil))
			config.ServerName = c.serverName
			_, end, err := transportTry(t, l, &rpc.TLSConnecter{Addr: l.Addr().String(), Config: config})
			if (err == nil) != (c.as == nil) || (end.err == nil) != (c.as == nil) {
				t.Fatalf("client: %v; server: %v", err, end.err)
			}
			if c.as == nil {
				return
			}
			transportErrorHas(t, err, "TLS handshake with "+l.Addr().String(), "certificate")
			if !errors.As(err, c.as) || rpc.CodeOf(err) != rpc.Unavailable {
				t.Errorf("%v is no %T, or of code %v", err, c.as, rpc.CodeOf(err))
			}
		})
	}
}

// transportAnswer serves one connection: it writes the answer after it has read something, and closes.
func transportAnswer(t *testing.T, answer string) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() { // ends with its connection, or with the listener
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		conn.Read(make([]byte, 64<<10))
		io.WriteString(conn, answer)
	}()
	return l.Addr().String()
}

func TestTransportTLSClientSaysWhatTheServerSpeaks(t *testing.T) {
	ca := transportNewCA()
	for answer, want := range map[string]string{
		"HTTP/1.1 400 Bad Request\r\n\r\n": "the server seems to speak HTTP without TLS",
		"SSH-2.0-OpenSSH_9.9\r\n":          "the server seems to speak SSH",
		"ZREPL-RPC 1-1 refused\n":          "the server seems to speak ZREPL-RPC without TLS",
		"\x01\xff<>\x02 nonsense":          `something other than TLS, which begins with "\x01\xff<>\x02"`,
		"":                                 "it may not speak TLS",
		"\x16\x03":                         "it may not speak TLS",
	} {
		addr := transportAnswer(t, answer)
		_, err := (&rpc.TLSConnecter{Addr: addr, Config: ca.clientConfig()}).Connect(t.Context())
		transportErrorHas(t, err, "TLS handshake with "+addr, want)
		if rpc.CodeOf(err) != rpc.Unavailable {
			t.Errorf("%v: code %v", err, rpc.CodeOf(err))
		}
	}
}

func TestTransportTLSServerSaysWhatTheClientSpeaks(t *testing.T) {
	ca := transportNewCA()
	for said, want := range map[string]string{
		"ZREPL-RPC 1-1 hb=5000\n":           "the client seems to speak ZREPL-RPC without TLS",
		"GET / HTTP/1.1\r\nHost: x\r\n\r\n": "the client seems to speak HTTP without TLS",
		"SSH-2.0-OpenSSH_9.9\r\n":           "the client seems to speak SSH",
		"":                                  "closed the connection",
	} {
		l := transportListenTLS(t, ca.serverConfig())
		accepted := transportAccept(t, l)
		conn, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, said)
		conn.(*net.TCPConn).CloseWrite()
		io.Copy(io.Discard, conn) // until the server has given it up
		conn.Close()
		end := <-accepted
		transportErrorHas(t, end.err, "TLS handshake: ", want)
		if _, ok := end.conn.(interface{ ConnectionState() tls.ConnectionState }); !ok {
			t.Errorf("after an error %T is returned", end.conn)
		}
	}
}

func TestTransportTLSHandshakeEndsWithItsContext(t *testing.T) {
	ca := transportNewCA()
	silent, err := net.Listen("tcp", "127.0.0.1:0") // the kernel connects; nobody accepts
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = (&rpc.TLSConnecter{Addr: silent.Addr().String(), Config: ca.clientConfig()}).Connect(ctx)
	transportErrorHas(t, err, silent.Addr().String())
	if !errors.Is(err, context.DeadlineExceeded) || strings.Contains(err.Error(), "may not speak") {
		t.Error(err)
	}

	l := transportListenTLS(t, ca.serverConfig())
	a, b := net.Pipe()
	defer a.Close()
	ctx, cancel = context.WithCancel(t.Context())
	cancel()
	if _, _, err := l.Authenticate(ctx, b); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestTransportTLSBadConfigsAreErrorsAtOnce(t *testing.T) {
	ca := transportNewCA()
	_, err := (&rpc.TLSConnecter{Addr: "192.0.2.1:1"}).Connect(t.Context())
	transportErrorHas(t, err, "192.0.2.1:1", "Config is nil")
	_, err = (&rpc.TLSConnecter{Config: ca.clientConfig()}).Connect(t.Context())
	transportErrorHas(t, err, "Addr is empty")

	listen := func(change func(*tls.Config), identities ...string) error {
		config := ca.serverConfig()
		change(config)
		l, err := rpc.ListenTLS("127.0.0.1:0", config, identities...)
		if err == nil {
			l.Close()
		}
		return err
	}
	_, err = rpc.ListenTLS("127.0.0.1:0", nil)
	transportErrorHas(t, err, "config is nil")
	for _, auth := range []tls.ClientAuthType{tls.NoClientCert, tls.RequestClientCert, tls.RequireAnyClientCert, tls.VerifyClientCertIfGiven} {
		transportErrorHas(t, listen(func(c *tls.Config) { c.ClientAuth = auth }), "RequireAndVerifyClientCert")
	}
	transportErrorHas(t, listen(func(c *tls.Config) { c.ClientCAs = nil }), "ClientCAs")
	transportErrorHas(t, listen(func(c *tls.Config) { c.Certificates = nil }), "certificate")
	same := func(*tls.Config) {}
	for _, bad := range []string{"", "..", "a/b", "*", strings.Repeat("x", 256)} {
		transportErrorHas(t, listen(same, "good", bad), "not a valid identity")
	}
	if err := listen(same, "good", "db:7_a.b-c"); err != nil {
		t.Error(err)
	}
	l := transportListenTLS(t, ca.serverConfig())
	_, err = rpc.ListenTLS(l.Addr().String(), ca.serverConfig())
	transportErrorHas(t, err, "listen on "+l.Addr().String())
}

// Files.

// transportFiles are the files of one side.
type transportFiles struct{ ca, cert, key string }

func transportWriteFiles(t *testing.T, ca *transportCA, cert tls.Certificate) transportFiles {
	t.Helper()
	dir := t.TempDir()
	f := transportFiles{filepath.Join(dir, "ca.pem"), filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")}
	transportWritePEM(t, f.ca, "CERTIFICATE", ca.cert.Raw)
	f.write(t, cert)
	return f
}

func (f transportFiles) write(t *testing.T, cert tls.Certificate) {
	t.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	transportWritePEM(t, f.key, "PRIVATE KEY", key)
	transportWritePEM(t, f.cert, "CERTIFICATE", cert.Certificate[0])
}

// transportWritePEM replaces a file, as programs do that renew certificates.
func transportWritePEM(t *testing.T, file, kind string, der []byte) {
	t.Helper()
	transportWrite(t, file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

func transportWrite(t *testing.T, file string, data []byte) {
	t.Helper()
	if err := os.WriteFile(file+".new", data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
}

func TestTransportTLSConfigErrorsNameTheFile(t *testing.T) {
	ca := transportNewCA()
	good := transportWriteFiles(t, ca, ca.make("db7", nil))
	other := transportWriteFiles(t, ca, ca.make("db8", nil))
	junk := filepath.Join(t.TempDir(), "junk.pem")
	transportWrite(t, junk, []byte("-----BEGIN NOTHING"))
	empty := filepath.Join(t.TempDir(), "empty.pem")
	transportWrite(t, empty, nil)
	broken := filepath.Join(t.TempDir(), "broken.pem")
	transportWritePEM(t, broken, "CERTIFICATE", []byte("not DER"))
	missing := filepath.Join(t.TempDir(), "missing.pem")
	for _, c := range []struct {
		files transportFiles
		want  []string
	}{
		{transportFiles{missing, good.cert, good.key}, []string{"CA file " + missing}},
		{transportFiles{junk, good.cert, good.key}, []string{"CA file " + junk, "PEM"}},
		{transportFiles{empty, good.cert, good.key}, []string{"CA file " + empty, "PEM"}},
		{transportFiles{good.key, good.cert, good.key}, []string{"CA file " + good.key, "PEM"}},
		{transportFiles{broken, good.cert, good.key}, []string{"CA file " + broken}},
		{transportFiles{"", good.cert, good.key}, []string{"CA file"}},
		{transportFiles{good.ca, missing, good.key}, []string{"certificate file " + missing}},
		{transportFiles{good.ca, junk, good.key}, []string{"certificate file " + junk}},
		{transportFiles{good.ca, broken, good.key}, []string{"certificate file " + broken}},
		{transportFiles{good.ca, good.key, good.key}, []string{"certificate file " + good.key}},
		{transportFiles{good.ca, good.cert, missing}, []string{"key file " + missing}},
		{transportFiles{good.ca, good.cert, junk}, []string{"key file " + junk}},
		{transportFiles{good.ca, good.cert, good.cert}, []string{"key file " + good.cert}},
		{transportFiles{good.ca, good.cert, other.key}, []string{good.cert, "key file " + other.key, "match"}},
	} {
		_, clientErr := rpc.ClientTLSConfig(c.files.ca, c.files.cert, c.files.key, "")
		_, serverErr := rpc.ServerTLSConfig(c.files.ca, c.files.cert, c.files.key)
		for _, err := range []error{clientErr, serverErr} {
			transportErrorHas(t, err, c.want...)
			if strings.Contains(c.want[0], missing) && !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%v is not fs.ErrNotExist", err)
			}
		}
	}
}

// transportPairOfConfigs makes the configs of both sides, and returns the files of both.
func transportPairOfConfigs(t *testing.T, ca *transportCA) (server, client *tls.Config, serverFiles, clientFiles transportFiles) {
	t.Helper()
	serverFiles = transportWriteFiles(t, ca, ca.make("server", transportLocal))
	clientFiles = transportWriteFiles(t, ca, ca.make("db7", nil))
	server, err := rpc.ServerTLSConfig(serverFiles.ca, serverFiles.cert, serverFiles.key)
	if err != nil {
		t.Fatal(err)
	}
	client, err = rpc.ClientTLSConfig(clientFiles.ca, clientFiles.cert, clientFiles.key, "")
	if err != nil {
		t.Fatal(err)
	}
	return server, client, serverFiles, clientFiles
}

func transportState(conn net.Conn) tls.ConnectionState {
	return conn.(interface{ ConnectionState() tls.ConnectionState }).ConnectionState()
}

func TestTransportTLSRenewalsAreTakenUp(t *testing.T) {
	ca := transportNewCA()
	server, client, serverFiles, clientFiles := transportPairOfConfigs(t, ca)
	l := transportListenTLS(t, server)
	connecter := &rpc.TLSConnecter{Addr: l.Addr().String(), Config: client}
	check := func(step, wantClient, wantServer string) {
		t.Helper()
		conn, end := transportConnect(t, l, connecter)
		serverName := transportState(conn).PeerCertificates[0].Subject.CommonName
		if end.identity != wantClient || serverName != wantServer {
			t.Errorf("%s: client %q (%v), server %q; want %q, %q", step, end.identity, end.err, serverName, wantClient, wantServer)
		}
		if end.err == nil {
			transportPingPong(t, conn, end.conn)
		}
	}
	check("at first", "db7", "server")
	serverFiles.write(t, ca.make("server2", transportLocal))
	check("after the server's renewal", "db7", "server2")
	clientFiles.write(t, ca.make("db8", nil))
	check("after the client's renewal", "db8", "server2")

	half := ca.make("db9", nil)
	transportWritePEM(t, clientFiles.cert, "CERTIFICATE", half.Certificate[0])
	check("half renewed", "db8", "server2")
	clientFiles.write(t, half)
	check("wholly renewed", "db9", "server2")

	transportWrite(t, serverFiles.cert, []byte("junk"))
	transportWrite(t, serverFiles.key, nil)
	check("broken renewal", "db9", "server2")
	os.Remove(serverFiles.cert)
	check("file gone", "db9", "server2")
	serverFiles.write(t, ca.make("server3", transportLocal))
	check("mended", "db9", "server3")
}

func TestTransportTLSConfigsAreStrict(t *testing.T) {
	ca := transportNewCA()
	server, client, _, _ := transportPairOfConfigs(t, ca)
	l := transportListenTLS(t, server, "db7")

	old := client.Clone()
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	_, end, err := transportTry(t, l, &rpc.TLSConnecter{Addr: l.Addr().String(), Config: old})
	transportErrorHas(t, err, "TLS handshake with", "version")
	transportErrorHas(t, end.err, "TLS handshake", "version")

	oldServer := server.Clone()
	oldServer.MinVersion, oldServer.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	l12 := transportListenTLS(t, oldServer)
	_, end, err = transportTry(t, l12, &rpc.TLSConnecter{Addr: l12.Addr().String(), Config: client})
	transportErrorHas(t, err, "TLS handshake with", "version")
	transportErrorHas(t, end.err, "TLS handshake")

	client = client.Clone()
	client.ClientSessionCache, client.SessionTicketsDisabled = tls.NewLRUClientSessionCache(8), false
	for range 3 {
		conn, end := transportConnect(t, l, &rpc.TLSConnecter{Addr: l.Addr().String(), Config: client})
		if end.err != nil {
			t.Fatal(end.err)
		}
		transportPingPong(t, conn, end.conn)
		for _, c := range []net.Conn{conn, end.conn} {
			if state := transportState(c); state.DidResume || state.Version != tls.VersionTLS13 {
				t.Errorf("resumed: %v, version %x", state.DidResume, state.Version)
			}
		}
	}
}

// Gathering records.

// transportTLSPair is a TLS connection over any other. The client is crypto/tls's own.
func transportTLSPair(t *testing.T, clientSide, serverSide net.Conn) (client *tls.Conn, server net.Conn) {
	t.Helper()
	ca := transportNewCA()
	config := ca.clientConfig(ca.make("db7", nil))
	config.ServerName, config.DynamicRecordSizingDisabled = "localhost", true
	serverConfig := ca.serverConfig()
	serverConfig.SessionTicketsDisabled = true // a pipe has nobody who reads them
	serverConfig.DynamicRecordSizingDisabled = true
	l := transportListenTLS(t, serverConfig)
	l.Close()
	client = tls.Client(clientSide, config)
	failed := make(chan error, 1)
	go func() { failed <- client.Handshake() }() // ends with the handshake, or with the test's connection
	server, _, err := l.Authenticate(t.Context(), serverSide)
	if err := errors.Join(err, <-failed); err != nil {
		t.Fatal(err)
	}
	return client, server
}

// transportCountConn counts system calls.
type transportCountConn struct {
	net.Conn
	writes atomic.Int64
}

func (c *transportCountConn) Write(p []byte) (int, error) {
	c.writes.Add(1)
	return c.Conn.Write(p)
}

func transportTCPPair(t *testing.T) (client, server net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if client, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	return client, server
}

func TestTransportTLSSharesSystemCalls(t *testing.T) {
	clientSide, serverSide := transportTCPPair(t)
	counted := &transportCountConn{Conn: serverSide}
	client, server := transportTLSPair(t, clientSide, counted)
	go io.Copy(io.Discard, client) // ends with the test's connection
	for size, most := range map[int]int64{1: 1, 1 << 10: 1, 16 << 10: 1, 32 << 10: 1, 48 << 10: 1, 256 << 10: 6, 1 << 20: 22} {
		counted.writes.Store(0)
		if n, err := server.Write(make([]byte, size)); n != size || err != nil {
			t.Fatal(n, err)
		}
		if made := counted.writes.Load(); made < 1 || made > most {
			t.Errorf("%d bytes took %d system calls, want at most %d", size, made, most)
		}
	}
}

func TestTransportTLSNetConnIsTheSocket(t *testing.T) {
	ca := transportNewCA()
	l := transportListenTLS(t, ca.serverConfig())
	client, end := transportConnect(t, l, &rpc.TLSConnecter{Addr: l.Addr().String(), Config: ca.clientConfig(ca.make("db7", nil))})
	for _, conn := range []net.Conn{client, end.conn} {
		if c, ok := conn.(interface{ NetConn() net.Conn }); !ok {
			t.Errorf("%T has no NetConn", conn)
		} else if _, ok := c.NetConn().(*net.TCPConn); !ok {
			t.Errorf("NetConn is a %T", c.NetConn())
		}
	}
}

// transportSizes are around the limits of records and of system calls.
func transportSizes() []int {
	sizes := []int{0, 1}
	for _, limit := range []int{1 << 10, 16 << 10, 32 << 10, 64 << 10, 65483, 65483 - 22*4, 128 << 10, 256 << 10, 1 << 20} {
		sizes = append(sizes, limit-1, limit, limit+1)
	}
	return sizes
}

func TestTransportTLSBytesAreEqual(t *testing.T) {
	for _, dynamic := range []bool{false, true} {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			ca := transportNewCA()
			server, client := ca.serverConfig(), ca.clientConfig(ca.make("db7", nil))
			server.MaxVersion, server.DynamicRecordSizingDisabled = version, !dynamic
			client.DynamicRecordSizingDisabled = !dynamic
			l := transportListenTLS(t, server)
			a, end := transportConnect(t, l, &rpc.TLSConnecter{Addr: l.Addr().String(), Config: client})
			var both sync.WaitGroup
			both.Go(func() { transportExchange(t, a, end.conn) })
			both.Go(func() { transportExchange(t, end.conn, a) })
			both.Wait()
		}
	}
}

// transportExchange sends writes of all sizes and reads them in pieces of others, with CloseWrite as the end.
func transportExchange(t *testing.T, from, to net.Conn) {
	seed := time.Now().UnixNano()
	random := rand.New(rand.NewPCG(uint64(seed), 0))
	sizes := transportSizes()
	for range 20 {
		sizes = append(sizes, random.IntN(200<<10))
	}
	random.Shuffle(len(sizes), func(i, j int) { sizes[i], sizes[j] = sizes[j], sizes[i] })
	total := 0
	for _, size := range sizes {
		total += size
	}
	sent := make([]byte, total)
	rand.NewChaCha8([32]byte{byte(seed)}).Read(sent)
	var writer sync.WaitGroup
	defer writer.Wait() // the other end may be done, and the test over, before CloseWrite returns
	writer.Go(func() {
		rest := sent
		for _, size := range sizes {
			if n, err := from.Write(rest[:size]); n != size || err != nil {
				t.Errorf("seed %d: Write of %d: %d, %v", seed, size, n, err)
			}
			rest = rest[size:]
		}
		if err := from.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
			t.Errorf("seed %d: CloseWrite: %v", seed, err)
		}
	})
	var got bytes.Buffer
	_, err := io.CopyBuffer(struct{ io.Writer }{&got}, struct{ io.Reader }{to}, make([]byte, 1+random.IntN(100<<10)))
	if err != nil || !bytes.Equal(got.Bytes(), sent) {
		from.Close() // or the writer waits for ever
		t.Errorf("seed %d: %d bytes of %d arrived, equal: %v, %v", seed, got.Len(), len(sent), bytes.Equal(got.Bytes(), sent), err)
	}
}

func TestTransportTLSConcurrentWritesStayWhole(t *testing.T) {
	ca := transportNewCA()
	l := transportListenTLS(t, ca.serverConfig())
	client, end := transportConnect(t, l, &rpc.TLSConnecter{Addr: l.Addr().String(), Config: ca.clientConfig(ca.make("db7", nil))})
	const writers, each, size = 8, 20, 70 << 10
	var all sync.WaitGroup
	for w := range writers {
		all.Go(func() {
			for range each {
				if _, err := client.Write(bytes.Repeat([]byte{byte(w)}, size)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	counts := make([]int, writers)
	block := make([]byte, size)
	for range writers * each {
		if _, err := io.ReadFull(end.conn, block); err != nil {
			t.Fatal(err)
		}
		if block[0] >= writers || !bytes.Equal(block, bytes.Repeat(block[:1], size)) {
			t.Fatal("two Writes are mixed up")
		}
		counts[block[0]]++
	}
	all.Wait()
	for w, n := range counts {
		if n != each {
			t.Errorf("writer %d: %d Writes arrived", w, n)
		}
	}
}

// A CloseWrite and a Close that meet a Write leave a prefix of it, and the goodbye only after the whole.
func TestTransportTLSEndDuringWrites(t *testing.T) {
	ca := transportNewCA()
	l := transportListenTLS(t, ca.serverConfig())
	connecter := &rpc.TLSConnecter{Addr: l.Addr().String(), Config: ca.clientConfig(ca.make("db7", nil))}
	for round := range 40 {
		client, end := transportConnect(t, l, connecter)
		half := round%2 == 0
		var written atomic.Int64
		var writer sync.WaitGroup
		writer.Go(func() {
			block := make([]byte, 100<<10)
			for {
				n, err := client.Write(block)
				written.Add(int64(n))
				if err != nil {
					return
				}
			}
		})
		var read int64
		io.CopyN(io.Discard, end.conn, int64(round)*20_000)
		if half {
			go client.(interface{ CloseWrite() error }).CloseWrite() // ends when the Write in progress does
		} else {
			go client.Close() // ends within its time limit
		}
		n, err := io.Copy(io.Discard, end.conn)
		read = int64(round)*20_000 + n
		writer.Wait()
		if half && (err != nil || read != written.Load()) {
			t.Errorf("CloseWrite: %d bytes written, %d read, %v", written.Load(), read, err)
		}
		if !half && err == nil && read != written.Load() {
			t.Errorf("Close: a clean end after %d of %d bytes", read, written.Load())
		}
		client.Close()
		end.conn.Close()
	}
}

func TestTransportTLSCloseEndsABlockedWrite(t *testing.T) {
	for _, size := range []int{100, 32 << 10, 256 << 10} {
		synctest.Test(t, func(t *testing.T) {
			clientSide, serverSide := net.Pipe()
			_, server := transportTLSPair(t, clientSide, serverSide)
			failed := make(chan error)
			go func() { // ends with Close
				_, err := server.Write(make([]byte, size))
				failed <- err
			}()
			synctest.Wait()
			start := time.Now()
			closed := make(chan error)
			go func() { closed <- server.Close() }() // ends with the socket's
			if err := <-failed; err == nil {
				t.Errorf("a Write of %d that nobody read succeeded", size)
			}
			if err := <-closed; err != nil || time.Since(start) != 0 {
				t.Errorf("Close took %v: %v", time.Since(start), err)
			}
			if err := server.Close(); !errors.Is(err, net.ErrClosed) {
				t.Errorf("the second Close: %v", err)
			}
			if _, err := server.Write(make([]byte, size)); err == nil {
				t.Error("a Write after Close succeeded")
			}
			if _, err := server.Read(make([]byte, 1)); err == nil {
				t.Error("a Read after Close succeeded")
			}
		})
	}
}

func TestTransportTLSCloseWaitsBoundedlyForAPeerThatDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clientSide, serverSide := net.Pipe()
		_, server := transportTLSPair(t, clientSide, serverSide)
		start := time.Now()
		server.Close()
		if took := time.Since(start); took != 5*time.Second {
			t.Errorf("Close took %v", took)
		}
		if _, err := clientSide.Write([]byte("x")); err == nil {
			t.Error("the connection beneath is open")
		}
	})
}

func TestTransportTLSDeadlines(t *testing.T) {
	for _, size := range []int{100, 32 << 10, 256 << 10} {
		synctest.Test(t, func(t *testing.T) {
			clientSide, serverSide := net.Pipe()
			client, server := transportTLSPair(t, clientSide, serverSide)

			start := time.Now()
			server.SetReadDeadline(start.Add(time.Minute))
			_, err := server.Read(make([]byte, 1))
			if !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) != time.Minute {
				t.Errorf("Read after %v: %v", time.Since(start), err)
			}
			server.SetReadDeadline(time.Time{})
			go client.Write([]byte("x")) // ends with the Read
			if n, err := server.Read(make([]byte, 1)); n != 1 || err != nil {
				t.Errorf("Read after a deadline that passed: %d, %v", n, err)
			}

			start = time.Now()
			server.SetWriteDeadline(start.Add(time.Minute))
			_, err = server.Write(make([]byte, size))
			if !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) != time.Minute {
				t.Errorf("Write of %d after %v: %v", size, time.Since(start), err)
			}
			server.SetWriteDeadline(time.Time{}) // too late: nobody knows how much of the record is out
			for _, size := range []int{1, 100 << 10} {
				if _, err := server.Write(make([]byte, size)); err == nil {
					t.Errorf("a Write of %d succeeded after one that was cut short", size)
				}
			}
			client.NetConn().Close()
			server.Close()
		})
	}
}

// ---- Messages -----------------------------------------------------------------------------------------------------

// pduKind is one type of message: a value of it with all fields set, that value's bytes written by hand, and the wire
// types of its fields by number.
type pduKind struct {
	name   string
	full   rpc.Message
	bytes  string
	fields map[byte]byte
}

func (k pduKind) new() rpc.Message {
	return reflect.New(reflect.TypeOf(k.full).Elem()).Interface().(rpc.Message)
}

const (
	pduVarint  = 0
	pduFixed64 = 1
	pduBytes   = 2
	pduFixed32 = 5
)

// pduVersion is a version, pduVersionBytes what it is on the wire, 0x2d bytes long.
var pduVersion = rpc.FilesystemVersion{
	Type: rpc.VersionBookmark, Name: "daily", GUID: 0x8000000000000001, CreateTXG: 300,
	Creation: time.Date(2024, 2, 29, 23, 59, 58, 0, time.UTC),
}

const pduVersionBytes = "\x08\x01" + "\x12\x05daily" + "\x18\x81\x80\x80\x80\x80\x80\x80\x80\x80\x01" + "\x20\xac\x02" +
	"\x2a\x142024-02-29T23:59:58Z"

var pduConfig = rpc.ReplicationConfig{Protection: &rpc.ReplicationConfigProtection{
	Initial: rpc.GuaranteeResumability, Incremental: rpc.GuaranteeIncrementalReplication}}

const pduConfigBytes = "\x0a\x04\x08\x01\x10\x02"

var pduSend = rpc.SendReq{Filesystem: "p/a", From: &pduVersion, To: &rpc.FilesystemVersion{Name: "b"}, ResumeToken: "tok",
	ReplicationConfig: &pduConfig}

const pduSendBytes = "\x0a\x03p/a" + "\x12\x2d" + pduVersionBytes + "\x1a\x03\x12\x01b" + "\x22\x03tok" + "\x32\x06" + pduConfigBytes

var pduKinds = []pduKind{
	{"ListFilesystemReq", &rpc.ListFilesystemReq{}, "", nil},
	{"ListFilesystemRes", &rpc.ListFilesystemRes{Filesystems: []rpc.Filesystem{{Path: "a"}, {}, {IsPlaceholder: true}}},
		"\x0a\x03\x0a\x01a" + "\x0a\x00" + "\x0a\x02\x18\x01", map[byte]byte{1: pduBytes}},
	{"Filesystem", &rpc.Filesystem{Path: "pool/a", ResumeToken: "ä", IsPlaceholder: true},
		"\x0a\x06pool/a" + "\x12\x02\xc3\xa4" + "\x18\x01", map[byte]byte{1: pduBytes, 2: pduBytes, 3: pduVarint}},
	{"ListFilesystemVersionsReq", &rpc.ListFilesystemVersionsReq{Filesystem: "p"}, "\x0a\x01p", map[byte]byte{1: pduBytes}},
	{"ListFilesystemVersionsRes", &rpc.ListFilesystemVersionsRes{Versions: []rpc.FilesystemVersion{pduVersion, {}}},
		"\x0a\x2d" + pduVersionBytes + "\x0a\x00", map[byte]byte{1: pduBytes}},
	{"FilesystemVersion", &pduVersion, pduVersionBytes,
		map[byte]byte{1: pduVarint, 2: pduBytes, 3: pduVarint, 4: pduVarint, 5: pduBytes}},
	{"SendReq", &pduSend, pduSendBytes, map[byte]byte{1: pduBytes, 2: pduBytes, 3: pduBytes, 4: pduBytes, 6: pduBytes}},
	{"ReplicationConfig", &pduConfig, pduConfigBytes, map[byte]byte{1: pduBytes}},
	{"ReplicationConfigProtection",
		&rpc.ReplicationConfigProtection{Initial: rpc.GuaranteeNothing, Incremental: rpc.GuaranteeIncrementalReplication},
		"\x08\x03\x10\x02", map[byte]byte{1: pduVarint, 2: pduVarint}},
	{"SendRes", &rpc.SendRes{UsedResumeToken: true, ExpectedSize: 1<<64 - 1},
		"\x08\x01\x10\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", map[byte]byte{1: pduVarint, 2: pduVarint}},
	{"SendCompletedReq", &rpc.SendCompletedReq{OriginalReq: &pduSend}, "\x12\x46" + pduSendBytes, map[byte]byte{2: pduBytes}},
	{"SendCompletedRes", &rpc.SendCompletedRes{}, "", nil},
	{"ReceiveReq", &rpc.ReceiveReq{Filesystem: "q", To: &pduVersion, ClearResumeToken: true, ReplicationConfig: &pduConfig},
		"\x0a\x01q" + "\x12\x2d" + pduVersionBytes + "\x18\x01" + "\x22\x06" + pduConfigBytes,
		map[byte]byte{1: pduBytes, 2: pduBytes, 3: pduVarint, 4: pduBytes}},
	{"ReceiveRes", &rpc.ReceiveRes{}, "", nil},
	{"DestroySnapshotsReq", &rpc.DestroySnapshotsReq{Filesystem: "p", Snapshots: []rpc.FilesystemVersion{{Name: "x"}, pduVersion}},
		"\x0a\x01p" + "\x12\x03\x12\x01x" + "\x12\x2d" + pduVersionBytes, map[byte]byte{1: pduBytes, 2: pduBytes}},
	{"DestroySnapshotsRes", &rpc.DestroySnapshotsRes{Results: []rpc.DestroySnapshotRes{{Error: "busy"}, {}}},
		"\x0a\x06\x12\x04busy" + "\x0a\x00", map[byte]byte{1: pduBytes}},
	{"DestroySnapshotRes", &rpc.DestroySnapshotRes{Snapshot: &rpc.FilesystemVersion{}, Error: "busy"},
		"\x0a\x00" + "\x12\x04busy", map[byte]byte{1: pduBytes, 2: pduBytes}},
	{"ReplicationCursorReq", &rpc.ReplicationCursorReq{Filesystem: "p"}, "\x0a\x01p", map[byte]byte{1: pduBytes}},
	{"ReplicationCursorRes", &rpc.ReplicationCursorRes{GUID: 128}, "\x08\x80\x01", map[byte]byte{1: pduVarint, 2: pduVarint}},
	{"PingReq", &rpc.PingReq{Message: "hi"}, "\x0a\x02hi", map[byte]byte{1: pduBytes}},
	{"PingRes", &rpc.PingRes{Echo: "hi"}, "\x0a\x02hi", map[byte]byte{1: pduBytes}},
}

func pduKindOf(t testing.TB, name string) pduKind {
	for _, k := range pduKinds {
		if k.name == name {
			return k
		}
	}
	t.Fatalf("no message %s", name)
	panic("unreachable")
}

func pduEncode(t testing.TB, m rpc.Message) []byte {
	t.Helper()
	b, err := m.AppendBinary(nil)
	if err != nil {
		t.Fatalf("%T: %v", m, err)
	}
	return b
}

func pduDecode(t testing.TB, m rpc.Message, data string) {
	t.Helper()
	if err := m.UnmarshalBinary([]byte(data)); err != nil {
		t.Fatalf("%T: %x: %v", m, data, err)
	}
}

// pduRefuse decodes data into a full message: that must fail, and leave nothing.
func pduRefuse(t testing.TB, kind pduKind, data string) error {
	t.Helper()
	m := kind.new()
	pduDecode(t, m, kind.bytes)
	err := m.UnmarshalBinary([]byte(data))
	if err == nil {
		t.Errorf("%s: accepted %x as %+v", kind.name, data, m)
		return nil
	}
	if !strings.HasPrefix(err.Error(), "rpc: ") {
		t.Errorf("%s: the error does not say whose it is: %v", kind.name, err)
	}
	if !reflect.DeepEqual(m, kind.new()) {
		t.Errorf("%s: %x: something is left after %v: %+v", kind.name, data, err, m)
	}
	return err
}

// The bytes of every message are those that were worked out by hand from the proto3 specification, both ways.
func TestMessageBytes(t *testing.T) {
	for _, kind := range pduKinds {
		if got := pduEncode(t, kind.full); string(got) != kind.bytes {
			t.Errorf("%s:\nencodes to %q\nwant       %q", kind.name, got, kind.bytes)
		}
		m := kind.new()
		pduDecode(t, m, kind.bytes)
		if !reflect.DeepEqual(m, kind.full) {
			t.Errorf("%s: decodes to\n%+v, want\n%+v", kind.name, m, kind.full)
		}
	}
}

// A message longer than 127 bytes inside others has lengths of two and three bytes, and comes after what was in the slice.
func TestMessageLongEmbedded(t *testing.T) {
	for _, n := range []int{60, 121, 122, 123, 124, 125, 126, 127, 128, 1 << 14, 1<<14 - 10, 1 << 21} {
		want := rpc.SendCompletedReq{OriginalReq: &rpc.SendReq{From: &rpc.FilesystemVersion{Name: strings.Repeat("n", n)},
			To: &rpc.FilesystemVersion{Name: "to"}}}
		b, err := want.AppendBinary([]byte("before"))
		if err != nil || !bytes.HasPrefix(b, []byte("before")) {
			t.Fatalf("%d: %.10q, %v", n, b, err)
		}
		var got rpc.SendCompletedReq
		pduDecode(t, &got, string(b[len("before"):]))
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%d bytes did not come back", n)
		}
	}
}

// Defaults take no bytes, and no bytes are the defaults.
func TestMessageDefaults(t *testing.T) {
	for _, kind := range pduKinds {
		if b, err := kind.new().AppendBinary(nil); len(b) != 0 || err != nil {
			t.Errorf("%s: the zero value is %x, %v", kind.name, b, err)
		}
		m := kind.new()
		pduDecode(t, m, kind.bytes)
		pduDecode(t, m, "")
		if !reflect.DeepEqual(m, kind.new()) {
			t.Errorf("%s: was not replaced: %+v", kind.name, m)
		}
	}
}

// Unknown fields of every wire type and of numbers up to the highest are skipped, wherever they are.
func TestMessageUnknownFieldsSkipped(t *testing.T) {
	unknown := []string{
		"\x78\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",
		"\x79" + "12345678",
		"\x7a\x00",
		"\x7a\x03\xff\xff\xff", // no string: not known
		"\x7d1234",
		"\xfa\xff\xff\xff\x0f\x01x", // number 2^29-1
		"\xfa\x80\x00\x01x",         // number 15, its tag two bytes longer than need be
	}
	for _, kind := range pduKinds {
		for _, u := range unknown {
			for _, data := range []string{u + kind.bytes, kind.bytes + u, u + kind.bytes + u} {
				m := kind.new()
				pduDecode(t, m, data)
				if !reflect.DeepEqual(m, kind.full) {
					t.Errorf("%s: %q decodes to %+v", kind.name, data, m)
				}
			}
		}
	}
	var list rpc.ListFilesystemRes // inside an embedded message too
	pduDecode(t, &list, "\x0a\x05\x7a\x00\x0a\x01a")
	if len(list.Filesystems) != 1 || list.Filesystems[0].Path != "a" {
		t.Errorf("%+v", list)
	}
}

// Values of enums that have no name come back as they were; of a number that is too long the low 32 bits count.
func TestMessageUnknownEnumsKept(t *testing.T) {
	for _, n := range []int32{-1, 2, 99, 1<<31 - 1, -1 << 31} {
		want := rpc.ReplicationConfigProtection{Initial: rpc.GuaranteeKind(n), Incremental: 7}
		var got rpc.ReplicationConfigProtection
		pduDecode(t, &got, string(pduEncode(t, &want)))
		if got != want {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
	if b := pduEncode(t, &rpc.FilesystemVersion{Type: -1}); string(b) != "\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01" {
		t.Errorf("a negative enum is %x", b)
	}
	var v rpc.FilesystemVersion
	pduDecode(t, &v, "\x08\x81\x80\x80\x80\x10")
	if v.Type != rpc.VersionBookmark {
		t.Errorf("2^32+1 is type %d", v.Type)
	}
}

// Of scalars that come twice the last counts, even if it is the default.
func TestMessageLastScalarWins(t *testing.T) {
	var f rpc.Filesystem
	pduDecode(t, &f, "\x0a\x01a\x12\x01x\x18\x01\x0a\x01b\x18\x02\x12\x00\x18\x00")
	if want := (rpc.Filesystem{Path: "b"}); f != want {
		t.Errorf("%+v", f)
	}
	var v rpc.FilesystemVersion
	pduDecode(t, &v, pduVersionBytes+"\x08\x00\x18\x05\x18\x04\x2a\x00\x20\x80\x80\x00")
	if want := (rpc.FilesystemVersion{Name: "daily", GUID: 4}); v != want {
		t.Errorf("%+v", v)
	}
	for value, want := range map[string]bool{"\x00": false, "\x01": true, "\x02": true, "\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01": true, "\x80\x00": false} {
		var res rpc.SendRes
		if pduDecode(t, &res, "\x08"+value); res.UsedResumeToken != want {
			t.Errorf("bool %x is %v", value, !want)
		}
	}
}

// Embedded messages that come twice are merged, at every depth; elements of lists are not.
func TestMessageEmbeddedMerged(t *testing.T) {
	var req rpc.SendReq
	pduDecode(t, &req, "\x12\x05\x12\x01a\x18\x01"+"\x32\x00"+"\x32\x04\x0a\x02\x08\x01"+"\x12\x05\x12\x01b\x20\x02"+"\x12\x00"+"\x32\x04\x0a\x02\x10\x02")
	want := rpc.SendReq{From: &rpc.FilesystemVersion{Name: "b", GUID: 1, CreateTXG: 2}, ReplicationConfig: &pduConfig}
	if !reflect.DeepEqual(req, want) {
		t.Errorf("%+v", req)
	}
	var completed rpc.SendCompletedReq
	pduDecode(t, &completed, "\x12\x05\x1a\x03\x12\x01a"+"\x12\x04\x1a\x02\x18\x07"+"\x12\x03\x0a\x01f")
	if r := completed.OriginalReq; r == nil || r.Filesystem != "f" || r.To == nil || r.To.Name != "a" || r.To.GUID != 7 {
		t.Errorf("%+v", completed.OriginalReq)
	}
	var receive rpc.ReceiveReq
	pduDecode(t, &receive, "\x22\x04\x0a\x02\x08\x01"+"\x12\x00"+"\x22\x04\x0a\x02\x10\x02"+"\x12\x02\x18\x01")
	if !reflect.DeepEqual(receive, rpc.ReceiveReq{To: &rpc.FilesystemVersion{GUID: 1}, ReplicationConfig: &pduConfig}) {
		t.Errorf("%+v", receive)
	}
	var list rpc.DestroySnapshotsRes
	pduDecode(t, &list, "\x0a\x09\x0a\x03\x12\x01a\x0a\x02\x18\x01"+"\x0a\x03\x12\x01e")
	if !reflect.DeepEqual(list.Results, []rpc.DestroySnapshotRes{{Snapshot: &rpc.FilesystemVersion{Name: "a", GUID: 1}}, {Error: "e"}}) {
		t.Errorf("%+v", list)
	}
}

// Two configurations in one process do not share what they point to.
func TestMessageConfigsAreApart(t *testing.T) {
	var a, b rpc.SendReq
	pduDecode(t, &a, pduSendBytes)
	pduDecode(t, &b, pduSendBytes)
	a.ReplicationConfig.Protection.Initial = rpc.GuaranteeNothing
	a.From.Name = "changed"
	if !reflect.DeepEqual(b, pduSend) {
		t.Errorf("a change of one is seen in the other: %+v", b)
	}
}

// The last member of the oneof is the one that counts; to have both is an error when encoding.
func TestMessageOneof(t *testing.T) {
	for data, want := range map[string]rpc.ReplicationCursorRes{
		"\x08\x05":                 {GUID: 5},
		"\x10\x01":                 {NotExist: true},
		"\x08\x05\x10\x01":         {NotExist: true},
		"\x10\x01\x08\x05":         {GUID: 5},
		"\x10\x01\x08\x00":         {},
		"\x08\x05\x10\x00":         {},
		"\x08\x05\x10\x01\x08\x06": {GUID: 6},
	} {
		var got rpc.ReplicationCursorRes
		if pduDecode(t, &got, data); got != want {
			t.Errorf("%x is %+v, want %+v", data, got, want)
		}
	}
}

// What the wire format does not allow is refused, in every message and in those embedded, and nothing is left.
func TestMessageMalformedRefused(t *testing.T) {
	malformed := map[string]string{
		"varint of 11 bytes":         "\x78\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x00",
		"varint of 65 bits":          "\x78\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02",
		"varint cut short":           "\x78\x80",
		"varint missing":             "\x78",
		"tag cut short":              "\x80",
		"tag of 11 bytes":            "\xf8\x80\x80\x80\x80\x80\x80\x80\x80\x80\x00\x00",
		"field number 0":             "\x00\x00",
		"field number 0, bytes":      "\x02\x00",
		"field number 2^29":          "\x80\x80\x80\x80\x10\x00",
		"field number 2^32+15":       "\xf8\x80\x80\x80\x80\x01\x00",
		"field number 2^61-1":        "\xf8\xff\xff\xff\xff\xff\xff\xff\xff\x01\x00",
		"group":                      "\x7b\x7c",
		"end of a group":             "\x7c",
		"wire type 6":                "\x7e\x00",
		"wire type 7":                "\x7f\x00",
		"bytes cut short":            "\x7a\x02x",
		"length of 2^63":             "\x7a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",
		"length of 2^64-1":           "\x7a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
		"length of 2^31":             "\x7a\x80\x80\x80\x80\x08",
		"8 bytes cut short":          "\x791234567",
		"4 bytes cut short":          "\x7d123",
		"length of more than 64 bit": "\x7a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x02",
	}
	for what, bad := range malformed {
		for _, kind := range pduKinds {
			err := pduRefuse(t, kind, kind.bytes+bad)
			if err == nil || !strings.Contains(err.Error(), kind.name) {
				t.Errorf("%s in %s: %v", what, kind.name, err)
			}
		}
		embedded := string(append([]byte{0x0a, byte(len(bad))}, bad...))
		if err := pduRefuse(t, pduKindOf(t, "ListFilesystemRes"), "\x0a\x00"+embedded); err == nil || !strings.Contains(err.Error(), "rpc: Filesystem:") {
			t.Errorf("%s in an embedded message: %v", what, err)
		}
	}
}

// Known fields of any other wire type are refused, and the error names message and field.
func TestMessageWrongWireTypeRefused(t *testing.T) {
	values := map[byte]string{pduVarint: "\x00", pduFixed64: "12345678", pduBytes: "\x00", pduFixed32: "1234"}
	for _, kind := range pduKinds {
		for number, right := range kind.fields {
			for wire, value := range values {
				if wire == right {
					continue
				}
				err := pduRefuse(t, kind, kind.bytes+string([]byte{number<<3 | wire})+value)
				if err == nil || !strings.Contains(err.Error(), kind.name+".") {
					t.Errorf("%s field %d, wire type %d: %v", kind.name, number, wire, err)
				}
			}
		}
	}
}

// Every message that is cut anywhere is either one with fewer fields or refused with nothing left.
func TestMessageCutShort(t *testing.T) {
	for _, kind := range pduKinds {
		for n := range len(kind.bytes) {
			m := kind.new()
			pduDecode(t, m, kind.bytes)
			if err := m.UnmarshalBinary([]byte(kind.bytes[:n])); err != nil {
				pduRefuse(t, kind, kind.bytes[:n])
			} else if got := pduEncode(t, m); string(got) != kind.bytes[:n] {
				t.Errorf("%s: %x became %x", kind.name, kind.bytes[:n], got)
			}
		}
	}
}

// Strings that are not UTF-8 are neither read nor written; the slice comes back as it was.
func TestMessageInvalidUTF8Refused(t *testing.T) {
	for _, bad := range []string{"\xff", "a\x80", "\xc0\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80", "12345678\xe2\x82", "1234567\xe2\x8212345678", "0123456\xff"} {
		encode := []rpc.Message{
			&rpc.ListFilesystemRes{Filesystems: []rpc.Filesystem{{}, {Path: bad}}},
			&rpc.Filesystem{Path: bad}, &rpc.Filesystem{ResumeToken: bad},
			&rpc.ListFilesystemVersionsReq{Filesystem: bad},
			&rpc.ListFilesystemVersionsRes{Versions: []rpc.FilesystemVersion{pduVersion, {Name: bad}}},
			&rpc.FilesystemVersion{Name: bad},
			&rpc.SendReq{Filesystem: bad}, &rpc.SendReq{ResumeToken: bad},
			&rpc.SendReq{From: &rpc.FilesystemVersion{Name: bad}}, &rpc.SendReq{To: &rpc.FilesystemVersion{Name: bad}},
			&rpc.SendCompletedReq{OriginalReq: &rpc.SendReq{Filesystem: bad}},
			&rpc.ReceiveReq{Filesystem: bad}, &rpc.ReceiveReq{To: &rpc.FilesystemVersion{Name: bad}},
			&rpc.DestroySnapshotsReq{Filesystem: bad},
			&rpc.DestroySnapshotsRes{Results: []rpc.DestroySnapshotRes{{Error: bad}}}, &rpc.DestroySnapshotRes{Error: bad},
			&rpc.ReplicationCursorReq{Filesystem: bad}, &rpc.PingReq{Message: bad}, &rpc.PingRes{Echo: bad},
		}
		for _, m := range encode {
			pduRefuseToEncode(t, m, "UTF-8")
		}
		field := string([]byte{byte(len(bad))}) + bad
		for name, numbers := range map[string]string{"Filesystem": "\x0a\x12", "FilesystemVersion": "\x12\x2a", "SendReq": "\x0a\x22",
			"ReceiveReq": "\x0a", "DestroySnapshotsReq": "\x0a", "DestroySnapshotRes": "\x12", "ReplicationCursorReq": "\x0a",
			"ListFilesystemVersionsReq": "\x0a", "PingReq": "\x0a", "PingRes": "\x0a"} {
			for _, tag := range []byte(numbers) {
				pduRefuse(t, pduKindOf(t, name), string([]byte{tag})+field)
			}
		}
	}
	for _, good := range []string{"\x00", "ä€𝄞", "12345678ä", "1234567ä", "\ufffd", "\U0010ffff"} {
		var got rpc.PingReq
		if pduDecode(t, &got, string(pduEncode(t, &rpc.PingReq{Message: good}))); got.Message != good {
			t.Errorf("%q became %q", good, got.Message)
		}
	}
}

// pduRefuseToEncode encodes behind some bytes: what comes back are those bytes and an error that names what is wrong.
func pduRefuseToEncode(t *testing.T, m rpc.Message, what string) {
	t.Helper()
	b, err := m.AppendBinary(append(make([]byte, 0, 1000), "before"...))
	if err == nil || string(b) != "before" {
		t.Errorf("%T: %q, %v", m, b, err)
		return
	}
	if text := err.Error(); !strings.HasPrefix(text, "rpc: ") || !strings.Contains(text, what) {
		t.Errorf("%T: %v", m, err)
	}
}

func TestMessageEncodingErrors(t *testing.T) {
	pduRefuseToEncode(t, &rpc.ReplicationCursorRes{GUID: 1, NotExist: true}, "ReplicationCursorRes")
	for _, when := range []time.Time{
		time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(-1, 12, 31, 23, 59, 59, 999_999_999, time.UTC),
		time.Date(9999, 12, 31, 23, 0, 0, 0, time.FixedZone("", -3600)), time.Date(0, 1, 1, 0, 0, 0, 0, time.FixedZone("", 3600)),
		time.Unix(1<<62, 0), time.Unix(-1<<62, 0),
	} {
		pduRefuseToEncode(t, &rpc.FilesystemVersion{Creation: when}, "FilesystemVersion.Creation")
		pduRefuseToEncode(t, &rpc.SendReq{To: &rpc.FilesystemVersion{Creation: when}}, "FilesystemVersion.Creation")
	}
}

// Times are written in UTC with the fewest digits.
func TestMessageTimesWritten(t *testing.T) {
	zone := time.FixedZone("", 5*3600+30*60)
	for want, when := range map[string]time.Time{
		"2024-02-29T23:59:58Z":           time.Date(2024, 2, 29, 23, 59, 58, 0, time.UTC),
		"2024-02-29T18:29:58.5Z":         time.Date(2024, 2, 29, 23, 59, 58, 500_000_000, zone),
		"2024-12-31T18:30:00.000000001Z": time.Date(2025, 1, 1, 0, 0, 0, 1, zone),
		"1969-12-31T23:59:59.12Z":        time.Date(1969, 12, 31, 23, 59, 59, 120_000_000, time.UTC),
		"0000-01-01T00:00:00Z":           time.Date(0, 1, 1, 0, 0, 0, 0, time.UTC),
		"0001-01-01T00:00:00.001Z":       time.Time{}.Add(time.Millisecond),
		"9999-12-31T23:59:59.999999999Z": time.Date(9999, 12, 31, 23, 59, 59, 999_999_999, time.UTC),
	} {
		b := pduEncode(t, &rpc.FilesystemVersion{Creation: when})
		if string(b) != "\x2a"+string([]byte{byte(len(want))})+want {
			t.Errorf("%v is %q", when, b)
		}
	}
	if b := pduEncode(t, &rpc.FilesystemVersion{Creation: time.Time{}.In(zone)}); len(b) != 0 {
		t.Errorf("the zero time of another zone is %q", b)
	}
}

// Times are read in any zone; they are refused if they are not as of RFC 3339 or, in UTC, not of years 0 to 9999.
func TestMessageTimesRead(t *testing.T) {
	for text, want := range map[string]time.Time{
		"2024-02-29T23:59:58Z":                 time.Date(2024, 2, 29, 23, 59, 58, 0, time.UTC),
		"2024-02-29T23:59:58.120Z":             time.Date(2024, 2, 29, 23, 59, 58, 120_000_000, time.UTC),
		"2024-02-29T23:59:58+05:30":            time.Date(2024, 2, 29, 18, 29, 58, 0, time.UTC),
		"2024-02-29T23:59:58-23:59":            time.Date(2024, 3, 1, 23, 58, 58, 0, time.UTC),
		"2024-02-29T23:59:58-00:00":            time.Date(2024, 2, 29, 23, 59, 58, 0, time.UTC),
		"2000-02-29T00:00:00.1234567899Z":      time.Date(2000, 2, 29, 0, 0, 0, 123_456_789, time.UTC),
		"2000-02-29T00:00:00.1234567899+01:00": time.Date(2000, 2, 28, 23, 0, 0, 123_456_789, time.UTC),
		"0000-02-29T00:00:00Z":                 time.Date(0, 2, 29, 0, 0, 0, 0, time.UTC),
		"9999-12-31T23:59:59.999999999Z":       time.Date(9999, 12, 31, 23, 59, 59, 999_999_999, time.UTC),
		"0001-01-01T01:00:00+01:00":            {},
		"":                                     {},
	} {
		var v rpc.FilesystemVersion
		pduDecode(t, &v, "\x2a"+string([]byte{byte(len(text))})+text)
		if v.Creation != want { // the same zone too
			t.Errorf("%q is %v", text, v.Creation)
		}
	}
	for _, text := range []string{
		"x", "2024", "2024-02-29", "2024-02-29T23:59:58", "2023-02-29T00:00:00Z", "1900-02-29T00:00:00Z", "2024-00-01T00:00:00Z",
		"2024-13-01T00:00:00Z", "2024-01-00T00:00:00Z", "2024-04-31T00:00:00Z", "2024-01-32T00:00:00Z", "2024-01-01T24:00:00Z",
		"2024-01-01T00:60:00Z", "2024-01-01T00:00:60Z", "2024-01-01 00:00:00Z", "2024-01-01T0:00:00Z", "2024-01-01T00:00:00,5Z",
		"2024-01-01T00:00:00.Z", "2024-01-01T00:00:00+24:00", "2024-01-01T00:00:00+00:60", "2024-01-01T00:00:00+0100",
		"2024-01-01T00:00:00+01", "2024-01-01T00:00:00ZZ", "2024-01-01T00:00:00.5", "2024-01-01T00:00:00z", "02024-01-01T00:00:00Z",
		"-024-01-01T00:00:00Z", "20 4-01-01T00:00:00Z", "2024/01/01T00:00:00Z", "2024-01-01T00:00:00~01:00",
		"0000-01-01T00:00:00+00:01", "9999-12-31T23:59:59-00:01",
	} {
		err := pduRefuse(t, pduKindOf(t, "FilesystemVersion"), "\x2a"+string([]byte{byte(len(text))})+text)
		if err == nil || !strings.Contains(err.Error(), "FilesystemVersion.Creation") {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// pduRandom is a source of which a failure can be repeated.
func pduRandom(t *testing.T) *rand.Rand {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// Every day that there is, and random instants, agree with package time in both directions.
func TestMessageTimesAgreeWithPackageTime(t *testing.T) {
	r := pduRandom(t)
	check := func(when time.Time, text string) {
		var v rpc.FilesystemVersion
		if err := v.UnmarshalBinary(append([]byte{0x2a, byte(len(text))}, text...)); err != nil || !v.Creation.Equal(when) {
			t.Fatalf("%q: %v, %v", text, v.Creation, err)
		}
		b := pduEncode(t, &rpc.FilesystemVersion{Creation: when})
		if want := when.UTC().Format(time.RFC3339Nano); !when.IsZero() && string(b[2:]) != want {
			t.Fatalf("%v is %q, want %q", when, b[2:], want)
		}
	}
	step := 1
	if testing.Short() {
		step = 17
	}
	for day := time.Date(0, 1, 1, 0, 0, 0, 0, time.UTC); day.Year() < 10000; day = day.AddDate(0, 0, step) {
		check(day, day.Format(time.RFC3339Nano))
	}
	for range 100_000 {
		zone := time.FixedZone("", r.IntN(2*24*60-1)*60-(24*60-1)*60)
		when := time.Date(1+r.IntN(9998), 1, 1, 0, 0, r.IntN(365*24*3600), r.IntN(1e9), zone)
		check(when, when.Format(time.RFC3339Nano))
	}
}

// A message does not change when the bytes it was decoded from do.
func TestMessageCopiesWhatItKeeps(t *testing.T) {
	for _, kind := range pduKinds {
		data := []byte(kind.bytes)
		m := kind.new()
		pduDecode(t, m, "") // whatever it does with the receiver
		if err := m.UnmarshalBinary(data); err != nil {
			t.Fatal(err)
		}
		clear(data)
		if !reflect.DeepEqual(m, kind.full) {
			t.Errorf("%s became %+v", kind.name, m)
		}
	}
}

// pduAllocated is how many bytes f allocates. What is more than the limit is measured again: others allocate, too.
func pduAllocated(limit uint64, f func()) (least uint64) {
	least = math.MaxUint64
	for try := 0; try < 5 && least > limit; try++ {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		f()
		runtime.ReadMemStats(&after)
		least = min(least, after.TotalAlloc-before.TotalAlloc)
	}
	return least
}

// pduAllocLimit is the bound on what decoding allocates, with something for what else goes on in the process.
func pduAllocLimit(data []byte) uint64 { return 40*uint64(len(data)) + 64<<10 }

// A peer can make a decoder allocate no more than 40 times what it sends.
func TestMessageAllocationBound(t *testing.T) {
	bodies := map[string][]string{
		"ListFilesystemRes":         {"\x0a\x00", "\x0a\x03\x0a\x01a", "\x0a\x04\x0a\x02ab", "\x08\x00"},
		"ListFilesystemVersionsRes": {"\x0a\x00", "\x0a\x04\x12\x02ab", "\x0a\x1b\x2a\x192024-01-01T00:00:00+01:17", "\x0a\x05\x12\x03\xffab"},
		"DestroySnapshotsReq":       {"\x12\x00", "\x0a\x02ab", "\x12\x04\x12\x02ab", "\x0a\x81\x02" + strings.Repeat("x", 257)},
		"DestroySnapshotsRes":       {"\x0a\x00", "\x0a\x02\x0a\x00", "\x0a\x06\x0a\x04\x12\x02ab", "\x0a\x04\x0a\x00\x0a\x00"},
		"SendReq":                   {"\x0a\x02ab", "\x12\x00\x1a\x00\x32\x00\x32\x02\x0a\x00", "\x22\x80\x02" + strings.Repeat("x", 256)},
		"PingReq":                   {"\x0a\x02ab", "\x0a\xa0\x01" + strings.Repeat("x", 160)},
	}
	for name, parts := range bodies {
		for _, part := range parts {
			for _, size := range []int{100, 1 << 12, 1 << 20} {
				data := []byte(strings.Repeat(part, 1+size/len(part)))
				decode := func() { pduKindOf(t, name).new().UnmarshalBinary(data) }
				if got := pduAllocated(pduAllocLimit(data), decode); got > pduAllocLimit(data) {
					t.Errorf("%s: %d bytes of %.10q... allocate %d", name, len(data), part, got)
				}
			}
		}
	}
}

// A list of 4 Mi elements is the longest: one more is refused before it is allocated, and is not written either.
func TestMessageListLimit(t *testing.T) {
	if testing.Short() {
		t.Skip("takes hundreds of megabytes")
	}
	const limit = 4 << 20
	longest := bytes.Repeat([]byte("\x0a\x00"), limit)
	var res rpc.DestroySnapshotsRes
	if err := res.UnmarshalBinary(longest); err != nil || len(res.Results) != limit || cap(res.Results) > limit+limit/8 {
		t.Fatalf("%d elements, %v", len(res.Results), err)
	}
	if got := pduEncode(t, &res); !bytes.Equal(got, longest) {
		t.Error("the longest list did not come back")
	}
	res.Results = append(res.Results, rpc.DestroySnapshotRes{})
	pduRefuseToEncode(t, &res, "DestroySnapshotsRes.Results")
	for name, part := range map[string]string{"ListFilesystemRes": "\x0a\x00", "ListFilesystemVersionsRes": "\x0a\x00",
		"DestroySnapshotsReq": "\x12\x00", "DestroySnapshotsRes": "\x0a\x00"} {
		tooLong := strings.Repeat(part, limit+1)
		data := []byte(tooLong)
		m := pduKindOf(t, name).new()
		var err error
		if got := pduAllocated(1<<20, func() { err = m.UnmarshalBinary(data) }); err == nil || got > 1<<20 {
			t.Errorf("%s: %v, allocated %d", name, err, got)
		}
	}
}

// Encoding allocates nothing where the slice has room for exactly the message.
func TestMessageEncodesWithoutAllocation(t *testing.T) {
	long := rpc.SendCompletedReq{OriginalReq: &rpc.SendReq{Filesystem: strings.Repeat("f", 500), To: &rpc.FilesystemVersion{Name: strings.Repeat("v", 200)}}}
	messages := []rpc.Message{&long}
	for _, kind := range pduKinds {
		messages = append(messages, kind.full)
	}
	for _, m := range messages {
		room := make([]byte, 0, len(pduEncode(t, m)))
		if n := testing.AllocsPerRun(50, func() { m.AppendBinary(room) }); n != 0 {
			t.Errorf("%T: %v allocations", m, n)
		}
	}
}

// A million versions make the way there and back.
func TestMessageMillionVersions(t *testing.T) {
	if testing.Short() {
		t.Skip("takes hundreds of megabytes")
	}
	start := time.Date(2001, 1, 1, 0, 0, 0, 0, time.UTC)
	want := rpc.ListFilesystemVersionsRes{Versions: make([]rpc.FilesystemVersion, 1_000_000)}
	for i := range want.Versions {
		want.Versions[i] = rpc.FilesystemVersion{Type: rpc.VersionType(i % 2), Name: "auto-" + start.Add(time.Duration(i)*time.Minute).Format("20060102-1504"),
			GUID: uint64(i) * 0x9e3779b97f4a7c15, CreateTXG: uint64(i), Creation: start.Add(time.Duration(i) * time.Minute)}
	}
	data := pduEncode(t, &want)
	var got rpc.ListFilesystemVersionsRes
	if err := got.UnmarshalBinary(data); err != nil {
		t.Fatal(err)
	}
	if len(got.Versions) != len(want.Versions) {
		t.Fatalf("%d versions", len(got.Versions))
	}
	for i := range want.Versions {
		if got.Versions[i] != want.Versions[i] {
			t.Fatalf("%d: %+v, want %+v", i, got.Versions[i], want.Versions[i])
		}
	}
}

// FuzzMessages decodes any bytes as any message (the first byte says which). What is accepted encodes to bytes that
// mean the same and are as short as can be; what is not leaves nothing; memory is bounded by the length of the input.
func FuzzMessages(f *testing.F) {
	for i, kind := range pduKinds {
		f.Add(append([]byte{byte(i)}, kind.bytes...))
		f.Add(append([]byte{byte(i)}, kind.bytes+"\x7a\x02xy"+kind.bytes...))
	}
	f.Fuzz(func(t *testing.T, input []byte) {
		if len(input) == 0 {
			return
		}
		kind, data := pduKinds[int(input[0])%len(pduKinds)], input[1:]
		m := kind.new()
		pduDecode(t, m, kind.bytes)
		var err error
		if got := pduAllocated(pduAllocLimit(data), func() { err = m.UnmarshalBinary(data) }); got > pduAllocLimit(data) {
			t.Errorf("%d bytes allocate %d", len(data), got)
		}
		if err != nil {
			if !reflect.DeepEqual(m, kind.new()) {
				t.Errorf("left after %v: %+v", err, m)
			}
			return
		}
		encoded := pduEncode(t, m)
		again := kind.new()
		pduDecode(t, again, string(encoded))
		if !reflect.DeepEqual(m, again) {
			t.Errorf("%+v became %+v", m, again)
		}
		if second := pduEncode(t, again); !bytes.Equal(encoded, second) {
			t.Errorf("encoded to %x, then to %x", encoded, second)
		}
	})
}

// ---- Fuzzing ------------------------------------------------------------------------------------------------------

// fuzzBanner and fuzzAnswer keep heartbeats and timeouts out of it.
const (
	fuzzBanner = "ZREPL-RPC 1-1 hb=300000\n"
	fuzzAnswer = "ZREPL-RPC 1 ok hb=300000\n"
	fuzzQuiet  = 5 * time.Minute // the heartbeat interval
)

// fuzzRun runs f for an input in a bubble, where a hang is a deadlock or takes long, and a goroutine that is left is an
// error. It allocates no more than the input explains.
func fuzzRun(t *testing.T, input []byte, f func(t *testing.T)) {
	if len(input) == 0 || len(input) > pipeSize/2 {
		t.Skip("no choice, or more than the pipe holds")
	}
	before := fuzzAllocated()
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		f(t)
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("took %v", took)
		}
	})
	if n := fuzzAllocated() - before; n > 2<<20+uint64(64*len(input)) {
		t.Errorf("%d bytes were allocated for an input of %d", n, len(input))
	}
}

func fuzzAllocated() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

// fuzzServer sends input to a server, ends that side, and returns all that the server says. uploads are the numbers of
// bytes of the streams that an upload's handler has read to io.EOF.
func fuzzServer(t *testing.T, input string) (output string, uploads []int) {
	s := rpc.NewServer(nil, rpc.ServerConfig{HeartbeatInterval: fuzzQuiet})
	rpc.HandleCall(s, "echo", func(_ context.Context, req *text) (*text, error) { return req, nil })
	rpc.HandleDownload(s, "get", func(_ context.Context, req *text) (*text, io.ReadCloser, error) {
		return req, io.NopCloser(strings.NewReader(string(*req))), nil
	})
	rpc.HandleUpload(s, "put", func(_ context.Context, req *text, r io.Reader) (*text, error) {
		n, err := io.Copy(io.Discard, r)
		if err == nil {
			uploads = append(uploads, int(n)) // one at a time
		}
		return req, err
	})
	rpc.HandleUpload(s, "some", func(_ context.Context, req *text, r io.Reader) (*text, error) {
		_, err := io.ReadFull(r, make([]byte, len(*req)))
		return req, err
	})
	s.HandleLabel("user", func(_ context.Context, conn net.Conn) { io.Copy(conn, conn) })
	l := newMemListener()
	served := make(chan error)
	go func() { served <- s.Serve(l.listener()) }()
	conn, err := l.Connect(context.Background())
	check(t, err)
	say(t, conn, input)
	check(t, conn.(*memConn).CloseWrite())
	b, err := io.ReadAll(conn)
	check(t, err)
	check(t, s.Close())
	<-served
	return string(b), uploads
}

// fuzzFrames are the frames that a server has written after its answer.
func fuzzFrames(t *testing.T, output string) iter.Seq2[byte, string] {
	return func(yield func(byte, string) bool) {
		_, frames, _ := strings.Cut(output, "\n")
		for r := strings.NewReader(frames); r.Len() > 0; {
			kind, payload, err := readFrame(r)
			if check(t, err); !yield(kind, payload) {
				return
			}
		}
	}
}

func FuzzServer(f *testing.F) {
	fuzzGolden(f, 'C', func(session string) string {
		_, frames, _ := strings.Cut(session, "\n")
		return frames[6:7] + frames[64:] // the label's letter
	})
	fuzzAdd(f,
		"d"+frame(tDownload, uint64(0), str8("get"), "")+frame(tHeartbeat)+frame(tDownload, uint64(1), str8("get"), "abc"),
		"d"+frame(tUpload, uint64(0), str8("put"), "req")+frame(tHeartbeat)+dataOf("abc", "de"),
		"c"+frame(tCall, uint64(1), uint64(0), str8("echo"), "hello")+frame(tCall, uint64(7), ^uint64(0), str8("nope"))+frame(tCancel, uint64(7)),
		"u"+"hello",
	)
	f.Fuzz(func(t *testing.T, input []byte) {
		fuzzRun(t, input, func(t *testing.T) {
			s, name := string(input[1:]), [4]string{"zrepl_data", "user", "zrepl_data", "zrepl_control"}[input[0]&3] // d, u, -, c
			output, uploads := fuzzServer(t, fuzzBanner+label(name)+s)
			switch name {
			case "zrepl_control":
				fuzzControl(t, s, output)
			case "zrepl_data":
				fuzzData(t, s, output, uploads)
			default:
				if _, echo, _ := strings.Cut(output, "\n"); echo != s {
					t.Errorf("the user's label echoed %q", echo)
				}
			}
		})
	})
}

// fuzzControl checks what a server says on a control connection on which its client says s.
func fuzzControl(t *testing.T, s, output string) {
	ids := map[string]bool{}
	for kind, payload := range fuzzFrames(t, output) {
		switch {
		case kind == tGoaway && len(payload) == 8:
		case kind != tReply || len(payload) < 9 || payload[8] > 16:
			t.Errorf("the server said %#x %q", kind, payload)
		case ids[payload[:8]] || !strings.Contains(s, payload[:8]):
			t.Errorf("a reply to what was not asked, or twice: %q", payload)
		default:
			ids[payload[:8]] = true
		}
	}
}

// fuzzData checks what a server says on a data connection on which its client says s.
func fuzzData(t *testing.T, s, output string, uploads []int) {
	for _, n := range uploads {
		if !strings.Contains(s, frame(tEnd, uint64(n))) {
			t.Errorf("an upload without a proper end was read to EOF, %d bytes", n)
		}
	}
	grammar := "" // a letter for each frame: result or its error, data, end, fail, goaway
	for kind, payload := range fuzzFrames(t, output) {
		letter, code := map[byte]string{tResult: "e", tData: "d", tEnd: ".", tFail: "f", tGoaway: "g"}[kind], (payload + "\xff")[0]
		if kind == tResult && code == 0 {
			letter = "r"
		}
		if letter == "" || (letter == "e" || letter == "f") && code-1 > 15 || letter == "d" && payload == "" || (letter == "." || letter == "g") && len(payload) != 8 {
			t.Errorf("the server said %#x %q", kind, payload)
		}
		grammar += letter
	}
	if !fuzzGrammar.MatchString(grammar) {
		t.Errorf("the server said %q", grammar)
	}
}

// fuzzGrammar is what a server may say: r or e to an upload, e or r, data and an end to a download, a goaway at last.
var fuzzGrammar = regexp.MustCompile(`^(r(d*[.f])?|e)*(rd*)?g?$`)

func FuzzPreface(f *testing.F) {
	fuzzGolden(f, 'C', func(session string) string { return session })
	fuzzAdd(f,
		"GET / HTTP/1.1\r\nHost: x\r\n\r\n", banner+label("user")+"hello", banner+label("nobody"), banner+label("zrepl_data")+frame(tHeartbeat),
		"ZREPL-RPC 1-1 new=thing hb=10 max=65536\n"+label("user"),
	)
	f.Fuzz(func(t *testing.T, input []byte) {
		fuzzRun(t, input, func(t *testing.T) {
			output, _ := fuzzServer(t, string(input))
			line, rest, _ := strings.Cut(output, "\n")
			switch {
			case output == "" || fuzzRefused.MatchString(line) && len(line) < 512 && rest == "":
			case line != "ZREPL-RPC 1 ok hb=300000 max=67108864":
				t.Errorf("the server said %q", line)
			case !fuzzProper(string(input)):
				t.Errorf("the server accepted %q", input)
			}
		})
	})
}

var (
	fuzzRefused = regexp.MustCompile(`^ZREPL-RPC 1-1 refused [a-z-]+( [!-~]+)+$`)
	fuzzHello   = regexp.MustCompile(`^ZREPL-RPC 0*[01]-0*[1-9][0-9]*(( [!-~]+)*)\n(user\x00{60}|zrepl_control\x00{51}|zrepl_data\x00{54})`)
	fuzzToken   = regexp.MustCompile(` (hb|max)=([^ ]*)`)
)

// fuzzProper tells whether a server may agree to the preface.
func fuzzProper(input string) bool {
	m, known := fuzzHello.FindStringSubmatch(input), map[string]bool{}
	if m == nil || len(m[0]) > 512+64 {
		return false
	}
	for _, token := range fuzzToken.FindAllStringSubmatch(m[1], -1) {
		n, err := strconv.ParseUint(token[2], 10, 64)
		if known[token[1]] || err != nil && !errors.Is(err, strconv.ErrRange) || n < 10 || token[1] == "hb" && n > 300000 || token[1] == "max" && n < 65536 {
			return false
		}
		known[token[1]] = true
	}
	return true
}

func FuzzClient(f *testing.F) {
	for _, op := range []string{"\x04", "\x05", "\x06", "\x07"} {
		fuzzGolden(f, 'S', func(session string) string { return op + session })
	}
	fuzzAdd(f,
		"\x00"+frame(tReply, uint64(1), 0, "hello"), "\x01"+frame(tResult, 0, "res")+dataOf("abc", "de"), "\x02"+frame(tResult, 0, "res"),
		"\x05ZREPL-RPC 1-1 refused permission-denied client \"db7\" is not allowed\n", "\x08"+frame(tReply, uint64(1), 0, "hello"),
	)
	f.Fuzz(func(t *testing.T, input []byte) {
		fuzzRun(t, input, func(t *testing.T) {
			said := string(input[1:]) // by the server
			if input[0]&4 == 0 {
				said = fuzzAnswer + said
			}
			dials := 0
			c := rpc.NewClient(rpc.ConnecterFunc(func(context.Context) (net.Conn, error) {
				if dials++; dials > 2 {
					t.Errorf("%d connections for one request", dials)
					return nil, errors.New("enough")
				}
				client, server := newMemConns()
				go func() {
					if input[0]&8 == 0 { // after the request, or the label if there is none
						io.ReadFull(server, make([]byte, len(banner)+map[bool]int{true: 64, false: 64 + 8}[input[0]&3 == 3]))
					}
					io.WriteString(server, said)
					server.CloseWrite()
				}()
				return client, nil
			}), rpc.ClientConfig{HeartbeatInterval: fuzzQuiet})
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			var res text
			switch input[0] & 3 {
			case 0:
				if c.Call(ctx, "echo", textOf("hello"), &res) == nil && !strings.Contains(said, frame(tReply, uint64(1), 0, string(res))) {
					t.Errorf("a call returned %q", res)
				}
			case 1:
				stream, err := c.Download(ctx, "get", textOf("req"), &res)
				if err != nil {
					break
				}
				body, err := io.ReadAll(stream)
				if _, again := stream.Read(make([]byte, 1)); err == nil && again != io.EOF || err != nil && again == io.EOF || errors.Is(err, io.EOF) {
					t.Errorf("a download ended with %v, then %v", err, again)
				}
				if err == nil && (!strings.Contains(said, frame(tResult, 0, string(res))) || !strings.Contains(said, frame(tEnd, uint64(len(body))))) {
					t.Errorf("a download returned %q, %q", res, body)
				}
				check(t, stream.Close())
			case 2:
				if c.Upload(ctx, "put", textOf("req"), strings.NewReader("abc"), &res) == nil && !strings.Contains(said, frame(tResult, 0, string(res))) {
					t.Errorf("an upload returned %q", res)
				}
			case 3:
				conn, err := c.Dial(ctx, "user")
				if err == nil {
					_, want, _ := strings.Cut(said, "\n")
					expect(t, conn, want)
					expectEOF(t, conn)
					check(t, conn.Close())
				}
			}
			check(t, c.Close())
		})
	})
}

func fuzzAdd(f *testing.F, seeds ...string) {
	for _, s := range seeds {
		f.Add([]byte(s))
	}
}

// fuzzGolden adds what a side says in the golden transcripts.
func fuzzGolden(f *testing.F, side byte, change func(string) string) {
	for name := range goldenSessions {
		session := ""
		for _, step := range goldenRead(f, name) {
			if step.side == side {
				session += step.bytes
			}
		}
		fuzzAdd(f, change(session))
	}
}

// ---- Streams into files -------------------------------------------------------------------------------------------

// TestAStreamIntoAFileNoticesASilentPeer: what goes from the socket to a file past this process is watched, too.
func TestAStreamIntoAFileNoticesASilentPeer(t *testing.T) {
	noLeak(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer l.Close()
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		io.WriteString(conn, "ZREPL-RPC 1 ok hb=10 max=65536\n"+frame(tResult, 0)+frame(tData, strings.Repeat("x", 100))[:50])
		io.Copy(io.Discard, conn) // until the client gives up
	}()
	c := rpc.NewClient(&rpc.TCPConnecter{Addr: l.Addr().String()}, rpc.ClientConfig{})
	defer c.Close()
	stream, err := c.Download(t.Context(), "get", nil, nil)
	check(t, err)
	defer stream.Close()
	f, err := os.Create(filepath.Join(t.TempDir(), "sink"))
	check(t, err)
	defer f.Close()
	n, err := io.Copy(f, stream)
	if n != 42 || !errors.Is(err, rpc.ErrPeerTimeout) {
		t.Errorf("%d bytes, %v; want the 42 that came, and ErrPeerTimeout", n, err)
	}
}

// TestAStreamIntoAPipeMayStall: a pipe that nobody reads for twenty timeouts is no dead peer.
func TestAStreamIntoAPipeMayStall(t *testing.T) {
	noLeak(t)
	const size = 4 << 20
	l, err := rpc.ListenTCP("127.0.0.1:0", map[string]string{"127.0.0.1": "tester"})
	check(t, err)
	s := rpc.NewServer(nil, rpc.ServerConfig{HeartbeatInterval: 10 * time.Millisecond})
	rpc.HandleDownload(s, "get", func(context.Context, *text) (*text, io.ReadCloser, error) {
		return new(text), io.NopCloser(strings.NewReader(strings.Repeat("x", size))), nil
	})
	rpc.HandleUpload(s, "put", func(_ context.Context, _ *text, r io.Reader) (*text, error) {
		return new(text), stallingPipe(size, func(w *os.File) (int64, error) { return io.Copy(w, r) })
	})
	serve(t, s, l)
	c := rpc.NewClient(&rpc.TCPConnecter{Addr: l.Addr().String()}, rpc.ClientConfig{HeartbeatInterval: 10 * time.Millisecond})
	defer c.Close()
	stream, err := c.Download(t.Context(), "get", nil, nil)
	check(t, err)
	check(t, stallingPipe(size, func(w *os.File) (int64, error) { return io.Copy(w, stream) }))
	check(t, c.Upload(t.Context(), "put", nil, strings.NewReader(strings.Repeat("x", size)), nil))
}

// stallingPipe runs write with a pipe whose reader begins only after twenty timeouts, and wants size bytes.
func stallingPipe(size int64, write func(w *os.File) (int64, error)) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	read := make(chan int64)
	go func() {
		<-time.After(20 * 30 * time.Millisecond)
		n, _ := io.Copy(io.Discard, r)
		read <- n
	}()
	n, err := write(w)
	w.Close()
	if got := <-read; err == nil && (n != size || got != size) {
		err = fmt.Errorf("%d bytes written, %d read", n, got)
	}
	return err
}

// TestAHandlerThatEndsItsGoroutineIsAnError: runtime.Goexit is what testing's FailNow does.
func TestAHandlerThatEndsItsGoroutineIsAnError(t *testing.T) {
	overTransports(t, func(s *rpc.Server) {
		exit := func() { runtime.Goexit() }
		rpc.HandleCall(s, "exit", func(context.Context, *text) (*text, error) { exit(); return nil, nil })
		rpc.HandleDownload(s, "exit", func(context.Context, *text) (*text, io.ReadCloser, error) { exit(); return nil, nil, nil })
		rpc.HandleUpload(s, "exit", func(context.Context, *text, io.Reader) (*text, error) { exit(); return nil, nil })
	}, func(t *testing.T, c *rpc.Client) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		for range 3 {
			if err := c.Call(ctx, "exit", nil, nil); rpc.CodeOf(err) != rpc.Internal {
				t.Errorf("call: %v", err)
			}
			if _, err := c.Download(ctx, "exit", nil, nil); rpc.CodeOf(err) != rpc.Unavailable {
				t.Errorf("download: %v", err)
			}
			if err := c.Upload(ctx, "exit", nil, strings.NewReader("data"), nil); rpc.CodeOf(err) != rpc.Unavailable {
				t.Errorf("upload: %v", err)
			}
		}
	})
}

// TestAWrappedErrorCrossesTheWireOnce: its code goes by itself, so its text does not name it again.
func TestAWrappedErrorCrossesTheWireOnce(t *testing.T) {
	overTransports(t, func(s *rpc.Server) {
		rpc.HandleCall(s, "fail", func(context.Context, *text) (*text, error) {
			return nil, fmt.Errorf("listing: %w", rpc.Errorf(rpc.NotFound, "no pool"))
		})
	}, func(t *testing.T, c *rpc.Client) {
		var remote *rpc.Error
		err := c.Call(t.Context(), "fail", nil, nil)
		if !errors.As(err, &remote) || *remote != (rpc.Error{Code: rpc.NotFound, Message: "listing: no pool"}) {
			t.Errorf("got %v", err)
		}
	})
}

// TestAnEarlyErrorOfAFastUploadArrives: the client still sends at full speed when the handler gives up.
func TestAnEarlyErrorOfAFastUploadArrives(t *testing.T) {
	overTransports(t, func(s *rpc.Server) {
		rpc.HandleUpload(s, "full", func(_ context.Context, _ *text, r io.Reader) (*text, error) {
			_, err := io.CopyN(io.Discard, r, 1<<20)
			return nil, errors.Join(err, rpc.Errorf(rpc.ResourceExhausted, "no space left"))
		})
	}, func(t *testing.T, c *rpc.Client) {
		for range 20 {
			endless := readerFunc(func(p []byte) (int, error) { return len(p), nil })
			if err := c.Upload(t.Context(), "full", nil, endless, nil); rpc.CodeOf(err) != rpc.ResourceExhausted {
				t.Fatalf("got %v", err)
			}
		}
	})
}

type readerFunc func(p []byte) (int, error)

func (r readerFunc) Read(p []byte) (int, error) { return r(p) }

// ---- Faults that were found, and stay fixed -----------------------------------------------------------------------

type chanSource struct {
	once sync.Once
	stop chan struct{}
	sent bool
}

type slowSink struct {
	entered chan struct{}
	goOn    chan struct{}
	want    byte
	bad     *atomic.Int64
	once    sync.Once
}

type fill struct {
	b byte
	n int
}

type slowClose struct{ chanSource }

type notify struct {
	fill
	sent chan struct{}
}

type closeNote struct {
	fill
	c chan time.Time
}

func (s *chanSource) Read(p []byte) (int, error) {
	if !s.sent {
		s.sent = true
		return copy(p, "half"), nil
	}
	<-s.stop
	return 0, io.EOF
}

func (w *slowSink) Write(p []byte) (int, error) {
	w.once.Do(func() { close(w.entered); <-w.goOn })
	for _, b := range p {
		if b != w.want {
			w.bad.Add(1)
			return len(p), nil
		}
	}
	return len(p), nil
}

func (f *fill) Read(p []byte) (int, error) {
	if f.n <= 0 {
		return 0, io.EOF
	}
	n := min(len(p), f.n)
	for i := range p[:n] {
		p[i] = f.b
	}
	f.n -= n
	return n, nil
}

func (s *slowClose) Read(p []byte) (int, error) {
	n, err := s.chanSource.Read(p)
	if err == io.EOF {
		err = errors.New("killed")
	}
	return n, err
}

func (n *closeNote) Close() error {
	select {
	case n.c <- time.Now():
	default:
	}
	return nil
}

func (s *chanSource) Close() error { s.once.Do(func() { close(s.stop) }); return nil }

func (f *fill) Close() error { return nil }

func (s *slowClose) Close() error {
	s.chanSource.Close()
	time.Sleep(1500 * time.Millisecond)
	return nil
}

func (n *notify) Close() error { close(n.sent); return nil }

func rawData(t testing.TB, l *memListener) net.Conn {
	nc, err := l.Connect(context.Background())
	check(t, err)
	say(t, nc, banner+label("zrepl_data"))
	expect(t, nc, answer)
	return nc
}

type logFunc func(msg string, args ...any)

func (f logFunc) DebugContext(_ context.Context, msg string, args ...any) { f(msg, args...) }
func (f logFunc) InfoContext(_ context.Context, msg string, args ...any)  { f(msg, args...) }
func (f logFunc) WarnContext(_ context.Context, msg string, args ...any)  { f(msg, args...) }
func (f logFunc) ErrorContext(_ context.Context, msg string, args ...any) { f(msg, args...) }

type closeCounter struct {
	net.Conn
	n *atomic.Int32
}

func (c closeCounter) Close() error { c.n.Add(1); return c.Conn.Close() }

type panicky struct{}

func (panicky) AppendBinary(b []byte) ([]byte, error) { return b, nil }
func (panicky) UnmarshalBinary([]byte) error          { panic("boom") }

// TestCallTimeoutHoldsWhileTheQueueIsFull: a call that waits for room in the queue is bounded, too.
func TestCallTimeoutHoldsWhileTheQueueIsFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl, sv := newMemConns()
		c := rpc.NewClient(rpc.ConnecterFunc(func(context.Context) (net.Conn, error) { return cl, nil }),
			rpc.ClientConfig{CallTimeout: time.Minute})
		go func() { // a server that is alive, but does not read
			say(t, sv, answer)
			for {
				if _, err := sv.Write([]byte(frame(tHeartbeat))); err != nil {
					return
				}
				time.Sleep(time.Second)
			}
		}()
		big := strings.Repeat("x", 300<<10)
		go c.Call(context.Background(), "m", textOf(big), nil)
		synctest.Wait()
		go c.Call(context.Background(), "m", textOf(big), nil)
		synctest.Wait()
		done := make(chan error, 1)
		go func() { done <- c.Call(context.Background(), "m", textOf("small"), nil) }()
		select {
		case err := <-done:
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Error(err)
			}
		case <-time.After(time.Hour):
			t.Error("a call with CallTimeout 1m has not returned after 1h")
		}
		c.Close()
		sv.Close()
		time.Sleep(2 * time.Second)
	})
}

// TestALoggerMayUseTheClient: the client holds no lock while it logs.
func TestALoggerMayUseTheClient(t *testing.T) {
	var c *rpc.Client
	c = rpc.NewClient(rpc.ConnecterFunc(func(context.Context) (net.Conn, error) { return nil, errors.New("no") }),
		rpc.ClientConfig{Logger: logFunc(func(msg string, _ ...any) {
			if msg == "cannot connect" {
				c.ResetConnectBackoff()
			}
		})})
	done := make(chan error, 1)
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	go func() { done <- c.Call(ctx, "m", nil, nil) }()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Error("Call hangs in spite of its ctx")
	}
	closed := make(chan struct{})
	go func() { c.Close(); close(closed) }()
	select {
	case <-closed:
	case <-time.After(30 * time.Second):
		t.Error("Close hangs")
	}
}

// TestDialAfterCloseFails: also before the connection is made.
func TestDialAfterCloseFails(t *testing.T) {
	got := 0
	for range 50 {
		c := rpc.NewClient(rpc.ConnecterFunc(func(context.Context) (net.Conn, error) {
			cl, sv := newMemConns()
			io.WriteString(sv, answer)
			return cl, nil
		}), rpc.ClientConfig{})
		c.Close()
		nc, err := c.Dial(context.Background(), "mine")
		if err == nil {
			got++
			nc.Close()
		}
	}
	if got > 0 {
		t.Errorf("%d of 50 Dials after Close succeeded", got)
	}
}

// TestHandshakesThatGiveWayEnd: their Authenticate ends, and each counts once.
func TestHandshakesThatGiveWayEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newMemListener()
		s := rpc.NewServer(nil, rpc.ServerConfig{MaxHandshakes: 4})
		var running atomic.Int32
		go s.Serve(&rpc.Listener{Listener: l, Authenticate: func(ctx context.Context, nc net.Conn) (net.Conn, string, error) {
			running.Add(1)
			defer running.Add(-1)
			<-ctx.Done() // as one that asks a directory service
			return nil, "", ctx.Err()
		}})
		for range 1000 {
			_, err := l.Connect(t.Context())
			check(t, err)
		}
		synctest.Wait()
		if n := running.Load(); n > 8 {
			t.Errorf("%d Authenticates run at once, MaxHandshakes is 4", n)
		}
		time.Sleep(time.Minute)
		if n := s.Stats().HandshakesRefused; n != 1000 {
			t.Errorf("%d refused of 1000 connections", n)
		}
		s.Close()
	})
}

// TestTheSecuredConnectionOfARefusedClientIsClosed: not only what lies beneath it.
func TestTheSecuredConnectionOfARefusedClientIsClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newMemListener()
		var closes atomic.Int32
		s := rpc.NewServer(nil, rpc.ServerConfig{})
		go s.Serve(&rpc.Listener{Listener: l, Authenticate: func(ctx context.Context, nc net.Conn) (net.Conn, string, error) {
			return closeCounter{nc, &closes}, "tester", nil
		}})
		c := rpc.NewClient(l, rpc.ClientConfig{})
		_, err := c.Dial(t.Context(), "nobody")
		t.Log(err)
		c.Close()
		time.Sleep(time.Minute)
		s.Close()
		if closes.Load() == 0 {
			t.Error("secured was never closed")
		}
	})
}

// TestLogsQuoteThePeersText: nothing of an unknown peer reaches the log as it came.
func TestLogsQuoteThePeersText(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newMemListener()
		s := rpc.NewServer(nil, rpc.ServerConfig{Logger: logFunc(func(msg string, args ...any) {
			for i := 1; i < len(args); i += 2 {
				if v, ok := args[i].(string); ok && strings.ContainsAny(v, "\n\x1b") {
					t.Errorf("%s: %v = %q", msg, args[i-1], v)
				}
			}
		})})
		go s.Serve(&rpc.Listener{Listener: l, Authenticate: func(ctx context.Context, nc net.Conn) (net.Conn, string, error) {
			return nc, "x\nlevel=ERROR", errors.New("unknown")
		}})
		nc, err := l.Connect(t.Context())
		check(t, err)
		say(t, nc, banner+label("\x1b[2Jx\nlevel=ERROR msg=forged"))
		io.ReadAll(nc)
		nc.Close()
		s.Close()
	})
}

// TestAClientThatDoesNotReadItsRepliesIsGivenUp: a client that neither reads nor speaks does not keep its handlers for ever.
func TestAClientThatDoesNotReadItsRepliesIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newMemListener()
		s := rpc.NewServer(nil, rpc.ServerConfig{})
		ended := make(chan struct{})
		rpc.HandleCall(s, "wait", func(ctx context.Context, _ *text) (*text, error) { <-ctx.Done(); close(ended); return nil, ctx.Err() })
		rpc.HandleCall(s, "echo", func(ctx context.Context, r *text) (*text, error) { return r, nil })
		go s.Serve(l.listener())
		nc, err := l.Connect(t.Context())
		check(t, err)
		say(t, nc, banner+label("zrepl_control")+frame(tCall, uint64(1), uint64(0), str8("wait")))
		synctest.Wait()
		for id := range 400 {
			nc.SetWriteDeadline(time.Now().Add(time.Second))
			if _, err := io.WriteString(nc, frame(tCall, uint64(id+2), uint64(0), str8("echo"), strings.Repeat("x", 10000))); err != nil {
				t.Log("stuck after", id)
				break
			}
		}
		// stopped here: no read, no heartbeat, for a day
		select {
		case <-ended:
		case <-time.After(24 * time.Hour):
			t.Error("after a day of silence the handler's ctx has not ended; open:", s.Stats().OpenConns)
		}
		nc.Close()
		s.Close()
	})
}

// TestUnreadRepliesAreNoMoreThanThereAreHandlers: when there is room for one more reply, not all who wait for that make place
// for other handlers.
func TestUnreadRepliesAreNoMoreThanThereAreHandlers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const handlers, size = 32, 128 << 10
		l := newMemListener()
		s := rpc.NewServer(nil, rpc.ServerConfig{MaxHandlers: handlers})
		var made atomic.Int64
		rpc.HandleCall(s, "large", func(context.Context, *text) (*text, error) {
			made.Add(1)
			return textOf(strings.Repeat("x", size)), nil
		})
		serve(t, s, l.listener())
		nc, err := l.Connect(t.Context())
		check(t, err)
		defer nc.Close()
		say(t, nc, banner+label("zrepl_control"))
		expect(t, nc, answer)
		calls, read := 0, 0
		for range 30 {
			for range handlers {
				calls++
				say(t, nc, frame(tCall, uint64(calls), uint64(0), str8("large")))
				synctest.Wait()
			}
			// Two replies are the 256 KiB that may wait, and as many are being written.
			if unread := int(made.Load()) - read; unread > handlers+2+2 {
				t.Fatalf("%d replies were made that are not read, by %d handlers", unread, handlers)
			}
			for large := false; !large; { // what is refused has its replies, too
				kind, payload, err := readFrame(nc)
				if check(t, err); kind != tReply {
					t.Fatalf("frame %#x", kind)
				}
				large = len(payload) > size
			}
			read++
			synctest.Wait()
		}
	})
}

// TestInterceptHoldsUpOnlyItsOwnCall: what it does after handle, here waiting for another call, takes no room from others.
func TestInterceptHoldsUpOnlyItsOwnCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newMemListener()
		lock := make(chan struct{}, 1)
		s := rpc.NewServer(nil, rpc.ServerConfig{Intercept: func(ctx context.Context, call rpc.CallInfo, handle func(context.Context)) {
			if call.Method == "exclusive" {
				lock <- struct{}{}
				handle(ctx)
			} else {
				handle(ctx)
				lock <- struct{}{}
			}
			<-lock
		}})
		gate := make(chan struct{})
		rpc.HandleCall(s, "large", func(context.Context, *text) (*text, error) {
			return textOf(strings.Repeat("x", 300<<10)), nil
		})
		rpc.HandleCall(s, "exclusive", func(context.Context, *text) (*text, error) {
			<-gate
			return textOf(strings.Repeat("x", 10<<10)), nil
		})
		serve(t, s, l.listener())
		c := rpc.NewClient(l, rpc.ClientConfig{})
		defer c.Close()
		start := time.Now()
		var both sync.WaitGroup
		for _, method := range []string{"exclusive", "large"} {
			both.Go(func() {
				if err := c.Call(t.Context(), method, new(text), new(text)); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait()
		}
		close(gate)
		both.Wait()
		if waited := time.Since(start); waited > 0 {
			t.Errorf("the calls took %v", waited)
		}
	})
}

// TestAPanicOfAResultLeaksNoConnection: the panic is the caller's, the connection is ours.
func TestAPanicOfAResultLeaksNoConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newMemListener()
		s := rpc.NewServer(nil, rpc.ServerConfig{})
		serve(t, s, l.listener())
		c := rpc.NewClient(l, rpc.ClientConfig{IdleTimeout: -1})
		ctx, cancel := context.WithCancel(context.Background())
		for range 5 {
			func() {
				defer func() { recover() }()
				c.Download(ctx, "ping", nil, panicky{})
			}()
		}
		cancel()
		time.Sleep(200 * time.Millisecond)
		if n := c.Stats().OpenConns; n != 0 {
			t.Errorf("client: %d open connections after ctx ended and IdleTimeout -1", n)
		}
		c.Close()
		check(t, c.Close())
	})
}

// TestASourceThatEndsWithItsCtxIsNotComplete: a stream whose ctx has ended is cut short, whatever its source says.
func TestASourceThatEndsWithItsCtxIsNotComplete(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newMemListener()
		s := rpc.NewServer(nil, rpc.ServerConfig{Intercept: func(ctx context.Context, _ rpc.CallInfo, h func(context.Context)) {
			ctx, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			h(ctx)
		}})
		rpc.HandleDownload(s, "d", func(ctx context.Context, req *text) (*text, io.ReadCloser, error) {
			return textOf("r"), &chanSource{stop: make(chan struct{})}, nil
		})
		serve(t, s, l.listener())
		c := rpc.NewClient(l, rpc.ClientConfig{})
		defer c.Close()
		st, err := c.Download(context.Background(), "d", nil, nil)
		check(t, err)
		b, err := io.ReadAll(st)
		if err == nil {
			t.Errorf("cut-short stream looks complete: %q, nil", b)
		}
	})
}

// TestATimeoutIsNeverAnEnd: the same on the wire, for the caller's own timeout.
func TestATimeoutIsNeverAnEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newMemListener()
		s := rpc.NewServer(nil, rpc.ServerConfig{})
		rpc.HandleDownload(s, "d", func(ctx context.Context, req *text) (*text, io.ReadCloser, error) {
			return textOf("r"), &chanSource{stop: make(chan struct{})}, nil
		})
		serve(t, s, l.listener())
		nc := rawData(t, l)
		defer nc.Close()
		say(t, nc, frame(tDownload, uint64(time.Second), str8("d")))
		for {
			k, p, err := readFrame(nc)
			check(t, err)
			if k == tEnd {
				t.Errorf("timeout ended with end %x, want fail deadline-exceeded", p)
				return
			}
			if k == tFail {
				return
			}
		}
	})
}

// TestCloseWhileASinkWritesDamagesNoStream: Close takes no buffer away from a sink that is writing it.
func TestCloseWhileASinkWritesDamagesNoStream(t *testing.T) {
	for _, tr := range transports[2:] {
		t.Run(tr.name, func(t *testing.T) {
			l, cn := tr.make(t)
			s := rpc.NewServer(nil, rpc.ServerConfig{})
			rpc.HandleDownload(s, "d", func(ctx context.Context, req *text) (*text, io.ReadCloser, error) {
				return textOf("r"), &fill{(*req)[0], 1 << 20}, nil
			})
			serve(t, s, l)
			c := rpc.NewClient(cn, rpc.ClientConfig{})
			defer c.Close()
			var bad atomic.Int64
			for range 20 {
				st, err := c.Download(context.Background(), "d", textOf("A"), nil)
				check(t, err)
				sink := &slowSink{entered: make(chan struct{}), goOn: make(chan struct{}), want: 'A', bad: &bad}
				done := make(chan struct{})
				go func() { defer close(done); io.Copy(sink, st) }()
				<-sink.entered
				st.Close()
				st2, err := c.Download(context.Background(), "d", textOf("B"), nil)
				check(t, err)
				_, err = io.Copy(io.Discard, st2)
				check(t, err)
				st2.Close()
				close(sink.goOn)
				<-done
			}
			if bad.Load() > 0 {
				t.Errorf("a sink got another stream's bytes %d times", bad.Load())
			}
		})
	}
}

// TestASourceThatTakesItsTimeToClose: the fail frame still arrives.
func TestASourceThatTakesItsTimeToClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newMemListener()
		s := rpc.NewServer(nil, rpc.ServerConfig{})
		rpc.HandleDownload(s, "d", func(ctx context.Context, req *text) (*text, io.ReadCloser, error) {
			return textOf("r"), &slowClose{chanSource{stop: make(chan struct{})}}, nil
		})
		serve(t, s, l.listener())
		nc := rawData(t, l)
		defer nc.Close()
		say(t, nc, frame(tDownload, uint64(time.Second), str8("d")))
		for {
			k, _, err := readFrame(nc)
			if err != nil {
				t.Errorf("want fail deadline-exceeded, got %v", err)
				return
			}
			if k == tFail {
				return
			}
		}
	})
}

// TestADeadlineBoundsAClientThatDoesNotRead: also while the result is being written.
func TestADeadlineBoundsAClientThatDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, big := range []int{10, 1 << 20} {
			l := newMemListener()
			s := rpc.NewServer(nil, rpc.ServerConfig{})
			closed := make(chan time.Time, 1)
			rpc.HandleDownload(s, "d", func(ctx context.Context, req *text) (*text, io.ReadCloser, error) {
				return textOf(string(make([]byte, big))), &closeNote{fill{'A', 1 << 30}, closed}, nil
			})
			served := make(chan error, 1)
			go func() { served <- s.Serve(l.listener()) }()
			nc := rawData(t, l)
			go func() {
				for {
					time.Sleep(5 * time.Second)
					if _, err := io.WriteString(nc, frame(tHeartbeat)); err != nil {
						return
					}
				}
			}()
			say(t, nc, frame(tDownload, uint64(time.Second), str8("d")))
			began := time.Now()
			select {
			case at := <-closed:
				t.Logf("result %d: source closed after %v", big, at.Sub(began))
			case <-time.After(time.Hour):
				t.Errorf("result %d: with a timeout of 1s the source is not closed after an hour", big)
			}
			s.Close()
			nc.Close()
			<-served
			time.Sleep(time.Minute)
		}
	})
}

// TestShutdownDoesNotCutWhatIsStillBeingRead: Shutdown waits for what the client has not read yet.
func TestShutdownDoesNotCutWhatIsStillBeingRead(t *testing.T) {
	for _, tr := range transports[2:] {
		t.Run(tr.name, func(t *testing.T) {
			l, cn := tr.make(t)
			s := rpc.NewServer(nil, rpc.ServerConfig{})
			const size = 600 << 10
			sent := make(chan struct{})
			rpc.HandleDownload(s, "d", func(ctx context.Context, req *text) (*text, io.ReadCloser, error) {
				return textOf("r"), &notify{fill{'A', size}, sent}, nil
			})
			serve(t, s, l)
			c := rpc.NewClient(cn, rpc.ClientConfig{HeartbeatInterval: 200 * time.Millisecond})
			defer c.Close()
			st, err := c.Download(context.Background(), "d", nil, nil)
			check(t, err)
			select {
			case <-sent:
			case <-time.After(5 * time.Second): // there are smaller socket buffers
			}
			down := make(chan error, 1)
			go func() { down <- s.Shutdown(context.Background()) }()
			<-time.After(2 * time.Second) // the sink stalls
			n, err := io.Copy(io.Discard, st)
			if err != nil || n != size {
				t.Errorf("Shutdown let the stream end, but the client has %d of %d: %v", n, size, err)
			}
			check(t, <-down)
		})
	}
}

// pausedConn is a server's connection whose first Read with a deadline to come is where the process is stopped for a while.
type pausedConn struct {
	*memConn
	once sync.Once
}

func (c *pausedConn) Read(b []byte) (n int, err error) {
	c.readBy.mu.Lock()
	by := c.readBy.at
	c.readBy.mu.Unlock()
	if time.Now().Before(by) {
		c.once.Do(func() {
			time.Sleep(20 * time.Second)
			err = os.ErrDeadlineExceeded // as after the end of a pause, whatever has come meanwhile
		})
	}
	if err != nil {
		return 0, err
	}
	return c.memConn.Read(b)
}

// TestAPauseOfTheServerIsNotTheClientsSilence: also after Shutdown, while the client still reads what the kernel has.
func TestAPauseOfTheServerIsNotTheClientsSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newMemListener()
		l.pipe = func() (net.Conn, net.Conn) { c, s := newMemConns(); return c, &pausedConn{memConn: s} }
		s := rpc.NewServer(nil, rpc.ServerConfig{})
		rpc.HandleDownload(s, "d", func(context.Context, *text) (*text, io.ReadCloser, error) {
			return new(text), io.NopCloser(strings.NewReader("data")), nil
		})
		serve(t, s, l.listener())
		nc := rawData(t, l)
		defer nc.Close()
		say(t, nc, dataDown("d", ""))
		synctest.Wait()
		down := make(chan error, 1)
		go func() { down <- s.Shutdown(context.Background()) }()
		for range 8 {
			time.Sleep(5 * time.Second)
			say(t, nc, frame(tHeartbeat)) // fails if the connection is closed
		}
		expect(t, nc, frame(tResult, 0)+dataOf("data")+frame(tGoaway, uint64(1)))
		nc.Close()
		check(t, <-down)
	})
}

// TestShutdownDoesNotCutALinger: one that has failed keeps its second for the client to read why.
func TestShutdownDoesNotCutALinger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newMemListener()
		s := rpc.NewServer(nil, rpc.ServerConfig{})
		rpc.HandleUpload(s, "u", func(ctx context.Context, req *text, r io.Reader) (*text, error) {
			return nil, errors.New("disk full")
		})
		serve(t, s, l.listener())
		nc := rawData(t, l)
		defer nc.Close()
		say(t, nc, frame(tUpload, uint64(0), str8("u")))
		time.Sleep(100 * time.Millisecond)
		began := time.Now()
		go s.Shutdown(context.Background())
		for {
			if _, err := nc.Write(make([]byte, 1000)); err != nil {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		if d := time.Since(began); d < 500*time.Millisecond {
			t.Errorf("the server drained for %v after Shutdown, with 900ms left", d)
		}
	})
}

// TestStatsCountUnreadUploads: an upload that was not read to its end has failed.
func TestStatsCountUnreadUploads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newMemListener()
		s := rpc.NewServer(nil, rpc.ServerConfig{})
		rpc.HandleUpload(s, "u", func(ctx context.Context, req *text, r io.Reader) (*text, error) {
			return textOf("ok"), nil
		})
		serve(t, s, l.listener())
		c := rpc.NewClient(l, rpc.ClientConfig{})
		defer c.Close()
		t.Log(c.Upload(context.Background(), "u", nil, bytes.NewReader(make([]byte, 100000)), nil))
		time.Sleep(5 * time.Second)
		if st := s.Stats(); st.StreamsFailed != 1 {
			t.Errorf("server: %+v", st)
		}
	})
}

// TestACtxOfInterceptEndsAnUploadsReads: its handler's reads end with the ctx that the handler has.
func TestACtxOfInterceptEndsAnUploadsReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newMemListener()
		s := rpc.NewServer(nil, rpc.ServerConfig{Intercept: func(ctx context.Context, _ rpc.CallInfo, h func(context.Context)) {
			ctx, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			h(ctx)
		}})
		rpc.HandleUpload(s, "u", func(ctx context.Context, req *text, r io.Reader) (*text, error) {
			_, err := io.Copy(io.Discard, r)
			return textOf(""), err
		})
		serve(t, s, l.listener())
		c := rpc.NewClient(l, rpc.ClientConfig{})
		defer c.Close()
		ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
		defer cancel()
		began := time.Now()
		err := c.Upload(ctx, "u", nil, &chanSource{stop: make(chan struct{})}, nil)
		if d := time.Since(began); d > time.Minute {
			t.Errorf("the handler's ctx ended after 1s, its Read after %v: %v", d, err)
		}
	})
}

// TestAnErrorWhoseMethodsPanicIsContained: the classic is a nil pointer in an error.
func TestAnErrorWhoseMethodsPanicIsContained(t *testing.T) {
	overTransports(t, func(s *rpc.Server) {
		typedNil := func() error { var e *os.PathError; return e }
		rpc.HandleCall(s, "nil", func(context.Context, *text) (*text, error) { return nil, typedNil() })
		rpc.HandleCall(s, "rpc", func(context.Context, *text) (*text, error) { var e *rpc.Error; return nil, e })
		rpc.HandleDownload(s, "nil", func(context.Context, *text) (*text, io.ReadCloser, error) { return nil, nil, typedNil() })
		rpc.HandleDownload(s, "source", func(context.Context, *text) (*text, io.ReadCloser, error) {
			return new(text), io.NopCloser(readerFunc(func([]byte) (int, error) { return 0, typedNil() })), nil
		})
		rpc.HandleUpload(s, "nil", func(context.Context, *text, io.Reader) (*text, error) { return nil, typedNil() })
	}, func(t *testing.T, c *rpc.Client) {
		for name, try := range map[string]func() error{
			"call":     func() error { return c.Call(t.Context(), "nil", nil, nil) },
			"rpc":      func() error { return c.Call(t.Context(), "rpc", nil, nil) },
			"download": func() error { _, err := c.Download(t.Context(), "nil", nil, nil); return err },
			"source": func() error {
				stream, err := c.Download(t.Context(), "source", nil, nil)
				check(t, err)
				defer stream.Close()
				_, err = io.ReadAll(stream)
				return err
			},
			"upload": func() error { return c.Upload(t.Context(), "nil", nil, strings.NewReader("data"), nil) },
		} {
			if err := try(); rpc.CodeOf(err) != rpc.Internal {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
}

// TestAReadLeftBehindHarmsNobody: a handler that returns while another goroutine of its own still reads.
func TestAReadLeftBehindHarmsNobody(t *testing.T) {
	overTransports(t, func(s *rpc.Server) {
		rpc.HandleUpload(s, "leave", func(_ context.Context, fail *text, r io.Reader) (*text, error) {
			reading := make(chan struct{})
			go func() {
				close(reading)
				io.Copy(io.Discard, r)
			}()
			<-reading
			if *fail != "" {
				return nil, rpc.Errorf(rpc.Aborted, "%s", *fail)
			}
			return new(text), nil
		})
	}, func(t *testing.T, c *rpc.Client) {
		for range 20 {
			blocked, stop := io.Pipe()
			if err := c.Upload(t.Context(), "leave", textOf("no"), blocked, nil); rpc.CodeOf(err) != rpc.Aborted {
				t.Errorf("got %v", err)
			}
			stop.Close()
			endless := readerFunc(func(p []byte) (int, error) { return len(p), nil })
			if err := c.Upload(t.Context(), "leave", nil, endless, nil); err == nil {
				t.Error("an upload that was not read is a success")
			}
		}
	})
}

// TestALimitMayBeAsLargeAsAnInt is about what is allocated for it.
func TestALimitMayBeAsLargeAsAnInt(t *testing.T) {
	l := newMemListener()
	serve(t, rpc.NewServer(nil, rpc.ServerConfig{MaxHandlers: math.MaxInt, MaxConns: math.MaxInt}), l.listener())
	c := rpc.NewClient(l, rpc.ClientConfig{})
	defer c.Close()
	check(t, c.WaitForConnectivity(t.Context()))
}

// TestAConnecterThatPanicsIsAnError for every caller, and so is one that is nil.
func TestAConnecterThatPanicsIsAnError(t *testing.T) {
	for _, connecter := range []rpc.Connecter{nil, rpc.ConnecterFunc(nil), (*rpc.TCPConnecter)(nil),
		rpc.ConnecterFunc(func(context.Context) (net.Conn, error) { panic("boom") })} {
		c := rpc.NewClient(connecter, rpc.ClientConfig{})
		if err := c.Call(t.Context(), "m", nil, nil); err == nil {
			t.Error("Call succeeded")
		}
		if _, err := c.Download(t.Context(), "m", nil, nil); err == nil {
			t.Error("Download succeeded")
		}
		check(t, c.Close())
	}
}

// slowConn is a connection over a link of so many bytes a second.
type slowConn struct {
	*memConn
	rate int
}

func (c slowConn) Write(b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		var m int
		m, err = c.memConn.Write(b[n:min(n+c.rate/8, len(b))])
		n += m
		time.Sleep(time.Duration(m) * time.Second / time.Duration(c.rate))
	}
	return n, err
}

// TestAClientThatReadsLargeRepliesOverASlowLinkIsKept: it takes minutes to write what many callers have asked for at once.
func TestAClientThatReadsLargeRepliesOverASlowLinkIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newMemListener()
		l.pipe = func() (net.Conn, net.Conn) { c, s := newMemConns(); return c, slowConn{s, 64 << 10} }
		s := rpc.NewServer(nil, rpc.ServerConfig{})
		rpc.HandleCall(s, "large", func(context.Context, *text) (*text, error) {
			return textOf(strings.Repeat("x", 512<<10)), nil
		})
		serve(t, s, l.listener())
		c := rpc.NewClient(l, rpc.ClientConfig{})
		var callers sync.WaitGroup
		for range 16 { // 8 s each
			callers.Go(func() {
				for range 2 {
					if err := c.Call(t.Context(), "large", nil, nil); err != nil {
						t.Error(err)
					}
				}
			})
		}
		callers.Wait()
		check(t, c.Close())
	})
}

// TestAHandlerGetsTheTimeThatIsLeftAfterConnecting: what the caller has waited for a connection is not the handler's.
func TestAHandlerGetsTheTimeThatIsLeftAfterConnecting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newMemListener()
		s := rpc.NewServer(nil, rpc.ServerConfig{})
		rpc.HandleCall(s, "left", func(ctx context.Context, _ *text) (*text, error) {
			deadline, _ := ctx.Deadline()
			return textOf(time.Until(deadline).String()), nil
		})
		serve(t, s, l.listener())
		dial := rpc.ConnecterFunc(func(ctx context.Context) (net.Conn, error) {
			time.Sleep(4 * time.Second)
			return l.Connect(ctx)
		})
		call := func(ctx context.Context, config rpc.ClientConfig) {
			c := rpc.NewClient(dial, config)
			var left text
			check(t, c.Call(ctx, "left", nil, &left))
			if left != "6s" {
				t.Errorf("of 10s, of which connecting took 4s, the handler has got %s", left)
			}
			check(t, c.Close())
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		call(ctx, rpc.ClientConfig{})
		cancel()
		call(t.Context(), rpc.ClientConfig{CallTimeout: 10 * time.Second})
	})
}

// slowClosing is a connection whose Close takes its time.
type slowClosing struct{ *memConn }

func (c slowClosing) Close() error { time.Sleep(10 * time.Millisecond); return c.memConn.Close() }

// TestACallThatWaitsForRoomIsRetried on another connection, when the one that it waits for is lost.
func TestACallThatWaitsForRoomIsRetried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newMemListener()
		s := rpc.NewServer(nil, rpc.ServerConfig{})
		rpc.HandleCall(s, "echo", func(_ context.Context, r *text) (*text, error) { return r, nil })
		serve(t, s, l.listener())
		cl, silent := newMemConns() // reads nothing and has no heartbeat
		say(t, silent, answer)
		dials := 0
		c := rpc.NewClient(rpc.ConnecterFunc(func(ctx context.Context) (net.Conn, error) {
			if dials++; dials == 1 {
				return slowClosing{cl}, nil
			}
			return l.Connect(ctx)
		}), rpc.ClientConfig{})
		results := make(chan error, 3)
		for _, size := range []int{300 << 10, 300 << 10, 1} { // one is being written, one fills the queue, one waits
			go func() { results <- c.Call(t.Context(), "echo", textOf(strings.Repeat("x", size)), nil) }()
			synctest.Wait()
		}
		var failed []error
		for range 3 {
			if err := <-results; err != nil {
				failed = append(failed, err)
			}
		}
		if len(failed) != 1 || !errors.Is(failed[0], rpc.ErrPeerTimeout) {
			t.Errorf("of three calls, of which one may have run, these failed: %v", failed)
		}
		check(t, c.Close())
		silent.Close()
	})
}

// lateConn is a connection that is lost before anything is written, after what the other side has sent was read.
type lateConn struct {
	*memConn
	lost chan struct{}
	once sync.Once
}

func (c *lateConn) Write([]byte) (int, error) {
	c.once.Do(func() { close(c.lost) })
	return 0, errLiveBroken
}

func (c *lateConn) Read(b []byte) (int, error) {
	n, err := c.memConn.Read(b)
	if len(b) > 512 { // not of the preface
		<-c.lost
		time.Sleep(time.Millisecond)
	}
	return n, err
}

// TestNothingIsActedOnWithoutAnAnswer: a client that gets none takes it that nothing has run.
func TestNothingIsActedOnWithoutAnAnswer(t *testing.T) {
	for name, request := range map[string]string{"zrepl_control": frame(tCall, uint64(1), uint64(0), str8("run")), "zrepl_data": dataDown("run", "")} {
		wireTest(t, name, func(t *testing.T) {
			l := newMemListener()
			l.pipe = func() (net.Conn, net.Conn) {
				c, s := newMemConns()
				return c, &lateConn{memConn: s, lost: make(chan struct{})}
			}
			s := rpc.NewServer(nil, rpc.ServerConfig{})
			ran := func() { t.Error("the handler ran") }
			rpc.HandleCall(s, "run", func(context.Context, *text) (*text, error) { ran(); return textOf(""), nil })
			rpc.HandleDownload(s, "run", func(context.Context, *text) (*text, io.ReadCloser, error) { ran(); return textOf(""), nil, nil })
			serve(t, s, l.listener())
			nc, err := l.Connect(t.Context())
			check(t, err)
			say(t, nc, banner+label(name)+request)
			time.Sleep(time.Second)
			nc.Close()
		})
	}
}

// TestInterceptIsAroundAnUploadThatIsCalledPing: it is none of the library's.
func TestInterceptIsAroundAnUploadThatIsCalledPing(t *testing.T) {
	l := newMemListener()
	s := rpc.NewServer(nil, rpc.ServerConfig{Intercept: func(context.Context, rpc.CallInfo, func(context.Context)) {}})
	rpc.HandleUpload(s, "ping", func(context.Context, *text, io.Reader) (*text, error) {
		t.Error("the handler ran")
		return nil, nil
	})
	serve(t, s, l.listener())
	c := rpc.NewClient(l, rpc.ClientConfig{})
	defer c.Close()
	check(t, c.WaitForConnectivity(t.Context()))
	if err := c.Upload(t.Context(), "ping", nil, strings.NewReader("x"), nil); rpc.CodeOf(err) != rpc.PermissionDenied {
		t.Error(err)
	}
}

// TestARequestThatArrivesIsNotIdleTime: ten minutes without a request end a connection, but not in the middle of one.
func TestARequestThatArrivesIsNotIdleTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newMemListener()
		s := rpc.NewServer(nil, rpc.ServerConfig{})
		serve(t, s, l.listener())
		nc := rawData(t, l)
		time.Sleep(10*time.Minute - time.Second)
		request := dataDown("ping", "")
		say(t, nc, request[:5])
		time.Sleep(2 * time.Second)
		say(t, nc, request[5:])
		wireWant(t, nc, frame(tResult, byte(0)))
		wireWant(t, nc, frame(tEnd, uint64(0)))
		nc.Close()
	})
}

// TestADeadPeerIsFoundWhileTheLastFrameIsBlocked, for however long its sink has stalled before.
func TestADeadPeerIsFoundWhileTheLastFrameIsBlocked(t *testing.T) {
	for name, stop := range map[string]bool{"idle for long": false, "Shutdown": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newMemListener()
				s := rpc.NewServer(nil, rpc.ServerConfig{})
				full := pipeSize - len(answer) - len(frame(tResult, byte(0))) - 2*len(frame(tData)) // in two frames
				rpc.HandleDownload(s, "full", func(context.Context, *text) (*text, io.ReadCloser, error) {
					return textOf(""), &fill{'x', full}, nil
				})
				serve(t, s, l.listener())
				nc, err := l.Connect(t.Context())
				check(t, err)
				say(t, nc, banner+label("zrepl_data")+dataDown("full", ""))
				for range 11 * 12 { // eleven minutes, in which it does not read
					time.Sleep(5 * time.Second)
					say(t, nc, frame(tHeartbeat))
				}
				shut := make(chan error, 1)
				if stop {
					go func() { shut <- s.Shutdown(t.Context()) }()
				}
				time.Sleep(21 * time.Second)
				if n := s.Stats().OpenConns; n != 0 {
					t.Errorf("%d connections are open to a peer that has been silent for four intervals", n)
				}
				nc.Close()
				if stop {
					check(t, <-shut)
				}
			})
		})
	}
}

// TestAnEarlyErrorOfASmallStartArrives, though what was held back cannot be written any more.
func TestAnEarlyErrorOfASmallStartArrives(t *testing.T) {
	for range 20 {
		synctest.Test(t, func(t *testing.T) {
			cl, sv := newMemConns()
			broken, cl2 := newLiveConn(cl)
			c := rpc.NewClient(rpc.ConnecterFunc(func(context.Context) (net.Conn, error) { return cl2, nil }), rpc.ClientConfig{})
			request := dataUp("put", "")
			small := true
			source := readerFunc(func(p []byte) (int, error) {
				if small {
					small = false
					expect(t, sv, banner+label("zrepl_data")+request)
					say(t, sv, answer)
					synctest.Wait()
					broken.mu.Lock()
					broken.broken = true
					broken.mu.Unlock()
					return 100, nil
				}
				return len(p), nil
			})
			time.AfterFunc(100*time.Millisecond, func() { say(t, sv, frame(tResult, byte(rpc.ResourceExhausted), "no space left")) })
			if err := c.Upload(t.Context(), "put", nil, source, nil); rpc.CodeOf(err) != rpc.ResourceExhausted {
				t.Error(err)
			}
			check(t, c.Close())
			sv.Close()
		})
	}
}

// TestAStreamWhoseResultPanicsIsClosed, as on every other path.
func TestAStreamWhoseResultPanicsIsClosed(t *testing.T) {
	l := newMemListener()
	s := rpc.NewServer(nil, rpc.ServerConfig{})
	source := newLiveSource(1, 1)
	rpc.HandleDownload(s, "panic", func(context.Context, *text) (*srvPanic, io.ReadCloser, error) {
		return &srvPanic{}, source, nil
	})
	serve(t, s, l.listener())
	c := rpc.NewClient(l, rpc.ClientConfig{})
	defer c.Close()
	if _, err := c.Download(t.Context(), "panic", nil, nil); rpc.CodeOf(err) != rpc.Internal {
		t.Error(err)
	}
	if !liveDone(source.shut) {
		t.Error("the stream was not closed")
	}
}

// brokenConn is a connection whose Read fails.
type brokenConn struct {
	net.Conn
	err error
}

func (c brokenConn) Read([]byte) (int, error) { return 0, c.err }

func TestATransportSaysWhyItEnded(t *testing.T) {
	why := fmt.Errorf("ssh: Permission denied (publickey): %w", io.ErrUnexpectedEOF)
	c := rpc.NewClient(rpc.ConnecterFunc(func(context.Context) (net.Conn, error) {
		end, other := net.Pipe()
		go io.Copy(io.Discard, other) // ends with the connection
		return brokenConn{end, why}, nil
	}), rpc.ClientConfig{})
	defer c.Close()
	err := c.Call(t.Context(), "echo", nil, nil)
	if err == nil || !strings.Contains(err.Error(), "Permission denied") || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("the call's error is %v", err)
	}
	if rpc.CodeOf(err) != rpc.Unavailable {
		t.Errorf("its code is %v", rpc.CodeOf(err))
	}
}

// The handshake has a goroutine of its own, but what is passed on of a panic there says where it was.
func TestTransportTLSHandshakePanicKeepsItsStack(t *testing.T) {
	ca := transportNewCA()
	config := ca.serverConfig()
	config.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return transportPanic() }
	l := transportListenTLS(t, config)
	clientSide, serverSide := transportTCPPair(t)
	clientConfig := ca.clientConfig()
	clientConfig.ServerName = "localhost"
	go tls.Client(clientSide, clientConfig).Handshake() // ends with the test's connection
	defer func() {
		if text := fmt.Sprint(recover()); !strings.Contains(text, "out of order") || !strings.Contains(text, "transportPanic") {
			t.Errorf("the panic's value does not say where it was: %s", text)
		}
	}()
	l.Authenticate(context.Background(), serverSide)
}

func transportPanic() (*tls.Config, error) { panic("out of order") }
