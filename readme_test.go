package main

// The README's jq lines, run against a report that has something for each.

import (
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// needTool skips the test where a program is missing, or fails it in CI.
func needTool(t *testing.T, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is not installed", name)
		}
		t.Skipf("%s is not installed", name)
	}
}

func TestReadmeJQ(t *testing.T) {
	needTool(t, "jq")
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 1, 2, 3, 4, 5, 678, time.UTC)
	forward := func(name string, port uint16, status, reason string) forwardInfo {
		return forwardInfo{ContainerID: "abc123def456", LocalPort: port, RemotePort: port, Status: status, Reason: reason,
			CreatedAt: at.Add(-time.Minute), UpdatedAt: at, LocalAddress: "127.0.0.1", RemoteAddress: "127.0.0.1",
			ContainerName: name, ContainerPort: port, Image: "image", Service: name}
	}
	r := &report{Source: "socket", Running: true, snapshot: &snapshot{Version: stateVersion, Host: "ssh://user@host", PID: 1,
		StartedAt: at, UpdatedAt: at, Connection: connection{State: connected, Since: at}, Warnings: []string{},
		Forwards: []forwardInfo{forward("web", 8080, active, ""),
			forward("db", 5432, conflict, reasonGivenUp+" (held by nginx, pid 4242)"), forward("my-api", 3000, pending, reasonSilent)},
		Skipped: []skippedPort{{"abc123def456", "dns", 53, "udp", "SSH carries TCP only"}}}}
	want := []string{
		"8080",
		"5432 conflict: port already in use after 5 retry attempts (held by nginx, pid 4242)\n3000 pending: port not responding",
		"http://127.0.0.1:8080/",
		"5432",
		`{"active":1,"conflict":1,"pending":1}`,
		"true",
		"true",
		"nginx, pid 4242",
		"dns 53/udp: SSH carries TCP only",
		"PORT_WEB_8080=8080\nPORT_DB_5432=5432\nPORT_MY_API_3000=3000",
		"8080 60s\n5432 60s\n3000 60s",
		`"abc123def456",8080,8080,"active",""` + "\n" +
			`"abc123def456",5432,5432,"conflict","port already in use after 5 retry attempts (held by nginx, pid 4242)"` + "\n" +
			`"abc123def456",3000,3000,"pending","port not responding"`,
	}
	var lines []string
	for _, line := range strings.Split(string(readme), "\n") {
		if rest, ok := strings.CutPrefix(line, "rdhpf status -json | "); ok {
			lines = append(lines, rest)
		}
	}
	if len(lines) != len(want) {
		t.Fatalf("the README has %d jq lines, and %d are expected", len(lines), len(want))
	}
	for i, line := range lines {
		cmd := exec.Command("sh", "-c", line)
		cmd.Stdin = strings.NewReader(string(mustJSON(r)))
		out, err := cmd.CombinedOutput()
		if got := strings.TrimSpace(string(out)); err != nil || got != want[i] {
			t.Errorf("%s\n got %s, %v\nwant %s", line, got, err, want[i])
		}
	}
}
