package main

import (
	"context"
	"os"
	"os/exec"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// Tests of docs/protocol.md: its transcripts, run against a server, and its tables of fields, compared with what is sent.
// And of the jq lines in docs/reference.md.

func protocolDoc(t *testing.T) string {
	t.Helper()
	body, err := os.ReadFile("docs/protocol.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// protocolSnap is the instance in the transcripts.
func protocolSnap() *snapshot {
	at := func(clock string) time.Time {
		t, err := time.Parse(time.RFC3339, "2025-11-27T"+clock+"Z")
		if err != nil {
			panic(err)
		}
		return t
	}
	event, verified, used := at("15:01:23"), at("15:04:00"), at("15:04:10")
	return &snapshot{Version: stateVersion, Host: "ssh://user@example.com", PID: 4242, StartedAt: at("15:00:00"),
		Connection: connection{State: connected, Since: at("15:00:01")}, Engine: "Docker/20.10.24 (linux)", LastEventAt: &event,
		DockerSocket: "/home/me/.rdhpf/WHhNu7djKMsZ.docker.sock", RemoteDockerSocket: "/var/run/docker.sock",
		Warnings: []string{},
		Forwards: []forwardInfo{
			{ContainerID: "abc123def456", LocalPort: 8080, RemotePort: 8080, Status: active, CreatedAt: event, UpdatedAt: at("15:01:24"),
				LocalAddress: "127.0.0.1", RemoteAddress: "127.0.0.1", ContainerName: "shop-web-1", ContainerPort: 80, Image: "nginx", Service: "web",
				VerifiedAt: &verified, Connections: 12, OpenConnections: 2, BytesIn: 1258291, BytesOut: 34567, LastUsedAt: &used},
			{ContainerID: "fed789abc123", LocalPort: 5432, RemotePort: 5432, Status: conflict, Reason: reasonGivenUp + " (held by postgres, pid 811)",
				CreatedAt: at("15:02:10"), UpdatedAt: at("15:02:15"), LocalAddress: "127.0.0.1", RemoteAddress: "127.0.0.1",
				ContainerName: "db", ContainerPort: 5432, Image: "postgres:16"},
		},
		Skipped: []skippedPort{{"fed789abc123", "db", 53, "udp", "SSH carries TCP only"}}}
}

// TestProtocolTranscripts runs each command of the transcripts.
func TestProtocolTranscripts(t *testing.T) {
	for _, tool := range []string{"nc", "socat", "jq"} {
		needTool(t, tool)
	}
	if help, _ := exec.Command("nc", "-h").CombinedOutput(); !strings.Contains(string(help), "OpenBSD") {
		if os.Getenv("CI") == "true" {
			t.Fatal("nc is not that of OpenBSD")
		}
		t.Skip("nc is not that of OpenBSD")
	}
	s := startSocket(t)
	s.askMu.Lock()
	s.reloads = true
	s.askMu.Unlock()
	s.board.post(protocolSnap())
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	ended := make(chan struct{})
	go func() { // something changes all the time, and subscribers are told
		defer close(ended)
		for ctx.Err() == nil {
			time.Sleep(20 * time.Millisecond)
			s.board.post(protocolSnap())
		}
	}()
	defer func() {
		cancel()
		<-ended
	}()
	commands := 0
	for _, block := range regexp.MustCompile("(?ms)^```console\n(.*?)^```$").FindAllStringSubmatch(protocolDoc(t), -1) {
		for _, one := range strings.Split("\n"+block[1], "\n$ ")[1:] {
			command, want, _ := strings.Cut(one, "\n")
			cmd := exec.CommandContext(ctx, "sh", "-c", command)
			cmd.Env = append(os.Environ(), "SOCK="+s.path)
			cmd.WaitDelay = time.Second // for what sh leaves behind where it is killed
			out, err := cmd.CombinedOutput()
			if got := strings.TrimSuffix(string(out), "\n"); err != nil || got != strings.TrimSuffix(want, "\n") {
				t.Errorf("%s\n got %s, %v\nwant %s", command, got, err, want)
			}
			commands++
		}
	}
	if commands < 15 {
		t.Errorf("%d commands were found", commands)
	}
	await(t, "the stop of the transcript", s.stopped)
}

// TestProtocolFields wants every field documented, and no other.
func TestProtocolFields(t *testing.T) {
	doc := protocolDoc(t)
	tables := regexp.MustCompile(`(?m)^\| field \| type \| what it is \|\n\|---\|---\|---\|\n((?:\|.*\n)+)`).FindAllStringSubmatch(doc, -1)
	types := []any{snapshot{}, connection{}, forwardInfo{}, skippedPort{}, health{}, traffic{}}
	if len(tables) != len(types) {
		t.Fatalf("%d tables of fields, want %d", len(tables), len(types))
	}
	for i, v := range types {
		var fields, documented []string
		typ := reflect.TypeOf(v)
		for j := range typ.NumField() {
			f := typ.Field(j)
			fields = append(fields, f.Tag.Get("json")+" "+protocolType(f.Type))
		}
		for _, row := range regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\| ([a-z ]+) \\|").FindAllStringSubmatch(tables[i][1], -1) {
			documented = append(documented, row[1]+" "+row[2])
		}
		if !slices.Equal(fields, documented) {
			t.Errorf("%v:\nthe fields are        %q\nand the documented are %q", typ, fields, documented)
		}
	}
}

// protocolType is what the documentation calls a type.
func protocolType(t reflect.Type) string {
	switch {
	case t == reflect.TypeOf(time.Time{}), t == reflect.TypeOf(&time.Time{}):
		return "time"
	case t.Kind() == reflect.String:
		return "string"
	case t.Kind() == reflect.Bool:
		return "boolean"
	case t.Kind() == reflect.Slice:
		return "array of " + protocolType(t.Elem()) + "s"
	case t.Kind() == reflect.Struct, t.Kind() == reflect.Map:
		return "object"
	}
	return "number"
}

// TestProtocolNames wants the files, methods, codes and limits that there are.
func TestProtocolNames(t *testing.T) {
	doc := protocolDoc(t)
	hash := hostHash("ssh://user@example.com")
	for _, want := range []string{hash + ".sock", hash + ".state.json", hash + ".lock", hash + ".ctl",
		"| -32700 |", "| -32600 |", "| -32601 |", "| -32602 |", "| -32000 |", "1,048,576", "128 connections"} {
		if !strings.Contains(doc, want) {
			t.Errorf("docs/protocol.md does not say %q", want)
		}
	}
	if maxLine != 1_048_576 || maxConns != 128 || firstDeadline != 10*time.Second || writeTimeout != 10*time.Second ||
		callTimeout != 10*time.Second || maxStateAge != 10*time.Second || beatEvery != 2*time.Second {
		t.Error("docs/protocol.md has other limits")
	}
	s := startSocket(t)
	c := s.dial(t)
	_, table, _ := strings.Cut(doc, "| method | result | what it does |\n|---|---|---|\n")
	table, _, _ = strings.Cut(table, "\n\n")
	var methods []string
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z]+)` \\|").FindAllStringSubmatch(table, -1) {
		methods = append(methods, row[1])
		c.asks(`{"jsonrpc":"2.0","id":1,"method":"`+row[1]+`","params":["x"]}`, `"code":-32602`)
	}
	if want := []string{"status", "health", "verify", "settle", "pause", "resume", "reload", "stop", "subscribe"}; !slices.Equal(methods, want) {
		t.Errorf("docs/protocol.md has the methods %q, want %q", methods, want)
	}
}

// TestReferenceJQ runs the jq lines of docs/reference.md against a report that has something for each.
func TestReferenceJQ(t *testing.T) {
	needTool(t, "jq")
	reference, err := os.ReadFile("docs/reference.md")
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
	for _, line := range strings.Split(string(reference), "\n") {
		if rest, ok := strings.CutPrefix(line, "rdhpf status -json | "); ok {
			lines = append(lines, rest)
		}
	}
	if len(lines) != len(want) {
		t.Fatalf("docs/reference.md has %d jq lines, and %d are expected", len(lines), len(want))
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
