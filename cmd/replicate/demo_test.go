package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// tempIs makes dir the place of temporary folders.
func tempIs(t *testing.T, dir string) {
	for _, name := range []string{"TMPDIR", "TMP", "TEMP"} {
		t.Setenv(name, dir)
	}
}

func empty(t *testing.T, dir string) bool {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return len(entries) == 0
}

func TestDemoVerifiesAndLeavesNothing(t *testing.T) {
	dir, temp := t.TempDir(), t.TempDir()
	tempIs(t, temp)
	put(t, dir, "db/one", noise(2_000_000), 1)
	put(t, dir, "db/two", noise(3_000_000), 2)
	put(t, dir, "db/empty", nil, 3)
	put(t, dir, "top", noise(100), 1)
	before := sums(t, dir)
	out := mustRun(t, "demo", dir)
	if !strings.HasSuffix(out, "\nverified\n") || !strings.Contains(out, "killed") || !strings.Contains(out, "did not have to be sent again") {
		t.Errorf("it says\n%s", out)
	}
	if !empty(t, temp) {
		t.Error("the temporary folder is still there")
	}
	after := sums(t, dir)
	for name := range before {
		if before[name] != after[name] {
			t.Errorf("%s changed", name)
		}
	}
}

func TestDemoOfNothingFails(t *testing.T) {
	temp := t.TempDir()
	tempIs(t, temp)
	for _, dir := range []string{t.TempDir(), filepath.Join(t.TempDir(), "missing")} {
		status, out, stderr := runArgs("demo", dir)
		if status != statusFailed || strings.Contains(out, "verified") || stderr == "" {
			t.Errorf("status %d, %q, %q", status, out, stderr)
		}
	}
	if !empty(t, temp) {
		t.Error("the temporary folder is still there")
	}
}

func TestInterruptedDemoLeavesNothing(t *testing.T) {
	dir, temp := t.TempDir(), t.TempDir()
	tempIs(t, temp)
	put(t, dir, "f/v", noise(1000), 1)
	for _, when := range []string{"made", "pushing", "killed", "pushed", "pulled"} {
		ctx, cancel := context.WithCancel(context.Background())
		var out strings.Builder
		status := run(ctx, []string{"demo", dir}, writerFunc(func(p []byte) (int, error) {
			if strings.HasPrefix(string(p), when) {
				cancel()
			}
			return out.Write(p)
		}), &out)
		cancel()
		if status != statusFailed || strings.Contains(out.String(), "verified") {
			t.Errorf("interrupted when it had %s: status %d\n%s", when, status, out.String())
		}
		if !empty(t, temp) {
			t.Errorf("interrupted when it had %s: the temporary folder is still there", when)
		}
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func TestDemoNoticesADifferingByte(t *testing.T) {
	source, dir := tempStore(t)
	put(t, dir, "f/v", noise(1000), 1)
	temp := t.TempDir()
	put(t, temp, "copy/f/v", append(noise(999), 'x'), 1)
	var out strings.Builder
	d := &demo{output: output{&out, &out}, dir: temp, source: source, log: quiet}
	if err := d.compare(context.Background(), 1); err == nil || !strings.Contains(err.Error(), "SHA-256") {
		t.Errorf("error is %v", err)
	}
	put(t, temp, "copy/f/v", noise(1000), 1)
	if err := d.compare(context.Background(), 1); err != nil {
		t.Error(err)
	}
	if err := d.compare(context.Background(), 2); err == nil {
		t.Error("a missing version is not noticed")
	}
}

func TestDemoMakesTheFilesThatItPromises(t *testing.T) {
	const size = demoBytes / 64
	dir := t.TempDir()
	if err := makeSource(context.Background(), dir, size); err != nil {
		t.Fatal(err)
	}
	s, err := openDirStore(dir, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var total int64
	names := 0
	for _, f := range filesystems(t, s) {
		if f.IsPlaceholder {
			t.Errorf("%s is empty", f.Path)
		}
		names++
		if got := versions(t, s, f.Path); len(got) != demoVersions {
			t.Errorf("%s has %d versions", f.Path, len(got))
		} else if got[0].Name != "version-1" || got[2].Name != "version-3" {
			t.Errorf("%s is in the order %v", f.Path, got)
		}
	}
	for _, content := range tree(t, dir) {
		total += int64(len(content))
	}
	if names != demoFilesystems || total != size {
		t.Errorf("%d filesystems with %d bytes", names, total)
	}
}
