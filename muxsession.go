package main

// A command run in a session of a running ssh master, with pipes of our own as its stdin, stdout and stderr.

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

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
