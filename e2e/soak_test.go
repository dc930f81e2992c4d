package e2e

// The soak: random faults on the rig while containers and their services come
// and go, clients stream data, and others connect all the time. After every
// fault nothing is called active behind which nobody is, as soon as health has
// looked; and before long the engine's list, the forwards, what status says and
// what really answers are the same again. No client is refused or gets an empty
// answer where somebody is there. RDHPF_SOAK says for how long (make soak: 20m),
// RDHPF_SOAK_SEED repeats one.

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

const (
	soakSlots = 8
	soakBound = 50 * time.Second // for the invariant to be back: ssh may be stopped while it connects
)

type soak struct {
	t     *testing.T
	g     *testRig
	p     *runProc
	rng   *rand.Rand
	port  int // of the first slot
	slots [soakSlots]*box
	mute  [soakSlots]bool // the container runs, and its service has ended
	began time.Time
	took  map[string][]time.Duration // recoveries, by fault

	streamed, streams atomic.Int64
	visits, judged    atomic.Int64
	wrong             atomic.Int64 // visits, of which not all are told: a dead instance refuses hundreds

	mu      sync.Mutex // guards what follows
	steady  [soakSlots]presence
	settled int    // how often
	strikes []span // when connections that were open could be lost
}

// presence is who is at a port and stays; zero where that may change.
type presence struct {
	greeting string
	since    int // which settling
}

func TestSoak(t *testing.T) {
	length, err := time.ParseDuration(os.Getenv("RDHPF_SOAK"))
	if err != nil {
		t.Skip("RDHPF_SOAK does not say for how long, see make soak")
	}
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("RDHPF_SOAK_SEED"); s != "" {
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	s := &soak{t: t, g: needRig(t), rng: rand.New(rand.NewPCG(seed, 0)), began: time.Now(), took: make(map[string][]time.Duration)}
	t.Cleanup(func() { s.g.endConnections(t) }) // some of sshd's processes are stopped
	s.port = freePorts(t, soakSlots)
	s.say("seed %d, for %v", seed, length)
	s.p = startRun(t, s.g, "")
	s.recovers("start")
	p := s.p
	before, master := p.holds()
	rss := rssOf(t, p.cmd.Process.Pid)
	done := make(chan struct{})
	var background sync.WaitGroup
	for _, do := range []func(<-chan struct{}){s.stream, s.visit} {
		background.Add(1)
		go func() {
			defer background.Done()
			do(done)
		}()
	}
	rest := sync.OnceFunc(func() {
		close(done)
		background.Wait()
	})
	t.Cleanup(rest) // also where the soak is given up
	faults := s.faults()
	for n := 1; time.Since(s.began) < length; n++ {
		for range 1 + s.rng.IntN(4) {
			s.churn()
		}
		f := faults[s.rng.IntN(len(faults))]
		detail := f.do()
		took := s.recovers(f.name)
		s.say("%d: %s %s: back after %v", n, f.name, detail, took.Round(time.Millisecond))
	}
	rest()
	for i, b := range s.slots {
		if b != nil {
			s.touch(i)
			b.remove()
			s.slots[i], s.mute[i] = nil, false
		}
	}
	s.recovers("end")
	s.p.returnsTo(before, master)
	after, _ := s.p.holds()
	s.say("%d MiB streamed in %d connections; %d visits, %d of them to somebody who was there all the time, %d of those not as they should be; %d fds, %d children, %d KiB of memory at the start; %d, %d, %d KiB at the end",
		s.streamed.Load()>>20, s.streams.Load(), s.visits.Load(), s.judged.Load(), s.wrong.Load(), before.fds, before.children, rss, after.fds, after.children, rssOf(t, s.p.cmd.Process.Pid))
	most := 2*rss + 8<<10
	if raceDetector { // the detector keeps shadows of all that passed through, however long ago
		most = 4 * rss
	}
	if now := rssOf(t, s.p.cmd.Process.Pid); now > most {
		t.Errorf("memory grew from %d KiB to %d KiB", rss, now)
	}
	var names []string
	for name := range s.took {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		all := s.took[name]
		slices.Sort(all)
		s.say("%-28s %3d times, median %v, most %v", name, len(all), all[len(all)/2].Round(time.Millisecond), all[len(all)-1].Round(time.Millisecond))
	}
	s.p.stopsAfterCut()
}

// say prints at once: a soak that is cut short has told what it did.
func (s *soak) say(format string, args ...any) {
	fmt.Printf("%7.1fs %s\n", time.Since(s.began).Seconds(), fmt.Sprintf(format, args...))
}

func rssOf(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		t.Fatal(err)
	}
	pages, _ := strconv.Atoi(strings.Fields(string(b))[1])
	return pages * os.Getpagesize() >> 10
}

// churn has something happen to a container or its service.
func (s *soak) churn() {
	i := s.rng.IntN(soakSlots)
	s.touch(i)
	b := s.slots[i]
	switch n := s.rng.IntN(14); {
	case b == nil:
		s.slots[i] = s.g.bootSpec(s.t, boxSpec{restart: "unless-stopped", ports: []boxPort{{host: s.port + i, private: 80}}})
	case n < 4:
		b.remove()
		s.slots[i], s.mute[i] = nil, false
	case n < 7:
		b.do("restart?t=0")
		s.mute[i] = false
	case n < 8:
		b.do("pause")
		b.do("unpause")
	case n < 10:
		b.do("kill")
		b.do("start")
		s.mute[i] = false
	case s.mute[i]:
		b.serviceBegins()
		s.mute[i] = false
	default:
		b.serviceEnds()
		s.mute[i] = true
	}
}

// touch says that who is there may change, until all is settled again.
func (s *soak) touch(slots ...int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, i := range slots {
		s.steady[i] = presence{}
	}
}

func (s *soak) touchAll() {
	for i := range s.slots {
		s.touch(i)
	}
}

// settle says who is there from now on.
func (s *soak) settle() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.settled++
	for i, b := range s.slots {
		if b != nil && !s.mute[i] && s.steady[i].since == 0 {
			s.steady[i] = presence{b.greeting, s.settled}
		}
	}
}

// strike has a fault cut connections, until blow returns.
func (s *soak) strike(blow func()) {
	s.mu.Lock()
	n := len(s.strikes)
	s.strikes = append(s.strikes, span{from: time.Now()})
	s.mu.Unlock()
	blow()
	s.mu.Lock()
	s.strikes[n].to = time.Now()
	s.mu.Unlock()
}

// visit connects to one slot after the other, all the time, and judges what it
// gets where somebody was there from the beginning to the end.
func (s *soak) visit(done <-chan struct{}) {
	var all sync.WaitGroup
	defer all.Wait()
	tick := time.NewTicker(100 * time.Millisecond) // so many can wait for 10 s
	defer tick.Stop()
	who := func(i int) presence {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.steady[i]
	}
	for n := 0; ; n++ {
		select {
		case <-done:
			return
		case <-tick.C:
		}
		i := n % soakSlots
		all.Add(1)
		go func() {
			defer all.Done()
			before := who(i)
			v := visitPort(s.port + i)
			s.visits.Add(1)
			if before.since == 0 || who(i) != before {
				return
			}
			s.judged.Add(1)
			s.mu.Lock()
			err := v.wrong(before.greeting, s.strikes...)
			s.mu.Unlock()
			if err != nil && s.wrong.Add(1) <= 20 {
				s.t.Errorf("%.1fs: slot %d, %s: %v", v.began.Sub(s.began).Seconds(), i, strings.TrimSpace(before.greeting), err)
			}
		}()
	}
}

// stream pulls data through whatever forward there is; that a fault cuts it is
// no failure, that a byte of it is wrong is.
func (s *soak) stream(done <-chan struct{}) {
	for n := 0; ; n++ {
		select {
		case <-done:
			return
		default:
		}
		c, err := net.DialTimeout("tcp", localAddr(s.port+n%soakSlots), time.Second)
		if err != nil {
			time.Sleep(20 * time.Millisecond)
			continue
		}
		s.streams.Add(1)
		c.SetDeadline(time.Now().Add(5 * time.Second))
		fmt.Fprintf(c, "GET /bytes?n=%d HTTP/1.0\r\n\r\n", 4<<20)
		got, _ := io.ReadAll(c)
		c.Close()
		if _, body, ok := bytes.Cut(got, []byte("\r\n\r\n")); ok {
			s.streamed.Add(int64(len(body)))
			if i := bytes.IndexFunc(body, func(r rune) bool { return r != 0 }); i >= 0 {
				s.t.Errorf("byte %d of a stream is %d", i, body[i])
			}
		}
	}
}

// recovers waits until the invariant holds, and notes how long that took.
func (s *soak) recovers(fault string) time.Duration {
	s.t.Helper()
	began := time.Now()
	s.neverWell()
	for {
		err := s.invariant()
		took := time.Since(began)
		if err == nil {
			s.settle()
			s.took[fault] = append(s.took[fault], took)
			return took
		}
		if took > soakBound {
			s.t.Fatalf("%.1fs: after %s, not within %v: %v", time.Since(s.began).Seconds(), fault, soakBound, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// neverWell has health look: whatever else may be wrong still, all is not well,
// and no service that has ended is called active after it, unless health says that
// it could not look, at its port or at all.
func (s *soak) neverWell() {
	s.t.Helper()
	out, errs, code := s.p.tell("health")
	if out == "" { // it is being started again, at the most
		s.say("health: %d, %s", code, strings.TrimSpace(errs))
		return
	}
	if code == 0 && slices.Contains(s.mute[:], true) {
		s.t.Errorf("%.1fs: a service has ended, and health says %q", time.Since(s.began).Seconds(), out)
	}
	snap := new(report)
	if err := s.p.ask("status", snap); err != nil {
		s.t.Errorf("%.1fs: health answers, and then status: %v", time.Since(s.began).Seconds(), err)
	}
	for _, f := range snap.Forwards {
		if i := int(f.LocalPort) - s.port; f.Status == active && s.mute[i] &&
			!strings.Contains(out, fmt.Sprint(f.LocalPort)) && !strings.Contains(out, "nothing could be verified") {
			s.t.Errorf("%.1fs: the service on slot %d has ended, and after health (%d, %q) it is %+v", time.Since(s.began).Seconds(), i, code, out, f)
		}
	}
}

// invariant: what the engine lists is what is forwarded, what status says, and
// what answers.
func (s *soak) invariant() error {
	var list []struct {
		ID    string `json:"Id"`
		Ports []struct{ PublicPort int }
	}
	if err := s.g.call("GET", "/containers/json", nil, &list); err != nil {
		return err
	}
	listed := make(map[int]string)
	for _, c := range list {
		for _, p := range c.Ports {
			if p.PublicPort != 0 {
				listed[p.PublicPort] = c.ID[:12]
			}
		}
	}
	var snap report
	if err := s.p.ask("status", &snap); err != nil {
		return err
	}
	if len(snap.Forwards) != len(listed) {
		return fmt.Errorf("%d forwards, and the engine lists %d", len(snap.Forwards), len(listed))
	}
	for _, f := range snap.Forwards {
		want, reason := active, ""
		if s.mute[int(f.LocalPort)-s.port] {
			want, reason = pending, reasonSilent
		}
		if f.Status != want || f.Reason != reason || listed[int(f.LocalPort)] != f.ContainerID {
			return fmt.Errorf("%d is %s (%s) for %s, and the engine lists %s", f.LocalPort, f.Status, f.Reason, f.ContainerID, listed[int(f.LocalPort)])
		}
	}
	for i, b := range s.slots {
		port := s.port + i
		if b == nil {
			if err := refused(port); err != nil {
				return err
			}
		} else if s.mute[i] {
			if got, err := httpGet(port); err == nil {
				return fmt.Errorf("%d answers %q, and its service has ended", port, got)
			}
		} else if err := b.answering(port); err != nil {
			return err
		}
	}
	return nil
}

type soakFault struct {
	name string
	do   func() (detail string)
}

// faults are what may happen. Each has healed, but for rdhpf's part, when it
// returns.
func (s *soak) faults() []soakFault {
	seconds := func(from, to float64) time.Duration {
		return time.Duration((from + s.rng.Float64()*(to-from)) * float64(time.Second))
	}
	cut := func(command, on, off string) string {
		d := seconds(1, 25)
		s.strike(func() { s.g.ctl(s.t, command, on) })
		s.away(d)
		s.g.ctl(s.t, command, off)
		return d.Round(time.Millisecond).String()
	}
	return []soakFault{
		{"ssh killed", func() string { s.master(syscall.SIGKILL); return "" }},
		{"ssh ended", func() string { s.master(syscall.SIGTERM); return "" }},
		{"ssh stopped", func() string { s.master(syscall.SIGSTOP); return "" }},
		{"sshd's process killed", func() string { s.strike(func() { s.g.endConnections(s.t) }); return "" }},
		{"sshd's process stopped", func() string {
			s.strike(func() {
				for _, pid := range children(s.g.sshd(s.t)) {
					syscall.Kill(pid, syscall.SIGSTOP)
				}
			})
			return ""
		}},
		{"partition", func() string { return cut("partition", "on", "off") }},
		{"link down", func() string { return cut("link", "down", "up") }},
		{"engine restarted", func() string {
			s.touchAll()
			s.g.ctl(s.t, "dockerd", "restart")
			for i := range s.mute { // all are started again
				s.mute[i] = false
			}
			return ""
		}},
		{"control socket removed", func() string {
			before := s.p.status().Connection.Reconnects
			s.strike(func() { // when it is noticed, ssh is replaced
				os.Remove(s.p.paths().control)
				eventually(s.t, "that is noticed", func() error { // all works on meanwhile
					if s.p.status().Connection.Reconnects == before {
						return errors.New("it is not")
					}
					return nil
				})
			})
			return ""
		}},
		{"rdhpf and ssh stopped", func() string {
			d := seconds(1, 20)
			pid, ssh := s.p.cmd.Process.Pid, s.p.masterPid()
			s.strike(func() {
				syscall.Kill(pid, syscall.SIGSTOP)
				syscall.Kill(ssh, syscall.SIGSTOP)
			})
			s.away(d)
			syscall.Kill(ssh, syscall.SIGCONT)
			syscall.Kill(pid, syscall.SIGCONT)
			return d.Round(time.Millisecond).String()
		}},
		{"rdhpf killed, started again", func() string {
			s.touchAll() // its ports are closed meanwhile
			s.p.signal(syscall.SIGKILL)
			s.p.exits(-1)
			s.p = s.p.another()
			s.p.start()
			return ""
		}},
		{"local port taken", func() string {
			i := s.rng.IntN(soakSlots)
			s.touch(i)
			if s.slots[i] != nil {
				s.slots[i].do("kill")
				s.mute[i] = false
				refuses(s.t, s.port+i)
			}
			l, err := net.Listen("tcp", localAddr(s.port+i))
			if err != nil {
				s.t.Fatal(err)
			}
			if s.slots[i] != nil {
				s.slots[i].do("start")
			}
			d := seconds(0, 5)
			s.away(d)
			l.Close()
			return d.Round(time.Millisecond).String()
		}},
		{"nothing but churn", func() string { return "" }},
	}
}

// away lets time pass in which containers come and go.
func (s *soak) away(d time.Duration) {
	for end := time.Now().Add(d); time.Now().Before(end); {
		s.churn()
		time.Sleep(min(time.Until(end), time.Duration(s.rng.IntN(3000))*time.Millisecond))
	}
}

// master signals the run's ssh, once there is one.
func (s *soak) master(sig syscall.Signal) {
	eventually(s.t, "there is an ssh", func() (err error) {
		for _, pid := range children(s.p.cmd.Process.Pid) {
			if strings.Contains(cmdline(pid), " -M ") {
				s.strike(func() { err = syscall.Kill(pid, sig) })
				return err
			}
		}
		return errors.New("there is none")
	})
}
