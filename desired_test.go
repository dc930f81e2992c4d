package main

// Tests of what is to be forwarded, where to, and what is not and why.

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
)

func TestDesired(t *testing.T) {
	const tooLittle = "SSH carries TCP only"
	p := func(ip string, public uint16, proto string) port {
		a, _ := netip.ParseAddr(ip)
		return port{a, 80, public, proto}
	}
	with := func(id string, ports ...port) container { return container{id: id, name: "n" + id[:1], ports: ports} }
	for _, c := range []struct {
		name    string
		cfg     config
		list    []container
		wants   string // sorted keys, each with its container
		skipped string
	}{
		{name: "nothing"},
		{name: "no ports", list: []container{with(idA)}},
		{name: "wildcard, listed twice", list: []container{with(idA, p("0.0.0.0", 8080, "tcp"), p("::", 8080, "tcp"))}, wants: "8080 na"},
		{name: "wildcard, the other way round", list: []container{with(idA, p("::", 8080, "tcp"), p("0.0.0.0", 8080, "tcp"))}, wants: "8080 na"},
		{name: "IPv4 only", list: []container{with(idA, p("0.0.0.0", 8080, "tcp"))}, wants: "8080 na"},
		{name: "IPv6 only", list: []container{with(idA, p("::", 8080, "tcp"))}, wants: "8080>[::1]:8080 na"},
		{name: "one address", list: []container{with(idA, p("10.0.0.2", 8080, "tcp"))}, wants: "8080>10.0.0.2:8080 na"},
		{name: "loopback", list: []container{with(idA, p("127.0.0.1", 8080, "tcp"))}, wants: "8080 na"},
		{name: "IPv6 loopback", list: []container{with(idA, p("::1", 8080, "tcp"))}, wants: "8080>[::1]:8080 na"},
		{name: "one IPv6 address", list: []container{with(idA, p("2001:db8::1", 8080, "tcp"))}, wants: "8080>[2001:db8::1]:8080 na"},
		{name: "random ports differ", list: []container{with(idA, p("0.0.0.0", 32768, "tcp"), p("::", 32769, "tcp"))}, wants: "32768 na; 32769>[::1]:32769 na"},
		{name: "UDP and SCTP, once", list: []container{with(idA, p("0.0.0.0", 53, "udp"), p("::", 53, "udp"), p("::", 54, "sctp"))},
			skipped: "na 53/udp " + tooLittle + "; na 54/sctp " + tooLittle},
		{name: "UDP and TCP of one number", list: []container{with(idA, p("0.0.0.0", 53, "udp"), p("0.0.0.0", 53, "tcp"))},
			wants: "53 na", skipped: "na 53/udp " + tooLittle},
		{name: "no address", list: []container{with(idA, p("junk", 80, "tcp"))}, skipped: "na 80/tcp published on what is no address"},
		{name: "host network", list: []container{{id: idA, name: "na", hostNet: true}}, skipped: "na 0/tcp host network: the container publishes no ports"},
		{name: "one local port, two addresses", list: []container{with(idA, p("10.0.0.2", 80, "tcp")), with(idB, p("10.0.0.3", 80, "tcp"))},
			wants: "80>10.0.0.2:80 na; 80>10.0.0.3:80 nb"},
		{name: "mapped", cfg: config{mapped: map[uint16]uint16{80: 8080}}, list: []container{with(idA, p("0.0.0.0", 80, "tcp"), p("0.0.0.0", 81, "tcp"))},
			wants: "8080>80 na; 81 na"},
		{name: "skip", cfg: config{skip: []portRange{{80, 82}, {90, 90}}}, list: []container{with(idA, p("0.0.0.0", 79, "tcp"), p("0.0.0.0", 80, "tcp"),
			p("0.0.0.0", 82, "tcp"), p("0.0.0.0", 83, "tcp"), p("0.0.0.0", 90, "tcp"))},
			wants: "79 na; 83 na", skipped: "na 80/tcp named by skip; na 82/tcp named by skip; na 90/tcp named by skip"},
		{name: "only", cfg: config{only: []portRange{{80, 82}}}, list: []container{with(idA, p("0.0.0.0", 79, "tcp"), p("0.0.0.0", 80, "tcp"), p("::", 80, "tcp"), p("::", 79, "tcp"))},
			wants: "80 na", skipped: "na 79/tcp not named by only"},
		{name: "skip wins over only, both over a mapping", cfg: config{only: []portRange{{80, 82}}, skip: []portRange{{81, 81}}, mapped: map[uint16]uint16{81: 82, 80: 1080}},
			list: []container{with(idA, p("0.0.0.0", 80, "tcp"), p("0.0.0.0", 81, "tcp"))}, wants: "1080>80 na", skipped: "na 81/tcp named by skip"},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.cfg.bind = loopback4
			wants, skipped := desired(c.list, &c.cfg)
			if skipped == nil {
				t.Error("skipped is nil: it becomes null in JSON")
			}
			var got, not []string
			for k, w := range wants {
				got = append(got, keyText(k)+" "+w.name)
				if w.key != k || w.private != 80 {
					t.Errorf("%+v under key %v", w, k)
				}
			}
			for _, s := range skipped {
				not = append(not, fmt.Sprintf("%s %d/%s %s", s.Name, s.Port, s.Protocol, s.Reason))
			}
			slices.Sort(got)
			if g, n := strings.Join(got, "; "), strings.Join(not, "; "); g != c.wants || n != c.skipped {
				t.Errorf("\n got %q, skipped %q\nwant %q, skipped %q", g, n, c.wants, c.skipped)
			}
		})
	}
}

// Two containers on one key, as a list may show that was made while one took
// over from the other: one forward, and always of the same.
func TestDesiredSameKey(t *testing.T) {
	list := []container{ctr(idB, "new", "80"), ctr(idA, "old", "80")}
	first, _ := desired(list, plainConfig())
	for i := 0; i < 20; i++ {
		if again, _ := desired(list, plainConfig()); len(again) != 1 || !reflect.DeepEqual(first, again) {
			t.Fatalf("got %v, then %v", first, again)
		}
	}
}

func TestDesiredBind(t *testing.T) {
	for _, bind := range []string{"127.0.0.2", "::1", "0.0.0.0"} {
		wants, _ := desired([]container{ctr(idA, "web", "80")}, &config{bind: netip.MustParseAddr(bind)})
		k := key{netip.AddrPortFrom(netip.MustParseAddr(bind), 80), netip.MustParseAddrPort("127.0.0.1:80")}
		if _, ok := wants[k]; !ok || len(wants) != 1 {
			t.Errorf("bind %s: %v", bind, wants)
		}
	}
}

func TestParseRange(t *testing.T) {
	for _, c := range []struct {
		in   string
		want portRange
		err  string // a part of it; "": none
	}{
		{"80", portRange{80, 80}, ""},
		{"1-65535", portRange{1, 65535}, ""},
		{"8000-8000", portRange{8000, 8000}, ""},
		{"", portRange{}, "no port"},
		{"0", portRange{}, "no port"},
		{"65536", portRange{}, "no port"},
		{"-1", portRange{}, "no port"},
		{"+80", portRange{}, "no port"},
		{" 80", portRange{}, "no port"},
		{"80-", portRange{}, "no port"},
		{"80-90-100", portRange{}, "no port"},
		{"90-80", portRange{}, "before it begins"},
		{"http", portRange{}, "no port"},
		{"99999999999999999999", portRange{}, "no port"},
	} {
		r, err := parseRange(c.in)
		if c.err == "" && (err != nil || r != c.want) || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("parseRange(%q) = %v, %v, want %v, %q", c.in, r, err, c.want, c.err)
		}
	}
}
