//go:build linux

package main

// host.go: what is measured on: a rig of our own, containers on its engine, and
// the processes of rdhpf and ssh. All of it ends with close.

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	poolSize  = 31   // containers that most figures share
	portsNeed = 1400 // free local ports in a row
)

// bench is used by one goroutine, but for close.
type bench struct {
	factor float64
	tmp    string            // our files
	name   string            // of the rig, once there may be one
	env    map[string]string // what the rig says of itself
	base   int               // the first of portsNeed free local ports
	engine *http.Client
	pool   []*container

	mu       sync.Mutex
	children map[*exec.Cmd]bool // started and not yet waited for
	closed   bool
}

// container publishes ports under the same number as on the remote host.
type container struct {
	id      string
	addrs   []string // local
	running bool
}

func (b *bench) open() (err error) {
	if os.Geteuid() != 0 {
		return fmt.Errorf("a rig needs root")
	}
	if _, err := os.Stat("e2e/rig/rig"); err != nil {
		return fmt.Errorf("run this from the root of the project: %w", err)
	}
	b.children = map[*exec.Cmd]bool{}
	if b.tmp, err = os.MkdirTemp("", "rdhpf-bench-"); err != nil {
		return err
	}
	if b.base, err = freePorts(portsNeed); err != nil {
		return err
	}
	build := exec.Command("go", "build", "-o", b.tmp+"/rdhpf", ".")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("go build: %w\n%s", err, out)
	}
	b.name = fmt.Sprintf("bench-%d", os.Getpid())
	up := exec.Command("e2e/rig/rig", "up", "-owner", strconv.Itoa(os.Getpid()), b.name)
	up.Stderr = os.Stderr
	out, err := up.Output()
	if err != nil {
		return fmt.Errorf("rig up: %w", err)
	}
	b.env = map[string]string{}
	for _, line := range strings.Split(string(out), "\n") {
		if key, value, ok := strings.Cut(line, "="); ok {
			b.env[key] = value
		}
	}
	b.engine = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", b.env["RIG_DOCKER"])
	}}}
	return nil
}

// close takes everything down. It can be called from anywhere, more than once.
func (b *bench) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return
	}
	b.closed = true
	for cmd := range b.children {
		cmd.Process.Kill()
	}
	if b.name != "" {
		down := exec.Command("e2e/rig/rig", "down", b.name)
		down.Stderr = os.Stderr
		down.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a second Ctrl-C does not stop it
		if err := down.Run(); err != nil {
			fmt.Fprintln(os.Stderr, "bench: rig down:", err)
		}
	}
	if b.tmp != "" {
		os.RemoveAll(b.tmp)
	}
}

// freePorts finds n ports in a row that can be bound, below those that the
// kernel gives to clients.
func freePorts(n int) (int, error) {
next:
	for base := 12000; base+n < 32000; base += n {
		for p := base; p < base+n; p++ {
			l, err := net.Listen("tcp", local(p))
			if err != nil {
				continue next
			}
			l.Close()
		}
		return base, nil
	}
	return 0, fmt.Errorf("there are no %d free local ports in a row", n)
}

func local(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

// api calls the engine and decodes its answer into a value that is not nil.
func (b *bench) api(method, path string, body, into any) error {
	var send bytes.Buffer
	if body != nil {
		if err := json.NewEncoder(&send).Encode(body); err != nil {
			return err
		}
	}
	req, err := http.NewRequest(method, "http://docker"+path, &send)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := b.engine.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		said, _ := io.ReadAll(io.LimitReader(resp.Body, 1000))
		return fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, bytes.TrimSpace(said))
	}
	if into != nil {
		return json.NewDecoder(resp.Body).Decode(into)
	}
	return nil
}

// create makes a container with n published ports, which does not run yet.
func (b *bench) create(first, n int) (*container, error) {
	type binding struct{ HostPort string }
	exposed, bound := map[string]struct{}{}, map[string][]binding{}
	c := &container{}
	for p := first; p < first+n; p++ {
		name := strconv.Itoa(p) + "/tcp"
		exposed[name], bound[name] = struct{}{}, []binding{{strconv.Itoa(p)}}
		c.addrs = append(c.addrs, local(p))
	}
	err := b.api("POST", "/containers/create", map[string]any{
		"Image":        b.env["RIG_IMAGE"],
		"Cmd":          []string{"-listen", fmt.Sprintf("%d-%d", first, first+n-1)},
		"ExposedPorts": exposed,
		"HostConfig":   map[string]any{"PortBindings": bound},
	}, &struct{ ID *string }{&c.id})
	return c, err
}

func (b *bench) start(c *container) error {
	c.running = true
	return b.api("POST", "/containers/"+c.id+"/start", nil, nil)
}

// kill returns when the container has ended.
func (b *bench) kill(c *container) error {
	c.running = false
	return b.api("POST", "/containers/"+c.id+"/kill", nil, nil)
}

func (b *bench) remove(c *container) error {
	return b.api("DELETE", "/containers/"+c.id+"?force=1", nil, nil)
}

// running has exactly the first n of the pool run.
func (b *bench) running(n int) ([]*container, error) {
	for len(b.pool) < poolSize {
		c, err := b.create(b.base+len(b.pool), 1)
		if err != nil {
			return nil, err
		}
		b.pool = append(b.pool, c)
	}
	for i, c := range b.pool {
		var err error
		switch {
		case i < n && !c.running:
			err = b.start(c)
		case i >= n && c.running:
			err = b.kill(c)
		}
		if err != nil {
			return nil, err
		}
	}
	var addrs []string
	for _, c := range b.pool[:n] {
		addrs = append(addrs, b.remote(c.addrs[0]))
	}
	return b.pool[:n], allAnswer(addrs)
}

// remote is where the port of a local address is published.
func (b *bench) remote(addr string) string {
	_, port, _ := net.SplitHostPort(addr)
	return net.JoinHostPort(b.env["RIG_ADDR"], port)
}

func addrs(cs []*container) (all []string) {
	for _, c := range cs {
		all = append(all, c.addrs...)
	}
	return all
}

// begin starts a child that does not outlive us; finish has to be called.
func (b *bench) begin(cmd *exec.Cmd) error {
	// A session of its own, as rdhpf gives its ssh: Linux shares a busy CPU out
	// between sessions. Pdeathsig fires at the end of the thread that forks; Go
	// ends none, but where a goroutine is locked to it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return fmt.Errorf("interrupted")
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	b.children[cmd] = true
	return nil
}

// finish ends a child with a signal, and with SIGKILL where that does not help.
func (b *bench) finish(cmd *exec.Cmd, sig syscall.Signal) {
	cmd.Process.Signal(sig)
	late := time.AfterFunc(10*time.Second, func() { cmd.Process.Kill() })
	cmd.Wait()
	late.Stop()
	b.mu.Lock()
	delete(b.children, cmd)
	b.mu.Unlock()
}

// ssh prepares the rig's ssh.
func (b *bench) ssh(args ...string) *exec.Cmd {
	return exec.Command(filepath.Join(b.env["RIG_BIN"], "ssh"), args...)
}
