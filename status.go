package main

// `rdhpf status`: what is known about an instance from its socket, else from its state file, else from lsof; and how
// that is shown: as a table, as JSON, at each change (-watch), or once the ports are active (-wait).

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"math"
	"net"
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

const (
	pollEvery    = 100 * time.Millisecond // how often to look where no socket tells of changes
	slowPoll     = 2 * time.Second        // how often at the least, where an instance cuts its subscribers off
	steadyFor    = time.Minute            // a subscription that lasted this long was not cut off for lack of room
	stillOpen    = 300 * time.Millisecond // a connection that stays open this long has something behind it
	noInstance   = "No running instance found. Start one with: rdhpf run -host ssh://user@host"
	hostDefaults = "`HOST` the instance's host (default: docker's, else all)"
)

// wish is what `status -wait` waits for.
type wish struct {
	ports []uint16 // none: all
	some  bool     // with none given, at least one has to be forwarded
}

// report is what `rdhpf status -json` prints: a snapshot, and how far to trust it.
type report struct {
	*snapshot
	Source  string `json:"source"`  // socket, file or lsof
	Running bool   `json:"running"` // a live instance holds the lock
	Stale   bool   `json:"stale"`   // what is shown may no longer be true

	warnings []string // for a person
}

// errNotRunning says that there is no live instance; its text may be empty.
type errNotRunning struct{ text string }

func (err *errNotRunning) Error() string { return err.text }

// errMute says that there is a live instance of which nothing else is known.
type errMute struct{ error }

func notFound(host string) error {
	return &errNotRunning{fmt.Sprintf("No running instance found for %s. Start one with: rdhpf run -host %s", host, host)}
}

// statusFlags are the flags of status, checked.
type statusFlags struct {
	host  string
	watch bool
	wait  time.Duration // 0: it does not wait
	ports []uint16      // to wait for; none: all
	out   printer
}

// define defines the flags of status.
func (s *statusFlags) define(f *flag.FlagSet) {
	f.StringVar(&s.host, "host", "", hostDefaults)
	f.BoolVar(&s.out.asJSON, "json", false, "print one JSON object per instance")
	f.BoolVar(&s.out.style.wide, "wide", false, "also show names, images, services, container ports, traffic")
	f.BoolVar(&s.watch, "watch", false, "print again at each change; on a terminal q leaves")
	f.Func("wait", "`TIME` wait up to this until the local ports, or all, are active", addTime(&s.wait))
}

// check takes the arguments.
func (s *statusFlags) check(args []string) error {
	for _, arg := range args {
		port, err := parsePort(arg)
		if err != nil && strings.ContainsAny(arg, "@/") {
			err = unexpected("status", arg)
		} else if err != nil {
			err = fmt.Errorf("%w; where a container's port is, rdhpf port %s tells", err, printable(arg, maxText))
		}
		if err != nil {
			return usageError{err}
		}
		s.ports = append(s.ports, port)
	}
	switch {
	case len(s.ports) > 0 && s.wait == 0:
		return usageError{errors.New("ports can only be given with -wait: rdhpf status -wait 30s 8080")}
	case s.wait != 0 && s.watch:
		return usageError{errors.New("-wait and -watch exclude each other")}
	}
	s.out.w = os.Stdout
	s.out.style.columns, _ = terminalSize(os.Stdout)
	s.out.style.whole = s.out.style.wide
	s.out.style.colour = isTerminal(os.Stdout) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
	return nil
}

func statusCommand(f *flag.FlagSet) func(args, after []string) error {
	s := &statusFlags{}
	s.define(f)
	return func(args, after []string) error {
		if err := s.check(append(args, after...)); err != nil {
			return err
		}
		return s.run()
	}
}

func (s *statusFlags) run() error {
	t, err := findTarget(s.host)
	if err != nil {
		return err
	}
	ctx := context.Background()
	if s.wait != 0 || s.watch {
		p, err := t.one(ctx, s.wait != 0)
		if err != nil {
			return err
		}
		if s.wait != 0 {
			return waitFor(ctx, p, t.host, s.wait, wish{s.ports, true}, s.out)
		}
		return watchStatus(p, t.host, s.out)
	}
	if t.host == nil {
		return statusOfAll(ctx, t.dir, s.out)
	}
	r, err := inspect(ctx, pathsFor(t.dir, t.host.String()), t.host)
	if err != nil {
		return err
	}
	return s.out.report(r)
}

// statusOfAll prints what is known about every instance.
func statusOfAll(ctx context.Context, dir string, out printer) error {
	all, err := instances(dir)
	if err != nil {
		return err
	}
	shown, anyRuns, unhealthy := 0, false, false
	for _, p := range all {
		r, err := inspect(ctx, p, nil)
		if err != nil {
			fmt.Fprintf(os.Stderr, "Warning: %v\n", err)
			unhealthy = unhealthy || errors.As(err, new(errMute))
		}
		if r == nil {
			continue
		}
		if !out.asJSON {
			if shown > 0 {
				fmt.Fprintln(out.w)
			}
			fmt.Fprintln(out.w, r.Host)
		}
		if err := out.report(r); err != nil && !isVerdict(err) {
			return err
		}
		shown++
		anyRuns = anyRuns || r.Running
		unhealthy = unhealthy || r.Running && r.Stale
	}
	switch {
	case unhealthy:
		return errUnhealthy
	case anyRuns:
		return nil
	case shown > 0:
		return &errNotRunning{}
	}
	return &errNotRunning{noInstance}
}

// inspect finds out about the instance whose files are at p. Without a host the files tell which one it is, and lsof
// is not asked.
func inspect(ctx context.Context, p paths, h *host) (*report, error) {
	if err := checkDir(p.dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	snap := &snapshot{}
	asked := callContext(ctx, p.socket, "status", snap)
	if asked == nil {
		snap.clean()
		return &report{snapshot: snap, Source: "socket", Running: true}, nil
	}
	if errors.Is(asked, errForeign) {
		return nil, errMute{foreign(p)}
	}
	pid, held, err := lockedBy(p.lock)
	if err != nil {
		return nil, err
	}
	r, err := readReport(p.state, held, time.Now())
	switch {
	case r == nil && held:
		mute := unanswered(pid, asked)
		if err != nil {
			mute = fmt.Errorf("%w; %w", mute, err)
		}
		return nil, errMute{mute}
	case r == nil:
		return withoutFiles(ctx, h, err)
	case held && (r.Stale || errors.Is(asked, errSilent) || pid > 0 && pid != r.PID):
		r.Stale = true
		who := "it"
		if pid > 0 && pid != r.PID {
			who = fmt.Sprintf("process %d", r.PID)
		}
		r.warnings = append(r.warnings, fmt.Sprintf("%s. This is what %s wrote last.", mute(pid), who))
	}
	return r, nil
}

// readReport makes a report of the state file; nil without an error if there is none.
func readReport(path string, running bool, now time.Time) (*report, error) {
	snap, warning, err := readState(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	if pathsFor(filepath.Dir(path), snap.Host).state != path {
		return nil, fmt.Errorf("state file %s is of another host, %s", path, snap.Host)
	}
	r := &report{snapshot: snap, Source: "file", Running: running}
	if warning != "" {
		r.warnings = append(r.warnings, warning)
	}
	old, fresh := age(snap.UpdatedAt, now)
	switch {
	case fresh, running: // if it is not fresh, inspect says what that means
	case old < 0:
		r.warnings = append(r.warnings, "State file is from the future. rdhpf may not be running.")
	default:
		r.warnings = append(r.warnings, fmt.Sprintf("State file is %s old. rdhpf may not be running.", ageText(old)))
	}
	if !running {
		r.warnings = append(r.warnings, fmt.Sprintf("No rdhpf is running for this host: process %d has ended; this is what it wrote last.", snap.PID))
	}
	r.Stale = !fresh || !running
	return r, nil
}

// withoutFiles asks lsof, where neither the socket nor the state file tells anything. unread is what is wrong with the
// file, if there is one.
func withoutFiles(ctx context.Context, h *host, unread error) (*report, error) {
	if h == nil {
		return nil, unread
	}
	found := seenByLsof(ctx, *h)
	if len(found) == 0 {
		if unread == nil {
			return nil, notFound(h.String())
		}
		return nil, &errNotRunning{fmt.Sprintf("%v. %v", unread, notFound(h.String()))}
	}
	r := &report{Source: "lsof", Stale: true, snapshot: &snapshot{Version: stateVersion, Host: h.String(), UpdatedAt: utc(time.Now()),
		Connection: connection{State: "unknown"}, Warnings: []string{}, Forwards: found, Skipped: []skippedPort{}}}
	if unread != nil {
		r.warnings = append(r.warnings, unread.Error())
	}
	r.warnings = append(r.warnings, "No instance was found; these are the ports on which an rdhpf or an ssh for that host listens.")
	return r, nil
}

// seenByLsof lists the loopback ports on which an rdhpf for the host listens, or an ssh to it, which earlier versions
// had listen. Nothing is known of the containers behind them.
func seenByLsof(ctx context.Context, h host) []forwardInfo {
	sockets, _ := tcpSockets(ctx)
	isFor := make(map[int]bool)
	var found []forwardInfo
	for _, s := range sockets {
		if s.connected || !s.addr.Addr().IsLoopback() || s.command != "ssh" && s.command != "rdhpf" {
			continue
		}
		if _, asked := isFor[s.pid]; !asked {
			out, _ := exec.CommandContext(ctx, "ps", "-ww", "-o", "args=", "-p", strconv.Itoa(s.pid)).Output()
			isFor[s.pid] = h.isNamedBy(s.command, strings.Fields(string(out)))
		}
		if isFor[s.pid] {
			found = append(found, forwardInfo{ContainerID: "unknown", LocalPort: s.addr.Port(), LocalAddress: s.addr.Addr().String(),
				RemoteAddress: loopback4.String(), Status: pending, Reason: reasonSilent})
		}
	}
	var wg sync.WaitGroup
	for i := range found {
		f := &found[i]
		wg.Add(1)
		go func() {
			defer wg.Done()
			if staysOpen(ctx, f.local()) {
				f.Status, f.Reason = active, ""
			}
		}()
	}
	wg.Wait()
	return found
}

// isNamedBy says whether the arguments of an rdhpf or an ssh name this host.
func (h host) isNamedBy(command string, args []string) bool {
	for i, arg := range args {
		if command == "ssh" {
			user, name, found := strings.Cut(arg, "@")
			if !found {
				user, name = h.user, arg
			}
			if strings.EqualFold(name, h.name) && (h.user == "" || user == h.user) {
				return true
			}
			continue
		}
		name, value, found := strings.Cut(arg, "=")
		if !found && i+1 < len(args) {
			value = args[i+1]
		}
		if other, err := parseHost(value); (name == "-host" || name == "--host") && err == nil && other.String() == h.String() {
			return true
		}
	}
	return false
}

// staysOpen says whether a connection to a local address is not closed at once, as one without a service behind it is.
func staysOpen(ctx context.Context, addr string) bool {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return false
	}
	defer conn.Close()
	conn.SetReadDeadline(time.Now().Add(stillOpen))
	n, err := conn.Read(make([]byte, 1))
	return n > 0 || errors.Is(err, os.ErrDeadlineExceeded)
}

// instances returns the files of every instance that ever had a lock in the directory.
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
	for _, entry := range entries {
		if base, isLock := strings.CutSuffix(entry.Name(), ".lock"); isLock {
			all = append(all, pathsAt(dir, filepath.Join(dir, base)))
		}
	}
	return all, nil
}

// printer prints reports.
type printer struct {
	w      io.Writer
	asJSON bool
	style  tableStyle
}

// report prints r, and returns the error with which the command ends if r is not of a live instance that answers.
// There is nothing to add to that error.
func (out printer) report(r *report) error {
	for _, warning := range r.warnings {
		fmt.Fprintf(os.Stderr, "Warning: %s\n", warning)
	}
	if err := out.print(r); err != nil {
		return fmt.Errorf("printing the status: %w", err)
	}
	switch {
	case !r.Running:
		return &errNotRunning{}
	case r.Stale:
		return errUnhealthy
	}
	return nil
}

// isVerdict says whether an error of report is about the instance, and not about printing.
func isVerdict(err error) bool {
	return errors.As(err, new(*errNotRunning)) || errors.Is(err, errUnhealthy)
}

func (out printer) print(r *report) error {
	if out.asJSON {
		return json.NewEncoder(out.w).Encode(r)
	}
	_, err := io.WriteString(out.w, table(r, time.Now(), out.style))
	return err
}

// tableStyle is how to print a table.
type tableStyle struct {
	wide, colour bool
	columns      int  // of the terminal; 0: there is none, or its size is not known
	whole        bool // nothing is cut, wherever the terminal wraps it
}

var statusColour = map[string]string{active: "\x1b[32m", conflict: "\x1b[31m", pending: "\x1b[33m"}

const (
	gap         = 3 // between columns
	stateColumn = 3
	nodeColumn  = 8 // after SERVICE, if there is one
)

// narrowing is the order in which columns give up room where the terminal is too narrow, and what they keep at least. An
// address loses its beginning, not its port.
var narrowing = []struct{ column, least int }{
	{5, 40}, {2, 12}, {1, 21}, {5, 16}, {1, 14}, {2, 10}, {5, 12}, {0, 6}, {1, 8}, {2, 6}, {5, 6}}

// table returns a report as the table of its forwards, and below it what else there is to say.
func table(r *report, now time.Time, style tableStyle) string {
	var b strings.Builder
	if len(r.Forwards) > 0 {
		writeTable(&b, r, now, style)
	} else if r.Connection.State == connected && len(r.Skipped) == 0 {
		b.WriteString("No published ports.\n")
	} else if r.Connection.State == connected {
		b.WriteString("No forwarded ports.\n")
	}
	if style.wide && r.Running && r.DockerSocket != "" {
		fmt.Fprintf(&b, "Docker socket: unix://%s\n", r.DockerSocket)
	}
	remarks(&b, r, now)
	return b.String()
}

func writeTable(b *strings.Builder, r *report, now time.Time, style tableStyle) {
	measure, limit := utf8.RuneCountInString, math.MaxInt
	if style.columns > 0 {
		measure = textColumns
		if !style.whole {
			limit = style.columns
		}
	}
	rows := [][]string{{"CONTAINER ID", "LOCAL", "REMOTE", "STATE", "DURATION"}}
	if style.wide {
		rows[0] = append(rows[0], "NAME", "IMAGE", "SERVICE", "PORT", "VERIFIED", "CONNS", "OPEN", "IN", "OUT", "LAST USED")
	}
	rows[0] = append(rows[0], "REASON")
	for i := range r.Forwards {
		rows = append(rows, row(&r.Forwards[i], now, style.wide))
	}
	if style.wide && slices.ContainsFunc(r.Forwards, func(f forwardInfo) bool { return f.Node != "" }) {
		rows[0] = slices.Insert(rows[0], nodeColumn, "NODE")
		for i, f := range r.Forwards {
			rows[i+1] = slices.Insert(rows[i+1], nodeColumn, dash(f.Node))
		}
	}
	widths, total := make([]int, len(rows[0])), -gap
	for i := range widths {
		for _, row := range rows {
			widths[i] = max(widths[i], measure(row[i]))
		}
		total += widths[i] + gap
	}
	if limit < total && !style.wide {
		for _, n := range narrowing {
			less := max(0, min(total-limit, widths[n.column]-n.least))
			widths[n.column] -= less
			total -= less
		}
		for _, row := range rows {
			row[0], row[1], row[2], row[5] = cut(row[0], widths[0]), cutFront(row[1], widths[1]), cutFront(row[2], widths[2]), cut(row[5], widths[5])
		}
	}
	for n, row := range rows {
		line := ""
		for i, cell := range row {
			blanks := widths[i] - measure(cell) + gap
			if colour := statusColour[cell]; style.colour && i == stateColumn && colour != "" {
				cell = colour + cell + "\x1b[0m"
			}
			line += cell + strings.Repeat(" ", blanks)
		}
		b.WriteString(cut(strings.TrimRight(line, " "), limit) + "\n")
		if n == 0 {
			b.WriteString(strings.Repeat("-", min(total, limit)) + "\n")
		}
	}
}

func row(f *forwardInfo, now time.Time, wide bool) []string {
	remote, port := "-", "-"
	if f.RemotePort != 0 {
		remote = strconv.Itoa(int(f.RemotePort))
		if addrOf(f.RemoteAddress) != loopback4 {
			remote = (&forwardInfo{LocalAddress: f.RemoteAddress, LocalPort: f.RemotePort}).local()
		}
	}
	if f.ContainerPort != 0 {
		port = strconv.Itoa(int(f.ContainerPort))
	}
	cells := []string{f.ContainerID, f.local(), remote, f.Status, since(&f.CreatedAt, now)}
	if wide {
		cells = append(cells, dash(f.ContainerName), dash(f.Image), dash(f.Service), port,
			since(f.VerifiedAt, now), strconv.FormatInt(f.Connections, 10), strconv.FormatInt(f.OpenConnections, 10),
			sizeText(f.BytesIn), sizeText(f.BytesOut), since(f.LastUsedAt, now))
	}
	return append(cells, f.Reason)
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// since is the age of a time, "-" if there is none.
func since(t *time.Time, now time.Time) string {
	if t == nil || t.IsZero() {
		return "-"
	}
	return ageText(now.Sub(*t))
}

// ageText writes a duration the way people say it: 45s, 2m15s, 3h4m, 2d5h.
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

// sizeText writes a number of bytes the way people say it: 512B, 1.2MiB.
func sizeText(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%dB", n)
	}
	f, unit := float64(n)/1024, 0
	for ; f >= 1023.95 && unit < 4; unit++ { // what would be printed as 1024.0
		f /= 1024
	}
	return fmt.Sprintf("%.1f%ciB", f, "KMGTP"[unit])
}

// remarks writes what concerns the instance rather than one forward.
func remarks(w io.Writer, r *report, now time.Time) {
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
		fmt.Fprintf(w, "Skipped: %s: %s\n", skippedName(s), s.Reason)
	}
}

// skippedName names a port that is not forwarded, or the container if all its ports are not.
func skippedName(s skippedPort) string {
	who := fmt.Sprintf("%s (%s)", s.Name, s.ContainerID)
	if s.Port == 0 {
		return who
	}
	return fmt.Sprintf("%d/%s of %s", s.Port, s.Protocol, who)
}

// printHealth prints whether the instance is healthy, and why not.
func printHealth(w io.Writer, h *health, now time.Time) {
	fmt.Fprintf(w, "%s: %d active, %d conflict, %d pending; %s for %s", h.Status, h.Counts[active], h.Counts[conflict], h.Counts[pending],
		h.Connection.State, ageText(now.Sub(h.Connection.Since)))
	if h.Engine != "" {
		fmt.Fprintf(w, "; %s", printable(h.Engine, maxText))
	}
	noun := "connections"
	if h.Traffic.Connections == 1 {
		noun = "connection"
	}
	fmt.Fprintf(w, "; up %s; %d %s (%d open), %s in, %s out\n", ageText(time.Duration(h.Uptime)*time.Second),
		h.Traffic.Connections, noun, h.Traffic.OpenConnections, sizeText(h.Traffic.BytesIn), sizeText(h.Traffic.BytesOut))
	for _, reason := range h.Reasons {
		fmt.Fprintf(w, "  %s\n", printable(reason, 1000))
	}
}

// sight is a report, or why there is none.
type sight struct {
	report *report
	err    error
}

// follow sends what is known now and at each change until ctx ends: what the socket tells, else what looking again and
// again shows.
func follow(ctx context.Context, p paths, h *host, out chan<- sight) {
	send := func(s sight) {
		select {
		case out <- s:
		case <-ctx.Done():
		}
	}
	delay, name := pollEvery, ""
	if h != nil {
		name = h.String()
	}
	for ctx.Err() == nil {
		told, begun := false, time.Now()
		err := subscribe(ctx, p.socket, func(snap *snapshot) {
			told, name = true, snap.Host
			send(sight{report: &report{snapshot: snap, Source: "socket", Running: true}})
		})
		if !told || errors.Is(err, errSilent) {
			// Whether lsof sees anything makes no difference here, and it is slow.
			r, unknown := inspect(ctx, p, nil)
			switch {
			case r != nil:
				name = r.Host
			case unknown == nil && name == "":
				unknown = &errNotRunning{noInstance}
			case unknown == nil:
				unknown = notFound(name)
			}
			send(sight{r, unknown})
		}
		// An instance may cut its subscribers off because it has too many. Without one, looking often costs little.
		if isAbsent(err) || time.Since(begun) >= steadyFor {
			delay = pollEvery
		}
		select {
		case <-ctx.Done():
		case <-time.After(delay):
		}
		delay = min(2*delay, slowPoll)
	}
}

// isAbsent says that a subscription failed because nothing listens on the socket.
func isAbsent(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED)
}

// waitFor returns nil as soon as the ports, or all of them, are active, and the instance has verified it.
func waitFor(ctx context.Context, p paths, h *host, patience time.Duration, want wish, out printer) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	sights := make(chan sight)
	go follow(ctx, p, h, sights)
	var last error
	for {
		var s sight
		select {
		case <-ctx.Done():
			if last == nil { // not even the first look has ended
				last = errors.New("no instance is running")
				if pid, held, err := lockedBy(p.lock); err == nil && held {
					last = unanswered(pid, errSilent)
				}
			}
			return fmt.Errorf("after %v: %v", patience, last)
		case s = <-sights:
		}
		if s.err == nil {
			s = verified(ctx, p, s.report, want)
		}
		if s.err == nil {
			return out.report(s.report)
		}
		if ctx.Err() == nil {
			last = s.err
		}
	}
}

// verified returns a report of the ports being active that rests on fresh evidence, or why there is none.
func verified(ctx context.Context, p paths, r *report, want wish) sight {
	if missing := missingPorts(r, want); len(missing) > 0 {
		return sight{err: errors.New(strings.Join(missing, "; "))}
	}
	snap := &snapshot{}
	var refused refusal
	err := callContext(ctx, p.socket, "verify", snap)
	switch {
	case errors.As(err, &refused) && refused == noSuchMethod: // an older version, which has nothing better
		return sight{report: r}
	case err != nil:
		return sight{err: fmt.Errorf("the ports look active, which cannot be verified: %w", unanswered(r.PID, err))}
	}
	snap.clean()
	r = &report{snapshot: snap, Source: "socket", Running: true}
	if missing := missingPorts(r, want); len(missing) > 0 {
		return sight{err: errors.New(strings.Join(missing, "; "))}
	}
	return sight{report: r}
}

// missingPorts says what keeps the ports that are wanted from being active.
func missingPorts(r *report, want wish) (missing []string) {
	switch {
	case !r.Running:
		return []string{"no instance is running"}
	case r.Stale:
		return []string{mute(r.PID)}
	case r.Connection.State != connected:
		text := "not connected to the remote host"
		if r.Connection.LastError != "" {
			text += ": " + r.Connection.LastError
		}
		missing = append(missing, text)
	case want.some && len(want.ports) == 0 && len(r.Forwards) == 0:
		return []string{"no port is forwarded, and -wait wants at least one"}
	}
	found := make(map[uint16]*forwardInfo)
	for i := range r.Forwards {
		f := &r.Forwards[i]
		if old := found[f.LocalPort]; old == nil || f.Status == active {
			found[f.LocalPort] = f
		}
	}
	if len(want.ports) == 0 {
		for i := range r.Forwards {
			if f := &r.Forwards[i]; f.Status != active {
				missing = append(missing, whyNot(f))
			}
		}
	}
	for _, port := range want.ports {
		if f := found[port]; f == nil {
			missing = append(missing, fmt.Sprintf("no container publishes %d", port))
		} else if f.Status != active {
			missing = append(missing, whyNot(f))
		}
	}
	return missing
}

// whyNot says why a forward is not active.
func whyNot(f *forwardInfo) string {
	return fmt.Sprintf("%s of %s is %s (%s)", f.local(), cmp.Or(f.ContainerName, f.ContainerID), f.Status, f.Reason)
}

// watchStatus prints at each change until it is interrupted. On a terminal it has a screen of its own, which it redraws
// every second, for the durations, and which q leaves, too.
func watchStatus(p paths, h *host, out printer) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	signals, gone, keys := make(chan os.Signal, 8), make(chan struct{}), make(chan byte)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	var own *screen
	if isTerminal(os.Stdout) && !out.asJSON {
		signal.Notify(signals, unix.SIGQUIT, unix.SIGTSTP, unix.SIGCONT, unix.SIGWINCH)
		own, out.style.whole = &screen{w: out.w}, false
		defer own.leave()
		if err := own.draw("", true); err != nil {
			return err
		}
		if isTerminal(os.Stdin) {
			go readKeys(os.Stdin, keys)
		}
	}
	go awaitHangup(os.Stdout, gone)
	sights := make(chan sight)
	go follow(ctx, p, h, sights)
	return showSights(out, own, sights, signals, keys, gone)
}

// showSights prints each sight that differs, or draws it on the watch's own screen, until one of the other channels ends
// the watch.
func showSights(out printer, own *screen, sights <-chan sight, signals <-chan os.Signal, keys <-chan byte, gone <-chan struct{}) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var s sight
	var shown string
	for {
		var err error
		again := false
		select {
		case <-gone:
			return nil
		case key := <-keys:
			if key == 'q' {
				return nil
			}
			continue
		case sig := <-signals:
			switch sig {
			case unix.SIGTSTP:
				own.suspend()
				tick.Reset(time.Second) // long after the stop, unless there is none
				continue
			case unix.SIGCONT:
				again = true
			case unix.SIGWINCH:
			default:
				return nil
			}
		case s = <-sights:
			if key := keyOf(s); own == nil && key != shown {
				shown = key
				err = printSight(out, s)
			}
		case <-tick.C:
			again = own != nil && !own.on
		}
		if own != nil {
			err = own.draw(watchText(s, out.style), again)
		}
		if errors.Is(err, unix.EPIPE) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// keyOf is the same for two sights that show the same.
func keyOf(s sight) string {
	if s.err != nil {
		return s.err.Error()
	}
	r := *s.report
	r.snapshot = r.snapshot.at(time.Time{})
	body, _ := json.Marshal(r)
	return string(body)
}

// printSight prints a change where there is no screen to redraw.
func printSight(out printer, s sight) error {
	if s.err != nil {
		_, err := fmt.Fprintln(os.Stderr, s.err)
		return err
	}
	if err := out.report(s.report); err != nil && !isVerdict(err) {
		return err
	}
	if !out.asJSON {
		_, err := fmt.Fprintln(out.w)
		return err
	}
	return nil
}

// watchText is what the screen shows.
func watchText(s sight, style tableStyle) string {
	switch {
	case s.err != nil:
		return s.err.Error()
	case s.report == nil:
		return ""
	}
	text := fmt.Sprintf("%s  %s\n\n", s.report.Host, time.Now().Format(time.TimeOnly))
	for _, warning := range s.report.warnings {
		text += "Warning: " + warning + "\n"
	}
	style.columns, _ = terminalSize(os.Stdout)
	return text + table(s.report, time.Now(), style)
}
