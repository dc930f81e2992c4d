package main

// Golden tests of what a person and a script are shown: go test -run Table
// -update writes testdata/*.golden anew. An escape character is ␛ there.

import (
	"bytes"
	"encoding/json"
	"flag"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode"
)

var updateGolden = flag.Bool("update", false, "write testdata/*.golden anew")

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	got = bytes.ReplaceAll(got, []byte("\x1b"), []byte("␛"))
	path := filepath.Join("testdata", name+".golden")
	if *updateGolden {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s:\n--- got\n%s\n--- want\n%s", path, got, want)
	}
}

// tableNow is when the goldens are looked at.
var tableNow = time.Date(2025, 11, 27, 15, 30, 45, 0, time.UTC)

func ago(d time.Duration) time.Time { return tableNow.Add(-d) }

// tableSnapshot is that of the design: one forward of each status.
func tableSnapshot() *snapshot {
	event := ago(45 * time.Second)
	return &snapshot{
		Version: stateVersion, Host: "ssh://user@host", PID: 12345, StartedAt: ago(30*time.Minute + 45*time.Second), UpdatedAt: tableNow,
		Connection: connection{State: connected, Since: ago(30 * time.Minute)}, Engine: "Docker/20.10.24 (linux)", LastEventAt: &event,
		Warnings: []string{}, Skipped: []skippedPort{},
		Forwards: []forwardInfo{
			{ContainerID: "abc123def456", LocalPort: 8080, RemotePort: 8080, Status: active,
				CreatedAt: ago(2*time.Minute + 15*time.Second), UpdatedAt: ago(2*time.Minute + 14*time.Second),
				LocalAddress: "127.0.0.1", RemoteAddress: "127.0.0.1", ContainerName: "web", ContainerPort: 80, Image: "nginx:1.27", Service: "web"},
			{ContainerID: "789abc123abc", LocalPort: 5432, RemotePort: 5432, Status: conflict, Reason: reasonGivenUp + " (held by postgres, pid 4242)",
				CreatedAt: ago(90 * time.Second), UpdatedAt: ago(85 * time.Second),
				LocalAddress: "127.0.0.1", RemoteAddress: "127.0.0.1", ContainerName: "shop-db-1", ContainerPort: 5432, Image: "postgres:16", Service: "db"},
			{ContainerID: "def456abc789", LocalPort: 3000, RemotePort: 3000, Status: pending, Reason: reasonSilent,
				CreatedAt: ago(45 * time.Second), UpdatedAt: ago(44 * time.Second),
				LocalAddress: "127.0.0.1", RemoteAddress: "127.0.0.1", ContainerName: "node", ContainerPort: 3000, Image: "node:22"},
		},
	}
}

// hostileText has what a name must not do to a terminal or to the table.
const hostileText = "a\x1b[31mred\x1b]0;title\a\r\nnext\tcell\u202ebidi\u2066\u200b\ufeff\x9b2J\x7f\xff日本é\u0000z"

func hostileSnapshot() *snapshot {
	s := tableSnapshot()
	s.Host, s.Engine, s.Connection = hostileText, hostileText, connection{State: reconnecting, Since: ago(time.Minute), LastError: hostileText}
	s.Warnings = []string{hostileText}
	s.Skipped = []skippedPort{{ContainerID: hostileText, Name: hostileText, Port: 53, Protocol: hostileText, Reason: hostileText}}
	f := &s.Forwards[0]
	f.ContainerID, f.ContainerName, f.Image, f.Service, f.Reason = hostileText, hostileText, hostileText, hostileText, hostileText
	f.LocalAddress, f.RemoteAddress = hostileText, hostileText
	s.Forwards[1].Status = hostileText
	s.Forwards[2].Reason = strings.Repeat("long\n", 10000)
	s.clean()
	return s
}

func TestTable(t *testing.T) {
	with := func(change func(*report)) *report {
		r := &report{snapshot: tableSnapshot(), Source: "socket", Running: true}
		change(r)
		return r
	}
	plain := with(func(*report) {})
	addresses := with(func(r *report) {
		f := r.Forwards
		f[0].RemoteAddress, f[0].LocalAddress = "::1", "::1"
		f[1].RemoteAddress = "10.97.0.2"
		f[2].LocalAddress, f[2].LocalPort, f[2].RemoteAddress = "0.0.0.0", 13000, "fe80::1%eth0"
	})
	hostile := with(func(r *report) { r.snapshot = hostileSnapshot() })
	for _, c := range []struct {
		name   string
		report *report
		style  tableStyle
	}{
		{"narrow", plain, tableStyle{}},
		{"wide", plain, tableStyle{wide: true}},
		{"colour", plain, tableStyle{colour: true}},
		{"wide-colour", plain, tableStyle{wide: true, colour: true}},
		{"addresses", addresses, tableStyle{}},
		{"addresses-wide", addresses, tableStyle{wide: true}},
		{"empty", with(func(r *report) { r.Forwards = []forwardInfo{} }), tableStyle{}},
		{"skipped", with(func(r *report) {
			r.Skipped = []skippedPort{
				{"fedcba987654", "agent", 0, "tcp", "host network: the container publishes no ports"},
				{"abc123def456", "web", 22, "tcp", "named by skip"},
				{"0123456789ab", "dns", 53, "udp", "SSH carries TCP only"},
			}
		}), tableStyle{}},
		{"paused", with(func(r *report) {
			r.Paused = true
			for i := range r.Forwards {
				r.Forwards[i].Status, r.Forwards[i].Reason = pending, reasonPaused
			}
		}), tableStyle{}},
		{"connecting", with(func(r *report) {
			r.Connection, r.Forwards = connection{State: connecting, Since: ago(3 * time.Second)}, nil
		}), tableStyle{}},
		{"reconnecting", with(func(r *report) {
			r.Connection = connection{State: reconnecting, Since: ago(75 * time.Second), Reconnects: 3, LastError: "ssh: Timeout, server host not responding."}
			for i := range r.Forwards {
				r.Forwards[i].Status, r.Forwards[i].Reason = pending, reasonLost
			}
		}), tableStyle{colour: true}},
		{"degraded", with(func(r *report) {
			r.snapshot.Warnings = []string{"the remote engine does not answer: EOF", "the state file cannot be written: no space left on device"}
		}), tableStyle{}},
		{"long", with(func(r *report) {
			r.Forwards[1].ContainerName = strings.Repeat("very-", 20) + "long"
			r.Forwards[1].Image = "registry.example.com:5000/" + strings.Repeat("team/", 10) + "image@sha256:" + strings.Repeat("0123456789abcdef", 4)
			r.Forwards[1].Reason = strings.Repeat("because ", 30)
		}), tableStyle{wide: true}},
		{"hostile", hostile, tableStyle{wide: true}},
		{"lsof", with(func(r *report) {
			r.Source, r.Running, r.Stale = "lsof", false, true
			r.snapshot = &snapshot{Version: stateVersion, Host: "ssh://user@host", UpdatedAt: tableNow, Connection: connection{State: "unknown"},
				Warnings: []string{}, Skipped: []skippedPort{},
				Forwards: []forwardInfo{{ContainerID: "unknown", LocalPort: 8080, LocalAddress: "127.0.0.1", RemoteAddress: "127.0.0.1", Status: active}}}
		}), tableStyle{wide: true}},
		{"clock-behind", with(func(r *report) { r.Forwards[0].CreatedAt = tableNow.Add(time.Hour) }), tableStyle{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var b bytes.Buffer
			printTable(&b, c.report, tableNow, c.style)
			golden(t, c.name, b.Bytes())
			for _, line := range strings.Split(b.String(), "\n") {
				if strings.TrimRight(line, " ") != line {
					t.Errorf("%q ends with spaces", line)
				}
			}
		})
	}
	var b bytes.Buffer
	printTable(&b, hostile, tableNow, tableStyle{wide: true})
	for _, r := range b.String() {
		if r != '\n' && !unicode.IsPrint(r) {
			t.Errorf("%q reaches the terminal", r)
		}
	}
	if got := strings.Count(b.String(), "\n"); got != 2+3+3 {
		t.Errorf("a hostile snapshot makes %d lines", got)
	}
}

func TestReportJSON(t *testing.T) {
	pretty := func(v any) []byte {
		var b bytes.Buffer
		if err := json.Indent(&b, mustJSON(v), "", "  "); err != nil {
			t.Fatal(err)
		}
		b.WriteByte('\n')
		return b.Bytes()
	}
	r := &report{snapshot: tableSnapshot(), Source: "socket", Running: true, warnings: []string{"for a person"}}
	r.Skipped = []skippedPort{{"0123456789ab", "dns", 53, "udp", "SSH carries TCP only"}}
	r.snapshot.Warnings = []string{"the remote engine does not answer: EOF"}
	r.Connection.Reconnects, r.Connection.LastError = 2, "ssh: Connection reset by peer"
	golden(t, "report.json", pretty(r))
	golden(t, "hostile.json", pretty(&report{snapshot: hostileSnapshot(), Source: "file", Stale: true}))
	empty := &snapshot{Host: "ssh://h", UpdatedAt: tableNow}
	empty.clean()
	golden(t, "empty.json", pretty(&report{snapshot: empty, Source: "file"}))
}

// The seed's field names are an interface.
func TestStateFileNames(t *testing.T) {
	var file map[string]json.RawMessage
	if err := json.Unmarshal(mustJSON(tableSnapshot()), &file); err != nil {
		t.Fatal(err)
	}
	var forwards []map[string]json.RawMessage
	if err := json.Unmarshal(file["forwards"], &forwards); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"version": `"1.0"`, "host": `"ssh://user@host"`, "pid": "12345",
		"started_at": `"2025-11-27T15:00:00Z"`, "updated_at": `"2025-11-27T15:30:45Z"`} {
		if got := string(file[name]); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
	for name, want := range map[string]string{"container_id": `"789abc123abc"`, "local_port": "5432", "remote_port": "5432", "status": `"conflict"`,
		"reason": `"port already in use after 5 retry attempts (held by postgres, pid 4242)"`, "created_at": `"2025-11-27T15:29:15Z"`, "updated_at": `"2025-11-27T15:29:20Z"`} {
		if got := string(forwards[1][name]); got != want {
			t.Errorf("%s of a forward is %s, want %s", name, got, want)
		}
	}
}

func TestHealthText(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*snapshot)
		status string
	}{
		{"health-ok", func(s *snapshot) { s.Forwards = s.Forwards[:1] }, "ok"},
		{"health-no-forwards", func(s *snapshot) { s.Forwards, s.Engine, s.LastEventAt = nil, "", nil }, "ok"},
		{"health-opening", func(s *snapshot) {
			s.Forwards = s.Forwards[:1]
			s.Forwards[0].Status, s.Forwards[0].Reason = pending, reasonProbing
		}, "ok"},
		{"health-degraded", func(*snapshot) {}, "degraded"},
		{"health-paused", func(s *snapshot) {
			s.Paused = true
			for i := range s.Forwards {
				s.Forwards[i].Status, s.Forwards[i].Reason = pending, reasonPaused
			}
		}, "degraded"},
		{"health-engine", func(s *snapshot) {
			s.Forwards, s.Warnings = s.Forwards[:1], []string{"the remote engine does not answer: EOF"}
		}, "degraded"},
		{"health-down", func(s *snapshot) {
			s.Connection = connection{State: reconnecting, Since: ago(75 * time.Second), LastError: "ssh: Connection reset by peer"}
			for i := range s.Forwards {
				s.Forwards[i].Status, s.Forwards[i].Reason = pending, reasonLost
			}
		}, "down"},
		{"health-starting", func(s *snapshot) {
			s.Connection, s.Forwards, s.StartedAt = connection{State: connecting, Since: ago(time.Second)}, nil, ago(time.Second)
		}, "down"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := tableSnapshot()
			c.change(s)
			h := s.health(tableNow)
			if h.Status != c.status {
				t.Errorf("status is %s, want %s", h.Status, c.status)
			}
			var b bytes.Buffer
			printHealth(&b, &h, tableNow)
			golden(t, c.name, b.Bytes())
		})
	}
	h := tableSnapshot().health(tableNow)
	var b bytes.Buffer
	if err := json.Indent(&b, mustJSON(h), "", "  "); err != nil {
		t.Fatal(err)
	}
	golden(t, "health.json", append(b.Bytes(), '\n'))
}

func TestAgeText(t *testing.T) {
	const day = 24 * time.Hour
	for d, want := range map[time.Duration]string{
		0: "0s", 1: "0s", time.Second - 1: "0s", time.Second: "1s", 45 * time.Second: "45s", 59*time.Second + 999*time.Millisecond: "59s",
		time.Minute: "1m0s", 2*time.Minute + 15*time.Second: "2m15s", time.Hour - time.Second: "59m59s",
		time.Hour: "1h0m", 3*time.Hour + 4*time.Minute + 59*time.Second: "3h4m", day - time.Second: "23h59m",
		day: "1d0h", 2*day + 5*time.Hour: "2d5h", 400*day + 23*time.Hour: "400d23h",
		-1: "0s", -time.Hour: "0s", math.MinInt64: "0s", math.MaxInt64: "106751d23h",
	} {
		if got := ageText(d); got != want {
			t.Errorf("%d ns: %s, want %s", int64(d), got, want)
		}
	}
}
