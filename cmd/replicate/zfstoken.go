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

// parseNVList reads an nvlist in its XDR form: four bytes about the encoding, version and flags, then pairs, each of which
// begins with its own length, and at the end a length of 0. Values that are neither a number nor a string are left out.
func parseNVList(packed []byte) (map[string]any, error) {
	const header, xdr = 12, 1
	if len(packed) < header || packed[0] != xdr {
		return nil, errors.New("it is not an XDR list")
	}
	values := make(map[string]any)
	for rest := packed[header:]; ; {
		if len(rest) < 8 {
			return nil, io.ErrUnexpectedEOF
		}
		length := binary.BigEndian.Uint32(rest)
		if length == 0 {
			return values, nil
		}
		if length < 8 || uint64(length) > uint64(len(rest)) {
			return nil, io.ErrUnexpectedEOF
		}
		name, value, err := parseNVPair(rest[8:length])
		if err != nil {
			return nil, err
		}
		if value != nil {
			values[name] = value
		}
		rest = rest[length:]
	}
}

func parseNVPair(b []byte) (name string, value any, err error) {
	name, b, err = xdrString(b)
	if err != nil {
		return "", nil, err
	}
	if len(b) < 8 {
		return "", nil, io.ErrUnexpectedEOF
	}
	kind, b := binary.BigEndian.Uint32(b), b[8:] // what is left out is the number of values, 1
	switch kind {
	case nvUint64:
		if len(b) < 8 {
			return "", nil, io.ErrUnexpectedEOF
		}
		value = binary.BigEndian.Uint64(b)
	case nvString:
		value, _, err = xdrString(b)
	}
	return name, value, err
}

// xdrString reads a length and so many bytes, padded to a multiple of four.
func xdrString(b []byte) (s string, rest []byte, err error) {
	if len(b) < 4 {
		return "", nil, io.ErrUnexpectedEOF
	}
	n := uint64(binary.BigEndian.Uint32(b))
	padded := (n + 3) &^ 3
	if padded > uint64(len(b)-4) {
		return "", nil, io.ErrUnexpectedEOF
	}
	return string(b[4 : 4+n]), b[4+padded:], nil
}

func (t zfsToken) point() ResumePoint {
	_, name, _ := strings.Cut(t.toName, "@")
	return ResumePoint{Name: name, GUID: t.toGUID, From: t.fromGUID, Offset: t.bytes}
}
