package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// socket.go: the unix socket on which a running instance answers. What is read is
// answered from the board; only what changes something goes to the loop.

const (
	maxLine       = 1 << 20          // bytes of a request
	maxConns      = 128              // at once; one more ends the one that was silent longest
	firstDeadline = 10 * time.Second // for a new client to say something
	writeTimeout  = 10 * time.Second // for a client to take an answer
	callTimeout   = 10 * time.Second // for the loop to do what was asked for
	dialTimeout   = 2 * time.Second  // for an instance to answer `rdhpf status`
)

// server answers on the socket. All of it ends with the context given to serve.
type server struct {
	board *board
	ask   func(ctx context.Context, method string) (any, error) // has the loop do something
	stop  func()                                                // ends the instance

	mu    sync.Mutex
	conns map[*client]bool
}

// client is one connection.
type client struct {
	conn       *net.UnixConn
	end        context.CancelFunc // of the connection, and of all that is done for it
	heard      time.Time          // of the last request; guarded by server.mu
	write      sync.Mutex
	subscribed bool // only its reader's
}

// listenSocket makes the socket, 0600. The caller holds the instance lock, so
// what is in its place is left by a dead instance.
func listenSocket(path string) (*net.UnixListener, error) {
	if err := removeSocket(path); err != nil {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// serve answers until ctx ends, then ends all connections and waits for them.
func (s *server) serve(ctx context.Context, l *net.UnixListener) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	s.conns = make(map[*client]bool)
	for {
		conn, err := l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		} else if err != nil { // out of file descriptors: others may close theirs
			select {
			case <-ctx.Done():
				return
			case <-time.After(100 * time.Millisecond):
				continue
			}
		}
		if !allowed(conn) {
			conn.Close()
			continue
		}
		ctx, end := context.WithCancel(ctx)
		c := &client{conn: conn, end: end, heard: time.Now()}
		s.admit(c)
		wg.Add(1)
		go func() {
			defer wg.Done()
			s.talk(ctx, c)
		}()
	}
}

// admit makes room for c where there is none.
func (s *server) admit(c *client) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.conns) >= maxConns {
		var silent *client
		for o := range s.conns {
			if silent == nil || o.heard.Before(silent.heard) {
				silent = o
			}
		}
		silent.end()
		delete(s.conns, silent)
	}
	s.conns[c] = true
}

// talk answers one client's requests in turn, until it leaves.
func (s *server) talk(ctx context.Context, c *client) {
	var wg sync.WaitGroup
	lines := bufio.NewScanner(c.conn)
	lines.Buffer(nil, maxLine)
	defer context.AfterFunc(ctx, func() { c.conn.Close() })()
	defer func() {
		// A subscriber that only says no more still listens.
		if !c.subscribed || lines.Err() != nil || c.left() {
			c.end()
		}
		wg.Wait()
		c.end()
		c.conn.Close()
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
	}()
	c.conn.SetReadDeadline(time.Now().Add(firstDeadline))
	for lines.Scan() && lines.Err() == nil { // with an error, the last line is half of one
		c.conn.SetReadDeadline(time.Time{})
		s.mu.Lock()
		c.heard = time.Now()
		s.mu.Unlock()
		if len(lines.Bytes()) == 0 {
			continue
		}
		var then func()
		answer := rpcAnswer(lines.Bytes(), func(req *rpcRequest) (any, *rpcError) {
			result, after, failed := s.handle(ctx, c, req)
			if after != nil {
				then = after
			}
			return result, failed
		})
		unsent := answer != nil && c.send(answer) != nil
		if then != nil { // to stop is not taken back by leaving
			wg.Add(1)
			go func() {
				defer wg.Done()
				then()
			}()
		}
		if unsent {
			c.end()
			return
		}
	}
	if errors.Is(lines.Err(), bufio.ErrTooLong) {
		c.send((&rpcRequest{}).answer(nil, &rpcError{rpcParse, fmt.Sprintf("Parse error: a line over %d bytes", maxLine)}))
	}
}

func (c *client) send(line []byte) error {
	c.write.Lock()
	defer c.write.Unlock()
	c.conn.SetWriteDeadline(time.Now().Add(writeTimeout))
	_, err := c.conn.Write(append(line, '\n'))
	return err
}

// handle does what a request asks for. after, where there is one, is done once
// the answer is sent.
func (s *server) handle(ctx context.Context, c *client, req *rpcRequest) (result any, after func(), failed *rpcError) {
	switch req.method {
	case "status", "health", "pause", "resume", "reload", "stop", "subscribe":
		if failed := req.noParams(); failed != nil {
			return nil, nil, failed
		}
	default:
		return nil, nil, &rpcError{rpcNoMethod, "Method not found"}
	}
	switch req.method {
	case "status":
		status, _ := s.board.lookJSON(time.Now())
		return status, nil, nil
	case "health":
		snap, _ := s.board.look()
		return snap.health(time.Now()), nil, nil
	case "stop":
		return map[string]bool{"stopping": true}, s.stop, nil
	case "subscribe":
		if req.batched || c.subscribed {
			return nil, nil, &rpcError{rpcInvalid, "Invalid Request: one subscribe a connection, and none in a batch"}
		}
		c.subscribed = true
		status, next := s.board.lookJSON(time.Now())
		return status, func() { s.follow(ctx, c, req, next) }, nil
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	result, err := s.ask(ctx, req.method)
	if err != nil {
		return nil, nil, &rpcError{rpcFailed, err.Error()}
	}
	return result, nil, nil
}

// follow sends a line at each change. A client that is slow misses some.
func (s *server) follow(ctx context.Context, c *client, req *rpcRequest, next <-chan struct{}) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-next:
		}
		var status json.RawMessage
		status, next = s.board.lookJSON(time.Now())
		if c.send(req.notification(status)) != nil {
			c.end() // the reader too
			return
		}
	}
}

// rpc.go: JSON-RPC in three dialects, told apart by the request: the plain form
// without an id, JSON-RPC 1.0 with one (what Go's net/rpc/jsonrpc speaks), and
// JSON-RPC 2.0. From a line to the line that answers it; no I/O.

// The codes of JSON-RPC 2.0, and ours.
const (
	rpcParse      = -32700
	rpcInvalid    = -32600
	rpcNoMethod   = -32601
	rpcBadParams  = -32602
	rpcFailed     = -32000 // what was asked for could not be done
	maxBatch      = 16     // with a thousand forwards each answer is large
	dialectPlain  = ""
	dialectOne    = "1.0"
	dialectTwo    = "2.0"
	noticeOfState = "status" // method of the notifications that follow a subscribe
)

type rpcError struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
}

func (e *rpcError) Error() string { return e.Message }

// rpcRequest is a request that was understood.
type rpcRequest struct {
	dialect string
	method  string
	params  json.RawMessage
	id      json.RawMessage // nil: none
	notice  bool            // nobody wants an answer
	batched bool
}

// rpcHandler does what a request asks for. The result must marshal.
type rpcHandler func(*rpcRequest) (any, *rpcError)

// rpcAnswer answers one line, nil where none is due.
func rpcAnswer(line []byte, handle rpcHandler) []byte {
	line = bytes.TrimSpace(line)
	if len(line) > 0 && line[0] == '[' {
		return rpcBatch(line, handle)
	}
	if !json.Valid(line) {
		return rpcUnparsed(line)
	}
	return rpcOne(line, handle, false)
}

// rpcUnparsed answers what is no JSON, in the dialect that it seems to be meant in.
func rpcUnparsed(line []byte) []byte {
	if bytes.Contains(line, []byte(`"jsonrpc"`)) {
		return (&rpcRequest{dialect: dialectTwo}).answer(nil, &rpcError{rpcParse, "Parse error"})
	}
	return (&rpcRequest{}).answer(nil, &rpcError{rpcParse, "Parse error"})
}

// rpcBatch answers a batch: an array of answers, nil where none is due.
func rpcBatch(line []byte, handle rpcHandler) []byte {
	two := &rpcRequest{dialect: dialectTwo}
	if !json.Valid(line) {
		return two.answer(nil, &rpcError{rpcParse, "Parse error"})
	}
	var batch []json.RawMessage
	dec := json.NewDecoder(bytes.NewReader(line))
	dec.Token()
	for dec.More() { // not at once: a line of "[1,1,1…" makes half a million
		if len(batch) == maxBatch {
			return two.answer(nil, &rpcError{rpcInvalid, fmt.Sprintf("Invalid Request: over %d in a batch", maxBatch)})
		}
		var v json.RawMessage
		dec.Decode(&v) // it is valid
		batch = append(batch, v)
	}
	if len(batch) == 0 {
		return two.answer(nil, &rpcError{rpcInvalid, "Invalid Request"})
	}
	var answers [][]byte
	for _, v := range batch {
		if a := rpcOne(v, handle, true); a != nil {
			answers = append(answers, a)
		}
	}
	if answers == nil {
		return nil
	}
	return append(append([]byte{'['}, bytes.Join(answers, []byte{','})...), ']')
}

// rpcOne answers one request, nil where none is due.
func rpcOne(v json.RawMessage, handle rpcHandler, batched bool) []byte {
	req, bad := rpcParseRequest(v)
	if batched {
		req.batched = true
		if req.dialect != dialectTwo {
			req.dialect, bad = dialectTwo, &rpcError{rpcInvalid, "Invalid Request"}
		}
	}
	if bad != nil {
		return req.answer(nil, bad)
	}
	result, failed := handle(req)
	if req.notice {
		return nil
	}
	return req.answer(result, failed)
}

// rpcParseRequest always returns a request that can be answered.
func rpcParseRequest(v json.RawMessage) (*rpcRequest, *rpcError) {
	req := &rpcRequest{}
	invalid := &rpcError{rpcInvalid, "Invalid Request"}
	if v[0] != '{' {
		return req, invalid
	}
	m := make(map[string]json.RawMessage)
	dec := json.NewDecoder(bytes.NewReader(v))
	dec.Token()
	for dec.More() { // not at once: a line of members makes a big map
		name, _ := dec.Token()
		var value json.RawMessage
		dec.Decode(&value) // it is valid
		switch name {
		case "jsonrpc", "id", "method", "params":
			m[name.(string)] = value
		}
	}
	id, hasID := m["id"]
	if version, ok := m["jsonrpc"]; ok {
		req.dialect = dialectTwo
		var s string
		if json.Unmarshal(version, &s) != nil || s != dialectTwo {
			return req, invalid
		}
		if hasID && (id[0] == '{' || id[0] == '[' || id[0] == 't' || id[0] == 'f') {
			return req, invalid
		}
		req.notice = !hasID
	} else if hasID {
		req.dialect = dialectOne
		req.notice = string(id) == "null"
	}
	if hasID {
		req.id = id
	}
	var method any
	json.Unmarshal(m["method"], &method)
	name, isString := method.(string)
	params := m["params"]
	structured := len(params) == 0 || params[0] == '{' || params[0] == '[' || string(params) == "null" && req.dialect != dialectTwo
	if !isString || name == "" || !structured {
		req.notice = false // it is no request at all, so no notification either
		return req, invalid
	}
	req.method, req.params = name, params
	return req, nil
}

// answer builds the answer to a request in its dialect. A result that is JSON
// already is taken as it is: a long one is not read again.
func (req *rpcRequest) answer(result any, failed *rpcError) []byte {
	id := req.id
	if id == nil {
		id = json.RawMessage("null")
	}
	switch {
	case req.dialect == dialectTwo && failed != nil:
		return join(`{"jsonrpc":"2.0","error":`, mustJSON(failed), `,"id":`, id, `}`)
	case req.dialect == dialectTwo:
		return join(`{"jsonrpc":"2.0","result":`, rawJSON(result), `,"id":`, id, `}`)
	}
	head, message := `{"result":`, json.RawMessage("null")
	if req.id != nil {
		head = `{"id":` + string(id) + `,"result":`
	}
	if failed != nil { // net/rpc takes an error that is a string, and no other
		message = mustJSON(failed.Message)
	}
	return join(head, rawJSON(result), `,"error":`, message, `}`)
}

// notification builds one of the lines that follow the answer to a subscribe.
func (req *rpcRequest) notification(status any) []byte {
	switch req.dialect {
	case dialectTwo:
		return join(`{"jsonrpc":"2.0","method":"`+noticeOfState+`","params":`, rawJSON(status), `}`)
	case dialectOne:
		return join(`{"id":null,"method":"`+noticeOfState+`","params":[`, rawJSON(status), `]}`)
	}
	return req.answer(status, nil)
}

// join joins texts and JSON into one line.
func join(parts ...any) (line []byte) {
	for _, p := range parts {
		switch p := p.(type) {
		case string:
			line = append(line, p...)
		case json.RawMessage:
			line = append(line, p...)
		case []byte:
			line = append(line, p...)
		}
	}
	return line
}

func rawJSON(v any) json.RawMessage {
	if raw, ok := v.(json.RawMessage); ok {
		return raw
	}
	return mustJSON(v)
}

// mustJSON marshals what was made here, and so can be.
func mustJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

// noParams refuses parameters: no method takes any. net/rpc/jsonrpc always sends
// one, in an array.
func (req *rpcRequest) noParams() *rpcError {
	var compact bytes.Buffer
	json.Compact(&compact, req.params)
	switch compact.String() {
	case "", "null", "{}", "[]", "[{}]", "[null]":
		return nil
	}
	return &rpcError{rpcBadParams, "Invalid params: " + req.method + " takes none"}
}

// peer.go: who is at the other end of a unix socket, and whether anybody still is.

// allowed says whether the peer is us or root.
func allowed(conn *net.UnixConn) bool {
	raw, err := conn.SyscallConn()
	if err != nil {
		return false
	}
	uid := -1
	raw.Control(func(fd uintptr) { uid, err = peerUID(int(fd)) })
	return err == nil && (uid == 0 || uid == os.Geteuid())
}

// left says whether the peer has closed its end, and not only stopped sending.
func (c *client) left() bool {
	raw, err := c.conn.SyscallConn()
	if err != nil {
		return true
	}
	poll := []unix.PollFd{{Events: unix.POLLOUT}}
	raw.Control(func(fd uintptr) {
		poll[0].Fd = int32(fd)
		unix.Poll(poll, 0)
	})
	return poll[0].Revents&unix.POLLHUP != 0
}
