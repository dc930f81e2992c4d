package main

// http.go: the answers of an HTTP/1.1 server, as far as the engine's list and
// events need them. net/http would do it too, and make every rdhpf 1.5 MiB
// larger in memory.

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

const maxHeader = 100 // lines of a head; each fits in the reader's buffer

// response is the head of an answer; the next one begins where its body ends.
type response struct {
	code   int
	status string // "404 Not Found"
	server string
	body   io.Reader
}

// readResponse reads a head. An end of the connection before it is io.EOF.
func readResponse(r *bufio.Reader) (*response, error) {
	line, err := readHTTPLine(r)
	if err != nil {
		return nil, err
	}
	proto, status, _ := strings.Cut(line, " ")
	code, _, _ := strings.Cut(status, " ")
	resp := &response{status: status, body: r}
	if resp.code, err = strconv.Atoi(code); err != nil || !strings.HasPrefix(proto, "HTTP/1.") {
		return nil, fmt.Errorf("it is no HTTP: %q", printable(line, maxText))
	}
	for n := 0; ; n++ {
		line, err := readHTTPLine(r)
		switch {
		case err != nil:
			return nil, unexpectedEOF(err)
		case line == "":
			return resp, nil
		case n == maxHeader:
			return nil, fmt.Errorf("its head has over %d lines", maxHeader)
		}
		name, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch strings.ToLower(name) {
		case "server":
			resp.server = value
		case "transfer-encoding":
			if strings.ToLower(value) != "chunked" {
				return nil, fmt.Errorf("its transfer encoding is %q", printable(value, maxText))
			}
			resp.body = &chunkedReader{r: r}
		case "content-length":
			length, err := strconv.ParseUint(value, 10, 63)
			if err != nil {
				return nil, fmt.Errorf("its length is %q", printable(value, maxText))
			}
			if _, chunked := resp.body.(*chunkedReader); !chunked {
				resp.body = &fullReader{io.LimitedReader{R: r, N: int64(length)}}
			}
		}
	}
}

// readHTTPLine reads a line without its end. It is bounded by r's buffer.
func readHTTPLine(r *bufio.Reader) (string, error) {
	line, err := r.ReadSlice('\n')
	switch {
	case errors.Is(err, bufio.ErrBufferFull):
		return "", fmt.Errorf("a line of its head is over %d bytes", r.Size())
	case err == io.EOF && len(line) > 0:
		return "", io.ErrUnexpectedEOF
	case err != nil:
		return "", err
	}
	return string(bytes.TrimRight(line, "\r\n")), nil
}

// fullReader takes an end before the announced length for the failure it is.
type fullReader struct{ io.LimitedReader }

func (f *fullReader) Read(p []byte) (int, error) {
	n, err := f.LimitedReader.Read(p)
	if err == io.EOF && f.N > 0 {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// chunkedReader reads a body that comes in chunks, its trailer included.
type chunkedReader struct {
	r     *bufio.Reader
	left  int64 // of this chunk
	begun bool  // this is not the first
	err   error
}

func (c *chunkedReader) Read(p []byte) (int, error) {
	if c.left == 0 && c.err == nil {
		c.err = unexpectedEOF(c.next())
		if c.err == nil && c.left == 0 {
			c.err = io.EOF
		}
	}
	if c.err != nil {
		return 0, c.err
	}
	n, err := c.r.Read(p[:min(int64(len(p)), c.left)])
	c.left -= int64(n)
	c.err = unexpectedEOF(err)
	return n, c.err
}

// next begins the next chunk. After the last, of length 0, it reads the trailer.
func (c *chunkedReader) next() error {
	if c.begun {
		if line, err := readHTTPLine(c.r); err != nil {
			return err
		} else if line != "" {
			return errors.New("a chunk is longer than it says")
		}
	}
	c.begun = true
	line, err := readHTTPLine(c.r)
	if err != nil {
		return err
	}
	size, _, _ := strings.Cut(line, ";")
	length, err := strconv.ParseUint(strings.TrimSpace(size), 16, 31)
	if err != nil {
		return fmt.Errorf("a chunk's length is %q", printable(size, maxText))
	}
	c.left = int64(length)
	for n := 0; length == 0; n++ {
		if line, err := readHTTPLine(c.r); err != nil || line == "" {
			return err
		}
		if n == maxHeader {
			return fmt.Errorf("its trailer has over %d lines", maxHeader)
		}
	}
	return nil
}
