package main

import (
	"io/fs"
	"syscall"
)

// btrfsRootInode is the number of the top folder of every subvolume, and of no other folder.
const btrfsRootInode = 256

// mountedNodev is ST_NODEV of statfs(2).
const mountedNodev = 4

// withoutDevices tells whether devices on that file system cannot be opened.
func withoutDevices(path string) bool {
	var stat syscall.Statfs_t
	return syscall.Statfs(path, &stat) == nil && stat.Flags&mountedNodev != 0
}

func isSubvolume(info fs.FileInfo) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	return ok && stat.Ino == btrfsRootInode
}
