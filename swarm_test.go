package main

import (
	"bytes"
	"fmt"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"
)

const (
	serviceID = "okwjt6ohf335m1riybx3ewyx9"
	taskID    = "x5lpby2ekxy78mrg8g5gvm0b8"
	nodeID1   = "m57sz3arl9rjgpntx5s4l7cuu"
	nodeID2   = "q49t07rnh8u0xxxtmwkagmc2d"

	webService = `{"ID":"` + serviceID + `","Spec":{"Name":"web"},"Endpoint":{"Ports":[{"Protocol":"tcp","TargetPort":80,"PublishedPort":8080,"PublishMode":"host"}]}}`
	meshed     = `{"ID":"` + serviceID + `","Spec":{"Name":"web"},"Endpoint":{"Ports":[{"Protocol":"tcp","TargetPort":80,"PublishedPort":8080,"PublishMode":"ingress"}]}}`
	twoNodes   = `{"ID":"` + nodeID1 + `","Description":{"Hostname":"node1"},"Status":{"State":"ready","Addr":"192.0.2.1"}},` +
		`{"ID":"` + nodeID2 + `","Description":{"Hostname":"node2"},"Status":{"State":"ready","Addr":"192.0.2.2"}}`
	ownInfo = `{"Swarm":{"NodeID":"` + nodeID1 + `"}}`
)

// taskOn is a running task as a manager lists it.
func taskOn(node string, slot, public int) string {
	return fmt.Sprintf(`{"ID":"%s","ServiceID":"%s","NodeID":"%s","Slot":%d,"Spec":{"ContainerSpec":{"Image":"nginx"}},"Status":{"State":"running",`+
		`"ContainerStatus":{"ContainerID":"%s"},"PortStatus":{"Ports":[{"Protocol":"tcp","TargetPort":80,"PublishedPort":%d,"PublishMode":"host"}]}}}`,
		taskID, serviceID, node, slot, idLong, public)
}

func TestDecodeServices(t *testing.T) {
	one := func(name, ports string) string {
		return `[{"ID":"` + serviceID + `","Spec":{"Name":"` + name + `","TaskTemplate":{"ContainerSpec":{"Image":"nginx:1.27"}}},"Endpoint":{"Ports":[` + ports + `]}}]`
	}
	labelled := func(of, ofContainer string) string {
		return `[{"ID":"` + serviceID + `","Spec":{"Name":"web","Labels":{` + of + `},"TaskTemplate":{"ContainerSpec":{"Labels":{` + ofContainer + `}}}},"Endpoint":{}}]`
	}
	const ingress = `{"Protocol":"tcp","TargetPort":80,"PublishedPort":8080,"PublishMode":"ingress"}`
	const onHost = `{"Protocol":"tcp","TargetPort":80,"PublishedPort":9090,"PublishMode":"host"}`
	const bare = "okwjt6ohf335 web image=nginx:1.27 service=web"
	const web = bare + " 0.0.0.0:8080->80/tcp"
	for _, c := range []struct{ name, in, want string }{
		{"none", `[]`, ""},
		{"one", one("web", ingress), web},
		{"host mode beside it", one("web", ingress+","+onHost), web + " on hosts"},
		{"host mode only", one("web", onHost), bare + " on hosts"},
		{"no ports", one("web", ""), bare},
		{"no published port", one("web", `{"Protocol":"tcp","TargetPort":80}`), bare},
		{"ports that are none", one("web", ingress+`,{"PublishedPort":65536},{"PublishedPort":-1},{"PublishedPort":1,"TargetPort":-1}`), web},
		{"UDP", one("web", `{"Protocol":"UDP","TargetPort":53,"PublishedPort":53,"PublishMode":"ingress"}`), bare + " 0.0.0.0:53->53/udp"},
		{"a hostile name", one(`\u001b[31m`, ingress), strings.ReplaceAll(web, "web", "[31m")},
		{"no name", one("", ingress), strings.ReplaceAll(web, "web", "okwjt6ohf335")},
		{"a stack", labelled(`"com.docker.stack.namespace":"shop"`, ""), "okwjt6ohf335 web image= service=shop"},
		{"not to be probed", labelled(`"rdhpf.probe":"false"`, ""), "okwjt6ohf335 web image= service=web unprobed"},
		{"whose containers are not to be probed", labelled("", `"rdhpf.probe":"false"`), "okwjt6ohf335 web image= service=web unprobed"},
		{"bad ids", `[null,{},{"ID":"short","Endpoint":{"Ports":[` + ingress + `]}},{"ID":"\u001b[31mmmmmmmmm","Endpoint":{"Ports":[` + ingress + `]}}]`, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			list, err := decodeArray(strings.NewReader(c.in), (*rawService).service)
			got := ""
			for _, s := range list {
				if got += listText([]container{s.container}); s.onHosts {
					got += " on hosts"
				}
			}
			if err != nil || got != c.want {
				t.Errorf("\n got %q, %v\nwant %q", got, err, c.want)
			}
		})
	}
}

func TestDecodeTasks(t *testing.T) {
	replace := func(old, new string) string { return strings.Replace(taskOn(nodeID2, 3, 8080), old, new, 1) }
	const want = "4e9bd1f4c7a0 3." + taskID + " image=nginx service= none:8080->80/tcp"
	for _, c := range []struct{ name, in, want string }{
		{"one", taskOn(nodeID2, 3, 8080), want},
		{"of a global service", taskOn(nodeID2, 0, 8080), strings.Replace(want, " 3.", " "+nodeID2+".", 1)},
		{"that starts", replace("running", "starting"), ""},
		{"through the routing mesh", replace(`"PublishMode":"host"`, `"PublishMode":"ingress"`), ""},
		{"without a node", replace(nodeID2, ""), ""},
		{"on a node with a hostile id", replace(nodeID2, `a\" b\u001b[31mmmmm`), ""},
		{"without an id", replace(taskID, ""), ""},
		{"without a container", replace(idLong, ""), strings.Replace(want, idLong[:12], taskID[:12], 1)},
		{"a port that is none", replace("8080", "80800"), ""},
		{"not to be probed", replace(`"Image"`, `"Labels":{"rdhpf.probe":"false"},"Image"`), strings.Replace(want, " none", " unprobed none", 1)},
	} {
		t.Run(c.name, func(t *testing.T) {
			list, err := decodeArray(strings.NewReader("["+c.in+"]"), (*rawTask).task)
			got := ""
			for _, one := range list {
				got += listText([]container{one.container})
				if one.service != serviceID || one.node != nodeID2 {
					t.Errorf("of service %q on node %q", one.service, one.node)
				}
			}
			if err != nil || got != c.want {
				t.Errorf("\n got %q, %v\nwant %q", got, err, c.want)
			}
		})
	}
}

func TestDecodeNodes(t *testing.T) {
	one := func(state, addr, manager string) string {
		return fmt.Sprintf(`[{"ID":"%s","Description":{"Hostname":"node2"},"Status":{"State":"%s","Addr":"%s"},"ManagerStatus":{"Addr":"%s"}}]`, nodeID2, state, addr, manager)
	}
	for _, c := range []struct{ name, in, want string }{
		{"ready", one("ready", "192.0.2.2", ""), "node2 192.0.2.2 "},
		{"IPv6", one("ready", "2001:db8::2", ""), "node2 2001:db8::2 "},
		{"IPv4 in IPv6", one("ready", "::ffff:192.0.2.2", ""), "node2 192.0.2.2 "},
		{"down", one("down", "192.0.2.2", ""), "node2 192.0.2.2 node node2 is down"},
		{"disconnected", one("disconnected", "192.0.2.2", ""), "node2 192.0.2.2 node node2 is disconnected"},
		{"not heard of since the leader changed", one("unknown", "192.0.2.2", ""), "node2 192.0.2.2 "},
		{"a manager that knows no address of itself", one("ready", "0.0.0.0", "192.0.2.2:2377"), "node2 192.0.2.2 "},
		{"its own loopback", one("ready", "127.0.0.1", "127.0.0.1:2377"), "node2 none "},
		{"a zone", one("ready", "fe80::1%eth0", ""), "node2 none "},
		{"no address", one("ready", "", ""), "node2 none "},
		{"no name", `[{"ID":"` + nodeID2 + `","Status":{"Addr":"192.0.2.2"}}]`, "q49t07rnh8u0 192.0.2.2 "},
		{"a hostile name", strings.Replace(one("down", "192.0.2.2", ""), "node2", `\u001b[31m\n`, 1), "[31m  192.0.2.2 node [31m  is down"},
		{"bad ids", `[null,{},{"ID":"a b c d e f g h"}]`, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			list, err := decodeArray(strings.NewReader(c.in), (*rawNode).node)
			got := ""
			for _, n := range list {
				got += fmt.Sprintf("%s %s %s", n.name, addrText(n.addr), n.lost)
			}
			if err != nil || got != c.want {
				t.Errorf("\n got %q, %v\nwant %q", got, err, c.want)
			}
		})
	}
}

// What is asked of an engine, and what is made of it.
func TestListSwarm(t *testing.T) {
	const (
		tasks  = "/tasks"
		noMore = `503 Service Unavailable|{"message":"This node is not a swarm manager. `
		trial  = `500 Internal Server Error|{"message":"rpc error: code = Unknown desc = The swarm does not have a leader."}`
	)
	running := tasks + "?filters=" + url.QueryEscape(`{"desired-state":["running"]}`)
	lost := tasks + "?filters=" + url.QueryEscape(`{"desired-state":["shutdown"],"node":["`+nodeID2+`"]}`)
	isDown := strings.Replace(twoNodes, `"ready","Addr":"192.0.2.2"`, `"down","Addr":"192.0.2.2"`, 1)
	const remote = "4e9bd1f4c7a0 web.1." + taskID + " image=nginx service=web node=node2 192.0.2.2:8080->80/tcp"
	const isLost = "4e9bd1f4c7a0 web.1." + taskID + " image=nginx service=web node=node2 lost=node node2 is down 192.0.2.2:8080->80/tcp"
	other := strings.ReplaceAll(twoNodes, nodeID2, "z"+nodeID2[1:])
	for _, c := range []struct {
		name            string
		asked           []string // paths and answers; 200 OK unless a status stands before |
		services, tasks string   // ? if they could not be told
		follow          bool
		err             string // * stands for anything
	}{
		{"no services", []string{"/services", "[]"}, "", "", false, ""},
		{"the routing mesh alone", []string{"/services", "[" + meshed + "]"}, "okwjt6ohf335 web image= service=web 0.0.0.0:8080->80/tcp", "", false, ""},
		{"a task on each node", []string{"/services", "[" + webService + "]", "/nodes", "[" + twoNodes + "]", "/info", ownInfo,
			running, "[" + taskOn(nodeID1, 2, 8080) + "," + taskOn(nodeID2, 1, 8080) + "]"}, "", remote, true, ""},
		{"a node that is down", []string{"/services", "[" + webService + "]", "/nodes", "[" + isDown + "]", "/info", ownInfo,
			running, "[]", lost, "[" + taskOn(nodeID2, 1, 8080) + "]"}, "", isLost, true, ""},
		{"a node that is down, and its port elsewhere", []string{"/services", "[" + webService + "]", "/nodes", "[" + isDown + "]", "/info", ownInfo,
			running, "[" + taskOn(nodeID1, 1, 8080) + "]", lost, "[" + taskOn(nodeID2, 1, 8080) + "]"}, "", "", true, ""},
		{"a task on a node that is not listed", []string{"/services", "[" + webService + "]", "/nodes", "[" + other + "]", "/info", ownInfo,
			running, "[" + taskOn(nodeID2, 1, 8080) + "]"}, "", strings.NewReplacer("node=node2", "node="+nodeID2, "192.0.2.2", "none").Replace(remote), true, ""},
		{"no Swarm", []string{"/services", noMore + `Use \"docker swarm init\" or \"docker swarm join\""}`}, "none", "", false, ""},
		{"a worker", []string{"/services", noMore + `Worker nodes can't be used to view or modify cluster state."}`}, "none", "", false, ""},
		{"a manager that is not ready", []string{"/services", noMore + `Manager is being prepared"}`}, "?", "?", true, "*/services: 503*prepared*"},
		{"an engine that knows no Swarm", []string{"/services", "404 Not Found|nothing"}, "none", "", false, ""},
		{"an engine that forbids", []string{"/services", "403 Forbidden|no"}, "none", "", false, ""},
		{"no leader", []string{"/services", trial}, "?", "?", true, "*500*does not have a leader*"},
		{"tasks are forbidden", []string{"/services", "[" + meshed + "," + webService + "]", "/nodes", "[" + twoNodes + "]", "/info", ownInfo, running, "403 Forbidden|no"},
			"okwjt6ohf335 web image= service=web 0.0.0.0:8080->80/tcp", "?", false, "*/tasks: 403 Forbidden: no"},
		{"nodes are forbidden", []string{"/services", "[" + webService + "]", "/nodes", "403 Forbidden|no"}, "", "?", false, "*/nodes: 403 Forbidden: no"},
		{"the leader is lost meanwhile", []string{"/services", "[" + webService + "]", "/nodes", trial}, "", "?", true, "*/nodes: 500*"},
		{"an engine that does not tell its node", []string{"/services", "[" + webService + "]", "/nodes", "[" + twoNodes + "]", "/info", "{}"}, "", "?", false, "*which node it is"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for i := 1; i < len(c.asked); i += 2 {
				status, body := "200 OK", c.asked[i]
				if before, after, cut := strings.Cut(body, "|"); cut {
					status, body = before, after
				}
				c.asked[i] = fmt.Sprintf("HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s", status, len(body), body)
			}
			sw, err := engineWith(t, scripted(t, "", c.asked...)).listSwarm()
			services, tasks, said := "none", "", ""
			if sw != nil {
				services, tasks = "?", "?"
				if sw.services != nil {
					services = listText(sw.services)
				}
				if sw.tasks != nil {
					tasks = listText(sw.tasks)
				}
				if sw.err != nil {
					said = sw.err.Error()
				}
				if sw.follow != c.follow {
					t.Errorf("to be followed: %v", sw.follow)
				}
			}
			if err != nil || services != c.services || tasks != c.tasks || !matches(c.err, said) {
				t.Errorf("\n got %q, %q, %q, %v\nwant %q, %q, %q", services, tasks, said, err, c.services, c.tasks, c.err)
			}
		})
	}
}

// The engine is asked which node it is once, and again when that node is gone.
func TestListSwarmOwnNode(t *testing.T) {
	answer := func(body string) string {
		return fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	}
	running := "/tasks?filters=" + url.QueryEscape(`{"desired-state":["running"]}`)
	var asked []string
	for _, info := range []string{ownInfo, "", strings.Replace(ownInfo, nodeID1, nodeID2, 1)} {
		nodes := twoNodes
		if strings.Contains(info, nodeID2) {
			nodes = twoNodes[strings.Index(twoNodes, ",{")+1:]
		}
		asked = append(asked, "/services", answer("["+webService+"]"), "/nodes", answer("["+nodes+"]"))
		if info != "" {
			asked = append(asked, "/info", answer(info))
		}
		asked = append(asked, running, answer("["+taskOn(nodeID2, 1, 8080)+"]"))
	}
	e := engineWith(t, scripted(t, "", asked...))
	for i, want := range []int{1, 1, 0} {
		if sw, err := e.listSwarm(); err != nil || len(sw.tasks) != want {
			t.Errorf("list %d: %+v, %v", i, sw, err)
		}
	}
}

func FuzzDecodeSwarm(f *testing.F) {
	f.Add([]byte("["+webService+","+meshed+"]"), []byte("["+twoNodes+"]"), []byte("["+taskOn(nodeID1, 1, 8080)+"]"), []byte("["+taskOn(nodeID2, 0, 53)+"]"))
	f.Add([]byte("[null]"), []byte(`[{"ID":"`+nodeID2+`","Description":{"Hostname":"\u001b"},"Status":{"State":"down","Addr":"::ffff:1.2.3.4"}}]`),
		[]byte(`[{"ID":"`+taskID+`","NodeID":"`+nodeID2+`","Slot":-1}]`), []byte("[{}]"))
	f.Fuzz(func(t *testing.T, services, nodes, running, lost []byte) {
		s, _ := decodeArray(bytes.NewReader(services), (*rawService).service)
		n, _ := decodeArray(bytes.NewReader(nodes), (*rawNode).node)
		r, _ := decodeArray(bytes.NewReader(running), (*rawTask).task)
		l, _ := decodeArray(bytes.NewReader(lost), (*rawTask).task)
		known := make(map[string]node)
		for _, one := range n {
			known[one.id] = one
		}
		list := remoteOf(nodeID1, s, known, r, l)
		for _, one := range s {
			list = append(list, one.container)
		}
		for _, c := range list {
			if len(c.id) != 12 || badChar(c.id, "") != "" || c.name == "" {
				t.Errorf("%q has the id %q", c.name, c.id)
			}
			checkPrintable(t, c.name, c.image, c.service, c.node, c.lost)
			for _, p := range c.ports {
				checkPrintable(t, p.proto)
				if p.ip.Is4In6() || p.ip.Zone() != "" || p.public == 0 {
					t.Errorf("%s publishes %+v", c.name, p)
				}
			}
		}
	})
}

// What a manager cannot tell stays as it was; what it tells no more goes.
func TestSwarmListed(t *testing.T) {
	mesh, remote := ctr(idA, "mesh", "8080"), ctr(idB, "web.1", "192.0.2.2:8081")
	some, none := []container{mesh}, []container{}
	broken := fmt.Errorf("no leader")
	h := connectedHand(t)
	for i, c := range []struct {
		tells *swarm
		want  string
		next  time.Duration // until the next list; 0: as ever
	}{
		{nil, "", 0},
		{&swarm{services: some, tasks: []container{remote}, follow: true}, "8080; 8081>192.0.2.2:8081", swarmPace},
		{&swarm{services: some, tasks: []container{remote}, follow: true, took: swarmPace}, "8080; 8081>192.0.2.2:8081", 5 * swarmPace},
		{&swarm{err: broken}, "8080; 8081>192.0.2.2:8081", 0},
		{&swarm{services: none, err: broken}, "8081>192.0.2.2:8081", 0},
		{&swarm{services: some, tasks: none}, "8080", 0},
		{nil, "", 0},
	} {
		h.wait(time.Minute)
		h.swarmListed(c.tells)
		h.list()
		var keys []string
		for _, f := range h.state.sorted() {
			keys = append(keys, keyText(f.key))
		}
		warnings := strings.Join(h.snapshot().Warnings, "\n")
		failed := c.tells != nil && c.tells.err != nil
		if c.next == 0 {
			c.next = relistEvery
		}
		if got := strings.Join(keys, "; "); got != c.want || strings.Contains(warnings, "its forwards stay as they are") != failed || h.link.listDue.Sub(h.now) != c.next {
			t.Errorf("%d: %q, warnings %q, listed again in %v; want %q, in %v", i, got, warnings, h.link.listDue.Sub(h.now), c.want, c.next)
		}
	}
	if n := strings.Count(h.log.String(), "does not answer"); n != 1 || !strings.Contains(h.log.String(), "the Swarm answers again") {
		t.Errorf("said %s", h.log.String())
	}
}

// A node that is lost, and one that cannot be reached.
func TestStateNodes(t *testing.T) {
	web := container{id: idA, name: "web.1", node: "node2", ports: []port{{ip: netip.MustParseAddr("192.0.2.2"), private: 80, public: 8080, proto: "tcp"}}}
	gone := web
	gone.lost = "node node2 is down"
	const at = "8080>192.0.2.2:8080"
	d := newDriver(t, plainConfig(), 9)
	for i, c := range []struct {
		do   happening
		want string
	}{
		{up(web, at), "active"},
		{lists(gone), "pending node node2 is down"},
		{func(d *driver) { d.lookAgain(d.now, "") }, "pending node node2 is down"},
		{lists(web), "pending probing"},
		{probes(at, probeUnreached), "pending node node2 cannot be reached from the remote host"},
		{lists(web), "pending node node2 cannot be reached from the remote host"},
	} {
		c.do(d)
		d.plan()
		if got := d.shown(); got != at+" "+c.want {
			t.Errorf("%d: %q, want %q", i, got, c.want)
		}
	}
}
