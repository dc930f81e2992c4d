package main

// forwardjson.go: reading a snapshot's JSON as rdhpf itself writes it, in a
// fraction of the time that encoding/json takes: of a thousand forwards, reading
// them is most of what `rdhpf status` does.

import (
	"encoding/json"
	"strconv"
	"strings"
	"time"
)

// unmarshalSnapshot is json.Unmarshal of body into v, of which snap is a part.
// The list of forwards is read apart; what stands in for it meanwhile tells
// whether it is the snapshot's. What is not as rdhpf writes it is left to
// encoding/json as a whole.
func unmarshalSnapshot(body string, v any, snap *snapshot) error {
	head, tail, _ := strings.Cut(body, `"forwards":`)
	list := cursor{tail}
	if forwards, ok := list.forwards(); ok && !strings.Contains(list.rest, `"forwards":`) {
		err := json.Unmarshal([]byte(head+`"forwards":[{"status":"read apart"}]`+list.rest), v)
		if err == nil && len(snap.Forwards) == 1 && snap.Forwards[0] == (forwardInfo{Status: "read apart"}) {
			snap.Forwards = forwards
			return nil
		}
		*snap = snapshot{}
	}
	return json.Unmarshal([]byte(body), v)
}

// cursor reads a text of JSON from its start.
type cursor struct{ rest string }

// eat goes past c and the white space before it, or stays.
func (c *cursor) eat(b byte) bool {
	s := c.rest
	for s != "" && (s[0] == ' ' || s[0] == '\n') {
		s = s[1:]
	}
	if s == "" || s[0] != b {
		return false
	}
	c.rest = s[1:]
	return true
}

// text reads a string without escapes.
func (c *cursor) text() (s string, ok bool) {
	if !c.eat('"') {
		return "", false
	}
	s, c.rest, ok = strings.Cut(c.rest, `"`)
	return s, ok && strings.IndexByte(s, '\\') < 0
}

// forwards reads a list of forwards.
func (c *cursor) forwards() (list []forwardInfo, ok bool) {
	if !c.eat('[') {
		return nil, false
	}
	list = make([]forwardInfo, 0, min(strings.Count(c.rest, "{"), 1000)) // the text is not to be trusted
	for more := !c.eat(']'); more; {
		list = append(list, forwardInfo{})
		if !c.forward(&list[len(list)-1]) {
			return nil, false
		}
		if more = c.eat(','); !more && !c.eat(']') {
			return nil, false
		}
	}
	return list, true
}

// forward reads an object of known members.
func (c *cursor) forward(f *forwardInfo) bool {
	if !c.eat('{') {
		return false
	}
	for {
		name, ok := c.text()
		if !ok || !c.eat(':') || !c.member(f, name) {
			return false
		}
		if !c.eat(',') {
			return c.eat('}')
		}
	}
}

// member reads the value of that member.
func (c *cursor) member(f *forwardInfo, name string) (ok bool) {
	switch name {
	case "container_id":
		f.ContainerID, ok = c.text()
	case "local_port":
		f.LocalPort, ok = c.port()
	case "remote_port":
		f.RemotePort, ok = c.port()
	case "status":
		f.Status, ok = c.text()
	case "reason":
		f.Reason, ok = c.text()
	case "created_at":
		f.CreatedAt, ok = c.time()
	case "updated_at":
		f.UpdatedAt, ok = c.time()
	case "local_address":
		f.LocalAddress, ok = c.text()
	case "remote_address":
		f.RemoteAddress, ok = c.text()
	case "container_name":
		f.ContainerName, ok = c.text()
	case "container_port":
		f.ContainerPort, ok = c.port()
	case "image":
		f.Image, ok = c.text()
	case "service":
		f.Service, ok = c.text()
	}
	return ok
}

func (c *cursor) time() (time.Time, bool) {
	s, ok := c.text()
	if !ok {
		return time.Time{}, false
	}
	var t time.Time
	err := t.UnmarshalText([]byte(s))
	return t, err == nil
}

func (c *cursor) port() (uint16, bool) {
	c.rest = strings.TrimLeft(c.rest, " ")
	digits := 0
	for digits < len(c.rest) && '0' <= c.rest[digits] && c.rest[digits] <= '9' {
		digits++
	}
	s := c.rest[:digits]
	c.rest = c.rest[digits:]
	n, err := strconv.ParseUint(s, 10, 16)
	return uint16(n), err == nil && (s[0] != '0' || s == "0")
}
