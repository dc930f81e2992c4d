package main

// config.go: what a person sets on how ports are forwarded: where to listen,
// which ports, and under which number. Flags win over the part of config.json
// for the host, that over its part for all.

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// portRange is a range of published ports, both ends included.
type portRange struct{ first, last uint16 }

// config decides where a published port is forwarded to. It is never changed
// once in use: a reload makes a new one. What is zero is not set.
type config struct {
	bind   netip.Addr
	mapped map[uint16]uint16 // published port → local port
	skip   []portRange
	only   []portRange // empty: all
}

// over returns c with what is not set in it taken from base. Mappings add up.
func (c config) over(base config) config {
	if !c.bind.IsValid() {
		c.bind = base.bind
	}
	mapped := maps.Clone(base.mapped)
	if mapped == nil {
		mapped = make(map[uint16]uint16)
	}
	maps.Copy(mapped, c.mapped)
	c.mapped = mapped
	if c.skip == nil {
		c.skip = base.skip
	}
	if c.only == nil {
		c.only = base.only
	}
	return c
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

// parseBind reads an address to listen on.
func parseBind(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("%q is no address: want one like 127.0.0.1 or ::1", s)
	}
	return a.Unmap(), nil
}

// addRanges adds what a flag names: "80,8000-8099".
func addRanges(to *[]portRange) func(string) error {
	return func(s string) error {
		for _, part := range strings.Split(s, ",") {
			r, err := parseRange(strings.TrimSpace(part))
			if err != nil {
				return err
			}
			*to = append(*to, r)
		}
		return nil
	}
}

// addMap adds what -map names: "80=8080,443=8443".
func addMap(to map[uint16]uint16) func(string) error {
	return func(s string) error {
		for _, part := range strings.Split(s, ",") {
			a, b, ok := strings.Cut(strings.TrimSpace(part), "=")
			if !ok {
				return fmt.Errorf("%q: want PUBLISHED=LOCAL, like 80=8080", part)
			}
			public, err := parsePort(a)
			if err != nil {
				return err
			}
			if to[public], err = parsePort(b); err != nil {
				return err
			}
		}
		return nil
	}
}
