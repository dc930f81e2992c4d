package e2e

// carry_test.go: connections that clients make, also while there is nothing to
// carry them, on which addresses, and what is counted of them.

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// visit is one connection of a client, that asks for a greeting.
type visit struct {
	began, ended time.Time
	got          string
	err          error
}

// visitPort makes one, and waits longer than rdhpf may let a client wait.
func visitPort(port int) (v visit) {
	v.began = time.Now()
	defer func() { v.ended = time.Now() }()
	c, err := net.DialTimeout("tcp", localAddr(port), patience)
	if err != nil {
		v.err = err
		return v
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(2 * patience)) // rdhpf itself may stand still
	_, asked := fmt.Fprint(c, "GET / HTTP/1.0\r\n\r\n")
	got, err := io.ReadAll(c)
	if err == nil && len(got) == 0 {
		err = asked // a reset is told once: by the write if it came before that
	}
	v.got, v.err = string(got), err
	return v
}

// few reports a number of errors by the first of them.
func few(t *testing.T, what string, errs []error) {
	t.Helper()
	if len(errs) > 0 {
		t.Errorf("%d %s: %v", len(errs), what, errors.Join(errs[:min(len(errs), 5)]...))
	}
}

// span is when something happened; without an end it lasts.
type span struct{ from, to time.Time }

// during tells when something happens.
func during(what func()) (s span) {
	s.from = time.Now()
	what()
	s.to = time.Now()
	return s
}

// wrong tells what is wrong with a visit to a container that was there all the
// time. A connection that was open when a fault struck may be reset, and one that
// waited for 10 s; no other, and none may be refused or look like an empty answer.
func (v visit) wrong(greeting string, strikes ...span) error {
	waited := v.ended.Sub(v.began)
	if v.err == nil && strings.HasSuffix(v.got, greeting) {
		return nil
	}
	struck := slices.ContainsFunc(strikes, func(s span) bool {
		return s.from.Before(v.ended) && (s.to.IsZero() || v.began.Before(s.to))
	})
	if errors.Is(v.err, syscall.ECONNRESET) && (struck || waited > 9*time.Second) {
		return nil
	}
	return fmt.Errorf("a client that came at %s was answered %q, %v after %.3f s", v.began.Format("15:04:05.000"), v.got, v.err, waited.Seconds())
}

// clients connect every 50 ms from now on.
type clients struct {
	stop   chan struct{}
	wg     sync.WaitGroup
	mu     sync.Mutex
	visits []visit
}

func startClients(port int) *clients {
	c := &clients{stop: make(chan struct{})}
	c.wg.Add(1)
	go func() {
		defer c.wg.Done()
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-c.stop:
				return
			case <-tick.C:
			}
			c.wg.Add(1)
			go func() {
				defer c.wg.Done()
				v := visitPort(port)
				c.mu.Lock()
				c.visits = append(c.visits, v)
				c.mu.Unlock()
			}()
		}
	}()
	return c
}

// all returns their visits once the last has ended. It can be called twice.
func (c *clients) all() []visit {
	select {
	case <-c.stop:
	default:
		close(c.stop)
	}
	c.wg.Wait()
	return c.visits
}

// Clients connect while the connection is lost and made again.
func TestE2EClientsDuringFaults(t *testing.T) {
	g := needRig(t)
	cut := func(t *testing.T, command, on, off string) span {
		t.Cleanup(func() { g.ctl(t, command, off) })
		strike := during(func() { g.ctl(t, command, on) })
		time.Sleep(time.Until(strike.from.Add(5 * time.Second))) // it is the fault, not a wait for one
		g.ctl(t, command, off)
		return strike
	}
	kill := func(t *testing.T, p *runProc) span {
		return during(func() {
			if err := syscall.Kill(p.masterPid(), syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		})
	}
	for _, c := range []struct {
		name  string
		fault func(t *testing.T, p *runProc) span
		lost  bool
	}{
		{"ssh killed", kill, true},
		{"ssh killed while the link is cut for 5 s", func(t *testing.T, p *runProc) span {
			strike := kill(t, p)
			cut(t, "partition", "on", "off")
			return strike
		}, true},
		{"partition of 5 s", func(t *testing.T, _ *runProc) span { return cut(t, "partition", "on", "off") }, false},
		{"link down for 5 s", func(t *testing.T, _ *runProc) span { return cut(t, "link", "down", "up") }, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			port := freePorts(t, 1)
			b := g.boot(t, port)
			p := startRun(t, g, "")
			p.becomes(port, active, "")
			came := startClients(port)
			t.Cleanup(func() { came.all() })
			eventually(t, "a client was served before", func() error {
				came.mu.Lock()
				defer came.mu.Unlock()
				if len(came.visits) == 0 {
					return errors.New("none yet")
				}
				return nil
			})
			strike := c.fault(t, p)
			if c.lost {
				p.waitLine("connected to ssh://" + p.host + " again")
			}
			b.answers(port)
			over := time.Now()
			visits := came.all()
			meanwhile := 0
			var wrong []error
			for _, v := range visits {
				if err := v.wrong(b.greeting, strike); err != nil {
					wrong = append(wrong, err)
				}
				if v.began.After(strike.to) && v.began.Before(over) {
					meanwhile++
				}
			}
			few(t, "clients", wrong)
			if meanwhile == 0 {
				t.Error("no client came during the fault")
			}
			p.becomes(port, active, "")
			p.stopsAfterCut()
		})
	}
}

// No client waits for ever, and only so many do.
func TestE2EClientsThatWaitInVain(t *testing.T) {
	g := needRig(t)
	const most, come = 256, 300
	port := freePorts(t, 1)
	b := g.boot(t, port)
	p := startRun(t, g, "")
	p.becomes(port, active, "")
	resume := g.stopServer(t)
	if err := syscall.Kill(p.masterPid(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	p.waitLine("warning: connection lost: ")
	v := visitPort(port)
	if waited := v.ended.Sub(v.began); !errors.Is(v.err, syscall.ECONNRESET) || waited < 9*time.Second || waited > 15*time.Second {
		t.Errorf("a client was answered %q, %v after %v, want a reset after 10 s", v.got, v.err, waited)
	}
	visits := make(chan visit, come)
	for range come {
		go func() { visits <- visitPort(port) }()
	}
	var wrong []error
	for n := range come - most { // the one too many is told at once
		select {
		case v := <-visits:
			if !errors.Is(v.err, syscall.ECONNRESET) {
				wrong = append(wrong, fmt.Errorf("client %d too many was answered %q, %v", n, v.got, v.err))
			}
		case <-time.After(5 * time.Second):
			t.Fatalf("%d clients wait", come-n)
		}
	}
	resume()
	for range most {
		if v := <-visits; v.err != nil || !strings.HasSuffix(v.got, b.greeting) {
			wrong = append(wrong, fmt.Errorf("one that waited was answered %q, %v after %v", v.got, v.err, v.ended.Sub(v.began)))
		}
	}
	few(t, "clients", wrong)
}

func needIPv6(t *testing.T) {
	t.Helper()
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Skipf("this machine has no ::1: %v", err)
	}
	l.Close()
}

// getFrom asks for a greeting at an address.
func getFrom(addr string, port int) (string, error) {
	c := http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := c.Get("http://" + net.JoinHostPort(addr, strconv.Itoa(port)) + "/")
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return string(text), err
}

// A client that tries ::1 first is served there, as by a local engine.
func TestE2EBothLoopbacks(t *testing.T) {
	needIPv6(t)
	g := needRig(t)
	t.Run("both", func(t *testing.T) {
		port := freePorts(t, 1)
		b := g.boot(t, port)
		p := startRun(t, g, "")
		p.becomes(port, active, "")
		for _, addr := range []string{"::1", "127.0.0.1", "localhost"} {
			if got, err := getFrom(addr, port); err != nil || got != b.greeting {
				t.Errorf("%s answers %q, %v", addr, got, err)
			}
		}
		if r := p.status(); len(r.Forwards) != 1 || len(r.Warnings) > 0 {
			t.Errorf("forwards %+v, warnings %q", r.Forwards, r.Warnings)
		}
		b.do("kill")
		refuses(t, port)
		if c, err := net.Dial("tcp", net.JoinHostPort("::1", strconv.Itoa(port))); err == nil {
			c.Close()
			t.Error("::1 is open after the container's end")
		}
	})
	t.Run("::1 held by somebody else", func(t *testing.T) {
		port := freePorts(t, 1)
		l, err := net.Listen("tcp", net.JoinHostPort("::1", strconv.Itoa(port)))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		b := g.boot(t, port)
		p := startRun(t, g, "")
		b.answers(port)
		p.becomes(port, active, "")
		eventually(t, "a warning names who has ::1", func() error {
			warnings := p.status().Warnings
			text := strings.Join(warnings, "\n")
			for _, want := range []string{"::1", strconv.Itoa(port), ownName(t), strconv.Itoa(os.Getpid())} {
				if !strings.Contains(text, want) {
					return fmt.Errorf("warnings %q do not hold %q", warnings, want)
				}
			}
			return nil
		})
		p.becomes(port, active, "")
		l.Close()
		eventually(t, "::1 answers once it is free", func() error {
			got, err := getFrom("::1", port)
			if err == nil && got != b.greeting {
				err = fmt.Errorf("it answers %q", got)
			}
			return err
		})
		eventually(t, "the warning goes", func() error {
			if w := p.status().Warnings; len(w) > 0 {
				return fmt.Errorf("%q", w)
			}
			return nil
		})
	})
	t.Run("-bind", func(t *testing.T) {
		port := freePorts(t, 1)
		b := g.boot(t, port)
		p := startRun(t, g, "", "-bind", "127.0.0.1,127.0.0.2")
		p.becomes(port, active, "")
		for _, addr := range []string{"127.0.0.1", "127.0.0.2"} {
			if got, err := getFrom(addr, port); err != nil || got != b.greeting {
				t.Errorf("%s answers %q, %v", addr, got, err)
			}
		}
		if got, err := getFrom("::1", port); err == nil {
			t.Errorf("::1 answers %q, and is not in -bind", got)
		}
	})
	t.Run("-bind :: beside somebody on IPv4", func(t *testing.T) {
		port := freePorts(t, 1)
		l, err := net.Listen("tcp4", net.JoinHostPort("0.0.0.0", strconv.Itoa(port)))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		b := g.boot(t, port)
		p := startRun(t, g, "", "-bind", "::")
		p.becomes(port, active, "")
		if got, err := getFrom("::1", port); err != nil || got != b.greeting {
			t.Errorf("::1 answers %q, %v", got, err)
		}
	})
}

// A connection of this machine to somewhere has the wanted port as its source.
func TestE2EOutgoingConnection(t *testing.T) {
	needTool(t, "lsof")
	g := needRig(t)
	// connect takes port for a connection to a listener of ours.
	connect := func(t *testing.T, port int) (client, server net.Conn) {
		t.Helper()
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		from := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port}}
		client, err = from.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { client.Close() })
		server, err = l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { server.Close() })
		if locallyFree(port) {
			t.Skip("on this machine such a port can be bound")
		}
		return client, server
	}
	// end closes the connection; who is first keeps a TIME_WAIT.
	end := func(first, second net.Conn) {
		first.Close()
		second.Read(make([]byte, 1))
		second.Close()
	}
	t.Run("open", func(t *testing.T) {
		port := freePorts(t, 1)
		client, server := connect(t, port)
		b := g.boot(t, port)
		p := startRun(t, g, "")
		f := p.becomes(port, conflict, "outgoing connection of "+ownName(t))
		for _, want := range []string{fmt.Sprintf("pid %d", os.Getpid()), "a minute"} {
			if !strings.Contains(f.Reason, want) {
				t.Errorf("%q does not hold %q", f.Reason, want)
			}
		}
		end(server, client)
		closed := time.Now()
		b.answers(port)
		p.becomes(port, active, "")
		took("an outgoing connection ends: its port answers", closed)
	})
	t.Run("closed", func(t *testing.T) {
		port := freePorts(t, 1)
		client, server := connect(t, port)
		end(client, server)
		if locallyFree(port) {
			t.Skip("on this machine a port in TIME_WAIT can be bound")
		}
		b := g.boot(t, port)
		p := startRun(t, g, "")
		f := p.becomes(port, conflict, "outgoing connection")
		if !strings.Contains(f.Reason, "a minute") {
			t.Errorf("%q does not say that it passes", f.Reason)
		}
		within(t, 2*time.Minute, "it heals by itself", func() error { return b.answering(port) })
		p.becomes(port, active, "")
	})
}

// Looking at ports leaves nothing behind that keeps them from being bound.
func TestE2EProbesLeaveNothing(t *testing.T) {
	g := needRig(t)
	const n = 20
	port := freePorts(t, 2*n)
	spec := boxSpec{args: []string{"-listen", fmt.Sprintf("80-%d", 80+n-1)}} // behind the first half of them
	for i := range 2 * n {
		spec.ports = append(spec.ports, boxPort{host: port + i, private: 80 + i})
	}
	g.bootSpec(t, spec).listening()
	p := startRun(t, g, "")
	for range 3 {
		p.tell("health")
	}
	for i := range n {
		p.becomes(port+i, active, "")
		p.becomes(port+n+i, pending, reasonSilent)
	}
	var left []error
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		for _, s := range sockets(table) {
			ours := func(p int) bool { return port <= p && p < port+2*n }
			if s.state == tcpTimeWait && (ours(s.local) || ours(s.remote)) {
				left = append(left, fmt.Errorf("a connection from %d to %d is left in TIME_WAIT", s.local, s.remote))
			}
		}
	}
	few(t, "connections", left)
}

// What was carried is counted, and looks are not.
func TestE2ETraffic(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 2)
	g.boot(t, port, "-mode", "echo")
	g.boot(t, port+1)
	p := startRun(t, g, "")
	p.becomes(port+1, active, "")
	if f := p.becomes(port, active, ""); f.Connections != 0 || f.OpenConnections != 0 || f.BytesIn != 0 || f.BytesOut != 0 || f.LastUsedAt != nil {
		t.Errorf("before its first client: %+v", f)
	}
	before := time.Now()
	const each = 100_000
	sent := []byte(strings.Repeat("traffic\n", each/8))
	var open *net.TCPConn
	for range 3 {
		open = dialEcho(t, port)
		go open.Write(sent)
		if _, err := io.ReadFull(open, make([]byte, each)); err != nil {
			t.Fatal(err)
		}
		if err := open.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if rest, err := io.ReadAll(open); err != nil || len(rest) > 0 {
			t.Fatalf("%d bytes too many, %v", len(rest), err)
		}
	}
	open = dialEcho(t, port)
	if _, err := open.Write(sent[:8]); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(open, make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "all is counted", func() error {
		f := p.forward(port)
		if f.Connections != 4 || f.OpenConnections != 1 || f.BytesIn != 3*each+8 || f.BytesOut != 3*each+8 ||
			f.LastUsedAt == nil || f.LastUsedAt.Before(before.Add(-time.Second)) || f.VerifiedAt == nil {
			return fmt.Errorf("%+v", f)
		}
		return nil
	})
	out, _, code := p.tell("health", "-json")
	var h struct {
		Traffic struct {
			Connections     int64 `json:"connections"`
			OpenConnections int64 `json:"open_connections"`
			BytesIn         int64 `json:"bytes_in"`
			BytesOut        int64 `json:"bytes_out"`
		} `json:"traffic"`
	}
	if err := json.Unmarshal([]byte(out), &h); err != nil || code != 0 {
		t.Errorf("health -json: %d, %v", code, err)
	}
	if tr := h.Traffic; tr.Connections != 4 || tr.OpenConnections != 1 || tr.BytesIn != 3*each+8 || tr.BytesOut != 3*each+8 {
		t.Errorf("health -json tells of %+v", tr)
	}
	open.Close()
	eventually(t, "none is open", func() error {
		if f := p.forward(port); f.OpenConnections != 0 {
			return fmt.Errorf("%+v", f)
		}
		return nil
	})
}
