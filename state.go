package main

// state.go: the core state machine, and the snapshot of it that clients see. The
// core tracks the desired and the observed state of each forward, consumes events
// and decides what to do next. It does no I/O, reads no clock and takes no lock:
// its only caller is the loop in run.go.

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// The statuses of a forward.
const (
	active   = "active"
	conflict = "conflict"
	pending  = "pending"
)

const (
	reasonProbing = "probing"
	reasonSilent  = "port not responding"
	reasonCloses  = reasonSilent + ": connections are closed at once (a service that means to needs -no-probe)"
	reasonLost    = "ssh connection lost, reconnecting"
	reasonPaused  = "paused"
	reasonFrozen  = "container paused"
	reasonRefused = "refused by the SSH server: administratively prohibited"
	reasonGivenUp = "port already in use after 5 retry attempts"
	reasonLabel   = "excluded by its label rdhpf.skip"
)

const (
	maxForwards  = 10_000
	maxSkipNotes = 10 // log messages about skipped ports after one list
	bindAttempts = 5
	bindDelay    = 100 * time.Millisecond // after the first failure; doubles with each further one
	slowLook     = 2 * time.Second        // between checks of a conflict; also the longest wait between probes
	holderEvery  = 15                     // checks of a conflict per lookup of the port's owner
	frozenFor    = time.Second            // an event of pause or unpause outweighs lists
	diedFor      = 30 * time.Second       // the longest a dead container's id is remembered
	quietFor     = 2 * time.Second        // for a program to start before its silence is logged
	staleAfter   = 30 * time.Second       // evidence older than this is refreshed when a client asks
)

// container is a running container, decoded, validated and safe to print.
type container struct {
	id      string // 12 characters
	name    string
	image   string
	service string // docker compose service, or ""
	paused  bool
	hostNet bool
	rules   rules
	node    string // of a Swarm on which it runs; "" if that is the engine's own
	lost    string // why that node cannot be reached, as far as is known
	ports   []port
	nets    []network // sorted by name
}

// rules are what a container's labels say about its ports. They are checked and safe to print.
type rules struct {
	skip, noProbe bool
	mapped        map[uint16]uint16 // port as published, or else the container's own -> local port
	wrong         string            // what is wrong with the labels, in which case nothing is guessed; "" if nothing is
}

// local returns the local port that the rules have for a port of their container.
func (ru *rules) local(p port, all []port) (uint16, bool) {
	if to, ok := ru.mapped[p.public]; ok || slices.ContainsFunc(all, func(q port) bool { return q.public == p.private }) {
		return to, ok
	}
	to, ok := ru.mapped[p.private]
	return to, ok
}

// local returns the local address of a published port of the container, or the reason why it has none.
func (ctr *container) local(cfg *config, p port) (netip.AddrPort, string) {
	local, reason := cfg.local(p.public)
	to, ruled := ctr.rules.local(p, ctr.ports)
	switch set, isSet := cfg.mapped[p.public]; {
	case reason != "":
	case ctr.rules.wrong != "":
		reason = ctr.rules.wrong
	case ctr.rules.skip:
		reason = reasonLabel
	case ruled && isSet && set != to:
		reason = fmt.Sprintf("-map has %d=%d, and its label rdhpf.map %d", p.public, set, to)
	case ruled:
		local = netip.AddrPortFrom(local.Addr(), to)
	}
	return local, reason
}

func (ctr container) published() int { return len(ctr.ports) }

// port is one published port of a container.
type port struct {
	ip      netip.Addr // as published; the zero Addr if the engine sent an invalid one
	private uint16
	public  uint16
	proto   string
}

// network is a container's attachment to one network.
type network struct {
	endpoint string // the engine's endpoint id; changes at every start
	addr     netip.Addr
	gateway  netip.Addr // of the network; the zero Addr if there is none
}

// key identifies a forward.
type key struct{ local, remote netip.AddrPort }

// want is a forward that should exist, its container, and how the remote host
// reaches that container.
type want struct {
	key
	id, name, image, service string
	node, lost               string // as of its container
	private                  uint16
	paused                   bool
	noProbe                  bool
	direct                   netip.Addr // the container's own address; the zero Addr if unknown
	gateway                  netip.Addr // of its network; the remote host itself if the network is local to it
	onlyNet                  bool       // the container is in exactly one network
	endpoints                string     // of all its networks, space-separated
}

// who returns the container's name and id for display.
func (wt want) who() string { return fmt.Sprintf("%s (%s)", wt.name, wt.id) }

// skippedPort is a published port that is not forwarded. Port is 0 if the reason
// applies to the whole container.
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

// desired returns the forwards that the listed containers require. If two
// containers claim the same key, the one listed first wins: engines list the
// newest first, and the older one is usually about to go.
//
// IPv4 goes before ::, whatever came first. Engines such as Docker 20.10 pick a random port for
// each, and once the two have drifted apart, the port of one container on :: is that of the
// next on IPv4, which is where its clients look for it.
func desired(list []container, cfg *config) (map[key]want, []skippedPort) {
	wants := make(map[key]want)
	skipped := []skippedPort{}
	inet4 := make(map[netip.AddrPort]bool) // local ports that lead to ports published on IPv4
	for _, c := range list {
		for _, p := range c.ports {
			if local, reason := c.local(cfg, p); reason == "" && p.proto == "tcp" && p.ip.Is4() {
				inet4[local] = true
			}
		}
	}
	for _, c := range list {
		tooMany := 0
		skip := func(p port, reason string) {
			skipped = append(skipped, skippedPort{c.id, c.name, p.public, p.proto, reason})
		}
		if c.hostNet {
			skip(port{proto: "tcp"}, "host network: the container publishes no ports")
		}
		best := c.best()
		for i, p := range c.ports {
			if best[p.number()] != i {
				continue
			}
			local, reason := c.local(cfg, p)
			switch {
			case p.proto != "tcp":
				reason = "SSH carries TCP only"
			case !p.ip.IsValid():
				reason = "published on an invalid address"
			case reason == "" && p.ip == netip.IPv6Unspecified() && inet4[local]:
				reason = fmt.Sprintf("published on :: only, and %s leads to what is published on IPv4", local)
			}
			if reason != "" {
				skip(p, reason)
				continue
			}
			w := c.want(p, local)
			w.noProbe = c.rules.noProbe || has(cfg.noProbe, p.public)
			if _, taken := wants[w.key]; taken {
				continue
			}
			if len(wants) == maxForwards {
				tooMany++
				continue
			}
			wants[w.key] = w
		}
		for _, public := range slices.Sorted(maps.Keys(c.rules.mapped)) {
			if !slices.ContainsFunc(c.ports, func(p port) bool { return p.proto == "tcp" && (p.public == public || p.private == public) }) {
				skip(port{public: public, proto: "tcp"}, "its label rdhpf.map names this port, which it does not publish")
			}
		}
		if tooMany > 0 {
			skip(port{proto: "tcp"}, fmt.Sprintf("%d of its ports: at most %d are forwarded; see -only", tooMany, maxForwards))
		}
	}
	slices.SortStableFunc(skipped, func(a, b skippedPort) int { return cmp.Compare(a.Port, b.Port) })
	return wants, skipped
}

// want returns the forward of one published port.
func (ctr *container) want(p port, local netip.AddrPort) want {
	w := want{key: key{local, netip.AddrPortFrom(dialable(p.ip), p.public)}, id: ctr.id, name: ctr.name, image: ctr.image,
		service: ctr.service, node: ctr.node, lost: ctr.lost, private: p.private, paused: ctr.paused, onlyNet: len(ctr.nets) == 1}
	var endpoints []string
	for _, n := range ctr.nets {
		endpoints = append(endpoints, n.endpoint)
		if !w.gateway.IsValid() && n.addr.IsValid() {
			w.direct, w.gateway = n.addr, n.gateway
		}
	}
	w.endpoints = strings.Join(endpoints, " ")
	return w
}

// number is a published port apart from its address.
type number struct {
	private, public uint16
	proto           string
}

func (p port) number() number { return number{p.private, p.public, p.proto} }

// best returns the indices of the ports to forward. Engines list 0.0.0.0, :: and each
// single address separately; one forward, to the address preferred by reach, serves them
// all.
func (ctr *container) best() map[number]int {
	best := make(map[number]int, len(ctr.ports))
	for i, p := range ctr.ports {
		if j, seen := best[p.number()]; !seen || reach(p.ip) < reach(ctr.ports[j].ip) {
			best[p.number()] = i
		}
	}
	return best
}

// reach ranks the addresses on which a port can be published; the lowest is the
// best to dial.
func reach(ip netip.Addr) int {
	switch {
	case ip == netip.IPv4Unspecified():
		return 0
	case ip.Is4():
		return 1
	case ip == netip.IPv6Unspecified():
		return 2
	case ip.IsValid():
		return 3
	}
	return 4
}

// dialable returns the address at which the remote host reaches a port published
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

// verb is an operation on a forward that the core asks its caller to perform.
type verb uint8

const (
	openPort  verb = iota // listen; the result goes to openDone immediately
	closePort             // stop listening; cannot fail
	probePort             // check whether the service answers; the result goes to probeDone
	findOwner             // find who holds the local port; the result goes to ownerFound
)

type action struct {
	verb  verb
	want  want
	meter *meter
	probe int      // sequence number; results of older probes are ignored
	ways  []uint16 // local ports, of which findOwner looks for a free one
}

// stage is the progress of a forward.
type stage uint8

const (
	shut      stage = iota // not open; to be opened when due
	taken                  // not open; the local port cannot be bound
	failed                 // not open; listening failed for another reason
	unseen                 // open; the service has not been seen yet
	answering              // open; the service answered when last seen
	silent                 // open; the service does not answer
	closing                // open; something accepts connections, and closes them at once
	forbidden              // open; the SSH server prohibits connecting
	unreached              // open; the node of the service cannot be reached
)

func (sg stage) open() bool { return sg >= unseen }

// forward is the state of one forward.
type forward struct {
	want
	wanted bool   // if false, plan closes and forgets it
	meter  *meter // traffic counters, shared with the goroutines that count

	// Shown to clients.
	status, reason string
	created        time.Time
	updated        time.Time
	verified       time.Time // when the service last answered; zero if never

	// Progress. Only reset reverts it.
	stage stage
	fault string    // why the stage is taken or failed
	tries int       // consecutive failures
	due   time.Time // when to try again
	probe int       // number of the probe in progress, or 0
	began time.Time // start of the last probe
	seen  time.Time // the stage was observed at this time or later
	look  time.Time // an observation newer than this is wanted
	// A carried connection found no service, and no probe has checked since.
	suspect bool

	// Log messages and lookups.
	told string // the status last logged; "": none
	moan bool   // why it is not active is to be logged now
	ask  bool   // who holds the local port is to be looked up, and which one is free
	way  uint16 // a local port that is free instead; 0 if unknown
}

// meter counts the traffic of one forward. It is safe for concurrent use.
type meter struct {
	connections, open, in, out atomic.Int64
	used                       atomic.Int64 // Unix time in ns of the last byte or connection; 0 if none
	told                       atomic.Int64 // Unix time in ns when the loop was last told that the service answers
}

// note is a log message and its attributes.
type note struct {
	level slog.Level
	text  string
	attrs []slog.Attr
}

// state is the core. It is owned by a single goroutine.
type state struct {
	cfg      *config
	probeMax int // maximum concurrent probes

	forwards map[key]*forward
	order    []*forward                  // what sorted returns; nil if it has to sort again
	held     map[netip.AddrPort]*forward // what holders returned last
	skipped  []skippedPort
	list     []container
	died     map[string]time.Time
	frozen   map[string]freeze // containers just paused or unpaused
	ready    bool              // connected, and a list has arrived since
	paused   bool
	probes   int  // in progress
	probe    int  // number of the last probe
	changed  bool // the next snapshot differs from the last
	notes    []note
}

func newState(cfg *config, probeMax int) *state {
	return &state{cfg: cfg, probeMax: probeMax, forwards: make(map[key]*forward), held: make(map[netip.AddrPort]*forward),
		skipped: []skippedPort{}, died: make(map[string]time.Time), frozen: make(map[string]freeze)}
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

// listed handles a complete list of the running containers.
func (s *state) listed(now time.Time, list []container) {
	maps.DeleteFunc(s.frozen, func(_ string, f freeze) bool { return now.Sub(f.at) >= frozenFor })
	shown := make(map[string]bool, len(list))
	live := make([]container, 0, len(list))
	for _, c := range list {
		shown[c.id] = true
		if f, told := s.frozen[c.id]; told {
			c.paused = f.paused
		}
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

// diedNow handles the death of a container. An engine keeps listing it for some
// 100 ms, so lists are not believed about it until startedNow.
func (s *state) diedNow(now time.Time, id string) {
	if len(s.died) >= maxContainer { // no list for a long time; the next may be wrong for 100 ms
		clear(s.died)
	}
	s.died[id] = now
	isIt := func(c container) bool { return c.id == id }
	if slices.ContainsFunc(s.list, isIt) {
		s.list = slices.DeleteFunc(slices.Clone(s.list), isIt)
		s.reconcile(now)
	}
}

// startedNow handles the start of a container. If it already has forwards, its
// death was missed.
func (s *state) startedNow(now time.Time, id string) {
	delete(s.died, id)
	for _, f := range s.forwards {
		if f.id == id {
			s.renew(f, now)
		}
	}
}

// freeze is a container's last pause or unpause.
type freeze struct {
	at     time.Time
	paused bool
}

// frozenNow handles the pause or unpause of a container. Docker 20.10 tells of it before
// its lists do.
func (s *state) frozenNow(now time.Time, id string, paused bool) {
	if len(s.frozen) < maxContainer {
		s.frozen[id] = freeze{now, paused}
	}
	list := slices.Clone(s.list)
	for i := range list {
		if list[i].id == id {
			list[i].paused = paused
		}
	}
	s.list = list
	s.reconcile(now)
}

// configure applies a new configuration; unaffected forwards stay open.
func (s *state) configure(now time.Time, cfg *config) {
	s.cfg = cfg
	s.reconcile(now)
}

// pause closes all local ports, or reopens them without delay.
func (s *state) pause(now time.Time, paused bool) {
	if s.paused == paused {
		return
	}
	s.paused, s.changed = paused, true
	for _, f := range s.forwards {
		s.reset(f)
	}
}

// disconnected handles the loss of the connection. The ports stay open so that
// clients can wait for the next one; the state of the services is unknown.
func (s *state) disconnected() {
	s.ready, s.probes = false, 0
	for _, f := range s.forwards {
		if f.stage.open() {
			s.reset(f)
		}
	}
	clear(s.died)
	clear(s.frozen)
}

func (s *state) reconcile(now time.Time) {
	wants, skipped := desired(s.list, s.cfg)
	if !slices.Equal(skipped, s.skipped) {
		s.noteSkipped(skipped)
		s.skipped, s.changed = skipped, true
	}
	for k, w := range wants {
		f := s.forwards[k]
		if f == nil {
			f = &forward{meter: &meter{}}
			s.forwards[k] = f
		}
		was := f.want
		f.want = w
		switch {
		case !f.wanted || was.id != w.id || restarted(was.endpoints, w.endpoints):
			// New, back, taken over or restarted: anything known about the
			// service is obsolete.
			if was.id != w.id || f.told != active {
				f.told = ""
			}
			f.wanted = true
			s.renew(f, now)
		case was.paused != w.paused || was.noProbe != w.noProbe || was.lost != w.lost:
			s.reset(f)
		case was.endpoints != w.endpoints || was.direct != w.direct:
			s.lookAt(f, now)
		}
		s.changed = s.changed || was != w
	}
	for k, f := range s.forwards {
		if _, ok := wants[k]; !ok && f.wanted {
			f.wanted = false
			if f.told != "" && f.stage.open() {
				s.note(slog.LevelInfo, f, fmt.Sprintf("%s closed: %s %s", f.local, f.who(), s.whyClosed(f, wants)))
			}
		}
	}
}

// whyClosed says what became of the container of a forward that is no longer wanted, or of its port.
func (s *state) whyClosed(f *forward, wants map[key]want) string {
	for k, w := range wants {
		if w.id == f.id && k.remote.Port() == f.remote.Port() {
			return fmt.Sprintf("is at %s now", k.local)
		}
	}
	for _, p := range s.skipped {
		if p.ContainerID == f.id && p.Port == f.remote.Port() && p.Protocol == "tcp" {
			return "is not forwarded any more: " + p.Reason
		}
	}
	if slices.ContainsFunc(s.list, func(c container) bool { return c.id == f.id }) {
		return "no longer publishes it"
	}
	return "is gone"
}

// noteSkipped logs which ports are not forwarded that were not known before, except for those that
// the user left out.
func (s *state) noteSkipped(skipped []skippedPort) {
	n := 0
	for _, p := range skipped {
		if p.Reason == reasonLabel || p.Port != 0 && s.cfg.excludes(p.Port) || slices.Contains(s.skipped, p) {
			continue
		}
		if n++; n > maxSkipNotes {
			s.notes = append(s.notes, note{level: slog.LevelInfo, text: "more ports are not forwarded: see rdhpf status"})
			return
		}
		s.notes = append(s.notes, note{slog.LevelInfo, fmt.Sprintf("%s is not forwarded: %s", skippedName(p), p.Reason), []slog.Attr{
			slog.String("container_id", p.ContainerID), slog.String("container_name", p.Name), slog.String("reason", p.Reason)}})
	}
}

// restarted reports whether a container was restarted between two lists: none of
// its earlier endpoints is left.
func restarted(before, now string) bool {
	if before == "" || now == "" {
		return false
	}
	old := strings.Fields(before)
	return !slices.ContainsFunc(strings.Fields(now), func(e string) bool { return slices.Contains(old, e) })
}

// renew starts a forward over, because its container was started.
func (s *state) renew(f *forward, now time.Time) {
	f.created, f.updated, f.verified = now, now, time.Time{}
	s.changed, s.order = true, nil
	s.reset(f)
}

// reset discards a forward's progress, except for whether it is open.
func (s *state) reset(f *forward) {
	switch {
	case !f.stage.open():
		f.stage = shut
	case f.noProbe:
		f.stage = answering
	default:
		f.stage = unseen
	}
	f.fault, f.tries, f.due, f.probe, f.ask, f.moan, f.way = "", 0, time.Time{}, 0, false, false, 0
	f.seen, f.look, f.suspect = time.Time{}, time.Time{}, false
}

// plan returns the actions due now, closes before opens, and the latest time to
// call it again (zero if nothing is waiting).
func (s *state) plan(now time.Time) (acts []action, wake time.Time) {
	all := s.sorted()
	holders := s.holders(all)
	var opens []action
	// ready reports whether f is due, and updates wake if it is not.
	ready := func(f *forward) bool {
		if f.due.After(now) && (wake.IsZero() || f.due.Before(wake)) {
			wake = f.due
		}
		return !f.due.After(now)
	}
	for _, f := range all {
		if f.stage.open() && (!f.wanted || s.paused) {
			f.stage = shut
			s.reset(f)
			acts = append(acts, action{verb: closePort, want: f.want})
		}
		if !f.wanted {
			delete(s.forwards, f.key)
			s.changed, s.order = true, nil
			continue
		}
		holder := holders[f.local]
		s.judge(f, holder, now)
		if f.ask {
			f.ask = false
			acts = append(acts, action{verb: findOwner, want: f.want, ways: s.ways(f)})
		}
		switch {
		case s.paused || holder != f:
		case !f.stage.open():
			if ready(f) {
				opens = append(opens, action{verb: openPort, want: f.want, meter: f.meter})
			}
		case s.probeable(f) && f.probe == 0 && (f.stage != answering || f.seen.Before(f.look)):
			if s.probes < s.probeMax && ready(f) {
				s.probe++
				s.probes++
				f.probe, f.began = s.probe, now
				acts = append(acts, action{verb: probePort, want: f.want, probe: f.probe})
			}
		}
	}
	return append(acts, opens...), wake
}

// probeable reports whether f is open and a probe of it can be useful.
func (s *state) probeable(f *forward) bool {
	return s.ready && f.stage.open() && !f.want.paused && f.lost == "" && (!f.noProbe || f.suspect)
}

// holders returns the forward that owns each local port: the open one, else the
// first. The next call reuses the map.
func (s *state) holders(all []*forward) map[netip.AddrPort]*forward {
	clear(s.held)
	for _, f := range all {
		if h := s.held[f.local]; f.wanted && (h == nil || !h.stage.open() && f.stage.open()) {
			s.held[f.local] = f
		}
	}
	return s.held
}

// judge updates the status and reason of f, given the forward that holds its
// local port.
func (s *state) judge(f, holder *forward, now time.Time) {
	switch {
	case s.paused:
		s.set(f, now, pending, reasonPaused)
	case holder != f:
		s.set(f, now, conflict, fmt.Sprintf("%s is taken by %s, which publishes %s", f.local, holder.who(), holder.remote))
		f.moan = true
	case f.stage == taken:
		s.set(f, now, conflict, f.fault)
	case f.stage == failed:
		s.set(f, now, pending, f.fault)
	case !s.ready:
		s.set(f, now, pending, reasonLost)
	case f.want.paused:
		s.set(f, now, pending, reasonFrozen)
	case f.lost != "":
		s.set(f, now, pending, f.lost)
	case f.stage == answering:
		s.set(f, now, active, "")
	case f.stage == silent:
		s.set(f, now, pending, reasonSilent)
	case f.stage == closing:
		s.set(f, now, pending, reasonCloses)
	case f.stage == forbidden:
		s.set(f, now, pending, reasonRefused)
	case f.stage == unreached:
		s.set(f, now, pending, fmt.Sprintf("node %s cannot be reached from the remote host", f.node))
	default:
		s.set(f, now, pending, reasonProbing)
	}
	s.tell(f, now)
}

// tell logs what became of a forward: that its service answers, why its port is not open, or
// that nothing answers although a program has had the time to start.
func (s *state) tell(f *forward, now time.Time) {
	moan := f.moan
	f.moan = false
	if f.told == f.status {
		return
	}
	switch quiet := now.Sub(f.updated) >= quietFor; {
	case f.status == active:
		again := map[string]string{conflict: ", free again", pending: ", answers now"}
		s.note(slog.LevelInfo, f, fmt.Sprintf("%s → %s%s", f.local, f.who(), again[f.told]))
	case moan:
		hint := ""
		if f.stage == forbidden {
			hint = " (see AllowTcpForwarding and PermitOpen in its sshd_config)"
		} else if strings.HasPrefix(f.reason, reasonGivenUp) && !strings.Contains(f.reason, "free within") && f.way != 0 {
			hint = fmt.Sprintf(": stop what holds it or use -map %d=%d", f.remote.Port(), f.way)
		}
		s.note(slog.LevelWarn, f, fmt.Sprintf("%s %s for %s: %s%s", f.local, f.status, f.who(), f.reason, hint))
	case quiet && slices.Contains([]string{reasonSilent, reasonCloses, reasonFrozen}, f.reason):
		s.note(slog.LevelInfo, f, fmt.Sprintf("%s %s for %s: %s", f.local, f.status, f.who(), f.reason))
	default:
		return
	}
	f.told = f.status
}

// sorted returns the forwards in a stable order, oldest first. The caller must not
// change the slice. It sorts only after a change, since each step of the loop asks
// for it.
func (s *state) sorted() []*forward {
	if s.order == nil {
		s.order = slices.SortedFunc(maps.Values(s.forwards), byAge)
	}
	return s.order
}

func byAge(a, b *forward) int {
	return cmp.Or(a.created.Compare(b.created), a.local.Compare(b.local), a.remote.Compare(b.remote))
}

// openDone handles the result of an openPort.
func (s *state) openDone(now time.Time, k key, err error) {
	f := s.forwards[k]
	if f == nil || f.stage.open() {
		return
	}
	if err == nil {
		f.stage = unseen
		s.reset(f)
		s.judge(f, f, now)
		return
	}
	f.tries++
	f.due = now.Add(slowLook)
	before := f.fault
	f.stage, f.fault, f.moan = taken, "bind: "+err.Error(), true
	var errno syscall.Errno
	if errors.As(err, &errno) {
		f.fault = "bind: " + errno.Error()
	}
	switch errno {
	case syscall.EADDRINUSE:
		f.moan = false // wait until the owner is known
		if f.tries < bindAttempts {
			f.due = now.Add(backoff(f.tries))
		} else {
			f.ask = (f.tries-bindAttempts)%holderEvery == 0
			f.fault = reasonGivenUp
			if strings.HasPrefix(before, reasonGivenUp) { // keep the owner's name
				f.fault = before
			}
		}
	case syscall.EACCES, syscall.EPERM:
		if f.local.Port() < 1024 {
			f.fault += " (ports below 1024 need root"
			if f.moan, f.ask = f.way != 0, f.way == 0 && (f.tries-1)%holderEvery == 0; f.way != 0 {
				f.fault += fmt.Sprintf(": map it with -map %d=%d", f.remote.Port(), f.way)
			}
			f.fault += ")"
		}
	case syscall.EADDRNOTAVAIL:
	default:
		f.stage, f.fault, f.moan = failed, "cannot be opened: "+err.Error(), f.tries >= bindAttempts
		f.due = now.Add(backoff(f.tries))
	}
}

// backoff returns the wait after the n-th consecutive failure: 100 ms, doubling
// up to 2 s.
func backoff(n int) time.Duration {
	return min(bindDelay<<min(max(n, 1)-1, 10), slowLook)
}

// ownerFound handles the result of a findOwner: a description such as
// "held by nginx, pid 4242", or "" if the owner is unknown, and a local port that is free, 0 if none was found.
func (s *state) ownerFound(k key, owner string, free uint16) {
	f := s.forwards[k]
	if f == nil || f.stage != taken {
		return
	}
	if f.way = free; !strings.HasPrefix(f.fault, reasonGivenUp) { // no permission: the next attempt says where to
		f.moan, f.due = free == 0, time.Time{}
		return
	}
	if f.moan = true; owner != "" { // keep an owner found earlier
		f.fault = reasonGivenUp + " (" + owner + ")"
	}
}

// ways returns local ports that no forward wants and that f could have instead of its own.
func (s *state) ways(f *forward) (ports []uint16) {
	wanted := make(map[uint16]bool)
	for k := range s.forwards {
		wanted[k.local.Port()], wanted[k.remote.Port()] = true, true
	}
	p, usual := int(f.local.Port()), 10_000
	if p < 1024 {
		usual = 8000
	}
	for _, n := range []int{p + usual, p + 20_000, p + 30_000, p + 1, p + 2, p + 3, p + 1000, p - 1000, p - 10_000} {
		if n >= 1024 && n <= 65535 && !wanted[uint16(n)] {
			ports = append(ports, uint16(n))
		}
	}
	return ports
}

// probeResult is the result of a probe.
type probeResult uint8

const (
	probeUnknown   probeResult = iota // the link did not answer
	probeAnswered                     // the service answers
	probeSilent                       // the service does not answer
	probeForbidden                    // the SSH server prohibits connecting
	probeClosed                       // something accepts connections, and closes them at once
	probeUnreached                    // the node of the service cannot be reached
)

// probeDone handles the result of a probe.
func (s *state) probeDone(now time.Time, k key, probe int, result probeResult) {
	s.probes = max(0, s.probes-1)
	f := s.forwards[k]
	if f == nil || f.probe != probe || probe == 0 {
		return
	}
	f.probe = 0
	f.tries++
	wished := f.due // set by lookAt if a newer observation is wanted
	f.due = now.Add(backoff(f.tries))
	if result == probeUnknown || f.seen.After(f.began) { // a carried connection has newer evidence
		return
	}
	f.seen = f.began
	f.suspect = f.suspect && f.seen.Before(f.look)
	switch result {
	case probeAnswered:
		f.stage, f.tries, f.due, f.verified = answering, 0, time.Time{}, now
	case probeSilent:
		f.stage = silent
	case probeClosed:
		f.stage = closing
	case probeUnreached:
		f.stage = unreached
	case probeForbidden:
		f.moan = f.stage != forbidden
		f.stage = forbidden
	}
	if f.seen.Before(f.look) {
		f.due = wished
	}
}

// answered handles data from the service on a carried connection.
func (s *state) answered(now time.Time, k key) {
	if f := s.forwards[k]; s.ready && f != nil && f.stage.open() { // otherwise it came through a lost link
		f.stage, f.tries, f.due = answering, 0, time.Time{}
		f.seen, f.verified, f.suspect = now, now, false
	}
}

// suspected handles a carried connection that found no service: it could not be
// opened, or the remote end closed it at once without sending a byte. That proves
// nothing, so the forward is probed. This includes noProbe forwards: a service
// that accepts a single connection has just had it.
func (s *state) suspected(now time.Time, k key) {
	if f := s.forwards[k]; f != nil && f.stage == answering {
		f.suspect = true
		f.look, f.due = now, f.began.Add(bindDelay) // a flood of clients must not cause a flood of probes
	}
}

// lookAt requests an observation of f at since or later.
func (s *state) lookAt(f *forward, since time.Time) {
	if f.due = (time.Time{}); since.After(f.look) {
		f.look = since
	}
}

// lookAgain requests a probe of every forward last seen before since. If id is not
// empty, it considers only that container.
func (s *state) lookAgain(since time.Time, id string) {
	for _, f := range s.forwards {
		if s.probeable(f) && f.seen.Before(since) && (id == "" || f.id == id) {
			s.lookAt(f, since)
		}
	}
}

// unlooked returns the open forwards that have not been seen since the given time
// but can be probed.
func (s *state) unlooked(since time.Time) (fs []*forward) {
	for _, f := range s.forwards {
		if s.probeable(f) && f.seen.Before(since) {
			fs = append(fs, f)
		}
	}
	return fs
}

// starting reports whether a service that was started within the last second is being
// waited for.
func (s *state) starting(now time.Time) bool {
	for _, f := range s.forwards {
		if s.probeable(f) && f.stage != answering && f.stage != forbidden && now.Sub(f.created) < time.Second {
			return true
		}
	}
	return false
}

const stateVersion = "1.0"

// snapshot is the state shown to clients. It is immutable once posted. Times are
// UTC.
type snapshot struct {
	Version     string     `json:"version"`
	Host        string     `json:"host"`
	PID         int        `json:"pid"`
	StartedAt   time.Time  `json:"started_at"`
	UpdatedAt   time.Time  `json:"updated_at"` // when it was written or sent
	Connection  connection `json:"connection"`
	Engine      string     `json:"engine"`        // "Docker/20.10.24 (linux)"
	LastEventAt *time.Time `json:"last_event_at"` // null before the first event

	DockerSocket       string `json:"docker_socket"`        // the engine's, for tools on this machine; "" if there is none
	RemoteDockerSocket string `json:"remote_docker_socket"` // its path on the remote host; "" before it is known

	Paused   bool          `json:"paused"`
	Warnings []string      `json:"warnings"` // other problems of the instance
	Forwards []forwardInfo `json:"forwards"`
	Skipped  []skippedPort `json:"skipped"`
}

// connection is the state of the connection to the remote host.
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

// forwardInfo is one forward in a snapshot.
type forwardInfo struct {
	ContainerID   string    `json:"container_id"`
	LocalPort     uint16    `json:"local_port"`
	RemotePort    uint16    `json:"remote_port"`
	Status        string    `json:"status"`
	Reason        string    `json:"reason"`
	CreatedAt     time.Time `json:"created_at"` // when opening was first attempted
	UpdatedAt     time.Time `json:"updated_at"` // of the last change of status or reason
	LocalAddress  string    `json:"local_address"`
	RemoteAddress string    `json:"remote_address"`
	ContainerName string    `json:"container_name"`
	ContainerPort uint16    `json:"container_port"`
	Image         string    `json:"image"`
	Service       string    `json:"service"`
	Node          string    `json:"node"` // of a Swarm, other than the remote host

	VerifiedAt      *time.Time `json:"verified_at"` // when the service last answered; null if never
	Connections     int64      `json:"connections"` // total carried
	OpenConnections int64      `json:"open_connections"`
	BytesIn         int64      `json:"bytes_in"`     // from the remote host
	BytesOut        int64      `json:"bytes_out"`    // to the remote host
	LastUsedAt      *time.Time `json:"last_used_at"` // last connection or byte; null if never
}

// utc strips the monotonic clock reading and the time zone from t.
func utc(t time.Time) time.Time { return t.Round(0).UTC() }

// show fills in the core's part of a snapshot.
func (s *state) show(snap *snapshot) {
	snap.Paused, snap.Skipped = s.paused, s.skipped
	snap.Forwards = make([]forwardInfo, 0, len(s.forwards))
	for _, f := range s.sorted() {
		if !f.wanted {
			continue
		}
		info := forwardInfo{
			ContainerID: f.id, LocalPort: f.local.Port(), RemotePort: f.remote.Port(),
			Status: f.status, Reason: f.reason, CreatedAt: utc(f.created), UpdatedAt: utc(f.updated),
			LocalAddress: f.local.Addr().String(), RemoteAddress: f.remote.Addr().String(),
			ContainerName: f.name, ContainerPort: f.private, Image: f.image, Service: f.service, Node: f.node,
			Connections: f.meter.connections.Load(), OpenConnections: f.meter.open.Load(),
			BytesIn: f.meter.in.Load(), BytesOut: f.meter.out.Load(),
		}
		if !f.verified.IsZero() {
			at := utc(f.verified)
			info.VerifiedAt = &at
		}
		if used := f.meter.used.Load(); used != 0 {
			at := utc(time.Unix(0, used))
			info.LastUsedAt = &at
		}
		snap.Forwards = append(snap.Forwards, info)
	}
}

// local returns the local address for display.
func (fi *forwardInfo) local() string {
	if fi.LocalAddress == "127.0.0.1" { // the common case
		return "127.0.0.1:" + strconv.Itoa(int(fi.LocalPort))
	}
	return netip.AddrPortFrom(addrOf(fi.LocalAddress), fi.LocalPort).String()
}

// addrOf parses an address written by rdhpf. An invalid one, from a file written
// by something else, becomes 127.0.0.1.
func addrOf(s string) netip.Addr {
	if a, err := netip.ParseAddr(s); err == nil {
		return a
	}
	return loopback4
}

// health is the result of a health check.
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

// traffic is the total traffic of all forwards.
type traffic struct {
	Connections     int64 `json:"connections"`
	OpenConnections int64 `json:"open_connections"`
	BytesIn         int64 `json:"bytes_in"`
	BytesOut        int64 `json:"bytes_out"`
}

// health returns the overall health: down without a connection, degraded if there
// is any reason. doubts are additional reasons.
func (snap *snapshot) health(now time.Time, doubts ...string) health {
	h := health{Status: "ok", Reasons: []string{}, Counts: map[string]int{active: 0, conflict: 0, pending: 0},
		Uptime: max(0, int64(now.Sub(snap.StartedAt).Seconds())), Connection: snap.Connection, Engine: snap.Engine, LastEventAt: snap.LastEventAt}
	h.Reasons = append(append(h.Reasons, snap.Warnings...), doubts...)
	for _, f := range snap.Forwards {
		h.Counts[f.Status]++
		h.Traffic.Connections += f.Connections
		h.Traffic.OpenConnections += f.OpenConnections
		h.Traffic.BytesIn += f.BytesIn
		h.Traffic.BytesOut += f.BytesOut
		if f.Status != active && f.Reason != reasonLost && f.Reason != reasonPaused {
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

// at returns a copy of the snapshot, updated at now.
func (snap *snapshot) at(now time.Time) *snapshot {
	c := *snap
	c.UpdatedAt = utc(now)
	return &c
}

// clean makes a snapshot from an untrusted source safe to print and its lists
// non-nil.
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
		for _, s := range []*string{&f.ContainerID, &f.Status, &f.Reason, &f.LocalAddress, &f.RemoteAddress, &f.ContainerName, &f.Image, &f.Service, &f.Node} {
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
