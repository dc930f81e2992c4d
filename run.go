package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"time"
)

// run.go: `rdhpf run`. One loop owns what is wanted and what is known; it starts
// every goroutine, takes what they tell, and waits for all of them at the end.

const (
	relistEvery   = 30 * time.Second
	beatEvery     = 2 * time.Second
	sleptAfter    = 10 * time.Second     // more than this between beats: the machine slept
	wakeDeadline  = 3 * time.Second      // for the engine to answer after that
	settleAfter   = time.Second          // to list once more: an engine may tell of a change before it lists it
	stubbornDelay = time.Minute          // where only a person can mend it
	steadyAfter   = 30 * time.Second     // up that long, failures are forgotten
	probePace     = 2 * time.Millisecond // between probes: many at once would hold up users
)

// runOptions is what the command line asks for.
type runOptions struct {
	host  host
	dir   string
	flags config
	retry bool // go on where the first connection fails
	log   *slog.Logger
}

// run is the one instance for its host until ctx ends.
func run(ctx context.Context, o runOptions) error {
	p := pathsFor(o.dir, o.host.String())
	if err := p.check(); err != nil {
		return err
	}
	runtime.GOMAXPROCS(1)  // there is little to do, and each further one costs memory
	debug.SetGCPercent(50) // nor is there much garbage
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
	cfg, err := loadConfig(o.dir, o.host.String(), o.flags)
	if err != nil {
		lock.Close()
		return err
	}
	r := newRunner(o, p, ssh, lock, cfg)
	defer func() { r.lock.Close() }()
	r.warnBind(cfg)
	ctx, r.quit = context.WithCancel(ctx)
	defer r.wg.Wait()
	defer r.quit()
	if err := r.listen(ctx); err != nil {
		return err
	}
	defer r.unlisten()
	r.start(func() { keepState(ctx, p.state, r.board, func(err error) { r.send(ctx, anyGen, fileTrouble{err}) }) })
	return r.loop(ctx)
}

var begun = time.Now()

// untilBeat is the time to the next of the moments at which all is done that is
// done every 2 s: each waking up of a process that is idle costs.
func untilBeat() time.Duration { return beatEvery - time.Since(begun)%beatEvery }

// runner is the loop's. Nothing in it is touched by another goroutine but what
// is said so.
type runner struct {
	runOptions
	paths  paths
	ssh    sshProgram
	quit   context.CancelFunc // anybody may end it
	board  *board             // anybody may look
	owners owners             // anybody may ask
	state  *state
	msgs   chan message // to the loop, from everybody
	wg     sync.WaitGroup

	link     *link // nil while there is no connection, not even an attempt
	gen      int   // of link
	master   *master
	queue    []action      // for the link to open and close
	rtt      time.Duration // of a list, about; 0 before the first on this link
	pace     time.Time     // when the last probe begins
	everUp   bool
	proven   bool // events were followed, too: the server allows two sessions
	failures int
	retryAt  time.Time
	lastErr  error     // why there is no connection
	listDue  time.Time // when to list again without a cause
	wakeBy   time.Time // the engine has to answer by then; zero: no hurry
	lastTick time.Time

	lock      *os.File
	listener  *net.UnixListener
	socket    os.FileInfo // as it was made
	socketErr error       // why there is none

	shown     snapshot // what is the same in all snapshots, and the connection's part
	listErr   error    // why the engine lists nothing, though there is a connection
	eventsErr error    // why events are not followed, though there is a connection
	fileErr   error    // why the state file cannot be written
	changed   bool     // something of these has changed
	waiting   []func() // for all that is under way to be done
}

// message carries what a goroutine of the gen-th link tells.
type message struct {
	gen  int
	what any
}

// anyGen marks a message that has nothing to do with a link.
const anyGen = -1

func newRunner(o runOptions, p paths, ssh sshProgram, lock *os.File, cfg *config) *runner {
	now := utc(time.Now())
	r := &runner{runOptions: o, paths: p, ssh: ssh, lock: lock, state: newState(cfg, raiseFileLimit()), msgs: make(chan message, 64)}
	r.shown = snapshot{Version: stateVersion, Host: o.host.String(), PID: os.Getpid(), StartedAt: now,
		Connection: connection{State: connecting, Since: now}}
	r.board = newBoard(r.snapshot())
	return r
}

func (r *runner) snapshot() *snapshot {
	snap := r.shown
	snap.Warnings = []string{}
	if err := cmp.Or(r.listErr, r.eventsErr); err != nil {
		snap.Warnings = append(snap.Warnings, "the remote engine does not answer: "+err.Error())
	}
	if r.fileErr != nil {
		snap.Warnings = append(snap.Warnings, "the state file cannot be written: "+r.fileErr.Error())
	}
	r.state.show(&snap)
	return &snap
}

// loop runs until ctx ends, with nil, or until the first connection fails. What
// it started ends with ctx; run waits for it.
func (r *runner) loop(ctx context.Context) error {
	tick := time.NewTimer(untilBeat())
	defer tick.Stop()
	r.lastTick = time.Now()
	alarm := time.NewTimer(0)
	for {
		now := time.Now()
		if r.link == nil && !r.retryAt.After(now) {
			if err := r.keepFiles(ctx); err != nil { // who lost the lock must not touch the control socket
				return err
			}
			r.connect(ctx)
		}
		acts, wake := r.state.plan(now)
		for _, a := range acts {
			r.do(ctx, a)
		}
		r.tell()
		if r.changed || r.state.changed {
			r.changed, r.state.changed = false, false
			r.board.post(r.snapshot())
		}
		if len(r.waiting) > 0 && r.state.settled() {
			for _, reply := range r.waiting {
				reply()
			}
			r.waiting = nil
		}
		for _, due := range []time.Time{r.retryAt, r.listDue, r.wakeBy} {
			if due.After(now) && (wake.IsZero() || due.Before(wake)) {
				wake = due
			}
		}
		if wake.IsZero() {
			alarm.Stop()
		} else {
			alarm.Reset(time.Until(wake))
		}
		var batches chan []action
		if r.link != nil && len(r.queue) > 0 {
			batches = r.link.batches
		}
		select {
		case <-ctx.Done():
			return nil
		case m := <-r.msgs:
			if err := r.take(m); err != nil {
				return err
			}
			for range len(r.msgs) { // only those: a flood must not keep us here
				if err := r.take(<-r.msgs); err != nil {
					return err
				}
			}
		case batches <- r.queue:
			r.queue = nil
		case <-alarm.C:
			r.ring(time.Now())
		case <-tick.C:
			tick.Reset(untilBeat())
			if err := r.keepFiles(ctx); err != nil {
				return err
			}
			r.tick(time.Now())
		}
	}
}

// connect starts an attempt at a connection.
func (r *runner) connect(ctx context.Context) {
	r.gen++
	gen := r.gen
	linkCtx, cancel := context.WithCancel(ctx)
	l := &link{
		batches: make(chan []action), relist: make(chan struct{}, 1), cancel: cancel,
		first: !r.proven && !r.retry,
		send:  func(what any) { r.send(linkCtx, gen, what) },
	}
	r.link, r.queue, r.master, r.rtt, r.retryAt = l, nil, nil, 0, time.Time{}
	r.start(func() {
		err := l.run(linkCtx, r.ssh, r.host, r.paths.control, func(line string) { r.log.Debug("ssh: " + line) })
		cancel()
		r.send(ctx, gen, linkDown{err})
	})
}

func (r *runner) start(f func()) {
	r.wg.Add(1)
	go func() {
		defer r.wg.Done()
		f()
	}()
}

// send hands the loop a message, from any goroutine, unless ctx ends first.
func (r *runner) send(ctx context.Context, gen int, what any) {
	select {
	case r.msgs <- message{gen, what}:
	case <-ctx.Done():
	}
}

// do carries out what the core asks for, elsewhere.
func (r *runner) do(ctx context.Context, a action) {
	gen, m, rtt := r.gen, r.master, r.rtt
	switch a.verb {
	case openPort, closePort:
		r.queue = append(r.queue, a)
	case probePort:
		now := time.Now()
		if r.pace = r.pace.Add(probePace); r.pace.Before(now) {
			r.pace = now
		}
		wait := r.pace.Sub(now)
		r.start(func() {
			select {
			case <-ctx.Done():
				return
			case <-time.After(wait):
			}
			r.send(ctx, gen, probed{a, m.probe(ctx, a.key.local, rtt)})
		})
	case findOwner:
		r.start(func() { r.send(ctx, gen, ownerFound{a.key, r.owners.of(ctx, a.key.local)}) })
	}
}

// tell prints what the core has to say.
func (r *runner) tell() {
	for _, n := range r.state.notes {
		r.log.LogAttrs(context.Background(), n.level, n.text, n.attrs...)
	}
	r.state.notes = nil
}

// react.go: what the loop in run.go makes of what it is told.

// take takes a message. An error ends the loop.
func (r *runner) take(m message) error {
	if m.gen != r.gen && m.gen != anyGen {
		return nil // of a connection that is no more
	}
	now := time.Now()
	switch v := m.what.(type) {
	case linkUp:
		r.master = v.m
	case linkDown:
		return r.down(now, v.err)
	case listTaken:
		r.listed(now, v)
	case eventsFollowed:
		clear(r.state.died) // a start may have been missed
		r.proven = true
		r.engineBack(&r.eventsErr)
		r.link.wantList()
		r.listDue = now.Add(settleAfter)
	case engineEvent:
		switch v.action {
		case "die":
			r.state.diedNow(now, v.id)
		case "start":
			r.state.startedNow(v.id)
		}
		at := utc(now)
		r.shown.LastEventAt, r.changed = &at, true
		r.link.wantList()
		r.listDue = now.Add(settleAfter)
	case engineLost:
		known := cmp.Or(r.listErr, r.eventsErr) != nil
		if r.changed = true; v.events {
			r.eventsErr = v.err
		} else {
			r.listErr = v.err
		}
		if known {
			break
		}
		if c := &r.shown.Connection; c.State != connected {
			c.LastError = v.err.Error()
		}
		r.log.Warn(fmt.Sprintf("the remote engine does not answer: %v; forwards stay as they are", v.err))
	case portsDone:
		for _, o := range v.done {
			if o.verb == openPort {
				r.state.openDone(now, o.key, o.err)
			} else {
				r.state.closeDone(o.key)
			}
		}
	case probed:
		r.state.probeDone(now, v.key, v.seq, v.result)
	case ownerFound:
		r.state.ownerFound(now, v.key, v.owner)
	case fileTrouble:
		if v.err != nil {
			r.log.Warn(fmt.Sprintf("the state file cannot be written: %v; rdhpf status asks the socket meanwhile", v.err))
		} else {
			r.log.Info("the state file is written again")
		}
		r.fileErr, r.changed = v.err, true
	case request:
		r.request(now, v)
	}
	return nil
}

// request does what a client of the socket asks for, and has it answered when
// that is done.
func (r *runner) request(now time.Time, q request) {
	var result any
	switch q.method {
	case "pause", "resume":
		paused := q.method == "pause"
		if r.state.paused != paused {
			r.log.Info(map[bool]string{true: "paused: all local ports are closed", false: "resumed"}[paused])
		}
		r.state.pause(now, paused)
		result = map[string]bool{"paused": paused}
	case "reload":
		cfg, err := loadConfig(r.dir, r.host.String(), r.flags)
		if err != nil {
			q.reply <- reply{err: err}
			return
		}
		r.warnBind(cfg)
		r.state.configure(now, cfg)
		r.log.Info("configuration read again")
		result = map[string]bool{"reloaded": true}
	}
	r.waiting = append(r.waiting, func() { q.reply <- reply{result: result} })
}

// warnBind warns of a configuration that lets others in.
func (r *runner) warnBind(cfg *config) {
	if !cfg.bind.IsLoopback() {
		r.log.Warn(fmt.Sprintf("listening on %s: others on the network can reach the forwarded ports", cfg.bind))
	}
}

// ask has the loop do what a client asks for. It is for the socket's goroutines.
func (r *runner) ask(ctx context.Context, method string) (any, error) {
	q := request{method, make(chan reply, 1)}
	r.send(ctx, anyGen, q)
	select {
	case a := <-q.reply:
		return a.result, a.err
	case <-ctx.Done():
		return nil, fmt.Errorf("%s is not done yet: %w", method, ctx.Err())
	}
}

// What others than the link tell the loop.
type (
	fileTrouble struct{ err error } // nil: it is over
	request     struct {
		method string
		reply  chan reply // with room for one
	}
	reply struct {
		result any
		err    error
	}
)

// listed takes a list. The first of a connection makes it one.
func (r *runner) listed(now time.Time, v listTaken) {
	// One list that was held up, by a cut link say, must not hold up all probes.
	if r.wakeBy = (time.Time{}); r.rtt == 0 {
		r.rtt = v.took
	} else {
		r.rtt = min(v.took, 2*r.rtt)
	}
	if !r.listDue.After(now) {
		r.listDue = now.Add(relistEvery)
	}
	switch {
	case !r.everUp:
		r.log.Info(fmt.Sprintf("connected to %s, %s", r.host, v.server))
	case r.shown.Connection.State != connected:
		r.shown.Connection.Reconnects++
		r.log.Info(fmt.Sprintf("connected to %s again after %s", r.host, now.Sub(r.shown.Connection.Since).Round(100*time.Millisecond)))
	}
	r.engineBack(&r.listErr)
	if r.connection(now, connected) || r.shown.Engine != v.server {
		r.shown.Engine, r.changed = v.server, true
	}
	r.everUp, r.lastErr = true, nil
	r.state.listed(now, v.list)
}

// engineBack takes it that the engine does again what it failed to do.
func (r *runner) engineBack(failed *error) {
	if *failed == nil {
		return
	}
	*failed, r.changed = nil, true
	if cmp.Or(r.listErr, r.eventsErr) == nil {
		r.log.Info("the remote engine answers again")
	}
}

// connection notes the state of the connection, and says whether it is new.
func (r *runner) connection(now time.Time, state string) bool {
	c := &r.shown.Connection
	if c.State == state {
		return false
	}
	c.State, c.Since, r.changed = state, utc(now), true
	return true
}

// down takes the end of the connection, or of an attempt at one.
func (r *runner) down(now time.Time, err error) error {
	if r.link.why != nil {
		err = r.link.why
	}
	var refused *muxError
	if !r.retry && (!r.everUp || !r.proven && errors.As(err, &refused)) {
		return err
	}
	c := &r.shown.Connection
	if c.State == connected && now.Sub(c.Since) >= steadyAfter {
		r.failures = 0
	}
	// 0, 1, 2, 2, … s: a heal is noticed within seconds, however long it took.
	delay := min(time.Duration(r.failures), 2) * time.Second
	delay -= time.Duration(rand.Int64N(int64(delay)/4 + 1))
	r.failures++
	var e *connectError
	if errors.As(err, &e) && e.stubborn {
		delay = stubbornDelay
	}
	r.link, r.master, r.queue, r.wakeBy, r.listErr, r.eventsErr = nil, nil, nil, time.Time{}, nil, nil
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
		r.log.Warn(fmt.Sprintf("connection lost: %v; trying again %s", err, when))
	}
	r.lastErr = err
	r.state.disconnected()
	return nil
}

// ring does what was due by now.
func (r *runner) ring(now time.Time) {
	if r.link == nil {
		return
	}
	if !r.listDue.After(now) {
		r.listDue = now.Add(relistEvery)
		r.link.wantList()
	}
	if !r.wakeBy.IsZero() && !r.wakeBy.After(now) {
		r.wakeBy = time.Time{}
		r.link.end(errors.New("no answer since the machine woke up"))
	}
}

// tick sees whether the machine slept: the wall clock ran on meanwhile, and the
// connection may be long dead without a word.
func (r *runner) tick(now time.Time) {
	slept := now.Round(0).Sub(r.lastTick.Round(0)) > sleptAfter
	r.lastTick = now
	if !slept {
		return
	}
	r.log.Debug("the machine slept: looking at the connection")
	switch {
	case r.link == nil:
		r.retryAt = now
	case r.shown.Connection.State == connected:
		r.wakeBy = now.Add(wakeDeadline + r.rtt)
		r.link.wantList()
	}
}

// board.go: where the loop posts snapshots, and everybody else looks.

// board holds the newest snapshot. Posting never waits for those who look.
type board struct {
	mu   sync.Mutex
	snap *snapshot
	next chan struct{} // closed at the next post
	body []byte        // of snap as JSON, once somebody asked for it
}

func newBoard(snap *snapshot) *board { return &board{snap: snap, next: make(chan struct{})} }

func (b *board) post(snap *snapshot) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.snap, b.body = snap, nil
	close(b.next)
	b.next = make(chan struct{})
}

// look returns the newest snapshot and a channel that is closed when there is a
// newer one.
func (b *board) look() (*snapshot, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.snap, b.next
}

// lookJSON is look for those who send the snapshot on. It is encoded once.
func (b *board) lookJSON(now time.Time) (json.RawMessage, <-chan struct{}) {
	b.mu.Lock()
	snap, body, next := b.snap, b.body, b.next
	b.mu.Unlock()
	if body == nil {
		body = mustJSON(snap) // outside of the lock, for it can take milliseconds
		b.mu.Lock()
		if b.snap == snap {
			b.body = body
		}
		b.mu.Unlock()
	}
	return redate(body, now), next
}

// files.go: the lock and the socket of a running instance, which it makes again
// where somebody removes or replaces them.

// listen makes the socket and serves on it until ctx ends, or until it listens
// anew.
func (r *runner) listen(ctx context.Context) error {
	l, err := listenSocket(r.paths.socket)
	if err == nil {
		r.socket, err = os.Lstat(r.paths.socket)
	}
	if err != nil {
		return fmt.Errorf("making the socket for rdhpf status: %w", err)
	}
	if r.listener != nil {
		r.listener.Close()
	}
	r.listener = l
	r.start(func() { (&server{board: r.board, ask: r.ask, stop: r.quit}).serve(ctx, l) })
	return nil
}

// unlisten removes the socket, where it is still ours.
func (r *runner) unlisten() {
	if !replaced(r.paths.socket, r.socket) {
		removeSocket(r.paths.socket)
	}
}

// keepFiles sees that the lock and the socket are where others look for them. An
// error says that another instance has the lock by now.
func (r *runner) keepFiles(ctx context.Context) error {
	info, err := r.lock.Stat()
	if err != nil || replaced(r.paths.lock, info) {
		if makeDir(r.paths.dir) != nil {
			return nil // who writes the state file tells of that
		}
		lock, err := lockInstance(r.paths.lock)
		if errors.As(err, new(*heldError)) {
			return fmt.Errorf("somebody removed %s meanwhile: %w", r.paths.lock, err)
		} else if err != nil {
			return nil
		}
		r.lock.Close()
		r.lock = lock
		r.log.Warn(fmt.Sprintf("somebody removed or replaced %s: made again", r.paths.lock))
	}
	if !replaced(r.paths.socket, r.socket) {
		return nil
	}
	said := r.socketErr
	if r.socketErr = r.listen(ctx); r.socketErr == nil {
		r.log.Warn(fmt.Sprintf("somebody removed or replaced %s: made again", r.paths.socket))
	} else if said == nil {
		r.log.Warn(r.socketErr.Error())
	}
	return nil
}
