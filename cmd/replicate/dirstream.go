package main

import (
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"example.org/rpc"
)

// A version's stream is one line of fixed length and then the file's bytes from offset to size. The line makes it certain
// that what arrives belongs behind what the receiver has: nothing else in the protocol tells the receiver where a resumed
// stream begins.
const (
	streamMagic     = "replicate-dir 1 "
	streamHeaderLen = len(streamMagic) + 3*len("0123456789abcdef\n")
)

type streamHeader struct {
	guid         uint64
	offset, size int64 // where the stream begins, and where the version ends
}

func (h streamHeader) encode() []byte {
	return fmt.Appendf(nil, "%s%016x %016x %016x\n", streamMagic, h.guid, h.offset, h.size)
}

// readStreamHeader reads the line and not a byte more.
func readStreamHeader(r io.Reader) (streamHeader, error) {
	line := make([]byte, streamHeaderLen)
	if _, err := io.ReadFull(r, line); err == io.EOF {
		return streamHeader{}, rpc.Errorf(rpc.DataLoss, "the stream is empty")
	} else if err != nil {
		return streamHeader{}, fmt.Errorf("first line of the stream: %w", err)
	}
	rest, ok := strings.CutPrefix(string(line), streamMagic)
	if !ok {
		return streamHeader{}, rpc.Errorf(rpc.InvalidArgument, "this is not the stream of a dir: store: it begins with %q", line[:16])
	}
	fields := strings.Split(strings.TrimSuffix(rest, "\n"), " ")
	if len(fields) != 3 || len(rest) != streamHeaderLen-len(streamMagic) {
		return streamHeader{}, rpc.Errorf(rpc.InvalidArgument, "malformed first line of a stream: %q", line)
	}
	var values [3]uint64
	for i, field := range fields {
		if _, err := hex.DecodeString(field); err != nil || len(field) != 16 {
			return streamHeader{}, rpc.Errorf(rpc.InvalidArgument, "malformed first line of a stream: %q", line)
		}
		values[i], _ = strconv.ParseUint(field, 16, 64)
	}
	h := streamHeader{guid: values[0], offset: int64(values[1]), size: int64(values[2])}
	if h.offset < 0 || h.size < 0 || h.offset > h.size {
		return streamHeader{}, rpc.Errorf(rpc.InvalidArgument, "malformed first line of a stream: %q", line)
	}
	return h, nil
}

// versionStream is a version on its way out. It ends with io.EOF only if the file did not change meanwhile.
type versionStream struct {
	header []byte // what is left of it
	file   *os.File
	info   fs.FileInfo // of the file when it was opened
	left   int64       // bytes of the file that are still to be read
}

// newVersionStream owns the file unless it fails.
func newVersionStream(file *os.File, point ResumePoint) (*versionStream, error) {
	info, err := file.Stat()
	if err != nil {
		return nil, withoutPath(err)
	}
	if guid := versionOf(point.Name, info).GUID; guid != point.GUID {
		return nil, rpc.Errorf(rpc.NotFound, "version %q is %016x now, asked for is %016x", point.Name, guid, point.GUID)
	}
	if point.Offset > uint64(info.Size()) {
		return nil, rpc.Errorf(rpc.OutOfRange, "version %q has %d bytes, the resume token asks for those from %d on",
			point.Name, info.Size(), point.Offset)
	}
	offset := int64(point.Offset)
	if _, err := file.Seek(offset, io.SeekStart); err != nil {
		return nil, withoutPath(err)
	}
	header := streamHeader{guid: point.GUID, offset: offset, size: info.Size()}
	return &versionStream{header: header.encode(), file: file, info: info, left: info.Size() - offset}, nil
}

// size is how many bytes are still to be read.
func (s *versionStream) size() uint64 { return uint64(len(s.header)) + uint64(s.left) }

func (s *versionStream) Read(p []byte) (int, error) {
	switch {
	case len(p) == 0:
		return 0, nil
	case len(s.header) > 0:
		n := copy(p, s.header)
		s.header = s.header[n:]
		return n, nil
	case s.left == 0:
		return 0, s.end()
	}
	n, err := s.file.Read(p[:min(int64(len(p)), s.left)])
	s.left -= int64(n)
	if err == io.EOF {
		return n, s.changed()
	}
	return n, withoutPath(err)
}

// end is io.EOF if the file is still what it was.
func (s *versionStream) end() error {
	info, err := s.file.Stat()
	if err != nil {
		return withoutPath(err)
	}
	if info.Size() != s.info.Size() || !info.ModTime().Equal(s.info.ModTime()) {
		return s.changed()
	}
	return io.EOF
}

func (s *versionStream) changed() error {
	return rpc.Errorf(rpc.FailedPrecondition, "version %q changed while it was sent; versions must not change", s.info.Name())
}

func (s *versionStream) Close() error { return s.file.Close() }
