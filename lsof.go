package main

// lsof.go: who listens on which TCP port of this machine, as lsof tells.

import (
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"time"
)

const lsofTimeout = 10 * time.Second

// listener is a process that listens on a local address.
type listener struct {
	pid     int
	command string // safe to print
	addr    netip.AddrPort
}

// listeners asks lsof who listens on TCP ports. Processes of other users are
// seen by root only.
func listeners(ctx context.Context) ([]listener, error) {
	ctx, cancel := context.WithTimeout(ctx, lsofTimeout)
	defer cancel()
	// lsof exits 1 when there is nothing to list.
	out, err := exec.CommandContext(ctx, "lsof", "-nPw", "+c0", "-iTCP", "-sTCP:LISTEN", "-Fpcn").Output()
	if _, exited := err.(*exec.ExitError); err != nil && (!exited || ctx.Err() != nil) {
		return nil, fmt.Errorf("running lsof: %w", err)
	}
	return parseLsof(string(out)), nil
}

// parseLsof reads lsof's field output: a line a field, p and c for a process,
// then f and n for each of its files. What it does not understand it passes over.
func parseLsof(out string) []listener {
	var all []listener
	var l listener
	for _, line := range strings.Split(out, "\n") {
		if line == "" {
			continue
		}
		value := line[1:]
		switch line[0] {
		case 'p':
			pid, err := strconv.Atoi(value)
			if err != nil || pid <= 0 {
				pid = 0
			}
			l = listener{pid: pid}
		case 'c':
			l.command = printable(value, maxText)
		case 'n':
			if strings.HasPrefix(value, "*:") {
				value = "0.0.0.0" + value[1:]
			}
			addr, err := netip.ParseAddrPort(value)
			if err == nil && l.pid != 0 && badChar(addr.Addr().Zone(), ".-_") == "" {
				l.addr = addr
				all = append(all, l)
			}
		}
	}
	return all
}

// owners tells who holds local ports. With one lsof it answers all that ask
// within a second: many ports can be busy at once.
type owners struct {
	mu  sync.Mutex
	at  time.Time // of the last lsof
	all []listener
}

// of names who keeps others from listening on a: "nginx, pid 4242", or "" where
// it cannot be found.
func (o *owners) of(ctx context.Context, a netip.AddrPort) string {
	o.mu.Lock()
	defer o.mu.Unlock()
	if time.Since(o.at) > time.Second {
		o.all, _ = listeners(ctx)
		o.at = time.Now()
	}
	for _, l := range o.all {
		if ip := l.addr.Addr(); l.addr.Port() == a.Port() && (ip == a.Addr() || ip.IsUnspecified() || a.Addr().IsUnspecified()) {
			return fmt.Sprintf("%s, pid %d", l.command, l.pid)
		}
	}
	return ""
}
