package main

import (
	"bytes"
	"io"
	"net/http"
	"strconv"
)

// startHTTP is HTTP/1.1 of net/http: a POST for a call, a chunked body for a stream. Connections are kept.
func startHTTP(t transport) *peer { return startHTTPWith(t, "HTTP/1.1", 32<<10, 0) }

// startHTTPTuned has buffers for nothing but bulk data.
func startHTTPTuned(t transport) *peer {
	return startHTTPWith(t, "HTTP/1.1, 256 KiB buffers", 256<<10, 256<<10)
}

func startHTTPWith(t transport, name string, buffer, readBuffer int) *peer {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /echo", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err == nil {
			w.Write(body)
		}
	})
	mux.HandleFunc("GET /memory", func(w http.ResponseWriter, r *http.Request) {
		n, err := strconv.ParseInt(r.FormValue("n"), 10, 64)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Type", "application/octet-stream")
		plainCopy(w, &memory{left: n}, make([]byte, min(n, int64(buffer))))
	})
	l := t.listen()
	server := &http.Server{Handler: mux}
	go server.Serve(l) // until Close
	base := "http://" + l.Addr().String()
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	tr := &http.Transport{Protocols: &protocols, TLSClientConfig: t.client, MaxIdleConnsPerHost: 1024, ReadBufferSize: readBuffer, DisableCompression: true}
	if t.client != nil {
		base = "https://" + l.Addr().String()
	}
	client := &http.Client{Transport: tr}
	return &peer{name: name, call: func() {
		res := must(client.Post(base+"/echo", "application/octet-stream", bytes.NewReader(payload)))
		expect("HTTP call", int64(len(must(io.ReadAll(res.Body)))), int64(len(payload)))
		check(res.Body.Close())
	}, bulk: func(n int64) {
		res := must(client.Get(base + "/memory?n=" + strconv.FormatInt(n, 10)))
		expect("HTTP body", must(plainCopy(io.Discard, res.Body, make([]byte, min(n, int64(buffer))))), n)
		check(res.Body.Close())
	}, close: func() {
		tr.CloseIdleConnections()
		server.Close()
	}}
}
