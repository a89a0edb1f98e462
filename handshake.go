package rpc

import (
	"io"
	"strconv"
	"strings"
	"time"
)

// The handshake is one text line each way:
//
//	client  ZREPL-RPC 1-1 hb=5000 max=67108864\n
//	server  ZREPL-RPC 1 ok hb=5000 max=67108864\n
//	server  ZREPL-RPC 1-1 refused permission-denied client "db7" is not allowed\n
const (
	protocolName = "ZREPL-RPC"
	maxLine      = 512 // a line with its newline: what one may say before anything is known of him
)

// versionRange is a range of protocol versions.
type versionRange struct{ low, high uint64 }

// spoken are the versions that this library speaks.
var spoken = versionRange{1, 1}

func (v versionRange) String() string {
	return strconv.FormatUint(v.low, 10) + "-" + strconv.FormatUint(v.high, 10)
}

// common returns the highest version in both ranges.
func (v versionRange) common(w versionRange) (version uint64, ok bool) {
	version = min(v.high, w.high)
	return version, version >= max(v.low, w.low)
}

func appendPromises(b []byte, p promises) []byte {
	b = append(b, " hb="...)
	b = strconv.AppendInt(b, p.heartbeat.Milliseconds(), 10)
	b = append(b, " max="...)
	b = strconv.AppendInt(b, int64(p.maxBody), 10)
	return append(b, '\n')
}

// appendBanner appends what a client says first.
func appendBanner(b []byte, p promises) []byte {
	return appendPromises(append(b, protocolName+" "+spoken.String()...), p)
}

// appendAnswer appends a server's consent.
func appendAnswer(b []byte, version uint64, p promises) []byte {
	b = append(b, protocolName+" "...)
	b = strconv.AppendUint(b, version, 10)
	return appendPromises(append(b, " ok"...), p)
}

// appendRefusal appends a server's refusal. The reason is made printable and cut to fit a line.
func appendRefusal(b []byte, code Code, reason string) []byte {
	line := protocolName + " " + spoken.String() + " refused " + errorCode(code).String()
	for _, word := range strings.FieldsFunc(reason, func(r rune) bool { return r == ' ' || r == '\t' || r == '\n' }) {
		line += " " + asciiOnly(word)
	}
	if len(line) >= maxLine {
		line = strings.TrimRight(line[:maxLine-1], " ")
	}
	return append(append(b, line...), '\n')
}

func asciiOnly(s string) string {
	return strings.Map(func(r rune) rune {
		if r <= ' ' || r > '~' {
			return '?'
		}
		return r
	}, s)
}

// parseBanner takes a client's line apart.
func parseBanner(line string) (versionRange, promises, error) {
	words := strings.Split(line, " ")
	if len(words) < 2 {
		return versionRange{}, promises{}, malformed("banner", line)
	}
	versions, ok := parseRange(words[1])
	p, okParams := parsePromises(words[2:])
	if !ok || !okParams {
		return versionRange{}, promises{}, malformed("banner", line)
	}
	return versions, p, nil
}

// parseAnswer takes a server's line apart. A refusal is a *HandshakeError without its label.
func parseAnswer(line string) (promises, error) {
	words := strings.SplitN(line, " ", 5)
	if len(words) >= 4 && words[2] == "refused" {
		theirs, ok := parseRange(words[1])
		if !ok {
			return promises{}, malformed("answer", line)
		}
		reason := strings.Join(words[4:], " ")
		return promises{}, &HandshakeError{
			Code: parseCode(words[3]), Reason: reason, Local: spoken.String(), Remote: theirs.String(),
		}
	}
	words = strings.Split(line, " ")
	if len(words) < 3 || words[2] != "ok" {
		return promises{}, malformed("answer", line)
	}
	version, ok := parseNumber(words[1])
	if p, okParams := parsePromises(words[3:]); ok && okParams && spoken.low <= version && version <= spoken.high {
		return p, nil
	}
	return promises{}, malformed("answer", line)
}

func malformed(what, line string) error {
	return &ProtocolError{Reason: "malformed " + what + " " + quoted(line)}
}

func parseRange(word string) (versionRange, bool) {
	low, high, ok := strings.Cut(word, "-")
	l, okLow := parseNumber(low)
	h, okHigh := parseNumber(high)
	return versionRange{l, h}, ok && okLow && okHigh && l <= h
}

// parsePromises reads key=value tokens. Keys that it does not know are for later versions.
func parsePromises(words []string) (promises, bool) {
	p := promises{defaultHeartbeat, defaultMessageSize}
	seen := make(map[string]bool, 2)
	for _, word := range words {
		key, value, ok := strings.Cut(word, "=")
		if !ok || key == "" {
			return p, false
		}
		if key != "hb" && key != "max" {
			continue
		}
		n, ok := parseNumber(value)
		if !ok || seen[key] {
			return p, false
		}
		seen[key] = true
		switch {
		case key == "hb" && int64(n) >= minHeartbeat.Milliseconds() && n <= uint64(maxHeartbeat.Milliseconds()):
			p.heartbeat = time.Duration(n) * time.Millisecond
		case key == "max" && n >= minMessageSize:
			p.maxBody = int(min(n, maxMessageSize))
		default:
			return p, false
		}
	}
	return p, true
}

// parseNumber reads decimal digits and nothing else.
func parseNumber(word string) (uint64, bool) {
	if word == "" || word[0] == '+' {
		return 0, false
	}
	n, err := strconv.ParseUint(word, 10, 64)
	return n, err == nil
}

// lineSource is what a line is read from; buffered are bytes that are at hand without reading.
type lineSource interface {
	io.ByteReader
	buffered() []byte
}

// readLine reads a line of the handshake without its newline. It fails at the first byte that cannot stand there,
// because a peer that speaks something else may never send a newline, or never stop before one.
func readLine(r lineSource) (string, error) {
	const start = protocolName + " "
	line := make([]byte, 0, 64)
	for {
		c, err := r.ReadByte()
		switch {
		case err != nil && len(line) > 0 && err == io.EOF:
			return "", io.ErrUnexpectedEOF
		case err != nil:
			return "", err
		case c == '\n' && len(line) >= len(start) && line[len(line)-1] != ' ':
			return string(line), nil
		}
		line = append(line, c)
		n := len(line)
		wrong := n <= len(start) && c != start[n-1] || c < ' ' || c > '~' || c == ' ' && n > 1 && line[n-2] == ' '
		if wrong || n == maxLine {
			return "", &ProtocolError{Reason: notOurs(append(line, r.buffered()...))}
		}
	}
}

// notOurs describes what a peer seems to speak that does not speak our protocol.
func notOurs(b []byte) string {
	s := string(b)
	speaks := ""
	switch {
	case len(s) >= 2 && (s[0] == 0x16 || s[0] == 0x15) && s[1] == 3: // handshake and alert records, RFC 8446, 5.1
		speaks = "; it seems to speak TLS"
	case hasAnyPrefix(s, "HTTP/", "GET ", "PUT ", "HEAD ", "POST ", "PRI * HTTP/2", "OPTIONS ", "CONNECT ", "DELETE "):
		speaks = "; it seems to speak HTTP"
	case strings.HasPrefix(s, "SSH-"):
		speaks = "; it seems to speak SSH"
	}
	return "the peer does not speak " + protocolName + speaks + ": it sent " + quoted(s[:min(len(s), 32)])
}

func hasAnyPrefix(s string, prefixes ...string) bool {
	for _, p := range prefixes {
		if strings.HasPrefix(s, p) {
			return true
		}
	}
	return false
}

// exactReader reads a line and what follows it without taking a byte more than belongs to them: what comes then is
// somebody else's. ahead is the number of bytes that surely follow the line, so that it need not read byte by byte.
type exactReader struct {
	r     io.Reader
	ahead int
	buf   [1 + maxAhead]byte
	begin int
	end   int
}

// maxAhead is the most that ahead may be: the size of a label.
const maxAhead = 64

func (e *exactReader) buffered() []byte { return e.buf[e.begin:e.end] }

// ReadByte returns the next byte of the line: at least its newline is still to come, and what follows it.
func (e *exactReader) ReadByte() (byte, error) {
	for e.begin == e.end {
		n, err := e.r.Read(e.buf[:1+e.ahead])
		e.begin, e.end = 0, n
		if n == 0 && err != nil {
			return 0, err
		}
	}
	e.begin++
	return e.buf[e.begin-1], nil
}

// Read returns what follows the line.
func (e *exactReader) Read(p []byte) (int, error) {
	if e.begin < e.end {
		n := copy(p, e.buf[e.begin:e.end])
		e.begin += n
		return n, nil
	}
	return e.r.Read(p)
}
