package main

import (
	"context"
	"errors"
	"fmt"
	"io"
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
