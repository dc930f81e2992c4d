package main

// ssh.go: the ssh master: its arguments, startup, readiness, stderr output and
// exit.

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strconv"
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
	maxDials       = 16  // concurrently: the control socket's backlog is 64
	maxSaid        = 100 // lines of stderr
)

// sshProgram is the installed OpenSSH client.
type sshProgram struct {
	path         string
	major, minor int

	// What ssh_config has for the host.
	timeout time.Duration // for a connection; 0: none
	jump    string        // the last jump host; "": none
	before  string        // the jump hosts before it, separated by commas
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

// readConfig reads what ssh_config has for the host. Mistakes in it are reported by the
// connection.
func (prog *sshProgram) readConfig(h host) {
	out, _ := exec.Command(prog.path, append([]string{"-G"}, h.sshArgs()...)...).Output()
	for line := range strings.Lines(string(out)) {
		if value, ok := strings.CutPrefix(line, "connecttimeout "); ok {
			seconds, _ := strconv.ParseUint(strings.TrimSpace(value), 10, 16) // or "none"
			prog.timeout = time.Duration(seconds) * time.Second
		} else if value, ok := strings.CutPrefix(line, "proxyjump "); ok {
			prog.jumpBy(strings.TrimSpace(value))
		}
	}
}

// jumpBy takes the value of ProxyJump.
func (prog *sshProgram) jumpBy(value string) {
	i := strings.LastIndexByte(value, ',')
	prog.before, prog.jump = value[:max(i, 0)], strings.TrimPrefix(value[i+1:], "ssh://")
}

// ownJump returns options with which the connection to the jump host is a new one, rather
// than one that ssh_config has ssh keep and that may be dead: the master's own options do
// not reach it. It returns none if there is no jump host.
func (prog sshProgram) ownJump() []string {
	if prog.jump == "" || badChar(prog.jump+prog.before, ".-_@:/[],") != "" {
		return nil
	}
	command := []string{quoted(strings.ReplaceAll(prog.path, "%", "%%"), `'\''`), "-o", "ControlPath=none", "-o", "BatchMode=yes"}
	if prog.before != "" {
		command = append(command, "-J", prog.before)
	}
	return []string{"-o", "ProxyCommand=" + strings.Join(append(command, "-W", "'[%h]:%p'", "ssh://"+prog.jump), " ")}
}

// args returns the master's arguments. The user's ssh_config applies, host key
// checking included, except for options that would keep ssh from being a foreground
// master that listens only for us. A link is given up after 9 s of silence: by then
// TCP's retries are too far apart to recover soon after the link does.
func (prog sshProgram) args(h host, control string, ownJump bool) []string {
	options := []string{
		"ControlMaster=yes", "ControlPersist=no", "BatchMode=yes", "ClearAllForwardings=yes",
		"ExitOnForwardFailure=no", "GatewayPorts=no", "RemoteCommand=none", "RequestTTY=no", "Tunnel=no",
		"PermitLocalCommand=no", "ForwardAgent=no", "ForwardX11=no", "VisualHostKey=no", "LogLevel=INFO",
		fmt.Sprintf("ConnectTimeout=%d", cmp.Or(prog.timeout, connectTimeout)/time.Second), "ServerAliveInterval=3", "ServerAliveCountMax=2",
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
	if ownJump {
		args = append(args, prog.ownJump()...)
	}
	return append(args, h.sshArgs()...)
}

// master is a running ssh master. Its fields are set before it is shared.
type master struct {
	host    host
	jump    string // as in sshProgram
	control string
	socket  os.FileInfo // of the control socket, to detect replacement
	cmd     *exec.Cmd
	done    chan struct{} // closed when the process has been waited for

	onlySix  atomic.Bool             // the server connects to IPv6 addresses only
	dials    chan struct{}           // semaphore for concurrent dials
	refusals [nOutcomes]atomic.Int64 // streams that could not be opened, according to ssh's stderr
	probes   sync.RWMutex            // read-held by probes in progress

	routed   chan struct{} // closed once engineAt is set
	engineAt string        // socket forwarded to the engine's; "" if each connection takes a session
	opening  chan struct{} // semaphore for opening sessions for tools
	sessions atomic.Int32  // those that the server may count
	freed    chan struct{} // one of them has ended; capacity 1

	mu    sync.Mutex
	ready bool     // it is connected
	said  []string // the last lines on stderr, of the connection or of the attempt at it

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
// with a pid of its process group. With ownJump it makes a connection of its own to the
// jump host. The caller must hold the instance lock, so anything at the
// control path belongs to no live instance.
func (prog sshProgram) startMaster(ctx context.Context, h host, control string, ownJump bool, debug func(string)) (*master, error) {
	if err := sweepControl(control); err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("starting ssh: %w", err)
	}
	m := &master{host: h, jump: prog.jump, control: control, cmd: exec.Command(prog.path, prog.args(h, control, ownJump)...), done: make(chan struct{}),
		dials: make(chan struct{}, maxDials), routed: make(chan struct{}), opening: make(chan struct{}, 1), freed: make(chan struct{}, 1)}
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
	if err := m.awaitReady(ctx, readyTimeout+prog.timeout); err != nil {
		m.stop()
		return nil, err
	}
	return m, nil
}

func (m *master) awaitReady(ctx context.Context, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(readyPoll)
	defer tick.Stop()
	for {
		select {
		case <-m.done:
			return m.exitError()
		case <-ctx.Done():
			if ctx.Err() == context.DeadlineExceeded {
				return &connectError{said: fmt.Sprintf("ssh did not connect within %v", limit)}
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
		if group, _ := syscall.Getpgid(pid); err == nil && group == m.cmd.Process.Pid { // ssh, or a script that runs it
			m.socket, m.asked = info, conn
			m.mu.Lock()
			m.ready, m.said = true, nil // a banner explains nothing that happens later
			m.mu.Unlock()
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
// any order. It asks twice, with half the time for each: if this process was
// suspended during the first, that one timed out for no fault of the master.
func (m *master) alive() error {
	m.asking.Lock()
	defer m.asking.Unlock()
	_, err := m.asked.alive(muxTimeout / 2)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		if conn, dialErr := muxDial(m.control, muxTimeout/2); dialErr == nil {
			m.asked.Close()
			m.asked = conn
			_, err = conn.alive(muxTimeout / 2)
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
		m.mu.Lock()
		if m.ready && strings.HasPrefix(text, "channel ") { // concerns one connection, not the master
			if strings.Contains(text, "open failed") {
				m.refusals[refusalOf(text)].Add(1)
			}
		} else if m.said = append(m.said, text); len(m.said) > maxSaid {
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

// exitError explains the master's exit, once done is closed. A killed master can exit
// with 0, but any exit is a failure.
func (m *master) exitError() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e := explain(m.said, m.host); e != nil {
		if m.jump != "" && strings.Contains(e.said, "timed out") { // the options of ours do not reach the jump host
			e.said += "; if ssh keeps a connection to the jump host that is dead, end it: ssh -O exit ssh://" + m.jump
		}
		return e
	}
	return &connectError{said: "ssh ended: " + m.cmd.ProcessState.String()}
}

// causes are parts of what ssh says that tell why it failed, the most telling first, and
// what the user can do. HOST stands for the host's arguments to ssh.
var causes = []struct {
	text, remedy string
	stubborn     bool
}{
	{"Bad configuration option", "fix that line, or list the option after IgnoreUnknown above it", true},
	{"Bad owner or permissions on", "run chmod 600 on that file", true},
	{"are too open", "run chmod 600 on that file", true},
	{"Too many authentication failures", "the agent offers too many keys: set IdentitiesOnly and IdentityFile for that host in ssh_config", true},
	{"has changed and you have requested strict checking", "if that is expected, remove the old key: ssh-keygen -R", true},
	{"host key is known for", "connect once and check its key: ssh HOST", true},
	{"Host key verification failed", "connect once and check its key: ssh HOST", true},
	{"Permission denied (keyboard-interactive)", "the server asks a person at each login, whom rdhpf cannot be: have it accept a key alone " +
		"for that account (AuthenticationMethods publickey in its sshd_config)", true},
	{"Permission denied (", "rdhpf never asks for a password or passphrase: add the key to an agent (ssh-add), and see whether this works: ssh -o BatchMode=yes HOST", true},
	{"Unable to negotiate with", "see whether this works: ssh HOST", true},
	{"ssh: ", "", false}, // such as "ssh: connect to host box port 22: Connection refused"
	{"open failed: ", "the jump host cannot reach the host", false},
}

// explain returns what ssh's stderr says about its failure to connect, or nil if it says
// nothing.
func explain(lines []string, h host) *connectError {
	for _, c := range causes {
		for _, line := range slices.Backward(lines) {
			if !strings.Contains(line, c.text) {
				continue
			}
			remedy := c.remedy
			if _, key, ok := strings.Cut(line, "Host key for "); ok { // that of the user, or a jump host's
				key, _, _ = strings.Cut(key, " ")
				remedy += " '" + key + "'"
			}
			remedy = strings.ReplaceAll(remedy, "HOST", h.command())
			if strings.HasPrefix(c.text, "Permission denied (") {
				line = strings.Join(append(keyTroubles(lines), line), ": ")
			}
			return sshSaid(line, remedy, c.stubborn)
		}
	}
	var generic, other string
	for _, line := range lines {
		switch {
		case strings.HasPrefix(line, "**") || strings.HasPrefix(line, "Warning: Permanently added"):
		case isGeneric(line):
			generic = line
		default:
			other = line
		}
	}
	switch {
	case generic == "" && other == "":
		return nil
	case generic == "":
		return sshSaid(other, "", false)
	case strings.Contains(generic, "UNKNOWN") && other != "": // what a ProxyCommand said
		return sshSaid(other, "", false)
	case strings.Contains(generic, "UNKNOWN"):
		return sshSaid(generic, "the ProxyCommand or jump host ended; see what this prints: ssh "+h.command(), false)
	case other != "": // a banner, perhaps
		return sshSaid(generic, fmt.Sprintf("before that it printed %q", other), false)
	}
	return sshSaid(generic, "", false)
}

func sshSaid(line, remedy string, stubborn bool) *connectError {
	said := "ssh: " + strings.TrimPrefix(strings.TrimSpace(line), "ssh: ")
	if remedy != "" {
		said = strings.TrimSuffix(said, ".") + "; " + remedy
	}
	return &connectError{said, stubborn}
}

// isGeneric reports whether a line tells that the connection ended, but not why.
func isGeneric(line string) bool {
	for _, start := range []string{"Connection closed", "Connection reset", "Connection to ", "Disconnected from",
		"kex_exchange_identification:", "ssh_exchange_identification:", "stdio forwarding failed", "banner exchange:", "client_loop:"} {
		if strings.HasPrefix(line, start) {
			return !strings.Contains(line, "timed out")
		}
	}
	return false
}

// keyTroubles returns what ssh says about keys that it could not use.
func keyTroubles(lines []string) (troubles []string) {
	for _, line := range lines {
		for _, text := range []string{"Load key ", "no such identity", "signing failed"} {
			if strings.Contains(line, text) {
				troubles = append(troubles, strings.TrimSuffix(line, "."))
				break
			}
		}
	}
	return troubles
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
