//go:build !rpc_notls

package rpc

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// TLSConnecter connects with TLS over TCP. The server knows its clients by their certificates.
//
// The fields, and what Config refers to, must not be changed once it is in use; Connect is safe for concurrent use.
type TLSConnecter struct {
	Addr   string      // host:port of the server
	Config *tls.Config // must not be nil; see ClientTLSConfig. Without a ServerName the host of Addr is the one to verify
	Dialer net.Dialer  // how to dial: time limits, local address, keep-alive; the zero value is fine
}

// Connect dials Addr and does the handshake, both within ctx; after that ctx has no part in the connection. The
// caller closes it. It has the methods of [tls.Conn]; its NetConn is the TCP connection.
//
// Errors name Addr, say in words what the server seems to speak if it is not TLS, and wrap those of packages net, tls
// and x509 for errors.Is, errors.As and Timeout. With TLS 1.3 a server verifies the client only after the client's
// side of the handshake: that it does not like the client's certificate is what the first Read returns.
func (c *TLSConnecter) Connect(ctx context.Context) (net.Conn, error) {
	if c.Config == nil {
		return nil, errors.New("rpc: connect to " + printable(c.Addr) + ": the TLSConnecter's Config is nil")
	}
	plain, err := dialTCP(ctx, &c.Dialer, c.Addr)
	if err != nil {
		return nil, err
	}
	conn := newTLSConn(tls.Client, plain, c.config())
	if err := conn.handshake(ctx); err != nil {
		plain.Close()
		what := "TLS handshake with " + printable(c.Addr) + handshakeHint(err, "the server")
		if err == io.EOF { // which is for the clean end of a stream
			err = io.ErrUnexpectedEOF
		}
		return nil, &lostError{what, err}
	}
	return conn, nil
}

// config is Config with a name to verify and with whole records. Where it has both, connections share it.
func (c *TLSConnecter) config() *tls.Config {
	config := c.Config
	if config.ServerName == "" || !config.DynamicRecordSizingDisabled {
		config = config.Clone()
		config.DynamicRecordSizingDisabled = true
	}
	if host, _, err := net.SplitHostPort(c.Addr); err == nil && config.ServerName == "" {
		config.ServerName, _, _ = strings.Cut(host, "%") // certificates have no zones
	}
	return config
}

// ListenTLS listens with TLS on addr (host:port; without a host on every address, with port 0 on one that is free). A
// client's identity is the Common Name of its certificate, or if that is empty the first DNS name in it. It must be a
// valid one (see [Listener]), and one of identities if any are listed; without any, each client that verifies may
// connect. Others are refused with PermissionDenied.
//
// The config must have ClientAuth tls.RequireAndVerifyClientCert, the authorities that clients' certificates come
// from in ClientCAs (nil would mean all those that the system trusts), and a certificate of its own. What its
// GetConfigForClient returns, if there is one, must have the same. A config that does not, or an identity that is not
// valid, is an error at once; other errors name addr. The config is copied. The caller closes the Listener, or hands
// it to a Server; Authenticate is safe for concurrent use. See [ServerTLSConfig].
func ListenTLS(addr string, config *tls.Config, identities ...string) (*Listener, error) {
	if err := checkServerConfig(config); err != nil {
		return nil, err
	}
	for _, identity := range identities {
		if !validIdentity(identity) {
			return nil, errors.New("rpc: listen with TLS: " + quoted(identity) + " is not a valid identity")
		}
	}
	l, err := listenTCP(addr)
	if err != nil {
		return nil, err
	}
	server := &tlsServer{config.Clone(), slices.Clone(identities)}
	server.config.DynamicRecordSizingDisabled = true
	return &Listener{Listener: l, Authenticate: server.authenticate}, nil
}

func checkServerConfig(config *tls.Config) error {
	wrong := ""
	switch {
	case config == nil:
		wrong = "is nil"
	case config.GetConfigForClient != nil: // what it returns is seen at the handshake
	case config.ClientAuth != tls.RequireAndVerifyClientCert:
		wrong = "must have ClientAuth RequireAndVerifyClientCert: clients are known by their certificates"
	case config.ClientCAs == nil:
		wrong = "has no ClientCAs: whom the system trusts would be trusted"
	case len(config.Certificates) == 0 && config.GetCertificate == nil:
		wrong = "has no certificate: Certificates and GetCertificate are empty"
	}
	if wrong == "" {
		return nil
	}
	return errors.New("rpc: listen with TLS: the config " + wrong)
}

// tlsServer is what Authenticate knows; nothing of it changes.
type tlsServer struct {
	config     *tls.Config
	identities []string // none: whoever verifies
}

// authenticate is the Authenticate of a Listener. With an error it returns the TLS connection as well, for the
// refusal.
func (s *tlsServer) authenticate(ctx context.Context, plain net.Conn) (net.Conn, string, error) {
	conn := newTLSConn(tls.Server, plain, s.config)
	if err := conn.handshake(ctx); err != nil {
		return conn, "", &lostError{"TLS handshake" + handshakeHint(err, "the client"), err}
	}
	identity, err := s.identify(conn.ConnectionState())
	return conn, identity, err
}

func (s *tlsServer) identify(state tls.ConnectionState) (string, error) {
	if len(state.VerifiedChains) == 0 { // only a config from GetConfigForClient lets one through
		return "", &Error{Unauthenticated, "the client's certificate was not verified"}
	}
	name := certificateName(state.PeerCertificates[0])
	refused := "client " + quoted(name) + " is not allowed"
	switch {
	case name == "":
		return "", &Error{PermissionDenied, refused + ": its certificate has no Common Name and no DNS name"}
	case !validIdentity(name):
		return "", &Error{PermissionDenied, refused + ": its name is not a valid identity"}
	case len(s.identities) > 0 && !slices.Contains(s.identities, name):
		return "", &Error{PermissionDenied, refused}
	}
	return name, nil
}

func certificateName(leaf *x509.Certificate) string {
	if leaf.Subject.CommonName == "" && len(leaf.DNSNames) > 0 {
		return leaf.DNSNames[0]
	}
	return leaf.Subject.CommonName
}

// handshakeHint says in words what may be behind a handshake's error, where that does not say so itself.
func handshakeHint(err error, peer string) string {
	var notTLS tls.RecordHeaderError
	switch {
	case errors.As(err, &notTLS):
		return ": " + peer + " seems to speak " + spokenInstead(string(notTLS.RecordHeader[:]))
	case hungUp(err):
		return ": " + peer + " closed the connection; it may not speak TLS, or refuses this side"
	}
	return ""
}

// hungUp tells whether the peer ended the connection, or the network did. The alerts of TLS are net.OpErrors, too.
func hungUp(err error) bool {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return true
	}
	var lost *net.OpError
	return errors.As(err, &lost) && (lost.Op == "read" || lost.Op == "write") &&
		!lost.Timeout() && !errors.Is(err, net.ErrClosed)
}

// spokenInstead names a protocol by its first five bytes, which is what crypto/tls shows of it.
func spokenInstead(start string) string {
	switch start {
	case "ZREPL":
		return "ZREPL-RPC without TLS"
	case "SSH-1", "SSH-2":
		return "SSH, not TLS"
	case "HTTP/", "GET /", "HEAD ", "POST ", "PUT /", "PRI *", "OPTIO", "CONNE", "DELET", "PATCH":
		return "HTTP without TLS"
	}
	return "something other than TLS, which begins with " + quoted(start)
}

// ClientTLSConfig returns a config for a [TLSConnecter] from files in PEM form: the authorities that the server's
// certificate may come from, and this side's own certificate, with what is between it and its authority, and key.
// ServerName is the name that the server's certificate must have; empty: the host that is dialed. It is TLS 1.3 and
// no sessions are resumed: each connection verifies the server anew.
//
// A certificate that is renewed on disk is used from the next handshake on. While the new files cannot be read, or do
// not fit together, the old certificate stays in use. The authorities are read once. Errors name the file that is
// wrong. The config may be used by several connecters at once.
func ClientTLSConfig(caFile, certFile, keyFile, serverName string) (*tls.Config, error) {
	pool, files, err := readTLSFiles(caFile, certFile, keyFile)
	if err != nil {
		return nil, err
	}
	config := newTLSConfig()
	config.RootCAs, config.ServerName = pool, serverName
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		return files.current(), nil
	}
	return config, nil
}

// ServerTLSConfig returns a config for [ListenTLS] from files in PEM form: the authorities that clients' certificates
// may come from, and this side's own certificate, with what is between it and its authority, and key. It is TLS 1.3,
// a client's certificate is required and verified, and there are no session tickets: each connection verifies its
// client anew.
//
// Certificates that are renewed on disk are taken up, and errors are, as by [ClientTLSConfig]. The config may be used
// by several listeners at once.
func ServerTLSConfig(caFile, certFile, keyFile string) (*tls.Config, error) {
	pool, files, err := readTLSFiles(caFile, certFile, keyFile)
	if err != nil {
		return nil, err
	}
	config := newTLSConfig()
	config.ClientCAs, config.ClientAuth = pool, tls.RequireAndVerifyClientCert
	config.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		return files.current(), nil
	}
	return config, nil
}

// newTLSConfig is what both sides have in common.
func newTLSConfig() *tls.Config {
	return &tls.Config{
		MinVersion:                  tls.VersionTLS13,
		SessionTicketsDisabled:      true,
		DynamicRecordSizingDisabled: true, // whole records, and a small Write is one
	}
}

func readTLSFiles(caFile, certFile, keyFile string) (*x509.CertPool, *certificateFiles, error) {
	pool, err := readAuthorities(caFile)
	if err != nil {
		return nil, nil, err
	}
	files := &certificateFiles{certFile: certFile, keyFile: keyFile}
	return pool, files, files.reload()
}

func readAuthorities(file string) (*x509.CertPool, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, &fileError{"CA", file, err}
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		return nil, &fileError{"CA", file, errNoCertificate}
	}
	return pool, nil
}

var errNoCertificate = errors.New("no certificate in PEM form in it")

// fileError says which file is wrong.
type fileError struct {
	kind, file string
	cause      error
}

func (e *fileError) Error() string {
	return "rpc: " + e.kind + " file " + printable(e.file) + ": " + e.cause.Error()
}
func (e *fileError) Unwrap() error { return e.cause }

// certificateFiles is a certificate and its key on disk.
type certificateFiles struct {
	certFile, keyFile string // set once

	mu    sync.Mutex // held over reading the files, so that they are read once for all handshakes that wait
	cert  *tls.Certificate
	state [2]fs.FileInfo // of the files that cert comes from
}

// current is the certificate to use in a handshake: what is on disk now, or the last one that was good.
func (f *certificateFiles) current() *tls.Certificate {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.changed() {
		_ = f.reload() // renewals write one file after the other; the next handshake tries again
	}
	return f.cert
}

func (f *certificateFiles) changed() bool {
	for i, file := range []string{f.certFile, f.keyFile} {
		was := f.state[i]
		is, err := os.Stat(file)
		if err == nil && !(os.SameFile(was, is) && was.ModTime().Equal(is.ModTime()) && was.Size() == is.Size()) {
			return true
		}
	}
	return false
}

// reload reads the files. Their state is taken before, so that a change while they are read is seen the next time.
func (f *certificateFiles) reload() error {
	certPEM, certState, err := readPart("certificate", f.certFile)
	if err != nil {
		return err
	}
	keyPEM, keyState, err := readPart("key", f.keyFile)
	if err != nil {
		return err
	}
	if !x509.NewCertPool().AppendCertsFromPEM(certPEM) {
		return &fileError{"certificate", f.certFile, errNoCertificate}
	}
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return &fileError{"certificate", f.certFile + " with key file " + f.keyFile, err}
	}
	f.cert, f.state = &cert, [2]fs.FileInfo{certState, keyState}
	return nil
}

func readPart(kind, file string) ([]byte, fs.FileInfo, error) {
	state, err := os.Stat(file)
	if err != nil {
		return nil, nil, &fileError{kind, file, err}
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, nil, &fileError{kind, file, err}
	}
	if block, _ := pem.Decode(data); block == nil {
		return nil, nil, &fileError{kind, file, errors.New("nothing in PEM form in it")}
	}
	return data, state, nil
}

// tlsConn is a tls.Conn that tells the recordConn beneath it where a Write begins and ends.
type tlsConn struct {
	*tls.Conn
	records *recordConn

	writing sync.Mutex  // held by Write until all is with the kernel, and by what must not come in between
	closed  atomic.Bool // Close was called
}

// newTLSConn returns the side of a connection that role, tls.Client or tls.Server, gives.
func newTLSConn(role func(net.Conn, *tls.Config) *tls.Conn, plain net.Conn, config *tls.Config) *tlsConn {
	records := &recordConn{Conn: plain, whole: true}
	return &tlsConn{Conn: role(records, config), records: records}
}

// errNoHandshake is the error for a handshake whose goroutine has ended in a function of the config.
var errNoHandshake = errors.New("a function of the config did not return")

// handshakePanic is a panic that is passed on to another goroutine, whose stack does not show where it was.
type handshakePanic struct {
	value any
	stack string
}

func (p *handshakePanic) Error() string { return fmt.Sprint(p.value) + "\n\n" + p.stack }

// Unwrap returns the value if it is an error.
func (p *handshakePanic) Unwrap() error {
	err, _ := p.value.(error)
	return err
}

// handshake does the handshake in a goroutine of its own: that needs a large stack, which the caller's would keep as long
// as it goes on to read the connection. A panic in a function of the config is passed on.
func (c *tlsConn) handshake(ctx context.Context) error {
	err := errNoHandshake
	var panicked *handshakePanic
	done := make(chan struct{})
	go func() { // ends with the handshake, which ctx ends; handshake waits for it
		defer close(done)
		defer func() {
			if p := recover(); p != nil {
				panicked = &handshakePanic{p, strings.TrimSpace(string(debug.Stack()))}
			}
		}()
		err = c.HandshakeContext(ctx)
	}()
	<-done
	c.records.whole = false
	if panicked != nil {
		panic(panicked)
	}
	return err
}

const (
	// overRecords is how many whole records are written in one system call: as many as fit a segment of Linux's loopback,
	// of 65483 bytes. One call that makes two segments is a good deal slower; elsewhere it does not matter.
	overRecords = 3
	// overSize is that of a buffer for writeOver: the records, and in front of them room for what encryption adds.
	overSize = (overRecords + 1) * tlsRecord
)

// overBuffers are lent for the time of a Write, so that idle connections need none.
var overBuffers = sync.Pool{New: func() any { return new([overSize]byte) }}

// Write returns when all of p is with the kernel.
func (c *tlsConn) Write(p []byte) (n int, err error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	if len(p) <= tlsRecord { // there is nothing to gather
		return c.Conn.Write(p)
	}
	b := overBuffers.Get().(*[overSize]byte)
	defer overBuffers.Put(b)
	for n < len(p) && err == nil {
		m := copy(b[tlsRecord:], p[n:])
		m, err = c.writeOverLocked(b[:tlsRecord+m], tlsRecord)
		n += m
	}
	return n, err
}

// writeOver writes b[from:] with few system calls, and spoils b: what was encrypted makes room for the records that are
// gathered in it.
func (c *tlsConn) writeOver(b []byte, from int) (int, error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	return c.writeOverLocked(b, from)
}

func (c *tlsConn) writeOverLocked(b []byte, from int) (int, error) {
	c.records.gather(b, from)
	n, err := c.Conn.Write(b[from:])
	if flushErr := c.records.flush(); err == nil {
		err = flushErr
	}
	if err != nil {
		return 0, err // how much the peer has, nobody can say; the connection is of no more use
	}
	return n, nil
}

// CloseWrite tells the peer that no more comes. Like that of [tls.Conn] it waits for a Write in progress.
func (c *tlsConn) CloseWrite() error {
	c.writing.Lock()
	defer c.writing.Unlock()
	return c.Conn.CloseWrite()
}

// closeTimeout bounds what Close takes to say goodbye to a peer that does not read.
const closeTimeout = 5 * time.Second

// Close closes the connection, which ends a Read and a Write in progress. The peer is told that this is the end,
// unless a Write is in progress: its bytes are cut short anyway, and to wait for it could take for ever.
func (c *tlsConn) Close() error {
	if c.closed.Swap(true) {
		return net.ErrClosed
	}
	if !c.writing.TryLock() {
		return c.records.Close()
	}
	defer c.writing.Unlock()
	// crypto/tls waits for its lock before it sets a deadline; a Read that answers a key update may be stuck with it.
	c.SetWriteDeadline(time.Now().Add(closeTimeout))
	return c.Conn.Close()
}

// NetConn returns the connection beneath TLS. To read from it or to write to it breaks the connection.
func (c *tlsConn) NetConn() net.Conn { return c.records.Conn }

// bytesRead counts what has come from the peer, including what is not decrypted yet: a record that comes slowly is a
// sign of life long before crypto/tls has all of it. It is safe for concurrent use.
func (c *tlsConn) bytesRead() uint64 { return c.records.received.Load() }

// recordConn is beneath a tls.Conn. That makes a system call for each record of 16 KiB that it writes; this one can gather
// them. It alters no byte and keeps their order. Reads are only counted: crypto/tls reads up to 40 KiB at a time where
// that much is there, and more did not measure better.
type recordConn struct {
	net.Conn
	received atomic.Uint64 // bytes read from Conn

	// Owned by the reader.
	whole  bool    // no Read crosses the end of a record
	header [5]byte // of the record at hand: its last two bytes are the size of what follows (RFC 8446, 5.1)
	got    int     // bytes of the header that came
	left   int     // bytes of the record that are to come after it

	mu       sync.Mutex // the write lock: held while writing to Conn, so that records keep their order
	over     []byte     // between gather and flush: where records wait, in front of the bytes that are not encrypted yet
	held     int        // bytes of records in over
	free     int        // bytes of over that records may take
	writeErr error      // Conn's first; records are missing from there on, so every later Write has it, too
}

// Read reads, and counts. During the handshake crypto/tls gets one record at a time: it keeps the buffer that it reads
// into, and would make that larger than an idle connection should have.
func (r *recordConn) Read(p []byte) (int, error) {
	if r.whole {
		p = p[:min(len(p), r.missing())]
	}
	n, err := r.Conn.Read(p)
	r.received.Add(uint64(n))
	if r.whole {
		r.note(p[:n])
	}
	return n, err
}

// missing is how much is to come of the record at hand, or of its header.
func (r *recordConn) missing() int {
	if r.got < len(r.header) {
		return len(r.header) - r.got
	}
	return r.left
}

func (r *recordConn) note(b []byte) {
	if r.got < len(r.header) {
		r.got += copy(r.header[r.got:], b)
		r.left = int(r.header[3])<<8 | int(r.header[4])
	} else {
		r.left -= len(b)
	}
	if r.got == len(r.header) && r.left == 0 {
		r.got = 0
	}
}

// gather has the records of b[from:] wait in b from now on.
func (r *recordConn) gather(b []byte, from int) {
	r.mu.Lock()
	r.over, r.held, r.free = b, 0, from
	r.mu.Unlock()
}

// flush ends that, and writes what waits.
func (r *recordConn) flush() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.flushLocked()
	r.over = nil
	return r.writeErr
}

// Write writes a record, or has it wait. Besides those of the Write in progress there are few: Close's goodbye, and what a
// Read has to answer. They are taken as they come, but only a whole record tells that 16 KiB have been encrypted.
func (r *recordConn) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	const applicationData = 23 // RFC 8446, 5.1
	if r.over != nil && len(p) >= tlsRecord && p[0] == applicationData {
		r.free += tlsRecord
	}
	if r.held+len(p) > r.free {
		r.flushLocked()
	}
	if len(p) <= r.free && r.over != nil && r.writeErr == nil {
		r.held += copy(r.over[r.held:], p)
		return len(p), nil
	}
	return r.writeLocked(p)
}

func (r *recordConn) flushLocked() {
	if r.held > 0 {
		r.writeLocked(r.over[:r.held])
		r.held = 0
	}
}

func (r *recordConn) writeLocked(p []byte) (int, error) {
	if r.writeErr != nil {
		return 0, r.writeErr
	}
	n, err := r.Conn.Write(p)
	r.writeErr = err
	return n, err
}
