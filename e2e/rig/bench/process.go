//go:build linux

package main

// process.go: the two that are compared: an rdhpf, and an ssh with -L.

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

// forwarder is a running rdhpf.
type forwarder struct {
	b    *bench
	host string // its -host
	cmd  *exec.Cmd

	mu        sync.Mutex
	said      []string
	connected time.Time // when it said so; what waits for it is in up
	up        chan struct{}
	read      chan struct{} // closed at the end of its stderr
}

// run starts an rdhpf for one of the rig's aliases and does not wait.
func (b *bench) run(alias string) (*forwarder, error) {
	f := &forwarder{b: b, host: alias, up: make(chan struct{}), read: make(chan struct{}),
		cmd: exec.Command(b.tmp+"/rdhpf", "run", "-host", alias)}
	f.cmd.Env = append(os.Environ(), "RDHPF_DIR="+b.tmp+"/state", "PATH="+b.env["RIG_BIN"]+":"+os.Getenv("PATH"))
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	f.cmd.Stderr = w
	err = b.begin(f.cmd)
	w.Close()
	if err != nil {
		r.Close()
		return nil, err
	}
	go f.listen(r)
	return f, nil
}

func (f *forwarder) listen(r *os.File) {
	defer close(f.read)
	defer r.Close()
	for lines := bufio.NewScanner(r); lines.Scan(); {
		now := time.Now()
		f.mu.Lock()
		f.said = append(f.said, lines.Text())
		if f.connected.IsZero() && strings.Contains(lines.Text(), "connected to ") {
			f.connected = now
			close(f.up)
		}
		f.mu.Unlock()
	}
}

// ready waits until rdhpf is connected and all of addrs answer through it.
func (f *forwarder) ready(addrs []string) error {
	select {
	case <-f.up:
	case <-f.read:
		return f.explain(fmt.Errorf("rdhpf ended"))
	case <-time.After(patience):
		return f.explain(fmt.Errorf("rdhpf does not connect"))
	}
	return f.explain(allAnswer(addrs))
}

// explain adds to an error what rdhpf said.
func (f *forwarder) explain(err error) error {
	if err == nil {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return fmt.Errorf("%w\nrdhpf said:\n%s", err, strings.Join(f.said[max(0, len(f.said)-20):], "\n"))
}

func (f *forwarder) stop() {
	f.b.finish(f.cmd, syscall.SIGTERM)
	<-f.read
}

// plain is an ssh -L to one remote port.
type plain struct {
	b     *bench
	cmd   *exec.Cmd
	stdin io.Closer
	addr  string
}

// plainForward has a session that does nothing, as rdhpf has one to the engine:
// without any the server leaves TCP_NODELAY off, and the comparison would
// flatter rdhpf.
func (b *bench) plainForward(alias, remotePort string) (*plain, error) {
	p := &plain{b: b, addr: local(b.base + portsNeed - 1)}
	p.cmd = b.ssh("-T", "-o", "ExitOnForwardFailure=yes", "-o", "BatchMode=yes",
		"-L", p.addr+":127.0.0.1:"+remotePort, b.env["RIG_HOST"]+alias, "cat")
	p.cmd.Stderr = os.Stderr
	var err error
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := b.begin(p.cmd); err != nil {
		return nil, err
	}
	if err := answers(p.addr); err != nil {
		p.stop()
		return nil, err
	}
	return p, nil
}

func (p *plain) stop() {
	p.stdin.Close()
	p.b.finish(p.cmd, syscall.SIGTERM)
}

// command prepares another command of rdhpf.
func (f *forwarder) command(args ...string) *exec.Cmd {
	cmd := exec.Command(f.cmd.Path, args...)
	cmd.Env = f.cmd.Env
	return cmd
}

// tell runs another command of rdhpf.
func (f *forwarder) tell(args ...string) error {
	if out, err := f.command(args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%v: %w: %.2000s", args, err, out)
	}
	return nil
}

// allActive waits until rdhpf says so.
func (f *forwarder) allActive() error {
	return f.tell("status", "-host", f.host, "-wait", patience.String())
}

// statusCost compares `rdhpf status` with `rdhpf version`, the least that a
// command can take.
func (f *forwarder) statusCost(figure string, goal float64) (row, error) {
	run := func(args ...string) (time.Duration, error) {
		return timed(func() error { return f.tell(args...) })
	}
	var status, version samples
	var ratios []float64
	for i := range f.b.times(30) + 1 {
		s, err := run("status", "-host", f.host)
		if err != nil {
			return row{}, err
		}
		v, err := run("version")
		if err != nil {
			return row{}, err
		}
		if i > 0 { // the first is to warm up
			status.add(s)
			version.add(v)
			ratios = append(ratios, float64(s)/float64(v))
		}
	}
	ratio := median(ratios)
	return row{figure: figure, n: len(status), median: ms(status.median()), p90: ms(status.p90()),
		reference: ms(version.median()) + " (rdhpf version)", relation: fmt.Sprintf("%.2f ×", ratio),
		goal: fmt.Sprintf("≤ %.1f ×", goal), met: ratio <= goal}, nil
}
