package main

// exec.go: what points tools at the engine's socket: `rdhpf env`, which prints it for a shell, and `rdhpf run -- COMMAND`,
// which runs a command with it. And an instance in the background: `run -detach` starts this program again, in a session of
// its own, and waits until it is connected. The instance says so as services tell systemd (sd_notify(3)), and so tells
// systemd as well.

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	routeTimeout = 2 * time.Second        // for the remote socket's path to be known
	takeOver     = 100 * time.Millisecond // between looks whether another instance has ended

	exitNotExecutable = 126
	exitNotFound      = 127
	exitSignal        = 128 // plus the signal's number
)

// commandEnd ends the program with the status of a command; without an error that is all
// there is to say.
type commandEnd struct {
	status int
	error
}

// toolVars are the variables of toolEnv.
var toolVars = []string{"DOCKER_HOST", "TESTCONTAINERS_HOST_OVERRIDE", "TESTCONTAINERS_DOCKER_SOCKET_OVERRIDE"}

// toolEnv returns the values of toolVars with which tools use the engine of an instance.
func toolEnv(snap *snapshot) []string {
	return []string{"unix://" + snap.DockerSocket, loopback4.String(), cmp.Or(snap.RemoteDockerSocket, defaultEngine)}
}

// envCommand prints what a shell evaluates.
func envCommand(f *flag.FlagSet) func(args, after []string) error {
	hostFlag := f.String("host", "", hostOfOne)
	shell := f.String("shell", "sh", "`SHELL` print for sh, bash, zsh or fish (default sh)")
	asJSON := f.Bool("json", false, "print one JSON object")
	unset := f.Bool("unset", false, "print what takes the variables back")
	return func([]string, []string) error { return printEnv(*hostFlag, *shell, *asJSON, *unset) }
}

func printEnv(hostFlag, shell string, asJSON, unset bool) error {
	dialect, ok := map[string]string{"sh": "sh", "bash": "sh", "zsh": "sh", "fish": "fish"}[shell]
	switch {
	case !ok:
		return usageError{fmt.Errorf("-shell %q: want sh, bash, zsh or fish", shell)}
	case unset && asJSON:
		return usageError{errors.New("-unset and -json exclude each other")}
	case unset && dialect == "fish":
		fmt.Printf("set -e %s\n", strings.Join(toolVars, " "))
		return nil
	case unset:
		fmt.Printf("unset %s\n", strings.Join(toolVars, " "))
		return nil
	}
	t, err := findTarget(hostFlag)
	if err != nil {
		return err
	}
	snap, err := t.runningWithDocker()
	if err != nil {
		return err
	}
	values := toolEnv(snap)
	if asJSON {
		object := make(map[string]string)
		for i, name := range toolVars {
			object[name] = values[i]
		}
		return json.NewEncoder(os.Stdout).Encode(object)
	}
	for i, name := range toolVars {
		if dialect == "fish" {
			fmt.Printf("set -gx %s %s\n", name, quoted(values[i], `\'`))
		} else {
			fmt.Printf("export %s=%s\n", name, quoted(values[i], `'\''`))
		}
	}
	return nil
}

// quoted returns s as one word for a shell in which quote stands for ' between quotes.
func quoted(s, quote string) string {
	if badChar(s, "/.:_-@+") == "" {
		return s
	}
	if quote == `\'` {
		s = strings.ReplaceAll(s, `\`, `\\`)
	}
	return "'" + strings.ReplaceAll(s, "'", quote) + "'"
}

// runningWithDocker returns the state of the one instance meant, which serves the engine.
func (t target) runningWithDocker() (*snapshot, error) {
	p, err := t.one(context.Background(), false)
	if err != nil {
		return nil, err
	}
	for end := time.Now().Add(routeTimeout); ; time.Sleep(pollEvery) {
		r, err := inspect(context.Background(), p, nil)
		switch {
		case err != nil:
			return nil, err
		case r == nil && t.host == nil:
			return nil, &errNotRunning{noInstance}
		case r == nil || !r.Running:
			return nil, notFound(t.host.String())
		case r.Stale:
			return nil, errors.New(mute(r.PID))
		case r.DockerSocket == "":
			return nil, fmt.Errorf("the instance for %s does not serve the engine: it was started with -no-docker-socket", r.Host)
		case r.RemoteDockerSocket != "" || r.Connection.State != connected || time.Now().After(end):
			return r.snapshot, nil
		}
	}
}

// runAround runs a command while an instance for the host runs: the one there is, or else
// its own, which ends with the command. It returns the command's exit status.
func runAround(o runOptions, argv []string, wait time.Duration) error {
	program, err := findProgram(argv[0])
	if err != nil {
		return err
	}
	files := fileLimit() // before the instance raises it for itself
	signals := make(chan os.Signal, 16)
	signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE) // of a closed stderr
	for _, sig := range []os.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2} {
		if !signal.Ignored(sig) {
			signal.Notify(signals, sig)
		}
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	ended := make(chan struct{})
	var running atomic.Bool // the command
	go func() {
		defer close(ended)
		err := cmp.Or(keepInstance(ctx, o), errors.New("rdhpf was stopped"))
		early := ctx.Err() == nil
		if cancel(err); early && running.Load() {
			o.log.Error(fmt.Sprintf("ports are no longer forwarded: %v", err))
		}
	}()
	defer func() {
		cancel(nil)
		<-ended
	}()
	type outcome struct {
		snap *snapshot
		err  error
	}
	ready := make(chan outcome, 1)
	go func() {
		snap, err := readyFor(ctx, o, wait)
		ready <- outcome{snap, err}
	}()
	var now outcome
	select {
	case now = <-ready:
	case sig := <-signals:
		return &commandEnd{status: exitSignal + int(sig.(syscall.Signal))}
	}
	if now.err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return now.err
	}
	cmd := exec.Command(program, argv[1:]...)
	cmd.Args[0] = argv[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if cmd.Env = environFor(now.snap); now.snap.DockerSocket == "" {
		o.log.Warn(fmt.Sprintf("the instance that runs for %s does not serve the engine: DOCKER_HOST stays as it is", o.host))
	}
	if running.Store(true); ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return execute(cmd, files, signals)
}

// findProgram finds a program on PATH, and fails with the status that shells have for it.
func findProgram(name string) (string, error) {
	path, err := exec.LookPath(name)
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EISDIR) {
		return "", &commandEnd{exitNotExecutable, err}
	} else if err != nil {
		return "", &commandEnd{exitNotFound, err}
	}
	return path, nil
}

// environFor returns our environment, changed so that tools use the instance's engine if it
// serves that.
func environFor(snap *snapshot) []string {
	env := os.Environ()
	if snap.DockerSocket == "" {
		return env
	}
	env = slices.DeleteFunc(env, func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return slices.Contains([]string{"DOCKER_CONTEXT", "DOCKER_TLS", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH"}, name)
	})
	for i, value := range toolEnv(snap) {
		env = append(env, toolVars[i]+"="+value) // the last one counts
	}
	return env
}

// keepInstance runs an instance until ctx ends. While there is another, it is left alone;
// should that one end, its place is taken.
func keepInstance(ctx context.Context, o runOptions) error {
	for told := false; ; {
		err := run(ctx, o)
		var held *heldError
		if !errors.As(err, &held) {
			return err
		}
		if !told {
			told = true
			o.log.Info(fmt.Sprintf("using the rdhpf that runs already (pid %d), with its settings", held.pid))
		}
		lock := pathsFor(o.dir, o.host.String()).lock
		for held := true; held; _, held, err = lockedBy(lock) {
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(takeOver):
			}
		}
		if err != nil {
			return err
		}
	}
}

// readyFor waits until the instance is connected and its ports are open and, if wait is
// not 0, until all are active.
func readyFor(ctx context.Context, o runOptions, wait time.Duration) (*snapshot, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	p := pathsFor(o.dir, o.host.String())
	limit := readyTimeout
	if o.retry {
		limit = max(limit, wait)
	}
	late := time.After(limit)
	sights := make(chan sight)
	go follow(ctx, p, &o.host, sights)
	var r *report
	last := errors.New("no answer")
	for r == nil {
		select {
		case s := <-sights:
			switch {
			case s.err != nil:
				last = s.err
			case s.report.Stale:
				last = errors.New(missingPorts(s.report, wish{})[0])
			case s.report.Connection.State != connected:
				last = errors.New(cmp.Or(s.report.Connection.LastError, s.report.Connection.State))
			case s.report.DockerSocket == "" || s.report.RemoteDockerSocket != "":
				r = s.report
			}
		case <-late:
			return nil, fmt.Errorf("not connected to %s after %v: %w", o.host, limit, last)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if r == nil {
			continue
		}
		if err := callContext(ctx, p.socket, "settle", new(json.RawMessage)); err != nil && !errors.As(err, new(refusal)) {
			last = fmt.Errorf("waiting for the ports to open: %w", unanswered(r.PID, err))
			r = nil // another instance takes the place of one that has ended
		}
	}
	if wait > 0 {
		if err := waitFor(ctx, p, &o.host, wait, wish{}, printer{w: io.Discard}); err != nil {
			return nil, err
		}
	}
	return r.snapshot, nil
}

// execute runs a command, with its own limit on open files, and passes signals on to it. Those that a terminal sends reach it
// without us.
func execute(cmd *exec.Cmd, files unix.Rlimit, signals <-chan os.Signal) error {
	raised := fileLimit()
	unix.Setrlimit(unix.RLIMIT_NOFILE, &files)
	err := cmd.Start()
	unix.Setrlimit(unix.RLIMIT_NOFILE, &raised)
	if err != nil {
		return &commandEnd{exitNotExecutable, err}
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		select {
		case sig := <-signals:
			switch sig {
			case unix.SIGINT, unix.SIGQUIT, unix.SIGHUP:
				if inForeground() {
					continue
				}
			}
			cmd.Process.Signal(sig)
		case err := <-ended:
			var failed *exec.ExitError
			switch {
			case err == nil:
				return nil
			case !errors.As(err, &failed):
				return err
			}
			status := failed.Sys().(syscall.WaitStatus)
			if status.Signaled() {
				return &commandEnd{status: exitSignal + int(status.Signal())}
			}
			return &commandEnd{status: status.ExitStatus()}
		}
	}
}

func fileLimit() (limit unix.Rlimit) {
	unix.Getrlimit(unix.RLIMIT_NOFILE, &limit)
	return limit
}

// inForeground reports whether the terminal sends its signals to our process group.
func inForeground() bool {
	tty, err := os.Open("/dev/tty")
	if err != nil {
		return false
	}
	defer tty.Close()
	group, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

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
	if err := awaitDetached(cmd, ready, signals, said); err != nil {
		return err
	}
	if r.level <= slog.LevelInfo {
		fmt.Printf("rdhpf is running: pid %d, log %s; end it with rdhpf stop\n", cmd.Process.Pid, p.log)
	}
	return nil
}

// awaitDetached shows what the instance in the background logs until it is ready, in which case it returns nil, or has
// ended. A signal ends the instance.
func awaitDetached(cmd *exec.Cmd, ready <-chan struct{}, signals <-chan os.Signal, said io.Reader) error {
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
