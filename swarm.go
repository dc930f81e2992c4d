package main

// swarm.go: what a manager of a Swarm knows beyond its own containers: services, whose
// ingress ports the routing mesh serves on every node, and the tasks on other nodes that
// publish ports there. Both become containers, on the manager's loopback and at the
// address of their node.

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	swarmPace  = time.Second      // between lists while other nodes publish ports: no event tells of their tasks
	swarmRetry = 10 * time.Second // after a manager that did not answer, which costs a connection to the engine
	swarmStart = 30 * time.Second // for an engine to become a manager, which events tell of too early
	swarmTime  = 3 * time.Second  // to answer: without a leader a manager can take 20 s, in which nothing else is listed
)

// swarm is what a manager tells in one list. What is nil could not be told.
type swarm struct {
	services, tasks []container
	follow          bool          // to be listed again soon
	took            time.Duration // to ask
	err             error         // why something could not be told
}

// listSwarm asks for the services and the tasks. It returns an error only if the connection
// can no longer be used, and nothing if the engine is no manager.
func (e *engine) listSwarm() (*swarm, error) {
	began := time.Now()
	services, err := decoded(e, "/services", nil, (*rawService).service)
	if refused := (rejection{}); errors.As(err, &refused) && refused.noManager() {
		return nil, nil
	}
	sw := &swarm{}
	if err == nil {
		sw.services = []container{}
		onHosts := false
		for _, s := range services {
			onHosts = onHosts || s.onHosts
			if len(s.ports) > 0 {
				sw.services = append(sw.services, s.container)
			}
		}
		if sw.follow = onHosts; onHosts {
			sw.tasks, err = e.remoteTasks(services)
		} else {
			sw.tasks = []container{}
		}
	}
	sw.took, sw.err = time.Since(began), err
	switch refused := (rejection{}); {
	case errors.As(err, &refused):
		sw.follow, err = refused.code >= http.StatusInternalServerError, nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		sw.err = fmt.Errorf("the manager does not answer within %v", swarmTime)
	}
	return sw, err
}

// noManager reports whether an engine rejected a request because it is not, or does not know
// of, a Swarm's manager, rather than because the Swarm is in trouble. Docker answers both
// with status 503.
func (r rejection) noManager() bool {
	text := r.Error()
	return r.code < http.StatusInternalServerError || strings.Contains(text, "docker swarm init") || strings.Contains(text, "Worker nodes can't")
}

// remoteTasks returns the tasks that publish ports on other nodes than the manager's own,
// whose containers its list already has.
func (e *engine) remoteTasks(services []service) ([]container, error) {
	nodes, err := decoded(e, "/nodes", nil, (*rawNode).node)
	if err != nil {
		return nil, err
	}
	known := make(map[string]node)
	var down []string
	for _, n := range nodes {
		known[n.id] = n
		if n.lost != "" {
			down = append(down, strconv.Quote(n.id))
		}
	}
	// A manager that left and came back has another id; its former one is down.
	if self := known[e.self]; self.id == "" || self.lost != "" {
		if e.self, err = e.ownNode(); err != nil {
			return nil, err
		}
	}
	running, err := decoded(e, "/tasks", url.Values{"filters": {`{"desired-state":["running"]}`}}, (*rawTask).task)
	if err != nil {
		return nil, err
	}
	var lost []task
	if len(down) > 0 { // a lost node's tasks are wanted no more
		filter := `{"desired-state":["shutdown"],"node":[` + strings.Join(down, ",") + `]}`
		if lost, err = decoded(e, "/tasks", url.Values{"filters": {filter}}, (*rawTask).task); err != nil {
			return nil, err
		}
	}
	return remoteOf(e.self, services, known, running, lost), nil
}

// remoteOf makes containers of the tasks on other nodes. A port of a lost node is listed
// until another task of its service publishes it.
func remoteOf(self string, services []service, nodes map[string]node, running, lost []task) []container {
	names := make(map[string]string)
	for _, s := range services {
		names[s.fullID] = s.name
	}
	type published struct {
		service string
		port    uint16
	}
	served := make(map[published]bool)
	list := []container{}
	for i, t := range append(running, lost...) {
		c, n := t.container, nodes[t.node]
		isLost := i >= len(running)
		c.ports = slices.DeleteFunc(slices.Clone(c.ports), func(p port) bool { return isLost && served[published{t.service, p.public}] })
		for j := range c.ports {
			c.ports[j].ip = n.addr
			served[published{t.service, c.ports[j].public}] = true
		}
		if t.node == self || len(c.ports) == 0 {
			continue
		}
		c.node, c.lost = cmp.Or(n.name, t.node), n.lost
		if c.service = names[t.service]; c.service != "" {
			c.name = c.service + "." + c.name
		}
		list = append(list, c)
	}
	return list
}

// ownNode asks which node of the Swarm the engine is.
func (e *engine) ownNode() (string, error) {
	var info struct{ Swarm struct{ NodeID string } }
	err := e.readJSON("/info", "the engine's own node", swarmTime, &info)
	if err == nil && info.Swarm.NodeID == "" {
		err = rejection{errors.New("the engine does not tell which node it is"), 0}
	}
	return info.Swarm.NodeID, err
}

// decoded returns the valid elements of a list.
func decoded[Raw any, T interface{ published() int }](e *engine, path string, query url.Values, convert func(*Raw) (T, bool)) (list []T, err error) {
	err = e.read(path, query, "the list of "+path[1:], swarmTime, maxList, func(r io.Reader) (err error) {
		list, err = decodeArray(r, convert)
		return err
	})
	return list, err
}

// service is a Swarm service; its container holds what it publishes on every node.
type service struct {
	container
	fullID  string
	onHosts bool // it also publishes ports on the nodes of its tasks
}

type rawService struct {
	ID   string
	Spec struct {
		Name         string
		Labels       map[string]string
		TaskTemplate struct {
			ContainerSpec struct {
				Image  string
				Labels map[string]string
			}
		}
	}
	Endpoint struct{ Ports []rawSwarmPort }
}

type rawSwarmPort struct {
	Protocol                  string
	TargetPort, PublishedPort int64
	PublishMode               string
}

// service returns the valid parts of raw. It reports false if the id is not valid.
func (raw *rawService) service() (service, bool) {
	id, ok := swarmID(raw.ID)
	spec := raw.Spec.TaskTemplate.ContainerSpec
	s := service{fullID: raw.ID, container: container{id: id, name: cmp.Or(printable(raw.Spec.Name, maxText), id),
		image: printable(spec.Image, maxText)}}
	labels := make(map[string]string) // either of the service or of its containers
	maps.Copy(labels, spec.Labels)
	maps.Copy(labels, raw.Spec.Labels)
	s.rules = rulesOf(labels)
	s.container.service = cmp.Or(printable(raw.Spec.Labels["com.docker.stack.namespace"], maxText), s.name)
	s.ports, s.onHosts = swarmPorts(raw.Endpoint.Ports, netip.IPv4Unspecified(), false)
	return s, ok
}

// swarmPorts returns the valid ports of one mode of publishing, and whether there are any of
// the other.
func swarmPorts(raw []rawSwarmPort, ip netip.Addr, onHosts bool) (ports []port, other bool) {
	for _, p := range raw {
		switch {
		case (p.PublishMode == "host") != onHosts:
			other = true
		case 0 < p.PublishedPort && p.PublishedPort <= 65535 && 0 <= p.TargetPort && p.TargetPort <= 65535:
			ports = append(ports, port{ip: ip, private: uint16(p.TargetPort), public: uint16(p.PublishedPort),
				proto: printable(strings.ToLower(p.Protocol), 8)})
		}
	}
	return ports, other
}

// task is a task and, as a container, what it publishes on its node.
type task struct {
	container
	service, node string // full ids
}

type rawTask struct {
	ID, ServiceID, NodeID string
	Slot                  int64
	Spec                  struct {
		ContainerSpec struct {
			Image  string
			Labels map[string]string
		}
	}
	Status struct {
		State           string
		ContainerStatus struct{ ContainerID string }
		PortStatus      struct{ Ports []rawSwarmPort }
	}
}

// task returns the valid parts of raw, the container named as Docker does but without the
// service's name. It reports false for a task that does not run or publishes nothing on its
// node.
func (raw *rawTask) task() (task, bool) {
	id, ok := swarmID(raw.ID)
	if _, valid := swarmID(raw.NodeID); !ok || !valid || raw.Status.State != "running" {
		return task{}, false
	}
	t := task{service: raw.ServiceID, node: raw.NodeID, container: container{id: id, image: printable(raw.Spec.ContainerSpec.Image, maxText),
		rules: rulesOf(raw.Spec.ContainerSpec.Labels)}}
	which := raw.NodeID // of a global service
	if raw.Slot > 0 {
		which = strconv.FormatInt(raw.Slot, 10)
	}
	t.name = printable(which+"."+raw.ID, maxText)
	if own, ok := shortID(raw.Status.ContainerStatus.ContainerID); ok {
		t.id = own
	}
	t.ports, _ = swarmPorts(raw.Status.PortStatus.Ports, netip.Addr{}, true)
	return t, len(t.ports) > 0
}

// node is a node of a Swarm.
type node struct {
	id, name string
	addr     netip.Addr // where the others reach it; the zero Addr if that is not known
	lost     string     // why nothing on it can be reached, "" if something can
}

func (node) published() int { return 0 }

type rawNode struct {
	ID            string
	Description   struct{ Hostname string }
	Status        struct{ State, Addr string }
	ManagerStatus struct{ Addr string }
}

func (raw *rawNode) node() (node, bool) {
	id, ok := swarmID(raw.ID)
	n := node{id: raw.ID, name: cmp.Or(printable(raw.Description.Hostname, maxText), id)}
	if raw.Status.State == "down" || raw.Status.State == "disconnected" {
		n.lost = fmt.Sprintf("node %s is %s", n.name, raw.Status.State)
	}
	n.addr, _ = netip.ParseAddr(raw.Status.Addr)
	if manager, err := netip.ParseAddrPort(raw.ManagerStatus.Addr); err == nil && !usable(n.addr) {
		n.addr = manager.Addr()
	}
	if n.addr = n.addr.Unmap(); !usable(n.addr) {
		n.addr = netip.Addr{}
	}
	return n, ok
}

// usable reports whether other nodes can reach an address.
func usable(a netip.Addr) bool {
	return a.IsValid() && a.Zone() == "" && !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast()
}

// swarmID returns the first 12 characters of the id of a service, task or node, and whether
// it is valid.
func swarmID(id string) (string, bool) {
	if len(id) < 12 || len(id) > 64 || badChar(id, "") != "" {
		return "", false
	}
	return id[:12], true
}
