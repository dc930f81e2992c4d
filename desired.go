package main

// desired.go: from the engine's list of containers to the forwards that should
// exist, and to what is not forwarded and why. Pure.

import (
	"fmt"
	"net/netip"
	"sort"
)

// container is what rdhpf keeps of a running container: decoded, validated and
// safe to print.
type container struct {
	id      string // 12 characters
	name    string
	image   string
	service string // of docker compose, "" without it
	paused  bool
	hostNet bool
	ports   []port
}

// port is one row of the list's Ports, of those that are published.
type port struct {
	ip      netip.Addr // as published; the zero Addr where what the engine sent is none
	private uint16
	public  uint16
	proto   string
}

// key is what makes a forward: where it listens here and where it leads there.
type key struct {
	local, remote netip.AddrPort
}

// want is one forward that should exist, and the container it belongs to.
type want struct {
	key
	id, name, image, service string
	private                  uint16
	paused                   bool
}

// who names the container for a person.
func (w want) who() string { return fmt.Sprintf("%s (%s)", w.name, w.id) }

// skippedPort is a published port that is not forwarded. Port is 0 where the
// reason concerns the whole container.
type skippedPort struct {
	ContainerID string `json:"container_id"`
	Name        string `json:"container_name"`
	Port        uint16 `json:"port"`
	Protocol    string `json:"protocol"`
	Reason      string `json:"reason"`
}

var (
	loopback4 = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	loopback6 = netip.IPv6Loopback()
)

// desired returns the forwards that the listed containers call for. Where two
// containers claim the same key, the one listed first has it: engines list the
// newest first, and it takes over from one that is about to go.
func desired(list []container, cfg *config) (map[key]want, []skippedPort) {
	wants := make(map[key]want)
	skipped := []skippedPort{}
	for _, c := range list {
		skip := func(p port, reason string) {
			skipped = append(skipped, skippedPort{c.id, c.name, p.public, p.proto, reason})
		}
		if c.hostNet {
			skip(port{proto: "tcp"}, "host network: the container publishes no ports")
		}
		for _, p := range c.ports {
			switch {
			case p.proto != "tcp":
				if !twin(c.ports, p) {
					skip(p, "SSH carries TCP only")
				}
				continue
			case !p.ip.IsValid():
				skip(p, "published on what is no address")
				continue
			case twin(c.ports, p):
				continue
			}
			remote := netip.AddrPortFrom(dialable(p.ip), p.public)
			local, reason := cfg.local(p.public)
			if reason != "" {
				skip(p, reason)
				continue
			}
			k := key{local, remote}
			if _, taken := wants[k]; taken {
				continue
			}
			wants[k] = want{k, c.id, c.name, c.image, c.service, p.private, c.paused}
		}
	}
	sort.SliceStable(skipped, func(i, j int) bool { return skipped[i].Port < skipped[j].Port })
	return wants, skipped
}

// twin reports whether p is the IPv6 half of a wildcard binding whose IPv4
// half is listed too: engines list 0.0.0.0 and :: apart.
func twin(ports []port, p port) bool {
	if p.ip != netip.IPv6Unspecified() {
		return false
	}
	p.ip = netip.IPv4Unspecified()
	for _, q := range ports {
		if q == p {
			return true
		}
	}
	return false
}

// dialable is the address on which the remote host reaches what is published
// on ip.
func dialable(ip netip.Addr) netip.Addr {
	switch ip {
	case netip.IPv4Unspecified():
		return loopback4
	case netip.IPv6Unspecified():
		return loopback6
	}
	return ip
}
