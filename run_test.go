package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// Tests of the loop's own parts, with a link made by hand and no ssh. But for
// those that run the loop itself, the clock is the test's.

// loopOf is a runner without a connection, its loop not running: what the loop
// does, a test does.
func loopOf(t *testing.T) *runner {
	t.Helper()
	r := &runner{runOptions: runOptions{host: host{name: "example.com"}, log: slog.New(slog.NewTextHandler(io.Discard, nil))},
		tasks: make(chan func(time.Time), 64), gate: newGate(), doors: make(map[key]*door), state: newState(&config{}, 9), maxListeners: 100}
	r.shown = snapshot{Version: stateVersion, Host: r.host.String(), Connection: connection{State: connecting}}
	r.board = newBoard(r.snapshot())
	r.ctx, r.quit = context.WithCancel(context.Background())
	t.Cleanup(func() {
		r.quit()
		r.closeDoors()
		r.wg.Wait()
	})
	return r
}

// withFiles gives r the files that an instance keeps.
func (r *runner) withFiles(t *testing.T) {
	t.Helper()
	dir, err := os.MkdirTemp("", "rdhpf") // a test's own is too long for a socket on macOS
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	r.dir, r.paths = dir, pathsFor(dir, r.host.String())
	if r.lock, err = lockInstance(r.paths.lock); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.lock.Close() })
	s := &socket{path: r.paths.socket, serve: r.answer}
	if r.sockets = []*socket{s}; r.listen(s) != nil {
		t.Fatal(err)
	}
}

// handLink is a link of r that nothing works at.
func handLink(r *runner) *link {
	l := &link{r: r, relist: make(chan struct{}, 1), pings: make(chan chan error)}
	l.ctx, l.cancel = context.WithCancel(r.ctx)
	return l
}

// hand is a runner whose link is a test's hand.
type hand struct {
	*runner
	t   *testing.T
	log bytes.Buffer
	now time.Time
}

// connectedHand is one whose first list has come.
func connectedHand(t *testing.T, list ...container) *hand {
	t.Helper()
	h := &hand{runner: loopOf(t), t: t, now: epoch}
	h.runner.log = slog.New(slog.NewTextHandler(&h.log, nil))
	h.linkUp()
	h.list(list...)
	return h
}

// linkUp gives h a link on which probes never begin: what they see, the test says.
func (h *hand) linkUp() {
	h.link = handLink(h.runner)
	h.link.pace = h.now.Add(24 * time.Hour)
}

// list has a list come that was asked for now.
func (h *hand) list(list ...container) { h.listAskedAt(h.now, list...) }

func (h *hand) listAskedAt(began time.Time, list ...container) {
	h.listed(h.now, h.link, list, began, 10*time.Millisecond, "Docker")
	h.step(h.now)
}

// wait lets time pass.
func (h *hand) wait(d time.Duration) (wake time.Time) {
	h.now = h.now.Add(d)
	return h.step(h.now)
}

// listAsked reports whether a list was asked for since the last call.
func (h *hand) listAsked() bool {
	select {
	case <-h.link.relist:
		return true
	default:
		return false
	}
}

// forward is the one of a published port.
func (h *hand) forward(port uint16) *forward {
	h.t.Helper()
	for k, f := range h.state.forwards {
		if k.remote.Port() == port {
			return f
		}
	}
	h.t.Fatalf("no forward of port %d", port)
	return nil
}

// probed gives the outcome of the probe under way.
func (h *hand) probed(port uint16, result probeResult) {
	h.t.Helper()
	f := h.forward(port)
	if f.probe == 0 {
		h.t.Fatalf("port %d is not probed", port)
	}
	h.state.probeDone(h.now, f.key, f.probe, result)
	h.step(h.now)
}

func (h *hand) ask(method string) chan reply {
	answer := make(chan reply, 1)
	h.request(h.now, method, answer)
	return answer
}

// unanswered fails where a client was answered already.
func (h *hand) unanswered(what string, answer chan reply) {
	h.t.Helper()
	h.step(h.now)
	select {
	case a := <-answer:
		h.t.Fatalf("%s: answered %+v, %v already", what, a.result, a.err)
	default:
	}
}

// answered is the answer to a client, which must be there.
func (h *hand) answered(what string, answer chan reply) reply {
	h.t.Helper()
	h.step(h.now)
	select {
	case a := <-answer:
		return a
	default:
		h.t.Fatalf("%s: no answer", what)
		return reply{}
	}
}

// healthy fails unless the answer is of this status, for these reasons.
func (h *hand) healthy(what string, answer chan reply, status string, reasons ...string) {
	h.t.Helper()
	got, ok := h.answered(what, answer).result.(health)
	if !ok || got.Status != status || len(got.Reasons) != len(reasons) {
		h.t.Fatalf("%s: %+v, want %s for %q", what, got, status, reasons)
	}
	for i, want := range reasons {
		if !matches(want, got.Reasons[i]) {
			h.t.Errorf("%s: reason %q, want %q", what, got.Reasons[i], want)
		}
	}
}

// unusedPort is a port that is free on both loopbacks.
func unusedPort(t *testing.T) uint16 {
	t.Helper()
	for range 100 {
		four, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		port := uint16(four.Addr().(*net.TCPAddr).Port)
		six, err := net.Listen("tcp6", fmt.Sprintf("[::1]:%d", port))
		four.Close()
		if err == nil {
			six.Close()
		} else if hasIPv6() {
			continue
		}
		return port
	}
	t.Fatal("no port is free on both loopbacks")
	return 0
}

func hasIPv6() bool {
	l, err := net.Listen("tcp6", "[::1]:0")
	if err == nil {
		l.Close()
	}
	return err == nil
}

// accepts reports whether somebody listens at an address.
func accepts(a netip.AddrPort) bool {
	c, err := net.Dial("tcp", a.String())
	if err == nil {
		c.Close()
	}
	return err == nil
}

func onPort(port uint16) string { return fmt.Sprint(port) }

func TestListsWithoutACause(t *testing.T) {
	h := connectedHand(t)
	h.listAsked()
	for i, c := range []struct {
		after  time.Duration
		listed bool // one comes then
		asked  bool
	}{
		{relistEvery - time.Millisecond, false, false},
		{time.Millisecond, false, true},
		{time.Millisecond, false, false},
		{10 * time.Millisecond, true, false},
		{relistEvery - 12*time.Millisecond, false, false},
		{time.Millisecond, false, true}, // and no list comes of it
		{relistEvery - time.Millisecond, false, false},
		{time.Millisecond, false, true},
		{relistEvery, false, true},
	} {
		wake := h.wait(c.after)
		if c.listed {
			h.list()
		}
		if got := h.listAsked(); got != c.asked {
			t.Errorf("step %d, at +%v: a list was asked for: %v, want %v", i+1, h.now.Sub(epoch), got, c.asked)
		}
		if due := h.link.listDue; due.Before(wake) {
			t.Errorf("step %d: looked at again in %v, with a list due in %v", i+1, wake.Sub(h.now), due.Sub(h.now))
		}
	}
}

func TestListsForACause(t *testing.T) {
	web := ctr(idA, "web", onPort(unusedPort(t)))
	for _, c := range []struct {
		name   string
		do     func(h *hand)
		asked  bool
		settle bool // asked for once more
	}{
		{"start", func(h *hand) { h.happened(h.now, h.link, event{"start", idB}) }, true, true},
		{"die", func(h *hand) { h.happened(h.now, h.link, event{"die", idA}) }, true, true},
		{"a network", func(h *hand) { h.happened(h.now, h.link, event{"connect", idA}) }, true, true},
		{"health", func(h *hand) { h.happened(h.now, h.link, event{"health_status", idA}) }, false, false},
		{"events are followed", func(h *hand) { h.following(h.now, h.link) }, true, true},
		{"the machine woke", func(h *hand) { h.woke(h.now) }, true, false},
		{"a client wants to know", func(h *hand) { h.ask("health") }, true, false},
		{"a client asks how it is", func(h *hand) { h.ask("status") }, false, false},
	} {
		h := connectedHand(t, web)
		h.listAsked()
		h.wait(time.Second)
		c.do(h)
		if got := h.listAsked(); got != c.asked {
			t.Errorf("%s: a list was asked for: %v, want %v", c.name, got, c.asked)
		}
		h.list(web)
		h.wait(settleAfter - time.Millisecond)
		if h.listAsked() {
			t.Errorf("%s: a list was asked for too soon", c.name)
		}
		h.wait(time.Millisecond)
		if got := h.listAsked(); got != c.settle {
			t.Errorf("%s: a list was asked for once more: %v, want %v", c.name, got, c.settle)
		}
		h.closeDoors()
	}
}

// An engine that restarts its containers while nobody follows its events: the
// deaths were heard of, the starts were not, and the lists that follow the new
// subscription are the truth.
func TestStartsMissed(t *testing.T) {
	web := ctr(idA, "web", onPort(unusedPort(t)))
	h := connectedHand(t, web)
	h.following(h.now, h.link)
	h.happened(h.now, h.link, event{"die", idA})
	h.list(web) // still showing the dead
	if len(h.state.forwards) != 0 {
		t.Fatal("a list brought the dead back")
	}
	h.engineLost(h.link, false, errors.New("restarting"))
	h.following(h.now, h.link)
	h.list(web)
	if len(h.state.forwards) != 1 {
		t.Error("a container that runs, started while no events were followed, is not forwarded")
	}
}

// What is seen of services when events are followed anew, when their health
// changes, when the machine wakes.
func TestLooks(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(h *hand)
		want bool
	}{
		{"events are followed", func(h *hand) { h.following(h.now, h.link) }, false},
		{"events are followed, and a list has come", func(h *hand) {
			h.following(h.now, h.link)
			h.listed(h.now, h.link, h.state.list, h.now, time.Millisecond, "Docker")
		}, true},
		{"its health changed", func(h *hand) { h.happened(h.now, h.link, event{"health_status", idA}) }, true},
		{"the health of another changed", func(h *hand) { h.happened(h.now, h.link, event{"health_status", idB}) }, false},
		{"the machine woke", func(h *hand) { h.woke(h.now) }, true},
		{"a client asks how it is", func(h *hand) { h.ask("status") }, false},
		{"a client asks how it is, later", func(h *hand) {
			h.now = h.now.Add(staleAfter)
			h.ask("status")
		}, true},
		{"another was renamed", func(h *hand) { h.happened(h.now, h.link, event{"rename", idB}) }, false},
	} {
		port := unusedPort(t)
		h := connectedHand(t, ctr(idA, "web", onPort(port)))
		h.probed(port, probeAnswered)
		h.wait(time.Second)
		c.do(h)
		h.step(h.now)
		f := h.forward(port)
		if got := f.probe != 0; got != c.want || f.status != active {
			t.Errorf("%s: %s, looked at: %v, want %v", c.name, f.status, got, c.want)
		}
		h.closeDoors()
	}
}

func TestWakingUp(t *testing.T) {
	h := connectedHand(t)
	h.withFiles(t)
	h.listAsked()
	h.lastBeat = h.now
	h.now = h.now.Add(beatEvery)
	if h.beat(h.now); !h.link.wakeBy.IsZero() {
		t.Error("a beat in time was taken for sleep")
	}
	h.now = h.now.Add(sleptAfter + time.Millisecond)
	h.beat(h.now)
	deadline := h.now.Add(wakeDeadline + h.link.rtt)
	if !h.link.wakeBy.Equal(deadline) || !h.listAsked() {
		t.Fatalf("the engine has to answer in %v, want %v", h.link.wakeBy.Sub(h.now), deadline.Sub(h.now))
	}
	h.wait(time.Second)
	h.list()
	if h.wait(time.Minute); h.link.ctx.Err() != nil {
		t.Fatal("a link was ended that answered in time")
	}
	h.woke(h.now)
	deadline = h.link.wakeBy
	h.now = deadline.Add(-time.Millisecond)
	if wake := h.step(h.now); h.link.ctx.Err() != nil || wake.After(deadline) {
		t.Fatalf("%v before the deadline: ended is %v; looked at again in %v", deadline.Sub(h.now), h.link.ctx.Err(), wake.Sub(h.now))
	}
	if h.wait(time.Millisecond); h.link.ctx.Err() == nil {
		t.Fatal("a link that does not answer is kept after the deadline")
	}
	h.down(h.now, h.link, errors.New("the context ended"))
	if said := h.shown.Connection.LastError; !strings.Contains(said, "woke up") {
		t.Errorf("the link ended because of %q, want the loop's reason", said)
	}

	h.retryAt = h.now.Add(time.Hour)
	if h.woke(h.now); h.retryAt.After(h.now) {
		t.Error("no attempt at a connection as soon as the machine wakes")
	}
	h.linkUp()
	if h.woke(h.now); !h.link.wakeBy.IsZero() {
		t.Error("an attempt at a connection was given a deadline")
	}
}

// Messages without end hold up nothing that is due.
func TestConstantFlow(t *testing.T) {
	port := unusedPort(t)
	busy, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	h := connectedHand(t, unprobed(ctr(idA, "web", onPort(port))))
	k := h.forward(port).key
	lists, tries := 0, 0
	for range 6500 {
		h.state.suspected(h.now, k) // whatever comes
		h.wait(10 * time.Millisecond)
		if h.listAsked() {
			lists++
		}
		if h.now.Equal(epoch.Add(1600 * time.Millisecond)) {
			tries = h.state.forwards[k].tries
		}
	}
	if lists != 2 || tries != bindAttempts {
		t.Errorf("%d lists in 65 s, want 2; %d attempts at a busy port in 1.6 s, want %d", lists, tries, bindAttempts)
	}

	// The loop itself, with the clock of the machine.
	h = connectedHand(t)
	h.withFiles(t)
	h.now = time.Now()
	l := h.link
	l.wakeBy = h.now.Add(50 * time.Millisecond)
	l.listDue = l.wakeBy
	h.listAsked()
	ended := make(chan error, 1)
	go func() { ended <- h.loop() }()
	for range 4 {
		h.start(func() {
			for h.ctx.Err() == nil {
				h.post(h.ctx, func(time.Time) {})
			}
		})
	}
	select {
	case <-l.ctx.Done():
	case <-time.After(time.Minute):
		t.Error("under a flood of tasks the deadline after waking up never came")
	}
	select {
	case <-l.relist:
	case <-time.After(time.Minute):
		t.Error("under a flood of tasks the periodic list never came")
	}
	h.quit()
	if err := <-ended; err != nil {
		t.Errorf("the loop ended with %v", err)
	}
}

// A client of the running loop is answered, or stops waiting.
func TestAsk(t *testing.T) {
	h := connectedHand(t)
	h.withFiles(t)
	ended := make(chan error, 1)
	go func() { ended <- h.loop() }()
	if got, err := h.runner.ask(h.ctx, "status"); err != nil || got.(*snapshot).Connection.State != connected {
		t.Errorf("status: %+v, %v", got, err)
	}
	if got, err := h.runner.ask(h.ctx, "pause"); err != nil || !got.(map[string]bool)["paused"] {
		t.Errorf("pause: %+v, %v", got, err)
	}
	if _, err := h.runner.ask(h.ctx, "dance"); err == nil {
		t.Error("an unknown method was done")
	}
	ctx, cancel := context.WithTimeout(h.ctx, 10*time.Millisecond)
	defer cancel()
	if _, err := h.runner.ask(ctx, "health"); !errors.Is(err, context.DeadlineExceeded) { // it waits for a list
		t.Errorf("a client that went: %v", err)
	}
	h.quit()
	<-ended
}

func TestStatusAnswersAtOnce(t *testing.T) {
	port := unusedPort(t)
	h := connectedHand(t, ctr(idA, "web", onPort(port)))
	h.probed(port, probeAnswered)
	h.now = h.now.Add(time.Hour)
	answer := h.ask("status")
	select {
	case a := <-answer:
		snap := a.result.(*snapshot)
		if len(snap.Forwards) != 1 || snap.Forwards[0].Status != active || !snap.UpdatedAt.Equal(h.now) {
			t.Errorf("answered %+v", snap)
		}
	default:
		t.Fatal("no answer")
	}
	h.step(h.now)
	h.probed(port, probeSilent)
	if a := <-h.ask("status"); a.result.(*snapshot).Forwards[0].Reason != reasonSilent {
		t.Errorf("after the look: %+v", a.result)
	}
}

func TestHealthWaits(t *testing.T) {
	port, other := unusedPort(t), unusedPort(t)
	web := ctr(idA, "web", onPort(port))
	start := func(t *testing.T) *hand {
		h := connectedHand(t, web)
		h.probed(port, probeAnswered)
		h.wait(10 * time.Second)
		h.listAsked()
		return h
	}
	local := fmt.Sprintf("127.0.0.1:%d ", port)
	for _, c := range []struct {
		name string
		do   func(h *hand, answer chan reply)
	}{
		{"until a list and a look came", func(h *hand, answer chan reply) {
			asked := h.now
			h.wait(10 * time.Millisecond)
			h.unanswered("before the list", answer)
			h.listAskedAt(asked.Add(-time.Millisecond), web)
			h.unanswered("after a list that was asked for before", answer)
			h.listAskedAt(asked, web)
			h.unanswered("before the look", answer)
			h.wait(10 * time.Millisecond)
			h.probed(port, probeAnswered)
			h.healthy("after the look", answer, "ok")
		}},
		{"a look that finds nobody", func(h *hand, answer chan reply) {
			h.list(web)
			h.probed(port, probeSilent)
			h.healthy("after the look", answer, "degraded", local+"pending: "+reasonSilent)
		}},
		{"for a look that began later", func(h *hand, answer chan reply) {
			h.list(web)
			h.wait(time.Millisecond)
			later := h.ask("health")
			h.list(web)
			h.probed(port, probeAnswered)
			h.healthy("after a look", answer, "ok")
			h.unanswered("after a look that began before", later)
			h.probed(port, probeSilent)
			h.healthy("after one that began later", later, "degraded", local+"pending: "+reasonSilent)
		}},
		{"a look that sees nothing is none", func(h *hand, answer chan reply) {
			h.list(web)
			h.wait(time.Second)
			h.probed(port, probeUnknown)
			h.unanswered("after a look that saw nothing", answer)
			h.wait(time.Second)
			h.probed(port, probeAnswered)
			h.healthy("after a second look", answer, "ok")
		}},
		{"what a connection carries is a look", func(h *hand, answer chan reply) {
			h.list(web)
			h.unanswered("before the look", answer)
			h.wait(10 * time.Millisecond)
			h.state.answered(h.now, h.forward(port).key)
			h.healthy("after an answer", answer, "ok")
		}},
		{"for a container that was just started", func(h *hand, answer chan reply) {
			h.list(web, ctr(idB, "new", onPort(other)))
			h.probed(port, probeAnswered)
			h.unanswered("before the look at the new one", answer)
			h.probed(other, probeSilent)
			h.healthy("after it", answer, "degraded", "*pending: "+reasonSilent)
		}},
		{"for nothing that cannot be known", func(h *hand, answer chan reply) {
			h.list(frozen(web), unprobed(ctr(idB, "shy", onPort(other))))
			h.healthy("after the list", answer, "degraded", local+"pending: "+reasonFrozen)
		}},
		{"5 s at most for a look", func(h *hand, answer chan reply) {
			until := h.now.Add(lookTimeout)
			h.list(web)
			h.now = until.Add(-time.Millisecond)
			if wake := h.step(h.now); wake.After(until) {
				h.t.Errorf("looked at again %v too late", wake.Sub(until))
			}
			h.unanswered("too soon", answer)
			h.now = until
			h.healthy("in the end", answer, "degraded", local+"could not be verified*")
		}},
		{"5 s at most for a list", func(h *hand, answer chan reply) {
			h.now = h.now.Add(lookTimeout - time.Millisecond)
			h.unanswered("too soon", answer)
			h.now = h.now.Add(time.Millisecond)
			h.healthy("in the end", answer, "degraded", "*the remote engine does not answer*")
		}},
		{"5 s at most for a list of an engine that is down", func(h *hand, answer chan reply) {
			h.engineLost(h.link, true, errors.New("no such file"))
			h.now = h.now.Add(lookTimeout)
			h.healthy("in the end", answer, "degraded", "the remote engine does not answer: no such file")
		}},
		{"not for a lost link", func(h *hand, answer chan reply) {
			h.list(web)
			h.unanswered("before the look", answer)
			h.down(h.now, h.link, errors.New("gone"))
			h.retryAt = h.now.Add(time.Hour)
			h.healthy("at once", answer, "down", "*gone")
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := start(t)
			answer := h.ask("health")
			if !h.listAsked() {
				t.Error("no list was asked for")
			}
			c.do(h, answer)
		})
	}
}

// Where nothing is forwarded yet, a container that was just started counts, too.
func TestHealthWaitsForAList(t *testing.T) {
	port := unusedPort(t)
	h := connectedHand(t)
	h.wait(time.Second)
	answer := h.ask("health")
	h.unanswered("before the list", answer)
	h.list(ctr(idA, "web", onPort(port)))
	h.unanswered("before the look", answer)
	h.probed(port, probeAnswered)
	h.healthy("after the look", answer, "ok")
}

func TestVerifyWaits(t *testing.T) {
	port := unusedPort(t)
	web := ctr(idA, "web", onPort(port))
	h := connectedHand(t, web)
	h.probed(port, probeAnswered)
	h.wait(time.Second)

	answer := h.ask("verify")
	h.unanswered("before the list", answer)
	h.list(web)
	h.unanswered("before the look", answer)
	h.probed(port, probeSilent)
	if a := h.answered("after the look", answer); a.err != nil || a.result.(*snapshot).Forwards[0].Reason != reasonSilent {
		t.Errorf("answered %+v, %v", a.result, a.err)
	}

	for _, listed := range []bool{false, true} {
		h.wait(time.Second)
		answer = h.ask("verify")
		if listed {
			h.list(web)
		}
		h.now = h.now.Add(lookTimeout - time.Millisecond)
		h.unanswered("too soon", answer)
		h.now = h.now.Add(time.Millisecond)
		if a := h.answered("in the end", answer); a.err == nil {
			t.Errorf("listed %v: what nobody could look at was told as verified: %+v", listed, a.result)
		}
		if f := h.forward(port); f.probe != 0 {
			h.probed(port, probeSilent)
		}
	}
}

// A client that waits for the ports to follow gets its answer when a list asked for later has come and they do, or when
// none will. It causes no probes.
func TestSettle(t *testing.T) {
	port, other := unusedPort(t), unusedPort(t)
	web, late := ctr(idA, "web", onPort(port)), ctr(idB, "late", onPort(other))
	local := netip.AddrPortFrom(loopback4, other)
	settled := func(h *hand, what string, answer chan reply, want bool) {
		t.Helper()
		if a := h.answered(what, answer); a.err != nil || a.result.(map[string]bool)["settled"] != want {
			t.Errorf("%s: answered %v, %v, want %v", what, a.result, a.err, want)
		}
	}
	for _, c := range []struct {
		name string
		do   func(h *hand, answer chan reply)
	}{
		{"when its ports are open", func(h *hand, answer chan reply) {
			asked := h.now
			h.wait(10 * time.Millisecond)
			h.unanswered("before the list", answer)
			h.listAskedAt(asked.Add(-time.Millisecond), web)
			h.unanswered("after a list that was asked for before", answer)
			h.listAskedAt(asked, web, late)
			if !accepts(local) {
				t.Error("the port is not open yet")
			}
			h.unanswered("before its service answers", answer)
			h.probed(other, probeAnswered)
			settled(h, "when it does", answer, true)
			if f := h.forward(port); f.probe != 0 {
				t.Error("a port that was there before is probed")
			}
		}},
		{"after a while, if a service does not listen yet", func(h *hand, answer chan reply) {
			h.list(web, late)
			h.probed(other, probeSilent)
			if wake := h.wait(settleGrace - time.Millisecond); wake.After(h.now.Add(time.Millisecond)) {
				t.Errorf("it will be looked at again in %v", wake.Sub(h.now))
			}
			h.unanswered("within the grace", answer)
			h.wait(time.Millisecond)
			settled(h, "after it", answer, true)
		}},
		{"when its ports are closed", func(h *hand, answer chan reply) {
			h.list(web, late)
			h.wait(time.Second)
			settled(h, "after the first list", answer, true)
			answer = h.ask("settle")
			h.list(web)
			if accepts(local) {
				t.Error("the port is still open")
			}
			settled(h, "after the second", answer, true)
		}},
		{"when a port is known to be in conflict", func(h *hand, answer chan reply) {
			l, err := net.Listen("tcp4", local.String())
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			h.list(web, late)
			settled(h, "after the list", answer, true)
			if f := h.snapshot().Forwards; len(f) != 2 || f[0].Status != conflict && f[1].Status != conflict {
				t.Errorf("no conflict is known: %+v", f)
			}
		}},
		{"at once while paused", func(h *hand, answer chan reply) {
			h.unanswered("before the pause", answer)
			h.ask("pause")
			settled(h, "when paused", answer, true)
			settled(h, "asked while paused", h.ask("settle"), true)
		}},
		{"at once without a connection", func(h *hand, answer chan reply) {
			h.unanswered("before the end", answer)
			h.down(h.now, h.link, errors.New("gone"))
			h.retryAt = h.now.Add(time.Hour)
			settled(h, "when lost", answer, false)
			settled(h, "asked while lost", h.ask("settle"), false)
		}},
		{"at its deadline", func(h *hand, answer chan reply) {
			h.now = h.now.Add(lookTimeout - time.Millisecond)
			h.unanswered("too soon", answer)
			h.now = h.now.Add(time.Millisecond)
			settled(h, "in the end", answer, false)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := connectedHand(t, web)
			h.probed(port, probeAnswered)
			h.wait(10 * time.Second)
			h.listAsked()
			answer := h.ask("settle")
			if !h.listAsked() {
				t.Error("no list was asked for")
			}
			c.do(h, answer)
		})
	}
}

// Who is not connected answers at once, with what it knows.
func TestWaitersNotConnected(t *testing.T) {
	for _, connects := range []bool{false, true} {
		h := &hand{runner: loopOf(t), t: t, now: epoch}
		h.retryAt = h.now.Add(time.Hour)
		if connects {
			h.linkUp()
		}
		h.shown.Connection.LastError = "no route"
		h.healthy("health", h.ask("health"), "down", "connecting: no route")
		if a := h.answered("verify", h.ask("verify")); a.err != nil || a.result.(*snapshot).Connection.State != connecting {
			t.Errorf("verify: %+v, %v", a.result, a.err)
		}
	}
}

func TestPauseResumeReload(t *testing.T) {
	port, other := unusedPort(t), unusedPort(t)
	local := func(p uint16) netip.AddrPort { return netip.AddrPortFrom(loopback4, p) }
	h := connectedHand(t, unprobed(ctr(idA, "web", onPort(port), onPort(other))))
	h.dir = t.TempDir()
	is := func(what string, first, second bool) {
		t.Helper()
		if a, b := accepts(local(port)), accepts(local(other)); a != first || b != second {
			t.Errorf("%s: the ports are open: %v, %v, want %v, %v", what, a, b, first, second)
		}
	}
	is("listed", true, true)
	for _, c := range []struct {
		method, config string
		first, second  bool
		want           string
		said           string // "": nothing
	}{
		{"pause", "", false, false, "map[paused:true]", "paused"},
		{"pause", "", false, false, "map[paused:true]", ""},
		{"resume", "", true, true, "map[paused:false]", "resumed"},
		{"resume", "", true, true, "map[paused:false]", ""},
		{"reload", fmt.Sprintf(`{"skip": [%d]}`, other), true, false, "map[reloaded:true]", "configuration reloaded"},
		{"reload", `{"skip": "nonsense`, true, false, "an error", ""},
		{"reload", `{}`, true, true, "map[reloaded:true]", "configuration reloaded"},
		{"dance", "", true, true, "an error", ""},
	} {
		if c.config != "" {
			if err := os.WriteFile(filepath.Join(h.dir, "config.json"), []byte(c.config), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		h.log.Reset()
		h.wait(time.Second)
		a := h.answered(c.method, h.ask(c.method))
		got := fmt.Sprint(a.result)
		if a.err != nil {
			got = "an error"
		}
		if got != c.want {
			t.Errorf("%s %s: %v, %v, want %s", c.method, c.config, a.result, a.err, c.want)
		}
		if said := h.log.String(); !strings.Contains(said, c.said) || c.said == "" && strings.Contains(said, "msg=\"paused") {
			t.Errorf("%s: said %q, want %q", c.method, said, c.said)
		}
		is(c.method+" "+c.config, c.first, c.second) // by the time of the answer
		if <-h.ask("status"); h.state.paused == c.first {
			t.Errorf("%s: paused is %v", c.method, h.state.paused)
		}
	}
}

func TestDown(t *testing.T) {
	plain, stubborn := errors.New("no route"), &connectError{"wrong key", true}
	refused := fmt.Errorf("no session: %w", &muxError{})
	for _, c := range []struct {
		name     string
		retry    bool
		everUp   bool
		proven   bool
		failures int
		up       time.Duration // 0: it was an attempt
		err, why error
		fails    bool
		min, max time.Duration // until the next attempt
		state    string
	}{
		{name: "the first attempt", err: plain, fails: true},
		{name: "the first attempt, stubborn", err: stubborn, fails: true},
		{name: "the first attempt, -retry", retry: true, err: plain, state: connecting},
		{name: "the first attempt, stubborn, -retry", retry: true, err: stubborn, min: time.Minute, max: time.Minute, state: connecting},
		{name: "the second attempt, -retry", retry: true, failures: 1, err: plain, min: 750 * time.Millisecond, max: time.Second, state: connecting},
		{name: "no second session", everUp: true, up: time.Second, err: refused, fails: true},
		{name: "no second session, -retry", retry: true, everUp: true, up: time.Second, err: refused, state: reconnecting},
		{name: "no second session, though there was", everUp: true, proven: true, up: time.Second, err: refused, state: reconnecting},
		{name: "lost", everUp: true, proven: true, up: time.Hour, err: plain, state: reconnecting},
		{name: "lost before events were followed", everUp: true, up: time.Second, err: plain, state: reconnecting},
		{name: "lost for a reason of the loop's", everUp: true, proven: true, up: time.Hour, err: plain, why: errors.New("our reason"), state: reconnecting},
		{name: "a first failure", everUp: true, proven: true, failures: 1, err: plain, min: 750 * time.Millisecond, max: time.Second, state: reconnecting},
		{name: "a second failure", everUp: true, proven: true, failures: 2, err: plain, min: 1500 * time.Millisecond, max: 2 * time.Second, state: reconnecting},
		{name: "many failures", everUp: true, proven: true, failures: 1000, err: plain, min: 1500 * time.Millisecond, max: 2 * time.Second, state: reconnecting},
		{name: "many failures, up for a moment", everUp: true, proven: true, failures: 1000, up: steadyAfter - 1, err: plain, min: 1500 * time.Millisecond, max: 2 * time.Second, state: reconnecting},
		{name: "many failures, up for long", everUp: true, proven: true, failures: 1000, up: steadyAfter, err: plain, state: reconnecting},
		{name: "stubborn", everUp: true, proven: true, up: time.Hour, err: stubborn, min: time.Minute, max: time.Minute, state: reconnecting},
	} {
		t.Run(c.name, func(t *testing.T) {
			port := unusedPort(t)
			h := &hand{runner: loopOf(t), t: t, now: epoch}
			h.runner.log = slog.New(slog.NewTextHandler(&h.log, nil))
			if h.linkUp(); c.up > 0 {
				h.list(unprobed(ctr(idA, "web", onPort(port))))
			} else if c.everUp {
				h.connection(h.now, reconnecting)
			}
			h.gate.set(&master{})
			h.retry, h.everUp, h.proven, h.failures = c.retry, c.everUp, c.proven, c.failures
			h.link.why = c.why
			h.now = h.now.Add(c.up)
			h.down(h.now, h.link, c.err)
			if c.fails {
				if h.failed == nil || h.failed.Error() != "cannot connect to "+h.host.String()+": "+c.err.Error() {
					t.Fatalf("the instance ends with %v, want %v", h.failed, c.err)
				}
				return
			}
			if h.failed != nil || h.link != nil || h.gate.master != nil || h.state.ready {
				t.Fatalf("failed %v, link %v, gate %v, ready %v", h.failed, h.link, h.gate.master, h.state.ready)
			}
			if wait := h.retryAt.Sub(h.now); wait < c.min || wait > c.max {
				t.Errorf("the next attempt in %v, want %v to %v", wait, c.min, c.max)
			}
			want := c.err
			if c.why != nil {
				want = c.why
			}
			if got := h.shown.Connection; got.State != c.state || got.LastError != want.Error() {
				t.Errorf("the connection is %+v, want %s because of %v", got, c.state, want)
			}
			said := "connection lost: "
			if !c.everUp {
				said = "cannot connect to " + h.host.String() + ": "
			}
			if n := strings.Count(h.log.String(), said); n != 1 {
				t.Errorf("said %d times:\n%s", n, &h.log)
			}
			h.retryAt = h.now.Add(time.Hour)
			if h.step(h.now); c.up > 0 {
				if f := h.forward(port); f.reason != reasonLost || !accepts(f.local) {
					t.Errorf("%s %q, open %v, want it open and lost", f.status, f.reason, accepts(f.local))
				}
			}
			h.link = handLink(h.runner)
			if h.down(h.now, h.link, want); strings.Count(h.log.String(), said) != 1 {
				t.Errorf("the same is said again:\n%s", &h.log)
			}
			h.linkUp()
			if h.list(); h.shown.Connection.State != connected || h.engineErr() != nil {
				t.Errorf("after a list: %+v", h.shown.Connection)
			}
			if n := h.shown.Connection.Reconnects; n != map[bool]int{true: 1}[c.everUp] {
				t.Errorf("%d reconnects", n)
			}
		})
	}
}

// The engine's silence is told once, and its end.
func TestEngineLostAndBack(t *testing.T) {
	h := connectedHand(t)
	const lost, back = "the remote engine does not answer", "the remote engine answers again"
	is := func(what string, losses, backs int, warns bool) {
		t.Helper()
		if n, m := strings.Count(h.log.String(), lost), strings.Count(h.log.String(), back); n != losses || m != backs {
			t.Errorf("%s: lost is said %d times, back %d, want %d, %d", what, n, m, losses, backs)
		}
		if got := strings.Contains(strings.Join(h.snapshot().Warnings, "\n"), lost); got != warns {
			t.Errorf("%s: warned of is %v, want %v", what, got, warns)
		}
	}
	is("at first", 0, 0, false)
	h.engineLost(h.link, false, errors.New("x"))
	is("events lost", 1, 0, true)
	h.engineLost(h.link, true, errors.New("y"))
	is("lists lost, too", 1, 0, true)
	h.following(h.now, h.link)
	is("events back", 1, 0, true)
	h.list()
	is("lists back", 1, 1, false)
	h.list()
	h.following(h.now, h.link)
	is("later", 1, 1, false)
}

// The time of a list, by which probes wait, follows one that was held up only so far.
func TestRoundTripTime(t *testing.T) {
	h := connectedHand(t)
	ms := time.Millisecond
	for _, c := range []struct{ took, want time.Duration }{{20 * ms, 20 * ms}, {4000 * ms, 40 * ms}, {10 * ms, 10 * ms}} {
		h.listed(h.now, h.link, nil, h.now, c.took, "Docker")
		if h.link.rtt != c.want {
			t.Errorf("after a list that took %v: %v, want %v", c.took, h.link.rtt, c.want)
		}
	}
}

// What is carried is told of at a beat, and only where something was.
func TestBeatTellsOfTraffic(t *testing.T) {
	port := unusedPort(t)
	h := connectedHand(t, unprobed(ctr(idA, "web", onPort(port))))
	h.withFiles(t)
	h.lastBeat = h.now
	m := h.forward(port).meter
	for i, c := range []struct {
		do   func()
		want bool
	}{
		{func() {}, false},
		{func() { m.connections.Add(1) }, true},
		{func() {}, false},
		{func() { m.open.Add(1) }, true},
		{func() { m.in.Add(1) }, true},
		{func() { m.out.Add(1) }, true},
		{func() {}, false},
	} {
		c.do()
		h.changed = false
		h.now = h.now.Add(beatEvery)
		if h.beat(h.now); h.changed != c.want {
			t.Errorf("%d: changed is %v, want %v", i, h.changed, c.want)
		}
	}
}

// A port of which somebody has the other loopback: forwarded, with a warning that
// goes when he does.
func TestHalfOpen(t *testing.T) {
	if !hasIPv6() {
		t.Skip("this machine has no ::1")
	}
	port := unusedPort(t)
	four, six := netip.AddrPortFrom(loopback4, port), netip.AddrPortFrom(loopback6, port)
	holder, err := net.Listen("tcp6", six.String())
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Close()
	web := unprobed(ctr(idA, "web", onPort(port)))
	h := connectedHand(t, web)
	h.withFiles(t)
	h.lastBeat = h.now
	f := h.forward(port)
	d := h.doors[f.key]
	if f.status != active || !accepts(four) || d == nil {
		t.Fatalf("%s %q, and 127.0.0.1 answers: %v", f.status, f.reason, accepts(four))
	}
	warn := func() { // who has it is found out elsewhere
		t.Helper()
		select {
		case do := <-h.tasks:
			do(h.now)
		case <-time.After(time.Minute):
			t.Fatal("nobody looks for who has ::1")
		}
	}
	beat := func() {
		h.now = h.now.Add(beatEvery)
		h.changed = false
		h.beat(h.now)
	}
	warn()
	want := six.String() + " is not forwarded: address already in use"
	if _, err := exec.LookPath("lsof"); err == nil {
		want += fmt.Sprintf(" (*pid %d)", os.Getpid())
	}
	warnings := h.snapshot().Warnings
	if len(warnings) != 1 || !matches(want, warnings[0]) || !h.changed {
		t.Errorf("warnings %q, want %q; changed %v", warnings, want, h.changed)
	}
	beat()
	if len(h.snapshot().Warnings) != 1 || len(h.tasks) != 0 || strings.Count(h.log.String(), "is not forwarded") != 1 {
		t.Errorf("after a beat: warnings %q, log:\n%s", h.snapshot().Warnings, &h.log)
	}
	holder.Close()
	beat()
	if got := h.snapshot().Warnings; len(got) != 0 || !h.changed || !accepts(six) {
		t.Errorf("freed: warnings %q, changed %v, ::1 answers: %v", got, h.changed, accepts(six))
	}
	// Who had it is known only now.
	h.warnMissing(d, six, errors.New("late"), "")
	if got := h.snapshot().Warnings; len(got) != 0 {
		t.Errorf("too late: warnings %q", got)
	}
	h.happened(h.now, h.link, event{"die", idA})
	if h.step(h.now); accepts(four) || accepts(six) || len(h.doors) != 0 {
		t.Errorf("after its end 127.0.0.1 answers: %v, ::1: %v, doors: %d", accepts(four), accepts(six), len(h.doors))
	}

	// The port is closed, and opened again, before it is known.
	if holder, err = net.Listen("tcp6", six.String()); err != nil {
		t.Fatal(err)
	}
	defer holder.Close()
	for range 2 {
		h.happened(h.now, h.link, event{"start", idA})
		h.list(web)
		h.happened(h.now, h.link, event{"die", idA})
		h.step(h.now)
		warn()
		if got := h.snapshot().Warnings; len(got) != 0 {
			t.Errorf("closed: warnings %q", got)
		}
	}
}

// What a door cannot listen on at all it opens nothing of.
func TestOpenFails(t *testing.T) {
	port := unusedPort(t)
	four := netip.AddrPortFrom(loopback4, port)
	holder, err := net.Listen("tcp4", four.String())
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Close()
	h := connectedHand(t, unprobed(ctr(idA, "web", onPort(port))))
	if f := h.forward(port); f.status != conflict || f.reason != "bind: address already in use" || len(h.doors) != 0 {
		t.Errorf("%s %q with %d doors", f.status, f.reason, len(h.doors))
	}
	if six := netip.AddrPortFrom(loopback6, port); accepts(six) {
		t.Errorf("%v is open, and 127.0.0.1 is not ours", six)
	}
	if wake := h.step(h.now); !wake.Equal(h.now.Add(bindDelay)) {
		t.Errorf("tried again in %v, want %v", wake.Sub(h.now), bindDelay)
	}
	holder.Close()
	h.wait(bindDelay)
	if f := h.forward(port); f.status != active || !accepts(four) {
		t.Errorf("freed: %s %q", f.status, f.reason)
	}
}

// Where the limit on open files is low some ports stay closed, the second
// loopback's first, and are opened once others are closed.
func TestFileLimit(t *testing.T) {
	if !hasIPv6() {
		t.Skip("this machine has no ::1")
	}
	h := connectedHand(t)
	h.withFiles(t)
	h.lastBeat = h.now
	h.maxListeners = 3
	ports := []string{onPort(unusedPort(t)), onPort(unusedPort(t))}
	one, two := unprobed(ctr(idA, "one", ports[0])), unprobed(ctr(idB, "two", ports[1]))
	more := unprobed(ctr(strings.Repeat("c", 12), "more", onPort(unusedPort(t)), onPort(unusedPort(t))))
	is := func(what string, open, listeners int) {
		t.Helper()
		n := 0
		for _, f := range h.state.forwards {
			if a := accepts(f.local); a != (f.status == active) || !a && !matches("*limit on open files*", f.reason) {
				t.Errorf("%s: %s is %s %q, open: %v", what, f.local, f.status, f.reason, a)
			} else if a {
				n++
			}
			if accepts(netip.AddrPortFrom(loopback6, f.local.Port())) {
				listeners--
			}
		}
		if n != open || listeners != n || len(h.snapshot().Warnings) != 0 {
			t.Errorf("%s: %d forwards are open, want %d; %d listeners too few on ::1; warnings %q", what, n, open, listeners-n, h.snapshot().Warnings)
		}
	}
	h.list(one, two)
	is("two forwards", 2, 3)
	h.list(one, two, more)
	is("four", 2, 3)
	h.list(more)
	h.wait(bindDelay)
	h.now = h.now.Add(beatEvery)
	h.beat(h.now)
	h.step(h.now)
	is("two others", 2, 3)
	h.list(one)
	is("one", 1, 2)
	if h.list(); h.listeners != 0 {
		t.Errorf("%d listeners are counted, and none is open", h.listeners)
	}
}

// What is shown is posted when it changes, and only then.
func TestPosts(t *testing.T) {
	port := unusedPort(t)
	web := unprobed(ctr(idA, "web", onPort(port)))
	h := connectedHand(t, web)
	posted := func(do func()) bool {
		_, next := h.board.look()
		do()
		h.wait(time.Millisecond)
		select {
		case <-next:
			return true
		default:
			return false
		}
	}
	for _, c := range []struct {
		name string
		do   func()
		want bool
	}{
		{"nothing", func() {}, false},
		{"the same list", func() { h.list(web) }, false},
		{"another list", func() { h.list() }, true},
		{"an event", func() { h.happened(h.now, h.link, event{"rename", idA}) }, true},
		{"a change of health", func() { h.happened(h.now, h.link, event{"health_status", idA}) }, false},
		{"the state file cannot be written", func() { h.fileTrouble(errors.New("full")) }, true},
		{"it can again", func() { h.fileTrouble(nil) }, true},
		{"the engine does not answer", func() { h.engineLost(h.link, true, errors.New("down")) }, true},
		{"a list of the engine's", func() { h.list() }, true},
	} {
		if got := posted(c.do); got != c.want {
			t.Errorf("%s: posted is %v, want %v", c.name, got, c.want)
		}
	}
	if snap, _ := h.board.look(); !slices.Equal(snap.Warnings, []string{}) || snap.LastEventAt == nil || snap.Engine != "Docker" {
		t.Errorf("in the end: %+v", snap)
	}
}
