package main

// forwardjson.go: reading a forward's JSON as rdhpf itself writes it, in half
// the time that encoding/json takes: of a thousand forwards, reading them is
// most of what `rdhpf status` does.

import (
	"encoding/json"
	"strconv"
	"strings"
	"time"
)

// UnmarshalJSON leaves whatever is not as rdhpf writes it to encoding/json.
func (f *forwardInfo) UnmarshalJSON(b []byte) error {
	var g forwardInfo
	if g.scan(string(b)) {
		*f = g
		return nil
	}
	type plain forwardInfo
	return json.Unmarshal(b, (*plain)(f))
}

// scan reads an object of known members, without white space or escapes, and
// says whether s was one.
func (f *forwardInfo) scan(s string) bool {
	s, ok := strings.CutPrefix(s, "{")
	for ok {
		var name, value string
		if s, ok = strings.CutPrefix(s, `"`); !ok {
			return false
		}
		if name, s, ok = strings.Cut(s, `":`); !ok {
			return false
		}
		var quoted bool
		if s, quoted = strings.CutPrefix(s, `"`); quoted {
			if value, s, ok = strings.Cut(s, `"`); !ok || strings.Contains(value, `\`) {
				return false
			}
		} else if i := strings.IndexAny(s, ",}"); i >= 0 {
			value, s = s[:i], s[i:]
		}
		if !f.set(name, value, quoted) {
			return false
		}
		if s == "}" {
			return true
		}
		s, ok = strings.CutPrefix(s, ",")
	}
	return false
}

// set sets the member of that name, if value is fit for it.
func (f *forwardInfo) set(name, value string, quoted bool) bool {
	var text *string
	var port *uint16
	var when *time.Time
	switch name {
	case "container_id":
		text = &f.ContainerID
	case "local_port":
		port = &f.LocalPort
	case "remote_port":
		port = &f.RemotePort
	case "status":
		text = &f.Status
	case "reason":
		text = &f.Reason
	case "created_at":
		when = &f.CreatedAt
	case "updated_at":
		when = &f.UpdatedAt
	case "local_address":
		text = &f.LocalAddress
	case "remote_address":
		text = &f.RemoteAddress
	case "container_name":
		text = &f.ContainerName
	case "container_port":
		port = &f.ContainerPort
	case "image":
		text = &f.Image
	case "service":
		text = &f.Service
	}
	switch {
	case text != nil && quoted:
		*text = value
		return true
	case when != nil && quoted:
		return when.UnmarshalText([]byte(value)) == nil
	case port != nil && !quoted:
		n, err := strconv.ParseUint(value, 10, 16)
		*port = uint16(n)
		return err == nil && value[0] != '+' && (value[0] != '0' || value == "0")
	}
	return false
}
