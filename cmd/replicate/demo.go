package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"example.org/rpc"
)

var demoCommand = command{
	name:     "demo",
	synopsis: "[DIR]",
	brief:    "replicate a folder over mutual TLS on loopback, and prove it",
	about: `Replicates the files below DIR, or 256 MiB of files that it makes, to a passive side on loopback over mutual TLS, kills
the connections once in the middle and goes on from where they stopped, pulls everything back, compares SHA-256, and
says "verified". It works in a temporary folder that it removes at the end (TMPDIR says where), and only reads DIR.
`,
	run: runDemo,
}

// demo is the state of a demonstration.
type demo struct {
	output
	dir    string // temporary: everything is in it
	source *dirStore
	total  int64 // bytes of all versions
	log    *slog.Logger
}

const (
	demoServer = defaultServer
	demoClient = "laptop"
	demoJobs   = 2
)

func runDemo(ctx context.Context, o output, flags *flag.FlagSet, args []string) (err error) {
	if err := parse(flags, args); err != nil {
		return err
	}
	if flags.NArg() > 1 {
		return usagef("unexpected argument %q: one DIR at most", flags.Arg(1))
	}
	dir, err := os.MkdirTemp("", "replicate-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	d := &demo{output: o, dir: dir, log: slog.New(slog.DiscardHandler)}
	if err := d.openSource(ctx, flags.Arg(0)); err != nil {
		return err
	}
	defer d.source.Close()
	if err := d.replicate(ctx); err != nil {
		return err
	}
	fmt.Fprintln(o.out, "verified")
	return nil
}

func (d *demo) say(format string, args ...any) { fmt.Fprintf(d.out, format+"\n", args...) }

func (d *demo) path(name string) string { return filepath.Join(d.dir, name) }

// openSource opens the folder that is replicated; with no name it makes one.
func (d *demo) openSource(ctx context.Context, dir string) error {
	if dir == "" {
		begun := time.Now()
		dir = d.path("source")
		if err := makeSource(ctx, dir, demoBytes); err != nil {
			return err
		}
		d.say("made %s in %d filesystems with %d versions each, in %s", size(demoBytes), demoFilesystems, demoVersions, short(time.Since(begun)))
	}
	var err error
	d.source, err = openDirStore(dir, warnings(d.status))
	return err
}

const (
	demoBytes       = 256 << 20
	demoFilesystems = 3
	demoVersions    = 3
)

// makeSource makes so many bytes of files: the same ones every time, each of another length.
func makeSource(ctx context.Context, dir string, size int64) error {
	midnight := time.Now().Truncate(24 * time.Hour)
	left := size
	const files = demoFilesystems * demoVersions
	for i := range files {
		length := size/files + int64(i-files/2)*(size/256) + int64(i)
		if i == files-1 {
			length = left
		}
		left -= length
		folder := filepath.Join(dir, []string{"databases", "images", "images/archive"}[i%demoFilesystems])
		if err := os.MkdirAll(folder, 0o700); err != nil {
			return err
		}
		file := filepath.Join(folder, fmt.Sprintf("version-%d", 1+i/demoFilesystems))
		if err := makeFile(ctx, file, uint64(i), length); err != nil {
			return err
		}
		at := midnight.Add(time.Duration(i-files) * time.Hour)
		if err := os.Chtimes(file, at, at); err != nil {
			return err
		}
	}
	return nil
}

// makeFile fills a file with the numbers of the generator SplitMix64, which costs less than writing them.
func makeFile(ctx context.Context, file string, seed uint64, length int64) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	state := seed << 32
	for length > 0 && ctx.Err() == nil {
		for i := 0; i < len(buf); i += 8 {
			state += 0x9e3779b97f4a7c15
			z := (state ^ state>>30) * 0xbf58476d1ce4e5b9
			z = (z ^ z>>27) * 0x94d049bb133111eb
			binary.LittleEndian.PutUint64(buf[i:], z^z>>31)
		}
		n, err := f.Write(buf[:min(length, int64(len(buf)))])
		if err != nil {
			return err
		}
		length -= int64(n)
	}
	return errors.Join(ctx.Err(), f.Close())
}

// replicate is the demonstration.
func (d *demo) replicate(ctx context.Context) error {
	versions, err := d.count(ctx)
	if err != nil {
		return err
	}
	if err := makeCerts(d.path("tls"), []string{demoServer, demoClient}, 1, func(string, ...any) {}); err != nil {
		return err
	}
	d.say("made a CA and certificates for %q and %q", demoServer, demoClient)
	if err := d.push(ctx, versions); err != nil {
		return fmt.Errorf("push: %w", err)
	}
	if err := d.pull(ctx, versions); err != nil {
		return fmt.Errorf("pull: %w", err)
	}
	return d.compare(ctx, versions)
}

// count adds up what the source has.
func (d *demo) count(ctx context.Context) (versions int, err error) {
	err = d.eachVersion(ctx, func(filesystem string, v rpc.FilesystemVersion) error {
		versions++
		res, err := d.source.SendDry(ctx, &rpc.SendReq{Filesystem: filesystem, To: &v})
		if err == nil {
			d.total += int64(res.ExpectedSize)
		}
		return err
	})
	if err == nil && versions == 0 {
		err = errors.New("there is nothing to replicate: no files, or only hidden ones")
	}
	return versions, err
}

// eachVersion calls f for each version of the source, in the lists' order.
func (d *demo) eachVersion(ctx context.Context, f func(filesystem string, v rpc.FilesystemVersion) error) error {
	list, err := d.source.ListFilesystems(ctx, new(rpc.ListFilesystemReq))
	if err != nil {
		return err
	}
	for _, fs := range list.Filesystems {
		res, err := d.source.ListFilesystemVersions(ctx, &rpc.ListFilesystemVersionsReq{Filesystem: fs.Path})
		if err != nil {
			return err
		}
		for _, v := range res.Versions {
			if err := f(fs.Path, v); err != nil {
				return err
			}
		}
	}
	return nil
}

// push replicates the source into the sink of a passive side, and kills the connections when half of it is sent.
func (d *demo) push(ctx context.Context, versions int) error {
	passive, err := d.startPassive(d.path("sink"), "")
	if err != nil {
		return err
	}
	defer passive.stop()
	connecter, err := d.connecter(passive.addr)
	if err != nil {
		return err
	}
	killer := &killer{Connecter: connecter}
	client := rpc.NewClient(killer, rpc.ClientConfig{Logger: d.log})
	defer client.Close()
	d.say("pushing over mutual TLS to %s", passive.addr)
	source := &tripwire{Store: d.source, left: d.total / 2}
	source.trip = func() {
		d.say("killed %s after %s", count(killer.kill(), "connection"), size(d.total/2))
	}
	r := d.replication(client)
	r.source, r.sink = source, sinkPeer{client}
	return d.run(ctx, r, "pushed", versions)
}

// pull replicates what was pushed into another folder, from a passive side whose source it is.
func (d *demo) pull(ctx context.Context, versions int) error {
	passive, err := d.startPassive("", filepath.Join(d.path("sink"), demoClient))
	if err != nil {
		return err
	}
	defer passive.stop()
	connecter, err := d.connecter(passive.addr)
	if err != nil {
		return err
	}
	client := rpc.NewClient(connecter, rpc.ClientConfig{Logger: d.log})
	defer client.Close()
	copied, err := d.makeStore("copy")
	if err != nil {
		return err
	}
	defer copied.Close()
	r := d.replication(client)
	r.source, r.sink = client, copied
	return d.run(ctx, r, "pulled", versions)
}

func (d *demo) makeStore(name string) (Store, error) {
	if err := os.Mkdir(d.path(name), 0o700); err != nil {
		return nil, err
	}
	return openStore("dir:"+d.path(name), d.log)
}

func (d *demo) replication(client *rpc.Client) *replication {
	return &replication{parse: parseDirToken, jobs: demoJobs, retry: retries{max: 3, first: 50 * time.Millisecond},
		reconnect: client.ResetConnectBackoff}
}

// run runs a replication quietly and says what came of it. Whether all versions are there is seen by compare.
func (d *demo) run(ctx context.Context, r *replication, did string, versions int) error {
	var broken bytes.Buffer
	r.report = newReporter(output{out: io.Discard, status: &broken}, false)
	begun := time.Now()
	err := r.run(ctx, nil)
	took := time.Since(begun)
	if ctx.Err() != nil {
		return errInterrupted
	}
	if err != nil { // the failures were reported, but to broken
		return fmt.Errorf("%v\n%s", err, &broken)
	}
	d.say("%s %s: %s in %s (%s)", did, count(versions, "version"), size(d.total), short(took), speed(d.total, took))
	if broken.Len() > 0 {
		d.say("  went on from where it stopped: %s did not have to be sent again", size(r.report.resumed))
	}
	return nil
}

// compare compares the source with what was pulled back, by SHA-256.
func (d *demo) compare(ctx context.Context, versions int) error {
	begun := time.Now()
	copied, err := os.OpenRoot(d.path("copy"))
	if err != nil {
		return err
	}
	defer copied.Close()
	same := 0
	err = d.eachVersion(ctx, func(filesystem string, v rpc.FilesystemVersion) error {
		name := filepath.Join(filepath.FromSlash(filesystem), v.Name)
		sums, err := hashBoth(ctx, name, d.source.root, copied)
		if err != nil {
			return err
		}
		if sums[0] != sums[1] {
			return fmt.Errorf("%s: SHA-256 is %x, of what was pulled back it is %x", name, sums[0], sums[1])
		}
		same++
		return nil
	})
	if err != nil {
		return err
	}
	if same != versions {
		return fmt.Errorf("there are %d versions now, there were %d", same, versions)
	}
	d.say("SHA-256 of %s: the same at both ends, in %s", count(same, "version"), short(time.Since(begun)))
	return nil
}

// hashBoth reads the file of that name in both folders at once.
func hashBoth(ctx context.Context, name string, folders ...*os.Root) (sums [2][sha256.Size]byte, err error) {
	var running sync.WaitGroup
	errs := make([]error, len(folders))
	for i, folder := range folders {
		running.Go(func() { sums[i], errs[i] = hashFile(ctx, folder, name) }) // ends with the file; waited for below
	}
	running.Wait()
	return sums, errors.Join(errs...)
}

func hashFile(ctx context.Context, folder *os.Root, name string) (sum [sha256.Size]byte, err error) {
	f, err := folder.Open(name)
	if err != nil {
		return sum, err
	}
	defer f.Close()
	defer context.AfterFunc(ctx, func() { f.Close() })()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return sum, err
	}
	h.Sum(sum[:0])
	return sum, nil
}

// passive is a passive side that runs.
type passive struct {
	addr    string
	service *service
	server  *rpc.Server
	ended   chan struct{}
}

// startPassive starts a passive side with the stores in those folders, on loopback.
func (d *demo) startPassive(sink, source string) (*passive, error) {
	s := &service{log: d.log}
	if sink != "" {
		if err := os.Mkdir(sink, 0o700); err != nil {
			return nil, err
		}
		sink = "dir:" + sink
	}
	if source != "" {
		source = "dir:" + source
	}
	if err := s.open(sink, source); err != nil {
		s.close()
		return nil, err
	}
	flags := serveFlags{listen: "127.0.0.1:0", tls: d.path("tls"), name: demoServer, allow: demoClient}
	listener, err := flags.listener()
	if err != nil {
		s.close()
		return nil, err
	}
	p := &passive{addr: listener.Addr().String(), service: s, server: s.server(), ended: make(chan struct{})}
	go func() { // ends with stop, which waits for it
		defer close(p.ended)
		p.server.Serve(listener)
	}()
	return p, nil
}

func (p *passive) stop() {
	p.server.Close()
	<-p.ended
	p.service.close()
}

func (d *demo) connecter(addr string) (rpc.Connecter, error) {
	return (&peerFlags{addr: addr, tls: d.path("tls"), name: demoClient, serverName: demoServer}).connecter()
}
