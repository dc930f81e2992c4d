//go:build linux

package e2e

// engine_test.go: the engine's socket. The docker CLI has to say the same through it as
// at the engine's own.

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
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
			own.must("rmi", "twin") // the builds below would take its name and leave it
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

// engineClient asks the engine through the run, on a connection for each request.
func (p *runProc) engineClient() *http.Client {
	return &http.Client{Timeout: commandTime, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", p.engineSocket())
		}}}
}

// engineGet returns what the engine answers.
func engineGet(c *http.Client, path string) (status int, body string, err error) {
	resp, err := c.Get("http://docker" + path)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// listsNow tells why the engine does not answer through the run.
func listsNow(c *http.Client) error {
	status, body, err := engineGet(c, "/containers/json")
	if err == nil && (status != http.StatusOK || !strings.HasPrefix(body, "[")) {
		err = fmt.Errorf("status %d: %.200s", status, body)
	}
	return err
}

// givesBack waits until the run and its ssh hold no more descriptors than before, but
// for some idle connections to the engine.
func (p *runProc) givesBack(run, ssh holding) {
	p.t.Helper()
	const idle = 10
	eventually(p.t, "what requests took is given back", func() error {
		if now, sshNow := p.holds(); now.fds > run.fds+idle || sshNow.fds > ssh.fds+idle {
			return fmt.Errorf("run %+v, ssh %+v; before %+v, %+v", now, sshNow, run, ssh)
		}
		return nil
	})
}

// staysSmall fails if the run has taken much more memory than before, in KiB.
func (p *runProc) staysSmall(t *testing.T, before int) {
	t.Helper()
	most := before + 100<<10 // with the race detector
	if peak := peakMemory(t, p.cmd.Process.Pid) >> 10; peak > most {
		t.Errorf("memory grew from %d to %d MiB", before>>10, peak>>10)
	} else {
		t.Logf("memory: %d MiB before, %d MiB at most", before>>10, peak>>10)
	}
}

// talker is a container that prints what it is told.
func (g *testRig) talker(t *testing.T) *box {
	t.Helper()
	own := dockerAt(t, g.env["RIG_DOCKER"])
	boxCount++
	b := &box{rig: g, t: t, name: fmt.Sprintf("talker%d", boxCount)}
	t.Cleanup(func() { own.away(b.name) })
	b.id = own.must("run", "-d", "-i", "--name", b.name, g.env["RIG_IMAGE"], "cat")
	return b
}

// hears tells it a line, at the engine's own socket.
func (b *box) hears(line string) {
	b.t.Helper()
	c, err := net.Dial("unix", b.rig.env["RIG_DOCKER"])
	if err != nil {
		b.t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(c, "POST /containers/%s/attach?stream=1&stdin=1 HTTP/1.1\r\nHost: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n", b.id)
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err == nil && resp.StatusCode != http.StatusSwitchingProtocols {
		err = errors.New(resp.Status)
	}
	if err == nil {
		_, err = io.WriteString(c, line+"\n")
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

// By the time docker returns, the port is open, or closed.
func TestE2EEnginePorts(t *testing.T) {
	g := needRig(t)
	for _, suffix := range []string{"", "-nosockets", "-delay"} {
		t.Run("host"+suffix, func(t *testing.T) {
			port := freePorts(t, 2)
			p := startRun(t, g, suffix)
			d := dockerAt(t, p.engineSocket())
			t.Cleanup(func() { dockerAt(t, g.env["RIG_DOCKER"]).away("twin") })
			open := func(after string, port int) {
				t.Helper()
				if refused(port) == nil {
					t.Errorf("%d is closed after docker %s", port, after)
				}
			}
			closed := func(after string, port int) {
				t.Helper()
				if err := refused(port); err != nil {
					t.Errorf("after docker %s: %v", after, err)
				}
			}
			for range 5 {
				d.must("run", "-d", "--name", "twin", "-p", fmt.Sprintf("%d:80", port), g.env["RIG_IMAGE"])
				open("run", port)
				d.must("restart", "twin")
				open("restart", port)
				d.must("stop", "twin")
				closed("stop", port)
				d.must("start", "twin")
				open("start", port)
				d.must("kill", "twin")
				closed("kill", port)
				d.must("start", "twin")
				open("start", port)
				d.must("rm", "-f", "twin")
				closed("rm -f", port)
			}
			p.never("warning")
		})
	}
}

// Large data passes through the run in both directions, and not into its memory.
func TestE2EEngineCopies(t *testing.T) {
	g := needRig(t)
	p := startRun(t, g, "")
	d, own := dockerAt(t, p.engineSocket()), dockerAt(t, g.env["RIG_DOCKER"])
	if err := listsNow(p.engineClient()); err != nil {
		t.Fatal(err)
	}
	before := rssOf(t, p.cmd.Process.Pid)
	dir := t.TempDir()
	random := make([]byte, 64<<20)
	rand.NewChaCha8([32]byte{1}).Read(random)
	want := sha256.Sum256(random)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, random, 0o644); err != nil {
		t.Fatal(err)
	}
	b := g.bootSpec(t, boxSpec{args: []string{"-mode", "none"}})
	same := func(what string, got []byte, err error) {
		t.Helper()
		if err != nil || sha256.Sum256(got) != want {
			t.Errorf("%s: %d bytes that differ from those sent, %v", what, len(got), err)
		}
	}
	t.Run("cp", func(t *testing.T) {
		d.must("cp", "-q", file, b.name+":/file")
		for _, d := range []*docker{own, d} {
			back := filepath.Join(dir, "back")
			d.must("cp", "-q", b.name+":/file", back)
			got, err := os.ReadFile(back)
			same("cp back at "+d.socket, got, err)
		}
	})
	t.Run("run -i", func(t *testing.T) {
		out, errs, code := d.run(bytes.NewReader(random), nil, "run", "-i", "--rm", g.env["RIG_IMAGE"], "cat", "4")
		same("run -i", []byte(out), nil)
		if code != 4 || errs != "end of input\n" {
			t.Errorf("exit %d, %q", code, errs)
		}
	})
	t.Run("exec -i", func(t *testing.T) {
		out, _, code := d.run(bytes.NewReader(random), nil, "exec", "-i", b.name, "/server", "cat", "5")
		if same("exec -i", []byte(out), nil); code != 5 {
			t.Errorf("exit %d", code)
		}
	})
	t.Run("save and load", func(t *testing.T) {
		const image, size = "big-image", 320 << 20
		needSpace(t, g.env["RIG_DIR"], 5*size)
		t.Cleanup(func() { own.run(nil, nil, "rmi", "-f", image) })
		if _, errs, code := d.run(tarOf("big", size), nil, "import", "-", image); code != 0 {
			t.Fatalf("import: %s", errs)
		}
		sum := func(d *docker) (n int64, sum string) {
			ctx, cancel := context.WithTimeout(context.Background(), commandTime)
			defer cancel()
			cmd, h := d.command(ctx, "save", image), sha256.New()
			counted := &counter{Writer: h}
			cmd.Stdout = counted
			if err := cmd.Run(); err != nil {
				t.Fatal(err)
			}
			return counted.n, fmt.Sprintf("%x", h.Sum(nil))
		}
		n, saved := sum(d)
		if ownN, ownSum := sum(own); saved != ownSum || n < size {
			t.Errorf("save: %d bytes, %s; the engine itself: %d, %s", n, saved, ownN, ownSum)
		}
		ctx, cancel := context.WithTimeout(context.Background(), commandTime)
		defer cancel()
		save, load := d.command(ctx, "save", image), d.command(ctx, "load")
		var out bytes.Buffer
		load.Stdout, load.Stderr = &out, &out
		var err error
		if load.Stdin, err = save.StdoutPipe(); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(save.Start(), load.Run(), save.Wait()); err != nil || !strings.Contains(out.String(), "Loaded image: "+image) {
			t.Errorf("save | load: %v: %s", err, out.String())
		}
	})
	p.staysSmall(t, before)
	p.never("warning")
}

// counter counts what it writes.
type counter struct {
	io.Writer
	n int64
}

func (c *counter) Write(b []byte) (int, error) {
	n, err := c.Writer.Write(b)
	c.n += int64(n)
	return n, err
}

// tarOf is an archive with one file of zeros.
func tarOf(name string, size int64) io.Reader {
	var header bytes.Buffer
	w := tar.NewWriter(&header)
	w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: size, ModTime: time.Unix(1e9, 0)}) // never fails in memory
	padding := (512 - size%512) % 512
	return io.MultiReader(&header, &zeroStream{size}, bytes.NewReader(make([]byte, padding+1024)))
}

// needSpace skips the test where the disk has too little room.
func needSpace(t *testing.T, dir string, bytes uint64) {
	t.Helper()
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		t.Fatal(err)
	}
	if free := fs.Bavail * uint64(fs.Bsize); free < bytes {
		t.Skipf("%d MiB are free at %s, this takes %d", free>>20, dir, bytes>>20)
	}
}

// The ways to the engine: servers that forbid the short one, and settings.
func TestE2EEngineWays(t *testing.T) {
	g := needRig(t)
	t.Run("no forwarding of sockets", func(t *testing.T) {
		p := startRun(t, g, "-nosockets")
		d := dockerAt(t, p.engineSocket())
		b := g.talker(t)
		b.hears("one")
		f := d.follow("logs", "-f", b.name)
		f.shows("one\n")
		b.hears("two")
		f.shows("two\n")
		if n := len(g.sessions()); n < 3 {
			t.Errorf("%d sessions serve three connections to the engine", n)
		}
		out, errs, code := d.run(strings.NewReader("x"), nil, "run", "-i", "--rm", g.env["RIG_IMAGE"], "cat", "7")
		if out != "x" || errs != "end of input\n" || code != 7 {
			t.Errorf("run -i: %q, %q, exit %d", out, errs, code)
		}
		f.kill()
		p.never("warning")
	})
	t.Run("few sessions", func(t *testing.T) {
		p := startRun(t, g, "-fewsessions") // two for us, two for tools
		c := p.engineClient()
		answers := make(chan error, 12)
		for range cap(answers) {
			go func() { answers <- listsNow(c) }()
		}
		for range cap(answers) {
			if err := <-answers; err != nil {
				t.Errorf("one of %d requests: %v", cap(answers), err)
			}
		}
		d := dockerAt(t, p.engineSocket())
		b := g.talker(t)
		b.hears("one")
		first, second := d.follow("logs", "-f", b.name), d.follow("logs", "-f", b.name)
		first.shows("one\n")
		second.shows("one\n")
		_, errs, code := d.run(nil, nil, "ps")
		if code != 1 || !strings.Contains(errs, "rdhpf: ") || !strings.Contains(errs, "MaxSessions") {
			t.Errorf("without a session docker ps says %q, exit %d", errs, code)
		}
		waits := d.follow("ps", "--format", "{{.Names}}")
		first.kill()
		if code := waits.ends(); code != 0 || !strings.Contains(waits.text(), b.name) {
			t.Errorf("the request that waited for a session: %q, exit %d", waits.text(), code)
		}
		second.kill()
	})
	t.Run("a path in the URL", func(t *testing.T) {
		p := newRun(t, g, "-wrongctx"+g.env["RIG_DOCKER"])
		p.args = []string{"run", "-host", "ssh://" + p.host}
		p.start()
		p.waitLine("connected to ")
		dockerAt(t, p.engineSocket()).must("ps")
		out, errs, code := p.rdhpf("env", "-json")
		if want := fmt.Sprintf(`"TESTCONTAINERS_DOCKER_SOCKET_OVERRIDE":%q`, g.env["RIG_DOCKER"]); code != 0 || !strings.Contains(out, want) {
			t.Errorf("env says %q, %q, exit %d; want %s", out, errs, code, want)
		}
	})
	t.Run("left out", func(t *testing.T) {
		port := freePorts(t, 1)
		p := startRun(t, g, "", "-no-docker-socket")
		g.boot(t, port).answers(port)
		if _, err := os.Lstat(p.engineSocket()); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("there is a socket: %v", err)
		}
		p.never("DOCKER_HOST")
		if out, errs, code := p.rdhpf("env"); code != 1 || out != "" || !strings.Contains(errs, "-no-docker-socket") {
			t.Errorf("env says %q, %q, exit %d", out, errs, code)
		}
	})
	t.Run("removed", func(t *testing.T) {
		p := startRun(t, g, "")
		d := dockerAt(t, p.engineSocket())
		d.must("ps")
		if err := os.Remove(p.engineSocket()); err != nil {
			t.Fatal(err)
		}
		p.waitLine(p.engineSocket() + " was removed or replaced; recreated it")
		d.must("ps")
	})
	t.Run("the forward's socket removed", func(t *testing.T) {
		p := startRun(t, g, "")
		d := dockerAt(t, p.engineSocket())
		b := g.talker(t)
		b.hears("one")
		d.must("ps")
		if err := os.Remove(strings.TrimSuffix(p.paths().lock, ".lock") + ".engine"); err != nil {
			t.Fatal(err)
		}
		for range 3 { // more than there are idle connections
			f := d.follow("logs", "-f", b.name)
			f.shows("one\n")
		}
	})
}

// Whatever happens to the connection, each request ends or goes on.
func TestE2EEngineFaults(t *testing.T) {
	g := needRig(t)
	for _, suffix := range []string{"", "-nosockets"} {
		t.Run("ssh killed in mid-request, host"+suffix, func(t *testing.T) {
			p := startRun(t, g, suffix)
			d := dockerAt(t, p.engineSocket())
			b := g.talker(t)
			b.hears("one")
			for n := range 5 {
				logs, events, attached := d.follow("logs", "-f", b.name), d.follow("events", "--since", "1h"), d.follow("attach", "--no-stdin", b.name)
				logs.shows("one\n")
				events.shows(b.name)
				eventually(t, "it is attached", func() error {
					if b.hears("more"); !strings.Contains(attached.text(), "more") {
						return errors.New("it shows nothing")
					}
					return nil
				})
				if err := syscall.Kill(p.masterPid(), syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
				killed := time.Now()
				if out, errs, code := d.run(nil, nil, "ps", "--format", "{{.Names}}"); code != 0 || out != b.name+"\n" {
					t.Errorf("round %d: docker ps: %q, %q, exit %d", n, out, errs, code)
				}
				took("ssh killed: docker ps answers", killed)
				if code := logs.ends(); code == 0 {
					t.Errorf("logs -f that was cut off ends with 0: %q", logs.text())
				}
				events.ends()
				attached.ends()
			}
		})
		t.Run("dockerd restarts, host"+suffix, func(t *testing.T) {
			p := startRun(t, g, suffix)
			d := dockerAt(t, p.engineSocket())
			b := g.talker(t)
			b.hears("one")
			logs := d.follow("logs", "-f", b.name)
			logs.shows("one\n")
			t.Cleanup(func() { g.ctl(t, "dockerd", "start") })
			g.ctl(t, "dockerd", "stop")
			logs.ends()
			out, errs, code := d.run(nil, nil, "ps")
			if code != 1 || out != "" || !strings.Contains(errs, "Error response from daemon: rdhpf: the remote engine") {
				t.Errorf("while there is no engine docker ps says %q, %q, exit %d", out, errs, code)
			}
			t.Logf("docker ps: %s", errs)
			g.ctl(t, "dockerd", "start")
			d.must("ps")
			p.never("connection lost")
		})
	}
	t.Run("200 requests at once", func(t *testing.T) {
		p := startRun(t, g, "")
		c := p.engineClient()
		if err := listsNow(c); err != nil {
			t.Fatal(err)
		}
		run, ssh := p.holds()
		before := rssOf(t, p.cmd.Process.Pid)
		answers := make(chan error, 200)
		for range cap(answers) {
			go func() { answers <- listsNow(c) }()
		}
		var wrong []error
		for range cap(answers) {
			if err := <-answers; err != nil {
				wrong = append(wrong, err)
			}
		}
		few(t, "requests", wrong)
		p.givesBack(run, ssh)
		p.staysSmall(t, before)
	})
	t.Run("thirty logs -f", func(t *testing.T) {
		p := startRun(t, g, "")
		c := p.engineClient()
		if err := listsNow(c); err != nil {
			t.Fatal(err)
		}
		b := g.talker(t)
		run, ssh := p.holds()
		for _, end := range []string{"the clients leave", "the container ends"} {
			ctx, leave := context.WithCancel(context.Background())
			defer leave()
			var got [30]bytes.Buffer
			var mu sync.Mutex
			var ended sync.WaitGroup
			for i := range got {
				ended.Add(1)
				go func() {
					defer ended.Done()
					req, err := http.NewRequestWithContext(ctx, "GET", "http://docker/containers/"+b.id+"/logs?follow=1&stdout=1", nil)
					var resp *http.Response
					if err == nil {
						resp, err = c.Do(req)
					}
					if err != nil {
						t.Error(err)
						return
					}
					defer resp.Body.Close()
					for buf := make([]byte, 4096); ; {
						n, err := resp.Body.Read(buf)
						mu.Lock()
						got[i].Write(buf[:n])
						mu.Unlock()
						if err != nil {
							if ctx.Err() == nil && err != io.EOF {
								t.Error(err)
							}
							return
						}
					}
				}()
			}
			b.hears(end)
			eventually(t, "all hear it", func() error {
				mu.Lock()
				defer mu.Unlock()
				for i := range got {
					if !bytes.HasSuffix(got[i].Bytes(), []byte(end+"\n")) {
						return fmt.Errorf("%d has %q", i, got[i].Bytes())
					}
				}
				return nil
			})
			if err := listsNow(c); err != nil {
				t.Error(err)
			}
			if end == "the clients leave" {
				leave()
			} else {
				b.do("kill")
			}
			ended.Wait()
			p.givesBack(run, ssh)
		}
	})
	t.Run("the link is cut", func(t *testing.T) {
		p := startRun(t, g, "")
		d := dockerAt(t, p.engineSocket())
		d.must("ps")
		resume := g.stopServer(t)
		if err := syscall.Kill(p.masterPid(), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		p.waitLine("warning: connection lost: ")
		status, body, err := engineGet(p.engineClient(), "/containers/json")
		if err != nil || status != http.StatusServiceUnavailable || !strings.HasPrefix(body, `{"message":"rdhpf: ssh connection lost, reconnecting: `) {
			t.Errorf("status %d, %q, %v", status, body, err)
		}
		out, errs, code := d.run(nil, nil, "ps")
		if code != 1 || out != "" || !strings.HasPrefix(errs, "Error response from daemon: rdhpf: ssh connection lost, reconnecting: ") {
			t.Errorf("docker ps: %q, %q, exit %d", out, errs, code)
		}
		t.Logf("docker ps: %s", errs)
		waits := d.follow("ps", "--format", "over")
		resume()
		if code := waits.ends(); code != 0 {
			t.Errorf("docker ps that waited: %q, exit %d", waits.text(), code)
		}
	})
	t.Run("a silent partition", func(t *testing.T) {
		p := startRun(t, g, "")
		d := dockerAt(t, p.engineSocket())
		b := g.talker(t)
		b.hears("one")
		logs := d.follow("logs", "-f", b.name)
		logs.shows("one\n")
		t.Cleanup(func() { g.ctl(t, "partition", "off") })
		g.ctl(t, "partition", "on")
		asked := d.follow("ps")
		if code := asked.ends(); code != 1 || !strings.Contains(asked.text(), "Error response from daemon: rdhpf: ") {
			t.Errorf("docker ps: %q, exit %d", asked.text(), code)
		}
		t.Logf("docker ps: %s", asked.text())
		if logs.ends() == 0 {
			t.Error("logs -f that was cut off ends with 0")
		}
		g.ctl(t, "partition", "off")
		p.waitLine("connected to ssh://" + p.host + " again")
		d.must("ps")
		p.stopsAfterCut()
	})
}

// An upload of 2 GiB, and a client that asks for them and does not read.
func TestE2EEngineUpload(t *testing.T) {
	g := needRig(t)
	const size = 2 << 30
	needSpace(t, g.env["RIG_DIR"], 2*size)
	p := startRun(t, g, "")
	c := p.engineClient()
	b := g.bootSpec(t, boxSpec{args: []string{"-mode", "none"}})
	if err := listsNow(c); err != nil {
		t.Fatal(err)
	}
	run, ssh := p.holds()
	before := rssOf(t, p.cmd.Process.Pid)
	uploaded := make(chan error, 1)
	go func() {
		req, err := http.NewRequest("PUT", "http://docker/containers/"+b.id+"/archive?path=/", tarOf("big", size))
		if err == nil {
			var resp *http.Response
			if resp, err = c.Do(req); err == nil {
				if resp.Body.Close(); resp.StatusCode != http.StatusOK {
					err = errors.New(resp.Status)
				}
			}
		}
		uploaded <- err
	}()
	meanwhile := 0
	for done := false; !done; meanwhile++ {
		select {
		case err := <-uploaded:
			if done = true; err != nil {
				t.Fatal(err)
			}
		default:
		}
		if err := listsNow(c); err != nil {
			t.Errorf("meanwhile: %v", err)
		}
	}
	t.Logf("%d requests were answered meanwhile", meanwhile)
	p.staysSmall(t, before)

	req := fmt.Sprintf("GET /containers/%s/archive?path=/big HTTP/1.1\r\nHost: docker\r\n\r\n", b.id)
	idle, err := net.Dial("unix", p.engineSocket())
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	idle.SetDeadline(time.Now().Add(commandTime))
	if _, err := io.WriteString(idle, req); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(idle), nil)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%v, %v", resp, err)
	}
	for range 20 {
		if err := listsNow(c); err != nil {
			t.Errorf("beside a client that does not read: %v", err)
		}
	}
	p.staysSmall(t, before)
	got := &counter{Writer: io.Discard}
	if _, err := io.Copy(got, io.LimitReader(resp.Body, size)); err != nil || got.n != size {
		t.Errorf("when it reads after all it gets %d bytes, %v", got.n, err)
	}
	idle.Close()
	p.givesBack(run, ssh)
	p.staysSmall(t, before)
}
