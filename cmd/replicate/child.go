package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"example.org/rpc"
)

// The stores of real file systems run their tools, and -peer ssh: runs ssh. Arguments are always a vector: there is no
// shell that could read more into a name than a name.
const (
	// childGrace is how long a child has to end after its pipes are closed, and again after a signal.
	childGrace = time.Second
	// toolTimeout bounds a command that answers at once unless its pool hangs; calls have a deadline of their own.
	toolTimeout = 5 * time.Minute
	// maxTail is how much of what a child wrote to stderr is kept: the end of it says why it failed.
	maxTail = 2 << 10
)

// findProgram looks for a program as a shell would, and besides that where PATH often does not lead for anybody but
// root's own shell.
func findProgram(name string) (string, error) {
	found, err := exec.LookPath(name)
	if err == nil || strings.ContainsRune(name, filepath.Separator) {
		return found, err
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
		if found, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return found, nil
		}
	}
	return "", err
}

// tail keeps the end of what is written to it. It is safe for concurrent use.
type tail struct {
	mu   sync.Mutex
	text []byte
	cut  bool // something was dropped
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text = append(t.text, p...)
	if over := len(t.text) - maxTail; over > 0 {
		t.text, t.cut = append(t.text[:0], t.text[over:]...), true
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	text := strings.TrimSpace(string(t.text))
	if t.cut {
		return "..." + text
	}
	return text
}

// childError is a child that failed.
type childError struct {
	program string
	cause   error  // such as an exit status
	stderr  string // the end of it
}

func (e *childError) Error() string {
	if e.stderr == "" {
		return e.program + ": " + e.cause.Error()
	}
	return fmt.Sprintf("%s: %v: %s", e.program, e.cause, e.stderr)
}

func (e *childError) Unwrap() error { return e.cause }

// toolFailure is a failure with a code: on this side too it is one, and to the peer it goes as one.
type toolFailure struct {
	*childError
	code rpc.Code
}

func (e *toolFailure) Unwrap() error { return rpc.Errorf(e.code, "%s", e.childError.Error()) }

// child is a program that runs. One goroutine waits for it, so that it never is a zombie.
type child struct {
	name   string // for errors: program and what it is to do
	cmd    *exec.Cmd
	stderr tail
	done   chan struct{} // closed when it has ended
	err    error         // why it failed; valid after done
}

// toolEnv is the environment of a tool: messages are read by us, so they are to be in English.
func toolEnv() []string { return append(os.Environ(), "LC_ALL=C", "TZ=UTC") }

// startChild starts a program whose stdin and stdout are those ends of pipes (nil: nothing), which are closed here: the
// child has its own copies. It keeps lock (nil: none) open until it has ended, even if this process ends first.
func startChild(program string, args []string, stdin, stdout, lock *os.File) (*child, error) {
	c := &child{cmd: exec.Command(program, args...), done: make(chan struct{})}
	c.name = filepath.Base(program)
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		c.name += " " + args[0]
	}
	c.cmd.Env = toolEnv()
	apart(c.cmd)
	c.cmd.Stderr = &c.stderr
	c.cmd.WaitDelay = childGrace // a grandchild that keeps stderr open is not waited for
	if lock != nil {
		c.cmd.ExtraFiles = []*os.File{lock}
	}
	if stdin != nil {
		c.cmd.Stdin = stdin
		defer stdin.Close()
	}
	if stdout != nil {
		c.cmd.Stdout = stdout
		defer stdout.Close()
	}
	if err := c.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", c.name, err)
	}
	go func() { // ends with the child; stop and wait wait for it
		defer close(c.done)
		if err := c.cmd.Wait(); err != nil {
			c.err = &childError{c.name, err, c.stderr.String()}
		}
	}()
	return c, nil
}

// wait returns when the child has ended, and why it failed if it did.
func (c *child) wait() error {
	<-c.done
	return c.err
}

// stop ends a child whose pipes have been closed: most end by that, otherwise it is told to, and then made to.
func (c *child) stop() {
	for _, signal := range []os.Signal{nil, syscall.SIGTERM, os.Kill} {
		if signal != nil {
			c.cmd.Process.Signal(signal) // if it has just ended, that is what was wanted
		}
		select {
		case <-c.done:
			return
		case <-time.After(childGrace):
		}
	}
	<-c.done // only a process that the kernel does not let go is waited for longer
}

// runTool runs a command to its end and returns what it wrote to stdout. When ctx ends, so does the command.
func runTool(ctx context.Context, program string, args ...string) (string, error) {
	return runToolWithin(ctx, toolTimeout, program, args...)
}

// runToolWithin is runTool for a command that takes longer, or less.
func runToolWithin(ctx context.Context, timeout time.Duration, program string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var stdout bytes.Buffer
	var stderr tail
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = toolEnv(), &stdout, &stderr
	apart(cmd)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = childGrace // then it is killed
	err := cmd.Run()
	if ctx.Err() != nil && err != nil {
		err = errors.Join(ctx.Err(), err)
	}
	if err != nil {
		name := filepath.Base(program)
		if len(args) > 0 {
			name += " " + args[0]
		}
		return stdout.String(), &childError{name, err, stderr.String()}
	}
	return stdout.String(), nil
}

// childStream is what a child writes to its stdout. It ends with io.EOF only if the child says that all went well.
type childStream struct {
	c       *child
	out     *os.File
	fails   func(error) error // makes of the child's error what the peer is to see
	release func()            // gives back what was held for the stream
	closed  sync.Once
}

// startStream starts a child that sends. release is called when the stream is closed, or here if there is none.
func startStream(program string, args []string, fails func(error) error, release func()) (*childStream, error) {
	r, w, err := os.Pipe()
	if err != nil {
		release()
		return nil, err
	}
	c, err := startChild(program, args, nil, w, nil)
	if err != nil {
		r.Close()
		release()
		return nil, err
	}
	return &childStream{c: c, out: r, fails: fails, release: release}, nil
}

func (s *childStream) Read(p []byte) (int, error) {
	n, err := s.out.Read(p)
	if err == io.EOF && n == 0 {
		if failure := s.c.wait(); failure != nil { // Close ends a child that hangs after it closed its stdout
			return 0, s.fails(failure)
		}
	}
	return n, err
}

// Close ends the child if it still runs, and returns when it has ended. It unblocks a Read.
func (s *childStream) Close() error {
	s.closed.Do(func() {
		s.out.Close()
		s.c.stop()
		s.release()
	})
	return nil
}

// feedChild runs a child that receives: it gets head, then what r has to its end. It succeeds if the child took all of that
// and says that all went well. When ctx ends, so does the child. The child keeps lock, if it is not nil.
func feedChild(ctx context.Context, program string, args []string, head []byte, r io.Reader, lock *os.File) error {
	in, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer w.Close()
	c, err := startChild(program, args, in, nil, lock)
	if err != nil {
		return err
	}
	defer c.stop()
	defer context.AfterFunc(ctx, func() { w.Close() })() // unblocks a write to a child that hangs
	to := &childInput{w: w}
	_, err = to.Write(head)
	if err == nil {
		_, err = io.Copy(to, r)
	}
	w.Close() // the end of the stream, or as if the sender had died: either way the child reads no more
	switch {
	case ctx.Err() != nil:
		c.stop()
		return ctx.Err()
	case err == nil:
		return c.waitWithin(ctx)
	case to.refused: // the child does not read on: it says why
		if failure := c.waitWithin(ctx); failure != nil {
			return failure
		}
		return errTrailing
	}
	c.stop()
	return err
}

// childInput is the pipe to a child. It tells a child that does not read on from a stream that breaks off: that may be for a
// broken pipe too, of the connection.
type childInput struct {
	w       *os.File
	refused bool
}

func (c *childInput) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.refused = c.refused || errors.Is(err, syscall.EPIPE)
	return n, err
}

// errTrailing is a stream with which the receiving child was content before its end.
var errTrailing = rpc.Errorf(rpc.DataLoss, "the stream goes on after its end")

// waitWithin is wait, but ends the child when ctx ends.
func (c *child) waitWithin(ctx context.Context) error {
	select {
	case <-c.done:
		return c.err
	case <-ctx.Done():
		c.stop()
		return ctx.Err()
	}
}
