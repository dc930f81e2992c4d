package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// config.go: what a person sets on how ports are forwarded: where to listen,
// which ports, and under which number. Flags win over the part of config.json
// for the host, that over its part for all.

// portRange is a range of published ports, both ends included.
type portRange struct{ first, last uint16 }

// config decides where a published port is forwarded to. It is never changed
// once in use: a reload makes a new one. What is zero is not set.
type config struct {
	bind   netip.Addr
	mapped map[uint16]uint16 // published port → local port
	skip   []portRange
	only   []portRange // empty: all
}

// over returns c with what is not set in it taken from base. Mappings add up.
func (c config) over(base config) config {
	if !c.bind.IsValid() {
		c.bind = base.bind
	}
	mapped := maps.Clone(base.mapped)
	if mapped == nil {
		mapped = make(map[uint16]uint16)
	}
	maps.Copy(mapped, c.mapped)
	c.mapped = mapped
	if c.skip == nil {
		c.skip = base.skip
	}
	if c.only == nil {
		c.only = base.only
	}
	return c
}

func has(ranges []portRange, p uint16) bool {
	return slices.ContainsFunc(ranges, func(r portRange) bool { return r.first <= p && p <= r.last })
}

// local returns the local address for a published port, or why it has none.
func (c *config) local(public uint16) (netip.AddrPort, string) {
	switch {
	case has(c.skip, public):
		return netip.AddrPort{}, "named by skip"
	case len(c.only) > 0 && !has(c.only, public):
		return netip.AddrPort{}, "not named by only"
	}
	local := public
	if m, ok := c.mapped[public]; ok {
		local = m
	}
	return netip.AddrPortFrom(c.bind, local), ""
}

// parsePort reads a port from 1 to 65535.
func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%q is no port: want a number from 1 to 65535", s)
	}
	return uint16(n), nil
}

// parseRange reads "80" or "8000-8099".
func parseRange(s string) (portRange, error) {
	a, b, ranged := strings.Cut(s, "-")
	if !ranged {
		b = a
	}
	first, err := parsePort(a)
	if err != nil {
		return portRange{}, err
	}
	last, err := parsePort(b)
	if err != nil {
		return portRange{}, err
	}
	if first > last {
		return portRange{}, fmt.Errorf("range %q ends before it begins", s)
	}
	return portRange{first, last}, nil
}

// parseBind reads an address to listen on.
func parseBind(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("%q is no address: want one like 127.0.0.1 or ::1", s)
	}
	return a.Unmap(), nil
}

// addRanges adds what a flag names: "80,8000-8099".
func addRanges(to *[]portRange) func(string) error {
	return func(s string) error {
		for _, part := range strings.Split(s, ",") {
			r, err := parseRange(strings.TrimSpace(part))
			if err != nil {
				return err
			}
			*to = append(*to, r)
		}
		return nil
	}
}

// addMap adds what -map names: "80=8080,443=8443".
func addMap(to map[uint16]uint16) func(string) error {
	return func(s string) error {
		for _, part := range strings.Split(s, ",") {
			a, b, ok := strings.Cut(strings.TrimSpace(part), "=")
			if !ok {
				return fmt.Errorf("%q: want PUBLISHED=LOCAL, like 80=8080", part)
			}
			public, err := parsePort(a)
			if err != nil {
				return err
			}
			if to[public], err = parsePort(b); err != nil {
				return err
			}
		}
		return nil
	}
}

// configfile.go: <dir>/config.json. Every mistake in it is told with its line
// and column, which is why it is read token by token.

const maxConfigFile = 1 << 20

// loadConfig reads the file for one host, given in canonical form. That there is
// none is fine. What flags set wins.
func loadConfig(dir, host string, flags config) (*config, error) {
	path := filepath.Join(dir, "config.json")
	c := config{bind: loopback4}
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a fifo must not hang the loop
	if err == nil {
		defer f.Close()
		var body []byte
		body, err = io.ReadAll(io.LimitReader(f, maxConfigFile+1))
		if err == nil && len(body) > maxConfigFile {
			err = fmt.Errorf("%s is over %d bytes long", path, maxConfigFile)
		}
		if err == nil {
			if c, err = parseConfig(body, host); err != nil {
				err = fmt.Errorf("%s:%w", path, err)
			}
			c = c.over(config{bind: loopback4})
		}
	} else if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the configuration: %w", err)
	}
	c = flags.over(c)
	return &c, nil
}

// configReader reads config.json. Its methods panic with a configError.
type configReader struct {
	body []byte
	dec  *json.Decoder
	at   int // where the last token begins
}

type configError struct{ error }

// parseConfig returns what the file sets for host. Errors begin with line and
// column.
func parseConfig(body []byte, host string) (c config, err error) {
	r := &configReader{body: body, dec: json.NewDecoder(bytes.NewReader(body))}
	r.dec.UseNumber()
	defer func() {
		switch e := recover().(type) {
		case nil:
		case configError:
			line := 1 + bytes.Count(body[:r.at], []byte("\n"))
			column := r.at - bytes.LastIndexByte(body[:r.at], '\n')
			err = fmt.Errorf("%d:%d: %w", line, column, e.error)
		default:
			panic(e)
		}
	}()
	r.check()
	var all, own config
	r.object(func(name string) {
		if name == "hosts" {
			r.object(func(name string) {
				at := r.at
				h, err := parseHost(name)
				if err != nil {
					r.fail("%v", err)
				}
				var c config
				r.object(func(name string) { r.setting(&c, name) })
				if h.String() == host {
					if own.mapped != nil {
						r.at = at
						r.fail("%s is here twice", h)
					}
					own = c.over(config{})
				}
			})
			return
		}
		r.setting(&all, name)
	})
	return own.over(all), nil
}

func (r *configReader) fail(format string, args ...any) {
	panic(configError{fmt.Errorf(format, args...)})
}

// next reads a token.
func (r *configReader) next() json.Token {
	r.at = int(r.dec.InputOffset())
	for r.at < len(r.body) && bytes.IndexByte([]byte(" \t\r\n,:"), r.body[r.at]) >= 0 {
		r.at++
	}
	t, err := r.dec.Token()
	if err != nil {
		r.fail("%v", err)
	}
	return t
}

// check sees that all of the body is one JSON value. A decoder that is asked for
// tokens does not tell where in the body a mistake is.
func (r *configReader) check() {
	if json.Valid(r.body) {
		return
	}
	// The byte added is what is wrong with a body that ends too soon.
	err := json.Unmarshal(append(slices.Clip(r.body), 0), new(json.RawMessage))
	var syntax *json.SyntaxError
	if !errors.As(err, &syntax) || int(syntax.Offset) > len(r.body) {
		r.at = len(r.body)
		r.fail("it ends too soon")
	}
	r.at = int(syntax.Offset) - 1
	r.fail("%v", err)
}

func (r *configReader) expect(delim json.Delim, what string) {
	if r.next() != delim {
		r.fail("want %s", what)
	}
}

// object calls member for each name of an object; it has to read the value.
func (r *configReader) object(member func(name string)) {
	r.expect('{', "an object, {…}")
	for r.dec.More() {
		name, ok := r.next().(string)
		if !ok {
			r.fail("want a name")
		}
		member(name)
	}
	r.next()
}

func (r *configReader) array(element func()) {
	r.expect('[', "an array, […]")
	for r.dec.More() {
		element()
	}
	r.next()
}

// text reads a string or a number.
func (r *configReader) text() string {
	switch t := r.next().(type) {
	case string:
		return t
	case json.Number:
		return t.String()
	}
	r.fail("want a string or a number")
	return ""
}

func (r *configReader) port(s string) uint16 {
	p, err := parsePort(s)
	if err != nil {
		r.fail("%v", err)
	}
	return p
}

func (r *configReader) ranges() []portRange {
	all := []portRange{}
	r.array(func() {
		one, err := parseRange(r.text())
		if err != nil {
			r.fail("%v", err)
		}
		all = append(all, one)
	})
	return all
}

// setting reads one setting into c.
func (r *configReader) setting(c *config, name string) {
	switch name {
	case "map":
		c.mapped = make(map[uint16]uint16)
		r.object(func(public string) {
			p := r.port(public)
			c.mapped[p] = r.port(r.text())
		})
	case "skip":
		c.skip = r.ranges()
	case "only":
		c.only = r.ranges()
	case "bind":
		var err error
		if c.bind, err = parseBind(r.text()); err != nil {
			r.fail("%v", err)
		}
	default:
		r.fail("there is no setting %q: want map, skip, only, bind or hosts", name)
	}
}
