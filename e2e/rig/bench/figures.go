//go:build linux

package main

// figures.go: how soon a port follows its container, and rdhpf its connection.

import (
	"fmt"
	"net"
	"syscall"
	"time"
)

// quiet lets the engine and rdhpf finish what the last round set off.
const quiet = 150 * time.Millisecond

// durations makes the row of what has a fixed goal.
func durations(figure string, s samples, reference, relation string, counts, goal time.Duration) row {
	return row{figure: figure, n: len(s), median: ms(s.median()), p90: ms(s.p90()), reference: reference,
		relation: relation, goal: "≤ " + ms(goal), met: counts <= goal}
}

// following has an rdhpf forward the first n of the pool.
func (b *bench) following(alias string, n int) (*forwarder, []*container, error) {
	pool, err := b.running(n)
	if err != nil {
		return nil, nil, err
	}
	f, err := b.run(alias)
	if err != nil {
		return nil, nil, err
	}
	if err := f.ready(addrs(pool)); err != nil {
		f.stop()
		return nil, nil, err
	}
	return f, pool, nil
}

func (b *bench) startAndKill() ([]row, error) {
	f, pool, err := b.following(b.env["RIG_HOST"], 1)
	if err != nil {
		return nil, err
	}
	defer f.stop()
	open := pool[0].addrs[0]
	var started, direct, killed, looks samples
	const warm = 2
	for i := range b.times(20) + warm {
		c := b.pool[1+i%(poolSize-1)]
		addr, into := c.addrs[0], &started
		time.Sleep(quiet)
		if i%4 == 3 { // what no forwarder can save
			addr, into = b.remote(addr), &direct
		}
		if err := b.start(c); err != nil {
			return nil, err
		}
		took, err := timed(func() error { return answers(addr) })
		if err != nil {
			return nil, f.explain(err)
		}
		if err := f.explain(answers(c.addrs[0])); err != nil {
			return nil, err
		}
		time.Sleep(quiet)
		once, err := timed(func() error { return look(open) })
		if err != nil {
			return nil, f.explain(err)
		}
		if err := b.kill(c); err != nil {
			return nil, err
		}
		gone, err := timed(func() error { return refuses(c.addrs[0]) })
		if err != nil {
			return nil, f.explain(err)
		}
		if i >= warm {
			into.add(took)
			looks.add(once)
			killed.add(gone)
		}
	}
	look := looks.median()
	start := durations("container started → its port answers", started, ms(look)+" (one look)",
		"+"+ms(started.median()-look), started.median(), 5*time.Millisecond)
	start.note = fmt.Sprintf("From the return of the engine's start call to an answer to GET. The port on the remote host itself, without a forwarder, takes %s (n=%d).",
		ms(direct.median()), len(direct))
	kill := durations("container killed → its port refuses", killed, ms(look)+" (one look)",
		"", killed.median(), 15*time.Millisecond)
	kill.note = "From the return of the engine's kill call, which waits for the end of the container."
	return []row{start, kill}, nil
}

func (b *bench) startDelayed() ([]row, error) {
	f, pool, err := b.following(b.env["RIG_HOST"]+"-delay", 1)
	if err != nil {
		return nil, err
	}
	defer f.stop()
	open := pool[0].addrs[0]
	line, err := net.Dial("tcp", open)
	if err != nil {
		return nil, err
	}
	defer line.Close()
	var started, looks, trips samples
	for i := range b.times(8) + 1 {
		c := b.pool[1+i%(poolSize-1)]
		time.Sleep(2 * quiet)
		once, err := timed(func() error { return look(open) })
		if err != nil {
			return nil, f.explain(err)
		}
		trip, err := timed(func() error { return roundTrip(line) })
		if err != nil {
			return nil, f.explain(err)
		}
		if err := b.start(c); err != nil {
			return nil, err
		}
		took, err := timed(func() error { return answers(c.addrs[0]) })
		if err != nil {
			return nil, f.explain(err)
		}
		if err := b.kill(c); err != nil {
			return nil, err
		}
		if err := refuses(c.addrs[0]); err != nil {
			return nil, f.explain(err)
		}
		if i > 0 {
			started.add(took)
			looks.add(once)
			trips.add(trip)
		}
	}
	look, trip := looks.median(), trips.median()
	r := durations("the same, 25 ms away in each direction", started, ms(look)+" (one look)",
		"+"+ms(started.median()-look), started.median()-look, trip*3/2+15*time.Millisecond)
	r.note = fmt.Sprintf("The goal is for the difference: 1.5 round trips and 15 ms. A round trip, asked on an open connection through a forward, is %s.", ms(trip))
	return []row{r}, nil
}

// roundTrip asks on a connection that stays open.
func roundTrip(c net.Conn) error {
	c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write([]byte("GET / HTTP/1.1\r\nHost: rig\r\n\r\n")); err != nil {
		return err
	}
	var b [1024]byte // more than the answer, which comes in one piece
	_, err := c.Read(b[:])
	return err
}

func (b *bench) coldStart() ([]row, error) {
	pool, err := b.running(20)
	if err != nil {
		return nil, err
	}
	var took, reference samples
	for i := range b.times(7) + 1 {
		time.Sleep(quiet)
		began := time.Now()
		f, err := b.run(b.env["RIG_HOST"])
		if err != nil {
			return nil, err
		}
		err = f.ready(addrs(pool))
		all := time.Since(began)
		f.stop()
		if err != nil {
			return nil, err
		}
		time.Sleep(quiet)
		ps, err := timed(b.ssh(b.env["RIG_HOST"], "docker", "ps").Run)
		if err != nil {
			return nil, fmt.Errorf("ssh docker ps: %w", err)
		}
		if i > 0 {
			took.add(all)
			reference.add(ps)
		}
	}
	r := row{figure: "cold start → 20 containers answer", n: len(took), median: ms(took.median()), p90: ms(took.p90()),
		reference: ms(reference.median()) + " (ssh docker ps)", goal: "≤ 1.3 ×"}
	ratio := float64(took.median()) / float64(reference.median())
	r.relation, r.met = fmt.Sprintf("%.2f ×", ratio), ratio <= 1.3
	r.note = "From the start of the process, answers to GET included."
	return []row{r}, nil
}

// reconnect kills what ssh processes an rdhpf has; a new rdhpf each time, for
// one whose connection was lost twice within half a minute waits by intention.
func (b *bench) reconnect() ([]row, error) {
	pool, err := b.running(20)
	if err != nil {
		return nil, err
	}
	var took, reference samples
	for i := range b.times(7) + 1 {
		again, err := b.killSSH(addrs(pool))
		if err != nil {
			return nil, err
		}
		time.Sleep(quiet)
		once, err := timed(b.ssh(b.env["RIG_HOST"], "true").Run)
		if err != nil {
			return nil, fmt.Errorf("ssh true: %w", err)
		}
		if i > 0 {
			took.add(again)
			reference.add(once)
		}
	}
	goal := reference.median()*13/10 + 200*time.Millisecond
	r := durations("every ssh of it killed → 20 containers answer", took, ms(reference.median())+" (ssh true)",
		fmt.Sprintf("%.2f ×", float64(took.median())/float64(reference.median())), took.median(), goal)
	r.note = "The goal is 1.3 × the reference and 200 ms."
	return []row{r}, nil
}

func (b *bench) killSSH(addrs []string) (time.Duration, error) {
	f, err := b.run(b.env["RIG_HOST"])
	if err != nil {
		return 0, err
	}
	defer f.stop()
	if err := f.ready(addrs); err != nil {
		return 0, err
	}
	time.Sleep(time.Second)
	pids := descendants(f.cmd.Process.Pid)
	if len(pids) == 0 {
		return 0, f.explain(fmt.Errorf("rdhpf has no ssh"))
	}
	began := time.Now()
	for _, pid := range pids {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			return 0, fmt.Errorf("killing ssh: %w", err)
		}
	}
	// The old listeners accept until the process has really ended.
	for _, pid := range pids {
		for living(pid) {
			time.Sleep(pause)
		}
	}
	err = allAnswer(addrs)
	return time.Since(began), f.explain(err)
}
