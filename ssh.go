package main

// ssh.go: the ssh master: its arguments, its start and readiness, what it says
// on stderr, its end.

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	connectTimeout = 8 * time.Second  // for TCP and the server's banner, by ssh itself
	readyTimeout   = 30 * time.Second // for all of it, jumps and authentication included
	readyPoll      = 2 * time.Millisecond
	stopTimeout    = time.Second // from SIGTERM to SIGKILL
	muxTimeout     = 5 * time.Second
)

// sshProgram is the OpenSSH client to use.
type sshProgram struct {
	path         string
	major, minor int
}

// findSSH looks for ssh on PATH and asks for its version.
func findSSH() (sshProgram, error) {
	path, err := exec.LookPath("ssh")
	if err != nil {
		return sshProgram{}, errors.New("ssh is not on PATH: install the OpenSSH client")
	}
	out, err := exec.Command(path, "-V").CombinedOutput()
	if err != nil {
		return sshProgram{}, fmt.Errorf("running %s -V: %w", path, err)
	}
	p := sshProgram{path: path}
	_, version, _ := strings.Cut(string(out), "OpenSSH_") // "9.2p1 Debian-2, …"
	if _, err := fmt.Sscanf(version, "%d.%d", &p.major, &p.minor); err != nil {
		return sshProgram{}, fmt.Errorf("%s is not OpenSSH: it says %q", path, printable(string(out), maxText))
	}
	return p, nil
}

// args are the master's arguments. The user's ssh_config applies but for what
// would make it no foreground master that listens for nobody but us; host keys
// are never its or our business. A link is given up after 9 s of silence: TCP's
// own retries come too far apart by then to be back soon after it heals.
func (p sshProgram) args(h host, control string) []string {
	options := []string{
		"ControlMaster=yes", "ControlPersist=no", "BatchMode=yes", "ClearAllForwardings=yes",
		"ExitOnForwardFailure=no", "GatewayPorts=no", "RemoteCommand=none", "RequestTTY=no", "Tunnel=no",
		"PermitLocalCommand=no", "ForwardAgent=no", "ForwardX11=no", "VisualHostKey=no", "LogLevel=INFO",
		fmt.Sprintf("ConnectTimeout=%d", connectTimeout/time.Second), "ServerAliveInterval=3", "ServerAliveCountMax=2",
	}
	if p.major > 8 || p.major == 8 && p.minor >= 7 {
		options = append(options, "ForkAfterAuthentication=no")
	}
	// -S takes the path as it is, where -o would split it at spaces; ssh still
	// expands % in it.
	args := []string{"-M", "-N", "-T", "-S", strings.ReplaceAll(control, "%", "%%")}
	for _, o := range options {
		args = append(args, "-o", o)
	}
	return append(args, h.sshArgs()...)
}

// master is a running ssh master. Its fields are set once before others see it.
type master struct {
	control string
	socket  os.FileInfo // of the control socket, to see it replaced
	cmd     *exec.Cmd
	done    chan struct{} // closed when the process has been waited for

	prohibited atomic.Int64 // connections that the server refused to make
	probes     sync.RWMutex // held by those that are under way

	mu   sync.Mutex
	said []string // the last lines on stderr
}

// connectError is why a connection could not be made. Where stubborn, trying
// again soon is of no use: a person has to do something first.
type connectError struct {
	said     string
	stubborn bool
}

func (e *connectError) Error() string { return e.said }

// startMaster starts a master and waits until it answers on its control socket
// with its own pid. Whoever calls it holds the instance lock, so what is on the
// control path belongs to no one alive.
func (p sshProgram) startMaster(ctx context.Context, h host, control string, debug func(string)) (*master, error) {
	if err := sweepControl(control); err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("starting ssh: %w", err)
	}
	m := &master{control: control, cmd: exec.Command(p.path, p.args(h, control)...), done: make(chan struct{})}
	m.cmd.Stderr = w
	err = startChild(m.cmd)
	w.Close()
	if err != nil {
		r.Close()
		return nil, fmt.Errorf("starting ssh: %w", err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		m.readStderr(r, debug)
	}()
	go func() {
		m.cmd.Wait()
		// A ProxyCommand can hold the pipe longer than ssh lives.
		r.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		<-read
		r.Close()
		close(m.done)
	}()
	if err := m.awaitReady(ctx); err != nil {
		m.stop()
		return nil, err
	}
	return m, nil
}

func (m *master) awaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	tick := time.NewTicker(readyPoll)
	defer tick.Stop()
	for {
		select {
		case <-m.done:
			return m.exitError()
		case <-ctx.Done():
			if ctx.Err() == context.DeadlineExceeded {
				return &connectError{said: fmt.Sprintf("ssh did not connect within %v", readyTimeout)}
			}
			return ctx.Err()
		case <-tick.C:
		}
		info, err := os.Lstat(m.control)
		if err != nil {
			continue
		}
		conn, err := muxDial(m.control, muxTimeout)
		if err != nil {
			continue // bound, but not listening yet
		}
		pid, err := conn.alive(muxTimeout)
		conn.Close()
		if err == nil && pid != m.cmd.Process.Pid {
			return fmt.Errorf("another ssh (pid %d) answers on %s", pid, m.control)
		}
		if err == nil {
			m.socket = info
			return nil
		}
	}
}

// replaced says whether what is at path is no longer what was made there.
func replaced(path string, made os.FileInfo) bool {
	info, err := os.Lstat(path)
	return err != nil || !os.SameFile(info, made)
}

func (m *master) readStderr(r *os.File, debug func(string)) {
	lines := bufio.NewReaderSize(r, 4096)
	for {
		line, prefix, err := lines.ReadLine()
		if err != nil {
			return
		}
		text := printable(strings.TrimSpace(string(line)), 1000)
		if text == "" || prefix {
			continue
		}
		debug(text)
		if strings.HasPrefix(text, "channel ") { // one connection's trouble is not the master's
			if strings.Contains(text, "administratively prohibited") {
				m.prohibited.Add(1)
			}
			continue
		}
		m.mu.Lock()
		if m.said = append(m.said, text); len(m.said) > 20 {
			m.said = m.said[1:]
		}
		m.mu.Unlock()
	}
}

// lastWord is the last line that ssh said on stderr, "" when none.
func (m *master) lastWord() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.said) == 0 {
		return ""
	}
	return m.said[len(m.said)-1]
}

// exitError explains the end of the master, once done, in ssh's own words. A
// master that was killed can exit 0: that it ended is a failure all the same.
func (m *master) exitError() error {
	m.mu.Lock()
	all := strings.Join(m.said, "\n")
	m.mu.Unlock()
	last := m.lastWord()
	switch {
	case strings.Contains(all, "REMOTE HOST IDENTIFICATION HAS CHANGED"):
		return &connectError{"ssh: the host key of the remote host has changed: Host key verification failed. " +
			"If that is right, remove the old one with ssh-keygen -R", true}
	case strings.Contains(all, "Host key verification failed"):
		return &connectError{"ssh: " + last + " Run ssh to that host once by hand and check its key", true}
	case strings.Contains(all, "Permission denied ("):
		return &connectError{"ssh: " + last + " rdhpf asks for no password: use a key or an agent that ssh takes without one", true}
	case last != "":
		return &connectError{said: "ssh: " + strings.TrimPrefix(last, "ssh: ")}
	}
	return &connectError{said: "ssh ended: " + m.cmd.ProcessState.String()}
}

// stop ends the master and whatever it started, and removes its socket.
func (m *master) stop() {
	m.signal(syscall.SIGTERM)
	select {
	case <-m.done:
	case <-time.After(stopTimeout):
		m.signal(syscall.SIGKILL)
		<-m.done
	}
	if m.socket == nil || !replaced(m.control, m.socket) {
		removeSocket(m.control)
	}
}

// signal reaches a ProxyCommand too: the master leads a process group.
func (m *master) signal(sig syscall.Signal) {
	select {
	case <-m.done: // its pid may be another's by now
	default:
		syscall.Kill(-m.cmd.Process.Pid, sig)
	}
}

// sweepControl ends an orphan of an earlier run that still answers on the
// control path, and removes a socket that nobody answers on.
func sweepControl(control string) error {
	if _, err := os.Lstat(control); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if conn, err := muxDial(control, time.Second); err == nil {
		conn.terminate(time.Second)
		conn.Close()
	}
	return removeSocket(control)
}

// removeSocket removes path if it is a socket; that it is gone already is fine.
func removeSocket(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("%s is in the way and no socket: remove it", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
