package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
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
