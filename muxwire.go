package main

// The messages of OpenSSH's multiplexing protocol: pure encoding and decoding. Numbers are big-endian; a
// message is its length, its type and its fields; a string is its length and its bytes.

import (
	"encoding/binary"
	"fmt"
	"io"
)

const (
	muxVersion  = 4
	muxMaxFrame = 256 << 10 // bytes after the length field; OpenSSH's own limit

	muxHello      = 0x00000001
	muxNewSession = 0x10000002
	muxAliveCheck = 0x10000004
	muxTerminate  = 0x10000005
	muxOpenFwd    = 0x10000006
	muxCloseFwd   = 0x10000007

	muxOK            = 0x80000001
	muxDenied        = 0x80000002
	muxFailure       = 0x80000003
	muxExit          = 0x80000004
	muxAlive         = 0x80000005
	muxSessionOpened = 0x80000006
	muxTTYAllocFail  = 0x80000008
)

// muxFrame is a message being written: length, type, then its fields.
type muxFrame struct{ b []byte }

func newMuxFrame(typ uint32) *muxFrame { return (&muxFrame{make([]byte, 4, 64)}).u32(typ) }

func (f *muxFrame) u32(v uint32) *muxFrame {
	f.b = binary.BigEndian.AppendUint32(f.b, v)
	return f
}

func (f *muxFrame) str(s string) *muxFrame {
	f.b = append(f.u32(uint32(len(s))).b, s...)
	return f
}

func (f *muxFrame) bytes() []byte {
	binary.BigEndian.PutUint32(f.b, uint32(len(f.b)-4))
	return f.b
}

// muxMsg is a message from the master; the fields that its type lacks are zero.
type muxMsg struct {
	typ, id uint32 // id: the request it answers; of muxExit and muxTTYAllocFail the session
	value   uint32 // the version, process id, session id or exit code
	text    string // the reason of a refusal, as it came
}

// readMuxMsg reads one message and nothing beyond it. Between two messages the end of r is io.EOF.
func readMuxMsg(r io.Reader) (muxMsg, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return muxMsg{}, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > muxMaxFrame {
		return muxMsg{}, fmt.Errorf("mux protocol: a message of %d bytes", n)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err == io.EOF {
		return muxMsg{}, io.ErrUnexpectedEOF
	} else if err != nil {
		return muxMsg{}, err
	}
	return decodeMuxMsg(b)
}

// decodeMuxMsg reads a message without its length. Like ssh it lets a newer master append to what it knows.
func decodeMuxMsg(b []byte) (muxMsg, error) {
	short := false
	str := func(n uint32) (s []byte) {
		if short = short || uint64(n) > uint64(len(b)); !short {
			s, b = b[:n], b[n:]
		}
		return s
	}
	u32 := func() (v uint32) {
		if s := str(4); s != nil {
			v = binary.BigEndian.Uint32(s)
		}
		return v
	}
	m := muxMsg{typ: u32()}
	switch m.typ {
	case muxHello: // then pairs of strings, a name and its value, for extensions
		m.value = u32()
		for len(b) > 0 && !short {
			str(u32())
			str(u32())
		}
	case muxOK, muxTTYAllocFail:
		m.id = u32()
	case muxDenied, muxFailure:
		m.id = u32()
		m.text = string(str(u32()))
	case muxExit, muxAlive, muxSessionOpened:
		m.id, m.value = u32(), u32()
	default:
		if !short {
			return muxMsg{}, fmt.Errorf("mux protocol: unknown message 0x%08x", m.typ)
		}
	}
	if short {
		return muxMsg{}, fmt.Errorf("mux protocol: message 0x%08x is cut off", m.typ)
	}
	return m, nil
}
