package main

// react.go: what the loop in run.go makes of what it is told.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"
)

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
