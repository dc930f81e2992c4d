package main

// Tests of lsof.go: of what it makes of lsof's output, against the real one, and against one that hangs.

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const lsofOutput = `p812
csshd
f3
n*:22
f4
n*:22
p1290
cnginx
f6
n127.0.0.1:8080
f7
n[::1]:8080
p4242
cnode\x20server
f21
n*:3000
p5000
cControlCenter
f9
n[fe80::1%lo0]:7000
f10
n10.0.0.5:7000
p6000
ccurl
f5
n192.168.1.2:51234->93.184.216.34:443
f6
n[::1]:8080->[::1]:51000
`

func TestParseLsof(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"nothing", "", ""},
		{"real", lsofOutput, `812 sshd 0.0.0.0:22; 812 sshd 0.0.0.0:22; 1290 nginx 127.0.0.1:8080; 1290 nginx [::1]:8080; ` +
			`4242 node\x20server 0.0.0.0:3000; 5000 ControlCenter [fe80::1%lo0]:7000; 5000 ControlCenter 10.0.0.5:7000; 6000 curl 192.168.1.2:51234 connected; 6000 curl [::1]:8080 connected`},
		{"no newline at the end", "p1\ncinit\nf3\nn*:80", "1 init 0.0.0.0:80"},
		{"a process without a command", "p1\nca\nn*:80\np2\nn*:81", "1 a 0.0.0.0:80; 2  0.0.0.0:81"},
		{"no process", "cx\nn*:80\n", ""},
		{"bad processes", "pabc\ncx\nn*:80\np0\nn*:81\np-1\nn*:82\np99999999999999999999\nn*:83\np7\ncy\nn*:84", "7 y 0.0.0.0:84"},
		{"no addresses", "p1\nca\nn*:*\nnlocalhost:http\nn127.0.0.1\nn:80\nn127.0.0.1:70000\nn\nn*:", ""},
		{"other fields and none", "p1\nR0\n\nca\nu0\nn*:80\n\n", "1 a 0.0.0.0:80"},
		{"a hostile command", "p1\nc\x1b[31mevil\x07\nn*:80\n", "1 [31mevil 0.0.0.0:80"},
	} {
		var got []string
		for _, l := range parseLsof(c.in) {
			text := fmt.Sprintf("%d %s %s", l.pid, l.command, l.addr)
			if l.connected {
				text += " connected"
			}
			got = append(got, text)
		}
		if g := strings.Join(got, "; "); g != c.want {
			t.Errorf("%s:\n got %q\nwant %q", c.name, g, c.want)
		}
	}
}

func FuzzLsof(f *testing.F) {
	f.Add(lsofOutput)
	f.Add("p1\ncx\nn[fe80::1%\x1b[31m]:80")
	f.Fuzz(func(t *testing.T, in string) {
		for _, l := range parseLsof(in) {
			if l.pid <= 0 || !l.addr.IsValid() {
				t.Errorf("%+v", l)
			}
			checkPrintable(t, l.command, l.addr.String())
		}
	})
}

// needLsof skips where there is no lsof.
func needLsof(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("lsof"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
}

func TestOwnersListener(t *testing.T) {
	needLsof(t)
	for _, address := range []string{"127.0.0.1:0", "[::1]:0", ":0"} {
		t.Run(address, func(t *testing.T) {
			l, err := net.Listen("tcp", address)
			if err != nil {
				t.Skipf("no such address here: %v", err)
			}
			defer l.Close()
			at := l.Addr().(*net.TCPAddr).AddrPort()
			if at.Addr().IsUnspecified() {
				at = netip.AddrPortFrom(loopback4, at.Port())
			}
			got := new(owners).of(context.Background(), at)
			if want := fmt.Sprintf(", pid %d", os.Getpid()); !strings.HasPrefix(got, "held by ") || !strings.HasSuffix(got, want) {
				t.Errorf("the owner of %v is %q, want held by NAME%s", at, got, want)
			}
		})
	}
}

// Where nothing listens, a connection that has the port as its local end is named, and one that has just ended guessed.
func TestOwnersConnection(t *testing.T) {
	needLsof(t)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	at := conn.LocalAddr().(*net.TCPAddr).AddrPort()
	got := new(owners).of(context.Background(), at)
	if want := fmt.Sprintf(", pid %d, uses it; free within a minute", os.Getpid()); !strings.HasPrefix(got, "an outgoing connection of ") || !strings.HasSuffix(got, want) {
		t.Errorf("the owner of %v is %q, want an outgoing connection of NAME%s", at, got, want)
	}
	other := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.77"), at.Port())
	const ended = "an outgoing connection uses it or has just ended; free within a minute"
	if got := new(owners).of(context.Background(), other); got != ended {
		t.Errorf("the owner of %v is %q, want %q", other, got, ended)
	}
	conn.Close()
	t.Setenv("PATH", t.TempDir())
	if _, err := tcpSockets(context.Background()); err == nil || !strings.Contains(err.Error(), "lsof") {
		t.Errorf("error %v without lsof", err)
	}
	if got := new(owners).of(context.Background(), other); got != ended {
		t.Errorf("the owner without lsof: %q, want %q", got, ended)
	}
	if got := new(owners).of(context.Background(), l.Addr().(*net.TCPAddr).AddrPort()); got != "" {
		t.Errorf("the owner of a listener without lsof: %q", got)
	}
}

// An lsof that hangs, and whose child keeps its output open, holds nobody up.
func TestLsofHangs(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "lsof"), []byte("#!/bin/sh\nsleep 10 &\nsleep 10\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(200*time.Millisecond, cancel)
	start := time.Now()
	if all, err := tcpSockets(ctx); err == nil {
		t.Errorf("it lists %v", all)
	}
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("it took %v after it was cancelled", took)
	}
	start = time.Now()
	if got := new(owners).of(context.Background(), netip.MustParseAddrPort("127.0.0.77:1")); !strings.HasPrefix(got, "an outgoing connection uses it") {
		t.Errorf("the owner is %q", got)
	}
	if took := time.Since(start); took > lsofTimeout+2*time.Second {
		t.Errorf("it took %v", took)
	}
}
