package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/rpc"
	"net/rpc/jsonrpc"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Tests of socket.go: a real server on a real socket, with clients that know how to behave and with others; and the forms
// of JSON-RPC: the examples of the 2.0 specification as they stand there, the other two forms, and what no client in its
// right mind sends.

// mustJSON marshals what can be.
func mustJSON(v any) []byte {
	body, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return body
}

// socketServer is a server that runs.
type socketServer struct {
	*server
	path    string
	cancel  context.CancelFunc
	done    chan struct{} // closed when serve has returned
	stopped chan struct{} // closed by the method stop

	askMu   sync.Mutex
	asked   []string
	reloads bool // a reload does not fail
}

// socketSnap is a snapshot whose engine tells it from others.
func socketSnap(engine string) *snapshot {
	return &snapshot{Version: stateVersion, Host: "ssh://user@example.com", PID: 4242, StartedAt: epoch, Engine: engine,
		Connection: connection{State: connected, Since: epoch}, Warnings: []string{}, Forwards: []forwardInfo{}, Skipped: []skippedPort{}}
}

// startSocket starts a server that ends, at the latest, with the test.
func startSocket(t *testing.T) *socketServer {
	t.Helper()
	s := &socketServer{path: filepath.Join(muxTempDir(t), "s"), done: make(chan struct{}), stopped: make(chan struct{})}
	l, err := listenSocket(s.path)
	if err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	s.server = &server{board: newBoard(socketSnap("first")), ask: s.loop, stop: func() { once.Do(func() { close(s.stopped) }) }}
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	go func() {
		defer close(s.done)
		s.serve(ctx, l)
	}()
	t.Cleanup(func() {
		cancel()
		<-s.done
	})
	return s
}

// loop answers what the loop would be asked.
func (s *socketServer) loop(_ context.Context, method string) (any, error) {
	snap, _ := s.board.look()
	switch method {
	case "status", "verify":
		return snap.at(time.Now()), nil
	case "health":
		return snap.health(time.Now()), nil
	}
	s.askMu.Lock()
	defer s.askMu.Unlock()
	s.asked = append(s.asked, method)
	if method == "reload" {
		if s.reloads {
			return map[string]bool{"reloaded": true}, nil
		}
		return nil, errors.New("config.json: no\x1b such thing")
	}
	return map[string]bool{"paused": method == "pause"}, nil
}

func (s *socketServer) clients() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// socketClient is a client whose every wait has an end.
type socketClient struct {
	*net.UnixConn
	t     *testing.T
	lines *bufio.Reader
}

func (s *socketServer) dial(t *testing.T) *socketClient {
	t.Helper()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: s.path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(2 * patience))
	return &socketClient{conn, t, bufio.NewReader(conn)}
}

func (c *socketClient) say(text string) {
	c.t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		c.t.Fatal(err)
	}
}

func (c *socketClient) line() string {
	c.t.Helper()
	line, err := c.lines.ReadString('\n')
	if err != nil {
		c.t.Fatalf("reading an answer: %v, after %.200q", err, line)
	}
	return strings.TrimSuffix(line, "\n")
}

// asks says a line and wants an answer that contains all of the texts.
func (c *socketClient) asks(line string, want ...string) {
	c.t.Helper()
	c.say(line + "\n")
	c.hears(want...)
}

func (c *socketClient) hears(want ...string) {
	c.t.Helper()
	line := c.line()
	for _, w := range want {
		if !strings.Contains(line, w) {
			c.t.Fatalf("the answer is %.300s, want %s", line, w)
		}
	}
	if !json.Valid([]byte(line)) {
		c.t.Fatalf("the answer is no JSON: %.300s", line)
	}
}

// ends wants the server to have closed the connection, with nothing said before.
func (c *socketClient) ends() {
	c.t.Helper()
	rest, err := io.ReadAll(c.lines)
	if err != nil && !errors.Is(err, syscall.ECONNRESET) {
		c.t.Fatalf("the connection is not closed: %v", err)
	}
	if len(rest) > 0 {
		c.t.Fatalf("the connection says %.300q", rest)
	}
}

const askHealth = `{"method":"health"}`

func TestSocketNetRPC(t *testing.T) {
	s := startSocket(t)
	client := jsonrpc.NewClient(s.dial(t))
	defer client.Close()
	var snap snapshot
	if err := client.Call("status", struct{}{}, &snap); err != nil || snap.Host != "ssh://user@example.com" || snap.PID != 4242 || snap.UpdatedAt.IsZero() {
		t.Errorf("status: %+v, %v", snap, err)
	}
	var h health
	if err := client.Call("health", struct{}{}, &h); err != nil || h.Status != "ok" {
		t.Errorf("health: %+v, %v", h, err)
	}
	if err := client.Call("health", nil, &h); err != nil {
		t.Errorf("health with nil: %v", err)
	}
	for method, want := range map[string]string{"nosuch": "Method not found", "reload": "config.json: no\x1b such thing"} {
		err := client.Call(method, struct{}{}, &h)
		if e, ok := err.(rpc.ServerError); !ok || string(e) != want {
			t.Errorf("%s: error %q, want %q", method, err, want)
		}
	}
	if err := client.Call("status", "all", &snap); err == nil || err.Error() != "Invalid params: status takes none" {
		t.Errorf("status with a parameter: %v", err)
	}
	var calls []*rpc.Call
	for range 200 {
		calls = append(calls, client.Go("status", struct{}{}, new(snapshot), make(chan *rpc.Call, 1)))
	}
	for _, c := range calls {
		if <-c.Done; c.Error != nil || c.Reply.(*snapshot).PID != 4242 {
			t.Fatalf("%+v", c)
		}
	}
}

func TestSocketDialects(t *testing.T) {
	s := startSocket(t)
	c := s.dial(t)
	for range 3 {
		c.asks(`{"method":"status","params":{}}`, `{"result":{"version":"1.0","host":"ssh://user@example.com","pid":4242,`, `"skipped":[]},"error":null}`)
		c.asks(`{"method":"status","params":[{}],"id":1}`, `{"result":{"version":"1.0",`, `},"error":null,"id":1}`)
		c.asks(`{"jsonrpc":"2.0","method":"status","id":"x"}`, `{"jsonrpc":"2.0","result":{"version":"1.0",`, `},"id":"x"}`)
		c.asks(`[{"jsonrpc":"2.0","method":"health","id":1},{"jsonrpc":"2.0","method":"health"},{"jsonrpc":"2.0","method":"x","id":2}]`,
			`[{"jsonrpc":"2.0","result":{"status":"ok"`, `},"id":1},{"jsonrpc":"2.0","error":{"code":-32601,"message":"Method not found"},"id":2}]`)
		c.asks(`{"method":"nosuch"}`, `{"result":null,"error":"Method not found"}`)
		c.asks(`{"method":"status","params":["x"],"id":1,"jsonrpc":"2.0"}`, `"code":-32602,`)
		c.asks("\n\r\n"+`{"method":"health"}`+"\r", `{"result":{"status":"ok"`) // empty lines are nothing
	}
}

func TestSocketAsks(t *testing.T) {
	s := startSocket(t)
	c := s.dial(t)
	c.asks(`{"method":"pause"}`, `{"result":{"paused":true},"error":null}`)
	c.asks(`{"jsonrpc":"2.0","method":"resume","id":1}`, `{"jsonrpc":"2.0","result":{"paused":false},"id":1}`)
	c.asks(`{"method":"reload","id":2}`, `{"result":null,"error":"config.json: no\u001b such thing","id":2}`)
	c.asks(`{"jsonrpc":"2.0","method":"reload","id":3}`, `"error":{"code":-32000,"message":"config.json: no\u001b such thing"},"id":3}`)
	c.asks(`{"method":"pause","params":{"now":true}}`, `{"result":null,"error":"Invalid params: pause takes none"}`)
	c.say(`{"jsonrpc":"2.0","method":"pause"}` + "\n" + `{"method":"resume","id":null}` + "\n") // notifications
	c.asks(`{"method":"pause"}`, `{"result":{"paused":true},"error":null}`)
	s.askMu.Lock()
	defer s.askMu.Unlock()
	if got, want := s.asked, []string{"pause", "resume", "reload", "reload", "pause", "resume", "pause"}; !slices.Equal(got, want) {
		t.Errorf("asked for %q, want %q", got, want)
	}
}

func TestSocketHalfClosed(t *testing.T) {
	s := startSocket(t)
	c := s.dial(t)
	c.say(askHealth + "\n" + askHealth) // the last without an end
	c.CloseWrite()
	c.hears(`{"result":{"status":"ok"`)
	c.hears(`{"result":{"status":"ok"`)
	c.ends()
}

func TestSocketStop(t *testing.T) {
	for _, line := range []string{
		`{"method":"stop"}`,
		`{"method":"stop","id":1}`,
		`[{"jsonrpc":"2.0","method":"stop","id":1},{"jsonrpc":"2.0","method":"health","id":2}]`,
	} {
		s := startSocket(t)
		hold := make(chan struct{})
		stop := s.server.stop
		s.server.stop = func() {
			<-hold // so that nothing is stopped before the answer is there
			stop()
		}
		s.dial(t).asks(line, `"result":{"stopping":true}`)
		close(hold)
		await(t, "the call of stop for "+line, s.stopped)
	}
	for _, line := range []string{`{"jsonrpc":"2.0","method":"stop"}`, `{"method":"stop","id":null}`} {
		s := startSocket(t)
		s.dial(t).say(line + "\n")
		await(t, "the call of stop for "+line, s.stopped)
	}
	t.Run("by one that leaves at once", func(t *testing.T) {
		s := startSocket(t)
		c := s.dial(t)
		c.CloseRead() // no answer can be sent
		c.say(`{"method":"stop"}` + "\n")
		await(t, "the call of stop", s.stopped)
	})
}

func await(t *testing.T, what string, done <-chan struct{}) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatalf("not within %v: %s", patience, what)
	}
}

func TestSocketSubscribe(t *testing.T) {
	for _, tc := range []struct{ name, ask, first, next, other string }{
		{"plain", `{"method":"subscribe"}`, `{"result":{"version":`, `{"result":{"version":`, `{"method":"health"}`},
		{"1.0", `{"method":"subscribe","params":[],"id":7}`, `{"result":{"version":`, `{"method":"status","params":[{"version":`, `{"method":"health","params":[],"id":7}`},
		{"2.0", `{"jsonrpc":"2.0","method":"subscribe","id":7}`, `{"jsonrpc":"2.0","result":{"version":`, `{"jsonrpc":"2.0","method":"status","params":{"version":`, `{"jsonrpc":"2.0","method":"health","id":7}`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := startSocket(t)
			c := s.dial(t)
			c.asks(tc.ask, tc.first, `"engine":"first"`)
			for i := range 3 {
				engine := fmt.Sprintf("of post %d", i)
				s.board.post(socketSnap(engine))
				c.hears(tc.next, `"engine":"`+engine+`"`)
				c.asks(tc.other, `{"status":"ok"`)
			}
			c.asks(tc.ask, `Invalid Request: only one subscribe per connection, and none in a batch`)
			c.CloseWrite() // it says no more and still listens
			for i := range 3 {
				engine := fmt.Sprintf("of late post %d", i)
				s.board.post(socketSnap(engine))
				c.hears(tc.next, `"engine":"`+engine+`"`)
			}
		})
	}
	t.Run("without an answer", func(t *testing.T) {
		s := startSocket(t)
		c := s.dial(t)
		c.asks(`{"jsonrpc":"2.0","method":"subscribe"}`+"\n"+askHealth, `{"result":{"status":"ok"`)
		s.board.post(socketSnap("second"))
		c.hears(`{"jsonrpc":"2.0","method":"status","params":{"version":`, `"engine":"second"`)
	})
	t.Run("in a batch", func(t *testing.T) {
		s := startSocket(t)
		s.dial(t).asks(`[{"jsonrpc":"2.0","method":"subscribe","id":1}]`, `[{"jsonrpc":"2.0","error":{"code":-32600,`)
	})
	t.Run("until the instance ends", func(t *testing.T) {
		s := startSocket(t)
		c := s.dial(t)
		c.asks(`{"method":"subscribe"}`, `{"result":`)
		s.cancel()
		c.ends()
	})
}

// Many posts at once may share a line, and the last is never missed.
func TestSocketSubscribeCoalesces(t *testing.T) {
	s := startSocket(t)
	c := s.dial(t)
	c.asks(`{"method":"subscribe"}`, `"engine":"first"`)
	for i := range 1000 {
		s.board.post(socketSnap(fmt.Sprintf("of post %d", i)))
	}
	s.board.post(socketSnap("last"))
	for lines := 1; !strings.Contains(c.line(), `"engine":"last"`); lines++ {
		if lines > 1001 {
			t.Fatal("more lines than posts")
		}
	}
}

// bigSnap is more than a socket takes without being read.
func bigSnap(engine string) *snapshot {
	snap := socketSnap(engine)
	snap.Warnings = []string{strings.Repeat("x", 4<<20)}
	return snap
}

// blockedSubscriber returns a client to which the server is writing, and which
// takes no more of it.
func (s *socketServer) blockedSubscriber(t *testing.T) *socketClient {
	t.Helper()
	c := s.dial(t)
	c.asks(`{"method":"subscribe"}`, `{"result":`)
	s.board.post(bigSnap("big"))
	if _, err := c.lines.Peek(1); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestSocketSlowSubscriber(t *testing.T) {
	s := startSocket(t)
	slow := s.blockedSubscriber(t)
	quick := s.dial(t)
	quick.asks(`{"method":"subscribe"}`, `"engine":"big"`)
	for i := range 50 {
		engine := fmt.Sprintf("of post %d", i)
		s.board.post(socketSnap(engine))
		quick.hears(`"engine":"` + engine + `"`)
		s.dial(t).asks(`{"method":"status"}`, `"engine":"`+engine+`"`)
	}
	// It was not given up meanwhile, so nobody waited for that. What it missed is
	// not the last.
	slow.line()
	slow.hears(`"engine":"of post 49"`)
}

// A subscriber that has left is forgotten, though nothing happens of which it
// could be told.
func TestSocketSubscriberLeaves(t *testing.T) {
	s := startSocket(t)
	s.dial(t).asks(askHealth, `"ok"`)
	before := runtime.NumGoroutine()
	for range 3 * maxConns {
		c := s.dial(t)
		c.asks(`{"method":"subscribe"}`, `{"result":`)
		c.Close()
	}
	eventually(t, "the subscribers that left are forgotten", func() error {
		if n := runtime.NumGoroutine(); n > before+5 || s.clients() > 5 {
			return fmt.Errorf("%d goroutines, %d before, and %d clients", n, before, s.clients())
		}
		return nil
	})
}

// Subscribers that half-closed and cannot be seen to leave make room like others.
func TestSocketSubscribersMakeRoom(t *testing.T) {
	s := startSocket(t)
	before := runtime.NumGoroutine()
	for range 3 * maxConns {
		c := s.dial(t)
		c.asks(`{"method":"subscribe"}`, `{"result":`)
		c.CloseWrite()
	}
	s.dial(t).asks(askHealth, `"ok"`)
	eventually(t, "only so many subscribers are left", func() error {
		if n := runtime.NumGoroutine(); n > before+4*maxConns {
			return fmt.Errorf("%d goroutines, %d before", n, before)
		}
		return nil
	})
}

func TestSocketSilentLongestGoes(t *testing.T) {
	s := startSocket(t)
	var clients []*socketClient
	for range maxConns {
		c := s.dial(t)
		c.asks(askHealth, `"ok"`)
		clients = append(clients, c)
	}
	clients[0].asks(askHealth, `"ok"`)
	one := s.dial(t)
	one.asks(askHealth, `"ok"`)
	clients[1].ends()
	for i, c := range clients {
		if i != 1 {
			c.asks(askHealth, `"ok"`)
		}
	}
	one.asks(askHealth, `"ok"`)
}

// hostile are clients that nobody needs. Each is done when the server has received everything.
var hostile = []struct {
	name string
	do   func(c *socketClient)
}{
	{"half a line", func(c *socketClient) { c.say(`{"method":`) }},
	{"a line without an end", func(c *socketClient) {
		sent, err := io.Copy(c.UnixConn, io.LimitReader(endless('a'), 64<<20))
		if err == nil || sent > 8*maxLine {
			c.t.Fatalf("the server took %d bytes without a newline: %v", sent, err)
		}
		c.hears(`{"result":null,"error":"Parse error: the line is longer than 1048576 bytes"}`)
		c.ends()
	}},
	{"a line without an end by a subscriber", func(c *socketClient) {
		c.asks(`{"method":"subscribe"}`, `{"result":`)
		sent, err := io.Copy(c.UnixConn, io.LimitReader(endless('['), 64<<20))
		if err == nil || sent > 8*maxLine {
			c.t.Fatalf("the server took %d bytes without a newline: %v", sent, err)
		}
		c.hears(`{"result":null,"error":"Parse error: the line is longer than 1048576 bytes"}`)
		c.ends()
	}},
	{"a line one byte too long", func(c *socketClient) {
		c.asks(strings.Repeat(" ", maxLine-len(askHealth)-1)+askHealth, `"ok"`)
		io.WriteString(c, strings.Repeat(" ", maxLine-len(askHealth))+askHealth+"\n") // may fail at its end
		c.hears(`{"result":null,"error":"Parse error: the line is longer than 1048576 bytes"}`)
		c.ends()
	}},
	{"garbage", func(c *socketClient) {
		c.asks("\x00\x01\xff\xfe\x1b]0;x\a", `{"result":null,"error":"Parse error"}`)
		c.asks("GET / HTTP/1.1\r", `{"result":null,"error":"Parse error"}`)
		c.asks("Host: x\r", `{"result":null,"error":"Parse error"}`)
		c.asks(askHealth, `"ok"`)
	}},
	{"nested", func(c *socketClient) {
		c.asks(strings.Repeat("[", 100_000), `"code":-32700`)
		c.asks(`{"jsonrpc":"2.0","method":"health","params":`+strings.Repeat("[", 100_000), `"code":-32700`)
		c.asks(strings.Repeat(`{"a":`, 100_000), `Parse error`)
		c.asks(askHealth, `"ok"`)
	}},
	{"much in little", func(c *socketClient) {
		var members strings.Builder
		for i := 0; members.Len() < maxLine-20; i++ {
			fmt.Fprintf(&members, `"%x":0,`, i)
		}
		c.asks(`{`+members.String()+`"":1}`, `Invalid Request`)
		c.asks(`{"method":"status","params":[`+strings.Repeat("1 ,", maxLine/3-20)+`1]}`, `Invalid params`)
		c.asks(askHealth, `"ok"`)
	}},
	{"a batch of 50,000", func(c *socketClient) {
		c.say(`[` + strings.Repeat("1,", 50_000-1) + "1]\n")
		size := 0
		for {
			part, err := c.lines.ReadSlice('\n')
			if size += len(part); err == nil {
				break
			} else if !errors.Is(err, bufio.ErrBufferFull) {
				c.t.Fatal(err)
			}
		}
		if want := 50_000*(len(invalidRequest2)+1) + 2; size != want {
			c.t.Errorf("the answer has %d bytes, want %d", size, want)
		}
	}},
	{"1,000 at once", func(c *socketClient) {
		go io.WriteString(c, strings.Repeat(askHealth+"\n", 1000)) // it ends with the connection at the latest
		for range 1000 {
			c.hears(`"ok"`)
		}
	}},
	{"1,000 at once, unread", func(c *socketClient) {
		go io.WriteString(c, strings.Repeat(`{"method":"status"}`+"\n", 1000))
		c.hears(`"version"`)
	}},
	{"gone at once", func(c *socketClient) { c.Close() }},
	{"gone before the answer", func(c *socketClient) {
		c.say(strings.Repeat(`{"method":"status"}`+"\n", 10))
		c.Close()
	}},
}

// endless is what a line without an end is read from.
type endless byte

func (e endless) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = byte(e)
	}
	return len(b), nil
}

// Of the bytes that a client sends, the server keeps no more than a line, and it
// answers others as if nothing was.
func TestSocketHostile(t *testing.T) {
	for _, h := range hostile {
		t.Run(h.name, func(t *testing.T) {
			s := startSocket(t)
			other := s.dial(t)
			other.asks(askHealth, `"ok"`)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			h.do(s.dial(t))
			runtime.ReadMemStats(&after)
			// All that was ever allocated, by both ends: a line is taken apart as it is read.
			if grown := after.TotalAlloc - before.TotalAlloc; grown > 80*maxLine {
				t.Errorf("%d MiB were allocated", grown>>20)
			}
			other.asks(askHealth, `"ok"`)
			s.dial(t).asks(askHealth, `"ok"`)
		})
	}
}

// More clients hang than there is room for, and others come and are answered.
func TestSocketFlood(t *testing.T) {
	s := startSocket(t)
	for i := range 2 * maxConns {
		c := s.dial(t)
		if i%2 == 0 {
			c.say(`{"method"`)
		}
		if i%16 == 0 {
			s.dial(t).asks(askHealth, `"ok"`)
		}
	}
	for range 10 {
		s.dial(t).asks(askHealth, `"ok"`)
	}
	if n := s.clients(); n > maxConns {
		t.Errorf("%d clients", n)
	}
}

// What takes its time: clients that do not say or take what they should.
func TestSocketDeadlines(t *testing.T) {
	if testing.Short() {
		t.Skip("the deadlines are 10 s, and this is -short")
	}
	t.Parallel()
	s := startSocket(t)
	silent, half, slow := s.dial(t), s.dial(t), s.blockedSubscriber(t)
	half.say("[\n{") // the first line is one, even if nothing is right with it
	half.hears("Parse error")
	drip := s.dial(t)
	drip.say(" ")
	silent.ends()
	drip.ends()
	if _, err := io.Copy(io.Discard, slow); err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the slow subscriber's connection is not closed: %v", err)
	}
	half.asks(`"method":"health"}`, `"status":"degraded"`) // it may take its time from then on
}

func TestSocketEnds(t *testing.T) {
	before := runtime.NumGoroutine()
	s := startSocket(t)
	clients := []*socketClient{s.dial(t), s.dial(t), s.dial(t), s.dial(t)}
	clients[1].asks(askHealth, `"ok"`)
	clients[2].asks(`{"method":"subscribe"}`, `{"result":`)
	clients[3].asks(`{"method":"subscribe"}`, `{"result":`)
	clients[3].CloseWrite()
	s.cancel()
	await(t, "the end of the server", s.done)
	for _, c := range clients {
		c.ends()
	}
	if conn, err := net.Dial("unix", s.path); err == nil {
		conn.Close()
		t.Error("the socket still accepts")
	}
	eventually(t, "all goroutines are joined", func() error {
		if n := runtime.NumGoroutine(); n > before {
			return fmt.Errorf("%d goroutines, %d before", n, before)
		}
		return nil
	})
}

// Ending takes no longer because of a client that does not take what it is sent.
func TestSocketEndsDespiteSlow(t *testing.T) {
	for _, halfClosed := range []bool{false, true} {
		t.Run(fmt.Sprintf("half closed %v", halfClosed), func(t *testing.T) {
			s := startSocket(t)
			c := s.blockedSubscriber(t)
			if halfClosed {
				c.CloseWrite()
				s.dial(t).asks(askHealth, `"result"`) // time to see it
			}
			start := time.Now()
			s.cancel()
			await(t, "the end of the server", s.done)
			if took := time.Since(start); took > writeTimeout*8/10 {
				t.Errorf("it took %v", took)
			}
		})
	}
}

func TestSocketFile(t *testing.T) {
	path := filepath.Join(muxTempDir(t), "s")
	for _, left := range []string{"nothing", "a dead instance's"} {
		l, err := listenSocket(path)
		if err != nil {
			t.Fatalf("over %s: %v", left, err)
		}
		info, err := os.Lstat(path)
		if err != nil || info.Mode() != os.ModeSocket|0o600 {
			t.Errorf("the socket's mode is %v, %v", info.Mode(), err)
		}
		l.Close()
		if _, err := os.Lstat(path); err != nil {
			t.Errorf("it is removed by its closing alone: %v", err)
		}
	}
	if err := removeSocket(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if l, err := listenSocket(path); err == nil {
		l.Close()
		t.Error("a file is no hindrance")
	} else if want := path + " exists and is not a socket: remove it"; err.Error() != want {
		t.Errorf("error %q, want %q", err, want)
	}
	if body, err := os.ReadFile(path); string(body) != "precious" {
		t.Errorf("the file has %q, %v", body, err)
	}
	os.Remove(path)
	if err := os.Symlink("elsewhere", path); err != nil {
		t.Fatal(err)
	}
	if l, err := listenSocket(path); err == nil {
		l.Close()
		t.Error("a symbolic link is no hindrance")
	}
	if l, err := listenSocket(filepath.Join(path, "x", "s")); err == nil {
		l.Close()
		t.Error("a missing directory is no hindrance")
	}
}

// TestSocketStranger has this test again as a process of another user. The directory keeps that out.
func TestSocketStranger(t *testing.T) {
	if os.Getenv(strangerDoes) != "" {
		beStranger()
	}
	if os.Geteuid() != 0 {
		t.Skip("only root can start a process of another user")
	}
	s := startSocket(t)
	// The same process as root is answered, so that it is the user that matters.
	if got := newStranger(t, "ask", "0", s.path).line(); !strings.HasPrefix(got, `heard "{\"result\":{\"status\":\"ok\"`) {
		t.Errorf("root %s", got)
	}
	if got := newStranger(t, "ask", "65534", s.path).line(); !strings.Contains(got, "permission denied") {
		t.Errorf("the stranger %s", got)
	}
	s.dial(t).asks(askHealth, `"ok"`)
}

const strangerDoes = "RDHPF_TEST_STRANGER"

// stranger is this test as a process of its own. It ends with its input, and so
// with the test.
type stranger struct {
	t   *testing.T
	out *bufio.Reader
}

func newStranger(t *testing.T, does, uid, path string) *stranger {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "-test.run", "^TestSocketStranger$")
	cmd.Env = append(os.Environ(), strangerDoes+"="+does, "RDHPF_TEST_UID="+uid, "RDHPF_TEST_SOCKET="+path)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		cmd.Wait()
	})
	return &stranger{t, bufio.NewReader(out)}
}

func (s *stranger) line() string {
	s.t.Helper()
	line, err := s.out.ReadString('\n')
	if err != nil {
		s.t.Fatalf("the stranger: %v: %s", err, line)
	}
	return strings.TrimSuffix(line, "\n")
}

// beStranger becomes another user, does what it is there for, tells of it in a
// line, and exits at the end of its input.
func beStranger() {
	fail := func(err error) {
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	if os.Getenv("RDHPF_TEST_UID") != "0" {
		fail(syscall.Setgid(65534))
		fail(syscall.Setuid(65534))
	}
	conn, err := net.Dial("unix", os.Getenv("RDHPF_TEST_SOCKET"))
	fail(err)
	fail(conn.SetDeadline(time.Now().Add(patience)))
	io.WriteString(conn, askHealth+"\n") // may come too late to be taken
	conn.(*net.UnixConn).CloseWrite()
	heard, err := io.ReadAll(conn)
	if err != nil && !errors.Is(err, syscall.ECONNRESET) {
		fail(err)
	}
	fmt.Printf("heard %q\n", heard)
	io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

// rpcTestServer knows the methods of the examples of the specification, and
// remembers what it was asked for.
type rpcTestServer struct{ called []string }

// rpcText is the answer to a line, without its end.
func rpcText(t *testing.T, line []byte, handle rpcHandler) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := rpcAnswer(&b, line, handle); err != nil {
		t.Fatalf("%.200q: %v", line, err)
	}
	if b.Len() == 0 {
		return nil
	}
	answer, ended := bytes.CutSuffix(b.Bytes(), []byte("\n"))
	if !ended {
		t.Errorf("%.200q: the answer does not end with a newline", line)
	}
	return answer
}

func (s *rpcTestServer) handle(req *rpcRequest) (any, *rpcError) {
	s.called = append(s.called, req.Method)
	var list []float64
	var named struct{ Minuend, Subtrahend float64 }
	switch req.Method {
	case "subtract":
		if json.Unmarshal(req.Params, &list) == nil && len(list) == 2 {
			return list[0] - list[1], nil
		}
		if json.Unmarshal(req.Params, &named) == nil {
			return named.Minuend - named.Subtrahend, nil
		}
		return nil, &rpcError{rpcBadParams, "Invalid params"}
	case "sum":
		total := 0.0
		json.Unmarshal(req.Params, &list)
		for _, n := range list {
			total += n
		}
		return total, nil
	case "get_data":
		return []any{"hello", 5}, nil
	case "update", "notify_hello", "notify_sum":
		return true, nil
	case "nothing":
		return nil, nil
	case "fail":
		return nil, &rpcError{rpcFailed, "it <failed>"}
	}
	return nil, &rpcError{rpcNoMethod, "Method not found"}
}

// sameJSON says whether two texts are the same JSON, numbers to the digit.
func sameJSON(t *testing.T, a, b []byte) bool {
	t.Helper()
	var values [2]any
	for i, text := range [][]byte{a, b} {
		dec := json.NewDecoder(bytes.NewReader(text))
		dec.UseNumber()
		if err := dec.Decode(&values[i]); err != nil {
			t.Fatalf("no JSON: %v: %q", err, text)
		}
	}
	return reflect.DeepEqual(values[0], values[1])
}

const (
	parseError2     = `{"jsonrpc":"2.0","error":{"code":-32700,"message":"Parse error"},"id":null}`
	invalidRequest2 = `{"jsonrpc":"2.0","error":{"code":-32600,"message":"Invalid Request"},"id":null}`
	parseErrorPlain = `{"result":null,"error":"Parse error"}`
	invalidPlain    = `{"result":null,"error":"Invalid Request"}`
)

func TestRPC(t *testing.T) {
	long := strings.Repeat("7", 10_000)
	deep := func(n int) string { return strings.Repeat("[", n) + strings.Repeat("]", n) }
	tests := []struct {
		name, line string
		want       string // "" for no answer
		called     string // the methods, in turn
	}{
		// The examples of the JSON-RPC 2.0 specification, section 7, in its order.
		{"positional", `{"jsonrpc": "2.0", "method": "subtract", "params": [42, 23], "id": 1}`,
			`{"jsonrpc": "2.0", "result": 19, "id": 1}`, "subtract"},
		{"positional, the other way", `{"jsonrpc": "2.0", "method": "subtract", "params": [23, 42], "id": 2}`,
			`{"jsonrpc": "2.0", "result": -19, "id": 2}`, "subtract"},
		{"named", `{"jsonrpc": "2.0", "method": "subtract", "params": {"subtrahend": 23, "minuend": 42}, "id": 3}`,
			`{"jsonrpc": "2.0", "result": 19, "id": 3}`, "subtract"},
		{"named, the other way", `{"jsonrpc": "2.0", "method": "subtract", "params": {"minuend": 42, "subtrahend": 23}, "id": 4}`,
			`{"jsonrpc": "2.0", "result": 19, "id": 4}`, "subtract"},
		{"notification", `{"jsonrpc": "2.0", "method": "update", "params": [1,2,3,4,5]}`, "", "update"},
		{"notification of what there is not", `{"jsonrpc": "2.0", "method": "foobar"}`, "", "foobar"},
		{"non-existent method", `{"jsonrpc": "2.0", "method": "foobar", "id": "1"}`,
			`{"jsonrpc": "2.0", "error": {"code": -32601, "message": "Method not found"}, "id": "1"}`, "foobar"},
		{"invalid JSON", `{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]`, parseError2, ""},
		{"invalid request", `{"jsonrpc": "2.0", "method": 1, "params": "bar"}`, invalidRequest2, ""},
		{"batch, invalid JSON", `[
			{"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},
			{"jsonrpc": "2.0", "method"
		]`, parseError2, ""},
		{"empty array", `[]`, invalidRequest2, ""},
		{"invalid batch, not empty", `[1]`, `[` + invalidRequest2 + `]`, ""},
		{"invalid batch", `[1,2,3]`, `[` + invalidRequest2 + `,` + invalidRequest2 + `,` + invalidRequest2 + `]`, ""},
		{"batch", `[
			{"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},
			{"jsonrpc": "2.0", "method": "notify_hello", "params": [7]},
			{"jsonrpc": "2.0", "method": "subtract", "params": [42,23], "id": "2"},
			{"foo": "boo"},
			{"jsonrpc": "2.0", "method": "foo.get", "params": {"name": "myself"}, "id": "5"},
			{"jsonrpc": "2.0", "method": "get_data", "id": "9"}
		]`, `[
			{"jsonrpc": "2.0", "result": 7, "id": "1"},
			{"jsonrpc": "2.0", "result": 19, "id": "2"},
			{"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null},
			{"jsonrpc": "2.0", "error": {"code": -32601, "message": "Method not found"}, "id": "5"},
			{"jsonrpc": "2.0", "result": ["hello", 5], "id": "9"}
		]`, "sum notify_hello subtract foo.get get_data"},
		{"batch of notifications", `[
			{"jsonrpc": "2.0", "method": "notify_sum", "params": [1,2,4]},
			{"jsonrpc": "2.0", "method": "notify_hello", "params": [7]}
		]`, "", "notify_sum notify_hello"},

		// 2.0, what the specification says without an example.
		{"2.0 id a fraction", `{"jsonrpc":"2.0","method":"sum","id":1.50}`, `{"jsonrpc":"2.0","result":0,"id":1.50}`, "sum"},
		{"2.0 id null", `{"jsonrpc":"2.0","method":"sum","id":null}`, `{"jsonrpc":"2.0","result":0,"id":null}`, "sum"},
		{"2.0 id empty", `{"jsonrpc":"2.0","method":"sum","id":""}`, `{"jsonrpc":"2.0","result":0,"id":""}`, "sum"},
		{"2.0 id no integer can hold", `{"jsonrpc":"2.0","method":"sum","id":` + long + `}`, `{"jsonrpc":"2.0","result":0,"id":` + long + `}`, "sum"},
		{"2.0 id no float can hold", `{"jsonrpc":"2.0","method":"sum","id":-1e999}`, `{"jsonrpc":"2.0","result":0,"id":-1e999}`, "sum"},
		{"2.0 id with what HTML minds", `{"jsonrpc":"2.0","method":"sum","id":"<a&b>\u2028"}`, `{"jsonrpc":"2.0","result":0,"id":"<a&b>\u2028"}`, "sum"},
		{"2.0 id an object", `{"jsonrpc":"2.0","method":"sum","id":{"a":1}}`, invalidRequest2, ""},
		{"2.0 id an array", `{"jsonrpc":"2.0","method":"sum","id":[1]}`, invalidRequest2, ""},
		{"2.0 id true", `{"jsonrpc":"2.0","method":"sum","id":true}`, invalidRequest2, ""},
		{"2.0 failed", `{"jsonrpc":"2.0","method":"fail","id":1}`, `{"jsonrpc":"2.0","error":{"code":-32000,"message":"it <failed>"},"id":1}`, "fail"},
		{"2.0 failed, nobody wants to know", `{"jsonrpc":"2.0","method":"fail"}`, "", "fail"},
		{"2.0 result null", `{"jsonrpc":"2.0","method":"nothing","id":1}`, `{"jsonrpc":"2.0","result":null,"id":1}`, "nothing"},
		{"2.0 params null", `{"jsonrpc":"2.0","method":"sum","params":null}`, invalidRequest2, ""},
		{"2.0 params a string", `{"jsonrpc":"2.0","method":"sum","params":"x"}`, invalidRequest2, ""},
		{"2.0 no method", `{"jsonrpc":"2.0"}`, invalidRequest2, ""},
		{"2.0 empty method", `{"jsonrpc":"2.0","method":""}`, invalidRequest2, ""},
		{"2.0 method null", `{"jsonrpc":"2.0","method":null}`, invalidRequest2, ""},
		{"another version", `{"jsonrpc":"3.0","method":"sum"}`, invalidRequest2, ""},
		{"version a number", `{"jsonrpc":2.0,"method":"sum"}`, invalidRequest2, ""},
		{"version null", `{"jsonrpc":null,"method":"sum"}`, invalidRequest2, ""},
		{"2.0 members that it does not know", `{"jsonrpc":"2.0","method":"sum","id":1,"x":[{}],"":0}`, `{"jsonrpc":"2.0","result":0,"id":1}`, "sum"},
		{"2.0 the last of two", `{"jsonrpc":"2.0","method":"sum","method":"fail","method":"get_data","id":1,"id":2}`, `{"jsonrpc":"2.0","result":["hello",5],"id":2}`, "get_data"},
		{"2.0 escaped", `{"json\u0072pc":"\u0032.0","meth\u006fd":"\u0073um","id":"\u0041"}`, `{"jsonrpc":"2.0","result":0,"id":"A"}`, "sum"},
		{"2.0 nested", `{"jsonrpc":"2.0","method":"get_data","params":` + deep(5000) + `,"id":1}`,
			`{"jsonrpc":"2.0","result":["hello",5],"id":1}`, "get_data"},
		{"2.0 nested too deep", `{"jsonrpc":"2.0","method":"sum","params":` + deep(100_000) + `,"id":1}`, parseError2, ""},
		{"batch nested too deep", deep(100_000), parseError2, ""},
		{"batch never closed", strings.Repeat("[", 100_000), parseError2, ""},
		{"batch with other dialects", `[{"method":"sum"},{"method":"sum","id":1},{"method":"sum","id":null},null,"x",[]]`,
			`[` + invalidRequest2 + `,` + strings.Replace(invalidRequest2, "null", "1", 1) + strings.Repeat(`,`+invalidRequest2, 4) + `]`, ""},
		{"batch of a thousand", `[` + strings.Repeat(`{"jsonrpc":"2.0","method":"sum"},{"jsonrpc":"2.0","method":"sum","id":1},`, 499) + `{"jsonrpc":"2.0","method":"sum"},3]`,
			`[` + strings.Repeat(`{"jsonrpc":"2.0","result":0,"id":1},`, 499) + invalidRequest2 + `]`, strings.TrimSpace(strings.Repeat("sum ", 999))},

		// 1.0: what has an id and no version.
		{"1.0", `{"method":"sum","params":[1,2],"id":7}`, `{"id":7,"result":3,"error":null}`, "sum"},
		{"1.0 id a string", `{"method":"sum","params":[1,2],"id":"a"}`, `{"id":"a","result":3,"error":null}`, "sum"},
		{"1.0 id a fraction", `{"method":"sum","params":[1,2],"id":0.5}`, `{"id":0.5,"result":3,"error":null}`, "sum"},
		{"1.0 id false", `{"method":"sum","params":[1,2],"id":false}`, `{"id":false,"result":3,"error":null}`, "sum"},
		{"1.0 id an object", `{"method":"sum","params":[1,2],"id":{"a":[1, 2]}}`, `{"id":{"a":[1,2]},"result":3,"error":null}`, "sum"},
		{"1.0 notification", `{"method":"sum","params":[1,2],"id":null}`, "", "sum"},
		{"1.0 notification that fails", `{"method":"fail","params":[],"id":null}`, "", "fail"},
		{"1.0 failed", `{"method":"fail","params":[],"id":1}`, `{"id":1,"result":null,"error":"it <failed>"}`, "fail"},
		{"1.0 non-existent method", `{"method":"x","params":[],"id":1}`, `{"id":1,"result":null,"error":"Method not found"}`, "x"},
		{"1.0 params null", `{"method":"sum","params":null,"id":1}`, `{"id":1,"result":0,"error":null}`, "sum"},
		{"1.0 no params", `{"method":"sum","id":1}`, `{"id":1,"result":0,"error":null}`, "sum"},
		{"1.0 invalid", `{"method":7,"params":[],"id":1}`, `{"id":1,"result":null,"error":"Invalid Request"}`, ""},
		{"1.0 no request, so no notification", `{"method":7,"params":[],"id":null}`, `{"id":null,"result":null,"error":"Invalid Request"}`, ""},
		{"1.0 params a string", `{"method":"sum","params":"x","id":1}`, `{"id":1,"result":null,"error":"Invalid Request"}`, ""},

		// The plain form: neither.
		{"plain", `{"method":"sum","params":[1,2]}`, `{"result":3,"error":null}`, "sum"},
		{"plain, no params", `{"method":"sum"}`, `{"result":0,"error":null}`, "sum"},
		{"plain, empty params", `{"method":"sum","params":{}}`, `{"result":0,"error":null}`, "sum"},
		{"plain, params null", `{"method":"sum","params":null}`, `{"result":0,"error":null}`, "sum"},
		{"plain, result null", `{"method":"nothing"}`, `{"result":null,"error":null}`, "nothing"},
		{"plain, failed", `{"method":"fail"}`, `{"result":null,"error":"it <failed>"}`, "fail"},
		{"plain, non-existent method", `{"method":"x"}`, `{"result":null,"error":"Method not found"}`, "x"},
		{"plain, spaced out", " \t\r\n{ \"method\" :\t\"sum\" , \"params\" : [ 1 , 2 ] }\r\n ", `{"result":3,"error":null}`, "sum"},
		{"plain, invalid JSON", `{"method":"sum"`, parseErrorPlain, ""},
		{"plain, two on a line", `{"method":"sum"} {"method":"sum"}`, parseErrorPlain, ""},
		{"plain, nested too deep", strings.Repeat(`{"a":`, 100_000), parseErrorPlain, ""},
		{"nothing", ``, parseErrorPlain, ""},
		{"white space", " \t ", parseErrorPlain, ""},
		{"binary", "\x00\xff\x1b[31m", parseErrorPlain, ""},
		{"another protocol", "GET / HTTP/1.1", parseErrorPlain, ""},
		{"null", `null`, invalidPlain, ""},
		{"true", `true`, invalidPlain, ""},
		{"number", `-1e999`, invalidPlain, ""},
		{"string", `"status"`, invalidPlain, ""},
		{"empty object", `{}`, invalidPlain, ""},
		{"method an object", `{"method":{}}`, invalidPlain, ""},
		{"params a number", `{"method":"sum","params":3}`, invalidPlain, ""},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			var s rpcTestServer
			got := rpcText(t, []byte(tc.line), s.handle)
			switch {
			case tc.want == "" || got == nil:
				if tc.want != "" || got != nil {
					t.Errorf("answer %s, want %s", got, tc.want)
				}
			case !sameJSON(t, got, []byte(tc.want)):
				t.Errorf("answer %s, want %s", got, tc.want)
			}
			if called := strings.Join(s.called, " "); called != tc.called {
				t.Errorf("called %q, want %q", called, tc.called)
			}
		})
	}
}

// Programs take the answers apart by hand too: the order of members is kept.
func TestRPCBytes(t *testing.T) {
	for line, want := range map[string]string{
		`{"method":"sum","params":{}}`:                        `{"result":0,"error":null}`,
		`{"id":3,"method":"fail","params":[]}`:                `{"result":null,"error":"it \u003cfailed\u003e","id":3}`,
		`{"id":3,"method":"sum","params":[],"jsonrpc":"2.0"}`: `{"jsonrpc":"2.0","result":0,"id":3}`,
	} {
		if got := rpcText(t, []byte(line), new(rpcTestServer).handle); string(got) != want {
			t.Errorf("%s: answer %s, want %s", line, got, want)
		}
	}
}

func TestRPCNotification(t *testing.T) {
	for _, tc := range []struct{ line, want string }{
		{`{"method":"subscribe"}`, `{"result":{"a":1},"error":null}`},
		{`{"method":"subscribe","id":5}`, `{"method":"status","params":[{"a":1}],"id":null}`},
		{`{"method":"subscribe","id":5,"jsonrpc":"2.0"}`, `{"jsonrpc":"2.0","method":"status","params":{"a":1}}`},
	} {
		var req rpcRequest
		if err := json.Unmarshal([]byte(tc.line), &req); err != nil || !req.valid() {
			t.Fatalf("%s: %v", tc.line, err)
		}
		if got, err := json.Marshal(req.notification(map[string]int{"a": 1})); err != nil || string(got) != tc.want {
			t.Errorf("%s: notification %s, %v, want %s", tc.line, got, err, tc.want)
		}
	}
}

// However long a batch is and how much answers it, nothing but one answer at a time is kept.
func TestRPCMemory(t *testing.T) {
	line := []byte("[" + strings.Repeat("1,", maxLine/2-2) + "1]")
	big := strings.Repeat("x", 1<<16)
	batch := []byte("[" + strings.Repeat(`{"jsonrpc":"2.0","method":"big","id":1},`, 5000) + "1]") // 320 MiB of answers
	for _, line := range [][]byte{line, batch} {
		var before, now runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		var written, grown int
		w := writerFunc(func(b []byte) (int, error) {
			if written += len(b); written>>24 != (written-len(b))>>24 {
				runtime.GC()
				runtime.ReadMemStats(&now)
				grown = max(grown, int(now.HeapAlloc)-int(before.HeapAlloc))
			}
			return len(b), nil
		})
		if err := rpcAnswer(w, line, func(*rpcRequest) (any, *rpcError) { return big, nil }); err != nil {
			t.Fatal(err)
		}
		if grown > 16*maxLine || written < 32*maxLine {
			t.Errorf("%d bytes are in use for %d that are written", grown, written)
		}
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

func TestRPCNoParams(t *testing.T) {
	for params, ok := range map[string]bool{
		``: true, `null`: true, `{}`: true, `[]`: true, `[{}]`: true, `[null]`: true, "[\t{ } ]": true,
		`{"a":1}`: false, `[1]`: false, `[{},{}]`: false, `[[]]`: false, `{"":{}}`: false, `[""]`: false,
	} {
		bad := (&rpcRequest{Method: "status", Params: json.RawMessage(params)}).noParams()
		if ok != (bad == nil) {
			t.Errorf("params %s: %v", params, bad)
		} else if bad != nil && (bad.Code != rpcBadParams || bad.Message != "Invalid params: status takes none") {
			t.Errorf("params %s: %+v", params, bad)
		}
	}
}

func FuzzRPC(f *testing.F) {
	for _, line := range []string{
		`{"jsonrpc": "2.0", "method": "subtract", "params": [42, 23], "id": 1}`,
		`{"jsonrpc":"2.0","method":"fail","id":"<\u2028>"}`,
		`{"jsonrpc":"2.0","method":"sum"}`,
		`{"jsonrpc":"1.0","method":"sum","id":1}`,
		`{"jsonrpc":"2.0","method":"sum","id":[1e9]}`,
		`[{"jsonrpc":"2.0","method":"sum","id":null},{"method":"sum","id":3},1,[],{}]`,
		`[{"jsonrpc":"2.0","method":"sum"}]`, `[]`, `[1`, `[[]]`,
		`{"method":"sum","params":[1],"id":{"a":"\r"}}`, `{"method":"fail","id":0.10}`, `{"method":"x","id":null}`,
		`{"method":"sum","params":{}}`, `{"method":"fail"}`, `{"method":1}`, `{"method":"sum","params":3,"id":-0}`,
		`{"id":1,"id":2,"method":"sum","method":"fail"}`,
		`{"jsonrpc"`, `null`, "\xff", "", " \t\r\n", `{"a":{"a":{"a":[[[[`,
	} {
		f.Add([]byte(line))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		var s rpcTestServer
		answer := rpcText(t, bytes.Clone(line), s.handle)
		if answer == nil {
			if !json.Valid(bytes.TrimSpace(line)) || len(s.called) == 0 {
				t.Errorf("%q is no notification and has no answer", line)
			}
			return
		}
		if bytes.ContainsAny(answer, "\r\n") || !json.Valid(answer) {
			t.Fatalf("%q: the answer is no line of JSON: %q", line, answer)
		}
		if answer[0] != '[' {
			rpcCheckAnswer(t, line, answer)
			return
		}
		var requests, answers []json.RawMessage
		if json.Unmarshal(line, &requests) != nil || json.Unmarshal(answer, &answers) != nil {
			t.Fatalf("%q: an array answers what is none: %s", line, answer)
		}
		if len(answers) == 0 || len(answers) > len(requests) {
			t.Fatalf("%q: %d answers to %d requests", line, len(answers), len(requests))
		}
		for _, a := range answers {
			rpcCheckAnswer(t, nil, a)
			if !bytes.HasPrefix(a, []byte(`{"jsonrpc"`)) {
				t.Errorf("%q: a batch has an answer that is no 2.0: %s", line, a)
			}
		}
	})
}

// rpcCheckAnswer checks one answer, and that it carries the id of the request
// where that is known.
func rpcCheckAnswer(t *testing.T, request, answer []byte) {
	t.Helper()
	var a, r map[string]json.RawMessage
	if err := json.Unmarshal(answer, &a); err != nil {
		t.Fatalf("answer %s: %v", answer, err)
	}
	json.Unmarshal(request, &r)
	_, hasResult := a["result"]
	errText, hasError := a["error"]
	id, hasID := a["id"]
	if _, two := a["jsonrpc"]; two {
		var e rpcError
		switch {
		case string(a["jsonrpc"]) != `"2.0"` || !hasID || hasResult == hasError || len(a) != 3:
			t.Errorf("%q: no 2.0 answer: %s", request, answer)
		case hasError && (json.Unmarshal(errText, &e) != nil || e.Code >= 0 || e.Message == ""):
			t.Errorf("%q: no 2.0 error: %s", request, answer)
		case request != nil && r["id"] == nil && string(id) != "null":
			t.Errorf("%q: an id from nowhere: %s", request, answer)
		case request != nil && string(id) == "null" && r["id"] != nil && string(r["id"]) != "null" && e.Code != rpcInvalid:
			t.Errorf("%q: the id is lost: %s", request, answer)
		case string(id) != "null" && request != nil && !sameJSON(t, id, r["id"]):
			t.Errorf("%q: another id: %s", request, answer)
		}
		return
	}
	var message *string
	if err := json.Unmarshal(errText, &message); err != nil || !hasError || !hasResult || message != nil && string(a["result"]) != "null" {
		t.Errorf("%q: no answer of 1.0 or the plain form: %s", request, answer)
	}
	if want := fmt.Sprint(r["id"] != nil); fmt.Sprint(hasID) != want || hasID && !sameJSON(t, id, r["id"]) {
		t.Errorf("%q: another id: %s", request, answer)
	}
}
