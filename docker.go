package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"net/url"
	"strings"
	"syscall"
	"time"
	"unicode"
)

// docker.go: the Docker Engine's API over a dial-stdio session of the master:
// the list of running containers and the stream of events.

const (
	listTimeout = 10 * time.Second
	maxNoise    = 1 << 20  // bytes a remote shell may print before the marker
	maxList     = 64 << 20 // bytes of one list
	maxEvent    = 1 << 20  // bytes of one event
)

// engine is one connection to the remote engine. Not safe for concurrent use,
// but Close may come from anywhere.
type engine struct {
	s      *muxSession
	r      *bufio.Reader
	mark   string
	server string // "Docker/20.10.24 (linux)", once something was answered
}

// errMaster marks an error that is the ssh master's and not the engine's.
var errMaster = errors.New("the ssh master does not answer")

// dialEngine opens a session of the master and speaks to the engine in it.
// Start-up noise of the remote shell is discarded up to a marker.
func dialEngine(control, socket string, timeout time.Duration) (*engine, error) {
	mark := fmt.Sprintf("rdhpf-%016x", rand.Uint64())
	s, err := muxOpenSession(control, engineCommand(socket, mark), timeout)
	if err != nil {
		var refused *muxError
		if errors.As(err, &refused) {
			return nil, fmt.Errorf("the SSH server opens no further session (%w): rdhpf needs two, see MaxSessions in its sshd_config", err)
		}
		return nil, fmt.Errorf("%w: %w", errMaster, err)
	}
	e := &engine{s: s, r: bufio.NewReader(s), mark: mark}
	s.SetReadDeadline(time.Now().Add(timeout))
	if err := discardTo(e.r, mark+"\n"); err != nil {
		err = e.fail("starting docker on the remote host", err)
		e.Close()
		return nil, err
	}
	return e, nil
}

func (e *engine) Close() error { return e.s.Close() }

// engineCommand is what the remote shell runs, whichever shell it is: print the
// marker, then become the engine's end. podman serves where there is no docker.
func engineCommand(socket, mark string) string {
	docker, podman := "docker", "podman"
	if socket != "" { // checked by parseHost: no character of it means anything to a shell
		docker += " --host=unix://" + socket
		podman += " --url=unix://" + socket
	}
	return fmt.Sprintf("exec sh -c 'echo %[1]s; echo %[1]s >&2; "+
		"if command -v docker >/dev/null 2>&1 || ! command -v podman >/dev/null 2>&1; "+
		"then exec %[2]s system dial-stdio; else exec %[3]s system dial-stdio; fi'", mark, docker, podman)
}

// discardTo reads up to the end of the marker.
func discardTo(r *bufio.Reader, mark string) error {
	matched := 0
	for n := 0; n < maxNoise; n++ {
		c, err := r.ReadByte()
		if err != nil {
			return err
		}
		if c != mark[matched] {
			matched = 0 // the marker begins with a letter that it has once: no overlap to think of
		}
		if c == mark[matched] {
			if matched++; matched == len(mark) {
				return nil
			}
		}
	}
	return fmt.Errorf("the remote shell prints more than %d bytes at start-up", maxNoise)
}

// fail explains an error on the connection in the remote's own words, where it
// said any, and what to try.
func (e *engine) fail(doing string, err error) error {
	if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, syscall.EPIPE) {
		return fmt.Errorf("%s: %w", doing, err)
	}
	code, _ := e.s.wait(time.Second)
	said := e.s.stderr()
	if i := strings.LastIndex(said, e.mark); i >= 0 {
		said = said[i+len(e.mark):]
	}
	if said = printable(strings.TrimSpace(said), 1000); said == "" {
		return fmt.Errorf("%s: it ended with exit status %d and no word", doing, code)
	}
	hint := ""
	switch low := strings.ToLower(said); {
	case strings.Contains(low, "not found"):
		hint = " (is docker or podman on the PATH that ssh gives there?)"
	case strings.Contains(low, "permission denied"):
		hint = " (may that user use docker there?)"
	case strings.Contains(low, "connect"):
		hint = " (does the engine run there? docker context ls there tells which one is meant)"
	}
	return fmt.Errorf("docker on the remote host: %s%s", said, hint)
}

// get sends a request. The caller reads the body to its end before the next.
func (e *engine) get(path string, query url.Values, timeout time.Duration) (*response, error) {
	doing := "asking the remote engine for " + path
	deadline := time.Now().Add(timeout)
	e.s.SetWriteDeadline(deadline)
	e.s.SetReadDeadline(deadline)
	if len(query) > 0 {
		path += "?" + query.Encode()
	}
	if _, err := fmt.Fprintf(e.s, "GET %s HTTP/1.1\r\nHost: docker\r\nUser-Agent: rdhpf\r\n\r\n", path); err != nil {
		return nil, e.fail(doing, err)
	}
	resp, err := readResponse(e.r)
	if err != nil {
		return nil, e.fail(doing, err)
	}
	if resp.server != "" {
		e.server = printable(resp.server, maxText)
	}
	if resp.code != 200 {
		body, _ := io.ReadAll(io.LimitReader(resp.body, 1000))
		return nil, fmt.Errorf("%s: %s: %s", doing, printable(resp.status, maxText), printable(strings.TrimSpace(string(body)), 1000))
	}
	return resp, nil
}

// list returns the running containers.
func (e *engine) list() ([]container, error) {
	resp, err := e.get("/containers/json", nil, listTimeout)
	if err != nil {
		return nil, err
	}
	body := &io.LimitedReader{R: resp.body, N: maxList}
	list, err := decodeList(body)
	if err == nil {
		_, err = io.Copy(io.Discard, body) // leaves the connection at the next answer
	}
	if err != nil && body.N == 0 {
		err = fmt.Errorf("it is over %d bytes long", maxList)
	}
	if err != nil {
		return nil, e.fail("reading the list of containers", err)
	}
	return list, nil
}

// event is one that says that a list would now differ.
type event struct {
	action string // start, die, pause, unpause, rename, …
	id     string // 12 characters
}

// events calls subscribed, then handle for each event, until the connection
// ends; it always returns an error.
func (e *engine) events(subscribed func(), handle func(event)) error {
	resp, err := e.get("/events", url.Values{"filters": {`{"type":["container"]}`}}, listTimeout)
	if err != nil {
		return err
	}
	e.s.SetReadDeadline(time.Time{})
	subscribed()
	lines := bufio.NewScanner(resp.body)
	lines.Buffer(nil, maxEvent)
	for lines.Scan() {
		if ev, ok := decodeEvent(lines.Bytes()); ok {
			handle(ev)
		}
	}
	err = lines.Err()
	if err == nil {
		err = io.EOF
	}
	return e.fail("following the remote engine's events", err)
}

// decode.go: what the engine sends, decoded. It is not trusted: it is bounded,
// checked and made safe to print.

const (
	maxContainer = 20000   // containers in one list
	maxPublished = 100_000 // ports that they publish
	maxOne       = 1 << 20 // bytes of one of them, which take some ten times that in memory
	maxText      = 200     // runes of a name that are kept
)

// decodeEvent returns the event and whether it is one that matters: health
// checks alone make three a second that do not.
func decodeEvent(line []byte) (event, bool) {
	var raw struct {
		Type, Action string
		Status, ID   string // as engines before 1.22 and podman have them
		Actor        struct{ ID string }
	}
	if json.Unmarshal(line, &raw) != nil || (raw.Type != "" && raw.Type != "container") {
		return event{}, false
	}
	if raw.Action == "" {
		raw.Action = raw.Status
	}
	if raw.Actor.ID == "" {
		raw.Actor.ID = raw.ID
	}
	switch raw.Action {
	case "start", "die", "pause", "unpause", "rename", "destroy", "restart", "stop", "update":
	case "died": // podman
		raw.Action = "die"
	default:
		return event{}, false
	}
	id, ok := shortID(raw.Actor.ID)
	return event{raw.Action, id}, ok
}

// decodeList decodes the answer to /containers/json, a container at a time, so
// that a long list costs no more than what is kept of it.
func decodeList(r io.Reader) (list []container, err error) {
	part := &io.LimitedReader{R: r, N: maxOne}
	defer func() {
		if err != nil && part.N == 0 {
			err = fmt.Errorf("a container in it is over %d bytes long", maxOne)
		}
	}()
	dec := json.NewDecoder(part)
	if t, err := dec.Token(); err != nil {
		return nil, unexpectedEOF(err)
	} else if t != json.Delim('[') {
		return nil, errors.New("it is no JSON array")
	}
	list = []container{}
	for published := 0; dec.More(); part.N = maxOne {
		var raw rawContainer
		if err := dec.Decode(&raw); err != nil {
			return nil, unexpectedEOF(err)
		}
		if len(list) == maxContainer {
			return nil, fmt.Errorf("it has more than %d containers", maxContainer)
		}
		if c, ok := raw.container(); ok {
			list = append(list, c)
			if published += len(c.ports); published > maxPublished {
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
	ID         string `json:"Id"`
	Names      []string
	Image      string
	State      string
	Labels     map[string]string
	HostConfig struct{ NetworkMode string }
	Ports      []struct {
		IP          string
		PrivatePort int64
		PublicPort  int64
		Type        string
	}
}

// container keeps what is valid. A container without a valid id, or one that
// does not run, is none.
func (raw *rawContainer) container() (container, bool) {
	id, ok := shortID(raw.ID)
	if !ok || (raw.State != "" && raw.State != "running" && raw.State != "paused") {
		return container{}, false
	}
	c := container{id: id, name: id, image: printable(raw.Image, maxText),
		service: printable(raw.Labels["com.docker.compose.service"], maxText),
		paused:  raw.State == "paused", hostNet: raw.HostConfig.NetworkMode == "host"}
	for _, n := range raw.Names { // links of other containers have more slashes
		if n = strings.TrimPrefix(n, "/"); n != "" && !strings.Contains(n, "/") {
			if n = printable(n, maxText); n != "" {
				c.name = n
				break
			}
		}
	}
	for _, p := range raw.Ports {
		if p.PublicPort <= 0 || p.PublicPort > 65535 || p.PrivatePort < 0 || p.PrivatePort > 65535 {
			continue
		}
		q := port{private: uint16(p.PrivatePort), public: uint16(p.PublicPort), proto: printable(strings.ToLower(p.Type), 8)}
		if ip, err := netip.ParseAddr(p.IP); err == nil && badChar(ip.Zone(), ".-_") == "" && len(ip.Zone()) <= 15 {
			q.ip = ip.Unmap()
		} else if p.IP == "" { // podman's wildcard
			q.ip = netip.IPv4Unspecified()
		}
		c.ports = append(c.ports, q)
	}
	return c, true
}

// shortID is the first 12 characters of a container's id.
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

// printable makes text from elsewhere safe for a terminal and for one line: no
// control or format characters, at most max runes.
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
