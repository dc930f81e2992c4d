package e2e

// What means harm: a remote engine that sends what it should not, and somebody
// who tampers with the files of a running instance.

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"
)

// beHostileEngine is the far end of `docker system dial-stdio`, on stdin and
// stdout, that does what is named until nobody listens.
func beHostileEngine(does string) {
	out := bufio.NewWriter(os.Stdout)
	forever := func(format string) {
		for i := 0; ; i++ {
			if _, err := fmt.Fprintf(out, format, i); err != nil {
				os.Exit(0)
			}
		}
	}
	const head = "HTTP/1.1 200 OK\r\nServer: Docker/1\u202e\r\n"
	does, argument, _ := strings.Cut(does, " ")
	for in := bufio.NewReader(os.Stdin); ; out.Flush() {
		req, err := http.ReadRequest(in)
		if err != nil {
			return
		}
		events := req.URL.Path == "/events"
		switch {
		case does == "garbage":
			io.CopyN(out, rand.NewChaCha8([32]byte{}), 1<<20)
			return
		case does == "head":
			forever("X-Header-%d: \x1b[31m\r\n")
		case does == "line":
			forever("%d ")
		case does == "list" && !events:
			out.WriteString(head + "\r\n[")
			forever(`{"Id":"%012x","Names":["/endless"],"Ports":[{"IP":"0.0.0.0","PrivatePort":80,"PublicPort":1,"Type":"tcp"}]},`)
		case does == "container" && !events:
			out.WriteString(head + "\r\n[{\"Id\":\"0123456789abcdef\",\"Ports\":[")
			forever(`{"PublicPort":1},{},{},{},{},{},{},{"PrivatePort":%d},`)
		case does == "deep" && !events:
			out.WriteString(head + "\r\n[")
			forever(`{"%d":[`)
		case does == "body" && !events:
			out.WriteString(head + "Content-Length: 9223372036854775807\r\n\r\n[]")
		case does == "words":
			fmt.Fprint(out, "HTTP/1.1 500 \x1b[31mno\a\r\nContent-Length: 1000\r\n\r\n", strings.Repeat("\x1b]0;own\a", 200))
		case !events: // a list with one port that is one
			body := fmt.Sprintf(`[{"Id":"0123456789abcdef","Names":["/\u001b[31mred\nname"],"Image":"\u009b2J","Labels":{"com.docker.compose.service":"\u202e"},
				"Ports":[{"IP":"0.0.0.0","PrivatePort":80,"PublicPort":0,"Type":"tcp"},{"IP":"0.0.0.0","PrivatePort":80,"PublicPort":70000,"Type":"tcp"},
				{"IP":"0.0.0.0","PrivatePort":80,"PublicPort":-1,"Type":"tcp"},{"IP":"-oProxyCommand=x","PrivatePort":80,"PublicPort":81,"Type":"tcp"},
				{"IP":"0.0.0.0","PrivatePort":80,"PublicPort":%s,"Type":"tcp"},{"IP":"0.0.0.0","PrivatePort":80,"PublicPort":82,"Type":"\u001b[31m"}]}]`, argument)
			fmt.Fprintf(out, "%sContent-Length: %d\r\n\r\n%s", head, len(body), body)
		case does == "event":
			out.WriteString(head + "\r\n")
			forever("%d ")
		case does == "flood":
			out.WriteString(head + "\r\n")
			forever(`{"Type":"container","Action":"start","Actor":{"ID":"%012x"}}` + "\n")
		default:
			out.WriteString(head + "\r\n") // and no event ever
		}
	}
}

// unprintable finds a character that a terminal could obey.
func unprintable(s string) string {
	if i := strings.IndexFunc(s, func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) }); i >= 0 {
		return s[i:][:1]
	}
	return ""
}

func TestE2EHostileEngine(t *testing.T) {
	g := needRig(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	port := freePorts(t, 1)
	real := g.boot(t, port)
	docker := filepath.Join(g.env["RIG_DIR"], "nodocker", "docker")
	t.Cleanup(func() { os.Remove(docker) })
	for _, c := range []struct{ does, says string }{
		{"garbage", "the response is not HTTP"},
		{"head", "the response is not HTTP"},
		{"line", "the response header is longer than 65536 bytes"},
		{"list", "more than 20000 containers"},
		{"container", "a container in it is longer than 1048576 bytes"},
		{"deep", "exceeded max depth"},
		{"body", "i/o timeout"},
		{"words", "500 [31mno"},
		{"event", "token too long"},
		{"flood", "connected to "},
		{"nothing", "connected to "},
	} {
		t.Run(c.does, func(t *testing.T) {
			script := fmt.Sprintf("#!/bin/sh\nRDHPF_TEST_ENGINE='%s %d' exec %s\n", c.does, port, exe)
			if err := errors.Join(os.WriteFile(docker+".new", []byte(script), 0o755), os.Rename(docker+".new", docker)); err != nil {
				t.Fatal(err)
			}
			p := newRun(t, g, "-nodocker", "-retry")
			p.start()
			p.waitLine(c.says)
			switch c.does {
			case "event", "flood", "nothing":
				real.answers(port)
				if f := p.becomes(port, active, ""); f.ContainerID != "0123456789ab" || f.ContainerName != "[31mred name" {
					t.Errorf("the forward is %+v", f)
				}
				r := p.status()
				if len(r.Forwards) != 1 || len(r.Skipped) != 2 {
					t.Errorf("forwards %+v, skipped %+v; want one, and two", r.Forwards, r.Skipped)
				}
			}
			for _, args := range [][]string{{"status", "-wide"}, {"health"}, {"status", "-json"}, {"health", "-json"}} {
				out, errs, code := p.tell(args[0], args[1:]...)
				if bad := unprintable(out + errs); bad != "" || out == "" || code > 1 {
					t.Errorf("%v prints %q and ends with %d: %q", args, bad, code, out+errs)
				}
			}
			if bad := unprintable(p.log()); bad != "" {
				t.Errorf("it says %q: %.2000q", bad, p.log())
			}
			if most := peakMemory(t, p.cmd.Process.Pid); most > 400<<20 { // with the race detector
				t.Errorf("it took %d MiB", most>>20)
			}
			p.signal(syscall.SIGTERM)
			p.exits(0)
			p.leftNothing()
		})
	}
}

// peakMemory is the most bytes that a process had in memory.
func peakMemory(t *testing.T, pid int) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := bytes.Cut(text, []byte("VmHWM:"))
	kib, err := strconv.Atoi(strings.Fields(string(rest))[0])
	if err != nil {
		t.Fatal(err)
	}
	return kib << 10
}

// Somebody removes the whole folder of a running instance, or its lock.
func TestE2EFolderRemoved(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 2)
	b := g.boot(t, port)
	p := startRun(t, g, "")
	b.answers(port)
	p.becomes(port, active, "")
	removed := time.Now()
	eventually(t, "the folder is removed", func() error { return os.RemoveAll(p.dir) }) // a file may be written meanwhile
	p.waitLine(p.paths().lock + " was removed or replaced; recreated it")
	p.waitLine(p.paths().socket + " was removed or replaced; recreated it")
	p.waitLine(" again after ")
	b.answers(port)
	born := g.boot(t, port+1)
	born.answers(port + 1)
	took("state folder removed: all is there again", removed)
	if r := p.status(); r.Source != "socket" || r.PID != p.cmd.Process.Pid {
		t.Errorf("status: %+v", r)
	}
	second := p.another()
	second.start()
	second.exits(1)
	if want := fmt.Sprintf("another rdhpf is running for this host: pid %d", p.cmd.Process.Pid); !strings.Contains(second.log(), want) {
		t.Errorf("a second one says %q, want %q", second.log(), want)
	}

	// Whoever is faster has the new lock; there are never two for long.
	if err := os.Remove(p.paths().lock); err != nil {
		t.Fatal(err)
	}
	second = p.another()
	second.start()
	var loser, winner *runProc
	eventually(t, "one of the two ends", func() error {
		select {
		case <-p.done:
			loser, winner = p, second
		case <-second.done:
			loser, winner = second, p
		default:
			return errors.New("both go on")
		}
		return nil
	})
	loser.exits(1)
	if want := fmt.Sprintf("pid %d", winner.cmd.Process.Pid); !strings.Contains(loser.log(), want) {
		t.Errorf("the loser says %q, want %q", loser.log(), want)
	}
	b.answers(port)
	eventually(t, "the winner answers", func() error {
		if r := p.status(); r.Source != "socket" || r.PID != winner.cmd.Process.Pid {
			return fmt.Errorf("%s, pid %d", r.Source, r.PID)
		}
		return nil
	})
}

// Somebody removes the socket of a running instance, or puts something in its
// place: it makes it again, and at its end removes only what is its own.
func TestE2ESocketSwapped(t *testing.T) {
	g := needRig(t)
	p := startRun(t, g, "")
	path := p.paths().socket
	answers := func() {
		t.Helper()
		eventually(t, "the instance answers", func() error {
			return p.ask("health", new(any))
		})
	}
	for _, swap := range []func(){func() {}, func() { listenUnix(t, path) }, func() { listenUnix(t, path).Close() }} {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		removed := time.Now()
		swap()
		answers()
		took("socket swapped: it answers again", removed)
	}
	p.waitLine(path + " was removed or replaced; recreated it")

	elsewhere := filepath.Join(p.dir, "elsewhere")
	listenUnix(t, elsewhere)
	if err := errors.Join(os.Remove(path), os.Symlink(elsewhere, path)); err != nil {
		t.Fatal(err)
	}
	p.waitLine(path + " exists and is not a socket: remove it")
	if r := p.status(); r.Source != "file" || !r.Running || r.PID != p.cmd.Process.Pid {
		t.Errorf("status meanwhile: %+v", r)
	}
	if err := errors.Join(os.Remove(path), os.Remove(elsewhere)); err != nil {
		t.Errorf("the link or what it leads to was touched: %v", err)
	}
	answers()

	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	listenUnix(t, path)
	p.signal(syscall.SIGTERM)
	p.exits(0)
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("at its end it removed another's socket: %v", err)
	}
	os.Remove(path)
	p.leftNothing()
}
