package main

import (
	"io/fs"
	"syscall"
)

// btrfsRootInode is the number of the top folder of every subvolume, and of no other folder.
const btrfsRootInode = 256

func isSubvolume(info fs.FileInfo) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	return ok && stat.Ino == btrfsRootInode
}
