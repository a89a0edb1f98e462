//go:build linux

package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// readmeCommands are the lines of the first block of commands in a section of the README.
func readmeCommands(t *testing.T, section string) []string {
	t.Helper()
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(readme), "\n## "+section+"\n")
	_, rest, _ = strings.Cut(rest, "```sh\n")
	block, _, ok := strings.Cut(rest, "\n```")
	if !ok {
		t.Fatalf("the README has no commands for %q", section)
	}
	return strings.Split(block, "\n")
}

// followREADME types the commands into a shell, as they stand there, with replicate in its PATH.
func followREADME(t *testing.T, commands []string) {
	t.Helper()
	bin, dir := t.TempDir(), t.TempDir()
	self, _ := os.Executable()
	script := "#!/bin/sh\nexport " + asMain + "=replicate\nexec " + self + " \"$@\"\n"
	if err := os.WriteFile(filepath.Join(bin, "replicate"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	// The shell ends when the server does that it left in the background.
	shell := exec.Command("sh", "-e", "-c", strings.Join(commands, "\n")+"\nkill $!\nwait $!\n")
	shell.Dir = dir
	shell.Env = append(os.Environ(), "PATH="+bin+":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	shell.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	shell.Cancel, shell.WaitDelay = nil, time.Second
	out, err := shell.CombinedOutput()
	if err != nil {
		syscall.Kill(-shell.Process.Pid, syscall.SIGKILL)
		t.Errorf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
}

func TestRealREADMEsFiveCommandsForZFS(t *testing.T) {
	startZFSFuse(t)
	if succeeds("zfs", "list", "tank") || succeeds("zfs", "list", "backup") {
		skip(t, "this host has a pool of the README's name")
	}
	commands := readmeCommands(t, "Replicate ZFS in five commands")
	if len(commands) != 5 {
		t.Errorf("%d commands", len(commands))
	}
	mnt := t.TempDir()
	for _, pool := range []string{"tank", "backup"} {
		createPool(t, pool, filepath.Join(mnt, pool), image(t, 64))
	}
	tool(t, "zfs", "create", "tank/home")
	put(t, mnt, "tank/home/file", noise(100_000), 1)
	followREADME(t, commands)
	source, sink := &zfsVolume{"tank", ""}, &zfsVolume{"backup/replicas", ""}
	got, want := guids(t, sink, "laptop"), guids(t, source, "")
	if len(want) != 2 || got["home monday"] != want["home monday"] || got[". monday"] != want[". monday"] {
		t.Errorf("the sink has %v, the source %v", got, want)
	}
}

func TestRealREADMEsFiveCommandsForBtrfs(t *testing.T) {
	needRootAnd(t, "btrfs", "mkfs.btrfs", "losetup")
	for _, dir := range []string{"/mnt/data", "/mnt/backup"} {
		if err := os.Mkdir(dir, 0o700); errors.Is(err, os.ErrExist) {
			skip(t, "this host has the README's folder %s", dir)
		} else if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.Remove(dir) })
	}
	commands := readmeCommands(t, "Replicate btrfs in five commands")
	if len(commands) != 5 {
		t.Errorf("%d commands", len(commands))
	}
	var source *btrfsVolume
	for _, dir := range []string{"/mnt/data", "/mnt/backup"} {
		v := newBtrfsVolume(t, 128, false).(*btrfsVolume)
		if err := syscall.Mount(v.dir, dir, "", syscall.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			waitFor(t, dir+" to be unmounted", func() bool { return syscall.Unmount(dir, 0) == nil })
		})
		if source == nil {
			source = v
		}
	}
	source.create(t, "home")
	want := fill(t, source, "home", "file", 100)
	followREADME(t, commands)
	path := regexp.MustCompile("`(/mnt/backup/[^`]*)`").FindStringSubmatch(readme(t))
	if path == nil {
		t.Fatal("the README does not say where the copy is")
	}
	if got := sumFiles(t, path[1]); len(got) != 1 || got["file"] != want["file"] {
		t.Errorf("there are %d files", len(got))
	}
}

func readme(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(text), "The copy is ")
	return after
}
