package e2e

// life_test.go: the program against a real ssh, sshd and engine, while nothing is
// amiss: which ports answer when, and that every byte is right.

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func TestE2ELife(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 2)
	before := g.boot(t, port)
	p := startRun(t, g, "")
	before.answers(port)
	b := g.boot(t, port+1)
	b.answers(port + 1)
	p.waitLine(fmt.Sprintf("%s → %s", localAddr(port+1), b.who()))
	for _, step := range []struct {
		do  string
		ans bool
	}{
		{"stop", false}, {"start", true}, {"kill", false}, {"start", true}, {"restart", true}, {"rm", false},
	} {
		if step.do == "rm" {
			b.remove()
		} else {
			b.do(step.do)
		}
		done := time.Now()
		if step.ans {
			b.answers(port + 1)
			took("container started: it answers", done)
		} else {
			refuses(t, port+1)
			took("container stopped, killed, removed: its port is closed", done)
		}
		if err := before.answering(port); err != nil {
			t.Errorf("the other container, after %s: %v", step.do, err)
		}
	}
	p.never("warning")
}

func TestE2ERename(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 1)
	p := startRun(t, g, "")
	b := g.boot(t, port) // that it is seen shows that events are followed
	p.waitLine("→ " + b.who())
	b.rename("renamed" + b.name)
	b.do("restart")
	p.waitLine("→ " + b.who())
	b.answers(port)
}

func TestE2EPauseKeepsTheForward(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 1)
	b := g.boot(t, port)
	p := startRun(t, g, "")
	b.answers(port)
	b.do("pause")
	// A container born after the pause shows that the program has seen it.
	other := freePorts(t, 1)
	g.boot(t, other).answers(other)
	dialEcho(t, port) // fails unless the port is still open
	p.becomes(port, pending, "container paused")
	b.do("unpause")
	unpaused := time.Now()
	b.answers(port)
	p.becomes(port, active, "")
	took("container unpaused: active", unpaused)
	p.never("closed")
}

func TestE2EPorts(t *testing.T) {
	g := needRig(t)
	addr := g.env["RIG_ADDR"]
	for _, c := range []struct {
		name string
		ip   string
	}{
		{"loopback of the remote only", "127.0.0.1"},
		{"its outer address only", addr},
		{"IPv4 only", "0.0.0.0"},
		{"IPv6 loopback only", "::1"},
		{"IPv6 only", "::"},
	} {
		t.Run(c.name, func(t *testing.T) {
			port := freePorts(t, 1)
			b := g.create(t, boxSpec{ports: []boxPort{{ip: c.ip, host: port, private: 80}}})
			if err := g.call("POST", "/containers/"+b.id+"/start", nil, nil); err != nil {
				if strings.Contains(c.ip, ":") && os.Getenv("CI") != "true" {
					t.Skipf("this engine does not publish on %s: %v", c.ip, err)
				}
				t.Fatal(err)
			}
			startRun(t, g, "")
			b.answers(port)
		})
	}
	t.Run("a range", func(t *testing.T) {
		const n = 20
		port := freePorts(t, n)
		spec := boxSpec{args: []string{"-listen", fmt.Sprintf("80-%d", 80+n-1)}}
		for i := range n {
			spec.ports = append(spec.ports, boxPort{host: port + i, private: 80 + i})
		}
		startRun(t, g, "")
		b := g.bootSpec(t, spec)
		for i := range n {
			b.answers(port + i)
		}
		b.do("stop")
		for i := range n {
			refuses(t, port+i)
		}
	})
	t.Run("a random port", func(t *testing.T) {
		var b *box
		var port int
		for tries := 0; port == 0 || !locallyFree(port); tries++ {
			if tries == 20 {
				t.Fatalf("the engine chose %d, which is busy here", port)
			}
			if b != nil {
				b.remove()
			}
			b = g.bootSpec(t, boxSpec{all: true})
			_, port = b.inspect()
		}
		startRun(t, g, "")
		b.answers(port)
	})
}

func TestE2EOnePortInTurn(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 1)
	a := g.boot(t, port)
	startRun(t, g, "")
	b := g.create(t, boxSpec{ports: []boxPort{{host: port, private: 80}}})
	a.answers(port)
	for range 2 {
		a.do("stop")
		b.do("start")
		b.answers(port)
		b.do("kill")
		a.do("start")
		a.answers(port)
	}
}

// Two bindings of the remote host want one local port.
func TestE2ETwoWantOnePort(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 1)
	p := startRun(t, g, "")
	a := g.bootSpec(t, boxSpec{ports: []boxPort{{ip: "127.0.0.1", host: port, private: 80}}})
	a.answers(port)
	b := g.bootSpec(t, boxSpec{ports: []boxPort{{ip: g.env["RIG_ADDR"], host: port, private: 80}}})
	line := p.waitLine("conflict for " + b.who())
	if !strings.Contains(line, a.who()) {
		t.Errorf("the conflict does not name %s: %s", a.who(), line)
	}
	if err := a.answering(port); err != nil {
		t.Errorf("the first one: %v", err)
	}
	var reasons []string
	for _, f := range p.status().Forwards {
		if int(f.LocalPort) == port && f.Status == conflict {
			reasons = append(reasons, f.Reason)
		}
	}
	if len(reasons) != 1 || !strings.Contains(reasons[0], a.who()) {
		t.Errorf("conflicts: %q, want one that names %s", reasons, a.who())
	}
	a.do("kill")
	killed := time.Now()
	b.answers(port)
	took("who had the port is killed: the other answers", killed)
	p.becomes(port, active, "")
}

func TestE2ENothingToForward(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 3)
	p := startRun(t, g, "")
	boxes := []*box{
		g.bootSpec(t, boxSpec{ports: []boxPort{{host: port, private: 80, proto: "udp"}}}),
		g.bootSpec(t, boxSpec{network: "host", args: []string{"-listen", strconv.Itoa(port + 1)}}),
		g.bootSpec(t, boxSpec{}), // exposes port 80, publishes nothing
		g.bootSpec(t, boxSpec{network: "none"}),
	}
	last := g.boot(t, port+2)
	last.answers(port + 2)
	for i := range 2 {
		if err := refused(port + i); err != nil {
			t.Error(err)
		}
	}
	for _, b := range boxes {
		p.never("→ " + b.who())
	}
	p.never("warning")
	var skipped []string
	for _, s := range p.status().Skipped {
		skipped = append(skipped, fmt.Sprintf("%s %d/%s: %s", s.Name, s.Port, s.Protocol, s.Reason))
	}
	slices.Sort(skipped)
	want := []string{
		fmt.Sprintf("%s %d/udp: SSH carries TCP only", boxes[0].name, port),
		fmt.Sprintf("%s 0/tcp: host network: the container publishes no ports", boxes[1].name),
	}
	slices.Sort(want)
	if !slices.Equal(skipped, want) {
		t.Errorf("skipped %q, want %q", skipped, want)
	}
}

// docker's proxy accepts for a container in which nobody listens.
func TestE2ENobodyListens(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 3)
	p := startRun(t, g, "")
	none := g.boot(t, port, "-mode", "none")
	late := g.boot(t, port+1, "-after", "3s")
	g.boot(t, port+2).answers(port + 2)
	p.waitLine("pending for " + none.who() + ": port not responding")
	if _, err := httpGet(port); err == nil {
		t.Errorf("%s answers", none.name)
	}
	p.becomes(port+1, pending, "port not responding")
	late.answers(port + 1)
	p.becomes(port+1, active, "")
	p.waitLine("→ " + late.who() + ", answers now")
	started, _ := late.inspect()
	took("the container begins to listen: active", started.Add(3*time.Second))
	p.becomes(port, pending, "port not responding")
}

func TestE2EDockerHost(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 1)
	p := newRun(t, g, "")
	p.args, p.env = []string{"run"}, []string{"DOCKER_HOST=ssh://" + p.host}
	p.start()
	p.waitLine("connected to ")
	g.boot(t, port).answers(port)
}

// Where there is no docker on the remote host, podman serves. Here it is a
// stand-in that has docker do it: the rig has one engine.
func TestE2EPodman(t *testing.T) {
	g := needRig(t)
	docker, err := exec.LookPath("docker")
	if err != nil {
		t.Fatal(err)
	}
	podman := filepath.Join(g.env["RIG_DIR"], "nodocker", "podman")
	script := fmt.Sprintf("#!/bin/sh\n[ \"$*\" = 'system dial-stdio' ] && exec %s --host=unix://%s system dial-stdio\n", docker, g.env["RIG_DOCKER"])
	if err := os.WriteFile(podman, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(podman) })
	port := freePorts(t, 1)
	startRun(t, g, "-nodocker")
	g.boot(t, port).answers(port)
}

func TestE2EDelay(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 1)
	startRun(t, g, "-delay")
	b := g.boot(t, port)
	b.answers(port)
	b.do("stop")
	refuses(t, port)
}

func TestE2EEveryByte(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 1)
	p := startRun(t, g, "")
	g.boot(t, port, "-mode", "echo")
	p.waitLine(localAddr(port) + " →")

	t.Run("32 MiB each way", func(t *testing.T) {
		sent := make([]byte, 32<<20)
		rand.Read(sent)
		c := dialEcho(t, port)
		wrote := make(chan error, 1)
		go func() {
			_, err := c.Write(sent)
			wrote <- errors.Join(err, c.CloseWrite())
		}()
		sum := sha256.New()
		n, err := io.Copy(sum, c)
		if err = errors.Join(err, <-wrote); err != nil {
			t.Fatal(err)
		}
		if want := sha256.Sum256(sent); n != int64(len(sent)) || !bytes.Equal(sum.Sum(nil), want[:]) {
			t.Errorf("%d bytes came back, and not the %d that were sent", n, len(sent))
		}
	})
	t.Run("200 connections at once", func(t *testing.T) {
		const n = 200
		var ready, done sync.WaitGroup
		errs := make(chan error, n)
		ready.Add(n)
		for i := range n {
			c := dialEcho(t, port)
			done.Add(1)
			go func() {
				defer done.Done()
				errs <- func() error {
					word := bytes.Repeat([]byte(fmt.Sprintf("connection %d\n", i)), 500)
					back := make([]byte, len(word))
					c.Write(word)
					_, err := io.ReadFull(c, back)
					ready.Done()
					if err != nil || !bytes.Equal(back, word) {
						return fmt.Errorf("connection %d: %v, or not its own bytes", i, err)
					}
					ready.Wait() // all are open until all were served
					if err := c.CloseWrite(); err != nil {
						return err
					}
					if rest, err := io.ReadAll(c); err != nil || len(rest) > 0 {
						return fmt.Errorf("connection %d: %d bytes too many, %v", i, len(rest), err)
					}
					return nil
				}()
			}()
		}
		done.Wait()
		for range n {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
	})
}

func TestE2ECleanStop(t *testing.T) {
	g := needRig(t)
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		t.Run(sig.String(), func(t *testing.T) {
			port := freePorts(t, 1)
			p := startRun(t, g, "")
			g.boot(t, port, "-mode", "echo")
			p.waitLine(localAddr(port) + " →")
			c := dialEcho(t, port) // in use while it stops
			signalled := time.Now()
			p.signal(sig)
			p.exits(0)
			took("signal: ended", signalled)
			p.leftNothing()
			if _, err := io.ReadAll(c); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("the connection outlives the run")
			}
		})
	}
	t.Run("while connecting", func(t *testing.T) {
		p := newRun(t, g, "-silent")
		p.start()
		eventually(t, "the run has a child", func() error {
			if len(children(p.cmd.Process.Pid)) == 0 {
				return errors.New("it has none")
			}
			return nil
		})
		p.signal(syscall.SIGINT)
		p.exits(0)
		p.leftNothing()
	})
	t.Run("twice", func(t *testing.T) {
		port := freePorts(t, 1)
		p := startRun(t, g, "")
		g.boot(t, port).answers(port)
		// A stopped ssh takes a second to get rid of.
		syscall.Kill(p.masterPid(), syscall.SIGSTOP)
		p.signal(syscall.SIGINT)
		eventually(t, "the first signal is heard", func() error {
			if p.ask("health", new(any)) == nil {
				return errors.New("the socket answers")
			}
			return nil
		})
		p.signal(syscall.SIGINT)
		p.exits(-1)
		p.leftNothingBut(true)
	})
	t.Run("nobody reads stderr any more", func(t *testing.T) {
		p := startRun(t, g, "")
		port := freePorts(t, 1)
		if err := p.stderr.Close(); err != nil {
			t.Fatal(err)
		}
		g.boot(t, port)
		p.exits(0)
		p.leftNothing()
		if err := refused(port); err != nil {
			t.Error(err)
		}
	})
}

func TestE2ESecondInstance(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 1)
	b := g.boot(t, port)
	first := startRun(t, g, "")
	b.answers(port)
	master := first.masterPid()
	socket, err := os.Lstat(first.paths().control)
	if err != nil {
		t.Fatal(err)
	}
	second := first.another()
	second.start()
	second.exits(1)
	if want := fmt.Sprintf("another rdhpf is running for this host: pid %d", first.cmd.Process.Pid); !strings.Contains(second.log(), want) {
		t.Errorf("the second says %q, want %q", second.log(), want)
	}
	if err := b.answering(port); err != nil {
		t.Error(err)
	}
	if now, err := os.Lstat(first.paths().control); err != nil || !os.SameFile(now, socket) || first.masterPid() != master {
		t.Errorf("the second touched the first's ssh: %v", err)
	}
	first.never("connection lost")
}

func TestE2ETwoStartedTogether(t *testing.T) {
	g := needRig(t)
	for i := range 50 {
		a := newRun(t, g, "")
		b := a.another()
		a.start()
		b.start()
		var loser, winner *runProc
		select {
		case <-a.done:
			loser, winner = a, b
		case <-b.done:
			loser, winner = b, a
		case <-time.After(patience):
			t.Fatal("both runs go on")
		}
		loser.exits(1)
		if want := fmt.Sprintf("pid %d", winner.cmd.Process.Pid); !strings.Contains(loser.log(), want) {
			t.Errorf("%d: the loser says %q, want %q", i, loser.log(), want)
		}
		if i%10 == 0 {
			winner.waitLine("connected to ")
		}
		winner.signal(syscall.SIGTERM)
		winner.exits(0)
		winner.leftNothing()
	}
}

func TestE2EBusyPort(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 2)
	l, err := net.Listen("tcp", localAddr(port))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	p := startRun(t, g, "")
	b, other := g.boot(t, port), g.boot(t, port+1)
	other.answers(port + 1)
	p.waitLine(fmt.Sprintf("warning: %s conflict for %s: port already in use after 5 retry attempts (held by %s, pid %d)",
		localAddr(port), b.who(), ownName(t), os.Getpid()))
	p.never("→ " + b.who())
	if err := other.answering(port + 1); err != nil {
		t.Error(err)
	}
	l.Close()
	freed := time.Now()
	b.answers(port)
	took("busy port freed: it answers", freed)
	p.waitLine(localAddr(port) + " → " + b.who())
}

// A port that is busy for less than five attempts is not worth a word.
func TestE2EBusyForAMoment(t *testing.T) {
	g := needRig(t)
	p := startRun(t, g, "")
	// The fifth attempt comes 1.5 s after the first, and the first not before the start.
	for range 5 {
		port := freePorts(t, 1)
		l, err := net.Listen("tcp", localAddr(port))
		if err != nil {
			t.Fatal(err)
		}
		b := g.boot(t, port)
		started, _ := b.inspect()
		time.Sleep(time.Until(started.Add(700 * time.Millisecond)))
		l.Close()
		freed := time.Now()
		inTime := freed.Sub(started) < 1400*time.Millisecond
		b.answers(port)
		took("port busy for a moment, freed: it answers", freed)
		if inTime {
			p.never("conflict")
			return
		}
		b.remove()
	}
	t.Skip("this machine is too busy to free a port in time")
}

// Labels on a container say where its ports go, and rdhpf port tells.
func TestE2ELabels(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 4)
	boot := func(host, private int, labels map[string]string) *box {
		return g.bootSpec(t, boxSpec{args: []string{"-listen", strconv.Itoa(private)}, labels: labels, ports: []boxPort{{host: host, private: private}}})
	}
	mapped := boot(port, 81, map[string]string{"rdhpf.map": fmt.Sprintf("%d=%d", port, port+1)})
	own := boot(0, 82, map[string]string{"rdhpf.map": fmt.Sprintf("82=%d", port+2), "com.docker.compose.service": "own"})
	skipped := boot(port+3, 83, map[string]string{"rdhpf.skip": "true"})
	wrong := boot(0, 84, map[string]string{"rdhpf.map": "84"})
	p := startRun(t, g, "")
	mapped.answers(port + 1)
	own.answers(port + 2)
	refuses(t, port)
	refuses(t, port+3)
	reasons := make(map[string]string)
	for _, s := range p.status().Skipped {
		reasons[s.Name] = s.Reason
	}
	if reasons[skipped.name] != "excluded by its label rdhpf.skip" || reasons[wrong.name] != "its label rdhpf.map=84: want PUBLISHED=LOCAL, such as 80=8080" {
		t.Errorf("skipped: %v", reasons)
	}
	p.waitLine(wrong.name)
	for _, c := range []struct {
		args string
		want int // local port
	}{{mapped.name + " 81", port + 1}, {"own 82/tcp", port + 2}, {own.id + " 82", port + 2}} {
		if out, errs, code := p.tell("port", strings.Fields(c.args)...); code != 0 || out != localAddr(c.want)+"\n" {
			t.Errorf("port %s: %q, %q, %d", c.args, out, errs, code)
		}
	}
	if out, errs, code := p.tell("port", skipped.name); code != 1 || out != "" || !strings.Contains(errs, "is not forwarded: excluded by its label") {
		t.Errorf("port of what is skipped: %q, %q, %d", out, errs, code)
	}
}
