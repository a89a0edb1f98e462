package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"example.org/rpc"
)

var quiet = slog.New(slog.DiscardHandler)

// tempStore is a store in a folder of the test's.
func tempStore(t testing.TB) (*dirStore, string) {
	t.Helper()
	dir := t.TempDir()
	s, err := openDirStore(dir, quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s, dir
}

var epoch = time.Date(2024, 5, 6, 7, 8, 9, 123456789, time.UTC)

// put writes a version: age says how many hours after the epoch.
func put(t testing.TB, dir, file string, content []byte, age int) {
	t.Helper()
	file = filepath.Join(dir, filepath.FromSlash(file))
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, content, 0o644); err != nil {
		t.Fatal(err)
	}
	at := epoch.Add(time.Duration(age) * time.Hour)
	if err := os.Chtimes(file, at, at); err != nil {
		t.Fatal(err)
	}
}

// noise is n bytes that look random and are the same for the same n.
func noise(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16)}).Read(b)
	return b
}

func filesystems(t testing.TB, h rpc.Handler) []rpc.Filesystem {
	t.Helper()
	res, err := h.ListFilesystems(context.Background(), new(rpc.ListFilesystemReq))
	if err != nil {
		t.Fatal(err)
	}
	return res.Filesystems
}

func tokenOf(t testing.TB, h rpc.Handler, filesystem string) string {
	t.Helper()
	for _, f := range filesystems(t, h) {
		if f.Path == filesystem {
			return f.ResumeToken
		}
	}
	return ""
}

func versions(t testing.TB, h rpc.Handler, filesystem string) []rpc.FilesystemVersion {
	t.Helper()
	res, err := h.ListFilesystemVersions(context.Background(), &rpc.ListFilesystemVersionsReq{Filesystem: filesystem})
	if err != nil {
		t.Fatal(err)
	}
	return res.Versions
}

// sent is the whole stream of a request, as it would arrive.
func sent(t testing.TB, s Store, req *rpc.SendReq) []byte {
	t.Helper()
	res, stream, err := s.Send(context.Background(), req)
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	b, err := io.ReadAll(stream)
	if err != nil {
		t.Fatal(err)
	}
	if uint64(len(b)) != res.ExpectedSize {
		t.Errorf("%d bytes were sent, %d were expected", len(b), res.ExpectedSize)
	}
	return b
}

func receive(s Store, filesystem string, to rpc.FilesystemVersion, r io.Reader) error {
	_, err := s.Receive(context.Background(), &rpc.ReceiveReq{Filesystem: filesystem, To: &to}, r)
	return err
}

// tree is every file below a folder, with its content.
func tree(t testing.TB, dir string) map[string]string {
	t.Helper()
	found := make(map[string]string)
	err := filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		content, err := os.ReadFile(path)
		name, _ := filepath.Rel(dir, path)
		found[filepath.ToSlash(name)] = string(content)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func hiddenFiles(t testing.TB, dir string) []string {
	t.Helper()
	var hidden []string
	for name := range tree(t, dir) {
		if strings.HasPrefix(filepath.Base(name), ".") {
			hidden = append(hidden, name)
		}
	}
	slices.Sort(hidden)
	return hidden
}

func TestListShowsFoldersWithFilesAndNothingHidden(t *testing.T) {
	s, dir := tempStore(t)
	put(t, dir, "db/one/b", noise(10), 2)
	put(t, dir, "db/one/a", noise(10), 1)
	put(t, dir, "db/one/.being-written", noise(10), 3)
	put(t, dir, ".hidden/x", noise(10), 3)
	put(t, dir, "img/z", noise(10), 1)
	os.Mkdir(filepath.Join(dir, "empty"), 0o755)
	if err := os.Symlink("db", filepath.Join(dir, "link")); err != nil && runtime.GOOS != "windows" {
		t.Fatal(err)
	}
	var got []string
	for _, f := range filesystems(t, s) {
		got = append(got, fmt.Sprint(f.Path, " ", f.IsPlaceholder))
	}
	want := []string{"db true", "db/one false", "empty true", "img false"}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	list := versions(t, s, "db/one")
	if len(list) != 2 || list[0].Name != "a" || list[1].Name != "b" || list[0].CreateTXG >= list[1].CreateTXG {
		t.Errorf("versions are %v", list)
	}
	if want := epoch.Add(time.Hour); !list[0].Creation.Equal(want) && runtime.GOOS != "windows" {
		t.Errorf("creation is %v, want %v", list[0].Creation, want)
	}
}

func TestTheStoresOwnFolderIsAFilesystemIfItHasFiles(t *testing.T) {
	s, dir := tempStore(t)
	if got := filesystems(t, s); len(got) != 0 {
		t.Errorf("an empty store has %v", got)
	}
	put(t, dir, "dump", noise(10), 1)
	if got := filesystems(t, s); len(got) != 1 || got[0].Path != storeItself || got[0].IsPlaceholder {
		t.Errorf("got %v", got)
	}
	if got := versions(t, s, storeItself); len(got) != 1 {
		t.Errorf("got %v", got)
	}
}

func TestGUIDChangesWithNameSizeAndTimeOnly(t *testing.T) {
	s, dir := tempStore(t)
	put(t, dir, "f/a", []byte("12345"), 1)
	put(t, dir, "g/a", []byte("54321"), 1) // equal in all three
	put(t, dir, "h/b", []byte("12345"), 1)
	put(t, dir, "i/a", []byte("123456"), 1)
	put(t, dir, "j/a", []byte("12345"), 2)
	guid := func(filesystem string) uint64 { return versions(t, s, filesystem)[0].GUID }
	if guid("f") != guid("g") {
		t.Error("the GUID depends on more than name, size and time")
	}
	for _, other := range []string{"h", "i", "j"} {
		if guid("f") == guid(other) {
			t.Errorf("%s has the GUID of f", other)
		}
	}
	if a, b := versionGUID("a", 1, epoch), versionGUID("a", 1, epoch.Truncate(time.Microsecond)); a != b {
		t.Error("nanoseconds count, which not every file system keeps")
	}
}

func TestReceivedVersionIsTheSame(t *testing.T) {
	source, sourceDir := tempStore(t)
	sink, sinkDir := tempStore(t)
	for i, n := range []int{0, 1, 67, 100_000} {
		put(t, sourceDir, fmt.Sprintf("deep/er/v%d", i), noise(n), i)
	}
	for _, v := range versions(t, source, "deep/er") {
		stream := sent(t, source, &rpc.SendReq{Filesystem: "deep/er", To: &v})
		if err := receive(sink, "deep/er", v, iotest.OneByteReader(bytes.NewReader(stream))); err != nil {
			t.Fatal(err)
		}
	}
	equal := func(a, b rpc.FilesystemVersion) bool {
		return a.GUID == b.GUID && a.Creation.Equal(b.Creation) && a.Name == b.Name
	}
	if a, b := versions(t, source, "deep/er"), versions(t, sink, "deep/er"); !slices.EqualFunc(a, b, equal) {
		t.Errorf("source %v, sink %v", a, b)
	}
	if a, b := tree(t, sourceDir), tree(t, sinkDir); fmt.Sprint(a) != fmt.Sprint(b) {
		t.Error("content differs, or something was left behind:", hiddenFiles(t, sinkDir))
	}
}

// one is a source with one version in one filesystem, "f", and its stream.
func one(t testing.TB, n int) (source *dirStore, v rpc.FilesystemVersion, stream []byte) {
	t.Helper()
	source, dir := tempStore(t)
	put(t, dir, "f/v", noise(n), 1)
	v = versions(t, source, "f")[0]
	return source, v, sent(t, source, &rpc.SendReq{Filesystem: "f", To: &v})
}

var errCut = errors.New("the cable was cut")

// cut is the first n bytes of a stream and then an error.
func cut(stream []byte, n int) io.Reader {
	return io.MultiReader(bytes.NewReader(stream[:n]), iotest.ErrReader(errCut))
}

func TestBrokenStreamIsNeverAVersionAndIsResumed(t *testing.T) {
	const n = 50_000
	source, v, stream := one(t, n)
	head := len(stream) - n
	for _, at := range []int{0, 1, head - 1, head, head + 1, head + n/2, len(stream) - 1, len(stream)} {
		t.Run(fmt.Sprint(at), func(t *testing.T) {
			sink, dir := tempStore(t)
			err := receive(sink, "f", v, cut(stream, at))
			if !errors.Is(err, errCut) {
				t.Fatalf("error is %v", err)
			}
			if got := versions(t, sink, "f"); len(got) != 0 {
				t.Fatalf("there is a version: %v", got)
			}
			token := tokenOf(t, sink, "f")
			if at <= head {
				if hidden := hiddenFiles(t, dir); token != "" || len(hidden) > 0 {
					t.Fatalf("nothing arrived, but there are token %q and files %q", token, hidden)
				}
				return
			}
			point, err := sink.ParseResumeToken(token)
			if err != nil || point != (ResumePoint{Name: "v", GUID: v.GUID, Offset: uint64(at - head)}) {
				t.Fatalf("resume point %v, %v", point, err)
			}
			rest := sent(t, source, &rpc.SendReq{Filesystem: "f", To: &v, ResumeToken: token})
			if len(rest) != head+n-(at-head) {
				t.Errorf("%d bytes are sent for the rest", len(rest))
			}
			if err := receive(sink, "f", v, bytes.NewReader(rest)); err != nil {
				t.Fatal(err)
			}
			if got := tree(t, dir); len(got) != 1 || got["f/v"] != string(noise(n)) {
				t.Error("content differs, or something was left behind:", hiddenFiles(t, dir))
			}
		})
	}
}

func TestStreamThatEndsEarlyWithoutAnErrorIsNoVersion(t *testing.T) {
	_, v, stream := one(t, 1000)
	sink, _ := tempStore(t)
	for _, at := range []int{0, 10, len(stream) - 1} {
		if err := receive(sink, "f", v, bytes.NewReader(stream[:at])); err == nil {
			t.Errorf("%d bytes were taken for the whole", at)
		}
		if got := versions(t, sink, "f"); len(got) != 0 {
			t.Errorf("there is a version: %v", got)
		}
	}
}

func TestStreamThatIsTooLongIsNoVersionAndLeavesNothing(t *testing.T) {
	_, v, stream := one(t, 1000)
	sink, dir := tempStore(t)
	err := receive(sink, "f", v, bytes.NewReader(append(stream, 'x')))
	if rpc.CodeOf(err) != rpc.DataLoss {
		t.Errorf("error is %v", err)
	}
	if got := tree(t, dir); len(got) != 0 {
		t.Errorf("there is %q", hiddenFiles(t, dir))
	}
}

func TestCrashLosesAtMostWhatWasNotSynced(t *testing.T) {
	const n = 50_000
	source, v, stream := one(t, n)
	head := len(stream) - n
	partial, note := partialName("v", v.GUID), syncedName("v", v.GUID)
	for name, test := range map[string]struct {
		files map[string]string
		want  uint64
	}{
		"partial without a note":    {map[string]string{partial: string(stream[head:40_000])}, 0},
		"note behind the partial":   {map[string]string{partial: string(noise(n)[:30_000]), note: "20000\n"}, 20_000},
		"note ahead of the partial": {map[string]string{partial: string(noise(n)[:10_000]), note: "20000\n"}, 10_000},
		"empty note":                {map[string]string{partial: string(noise(n)[:10_000]), note: ""}, 0},
		"torn note":                 {map[string]string{partial: string(noise(n)[:10_000]), note: "00\x00\x00"}, 0},
		"negative note":             {map[string]string{partial: string(noise(n)[:10_000]), note: "-5"}, 0},
		"note without a partial":    {map[string]string{note: "20000\n"}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			sink, dir := tempStore(t)
			for file, content := range test.files {
				put(t, dir, "f/"+file, []byte(content), 1)
			}
			token := tokenOf(t, sink, "f")
			var point ResumePoint
			if token != "" {
				var err error
				if point, err = sink.ParseResumeToken(token); err != nil {
					t.Fatal(err)
				}
			}
			if point.Offset != test.want {
				t.Errorf("resumed at %d, want %d", point.Offset, test.want)
			}
			rest := sent(t, source, &rpc.SendReq{Filesystem: "f", To: &v, ResumeToken: token})
			if err := receive(sink, "f", v, bytes.NewReader(rest)); err != nil {
				t.Fatal(err)
			}
			if got := tree(t, dir); len(got) != 1 || got["f/v"] != string(noise(n)) {
				t.Error("content differs, or something was left behind:", hiddenFiles(t, dir))
			}
		})
	}
}

func TestStreamThatDoesNotFitBehindThePartialIsRefused(t *testing.T) {
	const n = 5000
	source, v, stream := one(t, n)
	head := len(stream) - n
	sink, dir := tempStore(t)
	if err := receive(sink, "f", v, cut(stream, head+1000)); !errors.Is(err, errCut) {
		t.Fatal(err)
	}
	// A stream from further back would throw away what arrived after the sender looked.
	for _, offset := range []uint64{0, 1, 999, 1001, n} {
		var token string
		if offset > 0 {
			token = resumeToken(ResumePoint{Name: "v", GUID: v.GUID, Offset: offset})
		}
		err := receive(sink, "f", v, bytes.NewReader(sent(t, source, &rpc.SendReq{Filesystem: "f", To: &v, ResumeToken: token})))
		if rpc.CodeOf(err) != rpc.Aborted {
			t.Errorf("from byte %d: %v", offset, err)
		}
	}
	rest := sent(t, source, &rpc.SendReq{Filesystem: "f", ResumeToken: tokenOf(t, sink, "f")})
	if err := receive(sink, "f", v, bytes.NewReader(rest)); err != nil {
		t.Fatal(err)
	}
	if got := tree(t, dir); len(got) != 1 || got["f/v"] != string(noise(n)) {
		t.Error("content differs, or something was left behind")
	}
}

func TestClearResumeTokenDropsWhatArrived(t *testing.T) {
	_, v, stream := one(t, 5000)
	sink, dir := tempStore(t)
	if err := receive(sink, "f", v, cut(stream, 2000)); !errors.Is(err, errCut) {
		t.Fatal(err)
	}
	put(t, dir, "f/"+partialName("other", 77), noise(10), 1)
	put(t, dir, "f/.not-ours", noise(10), 1)
	_, err := sink.Receive(context.Background(), &rpc.ReceiveReq{Filesystem: "f", To: &v, ClearResumeToken: true}, bytes.NewReader(stream))
	if err != nil {
		t.Fatal(err)
	}
	if got := hiddenFiles(t, dir); !slices.Equal(got, []string{"f/.not-ours"}) {
		t.Errorf("hidden files are %q", got)
	}
}

func TestNothingIsOverwritten(t *testing.T) {
	_, v, stream := one(t, 5000)
	for name, prepare := range map[string]func(t *testing.T, dir string){
		"by the same":  func(t *testing.T, dir string) { put(t, dir, "f/v", noise(5000), 1) },
		"by another":   func(t *testing.T, dir string) { put(t, dir, "f/v", noise(9), 9) },
		"by a folder":  func(t *testing.T, dir string) { put(t, dir, "f/v/w", noise(9), 9) },
		"by a symlink": func(t *testing.T, dir string) { os.Mkdir(filepath.Join(dir, "f"), 0o755); symlink(t, "x", dir, "f/v") },
	} {
		t.Run(name, func(t *testing.T) {
			sink, dir := tempStore(t)
			prepare(t, dir)
			before, _ := os.ReadFile(filepath.Join(dir, "f", "v"))
			err := receive(sink, "f", v, bytes.NewReader(stream))
			want := rpc.AlreadyExists
			if name == "by the same" {
				want = rpc.Aborted // listing again helps
			}
			if rpc.CodeOf(err) != want {
				t.Errorf("error is %v", err)
			}
			after, _ := os.ReadFile(filepath.Join(dir, "f", "v"))
			if !bytes.Equal(before, after) || len(hiddenFiles(t, dir)) > 0 {
				t.Error("something changed")
			}
		})
	}
	t.Run("by what came meanwhile", func(t *testing.T) {
		sink, dir := tempStore(t)
		late := io.MultiReader(bytes.NewReader(stream), readerFunc(func([]byte) (int, error) {
			put(t, dir, "f/v", []byte("mine"), 5)
			return 0, io.EOF
		}))
		if err := receive(sink, "f", v, late); rpc.CodeOf(err) != rpc.AlreadyExists {
			t.Errorf("error is %v", err)
		}
		if got := tree(t, dir); len(got) != 1 || got["f/v"] != "mine" {
			t.Errorf("there is %v", got)
		}
	})
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func symlink(t testing.TB, target, dir, name string) {
	t.Helper()
	if err := os.Symlink(target, filepath.Join(dir, filepath.FromSlash(name))); err != nil {
		t.Skip("no symbolic links:", err)
	}
}

func TestConcurrentReceiveIsRefused(t *testing.T) {
	_, v, stream := one(t, 5000)
	sink, dir := tempStore(t)
	other, err := sink.Sub("elsewhere")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	head := len(stream) - 5000
	inside := io.MultiReader(bytes.NewReader(stream[:head+100]), readerFunc(func([]byte) (int, error) {
		if err := receive(sink, "f", v, bytes.NewReader(stream)); rpc.CodeOf(err) != rpc.Aborted {
			t.Errorf("a second transfer got %v", err)
		}
		if err := receive(other, "f", v, bytes.NewReader(stream)); err != nil {
			t.Errorf("a transfer to another client's folder got %v", err)
		}
		return 0, io.EOF
	}), bytes.NewReader(stream[head+100:]))
	if err := receive(sink, "f", v, inside); err != nil {
		t.Fatal(err)
	}
	if got := tree(t, dir); len(got) != 2 || got["f/v"] != string(noise(5000)) || got["elsewhere/f/v"] != string(noise(5000)) {
		t.Error("content differs, or something was left behind")
	}
	again := v
	again.Name, again.GUID = "w", versionGUID("w", 0, v.Creation)
	empty := streamHeader{guid: again.GUID}.encode()
	if err := receive(sink, "f", again, bytes.NewReader(empty)); err != nil {
		t.Errorf("after the first transfer the filesystem is still reserved: %v", err)
	}
}

func TestOtherProcessReceivingIsNoticed(t *testing.T) {
	_, v, stream := one(t, 5000)
	sink, dir := tempStore(t)
	os.Mkdir(filepath.Join(dir, "f"), 0o755)
	folder, err := sink.folder("f", mustExist)
	if err != nil {
		t.Fatal(err)
	}
	defer folder.Close()
	lock, err := lockFolder(folder) // as another process would: the lock is that of the open folder
	if err != nil {
		t.Fatal(err)
	}
	if again, err := lockFolder(folder); err == nil {
		again.Close()
		lock.Close()
		t.Skip("there is no such lock on this system")
	}
	if err := receive(sink, "f", v, bytes.NewReader(stream)); rpc.CodeOf(err) != rpc.Aborted {
		t.Errorf("error is %v", err)
	}
	// A child that still works on the folder has the lock, though who started it is gone.
	become(t, "reader")
	in, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	child, err := startChild(os.Args[0], []string{"-1", "0", filepath.Join(t.TempDir(), "notes")}, in, nil, lock)
	if err != nil {
		t.Fatal(err)
	}
	lock.Close()
	if err := receive(sink, "f", v, bytes.NewReader(stream)); rpc.CodeOf(err) != rpc.Aborted {
		t.Errorf("error is %v", err)
	}
	w.Close()
	if err := child.wait(); err != nil {
		t.Error(err)
	}
	if err := receive(sink, "f", v, bytes.NewReader(stream)); err != nil {
		t.Error(err)
	}
}

func TestNameThatDiffersOnlyInCaseNeverReachesAnotherFile(t *testing.T) {
	sink, dir := tempStore(t)
	put(t, dir, "f/DUMP", []byte("upper"), 1)
	folder, err := sink.folder("f", mustExist)
	if err != nil {
		t.Fatal(err)
	}
	defer folder.Close()
	// A file system that ignores case would give this for "dump".
	info, err := folder.Lstat("DUMP")
	if err != nil {
		t.Fatal(err)
	}
	if err := checkSpelling(folder, "dump", info); rpc.CodeOf(err) != rpc.AlreadyExists {
		t.Errorf("error is %v", err)
	}
	if err := checkSpelling(folder, "DUMP", info); err != nil {
		t.Error(err)
	}
	// And what this one does, whatever that is, must leave the file as it was.
	to := rpc.FilesystemVersion{Name: "dump", GUID: versionGUID("dump", 5, epoch), Creation: epoch}
	err = receive(sink, "f", to, bytes.NewReader(append(streamHeader{guid: to.GUID, size: 5}.encode(), "lower"...)))
	got, _ := os.ReadFile(filepath.Join(dir, "f", "DUMP"))
	if string(got) != "upper" || err == nil && len(versions(t, sink, "f")) != 2 {
		t.Errorf("the file is %q, error %v", got, err)
	}
}

// attacks are paths and names that a peer has no business with.
var attacks = []string{"", "..", "../x", "x/../../y", "/etc/passwd", "/", "x//y", "x/", `..\x`, `C:\x`, "x\x00y", "x\ny", ".", ".hidden",
	"x/.hidden", "x/..", "\xff", strings.Repeat("x", 256), strings.Repeat("x/", 400) + "x"}

func TestPeersCannotNameWhatIsNotInTheStore(t *testing.T) {
	ctx := context.Background()
	outside := t.TempDir()
	put(t, outside, "secret", noise(10), 1)
	put(t, outside, "x/secret", noise(10), 1)
	dir := filepath.Join(outside, "store")
	os.Mkdir(dir, 0o755)
	put(t, dir, "f/v", noise(10), 1)
	s, err := openDirStore(dir, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	v := versions(t, s, "f")[0]
	before := tree(t, outside)
	for _, bad := range attacks {
		named := rpc.FilesystemVersion{Name: bad, GUID: versionGUID(bad, 0, v.Creation), Creation: v.Creation}
		empty := streamHeader{guid: named.GUID}.encode()
		if bad != storeItself { // which is the store's own folder
			if _, err := s.ListFilesystemVersions(ctx, &rpc.ListFilesystemVersionsReq{Filesystem: bad}); rpc.CodeOf(err) != rpc.InvalidArgument {
				t.Errorf("list %q: %v", bad, err)
			}
			if _, _, err := s.Send(ctx, &rpc.SendReq{Filesystem: bad, To: &v}); rpc.CodeOf(err) != rpc.InvalidArgument {
				t.Errorf("send from %q: %v", bad, err)
			}
			if err := receive(s, bad, v, bytes.NewReader(nil)); rpc.CodeOf(err) != rpc.InvalidArgument {
				t.Errorf("receive to %q: %v", bad, err)
			}
		}
		if strings.Contains(bad, "/") || bad == storeItself || checkPath(bad) != nil {
			if err := receive(s, "f", named, bytes.NewReader(empty)); rpc.CodeOf(err) != rpc.InvalidArgument {
				t.Errorf("receive version %q: %v", bad, err)
			}
			if _, _, err := s.Send(ctx, &rpc.SendReq{Filesystem: "f", To: &named}); rpc.CodeOf(err) != rpc.InvalidArgument {
				t.Errorf("send version %q: %v", bad, err)
			}
			token := resumeToken(ResumePoint{Name: bad, GUID: v.GUID, Offset: 1})
			if _, _, err := s.Send(ctx, &rpc.SendReq{Filesystem: "f", ResumeToken: token}); rpc.CodeOf(err) != rpc.InvalidArgument {
				t.Errorf("send with token %q: %v", token, err)
			}
			if _, err := s.Sub(bad); err == nil {
				t.Errorf("there is a folder for client %q", bad)
			}
		}
	}
	if after := tree(t, outside); fmt.Sprint(before) != fmt.Sprint(after) {
		t.Errorf("there is %v, there was %v", after, before)
	}
}

func TestSymbolicLinksAreNotFollowed(t *testing.T) {
	ctx := context.Background()
	s, dir := tempStore(t)
	outside := t.TempDir()
	put(t, outside, "v", noise(10), 1)
	put(t, dir, "f/v", noise(10), 1)
	symlink(t, outside, dir, "out")
	symlink(t, "f", dir, "inside")
	symlink(t, filepath.Join(outside, "v"), dir, "f/link-out")
	symlink(t, "v", dir, "f/link-in")
	v := versions(t, s, "f")[0]
	for _, path := range []string{"out", "inside", "out/x"} {
		if _, err := s.ListFilesystemVersions(ctx, &rpc.ListFilesystemVersionsReq{Filesystem: path}); err == nil {
			t.Errorf("%s can be listed", path)
		}
		if _, _, err := s.Send(ctx, &rpc.SendReq{Filesystem: path, To: &v}); err == nil {
			t.Errorf("%s can be read", path)
		}
		w := rpc.FilesystemVersion{Name: "w", GUID: versionGUID("w", 0, epoch), Creation: epoch}
		if err := receive(s, path, w, bytes.NewReader(streamHeader{guid: w.GUID}.encode())); err == nil {
			t.Errorf("%s can be written to", path)
		}
	}
	if _, err := s.Sub("inside"); err == nil {
		t.Error("a client can have another's folder")
	}
	for _, name := range []string{"link-out", "link-in"} {
		to := rpc.FilesystemVersion{Name: name, GUID: versionGUID(name, 10, v.Creation), Creation: v.Creation}
		if _, _, err := s.Send(ctx, &rpc.SendReq{Filesystem: "f", To: &to}); rpc.CodeOf(err) != rpc.NotFound {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got := versions(t, s, "f"); len(got) != 1 {
		t.Errorf("links are listed: %v", got)
	}
	// A link in place of the partial file must not be written through.
	to := rpc.FilesystemVersion{Name: "p", GUID: versionGUID("p", 3, epoch), Creation: epoch}
	symlink(t, filepath.Join(outside, "v"), dir, "f/"+partialName("p", to.GUID))
	receive(s, "f", to, bytes.NewReader(append(streamHeader{guid: to.GUID, size: 3}.encode(), "abc"...)))
	if got, _ := os.ReadFile(filepath.Join(outside, "v")); !bytes.Equal(got, noise(10)) {
		t.Error("a file outside was written to")
	}
}

func TestReceiveRefusesWhatTheVersionCannotBe(t *testing.T) {
	_, v, stream := one(t, 100)
	head := len(stream) - 100
	edit := func(f func(*rpc.FilesystemVersion)) rpc.FilesystemVersion {
		w := v
		f(&w)
		return w
	}
	header := func(s string) []byte { return append([]byte(s), make([]byte, 200)...) }
	for name, test := range map[string]struct {
		to     rpc.FilesystemVersion
		stream []byte
	}{
		"another GUID":     {edit(func(w *rpc.FilesystemVersion) { w.GUID++ }), stream},
		"another name":     {edit(func(w *rpc.FilesystemVersion) { w.Name = "w" }), stream},
		"another time":     {edit(func(w *rpc.FilesystemVersion) { w.Creation = w.Creation.Add(time.Second) }), stream},
		"no time":          {edit(func(w *rpc.FilesystemVersion) { w.Creation = time.Time{} }), stream},
		"bookmark":         {edit(func(w *rpc.FilesystemVersion) { w.Type = rpc.VersionBookmark }), stream},
		"another size":     {v, append(streamHeader{guid: v.GUID, size: 101}.encode(), stream[head:]...)},
		"offset past size": {v, streamHeader{guid: v.GUID, offset: 101, size: 100}.encode()},
		"negative size":    {v, streamHeader{guid: v.GUID, size: -1}.encode()},
		"a ZFS stream":     {v, header("\x00\x00\x00\x00\xac\xcb\xba\xf5\x02\x00\x00\x00")},
		"another format":   {v, header("replicate-dir 2 ")},
		"no numbers":       {v, header("replicate-dir 1 +123456789abcdef +123456789abcdef +123456789abcdef\n")},
	} {
		sink, dir := tempStore(t)
		if err := receive(sink, "f", test.to, bytes.NewReader(test.stream)); rpc.CodeOf(err) != rpc.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
		if got := tree(t, dir); len(got) != 0 {
			t.Errorf("%s: there is %v", name, got)
		}
	}
	sink, _ := tempStore(t)
	if _, err := sink.Receive(context.Background(), &rpc.ReceiveReq{Filesystem: "f"}, bytes.NewReader(stream)); rpc.CodeOf(err) != rpc.InvalidArgument {
		t.Errorf("no version: %v", err)
	}
}

func TestSendRefusesWhatIsNotThereAnyMore(t *testing.T) {
	s, dir := tempStore(t)
	put(t, dir, "f/v", noise(100), 1)
	v := versions(t, s, "f")[0]
	gone := v
	gone.GUID++
	for name, test := range map[string]struct {
		req  rpc.SendReq
		code rpc.Code
	}{
		"nothing asked for":  {rpc.SendReq{Filesystem: "f"}, rpc.InvalidArgument},
		"another filesystem": {rpc.SendReq{Filesystem: "g", To: &v}, rpc.NotFound},
		"another GUID":       {rpc.SendReq{Filesystem: "f", To: &gone}, rpc.NotFound},
		"another's token":    {rpc.SendReq{Filesystem: "f", To: &v, ResumeToken: resumeToken(ResumePoint{Name: "v", GUID: v.GUID + 1, Offset: 1})}, rpc.InvalidArgument},
		"token of no version": {rpc.SendReq{Filesystem: "f", ResumeToken: resumeToken(ResumePoint{Name: "w", GUID: v.GUID, Offset: 1})},
			rpc.NotFound},
		"offset past the end": {rpc.SendReq{Filesystem: "f", To: &v, ResumeToken: resumeToken(ResumePoint{Name: "v", GUID: v.GUID, Offset: 101})}, rpc.OutOfRange},
		"offset past 63 bits": {rpc.SendReq{Filesystem: "f", To: &v, ResumeToken: resumeToken(ResumePoint{Name: "v", GUID: v.GUID, Offset: 1 << 63})}, rpc.InvalidArgument},
		"a ZFS token":         {rpc.SendReq{Filesystem: "f", To: &v, ResumeToken: "1-e604ea4bf-e0-789c"}, rpc.InvalidArgument},
	} {
		if _, stream, err := s.Send(context.Background(), &test.req); rpc.CodeOf(err) != test.code || stream != nil {
			t.Errorf("%s: %v, %v", name, stream, err)
		}
		if _, err := s.SendDry(context.Background(), &test.req); rpc.CodeOf(err) != test.code {
			t.Errorf("%s, dry: %v", name, err)
		}
	}
}

func TestVersionThatChangesWhileItIsSentFails(t *testing.T) {
	for name, change := range map[string]func(t *testing.T, dir, file string){
		"shorter": func(t *testing.T, dir, file string) { os.Truncate(file, 50) },
		"longer":  func(t *testing.T, dir, file string) { put(t, dir, "f/v", noise(200), 1) },
		"rewritten": func(t *testing.T, dir, file string) {
			put(t, dir, "f/v", noise(100), 2)
		},
	} {
		s, dir := tempStore(t)
		put(t, dir, "f/v", noise(100), 1)
		v := versions(t, s, "f")[0]
		_, stream, err := s.Send(context.Background(), &rpc.SendReq{Filesystem: "f", To: &v})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(stream, make([]byte, streamHeaderLen+10)); err != nil {
			t.Fatal(err)
		}
		change(t, dir, filepath.Join(dir, "f", "v"))
		if _, err := io.ReadAll(stream); rpc.CodeOf(err) != rpc.FailedPrecondition {
			t.Errorf("%s: %v", name, err)
		}
		stream.Close()
	}
}

func TestVersionStreamIsAProperReader(t *testing.T) {
	s, dir := tempStore(t)
	put(t, dir, "f/v", noise(3000), 1)
	v := versions(t, s, "f")[0]
	want := sent(t, s, &rpc.SendReq{Filesystem: "f", To: &v})
	_, stream, err := s.Send(context.Background(), &rpc.SendReq{Filesystem: "f", To: &v})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if err := iotest.TestReader(stream, want); err != nil {
		t.Error(err)
	}
}

func TestResumeTokenKeepsEveryName(t *testing.T) {
	for _, name := range []string{"v", "a:b:c", "with space", "日本", strings.Repeat("n", maxNameBytes)} {
		want := ResumePoint{Name: name, GUID: 1<<64 - 1, Offset: 1<<63 - 1}
		if got, err := parseDirToken(resumeToken(want)); got != want || err != nil {
			t.Errorf("%v, %v, want %v", got, err, want)
		}
	}
	for _, bad := range []string{"", "dir1", "dir1:0:0", "dir1:x:0:v", "dir1:0:-1:v", "dir1:0:x:v", "dir2:0:0:v", "dir1:0:0:", "dir1:0:0:../v"} {
		if _, err := parseDirToken(bad); err == nil {
			t.Errorf("%q is a token", bad)
		}
	}
}

func TestMissingFolderOfAStoreIsNotMade(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk-is-not-mounted")
	if _, err := openStore("dir:"+path, quiet); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("error is %v", err)
	}
	if exists(path) {
		t.Error("it was made")
	}
}
