package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The client of OpenSSH's multiplexing protocol, version 4, as its PROTOCOL.mux describes it: it asks a
// running ssh master, over its control socket, whether it lives, to open and to cancel forwards, and to end.
// muxsession.go runs commands in sessions of it, muxwire.go has the messages.

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

// A command run in a session of a running ssh master, with pipes of our own as its stdin, stdout and stderr.

// muxTail is how many bytes are kept of what a session's command writes to stderr.
const muxTail = 4 << 10

// muxSession is a running command: Read its stdout, Write its stdin. Read, Write and Close may be called
// at the same time from different goroutines, and Close ends the other two.
//
// Close closes the command's stdin and stdout and asks the server to end the session. A command that looks
// at neither lives on there: sshd sends it no signal.
type muxSession struct {
	mux           *muxConn
	id            uint32 // the master's
	in, out, errs *os.File
	goroutines    sync.WaitGroup

	mu   sync.Mutex
	tail []byte // the end of stderr

	errsEnded chan struct{}
	ended     chan struct{} // closed once code and endErr are set
	code      int
	endErr    error
}

// muxOpenSession connects to the control socket at path and has the command run by the remote user's
// shell, without a terminal. It returns when the server has opened the session, which is before it is known
// whether the command can be run. A refusal, as by sshd's MaxSessions, is a *muxError. The caller closes the result.
func muxOpenSession(path, command string, timeout time.Duration) (*muxSession, error) {
	deadline := time.Now().Add(timeout)
	mux, err := muxDial(path, timeout)
	if err != nil {
		return nil, fmt.Errorf("open an ssh session: %w", err)
	}
	s := &muxSession{mux: mux, code: -1, errsEnded: make(chan struct{}), ended: make(chan struct{})}
	if err := s.open(deadline, command); err != nil {
		s.Close()
		return nil, fmt.Errorf("open an ssh session: %w", err)
	}
	s.goroutines.Add(2)
	go s.collectErrs()
	go s.watch()
	return s, nil
}

// open makes the pipes, passes their far ends to the master and waits for its answer.
func (s *muxSession) open(deadline time.Time, command string) error {
	const noEscape = 0xffffffff
	f := newMuxFrame(muxNewSession).u32(s.mux.nextID()).str("").u32(0).u32(0).u32(0).u32(0).u32(noEscape).str("").str(command)
	if len(f.bytes()) > muxMaxFrame || strings.ContainsRune(command, 0) {
		return errors.New("the command is too long, or has a NUL in it")
	}
	var far [3]*os.File
	defer func() {
		for _, f := range far {
			f.Close()
		}
	}()
	var err error
	if far[0], s.in, err = os.Pipe(); err != nil {
		return err
	}
	if s.out, far[1], err = os.Pipe(); err != nil {
		return err
	}
	if s.errs, far[2], err = os.Pipe(); err != nil {
		return err
	}
	// All is at hand before the request goes out: the whole master waits for the descriptors that follow it.
	if err := s.mux.send(deadline, f.bytes()); err != nil {
		return err
	}
	for _, f := range far {
		if err := s.mux.sendFile(f); err != nil {
			return fmt.Errorf("pass a pipe: %w", err)
		}
	}
	msg, err := s.mux.reply(s.mux.rid, muxSessionOpened)
	if err != nil {
		return err
	}
	s.id = msg.value
	return s.mux.conn.SetDeadline(time.Time{})
}

// sendFile passes f's descriptor with one byte. f keeps its deadlines, as File.Fd would not let it.
func (m *muxConn) sendFile(f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	err = raw.Control(func(fd uintptr) { // which holds f open until it returns
		_, _, sent = m.conn.WriteMsgUnix([]byte{0}, unix.UnixRights(int(fd)), nil)
	})
	return errors.Join(err, sent)
}

func (s *muxSession) collectErrs() {
	defer s.goroutines.Done()
	defer close(s.errsEnded)
	buf := make([]byte, muxTail)
	for {
		n, err := s.errs.Read(buf)
		s.mu.Lock()
		s.tail = append(s.tail, buf[:n]...)
		s.tail = append(s.tail[:0], s.tail[max(0, len(s.tail)-muxTail):]...)
		s.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// watch reads what the master says after the session is open: that the command exited, and how.
func (s *muxSession) watch() {
	defer s.goroutines.Done()
	defer close(s.ended)
	for {
		msg, err := readMuxMsg(s.mux.r)
		switch {
		case err == io.EOF: // killed by a signal, or the master is gone
			return
		case err != nil:
			s.endErr = err
			return
		case msg.typ == muxExit && msg.id == s.id:
			s.code = int(msg.value)
			return
		case msg.typ != muxTTYAllocFail:
			s.endErr = fmt.Errorf("mux protocol: message 0x%08x about %d in session %d", msg.typ, msg.id, s.id)
			return
		}
	}
}

func (s *muxSession) Read(b []byte) (int, error)         { return s.out.Read(b) }
func (s *muxSession) Write(b []byte) (int, error)        { return s.in.Write(b) }
func (s *muxSession) SetReadDeadline(t time.Time) error  { return s.out.SetReadDeadline(t) }
func (s *muxSession) SetWriteDeadline(t time.Time) error { return s.in.SetWriteDeadline(t) }

// stderr is the last 4 KiB of what the command wrote to stderr so far, as it came: unfit for a terminal.
func (s *muxSession) stderr() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return string(s.tail)
}

// wait waits until the command has exited and returns its exit code, or -1 without an error where the
// session ended without one: a signal, or the end of the master. It then waits for the end of stderr too,
// within the same timeout, so that stderr() is complete. It reads no stdout: one that nobody reads holds the command up.
func (s *muxSession) wait(timeout time.Duration) (exit int, err error) {
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-s.ended:
	case <-timer.C:
		return -1, fmt.Errorf("wait for the command in an ssh session: %w", os.ErrDeadlineExceeded)
	}
	if s.endErr != nil {
		return -1, fmt.Errorf("wait for the command in an ssh session: %w", s.endErr)
	}
	select {
	case <-s.errsEnded:
	case <-timer.C:
	}
	return s.code, nil
}

// Close releases all that the session holds, here and in the master, and joins its goroutines. It can be repeated.
func (s *muxSession) Close() error {
	for _, f := range []*os.File{s.in, s.out, s.errs} {
		f.Close() // a nil or closed file only answers with an error
	}
	s.mux.Close()
	s.goroutines.Wait()
	return nil
}

// The messages of OpenSSH's multiplexing protocol: pure encoding and decoding. Numbers are big-endian; a
// message is its length, its type and its fields; a string is its length and its bytes.

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
