package main

// What `rdhpf run` prints on stderr. A message is a sentence; its attributes are shown only in -log-format json and with
// -log-level debug.

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	maxLines  = 1000        // waiting to be written
	lastLines = time.Second // to write them at the end
	maxLog    = 1 << 20     // bytes of a logFile, after which a new one is begun
)

// newLogger returns a logger that writes to w in the given format, "text" or "json", and never blocks: a terminal stopped
// with Ctrl-S, or a pipe that nobody reads, must not stop the forwards. broken is called for each line that could not be
// written. end writes the lines that still wait; nothing may be logged after it.
func newLogger(w io.Writer, level slog.Level, format string, broken func(error)) (log *slog.Logger, end func()) {
	handler := func(w io.Writer) slog.Handler {
		if format == "json" {
			return slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level})
		}
		return &lineHandler{w: w, level: level}
	}
	if file, ok := w.(*logFile); ok { // does not block, and run -detach shows it up to the moment of READY=1
		return slog.New(handler(file)), func() {}
	}
	q := &lineQueue{lines: make(chan []byte, maxLines)}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for line := range q.lines {
			if _, err := w.Write(line); err != nil {
				broken(err)
			}
			if n := q.lost.Swap(0); n > 0 {
				slog.New(handler(w)).Warn(fmt.Sprintf("%d lines were lost: nobody was reading", n))
			}
		}
	}()
	return slog.New(handler(q)), func() {
		close(q.lines)
		select {
		case <-ended:
		case <-time.After(lastLines):
		}
	}
}

// lineQueue is where lines wait to be written. Those for which there is no room are counted.
type lineQueue struct {
	lines chan []byte
	lost  atomic.Int64
}

func (q *lineQueue) Write(line []byte) (int, error) {
	select {
	case q.lines <- bytes.Clone(line):
	default:
		q.lost.Add(1)
	}
	return len(line), nil
}

// lineHandler prints "15:04:05 message", with the level unless that is info, in a single write.
type lineHandler struct {
	w     io.Writer
	level slog.Level
	attrs []slog.Attr
}

func (lh *lineHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= lh.level }

func (lh *lineHandler) WithGroup(string) slog.Handler { return lh }

func (lh *lineHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := *lh
	c.attrs = append(lh.attrs[:len(lh.attrs):len(lh.attrs)], attrs...)
	return &c
}

func (lh *lineHandler) Handle(_ context.Context, r slog.Record) error {
	var b strings.Builder
	b.WriteString(r.Time.Format("15:04:05 "))
	switch {
	case r.Level >= slog.LevelError:
		b.WriteString("error: ")
	case r.Level >= slog.LevelWarn:
		b.WriteString("warning: ")
	case r.Level < slog.LevelInfo:
		b.WriteString("debug: ")
	}
	b.WriteString(printable(r.Message, 4000))
	if lh.level < slog.LevelInfo {
		add := func(a slog.Attr) bool {
			fmt.Fprintf(&b, " %s=%q", a.Key, a.Value.String())
			return true
		}
		for _, a := range lh.attrs {
			add(a)
		}
		r.Attrs(add)
	}
	b.WriteByte('\n')
	_, err := io.WriteString(lh.w, b.String())
	return err
}

// logFile is the log of an instance in the background: f, which is its stderr and so has the last words of a crash too.
type logFile struct {
	mu   sync.Mutex
	f    *os.File
	path string
}

// Write begins a new file where this one is full, or was moved or removed.
func (l *logFile) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if info, err := l.f.Stat(); err == nil && (info.Size() >= maxLog || replaced(l.path, info)) {
		if f, err := openLog(l.path, maxLog-1); err == nil {
			unix.Dup2(int(f.Fd()), int(l.f.Fd()))
			f.Close()
		}
	}
	return l.f.Write(line)
}

// openLog opens a log to append to. One of more than most bytes takes the place of the one before it first.
func openLog(path string, most int64) (*os.File, error) {
	if info, err := os.Lstat(path); err == nil && info.Size() > most {
		os.Rename(path, path+".1")
	}
	return os.OpenFile(path, os.O_RDWR|os.O_APPEND|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
}
