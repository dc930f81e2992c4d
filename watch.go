package main

// watch.go: status over time: `rdhpf status -watch` and -wait.

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	pollEvery = 100 * time.Millisecond // where there is no socket to tell of changes
	askEvery  = 2 * time.Second        // of an instance that tells of none
)

// sight is a report, or why there is none.
type sight struct {
	report *report
	err    error
}

// follow sends what is known now and at each change, until ctx ends: as the
// socket tells it, else by looking again and again.
func follow(ctx context.Context, p paths, h *host, out chan<- sight) {
	send := func(s sight) {
		select {
		case out <- s:
		case <-ctx.Done():
		}
	}
	for ctx.Err() == nil {
		if subscribe(ctx, p, func(snap *snapshot) {
			send(sight{report: &report{snapshot: snap, Source: "socket", Running: true}})
		}) {
			continue
		}
		// Whether lsof sees an ssh changes nothing here, and it is slow to ask.
		r, err := inspect(ctx, p, nil)
		if r == nil && err == nil {
			name := "this host"
			if h != nil {
				name = h.String()
			}
			err = notFound(name)
		}
		send(sight{r, err})
		select {
		case <-ctx.Done():
		case <-time.After(pollEvery):
		}
	}
}

// subscribe passes on what the instance tells until it ends or does not answer,
// and says whether it told anything.
func subscribe(ctx context.Context, p paths, take func(*snapshot)) (told bool) {
	conn, err := dialInstance(p.socket)
	if err != nil {
		return false
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if _, err := fmt.Fprintln(conn, `{"method":"subscribe"}`); err != nil {
		return false
	}
	// An instance that changes nothing has to answer all the same.
	go func() {
		for tick := time.NewTicker(askEvery); ctx.Err() == nil; {
			select {
			case <-ctx.Done():
				tick.Stop()
			case <-tick.C:
				fmt.Fprintln(conn, `{"method":"status"}`)
			}
		}
	}()
	lines := bufio.NewReader(conn)
	for {
		conn.SetReadDeadline(time.Now().Add(askEvery + dialTimeout))
		snap := &snapshot{}
		if readReply(lines, snap) != nil {
			return told
		}
		snap.clean()
		take(snap)
		told = true
	}
}

// waitFor returns nil as soon as the ports, or all, are active.
func waitFor(ctx context.Context, p paths, h *host, patience time.Duration, ports []uint16, out printer) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	sights := make(chan sight)
	go follow(ctx, p, h, sights)
	last := "no instance is running"
	for {
		select {
		case <-ctx.Done():
			return fmt.Errorf("after %v: %s", patience, last)
		case s := <-sights:
			if s.err != nil {
				last = s.err.Error()
				continue
			}
			missing := missingPorts(s.report, ports)
			if len(missing) == 0 {
				return out.report(s.report)
			}
			last = strings.Join(missing, "; ")
		}
	}
}

// missingPorts says what keeps the ports, or all where none is named, from being
// active.
func missingPorts(r *report, ports []uint16) (missing []string) {
	switch {
	case !r.Running:
		return []string{"no instance is running"}
	case r.Stale:
		return []string{"the instance does not answer"}
	case r.Connection.State != connected:
		text := "the connection to the remote host is not up"
		if r.Connection.LastError != "" {
			text += ": " + r.Connection.LastError
		}
		missing = append(missing, text)
	}
	found := make(map[uint16]*forwardInfo)
	for i := range r.Forwards {
		f := &r.Forwards[i]
		if old := found[f.LocalPort]; old == nil || f.Status == active {
			found[f.LocalPort] = f
		}
		if len(ports) == 0 && f.Status != active {
			missing = append(missing, fmt.Sprintf("%s is %s (%s)", f.local(), f.Status, f.Reason))
		}
	}
	for _, p := range ports {
		if f := found[p]; f == nil {
			missing = append(missing, fmt.Sprintf("no container publishes %d", p))
		} else if f.Status != active {
			missing = append(missing, fmt.Sprintf("%s is %s (%s)", f.local(), f.Status, f.Reason))
		}
	}
	return missing
}

// watchStatus prints at each change until it is interrupted. On a terminal it
// has a screen of its own, on which long lines are cut, not wrapped, and redraws
// each second, for the durations.
func watchStatus(p paths, h *host, out printer) error {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	screen := isTerminal(os.Stdout) && !out.asJSON
	if screen {
		fmt.Fprint(out.w, "\x1b[?1049h\x1b[?25l\x1b[?7l")
		defer fmt.Fprint(out.w, "\x1b[?7h\x1b[?25h\x1b[?1049l")
	}
	sights := make(chan sight)
	go follow(ctx, p, h, sights)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var s sight
	var before string
	for {
		seen := false
		select {
		case <-ctx.Done():
			return nil
		case s = <-sights:
			seen = true
		case <-tick.C:
		}
		var err error
		switch {
		case screen:
			err = draw(out, s)
		case seen:
			if key := s.key(); key != before {
				before = key
				err = printSight(out, s)
			}
		}
		if err != nil {
			if errors.Is(err, unix.EPIPE) {
				return nil
			}
			return err
		}
	}
}

// key is the same for two sights that show the same.
func (s sight) key() string {
	if s.err != nil {
		return s.err.Error()
	}
	r := *s.report
	r.snapshot = r.snapshot.at(time.Time{})
	return string(mustJSON(r))
}

// printSight prints a change where there is no screen to redraw.
func printSight(out printer, s sight) error {
	if s.err != nil {
		_, err := fmt.Fprintln(os.Stderr, s.err)
		return err
	}
	if err := out.report(s.report); err != nil && !errors.As(err, new(*errNotRunning)) {
		return err
	}
	if !out.asJSON {
		_, err := fmt.Fprintln(out.w)
		return err
	}
	return nil
}

// draw redraws the screen, as much as it has room for.
func draw(out printer, s sight) error {
	var b strings.Builder
	switch {
	case s.err != nil:
		fmt.Fprintln(&b, s.err)
	case s.report != nil:
		fmt.Fprintf(&b, "%s  %s\n\n", s.report.Host, time.Now().Format(time.TimeOnly))
		for _, warning := range s.report.warnings {
			fmt.Fprintf(&b, "Warning: %s\n", warning)
		}
		printTable(&b, s.report, time.Now(), out.style)
	}
	lines := strings.Split(strings.TrimRight(b.String(), "\n"), "\n")
	if size, err := unix.IoctlGetWinsize(int(os.Stdout.Fd()), unix.TIOCGWINSZ); err == nil && size.Row > 0 && len(lines) > int(size.Row) {
		lines = append(lines[:size.Row-1], "…")
	}
	_, err := fmt.Fprint(out.w, "\x1b[H"+strings.Join(lines, "\x1b[K\r\n")+"\x1b[K\x1b[J")
	return err
}
