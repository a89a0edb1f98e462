package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

// btrfsAttribute and btrfsCommand are parts of a stream.
func btrfsAttribute(kind uint16, value string) []byte {
	b := binary.LittleEndian.AppendUint16(nil, kind)
	return append(binary.LittleEndian.AppendUint16(b, uint16(len(value))), value...)
}

func btrfsCommand(command uint16, attributes ...[]byte) []byte {
	all := bytes.Join(attributes, nil)
	b := binary.LittleEndian.AppendUint32(nil, uint32(len(all)))
	b = binary.LittleEndian.AppendUint16(b, command)
	return append(append(b, 0, 0, 0, 0), all...)
}

func TestBtrfsStreamThatDoesMoreThanMakeItsSnapshotIsRefused(t *testing.T) {
	const write, rename, link, unlink = 15, 9, 10, 11
	device := func(n string) []byte {
		return btrfsCommand(btrfsNode, btrfsAttribute(btrfsPath, "o257-7-0"), btrfsAttribute(btrfsDevice, n))
	}
	good := bytes.Join([][]byte{
		btrfsCommand(write, btrfsAttribute(btrfsPath, "a/.b/..c/d.."), btrfsAttribute(19, strings.Repeat("x", 48<<10))),
		btrfsCommand(btrfsSymlink, btrfsAttribute(btrfsPath, "l"), btrfsAttribute(3, "12345678"), btrfsAttribute(btrfsPathLink, "../../etc")),
		btrfsCommand(20, btrfsAttribute(btrfsPath, "")), // the times of the top folder
		device("\x00\x00\x00\x00\x00\x00\x00\x00"),
	}, nil)
	end := btrfsCommand(btrfsEnd)
	for _, more := range []string{"", "what follows is the child's to refuse"} {
		whole := string(good) + string(end) + more
		for _, r := range []io.Reader{strings.NewReader(whole), iotest.OneByteReader(strings.NewReader(whole))} {
			if got, err := io.ReadAll(&btrfsCommands{r: r}); err != nil || string(got) != whole {
				t.Errorf("%d bytes of %d, %v", len(got), len(whole), err)
			}
		}
	}
	disk := device("\x00\x08\x00\x00\x00\x00\x00\x00")
	if _, err := io.ReadAll(&btrfsCommands{r: bytes.NewReader(append(disk, end...)), devices: true}); err != nil {
		t.Errorf("a device where none can be opened: %v", err)
	}
	for name, bad := range map[string][]byte{
		"a device":               disk,
		"another subvolume":      btrfsCommand(btrfsSubvolume, btrfsAttribute(btrfsPath, "other")),
		"another snapshot":       btrfsCommand(btrfsSnapshot, btrfsAttribute(btrfsPath, "other")),
		"a file beside":          btrfsCommand(3, btrfsAttribute(btrfsPath, "../.good.arriving")),
		"a file further away":    btrfsCommand(unlink, btrfsAttribute(btrfsPath, "a/../../x")),
		"an absolute path":       btrfsCommand(unlink, btrfsAttribute(btrfsPath, "/x")),
		"a NUL":                  btrfsCommand(unlink, btrfsAttribute(btrfsPath, "..\x00a")),
		"renamed to beside":      btrfsCommand(rename, btrfsAttribute(btrfsPath, "a"), btrfsAttribute(btrfsPathTo, "../a")),
		"a link to what is away": btrfsCommand(link, btrfsAttribute(btrfsPath, "a"), btrfsAttribute(btrfsPathLink, "../a")),
		"a clone of it":          btrfsCommand(16, btrfsAttribute(btrfsPath, "a"), btrfsAttribute(btrfsClonePath, "../a")),
		"a mark":                 btrfsCommand(rename, btrfsAttribute(btrfsPath, "a"), btrfsAttribute(btrfsPathTo, "link/.good.arriving")),
		"malformed":              btrfsCommand(unlink, btrfsAttribute(btrfsPath, "abc")[:5]),
		"too long":               {255, 255, 255, 255, write, 0, 0, 0, 0, 0},
	} {
		got, err := io.ReadAll(&btrfsCommands{r: bytes.NewReader(bytes.Join([][]byte{good, bad, end}, nil))})
		if err == nil || !bytes.Equal(got, good) {
			t.Errorf("%s: %v, after %d bytes of %d", name, err, len(got), len(good))
		}
	}
	for n := range device("\x00") { // the last is at the end of a command, but not of the stream
		if _, err := io.ReadAll(&btrfsCommands{r: bytes.NewReader(device("\x00")[:n+1])}); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut after %d: %v", n+1, err)
		}
	}
}
