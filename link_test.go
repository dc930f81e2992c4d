package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Tests of the data path: pump, the gate, doors and what they carry, probes. Against a real ssh master where that can tell,
// against one made by hand where ssh would have to be brought to it.

// peer serves connections on a local address until the test ends.
func peer(t *testing.T, serve func(*net.TCPConn)) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serveEach(t, l, func(c net.Conn) { serve(c.(*net.TCPConn)) })
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// nobody is a local address on which nobody listens.
func nobody(t *testing.T) netip.AddrPort {
	return netip.AddrPortFrom(loopback4, uint16(muxFreePort(t)))
}

// sshMaster starts a master to sshd as rdhpf does. The end of the test stops it.
func sshMaster(t *testing.T, sshd *testSSHD) *master {
	t.Helper()
	dir := muxTempDir(t)
	script := filepath.Join(dir, "ssh")
	if err := os.WriteFile(script, []byte("#!/bin/sh\nexec "+testTool(t, "ssh")+" "+strings.Join(sshd.sshArgs(), " ")+" \"$@\"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	m, err := (sshProgram{path: script}).startMaster(ctx, host{name: "127.0.0.1"}, filepath.Join(dir, "c"), false, func(string) {})
	if err != nil {
		if os.Geteuid() != 0 && strings.Contains(err.Error(), "Permission denied (") {
			t.Skipf("an sshd of this user's own does not let it in: %v", err)
		}
		t.Fatal(err)
	}
	t.Cleanup(m.stop)
	return m
}

// handMaster is a master made by hand, of which streamFake is the process. end ends it as Linux does when it is killed: the
// newest connections are closed first, and who comes meanwhile hears nothing.
func handMaster(t *testing.T, serve func(c *net.UnixConn, to string, in, out *os.File)) (m *master, end func()) {
	t.Helper()
	l, path := listenFake(t)
	var mu sync.Mutex
	var ends []io.Closer
	ending := false
	streamFake(t, l, func(c *net.UnixConn, b []byte) {
		mu.Lock()
		defer mu.Unlock()
		if !slices.Contains(ends, io.Closer(c)) {
			ends = append(ends, c)
		}
		if !ending {
			c.Write(b)
		}
	}, func(c *net.UnixConn, to string, in, out *os.File) {
		mu.Lock()
		ends = append(ends, in, out)
		mu.Unlock()
		serve(c, to, in, out)
	})
	first, err := muxDial(path, patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { first.Close() })
	m = &master{control: path, asked: first, dials: make(chan struct{}, maxDials), done: make(chan struct{})}
	end = sync.OnceFunc(func() {
		mu.Lock()
		ending = true
		now := ends
		mu.Unlock()
		for i, e := range slices.Backward(now) {
			if e.Close(); i == 1 {
				time.Sleep(20 * time.Millisecond) // it has many
			}
		}
		l.Close()
		mu.Lock()
		for _, e := range ends {
			e.Close()
		}
		mu.Unlock()
		close(m.done)
	})
	t.Cleanup(end)
	return m, end
}

func answerOpened(c *net.UnixConn) {
	c.Write(newMuxFrame(muxSessionOpened).u32(1).u32(7).bytes())
}

func answerRefused(c *net.UnixConn) {
	c.Write(newMuxFrame(muxFailure).u32(1).str("Session open refused by peer").bytes())
}

// tcpPair is two ends of a connection.
func tcpPair(t *testing.T) (a, b *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	d, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); d.Close() })
	return c.(*net.TCPConn), d.(*net.TCPConn)
}

// unixPair is two ends of a pair of sockets.
func unixPair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	a, far, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.FileConn(far)
	far.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); c.Close() })
	return a, c.(*net.UnixConn)
}

// pumping is a pump at work between a TCP connection and a unix socket, as in a door.
type pumping struct {
	src, dst interface { // the far ends
		net.Conn
		CloseWrite() error
	}
	near   duplex // what the pump reads
	counts chan int64
	result chan error
}

func startPump(t *testing.T, up bool) *pumping {
	t.Helper()
	a, b := tcpPair(t)
	c, d := unixPair(t)
	p := &pumping{src: a, dst: d, counts: make(chan int64, 10000), result: make(chan error, 1)}
	var near, far duplex = b, c
	if !up {
		p.src, p.dst, near, far = d, a, c, b
	}
	p.near = near
	p.src.SetDeadline(time.Now().Add(patience))
	p.dst.SetDeadline(time.Now().Add(patience))
	go func() { p.result <- pump(far, near, func(n int64) { p.counts <- n }) }()
	return p
}

// counted waits until the pump has counted n bytes, and not one more.
func (p *pumping) counted(t *testing.T, n int64) {
	t.Helper()
	timer := time.After(patience)
	for n > 0 {
		select {
		case m := <-p.counts:
			n -= m
		case <-timer:
			t.Fatalf("%d bytes are not counted", n)
		}
	}
	if n < 0 || len(p.counts) > 0 {
		t.Errorf("%d bytes too many are counted, %d pieces further", -n, len(p.counts))
	}
}

func eachWay(t *testing.T, test func(t *testing.T, up bool)) {
	for _, up := range []bool{true, false} {
		t.Run(map[bool]string{true: "up", false: "down"}[up], func(t *testing.T) { test(t, up) })
	}
}

func TestPump(t *testing.T) {
	t.Parallel()
	eachWay(t, func(t *testing.T, up bool) {
		t.Parallel()
		p := startPump(t, up)
		for _, size := range []int{1, 2, pieceSize - 1, pieceSize, pieceSize + 1, 3<<20 + 7, 1} {
			want, got := make([]byte, size), make([]byte, size)
			rand.Read(want)
			go p.src.Write(want)
			if _, err := io.ReadFull(p.dst, got); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%d bytes came out otherwise: %v", size, err)
			}
			p.counted(t, int64(size)) // though the source says nothing further: a second later at most
		}
		select {
		case err := <-p.result:
			t.Fatalf("ended with %v while its source has not", err)
		default:
		}
		p.src.CloseWrite()
		if err := <-p.result; err != nil {
			t.Error(err)
		}
	})
}

// What goes on and on is counted meanwhile.
func TestPumpCountsMeanwhile(t *testing.T) {
	t.Parallel()
	p := startPump(t, false)
	go func() {
		for {
			if _, err := p.src.Write(make([]byte, 8*pieceSize)); err != nil {
				return
			}
			time.Sleep(time.Millisecond)
		}
	}()
	go io.Copy(io.Discard, p.dst)
	for range 4 {
		select {
		case <-p.counts:
		case <-time.After(patience):
			t.Fatal("nothing is counted")
		}
	}
	p.src.Close()
	if err := <-p.result; err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Error(err)
	}
}

// The end comes through at once, in the middle of much too.
func TestPumpEnds(t *testing.T) {
	eachWay(t, func(t *testing.T, up bool) {
		for _, size := range []int{0, 10, pieceSize, 5 * pieceSize} {
			p := startPump(t, up)
			go func() {
				p.src.Write(make([]byte, size))
				p.src.CloseWrite()
			}()
			if n, err := io.CopyN(io.Discard, p.dst, int64(size)); err != nil {
				t.Fatalf("%d bytes came: %v", n, err)
			}
			if err := <-p.result; err != nil {
				t.Errorf("after %d bytes: %v", size, err)
			}
			p.counted(t, int64(size))
		}
	})
}

func TestPumpFails(t *testing.T) {
	t.Parallel()
	for _, size := range []int{1, 4 * pieceSize} {
		t.Run(fmt.Sprintf("reader gone, %d", size), func(t *testing.T) {
			p := startPump(t, true)
			p.dst.Close()
			go p.src.Write(make([]byte, size))
			if err := <-p.result; !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("got %v", err)
			}
		})
		t.Run(fmt.Sprintf("source reset, %d", size), func(t *testing.T) {
			p := startPump(t, true)
			p.src.Write(make([]byte, size))
			io.CopyN(io.Discard, p.dst, int64(size))
			p.src.(*net.TCPConn).SetLinger(0)
			p.src.Close()
			if err := <-p.result; !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("got %v", err)
			}
		})
		t.Run(fmt.Sprintf("closed while it waits, %d", size), func(t *testing.T) {
			p := startPump(t, true)
			p.src.Write(make([]byte, size))
			io.CopyN(io.Discard, p.dst, int64(size))
			p.near.(io.Closer).Close()
			if err := <-p.result; !errors.Is(err, net.ErrClosed) {
				t.Errorf("got %v", err)
			}
		})
	}
	t.Run("closed while nobody reads", func(t *testing.T) {
		p := startPump(t, false)
		go p.src.Write(make([]byte, 32<<20))
		for sum := int64(0); sum < pieceSize; {
			sum += <-p.counts
		}
		p.near.(io.Closer).Close()
		p.dst.Close()
		if err := <-p.result; err == nil {
			t.Error("no error")
		}
	})
}

func TestGate(t *testing.T) {
	g, one, two := newGate(), &master{}, &master{}
	pass := func(failed *master) chan *master {
		got := make(chan *master, 1)
		go func() {
			m, _ := g.pass(context.Background(), failed)
			got <- m
		}()
		return got
	}
	waiting := func(n int) {
		t.Helper()
		eventually(t, fmt.Sprintf("%d wait", n), func() error {
			g.mu.Lock()
			defer g.mu.Unlock()
			if g.waiting != n {
				return fmt.Errorf("%d do", g.waiting)
			}
			return nil
		})
	}
	first, second := pass(nil), pass(one)
	waiting(2)
	g.set(one)
	if m := <-first; m != one {
		t.Errorf("passed with %p, want %p", m, one)
	}
	waiting(1) // its master has failed: it wants another
	g.set(one)
	g.set(nil)
	g.set(one)
	waiting(1)
	if m := <-pass(nil); m != one {
		t.Errorf("an open gate gave %p, want %p", m, one)
	}
	g.set(two)
	if m := <-second; m != two {
		t.Errorf("passed with %p, want the next, %p", m, two)
	}
	waiting(0)

	g.set(nil)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, maxWaiting)
	for range maxWaiting {
		go func() {
			_, err := g.pass(ctx, nil)
			ended <- err
		}()
	}
	waiting(maxWaiting)
	if _, err := g.pass(context.Background(), nil); err == nil || !strings.Contains(err.Error(), "too many") {
		t.Errorf("one more: %v", err)
	}
	cancel()
	for range maxWaiting {
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
	}
	waiting(0)
}

func TestGateDial(t *testing.T) {
	to := netip.MustParseAddrPort("127.0.0.1:80")
	var refusals atomic.Int32
	refusing, _ := handMaster(t, func(c *net.UnixConn, _ string, _, _ *os.File) {
		refusals.Add(1)
		answerRefused(c)
	})
	hangsUp, _ := handMaster(t, func(*net.UnixConn, string, *os.File, *os.File) {})
	ended, end := handMaster(t, nil)
	end()
	good, _ := handMaster(t, func(c *net.UnixConn, _ string, in, _ *os.File) {
		answerOpened(c)
		io.Copy(io.Discard, in)
	})
	defer noLeaks(t)()

	g := newGate()
	g.set(refusing)
	if _, _, err := g.dial(context.Background(), to); !errors.As(err, new(*muxError)) || refusals.Load() != 1 {
		t.Errorf("refused: %v, asked %d times", err, refusals.Load())
	}
	for name, gone := range map[string]*master{"hangs up": hangsUp, "ended": ended, "no socket": {control: "/nowhere/c", dials: make(chan struct{}, 1)}} {
		g.set(gone)
		type dialled struct {
			s   *muxStream
			m   *master
			err error
		}
		got := make(chan dialled, 1)
		go func() {
			s, m, err := g.dial(context.Background(), to)
			got <- dialled{s, m, err}
		}()
		eventually(t, name+": waits for the next master", so(func() bool {
			g.mu.Lock()
			defer g.mu.Unlock()
			return g.waiting == 1
		}))
		g.set(good)
		if d := <-got; d.err != nil || d.m != good {
			t.Errorf("%s: through %p, %v", name, d.m, d.err)
		} else {
			d.s.Close()
		}
	}
	g.set(nil)
	ctx, cancel := context.WithTimeout(context.Background(), muxSoon/4)
	defer cancel()
	if _, _, err := g.dial(ctx, to); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("no link: %v", err)
	}
}

// No more than maxDials knock at a master that does not greet; the rest waits for its turn, or its end.
func TestDialsAtOnce(t *testing.T) {
	l, path := listenFake(t)
	var knocking atomic.Int32
	greet := make(chan struct{})
	streamFake(t, l, func(c *net.UnixConn, b []byte) {
		knocking.Add(1)
		<-greet
		c.Write(b)
	}, func(c *net.UnixConn, _ string, in, _ *os.File) {
		answerOpened(c)
		io.Copy(io.Discard, in)
	})
	defer noLeaks(t)()
	m := &master{control: path, dials: make(chan struct{}, maxDials), done: make(chan struct{})}
	const all = 3 * maxDials
	results := make(chan error, all+1)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	dial := func(ctx context.Context) {
		s, err := m.dial(ctx, netip.MustParseAddrPort("127.0.0.1:80"))
		if err == nil {
			s.Close()
		}
		results <- err
	}
	for range all {
		go dial(ctx)
	}
	eventually(t, "the first knock", so(func() bool { return knocking.Load() == maxDials }))
	soon, cancelSoon := context.WithTimeout(ctx, muxSoon/4)
	defer cancelSoon()
	if dial(soon); !errors.Is(<-results, context.DeadlineExceeded) {
		t.Error("one more does not give up")
	}
	if n := knocking.Load(); n != maxDials {
		t.Errorf("%d knock at once", n)
	}
	close(greet)
	for range all {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	if len(m.dials) != 0 {
		t.Errorf("%d places are not given back", len(m.dials))
	}
	close(m.done)
	for range maxDials {
		m.dials <- struct{}{}
	}
	if _, err := m.dial(ctx, netip.MustParseAddrPort("127.0.0.1:80")); !masterGone(err) {
		t.Errorf("a master that has ended: %v", err)
	}
}

// doorway is a door with its forward, and a runner whose loop only runs what is posted.
type doorway struct {
	*door
	t       *testing.T
	forward *forward
}

// openDoor opens a door to an address, of a service that answered once; m is the master, nil for none.
func openDoor(t *testing.T, to netip.AddrPort, m *master) *doorway {
	t.Helper()
	r := &runner{runOptions: runOptions{log: slog.New(slog.NewTextHandler(io.Discard, nil))},
		tasks: make(chan func(time.Time), 64), gate: newGate(), state: newState(plainConfig(), 9)}
	r.ctx, r.quit = context.WithCancel(context.Background())
	r.gate.set(m)
	r.state.ready = true
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	k := key{local: l.Addr().(*net.TCPAddr).AddrPort(), remote: to}
	f := &forward{want: want{key: k}, wanted: true, stage: answering, meter: &meter{}}
	r.state.forwards[k] = f
	w := &doorway{t: t, forward: f, door: &door{r: r, key: k, meter: f.meter, listeners: map[netip.Addr]net.Listener{loopback4: l}}}
	w.ctx, w.shut = context.WithCancel(r.ctx)
	r.start(func() { w.accept(l) })
	over, looped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(looped)
		for {
			select {
			case do := <-r.tasks:
				do(time.Now())
			case <-over:
				return
			}
		}
	}()
	t.Cleanup(func() {
		w.close()
		r.quit()
		r.wg.Wait()
		close(over)
		<-looped
	})
	return w
}

// dial connects as a client.
func (w *doorway) dial() *net.TCPConn {
	w.t.Helper()
	c, err := net.Dial("tcp", w.key.local.String())
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn)
}

// isReset connects as a client who has to be reset, however soon.
func (w *doorway) isReset() error {
	c, err := net.Dial("tcp", w.key.local.String())
	if errors.Is(err, syscall.ECONNRESET) {
		return nil
	} else if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	return isReset(c.(*net.TCPConn))
}

// waiting waits until n connections wait at the gate.
func (w *doorway) waiting(n int) {
	w.t.Helper()
	eventually(w.t, fmt.Sprintf("%d connections wait", n), so(func() bool {
		w.r.gate.mu.Lock()
		defer w.r.gate.mu.Unlock()
		return w.r.gate.waiting == n
	}))
}

// inLoop runs f after all that was posted so far.
func (w *doorway) inLoop(f func()) {
	done := make(chan struct{})
	w.r.tasks <- func(time.Time) {
		f()
		close(done)
	}
	<-done
}

// evidence waits until connections have come, and none is open any more, and is what the loop was told.
func (w *doorway) evidence() (evidence string) {
	w.t.Helper()
	eventually(w.t, "all connections end", so(func() bool { return w.meter.used.Load() > 0 && w.meter.open.Load() == 0 }))
	w.inLoop(func() {
		f := w.forward
		if !f.verified.IsZero() {
			evidence += " answers"
		}
		if !f.look.IsZero() {
			evidence += " suspicion"
		}
	})
	return strings.TrimSpace(evidence)
}

// isReset waits for the client's end, which has to be a reset.
func isReset(c *net.TCPConn) error {
	if n, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
		return fmt.Errorf("ends after %d bytes with %v, and not with a reset", n, err)
	}
	return nil
}

func TestCarry(t *testing.T) {
	t.Parallel()
	m := sshMaster(t, startSSHD(t))
	silently := func(c *net.TCPConn) { io.Copy(io.Discard, c) }
	ends := func(c *net.TCPConn) error { // cleanly
		if all, err := io.ReadAll(c); len(all) > 0 || err != nil {
			return fmt.Errorf("got %q, %w", all, err)
		}
		return nil
	}
	for _, tt := range []struct {
		name     string
		noProbe  bool
		serve    func(c *net.TCPConn)       // nil: nobody does
		client   func(c *net.TCPConn) error // nil: it is reset
		in, out  int64
		evidence string
	}{
		{"back and forth", false, func(c *net.TCPConn) { io.Copy(c, c) }, func(c *net.TCPConn) error {
			for range 3 {
				io.WriteString(c, "hello")
				if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
					return err
				}
			}
			c.CloseWrite()
			return ends(c)
		}, 15, 15, "answers"},
		{"the client ends first", false, func(c *net.TCPConn) {
			all, _ := io.ReadAll(c)
			fmt.Fprintf(c, "%d bytes", len(all))
		}, func(c *net.TCPConn) error {
			c.Write(make([]byte, 1<<20))
			c.CloseWrite()
			if all, err := io.ReadAll(c); string(all) != "1048576 bytes" || err != nil {
				return fmt.Errorf("got %q, %v", all, err)
			}
			return nil
		}, 13, 1 << 20, "answers"},
		{"the service ends first", false, func(c *net.TCPConn) { c.Write(make([]byte, 1<<20)) }, func(c *net.TCPConn) error {
			if n, err := io.Copy(io.Discard, c); n != 1<<20 || err != nil {
				return fmt.Errorf("got %d bytes, %v", n, err)
			}
			return nil
		}, 1 << 20, 0, "answers"},
		{"the client only ends, the service silently after it", false, silently, func(c *net.TCPConn) error {
			c.CloseWrite()
			return ends(c)
		}, 0, 0, ""},
		{"the client goes away", false, silently, func(c *net.TCPConn) error { return c.Close() }, 0, 0, ""},
		{"the client resets", false, silently, func(c *net.TCPConn) error {
			c.SetLinger(0)
			return c.Close()
		}, 0, 0, ""},
		{"the service ends at once", false, func(*net.TCPConn) {}, ends, 0, 0, "suspicion"},
		{"the service resets at once", false, func(c *net.TCPConn) { c.SetLinger(0) }, func(c *net.TCPConn) error {
			if err := ends(c); !errors.Is(err, syscall.ECONNRESET) { // so soon that it could not be opened
				return err
			}
			return nil
		}, 0, 0, "suspicion"},
		{"the service ends at once, never probed", true, func(*net.TCPConn) {}, ends, 0, 0, "suspicion"},
		{"the service ends silently, later", false, func(*net.TCPConn) { time.Sleep(earlyEnd + muxSoon) }, ends, 0, 0, ""},
		{"nobody serves", false, nil, nil, 0, 0, "suspicion"},
		{"nobody serves, never probed", true, nil, nil, 0, 0, "suspicion"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			to := nobody(t)
			if tt.serve != nil {
				to = peer(t, tt.serve)
			}
			w := openDoor(t, to, m)
			w.inLoop(func() { w.forward.noProbe = tt.noProbe })
			err := error(nil)
			if tt.client != nil {
				c := w.dial()
				err = tt.client(c)
				c.Close()
			} else {
				err = w.isReset()
			}
			if err != nil {
				t.Error(err)
			}
			if got := w.evidence(); got != tt.evidence {
				t.Errorf("evidence %q, want %q", got, tt.evidence)
			}
			if n, in, out := w.meter.connections.Load(), w.meter.in.Load(), w.meter.out.Load(); n != 1 || in != tt.in || out != tt.out {
				t.Errorf("counted %d connections, %d bytes in and %d out, want 1, %d and %d", n, in, out, tt.in, tt.out)
			}
		})
	}
}

func TestCarryLeavesNothing(t *testing.T) {
	m := sshMaster(t, startSSHD(t))
	w := openDoor(t, peer(t, func(c *net.TCPConn) { io.Copy(c, c) }), m)
	one := func() {
		c := w.dial()
		io.WriteString(c, "x")
		c.CloseWrite()
		if all, err := io.ReadAll(c); string(all) != "x" || err != nil {
			t.Errorf("got %q, %v", all, err)
		}
		c.Close()
	}
	one()
	w.evidence()
	unleaked := noLeaks(t)
	for range 20 {
		one()
	}
	var wg sync.WaitGroup
	for range 20 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			one()
		}()
	}
	wg.Wait()
	unleaked()
	if n := w.meter.connections.Load(); n != 41 {
		t.Errorf("counted %d connections, want 41", n)
	}
}

// What the end of the master tore must not look like a whole answer to anybody, be it empty or not.
func TestCarryMasterEnds(t *testing.T) {
	t.Parallel()
	sshd := startSSHD(t)
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			m := sshMaster(t, sshd)
			w := openDoor(t, peer(t, func(c *net.TCPConn) { io.Copy(c, c) }), m)
			const all = 40
			torn := make(chan error, all)
			for i := range all {
				c := w.dial()
				if i%2 == 0 { // the others have had no byte yet
					io.WriteString(c, "x")
					if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
						t.Fatal(err)
					}
				}
				go func() { torn <- isReset(c) }()
			}
			eventually(t, "all are open", so(func() bool { return w.meter.open.Load() == all && len(m.dials) == 0 }))
			m.signal(sig)
			<-m.done
			n := 0
			var last error
			for range all {
				if err := <-torn; err != nil {
					n, last = n+1, err
				}
			}
			if n > 0 {
				t.Errorf("%d of %d: %v", n, all, last)
			}
			if got := w.evidence(); strings.Contains(got, "suspicion") {
				t.Error("the end of the master is held against the service")
			}
		})
	}
}

// However the master ends.
func TestCarryMasterEndsSlowly(t *testing.T) {
	t.Parallel()
	m, end := handMaster(t, func(c *net.UnixConn, _ string, in, out *os.File) {
		answerOpened(c)
		io.WriteString(out, "half an ans")
		io.Copy(io.Discard, in)
	})
	w := openDoor(t, netip.MustParseAddrPort("127.0.0.1:80"), m)
	c := w.dial()
	if _, err := io.ReadFull(c, make([]byte, 11)); err != nil {
		t.Fatal(err)
	}
	end()
	if err := isReset(c); err != nil {
		t.Error(err)
	}
}

// A server that has answered before it has got all closes so that the client gets the answer: it ends its half, and goes on
// reading for a while.
func TestCarryEarlyAnswer(t *testing.T) {
	t.Parallel()
	const size = 2 << 20
	to := peer(t, func(c *net.TCPConn) {
		c.Read(make([]byte, 1))
		c.Write(make([]byte, size))
		c.CloseWrite()
		io.Copy(io.Discard, c)
	})
	w := openDoor(t, to, sshMaster(t, startSSHD(t)))
	for range 2 {
		c := w.dial()
		go func() {
			for {
				if _, err := c.Write(make([]byte, 64<<10)); err != nil {
					return
				}
			}
		}()
		n := 0
		for b := make([]byte, 64<<10); ; time.Sleep(time.Millisecond) { // a client that takes its time
			m, err := c.Read(b)
			if n += m; err != nil {
				if n != size {
					t.Errorf("%d bytes of the answer came, of %d: %v", n, size, err)
				}
				break
			}
		}
		c.Close()
	}
}

func TestDoorWaits(t *testing.T) {
	t.Parallel()
	m := sshMaster(t, startSSHD(t))
	w := openDoor(t, peer(t, func(c *net.TCPConn) { io.Copy(c, c) }), nil)
	c := w.dial()
	io.WriteString(c, "hello")
	w.waiting(1)
	w.r.gate.set(m)
	c.CloseWrite()
	if all, err := io.ReadAll(c); string(all) != "hello" || err != nil {
		t.Errorf("got %q, %v", all, err)
	}
	c.Close()

	w.evidence()
	w.r.gate.set(nil)
	var all []*net.TCPConn
	for range maxWaiting {
		all = append(all, w.dial())
	}
	w.waiting(maxWaiting)
	if err := w.isReset(); err != nil {
		t.Errorf("one too many: %v", err)
	}
	w.close() // and what waits in it is reset
	for _, c := range all {
		if err := isReset(c); err != nil {
			t.Error(err)
		}
	}
	if got := w.evidence(); got != "answers" {
		t.Errorf("evidence %q", got)
	}
	if c, err := net.Dial("tcp", w.key.local.String()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a closed door: %v, %v", c, err)
	}
}

// What is under way goes on when its door closes, and ends with the instance.
func TestDoorCloses(t *testing.T) {
	t.Parallel()
	m := sshMaster(t, startSSHD(t))
	w := openDoor(t, peer(t, func(c *net.TCPConn) { io.Copy(c, c) }), m)
	c := w.dial()
	echo := func() {
		t.Helper()
		io.WriteString(c, "x")
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	echo()
	w.close()
	echo()
	w.r.quit()
	if err := isReset(c); err != nil {
		t.Error(err)
	}
	w.r.wg.Wait()
}

// failingListener is out of descriptors until it is closed.
type failingListener struct {
	net.Listener
	times chan time.Time
}

func (l *failingListener) Accept() (net.Conn, error) {
	l.times <- time.Now()
	return nil, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
}

func TestAcceptOutOfDescriptors(t *testing.T) {
	t.Parallel()
	w := openDoor(t, nobody(t), nil)
	l := &failingListener{times: make(chan time.Time)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.accept(l)
	}()
	last := <-l.times
	for i := range 2 {
		now := <-l.times
		if pause := now.Sub(last); pause < backoff(i+1) {
			t.Errorf("tries again after %v", pause)
		}
		last = now
	}
	w.shut()
	<-done
}

// probing is a probe's link, whose engine answers round trips as long as answers says so.
func probing(t *testing.T, answers bool) *link {
	t.Helper()
	r := &runner{tasks: make(chan func(time.Time), 64)}
	r.ctx, r.quit = context.WithCancel(context.Background())
	l := &link{r: r, pings: make(chan chan error), relist: make(chan struct{}, 1)}
	l.ctx, l.cancel = context.WithCancel(r.ctx)
	if answers {
		r.start(func() {
			for {
				select {
				case answer := <-l.pings:
					answer <- nil
				case <-l.ctx.Done():
					return
				}
			}
		})
	}
	t.Cleanup(func() {
		r.quit()
		r.wg.Wait()
	})
	return l
}

// probeWant is a forward to a published port of 127.0.0.1 of a container whose own address is 172.17.0.2:8080.
func probeWant() want {
	return want{key: key{remote: netip.MustParseAddrPort("127.0.0.1:80")}, private: 8080,
		direct: netip.MustParseAddr("172.17.0.2"), gateway: netip.MustParseAddr("172.17.0.1"), onlyNet: true}
}

func TestProbe(t *testing.T) {
	t.Parallel()
	const (
		direct    = "172.17.0.2 8080"
		published = "127.0.0.1 80"
		gateway   = "172.17.0.1 1"
		six       = "::1 80"
	)
	var (
		rootless   = func(w *want) { w.direct, w.gateway = netip.Addr{}, netip.Addr{} }
		onNode     = func(w *want) { w.direct, w.node = netip.Addr{}, "node2" }
		manyNets   = func(w *want) { w.onlyNet = false }
		noGateway  = func(w *want) { w.gateway = netip.Addr{} }
		noPrivate  = func(w *want) { w.private = 0 }
		whatever   = func(*want) {}
		doesNotSay = "refuses and does not say why"
	)
	// What becomes of a connection to an address: accepts, accepts and closes, accepts and speaks, refused, unreachable,
	// forbidden, hangs. "a, b": a the first time, b from then on. What is not named is not to be asked.
	type remote map[string]string
	var all sync.WaitGroup
	for _, tt := range []struct {
		name   string
		change func(*want)
		remote remote
		silent bool // the link answers no round trip
		want   probeResult
	}{
		{"accepted directly", whatever, remote{direct: "accepts"}, false, probeAnswered},
		{"accepted directly and closed", whatever, remote{direct: "accepts and closes"}, false, probeAnswered},
		{"refused directly", whatever, remote{direct: "refused"}, false, probeSilent},
		{"refused in one of several networks", manyNets, remote{direct: "refused", published: "accepts"}, false, probeAnswered},
		{"refused in one of several networks, nobody", manyNets, remote{direct: "refused", published: "accepts and closes"}, false, probeClosed},
		{"forbidden directly, held", whatever, remote{direct: "forbidden", published: "accepts"}, false, probeAnswered},
		{"forbidden directly, nobody", whatever, remote{direct: "forbidden", published: "accepts and closes"}, false, probeClosed},
		{"forbidden directly, refused", whatever, remote{direct: "forbidden", published: "refused"}, false, probeSilent},
		{"all forbidden", whatever, remote{direct: "forbidden", published: "forbidden"}, false, probeForbidden},
		{"silent, and so the gateway", whatever, remote{direct: "hangs", gateway: "hangs", published: "accepts"}, false, probeAnswered},
		{"silent, and so the gateway, nobody", whatever, remote{direct: "hangs", gateway: "hangs", published: "accepts and closes"}, false, probeClosed},
		{"silent, the gateway refuses", whatever, remote{direct: "hangs", gateway: "refused"}, false, probeSilent},
		{"silent, the gateway accepts", whatever, remote{direct: "hangs", gateway: "accepts"}, false, probeSilent},
		{"silent in one of several networks", manyNets, remote{direct: "hangs", gateway: "accepts", published: "accepts"}, false, probeAnswered},
		{"silent, no gateway, held", noGateway, remote{direct: "hangs", published: "accepts"}, false, probeAnswered},
		{"unreachable, the gateway refuses", whatever, remote{direct: "unreachable", gateway: "refused"}, false, probeSilent},
		{"unreachable, and so the gateway", whatever, remote{direct: "unreachable", gateway: "unreachable", published: "accepts"}, false, probeAnswered},
		{"unreachable, no gateway", noGateway, remote{direct: "unreachable", published: "accepts and closes"}, false, probeClosed},
		{"published, held", rootless, remote{published: "accepts"}, false, probeAnswered},
		{"published, no port of its own", noPrivate, remote{published: "accepts"}, false, probeAnswered},
		{"published, speaks", rootless, remote{published: "accepts and speaks"}, true, probeAnswered},
		{"published, nobody behind the proxy", rootless, remote{published: "accepts and closes"}, true, probeClosed},
		{"published, refused", rootless, remote{published: "refused"}, false, probeSilent},
		{"published, unreachable", rootless, remote{published: "unreachable", six: "refused"}, false, probeSilent},
		{"published, the server connects over IPv6 only", rootless, remote{published: "unreachable", six: "accepts"}, false, probeAnswered},
		{"published, forbidden", rootless, remote{published: "forbidden"}, false, probeForbidden},
		{"held, but the link is silent", rootless, remote{published: "accepts"}, true, probeUnknown},
		{"the link is silent", rootless, remote{published: "hangs"}, true, probeUnknown},
		{"on another node, held", onNode, remote{published: "accepts"}, false, probeAnswered},
		{"on another node, refused", onNode, remote{published: "refused"}, false, probeSilent},
		{"on another node, unreachable", onNode, remote{published: "unreachable"}, false, probeUnreached},
		{"on another node, silent", onNode, remote{published: "hangs"}, false, probeUnreached},
		{"on another node, and the link is silent", onNode, remote{published: "hangs"}, true, probeUnknown},
		{"why is not said, at first", whatever, remote{direct: doesNotSay + ", refused"}, false, probeSilent},
		{"two reasons are said, at first", whatever, remote{direct: "refused for two reasons, refused"}, false, probeSilent},
		{"why is never said", whatever, remote{direct: doesNotSay}, false, probeUnknown},
		{"why is not said, published", rootless, remote{published: doesNotSay + ", forbidden"}, false, probeForbidden},
	} {
		var mu sync.Mutex
		asked := make(map[string]int)
		var m *master
		m, _ = handMaster(t, func(c *net.UnixConn, to string, in, out *os.File) {
			mu.Lock()
			does := strings.Split(tt.remote[to], ", ")
			now := does[min(asked[to], len(does)-1)]
			asked[to]++
			mu.Unlock()
			refuse := func(why ...outcome) {
				for _, o := range why {
					m.refusals[o].Add(1)
				}
				answerRefused(c)
			}
			switch now {
			case "accepts":
				answerOpened(c)
				io.Copy(io.Discard, in)
			case "accepts and closes":
				answerOpened(c)
			case "accepts and speaks":
				answerOpened(c)
				io.WriteString(out, "220 hello\r\n")
				io.Copy(io.Discard, in)
			case "refused":
				refuse(refusedThere)
			case "unreachable":
				refuse(unreachable)
			case "forbidden":
				refuse(forbiddenToGo)
			case "refused for two reasons":
				refuse(refusedThere, forbiddenToGo)
			case doesNotSay:
				refuse()
			case "hangs":
				c.Read(make([]byte, 1))
			default:
				t.Errorf("%s: %s is asked", tt.name, to)
			}
		})
		l := probing(t, !tt.silent)
		w := probeWant()
		tt.change(&w)
		all.Add(1)
		go func() { // all at once, for they wait
			defer all.Done()
			ctx, cancel := context.WithTimeout(context.Background(), 3*probeHold)
			defer cancel()
			if tt.want != probeUnknown {
				ctx = context.Background()
			}
			if got := l.probe(ctx, m, w, time.Millisecond); got != tt.want {
				t.Errorf("%s: got %d, want %d", tt.name, got, tt.want)
			}
			mu.Lock()
			defer mu.Unlock()
			for to := range tt.remote {
				if asked[to] == 0 {
					t.Errorf("%s: %s is not asked", tt.name, to)
				}
			}
		}()
	}
	all.Wait()
}

// A probe sends nothing, whatever it meets, and its end is the service's.
func TestProbeSendsNothing(t *testing.T) {
	t.Parallel()
	got := make(chan string, 2)
	m, _ := handMaster(t, func(c *net.UnixConn, to string, in, out *os.File) {
		answerOpened(c)
		b, err := io.ReadAll(in)
		got <- fmt.Sprintf("%q %v", b, err)
	})
	w := probeWant()
	l := probing(t, true)
	l.probe(context.Background(), m, w, 0)
	w.direct = netip.Addr{}
	l.probe(context.Background(), m, w, 0)
	for range 2 {
		if s := <-got; s != `"" <nil>` {
			t.Errorf("the service read %s", s)
		}
	}
}

// The end of the link, or of the master, ends a probe; it is no evidence.
func TestProbeEnds(t *testing.T) {
	t.Parallel()
	opened := make(chan bool, 9)
	serve := func(c *net.UnixConn, to string, in, out *os.File) {
		answerOpened(c)
		opened <- true
		io.Copy(io.Discard, in)
	}
	w := probeWant()
	w.direct = netip.Addr{}
	for name, end := range map[string]func(cancel, endMaster func()){
		"link": func(cancel, _ func()) { cancel() }, "master": func(_, endMaster func()) { endMaster() },
	} {
		t.Run(name, func(t *testing.T) {
			m, endMaster := handMaster(t, serve)
			l := probing(t, false)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			got := make(chan probeResult, 1)
			go func() { got <- l.probe(ctx, m, w, 0) }()
			<-opened
			end(cancel, endMaster)
			if got := <-got; got != probeUnknown {
				t.Errorf("got %d", got)
			}
		})
	}
}

// The same through ssh, which says on stderr why it refuses.
func TestProbeAgainstSSH(t *testing.T) {
	t.Parallel()
	held := peer(t, func(c *net.TCPConn) { io.Copy(io.Discard, c) })
	proxy := peer(t, func(*net.TCPConn) {}) // with nobody behind
	free := nobody(t)
	at := func(direct, published netip.AddrPort) want {
		return want{key: key{remote: published}, direct: direct.Addr(), private: direct.Port(), onlyNet: true}
	}
	for _, tt := range []struct {
		name   string
		config []string
		of     map[want]probeResult
	}{
		{"all allowed", nil, map[want]probeResult{
			at(held, free): probeAnswered, at(free, held): probeSilent,
			at(netip.AddrPort{}, held): probeAnswered, at(netip.AddrPort{}, proxy): probeClosed, at(netip.AddrPort{}, free): probeSilent,
		}},
		{"the published ones allowed", []string{fmt.Sprintf("PermitOpen %s %s", held, proxy)}, map[want]probeResult{
			at(free, held): probeAnswered, at(free, proxy): probeClosed, at(free, free): probeForbidden,
		}},
		{"nothing allowed", []string{"AllowTcpForwarding no"}, map[want]probeResult{at(held, held): probeForbidden}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := sshMaster(t, startSSHD(t, tt.config...))
			l := probing(t, true)
			var wg sync.WaitGroup
			for w, want := range tt.of {
				wg.Add(1)
				go func() { // at once: a word about one must not be taken for one about another
					defer wg.Done()
					for range 3 {
						if got := l.probe(context.Background(), m, w, time.Millisecond); got != want {
							t.Errorf("%v:%d, %v: got %d, want %d", w.direct, w.private, w.remote, got, want)
						}
					}
				}()
			}
			wg.Wait()
		})
	}
}

// A silent address of the remote host's own network, by a full backlog; the gateway refuses.
func TestProbeSilentContainer(t *testing.T) {
	t.Parallel()
	direct := fullBacklog(t)
	m := sshMaster(t, startSSHD(t))
	w := want{key: key{remote: nobody(t)}, direct: direct.Addr(), private: direct.Port(), gateway: loopback4, onlyNet: true}
	if got := probing(t, true).probe(context.Background(), m, w, time.Millisecond); got != probeSilent {
		t.Errorf("got %d, want %d", got, probeSilent)
	}
}

// fullBacklog is an address on which connections are neither accepted nor refused.
func fullBacklog(t *testing.T) netip.AddrPort {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("elsewhere a full backlog refuses")
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	unix.CloseOnExec(fd)
	t.Cleanup(func() { unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: loopback4.As4()}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	at := netip.AddrPortFrom(loopback4, uint16(name.(*unix.SockaddrInet4).Port))
	for {
		c, err := net.DialTimeout("tcp", at.String(), muxSoon/2)
		if timeout := net.Error(nil); errors.As(err, &timeout) && timeout.Timeout() {
			return at
		} else if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
	}
}

func TestRefusalOf(t *testing.T) {
	for line, want := range map[string]outcome{
		"channel 3: open failed: connect failed: Connection refused":                                               refusedThere,
		"channel 3: open failed: administratively prohibited: open failed":                                         forbiddenToGo,
		"channel 3: open failed: connect failed: No route to host":                                                 unreachable,
		"channel 12: open failed: connect failed: open failed":                                                     unreachable,
		"channel 0: open failed: resource shortage: ":                                                              unreachable,
		"channel 2: open failed: administratively prohibited: administratively prohibited: Connection refused too": forbiddenToGo,
	} {
		if got := refusalOf(line); got != want {
			t.Errorf("%q: %d, want %d", line, got, want)
		}
	}
}
