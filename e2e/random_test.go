package e2e

import (
	"fmt"
	"strconv"
	"testing"
)

// TestE2ERandomPortsApart has the engine pick different random ports for IPv4 and for ::, as
// old ones do for ever once something else holds the next port of either. A container's port
// on :: is then the next one's on IPv4, and must not take its place.
func TestE2ERandomPortsApart(t *testing.T) {
	g := needRig(t)
	p := startRun(t, g, "")
	boot := func() (b *box, inet4, inet6 int) {
		t.Helper()
		b = g.bootSpec(t, boxSpec{all: true})
		var is struct {
			NetworkSettings struct {
				Ports map[string][]struct{ HostIp, HostPort string }
			}
		}
		if err := g.call("GET", "/containers/"+b.id+"/json", nil, &is); err != nil {
			t.Fatal(err)
		}
		for _, at := range is.NetworkSettings.Ports["80/tcp"] {
			port, err := strconv.Atoi(at.HostPort)
			if err != nil {
				t.Fatal(err)
			}
			if at.HostIp == "::" {
				inet6 = port
			} else {
				inet4 = port
			}
		}
		return b, inet4, inet6
	}
	take := func(port int) {
		t.Helper()
		background(t, "nsenter", "--net=/run/netns/"+g.env["RIG_NS"], "socat", fmt.Sprintf("TCP6-LISTEN:%d,ipv6only=1", port), "PIPE")
		eventually(t, fmt.Sprintf("[::]:%d is taken", port), func() error {
			if !listensIn(g.sshd(t), "tcp6", port) {
				return fmt.Errorf("nothing listens on [::]:%d", port)
			}
			return nil
		})
	}
	type published struct {
		b     *box
		inet4 int
	}
	var first, second published
	at6 := make(map[int]published) // by the number on ::
	for range 10 {
		b, inet4, inet6 := boot()
		if inet6 == 0 {
			t.Skip("the engine publishes on IPv4 only")
		}
		second = published{b, inet4}
		if first = at6[inet4]; first.b != nil {
			break
		}
		if inet6 > inet4 {
			at6[inet6] = second
		} else { // or IPv4 is ahead, for it passes over numbers that connections use
			take(inet6 + 1)
		}
	}
	switch {
	case len(at6) == 0:
		t.Skip("the engine picks one port for both")
	case first.b == nil:
		t.Fatal("the engine never gave two containers one number")
	}
	// Where a connection of this machine has used the port, that can take a minute.
	out, errs, code := p.tell("status", "-wait", "90s")
	if code != 0 {
		t.Errorf("status -wait: %d, %q, %q", code, out, errs)
	}
	second.b.answers(second.inet4)
	first.b.answers(first.inet4)
}
