package main

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// muxPatience is for what is certain to come, however busy the machine; muxSoon for what is certain not to.
const (
	muxPatience = 30 * time.Second
	muxSoon     = 200 * time.Millisecond
)

func TestMuxEncode(t *testing.T) {
	for _, tt := range []struct {
		name, want string
		frame      *muxFrame
	}{
		{"hello", "00000008" + "00000001" + "00000004", newMuxFrame(muxHello).u32(muxVersion)},
		{"strings", "00000011" + "10000006" + "00000007" + "00000001" + "61" + "00000000", newMuxFrame(muxOpenFwd).u32(7).str("a").str("")},
	} {
		if got := hex.EncodeToString(tt.frame.bytes()); got != tt.want {
			t.Errorf("%s: got %s, want %s", tt.name, got, tt.want)
		}
	}
}

func TestMuxDecode(t *testing.T) {
	huge := binary.BigEndian.AppendUint32(nil, muxMaxFrame+1)
	for _, tt := range []struct {
		name  string
		wire  []byte
		want  muxMsg
		error string // a part of it
	}{
		{"hello", newMuxFrame(muxHello).u32(4).bytes(), muxMsg{typ: muxHello, value: 4}, ""},
		{"hello with extensions", newMuxFrame(muxHello).u32(4).str("info").str("0").str("x").str("").bytes(), muxMsg{typ: muxHello, value: 4}, ""},
		{"hello with half an extension", newMuxFrame(muxHello).u32(4).str("info").bytes(), muxMsg{}, "cut off"},
		{"hello without version", newMuxFrame(muxHello).bytes(), muxMsg{}, "cut off"},
		{"ok", newMuxFrame(muxOK).u32(9).bytes(), muxMsg{typ: muxOK, id: 9}, ""},
		{"ok and something new", newMuxFrame(muxOK).u32(9).str("new").bytes(), muxMsg{typ: muxOK, id: 9}, ""},
		{"ok without id", newMuxFrame(muxOK).bytes(), muxMsg{}, "cut off"},
		{"failure", newMuxFrame(muxFailure).u32(9).str("no").bytes(), muxMsg{typ: muxFailure, id: 9, text: "no"}, ""},
		{"denied", newMuxFrame(muxDenied).u32(9).str("").bytes(), muxMsg{typ: muxDenied, id: 9}, ""},
		{"failure without reason", newMuxFrame(muxFailure).u32(9).bytes(), muxMsg{}, "cut off"},
		{"failure with too long a reason", newMuxFrame(muxFailure).u32(9).u32(0xffffffff).u32(0).bytes(), muxMsg{}, "cut off"},
		{"alive", newMuxFrame(muxAlive).u32(9).u32(4242).bytes(), muxMsg{typ: muxAlive, id: 9, value: 4242}, ""},
		{"exit", newMuxFrame(muxExit).u32(2).u32(255).bytes(), muxMsg{typ: muxExit, id: 2, value: 255}, ""},
		{"session", newMuxFrame(muxSessionOpened).u32(1).u32(3).bytes(), muxMsg{typ: muxSessionOpened, id: 1, value: 3}, ""},
		{"no tty", newMuxFrame(muxTTYAllocFail).u32(3).bytes(), muxMsg{typ: muxTTYAllocFail, id: 3}, ""},
		{"unknown", newMuxFrame(0x80000007).u32(3).u32(1).bytes(), muxMsg{}, "unknown message 0x80000007"},
		{"a request", newMuxFrame(muxTerminate).u32(3).bytes(), muxMsg{}, "unknown message"},
		{"nothing", nil, muxMsg{}, "EOF"},
		{"half a length", []byte{0, 0}, muxMsg{}, "unexpected EOF"},
		{"no body", []byte{0, 0, 0, 8}, muxMsg{}, "unexpected EOF"},
		{"half a body", []byte{0, 0, 0, 8, 0x80, 0}, muxMsg{}, "unexpected EOF"},
		{"empty body", []byte{0, 0, 0, 0}, muxMsg{}, "cut off"},
		{"half a type", []byte{0, 0, 0, 2, 0x80, 0}, muxMsg{}, "cut off"},
		{"too long", append(huge, make([]byte, muxMaxFrame+1)...), muxMsg{}, "a message of 262145 bytes"},
	} {
		got, err := readMuxMsg(bytes.NewReader(tt.wire))
		if got != tt.want || (err == nil) != (tt.error == "") || (err != nil && !strings.Contains(err.Error(), tt.error)) {
			t.Errorf("%s: got %+v and %v, want %+v and %q", tt.name, got, err, tt.want, tt.error)
		}
	}
}

func FuzzMuxFrame(f *testing.F) {
	f.Add(newMuxFrame(muxHello).u32(4).str("info").str("0").bytes())
	f.Add(append(newMuxFrame(muxOK).u32(1).bytes(), newMuxFrame(muxFailure).u32(2).str("no").bytes()...))
	f.Add(newMuxFrame(muxFailure).u32(9).u32(0xffffffff).bytes())
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		r := bytes.NewReader(data)
		for {
			before := data[len(data)-r.Len():]
			m, err := readMuxMsg(r)
			if used := len(before) - r.Len(); used > 4+muxMaxFrame {
				t.Fatalf("read %d bytes for one message", used)
			}
			if err != nil {
				if len(before) >= 4 && binary.BigEndian.Uint32(before) > muxMaxFrame && r.Len() != len(before)-4 {
					t.Fatal("read the body of a message that is too long")
				}
				break
			}
			if len(m.text) > len(before)-12 {
				t.Fatalf("a reason of %d bytes from %d", len(m.text), len(before))
			}
			back := newMuxFrame(m.typ)
			switch m.typ {
			case muxHello:
				back.u32(m.value)
			case muxOK, muxTTYAllocFail:
				back.u32(m.id)
			case muxDenied, muxFailure:
				back.u32(m.id).str(m.text)
			default:
				back.u32(m.id).u32(m.value)
			}
			if b := back.bytes()[4:]; !bytes.HasPrefix(before[4:], b) {
				t.Fatalf("%x was read as %+v", before, m)
			}
			for _, c := range printable(m.text, maxText) {
				if c < ' ' || (c >= 0x7f && c < 0xa0) {
					t.Fatalf("control character %q in a reason", c)
				}
			}
		}
		decodeMuxMsg(data)
	})
}

// muxFake stands in for a master: it greets, then sends what answer makes of each request that comes (its
// type and id), and hangs up on nil.
func muxFake(t *testing.T, hello []byte, answer func(typ, id uint32) []byte) (path string) {
	t.Helper()
	path = filepath.Join(muxTempDir(t), "c")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	t.Cleanup(func() { l.Close(); all.Wait() })
	all.Add(1)
	go func() {
		defer all.Done()
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all.Add(1)
			go func() {
				defer all.Done()
				defer c.Close()
				c.SetDeadline(time.Now().Add(muxPatience))
				c.Write(hello)
				var head [12]byte
				if _, err := io.ReadFull(c, head[:]); err != nil {
					return
				}
				for {
					if _, err := io.ReadFull(c, head[:]); err != nil {
						return
					}
					io.CopyN(io.Discard, c, int64(binary.BigEndian.Uint32(head[:]))-8)
					b := answer(binary.BigEndian.Uint32(head[4:]), binary.BigEndian.Uint32(head[8:]))
					if b == nil {
						return
					}
					c.Write(b)
				}
			}()
		}
	}()
	return path
}

func TestMuxHostileHello(t *testing.T) {
	for _, tt := range []struct {
		name, error string
		hello       []byte
	}{
		{"silence", "i/o timeout", nil},
		{"other version", "version 5", newMuxFrame(muxHello).u32(5).bytes()},
		{"other message", "instead of a greeting", newMuxFrame(muxOK).u32(1).bytes()},
		{"not ours at all", "a message of", []byte("HTTP/1.1 400 Bad Request\r\n\r\n")},
	} {
		path := muxFake(t, tt.hello, func(typ, id uint32) []byte { return nil })
		patience := muxPatience
		if tt.hello == nil {
			patience = muxSoon
		}
		m, err := muxDial(path, patience)
		if err == nil {
			m.Close()
		}
		if err == nil || !strings.Contains(err.Error(), tt.error) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	if _, err := muxDial(filepath.Join(t.TempDir(), "none"), muxPatience); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no socket: %v", err)
	}
}

func TestMuxHostileReplies(t *testing.T) {
	hello := newMuxFrame(muxHello).u32(4).str("new").str("extension").bytes()
	for _, tt := range []struct {
		name, error string
		refused     bool
		answer      func(typ, id uint32) []byte
	}{
		{"well", "", false, func(typ, id uint32) []byte { return newMuxFrame(muxAlive).u32(id).u32(42).bytes() }},
		{"pid 0", "process id 0", false, func(typ, id uint32) []byte { return newMuxFrame(muxAlive).u32(id).u32(0).bytes() }},
		{"pid -1", "process id 4294967295", false, func(typ, id uint32) []byte { return newMuxFrame(muxAlive).u32(id).u32(0xffffffff).bytes() }},
		{"other id", "reply to request 2 instead of 1", false, func(typ, id uint32) []byte { return newMuxFrame(muxAlive).u32(id + 1).u32(42).bytes() }},
		{"other type", "instead of 0x80000005", false, func(typ, id uint32) []byte { return newMuxFrame(muxOK).u32(id).bytes() }},
		{"refusal of something else", "reply to request 0", false, func(typ, id uint32) []byte { return newMuxFrame(muxFailure).u32(0).str("no").bytes() }},
		{"refusal", "refused by ssh:  no[31m", true, func(typ, id uint32) []byte { return newMuxFrame(muxDenied).u32(id).str("\r\nno\x1b[31m\u202e").bytes() }},
		{"hangs up", "EOF", false, func(typ, id uint32) []byte { return nil }},
		{"answers nothing", "i/o timeout", false, func(typ, id uint32) []byte { return []byte{} }},
		{"stops within", "i/o timeout", false, func(typ, id uint32) []byte { return newMuxFrame(muxAlive).u32(id).u32(42).bytes()[:9] }},
		{"too long", "a message of", false, func(typ, id uint32) []byte { return []byte{0x7f, 0xff, 0xff, 0xff} }},
	} {
		m, err := muxDial(muxFake(t, hello, tt.answer), muxPatience)
		if err != nil {
			t.Fatal(err)
		}
		patience := muxPatience
		if strings.Contains(tt.error, "timeout") {
			patience = muxSoon
		}
		pid, err := m.alive(patience)
		var refused *muxError
		if tt.error == "" && (err != nil || pid != 42) || tt.error != "" && (err == nil || pid != 0 || !strings.Contains(err.Error(), tt.error)) {
			t.Errorf("%s: got %d, %v", tt.name, pid, err)
		}
		if errors.As(err, &refused) != tt.refused || tt.refused && !refused.denied {
			t.Errorf("%s: %#v", tt.name, err)
		}
		m.Close()
	}
}

func TestMuxForwardReplies(t *testing.T) {
	good := muxForward{listenHost: "127.0.0.1", listenPort: 8080, connectHost: "127.0.0.1", connectPort: 80}
	with := func(change func(*muxForward)) muxForward { f := good; change(&f); return f }
	ops := []muxForward{
		good,
		with(func(f *muxForward) { f.listenPort = 0 }),
		with(func(f *muxForward) { f.connectPort = 0 }),
		with(func(f *muxForward) { f.listenHost = "" }),
		with(func(f *muxForward) { f.connectHost = "a\x00b" }),
		with(func(f *muxForward) { f.connectHost = strings.Repeat("x", muxMaxFrame) }),
		with(func(f *muxForward) { f.cancel = true }),
	}
	for len(ops) < 3*muxChunk {
		ops = append(ops, good)
	}
	var mu sync.Mutex
	sent := 0
	hello := newMuxFrame(muxHello).u32(4).bytes()
	path := muxFake(t, hello, func(typ, id uint32) []byte {
		mu.Lock()
		defer mu.Unlock()
		if sent++; typ == muxCloseFwd {
			return newMuxFrame(muxFailure).u32(id).str("not found").bytes()
		}
		return newMuxFrame(muxOK).u32(id).bytes()
	})
	m, err := muxDial(path, muxPatience)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	results, err := m.forward(ops, muxPatience)
	if err != nil || len(results) != len(ops) {
		t.Fatalf("%d results for %d, %v", len(results), len(ops), err)
	}
	for i, err := range results {
		var refused *muxError
		switch isRefused := errors.As(err, &refused); {
		case i >= 1 && i <= 5:
			if err == nil || isRefused {
				t.Errorf("senseless op %d: %v", i, err)
			}
		case i == 6:
			if !isRefused || refused.denied || refused.reason != "not found" {
				t.Errorf("cancel: %v", err)
			}
		case err != nil:
			t.Errorf("op %d: %v", i, err)
		}
	}
	if mu.Lock(); sent != len(ops)-5 {
		t.Errorf("%d of %d ops were sent", sent, len(ops))
	}
	mu.Unlock()
	if results, err := m.forward(ops[1:6], muxPatience); err != nil || len(results) != 5 {
		t.Errorf("none to send: %v, %v", results, err)
	}
	if results, err := m.forward(nil, muxPatience); err != nil || len(results) != 0 {
		t.Errorf("none at all: %v, %v", results, err)
	}

	lies, err := muxDial(muxFake(t, hello, func(typ, id uint32) []byte { return newMuxFrame(muxOK).u32(id / 2).bytes() }), muxPatience)
	if err != nil {
		t.Fatal(err)
	}
	defer lies.Close()
	if results, err := lies.forward(ops, muxPatience); err == nil || results != nil {
		t.Errorf("wrong ids: %v, %v", results, err)
	}
}

func TestMuxSessionHostile(t *testing.T) {
	hello := newMuxFrame(muxHello).u32(4).bytes()
	opened := func(id uint32) []byte { return newMuxFrame(muxSessionOpened).u32(id).u32(3).bytes() }
	for _, tt := range []struct {
		name  string
		after []byte
		exit  int
		error string
	}{
		{"no tty, then exit", append(newMuxFrame(muxTTYAllocFail).u32(3).bytes(), newMuxFrame(muxExit).u32(3).u32(7).bytes()...), 7, ""},
		{"exit of another", newMuxFrame(muxExit).u32(4).u32(0).bytes(), -1, "about 4 in session 3"},
		{"nonsense", newMuxFrame(muxOK).u32(1).bytes(), -1, "message 0x80000001"},
		{"too long", []byte{0xff, 0xff, 0xff, 0xff}, -1, "a message of"},
		{"silence", nil, -1, "timeout"},
	} {
		var first sync.Once
		s, err := muxOpenSession(muxFake(t, hello, func(typ, id uint32) (b []byte) {
			b = []byte{}
			first.Do(func() { b = append(opened(id), tt.after...) })
			return b
		}), "true", muxPatience)
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		patience := muxPatience
		if tt.error == "timeout" {
			patience = muxSoon
		}
		exit, err := s.wait(patience)
		if exit != tt.exit || (err == nil) != (tt.error == "") || err != nil && !strings.Contains(err.Error(), tt.error) {
			t.Errorf("%s: got %d, %v", tt.name, exit, err)
		}
		s.Close()
	}
	path := muxFake(t, hello, func(typ, id uint32) []byte { return opened(id + 1) })
	for _, command := range []string{"true", "a\x00b", strings.Repeat("x", muxMaxFrame)} {
		if s, err := muxOpenSession(path, command, muxPatience); err == nil {
			s.Close()
			t.Errorf("command of %d bytes, or a wrong id: no error", len(command))
		}
	}
}

func TestMuxAgainstSSH(t *testing.T) {
	sshd := startSSHD(t)
	master := startTestMaster(t, sshd)
	m, err := muxDial(master.path, muxPatience)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if pid, err := m.alive(muxPatience); err != nil || pid != master.pid {
		t.Fatalf("alive: %d, %v, want %d", pid, err, master.pid)
	}
	t.Run("forward", func(t *testing.T) { testMuxForward(t, m) })
	t.Run("session", func(t *testing.T) { testMuxSession(t, master.path) })
	t.Run("leaks", func(t *testing.T) { testMuxLeaks(t, master.path) })
	t.Run("abandoned", func(t *testing.T) { testMuxAbandoned(t, master.path) })
	if pid, err := m.alive(muxPatience); err != nil || pid != master.pid {
		t.Fatalf("alive after all that: %d, %v", pid, err)
	}
}

func testMuxForward(t *testing.T, m *muxConn) {
	one := func(what string, op muxForward, wantRefused bool) {
		t.Helper()
		results, err := m.forward([]muxForward{op}, muxPatience)
		if err != nil || len(results) != 1 {
			t.Fatalf("%s: %v, %v", what, results, err)
		}
		var refused *muxError
		if errors.As(results[0], &refused) != wantRefused || !wantRefused && results[0] != nil {
			t.Fatalf("%s: %v", what, results[0])
		}
	}
	to := muxEcho(t)
	port := muxFreePorts(t, 1)[0]
	op := muxForward{listenHost: "127.0.0.1", listenPort: uint16(port), connectHost: "127.0.0.1", connectPort: uint16(to)}
	one("open", op, false)
	one("the same again", op, false)
	through, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	defer through.Close()
	echo := func(what string) {
		t.Helper()
		through.SetDeadline(time.Now().Add(muxPatience))
		got := make([]byte, len(what))
		if _, err := io.WriteString(through, what); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(through, got); err != nil || string(got) != what {
			t.Fatalf("echo: %q, %v", got, err)
		}
	}
	echo("through the forward")

	busy := op
	busy.listenPort = uint16(to)
	one("busy port", busy, true)
	op.cancel = true
	other := op
	other.connectPort++
	one("cancel of an unknown one", other, true)
	one("cancel", op, false)
	echo("what is connected stays so")
	if c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
		c.Close()
		t.Error("still listens after the cancel")
	}
	one("cancel again", op, true)

	count := 500
	if runtime.GOOS != "linux" { // elsewhere a process may start with a limit of 256 open files
		count = 150
	}
	var ops []muxForward
	for _, p := range muxFreePorts(t, count) {
		ops = append(ops, muxForward{listenHost: "127.0.0.1", listenPort: uint16(p), connectHost: "127.0.0.1", connectPort: uint16(to)})
		if len(ops)%10 == 0 {
			ops[len(ops)-1].listenPort = uint16(to) // which is busy
		}
	}
	for _, cancel := range []bool{false, true} {
		for i := range ops {
			ops[i].cancel = cancel
		}
		start := time.Now()
		results, err := m.forward(ops, muxPatience)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%d in %v", len(ops), time.Since(start))
		for i, err := range results {
			if (err != nil) != (i%10 == 9) {
				t.Errorf("cancel %v, op %d: %v", cancel, i, err)
			}
		}
	}
}

func testMuxSession(t *testing.T, path string) {
	t.Run("exit", func(t *testing.T) {
		s := muxTestSession(t, path, `read line; echo "got $line"; echo oops >&2; exit 7`)
		if _, err := io.WriteString(s, "hello\n"); err != nil {
			t.Fatal(err)
		}
		s.SetReadDeadline(time.Now().Add(muxPatience))
		out, err := io.ReadAll(s)
		if err != nil || !strings.HasSuffix(string(out), "got hello\n") {
			t.Errorf("stdout %q, %v", out, err)
		}
		if exit, err := s.wait(muxPatience); exit != 7 || err != nil {
			t.Errorf("exit %d, %v", exit, err)
		}
		if !strings.HasSuffix(s.stderr(), "oops\n") {
			t.Errorf("stderr %q", s.stderr())
		}
	})
	t.Run("stderr tail", func(t *testing.T) {
		s := muxTestSession(t, path, `i=0; while [ $i -lt 3000 ]; do echo "line $i"; i=$((i+1)); done >&2`)
		exit, err := s.wait(muxPatience)
		if got := s.stderr(); exit != 0 || err != nil || len(got) != muxTail || !strings.HasSuffix(got, "line 2998\nline 2999\n") {
			t.Errorf("exit %d, %v, %d bytes of stderr that end in %q", exit, err, len(got), got[max(0, len(got)-30):])
		}
	})
	t.Run("signal", func(t *testing.T) {
		s := muxTestSession(t, path, `kill -9 $$`)
		if exit, err := s.wait(muxPatience); exit != -1 || err != nil {
			t.Errorf("exit %d, %v", exit, err)
		}
	})
	t.Run("not found", func(t *testing.T) {
		s := muxTestSession(t, path, `exec /nowhere/nothing`)
		if exit, err := s.wait(muxPatience); exit != 127 || err != nil || !strings.Contains(s.stderr(), "/nowhere/nothing") {
			t.Errorf("exit %d, %v, stderr %q", exit, err, s.stderr())
		}
	})
	t.Run("big", func(t *testing.T) {
		s := muxTestSession(t, path, `echo MARK; exec cat`)
		muxReadLine(t, s, "MARK")
		want, got := make([]byte, 4<<20), make([]byte, 4<<20)
		rand.Read(want)
		written := make(chan error, 1)
		go func() {
			_, err := s.Write(want)
			written <- err
		}()
		s.SetReadDeadline(time.Now().Add(muxPatience))
		if _, err := io.ReadFull(s, got); err != nil || !bytes.Equal(got, want) {
			t.Errorf("what comes back is not what went in: %v", err)
			s.Close()
		}
		if err := <-written; err != nil {
			t.Error(err)
		}
	})
	t.Run("deadlines", func(t *testing.T) {
		s := muxTestSession(t, path, `echo MARK; exec cat`)
		muxReadLine(t, s, "MARK")
		s.SetReadDeadline(time.Now().Add(muxSoon))
		if n, err := s.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("read %d, %v", n, err)
		}
		if exit, err := s.wait(muxSoon); exit != -1 || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("wait %d, %v", exit, err)
		}
		if _, err := io.WriteString(s, "still here\n"); err != nil {
			t.Error(err)
		}
		muxReadLine(t, s, "still here")

		s = muxTestSession(t, path, `echo $$; exec sleep 600`)
		pid, err := strconv.Atoi(muxReadLine(t, s, ""))
		if err != nil || pid <= 1 {
			t.Fatalf("no command runs: %d, %v", pid, err)
		}
		defer syscall.Kill(pid, syscall.SIGKILL) // it never looks at its stdin, so nothing else ends it
		s.SetWriteDeadline(time.Now().Add(muxSoon))
		if _, err := s.Write(make([]byte, 16<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("write: %v", err)
		}
	})
}

func testMuxLeaks(t *testing.T, path string) {
	cycle := func() {
		s := muxTestSession(t, path, `echo $$; exec cat`)
		line := muxReadLine(t, s, "")
		pid, err := strconv.Atoi(line)
		if err != nil || syscall.Kill(pid, 0) != nil {
			t.Fatalf("no command runs: %q", line)
		}
		s.SetReadDeadline(time.Time{})
		blocked := make(chan error, 1)
		go func() {
			_, err := s.Read(make([]byte, 1))
			blocked <- err
		}()
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		select {
		case err := <-blocked:
			if err == nil {
				t.Error("a read from a closed session succeeded")
			}
		case <-time.After(muxPatience):
			t.Fatal("Close left a read blocked")
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		// Whether the end was still heard of is chance; that there is no more to wait for is not.
		if _, err := s.wait(muxPatience); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("wait after Close waits")
		}
		muxEventually(t, "the command ends", func() bool { return syscall.Kill(pid, 0) == syscall.ESRCH })
	}
	cycle()
	goroutines, files := runtime.NumGoroutine(), muxOpenFiles(t)
	for range 10 {
		cycle()
		if _, err := muxOpenSession(path, "a\x00b", muxPatience); err == nil {
			t.Error("a command with a NUL was run")
		}
	}
	muxEventually(t, "goroutines end", func() bool { return runtime.NumGoroutine() <= goroutines })
	muxEventually(t, "files are closed", func() bool { return muxOpenFiles(t) <= files })
}

// A session that was given up before the server answered must not bring the master down when it does.
func testMuxAbandoned(t *testing.T, path string) {
	s := muxTestSession(t, path, `echo $PPID; exec cat`)
	server, err := strconv.Atoi(muxReadLine(t, s, ""))
	if err != nil || server <= 1 {
		t.Fatalf("parent of the command: %d, %v", server, err)
	}
	if err := syscall.Kill(server, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	resume := func() { syscall.Kill(server, syscall.SIGCONT) }
	defer resume()
	files := muxOpenFiles(t)
	muxEventually(t, "the stopped server leaves a session unanswered", func() bool {
		s, err := muxOpenSession(path, "exec cat", muxSoon)
		if err == nil {
			s.Close()
		} else if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
		return err != nil
	})
	muxEventually(t, "files are closed", func() bool { return muxOpenFiles(t) <= files })
	resume()
	again := muxTestSession(t, path, `echo MARK`)
	muxReadLine(t, again, "MARK")
}

func TestMuxMaxSessions(t *testing.T) {
	for _, most := range []int{0, 1} {
		master := startTestMaster(t, startSSHD(t, fmt.Sprintf("MaxSessions %d", most)))
		for range most {
			muxReadLine(t, muxTestSession(t, master.path, `echo MARK; exec cat`), "MARK")
		}
		s, err := muxOpenSession(master.path, "true", muxPatience)
		var refused *muxError
		if !errors.As(err, &refused) || refused.denied || !strings.Contains(refused.reason, "refused") {
			t.Errorf("MaxSessions %d: %v", most, err)
		}
		if err == nil {
			s.Close()
		}
	}
}

func TestMuxMasterStopped(t *testing.T) {
	master := startTestMaster(t, startSSHD(t))
	m, err := muxDial(master.path, muxPatience)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	s := muxTestSession(t, master.path, `echo MARK; exec cat`)
	muxReadLine(t, s, "MARK")
	if err := syscall.Kill(master.pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	muxEventually(t, "the stopped master leaves a question unanswered", func() bool {
		_, err = m.alive(muxSoon)
		return err != nil
	})
	op := muxForward{listenHost: "127.0.0.1", listenPort: 1, connectHost: "127.0.0.1", connectPort: 1}
	_, forwardErr := m.forward([]muxForward{op}, muxSoon)
	_, dialErr := muxDial(master.path, muxSoon)
	_, sessionErr := muxOpenSession(master.path, "true", muxSoon)
	for what, err := range map[string]error{"alive": err, "forward": forwardErr, "terminate": m.terminate(muxSoon), "dial": dialErr, "session": sessionErr} {
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := s.Close(); err != nil { // must not wait for the master either
		t.Error(err)
	}
}

func TestMuxMasterEnds(t *testing.T) {
	sshd := startSSHD(t)
	for _, tt := range []struct {
		name string
		end  func(m *muxConn, pid int) error
	}{
		{"killed", func(m *muxConn, pid int) error { return syscall.Kill(pid, syscall.SIGKILL) }},
		{"terminated", func(m *muxConn, pid int) error { return m.terminate(muxPatience) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			master := startTestMaster(t, sshd)
			m, err := muxDial(master.path, muxPatience)
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			s := muxTestSession(t, master.path, `echo MARK; exec cat`)
			muxReadLine(t, s, "MARK")
			if err := tt.end(m, master.pid); err != nil {
				t.Fatal(err)
			}
			select {
			case <-master.done:
			case <-time.After(muxPatience):
				t.Fatal("the master is still there")
			}
			if pid, err := m.alive(muxPatience); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("alive: %d, %v", pid, err)
			}
			if err := m.terminate(muxPatience); err != nil {
				t.Errorf("terminate of what is gone: %v", err)
			}
			if m, err := muxDial(master.path, muxPatience); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("dial: %v, %v", m, err)
			}
			if n, err := s.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("session: read %d, %v", n, err)
			}
			if exit, err := s.wait(muxPatience); exit != -1 || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("session: exit %d, %v", exit, err)
			}
		})
	}
}

// muxTestSession runs script in /bin/sh, whatever the user's shell is; no single quotes in it.
func muxTestSession(t *testing.T, path, script string) *muxSession {
	t.Helper()
	s, err := muxOpenSession(path, "exec /bin/sh -c '"+script+"'", muxPatience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// muxReadLine reads up to and with the line want, or one line if want is empty, which it returns.
func muxReadLine(t *testing.T, s *muxSession, want string) string {
	t.Helper()
	s.SetReadDeadline(time.Now().Add(muxPatience))
	var line []byte
	for b := make([]byte, 1); ; {
		if _, err := io.ReadFull(s, b); err != nil {
			t.Fatalf("waiting for %q: %v after %q, stderr %q", want, err, line, s.stderr())
		}
		if line = append(line, b[0]); b[0] != '\n' {
			continue
		}
		if got := strings.TrimSuffix(string(line), "\n"); want == "" || got == want {
			return got
		}
		line = line[:0]
	}
}

func muxEventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(muxPatience); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in %v: %s", muxPatience, what)
		}
	}
}

// muxOpenFiles counts this process's descriptors, and is 0 where the system does not list them.
func muxOpenFiles(t *testing.T) int {
	list, _ := os.ReadDir("/proc/self/fd")
	return len(list)
}

// muxFreePorts finds TCP ports that are free on 127.0.0.1, below those that systems give to outgoing
// connections, so that nobody is likely to take one before its use.
func muxFreePorts(t *testing.T, n int) (ports []int) {
	t.Helper()
	for port := 12000 + mathrand.Intn(12000); len(ports) < n && port < 32768; port++ {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			continue
		}
		defer l.Close()
		ports = append(ports, port)
	}
	if len(ports) < n {
		t.Fatalf("only %d free ports", len(ports))
	}
	return ports
}

// muxEcho is a TCP service on 127.0.0.1 that sends back what it gets.
func muxEcho(t *testing.T) (port int) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
	return l.Addr().(*net.TCPAddr).Port
}

// muxTempDir is a directory with a name short enough for ssh's control sockets.
func muxTempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "rd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// testTool finds an OpenSSH program by its absolute path; without it the test is skipped, or fails where CI=true.
func testTool(t *testing.T, name string) string {
	t.Helper()
	if path, err := exec.LookPath(name); err == nil {
		if path, err = filepath.Abs(path); err == nil {
			return path
		}
	}
	for _, dir := range []string{"/usr/sbin", "/usr/local/sbin"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
			return filepath.Join(dir, name)
		}
	}
	if os.Getenv("CI") == "true" {
		t.Fatalf("%s is not installed", name)
	}
	t.Skipf("%s is not installed", name)
	return ""
}

// testLog collects what a program writes.
type testLog struct {
	mu sync.Mutex
	b  []byte
}

func (l *testLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b = append(l.b, b...)
	return len(b), nil
}

func (l *testLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.b)
}

// testProcess starts a program that the end of the test kills and waits for; done is closed once it has ended.
func testProcess(t *testing.T, log *testLog, name string, args ...string) (cmd *exec.Cmd, done <-chan struct{}) {
	t.Helper()
	cmd = exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = log, log, time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		cmd.Wait()
		close(ended)
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-ended
	})
	return cmd, ended
}

// testSSHD is an OpenSSH server on 127.0.0.1 for the user who runs the test.
type testSSHD struct {
	port       int
	key        string // the file with the private key that gets in
	knownHosts string // the file with its host key
	log        *testLog
}

// startSSHD starts a server; extraConfig are lines of sshd_config that win over its own. The end of the test stops it.
func startSSHD(t *testing.T, extraConfig ...string) *testSSHD {
	t.Helper()
	sshd, keygen := testTool(t, "sshd"), testTool(t, "ssh-keygen")
	dir := t.TempDir()
	s := &testSSHD{port: muxFreePorts(t, 1)[0], key: filepath.Join(dir, "user"), knownHosts: filepath.Join(dir, "known_hosts"), log: &testLog{}}
	host, config := filepath.Join(dir, "host"), filepath.Join(dir, "sshd_config")
	for _, key := range []string{s.key, host} {
		if out, err := exec.Command(keygen, "-q", "-t", "ed25519", "-N", "", "-f", key).CombinedOutput(); err != nil {
			t.Fatalf("ssh-keygen: %v: %s", err, out)
		}
	}
	public, err := os.ReadFile(host + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	lines := append(extraConfig, fmt.Sprintf("Port %d", s.port), "ListenAddress 127.0.0.1", "HostKey "+host, "PidFile none",
		"AuthorizedKeysFile "+s.key+".pub", "PasswordAuthentication no", "PermitRootLogin yes", "StrictModes no", "UsePAM no")
	for path, text := range map[string]string{
		s.knownHosts: fmt.Sprintf("[127.0.0.1]:%d %s", s.port, public),
		config:       strings.Join(lines, "\n") + "\n",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if runtime.GOOS == "linux" && os.Getuid() == 0 {
		// sshd as root wants it to exist; it stays, for other servers may have come to need it.
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
			t.Fatal(err)
		}
	}
	_, done := testProcess(t, s.log, sshd, "-D", "-e", "-f", config)
	muxEventually(t, "sshd listens", func() bool {
		select {
		case <-done:
			t.Fatalf("sshd ended: %s", s.log)
		default:
		}
		return strings.Contains(s.log.String(), "Server listening on")
	})
	return s
}

// sshArgs are the arguments that let ssh in without the user's configuration; the host is 127.0.0.1.
func (s *testSSHD) sshArgs() []string {
	return []string{"-F", "none", "-p", strconv.Itoa(s.port), "-i", s.key, "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-o", "BatchMode=yes",
		"-o", "UserKnownHostsFile=" + s.knownHosts, "-o", "GlobalKnownHostsFile=/dev/null", "-o", "StrictHostKeyChecking=yes"}
}

// testMaster is a running ssh master.
type testMaster struct {
	path string // of its control socket
	pid  int
	done <-chan struct{} // closed when it has ended
	log  *testLog
}

// startTestMaster starts a master to sshd and waits until its control socket is there. The end of the test kills it.
func startTestMaster(t *testing.T, sshd *testSSHD, extraArgs ...string) *testMaster {
	t.Helper()
	m := &testMaster{path: filepath.Join(muxTempDir(t), "c"), log: &testLog{}}
	args := append(sshd.sshArgs(), "-M", "-N", "-T", "-o", "ControlMaster=yes", "-o", "ControlPath="+m.path, "-o", "ControlPersist=no")
	cmd, done := testProcess(t, m.log, testTool(t, "ssh"), append(append(args, extraArgs...), "127.0.0.1")...)
	m.pid, m.done = cmd.Process.Pid, done
	muxEventually(t, "the ssh master answers", func() bool {
		select {
		case <-done:
			if os.Geteuid() != 0 && strings.Contains(m.log.String(), "Permission denied (") {
				t.Skipf("an sshd of this user's own does not let it in: %s", sshd.log) // locked, or without a shell
			}
			t.Fatalf("the ssh master ended: %s\nsshd: %s", m.log, sshd.log)
		default:
		}
		_, err := os.Stat(m.path)
		return err == nil
	})
	return m
}
