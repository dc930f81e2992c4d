package main

// docker.go: the Docker Engine's API over a dial-stdio session of the master:
// the list of running containers and the stream of events.

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/url"
	"strings"
	"syscall"
	"time"
)

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
