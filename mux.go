package rpc

import (
	"context"
	"io"
	"net"
	"strings"
	"sync"
)

// labelSize is the size of a label on the wire: 1 to 64 bytes of [a-z0-9_.-], then NULs.
const labelSize = 64

// The labels that the library serves itself; Dial and HandleLabel refuse them.
const (
	labelControl = "zrepl_control"
	labelData    = "zrepl_data"
)

func validLabel(label string) bool {
	if len(label) < 1 || len(label) > labelSize {
		return false
	}
	for i := range len(label) {
		if c := label[i]; !('a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '_' || c == '.' || c == '-') {
			return false
		}
	}
	return true
}

// userLabel returns why a label cannot be a user's own, or "".
func userLabel(label string) string {
	switch {
	case label == labelControl || label == labelData:
		return "label " + quoted(label) + " is the library's own"
	case !validLabel(label):
		return "label " + quoted(label) + " is not 1 to 64 bytes of a-z, 0-9, _, . and -"
	}
	return ""
}

func appendLabel(b []byte, label string) []byte {
	b = append(b, label...)
	return append(b, make([]byte, labelSize-len(label))...)
}

// readLabel reads the 64 bytes of a label. One that is malformed is returned as it is, without its trailing NULs:
// nobody serves it.
func readLabel(r io.Reader) (string, error) {
	var b [labelSize]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return "", err
	}
	return strings.TrimRight(string(b[:]), "\x00"), nil
}

// labelHandler serves a connection to a label of the user's own.
type labelHandler func(ctx context.Context, conn net.Conn)

// labelMux knows who serves the labels of the user's own.
type labelMux struct {
	mu       sync.RWMutex
	handlers map[string]labelHandler
}

// add tells whether the label was still free.
func (m *labelMux) add(label string, h labelHandler) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.handlers[label] != nil {
		return false
	}
	if m.handlers == nil {
		m.handlers = make(map[string]labelHandler)
	}
	m.handlers[label] = h
	return true
}

// lookup returns nil for a label that nobody serves.
func (m *labelMux) lookup(label string) labelHandler {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.handlers[label]
}
