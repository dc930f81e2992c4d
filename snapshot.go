package main

// snapshot.go: what is known at one moment, as others are shown it: the JSON of
// the state file, of the socket and of `rdhpf status -json`. The names of its
// fields are an interface: they may be added to, never changed.

import (
	"fmt"
	"net/netip"
	"strconv"
	"time"
)

const stateVersion = "1.0"

// snapshot is immutable once posted. Times are UTC.
type snapshot struct {
	Version     string        `json:"version"`
	Host        string        `json:"host"`
	PID         int           `json:"pid"`
	StartedAt   time.Time     `json:"started_at"`
	UpdatedAt   time.Time     `json:"updated_at"` // when it was written or sent
	Connection  connection    `json:"connection"`
	Engine      string        `json:"engine"`        // "Docker/20.10.24 (linux)"
	LastEventAt *time.Time    `json:"last_event_at"` // null before the first event
	Paused      bool          `json:"paused"`
	Warnings    []string      `json:"warnings"` // what else is wrong with the instance
	Forwards    []forwardInfo `json:"forwards"`
	Skipped     []skippedPort `json:"skipped"`
}

// connection is that to the remote host.
type connection struct {
	State      string    `json:"state"` // connecting, connected, reconnecting
	Since      time.Time `json:"since"`
	Reconnects int       `json:"reconnects"`
	LastError  string    `json:"last_error"`
}

const (
	connecting   = "connecting"
	connected    = "connected"
	reconnecting = "reconnecting"
)

// forwardInfo is one forward.
type forwardInfo struct {
	ContainerID   string    `json:"container_id"`
	LocalPort     uint16    `json:"local_port"`
	RemotePort    uint16    `json:"remote_port"`
	Status        string    `json:"status"`
	Reason        string    `json:"reason"`
	CreatedAt     time.Time `json:"created_at"` // when it was first attempted
	UpdatedAt     time.Time `json:"updated_at"` // of the last change of status or reason
	LocalAddress  string    `json:"local_address"`
	RemoteAddress string    `json:"remote_address"`
	ContainerName string    `json:"container_name"`
	ContainerPort uint16    `json:"container_port"`
	Image         string    `json:"image"`
	Service       string    `json:"service"`
}

// utc makes t fit to be written: no monotonic clock, no zone.
func utc(t time.Time) time.Time { return t.Round(0).UTC() }

// show fills in what the core knows.
func (s *state) show(snap *snapshot) {
	snap.Paused, snap.Skipped = s.paused, s.skipped
	snap.Forwards = make([]forwardInfo, 0, len(s.forwards))
	for _, f := range s.sorted() {
		if !f.wanted {
			continue
		}
		snap.Forwards = append(snap.Forwards, forwardInfo{
			ContainerID: f.id, LocalPort: f.local.Port(), RemotePort: f.remote.Port(),
			Status: f.status, Reason: f.reason, CreatedAt: utc(f.created), UpdatedAt: utc(f.updated),
			LocalAddress: f.local.Addr().String(), RemoteAddress: f.remote.Addr().String(),
			ContainerName: f.name, ContainerPort: f.private, Image: f.image, Service: f.service,
		})
	}
}

// local is the local end as a person writes it.
func (f *forwardInfo) local() string {
	if f.LocalAddress == "127.0.0.1" { // by far the most
		return "127.0.0.1:" + strconv.Itoa(int(f.LocalPort))
	}
	return netip.AddrPortFrom(addrOf(f.LocalAddress), f.LocalPort).String()
}

// addrOf parses an address that rdhpf wrote; in a file that somebody else did,
// what is none becomes 127.0.0.1.
func addrOf(s string) netip.Addr {
	if a, err := netip.ParseAddr(s); err == nil {
		return a
	}
	return loopback4
}

// health is the answer to whether all is well.
type health struct {
	Status      string         `json:"status"` // ok, degraded, down
	Reasons     []string       `json:"reasons"`
	Counts      map[string]int `json:"counts"`
	Uptime      int64          `json:"uptime_seconds"`
	Connection  connection     `json:"connection"`
	Engine      string         `json:"engine"`
	LastEventAt *time.Time     `json:"last_event_at"`
}

// health judges: down without a connection, degraded where anything published
// does not answer for another reason than that it was just opened.
func (snap *snapshot) health(now time.Time) health {
	h := health{Status: "ok", Reasons: []string{}, Counts: map[string]int{active: 0, conflict: 0, pending: 0},
		Uptime: max(0, int64(now.Sub(snap.StartedAt).Seconds())), Connection: snap.Connection, Engine: snap.Engine, LastEventAt: snap.LastEventAt}
	h.Reasons = append(h.Reasons, snap.Warnings...)
	for _, f := range snap.Forwards {
		h.Counts[f.Status]++
		if f.Status != active && f.Reason != reasonProbing && f.Reason != reasonLost && f.Reason != reasonPaused {
			h.Reasons = append(h.Reasons, fmt.Sprintf("%s %s: %s", f.local(), f.Status, f.Reason))
		}
	}
	if snap.Paused {
		h.Reasons = append(h.Reasons, "paused: rdhpf resume opens the ports again")
	}
	if snap.Connection.State != connected {
		h.Status = "down"
		reason := snap.Connection.State
		if snap.Connection.LastError != "" {
			reason += ": " + snap.Connection.LastError
		}
		h.Reasons = append([]string{reason}, h.Reasons...)
	} else if len(h.Reasons) > 0 {
		h.Status = "degraded"
	}
	return h
}

// at is the snapshot as it is sent or written at now.
func (snap *snapshot) at(now time.Time) *snapshot {
	c := *snap
	c.UpdatedAt = utc(now)
	return &c
}

// clean makes a snapshot that came from elsewhere safe to print, its lists never
// nil.
func (snap *snapshot) clean() {
	for _, s := range []*string{&snap.Version, &snap.Host, &snap.Engine, &snap.Connection.State, &snap.Connection.LastError} {
		*s = printable(*s, 1000)
	}
	if snap.Forwards == nil {
		snap.Forwards = []forwardInfo{}
	}
	if snap.Skipped == nil {
		snap.Skipped = []skippedPort{}
	}
	if snap.Warnings == nil {
		snap.Warnings = []string{}
	}
	for i := range snap.Warnings {
		snap.Warnings[i] = printable(snap.Warnings[i], 1000)
	}
	for i := range snap.Forwards {
		f := &snap.Forwards[i]
		for _, s := range []*string{&f.ContainerID, &f.Status, &f.Reason, &f.LocalAddress, &f.RemoteAddress, &f.ContainerName, &f.Image, &f.Service} {
			*s = printable(*s, 1000)
		}
		if f.LocalAddress == "" {
			f.LocalAddress = loopback4.String()
		}
		if f.RemoteAddress == "" {
			f.RemoteAddress = loopback4.String()
		}
	}
	for i := range snap.Skipped {
		k := &snap.Skipped[i]
		for _, s := range []*string{&k.ContainerID, &k.Name, &k.Protocol, &k.Reason} {
			*s = printable(*s, 1000)
		}
	}
}
