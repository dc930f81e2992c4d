package main

// proxy.go: the engine's socket. Tools on this machine reach the remote engine through
// it as if it were here, over the connection that is there already.

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"math"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"path"
	"regexp"
	"strings"
	"sync"
	"time"
)

const (
	settleTimeout = 2 * time.Second        // the longest an answer is held until the ports have followed it
	idleEngine    = 10 * time.Minute       // each new connection costs a round trip
	sessionLag    = 100 * time.Millisecond // for a server to let go of a session that has ended
	maxIdle       = 8                      // connections to the engine that are kept for the next request
	sameCommand   = time.Second            // between two requests on a connection that a tool makes for one purpose
	defaultEngine = "/var/run/docker.sock"
)

// proxy passes requests on to the remote engine.
type proxy struct {
	gate   *gate
	board  *board
	settle func(ctx context.Context) // returns once the ports show what runs now
}

// serve serves l until ctx ends, and returns once all connections of tools are closed.
func (p *proxy) serve(ctx context.Context, l *net.UnixListener) {
	// The transport lets a dial outlive its request, so only ctx ends one.
	dial := func(context.Context, string, string) (net.Conn, error) {
		conn, _, err := through(ctx, p.gate, func(ctx context.Context, m *master) (net.Conn, error) { return m.dialEngine(ctx) })
		return conn, err
	}
	transport := &http.Transport{DialContext: dial,
		DisableCompression: true, MaxIdleConns: maxIdle, MaxIdleConnsPerHost: maxIdle, IdleConnTimeout: idleEngine}
	defer transport.CloseIdleConnections()
	silent := log.New(io.Discard, "", 0) // clients that end early are nothing to report
	srv := &http.Server{
		Handler: p.waitOnce(&httputil.ReverseProxy{Transport: transport, FlushInterval: -1, ErrorLog: silent,
			Rewrite: func(r *httputil.ProxyRequest) {
				r.Out.URL.Scheme, r.Out.URL.Host, r.Out.Host = "http", "docker", r.In.Host
				r.Out.URL.RawQuery = r.In.URL.RawQuery // as it came, parsable or not
			},
			ModifyResponse: p.hold, ErrorHandler: p.fail}),
		BaseContext: func(net.Listener) context.Context { return ctx },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, toolKey{}, c) },
		ErrorLog:    silent, ReadHeaderTimeout: firstDeadline,
	}
	defer context.AfterFunc(ctx, func() { srv.Close() })()
	tools := &toolListener{UnixListener: l}
	srv.Serve(tools)
	srv.Close()
	tools.open.Wait()
}

// changes matches the method and path of requests after which other containers run, or
// the same ones in other networks.
var changes = regexp.MustCompile(`^(POST (/v[0-9.]+)?(/libpod)?/(containers|pods)/[^/]+/(start|restart|stop|kill|pause|unpause|remove|rename|update)` +
	`|DELETE (/v[0-9.]+)?(/libpod)?/(containers|pods)/[^/]+` +
	`|POST (/v[0-9.]+)?(/libpod)?/networks/[^/]+/(connect|disconnect))$`)

// hold holds the answer to such a request until the ports have followed: a container is
// then reachable as soon as its start has returned.
func (p *proxy) hold(resp *http.Response) error {
	req := resp.Request
	if resp.StatusCode < 400 && changes.MatchString(req.Method+" "+req.URL.Path) {
		ctx, cancel := context.WithTimeout(req.Context(), settleTimeout)
		defer cancel()
		p.settle(ctx)
	}
	return nil
}

// waitOnce fails a request at once if the tool's last one waited in vain just before. Docker
// pings twice before it asks, and would take three times as long to say what is wrong.
func (p *proxy) waitOnce(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		c := req.Context().Value(toolKey{}).(*toolConn)
		if c.failure != nil && time.Since(c.gaveUp) < sameCommand {
			p.fail(w, req, c.failure)
			return
		}
		began := time.Now()
		c.failure = nil
		next.ServeHTTP(w, req)
		if c.failure != nil && time.Since(began) >= holdFor {
			c.gaveUp = time.Now()
		}
	})
}

// fail answers a request that could not be passed on. Docker's tools print the message.
func (p *proxy) fail(w http.ResponseWriter, req *http.Request, err error) {
	if req.Context().Err() != nil {
		panic(http.ErrAbortHandler) // the client has left, or the instance ends; to return would answer 200
	}
	if c, ok := req.Context().Value(toolKey{}).(*toolConn); ok {
		c.failure = err
	}
	status, text := http.StatusBadGateway, "the remote engine cannot be reached: "+err.Error()
	snap, _ := p.board.look()
	switch c := snap.Connection; {
	case c.State == reconnecting:
		status, text = http.StatusServiceUnavailable, "ssh connection lost, reconnecting: "+cmp.Or(c.LastError, err.Error())
	case c.State != connected:
		status, text = http.StatusServiceUnavailable, "not connected yet: "+cmp.Or(c.LastError, err.Error())
	case masterGone(err): // the master is there, so it is the engine that has ended or does not run
		text = "the remote engine closed the connection before it answered"
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(map[string]string{"message": "rdhpf: " + text})
}

// toolListener accepts the connections of tools and counts those that are open.
type toolListener struct {
	*net.UnixListener
	open sync.WaitGroup
}

func (l *toolListener) Accept() (net.Conn, error) {
	conn, err := l.AcceptUnix()
	if err != nil {
		return nil, err
	}
	l.open.Add(1)
	return &toolConn{UnixConn: conn, closed: sync.OnceFunc(l.open.Done)}, nil
}

// toolConn is the connection of a tool, which makes one request at a time.
type toolConn struct {
	*net.UnixConn
	closed func()

	failure error     // of its last request
	gaveUp  time.Time // when the last one failed that had waited
}

type toolKey struct{} // of the toolConn in a request's context

// Read tells a tool that has left from one that has only closed its sending side, which
// may still wait for output.
func (c *toolConn) Read(b []byte) (int, error) {
	n, err := c.UnixConn.Read(b)
	if err == io.EOF && hasLeft(c.UnixConn) {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

func (c *toolConn) Close() error {
	defer c.closed()
	return c.UnixConn.Close()
}

// dialEngine connects to the remote engine, once it is known how.
func (m *master) dialEngine(ctx context.Context) (net.Conn, error) {
	select {
	case <-m.routed:
	case <-m.done:
		return nil, io.ErrUnexpectedEOF
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if m.engineAt == "" {
		return m.sessionToEngine(ctx)
	}
	return dialMaster(ctx, m.engineAt)
}

// sessionConn is a connection to the engine that takes a session of its own.
type sessionConn struct {
	*muxSession
	r     io.Reader // its output, after the marker
	close func()
}

func (c *sessionConn) Read(b []byte) (int, error) { return c.r.Read(b) }
func (c *sessionConn) CloseWrite() error          { return c.in.Close() }
func (c *sessionConn) LocalAddr() net.Addr        { return &net.UnixAddr{} }
func (c *sessionConn) RemoteAddr() net.Addr       { return &net.UnixAddr{} }
func (c *sessionConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

func (c *sessionConn) Close() error {
	c.close()
	return nil
}

// sessionToEngine opens a connection to the engine in a session. Servers limit those
// (MaxSessions): refused one, it waits for another to end, and those that come later wait
// behind it.
func (m *master) sessionToEngine(ctx context.Context) (net.Conn, error) {
	late := errors.New("the SSH server allows no more sessions (MaxSessions in its sshd_config), and none has ended")
	select {
	case m.opening <- struct{}{}:
		defer func() { <-m.opening }()
	case <-m.done:
		return nil, io.ErrUnexpectedEOF
	case <-ctx.Done():
		return nil, late
	}
	for {
		select {
		case <-m.freed: // by one that ended before
		default:
		}
		others := m.sessions.Load()
		e, err := dialEngine(m.control, m.host.socket, listTimeout)
		if err == nil {
			m.sessions.Add(1)
			e.limit.N = math.MaxInt64
			e.s.SetReadDeadline(time.Time{})
			return &sessionConn{muxSession: e.s, r: e.r, close: sync.OnceFunc(func() {
				e.s.in.Close()
				e.s.out.Close()
				go m.release(e.s)
			})}, nil
		}
		if others == 0 || !errors.As(err, new(*muxError)) {
			return nil, err
		}
		select {
		case <-m.freed:
		case <-m.done:
			return nil, io.ErrUnexpectedEOF
		case <-ctx.Done():
			return nil, late
		}
	}
}

// release closes a session once its command has ended, for until then the server counts it.
// A server that gets the next request along with that end may still do so: whoever is then
// refused tries again a little later.
func (m *master) release(s *muxSession) {
	s.mux.conn.SetReadDeadline(time.Now().Add(muxTimeout))
	<-s.ended
	io.Copy(io.Discard, s.mux.r) // until the master has closed the channel, too
	s.Close()
	m.free()
	time.Sleep(sessionLag)
	m.sessions.Add(-1)
	m.free()
}

func (m *master) free() {
	select {
	case m.freed <- struct{}{}:
	default:
	}
}

// routeEngine finds the way to the engine for tools: a forward to its socket, which takes
// no session, or else sessions. The forward ends with the master.
func (l *link) routeEngine(ctx context.Context, m *master, listed <-chan struct{}) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-listed:
	}
	at, remote := l.r.paths.engine, m.host.socket
	defer removeSocket(at) // ssh can leave it behind
	if remote == "" {
		remote = askEngineSocket(m.control)
	}
	err := errors.New("it has no socket")
	if remote != "" {
		err = m.forwardEngine(ctx, at, remote)
	}
	if err != nil {
		l.r.log.Debug(fmt.Sprintf("requests to the engine take sessions, for its socket cannot be forwarded: %v", err))
		at = ""
	}
	made, _ := os.Lstat(at)
	m.engineAt = at
	close(m.routed)
	l.tell(func(time.Time) {
		l.r.shown.RemoteDockerSocket, l.r.changed = cmp.Or(remote, defaultEngine), true
	})
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(untilBeat()):
		}
		if at != "" && replaced(at, made) { // the master would take a second request for it as done
			return fmt.Errorf("%s was removed or replaced", at)
		}
	}
}

// forwardEngine forwards the socket at to the engine's, and tries it: servers can forbid it,
// which they tell only then.
func (m *master) forwardEngine(ctx context.Context, at, remote string) error {
	if err := removeSocket(at); err != nil {
		return err
	}
	mux, err := muxDial(m.control, muxTimeout)
	if err != nil {
		return err
	}
	defer mux.Close()
	if err := mux.forward(at, remote, muxTimeout); err != nil {
		return err
	}
	conn, err := dialMaster(ctx, at)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	conn.SetDeadline(time.Now().Add(listTimeout))
	if _, err := io.WriteString(conn, pingRequest); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return errors.New(printable(resp.Status, maxText))
	}
	return nil
}

// askEngineSocket asks the remote docker, or podman, for the path of its engine's socket. It
// returns "" if the engine has none.
func askEngineSocket(control string) string {
	const ask = `echo; docker context inspect --format "{{.Endpoints.docker.Host}}" || podman info --format "unix://{{.Host.RemoteSocket.Path}}"`
	s, err := muxOpenSession(control, "exec sh -c '"+ask+"' 2>/dev/null", muxTimeout)
	if err != nil {
		return defaultEngine
	}
	defer s.Close()
	s.SetReadDeadline(time.Now().Add(muxTimeout))
	out, _ := io.ReadAll(io.LimitReader(s, maxNoise))
	return engineSocketIn(string(out))
}

// engineSocketIn returns the path that the last line names. Lines before it come from the
// remote shell.
func engineSocketIn(out string) string {
	lines := strings.Split(strings.TrimSpace(out), "\n")
	last := lines[len(lines)-1]
	socket, isUnix := strings.CutPrefix(last, "unix://")
	socket = strings.TrimPrefix(socket, "unix://") // podman's path may have it
	switch {
	case isUnix && path.IsAbs(socket) && checkPart("", socket, "._/+@:=~-", maxSocketPath) == nil:
		return path.Clean(socket)
	case strings.Contains(last, "://"):
		return ""
	}
	return defaultEngine
}
