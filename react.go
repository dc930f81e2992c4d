package main

// react.go: what the loop in run.go makes of what it is told.

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"time"
)

// take takes a message. An error ends the loop.
func (r *runner) take(m message) error {
	if m.gen != r.gen {
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
		r.link.wantList()
		r.listDue = now.Add(settleAfter)
	case engineEvent:
		switch v.action {
		case "die":
			r.state.diedNow(now, v.id)
		case "start":
			r.state.startedNow(v.id)
		}
		r.link.wantList()
	case engineLost:
		r.engineErr = v.err
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
	}
	return nil
}

// listed takes a list. The first of a connection makes it one.
func (r *runner) listed(now time.Time, v listTaken) {
	r.rtt, r.wakeBy, r.listDue = v.took, time.Time{}, now.Add(relistEvery)
	switch {
	case !r.everUp:
		r.log.Info(fmt.Sprintf("connected to %s, %s", r.host, v.server))
	case r.upSince.IsZero():
		r.log.Info(fmt.Sprintf("connected to %s again after %s", r.host, now.Sub(r.downSince).Round(100*time.Millisecond)))
	case r.engineErr != nil:
		r.log.Info("the remote engine answers again")
	}
	if r.upSince.IsZero() {
		r.upSince = now
	}
	r.everUp, r.lastErr, r.engineErr = true, nil, nil
	r.state.listed(now, v.list)
}

// down takes the end of the connection, or of an attempt at one.
func (r *runner) down(now time.Time, err error) error {
	if r.link.why != nil {
		err = r.link.why
	}
	if r.link.first {
		return err
	}
	if !r.upSince.IsZero() {
		if now.Sub(r.upSince) >= steadyAfter {
			r.failures = 0
		}
		r.downSince = now
	}
	// 0, 1, 2, 2, … s: a heal is noticed within seconds, however long it took.
	delay := min(time.Duration(r.failures), 2) * time.Second
	delay -= time.Duration(rand.Int64N(int64(delay)/4 + 1))
	r.failures++
	var e *connectError
	if errors.As(err, &e) && e.stubborn {
		delay = stubbornDelay
	}
	r.link, r.master, r.queue, r.upSince, r.wakeBy = nil, nil, nil, time.Time{}, time.Time{}
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
	case !r.upSince.IsZero():
		r.wakeBy = now.Add(wakeDeadline + r.rtt)
		r.link.wantList()
	}
}
