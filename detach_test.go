package main

// Tests of how an instance says that it is ready. That one runs in the background is seen on the rig.

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

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
