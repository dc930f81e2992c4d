package e2e

// truth_test.go: nothing is called active behind which nobody answers. Services
// end while their container runs on, packets are lost, events are missed.

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The service behind an active port ends; its container runs on.
func TestE2EServiceEnds(t *testing.T) {
	g := needRig(t)
	for _, c := range []struct {
		name string
		look func(t *testing.T, p *runProc, port int)
	}{
		{"health looks", func(t *testing.T, p *runProc, _ int) {
			if out, errs, code := p.tell("health"); code != 1 || !strings.HasPrefix(out, "degraded: ") || !strings.Contains(out, "1 pending") {
				t.Errorf("health: %d, %q, %q", code, out, errs)
			}
		}},
		{"-wait looks", func(t *testing.T, p *runProc, port int) {
			if out, errs, code := p.tell("status", "-wait", "2s", strconv.Itoa(port)); code != 1 {
				t.Errorf("-wait: %d, %q, %q", code, out, errs)
			}
		}},
		{"a client finds out", func(t *testing.T, p *runProc, port int) {
			if got, err := httpGet(port); err == nil {
				t.Errorf("%q answers", got)
			}
			met := time.Now()
			within(t, 10*time.Second, "it is pending", func() error { // long before its evidence is old
				if f := p.forward(port); f == nil || f.Status != pending {
					return fmt.Errorf("it is %+v", f)
				}
				return nil
			})
			took("a client meets nobody: pending", met)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			port := freePorts(t, 1)
			b := g.boot(t, port)
			p := startRun(t, g, "")
			before := p.becomes(port, active, "")
			if before.VerifiedAt == nil {
				t.Error("it is active and was never verified")
			}
			b.serviceEnds()
			c.look(t, p, port)
			after := p.becomes(port, pending, reasonSilent)
			if !after.CreatedAt.Equal(before.CreatedAt) {
				t.Errorf("created_at was %v and is %v, though the container runs on", before.CreatedAt, after.CreatedAt)
			}
			b.serviceBegins()
			began := time.Now()
			p.becomes(port, active, "")
			took("the service begins again: active", began)
			b.answers(port)
		})
	}
}

// A service that has just started counts for health and -wait, though its
// events may still be under way.
func TestE2EHealthTakesANewList(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 11)
	g.boot(t, port)
	p := startRun(t, g, "")
	p.becomes(port, active, "")
	for i := 1; i <= 10; i++ {
		g.boot(t, port+i, "-mode", "none")
		if out, errs, code := p.tell("health"); code != 1 || !strings.Contains(out, fmt.Sprintf("%d pending", i)) {
			t.Errorf("health with %d silent containers: %d, %q, %q", i, code, out, errs)
		}
	}
}

// Packets are lost for a while that is too short to be noticed. Silence of the
// link is no answer of what is behind it.
func TestE2ELossIsNoAnswer(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 2)
	g.boot(t, port, "-mode", "none")
	b := g.boot(t, port+1)
	p := startRun(t, g, "")
	p.becomes(port, pending, reasonSilent)
	p.becomes(port+1, active, "")
	t.Cleanup(func() { g.ctl(t, "partition", "off") })
	never := func() {
		t.Helper()
		if f := p.forward(port); f == nil || f.Status != pending {
			t.Fatalf("nobody listens behind %+v", f)
		}
	}
	for range 3 {
		g.ctl(t, "partition", "on")
		for over := time.Now().Add(2200 * time.Millisecond); time.Now().Before(over); { // the fault
			never()
		}
		g.ctl(t, "partition", "off")
		b.answers(port + 1)                                                         // the link delivers again
		for looked := time.Now().Add(3 * time.Second); time.Now().Before(looked); { // a pending port is looked at every 2 s
			never()
		}
	}
	if out, _, code := p.tell("health"); code != 1 {
		t.Errorf("health: %d, %q", code, out)
	}
	never()
	p.never("connection lost")
}

// The container drops what comes in, while docker-proxy accepts for it.
func TestE2EContainerDrops(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 1)
	b := g.boot(t, port)
	b.listening()
	pid := strconv.Itoa(b.pid())
	iptables := func(args ...string) string {
		t.Helper()
		out, err := exec.Command("nsenter", append([]string{"-t", pid, "-n", "iptables", "-w"}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("iptables %v: %v: %s", args, err, out)
		}
		return string(out)
	}
	drop := []string{"INPUT", "-p", "tcp", "--dport", "80", "-j", "DROP"}
	dropped := func() (n int) {
		t.Helper()
		for _, line := range strings.Split(iptables("-L", "INPUT", "-nvx"), "\n") {
			if f := strings.Fields(line); len(f) > 2 && f[2] == "DROP" {
				n, _ = strconv.Atoi(f[0])
			}
		}
		return n
	}
	iptables(append([]string{"-I"}, drop...)...)
	p := startRun(t, g, "")
	check := func() {
		t.Helper()
		out, errs, code := p.tell("health")
		if f := p.forward(port); code != 1 || !strings.HasPrefix(out, "degraded: ") || f == nil || f.Status != pending {
			t.Errorf("health: %d, %q, %q, and the forward is %+v", code, out, errs, f)
		}
		if dropped() == 0 {
			t.Error("nobody knocked")
		}
	}
	check()
	iptables(append([]string{"-D"}, drop...)...)
	p.becomes(port, active, "")
	b.answers(port)
	iptables(append([]string{"-I"}, drop...)...)
	check()
}

// A container is restarted and no event tells of it; what it serves has ended.
func TestE2EMissedRestart(t *testing.T) {
	g := needRig(t)
	for _, c := range []struct {
		name string
		away func(t *testing.T, p *runProc) (back func())
	}{
		{"while there is no connection", func(t *testing.T, p *runProc) func() {
			resume := g.stopServer(t)
			if err := syscall.Kill(p.masterPid(), syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			p.waitLine("warning: connection lost: ")
			return resume
		}},
		{"while events are not followed", func(t *testing.T, p *runProc) func() {
			p.signal(syscall.SIGSTOP)
			t.Cleanup(func() { p.signal(syscall.SIGCONT) })
			all := g.sessions()
			if len(all) == 0 {
				t.Fatal("there is no session to end")
			}
			for _, pid := range all {
				syscall.Kill(pid, syscall.SIGKILL)
			}
			return func() { p.signal(syscall.SIGCONT) }
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			port := freePorts(t, 1)
			b := g.boot(t, port)
			p := startRun(t, g, "")
			before := p.becomes(port, active, "")
			back := c.away(t, p)
			b.do("restart?t=0")
			b.listening()
			b.serviceEnds()
			back()
			returned := time.Now()
			after := p.becomes(port, pending, reasonSilent)
			took("restart missed, "+c.name+": pending", returned)
			if !after.CreatedAt.After(before.CreatedAt) {
				t.Errorf("created_at is still %v", after.CreatedAt)
			}
			b.serviceBegins()
			p.becomes(port, active, "")
		})
	}
}

// A program that takes one connection in its life gets that of its client.
func TestE2EOneConnectionInALife(t *testing.T) {
	g := needRig(t)
	t.Run("a probe would be that one", func(t *testing.T) {
		port := freePorts(t, 1)
		b := g.boot(t, port, "-mode", "once")
		b.listening()
		startRun(t, g, "")
		eventually(t, "it is used up", func() error {
			if b.listens(80) {
				return fmt.Errorf("it listens")
			}
			return nil
		})
	})
	for _, c := range []struct {
		name   string
		labels map[string]string
		args   func(p *runProc, port int)
	}{
		{"-no-probe", nil, func(p *runProc, port int) {
			p.args = append(p.args, "-no-probe", fmt.Sprintf("22,%d-%d", port, port+1))
		}},
		{"label", map[string]string{"rdhpf.probe": "false"}, func(*runProc, int) {}},
		{"config.json", nil, func(p *runProc, port int) {
			text := fmt.Sprintf(`{"hosts": {%q: {"no_probe": [%d]}}}`, p.host, port)
			if err := os.WriteFile(filepath.Join(p.dir, "config.json"), []byte(text), 0o600); err != nil {
				p.t.Fatal(err)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			port := freePorts(t, 2)
			b := g.bootSpec(t, boxSpec{args: []string{"-mode", "once"}, labels: c.labels, ports: []boxPort{{host: port, private: 80}}})
			b.listening()
			p := newRun(t, g, "")
			c.args(p, port)
			p.start()
			p.waitLine("connected to ")
			if f := p.becomes(port, active, ""); f.VerifiedAt != nil {
				t.Errorf("nobody looked, and it was verified at %v", f.VerifiedAt)
			}
			// Whatever else has a port looked at.
			if out, errs, code := p.tell("health"); code != 0 {
				t.Errorf("health: %d, %q, %q", code, out, errs)
			}
			if out, errs, code := p.tell("status", "-wait", "10s", strconv.Itoa(port)); code != 0 {
				t.Errorf("-wait: %d, %q, %q", code, out, errs)
			}
			if err := syscall.Kill(p.masterPid(), syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			p.waitLine("connected to ssh://" + p.host + " again")
			p.becomes(port, active, "")
			if !b.listens(80) {
				t.Fatal("its one connection is used up")
			}
			conn := dialEcho(t, port)
			io.WriteString(conn, "mine")
			conn.CloseWrite()
			if got, err := io.ReadAll(conn); err != nil || string(got) != "mine" {
				t.Errorf("its client reads %q, %v", got, err)
			}
			if f := p.forward(port); f.VerifiedAt == nil {
				t.Error("it answered its client, and was never verified")
			}
			// What carried connections show counts all the same.
			second := dialEcho(t, port)
			io.WriteString(second, "too late")
			if got, _ := io.ReadAll(second); len(got) > 0 {
				t.Errorf("a second client reads %q", got)
			}
			p.becomes(port, pending, reasonSilent)
		})
	}
}

// One container port is published on two addresses under one number.
func TestE2EOnePortOnTwoAddresses(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 1)
	b := g.bootSpec(t, boxSpec{ports: []boxPort{{ip: "127.0.0.1", host: port, private: 80}, {ip: g.env["RIG_ADDR"], host: port, private: 80}}})
	p := startRun(t, g, "")
	b.answers(port)
	p.becomes(port, active, "")
	if out, errs, code := p.tell("health"); code != 0 {
		t.Errorf("health: %d, %q, %q", code, out, errs)
	}
	if all := p.status().Forwards; len(all) != 1 {
		t.Errorf("%d forwards: %+v", len(all), all)
	}
	p.never("conflict")
}

// A container leaves the network by which its ports are published, and joins it
// again. No event of a container tells of that.
func TestE2ENetworkJoined(t *testing.T) {
	g := needRig(t)
	const soon = 8 * time.Second // 2 s, on a machine that is not busy
	var network struct{ ID string }
	if err := g.call("POST", "/networks/create", map[string]any{"Name": fmt.Sprintf("net-%d", os.Getpid())}, &network); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.call("DELETE", "/networks/"+network.ID, nil, nil); err != nil {
			t.Errorf("cleaning up: %v", err)
		}
	})
	port := freePorts(t, 1)
	b := g.bootSpec(t, boxSpec{network: network.ID, ports: []boxPort{{host: port, private: 80}}})
	p := startRun(t, g, "")
	p.becomes(port, active, "")
	change := func(how string) (done time.Time) {
		t.Helper()
		if err := g.call("POST", "/networks/"+network.ID+"/"+how, map[string]any{"Container": b.id}, nil); err != nil {
			t.Fatal(err)
		}
		return time.Now()
	}
	for range 3 { // or a list that is due just then would do
		left := change("disconnect")
		within(t, soon, "it is not forwarded", func() error {
			if f := p.forward(port); f != nil {
				return fmt.Errorf("it is %+v", f)
			}
			return refused(port)
		})
		took("network left: its ports are closed", left)
		joined := change("connect")
		within(t, soon, "it answers", func() error { return b.answering(port) })
		took("network joined: it answers", joined)
		p.becomes(port, active, "")
	}
}
