package main

// run.go: `rdhpf run`. One loop owns what is wanted and what is known; it starts
// every goroutine, takes what they tell, and waits for all of them at the end.

import (
	"cmp"
	"context"
	"log/slog"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"time"
)

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
