package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Tests of the look at a local port before it is opened, and of the probe after.

const bindHelperEnv = "RDHPF_TEST_BIND"

// TestBindHelper is an ordinary user's process.
func TestBindHelper(t *testing.T) {
	address := os.Getenv(bindHelperEnv)
	if address == "" {
		t.Skip("only of use to other tests")
	}
	fmt.Printf("\nbind: %v\n", bindable(netip.MustParseAddrPort(address)))
}

func TestBindable(t *testing.T) {
	for _, c := range []struct{ name, listen, ask string }{ // ask "": what is listened on
		{"the same", "127.0.0.1:0", ""},
		{"on all addresses", "0.0.0.0:0", "127.0.0.1"},
		{"on all, both families", "[::]:0", "127.0.0.1"},
		{"one address, asked for all", "127.0.0.1:0", "0.0.0.0"},
		{"IPv6", "[::1]:0", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, err := net.Listen("tcp", c.listen)
			if err != nil {
				t.Skipf("no such address here: %v", err)
			}
			at := l.Addr().(*net.TCPAddr).AddrPort()
			if c.ask != "" {
				if at.Addr() != netip.MustParseAddr(c.ask) && runtime.GOOS != "linux" {
					t.Skip("other systems let the more particular address be bound, to ssh too")
				}
				at = netip.AddrPortFrom(netip.MustParseAddr(c.ask), at.Port())
			}
			if err := bindable(at); !errors.Is(err, syscall.EADDRINUSE) {
				t.Errorf("busy %v: %v", at, err)
			}
			l.Close()
			for i := 0; i < 3; i++ { // the look must not leave it busy
				if err := bindable(at); err != nil {
					t.Errorf("free %v: %v", at, err)
				}
			}
			if l, err = net.Listen("tcp", at.String()); err != nil {
				t.Errorf("after looks: %v", err)
			} else {
				l.Close()
			}
		})
	}
}

// A port whose last connections are still in TIME_WAIT can be bound, as by ssh.
func TestBindableTimeWait(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	server.Close() // first, so that its end is the one that waits
	io.Copy(io.Discard, client)
	client.Close()
	l.Close()
	if err := bindable(l.Addr().(*net.TCPAddr).AddrPort()); err != nil {
		t.Error(err)
	}
}

func TestBindableElsewhere(t *testing.T) {
	for _, a := range []string{"192.0.2.1:8080", "[2001:db8::1]:8080"} { // for documentation, nobody's
		if err := bindable(netip.MustParseAddrPort(a)); !errors.Is(err, syscall.EADDRNOTAVAIL) && !errors.Is(err, syscall.EAFNOSUPPORT) {
			t.Errorf("%s: %v", a, err)
		}
	}
}

func TestBindablePrivileged(t *testing.T) {
	first := 1024
	if b, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start"); err == nil {
		if first, err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil {
			t.Fatal(err)
		}
	}
	if first < 2 {
		t.Skip("everybody may bind every port here")
	}
	const port = 1 // tcpmux, hardly in use
	cmd := exec.Command(os.Args[0], "-test.run=^TestBindHelper$", "-test.count=1")
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=127.0.0.1:%d", bindHelperEnv, port), "GORACE=atexit_sleep_ms=0")
	if os.Geteuid() == 0 {
		if runtime.GOOS != "linux" {
			t.Skip("to be run as an ordinary user")
		}
		cmd.Path = "/proc/self/exe" // the path itself may be root's alone
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "bind: "+syscall.EACCES.Error()) {
		t.Errorf("%v, %s", err, out)
	}
}

func TestBindableKeepsNothing(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	busy := l.Addr().(*net.TCPAddr).AddrPort()
	count := func() int {
		all, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Skip(err)
		}
		return len(all)
	}
	before := count()
	for i := 0; i < 200; i++ {
		bindable(busy)
		bindable(netip.MustParseAddrPort("127.0.0.1:0"))
	}
	if after := count(); after > before+50 { // others in this process may open some
		t.Errorf("%d files open, %d before", after, before)
	}
}

// peer serves connections on a local address until the test ends.
func peer(t *testing.T, serve func(*net.TCPConn)) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Add(1)
			go func() {
				defer wg.Done()
				defer c.Close()
				serve(c.(*net.TCPConn))
			}()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return l.Addr().(*net.TCPAddr).AddrPort()
}

func TestProbe(t *testing.T) {
	stay := func(c *net.TCPConn) { io.Copy(io.Discard, c) } // until the other end closes
	for _, c := range []struct {
		name  string
		serve func(*net.TCPConn, *master)
		rtt   time.Duration
		want  probeResult
	}{
		{"closes at once", func(*net.TCPConn, *master) {}, 0, probeSilent},
		{"resets at once", func(c *net.TCPConn, _ *master) { c.SetLinger(0) }, 0, probeSilent},
		{"closes after 50 ms", func(*net.TCPConn, *master) { time.Sleep(50 * time.Millisecond) }, 10 * time.Second, probeSilent},
		{"closes within the round trip", func(*net.TCPConn, *master) { time.Sleep(500 * time.Millisecond) }, 20 * time.Second, probeSilent},
		{"stays open", func(c *net.TCPConn, _ *master) { stay(c) }, 0, probeAnswered},
		{"stays open, round trip", func(c *net.TCPConn, _ *master) { stay(c) }, 50 * time.Millisecond, probeAnswered},
		{"sends data", func(c *net.TCPConn, _ *master) { c.Write([]byte("220 hello\r\n")); stay(c) }, time.Hour, probeAnswered},
		{"sends data and closes", func(c *net.TCPConn, _ *master) { c.Write([]byte("x")) }, time.Hour, probeAnswered},
		{"refused", func(_ *net.TCPConn, m *master) { m.prohibited.Add(1) }, time.Minute, probeRefused},
		{"another connection is refused", func(_ *net.TCPConn, m *master) { m.prohibited.CompareAndSwap(3, 4) }, time.Minute, probeSilent},
		{"refused before, not now", func(*net.TCPConn, *master) {}, time.Minute, probeSilent},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := &master{}
			m.prohibited.Add(3)
			local := peer(t, func(conn *net.TCPConn) { c.serve(conn, m) })
			began := time.Now()
			if got := m.probe(context.Background(), local, c.rtt); got != c.want {
				t.Errorf("got %d, want %d", got, c.want)
			}
			if took := time.Since(began); c.want == probeAnswered && c.rtt < time.Hour && took < probeHold+c.rtt {
				t.Errorf("called it answered after %v, want %v at least", took, probeHold+c.rtt)
			}
		})
	}
}

func TestProbeGone(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if got := (&master{}).probe(context.Background(), l.Addr().(*net.TCPAddr).AddrPort(), 0); got != probeGone {
		t.Errorf("got %d, want %d", got, probeGone)
	}
}

// A probe sends nothing and closes behind itself.
func TestProbeSendsNothing(t *testing.T) {
	got := make(chan string, 1)
	local := peer(t, func(c *net.TCPConn) {
		b, err := io.ReadAll(c)
		got <- fmt.Sprintf("%q %v", b, err)
	})
	(&master{}).probe(context.Background(), local, 0)
	select {
	case s := <-got:
		if s != `"" <nil>` {
			t.Errorf("the peer read %s", s)
		}
	case <-time.After(time.Minute):
		t.Error("the connection stays open")
	}
}

// The end of everything ends a probe, however long it would wait.
func TestProbeCancelled(t *testing.T) {
	accepted := make(chan bool, 1)
	local := peer(t, func(c *net.TCPConn) {
		accepted <- true
		io.Copy(io.Discard, c)
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan bool)
	go func() {
		(&master{}).probe(ctx, local, time.Hour)
		close(done)
	}()
	<-accepted
	cancel()
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Fatal("the probe goes on")
	}
}
