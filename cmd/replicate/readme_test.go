//go:build linux

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
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

// followREADME types the commands into a shell, as they stand there, with replicate in its PATH, after others that prepare a place
// for that. The shell has a network and mounts of its own: what else there is on the host has its ports and its folders.
func followREADME(t *testing.T, commands []string, before ...string) {
	t.Helper()
	bin, dir := t.TempDir(), t.TempDir()
	self, _ := os.Executable()
	script := "#!/bin/sh\nexport " + asMain + "=replicate\nexec " + self + " \"$@\"\n"
	if err := os.WriteFile(filepath.Join(bin, "replicate"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	// The shell ends when the server does that it left in the background.
	all := slices.Concat([]string{"ip link set lo up"}, before, commands, []string{"kill $!", "wait $!", ""})
	shell := exec.Command("sh", "-e", "-c", strings.Join(all, "\n"))
	shell.Dir = dir
	shell.Env = append(os.Environ(), "PATH="+bin+":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	shell.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Unshareflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS}
	shell.Cancel, shell.WaitDelay = nil, time.Second
	out, err := shell.CombinedOutput()
	if err != nil {
		syscall.Kill(-shell.Process.Pid, syscall.SIGKILL)
		t.Errorf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
}

func TestRealREADMEsFiveCommandsForZFS(t *testing.T) {
	needRootAnd(t, "ip")
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
	needRootAnd(t, "ip", "mount")
	commands := readmeCommands(t, "Replicate btrfs in five commands")
	if len(commands) != 5 {
		t.Errorf("%d commands", len(commands))
	}
	source, sink := newBtrfsVolume(t, 128, false).(*btrfsVolume), newBtrfsVolume(t, 128, true).(*btrfsVolume)
	mnt := t.TempDir()
	var before []string
	for name, v := range map[string]*btrfsVolume{"data": source, "backup": sink} {
		dir := filepath.Join(mnt, name)
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		before = append(before, "mount --bind "+v.dir+" "+dir)
	}
	before = append(before, "mount --rbind "+mnt+" /mnt")
	source.create(t, "home")
	want := fill(t, source, "home", "file", 100)
	followREADME(t, commands, before...)
	path := regexp.MustCompile("`/mnt/backup/([^`]*)`").FindStringSubmatch(readme(t))
	if path == nil {
		t.Fatal("the README does not say where the copy is")
	}
	if got := sumFiles(t, filepath.Join(sink.dir, path[1])); len(got) != 1 || got["file"] != want["file"] {
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
