package main

// Tests of rdhpf status as a process of its own: what it finds out from the
// socket, else the file, else lsof, and its exit statuses. The instances that it
// looks at have the lock, the socket and the file of one, and a state that the
// test posts.

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"
)

const (
	instanceEnv = "RDHPF_TEST_INSTANCE" // the host: be an instance for it, in RDHPF_DIR
	sshEnv      = "RDHPF_TEST_SSH"      // "hold" or "close": listen like an ssh -L
)

// testExe is this test binary.
var testExe, _ = os.Executable()

func init() {
	var err error
	switch {
	case os.Getenv(instanceEnv) != "":
		err = beInstance(os.Getenv(instanceEnv), os.Getenv("RDHPF_DIR"))
	case os.Getenv(sshEnv) != "":
		err = beSSH(os.Getenv(sshEnv) == "hold")
	default:
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// beInstance posts each line of stdin, a snapshot, until stdin ends or somebody
// says stop.
func beInstance(host, dir string) error {
	p := pathsFor(dir, host)
	lock, err := lockInstance(p.lock)
	if err != nil {
		return err
	}
	defer lock.Close()
	l, err := listenSocket(p.socket)
	if err != nil {
		return err
	}
	defer removeSocket(p.socket)
	now := utc(time.Now())
	shown := snapshot{Version: stateVersion, Host: host, PID: os.Getpid(), StartedAt: now,
		Connection: connection{State: connecting, Since: now}, Warnings: []string{}, Forwards: []forwardInfo{}, Skipped: []skippedPort{}}
	b := newBoard(&shown)
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan struct{}, 2)
	go func() {
		s := &server{board: b, stop: stop, ask: func(context.Context, string) (any, error) { return struct{}{}, nil }}
		s.serve(ctx, l)
		ended <- struct{}{}
	}()
	go func() {
		keepState(ctx, p.state, b, func(err error) { fmt.Fprintln(os.Stderr, err) })
		ended <- struct{}{}
	}()
	go func() {
		defer stop()
		for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
			snap := shown
			if err := json.Unmarshal(lines.Bytes(), &snap); err != nil {
				fmt.Fprintln(os.Stderr, err)
				return
			}
			b.post(&snap)
			fmt.Println("posted")
		}
	}()
	<-ended
	<-ended
	return nil
}

// instance is such a process.
type instance struct {
	t     *testing.T
	dir   string
	host  string
	cmd   *exec.Cmd
	stdin io.WriteCloser
	out   *bufio.Reader
	done  bool
}

// stateFolder is a new RDHPF_DIR.
func stateFolder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "rd") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// cleanEnv is the environment without what rdhpf looks at, and with more.
func cleanEnv(more ...string) (env []string) {
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "DOCKER_") && !strings.HasPrefix(e, "RDHPF_") && !strings.HasPrefix(e, "HOME=") {
			env = append(env, e)
		}
	}
	return append(append(env, "GORACE=atexit_sleep_ms=10", "HOME=/nonexistent"), more...)
}

// startInstance starts one that is connected and has one forward, on 8080.
func startInstance(t *testing.T, dir, host string) *instance {
	t.Helper()
	return startInstanceWith(t, dir, host, tableForwards(active, ""))
}

func startInstanceWith(t *testing.T, dir, host, line string) *instance {
	t.Helper()
	i := &instance{t: t, dir: dir, host: host, cmd: exec.Command(testExe)}
	i.cmd.Env = cleanEnv(instanceEnv+"="+host, "RDHPF_DIR="+dir)
	i.cmd.Stderr = os.Stderr
	var err error
	if i.stdin, err = i.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := i.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	i.out = bufio.NewReader(out)
	if err := i.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(i.kill)
	i.post(line)
	eventually(t, "the instance writes its file", func() error {
		snap, _, err := readState(i.paths().state)
		if err == nil && (snap.PID != i.cmd.Process.Pid || len(snap.Forwards) == 0) {
			err = errors.New("it is of an earlier one, or has no forward yet")
		}
		return err
	})
	return i
}

func (i *instance) paths() paths { return pathsFor(i.dir, i.host) }

// tableForwards is what a connected instance with one forward posts.
func tableForwards(status, reason string) string {
	created := time.Now().Add(-90 * time.Second).UTC()
	return fmt.Sprintf(`{"connection": {"state": "connected"}, "engine": "Docker/1", "forwards": [%s]}`,
		mustJSON(forwardInfo{ContainerID: "abc123def456", LocalPort: 8080, RemotePort: 8080, Status: status, Reason: reason,
			CreatedAt: created, UpdatedAt: created, LocalAddress: "127.0.0.1", RemoteAddress: "127.0.0.1", ContainerName: "web"}))
}

// post has the instance show what the line says, and waits until it does.
func (i *instance) post(line string) {
	i.t.Helper()
	if _, err := fmt.Fprintln(i.stdin, line); err != nil {
		i.t.Fatal(err)
	}
	if said, err := i.out.ReadString('\n'); said != "posted\n" {
		i.t.Fatalf("the instance says %q, %v", said, err)
	}
}

func (i *instance) signal(sig syscall.Signal) {
	i.t.Helper()
	if err := i.cmd.Process.Signal(sig); err != nil {
		i.t.Fatal(err)
	}
}

// kill is kill -9.
func (i *instance) kill() {
	if !i.done {
		i.done = true
		i.cmd.Process.Kill()
		i.cmd.Wait()
	}
}

// end ends it well.
func (i *instance) end() {
	i.t.Helper()
	i.done = true
	i.stdin.Close()
	if err := i.cmd.Wait(); err != nil {
		i.t.Errorf("the instance: %v", err)
	}
}

// rewrite changes the state file under a dead or stopped instance.
func (i *instance) rewrite(change func(*snapshot)) {
	i.t.Helper()
	snap, _, err := readState(i.paths().state)
	if err != nil {
		i.t.Fatal(err)
	}
	change(snap)
	other := filepath.Join(i.dir, "rewritten")
	if err := writeState(other, encodeState(snap)); err != nil {
		i.t.Fatal(err)
	}
	if err := os.Rename(other, i.paths().state); err != nil {
		i.t.Fatal(err)
	}
}

// answer is what a command said.
type answer struct {
	stdout, stderr string
	code           int
}

// program prepares the program as a process.
func program(dir string, args ...string) *exec.Cmd {
	cmd := exec.Command(testExe, args...)
	cmd.Env = cleanEnv("RDHPF_TEST_MAIN=1", "RDHPF_DIR="+dir)
	return cmd
}

func runProgram(t *testing.T, cmd *exec.Cmd) answer {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(patience, func() { cmd.Process.Kill() })
	defer timer.Stop()
	cmd.Wait()
	a := answer{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
	for _, r := range a.stdout + a.stderr {
		if r != '\n' && r != '\t' && !unicode.IsPrint(r) { // help has tabs
			t.Errorf("%q: prints %q", cmd.Args, r)
		}
	}
	if strings.Contains(a.stderr, "panic") || strings.Contains(a.stderr, "DATA RACE") {
		t.Errorf("%q: %s", cmd.Args, a.stderr)
	}
	return a
}

func rdhpf(t *testing.T, dir string, args ...string) answer {
	t.Helper()
	return runProgram(t, program(dir, args...))
}

// is compares the exit status, and what was said with regular expressions for
// whole streams.
func (a answer) is(t *testing.T, code int, stdout, stderr string) {
	t.Helper()
	if a.code != code {
		t.Errorf("exit status %d, want %d", a.code, code)
	}
	for _, s := range []struct{ name, got, want string }{{"stdout", a.stdout, stdout}, {"stderr", a.stderr, stderr}} {
		if !regexp.MustCompile(`^(?s:` + s.want + `)$`).MatchString(s.got) {
			t.Errorf("%s:\n got %q\nwant %q", s.name, s.got, s.want)
		}
	}
}

// shownReport is what status -json prints.
type shownReport struct {
	snapshot
	Source         string
	Running, Stale bool
}

func (a answer) report(t *testing.T) (r shownReport) {
	t.Helper()
	var raw map[string]json.RawMessage
	if err := json.Unmarshal([]byte(a.stdout), &raw); err != nil {
		t.Fatalf("%q: %v", a.stdout, err)
	}
	for _, list := range []string{"forwards", "skipped", "warnings"} {
		if len(raw[list]) == 0 || raw[list][0] != '[' {
			t.Errorf("%s is %s", list, raw[list])
		}
	}
	if err := json.Unmarshal([]byte(a.stdout), &r); err != nil {
		t.Fatal(err)
	}
	return r
}

// trust is what a status -json says besides the state.
func (a answer) trust(t *testing.T, code int, source string, running, stale bool) shownReport {
	t.Helper()
	r := a.report(t)
	if a.code != code || r.Source != source || r.Running != running || r.Stale != stale {
		t.Errorf("exit status %d, source %s, running %v, stale %v; want %d, %s, %v, %v; stderr %q",
			a.code, r.Source, r.Running, r.Stale, code, source, running, stale, a.stderr)
	}
	return r
}

const (
	testHost    = "ssh://me@box.invalid"
	tableHead   = `CONTAINER ID +LOCAL +REMOTE +STATE +DURATION +REASON\n-+\n`
	tableActive = tableHead + `abc123def456 +127\.0\.0\.1:8080 +8080 +active +(1m3\ds|1m[45]\ds|2m\d+s)\n`
	oldWarning  = `Warning: State file is (\d+m)?\d+s old\. rdhpf may not be running\.\n`
	deadWarning = `Warning: No rdhpf is running for this host: process \d+ has ended, this is what it wrote last\.\n`
)

func TestStatusFallback(t *testing.T) {
	dir := stateFolder(t)
	notFound := `No running instance found for ssh://me@box\.invalid\. Start one with: rdhpf run -host ssh://me@box\.invalid\n`
	status := []string{"status", "-host", "me@box.invalid"}
	asJSON := append(status, "-json")

	rdhpf(t, dir, status...).is(t, 3, "", notFound)
	rdhpf(t, dir, asJSON...).is(t, 3, "", notFound)

	i := startInstance(t, dir, testHost)
	rdhpf(t, dir, status...).is(t, 0, tableActive, "")
	rdhpf(t, dir, "status").is(t, 0, `ssh://me@box\.invalid\n`+tableActive, "")
	rdhpf(t, dir, "status", "--host", testHost+":22/").is(t, 0, tableActive, "")
	r := rdhpf(t, dir, asJSON...).trust(t, 0, "socket", true, false)
	if r.PID != i.cmd.Process.Pid || r.Host != testHost || len(r.Forwards) != 1 || r.Forwards[0].ContainerID != "abc123def456" {
		t.Errorf("it says %+v", r)
	}
	rdhpf(t, dir, "status", "-host", "you@box.invalid").is(t, 3, "", `No running instance found for ssh://you@box\.invalid\..*`)

	t.Run("socket removed", func(t *testing.T) {
		if err := os.Remove(i.paths().socket); err != nil {
			t.Fatal(err)
		}
		rdhpf(t, dir, status...).is(t, 0, tableActive, "")
		r := rdhpf(t, dir, asJSON...).trust(t, 0, "file", true, false)
		if r.PID != i.cmd.Process.Pid || len(r.Forwards) != 1 {
			t.Errorf("it says %+v", r)
		}
		rdhpf(t, dir, "status").is(t, 0, `ssh://me@box\.invalid\n`+tableActive, "")
		rdhpf(t, dir, "health").is(t, 1, "", fmt.Sprintf(`rdhpf: health by rdhpf \(pid %d\): [^\n]*no such file[^\n]*\n`, r.PID))
	})
	t.Run("no socket, torn file", func(t *testing.T) {
		i.signal(syscall.SIGSTOP)
		defer i.signal(syscall.SIGCONT)
		if err := os.WriteFile(i.paths().state, []byte(`{"version": "1.0", "ho`), 0o600); err != nil {
			t.Fatal(err)
		}
		says := fmt.Sprintf(`rdhpf \(pid %d\) is running and does not answer: [^\n]*torn[^\n]*\n`, i.cmd.Process.Pid)
		rdhpf(t, dir, status...).is(t, 1, "", `rdhpf: `+says)
		// That there is none would be a lie.
		rdhpf(t, dir, "status").is(t, 1, "", `[^\n]*`+says)
		rdhpf(t, dir, "status", "-json").is(t, 1, "", `[^\n]*`+says)
		rdhpf(t, dir, "health").is(t, 1, "", `[^\n]*`+says)
	})
	i.kill()

	i = startInstance(t, dir, testHost)
	t.Run("stopped", func(t *testing.T) {
		i.signal(syscall.SIGSTOP)
		defer i.signal(syscall.SIGCONT)
		// Fresh: the socket takes connections and says nothing.
		i.rewrite(func(s *snapshot) { s.UpdatedAt = time.Now() })
		r := rdhpf(t, dir, asJSON...).report(t)
		if r.Source != "file" || !r.Running || len(r.Forwards) != 1 {
			t.Errorf("it says %+v", r)
		}
		i.rewrite(func(s *snapshot) { s.UpdatedAt = time.Now().Add(-45 * time.Second) })
		rdhpf(t, dir, status...).is(t, 0, tableActive, oldWarning)
		rdhpf(t, dir, asJSON...).trust(t, 0, "file", true, true)
		i.rewrite(func(s *snapshot) { s.UpdatedAt = time.Now().Add(time.Hour) })
		const future = `Warning: State file is from the future\. rdhpf may not be running\.\n`
		rdhpf(t, dir, status...).is(t, 0, tableActive, future)
		i.rewrite(func(s *snapshot) { s.PID = 1 })
		rdhpf(t, dir, status...).is(t, 0, tableActive, future+fmt.Sprintf(`Warning: State file is of process 1, and process %d runs now\.\n`, i.cmd.Process.Pid))
	})
	t.Run("another host's file", func(t *testing.T) {
		i.signal(syscall.SIGSTOP)
		defer i.signal(syscall.SIGCONT)
		i.rewrite(func(s *snapshot) { s.Host = "ssh://you@elsewhere" })
		rdhpf(t, dir, status...).is(t, 1, "", `rdhpf: rdhpf \(pid \d+\) is running and does not answer: [^\n]*is of another host, ssh://you@elsewhere\n`)
		rdhpf(t, dir, "status").is(t, 1, "", `[^\n]*is of another host, ssh://you@elsewhere\n`)
	})
	i.kill()

	i = startInstance(t, dir, testHost)
	i.kill()
	t.Run("killed", func(t *testing.T) {
		// Its socket is still there, too.
		if _, err := os.Lstat(i.paths().socket); err != nil {
			t.Error(err)
		}
		rdhpf(t, dir, status...).is(t, 3, tableActive, "("+oldWarning+")?"+deadWarning)
		rdhpf(t, dir, "status").is(t, 3, `ssh://me@box\.invalid\n`+tableActive, "("+oldWarning+")?"+deadWarning)
		rdhpf(t, dir, asJSON...).trust(t, 3, "file", false, true)
		i.rewrite(func(s *snapshot) { s.UpdatedAt = time.Now().Add(-45 * time.Second) })
		rdhpf(t, dir, status...).is(t, 3, tableActive, oldWarning+deadWarning)
	})
	t.Run("pid of another process", func(t *testing.T) {
		i.rewrite(func(s *snapshot) { s.PID, s.UpdatedAt = os.Getpid(), time.Now() })
		rdhpf(t, dir, asJSON...).trust(t, 3, "file", false, true)
		rdhpf(t, dir, status...).is(t, 3, tableActive, "("+oldWarning+")?"+deadWarning)
	})
	t.Run("other version", func(t *testing.T) {
		i.rewrite(func(s *snapshot) { s.Version = "7.5" })
		rdhpf(t, dir, status...).is(t, 3, tableActive, `Warning: State file has version "7\.5" and this rdhpf knows "1\.0"; [^\n]*\n.*`)
	})
	t.Run("hostile file", func(t *testing.T) {
		i.rewrite(func(s *snapshot) { s.Forwards = hostileRaw() })
		a := rdhpf(t, dir, append(status, "-wide")...)
		if a.code != 3 || strings.Count(a.stdout, "\n") != 3 {
			t.Errorf("exit status %d, %q", a.code, a.stdout)
		}
	})
	t.Run("torn", func(t *testing.T) {
		if err := os.Truncate(i.paths().state, 40); err != nil {
			t.Fatal(err)
		}
		rdhpf(t, dir, status...).is(t, 3, "", `state file [^\n]*torn[^\n]*`+notFound)
		rdhpf(t, dir, "status").is(t, 3, "", `Warning: state file [^\n]*torn[^\n]*\nNo running instance found\. [^\n]*\n`)
	})
	t.Run("ended well", func(t *testing.T) {
		i := startInstance(t, dir, testHost)
		i.end()
		rdhpf(t, dir, status...).is(t, 3, "", notFound)
		rdhpf(t, dir, "status").is(t, 3, "", `No running instance found\. Start one with: rdhpf run [^\n]*\n`)
	})
}

// hostileRaw is a forward as no rdhpf would write it.
func hostileRaw() []forwardInfo {
	return []forwardInfo{{ContainerID: hostileText, Status: hostileText, Reason: hostileText, LocalAddress: hostileText,
		RemoteAddress: hostileText, ContainerName: hostileText, Image: hostileText, Service: hostileText, LocalPort: 1, RemotePort: 2}}
}

func TestStatusSeveral(t *testing.T) {
	dir := stateFolder(t)
	const one, two, dead = "ssh://a@one.invalid", "ssh://two.invalid:2222", "ssh://dead.invalid"
	blocks := func(a answer) map[string]string {
		found := make(map[string]string)
		for _, b := range strings.Split(a.stdout, "\n\n") {
			name, table, _ := strings.Cut(strings.TrimSuffix(b, "\n"), "\n")
			found[name] = table + "\n"
		}
		return found
	}
	startInstance(t, dir, dead).kill()
	rdhpf(t, dir, "status").is(t, 3, `ssh://dead\.invalid\n`+tableActive, "("+oldWarning+")?"+deadWarning)
	rdhpf(t, dir, "health").is(t, 3, "", "No running instance found.*")
	first := startInstance(t, dir, one)
	rdhpf(t, dir, "health").is(t, 0, `ok: 1 active, .*`, "")
	second := startInstance(t, dir, two)

	a := rdhpf(t, dir, "status")
	got := blocks(a)
	if a.code != 0 || len(got) != 3 {
		t.Errorf("exit status %d, %q", a.code, a.stdout)
	}
	for _, host := range []string{one, two, dead} {
		if !regexp.MustCompile(`^` + tableActive + `$`).MatchString(got[host]) {
			t.Errorf("%s: %q", host, got[host])
		}
	}
	a = rdhpf(t, dir, "status", "-json")
	lines := strings.Split(strings.TrimSuffix(a.stdout, "\n"), "\n")
	pids := map[string]int{one: first.cmd.Process.Pid, two: second.cmd.Process.Pid}
	if a.code != 0 || len(lines) != 3 {
		t.Errorf("exit status %d, %q", a.code, a.stdout)
	}
	for _, line := range lines {
		r := answer{stdout: line}.report(t)
		if pid, lives := pids[r.Host]; r.Running != lives || r.Stale == lives || lives && r.PID != pid {
			t.Errorf("of %s: %+v", r.Host, r)
		}
	}
	for _, args := range [][]string{{"health"}, {"stop"}, {"pause"}, {"status", "-watch"}, {"status", "-wait", "1s"}} {
		rdhpf(t, dir, args...).is(t, 1, "", `rdhpf: several instances are running: choose one with -host \([^\n]*\)\n`)
	}
	rdhpf(t, dir, "stop", "-host", one).is(t, 0, "stopped\n", "")
	first.end()
	rdhpf(t, dir, "stop").is(t, 0, "stopped\n", "")
	second.end()
	rdhpf(t, dir, "stop").is(t, 3, "", "No running instance found.*")
}

func TestStatusFolder(t *testing.T) {
	base := stateFolder(t)
	in := func(name string) string { return filepath.Join(base, name) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Mkdir(in("good"), 0o700))
	must(os.Symlink("good", in("link")))
	must(os.Mkdir(in("open"), 0o755))
	must(os.Chmod(in("open"), 0o755))
	must(os.WriteFile(in("file"), nil, 0o600))
	must(os.Mkdir(in("odd [*?"), 0o700))
	notFound := `No running instance found[^\n]*\n`
	cases := []struct {
		dir, stderr string
		code        int
	}{
		{"none", notFound, 3},
		{"good", notFound, 3},
		{"odd [*?", notFound, 3},
		{"link", `rdhpf: [^\n]*/link is a symbolic link: [^\n]*RDHPF_DIR[^\n]*\n`, 1},
		{"open", `rdhpf: [^\n]*/open is open to other users \(mode 0755\): run chmod 700 [^\n]*\n`, 1},
		{"file", `rdhpf: [^\n]*/file is no directory: [^\n]*\n`, 1},
	}
	if os.Geteuid() == 0 {
		must(os.Mkdir(in("foreign"), 0o700))
		must(os.Chown(in("foreign"), 12345, 12345))
		cases = append(cases, struct {
			dir, stderr string
			code        int
		}{"foreign", `rdhpf: [^\n]*/foreign belongs to uid 12345 [^\n]*\n`, 1})
	}
	for _, c := range cases {
		for _, args := range [][]string{{"status"}, {"status", "-json"}, {"status", "-host", "me@box.invalid"}, {"health"}} {
			t.Run(c.dir+" "+strings.Join(args, " "), func(t *testing.T) { rdhpf(t, in(c.dir), args...).is(t, c.code, "", c.stderr) })
		}
	}
	startInstance(t, in("odd [*?"), testHost)
	rdhpf(t, in("odd [*?"), "status").is(t, 0, `ssh://me@box\.invalid\n`+tableActive, "")

	t.Run("in the home directory", func(t *testing.T) {
		cmd := program("", "status")
		cmd.Env = append(cmd.Env, "HOME="+base)
		must(os.Mkdir(in(".rdhpf"), 0o700))
		startInstance(t, in(".rdhpf"), testHost)
		runProgram(t, cmd).is(t, 0, `ssh://me@box\.invalid\n`+tableActive, "")
	})
	t.Run("no home directory", func(t *testing.T) {
		cmd := program("", "status")
		cmd.Env = append(cmd.Env, "HOME=")
		runProgram(t, cmd).is(t, 1, "", `rdhpf: [^\n]*set RDHPF_DIR\n`)
	})
}

// beSSH listens on 127.0.0.1, prints the port, and holds or closes connections,
// until stdin ends.
func beSSH(hold bool) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(l.Addr().(*net.TCPAddr).Port)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if hold {
				defer c.Close()
			} else {
				c.Close()
			}
		}
	}()
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// startSSHLike runs the test binary as a process named ssh and returns its port.
func startSSHLike(t *testing.T, exe, how string, args ...string) (port int) {
	t.Helper()
	cmd := exec.Command(exe, args...)
	cmd.Env = cleanEnv(sshEnv + "=" + how)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		cmd.Wait()
	})
	if _, err := fmt.Fscan(out, &port); err != nil {
		t.Fatal(err)
	}
	return port
}

func TestStatusLsof(t *testing.T) {
	needLsof(t)
	needTool(t, "ps")
	dir := stateFolder(t)
	body, err := os.ReadFile(testExe)
	if err != nil {
		t.Fatal(err)
	}
	exe := filepath.Join(dir, "ssh")
	if err := os.WriteFile(exe, body, 0o700); err != nil {
		t.Fatal(err)
	}
	held := startSSHLike(t, exe, "hold", "-N", "-L", "1:127.0.0.1:1", "me@box.invalid")
	closed := startSSHLike(t, exe, "close", "-N", "-l", "me", "--", "box.invalid")
	startSSHLike(t, exe, "hold", "-N", "you@box.invalid")
	startSSHLike(t, exe, "hold", "-N", "me@other.invalid")
	startSSHLike(t, exe, "hold", "-N", "me@notbox.invalid")
	const warning = `Warning: No rdhpf is running; these ports are those on which an ssh to that host listens\.\n`
	want := map[int]string{held: active, closed: pending}

	a := rdhpf(t, dir, "status", "-host", "me@box.invalid", "-json")
	r := a.trust(t, 3, "lsof", false, true)
	for _, f := range r.Forwards {
		if f.ContainerID != "unknown" || f.Status != want[int(f.LocalPort)] || (f.Status == active) != (f.Reason == "") || !f.CreatedAt.IsZero() {
			t.Errorf("it says %+v, want %s", f, want[int(f.LocalPort)])
		}
	}
	if len(r.Forwards) != 2 || r.Host != testHost || r.PID != 0 || !regexp.MustCompile(`^`+warning+`$`).MatchString(a.stderr) {
		t.Errorf("it says %+v, %q", r, a.stderr)
	}
	a = rdhpf(t, dir, "status", "-host", "me@box.invalid")
	a.is(t, 3, tableHead+`unknown .*\nunknown .*\n`, warning)
	for _, row := range []string{fmt.Sprintf(`unknown +127\.0\.0\.1:%d +- +active +-\n`, held), fmt.Sprintf(`unknown +127\.0\.0\.1:%d +- +pending +- +port not responding\n`, closed)} {
		if !regexp.MustCompile(row).MatchString(a.stdout) {
			t.Errorf("no %q in %q", row, a.stdout)
		}
	}
	rdhpf(t, dir, "status").is(t, 3, "", `No running instance found\. [^\n]*\n`)

	// A file that cannot be read is told of, and the ports are shown all the same.
	if err := os.WriteFile(pathsFor(dir, testHost).state, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	rdhpf(t, dir, "status", "-host", "me@box.invalid").is(t, 3, tableHead+`unknown .*`, `Warning: state file [^\n]*torn[^\n]*\n`+warning)
}

func TestExitStatus(t *testing.T) {
	dir := stateFolder(t)
	startInstance(t, dir, testHost)
	for _, c := range []struct {
		args   string
		code   int
		stdout string
		stderr string
	}{
		{"", 2, "", `.*rdhpf: no command\n`},
		{"frobnicate", 2, "", `rdhpf: there is no command "frobnicate": see rdhpf help\n`},
		{"help", 0, `.*rdhpf status .*`, ""},
		{"--help", 0, `.*rdhpf status .*`, ""},
		{"version", 0, `rdhpf .*\n`, ""},
		{"status -h", 0, `Usage of rdhpf status:\n.*-watch.*`, ""},
		{"run --help", 0, `Usage of rdhpf run:\n.*`, ""},
		{"stop -h", 0, `Usage of rdhpf stop:\n.*`, ""},
		{"status -nonsense", 2, "", `rdhpf: [^\n]*-nonsense[^\n]*: see rdhpf status -h\n`},
		{"status -json=maybe", 2, "", `rdhpf: [^\n]*maybe[^\n]*\n`},
		{"status 8080", 2, "", `rdhpf: ports are for -wait, as in: rdhpf status -wait 30s 8080\n`},
		{"status -wait 1s 0", 2, "", `rdhpf: "0" is no port[^\n]*\n`},
		{"status -wait 1s 8080 web", 2, "", `rdhpf: "web" is no port[^\n]*\n`},
		{"status -wait soon", 2, "", `rdhpf: [^\n]*soon[^\n]*\n`},
		{"status -wait -5s", 2, "", `rdhpf: -wait wants a positive time, like 30s\n`},
		{"status -wait 5s -watch", 2, "", `rdhpf: -wait and -watch do not go together\n`},
		{"status -host", 2, "", `rdhpf: flag needs an argument: -host: see rdhpf status -h\n`},
		{"status -host tcp://box:2375", 2, "", `rdhpf: -host is tcp://box:2375: rdhpf needs ssh://[^\n]*\n`},
		{"health -host a@b@c", 2, "", `rdhpf: -host has more than a name[^\n]*\n`},
		{"run -host ssh://", 2, "", `rdhpf: -host has no host name[^\n]*\n`},
		{"health now", 2, "", `rdhpf: "now" is one argument too many: see rdhpf health -h\n`},
		{"run -host a extra", 2, "", `rdhpf: "extra" is one argument too many: see rdhpf run -h\n`},
		{"run -host a -bind everywhere", 2, "", `rdhpf: [^\n]*"everywhere" is no address[^\n]*\n`},
		{"run -host a -map 80", 2, "", `rdhpf: [^\n]*want PUBLISHED=LOCAL[^\n]*\n`},
		{"run -host a -map 80=0", 2, "", `rdhpf: [^\n]*"0" is no port[^\n]*\n`},
		{"run -host a -skip 90-80", 2, "", `rdhpf: [^\n]*ends before it begins[^\n]*\n`},
		{"run -host a -only 70000", 2, "", `rdhpf: [^\n]*"70000" is no port[^\n]*\n`},
		{"run -host a -log-level loud", 2, "", `rdhpf: [^\n]*loud[^\n]*\n`},
		{"run -host a -log-format xml", 2, "", `rdhpf: -log-format "xml": want text or json\n`},
		{"run", 1, "", `rdhpf: no host: use -host ssh://user@host, [^\n]*\n`},
		{"status", 0, `.*active.*`, ""},
		{"status -json", 0, `\{.*\}\n`, ""},
		{"status --json --wide", 0, `\{.*\}\n`, ""},
		{"status -wide", 0, `.*NAME +IMAGE.*`, ""},
		{"health", 0, `ok: 1 active, 0 conflict, 0 pending; connected .*`, ""},
		{"health -json", 0, `\{"status":"ok","reasons":\[\],.*\}\n`, ""},
		{"pause", 0, "paused: all local ports are closed\n", ""},
		{"resume", 0, "resumed\n", ""},
		{"reload", 0, "configuration read again\n", ""},
		{"reload -json", 0, "{}\n", ""},
		{"health -host nobody@box.invalid", 3, "", `No running instance found for ssh://nobody@box\.invalid\. [^\n]*\n`},
		{"stop -host nobody@box.invalid", 3, "", `No running instance found .*`},
		{"status -watch -host nobody@box.invalid -wait 1ms", 2, "", `.*`},
	} {
		t.Run(c.args, func(t *testing.T) { rdhpf(t, dir, strings.Fields(c.args)...).is(t, c.code, c.stdout, c.stderr) })
	}
	t.Run("what docker would take", func(t *testing.T) {
		for env, want := range map[string]string{"ssh://me@box.invalid": tableActive, "tcp://box:2375": `ssh://me@box\.invalid\n` + tableActive} {
			cmd := program(dir, "status")
			cmd.Env = append(cmd.Env, "DOCKER_HOST="+env)
			runProgram(t, cmd).is(t, 0, want, "")
		}
	})
}

func TestHealthCommand(t *testing.T) {
	dir := stateFolder(t)
	i := startInstance(t, dir, testHost)
	i.post(tableForwards(conflict, reasonGivenUp))
	rdhpf(t, dir, "health").is(t, 1, `degraded: 0 active, 1 conflict, 0 pending; .*\n  127\.0\.0\.1:8080 conflict: port already in use after 5 retry attempts\n`, "")
	i.post(`{"connection": {"state": "reconnecting", "last_error": "ssh: gone"}}`)
	rdhpf(t, dir, "health").is(t, 1, `down: 0 active, .*\n  reconnecting: ssh: gone\n`, "")
	rdhpf(t, dir, "health", "-json").is(t, 1, `\{"status":"down","reasons":\["reconnecting: ssh: gone"\].*`, "")
	rdhpf(t, dir, "status").is(t, 0, `ssh://me@box\.invalid\n`+tableHead+`Not connected: reconnecting for .*: ssh: gone\n`, "")
	i.kill()
	rdhpf(t, dir, "health").is(t, 3, "", `No running instance found.*`)
	rdhpf(t, dir, "health", "-json").is(t, 3, "", `No running instance found.*`)
}
