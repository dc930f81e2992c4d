package e2e

// rig_test.go: what the end-to-end tests stand on: a rig (see rig/README.md),
// containers on its engine, and rdhpf as a process of its own. The tests know of
// it only what a user can see.

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience bounds every wait for what has to come. It is long, for a machine
// can be busy; nothing waits that long when all is well.
const patience = 30 * time.Second

// program is the rdhpf under test, built by the first test that needs it.
var program string

func TestMain(m *testing.M) {
	if does := os.Getenv("RDHPF_TEST_ENGINE"); does != "" {
		beHostileEngine(does)
		os.Exit(0)
	}
	if signal.Ignored(syscall.SIGINT) { // as in a script's background job: the runs would inherit it
		signal.Notify(make(chan os.Signal, 1), syscall.SIGINT)
	}
	code := m.Run()
	if testing.Verbose() {
		printTimes()
	}
	for _, name := range []string{theRig.name, theSwarm.name} {
		if name == "" {
			continue
		}
		if out, err := exec.Command("rig/rig", "down", name).CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "rig down: %v: %s\n", err, out)
			code = 1
		}
	}
	if program != "" {
		os.RemoveAll(filepath.Dir(program))
	}
	os.Exit(code)
}

// build makes the program, under the race detector when the tests are.
func build() error {
	dir, err := os.MkdirTemp("", "rdhpf-e2e-")
	if err != nil {
		return err
	}
	program = filepath.Join(dir, "rdhpf")
	args := []string{"build", "-buildvcs=false", "-o", program} // whoever owns the checkout
	if raceDetector {
		args = append(args, "-race")
	}
	cmd := exec.Command("go", append(args, ".")...)
	cmd.Dir = ".."
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build: %w: %s", err, out)
	}
	return nil
}

// testRig is the rig of this test process.
type testRig struct {
	name   string // set once it may be there
	env    map[string]string
	engine *http.Client
}

var (
	theRig     testRig
	theSwarm   testRig // with two nodes, for the tests of one
	theRigOnce sync.Once
	theRigLack string // what the machine lacks for a rig
	theRigErr  error
)

// needRig returns the rig, brought up for the first that asks. Where the machine
// cannot have one the test is skipped, or fails where CI=true. The rig goes down
// in TestMain, or by itself when this process is killed.
func needRig(t *testing.T) *testRig {
	t.Helper()
	if testing.Short() {
		t.Skip("a rig takes long, and this is -short")
	}
	theRigOnce.Do(func() {
		if theRigLack, theRigErr = theRig.up(fmt.Sprintf("e2e-%d", os.Getpid())); theRigErr == nil && theRigLack == "" {
			theRigErr = build()
		}
	})
	if theRigErr != nil {
		t.Fatal(theRigErr)
	}
	if theRigLack != "" {
		if os.Getenv("CI") == "true" {
			t.Fatal(theRigLack)
		}
		t.Skip(theRigLack)
	}
	return &theRig
}

func (g *testRig) up(name string, args ...string) (lack string, err error) {
	if runtime.GOOS != "linux" || os.Geteuid() != 0 {
		return "a rig needs Linux and root", nil
	}
	if out, err := exec.Command("unshare", "--net", "--mount", "true").CombinedOutput(); err != nil {
		return fmt.Sprintf("a rig needs namespaces: %v: %s", err, bytes.TrimSpace(out)), nil
	}
	g.name = name
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	args = append([]string{"up", "-owner", strconv.Itoa(os.Getpid())}, append(args, g.name)...)
	cmd := exec.CommandContext(ctx, "rig/rig", args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		if strings.Contains(stderr.String(), "rig: missing: ") {
			g.name = ""
			return strings.TrimSpace(stderr.String()), nil
		}
		return "", fmt.Errorf("rig up: %w: %s", err, stderr.String())
	}
	g.env = make(map[string]string)
	for _, line := range strings.Split(string(out), "\n") {
		if k, v, ok := strings.Cut(line, "="); ok {
			g.env[k] = v
		}
	}
	for _, k := range []string{"RIG_HOST", "RIG_DIR", "RIG_NS", "RIG_ADDR", "RIG_BIN", "RIG_DOCKER", "RIG_IMAGE", "RIG_SSHD_PID", "RIG_HOSTILE_PORT"} {
		if g.env[k] == "" {
			return "", fmt.Errorf("rig up printed no %s: %s", k, out)
		}
	}
	g.engine = &http.Client{Timeout: 5 * patience, Transport: &http.Transport{ // it takes seconds for a hundred ports
		DisableKeepAlives: true, // the engine restarts in between
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", g.env["RIG_DOCKER"])
		},
	}}
	return "", nil
}

// ctl runs a command of the rig: ctl(t, "partition", "on").
func (g *testRig) ctl(t *testing.T, command, arg string) {
	t.Helper()
	if out, err := exec.Command("rig/rig", command, g.name, arg).CombinedOutput(); err != nil {
		t.Fatalf("rig %s %s: %v: %s", command, arg, err, out)
	}
}

// sshd is the pid of the listening server.
func (g *testRig) sshd(t *testing.T) int {
	t.Helper()
	pid, err := strconv.Atoi(g.env["RIG_SSHD_PID"])
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// endConnections kills all connections of sshd, and says how many there were.
func (g *testRig) endConnections(t *testing.T) (n int) {
	t.Helper()
	for _, pid := range children(g.sshd(t)) {
		if err := syscall.Kill(pid, syscall.SIGKILL); err == nil {
			n++
		} else if !errors.Is(err, syscall.ESRCH) {
			t.Error(err)
		}
	}
	return n
}

// call asks the rig's engine. An answer that is no success is an error.
func (g *testRig) call(method, path string, body, answer any) error {
	var b bytes.Buffer
	if body != nil {
		if err := json.NewEncoder(&b).Encode(body); err != nil {
			return err
		}
	}
	req, err := http.NewRequest(method, "http://docker"+path, &b)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := g.engine.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode >= 300 && resp.StatusCode != http.StatusNotModified {
		return fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, bytes.TrimSpace(text))
	}
	if answer != nil {
		return json.Unmarshal(text, answer)
	}
	return nil
}

// boxPort publishes a port of a container.
type boxPort struct {
	ip            string // "" = all
	host, private int    // host 0 = the engine's choice
	proto         string // "" = tcp
}

// boxSpec is what a container is to be.
type boxSpec struct {
	args    []string // of the image's server, which has a -name already
	ports   []boxPort
	all     bool   // publish what the image exposes, -P
	network string // "" = bridge
	restart string // restart policy
	labels  map[string]string
}

// box is a container of the rig's engine.
type box struct {
	rig      *testRig
	t        *testing.T
	id, name string
	greeting string // of its server: the name it was born with
}

var boxCount int

// create makes a container, which the end of the test removes.
func (g *testRig) create(t *testing.T, spec boxSpec) *box {
	t.Helper()
	b, err := g.tryCreate(t, spec)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (g *testRig) tryCreate(t *testing.T, spec boxSpec) (*box, error) {
	boxCount++
	b := &box{rig: g, t: t, name: fmt.Sprintf("box%d", boxCount)}
	b.greeting = fmt.Sprintf("hello from %s\n", b.name)
	exposed, bindings := map[string]any{}, map[string][]map[string]string{}
	for _, p := range spec.ports {
		if p.proto == "" {
			p.proto = "tcp"
		}
		k := fmt.Sprintf("%d/%s", p.private, p.proto)
		exposed[k] = struct{}{}
		host := ""
		if p.host != 0 {
			host = strconv.Itoa(p.host)
		}
		bindings[k] = append(bindings[k], map[string]string{"HostIp": p.ip, "HostPort": host})
	}
	var made struct{ ID string }
	err := g.call("POST", "/containers/create?name="+b.name, map[string]any{
		"Image": g.env["RIG_IMAGE"], "Cmd": append([]string{"-name", b.name}, spec.args...), "ExposedPorts": exposed, "Labels": spec.labels,
		"HostConfig": map[string]any{"PortBindings": bindings, "PublishAllPorts": spec.all, "NetworkMode": spec.network,
			"RestartPolicy": map[string]string{"Name": spec.restart},
			"CgroupParent":  "/rdhpf-rig-" + g.env["RIG_NAME"]}, // as for dockerd; the rig takes all in it down
	}, &made)
	if err != nil {
		return nil, err
	}
	b.id = made.ID
	t.Cleanup(func() {
		if err := g.call("DELETE", "/containers/"+b.id+"?force=1", nil, nil); err != nil && !strings.Contains(err.Error(), "404") {
			t.Errorf("cleaning up: %v", err)
		}
	})
	return b, nil
}

// boot creates and starts a container that publishes port as its port 80.
func (g *testRig) boot(t *testing.T, port int, args ...string) *box {
	t.Helper()
	return g.bootSpec(t, boxSpec{args: args, ports: []boxPort{{host: port, private: 80}}})
}

func (g *testRig) bootSpec(t *testing.T, spec boxSpec) *box {
	t.Helper()
	b := g.create(t, spec)
	b.do("start")
	return b
}

// do has the engine start, stop, kill, restart, pause or unpause the container.
func (b *box) do(what string) {
	b.t.Helper()
	if err := b.rig.call("POST", "/containers/"+b.id+"/"+what, nil, nil); err != nil {
		b.t.Fatal(err)
	}
}

func (b *box) remove() {
	b.t.Helper()
	if err := b.rig.call("DELETE", "/containers/"+b.id+"?force=1", nil, nil); err != nil {
		b.t.Fatal(err)
	}
}

func (b *box) rename(to string) {
	b.t.Helper()
	b.do("rename?name=" + url.QueryEscape(to))
	b.name = to
}

// who is the container as the program names it.
func (b *box) who() string { return fmt.Sprintf("%s (%s)", b.name, b.id[:12]) }

// pid is that of the container's server.
func (b *box) pid() int {
	b.t.Helper()
	var is struct{ State struct{ Pid int } }
	if err := b.rig.call("GET", "/containers/"+b.id+"/json", nil, &is); err != nil {
		b.t.Fatal(err)
	}
	return is.State.Pid
}

// listens tells whether something in the container listens on a port, without
// connecting to it.
func (b *box) listens(port int) bool {
	b.t.Helper()
	pid := b.pid()
	return listensIn(pid, "tcp", port) || listensIn(pid, "tcp6", port)
}

// listensIn tells whether something listens on a port in the network of a process.
// The table is tcp or tcp6.
func listensIn(pid int, table string, port int) bool {
	return slices.ContainsFunc(sockets(fmt.Sprintf("/proc/%d/net/%s", pid, table)), func(s tcpSocket) bool {
		return s.state == tcpListen && s.local == port
	})
}

// serviceEnds has the server stop listening, while the container runs on.
func (b *box) serviceEnds() {
	b.t.Helper()
	b.listening() // before that a signal may be lost
	b.tell(syscall.SIGUSR1)
	eventually(b.t, "the service ends", func() error {
		if b.listens(80) {
			return errors.New("it listens")
		}
		return nil
	})
}

// serviceBegins has it listen again.
func (b *box) serviceBegins() {
	b.t.Helper()
	b.tell(syscall.SIGUSR2)
	b.listening()
}

// tell signals the server. For the engine, that would be a stop by hand: it would
// not start the container again with itself.
func (b *box) tell(sig syscall.Signal) {
	b.t.Helper()
	pid := b.pid()
	if pid == 0 {
		b.t.Fatalf("%s does not run", b.name)
	}
	if err := syscall.Kill(pid, sig); err != nil {
		b.t.Fatal(err)
	}
}

// listening waits until the server does.
func (b *box) listening() {
	b.t.Helper()
	eventually(b.t, "the service begins", func() error {
		if !b.listens(80) {
			return errors.New("it does not listen")
		}
		return nil
	})
}

// tcpSocket is a line of /proc/net/tcp.
type tcpSocket struct{ local, remote, state int }

const (
	tcpTimeWait = 6
	tcpListen   = 10
)

func sockets(table string) (all []tcpSocket) {
	text, _ := os.ReadFile(table)
	for _, line := range strings.Split(string(text), "\n") {
		var s tcpSocket
		// "0: 0100007F:1F90 00000000:0000 0A …", with longer addresses in tcp6
		f := strings.Fields(line)
		if len(f) < 4 || f[0] == "sl" {
			continue
		}
		_, local, _ := strings.Cut(f[1], ":")
		_, remote, _ := strings.Cut(f[2], ":")
		if _, err := fmt.Sscanf(local+" "+remote+" "+f[3], "%x %x %x", &s.local, &s.remote, &s.state); err == nil {
			all = append(all, s)
		}
	}
	return all
}

// inspect tells when the container started and where port 80 is published.
func (b *box) inspect() (started time.Time, port int) {
	b.t.Helper()
	var is struct {
		State           struct{ StartedAt time.Time }
		NetworkSettings struct {
			Ports map[string][]struct{ HostPort string }
		}
	}
	if err := b.rig.call("GET", "/containers/"+b.id+"/json", nil, &is); err != nil {
		b.t.Fatal(err)
	}
	if p := is.NetworkSettings.Ports["80/tcp"]; len(p) > 0 {
		port, _ = strconv.Atoi(p[0].HostPort)
	}
	return is.State.StartedAt, port
}

// The ports of this test process: up to 32768, from where the kernel hands them out.
const blockSize = 2000

var (
	firstPort, nextPort int
	portsClaim          net.Listener
)

// claimPorts claims a block of ports, by listening on its first: other test processes
// may run beside this one.
var claimPorts = sync.OnceFunc(func() {
	for first := 12000; first+blockSize <= 32000; first += blockSize {
		var err error
		if portsClaim, err = net.Listen("tcp", localAddr(first)); err == nil {
			firstPort, nextPort = first+1, first+1
			return
		}
	}
})

// freePorts returns the first of n ports in a row that are free here, and in the
// rig, where nothing else is in that range.
func freePorts(t *testing.T, n int) int {
	t.Helper()
	if claimPorts(); firstPort == 0 {
		t.Fatal("other tests hold all blocks of ports")
	}
	for range blockSize {
		if nextPort+n > firstPort-1+blockSize {
			nextPort = firstPort
		}
		first, free := nextPort, 0
		for free < n && locallyFree(first+free) {
			free++
		}
		nextPort = first + n
		if free == n {
			return first
		}
	}
	t.Fatal("no port is free")
	return 0
}

func locallyFree(port int) bool {
	l, err := net.Listen("tcp", localAddr(port))
	if err == nil {
		l.Close()
	}
	return err == nil
}

func localAddr(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

// eventually waits until cond returns nil.
func eventually(t *testing.T, what string, cond func() error) {
	t.Helper()
	within(t, patience, what, cond)
}

// within waits no longer than most.
func within(t *testing.T, most time.Duration, what string, cond func() error) {
	t.Helper()
	deadline := time.Now().Add(most)
	for {
		err := cond()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v: %v", what, most, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// httpGet asks what a forward leads to, on a connection of its own.
func httpGet(port int) (string, error) {
	c := http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := c.Get("http://" + localAddr(port) + "/")
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<16))
	return string(b), err
}

// answering tells why it is not the container that answers on a local port.
func (b *box) answering(port int) error {
	got, err := httpGet(port)
	if err == nil && got != b.greeting {
		err = fmt.Errorf("%d answers %q, want %q", port, got, b.greeting)
	}
	return err
}

// answers waits until it does.
func (b *box) answers(port int) {
	b.t.Helper()
	eventually(b.t, fmt.Sprintf("%s answers on %d", b.name, port), func() error { return b.answering(port) })
}

// refused tells why a local port is not closed.
func refused(port int) error {
	c, err := net.DialTimeout("tcp", localAddr(port), patience)
	if err == nil {
		c.Close()
		return fmt.Errorf("%d accepts", port)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return err
	}
	return nil
}

// times are how long rdhpf took for things, for docs/faults.md: make faults
// prints them. No test fails by them.
var times struct {
	sync.Mutex
	of map[string][]time.Duration
}

// took notes that it took from since until now.
func took(what string, since time.Time) {
	times.Lock()
	defer times.Unlock()
	if times.of == nil {
		times.of = make(map[string][]time.Duration)
	}
	times.of[what] = append(times.of[what], time.Since(since))
}

func printTimes() {
	for _, what := range slices.Sorted(maps.Keys(times.of)) {
		all := times.of[what]
		slices.Sort(all)
		fmt.Printf("| %s | %d | %.2f s | %.2f s |\n", what, len(all), all[len(all)/2].Seconds(), all[len(all)-1].Seconds())
	}
}

func refuses(t *testing.T, port int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d refuses", port), func() error { return refused(port) })
}

// dialEcho connects to a forward.
func dialEcho(t *testing.T, port int) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", localAddr(port))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(2 * patience))
	return c.(*net.TCPConn)
}

// runProc is the program, run as a process of its own.
type runProc struct {
	t    *testing.T
	rig  *testRig
	host string // -host, and the host of its files
	dir  string // RDHPF_DIR
	args []string
	env  []string // more of it
	wrap []string // a command that runs the program, by exec

	cmd    *exec.Cmd
	stderr *os.File
	done   chan struct{} // closed when it has ended
	ended  bool          // the test has seen it end
	mu     sync.Mutex
	lines  []string
}

// newRun prepares a run for an alias of the rig, in a directory of its own.
func newRun(t *testing.T, g *testRig, suffix string, extraArgs ...string) *runProc {
	t.Helper()
	dir, err := os.MkdirTemp("", "rd") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	host := g.env["RIG_HOST"] + suffix
	return &runProc{t: t, rig: g, host: host, dir: dir, args: append([]string{"run", "-host", host}, extraArgs...)}
}

// startRun starts the program for an alias of the rig and waits until it is
// connected. The end of the test stops it and sees that nothing is left.
func startRun(t *testing.T, g *testRig, suffix string, extraArgs ...string) *runProc {
	t.Helper()
	p := newRun(t, g, suffix, extraArgs...)
	p.start()
	p.waitLine("connected to ")
	return p
}

// another prepares the same run in the same directory.
func (p *runProc) another() *runProc {
	return &runProc{t: p.t, rig: p.rig, host: p.host, dir: p.dir, args: p.args, env: p.env}
}

// paths are the files of an instance.
type paths struct{ lock, state, socket, control string }

// paths are the files of the run, whose host is an alias without user and port.
func (p *runProc) paths() paths {
	sum := sha256.Sum256([]byte("ssh://" + p.host))
	base := filepath.Join(p.dir, base64.URLEncoding.EncodeToString(sum[:])[:12])
	return paths{base + ".lock", base + ".state.json", base + ".sock", base + ".ctl"}
}

// engineSocket is where the run serves the engine.
func (p *runProc) engineSocket() string {
	return strings.TrimSuffix(p.paths().lock, ".lock") + ".docker.sock"
}

func (p *runProc) start() {
	p.t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		p.t.Fatal(err)
	}
	argv := append(append(p.wrap[:len(p.wrap):len(p.wrap)], program), p.args...)
	p.cmd = exec.Command(argv[0], argv[1:]...)
	p.cmd.Env = p.environment()
	p.cmd.Stderr, p.stderr, p.done = w, r, make(chan struct{})
	err = p.cmd.Start()
	w.Close()
	if err != nil {
		r.Close()
		p.t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		for s := bufio.NewScanner(r); s.Scan(); {
			p.mu.Lock()
			p.lines = append(p.lines, s.Text())
			p.mu.Unlock()
		}
	}()
	go func() {
		p.cmd.Wait()
		r.SetReadDeadline(time.Now().Add(patience)) // what it left may hold the pipe
		<-read
		r.Close()
		close(p.done)
	}()
	p.t.Cleanup(func() {
		if !p.ended {
			p.signal(syscall.SIGTERM)
			p.exits(0)
			p.leftNothing()
		}
		p.t.Logf("stderr of the run in %s:\n%s", p.dir, p.log())
	})
}

// environment is that of the run and of the commands that ask it.
func (p *runProc) environment() (env []string) {
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "DOCKER_") && !strings.HasPrefix(e, "RDHPF_") {
			env = append(env, e)
		}
	}
	env = append(env, "RDHPF_DIR="+p.dir, "PATH="+p.rig.env["RIG_BIN"]+":"+os.Getenv("PATH"),
		"GORACE=atexit_sleep_ms=50") // a whole second otherwise, and there are many runs
	return append(env, p.env...)
}

// log is what the program said so far.
func (p *runProc) log() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.Join(p.lines, "\n")
}

// waitLine waits for a line that holds text, and returns it.
func (p *runProc) waitLine(text string) (line string) {
	p.t.Helper()
	eventually(p.t, fmt.Sprintf("a line with %q", text), func() error {
		ended := false
		select {
		case <-p.done:
			ended = true
		default:
		}
		for _, l := range strings.Split(p.log(), "\n") {
			if strings.Contains(l, text) {
				line = l
				return nil
			}
		}
		if ended {
			p.t.Fatalf("the run ended (%v) without a line with %q", p.cmd.ProcessState, text)
		}
		return errors.New("there is none")
	})
	return line
}

// never fails when one of the lines so far holds text.
func (p *runProc) never(text string) {
	p.t.Helper()
	for _, l := range strings.Split(p.log(), "\n") {
		if strings.Contains(l, text) {
			p.t.Errorf("unwanted line: %s", l)
		}
	}
}

func (p *runProc) signal(sig syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		p.t.Error(err)
	}
	if sig == syscall.SIGSTOP { // its threads stop one after the other
		eventually(p.t, "the run has stopped", func() error {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
			if _, rest, ok := strings.Cut(string(stat), ") "); !ok || !strings.HasPrefix(rest, "T") {
				return fmt.Errorf("its state is %.1s, %v", rest, err)
			}
			return nil
		})
	}
}

// exits waits until the program has ended, with the given status.
func (p *runProc) exits(code int) {
	p.t.Helper()
	p.ended = true
	select {
	case <-p.done:
	case <-time.After(patience):
		p.cmd.Process.Kill()
		p.t.Errorf("the run in %s does not end", p.dir)
		<-p.done
		return
	}
	if got := p.cmd.ProcessState.ExitCode(); got != code {
		p.t.Errorf("the run in %s ended with %v, want exit status %d", p.dir, p.cmd.ProcessState, code)
	}
}

// stopsAfterCut ends a run whose connections were cut meanwhile: on the remote
// host those would last until TCP gives them up.
func (p *runProc) stopsAfterCut() {
	p.t.Helper()
	p.signal(syscall.SIGTERM)
	p.exits(0)
	p.rig.endConnections(p.t)
	p.leftNothing()
}

// leftNothing waits until nothing of an ended run is left: no process, no
// socket, no listener, nothing of it on the remote host.
func (p *runProc) leftNothing() { p.leftNothingBut(false) }

// leftNothingBut lets a run that was made to end at once leave its sockets.
func (p *runProc) leftNothingBut(sockets bool) {
	p.t.Helper()
	eventually(p.t, "the run leaves nothing", func() error {
		for _, pid := range pids() {
			env, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
			if bytes.Contains(env, []byte("RDHPF_DIR="+p.dir+"\x00")) {
				return fmt.Errorf("process %d: %s", pid, cmdline(pid))
			}
		}
		return p.rig.noSession()
	})
	entries, err := os.ReadDir(p.dir)
	if err != nil {
		p.t.Error(err)
	}
	for _, e := range entries {
		if e.Type() == fs.ModeSocket && !sockets {
			p.t.Errorf("socket %s is left", e.Name())
		}
	}
	for _, l := range strings.Split(p.log(), "\n") {
		local, _, ok := strings.Cut(l, " → ")
		_, number, isAddr := strings.Cut(local, " 127.0.0.1:")
		if !ok || !isAddr {
			continue
		}
		port, err := strconv.Atoi(number)
		if err == nil {
			err = refused(port)
		}
		if err != nil {
			p.t.Errorf("after the run, of %q: %v", l, err)
		}
	}
}

// noSession tells of a docker that serves a connection on the remote host.
func (g *testRig) noSession() error {
	for _, pid := range g.sessions() {
		return fmt.Errorf("process %d on the remote host: %s", pid, cmdline(pid))
	}
	return nil
}

// sessions are the remote host's processes that join a connection to the engine.
func (g *testRig) sessions() (all []int) {
	ns, err := os.Stat("/run/netns/" + g.env["RIG_NS"])
	if err != nil {
		return nil
	}
	for _, pid := range pids() {
		of, err := os.Stat(fmt.Sprintf("/proc/%d/ns/net", pid))
		if err == nil && os.SameFile(ns, of) && strings.HasSuffix(cmdline(pid), " system dial-stdio") {
			all = append(all, pid)
		}
	}
	return all
}

// stopServer has sshd let connections in and say nothing, until resume.
func (g *testRig) stopServer(t *testing.T) (resume func()) {
	t.Helper()
	if err := syscall.Kill(g.sshd(t), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	resume = func() { syscall.Kill(g.sshd(t), syscall.SIGCONT) }
	t.Cleanup(resume)
	return resume
}

// masterPid is the run's ssh.
func (p *runProc) masterPid() int {
	p.t.Helper()
	for _, pid := range children(p.cmd.Process.Pid) {
		if strings.Contains(cmdline(pid), " -M ") {
			return pid
		}
	}
	p.t.Fatal("the run has no ssh master")
	return 0
}

// background runs a program that the end of the test kills, and closes ended
// when it has ended.
func background(t *testing.T, name string, args ...string) (ended <-chan struct{}) {
	t.Helper()
	cmd := exec.Command(name, args...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		cmd.Wait()
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-done
	})
	return done
}

// ownName is what lsof calls this process.
func ownName(t *testing.T) string {
	t.Helper()
	comm, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(comm))
}

// pids are the processes of this machine.
func pids() (all []int) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		if pid, err := strconv.Atoi(filepath.Base(d)); err == nil {
			all = append(all, pid)
		}
	}
	return all
}

func cmdline(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return strings.TrimSpace(strings.ReplaceAll(string(b), "\x00", " "))
}

func children(parent int) (all []int) {
	for _, pid := range pids() {
		stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		// "pid (comm) state ppid …", and comm may hold anything
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if len(fields) > 1 && fields[0] != "Z" && fields[1] == strconv.Itoa(parent) {
			all = append(all, pid)
		}
	}
	return all
}

// listenUnix takes a path for a socket, which stays when it is closed.
func listenUnix(t *testing.T, path string) *net.UnixListener {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	t.Cleanup(func() { l.Close() })
	return l
}

// listenOn takes a local port.
func listenOn(t *testing.T, port int) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", localAddr(port))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// needTool skips the test where a program is missing, or fails it in CI.
func needTool(t *testing.T, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is not installed", name)
		}
		t.Skipf("%s is not installed", name)
	}
}
