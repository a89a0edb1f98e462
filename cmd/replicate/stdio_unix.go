//go:build unix

package main

import (
	"fmt"
	"os"
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
