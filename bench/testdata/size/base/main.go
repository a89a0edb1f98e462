// This program is measured: see size.go.
package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"os"
	"time"
)

func main() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return
	}
	pem, _ := os.ReadFile("cert")
	cert, _ := tls.X509KeyPair(pem, pem)
	config := &tls.Config{Certificates: []tls.Certificate{cert}}
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		t := tls.Server(c, config)
		t.HandshakeContext(context.Background())
		io.Copy(t, os.Stdin)
	}()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	d := tls.Dialer{Config: config}
	c, err := d.DialContext(ctx, "tcp", l.Addr().String())
	if err != nil {
		fmt.Println(err)
		return
	}
	io.Copy(os.Stdout, c)
}
