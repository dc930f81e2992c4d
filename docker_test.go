package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"
)

// Tests of what is made of the engine's answers: real ones, odd ones, hostile
// ones; and of the command that brings them here.

const idLong = "4e9bd1f4c7a05b8e1d3f6a2b9c8d7e6f5a4b3c2d1e0f9a8b7c6d5e4f3a2b1c0d"

// listText is containers as text that can be compared.
func listText(list []container) string {
	var texts []string
	for _, c := range list {
		t := c.id + " " + c.name
		if c.image != "" || c.service != "" {
			t += " image=" + c.image + " service=" + c.service
		}
		if c.paused {
			t += " paused"
		}
		if c.hostNet {
			t += " host"
		}
		if c.rules.noProbe {
			t += " unprobed"
		}
		if c.rules.skip {
			t += " skip"
		}
		if len(c.rules.mapped) > 0 {
			t += " " + fmt.Sprint(c.rules.mapped)
		}
		if c.rules.wrong != "" {
			t += " (" + c.rules.wrong + ")"
		}
		if c.node != "" {
			t += " node=" + c.node
		}
		if c.lost != "" {
			t += " lost=" + c.lost
		}
		for _, n := range c.nets {
			t += fmt.Sprintf(" net=%s,%s,%s", n.endpoint, addrText(n.addr), addrText(n.gateway))
		}
		for _, p := range c.ports {
			t += fmt.Sprintf(" %s:%d->%d/%s", addrText(p.ip), p.public, p.private, p.proto)
		}
		texts = append(texts, t)
	}
	return strings.Join(texts, "\n")
}

func addrText(a netip.Addr) string {
	if !a.IsValid() {
		return "none"
	}
	return a.String()
}

func TestDecodeList(t *testing.T) {
	id := idLong[:12]
	one := func(rest string) string { return `[{"Id":"` + idLong + `"` + rest + `}]` }
	nets := func(nets string) string {
		return one(`,"Names":["/web"],"NetworkSettings":{"Networks":{` + nets + `}}`)
	}
	manyNets, manyKept := "", ""
	for i := range maxNets + 10 {
		manyNets += fmt.Sprintf(`,"n%03d":{"EndpointID":"e%d","IPAddress":"10.0.0.1","Gateway":"10.0.0.2"}`, i, i)
		if i < maxNets {
			manyKept += fmt.Sprintf(" net=e%d,10.0.0.1,10.0.0.2", i)
		}
	}
	ports := func(ports string) string { return one(`,"Names":["/web"],"Ports":[` + ports + `]`) }
	for _, c := range []struct{ name, in, want string }{
		{"none", `[]`, ""},
		{"real", `[{"Id":"` + idLong + `","Names":["/proj-web-1"],"Image":"nginx:1.27","ImageID":"sha256:cc","Command":"/docker-entrypoint.sh nginx -g 'daemon off;'",
			"Created":1732370000,"Ports":[{"IP":"0.0.0.0","PrivatePort":80,"PublicPort":8080,"Type":"tcp"},{"IP":"::","PrivatePort":80,"PublicPort":8080,"Type":"tcp"},
			{"PrivatePort":443,"Type":"tcp"},{"IP":"127.0.0.1","PrivatePort":53,"PublicPort":5353,"Type":"udp"}],
			"Labels":{"com.docker.compose.project":"proj","com.docker.compose.service":"web"},"State":"running","Status":"Up 3 minutes",
			"HostConfig":{"NetworkMode":"proj_default"},"NetworkSettings":{"Networks":{"proj_default":{"IPAMConfig":null,"Links":null,"EndpointID":"0cc6d7","Gateway":"172.18.0.1","IPAddress":"172.18.0.2"}}},"Mounts":[]}]`,
			id + " proj-web-1 image=nginx:1.27 service=web net=0cc6d7,172.18.0.2,172.18.0.1 0.0.0.0:8080->80/tcp :::8080->80/tcp 127.0.0.1:5353->53/udp"},
		{"paused", one(`,"Names":["/web"],"State":"paused"`), id + " web paused"},
		{"not running", one(`,"Names":["/web"],"State":"exited"`), ""},
		{"host network", one(`,"Names":["/web"],"State":"running","Ports":[],"HostConfig":{"NetworkMode":"host"}`), id + " web host"},
		{"one address", ports(`{"IP":"10.0.0.2","PrivatePort":80,"PublicPort":8080,"Type":"tcp"}`), id + " web 10.0.0.2:8080->80/tcp"},
		{"IPv6 only", ports(`{"IP":"::1","PrivatePort":80,"PublicPort":8080,"Type":"tcp"}`), id + " web ::1:8080->80/tcp"},
		{"IPv4 in IPv6", ports(`{"IP":"::ffff:10.0.0.2","PrivatePort":80,"PublicPort":8080,"Type":"TCP"}`), id + " web 10.0.0.2:8080->80/tcp"},
		{"podman", one(`,"Names":["/web"],"Image":"docker.io/library/nginx:latest","Ports":[{"PrivatePort":80,"PublicPort":8080,"Type":"tcp","IP":""}],"State":"running","Labels":null,"HostConfig":{"NetworkMode":"bridge"}`),
			id + " web image=docker.io/library/nginx:latest service= 0.0.0.0:8080->80/tcp"},
		{"port limits", ports(`{"IP":"0.0.0.0","PrivatePort":1,"PublicPort":1,"Type":"tcp"},{"IP":"0.0.0.0","PrivatePort":65535,"PublicPort":65535,"Type":"tcp"},
			{"IP":"0.0.0.0","PrivatePort":80,"PublicPort":70000,"Type":"tcp"},{"IP":"0.0.0.0","PrivatePort":80,"PublicPort":-1,"Type":"tcp"},
			{"IP":"0.0.0.0","PrivatePort":65536,"PublicPort":2,"Type":"tcp"},{"IP":"0.0.0.0","PrivatePort":-80,"PublicPort":3,"Type":"tcp"}`),
			id + " web 0.0.0.0:1->1/tcp 0.0.0.0:65535->65535/tcp"},
		{"a range", ports(`{"IP":"0.0.0.0","PrivatePort":7000,"PublicPort":7000,"Type":"tcp"},{"IP":"0.0.0.0","PrivatePort":7001,"PublicPort":7001,"Type":"tcp"}`),
			id + " web 0.0.0.0:7000->7000/tcp 0.0.0.0:7001->7001/tcp"},
		{"podman's own list", one(`,"Names":["web"],"Image":"localhost/web:latest","Labels":{"io.podman.compose.service":"svc"},"Namespaces":{},"Networks":["podman"],"Pid":28687,
			"Command":["x"],"Created":"2026-11-25T17:11:13.291536864Z","State":"running","Status":"","Ports":[{"host_ip":"","container_port":80,"host_port":7000,"range":3,"protocol":"tcp"},
			{"host_ip":"127.0.0.1","container_port":90,"host_port":7010,"range":1,"protocol":"udp"},{"host_ip":"::1","container_port":0,"host_port":7011,"range":0,"protocol":"tcp"}]`),
			id + " web image=localhost/web:latest service=svc 0.0.0.0:7000->80/tcp 0.0.0.0:7001->81/tcp 0.0.0.0:7002->82/tcp 127.0.0.1:7010->90/udp ::1:7011->0/tcp"},
		{"ranges beyond the last port", ports(`{"host_port":65534,"container_port":1,"range":4,"protocol":"tcp"},{"host_port":1,"container_port":65535,"range":9223372036854775807,"protocol":"tcp"},
			{"host_port":0,"container_port":1,"range":4,"protocol":"tcp"},{"host_port":7,"container_port":-1,"range":4,"protocol":"tcp"},{"host_port":8,"container_port":1,"range":-4,"protocol":"tcp"}`),
			id + " web 0.0.0.0:65534->1/tcp 0.0.0.0:65535->2/tcp 0.0.0.0:1->65535/tcp 0.0.0.0:8->1/tcp"},
		{"services of both composes", one(`,"Names":["/web"],"Labels":{"com.docker.compose.service":"d","io.podman.compose.service":"p"}`), id + " web image= service=d"},
		{"no addresses", ports(`{"IP":"junk","PrivatePort":80,"PublicPort":80,"Type":"tcp"},{"IP":"1.2.3","PrivatePort":80,"PublicPort":81,"Type":"tcp"}`),
			id + " web none:80->80/tcp none:81->80/tcp"},
		{"an address with a hostile zone", ports(`{"IP":"fe80::1%\u001b[31m","PrivatePort":80,"PublicPort":80,"Type":"tcp"}`), id + " web none:80->80/tcp"},
		{"hostile protocol", ports(`{"IP":"0.0.0.0","PrivatePort":80,"PublicPort":80,"Type":"\u001b[31mtcp"}`), id + " web 0.0.0.0:80->80/[31mtcp"},
		{"nothing but an id", one(``), id + " " + id},
		{"nulls", one(`,"Names":null,"Ports":null,"Labels":null,"HostConfig":null,"State":null,"Image":null`), id + " " + id},
		{"a container that is null, none, or has a bad id", `[null,{},{"Id":""},{"Id":"abc"},{"Id":"` + strings.ToUpper(idLong) + `"},{"Id":"../../../../etc/passwd"},{"Id":"` + idLong + `"}]`, id + " " + id},
		{"links", one(`,"Names":["/other/alias","/web","/third/x"]`), id + " web"},
		{"links only", one(`,"Names":["/other/alias"]`), id + " " + id},
		{"names without a slash, empty", one(`,"Names":["","/","web"]`), id + " web"},
		{"a hostile name", one(`,"Names":["/\u001b]0;own\u0007w\u009b31me\nb\u202e\r\u0000"]`), id + " ]0;ownw31me b"},
		{"a name that is nothing but control characters", one(`,"Names":["/\u001b\u0007"]`), id + " " + id},
		{"a hostile image and service", one(`,"Names":["/w"],"Image":"\u001b[2Jx","Labels":{"com.docker.compose.service":"a\tb\u2028"}`), id + " w image=[2Jx service=a b"},
		{"other case, unknown and double fields", `[{"ID":"` + idLong + `","names":["/web"],"Unknown":{"deep":[[[1]]]},"State":"exited","State":"running"}]`, id + " web"},
		{"not to be probed", one(`,"Names":["/web"],"Labels":{"rdhpf.probe":"false"}`), id + " web unprobed"},
		{"to be probed", one(`,"Names":["/web"],"Labels":{"rdhpf.probe":"true","rdhpf.probe.x":"false"}`), id + " web"},
		{"rules", one(`,"Names":["/web"],"Labels":{"rdhpf.skip":"false","rdhpf.map":"80=8080, 443=8443"}`), id + " web map[80:8080 443:8443]"},
		{"to be skipped", one(`,"Names":["/web"],"Labels":{"rdhpf.skip":"true"}`), id + " web skip"},
		{"a rule that is neither", one(`,"Names":["/web"],"Labels":{"rdhpf.skip":"maybe\u001b"}`), id + " web (its label rdhpf.skip=maybe: want true or false)"},
		{"a probe that is neither", one(`,"Names":["/web"],"Labels":{"rdhpf.probe":""}`), id + " web unprobed (its label rdhpf.probe=: want true or false)"},
		{"a map that is none", one(`,"Names":["/web"],"Labels":{"rdhpf.map":"80"}`), id + " web (its label rdhpf.map=80: want PUBLISHED=LOCAL, such as 80=8080)"},
		{"a hostile map", one(`,"Names":["/web"],"Labels":{"rdhpf.map":"80=\u001b[31m"}`), id + ` web (its label rdhpf.map=80=[31m: "\x1b[31m" is not a port: want a number from 1 to 65535)`},
		{"a map of one port to two", one(`,"Names":["/web"],"Labels":{"rdhpf.map":"80=1,80=2"}`), id + " web (its label rdhpf.map=80=1,80=2: port 80 is mapped twice, to 1 and to 2)"},
		{"rules that contradict", one(`,"Names":["/web"],"Labels":{"rdhpf.skip":"true","rdhpf.map":"80=1"}`),
			id + " web skip map[80:1] (its label rdhpf.map=80=1: rdhpf.skip=true contradicts it)"},
		{"networks, by name", nets(`"b":{"EndpointID":"e2","IPAddress":"172.19.0.2","Gateway":"172.19.0.1"},"a":{"EndpointID":"e1","IPAddress":"172.18.0.2","Gateway":""}`),
			id + " web net=e1,172.18.0.2,none net=e2,172.19.0.2,172.19.0.1"},
		{"a network without an address", nets(`"a":{"EndpointID":"","IPAddress":"","Gateway":""}`), id + " web net=,none,none"},
		{"networks that are null", nets(`"a":null`), id + " web net=,none,none"},
		{"no networks", one(`,"Names":["/web"],"NetworkSettings":{"Networks":null}`), id + " web"},
		{"no network settings", one(`,"Names":["/web"],"NetworkSettings":null`), id + " web"},
		{"addresses in IPv6", nets(`"a":{"EndpointID":"e","IPAddress":"::ffff:10.0.0.1","Gateway":"fd00::1"}`), id + " web net=e,10.0.0.1,fd00::1"},
		{"addresses that are none", nets(`"a":{"EndpointID":"e","IPAddress":"localhost","Gateway":"10.0.0.0/8"}`), id + " web net=e,none,none"},
		{"a hostile endpoint", nets(`"a":{"EndpointID":"e\u001b[31m","IPAddress":"10.0.0.1"},"b":{"EndpointID":"e f","IPAddress":"10.0.0.1"},"c":{"EndpointID":"g","IPAddress":"10.0.0.1"}`),
			id + " web net=g,10.0.0.1,none"},
		{"a long endpoint", nets(`"a":{"EndpointID":"` + strings.Repeat("e", 3*maxText) + `"}`), id + " web net=" + strings.Repeat("e", maxText) + ",none,none"},
		{"addresses with zones", nets(`"a":{"EndpointID":"e","IPAddress":"fe80::1%eth0"},"b":{"EndpointID":"f","Gateway":"fe80::1%\u001b[31m"}`), id + " web"},
		{"many networks", nets(manyNets[1:]), id + " web" + manyKept},
		{"more after the end", one(``) + "\n\n", id + " " + id},
	} {
		t.Run(c.name, func(t *testing.T) {
			list, err := decodeList(strings.NewReader(c.in))
			if got := listText(list); err != nil || got != c.want {
				t.Errorf("\n got %q, %v\nwant %q", got, err, c.want)
			}
			if list == nil {
				t.Error("nil: an empty list has to be told from none")
			}
			checkList(t, list)
		})
	}
}

func TestDecodeListRefuses(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"nothing", ``, "unexpected EOF"},
		{"truncated at once", `[`, "unexpected EOF"},
		{"truncated in a container", `[{"Id":"` + idLong, "unexpected EOF"},
		{"truncated between containers", `[{"Id":"` + idLong + `"},`, "unexpected EOF"},
		{"truncated before the end", `[{"Id":"` + idLong + `"}`, "unexpected EOF"},
		{"an object", `{"message":"no"}`, "array"},
		{"null", `null`, "array"},
		{"a string", `"[]"`, "array"},
		{"no JSON", `<html>`, "invalid character"},
		{"a port that is none", `[{"Id":"` + idLong + `","Ports":[{"PublicPort":"80"}]}]`, "cannot unmarshal"},
		{"a port beyond all bounds", `[{"Id":"` + idLong + `","Ports":[{"PublicPort":99999999999999999999}]}]`, "cannot unmarshal"},
		{"too many", "[" + strings.Repeat(`{"Id":"`+idLong+`"},`, maxContainer) + `{}]`, "more than"},
		{"too many ports", `[{"Id":"` + idLong + `","Ports":[` + strings.Repeat(`{"PublicPort":1},`, maxOne/20) + `{}]},` +
			`{"Id":"` + idLong + `","Ports":[` + strings.Repeat(`{"PublicPort":1},`, maxOne/20) + `{}]}]`, "published ports"},
		{"too many ports in ranges", `[{"Id":"` + idLong + `","Ports":[` + strings.Repeat(`{"host_port":1,"range":65535},`, 10_000) + `{}]}]`, "published ports"},
		{"one without an end", `[{"Id":"` + idLong + `"},{"Ports":[` + strings.Repeat(`{},`, maxOne), "a container in it is longer than 1048576 bytes"},
		{"too deep", "[" + strings.Repeat("[", 20000), "max depth"},
	} {
		t.Run(c.name, func(t *testing.T) {
			list, err := decodeList(strings.NewReader(c.in))
			if err == nil || list != nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%d containers, error %v, want one with %q", len(list), err, c.want)
			}
		})
	}
}

// A list of all ports there are takes no longer than others.
func TestDecodeListWidest(t *testing.T) {
	list, err := decodeList(strings.NewReader(`[{"Id":"` + idLong + `","Ports":[{"host_port":1,"container_port":1,"range":65535,"protocol":"tcp"}]}]`))
	if err != nil || len(list) != 1 || len(list[0].ports) != 65535 {
		t.Fatalf("%d containers, %v", len(list), err)
	}
	checkList(t, list)
}

func TestDecodeListHuge(t *testing.T) {
	var b bytes.Buffer
	for i := 0; i < 1500; i++ {
		fmt.Fprintf(&b, `%c{"Id":"%064x","Names":["/%s"],"Ports":[{"IP":"0.0.0.0","PrivatePort":80,"PublicPort":%d,"Type":"tcp"}],"Labels":{"x":"%s"}}`,
			"[,"[min(i, 1)], i, strings.Repeat("n", 1000), 1+i, strings.Repeat("x", 1000))
	}
	b.WriteString("]")
	list, err := decodeList(&b)
	if err != nil || len(list) != 1500 || len(list[0].name) != maxText {
		t.Fatalf("%d containers, %v", len(list), err)
	}
	checkList(t, list)
}

// checkList checks what holds for every list, wherever it came from.
func checkList(t *testing.T, list []container) {
	t.Helper()
	for _, c := range list {
		if id, ok := shortID(c.id); !ok || id != c.id {
			t.Errorf("id %q", c.id)
		}
		if c.name == "" {
			t.Errorf("%s has no name", c.id)
		}
		checkPrintable(t, c.name, c.image, c.service)
		if len(c.nets) > maxNets {
			t.Errorf("%s is in %d networks", c.id, len(c.nets))
		}
		for _, n := range c.nets {
			checkPrintable(t, n.endpoint, n.addr.String(), n.gateway.String())
			if strings.Contains(n.endpoint, " ") || n.addr.Zone()+n.gateway.Zone() != "" || n.addr.Is4In6() || n.gateway.Is4In6() {
				t.Errorf("%s is in network %+v", c.id, n)
			}
		}
		for _, p := range c.ports {
			checkPrintable(t, p.proto, p.ip.String())
			if p.ip.Is4In6() {
				t.Errorf("%s has address %s", c.id, p.ip)
			}
		}
	}
	wants, skipped := desired(list, plainConfig())
	for k, w := range wants {
		if k != w.key || k.local.Port() == 0 || k.remote.Port() == 0 || !k.remote.IsValid() || k.remote.Addr().IsUnspecified() {
			t.Errorf("forward %v of %+v", k, w)
		}
		checkPrintable(t, w.who(), k.local.String(), k.remote.String())
		if w.noProbe && !slices.ContainsFunc(list, func(c container) bool { return c.id == w.id && c.rules.noProbe }) {
			t.Errorf("%v is not probed, and nobody said so", k)
		}
	}
	for _, s := range skipped {
		checkPrintable(t, s.Name, s.Protocol, s.Reason)
	}
}

func checkPrintable(t *testing.T, texts ...string) {
	t.Helper()
	for _, s := range texts {
		if len([]rune(s)) > 2*maxText+100 {
			t.Errorf("%d runes long: %.50q…", len([]rune(s)), s)
		}
		for _, r := range s {
			if !unicode.IsPrint(r) || r == unicode.ReplacementChar {
				t.Errorf("%q in %q", r, s)
				return
			}
		}
	}
}

func TestDecodeEvent(t *testing.T) {
	id := idLong[:12]
	real := func(action string) string {
		return `{"status":"` + action + `","id":"` + idLong + `","from":"nginx","Type":"container","Action":"` + action +
			`","Actor":{"ID":"` + idLong + `","Attributes":{"image":"nginx","name":"web"}},"scope":"local","time":1732370000,"timeNano":1732370000000000000}`
	}
	ofNetwork := func(action, container string) string {
		return `{"Type":"network","Action":"` + action + `","Actor":{"ID":"9ab05cc7a1","Attributes":{"container":"` + container +
			`","name":"proj_default","type":"bridge"}},"scope":"local","time":1732370000}`
	}
	for _, c := range []struct {
		in, action string // "": not one that matters
	}{
		{real("start"), "start"}, {real("die"), "die"}, {real("pause"), "pause"}, {real("unpause"), "unpause"},
		{real("rename"), "rename"}, {real("destroy"), "destroy"}, {real("update"), "update"},
		{real("died"), "die"}, // podman
		{`{"Type":"container","Action":"start","Actor":{"ID":"` + idLong + `"}}`, "start"},
		{`{"status":"die","id":"` + idLong + `"}`, "die"}, // before 1.22
		{real("health_status: healthy"), "health_status"}, {real("health_status: unhealthy"), "health_status"},
		{real("health_status"), "health_status"}, // podman
		{ofNetwork("connect", idLong), "connect"}, {ofNetwork("disconnect", idLong), "disconnect"},
		{`{"status":"connect","id":"` + idLong + `","Type":"network","Action":"connect","Actor":{"ID":"` + idLong + `","Attributes":{"containerExitCode":"0","image":"","name":"web","podId":""}}}`, "connect"}, // podman
		{ofNetwork("create", idLong), ""}, {ofNetwork("destroy", idLong), ""}, {ofNetwork("start", idLong), ""}, {ofNetwork("", idLong), ""},
		{ofNetwork("connect", "short"), ""}, {ofNetwork("connect", ""), ""}, {ofNetwork("connect", strings.ToUpper(idLong)), ""},
		{`{"Type":"network","Action":"connect","Actor":{"ID":"` + idLong + `"}}`, ""},
		{`{"Type":"network","status":"connect","id":"` + idLong + `","Actor":{"Attributes":{"container":"` + idLong + `"}}}`, ""},
		{`{"Type":"volume","Action":"start","Actor":{"ID":"` + idLong + `"}}`, ""},
		{real("exec_create: sh -c true"), ""}, {real("exec_die"), ""}, {real("top"), ""}, {real(""), ""},
		{`{"Type":"network","Action":"start","Actor":{"ID":"` + idLong + `"}}`, ""},
		{`{"Type":"container","Action":"start","Actor":{"ID":"short"}}`, ""},
		{`{"Type":"container","Action":"start","Actor":{"ID":"\u001b[31m-------------"}}`, ""},
		{`{"Type":"container","Action":"start"}`, ""},
		{`{"Type":7,"Action":"start","Actor":{"ID":"` + idLong + `"}}`, ""},
		{real("start")[:40], ""}, {``, ""}, {`null`, ""}, {`[]`, ""}, {`"start"`, ""}, {`{}`, ""},
	} {
		ev, ok := decodeEvent([]byte(c.in))
		if ok != (c.action != "") || ok && ev != (event{c.action, id}) {
			t.Errorf("decodeEvent(%s) = %v, %v, want %q", c.in, ev, ok, c.action)
		}
	}
}

func TestPrintable(t *testing.T) {
	for _, c := range []struct {
		in   string
		max  int
		want string
	}{
		{"", 5, ""},
		{"plain text", 100, "plain text"},
		{"Käse 日本語 → ✓", 100, "Käse 日本語 → ✓"},
		{"a\nb\tc", 100, "a b c"},
		{"a\r\nb\rc", 100, "a bc"},
		{"\x1b[31mred\x1b[0m", 100, "[31mred[0m"},
		{"\x1b]0;title\x07", 100, "]0;title"},
		{"C1 \u009b31m", 100, "C1 31m"},
		{"raw C1 \x9b31m", 100, "raw C1 31m"},
		{"\x00\x01\x7f\x08", 100, ""},
		{"bidi \u202eevil\u2066", 100, "bidi evil"},
		{"zero\u200bwidth\ufeff", 100, "zerowidth"},
		{"line\u2028paragraph\u2029", 100, "lineparagraph"},
		{"bad \xff\xfe utf-8 \ufffd", 100, "bad  utf-8 "},
		{"private \ue000", 100, "private "},
		{"12345", 5, "12345"},
		{"123456", 5, "12345"},
		{"äöüßä", 5, "äöüßä"},
		{"äöüßäx", 5, "äöüßä"},
		{"anything", 0, ""},
	} {
		if got := printable(c.in, c.max); got != c.want {
			t.Errorf("printable(%q, %d) = %q, want %q", c.in, c.max, got, c.want)
		}
	}
}

func FuzzDecodeList(f *testing.F) {
	f.Add([]byte(`[{"Id":"` + idLong + `","Names":["/web"],"Image":"i","State":"running","Labels":{"com.docker.compose.service":"s"},` +
		`"HostConfig":{"NetworkMode":"host"},"Ports":[{"IP":"0.0.0.0","PrivatePort":80,"PublicPort":8080,"Type":"tcp"},{"IP":"fe80::1%eth0","PublicPort":1,"Type":"udp"}]}]`))
	f.Add([]byte(`[{"Id":"` + idLong + `","Names":["/\u001b"],"Ports":[{"IP":"fe80::1%\u001b","PublicPort":1,"Type":"tcp"}]}]`))
	f.Add([]byte(`[{"Id":"` + idLong + `","Ports":[{"IP":"::%x","PublicPort":1,"Type":"tcp"},{"IP":"::ffff:0.0.0.0","PublicPort":1,"Type":"tcp"}]}]`))
	f.Add([]byte(`[{"Id":"` + idLong + `","Labels":{"rdhpf.probe":"false"},"NetworkSettings":{"Networks":{"a":{"EndpointID":"e","IPAddress":"10.0.0.1","Gateway":"fe80::1%x"},"b":null}}}]`))
	f.Add([]byte(`[{"Id":"` + idLong + `","Names":["web"],"Labels":{"io.podman.compose.service":"s"},"Ports":[{"host_ip":"","container_port":80,"host_port":65534,"range":3,"protocol":"tcp"}]}]`))
	f.Add([]byte(`[{"Id":"` + idLong + `","Labels":{"rdhpf.skip":"\u001b","rdhpf.map":"80=8080,443=x"},"Ports":[{"IP":"::","PublicPort":80,"Type":"tcp"}]}]`))
	f.Add([]byte(`[null,{`))
	f.Fuzz(func(t *testing.T, in []byte) {
		list, err := decodeList(bytes.NewReader(in))
		if err != nil && list != nil {
			t.Error("a list with an error")
		}
		checkList(t, list)
	})
}

func FuzzDecodeEvent(f *testing.F) {
	f.Add([]byte(`{"status":"start","id":"` + idLong + `","Type":"container","Action":"die","Actor":{"ID":"` + idLong + `"}}`))
	f.Add([]byte(`{"status":"died","id":"x"}`))
	f.Add([]byte(`{"Type":"service","Action":"create","Actor":{"ID":"okwjt6ohf335m1riybx3ewyx9"}}`))
	f.Add([]byte(`{"Type":"network","Action":"connect","Actor":{"ID":"n","Attributes":{"container":"` + idLong + `"}}}`))
	f.Fuzz(func(t *testing.T, in []byte) {
		ev, ok := decodeEvent(in)
		if !ok {
			return
		}
		if ev.id == "" && (ev.action == "service" || ev.action == "node") {
			return
		}
		if id, valid := shortID(ev.id); !valid || id != ev.id || ev.action == "" {
			t.Errorf("%+v", ev)
		}
		checkPrintable(t, ev.action)
		if !json.Valid(in) {
			t.Error("an event that is no JSON")
		}
	})
}

const testMark = "rdhpf-0123456789abcdef\n"

func TestDiscardTo(t *testing.T) {
	for _, c := range []struct{ name, in, rest, err string }{
		{"no noise", testMark + "rest", "rest", ""},
		{"noise", "Welcome!\n\x1b[31m" + testMark + "rest", "rest", ""},
		{"noise without an end", "no newline" + testMark + "rest", "rest", ""},
		{"the beginning of the marker", "r rd rdh rdhpf- rdhpf-0123" + testMark + "rest", "rest", ""},
		{"the marker's first letter twice", "rr" + testMark + "rest", "rest", ""},
		{"a marker that is another", "rdhpf-fedcba9876543210\n" + testMark + "rest", "rest", ""},
		{"the marker echoed in a command", "+ echo " + strings.TrimSpace(testMark) + "; exec x\n" + testMark + "rest", "rest", ""},
		{"twice", testMark + testMark, testMark, ""},
		{"much noise", strings.Repeat("x", maxNoise-len(testMark)) + testMark + "rest", "rest", ""},
		{"too much noise", strings.Repeat("x", 2*maxNoise), "", "startup"},
		{"nothing", "", "", "EOF"},
		{"noise only", "Welcome!\n", "", "EOF"},
		{"half a marker", testMark[:10], "", "EOF"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := bufio.NewReader(strings.NewReader(c.in))
			_, err := discardTo(r, testMark)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Errorf("error %v, want one with %q", err, c.err)
				}
				return
			}
			rest := new(strings.Builder)
			r.WriteTo(rest)
			if err != nil || rest.String() != c.rest {
				t.Errorf("left %q, %v, want %q", rest, err, c.rest)
			}
		})
	}
}

func FuzzDiscardTo(f *testing.F) {
	f.Add([]byte("noise"), []byte("rest"))
	f.Add([]byte("rdhpf-0123"), []byte(testMark))
	f.Add([]byte("rdhpf-rrdhpf-01234"), []byte(""))
	f.Fuzz(func(t *testing.T, noise, rest []byte) {
		if len(noise) > maxNoise/2 {
			return
		}
		in := string(noise) + testMark + string(rest)
		_, want, _ := strings.Cut(in, testMark)
		r := bufio.NewReader(strings.NewReader(in))
		if _, err := discardTo(r, testMark); err != nil {
			t.Fatal(err)
		}
		got := new(strings.Builder)
		r.WriteTo(got)
		if got.String() != want {
			t.Errorf("left %q, want %q", got, want)
		}
	})
}

// The command is run by shells that are here, with stand-ins for docker and
// podman which say how they were called.
func TestEngineCommand(t *testing.T) {
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	tools := func(names ...string) string {
		dir := t.TempDir()
		if err := os.Symlink(sh, filepath.Join(dir, "sh")); err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			script := "#!" + sh + "\necho \"$0 $*\"\n"
			if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	mark := strings.TrimSpace(testMark)
	for _, c := range []struct {
		name, socket string
		tools        []string
		want         string // what was called, "" for nothing
	}{
		{"docker", "", []string{"docker"}, "docker system dial-stdio"},
		{"docker at a socket", "/run/user/1000/docker.sock", []string{"docker"}, "docker --host=unix:///run/user/1000/docker.sock system dial-stdio"},
		{"all that a path may have", "/a._-+@:=~/B0", []string{"docker"}, "docker --host=unix:///a._-+@:=~/B0 system dial-stdio"},
		{"both", "", []string{"docker", "podman"}, "docker system dial-stdio"},
		{"podman", "", []string{"podman"}, "podman system dial-stdio"},
		{"podman at a socket", "/run/p.sock", []string{"podman"}, "podman --url=unix:///run/p.sock system dial-stdio"},
		{"neither", "", nil, ""},
	} {
		for _, name := range []string{"sh", "dash", "bash", "zsh", "ksh", "fish", "csh", "tcsh"} {
			shell, err := exec.LookPath(name)
			if err != nil {
				continue
			}
			t.Run(c.name+"/"+name, func(t *testing.T) {
				dir := tools(c.tools...)
				var out, errs strings.Builder
				cmd := exec.Command(shell, "-c", engineCommand(c.socket, mark))
				cmd.Env, cmd.Stdout, cmd.Stderr = []string{"PATH=" + dir, "HOME=" + dir}, &out, &errs
				err := cmd.Run()
				first, rest, _ := strings.Cut(out.String(), "\n")
				if first != mark || !strings.Contains(errs.String(), mark+"\n") {
					t.Fatalf("no marker: stdout %q, stderr %q", out.String(), errs.String())
				}
				if c.want == "" {
					if err == nil || rest != "" || !strings.Contains(errs.String(), "docker") {
						t.Errorf("stdout %q, stderr %q, %v, want a complaint that docker is missing", rest, errs.String(), err)
					}
					return
				}
				if want := dir + "/" + c.want + "\n"; err != nil || rest != want {
					t.Errorf("ran %q, %v, want %q; stderr %q", rest, err, want, errs.String())
				}
			})
		}
	}
}

// Engines have a minimum API version, 1.44 from Docker 29 on, and reject requests for an older one. No
// request asks for any.
func TestEngineMinimumVersion(t *testing.T) {
	versioned := regexp.MustCompile(`^/v[0-9.]+/`)
	answers := map[string]string{"/_ping": "OK", "/containers/json": `[{"Id":"` + idLong + `"}]`, "/services": "[]",
		"/events": `{"Type":"container","Action":"start","Actor":{"ID":"` + idLong + `"}}` + "\n"}
	e := engineWith(t, func(r *bufio.Reader, w io.WriteCloser) string {
		for range answers {
			req, err := http.ReadRequest(r)
			if err != nil {
				t.Error(err)
				return ""
			}
			status, body := "200 OK", answers[req.URL.Path]
			if versioned.MatchString(req.URL.Path) {
				status, body = "400 Bad Request", `{"message":"client version 1.41 is too old. Minimum supported API version is 1.44"}`
			}
			fmt.Fprintf(w, "HTTP/1.1 %s\r\nServer: Docker/29.0.0 (linux)\r\nApi-Version: 1.52\r\nContent-Length: %d\r\n\r\n%s", status, len(body), body)
		}
		return ""
	})
	if err := e.ping(patience); err != nil {
		t.Error(err)
	}
	if list, err := e.list(); err != nil || len(list) != 1 {
		t.Errorf("%d containers, %v", len(list), err)
	}
	if sw, err := e.listSwarm(); err != nil || sw == nil || sw.services == nil {
		t.Errorf("the Swarm is %+v, %v", sw, err)
	}
	happened := 0
	e.events(func() {}, func(event) { happened++ })
	if happened != 1 {
		t.Errorf("%d events", happened)
	}
}

// A zone that nobody can mind is kept.
func TestDecodeZone(t *testing.T) {
	list, err := decodeList(strings.NewReader(`[{"Id":"` + idLong + `","Ports":[{"IP":"fe80::1%eth0","PrivatePort":80,"PublicPort":80,"Type":"tcp"}]}]`))
	if err != nil || len(list) != 1 || len(list[0].ports) != 1 || list[0].ports[0].ip != netip.MustParseAddr("fe80::1%eth0") {
		t.Errorf("%v, %v", list, err)
	}
}

// engineWith is an engine at the other end of whose session serve takes requests, a connection's worth. What it returns goes
// to stderr, before the session ends.
func engineWith(t *testing.T, serve func(r *bufio.Reader, w io.WriteCloser) (stderr string)) *engine {
	t.Helper()
	near, _ := unixPair(t)
	s := &muxSession{mux: &muxConn{conn: near}, errsEnded: make(chan struct{}), ended: make(chan struct{}), code: 1}
	var far [3]*os.File
	var err error
	for i, pipe := range []func() error{
		func() error { far[0], s.in, err = os.Pipe(); return err },
		func() error { s.out, far[1], err = os.Pipe(); return err },
		func() error { s.errs, far[2], err = os.Pipe(); return err },
	} {
		if err := pipe(); err != nil {
			t.Fatal(i, err)
		}
	}
	const mark = "rdhpf-0123456789abcdef"
	limit := &io.LimitedReader{R: s}
	e := &engine{s: s, limit: limit, r: bufio.NewReader(limit), mark: mark}
	s.goroutines.Add(2)
	go s.collectErrs()
	go func() {
		defer s.goroutines.Done()
		defer close(s.ended)
		said := serve(bufio.NewReader(far[0]), far[1])
		io.WriteString(far[2], "start-up noise\n"+mark+"\n"+said)
		for _, f := range far {
			f.Close()
		}
	}()
	t.Cleanup(func() { e.Close() })
	return e
}

// scripted is a serve of engineWith that gives these answers, and then ends; it wants these paths asked for.
func scripted(t *testing.T, stderr string, pathsAndAnswers ...string) func(r *bufio.Reader, w io.WriteCloser) string {
	return func(r *bufio.Reader, w io.WriteCloser) string {
		for i := 0; i < len(pathsAndAnswers); i += 2 {
			req, err := http.ReadRequest(r)
			if err != nil {
				t.Errorf("request %d: %v", i/2, err)
				return ""
			}
			if got := req.Method + " " + req.URL.String(); got != "GET "+pathsAndAnswers[i] || req.Host != "docker" || req.Header.Get("User-Agent") != "rdhpf" {
				t.Errorf("asked %s of %s, want %s", got, req.Host, pathsAndAnswers[i])
			}
			io.WriteString(w, pathsAndAnswers[i+1])
		}
		return stderr
	}
}

func TestEnginePodman(t *testing.T) {
	const (
		filters = "?filters=%7B%22status%22%3A%5B%22running%22%2C%22paused%22%5D%7D"
		list    = "/containers/json"
		own     = "/v4.0.0/libpod/containers/json" + filters
		gone    = "404 Not Found"
	)
	answer := func(status, body string) string {
		return fmt.Sprintf("HTTP/1.1 %s\r\nServer: Libpod/4.3.1 (linux)\r\nContent-Length: %d\r\n\r\n%s", status, len(body), body)
	}
	ok := func(body string) string { return answer("200 OK", body) }
	id := func(n int) string { return fmt.Sprintf("%012x", n) }
	one := func(n int, rest string) string {
		return fmt.Sprintf(`{"Id":"%064s","Names":["/c%d"]%s}`, id(n)+strings.Repeat("0", 52), n, rest)
	}
	nets := `,"NetworkSettings":{"Networks":{"podman":{"EndpointID":"","Gateway":"10.88.0.1","IPAddress":"10.88.0.5"}}}`
	ports := `,"Ports":[{"PrivatePort":80,"PublicPort":7000,"Type":"tcp"}]`
	ranged := `,"Ports":[{"host_ip":"","container_port":80,"host_port":7000,"range":2,"protocol":"tcp"}]`
	inspected := func(mode string) string {
		return ok(`{"Name":"x","Image":"i","State":{},"HostConfig":{"NetworkMode":"` + mode + `"}}`)
	}
	first := []string{list, ok("[]")} // as nobody knows yet
	const full = "00000000000%d c%[1]d net=,10.88.0.5,10.88.0.1 0.0.0.0:7000->80/tcp"
	for _, tt := range []struct {
		name  string
		asked []string
		want  []string // of each list
	}{
		{"a range", append(first, list+filters, ok("["+one(1, nets+ports)+"]"), own, ok("["+one(1, ranged)+"]")),
			[]string{fmt.Sprintf(full, 1) + " 0.0.0.0:7001->81/tcp"}},
		{"listed here or there", append(first, list+filters, ok("["+one(1, nets+ports)+"]"), own, ok("["+one(2, ranged)+"]")),
			[]string{fmt.Sprintf(full, 1)}},
		{"an own list of another form", append(first, list+filters, ok("["+one(1, nets+ports)+"]"), own, ok("["+one(1, `,"Ports":[{"hostPort":7000}]`)+"]")),
			[]string{fmt.Sprintf(full, 1)}},
		{"no own list", append(first, list+filters, ok("["+one(1, nets+ports)+"]"), own, answer(gone, strings.Repeat("x", 10_000))),
			[]string{fmt.Sprintf(full, 1)}},
		{"paused", append(first, list+filters, ok("["+one(1, `,"State":"paused"`+nets)+"]"), own, ok("["+one(1, `,"State":"paused"`)+"]")),
			[]string{id(1) + " c1 paused net=,10.88.0.5,10.88.0.1"}},
		{"networks, asked once", append(first,
			list+filters, ok("["+one(1, "")+","+one(2, "")+","+one(3, "")+"]"), own, ok("[]"),
			"/containers/"+id(1)+"/json", inspected("host"), "/containers/"+id(2)+"/json", inspected("none"), "/containers/"+id(3)+"/json", answer(gone, `{"cause":"no such container"}`),
			list+filters, ok("["+one(1, "")+","+one(2, "")+"]"), own, ok("[]"),
			list+filters, ok("["+one(2, "")+"]"), own, ok("[]"),
			list+filters, ok("["+one(1, "")+"]"), own, ok("[]"), "/containers/"+id(1)+"/json", inspected("host")),
			[]string{id(1) + " c1 host\n" + id(2) + " c2\n" + id(3) + " c3", id(1) + " c1 host\n" + id(2) + " c2", id(2) + " c2", id(1) + " c1 host"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := engineWith(t, scripted(t, "", tt.asked...))
			for _, want := range tt.want {
				got, err := e.list()
				if err != nil || listText(got) != want {
					t.Errorf("\n got %q, %v\nwant %q", listText(got), err, want)
				}
				checkList(t, got)
			}
			if _, err := e.list(); err == nil || !strings.Contains(err.Error(), "exit status 1") { // it has asked all
				t.Error(err)
			}
		})
	}
	t.Run("many networks to ask for", func(t *testing.T) {
		const n = maxInspect + 5
		var all []string
		asked := slices.Clone(first)
		for i := range n {
			all = append(all, one(i, ""))
		}
		for i := range n {
			if i%maxInspect == 0 {
				asked = append(asked, list+filters, ok("["+strings.Join(all, ",")+"]"), own, ok("[]"))
			}
			asked = append(asked, "/containers/"+id(i)+"/json", inspected("host"))
		}
		e := engineWith(t, scripted(t, "", asked...))
		for _, want := range []int{maxInspect, n} {
			got, err := e.list()
			if have := strings.Count(listText(got), " host"); err != nil || have != want {
				t.Errorf("%d on the host's network, %v, want %d", have, err, want)
			}
		}
	})
	for name, asked := range map[string][]string{
		"torn in its own list":     append(first, list+filters, ok("[]"), own, ok("[]")[:60]),
		"torn in a refusal":        append(first, list+filters, ok("[]"), own, "HTTP/1.1 404 Not Found\r\nContent-Length: 10\r\n\r\n"),
		"torn in a container":      append(first, list+filters, ok("["+one(1, "")+"]"), own, ok("[]"), "/containers/"+id(1)+"/json", inspected("host")[:90]),
		"a container that is none": append(first, list+filters, ok("["+one(1, "")+"]"), own, ok("[]"), "/containers/"+id(1)+"/json", ok(`[]`)),
		"an own list that is none": append(first, list+filters, ok("[]"), own, ok(`{}`)),
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := engineWith(t, scripted(t, "", asked...)).list(); err == nil || got != nil {
				t.Errorf("%d containers, %v", len(got), err)
			}
		})
	}
}

func TestEngineAnswers(t *testing.T) {
	const (
		list   = "/containers/json"
		events = "/events?filters=%7B%22type%22%3A%5B%22container%22%2C%22network%22%2C%22service%22%2C%22node%22%5D%7D"
		ok     = "HTTP/1.1 200 OK\r\nServer: Docker/20.10.24 (linux)\r\n"
	)
	chunked := func(parts ...string) string {
		all := ok + "Transfer-Encoding: chunked\r\n\r\n"
		for _, p := range append(parts, "") {
			all += fmt.Sprintf("%x\r\n%s\r\n", len(p), p)
		}
		return all
	}
	sized := func(body string) string { return fmt.Sprintf("%sContent-Length: %d\r\n\r\n%s", ok, len(body), body) }
	start := `{"Type":"container","Action":"start","Actor":{"ID":"` + idLong + `"}}` + "\n"
	e := engineWith(t, scripted(t, "the end",
		list, sized(`[{"Id":"`+idLong+`"}]`+"\n"),
		list, chunked(`[{"Id":"`+idLong[:30], idLong[30:]+`"},`, `{"Id":"`+idLong+`"}]`, " \n"),
		"/_ping", sized("OK"),
		list, sized("[]"),
		list, "HTTP/1.1 500 Internal Server Error\r\nContent-Length: 17\r\n\r\n{\"message\":\"no\x1b\"}"))
	for i, want := range []int{1, 2, -1, 0, -2} {
		if want == -1 {
			if err := e.ping(patience); err != nil {
				t.Fatal(err)
			}
			continue
		}
		got, err := e.list()
		if want == -2 {
			if err == nil || !strings.Contains(err.Error(), `500 Internal Server Error: {"message":"no"}`) {
				t.Errorf("answer %d: %v", i, err)
			}
			continue
		}
		if err != nil || len(got) != want {
			t.Fatalf("answer %d: %d containers, %v", i, len(got), err)
		}
	}
	if e.server != "Docker/20.10.24 (linux)" {
		t.Errorf("server %q", e.server)
	}

	e = engineWith(t, scripted(t, "the \x1b[31mend\n", events, chunked(start, start[:20], start[20:]+"not an event\n",
		`{"Type":"container","Action":"exec_start"}`+"\n", strings.Replace(start, "start", "die", 1))))
	subscribed, happened := 0, ""
	err := e.events(func() { subscribed++ }, func(ev event) { happened += ev.action + " " + ev.id + "\n" })
	id := idLong[:12]
	if want := "start " + id + "\nstart " + id + "\ndie " + id + "\n"; subscribed != 1 || happened != want {
		t.Errorf("subscribed %d times, got %q, want %q", subscribed, happened, want)
	}
	if err == nil || err.Error() != "docker on the remote host: the [31mend" {
		t.Errorf("at the end: %v", err)
	}
}

// unending writes text again and again, until nobody reads it any more.
func unending(head, text string) func(r *bufio.Reader, w io.WriteCloser) string {
	return func(r *bufio.Reader, w io.WriteCloser) string {
		http.ReadRequest(r)
		text := strings.Repeat(text, 1+100_000/len(text))
		for _, err := io.WriteString(w, head); err == nil; _, err = io.WriteString(w, text) {
		}
		return ""
	}
}

func TestEngineRefuses(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\n"
	tears := func(stderr, answer string) func(r *bufio.Reader, w io.WriteCloser) string {
		return scripted(t, stderr, "/containers/json", answer)
	}
	for _, tt := range []struct {
		name, want string
		serve      func(r *bufio.Reader, w io.WriteCloser) string
	}{
		{"ends at once", "sh: docker: not found (is docker or podman on the PATH", tears("sh: docker: not found\n", "")},
		{"ends without a word", "exit status 1 and no error message", tears("", "")},
		{"torn in the header", "docker on the remote host: why", tears("why", ok+"Server: x\r\n")},
		{"torn in the body", "docker on the remote host: why", tears("why", ok+"Content-Length: 100\r\n\r\n[")},
		{"torn in a chunk", "docker on the remote host: why", tears("why", ok+"Transfer-Encoding: chunked\r\n\r\n10\r\n[")},
		{"torn after the list", "docker on the remote host: why", tears("why", ok+"Transfer-Encoding: chunked\r\n\r\n2\r\n[]\r\n")},
		{"torn, and not allowed", "permission denied (is that user allowed to use docker?)", tears("permission denied", "")},
		{"torn, and no engine", "Cannot connect (is the engine running?", tears("Cannot connect", "")},
		{"no HTTP", "malformed HTTP", tears("", "SSH-2.0-x\r\n\r\n")},
		{"no list", "it is not a JSON array", tears("", ok+"Content-Length: 2\r\n\r\n{}")},
		{"an endless line in its header", "the response header is longer than 65536 bytes", unending(ok+"A: ", "x")},
		{"an endless header", "the response header is longer than 65536 bytes", unending(ok, "A: b\r\n")},
		{"an endless status", "the response header is longer than 65536 bytes", unending("", "HTTP/1.1 ")},
		{"an endless container", "a container in it is longer than 1048576 bytes", unending(ok+"\r\n[{", `"a":"`+strings.Repeat("n", 100_000)+`",`)},
		{"a list over the limit", fmt.Sprintf("it is longer than %d bytes", maxList), unending(ok+"Content-Length: 10000000000\r\n\r\n[]", " ")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			list, err := engineWith(t, tt.serve).list()
			if err == nil || list != nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%d containers, %v, want %q", len(list), err, tt.want)
			}
			checkPrintable(t, err.Error())
		})
	}
}

func TestEngineEventsEnd(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\n\r\n"
	for _, tt := range []struct {
		name, want string
		serve      func(r *bufio.Reader, w io.WriteCloser) string
	}{
		{"refused", "404 Not Found", func(r *bufio.Reader, w io.WriteCloser) string {
			http.ReadRequest(r)
			io.WriteString(w, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
			return ""
		}},
		{"an endless event", "token too long", unending(ok, "x")},
		{"torn", "docker on the remote host: why", func(r *bufio.Reader, w io.WriteCloser) string {
			http.ReadRequest(r)
			io.WriteString(w, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\n{")
			return "why"
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := engineWith(t, tt.serve).events(func() {}, func(event) { t.Error("an event") })
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
	t.Run("many", func(t *testing.T) { // together they may be longer than any one
		line := `{"Type":"container","Action":"start","Actor":{"ID":"` + idLong + `"},"x":"` + strings.Repeat("x", maxEvent/2) + `"}` + "\n"
		n := 0
		engineWith(t, func(r *bufio.Reader, w io.WriteCloser) string {
			http.ReadRequest(r)
			io.WriteString(w, ok)
			for range 10 {
				io.WriteString(w, line)
			}
			return ""
		}).events(func() {}, func(event) { n++ })
		if n != 10 {
			t.Errorf("%d of 10 events", n)
		}
	})
}

// Close ends what is under way.
func TestEngineClose(t *testing.T) {
	asked, over := make(chan bool), make(chan bool)
	e := engineWith(t, func(r *bufio.Reader, w io.WriteCloser) string {
		http.ReadRequest(r)
		close(asked)
		<-over
		return ""
	})
	defer close(over)
	done := make(chan error, 1)
	go func() {
		_, err := e.list()
		done <- err
	}()
	<-asked
	e.s.in.Close()
	e.s.out.Close()
	if err := <-done; !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
}
