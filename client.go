package main

// Asking a running instance over its socket, once or as a subscriber; and the commands that ask it once: health, pause,
// resume, reload, stop, port and completion.

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
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
	errSilent = errors.New("no answer")
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
		return nil, silence(err)
	}
	return conn.(*net.UnixConn), nil
}

// silence returns errSilent for the end of a wait.
func silence(err error) error {
	if os.IsTimeout(err) {
		return errSilent
	}
	return err
}

// call asks a running instance and decodes its answer into result.
func call[T any](path, method string, result *T) error {
	return callContext(context.Background(), path, method, result)
}

func callContext[T any](ctx context.Context, path, method string, result *T) error {
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
			return silence(err)
		}
		if err := readReply(in, new(json.RawMessage)); err != nil && !errors.As(err, new(refusal)) {
			return err
		}
		conn.SetDeadline(time.Now().Add(signOfLife + callTimeout))
	}
	if _, err := fmt.Fprintf(conn, `{"method":%q,"params":{}}`+"\n", method); err != nil {
		return silence(err)
	}
	return readReply(in, result)
}

// readReply reads one answer in the plain form.
func readReply[T any](in *bufio.Reader, result *T) error {
	line, err := in.ReadBytes('\n')
	if os.IsTimeout(err) {
		return errSilent
	} else if err != nil {
		return fmt.Errorf("reading the answer: %w", err)
	}
	var reply struct {
		Result *T      `json:"result"`
		Error  *string `json:"error"`
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
	*result = *reply.Result
	return nil
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
		if err = call(p.socket, "status", snap); errors.Is(err, errSilent) {
			pid, _, _ := lockedBy(p.lock)
			err = errors.New(mute(pid))
		}
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

const hostOfOne = "`HOST` the instance's host (default: docker's, else the only one)"

// tellCommand is health, pause, resume, reload or stop.
func tellCommand(f *flag.FlagSet) func(args, after []string) error {
	hostFlag := f.String("host", "", hostOfOne)
	asJSON := f.Bool("json", false, "print the answer as JSON")
	return func([]string, []string) error { return tell(f.Name(), *hostFlag, *asJSON) }
}

func tell(method, hostFlag string, asJSON bool) error {
	t, err := findTarget(hostFlag)
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
	case asJSON:
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

// mute says that a live instance does not answer, and what may help. pid is 0 if unknown.
func mute(pid int) string {
	if pid <= 0 {
		return "rdhpf does not answer and may be stopped"
	}
	return fmt.Sprintf("rdhpf (pid %d) does not answer and may be stopped: kill -CONT %d continues it", pid, pid)
}

// unanswered says that a live instance could not be asked, and why.
func unanswered(pid int, err error) error {
	if errors.Is(err, errSilent) {
		return errors.New(mute(pid))
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

// portCommand prints where ports of a container or compose service are on this machine.
func portCommand(f *flag.FlagSet) func(args, after []string) error {
	hostFlag := f.String("host", "", hostOfOne)
	return func(args, after []string) error {
		args = append(args, after...)
		switch {
		case len(args) == 0 || args[0] == "":
			return usageError{errors.New("no container given: rdhpf port NAME [PORT]; see rdhpf status -wide for names")}
		case len(args) > 2:
			return usageError{unexpected("port", args[2])}
		}
		private, proto := uint16(0), ""
		if len(args) == 2 {
			var err error
			number, kind, _ := strings.Cut(args[1], "/")
			if private, err = parsePort(number); err != nil {
				return usageError{err}
			}
			proto = cmp.Or(kind, "tcp")
		}
		t, err := findTarget(*hostFlag)
		if err != nil {
			return err
		}
		snap, err := t.snapshot()
		if err != nil {
			return err
		}
		lines, err := localPorts(snap, args[0], private, proto)
		fmt.Print(strings.Join(lines, ""))
		return err
	}
}

// snapshot returns the state of the one instance meant.
func (t target) snapshot() (*snapshot, error) {
	p, err := t.one(context.Background(), false)
	if err != nil {
		return nil, err
	}
	r, err := inspect(context.Background(), p, nil)
	switch {
	case err != nil:
		return nil, err
	case r == nil && t.host == nil:
		return nil, &errNotRunning{noInstance}
	case r == nil || !r.Running:
		return nil, notFound(cmp.Or(t.host, &host{}).String())
	case r.Stale:
		return nil, errors.New(mute(r.PID))
	}
	return r.snapshot, nil
}

// localPorts returns the local addresses of the ports of a container or compose service, or
// of one of them, as lines. The name may also be the beginning of an id. A port in conflict
// is an error, since what answers there is something else.
func localPorts(snap *snapshot, name string, private uint16, proto string) (lines []string, err error) {
	var names []string
	is := func(by func(f *forwardInfo) bool) (found []*forwardInfo) {
		for i := range snap.Forwards {
			if f := &snap.Forwards[i]; by(f) {
				found = append(found, f)
			}
		}
		return found
	}
	found := is(func(f *forwardInfo) bool {
		names = append(names, f.ContainerName, f.Service)
		return f.ContainerName == name
	})
	if len(found) == 0 {
		found = is(func(f *forwardInfo) bool { return f.Service == name })
	}
	if len(found) == 0 && len(name) >= 4 {
		found = is(func(f *forwardInfo) bool {
			return strings.HasPrefix(f.ContainerID, name) || strings.HasPrefix(name, f.ContainerID)
		})
	}
	for _, s := range snap.Skipped {
		names = append(names, s.Name)
		if s.Name == name && len(found) == 0 || s.Name == name && s.Port == private && s.Protocol == proto {
			return nil, fmt.Errorf("%s is not forwarded: %s", skippedName(s), s.Reason)
		}
	}
	if len(found) == 0 {
		names = slices.DeleteFunc(names, func(s string) bool { return s == "" })
		slices.Sort(names)
		return nil, fmt.Errorf("no container or service %q publishes a port: %s", name,
			didYouMean(name, slices.Compact(names), "see rdhpf status -wide"))
	}
	var wrong error
	for _, f := range found {
		switch {
		case private != 0 && (f.ContainerPort != private || proto != "tcp"):
		case f.Status == conflict:
			wrong = errors.Join(wrong, errors.New(whyNot(f)))
		case private != 0:
			lines = append(lines, f.local()+"\n")
		default:
			lines = append(lines, fmt.Sprintf("%d/tcp -> %s\n", f.ContainerPort, f.local()))
		}
	}
	if len(lines) == 0 && wrong == nil {
		var has []string
		for _, f := range found {
			has = append(has, strconv.Itoa(int(f.ContainerPort)))
		}
		return nil, fmt.Errorf("%s does not publish port %d/%s: it publishes %s", name, private, proto, strings.Join(has, ", "))
	}
	return lines, wrong
}

// completeCommand is hidden: the scripts of rdhpf completion call it.
const completeCommand = "__complete"

// complete prints what may stand in place of the last of the words after rdhpf, with what it
// is after a tab.
func complete(w io.Writer, words []string) error {
	for _, c := range completions(words) {
		if text, _, _ := strings.Cut(c, "\t"); strings.HasPrefix(text, words[len(words)-1]) {
			if _, err := fmt.Fprintln(w, c); err != nil {
				return err
			}
		}
	}
	return nil
}

func completions(words []string) (all []string) {
	last := len(words) - 1
	if last < 0 || slices.Contains(words[:last], "--") { // what follows is another program's
		return nil
	}
	if last == 0 || last == 1 && words[0] == "help" {
		for _, c := range commands() {
			all = append(all, c.name+"\t"+c.does)
		}
		return all
	}
	c, ok := findCommand(words[0])
	if !ok {
		return nil
	}
	f := flag.NewFlagSet(c.name, flag.ContinueOnError)
	c.setup(f)
	var args []string
	hostFlag, flagOf := "", func(word string) *flag.Flag { return f.Lookup(strings.TrimLeft(word, "-")) }
	takesValue := func(fl *flag.Flag) bool {
		value, _ := describe(fl)
		return value != ""
	}
	for i := 1; i < last; i++ {
		fl := flagOf(words[i])
		switch {
		case !strings.HasPrefix(words[i], "-"):
			args = append(args, words[i])
		case fl == nil || !takesValue(fl):
		case i+1 == last:
			return valuesOf(fl.Name)
		default:
			if i++; fl.Name == "host" {
				hostFlag = words[i]
			}
		}
	}
	if strings.HasPrefix(words[last], "-") {
		f.VisitAll(func(fl *flag.Flag) {
			_, about := describe(fl)
			all = append(all, "-"+fl.Name+"\t"+about)
		})
		return all
	}
	switch {
	case c.name == "run" && len(args) == 0:
		return valuesOf("host")
	case c.name == "completion" && len(args) == 0:
		return strings.Split(c.args, "|")
	case c.name == "port" || c.name == "status":
		t, err := findTarget(hostFlag)
		if err != nil {
			return nil
		}
		if snap, err := t.snapshot(); err == nil {
			return completePorts(snap, c.name, args)
		}
	}
	return all
}

// completePorts returns the names for port and then the ports of the one named, or the local
// ports for status.
func completePorts(snap *snapshot, command string, args []string) (all []string) {
	for i := range snap.Forwards {
		switch f := &snap.Forwards[i]; {
		case command == "status":
			all = append(all, fmt.Sprintf("%d\t%s", f.LocalPort, f.ContainerName))
		case len(args) == 0:
			all = append(all, f.ContainerName+"\t"+f.Image)
			if f.Service != "" {
				all = append(all, f.Service+"\tservice")
			}
		case len(args) == 1 && (args[0] == f.ContainerName || args[0] == f.Service):
			all = append(all, fmt.Sprintf("%d\t%s", f.ContainerPort, f.local()))
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// valuesOf returns what may be the value of a flag.
func valuesOf(name string) []string {
	switch name {
	case "host":
		home, _ := os.UserHomeDir()
		hosts := sshHosts(filepath.Join(home, ".ssh", "config"), filepath.Join(home, ".ssh"), 0)
		if dir, err := stateDir(os.Getenv, home); err == nil {
			all, _ := instances(dir)
			for _, p := range all {
				if snap, _, err := readState(p.state); err == nil {
					hosts = append(hosts, snap.Host)
				}
			}
		}
		slices.Sort(hosts)
		return slices.Compact(hosts)
	case "shell":
		return []string{"sh", "bash", "zsh", "fish"}
	case "log-level":
		return []string{"debug", "info", "warn", "error"}
	case "log-format":
		return []string{"text", "json"}
	case "wait":
		return []string{"30s", "1m"}
	}
	return nil
}

// sshHosts returns the hosts that an ssh_config names, and those of the files it includes.
func sshHosts(path, dir string, depth int) (hosts []string) {
	body, err := os.ReadFile(path)
	if err != nil || depth > 8 {
		return nil
	}
	for line := range strings.Lines(string(body)) {
		words := strings.Fields(strings.Replace(line, "=", " ", 1))
		if len(words) < 2 {
			continue
		}
		switch strings.ToLower(words[0]) {
		case "host":
			for _, word := range words[1:] {
				if word = strings.Trim(word, `"`); !strings.ContainsAny(word, "*?!") && badChar(word, ".-_") == "" {
					hosts = append(hosts, word)
				}
			}
		case "include":
			for _, pattern := range words[1:] {
				pattern = strings.Trim(pattern, `"`)
				if rest, ok := strings.CutPrefix(pattern, "~/"); ok {
					pattern = filepath.Join(filepath.Dir(dir), rest)
				} else if !filepath.IsAbs(pattern) {
					pattern = filepath.Join(dir, pattern)
				}
				files, _ := filepath.Glob(pattern)
				for _, file := range files {
					hosts = append(hosts, sshHosts(file, dir, depth+1)...)
				}
			}
		}
	}
	return hosts
}

// The scripts pass the words up to the cursor on to completeCommand.
var completionScripts = map[string]string{
	"bash": `_rdhpf() {
	local line=${COMP_LINE:0:COMP_POINT} words cur head IFS=$' \t\n'
	read -ra words <<<"$line"
	[[ $line == *[[:space:]] ]] && words+=("")
	cur=${words[${#words[@]}-1]}
	IFS=$'\n'
	COMPREPLY=($(rdhpf __complete "${words[@]:1}" 2>/dev/null | cut -f1))
	head=${cur%"${cur##*[:=]}"} # bash replaces only what follows these
	COMPREPLY=("${COMPREPLY[@]#"$head"}")
}
complete -o default -F _rdhpf rdhpf
`,
	"zsh": `#compdef rdhpf
_rdhpf() {
	local -a values shown
	local line
	for line in "${(@f)$(rdhpf __complete "${(@)words[2,CURRENT]}" 2>/dev/null)}"; do
		[[ -n $line ]] || continue
		values+=("${line%%$'\t'*}")
		shown+=("${line/$'\t'/  -- }")
	done
	if (( $#values )); then compadd -l -d shown -a values; else _files; fi
}
if [[ $funcstack[1] == _rdhpf ]]; then _rdhpf "$@"; else compdef _rdhpf rdhpf; fi
`,
	"fish": `complete -c rdhpf -n 'not contains -- -- (commandline -opc)' -f -a '(rdhpf __complete (commandline -opc)[2..] (commandline -ct) 2>/dev/null)'
`,
}

func completionCommand(*flag.FlagSet) func(args, after []string) error {
	return func(args, after []string) error {
		if args = append(args, after...); len(args) != 1 || completionScripts[args[0]] == "" {
			return usageError{errors.New("want one shell: rdhpf completion bash, zsh or fish")}
		}
		_, err := fmt.Print(completionScripts[args[0]])
		return err
	}
}
