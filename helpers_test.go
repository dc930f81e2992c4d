package main

import (
	"net"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience bounds every wait for what has to come. It is long, for a machine
// can be busy; nothing waits that long when all is well.
const patience = 30 * time.Second

// TestMain makes the test binary serve as the program too, so that it is under
// the race detector when the tests are.
func TestMain(m *testing.M) {
	if os.Getenv("RDHPF_TEST_MAIN") == "1" {
		main()
		os.Exit(0)
	}
	if signal.Ignored(syscall.SIGINT) { // as in a script's background job: children would inherit it
		signal.Notify(make(chan os.Signal, 1), syscall.SIGINT)
	}
	os.Exit(m.Run())
}

// eventually waits until cond returns nil.
func eventually(t *testing.T, what string, cond func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := cond()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v: %v", what, patience, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
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

// serveEach serves the connections of a listener, each in a goroutine of its own, until the test ends, and closes them.
func serveEach(t *testing.T, l net.Listener, serve func(net.Conn)) {
	var all sync.WaitGroup
	all.Add(1)
	go func() {
		defer all.Done()
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all.Add(1)
			go func() {
				defer all.Done()
				defer c.Close()
				serve(c)
			}()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		all.Wait()
	})
}
