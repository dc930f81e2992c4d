package main

// config.go: what a person sets. Which published ports are forwarded, where they listen and under which number: the flags
// of `rdhpf run` win over what <dir>/config.json says for the host, and that wins over what it says for every host. And
// which remote host: parsing what the user or Docker's configuration names, its one canonical form, and the same order of
// precedence as the docker command. A host that parses is safe as an argument of ssh and in a remote shell command.

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/netip"
	"net/url"
	"os"
	"path"
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

const (
	hostForm      = "ssh://[user@]host[:port][/path/to/docker.sock]"
	maxHostPart   = 255     // bytes of a host or user name
	maxSocketPath = 107     // sun_path on Linux, less its NUL
	maxDockerFile = 1 << 20 // bytes of a config.json or meta.json
	userChars     = `.-_+@$~\,=`
	alnum         = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
)

// errNoHost: neither a flag nor Docker's environment and configuration name a remote host.
var errNoHost = errors.New("no host: use -host ssh://user@host, or set DOCKER_HOST or a Docker context")

// The value is never part of this error: it would put the password on the screen and into logs.
var errPassword = errors.New("seems to hold a password, which ssh cannot use: use a key or an agent and write " + hostForm)

// errNotSSH is about a value that names an engine, but in another way than with ssh://.
type errNotSSH struct {
	source string // what the value is
	value  string
}

func (e *errNotSSH) Error() string {
	return fmt.Sprintf("%s is %s: rdhpf needs %s", e.source, shown(e.value), hostForm)
}

// host is a remote Docker host. Only parseHost and resolveHost make one.
type host struct {
	user   string // "" = ssh's default
	name   string // host name, alias of ssh_config as typed (ssh tells cases apart there), or IP (IPv6 without brackets)
	port   uint16 // 0 = ssh's default: 22, or what ssh_config says
	socket string // absolute path of the engine's socket on the remote, "" = the remote docker's default
}

// String is the canonical form: two hosts with the same one share an instance.
func (h host) String() string {
	s := strings.ToLower(h.name)
	if strings.Contains(s, ":") {
		s = "[" + strings.Replace(h.name, "%", "%25", 1) + "]"
	}
	if h.user != "" {
		s = url.User(h.user).String() + "@" + s
	}
	if h.port != 0 {
		s += ":" + strconv.Itoa(int(h.port))
	}
	return "ssh://" + s + h.socket
}

// sshArgs are the last arguments of an ssh command line; only a remote command may follow.
func (h host) sshArgs() []string {
	var args []string
	if h.user != "" {
		args = append(args, "-l", h.user)
	}
	if h.port != 0 {
		args = append(args, "-p", strconv.Itoa(int(h.port)))
	}
	return append(args, "--", h.name)
}

// command is the arguments of ssh as a person would write them.
func (h host) command() string {
	s := h.name
	if h.user != "" {
		s = h.user + "@" + s
	}
	if h.port != 0 {
		s = fmt.Sprintf("-p %d %s", h.port, s)
	}
	return s
}

// parseHost accepts hostForm; without a path, "ssh://" may be left out. Its errors are one line of plain ASCII, no password.
func parseHost(s string) (host, error) { return parseHostOf("the host", s, false) }

// parseHostOf is parseHost with what the errors call the value, and a say in whether the scheme may be missing.
func parseHostOf(source, s string, needScheme bool) (host, error) {
	scheme, rest, ok := strings.Cut(s, "://")
	isScheme := ok && scheme != "" && badChar(scheme, "+.-") == ""
	if ok = ok && strings.EqualFold(scheme, "ssh"); !ok {
		if isScheme || needScheme {
			return host{}, &errNotSSH{source, s}
		}
		rest = s
	}
	h, err := parseRest(rest, ok)
	if err == nil {
		return h, nil
	}
	// A password may hold the very characters that made another check fail first.
	if at := strings.LastIndex(rest, "@"); at >= 0 && strings.Contains(rest[:at], ":") {
		err = errPassword
	}
	return host{}, fmt.Errorf("%s %w", source, err)
}

// parseRest parses what follows the scheme. Its errors are predicates: "has no host name".
func parseRest(rest string, mayHavePath bool) (h host, err error) {
	for _, r := range rest {
		if r <= ' ' || r >= 0x7f {
			return h, fmt.Errorf("has the character %+q: write %s in plain ASCII without spaces", r, hostForm)
		}
		if r == '?' || r == '#' {
			return h, fmt.Errorf("has a query or fragment (%c): write %s", r, hostForm)
		}
	}
	authority, socket, hasPath := strings.Cut(rest, "/")
	if hasPath && !mayHavePath {
		return h, errors.New("has a path but no scheme: write " + hostForm)
	}
	if at := strings.LastIndex(authority, "@"); at >= 0 {
		user := authority[:at]
		authority = authority[at+1:]
		if strings.ContainsAny(user, ":@") {
			return h, errors.New("has more than a name before the last @: write an @ of the user name as %40")
		}
		if h.user, err = url.PathUnescape(user); err != nil {
			return h, fmt.Errorf("has a bad user name: %w", err)
		}
		if err = checkPart("user name", h.user, userChars, maxHostPart); err != nil {
			return h, err
		}
	}
	name, port, hasPort := strings.Cut(authority, ":")
	if strings.HasPrefix(authority, "[") && strings.Contains(authority, "]") {
		if h.name, port, hasPort, err = parseBrackets(authority); err != nil {
			return h, err
		}
	} else if strings.Contains(port, ":") {
		// Even a valid address: "::1:2222" is one too, and hardly the one that was meant.
		return h, errors.New("has more than one colon: write an IPv6 address in brackets, ssh://[::1]:2222")
	} else if err = checkPart("host name", name, ".-_", maxHostPart); err != nil {
		return h, err
	} else {
		h.name = name
	}
	if hasPort {
		if h.port, err = parsePort(port); err != nil {
			return h, errors.New("has a bad port: write host:port with a port from 1 to 65535")
		}
		if h.port == 22 {
			h.port = 0
		}
	}
	if h.socket, err = url.PathUnescape("/" + socket); err != nil {
		return h, fmt.Errorf("has a bad socket path: %w", err)
	}
	if h.socket = path.Clean(h.socket); h.socket == "/" {
		h.socket = ""
		return h, nil
	}
	return h, checkPart("socket path", h.socket, "._/+@:=~-", maxSocketPath)
}

// parseBrackets parses "[IPv6]" or "[IPv6]:port".
func parseBrackets(authority string) (name, port string, hasPort bool, err error) {
	name, port, _ = strings.Cut(authority[1:], "]")
	port, hasPort = strings.CutPrefix(port, ":")
	ip, err := netip.ParseAddr(strings.Replace(name, "%25", "%", 1)) // a zone follows %25 in a URL, else %
	if err != nil || !ip.Is6() || len(name) > maxHostPart || badChar(ip.Zone(), ".-_") != "" || !hasPort && port != "" {
		return "", "", false, errors.New("has no IPv6 address in its brackets, or more than :port after them: write ssh://[fe80::1%25eth0]:2222")
	}
	return ip.String(), port, hasPort, nil
}

// checkPart allows ASCII letters, digits and others, and nothing that ssh would take for an option.
func checkPart(what, s, others string, maxLen int) error {
	switch c := badChar(s, others); {
	case s == "":
		return fmt.Errorf("has no %s: write %s", what, hostForm)
	case len(s) > maxLen:
		return fmt.Errorf("has a %s longer than %d bytes", what, maxLen)
	case s[0] == '-' || s[0] == '.':
		return fmt.Errorf("has a %s that begins with %q: write %s", what, s[0], hostForm)
	case c != "":
		return fmt.Errorf("has %s in the %s: only letters, digits and %s are allowed there", c, what, others)
	}
	return nil
}

// badChar returns, quoted, the first character of s that is not an ASCII letter, a digit or in others; "" if there is none.
func badChar(s, others string) string {
	for _, r := range s {
		if !strings.ContainsRune(alnum+others, r) {
			return fmt.Sprintf("%+q", r)
		}
	}
	return ""
}

// shown is a value of another scheme as an error may show it: whole only if it is harmless and cannot hold a password.
func shown(s string) string {
	if s != "" && len(s) <= 200 && badChar(s, `._/+:=~-[]%\`) == "" {
		return s
	}
	if scheme, _, ok := strings.Cut(s, "://"); ok && len(scheme) <= 20 && badChar(scheme, "+.-") == "" {
		return "a " + scheme + ":// address"
	}
	return "not an ssh:// address"
}

// resolveHost finds the host as the docker command does: the flag, else DOCKER_HOST, else the context that DOCKER_CONTEXT
// or, failing that, currentContext of config.json names.
func resolveHost(flag string, getenv func(string) string, home string) (host, error) {
	if flag != "" {
		return parseHostOf("-host", flag, false)
	}
	if s := getenv("DOCKER_HOST"); s != "" {
		return parseHostOf("DOCKER_HOST", s, true) // docker takes one without a scheme for tcp
	}
	dir := getenv("DOCKER_CONFIG")
	if dir == "" {
		dir = filepath.Join(home, ".docker")
	}
	name, from := getenv("DOCKER_CONTEXT"), "DOCKER_CONTEXT"
	if name == "" {
		var config struct{ CurrentContext string }
		from = filepath.Join(dir, "config.json")
		if err := readDockerJSON(from, &config); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return host{}, fmt.Errorf("reading Docker's configuration: %w; fix it or use -host", err)
		}
		name = config.CurrentContext
	}
	if name == "" || name == "default" {
		return host{}, fmt.Errorf("%w (the Docker context is the default one, which is the local engine)", errNoHost)
	}
	file := filepath.Join(dir, "contexts", "meta", fmt.Sprintf("%x", sha256.Sum256([]byte(name))), "meta.json")
	var meta struct {
		Endpoints map[string]struct{ Host string }
	}
	if err := readDockerJSON(file, &meta); errors.Is(err, fs.ErrNotExist) {
		return host{}, fmt.Errorf("the Docker context %+q (from %s) was not found: no file %s; see docker context ls, or use -host", name, from, file)
	} else if err != nil {
		return host{}, fmt.Errorf("reading Docker context %+q (from %s): %w; fix it or use -host", name, from, err)
	}
	return parseHostOf(fmt.Sprintf("the host of Docker context %+q (in %s)", name, file), meta.Endpoints["docker"].Host, true)
}

// readDockerJSON leaves v alone if the file is empty, as docker does. Every error names the file.
func readDockerJSON(file string, v any) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxDockerFile+1))
	if err != nil || len(b) == 0 {
		return err
	}
	if len(b) > maxDockerFile {
		return fmt.Errorf("%s is larger than %d bytes", file, maxDockerFile)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	return nil
}
