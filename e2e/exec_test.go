//go:build linux

package e2e

// exec_test.go: `rdhpf run -- COMMAND` and `rdhpf env`.

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// around runs a command in the run, until it ends.
func (p *runProc) around(command ...string) (stdout, stderr string, code int) {
	p.t.Helper()
	return p.rdhpf(p.aroundArgs(command...)...)
}

func (p *runProc) aroundArgs(command ...string) []string {
	return append(append(p.args[:len(p.args):len(p.args)], "--"), command...)
}

// startAround starts it with a shell script, in a session of its own: a terminal that the
// tests may have sends no signals there.
func (p *runProc) startAround(script string, args ...string) {
	p.t.Helper()
	needTool(p.t, "setsid")
	p.wrap = []string{"setsid"}
	p.args = p.aroundArgs(append([]string{"sh", "-c", script, "sh"}, args...)...)
	p.start()
}

// ranTo waits until the run has ended with this status, and has left nothing.
func (p *runProc) ranTo(code int) {
	p.t.Helper()
	p.exits(code)
	p.leftNothing()
}

func TestE2EExec(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 1)
	b := g.boot(t, port)
	b.listening()

	t.Run("status, input and output", func(t *testing.T) {
		p := newRun(t, g, "", "-quiet")
		cmd := exec.Command(program, p.aroundArgs("sh", "-c", `cat; echo "to stderr" >&2; exit 7`)...)
		cmd.Env, cmd.Stdin = p.environment(), strings.NewReader("from stdin\n")
		var out, errs strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &errs
		if err := cmd.Run(); err != nil && !errors.As(err, new(*exec.ExitError)) {
			t.Fatal(err)
		}
		if out.String() != "from stdin\n" || errs.String() != "to stderr\n" || cmd.ProcessState.ExitCode() != 7 {
			t.Errorf("%q, %q, %v", out.String(), errs.String(), cmd.ProcessState)
		}
		p.leftNothing()
	})
	t.Run("the engine and its ports", func(t *testing.T) {
		p := newRun(t, g, "")
		out, errs, code := p.around("sh", "-c", fmt.Sprintf(`docker ps --format '{{.Names}}'; curl -sS http://127.0.0.1:%d/
			docker run -d --name twin -p %d:80 %s -name twin; nc -z 127.0.0.1 %[2]d; echo "nc: $?"; docker rm -f twin
			env | grep -E '^(DOCKER|TESTCONTAINERS)_' | sort`, port, freePorts(t, 1), g.env["RIG_IMAGE"]))
		want := b.name + "\n" + b.greeting + "ID\nnc: 0\ntwin\nDOCKER_HOST=unix://" + p.engineSocket() +
			"\nTESTCONTAINERS_DOCKER_SOCKET_OVERRIDE=" + g.env["RIG_DOCKER"] + "\nTESTCONTAINERS_HOST_OVERRIDE=127.0.0.1\n"
		if masked(out) != want || code != 0 {
			t.Errorf("%q, %q, exit %d; want %q", out, errs, code, want)
		}
		if !strings.Contains(errs, "connected to ssh://"+p.host) {
			t.Errorf("its own messages are not on stderr: %q", errs)
		}
		p.leftNothing()
		if err := refused(port); err != nil {
			t.Error(err)
		}
	})
	t.Run("a variable of docker's does not win", func(t *testing.T) {
		p := newRun(t, g, "", "-quiet")
		out, errs, code := p.rdhpfWith([]string{"DOCKER_HOST=tcp://127.0.0.1:1", "DOCKER_CONTEXT=missing", "DOCKER_TLS_VERIFY=1"},
			p.aroundArgs("docker", "ps", "--format", "{{.Names}}")...)
		if out != b.name+"\n" || errs != "" || code != 0 {
			t.Errorf("%q, %q, exit %d", out, errs, code)
		}
		p.leftNothing()
	})
	t.Run("ended by a signal", func(t *testing.T) {
		p := newRun(t, g, "", "-quiet")
		if _, errs, code := p.around("sh", "-c", "kill -KILL $$"); errs != "" || code != 128+9 {
			t.Errorf("%q, exit %d", errs, code)
		}
		p.leftNothing()
	})
	t.Run("no such command", func(t *testing.T) {
		p := newRun(t, g, "")
		if out, errs, code := p.around("no-such-command"); out != "" || !strings.Contains(errs, "no-such-command") || code != 127 {
			t.Errorf("%q, %q, exit %d", out, errs, code)
		}
		p.leftNothing()
	})
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1} {
		t.Run(sig.String()+" is passed on", func(t *testing.T) {
			p := newRun(t, g, "", "-quiet")
			p.startAround(fmt.Sprintf(`trap 'echo caught >&2; exit 9' %d; echo begun >&2; while :; do sleep 0.1; done`, sig))
			p.waitLine("begun")
			if p.signal(sig); p.log() != "begun" {
				p.waitLine("caught")
			}
			p.ranTo(9)
		})
	}
	t.Run("a signal that ends the command", func(t *testing.T) {
		p := newRun(t, g, "", "-quiet")
		p.startAround(`echo begun >&2; exec sleep 1000`)
		p.waitLine("begun")
		p.signal(syscall.SIGTERM)
		p.ranTo(128 + 15)
	})
}

func TestE2EExecCannotConnect(t *testing.T) {
	g := needRig(t)
	ran := filepath.Join(t.TempDir(), "ran")
	notRun := func(t *testing.T) {
		t.Helper()
		if _, err := os.Lstat(ran); err == nil {
			t.Error("the command was run")
		}
	}
	for suffix, says := range map[string]string{"-refused": "Connection refused", "-badkey": "Permission denied (publickey", "-unresolvable": "Could not resolve hostname"} {
		t.Run(suffix[1:], func(t *testing.T) {
			for _, flags := range [][]string{nil, {"-quiet"}} {
				p := newRun(t, g, suffix, flags...)
				out, errs, code := p.around("touch", ran)
				if out != "" || !strings.Contains(errs, "rdhpf: ") || !strings.Contains(errs, says) || code != 1 {
					t.Errorf("%v: %q, %q, exit %d; want %q", flags, out, errs, code, says)
				}
				if flags != nil && strings.Count(errs, "\n") != 1 {
					t.Errorf("more than one line with -quiet: %q", errs)
				}
				notRun(t)
				p.leftNothing()
			}
		})
	}
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		t.Run(sig.String()+" while connecting", func(t *testing.T) {
			p := newRun(t, g, "-silent")
			p.startAround(`: >"$1"`, ran)
			eventually(t, "ssh is started", func() error {
				if len(children(p.cmd.Process.Pid)) == 0 {
					return errors.New("it is not")
				}
				return nil
			})
			p.signal(sig)
			p.ranTo(128 + int(sig))
			notRun(t)
		})
	}
}

// In a terminal, its keys mean what they mean for the command alone.
func TestE2EExecTerminal(t *testing.T) {
	needTool(t, "bash")
	g := needRig(t)
	p := newRun(t, g, "", "-quiet")
	cmd := exec.Command("bash", "--norc", "--noprofile", "-i")
	cmd.Env = append(p.environment(), "PS1=prompt> ", "HISTFILE=", "TERM=dumb")
	x := openTerminal(t, cmd)
	x.shows("prompt> ")
	// Read is interrupted by each signal, so none is hidden by another.
	x.types(fmt.Sprintf("'%s' run -quiet -host '%s' -- bash -c '"+
		`trap "echo inter""rupted" INT; test -t 0 -a -t 1 -a -t 2 && echo a termi""nal; while :; do if read -r x; then case $x in quit) exit 5;; *) echo "got <$x>";; esac; fi; done'`+"\r",
		program, p.host))
	x.shows("a terminal")
	x.types("hello\r")
	x.shows("got <hello>")
	for range 3 {
		x.types("\x03")
		x.shows("interrupted")
	}
	x.types("still here\r")
	x.shows("got <still here>")
	if n := strings.Count(x.text(), "interrupted"); n != 3 {
		t.Errorf("three Ctrl-C reached the command %d times: %q", n, x.text())
	}
	x.types("\x1a")
	x.shows("prompt> ")
	x.types("jobs; echo in the sh''ell\r")
	x.shows("Stopped")
	x.shows("in the shell")
	x.types("fg\r")
	x.shows("run -quiet")
	x.types("and again\r")
	x.shows("got <and again>")
	x.types("\x03")
	x.shows("interrupted")
	x.types("quit\r")
	x.shows("prompt> ")
	x.types("echo status=$?\r")
	x.shows("status=5\r\n")
	x.types("exit\r")
	x.ends()
	p.leftNothing()
}

func TestE2EExecWait(t *testing.T) {
	g := needRig(t)
	t.Run("until active", func(t *testing.T) {
		port := freePorts(t, 1)
		b := g.boot(t, port, "-after", "1s")
		p := newRun(t, g, "", "-quiet", "-wait", "30s")
		out, errs, code := p.around("curl", "-sS", fmt.Sprintf("http://127.0.0.1:%d/", port))
		if out != b.greeting || errs != "" || code != 0 {
			t.Errorf("%q, %q, exit %d", out, errs, code)
		}
		p.leftNothing()
	})
	t.Run("in vain", func(t *testing.T) {
		port := freePorts(t, 1)
		b := g.boot(t, port, "-mode", "none")
		ran := filepath.Join(t.TempDir(), "ran")
		p := newRun(t, g, "", "-wait", "1s")
		out, errs, code := p.around("touch", ran)
		if out != "" || !strings.Contains(errs, b.name) || !strings.Contains(errs, reasonSilent) || code != 1 {
			t.Errorf("%q, %q, exit %d", out, errs, code)
		}
		t.Logf("it says: %s", errs)
		if _, err := os.Lstat(ran); err == nil {
			t.Error("the command was run")
		}
		p.leftNothing()
		if _, errs, code := newRun(t, g, "", "-quiet").around("true"); code != 0 {
			t.Errorf("without -wait: %q, exit %d", errs, code)
		}
	})
}

// An instance that runs already is used, and left running; the last one to leave ends it.
func TestE2EExecShared(t *testing.T) {
	g := needRig(t)
	t.Run("an instance", func(t *testing.T) {
		port := freePorts(t, 1)
		b := g.boot(t, port)
		p := startRun(t, g, "")
		b.answers(port)
		master := p.masterPid()
		other := p.another()
		out, errs, code := other.around("docker", "ps", "--format", "{{.Names}}")
		if out != b.name+"\n" || code != 0 || !strings.Contains(errs, fmt.Sprintf("using the rdhpf that runs already (pid %d)", p.cmd.Process.Pid)) {
			t.Errorf("%q, %q, exit %d", out, errs, code)
		}
		if err := b.answering(port); err != nil || p.masterPid() != master {
			t.Errorf("the instance was not left alone: %v", err)
		}
		p.never("connection lost")
		dockerAt(t, p.engineSocket()).must("ps")
	})
	t.Run("an instance that ends", func(t *testing.T) {
		port := freePorts(t, 1)
		b := g.boot(t, port)
		p := startRun(t, g, "")
		b.answers(port)
		other := p.another()
		other.startAround("echo begun >&2; read -r x <\"$1\"", makeFIFO(t))
		other.waitLine("begun")
		p.signal(syscall.SIGTERM)
		p.exits(0)
		other.waitLine("connected to ssh://" + p.host)
		b.answers(port)
		dockerAt(t, p.engineSocket()).must("ps")
		tell(t, other.args[len(other.args)-1])
		other.ranTo(0)
	})
	t.Run("five at once", func(t *testing.T) {
		b := g.boot(t, freePorts(t, 1))
		first := newRun(t, g, "", "-quiet")
		said := make(chan string, 5)
		for range cap(said) {
			go func() {
				// When the one that has the instance ends, another takes over, and meanwhile there is none.
				out, errs, code := first.around("sh", "-c", "for i in $(seq 100); do docker ps --format '{{.Names}}' 2>/dev/null && exit; sleep 0.1; done; exit 1")
				said <- fmt.Sprintf("%s%sexit %d", out, errs, code)
			}()
		}
		for range cap(said) {
			if got := <-said; got != b.name+"\nexit 0" {
				t.Errorf("one of them: %q", got)
			}
		}
		first.leftNothing()
	})
	t.Run("two commands", func(t *testing.T) {
		port := freePorts(t, 1)
		b := g.boot(t, port)
		first := newRun(t, g, "")
		second := first.another()
		script := `echo begun >&2; read -r x <"$1"; docker ps --format '{{.Names}}' >&2; exit 4`
		ends, goes := makeFIFO(t), makeFIFO(t)
		first.startAround(script, ends)
		first.waitLine("begun")
		second.startAround(script, goes)
		second.waitLine("begun")
		second.waitLine("using the rdhpf that runs already")
		tell(t, ends)
		first.exits(4)
		first.waitLine(b.name)
		second.waitLine("connected to ssh://" + first.host)
		b.answers(port)
		tell(t, goes)
		second.ranTo(4)
		second.waitLine(b.name)
	})
}

// makeFIFO makes a named pipe that a script can wait at.
func makeFIFO(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// tell lets the script go on that waits at a pipe.
func tell(t *testing.T, path string) {
	t.Helper()
	eventually(t, "the script waits", func() error {
		f, err := os.OpenFile(path, os.O_WRONLY|syscall.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.WriteString("go\n")
		return err
	})
}

func TestE2EEnv(t *testing.T) {
	g := needRig(t)
	t.Run("no instance", func(t *testing.T) {
		p := newRun(t, g, "")
		for _, args := range [][]string{{"env"}, {"env", "-host", p.host}, {"env", "-json"}} {
			if out, errs, code := p.rdhpf(args...); out != "" || errs == "" || code != 3 {
				t.Errorf("%q: %q, %q, exit %d", args, out, errs, code)
			}
		}
	})
	p := startRun(t, g, "")
	b := g.boot(t, freePorts(t, 1))
	eventually(t, "there is a forward", func() error {
		if len(p.status().Forwards) == 0 {
			return errors.New("there is none")
		}
		return nil
	})
	sh := func(t *testing.T, script string) (out string) {
		t.Helper()
		cmd := exec.Command("sh", "-c", script, "sh", program)
		cmd.Env = p.environment()
		b, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, b)
		}
		return string(b)
	}
	t.Run("in a shell", func(t *testing.T) {
		out := sh(t, `eval "$("$1" env)" && docker ps --format '{{.Names}}' && "$1" status | grep -c "$(docker ps -q)" && echo "$DOCKER_HOST" &&
			eval "$("$1" env -unset)" && echo "${DOCKER_HOST-unset} ${TESTCONTAINERS_HOST_OVERRIDE-unset} ${TESTCONTAINERS_DOCKER_SOCKET_OVERRIDE-unset}"`)
		if want := b.name + "\n1\nunix://" + p.engineSocket() + "\nunset unset unset\n"; out != want {
			t.Errorf("%q, want %q", out, want)
		}
	})
	t.Run("json", func(t *testing.T) {
		var got map[string]string
		if err := json.Unmarshal([]byte(sh(t, `"$1" env -json`)), &got); err != nil || len(got) != 3 || got["DOCKER_HOST"] != "unix://"+p.engineSocket() {
			t.Errorf("%v, %v", got, err)
		}
	})
	t.Run("DOCKER_HOST is the socket", func(t *testing.T) {
		env := []string{"DOCKER_HOST=unix://" + p.engineSocket()}
		asked := func(want int, args ...string) (out string) {
			t.Helper()
			out, errs, code := p.rdhpfWith(env, args...)
			if code != want {
				t.Errorf("%q: %q, %q, exit %d, want %d", args, out, errs, code, want)
			}
			return out + errs
		}
		var r report
		if err := json.Unmarshal([]byte(asked(0, "status", "-json")), &r); err != nil || r.PID != p.cmd.Process.Pid || r.Source != "socket" {
			t.Errorf("status: %+v, %v", r, err)
		}
		asked(0, "status", "-wait", "20s")
		asked(0, "health")
		asked(0, "pause")
		if r := p.status(); len(r.Forwards) != 1 || r.Forwards[0].Reason != "paused" {
			t.Errorf("after pause: %+v", r.Forwards)
		}
		asked(0, "resume")
		asked(0, "reload")
		if out := asked(0, "env"); !strings.Contains(out, p.engineSocket()) {
			t.Errorf("env: %q", out)
		}
		if out := asked(1, "run"); !strings.Contains(out, fmt.Sprintf("another rdhpf is running for this host: pid %d", p.cmd.Process.Pid)) {
			t.Errorf("run: %q", out)
		}
		if out := asked(0, "run", "-quiet", "--", "docker", "ps", "--format", "{{.Names}}"); out != b.name+"\n" {
			t.Errorf("run -- docker ps: %q", out)
		}
		asked(0, "stop")
		p.ranTo(0)
		for _, command := range []string{"status", "health", "env", "run"} { // nothing tells whose it was
			if out, errs, code := p.rdhpfWith(env, command); out != "" || code == 0 || !strings.Contains(errs, "use -host") {
				t.Errorf("%s after stop: %q, %q, exit %d", command, out, errs, code)
			}
		}
	})
}
