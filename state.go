package main

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sort"
	"strconv"
	"syscall"
	"time"
)

// state.go: the core. It holds what is wanted and what is known of each
// forward, takes what happened, and says what to do next. No I/O, no clock of
// its own, no lock: the loop in run.go is its only caller.

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

// desired.go: from the engine's list of containers to the forwards that should
// exist, and to what is not forwarded and why. Pure.

// container is what rdhpf keeps of a running container: decoded, validated and
// safe to print.
type container struct {
	id      string // 12 characters
	name    string
	image   string
	service string // of docker compose, "" without it
	paused  bool
	hostNet bool
	ports   []port
}

// port is one row of the list's Ports, of those that are published.
type port struct {
	ip      netip.Addr // as published; the zero Addr where what the engine sent is none
	private uint16
	public  uint16
	proto   string
}

// key is what makes a forward: where it listens here and where it leads there.
type key struct {
	local, remote netip.AddrPort
}

// want is one forward that should exist, and the container it belongs to.
type want struct {
	key
	id, name, image, service string
	private                  uint16
	paused                   bool
}

// who names the container for a person.
func (w want) who() string { return fmt.Sprintf("%s (%s)", w.name, w.id) }

// skippedPort is a published port that is not forwarded. Port is 0 where the
// reason concerns the whole container.
type skippedPort struct {
	ContainerID string `json:"container_id"`
	Name        string `json:"container_name"`
	Port        uint16 `json:"port"`
	Protocol    string `json:"protocol"`
	Reason      string `json:"reason"`
}

var (
	loopback4 = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	loopback6 = netip.IPv6Loopback()
)

// desired returns the forwards that the listed containers call for. Where two
// containers claim the same key, the one listed first has it: engines list the
// newest first, and it takes over from one that is about to go.
func desired(list []container, cfg *config) (map[key]want, []skippedPort) {
	wants := make(map[key]want)
	skipped := []skippedPort{}
	for _, c := range list {
		skip := func(p port, reason string) {
			skipped = append(skipped, skippedPort{c.id, c.name, p.public, p.proto, reason})
		}
		if c.hostNet {
			skip(port{proto: "tcp"}, "host network: the container publishes no ports")
		}
		for _, p := range c.ports {
			switch {
			case p.proto != "tcp":
				if !twin(c.ports, p) {
					skip(p, "SSH carries TCP only")
				}
				continue
			case !p.ip.IsValid():
				skip(p, "published on what is no address")
				continue
			case twin(c.ports, p):
				continue
			}
			remote := netip.AddrPortFrom(dialable(p.ip), p.public)
			local, reason := cfg.local(p.public)
			if reason != "" {
				skip(p, reason)
				continue
			}
			k := key{local, remote}
			if _, taken := wants[k]; taken {
				continue
			}
			wants[k] = want{k, c.id, c.name, c.image, c.service, p.private, c.paused}
		}
	}
	sort.SliceStable(skipped, func(i, j int) bool { return skipped[i].Port < skipped[j].Port })
	return wants, skipped
}

// twin reports whether p is the IPv6 half of a wildcard binding whose IPv4
// half is listed too: engines list 0.0.0.0 and :: apart.
func twin(ports []port, p port) bool {
	if p.ip != netip.IPv6Unspecified() {
		return false
	}
	p.ip = netip.IPv4Unspecified()
	for _, q := range ports {
		if q == p {
			return true
		}
	}
	return false
}

// dialable is the address on which the remote host reaches what is published
// on ip.
func dialable(ip netip.Addr) netip.Addr {
	switch ip {
	case netip.IPv4Unspecified():
		return loopback4
	case netip.IPv6Unspecified():
		return loopback6
	}
	return ip
}

// plan.go: what to do next, from what is wanted and what is known. Pure, a part
// of the core in state.go.

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

// transition.go: how a forward's status follows from what was done to it. Pure,
// a part of the core in state.go.

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

// snapshot.go: what is known at one moment, as others are shown it: the JSON of
// the state file, of the socket and of `rdhpf status -json`. The names of its
// fields are an interface: they may be added to, never changed.

const stateVersion = "1.0"

// snapshot is immutable once posted. Times are UTC.
type snapshot struct {
	Version     string        `json:"version"`
	Host        string        `json:"host"`
	PID         int           `json:"pid"`
	StartedAt   time.Time     `json:"started_at"`
	UpdatedAt   time.Time     `json:"updated_at"` // when it was written or sent
	Connection  connection    `json:"connection"`
	Engine      string        `json:"engine"`        // "Docker/20.10.24 (linux)"
	LastEventAt *time.Time    `json:"last_event_at"` // null before the first event
	Paused      bool          `json:"paused"`
	Warnings    []string      `json:"warnings"` // what else is wrong with the instance
	Forwards    []forwardInfo `json:"forwards"`
	Skipped     []skippedPort `json:"skipped"`
}

// connection is that to the remote host.
type connection struct {
	State      string    `json:"state"` // connecting, connected, reconnecting
	Since      time.Time `json:"since"`
	Reconnects int       `json:"reconnects"`
	LastError  string    `json:"last_error"`
}

const (
	connecting   = "connecting"
	connected    = "connected"
	reconnecting = "reconnecting"
)

// forwardInfo is one forward.
type forwardInfo struct {
	ContainerID   string    `json:"container_id"`
	LocalPort     uint16    `json:"local_port"`
	RemotePort    uint16    `json:"remote_port"`
	Status        string    `json:"status"`
	Reason        string    `json:"reason"`
	CreatedAt     time.Time `json:"created_at"` // when it was first attempted
	UpdatedAt     time.Time `json:"updated_at"` // of the last change of status or reason
	LocalAddress  string    `json:"local_address"`
	RemoteAddress string    `json:"remote_address"`
	ContainerName string    `json:"container_name"`
	ContainerPort uint16    `json:"container_port"`
	Image         string    `json:"image"`
	Service       string    `json:"service"`

	VerifiedAt      *time.Time `json:"verified_at"` // when something last answered behind the port, null: never
	Connections     int64      `json:"connections"` // carried so far
	OpenConnections int64      `json:"open_connections"`
	BytesIn         int64      `json:"bytes_in"`     // from the remote host
	BytesOut        int64      `json:"bytes_out"`    // to it
	LastUsedAt      *time.Time `json:"last_used_at"` // when a connection last moved a byte, or came; null: never
}

// utc makes t fit to be written: no monotonic clock, no zone.
func utc(t time.Time) time.Time { return t.Round(0).UTC() }

// show fills in what the core knows.
func (s *state) show(snap *snapshot) {
	snap.Paused, snap.Skipped = s.paused, s.skipped
	snap.Forwards = make([]forwardInfo, 0, len(s.forwards))
	for _, f := range s.sorted() {
		if !f.wanted {
			continue
		}
		snap.Forwards = append(snap.Forwards, forwardInfo{
			ContainerID: f.id, LocalPort: f.local.Port(), RemotePort: f.remote.Port(),
			Status: f.status, Reason: f.reason, CreatedAt: utc(f.created), UpdatedAt: utc(f.updated),
			LocalAddress: f.local.Addr().String(), RemoteAddress: f.remote.Addr().String(),
			ContainerName: f.name, ContainerPort: f.private, Image: f.image, Service: f.service,
		})
	}
}

// local is the local end as a person writes it.
func (f *forwardInfo) local() string {
	if f.LocalAddress == "127.0.0.1" { // by far the most
		return "127.0.0.1:" + strconv.Itoa(int(f.LocalPort))
	}
	return netip.AddrPortFrom(addrOf(f.LocalAddress), f.LocalPort).String()
}

// addrOf parses an address that rdhpf wrote; in a file that somebody else did,
// what is none becomes 127.0.0.1.
func addrOf(s string) netip.Addr {
	if a, err := netip.ParseAddr(s); err == nil {
		return a
	}
	return loopback4
}

// health is the answer to whether all is well.
type health struct {
	Status      string         `json:"status"` // ok, degraded, down
	Reasons     []string       `json:"reasons"`
	Counts      map[string]int `json:"counts"`
	Uptime      int64          `json:"uptime_seconds"`
	Connection  connection     `json:"connection"`
	Engine      string         `json:"engine"`
	LastEventAt *time.Time     `json:"last_event_at"`
	Traffic     traffic        `json:"traffic"`
}

// traffic is what all forwards carried together.
type traffic struct {
	Connections     int64 `json:"connections"`
	OpenConnections int64 `json:"open_connections"`
	BytesIn         int64 `json:"bytes_in"`
	BytesOut        int64 `json:"bytes_out"`
}

// health judges: down without a connection, degraded where anything published
// does not answer for another reason than that it was just opened.
func (snap *snapshot) health(now time.Time) health {
	h := health{Status: "ok", Reasons: []string{}, Counts: map[string]int{active: 0, conflict: 0, pending: 0},
		Uptime: max(0, int64(now.Sub(snap.StartedAt).Seconds())), Connection: snap.Connection, Engine: snap.Engine, LastEventAt: snap.LastEventAt}
	h.Reasons = append(h.Reasons, snap.Warnings...)
	for _, f := range snap.Forwards {
		h.Counts[f.Status]++
		h.Traffic.Connections += f.Connections
		h.Traffic.OpenConnections += f.OpenConnections
		h.Traffic.BytesIn += f.BytesIn
		h.Traffic.BytesOut += f.BytesOut
		if f.Status != active && f.Reason != reasonProbing && f.Reason != reasonLost && f.Reason != reasonPaused {
			h.Reasons = append(h.Reasons, fmt.Sprintf("%s %s: %s", f.local(), f.Status, f.Reason))
		}
	}
	if snap.Paused {
		h.Reasons = append(h.Reasons, "paused: rdhpf resume opens the ports again")
	}
	if snap.Connection.State != connected {
		h.Status = "down"
		reason := snap.Connection.State
		if snap.Connection.LastError != "" {
			reason += ": " + snap.Connection.LastError
		}
		h.Reasons = append([]string{reason}, h.Reasons...)
	} else if len(h.Reasons) > 0 {
		h.Status = "degraded"
	}
	return h
}

// at is the snapshot as it is sent or written at now.
func (snap *snapshot) at(now time.Time) *snapshot {
	c := *snap
	c.UpdatedAt = utc(now)
	return &c
}

// clean makes a snapshot that came from elsewhere safe to print, its lists never
// nil.
func (snap *snapshot) clean() {
	for _, s := range []*string{&snap.Version, &snap.Host, &snap.Engine, &snap.Connection.State, &snap.Connection.LastError} {
		*s = printable(*s, 1000)
	}
	if snap.Forwards == nil {
		snap.Forwards = []forwardInfo{}
	}
	if snap.Skipped == nil {
		snap.Skipped = []skippedPort{}
	}
	if snap.Warnings == nil {
		snap.Warnings = []string{}
	}
	for i := range snap.Warnings {
		snap.Warnings[i] = printable(snap.Warnings[i], 1000)
	}
	for i := range snap.Forwards {
		f := &snap.Forwards[i]
		for _, s := range []*string{&f.ContainerID, &f.Status, &f.Reason, &f.LocalAddress, &f.RemoteAddress, &f.ContainerName, &f.Image, &f.Service} {
			*s = printable(*s, 1000)
		}
		if f.LocalAddress == "" {
			f.LocalAddress = loopback4.String()
		}
		if f.RemoteAddress == "" {
			f.RemoteAddress = loopback4.String()
		}
	}
	for i := range snap.Skipped {
		k := &snap.Skipped[i]
		for _, s := range []*string{&k.ContainerID, &k.Name, &k.Protocol, &k.Reason} {
			*s = printable(*s, 1000)
		}
	}
}
