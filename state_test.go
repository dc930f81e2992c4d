package main

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Tests of the core: what it does and shows, step by step, for each thing that
// can happen; then at random against a simulated engine and link; and what it
// leaves behind.

var (
	epoch = time.Date(2025, 3, 1, 12, 0, 0, 0, time.UTC)
	idA   = strings.Repeat("a", 12)
	idB   = strings.Repeat("b", 12)
)

// ctr is a container with TCP ports, each "8080" (on all addresses) or "10.0.0.2:8080".
func ctr(id, name string, ports ...string) container {
	c := container{id: id, name: name}
	for _, p := range ports {
		if !strings.Contains(p, ":") {
			p = "0.0.0.0:" + p
		}
		a := netip.MustParseAddrPort(p)
		c.ports = append(c.ports, port{a.Addr(), 80, a.Port(), "tcp"})
	}
	return c
}

func frozen(c container) container {
	c.paused = true
	return c
}

// unprobed is c with the label that forbids probes.
func unprobed(c container) container {
	c.rules.noProbe = true
	return c
}

// joined is c in networks, given by the ids of its endpoints there.
func joined(c container, endpoints ...string) container {
	c.nets = nil
	for i, e := range endpoints {
		c.nets = append(c.nets, network{endpoint: e, addr: netip.AddrFrom4([4]byte{172, 17 + byte(i), 0, 2}),
			gateway: netip.AddrFrom4([4]byte{172, 17 + byte(i), 0, 1})})
	}
	return c
}

// plainConfig sets nothing but the local address.
func plainConfig() *config { return configOn(loopback4, config{}) }

// configOn is c with the local address a.
func configOn(a netip.Addr, c config) *config {
	c.bind = []netip.Addr{a}
	return &c
}

// keyText writes a key as short as it can be told: "8080" leads from
// 127.0.0.1:8080 to the same, "81>80" to 127.0.0.1:80, else "81>10.0.0.2:80".
func keyText(k key) string {
	local := strconv.Itoa(int(k.local.Port()))
	switch {
	case k.local == k.remote:
		return local
	case k.remote.Addr() == loopback4:
		return fmt.Sprintf("%s>%d", local, k.remote.Port())
	}
	return local + ">" + k.remote.String()
}

// driver drives a state by what happens.
type driver struct {
	*state
	t       *testing.T
	now     time.Time
	open    map[netip.AddrPort]key   // local ports
	busy    map[netip.AddrPort]error // local ports that cannot be opened
	numbers map[key][]int            // of the probes so far
}

func newDriver(t *testing.T, cfg *config, probeMax int) *driver {
	return &driver{newState(cfg, probeMax), t, epoch, make(map[netip.AddrPort]key), make(map[netip.AddrPort]error), make(map[key][]int)}
}

func (d *driver) key(text string) key {
	d.t.Helper()
	for k := range d.forwards {
		if keyText(k) == text {
			return k
		}
	}
	for k := range d.numbers {
		if keyText(k) == text {
			return k
		}
	}
	d.t.Fatalf("no forward %s", text)
	return key{}
}

// plan opens and closes, as the loop does, until nothing more is to be done. It
// returns what was to be done as one text, and how long until the core has to be
// asked again.
func (d *driver) plan() (string, time.Duration) {
	d.t.Helper()
	var texts []string
	for round := 0; ; round++ {
		acts, wake := d.state.plan(d.now)
		if len(acts) == 0 && wake.IsZero() {
			return strings.Join(texts, "; "), 0
		} else if len(acts) == 0 {
			return strings.Join(texts, "; "), wake.Sub(d.now)
		} else if round == 10 {
			d.t.Fatalf("never settles: %v after %v", acts, texts)
		}
		opens := false
		for _, a := range acts {
			k := a.want.key
			switch a.verb {
			case openPort:
				opens = true
				if by, is := d.open[k.local]; is {
					d.t.Fatalf("%s is to be opened while %s has the port", keyText(k), keyText(by))
				}
				err := d.busy[k.local]
				if err == nil {
					d.open[k.local] = k
				}
				d.openDone(d.now, k, err)
			case closePort:
				if d.open[k.local] != k || opens {
					d.t.Fatalf("%s is to be closed: open is %v, after an open %v", keyText(k), d.open[k.local], opens)
				}
				delete(d.open, k.local)
			case probePort:
				d.numbers[k] = append(d.numbers[k], a.probe)
			}
			texts = append(texts, [...]string{"open", "close", "probe", "owner"}[a.verb]+" "+keyText(k))
		}
	}
}

// shown returns the status and reason of what is wanted.
func (d *driver) shown() string {
	var texts []string
	for k, f := range d.forwards {
		if f.wanted {
			texts = append(texts, strings.TrimSpace(keyText(k)+" "+f.status+" "+f.reason))
		}
	}
	slices.Sort(texts)
	return strings.Join(texts, "; ")
}

// said returns the notes for a person and forgets them, as the loop does.
func (d *driver) said() string {
	var texts []string
	for _, n := range d.notes {
		texts = append(texts, n.level.String()+" "+n.text)
	}
	d.notes = nil
	return strings.Join(texts, "\n")
}

// matches compares a text with a pattern in which * stands for anything.
func matches(pattern, text string) bool {
	return regexp.MustCompile("(?s)^" + strings.ReplaceAll(regexp.QuoteMeta(pattern), `\*`, ".*") + "$").MatchString(text)
}

// What can happen, for the tables.
type happening func(*driver)

func lists(list ...container) happening {
	return func(d *driver) { d.listed(d.now, list) }
}

// busy has a port of 127.0.0.1 refuse to be opened; free ends that.
func busy(port uint16, err error) happening {
	return func(d *driver) { d.busy[netip.AddrPortFrom(loopback4, port)] = err }
}
func free(port uint16) happening { return busy(port, nil) }

// probes delivers the outcome of the last probe but back.
func probes(text string, result probeResult, back ...int) happening {
	return func(d *driver) {
		d.t.Helper()
		k := d.key(text)
		i := len(d.numbers[k]) - 1
		if len(back) > 0 {
			i -= back[0]
		}
		if i < 0 {
			d.t.Fatalf("%s was not probed so often", text)
		}
		d.probeDone(d.now, k, d.numbers[k][i], result)
	}
}
func answers(text string) happening {
	return func(d *driver) { d.answered(d.now, d.key(text)) }
}
func suspects(text string) happening {
	return func(d *driver) { d.suspected(d.now, d.key(text)) }
}

// looks asks for everything to be looked at that was last seen longer ago.
func looks(ago time.Duration, id string) happening {
	return func(d *driver) { d.lookAgain(d.now.Add(-ago), id) }
}
func owner(text, who string) happening {
	return func(d *driver) { d.ownerFound(d.key(text), who, 0) }
}
func found(text, who string, free uint16) happening {
	return func(d *driver) { d.ownerFound(d.key(text), who, free) }
}
func dies(id string) happening   { return func(d *driver) { d.diedNow(d.now, id) } }
func starts(id string) happening { return func(d *driver) { d.startedNow(d.now, id) } }
func freezes(id string, paused bool) happening {
	return func(d *driver) { d.frozenNow(d.now, id, paused) }
}
func pauses(p bool) happening { return func(d *driver) { d.pause(d.now, p) } }
func reloads(c *config) happening {
	return func(d *driver) { d.configure(d.now, c) }
}
func down(d *driver) { d.disconnected() }
func waits(*driver)  {} // nothing but time passes

func all(hs ...happening) happening {
	return func(d *driver) {
		for _, h := range hs {
			h(d)
		}
	}
}

// up makes one container's ports active, by the shortest way.
func up(c container, texts ...string) happening {
	return func(d *driver) {
		d.listed(d.now, []container{c})
		d.plan()
		for _, text := range texts {
			if !c.rules.noProbe {
				probes(text, probeAnswered)(d)
			}
			d.plan()
		}
		d.notes = nil
	}
}

// step is something that happens, and what comes of it.
type step struct {
	after time.Duration
	do    happening
	acts  string        // in order: "close 80; open 81; probe 81"
	shown string        // "80 active; 81 pending probing", sorted; * stands for anything
	wake  time.Duration // from now; 0: nothing waits
}

func TestStateSteps(t *testing.T) {
	const ms = time.Millisecond
	inUse, noRight := error(syscall.EADDRINUSE), error(syscall.EACCES)
	web := ctr(idA, "web", "8080")
	two := []container{ctr(idB, "db", "10.0.0.2:8080"), web}
	const bindBusy = "8080 conflict bind: address already in use"
	const givenUp = "8080 conflict port already in use after 5 retry attempts"
	const lost = "pending ssh connection lost, reconnecting"
	const silence = "pending port not responding"
	const refused = "pending refused by the SSH server: administratively prohibited"
	// asked5 makes five attempts at a busy port; busy5 is told then by whom it is held.
	asked5 := func(d *driver) {
		busy(8080, inUse)(d)
		d.listed(d.now, []container{web})
		for i := range 5 {
			if d.plan(); i < 4 {
				d.now = d.now.Add(time.Second)
			}
		}
	}
	busy5 := func(d *driver) {
		asked5(d)
		owner("8080", "held by nginx, pid 4242")(d)
	}
	mapped := func(m map[uint16]uint16, skip, only []portRange) *config {
		return configOn(loopback4, config{mapped: m, skip: skip, only: only})
	}
	for _, c := range []struct {
		name  string
		steps []step
	}{
		{"open and probe", []step{
			{0, lists(web), "open 8080; probe 8080", "8080 pending probing", 0},
			{ms, lists(web), "", "8080 pending probing", 0},
			{300 * ms, probes("8080", probeAnswered), "", "8080 active", 0},
			{time.Hour, lists(web), "", "8080 active", 0},
			{0, lists(), "close 8080", "", 0},
		}},
		{"busy port: five attempts, then looks", []step{
			{0, all(busy(8080, inUse), lists(web)), "open 8080", bindBusy, 100 * ms},
			{99 * ms, waits, "", bindBusy, ms},
			{ms, waits, "open 8080", bindBusy, 200 * ms},
			{200 * ms, waits, "open 8080", bindBusy, 400 * ms},
			{400 * ms, waits, "open 8080", bindBusy, 800 * ms},
			{800 * ms, waits, "open 8080; owner 8080", givenUp, 2 * time.Second},
			{0, owner("8080", "held by nginx, pid 4242"), "", givenUp + " (held by nginx, pid 4242)", 2 * time.Second},
			{2 * time.Second, waits, "open 8080", givenUp + " (held by nginx, pid 4242)", 2 * time.Second},
			{2 * time.Second, free(8080), "open 8080; probe 8080", "8080 pending probing", 0},
			{0, probes("8080", probeAnswered), "", "8080 active", 0},
		}},
		{"busy for a moment", []step{
			{0, all(busy(8080, inUse), lists(web)), "open 8080", bindBusy, 100 * ms},
			{100 * ms, free(8080), "open 8080; probe 8080", "8080 pending probing", 0},
		}},
		{"nobody can tell who holds it", []step{
			{0, asked5, "", "*", 2 * time.Second},
			{0, owner("8080", ""), "", givenUp, 2 * time.Second},
		}},
		{"who holds it is asked again once in a while", []step{
			{0, busy5, "", "*", 2 * time.Second},
			{2 * time.Second, func(d *driver) {
				for range 14 {
					if acts, _ := d.plan(); acts != "open 8080" {
						d.t.Errorf("%q is done, want an attempt only", acts)
					}
					d.now = d.now.Add(2 * time.Second)
				}
			}, "open 8080; owner 8080", givenUp + " (held by nginx, pid 4242)", 2 * time.Second},
			{0, owner("8080", "held by caddy, pid 1"), "", givenUp + " (held by caddy, pid 1)", 2 * time.Second},
		}},
		{"who held it is told too late", []step{
			{0, busy5, "", "*", 2 * time.Second},
			{2 * time.Second, free(8080), "open 8080; probe 8080", "*", 0},
			{0, owner("8080", "late, pid 1"), "", "8080 pending probing", 0},
		}},
		{"no right to bind", []step{
			{0, all(busy(80, noRight), lists(ctr(idA, "web", "80"))), "open 80; owner 80", "80 conflict bind: permission denied (ports below 1024 need root)", 2 * time.Second},
			{0, found("80", "", 8080), "open 80", "80 conflict bind: permission denied (*-map 80=8080*)", 2 * time.Second},
			{2 * time.Second, free(80), "open 80; probe 80", "80 pending probing", 0},
		}},
		{"no right to bind a mapped port: the hint is one that can be followed", []step{
			{0, all(busy(80, noRight), reloads(mapped(map[uint16]uint16{60000: 80}, nil, nil)), lists(ctr(idA, "web", "60000"))), "open 80>60000; owner 80>60000",
				"80>60000 conflict bind: permission denied (*)", 2 * time.Second},
			{0, found("80>60000", "", 8080), "open 80>60000", "80>60000 conflict bind: permission denied (*-map 60000=8080*)", 2 * time.Second},
		}},
		{"no such local address", []step{
			{0, all(busy(8080, syscall.EADDRNOTAVAIL), lists(web)), "open 8080", "8080 conflict bind: *", 2 * time.Second},
		}},
		{"the error of a listener is the system's alone", []step{
			{0, all(busy(8080, fmt.Errorf("listen tcp4 127.0.0.1:8080: %w", inUse)), lists(web)), "open 8080", bindBusy, 100 * ms},
		}},
		{"listening fails", []step{
			{0, all(busy(8080, errors.New("out of order")), lists(web)), "open 8080", "8080 pending cannot be opened: out of order", 100 * ms},
			{100 * ms, waits, "open 8080", "8080 pending *out of order", 200 * ms},
			{200 * ms, free(8080), "open 8080; probe 8080", "8080 pending probing", 0},
		}},
		{"two keys want one local port", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{ms, lists(two...), "", "8080 active; 8080>10.0.0.2:8080 conflict *web (" + idA + ")*", 0},
			{time.Minute, lists(two[1], two[0]), "", "8080 active; 8080>10.0.0.2:8080 conflict *", 0},
			{ms, dies(idA), "close 8080; open 8080>10.0.0.2:8080; probe 8080>10.0.0.2:8080", "8080>10.0.0.2:8080 pending probing", 0},
			{ms, all(starts(idA), lists(two...)), "", "8080 conflict *db (" + idB + ")*; 8080>10.0.0.2:8080 pending probing", 0},
		}},
		{"two keys want one local port: the same after a reconnect", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{ms, lists(two...), "", "8080 active; 8080>10.0.0.2:8080 conflict *", 0},
			{ms, down, "", "8080 " + lost + "; 8080>10.0.0.2:8080 conflict *", 0},
			{ms, lists(two...), "probe 8080", "8080 pending probing; 8080>10.0.0.2:8080 conflict *web (" + idA + ")*", 0},
		}},
		{"two keys want one local port: who is open stays, whatever is newer", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{ms, lists(two...), "", "8080 active; 8080>10.0.0.2:8080 conflict *web (" + idA + ")*", 0},
			{ms, lists(two[0], ctr(strings.Repeat("c", 12), "new", "8080")), "probe 8080", "8080 pending probing; 8080>10.0.0.2:8080 conflict *new (cccccccccccc)*", 0},
			{ms, probes("8080", probeAnswered), "", "8080 active; 8080>10.0.0.2:8080 conflict *", 0},
		}},
		{"two keys want one local port: the first has it after pause and resume", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{ms, lists(two...), "", "8080 active; 8080>10.0.0.2:8080 conflict *", 0},
			{ms, pauses(true), "close 8080", "8080 pending paused; 8080>10.0.0.2:8080 pending paused", 0},
			{ms, pauses(false), "open 8080; probe 8080", "8080 pending probing; 8080>10.0.0.2:8080 conflict *", 0},
		}},
		{"two keys want one local port that is busy", []step{
			{0, all(busy(8080, inUse), lists(two...)), "open 8080>*", "8080 conflict *db (" + idB + ")*; 8080>10.0.0.2:8080 conflict bind: *", 100 * ms},
		}},
		{"a death counts at once, until a start", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, dies(idA), "close 8080", "", 0},
			{ms, lists(web), "", "", 0},
			{100 * ms, lists(web), "", "", 0},
			{ms, lists(), "", "", 0},
			{ms, all(starts(idA), lists(web)), "open 8080; probe 8080", "8080 pending probing", 0},
		}},
		{"a death whose start was missed is believed for a while", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, dies(idA), "close 8080", "", 0},
			{diedFor, lists(web), "", "", 0},
			{ms, lists(web), "", "", 0}, // forgotten, for the next
			{ms, lists(web), "open 8080; probe 8080", "8080 pending probing", 0},
		}},
		{"died and started before anything was done", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, all(dies(idA), starts(idA), lists(web)), "probe 8080", "8080 pending probing", 0},
		}},
		{"taken over by another container", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, lists(ctr(idB, "web", "8080")), "probe 8080", "8080 pending probing", 0},
			{0, probes("8080", probeAnswered), "", "8080 active", 0},
		}},
		{"taken over, the old one dies later", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, lists(ctr(idB, "web", "8080")), "probe 8080", "8080 pending probing", 0},
			{0, dies(idA), "", "8080 pending probing", 0},
		}},
		{"taken over during a probe: its outcome is of the old one", []step{
			{0, lists(web), "open 8080; probe 8080", "*", 0},
			{0, lists(ctr(idB, "web", "8080")), "probe 8080", "8080 pending probing", 0},
			{0, probes("8080", probeAnswered, 1), "", "8080 pending probing", 0},
			{0, probes("8080", probeSilent), "", "8080 " + silence, 100 * ms},
		}},
		{"renamed", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, lists(ctr(idA, "other", "8080")), "", "8080 active", 0},
		}},
		{"a restart that no event told of", []step{
			{0, up(joined(web, "e1", "e2"), "8080"), "", "8080 active", 0},
			{0, lists(joined(web, "e3", "e4")), "probe 8080", "8080 pending probing", 0},
			{0, probes("8080", probeSilent), "", "8080 " + silence, 100 * ms},
		}},
		{"a restart that no event told of, during a probe", []step{
			{0, lists(joined(web, "e1")), "open 8080; probe 8080", "*", 0},
			{0, lists(joined(web, "e2")), "probe 8080", "8080 pending probing", 0},
			{0, probes("8080", probeAnswered, 1), "", "8080 pending probing", 0},
		}},
		{"a restart of which the start was told alone", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, starts(idB), "", "8080 active", 0},
			{0, starts(idA), "probe 8080", "8080 pending probing", 0},
			{0, lists(web), "", "8080 pending probing", 0},
		}},
		{"a network joined and one left: looked at, but the same life", []step{
			{0, up(joined(web, "e1"), "8080"), "", "8080 active", 0},
			{ms, lists(joined(web, "e1", "e2")), "probe 8080", "8080 active", 0},
			{ms, probes("8080", probeAnswered), "", "8080 active", 0},
			{ms, lists(joined(web, "e2")), "probe 8080", "8080 active", 0},
			{ms, probes("8080", probeSilent), "", "8080 " + silence, 100 * ms},
			{ms, lists(joined(web)), "probe 8080", "8080 " + silence, 0},
			{ms, probes("8080", probeAnswered), "", "8080 active", 0},
		}},
		{"container paused", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, lists(frozen(web)), "", "8080 pending container paused", 0},
			{time.Minute, all(lists(frozen(web)), looks(0, "")), "", "8080 pending container paused", 0},
			{0, lists(web), "probe 8080", "8080 pending probing", 0},
			{0, probes("8080", probeAnswered), "", "8080 active", 0},
		}},
		{"container paused from the start", []step{
			{0, lists(frozen(web)), "open 8080", "8080 pending container paused", 0},
			{0, lists(web), "probe 8080", "8080 pending probing", 0},
		}},
		{"container paused during a probe", []step{
			{0, lists(web), "open 8080; probe 8080", "*", 0},
			{0, lists(frozen(web)), "", "8080 pending container paused", 0},
			{0, probes("8080", probeAnswered), "", "8080 pending container paused", 0},
			{0, lists(web), "probe 8080", "8080 pending probing", 0},
		}},
		{"paused and resumed by the user", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, pauses(true), "close 8080", "8080 pending paused", 0},
			{0, lists(two...), "", "8080 pending paused; 8080>10.0.0.2:8080 pending paused", 0},
			{0, lists(web), "", "8080 pending paused", 0},
			{0, pauses(false), "open 8080; probe 8080", "8080 pending probing", 0},
		}},
		{"paused and resumed by the user before anything was done", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, all(pauses(true), pauses(false)), "probe 8080", "8080 pending probing", 0},
		}},
		{"paused by the user during a probe", []step{
			{0, lists(web), "open 8080; probe 8080", "*", 0},
			{0, pauses(true), "close 8080", "8080 pending paused", 0},
			{0, probes("8080", probeAnswered), "", "8080 pending paused", 0},
			{0, pauses(false), "open 8080; probe 8080", "8080 pending probing", 0},
		}},
		{"paused by the user with the link down", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, all(down, pauses(true)), "close 8080", "8080 pending paused", 0},
			{0, pauses(false), "open 8080", "8080 " + lost, 0}, // who connects waits for the link
			{0, all(pauses(true), lists(web)), "close 8080", "8080 pending paused", 0},
			{0, pauses(false), "open 8080; probe 8080", "8080 pending probing", 0},
		}},
		{"a conflict is one again after pause and resume", []step{
			{0, busy5, "", givenUp + " (held by nginx, pid 4242)", 2 * time.Second},
			{0, pauses(true), "", "8080 pending paused", 0},
			{time.Minute, pauses(false), "open 8080", bindBusy, 100 * ms},
		}},
		{"refused by the SSH server", []step{
			{0, lists(web), "open 8080; probe 8080", "*", 0},
			{0, probes("8080", probeForbidden), "", "8080 " + refused, 100 * ms},
			{100 * ms, waits, "probe 8080", "8080 " + refused, 0},
			{0, probes("8080", probeAnswered), "", "8080 active", 0},
		}},
		{"nothing answers: backoff", []step{
			{0, lists(web), "open 8080; probe 8080", "*", 0},
			{0, probes("8080", probeSilent), "", "8080 " + silence, 100 * ms},
			{100 * ms, waits, "probe 8080", "8080 " + silence, 0},
			{0, probes("8080", probeSilent), "", "*", 200 * ms},
			{200 * ms, waits, "probe 8080", "*", 0},
			{0, probes("8080", probeSilent), "", "*", 400 * ms},
			{400 * ms, waits, "probe 8080", "*", 0},
			{0, probes("8080", probeSilent), "", "*", 800 * ms},
			{800 * ms, waits, "probe 8080", "*", 0},
			{0, probes("8080", probeSilent), "", "*", 1600 * ms},
			{1600 * ms, waits, "probe 8080", "*", 0},
			{0, probes("8080", probeSilent), "", "*", 2 * time.Second},
			{2 * time.Second, waits, "probe 8080", "*", 0},
			{0, probes("8080", probeSilent), "", "8080 " + silence, 2 * time.Second},
			{2 * time.Second, waits, "probe 8080", "*", 0},
			{0, probes("8080", probeAnswered), "", "8080 active", 0},
		}},
		{"silence of the link is no evidence: pending stays", []step{
			{0, lists(web), "open 8080; probe 8080", "*", 0},
			{4 * time.Second, probes("8080", probeUnknown), "", "8080 pending probing", 100 * ms},
			{100 * ms, waits, "probe 8080", "8080 pending probing", 0},
			{0, probes("8080", probeSilent), "", "8080 " + silence, 200 * ms},
			{200 * ms, waits, "probe 8080", "8080 " + silence, 0},
			{0, probes("8080", probeUnknown), "", "8080 " + silence, 400 * ms},
			{400 * ms, waits, "probe 8080", "8080 " + silence, 0},
			{0, probes("8080", probeForbidden), "", "8080 " + refused, 800 * ms},
			{800 * ms, waits, "probe 8080", "*", 0},
			{0, probes("8080", probeUnknown), "", "8080 " + refused, 1600 * ms},
		}},
		{"silence of the link is no evidence: active stays, and is looked at until something is known", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{time.Minute, looks(0, ""), "probe 8080", "8080 active", 0},
			{ms, probes("8080", probeUnknown), "", "8080 active", 100 * ms},
			{100 * ms, waits, "probe 8080", "8080 active", 0},
			{ms, probes("8080", probeUnknown), "", "8080 active", 200 * ms},
			{200 * ms, waits, "probe 8080", "8080 active", 0},
			{ms, probes("8080", probeSilent), "", "8080 " + silence, 400 * ms},
		}},
		{"a look at what is active: found alive, and left alone", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{29 * time.Second, looks(staleAfter, ""), "", "8080 active", 0},
			{2 * time.Second, looks(staleAfter, ""), "probe 8080", "8080 active", 0},
			{ms, probes("8080", probeAnswered), "", "8080 active", 0},
			{ms, looks(staleAfter, ""), "", "8080 active", 0},
			{time.Hour, waits, "", "8080 active", 0},
		}},
		{"a look at one container", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{ms, looks(0, idB), "", "8080 active", 0},
			{ms, looks(0, idA), "probe 8080", "8080 active", 0},
		}},
		{"a look at what is waited for: at once", []step{
			{0, lists(web), "open 8080; probe 8080", "*", 0},
			{0, probes("8080", probeSilent), "", "8080 " + silence, 100 * ms},
			{ms, looks(0, ""), "probe 8080", "8080 " + silence, 0},
			{ms, probes("8080", probeAnswered), "", "8080 active", 0},
		}},
		{"a look during a probe that began before: looked at once more", []step{
			{0, lists(web), "open 8080; probe 8080", "*", 0},
			{ms, looks(0, ""), "", "8080 pending probing", 0},
			{ms, probes("8080", probeAnswered), "probe 8080", "8080 active", 0},
			{ms, probes("8080", probeSilent), "", "8080 " + silence, 100 * ms},
		}},
		{"a look at what is silent, during a probe that began before", []step{
			{0, lists(web), "open 8080; probe 8080", "*", 0},
			{ms, looks(0, ""), "", "8080 pending probing", 0},
			{ms, probes("8080", probeSilent), "probe 8080", "8080 " + silence, 0},
		}},
		{"a connection that met nobody: a probe tells", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{time.Minute, suspects("8080"), "probe 8080", "8080 active", 0},
			{ms, probes("8080", probeSilent), "", "8080 " + silence, 100 * ms},
		}},
		{"a connection that ended at once: a probe tells", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{time.Minute, suspects("8080"), "probe 8080", "8080 active", 0},
			{ms, probes("8080", probeAnswered), "", "8080 active", 0},
		}},
		{"many connections that met nobody: not as many probes", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{time.Minute, suspects("8080"), "probe 8080", "8080 active", 0},
			{ms, probes("8080", probeAnswered), "", "8080 active", 0},
			{ms, suspects("8080"), "", "8080 active", 98 * ms},
			{ms, suspects("8080"), "", "8080 active", 97 * ms},
			{97 * ms, waits, "probe 8080", "8080 active", 0},
			{ms, probes("8080", probeAnswered), "", "8080 active", 0},
		}},
		{"many connections that met nobody during a probe: no more probes", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{time.Minute, suspects("8080"), "probe 8080", "8080 active", 0},
			{ms, suspects("8080"), "", "8080 active", 0},
			{ms, probes("8080", probeAnswered), "", "8080 active", 98 * ms},
			{98 * ms, waits, "probe 8080", "8080 active", 0},
			{ms, probes("8080", probeSilent), "", "8080 " + silence, 100 * ms},
		}},
		{"an older wish for a look does not undo a suspicion", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{time.Minute, looks(0, ""), "probe 8080", "8080 active", 0},
			{ms, suspects("8080"), "", "8080 active", 0},
			{ms, looks(staleAfter, ""), "", "8080 active", 0},
			{98 * ms, probes("8080", probeAnswered), "probe 8080", "8080 active", 0}, // it began before
		}},
		{"a suspicion of what is pending is nothing new", []step{
			{0, lists(web), "open 8080; probe 8080", "*", 0},
			{0, probes("8080", probeSilent), "", "8080 " + silence, 100 * ms},
			{100 * ms, waits, "probe 8080", "8080 " + silence, 0},
			{0, probes("8080", probeSilent), "", "8080 " + silence, 200 * ms},
			{ms, suspects("8080"), "", "8080 " + silence, 199 * ms},
		}},
		{"a carried connection answers", []step{
			{0, lists(web), "open 8080; probe 8080", "*", 0},
			{ms, answers("8080"), "", "8080 active", 0},
			{ms, probes("8080", probeSilent), "", "8080 active", 0}, // it began before
		}},
		{"a carried connection answers where a probe was too early", []step{
			{0, lists(web), "open 8080; probe 8080", "*", 0},
			{0, probes("8080", probeSilent), "", "8080 " + silence, 100 * ms},
			{ms, answers("8080"), "", "8080 active", 0},
			{time.Minute, waits, "", "8080 active", 0},
		}},
		{"a carried connection answers: no look is needed for a while", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{time.Minute, answers("8080"), "", "8080 active", 0},
			{29 * time.Second, looks(staleAfter, ""), "", "8080 active", 0},
			{2 * time.Second, looks(staleAfter, ""), "probe 8080", "8080 active", 0},
		}},
		{"an answer of what is closed", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, pauses(true), "close 8080", "*", 0},
			{0, all(answers("8080"), suspects("8080")), "", "8080 pending paused", 0},
			{0, pauses(false), "open 8080; probe 8080", "8080 pending probing", 0},
		}},
		{"a suspicion of what is closed", []step{
			{0, up(unprobed(web), "8080"), "", "8080 active", 0},
			{0, pauses(true), "close 8080", "*", 0},
			{0, suspects("8080"), "", "8080 pending paused", 0},
			{0, pauses(false), "open 8080", "8080 active", 0},
		}},
		{"not to be probed: active when open, until a connection meets nobody", []step{
			{0, lists(unprobed(web)), "open 8080", "8080 active", 0},
			{time.Minute, looks(0, ""), "", "8080 active", 0},
			{ms, suspects("8080"), "probe 8080", "8080 active", 0}, // nothing is lost by it now
			{ms, probes("8080", probeAnswered), "", "8080 active", 0},
			{time.Minute, looks(0, ""), "", "8080 active", 0},
			{time.Minute, suspects("8080"), "probe 8080", "8080 active", 0},
			{ms, probes("8080", probeSilent), "", "8080 " + silence, 0},
			{time.Minute, looks(0, ""), "", "8080 " + silence, 0},
			{ms, answers("8080"), "", "8080 active", 0},
			{ms, down, "", "8080 " + lost, 0},
			{ms, lists(unprobed(web)), "", "8080 active", 0},
			{ms, lists(frozen(unprobed(web))), "", "8080 pending container paused", 0},
			{ms, lists(unprobed(web)), "", "8080 active", 0},
			{ms, suspects("8080"), "probe 8080", "8080 active", 0},
			{ms, probes("8080", probeSilent), "", "8080 " + silence, 0},
			{ms, lists(unprobed(ctr(idB, "web", "8080"))), "", "8080 active", 0},
		}},
		{"not to be probed, by the configuration", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, reloads(configOn(loopback4, config{noProbe: []portRange{{8000, 8100}}})), "", "8080 active", 0},
			{time.Minute, suspects("8080"), "probe 8080", "8080 active", 0},
			{ms, reloads(plainConfig()), "probe 8080", "8080 pending probing", 0},
		}},
		{"a limit on probes at once", []step{ // the driver allows two
			{0, lists(ctr(idA, "web", "1", "2", "3", "4")), "open 1; open 2; open 3; open 4; probe 1; probe 2",
				"1 pending probing; 2 pending probing; 3 pending probing; 4 pending probing", 0},
			{0, probes("2", probeAnswered), "probe 3", "1 pending probing; 2 active; *", 0},
			{0, probes("1", probeSilent), "probe 4", "1 pending port not responding; 2 active; *", 0}, // until a place is free
			{100 * ms, waits, "", "*", 0},
			{0, probes("3", probeAnswered), "probe 1", "*; 3 active; *", 0},
			{0, all(probes("1", probeAnswered), probes("4", probeAnswered)), "", "1 active; 2 active; 3 active; 4 active", 0},
		}},
		{"stale probes give their place back", []step{
			{0, lists(ctr(idA, "web", "1", "2")), "open 1; open 2; probe 1; probe 2", "*", 0},
			{0, lists(ctr(idB, "web", "1", "2")), "", "*", 0}, // both places are taken
			{0, probes("1", probeAnswered), "probe 1", "1 pending probing; 2 pending probing", 0},
			{0, probes("2", probeAnswered), "probe 2", "1 pending probing; 2 pending probing", 0},
		}},
		{"the probe of an earlier forward", []step{
			{0, lists(web), "open 8080; probe 8080", "*", 0},
			{0, dies(idA), "close 8080", "", 0},
			{0, all(starts(idA), lists(web)), "open 8080; probe 8080", "8080 pending probing", 0},
			{0, probes("8080", probeAnswered, 1), "", "8080 pending probing", 0},
			{0, probes("8080", probeSilent), "", "8080 pending port not responding", 100 * ms},
		}},
		{"link lost and back: the port stays open", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, down, "", "8080 " + lost, 0},
			{0, dies(idB), "", "8080 " + lost, 0},
			{0, looks(0, ""), "", "8080 " + lost, 0},
			{0, lists(web), "probe 8080", "8080 pending probing", 0},
			{0, probes("8080", probeAnswered), "", "8080 active", 0},
		}},
		{"link lost, and an answer of it comes late", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, all(down, answers("8080")), "", "8080 " + lost, 0},
			{0, lists(web), "probe 8080", "8080 pending probing", 0},
		}},
		{"link lost while probing, in conflict and waiting", []step{
			{0, all(busy(3, inUse), lists(ctr(idA, "web", "2", "3"), ctr(idB, "old", "4"))), "open 2; open 3; open 4; probe 2; probe 4", "*", 100 * ms},
			{0, dies(idB), "close 4", "*", 100 * ms},
			{0, down, "", "2 " + lost + "; 3 conflict bind: address already in use", 100 * ms},
			{0, probes("2", probeAnswered), "", "2 " + lost + "; 3 conflict *", 100 * ms},
			{100 * ms, free(3), "open 3", "2 " + lost + "; 3 " + lost, 0},
			{0, lists(ctr(idA, "web", "2", "3")), "probe 2; probe 3", "2 pending probing; 3 pending probing", 0},
			{0, probes("2", probeAnswered, 1), "", "2 pending probing; 3 pending probing", 0}, // of the lost link
			{0, probes("2", probeAnswered), "", "2 active; 3 pending probing", 0},
		}},
		{"link lost after silence: the backoff begins again", []step{
			{0, lists(web), "open 8080; probe 8080", "*", 0},
			{0, probes("8080", probeSilent), "", "*", 100 * ms},
			{100 * ms, waits, "probe 8080", "*", 0},
			{0, probes("8080", probeSilent), "", "*", 200 * ms},
			{0, all(down, lists(web)), "probe 8080", "8080 pending probing", 0},
			{0, probes("8080", probeSilent), "", "8080 " + silence, 100 * ms},
		}},
		{"a death of which the link's loss left no start", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, dies(idA), "close 8080", "", 0},
			{0, all(down, lists(web)), "open 8080; probe 8080", "8080 pending probing", 0},
		}},
		{"containers gone and born while the link was down", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, down, "", "8080 " + lost, 0},
			{0, lists(ctr(idB, "db", "5432")), "close 8080; open 5432; probe 5432", "5432 pending probing", 0},
		}},
		{"reload touches what it concerns", []step{
			{0, up(ctr(idA, "web", "1", "2", "3"), "1", "2", "3"), "", "1 active; 2 active; 3 active", 0},
			{0, reloads(mapped(map[uint16]uint16{2: 1002}, nil, nil)), "close 2; open 1002>2; probe 1002>2", "1 active; 1002>2 pending probing; 3 active", 0},
			{0, probes("1002>2", probeAnswered), "", "1 active; 1002>2 active; 3 active", 0},
			{0, reloads(mapped(map[uint16]uint16{2: 1002}, []portRange{{3, 9}}, nil)), "close 3", "1 active; 1002>2 active", 0},
			{0, reloads(mapped(map[uint16]uint16{2: 1002}, nil, []portRange{{2, 2}})), "close 1", "1002>2 active", 0},
			{0, reloads(mapped(nil, nil, nil)), "close 1002>2; open 1; open 2; open 3; probe 1; probe 2", "*", 0},
		}},
		{"reload with the link down", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, all(down, reloads(mapped(map[uint16]uint16{8080: 81}, nil, nil))), "close 8080; open 81>8080", "81>8080 " + lost, 0},
		}},
		{"reload maps a port to one that is about to be free", []step{
			{0, up(ctr(idA, "web", "1", "2"), "1", "2"), "", "1 active; 2 active", 0},
			{0, reloads(mapped(map[uint16]uint16{2: 1}, []portRange{{1, 1}}, nil)), "close 1; close 2; open 1>2; probe 1>2", "1>2 pending probing", 0},
		}},
		{"reload maps a port to one that another has", []step{
			{0, up(ctr(idA, "web", "1", "2"), "1", "2"), "", "1 active; 2 active", 0},
			{0, reloads(mapped(map[uint16]uint16{2: 1}, nil, nil)), "close 2", "1 active; 1>2 conflict *web (" + idA + ")*", 0},
		}},
		{"pause and unpause show at their events, though lists lag behind", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, freezes(idA, true), "", "8080 pending container paused", 0},
			{100 * ms, lists(web), "", "8080 pending container paused", 0},
			{2 * time.Second, lists(frozen(web)), "", "8080 pending container paused", 0},
			{0, freezes(idA, false), "probe 8080", "8080 pending probing", 0},
			{100 * ms, lists(frozen(web)), "", "8080 pending probing", 0},
			{0, probes("8080", probeAnswered), "", "8080 active", 0},
			{2 * time.Second, lists(frozen(web)), "", "8080 pending container paused", 0}, // the truth after all
		}},
		{"something closes every connection", []step{
			{0, lists(web), "open 8080; probe 8080", "*", 0},
			{0, probes("8080", probeClosed), "", "8080 pending " + reasonCloses, 100 * ms},
			{100 * ms, waits, "probe 8080", "8080 pending " + reasonCloses, 0},
			{0, probes("8080", probeAnswered), "", "8080 active", 0},
		}},
		{"answers that nobody waits for", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, all(func(d *driver) { d.openDone(d.now, d.key("8080"), inUse) }, owner("8080", "x, pid 1"), probes("8080", probeSilent)), "", "8080 active", 0},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newDriver(t, plainConfig(), 2)
			for i, s := range c.steps {
				d.now = d.now.Add(s.after)
				s.do(d)
				acts, wake := d.plan()
				if shown := d.shown(); !matches(s.acts, acts) || !matches(s.shown, shown) || wake != s.wake {
					t.Fatalf("step %d:\n got %q, wake %v\n     %q\nwant %q, wake %v\n     %q", i+1, acts, wake, shown, s.acts, s.wake, s.shown)
				}
			}
		})
	}
}

// A container can publish every port there is; what is beyond the limit is told of.
func TestDesiredLimit(t *testing.T) {
	all := container{id: idA, name: "all"}
	for p := 1; p <= 65535; p++ {
		all.ports = append(all.ports, port{netip.IPv4Unspecified(), 80, uint16(p), "tcp"})
	}
	wants, skipped := desired([]container{ctr(idB, "web", "8080"), all}, plainConfig())
	if len(wants) != maxForwards {
		t.Errorf("%d forwards, want %d", len(wants), maxForwards)
	}
	want := []skippedPort{{idA, "all", 0, "tcp", fmt.Sprintf("%d of its ports: at most %d are forwarded; see -only", 65535-maxForwards, maxForwards)}}
	if !slices.Equal(skipped, want) {
		t.Errorf("skipped %v, want %v", skipped, want)
	}
}

// Answers for keys that are no more must be harmless.
func TestStateUnknownKeys(t *testing.T) {
	d := newDriver(t, plainConfig(), 2)
	k := key{netip.MustParseAddrPort("127.0.0.1:1"), netip.MustParseAddrPort("127.0.0.1:1")}
	d.openDone(d.now, k, nil)
	d.probeDone(d.now, k, 1, probeAnswered)
	d.ownerFound(k, "x", 0)
	d.answered(d.now, k)
	d.suspected(d.now, k)
	d.lookAgain(d.now, idA)
	d.diedNow(d.now, idA)
	d.startedNow(d.now, idB)
	if acts, wake := d.plan(); acts != "" || wake != 0 || len(d.forwards) != 0 || d.probes != 0 || len(d.unlooked(d.now)) != 0 {
		t.Errorf("plan %q, wake %v, %d forwards, %d probes, want nothing", acts, wake, len(d.forwards), d.probes)
	}
}

// created is when a forward was first attempted, updated its last change of
// status or reason, verified when something last answered.
func TestStateTimes(t *testing.T) {
	web := joined(ctr(idA, "web", "8080"), "e1")
	d := newDriver(t, plainConfig(), 2)
	at := func(want, verified time.Time) {
		t.Helper()
		d.plan()
		f := d.forwards[d.key("8080")]
		if !f.created.Equal(want) || f.updated.Before(f.created) {
			t.Errorf("at +%v: created +%v, want +%v; updated +%v", d.now.Sub(epoch), f.created.Sub(epoch), want.Sub(epoch), f.updated.Sub(epoch))
		}
		if !f.verified.Equal(verified) {
			t.Errorf("at +%v: verified +%v, want +%v", d.now.Sub(epoch), f.verified.Sub(epoch), verified.Sub(epoch))
		}
	}
	do := func(hs ...happening) {
		t.Helper()
		for _, h := range hs {
			d.now = d.now.Add(time.Second)
			h(d)
			d.plan()
		}
	}
	never := time.Time{}
	do(all(busy(8080, syscall.EADDRINUSE), lists(web)))
	first := d.now
	do(waits, free(8080), probes("8080", probeSilent), waits)
	at(first, never)
	do(probes("8080", probeAnswered))
	updated := d.now
	at(first, updated)
	do(lists(web), lists(joined(ctr(idA, "renamed", "8080"), "e1")))
	if f := d.forwards[d.key("8080")]; !f.updated.Equal(updated) {
		t.Errorf("updated changed without a change of status or reason")
	}
	do(answers("8080"))
	verified := d.now
	if f := d.forwards[d.key("8080")]; !f.updated.Equal(updated) {
		t.Errorf("updated changed when what is active answered")
	}
	at(first, verified)
	do(suspects("8080"), probes("8080", probeUnknown))
	at(first, verified)
	do(waits, probes("8080", probeSilent), waits)
	at(first, verified)
	do(lists(frozen(web)), lists(web), pauses(true), pauses(false))
	at(first, verified)
	do(down, lists(web))
	at(first, verified)
	do(down, waits, down, lists(joined(web, "e1", "e2")), lists(joined(web, "e2")))
	at(first, verified)

	// Restarted: told of, while the link was down, and with no word of it.
	do(dies(idA), starts(idA), lists(joined(web, "e3")))
	at(d.now, never)
	do(probes("8080", probeAnswered), down, lists(joined(web, "e4")))
	at(d.now, never)
	do(probes("8080", probeAnswered), lists(joined(web, "e5")))
	at(d.now, never)
	do(all(dies(idA), starts(idA)), lists(joined(web, "e6"))) // before the port could be closed
	at(d.now, never)
	do(starts(idA), waits)
	at(d.now.Add(-time.Second), never)
	do(probes("8080", probeAnswered), lists(ctr(idB, "web", "8080")))
	at(d.now, never)
}

// changed tells that a snapshot is out of date.
func TestStateChanged(t *testing.T) {
	web := ctr(idA, "web", "8080")
	udp := ctr(idB, "dns")
	udp.ports = []port{{netip.IPv4Unspecified(), 53, 53, "udp"}}
	d := newDriver(t, plainConfig(), 2)
	for i, c := range []struct {
		do   happening
		want bool
	}{
		{lists(), false},
		{lists(web), true}, {lists(web), false},
		{probes("8080", probeAnswered), true},
		{lists(web), false},
		{lists(ctr(idA, "renamed", "8080")), true},
		{lists(frozen(web)), true},
		{lists(web), true},
		{probes("8080", probeAnswered), true},
		{starts(idA), true},
		{probes("8080", probeUnknown), false}, {waits, false},
		{probes("8080", probeAnswered), true},
		{lists(udp, web), true}, {lists(udp, web), false},
		{down, true}, {lists(web), true},
		{pauses(true), true}, {pauses(true), false},
		{dies(idA), true},
		{lists(), false},
	} {
		d.changed = false
		d.now = d.now.Add(time.Second)
		c.do(d)
		d.plan()
		if d.changed != c.want {
			t.Errorf("%d: changed is %v, want %v; shown %s", i, d.changed, c.want, d.shown())
		}
	}
}

// A person is told once of each port that opens, closes, conflicts and heals.
func TestStateNotes(t *testing.T) {
	inUse := error(syscall.EADDRINUSE)
	web := ctr(idA, "web", "8080")
	d := newDriver(t, plainConfig(), 2)
	tell := func(what string, want string, hs ...happening) {
		t.Helper()
		for _, h := range hs {
			d.now = d.now.Add(2 * time.Second)
			h(d)
			d.plan()
		}
		if got := d.said(); !matches(want, got) {
			t.Errorf("%s: said %q, want %q", what, got, want)
		}
	}
	who := "web (" + idA + ")"
	tell("opened", "INFO 127.0.0.1:8080 → "+who, lists(web), probes("8080", probeAnswered), lists(web))
	tell("container paused and resumed", "", lists(frozen(web)), lists(web), probes("8080", probeAnswered))
	tell("reconnected", "", down, lists(web), probes("8080", probeAnswered))
	silent := "INFO 127.0.0.1:8080 pending for " + who + ": port not responding"
	tell("service gone", silent, suspects("8080"), probes("8080", probeSilent), waits, waits)
	tell("service back", "INFO 127.0.0.1:8080 → "+who+", answers now", probes("8080", probeAnswered), waits)
	tell("container paused for longer", "INFO 127.0.0.1:8080 pending for "+who+": container paused", lists(frozen(web)), waits, waits)
	tell("container resumed", "INFO 127.0.0.1:8080 → "+who+", answers now", lists(web), probes("8080", probeAnswered))
	tell("conflict after a pause", "WARN 127.0.0.1:8080 conflict for "+who+": port already in use after 5 retry attempts (held by nginx, pid 4242)",
		pauses(true), all(busy(8080, inUse), pauses(false)), waits, waits, waits, waits, owner("8080", "held by nginx, pid 4242"), waits, waits)
	tell("moved", "INFO 127.0.0.1:8081 → "+who, reloads(configOn(loopback4, config{mapped: map[uint16]uint16{8080: 8081}})), lists(web), probes("8081>8080", probeAnswered))
	tell("moved back", "INFO 127.0.0.1:8081 closed: "+who+" is at 127.0.0.1:8080 now\nWARN 127.0.0.1:8080 conflict for "+who+": port already in use after 5 retry attempts (held by nginx, pid 4242)"+
		": stop what holds it or use -map 8080=18080", reloads(plainConfig()), waits, waits, waits, waits, waits, found("8080", "held by nginx, pid 4242", 18080), waits, waits)
	tell("healed", "INFO 127.0.0.1:8080 → "+who+", free again", free(8080), probes("8080", probeAnswered))
	tell("restarted with no word of it", "", starts(idA), probes("8080", probeAnswered))
	tell("taken over", "INFO 127.0.0.1:8080 → new ("+idB+")", lists(ctr(idB, "new", "8080")), probes("8080", probeAnswered))
	tell("gone", "INFO 127.0.0.1:8080 closed: new ("+idB+") is gone", dies(idB), lists())
	tell("loser", "INFO * → "+who+"\nWARN * conflict for db ("+idB+"): *"+who+"*",
		lists(web), probes("8080", probeAnswered), lists(web, ctr(idB, "db", "10.0.0.2:8080")), lists(web, ctr(idB, "db", "10.0.0.2:8080")))
	tell("no right", "WARN * conflict for low ("+idB+"): bind: permission denied (ports below 1024 need root: map it with -map 80=8081)",
		all(busy(80, syscall.EACCES), lists(web, ctr(idB, "low", "80"))), found("80", "", 8081), waits, waits)
	tell("refused", "WARN * pending for low ("+idB+"): refused by the SSH server*AllowTcpForwarding*",
		free(80), probes("80", probeForbidden), waits, probes("80", probeForbidden))
	tell("excluded", "INFO 127.0.0.1:80 closed: low ("+idB+") is not forwarded any more: excluded by -skip", reloads(configOn(loopback4, config{skip: []portRange{{80, 80}}})))
	tell("out of order", "INFO 127.0.0.1:8080 closed: "+who+" is gone\nWARN 127.0.0.1:81 pending for odd ("+idB+"): cannot be opened: out of order",
		all(busy(81, errors.New("out of order")), lists(ctr(idB, "odd", "81"))), waits, waits, waits, waits, waits, waits)
	udp := ctr(idB, "dns")
	udp.ports = []port{{netip.IPv4Unspecified(), 53, 53, "udp"}, {netip.IPv4Unspecified(), 80, 80, "tcp"}}
	tell("skipped", "INFO 53/udp of dns ("+idB+") is not forwarded: SSH carries TCP only", lists(udp), lists(udp), waits)
	for i := range 20 {
		udp.ports = append(udp.ports, port{netip.IPv4Unspecified(), uint16(i), uint16(100 + i), "udp"})
	}
	tell("many skipped", strings.Repeat("INFO 1*/udp of dns (*\n", maxSkipNotes)+"INFO more ports are not forwarded: see rdhpf status", lists(udp), waits)
}

// Notes carry for machines what the sentence says to people.
func TestStateNoteAttrs(t *testing.T) {
	d := newDriver(t, plainConfig(), 2)
	lists(ctr(idA, "web", "10.0.0.2:8080"))(d)
	d.plan()
	probes("8080>10.0.0.2:8080", probeAnswered)(d)
	d.plan()
	if len(d.notes) != 1 {
		t.Fatalf("%d notes, want 1", len(d.notes))
	}
	got := make(map[string]string)
	for _, a := range d.notes[0].attrs {
		got[a.Key] = a.Value.String()
	}
	for k, v := range map[string]string{"local": "127.0.0.1:8080", "remote": "10.0.0.2:8080",
		"container_id": idA, "container_name": "web", "status": "active", "reason": ""} {
		if got[k] != v {
			t.Errorf("%s is %q, want %q", k, got[k], v)
		}
	}
}

// What clients wait for: every open forward of which something can be known.
func TestStateUnlooked(t *testing.T) {
	d := newDriver(t, plainConfig(), 9)
	busy(4, syscall.EADDRINUSE)(d)
	list := []container{ctr(idA, "web", "1", "2"), frozen(ctr(idB, "db", "3")), ctr(strings.Repeat("c", 12), "busy", "4"),
		unprobed(ctr(strings.Repeat("d", 12), "shy", "5"))}
	lists(list...)(d)
	d.plan()
	since := d.now.Add(time.Second)
	is := func(want string) {
		t.Helper()
		d.plan()
		var texts []string
		for _, f := range d.unlooked(since) {
			texts = append(texts, keyText(f.key))
		}
		slices.Sort(texts)
		if got := strings.Join(texts, " "); got != want {
			t.Errorf("not looked at: %q, want %q", got, want)
		}
	}
	is("1 2")
	probes("1", probeAnswered)(d) // began before
	is("1 2")
	d.now = since
	d.lookAgain(since, "")
	d.plan()
	probes("1", probeAnswered)(d)
	is("2")
	probes("2", probeUnknown)(d) // the first, which is no word
	is("2")
	d.now = since.Add(time.Second)
	d.plan()
	probes("2", probeSilent)(d)
	is("")
	down(d)
	is("") // nothing can be known
	lists(list...)(d)
	is("1 2")
}

// engineChurn is one life of a container, as the engine tells it.
func engineChurn(d *driver, n int) {
	id := fmt.Sprintf("%064x", n)
	event := func(action string) {
		ev, ok := decodeEvent([]byte(fmt.Sprintf(`{"status":%q,"id":%q,"Type":"container","Action":%[1]q,"Actor":{"ID":%[2]q}}`, action, id)))
		if !ok {
			d.t.Fatalf("event %s of %s not understood", action, id)
		}
		switch ev.action {
		case "start":
			d.startedNow(d.now, ev.id)
		case "die":
			d.diedNow(d.now, ev.id)
		}
	}
	list := func(running bool) {
		text := "[]"
		if running {
			text = fmt.Sprintf(`[{"Id":%q,"Names":["/c%d"],"State":"running","Ports":[
				{"IP":"0.0.0.0","PrivatePort":80,"PublicPort":%d,"Type":"tcp"},{"IP":"::","PrivatePort":80,"PublicPort":%[3]d,"Type":"tcp"},
				{"IP":"0.0.0.0","PrivatePort":53,"PublicPort":53,"Type":"udp"}]}]`, id, n, 1024+n%50000)
		}
		l, err := decodeList(strings.NewReader(text))
		if err != nil {
			d.t.Fatal(err)
		}
		d.listed(d.now, l)
	}
	text := strconv.Itoa(1024 + n%50000)
	settle := func() {
		d.plan()
		for k, numbers := range d.numbers {
			d.probeDone(d.now, k, numbers[0], probeAnswered)
			delete(d.numbers, k)
		}
		d.plan()
		d.notes = nil
		d.now = d.now.Add(10 * time.Millisecond)
	}
	event("start")
	list(true)
	settle()
	if d.shown() != text+" active" {
		d.t.Fatalf("shown %q with container %d up", d.shown(), n)
	}
	event("die")
	list(true) // still shown
	settle()
	if d.shown() != "" {
		d.t.Fatalf("shown %q with container %d dead", d.shown(), n)
	}
	list(false)
	settle()
}

func TestStateChurn(t *testing.T) {
	d := newDriver(t, plainConfig(), 2)
	for n := range 1000 {
		engineChurn(d, n)
	}
	goroutines, size := runtime.NumGoroutine(), heapSize()
	for n := 1000; n < 10000; n++ {
		engineChurn(d, n)
	}
	if n := len(d.forwards) + len(d.died) + len(d.list) + len(d.skipped) + len(d.notes) + d.probes + len(d.open); n != 0 {
		t.Errorf("left over: %d forwards, %d dead, %d containers, %d skipped, %d notes, %d probes, %d open",
			len(d.forwards), len(d.died), len(d.list), len(d.skipped), len(d.notes), d.probes, len(d.open))
	}
	if n := runtime.NumGoroutine(); n > goroutines {
		t.Errorf("%d goroutines, %d before", n, goroutines)
	}
	if now := heapSize(); now > size+1<<20 {
		t.Errorf("heap grew from %d to %d bytes", size, now)
	}
}

func heapSize() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// Deaths without end, and not one list: what is remembered of them is bounded.
func TestStateDeathsWithoutLists(t *testing.T) {
	d := newDriver(t, plainConfig(), 2)
	up(ctr(idA, "web", "8080"), "8080")(d)
	size := heapSize()
	for n := range 1_000_000 {
		if d.diedNow(d.now, strconv.Itoa(100_000_000_000+n)); len(d.died) > maxContainer {
			t.Fatalf("%d deaths are remembered after %d", len(d.died), n+1)
		}
	}
	if now := heapSize(); now > size+8<<20 {
		t.Errorf("heap grew from %d to %d bytes", size, now)
	}
	dies(idA)(d)
	lists(ctr(idA, "web", "8080"))(d) // the newest counts all the same
	if acts, _ := d.plan(); acts != "close 8080" {
		t.Errorf("after a death that nobody listed: %q, want the port closed", acts)
	}
	if lists()(d); len(d.died) != 0 {
		t.Errorf("%d deaths are remembered after a list without the dead", len(d.died))
	}
}

// What follows is the core at random, with the loop's part in what becomes of
// it: a simulated engine, link and clients, of which anything may happen at any
// time, and what has to hold all the while and once everything has calmed down.

// simContainer is a container of the simulated engine.
type simContainer struct {
	container
	running bool
	serves  bool // its service does, while it runs
	lives   int
	started time.Time
	zombie  time.Time // dead, and listed until then
}

func (c *simContainer) remote() netip.AddrPort {
	return netip.AddrPortFrom(dialable(c.ports[0].ip), c.ports[0].public)
}

// simEvent is something that is going to happen.
type simEvent struct {
	at time.Time
	n  int // order of those at the same time
	do func()
}

type simulation struct {
	*runner
	rng     *rand.Rand
	now     time.Time
	wake    time.Time  // when the loop has to look again
	coming  []simEvent // in order
	n       int
	trouble []string

	// The remote host.
	made    []simContainer
	upUntil map[netip.AddrPort]time.Time // when a service last was there that is there no more
	forbids netip.AddrPort               // where the SSH server lets nobody

	// The way there.
	offline    bool
	dead       bool      // the link is, and nobody knows yet
	lossUntil  time.Time // nothing gets through
	subscribed bool
	listing    bool
	eventsAt   time.Time            // when the last event arrives; they stay in order
	eventOf    map[string]time.Time // when the last of a container arrived, or was believed still
	probing    int                  // by this link
	readyAt    time.Time            // its first list came

	// This machine.
	opened map[netip.AddrPort]key
	taken  map[netip.AddrPort]bool // by others
	met    map[key][3]time.Time    // when it was last told that something answers, nobody does, it is forbidden
	asked  []simQuestion
}

// simQuestion is a client that wants to know what is verified from then on.
type simQuestion struct {
	since  time.Time
	answer chan reply
}

// after has do happen within the time given.
func (w *simulation) after(most time.Duration, do func()) {
	w.at(w.now.Add(time.Duration(w.rng.Int64N(int64(most)+1))), do)
}

func (w *simulation) at(at time.Time, do func()) {
	w.n++
	e := simEvent{at, w.n, do}
	i, _ := slices.BinarySearchFunc(w.coming, e, func(a, b simEvent) int {
		return cmp.Or(a.at.Compare(b.at), cmp.Compare(a.n, b.n))
	})
	w.coming = slices.Insert(w.coming, i, e)
}

// ofLink is after for what comes over the link: it is held up while packets are
// lost, and lost with the link.
func (w *simulation) ofLink(most time.Duration, do func()) {
	l := w.link
	var arrive func()
	arrive = func() {
		switch {
		case w.link != l || w.dead:
		case w.now.Before(w.lossUntil):
			w.at(w.lossUntil, arrive)
		default:
			do()
		}
	}
	w.after(most, arrive)
}

func (w *simulation) wrong(format string, args ...any) {
	w.trouble = append(w.trouble, fmt.Sprintf("+%v: ", w.now.Sub(epoch))+fmt.Sprintf(format, args...))
}

// runUntil lets everything happen that is due by then.
func (w *simulation) runUntil(until time.Time) {
	for w.step(); ; w.step() {
		next := until
		if w.wake.After(w.now) && w.wake.Before(next) {
			next = w.wake
		}
		if len(w.coming) > 0 && !w.coming[0].at.After(next) {
			e := w.coming[0]
			w.coming = w.coming[1:]
			w.now = e.at
			e.do()
			continue
		}
		if w.now = next; next.Equal(until) {
			return
		}
	}
}

// step is the loop's, but for what it has done elsewhere.
func (w *simulation) step() {
	for range len(w.tasks) {
		(<-w.tasks)(w.now)
	}
	if w.link == nil && !w.retryAt.After(w.now) {
		w.connect()
	}
	w.ring(w.now)
	w.lookForWaiting(w.now)
	w.wake = time.Time{}
	until := func(t time.Time) {
		if !t.IsZero() && (w.wake.IsZero() || t.Before(w.wake)) {
			w.wake = t
		}
	}
	for rounds := 0; ; rounds++ {
		acts, due := w.state.plan(w.now)
		if len(acts) == 0 {
			until(due)
			break
		} else if rounds == 100 {
			w.wrong("never settles: %v", acts)
			break
		}
		w.carryOut(acts)
	}
	w.state.notes = nil
	until(w.answerWaiting(w.now))
	if w.link == nil {
		until(w.retryAt)
	} else {
		until(w.link.listDue)
		until(w.link.wakeBy)
		if w.link.ctx.Err() != nil && !w.dead { // the loop ended it
			w.lose(errors.New("ended"))
		}
		if !w.listing && len(w.link.relist) > 0 {
			<-w.link.relist
			w.list()
		}
	}
	w.check()
}

// check is what has to hold at any time once all was done that was to be done.
func (w *simulation) check() {
	s := w.state
	if s.probes < 0 || s.probes > s.probeMax {
		w.wrong("%d probes counted", s.probes)
	}
	for id := range s.died {
		w.eventOf[id] = w.now
	}
	if shown := s.sorted(); !slices.Equal(shown, slices.SortedFunc(maps.Values(s.forwards), byAge)) {
		w.wrong("%d of %d forwards, or not in order", len(shown), len(s.forwards))
	}
	for _, k := range w.opened {
		if f := s.forwards[k]; f == nil || !f.wanted || s.paused || !f.stage.open() {
			w.wrong("%s listens and should not", keyText(k))
		}
	}
	for k, f := range s.forwards {
		isOpen := w.opened[k.local] == k
		met := w.met[k]
		switch {
		case f.key != k:
			w.wrong("forward %v filed under %v", f.key, k)
		case f.stage.open() != isOpen:
			w.wrong("%s is at stage %v, and open is %v", keyText(k), f.stage, isOpen)
		case f.status != active && f.status != conflict && f.status != pending:
			w.wrong("%s has status %q", keyText(k), f.status)
		case (f.status == active) != (f.reason == ""):
			w.wrong("%s is %s with reason %q", keyText(k), f.status, f.reason)
		case f.reason != printable(f.reason, 1000):
			w.wrong("%s has a reason that cannot be printed: %q", keyText(k), f.reason)
		case f.updated.Before(f.created):
			w.wrong("%s was updated before it was created", keyText(k))
		case f.status == active && (!isOpen || w.link == nil || !s.ready || f.want.paused):
			w.wrong("%s is active and cannot be: open %v, link %v, ready %v, paused %v", keyText(k), isOpen, w.link != nil, s.ready, f.want.paused)
		case f.status == active && !f.noProbe && (met[0].Before(f.created) || met[0].Before(w.readyAt) || f.verified.Before(f.created)):
			w.wrong("%s is active, and nothing answered on this link; verified %v", keyText(k), f.verified)
		case f.reason == reasonSilent && (met[1].Before(f.created) || met[1].Before(w.readyAt)):
			w.wrong("%s is said to be silent, and nothing told so on this link", keyText(k))
		case f.reason == reasonRefused && met[2].Before(w.readyAt):
			w.wrong("%s is said to be forbidden, and nothing told so on this link", keyText(k))
		}
		for i := range w.made {
			// A list that was asked for after the start shows who it was that started.
			c := &w.made[i]
			if w.link != nil && f.wanted && f.id == c.id && c.running && len(c.nets) > 0 && !w.link.listedAt.Before(c.started) && f.created.Before(c.started) {
				w.wrong("%s was created at +%v, and %s started at +%v", keyText(k), f.created.Sub(epoch), c.name, c.started.Sub(epoch))
			}
		}
	}
	w.asked = slices.DeleteFunc(w.asked, func(q simQuestion) bool {
		select {
		case a := <-q.answer:
			if a.err == nil {
				w.checkAnswer(q.since, a.result.(*snapshot))
			}
			return true
		default:
			if w.now.Sub(q.since) > lookTimeout {
				w.wrong("a client waits longer than %v", lookTimeout)
			}
			return false
		}
	})
}

// checkAnswer is what has to hold of what a client is told that asked at since.
func (w *simulation) checkAnswer(since time.Time, snap *snapshot) {
	if snap.Connection.State != connected {
		return
	}
	var list []container
	for _, c := range w.made {
		// A death may be told of after the list that showed the next life.
		if c.running && c.started.Before(since) && w.now.Sub(w.eventOf[c.id]) > 100*time.Millisecond {
			list = append(list, c.container)
		}
	}
	missing, _ := desired(list, w.state.cfg)
	for _, f := range snap.Forwards {
		k := key{netip.AddrPortFrom(addrOf(f.LocalAddress), f.LocalPort), netip.AddrPortFrom(addrOf(f.RemoteAddress), f.RemotePort)}
		delete(missing, k)
		// What a connection carries arrives a moment after it was sent.
		if f.Status == active && !w.state.forwards[k].noProbe && !w.servedSince(k.remote, since.Add(-30*time.Millisecond)) {
			w.wrong("%s is active for one who asked at +%v, and nobody was there since", keyText(k), since.Sub(epoch))
		}
	}
	for k := range missing {
		w.wrong("%s is not told of to one who asked at +%v", keyText(k), since.Sub(epoch))
	}
}

// server is who serves at an address of the remote host, nil where nobody does.
func (w *simulation) server(remote netip.AddrPort) *simContainer {
	for i := range w.made {
		if c := &w.made[i]; c.running && c.serves && c.remote() == remote {
			return c
		}
	}
	return nil
}

// servedSince reports whether somebody was there at any time since.
func (w *simulation) servedSince(remote netip.AddrPort, since time.Time) bool {
	return w.server(remote) != nil || !w.upUntil[remote].Before(since)
}

// look is what a connection meets.
func (w *simulation) look(k key) probeResult {
	switch {
	case w.forbids == k.remote:
		return probeForbidden
	case w.server(k.remote) != nil:
		return probeAnswered
	}
	return probeSilent
}

// told notes what the core is told of a forward.
func (w *simulation) told(k key, result probeResult) {
	if result != probeUnknown {
		met := w.met[k]
		met[result-probeAnswered] = w.now
		w.met[k] = met
	}
}

func (w *simulation) carryOut(acts []action) {
	opens := false
	for _, a := range acts {
		k := a.want.key
		switch a.verb {
		case openPort:
			opens = true
			w.state.openDone(w.now, k, w.open(k))
		case closePort:
			if w.opened[k.local] != k || opens {
				w.wrong("%s is to be closed: open is %v, after an open %v", keyText(k), w.opened[k.local], opens)
			}
			delete(w.opened, k.local)
		case probePort:
			w.probe(a)
		case findOwner:
			w.after(100*time.Millisecond, func() { w.state.ownerFound(k, "held by somebody, pid 1", 0) })
		}
	}
}

func (w *simulation) open(k key) error {
	if by, is := w.opened[k.local]; is {
		w.wrong("%s opened while %s has the port", keyText(k), keyText(by))
	}
	switch {
	case w.taken[k.local]:
		return syscall.EADDRINUSE
	case k.local.Port() < 1024:
		return fmt.Errorf("binding: %w", syscall.EACCES)
	case w.rng.IntN(50) == 0:
		return errors.New("in a bad mood")
	}
	w.opened[k.local] = k
	return nil
}

// probe looks, and tells what it saw while the link is the loop's; where packets
// are lost meanwhile it sees nothing.
func (w *simulation) probe(a action) {
	k, l, began := a.want.key, w.link, w.now
	if f := w.state.forwards[k]; l == nil || a.want.noProbe && !f.suspect || a.want.paused {
		w.wrong("%s is to be probed: link %v, noProbe %v, paused %v", keyText(k), l != nil, a.want.noProbe, a.want.paused)
		return
	}
	if w.probing++; w.probing > w.state.probeMax {
		w.wrong("%d probes at once", w.probing)
	}
	most := []time.Duration{2 * time.Millisecond, 300 * time.Millisecond}[w.rng.IntN(2)]
	w.after(most, func() {
		result := w.look(k)
		if w.dead || w.link != l {
			result = probeUnknown
		}
		tell := func() {
			l.tell(func(now time.Time) {
				w.probing--
				w.told(k, result)
				w.state.probeDone(now, k, a.probe, result)
			})
		}
		w.after(50*time.Millisecond, func() {
			if began.Before(w.lossUntil) || w.rng.IntN(20) == 0 {
				result = probeUnknown
				w.at(began.Add(probeTimeout), tell)
				return
			}
			tell()
		})
	})
}

// visit is a client's connection to a port, and what the loop is told of it,
// which may be after the link is lost.
func (w *simulation) visit(k key) {
	l, began := w.link, w.now
	if !w.state.ready {
		return // it waits
	}
	w.after(20*time.Millisecond, func() {
		if w.link != l || w.dead || began.Before(w.lossUntil) {
			return // it is reset
		}
		result, met := w.look(k), w.now
		early := w.rng.IntN(5) == 0
		w.at(w.now.Add(5*time.Millisecond), func() { // in the order in which they met what they met
			f := w.state.forwards[k]
			if f == nil || w.opened[k.local] != k {
				return // its port was closed, and opened anew perhaps
			}
			if early { // the service has nothing to say, or the server too many channels
				w.state.suspected(w.now, k)
				return
			}
			if w.state.ready {
				w.told(k, result)
			}
			if result == probeAnswered {
				w.state.answered(w.now, k)
				return
			}
			w.state.suspected(w.now, k)
			created := f.created
			w.at(w.now.Add(6*time.Second), func() {
				if w.state.forwards[k] == f && w.link == l && !w.dead && began.After(w.lossUntil) && f.created.Equal(created) && !w.servedSince(k.remote, met) && f.status == active {
					w.wrong("%s is active long after a connection met nobody there", keyText(k))
				}
			})
		})
	})
}

// list asks for a list.
func (w *simulation) list() {
	l, began := w.link, w.now
	w.listing = true
	w.ofLink(5*time.Millisecond, func() {
		list := []container{}
		for _, i := range w.rng.Perm(len(w.made)) {
			if c := &w.made[i]; c.running || c.zombie.After(w.now) {
				list = append(list, c.container)
			}
		}
		w.ofLink(20*time.Millisecond, func() {
			l.tell(func(now time.Time) {
				if w.listing = false; !w.state.ready {
					w.readyAt = now
				}
				w.listed(now, l, list, began, now.Sub(began), "Docker")
			})
			if w.eventsAt.IsZero() {
				w.follow()
			}
		})
	})
}

// follow subscribes to events.
func (w *simulation) follow() {
	l := w.link
	w.eventsAt = w.now
	w.ofLink(50*time.Millisecond, func() {
		w.subscribed = true
		l.tell(func(now time.Time) { w.following(now, l) })
	})
}

// emit emits an event of the engine, unless it gets lost.
func (w *simulation) emit(action, id string) {
	if w.link == nil || !w.subscribed || w.rng.IntN(8) == 0 {
		return
	}
	l := w.link
	w.eventsAt = latest(w.eventsAt, w.now.Add(time.Duration(w.rng.Int64N(int64(20*time.Millisecond)))))
	w.at(w.eventsAt, func() {
		if w.link == l && !w.dead {
			w.ofLink(0, func() {
				l.tell(func(now time.Time) {
					w.eventOf[id] = now
					w.happened(now, l, event{action, id})
				})
			})
		}
	})
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// connect is an attempt at a connection.
func (w *simulation) connect() {
	l := handLink(w.runner)
	w.link, w.retryAt, w.dead = l, time.Time{}, w.offline
	w.subscribed, w.listing, w.eventsAt, w.probing, w.readyAt = false, false, time.Time{}, 0, time.Time{}
	if w.offline {
		w.after(time.Second, func() { w.lose(errors.New("no way")) })
		return
	}
	w.list()
}

// lose ends the link; the loop hears of it a moment later.
func (w *simulation) lose(why error) {
	l := w.link
	if l == nil {
		return
	}
	w.dead = true
	w.after(100*time.Millisecond, func() {
		if w.link == l {
			l.cancel()
			w.down(w.now, l, why)
			w.retryAt = w.now.Add(time.Duration(w.rng.Int64N(int64(2 * time.Second)))) // by our own dice
		}
	})
}

// startOne starts a container, if what it publishes is free.
func (w *simulation) startOne(c *simContainer) {
	for _, o := range w.made {
		if o.running && o.remote() == c.remote() {
			return
		}
	}
	c.zombie, c.running, c.paused, c.serves = time.Time{}, true, false, w.rng.IntN(3) > 0
	c.lives++
	c.started = w.now
	if c.nets != nil { // unlike those of podman
		c.container = joined(c.container, fmt.Sprintf("%s-%d-1", c.name, c.lives), fmt.Sprintf("%s-%d-2", c.name, c.lives))
	}
	w.emit("start", c.id)
}

func (w *simulation) stopOne(c *simContainer) {
	if !c.running {
		return
	}
	w.serve(c, false)
	c.running = false
	if w.rng.IntN(2) == 0 {
		c.zombie = w.now.Add(100 * time.Millisecond)
	}
	w.emit("die", c.id)
}

// serve begins or ends the service in a container.
func (w *simulation) serve(c *simContainer, serves bool) {
	if c.running && c.serves && !serves {
		w.upUntil[c.remote()] = w.now
	}
	c.serves = serves
}

func (w *simulation) somethingHappens() {
	c := &w.made[w.rng.IntN(len(w.made))]
	switch n := w.rng.IntN(120); {
	case n < 25:
		w.startOne(c)
	case n < 35:
		w.stopOne(c)
	case n < 45:
		w.stopOne(c)
		w.startOne(c)
	case n < 60:
		w.serve(c, !c.serves)
		if w.rng.IntN(3) == 0 {
			w.emit("health_status", c.id)
		}
	case n < 80:
		if f := w.state.sorted(); len(f) > 0 {
			if k := f[w.rng.IntN(len(f))].key; w.opened[k.local] == k {
				w.visit(k)
			}
		}
	case n < 84:
		if c.running {
			c.paused = !c.paused
			w.emit(map[bool]string{true: "pause", false: "unpause"}[c.paused], c.id)
		}
	case n < 87:
		if c.running && len(c.nets) > 1 { // one of its networks is left
			c.nets = c.nets[1:]
			w.emit("update", c.id)
		}
	case n < 91:
		local := netip.AddrPortFrom(loopback4, uint16(8000+w.rng.IntN(4)))
		if _, held := w.opened[local]; w.taken[local] {
			delete(w.taken, local)
		} else if !held {
			w.taken[local] = true
		}
	case n < 94:
		w.state.configure(w.now, w.anyConfig())
	case n < 97:
		w.state.pause(w.now, !w.state.paused)
	case n < 99:
		w.lose(errors.New("lost"))
	case n < 101:
		w.offline = !w.offline
	case n < 105:
		w.lossUntil = w.now.Add(time.Duration(w.rng.Int64N(int64(4 * time.Second))))
	case n < 107 && w.link != nil: // ssh finds out in the end
		l := w.link
		w.dead = true
		w.at(w.now.Add(9*time.Second), func() {
			if w.link == l {
				w.lose(errors.New("dead"))
			}
		})
		if w.rng.IntN(2) == 0 {
			w.woke(w.now)
		}
	case n < 109 && w.link != nil:
		w.woke(w.now)
	case n < 111 && w.subscribed: // the stream of events ends and is taken up again
		w.subscribed = false
		w.ofLink(300*time.Millisecond, w.follow)
	default:
		w.ask()
	}
}

// ask is a client that wants to know how it is.
func (w *simulation) ask() {
	q := simQuestion{w.now, make(chan reply, 1)}
	w.asked = append(w.asked, q)
	w.request(w.now, "verify", q.answer)
}

func (w *simulation) anyConfig() *config {
	var cfg config
	if w.rng.IntN(2) == 0 {
		cfg.mapped = map[uint16]uint16{8000: 8001, 8002: uint16(8000 + w.rng.IntN(4)), 8003: 80}
	}
	if w.rng.IntN(3) == 0 {
		cfg.skip = []portRange{{8001, 8001}}
	}
	if w.rng.IntN(4) == 0 {
		cfg.only = []portRange{{8000, 8002}}
	}
	if w.rng.IntN(4) == 0 {
		cfg.noProbe = []portRange{{8002, 8003}}
	}
	return configOn(loopback4, cfg)
}

// calm checks what has to hold when nothing has happened for a while. Before
// anybody looks, what is active may be so no more.
func (w *simulation) calm(looked bool) {
	var list []container
	for _, c := range w.made {
		if c.running {
			list = append(list, c.container)
		}
	}
	wants, _ := desired(list, w.state.cfg)
	for k, f := range w.state.forwards {
		if _, ok := wants[k]; !ok {
			w.wrong("%s is left over: wanted %v, stage %v", keyText(k), f.wanted, f.stage)
		}
	}
	for k, c := range wants {
		f := w.state.forwards[k]
		if f == nil {
			w.wrong("%s is missing", keyText(k))
			continue
		}
		by, isOpen := w.opened[k.local]
		status, reason := pending, "*"
		switch {
		case w.state.paused:
			reason = reasonPaused
		case w.taken[k.local] || k.local.Port() < 1024:
			status = conflict
		case !isOpen:
			w.wrong("nobody has %s", k.local)
			continue
		case by != k:
			status, reason = conflict, fmt.Sprintf("%s is taken by %s*", k.local, wants[by].who())
		case c.paused:
			reason = reasonFrozen
		case f.status == active && (c.noProbe || !looked):
			continue
		case c.noProbe && f.reason == reasonSilent: // so a connection found, and checked above
			continue
		default:
			switch w.look(k) {
			case probeAnswered:
				status, reason = active, ""
			case probeSilent:
				reason = reasonSilent
			case probeForbidden:
				reason = reasonRefused
			}
		}
		if f.status != status || !matches(reason, f.reason) || f.want != c {
			w.wrong("%s is %s %q of %s, want %s %q of %s", keyText(k), f.status, f.reason, f.who(), status, reason, c.who())
		}
	}
	if len(w.state.died) != 0 || w.state.probes > w.probing || len(w.waiting)+len(w.asked) != 0 {
		w.wrong("%d remembered as dead, %d probes counted with %d under way, %d clients wait", len(w.state.died), w.state.probes, w.probing, len(w.waiting))
	}
}

func newSimulation(t *testing.T, seed uint64) *simulation {
	w := &simulation{runner: loopOf(t), rng: rand.New(rand.NewPCG(seed, 41)), now: epoch,
		upUntil: make(map[netip.AddrPort]time.Time), eventOf: make(map[string]time.Time), opened: make(map[netip.AddrPort]key),
		taken: make(map[netip.AddrPort]bool), met: make(map[key][3]time.Time)}
	w.state.probeMax, w.retry = 3, true
	w.forbids = netip.MustParseAddrPort("10.0.0.2:8001")
	for i := range 10 {
		ip := []string{"0.0.0.0", "10.0.0.2", "::1"}[w.rng.IntN(3)]
		a := netip.AddrPortFrom(netip.MustParseAddr(ip), uint16(8000+w.rng.IntN(4)))
		c := simContainer{container: ctr(fmt.Sprintf("%012x", i+1), fmt.Sprintf("c%d", i), a.String())}
		if c.rules.noProbe = w.rng.IntN(6) == 0; w.rng.IntN(6) > 0 {
			c.nets = []network{}
		}
		w.made = append(w.made, c)
	}
	return w
}

func TestStateAtRandom(t *testing.T) {
	for seed := uint64(1); seed <= 60; seed++ {
		w := newSimulation(t, seed)
		for round := range 4 {
			for range 80 {
				w.somethingHappens()
				w.runUntil(w.now.Add(time.Duration(w.rng.Int64N(int64(200 * time.Millisecond)))))
			}
			w.offline = false
			w.state.pause(w.now, round == 2)
			w.runUntil(w.now.Add(2 * time.Minute))
			w.calm(false)
			w.ask()
			w.runUntil(w.now.Add(lookTimeout + time.Second))
			w.calm(true)
		}
		if len(w.trouble) > 0 {
			t.Fatalf("seed %d:\n%s", seed, strings.Join(w.trouble[:min(len(w.trouble), 10)], "\n"))
		}
	}
}

// Tests of what is to be forwarded, where to, and what is not and why.

func TestDesired(t *testing.T) {
	const tooLittle = "SSH carries TCP only"
	p := func(ip string, public uint16, proto string) port {
		a, _ := netip.ParseAddr(ip)
		return port{a, 80, public, proto}
	}
	with := func(id string, ports ...port) container { return container{id: id, name: "n" + id[:1], ports: ports} }
	ruled := func(ru rules, ports ...port) container {
		c := with(idA, ports...)
		c.rules = ru
		return c
	}
	for _, c := range []struct {
		name    string
		cfg     config
		list    []container
		wants   string // sorted keys, each with its container
		skipped string // * stands for anything
	}{
		{name: "nothing"},
		{name: "no ports", list: []container{with(idA)}},
		{name: "wildcard, listed twice", list: []container{with(idA, p("0.0.0.0", 8080, "tcp"), p("::", 8080, "tcp"))}, wants: "8080 na"},
		{name: "wildcard, the other way round", list: []container{with(idA, p("::", 8080, "tcp"), p("0.0.0.0", 8080, "tcp"))}, wants: "8080 na"},
		{name: "IPv4 only", list: []container{with(idA, p("0.0.0.0", 8080, "tcp"))}, wants: "8080 na"},
		{name: "IPv6 only", list: []container{with(idA, p("::", 8080, "tcp"))}, wants: "8080>[::1]:8080 na"},
		{name: "one address", list: []container{with(idA, p("10.0.0.2", 8080, "tcp"))}, wants: "8080>10.0.0.2:8080 na"},
		{name: "loopback", list: []container{with(idA, p("127.0.0.1", 8080, "tcp"))}, wants: "8080 na"},
		{name: "IPv6 loopback", list: []container{with(idA, p("::1", 8080, "tcp"))}, wants: "8080>[::1]:8080 na"},
		{name: "one IPv6 address", list: []container{with(idA, p("2001:db8::1", 8080, "tcp"))}, wants: "8080>[2001:db8::1]:8080 na"},
		{name: "two addresses, one number", list: []container{with(idA, p("127.0.0.1", 8080, "tcp"), p("10.0.0.2", 8080, "tcp"))}, wants: "8080 na"},
		{name: "three addresses, one number", list: []container{with(idA, p("2001:db8::1", 8080, "tcp"), p("10.0.0.2", 8080, "tcp"), p("10.0.0.3", 8080, "tcp"))},
			wants: "8080>10.0.0.2:8080 na"},
		{name: "an address beside the wildcard", list: []container{with(idA, p("10.0.0.2", 8080, "tcp"), p("0.0.0.0", 8080, "tcp"))}, wants: "8080 na"},
		{name: "an IPv6 address beside the wildcard", list: []container{with(idA, p("2001:db8::1", 8080, "tcp"), p("::", 8080, "tcp"))}, wants: "8080>[::1]:8080 na"},
		{name: "an IPv4 address beside the IPv6 wildcard", list: []container{with(idA, p("::", 8080, "tcp"), p("10.0.0.2", 8080, "tcp"))}, wants: "8080>10.0.0.2:8080 na"},
		{name: "two addresses, two numbers", list: []container{with(idA, p("127.0.0.1", 8080, "tcp"), p("10.0.0.2", 8081, "tcp"))},
			wants: "8080 na; 8081>10.0.0.2:8081 na"},
		{name: "two addresses, one number, two container ports", list: []container{with(idA, p("127.0.0.1", 8080, "tcp"),
			port{netip.MustParseAddr("10.0.0.2"), 81, 8080, "tcp"})}, wants: "8080 na; 8080>10.0.0.2:8080 na"},
		{name: "two addresses, one number, one unknown", list: []container{with(idA, p("junk", 8080, "tcp"), p("10.0.0.2", 8080, "tcp"))},
			wants: "8080>10.0.0.2:8080 na"},
		{name: "random ports differ", list: []container{with(idA, p("0.0.0.0", 32768, "tcp"), p("::", 32769, "tcp"))}, wants: "32768 na; 32769>[::1]:32769 na"},
		{name: "random ports differ, and meet", list: []container{with(idB, p("0.0.0.0", 32769, "tcp"), p("::", 32768, "tcp")),
			with(idA, p("::", 32769, "tcp"), p("0.0.0.0", 32770, "tcp"))}, wants: "32768>[::1]:32768 nb; 32769 nb; 32770 na",
			skipped: "na 32769/tcp published on :: only, and 127.0.0.1:32769 leads to what is published on IPv4"},
		{name: "random ports differ, and meet in an older container", list: []container{with(idB, p("0.0.0.0", 32768, "tcp"), p("::", 32769, "tcp")),
			with(idA, p("0.0.0.0", 32769, "tcp"), p("::", 32770, "tcp"))}, wants: "32768 nb; 32769 na; 32770>[::1]:32770 na",
			skipped: "nb 32769/tcp published on :: only, and 127.0.0.1:32769 leads to what is published on IPv4"},
		{name: "IPv4 that is not forwarded leaves its number to ::", cfg: config{skip: []portRange{{80, 80}}, mapped: map[uint16]uint16{8080: 80}},
			list: []container{with(idA, p("0.0.0.0", 80, "tcp")), with(idB, p("::", 8080, "tcp"))}, wants: "80>[::1]:8080 nb", skipped: "na 80/tcp *skip"},
		{name: "UDP and SCTP, once", list: []container{with(idA, p("0.0.0.0", 53, "udp"), p("::", 53, "udp"), p("::", 54, "sctp"))},
			skipped: "na 53/udp " + tooLittle + "; na 54/sctp " + tooLittle},
		{name: "UDP and TCP of one number", list: []container{with(idA, p("0.0.0.0", 53, "udp"), p("0.0.0.0", 53, "tcp"))},
			wants: "53 na", skipped: "na 53/udp " + tooLittle},
		{name: "no address", list: []container{with(idA, p("junk", 80, "tcp"))}, skipped: "na 80/tcp published on an invalid address"},
		{name: "a label that maps", list: []container{ruled(rules{mapped: map[uint16]uint16{8080: 9090}}, p("0.0.0.0", 8080, "tcp"))}, wants: "9090>8080 na"},
		{name: "a label that maps the container's own port", list: []container{ruled(rules{mapped: map[uint16]uint16{80: 9090}}, p("0.0.0.0", 32768, "tcp"))},
			wants: "9090>32768 na"},
		{name: "a label that maps one published port and not the container's own of another", list: []container{ruled(rules{mapped: map[uint16]uint16{80: 9090}},
			p("0.0.0.0", 80, "tcp"), p("0.0.0.0", 8080, "tcp"))}, wants: "8080 na; 9090>80 na"},
		{name: "a label that maps what is not published", list: []container{ruled(rules{mapped: map[uint16]uint16{81: 9090}}, p("0.0.0.0", 8080, "tcp"))},
			wants: "8080 na", skipped: "na 81/tcp its label rdhpf.map names this port, which it does not publish"},
		{name: "a label and -map that agree", cfg: config{mapped: map[uint16]uint16{8080: 9090}},
			list: []container{ruled(rules{mapped: map[uint16]uint16{8080: 9090}}, p("0.0.0.0", 8080, "tcp"))}, wants: "9090>8080 na"},
		{name: "a label and -map that contradict", cfg: config{mapped: map[uint16]uint16{8080: 9091}},
			list:    []container{ruled(rules{mapped: map[uint16]uint16{80: 9090}}, p("0.0.0.0", 8080, "tcp"))},
			skipped: "na 8080/tcp -map has 8080=9091, and its label rdhpf.map 9090"},
		{name: "a label that skips", list: []container{ruled(rules{skip: true}, p("0.0.0.0", 8080, "tcp")), with(idB, p("0.0.0.0", 8080, "tcp"))}, wants: "8080 nb",
			skipped: "na 8080/tcp excluded by its label rdhpf.skip"},
		{name: "a label that is wrong", list: []container{ruled(rules{wrong: "wrong"}, p("0.0.0.0", 8080, "tcp"))}, skipped: "na 8080/tcp wrong"},
		{name: "tasks of one service on two nodes", list: []container{{id: idA, name: "na", node: "n1", ports: []port{p("10.0.0.2", 80, "tcp")}},
			{id: idB, name: "nb", node: "n2", ports: []port{p("10.0.0.3", 80, "tcp")}}}, wants: "80>10.0.0.2:80 na; 80>10.0.0.3:80 nb"},
		{name: "task on a node without an address", list: []container{{id: idA, name: "na", node: "n1", ports: []port{{private: 80, public: 80, proto: "tcp"}}}},
			skipped: "na 80/tcp published on an invalid address"},
		{name: "host network", list: []container{{id: idA, name: "na", hostNet: true}}, skipped: "na 0/tcp host network: the container publishes no ports"},
		{name: "one local port, two addresses", list: []container{with(idA, p("10.0.0.2", 80, "tcp")), with(idB, p("10.0.0.3", 80, "tcp"))},
			wants: "80>10.0.0.2:80 na; 80>10.0.0.3:80 nb"},
		{name: "mapped", cfg: config{mapped: map[uint16]uint16{80: 8080}}, list: []container{with(idA, p("0.0.0.0", 80, "tcp"), p("0.0.0.0", 81, "tcp"))},
			wants: "8080>80 na; 81 na"},
		{name: "skip", cfg: config{skip: []portRange{{80, 82}, {90, 90}}}, list: []container{with(idA, p("0.0.0.0", 79, "tcp"), p("0.0.0.0", 80, "tcp"),
			p("0.0.0.0", 82, "tcp"), p("0.0.0.0", 83, "tcp"), p("0.0.0.0", 90, "tcp"))},
			wants: "79 na; 83 na", skipped: "na 80/tcp *skip; na 82/tcp *skip; na 90/tcp *skip"},
		{name: "only", cfg: config{only: []portRange{{80, 82}}}, list: []container{with(idA, p("0.0.0.0", 79, "tcp"), p("0.0.0.0", 80, "tcp"), p("::", 80, "tcp"), p("::", 79, "tcp"))},
			wants: "80 na", skipped: "na 79/tcp *only"},
		{name: "skip wins over only, both over a mapping", cfg: config{only: []portRange{{80, 82}}, skip: []portRange{{81, 81}}, mapped: map[uint16]uint16{81: 82, 80: 1080}},
			list: []container{with(idA, p("0.0.0.0", 80, "tcp"), p("0.0.0.0", 81, "tcp"))}, wants: "1080>80 na", skipped: "na 81/tcp *skip"},
	} {
		t.Run(c.name, func(t *testing.T) {
			wants, skipped := desired(c.list, configOn(loopback4, c.cfg))
			if skipped == nil {
				t.Error("skipped is nil: it becomes null in JSON")
			}
			var got, not []string
			for k, w := range wants {
				got = append(got, keyText(k)+" "+w.name)
				if w.key != k || w.private != 80 && w.private != 81 {
					t.Errorf("%+v under key %v", w, k)
				}
			}
			for _, s := range skipped {
				not = append(not, fmt.Sprintf("%s %d/%s %s", s.Name, s.Port, s.Protocol, s.Reason))
			}
			slices.Sort(got)
			if g, n := strings.Join(got, "; "), strings.Join(not, "; "); g != c.wants || !matches(c.skipped, n) {
				t.Errorf("\n got %q, skipped %q\nwant %q, skipped %q", g, n, c.wants, c.skipped)
			}
		})
	}
}

// How the remote host reaches a container, and what tells that it was restarted.
func TestDesiredNetworks(t *testing.T) {
	web := ctr(idA, "web", "80")
	noAddr := joined(web, "e1", "e2")
	noAddr.nets[0].addr, noAddr.nets[0].gateway = netip.Addr{}, netip.Addr{}
	internal := joined(web, "e1", "e2")
	internal.nets[0].gateway = netip.Addr{}
	for _, c := range []struct {
		name string
		c    container
		want string // direct, gateway, only network, endpoints
	}{
		{"none is told", web, "invalid IP invalid IP false []"},
		{"one", joined(web, "e1"), "172.17.0.2 172.17.0.1 true [e1]"},
		{"two", joined(web, "e1", "e2"), "172.17.0.2 172.17.0.1 false [e1 e2]"},
		{"no address in the first", noAddr, "172.18.0.2 172.18.0.1 false [e1 e2]"},
		{"no gateway in the first", internal, "172.18.0.2 172.18.0.1 false [e1 e2]"},
	} {
		wants, _ := desired([]container{c.c}, plainConfig())
		for _, w := range wants {
			if got := fmt.Sprintf("%v %v %v [%s]", w.direct, w.gateway, w.onlyNet, w.endpoints); got != c.want {
				t.Errorf("%s: %s, want %s", c.name, got, c.want)
			}
		}
	}
}

func TestRestarted(t *testing.T) {
	for _, c := range []struct {
		before, now string
		want        bool
	}{
		{"", "", false}, {"", "a", false}, {"a", "", false}, {"a", "a", false}, {"a b", "b", false}, {"a", "a b", false}, {"a b", "b c", false},
		{"a", "b", true}, {"a b", "c", true}, {"a", "b c", true}, {"a", "ab", true},
	} {
		if got := restarted(c.before, c.now); got != c.want {
			t.Errorf("endpoints %q, then %q: restarted is %v, want %v", c.before, c.now, got, c.want)
		}
	}
}

// Two containers on one key, as a list may show that was made while one took
// over from the other: one forward, and always of the same.
func TestDesiredSameKey(t *testing.T) {
	list := []container{ctr(idB, "new", "80"), ctr(idA, "old", "80")}
	first, _ := desired(list, plainConfig())
	for range 20 {
		if again, _ := desired(list, plainConfig()); len(again) != 1 || !reflect.DeepEqual(first, again) {
			t.Fatalf("got %v, then %v", first, again)
		}
	}
	for _, w := range first {
		if w.name != "new" {
			t.Errorf("the forward is of %s, want the newest", w.who())
		}
	}
}

func TestDesiredBind(t *testing.T) {
	for _, bind := range []string{"127.0.0.2", "::1", "0.0.0.0"} {
		wants, _ := desired([]container{ctr(idA, "web", "80")}, configOn(netip.MustParseAddr(bind), config{}))
		k := key{netip.AddrPortFrom(netip.MustParseAddr(bind), 80), netip.MustParseAddrPort("127.0.0.1:80")}
		if _, ok := wants[k]; !ok || len(wants) != 1 {
			t.Errorf("bind %s: %v", bind, wants)
		}
	}
}

func TestDesiredNoProbe(t *testing.T) {
	cfg := configOn(loopback4, config{noProbe: []portRange{{80, 80}}, mapped: map[uint16]uint16{80: 1080}})
	wants, _ := desired([]container{ctr(idA, "web", "80", "81"), unprobed(ctr(idB, "db", "82"))}, cfg)
	for k, w := range wants {
		if want := k.remote.Port() != 81; w.noProbe != want {
			t.Errorf("%s: noProbe is %v, want %v", keyText(k), w.noProbe, want)
		}
	}
}

func TestParseRange(t *testing.T) {
	for _, c := range []struct {
		in   string
		want portRange // the zero range: an error
	}{
		{"80", portRange{80, 80}},
		{"1-65535", portRange{1, 65535}},
		{"8000-8000", portRange{8000, 8000}},
		{"", portRange{}},
		{"0", portRange{}},
		{"65536", portRange{}},
		{"-1", portRange{}},
		{"+80", portRange{}},
		{" 80", portRange{}},
		{"80-", portRange{}},
		{"80-90-100", portRange{}},
		{"90-80", portRange{}},
		{"http", portRange{}},
		{"99999999999999999999", portRange{}},
	} {
		if r, err := parseRange(c.in); r != c.want || (err == nil) != (c.want != portRange{}) {
			t.Errorf("parseRange(%q) = %v, %v, want %v", c.in, r, err, c.want)
		}
	}
}
