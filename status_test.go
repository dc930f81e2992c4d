package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"
)

// Tests of status.go and of the commands in client.go, as processes of their own: what they find out from the socket, else
// the file, else lsof, and how they exit. The instances that they look at have a lock, a socket and a file, and a state
// that the test posts. Also golden tests of what is printed: go test -run 'Table|Health|Report' -update writes
// testdata/*.golden anew; an escape character is ␛ there.

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
		s := &server{board: b, stop: stop, ask: func(_ context.Context, method string) (any, error) {
			snap, _ := b.look()
			switch method {
			case "status":
				return snap.at(time.Now()), nil
			case "verify":
				return verifiedSnap(snap.at(time.Now())), nil
			case "health":
				return snap.health(time.Now()), nil
			}
			return struct{}{}, nil
		}}
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

// verifiedSnap is what a verify finds: a forward with the reason unverified is not active.
func verifiedSnap(snap *snapshot) *snapshot {
	snap.Forwards = slices.Clone(snap.Forwards)
	for i := range snap.Forwards {
		if f := &snap.Forwards[i]; f.Reason == unverified {
			f.Status, f.Reason = pending, reasonSilent
		}
	}
	return snap
}

const unverified = "active on old evidence"

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
	if sig == syscall.SIGSTOP { // it may take a moment until all of its threads stand still
		time.Sleep(100 * time.Millisecond)
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
	if err := writeState(other, snap); err != nil {
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
	deadWarning = `Warning: No rdhpf is running for this host: process \d+ has ended; this is what it wrote last\.\n`
	muteText    = `rdhpf \(pid (\d+)\) does not answer and may be stopped: kill -CONT \d+ continues it`
	muteWarning = `Warning: ` + muteText + `\. This is what it wrote last\.\n`
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
		rdhpf(t, dir, "health").is(t, 1, "", fmt.Sprintf(`rdhpf: rdhpf \(pid %d\) is running but cannot be asked: [^\n]*no such file[^\n]*\n`, r.PID))
	})
	t.Run("no socket, torn file", func(t *testing.T) {
		i.signal(syscall.SIGSTOP)
		defer i.signal(syscall.SIGCONT)
		if err := os.WriteFile(i.paths().state, []byte(`{"version": "1.0", "ho`), 0o600); err != nil {
			t.Fatal(err)
		}
		says := fmt.Sprintf(`rdhpf \(pid %d\) is running but cannot be asked: [^\n]*; [^\n]*incomplete[^\n]*\n`, i.cmd.Process.Pid)
		rdhpf(t, dir, status...).is(t, 1, "", `rdhpf: `+says)
		// That there is none would be a lie.
		rdhpf(t, dir, "status").is(t, 1, "", `[^\n]*`+says)
		rdhpf(t, dir, "status", "-json").is(t, 1, "", `[^\n]*`+says)
	})
	i.kill()

	i = startInstance(t, dir, testHost)
	t.Run("stopped", func(t *testing.T) {
		i.signal(syscall.SIGSTOP)
		defer i.signal(syscall.SIGCONT)
		for _, age := range []time.Duration{0, 45 * time.Second, -time.Hour} {
			i.rewrite(func(s *snapshot) { s.UpdatedAt = time.Now().Add(-age) })
			rdhpf(t, dir, status...).is(t, 1, tableActive, muteWarning)
		}
		t.Run("asked", func(t *testing.T) { // all at once, for each takes 2 s
			for _, args := range [][]string{{"status"}, asJSON, {"health"}, {"pause"}, {"resume"}, {"reload"}, {"stop"}, {"env"}, {"port", "web"}} {
				t.Run(strings.Join(args, " "), func(t *testing.T) {
					t.Parallel()
					begun := time.Now()
					a := rdhpf(t, dir, args...)
					if took := time.Since(begun); took > 3500*time.Millisecond {
						t.Errorf("it took %v", took)
					}
					switch {
					case args[len(args)-1] == "-json":
						if r := a.trust(t, 1, "file", true, true); len(r.Forwards) != 1 {
							t.Errorf("it says %+v", r)
						}
					case args[0] == "status":
						a.is(t, 1, `ssh://me@box\.invalid\n`+tableActive, muteWarning)
					default:
						a.is(t, 1, "", fmt.Sprintf(`rdhpf: rdhpf \(pid %[1]d\) does not answer and may be stopped: kill -CONT %[1]d continues it\n`, i.cmd.Process.Pid))
					}
				})
			}
		})
		i.rewrite(func(s *snapshot) { s.PID = 1 })
		rdhpf(t, dir, status...).is(t, 1, tableActive,
			fmt.Sprintf(`Warning: rdhpf \(pid %[1]d\) does not answer and may be stopped: kill -CONT %[1]d continues it\. This is what process 1 wrote last\.\n`, i.cmd.Process.Pid))
	})
	t.Run("another host's file", func(t *testing.T) {
		i.signal(syscall.SIGSTOP)
		defer i.signal(syscall.SIGCONT)
		i.rewrite(func(s *snapshot) { s.Host = "ssh://you@elsewhere" })
		rdhpf(t, dir, status...).is(t, 1, "", `rdhpf: `+muteText+`; [^\n]*is of another host, ssh://you@elsewhere\n`)
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
		rdhpf(t, dir, status...).is(t, 3, tableActive, `Warning: State file has version "7\.5", but this rdhpf knows only "1\.0"; [^\n]*\n.*`)
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
		rdhpf(t, dir, status...).is(t, 3, "", `state file [^\n]*incomplete[^\n]*`+notFound)
		rdhpf(t, dir, "status").is(t, 3, "", `Warning: state file [^\n]*incomplete[^\n]*\nNo running instance found\. [^\n]*\n`)
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
		{"file", `rdhpf: [^\n]*/file is not a directory: [^\n]*\n`, 1},
	}
	if os.Geteuid() == 0 {
		must(os.Mkdir(in("foreign"), 0o700))
		must(os.Chown(in("foreign"), 12345, 12345))
		cases = append(cases, struct {
			dir, stderr string
			code        int
		}{"foreign", `rdhpf: [^\n]*/foreign belongs to uid 12345, not to you[^\n]*\n`, 1})
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
	ours := filepath.Join(dir, "rdhpf")
	if err := os.Link(exe, ours); err != nil {
		t.Fatal(err)
	}
	own := startSSHLike(t, ours, "hold", "run", "-host", "me@BOX.invalid:22")
	own2 := startSSHLike(t, ours, "close", "run", "--host=ssh://me@box.invalid", "-retry")
	startSSHLike(t, ours, "hold", "run", "-host", "box.invalid")
	startSSHLike(t, ours, "hold", "run")
	const warning = `Warning: No instance was found; these are the ports on which an rdhpf or an ssh for that host listens\.\n`
	want := map[int]string{held: active, closed: pending, own: active, own2: pending}

	a := rdhpf(t, dir, "status", "-host", "me@box.invalid", "-json")
	r := a.trust(t, 3, "lsof", false, true)
	for _, f := range r.Forwards {
		if f.ContainerID != "unknown" || f.Status != want[int(f.LocalPort)] || (f.Status == active) != (f.Reason == "") || !f.CreatedAt.IsZero() {
			t.Errorf("it says %+v, want %s", f, want[int(f.LocalPort)])
		}
	}
	if len(r.Forwards) != 4 || r.Host != testHost || r.PID != 0 || !regexp.MustCompile(`^`+warning+`$`).MatchString(a.stderr) {
		t.Errorf("it says %+v, %q", r, a.stderr)
	}
	a = rdhpf(t, dir, "status", "-host", "me@box.invalid")
	a.is(t, 3, tableHead+`(unknown [^\n]*\n){4}`, warning)
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
	rdhpf(t, dir, "status", "-host", "me@box.invalid").is(t, 3, tableHead+`unknown .*`, `Warning: state file [^\n]*incomplete[^\n]*\n`+warning)
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
		{"", 2, "", `.*rdhpf: no command given\n`},
		{"frobnicate", 2, "", `rdhpf: unknown command "frobnicate": see rdhpf help\n`},
		{"help", 0, `.*rdhpf status .*`, ""},
		{"--help", 0, `.*rdhpf status .*`, ""},
		{"version", 0, `rdhpf .*\n`, ""},
		{"status -h", 0, `Usage: rdhpf status .*-watch.*`, ""},
		{"run --help", 0, `Usage: rdhpf run .*`, ""},
		{"help stop", 0, `Usage: rdhpf stop .*`, ""},
		{"version -h", 0, `Usage: rdhpf version .*`, ""},
		{"help nonsense", 2, "", `rdhpf: unknown command "nonsense": see rdhpf help\n`},
		{"stat", 2, "", `rdhpf: unknown command "stat": did you mean status\?\n`},
		{"versoin", 2, "", `rdhpf: unknown command "versoin": did you mean version\?\n`},
		{"stop ssh://me@box", 2, "", `rdhpf: unexpected argument "ssh://me@box": name the host with -host ssh://me@box\n`},
		{"status me@box", 2, "", `rdhpf: unexpected argument "me@box": name the host with -host me@box\n`},
		{"status -jsno", 2, "", `rdhpf: unknown flag -jsno: did you mean -json\?\n`},
		{"status -json box", 2, "", `rdhpf: "box" is not a port: [^\n]*; where a container's port is, rdhpf port box tells\n`},
		{"run ssh://me@box -nonsense", 2, "", `rdhpf: unknown flag -nonsense: see rdhpf run -h\n`},
		{"run me@box -host b", 2, "", `rdhpf: unexpected argument "me@box": [^\n]*\n`},
		{"run ssh://", 2, "", `rdhpf: -host has no host name[^\n]*\n`},
		{"status -nonsense", 2, "", `rdhpf: unknown flag -nonsense: see rdhpf status -h\n`},
		{"status -json=maybe", 2, "", `rdhpf: -json "maybe": want true, false or no value\n`},
		{"status 8080", 2, "", `rdhpf: ports can only be given with -wait: rdhpf status -wait 30s 8080\n`},
		{"status -wait 1s 0", 2, "", `rdhpf: "0" is not a port[^\n]*\n`},
		{"status -wait 1s 8080 web", 2, "", `rdhpf: "web" is not a port[^\n]*\n`},
		{"status -wait soon", 2, "", `rdhpf: -wait "soon": want a time, such as 30s\n`},
		{"status -wait 5", 2, "", `rdhpf: -wait "5": a time has a unit, such as 5s\n`},
		{"status -wait -5s", 2, "", `rdhpf: -wait "-5s": want a positive time, such as 30s\n`},
		{"status -wait 5s -watch", 2, "", `rdhpf: -wait and -watch exclude each other\n`},
		{"status -host", 2, "", `rdhpf: -host needs a value: -host HOST: the instance's host [^\n]*\n`},
		{"status -host tcp://box:2375", 2, "", `rdhpf: -host is tcp://box:2375: rdhpf needs ssh://[^\n]*\n`},
		{"health -host a@b@c", 2, "", `rdhpf: -host has more than a name[^\n]*\n`},
		{"run -host ssh://", 2, "", `rdhpf: -host has no host name[^\n]*\n`},
		{"health now", 2, "", `rdhpf: unexpected argument "now": see rdhpf health -h\n`},
		{"run -host a extra", 2, "", `rdhpf: unexpected argument "extra": see rdhpf run -h \(a command to run follows --\)\n`},
		{"run -host a -bind everywhere", 2, "", `rdhpf: [^\n]*"everywhere" is not an address[^\n]*\n`},
		{"run -host a -bind 127.0.0.1,here", 2, "", `rdhpf: [^\n]*"here" is not an address[^\n]*\n`},
		{"run -host a -no-probe 0", 2, "", `rdhpf: [^\n]*"0" is not a port[^\n]*\n`},
		{"run -host a -map 80", 2, "", `rdhpf: -map "80": want PUBLISHED=LOCAL, such as 80=8080\n`},
		{"run -host a -map 80=0", 2, "", `rdhpf: [^\n]*"0" is not a port[^\n]*\n`},
		{"run -host a -skip 90-80", 2, "", `rdhpf: [^\n]*ends before it begins[^\n]*\n`},
		{"run -host a -only 70000", 2, "", `rdhpf: [^\n]*"70000" is not a port[^\n]*\n`},
		{"run -host a -log-level loud", 2, "", `rdhpf: -log-level "loud": want debug, info, warn or error\n`},
		{"run -host a -log-format xml", 2, "", `rdhpf: -log-format "xml": want text or json\n`},
		{"status --format yaml", 2, "", `rdhpf: there is no -format any more: use -json, or nothing for the table\n`},
		{"run --trace -host a", 2, "", `rdhpf: there is no -trace any more: use -log-level debug\n`},
		{"completion bash", 0, `_rdhpf\(\) .*`, ""},
		{"completion csh", 2, "", `rdhpf: want one shell: rdhpf completion bash, zsh or fish\n`},
		{"port", 2, "", `rdhpf: no container given: rdhpf port NAME \[PORT\]; [^\n]*\n`},
		{"port web 80 81", 2, "", `rdhpf: unexpected argument "81"[^\n]*\n`},
		{"port web eighty", 2, "", `rdhpf: "eighty" is not a port[^\n]*\n`},
		{"port nobody", 1, "", `rdhpf: no container or service "nobody" publishes a port: see rdhpf status -wide\n`},
		{"port web", 0, `0/tcp -> 127\.0\.0\.1:[0-9]+\n`, ""},
		{"run -host a --", 2, "", `rdhpf: -- is followed by no command\n`},
		{"run -host a extra -- true", 2, "", `rdhpf: unexpected argument "extra": see rdhpf run -h \(a command to run follows --\)\n`},
		{"run -host a -wait 5s", 2, "", `rdhpf: -wait needs a command to run: rdhpf run -wait 30s -- COMMAND\n`},
		{"run -host a -wait -5s -- true", 2, "", `rdhpf: -wait "-5s": want a positive time, such as 30s\n`},
		{"run -host a -wait soon -- true", 2, "", `rdhpf: [^\n]*soon[^\n]*\n`},
		{"run -nonsense -- true", 2, "", `rdhpf: unknown flag -nonsense: see rdhpf run -h\n`},
		{"run -- true", 1, "", `rdhpf: no host: use -host ssh://user@host, [^\n]*\n`},
		{"run -host a -- /nonexistent/command", 127, "", `rdhpf: [^\n]*/nonexistent/command[^\n]*\n`},
		{"run -host a -- nosuchcommand-", 127, "", `rdhpf: [^\n]*nosuchcommand-[^\n]*\n`},
		{"run -host a -- /etc/passwd", 126, "", `rdhpf: [^\n]*/etc/passwd[^\n]*permission denied\n`},
		{"run -host a -- /etc", 126, "", `rdhpf: [^\n]*/etc[^\n]*is a directory\n`},
		{"env -h", 0, `Usage: rdhpf env .*-unset.*`, ""},
		{"env -shell csh", 2, "", `rdhpf: -shell "csh": want sh, bash, zsh or fish\n`},
		{"env -unset -json", 2, "", `rdhpf: -unset and -json exclude each other\n`},
		{"env now", 2, "", `rdhpf: unexpected argument "now": see rdhpf env -h\n`},
		{"env -host tcp://box:2375", 2, "", `rdhpf: -host is tcp://box:2375: rdhpf needs ssh://[^\n]*\n`},
		{"env -host nobody@box.invalid", 3, "", `No running instance found for ssh://nobody@box\.invalid\. [^\n]*\n`},
		{"env", 1, "", `rdhpf: the instance for ssh://me@box\.invalid does not serve the engine: it was started with -no-docker-socket\n`},
		{"run", 1, "", `rdhpf: no host: use -host ssh://user@host, [^\n]*\n`},
		{"status", 0, `.*active.*`, ""},
		{"status -json", 0, `\{.*\}\n`, ""},
		{"status --json --wide", 0, `\{.*\}\n`, ""},
		{"status -wide", 0, `.*NAME +IMAGE.*`, ""},
		{"health", 0, `ok: 1 active, 0 conflict, 0 pending; connected .*`, ""},
		{"health -json", 0, `\{"status":"ok","reasons":\[\],.*\}\n`, ""},
		{"pause", 0, "paused: all local ports are closed\n", ""},
		{"resume", 0, "resumed\n", ""},
		{"reload", 0, "configuration reloaded\n", ""},
		{"reload -json", 0, "{}\n", ""},
		{"health -host nobody@box.invalid", 3, "", `No running instance found for ssh://nobody@box\.invalid\. [^\n]*\n`},
		{"stop -host nobody@box.invalid", 3, "", `No running instance found .*`},
		{"status -watch -host nobody@box.invalid -wait 1ms", 2, "", `.*`},
	} {
		t.Run(c.args, func(t *testing.T) { rdhpf(t, dir, strings.Fields(c.args)...).is(t, c.code, c.stdout, c.stderr) })
	}
	t.Run("the host docker uses", func(t *testing.T) {
		cmd := program(dir, "status")
		cmd.Env = append(cmd.Env, "DOCKER_HOST=ssh://me@box.invalid")
		runProgram(t, cmd).is(t, 0, tableActive, "")
		// One that is broken is told by every command, and none turns to another instance.
		for _, env := range []string{"tcp://box:2375", "ssh://", "me@box.invalid"} {
			for _, args := range []string{"status", "status -watch", "status -wait 1s", "health", "pause", "resume", "reload", "stop", "run"} {
				cmd := program(dir, strings.Fields(args)...)
				cmd.Env = append(cmd.Env, "DOCKER_HOST="+env)
				runProgram(t, cmd).is(t, 1, "", `rdhpf: DOCKER_HOST [^\n]*\n`)
			}
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
	rdhpf(t, dir, "status").is(t, 0, `ssh://me@box\.invalid\nNot connected: reconnecting for .*: ssh: gone\n`, "")
	i.kill()
	rdhpf(t, dir, "health").is(t, 3, "", `No running instance found.*`)
	rdhpf(t, dir, "health", "-json").is(t, 3, "", `No running instance found.*`)
}

var updateGolden = flag.Bool("update", false, "write testdata/*.golden anew")

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	got = bytes.ReplaceAll(got, []byte("\x1b"), []byte("␛"))
	path := filepath.Join("testdata", name+".golden")
	if *updateGolden {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s:\n--- got\n%s\n--- want\n%s", path, got, want)
	}
}

// tableNow is when the goldens are looked at.
var tableNow = time.Date(2025, 11, 27, 15, 30, 45, 0, time.UTC)

func ago(d time.Duration) time.Time { return tableNow.Add(-d) }

// tableSnapshot is that of the design: one forward of each status.
func tableSnapshot() *snapshot {
	event, verified := ago(45*time.Second), ago(12*time.Second)
	return &snapshot{
		Version: stateVersion, Host: "ssh://user@host", PID: 12345, StartedAt: ago(30*time.Minute + 45*time.Second), UpdatedAt: tableNow,
		Connection: connection{State: connected, Since: ago(30 * time.Minute)}, Engine: "Docker/20.10.24 (linux)", LastEventAt: &event,
		Warnings: []string{}, Skipped: []skippedPort{},
		Forwards: []forwardInfo{
			{ContainerID: "abc123def456", LocalPort: 8080, RemotePort: 8080, Status: active,
				CreatedAt: ago(2*time.Minute + 15*time.Second), UpdatedAt: ago(2*time.Minute + 14*time.Second),
				LocalAddress: "127.0.0.1", RemoteAddress: "127.0.0.1", ContainerName: "web", ContainerPort: 80, Image: "nginx:1.27", Service: "web",
				VerifiedAt: &verified, Connections: 1234, OpenConnections: 2, BytesIn: 1258291, BytesOut: 34567, LastUsedAt: &event},
			{ContainerID: "789abc123abc", LocalPort: 5432, RemotePort: 5432, Status: conflict, Reason: reasonGivenUp + " (held by postgres, pid 4242)",
				CreatedAt: ago(90 * time.Second), UpdatedAt: ago(85 * time.Second),
				LocalAddress: "127.0.0.1", RemoteAddress: "127.0.0.1", ContainerName: "shop-db-1", ContainerPort: 5432, Image: "postgres:16", Service: "db"},
			{ContainerID: "def456abc789", LocalPort: 3000, RemotePort: 3000, Status: pending, Reason: reasonSilent,
				CreatedAt: ago(45 * time.Second), UpdatedAt: ago(44 * time.Second),
				LocalAddress: "127.0.0.1", RemoteAddress: "127.0.0.1", ContainerName: "node", ContainerPort: 3000, Image: "node:22"},
		},
	}
}

// hostileText has what a name must not do to a terminal or to the table.
const hostileText = "a\x1b[31mred\x1b]0;title\a\r\nnext\tcell\u202ebidi\u2066\u200b\ufeff\x9b2J\x7f\xff日本é\u0000z"

func hostileSnapshot() *snapshot {
	s := tableSnapshot()
	s.Host, s.Engine, s.Connection = hostileText, hostileText, connection{State: reconnecting, Since: ago(time.Minute), LastError: hostileText}
	s.Warnings = []string{hostileText}
	s.Skipped = []skippedPort{{ContainerID: hostileText, Name: hostileText, Port: 53, Protocol: hostileText, Reason: hostileText}}
	f := &s.Forwards[0]
	f.ContainerID, f.ContainerName, f.Image, f.Service, f.Node, f.Reason = hostileText, hostileText, hostileText, hostileText, hostileText, hostileText
	f.LocalAddress, f.RemoteAddress = hostileText, hostileText
	s.Forwards[1].Status = hostileText
	s.Forwards[2].Reason = strings.Repeat("long\n", 10000)
	s.clean()
	return s
}

func TestTable(t *testing.T) {
	with := func(change func(*report)) *report {
		r := &report{snapshot: tableSnapshot(), Source: "socket", Running: true}
		change(r)
		return r
	}
	plain := with(func(*report) {})
	addresses := with(func(r *report) {
		f := r.Forwards
		f[0].RemoteAddress, f[0].LocalAddress = "::1", "::1"
		f[1].RemoteAddress = "10.97.0.2"
		f[2].LocalAddress, f[2].LocalPort, f[2].RemoteAddress = "0.0.0.0", 13000, "fe80::1%eth0"
	})
	nodes := with(func(r *report) {
		f := &r.Forwards[1]
		f.RemoteAddress, f.Node, f.Status, f.Reason = "192.0.2.2", "node2", pending, "node node2 is down"
	})
	hostile := with(func(r *report) { r.snapshot = hostileSnapshot() })
	long := with(func(r *report) {
		f := r.Forwards
		f[0].LocalAddress, f[0].RemoteAddress = "2001:db8:1234:5678:9abc:def0:1234:5678", "fd00:dead:beef::2"
		f[1].Reason = reasonGivenUp + " (held by データベース, pid 4242)"
		f[2].Reason, f[2].ContainerName = "café\u0301: 日本語の理由はここに書いてある、長い", "日本"
	})
	for _, c := range []struct {
		name   string
		report *report
		style  tableStyle
	}{
		{"narrow", plain, tableStyle{}},
		{"wide", plain, tableStyle{wide: true}},
		{"wide-docker", with(func(r *report) { r.DockerSocket = "/home/me/.rdhpf/WHhNu7djKMsZ.docker.sock" }), tableStyle{wide: true}},
		{"colour", plain, tableStyle{colour: true}},
		{"wide-colour", plain, tableStyle{wide: true, colour: true}},
		{"addresses", addresses, tableStyle{}},
		{"addresses-wide", addresses, tableStyle{wide: true}},
		{"nodes", nodes, tableStyle{}},
		{"nodes-wide", nodes, tableStyle{wide: true}},
		{"empty", with(func(r *report) { r.Forwards = []forwardInfo{} }), tableStyle{}},
		{"skipped", with(func(r *report) {
			r.Skipped = []skippedPort{
				{"fedcba987654", "agent", 0, "tcp", "host network: the container publishes no ports"},
				{"abc123def456", "web", 22, "tcp", "excluded by -skip"},
				{"0123456789ab", "dns", 53, "udp", "SSH carries TCP only"},
			}
		}), tableStyle{}},
		{"paused", with(func(r *report) {
			r.Paused = true
			for i := range r.Forwards {
				r.Forwards[i].Status, r.Forwards[i].Reason = pending, reasonPaused
			}
		}), tableStyle{}},
		{"connecting", with(func(r *report) {
			r.Connection, r.Forwards = connection{State: connecting, Since: ago(3 * time.Second)}, nil
		}), tableStyle{}},
		{"reconnecting", with(func(r *report) {
			r.Connection = connection{State: reconnecting, Since: ago(75 * time.Second), Reconnects: 3, LastError: "ssh: Timeout, server host not responding."}
			for i := range r.Forwards {
				r.Forwards[i].Status, r.Forwards[i].Reason = pending, reasonLost
			}
		}), tableStyle{colour: true}},
		{"degraded", with(func(r *report) {
			r.snapshot.Warnings = []string{"the remote engine does not answer: EOF", "the state file cannot be written: no space left on device"}
		}), tableStyle{}},
		{"long", with(func(r *report) {
			r.Forwards[1].ContainerName = strings.Repeat("very-", 20) + "long"
			r.Forwards[1].Image = "registry.example.com:5000/" + strings.Repeat("team/", 10) + "image@sha256:" + strings.Repeat("0123456789abcdef", 4)
			r.Forwards[1].Reason = strings.Repeat("because ", 30)
		}), tableStyle{wide: true}},
		{"hostile", hostile, tableStyle{wide: true}},
		{"lsof", with(func(r *report) {
			r.Source, r.Running, r.Stale = "lsof", false, true
			r.snapshot = &snapshot{Version: stateVersion, Host: "ssh://user@host", UpdatedAt: tableNow, Connection: connection{State: "unknown"},
				Warnings: []string{}, Skipped: []skippedPort{},
				Forwards: []forwardInfo{{ContainerID: "unknown", LocalPort: 8080, LocalAddress: "127.0.0.1", RemoteAddress: "127.0.0.1", Status: active}}}
		}), tableStyle{wide: true}},
		{"terminal-120", long, tableStyle{columns: 120}},
		{"terminal-80", long, tableStyle{columns: 80, colour: true}},
		{"terminal-40", long, tableStyle{columns: 40, colour: true}},
		{"terminal-1", long, tableStyle{columns: 1}},
		{"terminal-wide", long, tableStyle{columns: 80, wide: true, whole: true}},
		{"terminal-wide-cut", long, tableStyle{columns: 80, wide: true, colour: true}},
		{"none-forwarded", with(func(r *report) {
			r.Forwards, r.Skipped = nil, []skippedPort{{"0123456789ab", "dns", 53, "udp", "SSH carries TCP only"}}
		}), tableStyle{}},
		{"clock-behind", with(func(r *report) { r.Forwards[0].CreatedAt = tableNow.Add(time.Hour) }), tableStyle{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var b bytes.Buffer
			b.WriteString(table(c.report, tableNow, c.style))
			golden(t, c.name, b.Bytes())
			for _, line := range strings.Split(b.String(), "\n") {
				if strings.TrimRight(line, " ") != line {
					t.Errorf("%q ends with spaces", line)
				}
				if n := textColumns(line); c.style.columns > 0 && !c.style.whole && n > c.style.columns {
					t.Errorf("%q takes %d columns", line, n)
				}
			}
		})
	}
	// Nobody serves the socket of an instance that has ended, and a narrow table leaves it out.
	for name, c := range map[string]struct {
		running bool
		style   tableStyle
	}{"ended": {false, tableStyle{wide: true}}, "narrow": {true, tableStyle{}}} {
		r := with(func(r *report) { r.DockerSocket, r.Running = "/x.docker.sock", c.running })
		if got := table(r, tableNow, c.style); strings.Contains(got, "docker.sock") {
			t.Errorf("%s: %s", name, got)
		}
	}
	var b bytes.Buffer
	b.WriteString(table(hostile, tableNow, tableStyle{wide: true}))
	for _, r := range b.String() {
		if r != '\n' && !unicode.IsPrint(r) {
			t.Errorf("%q reaches the terminal", r)
		}
	}
	if got := strings.Count(b.String(), "\n"); got != 2+3+3 {
		t.Errorf("a hostile snapshot makes %d lines", got)
	}
}

func TestReportJSON(t *testing.T) {
	pretty := func(v any) []byte {
		var b bytes.Buffer
		if err := json.Indent(&b, mustJSON(v), "", "  "); err != nil {
			t.Fatal(err)
		}
		b.WriteByte('\n')
		return b.Bytes()
	}
	r := &report{snapshot: tableSnapshot(), Source: "socket", Running: true, warnings: []string{"for a person"}}
	r.Skipped = []skippedPort{{"0123456789ab", "dns", 53, "udp", "SSH carries TCP only"}}
	r.snapshot.Warnings = []string{"the remote engine does not answer: EOF"}
	r.Connection.Reconnects, r.Connection.LastError = 2, "ssh: Connection reset by peer"
	golden(t, "report.json", pretty(r))
	golden(t, "hostile.json", pretty(&report{snapshot: hostileSnapshot(), Source: "file", Stale: true}))
	empty := &snapshot{Host: "ssh://h", UpdatedAt: tableNow}
	empty.clean()
	golden(t, "empty.json", pretty(&report{snapshot: empty, Source: "file"}))
}

// The seed's field names are an interface.
func TestStateFileNames(t *testing.T) {
	var file map[string]json.RawMessage
	if err := json.Unmarshal(mustJSON(tableSnapshot()), &file); err != nil {
		t.Fatal(err)
	}
	var forwards []map[string]json.RawMessage
	if err := json.Unmarshal(file["forwards"], &forwards); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"version": `"1.0"`, "host": `"ssh://user@host"`, "pid": "12345",
		"started_at": `"2025-11-27T15:00:00Z"`, "updated_at": `"2025-11-27T15:30:45Z"`} {
		if got := string(file[name]); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
	for name, want := range map[string]string{"container_id": `"789abc123abc"`, "local_port": "5432", "remote_port": "5432", "status": `"conflict"`,
		"reason": `"port already in use after 5 retry attempts (held by postgres, pid 4242)"`, "created_at": `"2025-11-27T15:29:15Z"`, "updated_at": `"2025-11-27T15:29:20Z"`} {
		if got := string(forwards[1][name]); got != want {
			t.Errorf("%s of a forward is %s, want %s", name, got, want)
		}
	}
}

func TestHealthText(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*snapshot)
		status string
	}{
		{"health-ok", func(s *snapshot) { s.Forwards = s.Forwards[:1] }, "ok"},
		{"health-no-forwards", func(s *snapshot) { s.Forwards, s.Engine, s.LastEventAt = nil, "", nil }, "ok"},
		{"health-opening", func(s *snapshot) {
			s.Forwards = s.Forwards[:1]
			s.Forwards[0].Status, s.Forwards[0].Reason = pending, reasonProbing
		}, "degraded"},
		{"health-degraded", func(*snapshot) {}, "degraded"},
		{"health-paused", func(s *snapshot) {
			s.Paused = true
			for i := range s.Forwards {
				s.Forwards[i].Status, s.Forwards[i].Reason = pending, reasonPaused
			}
		}, "degraded"},
		{"health-engine", func(s *snapshot) {
			s.Forwards, s.Warnings = s.Forwards[:1], []string{"the remote engine does not answer: EOF"}
		}, "degraded"},
		{"health-down", func(s *snapshot) {
			s.Connection = connection{State: reconnecting, Since: ago(75 * time.Second), LastError: "ssh: Connection reset by peer"}
			for i := range s.Forwards {
				s.Forwards[i].Status, s.Forwards[i].Reason = pending, reasonLost
			}
		}, "down"},
		{"health-starting", func(s *snapshot) {
			s.Connection, s.Forwards, s.StartedAt = connection{State: connecting, Since: ago(time.Second)}, nil, ago(time.Second)
		}, "down"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := tableSnapshot()
			c.change(s)
			h := s.health(tableNow)
			if h.Status != c.status {
				t.Errorf("status is %s, want %s", h.Status, c.status)
			}
			var b bytes.Buffer
			printHealth(&b, &h, tableNow)
			golden(t, c.name, b.Bytes())
		})
	}
	h := tableSnapshot().health(tableNow)
	var b bytes.Buffer
	if err := json.Indent(&b, mustJSON(h), "", "  "); err != nil {
		t.Fatal(err)
	}
	golden(t, "health.json", append(b.Bytes(), '\n'))
}

func TestSizeText(t *testing.T) {
	for n, want := range map[int64]string{0: "0B", 1: "1B", 1023: "1023B", 1024: "1.0KiB", 1536: "1.5KiB", 34567: "33.8KiB", 1<<20 - 1: "1.0MiB",
		1<<20 - 60: "1023.9KiB", 1258291: "1.2MiB", 1 << 30: "1.0GiB", 5 << 40: "5.0TiB", math.MaxInt64: "8192.0PiB", -1: "-1B"} {
		if got := sizeText(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
}

func TestAgeText(t *testing.T) {
	const day = 24 * time.Hour
	for d, want := range map[time.Duration]string{
		0: "0s", 1: "0s", time.Second - 1: "0s", time.Second: "1s", 45 * time.Second: "45s", 59*time.Second + 999*time.Millisecond: "59s",
		time.Minute: "1m0s", 2*time.Minute + 15*time.Second: "2m15s", time.Hour - time.Second: "59m59s",
		time.Hour: "1h0m", 3*time.Hour + 4*time.Minute + 59*time.Second: "3h4m", day - time.Second: "23h59m",
		day: "1d0h", 2*day + 5*time.Hour: "2d5h", 400*day + 23*time.Hour: "400d23h",
		-1: "0s", -time.Hour: "0s", math.MinInt64: "0s", math.MaxInt64: "106751d23h",
	} {
		if got := ageText(d); got != want {
			t.Errorf("%d ns: %s, want %s", int64(d), got, want)
		}
	}
}

func TestMissingPorts(t *testing.T) {
	up := func(change func(*report)) *report {
		r := &report{snapshot: tableSnapshot(), Source: "socket", Running: true}
		change(r)
		return r
	}
	const db = "127.0.0.1:5432 of shop-db-1 is conflict (port already in use after 5 retry attempts (held by postgres, pid 4242))"
	for _, c := range []struct {
		name   string
		report *report
		ports  []uint16
		some   bool
		want   string
	}{
		{"all", up(func(*report) {}), nil, false, db + "; 127.0.0.1:3000 of node is pending (port not responding)"},
		{"active ones", up(func(*report) {}), []uint16{8080}, false, ""},
		{"some", up(func(*report) {}), []uint16{8080, 5432, 9999}, false, db + "; no container publishes 9999"},
		{"none published", up(func(r *report) { r.Forwards = nil }), nil, false, ""},
		{"none published, one wanted", up(func(r *report) { r.Forwards = nil }), nil, true, "no port is forwarded, and -wait wants at least one"},
		{"not connected, one wanted", up(func(r *report) { r.Connection, r.Forwards = connection{State: connecting}, nil }), nil, true,
			"not connected to the remote host"},
		{"none published of those", up(func(r *report) { r.Forwards = nil }), []uint16{80}, false, "no container publishes 80"},
		{"all active", up(func(r *report) { r.Forwards = r.Forwards[:1] }), nil, false, ""},
		{"two of one port, one active", up(func(r *report) { r.Forwards[1].LocalPort = 8080 }), []uint16{8080}, false, ""},
		{"two of one port, the other active", up(func(r *report) {
			r.Forwards[0], r.Forwards[1] = r.Forwards[1], r.Forwards[0]
			r.Forwards[0].LocalPort = 8080
		}), []uint16{8080}, false, ""},
		{"not connected yet", up(func(r *report) { r.Connection, r.Forwards = connection{State: connecting}, nil }), nil, false,
			"not connected to the remote host"},
		{"reconnecting", up(func(r *report) {
			r.Connection = connection{State: reconnecting, LastError: "ssh: gone"}
			r.Forwards = r.Forwards[2:]
			r.Forwards[0].Reason = reasonLost
		}), []uint16{3000}, false, "not connected to the remote host: ssh: gone; 127.0.0.1:3000 of node is pending (ssh connection lost, reconnecting)"},
		{"dead", up(func(r *report) { r.Running, r.Stale = false, true }), []uint16{8080}, false, "no instance is running"},
		{"stale", up(func(r *report) { r.Stale = true }), []uint16{8080}, false, "rdhpf (pid 12345) does not answer and may be stopped: kill -CONT 12345 continues it"},
	} {
		if got := strings.Join(missingPorts(c.report, wish{c.ports, c.some}), "; "); got != c.want {
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
		// Without a socket nothing can be verified.
		if err := os.Remove(i.paths().socket); err != nil {
			t.Fatal(err)
		}
		rdhpf(t, dir, "status", "-wait", "1s", "8080").is(t, 1, "", `rdhpf: after 1s: the ports look active, which cannot be verified: .*\n`)
	})
	t.Run("active on old evidence only", func(t *testing.T) {
		dir := stateFolder(t)
		i := startInstanceWith(t, dir, testHost, tableForwards(active, unverified))
		rdhpf(t, dir, "status", "-wait", "1s", "8080").is(t, 1, "", `rdhpf: after 1s: 127\.0\.0\.1:8080 of web is pending \(port not responding\)\n`)
		end := begin(t, dir, "-wait", "25s")
		i.post(tableForwards(active, ""))
		end().is(t, 0, tableActive, "")
	})
	t.Run("until there is one", func(t *testing.T) {
		dir := stateFolder(t)
		i := startInstance(t, dir, testHost)
		i.post(`{"connection": {"state": "connected"}}`)
		rdhpf(t, dir, "status").is(t, 0, `ssh://me@box\.invalid\nNo published ports\.\n`, "")
		rdhpf(t, dir, "status", "-wait", "1s").is(t, 1, "", `rdhpf: after 1s: no port is forwarded, and -wait wants at least one\n`)
		end := begin(t, dir, "-wait", "25s")
		i.post(tableForwards(active, ""))
		end().is(t, 0, tableActive, "")
	})
	t.Run("stopped", func(t *testing.T) {
		dir := stateFolder(t)
		i := startInstance(t, dir, testHost)
		i.signal(syscall.SIGSTOP)
		defer i.signal(syscall.SIGCONT)
		ends := []func() answer{begin(t, dir, "-wait", "1s"), begin(t, dir, "-wait", "6s", "8080")}
		ends[0]().is(t, 1, "", `rdhpf: after 1s: `+muteText+`\n`)
		ends[1]().is(t, 1, "", `rdhpf: after 6s: `+muteText+`\n`)
	})
	t.Run("in vain", func(t *testing.T) {
		live, dead, empty := stateFolder(t), stateFolder(t), stateFolder(t)
		startInstanceWith(t, live, testHost, tableForwards(pending, reasonSilent))
		startInstance(t, dead, testHost).kill()
		ends := []func() answer{begin(t, live, "-wait", "5s", "8080", "9090"), begin(t, dead, "-wait", "5s"), begin(t, empty, "-wait", "5s", "8080")}
		for n, want := range []string{`127\.0\.0\.1:8080 of web is pending \(port not responding\); no container publishes 9090`,
			"no instance is running", `No running instance found for ssh://me@box\.invalid\. .*`} {
			ends[n]().is(t, 1, "", `rdhpf: after 5s: `+want+`\n`)
		}
	})
	t.Run("for no host", func(t *testing.T) {
		rdhpf(t, stateFolder(t), "status", "-wait", "1s").is(t, 1, "", `rdhpf: no instance is running yet: name the one to wait for with -host\n`)
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
	for w.line(w.stderr) != "No running instance found for "+testHost+". Start one with: rdhpf run -host "+testHost {
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
	answer{stdout: block()}.is(t, 0, `(`+tableHead+`abc123def456 .*active[^\n]*|Not connected: connecting for [^\n]*)\n`, "")
	w.cmd.Process.Kill()
	w.rest()
	rdhpf(t, stateFolder(t), "status", "-watch").is(t, 3, "", `No running instance found\. .*`)
}

// terminal is a shell in a tmux of its own.
type terminal struct {
	t      *testing.T
	socket string
}

// openTerminal waits for the shell's prompt. The program is ./rdhpf there, with the instances of dir.
func openTerminal(t *testing.T, dir string, columns, rows int) *terminal {
	t.Helper()
	needTool(t, "tmux")
	needTool(t, "bash")
	script := "#!/bin/sh\nexec env -i PATH=\"$PATH\" TERM=xterm-256color HOME=/nonexistent RDHPF_TEST_MAIN=1 GORACE=atexit_sleep_ms=10 RDHPF_DIR='" +
		dir + "' '" + testExe + "' \"$@\"\n"
	if err := os.WriteFile(filepath.Join(dir, "rdhpf"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	m := &terminal{t, filepath.Join(dir, "tmux")}
	m.tmux("new-session", "-d", "-x", fmt.Sprint(columns), "-y", fmt.Sprint(rows), "cd '"+dir+"' && PS1='prompt> ' HISTFILE= exec bash --norc --noprofile -i")
	t.Cleanup(func() { exec.Command("tmux", "-S", m.socket, "kill-server").Run() })
	m.shows("a prompt", func(s string) bool { return strings.HasPrefix(s, "prompt>") })
	return m
}

// types types a line.
func (m *terminal) types(line string) {
	m.t.Helper()
	m.tmux("send-keys", "-l", line)
	m.tmux("send-keys", "Enter")
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
	dir := stateFolder(t)
	i := startInstance(t, dir, testHost)
	m := openTerminal(t, dir, 100, 12)
	m.tmux("send-keys", "echo earlier; echo work", "Enter")
	m.shows("earlier work", func(s string) bool { return strings.HasSuffix(s, "earlier\nwork\nprompt>") })
	watch := "./rdhpf status -watch; echo status=$?"
	m.tmux("send-keys", watch)
	before := m.shows("the command", func(s string) bool { return strings.HasSuffix(s, watch) })
	m.tmux("send-keys", "Enter")
	head := func(s string) bool {
		lines := strings.Split(s, "\n")
		return len(lines) > 3 && strings.HasPrefix(lines[0], testHost+"  ") && lines[1] == "" && regexp.MustCompile(`^CONTA(INER ID|…) +LOCAL`).MatchString(lines[2]) &&
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

// A reader that has seen enough ends a watch before anything changes.
func TestWatchPipe(t *testing.T) {
	dir := stateFolder(t)
	startInstance(t, dir, testHost)
	for _, args := range [][]string{nil, {"-json"}} {
		cmd := program(dir, append([]string{"status", "-watch"}, args...)...)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
			t.Errorf("%q, %v", line, err)
		}
		out.Close()
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		select {
		case <-ended: // by SIGPIPE, if it was still printing
		case <-time.After(patience):
			t.Errorf("%q: it does not end", args)
			cmd.Process.Kill()
			<-ended
		}
	}
}
