package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.org/rpc"
)

// asMain tells the test binary to be another program: the tests run it as their children.
const asMain = "REPLICATE_TEST_AS"

var programs = map[string]func(args []string){
	"replicate": func([]string) { main() },
	"writer":    writerMain,
	"reader":    readerMain,
}

func TestMain(m *testing.M) {
	if as := os.Getenv(asMain); as != "" {
		os.Unsetenv(asMain)
		programs[as](os.Args[1:])
		os.Exit(0)
	}
	status := m.Run()
	for _, end := range atEnd {
		end()
	}
	os.Exit(status)
}

// atEnd is what is done after all tests.
var atEnd []func()

// Some tests need root, tools and real file systems, and are skipped without. Where they are known to be there, as in .ci/run
// after it installed them, a test that would be skipped fails.
const (
	mustNotSkip = "REPLICATE_TEST_ALL"
	noReal      = "REPLICATE_TEST_REAL" // "no" leaves those on real file systems out, which take a minute
)

// skip skips a test, unless nothing may be skipped.
func skip(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv(mustNotSkip) != "" && os.Getenv(noReal) != "no" {
		t.Fatalf("it may not be skipped, but "+format, args...)
	}
	t.Skipf("SKIPPED: "+format, args...)
}

// asProgram is the test binary as another program.
func asProgram(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), asMain+"="+name, "GORACE="+raceQuickly)
	return cmd
}

// writerMain writes so many bytes, says something on stderr, and then exits with a status, or hangs and notes in a file what
// it hears.
func writerMain(args []string) {
	n, _ := strconv.Atoi(args[0])
	heard := make(chan os.Signal, 9)
	if args[1] != "dies" {
		signal.Notify(heard, syscall.SIGTERM)
	}
	os.Stdout.Write(noise(n))
	fmt.Fprint(os.Stderr, "the disk is on fire\n")
	switch args[1] {
	case "hangs", "stubborn", "dies":
		os.Stdout.Close()
		for args[1] != "dies" {
			note(args[2], (<-heard).String())
			if args[1] == "hangs" {
				os.Exit(1)
			}
		}
		hang()
	default:
		status, _ := strconv.Atoi(args[1])
		os.Exit(status)
	}
}

// hang never returns. To wait for nothing at all would not do: without cgo the runtime calls that a deadlock and ends the program.
func hang() {
	for {
		time.Sleep(time.Hour)
	}
}

func note(file, text string) {
	f, err := os.OpenFile(file, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		panic(err)
	}
	fmt.Fprintln(f, text)
	f.Close()
}

// readerMain reads so many bytes, or with -1 all, and then exits with a status or hangs. At an early end it notes that.
func readerMain(args []string) {
	n, _ := strconv.ParseInt(args[0], 10, 64)
	if n < 0 {
		got, _ := io.Copy(io.Discard, os.Stdin)
		note(args[2], fmt.Sprint("end after ", got))
	} else {
		io.CopyN(io.Discard, os.Stdin, n)
	}
	if args[1] == "hangs" {
		hang()
	}
	fmt.Fprint(os.Stderr, "no such pool\n")
	status, _ := strconv.Atoi(args[1])
	os.Exit(status)
}

// become makes the children that are started in this test the program of that name.
func become(t *testing.T, name string) {
	t.Setenv(asMain, name)
	t.Setenv("GORACE", raceQuickly)
}

// raceQuickly lets a program with the race detector end at once, not after a second in which races could still be found.
const raceQuickly = "atexit_sleep_ms=0"

func sameError(err error) error { return err }

func TestStreamOfAChildThatFailsHasItsStderr(t *testing.T) {
	become(t, "writer")
	released := 0
	s, err := startStream(os.Args[0], []string{"300000", "3"}, sameError, func() { released++ })
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(s)
	if !bytes.Equal(got, noise(300000)) || err == nil || !strings.Contains(err.Error(), "the disk is on fire") || !strings.Contains(err.Error(), "status 3") {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	s.Close()
	s.Close()
	if released != 1 {
		t.Errorf("released %d times", released)
	}
}

func TestStreamOfAChildThatSucceedsEnds(t *testing.T) {
	become(t, "writer")
	s, err := startStream(os.Args[0], []string{"300000", "0"}, sameError, func() {})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if got, err := io.ReadAll(s); err != nil || !bytes.Equal(got, noise(300000)) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

func TestChildThatHangsIsToldAndThenMadeToEnd(t *testing.T) {
	become(t, "writer")
	for _, how := range []string{"hangs", "stubborn", "dies"} {
		notes := filepath.Join(t.TempDir(), "notes")
		s, err := startStream(os.Args[0], []string{"1000", how, notes}, sameError, func() {})
		if err != nil {
			t.Fatal(err)
		}
		read := make(chan error, 1)
		go func() { // ends when the stream is closed; waited for below
			_, err := io.Copy(io.Discard, s)
			read <- err
		}()
		waitFor(t, "it to have written", func() bool { return strings.Contains(s.c.stderr.String(), "fire") })
		begun := time.Now()
		s.Close()
		took := time.Since(begun)
		if err := <-read; err == nil {
			t.Errorf("%s: the stream ended well", how)
		}
		heard, _ := os.ReadFile(notes)
		wantHeard := how != "dies"
		if (len(heard) > 0) != wantHeard || took < childGrace || (how == "stubborn") != (took > 2*childGrace) {
			t.Errorf("%s: it heard %q, and took %v", how, heard, took)
		}
		select {
		case <-s.c.done:
		default:
			t.Errorf("%s: the child still runs", how)
		}
	}
}

func TestReceivingChildGetsAllAndItsFailureIsTheError(t *testing.T) {
	become(t, "reader")
	notes := filepath.Join(t.TempDir(), "notes")
	feed := func(ctx context.Context, r io.Reader, args ...string) error {
		return feedChild(ctx, os.Args[0], append(args, notes), []byte("head"), r, nil)
	}
	if err := feed(context.Background(), bytes.NewReader(noise(500000)), "-1", "0"); err != nil {
		t.Error(err)
	}
	if got, _ := os.ReadFile(notes); string(got) != "end after 500004\n" {
		t.Errorf("it read %q", got)
	}
	for _, n := range []string{"-1", "100"} { // with all of it read, and in the middle
		err := feed(context.Background(), bytes.NewReader(noise(5_000_000)), n, "1")
		if err == nil || !strings.Contains(err.Error(), "no such pool") {
			t.Errorf("read %s: %v", n, err)
		}
	}
	if err := feed(context.Background(), bytes.NewReader(noise(5_000_000)), "100", "0"); !errors.Is(err, errTrailing) {
		t.Errorf("a child that did not want all of it: %v", err)
	}
	broken := io.MultiReader(bytes.NewReader(noise(1000)), readerFunc(func([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }))
	if err := feed(context.Background(), broken, "-1", "0"); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a broken stream: %v", err)
	}
	lost := io.MultiReader(bytes.NewReader(noise(1000)), readerFunc(func([]byte) (int, error) { return 0, fmt.Errorf("lost: %w", syscall.EPIPE) }))
	for _, status := range []string{"0", "1"} { // whatever the child makes of that, it is not why
		if err := feed(context.Background(), lost, "-1", status); !errors.Is(err, syscall.EPIPE) || !strings.Contains(err.Error(), "lost") {
			t.Errorf("a connection that breaks off, status %s: %v", status, err)
		}
		lost = io.MultiReader(readerFunc(func([]byte) (int, error) { return 0, fmt.Errorf("lost: %w", syscall.EPIPE) }))
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	sent := 0
	endless := readerFunc(func(p []byte) (int, error) {
		if sent += len(p); sent >= 64<<10 { // all that a pipe holds: the write that follows blocks
			cancel()
		}
		return len(p), nil
	})
	if err := feed(ctx, endless, "1", "hangs"); !errors.Is(err, context.Canceled) {
		t.Errorf("a child that hangs: %v", err)
	}
}

func TestToolsAreEndedWithTheirContext(t *testing.T) {
	become(t, "writer")
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err := runTool(ctx, os.Args[0], "10", "dies"); !errors.Is(err, context.Canceled) {
		t.Errorf("error is %v", err)
	}
	if _, err := runTool(context.Background(), os.Args[0], "10", "7"); err == nil || !strings.Contains(err.Error(), "on fire") {
		t.Errorf("error is %v", err)
	}
	if _, err := runTool(context.Background(), "/no/such/program"); err == nil || !strings.Contains(err.Error(), "/no/such/program") {
		t.Errorf("error is %v", err)
	}
}

func TestTailKeepsTheEnd(t *testing.T) {
	var x tail
	for i := range 10_000 {
		fmt.Fprintf(&x, "line %d\n", i)
	}
	if got := x.String(); len(got) > maxTail+3 || !strings.HasSuffix(got, "line 9999") || !strings.HasPrefix(got, "...") {
		t.Errorf("%d bytes: %.20q", len(got), got)
	}
}

// openVolume opens a store of its own.
func openVolume(t testing.TB, v interface{ store() string }) Store {
	t.Helper()
	store, err := openStore(v.store(), quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	return store
}

// streamOf is all of a stream.
func streamOf(t testing.TB, store Store, req *rpc.SendReq) []byte {
	t.Helper()
	_, stream, err := store.Send(context.Background(), req)
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	all, err := io.ReadAll(stream)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func sendReq(filesystem string, from *rpc.FilesystemVersion, to rpc.FilesystemVersion) *rpc.SendReq {
	return &rpc.SendReq{Filesystem: filesystem, From: from, To: &to}
}

func receiveReq(filesystem string, to rpc.FilesystemVersion) *rpc.ReceiveReq {
	return &rpc.ReceiveReq{Filesystem: filesystem, To: &to}
}

func destroyReq(filesystem string, versions ...rpc.FilesystemVersion) *rpc.DestroySnapshotsReq {
	return &rpc.DestroySnapshotsReq{Filesystem: filesystem, Snapshots: versions}
}
