//go:build !(darwin || dragonfly || freebsd || illumos || linux || netbsd || openbsd)

package main

import "os"

// lockFolder gives no lock here: there is no lock that the system is sure to take back when a process ends. One process at
// a time may receive into a store.
func lockFolder(*os.Root) (lock *os.File, err error) { return nil, nil }
