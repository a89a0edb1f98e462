package main

import (
	"encoding/binary"
	"io"
	"net"

	"github.com/hashicorp/yamux"
)

// startYamux is HashiCorp's yamux: a stream of one connection for each transfer.
func startYamux(t transport) *peer {
	config := yamux.DefaultConfig()
	config.LogOutput = io.Discard
	l := t.listen()
	go acceptEach(l, func(c net.Conn) { // until Close
		session := must(yamux.Server(c, config))
		acceptEach(session, serveYamux)
	})
	session := must(yamux.Client(must(t.dial(l.Addr().String())), config))
	return &peer{name: "yamux", bulk: func(n int64) {
		stream := must(session.Open())
		must(stream.Write(binary.BigEndian.AppendUint64(nil, uint64(n))))
		expect("yamux stream", must(plainCopy(io.Discard, stream, make([]byte, min(n, 64<<10)))), n)
		check(stream.Close())
	}, close: func() {
		session.Close()
		l.Close()
	}}
}

func serveYamux(stream net.Conn) {
	var n [8]byte
	if _, err := io.ReadFull(stream, n[:]); err != nil {
		return
	}
	plainCopy(stream, &memory{left: int64(binary.BigEndian.Uint64(n[:]))}, make([]byte, 32<<10))
}
