package main

// log.go: what a person sees on stderr. A line is a sentence; its attributes are
// for machines, in -log-format json, and for -log-level debug.

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
)

// newLogger writes to w in the given format, "text" or "json". lost is called
// when w takes no more, at each line.
func newLogger(w io.Writer, level slog.Level, format string, lost func(error)) *slog.Logger {
	w = &lossyWriter{w, lost}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level}))
	}
	return slog.New(&lineHandler{w: w, mu: new(sync.Mutex), level: level})
}

// lossyWriter tells of a write that failed, which slog keeps to itself.
type lossyWriter struct {
	w    io.Writer
	lost func(error)
}

func (l *lossyWriter) Write(p []byte) (int, error) {
	n, err := l.w.Write(p)
	if err != nil {
		l.lost(err)
	}
	return n, err
}

// lineHandler prints "15:04:05 message", with the level where it is not info.
type lineHandler struct {
	w     io.Writer
	mu    *sync.Mutex
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
	h.mu.Lock()
	defer h.mu.Unlock()
	_, err := io.WriteString(h.w, b.String())
	return err
}
