package main

// link.go: everything that lives and dies with one ssh master: the master, the
// goroutine that opens and closes ports, the one that lists containers, the one
// that follows events. They tell the loop in run.go what they see.

import (
	"context"
	"errors"
	"sync"
	"time"
)

const (
	lastWords    = 100 * time.Millisecond // for the master's end to be seen
	steadyEngine = 5 * time.Second        // an engine that answered that long failed for the first time
)

// What the link tells the loop.
type (
	linkUp    struct{ m *master }
	linkDown  struct{ err error }
	listTaken struct {
		list   []container
		took   time.Duration
		server string
	}
	eventsFollowed struct{}
	engineEvent    struct{ event }
	engineLost     struct {
		events bool // they are not followed; else there is no list
		err    error
	}
	portsDone struct{ done []outcome }
	probed    struct {
		action
		result probeResult
	}
	ownerFound struct {
		key   key
		owner string
	}
)

// link is the loop's end of a connection: what it hands to the goroutines.
type link struct {
	batches chan []action // what to open and close
	relist  chan struct{} // one place: a list is wanted
	cancel  context.CancelFunc
	first   bool // none worked before: an engine that does not answer ends it
	send    func(any)
	why     error // the loop's reason to end it
}

// end ends the link for a reason of the loop's.
func (l *link) end(why error) {
	l.why = why
	l.cancel()
}

// wantList asks for a list, unless one is asked for already.
func (l *link) wantList() {
	select {
	case l.relist <- struct{}{}:
	default:
	}
}

// run makes the connection and keeps it until something ends it or ctx ends,
// and returns why, when all that it started has ended.
func (l *link) run(ctx context.Context, ssh sshProgram, h host, control string, debug func(string)) error {
	m, err := ssh.startMaster(ctx, h, control, debug)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer m.stop() // first: a master that does not answer holds the others up
	l.send(linkUp{m})
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	start := func(part func() error) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			cancel(part())
		}()
	}
	listed := make(chan struct{})
	start(func() error {
		select {
		case <-m.done:
		case <-ctx.Done():
		}
		return nil
	})
	start(func() error { return m.serve(ctx, l.batches, func(done []outcome) { l.send(portsDone{done}) }) })
	start(func() error { return l.keepListing(ctx, m, h.socket, listed) })
	start(func() error { return l.keepFollowing(ctx, m, h.socket, listed) })
	<-ctx.Done()
	// Where the master ended, others may have noticed first; it knows why.
	select {
	case <-m.done:
		return m.exitError()
	case <-time.After(lastWords):
		return context.Cause(ctx)
	}
}

// keepListing lists once, then at each wish. listed is closed after the first.
func (l *link) keepListing(ctx context.Context, m *master, socket string, listed chan struct{}) error {
	return l.keep(ctx, m, socket, true, func(e *engine, worked func()) error {
		for {
			began := time.Now()
			list, err := e.list()
			if err != nil {
				return err
			}
			l.send(listTaken{list, time.Since(began), e.server})
			worked()
			if listed != nil {
				close(listed)
				listed = nil
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-l.relist:
			}
		}
	})
}

// keepFollowing follows events, once there was a list: a cold start waits for
// nothing but the list.
func (l *link) keepFollowing(ctx context.Context, m *master, socket string, listed <-chan struct{}) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-listed:
	}
	return l.keep(ctx, m, socket, false, func(e *engine, worked func()) error {
		subscribed := func() {
			worked()
			l.send(eventsFollowed{})
		}
		return e.events(subscribed, func(ev event) { l.send(engineEvent{ev}) })
	})
}

// keep has work done on a connection to the engine, and on a new one whenever
// that fails, until ctx ends. A connection that just ended and comes back at
// once is nothing to tell of. On a first link it has to work, where it must; and
// no server that refuses the session will change its mind.
func (l *link) keep(ctx context.Context, m *master, socket string, must bool, work func(e *engine, worked func()) error) error {
	worked, told := false, false
	for failures := 0; ; {
		var since time.Time // when it began to work
		e, err := dialEngine(m.control, socket, listTimeout)
		if err == nil {
			stop := context.AfterFunc(ctx, func() { e.Close() })
			err = work(e, func() {
				if worked, told = true, false; since.IsZero() {
					since = time.Now()
				}
			})
			stop()
			e.Close()
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		var refused *muxError
		if l.first && !worked && (must || errors.As(err, &refused)) {
			return err
		}
		if !since.IsZero() && time.Since(since) > steadyEngine {
			failures = 0
		}
		if failures++; failures > 1 && !told && !errors.Is(err, errMaster) {
			told = true
			l.send(engineLost{!must, err})
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(backoff(failures)):
		}
	}
}
