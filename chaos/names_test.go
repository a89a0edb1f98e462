//go:build !rpc_notls

package chaos_test

import (
	"context"
	crand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"math/rand/v2"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"example.org/rpc"
)

// ---- Certificates and names ---------------------------------------------------------------------------------------

// named makes a certificate with a Common Name and DNS names of its own.
func named(t testing.TB, ca *authority, name string, dns ...string) []tls.Certificate {
	return []tls.Certificate{ca.issue(t, name, func(c *x509.Certificate) {
		c.Subject, c.DNSNames = pkix.Name{CommonName: name}, dns
	})}
}

func changed(t testing.TB, ca *authority, change func(*x509.Certificate)) []tls.Certificate {
	return []tls.Certificate{ca.issue(t, "tester", change)}
}

// selfSigned says that it is tester, and has nobody to say so.
func selfSigned(t testing.TB) []tls.Certificate {
	key := newKey()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "tester"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(crand.Reader, template, template, &key.PublicKey, key)
	check(t, err)
	return []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}
}

// stolen is the certificate of tester with another key.
func stolen(t testing.TB) []tls.Certificate {
	cert := theCA().issue(t, "tester")
	return []tls.Certificate{{Certificate: cert.Certificate, PrivateKey: newKey()}}
}

// TestCertificatesAndNames: the whole matrix of clients, against a server with a list of names and one without; for
// those who may not come in no handler runs.
func TestCertificatesAndNames(t *testing.T) {
	leaks(t)
	ca, otherCA := theCA(), newAuthority()
	now := time.Now()
	const (
		nobody = 0
		listed = 1 // with a list and without
		any    = 2 // without a list only
	)
	matrix := []struct {
		name  string
		certs []tls.Certificate
		may   int
	}{
		{"tester", named(t, ca, "tester"), listed},
		{"no Common Name, but a DNS name", named(t, ca, "", "tester", "admin"), listed},
		{"name not on the list", named(t, ca, "somebody"), any},
		{"Common Name not on the list, DNS name on it", named(t, ca, "somebody", "tester"), any},
		{"255 letters", named(t, ca, strings.Repeat("a", 255)), any},
		{"none", nil, nobody},
		{"self-signed", selfSigned(t), nobody},
		{"another's certificate without its key", stolen(t), nobody},
		{"other CA", named(t, otherCA, "tester"), nobody},
		{"expired", changed(t, ca, func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Minute) }), nobody},
		{"not yet valid", changed(t, ca, func(c *x509.Certificate) { c.NotBefore = now.Add(time.Hour) }), nobody},
		{"for servers only", changed(t, ca, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), nobody},
		{"for code signing only", changed(t, ca, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} }), nobody},
		{"with an unknown critical extension", changed(t, ca, func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}}
		}), nobody},
		{"empty", named(t, ca, ""), nobody},
		{"empty DNS name", changed(t, ca, func(c *x509.Certificate) { c.Subject = pkix.Name{} }), nobody},
		{".", named(t, ca, "."), nobody},
		{"..", named(t, ca, ".."), nobody},
		{"a/b", named(t, ca, "a/b"), nobody},
		{"../tester", named(t, ca, "../tester"), nobody},
		{"a\\b", named(t, ca, "a\\b"), nobody},
		{"a space", named(t, ca, "a b"), nobody},
		{"tester and a space", named(t, ca, "tester "), nobody},
		{"tester in capitals", named(t, ca, "TESTER"), any},
		{"tester and a NUL", named(t, ca, "tester\x00"), nobody},
		{"control characters", named(t, ca, "a\x1b[2J\nb"), nobody},
		{"a letter that looks like another", named(t, ca, "t\u0435ster"), nobody},
		{"256 letters", named(t, ca, strings.Repeat("a", 256)), nobody},
		{"64 KiB", named(t, ca, strings.Repeat("a", 64<<10)), nobody},
		{"*", named(t, ca, "*"), nobody},
	}
	for _, list := range [][]string{{"tester"}, nil} {
		var ran atomic.Int64
		var identity atomic.Value
		v := service{
			call: func(ctx context.Context, req string) (string, error) {
				ran.Add(1)
				identity.Store(rpc.ClientIdentity(ctx))
				return req, nil
			},
			get: echo.get, put: echo.put,
			own: func(context.Context, net.Conn) { ran.Add(1) },
		}
		l, err := rpc.ListenTLS("127.0.0.1:0", ca.server(t, "server"), list...)
		check(t, err)
		s := v.server(rpc.ServerConfig{})
		serve(t, s, l)
		for _, m := range matrix {
			if m.name == "255 letters" && list != nil {
				continue
			}
			config := &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: ca.pool, ServerName: "server", Certificates: m.certs}
			c := rpc.NewClient(&rpc.TLSConnecter{Addr: l.Addr().String(), Config: config}, rpc.ClientConfig{})
			ran.Store(0)
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			_, err := doCall(ctx, c, "hello")
			_, errGet := doGet(ctx, c, "hello", writerFunc(func(p []byte) (int, error) { return len(p), nil }))
			conn, errDial := c.Dial(ctx, "own")
			if errDial == nil {
				conn.Close()
			}
			cancel()
			c.Close()
			may := m.may == listed || m.may == any && list == nil
			switch {
			case may && (err != nil || errGet != nil || errDial != nil):
				t.Errorf("list %v: %s: %v, %v, %v", list, m.name, err, errGet, errDial)
			case !may && (err == nil || errGet == nil || errDial == nil || ran.Load() > 0):
				t.Errorf("list %v: %s: %v, %v, %v, and %d handlers ran", list, m.name, err, errGet, errDial, ran.Load())
			case !may && (strings.ContainsAny(err.Error(), "\x1b\n\x00") || len(err.Error()) > 2000):
				t.Errorf("list %v: %s: the error is %q", list, m.name, err)
			}
			if may {
				eventually(t, "the handlers of a call and a connection", func() bool { return ran.Load() == 2 })
			}
			count("certificates and names: clients, of each of which a call, a stream and a connection were tried", 1)
		}
	}
}

// TestServersCertificates: a client does not talk to a server that cannot prove who it is.
func TestServersCertificates(t *testing.T) {
	leaks(t)
	ca, otherCA := theCA(), newAuthority()
	for _, m := range []struct {
		name string
		cert tls.Certificate
	}{
		{"other CA", otherCA.issue(t, "server")},
		{"another's name", ca.issue(t, "x", func(c *x509.Certificate) { c.DNSNames = []string{"other"} })},
		{"no name", ca.issue(t, "server", func(c *x509.Certificate) { c.DNSNames = nil })},
		{"expired", ca.issue(t, "server", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })},
		{"for clients only", ca.issue(t, "server", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} })},
	} {
		config := ca.server(t, "server")
		config.Certificates = []tls.Certificate{m.cert}
		l, err := rpc.ListenTLS("127.0.0.1:0", config)
		check(t, err)
		serve(t, echo.server(rpc.ServerConfig{}), l)
		c := newClient(t, overTLS.connect(t, l.Addr().String(), nil), rpc.ClientConfig{})
		if _, err := doCall(t.Context(), c, "hello"); rpc.CodeOf(err) != rpc.Unavailable || !strings.Contains(err.Error(), "the handler did not run") {
			t.Errorf("%s: %v", m.name, err)
		}
		count("certificates and names: servers that could not prove who they were", 1)
	}
}

// serial is the number of the certificate that a server shows.
func serial(t testing.TB, c rpc.Connecter) *big.Int {
	t.Helper()
	conn, err := c.Connect(t.Context())
	check(t, err)
	defer conn.Close()
	return conn.(interface{ ConnectionState() tls.ConnectionState }).ConnectionState().PeerCertificates[0].SerialNumber
}

// TestRenewedCertificates: files that change are taken up by the next connection, on both sides, without a restart;
// half of a renewal changes nothing.
func TestRenewedCertificates(t *testing.T) {
	leaks(t)
	dir := t.TempDir()
	ca := theCA()
	fresh := func(name string) tls.Certificate { return named(t, ca, name, name)[0] }
	first := fresh("server")
	writePart(t, filepath.Join(dir, "ca.pem"), "CERTIFICATE", ca.cert.Raw)
	writePEM(t, dir, "server", first)
	writePEM(t, dir, "client", fresh("one"))
	serverConfig, err := rpc.ServerTLSConfig(filepath.Join(dir, "ca.pem"), filepath.Join(dir, "server.pem"), filepath.Join(dir, "server.key"))
	check(t, err)
	clientConfig, err := rpc.ClientTLSConfig(filepath.Join(dir, "ca.pem"), filepath.Join(dir, "client.pem"), filepath.Join(dir, "client.key"), "server")
	check(t, err)
	l, err := rpc.ListenTLS("127.0.0.1:0", serverConfig)
	check(t, err)
	v := service{call: func(ctx context.Context, _ string) (string, error) { return rpc.ClientIdentity(ctx), nil }}
	serve(t, v.server(rpc.ServerConfig{}), l)
	connecter := &rpc.TLSConnecter{Addr: l.Addr().String(), Config: clientConfig}
	c := newClient(t, connecter, rpc.ClientConfig{IdleTimeout: -1}) // a connection for each call
	for i, name := range []string{"one", "two", "three"} {
		if i > 0 {
			writePEM(t, dir, "client", fresh(name))
		}
		if got, err := doCall(t.Context(), c, ""); err != nil || got != name {
			t.Errorf("renewed as %s, the client is %q, %v", name, got, err)
		}
		count("certificates renewed on disk, and taken up by the next connection", 1)
	}
	for range 3 {
		cert := fresh("server")
		leaf, err := x509.ParseCertificate(cert.Certificate[0])
		check(t, err)
		before := serial(t, connecter)
		writePart(t, filepath.Join(dir, "server.pem"), "CERTIFICATE", cert.Certificate[0]) // half of it
		if got := serial(t, connecter); got.Cmp(before) != 0 {
			t.Errorf("the server shows a certificate of which it has no key")
		}
		writePEM(t, dir, "server", cert)
		if got := serial(t, connecter); got.Cmp(leaf.SerialNumber) != 0 {
			t.Errorf("the server shows certificate %v, the renewed one is %v", got, leaf.SerialNumber)
		}
		count("certificates renewed on disk, and taken up by the next connection", 1)
	}
	writePEM(t, dir, "client", named(t, newAuthority(), "three")[0]) // somebody else's
	if _, err := doCall(t.Context(), c, ""); err == nil {
		t.Error("a certificate of another CA was accepted")
	}
}

// TestNoResumptionAroundARevokedName: a client that keeps sessions, and a server that comes back with the same keys
// but without its name.
func TestNoResumptionAroundARevokedName(t *testing.T) {
	leaks(t)
	for _, tickets := range []bool{false, true} { // ServerTLSConfig has none; a config of the user's own may
		serverConfig := theCA().server(t, "server")
		serverConfig.SessionTicketsDisabled = !tickets
		serverConfig.SetSessionTicketKeys([][32]byte{{1}})
		clientConfig := theCA().client(t, "tester", "server")
		clientConfig.ClientSessionCache = tls.NewLRUClientSessionCache(10)
		addr := ownAddr()
		for i, list := range [][]string{{"tester"}, {"tester", "other"}, {"other"}} {
			l, err := rpc.ListenTLS(addr, serverConfig, list...)
			check(t, err)
			addr = l.Addr().String()
			var ran atomic.Int64
			s := service{call: func(ctx context.Context, _ string) (string, error) {
				ran.Add(1)
				return rpc.ClientIdentity(ctx), nil
			}}.server(rpc.ServerConfig{})
			served := async(func() error { return s.Serve(l) })
			connecter := &rpc.TLSConnecter{Addr: addr, Config: clientConfig}
			for range 3 {
				c := rpc.NewClient(connecter, rpc.ClientConfig{})
				got, err := doCall(t.Context(), c, "")
				c.Close()
				if i < 2 && (err != nil || got != "tester") {
					t.Errorf("list %v: %q, %v", list, got, err)
				}
				if i == 2 && (rpc.CodeOf(err) != rpc.PermissionDenied || ran.Load() > 0) {
					t.Errorf("a revoked name: %q, %v, %d handlers ran", got, err, ran.Load())
				}
				conn, err := connecter.Connect(t.Context())
				check(t, err)
				resumed := conn.(interface{ ConnectionState() tls.ConnectionState }).ConnectionState().DidResume
				conn.Close()
				if resumed && !tickets {
					t.Error("a session was resumed")
				}
				count("certificates and names: connections of a client that keeps sessions", 2)
			}
			check(t, s.Close())
			<-served
		}
	}
}

// ---- Addresses ----------------------------------------------------------------------------------------------------

// addrConn is a connection from an address.
type addrConn struct {
	net.Conn
	remote net.Addr
}

func (c addrConn) RemoteAddr() net.Addr { return c.remote }

// TestAddressMap: random maps and random addresses against the rule as it is written: an address with a zone, then the
// longest prefix, IPv4 in IPv6 form being IPv4.
func TestAddressMap(t *testing.T) {
	leaks(t)
	rng := newRand(t)
	rounds := 300
	if long() {
		rounds = 10_000
	}
	for range rounds {
		entries := map[netip.Prefix]string{}
		clients := map[string]string{}
		zoned := map[string]string{}
		for i := range 1 + rng.IntN(12) {
			addr := randomAddr(rng)
			prefix := netip.PrefixFrom(addr, rng.IntN(addr.BitLen()+1)).Masked()
			if addr.Is6() && rng.IntN(4) == 0 {
				zoned[addr.String()] = "zone" + string(rune('a'+i))
				clients[addr.String()+"%eth0"] = zoned[addr.String()]
				continue
			}
			if entries[prefix] != "" {
				continue
			}
			entries[prefix] = "id" + string(rune('a'+i))
			text := prefix.String()
			switch {
			case prefix.Bits() == addr.BitLen() && rng.IntN(2) == 0:
				text = prefix.Addr().String()
			case addr.Is4() && rng.IntN(3) == 0: // in IPv6 form
				text = netip.PrefixFrom(netip.AddrFrom16(prefix.Addr().As16()), prefix.Bits()+96).String()
			}
			clients[text] = entries[prefix]
		}
		l, err := rpc.ListenTCP("127.0.0.1:0", clients)
		if err != nil {
			t.Fatalf("%v: %v", clients, err)
		}
		for range 40 {
			addr := randomAddr(rng)
			want, bits := "", -1
			for prefix, id := range entries {
				if prefix.Contains(addr) && prefix.Bits() > bits {
					want, bits = id, prefix.Bits()
				}
			}
			remote := netip.AddrPortFrom(addr, 1).String()
			switch {
			case addr.Is4() && rng.IntN(2) == 0:
				remote = netip.AddrPortFrom(netip.AddrFrom16(addr.As16()), 1).String()
			case addr.Is6() && rng.IntN(3) == 0:
				if id := zoned[addr.String()]; id != "" {
					want = id
				}
				remote = netip.AddrPortFrom(addr.WithZone("eth0"), 1).String()
			case addr.Is6() && rng.IntN(3) == 0:
				remote = netip.AddrPortFrom(addr.WithZone("eth1"), 1).String()
			}
			tcp := net.TCPAddrFromAddrPort(netip.MustParseAddrPort(remote))
			_, got, err := l.Authenticate(t.Context(), addrConn{nil, tcp})
			if got != want || (err == nil) != (want != "") {
				t.Errorf("%v: %s is %q, %v; want %q", clients, remote, got, err, want)
			}
			if err != nil && rpc.CodeOf(err) != rpc.PermissionDenied {
				t.Errorf("%s: %v", remote, err)
			}
			count("address map: random addresses in random maps, compared with the rule", 1)
		}
		l.Close()
	}
}

// randomAddr is one of few, so that they meet.
func randomAddr(rng *rand.Rand) netip.Addr {
	if rng.IntN(2) == 0 {
		return netip.AddrFrom4([4]byte{10, byte(rng.IntN(2)), byte(rng.IntN(2)), byte(rng.IntN(4))})
	}
	a := [16]byte{0: 0xfe, 1: 0x80}
	a[7], a[15] = byte(rng.IntN(2)), byte(rng.IntN(4))
	return netip.AddrFrom16(a)
}

// TestAddressesOnTheWire: the same with real connections, of both families.
func TestAddressesOnTheWire(t *testing.T) {
	leaks(t)
	clients := map[string]string{"127.0.0.0/8": "net-*", "127.0.0.5": "five", "::ffff:127.0.0.6": "six", "127.0.0.7/32": "seven-*", "::1": "v6"}
	l, err := rpc.ListenTCP("[::]:0", clients)
	if err != nil {
		t.Skipf("SKIPPED: no IPv6 here: %v", err)
	}
	v := service{call: func(ctx context.Context, _ string) (string, error) { return rpc.ClientIdentity(ctx), nil }}
	serve(t, v.server(rpc.ServerConfig{}), l)
	port := l.Addr().(*net.TCPAddr).AddrPort().Port()
	probe, noIPv6 := net.Listen("tcp", "[::1]:0")
	if noIPv6 == nil {
		probe.Close()
	}
	for from, want := range map[string]string{
		"127.0.0.1": "net-127.0.0.1", "127.0.0.5": "five", "127.0.0.6": "six", "127.0.0.7": "seven-127.0.0.7", "127.9.9.9": "net-127.9.9.9", "::1": "v6",
	} {
		ip := netip.MustParseAddr(from)
		to := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port)
		if ip.Is6() {
			if noIPv6 != nil { // which does not keep anybody from listening at [::]
				continue
			}
			to = netip.AddrPortFrom(ip, port)
		}
		c := newClient(t, overTCP.connect(t, to.String(), net.IP(ip.AsSlice())), rpc.ClientConfig{})
		if got, err := doCall(t.Context(), c, ""); err != nil || got != want {
			t.Errorf("%s is %q, %v; want %s", from, got, err, want)
		}
	}
}
