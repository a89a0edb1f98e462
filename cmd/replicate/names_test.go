package main

import (
	"strings"
	"testing"
)

func TestNamesThatLeaveTheFolderOrDeceiveAreRefused(t *testing.T) {
	for _, name := range []string{
		"", ".", "..", "...", ".hidden", ".x.0123456789abcdef.partial",
		"a/b", "/", "/etc", "../x", "a/../../b", `a\b`, `..\x`, `C:\x`,
		"a\x00b", "\x00", "a\nb", "a\rb", "a\tb", "a\x1b[2Jb", "a\x7fb", "a\u0085b", "a\u2028b", "a\u202etxt.exe", "a\u2066b",
		"\xff\xfe", "a\xc3", "\xc0\xae\xc0\xae", // not UTF-8, the last one an overlong ".."
		strings.Repeat("n", maxNameBytes+1), strings.Repeat("é", maxNameBytes/2+1),
	} {
		if err := checkName(name); err == nil {
			t.Errorf("name %q is allowed", name)
		}
		if name == storeItself {
			continue // as a path that is the store itself
		}
		for _, path := range []string{name, "a/" + name, name + "/b", "a/" + name + "/b"} {
			if name == "a/b" {
				continue // as a path it is good
			}
			if err := checkPath(path); err == nil {
				t.Errorf("path %q is allowed", path)
			}
		}
	}
	for _, path := range []string{"", "/", "a/", "/a", "a//b", "./a", "a/.", "a/./b", "..", "a/..", strings.Repeat("a/", maxPathBytes/2) + "a"} {
		if err := checkPath(path); err == nil {
			t.Errorf("path %q is allowed", path)
		}
	}
}

func TestOrdinaryNamesAreAllowed(t *testing.T) {
	for _, name := range []string{
		"a", "dump-2024-01-01.sql.gz", "a b", "ünïcødé", "日本", "a..b", "a.", "-n", "~", "*", "x@y#z%", `"quoted"`,
		strings.Repeat("n", maxNameBytes),
	} {
		if strings.ContainsAny(name, `*"`) || strings.HasSuffix(name, ".") {
			continue // not on Windows
		}
		if err := checkName(name); err != nil {
			t.Error(err)
		}
		if err := checkPath("x/" + name); err != nil {
			t.Error(err)
		}
	}
	if err := checkPath(storeItself); err != nil {
		t.Error(err)
	}
}

func TestWindowsNamesThatMeanSomethingElse(t *testing.T) {
	for _, name := range []string{"a:stream", "a.", "a ", "a?", "a*", `a"`, "a<b", "a>b", "a|b"} {
		if plainOnWindows(name) {
			t.Errorf("%q is plain", name)
		}
	}
	if !plainOnWindows("dump-1.sql") {
		t.Error("an ordinary name is refused")
	}
}

func TestThePartialFileOfTheLongestNameFits(t *testing.T) {
	name := strings.Repeat("n", maxNameBytes)
	partial := partialName(name, 7)
	if len(partial) != 255 || len(syncedName(name, 7)) > 255 {
		t.Errorf("%d and %d bytes", len(partial), len(syncedName(name, 7)))
	}
	if version, guid, ok := parsePartialName(partial); version != name || guid != 7 || !ok {
		t.Error("it is not read back")
	}
	for _, other := range []string{"", ".partial", ".x.partial", "x.0123456789abcdef.partial", ".x.0123456789abcde.partial",
		".x.0123456789abcdeg.partial", "..0123456789abcdef.partial", "...0123456789abcdef.partial", ".x.0123456789abcdef.synced"} {
		if _, _, ok := parsePartialName(other); ok {
			t.Errorf("%q is taken for a partial file", other)
		}
	}
}
