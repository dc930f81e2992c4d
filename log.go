package main

// log.go: what a person sees on stderr. A line is a sentence; its attributes are
// for machines, in -log-format json, and for -log-level debug.

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync/atomic"
	"time"
)

const (
	maxLines  = 1000        // that wait to be written
	lastLines = time.Second // for them to be written at the end
)

// newLogger writes to w in the given format, "text" or "json", and holds nobody
// up who logs: a terminal that is stopped with Ctrl-S, or a pipe that nobody
// reads, must not stop the forwards. broken is called when w takes no more, at
// each line. end writes what still waits; after it nothing may be logged.
func newLogger(w io.Writer, level slog.Level, format string, broken func(error)) (log *slog.Logger, end func()) {
	handler := func(w io.Writer) slog.Handler {
		if format == "json" {
			return slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level})
		}
		return &lineHandler{w: w, level: level}
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
				slog.New(handler(w)).Warn(fmt.Sprintf("%d lines are lost: nobody read this", n))
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

// lineQueue is where lines wait to be written. What finds no room is counted.
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

// lineHandler prints "15:04:05 message", with the level where it is not info, in
// one write.
type lineHandler struct {
	w     io.Writer
	level slog.Level
	attrs []slog.Attr
}

func (h *lineHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.level }

func (h *lineHandler) WithGroup(string) slog.Handler { return h }

func (h *lineHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := *h
	c.attrs = append(h.attrs[:len(h.attrs):len(h.attrs)], attrs...)
	return &c
}

func (h *lineHandler) Handle(_ context.Context, r slog.Record) error {
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
	if h.level < slog.LevelInfo {
		add := func(a slog.Attr) bool {
			fmt.Fprintf(&b, " %s=%q", a.Key, a.Value.String())
			return true
		}
		for _, a := range h.attrs {
			add(a)
		}
		r.Attrs(add)
	}
	b.WriteByte('\n')
	_, err := io.WriteString(h.w, b.String())
	return err
}
