//go:build linux

package main

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// openFiles is how many descriptors this process has.
func openFiles(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// children are the children of this process, zombies among them, without the daemon of the tests.
func children(t testing.TB) []string {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil || len(stats) == 0 {
		t.Fatal("there is no list of processes: ", err)
	}
	var found []string
	for _, file := range stats {
		stat, _ := os.ReadFile(file) // it may have ended
		_, name, _ := strings.Cut(string(stat), "(")
		name, rest, _ := strings.Cut(name, ") ")
		if fields := strings.Fields(rest); len(fields) > 1 && fields[1] == strconv.Itoa(os.Getpid()) && name != "zfs-fuse" {
			found = append(found, name+" "+fields[0])
		}
	}
	return found
}

// commandLines are those of all processes.
func commandLines(t testing.TB) []string {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil || len(files) == 0 {
		t.Fatal("there is no list of processes: ", err)
	}
	var lines []string
	for _, file := range files {
		line, _ := os.ReadFile(file) // it may have ended
		lines = append(lines, strings.ReplaceAll(string(line), "\x00", " "))
	}
	return lines
}
