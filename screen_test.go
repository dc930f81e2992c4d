package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Tests of screen.go: the width of text, and what a person sees on a terminal of 80 columns. The goldens screen-* are what
// tmux captured, with the clock blotted out.

func TestCut(t *testing.T) {
	const green, reset = "\x1b[32m", "\x1b[0m"
	for _, c := range []struct {
		text       string
		columns    int
		width      int
		cut, front string
	}{
		{"", 0, 1, "", ""},
		{"port", 4, 4, "port", "port"},
		{"ports", 5, 4, "por…", "…rts"},
		{"ports", 5, 1, "…", "…"},
		{"é", 1, 1, "é", "é"},
		{"e\u0301e\u0301e\u0301", 3, 3, "e\u0301e\u0301e\u0301", "e\u0301e\u0301e\u0301"}, // combining marks
		{"e\u0301e\u0301e\u0301", 3, 2, "e\u0301…", "…\u0301e\u0301"},
		{"日本語", 6, 6, "日本語", "日本語"},
		{"日本語", 6, 5, "日本…", "…本語"},
		{"日本語", 6, 4, "日…", "…語"}, // half of a wide one is none
		{"가각ᄀ\u1161", 6, 6, "가각ᄀ\u1161", "가각ᄀ\u1161"},
		{"✓ ⌚ 🚀", 7, 7, "✓ ⌚ 🚀", "✓ ⌚ 🚀"},
		{"Ａ｡…", 4, 3, "Ａ…", "…｡…"},
		{green + "active" + reset + "  x", 9, 9, green + "active" + reset + "  x", ""},
		{green + "active" + reset + "  x", 9, 4, green + "act…" + reset, ""},
	} {
		if got := textColumns(c.text); got != c.columns {
			t.Errorf("%q takes %d columns, want %d", c.text, got, c.columns)
		}
		if got := cut(c.text, c.width); got != c.cut {
			t.Errorf("%q cut to %d: %q, want %q", c.text, c.width, got, c.cut)
		}
		if got := cutFront(c.text, c.width); c.front != "" && got != c.front {
			t.Errorf("%q cut in front to %d: %q, want %q", c.text, c.width, got, c.front)
		}
	}
}

// screenForwards are a forward of each status, with long reasons, that began 3 days and more ago.
func screenForwards(reason string) string {
	old := fmt.Sprintf(`"created_at": %q, `, time.Now().Add(-77*time.Hour-30*time.Minute).UTC().Format(time.RFC3339)) + `"remote_address": "127.0.0.1"`
	return `{"connection": {"state": "connected"}, "skipped": [{"container_id": "0123456789ab", "container_name": "dns", "port": 53, ` +
		`"protocol": "udp", "reason": "SSH carries TCP only, and so it is left out of the table above"}], "forwards": [` +
		`{"container_id": "abc123def456", "local_address": "127.0.0.1", "local_port": 8080, "remote_port": 8080, "status": "active", ` + old + `},` +
		`{"container_id": "789abc123abc", "local_address": "127.0.0.1", "local_port": 5432, "remote_port": 5432, "status": "conflict", "reason": "` +
		reasonGivenUp + ` (held by postgres, pid 4242)", ` + old + `},` +
		`{"container_id": "def456abc789", "local_address": "2001:db8:1234:5678::1", "local_port": 3000, "remote_port": 3000, "status": "pending", "reason": "` +
		reason + `", ` + old + `}]}`
}

func TestTerminal(t *testing.T) {
	dir := stateFolder(t)
	i := startInstanceWith(t, dir, testHost, screenForwards("refused by the SSH server: administratively prohibited"))
	m := openTerminal(t, dir, 80, 14)
	captured := func(name, screen string) {
		t.Helper()
		golden(t, "screen-"+name, []byte(regexp.MustCompile(`\d\d:\d\d:\d\d\n`).ReplaceAllString(screen, "hh:mm:ss\n")+"\n"))
	}
	prompt := func(s string) bool { return strings.HasSuffix(s, "\nprompt>") }
	asBefore := func() {
		t.Helper()
		if alternate, cursor := m.flag("alternate_on"), m.flag("cursor_flag"); alternate != "0" || cursor != "1" {
			t.Errorf("the shell has alternate screen %s, cursor %s", alternate, cursor)
		}
		m.types(`clear; test "$modes" = "$(stty -g)" && echo "same mo""des"`)
		m.shows("the terminal's modes as before", func(s string) bool { return s == "same modes\nprompt>" })
	}
	drawn := func(text string) func(string) bool {
		return func(s string) bool {
			return strings.HasPrefix(s, testHost+"  ") && strings.Contains(s, text) && strings.Contains(s, "Skipped: ") && !strings.Contains(s, "prompt>")
		}
	}

	m.types(`modes=$(stty -g); clear; ./rdhpf status`)
	captured("status", m.shows("the table", prompt))
	m.tmux("resize-window", "-x", "40", "-y", "14")
	m.types(`clear; ./rdhpf status`)
	captured("status-narrow", m.shows("the narrow table", func(s string) bool { return prompt(s) && strings.HasPrefix(s, testHost) }))
	m.tmux("resize-window", "-x", "80", "-y", "14")
	asBefore()

	m.types(`clear; echo earlier`)
	m.shows("earlier work", func(s string) bool { return s == "earlier\nprompt>" })
	m.types(`./rdhpf status -watch`)
	captured("watch", m.shows("a screen of its own", drawn("refused by")))
	i.post(screenForwards("port not responding"))
	captured("watch-changed", m.shows("the change", drawn("port not")))

	m.tmux("send-keys", "C-z")
	captured("suspended", m.shows("the shell", prompt))
	asBefore()
	m.types(`clear; echo earlier`)
	m.shows("the shell's screen", func(s string) bool { return s == "earlier\nprompt>" })
	m.types(`fg`)
	captured("watch-changed", m.shows("it again", drawn("port not")))
	if alternate, cursor := m.flag("alternate_on"), m.flag("cursor_flag"); alternate != "1" || cursor != "0" {
		t.Errorf("after fg alternate screen %s, cursor %s", alternate, cursor)
	}
	m.tmux("resize-window", "-x", "50", "-y", "10")
	captured("watch-narrow", m.shows("the narrow one", drawn("CONTA…")))
	m.tmux("resize-window", "-x", "80", "-y", "14")
	captured("watch-changed", m.shows("the wide one", drawn("port not")))
	m.tmux("send-keys", "x", "q") // only q leaves, and neither is seen
	captured("left", m.shows("the shell", prompt))
	asBefore()

	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT} {
		m.types(`clear; sh -c 'echo $$ >pid; exec ./rdhpf status -watch'`)
		m.shows("a screen of its own", drawn("port not"))
		body, err := os.ReadFile(filepath.Join(dir, "pid"))
		if err != nil {
			t.Fatal(err)
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(body)))
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(pid, sig); err != nil {
			t.Fatal(err)
		}
		m.shows("the shell after "+sig.String(), func(s string) bool { return s == "prompt>" })
		asBefore()
	}

	// Without keys only a signal leaves, and Ctrl-Z and fg work all the same.
	m.types(`clear; ./rdhpf status -watch </dev/null`)
	m.shows("a screen of its own", drawn("port not"))
	m.tmux("send-keys", "C-z")
	m.shows("the shell", prompt)
	asBefore()
	m.types(`clear; fg`)
	m.shows("it again", drawn("port not"))
	m.tmux("send-keys", "C-c")
	m.shows("the shell", prompt)
	asBefore()
}
