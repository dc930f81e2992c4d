package e2e

// Faults of time and of the far end: a process that is stopped, a machine that
// sleeps, a server that says nothing, a link that comes back to another state.

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The machine sleeps: rdhpf and its ssh stand still while the clock runs on.
func TestE2ESleep(t *testing.T) {
	g := needRig(t)
	const asleep = 15 * time.Second // past the 10 s that a wall clock may jump unnoticed
	for _, c := range []struct {
		name string
		cut  bool // the link does not live
	}{{"the link lives", false}, {"the link is dead", true}} {
		t.Run(c.name, func(t *testing.T) {
			port := freePorts(t, 2)
			b := g.boot(t, port)
			p := startRun(t, g, "", "-log-level", "debug")
			b.answers(port)
			p.becomes(port, active, "")
			master := p.masterPid()
			p.signal(syscall.SIGSTOP)
			syscall.Kill(master, syscall.SIGSTOP)
			if c.cut {
				g.endConnections(t)
			}
			born := g.boot(t, port+1)
			time.Sleep(asleep) // it is the fault, not a wait for one
			syscall.Kill(master, syscall.SIGCONT)
			p.signal(syscall.SIGCONT)
			woken := time.Now()
			b.answers(port)
			born.answers(port + 1)
			took("the machine wakes, "+c.name+": all answers", woken)
			p.becomes(port, active, "")
			p.waitLine("the machine slept")
			if !c.cut && p.masterPid() != master {
				t.Error("the link lived, and was made anew")
			}
		})
	}
}

// sshd's process for the connection stands still: as a partition, without one.
func TestE2EServerStopped(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 1)
	b := g.boot(t, port)
	p := startRun(t, g, "")
	b.answers(port)
	p.becomes(port, active, "")
	var stopped []int
	began := time.Now()
	for _, pid := range children(g.sshd(t)) {
		if syscall.Kill(pid, syscall.SIGSTOP) == nil {
			stopped = append(stopped, pid)
		}
	}
	t.Cleanup(func() {
		for _, pid := range stopped {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	})
	p.waitLine("warning: connection lost: ")
	p.waitLine(" again after ")
	b.answers(port)
	took("sshd's child stopped: it answers again", began)
	p.becomes(port, active, "")
}

// ssh itself stands still, or ends as if all were well.
func TestE2EMasterStoppedOrEnded(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 1)
	b := g.boot(t, port)
	p := startRun(t, g, "")
	for _, sig := range []syscall.Signal{syscall.SIGSTOP, syscall.SIGTERM, syscall.SIGKILL} {
		b.answers(port)
		p.becomes(port, active, "")
		master := p.masterPid()
		syscall.Kill(master, sig)
		eventually(t, sig.String()+": ssh is replaced", func() error {
			for _, pid := range children(p.cmd.Process.Pid) {
				if strings.Contains(cmdline(pid), " -M ") && pid != master {
					return nil
				}
			}
			return errors.New("it is not")
		})
	}
	b.answers(port)
	p.becomes(port, active, "")
	if n := p.status().Connection.Reconnects; n != 3 {
		t.Errorf("%d reconnects, want 3", n)
	}
}

// A silent partition: nothing is called active within 20 s, and all answers
// within 5 s of its end. The bounds here are wider, for a machine can be busy;
// make faults prints the times.
func TestE2EPartitionStatus(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 2)
	b := g.boot(t, port)
	p := startRun(t, g, "")
	p.becomes(port, active, "")
	created := p.forward(port).CreatedAt
	began := time.Now()
	g.ctl(t, "partition", "on")
	t.Cleanup(func() { g.ctl(t, "partition", "off") })
	f := p.becomes(port, pending, "ssh connection lost, reconnecting")
	took("partition on: not active any more", began)
	if !f.CreatedAt.Equal(created) {
		t.Error("created_at did not survive the loss of the connection")
	}
	if out, _, code := p.tell("health"); code != 1 || !strings.HasPrefix(out, "down: ") {
		t.Errorf("health: %d, %s", code, out)
	}
	born := g.boot(t, port+1)
	began = time.Now()
	g.ctl(t, "partition", "off")
	b.answers(port)
	born.answers(port + 1)
	took("partition off: all answers", began)
	f = p.becomes(port, active, "")
	if !f.CreatedAt.Equal(created) {
		t.Error("created_at did not survive the reconnect")
	}
	p.stopsAfterCut()
}

// With -retry a first connection may fail, and nothing is given up; a server
// that accepts and says nothing is left at the deadline.
func TestE2ERetry(t *testing.T) {
	g := needRig(t)
	for _, c := range []struct{ alias, says string }{
		{"-silent", "timed out"}, {"-refused", "Connection refused"}, {"-unresolvable", "Could not resolve hostname"},
		{"-badkey", "Permission denied"}, {"-wrongctx", "missing.sock"},
	} {
		t.Run(c.alias, func(t *testing.T) {
			t.Parallel()
			p := newRun(t, g, c.alias, "-retry")
			p.start()
			line := p.waitLine(c.says)
			if !strings.Contains(line, "; trying again ") && !strings.Contains(line, "does not answer") {
				t.Errorf("it says %q", line)
			}
			if c.alias == "-badkey" && !strings.Contains(line, "trying again in 1m0s") {
				t.Errorf("a refused key is tried again soon: %q", line)
			}
			r := p.status()
			if r.Connection.State != connecting || !strings.Contains(r.Connection.LastError, c.says) {
				t.Errorf("status: %+v", r.Connection)
			}
			p.signal(syscall.SIGTERM)
			p.exits(0)
		})
	}
}

// The first connection fails and the next works: the engine was not there yet.
func TestE2ERetryHeals(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 1)
	b := g.bootSpec(t, boxSpec{restart: "always", ports: []boxPort{{host: port, private: 80}}})
	g.ctl(t, "dockerd", "stop")
	t.Cleanup(func() { g.ctl(t, "dockerd", "start") })
	p := newRun(t, g, "", "-retry")
	p.start()
	p.waitLine("docker on the remote host: ")
	g.ctl(t, "dockerd", "start")
	started := time.Now()
	p.waitLine("connected to ")
	b.answers(port)
	took("-retry, what was missing is there: it answers", started)
}

// What the folder must not be.
func TestE2EBadFolder(t *testing.T) {
	g := needRig(t)
	for _, c := range []struct {
		name, says string
		make       func(dir string) error
	}{
		{"a symlink", "is a symbolic link", func(dir string) error { return os.Symlink(os.TempDir(), dir) }},
		{"too open", "is open to other users (mode 0755): run chmod 700", func(dir string) error { return os.Mkdir(dir, 0o755) }},
		{"somebody else's", "belongs to uid 65534", func(dir string) error {
			return errors.Join(os.Mkdir(dir, 0o700), os.Chown(dir, 65534, 65534))
		}},
		{"a file", "not a directory", func(dir string) error { return os.WriteFile(dir, nil, 0o600) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newRun(t, g, "")
			parent := p.dir
			p.dir = filepath.Join(parent, "state")
			if err := c.make(p.dir); err != nil {
				t.Fatal(err)
			}
			p.start()
			p.exits(1)
			if !strings.Contains(p.log(), c.says) {
				t.Errorf("it says %q, want %q", p.log(), c.says)
			}
		})
	}
	t.Run("too long", func(t *testing.T) {
		p := newRun(t, g, "")
		p.dir = filepath.Join(p.dir, strings.Repeat("x", 90))
		p.start()
		p.exits(1)
		if !strings.Contains(p.log(), "set RDHPF_DIR to a shorter path") {
			t.Errorf("it says %q", p.log())
		}
		if _, err := os.Lstat(p.dir); err == nil {
			t.Error("it was made all the same")
		}
	})
}
