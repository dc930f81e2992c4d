package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// mux.go: a client of OpenSSH's multiplexing protocol, version 4, as described in
// its PROTOCOL.mux. Over the control socket of a running ssh master it checks that
// the master is alive, runs commands in sessions, opens streams to addresses on the
// remote host, and terminates the master. Numbers are big-endian; a message is a
// length, a type and fields; a string is a length and bytes.

// muxBuffer is the size of a connection's read buffer: replies are short, and each stream has its own connection.
const muxBuffer = 128

// muxError is a refusal or failure reported by the master. Unlike every other error it leaves the
// connection usable.
type muxError struct {
	denied bool // denied by the user's ssh (ControlMaster ask) rather than failed
	reason string
}

func (refused *muxError) Error() string { return "refused by ssh: " + refused.reason }

// muxConn is a connection to the control socket of a running ssh master. It is not safe for concurrent
// use, except for Close. After any error that is not a *muxError only Close may be called.
type muxConn struct {
	conn *net.UnixConn
	r    *bufio.Reader
	rid  uint32 // of the last request
}

// muxDial connects to the control socket at path and exchanges greetings. The caller must close the result.
func muxDial(path string, timeout time.Duration) (*muxConn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	m, err := muxConnect(ctx, path)
	if err != nil {
		return nil, err
	}
	deadline, _ := ctx.Deadline()
	if err = m.send(deadline, newMuxFrame(muxHello).u32(muxVersion).bytes()); err == nil {
		err = m.greeting()
	}
	if err != nil {
		m.Close()
		return nil, fmt.Errorf("greet the ssh master at %s: %w", path, err)
	}
	return m, nil
}

// muxConnect connects to the control socket at path without sending a greeting.
func muxConnect(ctx context.Context, path string) (*muxConn, error) {
	conn, err := dialMaster(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("connect to the ssh control socket: %w", err)
	}
	return &muxConn{conn: conn, r: bufio.NewReaderSize(conn, muxBuffer)}, nil
}

// dialMaster connects to a socket on which the master listens.
func dialMaster(ctx context.Context, path string) (*net.UnixConn, error) {
	var d net.Dialer
	for wait := time.Millisecond; ; wait *= 2 {
		conn, err := d.DialContext(ctx, "unix", path)
		if err == nil {
			return conn.(*net.UnixConn), nil
		}
		if !errors.Is(err, syscall.EAGAIN) { // EAGAIN: the backlog is full because the master is busy
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(wait):
		}
	}
}

// greeting reads the master's greeting.
func (mc *muxConn) greeting() error {
	msg, err := readMuxMsg(mc.r)
	switch {
	case err != nil:
		return err
	case msg.typ != muxHello:
		return fmt.Errorf("mux protocol: message 0x%08x instead of a greeting", msg.typ)
	case msg.value != muxVersion:
		return fmt.Errorf("multiplexing protocol version %d instead of %d: use another OpenSSH", msg.value, muxVersion)
	}
	return nil
}

func (mc *muxConn) Close() error { return mc.conn.Close() }

// alive returns the process id of the master, which is never 0.
func (mc *muxConn) alive(timeout time.Duration) (pid int, err error) {
	msg, err := mc.request(time.Now().Add(timeout), muxAlive, newMuxFrame(muxAliveCheck).u32(mc.nextID()))
	if err == nil && (msg.value == 0 || msg.value > math.MaxInt32) {
		err = fmt.Errorf("mux protocol: process id %d", msg.value)
	}
	if err != nil {
		return 0, fmt.Errorf("ask the ssh master whether it is alive: %w", err)
	}
	return int(msg.value), nil
}

// terminate asks the master to exit at once, along with its forwards and sessions. It often exits before
// it replies, so the end of the connection counts as success.
func (mc *muxConn) terminate(timeout time.Duration) error {
	_, err := mc.request(time.Now().Add(timeout), muxOK, newMuxFrame(muxTerminate).u32(mc.nextID()))
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

// forward has the master listen on a unix socket, and connect what it accepts there to a socket on the remote host. The
// server is asked only once something connects. The socket at path must not exist.
func (mc *muxConn) forward(path, remote string, timeout time.Duration) error {
	const local, isPath = 1, 0xfffffffe // the kind of forward; a port that makes its host a path
	f := newMuxFrame(muxOpenFwd).u32(mc.nextID()).u32(local).str(path).u32(isPath).str(remote).u32(isPath)
	if _, err := mc.request(time.Now().Add(timeout), muxOK, f); err != nil {
		return fmt.Errorf("forward %s through the ssh master: %w", path, err)
	}
	return nil
}

// nextID returns the next request id. It skips 0, which means none, when the counter wraps.
func (mc *muxConn) nextID() uint32 {
	if mc.rid++; mc.rid == 0 {
		mc.rid = 1
	}
	return mc.rid
}

// send writes whole frames. The deadline also applies to the replies, until the next send.
func (mc *muxConn) send(deadline time.Time, b []byte) error {
	if err := mc.conn.SetDeadline(deadline); err != nil {
		return err
	}
	_, err := mc.conn.Write(b)
	return err
}

// request sends the request with id m.rid and waits for its reply, of type want or a refusal.
func (mc *muxConn) request(deadline time.Time, want uint32, f *muxFrame) (muxMsg, error) {
	if err := mc.send(deadline, f.bytes()); err != nil {
		return muxMsg{}, err
	}
	return mc.reply(mc.rid, want)
}

// reply reads the next message, which must answer request rid. It returns a refusal as a *muxError.
func (mc *muxConn) reply(rid, want uint32) (muxMsg, error) {
	msg, err := readMuxMsg(mc.r)
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

// muxTail is the number of bytes kept from the end of a command's stderr.
const muxTail = 4 << 10

// muxSession is a running command: Read reads its stdout, Write writes to its stdin. Read, Write and Close
// may be called concurrently, and Close unblocks the other two.
//
// Close closes the command's stdin and stdout and asks the server to end the session. A command that uses
// neither keeps running there: sshd sends it no signal.
type muxSession struct {
	mux           *muxConn
	id            uint32 // assigned by the master
	in, out, errs *os.File
	goroutines    sync.WaitGroup

	mu   sync.Mutex
	tail []byte // the end of stderr

	errsEnded chan struct{}
	ended     chan struct{} // closed once code and endErr are set
	code      int
	endErr    error
}

// muxOpenSession connects to the control socket at path and has the remote user's shell run the command,
// without a terminal. It returns when the server has opened the session, before it is known whether the
// command can be run. A refusal, such as by sshd's MaxSessions, is a *muxError. The caller must close the result.
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

// open creates the pipes, passes their far ends to the master and waits for its reply.
func (ms *muxSession) open(deadline time.Time, command string) error {
	const noEscape = 0xffffffff
	f := newMuxFrame(muxNewSession).u32(ms.mux.nextID()).str("").u32(0).u32(0).u32(0).u32(0).u32(noEscape).str("").str(command)
	if len(f.bytes()) > muxMaxFrame || strings.ContainsRune(command, 0) {
		return errors.New("the command is too long or contains a NUL")
	}
	var far [3]*os.File
	defer func() {
		for _, f := range far {
			f.Close()
		}
	}()
	var err error
	if far[0], ms.in, err = os.Pipe(); err != nil {
		return err
	}
	if ms.out, far[1], err = os.Pipe(); err != nil {
		return err
	}
	if ms.errs, far[2], err = os.Pipe(); err != nil {
		return err
	}
	// Everything is ready before the request is sent: the whole master blocks until the descriptors arrive.
	if err := ms.mux.send(deadline, f.bytes()); err != nil {
		return err
	}
	for _, f := range far {
		if err := ms.mux.sendFile(f); err != nil {
			return fmt.Errorf("pass a pipe: %w", err)
		}
	}
	msg, err := ms.mux.reply(ms.mux.rid, muxSessionOpened)
	if err != nil {
		return err
	}
	ms.id = msg.value
	return ms.mux.conn.SetDeadline(time.Time{})
}

// sendFile passes f's descriptor along with one byte. It avoids File.Fd, which would disable f's deadlines.
func (mc *muxConn) sendFile(f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	err = raw.Control(func(fd uintptr) { // f stays open until Control returns
		_, _, sent = mc.conn.WriteMsgUnix([]byte{0}, unix.UnixRights(int(fd)), nil)
	})
	return errors.Join(err, sent)
}

func (ms *muxSession) collectErrs() {
	defer ms.goroutines.Done()
	defer close(ms.errsEnded)
	buf := make([]byte, muxTail)
	for {
		n, err := ms.errs.Read(buf)
		ms.mu.Lock()
		ms.tail = append(ms.tail, buf[:n]...)
		ms.tail = append(ms.tail[:0], ms.tail[max(0, len(ms.tail)-muxTail):]...)
		ms.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// watch waits for the master's report of the command's exit.
func (ms *muxSession) watch() {
	defer ms.goroutines.Done()
	defer close(ms.ended)
	for {
		msg, err := readMuxMsg(ms.mux.r)
		switch {
		case err == io.EOF: // killed by a signal, or the master is gone
			return
		case err != nil:
			ms.endErr = err
			return
		case msg.typ == muxExit && msg.id == ms.id:
			ms.code = int(msg.value)
			return
		case msg.typ != muxTTYAllocFail:
			ms.endErr = fmt.Errorf("mux protocol: message 0x%08x about %d in session %d", msg.typ, msg.id, ms.id)
			return
		}
	}
}

func (ms *muxSession) Read(b []byte) (int, error)         { return ms.out.Read(b) }
func (ms *muxSession) Write(b []byte) (int, error)        { return ms.in.Write(b) }
func (ms *muxSession) SetReadDeadline(t time.Time) error  { return ms.out.SetReadDeadline(t) }
func (ms *muxSession) SetWriteDeadline(t time.Time) error { return ms.in.SetWriteDeadline(t) }

// stderr returns the last 4 KiB of what the command has written to stderr, unfiltered: unsafe for a terminal.
func (ms *muxSession) stderr() string {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	return string(ms.tail)
}

// wait waits for the command to exit and returns its exit code, or -1 and no error if the session ended
// without one: after a signal or the end of the master. It then waits for EOF on stderr, within the same
// timeout, so that stderr() is complete. It does not read stdout: the command blocks if nobody else does.
func (ms *muxSession) wait(timeout time.Duration) (exit int, err error) {
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-ms.ended:
	case <-timer.C:
		return -1, fmt.Errorf("wait for the command in an ssh session: %w", os.ErrDeadlineExceeded)
	}
	if ms.endErr != nil {
		return -1, fmt.Errorf("wait for the command in an ssh session: %w", ms.endErr)
	}
	select {
	case <-ms.errsEnded:
	case <-timer.C:
	}
	return ms.code, nil
}

// Close releases the session, here and in the master, and joins its goroutines. It may be called repeatedly.
func (ms *muxSession) Close() error {
	for _, f := range []*os.File{ms.in, ms.out, ms.errs} {
		f.Close() // on a nil or closed file this only returns an error
	}
	ms.mux.Close()
	ms.goroutines.Wait()
	return nil
}

const (
	muxVersion  = 4
	muxMaxFrame = 256 << 10 // bytes after the length field; OpenSSH's limit

	muxHello      = 0x00000001
	muxNewSession = 0x10000002
	muxAliveCheck = 0x10000004
	muxTerminate  = 0x10000005
	muxOpenFwd    = 0x10000006
	muxStdioFwd   = 0x10000008

	muxOK            = 0x80000001
	muxDenied        = 0x80000002
	muxFailure       = 0x80000003
	muxExit          = 0x80000004
	muxAlive         = 0x80000005
	muxSessionOpened = 0x80000006
	muxTTYAllocFail  = 0x80000008
)

// muxStream is a stream to an address on the remote host: data written to in goes there, data from there is read from out.
// Each can be closed independently. The caller closes in, then the stream.
type muxStream struct {
	mux     *muxConn // open as long as the channel exists in the master
	in, out *net.UnixConn
}

// muxOpenStream asks the master at path for a stream and waits until the server has connected it. A refusal is a *muxError;
// the cause is on the master's stderr. admitted is called once, when the master has accepted the connection or on failure:
// until then the connection counts toward the control socket's backlog. The end of ctx aborts the call.
func muxOpenStream(ctx context.Context, path string, to netip.AddrPort, admitted func()) (*muxStream, error) {
	admitted = sync.OnceFunc(admitted)
	defer admitted()
	mux, err := muxConnect(ctx, path)
	if err != nil {
		return nil, err
	}
	s := &muxStream{mux: mux}
	stop := context.AfterFunc(ctx, func() { mux.Close() })
	err = s.open(to, admitted)
	if !stop() {
		err = ctx.Err()
	}
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("open a stream to %s through the ssh master: %w", to, err)
	}
	return s, nil
}

// open creates the socket pairs, passes their far ends to the master and waits for its replies. There are two pairs because
// ssh closes a descriptor entirely when one direction ends.
func (st *muxStream) open(to netip.AddrPort, admitted func()) (err error) {
	var far [2]*os.File
	defer func() {
		for _, f := range far {
			f.Close() // on a nil file this only returns an error
		}
	}()
	if st.in, far[0], err = socketPair(); err != nil {
		return err
	}
	if st.out, far[1], err = socketPair(); err != nil {
		return err
	}
	hello := newMuxFrame(muxHello).u32(muxVersion).bytes()
	request := newMuxFrame(muxStdioFwd).u32(st.mux.nextID()).str("").str(to.Addr().String()).u32(uint32(to.Port())).bytes()
	if err := st.mux.send(time.Time{}, append(hello, request...)); err != nil {
		return err
	}
	for _, f := range far { // without delay: the master blocks until it has both
		if err := st.mux.sendFile(f); err != nil {
			return fmt.Errorf("pass a socket: %w", err)
		}
	}
	if err := st.mux.greeting(); err != nil {
		return err
	}
	admitted()
	_, err = st.mux.reply(st.mux.rid, muxSessionOpened)
	return err
}

// socketPair returns our end of a pair of connected sockets, and the far end to pass on.
func socketPair() (*net.UnixConn, *os.File, error) {
	syscall.ForkLock.RLock()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err == nil {
		syscall.CloseOnExec(fds[0])
		syscall.CloseOnExec(fds[1])
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, nil, fmt.Errorf("create a socket pair: %w", err)
	}
	near, far := os.NewFile(uintptr(fds[0]), "stream"), os.NewFile(uintptr(fds[1]), "stream")
	conn, err := net.FileConn(near) // duplicates the descriptor
	near.Close()
	if err != nil {
		far.Close()
		return nil, nil, fmt.Errorf("create a socket pair: %w", err)
	}
	return conn.(*net.UnixConn), far, nil
}

// awaitEnd waits until the channel has ended in both directions or the master has exited.
func (st *muxStream) awaitEnd() { io.Copy(io.Discard, st.mux.r) }

// Close ends the stream at once and aborts pending operations. It may be called repeatedly.
func (st *muxStream) Close() error {
	for _, c := range []*net.UnixConn{st.in, st.out} {
		if c != nil {
			c.Close()
		}
	}
	return st.mux.Close()
}

// muxFrame is a message under construction: length, type, then fields.
type muxFrame struct{ b []byte }

func newMuxFrame(typ uint32) *muxFrame { return (&muxFrame{make([]byte, 4, 64)}).u32(typ) }

func (mf *muxFrame) u32(v uint32) *muxFrame {
	mf.b = binary.BigEndian.AppendUint32(mf.b, v)
	return mf
}

func (mf *muxFrame) str(s string) *muxFrame {
	mf.b = append(mf.u32(uint32(len(s))).b, s...)
	return mf
}

func (mf *muxFrame) bytes() []byte {
	binary.BigEndian.PutUint32(mf.b, uint32(len(mf.b)-4))
	return mf.b
}

// muxMsg is a message from the master; fields that its type lacks are zero.
type muxMsg struct {
	typ, id uint32 // id of the request it answers; for muxExit and muxTTYAllocFail, of the session
	value   uint32 // the version, process id, session id or exit code
	text    string // the reason for a refusal, unfiltered
}

// readMuxMsg reads one message and nothing beyond it. It returns io.EOF only at a message boundary.
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

// decodeMuxMsg decodes a message without its length. Like ssh it ignores fields appended by a newer master.
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
	case muxHello: // then extensions: pairs of strings, name and value
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
