package main

// link.go: the data path. Everything tied to one connection to the remote host
// (its ssh master, the container list, the events), and how accepted connections
// and probes pass through it.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	lastWords    = 100 * time.Millisecond // to notice the master's exit
	steadyEngine = 5 * time.Second        // an engine that worked this long starts over at one failure
	probeHold    = 300 * time.Millisecond // a stream open this long plus a round trip has a listener
	probeTimeout = 4 * time.Second        // for a whole probe
	nodeTimeout  = 2 * time.Second        // for the remote host to reach another node
	holdFor      = 10 * time.Second       // the longest a connection waits for the link
	maxWaiting   = 256                    // connections waiting for the link
	earlyEnd     = time.Second            // a remote end that closes sooner without sending anything is suspicious
	lingerFor    = 5 * time.Second        // for the client to close once the service has
	tellEvery    = time.Second            // between reports that a service answers
	pieceSize    = 32 << 10               // bytes per read; larger transfers are left to the kernel
)

// link is a connection to the remote host, or an attempt at one.
type link struct {
	// Set at the start, then immutable.
	r      *runner // the link's goroutines reach the loop only through tell
	ctx    context.Context
	cancel context.CancelFunc
	relist chan struct{}   // requests a list; capacity 1
	pings  chan chan error // requests a round trip
	first  bool            // no link worked before: an engine that does not answer ends it

	ownJump bool // makes its own connection to a jump host

	swarmAt atomic.Int64 // Unix time in ns of the last event of a Swarm; 0: none
	noSwarm atomic.Bool  // the engine is not to be asked for a Swarm, as it is no manager or did not answer

	// Owned by the loop.
	master    *master       // nil until it is ready
	rtt       time.Duration // estimated from lists; 0 before the first
	pace      time.Time     // start of the last scheduled probe
	listedAt  time.Time     // when the newest list was requested
	lookFrom  time.Time     // the first list requested since then has everything probed; zero: none
	listDue   time.Time     // when to list again without a cause
	wakeBy    time.Time     // deadline for the engine to answer; zero if none
	saySoAt   time.Time     // when to say that the first connection takes long; zero: no more
	listErr   error         // why listing fails
	eventsErr error         // why following events fails
	why       error         // the loop's reason for ending the link
}

// end ends the link for the given reason. Only the loop calls it.
func (l *link) end(why error) {
	l.why = why
	l.cancel()
}

// tell has the loop run do, unless the link is no longer the current one.
func (l *link) tell(do func(now time.Time)) {
	l.r.post(l.ctx, func(now time.Time) {
		if l.r.link == l {
			do(now)
		}
	})
}

// wantList requests a list, unless a request is pending.
func (l *link) wantList() {
	select {
	case l.relist <- struct{}{}:
	default:
	}
}

// run makes the connection and keeps it until it fails or the link's context ends.
// It returns the cause once everything it started has ended.
func (l *link) run() error {
	m, err := l.r.ssh.startMaster(l.ctx, l.r.host, l.r.paths.control, l.ownJump, func(line string) { l.r.log.Debug("ssh: " + line) })
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer m.stop() // runs first: a master that does not answer blocks the others
	l.tell(func(time.Time) {
		l.master = m
		l.r.gate.set(m)
	})
	ctx, cancel := context.WithCancelCause(l.ctx)
	defer cancel(nil)
	start := func(part func() error) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			cancel(part())
		}()
	}
	listed := make(chan struct{})
	start(func() error {
		select {
		case <-m.done:
		case <-ctx.Done():
		}
		return nil
	})
	start(func() error { return m.watch(ctx) })
	start(func() error { return l.keepListing(ctx, m, listed) })
	start(func() error { return l.keepFollowing(ctx, m, listed) })
	if l.r.docker {
		start(func() error { return l.routeEngine(ctx, m, listed) })
	}
	<-ctx.Done()
	// If the master exited, others may have noticed first; it knows the cause.
	select {
	case <-m.done:
		return m.exitError()
	case <-time.After(lastWords):
		return context.Cause(ctx)
	}
}

// watch checks that the master is alive and its control socket in place. It
// returns when that fails.
func (m *master) watch(ctx context.Context) error {
	tick := time.NewTimer(untilBeat())
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
			tick.Reset(untilBeat())
		}
		if replaced(m.control, m.socket) {
			return fmt.Errorf("%s was removed or replaced", m.control)
		}
		if err := m.alive(); err != nil {
			return fmt.Errorf("%w: %w", errMaster, err)
		}
	}
}

// keepListing lists once, then on request. It closes listed after the first list.
func (l *link) keepListing(ctx context.Context, m *master, listed chan struct{}) error {
	return l.keep(ctx, m, true, func(e *engine, worked func()) error {
		for {
			began := time.Now()
			list, err := e.list()
			if err != nil {
				return err
			}
			took, server := time.Since(began), e.server
			if !e.isPodman() && !l.noSwarm.Swap(true) {
				var sw *swarm
				again := time.Duration(0)
				switch sw, err = e.listSwarm(); {
				case err != nil:
					again = swarmRetry
				case sw != nil:
					l.noSwarm.Store(false)
				case time.Since(time.Unix(0, l.swarmAt.Load())) < swarmStart:
					again = swarmPace
				}
				if again > 0 {
					time.AfterFunc(again, func() {
						l.noSwarm.Store(false)
						l.wantList()
					})
				}
				l.tell(func(time.Time) { l.r.swarmListed(sw) })
			}
			l.tell(func(now time.Time) { l.r.listed(now, l, list, began, took, server) })
			worked()
			if err != nil {
				return err
			}
			if listed != nil {
				close(listed)
				listed = nil
			}
			for again := false; !again; {
				select {
				case <-ctx.Done():
					return ctx.Err()
				case <-l.relist:
					again = true
				case answer := <-l.pings:
					err := e.ping(listTimeout)
					answer <- err
					if err != nil {
						return err
					}
				}
			}
		}
	})
}

// roundTrip returns once the remote host has answered a request sent after the
// call.
func (l *link) roundTrip(ctx context.Context) error {
	answer := make(chan error, 1)
	select {
	case l.pings <- answer:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-answer:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// keepFollowing follows events after the first list, which is all that a cold
// start has to wait for.
func (l *link) keepFollowing(ctx context.Context, m *master, listed <-chan struct{}) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-listed:
	}
	return l.keep(ctx, m, false, func(e *engine, worked func()) error {
		subscribed := func() {
			worked()
			l.tell(func(now time.Time) { l.r.following(now, l) })
		}
		return e.events(subscribed, func(ev event) {
			if ev.id == "" {
				l.swarmAt.Store(time.Now().UnixNano())
				l.noSwarm.Store(false)
			}
			l.tell(func(now time.Time) { l.r.happened(now, l, ev) })
		})
	})
}

// keep runs work on a connection to the engine, and on a new one after each
// failure, until ctx ends. It does not report a single failure that is overcome at
// once. On a first link it returns an error if listing never worked or the server
// refused the session, since retrying will not help.
func (l *link) keep(ctx context.Context, m *master, lists bool, work func(e *engine, worked func()) error) error {
	worked, told := false, false
	for failures := 0; ; {
		var since time.Time // when work first succeeded
		e, err := dialEngine(m.control, l.r.host.socket, listTimeout)
		if err == nil {
			stop := context.AfterFunc(ctx, func() { e.Close() })
			err = work(e, func() {
				if worked, told = true, false; since.IsZero() {
					since = time.Now()
				}
			})
			stop()
			e.Close()
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		var refused *muxError
		if l.first && !worked && (lists || errors.As(err, &refused)) {
			return err
		}
		if !since.IsZero() && time.Since(since) > steadyEngine {
			failures = 0
		}
		if failures++; failures > 1 && !told && !errors.Is(err, errMaster) {
			told = true
			l.tell(func(time.Time) { l.r.engineLost(l, lists, err) })
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(backoff(failures)):
		}
	}
}

// gate hands connections to the current link. While there is none, they wait for
// the next.
type gate struct {
	mu      sync.Mutex
	master  *master       // nil: no link
	changed chan struct{} // closed when master changes
	waiting int
}

func newGate() *gate { return &gate{changed: make(chan struct{})} }

// set makes m the master for new connections. Only the loop calls it.
func (g *gate) set(m *master) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.master != m {
		g.master = m
		close(g.changed)
		g.changed = make(chan struct{})
	}
}

// pass waits for a master other than failed and returns it.
func (g *gate) pass(ctx context.Context, failed *master) (*master, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.master != nil && g.master != failed {
		return g.master, nil
	}
	if g.waiting >= maxWaiting {
		return nil, errors.New("too many connections waiting for the remote host")
	}
	g.waiting++
	defer func() { g.waiting-- }()
	for {
		changed := g.changed
		g.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
		}
		g.mu.Lock()
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if g.master != nil && g.master != failed {
			return g.master, nil
		}
	}
}

// through has dial connect through the link. If the link fails it uses the next one,
// since nothing has reached the service yet; any other error is final.
func through[C any](ctx context.Context, g *gate, dial func(context.Context, *master) (C, error)) (conn C, m *master, err error) {
	ctx, cancel := context.WithTimeout(ctx, holdFor)
	defer cancel()
	for {
		if m, err = g.pass(ctx, m); err != nil {
			return conn, nil, err
		}
		if conn, err = dial(ctx, m); err == nil || !masterGone(err) {
			return conn, m, err
		}
	}
}

// dial opens a stream to an address on the remote host through the link. A refusal is a
// *muxError.
func (g *gate) dial(ctx context.Context, to netip.AddrPort) (*muxStream, *master, error) {
	return through(ctx, g, func(ctx context.Context, m *master) (*muxStream, error) { return m.dial(ctx, to) })
}

// masterGone reports whether a dial error means that the master has ended.
func masterGone(err error) bool {
	for _, gone := range []error{io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET, syscall.EPIPE, syscall.ECONNREFUSED, syscall.ENOENT} {
		if errors.Is(err, gone) {
			return true
		}
	}
	return false
}

// dial opens a stream to an address on the remote host. The end of ctx aborts the
// dial.
func (m *master) dial(ctx context.Context, to netip.AddrPort) (*muxStream, error) {
	select {
	case m.dials <- struct{}{}:
	case <-m.done:
		return nil, io.ErrUnexpectedEOF
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if m.onlySix.Load() && to.Addr() == loopback4 {
		to = netip.AddrPortFrom(loopback6, to.Port())
	}
	return muxOpenStream(ctx, m.control, to, func() { <-m.dials })
}

// door is an open forward: listeners on its local addresses.
type door struct {
	r     *runner
	key   key
	meter *meter
	ctx   context.Context // ends when the door closes; aborts connections that wait
	shut  context.CancelFunc

	// Owned by the loop.
	listeners map[netip.Addr]net.Listener
	missing   []netip.Addr // additional addresses that are not open
	told      bool         // whether missing addresses were reported
	warning   string       // about the first missing address
}

// listen opens a local address and carries its connections until the door is
// closed.
func (d *door) listen(a netip.Addr) error {
	family := "tcp6"
	if a.Is4() {
		family = "tcp4"
	}
	listen := net.ListenConfig{KeepAlive: -1} // the peer is on this machine
	l, err := listen.Listen(d.ctx, family, netip.AddrPortFrom(a, d.key.local.Port()).String())
	if err != nil {
		return err
	}
	d.listeners[a] = l
	d.r.start(func() { d.accept(l) })
	return nil
}

// close closes the door: new connections are refused, waiting ones are reset, and
// established ones continue.
func (d *door) close() {
	d.shut()
	for _, l := range d.listeners {
		l.Close()
	}
}

func (d *door) accept(l net.Listener) {
	for failures := 0; ; {
		conn, err := l.Accept()
		switch {
		case err == nil:
			failures = 0
			d.r.start(func() { d.carry(conn.(*net.TCPConn)) })
			continue
		case errors.Is(err, net.ErrClosed):
			return
		}
		failures++ // probably out of file descriptors; others may be closed soon
		select {
		case <-d.ctx.Done():
			return
		case <-time.After(backoff(failures)):
		}
	}
}

// carry relays an accepted connection to the service and back. It resets the
// connection if the service cannot be reached or the link ends, so that a failure
// looks neither like an empty response nor like a complete one.
func (d *door) carry(local *net.TCPConn) {
	d.meter.connections.Add(1)
	d.meter.open.Add(1)
	defer d.meter.open.Add(-1)
	d.meter.used.Store(time.Now().UnixNano())
	defer local.Close()
	s, m, err := d.r.gate.dial(d.ctx, d.key.remote)
	if err != nil {
		local.SetLinger(0)
		if errors.As(err, new(*muxError)) {
			d.suspect()
		}
		return
	}
	defer s.Close()
	defer context.AfterFunc(d.r.ctx, func() {
		local.SetLinger(0)
		local.Close()
		s.Close()
	})()
	opened := time.Now()
	sent := make(chan struct{})
	var clientEnded atomic.Bool
	d.r.start(func() {
		defer close(sent)
		d.send(local, s, &clientEnded)
	})
	empty := true
	err = pump(local, s.out, func(n int64) {
		empty = false
		d.count(&d.meter.in, n)
		d.answered()
	})
	if err == nil && m.alive() != nil { // the service did not cause that end
		local.SetLinger(0)
	} else if err == nil {
		if empty && !clientEnded.Load() && time.Since(opened) < earlyEnd {
			d.suspect()
		}
		local.CloseWrite()
		s.awaitEnd()
		select { // closed with something unread, it would lose what the client has yet to get
		case <-sent:
		case <-time.After(lingerFor):
		}
	}
	s.Close()
	local.Close()
	<-sent
}

// send copies from the client to the service. The client's EOF closes that
// direction; an error on its side closes both.
func (d *door) send(local *net.TCPConn, s *muxStream, clientEnded *atomic.Bool) {
	err := pump(s.in, local, func(n int64) { d.count(&d.meter.out, n) })
	switch {
	case err == nil:
		clientEnded.Store(true) // before the service can know
		s.in.Close()
	case errors.Is(err, syscall.EPIPE): // the service reads no more, but the client may still read
		io.Copy(io.Discard, local)
	default: // a reset: the service may see its end before our side is closed
		clientEnded.Store(true)
		s.Close()
	}
}

func (d *door) count(bytes *atomic.Int64, n int64) {
	bytes.Add(n)
	d.meter.used.Store(time.Now().UnixNano())
}

// answered tells the loop that the service answers, at most every tellEvery.
func (d *door) answered() {
	now, told := time.Now().UnixNano(), d.meter.told.Load()
	if now-told > int64(tellEvery) && d.meter.told.CompareAndSwap(told, now) {
		d.r.post(d.ctx, func(now time.Time) { d.r.state.answered(now, d.key) })
	}
}

// suspect tells the loop that a connection found no service.
func (d *door) suspect() {
	d.r.post(d.ctx, func(now time.Time) { d.r.state.suspected(now, d.key) })
}

// duplex is a connection that pump can copy from and to.
type duplex interface {
	io.ReadWriter
	syscall.Conn
	SetReadDeadline(time.Time) error
}

var pieces = sync.Pool{New: func() any { return new([pieceSize]byte) }}

// pump copies from src to dst until src ends, reporting the bytes to count. Small
// pieces are read and written so that each is counted as it passes. After a full
// piece the kernel splices, for a second at a time.
func pump(dst, src duplex, count func(n int64)) error {
	raw, err := src.SyscallConn()
	if err != nil {
		return err
	}
	for {
		n, err := pumpPiece(dst, raw)
		if n > 0 {
			count(int64(n))
		}
		if n == 0 || err != nil {
			return err
		}
		if n < pieceSize {
			continue
		}
		src.SetReadDeadline(time.Now().Add(time.Second))
		spliced, err := io.Copy(dst, src)
		src.SetReadDeadline(time.Time{})
		if spliced > 0 {
			count(spliced)
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
	}
}

// pumpPiece waits for data and copies what is available. It takes a buffer only
// then, since most connections are idle most of the time. At EOF it returns 0 and
// no error.
func pumpPiece(dst io.Writer, src syscall.RawConn) (n int, err error) {
	var piece *[pieceSize]byte
	waited := src.Read(func(fd uintptr) bool {
		piece = pieces.Get().(*[pieceSize]byte)
		for {
			n, err = unix.Read(int(fd), piece[:])
			if err != unix.EINTR {
				break
			}
		}
		if err == unix.EAGAIN {
			pieces.Put(piece)
			piece = nil
			return false
		}
		return true
	})
	if piece == nil {
		return 0, waited // the connection was closed
	}
	defer pieces.Put(piece)
	if err != nil || n <= 0 {
		return 0, err
	}
	return dst.Write(piece[:n])
}

// raiseFileLimit raises the limit on open files to the maximum and returns it. The
// ssh master inherits the limit and needs it as well.
func raiseFileLimit() int {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) != nil {
		return 256
	}
	limit.Cur = limit.Max
	unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	return int(min(limit.Max, 1<<20))
}

// growFileTable makes room for limit open files, or 4096 if that is less. Linux only
// doubles the table when it is full, and each time a process with several threads
// waits for some milliseconds: a quarter of the time in which a thousand ports open.
func growFileTable(limit int) {
	if fd, err := unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, min(limit, 4096)-1); err == nil {
		unix.Close(fd)
	}
}

// probe checks whether the service behind a forward answers. The cause of a refusal
// is known only from ssh's stderr, where it may concern another connection. In case
// of doubt it tries again with no other probe in progress.
func (l *link) probe(ctx context.Context, m *master, w want, rtt time.Duration) probeResult {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	m.probes.RLock()
	result, sure := l.probeOnce(ctx, m, w, rtt)
	m.probes.RUnlock()
	if !sure {
		m.probes.Lock()
		defer m.probes.Unlock()
		result, _ = l.probeOnce(ctx, m, w, rtt)
	}
	return result
}

// probeOnce first tries the container's own address, where the result is exact and
// a refusal disturbs no one; then the published address, where the engine's proxy
// may accept even if nothing listens behind it.
func (l *link) probeOnce(ctx context.Context, m *master, w want, rtt time.Duration) (result probeResult, sure bool) {
	if w.direct.IsValid() && w.private != 0 {
		switch l.reach(ctx, m, w, rtt) {
		case wasReached:
			return probeAnswered, true
		case refusedThere:
			if w.onlyNet {
				return probeSilent, true
			}
		case unsure:
			return probeUnknown, false
		}
	}
	first, cancel := ctx, context.CancelFunc(func() {})
	if w.node != "" {
		first, cancel = context.WithTimeout(ctx, nodeTimeout)
	}
	s, got := m.attempt(first, w.remote)
	cancel()
	if w.node != "" && (got == unreachable || got == noAnswer && l.roundTrip(ctx) == nil) {
		return probeUnreached, true
	}
	if got == unreachable && w.remote.Addr() == loopback4 && !m.onlySix.Load() { // AddressFamily inet6 in its sshd_config?
		if six, at6 := m.attempt(ctx, netip.AddrPortFrom(loopback6, w.remote.Port())); at6 == wasReached {
			m.onlySix.Store(true)
			s, got = six, at6
		}
	}
	switch got {
	case wasReached:
		defer s.Close()
		return l.hold(ctx, m, s), true
	case forbiddenToGo:
		return probeForbidden, true
	case refusedThere, unreachable:
		return probeSilent, true
	}
	return probeUnknown, got != unsure
}

// reach reports whether the container's own address answers. If it is silent but
// the remote host's end of its network is not, the container itself is silent.
func (l *link) reach(ctx context.Context, m *master, w want, rtt time.Duration) outcome {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	direct := make(chan outcome, 1)
	l.r.start(func() {
		s, got := m.attempt(ctx, netip.AddrPortFrom(w.direct, w.private))
		if s != nil {
			s.Close()
		}
		direct <- got
	})
	got, soon := noAnswer, 2*rtt+probeHold
	select {
	case got = <-direct:
	case <-time.After(soon):
	}
	if got != noAnswer && got != unreachable || !w.gateway.IsValid() {
		return got
	}
	nearCtx, cancel := context.WithTimeout(ctx, soon)
	defer cancel()
	s, near := m.attempt(nearCtx, netip.AddrPortFrom(w.gateway, 1)) // a port that no engine redirects to a container
	if s != nil {
		s.Close()
	}
	if near != wasReached && near != refusedThere {
		return got // the network is not local to the remote host
	}
	if got == unreachable {
		return refusedThere
	}
	select {
	case got = <-direct:
	case <-time.After(probeHold):
		got = refusedThere
	}
	return got
}

// attempt connects to an address from the remote host. If the address was reached,
// the caller must close the stream.
func (m *master) attempt(ctx context.Context, to netip.AddrPort) (*muxStream, outcome) {
	var before [nOutcomes]int64
	for i := range before {
		before[i] = m.refusals[i].Load()
	}
	s, err := m.dial(ctx, to)
	switch {
	case err == nil:
		return s, wasReached
	case !errors.As(err, new(*muxError)):
		return nil, noAnswer
	}
	// ssh writes the cause before it answers, but to its stderr.
	for until := time.Now().Add(50 * time.Millisecond); time.Now().Before(until); time.Sleep(time.Millisecond) {
		got, kinds := unsure, 0
		for i := range before {
			if m.refusals[i].Load() > before[i] {
				got = outcome(i)
				kinds++
			}
		}
		if kinds == 1 {
			return nil, got
		} else if kinds > 1 {
			break
		}
	}
	return nil, unsure
}

// hold checks that a stream stays open for a while and then for a round trip,
// without which silence would prove nothing.
func (l *link) hold(ctx context.Context, m *master, s *muxStream) probeResult {
	for _, wait := range []time.Duration{probeHold, 10 * time.Millisecond} {
		s.out.SetReadDeadline(time.Now().Add(wait))
		n, err := s.out.Read(make([]byte, 1))
		switch {
		case n > 0:
			return probeAnswered
		case ctx.Err() != nil || !errors.Is(err, os.ErrDeadlineExceeded) && m.alive() != nil:
			return probeUnknown
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return probeClosed
		case wait == probeHold && l.roundTrip(ctx) != nil:
			return probeUnknown
		}
	}
	return probeAnswered
}
