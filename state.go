package main

// state.go: the core. It holds what is wanted and what is known of each
// forward, takes what happened, and says what to do next. No I/O, no clock of
// its own, no lock: the loop in run.go is its only caller.

import (
	"fmt"
	"log/slog"
	"slices"
	"time"
)

// The three statuses of a forward. There is no fourth.
const (
	active   = "active"
	conflict = "conflict"
	pending  = "pending"
)

const (
	bindAttempts = 5
	bindDelay    = 100 * time.Millisecond // after the first failure, then doubling
	slowLook     = 2 * time.Second        // between looks at a conflict, and the most between probes
	holderEvery  = 15                     // looks at a conflict between looks at who holds the port
	diedFor      = 30 * time.Second       // how long a dead container's id is remembered at most
)

const (
	reasonProbing = "probing"
	reasonSilent  = "port not responding"
	reasonLost    = "ssh connection lost, reconnecting"
	reasonPaused  = "paused"
	reasonFrozen  = "container paused"
	reasonRefused = "refused by the SSH server: administratively prohibited"
	reasonGivenUp = "port already in use after 5 retry attempts"
)

// verb is something to be done to a forward outside of the core.
type verb uint8

const (
	nothing   verb = iota
	openPort       // bind, then ask the master to listen
	closePort      // ask the master to stop listening
	probePort      // connect and see whether something answers
	findOwner      // find who holds the local port
)

type action struct {
	verb verb
	key  key
	seq  int // of a probe: results of older ones are ignored
}

// forward is what is known of one forward.
type forward struct {
	want
	status, reason   string
	created, updated time.Time
	wanted           bool      // else it is closed, then forgotten
	open             bool      // the master listens, as far as is known
	busy             verb      // openPort or closePort under way
	probing          bool      // a probe is under way
	seq              int       // number of the last probe
	tries            int       // failures in a row
	due              time.Time // when to try again
	said             bool      // a person was told that it is open
	moaned           bool      // a person was told of the conflict
	ask              bool      // who holds the local port is to be found out
}

// note is a line for a person, with what a machine wants of it.
type note struct {
	level slog.Level
	text  string
	attrs []slog.Attr
}

// state is owned by one goroutine.
type state struct {
	cfg      *config
	probeMax int // probes at once

	forwards map[key]*forward
	skipped  []skippedPort
	list     []container
	died     map[string]time.Time
	ready    bool // connected, and a list has come since
	paused   bool
	probes   int
	seq      int  // of the last probe of any forward
	changed  bool // something that a snapshot shows has changed
	notes    []note
}

func newState(cfg *config, probeMax int) *state {
	return &state{cfg: cfg, probeMax: probeMax, forwards: make(map[key]*forward),
		skipped: []skippedPort{}, died: make(map[string]time.Time)}
}

func (s *state) note(level slog.Level, f *forward, text string) {
	s.notes = append(s.notes, note{level, text, []slog.Attr{
		slog.String("local", f.local.String()), slog.String("remote", f.remote.String()),
		slog.String("container_id", f.id), slog.String("container_name", f.name),
		slog.String("status", f.status), slog.String("reason", f.reason)}})
}

func (s *state) set(f *forward, now time.Time, status, reason string) {
	if f.status != status || f.reason != reason {
		f.status, f.reason, f.updated = status, reason, now
		s.changed = true
	}
}

// listed takes a complete list of the running containers.
func (s *state) listed(now time.Time, list []container) {
	shown := make(map[string]bool, len(list))
	live := make([]container, 0, len(list))
	for _, c := range list {
		shown[c.id] = true
		if _, dead := s.died[c.id]; !dead {
			live = append(live, c)
		}
	}
	for id, at := range s.died {
		if !shown[id] || now.Sub(at) > diedFor {
			delete(s.died, id)
		}
	}
	s.list, s.ready = live, true
	s.reconcile(now)
}

// diedNow takes the death of a container. An engine lists the dead for some
// 100 ms more, so lists that show it are not believed until startedNow.
func (s *state) diedNow(now time.Time, id string) {
	s.died[id] = now
	s.list = slices.DeleteFunc(slices.Clone(s.list), func(c container) bool { return c.id == id })
	s.reconcile(now)
}

func (s *state) startedNow(id string) { delete(s.died, id) }

// configure takes a new configuration; what it does not concern stays open.
func (s *state) configure(now time.Time, cfg *config) {
	s.cfg = cfg
	s.reconcile(now)
}

// pause closes all local ports, or has them opened again at once.
func (s *state) pause(now time.Time, paused bool) {
	if s.paused == paused {
		return
	}
	s.paused, s.changed = paused, true
	for _, f := range s.forwards {
		f.tries, f.due = 0, time.Time{}
		if !paused {
			s.set(f, now, pending, reasonProbing)
		}
	}
}

func (s *state) reconcile(now time.Time) {
	wants, skipped := desired(s.list, s.cfg)
	if !slices.Equal(skipped, s.skipped) {
		s.skipped, s.changed = skipped, true
	}
	for k, w := range wants {
		f := s.forwards[k]
		if f == nil {
			f = &forward{}
			s.forwards[k] = f
		}
		if !f.wanted || f.id != w.id {
			// New, back, or taken over by another container: what was known
			// of the service behind the port is void.
			f.want, f.wanted, f.created = w, true, now
			f.tries, f.due, f.probing, f.said, f.moaned = 0, time.Time{}, false, false, false
			s.renew(f)
			f.status = ""
			s.set(f, now, pending, reasonProbing)
			if f.open {
				s.opened(f)
			}
		}
		if f.want != w {
			if f.paused != w.paused {
				s.renew(f)
				f.probing, f.tries, f.due = false, 0, time.Time{}
				if f.status == active || f.reason == reasonFrozen {
					s.set(f, now, pending, reasonProbing)
				}
			}
			f.want, s.changed = w, true
		}
	}
	for k, f := range s.forwards {
		if _, ok := wants[k]; !ok && f.wanted {
			f.wanted = false
			if f.said {
				s.note(slog.LevelInfo, f, fmt.Sprintf("%s closed: %s is gone", f.local, f.who()))
			}
		}
	}
}

// renew has results of probes under way ignored. Numbers are never used twice,
// for a key may be forwarded again before the last probe of its past ends.
func (s *state) renew(f *forward) {
	s.seq++
	f.seq = s.seq
}

// opened tells a person of a port that is open, once.
func (s *state) opened(f *forward) {
	if !f.said {
		s.note(slog.LevelInfo, f, fmt.Sprintf("%s → %s", f.local, f.who()))
	} else if f.moaned {
		s.note(slog.LevelInfo, f, fmt.Sprintf("%s → %s, free again", f.local, f.who()))
	}
	f.said, f.moaned = true, false
}

// disconnected takes the loss of the connection: no forward is open any more,
// and no list is believed until the next one.
func (s *state) disconnected() {
	s.ready = false
	for k, f := range s.forwards {
		f.open, f.busy, f.probing, f.tries, f.due = false, nothing, false, 0, time.Time{}
		s.renew(f)
		if !f.wanted {
			delete(s.forwards, k)
			s.changed = true
		}
	}
	s.probes = 0
	clear(s.died)
}
