package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// call.go: the client's end of the socket of a running instance.

// dialInstance connects to a running instance, which must be ours or root's.
func dialInstance(path string) (*net.UnixConn, error) {
	conn, err := (&net.Dialer{Timeout: dialTimeout}).Dial("unix", path)
	if err != nil {
		return nil, err
	}
	uc := conn.(*net.UnixConn)
	if !allowed(uc) {
		uc.Close()
		return nil, fmt.Errorf("%s belongs to another user's process", path)
	}
	return uc, nil
}

// call asks a running instance and decodes its answer into result.
func call(path, method string, result any) error {
	conn, err := dialInstance(path)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(dialTimeout + callTimeout))
	if method == "status" || method == "health" {
		conn.SetDeadline(time.Now().Add(dialTimeout))
	}
	if _, err := fmt.Fprintf(conn, `{"method":%q,"params":{}}`+"\n", method); err != nil {
		return err
	}
	return readReply(bufio.NewReaderSize(io.LimitReader(conn, maxStateFile), 1<<20), result)
}

// readReply reads one answer in the plain dialect into result, a pointer.
func readReply(r *bufio.Reader, result any) error {
	reply := struct {
		Result any     `json:"result"`
		Error  *string `json:"error"`
	}{Result: result}
	line, err := r.ReadString('\n')
	if err == nil {
		if snap, ok := result.(*snapshot); ok {
			err = unmarshalSnapshot(line, &reply, snap)
		} else {
			err = json.Unmarshal([]byte(line), &reply)
		}
	}
	if err != nil {
		return fmt.Errorf("reading the answer: %w", err)
	}
	if reply.Error != nil {
		return errors.New(printable(*reply.Error, 1000))
	}
	return nil
}

// commands.go: the commands that speak to a running instance: status, health,
// pause, resume, reload, stop.

// errUnhealthy ends with 1 where all there is to say is printed.
var errUnhealthy = errors.New("not all is well")

// target is the host that a command is about: host is nil where the user names
// none and Docker has no default that is remote.
type target struct {
	dir  string
	host *host
}

// findTarget resolves -host like run does.
func findTarget(hostFlag string) (target, error) {
	home, _ := os.UserHomeDir()
	dir, err := stateDir(os.Getenv, home)
	if err != nil {
		return target{}, err
	}
	h, err := resolveHost(hostFlag, os.Getenv, home)
	switch {
	case err == nil:
		return target{dir, &h}, nil
	case hostFlag != "":
		return target{}, usageError{err}
	}
	return target{dir: dir}, nil
}

func statusCommand(args []string) error {
	f := flag.NewFlagSet("status", flag.ContinueOnError)
	hostFlag := f.String("host", "", "remote Docker `host` (default: what docker would take, else every instance)")
	asJSON := f.Bool("json", false, "print one JSON object an instance")
	wide := f.Bool("wide", false, "show names, images, services and container ports too")
	watch := f.Bool("watch", false, "print again at each change")
	wait := f.Duration("wait", 0, "wait that `long` for the ports named after the flags, or all, to be active")
	if err := parseFlagsAndArgs(f, args); err != nil {
		return err
	}
	var ports []uint16
	for _, arg := range f.Args() {
		p, err := parsePort(arg)
		if err != nil {
			return usageError{err}
		}
		ports = append(ports, p)
	}
	waits := *wait != 0
	switch {
	case *wait < 0:
		return usageError{errors.New("-wait wants a positive time, like 30s")}
	case len(ports) > 0 && !waits:
		return usageError{errors.New("ports are for -wait, as in: rdhpf status -wait 30s 8080")}
	case waits && *watch:
		return usageError{errors.New("-wait and -watch do not go together")}
	}
	t, err := findTarget(*hostFlag)
	if err != nil {
		return err
	}
	out := printer{w: os.Stdout, asJSON: *asJSON, style: tableStyle{wide: *wide, colour: isTerminal(os.Stdout) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"}}
	ctx := context.Background()
	if waits || *watch {
		p, h, err := t.one(ctx, waits)
		if err != nil {
			return err
		}
		if waits {
			return waitFor(ctx, p, h, *wait, ports, out)
		}
		return watchStatus(p, h, out)
	}
	debug.SetGCPercent(-1) // it is over before garbage would matter
	if t.host != nil {
		r, err := inspect(ctx, pathsFor(t.dir, t.host.String()), t.host)
		if err != nil {
			return err
		}
		return out.report(r)
	}
	found, broken, err := inspectAll(ctx, t.dir)
	if err != nil {
		return err
	}
	for _, b := range broken {
		fmt.Fprintf(os.Stderr, "Warning: %v\n", b)
	}
	mute := firstMute(broken)
	if len(found) == 0 && mute == nil {
		return &errNotRunning{"No running instance found. Start one with: rdhpf run -host ssh://user@host"}
	}
	anyRuns := false
	for i, r := range found {
		if !*asJSON {
			if i > 0 {
				fmt.Fprintln(out.w)
			}
			fmt.Fprintf(out.w, "%s\n", r.Host)
		}
		anyRuns = out.report(r) == nil || anyRuns
	}
	switch {
	case anyRuns:
		return nil
	case mute != nil:
		return errUnhealthy
	}
	return &errNotRunning{}
}

// firstMute returns the first that concerns a live instance.
func firstMute(broken []error) error {
	for _, err := range broken {
		if errors.As(err, new(errMute)) {
			return err
		}
	}
	return nil
}

// printer prints reports.
type printer struct {
	w      io.Writer
	asJSON bool
	style  tableStyle
}

// report prints r, and returns errNotRunning, with nothing to add, where what it
// shows is left by a dead instance.
func (p printer) report(r *report) error {
	for _, warning := range r.warnings {
		fmt.Fprintf(os.Stderr, "Warning: %s\n", warning)
	}
	if err := p.print(r); err != nil {
		return fmt.Errorf("printing the status: %w", err)
	}
	if !r.Running {
		return &errNotRunning{}
	}
	return nil
}

func (p printer) print(r *report) error {
	var b strings.Builder
	if p.asJSON {
		b.Write(mustJSON(r))
		b.WriteByte('\n')
	} else {
		printTable(&b, r, time.Now(), p.style)
	}
	_, err := io.WriteString(p.w, b.String())
	return err
}

// isTerminal says whether f is one: only those have a size.
func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	return err == nil
}

// one returns the instance meant where a command is for one only. A command that
// waits takes a host whose instance is yet to start, too.
func (t target) one(ctx context.Context, waits bool) (paths, *host, error) {
	if t.host != nil {
		return pathsFor(t.dir, t.host.String()), t.host, nil
	}
	found, broken, err := inspectAll(ctx, t.dir)
	if err != nil {
		return paths{}, nil, err
	}
	var running []string
	for _, r := range found {
		if r.Running {
			running = append(running, r.Host)
		}
	}
	switch {
	case len(running) == 1:
		return pathsFor(t.dir, running[0]), nil, nil
	case len(running) > 1:
		return paths{}, nil, fmt.Errorf("several instances are running: choose one with -host (%s)", strings.Join(running, ", "))
	case firstMute(broken) != nil:
		return paths{}, nil, firstMute(broken)
	case waits:
		return paths{}, nil, errors.New("no instance is running yet: say which one to wait for with -host")
	}
	return paths{}, nil, &errNotRunning{"No running instance found. Start one with: rdhpf run -host ssh://user@host"}
}

// tellCommand is health, pause, resume, reload or stop.
func tellCommand(method string, args []string) error {
	f := flag.NewFlagSet(method, flag.ContinueOnError)
	hostFlag := f.String("host", "", "remote Docker `host` (default: what docker would take, else the one instance that runs)")
	asJSON := f.Bool("json", false, "print the answer as JSON")
	if err := parseFlags(f, args); err != nil {
		return err
	}
	t, err := findTarget(*hostFlag)
	if err != nil {
		return err
	}
	p, _, err := t.one(context.Background(), false)
	if err != nil {
		return err
	}
	pid, held, err := lockedBy(p.lock)
	if err != nil {
		return err
	}
	if !held {
		if t.host == nil {
			return &errNotRunning{"No running instance found."}
		}
		return notFound(t.host.String())
	}
	var answer json.RawMessage
	if err := call(p.socket, method, &answer); err != nil {
		return fmt.Errorf("%s by rdhpf (pid %d): %w", method, pid, err)
	}
	if method == "stop" {
		if err := awaitEnd(p.lock, pid); err != nil {
			return err
		}
	}
	var h health
	if method == "health" {
		if err := json.Unmarshal(answer, &h); err != nil {
			return fmt.Errorf("reading the answer: %w", err)
		}
	}
	switch {
	case *asJSON:
		fmt.Println(string(answer))
	case method == "health":
		printHealth(os.Stdout, &h, time.Now())
	default:
		fmt.Println(map[string]string{"pause": "paused: all local ports are closed", "resume": "resumed",
			"reload": "configuration read again", "stop": "stopped"}[method])
	}
	if method == "health" && h.Status != "ok" {
		return errUnhealthy
	}
	return nil
}

// awaitEnd waits until pid has let go of the lock.
func awaitEnd(lock string, pid int) error {
	const patience = 10 * time.Second
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if now, held, err := lockedBy(lock); err != nil {
			return err
		} else if !held || now != pid {
			return nil
		}
	}
	return fmt.Errorf("rdhpf (pid %d) is still there after %v: kill it", pid, patience)
}
