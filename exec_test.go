package main

// Tests of exec.go: what env prints, evaluated by the shells it is for, what run does around a command, as processes, and how
// an instance says that it is ready. The instances are those of status_test.go.

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// withDocker is what an instance posts that serves the engine.
func withDocker(docker, remote string) string {
	return fmt.Sprintf(`{"docker_socket": %s, "remote_docker_socket": %s, %s`, mustJSON(docker), mustJSON(remote), tableForwards(active, "")[1:])
}

var hostileWords = []string{"plain", "/run/user/1000/docker.sock", "unix:///home/me/.rdhpf/a-b_c.docker.sock", "a b", " a  b ", "it's", "''", `"`, `\`, `\\`, `\'`, `a\nb`,
	"a\nb", "a\tb", "$HOME", "$(reboot)", "`reboot`", "a;b", "a&b", "a|b", "*", "?", "[a]", "~", "~/x", "{a,b}", "#a", "a=b", "=a", "!a", "-n", "é", "<a>", "%s", "^a"}

// needShell skips the test where a shell is missing, in CI too.
func needShell(t *testing.T, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("%s is not installed", name)
	}
}

// What is printed for a shell is one word there, whatever it holds.
func TestQuoted(t *testing.T) {
	for _, c := range []struct{ shell, quote, script string }{
		{"sh", `'\''`, `printf '%%s' %s`},
		{"bash", `'\''`, `printf '%%s' %s`},
		{"zsh", `'\''`, `printf '%%s' %s`},
		{"fish", `\'`, `printf '%%s' %s`},
	} {
		t.Run(c.shell, func(t *testing.T) {
			needShell(t, c.shell)
			for _, s := range hostileWords {
				out, err := exec.Command(c.shell, "-c", fmt.Sprintf(c.script, quoted(s, c.quote))).CombinedOutput()
				if err != nil || string(out) != s {
					t.Errorf("%q is written %s: %q, %v", s, quoted(s, c.quote), out, err)
				}
			}
		})
	}
	// Where no such shell is installed, too.
	for in, want := range map[string][2]string{
		"/a-b_c.d:e@f+1": {"/a-b_c.d:e@f+1", "/a-b_c.d:e@f+1"},
		"a b":            {"'a b'", "'a b'"},
		"it's":           {`'it'\''s'`, `'it\'s'`},
		`a\b`:            {`'a\b'`, `'a\\b'`},
		`\'`:             {`'\'\'''`, `'\\\''`},
	} {
		if got := [2]string{quoted(in, `'\''`), quoted(in, `\'`)}; got != want {
			t.Errorf("%s: %q, want %q", in, got, want)
		}
	}
}

func TestToolEnv(t *testing.T) {
	for _, c := range []struct {
		snap snapshot
		want []string
	}{
		{snapshot{DockerSocket: "/d/x.docker.sock", RemoteDockerSocket: "/run/d.sock"}, []string{"unix:///d/x.docker.sock", "127.0.0.1", "/run/d.sock"}},
		{snapshot{DockerSocket: "/d/x.docker.sock"}, []string{"unix:///d/x.docker.sock", "127.0.0.1", "/var/run/docker.sock"}},
	} {
		if got := toolEnv(&c.snap); !slices.Equal(got, c.want) || len(got) != len(toolVars) {
			t.Errorf("%+v: %q, want %q", c.snap, got, c.want)
		}
	}
}

func TestEnvCommand(t *testing.T) {
	dir := stateFolder(t)
	const socket, remote = "/home/o'brien/my files/x.docker.sock", "/run/user/1000/docker.sock"
	i := startInstanceWith(t, dir, testHost, withDocker(socket, remote))
	rdhpf(t, dir, "env").is(t, 0, `export DOCKER_HOST='unix:///home/o'\\''brien/my files/x\.docker\.sock'\nexport TESTCONTAINERS_HOST_OVERRIDE=127\.0\.0\.1\n`+
		`export TESTCONTAINERS_DOCKER_SOCKET_OVERRIDE=/run/user/1000/docker\.sock\n`, "")
	rdhpf(t, dir, "env", "-shell", "fish").is(t, 0, `set -gx DOCKER_HOST 'unix:///home/o\\'brien/my files/x\.docker\.sock'\nset -gx TESTCONTAINERS_HOST_OVERRIDE 127\.0\.0\.1\n`+
		`set -gx TESTCONTAINERS_DOCKER_SOCKET_OVERRIDE /run/user/1000/docker\.sock\n`, "")
	rdhpf(t, dir, "env", "-unset").is(t, 0, `unset DOCKER_HOST TESTCONTAINERS_HOST_OVERRIDE TESTCONTAINERS_DOCKER_SOCKET_OVERRIDE\n`, "")
	rdhpf(t, dir, "env", "-unset", "-shell", "fish").is(t, 0, `set -e DOCKER_HOST TESTCONTAINERS_HOST_OVERRIDE TESTCONTAINERS_DOCKER_SOCKET_OVERRIDE\n`, "")
	var object map[string]string
	if err := json.Unmarshal([]byte(rdhpf(t, dir, "env", "-json", "-host", "me@box.invalid").stdout), &object); err != nil || len(object) != 3 ||
		object["DOCKER_HOST"] != "unix://"+socket || object["TESTCONTAINERS_HOST_OVERRIDE"] != "127.0.0.1" || object["TESTCONTAINERS_DOCKER_SOCKET_OVERRIDE"] != remote {
		t.Errorf("as JSON: %v, %v", object, err)
	}
	for _, shell := range []string{"sh", "bash", "zsh", "fish"} {
		t.Run(shell, func(t *testing.T) {
			needShell(t, shell)
			script := `eval "$("$PROGRAM" env -shell ` + shell + `)"`
			take := `eval "$("$PROGRAM" env -unset -shell ` + shell + `)"`
			if shell == "fish" {
				script, take = `"$PROGRAM" env -shell fish | source`, `"$PROGRAM" env -unset -shell fish | source`
			}
			cmd := program(dir)
			print := `; printenv DOCKER_HOST TESTCONTAINERS_HOST_OVERRIDE TESTCONTAINERS_DOCKER_SOCKET_OVERRIDE; `
			cmd.Path, cmd.Args = must(exec.LookPath(shell)), []string{shell, "-c", script + print + take + print + "true"}
			cmd.Env = append(cmd.Env, "PROGRAM="+testExe, "HOME="+t.TempDir()) // fish writes there
			got := runProgram(t, cmd)
			if want := fmt.Sprintf("unix://%s\n127.0.0.1\n%s\n", socket, remote); got.stdout != want || got.code != 0 {
				t.Errorf("it exports %q, want %q; %d, stderr %q", got.stdout, want, got.code, got.stderr)
			}
		})
	}

	// Before the remote path is known it is waited for, but not where there is no connection that could tell it.
	i.post(withDocker(socket, ""))
	rdhpf(t, dir, "env").is(t, 0, `.*TESTCONTAINERS_DOCKER_SOCKET_OVERRIDE=/var/run/docker\.sock\n`, "")
	i.post(fmt.Sprintf(`{"docker_socket": %q, "connection": {"state": "reconnecting"}}`, socket))
	rdhpf(t, dir, "env").is(t, 0, `.*TESTCONTAINERS_DOCKER_SOCKET_OVERRIDE=/var/run/docker\.sock\n`, "")
	i.kill()
	rdhpf(t, dir, "env").is(t, 3, "", `No running instance found\. [^\n]*\n`)
	rdhpf(t, dir, "env", "-unset").is(t, 0, `unset .*`, "")
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// around runs a command around the instance that is there.
func around(dir, script string) *exec.Cmd {
	return program(dir, "run", "-host", testHost, "-quiet", "--", "sh", "-c", script)
}

// The command has the variables, and not those that would lead docker elsewhere; its exit status is that of the program.
func TestRunAround(t *testing.T) {
	dir := stateFolder(t)
	socket, remote := pathsFor(dir, testHost).docker, "/run/user/1000/docker.sock"
	startInstanceWith(t, dir, testHost, withDocker(socket, remote))
	for _, c := range []struct {
		script         string
		code           int
		stdout, stderr string
	}{
		{"true", 0, "", ""},
		{"exit 7", 7, "", ""},
		{"exit 255", 255, "", ""},
		{"kill -TERM $$", 128 + 15, "", ""},
		{"kill -KILL $$", 128 + 9, "", ""},
		{"echo out; echo err >&2; exit 3", 3, `out\n`, `err\n`},
		{"cat", 0, `typed`, ""},
		{`echo "$DOCKER_HOST $TESTCONTAINERS_HOST_OVERRIDE $TESTCONTAINERS_DOCKER_SOCKET_OVERRIDE"`, 0, `unix://` + socket + ` 127\.0\.0\.1 ` + remote + `\n`, ""},
		{`env | grep -c -e ^DOCKER_HOST= -e ^TESTCONTAINERS_`, 0, `3\n`, ""},
		{`echo "${DOCKER_CONTEXT-none} ${DOCKER_TLS_VERIFY-none} ${DOCKER_CERT_PATH-none} $DOCKER_CONFIG $OTHER"`, 0, `none none none /config kept\n`, ""},
	} {
		t.Run(c.script, func(t *testing.T) {
			cmd := around(dir, c.script)
			cmd.Env = append(cmd.Env, "DOCKER_HOST=ssh://somewhere@else", "DOCKER_CONTEXT=other", "DOCKER_TLS_VERIFY=1", "DOCKER_CERT_PATH=/certs",
				"DOCKER_CONFIG=/config", "OTHER=kept", "TESTCONTAINERS_HOST_OVERRIDE=10.0.0.1")
			cmd.Stdin = strings.NewReader("typed")
			runProgram(t, cmd).is(t, c.code, c.stdout, c.stderr)
		})
	}
	t.Run("status", func(t *testing.T) { // the command in it asks the same instance, and the instance goes on
		cmd := around(dir, `exec "$PROGRAM" status`)
		cmd.Env = append(cmd.Env, "PROGRAM="+testExe, "HOME="+t.TempDir()) // fish writes there
		runProgram(t, cmd).is(t, 0, tableActive, "")
		rdhpf(t, dir, "status", "-host", testHost).is(t, 0, tableActive, "")
	})
	t.Run("cannot be executed", func(t *testing.T) {
		file := filepath.Join(dir, "nonsense")
		if err := os.WriteFile(file, []byte("\x7fnonsense"), 0o700); err != nil {
			t.Fatal(err)
		}
		program := program(dir, "run", "-host", testHost, "-quiet", "--", file)
		runProgram(t, program).is(t, exitNotExecutable, "", `rdhpf: [^\n]*exec format error\n`)
	})
}

// An instance that does not serve the engine leaves DOCKER_HOST as it is.
func TestRunAroundNoDocker(t *testing.T) {
	dir := stateFolder(t)
	startInstance(t, dir, testHost)
	cmd := program(dir, "run", "-host", testHost, "-log-level", "warn", "--", "sh", "-c", `echo "$DOCKER_HOST ${TESTCONTAINERS_HOST_OVERRIDE-none}"`)
	cmd.Env = append(cmd.Env, "DOCKER_HOST=ssh://somewhere@else")
	runProgram(t, cmd).is(t, 0, `ssh://somewhere@else none\n`, `[^\n]*does not serve the engine: DOCKER_HOST stays as it is[^\n]*\n`)
}

// With -wait the command runs once the ports are active, or not at all.
func TestRunAroundWait(t *testing.T) {
	dir := stateFolder(t)
	i := startInstanceWith(t, dir, testHost, withDocker("/x.docker.sock", "/run/d.sock"))
	args := []string{"run", "-host", testHost, "-quiet", "-wait", "10s", "--", "echo", "ran"}
	rdhpf(t, dir, args...).is(t, 0, `ran\n`, "")
	i.post(`{"connection": {"state": "connected"}, "docker_socket": "/x.docker.sock", "remote_docker_socket": "/run/d.sock"}`)
	rdhpf(t, dir, args...).is(t, 0, `ran\n`, "") // it may be the command that starts containers
	i.post(withDocker("/x.docker.sock", "/run/d.sock"))
	i.post(tableForwards(conflict, reasonGivenUp))
	args[5] = "100ms"
	rdhpf(t, dir, args...).is(t, 1, "", `rdhpf: [^\n]*8080[^\n]*(\n  [^\n]*)*\n`)
}

// An instance that cannot connect ends run before the command is run, and says so once.
func TestRunAroundFails(t *testing.T) {
	needTool(t, "ssh")
	port := muxFreePort(t)
	cmd := program(stateFolder(t), "run", "-host", fmt.Sprintf("127.0.0.1:%d", port), "--", "echo", "ran")
	runProgram(t, cmd).is(t, 1, "", `rdhpf: cannot connect to [^\n]*: ssh: [^\n]*Connection refused[^\n]*\n`)
}

// Signals reach the command; what it makes of them is its own matter.
func TestRunAroundSignals(t *testing.T) {
	dir := stateFolder(t)
	startInstanceWith(t, dir, testHost, withDocker("/x.docker.sock", "/run/d.sock"))
	for _, c := range []struct {
		name   string
		sig    syscall.Signal
		script string // says ready once it is
		code   int
		rest   string
	}{
		{"TERM", unix.SIGTERM, `echo ready; exec sleep 60`, 128 + 15, ""},
		{"HUP", unix.SIGHUP, `trap 'echo hung up; exit 4' HUP; echo ready; while :; do sleep 0.01; done`, 4, "hung up\n"},
		{"TERM trapped", unix.SIGTERM, `trap 'echo done; exit 5' TERM; echo ready; while :; do sleep 0.01; done`, 5, "done\n"},
		{"USR1", unix.SIGUSR1, `trap 'echo one; exit 6' USR1; echo ready; while :; do sleep 0.01; done`, 6, "one\n"},
		{"USR2", unix.SIGUSR2, `trap 'echo two; exit 0' USR2; echo ready; while :; do sleep 0.01; done`, 0, "two\n"},
		{"INT without a terminal", unix.SIGINT, `trap 'echo stopped; exit 8' INT; echo ready; while :; do sleep 0.01; done`, 8, "stopped\n"},
		{"QUIT without a terminal", unix.SIGQUIT, `trap 'echo quit; exit 9' QUIT; echo ready; while :; do sleep 0.01; done`, 9, "quit\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := around(dir, c.script)
			cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // without a terminal, wherever the test runs
			cmd.Stderr = os.Stderr
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
			r := bufio.NewReader(out)
			if line, err := r.ReadString('\n'); line != "ready\n" {
				t.Fatalf("it says %q, %v", line, err)
			}
			cmd.Process.Signal(c.sig)
			rest, err := io.ReadAll(r)
			if string(rest) != c.rest || err != nil {
				t.Errorf("then it says %q, %v", rest, err)
			}
			cmd.Wait()
			if got := cmd.ProcessState.ExitCode(); got != c.code {
				t.Errorf("exit status %d, want %d", got, c.code)
			}
		})
	}
}

// execute reports how a command ended as a shell does.
func TestExecute(t *testing.T) {
	for _, c := range []struct {
		script string
		status int // 0: no error
	}{{"exit 0", 0}, {"exit 1", 1}, {"exit 126", 126}, {"kill -INT $$", 130}, {"kill -KILL $$", 137}} {
		err := execute(exec.Command("sh", "-c", c.script), fileLimit(), nil)
		var ended *commandEnd
		if errors.As(err, &ended) != (c.status != 0) || ended != nil && (ended.status != c.status || ended.error != nil) {
			t.Errorf("%s: %v, want %d", c.script, err, c.status)
		}
	}
	var ended *commandEnd
	if err := execute(exec.Command(filepath.Join(t.TempDir(), "none")), fileLimit(), nil); !errors.As(err, &ended) || ended.status != exitNotExecutable || !errors.Is(ended.error, os.ErrNotExist) {
		t.Errorf("nothing to run: %v", err)
	}
	// A signal that came before the start is passed on after it.
	signals := make(chan os.Signal, 1)
	signals <- unix.SIGTERM
	if err := execute(exec.Command("sleep", "60"), fileLimit(), signals); !errors.As(err, &ended) || ended.status != 128+15 {
		t.Errorf("an early signal: %v", err)
	}
}

// notified is a socket that what notify sends arrives at.
func notified(t *testing.T, name string) *net.UnixConn {
	t.Helper()
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetReadDeadline(time.Now().Add(patience))
	return c
}

func heard(t *testing.T, c *net.UnixConn) string {
	t.Helper()
	buf := make([]byte, 4096)
	n, err := c.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	return string(buf[:n])
}

func TestNotify(t *testing.T) {
	path := filepath.Join(muxTempDir(t), "notify")
	names := []string{path}
	if runtime.GOOS == "linux" {
		names = append(names, fmt.Sprintf("@rdhpf-test-%d", os.Getpid()))
	}
	for _, name := range names {
		c := notified(t, name)
		notify(name, "READY=1")
		if got := heard(t, c); got != "READY=1" {
			t.Errorf("%s: %q", name, got)
		}
	}
	notify("", "READY=1")
	notify(path+".none", "READY=1")
	notified(t, path+".full") // who does not read holds nobody up
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 20 {
			notify(path+".full", strings.Repeat("x", 1000))
		}
	}()
	await(t, "the end of notify", done)
}

func TestSayReady(t *testing.T) {
	refused := errors.New("no\nREADY=1")
	for _, c := range []struct {
		name string
		do   func(h *hand)
		says string
	}{
		{"connecting", func(h *hand) {}, "STATUS=ssh://example.com: connecting"},
		{"trying again", func(h *hand) { h.retry = true; h.linkUp(); h.down(h.now, h.link, refused) },
			"STATUS=ssh://example.com: connecting: no READY=1"},
		{"connected, but a second session can still be refused", func(h *hand) { h.linkUp(); h.list() },
			"STATUS=ssh://example.com: connected, 0 of 0 ports active"},
		{"connected", func(h *hand) { h.linkUp(); h.list(); h.following(h.now, h.link) },
			"STATUS=ssh://example.com: connected, 0 of 0 ports active\nREADY=1"},
		{"connected, with -retry", func(h *hand) { h.retry = true; h.linkUp(); h.list() },
			"STATUS=ssh://example.com: connected, 0 of 0 ports active\nREADY=1"},
		{"connected, and events fail", func(h *hand) { h.linkUp(); h.list(); h.engineLost(h.link, false, refused) },
			"STATUS=ssh://example.com: connected, 0 of 0 ports active\nREADY=1"},
		{"its ports are open by then", func(h *hand) {
			h.linkUp()
			h.list(unprobed(ctr(idA, "web", onPort(unusedPort(h.t)))))
			h.following(h.now, h.link)
		}, "STATUS=ssh://example.com: connected, 1 of 1 ports active\nREADY=1"},
		{"lost", func(h *hand) { h.linkUp(); h.list(); h.following(h.now, h.link); h.down(h.now, h.link, refused) },
			"STATUS=ssh://example.com: reconnecting: no READY=1\nREADY=1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := &hand{runner: loopOf(t), t: t, now: epoch}
			path := filepath.Join(muxTempDir(t), "notify")
			socket := notified(t, path)
			h.notify, h.changed, h.retryAt = path, true, epoch.Add(time.Hour)
			c.do(h)
			h.retryAt = epoch.Add(time.Hour)
			h.step(h.now)
			h.changed = true
			h.step(h.now) // the same is not said again
			notify(path, "end")
			var last, got string
			for got = heard(t, socket); got != "end"; got = heard(t, socket) {
				if got == last {
					t.Errorf("twice: %q", got)
				}
				last = got
			}
			if last != c.says {
				t.Errorf("\nsays %q\nwant %q", last, c.says)
			}
		})
	}
}
