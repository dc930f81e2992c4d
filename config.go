package main

// What a person sets: which published ports are forwarded, where they listen and under which number. The flags of
// `rdhpf run` win over what <dir>/config.json says for the host, and that wins over what it says for every host.

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

const maxConfigFile = 1 << 20

// bothLoopbacks is where ports listen unless -bind says otherwise: browsers and Node try ::1 first.
var bothLoopbacks = []netip.Addr{loopback4, loopback6}

// portRange is a range of published ports, both ends included.
type portRange struct{ first, last uint16 }

// config decides where a published port is forwarded to. It never changes once in use: a reload makes a new one.
// A nil field is not set.
type config struct {
	bind    []netip.Addr // empty: both loopbacks
	mapped  map[uint16]uint16
	skip    []portRange
	only    []portRange // empty: every port
	noProbe []portRange
}

// over returns cfg with whatever it does not set taken from base. Mappings add up.
func (cfg config) over(base config) config {
	mapped := make(map[uint16]uint16)
	maps.Copy(mapped, base.mapped)
	maps.Copy(mapped, cfg.mapped)
	cfg.mapped = mapped
	if cfg.bind == nil {
		cfg.bind = base.bind
	}
	if cfg.skip == nil {
		cfg.skip = base.skip
	}
	if cfg.only == nil {
		cfg.only = base.only
	}
	if cfg.noProbe == nil {
		cfg.noProbe = base.noProbe
	}
	return cfg
}

// addrs returns the addresses to listen on, at least one.
func (cfg *config) addrs() []netip.Addr {
	if len(cfg.bind) == 0 {
		return bothLoopbacks
	}
	return cfg.bind
}

// others returns the addresses to listen on besides the one that local returns.
func (cfg *config) others() []netip.Addr { return cfg.addrs()[1:] }

// local returns the local address of a published port, or the reason why it has none.
func (cfg *config) local(public uint16) (netip.AddrPort, string) {
	switch {
	case has(cfg.skip, public):
		return netip.AddrPort{}, "excluded by -skip"
	case len(cfg.only) > 0 && !has(cfg.only, public):
		return netip.AddrPort{}, "not in -only"
	}
	local := public
	if m, ok := cfg.mapped[public]; ok {
		local = m
	}
	return netip.AddrPortFrom(cfg.addrs()[0], local), ""
}

// excludes reports whether the settings leave a published port out.
func (cfg *config) excludes(public uint16) bool {
	_, reason := cfg.local(public)
	return reason != ""
}

func has(ranges []portRange, port uint16) bool {
	return slices.ContainsFunc(ranges, func(r portRange) bool { return r.first <= port && port <= r.last })
}

// parsePort reads a port from 1 to 65535.
func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%q is not a port: want a number from 1 to 65535", s)
	}
	return uint16(n), nil
}

// parseRange reads "80" or "8000-8099".
func parseRange(s string) (portRange, error) {
	from, to, isRange := strings.Cut(s, "-")
	if !isRange {
		to = from
	}
	first, err := parsePort(from)
	if err != nil {
		return portRange{}, err
	}
	last, err := parsePort(to)
	if err != nil {
		return portRange{}, err
	}
	if first > last {
		return portRange{}, fmt.Errorf("the range %q ends before it begins", s)
	}
	return portRange{first, last}, nil
}

// addRanges adds what a flag lists: "80,8000-8099".
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

// addMaps adds what -map lists: "80=8080,443=8443".
func addMaps(to map[uint16]uint16) func(string) error {
	return func(s string) error {
		for _, part := range strings.Split(s, ",") {
			public, local, ok := strings.Cut(strings.TrimSpace(part), "=")
			if !ok {
				return errors.New("want PUBLISHED=LOCAL, such as 80=8080")
			}
			if err := addMap(to, public, local); err != nil {
				return err
			}
		}
		return nil
	}
}

func addMap(to map[uint16]uint16, public, local string) error {
	from, err := parsePort(public)
	if err != nil {
		return err
	}
	port, err := parsePort(local)
	if old, ok := to[from]; ok && err == nil && old != port {
		return fmt.Errorf("port %d is mapped twice, to %d and to %d", from, old, port)
	}
	to[from] = port
	return err
}

// addAddresses adds what -bind lists: "127.0.0.1,::1".
func addAddresses(to *[]netip.Addr) func(string) error {
	return func(s string) error {
		for _, part := range strings.Split(s, ",") {
			a, err := netip.ParseAddr(strings.TrimSpace(part))
			if err != nil || a.Zone() != "" {
				return fmt.Errorf("%q is not an address: want one like 127.0.0.1 or ::1", part)
			}
			if a = a.Unmap(); !slices.Contains(*to, a) {
				*to = append(*to, a)
			}
		}
		return nil
	}
}

// loadConfig reads config.json for one host, given in canonical form; it need not exist. The flags win.
func loadConfig(dir, host string, flags config) (*config, error) {
	path := filepath.Join(dir, "config.json")
	body, err := readConfig(path)
	if errors.Is(err, fs.ErrNotExist) {
		cfg := flags.over(config{})
		return &cfg, nil
	} else if err != nil {
		return nil, fmt.Errorf("reading the configuration: %w", err)
	}
	file, err := parseConfig(body, host)
	if err != nil {
		return nil, fmt.Errorf("reading the configuration: %s:%w", path, err)
	}
	cfg := flags.over(file)
	return &cfg, nil
}

func readConfig(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a FIFO must not block the loop
	if err != nil {
		return nil, err
	}
	defer f.Close()
	body, err := io.ReadAll(io.LimitReader(f, maxConfigFile+1))
	if err == nil && len(body) > maxConfigFile {
		err = fmt.Errorf("%s is longer than %d bytes", path, maxConfigFile)
	}
	return body, err
}

// parseConfig returns what config.json sets for host. An error begins with the number of the line: that of a syntax
// error, or that of the setting whose value is wrong.
func parseConfig(body []byte, host string) (config, error) {
	var syntax *json.SyntaxError
	if err := json.Unmarshal(body, new(json.RawMessage)); errors.As(err, &syntax) {
		return config{}, fmt.Errorf("%d: %w", lineAt(body, syntax.Offset-1), err)
	}
	var all, own config
	var found bool
	dec := json.NewDecoder(bytes.NewReader(body))
	begin := int64(0)
	err := eachMember(dec, func(name string) error {
		begin = dec.InputOffset()
		if name != "hosts" {
			return all.set(dec, name)
		}
		return eachMember(dec, func(name string) error {
			begin = dec.InputOffset()
			h, err := parseHost(name)
			if err != nil {
				return err
			}
			var one config
			err = eachMember(dec, func(name string) error {
				begin = dec.InputOffset()
				return one.set(dec, name)
			})
			if h.String() != host || err != nil {
				return err
			}
			if found {
				return fmt.Errorf("%s is listed twice", h)
			}
			own, found = one, true
			return nil
		})
	})
	if err != nil {
		return config{}, fmt.Errorf("%d: %w", lineAt(body, begin), err)
	}
	return own.over(all), nil
}

// lineAt returns the number of the line in which the byte at offset is.
func lineAt(body []byte, offset int64) int {
	return 1 + bytes.Count(body[:max(0, min(offset, int64(len(body))))], []byte("\n"))
}

// eachMember calls read with each name of the JSON object that comes next; read decodes the value.
func eachMember(dec *json.Decoder, read func(name string) error) error {
	if token, err := dec.Token(); err != nil || token != json.Delim('{') {
		return errors.New("want an object, {…}")
	}
	for dec.More() {
		name, err := dec.Token()
		if err != nil {
			return err
		}
		if err := read(name.(string)); err != nil {
			return err
		}
	}
	_, err := dec.Token()
	return err
}

// set decodes the setting of that name.
func (cfg *config) set(dec *json.Decoder, name string) error {
	switch name {
	case "map":
		var members map[string]scalar
		if err := dec.Decode(&members); err != nil {
			return errors.New(`"map": want an object like {"80": 8080}`)
		}
		cfg.mapped = make(map[uint16]uint16)
		for _, public := range slices.Sorted(maps.Keys(members)) {
			if err := addMap(cfg.mapped, public, string(members[public])); err != nil {
				return fmt.Errorf("%q: %w", name, err)
			}
		}
		return nil
	case "skip":
		return setList(dec, name, &cfg.skip, addRanges)
	case "only":
		return setList(dec, name, &cfg.only, addRanges)
	case "no_probe":
		return setList(dec, name, &cfg.noProbe, addRanges)
	case "bind":
		return setList(dec, name, &cfg.bind, addAddresses)
	}
	return fmt.Errorf("unknown setting %q: want map, skip, only, no_probe, bind or hosts", name)
}

// setList decodes a list, or a single element of one, with the parser that the flag of the same name has.
func setList[T any](dec *json.Decoder, name string, to *[]T, parser func(*[]T) func(string) error) error {
	var list scalars
	if err := dec.Decode(&list); err != nil {
		return fmt.Errorf("%q: want a list of strings or numbers", name)
	}
	*to = []T{}
	add := parser(to)
	for _, text := range list {
		if err := add(string(text)); err != nil {
			return fmt.Errorf("%q: %w", name, err)
		}
	}
	return nil
}

// scalar is the text of a JSON string or number: 80 and "80" are the same.
type scalar string

func (text *scalar) UnmarshalJSON(body []byte) error {
	switch first := body[0]; {
	case first == '"':
		return json.Unmarshal(body, (*string)(text))
	case first == '-' || '0' <= first && first <= '9':
		*text = scalar(body)
		return nil
	}
	return errors.New("want a string or a number")
}

// scalars is a list of them; one alone needs no brackets.
type scalars []scalar

func (list *scalars) UnmarshalJSON(body []byte) error {
	if body[0] == '[' {
		return json.Unmarshal(body, (*[]scalar)(list))
	}
	*list = make(scalars, 1)
	return json.Unmarshal(body, &(*list)[0])
}
