package e2e

// engine_test.go: the engine's socket. The docker CLI has to say the same through it as
// at the engine's own.

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// commandTime is the longest a docker command may take.
const commandTime = 3 * time.Minute

// engineSocket is where the run serves the engine.
func (p *runProc) engineSocket() string {
	return strings.TrimSuffix(p.paths().lock, ".lock") + ".docker.sock"
}

// docker is the CLI at a socket.
type docker struct {
	t      *testing.T
	socket string

	program string
	script  strings.Builder // what was run, and what came of it
}

func dockerAt(t *testing.T, socket string) *docker {
	return &docker{t: t, socket: socket, program: "docker"}
}

// command prepares a command that ctx ends.
func (d *docker) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, d.program, append([]string{"-H", "unix://" + d.socket}, args...)...)
	cmd.Env = d.environment()
	cmd.WaitDelay = patience
	return cmd
}

func (d *docker) environment() (env []string) {
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "DOCKER_") {
			env = append(env, e)
		}
	}
	return append(env, "DOCKER_CONFIG="+filepath.Join(os.TempDir(), "no-docker-config"), "DOCKER_BUILDKIT=0")
}

// do runs a command and notes it in the script.
func (d *docker) do(args ...string) (stdout string) {
	d.t.Helper()
	return d.doWith(nil, nil, args...)
}

// doWith does so with an input and more in the environment.
func (d *docker) doWith(stdin io.Reader, env []string, args ...string) string {
	d.t.Helper()
	stdout, stderr, code := d.run(stdin, env, args...)
	fmt.Fprintf(&d.script, "$ docker %s\n%s[stderr] %s[exit %d]\n", strings.Join(args, " "), stdout, stderr, code)
	return stdout
}

// run runs a command, whatever comes of it.
func (d *docker) run(stdin io.Reader, env []string, args ...string) (stdout, stderr string, code int) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), commandTime)
	defer cancel()
	cmd := d.command(ctx, args...)
	cmd.Env = append(cmd.Env, env...)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &errs
	if err := cmd.Run(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		d.t.Fatalf("docker %q: %v", args, err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// must runs a command that has to succeed.
func (d *docker) must(args ...string) string {
	d.t.Helper()
	stdout, stderr, code := d.run(nil, nil, args...)
	if code != 0 {
		d.t.Fatalf("docker %q: exit %d: %s", args, code, stderr)
	}
	return strings.TrimSpace(stdout)
}

// following is a command that runs until it is told to end.
type following struct {
	t    *testing.T
	cmd  *exec.Cmd
	done chan struct{}
	mu   sync.Mutex
	out  bytes.Buffer
}

func (f *following) Write(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.out.Write(b)
}

func (f *following) text() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.out.String()
}

// follow starts a command, which the end of the test kills.
func (d *docker) follow(args ...string) *following {
	d.t.Helper()
	f := &following{t: d.t, done: make(chan struct{})}
	f.cmd = d.command(context.Background(), args...)
	f.cmd.Stdout, f.cmd.Stderr = f, f
	if err := f.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	go func() {
		defer close(f.done)
		f.cmd.Wait()
	}()
	d.t.Cleanup(f.kill)
	return f
}

func (f *following) kill() {
	f.cmd.Process.Kill()
	<-f.done
}

// shows waits until the command has printed text.
func (f *following) shows(text string) {
	f.t.Helper()
	eventually(f.t, fmt.Sprintf("%q is printed", text), func() error {
		if out := f.text(); !strings.Contains(out, text) {
			return fmt.Errorf("there is %q", out)
		}
		return nil
	})
}

// ends waits until it has ended by itself.
func (f *following) ends() (code int) {
	f.t.Helper()
	select {
	case <-f.done:
	case <-time.After(2 * patience):
		f.t.Fatalf("%q does not end: %q", f.cmd.Args, f.text())
	}
	return f.cmd.ProcessState.ExitCode()
}

// masks are what differs from one run to the next.
var masks = []struct {
	what *regexp.Regexp
	with string
}{
	{regexp.MustCompile(`\b[0-9a-f]{64}\b`), "ID"},
	{regexp.MustCompile(`\b[0-9a-f]{12}\b`), "ID"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\d[T ][\d:.]+(Z| ?[+-]\d\d:?\d\d)?`), "TIME"},
	{regexp.MustCompile(`(Less than a second|About an? \w+|\d+ (second|minute|hour)s?)( ago)?`), "AGE"},
	{regexp.MustCompile(`\b172\.\d+\.\d+\.\d+\b`), "ADDRESS"},
	{regexp.MustCompile(`\b02:42(:[0-9a-f]{2}){4}\b`), "MAC"},
	{regexp.MustCompile(`"Pid": ?\d+`), "PID"},
	{regexp.MustCompile(`(?m)^\d+ +/server`), "PID /server"},
	{regexp.MustCompile(`\b1\d{9}\b`), "SECONDS"},
	{regexp.MustCompile(` {2,}`), " "},
}

func masked(s string) string {
	for _, m := range masks {
		s = m.what.ReplaceAllString(s, m.with)
	}
	return s
}

// alike plays a scenario first at the engine's own socket, then through the run's, and
// fails where they differ. The scenario has to leave nothing.
func (p *runProc) alike(t *testing.T, scenario func(d *docker)) {
	t.Helper()
	own, through := dockerAt(t, p.rig.env["RIG_DOCKER"]), dockerAt(t, p.engineSocket())
	scenario(own)
	scenario(through)
	want, got := strings.Split(masked(own.script.String()), "\n"), strings.Split(masked(through.script.String()), "\n")
	for i := range max(len(want), len(got)) {
		if i >= len(want) || i >= len(got) || want[i] != got[i] {
			t.Fatalf("line %d differs.\nThe engine itself:\n%s\nThrough rdhpf:\n%s", i+1, strings.Join(want[max(0, i-5):min(i+5, len(want))], "\n"),
				strings.Join(got[max(0, i-5):min(i+5, len(got))], "\n"))
		}
	}
	t.Logf("%d lines are the same", len(want))
}

// away removes a container, if it is there.
func (d *docker) away(name string) { d.run(nil, nil, "rm", "-f", "-v", name) }

// The docker CLI says the same through rdhpf as to the engine itself.
func TestE2EDockerCLI(t *testing.T) {
	g := needRig(t)
	image := g.env["RIG_IMAGE"]
	p := startRun(t, g, "")
	// Beside the engine's own socket, a port of the same number is free: it is in another namespace.
	port := freePorts(t, 1)
	publish := fmt.Sprintf("%d:80", port)
	t.Cleanup(func() { dockerAt(t, g.env["RIG_DOCKER"]).away("twin") })
	start := func(d *docker, args ...string) { d.do(append([]string{"run", "-d", "--name", "twin"}, args...)...) }

	t.Run("life of a container", func(t *testing.T) {
		p.alike(t, func(d *docker) {
			start(d, "-p", publish, "--label", "a=b", image, "-name", "twin")
			d.do("ps")
			d.do("ps", "-a", "--no-trunc")
			d.do("ps", "--format", "{{json .Ports}} {{.Labels}}")
			d.do("port", "twin")
			d.do("inspect", "--format", "{{json .Config}} {{json .NetworkSettings.Ports}} {{json .State}}", "twin")
			d.do("top", "twin", "-o", "pid,args")
			d.do("top", "twin", "-o", "args")
			d.do("pause", "twin")
			d.do("ps")
			d.do("exec", "twin", "/server", "cat")
			d.do("unpause", "twin")
			d.do("rename", "twin", "twin2")
			d.do("rename", "twin2", "twin")
			d.do("update", "--memory", "64m", "--memory-swap", "64m", "twin")
			d.do("network", "create", "twins")
			d.do("network", "connect", "twins", "twin")
			d.do("network", "rm", "twins")
			d.do("network", "disconnect", "twins", "twin")
			d.do("network", "rm", "twins")
			d.do("diff", "twin")
			d.do("kill", "-s", "USR1", "twin")
			d.do("stop", "twin")
			d.do("ps", "-a")
			d.do("start", "twin")
			d.do("restart", "twin")
			d.do("kill", "twin")
			d.do("wait", "twin")
			d.do("rm", "twin")
			start(d, image, "-mode", "none")
			d.do("rm", "twin")
			d.do("rm", "-f", "twin")
			d.do("ps", "-aq")
		})
	})
	t.Run("what there is", func(t *testing.T) {
		p.alike(t, func(d *docker) {
			d.do("version")
			d.do("images", "--digests")
			d.do("image", "inspect", image)
			d.do("history", image)
			d.do("network", "ls")
			d.do("volume", "create", "twin")
			d.do("volume", "ls")
			d.do("volume", "rm", "twin")
			d.do("info", "--format", "{{.ServerVersion}} {{.Driver}} {{.ContainersRunning}} {{.Images}} {{.Name}}")
		})
	})
	t.Run("errors", func(t *testing.T) {
		p.alike(t, func(d *docker) {
			d.do("inspect", "missing")
			d.do("container", "inspect", "missing")
			d.do("start", "missing")
			d.do("rm", "-f", "missing")
			d.do("logs", "missing")
			d.do("logs", "-f", "missing")
			d.do("exec", "-it", "missing", "x")
			d.do("cp", "missing:/x", "-")
			d.do("run", "--rm", "--pull", "never", "missing:image")
			d.do("run", "--rm", "--name", "other", "--entrypoint", "/missing", image)
			d.do("run", "--rm", "-p", "notaport:80", image)
			d.do("network", "connect", "missing", "missing")
			start(d, "-p", publish, image)
			d.do("run", "--rm", "--name", "twin", image)
			d.do("run", "--rm", "--name", "other", "-p", publish, image)
			d.do("exec", "twin", "/missing")
			d.do("attach", "--no-stdin", "--sig-proxy=false", "missing")
			d.do("rm", "-f", "twin")
		})
	})
	t.Run("standard input and output", func(t *testing.T) {
		p.alike(t, func(d *docker) {
			x := func() io.Reader { return strings.NewReader("x") }
			d.doWith(x(), nil, "run", "-i", "--rm", image, "cat")
			d.doWith(x(), nil, "run", "-i", "--rm", image, "cat", "7")
			d.doWith(nil, nil, "run", "-i", "--rm", image, "cat", "8")
			d.doWith(x(), nil, "run", "--rm", image, "cat") // which does not attach it
			start(d, "-i", image, "-mode", "none")
			d.doWith(x(), nil, "exec", "-i", "twin", "/server", "cat", "9")
			d.doWith(x(), nil, "exec", "twin", "/server", "cat", "9")
			d.do("exec", "-d", "twin", "/server", "cat")
			d.doWith(x(), nil, "exec", "-it", "twin", "/server", "cat") // no terminal here
			d.do("rm", "-f", "twin")
			d.do("create", "-i", "-a", "stdin", "-a", "stdout", "-a", "stderr", "--name", "twin", image, "cat", "5")
			d.doWith(x(), nil, "start", "-ai", "twin")
			d.do("logs", "twin")
			d.do("rm", "twin")
		})
	})
	t.Run("a terminal", func(t *testing.T) {
		p.alike(t, func(d *docker) {
			d.inTerminal([]string{"run", "-it", "--rm", image, "cat", "3"}, "over\r", "over\r\nover\r\n", "\x04", "end of input\r\n")
			start(d, "-it", image, "cat", "4")
			d.inTerminal([]string{"attach", "twin"}, "to and fro\r", "to and fro\r\nto and fro\r\n", "\x10\x11", "read escape sequence")
			d.inTerminal([]string{"attach", "twin"}, "again\r", "again\r\nagain\r\n", "\x04", "end of input\r\n")
			d.do("logs", "twin")
			d.do("rm", "twin")
			start(d, image, "-mode", "none")
			d.inTerminal([]string{"exec", "-it", "twin", "/server", "cat", "6"}, "there\r", "there\r\nthere\r\n", "\x04", "end of input\r\n")
			d.inTerminal([]string{"exec", "-it", "twin", "/server", "cat", "6"}, "then\r", "then\r\nthen\r\n", "\x03", "") // Ctrl-C: it exits with 0
			d.do("rm", "-f", "twin")
		})
	})
	t.Run("a signal is passed on", func(t *testing.T) {
		p.alike(t, func(d *docker) {
			f := d.follow("run", "--rm", "--name", "twin", "-p", publish, image, "-name", "twin")
			eventually(t, "it answers", func() error {
				_, err := httpGet(port)
				return err
			})
			f.cmd.Process.Signal(syscall.SIGINT)
			fmt.Fprintf(&d.script, "exit %d %s\n", f.ends(), f.text())
			d.do("ps", "-a")
		})
	})
	t.Run("logs and events", func(t *testing.T) {
		p.alike(t, func(d *docker) {
			id := strings.TrimSpace(d.do("create", "-i", "-a", "stdin", "-a", "stdout", "-a", "stderr", "--name", "twin", image, "cat"))
			began := time.Now()
			d.doWith(strings.NewReader(strings.Repeat("line\n", 2000)), nil, "start", "-ai", "twin")
			d.do("logs", "twin")
			d.do("logs", "-f", "twin")
			d.do("logs", "-t", "--since", "1h", "twin")
			d.do("events", "--since", fmt.Sprint(began.Unix()-1), "--until", fmt.Sprint(time.Now().Unix()+1), "--filter", "container="+id,
				"--filter", "event=start", "--filter", "event=die", "--format", "{{.Action}} {{.Actor.Attributes}}")
			d.do("rm", "twin")
			d.do("run", "--name", "twin", image, "cat")
			d.do("logs", "--tail", "1", "twin")
			d.do("rm", "twin")
		})
	})
	t.Run("stats", func(t *testing.T) {
		figures := regexp.MustCompile(`[\d.]+`)
		var first string
		for _, socket := range []string{g.env["RIG_DOCKER"], p.engineSocket()} {
			d := dockerAt(t, socket)
			d.must("run", "-d", "--name", "twin", image)
			out, errs, code := d.run(nil, nil, "stats", "--no-stream", "--format", "{{.Name}} {{.CPUPerc}} {{.PIDs}}", "twin")
			d.must("rm", "-f", "twin")
			if out = figures.ReplaceAllString(out, "N") + errs + fmt.Sprint(code); first == "" {
				first = out
			} else if out != first {
				t.Errorf("%q, want %q", out, first)
			}
		}
		if first != "twin N% N\n0" {
			t.Errorf("stats say %q", first)
		}
	})
	t.Run("build", func(t *testing.T) {
		dir := t.TempDir()
		file := "FROM " + image + "\nCOPY big /big\nRUN [\"/server\", \"cat\"]\nLABEL twin=1\nENTRYPOINT [\"/server\", \"cat\"]\n"
		scratch := "FROM scratch\nCOPY big /big\n"
		if err := errors.Join(os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(file), 0o644), os.WriteFile(filepath.Join(dir, "Scratch"), []byte(scratch), 0o644),
			os.WriteFile(filepath.Join(dir, "Broken"), []byte("FROM "+image+"\nRUN [\"/server\", \"cat\", \"9\"]\n"), 0o644),
			os.WriteFile(filepath.Join(dir, "big"), bytes.Repeat([]byte("big "), 4<<20), 0o644)); err != nil {
			t.Fatal(err)
		}
		p.alike(t, func(d *docker) {
			d.do("build", "--no-cache", "-t", "twin", dir)
			d.doWith(strings.NewReader("x"), nil, "run", "-i", "--rm", "twin")
			d.do("build", "-t", "twin", dir)
			d.do("rmi", "twin")
			d.do("build", "-q", "--no-cache", "-f", filepath.Join(dir, "Scratch"), "-t", "twin", dir)
			d.do("rmi", "twin")
			d.do("build", "--no-cache", "-f", filepath.Join(dir, "Broken"), dir)
			d.do("container", "prune", "-f")
			d.do("image", "prune", "-f")
		})
	})
	t.Run("BuildKit", func(t *testing.T) {
		dir := t.TempDir()
		if err := errors.Join(os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte("FROM scratch\nCOPY big /big\nCMD [\"/big\"]\n"), 0o644),
			os.WriteFile(filepath.Join(dir, "big"), bytes.Repeat([]byte("kit "), 4<<20), 0o644)); err != nil {
			t.Fatal(err)
		}
		kit := []string{"DOCKER_BUILDKIT=1"}
		build := []string{"build", "-q", "--no-cache", "-t", "twin", dir}
		own := dockerAt(t, g.env["RIG_DOCKER"])
		// A newer CLI needs a plugin for it, the one beside Debian's engine does not.
		for _, own.program = range []string{"docker", "/usr/bin/docker"} {
			if _, errs, code := own.run(nil, kit, build...); code != 0 {
				t.Logf("%s: %s", own.program, errs)
				continue
			}
			program := own.program
			p.alike(t, func(d *docker) {
				d.program = program
				d.doWith(nil, kit, build...)
				d.do("create", "--name", "twin", "twin")
				d.do("cp", "-q", "twin:/big", filepath.Join(dir, "back"))
				back, err := os.ReadFile(filepath.Join(dir, "back"))
				fmt.Fprintf(&d.script, "%x %v\n", sha256.Sum256(back), err)
				d.do("rm", "twin")
				d.do("rmi", "twin")
				d.must("builder", "prune", "-af") // says how much there was, which varies
			})
			return
		}
		t.Skip("no docker here can build with BuildKit without a plugin")
	})
}

// inTerminal runs a command in a terminal, where it is sent something and has to show an answer, twice.
func (d *docker) inTerminal(args []string, first, shown, second, shownThen string) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), commandTime)
	defer cancel()
	cmd := d.command(ctx, args...)
	x := openTerminal(d.t, cmd)
	x.raw() // or it would echo what is typed itself
	x.types(first)
	x.shows(shown)
	x.types(second)
	x.shows(shownThen)
	code := x.ends()
	fmt.Fprintf(&d.script, "$ docker %s\n%q[exit %d]\n", strings.Join(args, " "), x.text(), code)
}

// terminal is a terminal with a command in it, in a session of its own.
type terminal struct {
	following
	master *os.File
	seen   int // the output that shows has waited for
}

func openTerminal(t *testing.T, cmd *exec.Cmd) *terminal {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	x := &terminal{following: following{t: t, cmd: cmd, done: make(chan struct{})}, master: master}
	number, err := x.ioctl(func(fd int) (int, error) { return unix.IoctlGetInt(fd, unix.TIOCGPTN) })
	if err == nil {
		_, err = x.ioctl(func(fd int) (int, error) {
			return 0, errors.Join(unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0), unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 80}))
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer tty.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		io.Copy(&x.following, master) // ends when nobody has the other end any more
	}()
	go func() {
		defer close(x.done)
		cmd.Wait()
		select {
		case <-read:
		case <-time.After(patience): // something it left has the terminal
		}
	}()
	t.Cleanup(x.kill)
	return x
}

// ioctl keeps the file's deadlines, which its Fd would take away.
func (x *terminal) ioctl(do func(fd int) (int, error)) (n int, err error) {
	raw, err := x.master.SyscallConn()
	if err != nil {
		return 0, err
	}
	return n, errors.Join(raw.Control(func(fd uintptr) { n, err = do(int(fd)) }), err)
}

// raw waits until the command has taken the terminal's own echo away.
func (x *terminal) raw() {
	x.t.Helper()
	eventually(x.t, "the terminal is raw", func() error {
		lflag, err := x.ioctl(func(fd int) (int, error) {
			state, err := unix.IoctlGetTermios(fd, unix.TCGETS)
			if err != nil {
				return 0, err
			}
			return int(state.Lflag), nil
		})
		if err == nil && lflag&unix.ECHO != 0 {
			err = fmt.Errorf("it echoes; there is %q", x.text())
		}
		return err
	})
}

func (x *terminal) types(s string) {
	x.t.Helper()
	if _, err := io.WriteString(x.master, s); err != nil {
		x.t.Fatal(err)
	}
}

// shows waits for output after what it waited for last.
func (x *terminal) shows(text string) {
	x.t.Helper()
	eventually(x.t, fmt.Sprintf("the terminal shows %q", text), func() error {
		rest := x.text()[x.seen:]
		_, after, ok := strings.Cut(rest, text)
		if !ok {
			return fmt.Errorf("it shows %q", rest)
		}
		x.seen += len(rest) - len(after)
		return nil
	})
}
