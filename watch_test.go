package main

// Tests of rdhpf status -wait and -watch.

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestMissingPorts(t *testing.T) {
	up := func(change func(*report)) *report {
		r := &report{snapshot: tableSnapshot(), Source: "socket", Running: true}
		change(r)
		return r
	}
	const db = "127.0.0.1:5432 is conflict (port already in use after 5 retry attempts (held by postgres, pid 4242))"
	for _, c := range []struct {
		name   string
		report *report
		ports  []uint16
		want   string
	}{
		{"all", up(func(*report) {}), nil, db + "; 127.0.0.1:3000 is pending (port not responding)"},
		{"active ones", up(func(*report) {}), []uint16{8080}, ""},
		{"some", up(func(*report) {}), []uint16{8080, 5432, 9999}, db + "; no container publishes 9999"},
		{"none published", up(func(r *report) { r.Forwards = nil }), nil, ""},
		{"none published of those", up(func(r *report) { r.Forwards = nil }), []uint16{80}, "no container publishes 80"},
		{"all active", up(func(r *report) { r.Forwards = r.Forwards[:1] }), nil, ""},
		{"two of one port, one active", up(func(r *report) { r.Forwards[1].LocalPort = 8080 }), []uint16{8080}, ""},
		{"two of one port, the other active", up(func(r *report) {
			r.Forwards[0], r.Forwards[1] = r.Forwards[1], r.Forwards[0]
			r.Forwards[0].LocalPort = 8080
		}), []uint16{8080}, ""},
		{"not connected yet", up(func(r *report) { r.Connection, r.Forwards = connection{State: connecting}, nil }), nil,
			"the connection to the remote host is not up"},
		{"reconnecting", up(func(r *report) {
			r.Connection = connection{State: reconnecting, LastError: "ssh: gone"}
			r.Forwards = r.Forwards[2:]
			r.Forwards[0].Reason = reasonLost
		}), []uint16{3000}, "the connection to the remote host is not up: ssh: gone; 127.0.0.1:3000 is pending (ssh connection lost, reconnecting)"},
		{"dead", up(func(r *report) { r.Running, r.Stale = false, true }), []uint16{8080}, "no instance is running"},
		{"stale", up(func(r *report) { r.Stale = true }), []uint16{8080}, "the instance does not answer"},
	} {
		if got := strings.Join(missingPorts(c.report, c.ports), "; "); got != c.want {
			t.Errorf("%s:\n got %s\nwant %s", c.name, got, c.want)
		}
	}
}

func TestStatusWait(t *testing.T) {
	begin := func(t *testing.T, dir string, args ...string) (end func() answer) {
		t.Helper()
		done := make(chan answer, 1)
		cmd := program(dir, append([]string{"status", "-host", testHost}, args...)...)
		go func() { done <- runProgram(t, cmd) }()
		return func() answer {
			t.Helper()
			select {
			case a := <-done:
				return a
			case <-time.After(2 * patience):
				t.Fatal("it does not end")
				panic("unreachable")
			}
		}
	}
	t.Run("until it starts and is active", func(t *testing.T) {
		for _, args := range [][]string{{"-wait", "25s"}, {"-wait", "25s", "8080"}, {"-wait", "25s", "-json", "8080"}} {
			dir := stateFolder(t)
			end := begin(t, dir, args...)
			i := startInstanceWith(t, dir, testHost, tableForwards(pending, reasonSilent))
			i.post(tableForwards(conflict, reasonGivenUp))
			i.post(tableForwards(active, ""))
			a := end()
			if args[len(args)-2] == "-json" {
				r := a.trust(t, 0, "socket", true, false)
				if len(r.Forwards) != 1 || r.Forwards[0].Status != active {
					t.Errorf("it says %+v", r)
				}
			} else {
				a.is(t, 0, tableActive, "")
			}
			i.kill()
		}
	})
	t.Run("active already", func(t *testing.T) {
		dir := stateFolder(t)
		i := startInstance(t, dir, testHost)
		rdhpf(t, dir, "status", "-wait", "25s").is(t, 0, tableActive, "")
		// Without a socket the file tells.
		if err := os.Remove(i.paths().socket); err != nil {
			t.Fatal(err)
		}
		rdhpf(t, dir, "status", "-wait", "25s", "8080").is(t, 0, tableActive, "")
	})
	t.Run("in vain", func(t *testing.T) {
		live, dead, empty := stateFolder(t), stateFolder(t), stateFolder(t)
		startInstanceWith(t, live, testHost, tableForwards(pending, reasonSilent))
		startInstance(t, dead, testHost).kill()
		ends := []func() answer{begin(t, live, "-wait", "5s", "8080", "9090"), begin(t, dead, "-wait", "5s"), begin(t, empty, "-wait", "5s", "8080")}
		for n, want := range []string{`127\.0\.0\.1:8080 is pending \(port not responding\); no container publishes 9090`,
			"no instance is running", `No running instance found for ssh://me@box\.invalid\. .*`} {
			ends[n]().is(t, 1, "", `rdhpf: after 5s: `+want+`\n`)
		}
	})
	t.Run("for no host", func(t *testing.T) {
		rdhpf(t, stateFolder(t), "status", "-wait", "1s").is(t, 1, "", `rdhpf: no instance is running yet: say which one to wait for with -host\n`)
	})
}

// watcher is a status -watch whose stdout is no terminal.
type watcher struct {
	t      *testing.T
	cmd    *exec.Cmd
	lines  chan string // of stdout
	stderr chan string
	ended  bool
}

func watchProgram(t *testing.T, dir string, args ...string) *watcher {
	t.Helper()
	w := &watcher{t: t, cmd: program(dir, append([]string{"status", "-watch"}, args...)...), lines: make(chan string, 1000), stderr: make(chan string, 1000)}
	out, err := w.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	errs, err := w.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := w.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	read := func(r io.Reader, lines chan<- string) {
		defer close(lines)
		for s := bufio.NewScanner(r); s.Scan(); {
			lines <- s.Text()
		}
	}
	go read(out, w.lines)
	go read(errs, w.stderr)
	t.Cleanup(func() {
		if !w.ended {
			w.cmd.Process.Kill()
			w.rest()
		}
	})
	return w
}

// rest is what it says until it ends.
func (w *watcher) rest() (stdout, stderr []string) {
	w.ended = true
	for line := range w.lines {
		stdout = append(stdout, line)
	}
	for line := range w.stderr {
		stderr = append(stderr, line)
	}
	w.cmd.Wait()
	return stdout, stderr
}

// line is the next line of stdout or stderr.
func (w *watcher) line(of <-chan string) string {
	w.t.Helper()
	select {
	case line, ok := <-of:
		if !ok {
			w.t.Fatal("it ended")
		}
		return line
	case <-time.After(patience):
		w.t.Fatal("no line comes")
	}
	return ""
}

// interrupt ends it; nothing more may be printed.
func (w *watcher) interrupt(sig syscall.Signal) {
	w.t.Helper()
	if err := w.cmd.Process.Signal(sig); err != nil {
		w.t.Fatal(err)
	}
	stdout, stderr := w.rest()
	if len(stdout) > 0 || w.cmd.ProcessState.ExitCode() != 0 {
		w.t.Errorf("at the end %q, %q, %v", stdout, stderr, w.cmd.ProcessState)
	}
}

// awaitNone waits until it says that there is no instance.
func (w *watcher) awaitNone() {
	w.t.Helper()
	for !strings.Contains(w.line(w.stderr), "No running instance found for ") {
	}
}

func TestWatchJSON(t *testing.T) {
	dir := stateFolder(t)
	i := startInstanceWith(t, dir, testHost, tableForwards(pending, reasonProbing))
	w := watchProgram(t, dir, "-json", "-host", testHost)
	// A file is written meanwhile, every 2 s, which is no change.
	next := func(source string, running bool, status, reason string) {
		t.Helper()
		r := answer{stdout: w.line(w.lines)}.report(t)
		if r.Source != source || r.Running != running || r.Stale == running || len(r.Forwards) != 1 || r.Forwards[0].Status != status || r.Forwards[0].Reason != reason {
			t.Errorf("it says %+v; want %s, running %v, %s, %q", r, source, running, status, reason)
		}
	}
	next("socket", true, pending, reasonProbing)
	i.post(tableForwards(active, ""))
	next("socket", true, active, "")
	i.post(tableForwards(conflict, reasonGivenUp))
	next("socket", true, conflict, reasonGivenUp)
	eventually(t, "the file has the change", func() error {
		snap, _, err := readState(i.paths().state)
		if err == nil && snap.Forwards[0].Status != conflict {
			err = errors.New("it has not")
		}
		return err
	})
	i.kill()
	next("file", false, conflict, reasonGivenUp)
	i = startInstance(t, dir, testHost)
	for {
		r := answer{stdout: w.line(w.lines)}.report(t)
		if r.Source == "socket" && len(r.Forwards) == 1 && r.Forwards[0].Status == active {
			break
		}
	}
	i.end()
	w.awaitNone()
	i = startInstance(t, dir, testHost) // and comes back
	for {
		r := answer{stdout: w.line(w.lines)}.report(t)
		if r.Source == "socket" && r.PID == i.cmd.Process.Pid && len(r.Forwards) == 1 {
			break
		}
	}
	w.interrupt(syscall.SIGTERM)
}

func TestWatchText(t *testing.T) {
	dir := stateFolder(t)
	i := startInstance(t, dir, testHost)
	w := watchProgram(t, dir) // the one that runs
	block := func() string {
		t.Helper()
		var b strings.Builder
		for {
			line := w.line(w.lines)
			if line == "" {
				return b.String()
			}
			fmt.Fprintln(&b, line)
		}
	}
	answer{stdout: block()}.is(t, 0, tableActive, "")
	i.post(tableForwards(pending, "\x1b[31m"+reasonSilent))
	answer{stdout: block()}.is(t, 0, tableHead+`abc123def456 .* pending .* \[31mport not responding\n`, "")
	i.end()
	w.awaitNone()
	startInstance(t, dir, testHost)
	answer{stdout: block()}.is(t, 0, tableHead+`(abc123def456 .*active[^\n]*|Not connected: connecting for [^\n]*)\n`, "")
	w.cmd.Process.Kill()
	w.rest()
	rdhpf(t, stateFolder(t), "status", "-watch").is(t, 3, "", `No running instance found\. .*`)
}

// terminal is a shell in a tmux of its own.
type terminal struct {
	t      *testing.T
	socket string
}

func (m *terminal) tmux(args ...string) string {
	m.t.Helper()
	cmd := exec.Command("tmux", append([]string{"-S", m.socket, "-f", "/dev/null"}, args...)...)
	cmd.Env = append(cleanEnv(), "TERM=xterm-256color", "LC_ALL=C.UTF-8", "SHELL=/bin/sh")
	out, err := cmd.CombinedOutput()
	if err != nil {
		m.t.Fatalf("tmux %q: %v: %s", args, err, out)
	}
	return string(out)
}

func (m *terminal) screen() string {
	m.t.Helper()
	return strings.TrimRight(m.tmux("capture-pane", "-p"), "\n")
}

// shows waits until the screen is as ok wants it.
func (m *terminal) shows(what string, ok func(screen string) bool) string {
	m.t.Helper()
	var screen string
	eventually(m.t, what, func() error {
		if screen = m.screen(); !ok(screen) {
			return fmt.Errorf("the screen is\n%s", screen)
		}
		return nil
	})
	return screen
}

func (m *terminal) flag(name string) string {
	m.t.Helper()
	return strings.TrimSpace(m.tmux("display-message", "-p", "#{"+name+"}"))
}

func TestWatchScreen(t *testing.T) {
	needTool(t, "tmux")
	dir := stateFolder(t)
	i := startInstance(t, dir, testHost)
	script := "#!/bin/sh\nexec env -i PATH=\"$PATH\" TERM=xterm-256color HOME=/nonexistent RDHPF_TEST_MAIN=1 GORACE=atexit_sleep_ms=10 RDHPF_DIR='" +
		dir + "' '" + testExe + "' \"$@\"\n"
	if err := os.WriteFile(filepath.Join(dir, "rdhpf"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	m := &terminal{t, filepath.Join(dir, "tmux")}
	m.tmux("new-session", "-d", "-x", "100", "-y", "12", "cd '"+dir+"' && PS1='prompt> ' exec sh -i")
	t.Cleanup(func() { exec.Command("tmux", "-S", m.socket, "kill-server").Run() })
	m.shows("a prompt", func(s string) bool { return strings.HasPrefix(s, "prompt>") })
	m.tmux("send-keys", "echo earlier; echo work", "Enter")
	m.shows("earlier work", func(s string) bool { return strings.HasSuffix(s, "earlier\nwork\nprompt>") })
	watch := "./rdhpf status -watch; echo status=$?"
	m.tmux("send-keys", watch)
	before := m.shows("the command", func(s string) bool { return strings.HasSuffix(s, watch) })
	m.tmux("send-keys", "Enter")
	head := func(s string) bool {
		lines := strings.Split(s, "\n")
		return len(lines) > 3 && strings.HasPrefix(lines[0], testHost+"  ") && lines[1] == "" && strings.HasPrefix(lines[2], "CONTAINER ID") &&
			strings.HasPrefix(lines[3], "----")
	}
	first := m.shows("a screen of its own", func(s string) bool {
		return head(s) && strings.Contains(s, "active") && !strings.Contains(s, "earlier")
	})
	if alternate, cursor := m.flag("alternate_on"), m.flag("cursor_flag"); alternate != "1" || cursor != "0" {
		t.Errorf("alternate screen %s, cursor %s", alternate, cursor)
	}
	if coloured := m.tmux("capture-pane", "-p", "-e"); !strings.Contains(coloured, "\x1b[32mactive\x1b[39m") {
		t.Errorf("no green in %q", coloured)
	}
	m.shows("the time goes on", func(s string) bool { return head(s) && s != first })
	i.post(tableForwards(pending, "port not responding"))
	m.shows("the change", func(s string) bool {
		return head(s) && strings.Contains(s, "port not responding") && !strings.Contains(s, "active")
	})
	i.post(tableForwards(conflict, ""))
	m.shows("the shorter line is all of it", func(s string) bool {
		return head(s) && strings.Contains(s, "conflict") && !strings.Contains(s, "responding")
	})
	var many []string
	for n := range 40 {
		many = append(many, fmt.Sprintf(`{"container_id": "%012d", "status": "pending", "local_port": %d, "reason": "n%d"}`, n, 1000+n, n))
	}
	i.post(`{"connection": {"state": "connected"}, "forwards": [` + strings.Join(many, ",") + `]}`)
	m.shows("as much as there is room for", func(s string) bool {
		return head(s) && strings.Contains(s, " n6\n") && strings.HasSuffix(s, "\n…")
	})
	// Longer than the screen is wide: the first lines stay in sight.
	i.post(`{"connection": {"state": "connected"}, "forwards": [` + strings.ReplaceAll(strings.Join(many[:8], ","), `"reason": "`, `"reason": "`+strings.Repeat("long ", 40)) + `]}`)
	m.shows("long lines", func(s string) bool { return head(s) && strings.Contains(s, "long long") })
	m.tmux("resize-window", "-x", "60", "-y", "8")
	m.shows("a smaller screen", head)
	m.tmux("resize-window", "-x", "100", "-y", "12")
	i.end()
	m.shows("that there is none", func(s string) bool { return strings.HasPrefix(s, "No running instance found") })
	m.tmux("send-keys", "C-c")
	after := m.shows("the screen as it was", func(s string) bool { return strings.HasSuffix(s, "status=0\nprompt>") })
	if got := strings.TrimSuffix(strings.ReplaceAll(after, "^C", ""), "\nstatus=0\nprompt>"); strings.TrimRight(got, "\n") != before {
		t.Errorf("before\n%s\n-- after\n%s", before, after)
	}
	if alternate, cursor := m.flag("alternate_on"), m.flag("cursor_flag"); alternate != "0" || cursor != "1" {
		t.Errorf("after it: alternate screen %s, cursor %s", alternate, cursor)
	}
}
