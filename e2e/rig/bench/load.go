//go:build linux

package main

// load.go: what it costs: throughput, connections, memory and idle time beside
// plain ssh.

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"time"
)

const (
	transfer = 256 << 20 // bytes in each direction
	dataGoal = 0.8       // of what plain ssh carries
	connGoal = 1 / 1.1   // a connection with a request may take a tenth longer
	// memoryGoal is for run and its ssh together, in bytes.
	memoryGoal = 24 << 20
)

// against measures a rate through rdhpf and through plain ssh in turns, both to an
// alias of the rig, and compares their ratio with the goal. A note on the row says
// what a bare relay in front of the ssh loses, the least that a process of its own
// costs.
func (b *bench) against(alias, figure, unit string, rounds int, goal float64, rate func(addr string) (float64, error)) (row, error) {
	f, pool, err := b.following(b.env["RIG_HOST"]+alias, 1)
	if err != nil {
		return row{}, err
	}
	defer f.stop()
	addr := pool[0].addrs[0]
	_, port, _ := net.SplitHostPort(addr)
	p, err := b.plainForward(alias, port)
	if err != nil {
		return row{}, err
	}
	defer p.stop()
	relay, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return row{}, err
	}
	defer relay.Close()
	go relayTo(p.addr, relay)
	addrs := []string{addr, p.addr, relay.Addr().String()}
	var ours, theirs, ratios, bare []float64
	for i := range rounds + 1 {
		var got [3]float64
		for turn := range got {
			who := (i + turn) % len(got)
			if got[who], err = rate(addrs[who]); err != nil {
				return row{}, f.explain(err)
			}
		}
		if i > 0 { // the first warms up
			ours, theirs, ratios = append(ours, got[0]), append(theirs, got[1]), append(ratios, got[0]/got[1])
			bare = append(bare, got[2]/got[1])
		}
	}
	ratio := median(ratios)
	return row{figure: figure, n: len(ratios), median: fmt.Sprintf("%.0f %s", median(ours), unit),
		reference: fmt.Sprintf("%.0f %s (ssh -L)", median(theirs), unit), relation: fmt.Sprintf("%.3f ×", ratio),
		goal: fmt.Sprintf("≥ %.2f ×", goal), met: ratio >= goal,
		note: fmt.Sprintf("A bare relay in front of that ssh -L: %.3f ×.", median(bare))}, nil
}

// relayTo carries what l accepts to addr and back, until l is closed.
func relayTo(addr string, l net.Listener) {
	for {
		near, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer near.Close()
			far, err := net.Dial("tcp", addr)
			if err != nil {
				return
			}
			defer far.Close()
			go func() {
				io.Copy(far, near)
				far.(*net.TCPConn).CloseWrite()
			}()
			io.Copy(near, far)
		}()
	}
}

func (b *bench) throughput() ([]row, error) {
	down, err := b.against("", "download of 256 MiB", "MiB/s", b.times(5), dataGoal, download)
	if err != nil {
		return nil, err
	}
	down.note += " The ratio is the median of those of the rounds. The ssh -L has a session open, as rdhpf has: " +
		"without one the server leaves TCP_NODELAY off."
	up, err := b.against("", "upload of 256 MiB", "MiB/s", b.times(5), dataGoal, upload)
	return []row{down, up}, err
}

// download is in MiB a second, like upload.
func download(addr string) (float64, error) {
	return exchange(addr, fmt.Sprintf("GET /bytes?n=%d HTTP/1.0\r\n\r\n", transfer), 0, transfer)
}

func upload(addr string) (float64, error) {
	return exchange(addr, fmt.Sprintf("POST /sink HTTP/1.0\r\nContent-Length: %d\r\n\r\n", transfer), transfer, 1)
}

// exchange sends a head and then some bytes, and reads an answer to its end.
func exchange(addr, head string, send, least int) (float64, error) {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	buf := make([]byte, 256<<10)
	began := time.Now()
	if _, err := io.WriteString(c, head); err != nil {
		return 0, err
	}
	for ; send > 0; send -= len(buf) {
		if _, err := c.Write(buf); err != nil {
			return 0, err
		}
	}
	answer := bufio.NewReaderSize(c, 4096)
	status, err := answer.ReadString('\n')
	if err != nil || !strings.Contains(status, " 200 ") {
		return 0, fmt.Errorf("%s answers %q, %v", addr, status, err)
	}
	got := 0
	for {
		n, err := answer.Read(buf)
		got += n
		if err == io.EOF {
			break
		}
		if err != nil {
			return 0, err
		}
	}
	if got < least {
		return 0, fmt.Errorf("%s sends only %d bytes", addr, got)
	}
	return transfer / (1 << 20) / time.Since(began).Seconds(), nil
}

func (b *bench) connections() (rows []row, err error) {
	for _, c := range []struct {
		alias, where  string
		at, all, runs int
	}{
		{"", "", 1, 400, 15},
		{"", "", 4, 400, 15},
		{"-delay", " over 25 ms each way", 4, 80, 3},
	} {
		r, err := b.against(c.alias, fmt.Sprintf("connections with a request, %d at a time%s", c.at, c.where), "/s", b.times(c.runs), connGoal,
			func(addr string) (float64, error) { return connectionRate(addr, c.at, c.all) })
		if err != nil {
			return nil, err
		}
		rows = append(rows, r)
	}
	return rows, nil
}

// connectionRate is connections a second, each with an answer to GET.
func connectionRate(addr string, at, all int) (_ float64, err error) {
	var next atomic.Int64
	failed := make(chan error, at)
	began := time.Now()
	for range at {
		go func() {
			for next.Add(1) <= int64(all) {
				if err := look(addr); err != nil {
					failed <- err
					return
				}
			}
			failed <- nil
		}()
	}
	for range at {
		err = errors.Join(err, <-failed)
	}
	return float64(all) / time.Since(began).Seconds(), err
}

func (b *bench) idle() ([]row, error) {
	const window = 30 * time.Second
	f, _, err := b.following(b.env["RIG_HOST"], 20)
	if err != nil {
		return nil, err
	}
	defer f.stop()
	time.Sleep(3 * time.Second)
	own := f.cmd.Process.Pid
	pids := append([]int{own}, descendants(own)...)
	used := func() (own, all time.Duration, err error) {
		for i, pid := range pids {
			t, err := cpuOf(pid)
			if err != nil {
				return 0, 0, err
			}
			if all += t; i == 0 {
				own = t
			}
		}
		return own, all, nil
	}
	own0, all0, err := used()
	if err != nil {
		return nil, f.explain(err)
	}
	began := time.Now()
	time.Sleep(window)
	own1, all1, err := used()
	if err != nil {
		return nil, f.explain(err)
	}
	percent := func(d time.Duration) float64 { return 100 * float64(d) / float64(time.Since(began)) }
	share, ownShare := percent(all1-all0), percent(own1-own0)

	ofRun, err := memoryOf(own)
	if err != nil {
		return nil, f.explain(err)
	}
	sum, err := f.memory()
	if err != nil {
		return nil, f.explain(err)
	}
	status, err := f.statusCost("status, 20 forwards", 1.5)
	if err != nil {
		return nil, f.explain(err)
	}
	return []row{
		status,
		memoryRow("memory, 20 forwards", ofRun, memoryGoal),
		memoryRow("memory with its ssh, 20 forwards", sum, memoryGoal),
		{figure: "CPU idle with its ssh, 20 forwards", n: 1, median: fmt.Sprintf("%.3f %%", share),
			reference: fmt.Sprintf("%.3f %% (of it rdhpf)", ownShare), goal: "< 0.1 %", met: share < 0.1,
			note: fmt.Sprintf("Of one core, over %v.", window)},
	}, nil
}

// memory is that of rdhpf with its ssh.
func (f *forwarder) memory() (sum memory, err error) {
	own := f.cmd.Process.Pid
	for _, pid := range append([]int{own}, descendants(own)...) {
		m, err := memoryOf(pid)
		if err != nil {
			return sum, err
		}
		sum.rss, sum.pss = sum.rss+m.rss, sum.pss+m.pss
	}
	return sum, nil
}

// memoryRow counts the resident set, the larger of the two numbers.
func memoryRow(figure string, m memory, goal int) row {
	return row{figure: figure, n: 1, median: mib(m.rss) + " RSS", reference: mib(m.pss) + " PSS",
		goal: "≤ " + mib(goal), met: m.rss <= goal}
}
