package main

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"unicode"
)

// Tests of config.go: what config.json may say, and that a mistake in it is reported with its line.

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
