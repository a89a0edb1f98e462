package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"example.org/rpc"
)

// How many of each the memory is divided by.
const (
	idleConns     = 500
	activeStreams = 64
)

var memoryCases = []struct {
	what     string
	of       int
	tcp, tls float64 // the budgets, in KiB a side
	open     func(m *memoryMeter)
}{
	{"idle connection for calls", idleConns, 12, 24, (*memoryMeter).idleControl},
	{"idle connection for streams", idleConns, 12, 24, (*memoryMeter).idleData},
	{"active download after 1 MiB", activeStreams, 128, 128, func(m *memoryMeter) { m.downloads(1 << 20) }},
	{"active download after 32 MiB", activeStreams, 128, 128, func(m *memoryMeter) { m.downloads(32 << 20) }},
	{"active upload after 1 MiB", activeStreams, 128, 128, func(m *memoryMeter) { m.uploads(1 << 20) }},
	{"active upload after 32 MiB", activeStreams, 128, 128, func(m *memoryMeter) { m.uploads(32 << 20) }},
}

// memory has client and server in processes of their own, new ones for each case, so that nothing else is counted.
func (b *bench) memory() {
	rows := [][]string{{"", "client KiB", "server KiB"}}
	measure := func(i int, over, dir string, limit float64) {
		var client, server float64
		must(fmt.Sscan(string(must(child("memory-client", dir, strconv.Itoa(i)).Output())), &client, &server))
		what := memoryCases[i].what + ", " + over
		rows = append(rows, []string{what, number(client), number(server)})
		b.report.atMost("memory, "+what+": KiB, the larger side", exactly(max(client, server)), limit, "")
	}
	for i, c := range memoryCases {
		measure(i, "TCP", "-", c.tcp)
		measure(i, "TLS", filepath.Join(b.dir, "certs"), c.tls)
	}
	b.report.add("Memory of a connection", fmt.Sprintf("Heap and stacks in use, of %d idle connections and of %d streams, divided by their number; "+
		"client and server in processes of their own.", idleConns, activeStreams), rows)
}

func child(arguments ...string) *exec.Cmd {
	c := exec.Command(must(os.Executable()), arguments...)
	c.Stderr = os.Stderr
	return c
}

// runChild is a process of memory's: mode, where the certificates are ("-" without TLS), and the number of the case.
func runChild(mode, dir, number string) {
	var t transport
	if dir != "-" {
		t = tlsFrom(dir)
	}
	if mode == "memory-server" {
		memoryServer(t)
		return
	}
	fmt.Println(memoryClient(t, dir, must(strconv.Atoi(number))))
}

// memoryServer serves until its stdin ends. It prints its address.
func memoryServer(t transport) {
	addr, s := serveLibrary(t)
	tell := func(what string, f func() uint64) {
		rpc.HandleCall(s, what, func(context.Context, *nothing) (*count, error) {
			n := count(f())
			return &n, nil
		})
	}
	tell("in use", inUse)
	tell("received", func() uint64 { return s.Stats().BytesRead })
	fmt.Println(addr)
	io.Copy(io.Discard, os.Stdin)
	s.Close()
}

// inUse is the memory of heap and stacks that is in use once the garbage and the pools' spare buffers are gone.
func inUse() uint64 {
	for range 4 {
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapInuse + m.StackInuse
}

// memoryMeter is the client's side of a case.
type memoryMeter struct {
	t       transport
	addr    string
	watcher *rpc.Client // for questions
	kept    []any
}

// memoryClient returns what one of a case's things holds, at the client and at the server, in KiB.
func memoryClient(t transport, dir string, number int) (client, server float64) {
	serving := child("memory-server", dir, "")
	stdin, stdout := must(serving.StdinPipe()), must(serving.StdoutPipe())
	check(serving.Start())
	addr := strings.TrimSpace(must(bufio.NewReader(stdout).ReadString('\n')))
	m := &memoryMeter{t: t, addr: addr, watcher: rpc.NewClient(t.connecter(addr), rpc.ClientConfig{})}
	c := memoryCases[number]
	server, client = m.ask("in use"), float64(inUse())
	c.open(m)
	client, server = float64(inUse())-client, m.ask("in use")-server
	check(stdin.Close())
	check(serving.Wait())
	runtime.KeepAlive(m)
	return client / float64(c.of) / 1024, server / float64(c.of) / 1024
}

func (m *memoryMeter) ask(what string) float64 {
	var n count
	check(m.watcher.Call(context.Background(), what, nil, &n))
	return float64(n)
}

// newClient returns a client that stays, with all that it holds.
func (m *memoryMeter) newClient() *rpc.Client {
	c := rpc.NewClient(m.t.connecter(m.addr), rpc.ClientConfig{MaxIdleDataConns: idleConns})
	m.kept = append(m.kept, c)
	return c
}

// idleControl is connections for calls, each with a Client of its own, which counts, too.
func (m *memoryMeter) idleControl() {
	for range idleConns {
		echo(m.newClient())
	}
}

// idleData is connections that have carried a stream each.
func (m *memoryMeter) idleData() {
	client := m.newClient()
	streams := make([]io.ReadCloser, idleConns)
	for i := range streams {
		streams[i] = download(client, 1<<20)
	}
	for _, s := range streams {
		must(io.Copy(io.Discard, s))
		check(s.Close())
	}
}

// downloads is streams whose client has read n bytes and then stalls, so that the server waits in a Write.
func (m *memoryMeter) downloads(n int64) {
	client := m.newClient()
	buffer := make([]byte, 64<<10)
	for range activeStreams {
		stream := download(client, 1<<40)
		m.kept = append(m.kept, stream)
		must(plainCopy(io.Discard, io.LimitReader(stream, n), buffer))
	}
}

// uploads is streams whose source has given n bytes and then stalls, so that the server waits in a Read.
func (m *memoryMeter) uploads(n int64) {
	client := m.newClient()
	size := count(n)
	for range activeStreams {
		go client.Upload(context.Background(), "discard", &size, stalling{&memory{left: n}}, nil) // until the process ends
	}
	for m.ask("received") < float64(n*activeStreams) {
		time.Sleep(time.Millisecond) // between polls
	}
}

// stalling is a source that waits for ever where it should end.
type stalling struct{ *memory }

func (s stalling) Read(p []byte) (int, error) {
	if s.left == 0 {
		select {}
	}
	return s.memory.Read(p)
}
