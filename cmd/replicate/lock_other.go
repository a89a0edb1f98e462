//go:build !(darwin || dragonfly || freebsd || illumos || linux || netbsd || openbsd)

package main

import "os"

// lockFolder does nothing here: there is no lock that the system is sure to take back when a process ends. One process at
// a time may receive into a store.
func lockFolder(*os.Root) (release func(), err error) { return func() {}, nil }
