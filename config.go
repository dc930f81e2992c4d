package main

// config.go: what a person sets on how ports are forwarded: where to listen,
// which ports, and under which number.

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// portRange is a range of published ports, both ends included.
type portRange struct{ first, last uint16 }

// config decides where a published port is forwarded to. It is never changed
// once in use: a reload makes a new one.
type config struct {
	bind   netip.Addr
	mapped map[uint16]uint16 // published port → local port
	skip   []portRange
	only   []portRange // empty: all
}

func has(ranges []portRange, p uint16) bool {
	return slices.ContainsFunc(ranges, func(r portRange) bool { return r.first <= p && p <= r.last })
}

// local returns the local address for a published port, or why it has none.
func (c *config) local(public uint16) (netip.AddrPort, string) {
	switch {
	case has(c.skip, public):
		return netip.AddrPort{}, "named by skip"
	case len(c.only) > 0 && !has(c.only, public):
		return netip.AddrPort{}, "not named by only"
	}
	local := public
	if m, ok := c.mapped[public]; ok {
		local = m
	}
	return netip.AddrPortFrom(c.bind, local), ""
}

// parsePort reads a port from 1 to 65535.
func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%q is no port: want a number from 1 to 65535", s)
	}
	return uint16(n), nil
}

// parseRange reads "80" or "8000-8099".
func parseRange(s string) (portRange, error) {
	a, b, ranged := strings.Cut(s, "-")
	if !ranged {
		b = a
	}
	first, err := parsePort(a)
	if err != nil {
		return portRange{}, err
	}
	last, err := parsePort(b)
	if err != nil {
		return portRange{}, err
	}
	if first > last {
		return portRange{}, fmt.Errorf("range %q ends before it begins", s)
	}
	return portRange{first, last}, nil
}
