//go:build !rpc_notls

package chaos_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"runtime/metrics"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"example.org/rpc"
)

// A fuzz input is a program: what a peer does, step by step, to a live server or a live client in a bubble of time. At
// its end everything is let go, and what must hold is checked: nobody hangs, nothing is left, no stream was complete that
// was not, every call has at most one reply, and an honest peer is served.

const (
	programSlots    = 4   // connections at a time
	programMaxSteps = 200 // of one program
	programHandlers = 8   // MaxHandlers
	programRoom     = 64 << 10
)

// program is an input that is read byte by byte; when it is over it is all zeroes.
type program struct {
	code  []byte
	steps int
}

func (p *program) next() byte {
	if len(p.code) == 0 {
		return 0
	}
	b := p.code[0]
	p.code = p.code[1:]
	return b
}

func (p *program) bytes(n int) string {
	n = min(n, len(p.code))
	b := p.code[:n]
	p.code = p.code[n:]
	return string(b)
}

func (p *program) running() bool {
	p.steps++
	return len(p.code) > 0 && p.steps <= programMaxSteps
}

// stalls are how long a program can wait at a time.
var stalls = [...]time.Duration{time.Millisecond, 20 * time.Millisecond, 100 * time.Millisecond, 1100 * time.Millisecond,
	6 * time.Second, 16 * time.Second, 61 * time.Second, 310 * time.Second}

// runProgram runs f in a bubble, and bounds what it allocates.
func runProgram(t *testing.T, input []byte, f func(t *testing.T, p *program)) {
	if len(input) < 2 || len(input) > 4096 {
		t.Skip("no program, or more than its steps")
	}
	before := allocated()
	synctest.Test(t, func(t *testing.T) { f(t, &program{code: input}) })
	if n := allocated() - before; n > 48<<20 {
		t.Errorf("%d bytes were allocated for a program of %d", n, len(input))
	}
}

func allocated() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

// enemy is a connection of which a program has one end.
type enemy struct {
	conn  *memConn
	label string
	index uint64 // seeds its streams
	clean bool   // nothing but proper frames were sent

	mu    sync.Mutex
	got   bytes.Buffer // what the library has said
	ended bool         // it has closed
	pause gate
	done  chan struct{}

	sent     bytes.Buffer
	cutNext  int // the next frame is cut after so many bytes, -1: not
	flipNext int // bit of the next frame to flip, -1: none
	lastID   uint64
	calls    map[uint64]string
	data     int64     // bytes of the stream that is being sent
	stream   io.Reader // of it
	streams  uint64
}

func newEnemy(conn *memConn, index uint64) *enemy {
	e := &enemy{conn: conn, index: index, clean: true, cutNext: -1, flipNext: -1, calls: map[uint64]string{}, done: make(chan struct{})}
	go e.read()
	return e
}

// read takes what comes, unless it is paused.
func (e *enemy) read() {
	defer close(e.done)
	for b := make([]byte, 4096); ; {
		e.pause.wait()
		n, err := e.conn.Read(b)
		e.mu.Lock()
		e.got.Write(b[:n])
		e.ended = err != nil
		e.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (e *enemy) said() (string, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.got.String(), e.ended
}

// say sends a frame or something else, cut or bent if the program has asked for it.
func (e *enemy) say(s string) {
	b := []byte(s)
	if e.flipNext >= 0 && len(b) > 0 {
		b[e.flipNext/8%len(b)] ^= 1 << (e.flipNext % 8)
		e.clean = false
	}
	cut := e.cutNext >= 0 && e.cutNext < len(b)
	if cut {
		b = b[:e.cutNext]
		e.clean = false
	}
	e.cutNext, e.flipNext = -1, -1
	e.conn.SetWriteDeadline(time.Now().Add(2 * time.Second))
	n, err := e.conn.Write(b)
	e.sent.Write(b[:n])
	if err != nil {
		e.clean = false
		e.conn.Close()
	}
	if cut {
		e.conn.CloseWrite()
	}
}

// chunk is the next n bytes of the stream that is being sent.
func (e *enemy) chunk(n int) string {
	if e.stream == nil {
		e.begin()
	}
	b := make([]byte, n)
	io.ReadFull(e.stream, b)
	e.data += int64(n)
	return string(b)
}

// begin begins a stream.
func (e *enemy) begin() {
	e.streams++
	e.stream, e.data = contentForever(e.index<<32|e.streams), 0
}

// letGo ends the enemy.
func (e *enemy) letGo() {
	e.pause.open()
	e.conn.Close()
	<-e.done
}

// frames are those that were said after a line; ok is false if the last one is cut.
func framesAfterLine(s string) (frames []string, ok bool) {
	_, rest, found := strings.Cut(s, "\n")
	if !found {
		return nil, true
	}
	for len(rest) >= 8 {
		n := 8 + int(binary.BigEndian.Uint32([]byte(rest[4:8])))
		if n > len(rest) {
			return frames, false
		}
		frames = append(frames, rest[:n])
		rest = rest[n:]
	}
	return frames, rest == ""
}

var programBanners = [...]string{
	"ZREPL-RPC 1-1 hb=300000 max=67108864\n", "ZREPL-RPC 1-1 hb=5000\n", "ZREPL-RPC 1-1 hb=10 max=65536\n", "ZREPL-RPC 1-7 new=thing hb=300000\n",
}

// serverProgram is a live server and the peers of a program.
type serverProgram struct {
	t       *testing.T
	s       *rpc.Server
	l       *memListener
	release chan struct{} // closed at the end: what blocks goes on
	peers   [programSlots]*enemy
	all     []*enemy
	opened  atomic.Int64 // sources
	closed  atomic.Int64 // of them
	running atomic.Int64
	peak    atomic.Int64
	stopped bool // Shutdown was called

	mu      sync.Mutex
	uploads []programUpload
}

// programUpload is an upload that its handler has read to io.EOF.
type programUpload struct {
	req  string
	data string
}

// programSource counts how often it is closed.
type programSource struct {
	io.Reader
	closed func()
	once   sync.Once
}

func (s *programSource) Close() error { s.once.Do(s.closed); return nil }

func (p *serverProgram) enter() func() {
	n := p.running.Add(1)
	for old := p.peak.Load(); n > old && !p.peak.CompareAndSwap(old, n); old = p.peak.Load() {
	}
	return func() { p.running.Add(-1) }
}

// service does what the first letter of a request says.
func (p *serverProgram) service() service {
	return service{
		call: func(ctx context.Context, req string) (string, error) {
			defer p.enter()()
			switch (req + "e")[0] {
			case 'b': // until it is cancelled
				<-ctx.Done()
				return "", ctx.Err()
			case 's': // stubborn
				<-p.release
			case 'p':
				panic("a handler's")
			case 'l':
				return strings.Repeat("large ", 4000), nil
			case 'f':
				return "", rpc.Errorf(rpc.NotFound, "")
			}
			return req, nil
		},
		get: func(ctx context.Context, req string) (string, io.ReadCloser, error) {
			leave := p.enter() // the handler's place is taken until the stream is closed
			var r io.Reader = strings.NewReader(req)
			switch (req + "e")[0] {
			case 'n':
				leave()
				return req, nil, nil
			case 'f':
				leave()
				return "", nil, rpc.Errorf(rpc.NotFound, "")
			case 'b':
				r = readerFunc(func([]byte) (int, error) { <-ctx.Done(); return 0, ctx.Err() })
			case 'p':
				r = readerFunc(func([]byte) (int, error) { panic("a source's") })
			case 'l':
				r = steps{content(1, 300<<10), 20 << 10}
			case 'u':
				r = readerFunc(func([]byte) (int, error) { return 0, io.ErrUnexpectedEOF })
			}
			p.opened.Add(1)
			return req, &programSource{Reader: r, closed: func() { p.closed.Add(1); leave() }}, nil
		},
		put: func(ctx context.Context, req string, r io.Reader) (string, error) {
			defer p.enter()()
			switch (req + "e")[0] {
			case 'b':
				<-ctx.Done()
				return "", ctx.Err()
			case 'p':
				panic("a handler's")
			case 'm': // in the middle
				_, err := io.ReadFull(r, make([]byte, 5))
				return req, err
			case 'n':
				return req, nil
			case 'f':
				return "", rpc.Errorf(rpc.NotFound, "")
			}
			var data bytes.Buffer
			_, err := io.Copy(&data, r)
			if err == nil {
				p.mu.Lock()
				p.uploads = append(p.uploads, programUpload{req, data.String()})
				p.mu.Unlock()
			}
			return req, err
		},
		own: func(ctx context.Context, conn net.Conn) { defer p.enter()(); io.Copy(conn, conn) },
	}
}

// programKinds are the first letters of requests.
const programKinds = "ebsplfnum"

// open opens a connection in a slot: the one that was there goes on without the program.
func (p *serverProgram) open(slot int, name, banner string) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	conn, err := p.l.Connect(ctx)
	if err != nil { // it has shut down
		return
	}
	e := newEnemy(conn.(*memConn), uint64(len(p.all)+1))
	e.label = name
	p.peers[slot] = e
	p.all = append(p.all, e)
	e.say(banner + label(name))
	if banner == programBanners[1] || banner == programBanners[2] {
		e.clean = false // it does not keep what it promises
	}
}

// step does what the next bytes of a program say.
func (p *serverProgram) step(prog *program) {
	op, arg := prog.next(), prog.next()
	slot := int(arg) % programSlots
	e := p.peers[slot]
	if e == nil && op%20 > 3 {
		op = op % 4
	}
	request := func() string {
		return string(programKinds[int(arg>>2)%len(programKinds)]) + strconv.Itoa(slot) + "." + strconv.Itoa(prog.steps)
	}
	op %= 20
	if 4 <= op && op <= 5 && e.label != "zrepl_control" || 6 <= op && op <= 10 && e.label != "zrepl_data" {
		e.clean = false // these frames do not belong there
	}
	switch op {
	case 0:
		p.open(slot, "zrepl_control", programBanners[arg>>2&3])
	case 1:
		p.open(slot, "zrepl_data", programBanners[arg>>2&3])
	case 2:
		p.open(slot, "own", programBanners[arg>>2&3])
	case 3: // in mid preface
		if p.open(slot, "zrepl_data", ""); p.peers[slot] != nil {
			p.peers[slot].clean = false
		}
	case 4:
		e.lastID += 1 + uint64(arg>>6)
		req := request()
		e.calls[e.lastID] = req
		e.say(frame(tCall, e.lastID, uint64(0), str8("call"), ping(req)))
	case 5:
		e.say(frame(tCancel, e.lastID-min(e.lastID, uint64(arg>>2&3))))
		e.clean = e.clean && e.lastID > uint64(arg>>2&3)
	case 6:
		e.say(getFrame(request()))
	case 7:
		e.say(putFrame(request()))
		e.begin()
	case 8:
		e.say(frame(tData, e.chunk(1+int(arg>>2)*int(arg>>2))))
	case 9:
		total := uint64(e.data)
		if arg>>2 == 9 {
			total++
			e.clean = false
		}
		e.say(frame(tEnd, total))
	case 10:
		e.say(frame(tFail, int(arg>>2)%20, "the source's"))
	case 11:
		e.say(frame(tHeartbeat))
	case 12:
		e.clean = false
		e.say(prog.bytes(int(arg >> 2)))
	case 13:
		e.cutNext = int(arg >> 2)
	case 14:
		e.flipNext = int(arg>>2)<<3 | int(prog.next()&7)
	case 15:
		e.clean = false
		e.conn.Close()
	case 16:
		e.clean = false
		e.conn.CloseWrite()
	case 17:
		time.Sleep(stalls[int(arg>>2)%len(stalls)])
	case 18:
		if arg>>2&1 == 0 {
			e.pause.close()
		} else {
			e.pause.open()
		}
	case 19:
		p.large(e, arg>>2)
	}
}

// large are claims, floods, and the end.
func (p *serverProgram) large(e *enemy, arg byte) {
	arg %= 6
	if 2 <= arg && arg <= 3 && e.label != "zrepl_control" || arg == 4 && e.label != "zrepl_data" {
		e.clean = false
	}
	switch arg {
	case 0:
		e.clean = false
		e.say(head(tCall, 1<<32-1-int64(arg)))
	case 1:
		e.clean = false
		e.say(head(tDownload, 60<<20) + payload(uint64(0), str8("get"), "x"))
	case 2:
		for range 30 {
			e.lastID++
			e.calls[e.lastID] = "s"
			e.say(callFrame(e.lastID, "s"))
		}
	case 3:
		for range 30 {
			e.lastID++
			e.calls[e.lastID] = "b"
			e.say(callFrame(e.lastID, "b") + frame(tCancel, e.lastID))
		}
	case 4:
		for range 30 {
			e.say(getFrame("e"))
		}
	case 5:
		if !p.stopped {
			p.stopped = true
			go p.s.Shutdown(context.Background())
		}
	}
}

// finish lets everything go and checks what must hold.
func (p *serverProgram) finish() {
	close(p.release)
	for _, e := range p.all {
		e.pause.open()
	}
	time.Sleep(2 * time.Second)
	for _, e := range p.all {
		p.checkPeer(e)
	}
	for _, e := range p.all {
		e.letGo()
	}
	synctest.Wait()
	if !p.stopped {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		c := rpc.NewClient(p.l, rpc.ClientConfig{})
		if err := useAll(ctx, c); err != nil {
			p.t.Errorf("an honest client: %v", err)
		}
		c.Close()
		cancel()
	}
	before := time.Now()
	p.s.Close()
	if took := time.Since(before); took > 20*time.Second {
		p.t.Errorf("Close took %v", took)
	}
	if n := p.s.Stats().OpenConns; n != 0 {
		p.t.Errorf("%d connections are left", n)
	}
	if opened, closed := p.opened.Load(), p.closed.Load(); opened != closed {
		p.t.Errorf("%d sources, of which %d were closed", opened, closed)
	}
	if n := p.running.Load(); n != 0 {
		p.t.Errorf("%d handlers are left", n)
	}
	if n := p.peak.Load(); n > programHandlers {
		p.t.Errorf("%d handlers ran at once", n)
	}
	for _, u := range p.uploads {
		p.checkUpload(u)
	}
}

// checkUpload: an upload that ended cleanly had an end, and if all was proper all of its bytes.
func (p *serverProgram) checkUpload(u programUpload) {
	if u.req == "hello" {
		return // the honest client's
	}
	for _, e := range p.all {
		sent := e.sent.String()
		_, after, ok := strings.Cut(sent, ping(u.req))
		if u.req == "" || !ok {
			continue
		}
		if !strings.Contains(after, frame(tEnd, uint64(len(u.data)))) {
			continue
		}
		if !e.clean {
			return
		}
		v := &bytes.Buffer{}
		frames, _ := framesAfterLine("\n" + after)
		for _, f := range frames {
			if f[0] == tData {
				v.WriteString(f[8:])
			}
			if f[0] == tEnd {
				break
			}
		}
		if v.String() == u.data {
			return
		}
	}
	for _, e := range p.all {
		if !e.clean { // its request may be another than it seems
			return
		}
	}
	p.t.Errorf("the upload of %q was read to io.EOF after %d bytes without having been sent so", u.req, len(u.data))
}

// checkPeer: what a server says is proper, and each call has one reply.
func (p *serverProgram) checkPeer(e *enemy) {
	said, ended := e.said()
	if e.label == "own" || !strings.HasPrefix(said, "ZREPL-RPC 1 ok ") {
		return
	}
	frames, whole := framesAfterLine(said)
	if !whole && !ended {
		p.t.Errorf("the server has stopped in mid frame")
	}
	replies, goaway := map[uint64]int{}, ^uint64(0)
	for _, f := range frames {
		switch kind, body := f[0], f[8:]; {
		case kind == tHeartbeat && body == "":
		case kind == tReply && len(body) >= 9 && body[8] <= 16:
			replies[binary.BigEndian.Uint64([]byte(body))]++
		case kind == tGoaway && len(body) == 8:
			goaway = binary.BigEndian.Uint64([]byte(body))
		case e.label == "zrepl_data" && (kind == tResult || kind == tData || kind == tEnd || kind == tFail):
		default:
			p.t.Errorf("the server said %q", f)
		}
	}
	for id, n := range replies {
		if _, made := e.calls[id]; n > 1 || !made && e.clean {
			p.t.Errorf("%d replies to call %d", n, id)
		}
	}
	if !e.clean || e.label != "zrepl_control" || ended && goaway == ^uint64(0) {
		return
	}
	for id, req := range e.calls {
		if req[0] != 'b' && replies[id] == 0 && id <= goaway {
			p.t.Errorf("no reply to call %d, %q", id, req)
		}
	}
}

// FuzzServerProgram: hostile peers of a server.
func FuzzServerProgram(f *testing.F) {
	for _, seed := range serverSeeds {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, input []byte) {
		runProgram(t, input, func(t *testing.T, prog *program) {
			p := &serverProgram{t: t, l: newMemListener(programRoom), release: make(chan struct{})}
			p.s = p.service().server(rpc.ServerConfig{MaxHandlers: programHandlers, MaxConns: 64})
			served := async(func() error { return p.s.Serve(p.l.listener()) })
			for prog.running() {
				p.step(prog)
			}
			p.finish()
			<-served
		})
	})
}

// serverSeeds are programs: pairs of what and how (slot, and in the upper six bits the rest).
var serverSeeds = []string{
	"\x00\x00\x04\x00\x04\x04\x05\x04\x04\x08\x04\x0c\x04\x10\x11\x08",
	"\x01\x01\x06\x01\x06\x19\x11\x04\x06\x11\x11\x08\x0f\x01",
	"\x01\x01\x07\x01\x08\x21\x08\x41\x09\x01\x06\x01\x07\x01\x08\x11\x09\x25",
	"\x01\x02\x07\x02\x08\x22\x0a\x12\x07\x02\x0d\x22\x08\x32",
	"\x02\x03\x0c\x23hello own\x11\x04\x0f\x03",
	"\x03\x00\x11\x14\x03\x01\x03\x02\x03\x03\x0c\x40GET / HTTP/1.1\r\n",
	"\x00\x00\x13\x0a\x13\x0d\x11\x04\x12\x00\x13\x0a\x11\x10\x12\x04",
	"\x01\x00\x13\x10\x13\x11\x11\x08\x00\x01\x13\x01\x01\x02\x13\x06",
	"\x00\x00\x04\x08\x04\x08\x01\x01\x07\x01\x08\x11\x13\x17\x11\x0c\x09\x01\x11\x0c",
	"\x00\x00\x04\x00\x0e\x14\x03\x04\x00\x01\x05\x07\x01\x0e\x10\x02\x08\x21\x09\x01",
	"\x01\x0c\x06\x10\x12\x00\x11\x18\x12\x04\x11\x04\x06\x00",
}

// ---- Against a client ---------------------------------------------------------------------------------------------

// clientProgram is a live client, and the connections of a program that is its server.
type clientProgram struct {
	t     *testing.T
	c     *rpc.Client
	dials int

	mu    sync.Mutex
	conns []*enemy // in the order of their connecting
	ops   []*clientOp
}

// clientOp is a call, a download, an upload or a Dial of the client.
type clientOp struct {
	kind   string
	req    string
	size   int // of an upload's source, -1: it fails
	cancel context.CancelFunc
	done   chan struct{}
	res    string
	data   string
	err    error
}

// connect is the Connecter of the client.
func (p *clientProgram) connect(ctx context.Context) (net.Conn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dials++
	if p.dials%7 == 6 {
		return nil, errors.New("connection refused")
	}
	client, server := memPair(programRoom)
	p.conns = append(p.conns, newEnemy(server, uint64(p.dials)))
	return client, nil
}

// conn is one of the latest connections.
func (p *clientProgram) conn(back int) *enemy {
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.conns) == 0 {
		return nil
	}
	return p.conns[max(0, len(p.conns)-1-back)]
}

func (p *clientProgram) start(kind string, arg byte, step int) {
	ctx, cancel := context.WithCancel(context.Background())
	if arg&1 == 1 {
		ctx, cancel = context.WithTimeout(context.Background(), stalls[int(arg>>1)%len(stalls)])
	}
	o := &clientOp{kind: kind, req: kind + "." + strconv.Itoa(step), cancel: cancel, done: make(chan struct{})}
	p.ops = append(p.ops, o)
	go func() {
		defer close(o.done)
		switch kind {
		case "call":
			o.res, o.err = doCall(ctx, p.c, o.req)
		case "get":
			var data bytes.Buffer
			if arg>>1&3 == 3 { // gives up early
				var res rpc.PingRes
				stream, err := p.c.Download(ctx, "get", &rpc.PingReq{Message: o.req}, &res)
				if o.err = err; err == nil {
					stream.Read(make([]byte, 3))
					o.err = errors.Join(errors.New("given up"), stream.Close())
				}
				break
			}
			o.res, o.err = doGet(ctx, p.c, o.req, &data)
			o.data = data.String()
		case "put":
			o.size = int(arg>>1) * int(arg>>1)
			var source io.Reader = content(uint64(step), int64(o.size))
			switch arg >> 1 & 3 {
			case 2:
				source, o.size = readerFunc(func([]byte) (int, error) { return 0, errors.New("the source's") }), -1
			case 3:
				source, o.size = newGated(source, source), -1 // until it is closed
			}
			o.res, o.err = doPut(ctx, p.c, o.req, source)
		case "own":
			var conn net.Conn
			if conn, o.err = p.c.Dial(ctx, "own"); o.err == nil {
				conn.Close()
				o.err = errors.New("given up")
			}
		}
	}()
}

// requests are what the client has asked on a connection.
func (e *enemy) requests() (frames []string) {
	said, _ := e.said()
	_, rest, ok := strings.Cut(said, "\n")
	if !ok || len(rest) < 64 {
		return nil
	}
	e.label = strings.TrimRight(rest[:64], "\x00")
	all, _ := framesAfterLine("\n" + rest[64:])
	for _, f := range all {
		if f[0] == tCall || f[0] == tDownload || f[0] == tUpload {
			frames = append(frames, f)
		}
	}
	return frames
}

// step does what the next bytes of a program say.
func (p *clientProgram) step(prog *program) {
	op, arg := prog.next(), prog.next()
	e := p.conn(int(arg & 3))
	arg >>= 2
	if e == nil && op%24 > 7 {
		op %= 8
	}
	switch op % 24 {
	case 0, 1:
		p.start("call", arg, prog.steps)
	case 2, 3:
		p.start("get", arg, prog.steps)
	case 4, 5:
		p.start("put", arg, prog.steps)
	case 6:
		p.start("own", arg, prog.steps)
	case 7:
		if len(p.ops) > 0 {
			p.ops[int(arg)%len(p.ops)].cancel()
		}
	case 8:
		e.say([]string{"ZREPL-RPC 1 ok hb=300000 max=67108864\n", "ZREPL-RPC 1 ok hb=10\n", "ZREPL-RPC 1-1 refused unavailable stopping\n",
			"ZREPL-RPC 1-1 refused resource-exhausted full up\n", "ZREPL-RPC 1 ok hb=5000 max=65536\n", "HTTP/1.1 400 Bad Request\r\n\r\n"}[int(arg)%6])
	case 9, 10, 11: // an answer to the oldest request, or another
		p.answerOne(e, arg)
	case 12:
		e.say(frame(tData, e.chunk(1+int(arg)*int(arg))))
	case 13:
		total := uint64(e.data)
		if arg == 9 {
			total++
		}
		e.say(frame(tEnd, total))
	case 14:
		e.say(frame(tFail, int(arg)%20, "the source's"))
	case 15:
		e.say(frame(tGoaway, uint64(arg)%5))
	case 16:
		e.say(frame(tHeartbeat))
	case 17:
		e.clean = false
		e.say(prog.bytes(int(arg)))
	case 18:
		e.cutNext = int(arg)
	case 19:
		e.flipNext = int(arg)<<3 | int(prog.next()&7)
	case 20:
		if arg&1 == 0 {
			e.conn.Close()
		} else {
			e.conn.CloseWrite()
		}
	case 21:
		time.Sleep(stalls[int(arg)%len(stalls)])
	case 22:
		if arg&1 == 0 {
			e.pause.close()
		} else {
			e.pause.open()
		}
	case 23:
		switch arg % 4 {
		case 0:
			p.c.ResetConnectBackoff()
		case 1:
			e.clean = false
			e.say(head(tReply, 1<<32-1))
		case 2:
			e.clean = false
			e.say(head(tResult, 60<<20) + "\x00")
		case 3:
			go p.c.Close()
		}
	}
}

// answerOne answers one of the requests of a connection.
func (p *clientProgram) answerOne(e *enemy, arg byte) {
	requests := e.requests()
	code, body := int(arg>>3)%3, ping("res of "+strconv.Itoa(int(e.index)))
	if code != 0 {
		body = "an error"
	}
	if len(requests) == 0 {
		e.say(frame(tResult, code, body))
		return
	}
	f := requests[min(int(arg&7), len(requests)-1)]
	if f[0] != tCall {
		e.begin()
		e.say(frame(tResult, code, body))
		return
	}
	id := binary.BigEndian.Uint64([]byte(f[8:]))
	if code == 0 {
		body = f[8+8+8+1+4:] // as it came: an echo
	}
	e.say(frame(tReply, id, code, body))
}

// finish ends the client, and checks what must hold.
func (p *clientProgram) finish() {
	time.Sleep(time.Second)
	before := time.Now()
	p.c.Close()
	if took := time.Since(before); took > 20*time.Second {
		p.t.Errorf("Close took %v", took)
	}
	for _, o := range p.ops {
		<-o.done // otherwise a deadlock, which the bubble reports
		o.cancel()
	}
	synctest.Wait()
	for _, e := range p.conns {
		if _, ended := e.said(); !ended && e.pause.shut == nil {
			p.t.Errorf("the client has left a connection open")
		}
		e.letGo()
	}
	if n := p.c.Stats().OpenConns; n != 0 {
		p.t.Errorf("%d connections are left", n)
	}
	if most := 3*len(p.ops) + 2; p.dials > most {
		p.t.Errorf("%d dials for %d operations", p.dials, len(p.ops))
	}
	for _, o := range p.ops {
		if o.err == nil {
			p.checkSuccess(o)
		} else if errors.Is(o.err, io.EOF) {
			p.t.Errorf("%s failed with io.EOF: %v", o.req, o.err)
		}
	}
}

// checkSuccess: what succeeded was answered so.
func (p *clientProgram) checkSuccess(o *clientOp) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, e := range p.conns {
		said, _ := e.said()
		if !strings.Contains(said, ping(o.req)) {
			continue
		}
		sent := e.sent.String()
		switch {
		case o.kind == "call" && e.clean && o.res != o.req:
		case o.kind == "call" && strings.Contains(sent, ping(o.res)):
			return
		case o.kind == "get" && strings.Contains(sent, frame(tEnd, uint64(len(o.data)))):
			return
		case o.kind == "put" && o.size >= 0 && strings.Contains(said, frame(tEnd, uint64(o.size))) && strings.Contains(sent, ping(o.res)):
			return
		}
	}
	p.t.Errorf("%s succeeded with %q and %d bytes, without having been answered so", o.req, o.res, len(o.data))
}

// FuzzClientProgram: a hostile server of a client.
func FuzzClientProgram(f *testing.F) {
	for _, seed := range clientSeeds {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, input []byte) {
		runProgram(t, input, func(t *testing.T, prog *program) {
			p := &clientProgram{t: t}
			p.c = rpc.NewClient(rpc.ConnecterFunc(p.connect), rpc.ClientConfig{})
			for prog.running() {
				p.step(prog)
			}
			p.finish()
		})
	})
}

var clientSeeds = []string{
	"\x00\x00\x08\x00\x09\x00\x00\x00\x0a\x04\x15\x08\x0f\x00\x00\x00",
	"\x02\x00\x08\x00\x09\x00\x0c\x20\x0c\x40\x0d\x00\x02\x00\x09\x04\x0c\x20\x0d\x24",
	"\x02\x00\x08\x00\x09\x00\x0c\x20\x0e\x14\x02\x00\x08\x00\x09\x20\x14\x00",
	"\x04\x40\x08\x00\x15\x08\x09\x00\x04\x10\x15\x08\x09\x04\x04\x40\x09\x20",
	"\x04\x18\x08\x00\x15\x08\x09\x20\x07\x00\x04\x08\x08\x00\x15\x10\x07\x04",
	"\x06\x00\x08\x00\x06\x00\x08\x08\x06\x00\x08\x14\x06\x00\x14\x00",
	"\x00\x00\x02\x00\x04\x40\x08\x01\x08\x02\x08\x00\x17\x04\x17\x08\x17\x0c",
	"\x00\x0c\x00\x08\x15\x10\x08\x08\x15\x10\x08\x00\x09\x00\x13\x20\x03\x09\x00\x12\x14\x09\x00",
	"\x00\x00\x08\x00\x0f\x00\x08\x00\x09\x00\x15\x0c\x14\x00\x00\x00\x08\x00\x09\x00",
}
