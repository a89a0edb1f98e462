package main

import (
	"path/filepath"
	"strings"
	"testing"
)

func TestHelpIsShownForEveryCommand(t *testing.T) {
	status, out, _ := runArgs("help")
	if status != statusDone {
		t.Errorf("status %d", status)
	}
	for _, c := range commands() {
		if !strings.Contains(out, "replicate "+c.name) {
			t.Errorf("the overview does not have %s", c.name)
		}
		for _, args := range [][]string{{c.name, "-h"}, {c.name, "--help"}, {"help", c.name}} {
			status, out, stderr := runArgs(args...)
			if status != statusDone || !strings.HasPrefix(out, "usage: replicate "+c.name) || stderr != "" {
				t.Errorf("%q: status %d, %q, %q", args, status, out, stderr)
			}
		}
	}
}

func TestBadInputIsNamedAndHasStatus2(t *testing.T) {
	dir := t.TempDir()
	store := "dir:" + dir
	both := filepath.Join(dir, "tls")
	mustRun(t, "certs", "-dir", both, "server", "a", "b")
	none := filepath.Join(dir, "only-server")
	mustRun(t, "certs", "-dir", none, "server")
	for _, test := range []struct {
		args string // with | between them
		name string // what the error must have
	}{
		{"", "replicate demo"},
		{"frobnicate", `"frobnicate"`},
		{"help|frobnicate", `"frobnicate"`},
		{"demo|a|b", `"b"`},
		{"demo|-x", "-x"},
		{"certs|a", "-dir"},
		{"certs|-dir|" + dir, "NAME"},
		{"certs|-dir|" + dir + "|a/b", `"a/b"`},
		{"certs|-dir|" + dir + "|ca", `"ca"`},
		{"certs|-dir|" + dir + "|..", `".."`},
		{"certs|-dir|" + dir + "|", `""`},
		{"certs|-dir|" + dir + "|-days|0|a", "-days 0"},
		{"serve", "-listen"},
		{"serve|-listen|:0", "-sink"},
		{"serve|-listen|:0|-sink|" + store, "-tls"},
		{"serve|-listen|:0|-sink|" + store + "|-tls|x|-clients|y", "-clients"},
		{"serve|-listen|:0|-sink|" + store + "|-clients|10.0.0.0/8", `"10.0.0.0/8"`},
		{"serve|-listen|:0|-sink|" + store + "|-clients|1.1.1.1=a,1.1.1.1=b", `"1.1.1.1"`},
		{"serve|-listen|:0|-sink|" + store + "|-clients|db7=a", `"db7"`},
		{"serve|-listen|:0|-sink|" + store + "|-clients|1.1.1.1=../x", `"1.1.1.1=../x"`},
		{"serve|-listen|7000|-sink|" + store + "|-clients|1.1.1.1=a", `"7000"`},
		{"serve|-listen|:0|-sink|ftp:x|-clients|1.1.1.1=a", `"ftp:x"`},
		{"serve|-listen|:0|-sink|" + store + "|-tls|" + both + "|-name|nobody", "nobody.crt"},
		{"serve|-listen|:0|-sink|" + store + "|-tls|" + both + "|-allow|a,,b", `""`},
		{"serve|-listen|:0|-sink|" + store + "|-clients|1.1.1.1=a|-allow|b", `"b"`},
		{"serve|-listen|:0|-sink|" + store + "|-clients|1.1.1.1=a|extra", `"extra"`},
		{"push", "STORE"},
		{"push|-store|" + store, "-peer"},
		{"push|-store|" + store + "|-peer|host", `"host"`},
		{"push|-store|" + dir + "|-peer|host:1", dir},
		{"push|-store|dir:|-peer|host:1", `"dir:"`},
		{"push|-store|" + store + "|-peer|host:1|-jobs|0", "-jobs 0"},
		{"push|-store|" + store + "|-peer|host:1|-jobs|x", "-jobs"},
		{"push|-store|" + store + "|-peer|host:1|-retry|-1", "-retry -1"},
		{"push|-store|" + store + "|-peer|host:1|../x", `"../x"`},
		{"push|-store|" + store + "|-peer|host:1|fs|-n", `"-n"`},
		{"push|-store|" + store + "|-peer|host:1|-tls|" + both, "a, b"},
		{"push|-store|" + store + "|-peer|host:1|-tls|" + none, "no client's certificate"},
		{"push|-store|" + store + "|-peer|host:1|-name|a", `"a"`},
		{"push|-store|" + store + "|-peer|host:1|-tls|" + both + "|-name|c", "c.crt"},
		{"push|-store|" + store + "|-peer|ssh:", "ssh:"},
		{"push|-store|" + store + "|-peer|ssh:-oProxyCommand=x", "hyphen"},
		{"push|-store|" + store + "|-peer|ssh:u@-x", "hyphen"},
		{"push|-store|" + store + "|-peer|ssh:-l@h", "hyphen"},
		{"push|-store|" + store + "|-peer|ssh:@h", "ssh:@h"},
		{"push|-store|" + store + "|-peer|ssh:h:0", `"0"`},
		{"push|-store|" + store + "|-peer|ssh:h:99999", `"99999"`},
		{"push|-store|" + store + "|-peer|ssh:a;b", "ssh:a;b"},
		{"push|-store|" + store + "|-peer|ssh:h|-tls|" + both, "-tls"},
		{"push|-store|" + store + "|-peer|ssh:h|-ssh|no-such-ssh", `"no-such-ssh"`},
		{"push|-store|" + store + "|-peer|h:1|-identity-file|x", `"x"`},
		{"push|-store|zfs:a@b|-peer|h:1", "zfs:a@b"},
		{"push|-store|zfs:-r|-peer|h:1", "zfs:-r"},
		{"push|-store|zfs:|-peer|h:1", `"zfs:"`},
		{"push|-store|btrfs:|-peer|h:1", `"btrfs:"`},
		{"serve|-stdio|-sink|" + store, "-stdio-identity"},
		{"serve|-stdio|-sink|" + store + "|-stdio-identity|../x", `"../x"`},
		{"serve|-stdio|-stdio-identity|x", "-sink"},
		{"serve|-stdio|-stdio-identity|x|-sink|" + store + "|-listen|:0", `":0"`},
		{"serve|-listen|:0|-stdio-identity|x|-sink|" + store + "|-tls|x", `"x"`},
		{"pull|-store|" + store, "-peer"},
		{"list", "-peer"},
		{"list|-store|" + store + "|-side|front", `"front"`},
	} {
		var args []string
		if test.args != "" {
			args = strings.Split(test.args, "|")
		}
		status, stdout, stderr := runArgs(args...)
		if status != statusUsage || !strings.Contains(stderr, test.name) || stdout != "" {
			t.Errorf("%q: status %d, stdout %q, stderr %q; it should name %s", args, status, stdout, stderr, test.name)
		}
	}
}

func TestListOfAStoreHere(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, "db/dump-2", noise(10), 2)
	put(t, dir, "db/dump-1", noise(10), 1)
	put(t, dir, "img/disk", noise(10), 1)
	out := mustRun(t, "list", "-store", "dir:"+dir, "db")
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) != 3 || !strings.Contains(lines[1], "dump-1") || !strings.Contains(lines[2], "dump-2") || strings.Contains(out, "img") {
		t.Errorf("got\n%s", out)
	}
	status, out, stderr := runArgs("list", "-store", "dir:"+dir, "db", "no-such")
	if status != statusFailed || !strings.Contains(stderr, `"no-such"`) || !strings.Contains(out, "dump-1") {
		t.Errorf("status %d, %q, %q", status, out, stderr)
	}
}

func TestSizesAndDurationsReadWell(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB", 1 << 20: "1.0 MiB",
		1<<20 - 1: "1.0 MiB", 5 << 40: "5.0 TiB", 1<<63 - 1: "8.0 EiB"} {
		if got := size(n); got != want {
			t.Errorf("size(%d) is %q, want %q", n, got, want)
		}
	}
	for name, want := range map[string]string{"a/b": "a/b", "../x": `"../x"`, "a\x1b[2J": `"a\x1b[2J"`, ".": "."} {
		if got := shown(name); got != want {
			t.Errorf("%q is shown as %s", name, got)
		}
	}
}
