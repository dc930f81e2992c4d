package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Tests of an instance's paths, of the folder they are in and of its lock. The
// lock is one of the process, so other holders are other processes: this test
// program, run as TestLockHelper.

func TestHostHash(t *testing.T) {
	name := regexp.MustCompile(`^[A-Za-z0-9_-]{12}$`)
	seen := make(map[string]string)
	unsafe := 0
	for i := 0; i < 500; i++ {
		host := fmt.Sprintf("ssh://user@host%d.example.com", i)
		h := hostHash(host)
		if !name.MatchString(h) {
			t.Errorf("hostHash(%q) = %q, no file name of 12 characters", host, h)
		}
		if h != hostHash(host) || seen[h] != "" {
			t.Errorf("hostHash(%q) = %q, also that of %q", host, h, seen[h])
		}
		seen[h] = host
		if strings.ContainsAny(h, "-_") {
			unsafe++ // these would have + or / in the standard alphabet
		}
	}
	if unsafe == 0 {
		t.Error("no hash shows which alphabet it is in")
	}
	// echo -n ssh://user@example.com | openssl dgst -sha256 -binary | basenc --base64url | cut -c 1-12
	if got, want := hostHash("ssh://user@example.com"), "WHhNu7djKMsZ"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestStateDir(t *testing.T) {
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ env, home, want string }{
		{"", "/home/me", "/home/me/.rdhpf"},
		{"/run/x", "/home/me", "/run/x"},
		{"/run/x", "", "/run/x"},
		{"/run//x/../y/", "", "/run/y"},
		{"rel", "/home/me", filepath.Join(here, "rel")},
		{"", "", ""},
	} {
		got, err := stateDir(func(name string) string { return map[string]string{"RDHPF_DIR": c.env}[name] }, c.home)
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("RDHPF_DIR=%q, home %q: %q, %v, want %q", c.env, c.home, got, err, c.want)
		}
		if err != nil && !strings.Contains(err.Error(), "RDHPF_DIR") {
			t.Errorf("%v: no way out", err)
		}
	}
}

func TestPaths(t *testing.T) {
	p := pathsFor("/d", "ssh://h")
	base := "/d/" + hostHash("ssh://h")
	if p.dir != "/d" || p.lock != base+".lock" || p.state != base+".state.json" || p.socket != base+".sock" ||
		filepath.Dir(p.control) != "/d" || !strings.HasPrefix(p.control, base) {
		t.Errorf("%+v", p)
	}
	seen := make(map[string]bool)
	for _, f := range []string{p.lock, p.state, p.socket, p.control, p.docker, p.engine, p.log} {
		if seen[f] {
			t.Errorf("%s twice", f)
		}
		seen[f] = true
	}
	if q := pathsFor("/d", "ssh://other"); q.lock == p.lock || q.control == p.control {
		t.Error("two hosts share files")
	}
	// ssh_config(5) reads % and, where it is quoted at all, spaces; a hash has neither.
	if strings.ContainsAny(p.control, "% \"") {
		t.Errorf("control path %q", p.control)
	}
}

func TestPathsCheck(t *testing.T) {
	control, socket := 90, 107 // bytes
	if runtime.GOOS != "linux" {
		control, socket = 86, 103
	}
	rest := len(pathsFor("/d", "ssh://h").control) - len("d")
	long := func(control int) paths { return pathsFor("/"+strings.Repeat("d", control-rest), "ssh://h") }
	if n := len(long(control).control); n != control {
		t.Fatalf("test is wrong: %d bytes, want %d", n, control)
	}
	if err := long(control).check(); err != nil {
		t.Errorf("%d bytes: %v", control, err)
	}
	p := long(control + 1)
	err := p.check()
	if err == nil {
		t.Fatalf("%d bytes: no error", control+1)
	}
	for _, want := range []string{p.control, strconv.Itoa(control + 1), strconv.Itoa(control), "RDHPF_DIR"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not say %s", err, want)
		}
	}
	p = pathsFor("/d", "ssh://h")
	p.docker = "/" + strings.Repeat("s", socket)
	if err := p.check(); err == nil || !strings.Contains(err.Error(), p.docker) {
		t.Errorf("socket of %d bytes: %v", socket+1, err)
	}
}

func TestMakeDir(t *testing.T) {
	made := func(mode os.FileMode) func(string) error {
		return func(path string) error { return errors.Join(os.Mkdir(path, 0o700), os.Chmod(path, mode)) }
	}
	for _, c := range []struct {
		name string
		prep func(path string) error
		want string // a part of the error; "": none
	}{
		{"missing", func(string) error { return nil }, ""},
		{"there", made(0o700), ""},
		{"read-only", made(0o500), ""},
		{"open to all", made(0o777), "chmod 700"},
		{"open to the group", made(0o750), "chmod 700"},
		{"others may pass", made(0o701), "chmod 700"},
		{"sticky and open", made(0o777 | os.ModeSticky), "chmod 700"},
		{"a symlink to a good one", func(path string) error {
			return errors.Join(os.Mkdir(path+".real", 0o700), os.Symlink(path+".real", path))
		}, "symbolic link"},
		{"a symlink to nothing", func(path string) error { return os.Symlink(path+".none", path) }, path_},
		{"a symlink to itself", func(path string) error { return os.Symlink(path, path) }, path_},
		{"a file", func(path string) error { return os.WriteFile(path, nil, 0o600) }, path_},
		{"below a file", func(path string) error {
			return errors.Join(os.Remove(filepath.Dir(path)), os.WriteFile(filepath.Dir(path), nil, 0o600))
		}, "RDHPF_DIR"},
	} {
		t.Run(c.name, func(t *testing.T) {
			old := syscall.Umask(0)
			defer syscall.Umask(old)
			path := filepath.Join(t.TempDir(), "a", "state")
			if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := c.prep(path); err != nil {
				t.Fatal(err)
			}
			want := strings.ReplaceAll(c.want, path_, path)
			err := makeDir(path)
			if want != "" {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("error %v, want one with %q", err, want)
				}
				if err != nil && !strings.Contains(err.Error(), "RDHPF_DIR") && !strings.Contains(err.Error(), "chmod") {
					t.Errorf("%v: no way out", err)
				}
				return
			}
			info, statErr := os.Lstat(path)
			if err != nil || statErr != nil || info.Mode().Perm()&0o077 != 0 {
				t.Errorf("%v, %v, %v", err, statErr, info)
			}
		})
	}
}

const path_ = "PATH" // stands for the path of the test's folder

func TestMakeDirParents(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a", "b", "c")
	if err := makeDir(path); err != nil {
		t.Fatal(err)
	}
	if err := makeDir(path); err != nil {
		t.Errorf("the second time: %v", err)
	}
}

func TestCheckDirForeign(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		if err := os.Chown(path, 65534, -1); err != nil {
			t.Fatal(err)
		}
	} else {
		path = "/" // root's, for one
	}
	if err := checkDir(path); err == nil || !strings.Contains(err.Error(), "belongs to uid") || !strings.Contains(err.Error(), "RDHPF_DIR") {
		t.Errorf("error %v, want one that says whose it is", err)
	}
	if err := checkDir(filepath.Join(path, "missing")); err == nil {
		t.Error("no error for what is missing")
	}
}

const lockHelperEnv = "RDHPF_TEST_LOCK"

// TestLockHelper is the other process: it takes the lock, says so and keeps it
// until its stdin ends; or it says why not.
func TestLockHelper(t *testing.T) {
	path := os.Getenv(lockHelperEnv)
	if path == "" {
		t.Skip("only of use to other tests")
	}
	f, err := lockInstance(path)
	var held *heldError
	switch {
	case errors.As(err, &held):
		fmt.Printf("\nlock: held by %d: %v\n", held.pid, err)
	case err != nil:
		fmt.Printf("\nlock: error: %v\n", err)
	default:
		fmt.Printf("\nlock: got\n")
		io.Copy(io.Discard, os.Stdin)
		runtime.KeepAlive(f)
	}
}

// locker is a running TestLockHelper.
type locker struct {
	cmd   *exec.Cmd
	stdin io.Closer
	out   *bufio.Scanner
}

func startLocker(t *testing.T, path string) *locker {
	t.Helper()
	l := &locker{cmd: exec.Command(os.Args[0], "-test.run=^TestLockHelper$", "-test.count=1")}
	l.cmd.Env = append(os.Environ(), lockHelperEnv+"="+path, "GORACE=atexit_sleep_ms=0")
	stdin, err := l.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := l.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	l.stdin, l.out = stdin, bufio.NewScanner(stdout)
	if err := l.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.kill() })
	return l
}

// says returns what the helper says of the lock.
func (l *locker) says(t *testing.T) string {
	t.Helper()
	timer := time.AfterFunc(time.Minute, func() { l.cmd.Process.Kill() })
	defer timer.Stop()
	for l.out.Scan() {
		if s, ok := strings.CutPrefix(l.out.Text(), "lock: "); ok {
			return s
		}
	}
	t.Fatalf("the helper said nothing: %v", l.out.Err())
	return ""
}

func (l *locker) pid() int { return l.cmd.Process.Pid }

func (l *locker) kill() {
	l.cmd.Process.Kill()
	l.cmd.Wait()
}

// end has it end by itself.
func (l *locker) end() {
	l.stdin.Close()
	l.cmd.Wait()
}

func TestLockInstance(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.lock")
	first := startLocker(t, path)
	if s := first.says(t); s != "got" {
		t.Fatalf("first: %s", s)
	}
	before, err := os.Lstat(path)
	if err != nil || before.Mode().Perm() != 0o600 {
		t.Fatalf("lock file: %v, %v", before, err)
	}
	want := fmt.Sprintf("held by %d: ", first.pid())
	for i := 0; i < 2; i++ { // the first loser must not have released it
		if s := startLocker(t, path).says(t); !strings.HasPrefix(s, want) || !strings.Contains(s, "another rdhpf is running") {
			t.Fatalf("the loser says %q, want %q…", s, want)
		}
	}
	// This process is a loser as well.
	_, err = lockInstance(path)
	var held *heldError
	if !errors.As(err, &held) || held.pid != first.pid() || !strings.Contains(err.Error(), strconv.Itoa(first.pid())) {
		t.Errorf("error %v, want one that names pid %d", err, first.pid())
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if pid, is, err := lockHolder(f); pid != first.pid() || !is || err != nil {
		t.Errorf("lockHolder: %d, %v, %v, want %d", pid, is, err, first.pid())
	}
	after, err := os.Lstat(path)
	if err != nil || !os.SameFile(before, after) || !after.ModTime().Equal(before.ModTime()) || after.Size() != before.Size() {
		t.Errorf("the losers touched the file: %v, then %v, %v", before, after, err)
	}
	// Killed, it is free when the process is gone; the file stays.
	first.kill()
	if pid, is, err := lockHolder(f); is || err != nil {
		t.Errorf("lockHolder after kill: %d, %v, %v", pid, is, err)
	}
	f.Close()
	second := startLocker(t, path)
	if s := second.says(t); s != "got" {
		t.Fatalf("after kill -9: %s", s)
	}
	second.end()
	after, err = os.Lstat(path)
	if err != nil || !os.SameFile(before, after) {
		t.Errorf("the lock file was replaced or removed: %v", err)
	}
	mine, err := lockInstance(path)
	if err != nil {
		t.Fatalf("after its end: %v", err)
	}
	if s := startLocker(t, path).says(t); !strings.HasPrefix(s, fmt.Sprintf("held by %d: ", os.Getpid())) {
		t.Errorf("the loser says %q, want pid %d", s, os.Getpid())
	}
	mine.Close()
	if s := startLocker(t, path).says(t); s != "got" {
		t.Errorf("after Close: %s", s)
	}
}

// To ask who holds the lock does not release it, not even where the holder asks: closing any descriptor of the file would.
func TestLockedBy(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.lock")
	is := func(what string, pid int, held bool) {
		t.Helper()
		if gotPID, got, err := lockedBy(path); gotPID != pid || got != held || err != nil {
			t.Errorf("%s: %d, %v, %v, want %d, %v", what, gotPID, got, err, pid, held)
		}
	}
	is("no file", 0, false)
	mine, err := lockInstance(path)
	if err != nil {
		t.Fatal(err)
	}
	defer mine.Close()
	want := fmt.Sprintf("held by %d: ", os.Getpid())
	for range 2 {
		is("held here", os.Getpid(), true)
		if s := startLocker(t, path).says(t); !strings.HasPrefix(s, want) {
			t.Fatalf("after the holder has asked, another process says %q, want %q…", s, want)
		}
	}
	mine.Close()
	is("released", 0, false)
	other := startLocker(t, path)
	if s := other.says(t); s != "got" {
		t.Fatal(s)
	}
	is("held elsewhere", other.pid(), true)
	other.end()
	is("free again", 0, false)
}

// Of those started together exactly one wins, and the others name it.
func TestLockTogether(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.lock")
	for round := 0; round < 5; round++ {
		var all []*locker
		for i := 0; i < 4; i++ {
			all = append(all, startLocker(t, path))
		}
		winner, losers := 0, []string{}
		for _, l := range all {
			if s := l.says(t); s != "got" {
				losers = append(losers, s)
			} else if winner != 0 {
				t.Fatalf("pids %d and %d both have the lock", winner, l.pid())
			} else {
				winner = l.pid()
			}
		}
		for _, s := range losers {
			if !strings.HasPrefix(s, fmt.Sprintf("held by %d: ", winner)) {
				t.Errorf("a loser says %q, the winner is %d", s, winner)
			}
		}
		for _, l := range all {
			l.end()
		}
	}
}

func TestLockRefuses(t *testing.T) {
	for _, c := range []struct {
		name string
		prep func(path string) error
	}{
		{"a symlink", func(path string) error {
			return errors.Join(os.WriteFile(path+".real", nil, 0o600), os.Symlink(path+".real", path))
		}},
		{"a symlink to nothing", func(path string) error { return os.Symlink(path+".none", path) }},
		{"a directory", func(path string) error { return os.Mkdir(path, 0o700) }},
		{"no directory to be in", func(path string) error { return os.Remove(filepath.Dir(path)) }},
	} {
		path := filepath.Join(t.TempDir(), "d", "x.lock")
		if err := errors.Join(os.Mkdir(filepath.Dir(path), 0o700), c.prep(path)); err != nil {
			t.Fatal(err)
		}
		f, err := lockInstance(path)
		var held *heldError
		if err == nil || errors.As(err, &held) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: error %v, want one that names the path", c.name, err)
		}
		if f != nil {
			f.Close()
		}
		if _, err := os.Lstat(path + ".none"); err == nil {
			t.Errorf("%s: a file was made through it", c.name)
		}
	}
}

func TestHeldError(t *testing.T) {
	const ways = " (rdhpf status shows what it is doing, rdhpf stop stops it)"
	for pid, want := range map[int]string{4242: "another rdhpf is running for this host: pid 4242" + ways,
		0: "another rdhpf is running for this host" + ways, -1: "another rdhpf is running for this host" + ways} {
		if got := (&heldError{pid}).Error(); got != want {
			t.Errorf("pid %d: %q, want %q", pid, got, want)
		}
	}
}

func TestSweepDir(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	make := func(host string, age time.Duration) paths {
		p := pathsFor(dir, host)
		for _, path := range []string{p.lock, p.state, p.log, p.log + ".1"} {
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chtimes(path, now.Add(-age), now.Add(-age)); err != nil {
				t.Fatal(err)
			}
		}
		return p
	}
	gone, recent, used, held := make("ssh://gone", goneAfter+time.Hour), make("ssh://recent", time.Hour), make("ssh://used", goneAfter+time.Hour), make("ssh://held", goneAfter+time.Hour)
	if err := os.Chtimes(used.state, now, now); err != nil {
		t.Fatal(err)
	}
	if l := startLocker(t, held.lock); l.says(t) != "got" {
		t.Fatal("the lock was not taken")
	}
	sweepDir(dir, now)
	for _, c := range []struct {
		p    paths
		left bool
	}{{gone, false}, {recent, true}, {used, true}, {held, true}} {
		for _, path := range []string{c.p.lock, c.p.state, c.p.log, c.p.log + ".1"} {
			if _, err := os.Lstat(path); (err == nil) != c.left {
				t.Errorf("%s: %v, want it left: %v", path, err, c.left)
			}
		}
	}
}
