package main

// decode.go: what the engine sends, decoded. It is not trusted: it is bounded,
// checked and made safe to print.

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"unicode"
)

const (
	maxContainer = 20000   // containers in one list
	maxPublished = 100_000 // ports that they publish
	maxOne       = 1 << 20 // bytes of one of them, which take some ten times that in memory
	maxText      = 200     // runes of a name that are kept
)

// decodeEvent returns the event and whether it is one that matters: health
// checks alone make three a second that do not.
func decodeEvent(line []byte) (event, bool) {
	var raw struct {
		Type, Action string
		Status, ID   string // as engines before 1.22 and podman have them
		Actor        struct{ ID string }
	}
	if json.Unmarshal(line, &raw) != nil || (raw.Type != "" && raw.Type != "container") {
		return event{}, false
	}
	if raw.Action == "" {
		raw.Action = raw.Status
	}
	if raw.Actor.ID == "" {
		raw.Actor.ID = raw.ID
	}
	switch raw.Action {
	case "start", "die", "pause", "unpause", "rename", "destroy", "restart", "stop", "update":
	case "died": // podman
		raw.Action = "die"
	default:
		return event{}, false
	}
	id, ok := shortID(raw.Actor.ID)
	return event{raw.Action, id}, ok
}

// decodeList decodes the answer to /containers/json, a container at a time, so
// that a long list costs no more than what is kept of it.
func decodeList(r io.Reader) (list []container, err error) {
	part := &io.LimitedReader{R: r, N: maxOne}
	defer func() {
		if err != nil && part.N == 0 {
			err = fmt.Errorf("a container in it is over %d bytes long", maxOne)
		}
	}()
	dec := json.NewDecoder(part)
	if t, err := dec.Token(); err != nil {
		return nil, unexpectedEOF(err)
	} else if t != json.Delim('[') {
		return nil, errors.New("it is no JSON array")
	}
	list = []container{}
	for published := 0; dec.More(); part.N = maxOne {
		var raw rawContainer
		if err := dec.Decode(&raw); err != nil {
			return nil, unexpectedEOF(err)
		}
		if len(list) == maxContainer {
			return nil, fmt.Errorf("it has more than %d containers", maxContainer)
		}
		if c, ok := raw.container(); ok {
			list = append(list, c)
			if published += len(c.ports); published > maxPublished {
				return nil, fmt.Errorf("it has more than %d published ports", maxPublished)
			}
		}
	}
	if _, err := dec.Token(); err != nil {
		return nil, unexpectedEOF(err)
	}
	return list, nil
}

func unexpectedEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

type rawContainer struct {
	ID         string `json:"Id"`
	Names      []string
	Image      string
	State      string
	Labels     map[string]string
	HostConfig struct{ NetworkMode string }
	Ports      []struct {
		IP          string
		PrivatePort int64
		PublicPort  int64
		Type        string
	}
}

// container keeps what is valid. A container without a valid id, or one that
// does not run, is none.
func (raw *rawContainer) container() (container, bool) {
	id, ok := shortID(raw.ID)
	if !ok || (raw.State != "" && raw.State != "running" && raw.State != "paused") {
		return container{}, false
	}
	c := container{id: id, name: id, image: printable(raw.Image, maxText),
		service: printable(raw.Labels["com.docker.compose.service"], maxText),
		paused:  raw.State == "paused", hostNet: raw.HostConfig.NetworkMode == "host"}
	for _, n := range raw.Names { // links of other containers have more slashes
		if n = strings.TrimPrefix(n, "/"); n != "" && !strings.Contains(n, "/") {
			if n = printable(n, maxText); n != "" {
				c.name = n
				break
			}
		}
	}
	for _, p := range raw.Ports {
		if p.PublicPort <= 0 || p.PublicPort > 65535 || p.PrivatePort < 0 || p.PrivatePort > 65535 {
			continue
		}
		q := port{private: uint16(p.PrivatePort), public: uint16(p.PublicPort), proto: printable(strings.ToLower(p.Type), 8)}
		if ip, err := netip.ParseAddr(p.IP); err == nil && badChar(ip.Zone(), ".-_") == "" && len(ip.Zone()) <= 15 {
			q.ip = ip.Unmap()
		} else if p.IP == "" { // podman's wildcard
			q.ip = netip.IPv4Unspecified()
		}
		c.ports = append(c.ports, q)
	}
	return c, true
}

// shortID is the first 12 characters of a container's id.
func shortID(id string) (string, bool) {
	if len(id) < 12 {
		return "", false
	}
	for _, c := range id[:12] {
		if !('0' <= c && c <= '9' || 'a' <= c && c <= 'f') {
			return "", false
		}
	}
	return id[:12], true
}

// printable makes text from elsewhere safe for a terminal and for one line: no
// control or format characters, at most max runes.
func printable(s string, max int) string {
	if len(s) <= max && strings.IndexFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) < 0 {
		return s
	}
	n := 0
	return strings.Map(func(r rune) rune {
		if n++; n > max {
			return -1
		}
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case r == unicode.ReplacementChar || !unicode.IsPrint(r):
			return -1
		}
		return r
	}, s)
}
