package main

import (
	"context"
	"io"
	"net"
	"time"

	"example.org/rpc"
)

// oneWay is the delay of the network that firstByte makes.
const oneWay = 20 * time.Millisecond

// firstByte counts the round trips until a Download has its first byte, on a network where nothing else takes time.
func (b *bench) firstByte() {
	rows := [][]string{{"", "TCP", "TLS"}, {"new connection, its transport being up"}, {"reused connection"}}
	for _, over := range []struct {
		name string
		transport
	}{{"TCP", transport{}}, {"TLS", b.tls}} {
		fresh, reused := b.roundTrips(over.transport)
		// A round trip and the work take a little more than a round trip; two take twice as long.
		b.report.atMost("first byte, "+over.name+", new connection: round trips", fresh, 1.2, "(1, and the work)")
		b.report.atMost("first byte, "+over.name+", reused connection: round trips", reused, 1.2, "(1, and the work)")
		rows[1], rows[2] = append(rows[1], fresh.String()), append(rows[2], reused.String())
	}
	b.report.add("First byte of a Download, in round trips", "Through a proxy that holds every byte back for 20 ms, each way.", rows)
}

func (b *bench) roundTrips(t transport) (fresh, reused spread) {
	addr, server := serveLibrary(t)
	defer server.Close()
	proxy := transport{}.listen()
	defer proxy.Close()
	go acceptEach(proxy, func(c net.Conn) { // until Close
		upstream := must(net.Dial("tcp", addr))
		go delay(c, upstream) // until the server has closed
		delay(upstream, c)
	})
	var first, second []float64
	for range b.rounds {
		var up time.Time
		client := rpc.NewClient(rpc.ConnecterFunc(func(ctx context.Context) (net.Conn, error) {
			c, err := t.connecter(proxy.Addr().String()).Connect(ctx)
			up = time.Now()
			return c, err
		}), rpc.ClientConfig{})
		arrived := downloadByte(client)
		first = append(first, arrived.Sub(up).Seconds()/(2*oneWay).Seconds())
		start := time.Now()
		second = append(second, downloadByte(client).Sub(start).Seconds()/(2*oneWay).Seconds())
		client.Close()
	}
	return spreadOf(first), spreadOf(second)
}

// downloadByte returns when the first byte was there. It reads the rest, so that the connection can be used again.
func downloadByte(client *rpc.Client) time.Time {
	stream := download(client, 4096)
	must(io.ReadFull(stream, make([]byte, 1)))
	arrived := time.Now()
	must(io.Copy(io.Discard, stream))
	check(stream.Close())
	return arrived
}

// delay copies, each byte oneWay late, and closes dst.
func delay(dst, src net.Conn) {
	type piece struct {
		data []byte
		due  time.Time
	}
	pieces := make(chan piece, 1<<10)
	go func() { // until src ends
		defer close(pieces)
		for {
			buffer := make([]byte, 32<<10)
			n, err := src.Read(buffer)
			if err != nil {
				return
			}
			pieces <- piece{buffer[:n], time.Now().Add(oneWay)}
		}
	}()
	for p := range pieces {
		time.Sleep(time.Until(p.due))
		dst.Write(p.data) // what cannot be written any more, nobody waits for
	}
	dst.Close()
}

// download4K is a small stream on a connection that is there.
func (b *bench) download4K() {
	bare, lib := startBare(transport{}, 4096), startLibrary(transport{})
	defer bare.close()
	defer lib.close()
	contestants := []contestant{
		sequential("bare ping-pong of 64 bytes", b.time, bare.call),
		sequential("bare, 64 bytes for 4 KiB", b.time, func() { bare.bulk(4096) }),
		sequential("rpc download", b.time, func() { lib.bulk(4096) }),
		sequential("rpc upload", b.time, func() { lib.upload(4096) }),
	}
	for _, start := range []func(transport) *peer{startHTTP, startGRPC, startDRPC, startYamux} {
		p := start(transport{})
		defer p.close()
		contestants = append(contestants, sequential(p.name, b.time, func() { p.bulk(4096) }))
	}
	results := b.compete(contestants...)
	pingPong := results[0]
	b.report.add("Streams of 4 KiB on a connection that is there", "", callTable(pingPong, p50, results))
	b.report.atMost("4 KiB Download, reused connection: p50", results[2].over(pingPong, p50), 3, "× bare ping-pong")
}
