package main

// socket.go: the unix socket on which a running instance answers. What is read is
// answered from the board; only what changes something goes to the loop.

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"
)

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
