//go:build linux

package e2e

// detach_test.go: an instance in the background, and one that systemd starts, whose socket is a test's.

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// logPath is the log of the run in the background.
func (p *runProc) logPath() string { return strings.TrimSuffix(p.paths().lock, ".lock") + ".log" }

// detached runs it in the background, until the end of the test, and returns its pid and what was said.
func (p *runProc) detached() (pid int, stderr string) {
	p.t.Helper()
	out, errs, code := p.rdhpf(append(p.args, "-detach")...) // returns once nobody has its stdout and stderr
	p.t.Cleanup(func() { p.tell("stop") })
	m := regexp.MustCompile(`^rdhpf is running: pid (\d+), log (.*); end it with rdhpf stop\n$`).FindStringSubmatch(out)
	if code != 0 || m == nil || m[2] != p.logPath() {
		p.t.Fatalf("%q, %q, exit %d", out, errs, code)
	}
	pid, _ = strconv.Atoi(m[1])
	return pid, errs
}

func TestE2EDetach(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 1)
	b := g.boot(t, port)
	p := newRun(t, g, "")
	pid, errs := p.detached()
	if err := b.answering(port); err != nil {
		t.Errorf("right after its start: %v", err)
	}
	for _, want := range []string{" connected to ssh://" + p.host, localAddr(port) + " → " + b.who()} {
		if !strings.Contains(errs, want) {
			t.Errorf("it says %q, want %q", errs, want)
		}
	}
	if info, err := os.Lstat(p.logPath()); err != nil || info.Mode() != 0o600 {
		t.Errorf("the log is %v, %v", info, err)
	}
	if _, errs, code := p.rdhpf(append(p.args, "-detach")...); code != 1 ||
		!strings.HasPrefix(errs, fmt.Sprintf("rdhpf: another rdhpf is running for this host: pid %d", pid)) {
		t.Errorf("a second one: %q, exit %d", errs, code)
	}
	if err := syscall.Kill(pid, syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	if got := p.status(); got.PID != pid || !got.Running {
		t.Errorf("%d is running: %v, want %d", got.PID, got.Running, pid)
	}
	if out, errs, code := p.tell("stop"); code != 0 {
		t.Errorf("stop: %q, %q, exit %d", out, errs, code)
	}
	p.leftNothing()
	log, err := os.ReadFile(p.logPath())
	if err != nil {
		t.Fatal(err)
	}
	if got := string(log); !strings.HasPrefix(got, errs) || !strings.HasSuffix(got, " stopped: all local ports and the connection to ssh://"+p.host+" are closed\n") {
		t.Errorf("the log is %q", got)
	}
	t.Run("quiet", func(t *testing.T) {
		p := newRun(t, g, "", "-quiet", "-detach")
		if out, errs, code := p.rdhpf(p.args...); out != "" || errs != "" || code != 0 {
			t.Errorf("%q, %q, exit %d", out, errs, code)
		}
		p.tell("stop")
		if info, err := os.Lstat(p.logPath()); err != nil || info.Size() != 0 {
			t.Errorf("the log is %v, %v", info, err)
		}
		p.leftNothing()
	})
	t.Run("a command", func(t *testing.T) {
		p := newRun(t, g, "", "-detach")
		if _, errs, code := p.around("true"); code != 2 || !strings.Contains(errs, "-detach") {
			t.Errorf("%q, exit %d", errs, code)
		}
	})
}

// What fails says the same in the background, and leaves as little.
func TestE2EDetachFails(t *testing.T) {
	g := needRig(t)
	for _, suffix := range []string{"-refused", "-badkey", "-onesession"} {
		t.Run(suffix[1:], func(t *testing.T) {
			p := newRun(t, g, suffix)
			_, want, _ := p.rdhpf(p.args...)
			out, errs, code := p.rdhpf(append(p.args, "-detach")...)
			if want = want[strings.LastIndex(want, "rdhpf: cannot connect"):]; out != "" || !strings.HasSuffix(errs, want) || code != 1 {
				t.Errorf("%q, %q, exit %d; without -detach %q", out, errs, code, want)
			}
			p.leftNothing()
		})
	}
	t.Run("killed while connecting", func(t *testing.T) {
		p := newRun(t, g, "-silent", "-detach")
		p.start()
		var pid int
		eventually(t, "it is started", func() error {
			all := children(p.cmd.Process.Pid)
			if len(all) == 0 {
				return errors.New("it is not")
			}
			pid = all[0]
			return nil
		})
		syscall.Kill(pid, syscall.SIGKILL)
		p.exits(1)
		p.waitLine("rdhpf: rdhpf ended before it was connected: signal: killed")
		p.leftNothingBut(true)
	})
}

// With -retry it waits for the connection, and what happens meanwhile can be seen.
func TestE2EDetachWaits(t *testing.T) {
	g := needRig(t)
	p := newRun(t, g, "", "-retry", "-detach")
	resume := g.stopServer(t)
	p.start()
	p.waitLine("cannot connect to ")
	resume()
	p.waitLine("connected to ")
	p.exits(0)
	t.Cleanup(func() { p.tell("stop") })
	if _, errs, code := p.tell("stop"); code != 0 {
		t.Errorf("stop: %q, exit %d", errs, code)
	}
	p.leftNothing()
}

func TestE2EDetachTerminal(t *testing.T) {
	g := needRig(t)
	t.Run("its end", func(t *testing.T) {
		port := freePorts(t, 1)
		b := g.boot(t, port)
		p := newRun(t, g, "", "-detach")
		cmd := exec.Command(program, p.args...)
		cmd.Env = p.environment()
		x := openTerminal(t, cmd)
		t.Cleanup(func() { p.tell("stop") })
		x.shows("rdhpf is running: pid ")
		x.ends() // for the instance is not in this session and has nothing of it open
		if err := b.answering(port); err != nil {
			t.Error(err)
		}
		p.tell("stop")
		p.leftNothing()
	})
	t.Run("Ctrl-C", func(t *testing.T) {
		p := newRun(t, g, "-silent", "-detach")
		cmd := exec.Command(program, p.args...)
		cmd.Env = p.environment()
		x := openTerminal(t, cmd)
		x.shows("connecting to ")
		x.types("\x03")
		x.shows("stopped: ")
		x.ends()
		if code := cmd.ProcessState.ExitCode(); code != 128+int(syscall.SIGINT) {
			t.Errorf("exit %d", code)
		}
		p.leftNothing()
	})
}

// As under Type=notify: ready when connected, stopping at the end, and children that cannot speak for it.
func TestE2ENotify(t *testing.T) {
	g := needRig(t)
	p := newRun(t, g, "")
	path := filepath.Join(p.dir, "notify")
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	socket.SetReadDeadline(time.Now().Add(patience))
	hears := func(want string) {
		t.Helper()
		for buf := make([]byte, 4096); ; {
			n, err := socket.Read(buf)
			if err != nil {
				t.Fatalf("no %q: %v", want, err)
			}
			for _, line := range strings.Split(string(buf[:n]), "\n") {
				if line == want {
					return
				}
			}
		}
	}
	p.env = []string{"NOTIFY_SOCKET=" + path}
	p.start()
	hears("READY=1")
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", p.masterPid()))
	if err != nil || strings.Contains(string(env), "NOTIFY_SOCKET") {
		t.Errorf("ssh has NOTIFY_SOCKET, or %v", err)
	}
	p.signal(syscall.SIGTERM)
	hears("STOPPING=1")
	p.exits(0)
	p.waitLine("stopped: all local ports and the connection to ssh://" + p.host + " are closed")
	os.Remove(path)
	p.leftNothing()
}
