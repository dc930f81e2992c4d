package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// link.go: everything that lives and dies with one ssh master: the master, the
// goroutine that opens and closes ports, the one that lists containers, the one
// that follows events. They tell the loop in run.go what they see.

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

// forward.go: what is done to one forward from outside of the core: see whether
// its local port can be bound, have the master open and close it, probe it.

const probeHold = 300 * time.Millisecond // what stays open that long, plus a round trip, has a listener

// raiseFileLimit raises the limit on open files as far as it goes, for ssh needs
// one a port and inherits it, and returns how many probes it allows at once.
func raiseFileLimit() int {
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) != nil {
		return 8
	}
	l.Cur = l.Max
	unix.Setrlimit(unix.RLIMIT_NOFILE, &l)
	return int(min(max(l.Max/16, 2), 64))
}

// bindable tells whether a local address can be bound, as ssh would: nil, or
// the errno. ssh says only that it failed. The socket never listens, so that
// no client can fall into it.
func bindable(a netip.AddrPort) error {
	var domain int
	var sa unix.Sockaddr
	if a.Addr().Is4() {
		domain, sa = unix.AF_INET, &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	} else {
		domain, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
	}
	syscall.ForkLock.RLock()
	fd, err := unix.Socket(domain, unix.SOCK_STREAM, 0)
	if err == nil {
		unix.CloseOnExec(fd)
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	return unix.Bind(fd, sa)
}

// outcome is the result of an openPort or closePort.
type outcome struct {
	action
	err error
}

// carryOut has the master close ports, then open ports. An error means that the
// master is of no use any more.
func (m *master) carryOut(conn *muxConn, acts []action) ([]outcome, error) {
	closed, err := m.carryOutAll(conn, acts, closePort)
	if err != nil {
		return nil, err
	}
	opened, err := m.carryOutAll(conn, acts, openPort)
	return append(closed, opened...), err
}

// carryOutAll does those acts that are of one verb, and tells why each that
// failed did.
func (m *master) carryOutAll(conn *muxConn, acts []action, verb verb) (done []outcome, err error) {
	var sent []action
	var ops []muxForward
	for _, a := range acts {
		if a.verb != verb {
			continue
		}
		if verb == openPort {
			if err := bindable(a.key.local); err != nil {
				done = append(done, outcome{a, err})
				continue
			}
		}
		sent = append(sent, a)
		ops = append(ops, muxForward{
			cancel:     verb == closePort,
			listenHost: a.key.local.Addr().String(), listenPort: a.key.local.Port(),
			connectHost: a.key.remote.Addr().String(), connectPort: a.key.remote.Port(),
		})
	}
	results, err := conn.forward(ops, muxTimeout)
	if err != nil {
		return nil, err
	}
	for i, err := range results {
		if err != nil && verb == openPort {
			// Somebody may have been faster since the first look.
			if busy := bindable(sent[i].key.local); busy != nil {
				err = busy
			} else if word := m.lastWord(); word != "" {
				err = fmt.Errorf("%w: %s", err, word)
			}
		}
		done = append(done, outcome{sent[i], err})
	}
	return done, nil
}

// serve carries out batches until ctx ends, and between them sees that the
// master is alive and still where it was. It returns why it is not.
func (m *master) serve(ctx context.Context, batches <-chan []action, report func([]outcome)) error {
	conn, err := muxDial(m.control, muxTimeout)
	if err != nil {
		return err
	}
	defer func() { conn.Close() }()
	tick := time.NewTimer(untilBeat())
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case batch := <-batches:
			done, err := m.carryOut(conn, batch)
			if err != nil {
				return fmt.Errorf("%w: %w", errMaster, err)
			}
			report(done)
		case <-tick.C:
			tick.Reset(untilBeat())
			if replaced(m.control, m.socket) {
				return fmt.Errorf("somebody removed or replaced %s", m.control)
			}
			asked := time.Now()
			_, err := conn.alive(muxTimeout)
			if err != nil && time.Since(asked) > 2*muxTimeout { // it was us who stood still
				var again *muxConn
				if again, err = muxDial(m.control, muxTimeout); err == nil {
					conn.Close()
					conn = again
					_, err = conn.alive(muxTimeout)
				}
			}
			if err != nil {
				return fmt.Errorf("%w: %w", errMaster, err)
			}
		}
	}
}

// probe finds out whether something answers behind the local end. That the server
// refuses is known from a word on ssh's stderr, which may be about another
// connection: so it is asked a second time, while no other probe is under way.
func (m *master) probe(ctx context.Context, local netip.AddrPort, rtt time.Duration) probeResult {
	m.probes.RLock()
	result := m.probeOnce(ctx, local, rtt)
	m.probes.RUnlock()
	if result == probeRefused {
		m.probes.Lock()
		defer m.probes.Unlock()
		result = m.probeOnce(ctx, local, rtt)
	}
	return result
}

// probeOnce connects to the local end and reads: what closes at once has nobody
// behind it. It sends nothing.
func (m *master) probeOnce(ctx context.Context, local netip.AddrPort, rtt time.Duration) probeResult {
	before := m.prohibited.Load()
	var d net.Dialer
	ctx, cancel := context.WithTimeout(ctx, probeHold+rtt)
	defer cancel()
	conn, err := d.DialContext(ctx, "tcp", local.String())
	if errors.Is(err, syscall.ECONNREFUSED) {
		return probeGone
	} else if err != nil {
		return probeSilent
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	conn.SetReadDeadline(deadline)
	stop := context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var b [1]byte
	n, err := conn.Read(b[:])
	var timeout net.Error
	if n > 0 || errors.As(err, &timeout) && timeout.Timeout() {
		return probeAnswered
	}
	// ssh says why before it closes, but on another way than the connection.
	for until := time.Now().Add(50 * time.Millisecond); time.Now().Before(until); time.Sleep(time.Millisecond) {
		if m.prohibited.Load() != before {
			return probeRefused
		}
	}
	return probeSilent
}
