package e2e

// fault_test.go: the program against a real ssh, sshd and engine that fail:
// what it says, and that everything answers again.

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func TestE2EFirstStartFails(t *testing.T) {
	g := needRig(t)
	cases := []struct {
		suffix string
		says   []string
	}{
		{"-badkey", []string{"Permission denied (publickey", "ssh-add"}},
		{"-changedkey", []string{"Host key for ", "has changed", "ssh-keygen -R"}},
		{"-refused", []string{"Connection refused"}},
		{"-unresolvable", []string{"Could not resolve hostname rdhpf.invalid"}},
		{"-silent", []string{"timed out"}},
		{"-nodocker", []string{"docker: not found"}},
		{"-denied", []string{"permission denied", g.env["RIG_DOCKER"]}},
		{"-wrongctx", []string{"/missing.sock"}},
		{"-onesession", []string{"the SSH server refused another session", "MaxSessions"}},
	}
	runs := make([]*runProc, len(cases))
	began := time.Now()
	for i, c := range cases { // all at once, for some take seconds
		runs[i] = newRun(t, g, c.suffix)
		runs[i].start()
	}
	var all sync.WaitGroup
	for _, p := range runs {
		all.Add(1)
		go func() {
			defer all.Done()
			p.exits(1)
			if strings.HasSuffix(p.host, "-silent") {
				took("no SSH banner: given up", began)
			}
		}()
	}
	all.Wait()
	for i, c := range cases {
		t.Run(c.suffix[1:], func(t *testing.T) {
			p := runs[i]
			lines := strings.Split(p.log(), "\n")
			last := lines[len(lines)-1]
			if !strings.HasPrefix(last, "rdhpf: ") {
				t.Errorf("the last line is not rdhpf's error: %q", lines)
			}
			for _, want := range c.says {
				if !strings.Contains(last, want) {
					t.Errorf("%q does not hold %q", last, want)
				}
			}
			p.leftNothing()
		})
	}
}

func TestE2ENoisyShell(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 1)
	p := startRun(t, g, "-noisy")
	g.boot(t, port).answers(port)
	p.never("noise")
}

func TestE2EForwardingForbidden(t *testing.T) {
	g := needRig(t)
	const refusal = "refused by the SSH server: administratively prohibited"
	t.Run("all", func(t *testing.T) {
		port := freePorts(t, 1)
		p := startRun(t, g, "-noforward")
		b := g.boot(t, port)
		line := p.waitLine(refusal)
		for _, want := range []string{"warning: ", localAddr(port), b.who(), "AllowTcpForwarding"} {
			if !strings.Contains(line, want) {
				t.Errorf("%q does not hold %q", line, want)
			}
		}
		if _, err := httpGet(port); err == nil {
			t.Error("a forbidden forward answers")
		}
		p.becomes(port, pending, reasonRefused)
	})
	t.Run("all but one", func(t *testing.T) {
		const allowed = 18080 // by the rig
		if !locallyFree(allowed) {
			t.Skipf("port %d is busy here", allowed)
		}
		port := freePorts(t, 1)
		p := startRun(t, g, "-permitopen")
		no, yes := g.boot(t, port), g.boot(t, allowed)
		yes.answers(allowed)
		p.becomes(allowed, active, "")
		p.becomes(port, pending, reasonRefused)
		line := p.waitLine(refusal)
		if !strings.Contains(line, no.who()) {
			t.Errorf("%q does not name %s", line, no.who())
		}
		for _, l := range strings.Split(p.log(), "\n") {
			if strings.Contains(l, refusal) && strings.Contains(l, yes.who()) {
				t.Errorf("what is allowed is said to be forbidden: %s", l)
			}
		}
	})
}

func TestE2EHostileConfig(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 1)
	p := startRun(t, g, "-hostile")
	b := g.boot(t, port)
	b.answers(port)
	if c, err := net.Dial("tcp", "127.0.0.1:"+g.env["RIG_HOSTILE_PORT"]); err == nil {
		c.Close()
		t.Error("a LocalForward of ssh_config was opened")
	}
	if left, _ := filepath.Glob(g.env["RIG_DIR"] + "/hostile-*"); len(left) > 0 {
		t.Errorf("ssh_config had its way: %q", left)
	}
	// It still tells why a connection ended, and still is a child.
	if err := syscall.Kill(p.masterPid(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	p.waitLine("connected to ssh://" + p.host + " again")
	b.answers(port)
}

// What an earlier run can have left in the way.
func TestE2EStaleControlSocket(t *testing.T) {
	g := needRig(t)
	for _, c := range []struct {
		name string
		make func(t *testing.T, path string) (check func())
	}{
		{"dead", func(t *testing.T, path string) func() {
			listenUnix(t, path).Close()
			return nil
		}},
		{"mute", func(t *testing.T, path string) func() {
			listenUnix(t, path)
			return nil
		}},
		{"orphan", func(t *testing.T, path string) func() {
			ended := background(t, filepath.Join(g.env["RIG_BIN"], "ssh"), "-M", "-N", "-S", path, "-o", "ControlPersist=no", g.env["RIG_HOST"])
			eventually(t, "the orphan is there", func() error {
				_, err := os.Lstat(path)
				return err
			})
			return func() {
				eventually(t, "the orphan is swept away", func() error {
					select {
					case <-ended:
						return nil
					default:
						return errors.New("it lives")
					}
				})
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			port := freePorts(t, 1)
			p := newRun(t, g, "")
			check := c.make(t, p.paths().control)
			began := time.Now()
			p.start()
			p.waitLine("connected to ")
			took("stale control socket, "+c.name+": connected", began)
			g.boot(t, port).answers(port)
			if check != nil {
				check()
			}
		})
	}
	t.Run("no socket at all", func(t *testing.T) {
		p := newRun(t, g, "")
		path := p.paths().control
		if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		p.start()
		p.exits(1)
		if want := path + " exists and is not a socket"; !strings.Contains(p.log(), want) {
			t.Errorf("says %q, want %q", p.log(), want)
		}
		if b, err := os.ReadFile(path); err != nil || string(b) != "precious" {
			t.Errorf("the file was touched: %q, %v", b, err)
		}
	})
}

func TestE2EControlSocketUnlinked(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 2)
	b := g.boot(t, port)
	p := startRun(t, g, "")
	b.answers(port)
	removed := time.Now()
	if err := os.Remove(p.paths().control); err != nil {
		t.Fatal(err)
	}
	p.waitLine("connection lost: ")
	p.waitLine("connected to ssh://" + p.host + " again")
	b.answers(port)
	took("control socket unlinked: it answers again", removed)
	g.boot(t, port+1).answers(port + 1)
}

// The connection ends in some way, and is made anew.
func TestE2EReconnect(t *testing.T) {
	g := needRig(t)
	master := func(sig syscall.Signal) func(*testing.T, *runProc) {
		return func(t *testing.T, p *runProc) {
			if err := syscall.Kill(p.masterPid(), sig); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, c := range []struct {
		name string
		cut  func(*testing.T, *runProc)
	}{
		{"ssh killed", master(syscall.SIGKILL)},
		{"ssh ended and exits 0", master(syscall.SIGTERM)},
		{"ssh stopped", master(syscall.SIGSTOP)},
		{"sshd's child killed", func(t *testing.T, _ *runProc) {
			if g.endConnections(t) == 0 {
				t.Fatal("sshd has no child")
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			port := freePorts(t, 1)
			b := g.boot(t, port)
			p := startRun(t, g, "")
			b.answers(port)
			old := p.masterPid()
			cut := time.Now()
			c.cut(t, p)
			p.waitLine("warning: connection lost: ")
			p.waitLine("connected to ssh://" + p.host + " again")
			b.answers(port)
			took(c.name+": it answers again", cut)
			if p.masterPid() == old {
				t.Error("the old ssh is still the master")
			}
		})
	}
}

// Containers come and go while there is no connection.
func TestE2EMissedWhileAway(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 4)
	stays, goes, turns := g.boot(t, port), g.boot(t, port+1), g.boot(t, port+2)
	p := startRun(t, g, "")
	for i, b := range []*box{stays, goes, turns} {
		b.answers(port + i)
	}
	resume := g.stopServer(t)
	if err := syscall.Kill(p.masterPid(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	p.waitLine("warning: connection lost: ")
	goes.do("kill")
	turns.do("kill")
	taker, newborn := g.boot(t, port+2), g.boot(t, port+3)
	resume()
	p.waitLine("connected to ssh://" + p.host + " again")
	stays.answers(port)
	taker.answers(port + 2)
	newborn.answers(port + 3)
	refuses(t, port+1)
	p.waitLine(fmt.Sprintf("%s closed: %s is gone", localAddr(port+1), goes.who()))
}

func TestE2EKilled(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 1)
	b := g.boot(t, port)
	p := startRun(t, g, "")
	b.answers(port)
	c := dialEcho(t, port)
	killed := time.Now()
	p.signal(syscall.SIGKILL)
	p.exits(-1)
	refuses(t, port)
	took("rdhpf killed: its ports are free", killed)
	c.Read(make([]byte, 1)) // returns, for nobody holds the other end
	eventually(t, "ssh is gone", func() error {
		for _, pid := range pids() {
			if strings.Contains(cmdline(pid), p.dir) {
				return errors.New(cmdline(pid))
			}
		}
		return g.noSession()
	})
	next := p.another()
	again := time.Now()
	next.start()
	next.waitLine("connected to ")
	b.answers(port)
	took("rdhpf started again after a kill: it answers", again)
	next.never("warning")
}

func TestE2EEngineRestarts(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 3)
	publish := func(port int) []boxPort { return []boxPort{{host: port, private: 80}} }
	comesBack := g.bootSpec(t, boxSpec{restart: "always", ports: publish(port)})
	staysAway := g.bootSpec(t, boxSpec{ports: publish(port + 1)})
	p := startRun(t, g, "")
	comesBack.answers(port)
	staysAway.answers(port + 1)
	master := p.masterPid()
	g.ctl(t, "dockerd", "restart")
	restarted := time.Now()
	comesBack.answers(port)
	took("dockerd restarted: what it starts again answers", restarted)
	refuses(t, port+1)
	staysAway.do("start")
	staysAway.answers(port + 1)
	g.boot(t, port+2).answers(port + 2)
	if p.masterPid() != master {
		t.Error("the connection was made anew, though it was not lost")
	}
	p.never("connection lost")
}

// The network is cut without a word to either end.
func TestE2EPartition(t *testing.T) {
	g := needRig(t)
	for _, c := range []struct{ command, cut, heal string }{
		{"partition", "on", "off"},
		{"link", "down", "up"},
	} {
		t.Run(c.command, func(t *testing.T) {
			port := freePorts(t, 3)
			stays, goes := g.boot(t, port), g.boot(t, port+1)
			p := startRun(t, g, "")
			stays.answers(port)
			goes.answers(port + 1)
			t.Cleanup(func() { g.ctl(t, c.command, c.heal) })
			cut := time.Now()
			g.ctl(t, c.command, c.cut)
			goes.do("kill")
			born := g.boot(t, port+2)
			p.waitLine("warning: connection lost: ")
			took(c.command+" "+c.cut+": noticed", cut)
			healed := time.Now()
			g.ctl(t, c.command, c.heal)
			p.waitLine("connected to ssh://" + p.host + " again")
			stays.answers(port)
			born.answers(port + 2)
			refuses(t, port+1)
			took(c.command+" "+c.heal+": all answers", healed)
			p.stopsAfterCut()
		})
	}
}

// A partition that is over before or just after it is noticed. What was sent
// meanwhile is sent again by TCP, later and later, or by a new connection.
func TestE2EBriefPartition(t *testing.T) {
	g := needRig(t)
	for _, length := range []time.Duration{2 * time.Second, 4 * time.Second, 7 * time.Second, 13 * time.Second} {
		t.Run(length.String(), func(t *testing.T) {
			port := freePorts(t, 3)
			stays, goes := g.boot(t, port), g.boot(t, port+1)
			p := startRun(t, g, "")
			stays.answers(port)
			goes.answers(port + 1)
			p.becomes(port, active, "")
			t.Cleanup(func() { g.ctl(t, "partition", "off") })
			g.ctl(t, "partition", "on")
			began := time.Now()
			goes.do("kill")
			born := g.boot(t, port+2)
			time.Sleep(time.Until(began.Add(length))) // it is the fault, not a wait for one
			healed := time.Now()
			g.ctl(t, "partition", "off")
			stays.answers(port)
			born.answers(port + 2)
			refuses(t, port+1)
			took("partition of "+length.String()+": all answers", healed)
			p.becomes(port, active, "")
			p.becomes(port+2, active, "")
			took("partition of "+length.String()+": all active", healed)
			p.stopsAfterCut()
		})
	}
}

// A port below 1024 without the right to it.
func TestE2EPrivilegedPort(t *testing.T) {
	needTool(t, "setpriv")
	if b, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start"); err != nil || strings.TrimSpace(string(b)) != "1024" {
		t.Skipf("this machine lets everybody bind ports from %s", b)
	}
	g := needRig(t)
	low := 0
	for p := 1000; p > 600 && low == 0; p-- {
		if locallyFree(p) {
			low = p
		}
	}
	port := freePorts(t, 2)
	below, b := g.boot(t, low), g.boot(t, port)
	p := newRun(t, g, "")
	p.wrap = []string{"setpriv", "--bounding-set=-net_bind_service", "--inh-caps=-net_bind_service"}
	p.start()
	want := fmt.Sprintf("bind: permission denied (ports below 1024 need root: map it with -map %d=%d)", low, 8000+low)
	p.waitLine(want)
	p.becomes(low, conflict, want)
	b.answers(port)
	p.signal(syscall.SIGTERM)
	p.exits(0)
	// What it advises works.
	next := p.another()
	next.args = append(next.args, "-map", fmt.Sprintf("%d=%d", low, port+1))
	next.wrap = p.wrap
	next.start()
	below.answers(port + 1)
}

// lsof does not end when it is told to, and what it started keeps its output open.
func TestE2ELsofHangs(t *testing.T) {
	g := needRig(t)
	const soon = 5 * time.Second // 2 s, on a machine that is not busy
	bin := t.TempDir()
	pidFile := filepath.Join(bin, "pids")
	// With an empty environment, so that it is not taken for a part of the run.
	script := fmt.Sprintf("#!/bin/sh\nenv -i sleep 1000 &\necho $! >>%s\nwait\n", pidFile)
	if err := os.WriteFile(filepath.Join(bin, "lsof"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	started := func() (pids []int) {
		text, _ := os.ReadFile(pidFile)
		for _, f := range strings.Fields(string(text)) {
			if pid, err := strconv.Atoi(f); err == nil {
				pids = append(pids, pid)
			}
		}
		return pids
	}
	t.Cleanup(func() {
		for _, pid := range started() {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	})
	port := freePorts(t, 2)
	listenOn(t, port)
	g.boot(t, port)
	b := g.boot(t, port+1)
	p := newRun(t, g, "")
	p.env = []string{"PATH=" + bin + ":" + g.env["RIG_BIN"] + ":" + os.Getenv("PATH")}
	p.start()
	p.waitLine("connected to ")
	f := p.becomes(port, conflict, "port already in use after 5 retry attempts")
	if strings.Contains(f.Reason, "held by") {
		t.Errorf("who told it? %q", f.Reason)
	}
	p.waitLine("conflict for ")
	b.answers(port + 1)
	eventually(t, "lsof was asked", func() error {
		if len(started()) == 0 {
			return errors.New("it was not")
		}
		return nil
	})
	began := time.Now()
	if out, errs, code := p.tell("stop"); code != 0 {
		t.Errorf("stop: %d, %q, %q", code, out, errs)
	}
	p.exits(0)
	took("lsof hangs: stopped", began)
	if waited := time.Since(began); waited > soon {
		t.Errorf("stop takes %v", waited)
	}
	p.leftNothing()
}
