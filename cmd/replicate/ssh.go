package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"

	"example.org/rpc"
)

const (
	defaultSSH    = "ssh"
	defaultRemote = "replicate serve -stdio"
	// sshPatience is how long a connection that has ended waits for ssh to say why. It exits right after it closed its stdout.
	sshPatience = 2 * time.Second
	// The exit statuses of ssh, or of what it ran, with which it is of no use to try again.
	statusNotExecutable = 126
	statusNotFound      = 127
)

// sshDialer is a Connecter of which every connection is an ssh of its own: so each stream has a flow control of its own,
// and one that stalls holds up no other.
type sshDialer struct {
	program string
	args    []string
	addr    pipeAddr
	running sync.WaitGroup // children that are being ended
}

func (p *peerFlags) sshConnecter(destination string) (rpc.Connecter, error) {
	args, err := sshDestination(destination)
	if err != nil {
		return nil, err
	}
	if p.tls != "" || p.name != "" {
		return nil, usagef("-peer %q: -tls and -name are not for ssh, which has keys of its own", p.addr)
	}
	program, err := exec.LookPath(p.ssh)
	if err != nil {
		return nil, usagef("-ssh %q: %v", p.ssh, err)
	}
	// Nobody is there to be asked anything, and nothing but stdin and stdout is to be carried.
	options := []string{"-T", "-x", "-a", "-o", "BatchMode=yes", "-o", "ClearAllForwardings=yes",
		// Each is to be on its own even if the user's configuration shares connections: ending the one that the others go
		// through would end them too.
		"-o", "ControlMaster=no", "-o", "ControlPath=none"}
	if p.identityFile != "" {
		if !exists(p.identityFile) {
			return nil, usagef("-identity-file %q: there is no such file", p.identityFile)
		}
		options = append(options, "-o", "IdentitiesOnly=yes", "-i", p.identityFile)
	}
	if p.dialer == nil {
		p.dialer = &sshDialer{program: program, addr: pipeAddr(p.addr)}
	}
	p.dialer.args = append(append(options, args...), p.remote)
	return p.dialer, nil
}

// wait returns when the children of an ssh: peer are gone. It is called after the client is closed.
func (p *peerFlags) wait() {
	if p.dialer != nil {
		p.dialer.running.Wait()
	}
}

// sshDestination makes of [USER@]HOST[:PORT] what ssh takes for that, and for nothing else.
func sshDestination(destination string) ([]string, error) {
	bad := func(what string) ([]string, error) {
		return nil, usagef("-peer ssh:%s: %s; it is ssh:[USER@]HOST[:PORT]", destination, what)
	}
	user, host, hasUser := strings.Cut(destination, "@")
	if !hasUser {
		user, host = "", destination
	}
	port := ""
	if h, p, err := net.SplitHostPort(host); err == nil {
		if n, err := strconv.ParseUint(p, 10, 16); err != nil || n == 0 {
			return bad(fmt.Sprintf("%q is not a port", p))
		}
		host, port = h, p
	}
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	switch {
	case host == "" || hasUser && user == "":
		return bad("a name is missing")
	case host[0] == '-' || hasUser && user[0] == '-':
		return bad("a name begins with a hyphen")
	case strings.ContainsFunc(destination, func(r rune) bool {
		return unicode.IsSpace(r) || unicode.IsControl(r) || strings.ContainsRune(`'"$;&|<>(){}\%`+"`", r)
	}):
		return bad("it has a letter that no host has")
	}
	var args []string
	if port != "" {
		args = append(args, "-p", port)
	}
	if hasUser {
		args = append(args, "-l", user)
	}
	return append(args, "--", host), nil
}

// Connect starts an ssh. That it gets through is seen when something is read.
func (d *sshDialer) Connect(ctx context.Context) (net.Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	in, ours, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	theirs, out, err := os.Pipe()
	if err != nil {
		in.Close()
		ours.Close()
		return nil, err
	}
	c, err := startChild(d.program, d.args, in, out, nil)
	if err != nil {
		ours.Close()
		theirs.Close()
		return nil, err
	}
	return &sshConn{pipeConn: pipeConn{in: theirs, out: ours, addr: d.addr}, dialer: d, c: c}, nil
}

// sshConn is a connection over the pipes of an ssh.
type sshConn struct {
	pipeConn
	dialer *sshDialer
	c      *child
	closed sync.Once
}

func (s *sshConn) Read(p []byte) (int, error) {
	n, err := s.pipeConn.Read(p)
	if err == io.EOF {
		err = s.why(err)
	}
	return n, err
}

func (s *sshConn) Write(p []byte) (int, error) {
	n, err := s.pipeConn.Write(p)
	if errors.Is(err, syscall.EPIPE) {
		err = s.why(err)
	}
	return n, err
}

// why is what ssh says of the end of a connection, or err if it says nothing.
func (s *sshConn) why(err error) error {
	select {
	case <-s.c.done:
		if s.c.err != nil {
			return &sshError{s.c.err}
		}
	case <-time.After(sshPatience):
	}
	return err
}

// Close ends the ssh. It does not wait for that: wait does.
func (s *sshConn) Close() error {
	err := s.pipeConn.Close()
	s.closed.Do(func() {
		s.dialer.running.Go(s.c.stop) // ends with the child
	})
	return err
}

// sshError is a connection that is gone, with what ssh has said.
type sshError struct{ failed error }

func (e *sshError) Error() string { return e.failed.Error() }

func (e *sshError) Unwrap() error { return e.failed }

// Timeout and Temporary make it a net.Error: a connection that is lost, with a reason of its own.
func (e *sshError) Timeout() bool   { return false }
func (e *sshError) Temporary() bool { return false }

// hopeless tells whether to try again would be in vain: not let in, not the host that it was, or no such program there.
func (e *sshError) hopeless() bool {
	var exit *exec.ExitError
	if errors.As(e.failed, &exit) && (exit.ExitCode() == statusNotFound || exit.ExitCode() == statusNotExecutable) {
		return true
	}
	text := e.failed.Error()
	return strings.Contains(text, "Permission denied") || strings.Contains(text, "Host key verification failed")
}
