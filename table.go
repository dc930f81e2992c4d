package main

// table.go: what `rdhpf status` and `rdhpf health` print for a person.

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// tableStyle is how to print.
type tableStyle struct{ wide, colour bool }

var statusColour = map[string]string{active: "\x1b[32m", conflict: "\x1b[31m", pending: "\x1b[33m"}

// printTable prints a report as the table of its forwards, and under it what
// there is to say besides.
func printTable(w io.Writer, r *report, now time.Time, style tableStyle) {
	head := []string{"CONTAINER ID", "LOCAL", "REMOTE", "STATE", "DURATION", "REASON"}
	if style.wide {
		head = append(head[:5:5], "NAME", "IMAGE", "SERVICE", "PORT", "REASON")
	}
	rows := [][]string{head}
	for i := range r.Forwards {
		rows = append(rows, row(&r.Forwards[i], now, style.wide))
	}
	widths := make([]int, len(head))
	for _, row := range rows {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	var b strings.Builder
	for n, row := range rows {
		blanks := 0 // put off, for none end a line
		for i, cell := range row {
			if i == len(row)-1 {
				cell = strings.TrimRight(cell, " ")
			}
			if cell == "" {
				blanks += widths[i] + 3
				continue
			}
			b.WriteString(strings.Repeat(" ", blanks))
			blanks = widths[i] - utf8.RuneCountInString(cell) + 3
			if colour := statusColour[cell]; style.colour && i == 3 && n > 0 && colour != "" {
				cell = colour + cell + "\x1b[0m"
			}
			b.WriteString(cell)
		}
		b.WriteByte('\n')
		if n == 0 {
			total := -3
			for _, width := range widths {
				total += width + 3
			}
			b.WriteString(strings.Repeat("-", total) + "\n")
		}
	}
	io.WriteString(w, b.String())
	printRemarks(w, r, now)
}

func row(f *forwardInfo, now time.Time, wide bool) []string {
	remote, port := "-", "-"
	if f.RemotePort != 0 {
		remote = strconv.Itoa(int(f.RemotePort))
		if f.RemoteAddress != "127.0.0.1" && addrOf(f.RemoteAddress) != loopback4 {
			remote = (&forwardInfo{LocalAddress: f.RemoteAddress, LocalPort: f.RemotePort}).local()
		}
	}
	if f.ContainerPort != 0 {
		port = strconv.Itoa(int(f.ContainerPort))
	}
	duration := "-"
	if !f.CreatedAt.IsZero() {
		duration = ageText(now.Sub(f.CreatedAt))
	}
	cells := []string{f.ContainerID, f.local(), remote, f.Status, duration}
	if wide {
		cells = append(cells, dash(f.ContainerName), dash(f.Image), dash(f.Service), port)
	}
	return append(cells, f.Reason)
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// printRemarks prints what concerns the instance, not one forward.
func printRemarks(w io.Writer, r *report, now time.Time) {
	if r.Paused {
		fmt.Fprintln(w, "Paused: rdhpf resume opens the ports again.")
	}
	if c := r.Connection; c.State == connecting || c.State == reconnecting {
		text := fmt.Sprintf("Not connected: %s for %s", c.State, ageText(now.Sub(c.Since)))
		if c.LastError != "" {
			text += ": " + c.LastError
		}
		fmt.Fprintln(w, text)
	}
	for _, warning := range r.snapshot.Warnings {
		fmt.Fprintf(w, "Degraded: %s\n", warning)
	}
	for _, s := range r.Skipped {
		what := fmt.Sprintf("%d/%s of ", s.Port, s.Protocol)
		if s.Port == 0 {
			what = ""
		}
		fmt.Fprintf(w, "Skipped: %s%s (%s): %s\n", what, s.Name, s.ContainerID, s.Reason)
	}
}

// ageText prints a duration the way people say it: 45s, 2m15s, 3h4m, 2d5h.
func ageText(d time.Duration) string {
	s := max(0, int64(d/time.Second))
	switch {
	case s < 60:
		return fmt.Sprintf("%ds", s)
	case s < 3600:
		return fmt.Sprintf("%dm%ds", s/60, s%60)
	case s < 86400:
		return fmt.Sprintf("%dh%dm", s/3600, s/60%60)
	}
	return fmt.Sprintf("%dd%dh", s/86400, s/3600%24)
}

// printHealth prints the answer to whether all is well.
func printHealth(w io.Writer, h *health, now time.Time) {
	fmt.Fprintf(w, "%s: %d active, %d conflict, %d pending; %s for %s", h.Status, h.Counts[active], h.Counts[conflict], h.Counts[pending],
		h.Connection.State, ageText(now.Sub(h.Connection.Since)))
	if h.Engine != "" {
		fmt.Fprintf(w, "; %s", printable(h.Engine, maxText))
	}
	fmt.Fprintf(w, "; up %s\n", ageText(time.Duration(h.Uptime)*time.Second))
	for _, reason := range h.Reasons {
		fmt.Fprintf(w, "  %s\n", printable(reason, 1000))
	}
}
