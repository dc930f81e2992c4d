package main

// ssh.go: the ssh master: its arguments, startup, readiness, stderr output and
// exit.

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
	connectTimeout = 8 * time.Second  // for TCP and the server's banner, enforced by ssh
	readyTimeout   = 30 * time.Second // overall, including jumps and authentication
	readyPoll      = 2 * time.Millisecond
	stopTimeout    = time.Second // from SIGTERM to SIGKILL
	muxTimeout     = 5 * time.Second
	maxDials       = 16 // concurrently: the control socket's backlog is 64
)

// sshProgram is the installed OpenSSH client.
type sshProgram struct {
	path         string
	major, minor int
}

// findSSH finds ssh on PATH and determines its version.
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
		return sshProgram{}, fmt.Errorf("%s is not OpenSSH: ssh -V printed %q", path, printable(string(out), maxText))
	}
	return p, nil
}

// args returns the master's arguments. The user's ssh_config applies, host key
// checking included, except for options that would keep ssh from being a foreground
// master that listens only for us. A link is given up after 9 s of silence: by then
// TCP's retries are too far apart to recover soon after the link does.
func (prog sshProgram) args(h host, control string) []string {
	options := []string{
		"ControlMaster=yes", "ControlPersist=no", "BatchMode=yes", "ClearAllForwardings=yes",
		"ExitOnForwardFailure=no", "GatewayPorts=no", "RemoteCommand=none", "RequestTTY=no", "Tunnel=no",
		"PermitLocalCommand=no", "ForwardAgent=no", "ForwardX11=no", "VisualHostKey=no", "LogLevel=INFO",
		fmt.Sprintf("ConnectTimeout=%d", connectTimeout/time.Second), "ServerAliveInterval=3", "ServerAliveCountMax=2",
	}
	if prog.major > 8 || prog.major == 8 && prog.minor >= 7 {
		options = append(options, "ForkAfterAuthentication=no")
	}
	// -S takes the path verbatim, whereas -o would split it at spaces; ssh still
	// expands % in it.
	args := []string{"-M", "-N", "-T", "-S", strings.ReplaceAll(control, "%", "%%")}
	for _, o := range options {
		args = append(args, "-o", o)
	}
	return append(args, h.sshArgs()...)
}

// master is a running ssh master. Its fields are set before it is shared.
type master struct {
	control string
	socket  os.FileInfo // of the control socket, to detect replacement
	cmd     *exec.Cmd
	done    chan struct{} // closed when the process has been waited for

	dials    chan struct{}           // semaphore for concurrent dials
	refusals [nOutcomes]atomic.Int64 // streams that could not be opened, according to ssh's stderr
	probes   sync.RWMutex            // read-held by probes in progress

	remote   string        // the engine's socket, if the host's URL names it
	routed   chan struct{} // closed once engineAt is set
	engineAt string        // socket forwarded to the engine's; "" if each connection takes a session
	opening  chan struct{} // semaphore for opening sessions for tools
	sessions atomic.Int32  // those that the server may count
	freed    chan struct{} // one of them has ended; capacity 1

	mu   sync.Mutex
	said []string // the last lines on stderr

	asking sync.Mutex
	asked  *muxConn // for alive; closed once the master has not answered
}

// connectError is the reason that a connection could not be made. If stubborn is
// set, retrying soon is pointless: the user has to fix something first.
type connectError struct {
	said     string
	stubborn bool
}

func (ce *connectError) Error() string { return ce.said }

// startMaster starts a master and waits until it answers on its control socket
// with its own pid. The caller must hold the instance lock, so anything at the
// control path belongs to no live instance.
func (prog sshProgram) startMaster(ctx context.Context, h host, control string, debug func(string)) (*master, error) {
	if err := sweepControl(control); err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("starting ssh: %w", err)
	}
	m := &master{control: control, remote: h.socket, cmd: exec.Command(prog.path, prog.args(h, control)...), done: make(chan struct{}), dials: make(chan struct{}, maxDials),
		routed: make(chan struct{}), opening: make(chan struct{}, 1), freed: make(chan struct{}, 1)}
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
		// A ProxyCommand can keep the pipe open after ssh has exited.
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
		if err == nil && pid == m.cmd.Process.Pid {
			m.socket, m.asked = info, conn
			return nil
		}
		conn.Close()
		if err == nil {
			return fmt.Errorf("another ssh (pid %d) answers on %s", pid, m.control)
		}
	}
}

// alive returns an error if the master does not answer. Nothing less proves that it
// outlived the end of a stream: when a process dies, Linux closes its descriptors in
// any order.
func (m *master) alive() error {
	m.asking.Lock()
	defer m.asking.Unlock()
	began := time.Now()
	_, err := m.asked.alive(muxTimeout)
	if err != nil && time.Since(began) > 2*muxTimeout { // we were the ones suspended
		if conn, dialErr := muxDial(m.control, muxTimeout); dialErr == nil {
			m.asked.Close()
			m.asked = conn
			_, err = conn.alive(muxTimeout)
		}
	}
	if err != nil {
		m.asked.Close() // others that ask fail at once
	}
	return err
}

func (m *master) stopAsking() {
	m.asking.Lock()
	defer m.asking.Unlock()
	if m.asked != nil {
		m.asked.Close()
	}
}

// replaced reports whether the file created at path is no longer there.
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
		if strings.HasPrefix(text, "channel ") { // concerns one connection, not the master
			if strings.Contains(text, "open failed") {
				m.refusals[refusalOf(text)].Add(1)
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

// outcome is the result of an attempt to connect to an address from the remote
// host.
type outcome uint8

const (
	wasReached    outcome = iota
	refusedThere          // nothing listens at the address
	unreachable           // not reachable for another reason
	forbiddenToGo         // prohibited by the server
	nOutcomes
	unsure   // refused, for an uncertain reason
	noAnswer // the link did not answer in time
)

// refusalOf returns the outcome reported by a line of ssh's stderr: "channel 3:
// open failed: …".
func refusalOf(line string) outcome {
	switch {
	case strings.Contains(line, "administratively prohibited"):
		return forbiddenToGo
	case strings.Contains(line, "Connection refused"):
		return refusedThere
	}
	return unreachable
}

// lastWord returns the last line that ssh wrote to stderr, or "".
func (m *master) lastWord() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.said) == 0 {
		return ""
	}
	return m.said[len(m.said)-1]
}

// exitError explains the master's exit, once done is closed, in ssh's own words. A
// killed master can exit with 0, but any exit is a failure.
func (m *master) exitError() error {
	m.mu.Lock()
	all := strings.Join(m.said, "\n")
	m.mu.Unlock()
	last := m.lastWord()
	switch {
	case strings.Contains(all, "REMOTE HOST IDENTIFICATION HAS CHANGED"):
		return &connectError{"ssh: the host key of the remote host has changed: Host key verification failed. " +
			"If that is expected, remove the old key with ssh-keygen -R", true}
	case strings.Contains(all, "Host key verification failed"):
		return &connectError{"ssh: " + last + " Connect to that host once with ssh and check its key", true}
	case strings.Contains(all, "Permission denied ("):
		return &connectError{"ssh: " + last + " rdhpf never asks for a password: use an agent or a key without a passphrase", true}
	case last != "":
		return &connectError{said: "ssh: " + strings.TrimPrefix(last, "ssh: ")}
	}
	return &connectError{said: "ssh ended: " + m.cmd.ProcessState.String()}
}

// stop ends the master and its children, and removes its socket.
func (m *master) stop() {
	defer m.stopAsking()
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

// signal signals the master's process group, which includes a ProxyCommand.
func (m *master) signal(sig syscall.Signal) {
	select {
	case <-m.done: // the pid may have been reused
	default:
		syscall.Kill(-m.cmd.Process.Pid, sig)
	}
}

// sweepControl ends an orphaned master of an earlier run that still answers at the
// control path, and removes its socket.
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

// removeSocket removes the socket at path, if any. It is an error if path is
// something else.
func removeSocket(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("%s exists and is not a socket: remove it", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
