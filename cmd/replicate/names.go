package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"strings"
	"unicode"
	"unicode/utf8"
)

const (
	// maxNameBytes leaves room for what partialName puts around a version's name: most file systems end at 255 bytes.
	maxNameBytes = 255 - len(".") - len(".0123456789abcdef"+partialSuffix)
	// maxPathBytes stays well below the 4096 of Linux and the 1024 of others, the store's own path included.
	maxPathBytes = 768
)

// storeItself is the path of the filesystem that is the store's own folder.
const storeItself = "."

// checkPath tells what is wrong with a filesystem's path: names with slashes between them, or [storeItself].
func checkPath(path string) error { return checkPathOf(path, checkName) }

// checkPathOf is checkPath where what is wrong with a name is told by check.
func checkPathOf(path string, check func(name string) error) error {
	if path == storeItself {
		return nil
	}
	if len(path) > maxPathBytes {
		return fmt.Errorf("path of %d bytes: at most %d are allowed", len(path), maxPathBytes)
	}
	for name := range strings.SplitSeq(path, "/") {
		if err := check(name); err != nil {
			return fmt.Errorf("path %q: %w", path, err)
		}
	}
	return nil
}

// checkName tells what is wrong with the name of a version or of a folder. A name that passes names a file in its folder
// and nothing else, is not hidden, and does not deceive who reads it. Peers choose names, so this is a border.
func checkName(name string) error {
	switch {
	case name == "":
		return errors.New("a name is empty")
	case len(name) > maxNameBytes:
		return fmt.Errorf("a name has %d bytes: at most %d are allowed", len(name), maxNameBytes)
	case name[0] == '.': // ".", ".." and hidden names, partial files among them
		return fmt.Errorf("name %q begins with a dot", name)
	case !utf8.ValidString(name):
		return fmt.Errorf("name %q is not UTF-8", name)
	}
	for _, r := range name {
		if r == '/' || r == '\\' || unicode.IsControl(r) || deceives(r) {
			return fmt.Errorf("name %q has a %q", name, r)
		}
	}
	if runtime.GOOS == "windows" && !plainOnWindows(name) {
		return fmt.Errorf("name %q means something else on Windows", name)
	}
	return nil
}

// checkArgument is checkName for a name that is, or begins, an argument of a program: no option.
func checkArgument(name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	if name[0] == '-' {
		return fmt.Errorf("name %q begins with a hyphen", name)
	}
	return nil
}

// deceives tells whether the rune changes how the text around it reads: line breaks and those that turn the direction.
func deceives(r rune) bool {
	return r == '\u2028' || r == '\u2029' || unicode.Is(unicode.Bidi_Control, r)
}

// plainOnWindows tells whether the name is that of a file: not a device or a stream, and not one that Windows shortens.
func plainOnWindows(name string) bool {
	return !strings.ContainsAny(name, `<>:"|?*`) && !strings.HasSuffix(name, ".") && !strings.HasSuffix(name, " ") &&
		filepath.IsLocal(name)
}

// swapCase is the name with the case of its letters changed: another file, unless the file system ignores case.
func swapCase(name string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsUpper(r) {
			return unicode.ToLower(r)
		}
		return unicode.ToUpper(r)
	}, name)
}
