package main

// The client of OpenSSH's multiplexing protocol, version 4, as its PROTOCOL.mux describes it: it asks a
// running ssh master, over its control socket, whether it lives, to open and to cancel forwards, and to end.
// muxsession.go runs commands in sessions of it, muxwire.go has the messages.

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"strings"
	"syscall"
	"time"
)

// muxChunk is how many forwards are sent ahead of their replies: these fit in any socket's buffer (8 KiB on macOS).
const muxChunk = 64

// muxError is the master's answer that it will not or cannot do what it was asked. Unlike every other
// error it leaves the connection usable.
type muxError struct {
	denied bool // by the user's ssh (ControlMaster ask), rather than failed
	reason string
}

func (e *muxError) Error() string { return "refused by ssh: " + e.reason }

// muxConn is one connection to the control socket of a running ssh master. It is not safe for concurrent
// use, but for Close. After any error that is not a *muxError it is good for Close alone.
type muxConn struct {
	conn *net.UnixConn
	r    *bufio.Reader
	rid  uint32 // of the last request
}

// muxDial connects to the control socket at path and exchanges greetings. The caller closes the result.
func muxDial(path string, timeout time.Duration) (*muxConn, error) {
	deadline := time.Now().Add(timeout)
	conn, err := net.DialTimeout("unix", path, timeout)
	if err != nil {
		return nil, fmt.Errorf("connect to the ssh control socket: %w", err)
	}
	m := &muxConn{conn: conn.(*net.UnixConn), r: bufio.NewReader(conn)}
	if err := m.hello(deadline); err != nil {
		conn.Close()
		return nil, fmt.Errorf("greet the ssh master at %s: %w", path, err)
	}
	return m, nil
}

func (m *muxConn) hello(deadline time.Time) error {
	if err := m.send(deadline, newMuxFrame(muxHello).u32(muxVersion).bytes()); err != nil {
		return err
	}
	msg, err := readMuxMsg(m.r)
	if err != nil {
		return err
	}
	if msg.typ != muxHello {
		return fmt.Errorf("mux protocol: message 0x%08x instead of a greeting", msg.typ)
	}
	if msg.value != muxVersion {
		return fmt.Errorf("it speaks version %d of the multiplexing protocol, not %d: use another OpenSSH", msg.value, muxVersion)
	}
	return nil
}

func (m *muxConn) Close() error { return m.conn.Close() }

// alive asks the master for its process id, which is never 0.
func (m *muxConn) alive(timeout time.Duration) (pid int, err error) {
	msg, err := m.request(time.Now().Add(timeout), muxAlive, newMuxFrame(muxAliveCheck).u32(m.nextID()))
	if err == nil && (msg.value == 0 || msg.value > math.MaxInt32) {
		err = fmt.Errorf("mux protocol: process id %d", msg.value)
	}
	if err != nil {
		return 0, fmt.Errorf("ask the ssh master whether it is alive: %w", err)
	}
	return int(msg.value), nil
}

// terminate asks the master to end at once, with its forwards and sessions. It often ends before its
// answer is out, so the end of the connection counts as yes.
func (m *muxConn) terminate(timeout time.Duration) error {
	_, err := m.request(time.Now().Add(timeout), muxOK, newMuxFrame(muxTerminate).u32(m.nextID()))
	for _, gone := range []error{io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET, syscall.EPIPE} {
		if errors.Is(err, gone) {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("tell the ssh master to end: %w", err)
	}
	return nil
}

// muxForward is one local forward to open, or to cancel. The master finds the one to cancel by all four fields.
type muxForward struct {
	cancel      bool
	listenHost  string // an address; "localhost" may listen on ::1 alone
	listenPort  uint16
	connectHost string // looked up by the server
	connectPort uint16
}

// check refuses what means something else to the master than it says (an empty host, port 0), or what
// makes it hang up on all the others (a NUL).
func (f muxForward) check() error {
	for _, host := range []string{f.listenHost, f.connectHost} {
		if host == "" || len(host) > 1024 || strings.ContainsRune(host, 0) {
			return fmt.Errorf("%q is no host to forward between", host)
		}
	}
	if f.listenPort == 0 || f.connectPort == 0 {
		return errors.New("port 0 cannot be forwarded")
	}
	return nil
}

// forward has the master do all ops, in order, and returns a result for each: nil, or a *muxError with the
// master's refusal, or another error for one that makes no sense and was not sent. To open a forward that
// is open already is well. The timeout is that of muxChunk ops. An err means that the connection is unusable, and which ops were done unknown.
func (m *muxConn) forward(ops []muxForward, timeout time.Duration) (results []error, err error) {
	results = make([]error, len(ops))
	for start := 0; start < len(ops); start += muxChunk {
		end := min(start+muxChunk, len(ops))
		ids := make([]uint32, end-start) // 0 for those not sent
		var out []byte
		for i, op := range ops[start:end] {
			if results[start+i] = op.check(); results[start+i] != nil {
				continue
			}
			typ := uint32(muxOpenFwd)
			if op.cancel {
				typ = muxCloseFwd
			}
			const local = 1
			ids[i] = m.nextID()
			out = append(out, newMuxFrame(typ).u32(ids[i]).u32(local).str(op.listenHost).u32(uint32(op.listenPort)).
				str(op.connectHost).u32(uint32(op.connectPort)).bytes()...)
		}
		if err := m.send(time.Now().Add(timeout), out); err != nil {
			return nil, fmt.Errorf("send forwards to the ssh master: %w", err)
		}
		for i, id := range ids {
			if id == 0 {
				continue
			}
			_, err := m.reply(id, muxOK)
			if refused := (*muxError)(nil); err != nil && !errors.As(err, &refused) {
				return nil, fmt.Errorf("have the ssh master forward %s port %d: %w", ops[start+i].listenHost, ops[start+i].listenPort, err)
			}
			results[start+i] = err
		}
	}
	return results, nil
}

// nextID skips 0, which stands for none, also when the count wraps.
func (m *muxConn) nextID() uint32 {
	if m.rid++; m.rid == 0 {
		m.rid = 1
	}
	return m.rid
}

// send writes whole frames. The deadline holds for the replies too, until the next send.
func (m *muxConn) send(deadline time.Time, b []byte) error {
	if err := m.conn.SetDeadline(deadline); err != nil {
		return err
	}
	_, err := m.conn.Write(b)
	return err
}

// request sends the request that m.rid numbers and waits for its reply, of type want or a refusal.
func (m *muxConn) request(deadline time.Time, want uint32, f *muxFrame) (muxMsg, error) {
	if err := m.send(deadline, f.bytes()); err != nil {
		return muxMsg{}, err
	}
	return m.reply(m.rid, want)
}

// reply reads the next message, which must answer request rid: a refusal comes as *muxError.
func (m *muxConn) reply(rid, want uint32) (muxMsg, error) {
	msg, err := readMuxMsg(m.r)
	switch {
	case err != nil:
		return muxMsg{}, err
	case msg.typ != want && msg.typ != muxDenied && msg.typ != muxFailure:
		return muxMsg{}, fmt.Errorf("mux protocol: message 0x%08x instead of 0x%08x", msg.typ, want)
	case msg.id != rid:
		return muxMsg{}, fmt.Errorf("mux protocol: reply to request %d instead of %d", msg.id, rid)
	case msg.typ != want:
		return muxMsg{}, &muxError{denied: msg.typ == muxDenied, reason: printable(msg.text, maxText)}
	}
	return msg, nil
}
