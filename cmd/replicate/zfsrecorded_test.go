package main

import (
	"bytes"
	"compress/zlib"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"example.org/rpc"
)

// What only OpenZFS has (bookmarks, resume tokens, raw sends, dry runs, receive -u) cannot be run here. These tests are on
// RECORDED behaviour: a program "zfs", which is this test binary, answers each command with what OpenZFS was seen to answer,
// and keeps a list of the commands. They show that the right commands are run in the right order and that the answers are
// read, not that OpenZFS does its part.
const fakeAnswers = "REPLICATE_TEST_ZFS"

func init() { programs["zfs"] = fakeZFS }

// answer is what zfs says to one command.
type answer struct {
	Out, Err string
	Status   int
	Eats     bool // it reads its stdin
}

// fakeZFS looks its arguments up among the answers of the test. What is not there is an error.
func fakeZFS(args []string) {
	dir := os.Getenv(fakeAnswers)
	command := strings.Join(args, " ")
	note(filepath.Join(dir, "commands"), command)
	var answers map[string]answer
	recorded, err := os.ReadFile(filepath.Join(dir, "answers"))
	if err == nil {
		err = json.Unmarshal(recorded, &answers)
	}
	a, known := answers[command]
	if err != nil || !known {
		fmt.Fprintf(os.Stderr, "no answer to %q is recorded: %v\n", command, err)
		os.Exit(99)
	}
	if a.Eats {
		n, _ := io.Copy(io.Discard, os.Stdin)
		note(filepath.Join(dir, "commands"), fmt.Sprintf("(%d bytes)", n))
	}
	fmt.Fprint(os.Stdout, a.Out)
	fmt.Fprint(os.Stderr, a.Err)
	os.Exit(a.Status)
}

// The parts of OpenZFS 2.3's overview of commands that are of interest, and all that zfs-fuse 0.7 has of them.
const (
	usageOfOpenZFS = "usage: zfs command args ...\nwhere 'command' is one of the following:\n\n" +
		"\tcreate [-Pnpuv] [-o property=value] ... <filesystem>\n" +
		"\tdestroy <filesystem|volume>#<bookmark>\n\n" +
		"\tbookmark <snapshot|bookmark> <newbookmark>\n" +
		"\tlist [-Hp] [-r|-d max] [-o property[,...]] [-s property]...\n\t    [-S property]... [-t type[,...]] [filesystem|volume|snapshot] ...\n\n" +
		"\tget [-rHp] [-d max] [-o \"all\" | field[,...]]\n\t    [-t type[,...]] [-s source[,...]]\n\t    <\"all\" | property[,...]> [filesystem|volume|snapshot|bookmark] ...\n" +
		"\tsend [-DLPbcehnpsVvw] [-i|-I snapshot]\n\t     [-R [-X dataset[,dataset]...]]     <snapshot>\n" +
		"\tsend [-DnVvPLecw] [-i snapshot|bookmark] <filesystem|volume|snapshot>\n" +
		"\tsend [-nVvPe] -t <receive_resume_token>\n" +
		"\treceive [-vMnsFhu] [-o <property>=<value>] ... [-x <property>] ...\n\t    <filesystem|volume|snapshot>\n" +
		"\treceive -A <filesystem|volume>\n\n" +
		"\thold [-r] <tag> <snapshot> ...\n\trelease [-r] <tag> <snapshot> ...\n"
	usageOfZFSFuse = "usage: zfs command args ...\nwhere 'command' is one of the following:\n\n" +
		"\tlist [-rH][-d max] [-o property[,...]] [-t type[,...]] [-s property] ...\n\t    [-S property] ... [filesystem|volume|snapshot] ...\n\n" +
		"\tget [-rHp] [-d max] [-o \"all\" | field[,...]] [-s source[,...]]\n\t    <\"all\" | property[,...]> [filesystem|volume|snapshot] ...\n" +
		"\tsend [-RDp] [-[iI] snapshot] <snapshot>\n\treceive [-vnF] <filesystem|volume|snapshot>\n\treceive [-vnF] -d <filesystem>\n\n" +
		"\thold [-r] <tag> <snapshot> ...\n\trelease [-r] <tag> <snapshot> ...\n"
)

func TestRecordedUsageTellsWhatAZFSCanDo(t *testing.T) {
	all := zfsFeatures{list: true, bookmarks: true, holds: true, dry: true, raw: true, resume: true, unmounted: true, typed: true}
	if got := parseZFSUsage(usageOfOpenZFS); got != all {
		t.Errorf("OpenZFS: %+v", got)
	}
	if lacking := all.lacking(); len(lacking) > 0 {
		t.Errorf("OpenZFS lacks %q", lacking)
	}
	if got := parseZFSUsage(usageOfZFSFuse); got != (zfsFeatures{holds: true}) {
		t.Errorf("zfs-fuse: %+v", got)
	}
	if lacking := parseZFSUsage(usageOfZFSFuse).lacking(); len(lacking) != 5 {
		t.Errorf("zfs-fuse lacks %q", lacking)
	}
}

// recorded is a store on recorded answers.
type recorded struct {
	*zfsStore
	dir    string
	logged *bytes.Buffer
}

// newRecorded opens tank/data, of OpenZFS.
func newRecorded(t *testing.T, answers map[string]answer) *recorded {
	t.Helper()
	dir := t.TempDir()
	answers["-?"] = answer{Out: usageOfOpenZFS}
	answers["list -H -o name tank/data"] = answer{Out: "tank/data\n"}
	file, err := json.Marshal(answers)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "answers"), file, 0o600)
	}
	self, _ := os.Executable()
	if err == nil {
		err = os.Symlink(self, filepath.Join(dir, "zfs"))
	}
	if err != nil {
		skip(t, "the recorded zfs cannot be set up: %v", err) // no symbolic links on Windows
	}
	t.Setenv("PATH", dir)
	t.Setenv(fakeAnswers, dir)
	become(t, "zfs")
	r := &recorded{dir: dir, logged: new(bytes.Buffer)}
	if r.zfsStore, err = openZFSStore("tank/data", slog.New(slog.NewTextHandler(r.logged, nil))); err != nil {
		t.Fatal(err)
	}
	r.commands(t)
	return r
}

// commands are those that were run since the last time.
func (r *recorded) commands(t *testing.T) []string {
	t.Helper()
	file := filepath.Join(r.dir, "commands")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	os.WriteFile(file, nil, 0o600)
	return strings.Split(strings.TrimSpace(string(text)), "\n")
}

func (r *recorded) expect(t *testing.T, want ...string) {
	t.Helper()
	if got := r.commands(t); !slices.Equal(got, want) {
		t.Errorf("the commands were\n  %s\nwant\n  %s", strings.Join(got, "\n  "), strings.Join(want, "\n  "))
	}
}

// These tokens and what they say were recorded from ZFS on Linux.
const (
	fullToken      = "1-9baebea70-b8-789c636064000310a500c4ec50360710e72765a52697303030419460caa7a515a79680647ce0f26c48f2499525a9c5405ac3c90fabfe92fcf4d2cc140686b30972c7850efd0cd24092e704cbe725e6a632305415e5e797e803cd2ad14f743084b805001b201795"
	incrementToken = "1-ef01e717e-e0-789c636064000310a501c49c50360710a715e5e7a69766a63040c1d904b9e342877e062900d9ec48eaf293b252934b181898a0ea30e4d3d28a534b40323e70793624f9a4ca92d46220fdc1ce0fabfe927c882bc46c8a0a9f71ad3baf8124cf0996cf4bcc4d6560a82acacf2fd1079a55a29fe86004710b00d8ae1f93"
	fullGUID       = 0x52f9c212c71e60cd
	incrementGUID  = 0xcfae0ae671723c16
)

func TestRecordedTokensAreRead(t *testing.T) {
	for token, want := range map[string]zfsToken{
		fullToken:      {toName: "zroot/test/a@1", toGUID: fullGUID, bytes: 0x4e4228},
		incrementToken: {toName: "zroot/test/a@2", toGUID: incrementGUID, fromGUID: fullGUID, bytes: 0x4e3ef0},
	} {
		if got, err := parseZFSToken(token); err != nil || got != want {
			t.Errorf("%+v, %v; want %+v", got, err, want)
		}
		for n := range len(token) { // what is cut short is an error, and never a panic
			if got, err := parseZFSToken(token[:n]); err == nil {
				t.Errorf("cut after %d: %+v", n, got)
			}
		}
	}
	for _, token := range []string{"", "1", "1-2-3", "2-0-0-00", "1-x-0-00", "1-0-0-zz", "-t-1-2", "1-0-0-" + strings.Repeat("0", maxTokenBytes)} {
		if _, err := parseZFSToken(token); err == nil {
			t.Errorf("%.20q is a token", token)
		}
	}
}

func FuzzZFSTokenIsReadOrRefused(f *testing.F) {
	f.Add([]byte("\x00\x01\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x20\x00\x00\x00\x07\x00\x00\x00\x01\x00\x00\x00\x08\x00\x00\x00toguid\x00\x00\x01\x02\x03\x04\x05\x06\x07\x08\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, packed []byte) {
		values, err := parseNVList(packed)
		for name := range values {
			if err == nil && len(name) > len(packed) {
				t.Errorf("%d bytes of name from %d", len(name), len(packed))
			}
		}
	})
}

func TestRecordedEstimatesAreRead(t *testing.T) {
	const says = "resume token contents:\nnvlist version: 0\n\tobject = 0x2\n\toffset = 0x4c0000\n\tbytes = 0x4e4228\n"
	for out, want := range map[string]uint64{
		"": 0,
		"full\tzroot/test/a@3\t10518512\nsize\t10518512\n":                      10518512,
		"incremental\t1\tzroot/test/a@2\t10511856\nsize\t10511856\n":            10511856,
		says + "full\tzroot/test/a@1\t5389768\n":                                5389768,
		says + "incremental\tzroot/test/a#1\tzroot/test/a@2\t5383312\n\n":       5383312,
		"full\tpool1/otherjob/ds with spaces@blaffoo\t12912\nsize\t12912\n":     12912,
		"cannot open 'tank/data/db@one': dataset does not exist\n":              0,
		"full\ttank/data/db@one\tnot a number\nsize\t18446744073709551616000\n": 0,
	} {
		if got := parseZFSEstimate(out); got != want {
			t.Errorf("%q: %d, want %d", out, got, want)
		}
	}
}

const (
	listOf = "list -H -p -d 1 -t snapshot,bookmark -o name,guid,createtxg,creation "
	guidOf = "get -H -p -o value guid "
)

func TestRecordedListsHaveBookmarksPlaceholdersAndTokens(t *testing.T) {
	r := newRecorded(t, map[string]answer{
		"get -H -p -r -o name,property,value,source -t filesystem,volume type,replicate:placeholder,receive_resume_token tank/data": {Out: "tank/data\ttype\tfilesystem\t-\ntank/data\treplicate:placeholder\t-\t-\ntank/data\treceive_resume_token\t-\t-\n" +
			"tank/data/p\ttype\tfilesystem\t-\ntank/data/p\treplicate:placeholder\ton\tlocal\ntank/data/p\treceive_resume_token\t-\t-\n" +
			"tank/data/p/db\ttype\tvolume\t-\ntank/data/p/db\treplicate:placeholder\ton\tinherited from tank/data/p\ntank/data/p/db\treceive_resume_token\t" + fullToken + "\t-\n" +
			"tank/data/p/db/%recv\ttype\tvolume\t-\n"},
		listOf + "tank/data/p/db": {Out: "tank/data/p/db@two\t222\t20\t1700000002\ntank/data/p/db#one\t111\t10\t1700000001\n"},
	})
	got := filesystems(t, r)
	want := []rpc.Filesystem{{Path: "."}, {Path: "p", IsPlaceholder: true}, {Path: "p/db", ResumeToken: fullToken}}
	if !slices.Equal(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
	list := versions(t, r, "p/db")
	if len(list) != 2 || list[0].Type != rpc.VersionBookmark || list[0].Name != "one" || list[0].GUID != 111 || list[0].CreateTXG != 10 ||
		list[1].Type != rpc.VersionSnapshot || list[1].Name != "two" || list[1].Creation.Unix() != 1700000002 {
		t.Errorf("%+v", list)
	}
}

func recordedVersion(kind rpc.VersionType, name string, guid uint64) *rpc.FilesystemVersion {
	return &rpc.FilesystemVersion{Type: kind, Name: name, GUID: guid, Creation: epoch}
}

// readAll reads a stream and closes it.
func readAll(t *testing.T, stream io.ReadCloser) (string, error) {
	t.Helper()
	defer stream.Close()
	all, err := io.ReadAll(stream)
	return string(all), err
}

func TestRecordedIncrementFromABookmarkIsRawHeldAndMovesTheCursor(t *testing.T) {
	ctx := withReceiver(context.Background(), "host:1")
	cursor := cursorOf(ctx)
	r := newRecorded(t, map[string]answer{
		guidOf + "tank/data/db@two":                                     {Out: "34\n"},
		guidOf + "tank/data/db#one":                                     {Out: "18\n"},
		"get -H -p -o value encryption tank/data/db":                    {Out: "aes-256-gcm\n"},
		"hold replicate tank/data/db@two":                               {},
		"send -n -v -P -w -i tank/data/db#one tank/data/db@two":         {Out: "incremental\tone\ttank/data/db@two\t777\nsize\t777\n"},
		"send -w -i tank/data/db#one tank/data/db@two":                  {Out: "the stream"},
		"release replicate tank/data/db@two":                            {},
		"bookmark tank/data/db@two tank/data/db#" + cursor + digits(34): {},
		listOf + "tank/data/db": {Out: "tank/data/db@two\t34\t20\t1700000002\ntank/data/db#" + cursor + digits(34) + "\t34\t20\t1700000002\ntank/data/db#" +
			cursor + digits(18) + "\t18\t10\t1700000001\ntank/data/db#one\t18\t10\t1700000001\ntank/data/db#" + cursorPrefix + "other_" + digits(18) + "\t18\t10\t1700000001\n"},
		"destroy tank/data/db#" + cursor + digits(18): {},
	})
	req := &rpc.SendReq{Filesystem: "db", From: recordedVersion(rpc.VersionBookmark, "one", 18), To: recordedVersion(rpc.VersionSnapshot, "two", 34)}
	res, stream, err := r.Send(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := readAll(t, stream); err != nil || got != "the stream" || res.ExpectedSize != 777 {
		t.Errorf("%q, %v, %+v", got, err, res)
	}
	r.expect(t, guidOf+"tank/data/db@two", guidOf+"tank/data/db#one", "get -H -p -o value encryption tank/data/db", "hold replicate tank/data/db@two",
		"send -n -v -P -w -i tank/data/db#one tank/data/db@two", "send -w -i tank/data/db#one tank/data/db@two", "release replicate tank/data/db@two")
	if _, err := r.SendCompleted(ctx, &rpc.SendCompletedReq{OriginalReq: req}); err != nil {
		t.Fatal(err)
	}
	r.expect(t, guidOf+"tank/data/db@two", "bookmark tank/data/db@two tank/data/db#"+cursor+digits(34), listOf+"tank/data/db", "destroy tank/data/db#"+cursor+digits(18))
	at, err := r.ReplicationCursor(ctx, &rpc.ReplicationCursorReq{Filesystem: "db"})
	if err != nil || at.GUID != 34 {
		t.Errorf("the cursor is at %+v, %v", at, err)
	}
	if at, err = r.ReplicationCursor(withReceiver(ctx, "elsewhere:1"), &rpc.ReplicationCursorReq{Filesystem: "db"}); err != nil || !at.NotExist {
		t.Errorf("of another receiver it is at %+v, %v", at, err)
	}
}

func digits(guid uint64) string { return fmt.Sprintf("%016x", guid) }

func TestRecordedTokenIsSentOnlyIfItIsOfThatStep(t *testing.T) {
	dir := map[string]answer{
		"-?":                            {Out: usageOfOpenZFS},
		"list -H -o name zroot/test":    {Out: "zroot/test\n"},
		guidOf + "zroot/test/a@2":       {Out: fmt.Sprint(uint64(incrementGUID)) + "\n"},
		guidOf + "zroot/test/a@1":       {Out: fmt.Sprint(uint64(fullGUID)) + "\n"},
		guidOf + "zroot/test/b@2":       {Out: fmt.Sprint(uint64(incrementGUID)) + "\n"},
		guidOf + "zroot/test/b@1":       {Out: fmt.Sprint(uint64(fullGUID)) + "\n"},
		"hold replicate zroot/test/a@2": {}, "hold replicate zroot/test/a@1": {}, "release replicate zroot/test/a@2": {}, "release replicate zroot/test/a@1": {},
		"send -n -v -P -t " + incrementToken:             {Out: "resume token contents:\nnvlist version: 0\n\tfromguid = 0x52f9c212c71e60cd\nincremental\tzroot/test/a@1\tzroot/test/a@2\t5383936\n"},
		"send -i zroot/test/a@1 zroot/test/a@2":          {Out: "all of it"},
		"send -t " + incrementToken:                      {Out: "the rest"},
		"get -H -p -o value encryption zroot/test/b":     {Out: "off\n"},
		"get -H -p -o value encryption zroot/test/a":     {Out: "off\n"},
		"send -n -v -P -i zroot/test/b@1 zroot/test/b@2": {Out: "size\t9\n"},
		"send -n -v -P zroot/test/a@2":                   {Out: "size\t99\n"},
	}
	r := newRecorded(t, dir)
	r.root = "zroot/test"
	one, two := recordedVersion(rpc.VersionSnapshot, "1", fullGUID), recordedVersion(rpc.VersionSnapshot, "2", incrementGUID)
	res, stream, err := r.Send(context.Background(), &rpc.SendReq{Filesystem: "a", From: one, To: two, ResumeToken: incrementToken})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := readAll(t, stream); err != nil || got != "the rest" || !res.UsedResumeToken || res.ExpectedSize != 5383936 {
		t.Errorf("%q, %v, %+v", got, err, res)
	}
	// The dataset was renamed to b, or the token is of a peer that wants to read a: either way it is not used.
	for _, req := range []*rpc.SendReq{
		{Filesystem: "b", From: one, To: two, ResumeToken: incrementToken},
		{Filesystem: "a", To: two, ResumeToken: incrementToken},
		{Filesystem: "a", To: two, ResumeToken: "-t"},
	} {
		if res, err := r.SendDry(context.Background(), req); err != nil || res.UsedResumeToken || res.ExpectedSize == 0 {
			t.Errorf("%+v: %+v, %v", req, res, err)
		}
	}
	for _, command := range r.commands(t) {
		if strings.HasPrefix(command, "send ") && strings.Contains(command, "-t") && !strings.HasSuffix(command, incrementToken) {
			t.Errorf("%q", command)
		}
	}
	if !strings.Contains(r.logged.String(), "begins anew") {
		t.Error("the log does not say so")
	}
}

// zfsStreamOf is the first record of a stream, and something behind it.
func zfsStreamOf(order binary.AppendByteOrder, kind, to, from uint64) []byte {
	b := order.AppendUint32(nil, 0)
	b = order.AppendUint32(b, 0)
	b = order.AppendUint64(b, zfsMagic)
	b = order.AppendUint64(b, kind)
	b = order.AppendUint64(b, 0)
	b = order.AppendUint32(b, 2)
	b = order.AppendUint32(b, 0)
	b = order.AppendUint64(b, to)
	b = order.AppendUint64(b, from)
	return append(append(b, make([]byte, 256)...), "data"...)
}

const (
	stateOf     = "get -H -p -o property,value,source replicate:placeholder,receive_resume_token "
	noState     = "replicate:placeholder\t-\t-\nreceive_resume_token\t-\t-\n"
	resumeState = "replicate:placeholder\t-\t-\nreceive_resume_token\t" + incrementToken + "\t-\n"
)

func TestRecordedReceive(t *testing.T) {
	const db = "tank/data/c/db"
	missing := answer{Err: "cannot open '" + db + "': dataset does not exist\n", Status: 1}
	one := answer{Out: db + "@one\t18\t10\t1700000001\n"}
	eats := answer{Eats: true}
	for name, test := range map[string]struct {
		to, from uint64
		clear    bool
		state    map[string]answer
		want     []string
	}{
		"whole, with a placeholder above": {18, 0, false,
			map[string]answer{stateOf + db: missing, "list -H -o name tank/data/c": missing},
			[]string{stateOf + db, "list -H -o name tank/data/c", "create -o canmount=off -o replicate:placeholder=on tank/data/c", "list -H -o name tank/data/c",
				"receive -s -u " + db + "@v", "(316 bytes)", guidOf + db + "@v", "set readonly=on " + db}},
		"whole, into a placeholder": {18, 0, false,
			map[string]answer{stateOf + db: {Out: strings.Replace(noState, "-\t-", "on\tlocal", 1)}, listOf + db: {}},
			[]string{stateOf + db, listOf + db, "list -H -o name tank/data/c", "receive -s -u -F " + db + "@v", "(316 bytes)", guidOf + db + "@v",
				"inherit replicate:placeholder " + db, "set readonly=on " + db}},
		"an increment": {34, 18, false,
			map[string]answer{stateOf + db: {Out: noState}, listOf + db: one},
			[]string{stateOf + db, listOf + db, "list -H -o name tank/data/c", "receive -s -u " + db + "@v", "(316 bytes)", guidOf + db + "@v"}},
		"the rest of an increment": {34, 18, false,
			map[string]answer{stateOf + db: {Out: resumeState}, listOf + db: one},
			[]string{stateOf + db, listOf + db, "list -H -o name tank/data/c", "receive -s -u " + db + "@v", "(316 bytes)", guidOf + db + "@v"}},
		"something else than what broke off": {34, 18, true,
			map[string]answer{stateOf + db: {Out: resumeState}, listOf + db: one, "receive -A " + db: {}},
			[]string{stateOf + db, listOf + db, "receive -A " + db, stateOf + db, listOf + db, "list -H -o name tank/data/c", "receive -s -u " + db + "@v", "(316 bytes)", guidOf + db + "@v"}},
	} {
		for _, order := range []binary.AppendByteOrder{binary.LittleEndian, binary.BigEndian} {
			t.Run(name, func(t *testing.T) {
				test.state[guidOf+db+"@v"] = answer{Out: fmt.Sprintln(test.to)}
				for _, command := range test.want {
					if _, there := test.state[command]; !there {
						test.state[command] = answer{}
					}
				}
				for command := range test.state {
					if strings.HasPrefix(command, "receive -s") {
						test.state[command] = eats
					}
				}
				r := newRecorded(t, test.state)
				_, err := r.Receive(context.Background(), &rpc.ReceiveReq{Filesystem: "c/db", To: recordedVersion(rpc.VersionSnapshot, "v", test.to), ClearResumeToken: test.clear},
					bytes.NewReader(zfsStreamOf(order, zfsSingle|1<<40, test.to, test.from)))
				if err != nil && !strings.Contains(name, "placeholder above") { // that one is never there, in the recording
					t.Error(err)
				}
				r.expect(t, test.want...)
			})
		}
	}
}

func TestRecordedReceiveRefusesWhatWouldDestroySomething(t *testing.T) {
	const db = "tank/data/db"
	list := answer{Out: db + "@one\t18\t10\t1700000001\n" + db + "@own\t77\t11\t1700000003\n"}
	for name, test := range map[string]struct {
		list   answer
		stream []byte
		code   rpc.Code
	}{
		"a package":                        {list, zfsStreamOf(binary.LittleEndian, 2, 34, 77), rpc.InvalidArgument},
		"of another version":               {list, zfsStreamOf(binary.LittleEndian, zfsSingle, 35, 77), rpc.InvalidArgument},
		"from one that is not the newest":  {list, zfsStreamOf(binary.LittleEndian, zfsSingle, 34, 18), rpc.FailedPrecondition},
		"from one that is not there":       {list, zfsStreamOf(binary.LittleEndian, zfsSingle, 34, 99), rpc.FailedPrecondition},
		"whole":                            {list, zfsStreamOf(binary.LittleEndian, zfsSingle, 34, 0), rpc.AlreadyExists},
		"whole, onto one without versions": {answer{}, zfsStreamOf(binary.LittleEndian, zfsSingle, 34, 0), rpc.AlreadyExists},
		"of another kind":                  {list, bytes.Repeat([]byte("x"), 400), rpc.InvalidArgument},
		"nothing":                          {list, nil, rpc.DataLoss},
	} {
		r := newRecorded(t, map[string]answer{stateOf + db: {Out: noState}, listOf + db: test.list})
		_, err := r.Receive(context.Background(), &rpc.ReceiveReq{Filesystem: "db", To: recordedVersion(rpc.VersionSnapshot, "v", 34)}, bytes.NewReader(test.stream))
		if rpc.CodeOf(err) != test.code {
			t.Errorf("%s: %v", name, err)
		}
		r.expect(t, stateOf+db, listOf+db)
	}
}

func TestZFSNamesThatMeanSomethingElseAreRefused(t *testing.T) {
	for _, name := range []string{"-r", "a@b", "a#b", "a%b", "%recv", "@", "a,b", "a'b", "a$b", "a*", "..", "a\tb", "ä", "a=b", ""} {
		if checkZFSName(name) == nil {
			t.Errorf("name %q is allowed", name)
		}
		if checkZFSPath("x/"+name+"/y") == nil {
			t.Errorf("path with %q is allowed", name)
		}
	}
	for _, name := range []string{"a", "auto-2024-05-06_07:08", "with space", "x.y", "1"} {
		if err := checkZFSName(name); err != nil {
			t.Error(err)
		}
	}
	r := newRecorded(t, map[string]answer{})
	for _, path := range []string{"-r", "a@b", "a#b", "a%b", "../x", "a//b", strings.Repeat("a/", 130) + "a"} {
		if _, err := r.ListFilesystemVersions(context.Background(), &rpc.ListFilesystemVersionsReq{Filesystem: path}); rpc.CodeOf(err) != rpc.InvalidArgument {
			t.Errorf("path %q: %v", path, err)
		}
		if _, _, err := r.Send(context.Background(), &rpc.SendReq{Filesystem: "a", To: recordedVersion(rpc.VersionSnapshot, path, 1)}); rpc.CodeOf(err) != rpc.InvalidArgument {
			t.Errorf("version %q: %v", path, err)
		}
		if _, err := r.Sub(path); rpc.CodeOf(err) != rpc.InvalidArgument && len(path) < 99 {
			t.Errorf("client %q: %v", path, err)
		}
	}
	r.expect(t, "")
}

func TestZFSFailuresHaveCodes(t *testing.T) {
	for text, code := range map[string]rpc.Code{
		"cannot receive new filesystem stream: out of space":       rpc.ResourceExhausted,
		"cannot open 'tank/x': dataset does not exist":             rpc.NotFound,
		"cannot receive: destination 'tank/x' is busy":             rpc.Aborted,
		"cannot receive incremental stream: invalid backup stream": rpc.Unknown,
	} {
		err := zfsError(fmt.Errorf("wrapped: %w", &childError{"zfs receive", fmt.Errorf("exit status 1"), text}))
		if rpc.CodeOf(err) != code || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v, %v", text, rpc.CodeOf(err), err)
		}
	}
	if err := zfsError(nil); err != nil {
		t.Error(err)
	}
}

// nvPair is a pair of an nvlist as a little-endian host packs it.
func nvPair(name string, kind uint32, value []byte) []byte {
	pad := func(b []byte) []byte { return append(b, make([]byte, -len(b)&7)...) }
	body := append(pad(append([]byte(name), 0)), pad(value)...)
	b := binary.LittleEndian.AppendUint32(nil, uint32(16+len(body)))
	b = binary.LittleEndian.AppendUint16(b, uint16(len(name)+1))
	b = binary.LittleEndian.AppendUint16(b, 0)
	b = binary.LittleEndian.AppendUint32(b, 1)
	return append(binary.LittleEndian.AppendUint32(b, kind), body...)
}

// craftedToken is a token as anybody can write one: its checksum is no secret.
func craftedToken(t *testing.T, pairs ...[]byte) string {
	t.Helper()
	var packed bytes.Buffer
	w := zlib.NewWriter(&packed)
	w.Write([]byte("\x00\x01\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00"))
	for _, pair := range pairs {
		w.Write(pair)
	}
	w.Write(make([]byte, 4))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("1-0-0-%x", packed.Bytes())
}

func nvNumber(name string, n uint64) []byte {
	return nvPair(name, nvUint64, binary.LittleEndian.AppendUint64(nil, n))
}

func nvText(name, text string) []byte { return nvPair(name, nvString, append([]byte(text), 0)) }

func TestTokenThatZFSCouldReadOtherwiseIsRefused(t *testing.T) {
	good := [][]byte{nvText("toname", "tank/data/db@two"), nvNumber("toguid", 34)}
	if token, err := parseZFSToken(craftedToken(t, good...)); err != nil || token.toGUID != 34 || token.raw {
		t.Errorf("%+v, %v", token, err)
	}
	for name, more := range map[string][]byte{
		"name twice":                  nvText("toname", "tank/secret@x"),
		"name twice, of another type": nvPair("toguid", 3, make([]byte, 8)),
		"a NUL in a name":             nvText("toname\x00x", "tank/secret@x"),
	} {
		for _, pairs := range [][][]byte{slices.Insert(slices.Clone(good), 0, more), append(slices.Clone(good), more)} {
			if token, err := parseZFSToken(craftedToken(t, pairs...)); err == nil {
				t.Errorf("%s: %+v", name, token)
			}
		}
	}
}

func TestTokenDoesNotDecryptWhatIsSentRaw(t *testing.T) {
	base := [][]byte{nvText("toname", "tank/data/db@two"), nvNumber("toguid", 34)}
	clear, raw := craftedToken(t, base...), craftedToken(t, append(base, nvPair("rawok", 1, nil))...)
	for name, test := range map[string]struct {
		encryption, token string
		used              bool
	}{
		"encrypted, and the token is not raw": {"aes-256-gcm", clear, false},
		"encrypted, and the token is raw":     {"aes-256-gcm", raw, true},
		"in clear":                            {"off", clear, true},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRecorded(t, map[string]answer{
				guidOf + "tank/data/db@two":                  {Out: "34\n"},
				"get -H -p -o value encryption tank/data/db": {Out: test.encryption + "\n"},
				"send -n -v -P -w tank/data/db@two":          {Out: "size\t7\n"},
				"send -n -v -P -t " + test.token:             {Out: "full\ttank/data/db@two\t5\n"},
			})
			res, err := r.SendDry(context.Background(), &rpc.SendReq{Filesystem: "db", To: recordedVersion(rpc.VersionSnapshot, "two", 34), ResumeToken: test.token})
			if err != nil || res.UsedResumeToken != test.used {
				t.Errorf("%+v, %v", res, err)
			}
		})
	}
}

func TestNothingIsSentIfItCannotBeToldWhetherItIsEncrypted(t *testing.T) {
	r := newRecorded(t, map[string]answer{
		guidOf + "tank/data/db@two":                  {Out: "34\n"},
		"get -H -p -o value encryption tank/data/db": {Err: "internal error: out of memory\n", Status: 1},
		"hold replicate tank/data/db@two":            {}, "release replicate tank/data/db@two": {},
		"send tank/data/db@two": {Out: "in clear"},
	})
	_, stream, err := r.Send(context.Background(), &rpc.SendReq{Filesystem: "db", To: recordedVersion(rpc.VersionSnapshot, "two", 34)})
	if err == nil {
		text, _ := readAll(t, stream)
		t.Fatalf("%q was sent", text)
	}
	if !strings.Contains(err.Error(), "out of memory") || !strings.Contains(err.Error(), `"db"`) {
		t.Error(err)
	}
}
