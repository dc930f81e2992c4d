package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// muxSoon is for what is certain not to come, as patience is for what is.
const muxSoon = 200 * time.Millisecond

func TestMuxEncode(t *testing.T) {
	for _, tt := range []struct {
		name, want string
		frame      *muxFrame
	}{
		{"hello", "00000008" + "00000001" + "00000004", newMuxFrame(muxHello).u32(muxVersion)},
		{"forward", "00000025" + "10000006" + "00000001" + "00000001" + "00000002" + "2f61" + "fffffffe" + "00000007" + "2f622e736f636b" + "fffffffe",
			newMuxFrame(muxOpenFwd).u32(1).u32(1).str("/a").u32(0xfffffffe).str("/b.sock").u32(0xfffffffe)},
		{"strings", "00000011" + "10000008" + "00000007" + "00000001" + "61" + "00000000", newMuxFrame(muxStdioFwd).u32(7).str("a").str("")},
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
	serveEach(t, l, func(c net.Conn) {
		c.SetDeadline(time.Now().Add(patience))
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
	})
	return path
}

func TestMuxHostileHello(t *testing.T) {
	t.Parallel()
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
		wait := patience
		if tt.hello == nil {
			wait = muxSoon
		}
		m, err := muxDial(path, wait)
		if err == nil {
			m.Close()
		}
		if err == nil || !strings.Contains(err.Error(), tt.error) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	if _, err := muxDial(filepath.Join(t.TempDir(), "none"), patience); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no socket: %v", err)
	}
}

func TestMuxHostileReplies(t *testing.T) {
	t.Parallel()
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
		m, err := muxDial(muxFake(t, hello, tt.answer), patience)
		if err != nil {
			t.Fatal(err)
		}
		wait := patience
		if strings.Contains(tt.error, "timeout") {
			wait = muxSoon
		}
		pid, err := m.alive(wait)
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

// A forward is asked for with both ends as paths, and is there, or refused, by the reply.
func TestMuxForward(t *testing.T) {
	t.Parallel()
	const here, there = "/d/x.engine", "/run/docker.sock"
	for _, tt := range []struct {
		name, error string
		refused     bool
		answer      func(typ, id uint32) []byte
	}{
		{"well", "", false, func(typ, id uint32) []byte { return newMuxFrame(muxOK).u32(id).bytes() }},
		{"denied", "refused by ssh: no", true, func(typ, id uint32) []byte { return newMuxFrame(muxDenied).u32(id).str("no").bytes() }},
		{"failed", "refused by ssh: Port forwarding failed", true, func(typ, id uint32) []byte {
			return newMuxFrame(muxFailure).u32(id).str("Port forwarding failed").bytes()
		}},
		{"a port", "instead of 0x80000001", false, func(typ, id uint32) []byte { return newMuxFrame(muxAlive).u32(id).u32(1).bytes() }},
		{"hangs up", "EOF", false, func(typ, id uint32) []byte { return nil }},
		{"answers nothing", "i/o timeout", false, func(typ, id uint32) []byte { return []byte{} }},
	} {
		m, err := muxDial(muxFake(t, newMuxFrame(muxHello).u32(muxVersion).bytes(), func(typ, id uint32) []byte {
			if typ != muxOpenFwd || id != 1 {
				t.Errorf("%s: request %d of type 0x%08x", tt.name, id, typ)
			}
			return tt.answer(typ, id)
		}), patience)
		if err != nil {
			t.Fatal(err)
		}
		wait := patience
		if strings.Contains(tt.error, "timeout") {
			wait = muxSoon
		}
		err = m.forward(here, there, wait)
		if (err == nil) != (tt.error == "") || err != nil && (!strings.Contains(err.Error(), tt.error) || !strings.Contains(err.Error(), here)) {
			t.Errorf("%s: %v", tt.name, err)
		}
		if errors.As(err, new(*muxError)) != tt.refused {
			t.Errorf("%s: %#v", tt.name, err)
		}
		m.Close()
	}
}

// A real master forwards to a socket and carries what connects there, half-closes included.
func TestMuxForwardAgainstSSH(t *testing.T) {
	t.Parallel()
	master := startTestMaster(t, startSSHD(t))
	l, there := listenFake(t)
	serveEach(t, l, func(c net.Conn) { io.Copy(c, c) })
	here := master.path + ".engine"
	m, err := muxDial(master.path, patience)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.forward(here, there, patience); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Lstat(here); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket: %v, %v", info, err)
	}
	c, err := dialMaster(context.Background(), here)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	io.WriteString(c, "hello")
	c.CloseWrite()
	if b, err := io.ReadAll(c); string(b) != "hello" || err != nil {
		t.Errorf("got %q, %v", b, err)
	}
	if err := m.forward(there, here, patience); !errors.As(err, new(*muxError)) {
		t.Errorf("where there is a socket: %v", err)
	}
}

// streamFake stands in for a master that is asked for streams, each on a connection of its own, and whether it is alive. It
// writes its greeting and its signs of life with say, where that is not nil; serve gets the connection with the ends that
// came along: of what is sent to the service, and of what is got from there.
func streamFake(t *testing.T, l net.Listener, say func(c *net.UnixConn, b []byte), serve func(c *net.UnixConn, to string, in, out *os.File)) {
	t.Helper()
	if say == nil {
		say = func(c *net.UnixConn, b []byte) { c.Write(b) }
	}
	serveEach(t, l, func(conn net.Conn) {
		c := conn.(*net.UnixConn)
		c.SetDeadline(time.Now().Add(patience))
		say(c, newMuxFrame(muxHello).u32(muxVersion).bytes())
		var head [12]byte
		if _, err := io.ReadFull(c, head[:]); err != nil {
			return
		}
		if hello := newMuxFrame(muxHello).u32(muxVersion).bytes(); !bytes.Equal(head[:], hello) {
			t.Errorf("greeted with %x", head)
		}
		if _, err := io.ReadFull(c, head[:4]); err != nil {
			return
		}
		body := make([]byte, binary.BigEndian.Uint32(head[:]))
		if _, err := io.ReadFull(c, body); err != nil {
			return
		}
		for alive := make([]byte, 12); binary.BigEndian.Uint32(body) == muxAliveCheck; copy(body[4:], alive[8:]) {
			say(c, newMuxFrame(muxAlive).u32(binary.BigEndian.Uint32(body[4:])).u32(uint32(os.Getpid())).bytes())
			if _, err := io.ReadFull(c, alive); err != nil {
				return
			}
		}
		var ends [2]*os.File
		for i := range ends {
			if ends[i] = receiveEnd(t, c); ends[i] == nil {
				return
			}
			defer ends[i].Close()
		}
		host := binary.BigEndian.Uint32(body[12:])
		to := fmt.Sprintf("%s %d", body[16:16+host], binary.BigEndian.Uint32(body[16+host:]))
		if typ, id := binary.BigEndian.Uint32(body), binary.BigEndian.Uint32(body[4:]); typ != muxStdioFwd || id != 1 {
			t.Errorf("request %d of type 0x%08x", id, typ)
		}
		serve(c, to, ends[0], ends[1])
	})
}

// receiveEnd returns the descriptor that comes next, or nil.
func receiveEnd(t *testing.T, c *net.UnixConn) *os.File {
	oob := make([]byte, 64)
	_, n, _, _, err := c.ReadMsgUnix(make([]byte, 1), oob)
	if err != nil {
		return nil
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) != 1 {
		t.Errorf("%d messages with a descriptor, %v", len(messages), err)
		return nil
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		t.Errorf("descriptors %v, %v", fds, err)
		return nil
	}
	unix.SetNonblock(fds[0], true)
	return os.NewFile(uintptr(fds[0]), "end")
}

func listenFake(t *testing.T) (l net.Listener, path string) {
	t.Helper()
	path = filepath.Join(muxTempDir(t), "c")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	return l, path
}

func TestMuxStream(t *testing.T) {
	l, path := listenFake(t)
	streamFake(t, l, nil, func(c *net.UnixConn, to string, in, out *os.File) {
		c.Write(newMuxFrame(muxSessionOpened).u32(1).u32(7).bytes())
		all, err := io.ReadAll(in)
		fmt.Fprintf(out, "%s: %s %v", to, all, err)
	})
	defer noLeaks(t)()
	for _, to := range []string{"127.0.0.1:80", "[fe80::1%eth0]:65535"} {
		s := muxTestStream(t, path, netip.MustParseAddrPort(to))
		io.WriteString(s.in, "hello")
		s.in.Close()
		got, err := io.ReadAll(s.out)
		addr := netip.MustParseAddrPort(to)
		if want := fmt.Sprintf("%s %d: hello <nil>", addr.Addr(), addr.Port()); string(got) != want || err != nil {
			t.Errorf("got %q, %v, want %q", got, err, want)
		}
		s.awaitEnd()
		s.Close()
	}
}

func TestMuxStreamHostile(t *testing.T) {
	hello := newMuxFrame(muxHello).u32(muxVersion).str("new").str("extension").bytes()
	opened := newMuxFrame(muxSessionOpened).u32(1).u32(7)
	for _, tt := range []struct {
		name, error   string
		hello, answer []byte // then it hangs up
		hangs         bool   // or not
		refused       bool
	}{
		{"hangs up", "EOF", nil, nil, false, false},
		{"answers nothing", "deadline exceeded", nil, nil, true, false},
		{"greets and hangs up", "EOF", hello, nil, false, false},
		{"greets and hangs", "deadline exceeded", hello, nil, true, false},
		{"other version", "version 5", newMuxFrame(muxHello).u32(5).bytes(), nil, true, false},
		{"no greeting", "instead of a greeting", nil, opened.bytes(), true, false},
		{"not ours at all", "a message of", []byte("HTTP/1.1 400 Bad Request\r\n\r\n"), nil, true, false},
		{"refuses", "refused by ssh: Session open refused by peer", hello, newMuxFrame(muxFailure).u32(1).str("Session open refused by peer").bytes(), true, true},
		{"denies", "refused by ssh: [31mno", hello, newMuxFrame(muxDenied).u32(1).str("\x1b[31mno").bytes(), true, true},
		{"refuses another", "reply to request 2", hello, newMuxFrame(muxFailure).u32(2).str("no").bytes(), true, false},
		{"opens another", "reply to request 2", hello, newMuxFrame(muxSessionOpened).u32(2).u32(7).bytes(), true, false},
		{"other answer", "instead of 0x80000006", hello, newMuxFrame(muxOK).u32(1).bytes(), true, false},
		{"too long", "a message of", hello, []byte{0x7f, 0xff, 0xff, 0xff}, true, false},
		{"stops within", "deadline exceeded", hello, opened.bytes()[:9], true, false},
		{"ends within", "unexpected EOF", hello, opened.bytes()[:9], false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l, path := listenFake(t)
			done := make(chan struct{})
			streamFake(t, l, func(c *net.UnixConn, _ []byte) { c.Write(tt.hello) }, func(c *net.UnixConn, _ string, _, _ *os.File) {
				c.Write(tt.answer)
				if tt.hangs {
					<-done
				}
			})
			unleaked := noLeaks(t)
			wait := patience
			if strings.Contains(tt.error, "deadline") {
				wait = muxSoon / 4
			}
			ctx, cancel := context.WithTimeout(context.Background(), wait)
			defer cancel()
			var admitted atomic.Int32
			s, err := muxOpenStream(ctx, path, netip.MustParseAddrPort("127.0.0.1:80"), func() { admitted.Add(1) })
			var refused *muxError
			if s != nil || err == nil || !strings.Contains(err.Error(), tt.error) || errors.As(err, &refused) != tt.refused || tt.refused && refused.denied != (tt.name == "denies") {
				t.Errorf("%v, %v, want %q", s, err, tt.error)
			}
			if n := admitted.Load(); n != 1 {
				t.Errorf("admitted %d times", n)
			}
			close(done)
			unleaked()
		})
	}
}

// It is admitted when the master has greeted, and not before.
func TestMuxStreamAdmitted(t *testing.T) {
	l, path := listenFake(t)
	asked, greet := make(chan struct{}), make(chan struct{})
	streamFake(t, l, func(*net.UnixConn, []byte) {}, func(c *net.UnixConn, _ string, _, _ *os.File) {
		close(asked)
		<-greet
		c.Write(newMuxFrame(muxHello).u32(muxVersion).bytes())
		c.Read(make([]byte, 1))
	})
	unleaked := noLeaks(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	admitted, result := make(chan struct{}), make(chan error, 1)
	go func() {
		_, err := muxOpenStream(ctx, path, netip.MustParseAddrPort("127.0.0.1:80"), func() { close(admitted) }) // twice would panic
		result <- err
	}()
	<-asked
	select {
	case <-admitted:
		t.Error("admitted before the master says a word")
	case <-time.After(muxSoon / 4):
	}
	close(greet)
	<-admitted
	select {
	case err := <-result:
		t.Errorf("opened without an answer: %v", err)
	default:
	}
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("after the end of its context: %v", err)
	}
	unleaked()
}

func TestMuxStreamNoMaster(t *testing.T) {
	defer noLeaks(t)()
	admitted := 0
	open := func(ctx context.Context, path string) error {
		s, err := muxOpenStream(ctx, path, netip.MustParseAddrPort("127.0.0.1:80"), func() { admitted++ })
		if err == nil {
			s.Close()
		}
		return err
	}
	if err := open(context.Background(), filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) || !masterGone(err) {
		t.Errorf("no socket: %v", err)
	}
	l, path := listenFake(t)
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	if err := open(context.Background(), path); !errors.Is(err, syscall.ECONNREFUSED) || !masterGone(err) {
		t.Errorf("nobody at the socket: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := open(ctx, path); !errors.Is(err, context.Canceled) {
		t.Errorf("a context that has ended: %v", err)
	}
	if admitted != 3 {
		t.Errorf("admitted %d times, want 3", admitted)
	}
}

// A master that is busy has a full backlog: who comes waits.
func TestMuxStreamBacklog(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("elsewhere a full backlog refuses")
	}
	path := filepath.Join(muxTempDir(t), "c")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	unix.CloseOnExec(fd)
	file := os.NewFile(uintptr(fd), path)
	defer file.Close()
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	for {
		c, err := net.Dial("unix", path)
		if err != nil {
			if !errors.Is(err, syscall.EAGAIN) {
				t.Fatal(err)
			}
			break
		}
		defer c.Close()
	}
	unleaked := noLeaks(t)
	admitted := make(chan struct{}, 9)
	ctx, cancel := context.WithTimeout(context.Background(), muxSoon/4)
	defer cancel()
	to := netip.MustParseAddrPort("127.0.0.1:80")
	if _, err := muxOpenStream(ctx, path, to, func() { admitted <- struct{}{} }); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a backlog that stays full: %v", err)
	}
	if len(admitted) != 1 {
		t.Errorf("admitted %d times", len(admitted))
	}
	<-admitted
	unleaked()
	opened := make(chan error, 1)
	go func() {
		s, err := muxOpenStream(context.Background(), path, to, func() { admitted <- struct{}{} })
		if err == nil {
			s.Close()
		}
		opened <- err
	}()
	select {
	case <-admitted:
		t.Error("admitted with the backlog full")
	case <-time.After(muxSoon / 4):
	}
	l, err := net.FileListener(file)
	if err != nil {
		t.Fatal(err)
	}
	streamFake(t, l, nil, func(c *net.UnixConn, _ string, _, _ *os.File) {
		c.Write(newMuxFrame(muxSessionOpened).u32(1).u32(7).bytes())
	})
	if err := <-opened; err != nil || len(admitted) != 1 {
		t.Errorf("once there is room: %v, admitted %d times", err, len(admitted))
	}
}

func TestMuxSessionHostile(t *testing.T) {
	t.Parallel()
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
		}), "true", patience)
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		wait := patience
		if tt.error == "timeout" {
			wait = muxSoon
		}
		exit, err := s.wait(wait)
		if exit != tt.exit || (err == nil) != (tt.error == "") || err != nil && !strings.Contains(err.Error(), tt.error) {
			t.Errorf("%s: got %d, %v", tt.name, exit, err)
		}
		s.Close()
	}
	path := muxFake(t, hello, func(typ, id uint32) []byte { return opened(id + 1) })
	for _, command := range []string{"true", "a\x00b", strings.Repeat("x", muxMaxFrame)} {
		if s, err := muxOpenSession(path, command, patience); err == nil {
			s.Close()
			t.Errorf("command of %d bytes, or a wrong id: no error", len(command))
		}
	}
}

func TestMuxAgainstSSH(t *testing.T) {
	sshd := startSSHD(t)
	master := startTestMaster(t, sshd)
	m, err := muxDial(master.path, patience)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if pid, err := m.alive(patience); err != nil || pid != master.pid {
		t.Fatalf("alive: %d, %v, want %d", pid, err, master.pid)
	}
	t.Run("stream", func(t *testing.T) { testMuxStream(t, master.path) })
	t.Run("session", func(t *testing.T) { testMuxSession(t, master.path) })
	t.Run("leaks", func(t *testing.T) { testMuxLeaks(t, master.path) })
	t.Run("abandoned", func(t *testing.T) { testMuxAbandoned(t, master.path) })
	if pid, err := m.alive(patience); err != nil || pid != master.pid {
		t.Fatalf("alive after all that: %d, %v", pid, err)
	}
}

// testMuxStream sees what passes through streams.
func testMuxStream(t *testing.T, path string) {
	t.Run("echo", func(t *testing.T) {
		s := muxTestStream(t, path, peer(t, func(c *net.TCPConn) { io.Copy(c, c) }))
		for _, piece := range []string{"a", "bc", strings.Repeat("d", 100_000)} {
			got := make([]byte, len(piece))
			go io.WriteString(s.in, piece)
			if _, err := io.ReadFull(s.out, got); err != nil || string(got) != piece {
				t.Errorf("%d bytes came back otherwise, %v", len(piece), err)
			}
		}
	})
	t.Run("ours ends first", func(t *testing.T) {
		s := muxTestStream(t, path, peer(t, func(c *net.TCPConn) {
			all, err := io.ReadAll(c)
			fmt.Fprintf(c, "%s %v", all, err)
		}))
		io.WriteString(s.in, "all of it")
		s.in.Close()
		if got, err := io.ReadAll(s.out); string(got) != "all of it <nil>" || err != nil {
			t.Errorf("got %q, %v", got, err)
		}
		s.awaitEnd()
	})
	// ssh takes the end of theirs for the end of both: what it was given until then still goes there.
	t.Run("theirs ends first", func(t *testing.T) {
		got := make(chan string, 1)
		s := muxTestStream(t, path, peer(t, func(c *net.TCPConn) {
			c.Read(make([]byte, 1))
			io.WriteString(c, "bye")
			c.CloseWrite()
			all, err := io.ReadAll(c)
			got <- fmt.Sprintf("%s %v", all, err)
		}))
		io.WriteString(s.in, "x")
		if all, err := io.ReadAll(s.out); string(all) != "bye" || err != nil {
			t.Errorf("got %q, %v", all, err)
		}
		if got := <-got; got != " <nil>" {
			t.Errorf("after its own end the service got %s", got)
		}
		s.awaitEnd()
		if _, err := io.WriteString(s.in, "x"); !errors.Is(err, syscall.EPIPE) {
			t.Errorf("writing after the end: %v", err)
		}
	})
	t.Run("every byte", func(t *testing.T) {
		want := make([]byte, 32<<20)
		rand.Read(want)
		up := make(chan []byte, 1)
		s := muxTestStream(t, path, peer(t, func(c *net.TCPConn) {
			written := make(chan bool)
			go func() {
				c.Write(want)
				close(written)
			}()
			all := make([]byte, len(want))
			n, _ := io.ReadFull(c, all)
			up <- all[:n]
			<-written
		}))
		go func() {
			s.in.Write(want)
			s.in.Close()
		}()
		down, err := io.ReadAll(s.out)
		if up := <-up; err != nil || !bytes.Equal(down, want) || !bytes.Equal(up, want) {
			t.Errorf("%d bytes came down and %d up, of %d each, or they differ: %v", len(down), len(up), len(want), err)
		}
	})
	t.Run("refused", func(t *testing.T) {
		defer noLeaks(t)()
		s, err := muxOpenStream(context.Background(), path, netip.AddrPortFrom(loopback4, uint16(muxFreePort(t))), func() {})
		var refused *muxError
		if s != nil || !errors.As(err, &refused) || refused.denied || !strings.Contains(err.Error(), "refused by peer") {
			t.Errorf("%v, %v", s, err)
		}
	})
	t.Run("closed", func(t *testing.T) {
		ended := make(chan bool, 1)
		to := peer(t, func(c *net.TCPConn) {
			io.Copy(io.Discard, c)
			ended <- true
		})
		defer noLeaks(t)()
		for range 10 {
			s := muxTestStream(t, path, to)
			read := make(chan error, 1)
			go func() {
				_, err := s.out.Read(make([]byte, 1))
				read <- err
			}()
			s.Close()
			s.Close()
			if err := <-read; err == nil {
				t.Error("a read from a closed stream succeeded")
			}
			<-ended
		}
	})
}

// A stream that ended because its master did looks like one that the service ended, but the master does not greet any more.
// That a connection made earlier is still up tells nothing: Linux closes the newest of a process's descriptors first.
func TestMuxMasterEndsStreams(t *testing.T) {
	t.Parallel()
	const streams = 30
	sshd := startSSHD(t)
	to := peer(t, func(c *net.TCPConn) { io.Copy(c, c) })
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM, syscall.SIGHUP} {
		t.Run(sig.String(), func(t *testing.T) {
			master := startTestMaster(t, sshd)
			errs := make(chan error, streams)
			for range streams {
				s := muxTestStream(t, master.path, to)
				go io.Copy(s.in, s.out) // round and round
				io.WriteString(s.in, "some bytes")
			}
			for range streams {
				s := muxTestStream(t, master.path, to)
				go func() {
					io.Copy(io.Discard, s.out)
					m, err := muxDial(master.path, patience)
					if err == nil {
						m.Close()
					}
					errs <- err
				}()
			}
			if err := syscall.Kill(master.pid, sig); err != nil {
				t.Fatal(err)
			}
			for range streams {
				if err := <-errs; !masterGone(err) {
					t.Errorf("a stream has ended, and then the master says %v", err)
				}
			}
		})
	}
}

// muxTestStream opens a stream that the end of the test closes.
func muxTestStream(t *testing.T, path string, to netip.AddrPort) *muxStream {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s, err := muxOpenStream(ctx, path, to, func() {})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	s.in.SetDeadline(time.Now().Add(patience))
	s.out.SetDeadline(time.Now().Add(patience))
	return s
}

func testMuxSession(t *testing.T, path string) {
	t.Run("exit", func(t *testing.T) {
		s := muxTestSession(t, path, `read line; echo "got $line"; echo oops >&2; exit 7`)
		if _, err := io.WriteString(s, "hello\n"); err != nil {
			t.Fatal(err)
		}
		s.SetReadDeadline(time.Now().Add(patience))
		out, err := io.ReadAll(s)
		if err != nil || !strings.HasSuffix(string(out), "got hello\n") {
			t.Errorf("stdout %q, %v", out, err)
		}
		if exit, err := s.wait(patience); exit != 7 || err != nil {
			t.Errorf("exit %d, %v", exit, err)
		}
		if !strings.HasSuffix(s.stderr(), "oops\n") {
			t.Errorf("stderr %q", s.stderr())
		}
	})
	t.Run("stderr tail", func(t *testing.T) {
		s := muxTestSession(t, path, `i=0; while [ $i -lt 3000 ]; do echo "line $i"; i=$((i+1)); done >&2`)
		exit, err := s.wait(patience)
		if got := s.stderr(); exit != 0 || err != nil || len(got) != muxTail || !strings.HasSuffix(got, "line 2998\nline 2999\n") {
			t.Errorf("exit %d, %v, %d bytes of stderr that end in %q", exit, err, len(got), got[max(0, len(got)-30):])
		}
	})
	t.Run("signal", func(t *testing.T) {
		s := muxTestSession(t, path, `kill -9 $$`)
		if exit, err := s.wait(patience); exit != -1 || err != nil {
			t.Errorf("exit %d, %v", exit, err)
		}
	})
	t.Run("not found", func(t *testing.T) {
		s := muxTestSession(t, path, `exec /nowhere/nothing`)
		if exit, err := s.wait(patience); exit != 127 || err != nil || !strings.Contains(s.stderr(), "/nowhere/nothing") {
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
		s.SetReadDeadline(time.Now().Add(patience))
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
		case <-time.After(patience):
			t.Fatal("Close left a read blocked")
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		// Whether the end was still heard of is chance; that there is no more to wait for is not.
		if _, err := s.wait(patience); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("wait after Close waits")
		}
		eventually(t, "the command ends", so(func() bool { return syscall.Kill(pid, 0) == syscall.ESRCH }))
	}
	cycle()
	defer noLeaks(t)()
	for range 3 {
		cycle()
		if _, err := muxOpenSession(path, "a\x00b", patience); err == nil {
			t.Error("a command with a NUL was run")
		}
	}
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
	unleaked := noLeaks(t)
	eventually(t, "the stopped server leaves a session unanswered", so(func() bool {
		s, err := muxOpenSession(path, "exec cat", muxSoon)
		if err == nil {
			s.Close()
		} else if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
		return err != nil
	}))
	unleaked()
	resume()
	again := muxTestSession(t, path, `echo MARK`)
	muxReadLine(t, again, "MARK")
}

func TestMuxMaxSessions(t *testing.T) {
	t.Parallel()
	for _, most := range []int{0, 1} {
		master := startTestMaster(t, startSSHD(t, fmt.Sprintf("MaxSessions %d", most)))
		for range most {
			muxReadLine(t, muxTestSession(t, master.path, `echo MARK; exec cat`), "MARK")
		}
		s, err := muxOpenSession(master.path, "true", patience)
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
	t.Parallel()
	master := startTestMaster(t, startSSHD(t))
	m, err := muxDial(master.path, patience)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	s := muxTestSession(t, master.path, `echo MARK; exec cat`)
	muxReadLine(t, s, "MARK")
	if err := syscall.Kill(master.pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the stopped master leaves a question unanswered", so(func() bool {
		_, err = m.alive(muxSoon)
		return err != nil
	}))
	ctx, cancel := context.WithTimeout(context.Background(), muxSoon)
	defer cancel()
	_, streamErr := muxOpenStream(ctx, master.path, netip.MustParseAddrPort("127.0.0.1:1"), func() {})
	_, dialErr := muxDial(master.path, muxSoon)
	_, sessionErr := muxOpenSession(master.path, "true", muxSoon)
	if !errors.Is(streamErr, context.DeadlineExceeded) {
		t.Errorf("stream: %v", streamErr)
	}
	for what, err := range map[string]error{"alive": err, "terminate": m.terminate(muxSoon), "dial": dialErr, "session": sessionErr} {
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := s.Close(); err != nil { // must not wait for the master either
		t.Error(err)
	}
}

func TestMuxMasterEnds(t *testing.T) {
	t.Parallel()
	sshd := startSSHD(t)
	for _, tt := range []struct {
		name string
		end  func(m *muxConn, pid int) error
	}{
		{"killed", func(m *muxConn, pid int) error { return syscall.Kill(pid, syscall.SIGKILL) }},
		{"terminated", func(m *muxConn, pid int) error { return m.terminate(patience) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			master := startTestMaster(t, sshd)
			m, err := muxDial(master.path, patience)
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
			case <-time.After(patience):
				t.Fatal("the master is still there")
			}
			if pid, err := m.alive(patience); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("alive: %d, %v", pid, err)
			}
			if err := m.terminate(patience); err != nil {
				t.Errorf("terminate of what is gone: %v", err)
			}
			if m, err := muxDial(master.path, patience); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("dial: %v, %v", m, err)
			}
			if n, err := s.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("session: read %d, %v", n, err)
			}
			if exit, err := s.wait(patience); exit != -1 || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("session: exit %d, %v", exit, err)
			}
		})
	}
}

// muxTestSession runs script in /bin/sh, whatever the user's shell is; no single quotes in it.
func muxTestSession(t *testing.T, path, script string) *muxSession {
	t.Helper()
	s, err := muxOpenSession(path, "exec /bin/sh -c '"+script+"'", patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// muxReadLine reads up to and with the line want, or one line if want is empty, which it returns.
func muxReadLine(t *testing.T, s *muxSession, want string) string {
	t.Helper()
	s.SetReadDeadline(time.Now().Add(patience))
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

// so makes a condition one that eventually takes.
func so(cond func() bool) func() error {
	return func() error {
		if !cond() {
			return errors.New("it is not so")
		}
		return nil
	}
}

// noLeaks returns a function that waits until this process has no more goroutines and open files than now.
func noLeaks(t *testing.T) func() {
	count := func() (goroutines, files int) {
		list, _ := os.ReadDir("/proc/self/fd") // not every system lists them
		return runtime.NumGoroutine(), len(list)
	}
	goroutines, files := count()
	return func() {
		t.Helper()
		eventually(t, "nothing leaks", func() error {
			runtime.GC() // for the pipes that package net keeps for another splice
			if g, f := count(); g > goroutines || f > files {
				return fmt.Errorf("%d goroutines and %d open files, before %d and %d", g, f, goroutines, files)
			}
			return nil
		})
	}
}

var muxLastPort atomic.Uint32

func init() { muxLastPort.Store(12000 + mathrand.Uint32N(10000)) }

// muxFreePort finds a TCP port that is free on 127.0.0.1, below those that systems give to outgoing connections, so that
// nobody is likely to take it before its use. None is given out twice.
func muxFreePort(t *testing.T) int {
	t.Helper()
	for range 1000 {
		port := int(muxLastPort.Add(1))
		if l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			l.Close()
			return port
		}
	}
	t.Fatal("no port is free")
	return 0
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
	s := &testSSHD{port: muxFreePort(t), key: filepath.Join(dir, "user"), knownHosts: filepath.Join(dir, "known_hosts"), log: &testLog{}}
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
	eventually(t, "sshd listens", so(func() bool {
		select {
		case <-done:
			t.Fatalf("sshd ended: %s", s.log)
		default:
		}
		return strings.Contains(s.log.String(), "Server listening on")
	}))
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
	eventually(t, "the ssh master answers", so(func() bool {
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
	}))
	return m
}
