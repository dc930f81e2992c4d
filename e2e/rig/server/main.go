// Server is the program of the rig's one container image, and its delay line.
//
//	server [-listen 80,81,100-199] [-after 10s] [-mode http|echo|once|close|discard|none] [-name NAME]
//	server delay HOST PORT DURATION
//	server cat [STATUS]
//
// The first form listens: http answers GET / with a greeting, GET /bytes?n=N
// with N zero bytes and POST /sink with the number of bytes it was sent; echo
// sends back what arrives and passes a half-close on; once is an echo that takes
// one connection and stops listening; close closes what it accepted at once;
// discard reads and never answers; none does not listen. SIGUSR1 ends the
// service: it stops listening and ends its connections, and the process runs on;
// SIGUSR2 begins it again.
// The second form is an ssh ProxyCommand that holds every byte back by
// DURATION in each direction, without limiting how many are under way.
// The third copies its input to its output, says when that has ended, and exits
// with STATUS.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

func main() {
	// As pid 1 of a container a signal without a handler is ignored, and
	// stopping it would take the ten seconds until SIGKILL.
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	go func() {
		<-sig
		os.Exit(0)
	}()

	var err error
	switch {
	case len(os.Args) > 1 && os.Args[1] == "delay":
		err = delayMain(os.Args[2:])
	case len(os.Args) > 1 && os.Args[1] == "cat":
		var status int
		if status, err = cat(os.Args[2:], os.Stdin, os.Stdout, os.Stderr); err == nil {
			os.Exit(status)
		}
	default:
		err = serverMain(os.Args[1:])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "server:", err)
		os.Exit(1)
	}
}

// serverMain returns only with an error.
func serverMain(args []string) error {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	fs := flag.NewFlagSet("server", flag.ContinueOnError)
	listen := fs.String("listen", "80", "ports and ranges of ports, separated by commas")
	after := fs.Duration("after", 0, "wait this long before listening")
	mode := fs.String("mode", "http", "http, echo, once, close, discard or none")
	name := fs.String("name", host, "who the greeting is from")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	ports, err := parsePorts(*listen)
	if err != nil {
		return fmt.Errorf("-listen: %w", err)
	}
	serve, err := modeFunc(*mode, *name)
	if err != nil {
		return err
	}
	told := make(chan os.Signal, 16)
	signal.Notify(told, syscall.SIGUSR1, syscall.SIGUSR2)
	time.Sleep(*after)
	if serve == nil {
		select {}
	}
	s := service{ports: ports, serve: serve, failed: make(chan error)}
	if err := s.begin(); err != nil {
		return err
	}
	for {
		select {
		case err := <-s.failed:
			return err
		case sig := <-told:
			if s.end(); sig == syscall.SIGUSR2 {
				if err := s.begin(); err != nil {
					return err
				}
			}
		}
	}
}

// service listens on its ports between begin and end.
type service struct {
	ports     []int
	serve     func(net.Listener) error
	listeners []*listener
	failed    chan error
}

// listener remembers what it accepted.
type listener struct {
	net.Listener
	mu    sync.Mutex
	ended bool
	conns []net.Conn
}

func (l *listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended {
		c.Close()
	}
	l.conns = append(l.conns, c)
	return c, nil
}

func (s *service) begin() error {
	for _, p := range s.ports {
		plain, err := net.Listen("tcp", net.JoinHostPort("", strconv.Itoa(p)))
		if err != nil {
			return err
		}
		l := &listener{Listener: plain}
		s.listeners = append(s.listeners, l)
		go func() {
			if err := s.serve(l); err != nil && !errors.Is(err, net.ErrClosed) {
				s.failed <- err
			}
		}()
	}
	return nil
}

// end ends its connections, too.
func (s *service) end() {
	for _, l := range s.listeners {
		l.Close()
		l.mu.Lock()
		l.ended = true
		for _, c := range l.conns {
			c.Close()
		}
		l.mu.Unlock()
	}
	s.listeners = nil
}

// parsePorts reads "80,81,100-199". Order is kept, a port given twice fails.
func parsePorts(s string) ([]int, error) {
	var ports []int
	seen := map[int]bool{}
	for _, part := range strings.Split(s, ",") {
		first, last, isRange := strings.Cut(part, "-")
		if !isRange {
			last = first
		}
		lo, err := strconv.ParseUint(first, 10, 16)
		if err != nil {
			return nil, fmt.Errorf("%q is no port", first)
		}
		hi, err := strconv.ParseUint(last, 10, 16)
		if err != nil {
			return nil, fmt.Errorf("%q is no port", last)
		}
		if lo == 0 || hi < lo {
			return nil, fmt.Errorf("%q is no range of ports", part)
		}
		for p := int(lo); p <= int(hi); p++ {
			if seen[p] {
				return nil, fmt.Errorf("port %d is given twice", p)
			}
			seen[p] = true
			ports = append(ports, p)
		}
	}
	return ports, nil
}

// modeFunc gives the function that serves a listener; nil for mode none.
func modeFunc(mode, name string) (func(net.Listener) error, error) {
	switch mode {
	case "http":
		srv := &http.Server{Handler: handler(name)}
		return srv.Serve, nil
	case "echo":
		return each(echo), nil
	case "once":
		return func(l net.Listener) error {
			c, err := l.Accept()
			if err != nil {
				return err
			}
			l.Close()
			defer c.Close()
			echo(c.(*net.TCPConn))
			return nil
		}, nil
	case "close":
		return each(func(*net.TCPConn) {}), nil
	case "discard":
		return each(func(c *net.TCPConn) { io.Copy(io.Discard, c) }), nil
	case "none":
		return nil, nil
	}
	return nil, fmt.Errorf("-mode %q: want http, echo, once, close, discard or none", mode)
}

// each serves every connection in its own goroutine and closes it afterwards.
func each(serve func(*net.TCPConn)) func(net.Listener) error {
	return func(l net.Listener) error {
		for {
			c, err := l.Accept()
			if err != nil {
				return err
			}
			go func() {
				defer c.Close()
				serve(c.(*net.TCPConn))
			}()
		}
	}
}

func echo(c *net.TCPConn) {
	if _, err := io.Copy(c, c); err != nil {
		return
	}
	c.CloseWrite()
	// Closing with unread bytes would reset the connection; there are none
	// after EOF, so this close is a plain one.
}

func handler(name string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/" {
			http.NotFound(w, r)
			return
		}
		fmt.Fprintf(w, "hello from %s\n", name)
	})
	mux.HandleFunc("/bytes", func(w http.ResponseWriter, r *http.Request) {
		n, err := strconv.ParseInt(r.URL.Query().Get("n"), 10, 64)
		if err != nil || n < 0 {
			http.Error(w, "n: want a number of bytes", http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
		io.CopyN(w, zeros{}, n)
	})
	mux.HandleFunc("/sink", func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		fmt.Fprintf(w, "%d\n", n)
	})
	return mux
}

// zeros is an endless source of zero bytes.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// cat copies in to out, says when in has ended, and returns the exit status.
func cat(args []string, in io.Reader, out, errs io.Writer) (status int, err error) {
	switch {
	case len(args) > 1:
		return 0, errors.New("usage: server cat [STATUS]")
	case len(args) == 1:
		if status, err = strconv.Atoi(args[0]); err != nil {
			return 0, fmt.Errorf("%q is no status", args[0])
		}
	}
	if _, err := io.Copy(out, in); err != nil {
		return 0, err
	}
	_, err = fmt.Fprintln(errs, "end of input")
	return status, err
}

func delayMain(args []string) error {
	if len(args) != 3 {
		return errors.New("usage: server delay HOST PORT DURATION")
	}
	d, err := time.ParseDuration(args[2])
	if err != nil || d < 0 {
		return fmt.Errorf("%q is no delay", args[2])
	}
	c, err := net.Dial("tcp", net.JoinHostPort(args[0], args[1]))
	if err != nil {
		return err
	}
	defer c.Close()
	// ssh never half-closes its proxy, so the end of either direction is the
	// end of both; waiting for the other would outlive ssh on a dead network.
	done := make(chan error, 2)
	go func() { done <- delayCopy(c, os.Stdin, d) }()
	go func() { done <- delayCopy(os.Stdout, c, d) }()
	return <-done
}

// delayCopy copies src to dst until EOF, every byte d after it was read. Up to
// 64 MiB are under way, so the delay costs no throughput.
func delayCopy(dst io.Writer, src io.Reader, d time.Duration) error {
	type chunk struct {
		due  time.Time
		data []byte
	}
	queue := make(chan chunk, 2048)
	stop := make(chan struct{})
	defer close(stop)
	var readErr error // written before queue is closed, read after
	go func() {
		defer close(queue)
		buf := make([]byte, 32<<10)
		for {
			n, err := src.Read(buf)
			if n > 0 {
				c := chunk{time.Now().Add(d), append([]byte(nil), buf[:n]...)}
				select {
				case queue <- c:
				case <-stop:
					return
				}
			}
			if err != nil {
				if err != io.EOF {
					readErr = err
				}
				return
			}
		}
	}()
	for c := range queue {
		time.Sleep(time.Until(c.due))
		if _, err := dst.Write(c.data); err != nil {
			return err
		}
	}
	return readErr
}
