package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"example.org/rpc"
)

// What else of a stream is of interest. In version 1, the only one that is taken, every command is of at most 64 KiB, header
// and all.
const (
	btrfsVersion    = 1
	btrfsNode       = 5  // command: makes a device
	btrfsSymlink    = 8  // command
	btrfsEnd        = 21 // command
	btrfsDevice     = 8  // attribute: its number; 0 is none but marks what overlayfs has deleted
	btrfsPathTo     = 16 // attribute: of a rename
	btrfsPathLink   = 17 // attribute: what a link is of, and with btrfsSymlink any text
	btrfsClonePath  = 22 // attribute
	maxBtrfsCommand = 64 << 10
)

// btrfsCommands is the rest of a stream, of which each command is looked at before "btrfs receive" gets to see it. That does all
// of them as root, and looks at nothing: "../NAME" as the path of a file is one beside the subvolume, and to make a device
// and then write to it is to write to a disk of this host. The stream must also come to its own end: without, "btrfs
// receive" is content with what it got.
type btrfsCommands struct {
	r       io.Reader
	devices bool   // they are taken: nobody can open them
	buf     []byte // that has room for any command
	rest    []byte // of the command in buf
	ended   bool
	err     error
}

func (c *btrfsCommands) Read(p []byte) (int, error) {
	if c.ended && len(c.rest) == 0 {
		return c.r.Read(p) // nothing, or it is noticed
	}
	for len(c.rest) == 0 && c.err == nil {
		c.err = c.next()
	}
	if len(c.rest) == 0 {
		return 0, c.err
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

// next reads a command.
func (c *btrfsCommands) next() error {
	if c.buf == nil {
		c.buf = make([]byte, maxBtrfsCommand)
	}
	header := c.buf[:btrfsCommandHeader]
	if _, err := io.ReadFull(c.r, header); err != nil {
		return noEOF(err)
	}
	length, command := binary.LittleEndian.Uint32(header), binary.LittleEndian.Uint16(header[4:])
	if length > maxBtrfsCommand-btrfsCommandHeader {
		return rpc.Errorf(rpc.InvalidArgument, "the stream has a command of %d bytes", length)
	}
	all := c.buf[:btrfsCommandHeader+length]
	if _, err := io.ReadFull(c.r, all[btrfsCommandHeader:]); err != nil {
		return noEOF(err)
	}
	if err := checkBtrfsCommand(command, all[btrfsCommandHeader:], c.devices); err != nil {
		return rpc.Errorf(rpc.InvalidArgument, "the stream's command %d: %v", command, err)
	}
	c.rest, c.ended = all, command == btrfsEnd
	return nil
}

func checkBtrfsCommand(command uint16, b []byte, devices bool) error {
	if command == btrfsSubvolume || command == btrfsSnapshot {
		return errors.New("it has another version, besides the one that was asked for")
	}
	for len(b) > 0 {
		if len(b) < 4 || int(binary.LittleEndian.Uint16(b[2:])) > len(b)-4 {
			return errors.New("it is malformed")
		}
		end := 4 + int(binary.LittleEndian.Uint16(b[2:]))
		kind, value := binary.LittleEndian.Uint16(b), string(b[4:end])
		b = b[end:]
		switch {
		case kind == btrfsPath, kind == btrfsPathTo, kind == btrfsClonePath, kind == btrfsPathLink && command != btrfsSymlink:
			if leadsOut(value) {
				return fmt.Errorf("path %.300q leads out of its snapshot", value)
			}
			if name := path.Base(value); name[0] == '.' && strings.HasSuffix(name, arrivingSuffix) {
				return fmt.Errorf("path %.300q: such a name says that a version is arriving, and a symbolic link may lead to one", value)
			}
		case kind == btrfsDevice && command == btrfsNode && !devices && strings.Trim(value, "\x00") != "":
			return errors.New("there is a device in the snapshot, and whoever sends it could write to that here; it is taken if the store is mounted with nodev")
		}
	}
	return nil
}

// leadsOut tells whether the path is one that a sender of a subvolume never gives: the kernel's are relative, and plain. The top
// folder itself is "".
func leadsOut(file string) bool {
	if file == "" {
		return false
	}
	for name := range strings.SplitSeq(file, "/") {
		if name == "" || name == "." || name == ".." || strings.Contains(name, "\x00") {
			return true
		}
	}
	return false
}
