//go:build linux

package e2e

// swarm_test.go: a Swarm of two nodes, of which rdhpf reaches the manager.

import (
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	prompt   = 2 * time.Second // in which a forward follows what the manager knows
	electing = 4 * patience    // for managers to agree on a leader, or on that there is none
)

// needSwarm returns the rig with two nodes. At the end of the test its services are removed,
// or all of it if the test changes the managers: those that were demoted and came back do
// not always agree again.
func needSwarm(t *testing.T, changesManagers bool) *testRig {
	t.Helper()
	needRig(t)
	g := &theSwarm
	if g.name == "" {
		if _, err := g.up(fmt.Sprintf("swarm-%d", os.Getpid()), "-nodes", "2"); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if changesManagers {
			if out, err := exec.Command("rig/rig", "down", g.name).CombinedOutput(); err != nil {
				t.Errorf("rig down: %v: %s", err, out)
			}
			*g = testRig{}
			return
		}
		if names := g.docker(t, 1, "service", "ls", "-q"); names != "" {
			g.docker(t, 1, append([]string{"service", "rm"}, strings.Fields(names)...)...)
		}
		g.settled(t, func(all []swarmTask) bool { return len(all) == 0 })
	})
	return g
}

// docker runs a command of docker on one of the nodes.
func (g *testRig) docker(t *testing.T, node int, args ...string) string {
	t.Helper()
	out, err := g.tryDocker(node, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (g *testRig) tryDocker(node int, args ...string) (string, error) {
	socket := g.env["RIG_DOCKER"]
	if node == 2 {
		socket = g.env["RIG_DOCKER2"]
	}
	out, err := exec.Command("docker", append([]string{"-H", "unix://" + socket}, args...)...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("docker %v: %w: %s", args, err, out)
	}
	return strings.TrimSpace(string(out)), err
}

// serve creates a service that publishes a port as its port 80, and returns its id.
func (g *testRig) serve(t *testing.T, name, mode string, port int, args ...string) string {
	t.Helper()
	args = append([]string{"service", "create", "-d", "-q", "--no-resolve-image", "--name", name,
		"--publish", fmt.Sprintf("mode=%s,target=80,published=%d", mode, port)}, args...)
	return g.docker(t, 1, append(args, g.env["RIG_IMAGE"], "-name", name)...)
}

type swarmTask struct {
	ID, NodeID, DesiredState string
	Status                   struct {
		State           string
		ContainerStatus struct{ ContainerID string }
	}
}

// settled waits until the manager's list of tasks that run, or are to, is as wanted.
func (g *testRig) settled(t *testing.T, as func([]swarmTask) bool) []swarmTask {
	t.Helper()
	var all []swarmTask
	eventually(t, "tasks are settled", func() error {
		all = nil
		if err := g.call("GET", "/tasks?filters="+url.QueryEscape(`{"desired-state":["running"]}`), nil, &all); err != nil {
			return err
		}
		if !as(all) {
			return fmt.Errorf("they are %+v", all)
		}
		return nil
	})
	return all
}

// running is the container of the service's only task, once that runs and is not the former one.
func (g *testRig) running(t *testing.T, former string) string {
	t.Helper()
	return g.settled(t, func(all []swarmTask) bool {
		return len(all) == 1 && all[0].Status.State == "running" && all[0].Status.ContainerStatus.ContainerID[:12] != former
	})[0].Status.ContainerStatus.ContainerID[:12]
}

// managers waits until these are, the leader first, according to one of them. A new one is
// best asked itself: it works only some seconds after the others know of it.
func (g *testRig) managers(t *testing.T, node int, want ...string) {
	t.Helper()
	eventually(t, "the managers", func() error {
		all, err := g.tryDocker(node, "node", "ls", "--format", "{{.Hostname}} {{.ManagerStatus}}")
		if err != nil {
			return err
		}
		var got []string
		for _, line := range strings.Split(all, "\n") {
			switch name, status, _ := strings.Cut(line, " "); status {
			case "Leader":
				got = slices.Insert(got, 0, name)
			case "Reachable":
				got = append(got, name)
			}
		}
		if !slices.Equal(got, want) {
			return fmt.Errorf("they are %v, want %v", got, want)
		}
		return nil
	})
}

// forwards are the forwards of a local port.
func (p *runProc) forwards(port int) (all []forwardInfo) {
	p.t.Helper()
	for _, f := range p.status().Forwards {
		if int(f.LocalPort) == port {
			all = append(all, f)
		}
	}
	return all
}

// soon waits until the only forward of a port, if there is to be one, is as described: its
// container, where it leads, its node, status and reason.
func (p *runProc) soon(what string, most time.Duration, port int, want string) {
	p.t.Helper()
	within(p.t, most, what, func() error {
		got := ""
		for _, f := range p.forwards(port) {
			got += strings.TrimSpace(fmt.Sprintf("%s %s %s %s %s", f.ContainerID, f.RemoteAddress, f.Node, f.Status, f.Reason))
		}
		if got != want {
			return fmt.Errorf("it is %q, want %q", got, want)
		}
		return nil
	})
}

// The routing mesh itself needs a kernel with ip_vs: what listens on the manager's port
// stands in for it.
func TestE2ESwarmIngress(t *testing.T) {
	g := needSwarm(t, false)
	p := startRun(t, g, "")
	port := freePorts(t, 1)
	id := g.serve(t, "meshed", "ingress", port, "--replicas", "0", "--label", "com.docker.stack.namespace=shop")
	p.soon("the service's port", prompt, port, id[:12]+" 127.0.0.1  pending port not responding")
	if f := p.forward(port); f.ContainerName != "meshed" || f.Service != "shop" || !strings.HasPrefix(f.Image, g.env["RIG_IMAGE"]) || f.ContainerPort != 80 || f.RemotePort != uint16(port) {
		t.Errorf("it is %+v", f)
	}
	background(t, "nsenter", "--net=/run/netns/"+g.env["RIG_NS"], g.env["RIG_DIR"]+"/server", "-listen", strconv.Itoa(port), "-name", "mesh")
	p.becomes(port, active, "")
	if got, err := httpGet(port); err != nil || got != "hello from mesh\n" {
		t.Errorf("answers %q, %v", got, err)
	}
	g.docker(t, 1, "service", "update", "-d", "-q", "--publish-rm", "80", "meshed")
	p.soon("the port published no more", prompt, port, "")
	g.docker(t, 1, "service", "update", "-d", "-q", "--publish-add", fmt.Sprintf("%d:80", port), "meshed")
	p.soon("the port published again", prompt, port, id[:12]+" 127.0.0.1  active")
	g.docker(t, 1, "service", "rm", "meshed")
	p.soon("the removed service's port", prompt, port, "")
	refuses(t, port)
}

// Tasks on both nodes want one local port.
func TestE2ESwarmBothNodes(t *testing.T) {
	g := needSwarm(t, false)
	p := startRun(t, g, "")
	port := freePorts(t, 1)
	g.serve(t, "everywhere", "host", port, "--mode", "global")
	g.settled(t, func(all []swarmTask) bool {
		return len(all) == 2 && all[0].Status.State == "running" && all[1].Status.State == "running"
	})
	within(t, prompt, "a forward for each node", func() error {
		all := p.forwards(port)
		if len(all) != 2 {
			return fmt.Errorf("they are %+v", all)
		}
		if all[0].Status != active {
			all[0], all[1] = all[1], all[0]
		}
		nodes := map[string]string{all[0].RemoteAddress: all[0].Node, all[1].RemoteAddress: all[1].Node}
		has, wants := all[0], all[1]
		if has.Status != active || wants.Status != conflict || !strings.Contains(wants.Reason, fmt.Sprintf("%s (%s)", has.ContainerName, has.ContainerID)) ||
			has.Service != "everywhere" || wants.Service != "everywhere" || nodes["127.0.0.1"] != "" || nodes[g.env["RIG_ADDR2"]] != "node2" {
			return fmt.Errorf("they are %+v", all)
		}
		return nil
	})
	if out, _, _ := p.tell("status", "-wide"); !strings.Contains(out, " NODE ") || !strings.Contains(out, " node2 ") {
		t.Errorf("status -wide says %s", out)
	}
}

// A task on the other node ends, moves, is drained and scaled.
func TestE2ESwarmMoves(t *testing.T) {
	g := needSwarm(t, false)
	p := startRun(t, g, "")
	port := freePorts(t, 1)
	far := g.env["RIG_ADDR2"]
	g.serve(t, "mover", "host", port, "--constraint", "node.hostname==node2", "--restart-delay", "0s")
	id := g.running(t, "")
	p.soon("a task on the other node", prompt, port, id+" "+far+" node2 active")
	if got, err := httpGet(port); err != nil || got != "hello from mover\n" {
		t.Errorf("answers %q, %v", got, err)
	}

	g.docker(t, 2, "kill", id) // of which no event tells the manager's clients
	id = g.running(t, id)
	p.soon("its successor on that node", prompt, port, id+" "+far+" node2 active")

	g.docker(t, 1, "service", "update", "-d", "-q", "--constraint-rm", "node.hostname==node2", "--constraint-add", "node.hostname==node1", "mover")
	id = g.running(t, id)
	p.soon("moved to the manager", prompt, port, id+" 127.0.0.1  active")
	g.docker(t, 1, "service", "update", "-d", "-q", "--constraint-rm", "node.hostname==node1", "mover")
	t.Cleanup(func() { g.docker(t, 1, "node", "update", "--availability", "active", "node1") })
	id = g.running(t, "")
	g.docker(t, 1, "node", "update", "--availability", "drain", "node1")
	id = g.running(t, id)
	p.soon("the manager is drained", prompt, port, id+" "+far+" node2 active")

	g.docker(t, 1, "service", "scale", "-d", "mover=0")
	g.settled(t, func(all []swarmTask) bool { return len(all) == 0 })
	p.soon("none is left", prompt, port, "")
	refuses(t, port)
	g.docker(t, 1, "service", "scale", "-d", "mover=1")
	id = g.running(t, "")
	p.soon("one again", prompt, port, id+" "+far+" node2 active")
}

// The other node is cut off: first it cannot be reached, then the manager says that it is
// down; then it is back.
func TestE2ESwarmNodeLost(t *testing.T) {
	g := needSwarm(t, false)
	p := startRun(t, g, "")
	port := freePorts(t, 1)
	far := g.env["RIG_ADDR2"]
	g.serve(t, "lonely", "host", port, "--constraint", "node.hostname==node2")
	id := g.running(t, "")
	p.soon("a task on the other node", prompt, port, id+" "+far+" node2 active")
	link := func(to string) {
		if out, err := exec.Command("ip", "-n", g.env["RIG_NS2"], "link", "set", "eth0", to).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	t.Cleanup(func() { link("up") })
	link("down")
	p.tell("health") // looks behind every port
	p.becomes(port, pending, "node node2 cannot be reached from the remote host")
	p.becomes(port, pending, "node node2 is down")
	if f := p.forward(port); f.ContainerID != id || f.Node != "node2" {
		t.Errorf("it is %+v", f)
	}
	link("up")
	id = g.running(t, id)
	p.soon("the node is back", prompt, port, id+" "+far+" node2 active")
}

// Without a quorum forwards stay, and the manager's own containers are followed.
func TestE2ESwarmNoQuorum(t *testing.T) {
	g := needSwarm(t, true)
	p := startRun(t, g, "")
	port := freePorts(t, 2)
	id := g.serve(t, "meshed", "ingress", port, "--replicas", "0")[:12]
	want := id + " 127.0.0.1  pending port not responding"
	p.soon("the service's port", prompt, port, want)
	g.docker(t, 1, "node", "promote", "node2")
	g.managers(t, 2, "node1", "node2") // before it knows itself, it would not find back
	second := func(does string) {
		if out, err := exec.Command("rig/rig", "dockerd", g.name, does, "2").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	second("stop")
	warned := func() error {
		if w := strings.Join(p.status().Warnings, "\n"); !strings.Contains(w, "the Swarm does not answer: ") || !strings.Contains(w, "its forwards stay as they are") {
			return fmt.Errorf("warnings: %q", w)
		}
		return nil
	}
	within(t, electing, "a warning", warned)
	p.soon("the service's port", prompt, port, want)
	b := g.boot(t, port+1)
	b.answers(port + 1)
	if err := warned(); err != nil {
		t.Error(err)
	}
	again := p.another() // nothing is known from before
	p.signal(syscall.SIGTERM)
	p.exits(0)
	again.start()
	again.waitLine("connected to ")
	b.answers(port + 1)
	second("start")
	again.soon("a leader again", electing, port, want)
	eventually(t, "no warning", func() error {
		if w := again.status().Warnings; len(w) > 0 {
			return fmt.Errorf("warnings: %q", w)
		}
		return nil
	})
}

// A manager that is not the leader tells the same; one that becomes a worker tells nothing.
func TestE2ESwarmLeaders(t *testing.T) {
	g := needSwarm(t, true)
	p := startRun(t, g, "")
	port := freePorts(t, 2)
	id := g.serve(t, "meshed", "ingress", port, "--replicas", "0")[:12]
	want := id + " 127.0.0.1  pending port not responding"
	p.soon("the service's port", prompt, port, want)
	b := g.boot(t, port+1)
	b.answers(port + 1)
	g.docker(t, 1, "node", "promote", "node2")
	g.managers(t, 2, "node1", "node2")
	p.soon("two managers", prompt, port, want)
	g.docker(t, 2, "node", "demote", "node1")
	eventually(t, "it is a worker", func() error {
		if err := g.call("GET", "/services", nil, nil); err == nil {
			return fmt.Errorf("it answers")
		}
		return nil
	})
	p.soon("it is a worker", electing, port, "")
	b.answers(port + 1)
	g.docker(t, 2, "node", "promote", "node1")
	eventually(t, "it is a manager", func() error { return g.call("GET", "/services", nil, nil) })
	g.managers(t, 1, "node2", "node1")
	p.soon("it is a manager, but does not lead", electing, port, want)
	g.docker(t, 1, "node", "demote", "node2")
	g.managers(t, 1, "node1")
	p.soon("it leads again", prompt, port, want)
	g.docker(t, 1, "service", "rm", "meshed")
	p.soon("the removed service's port", prompt, port, "")
}
