package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
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
// can happen; then at random against a simulated engine and master; and what it
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
	t    *testing.T
	now  time.Time
	seqs map[key][]int // of the probes so far
}

func newDriver(t *testing.T, cfg *config, probeMax int) *driver {
	return &driver{newState(cfg, probeMax), t, epoch, make(map[key][]int)}
}

func (d *driver) key(text string) key {
	d.t.Helper()
	for k := range d.forwards {
		if keyText(k) == text {
			return k
		}
	}
	for k := range d.seqs {
		if keyText(k) == text {
			return k
		}
	}
	d.t.Fatalf("no forward %s", text)
	return key{}
}

// plan returns what is to be done as one text, and how long until it has to be asked again.
func (d *driver) plan() (string, time.Duration) {
	acts, wake := d.state.plan(d.now)
	var texts []string
	opens := false
	for _, a := range acts {
		if a.verb == probePort {
			d.seqs[a.key] = append(d.seqs[a.key], a.seq)
		}
		if a.verb == openPort {
			opens = true
		} else if opens {
			d.t.Errorf("plan opens before %v", a)
		}
		texts = append(texts, [...]string{"nothing", "open", "close", "probe", "owner"}[a.verb]+" "+keyText(a.key))
	}
	if wake.IsZero() {
		return strings.Join(texts, "; "), 0
	}
	return strings.Join(texts, "; "), wake.Sub(d.now)
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
func opens(texts ...string) happening {
	return func(d *driver) {
		for _, text := range texts {
			d.openDone(d.now, d.key(text), nil)
		}
	}
}
func fails(text string, err error) happening {
	return func(d *driver) { d.openDone(d.now, d.key(text), err) }
}
func closes(texts ...string) happening {
	return func(d *driver) {
		for _, text := range texts {
			d.closeDone(d.key(text))
		}
	}
}

// probes delivers the outcome of the last probe but back.
func probes(text string, result probeResult, back ...int) happening {
	return func(d *driver) {
		k := d.key(text)
		seqs := d.seqs[k]
		i := len(seqs) - 1
		if len(back) > 0 {
			i -= back[0]
		}
		if i < 0 {
			d.t.Fatalf("%s was not probed so often", text)
		}
		d.probeDone(d.now, k, seqs[i], result)
	}
}
func owner(text, who string) happening {
	return func(d *driver) { d.ownerFound(d.now, d.key(text), who) }
}
func dies(id string) happening   { return func(d *driver) { d.diedNow(d.now, id) } }
func starts(id string) happening { return func(d *driver) { d.startedNow(id) } }
func pauses(p bool) happening    { return func(d *driver) { d.pause(d.now, p) } }
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

// up makes one container's port active, by the shortest way.
func up(c container, texts ...string) happening {
	return func(d *driver) {
		d.listed(d.now, []container{c})
		d.plan()
		opens(texts...)(d)
		d.plan()
		for _, text := range texts {
			probes(text, probeAnswered)(d)
		}
		d.plan()
		d.notes = nil
	}
}

// step is something that happens, and what comes of it.
type step struct {
	after time.Duration
	do    happening
	acts  string        // in order: "close 80; open 81"
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
	// busy5 makes five attempts at a busy port, the last being asked about.
	busy5 := func(d *driver) {
		d.listed(d.now, []container{web})
		for i := 0; i < 5; i++ {
			d.plan()
			fails("8080", inUse)(d)
			d.now = d.now.Add(time.Second)
		}
		d.now = d.now.Add(-time.Second)
		d.plan()
		owner("8080", "nginx, pid 4242")(d)
	}
	mapped := func(m map[uint16]uint16, skip, only []portRange) *config {
		return &config{loopback4, m, skip, only}
	}
	for _, c := range []struct {
		name  string
		steps []step
	}{
		{"open and probe", []step{
			{0, lists(web), "open 8080", "8080 pending probing", 0},
			{0, lists(web), "", "8080 pending probing", 0},
			{ms, opens("8080"), "probe 8080", "8080 pending probing", 0},
			{ms, lists(web), "", "8080 pending probing", 0},
			{300 * ms, probes("8080", probeAnswered), "", "8080 active", 0},
			{time.Hour, lists(web), "", "8080 active", 0},
			{0, lists(), "close 8080", "", 0},
			{0, closes("8080"), "", "", 0},
		}},
		{"busy port: five attempts, then looks", []step{
			{0, lists(web), "open 8080", "*", 0},
			{0, fails("8080", inUse), "", bindBusy, 100 * ms},
			{99 * ms, waits, "", bindBusy, ms},
			{ms, waits, "open 8080", bindBusy, 0},
			{0, fails("8080", inUse), "", bindBusy, 200 * ms},
			{200 * ms, waits, "open 8080", bindBusy, 0},
			{0, fails("8080", inUse), "", bindBusy, 400 * ms},
			{400 * ms, waits, "open 8080", bindBusy, 0},
			{0, fails("8080", inUse), "", bindBusy, 800 * ms},
			{800 * ms, waits, "open 8080", bindBusy, 0},
			{0, fails("8080", inUse), "owner 8080", givenUp, 2 * time.Second},
			{0, owner("8080", "nginx, pid 4242"), "", givenUp + " (held by nginx, pid 4242)", 2 * time.Second},
			{2 * time.Second, waits, "open 8080", givenUp + " (held by nginx, pid 4242)", 0},
			{0, fails("8080", inUse), "", givenUp + " (held by nginx, pid 4242)", 2 * time.Second},
			{2 * time.Second, waits, "open 8080", givenUp + " (held by nginx, pid 4242)", 0},
			{0, opens("8080"), "probe 8080", "8080 pending probing", 0},
			{0, probes("8080", probeAnswered), "", "8080 active", 0},
		}},
		{"busy for a moment", []step{
			{0, lists(web), "open 8080", "*", 0},
			{0, fails("8080", inUse), "", bindBusy, 100 * ms},
			{100 * ms, waits, "open 8080", bindBusy, 0},
			{0, opens("8080"), "probe 8080", "8080 pending probing", 0},
		}},
		{"nobody can tell who holds it", []step{
			{0, busy5, "", "*", 2 * time.Second},
			{0, owner("8080", ""), "", givenUp, 2 * time.Second},
		}},
		{"who held it is told too late", []step{
			{0, busy5, "", "*", 2 * time.Second},
			{2 * time.Second, waits, "open 8080", "*", 0},
			{0, all(opens("8080"), owner("8080", "late, pid 1")), "probe 8080", "8080 pending probing", 0},
		}},
		{"no right to bind", []step{
			{0, lists(ctr(idA, "web", "80")), "open 80", "*", 0},
			{0, fails("80", noRight), "", "80 conflict bind: permission denied (*-map 80=8080*)", 2 * time.Second},
			{2 * time.Second, waits, "open 80", "*", 0},
			{0, opens("80"), "probe 80", "80 pending probing", 0},
		}},
		{"no right to bind a mapped port: the hint is one that can be followed", []step{
			{0, all(reloads(mapped(map[uint16]uint16{60000: 80}, nil, nil)), lists(ctr(idA, "web", "60000"))), "open 80>60000", "*", 0},
			{0, fails("80>60000", noRight), "", "80>60000 conflict bind: permission denied (*-map 60000=8080*)", 2 * time.Second},
		}},
		{"no such local address", []step{
			{0, lists(web), "open 8080", "*", 0},
			{0, fails("8080", syscall.EADDRNOTAVAIL), "", "8080 conflict bind: *", 2 * time.Second},
		}},
		{"the master fails", []step{
			{0, lists(web), "open 8080", "*", 0},
			{0, fails("8080", errors.New("out of order")), "", "8080 pending out of order", 100 * ms},
			{100 * ms, waits, "open 8080", "8080 pending out of order", 0},
			{0, opens("8080"), "probe 8080", "8080 pending probing", 0},
		}},
		{"two keys want one local port", []step{
			{0, lists(web), "open 8080", "*", 0},
			{0, opens("8080"), "probe 8080", "*", 0},
			{0, probes("8080", probeAnswered), "", "8080 active", 0},
			{ms, lists(two...), "", "8080 active; 8080>10.0.0.2:8080 conflict *web (" + idA + ")*", 0},
			{time.Minute, lists(two[1], two[0]), "", "8080 active; 8080>10.0.0.2:8080 conflict *", 0},
			{ms, dies(idA), "close 8080", "8080>10.0.0.2:8080 conflict *", 0},
			{ms, closes("8080"), "open 8080>10.0.0.2:8080", "8080>10.0.0.2:8080 *", 0},
			{ms, opens("8080>10.0.0.2:8080"), "probe 8080>10.0.0.2:8080", "8080>10.0.0.2:8080 pending probing", 0},
			{ms, all(starts(idA), lists(two...)), "", "8080 conflict *db (" + idB + ")*; 8080>10.0.0.2:8080 pending probing", 0},
		}},
		{"two keys want one local port: the same after a reconnect", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{ms, lists(two...), "", "8080 active; 8080>10.0.0.2:8080 conflict *", 0},
			{ms, down, "", "8080 " + lost + "; 8080>10.0.0.2:8080 " + lost, 0},
			{ms, lists(two...), "open 8080", "*; 8080>10.0.0.2:8080 conflict *web (" + idA + ")*", 0},
		}},
		{"two keys want one local port: taken over while it is opened", []step{
			{0, lists(web), "open 8080", "*", 0},
			{ms, lists(two...), "", "8080 pending probing; 8080>10.0.0.2:8080 conflict *web (" + idA + ")*", 0},
			{ms, lists(two[0], ctr(strings.Repeat("c", 12), "new", "8080")), "", "8080 pending probing; 8080>10.0.0.2:8080 conflict *new (cccccccccccc)*", 0},
			{ms, opens("8080"), "probe 8080", "8080 pending probing; 8080>10.0.0.2:8080 conflict *new (cccccccccccc)*", 0},
		}},
		{"two keys want one local port that is busy", []step{
			{0, lists(two...), "open 8080>*", "8080 conflict *db (" + idB + ")*; *", 0},
			{0, fails("8080>10.0.0.2:8080", inUse), "", "8080 conflict *db (" + idB + ")*; 8080>10.0.0.2:8080 conflict bind: *", 100 * ms},
		}},
		{"a death counts at once, until a start", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, dies(idA), "close 8080", "", 0},
			{ms, lists(web), "", "", 0},
			{ms, closes("8080"), "", "", 0},
			{100 * ms, lists(web), "", "", 0},
			{ms, lists(), "", "", 0},
			{ms, all(starts(idA), lists(web)), "open 8080", "8080 pending probing", 0},
		}},
		{"a death while opening", []step{
			{0, lists(web), "open 8080", "*", 0},
			{0, dies(idA), "", "", 0},
			{ms, opens("8080"), "close 8080", "", 0},
			{ms, closes("8080"), "", "", 0},
		}},
		{"restarted before the port is closed", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, dies(idA), "close 8080", "", 0},
			{ms, all(starts(idA), lists(web)), "", "8080 pending *", 0},
			{ms, closes("8080"), "open 8080", "8080 pending *", 0},
			{ms, opens("8080"), "probe 8080", "8080 pending probing", 0},
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
		{"taken over during a probe: its result is of the old one", []step{
			{0, lists(web), "open 8080", "*", 0},
			{0, opens("8080"), "probe 8080", "*", 0},
			{0, lists(ctr(idB, "web", "8080")), "probe 8080", "8080 pending probing", 0},
			{0, probes("8080", probeAnswered, 1), "", "8080 pending probing", 0},
			{0, probes("8080", probeSilent), "", "8080 pending port not responding", 100 * ms},
		}},
		{"renamed", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, lists(ctr(idA, "other", "8080")), "", "8080 active", 0},
		}},
		{"container paused", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, lists(frozen(web)), "", "8080 pending container paused", 0},
			{time.Minute, lists(frozen(web)), "", "8080 pending container paused", 0},
			{0, lists(web), "probe 8080", "8080 pending probing", 0},
			{0, probes("8080", probeAnswered), "", "8080 active", 0},
		}},
		{"container paused from the start", []step{
			{0, lists(frozen(web)), "open 8080", "*", 0},
			{0, opens("8080"), "", "8080 pending container paused", 0},
			{0, lists(web), "probe 8080", "8080 pending probing", 0},
		}},
		{"container paused during a probe", []step{
			{0, lists(web), "open 8080", "*", 0},
			{0, opens("8080"), "probe 8080", "*", 0},
			{0, lists(frozen(web)), "", "8080 pending container paused", 0},
			{0, probes("8080", probeAnswered), "", "8080 pending container paused", 0},
			{0, lists(web), "probe 8080", "8080 pending probing", 0},
		}},
		{"paused and resumed by the user", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, pauses(true), "close 8080", "8080 pending paused", 0},
			{0, closes("8080"), "", "8080 pending paused", 0},
			{0, lists(two...), "", "8080 pending paused; 8080>10.0.0.2:8080 pending paused", 0},
			{0, lists(web), "", "8080 pending paused", 0},
			{0, pauses(false), "open 8080", "8080 pending *", 0},
			{0, opens("8080"), "probe 8080", "8080 pending probing", 0},
		}},
		{"paused by the user and resumed before it is closed", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, pauses(true), "close 8080", "*", 0},
			{0, pauses(false), "", "*", 0},
			{0, closes("8080"), "open 8080", "8080 pending *", 0},
		}},
		{"paused by the user while opening", []step{
			{0, lists(web), "open 8080", "*", 0},
			{0, pauses(true), "", "8080 pending *", 0},
			{0, opens("8080"), "close 8080", "8080 pending *", 0},
			{0, closes("8080"), "", "8080 pending paused", 0},
		}},
		{"paused by the user with the link down", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, all(down, pauses(true)), "", "8080 pending paused", 0},
			{0, pauses(false), "", "8080 " + lost, 0},
			{0, all(pauses(true), lists(web)), "", "8080 pending paused", 0},
			{0, pauses(false), "open 8080", "8080 pending *", 0},
		}},
		{"a conflict is one again after pause and resume", []step{
			{0, busy5, "", givenUp + " (held by nginx, pid 4242)", 2 * time.Second},
			{0, pauses(true), "", "8080 pending paused", 0},
			{time.Minute, pauses(false), "open 8080", "*", 0},
			{0, fails("8080", inUse), "*", "8080 conflict *already in use*", 100 * ms},
		}},
		{"refused by the SSH server", []step{
			{0, lists(web), "open 8080", "*", 0},
			{0, opens("8080"), "probe 8080", "*", 0},
			{0, probes("8080", probeRefused), "", "8080 pending refused by the SSH server: administratively prohibited", 100 * ms},
			{100 * ms, waits, "probe 8080", "8080 pending refused by the SSH server: administratively prohibited", 0},
			{0, probes("8080", probeAnswered), "", "8080 active", 0},
		}},
		{"nothing answers: backoff", []step{
			{0, lists(web), "open 8080", "*", 0},
			{0, opens("8080"), "probe 8080", "*", 0},
			{0, probes("8080", probeSilent), "", "8080 pending port not responding", 100 * ms},
			{100 * ms, waits, "probe 8080", "8080 pending port not responding", 0},
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
			{0, probes("8080", probeSilent), "", "8080 pending port not responding", 2 * time.Second},
			{2 * time.Second, waits, "probe 8080", "*", 0},
			{0, probes("8080", probeAnswered), "", "8080 active", 0},
		}},
		{"nobody listens locally: opened again", []step{
			{0, lists(web), "open 8080", "*", 0},
			{0, opens("8080"), "probe 8080", "*", 0},
			{0, probes("8080", probeGone), "", "8080 pending *", 100 * ms},
			{100 * ms, waits, "open 8080", "8080 pending *", 0},
			{0, opens("8080"), "probe 8080", "8080 pending probing", 0},
		}},
		{"a limit on probes at once", []step{ // the driver allows two
			{0, lists(ctr(idA, "web", "1", "2", "3", "4")), "open 1; open 2; open 3; open 4", "*", 0},
			{0, opens("1", "2", "3", "4"), "probe 1; probe 2", "1 pending probing; 2 pending probing; 3 pending probing; 4 pending probing", 0},
			{0, probes("2", probeAnswered), "probe 3", "1 pending probing; 2 active; *", 0},
			{0, probes("1", probeSilent), "probe 4", "1 pending port not responding; 2 active; *", 100 * ms},
			{100 * ms, waits, "", "*", 0},
			{0, probes("3", probeAnswered), "probe 1", "*; 3 active; *", 0},
			{0, all(probes("1", probeAnswered), probes("4", probeAnswered)), "", "1 active; 2 active; 3 active; 4 active", 0},
		}},
		{"stale probes give their place back", []step{
			{0, lists(ctr(idA, "web", "1", "2")), "open 1; open 2", "*", 0},
			{0, opens("1", "2"), "probe 1; probe 2", "*", 0},
			{0, lists(ctr(idB, "web", "1", "2")), "", "*", 0}, // both places are taken
			{0, probes("1", probeAnswered), "probe 1", "1 pending probing; 2 pending probing", 0},
			{0, probes("2", probeAnswered), "probe 2", "1 pending probing; 2 pending probing", 0},
		}},
		{"the probe of an earlier forward", []step{
			{0, lists(web), "open 8080", "*", 0},
			{0, opens("8080"), "probe 8080", "*", 0},
			{0, dies(idA), "close 8080", "", 0},
			{0, closes("8080"), "", "", 0},
			{0, all(starts(idA), lists(web)), "open 8080", "8080 pending probing", 0},
			{0, opens("8080"), "probe 8080", "8080 pending probing", 0},
			{0, probes("8080", probeAnswered, 1), "", "8080 pending probing", 0},
			{0, probes("8080", probeSilent), "", "8080 pending port not responding", 100 * ms},
		}},
		{"link lost and back", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, down, "", "8080 " + lost, 0},
			{0, dies(idB), "", "8080 " + lost, 0},
			{0, lists(web), "open 8080", "8080 pending *", 0},
			{0, opens("8080"), "probe 8080", "8080 pending probing", 0},
			{0, probes("8080", probeAnswered), "", "8080 active", 0},
		}},
		{"link lost while opening, closing, probing and in conflict", []step{
			{0, lists(ctr(idA, "web", "1", "2", "3"), ctr(idB, "old", "4")), "open 1; open 2; open 3; open 4", "*", 0},
			{0, all(opens("2", "4"), fails("3", inUse)), "probe 2; probe 4", "*", 100 * ms},
			{0, dies(idB), "close 4", "*", 100 * ms},
			{0, down, "", "1 " + lost + "; 2 " + lost + "; 3 " + lost, 0},
			{0, probes("2", probeAnswered), "", "1 " + lost + "; 2 " + lost + "; 3 " + lost, 0},
			{0, lists(ctr(idA, "web", "1", "2", "3")), "open 1; open 2; open 3", "*", 0},
			{0, opens("1", "2", "3"), "probe 1; probe 2", "*", 0},
		}},
		{"containers gone and born while the link was down", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, down, "", "8080 " + lost, 0},
			{0, lists(ctr(idB, "db", "5432")), "open 5432", "5432 pending probing", 0},
		}},
		{"reload touches what it concerns", []step{
			{0, up(ctr(idA, "web", "1", "2", "3"), "1", "2", "3"), "*", "*", 0},
			{0, probes("3", probeAnswered), "", "1 active; 2 active; 3 active", 0},
			{0, reloads(mapped(map[uint16]uint16{2: 1002}, nil, nil)), "close 2; open 1002>2", "1 active; 1002>2 pending probing; 3 active", 0},
			{0, all(closes("2"), opens("1002>2")), "probe 1002>2", "*", 0},
			{0, probes("1002>2", probeAnswered), "", "1 active; 1002>2 active; 3 active", 0},
			{0, reloads(mapped(map[uint16]uint16{2: 1002}, []portRange{{3, 9}}, nil)), "close 3", "1 active; 1002>2 active", 0},
			{0, closes("3"), "", "1 active; 1002>2 active", 0},
			{0, reloads(mapped(map[uint16]uint16{2: 1002}, nil, []portRange{{2, 2}})), "close 1", "1002>2 active", 0},
			{0, closes("1"), "", "1002>2 active", 0},
			{0, reloads(mapped(nil, nil, nil)), "close 1002>2; open 1; open 2; open 3", "*", 0},
		}},
		{"reload maps a port to one that is about to be free", []step{
			{0, up(ctr(idA, "web", "1", "2"), "1", "2"), "", "1 active; 2 active", 0},
			{0, reloads(mapped(map[uint16]uint16{2: 1}, []portRange{{1, 1}}, nil)), "close 1; close 2", "1>2 pending *", 0},
			{0, closes("1"), "open 1>2", "1>2 pending *", 0},
			{0, closes("2"), "", "1>2 pending *", 0},
			{0, opens("1>2"), "probe 1>2", "1>2 pending probing", 0},
		}},
		{"reload maps a port to one that another has", []step{
			{0, up(ctr(idA, "web", "1", "2"), "1", "2"), "", "1 active; 2 active", 0},
			{0, reloads(mapped(map[uint16]uint16{2: 1}, nil, nil)), "close 2", "1 active; 1>2 conflict *web (" + idA + ")*", 0},
		}},
		{"answers that nobody waits for", []step{
			{0, up(web, "8080"), "", "8080 active", 0},
			{0, all(fails("8080", inUse), closes("8080"), owner("8080", "x, pid 1"), probes("8080", probeGone)), "", "8080 active", 0},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newDriver(t, plainConfig(), 2)
			if strings.HasPrefix(c.name, "reload touches") {
				d.probeMax = 3
			}
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

func plainConfig() *config { return &config{bind: loopback4} }

// Answers for keys that are no more must be harmless.
func TestStateUnknownKeys(t *testing.T) {
	d := newDriver(t, plainConfig(), 2)
	k := key{netip.MustParseAddrPort("127.0.0.1:1"), netip.MustParseAddrPort("127.0.0.1:1")}
	d.openDone(d.now, k, nil)
	d.closeDone(k)
	d.probeDone(d.now, k, 1, probeAnswered)
	d.ownerFound(d.now, k, "x")
	d.diedNow(d.now, idA)
	d.startedNow(idB)
	if acts, wake := d.plan(); acts != "" || wake != 0 || len(d.forwards) != 0 || d.probes != 0 {
		t.Errorf("plan %q, wake %v, %d forwards, %d probes, want nothing", acts, wake, len(d.forwards), d.probes)
	}
}

// created is when a forward was first attempted, updated its last change of status or reason.
func TestStateTimes(t *testing.T) {
	web := ctr(idA, "web", "8080")
	d := newDriver(t, plainConfig(), 2)
	at := func(want time.Time) {
		t.Helper()
		d.plan()
		f := d.forwards[d.key("8080")]
		if !f.created.Equal(want) || f.updated.Before(f.created) {
			t.Errorf("at +%v: created +%v, want +%v; updated +%v", d.now.Sub(epoch), f.created.Sub(epoch), want.Sub(epoch), f.updated.Sub(epoch))
		}
	}
	do := func(hs ...happening) {
		for _, h := range hs {
			d.now = d.now.Add(time.Second)
			h(d)
			d.plan()
		}
	}
	do(lists(web))
	first := d.now
	do(fails("8080", syscall.EADDRINUSE), waits, opens("8080"), probes("8080", probeSilent), waits, probes("8080", probeAnswered))
	at(first)
	updated := d.now
	do(lists(web), lists(ctr(idA, "renamed", "8080")))
	if f := d.forwards[d.key("8080")]; !f.updated.Equal(updated) {
		t.Errorf("updated changed without a change of status or reason")
	}
	at(first)
	do(lists(frozen(web)), lists(web), pauses(true), closes("8080"), pauses(false), opens("8080"))
	at(first)
	do(down, lists(web), opens("8080"))
	at(first)
	do(down, waits, down, lists(web))
	at(first)

	do(opens("8080"), dies(idA), closes("8080"), starts(idA), lists(web))
	at(d.now)
	do(opens("8080"), lists(ctr(idB, "web", "8080")))
	at(d.now)
	// Stopped and started before the port could be closed.
	do(dies(idB), starts(idB), lists(ctr(idB, "web", "8080")))
	at(d.now)
	do(closes("8080"))
	at(d.now.Add(-time.Second))
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
		{opens("8080"), false}, // probing before, probing now
		{probes("8080", probeAnswered), true},
		{lists(web), false},
		{lists(ctr(idA, "renamed", "8080")), true},
		{lists(frozen(web)), true},
		{lists(web), true},
		{probes("8080", probeAnswered), true},
		{lists(udp, web), true}, {lists(udp, web), false},
		{down, true}, {lists(web), true},
		{opens("8080"), true},
		{pauses(true), true}, {pauses(true), false},
		{all(dies(idA), func(d *driver) { d.plan() }, closes("8080")), true},
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
	tell("opened", "INFO 127.0.0.1:8080 → "+who, lists(web), opens("8080"), probes("8080", probeAnswered), lists(web))
	tell("paused and resumed", "", lists(frozen(web)), lists(web), probes("8080", probeAnswered))
	tell("conflict after a reconnect", "WARN 127.0.0.1:8080 conflict for "+who+": port already in use after 5 retry attempts (held by nginx, pid 4242)",
		down, lists(web), fails("8080", inUse), waits, fails("8080", inUse), waits, fails("8080", inUse), waits, fails("8080", inUse), waits,
		fails("8080", inUse), owner("8080", "nginx, pid 4242"), waits, fails("8080", inUse), waits, fails("8080", inUse))
	tell("healed", "INFO 127.0.0.1:8080 → "+who+", free again", waits, opens("8080"), probes("8080", probeAnswered))
	tell("taken over", "INFO 127.0.0.1:8080 → new ("+idB+")", lists(ctr(idB, "new", "8080")), probes("8080", probeAnswered))
	tell("gone", "INFO 127.0.0.1:8080 closed: new ("+idB+") is gone", dies(idB), closes("8080"), lists())
	tell("loser", "INFO * → "+who+"\nWARN * conflict for db ("+idB+"): *"+who+"*",
		lists(web), opens("8080"), lists(web, ctr(idB, "db", "10.0.0.2:8080")), lists(web, ctr(idB, "db", "10.0.0.2:8080")))
	tell("no right", "WARN * conflict for low ("+idB+"): bind: permission denied*",
		lists(web, ctr(idB, "low", "80")), fails("80", syscall.EACCES), waits, fails("80", syscall.EACCES))
	tell("refused", "*WARN * pending for low ("+idB+"): refused by the SSH server*AllowTcpForwarding*",
		waits, opens("80"), probes("80", probeRefused), waits, probes("80", probeRefused))
}

// Notes carry for machines what the sentence says to people.
func TestStateNoteAttrs(t *testing.T) {
	d := newDriver(t, plainConfig(), 2)
	lists(ctr(idA, "web", "10.0.0.2:8080"))(d)
	d.plan()
	opens("8080>10.0.0.2:8080")(d)
	if len(d.notes) != 1 {
		t.Fatalf("%d notes, want 1", len(d.notes))
	}
	got := make(map[string]string)
	for _, a := range d.notes[0].attrs {
		got[a.Key] = a.Value.String()
	}
	for k, v := range map[string]string{"local": "127.0.0.1:8080", "remote": "10.0.0.2:8080",
		"container_id": idA, "container_name": "web", "status": "pending", "reason": "probing"} {
		if got[k] != v {
			t.Errorf("%s is %q, want %q", k, got[k], v)
		}
	}
}

// An engine that restarts its containers while nobody follows its events: the
// deaths were heard of, the starts were not, and the lists that follow the new
// subscription are the truth.
func TestStartsMissed(t *testing.T) {
	web := ctr(idA, "web", "8080")
	r := newRunner(runOptions{log: slog.New(slog.NewTextHandler(io.Discard, nil))}, paths{}, sshProgram{}, nil, plainConfig())
	r.link = &link{relist: make(chan struct{}, 1)}
	tell := func(what any) {
		t.Helper()
		if err := r.take(message{what: what}); err != nil {
			t.Fatal(err)
		}
		r.state.plan(time.Now())
	}
	tell(listTaken{list: []container{web}})
	tell(eventsFollowed{})
	tell(engineEvent{event{"die", idA}})
	tell(listTaken{list: []container{web}}) // still showing the dead
	if f := r.state.forwards; len(f) == 1 {
		for _, f := range f {
			if f.wanted {
				t.Fatal("a list brought the dead back")
			}
		}
	}
	tell(engineLost{err: errors.New("restarting")})
	tell(eventsFollowed{})
	tell(listTaken{list: []container{web}})
	if r.listDue.IsZero() || time.Until(r.listDue) > 2*time.Second {
		t.Errorf("no list due soon after the subscription")
	}
	tell(listTaken{list: []container{web}})
	for _, f := range r.state.forwards {
		if f.wanted {
			return
		}
	}
	t.Error("a container that runs, started while no events were followed, is not forwarded")
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
			d.startedNow(ev.id)
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
	// settle has everything done at once that the plan asks for.
	settle := func() {
		for rounds := 0; ; rounds++ {
			acts, _ := d.state.plan(d.now)
			if len(acts) == 0 {
				break
			}
			if rounds == 10 {
				d.t.Fatalf("never settles: %v, shown %q", acts, d.shown())
			}
			for _, a := range acts {
				switch a.verb {
				case openPort:
					d.openDone(d.now, a.key, nil)
				case closePort:
					d.closeDone(a.key)
				case probePort:
					d.probeDone(d.now, a.key, a.seq, probeAnswered)
				}
			}
		}
		d.notes = nil
		d.now = d.now.Add(10 * time.Millisecond)
	}
	event("start")
	list(true)
	settle()
	if d.shown() != strconv.Itoa(1024+n%50000)+" active" {
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
	heapSize := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	for n := 0; n < 1000; n++ {
		engineChurn(d, n)
	}
	goroutines, size := runtime.NumGoroutine(), heapSize()
	for n := 1000; n < 10000; n++ {
		engineChurn(d, n)
	}
	if n := len(d.forwards) + len(d.died) + len(d.list) + len(d.skipped) + len(d.notes) + d.probes; n != 0 {
		t.Errorf("left over: %d forwards, %d dead, %d containers, %d skipped, %d notes, %d probes",
			len(d.forwards), len(d.died), len(d.list), len(d.skipped), len(d.notes), d.probes)
	}
	if n := runtime.NumGoroutine(); n > goroutines {
		t.Errorf("%d goroutines, %d before", n, goroutines)
	}
	if now := heapSize(); now > size+1<<20 {
		t.Errorf("heap grew from %d to %d bytes", size, now)
	}
}

// What follows is the core at random: a simulated engine, link and master of
// which anything may happen at any time, and what has to hold all the while and
// once everything has calmed down.

// simContainer is a container of the simulated engine.
type simContainer struct {
	container
	answers bool // its service does
}

// simEvent is something that is going to happen.
type simEvent struct {
	at time.Time
	n  int // order of those at the same time
	do func()
}

type simulation struct {
	*driver
	rng     *rand.Rand
	coming  []simEvent // in order
	n       int
	trouble []string

	made    []simContainer
	running map[string]bool
	zombies map[string]time.Time // dead, listed until then

	up, subscribed bool
	life           int // of the link: what it tells is of no worth once it is down
	gen            int // as the loop counts links
	listing, again bool
	listDue        time.Time
	eventsAt       time.Time // when the last event arrives; they stay in order

	master   map[key]bool
	masterAt time.Time // when it has done all that it was asked; it keeps the order
	opening  map[key]bool
	closing  map[key]bool
	taken    map[netip.AddrPort]bool // by others
	probing  int
}

// after has do happen within the time given, and the core asked then what to do.
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

// ofLink is after for what dies with the link.
func (w *simulation) ofLink(most time.Duration, do func()) {
	life := w.life
	w.after(most, func() {
		if w.life == life {
			do()
		}
	})
}

func (w *simulation) wrong(format string, args ...any) {
	w.trouble = append(w.trouble, fmt.Sprintf("+%v: ", w.now.Sub(epoch))+fmt.Sprintf(format, args...))
}

// runUntil lets everything happen that is due by then.
func (w *simulation) runUntil(until time.Time) {
	for {
		acts, wake := w.state.plan(w.now)
		w.said()
		w.check()
		w.carryOut(acts)
		if w.up && !w.listDue.After(w.now) {
			w.list()
			continue
		}
		next := until
		for _, due := range []time.Time{wake, w.listDue} {
			if due.After(w.now) && due.Before(next) {
				next = due
			}
		}
		if len(w.coming) > 0 && !w.coming[0].at.After(next) {
			e := w.coming[0]
			w.coming = w.coming[1:]
			w.now = e.at
			e.do()
			continue
		}
		if !next.Before(until) {
			w.now = until
			return
		}
		w.now = next
	}
}

// check is what has to hold at any time once the core was asked what to do.
func (w *simulation) check() {
	if w.probes < 0 || w.probes > w.probeMax {
		w.wrong("%d probes counted", w.probes)
	}
	for k, f := range w.forwards {
		if f.key != k {
			w.wrong("forward %v filed under %v", f.key, k)
		}
		if f.status != active && f.status != conflict && f.status != pending {
			w.wrong("%s has status %q", keyText(k), f.status)
		}
		if (f.status == active) != (f.reason == "") {
			w.wrong("%s is %s with reason %q", keyText(k), f.status, f.reason)
		}
		if f.reason != printable(f.reason, 1000) {
			w.wrong("%s has a reason that cannot be printed: %q", keyText(k), f.reason)
		}
		if f.updated.Before(f.created) {
			w.wrong("%s was updated before it was created", keyText(k))
		}
		if f.wanted && f.status == active && !w.master[k] && w.up {
			w.wrong("%s is active and not open", keyText(k))
		}
	}
}

func (w *simulation) carryOut(acts []action) {
	opens := false
	for _, a := range acts {
		k, life, gen := a.key, w.life, w.gen
		switch a.verb {
		case openPort, closePort:
			if !w.up {
				w.wrong("%s asked for with no link", keyText(k))
			}
			if w.opening[k] || w.closing[k] {
				w.wrong("%s asked for while the last is under way", keyText(k))
			}
			opens = opens || a.verb == openPort
			if a.verb == closePort && opens {
				w.wrong("a close after an open")
			}
			w.masterAt = latest(w.masterAt, w.now).Add(time.Duration(w.rng.Int64N(int64(5 * time.Millisecond))))
			if a.verb == openPort {
				for other := range w.opening {
					if other.local == k.local {
						w.wrong("%s and %s opened at once", keyText(k), keyText(other))
					}
				}
				w.opening[k] = true
				w.at(w.masterAt, func() { w.open(k, life) })
			} else {
				w.closing[k] = true
				w.at(w.masterAt, func() {
					if w.life == life {
						delete(w.closing, k)
						delete(w.master, k)
						w.closeDone(k)
					}
				})
			}
		case probePort:
			if w.probing++; w.probing > w.probeMax*2 { // those of the last link may still be under way
				w.wrong("%d probes at once", w.probing)
			}
			w.after(300*time.Millisecond, func() {
				result := w.look(k)
				w.after(50*time.Millisecond, func() {
					w.probing--
					if w.gen == gen {
						w.probeDone(w.now, k, a.seq, result)
					}
				})
			})
		case findOwner:
			w.after(100*time.Millisecond, func() {
				if w.gen == gen {
					w.ownerFound(w.now, k, "somebody, pid 1")
				}
			})
		}
	}
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// open is the master's.
func (w *simulation) open(k key, life int) {
	if w.life != life {
		return
	}
	delete(w.opening, k)
	var err error
	switch {
	case w.taken[k.local]:
		err = syscall.EADDRINUSE
	case k.local.Port() < 1024:
		err = fmt.Errorf("binding: %w", syscall.EACCES)
	case w.rng.IntN(50) == 0:
		err = errors.New("the master is in a bad mood")
	}
	for other := range w.master {
		if other.local == k.local && other != k {
			w.wrong("%s opened while %s has the port", keyText(k), keyText(other))
			err = syscall.EADDRINUSE
		}
	}
	if err == nil {
		w.master[k] = true
	}
	w.openDone(w.now, k, err)
}

// look is what a probe sees.
func (w *simulation) look(k key) probeResult {
	if !w.master[k] {
		return probeGone
	}
	for _, c := range w.made {
		if w.running[c.id] && c.remote() == k.remote && c.answers {
			return probeAnswered
		}
	}
	return []probeResult{probeSilent, probeSilent, probeRefused}[w.rng.IntN(3)]
}

func (c *simContainer) remote() netip.AddrPort {
	return netip.AddrPortFrom(dialable(c.ports[0].ip), c.ports[0].public)
}

// list asks for a list, unless one is under way.
func (w *simulation) list() {
	if w.listDue = w.now.Add(relistEvery); w.listing {
		w.again = true
		return
	}
	w.listing = true
	w.ofLink(5*time.Millisecond, func() {
		var list []container
		for _, i := range w.rng.Perm(len(w.made)) {
			c := w.made[i]
			if w.running[c.id] || w.zombies[c.id].After(w.now) {
				list = append(list, c.container)
			}
		}
		w.ofLink(20*time.Millisecond, func() {
			w.listed(w.now, list)
			if w.listing = false; !w.subscribed {
				w.ofLink(20*time.Millisecond, func() {
					w.subscribed = true
					w.list()
					w.listDue = w.now.Add(settleAfter)
				})
			}
			if w.again {
				w.again = false
				w.list()
			}
		})
	})
}

// tell emits an event of the engine.
func (w *simulation) tell(do happening) {
	if !w.up || !w.subscribed {
		return
	}
	w.eventsAt = latest(w.eventsAt, w.now.Add(time.Duration(w.rng.Int64N(int64(20*time.Millisecond)))))
	life := w.life
	w.at(w.eventsAt, func() {
		if w.life == life {
			do(w.driver)
			w.list()
		}
	})
}

func (w *simulation) connect() {
	if w.up {
		return
	}
	w.up, w.gen = true, w.gen+1
	w.list()
}

func (w *simulation) disconnect() {
	if !w.up {
		return
	}
	w.up, w.subscribed, w.listing, w.again, w.life, w.listDue = false, false, false, false, w.life+1, time.Time{}
	clear(w.master)
	clear(w.opening)
	clear(w.closing)
	w.disconnected()
}

// startOne starts a container, if what it publishes is free.
func (w *simulation) startOne(c *simContainer) {
	for _, o := range w.made {
		if w.running[o.id] && o.remote() == c.remote() {
			return
		}
	}
	delete(w.zombies, c.id)
	w.running[c.id], c.paused = true, false
	w.tell(starts(c.id))
}

func (w *simulation) stopOne(c *simContainer) {
	if !w.running[c.id] {
		return
	}
	delete(w.running, c.id)
	if w.rng.IntN(2) == 0 {
		w.zombies[c.id] = w.now.Add(100 * time.Millisecond)
	}
	w.tell(dies(c.id))
}

func (w *simulation) somethingHappens() {
	c := &w.made[w.rng.IntN(len(w.made))]
	switch n := w.rng.IntN(100); {
	case n < 35:
		w.startOne(c)
	case n < 55:
		w.stopOne(c)
	case n < 65:
		w.stopOne(c)
		w.startOne(c)
	case n < 75:
		if w.running[c.id] {
			c.paused = !c.paused
			w.tell(waits)
		}
	case n < 80:
		local := netip.AddrPortFrom(loopback4, uint16(8000+w.rng.IntN(4)))
		held := false
		for k := range w.master {
			held = held || k.local == local
		}
		if w.taken[local] {
			delete(w.taken, local)
		} else if !held {
			w.taken[local] = true
		}
	case n < 84:
		w.configure(w.now, w.anyConfig())
	case n < 88:
		w.pause(w.now, !w.paused)
	case n < 91:
		w.disconnect()
	case n < 94 && w.up: // the stream of events ends and is taken up again
		w.subscribed = false
		w.list()
	default:
		w.connect()
	}
}

func (w *simulation) anyConfig() *config {
	cfg := &config{bind: loopback4}
	if w.rng.IntN(2) == 0 {
		cfg.mapped = map[uint16]uint16{8000: 8001, 8002: uint16(8000 + w.rng.IntN(4)), 8003: 80}
	}
	if w.rng.IntN(3) == 0 {
		cfg.skip = []portRange{{8001, 8001}}
	}
	if w.rng.IntN(4) == 0 {
		cfg.only = []portRange{{8000, 8002}}
	}
	return cfg
}

// calm checks what has to hold when nothing has happened for a while.
func (w *simulation) calm() {
	var list []container
	answers := make(map[key]bool)
	for _, c := range w.made {
		if w.running[c.id] {
			list = append(list, c.container)
		}
	}
	wants, _ := desired(list, w.cfg)
	locals := make(map[netip.AddrPort]int)
	for k := range wants {
		for _, c := range w.made {
			if w.running[c.id] && c.remote() == k.remote {
				answers[k] = c.answers
			}
		}
		if w.master[k] {
			locals[k.local]++
		}
	}
	for k, f := range w.forwards {
		if _, ok := wants[k]; !ok {
			w.wrong("%s is left over: wanted %v, open %v", keyText(k), f.wanted, f.open)
		}
	}
	for k := range w.master {
		if _, ok := wants[k]; !ok || w.paused {
			w.wrong("%s is open and should not be", keyText(k))
		}
	}
	for k, c := range wants {
		f := w.forwards[k]
		if f == nil {
			w.wrong("%s is missing", keyText(k))
			continue
		}
		status, reason := pending, "*"
		switch {
		case w.paused:
			reason = reasonPaused
		case w.taken[k.local] || k.local.Port() < 1024:
			status = conflict
		case locals[k.local] == 0:
			w.wrong("nobody has %s", k.local)
			continue
		case !w.master[k]:
			status, reason = conflict, fmt.Sprintf("%s is taken by *", k.local)
			for o := range w.master {
				if o.local == k.local {
					reason = "*" + wants[o].who() + "*"
				}
			}
		case c.paused:
			reason = reasonFrozen
		case answers[k]:
			status, reason = active, ""
		default:
			if f.reason != reasonRefused {
				reason = reasonSilent
			}
		}
		if f.status != status || !matches(reason, f.reason) || f.want != c {
			w.wrong("%s is %s %q of %s, want %s %q of %s", keyText(k), f.status, f.reason, f.who(), status, reason, c.who())
		}
	}
	if len(w.died) != 0 || w.probes > w.probing {
		w.wrong("%d remembered as dead, %d probes counted with %d under way", len(w.died), w.probes, w.probing)
	}
}

func TestStateAtRandom(t *testing.T) {
	for seed := uint64(1); seed <= 60; seed++ {
		w := &simulation{driver: newDriver(t, plainConfig(), 3), rng: rand.New(rand.NewPCG(seed, 41)),
			running: make(map[string]bool), zombies: make(map[string]time.Time), master: make(map[key]bool),
			opening: make(map[key]bool), closing: make(map[key]bool), taken: make(map[netip.AddrPort]bool)}
		for i := 0; i < 10; i++ {
			ip := []string{"0.0.0.0", "10.0.0.2", "::1"}[w.rng.IntN(3)]
			a := netip.AddrPortFrom(netip.MustParseAddr(ip), uint16(8000+w.rng.IntN(4)))
			w.made = append(w.made, simContainer{ctr(fmt.Sprintf("%012x", i+1), fmt.Sprintf("c%d", i), a.String()), w.rng.IntN(3) > 0})
		}
		for round := 0; round < 4; round++ {
			for i := 0; i < 60; i++ {
				w.somethingHappens()
				w.runUntil(w.now.Add(time.Duration(w.rng.Int64N(int64(200 * time.Millisecond)))))
			}
			w.connect()
			w.pause(w.now, round == 2)
			w.runUntil(w.now.Add(2 * time.Minute))
			w.calm()
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
	for _, c := range []struct {
		name    string
		cfg     config
		list    []container
		wants   string // sorted keys, each with its container
		skipped string
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
		{name: "random ports differ", list: []container{with(idA, p("0.0.0.0", 32768, "tcp"), p("::", 32769, "tcp"))}, wants: "32768 na; 32769>[::1]:32769 na"},
		{name: "UDP and SCTP, once", list: []container{with(idA, p("0.0.0.0", 53, "udp"), p("::", 53, "udp"), p("::", 54, "sctp"))},
			skipped: "na 53/udp " + tooLittle + "; na 54/sctp " + tooLittle},
		{name: "UDP and TCP of one number", list: []container{with(idA, p("0.0.0.0", 53, "udp"), p("0.0.0.0", 53, "tcp"))},
			wants: "53 na", skipped: "na 53/udp " + tooLittle},
		{name: "no address", list: []container{with(idA, p("junk", 80, "tcp"))}, skipped: "na 80/tcp published on what is no address"},
		{name: "host network", list: []container{{id: idA, name: "na", hostNet: true}}, skipped: "na 0/tcp host network: the container publishes no ports"},
		{name: "one local port, two addresses", list: []container{with(idA, p("10.0.0.2", 80, "tcp")), with(idB, p("10.0.0.3", 80, "tcp"))},
			wants: "80>10.0.0.2:80 na; 80>10.0.0.3:80 nb"},
		{name: "mapped", cfg: config{mapped: map[uint16]uint16{80: 8080}}, list: []container{with(idA, p("0.0.0.0", 80, "tcp"), p("0.0.0.0", 81, "tcp"))},
			wants: "8080>80 na; 81 na"},
		{name: "skip", cfg: config{skip: []portRange{{80, 82}, {90, 90}}}, list: []container{with(idA, p("0.0.0.0", 79, "tcp"), p("0.0.0.0", 80, "tcp"),
			p("0.0.0.0", 82, "tcp"), p("0.0.0.0", 83, "tcp"), p("0.0.0.0", 90, "tcp"))},
			wants: "79 na; 83 na", skipped: "na 80/tcp named by skip; na 82/tcp named by skip; na 90/tcp named by skip"},
		{name: "only", cfg: config{only: []portRange{{80, 82}}}, list: []container{with(idA, p("0.0.0.0", 79, "tcp"), p("0.0.0.0", 80, "tcp"), p("::", 80, "tcp"), p("::", 79, "tcp"))},
			wants: "80 na", skipped: "na 79/tcp not named by only"},
		{name: "skip wins over only, both over a mapping", cfg: config{only: []portRange{{80, 82}}, skip: []portRange{{81, 81}}, mapped: map[uint16]uint16{81: 82, 80: 1080}},
			list: []container{with(idA, p("0.0.0.0", 80, "tcp"), p("0.0.0.0", 81, "tcp"))}, wants: "1080>80 na", skipped: "na 81/tcp named by skip"},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.cfg.bind = loopback4
			wants, skipped := desired(c.list, &c.cfg)
			if skipped == nil {
				t.Error("skipped is nil: it becomes null in JSON")
			}
			var got, not []string
			for k, w := range wants {
				got = append(got, keyText(k)+" "+w.name)
				if w.key != k || w.private != 80 {
					t.Errorf("%+v under key %v", w, k)
				}
			}
			for _, s := range skipped {
				not = append(not, fmt.Sprintf("%s %d/%s %s", s.Name, s.Port, s.Protocol, s.Reason))
			}
			slices.Sort(got)
			if g, n := strings.Join(got, "; "), strings.Join(not, "; "); g != c.wants || n != c.skipped {
				t.Errorf("\n got %q, skipped %q\nwant %q, skipped %q", g, n, c.wants, c.skipped)
			}
		})
	}
}

// Two containers on one key, as a list may show that was made while one took
// over from the other: one forward, and always of the same.
func TestDesiredSameKey(t *testing.T) {
	list := []container{ctr(idB, "new", "80"), ctr(idA, "old", "80")}
	first, _ := desired(list, plainConfig())
	for i := 0; i < 20; i++ {
		if again, _ := desired(list, plainConfig()); len(again) != 1 || !reflect.DeepEqual(first, again) {
			t.Fatalf("got %v, then %v", first, again)
		}
	}
}

func TestDesiredBind(t *testing.T) {
	for _, bind := range []string{"127.0.0.2", "::1", "0.0.0.0"} {
		wants, _ := desired([]container{ctr(idA, "web", "80")}, &config{bind: netip.MustParseAddr(bind)})
		k := key{netip.AddrPortFrom(netip.MustParseAddr(bind), 80), netip.MustParseAddrPort("127.0.0.1:80")}
		if _, ok := wants[k]; !ok || len(wants) != 1 {
			t.Errorf("bind %s: %v", bind, wants)
		}
	}
}

func TestParseRange(t *testing.T) {
	for _, c := range []struct {
		in   string
		want portRange
		err  string // a part of it; "": none
	}{
		{"80", portRange{80, 80}, ""},
		{"1-65535", portRange{1, 65535}, ""},
		{"8000-8000", portRange{8000, 8000}, ""},
		{"", portRange{}, "no port"},
		{"0", portRange{}, "no port"},
		{"65536", portRange{}, "no port"},
		{"-1", portRange{}, "no port"},
		{"+80", portRange{}, "no port"},
		{" 80", portRange{}, "no port"},
		{"80-", portRange{}, "no port"},
		{"80-90-100", portRange{}, "no port"},
		{"90-80", portRange{}, "before it begins"},
		{"http", portRange{}, "no port"},
		{"99999999999999999999", portRange{}, "no port"},
	} {
		r, err := parseRange(c.in)
		if c.err == "" && (err != nil || r != c.want) || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("parseRange(%q) = %v, %v, want %v, %q", c.in, r, err, c.want, c.err)
		}
	}
}
