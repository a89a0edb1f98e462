//go:build linux

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// The tests of the zfs: and btrfs: stores work on real file systems in image files: btrfs of the kernel on a loop device, and
// zfs-fuse. They need root and the tools of both, and are skipped without.

func needRootAnd(t testing.TB, programs ...string) {
	t.Helper()
	if testing.Short() || os.Getenv(noReal) == "no" {
		skip(t, "real file systems are left out")
	}
	if os.Geteuid() != 0 {
		skip(t, "file systems are made and mounted by root only")
	}
	for _, program := range programs {
		if _, err := findProgram(program); err != nil {
			skip(t, "the program %s is missing", program)
		}
	}
}

// tool runs a program that must succeed, and returns what it wrote.
func tool(t testing.TB, program string, args ...string) string {
	t.Helper()
	path, err := findProgram(program)
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(path, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", program, args, err, out)
	}
	return string(out)
}

// succeeds tells whether a program that may fail does not.
func succeeds(program string, args ...string) bool {
	path, err := findProgram(program)
	return err == nil && exec.Command(path, args...).Run() == nil
}

// volume is a real file system, with a store on it.
type volume interface {
	store() string // its name, as a STORE
	create(t testing.TB, filesystem string)
	rename(t testing.TB, from, to string)
	// live is where the files of a filesystem are.
	live(filesystem string) string
	snapshot(t testing.TB, filesystem, name string)
	destroy(t testing.TB, filesystem, name string)
	// safe tells whether a version that is being sent cannot be destroyed.
	safe(t testing.TB, filesystem, name string) bool
	// reader mounts a version that is below the folder of the client in the store, or with "" in the store.
	open(t testing.TB, client, filesystem, version string, read func(dir string))
	// halfDone names what is there that is neither a version nor anything else that has a name.
	halfDone(t testing.TB) []string
}

// volumeMaker makes a file system, which the test's end takes away.
type volumeMaker func(t testing.TB, megabytes int, sink bool) volume

// kinds are the kinds of file systems that the tests below are done on.
var kinds = map[string]volumeMaker{
	"zfs":   newZFSVolume,
	"btrfs": newBtrfsVolume,
}

func onEachKind(t *testing.T, test func(t *testing.T, newVolume volumeMaker)) {
	for name, newVolume := range kinds {
		t.Run(name, func(t *testing.T) { test(t, newVolume) })
	}
}

// image makes an image file.
func image(t testing.TB, megabytes int) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(name)
	if err == nil {
		err = errors.Join(f.Truncate(int64(megabytes)<<20), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	return name
}

type btrfsVolume struct{ dir string }

func newBtrfsVolume(t testing.TB, megabytes int, _ bool) volume {
	t.Helper()
	needRootAnd(t, "btrfs", "mkfs.btrfs", "losetup", "mount")
	file := image(t, max(megabytes, 110)) // less than that, mkfs refuses
	dir := filepath.Join(filepath.Dir(file), "mnt")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	// Data and metadata share their space: else what is full of data may have none for metadata for a minute after.
	tool(t, "mkfs.btrfs", "-q", "--mixed", file)
	device := strings.TrimSpace(tool(t, "losetup", "--find", "--show", file))
	if err := syscall.Mount(device, dir, "btrfs", 0, ""); err != nil {
		tool(t, "losetup", "-d", device)
		t.Fatalf("mount btrfs: %v", err)
	}
	t.Cleanup(func() {
		// A server that was killed may have left a child that is about to end.
		waitFor(t, "the file system to be unmounted", func() bool { return syscall.Unmount(dir, 0) == nil })
		tool(t, "losetup", "-d", device)
	})
	return &btrfsVolume{dir}
}

func (v *btrfsVolume) store() string                 { return "btrfs:" + v.dir }
func (v *btrfsVolume) live(filesystem string) string { return filepath.Join(v.dir, filesystem) }

func (v *btrfsVolume) create(t testing.TB, filesystem string) {
	t.Helper()
	tool(t, "btrfs", "subvolume", "create", v.live(filesystem))
}

func (v *btrfsVolume) rename(t testing.TB, from, to string) {
	t.Helper()
	for _, pair := range [][2]string{{from, to}, {versionsPath(from), versionsPath(to)}} {
		if err := os.Rename(v.live(pair[0]), v.live(pair[1])); err != nil {
			t.Fatal(err)
		}
	}
}

func (v *btrfsVolume) snapshot(t testing.TB, filesystem, name string) {
	t.Helper()
	folder := v.live(versionsPath(filesystem))
	if err := os.MkdirAll(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	tool(t, "btrfs", "subvolume", "snapshot", "-r", v.live(filesystem), filepath.Join(folder, name))
}

func (v *btrfsVolume) destroy(t testing.TB, filesystem, name string) {
	t.Helper()
	tool(t, "btrfs", "subvolume", "delete", filepath.Join(v.live(versionsPath(filesystem)), name))
}

func (v *btrfsVolume) safe(_ testing.TB, filesystem, name string) bool {
	return !succeeds("btrfs", "subvolume", "delete", filepath.Join(v.live(versionsPath(filesystem)), name))
}

func (v *btrfsVolume) open(t testing.TB, client, filesystem, version string, read func(dir string)) {
	read(filepath.Join(v.dir, client, versionsPath(filesystem), version))
}

func (v *btrfsVolume) halfDone(t testing.TB) []string {
	t.Helper()
	var found []string
	filepath.WalkDir(v.dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(path, arrivingSuffix) {
			found = append(found, path)
		}
		return nil
	})
	for line := range strings.Lines(tool(t, "btrfs", "subvolume", "list", "-R", v.dir)) {
		name := line[strings.LastIndex(line, " path ")+len(" path "):]
		if strings.Contains(line, "received_uuid -") && strings.Contains(name, btrfsSnapshots) {
			if out := tool(t, "btrfs", "property", "get", filepath.Join(v.dir, strings.TrimSpace(name)), "ro"); strings.Contains(out, "false") {
				found = append(found, name)
			}
		}
	}
	return found
}

// zfsFuse is the daemon, which is one for the machine: the first test that needs it starts it, and TestMain ends it. If the tests
// are killed, it ends too, and their pools are in no file from which the next one would import them.
var zfsFuse struct {
	once  sync.Once
	lock  *os.File // of the one run of these tests that may have it
	log   tail
	ready bool
}

// lockZFSFuse waits until no other run of these tests has the daemon: at its end it would be gone.
func lockZFSFuse(t testing.TB) {
	t.Helper()
	var err error
	if zfsFuse.lock, err = os.OpenFile("/run/replicate-test-zfs-fuse.lock", os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	for syscall.Flock(int(zfsFuse.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil {
		if time.Since(begun) > 5*patience {
			t.Fatal("another run of these tests has zfs-fuse")
		}
		<-time.After(100 * time.Millisecond)
	}
}

func startZFSFuse(t testing.TB) {
	t.Helper()
	needRootAnd(t, "zfs-fuse", "zfs", "zpool")
	if _, err := os.Stat("/dev/fuse"); err != nil {
		skip(t, "there is no /dev/fuse")
	}
	answers := func() bool { return succeeds("zpool", "list") }
	zfsFuse.once.Do(func() {
		lockZFSFuse(t)
		if zfsFuse.ready = answers(); zfsFuse.ready {
			return // somebody else's: it is left running
		}
		program, _ := findProgram("zfs-fuse")
		cmd := exec.Command(program, "--no-daemon", "--no-kstat-mount", "--max-arc-size", "64", "--pidfile", "/dev/null")
		cmd.Stdout, cmd.Stderr, cmd.WaitDelay = &zfsFuse.log, &zfsFuse.log, time.Second
		apart(cmd)
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
		cmd.ExtraFiles = []*os.File{zfsFuse.lock} // until it has ended
		if err := cmd.Start(); err != nil {
			fmt.Fprint(&zfsFuse.log, err)
			return
		}
		atEnd = append(atEnd, func() {
			cmd.Process.Signal(syscall.SIGTERM)
			defer time.AfterFunc(patience, func() { cmd.Process.Kill() }).Stop()
			cmd.Wait()
		})
		waitFor(t, "zfs-fuse to answer", func() bool { zfsFuse.ready = answers(); return zfsFuse.ready })
	})
	if !zfsFuse.ready {
		t.Fatalf("zfs-fuse does not answer: %s", &zfsFuse.log)
	}
}

type zfsVolume struct{ pool, dir string }

var pools int // that were made; tests that make them are not parallel

// newZFSVolume makes a pool. What a sink receives is not mounted, so a sink has no place for it.
func newZFSVolume(t testing.TB, megabytes int, sink bool) volume {
	t.Helper()
	startZFSFuse(t)
	file := image(t, max(megabytes, 64))
	pools++
	v := &zfsVolume{fmt.Sprintf("replicate%d-%d", os.Getpid(), pools), filepath.Join(filepath.Dir(file), "mnt")}
	mountpoint := v.dir
	if sink {
		mountpoint = "none"
	}
	createPool(t, v.pool, mountpoint, file)
	return v
}

func createPool(t testing.TB, pool, mountpoint, file string) {
	t.Helper()
	tool(t, "zpool", "create", "-o", "cachefile=none", "-m", mountpoint, pool, file)
	t.Cleanup(func() {
		waitFor(t, "the pool to be destroyed", func() bool { return succeeds("zpool", "destroy", "-f", pool) })
	})
}

func (v *zfsVolume) store() string                    { return "zfs:" + v.pool }
func (v *zfsVolume) live(filesystem string) string    { return filepath.Join(v.dir, filesystem) }
func (v *zfsVolume) dataset(filesystem string) string { return v.pool + "/" + filesystem }

func (v *zfsVolume) create(t testing.TB, filesystem string) {
	t.Helper()
	tool(t, "zfs", "create", v.dataset(filesystem))
}

func (v *zfsVolume) rename(t testing.TB, from, to string) {
	t.Helper()
	tool(t, "zfs", "unmount", v.dataset(from)) // zfs-fuse renames nothing that is mounted, or was a moment ago
	waitFor(t, "it to be renamed", func() bool { return succeeds("zfs", "rename", v.dataset(from), v.dataset(to)) })
	if !succeeds("zfs", "mount", v.dataset(to)) && !exists(filepath.Join(v.live(to), "file-of-one")) {
		t.Fatal("it is not mounted")
	}
}

func (v *zfsVolume) snapshot(t testing.TB, filesystem, name string) {
	t.Helper()
	tool(t, "zfs", "snapshot", v.dataset(filesystem)+"@"+name)
}

func (v *zfsVolume) destroy(t testing.TB, filesystem, name string) {
	t.Helper()
	tool(t, "zfs", "destroy", v.dataset(filesystem)+"@"+name)
}

// safe looks for the hold. To try it is no test: zfs-fuse lets "zfs destroy" wait until nothing is sent any more.
func (v *zfsVolume) safe(t testing.TB, filesystem, name string) bool {
	t.Helper()
	return strings.TrimSpace(tool(t, "zfs", "get", "-H", "-p", "-o", "value", "userrefs", v.dataset(filesystem)+"@"+name)) == "1"
}

func (v *zfsVolume) open(t testing.TB, client, filesystem, version string, read func(dir string)) {
	t.Helper()
	dir := t.TempDir()
	clone := v.pool + "/opened"
	tool(t, "zfs", "clone", "-o", "mountpoint="+dir, filepath.Join(v.pool, client, filesystem)+"@"+version, clone)
	defer func() {
		waitFor(t, "the clone to be destroyed", func() bool { return succeeds("zfs", "destroy", clone) })
	}()
	read(dir)
}

// halfDone: a dataset that is received only in part has a % in its name, or is inconsistent and has no snapshot; and holds
// belong to streams.
func (v *zfsVolume) halfDone(t testing.TB) []string {
	t.Helper()
	var found []string
	for line := range strings.Lines(tool(t, "zfs", "get", "-H", "-p", "-r", "-o", "name,property,value", "type,userrefs", v.pool)) {
		fields := strings.Fields(line)
		if strings.Contains(fields[0], "%") || fields[1] == "userrefs" && fields[2] != "0" && fields[2] != "-" {
			found = append(found, line)
		}
	}
	return found
}

// fill writes a file of that many KiB and returns the sums of all files that the filesystem has now.
func fill(t testing.TB, v volume, filesystem, name string, kilobytes int) map[string][sha256.Size]byte {
	t.Helper()
	seed := sha256.Sum256([]byte(filesystem + name))
	content := make([]byte, kilobytes<<10)
	rand.NewChaCha8(seed).Read(content)
	if err := os.WriteFile(filepath.Join(v.live(filesystem), name), content, 0o600); err != nil {
		t.Fatal(err)
	}
	return sumFiles(t, v.live(filesystem))
}

// sumFiles is the sum of every regular file directly in the folder: those of filesystems below it are theirs.
func sumFiles(t testing.TB, dir string) map[string][sha256.Size]byte {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	found := make(map[string][sha256.Size]byte)
	for _, entry := range entries {
		if !entry.Type().IsRegular() {
			continue
		}
		content, err := os.ReadFile(filepath.Join(dir, entry.Name()))
		if err != nil {
			t.Fatal(err)
		}
		found[entry.Name()] = sha256.Sum256(content)
	}
	return found
}

// content is what every version must hold, by filesystem and version.
type content map[string]map[string]map[string][sha256.Size]byte

func (c content) add(filesystem, version string, sums map[string][sha256.Size]byte) {
	if c[filesystem] == nil {
		c[filesystem] = make(map[string]map[string][sha256.Size]byte)
	}
	c[filesystem][version] = sums
}

// verify compares every version at the sink by content, and by GUID with the source; there is nothing else at the sink, and
// nothing half-done at either side.
func (c content) verify(t testing.TB, source, sink volume, client string) {
	t.Helper()
	c.verifyContent(t, sink, client)
	want, got := guids(t, source, ""), guids(t, sink, client)
	for key, guid := range got {
		if want[key] != guid {
			t.Errorf("%s is %016x at the sink, %016x at the source", key, guid, want[key])
		}
	}
	for filesystem, versions := range c {
		for version := range versions {
			if key := filesystem + " " + version; got[key] == 0 {
				t.Errorf("%s is not at the sink", key)
			}
		}
	}
	for _, v := range []volume{source, sink} {
		if found := v.halfDone(t); len(found) > 0 {
			t.Errorf("half-done: %q", found)
		}
	}
}

func (c content) verifyContent(t testing.TB, sink volume, client string) {
	t.Helper()
	for filesystem, versions := range c {
		for version, want := range versions {
			sink.open(t, client, filesystem, version, func(dir string) {
				if got := sumFiles(t, dir); fmt.Sprint(got) != fmt.Sprint(want) {
					t.Errorf("%s %s differs: %d files, want %d", filesystem, version, len(got), len(want))
				}
			})
		}
	}
}

// guids are those of all snapshots, by filesystem and version.
func guids(t testing.TB, v volume, client string) map[string]uint64 {
	t.Helper()
	store, err := openStore(v.store(), quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	if client != "" {
		if store, err = store.Sub(client); err != nil {
			t.Fatal(err)
		}
		defer store.Close()
	}
	found := make(map[string]uint64)
	for _, f := range filesystems(t, store) {
		for _, version := range versions(t, store, f.Path) {
			found[f.Path+" "+version.Name] = version.GUID
		}
	}
	return found
}

// replicas is a source and a sink of one kind, and certificates.
type replicas struct {
	source, sink volume
	tls          string
	want         content
}

const client = "laptop"

func newReplicas(t testing.TB, newVolume volumeMaker, megabytes int) *replicas {
	t.Helper()
	r := &replicas{source: newVolume(t, megabytes, false), sink: newVolume(t, megabytes, true), tls: filepath.Join(t.TempDir(), "tls"), want: content{}}
	mustRun(t, "certs", "-dir", r.tls, "server", client)
	return r
}

// add makes a version with one more file.
func (r *replicas) add(t testing.TB, filesystem, version string, kilobytes int) {
	t.Helper()
	sums := fill(t, r.source, filesystem, "file-of-"+version, kilobytes)
	r.source.snapshot(t, filesystem, version)
	r.want.add(filesystem, version, sums)
}

func (r *replicas) serve(t testing.TB) *running {
	t.Helper()
	return startServe(t, "-sink", r.sink.store(), "-tls", r.tls)
}

func (r *replicas) push(addr string, more ...string) []string {
	return append([]string{"push", "-peer", addr, "-tls", r.tls, "-store", r.source.store()}, more...)
}

func TestRealFullAndTenIncrementsOfThreeFilesystemsAtATime(t *testing.T) {
	onEachKind(t, func(t *testing.T, newVolume volumeMaker) {
		r := newReplicas(t, newVolume, 256)
		names := []string{"db", "home", "images"}
		for _, name := range names {
			r.source.create(t, name)
			r.add(t, name, "full", 4096)
		}
		server := r.serve(t)
		out := mustRun(t, r.push(server.addr, "-jobs", "3")...)
		if !strings.Contains(out, "transferred 3 versions: ") || !strings.Contains(out, "FILESYSTEM") {
			t.Errorf("push says\n%s", out)
		}
		for i := range 10 {
			for _, name := range names {
				r.add(t, name, fmt.Sprintf("increment-%d", i), 64)
			}
		}
		sent := mustRun(t, r.push(server.addr, "-jobs", "3")...)
		if !strings.Contains(sent, "transferred 30 versions: ") {
			t.Errorf("push says\n%s", sent)
		}
		if out := mustRun(t, r.push(server.addr)...); !strings.Contains(out, "nothing to do") {
			t.Errorf("a third push says\n%s", out)
		}
		if n := strings.Count(server.log(), "does without"); strings.HasPrefix(r.sink.store(), "zfs:") && n != 1 {
			t.Errorf("what zfs-fuse lacks is in the log %d times", n)
		}
		r.want.verify(t, r.source, r.sink, client)
		if out := mustRun(t, "list", "-peer", server.addr, "-tls", r.tls, "-store", r.source.store()); strings.Count(out, " both\n") != 33 {
			t.Errorf("list says\n%s", out)
		}
	})
}

func TestRealFilesystemsBelowOthersAndPull(t *testing.T) {
	onEachKind(t, func(t *testing.T, newVolume volumeMaker) {
		r := newReplicas(t, newVolume, 128)
		for _, name := range []string{"a", "a/b", "a/b/c"} {
			r.source.create(t, name)
		}
		r.add(t, "a/b/c", "one", 100) // its parents come as placeholders
		server := r.serve(t)
		mustRun(t, r.push(server.addr)...)
		r.want.verify(t, r.source, r.sink, client)
		r.add(t, "a", "one", 100) // into what was a placeholder
		r.add(t, "a/b/c", "two", 100)
		mustRun(t, r.push(server.addr, "-jobs", "4")...)
		r.want.verify(t, r.source, r.sink, client)

		back := newVolume(t, 128, true)
		server = startServe(t, "-source", r.source.store(), "-tls", r.tls)
		mustRun(t, "pull", "-peer", server.addr, "-tls", r.tls, "-store", back.store())
		r.want.verify(t, r.source, back, "")
	})
}

func TestRealConnectionKilledInMidStream(t *testing.T) {
	onEachKind(t, func(t *testing.T, newVolume volumeMaker) {
		r := newReplicas(t, newVolume, 256)
		r.source.create(t, "db")
		r.add(t, "db", "full", 16<<10)
		r.add(t, "db", "more", 16<<10)
		server := r.serve(t)
		relay := startRelay(t, server.addr, 2, 9<<20)
		status, out, stderr := runArgs(r.push(relay.Addr().String())...)
		if left := relay.cutsLeft(); status != statusDone || left != 0 || !strings.Contains(stderr, "trying again") {
			t.Errorf("status %d, %d cuts did not happen\n%s%s", status, left, out, stderr)
		}
		r.want.verify(t, r.source, r.sink, client)
	})
}

// process is a "replicate" of its own.
type process struct {
	*exec.Cmd
	log tail
}

func startProcess(t testing.TB, args ...string) *process {
	t.Helper()
	p := &process{Cmd: asProgram("replicate", args...)}
	p.Stdout, p.Stderr, p.WaitDelay = &p.log, &p.log, time.Second
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Process.Kill()
		p.Wait() // again, if the test has done so
	})
	return p
}

func serveProcess(t testing.TB, args ...string) (p *process, addr string) {
	t.Helper()
	p = startProcess(t, append([]string{"serve", "-listen", "127.0.0.1:0"}, args...)...)
	waitFor(t, "the server to listen", func() bool {
		_, rest, ok := strings.Cut(p.log.String(), "msg=listening addr=")
		addr, _, _ = strings.Cut(rest, " ")
		return ok
	})
	return p, addr
}

func TestRealKill9OfTheServer(t *testing.T) {
	onEachKind(t, func(t *testing.T, newVolume volumeMaker) {
		r := newReplicas(t, newVolume, 256)
		r.source.create(t, "db")
		r.add(t, "db", "one", 1024)
		r.add(t, "db", "two", 16<<10)
		server, addr := serveProcess(t, "-sink", r.sink.store(), "-tls", r.tls)
		relay := startRelay(t, addr, 1, 9<<20)
		relay.setTrip(func() { server.Process.Kill() })
		status, out, stderr := runArgs(r.push(relay.Addr().String(), "-retry", "0")...)
		if status != statusFailed || !strings.Contains(stderr, "FAILED") {
			t.Fatalf("status %d\n%s%s", status, out, stderr)
		}
		server.Wait()
		again := r.serve(t)
		if out := mustRun(t, r.push(again.addr)...); !strings.Contains(out, "transferred 1 version: ") {
			t.Errorf("push says\n%s", out)
		}
		r.want.verify(t, r.source, r.sink, client)
	})
}

// pushAndEnd starts a push that is a process of its own, has end see to its end when 9 MiB have passed, and returns when it has
// ended. Meanwhile nothing passes.
func (r *replicas) pushAndEnd(t testing.TB, addr string, end func(*process, *relay)) *process {
	t.Helper()
	relay := startRelay(t, addr, 1, 9<<20)
	var pusher *process
	ready, ended := make(chan struct{}), make(chan struct{})
	relay.setTrip(func() {
		<-ready
		end(pusher, relay)
		close(ended)
	})
	pusher = startProcess(t, r.push(relay.Addr().String())...)
	close(ready)
	select {
	case <-ended:
	case <-time.After(patience):
		t.Fatalf("it did not send so much, or did not stop:\n%s", &pusher.log)
	}
	pusher.Wait() // again, if end has done so
	return pusher
}

func TestRealKill9OfTheClient(t *testing.T) {
	onEachKind(t, func(t *testing.T, newVolume volumeMaker) {
		r := newReplicas(t, newVolume, 256)
		r.source.create(t, "db")
		r.add(t, "db", "one", 1024)
		r.add(t, "db", "two", 16<<10)
		server := r.serve(t)
		r.pushAndEnd(t, server.addr, func(pusher *process, relay *relay) {
			pusher.Process.Kill()
			relay.cut() // or what sockets hold, tens of megabytes, would still arrive
		})
		waitFor(t, "the server to give it up", func() bool { return strings.Contains(server.log(), "not received") })
		r.want.verifyContentOf(t, r, "one")
		if found := r.sink.halfDone(t); len(found) > 0 {
			t.Errorf("half-done at the sink: %q", found)
		}
		if out := mustRun(t, r.push(server.addr)...); !strings.Contains(out, "transferred 1 version: ") {
			t.Errorf("push says\n%s", out)
		}
		r.want.verify(t, r.source, r.sink, client)
	})
}

func TestRealInterruptedPushStopsCleanly(t *testing.T) {
	onEachKind(t, func(t *testing.T, newVolume volumeMaker) {
		r := newReplicas(t, newVolume, 256)
		r.source.create(t, "db")
		r.add(t, "db", "one", 1024)
		r.add(t, "db", "two", 64<<10)
		server := r.serve(t)
		// Nothing passes until it has stopped, and then only the little that was on its way.
		pusher := r.pushAndEnd(t, server.addr, func(pusher *process, _ *relay) {
			pusher.Process.Signal(os.Interrupt)
			pusher.Wait()
		})
		if pusher.ProcessState.ExitCode() != statusFailed || !strings.Contains(pusher.log.String(), "interrupted") {
			t.Errorf("%v: %s", pusher.ProcessState, &pusher.log)
		}
		for _, command := range commandLines(t) {
			if strings.Contains(command, " send ") && strings.Contains(command, strings.SplitN(r.source.store(), ":", 2)[1]) {
				t.Errorf("still there: %s", command)
			}
		}
		if found := r.source.halfDone(t); len(found) > 0 {
			t.Errorf("half-done at the source: %q", found)
		}
		waitFor(t, "the server to give it up", func() bool { return strings.Contains(server.log(), "not received") })
		r.want.verifyContentOf(t, r, "one")
		mustRun(t, r.push(server.addr)...)
		r.want.verify(t, r.source, r.sink, client)
	})
}

// verifyContentOf verifies the one version, and that there is no other.
func (c content) verifyContentOf(t testing.TB, r *replicas, version string) {
	t.Helper()
	content{"db": {version: c["db"][version]}}.verifyContent(t, r.sink, client)
	if got := guids(t, r.sink, client); len(got) != 1 {
		t.Errorf("the sink has %v, only %q should be there", got, version)
	}
}

func TestRealSinkOutOfSpace(t *testing.T) {
	onEachKind(t, func(t *testing.T, newVolume volumeMaker) {
		r := newReplicas(t, newVolume, 200)
		r.sink = newVolume(t, 1, true) // as small as it can be
		r.source.create(t, "big")
		r.source.create(t, "small")
		r.add(t, "small", "one", 100)
		fill(t, r.source, "big", "file", 112<<10)
		r.source.snapshot(t, "big", "one")
		server := r.serve(t)
		status, out, stderr := runArgs(r.push(server.addr, "-jobs", "1")...)
		if status != statusFailed || !strings.Contains(stderr, "big: FAILED") || !strings.Contains(strings.ToLower(stderr), "space") ||
			strings.Contains(stderr, "trying again") {
			t.Errorf("status %d\n%s%s", status, out, stderr)
		}
		r.want.verify(t, r.source, r.sink, client)
		if got := guids(t, r.sink, client); len(got) != 1 {
			t.Errorf("the sink has %v", got)
		}
	})
}

func TestRealDivergedReceiverLosesNothing(t *testing.T) {
	onEachKind(t, func(t *testing.T, newVolume volumeMaker) {
		r := newReplicas(t, newVolume, 128)
		r.source.create(t, "db")
		r.add(t, "db", "one", 100)
		server := r.serve(t)
		mustRun(t, r.push(server.addr)...)
		r.want.verify(t, r.source, r.sink, client)
		// The source loses what both have, and goes on.
		r.add(t, "db", "two", 100)
		r.source.destroy(t, "db", "one")
		before := guids(t, r.sink, client)
		status, out, stderr := runArgs(r.push(server.addr)...)
		if status != statusFailed || !strings.Contains(stderr, "diverged") || !strings.Contains(stderr, `"one"`) || !strings.Contains(stderr, `"two"`) {
			t.Errorf("status %d\n%s%s", status, out, stderr)
		}
		if after := guids(t, r.sink, client); fmt.Sprint(after) != fmt.Sprint(before) {
			t.Errorf("the sink has %v, it had %v", after, before)
		}
		content{"db": {"one": r.want["db"]["one"]}}.verifyContent(t, r.sink, client)
	})
}

func TestRealRenamedDatasetIsReplicatedUnderItsNewName(t *testing.T) {
	onEachKind(t, func(t *testing.T, newVolume volumeMaker) {
		r := newReplicas(t, newVolume, 128)
		r.source.create(t, "old")
		r.add(t, "old", "one", 100)
		server := r.serve(t)
		mustRun(t, r.push(server.addr)...)
		kept := content{"old": maps.Clone(r.want["old"])}
		r.source.rename(t, "old", "new")
		r.want = content{"new": r.want["old"]}
		r.add(t, "new", "two", 100)
		if out := mustRun(t, r.push(server.addr)...); !strings.Contains(out, "transferred 2 versions: ") {
			t.Errorf("push says\n%s", out)
		}
		r.want.verifyContent(t, r.sink, client)
		kept.verifyContent(t, r.sink, client)
		got, want := guids(t, r.sink, client), guids(t, r.source, "")
		if len(got) != 3 || got["new one"] != want["new one"] || got["new two"] != want["new two"] || got["old one"] != want["new one"] {
			t.Errorf("the sink has %v, the source %v", got, want)
		}
	})
}

func TestRealStreamsOfAnotherKindOrVersionAreRefused(t *testing.T) {
	onEachKind(t, func(t *testing.T, newVolume volumeMaker) {
		ctx := context.Background()
		r := newReplicas(t, newVolume, 128)
		r.source.create(t, "db")
		r.add(t, "db", "one", 100)
		r.add(t, "db", "two", 100)
		source, sink := openVolume(t, r.source), openVolume(t, r.sink)
		list := versions(t, source, "db")
		whole := streamOf(t, source, sendReq("db", nil, list[0]))
		increment := streamOf(t, source, sendReq("db", &list[0], list[1]))
		for name, bad := range map[string]struct {
			to     int // of the list
			stream []byte
		}{
			"of a dir: store":      {0, []byte("replicate-dir 1 0123456789abcdef 0123456789abcdef 0123456789abcdef\n" + strings.Repeat("x", 999))},
			"nothing":              {0, nil},
			"cut in the beginning": {0, whole[:20]},
			"cut in the middle":    {0, whole[:len(whole)/2]},
			"without its end":      {0, whole[:len(whole)-1]},
			"of another version":   {1, whole},
			"of what is not there": {1, increment},
		} {
			_, err := sink.Receive(ctx, receiveReq("db", list[bad.to]), bytes.NewReader(bad.stream))
			if err == nil {
				t.Errorf("a stream %s is received", name)
			}
			if found := r.sink.halfDone(t); len(found) > 0 {
				t.Errorf("after a stream %s there is half-done: %q", name, found)
			}
		}
		for _, name := range []string{"-db", "../db", "db/-x", ".", "a//b"} {
			if _, err := sink.Receive(ctx, receiveReq(name, list[0]), bytes.NewReader(whole)); err == nil {
				t.Errorf("filesystem %q is received", name)
			}
		}
		for _, name := range []string{"-one", "a/b", "..", ""} {
			evil := list[0]
			evil.Name = name
			if _, err := sink.Receive(ctx, receiveReq("db", evil), bytes.NewReader(whole)); err == nil {
				t.Errorf("version %q is received", name)
			}
			if _, err := source.SendDry(ctx, sendReq("db", nil, evil)); err == nil {
				t.Errorf("version %q is sent", name)
			}
		}
		if got := guids(t, r.sink, ""); len(got) != 0 {
			t.Errorf("the sink has %v", got)
		}
		for i, stream := range [][]byte{whole, increment} {
			if _, err := sink.Receive(ctx, receiveReq("db", list[i]), bytes.NewReader(stream)); err != nil {
				t.Fatal(err)
			}
		}
		r.want.verify(t, r.source, r.sink, "")
	})
}

func TestRealStreamThatIsClosedInTheMiddleLeavesNoChildAndNoHold(t *testing.T) {
	onEachKind(t, func(t *testing.T, newVolume volumeMaker) {
		r := newReplicas(t, newVolume, 128)
		r.source.create(t, "db")
		r.add(t, "db", "one", 8<<10)
		source := openVolume(t, r.source)
		before := openFiles(t)
		for range 3 {
			_, stream, err := source.Send(context.Background(), sendReq("db", nil, versions(t, source, "db")[0]))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(stream, make([]byte, 1024)); err != nil {
				t.Fatal(err)
			}
			if !r.source.safe(t, "db", "one") {
				t.Fatal("it can be destroyed while it is sent")
			}
			stream.Close()
		}
		if after := openFiles(t); after > before {
			t.Errorf("%d open files, before it were %d", after, before)
		}
		if left := children(t); len(left) > 0 {
			t.Errorf("children: %v", left)
		}
		if found := r.source.halfDone(t); len(found) > 0 {
			t.Errorf("half-done: %q", found)
		}
	})
}

func TestRealDestroyDestroysOnlyWhatIsMeant(t *testing.T) {
	onEachKind(t, func(t *testing.T, newVolume volumeMaker) {
		r := newReplicas(t, newVolume, 64)
		r.source.create(t, "db")
		r.add(t, "db", "one", 10)
		r.add(t, "db", "two", 10)
		store := openVolume(t, r.source)
		list := versions(t, store, "db")
		other := list[1]
		other.GUID++
		res, err := store.DestroySnapshots(context.Background(), destroyReq("db", list[0], other))
		if err != nil || len(res.Results) != 2 || res.Results[0].Error != "" || res.Results[1].Error == "" {
			t.Errorf("%+v, %v", res, err)
		}
		if left := versions(t, store, "db"); len(left) != 1 || left[0].GUID != list[1].GUID {
			t.Errorf("there is %v", left)
		}
	})
}
