package main

// detach.go: an instance in the background. `run -detach` starts this program again, in a session of its own, and waits
// until it is connected. The instance says so as services tell systemd (sd_notify(3)), and so tells systemd as well.

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	detachedVar   = "RDHPF_DETACHED"       // set by run -detach, for the instance it starts
	notifyTimeout = 100 * time.Millisecond // if the receiver's queue is full: the loop must not wait longer
)

// notify sends a state to NOTIFY_SOCKET. Whether anybody receives it is not our concern.
func notify(socket, state string) {
	if socket == "" {
		return
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: socket, Net: "unixgram"}) // @: an abstract one
	if err != nil {
		return
	}
	defer c.Close()
	c.SetWriteDeadline(time.Now().Add(notifyTimeout))
	io.WriteString(c, state)
}

// sayReady tells whoever started the instance how it stands.
func (r *runner) sayReady(snap *snapshot) {
	if r.notify == "" {
		return
	}
	state := fmt.Sprintf("STATUS=%s: %s", r.host, snap.Connection.State)
	if snap.Connection.State == connected {
		state += fmt.Sprintf(", %d of %d ports active", snap.health(snap.StartedAt).Counts[active], len(snap.Forwards))
	} else if snap.Connection.LastError != "" {
		state += ": " + printable(snap.Connection.LastError, 1000)
	}
	// After the first list a server that allows a single session can still refuse the second, which ends run.
	ready := r.proven || r.everUp && (r.retry || r.engineErr() != nil)
	if ready {
		state += "\nREADY=1"
	}
	if state != r.notified {
		r.notified = state
		notify(r.notify, state)
	}
	if ready && r.detach { // nobody waits any longer
		r.notify = ""
	}
}

// stderr is where the instance logs. It also settles what it inherits from whoever started it, and its children must not.
func (r *runFlags) stderr() io.Writer {
	if r.command != nil { // which may know NOTIFY_SOCKET
		return os.Stderr
	}
	r.notify = os.Getenv("NOTIFY_SOCKET")
	os.Unsetenv("NOTIFY_SOCKET")
	if !r.detach {
		return os.Stderr
	}
	os.Unsetenv(detachedVar)
	signal.Ignore(unix.SIGHUP)
	return &logFile{f: os.Stderr, path: pathsFor(r.dir, r.host.String()).log}
}

// detach starts the instance in the background and returns once it is connected. Until then it shows what the instance logs.
func detach(r *runFlags) error {
	p := pathsFor(r.dir, r.host.String())
	if err := p.check(); err != nil {
		return err
	}
	if err := makeDir(p.dir); err != nil {
		return err
	}
	if pid, held, err := lockedBy(p.lock); err != nil {
		return err
	} else if held { // whose log it is
		return &heldError{pid}
	}
	log, err := openLog(p.log, maxLog/2)
	if err != nil {
		return fmt.Errorf("opening the log: %w", err)
	}
	defer log.Close()
	info, err := log.Stat()
	if err != nil {
		return fmt.Errorf("opening the log: %w", err)
	}
	said := io.NewSectionReader(log, info.Size(), math.MaxInt64-info.Size())
	ready, socket, closeSocket, err := awaitReady()
	if err != nil {
		return fmt.Errorf("creating a socket to learn when rdhpf is connected: %w", err)
	}
	defer closeSocket()
	program, err := os.Executable()
	if err != nil {
		return fmt.Errorf("starting rdhpf in the background: %w", err)
	}
	signals := make(chan os.Signal, 1)
	for _, sig := range []os.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT} {
		if !signal.Ignored(sig) {
			signal.Notify(signals, sig)
		}
	}
	cmd := exec.Command(program, os.Args[1:]...)
	cmd.Env = append(os.Environ(), detachedVar+"=1", "NOTIFY_SOCKET="+socket)
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	for fd := 3; fd < 1024; fd++ { // pipes of a script or a CI job, which waits for their end
		unix.CloseOnExec(fd)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting rdhpf in the background: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	show := time.NewTicker(pollEvery)
	defer show.Stop()
	var interrupted syscall.Signal
	for {
		select {
		case <-show.C:
			io.Copy(os.Stderr, said)
		case sig := <-signals:
			interrupted = sig.(syscall.Signal)
			cmd.Process.Signal(unix.SIGTERM)
		case <-ready:
			if ready = nil; interrupted != 0 {
				continue
			}
			io.Copy(os.Stderr, said)
			if r.level <= slog.LevelInfo {
				fmt.Printf("rdhpf is running: pid %d, log %s; end it with rdhpf stop\n", cmd.Process.Pid, p.log)
			}
			return nil
		case err := <-ended:
			io.Copy(os.Stderr, said)
			var failed *exec.ExitError
			switch {
			case interrupted != 0:
				return &commandEnd{status: exitSignal + int(interrupted)}
			case errors.As(err, &failed) && failed.Exited(): // it has said why
				return &commandEnd{status: failed.ExitCode()}
			case err != nil:
				return fmt.Errorf("rdhpf ended before it was connected: %w", err)
			}
			return errors.New("rdhpf was stopped before it was connected")
		}
	}
}

// awaitReady returns the path of a socket for notify, and a channel that is closed when READY=1 has come there.
func awaitReady() (ready chan struct{}, socket string, end func(), err error) {
	dir, err := os.MkdirTemp("", "rdhpf-")
	if err != nil {
		return nil, "", nil, err
	}
	socket = filepath.Join(dir, "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		os.RemoveAll(dir)
		return nil, "", nil, err
	}
	ready = make(chan struct{})
	go func() {
		for buf := make([]byte, 4096); ; {
			n, err := c.Read(buf)
			if err != nil {
				return
			}
			if slices.Contains(strings.Split(string(buf[:n]), "\n"), "READY=1") {
				close(ready)
				return
			}
		}
	}()
	return ready, socket, func() {
		c.Close()
		os.RemoveAll(dir)
	}, nil
}
