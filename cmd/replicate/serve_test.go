package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"example.org/rpc"
)

// running is a "replicate serve" in this process.
type running struct {
	addr   string
	stop   func() // as an interrupt
	ended  <-chan int
	mu     sync.Mutex
	logged strings.Builder
}

func (r *running) log() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.logged.String()
}

// startServe starts the passive side on a port of loopback; the test's end stops it and waits.
func startServe(t testing.TB, args ...string) *running {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	lines, log := io.Pipe()
	ended := make(chan int, 1)
	r := &running{stop: cancel, ended: ended}
	go func() { // ends after cancel; the cleanup waits for it
		status := run(ctx, append([]string{"serve", "-listen", "127.0.0.1:0", "-json"}, args...), io.Discard, log)
		log.Close()
		ended <- status
	}()
	addr := make(chan string, 1)
	drained := make(chan struct{})
	go func() { // ends with the log; the cleanup waits for it
		defer close(drained)
		defer close(addr)
		for scanner := bufio.NewScanner(lines); scanner.Scan(); {
			var line struct{ Msg, Addr string }
			json.Unmarshal(scanner.Bytes(), &line)
			if line.Msg == "listening" {
				addr <- line.Addr
			}
			r.mu.Lock()
			r.logged.WriteString(scanner.Text() + "\n")
			r.mu.Unlock()
		}
	}()
	r.addr = <-addr
	if r.addr == "" {
		cancel()
		t.Fatal("it does not listen:\n", r.log())
	}
	t.Cleanup(func() {
		cancel()
		<-drained
		if t.Failed() {
			t.Log("the server logged:\n", r.log())
		}
	})
	return r
}

// world is what most tests need: certificates, and folders for the stores.
type world struct {
	tls, source, sink string
}

func newWorld(t testing.TB, clients ...string) *world {
	t.Helper()
	dir := t.TempDir()
	w := &world{tls: filepath.Join(dir, "tls"), source: filepath.Join(dir, "source"), sink: filepath.Join(dir, "sink")}
	mustRun(t, append([]string{"certs", "-dir", w.tls, "server"}, clients...)...)
	for _, d := range []string{w.source, w.sink} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

// client is a client with the certificate of that name.
func (w *world) client(t testing.TB, addr, name string) *rpc.Client {
	t.Helper()
	flags := peerFlags{addr: addr, tls: w.tls, name: name, serverName: defaultServer}
	client, err := flags.client(rpc.ClientConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

func sums(t testing.TB, dir string) map[string][sha256.Size]byte {
	t.Helper()
	found := make(map[string][sha256.Size]byte)
	for name, content := range tree(t, dir) {
		found[name] = sha256.Sum256([]byte(content))
	}
	return found
}

func sameTree(t testing.TB, a, b string) {
	t.Helper()
	if x, y := sums(t, a), sums(t, b); fmt.Sprint(x) != fmt.Sprint(y) {
		t.Errorf("%s and %s differ:\n%v\n%v", a, b, x, y)
	}
}

func TestPushAndPullOverMutualTLS(t *testing.T) {
	w := newWorld(t, "laptop")
	for i := range 3 {
		put(t, w.source, fmt.Sprintf("db/v%d", i), noise(300_000+i), i)
		put(t, w.source, fmt.Sprintf("db/deep/er/v%d", i), noise(i), i)
	}
	put(t, w.source, "at-the-top", noise(10), 1)
	server := startServe(t, "-sink", "dir:"+w.sink, "-tls", w.tls)
	push := []string{"push", "-peer", server.addr, "-tls", w.tls, "-store", "dir:" + w.source}
	if out := mustRun(t, append(push, "-n")...); !strings.Contains(out, "7 versions") || len(tree(t, w.sink)) > 0 {
		t.Errorf("the plan is\n%s", out)
	}
	if out := mustRun(t, push...); !strings.Contains(out, "transferred 7 versions: ") {
		t.Errorf("push says\n%s", out)
	}
	sameTree(t, w.source, filepath.Join(w.sink, "laptop"))
	if out := mustRun(t, push...); !strings.Contains(out, "nothing to do: the other side has all of 3 filesystems") {
		t.Errorf("a second push says\n%s", out)
	}
	out := mustRun(t, "list", "-peer", server.addr, "-tls", w.tls, "-store", "dir:"+w.source)
	if strings.Count(out, " both\n") != 7 {
		t.Errorf("list says\n%s", out)
	}

	back := t.TempDir()
	server = startServe(t, "-source", "dir:"+filepath.Join(w.sink, "laptop"), "-tls", w.tls, "-allow", "laptop,other")
	pull := []string{"pull", "-peer", server.addr, "-tls", w.tls, "-store", "dir:" + back}
	if out := mustRun(t, append(pull, "-n", "db")...); !strings.Contains(out, "3 versions") {
		t.Errorf("the plan is\n%s", out)
	}
	mustRun(t, pull...)
	sameTree(t, w.source, back)
}

// relay stands between client and server and cuts its connections, each time that so many bytes have passed.
type relay struct {
	net.Listener
	server string

	mu    sync.Mutex
	left  int
	cuts  int // how often it is still to be done
	conns []net.Conn
	trip  func() // what is done instead of cutting; nil: nothing
}

// setTrip makes the relay do something else than cutting.
func (r *relay) setTrip(trip func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.trip = trip
}

func startRelay(t testing.TB, server string, cuts, after int) *relay {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{Listener: l, server: server, left: after, cuts: cuts}
	var running sync.WaitGroup
	running.Go(func() { // ends when the listener is closed
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() { r.carry(conn, after) }) // ends when either side closes
		}
	})
	t.Cleanup(func() {
		l.Close()
		r.mu.Lock()
		r.cut()
		r.mu.Unlock()
		running.Wait()
	})
	return r
}

func (r *relay) carry(client net.Conn, after int) {
	server, err := net.Dial("tcp", r.server)
	if err != nil {
		client.Close()
		return
	}
	for _, conn := range []net.Conn{client, server} { // so that not much is on its way, whatever the system's limits are
		conn.(*net.TCPConn).SetReadBuffer(256 << 10)
	}
	r.mu.Lock()
	r.conns = append(r.conns, client, server)
	r.mu.Unlock()
	done := make(chan struct{})
	go func() { // ends when either side closes; waited for below
		defer close(done)
		r.copy(client, server, after)
	}()
	r.copy(server, client, after)
	<-done
}

func (r *relay) copy(to, from net.Conn, after int) {
	defer to.Close()
	buf := make([]byte, 16<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
		r.mu.Lock()
		if r.left -= n; r.left < 0 && r.cuts > 0 {
			r.cuts, r.left = r.cuts-1, after
			if r.trip != nil {
				r.trip()
			} else {
				r.cut()
			}
		}
		r.mu.Unlock()
	}
}

// cutsLeft is how many cuts did not happen.
func (r *relay) cutsLeft() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.cuts
}

// cut closes all connections. The lock is held.
func (r *relay) cut() {
	for _, conn := range r.conns {
		conn.(*net.TCPConn).SetLinger(0)
		conn.Close()
	}
	r.conns = nil
}

// replicateQuickly runs a replication whose waits are short.
func replicateQuickly(t testing.TB, r *replication) error {
	t.Helper()
	r.jobs, r.parse = 2, parseDirToken
	// Connections that nobody has noticed to be dead yet cost more attempts than with waits of seconds.
	r.retry = retries{max: 12, first: time.Millisecond}
	var out, status strings.Builder
	r.report = newReporter(output{&out, &status}, false)
	defer r.report.close()
	err := r.run(context.Background(), nil)
	t.Log(out.String(), status.String())
	return err
}

func TestKilledConnectionsAreResumedWithoutTheUser(t *testing.T) {
	w := newWorld(t, "laptop")
	for i := range 3 {
		put(t, w.source, fmt.Sprintf("db/v%d", i), noise(2<<20+i), i)
		put(t, w.source, fmt.Sprintf("img/v%d", i), noise(1<<20+i), i)
	}
	server := startServe(t, "-sink", "dir:"+w.sink, "-source", "dir:"+w.source, "-tls", w.tls)
	back := t.TempDir()
	for name, direction := range map[string]func(local Store, client *rpc.Client) *replication{
		"push": func(local Store, client *rpc.Client) *replication {
			return &replication{source: local, sink: sinkPeer{client}}
		},
		"pull": func(local Store, client *rpc.Client) *replication {
			return &replication{source: client, sink: local}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := w.source
			if name == "pull" {
				dir = back
			}
			local, err := openDirStore(dir, quiet)
			if err != nil {
				t.Fatal(err)
			}
			defer local.Close()
			relay := startRelay(t, server.addr, 3, 2_200_000)
			client := w.client(t, relay.Addr().String(), "laptop")
			r := direction(local, client)
			r.reconnect = client.ResetConnectBackoff
			if err := replicateQuickly(t, r); err != nil {
				t.Fatal(err)
			}
			if left := relay.cutsLeft(); left != 0 {
				t.Errorf("%d cuts did not happen", left)
			}
		})
	}
	sameTree(t, w.source, filepath.Join(w.sink, "laptop"))
	sameTree(t, w.source, back)
}

func TestKilledPushGoesOnFromWhatArrived(t *testing.T) {
	const n = 1 << 20
	w := newWorld(t, "laptop")
	put(t, w.source, "f/v", noise(n), 1)
	server := startServe(t, "-sink", "dir:"+w.sink, "-tls", w.tls)
	connecter, err := (&peerFlags{addr: server.addr, tls: w.tls, name: "laptop", serverName: defaultServer}).connecter()
	if err != nil {
		t.Fatal(err)
	}
	killer := &killer{Connecter: connecter}
	client := rpc.NewClient(killer, rpc.ClientConfig{})
	defer client.Close()
	store, err := openDirStore(w.source, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	partial := filepath.Join(w.sink, "laptop", "f", partialName("v", versions(t, store, "f")[0].GUID))
	source := &tripwire{Store: store, left: n / 2, trip: func() {
		waitFor(t, "half of it to arrive", func() bool {
			info, err := os.Stat(partial)
			return err == nil && info.Size() > n/4
		})
		killer.kill()
	}}
	r := &replication{source: source, sink: sinkPeer{client}, reconnect: client.ResetConnectBackoff}
	if err := replicateQuickly(t, r); err != nil {
		t.Fatal(err)
	}
	if r.report.resumed <= n/4 {
		t.Errorf("%d bytes did not have to be sent again", r.report.resumed)
	}
	sameTree(t, w.source, filepath.Join(w.sink, "laptop"))
}

func TestServerThatIsNotThereYetIsTriedAgain(t *testing.T) {
	w := newWorld(t, "laptop")
	put(t, w.source, "f/v", noise(10), 1)
	server := startServe(t, "-sink", "dir:"+w.sink, "-tls", w.tls)
	dials := 0
	connecter, err := (&peerFlags{addr: server.addr, tls: w.tls, name: "laptop", serverName: defaultServer}).connecter()
	if err != nil {
		t.Fatal(err)
	}
	client := rpc.NewClient(rpc.ConnecterFunc(func(ctx context.Context) (net.Conn, error) {
		if dials++; dials < 3 {
			return nil, &net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}
		}
		return connecter.Connect(ctx)
	}), rpc.ClientConfig{})
	defer client.Close()
	store, err := openDirStore(w.source, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	if err := replicateQuickly(t, &replication{source: store, sink: sinkPeer{client}, reconnect: client.ResetConnectBackoff}); err != nil {
		t.Fatal(err)
	}
	sameTree(t, w.source, filepath.Join(w.sink, "laptop"))
}

func TestClientsCannotLeaveTheirFolders(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t, "alice", "bob")
	put(t, w.source, "f/v", noise(1000), 1)
	put(t, w.sink, "stray/v", noise(10), 1)
	server := startServe(t, "-sink", "dir:"+w.sink, "-tls", w.tls)
	for _, name := range []string{"alice", "bob"} {
		mustRun(t, "push", "-peer", server.addr, "-tls", w.tls, "-name", name, "-store", "dir:"+w.source)
		sameTree(t, w.source, filepath.Join(w.sink, name))
	}
	before := sums(t, w.sink)
	bob := w.client(t, server.addr, "bob")
	for _, peer := range []rpc.Handler{bob, sinkPeer{bob}} {
		if got := filesystems(t, peer); len(got) != 1 || got[0].Path != "f" {
			t.Errorf("bob sees %v", got)
		}
		for _, path := range []string{"../alice", "../alice/f", "alice/f", "stray", "/alice/f", "f/../../alice/f", "..", ""} {
			res, err := peer.ListFilesystemVersions(ctx, &rpc.ListFilesystemVersionsReq{Filesystem: path})
			if err == nil {
				t.Errorf("bob sees %v in %q", res.Versions, path)
			}
		}
	}
	evil := rpc.FilesystemVersion{Name: "evil", GUID: versionGUID("evil", 4, epoch), Creation: epoch}
	for _, path := range append(slices.Clone(attacks), "../alice/f", "../stray", "f/../../alice/f") {
		if path == storeItself {
			continue
		}
		stream := append(streamHeader{guid: evil.GUID, size: 4}.encode(), "evil"...)
		_, err := bob.Receive(ctx, &rpc.ReceiveReq{Filesystem: strings.ToValidUTF8(path, "\x00"), To: &evil}, bytes.NewReader(stream))
		if code := rpc.CodeOf(err); code != rpc.InvalidArgument {
			t.Errorf("bob wrote to %q: %v", path, err)
		}
	}
	if after := sums(t, w.sink); fmt.Sprint(before) != fmt.Sprint(after) {
		t.Errorf("there is %v, there was %v", after, before)
	}
}

func TestSourceIsReadOnlyAndSinkServesNoPulls(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t, "laptop")
	put(t, w.source, "f/v", noise(1000), 1)
	local, err := openDirStore(w.source, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	v := versions(t, local, "f")[0]
	stream := sent(t, local, &rpc.SendReq{Filesystem: "f", To: &v})
	server := startServe(t, "-source", "dir:"+w.source, "-tls", w.tls)
	client := w.client(t, server.addr, "laptop")
	if _, err := client.Receive(ctx, &rpc.ReceiveReq{Filesystem: "g", To: &v}, bytes.NewReader(stream)); rpc.CodeOf(err) != rpc.PermissionDenied {
		t.Errorf("receive: %v", err)
	}
	if _, err := client.DestroySnapshots(ctx, &rpc.DestroySnapshotsReq{Filesystem: "f", Snapshots: []rpc.FilesystemVersion{v}}); rpc.CodeOf(err) != rpc.PermissionDenied {
		t.Errorf("destroy: %v", err)
	}
	server = startServe(t, "-sink", "dir:"+w.sink, "-tls", w.tls)
	client = w.client(t, server.addr, "laptop")
	if _, _, err := client.Send(ctx, &rpc.SendReq{Filesystem: "f", To: &v}); rpc.CodeOf(err) != rpc.PermissionDenied {
		t.Errorf("send: %v", err)
	}
	if _, err := client.DestroySnapshots(ctx, &rpc.DestroySnapshotsReq{Filesystem: "f"}); rpc.CodeOf(err) != rpc.PermissionDenied {
		t.Errorf("destroy: %v", err)
	}
}

func TestServerWithBothKeepsItsSidesApart(t *testing.T) {
	w := newWorld(t, "laptop")
	put(t, w.source, "ours/v", noise(10), 1)
	mine := t.TempDir()
	put(t, mine, "ours/v", noise(10), 1) // looks like the source's, and still has to be pushed
	put(t, mine, "mine/v", noise(10), 1)
	server := startServe(t, "-sink", "dir:"+w.sink, "-source", "dir:"+w.source, "-tls", w.tls)
	peer := []string{"-peer", server.addr, "-tls", w.tls}
	mustRun(t, append([]string{"push", "-store", "dir:" + mine}, peer...)...)
	sameTree(t, mine, filepath.Join(w.sink, "laptop"))
	if out := mustRun(t, append([]string{"list"}, peer...)...); strings.Contains(out, "mine") || !strings.Contains(out, "ours") {
		t.Errorf("the source is\n%s", out)
	}
	if out := mustRun(t, append([]string{"list", "-side", "sink"}, peer...)...); !strings.Contains(out, "mine") {
		t.Errorf("the sink is\n%s", out)
	}
	back := t.TempDir()
	mustRun(t, append([]string{"pull", "-store", "dir:" + back}, peer...)...)
	sameTree(t, w.source, back)
}

func TestPlainTCPWithAMapOfClients(t *testing.T) {
	w := newWorld(t)
	put(t, w.source, "f/v", noise(1000), 1)
	server := startServe(t, "-sink", "dir:"+w.sink, "-clients", "127.0.0.0/8=lan-*,::1=six")
	mustRun(t, "push", "-peer", server.addr, "-store", "dir:"+w.source)
	sameTree(t, w.source, filepath.Join(w.sink, "lan-127.0.0.1"))
}

func TestFailuresToConnectAreClearAndNotRetriedInVain(t *testing.T) {
	w := newWorld(t, "laptop", "stranger")
	other := newWorld(t, "laptop")
	put(t, w.source, "f/v", noise(10), 1)
	secured := startServe(t, "-sink", "dir:"+w.sink, "-tls", w.tls, "-allow", "laptop")
	for name, test := range map[string]struct {
		args []string
		says string
	}{
		"a name that is not allowed": {[]string{"-peer", secured.addr, "-tls", w.tls, "-name", "stranger"}, `stranger`},
		"another CA":                 {[]string{"-peer", secured.addr, "-tls", other.tls}, "certificate"},
		"another server's name":      {[]string{"-peer", secured.addr, "-tls", w.tls, "-name", "laptop", "-server-name", "elsewhere"}, "elsewhere"},
	} {
		status, _, stderr := runArgs(append([]string{"push", "-store", "dir:" + w.source}, test.args...)...)
		if status != statusFailed || !strings.Contains(stderr, test.says) || strings.Contains(stderr, "trying again") {
			t.Errorf("%s: status %d, %q", name, status, stderr)
		}
	}
	status, _, stderr := runArgs("push", "-store", "dir:"+w.source, "-peer", secured.addr, "-retry", "0")
	if status != statusFailed || stderr == "" {
		t.Errorf("plain TCP to TLS: status %d, %q", status, stderr)
	}
}

func TestPushReportsWhatFailedAndDoesTheRest(t *testing.T) {
	w := newWorld(t, "laptop")
	put(t, w.source, "bad/v", noise(1000), 1)
	put(t, w.source, "good/v", noise(1000), 1)
	put(t, w.sink, "laptop/bad/v", noise(999), 1)
	server := startServe(t, "-sink", "dir:"+w.sink, "-tls", w.tls)
	status, out, stderr := runArgs("push", "-peer", server.addr, "-tls", w.tls, "-store", "dir:"+w.source)
	if status != statusFailed || !strings.Contains(stderr, "bad: FAILED: conflict") || !strings.Contains(out, "transferred 1 version: ") {
		t.Errorf("status %d\n%s%s", status, out, stderr)
	}
	if got := tree(t, w.sink); got["laptop/good/v"] != string(noise(1000)) || got["laptop/bad/v"] != string(noise(999)) {
		t.Errorf("the sink has %d files", len(got))
	}
}

func TestJSONOutputIsOneObjectALine(t *testing.T) {
	w := newWorld(t, "laptop")
	put(t, w.source, "f/v", noise(1000), 1)
	server := startServe(t, "-sink", "dir:"+w.sink, "-tls", w.tls)
	peer := []string{"-peer", server.addr, "-tls", w.tls, "-json", "-store", "dir:" + w.source}
	for command, want := range map[string]string{"push -n": "planned summary", "push": "started finished summary"} {
		var events []string
		for line := range strings.Lines(mustRun(t, append(strings.Fields(command), peer...)...)) {
			var e event
			if err := json.Unmarshal([]byte(line), &e); err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			if e.Event != "progress" { // there is one a second, if the disk is slow
				events = append(events, e.Event)
			}
		}
		if got := strings.Join(events, " "); got != want && !(command == "push -n" && got == "summary") {
			t.Errorf("%s: %s, want %s", command, got, want)
		}
	}
	var v listed
	if out := mustRun(t, append([]string{"list"}, peer...)...); json.Unmarshal([]byte(out), &v) != nil || !v.Here || !v.Peer {
		t.Errorf("list: %s", out)
	}
}

// patience is how long something is waited for that takes a moment, on a host that is not busy: a sink on btrfs alone may wait
// for spacePatience.
const patience = time.Minute

// waitFor polls until something is so.
func waitFor(t testing.TB, what string, so func() bool) {
	t.Helper()
	pause := time.Millisecond
	for deadline := time.Now().Add(patience); !so(); time.Sleep(pause) {
		if time.Now().After(deadline) {
			t.Error("waited in vain for ", what)
			return
		}
		pause = min(2*pause, 50*time.Millisecond)
	}
}

func TestServeStopsGracefully(t *testing.T) {
	w := newWorld(t, "laptop")
	put(t, w.source, "f/v", noise(100_000), 1)
	server := startServe(t, "-sink", "dir:"+w.sink, "-tls", w.tls)
	local, err := openDirStore(w.source, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	v := versions(t, local, "f")[0]
	stream := sent(t, local, &rpc.SendReq{Filesystem: "f", To: &v})
	client := w.client(t, server.addr, "laptop")
	// The server is told to stop in the middle of a transfer, which still comes to its end.
	partial := filepath.Join(w.sink, "laptop", "f", partialName("v", v.GUID))
	middle := io.MultiReader(bytes.NewReader(stream[:50_000]), readerFunc(func([]byte) (int, error) {
		waitFor(t, "the transfer to begin", func() bool { return exists(partial) })
		server.stop()
		return 0, io.EOF
	}), bytes.NewReader(stream[50_000:]))
	if _, err := client.Receive(context.Background(), &rpc.ReceiveReq{Filesystem: "f", To: &v}, middle); err != nil {
		t.Fatal(err)
	}
	if status := <-server.ended; status != statusDone {
		t.Errorf("status %d", status)
	}
	sameTree(t, w.source, filepath.Join(w.sink, "laptop"))
}
