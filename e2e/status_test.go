package e2e

// The commands that ask a running instance, end to end on the rig.

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// tell runs another command of the program for the run's host.
func (p *runProc) tell(command string, args ...string) (stdout, stderr string, code int) {
	p.t.Helper()
	return p.rdhpf(append([]string{command, "-host", p.host}, args...)...)
}

// rdhpf runs any command of the program in the environment of the run.
func (p *runProc) rdhpf(args ...string) (stdout, stderr string, code int) {
	p.t.Helper()
	return p.rdhpfWith(nil, args...)
}

// rdhpfWith does so with more in the environment.
func (p *runProc) rdhpfWith(env []string, args ...string) (stdout, stderr string, code int) {
	p.t.Helper()
	cmd := exec.Command(program, args...)
	cmd.Env = append(p.environment(), env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		p.t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// status is what `rdhpf status -json` says.
func (p *runProc) status() *report {
	p.t.Helper()
	out, errs, _ := p.tell("status", "-json")
	r := new(report)
	if err := json.Unmarshal([]byte(out), r); err != nil {
		p.t.Fatalf("status -json: %v: %q, %q", err, out, errs)
	}
	return r
}

// What `rdhpf status -json` tells, as far as the tests look at it.
type (
	report struct {
		Source     string        `json:"source"`
		Running    bool          `json:"running"`
		Stale      bool          `json:"stale"`
		PID        int           `json:"pid"`
		Connection connection    `json:"connection"`
		Engine     string        `json:"engine"`
		Warnings   []string      `json:"warnings"`
		Forwards   []forwardInfo `json:"forwards"`
		Skipped    []skippedPort `json:"skipped"`
	}
	connection struct {
		State      string `json:"state"`
		Reconnects int    `json:"reconnects"`
		LastError  string `json:"last_error"`
	}
	forwardInfo struct {
		ContainerID   string    `json:"container_id"`
		LocalPort     uint16    `json:"local_port"`
		Status        string    `json:"status"`
		Reason        string    `json:"reason"`
		CreatedAt     time.Time `json:"created_at"`
		UpdatedAt     time.Time `json:"updated_at"`
		ContainerName string    `json:"container_name"`
		ContainerPort uint16    `json:"container_port"`
		Image         string    `json:"image"`
		Service       string    `json:"service"`
		Node          string    `json:"node"`
		RemoteAddress string    `json:"remote_address"`
		RemotePort    uint16    `json:"remote_port"`

		VerifiedAt      *time.Time `json:"verified_at"`
		Connections     int64      `json:"connections"`
		OpenConnections int64      `json:"open_connections"`
		BytesIn         int64      `json:"bytes_in"`
		BytesOut        int64      `json:"bytes_out"`
		LastUsedAt      *time.Time `json:"last_used_at"`
	}
	skippedPort struct {
		Name     string `json:"container_name"`
		Port     uint16 `json:"port"`
		Protocol string `json:"protocol"`
		Reason   string `json:"reason"`
	}
)

const (
	active   = "active"
	conflict = "conflict"
	pending  = "pending"

	connecting = "connecting"
	connected  = "connected"

	reasonProbing = "probing"
	reasonSilent  = "port not responding"
	reasonRefused = "refused by the SSH server: administratively prohibited"
)

// ask sends a request over the instance's socket, as a program would.
func (p *runProc) ask(method string, result any) error {
	c, err := net.Dial("unix", p.paths().socket)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second)) // somebody else's socket may say nothing
	if _, err := fmt.Fprintf(c, `{"method":%q,"params":{}}`+"\n", method); err != nil {
		return err
	}
	reply := struct {
		Result any     `json:"result"`
		Error  *string `json:"error"`
	}{Result: result}
	if err := json.NewDecoder(c).Decode(&reply); err != nil {
		return err
	}
	if reply.Error != nil {
		return errors.New(*reply.Error)
	}
	return nil
}

// forward is the forward of a local port, as status has it.
func (p *runProc) forward(port int) *forwardInfo {
	p.t.Helper()
	for _, f := range p.status().Forwards {
		if int(f.LocalPort) == port {
			return &f
		}
	}
	return nil
}

// becomes waits until status has a forward of port in a status, with text in its
// reason.
func (p *runProc) becomes(port int, status, reason string) *forwardInfo {
	p.t.Helper()
	var f *forwardInfo
	eventually(p.t, fmt.Sprintf("%d is %s %s", port, status, reason), func() error {
		if f = p.forward(port); f == nil || f.Status != status || !strings.Contains(f.Reason, reason) || reason == "" && f.Reason != "" {
			return fmt.Errorf("it is %+v", f)
		}
		return nil
	})
	return f
}

func TestE2EStatus(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 4)
	busy := listenOn(t, port+1)
	web := g.boot(t, port)
	g.boot(t, port+1)
	dead := g.bootSpec(t, boxSpec{args: []string{"-mode", "none"}, ports: []boxPort{{host: port + 2, private: 80}, {host: port + 3, private: 53, proto: "udp"}}})
	p := startRun(t, g, "")

	out, errs, code := p.tell("status", "-wait", "30s", fmt.Sprint(port))
	if code != 0 || !strings.Contains(out, web.id[:12]) {
		t.Errorf("status -wait: %d, %q, %q", code, out, errs)
	}
	p.becomes(port, active, "")
	p.becomes(port+1, conflict, fmt.Sprintf("port already in use after 5 retry attempts (held by %s, pid %d)", ownName(t), os.Getpid()))
	p.becomes(port+2, pending, "port not responding")

	out, errs, code = p.tell("status")
	if code != 0 || errs != "" {
		t.Errorf("status: %d, stderr %q", code, errs)
	}
	for _, want := range []string{"CONTAINER ID   LOCAL ", web.id[:12], fmt.Sprintf("Skipped: %d/udp of %s (%s): SSH carries TCP only", port+3, dead.name, dead.id[:12])} {
		if !strings.Contains(out, want) {
			t.Errorf("status prints no %q:\n%s", want, out)
		}
	}
	r := p.status()
	if r.Source != "socket" || !r.Running || r.Stale || r.PID != p.cmd.Process.Pid || r.Connection.State != connected || !strings.HasPrefix(r.Engine, "Docker/") {
		t.Errorf("status -json: %+v", r)
	}
	if f := p.forward(port); f.ContainerName != web.name || f.ContainerPort != 80 || f.Image != g.env["RIG_IMAGE"] || f.CreatedAt.IsZero() {
		t.Errorf("the forward is %+v", f)
	}

	out, _, code = p.tell("health")
	if code != 1 || !strings.HasPrefix(out, "degraded: 1 active, 1 conflict, 1 pending; connected for ") {
		t.Errorf("health: %d, %q", code, out)
	}
	_, errs, code = p.tell("status", "-wait", "300ms")
	if code != 1 || !strings.Contains(errs, fmt.Sprintf("127.0.0.1:%d of ", port+1)) || !strings.Contains(errs, " is conflict (") {
		t.Errorf("status -wait that has to fail: %d, %q", code, errs)
	}

	// All is well once the port is free and the silent one is gone.
	busy.Close()
	dead.remove()
	if _, errs, code = p.tell("status", "-wait", "30s"); code != 0 {
		t.Errorf("status -wait: %d, %q", code, errs)
	}
	if out, _, code = p.tell("health", "-json"); code != 0 || !strings.Contains(out, `"status":"ok"`) {
		t.Errorf("health -json: %d, %q", code, out)
	}

	before := p.forward(port)
	if out, _, code = p.tell("pause"); code != 0 || refused(port) != nil {
		t.Errorf("pause: %d, %q, and then %v", code, out, refused(port))
	}
	p.becomes(port, pending, "paused")
	if _, _, code = p.tell("pause"); code != 0 {
		t.Errorf("pause again: %d", code)
	}
	if out, _, code = p.tell("resume"); code != 0 || web.answering(port) != nil {
		t.Errorf("resume: %d, %q, and then %v", code, out, web.answering(port))
	}
	if after := p.becomes(port, active, ""); !after.CreatedAt.Equal(before.CreatedAt) || !after.UpdatedAt.After(before.UpdatedAt) {
		t.Errorf("before the pause %+v, after it %+v", before, after)
	}

	if out, _, code = p.tell("stop"); code != 0 || out != "stopped\n" {
		t.Errorf("stop: %d, %q", code, out)
	}
	p.exits(0)
	p.leftNothing()
	if files, _ := filepath.Glob(filepath.Join(p.dir, "*")); len(files) != 1 || files[0] != p.paths().lock {
		t.Errorf("a clean stop leaves %v", files)
	}
	for _, command := range []string{"status", "health", "pause", "resume", "reload", "stop"} {
		if _, errs, code := p.tell(command); code != 3 || !strings.Contains(errs, "No running instance found for ssh://"+p.host+". Start one with: rdhpf run -host ssh://"+p.host) {
			t.Errorf("%s without an instance: %d, %q", command, code, errs)
		}
	}
}

func TestE2EReload(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 4)
	stays, moves := g.boot(t, port), g.boot(t, port+1)
	p := newRun(t, g, "", "-skip", fmt.Sprint(port+2))
	g.boot(t, port+2)
	p.start()
	stays.answers(port)
	moves.answers(port + 1)
	c := dialEcho(t, port+1) // a live connection outlives the move
	before := p.becomes(port, active, "")

	config := filepath.Join(p.dir, "config.json")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(fmt.Sprintf(`{"hosts": {%q: {"map": {"%d": %d}}}, "skip": []}`, p.host, port+1, port+3))
	if out, errs, code := p.tell("reload"); code != 0 {
		t.Fatalf("reload: %d, %q, %q", code, out, errs)
	}
	moves.answers(port + 3)
	refuses(t, port+1)
	if after := p.forward(port); after.CreatedAt != before.CreatedAt || after.UpdatedAt != before.UpdatedAt {
		t.Errorf("a forward that the reload does not concern was touched: %+v, then %+v", before, after)
	}
	fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	if n, err := c.Read(make([]byte, 100)); n == 0 {
		t.Errorf("the live connection did not outlive the reload: %v", err)
	}

	write("{\n  \"map\": {\"80\": \"x\"}\n}")
	_, errs, code := p.tell("reload")
	if code != 1 || !strings.Contains(errs, config+":2: ") {
		t.Errorf("reload of a bad file: %d, %q", code, errs)
	}
	moves.answers(port + 3)
	skipped := p.status().Skipped
	if !slices.ContainsFunc(skipped, func(s skippedPort) bool { return int(s.Port) == port+2 && s.Reason == "excluded by -skip" }) {
		t.Errorf("the flag does not win over the file: %+v", skipped)
	}
}

func TestE2EStatusAfterKill(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 1)
	b := g.boot(t, port)
	p := startRun(t, g, "")
	b.answers(port)
	p.becomes(port, active, "")
	p.signal(syscall.SIGKILL)
	p.exits(-1)
	out, errs, code := p.tell("status", "-json")
	if code != 3 || !strings.Contains(errs, "No rdhpf is running for this host") || !strings.Contains(out, `"source":"file","running":false,"stale":true`) {
		t.Errorf("status of a killed run: %d, %q, %q", code, out, errs)
	}
}

// A -wait that begins before the run does.
func TestE2EWaitForAStart(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 1)
	p := newRun(t, g, "")
	type result struct {
		out, errs string
		code      int
	}
	done := make(chan result)
	go func() {
		out, errs, code := p.tell("status", "-wait", "60s", fmt.Sprint(port))
		done <- result{out, errs, code}
	}()
	p.start()
	p.waitLine("connected to ")
	if out, errs, code := p.tell("status"); code != 0 || out != "No published ports.\n" {
		t.Errorf("status without a container: %d, %q, %q", code, out, errs)
	}
	if _, errs, code := p.tell("status", "-wait", "300ms"); code != 1 || !strings.Contains(errs, "no port is forwarded, and -wait wants at least one") {
		t.Errorf("status -wait without a container: %d, %q", code, errs)
	}
	b := g.boot(t, port)
	if r := <-done; r.code != 0 || !strings.Contains(r.out, b.id[:12]) {
		t.Errorf("status -wait: %+v", r)
	}
}

// The instance stands still: whoever asks is told so soon, and that nothing of
// what is shown may be so any more.
func TestE2EInstanceStopped(t *testing.T) {
	g := needRig(t)
	const soon = 6 * time.Second // 3 s, on a machine that is not busy
	port := freePorts(t, 1)
	b := g.boot(t, port)
	p := startRun(t, g, "")
	p.becomes(port, active, "")
	p.signal(syscall.SIGSTOP)
	t.Cleanup(func() { p.signal(syscall.SIGCONT) })
	check := func(args ...string) {
		t.Helper()
		began := time.Now()
		out, errs, code := p.tell(args[0], args[1:]...)
		took("instance stopped: "+strings.Join(args[:1], " ")+" says so", began)
		if waited := time.Since(began); waited > soon {
			t.Errorf("%v takes %v", args, waited)
		}
		if helps := fmt.Sprintf("(pid %[1]d) does not answer and may be stopped: kill -CONT %[1]d", p.cmd.Process.Pid); code != 1 || !strings.Contains(errs, helps) {
			t.Errorf("%v ends with %d: %q, %q", args, code, out, errs)
		}
		if strings.Contains(out, active) && !strings.Contains(errs, "does not answer") {
			t.Errorf("%v shows something as active without a warning on stderr: %q, %q", args, out, errs)
		}
	}
	for _, args := range [][]string{{"status"}, {"status", "-wide"}, {"status", "-json"}, {"status", "-wait", "2s"},
		{"status", "-wait", "2s", fmt.Sprint(port)}, {"health"}, {"health", "-json"}, {"env"}} {
		check(args...)
	}
	if r := p.status(); !r.Running || !r.Stale || r.Source == "socket" || r.PID != p.cmd.Process.Pid {
		t.Errorf("status -json: %+v", r)
	}
	p.signal(syscall.SIGCONT)
	b.answers(port)
	p.becomes(port, active, "")
	p.signal(syscall.SIGSTOP)
	for _, command := range []string{"pause", "resume", "reload", "stop"} { // it may do as it is told when it goes on
		check(command)
	}
}

// A host that cannot be meant is a mistake to tell of, and not the one instance
// that happens to run.
func TestE2EBrokenHost(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 1)
	b := g.boot(t, port)
	p := startRun(t, g, "")
	p.becomes(port, active, "")
	commands := [][]string{{"status"}, {"status", "-json"}, {"status", "-wait", "1s"}, {"health"}, {"pause"}, {"resume"}, {"reload"}, {"stop"}, {"run"}}
	var wrong []error
	for _, broken := range []string{"ssh://", "ssh://a b", "ssh://user@host:99999", "nonsense://host", "ssh://-oProxyCommand=x"} {
		for _, c := range commands {
			for _, how := range []string{"DOCKER_HOST", "-host"} {
				args, env := append([]string{c[0], "-host", broken}, c[1:]...), []string(nil)
				if how == "DOCKER_HOST" {
					args, env = c, []string{"DOCKER_HOST=" + broken}
				}
				out, errs, code := p.rdhpfWith(env, args...)
				if code != 1 && code != 2 || !strings.Contains(errs, how) || strings.Contains(out, b.id[:12]) {
					wrong = append(wrong, fmt.Errorf("%v with %s %q ends with %d: %q, %q", c, how, broken, code, out, errs))
				}
			}
		}
	}
	few(t, "commands", wrong)
	if err := b.answering(port); err != nil {
		t.Errorf("the instance was touched: %v", err)
	}
	if r := p.status(); r.PID != p.cmd.Process.Pid || !r.Running {
		t.Errorf("the instance was touched: %+v", r)
	}
}

// More want to watch than there are places for. Those turned away come back, and
// not as fast as they can.
func TestE2EMoreWatchersThanPlaces(t *testing.T) {
	g := needRig(t)
	const places, all = 128, 136
	p := startRun(t, g, "")
	pids := []int{p.cmd.Process.Pid}
	for range all {
		cmd := exec.Command(program, "status", "-host", p.host, "-watch", "-json")
		cmd.Env = p.environment()
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			cmd.Process.Kill()
			cmd.Wait()
		})
		pids = append(pids, cmd.Process.Pid)
	}
	eventually(t, "all places are taken", func() error {
		if n := holdingOf(t, pids[0]).fds; n < places {
			return fmt.Errorf("the instance has %d open files", n)
		}
		return nil
	})
	used := func() (sum time.Duration) {
		for _, pid := range pids {
			sum += cpuTime(t, pid)
		}
		return sum
	}
	const look = 3 * time.Second
	eventually(t, "they are at rest", func() error { // starting takes some time, too
		before := used()
		time.Sleep(look) // what is measured
		if spent := used() - before; spent > look/5 {
			return fmt.Errorf("they took %v of CPU in %v", spent, look)
		}
		return nil
	})
	began := time.Now()
	if r := p.status(); r.Source != "socket" {
		t.Errorf("meanwhile status comes from the %s", r.Source)
	}
	took("more watchers than places: status", began)
}

// cpuTime is what a process took of it.
func cpuTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:])) // from the third field on
	user, _ := strconv.Atoi(f[11])
	system, _ := strconv.Atoi(f[12])
	return time.Duration(user+system) * 10 * time.Millisecond
}
