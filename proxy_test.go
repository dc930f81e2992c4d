package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// Tests of proxy.go: tools on one side, an engine made by hand on the other, and between them a master of which only the
// forward to the engine exists; and the ways to the engine against a real sshd.

// engineSide is a proxy that is served, with an engine behind it.
type engineSide struct {
	*proxy
	t      *testing.T
	path   string // of the socket for tools
	master *master
	client *http.Client
	end    func() // ends the proxy and waits for that
}

// serveEngine has serve do what the engine does. The end of the test checks that nothing of the proxy is left.
func serveEngine(t *testing.T, serve http.HandlerFunc) *engineSide {
	t.Helper()
	t.Cleanup(noLeaks(t))
	dir := muxTempDir(t)
	engine, err := net.Listen("unix", filepath.Join(dir, "engine"))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: serve}
	served := make(chan struct{})
	go func() {
		defer close(served)
		srv.Serve(engine)
	}()
	t.Cleanup(func() {
		srv.Close()
		<-served
	})
	s := &engineSide{t: t, path: filepath.Join(dir, "tools"), master: forwardTo(engine.Addr().String())}
	snap := &snapshot{Connection: connection{State: connected}}
	s.proxy = &proxy{gate: newGate(), board: newBoard(snap), settle: func(context.Context) {}}
	s.gate.set(s.master)
	l, err := listenSocket(s.path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.serve(ctx, l)
	}()
	s.end = func() {
		cancel()
		await(t, "the proxy ends", done)
	}
	t.Cleanup(s.end)
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", s.path)
	}, DisableCompression: true}
	t.Cleanup(transport.CloseIdleConnections)
	s.client = &http.Client{Transport: transport, Timeout: patience}
	return s
}

// forwardTo is a master that has a forward to the engine.
func forwardTo(engine string) *master {
	m := &master{engineAt: engine, done: make(chan struct{}), routed: make(chan struct{}), freed: make(chan struct{}, 1)}
	close(m.routed)
	return m
}

// do sends a request and returns the status and the body of its answer.
func (s *engineSide) do(method, target string, body io.Reader) (status int, answer string, err error) {
	req, err := http.NewRequest(method, "http://docker"+target, body)
	if err != nil {
		return 0, "", err
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// dial connects as a tool that speaks for itself.
func (s *engineSide) dial() (*net.UnixConn, *bufio.Reader) {
	s.t.Helper()
	c, err := net.Dial("unix", s.path)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c.(*net.UnixConn), bufio.NewReader(c)
}

func TestChanges(t *testing.T) {
	for _, c := range []struct {
		request string
		want    bool
	}{
		{"POST /containers/web/start", true},
		{"POST /containers/web/restart", true},
		{"POST /containers/web/stop", true},
		{"POST /containers/web/kill", true},
		{"POST /containers/web/pause", true},
		{"POST /containers/web/unpause", true},
		{"POST /containers/web/remove", true},
		{"POST /containers/web/rename", true},
		{"POST /containers/web/update", true},
		{"POST /v1.41/containers/0123456789ab/start", true},
		{"POST /v1/containers/create/start", true}, // a container of that name
		{"DELETE /containers/web", true},
		{"DELETE /v1.24/containers/web", true},
		{"POST /networks/front/connect", true},
		{"POST /v1.41/networks/front/disconnect", true},
		{"POST /libpod/containers/web/start", true},
		{"POST /v4.0.0/libpod/containers/web/stop", true},
		{"POST /v4.0.0/libpod/pods/shop/start", true},
		{"POST /v4.0.0/libpod/pods/shop/kill", true},
		{"DELETE /v4.0.0/libpod/containers/web", true},
		{"DELETE /v4.0.0/libpod/pods/shop", true},
		{"POST /v4.0.0/libpod/networks/front/connect", true},

		{"GET /containers/web/start", false},
		{"PUT /containers/web/start", false},
		{"post /containers/web/start", false},
		{"POST /containers/create", false},
		{"POST /v1.41/containers/create", false},
		{"POST /containers/prune", false},
		{"GET /containers/json", false},
		{"GET /containers/web/json", false},
		{"POST /containers/web/wait", false},
		{"POST /containers/web/attach", false},
		{"POST /containers/web/resize", false},
		{"POST /containers/web/exec", false},
		{"POST /exec/x/start", false},
		{"POST /images/x/start", false},
		{"DELETE /images/x", false},
		{"POST /containers//start", false},
		{"POST /containers/web/start/", false},
		{"POST /containers/web/started", false},
		{"POST /containers/a/b/start", false},
		{"POST /containers/start", false},
		{"POST containers/web/start", false},
		{"POST /x/containers/web/start", false},
		{"POST /v1.41/v1.41/containers/web/start", false},
		{"POST /vx/containers/web/start", false},
		{"DELETE /containers", false},
		{"DELETE /containers/", false},
		{"DELETE /containers/web/archive", false},
		{"DELETE /networks/front", false},
		{"DELETE /volumes/data", false},
		{"POST /networks/create", false},
		{"POST /networks/prune", false},
		{"POST /libpod/v4.0.0/containers/web/start", false},
		{"XPOST /containers/web/start", false},
	} {
		if got := changes.MatchString(c.request); got != c.want {
			t.Errorf("%s: held %v, want %v", c.request, got, c.want)
		}
	}
}

// engineSockets are what the remote host may say when asked for the engine's socket.
var engineSockets = []struct{ out, want string }{
	{"\nunix:///var/run/docker.sock\n", "/var/run/docker.sock"},
	{"\nunix:///run/user/1000/docker.sock", "/run/user/1000/docker.sock"},
	{"\nunix:///home/me/.colima/a-b_c@d:e=f~g+h/docker.sock\n", "/home/me/.colima/a-b_c@d:e=f~g+h/docker.sock"},
	{"\nunix://unix:///run/podman/podman.sock\n", "/run/podman/podman.sock"},
	{"\nunix:///run/podman/podman.sock\n", "/run/podman/podman.sock"},
	{"\r\nunix:///run/d.sock\r\n", "/run/d.sock"},
	{"Welcome to the box!\nhttp://wiki/\n\nunix:///run/d.sock\n\n", "/run/d.sock"},
	{"unix:///run/other.sock\nunix:///run/d.sock\n", "/run/d.sock"},
	{"unix:///run//x/../d.sock\n", "/run/d.sock"},
	{"unix:///../d.sock\n", "/d.sock"},
	// Neither docker nor podman answered: the usual one.
	{"", defaultEngine},
	{"\n", defaultEngine},
	{"\n\n\n", defaultEngine},
	{"Welcome to the box!\n", defaultEngine},
	// Something else than a socket, or none that can be used.
	{"\ntcp://127.0.0.1:2375\n", ""},
	{"\nssh://elsewhere\n", ""},
	{"\nnpipe:////./pipe/docker_engine\n", ""},
	{"unix:///run/d.sock\ntcp://127.0.0.1:2375\n", ""},
	{"\nunix://\n", ""},
	{"\nunix://relative/d.sock\n", ""},
	{"\nunix:///run/d sock\n", ""},
	{"\nunix:///run/d.sock;reboot\n", ""},
	{"\nunix:///run/$(reboot)\n", ""},
	{"\nunix:///run/d'.sock\n", ""},
	{"\nunix:///run/\x1b[31m\n", ""},
	{"\nunix:///run/\x00\n", ""},
	{"\nunix:///run/\xff\n", ""},
	{"\nunix:///run/dé\n", ""},
	{"\nunix:///" + strings.Repeat("x", maxSocketPath-1) + "\n", "/" + strings.Repeat("x", maxSocketPath-1)},
	{"\nunix:///" + strings.Repeat("x", maxSocketPath) + "\n", ""},
}

func TestEngineSocketIn(t *testing.T) {
	for _, c := range engineSockets {
		if got := engineSocketIn(c.out); got != c.want {
			t.Errorf("%q: %q, want %q", c.out, got, c.want)
		}
	}
}

func FuzzEngineSocketIn(f *testing.F) {
	for _, c := range engineSockets {
		f.Add(c.out)
	}
	f.Fuzz(func(t *testing.T, out string) {
		got := engineSocketIn(out)
		if got == "" || got == defaultEngine {
			return
		}
		if !path.IsAbs(got) || path.Clean(got) != got || len(got) > maxSocketPath || badChar(got, "._/+@:=~-") != "" {
			t.Errorf("%q: %q", out, got)
		}
	})
}

// An answer to what changed something is held until the ports have followed; every other one is passed on at once.
func TestHold(t *testing.T) {
	const start, list = "POST /containers/web/start", "GET /containers/json"
	var status atomic.Int64
	s := serveEngine(t, func(w http.ResponseWriter, req *http.Request) {
		w.WriteHeader(int(status.Load()))
	})
	settling, settled := make(chan struct{}, 1), make(chan struct{})
	s.settle = func(ctx context.Context) {
		if end, ok := ctx.Deadline(); !ok || time.Until(end) > settleTimeout {
			t.Errorf("it may take until %v, %v", end, ok)
		}
		settling <- struct{}{}
		select {
		case <-settled:
		case <-ctx.Done():
		}
	}
	for _, c := range []struct {
		request string
		status  int
		held    bool
	}{
		{start, 204, true},
		{start, 304, true}, // it was running, but its ports may not be open yet
		{start + "?detachKeys=ctrl-c", 204, true},
		{"DELETE /v1.41/containers/web?force=1", 204, true},
		{start, 400, false},
		{start, 404, false},
		{start, 500, false},
		{list, 200, false},
		{"POST /containers/create", 201, false},
	} {
		status.Store(int64(c.status))
		method, target, _ := strings.Cut(c.request, " ")
		answered := make(chan error, 1)
		go func() {
			got, _, err := s.do(method, target, nil)
			if err == nil && got != c.status {
				err = fmt.Errorf("status %d", got)
			}
			answered <- err
		}()
		if c.held {
			await(t, c.request+" is held", settling)
			select {
			case err := <-answered:
				t.Errorf("%s, %d: answered too soon: %v", c.request, c.status, err)
			case <-time.After(muxSoon / 4):
			}
			settled <- struct{}{}
		}
		if err := <-answered; err != nil {
			t.Errorf("%s, %d: %v", c.request, c.status, err)
		}
		if len(settling) > 0 {
			t.Fatalf("%s, %d: it was held", c.request, c.status)
		}
	}
	// Ports that do not follow in time hold it no longer.
	status.Store(204)
	if got, _, err := s.do("POST", "/containers/web/start", nil); err != nil || got != 204 {
		t.Errorf("with ports that do not follow: %d, %v", got, err)
	}
	<-settling
}

// What could not be passed on is answered with a message that docker prints.
func TestFail(t *testing.T) {
	for _, c := range []struct {
		name    string
		shown   connection
		err     error
		status  int
		message string
	}{
		{"reconnecting", connection{State: reconnecting, LastError: "ssh: Timeout"}, context.DeadlineExceeded, 503, "ssh connection lost, reconnecting: ssh: Timeout"},
		{"reconnecting, for no known reason", connection{State: reconnecting}, errors.New("too many"), 503, "ssh connection lost, reconnecting: too many"},
		{"connecting", connection{State: connecting, LastError: "ssh: no route"}, context.DeadlineExceeded, 503, "not connected yet: ssh: no route"},
		{"connecting, for no known reason", connection{State: connecting}, errors.New("too many"), 503, "not connected yet: too many"},
		{"hung up", connection{State: connected}, io.EOF, 502, "the remote engine closed the connection before it answered"},
		{"hung up within", connection{State: connected}, fmt.Errorf("reading: %w", io.ErrUnexpectedEOF), 502, "the remote engine closed the connection before it answered"},
		{"unreachable", connection{State: connected, LastError: "old"}, syscall.EHOSTUNREACH, 502, "the remote engine cannot be reached: no route to host"},
		{"to be escaped", connection{State: connected}, errors.New(`"<` + "\n"), 502, "the remote engine cannot be reached: \"<\n"},
	} {
		p := &proxy{board: newBoard(&snapshot{Connection: c.shown})}
		w := httptest.NewRecorder()
		p.fail(w, httptest.NewRequest("GET", "/info", nil), c.err)
		var said map[string]string
		if err := json.Unmarshal(w.Body.Bytes(), &said); err != nil || w.Code != c.status || w.Header().Get("Content-Type") != "application/json" ||
			!maps.Equal(said, map[string]string{"message": "rdhpf: " + c.message}) {
			t.Errorf("%s: %d, %v, %s (%v)", c.name, w.Code, w.Header(), w.Body, err)
		}
	}
	// Who has left gets no answer: one without a word would be a 200.
	left, leave := context.WithCancel(context.Background())
	leave()
	defer func() {
		if got := recover(); got != http.ErrAbortHandler {
			t.Errorf("it ended with %v", got)
		}
	}()
	(&proxy{}).fail(httptest.NewRecorder(), httptest.NewRequest("GET", "/info", nil).WithContext(left), left.Err())
}

// Requests fail, with the status of the connection, over the socket as well.
func TestProxyFails(t *testing.T) {
	var asked atomic.Int64
	s := serveEngine(t, func(w http.ResponseWriter, req *http.Request) {
		asked.Add(1)
		panic(http.ErrAbortHandler)
	})
	for _, c := range []struct {
		method string
		shown  connection
		status int
		answer string
	}{
		{"GET", connection{State: connected}, 502, `{"message":"rdhpf: the remote engine closed the connection before it answered"}` + "\n"},
		{"POST", connection{State: connected}, 502, `{"message":"rdhpf: the remote engine closed the connection before it answered"}` + "\n"},
		{"GET", connection{State: reconnecting, LastError: "ssh: gone"}, 503, `{"message":"rdhpf: ssh connection lost, reconnecting: ssh: gone"}` + "\n"},
	} {
		s.board.post(&snapshot{Connection: c.shown})
		if status, answer, err := s.do(c.method, "/info", nil); status != c.status || answer != c.answer || err != nil {
			t.Errorf("%s, %s: %d, %q, %v", c.method, c.shown.State, status, answer, err)
		}
	}
	if asked.Load() == 0 {
		t.Error("the engine was not asked")
	}
}

// While there is no link, a request waits for the next; so it does where the master of the last one has gone.
func TestProxyWaitsForLink(t *testing.T) {
	s := serveEngine(t, func(w http.ResponseWriter, req *http.Request) {
		w.Header().Set("Connection", "close") // each request needs a new one
		io.WriteString(w, "here")
	})
	ended := forwardTo("")
	ended.routed = make(chan struct{})
	close(ended.done)
	for name, m := range map[string]*master{"no link": nil, "a master that has ended": ended, "no socket": forwardTo("/nowhere/engine")} {
		s.gate.set(m)
		answered := make(chan string, 1)
		go func() {
			status, answer, err := s.do("GET", "/info", nil)
			answered <- fmt.Sprint(status, answer, err)
		}()
		eventually(t, name+": the request waits", so(func() bool {
			s.gate.mu.Lock()
			defer s.gate.mu.Unlock()
			return s.gate.waiting == 1
		}))
		unrouted := forwardTo(s.master.engineAt)
		unrouted.routed = make(chan struct{})
		s.gate.set(unrouted)
		select {
		case got := <-answered:
			t.Fatalf("%s: answered %s before the way was known", name, got)
		case <-time.After(muxSoon / 4):
		}
		close(unrouted.routed)
		if got := <-answered; got != "200here<nil>" {
			t.Errorf("%s: %s", name, got)
		}
	}
}

// What the engine gets is what the tool sent.
func TestProxyPassesOn(t *testing.T) {
	got := make(chan *http.Request, 1)
	s := serveEngine(t, func(w http.ResponseWriter, req *http.Request) {
		got <- req
		w.Header().Set("Api-Version", "1.41")
		w.Header().Set("Docker-Experimental", "false")
		w.WriteHeader(http.StatusTeapot)
		io.WriteString(w, "answer")
	})
	for _, c := range []struct{ target, host string }{
		{"/_ping", "docker"},
		{"/v1.41/containers/json?all=1&filters=%7B%22status%22%3A%5B%22running%22%5D%7D", "api.moby.localhost"},
		{"/x?a=%zz&b;c&=&&d", "docker"},
		{"/x?", "docker"},
		{"/images/reg.example.com%2Fteam%2Fimage:1/json?q=a+b", "docker"},
		{"/a//b/../c", "docker"},
	} {
		conn, r := s.dial()
		fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nX-Registry-Auth: secret\r\n\r\n", c.target, c.host)
		req := <-got
		if req.RequestURI != c.target || req.Host != c.host {
			t.Errorf("%s of %s came as %s of %s", c.target, c.host, req.RequestURI, req.Host)
		}
		if want := (http.Header{"X-Registry-Auth": {"secret"}}); !maps.EqualFunc(req.Header, want, slices.Equal[[]string]) {
			t.Errorf("%s came with %v, want %v", c.target, req.Header, want)
		}
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		if resp.StatusCode != http.StatusTeapot || string(body) != "answer" || err != nil || resp.Header.Get("Api-Version") != "1.41" || resp.Header.Get("Docker-Experimental") != "false" {
			t.Errorf("%s: %v %v %q, %v", c.target, resp.Status, resp.Header, body, err)
		}
		conn.Close()
	}
}

// Each piece of an answer arrives while the engine waits with the next, and each piece of a request while the tool does.
func TestProxyStreams(t *testing.T) {
	heard := make(chan string)
	s := serveEngine(t, func(w http.ResponseWriter, req *http.Request) {
		if req.Method == "GET" {
			w.WriteHeader(http.StatusOK)
			http.NewResponseController(w).Flush()
			for piece := range heard {
				io.WriteString(w, piece)
				http.NewResponseController(w).Flush()
			}
			return
		}
		b := make([]byte, 1)
		for {
			if _, err := req.Body.Read(b); err != nil {
				heard <- err.Error()
				return
			}
			heard <- string(b)
		}
	})
	resp, err := s.client.Get("http://docker/events")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	for _, piece := range []string{"a", "b", "c"} {
		heard <- piece
		if b := make([]byte, 1); !isRead(resp.Body, b, piece) {
			t.Fatalf("got %q, want %q", b, piece)
		}
	}
	close(heard)
	if rest, err := io.ReadAll(resp.Body); len(rest) > 0 || err != nil {
		t.Errorf("after the last: %q, %v", rest, err)
	}

	heard = make(chan string)
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		_, _, err := s.do("POST", "/build", r)
		done <- err
	}()
	for _, piece := range []string{"a", "b", "c"} {
		io.WriteString(w, piece)
		if got := <-heard; got != piece {
			t.Fatalf("the engine got %q, want %q", got, piece)
		}
	}
	w.Close()
	if got := <-heard; got != "EOF" {
		t.Errorf("at the end the engine got %q", got)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func isRead(r io.Reader, b []byte, want string) bool {
	_, err := io.ReadFull(r, b)
	return err == nil && string(b) == want
}

// Nothing large is held in memory: who does not read holds up who writes.
func TestProxyHoldsUp(t *testing.T) {
	const all, some = 128 << 20, 32 << 20
	piece := make([]byte, 64<<10)
	var sent atomic.Int64
	read := make(chan struct{})
	s := serveEngine(t, func(w http.ResponseWriter, req *http.Request) {
		if req.Method == "POST" {
			<-read
			n, err := io.Copy(io.Discard, req.Body)
			fmt.Fprint(w, n, err)
			return
		}
		for range all / len(piece) {
			n, _ := w.Write(piece)
			sent.Add(int64(n))
		}
	})
	// heldUp waits until no more is sent.
	heldUp := func(what string) {
		t.Helper()
		var last int64 = -1
		eventually(t, what+" is held up", func() error {
			time.Sleep(muxSoon / 2)
			before := last
			if last = sent.Load(); last != before || last == 0 {
				return fmt.Errorf("%d bytes, %d before", last, before)
			}
			return nil
		})
		if last > some {
			t.Errorf("%s: %d MiB are on their way", what, last>>20)
		}
	}
	resp, err := s.client.Get("http://docker/images/get")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	heldUp("what the engine sends")
	if n, err := io.Copy(io.Discard, resp.Body); n != all || err != nil {
		t.Errorf("got %d bytes, %v", n, err)
	}

	sent.Store(0)
	r, w := io.Pipe()
	go func() {
		defer w.Close()
		for range all / len(piece) {
			n, _ := w.Write(piece)
			sent.Add(int64(n))
		}
	}()
	answered := make(chan string, 1)
	go func() {
		_, answer, err := s.do("POST", "/images/load", r)
		answered <- fmt.Sprint(answer, err)
	}()
	heldUp("what the tool sends")
	close(read)
	if got, want := <-answered, fmt.Sprint(fmt.Sprint(all, nil), nil); got != want {
		t.Errorf("the engine got %s, want %s", got, want)
	}
}

// upgrade asks for a connection of its own, and returns it once it is there.
func (s *engineSide) upgrade() (*net.UnixConn, *bufio.Reader) {
	s.t.Helper()
	conn, r := s.dial()
	io.WriteString(conn, "POST /containers/web/attach?stream=1 HTTP/1.1\r\nHost: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols || resp.Header.Get("Upgrade") != "tcp" ||
		resp.Header.Get("Content-Type") != "application/vnd.docker.raw-stream" {
		s.t.Fatalf("%+v, %v", resp, err)
	}
	return conn, r
}

// attach is the engine's side: it takes the connection over, and has serve do the rest.
func attach(t *testing.T, serve func(*net.UnixConn)) http.HandlerFunc {
	return func(w http.ResponseWriter, req *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(patience))
		io.WriteString(conn, "HTTP/1.1 101 UPGRADED\r\nContent-Type: application/vnd.docker.raw-stream\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
		serve(conn.(*net.UnixConn))
	}
}

// Each side of an upgraded connection can be closed on its own, as by run -i with its stdin at the end.
func TestProxyUpgrade(t *testing.T) {
	heard := make(chan string, 2)
	s := serveEngine(t, attach(t, func(conn *net.UnixConn) {
		first := make([]byte, 5)
		io.ReadFull(conn, first)
		heard <- string(first)
		if string(first) == "you 1" { // the engine is the first to close its side
			io.WriteString(conn, "bye")
			conn.CloseWrite()
			rest, err := io.ReadAll(conn)
			heard <- fmt.Sprint(string(rest), err)
			return
		}
		rest, err := io.ReadAll(conn)
		heard <- fmt.Sprint(string(rest), err)
		io.WriteString(conn, "last words")
	}))
	hears := func(want string) {
		t.Helper()
		if got := <-heard; got != want {
			t.Errorf("the engine heard %q, want %q", got, want)
		}
	}

	conn, r := s.upgrade()
	io.WriteString(conn, "tool ")
	hears("tool ")
	io.WriteString(conn, "ends")
	conn.CloseWrite()
	hears("ends<nil>")
	if rest, err := io.ReadAll(r); string(rest) != "last words" || err != nil {
		t.Errorf("the tool heard %q, %v", rest, err)
	}

	conn, r = s.upgrade()
	io.WriteString(conn, "you 1")
	hears("you 1")
	if rest, err := io.ReadAll(r); string(rest) != "bye" || err != nil {
		t.Errorf("the tool heard %q, %v", rest, err)
	}
	io.WriteString(conn, "still here")
	conn.CloseWrite()
	hears("still here<nil>")
}

// A tool that has left, and has not only closed its sending side, ends its connection at the engine, whatever the engine
// still has to say.
func TestProxyUpgradeLeft(t *testing.T) {
	ended := make(chan error, 1)
	s := serveEngine(t, attach(t, func(conn *net.UnixConn) {
		io.ReadAll(conn)
		for { // as a container does that knows nothing of it
			if _, err := conn.Write([]byte("tick\n")); err != nil {
				ended <- err
				return
			}
			time.Sleep(time.Millisecond)
		}
	}))
	conn, _ := s.upgrade()
	conn.Close()
	if err := <-ended; errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the engine's connection ended with %v", err)
	}
}

// A request ends at the engine when its tool leaves.
func TestProxyToolLeaves(t *testing.T) {
	began, ended := make(chan struct{}), make(chan struct{})
	s := serveEngine(t, func(w http.ResponseWriter, req *http.Request) {
		if req.URL.Path == "/logs" {
			w.WriteHeader(http.StatusOK)
			http.NewResponseController(w).Flush()
		} else if req.Method == "POST" {
			io.ReadFull(req.Body, make([]byte, 1))
		}
		began <- struct{}{}
		if req.Method == "POST" {
			io.Copy(io.Discard, req.Body)
		} else {
			<-req.Context().Done()
		}
		ended <- struct{}{}
	})
	for _, request := range []string{"GET /wait HTTP/1.1\r\nHost: docker\r\n\r\n", "GET /logs HTTP/1.1\r\nHost: docker\r\n\r\n",
		"POST /build HTTP/1.1\r\nHost: docker\r\nContent-Length: 1000\r\n\r\nhalf of it"} {
		conn, _ := s.dial()
		io.WriteString(conn, request)
		await(t, "the request comes", began)
		conn.Close()
		await(t, request+" ends", ended)
	}
}

// A tool that only stops sending while it waits for an answer is not told of a success.
func TestProxyNoFalseAnswer(t *testing.T) {
	began := make(chan struct{}, 1)
	s := serveEngine(t, func(w http.ResponseWriter, req *http.Request) {
		began <- struct{}{}
		<-req.Context().Done()
	})
	conn, r := s.dial()
	io.WriteString(conn, "POST /containers/web/wait HTTP/1.1\r\nHost: docker\r\n\r\n")
	await(t, "the request comes", began)
	conn.CloseWrite()
	if b, err := io.ReadAll(r); len(b) > 0 {
		t.Errorf("it was told %q, %v", b, err)
	}
	// Neither is one whose instance ends.
	conn, r = s.dial()
	io.WriteString(conn, "POST /containers/web/wait HTTP/1.1\r\nHost: docker\r\n\r\n")
	await(t, "the request comes", began)
	s.end()
	if b, err := io.ReadAll(r); len(b) > 0 {
		t.Errorf("at the end of the instance it was told %q, %v", b, err)
	}
}

// The end of the instance ends everything that is under way, and nothing is left of it.
func TestProxyEnds(t *testing.T) {
	began := make(chan struct{}, 9)
	s := serveEngine(t, func(w http.ResponseWriter, req *http.Request) {
		switch {
		case req.URL.Path == "/containers/web/attach":
			attach(t, func(conn *net.UnixConn) {
				began <- struct{}{}
				io.Copy(io.Discard, conn)
			})(w, req)
		case req.URL.Path == "/_ping" || req.URL.Path == "/containers/web/start":
		default:
			w.WriteHeader(http.StatusOK)
			http.NewResponseController(w).Flush()
			began <- struct{}{}
			<-req.Context().Done()
		}
	})
	settling := make(chan struct{})
	s.settle = func(ctx context.Context) {
		close(settling)
		<-ctx.Done()
	}
	if status, _, err := s.do("GET", "/_ping", nil); status != http.StatusOK { // its connections are kept for another
		t.Fatal(status, err)
	}
	var conns []io.Reader
	conn, r := s.upgrade()
	conns = append(conns, r)
	conn.CloseWrite() // it only waits for output
	send := func(request string) {
		conn, r := s.dial()
		io.WriteString(conn, request+"\r\nHost: docker\r\n\r\n")
		conns = append(conns, r)
	}
	send("GET /events HTTP/1.1")
	await(t, "the attach comes", began)
	await(t, "the request comes", began)
	send("POST /containers/web/start HTTP/1.1")
	await(t, "an answer is held", settling)
	s.gate.set(nil)
	for range 3 {
		send("GET /info HTTP/1.1")
	}
	eventually(t, "requests wait for the link", so(func() bool {
		s.gate.mu.Lock()
		defer s.gate.mu.Unlock()
		return s.gate.waiting > 0
	}))
	s.dial() // and one says nothing
	s.end()
	for _, r := range conns {
		io.Copy(io.Discard, r) // would fail only at the deadline
	}
}

// Many requests at once are all answered, and the connections kept for later ones are few.
func TestProxyAtOnce(t *testing.T) {
	var open atomic.Int64
	s := serveEngine(t, func(w http.ResponseWriter, req *http.Request) {
		open.Add(1)
		defer open.Add(-1)
		io.Copy(w, req.Body)
	})
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			text := strings.Repeat(fmt.Sprint(i), 1000)
			if status, answer, err := s.do("POST", "/echo", strings.NewReader(text)); status != 200 || answer != text || err != nil {
				t.Errorf("request %d: %d, %d bytes, %v", i, status, len(answer), err)
			}
		}()
	}
	wg.Wait()
}

// What is malformed is refused without the engine, and what the engine says that is not HTTP is told as such.
func TestProxyHostile(t *testing.T) {
	s := serveEngine(t, func(w http.ResponseWriter, req *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		io.WriteString(conn, "SSH-2.0-OpenSSH_9.2\r\n\r\n")
	})
	status, answer, err := s.do("GET", "/info", nil)
	if status != http.StatusBadGateway || !strings.HasPrefix(answer, `{"message":"rdhpf: the remote engine cannot be reached: `) || err != nil {
		t.Errorf("no HTTP from the engine: %d, %q, %v", status, answer, err)
	}
	for _, request := range []string{"nonsense\r\n\r\n", "GET / HTTP/1.1\r\n\r\n", "GET / HTTP/1.1\r\nHost: docker\r\nX: \x00\r\n\r\n"} {
		conn, r := s.dial()
		io.WriteString(conn, request)
		resp, err := http.ReadResponse(r, nil)
		if err != nil || resp.StatusCode != http.StatusBadRequest {
			t.Errorf("%q: %+v, %v", request, resp, err)
		}
	}
}

// sessionServer stands in for a master and the server behind it: it opens as many sessions as there is room for, each with
// an engine that says back what it hears, and refuses others. A session counts until release, as a server's does until its
// command has ended.
type sessionServer struct {
	*master
	asked chan struct{} // something asks for a session; received by the test, which lets it be served

	mu      sync.Mutex
	room    int
	refused int
	broken  bool // the command ends without having reached the engine
	release chan struct{}
}

func serveSessions(t *testing.T, room int) *sessionServer {
	t.Helper()
	l, control := listenFake(t)
	s := &sessionServer{room: room, asked: make(chan struct{}), release: make(chan struct{}, 99)}
	s.master = forwardTo("")
	s.master.control, s.master.opening = control, make(chan struct{}, 1)
	over := make(chan struct{})
	t.Cleanup(func() { close(over) })
	serveEach(t, l, func(conn net.Conn) {
		c := conn.(*net.UnixConn)
		c.SetDeadline(time.Now().Add(patience))
		c.Write(newMuxFrame(muxHello).u32(muxVersion).bytes())
		var body []byte
		for range 2 { // the greeting and the request
			var head [4]byte
			if _, err := io.ReadFull(c, head[:]); err != nil {
				return
			}
			body = make([]byte, binary.BigEndian.Uint32(head[:]))
			if _, err := io.ReadFull(c, body); err != nil {
				return
			}
		}
		var ends [3]*os.File
		for i := range ends {
			if ends[i] = receiveEnd(t, c); ends[i] == nil {
				return
			}
			defer ends[i].Close()
		}
		select {
		case s.asked <- struct{}{}:
		case <-over:
			return
		}
		s.mu.Lock()
		open, broken := s.room > 0, s.broken
		if open {
			s.room--
		} else {
			s.refused++
		}
		s.mu.Unlock()
		if !open {
			c.Write(newMuxFrame(muxFailure).u32(1).str("Session open refused by peer").bytes())
			return
		}
		c.Write(newMuxFrame(muxSessionOpened).u32(1).u32(7).bytes())
		if !broken {
			mark := regexp.MustCompile("rdhpf-[0-9a-f]{16}").Find(body)
			ends[1].Write(append(mark, '\n'))
			io.Copy(ends[1], ends[0])
		}
		select {
		case <-s.release:
		case <-over:
		}
		s.mu.Lock()
		s.room++
		s.mu.Unlock()
		c.Write(newMuxFrame(muxExit).u32(7).u32(0).bytes())
	})
	return s
}

// dial asks for a connection to the engine; ask waits until the server is asked for it.
func (s *sessionServer) dial(ctx context.Context) chan dialled {
	got := make(chan dialled, 1)
	go func() {
		conn, err := s.sessionToEngine(ctx)
		got <- dialled{conn, err}
	}()
	return got
}

type dialled struct {
	net.Conn
	error
}

// works fails unless a connection came of it that reaches the engine.
func (d dialled) works(t *testing.T) net.Conn {
	t.Helper()
	if d.error != nil {
		t.Fatal(d.error)
	}
	d.SetDeadline(time.Now().Add(patience))
	io.WriteString(d.Conn, "hello")
	if b := make([]byte, 5); !isRead(d.Conn, b, "hello") {
		t.Fatalf("the engine said %q", b)
	}
	return d.Conn
}

// Where the server allows no more sessions, a connection waits for one to end at the server; nobody waits for nothing.
func TestSessions(t *testing.T) {
	patient, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	waits := func(t *testing.T, got chan dialled) {
		t.Helper()
		select {
		case d := <-got:
			t.Fatalf("it does not wait: %v", d.error)
		case <-time.After(muxSoon / 4):
		}
	}
	start := func(t *testing.T, room int) *sessionServer {
		t.Cleanup(noLeaks(t))
		return serveSessions(t, room)
	}
	t.Run("none is open", func(t *testing.T) {
		s := start(t, 0)
		for range 2 {
			got := s.dial(patient)
			<-s.asked
			if d := <-got; !errors.As(d.error, new(*muxError)) {
				t.Errorf("refused: %v", d.error)
			}
		}
	})
	t.Run("several at once, none is open", func(t *testing.T) {
		s := start(t, 0)
		first, second := s.dial(patient), s.dial(patient)
		for range 2 {
			<-s.asked
		}
		for _, got := range []chan dialled{first, second} {
			if d := <-got; !errors.As(d.error, new(*muxError)) {
				t.Errorf("refused: %v", d.error)
			}
		}
	})
	t.Run("two wait", func(t *testing.T) {
		s := start(t, 2)
		var open []net.Conn
		for range 2 {
			got := s.dial(patient)
			<-s.asked
			open = append(open, (<-got).works(t))
		}
		first, second := s.dial(patient), s.dial(patient)
		<-s.asked
		waits(t, first)
		waits(t, second)
		open[0].Close()
		open[1].Close()
		waits(t, first) // for the server, they have not ended
		s.release <- struct{}{}
		s.release <- struct{}{}
		var conns []net.Conn
		for len(conns) < 2 {
			select {
			case <-s.asked:
			case d := <-first:
				conns = append(conns, d.works(t))
			case d := <-second:
				conns = append(conns, d.works(t))
			case <-patient.Done():
				t.Fatal("one waits for ever")
			}
		}
		for _, c := range conns {
			c.Close()
			s.release <- struct{}{}
		}
		eventually(t, "none counts", so(func() bool { return s.sessions.Load() == 0 }))
	})
	t.Run("the one that has the room fails", func(t *testing.T) {
		s := start(t, 1)
		s.broken = true
		first, second := s.dial(patient), s.dial(patient)
		s.release <- struct{}{}
		for range 2 {
			select {
			case <-s.asked:
				select { // the second asks only once the first has failed, or is refused meanwhile
				case s.release <- struct{}{}:
				default:
				}
			case <-patient.Done():
				t.Fatal("one waits for ever")
			}
		}
		for _, got := range []chan dialled{first, second} {
			if d := <-got; d.error == nil || strings.Contains(d.error.Error(), "MaxSessions") {
				t.Errorf("with a command that fails: %v", d.error)
			}
		}
	})
	t.Run("it gives up", func(t *testing.T) {
		s := start(t, 1)
		got := s.dial(patient)
		<-s.asked
		open := (<-got).works(t)
		ctx, leave := context.WithCancel(patient)
		waiting, behind := s.dial(ctx), s.dial(ctx)
		<-s.asked
		waits(t, waiting)
		leave()
		for _, got := range []chan dialled{waiting, behind} {
			if d := <-got; d.error == nil || !strings.Contains(d.error.Error(), "MaxSessions") {
				t.Errorf("at the end of its patience: %v", d.error)
			}
		}
		last := s.dial(patient)
		<-s.asked
		waits(t, last)
		close(s.done)
		if d := <-last; !masterGone(d.error) {
			t.Errorf("at the end of the master: %v", d.error)
		}
		open.Close()
		s.release <- struct{}{}
		eventually(t, "none counts", so(func() bool { return s.sessions.Load() == 0 }))
	})
}

// A server counts a session until its command has ended, which takes time; who waits for it gets it all the same.
func TestSessionsAgainstSSH(t *testing.T) {
	dir := muxTempDir(t)
	if err := os.WriteFile(filepath.Join(dir, "docker"), []byte("#!/bin/sh\ncat; sleep 0.1\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	m := sshMaster(t, startSSHD(t, "MaxSessions 1", "SetEnv PATH="+dir+":/usr/bin:/bin"))
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	dial := func() chan dialled {
		got := make(chan dialled, 1)
		go func() {
			conn, err := m.sessionToEngine(ctx)
			got <- dialled{conn, err}
		}()
		return got
	}
	conn := (<-dial()).works(t)
	for range 5 {
		next := dial()
		conn.Close()
		conn = (<-next).works(t)
	}
	conn.Close()
}

// The way to the engine is a forward to its socket where the server allows that and something answers there, and leaves no
// socket behind.
func TestRouteEngine(t *testing.T) {
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) { io.WriteString(w, "OK") })}
	l, remote := listenFake(t)
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	for _, c := range []struct {
		name, config, remote string
		forwarded            bool
	}{
		{"allowed", "AllowStreamLocalForwarding yes", remote, true},
		{"forbidden", "AllowStreamLocalForwarding no", remote, false},
		{"nobody is there", "AllowStreamLocalForwarding yes", remote + "x", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := sshMaster(t, startSSHD(t, c.config))
			r := loopOf(t)
			r.paths.engine, m.host.socket = m.control+".engine", c.remote
			link := handLink(r)
			r.link = link
			listed, ended := make(chan struct{}), make(chan error, 1)
			go func() { ended <- link.routeEngine(link.ctx, m, listed) }()
			select {
			case <-m.routed:
				t.Error("it does not wait for the first list")
			case <-time.After(muxSoon / 4):
			}
			close(listed)
			await(t, "the way is known", m.routed)
			if want := map[bool]string{true: r.paths.engine}[c.forwarded]; m.engineAt != want {
				t.Errorf("the way is %q, want %q", m.engineAt, want)
			}
			(<-r.tasks)(epoch)
			if r.shown.RemoteDockerSocket != c.remote || !r.changed {
				t.Errorf("the remote socket is shown as %q", r.shown.RemoteDockerSocket)
			}
			link.cancel()
			if err := <-ended; !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
			if _, err := os.Lstat(r.paths.engine); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the socket is left behind: %v", err)
			}
		})
	}
}

// TestWaitOnce makes requests on one connection while there is no link: those of one command wait for it only once.
func TestWaitOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &proxy{board: newBoard(&snapshot{Connection: connection{State: reconnecting, LastError: "no route"}})}
		var waits time.Duration
		h := p.waitOnce(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			time.Sleep(waits)
			p.fail(w, req, errors.New("none"))
		}))
		ask := func(c *toolConn) time.Duration {
			t.Helper()
			began := time.Now()
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequestWithContext(context.WithValue(t.Context(), toolKey{}, c), "GET", "/_ping", nil))
			if w.Code != http.StatusServiceUnavailable || !strings.Contains(w.Body.String(), "no route") {
				t.Errorf("answered %d, %s", w.Code, w.Body)
			}
			return time.Since(began)
		}
		c, other := new(toolConn), new(toolConn)
		for i, step := range []struct {
			conn         *toolConn
			after, waits time.Duration
			want         time.Duration
		}{
			{c, 0, holdFor, holdFor},
			{c, 0, holdFor, 0},
			{other, 0, holdFor, holdFor},
			{c, 0, holdFor, holdFor}, // much later
			{c, sameCommand - time.Millisecond, holdFor, 0},
			{c, time.Millisecond, holdFor, holdFor}, // what failed at once is not what counts
			{new(toolConn), 0, time.Second, time.Second},
			{other, 0, time.Second, time.Second}, // this one has not waited to the end
			{other, 0, holdFor, holdFor},
		} {
			time.Sleep(step.after)
			waits = step.waits
			if got := ask(step.conn); got != step.want {
				t.Errorf("request %d took %v, want %v", i, got, step.want)
			}
		}
	})
}
