package main

// Who uses a local TCP port, as far as lsof and a connect can tell.

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	lsofTimeout = 3 * time.Second
	lsofDrain   = 100 * time.Millisecond // for its output after that: a child of it may still hold the pipe
)

// tcpSocket is a socket that lsof lists.
type tcpSocket struct {
	pid       int
	command   string         // safe to print
	addr      netip.AddrPort // its local end
	connected bool           // it is one end of a connection; else it listens
}

// tcpSockets asks lsof for the TCP sockets of this machine. Only root sees those of other users' processes.
func tcpSockets(ctx context.Context) ([]tcpSocket, error) {
	ctx, cancel := context.WithTimeout(ctx, lsofTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "lsof", "-nPw", "+c0", "-iTCP", "-Fpcn")
	cmd.WaitDelay = lsofDrain
	out, err := cmd.Output()
	// lsof exits with 1 when there is nothing to list.
	if _, exited := err.(*exec.ExitError); err != nil && (!exited || ctx.Err() != nil) {
		return nil, fmt.Errorf("running lsof: %w", err)
	}
	return parseLsof(string(out)), nil
}

// parseLsof reads lsof's field output: one line a field, p and c for a process, then f and n for each of its files.
// It skips what it does not understand.
func parseLsof(out string) []tcpSocket {
	var all []tcpSocket
	var current tcpSocket
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
			current = tcpSocket{pid: pid}
		case 'c':
			current.command = printable(value, maxText)
		case 'n':
			local, _, connected := strings.Cut(value, "->")
			if strings.HasPrefix(local, "*:") {
				local = "0.0.0.0" + local[1:]
			}
			addr, err := netip.ParseAddrPort(local)
			if err == nil && current.pid != 0 && badChar(addr.Addr().Zone(), ".-_") == "" {
				current.addr, current.connected = addr, connected
				all = append(all, current)
			}
		}
	}
	return all
}

// owners tells who uses local ports. One lsof answers everybody who asks within a second, for many ports can be busy
// at once.
type owners struct {
	mu      sync.Mutex
	at      time.Time // of the last lsof
	sockets []tcpSocket
	failed  error
}

// of returns what keeps others from listening on addr, for a person: "held by nginx, pid 4242"; "" if it cannot be
// found out.
func (o *owners) of(ctx context.Context, addr netip.AddrPort) string {
	sockets, failed := o.look(ctx)
	var connection *tcpSocket
	for i := range sockets {
		s := &sockets[i]
		if ip := s.addr.Addr(); s.addr.Port() != addr.Port() || ip != addr.Addr() && !ip.IsUnspecified() && !addr.Addr().IsUnspecified() {
			continue
		}
		if !s.connected {
			return fmt.Sprintf("held by %s, pid %d", s.command, s.pid)
		}
		connection = s
	}
	if connection != nil {
		return fmt.Sprintf("an outgoing connection of %s, pid %d, uses it; free within a minute", connection.command, connection.pid)
	}
	listens, known := listensAt(ctx, addr)
	switch {
	case known && !listens:
		return "an outgoing connection uses it or has just ended; free within a minute"
	case listens && failed == nil && os.Geteuid() != 0: // root would have seen it
		return "held by a process of another user"
	}
	return ""
}

func (o *owners) look(ctx context.Context) ([]tcpSocket, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if time.Since(o.at) > time.Second {
		o.sockets, o.failed = tcpSockets(ctx)
		o.at = time.Now()
	}
	return o.sockets, o.failed
}

// listensAt connects to a local address to see whether anything listens there; known is false if that does not tell.
// The connection is reset, for one that is closed would occupy a port of this machine for a minute.
func listensAt(ctx context.Context, addr netip.AddrPort) (listens, known bool) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr.String())
	if err != nil {
		return false, errors.Is(err, syscall.ECONNREFUSED)
	}
	conn.(*net.TCPConn).SetLinger(0)
	conn.Close()
	return true, true
}
