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
	_, _, last := boot()
	if last == 0 {
		t.Skip("the engine publishes on IPv4 only")
	}
	background(t, "nsenter", "--net=/run/netns/"+g.env["RIG_NS"], "socat", fmt.Sprintf("TCP6-LISTEN:%d,ipv6only=1", last+1), "PIPE")
	eventually(t, "the next port is taken", func() error {
		for _, s := range sockets(fmt.Sprintf("/proc/%d/net/tcp6", g.sshd(t))) {
			if s.state == tcpListen && s.local == last+1 {
				return nil
			}
		}
		return fmt.Errorf("nothing listens on [::]:%d", last+1)
	})
	first, first4, first6 := boot()
	second, second4, _ := boot()
	if first6 == first4 {
		t.Skip("the engine picks one port for both")
	}
	if first6 != second4 {
		t.Fatalf("%s is on :: at %d, %s on IPv4 at %d: want one number", first.name, first6, second.name, second4)
	}
	// Where this machine uses the port for something else, that ends.
	second.answers(second4)
	first.answers(first4)
	out, errs, code := p.tell("status", "-wait", "30s")
	if code != 0 {
		t.Errorf("status -wait: %d, %q, %q", code, out, errs)
	}
}
