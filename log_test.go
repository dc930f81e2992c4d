package main

// Tests of what is printed on stderr.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestLogLines(t *testing.T) {
	at := time.Date(2025, 3, 1, 14, 5, 6, 789e6, time.UTC)
	attrs := []slog.Attr{slog.String("local", "127.0.0.1:80"), slog.String("reason", "a\x1b[31m \"b\""), slog.Int("n", 3)}
	for _, c := range []struct {
		name        string
		level       slog.Level // of the logger
		format      string
		line        slog.Level
		text, lines string
	}{
		{"info", slog.LevelInfo, "text", slog.LevelInfo, "127.0.0.1:80 → web", "14:05:06 127.0.0.1:80 → web\n"},
		{"warning", slog.LevelInfo, "text", slog.LevelWarn, "busy", "14:05:06 warning: busy\n"},
		{"error", slog.LevelInfo, "text", slog.LevelError, "broken", "14:05:06 error: broken\n"},
		{"debug", slog.LevelDebug, "text", slog.LevelDebug, "ssh: x", `14:05:06 debug: ssh: x local="127.0.0.1:80" reason="a\x1b[31m \"b\"" n="3"` + "\n"},
		{"info at debug", slog.LevelDebug, "text", slog.LevelInfo, "x", `14:05:06 x local="127.0.0.1:80" reason="a\x1b[31m \"b\"" n="3"` + "\n"},
		{"too low", slog.LevelInfo, "text", slog.LevelDebug, "ssh: x", ""},
		{"too low for warn", slog.LevelWarn, "text", slog.LevelInfo, "x", ""},
		{"escape sequences", slog.LevelInfo, "text", slog.LevelInfo, "\x1b]0;x\x07a\u009b2Jb\nc\r\u202e", "14:05:06 ]0;xa2Jb c\n"},
		{"json", slog.LevelInfo, "json", slog.LevelWarn, "busy → web",
			`{"time":"2025-03-01T14:05:06.789Z","level":"WARN","msg":"busy → web","local":"127.0.0.1:80","reason":"a\u001b[31m \"b\"","n":3}` + "\n"},
		{"json with escape sequences", slog.LevelInfo, "json", slog.LevelInfo, "\x1b]0;x\x07a\nb",
			`{"time":"2025-03-01T14:05:06.789Z","level":"INFO","msg":"\u001b]0;x\u0007a\nb","local":"127.0.0.1:80","reason":"a\u001b[31m \"b\"","n":3}` + "\n"},
		{"json, too low", slog.LevelInfo, "json", slog.LevelDebug, "x", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out bytes.Buffer
			log, end := newLogger(&out, c.level, c.format, func(err error) { t.Error(err) })
			h := log.Handler()
			if h.Enabled(context.Background(), c.line) {
				r := slog.NewRecord(at, c.line, c.text, 0)
				r.AddAttrs(attrs...)
				if err := h.Handle(context.Background(), r); err != nil {
					t.Error(err)
				}
			}
			end()
			if out.String() != c.lines {
				t.Errorf("\n got %q\nwant %q", out.String(), c.lines)
			}
			if c.format == "json" && out.Len() > 0 && !json.Valid(out.Bytes()) {
				t.Error("no JSON")
			}
		})
	}
}

func TestLogWith(t *testing.T) {
	var out bytes.Buffer
	log, end := newLogger(&out, slog.LevelDebug, "text", nil)
	base := log.With("a", 1)
	one, two := base.With("b", 2), base.With("c", 3)
	one.Info("x")
	two.WithGroup("g").Info("y", "d", 4)
	base.Info("z")
	end()
	var got []string
	for _, line := range strings.Split(strings.TrimSpace(out.String()), "\n") {
		got = append(got, line[len("15:04:05 "):])
	}
	if g, want := strings.Join(got, "; "), `x a="1" b="2"; y a="1" c="3" d="4"; z a="1"`; g != want {
		t.Errorf("got %s, want %s", g, want)
	}
}

// A line is bounded and is one line, whoever wrote it.
func TestLogBounded(t *testing.T) {
	var out bytes.Buffer
	log, end := newLogger(&out, slog.LevelInfo, "text", nil)
	log.Info(strings.Repeat("a\n", 1<<20))
	end()
	if n := out.Len(); n > 5000 || strings.Count(out.String(), "\n") != 1 {
		t.Errorf("%d bytes, %d lines", n, strings.Count(out.String(), "\n"))
	}
}

type brokenWriter struct{ err error }

func (w brokenWriter) Write([]byte) (int, error) { return 0, w.err }

func TestLogLost(t *testing.T) {
	broken := errors.New("broken pipe")
	for _, format := range []string{"text", "json"} {
		var lost []error
		log, end := newLogger(brokenWriter{broken}, slog.LevelInfo, format, func(err error) { lost = append(lost, err) })
		log.Info("one")
		log.Debug("not written")
		log.Warn("two")
		end()
		if len(lost) != 2 || !errors.Is(lost[0], broken) || !errors.Is(lost[1], broken) {
			t.Errorf("%s: lost told of %v, want twice %v", format, lost, broken)
		}
	}
}

// Nobody reads for a while: who logs goes on, and what got lost is counted.
func TestLogUnread(t *testing.T) {
	for _, c := range []struct{ format, want string }{
		{"text", " warning: 500 lines were lost: nobody was reading\n"},
		{"json", `"level":"WARN","msg":"500 lines were lost: nobody was reading"}` + "\n"},
	} {
		r, w := io.Pipe() // a write waits for its reader
		log, end := newLogger(w, slog.LevelInfo, c.format, func(err error) { t.Error(err) })
		log.Info("first")
		if _, err := io.ReadFull(r, make([]byte, 1)); err != nil { // it is being written, and waits no more
			t.Fatal(err)
		}
		for range maxLines + 500 {
			log.Info("more")
		}
		read := make(chan string)
		go func() {
			all, _ := io.ReadAll(r)
			read <- string(all)
		}()
		end()
		w.Close()
		all := <-read
		if n := strings.Count(all, "more"); n != maxLines || !strings.Contains(all, c.want) {
			t.Errorf("%s: %d lines, without %q", c.format, n, c.want)
		}
	}
}

// A log in the background is bounded and private, keeps its last lines, and is back when it was moved away.
func TestLogFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	f, err := openLog(path, maxLog/2)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	log, end := newLogger(&logFile{f: f, path: path}, slog.LevelInfo, "text", nil)
	for i := range 1000 {
		log.Info(strings.Repeat("x", 3000), "i", i)
	}
	log.Info("last")
	end()
	for _, name := range []string{path, path + ".1"} {
		info, err := os.Stat(name)
		if err != nil || info.Size() > maxLog+5000 || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %+v, %v", name, info, err)
		}
	}
	last := func() string {
		t.Helper()
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		return lines[len(lines)-1]
	}
	if got := last(); !strings.HasSuffix(got, " last") {
		t.Errorf("the last line is %q", got)
	}
	for _, away := range []func() error{func() error { return os.Remove(path) }, func() error { return os.Rename(path, path+".old") }} {
		if err := away(); err != nil {
			t.Fatal(err)
		}
		log.Info("back")
		if got := last(); !strings.HasSuffix(got, " back") {
			t.Errorf("the last line is %q", got)
		}
	}
	// A start begins a new file if the old one is half full.
	if err := os.WriteFile(path, make([]byte, maxLog/2+1), 0o600); err != nil {
		t.Fatal(err)
	}
	g, err := openLog(path, maxLog/2)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	if info, err := g.Stat(); err != nil || info.Size() != 0 {
		t.Errorf("%d bytes, %v", info.Size(), err)
	}
}
