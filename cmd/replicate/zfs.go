package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"example.org/rpc"
)

// zfsTool is the program zfs and what this one can do: there are many, from zfs-fuse, which knows nothing that came after
// 2010, to OpenZFS.
type zfsTool struct {
	program string
	zfsFeatures
}

// zfsFeatures are found out once, from what zfs says of itself, and what is lacking is done without.
type zfsFeatures struct {
	list      bool // list -p: exact numbers
	bookmarks bool // bookmark
	holds     bool // hold, release
	dry       bool // send -n -v -P: estimates of sizes
	raw       bool // send -w: encrypted, as it is
	resume    bool // send -t, receive -s, receive -A
	unmounted bool // receive -u
	typed     bool // get -t: only of some types
}

// parseZFSUsage reads the overview of commands that zfs shows if it is called without one.
func parseZFSUsage(text string) zfsFeatures {
	var f zfsFeatures
	options := make(map[string]string) // of each command, the letters
	command, abort, token := "", false, false
	for line := range strings.Lines(text) {
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		if isTab := line[0] == '\t'; isTab && line[1] != ' ' { // what is continued is indented further
			command = words[0]
		}
		for _, word := range words {
			if letters, ok := strings.CutPrefix(word, "[-"); ok {
				letters, _, _ = strings.Cut(letters, "]")
				options[command] += letters
			}
		}
		abort = abort || command == "receive" && strings.Contains(line, " -A ")
		token = token || command == "send" && strings.Contains(line, " -t ")
		f.typed = f.typed || command == "get" && strings.Contains(line, "[-t type")
		f.bookmarks = f.bookmarks || command == "bookmark"
		f.holds = f.holds || command == "hold"
	}
	has := func(command, letters string) bool {
		for _, letter := range letters {
			if !strings.ContainsRune(options[command], letter) {
				return false
			}
		}
		return true
	}
	f.list, f.dry, f.raw = has("list", "p"), has("send", "nvP"), has("send", "w")
	f.resume = token && abort && has("receive", "s")
	f.unmounted = has("receive", "u")
	return f
}

// lacking names what the tool cannot do, for the log.
func (f zfsFeatures) lacking() []string {
	var lacking []string
	for _, feature := range []struct {
		has  bool
		what string
	}{
		{f.bookmarks, "bookmarks: increments need the snapshot that was sent last"},
		{f.holds, "holds: a snapshot can be destroyed while it is sent"},
		{f.resume, "resume tokens: what breaks off begins anew"},
		{f.dry, "dry runs: sizes of increments are not known"},
		{f.raw, "raw sends"},
		{f.unmounted, "receive -u: the store of received filesystems needs mountpoint=none"},
	} {
		if !feature.has {
			lacking = append(lacking, feature.what)
		}
	}
	return lacking
}

// findZFS finds zfs and asks it what it can do.
func findZFS(ctx context.Context, log *slog.Logger) (*zfsTool, error) {
	program, err := findProgram("zfs")
	if err != nil {
		return nil, err
	}
	usage, err := runTool(ctx, program, "-?") // some show it on stdout, some on stderr, and as an error
	var failed *childError
	if errors.As(err, &failed) {
		usage += failed.stderr
	}
	if !strings.Contains(usage, "\tsend ") {
		return nil, fmt.Errorf("%s shows no usage: %w", program, err)
	}
	t := &zfsTool{program: program, zfsFeatures: parseZFSUsage(usage)}
	if lacking := t.lacking(); len(lacking) > 0 {
		log.Warn("this zfs does without", "lacking", strings.Join(lacking, "; "))
	}
	return t, nil
}

func (t *zfsTool) run(ctx context.Context, args ...string) (string, error) {
	out, err := runTool(ctx, t.program, args...)
	return out, zfsError(err)
}

// table runs a command with -H, whose output is lines with tabs between the fields.
func (t *zfsTool) table(ctx context.Context, fields int, args ...string) ([][]string, error) {
	out, err := t.run(ctx, args...)
	if err != nil {
		return nil, err
	}
	var rows [][]string
	for line := range strings.Lines(out) {
		row := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
		if len(row) != fields {
			return nil, fmt.Errorf("zfs %s: %d fields in %q, there should be %d", args[0], len(row), line, fields)
		}
		rows = append(rows, row)
	}
	return rows, nil
}

// zfsError gives a failure of zfs the code that its words mean. The words are kept: they are all that there is to say why.
func zfsError(err error) error {
	var failed *childError
	if !errors.As(err, &failed) || rpc.CodeOf(err) == rpc.Canceled || rpc.CodeOf(err) == rpc.DeadlineExceeded {
		return err
	}
	for _, meaning := range []struct {
		words string
		code  rpc.Code
	}{
		{"out of space", rpc.ResourceExhausted}, {"No space left", rpc.ResourceExhausted}, {"quota exceeded", rpc.ResourceExhausted},
		{"does not exist", rpc.NotFound}, {"no such pool", rpc.NotFound}, {"is busy", rpc.Aborted}, {"currently busy", rpc.Aborted},
	} {
		if strings.Contains(failed.stderr, meaning.words) {
			return &toolFailure{failed, meaning.code}
		}
	}
	return err
}

// maxZFSName is what a dataset's name may have, that of the snapshot included: 256 with the NUL that ends it.
const maxZFSName = 255

// checkZFSPath tells what is wrong with a filesystem's path in a zfs: store.
func checkZFSPath(path string) error { return checkPathOf(path, checkZFSName) }

// checkZFSName tells what is wrong with a part of a dataset's name or with that of a snapshot. What passes is an argument of
// zfs that means only itself: no option, and no snapshot, bookmark or hidden dataset of something else.
func checkZFSName(name string) error {
	if err := checkArgument(name); err != nil {
		return err
	}
	for _, r := range name {
		switch {
		case 'a' <= r && r <= 'z', 'A' <= r && r <= 'Z', '0' <= r && r <= '9', strings.ContainsRune("-_.: ", r):
		default:
			return fmt.Errorf("name %q has a %q", name, r)
		}
	}
	return nil
}
