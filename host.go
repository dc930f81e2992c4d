package main

// Which remote host: parsing what the user or Docker's configuration names, its one canonical form, and the same order
// of precedence as the docker command. A host that parses is safe as an argument of ssh and in a remote shell command.

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
)

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
