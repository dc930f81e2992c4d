package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// status.go: what is known about the instance for a host, from wherever it can
// be known: its socket, else its state file, else lsof.

// report is what `rdhpf status -json` prints: a snapshot, and how far to trust it.
type report struct {
	*snapshot
	Source  string `json:"source"`  // socket, file or lsof
	Running bool   `json:"running"` // a live instance has the lock
	Stale   bool   `json:"stale"`   // what is shown may no longer be so

	warnings []string // for a person
}

// errNotRunning says that there is no live instance.
type errNotRunning struct{ text string }

func (e *errNotRunning) Error() string { return e.text }

// errMute says that there is a live instance of which nothing more is known.
type errMute struct{ error }

func notFound(host string) error {
	return &errNotRunning{fmt.Sprintf("No running instance found for %s. Start one with: rdhpf run -host %s", host, host)}
}

// inspect finds out about the instance whose files are at p. Without a host the
// files tell it, and nothing is asked of lsof.
func inspect(ctx context.Context, p paths, h *host) (*report, error) {
	if err := checkDir(p.dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	snap := &snapshot{}
	asked := call(p.socket, "status", snap)
	if asked == nil {
		snap.clean()
		return &report{snapshot: snap, Source: "socket", Running: true}, nil
	}
	pid, held, err := lockedBy(p.lock)
	if err != nil {
		return nil, err
	}
	r := &report{Source: "file", Running: held}
	var unread error
	r.snapshot, unread = r.fromFile(p.state, time.Now())
	if r.snapshot != nil {
		if held && pid > 0 && pid != r.PID {
			r.Stale = true
			r.warnings = append(r.warnings, fmt.Sprintf("State file is of process %d, and process %d runs now.", r.PID, pid))
		}
		return r, nil
	}
	if held && unread != nil {
		return nil, errMute{fmt.Errorf("rdhpf (pid %d) is running and does not answer: %w; %w", pid, asked, unread)}
	} else if held {
		return nil, errMute{fmt.Errorf("rdhpf (pid %d) is running and does not answer: %w", pid, asked)}
	}
	if h != nil {
		if found := seenByLsof(ctx, *h); len(found) > 0 {
			now := utc(time.Now())
			return &report{Source: "lsof", Stale: true, snapshot: &snapshot{Version: stateVersion, Host: h.String(), UpdatedAt: now,
				Connection: connection{State: "unknown"}, Warnings: []string{}, Forwards: found, Skipped: []skippedPort{}},
				warnings: append(warned(unread), "No rdhpf is running; these ports are those on which an ssh to that host listens.")}, nil
		}
		if unread == nil {
			return nil, notFound(h.String())
		}
		return nil, &errNotRunning{fmt.Sprintf("%v. %v", unread, notFound(h.String()))}
	}
	return nil, unread
}

func warned(err error) []string {
	if err == nil {
		return nil
	}
	return []string{err.Error()}
}

// fromFile reads the state file, and says in r how far it can be trusted. It
// returns neither a snapshot nor an error where there is none.
func (r *report) fromFile(path string, now time.Time) (*snapshot, error) {
	snap, warning, err := readState(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	if pathsFor(filepath.Dir(path), snap.Host).state != path {
		return nil, fmt.Errorf("state file %s is of another host, %s", path, snap.Host)
	}
	if warning != "" {
		r.warnings = append(r.warnings, warning)
	}
	old, fresh := age(snap.UpdatedAt, now)
	switch {
	case fresh:
	case old < 0:
		r.warnings = append(r.warnings, "State file is from the future. rdhpf may not be running.")
	default:
		r.warnings = append(r.warnings, fmt.Sprintf("State file is %s old. rdhpf may not be running.", ageText(old)))
	}
	if !r.Running {
		r.warnings = append(r.warnings, fmt.Sprintf("No rdhpf is running for this host: process %d has ended, this is what it wrote last.", snap.PID))
	}
	r.Stale = !fresh || !r.Running
	return snap, nil
}

// seenByLsof lists the loopback ports on which an ssh to the host listens. Of the
// containers behind them nothing is known.
func seenByLsof(ctx context.Context, h host) []forwardInfo {
	ctx, cancel := context.WithTimeout(ctx, lsofTimeout)
	defer cancel()
	all, _ := listeners(ctx)
	args := make(map[int][]string)
	var found []forwardInfo
	for _, l := range all {
		if l.command != "ssh" || !l.addr.Addr().IsLoopback() {
			continue
		}
		if _, ok := args[l.pid]; !ok {
			out, _ := exec.CommandContext(ctx, "ps", "-ww", "-o", "args=", "-p", strconv.Itoa(l.pid)).Output()
			args[l.pid] = strings.Fields(string(out))
		}
		if !slices.ContainsFunc(args[l.pid], h.isNamedBy) {
			continue
		}
		found = append(found, forwardInfo{ContainerID: "unknown", LocalPort: l.addr.Port(), LocalAddress: l.addr.Addr().String(),
			RemoteAddress: loopback4.String(), Status: pending, Reason: reasonProbing})
	}
	var wg sync.WaitGroup
	for i := range found {
		f := &found[i]
		wg.Add(1)
		go func() {
			defer wg.Done()
			if (&master{}).probe(ctx, netip.AddrPortFrom(addrOf(f.LocalAddress), f.LocalPort), 0) == probeAnswered {
				f.Status, f.Reason = active, ""
			} else {
				f.Reason = reasonSilent
			}
		}()
	}
	wg.Wait()
	return found
}

// isNamedBy says whether an argument of ssh is this host.
func (h host) isNamedBy(arg string) bool {
	if h.user != "" && strings.Contains(arg, "@") && !strings.HasPrefix(arg, h.user+"@") {
		return false
	}
	_, name, found := strings.Cut(arg, "@")
	if !found {
		name = arg
	}
	return strings.EqualFold(name, h.name)
}

// instances returns the paths of all instances that left files in the folder.
func instances(dir string) ([]paths, error) {
	if err := checkDir(dir); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("looking for instances: %w", err)
	}
	var all []paths
	for _, e := range entries {
		if base, ok := strings.CutSuffix(e.Name(), ".lock"); ok {
			all = append(all, pathsAt(dir, filepath.Join(dir, base)))
		}
	}
	return all, nil
}

// inspectAll reports on every instance in the folder. broken is what there is to
// say of those that could not be inspected.
func inspectAll(ctx context.Context, dir string) (found []*report, broken []error, err error) {
	all, err := instances(dir)
	if err != nil {
		return nil, nil, err
	}
	for _, p := range all {
		switch r, err := inspect(ctx, p, nil); {
		case err != nil:
			broken = append(broken, err)
		case r != nil:
			found = append(found, r)
		}
	}
	return found, broken, nil
}

// table.go: what `rdhpf status` and `rdhpf health` print for a person.

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

// watch.go: status over time: `rdhpf status -watch` and -wait.

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

// forwardjson.go: reading a snapshot's JSON as rdhpf itself writes it, in a
// fraction of the time that encoding/json takes: of a thousand forwards, reading
// them is most of what `rdhpf status` does.

// unmarshalSnapshot is json.Unmarshal of body into v, of which snap is a part.
// The list of forwards is read apart; what stands in for it meanwhile tells
// whether it is the snapshot's. What is not as rdhpf writes it is left to
// encoding/json as a whole.
func unmarshalSnapshot(body string, v any, snap *snapshot) error {
	head, tail, _ := strings.Cut(body, `"forwards":`)
	list := cursor{tail}
	if forwards, ok := list.forwards(); ok && !strings.Contains(list.rest, `"forwards":`) {
		err := json.Unmarshal([]byte(head+`"forwards":[{"status":"read apart"}]`+list.rest), v)
		if err == nil && len(snap.Forwards) == 1 && snap.Forwards[0] == (forwardInfo{Status: "read apart"}) {
			snap.Forwards = forwards
			return nil
		}
		*snap = snapshot{}
	}
	return json.Unmarshal([]byte(body), v)
}

// cursor reads a text of JSON from its start.
type cursor struct{ rest string }

// eat goes past c and the white space before it, or stays.
func (c *cursor) eat(b byte) bool {
	s := c.rest
	for s != "" && (s[0] == ' ' || s[0] == '\n') {
		s = s[1:]
	}
	if s == "" || s[0] != b {
		return false
	}
	c.rest = s[1:]
	return true
}

// text reads a string without escapes.
func (c *cursor) text() (s string, ok bool) {
	if !c.eat('"') {
		return "", false
	}
	s, c.rest, ok = strings.Cut(c.rest, `"`)
	return s, ok && strings.IndexByte(s, '\\') < 0
}

// forwards reads a list of forwards.
func (c *cursor) forwards() (list []forwardInfo, ok bool) {
	if !c.eat('[') {
		return nil, false
	}
	list = make([]forwardInfo, 0, min(strings.Count(c.rest, "{"), 1000)) // the text is not to be trusted
	for more := !c.eat(']'); more; {
		list = append(list, forwardInfo{})
		if !c.forward(&list[len(list)-1]) {
			return nil, false
		}
		if more = c.eat(','); !more && !c.eat(']') {
			return nil, false
		}
	}
	return list, true
}

// forward reads an object of known members.
func (c *cursor) forward(f *forwardInfo) bool {
	if !c.eat('{') {
		return false
	}
	for {
		name, ok := c.text()
		if !ok || !c.eat(':') || !c.member(f, name) {
			return false
		}
		if !c.eat(',') {
			return c.eat('}')
		}
	}
}

// member reads the value of that member.
func (c *cursor) member(f *forwardInfo, name string) (ok bool) {
	switch name {
	case "container_id":
		f.ContainerID, ok = c.text()
	case "local_port":
		f.LocalPort, ok = c.port()
	case "remote_port":
		f.RemotePort, ok = c.port()
	case "status":
		f.Status, ok = c.text()
	case "reason":
		f.Reason, ok = c.text()
	case "created_at":
		f.CreatedAt, ok = c.time()
	case "updated_at":
		f.UpdatedAt, ok = c.time()
	case "local_address":
		f.LocalAddress, ok = c.text()
	case "remote_address":
		f.RemoteAddress, ok = c.text()
	case "container_name":
		f.ContainerName, ok = c.text()
	case "container_port":
		f.ContainerPort, ok = c.port()
	case "image":
		f.Image, ok = c.text()
	case "service":
		f.Service, ok = c.text()
	}
	return ok
}

func (c *cursor) time() (time.Time, bool) {
	s, ok := c.text()
	if !ok {
		return time.Time{}, false
	}
	var t time.Time
	err := t.UnmarshalText([]byte(s))
	return t, err == nil
}

func (c *cursor) port() (uint16, bool) {
	c.rest = strings.TrimLeft(c.rest, " ")
	digits := 0
	for digits < len(c.rest) && '0' <= c.rest[digits] && c.rest[digits] <= '9' {
		digits++
	}
	s := c.rest[:digits]
	c.rest = c.rest[digits:]
	n, err := strconv.ParseUint(s, 10, 16)
	return uint16(n), err == nil && (s[0] != '0' || s == "0")
}
