package main

// Asking a running instance over its socket, once or as a subscriber; and the commands that ask it once: health, pause,
// resume, reload and stop.

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
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	signOfLife = 2 * time.Second  // for an instance to answer anything at all
	askEvery   = 2 * time.Second  // for a sign of life of an instance that has no change to report
	endTimeout = 10 * time.Second // for an instance to end
)

var (
	// errSilent: something has the socket and does not answer.
	errSilent = errors.New("no answer (stopped?)")
	// errForeign: what answers on the socket is not this version's protocol.
	errForeign = errors.New("an rdhpf of another version has the socket")
	// errUnhealthy ends the program with 1 when everything there is to say has been printed.
	errUnhealthy = errors.New("not healthy")
)

// refusal is an error that the instance answered.
type refusal string

func (text refusal) Error() string { return string(text) }

// dialInstance connects to a running instance. In a directory that others can write to it could be anybody's.
func dialInstance(path string) (*net.UnixConn, error) {
	if err := checkDir(filepath.Dir(path)); err != nil {
		return nil, err
	}
	conn, err := net.DialTimeout("unix", path, signOfLife)
	if errors.Is(err, syscall.EAGAIN) { // its backlog is full: it accepts no connections
		return nil, errSilent
	} else if err != nil {
		return nil, err
	}
	return conn.(*net.UnixConn), nil
}

// call asks a running instance and decodes its answer into result.
func call(path, method string, result any) error {
	return callContext(context.Background(), path, method, result)
}

func callContext(ctx context.Context, path, method string, result any) error {
	conn, err := dialInstance(path)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	conn.SetDeadline(time.Now().Add(signOfLife))
	in := bufio.NewReader(io.LimitReader(conn, maxStateFile))
	if method != "status" {
		// What takes long is preceded by what is answered at once, even if only by "Method not found".
		if _, err := fmt.Fprintln(conn, `{"method":"ping"}`); err != nil {
			return err
		}
		if err := readReply(in, new(json.RawMessage)); err != nil && !errors.As(err, new(refusal)) {
			return err
		}
		conn.SetDeadline(time.Now().Add(signOfLife + callTimeout))
	}
	if _, err := fmt.Fprintf(conn, `{"method":%q,"params":{}}`+"\n", method); err != nil {
		return err
	}
	return readReply(in, result)
}

// readReply reads one answer in the plain form into result, a pointer.
func readReply(in *bufio.Reader, result any) error {
	line, err := in.ReadBytes('\n')
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return errSilent
	} else if err != nil {
		return fmt.Errorf("reading the answer: %w", err)
	}
	var reply struct {
		Result json.RawMessage `json:"result"`
		Error  *string         `json:"error"`
	}
	if err := json.Unmarshal(line, &reply); err != nil {
		return fmt.Errorf("reading the answer: %w", err)
	}
	switch {
	case reply.Error != nil:
		return refusal(printable(*reply.Error, 1000))
	case reply.Result == nil:
		return errForeign
	}
	return json.Unmarshal(reply.Result, result)
}

// subscribe passes on every status that the instance sends until it ends or falls silent, and returns why no more come.
func subscribe(ctx context.Context, path string, take func(*snapshot)) error {
	conn, err := dialInstance(path)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if _, err := fmt.Fprintln(conn, `{"method":"subscribe"}`); err != nil {
		return err
	}
	go func() {
		tick := time.NewTicker(askEvery)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				fmt.Fprintln(conn, `{"method":"status"}`)
			}
		}
	}()
	in := bufio.NewReader(conn)
	for wait := signOfLife; ; wait = askEvery + signOfLife {
		conn.SetReadDeadline(time.Now().Add(wait))
		snap := &snapshot{}
		if err := readReply(in, snap); err != nil {
			return err
		}
		snap.clean()
		take(snap)
	}
}

// target says which instance a command is about: that of host, or any if host is nil.
type target struct {
	dir  string
	host *host
}

// findTarget finds the host as run does. Only if none is named at all is a command about any instance.
func findTarget(hostFlag string) (target, error) {
	home, _ := os.UserHomeDir()
	dir, err := stateDir(os.Getenv, home)
	if err != nil {
		return target{}, err
	}
	h, err := findHost(hostFlag, dir, home)
	if errors.Is(err, errNoHost) {
		return target{dir: dir}, nil
	} else if err != nil {
		return target{}, err
	}
	return target{dir, &h}, nil
}

// findHost finds the host that a flag or else Docker's environment and configuration name. An instance's socket for the
// engine, there or in a context, means that instance's host.
func findHost(hostFlag, dir, home string) (host, error) {
	h, err := resolveHost(hostFlag, os.Getenv, home)
	var other *errNotSSH
	if hostFlag != "" && err != nil {
		err = usageError{err}
	} else if errors.As(err, &other) {
		path, isUnix := strings.CutPrefix(other.value, "unix://")
		base, isOurs := strings.CutSuffix(filepath.Clean(path), ".docker.sock")
		if isUnix && isOurs && filepath.Dir(base) == filepath.Clean(dir) {
			return hostServedAt(other.source, pathsAt(dir, base))
		}
	}
	return h, err
}

// hostServedAt returns the host of the instance whose files are at p, which its state file or else the instance tells.
// Source is what names its socket.
func hostServedAt(source string, p paths) (host, error) {
	snap, _, err := readState(p.state)
	if err != nil {
		snap = &snapshot{}
		err = call(p.socket, "status", snap)
	}
	var h host
	if err == nil {
		h, err = parseHost(snap.Host)
	}
	if err == nil && pathsFor(p.dir, h.String()) != p {
		err = fmt.Errorf("that of %s has another path", h)
	}
	if err != nil {
		return host{}, &errNotRunning{fmt.Sprintf("%s is %s, the socket of no known instance: use -host (%v)", source, printable(p.docker, 1000), err)}
	}
	return h, nil
}

// one returns the files of the instance meant by a command that is about only one. With waits, the instance of a host
// that is named need not have started.
func (t target) one(ctx context.Context, waits bool) (paths, error) {
	if t.host != nil {
		return pathsFor(t.dir, t.host.String()), nil
	}
	all, err := instances(t.dir)
	if err != nil {
		return paths{}, err
	}
	var live []paths
	for _, p := range all {
		if _, held, err := lockedBy(p.lock); err != nil {
			return paths{}, err
		} else if held {
			live = append(live, p)
		}
	}
	switch {
	case len(live) == 1:
		return live[0], nil
	case len(live) > 1:
		var hosts []string
		for _, p := range live {
			if r, err := inspect(ctx, p, nil); err == nil && r != nil {
				hosts = append(hosts, r.Host)
			}
		}
		return paths{}, fmt.Errorf("several instances are running: choose one with -host (%s)", strings.Join(hosts, ", "))
	case waits:
		return paths{}, errors.New("no instance is running yet: name the one to wait for with -host")
	}
	return paths{}, &errNotRunning{noInstance}
}

// tellCommand is health, pause, resume, reload or stop.
func tellCommand(method string, args []string) error {
	f := flag.NewFlagSet(method, flag.ContinueOnError)
	hostFlag := f.String("host", "", "remote Docker `host` (default: the one docker uses, else that of the only running instance)")
	asJSON := f.Bool("json", false, "print the answer as JSON")
	if err := parseFlags(f, args); err != nil {
		return err
	}
	t, err := findTarget(*hostFlag)
	if err != nil {
		return err
	}
	answer, err := t.tell(method)
	if err != nil {
		return err
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
			"reload": "configuration reloaded", "stop": "stopped"}[method])
	}
	if method == "health" && h.Status != "ok" {
		return errUnhealthy
	}
	return nil
}

// tell asks the one instance meant, and after a stop waits for its end.
func (t target) tell(method string) (answer json.RawMessage, err error) {
	p, err := t.one(context.Background(), false)
	if err != nil {
		return nil, err
	}
	if err := checkDir(p.dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	pid, held, err := lockedBy(p.lock)
	if err != nil {
		return nil, err
	}
	if !held {
		if err := checkForeign(p); err != nil {
			return nil, err
		}
		if t.host == nil {
			return nil, &errNotRunning{noInstance}
		}
		return nil, notFound(t.host.String())
	}
	if err := call(p.socket, method, &answer); errors.As(err, new(refusal)) {
		return nil, err
	} else if err != nil {
		return nil, unanswered(pid, err)
	}
	if method == "stop" {
		return answer, awaitEnd(p.lock, pid)
	}
	return answer, nil
}

// checkForeign returns an error if an instance of another version runs.
func checkForeign(p paths) error {
	if !errors.Is(call(p.socket, "ping", new(json.RawMessage)), errForeign) {
		return nil
	}
	return foreign(p)
}

// foreign says that an instance of another version runs, with what its state file tells.
func foreign(p paths) error {
	who := ""
	var old struct{ PID int }
	if body, err := os.ReadFile(p.state); err == nil && json.Unmarshal(body, &old) == nil && old.PID > 0 {
		who = fmt.Sprintf(" (pid %d)", old.PID)
	}
	return fmt.Errorf("an rdhpf of another version%s is running for this host: stop it as that version says, or by a signal", who)
}

// unanswered says that a live instance could not be asked, and why.
func unanswered(pid int, err error) error {
	if errors.Is(err, errSilent) {
		return fmt.Errorf("rdhpf (pid %d) is running but does not answer (stopped?)", pid)
	}
	return fmt.Errorf("rdhpf (pid %d) is running but cannot be asked: %w", pid, err)
}

// awaitEnd waits until the process has released the lock.
func awaitEnd(lock string, pid int) error {
	for end := time.Now().Add(endTimeout); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if now, held, err := lockedBy(lock); err != nil {
			return err
		} else if !held || now != pid {
			return nil
		}
	}
	return fmt.Errorf("rdhpf (pid %d) is still running after %v: kill it", pid, endTimeout)
}
