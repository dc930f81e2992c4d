package main

// Tests of config.go: what config.json may say, and that a mistake in it is reported with its line; which hosts parse and to
// what, what is refused and how it is said, where the default host comes from.

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"unicode"
)

const configHost = "ssh://me@box"

func configText(c config) string {
	return fmt.Sprintf("bind %v map %v skip %v only %v no-probe %v", c.bind, c.mapped, c.skip, c.only, c.noProbe)
}

func TestParseConfig(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"nothing set", `{}`, "bind [] map map[] skip [] only [] no-probe []"},
		{"space around", "\r\n\t {  } \n\n", "bind [] map map[] skip [] only [] no-probe []"},
		{"map, numbers and strings", `{"map": {"80": 8080, "443": "8443"}}`, "bind [] map map[80:8080 443:8443] skip [] only [] no-probe []"},
		{"ranges, numbers and strings", `{"skip": [22, "25", "8000-8099"], "only": ["1-65535"]}`,
			"bind [] map map[] skip [{22 22} {25 25} {8000 8099}] only [{1 65535}] no-probe []"},
		{"empty ones", `{"map": {}, "skip": [], "only": [], "hosts": {}}`, "bind [] map map[] skip [] only [] no-probe []"},
		{"bind", `{"bind": "127.0.0.2"}`, "bind [127.0.0.2] map map[] skip [] only [] no-probe []"},
		{"bind to IPv6", `{"bind": "::1"}`, "bind [::1] map map[] skip [] only [] no-probe []"},
		{"bind to IPv4 in IPv6", `{"bind": "::ffff:127.0.0.1"}`, "bind [127.0.0.1] map map[] skip [] only [] no-probe []"},
		{"bind to several", `{"bind": ["127.0.0.1", "::1", "127.0.0.1"]}`, "bind [127.0.0.1 ::1] map map[] skip [] only [] no-probe []"},
		{"bind to the default again", `{"bind": "10.0.0.1", "hosts": {"me@box": {"bind": []}}}`, "bind [] map map[] skip [] only [] no-probe []"},
		{"no probe", `{"no_probe": [2345, "9000-9009"]}`, "bind [] map map[] skip [] only [] no-probe [{2345 2345} {9000 9009}]"},
		{"one without brackets", `{"skip": 80, "only": "1-99"}`, "bind [] map map[] skip [{80 80}] only [{1 99}] no-probe []"},
		{"escapes", `{"\u0062ind": "127\u002e0.0.1"}`, "bind [127.0.0.1] map map[] skip [] only [] no-probe []"},
		{"another host", `{"bind": "::1", "hosts": {"ssh://you@box": {"bind": "127.0.0.9", "skip": [1]}}}`,
			"bind [::1] map map[] skip [] only [] no-probe []"},
		{"this host, in any form", `{"hosts": {"me@BOX:22": {"bind": "127.0.0.3"}}}`, "bind [127.0.0.3] map map[] skip [] only [] no-probe []"},
		{"a host over all", `{"hosts": {"me@box": {"map": {"80": 81}, "skip": [5], "bind": "127.0.0.3"}},
			"map": {"80": 8080, "90": 9090}, "skip": [1], "only": [7], "bind": "127.0.0.2"}`,
			"bind [127.0.0.3] map map[80:81 90:9090] skip [{5 5}] only [{7 7}] no-probe []"},
		{"a host unsets", `{"skip": [1], "only": [7], "hosts": {"me@box": {"skip": [], "only": []}}}`,
			"bind [] map map[] skip [] only [] no-probe []"},
		{"hosts twice", `{"hosts": {"me@box": {"skip": [5]}}, "hosts": {"you@box": {"skip": [6]}}}`,
			"bind [] map map[] skip [{5 5}] only [] no-probe []"},
	} {
		got, err := parseConfig([]byte(c.in), configHost)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
		} else if g := configText(got); g != c.want {
			t.Errorf("%s:\n got %s\nwant %s", c.name, g, c.want)
		}
	}
}

// In the body of these, « stands in the line that the error has to name.
func TestParseConfigMistakes(t *testing.T) {
	const noPort = "not a port: want a number from 1 to 65535"
	for _, c := range []struct{ name, in, want string }{
		{"empty", `«`, "unexpected end of JSON input"},
		{"space only", "\n « \n", "unexpected end of JSON input"},
		{"only a brace", `{«`, "unexpected end of JSON input"},
		{"truncated in a string", "{\n  \"only\": [80],\n  \"bind\": \"12«", "unexpected end of JSON input"},
		{"truncated in a literal", "{\n  \"bind\": tru«", "in literal true"},
		{"truncated after a colon", "{\n  \"map\":«", "unexpected end of JSON input"},
		{"truncated after a newline", "{\n « \"map\":\n", "unexpected end of JSON input"},
		{"an array", " «[]", "want an object, {…}"},
		{"null", "«null", "want an object, {…}"},
		{"a string", "«\n\"x\"", "want an object, {…}"},
		{"byte order mark", "«\xef\xbb\xbf{}", "invalid character"},
		{"binary", "«\x00\x01\x02\xff\xfe", "invalid character"},
		{"bare word", "{\n  \"bind\": «x}", "invalid character 'x' looking for beginning of value"},
		{"broken literal", "{\n  \"only\": [80],\n  \"bind\": tru«}", "in literal true"},
		{"no comma in an array", `{"skip": [1, 2 «3]}`, "after array element"},
		{"no comma in an object", `{"bind": "127.0.0.1" «"skip": []}`, "after object key:value pair"},
		{"comma at the end of an array", `{"skip": [1, 2, «]}`, "looking for beginning of value"},
		{"comma at the end of an object", "{\n\n  \"map\": {\"80\": 8080,\n«},\n}", "looking for beginning of object key"},
		{"wrong bracket", `{"skip": [1«}`, "after array element"},
		{"a name that is none", `{«1: 2}`, "looking for beginning of object key"},
		{"no colon", `{"bind" «5}`, "after object key"},
		{"control character in a string", "{\"bind\": \"a«\x01\"}", "in string literal"},
		{"newline in a string", "{\"bind\": \"a«\n\"}", "in string literal"},
		{"bad escape", `{"bind": "\«q"}`, "in string escape code"},
		{"hexadecimal", "{\n  \"only\": [80],\n  \"skip\": [90, 0«xff]}", "after array element"},
		{"comment", "{\n  «// ports\n  \"skip\": []}", "looking for beginning of object key"},
		{"garbage after the end", "{}\n«x", "invalid character 'x'"},
		{"bracket after the end", "{}«]", "invalid character ']'"},
		{"another object after the end", "{\"bind\": \"::1\"}\n\n «{}", "invalid character '{'"},
		{"unknown setting", "{\n  \"skip\": [],\n  «\"ports\": [80]\n}", `unknown setting "ports": want map, skip, only, no_probe, bind`},
		{"setting in the wrong case", `{«"Skip": [80]}`, `unknown setting "Skip"`},
		{"bad port of no_probe", "{\n«\"no_probe\": [\n1,\n\"x\"]}", `"no_probe": "x" is ` + noPort},
		{"unknown setting of a host", `{"hosts": {"a": {"skip": [], «"x": 1}}}`, `unknown setting "x"`},
		{"hosts in a host", `{"hosts": {"a": {«"hosts": {}}}}`, `unknown setting "hosts"`},
		{"hostile setting", "{«\"a\\u001b[31m\\n\": 1}", `unknown setting "a\x1b[31m\n"`},
		{"map as an array", `{"map": «[80]}`, `want an object like {"80": 8080}`},
		{"map to null", `{"map": {"80": «null}}`, `want an object like`},
		{"map to an array", `{"map": {"80": «[1]}}`, `want an object like`},
		{"map of port 0", `{"map": {«"0": 80}}`, `"0" is ` + noPort},
		{"map of no number", `{"map": {"80": 81, «"abc": 80}}`, `"abc" is ` + noPort},
		{"map of a range", `{"map": {«"80-90": 80}}`, `"80-90" is ` + noPort},
		{"map to 0", `{"map": {"80": «0}}`, `"0" is ` + noPort},
		{"map to 70000", "{\n«\"map\": {\n\t\"80\":\n\t\t70000}}", `"70000" is ` + noPort},
		{"map to abc", `{"map": {"80": «"abc"}}`, `"abc" is ` + noPort},
		{"map to less than nothing", `{"map": {"80": «-1}}`, `"-1" is ` + noPort},
		{"map to a fraction", `{"map": {"80": «80.5}}`, `"80.5" is ` + noPort},
		{"map to a power", `{"map": {"80": «1e3}}`, `"1e3" is ` + noPort},
		{"skip as an object", `{"skip": «{}}`, "want a list of strings or numbers"},
		{"skip true", `{"skip": [1,«true]}`, "want a list of strings or numbers"},
		{"skip in skip", `{"skip": [«[1]]}`, "want a list of strings or numbers"},
		{"range backwards", `{"only": [1, «"90-80"]}`, `the range "90-80" ends before it begins`},
		{"range without an end", `{"only": [«"80-"]}`, `"" is ` + noPort},
		{"range of three", `{"only": [«"1-2-3"]}`, `"2-3" is ` + noPort},
		{"range with space", `{"only": [«"1 - 2"]}`, `"1 " is ` + noPort},
		{"bind to a name", `{"bind": «"localhost"}`, `"localhost" is not an address`},
		{"bind to nothing", `{"bind": «""}`, `"" is not an address`},
		{"bind to a zone", `{"bind": «"fe80::1%eth0"}`, `is not an address`},
		{"bind with a port", `{"bind": «"127.0.0.1:80"}`, `is not an address`},
		{"bind null", `{"bind":   «null}`, "want a list of strings or numbers"},
		{"bind object", `{"bind":«{}}`, "want a list of strings or numbers"},
		{"bad host", `{"hosts": {«"tcp://box:2375": {}}}`, "rdhpf needs ssh://"},
		{"host with a space", `{"hosts": {"a": {}, «"a b": {}}}`, "has the character ' '"},
		{"host with a password", `{"hosts": {«"ssh://me:secret@box": {}}}`, "seems to hold a password"},
		{"host as an array", `{"hosts": {"a": «[]}}`, "want an object, {…}"},
		{"hosts as an array", `{"hosts": «[]}`, "want an object, {…}"},
		{"host twice", "{\"hosts\": {\"me@box\": {},\n \"a\": {},\n «\"ssh://me@BOX:22/\": {}}}", "ssh://me@box is listed twice"},
		{"mistake in the part for another host", `{"hosts": {"other": {"skip": [«0]}}}`, `"0" is ` + noPort},
	} {
		before, after, ok := strings.Cut(c.in, "«")
		if !ok {
			t.Fatalf("%s: the case has no mark", c.name)
		}
		where := fmt.Sprintf("%d: ", 1+strings.Count(before, "\n"))
		_, err := parseConfig([]byte(before+after), configHost)
		switch {
		case err == nil:
			t.Errorf("%s: %q was accepted", c.name, before+after)
		case !strings.HasPrefix(err.Error(), where) || !strings.Contains(err.Error(), c.want):
			t.Errorf("%s: %q:\n got %v\nwant %s… %s", c.name, before+after, err, where, c.want)
		case strings.Contains(err.Error(), "secret"):
			t.Errorf("%s: the password is in %q", c.name, err)
		}
	}
}

func TestLoadConfig(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "config.json")
	flags := config{mapped: map[uint16]uint16{80: 1080}}
	load := func(t *testing.T, flags config, want string) {
		t.Helper()
		if c, err := loadConfig(dir, configHost, flags); err != nil {
			t.Error(err)
		} else if got := configText(*c); got != want {
			t.Errorf("\n got %s\nwant %s", got, want)
		}
	}
	fails := func(t *testing.T, want ...string) {
		t.Helper()
		c, err := loadConfig(dir, configHost, flags)
		if err == nil || c != nil {
			t.Fatalf("got %v, %v", c, err)
		}
		for _, w := range append(want, "reading the configuration: ", path) {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%q is not in %q", w, err)
			}
		}
		if strings.ContainsAny(err.Error(), "\n\x1b") {
			t.Errorf("%q is not one plain line", err)
		}
	}
	write := func(t *testing.T, body []byte) {
		t.Helper()
		if err := os.WriteFile(path, body, 0o600); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.Remove(path) })
	}
	full := []byte(`{"map": {"80": 8080, "90": 9090}, "skip": [1], "only": [2], "bind": "127.0.0.2", "hosts": {"me@box": {"map": {"90": 99}, "bind": "127.0.0.3"}}}`)

	t.Run("no file", func(t *testing.T) {
		load(t, flags, "bind [] map map[80:1080] skip [] only [] no-probe []")
		load(t, config{}, "bind [] map map[] skip [] only [] no-probe []")
	})
	t.Run("no folder", func(t *testing.T) {
		if c, err := loadConfig(filepath.Join(dir, "none"), configHost, flags); err != nil || c.bind != nil {
			t.Errorf("got %v, %v", c, err)
		}
	})
	t.Run("file", func(t *testing.T) {
		write(t, full)
		load(t, config{}, "bind [127.0.0.3] map map[80:8080 90:99] skip [{1 1}] only [{2 2}] no-probe []")
	})
	t.Run("flags win", func(t *testing.T) {
		write(t, full)
		load(t, config{bind: []netip.Addr{loopback6}, mapped: map[uint16]uint16{90: 1090}, skip: []portRange{{3, 4}}, only: []portRange{{5, 5}}},
			"bind [::1] map map[80:8080 90:1090] skip [{3 4}] only [{5 5}] no-probe []")
		load(t, flags, "bind [127.0.0.3] map map[80:1080 90:99] skip [{1 1}] only [{2 2}] no-probe []")
		if flags.bind != nil || len(flags.mapped) != 1 {
			t.Errorf("the flags were changed: %v", configText(flags))
		}
	})
	t.Run("mistake", func(t *testing.T) {
		write(t, []byte("{\n  \"skip\": [0]\n}\n"))
		fails(t, path+":2: ")
	})
	t.Run("empty", func(t *testing.T) {
		write(t, nil)
		fails(t, path+":1: ")
	})
	t.Run("as long as it may be", func(t *testing.T) {
		write(t, append([]byte(`{"skip": [7]}`), bytes.Repeat([]byte(" "), maxConfigFile-len(`{"skip": [7]}`))...))
		load(t, config{}, "bind [] map map[] skip [{7 7}] only [] no-probe []")
	})
	t.Run("a byte longer", func(t *testing.T) {
		write(t, append([]byte(`{"skip": [7]}`), bytes.Repeat([]byte(" "), maxConfigFile-len(`{"skip": [7]}`)+1)...))
		fails(t, strconv.Itoa(maxConfigFile))
	})
	t.Run("deep", func(t *testing.T) {
		write(t, append([]byte(`{"skip": `), bytes.Repeat([]byte("["), maxConfigFile/2)...))
		fails(t, path+":1:")
	})
	t.Run("directory", func(t *testing.T) {
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
		defer os.Remove(path)
		fails(t, "is a directory")
	})
	t.Run("symlink to nothing", func(t *testing.T) {
		if err := os.Symlink("none", path); err != nil {
			t.Fatal(err)
		}
		defer os.Remove(path)
		load(t, flags, "bind [] map map[80:1080] skip [] only [] no-probe []")
	})
	t.Run("loop of symlinks", func(t *testing.T) {
		if err := os.Symlink("config.json", path); err != nil {
			t.Fatal(err)
		}
		defer os.Remove(path)
		fails(t, "symbolic links")
	})
	t.Run("unreadable", func(t *testing.T) {
		write(t, full)
		if err := os.Chmod(path, 0); err != nil {
			t.Fatal(err)
		}
		if f, err := os.Open(path); err == nil {
			f.Close()
			t.Skip("modes mean nothing to this user")
		}
		fails(t, "permission denied")
	})
}

var configPlace = regexp.MustCompile(`^([0-9]+): (.+)$`)

func FuzzConfig(f *testing.F) {
	f.Add([]byte(`{"map": {"80": 8080}, "skip": [22, "8000-8099"], "only": ["1-65535"], "bind": "::1", "hosts": {"me@box": {"skip": []}}}`))
	f.Add([]byte("{\n  \"skip\": [0]\n}\n"))
	f.Add([]byte("{\n  \"bind\": tru}"))
	f.Add([]byte(`{"hosts": {"me@box": {}, "me@BOX": {}}} x`))
	f.Add([]byte(`{"hosts": {"tcp://x": null}}`))
	f.Add([]byte("\xef\xbb\xbf{}"))
	f.Add([]byte(`{"skip": [[[[[`))
	f.Fuzz(func(t *testing.T, body []byte) {
		c, err := parseConfig(body, configHost)
		if err == nil {
			for from, to := range c.mapped {
				if from == 0 || to == 0 {
					t.Errorf("%q maps %d to %d", body, from, to)
				}
			}
			for _, r := range append(c.skip, c.only...) {
				if r.first == 0 || r.first > r.last {
					t.Errorf("%q has the range %v", body, r)
				}
			}
			return
		}
		m := configPlace.FindStringSubmatch(err.Error())
		if m == nil {
			t.Fatalf("%q: %q does not begin with a place", body, err)
		}
		if line, _ := strconv.Atoi(m[1]); line < 1 || line > 1+bytes.Count(body, []byte("\n")) {
			t.Errorf("%q: %q is not a line of it", body, err)
		}
		if strings.ContainsFunc(m[2], unicode.IsControl) {
			t.Errorf("%q: %q has control characters", body, err)
		}
	})
}

func TestConfigAddrs(t *testing.T) {
	four, six := netip.MustParseAddr("127.0.0.2"), netip.MustParseAddr("fd00::1")
	for _, c := range []struct {
		bind []netip.Addr
		want string
	}{
		{nil, "127.0.0.1:80 [::1]"},
		{[]netip.Addr{}, "127.0.0.1:80 [::1]"},
		{[]netip.Addr{four}, "127.0.0.2:80 []"},
		{[]netip.Addr{six, four}, "[fd00::1]:80 [127.0.0.2]"},
	} {
		cfg := &config{bind: c.bind}
		at, _ := cfg.local(80)
		if got := fmt.Sprint(at, cfg.others()); got != c.want || fmt.Sprint(cfg.addrs()) != fmt.Sprint(append([]netip.Addr{at.Addr()}, cfg.others()...)) {
			t.Errorf("%v: %s %v, want %s", c.bind, got, cfg.addrs(), c.want)
		}
	}
}

func TestParseHostAccepts(t *testing.T) {
	long := strings.Repeat("a", 255)
	for _, c := range []struct {
		in, canonical string
		want          host
		args          string // joined by spaces, which no argument holds
	}{
		{"ssh://me@example.com", "ssh://me@example.com", host{user: "me", name: "example.com"}, "-l me -- example.com"},
		{"SSH://Me@Example.COM", "ssh://Me@example.com", host{user: "Me", name: "Example.COM"}, "-l Me -- Example.COM"},
		{"ssh://example.com/", "ssh://example.com", host{name: "example.com"}, "-- example.com"},
		{"ssh://h//", "ssh://h", host{name: "h"}, "-- h"},
		{"h", "ssh://h", host{name: "h"}, "-- h"},
		{"my_alias-2", "ssh://my_alias-2", host{name: "my_alias-2"}, "-- my_alias-2"},
		{"me@h", "ssh://me@h", host{user: "me", name: "h"}, "-l me -- h"},
		{"me@h:2222", "ssh://me@h:2222", host{user: "me", name: "h", port: 2222}, "-l me -p 2222 -- h"},
		{"h:2222", "ssh://h:2222", host{name: "h", port: 2222}, "-p 2222 -- h"},
		{"h:22", "ssh://h", host{name: "h"}, "-- h"},
		{"ssh://h:0022", "ssh://h", host{name: "h"}, "-- h"},
		{"ssh://h:22/run/d.sock", "ssh://h/run/d.sock", host{name: "h", socket: "/run/d.sock"}, "-- h"},
		{"ssh://h:1", "ssh://h:1", host{name: "h", port: 1}, "-p 1 -- h"},
		{"ssh://h:65535", "ssh://h:65535", host{name: "h", port: 65535}, "-p 65535 -- h"},
		{"10.0.0.1", "ssh://10.0.0.1", host{name: "10.0.0.1"}, "-- 10.0.0.1"},
		{"ssh://me@h/var/run/docker.sock", "ssh://me@h/var/run/docker.sock", host{user: "me", name: "h", socket: "/var/run/docker.sock"}, "-l me -- h"},
		{"ssh://h//run/./user/../d.sock/", "ssh://h/run/d.sock", host{name: "h", socket: "/run/d.sock"}, "-- h"},
		{"ssh://h/../..", "ssh://h", host{name: "h"}, "-- h"},
		{"ssh://h/a%2fb%40c", "ssh://h/a/b@c", host{name: "h", socket: "/a/b@c"}, "-- h"},
		{"ssh://h/A_z0+@:=~-.9", "ssh://h/A_z0+@:=~-.9", host{name: "h", socket: "/A_z0+@:=~-.9"}, "-- h"},
		{"ssh://me@[fe80::1]:2222", "ssh://me@[fe80::1]:2222", host{user: "me", name: "fe80::1", port: 2222}, "-l me -p 2222 -- fe80::1"},
		{"[::1]", "ssh://[::1]", host{name: "::1"}, "-- ::1"},
		{"ssh://[FE80:0:0::ABCD]:22/d", "ssh://[fe80::abcd]/d", host{name: "fe80::abcd", socket: "/d"}, "-- fe80::abcd"},
		{"ssh://[fe80::1%25eth0]", "ssh://[fe80::1%25eth0]", host{name: "fe80::1%eth0"}, "-- fe80::1%eth0"},
		{"ssh://[fe80::1%Eth0]:23", "ssh://[fe80::1%25Eth0]:23", host{name: "fe80::1%Eth0", port: 23}, "-p 23 -- fe80::1%Eth0"},
		{"ssh://[fe80::1%2525]", "ssh://[fe80::1%2525]", host{name: "fe80::1%25"}, "-- fe80::1%25"},
		{"ssh://[fe80::1%7]", "ssh://[fe80::1%257]", host{name: "fe80::1%7"}, "-- fe80::1%7"},
		{"j.doe_1-x+y@h", "ssh://j.doe_1-x+y@h", host{user: "j.doe_1-x+y", name: "h"}, "-l j.doe_1-x+y -- h"},
		{`CORP\joe@h`, "ssh://CORP%5Cjoe@h", host{user: `CORP\joe`, name: "h"}, `-l CORP\joe -- h`},
		{"svc$@h", "ssh://svc$@h", host{user: "svc$", name: "h"}, "-l svc$ -- h"},
		{"ssh://joe%40corp.example@h", "ssh://joe%40corp.example@h", host{user: "joe@corp.example", name: "h"}, "-l joe@corp.example -- h"},
		{"ssh://%6aoe@h", "ssh://joe@h", host{user: "joe", name: "h"}, "-l joe -- h"},
		{long, "ssh://" + long, host{name: long}, "-- " + long},
	} {
		h, err := parseHost(c.in)
		if err != nil || h != c.want {
			t.Errorf("parseHost(%q) = %+v, %v, want %+v", c.in, h, err, c.want)
			continue
		}
		if h.String() != c.canonical {
			t.Errorf("parseHost(%q).String() = %q, want %q", c.in, h.String(), c.canonical)
		}
		if got := h.sshArgs(); !reflect.DeepEqual(got, strings.Fields(c.args)) {
			t.Errorf("parseHost(%q).sshArgs() = %q, want %q", c.in, got, c.args)
		}
		if again, err := parseHost(h.String()); err != nil || again.String() != h.String() {
			t.Errorf("parseHost(%q) = %+v, %v, want %+v again", h.String(), again, err, h)
		}
	}
}

func TestParseHostRefuses(t *testing.T) {
	for in, want := range map[string]string{
		"":                                    "the host has no host name: write ssh://[user@]host[:port]",
		"ssh://":                              "has no host name",
		"ssh:///run/docker.sock":              "has no host name",
		"ssh://me@":                           "has no host name",
		"ssh://me@:22":                        "has no host name",
		"ssh://@h":                            "has no user name",
		"tcp://1.2.3.4:2376":                  "the host is tcp://1.2.3.4:2376: rdhpf needs ssh://[user@]host",
		"TCP://h":                             "is TCP://h: rdhpf needs ssh://",
		"unix:///var/run/docker.sock":         "is unix:///var/run/docker.sock: rdhpf needs ssh://",
		"npipe:////./pipe/docker":             "is npipe:////./pipe/docker: rdhpf needs ssh://",
		`npipe://\\.\pipe`:                    `is npipe://\\.\pipe: rdhpf needs ssh://`,
		"http://h?\x1b[2J":                    "is a http:// address: rdhpf needs ssh://",
		"ssh+x://h":                           "is ssh+x://h: rdhpf needs",
		"ssh://ssh://h":                       "has a bad port",
		"h/var/run/docker.sock":               "has a path but no scheme",
		"ssh:/h":                              "has a path but no scheme",
		"://h":                                "has a path but no scheme",
		"ssh://h?x=1":                         "has a query or fragment (?)",
		"ssh://h/d?":                          "has a query or fragment (?)",
		"ssh://h/d#f":                         "has a query or fragment (#)",
		"-oProxyCommand=id":                   "has a host name that begins with '-'",
		"ssh://-oProxyCommand=id":             "has a host name that begins with '-'",
		"ssh://me@-oProxyCommand=id":          "has a host name that begins with '-'",
		"ssh://-oProxyCommand=id@h":           "has a user name that begins with '-'",
		"ssh://%2doProxyCommand@h":            "has a user name that begins with '-'",
		"..":                                  "has a host name that begins with '.'",
		"ssh://h h":                           "has the character ' '",
		" h":                                  "has the character ' '",
		"h\n":                                 `has the character '\n'`,
		"h\x00":                               `has the character '\x00'`,
		"h\x1b[2J":                            `has the character '\x1b'`,
		"h\x7f":                               `has the character '\x7f'`,
		"h\xff":                               `has the character '\ufffd'`,
		"hö":                                  `has the character '\u00f6'`,
		"j\u202eoe@h":                         `has the character '\u202e'`,
		"h'":                                  `has '\'' in the host name`,
		`h"`:                                  `has '"' in the host name`,
		"h;id":                                "has ';' in the host name",
		"$(id)":                               "has '$' in the host name",
		"`id`":                                "has '`' in the host name",
		"h|id":                                "has '|' in the host name",
		"h&":                                  "has '&' in the host name",
		"h>f":                                 "has '>' in the host name",
		"h*":                                  "has '*' in the host name",
		"h=x":                                 "has '=' in the host name",
		"h,g":                                 "has ',' in the host name",
		"~h":                                  "has '~' in the host name",
		`h\x`:                                 `has '\\' in the host name`,
		"h%41":                                "has '%' in the host name",
		"%h":                                  "has '%' in the host name",
		"a!b@h":                               "has '!' in the user name",
		"joe@corp@h":                          "write an @ of the user name as %40",
		"a%00b@h":                             `has '\x00' in the user name`,
		"a%0ab@h":                             `has '\n' in the user name`,
		"a%20b@h":                             "has ' ' in the user name",
		"a%c3%b6@h":                           `has '\u00f6' in the user name`,
		"a%zz@h":                              `has a bad user name: invalid URL escape "%zz"`,
		"a%4@h":                               `has a bad user name: invalid URL escape "%4"`,
		"ssh://h:":                            "has a bad port",
		"ssh://h:/d":                          "has a bad port",
		"ssh://h:0":                           "has a bad port: write host:port with a port from 1 to 65535",
		"ssh://h:70000":                       "has a bad port",
		"ssh://h:65536":                       "has a bad port",
		"ssh://h:abc":                         "has a bad port",
		"ssh://h:-1":                          "has a bad port",
		"ssh://h:+22":                         "has a bad port",
		"ssh://h:0x16":                        "has a bad port",
		"ssh://h:99999999999999999999":        "has a bad port",
		"::1":                                 "has more than one colon: write an IPv6 address in brackets",
		"me@::1":                              "has more than one colon",
		"ssh://fe80::1:2222":                  "has more than one colon",
		"h:22:33":                             "has more than one colon",
		"ssh://[::1":                          "has more than one colon",
		"ssh://[h":                            "has '[' in the host name",
		"ssh://h]":                            "has ']' in the host name",
		"ssh://[]":                            "has no IPv6 address in its brackets",
		"ssh://[h]":                           "has no IPv6 address in its brackets",
		"ssh://[1.2.3.4]":                     "has no IPv6 address in its brackets",
		"ssh://[::1]x":                        "or more than :port after them",
		"ssh://[::1]22":                       "or more than :port after them",
		"ssh://[::1]]":                        "or more than :port after them",
		"ssh://[::1]:":                        "has a bad port",
		"ssh://[::1]:0":                       "has a bad port",
		"ssh://[::g]":                         "has no IPv6 address in its brackets",
		"ssh://[fe80::1%]":                    "has no IPv6 address in its brackets",
		"ssh://[fe80::1%25]":                  "has no IPv6 address in its brackets",
		"ssh://[fe80::1%25e;id]":              "has no IPv6 address in its brackets",
		"ssh://[fe80::1%a%b]":                 "has no IPv6 address in its brackets",
		"ssh://h/a;id":                        "has ';' in the socket path",
		"ssh://h/$HOME/d":                     "has '$' in the socket path",
		"ssh://h/a'b":                         `has '\'' in the socket path`,
		"ssh://h/a%27b":                       `has '\'' in the socket path`,
		"ssh://h/a%20b":                       "has ' ' in the socket path",
		"ssh://h/a%00b":                       `has '\x00' in the socket path`,
		"ssh://h/a%0ab":                       `has '\n' in the socket path`,
		"ssh://h/a%":                          `has a bad socket path: invalid URL escape "%"`,
		"ssh://h/a%253b":                      "has '%' in the socket path",
		"ssh://h/a*":                          "has '*' in the socket path",
		strings.Repeat("a", 256):              "has a host name longer than 255 bytes",
		strings.Repeat("a", 256) + "@h":       "has a user name longer than 255 bytes",
		"ssh://h/" + strings.Repeat("a", 107): "has a socket path longer than 107 bytes",
		"ssh://[fe80::1%" + strings.Repeat("a", 256) + "]": "has no IPv6 address in its brackets",
		"tcp://" + strings.Repeat("a", 300):                "is a tcp:// address: rdhpf needs",
		strings.Repeat("x", 300) + "://" + "h":             "is not an ssh:// address: rdhpf needs",
	} {
		h, err := parseHost(in)
		if err == nil {
			t.Errorf("parseHost(%q) = %+v, want an error with %q", in, h, want)
			continue
		}
		if h != (host{}) || !strings.Contains(err.Error(), want) {
			t.Errorf("parseHost(%q) = %+v, %q, want no host and an error with %q", in, h, err, want)
		}
		checkHostError(t, in, err)
	}
}

// checkHostError: one short line of printable ASCII, as it goes to a terminal.
func checkHostError(t *testing.T, in string, err error) {
	t.Helper()
	s := err.Error()
	if len(s) > 400 || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r >= 0x7f }) {
		t.Errorf("parseHost(%q): the error is not a short line of printable ASCII: %q", in, s)
	}
}

func TestParseHostHidesPasswords(t *testing.T) {
	for _, in := range []string{
		"ssh://me:hunter2@h",
		"me:hunter2@h",
		"ssh://me:hunter2@h:22/run/d.sock",
		"ssh://:hunter2@h",
		"ssh://me:hunter2/x@h",
		"ssh://me:hunter2?x@h",
		"ssh://me:#hunter2@h",
		"ssh://me:hunter2 x@h",
		"ssh://me:@hunter2@h",
		"ssh://me:hunter2%zz@h",
		"ssh://me:hunter2\x1b@h",
		"ssh://me:hunter2@[::1]",
		"ssh:/me:hunter2@h",
		"me:hunter2://x@h",
		"ssh://me:@h",
	} {
		if _, err := parseHost(in); err == nil || !errors.Is(err, errPassword) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("parseHost(%q): %v, want errPassword and nothing of the password", in, err)
		}
	}
	// Not known for a password, and yet not to be repeated.
	for _, in := range []string{"tcp://me:hunter2@h", "ssh://me%3ahunter2@h", "https://h/?token=hunter2", "ssh://me:hunter2"} {
		if _, err := parseHost(in); err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("parseHost(%q): %v, want an error with nothing of the password", in, err)
		}
	}
}

func dockerMetaFile(dir, name string) string {
	return filepath.Join(dir, "contexts", "meta", fmt.Sprintf("%x", sha256.Sum256([]byte(name))), "meta.json")
}

func TestResolveHost(t *testing.T) {
	meta := func(name, host string) string {
		return fmt.Sprintf(`{"Name":%q,"Metadata":{"Description":"d"},"Endpoints":{"docker":{"Host":%q,"SkipTLSVerify":false}}}`, name, host)
	}
	const big = maxDockerFile + 1
	for _, c := range []struct {
		name     string
		flag     string
		env      map[string]string // DIR stands for a directory other than ~/.docker
		config   string            // of ~/.docker/config.json, "" = no file
		contexts map[string]string // name -> meta.json in ~/.docker
		other    map[string]string // the same in DIR
		want     string            // canonical host
		errs     []string          // parts of the error; HOME stands for the home directory
		noHost   bool
	}{
		{name: "nothing", noHost: true, errs: []string{"no host: use -host ssh://user@host, or set DOCKER_HOST or a Docker context", "context is the default one"}},
		{name: "flag", flag: "me@flag", env: map[string]string{"DOCKER_HOST": "ssh://env", "DOCKER_CONTEXT": "gone"}, config: "broken", want: "ssh://me@flag"},
		{name: "bad flag does not fall through", flag: "tcp://f", env: map[string]string{"DOCKER_HOST": "ssh://env"}, errs: []string{"-host is tcp://f: rdhpf needs ssh://"}},
		{name: "DOCKER_HOST before DOCKER_CONTEXT", env: map[string]string{"DOCKER_HOST": "ssh://env/", "DOCKER_CONTEXT": "gone"}, config: "broken", want: "ssh://env"},
		{name: "DOCKER_HOST tcp", env: map[string]string{"DOCKER_HOST": "tcp://1.2.3.4:2376"}, errs: []string{"DOCKER_HOST is tcp://1.2.3.4:2376: rdhpf needs ssh://"}},
		{name: "DOCKER_HOST unix", env: map[string]string{"DOCKER_HOST": "unix:///run/d.sock"}, errs: []string{"DOCKER_HOST is unix:///run/d.sock: rdhpf needs ssh://"}},
		{name: "DOCKER_HOST without scheme is tcp to docker", env: map[string]string{"DOCKER_HOST": "1.2.3.4:2376"}, errs: []string{"DOCKER_HOST is 1.2.3.4:2376: rdhpf needs ssh://"}},
		{name: "DOCKER_HOST password", env: map[string]string{"DOCKER_HOST": "ssh://me:pw@h"}, errs: []string{"DOCKER_HOST seems to hold a password"}},
		{name: "DOCKER_HOST empty", env: map[string]string{"DOCKER_HOST": "", "DOCKER_CONTEXT": "far"}, contexts: map[string]string{"far": meta("far", "ssh://far")}, want: "ssh://far"},
		{name: "DOCKER_CONTEXT before config", env: map[string]string{"DOCKER_CONTEXT": "far"}, config: `{"currentContext":"near"}`,
			contexts: map[string]string{"far": meta("far", "ssh://me@FAR:22"), "near": meta("near", "ssh://near")}, want: "ssh://me@far"},
		{name: "DOCKER_CONTEXT needs no config", env: map[string]string{"DOCKER_CONTEXT": "far"}, config: "broken",
			contexts: map[string]string{"far": meta("far", "ssh://far")}, want: "ssh://far"},
		{name: "DOCKER_CONTEXT default", env: map[string]string{"DOCKER_CONTEXT": "default"}, config: `{"currentContext":"far"}`,
			contexts: map[string]string{"far": meta("far", "ssh://far")}, noHost: true, errs: []string{"no host: ", "context is the default one"}},
		{name: "DOCKER_CONTEXT gone", env: map[string]string{"DOCKER_CONTEXT": "go\x1bne"}, errs: []string{`Docker context "go\x1bne" (from DOCKER_CONTEXT) was not found: no file `, dockerMetaFile("HOME/.docker", "go\x1bne")}},
		{name: "currentContext", config: `{"auths":{},"currentContext":"near","currentContext":"far"}`, contexts: map[string]string{"far": meta("far", "ssh://far/d.sock")}, want: "ssh://far/d.sock"},
		{name: "currentContext default", config: `{"currentContext":"default"}`, noHost: true, errs: []string{"context is the default one"}},
		{name: "currentContext empty", config: `{"currentContext":""}`, noHost: true, errs: []string{"context is the default one"}},
		{name: "no currentContext", config: `{"auths":{}}`, noHost: true, errs: []string{"context is the default one"}},
		{name: "currentContext gone", config: `{"currentContext":"gone"}`, errs: []string{`Docker context "gone" (from HOME/.docker/config.json) was not found`, dockerMetaFile("HOME/.docker", "gone"), "use -host"}},
		{name: "context name is no path", config: `{"currentContext":"../../x"}`, errs: []string{dockerMetaFile("HOME/.docker", "../../x")}},
		{name: "config broken", config: "{", errs: []string{"reading Docker's configuration: HOME/.docker/config.json: unexpected end", "use -host"}},
		{name: "config of the wrong type", config: `{"currentContext":7}`, errs: []string{"HOME/.docker/config.json: json: cannot unmarshal number"}},
		{name: "config too large", config: `{"a":"` + strings.Repeat("x", big) + `"}`, errs: []string{"HOME/.docker/config.json is larger than 1048576 bytes"}},
		{name: "config just fits", config: `{"currentContext":"far"}` + strings.Repeat(" ", maxDockerFile-24), contexts: map[string]string{"far": meta("far", "ssh://far")}, want: "ssh://far"},
		{name: "context broken", config: `{"currentContext":"far"}`, contexts: map[string]string{"far": "no"}, errs: []string{`reading Docker context "far" (from HOME/.docker/config.json): ` + dockerMetaFile("HOME/.docker", "far") + ": invalid character"}},
		{name: "context too large", env: map[string]string{"DOCKER_CONTEXT": "far"}, contexts: map[string]string{"far": strings.Repeat(" ", big)}, errs: []string{dockerMetaFile("HOME/.docker", "far") + " is larger than"}},
		{name: "context tcp", config: `{"currentContext":"far"}`, contexts: map[string]string{"far": meta("far", "tcp://h:1")}, errs: []string{`the host of Docker context "far" (in ` + dockerMetaFile("HOME/.docker", "far") + `) is tcp://h:1: rdhpf needs ssh://`}},
		{name: "context without a host", config: `{"currentContext":"far"}`, contexts: map[string]string{"far": `{"Endpoints":{"kubernetes":{"Host":"ssh://k"}}}`}, errs: []string{`Docker context "far"`, "is not an ssh:// address"}},
		{name: "context injection", config: `{"currentContext":"far"}`, contexts: map[string]string{"far": meta("far", "ssh://-oProxyCommand=id")}, errs: []string{`Docker context "far"`, "begins with '-'"}},
		{name: "DOCKER_CONFIG", env: map[string]string{"DOCKER_CONFIG": "DIR", "DOCKER_CONTEXT": "far"}, contexts: map[string]string{"far": meta("far", "ssh://wrong")},
			other: map[string]string{"far": meta("far", "ssh://right")}, want: "ssh://right"},
		{name: "DOCKER_CONFIG without a config", env: map[string]string{"DOCKER_CONFIG": "DIR"}, config: `{"currentContext":"far"}`, contexts: map[string]string{"far": meta("far", "ssh://far")}, noHost: true, errs: []string{"no host: "}},
	} {
		t.Run(c.name, func(t *testing.T) {
			home, dir := t.TempDir(), t.TempDir()
			if c.config != "" {
				writeHostFile(t, filepath.Join(home, ".docker", "config.json"), c.config)
			}
			for name, text := range c.contexts {
				writeHostFile(t, dockerMetaFile(filepath.Join(home, ".docker"), name), text)
			}
			for name, text := range c.other {
				writeHostFile(t, dockerMetaFile(dir, name), text)
			}
			getenv := func(k string) string { return strings.Replace(c.env[k], "DIR", dir, 1) }
			h, err := resolveHost(c.flag, getenv, home)
			if c.want != "" {
				if err != nil || h.String() != c.want {
					t.Fatalf("got %v, %v, want %s", h, err, c.want)
				}
				return
			}
			if err == nil || h != (host{}) {
				t.Fatalf("got %+v, %v, want no host and an error", h, err)
			}
			if errors.Is(err, errNoHost) != c.noHost {
				t.Errorf("%v: is errNoHost: %v, want %v", err, !c.noHost, c.noHost)
			}
			for _, want := range c.errs {
				if want = strings.ReplaceAll(want, "HOME", home); !strings.Contains(err.Error(), want) {
					t.Errorf("error %q, want %q in it", err, want)
				}
			}
		})
	}
}

func TestResolveHostUnreadable(t *testing.T) {
	home := t.TempDir()
	none := func(string) string { return "" }
	config := filepath.Join(home, ".docker", "config.json")
	if err := os.MkdirAll(config, 0o700); err != nil { // a directory cannot be read as a file, not even by root
		t.Fatal(err)
	}
	if h, err := resolveHost("", none, home); err == nil || errors.Is(err, errNoHost) || !strings.Contains(err.Error(), config) {
		t.Errorf("config.json is a directory: got %v, %v, want an error that names it", h, err)
	}
	if err := os.Remove(config); err != nil {
		t.Fatal(err)
	}
	writeHostFile(t, config, "")
	if _, err := resolveHost("", none, home); !errors.Is(err, errNoHost) {
		t.Errorf("empty config.json: got %v, want errNoHost", err)
	}
}

func FuzzParseHost(f *testing.F) {
	for _, s := range []string{"h", "me@h:22", "ssh://joe%40corp@H:2222/run/../d.sock", "ssh://[FE80::1%25Eth0]:1/", "[::ffff:1.2.3.4%2525]",
		"ssh://me:pw@h", "tcp://h", "-oProxyCommand=id", "ssh://%2d@h", "ssh://h/a%00", "\x1b://", "ssh://[::1]]", "h\xff"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		h, err := parseHost(s)
		if err != nil {
			checkHostError(t, s, err)
			return
		}
		if again, err := parseHost(h.String()); err != nil || again.String() != h.String() {
			t.Errorf("%q -> %+v -> %q -> %+v, %v", s, h, h.String(), again, err)
		}
		if h.port == 22 || len(h.name) > maxHostPart || len(h.user) > maxHostPart || len(h.socket) > maxSocketPath {
			t.Errorf("%q -> %+v: out of bounds", s, h)
		}
		if h.socket != "" && (h.socket[0] != '/' || filepath.Clean(h.socket) != h.socket) {
			t.Errorf("%q: socket %q is not absolute and clean", s, h.socket)
		}
		args := h.sshArgs()
		var ours []string
		if h.user != "" {
			ours = append(ours, "-l", h.user)
		}
		if h.port != 0 {
			ours = append(ours, "-p", fmt.Sprint(h.port))
		}
		if ours = append(ours, "--", h.name); !reflect.DeepEqual(args, ours) {
			t.Errorf("%q: args %q, want %q", s, args, ours)
		}
		for _, v := range []struct{ text, allowed string }{{h.user, ".-_+@"}, {h.name, ".-_:%"}, {h.socket, "._/+@:=~-"}} {
			if strings.HasPrefix(v.text, "-") {
				t.Errorf("%q: %q would be an option", s, v.text)
			}
			for _, r := range v.text {
				letter := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
				if !letter && !strings.ContainsRune(v.allowed, r) {
					t.Errorf("%q: %q in %q", s, r, v.text)
				}
			}
		}
		if h.name == "" {
			t.Errorf("%q: the host name is empty", s)
		}
	})
}

// TestContextOfInstance wants a context that docker was given an instance's socket in to mean that instance's host.
func TestContextOfInstance(t *testing.T) {
	const served = "ssh://me@box.invalid"
	dir, home := stateFolder(t), t.TempDir()
	p := pathsFor(dir, served)
	snap := socketSnap("x")
	snap.Host, snap.UpdatedAt = served, epoch
	if err := writeState(p.state, snap); err != nil {
		t.Fatal(err)
	}
	t.Setenv("DOCKER_HOST", "")
	t.Setenv("DOCKER_CONFIG", "")
	t.Setenv("DOCKER_CONTEXT", "near")
	for _, c := range []struct{ socket, want, err string }{
		{p.docker, served, ""},
		{dir + "/nobody.docker.sock", "", `context "near"`},
		{"/run/docker.sock", "", `context "near"`},
	} {
		writeHostFile(t, dockerMetaFile(filepath.Join(home, ".docker"), "near"), fmt.Sprintf(`{"Endpoints":{"docker":{"Host":"unix://%s"}}}`, c.socket))
		h, err := findHost("", dir, home)
		if err == nil && h.String() != c.want || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %v, %v, want %q, %q", c.socket, h, err, c.want, c.err)
		}
	}
}

func writeHostFile(t *testing.T, file, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
