// This program is measured: see size.go.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"example.org/rpc"
)

type handler struct{ rpc.UnimplementedHandler }

func (handler) Send(context.Context, *rpc.SendReq) (*rpc.SendRes, io.ReadCloser, error) {
	return &rpc.SendRes{}, os.Stdin, nil
}

func main() {
	l, err := rpc.ListenTCP("127.0.0.1:0", map[string]string{"127.0.0.1": "client"})
	if err != nil {
		fmt.Println(err)
		return
	}
	s := rpc.NewServer(handler{}, rpc.ServerConfig{})
	go s.Serve(l)
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	c := rpc.NewClient(&rpc.TCPConnecter{Addr: l.Addr().String()}, rpc.ClientConfig{})
	c.ListFilesystems(ctx, &rpc.ListFilesystemReq{})
	_, stream, err := c.Send(ctx, &rpc.SendReq{})
	if err != nil {
		fmt.Println(err)
		return
	}
	io.Copy(os.Stdout, stream)
}
