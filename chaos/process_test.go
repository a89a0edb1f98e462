//go:build !rpc_notls

package chaos_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"example.org/rpc"
)

// ---- Helper processes: this program again, as a server or as a client ---------------------------------------------

const (
	roleVariable = "CHAOS_ROLE" // what to be: "server" or "client"
	addrVariable = "CHAOS_ADDR" // where to listen or to connect
	tlsVariable  = "CHAOS_TLS"  // the directory of the certificates; empty: plain TCP
	muteVariable = "CHAOS_MUTE" // a server that never gets through a handshake
)

// say prints a line for the process that has started this one.
func say(words ...any) { fmt.Println(words...) }

// runRole is the main function of a helper. It ends when its standard input does.
func runRole(role string) {
	switch role {
	case "server":
		roleServer()
	case "client":
		roleClient()
	case "target":
		roleTarget()
	}
}

func must(err error) {
	if err != nil {
		say("failed", err)
		os.Exit(1)
	}
}

// roleListen listens as the environment says.
func roleListen() *rpc.Listener {
	addr, dir := os.Getenv(addrVariable), os.Getenv(tlsVariable)
	if dir == "" {
		l, err := rpc.ListenTCP(addr, map[string]string{"0.0.0.0/0": "host-*"})
		must(err)
		return l
	}
	config, err := rpc.ServerTLSConfig(filepath.Join(dir, "ca.pem"), filepath.Join(dir, "server.pem"), filepath.Join(dir, "server.key"))
	must(err)
	l, err := rpc.ListenTLS(addr, config)
	must(err)
	return l
}

func roleServer() {
	l := roleListen()
	if os.Getenv(muteVariable) != "" {
		l.Authenticate = func(ctx context.Context, _ net.Conn) (net.Conn, string, error) {
			say("begin preface")
			<-ctx.Done()
			return nil, "", ctx.Err()
		}
	}
	s := deathService(say).server(rpc.ServerConfig{HeartbeatInterval: holeHeartbeat})
	say("listening", l.Addr())
	go s.Serve(l)
	go func() { // tells when the last connection has gone
		for open := false; ; pause() {
			if n := s.Stats().OpenConns; open != (n > 0) {
				if open = n > 0; !open {
					say("end conns", time.Now().UnixNano())
				}
			}
		}
	}()
	io.Copy(io.Discard, os.Stdin)
}

func roleClient() {
	addr, dir := os.Getenv(addrVariable), os.Getenv(tlsVariable)
	var connecter rpc.Connecter = &rpc.TCPConnecter{Addr: addr}
	if dir != "" {
		config, err := rpc.ClientTLSConfig(filepath.Join(dir, "ca.pem"), filepath.Join(dir, "client.pem"), filepath.Join(dir, "client.key"), "server")
		must(err)
		connecter = &rpc.TLSConnecter{Addr: addr, Config: config}
	}
	c := rpc.NewClient(connecter, rpc.ClientConfig{HeartbeatInterval: holeHeartbeat})
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		op := lines.Text()
		go func() {
			err := deathOp(context.Background(), c, connecter, op)
			say("done", op, time.Now().UnixNano(), err)
		}()
	}
}

// deathStates are what a process can be in the middle of, when it dies or its network does.
var deathStates = []string{"idle", "call", "get-idle", "get-full", "put-idle", "put-full", "preface"}

// deathOp is what a client does in a state. It returns when it is over.
func deathOp(ctx context.Context, c *rpc.Client, connecter rpc.Connecter, op string) error {
	switch op {
	case "idle": // a connection of its own
		c := rpc.NewClient(connecter, rpc.ClientConfig{HeartbeatInterval: holeHeartbeat})
		defer c.Close()
		if _, err := doCall(ctx, c, "idle"); err != nil {
			return err
		}
		for c.Stats().OpenConns > 0 && ctx.Err() == nil {
			pause()
		}
		return errors.New("the connection has ended")
	case "call":
		_, err := doCall(ctx, c, "call")
		return err
	case "get-idle", "get-full":
		_, err := doGet(ctx, c, op, slowSink())
		return err
	case "put-idle":
		_, err := doPut(ctx, c, op, newGated(content(1, 1000), content(1, 0)))
		return err
	case "put-full":
		_, err := doPut(ctx, c, op, struct{ io.Reader }{contentForever(1)})
		return err
	case "preface":
		conn, err := connecter.Connect(ctx)
		if err != nil {
			return err
		}
		defer conn.Close()
		io.WriteString(conn, banner+"zrepl_da")
		say("begin preface")
		return func() error { _, err := io.Copy(io.Discard, conn); return err }()
	case "all":
		return useAll(ctx, c)
	}
	return errors.New("no such operation")
}

// slowSink is slower than any network.
func slowSink() io.Writer {
	n := 0
	return writerFunc(func(p []byte) (int, error) {
		if n += len(p); n > 256<<10 {
			n = 0
			<-time.After(10 * time.Millisecond)
		}
		return len(p), nil
	})
}

// deathService serves deathOp, and says when a handler begins and ends.
func deathService(say func(words ...any)) service {
	begin := func(op string) { say("begin", op) }
	end := func(op string, err error) { say("end", op, time.Now().UnixNano(), err) }
	return service{
		call: func(ctx context.Context, op string) (string, error) {
			if op != "hello" {
				begin(op)
			}
			if op == "hello" || op == "idle" {
				return op, nil
			}
			<-ctx.Done()
			end(op, ctx.Err())
			return "", ctx.Err()
		},
		get: func(ctx context.Context, op string) (string, io.ReadCloser, error) {
			if op == "hello" {
				return echo.get(ctx, op)
			}
			begin(op)
			g := newGated(content(1, 1000), content(1, 0))
			var r io.Reader = g
			if op == "get-full" {
				r = contentForever(1)
			}
			return "", &programSource{Reader: r, closed: func() { g.Close(); end(op, nil) }}, nil
		},
		put: func(ctx context.Context, op string, r io.Reader) (string, error) {
			if op == "hello" {
				return echo.put(ctx, op, r)
			}
			begin(op)
			_, err := io.Copy(slowSink(), r)
			end(op, err)
			return "", err
		},
		own: echo.own,
	}
}

// child is a helper process.
type child struct {
	t     testing.TB
	cmd   *exec.Cmd
	stdin io.WriteCloser
	mu    sync.Mutex
	lines []string
	over  bool
	done  chan struct{} // closed when its output has ended
}

// startChild runs a role, behind the words of a prefix such as "ip netns exec".
func startChild(t testing.TB, role string, prefix []string, env ...string) *child {
	t.Helper()
	args := append(prefix, os.Args[0])
	ch := &child{t: t, cmd: exec.Command(args[0], args[1:]...), done: make(chan struct{})}
	ch.cmd.Env = append(os.Environ(), append(env, roleVariable+"="+role)...)
	ch.cmd.Stderr = os.Stderr
	var err error
	ch.stdin, err = ch.cmd.StdinPipe()
	check(t, err)
	out, err := ch.cmd.StdoutPipe()
	check(t, err)
	check(t, ch.cmd.Start())
	go func() {
		defer close(ch.done)
		for s := bufio.NewScanner(out); s.Scan(); {
			ch.mu.Lock()
			ch.lines = append(ch.lines, s.Text())
			ch.mu.Unlock()
		}
		ch.mu.Lock()
		ch.over = true
		ch.mu.Unlock()
	}()
	t.Cleanup(ch.kill)
	return ch
}

// kill is kill -9.
func (ch *child) kill() {
	ch.cmd.Process.Kill()
	<-ch.done
	ch.cmd.Wait()
	ch.stdin.Close()
}

func (ch *child) do(op string) { fmt.Fprintln(ch.stdin, op) }

// line waits for a line that begins so, takes it, and returns the rest.
func (ch *child) line(prefix string) (rest string) {
	found := false
	eventually(ch.t, "the line "+prefix+" of a helper", func() bool {
		ch.mu.Lock()
		defer ch.mu.Unlock()
		for i, line := range ch.lines {
			if rest, found = strings.CutPrefix(line, prefix+" "); found || line == prefix {
				ch.lines = append(ch.lines[:i:i], ch.lines[i+1:]...)
				return true
			}
		}
		return ch.over
	})
	return rest
}

// stamp is the time in a line.
func stamp(t testing.TB, rest string) time.Time {
	word, _, _ := strings.Cut(rest, " ")
	n, err := strconv.ParseInt(word, 10, 64)
	if err != nil {
		t.Errorf("no time in %q: %v", rest, err)
		return time.Time{}
	}
	return time.Unix(0, n)
}

// writePEM writes a certificate and its key, one file after the other.
func writePEM(t testing.TB, dir, name string, cert tls.Certificate) {
	t.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	check(t, err)
	writePart(t, filepath.Join(dir, name+".pem"), "CERTIFICATE", cert.Certificate[0])
	writePart(t, filepath.Join(dir, name+".key"), "PRIVATE KEY", key)
}

func writePart(t testing.TB, file, kind string, der []byte) {
	t.Helper()
	check(t, os.WriteFile(file+".new", pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
	check(t, os.Rename(file+".new", file))
}

// tlsDir is a directory with what both sides of a TLS connection need; "" for TCP.
func tlsDir(t testing.TB, tr transport) string {
	if tr.name != "tls" {
		return ""
	}
	dir := t.TempDir()
	writePart(t, filepath.Join(dir, "ca.pem"), "CERTIFICATE", theCA().cert.Raw)
	writePEM(t, dir, "server", theCA().issue(t, "server"))
	writePEM(t, dir, "client", theCA().issue(t, "tester"))
	return dir
}

// ---- Process death ------------------------------------------------------------------------------------------------

// TestDeathOfTheServer: kill -9 of the server, in each state: what was in progress is an error at once, and after a
// restart at the same address the same client works again by itself.
func TestDeathOfTheServer(t *testing.T) {
	leaks(t)
	for _, tr := range transports {
		t.Run(tr.name, func(t *testing.T) {
			dir := tlsDir(t, tr)
			var wg sync.WaitGroup
			for _, state := range deathStates {
				env := []string{tlsVariable + "=" + dir}
				first := append(env, addrVariable+"="+ownAddr())
				if state == "preface" {
					first = append(first, muteVariable+"=1")
				}
				server := startChild(t, "server", nil, first...)
				addr := server.line("listening")
				c := newClient(t, tr.connect(t, addr, nil), rpc.ClientConfig{HeartbeatInterval: holeHeartbeat})
				wg.Go(func() {
					op := state
					if op == "preface" {
						op = "all" // which the server never answers
					}
					ctx, cancel := context.WithTimeout(context.Background(), patience)
					defer cancel()
					done := async(func() error { return deathOp(ctx, c, tr.connect(t, addr, nil), op) })
					server.line("begin " + state)
					server.kill()
					killed := time.Now()
					if err := within(t, state, done); err == nil || ctx.Err() != nil {
						t.Errorf("%s: %v", state, err)
					}
					most("process death: longest time until the other side knew, in ms", time.Since(killed).Milliseconds())
					server := startChild(t, "server", nil, append(env, addrVariable+"="+addr)...)
					if got := server.line("listening"); got != addr {
						t.Errorf("the server came back at %q, not at %s", got, addr)
					}
					recovered(t, state, func() error {
						ctx, cancel := context.WithTimeout(context.Background(), patience)
						defer cancel()
						return useAll(ctx, c)
					})
				})
			}
			wg.Wait()
		})
	}
}

// recovered wants f to succeed soon.
func recovered(t testing.TB, state string, f func() error) {
	began := time.Now()
	recoveredIn(t, state, f)
	most("process death: longest time until all worked again after the restart, in ms", time.Since(began).Milliseconds())
	count("process death: processes killed in the middle of something, and survived by the other side", 1)
}

// TestDeathOfTheClient: kill -9 of the client, in each state: the handler is told, nothing is left, and a new client
// is served.
func TestDeathOfTheClient(t *testing.T) {
	leaks(t)
	for _, tr := range transports {
		t.Run(tr.name, func(t *testing.T) {
			dir := tlsDir(t, tr)
			var wg sync.WaitGroup
			for _, state := range deathStates {
				events := make(chan string, 100)
				s := deathService(func(words ...any) { events <- strings.TrimSpace(fmt.Sprintln(words...)) }).server(
					rpc.ServerConfig{HeartbeatInterval: holeHeartbeat})
				l := tr.listen(t)
				serve(t, s, l)
				env := []string{tlsVariable + "=" + dir, addrVariable + "=" + l.Addr().String()}
				client := startChild(t, "client", nil, env...)
				wg.Go(func() {
					client.do(state)
					if state == "preface" {
						client.line("begin preface")
					} else if got := within(t, state, events); got != "begin "+state {
						t.Errorf("%s: %s", state, got)
					}
					client.kill()
					killed := time.Now()
					if state != "preface" && state != "idle" {
						if got := within(t, state, events); !strings.HasPrefix(got, "end "+state) {
							t.Errorf("%s: %s", state, got)
						}
					}
					eventually(t, "the end of the connections of a dead client, "+state, func() bool {
						return s.Stats().OpenConns == 0 && (state != "preface" || s.Stats().HandshakesRefused > 0)
					})
					most("process death: longest time until the other side knew, in ms", time.Since(killed).Milliseconds())
					client := startChild(t, "client", nil, env...)
					recovered(t, state, func() error {
						client.do("all")
						if got := client.line("done all"); !strings.HasSuffix(got, "<nil>") {
							return errors.New(got)
						}
						return nil
					})
				})
			}
			wg.Wait()
		})
	}
}

// ---- Network namespaces -------------------------------------------------------------------------------------------

// TestLinkDown: the link between two hosts goes down, in each state, and both give up; it comes up again, and all works
// by itself. The hosts are network namespaces.
func TestLinkDown(t *testing.T) {
	leaks(t)
	server, client := twoHosts(t)
	for _, tr := range transports {
		t.Run(tr.name, func(t *testing.T) {
			dir := tlsDir(t, tr)
			s := startChild(t, "server", server.exec(), tlsVariable+"="+dir, addrVariable+"="+server.addr+":0")
			c := startChild(t, "client", client.exec(), tlsVariable+"="+dir, addrVariable+"="+s.line("listening"))
			ops := []string{"idle", "call", "get-idle", "get-full", "put-idle", "put-full"}
			for _, op := range ops {
				c.do(op)
				s.line("begin " + op)
			}
			<-time.After(2 * holeHeartbeat) // until the pipes are full
			client.ip("link", "set", client.link, "down")
			down := time.Now()
			h := &holeTest{t: t}
			for _, op := range ops {
				h.name = "link down, " + op + " over " + tr.name
				h.gaveUpAt("client", down, stamp(t, c.line("done "+op)))
				if op != "idle" {
					h.gaveUpAt("server", down, stamp(t, s.line("end "+op)))
				}
			}
			h.gaveUpAt("server", down, stamp(t, s.line("end conns")))
			client.ip("link", "set", client.link, "up")
			recovered(t, "link down", func() error {
				c.do("all")
				if got := c.line("done all"); !strings.HasSuffix(got, "<nil>") {
					return errors.New(got)
				}
				return nil
			})
		})
	}
}

// gaveUpAt is gaveUp for a time that another process has told.
func (h *holeTest) gaveUpAt(side string, since, at time.Time) {
	h.gaveUp(side, time.Now().Add(-at.Sub(since)))
}

// host is a network namespace.
type host struct {
	t                testing.TB
	name, link, addr string
}

func (h host) exec() []string { return []string{"ip", "netns", "exec", h.name} }

func (h host) ip(args ...string) {
	h.t.Helper()
	if out, err := exec.Command("ip", append([]string{"-n", h.name}, args...)...).CombinedOutput(); err != nil {
		h.t.Fatalf("ip %v: %v: %s", args, err, out)
	}
}

// twoHosts makes two namespaces with a link between them, or skips the test where that cannot be.
func twoHosts(t testing.TB) (server, client host) {
	if _, err := exec.LookPath("ip"); err != nil || os.Getuid() != 0 {
		t.Skip("SKIPPED: this needs Linux, root, and ip of iproute2")
	}
	suffix := strconv.Itoa(os.Getpid())
	server = host{t, "chaos-s-" + suffix, "cs" + suffix, "192.0.2.1"} // addresses for documentation: nobody's
	client = host{t, "chaos-c-" + suffix, "cc" + suffix, "192.0.2.2"}
	for _, h := range []host{server, client} {
		if out, err := exec.Command("ip", "netns", "add", h.name).CombinedOutput(); err != nil {
			t.Skipf("SKIPPED: no network namespaces here: %v: %s", err, bytes.TrimSpace(out))
		}
		t.Cleanup(func() { exec.Command("ip", "netns", "del", h.name).Run() })
	}
	server.ip("link", "add", server.link, "type", "veth", "peer", "name", client.link, "netns", client.name)
	for _, h := range []host{server, client} {
		h.ip("addr", "add", h.addr+"/30", "dev", h.link)
		h.ip("link", "set", "lo", "up")
		h.ip("link", "set", h.link, "up")
	}
	return server, client
}
