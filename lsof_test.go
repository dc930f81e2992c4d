package main

// Tests of what is made of lsof's output, and against the real one.

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
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
`

func TestParseLsof(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"nothing", "", ""},
		{"real", lsofOutput, `812 sshd 0.0.0.0:22; 812 sshd 0.0.0.0:22; 1290 nginx 127.0.0.1:8080; 1290 nginx [::1]:8080; ` +
			`4242 node\x20server 0.0.0.0:3000; 5000 ControlCenter [fe80::1%lo0]:7000; 5000 ControlCenter 10.0.0.5:7000`},
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
			got = append(got, fmt.Sprintf("%d %s %s", l.pid, l.command, l.addr))
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

func TestListeners(t *testing.T) {
	needLsof(t)
	for _, address := range []string{"127.0.0.1:0", "[::1]:0", ":0"} {
		t.Run(address, func(t *testing.T) {
			l, err := net.Listen("tcp", address)
			if err != nil {
				t.Skipf("no such address here: %v", err)
			}
			defer l.Close()
			at := l.Addr().(*net.TCPAddr).AddrPort()
			all, err := listeners(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			if !slices.ContainsFunc(all, func(l listener) bool {
				return l.pid == os.Getpid() && l.command != "" && l.addr.Port() == at.Port() &&
					(l.addr.Addr() == at.Addr() || l.addr.Addr().IsUnspecified() && at.Addr().IsUnspecified())
			}) {
				t.Errorf("this process is not in %v", all)
			}
			who := fmt.Sprintf(", pid %d", os.Getpid())
			asked := at
			if at.Addr().IsUnspecified() {
				asked = netip.AddrPortFrom(loopback4, at.Port())
			}
			if got := new(owners).of(context.Background(), asked); !strings.HasSuffix(got, who) || got == who {
				t.Errorf("the owner of %v is %q, want NAME%s", asked, got, who)
			}
		})
	}
}

// What nobody holds, or who holds another address, is not named.
func TestOwnersNone(t *testing.T) {
	needLsof(t)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	other := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.77"), l.Addr().(*net.TCPAddr).AddrPort().Port())
	if got := new(owners).of(context.Background(), other); got != "" {
		t.Errorf("the owner of %v is %q, want none", other, got)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := listeners(ctx); err == nil {
		t.Error("no error when cancelled")
	}
	t.Setenv("PATH", t.TempDir())
	if _, err := listeners(context.Background()); err == nil || !strings.Contains(err.Error(), "lsof") {
		t.Errorf("error %v without lsof", err)
	}
	if got := new(owners).of(context.Background(), other); got != "" {
		t.Errorf("the owner without lsof: %q", got)
	}
}
