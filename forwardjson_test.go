package main

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// plainForward is read by encoding/json alone.
type plainForward forwardInfo

func sameForward(t *testing.T, in []byte) {
	t.Helper()
	var ours forwardInfo
	var theirs plainForward
	err, want := json.Unmarshal(in, &ours), json.Unmarshal(in, &theirs)
	if (err == nil) != (want == nil) {
		t.Fatalf("%s: error %v, encoding/json %v", in, err, want)
	}
	if err == nil && string(mustJSON(ours)) != string(mustJSON(forwardInfo(theirs))) {
		t.Errorf("%s:\n got %s\nwant %s", in, mustJSON(ours), mustJSON(forwardInfo(theirs)))
	}
}

func TestForwardJSON(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 678, time.UTC)
	full := forwardInfo{ContainerID: "abc123def456", LocalPort: 8080, RemotePort: 65535, Status: pending, Reason: reasonSilent, CreatedAt: at,
		UpdatedAt: at.Add(time.Hour), LocalAddress: "127.0.0.1", RemoteAddress: "::1", ContainerName: "web", ContainerPort: 1, Image: "a/b:c", Service: "s"}
	line := string(mustJSON(full))
	var scanned forwardInfo
	if !scanned.scan(line) {
		t.Error("what rdhpf writes is left to encoding/json")
	}
	for _, in := range []string{line, "{}", "null", "[]", `"x"`, "5", `{"local_port":"8080"}`, `{"status":5}`, `{"status":null}`, `{"local_port":null}`,
		`{"local_port":70000}`, `{"local_port":-1}`, `{"local_port":1.5}`, `{"local_port":1e2}`, `{"created_at":"yesterday"}`, `{"created_at":5}`,
		`{"STATUS":"active"}`, `{"status":"a","status":"b"}`, `{"other":[1,{"a":"}"}],"status":"a"}`, `{"reason":"a\"b\\c\u0041"}`, `{"reason":"ü€"}`,
		`{"reason":"a,b}c"}`, `{"reason":"<&>"}`, `{ "status" : "active" }`, `{"created_at":"2026-01-02T03:04:05+01:00"}`,
		strings.Replace(line, "8080", "08080", 1), strings.Replace(line, `"status":"pending"`, `"status":"pend\ning"`, 1)} {
		sameForward(t, []byte(in))
	}
}

func FuzzForwardJSON(f *testing.F) {
	f.Add([]byte(`{"container_id":"a","local_port":1,"created_at":"2026-01-02T03:04:05Z"}`))
	f.Add([]byte(`{"reason":"a\\","status":"}","local_port":0}`))
	f.Fuzz(func(t *testing.T, in []byte) {
		if utf8.Valid(in) && json.Valid(in) { // clean drops what is no UTF-8 from either
			sameForward(t, in)
		}
	})
}
