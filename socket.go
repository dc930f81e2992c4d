package main

// The unix socket on which a running instance answers: JSON-RPC, one line for a request and one for its answer, as
// docs/protocol.md describes it. The loop in run.go does what is asked for; subscribers follow its board.

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	maxLine       = 1 << 20          // bytes of a request
	maxConns      = 128              // at once; one more ends the one that has been silent longest
	firstDeadline = 10 * time.Second // for a new client to say something
	writeTimeout  = 10 * time.Second // for a client to take an answer
	statusTimeout = 2 * time.Second  // for the loop to tell its status
	callTimeout   = 10 * time.Second // for the loop to do anything else
)

// server answers on the socket. Everything it does ends with the context given to serve.
type server struct {
	board *board
	ask   func(ctx context.Context, method string) (any, error) // has the loop do what a method says
	stop  func()                                                // ends the instance

	mu    sync.Mutex
	conns map[*client]bool
}

// client is one connection.
type client struct {
	conn       *net.UnixConn
	end        context.CancelFunc // of the connection, and of everything done for it
	heard      time.Time          // of the last request; guarded by server.mu
	subscribed bool               // touched by its reader only
	writing    sync.Mutex         // held from the first byte of a line to its last
}

// listenSocket makes the socket, with mode 0600. The caller holds the instance lock, so whatever is in its place was
// left behind by a dead instance.
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
func (srv *server) serve(ctx context.Context, l *net.UnixListener) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	srv.conns = make(map[*client]bool)
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
		ctx, end := context.WithCancel(ctx)
		c := &client{conn: conn, end: end, heard: time.Now()}
		srv.admit(c)
		wg.Add(1)
		go func() {
			defer wg.Done()
			srv.talk(ctx, c)
		}()
	}
}

// admit takes c in, in place of another if there is no room.
func (srv *server) admit(c *client) {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	if len(srv.conns) >= maxConns {
		var silent *client
		for other := range srv.conns {
			if silent == nil || other.heard.Before(silent.heard) {
				silent = other
			}
		}
		silent.end()
		delete(srv.conns, silent)
	}
	srv.conns[c] = true
}

// talk answers one client's requests in turn until it leaves.
func (srv *server) talk(ctx context.Context, c *client) {
	var wg sync.WaitGroup
	lines := bufio.NewScanner(c.conn)
	lines.Buffer(nil, maxLine)
	defer context.AfterFunc(ctx, func() { c.conn.Close() })()
	defer func() {
		// A subscriber that has only closed its sending side still listens.
		if !c.subscribed || lines.Err() != nil || hasLeft(c.conn) {
			c.end()
		}
		wg.Wait()
		c.end()
		c.conn.Close()
		srv.mu.Lock()
		delete(srv.conns, c)
		srv.mu.Unlock()
	}()
	c.conn.SetReadDeadline(time.Now().Add(firstDeadline))
	for lines.Scan() && lines.Err() == nil { // with an error, the last line is half of one
		c.conn.SetReadDeadline(time.Time{})
		srv.mu.Lock()
		c.heard = time.Now()
		srv.mu.Unlock()
		if len(lines.Bytes()) == 0 {
			continue
		}
		then, err := srv.answer(ctx, c, lines.Bytes())
		if then != nil { // a stop is carried out even if its sender has left
			wg.Add(1)
			go func() {
				defer wg.Done()
				then()
			}()
		}
		if err != nil {
			c.end()
			return
		}
	}
	if errors.Is(lines.Err(), bufio.ErrTooLong) {
		tooLong := &rpcError{rpcParse, fmt.Sprintf("Parse error: the line is longer than %d bytes", maxLine)}
		c.send((&rpcRequest{}).response(nil, tooLong))
	}
}

// answer answers one line, and returns what is left to do once the answer is sent.
func (srv *server) answer(ctx context.Context, c *client, line []byte) (then func(), err error) {
	w := &lineWriter{c: c}
	err = rpcAnswer(w, line, func(req *rpcRequest) (any, *rpcError) {
		result, after, failed := srv.handle(ctx, c, req)
		if after != nil {
			then = after
		}
		return result, failed
	})
	return then, errors.Join(err, w.finish())
}

// handle does what a request asks for. after, if there is any, is to be called once the answer is sent.
func (srv *server) handle(ctx context.Context, c *client, req *rpcRequest) (result any, after func(), failed *rpcError) {
	timeout := callTimeout
	switch req.Method {
	case "status":
		timeout = statusTimeout
	case "health", "verify", "settle", "pause", "resume", "reload", "stop", "subscribe":
	default:
		return nil, nil, &rpcError{rpcNoMethod, noSuchMethod}
	}
	if failed := req.noParams(); failed != nil {
		return nil, nil, failed
	}
	switch req.Method {
	case "stop":
		return map[string]bool{"stopping": true}, srv.stop, nil
	case "subscribe":
		if req.batched || c.subscribed {
			return nil, nil, &rpcError{rpcInvalid, "Invalid Request: only one subscribe per connection, and none in a batch"}
		}
		c.subscribed = true
		snap, next := srv.board.look()
		return snap.at(time.Now()), func() { srv.follow(ctx, c, req, next) }, nil
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	result, err := srv.ask(ctx, req.Method)
	if err != nil {
		return nil, nil, &rpcError{rpcFailed, err.Error()}
	}
	return result, nil, nil
}

// follow sends a line at each change. A slow client misses some of them, never the last.
func (srv *server) follow(ctx context.Context, c *client, req *rpcRequest, next <-chan struct{}) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-next:
		}
		var snap *snapshot
		snap, next = srv.board.look()
		if c.send(req.notification(snap.at(time.Now()))) != nil {
			c.end() // the reader too
			return
		}
	}
}

// send sends one message, a line of its own.
func (c *client) send(v any) error {
	w := &lineWriter{c: c}
	err := json.NewEncoder(w).Encode(v)
	return errors.Join(err, w.finish())
}

// lineWriter writes one line to a client, piece by piece. From the first piece to the end nobody else writes to it.
type lineWriter struct {
	c   *client
	buf *bufio.Writer // nil before the first piece
}

func (w *lineWriter) Write(b []byte) (int, error) {
	if w.buf == nil {
		w.c.writing.Lock()
		w.buf = bufio.NewWriter(impatient{w.c.conn})
	}
	return w.buf.Write(b)
}

func (w *lineWriter) finish() error {
	if w.buf == nil {
		return nil
	}
	defer w.c.writing.Unlock()
	return w.buf.Flush()
}

// impatient fails a write that takes too long.
type impatient struct{ *net.UnixConn }

func (conn impatient) Write(b []byte) (int, error) {
	conn.SetWriteDeadline(time.Now().Add(writeTimeout))
	return conn.UnixConn.Write(b)
}

// hasLeft says whether the peer has closed the connection, rather than only its sending side.
func hasLeft(conn *net.UnixConn) bool {
	raw, err := conn.SyscallConn()
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

// The codes of JSON-RPC 2.0, and one of ours.
const (
	rpcParse     = -32700
	rpcInvalid   = -32600
	rpcNoMethod  = -32601
	rpcBadParams = -32602
	rpcFailed    = -32000 // what was asked for could not be done

	rpcVersion   = "2.0"
	noSuchMethod = "Method not found"
)

type rpcError struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
}

// rpcRequest is a request in any of the three forms: JSON-RPC 2.0, which has a version; 1.0, which has only an id (what
// Go's net/rpc/jsonrpc speaks); and the plain form, which has neither. A member that is missing is nil.
type rpcRequest struct {
	Version json.RawMessage `json:"jsonrpc"`
	Method  string          `json:"method"`
	Params  json.RawMessage `json:"params"`
	ID      json.RawMessage `json:"id"`
	batched bool            // and so taken for 2.0
}

// rpcResponse is the answer to a request in any form, or a notification.
type rpcResponse struct {
	Version string          `json:"jsonrpc,omitempty"`
	Method  string          `json:"method,omitempty"`
	Params  any             `json:"params,omitempty"`
	Result  any             `json:"result,omitempty"`
	Error   any             `json:"error,omitempty"`
	ID      json.RawMessage `json:"id,omitempty"`
}

var jsonNull = json.RawMessage("null")

// rpcHandler does what a request asks for.
type rpcHandler func(*rpcRequest) (any, *rpcError)

// rpcAnswer writes the answer to one line, itself a line, or nothing if none is due.
func rpcAnswer(w io.Writer, line []byte, handle rpcHandler) error {
	line = bytes.TrimSpace(line)
	batch := bytes.HasPrefix(line, []byte("["))
	if !json.Valid(line) {
		req := &rpcRequest{batched: batch}
		if bytes.Contains(line, []byte(`"jsonrpc"`)) { // so it is meant to be 2.0
			req.Version = jsonNull
		}
		return json.NewEncoder(w).Encode(req.response(nil, &rpcError{rpcParse, "Parse error"}))
	}
	if batch {
		return rpcBatch(w, line, handle)
	}
	if answer := rpcOne(line, false, handle); answer != nil {
		return json.NewEncoder(w).Encode(answer)
	}
	return nil
}

// rpcBatch answers an array of requests by an array of answers, each written as soon as it is there: with a thousand
// forwards, all of them together would take gigabytes.
func rpcBatch(w io.Writer, line []byte, handle rpcHandler) error {
	dec := json.NewDecoder(bytes.NewReader(line))
	dec.Token() // the bracket; line is valid
	if !dec.More() {
		return json.NewEncoder(w).Encode((&rpcRequest{batched: true}).response(nil, invalidRequest))
	}
	before := "["
	for dec.More() {
		var element json.RawMessage
		if err := dec.Decode(&element); err != nil {
			return err
		}
		answer := rpcOne(element, true, handle)
		if answer == nil {
			continue
		}
		body, err := json.Marshal(answer)
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(w, "%s%s", before, body); err != nil {
			return err
		}
		before = ","
	}
	if before == "[" {
		return nil
	}
	_, err := io.WriteString(w, "]\n")
	return err
}

// rpcOne answers one request; nil if no answer is due.
func rpcOne(body []byte, batched bool, handle rpcHandler) *rpcResponse {
	req := &rpcRequest{batched: batched}
	if err := json.Unmarshal(body, req); err != nil || !req.valid() {
		return req.response(nil, invalidRequest)
	}
	result, failed := handle(req)
	if req.two() && req.ID == nil || !req.two() && string(req.ID) == "null" { // a notification
		return nil
	}
	return req.response(result, failed)
}

var invalidRequest = &rpcError{rpcInvalid, "Invalid Request"}

// two says whether the request is, or ought to be, one of JSON-RPC 2.0.
func (req *rpcRequest) two() bool { return req.batched || req.Version != nil }

// valid says whether it is a request. It drops an id that no answer may have.
func (req *rpcRequest) valid() bool {
	if req.two() {
		if req.ID != nil && bytes.IndexByte([]byte("{[tf"), req.ID[0]) >= 0 {
			req.ID = nil
			return false
		}
		var version string
		if json.Unmarshal(req.Version, &version) != nil || version != rpcVersion || string(req.Params) == "null" {
			return false
		}
	}
	structured := req.Params == nil || req.Params[0] == '{' || req.Params[0] == '[' || string(req.Params) == "null"
	return req.Method != "" && structured
}

// noParams refuses parameters, for no method takes any. net/rpc/jsonrpc always sends one, in an array.
func (req *rpcRequest) noParams() *rpcError {
	var compact bytes.Buffer
	json.Compact(&compact, req.Params)
	switch compact.String() {
	case "", "null", "{}", "[]", "[{}]", "[null]":
		return nil
	}
	return &rpcError{rpcBadParams, "Invalid params: " + req.Method + " takes none"}
}

// response makes the answer to a request, in the same form.
func (req *rpcRequest) response(result any, failed *rpcError) *rpcResponse {
	if result == nil {
		result = jsonNull
	}
	if !req.two() {
		if failed != nil { // net/rpc/jsonrpc takes only a string
			return &rpcResponse{Result: jsonNull, Error: failed.Message, ID: req.ID}
		}
		return &rpcResponse{Result: result, Error: jsonNull, ID: req.ID}
	}
	id := req.ID
	if id == nil {
		id = jsonNull
	}
	if failed != nil {
		return &rpcResponse{Version: rpcVersion, Error: failed, ID: id}
	}
	return &rpcResponse{Version: rpcVersion, Result: result, ID: id}
}

// notification makes one of the lines that follow the answer to a subscribe.
func (req *rpcRequest) notification(status any) *rpcResponse {
	switch {
	case req.two():
		return &rpcResponse{Version: rpcVersion, Method: "status", Params: status}
	case req.ID != nil:
		return &rpcResponse{Method: "status", Params: []any{status}, ID: jsonNull}
	}
	return req.response(status, nil)
}
