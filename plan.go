package main

// plan.go: what to do next, from what is wanted and what is known. Pure, a part
// of the core in state.go.

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// plan says what to do now, closing before opening, and when to ask again at
// the latest (the zero time: nothing waits).
func (s *state) plan(now time.Time) (acts []action, wake time.Time) {
	all := s.sorted()
	holds := make(map[netip.AddrPort]*forward, len(all))
	for _, f := range all {
		if f.open || f.busy != nothing {
			holds[f.local] = f
		}
	}
	for _, f := range all {
		if f.wanted && holds[f.local] == nil {
			holds[f.local] = f
		}
	}
	var opens []action
	later := func(f *forward) bool {
		if f.due.After(now) {
			if wake.IsZero() || f.due.Before(wake) {
				wake = f.due
			}
			return true
		}
		return false
	}
	for _, f := range all {
		switch {
		case f.busy != nothing:
		case f.open && (!f.wanted || s.paused):
			f.busy = closePort
			if f.wanted {
				s.set(f, now, pending, reasonPaused)
			}
			f.probing, f.tries, f.due = false, 0, time.Time{}
			s.renew(f)
			acts = append(acts, action{verb: closePort, key: f.key})
		case !f.wanted:
			delete(s.forwards, f.key)
			s.changed = true
		case s.paused:
			s.set(f, now, pending, reasonPaused)
		case !s.ready:
			s.set(f, now, pending, reasonLost)
		case holds[f.local] != f:
			s.yield(f, holds[f.local], now)
		case !f.open:
			if !later(f) {
				f.busy = openPort
				opens = append(opens, action{verb: openPort, key: f.key})
			}
			if f.ask {
				f.ask = false
				acts = append(acts, action{verb: findOwner, key: f.key})
			}
		case f.want.paused:
			s.set(f, now, pending, reasonFrozen)
		case f.status == active || f.probing || s.probes >= s.probeMax:
		case !later(f):
			f.probing = true
			s.renew(f)
			s.probes++
			acts = append(acts, action{verb: probePort, key: f.key, seq: f.seq})
		}
	}
	return append(acts, opens...), wake
}

// yield marks f as the loser of a local port that another forward has.
func (s *state) yield(f, winner *forward, now time.Time) {
	if !winner.wanted {
		return // it is closing, and f is next
	}
	s.set(f, now, conflict, fmt.Sprintf("%s is taken by %s, which publishes %s", f.local, winner.who(), winner.remote))
	f.tries, f.due = 0, time.Time{}
	s.moan(f)
}

// settled says whether nothing is being opened or closed.
func (s *state) settled() bool {
	for _, f := range s.forwards {
		if f.busy != nothing {
			return false
		}
	}
	return true
}

// sorted returns the forwards in a stable order: the first attempted first.
func (s *state) sorted() []*forward {
	all := make([]*forward, 0, len(s.forwards))
	for _, f := range s.forwards {
		all = append(all, f)
	}
	slices.SortFunc(all, func(a, b *forward) int {
		return cmp.Or(a.created.Compare(b.created), a.local.Compare(b.local), a.remote.Compare(b.remote))
	})
	return all
}
