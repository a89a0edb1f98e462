//go:build !linux

package main

import "io/fs"

// isSubvolume is never true: there is no btrfs here.
func isSubvolume(fs.FileInfo) bool { return false }

func withoutDevices(string) bool { return false }
