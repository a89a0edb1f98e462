package main

import (
	"context"

	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// startTTRPC is containerd's ttrpc, with the protobuf messages that it insists on.
func startTTRPC(t transport) *peer {
	server := must(ttrpc.NewServer())
	server.RegisterService("bench", &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		"Echo": func(_ context.Context, decode func(any) error) (any, error) {
			req := new(wrapperspb.BytesValue)
			return req, decode(req)
		},
	}})
	l := t.listen()
	go server.Serve(context.Background(), l) // until Close
	client := ttrpc.NewClient(must(t.dial(l.Addr().String())))
	return &peer{name: "ttrpc", call: func() {
		res := new(wrapperspb.BytesValue)
		check(client.Call(context.Background(), "bench", "Echo", wrapperspb.Bytes(payload), res))
		expect("ttrpc call", int64(len(res.Value)), int64(len(payload)))
	}, close: func() {
		client.Close()
		server.Close()
	}}
}
