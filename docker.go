package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"net/textproto"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode"
)

// docker.go: the engine's API over a dial-stdio session of the master: the list
// of running containers and the event stream. The engine's output is not trusted:
// it is size-limited, validated and made safe to print.

const (
	listTimeout = 10 * time.Second
	bareAfter   = 2 * time.Second // of silence, before asking without the marker
	maxNoise    = 1 << 20         // bytes a remote shell may print before the marker
	maxList     = 64 << 20        // bytes of one list
	maxEvent    = 1 << 20         // bytes of one event
	maxHead     = 64 << 10        // bytes of a response header
)

// engine is a connection to the remote engine. It is not safe for concurrent use,
// except for Close.
type engine struct {
	s      *muxSession
	limit  *io.LimitedReader // bounds the next input; net/http does not limit headers
	r      *bufio.Reader     // reads from limit
	mark   string
	noise  string // printed by the remote host before the marker, unfiltered
	server string // such as "Docker/20.10.24 (linux)"; set by the first response

	hostNet map[string]bool // what podman said of the listed containers that have no network
	self    string          // the id of its node in a Swarm; "" if unknown
}

const pingRequest = "GET /_ping HTTP/1.1\r\nHost: docker\r\n\r\n"

// errMaster marks an error of the ssh master rather than the engine.
var errMaster = errors.New("the ssh master does not answer")

// dialEngine connects to the engine through a session of the master. It discards
// the remote shell's startup output, up to a marker.
func dialEngine(control, socket string, timeout time.Duration) (*engine, error) {
	mark := fmt.Sprintf("rdhpf-%016x", rand.Uint64())
	s, err := muxOpenSession(control, engineCommand(socket, mark), timeout)
	if err != nil {
		var refused *muxError
		if errors.As(err, &refused) {
			return nil, fmt.Errorf("the SSH server refused another session (%w): rdhpf needs two; see MaxSessions in its sshd_config", err)
		}
		return nil, fmt.Errorf("%w: %w", errMaster, err)
	}
	limit := &io.LimitedReader{R: s, N: maxNoise + 4096}
	e := &engine{s: s, limit: limit, r: bufio.NewReader(limit), mark: mark}
	if err := e.start(timeout); err != nil {
		err = e.fail("starting docker on the remote host", err)
		e.Close()
		return nil, err
	}
	return e, nil
}

// start waits for the marker. If nothing comes, the account's command may be forced to be
// docker system dial-stdio: then a request is answered.
func (e *engine) start(timeout time.Duration) (err error) {
	e.s.SetReadDeadline(time.Now().Add(min(timeout, bareAfter)))
	e.noise, err = discardTo(e.r, e.mark+"\n")
	if !errors.Is(err, os.ErrDeadlineExceeded) || timeout <= bareAfter {
		return err
	}
	e.s.SetReadDeadline(time.Now().Add(timeout - bareAfter))
	if e.noise != "" { // a slow start-up, or another forced command
		noise, err := discardTo(e.r, e.mark+"\n")
		e.noise += noise
		return err
	}
	if _, err := io.WriteString(e.s, pingRequest); err != nil {
		return err
	}
	if head, _ := e.r.Peek(len("HTTP/1.")); string(head) != "HTTP/1." {
		if e.noise, err = discardTo(e.r, e.mark+"\n"); err != nil {
			return err
		}
	}
	resp, err := http.ReadResponse(e.r, nil)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}

func (e *engine) Close() error { return e.s.Close() }

// engineCommand returns a command for any remote shell that prints the marker, then
// becomes the connection to the engine. It uses podman if there is no docker.
func engineCommand(socket, mark string) string {
	docker, podman := "docker", "podman"
	if socket != "" { // parseHost has rejected characters special to a shell
		docker += " --host=unix://" + socket
		podman += " --url=unix://" + socket
	}
	return fmt.Sprintf("exec sh -c 'echo %[1]s; echo %[1]s >&2; "+
		"if command -v docker >/dev/null 2>&1 || ! command -v podman >/dev/null 2>&1; "+
		"then exec %[2]s system dial-stdio; else exec %[3]s system dial-stdio; fi'", mark, docker, podman)
}

// discardTo reads up to and including the marker. If that does not come it returns the
// beginning of what came instead, unfiltered.
func discardTo(r *bufio.Reader, mark string) (noise string, err error) {
	var kept []byte
	matched := 0
	for n := 0; n < maxNoise; n++ {
		c, err := r.ReadByte()
		if err != nil {
			return string(kept), err
		}
		if len(kept) < maxText {
			kept = append(kept, c)
		}
		if c != mark[matched] {
			matched = 0 // the marker's first letter occurs only once, so matches cannot overlap
		}
		if c == mark[matched] {
			if matched++; matched == len(mark) {
				return "", nil
			}
		}
	}
	return string(kept), fmt.Errorf("the remote shell prints more than %d bytes at startup", maxNoise)
}

// fail explains a connection error with the remote command's own message, if any,
// and a hint.
func (e *engine) fail(doing string, err error) error {
	noise := printable(strings.TrimSpace(e.noise), maxText)
	if e.server == "" && noise != "" && errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("the remote host did not start docker, but printed: %s", noise)
	}
	if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, syscall.EPIPE) {
		return fmt.Errorf("%s: %w", doing, err)
	}
	code, _ := e.s.wait(time.Second)
	said := e.s.stderr()
	if i := strings.LastIndex(said, e.mark); i >= 0 {
		said = said[i+len(e.mark):]
	}
	if said = printable(strings.TrimSpace(said), 1000); said == "" {
		if e.server == "" && noise != "" {
			return fmt.Errorf("the remote host did not start docker, but printed: %s", noise)
		}
		return fmt.Errorf("%s: exit status %d and no error message", doing, code)
	}
	hint := ""
	switch low := strings.ToLower(said); {
	case strings.Contains(low, "not found"):
		hint = " (is docker or podman on the PATH of an ssh session there?)"
	case strings.Contains(low, "permission denied"):
		hint = " (is that user allowed to use docker?)"
	case strings.Contains(low, "connect"):
		hint = " (is the engine running? docker context ls on that host shows which one is used)"
	}
	return fmt.Errorf("docker on the remote host: %s%s", said, hint)
}

// get sends a request. The caller must close the body before the next one.
func (e *engine) get(path string, query url.Values, timeout time.Duration) (*http.Response, error) {
	doing := "asking the remote engine for " + path
	deadline := time.Now().Add(timeout)
	e.s.SetWriteDeadline(deadline)
	e.s.SetReadDeadline(deadline)
	req := &http.Request{Method: "GET", Host: "docker", Header: http.Header{"User-Agent": {"rdhpf"}},
		URL: &url.URL{Scheme: "http", Host: "docker", Path: path, RawQuery: query.Encode()}}
	if err := req.Write(e.s); err != nil {
		return nil, e.fail(doing, err)
	}
	e.limit.N = maxHead
	resp, err := http.ReadResponse(e.r, req)
	var protocol textproto.ProtocolError
	switch {
	case err != nil && e.limit.N <= 0:
		err = fmt.Errorf("the response header is longer than %d bytes", maxHead)
	case errors.As(err, &protocol) || err != nil && strings.HasPrefix(err.Error(), "malformed "):
		err = fmt.Errorf("the response is not HTTP: %s", printable(err.Error(), maxText))
	}
	if err != nil {
		return nil, e.fail(doing, err)
	}
	if server := resp.Header.Get("Server"); server != "" {
		e.server = printable(server, maxText)
	}
	if resp.StatusCode != http.StatusOK {
		body, torn := io.ReadAll(resp.Body) // its size is limited as that of the header
		err = fmt.Errorf("%s: %s: %s", doing, printable(resp.Status, maxText), printable(strings.TrimSpace(string(body)), 1000))
		if torn == nil {
			err = rejection{err, resp.StatusCode}
		}
		return nil, err
	}
	return resp, nil
}

// rejection is an answer of the engine that is no success. The connection can be used for
// the next request.
type rejection struct {
	error
	code int // the HTTP status
}

// list returns the running containers.
func (e *engine) list() ([]container, error) {
	var query url.Values
	podman := e.isPodman()
	if podman { // it leaves out paused containers
		query = url.Values{"filters": {`{"status":["running","paused"]}`}}
	}
	list, err := e.listAt("/containers/json", query)
	switch {
	case err != nil || !e.isPodman():
		return list, err
	case !podman: // nobody knew
		return e.list()
	}
	if err := e.completeList(list, query); err != nil {
		return nil, err
	}
	return list, nil
}

func (e *engine) isPodman() bool { return strings.HasPrefix(e.server, "Libpod/") }

// completeList adds what podman's version of Docker's list lacks: all but the first port of
// a range, which podman's own list has, and whose network a container without one uses.
func (e *engine) completeList(list []container, query url.Values) error {
	own, err := e.listAt("/v4.0.0/libpod/containers/json", query)
	if err != nil && !errors.As(err, new(rejection)) {
		return err
	}
	ports := make(map[string][]port)
	for _, c := range own {
		ports[c.id] = c.ports
	}
	asked, known := 0, make(map[string]bool)
	for i := range list {
		c := &list[i]
		if own := ports[c.id]; own != nil { // before version 4 it is another list, and has no ranges
			c.ports = own
		}
		if c.nets != nil || c.ports != nil {
			continue
		}
		on, found := e.hostNet[c.id]
		if !found && asked < maxInspect {
			asked, found = asked+1, true
			if on, err = e.onHostNet(c.id); err != nil && !errors.As(err, new(rejection)) {
				return err
			}
		}
		if c.hostNet = on; found {
			known[c.id] = on
		}
	}
	e.hostNet = known
	return nil
}

// listAt returns the containers of one of the engine's lists.
func (e *engine) listAt(path string, query url.Values) ([]container, error) {
	var list []container
	err := e.read(path, query, "the list of containers", listTimeout, maxList, func(r io.Reader) (err error) {
		list, err = decodeList(r)
		return err
	})
	if err != nil {
		return nil, err
	}
	return list, nil
}

// onHostNet asks whether a container is on the remote host's network.
func (e *engine) onHostNet(id string) (bool, error) {
	var raw struct{ HostConfig struct{ NetworkMode string } }
	err := e.readJSON("/containers/"+id+"/json", "a container", listTimeout, &raw)
	return raw.HostConfig.NetworkMode == "host", err
}

// readJSON decodes an answer that is one object.
func (e *engine) readJSON(path, what string, timeout time.Duration, into any) error {
	return e.read(path, nil, what, timeout, maxOne, func(r io.Reader) error {
		return unexpectedEOF(json.NewDecoder(r).Decode(into))
	})
}

// read decodes the answer to a request, which has to begin before the timeout.
func (e *engine) read(path string, query url.Values, what string, timeout time.Duration, limit int64, decode func(io.Reader) error) error {
	resp, err := e.get(path, query, timeout)
	if err != nil {
		return err
	}
	e.limit.N = limit
	if err = decode(unhurried{resp.Body, e.s}); err == nil {
		err = resp.Body.Close() // drains it, leaving the connection at the next response
	}
	if err != nil && e.limit.N <= 0 {
		err = fmt.Errorf("it is longer than %d bytes", limit)
	}
	if err != nil {
		return e.fail("reading "+what, err)
	}
	return nil
}

// unhurried renews the deadline with each read: a long list over a slow link takes as long
// as it takes.
type unhurried struct {
	io.Reader
	s *muxSession
}

func (u unhurried) Read(b []byte) (int, error) {
	u.s.SetReadDeadline(time.Now().Add(listTimeout))
	return u.Reader.Read(b)
}

// ping waits for an answer of the engine, which shows that the link works.
func (e *engine) ping(timeout time.Duration) error {
	resp, err := e.get("/_ping", nil, timeout)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// event reports that the container list has changed, or that a service may have.
type event struct {
	action string // start, die, pause, unpause, rename, health_status, connect, …
	id     string // of the container, 12 characters; "" if it concerns a Swarm
}

// events calls subscribed, then handle for each event, until the connection
// ends; it always returns an error.
func (e *engine) events(subscribed func(), handle func(event)) error {
	resp, err := e.get("/events", url.Values{"filters": {`{"type":["container","network","service","node"]}`}}, listTimeout)
	if err != nil {
		return err
	}
	e.s.SetReadDeadline(time.Time{})
	subscribed()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, maxEvent)
	for e.limit.N = 2 * maxEvent; lines.Scan(); e.limit.N = 2 * maxEvent {
		if ev, ok := decodeEvent(lines.Bytes()); ok {
			handle(ev)
		}
	}
	return e.fail("following the remote engine's events", cmp.Or(lines.Err(), io.EOF))
}

const (
	maxContainer = 20000   // containers in one list
	maxPublished = 100_000 // published ports in one list
	maxNets      = 64      // networks kept per container
	maxInspect   = 20      // containers asked about after one list, which each delays by a round trip
	maxOne       = 1 << 20 // bytes of one container, which take about ten times that in memory
	maxText      = 200     // runes kept of a name
)

// decodeEvent returns the event and whether it is relevant; health checks alone
// can cause three irrelevant events per second.
func decodeEvent(line []byte) (event, bool) {
	var raw struct {
		Type, Action string
		Status, ID   string // podman, and engines before API 1.22
		Actor        struct {
			ID         string
			Attributes struct{ Container string } // of a network event
		}
	}
	if json.Unmarshal(line, &raw) != nil {
		return event{}, false
	}
	switch raw.Type {
	case "", "container":
	case "network":
		if raw.Action != "connect" && raw.Action != "disconnect" {
			return event{}, false
		}
		id, ok := shortID(cmp.Or(raw.Actor.Attributes.Container, raw.ID))
		return event{raw.Action, id}, ok
	case "service", "node":
		return event{action: raw.Type}, true
	default:
		return event{}, false
	}
	if raw.Action == "" {
		raw.Action = raw.Status
	}
	if raw.Actor.ID == "" {
		raw.Actor.ID = raw.ID
	}
	raw.Action, _, _ = strings.Cut(raw.Action, ":") // "health_status: healthy"
	switch raw.Action {
	case "health_status", "start", "die", "pause", "unpause", "rename", "destroy", "restart", "stop", "update":
	case "died": // podman
		raw.Action = "die"
	default:
		return event{}, false
	}
	id, ok := shortID(raw.Actor.ID)
	return event{raw.Action, id}, ok
}

// decodeList decodes the response to /containers/json.
func decodeList(r io.Reader) ([]container, error) { return decodeArray(r, (*rawContainer).container) }

// decodeArray decodes a list one element at a time, so that a long one takes no more memory
// than what is kept of it.
func decodeArray[Raw any, T interface{ published() int }](r io.Reader, convert func(*Raw) (T, bool)) (list []T, err error) {
	part := &io.LimitedReader{R: r, N: maxOne}
	defer func() {
		if err != nil && part.N == 0 {
			err = fmt.Errorf("a container in it is longer than %d bytes", maxOne)
		}
	}()
	dec := json.NewDecoder(part)
	if t, err := dec.Token(); err != nil {
		return nil, unexpectedEOF(err)
	} else if t != json.Delim('[') {
		return nil, errors.New("it is not a JSON array")
	}
	list = []T{}
	for published := 0; dec.More(); part.N = maxOne {
		var raw Raw
		if err := dec.Decode(&raw); err != nil {
			return nil, unexpectedEOF(err)
		}
		if len(list) == maxContainer {
			return nil, fmt.Errorf("it has more than %d containers", maxContainer)
		}
		if c, ok := convert(&raw); ok {
			list = append(list, c)
			if published += c.published(); published > maxPublished {
				return nil, fmt.Errorf("it has more than %d published ports", maxPublished)
			}
		}
	}
	if _, err := dec.Token(); err != nil {
		return nil, unexpectedEOF(err)
	}
	return list, nil
}

func unexpectedEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

type rawContainer struct {
	ID              string `json:"Id"`
	Names           []string
	Image           string
	State           string
	Labels          map[string]string
	HostConfig      struct{ NetworkMode string }
	NetworkSettings struct {
		Networks map[string]struct{ EndpointID, IPAddress, Gateway string }
	}
	Ports []struct {
		IP          string
		PrivatePort int64
		PublicPort  int64
		Type        string

		// In podman's own list.
		HostIP        string `json:"host_ip"`
		ContainerPort int64  `json:"container_port"`
		HostPort      int64  `json:"host_port"`
		Range         int64  // of consecutive ports
		Protocol      string
	}
}

// container returns the valid parts of raw. It reports false for a container that
// has no valid id or is not running.
func (raw *rawContainer) container() (container, bool) {
	id, ok := shortID(raw.ID)
	if !ok || (raw.State != "" && raw.State != "running" && raw.State != "paused") {
		return container{}, false
	}
	c := container{id: id, name: id, image: printable(raw.Image, maxText),
		service: printable(cmp.Or(raw.Labels["com.docker.compose.service"], raw.Labels["io.podman.compose.service"],
			raw.Labels["com.docker.swarm.service.name"]), maxText),
		paused: raw.State == "paused", hostNet: raw.HostConfig.NetworkMode == "host",
		rules: rulesOf(raw.Labels)}
	for _, name := range slices.Sorted(maps.Keys(raw.NetworkSettings.Networks)) {
		n := raw.NetworkSettings.Networks[name]
		addr, _ := netip.ParseAddr(n.IPAddress)
		gateway, _ := netip.ParseAddr(n.Gateway)
		if badChar(n.EndpointID, "") != "" || addr.Zone()+gateway.Zone() != "" || len(c.nets) == maxNets {
			continue
		}
		c.nets = append(c.nets, network{printable(n.EndpointID, maxText), addr.Unmap(), gateway.Unmap()})
	}
	for _, n := range raw.Names { // names with more slashes are links of other containers
		if n = strings.TrimPrefix(n, "/"); n != "" && !strings.Contains(n, "/") {
			if n = printable(n, maxText); n != "" {
				c.name = n
				break
			}
		}
	}
	for _, p := range raw.Ports {
		public, private, at := cmp.Or(p.PublicPort, p.HostPort), cmp.Or(p.PrivatePort, p.ContainerPort), cmp.Or(p.IP, p.HostIP)
		q := port{proto: printable(strings.ToLower(cmp.Or(p.Type, p.Protocol)), 8)}
		if ip, err := netip.ParseAddr(at); err == nil && badChar(ip.Zone(), ".-_") == "" && len(ip.Zone()) <= 15 {
			q.ip = ip.Unmap()
		} else if at == "" { // podman's wildcard
			q.ip = netip.IPv4Unspecified()
		}
		for n := max(p.Range, 1); n > 0 && 0 < public && public <= 65535 && 0 <= private && private <= 65535 && len(c.ports) <= maxPublished; n-- {
			q.public, q.private = uint16(public), uint16(private)
			c.ports = append(c.ports, q)
			public, private = public+1, private+1
		}
	}
	return c, true
}

// rulesOf reads the labels that are about rdhpf.
func rulesOf(labels map[string]string) (ru rules) {
	wrong := func(label, why string) {
		ru.wrong = fmt.Sprintf("its label %s=%s: %s", label, printable(labels[label], 50), why)
	}
	flag := func(label string, otherwise bool) bool {
		value, ok := labels[label]
		on, err := strconv.ParseBool(value)
		if ok && err != nil {
			wrong(label, "want true or false")
		}
		return ok && on || !ok && otherwise
	}
	ru.skip, ru.noProbe = flag("rdhpf.skip", false), !flag("rdhpf.probe", true)
	if value, ok := labels["rdhpf.map"]; ok {
		ru.mapped = make(map[uint16]uint16)
		if err := addMaps(ru.mapped)(value); err != nil {
			ru.mapped = nil
			wrong("rdhpf.map", printable(err.Error(), maxText))
		} else if ru.skip {
			wrong("rdhpf.map", "rdhpf.skip=true contradicts it")
		}
	}
	return ru
}

// shortID returns the first 12 characters of a container id and whether they are
// valid.
func shortID(id string) (string, bool) {
	if len(id) < 12 {
		return "", false
	}
	for _, c := range id[:12] {
		if !('0' <= c && c <= '9' || 'a' <= c && c <= 'f') {
			return "", false
		}
	}
	return id[:12], true
}

// printable makes untrusted text safe to print on one line of a terminal: it drops
// control and format characters and keeps at most max runes.
func printable(s string, max int) string {
	if len(s) <= max && strings.IndexFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) < 0 {
		return s
	}
	n := 0
	return strings.Map(func(r rune) rune {
		if n++; n > max {
			return -1
		}
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case r == unicode.ReplacementChar || !unicode.IsPrint(r):
			return -1
		}
		return r
	}, s)
}
