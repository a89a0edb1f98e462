//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"example.org/rpc"
)

// sshHost is a real sshd on loopback, with a configuration, a host key and a port of its own.
type sshHost struct {
	t              testing.TB
	dir, user      string
	port           int
	key            string // that may log in
	authorizedKeys string
	program        string // ssh that knows the host
	log            tail
}

func startSSHD(t testing.TB) *sshHost {
	t.Helper()
	for _, program := range []string{"sshd", "ssh", "ssh-keygen"} {
		if _, err := findProgram(program); err != nil {
			skip(t, "the program %s is missing", program)
		}
	}
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	h := &sshHost{t: t, dir: t.TempDir(), user: me.Username}
	h.key, h.authorizedKeys = h.makeKey("id"), filepath.Join(h.dir, "authorized_keys")
	h.makeKey("host")
	h.program = h.client("known_hosts")
	for range 5 {
		if h.port = freePort(t); h.start() { // unless something else has got the port meanwhile
			return h
		}
	}
	t.Fatal("sshd does not listen: ", &h.log)
	return nil
}

func freePort(t testing.TB) int {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// deafPort is a port that nothing listens on, and that nothing else gets until the test has ended.
func deafPort(t testing.TB) int {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	addr, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return addr.(*syscall.SockaddrInet4).Port
}

func (h *sshHost) write(name, text string) string {
	h.t.Helper()
	path := filepath.Join(h.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o700); err != nil {
		h.t.Fatal(err)
	}
	return path
}

func (h *sshHost) makeKey(name string) string {
	h.t.Helper()
	key := filepath.Join(h.dir, name)
	tool(h.t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
	return key
}

// client is an ssh with those known hosts and none of the user's settings.
func (h *sshHost) client(knownHosts string) string {
	config := h.write("ssh_config-"+knownHosts, "StrictHostKeyChecking yes\nGlobalKnownHostsFile none\nUserKnownHostsFile "+filepath.Join(h.dir, knownHosts)+"\n")
	return h.write("ssh-"+knownHosts, fmt.Sprintf("#!/bin/sh\nexec ssh -F %s \"$@\"\n", config))
}

// start tells whether sshd could have the port.
func (h *sshHost) start() bool {
	h.t.Helper()
	public, err := os.ReadFile(filepath.Join(h.dir, "host.pub"))
	if err != nil {
		h.t.Fatal(err)
	}
	h.write("known_hosts", fmt.Sprintf("[127.0.0.1]:%d %s", h.port, public))
	h.write("sshd_config", fmt.Sprintf("ListenAddress 127.0.0.1:%d\nHostKey %s\nPidFile none\nAuthorizedKeysFile %s\nStrictModes no\nUsePAM no\n"+
		"PermitRootLogin prohibit-password\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nMaxStartups 100\n",
		h.port, filepath.Join(h.dir, "host"), h.authorizedKeys))
	if os.Geteuid() == 0 {
		os.MkdirAll("/run/sshd", 0o755) // where Debian's sshd, started as root, puts its unprivileged part
	}
	program, _ := findProgram("sshd") // it insists on an absolute path
	cmd := exec.Command(program, "-D", "-e", "-f", filepath.Join(h.dir, "sshd_config"))
	cmd.Stderr, cmd.WaitDelay = &h.log, time.Second
	apart(cmd)
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { // ends with sshd, which the cleanup waits for
		defer close(ended)
		cmd.Wait()
	}()
	h.t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		<-ended
		if h.t.Failed() {
			h.t.Log("sshd logged:\n", h.log.String())
		}
	})
	listens := false
	waitFor(h.t, "sshd to listen", func() bool {
		listens = strings.Contains(h.log.String(), fmt.Sprintf("listening on 127.0.0.1 port %d", h.port))
		select {
		case <-ended:
			return true
		default:
			return listens
		}
	})
	return listens
}

// allow lets the key in, to run just "replicate serve -stdio" with those arguments; without any, whatever it likes.
func (h *sshHost) allow(key string, args ...string) {
	h.t.Helper()
	public, err := os.ReadFile(key + ".pub")
	if err != nil {
		h.t.Fatal(err)
	}
	line := "restrict"
	if len(args) > 0 {
		self, _ := os.Executable()
		line += fmt.Sprintf(`,command="env %s=replicate %s serve -stdio %s"`, asMain, self, strings.Join(args, " "))
	}
	h.write("authorized_keys", line+" "+string(public))
}

// peer are the flags of a client.
func (h *sshHost) peer(more ...string) []string {
	return append([]string{"-peer", fmt.Sprintf("ssh:%s@127.0.0.1:%d", h.user, h.port), "-identity-file", h.key, "-ssh", h.program}, more...)
}

func sourceOfThree(t testing.TB) string {
	dir := t.TempDir()
	for i := range 3 {
		for _, name := range []string{"db", "img", "mail/box"} {
			put(t, dir, fmt.Sprintf("%s/v%d", name, i), noise(700_000+i), i)
		}
	}
	return dir
}

func TestSSHPushAndPullWithAForcedCommand(t *testing.T) {
	h := startSSHD(t)
	source, sink, back := sourceOfThree(t), t.TempDir(), t.TempDir()
	h.allow(h.key, "-stdio-identity", "laptop", "-sink", "dir:"+sink)
	files := openFiles(t)
	out := mustRun(t, append([]string{"push", "-store", "dir:" + source, "-jobs", "3"}, h.peer()...)...)
	if !strings.Contains(out, "transferred 9 versions: ") {
		t.Errorf("push says\n%s", out)
	}
	sameTree(t, source, filepath.Join(sink, "laptop"))
	waitFor(t, "the log of several connections at once", func() bool { return strings.Count(h.log.String(), "Accepted publickey") >= 3 })
	if out := mustRun(t, append([]string{"list", "-store", "dir:" + source}, h.peer()...)...); strings.Count(out, " both\n") != 9 {
		t.Errorf("list says\n%s", out)
	}
	h.allow(h.key, "-stdio-identity", "laptop", "-source", "dir:"+filepath.Join(sink, "laptop"))
	mustRun(t, append([]string{"pull", "-store", "dir:" + back, "-jobs", "3"}, h.peer()...)...)
	sameTree(t, source, back)
	if left := children(t); len(left) != 1 { // sshd
		t.Errorf("children: %v", left)
	}
	if after := openFiles(t); after > files {
		t.Errorf("%d open files, before it were %d", after, files)
	}
}

func TestSSHFailuresSayWhatSSHSaid(t *testing.T) {
	h := startSSHD(t)
	source, sink := sourceOfThree(t), t.TempDir()
	stranger := h.makeKey("stranger")
	h.write("none", "")
	unknown := h.client("none")
	for name, test := range map[string]struct {
		allow []string // arguments of the forced command
		more  []string
		says  []string
		again bool // it is tried again
	}{
		"a key that is not let in":        {[]string{"-stdio-identity", "laptop", "-sink", "dir:" + sink}, []string{"-identity-file", stranger}, []string{"exit status 255", "Permission denied"}, false},
		"a host that is not known":        {[]string{"-stdio-identity", "laptop", "-sink", "dir:" + sink}, []string{"-ssh", unknown}, []string{"Host key verification failed"}, false},
		"a program that is missing there": {nil, []string{"-remote", "no-such-replicate"}, []string{"exit status 127", "no-such-replicate"}, false},
		"a server that does not start":    {[]string{"-stdio-identity", "laptop", "-sink", "dir:" + sink + "/missing"}, nil, []string{"exit status 1", "there is no such folder"}, true},
		"a server without a name":         {[]string{"-sink", "dir:" + sink}, nil, []string{"exit status 2", "-stdio-identity"}, true},
		"nothing listens":                 {[]string{"-sink", "dir:" + sink}, []string{"-peer", fmt.Sprintf("ssh:127.0.0.1:%d", deafPort(t))}, []string{"Connection refused"}, true},
	} {
		h.allow(h.key, test.allow...)
		args := append([]string{"push", "-store", "dir:" + source, "-retry", "1"}, h.peer(test.more...)...)
		status, out, stderr := runArgs(args...)
		for _, says := range test.says {
			if status != statusFailed || !strings.Contains(stderr, says) {
				t.Errorf("%s: status %d, it does not say %q\n%s%s", name, status, says, out, stderr)
			}
		}
		if again := strings.Contains(stderr, "trying again"); again != test.again {
			t.Errorf("%s: tried again: %v\n%s", name, again, stderr)
		}
	}
	if left := children(t); len(left) != 1 {
		t.Errorf("children: %v", left)
	}
}

func TestSSHThatIsKilledInMidStreamIsStartedAgain(t *testing.T) {
	h := startSSHD(t)
	source, sink := sourceOfThree(t), t.TempDir()
	h.allow(h.key, "-stdio-identity", "laptop", "-sink", "dir:"+sink)
	flags := &peerFlags{addr: fmt.Sprintf("ssh:%s@127.0.0.1:%d", h.user, h.port), identityFile: h.key, ssh: h.program, remote: defaultRemote}
	killer := &sshKiller{}
	connecter, err := flags.connecter()
	if err != nil {
		t.Fatal(err)
	}
	killer.Connecter = connecter
	peer := rpc.NewClient(killer, rpc.ClientConfig{})
	store, err := openDirStore(source, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	wired := &tripwire{Store: store, left: 2_000_000, trip: func() { killer.kill() }}
	if err := replicateQuickly(t, &replication{source: wired, sink: sinkPeer{peer}, reconnect: peer.ResetConnectBackoff}); err != nil {
		t.Error(err)
	}
	peer.Close()
	flags.wait()
	if killer.killed == 0 {
		t.Error("nothing was killed")
	}
	sameTree(t, source, filepath.Join(sink, "laptop"))
	if left := children(t); len(left) != 1 {
		t.Errorf("children: %v", left)
	}
}

// sshKiller is a Connecter that can kill what it has started.
type sshKiller struct {
	rpc.Connecter

	mu     sync.Mutex
	conns  []*sshConn
	killed int
}

func (k *sshKiller) Connect(ctx context.Context) (net.Conn, error) {
	conn, err := k.Connecter.Connect(ctx)
	if ssh, ok := conn.(*sshConn); ok {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.conns = append(k.conns, ssh)
	}
	return conn, err
}

func (k *sshKiller) kill() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, conn := range k.conns {
		conn.c.cmd.Process.Kill()
		k.killed++
	}
}

func TestSSHConnectionHasDeadlinesAndACloseThatUnblocks(t *testing.T) {
	become(t, "reader") // an ssh that reads one byte and then hangs
	d := &sshDialer{program: os.Args[0], args: []string{"1", "hangs"}, addr: "ssh:nowhere"}
	conn, err := d.Connect(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	const tooMuch = 16 << 20 // for any pipe
	for name, io := range map[string]func() error{
		"read":  func() error { _, err := conn.Read(make([]byte, 1)); return err },
		"write": func() error { _, err := conn.Write(make([]byte, tooMuch)); return err },
	} {
		conn.SetDeadline(time.Now().Add(20 * time.Millisecond))
		var timeout net.Error
		if err := io(); !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Errorf("%s with a deadline: %v", name, err)
		}
		conn.SetDeadline(time.Time{})
	}
	ended := make(chan error, 2)
	go func() { _, err := conn.Read(make([]byte, 1)); ended <- err }()        // ends with the Close below; waited for
	go func() { _, err := conn.Write(make([]byte, tooMuch)); ended <- err }() // the same
	conn.Close()
	conn.Close()
	for range 2 {
		if err := <-ended; err == nil {
			t.Error("it went on after Close")
		}
	}
	d.running.Wait()
	if left := children(t); len(left) > 0 {
		t.Errorf("children: %v", left)
	}
}

// A user's configuration may have all ssh to a host go through the first one. Here each has to be on its own.
func TestSSHThatEndsEndsNoOther(t *testing.T) {
	h := startSSHD(t)
	h.allow(h.key, "-stdio-identity", "laptop", "-sink", "dir:"+t.TempDir())
	config := filepath.Join(h.dir, "ssh_config-known_hosts")
	text, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	h.write("ssh_config-known_hosts", string(text)+"ControlMaster auto\nControlPath "+filepath.Join(h.dir, "c")+"\n")
	p := peerFlags{addr: "ssh:", ssh: h.program, identityFile: h.key, remote: "-"}
	connecter, err := p.sshConnecter(fmt.Sprintf("%s@127.0.0.1:%d", h.user, h.port))
	if err != nil {
		t.Fatal(err)
	}
	var peers [2]*rpc.Client
	for i := range peers {
		only := make(chan rpc.Connecter, 1)
		only <- connecter
		peers[i] = rpc.NewClient(rpc.ConnecterFunc(func(ctx context.Context) (net.Conn, error) {
			select {
			case c := <-only:
				return c.Connect(ctx)
			default:
				return nil, errors.New("it has had its connection")
			}
		}), rpc.ClientConfig{HandshakeTimeout: patience})
		defer peers[i].Close()
		filesystems(t, peers[i]) // it is up when the next one looks for it
	}
	peers[0].Close()
	p.wait()
	filesystems(t, peers[1])
}

// What sshd gave the server as stderr is closed when the client is gone, and a log must not be the end of the server then: it
// has to clean up.
func TestStdioServerOutlivesItsStderr(t *testing.T) {
	self, _ := os.Executable()
	become(t, "replicate")
	cmd := exec.Command(self, "serve", "-stdio", "-stdio-identity", "laptop", "-sink", "dir:"+t.TempDir())
	in, ours, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	theirs, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	nobody, stderr, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	nobody.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, out, stderr
	err = cmd.Start()
	for _, f := range []*os.File{in, out, stderr} {
		f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	peer := rpc.NewClient(rpc.ConnecterFunc(func(context.Context) (net.Conn, error) {
		return &pipeConn{in: theirs, out: ours, addr: "stdio"}, nil // it is asked for only once
	}), rpc.ClientConfig{})
	to := version("v", 1, 1)
	_, err = peer.Receive(context.Background(), &rpc.ReceiveReq{Filesystem: "f", To: &to}, io.NopCloser(strings.NewReader("no stream of a store: it is logged")))
	if err == nil || !strings.Contains(err.Error(), "first line of the stream") {
		t.Errorf("error is %v", err)
	}
	peer.Close()
	if err := cmd.Wait(); err != nil {
		t.Errorf("the server: %v", err)
	}
}

func TestInterruptedPushOverSSHLeavesNoChild(t *testing.T) {
	h := startSSHD(t)
	source := sourceOfThree(t)
	// The program on the host never answers.
	public, _ := os.ReadFile(h.key + ".pub")
	pids := filepath.Join(h.dir, "pid")
	h.write("authorized_keys", fmt.Sprintf(`restrict,command="echo $$ > %s; exec cat > /dev/null" %s`, pids, public))
	p := startProcess(t, append([]string{"push", "-store", "dir:" + source}, h.peer()...)...)
	var pid string
	waitFor(t, "the command to run there", func() bool {
		text, _ := os.ReadFile(pids)
		pid = strings.TrimSpace(string(text))
		return pid != ""
	})
	p.Process.Signal(os.Interrupt)
	if err := p.Wait(); p.ProcessState.ExitCode() != statusFailed || !strings.Contains(p.log.String(), "interrupted") {
		t.Errorf("%v: %s", err, &p.log)
	}
	waitFor(t, "the command there to end", func() bool { return !exists("/proc/" + pid) })
	for _, command := range commandLines(t) {
		if strings.Contains(command, h.dir+"/ssh_config") {
			t.Errorf("still there: %s", command)
		}
	}
}

func TestStdioServerServesOneAndEndsWithIt(t *testing.T) {
	source, sink := sourceOfThree(t), t.TempDir()
	self, _ := os.Executable()
	become(t, "replicate")
	d := &sshDialer{program: self, args: []string{"serve", "-stdio", "-stdio-identity", "laptop", "-sink", "dir:" + sink}, addr: "ssh:here"}
	peer := rpc.NewClient(d, rpc.ClientConfig{})
	store, err := openDirStore(source, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	if err := replicateQuickly(t, &replication{source: store, sink: sinkPeer{peer}, reconnect: peer.ResetConnectBackoff}); err != nil {
		t.Error(err)
	}
	peer.Close()
	d.running.Wait()
	sameTree(t, source, filepath.Join(sink, "laptop"))
	if left := children(t); len(left) > 0 {
		t.Errorf("children: %v", left)
	}
	// It ends well when the other end just goes away, also before it has said anything.
	cmd := exec.Command(self, d.args...)
	in, _ := cmd.StdinPipe()
	out, _ := cmd.StdoutPipe()
	var stderr tail
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	in.Close()
	io.Copy(io.Discard, out)
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, &stderr)
	}
	// A file is no peer.
	status, err := exec.Command(self, d.args...).CombinedOutput()
	if err == nil || !strings.Contains(string(status), "not a pipe") {
		t.Errorf("%v: %s", err, status)
	}
}

func TestRealStoresOverSSH(t *testing.T) {
	onEachKind(t, func(t *testing.T, newVolume volumeMaker) {
		h := startSSHD(t)
		r := newReplicas(t, newVolume, 128)
		for _, name := range []string{"db", "home"} {
			r.source.create(t, name)
			r.add(t, name, "one", 3000)
			r.add(t, name, "two", 100)
		}
		h.allow(h.key, "-stdio-identity", client, "-sink", r.sink.store())
		out := mustRun(t, append([]string{"push", "-store", r.source.store()}, h.peer()...)...)
		if !strings.Contains(out, "transferred 4 versions: ") {
			t.Errorf("push says\n%s", out)
		}
		r.want.verify(t, r.source, r.sink, client)
	})
}
