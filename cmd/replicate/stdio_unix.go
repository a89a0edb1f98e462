//go:build unix

package main

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// pollable makes a file that was inherited one whose deadlines and Close work, as they do for a pipe that is made here. The
// given one must not be used any more.
func pollable(f *os.File) (*os.File, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Mode()&(os.ModeNamedPipe|os.ModeSocket) == 0 {
		return nil, fmt.Errorf("%s is not a pipe: -stdio is for a program at the other end, such as sshd", f.Name())
	}
	fd, err := syscall.Dup(int(f.Fd()))
	if err != nil {
		return nil, err
	}
	syscall.CloseOnExec(fd)
	if err := syscall.SetNonblock(fd, true); err != nil {
		syscall.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), f.Close() // or the other end would never see the end
}

// outliveStderr makes a write to a stderr whose reader is gone an error, not the end of the process: sshd closes it when the
// client is gone, and then what broke off is still to be cleaned up. Unlike ignoring the signal, this is not inherited.
func outliveStderr() { signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE) }
