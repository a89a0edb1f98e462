package main

import (
	"compress/zlib"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
)

// zfsToken is what a receive_resume_token says. It is read here, not by "zfs send -nvt": it comes from a peer, and what it
// names must be known before any command gets to see it.
type zfsToken struct {
	toName   string // DATASET@SNAPSHOT at the sender
	toGUID   uint64
	fromGUID uint64 // 0: a full stream
	bytes    uint64 // that have been received
	raw      bool   // what is encrypted is sent as it is
}

// The limits are far above what a token holds: a few numbers and a name.
const (
	maxTokenBytes  = 8 << 10
	maxTokenPacked = 64 << 10
)

// parseZFSToken reads 1-CHECKSUM-SIZE-DATA, where DATA is the hexadecimal form of a compressed list of names and values,
// and SIZE the length of that list.
func parseZFSToken(token string) (zfsToken, error) {
	fields := strings.Split(token, "-")
	if len(fields) != 4 || fields[0] != "1" || len(token) > maxTokenBytes {
		return zfsToken{}, fmt.Errorf("resume token %.100q is not one of zfs", token)
	}
	for _, field := range fields {
		if strings.Trim(field, "0123456789abcdef") != "" {
			return zfsToken{}, fmt.Errorf("resume token %.100q is not one of zfs", token)
		}
	}
	t, err := decodeZFSToken(fields[3])
	if err != nil {
		return zfsToken{}, fmt.Errorf("resume token %.100q is malformed: %w", token, err)
	}
	return t, nil
}

func decodeZFSToken(data string) (zfsToken, error) {
	compressed, err := hex.DecodeString(data)
	if err != nil {
		return zfsToken{}, err
	}
	unpacker, err := zlib.NewReader(strings.NewReader(string(compressed)))
	if err != nil {
		return zfsToken{}, err
	}
	packed, err := io.ReadAll(io.LimitReader(unpacker, maxTokenPacked))
	if err != nil {
		return zfsToken{}, err
	}
	values, err := parseNVList(packed)
	if err != nil {
		return zfsToken{}, err
	}
	var t zfsToken
	t.toName, _ = values["toname"].(string)
	for name, field := range map[string]*uint64{"toguid": &t.toGUID, "fromguid": &t.fromGUID, "bytes": &t.bytes} {
		*field, _ = values[name].(uint64)
	}
	_, t.raw = values["rawok"]
	if t.toName == "" || t.toGUID == 0 {
		return zfsToken{}, errors.New("it does not say what is sent")
	}
	return t, nil
}

// The types of an nvlist's values that are of interest.
const (
	nvUint64 = 8
	nvString = 9
)

// parseNVList reads an nvlist in the native form of the host that packed it: a byte for the form, one for the byte order, two
// of nothing, version and flags, then pairs, each of which begins with its length, and at the end a length of 0. Values that
// are neither a number nor a string are nil. A name that is there twice is refused: zfs might take the other one.
func parseNVList(packed []byte) (map[string]any, error) {
	const header, native = 12, 0
	if len(packed) < header || packed[0] != native {
		return nil, errors.New("it is not a native list")
	}
	var order binary.ByteOrder = binary.BigEndian
	if packed[1] != 0 {
		order = binary.LittleEndian
	}
	values := make(map[string]any)
	for rest := packed[header:]; ; {
		if len(rest) < 4 {
			return nil, io.ErrUnexpectedEOF
		}
		length := order.Uint32(rest)
		if length == 0 {
			return values, nil
		}
		if uint64(length) > uint64(len(rest)) {
			return nil, io.ErrUnexpectedEOF
		}
		name, value, err := parseNVPair(order, rest[:length])
		if err != nil {
			return nil, err
		}
		if _, twice := values[name]; twice || strings.Contains(name, "\x00") {
			return nil, fmt.Errorf("the name %.100q is there twice, or ends before its end", name)
		}
		values[name] = value
		rest = rest[length:]
	}
}

// parseNVPair reads a pair: its length u32, that of the name with its NUL u16, u16 of nothing, number of values u32 and type
// u32, then name and value, each padded to a multiple of eight.
func parseNVPair(order binary.ByteOrder, b []byte) (name string, value any, err error) {
	const header = 16
	if len(b) < header {
		return "", nil, io.ErrUnexpectedEOF
	}
	end := header + int(order.Uint16(b[4:]))
	valueAt := (end + 7) &^ 7
	if end == header || valueAt > len(b) {
		return "", nil, io.ErrUnexpectedEOF
	}
	kind, name, b := order.Uint32(b[12:]), string(b[header:end-1]), b[valueAt:]
	switch {
	case kind == nvUint64 && len(b) < 8:
		return "", nil, io.ErrUnexpectedEOF
	case kind == nvUint64:
		value = order.Uint64(b)
	case kind == nvString:
		text, _, _ := strings.Cut(string(b), "\x00")
		value = text
	}
	return name, value, nil
}

func (t zfsToken) point() ResumePoint {
	_, name, _ := strings.Cut(t.toName, "@")
	return ResumePoint{Name: name, GUID: t.toGUID, From: t.fromGUID, Offset: t.bytes}
}
