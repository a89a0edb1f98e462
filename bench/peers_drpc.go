package main

import (
	"context"
	"encoding/binary"
	"errors"
	"io"

	"storj.io/drpc"
	"storj.io/drpc/drpcconn"
	"storj.io/drpc/drpcmux"
	"storj.io/drpc/drpcpool"
	"storj.io/drpc/drpcserver"
)

// drpcBytes is a message of bytes, and drpcRaw its encoding.
type (
	drpcBytes struct{ b []byte }
	drpcRaw   struct{}
)

func (drpcRaw) Marshal(m drpc.Message) ([]byte, error) { return m.(*drpcBytes).b, nil }

func (drpcRaw) Unmarshal(b []byte, m drpc.Message) error {
	to := m.(*drpcBytes)
	to.b = append(to.b[:0], b...)
	return nil
}

// drpcService is what generated code would describe.
type drpcService struct{}

func (drpcService) NumMethods() int { return 2 }

func (drpcService) Method(n int) (string, drpc.Encoding, drpc.Receiver, any, bool) {
	if n == 0 {
		return "/bench/Echo", drpcRaw{}, func(_ any, _ context.Context, req, _ any) (drpc.Message, error) {
			return req, nil
		}, func(drpcService, context.Context, *drpcBytes) (*drpcBytes, error) { return nil, nil }, true
	}
	return "/bench/Memory", drpcRaw{}, func(_ any, _ context.Context, req, stream any) (drpc.Message, error) {
		src := &memory{left: int64(binary.BigEndian.Uint64(req.(*drpcBytes).b))}
		return nil, sendDRPC(stream.(drpc.Stream), src)
	}, func(drpcService, *drpcBytes, drpc.Stream) error { return nil }, true
}

func sendDRPC(stream drpc.Stream, src *memory) error {
	buffer := make([]byte, min(src.left, 32<<10)) // with 64 KiB, its frames' size, it is no faster
	for {
		n, err := src.Read(buffer)
		if err == io.EOF {
			return stream.CloseSend()
		}
		if err := stream.MsgSend(&drpcBytes{buffer[:n]}, drpcRaw{}); err != nil {
			return err
		}
	}
}

// startDRPC is Storj's drpc. A connection does one thing at a time; its pool provides for more.
func startDRPC(t transport) *peer {
	mux := drpcmux.New()
	check(mux.Register(drpcService{}, drpcService{}))
	l := t.listen()
	ctx, cancel := context.WithCancel(context.Background())
	go drpcserver.New(mux).Serve(ctx, l) // until cancel
	pool := drpcpool.New[string, drpcpool.Conn](drpcpool.Options{})
	conn := pool.Get(ctx, l.Addr().String(), func(_ context.Context, addr string) (drpcpool.Conn, error) {
		c, err := t.dial(addr)
		if err != nil {
			return nil, err
		}
		return drpcconn.New(c), nil
	})
	return &peer{name: "drpc", call: func() {
		var res drpcBytes
		check(conn.Invoke(ctx, "/bench/Echo", drpcRaw{}, &drpcBytes{payload}, &res))
		expect("drpc call", int64(len(res.b)), int64(len(payload)))
	}, bulk: func(n int64) {
		stream := must(conn.NewStream(ctx, "/bench/Memory", drpcRaw{}))
		check(stream.MsgSend(&drpcBytes{binary.BigEndian.AppendUint64(nil, uint64(n))}, drpcRaw{}))
		check(stream.CloseSend())
		expect("drpc stream", receiveDRPC(stream), n)
		check(stream.Close())
	}, close: func() {
		pool.Close()
		cancel()
		l.Close()
	}}
}

func receiveDRPC(stream drpc.Stream) (total int64) {
	var got drpcBytes
	for {
		err := stream.MsgRecv(&got, drpcRaw{})
		if errors.Is(err, io.EOF) {
			return total
		}
		check(err)
		total += int64(len(got.b))
	}
}
