package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Tests of client.go, and of following an instance: against a server as it is, one that is somebody else's, one that says
// nothing, and one that cuts its subscribers off. The commands are tested in status_test.go, as processes.

func TestCall(t *testing.T) {
	s := startSocket(t)
	var snap snapshot
	if err := call(s.path, "status", &snap); err != nil || snap.Engine != "first" {
		t.Errorf("status: %+v, %v", snap, err)
	}
	var paused struct{ Paused bool }
	if err := call(s.path, "pause", &paused); err != nil || !paused.Paused {
		t.Errorf("pause: %+v, %v", paused, err)
	}
	if err := call(s.path, "reload", &paused); err == nil || err.Error() != "config.json: no such thing" {
		t.Errorf("reload: %v", err)
	}
	if err := call(s.path+"x", "status", &snap); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no socket: %v", err)
	}
}

// The client does not talk to whoever put a socket in the instance's place: it wants a directory that is only ours.
func TestDialInstanceDirectory(t *testing.T) {
	s := startSocket(t)
	dir := filepath.Dir(s.path)
	if err := call(s.path, "health", new(health)); err != nil {
		t.Error(err)
	}
	for _, mode := range []os.FileMode{0o777, 0o770, 0o755} {
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		if err := call(s.path, "health", new(health)); err == nil || !strings.Contains(err.Error(), "open to other users") {
			t.Errorf("mode %o: error %v", mode, err)
		}
	}
	if os.Geteuid() != 0 {
		return
	}
	if err := errors.Join(os.Chmod(dir, 0o700), os.Chown(dir, 65534, 65534)); err != nil {
		t.Fatal(err)
	}
	if err := call(s.path, "health", new(health)); err == nil || !strings.Contains(err.Error(), "belongs to uid 65534") {
		t.Errorf("somebody else's: error %v", err)
	}
}

// What does not answer is told of as such within 3 s, whatever is asked.
func TestCallSilent(t *testing.T) {
	path := filepath.Join(muxTempDir(t), "s")
	l, err := listenSocket(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, method := range []string{"status", "health", "stop"} {
		begun := time.Now()
		if err := call(path, method, new(health)); !errors.Is(err, errSilent) {
			t.Errorf("%s: error %v, want %v", method, err, errSilent)
		}
		if took := time.Since(begun); took > 3*time.Second {
			t.Errorf("%s took %v", method, took)
		}
	}
	// Nor when so many have asked that nobody else can.
	for {
		conn, err := dialInstance(path)
		if err != nil {
			if !errors.Is(err, errSilent) {
				t.Error(err)
			}
			return
		}
		defer conn.Close()
	}
}

// Whoever follows an instance that cuts it off comes back later each time.
func TestFollowCutOff(t *testing.T) {
	for _, says := range []string{"", string(mustJSON(&rpcResponse{Result: socketSnap("x"), Error: jsonNull})) + "\n"} {
		t.Run(fmt.Sprintf("after %d bytes", len(says)), func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(muxTempDir(t), "s")
			l, err := listenSocket(path)
			if err != nil {
				t.Fatal(err)
			}
			var came atomic.Int64
			var wg sync.WaitGroup
			defer wg.Wait()
			defer l.Close()
			wg.Add(1)
			go func() {
				defer wg.Done()
				for {
					conn, err := l.Accept()
					if err != nil {
						return
					}
					came.Add(1)
					io.WriteString(conn, says)
					conn.Close()
				}
			}()
			ctx, cancel := context.WithTimeout(context.Background(), 4*time.Second)
			defer cancel()
			sights := make(chan sight)
			wg.Add(1)
			go func() {
				defer wg.Done()
				follow(ctx, paths{dir: filepath.Dir(path), socket: path, lock: path + ".lock", state: path + ".state.json"}, nil, sights)
			}()
			for ctx.Err() == nil {
				select {
				case <-sights:
				case <-ctx.Done():
				}
			}
			// At 0, 0.1, 0.3, 0.7, 1.5 and 3.1 s; where nothing was said, the status is asked for too.
			if n := came.Load(); n < 4 || n > 14 {
				t.Errorf("it came %d times in 4 s", n)
			}
		})
	}
}

// A DOCKER_HOST that is the socket of an instance means the host of that instance, whatever else is configured.
func TestFindHost(t *testing.T) {
	const served = "ssh://me@box.invalid"
	dir := stateFolder(t)
	p := pathsFor(dir, served)
	write := func(snap *snapshot) {
		t.Helper()
		if err := writeState(p.state, snap); err != nil {
			t.Fatal(err)
		}
	}
	of := func(host string) *snapshot {
		snap := socketSnap("x")
		snap.Host, snap.UpdatedAt = host, epoch
		return snap
	}
	find := func(flag, dockerHost string) (string, error) {
		t.Setenv("DOCKER_HOST", dockerHost)
		h, err := findHost(flag, dir, "/nonexistent")
		if err != nil {
			return "", err
		}
		return h.String(), nil
	}
	t.Setenv("DOCKER_CONTEXT", "")

	write(of(served))
	for _, c := range []struct {
		name, flag, dockerHost string
		want, err              string
	}{
		{"the socket", "", "unix://" + p.docker, served, ""},
		{"written in another way", "", "unix://" + dir + "//x/../" + filepath.Base(p.docker), served, ""},
		{"a flag comes first", "elsewhere", "unix://" + p.docker, "ssh://elsewhere", ""},
		{"the other socket", "", "unix://" + p.socket, "", "DOCKER_HOST is unix://"},
		{"without a scheme", "", p.docker, "", "DOCKER_HOST is "},
		{"of another scheme", "", "tcp://" + p.docker, "", "DOCKER_HOST is "},
		{"in another directory", "", "unix:///run/" + filepath.Base(p.docker), "", "rdhpf needs ssh://"},
		{"below the directory", "", "unix://" + dir + "/x/" + filepath.Base(p.docker), "", "rdhpf needs ssh://"},
		{"of nobody", "", "unix://" + dir + "/nobody.docker.sock", "", "the socket of no known instance"},
		{"another host", "", "ssh://plain", "ssh://plain", ""},
	} {
		got, err := find(c.flag, c.dockerHost)
		if got != c.want || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %q, %v, want %q, %q", c.name, got, err, c.want, c.err)
		}
	}
	if _, err := find("", "unix://"+dir+"/nobody.docker.sock"); !strings.Contains(fmt.Sprint(err), dir+"/nobody.docker.sock") || errors.Is(err, errNoHost) {
		t.Errorf("of nobody: %v", err)
	}

	// A state file of another host, or one that names none, is not believed.
	for _, host := range []string{"ssh://somebody@else.invalid", "tcp://box:2375", ""} {
		write(of(host))
		if got, err := find("", "unix://"+p.docker); err == nil {
			t.Errorf("with a state file of %q: %q", host, got)
		}
	}

	// Without a state file the instance itself is asked.
	if err := os.Remove(p.state); err != nil {
		t.Fatal(err)
	}
	if got, err := find("", "unix://"+p.docker); err == nil {
		t.Errorf("with neither a file nor an instance: %q", got)
	}
	for host, want := range map[string]string{served: served, "ssh://somebody@else.invalid": ""} {
		l, err := listenSocket(p.socket)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		srv := &server{board: newBoard(of(host)), stop: func() {}}
		srv.ask = func(context.Context, string) (any, error) {
			snap, _ := srv.board.look()
			return snap, nil
		}
		go func() {
			defer close(done)
			srv.serve(ctx, l)
		}()
		if got, err := find("", "unix://"+p.docker); got != want || (err == nil) != (want != "") {
			t.Errorf("asked an instance of %s: %q, %v", host, got, err)
		}
		cancel()
		<-done
	}
}

// TestPredecessor has an rdhpf of an earlier version hold the socket: it sends its state without being asked, and takes no lock.
func TestPredecessor(t *testing.T) {
	dir := stateFolder(t)
	p := pathsFor(dir, "ssh://box.invalid")
	l, err := net.Listen("unix", p.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	serveEach(t, l, func(c net.Conn) {
		io.WriteString(c, `{"version":"2.0","pid":4242,"ports":[]}`+"\n")
		io.Copy(io.Discard, c)
	})
	if err := os.WriteFile(p.state, []byte(`{"version":"2.0","pid":4242,"ports":[]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range []string{"status", "health", "stop", "run"} {
		rdhpf(t, dir, args, "-host", "box.invalid").is(t, 1, "", `rdhpf: an rdhpf of another version \(pid 4242\) is running for this host: [^\n]*\n`)
	}
	if conn, err := net.Dial("unix", p.socket); err != nil {
		t.Errorf("its socket is gone: %v", err)
	} else {
		conn.Close()
	}
}

func TestLocalPorts(t *testing.T) {
	f := func(name, service, id string, private, local uint16, status string) forwardInfo {
		reason := ""
		if status != active {
			reason = "why"
		}
		return forwardInfo{ContainerName: name, Service: service, ContainerID: id, ContainerPort: private, LocalPort: local, LocalAddress: "127.0.0.1",
			Status: status, Reason: reason}
	}
	snap := &snapshot{
		Forwards: []forwardInfo{f("web", "", "abc123def456", 80, 8080, active), f("web", "", "abc123def456", 443, 8443, pending),
			f("shop-db-1", "db", "bbbbbbbbbbbb", 5432, 5432, active), f("shop-db-2", "db", "cccccccccccc", 5432, 5433, conflict),
			f("db", "", "dddddddddddd", 1, 1001, active), f("old", "", "eeeeeeeeeeee", 2, 1002, conflict)},
		Skipped: []skippedPort{{"abc123def456", "web", 53, "udp", "SSH carries TCP only"}, {"ffffffffffff", "host", 0, "tcp", "host network"}},
	}
	for _, c := range []struct {
		name  string
		port  uint16
		proto string
		lines string
		err   string
	}{
		{"web", 80, "tcp", "127.0.0.1:8080\n", ""},
		{"web", 443, "tcp", "127.0.0.1:8443\n", ""},
		{"web", 0, "", "80/tcp -> 127.0.0.1:8080\n443/tcp -> 127.0.0.1:8443\n", ""},
		{"abc1", 80, "tcp", "127.0.0.1:8080\n", ""},
		{"abc123def456789", 80, "tcp", "127.0.0.1:8080\n", ""},
		{"db", 0, "", "1/tcp -> 127.0.0.1:1001\n", ""}, // a container's name goes before a service's
		{"shop-db-1", 5432, "tcp", "127.0.0.1:5432\n", ""},
		{"shop-db-2", 5432, "tcp", "", "127.0.0.1:5433 of shop-db-2 is conflict (why)"},
		{"web", 81, "tcp", "", "web does not publish port 81/tcp: it publishes 80, 443"},
		{"web", 80, "udp", "", "web does not publish port 80/udp: it publishes 80, 443"},
		{"web", 53, "udp", "", "53/udp of web (abc123def456) is not forwarded: SSH carries TCP only"},
		{"host", 80, "tcp", "", "host (ffffffffffff) is not forwarded: host network"},
		{"webb", 80, "tcp", "", `no container or service "webb" publishes a port: did you mean web?`},
		{"\x1b[31m", 80, "tcp", "", `no container or service "\x1b[31m" publishes a port: see rdhpf status -wide`},
	} {
		lines, err := localPorts(snap, c.name, c.port, c.proto)
		text := ""
		if err != nil {
			text = err.Error()
		}
		if got := strings.Join(lines, ""); got != c.lines || text != c.err {
			t.Errorf("%s %d/%s: %q, %q", c.name, c.port, c.proto, got, text)
		}
	}
	snap.Forwards = slices.DeleteFunc(snap.Forwards, func(f forwardInfo) bool { return f.ContainerName == "db" })
	if lines, err := localPorts(snap, "db", 5432, "tcp"); len(lines) != 1 || err == nil {
		t.Errorf("of a service, one of whose two containers is in conflict: %q, %v", lines, err)
	}
}

func TestSSHHosts(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"config": "Host web db *.example\n  HostName x\nhost=third\nHOST \"quoted\" !not\nInclude more/* config\nMatch host other\nHost\nHost bad\x1b[31m $(reboot)\n",
		"more/a": "Host inner\n",
		"more/b": "Include ~/far\n",
		"../far": "Host far\n",
	} {
		path := filepath.Join(dir, "home", ".ssh", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ssh := filepath.Join(dir, "home", ".ssh")
	hosts := sshHosts(filepath.Join(ssh, "config"), ssh, 0)
	slices.Sort(hosts)
	if got, want := strings.Join(slices.Compact(hosts), " "), "db far inner quoted third web"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestCompletions(t *testing.T) {
	home, dir := t.TempDir(), stateFolder(t)
	if err := os.MkdirAll(filepath.Join(home, ".ssh"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(home, ".ssh", "config"), []byte("Host builder bastion\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	startInstance(t, dir, testHost)
	for _, c := range []struct{ words, want string }{
		{"sta", "status"},
		{"st", "status stop"},
		{"run -no", "-no-docker-socket -no-probe"},
		{"run b", "bastion builder"},
		{"run -host b", "bastion builder"},
		{"run -host ssh://", testHost},
		{"stop -host ", "bastion builder " + testHost},
		{"run builder ", ""},
		{"run builder -- st", ""},
		{"run -log-level w", "warn"},
		{"status -wait 3", "30s"},
		{"status -wait 30s ", "8080"},
		{"status -json -w", "-wait -watch -wide"},
		{"port ", "web"},
		{"port web ", "0"},
		{"port nobody ", ""},
		{"port -host " + testHost + " w", "web"},
		{"port -host other w", ""},
		{"completion ", "bash fish zsh"},
		{"env -shell f", "fish"},
		{"help st", "status stop"},
		{"nonsense ", ""},
		{"version ", ""},
	} {
		cmd := program(dir, append([]string{completeCommand}, strings.Split(c.words, " ")...)...)
		cmd.Env = append(cmd.Env, "HOME="+home)
		a := runProgram(t, cmd)
		var got []string
		for line := range strings.Lines(a.stdout) {
			word, _, _ := strings.Cut(strings.TrimSpace(line), "\t")
			got = append(got, word)
		}
		slices.Sort(got)
		if strings.Join(got, " ") != c.want || a.stderr != "" || a.code != 0 {
			t.Errorf("%q: %q, %q, %d; want %q", c.words, got, a.stderr, a.code, c.want)
		}
	}
}

// The scripts work in the shells themselves.
func TestCompletionInShells(t *testing.T) {
	needTool(t, "tmux")
	dir, bin := stateFolder(t), t.TempDir()
	script := "#!/bin/sh\nexec env RDHPF_TEST_MAIN=1 '" + testExe + "' \"$@\"\n"
	if err := os.WriteFile(filepath.Join(bin, "rdhpf"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	startInstance(t, dir, testHost)
	for _, c := range []struct {
		shell []string
		load  string
	}{
		{[]string{"bash", "--norc", "--noprofile"}, `source <(rdhpf completion bash)`},
		{[]string{"zsh", "-f"}, `autoload -U compinit; compinit -u -d ` + filepath.Join(bin, "dump") + `; source <(rdhpf completion zsh)`},
		{[]string{"fish", "--no-config"}, `rdhpf completion fish | source`},
	} {
		t.Run(c.shell[0], func(t *testing.T) {
			needTool(t, c.shell[0])
			tmux := func(args ...string) string {
				t.Helper()
				out, err := exec.Command("tmux", append([]string{"-S", filepath.Join(bin, c.shell[0]), "-f", "/dev/null"}, args...)...).CombinedOutput()
				if err != nil && args[0] != "kill-server" {
					t.Fatalf("tmux %q: %v: %s", args, err, out)
				}
				return string(out)
			}
			env := append(cleanEnv(), "RDHPF_DIR="+dir, "PATH="+bin+":"+os.Getenv("PATH"), "HOME="+bin, "LC_ALL=C.UTF-8", "PS1=ready: ")
			tmux(append([]string{"new-session", "-d", "-x", "80", "-y", "24", "env", "-i", "TERM=screen"}, append(env, c.shell...)...)...)
			t.Cleanup(func() { tmux("kill-server") })
			shows := func(want string) {
				t.Helper()
				eventually(t, "the screen shows "+want, func() error {
					if got := tmux("capture-pane", "-p"); !strings.Contains(got, want) {
						return fmt.Errorf("it shows %q", strings.TrimSpace(got))
					}
					return nil
				})
			}
			tmux("send-keys", c.load+"; echo load''ed", "Enter")
			shows("\nloaded")
			for _, k := range []struct{ typed, becomes string }{
				{"rdhpf hea", "rdhpf health"},
				{"rdhpf run -no-p", "rdhpf run -no-probe"},
				{"rdhpf port w", "rdhpf port web"},
				{"rdhpf stop -host ssh", "rdhpf stop -host " + testHost},
			} {
				tmux("send-keys", k.typed, "Tab")
				shows(k.becomes)
				tmux("send-keys", "C-u") // in line, unlike an interrupt
			}
		})
	}
}
