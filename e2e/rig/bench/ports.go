//go:build linux

package main

// ports.go: many ports at once.

import (
	"fmt"
	"io"
	"net"
	"time"
)

// burst starts thirty containers, one after the other.
func (b *bench) burst() ([]row, error) {
	f, _, err := b.following(b.env["RIG_HOST"], 1)
	if err != nil {
		return nil, err
	}
	defer f.stop()
	var took, looks samples
	for range b.times(3) {
		if _, err := b.running(1); err != nil {
			return nil, err
		}
		some := b.pool[1:31]
		for _, c := range some {
			if err := f.explain(refuses(c.addrs[0])); err != nil {
				return nil, err
			}
		}
		time.Sleep(quiet)
		for _, c := range some {
			if err := b.start(c); err != nil {
				return nil, err
			}
		}
		all, look, err := twice(some)
		if err != nil {
			return nil, f.explain(err)
		}
		took.add(all)
		looks.add(look)
	}
	return []row{lessLook("30 containers started in a row → all answer", took, looks, 30*time.Millisecond,
		"From the return of the last start call. The goal is for the difference.")}, nil
}

// twice is how long it takes until all containers answer, and how long when
// they already do.
func twice(cs []*container) (first, again time.Duration, err error) {
	if first, err = timed(func() error { return allAnswer(addrs(cs)) }); err != nil {
		return
	}
	var looks samples
	for range 3 {
		time.Sleep(quiet)
		if again, err = timed(func() error { return allAnswer(addrs(cs)) }); err != nil {
			return
		}
		looks.add(again)
	}
	return first, looks.median(), nil
}

// lessLook makes the row of what is measured less a look at all.
func lessLook(figure string, took, looks samples, goal time.Duration, note string) row {
	more := make(samples, len(took))
	for i := range took {
		more[i] = took[i] - looks[i]
	}
	r := durations(figure, took, ms(looks.median())+" (one look at all)", "+"+ms(more.median()), more.median(), goal)
	r.note = note
	return r
}

func (b *bench) hundredPorts() ([]row, error) {
	f, _, err := b.following(b.env["RIG_HOST"], 1)
	if err != nil {
		return nil, err
	}
	defer f.stop()
	c, err := b.create(b.base+100, 100)
	if err != nil {
		return nil, err
	}
	defer b.remove(c)
	var took, looks samples
	for range b.times(3) {
		time.Sleep(quiet)
		if err := b.start(c); err != nil {
			return nil, err
		}
		all, look, err := twice([]*container{c})
		if err != nil {
			return nil, f.explain(err)
		}
		took.add(all)
		looks.add(look)
		if err := b.kill(c); err != nil {
			return nil, err
		}
		for _, a := range c.addrs {
			if err := refuses(a); err != nil {
				return nil, f.explain(err)
			}
		}
	}
	return []row{lessLook("container with 100 ports started → all answer", took, looks, 60*time.Millisecond,
		"From the return of the start call. The goal is for the difference.")}, nil
}

// thousandPorts has ten containers with a hundred ports each, there before rdhpf
// is. It comes last and leaves them to the end of the rig: the engine takes
// seconds to remove one.
func (b *bench) thousandPorts() ([]row, error) {
	const each, containers = 100, 10
	if _, err := b.running(0); err != nil {
		return nil, err
	}
	ports, all := map[int]bool{}, []string{}
	for i := range containers {
		first := b.base + 200 + i*each
		c, err := b.create(first, each)
		if err != nil {
			return nil, err
		}
		if err := b.start(c); err != nil {
			return nil, err
		}
		all = append(all, c.addrs...)
		for p := first; p < first+each; p++ {
			ports[p] = true
		}
	}
	var took, cold samples
	var idle, busy memory
	var status row
	for range b.times(3) {
		time.Sleep(time.Second)
		began := time.Now()
		f, err := b.run(b.env["RIG_HOST"])
		if err != nil {
			return nil, err
		}
		opened, err := b.allListen(f, ports)
		if err == nil {
			err = allAnswer(all)
		}
		if err == nil { // a thousand probes take some seconds, and are not what is measured
			err = f.allActive()
		}
		if err == nil {
			idle, err = f.memory()
		}
		if err == nil {
			busy, err = f.memoryWith(500, all)
		}
		if err == nil {
			status, err = f.statusCost("status, 1,000 forwards", 6)
		}
		connected := f.connected
		f.stop()
		if err != nil {
			return nil, f.explain(err)
		}
		took.add(opened.Sub(connected))
		cold.add(opened.Sub(began))
	}
	open := durations("1,000 ports, list taken → all open", took, ms(cold.median())+" (since the process started)",
		"", took.median(), 60*time.Millisecond)
	open.note = "From the line that says connected, which comes with the first list, to a thousand listeners."
	shown := func(figure string, m memory) row {
		return row{figure: figure, n: 1, median: mib(m.rss) + " RSS", reference: mib(m.pss) + " PSS", goal: "(shown)", met: true}
	}
	return []row{open, shown("memory with its ssh, 1,000 forwards", idle),
		shown("memory with its ssh, 1,000 forwards, 500 connections", busy), status}, nil
}

// memoryWith is the memory while n connections are open, each of which has asked
// for half of something.
func (f *forwarder) memoryWith(n int, addrs []string) (m memory, err error) {
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	for i := range n {
		c, err := net.Dial("tcp", addrs[i%len(addrs)])
		if err != nil {
			return m, err
		}
		open = append(open, c)
		if _, err := io.WriteString(c, "GET / HTTP/1.1\r\n"); err != nil {
			return m, err
		}
	}
	for _, c := range open { // all of them are carried once each has been answered
		if _, err := io.WriteString(c, "Host: bench\r\n\r\n"); err != nil {
			return m, err
		}
		c.SetDeadline(time.Now().Add(patience))
		if _, err := c.Read(make([]byte, 512)); err != nil {
			return m, err
		}
	}
	return f.memory()
}

// allListen waits until rdhpf is connected and all ports have a listener.
func (b *bench) allListen(f *forwarder, ports map[int]bool) (time.Time, error) {
	if err := f.ready(nil); err != nil {
		return time.Time{}, err
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(2 * time.Millisecond) {
		n, err := listening(ports)
		now := time.Now()
		if err != nil || n == len(ports) {
			return now, err
		}
		if now.After(deadline) {
			return now, fmt.Errorf("only %d of %d ports are open", n, len(ports))
		}
	}
}
