package main

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"

	"example.org/rpc"
)

// ends are what a copy is between: a pipe's or a file's end to read, something to write to, and what is to be done when
// the copy has ended, which returns how much arrived.
type ends func() (src *os.File, sink io.Writer, done func() int64)

// pipeToPipe is as with zfs send and zfs recv.
func (b *bench) pipeToPipe() {
	bares, ours := b.copies(func() (*os.File, io.Writer, func() int64) {
		src, feed := pipe()
		go func() { // until all is written; whoever reads has the end of it
			must(plainCopy(feed, &memory{left: b.bytes}, make([]byte, 64<<10)))
			check(feed.Close())
		}()
		drain, sink := pipe()
		total := make(chan int64)
		go func() { total <- must(plainCopy(io.Discard, drain, make([]byte, 64<<10))) }() // until sink is closed
		return src, sink, func() int64 {
			check(sink.Close())
			defer drain.Close()
			return <-total
		}
	})
	b.judgeCopies("os.Pipe to os.Pipe", bares[0], bares, ours, 0.85, "× io.Copy over TCP")
}

func pipe() (r, w *os.File) {
	r, w, err := os.Pipe()
	check(err)
	return r, w
}

// fileToDiscard reads a file that is in the page cache.
func (b *bench) fileToDiscard() {
	name := b.file()
	bares, ours := b.copies(func() (*os.File, io.Writer, func() int64) {
		return must(os.Open(name)), io.Discard, func() int64 { return b.bytes }
	})
	b.judgeCopies("File to discard", fastest(bares), bares, ours, 0.95, "× the better of io.Copy and a 32 KiB copy")
}

// fileToFile writes another one.
func (b *bench) fileToFile() {
	name := b.file()
	bares, ours := b.copies(func() (*os.File, io.Writer, func() int64) {
		sink := must(os.Create(name + ".copy"))
		return must(os.Open(name)), sink, func() int64 {
			defer os.Remove(sink.Name()) // before much of it is written to the disk
			defer sink.Close()
			return must(sink.Stat()).Size()
		}
	})
	b.judgeCopies("File to file", fastest(bares), bares, ours, 0.95, "× the better of io.Copy and a 32 KiB copy")
}

// file is one of b.bytes.
func (b *bench) file() string {
	f := must(os.Create(filepath.Join(b.dir, "file")))
	must(plainCopy(f, &memory{left: b.bytes}, make([]byte, 1<<20)))
	check(f.Close())
	return f.Name()
}

func (b *bench) judgeCopies(title string, reference result, bares, ours []result, limit float64, of string) {
	b.report.add(title, "", bulkTable(reference, bares, ours))
	for _, r := range ours {
		b.report.atLeast("bulk, "+title+", "+r.name+": speed", r.over(reference, speed), limit, of)
	}
}

// copies has the library in both directions, and copies over TCP, copy from end to end.
func (b *bench) copies(e ends) (bares, ours []result) {
	lib := startLibrary(transport{})
	defer lib.close()
	sources, sinks := make(chan io.ReadCloser, 1), make(chan io.Writer, 1)
	rpc.HandleDownload(lib.server, "source", func(context.Context, *nothing) (*nothing, io.ReadCloser, error) {
		return &nothing{}, <-sources, nil
	})
	rpc.HandleUpload(lib.server, "sink", func(_ context.Context, _ *nothing, r io.Reader) (*nothing, error) {
		_, err := io.Copy(<-sinks, r)
		return &nothing{}, err
	})
	ctx := context.Background()
	copied := func(dst io.Writer, src io.Reader) { must(io.Copy(dst, src)) }
	copied32K := func(dst io.Writer, src io.Reader) { must(plainCopy(dst, src, make([]byte, 32<<10))) }
	results := b.compete(
		b.copy(e, "bare, io.Copy", func(src *os.File, sink io.Writer) { overTCP(src, sink, copied, copied) }),
		b.copy(e, "bare, 32 KiB copy", func(src *os.File, sink io.Writer) { overTCP(src, sink, copied32K, copied32K) }),
		b.copy(e, "bare, io.Copy to 32 KiB copy", func(src *os.File, sink io.Writer) { overTCP(src, sink, copied, copied32K) }),
		b.copy(e, "rpc download", func(src *os.File, sink io.Writer) {
			sources <- src
			stream := must(lib.client.Download(ctx, "source", nil, nil))
			copied(sink, stream)
			check(stream.Close())
		}),
		b.copy(e, "rpc upload", func(src *os.File, sink io.Writer) {
			sinks <- sink
			check(lib.client.Upload(ctx, "sink", nil, src, nil))
		}),
	)
	return results[:3], results[3:]
}

func (b *bench) copy(e ends, name string, transfer func(src *os.File, sink io.Writer)) contestant {
	return contestant{name, func() turn {
		src, sink, done := e()
		transfer(src, sink)
		src.Close() // which the library has done already
		expect(name, done(), b.bytes)
		return turn{amount: float64(b.bytes)}
	}}
}

// overTCP copies over a connection of its own.
func overTCP(src *os.File, sink io.Writer, send, receive func(dst io.Writer, src io.Reader)) {
	l := transport{}.listen()
	defer l.Close()
	go func() { // until the file's end; the receiver waits for it
		c := must(net.Dial("tcp", l.Addr().String()))
		send(c, src)
		check(c.Close())
	}()
	c := must(l.Accept())
	receive(sink, c)
	check(c.Close())
}
