package main

// run.go: `rdhpf run`, the single instance for its host.
//
// Data flow: the link (link.go) reports the containers that the engine lists and
// their events. The loop below passes these to the core (state.go), which tracks
// the desired and the observed state, and asks it what to do. The loop opens and
// closes local ports itself; goroutines probe services and look up who holds a
// port. Their results, and the observations of carried connections, come back as
// functions that the loop runs. After each change the loop posts an immutable
// snapshot, from which the state file and the socket are served. Client requests
// come back as functions, too.
//
// So a single goroutine owns all state. run waits for all others before it
// returns. Losing the connection is one assignment: everything that dies with it
// is in the link.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"syscall"
	"time"
)

const (
	relistEvery   = 30 * time.Second
	beatEvery     = 2 * time.Second
	sleptAfter    = 10 * time.Second       // a longer gap between beats means that the machine slept
	wakeDeadline  = 3 * time.Second        // for the engine to answer after a sleep
	sayAfter      = time.Second            // before saying that a connection is being made
	settleAfter   = time.Second            // before listing again: an engine may report a change before it lists it
	stubbornDelay = time.Minute            // if only the user can fix it
	steadyAfter   = 30 * time.Second       // of connection, after which failures are forgotten
	probePace     = 2 * time.Millisecond   // between probes: a burst would delay user traffic
	settleGrace   = 500 * time.Millisecond // for a program that has just been started to listen
	lookTimeout   = 5 * time.Second        // for the probes that a client waits for
)

// runOptions are the settings from the command line.
type runOptions struct {
	host   host
	dir    string
	flags  config
	retry  bool   // keep trying if the first connection fails
	docker bool   // serve the engine's socket
	detach bool   // in the background
	notify string // the socket for sayReady, "" if there is none
	log    *slog.Logger
}

// runner is the instance.
type runner struct {
	// Set at the start, then immutable.
	runOptions
	paths        paths
	ssh          sshProgram
	maxListeners int             // allowed by the limit on open files
	ctx          context.Context // ends with the instance
	quit         context.CancelFunc

	// Safe for concurrent use.
	tasks  chan func(now time.Time) // run by the loop
	wg     sync.WaitGroup           // of all goroutines started by start
	board  *board
	gate   *gate
	owners owners

	// Owned by the loop: the core, the open ports and the connection.
	state *state
	doors map[key]*door
	// Doors just opened, except on their additional addresses.
	halfOpen  []*door
	listeners int   // of all doors
	link      *link // nil if there is neither a connection nor an attempt

	// Owned by the loop: what a manager told last of its Swarm.
	swarm swarm

	// Owned by the loop: kept across connections.
	everUp   bool
	proven   bool // events were followed as well: the server allows two sessions
	failures int
	retryAt  time.Time
	lastErr  error     // why there is no connection
	lastBeat time.Time // to detect that the machine slept

	// Owned by the loop: the instance's files.
	lock    *os.File
	sockets []*socket
	fileErr error // why the state file cannot be written

	// Owned by the loop: what clients are shown.
	shown    snapshot  // the constant fields and the connection's part
	changed  bool      // a new snapshot is due
	carried  int64     // traffic of all forwards at the last beat
	waiting  []*waiter // clients
	notified string    // by sayReady
	failed   error     // ends the instance
}

// run runs the single instance for its host until ctx ends.
func run(ctx context.Context, o runOptions) (err error) {
	p := pathsFor(o.dir, o.host.String())
	if err := p.check(); err != nil {
		return err
	}
	runtime.GOMAXPROCS(1)  // ssh, which encrypts on one core, is slower; more would cost memory
	debug.SetGCPercent(50) // there is little garbage, too
	ssh, err := findSSH()
	if err != nil {
		return err
	}
	if err := makeDir(p.dir); err != nil {
		return err
	}
	lock, err := lockInstance(p.lock)
	if err != nil {
		return err
	}
	sweepDir(p.dir, time.Now())
	ssh.readConfig(o.host)
	r := &runner{runOptions: o, paths: p, ssh: ssh, lock: lock, tasks: make(chan func(time.Time), 64),
		gate: newGate(), doors: make(map[key]*door)}
	defer func() {
		r.lock.Close()
		if err == nil {
			o.log.Info(fmt.Sprintf("stopped: all local ports and the connection to %s are closed", o.host))
		}
	}()
	cfg, err := loadConfig(o.dir, o.host.String(), o.flags)
	if err != nil {
		return err
	}
	r.warnBind(cfg)
	r.setUp(ctx, cfg)
	defer r.wg.Wait()
	defer r.quit()
	if err := checkForeign(p); err != nil {
		return err
	}
	r.sockets = []*socket{{path: p.socket, serve: r.answer}}
	if o.docker {
		r.shown.DockerSocket = p.docker
		r.sockets = append(r.sockets, &socket{path: p.docker, serve: (&proxy{gate: r.gate, board: r.board, settle: r.settle}).serve})
	}
	for _, s := range r.sockets {
		defer s.remove()
		if err := r.listen(s); err != nil {
			return err
		}
	}
	r.start(func() {
		keepState(r.ctx, p.state, r.board, func(err error) {
			r.post(r.ctx, func(time.Time) { r.fileTrouble(err) })
		})
	})
	defer r.closeDoors()
	err = r.loop()
	notify(r.notify, "STOPPING=1")
	return err
}

// setUp prepares the core, the limits, the first snapshot and the context.
func (r *runner) setUp(ctx context.Context, cfg *config) {
	files := raiseFileLimit()
	r.maxListeners = max(files/3, files-512) // the rest is for accepted connections
	r.state = newState(cfg, min(max(files/32, 2), maxDials))
	now := utc(time.Now())
	r.shown = snapshot{Version: stateVersion, Host: r.host.String(), PID: os.Getpid(), StartedAt: now,
		Connection: connection{State: connecting, Since: now}}
	r.board = newBoard(r.snapshot())
	r.ctx, r.quit = context.WithCancel(ctx)
	r.start(func() { growFileTable(files) })
}

var begun = time.Now()

// untilBeat returns the time until the next beat. Everything periodic shares the
// same beats, since each wakeup of an idle process has a cost.
func untilBeat() time.Duration { return beatEvery - time.Since(begun)%beatEvery }

func (r *runner) start(f func()) {
	r.wg.Add(1)
	go func() {
		defer r.wg.Done()
		f()
	}()
}

// post has the loop run do, unless ctx ends first. The loop itself must not call
// it.
func (r *runner) post(ctx context.Context, do func(now time.Time)) {
	select {
	case r.tasks <- do:
	case <-ctx.Done():
	}
}

// loop runs until the instance ends. It returns nil, or the error that made it
// impossible to continue.
func (r *runner) loop() error {
	beat := time.NewTimer(untilBeat())
	defer beat.Stop()
	alarm := time.NewTimer(0)
	defer alarm.Stop()
	r.lastBeat = time.Now()
	for r.failed == nil {
		alarm.Reset(time.Until(r.step(time.Now())))
		select {
		case <-r.ctx.Done():
			return nil
		case do := <-r.tasks:
			do(time.Now())
			for range len(r.tasks) { // no more than these: a flood must not block the loop
				(<-r.tasks)(time.Now())
			}
		case <-alarm.C:
		case <-beat.C:
			beat.Reset(untilBeat())
			r.beat(time.Now())
		}
	}
	return r.failed
}

// step does everything that is due, publishes the result, and returns when to call
// it again.
func (r *runner) step(now time.Time) (wake time.Time) {
	wake = now.Add(time.Hour) // the beat comes sooner
	until := func(t time.Time) {
		if !t.IsZero() && t.Before(wake) {
			wake = t
		}
	}
	if r.link == nil && !r.retryAt.After(now) {
		if r.failed = r.keepFiles(); r.failed != nil { // without the lock the control socket is not ours
			return wake
		}
		r.connect()
	}
	r.ring(now)
	r.lookForWaiting(now)
	for {
		acts, due := r.state.plan(now)
		for _, a := range acts {
			r.do(now, a)
		}
		if len(acts) == 0 { // an action may cause further ones
			until(due)
			break
		}
	}
	for _, d := range r.halfOpen {
		r.openMissing(d)
	}
	r.halfOpen = nil
	r.tell()
	if r.changed || r.state.changed {
		r.changed, r.state.changed = false, false
		snap := r.snapshot()
		r.board.post(snap)
		r.sayReady(snap)
	}
	until(r.answerWaiting(now))
	if r.link == nil {
		until(r.retryAt)
	} else {
		until(r.link.listDue)
		until(r.link.wakeBy)
		until(r.link.saySoAt)
	}
	return wake
}

// connect starts a connection attempt.
func (r *runner) connect() {
	l := &link{r: r, relist: make(chan struct{}, 1), pings: make(chan chan error), first: !r.proven && !r.retry,
		ownJump: r.failures > 0 && r.failures%2 == 0} // every other attempt, after one as ssh_config has it
	l.ctx, l.cancel = context.WithCancel(r.ctx)
	if r.link, r.retryAt = l, (time.Time{}); !r.everUp && r.lastErr == nil {
		l.saySoAt = time.Now().Add(sayAfter)
	}
	r.start(func() {
		err := l.run()
		l.cancel()
		r.post(r.ctx, func(now time.Time) { r.down(now, l, err) })
	})
}

// do performs an action of the core, either immediately or in a goroutine.
func (r *runner) do(now time.Time, a action) {
	switch k, l := a.want.key, r.link; a.verb {
	case openPort:
		r.state.openDone(now, k, r.open(a))
	case closePort:
		r.listeners -= len(r.doors[k].listeners)
		r.doors[k].close()
		delete(r.doors, k)
	case probePort:
		if l.pace = l.pace.Add(probePace); l.pace.Before(now) {
			l.pace = now
		}
		m, rtt, wait := l.master, l.rtt, l.pace.Sub(now)
		r.start(func() {
			select {
			case <-l.ctx.Done():
				return
			case <-time.After(wait):
			}
			result := l.probe(l.ctx, m, a.want, rtt)
			l.tell(func(now time.Time) { r.state.probeDone(now, k, a.probe, result) })
		})
	case findOwner:
		r.start(func() {
			owner, free := r.owners.of(r.ctx, k.local), freeOf(k.local.Addr(), a.ways)
			r.post(r.ctx, func(time.Time) { r.state.ownerFound(k, owner, free) })
		})
	}
}

// freeOf returns the first of the ports that is free at an address, 0 if none is.
func freeOf(at netip.Addr, ports []uint16) uint16 {
	for _, port := range ports {
		if l, err := net.Listen("tcp", netip.AddrPortFrom(at, port).String()); err == nil {
			l.Close()
			return port
		}
	}
	return 0
}

// open opens the door of a forward at its own address.
func (r *runner) open(a action) error {
	d := &door{r: r, key: a.want.key, meter: a.meter, listeners: make(map[netip.Addr]net.Listener)}
	d.ctx, d.shut = context.WithCancel(r.ctx)
	if err := r.listenOn(d, d.key.local.Addr()); err != nil {
		d.shut()
		return err
	}
	r.doors[d.key] = d
	d.missing = r.state.cfg.others()
	r.halfOpen = append(r.halfOpen, d) // the main addresses of all forwards come first
	return nil
}

var errFileLimit = errors.New("the limit on open files is too low")

// listenOn opens a door at an address, unless that would leave too few file
// descriptors for the connections it accepts.
func (r *runner) listenOn(d *door, a netip.Addr) error {
	if r.listeners >= r.maxListeners {
		return fmt.Errorf("%w: it allows %d listeners; raise it (ulimit -n)", errFileLimit, r.maxListeners)
	}
	err := d.listen(a)
	if err == nil {
		r.listeners++
	}
	return err
}

// openMissing opens a door's additional addresses as far as possible. It does not
// warn if this machine has no ::1, but does if the port is in use there.
func (r *runner) openMissing(d *door) {
	missing := d.missing
	d.missing = nil
	for _, a := range missing {
		err := r.listenOn(d, a)
		if err == nil || a == loopback6 && (errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EAFNOSUPPORT)) {
			continue
		}
		if d.missing = append(d.missing, a); d.told || errors.Is(err, errFileLimit) {
			continue
		}
		d.told = true
		at := netip.AddrPortFrom(a, d.key.local.Port())
		r.start(func() {
			owner := r.owners.of(r.ctx, at)
			r.post(r.ctx, func(time.Time) { r.warnMissing(d, at, err, owner) })
		})
	}
	if len(d.missing) == 0 && d.warning != "" {
		d.warning, r.changed = "", true
	}
}

// warnMissing warns that an additional address of a forward cannot be opened.
func (r *runner) warnMissing(d *door, at netip.AddrPort, err error, owner string) {
	if len(d.missing) == 0 || r.doors[d.key] != d {
		return
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		err = errno
	}
	d.warning = fmt.Sprintf("%s is not forwarded: %v", at, err)
	if owner != "" {
		d.warning += " (" + owner + ")"
	}
	r.log.Warn(fmt.Sprintf("%s; %s still works", d.warning, d.key.local))
	r.changed = true
}

func (r *runner) closeDoors() {
	for _, d := range r.doors {
		d.close()
	}
}

// tell logs the core's messages.
func (r *runner) tell() {
	for _, n := range r.state.notes {
		r.log.LogAttrs(context.Background(), n.level, n.text, n.attrs...)
	}
	r.state.notes = nil
}

// snapshot returns the current state as shown to clients.
func (r *runner) snapshot() *snapshot {
	snap := r.shown
	snap.Warnings = []string{}
	if err := r.engineErr(); err != nil {
		snap.Warnings = append(snap.Warnings, "the remote engine does not answer: "+err.Error())
	}
	if r.link != nil && r.swarm.err != nil {
		snap.Warnings = append(snap.Warnings, fmt.Sprintf("the Swarm does not answer: %v; its forwards stay as they are", r.swarm.err))
	}
	if r.fileErr != nil {
		snap.Warnings = append(snap.Warnings, "the state file cannot be written: "+r.fileErr.Error())
	}
	for _, f := range r.state.sorted() {
		if d := r.doors[f.key]; d != nil && d.warning != "" {
			snap.Warnings = append(snap.Warnings, d.warning)
		}
	}
	r.state.show(&snap)
	return &snap
}

// engineErr returns why the engine does not answer although there is a connection.
func (r *runner) engineErr() error {
	if r.link == nil {
		return nil
	}
	return cmp.Or(r.link.listErr, r.link.eventsErr)
}

// listed handles a list requested at began. The first list of a link makes the
// connection established.
func (r *runner) listed(now time.Time, l *link, list []container, began time.Time, took time.Duration, server string) {
	// One list delayed, say by a cut link, must not slow down all probes.
	if l.wakeBy = (time.Time{}); l.rtt == 0 {
		l.rtt = took
	} else {
		l.rtt = min(took, 2*l.rtt)
	}
	l.listedAt = began
	if !l.listDue.After(now) {
		l.listDue = now.Add(relistEvery)
	}
	if due := now.Add(max(swarmPace, 5*r.swarm.took)); r.swarm.follow && due.Before(l.listDue) {
		l.listDue = due
	}
	switch {
	case !r.everUp:
		r.log.Info(fmt.Sprintf("connected to %s, %s", r.host, server))
		if r.docker {
			r.log.Info("its engine is also here: export DOCKER_HOST=unix://" + r.paths.docker)
		}
	case r.shown.Connection.State != connected:
		r.shown.Connection.Reconnects++
		r.log.Info(fmt.Sprintf("connected to %s again after %s", r.host, now.Sub(r.shown.Connection.Since).Round(100*time.Millisecond)))
	}
	r.engineBack(&l.listErr)
	if r.connection(now, connected) || r.shown.Engine != server {
		r.shown.Engine, r.changed = server, true
	}
	r.everUp, r.lastErr, l.saySoAt = true, nil, time.Time{}
	r.state.listed(now, slices.Concat(list, r.swarm.services, r.swarm.tasks))
	if !l.lookFrom.IsZero() && !began.Before(l.lookFrom) {
		r.state.lookAgain(l.lookFrom, "")
		l.lookFrom = time.Time{}
	}
}

// swarmListed handles what a manager tells of its Swarm; nil means that the engine is none.
// What could not be told stays as it was.
func (r *runner) swarmListed(sw *swarm) {
	if sw == nil {
		sw = &swarm{}
	} else if sw.services == nil {
		sw.services, sw.tasks = r.swarm.services, r.swarm.tasks
	} else if sw.tasks == nil {
		sw.tasks = r.swarm.tasks
	}
	switch was := r.swarm.err; {
	case sw.err != nil && was == nil:
		r.changed = true
		r.log.Warn(fmt.Sprintf("the Swarm does not answer: %v; its forwards stay as they are", sw.err))
	case sw.err == nil && was != nil:
		r.changed = true
		r.log.Info("the Swarm answers again")
	}
	r.swarm = *sw
}

// following handles the start of an event stream. Earlier events may have been
// missed.
func (r *runner) following(now time.Time, l *link) {
	clear(r.state.died) // a start may have been missed
	r.proven, r.changed = true, r.changed || !r.proven
	r.engineBack(&l.eventsErr)
	l.lookFrom = now // once a list tells what was started again meanwhile
	l.wantList()
	l.listDue = now.Add(settleAfter)
}

// happened handles an event.
func (r *runner) happened(now time.Time, l *link, ev event) {
	switch ev.action {
	case "die":
		r.state.diedNow(now, ev.id)
	case "start":
		r.state.startedNow(now, ev.id)
	case "pause", "unpause":
		r.state.frozenNow(now, ev.id, ev.action == "pause")
	case "health_status":
		r.state.lookAgain(now, ev.id)
		return // the list does not change
	}
	at := utc(now)
	r.shown.LastEventAt, r.changed = &at, true
	l.wantList()
	l.listDue = now.Add(settleAfter)
}

// engineLost handles a failure to list (if lists is set) or to follow events.
func (r *runner) engineLost(l *link, lists bool, err error) {
	known := r.engineErr() != nil
	if r.changed = true; lists {
		l.listErr = err
	} else {
		l.eventsErr = err
	}
	if known {
		return
	}
	if c := &r.shown.Connection; c.State != connected {
		c.LastError = err.Error()
	}
	r.log.Warn(fmt.Sprintf("the remote engine does not answer: %v; forwards stay as they are", err))
}

// engineBack clears one of the link's engine errors.
func (r *runner) engineBack(failed *error) {
	if *failed == nil {
		return
	}
	*failed, r.changed = nil, true
	if r.engineErr() == nil {
		r.log.Info("the remote engine answers again")
	}
}

// connection records the state of the connection and reports whether it changed.
func (r *runner) connection(now time.Time, state string) bool {
	c := &r.shown.Connection
	if c.State == state {
		return false
	}
	c.State, c.Since, r.changed = state, utc(now), true
	return true
}

// down handles the end of a connection or of an attempt.
func (r *runner) down(now time.Time, l *link, err error) {
	if l.why != nil {
		err = l.why
	}
	var refused *muxError
	if !r.retry && (!r.everUp || !r.proven && errors.As(err, &refused)) {
		r.failed = fmt.Errorf("cannot connect to %s: %w", r.host, err)
		return
	}
	c := &r.shown.Connection
	if c.State == connected && now.Sub(c.Since) >= steadyAfter {
		r.failures = 0
	}
	// 0, 1, 2, 2, … s: recovery is noticed within seconds after any outage.
	delay := min(time.Duration(r.failures), 2) * time.Second
	delay -= time.Duration(rand.Int64N(int64(delay)/4 + 1))
	r.failures++
	var e *connectError
	if errors.As(err, &e) && e.stubborn {
		delay = stubbornDelay
	}
	r.link = nil
	r.gate.set(nil)
	r.state.disconnected()
	if r.everUp {
		r.connection(now, reconnecting)
	}
	c.LastError, r.changed = err.Error(), true
	r.retryAt = now.Add(delay)
	if r.lastErr == nil || r.lastErr.Error() != err.Error() {
		when := "at once"
		if delay > 0 {
			when = "in " + delay.Round(100*time.Millisecond).String()
		}
		what := "connection lost"
		if !r.everUp {
			what = "cannot connect to " + r.host.String()
		}
		r.log.Warn(fmt.Sprintf("%s: %v; trying again %s", what, err, when))
	}
	r.lastErr = err
}

// ring does whatever is due on the connection.
func (r *runner) ring(now time.Time) {
	l := r.link
	if l == nil {
		return
	}
	if !l.saySoAt.IsZero() && !l.saySoAt.After(now) {
		l.saySoAt = time.Time{}
		r.log.Info(fmt.Sprintf("connecting to %s …", r.host))
	}
	if !l.listDue.IsZero() && !l.listDue.After(now) {
		l.listDue = now.Add(relistEvery)
		l.wantList()
	}
	if !l.wakeBy.IsZero() && !l.wakeBy.After(now) {
		l.wakeBy = time.Time{}
		l.end(errors.New("no answer after the machine woke up"))
	}
}

// beat does the periodic work, every 2 s.
func (r *runner) beat(now time.Time) {
	slept := now.Round(0).Sub(r.lastBeat.Round(0)) > sleptAfter
	r.lastBeat = now
	if slept {
		r.woke(now)
	}
	for _, d := range r.doors {
		if len(d.missing) > 0 {
			r.openMissing(d)
		}
	}
	var carried int64
	for _, f := range r.state.forwards {
		carried += f.meter.connections.Load() + f.meter.open.Load() + f.meter.in.Load() + f.meter.out.Load()
	}
	r.changed = r.changed || carried != r.carried
	r.carried = carried
	if err := r.keepFiles(); err != nil {
		r.failed = err
	}
}

// woke handles a sleep of the machine, seen as a jump of the wall clock. The
// connection may have died long ago without notice.
func (r *runner) woke(now time.Time) {
	r.log.Debug("the machine slept; checking the connection")
	switch {
	case r.link == nil:
		r.retryAt = now
	case r.shown.Connection.State == connected:
		r.link.wakeBy = now.Add(wakeDeadline + r.link.rtt)
		r.link.wantList()
		r.state.lookAgain(now, "")
	}
}

func (r *runner) fileTrouble(err error) {
	if err != nil {
		r.log.Warn(fmt.Sprintf("the state file cannot be written: %v; rdhpf status uses the socket meanwhile", err))
	} else {
		r.log.Info("the state file can be written again")
	}
	r.fileErr, r.changed = err, true
}

// waiter is a client of the socket that waits for the loop.
type waiter struct {
	method string
	result any       // of a method that only changes something
	since  time.Time // it wants observations newer than this; zero if it waits for none
	until  time.Time // when it stops waiting
	listed bool      // a list requested after since has arrived
	grace  time.Time // until then a settle waits for what has just started to listen; zero before listed
	answer chan<- reply
}

type reply struct {
	result any
	err    error
}

// ask has the loop serve a client's request. The socket's goroutines call it.
func (r *runner) ask(ctx context.Context, method string) (any, error) {
	answer := make(chan reply, 1)
	r.post(ctx, func(now time.Time) { r.request(now, method, answer) })
	select {
	case a := <-answer:
		return a.result, a.err
	case <-ctx.Done():
		return nil, fmt.Errorf("%s is still in progress: %w", method, ctx.Err())
	}
}

// request starts a client's request and arranges for the reply when it is done.
// answer must be buffered.
func (r *runner) request(now time.Time, method string, answer chan<- reply) {
	w := &waiter{method: method, answer: answer}
	switch method {
	case "status":
		answer <- reply{result: r.snapshot().at(now)}
		r.state.lookAgain(now.Add(-staleAfter), "")
		return
	case "health", "verify", "settle":
		if w.since, w.until = now, now.Add(lookTimeout); r.link != nil {
			r.link.wantList()
		}
	case "pause", "resume":
		paused := method == "pause"
		if r.state.paused != paused {
			r.log.Info(map[bool]string{true: "paused: all local ports are closed", false: "resumed"}[paused])
		}
		r.state.pause(now, paused)
		w.result = map[string]bool{"paused": paused}
	case "reload":
		cfg, err := loadConfig(r.dir, r.host.String(), r.flags)
		if err != nil {
			answer <- reply{err: err}
			return
		}
		r.warnBind(cfg)
		r.state.configure(now, cfg)
		r.log.Info("configuration reloaded")
		w.result = map[string]bool{"reloaded": true}
	default:
		answer <- reply{err: fmt.Errorf("unknown method %s", method)}
		return
	}
	r.waiting = append(r.waiting, w)
}

// settle returns once the local ports follow what the engine runs now, or cannot.
func (r *runner) settle(ctx context.Context) { r.ask(ctx, "settle") }

// lookForWaiting requests the probes that clients wait for, once a list shows what
// exists.
func (r *runner) lookForWaiting(now time.Time) {
	for _, w := range r.waiting {
		if !w.listed && r.link != nil && !w.since.IsZero() && !r.link.listedAt.Before(w.since) {
			if w.listed = true; w.method != "settle" {
				r.state.lookAgain(w.since, "")
			} else {
				w.grace = now.Add(settleGrace)
			}
		}
	}
}

// answerWaiting replies to the clients that are done waiting, and returns the
// earliest deadline of the others.
func (r *runner) answerWaiting(now time.Time) (next time.Time) {
	var rest []*waiter
	for _, w := range r.waiting {
		if !r.doneWaiting(w, now) {
			rest = append(rest, w)
			for _, at := range []time.Time{w.until, w.grace} {
				if !at.IsZero() && (next.IsZero() || at.Before(next)) {
					next = at
				}
			}
			continue
		}
		w.answer <- r.replyTo(w, now)
	}
	r.waiting = rest
	return next
}

// doneWaiting reports whether a client has what it waits for, or will not get it.
func (r *runner) doneWaiting(w *waiter, now time.Time) bool {
	switch {
	case w.since.IsZero() || !w.until.After(now) || r.shown.Connection.State != connected:
		return true
	case w.method == "settle":
		return r.state.paused || w.listed && (!w.grace.After(now) || !r.state.starting(now))
	}
	return w.listed && len(r.state.unlooked(w.since)) == 0
}

// replyTo returns the reply to a client that is done waiting.
func (r *runner) replyTo(w *waiter, now time.Time) reply {
	switch w.method {
	case "health":
		var doubts []string
		switch {
		case r.shown.Connection.State != connected:
		case w.listed:
			for _, f := range r.state.unlooked(w.since) {
				doubts = append(doubts, fmt.Sprintf("%s could not be verified: the remote host does not answer", f.local))
			}
		case r.engineErr() == nil: // otherwise the snapshot has a warning
			doubts = []string{"nothing could be verified: the remote engine does not answer"}
		}
		return reply{result: r.snapshot().health(now, doubts...)}
	case "settle":
		return reply{result: map[string]bool{"settled": w.listed || r.state.paused}}
	case "verify":
		if r.shown.Connection.State == connected && (!w.listed || len(r.state.unlooked(w.since)) > 0) {
			return reply{err: errors.New("the remote host does not answer")}
		}
		return reply{result: r.snapshot().at(now)}
	}
	return reply{result: w.result}
}

// warnBind warns of a configuration that exposes ports to the network.
func (r *runner) warnBind(cfg *config) {
	for _, a := range cfg.addrs() {
		if !a.IsLoopback() {
			r.log.Warn(fmt.Sprintf("listening on %s: others on the network can reach the forwarded ports", a))
		}
	}
}

// socket is one that the instance serves.
type socket struct {
	path  string
	serve func(ctx context.Context, l *net.UnixListener)

	listener *net.UnixListener
	made     os.FileInfo // the file, as created
	err      error       // why there is none
}

// answer answers clients on a socket, which may not be the first one.
func (r *runner) answer(ctx context.Context, l *net.UnixListener) {
	(&server{board: r.board, ask: r.ask, stop: r.quit}).serve(ctx, l)
}

// listen creates a socket and serves it until the instance ends or listen is called
// again.
func (r *runner) listen(s *socket) error {
	l, err := listenSocket(s.path)
	if err == nil {
		s.made, err = os.Lstat(s.path)
	}
	if err != nil {
		return fmt.Errorf("creating a socket: %w", err)
	}
	if s.listener != nil {
		s.listener.Close()
	}
	s.listener = l
	r.start(func() { s.serve(r.ctx, l) })
	return nil
}

// remove removes the socket if it is still ours.
func (s *socket) remove() {
	if s.made != nil && !replaced(s.path, s.made) {
		removeSocket(s.path)
	}
}

// keepFiles recreates the lock and the sockets if they are no longer in place. An
// error means that another instance now holds the lock.
func (r *runner) keepFiles() error {
	info, err := r.lock.Stat()
	if err != nil || replaced(r.paths.lock, info) {
		if makeDir(r.paths.dir) != nil {
			return nil // the writer of the state file reports it
		}
		lock, err := lockInstance(r.paths.lock)
		if errors.As(err, new(*heldError)) {
			return fmt.Errorf("%s was removed: %w", r.paths.lock, err)
		} else if err != nil {
			return nil
		}
		r.lock.Close()
		r.lock = lock
		r.log.Warn(fmt.Sprintf("%s was removed or replaced; recreated it", r.paths.lock))
	}
	for _, s := range r.sockets {
		if !replaced(s.path, s.made) {
			continue
		}
		said := s.err
		if s.err = r.listen(s); s.err == nil {
			r.log.Warn(fmt.Sprintf("%s was removed or replaced; recreated it", s.path))
		} else if said == nil {
			r.log.Warn(s.err.Error())
		}
	}
	return nil
}

// board holds the newest snapshot. Posting never waits for readers.
type board struct {
	mu   sync.Mutex
	snap *snapshot
	next chan struct{} // closed at the next post
}

func newBoard(snap *snapshot) *board { return &board{snap: snap, next: make(chan struct{})} }

func (b *board) post(snap *snapshot) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.snap = snap
	close(b.next)
	b.next = make(chan struct{})
}

// look returns the newest snapshot and a channel that is closed when a newer one
// is posted.
func (b *board) look() (*snapshot, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.snap, b.next
}
