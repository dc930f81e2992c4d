package main

import (
	"bufio"
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"
)

func TestReadResponse(t *testing.T) {
	long := strings.Repeat("x", 5000)
	for _, c := range []struct{ name, in, body, err string }{
		{"length", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nServer: a\r\n\r\n[]rest", "[]", ""},
		{"chunked", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n[\r\n1;x=y\r\n]\r\n0\r\nT: t\r\n\r\nrest", "[]", ""},
		{"both: chunked counts", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 9\r\n\r\n2\r\n[]\r\n0\r\n\r\nrest", "[]", ""},
		{"until the end", "HTTP/1.0 200 OK\n\n[]", "[]", ""},
		{"empty", "", "", "EOF"},
		{"head cut off", "HTTP/1.1 200 OK\r\nServer: a\r\n", "", "unexpected EOF"},
		{"line cut off", "HTTP/1.1 200", "", "unexpected EOF"},
		{"body cut off", "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[]", "[]", "unexpected EOF"},
		{"chunk cut off", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n[]", "[]", "unexpected EOF"},
		{"chunks cut off", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n[]\r\n", "[]", "unexpected EOF"},
		{"chunk too long", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n[]\r\n", "[", "longer than it says"},
		{"chunk of no length", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n[]\r\n", "", `"-1"`},
		{"huge chunk", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n[]\r\n", "", "ffffffffffffffff"},
		{"bad length", "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "", `"-1"`},
		{"gzip", "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", "", "gzip"},
		{"no HTTP", "SSH-2.0-x\r\n\r\n", "", "no HTTP"},
		{"long line", "HTTP/1.1 200 OK\r\nA: " + long + "\r\n\r\n", "", "over 4096 bytes"},
		{"endless head", "HTTP/1.1 200 OK\r\n" + strings.Repeat("A: b\r\n", 200) + "\r\n", "", "over 100 lines"},
		{"endless trailer", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + strings.Repeat("A: b\r\n", 200), "", "over 100 lines"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := bufio.NewReader(strings.NewReader(c.in))
			resp, err := readResponse(r)
			var body []byte
			if err == nil {
				body, err = io.ReadAll(resp.body)
			}
			if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
				t.Errorf("error %v, want %q", err, c.err)
			}
			if string(body) != c.body {
				t.Errorf("body %q, want %q", body, c.body)
			}
			if rest, _ := io.ReadAll(r); strings.HasSuffix(c.in, "rest") && string(rest) != "rest" {
				t.Errorf("%q is left, want the next answer", rest)
			}
		})
	}
}

// What both take, net/http reads the same way.
func FuzzReadResponse(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nServer: a\r\n\r\n[]"))
	f.Add([]byte("HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n[\r\n1\r\n]\r\n0\r\n\r\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		resp, err := readResponse(bufio.NewReader(bytes.NewReader(in)))
		if err != nil {
			return
		}
		body, err := io.ReadAll(resp.body)
		if len(body) > len(in) {
			t.Fatalf("%d bytes of %d", len(body), len(in))
		}
		theirs, theirErr := http.ReadResponse(bufio.NewReader(bytes.NewReader(in)), nil)
		if err != nil || theirErr != nil || theirs.StatusCode < 200 || theirs.StatusCode == 204 || theirs.StatusCode == 304 {
			return
		}
		theirBody, theirErr := io.ReadAll(theirs.Body)
		if theirErr == nil && (theirs.StatusCode != resp.code || !bytes.Equal(theirBody, body)) {
			t.Errorf("%d %q, and net/http %d %q", resp.code, body, theirs.StatusCode, theirBody)
		}
	})
}
