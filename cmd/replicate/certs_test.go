package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// runArgs runs the program and returns its exit status and what it wrote.
func runArgs(args ...string) (status int, stdout, stderr string) {
	return runContext(context.Background(), args...)
}

func runContext(ctx context.Context, args ...string) (status int, stdout, stderr string) {
	var out, err bytes.Buffer
	status = run(ctx, args, &out, &err)
	return status, out.String(), err.String()
}

// mustRun is runArgs for what must succeed; it returns stdout.
func mustRun(t testing.TB, args ...string) string {
	t.Helper()
	status, stdout, stderr := runArgs(args...)
	if status != statusDone {
		t.Fatalf("replicate %q: status %d\n%s%s", args, status, stdout, stderr)
	}
	return stdout
}

func leaf(t testing.TB, dir, name string) *x509.Certificate {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key"))
	if err != nil {
		t.Fatal(err)
	}
	return pair.Leaf
}

func TestCertsServeBothSidesAndVerify(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tls")
	mustRun(t, "certs", "-dir", dir, "server", "db7.example", "192.0.2.7")
	ca, err := readCert(filepath.Join(dir, "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	for _, name := range []string{"server", "db7.example", "192.0.2.7"} {
		cert := leaf(t, dir, name)
		if cert.Subject.CommonName != name {
			t.Errorf("%s has the common name %q", name, cert.Subject.CommonName)
		}
		for _, host := range []string{name, "localhost", "127.0.0.1", "::1"} {
			if err := cert.VerifyHostname(host); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
			if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if cert.IsCA {
			t.Errorf("%s is a CA", name)
		}
	}
	for _, file := range []string{"ca.key", "server.key"} {
		info, err := os.Stat(filepath.Join(dir, file))
		if err != nil {
			t.Fatal(err)
		}
		if mode := info.Mode().Perm(); mode != 0o600 && runtime.GOOS != "windows" {
			t.Errorf("%s has mode %o", file, mode)
		}
	}
}

func TestCertsRenewsAndSaysSoAndKeepsCAAndKeys(t *testing.T) {
	dir := t.TempDir()
	mustRun(t, "certs", "-dir", dir, "-days", "5", "a", "b")
	before, first, other := tree(t, dir), leaf(t, dir, "a"), leaf(t, dir, "b")
	out := mustRun(t, "certs", "-dir", dir, "-days", "9", "a")
	if !strings.Contains(out, "renewed") || !strings.Contains(out, first.NotAfter.Format(time.DateOnly)) {
		t.Errorf("it says %q", out)
	}
	after := tree(t, dir)
	for name := range before {
		if changed := before[name] != after[name]; changed != (name == "a.crt") {
			t.Errorf("%s changed: %v", name, changed)
		}
	}
	if len(after) != len(before) {
		t.Errorf("files are left behind: %d, were %d", len(after), len(before))
	}
	if now := leaf(t, dir, "a"); !now.NotAfter.After(first.NotAfter) || !leaf(t, dir, "b").Equal(other) {
		t.Error("a was not renewed, or b was")
	}
}

func TestCertsNeverReplacesWhatItDoesNotUnderstand(t *testing.T) {
	for name, test := range map[string]struct{ file, content string }{
		"a certificate that is none": {"a.crt", "hello"},
		"a key that is none":         {"a.key", "hello"},
		"a CA without its key":       {"ca.crt", "hello"},
		"a CA's key alone":           {"ca.key", "hello"},
	} {
		dir := t.TempDir()
		put(t, dir, test.file, []byte(test.content), 1)
		status, _, stderr := runArgs("certs", "-dir", dir, "a")
		if status != statusFailed || !strings.Contains(stderr, test.file) {
			t.Errorf("%s: status %d, %q", name, status, stderr)
		}
		if got, _ := os.ReadFile(filepath.Join(dir, test.file)); string(got) != test.content {
			t.Errorf("%s: it was replaced", name)
		}
	}
}

func TestNoCertificateOutlivesItsCA(t *testing.T) {
	dir := t.TempDir()
	mustRun(t, "certs", "-dir", dir, "-days", "3650", "a")
	ca, err := readCert(filepath.Join(dir, "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	if leaf(t, dir, "a").NotAfter.After(ca.NotAfter) {
		t.Error("it does")
	}
}
