package main

import (
	"io"
	"log"
	"net"
	"net/rpc"
)

// Echo is a service of net/rpc.
type Echo struct{}

// Bytes returns what it gets.
func (Echo) Bytes(req []byte, res *[]byte) error {
	*res = req
	return nil
}

// startNetRPC is net/rpc with its own codec, gob.
func startNetRPC(t transport) *peer {
	log.SetOutput(io.Discard) // it reports connections that end
	server := rpc.NewServer()
	check(server.Register(Echo{}))
	l := t.listen()
	go acceptEach(l, func(c net.Conn) { server.ServeConn(c) }) // until Close
	client := func() (call, disconnect func()) {
		c := rpc.NewClient(must(t.dial(l.Addr().String())))
		return func() {
			var res []byte
			check(c.Call("Echo.Bytes", payload, &res))
			expect("net/rpc call", int64(len(res)), int64(len(payload)))
		}, func() { c.Close() }
	}
	call, disconnect := client()
	return &peer{name: "net/rpc", call: call, client: client, close: func() {
		disconnect()
		l.Close()
	}}
}
