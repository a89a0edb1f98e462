package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

var certsCommand = command{
	name:     "certs",
	synopsis: "-dir DIR NAME...",
	brief:    "make a CA and certificates",
	about: `Makes a certificate authority in DIR, once, and a certificate for each NAME, usable at once on both sides:

  replicate certs -dir tls server laptop
  replicate serve -listen :7000 -sink dir:/srv/backups -tls tls
  replicate push -peer HOST:7000 -store dir:/var/dumps -tls tls

A client's NAME is its identity at the server, and the folder in the sink that its pushes go to. A server's NAME is what
clients ask for with -server-name ("server", unless they say otherwise); which address it has does not matter.

A host needs ca.crt, NAME.crt and NAME.key. Whoever has ca.key can make certificates: keep it off the hosts. Run again,
it renews the certificates of the given names, for the keys they have, and says so. The CA is never replaced.
`,
	run: runCerts,
}

func runCerts(_ context.Context, o output, flags *flag.FlagSet, args []string) error {
	dir := flags.String("dir", "", "`DIR` of the CA and the certificates; made if it is missing")
	days := flags.Int("days", 825, "`days` until the certificates expire")
	if err := parse(flags, args); err != nil {
		return err
	}
	switch {
	case *dir == "":
		return usagef("-dir is missing")
	case *days < 1 || *days > caDays:
		return usagef("-days %d: 1 to %d", *days, caDays)
	case flags.NArg() == 0:
		return usagef("no NAME is given")
	}
	for _, name := range flags.Args() {
		if err := checkCertName(name); err != nil {
			return usageError{err.Error()}
		}
	}
	return makeCerts(*dir, flags.Args(), *days, func(format string, args ...any) { fmt.Fprintf(o.out, format+"\n", args...) })
}

const (
	caName = "ca"
	caDays = 3650
	// maxCertName is the length that X.509 allows a Common Name.
	maxCertName = 64
)

// checkCertName allows what can be an identity, a host name or an address, and a file name.
func checkCertName(name string) error {
	switch {
	case name == caName:
		return fmt.Errorf("name %q: that is the certificate authority", name)
	case len(name) < 1 || len(name) > maxCertName:
		return fmt.Errorf("name %q: 1 to %d letters are allowed", name, maxCertName)
	case name[0] == '.' || name[0] == '-':
		return fmt.Errorf("name %q: it may not begin with %q", name, name[0])
	}
	for _, r := range name {
		if !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.:", r) {
			return fmt.Errorf("name %q: %q is not one of letters, digits and -_.: that are allowed", name, r)
		}
	}
	return nil
}

// authority is the CA: what signs certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func makeCerts(dir string, names []string, days int, say func(format string, args ...any)) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	ca, err := openAuthority(dir, say)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := ca.certify(dir, name, days, say); err != nil {
			return fmt.Errorf("certificate %q: %w", name, err)
		}
	}
	return nil
}

// openAuthority reads the CA in the folder, or makes one if there is none.
func openAuthority(dir string, say func(string, ...any)) (*authority, error) {
	certFile, keyFile := filepath.Join(dir, caName+".crt"), filepath.Join(dir, caName+".key")
	hasCert, hasKey := exists(certFile), exists(keyFile)
	switch {
	case !hasCert && !hasKey:
		return newAuthority(certFile, keyFile, say)
	case !hasKey:
		return nil, fmt.Errorf("%s is there but %s is not: certificates are made where the CA was made", certFile, keyFile)
	case !hasCert:
		return nil, fmt.Errorf("%s is there but %s is not", keyFile, certFile)
	}
	cert, err := readCert(certFile)
	if err != nil {
		return nil, err
	}
	key, err := readKey(keyFile)
	if err != nil {
		return nil, err
	}
	switch {
	case !key.PublicKey.Equal(cert.PublicKey):
		return nil, fmt.Errorf("%s does not belong to %s", keyFile, certFile)
	case time.Now().After(cert.NotAfter):
		return nil, fmt.Errorf("%s has expired on %s: make a new CA in another folder", certFile, day(cert.NotAfter))
	}
	return &authority{cert, key}, nil
}

func newAuthority(certFile, keyFile string, say func(string, ...any)) (*authority, error) {
	template := newTemplate("replicate CA", caDays)
	template.IsCA, template.BasicConstraintsValid, template.MaxPathLenZero = true, true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	key, err := newKey(keyFile)
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	if err := replaceFile(certFile, pemBlock("CERTIFICATE", der), 0o644); err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	say("made %s and %s: the CA, until %s", certFile, keyFile, day(cert.NotAfter))
	return &authority{cert, key}, nil
}

// certify makes or renews a certificate. A key that is there is kept: whoever uses it now goes on using it.
func (ca *authority) certify(dir, name string, days int, say func(string, ...any)) error {
	certFile, keyFile := filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key")
	key, err := readKey(keyFile)
	if errors.Is(err, fs.ErrNotExist) {
		key, err = newKey(keyFile)
	}
	if err != nil {
		return err
	}
	template := newTemplate(name, days)
	template.NotAfter = minTime(template.NotAfter, ca.cert.NotAfter)
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	template.DNSNames = []string{"localhost"}
	template.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}
	if ip := net.ParseIP(name); ip != nil {
		template.IPAddresses = append(template.IPAddresses, ip)
	} else {
		template.DNSNames = append([]string{name}, template.DNSNames...)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, &key.PublicKey, ca.key)
	if err != nil {
		return err
	}
	what := "made " + certFile
	if old, err := readCert(certFile); err == nil {
		what = fmt.Sprintf("renewed %s (was valid until %s)", certFile, day(old.NotAfter))
	} else if exists(certFile) {
		return fmt.Errorf("%w; remove the file if it may be replaced", err)
	}
	if err := replaceFile(certFile, pemBlock("CERTIFICATE", der), 0o644); err != nil {
		return err
	}
	say("%s: %s, until %s", what, name, day(template.NotAfter))
	return nil
}

func newTemplate(commonName string, days int) *x509.Certificate {
	serial := make([]byte, 16)
	rand.Read(serial) // never fails
	serial[0] &= 0x7f // serial numbers are positive
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial),
		Subject:      pkix.Name{CommonName: commonName},
		NotBefore:    now.Add(-time.Hour), // clocks differ
		NotAfter:     now.AddDate(0, 0, days),
	}
}

// newKey makes a key and writes it where there is none.
func newKey(file string) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	_, err = f.Write(pemBlock("PRIVATE KEY", der))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		os.Remove(file)
		return nil, err
	}
	return key, nil
}

func readKey(file string) (*ecdsa.PrivateKey, error) {
	der, err := readPEM(file, "PRIVATE KEY")
	if err != nil {
		return nil, err
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s: not an ECDSA key", file)
	}
	return ec, nil
}

func readCert(file string) (*x509.Certificate, error) {
	der, err := readPEM(file, "CERTIFICATE")
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return cert, nil
}

func readPEM(file, kind string) ([]byte, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != kind {
		return nil, fmt.Errorf("%s: no %s in it", file, strings.ToLower(kind))
	}
	return block.Bytes, nil
}

func pemBlock(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// replaceFile writes a file so that at every moment the old one or the new one is there, whole.
func replaceFile(file string, content []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(file), ".*.tmp")
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

func exists(file string) bool {
	_, err := os.Lstat(file)
	return err == nil
}

func minTime(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

func day(t time.Time) string { return t.UTC().Format(time.DateOnly) }
