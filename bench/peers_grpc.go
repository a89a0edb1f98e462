package main

import (
	"context"
	"fmt"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// grpcChunk is the size of the messages of a stream: of the 16 to 64 KiB that its maintainers advise, the fastest here.
// Larger windows and buffers than its own were no faster.
const grpcChunk = 32 << 10

// rawCodec carries bytes as they are, without a copy: buffers to send, and the count of what was received.
type rawCodec struct{}

// Messages of rawCodec.
type (
	grpcSend  struct{ mem.Buffer }
	grpcCount int64
)

func (rawCodec) Name() string { return "raw" }

func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	switch v := v.(type) {
	case grpcSend:
		return mem.BufferSlice{v.Buffer}, nil
	case *grpcCount:
		return mem.BufferSlice{mem.SliceBuffer(fmt.Append(nil, int64(*v)))}, nil
	}
	return nil, fmt.Errorf("cannot encode %T", v)
}

func (rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	switch v := v.(type) {
	case *grpcCount:
		*v = grpcCount(data.Len())
		return nil
	case *[]byte:
		*v = data.Materialize()
		return nil
	}
	return fmt.Errorf("cannot decode %T", v)
}

func init() { encoding.RegisterCodecV2(rawCodec{}) } // gRPC asks for it here

// grpcService is what generated code would describe: a unary call of protobuf messages, and a stream of bytes.
var grpcService = grpc.ServiceDesc{
	ServiceName: "bench",
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{{MethodName: "Echo", Handler: func(_ any, _ context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		req := new(wrapperspb.BytesValue)
		return req, decode(req)
	}}},
	Streams: []grpc.StreamDesc{{StreamName: "Memory", ServerStreams: true, Handler: func(_ any, stream grpc.ServerStream) error {
		var req []byte
		var n int64
		if err := stream.RecvMsg(&req); err != nil {
			return err
		}
		if _, err := fmt.Sscan(string(req), &n); err != nil {
			return err
		}
		return sendGRPC(stream, &memory{left: n})
	}}},
}

func sendGRPC(stream grpc.ServerStream, src *memory) error {
	pool := mem.DefaultBufferPool()
	for src.left > 0 {
		buffer := pool.Get(int(min(src.left, grpcChunk)))
		if _, err := io.ReadFull(src, *buffer); err != nil {
			return err
		}
		if err := stream.SendMsg(grpcSend{mem.NewBuffer(buffer, pool)}); err != nil {
			return err
		}
	}
	return nil
}

// startGRPC is one connection for everything, as its documentation wants it.
func startGRPC(t transport) *peer {
	secure := insecure.NewCredentials()
	var options []grpc.ServerOption
	if t.server != nil {
		secure = credentials.NewTLS(t.client)
		options = append(options, grpc.Creds(credentials.NewTLS(t.server)))
	}
	server := grpc.NewServer(options...)
	server.RegisterService(&grpcService, nil)
	l := transport{}.listen()
	go server.Serve(l) // until Stop
	dial := func() *grpc.ClientConn {
		return must(grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(secure)))
	}
	conn, ctx := dial(), context.Background()
	return &peer{name: "gRPC", call: func() { echoGRPC(conn) }, client: func() (call, disconnect func()) {
		c := dial()
		return func() { echoGRPC(c) }, func() { c.Close() }
	}, bulk: func(n int64) {
		stream := must(conn.NewStream(ctx, &grpcService.Streams[0], "/bench/Memory", grpc.CallContentSubtype("raw")))
		req := grpcCount(n)
		check(stream.SendMsg(&req))
		check(stream.CloseSend())
		expect("gRPC stream", receiveGRPC(stream), n)
	}, close: func() {
		conn.Close()
		server.Stop()
	}}
}

func echoGRPC(c *grpc.ClientConn) {
	res := new(wrapperspb.BytesValue)
	check(c.Invoke(context.Background(), "/bench/Echo", wrapperspb.Bytes(payload), res))
	expect("gRPC call", int64(len(res.Value)), int64(len(payload)))
}

func receiveGRPC(stream grpc.ClientStream) (total int64) {
	for {
		var got grpcCount
		err := stream.RecvMsg(&got)
		if err == io.EOF {
			return total
		}
		check(err)
		total += int64(got)
	}
}
