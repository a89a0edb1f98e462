//go:build darwin || dragonfly || freebsd || illumos || linux || netbsd || openbsd

package main

import (
	"errors"
	"os"
	"syscall"

	"example.org/rpc"
)

// lockFolder keeps other processes from receiving into the folder until the lock is closed, or this process ends in
// whatever way, and those of its children that were given it. Two that write to one partial file would make a version of it
// that has holes.
func lockFolder(folder *os.Root) (lock *os.File, err error) {
	f, err := folder.Open(".")
	if err != nil {
		return nil, withoutPath(err)
	}
	conn, err := f.SyscallConn()
	if err == nil {
		controlErr := conn.Control(func(fd uintptr) { err = syscall.Flock(int(fd), syscall.LOCK_EX|syscall.LOCK_NB) })
		err = errors.Join(err, controlErr)
	}
	if errors.Is(err, syscall.EWOULDBLOCK) {
		f.Close()
		return nil, rpc.Errorf(rpc.Aborted, "the filesystem is being received by another process")
	}
	return f, nil // some network file systems cannot lock: then it is as on other systems
}
