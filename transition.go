package main

// transition.go: how a forward's status follows from what was done to it. Pure,
// a part of the core in state.go.

import (
	"errors"
	"fmt"
	"log/slog"
	"syscall"
	"time"
)

// openDone takes the outcome of an openPort.
func (s *state) openDone(now time.Time, k key, err error) {
	f := s.forwards[k]
	if f == nil || f.busy != openPort {
		return
	}
	f.busy = nothing
	if err == nil {
		f.open, f.tries, f.due = true, 0, time.Time{}
		s.set(f, now, pending, reasonProbing)
		if f.wanted {
			s.opened(f)
		}
		return
	}
	f.tries++
	f.due = now.Add(backoff(f.tries))
	var errno syscall.Errno
	errors.As(err, &errno)
	switch errno {
	case syscall.EADDRINUSE:
		if f.tries < bindAttempts {
			s.set(f, now, conflict, "bind: "+errno.Error())
		} else {
			f.due = now.Add(slowLook)
			f.ask = (f.tries-bindAttempts)%holderEvery == 0
			if f.tries == bindAttempts {
				s.set(f, now, conflict, reasonGivenUp)
			}
		}
	case syscall.EACCES, syscall.EPERM:
		f.due = now.Add(slowLook)
		reason := "bind: " + errno.Error()
		if f.local.Port() < 1024 {
			reason += fmt.Sprintf(" (ports below 1024 need root: map it with -map %d=%d)", f.remote.Port(), 8000+f.local.Port())
		}
		s.set(f, now, conflict, reason)
		s.moan(f)
	case syscall.EADDRNOTAVAIL:
		f.due = now.Add(slowLook)
		s.set(f, now, conflict, "bind: "+errno.Error())
		s.moan(f)
	default:
		s.set(f, now, pending, err.Error())
		if f.tries == bindAttempts {
			s.moan(f)
		}
	}
}

// moan tells a person why a port is not open, once.
func (s *state) moan(f *forward) {
	if !f.moaned && f.wanted {
		s.note(slog.LevelWarn, f, fmt.Sprintf("%s %s for %s: %s", f.local, f.status, f.who(), f.reason))
		f.moaned = true
	}
}

// backoff is the wait after the n-th failure in a row: 100 ms doubling, 2 s at
// the most.
func backoff(n int) time.Duration {
	return min(bindDelay<<min(n-1, 10), slowLook)
}

// ownerFound takes who holds the port of a conflict: "nginx, pid 4242", or ""
// where nobody can tell.
func (s *state) ownerFound(now time.Time, k key, owner string) {
	f := s.forwards[k]
	if f == nil || f.status != conflict || f.tries < bindAttempts {
		return
	}
	reason := reasonGivenUp
	if owner != "" {
		reason += " (held by " + owner + ")"
	}
	s.set(f, now, conflict, reason)
	s.moan(f)
}

// closeDone takes the end of a closePort. That the master knew no such forward
// is as good as closed.
func (s *state) closeDone(k key) {
	if f := s.forwards[k]; f != nil && f.busy == closePort {
		f.busy, f.open = nothing, false
	}
}

// probeResult is what a probe saw.
type probeResult uint8

const (
	probeAnswered probeResult = iota
	probeSilent               // accepted, then closed at once
	probeRefused              // the same, and the SSH server said that it forbids it
	probeGone                 // nobody listens on the local port
)

// probeDone takes the outcome of a probe.
func (s *state) probeDone(now time.Time, k key, seq int, result probeResult) {
	s.probes = max(0, s.probes-1)
	f := s.forwards[k]
	if f == nil || f.seq != seq || !f.probing {
		return
	}
	f.probing = false
	f.tries++
	f.due = now.Add(backoff(f.tries))
	switch result {
	case probeAnswered:
		f.tries = 0
		s.set(f, now, active, "")
	case probeSilent:
		s.set(f, now, pending, reasonSilent)
	case probeRefused:
		if f.reason != reasonRefused {
			s.set(f, now, pending, reasonRefused)
			s.note(slog.LevelWarn, f, fmt.Sprintf("%s %s for %s: %s (see AllowTcpForwarding and PermitOpen in its sshd_config)",
				f.local, f.status, f.who(), f.reason))
		}
	case probeGone:
		f.open = false
		s.set(f, now, pending, reasonSilent)
	}
}
