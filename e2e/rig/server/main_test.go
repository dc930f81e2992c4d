// Tests of the rig's server, without a rig.
package main

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestParsePorts(t *testing.T) {
	tests := []struct {
		in   string
		want []int // nil: an error
	}{
		{"80", []int{80}},
		{"80,81", []int{80, 81}},
		{"443,100-103", []int{443, 100, 101, 102, 103}},
		{"7-7", []int{7}},
		{"65535", []int{65535}},
		{"", nil},
		{"80,", nil},
		{"0", nil},
		{"65536", nil},
		{"5-4", nil},
		{"1-2-3", nil},
		{"80,79-81", nil},
		{"-80", nil},
		{"http", nil},
	}
	for _, tt := range tests {
		got, err := parsePorts(tt.in)
		if (err != nil) != (tt.want == nil) || !reflect.DeepEqual(got, tt.want) {
			t.Errorf("parsePorts(%q) = %v, %v; want %v", tt.in, got, err, tt.want)
		}
	}
}

// dialMode serves one mode on a free port and connects to it.
func dialMode(t *testing.T, mode string) *net.TCPConn {
	t.Helper()
	serve, err := modeFunc(mode, "test")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		serve(l)
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(30 * time.Second))
	return c.(*net.TCPConn)
}

func TestEchoPassesHalfCloseOn(t *testing.T) {
	c := dialMode(t, "echo")
	sent := bytes.Repeat([]byte("rig!"), 1<<18)
	go func() {
		c.Write(sent)
		c.CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, sent) {
		t.Fatalf("read %d bytes, %v; want the %d that were sent", len(got), err, len(sent))
	}
}

func TestClose(t *testing.T) {
	if got, err := io.ReadAll(dialMode(t, "close")); err != nil || len(got) != 0 {
		t.Fatalf("read %q, %v; want EOF", got, err)
	}
}

func TestOnce(t *testing.T) {
	c := dialMode(t, "once")
	io.WriteString(c, "only")
	c.CloseWrite()
	if got, err := io.ReadAll(c); err != nil || string(got) != "only" {
		t.Fatalf("read %q, %v; want what was sent", got, err)
	}
	if second, err := net.Dial("tcp", c.RemoteAddr().String()); err == nil {
		second.Close()
		t.Fatal("a second connection was taken")
	}
}

func TestServiceEndsAndBegins(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	serve, err := modeFunc("http", "test")
	if err != nil {
		t.Fatal(err)
	}
	s := service{ports: []int{port}, serve: serve, failed: make(chan error)}
	for range 3 {
		if err := s.begin(); err != nil {
			t.Fatal(err)
		}
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		s.end()
		c.SetReadDeadline(time.Now().Add(30 * time.Second))
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("a connection outlives the service: %v", err)
		}
		c.Close()
		if c, err := net.Dial("tcp", l.Addr().String()); err == nil {
			c.Close()
			t.Fatal("it listens after its end")
		}
	}
}

func TestDiscardNeverAnswers(t *testing.T) {
	c := dialMode(t, "discard")
	io.WriteString(c, "SSH-2.0-test\r\n")
	c.CloseWrite()
	if got, err := io.ReadAll(c); err != nil || len(got) != 0 {
		t.Fatalf("read %q, %v; want EOF", got, err)
	}
}

func TestModeFunc(t *testing.T) {
	if f, err := modeFunc("none", ""); f != nil || err != nil {
		t.Error("mode none: want no function and no error")
	}
	if _, err := modeFunc("nonsense", ""); err == nil {
		t.Error("mode nonsense: want an error")
	}
}

func TestHTTP(t *testing.T) {
	srv := httptest.NewServer(handler("box"))
	defer srv.Close()
	big := strings.Repeat("x", 1<<20)
	tests := []struct {
		method, path, body string
		code               int
		want               string
	}{
		{"GET", "/", "", 200, "hello from box\n"},
		{"GET", "/bytes?n=3", "", 200, "\x00\x00\x00"},
		{"GET", "/bytes?n=0", "", 200, ""},
		{"GET", "/bytes?n=1048576", "", 200, strings.Repeat("\x00", 1<<20)},
		{"GET", "/bytes?n=-1", "", 400, "n: want a number of bytes\n"},
		{"GET", "/bytes", "", 400, "n: want a number of bytes\n"},
		{"POST", "/sink", big, 200, "1048576\n"},
		{"GET", "/none", "", 404, "404 page not found\n"},
	}
	for _, tt := range tests {
		req, err := http.NewRequest(tt.method, srv.URL+tt.path, strings.NewReader(tt.body))
		if err != nil {
			t.Fatal(err)
		}
		res, err := srv.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(res.Body)
		res.Body.Close()
		if err != nil || res.StatusCode != tt.code || string(got) != tt.want {
			t.Errorf("%s %s: %d, %d bytes, %v", tt.method, tt.path, res.StatusCode, len(got), err)
		}
	}
}

func TestCat(t *testing.T) {
	var out, errs bytes.Buffer
	status, err := cat([]string{"7"}, strings.NewReader("both\x00ways"), &out, &errs)
	if status != 7 || err != nil || out.String() != "both\x00ways" || errs.String() != "end of input\n" {
		t.Errorf("status %d, %v, %q and %q", status, err, out.String(), errs.String())
	}
	for _, args := range [][]string{{"x"}, {"1", "2"}} {
		if _, err := cat(args, strings.NewReader(""), io.Discard, io.Discard); err == nil {
			t.Errorf("cat %q: want an error", args)
		}
	}
}

// writeTimes records when each write came.
type writeTimes struct {
	buf   bytes.Buffer
	times []time.Time
}

func (w *writeTimes) Write(p []byte) (int, error) {
	w.times = append(w.times, time.Now())
	return w.buf.Write(p)
}

func TestDelayCopyIsPipelined(t *testing.T) {
	const n, d = 200, 100 * time.Millisecond
	pr, pw := io.Pipe()
	start := time.Now()
	sent := make([]time.Time, n)
	go func() {
		for i := range sent {
			sent[i] = time.Now()
			pw.Write([]byte{byte(i)})
		}
		pw.Close()
	}()
	var w writeTimes
	if err := delayCopy(&w, pr, d); err != nil {
		t.Fatal(err)
	}
	if w.buf.Len() != n || len(w.times) != n {
		t.Fatalf("%d bytes in %d writes, want %d", w.buf.Len(), len(w.times), n)
	}
	for i, b := range w.buf.Bytes() {
		if b != byte(i) {
			t.Fatalf("byte %d is %d", i, b)
		}
		if early := d - w.times[i].Sub(sent[i]); early > 0 {
			t.Fatalf("byte %d came %v early", i, early)
		}
	}
	// One after the other they would take n times d, 20 s.
	if took := time.Since(start); took > n*d/2 {
		t.Fatalf("took %v: the delays add up", took)
	}
}

func TestDelayCopyPassesErrorsOn(t *testing.T) {
	pr, pw := io.Pipe()
	pw.CloseWithError(io.ErrUnexpectedEOF)
	if err := delayCopy(io.Discard, pr, 0); err != io.ErrUnexpectedEOF {
		t.Errorf("read error: got %v", err)
	}
	pr, pw = io.Pipe()
	defer pw.Close()
	out, in := io.Pipe()
	out.Close()
	go pw.Write([]byte("x"))
	if err := delayCopy(in, pr, 0); err != io.ErrClosedPipe {
		t.Errorf("write error: got %v", err)
	}
}
