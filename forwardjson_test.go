package main

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// sameSnapshot checks that in is read as encoding/json reads it.
func sameSnapshot(t *testing.T, in []byte) {
	t.Helper()
	var ours, theirs snapshot
	err, want := unmarshalSnapshot(string(in), &ours, &ours), json.Unmarshal(in, &theirs)
	if (err == nil) != (want == nil) {
		t.Fatalf("%s: error %v, encoding/json %v", in, err, want)
	}
	if err == nil && string(mustJSON(ours)) != string(mustJSON(theirs)) {
		t.Errorf("%s:\n got %s\nwant %s", in, mustJSON(ours), mustJSON(theirs))
	}
}

func TestSnapshotJSON(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 678, time.UTC)
	full := forwardInfo{ContainerID: "abc123def456", LocalPort: 8080, RemotePort: 65535, Status: pending, Reason: reasonSilent, CreatedAt: at,
		UpdatedAt: at.Add(time.Hour), LocalAddress: "127.0.0.1", RemoteAddress: "::1", ContainerName: "web", ContainerPort: 1, Image: "a/b:c", Service: "s"}
	snap := &snapshot{Version: stateVersion, Host: "ssh://h", UpdatedAt: at, Warnings: []string{`"forwards":[{`}, Forwards: []forwardInfo{full, full}}
	for _, written := range [][]byte{mustJSON(snap), encodeState(snap)} {
		_, list, _ := strings.Cut(string(written), `s":`)
		_, list, _ = strings.Cut(list, `"forwards":`)
		if found, ok := (&cursor{list}).forwards(); !ok || len(found) != 2 {
			t.Errorf("what rdhpf writes is left to encoding/json: %s", written)
		}
		sameSnapshot(t, written)
		for i := range written { // torn
			sameSnapshot(t, written[:i])
		}
	}
	line := string(mustJSON(full))
	for _, f := range []string{line, line + "," + line, line + ",", line + "]", "", " ", ",", "{}", "null", "[]", `"x"`, "5", `{"local_port":"8080"}`,
		`{"status":5}`, `{"status":null}`, `{"local_port":null}`, `{"local_port":}`, `{"local_port":70000}`, `{"local_port":-1}`, `{"local_port":1.5}`,
		`{"local_port":1e2}`, `{"local_port":0}`, `{"local_port":+1}`, `{"local_port":01}`, `{"created_at":"yesterday"}`, `{"created_at":5}`,
		`{"STATUS":"active"}`, `{"status":"a","status":"b"}`, `{"other":[1,{"a":"}"}],"status":"a"}`, `{"reason":"a\"b\\c\u0041"}`, `{"reason":"ü€"}`,
		`{"reason":"a,b}c"}`, `{"reason":"<&>"}`, `{ "status" : "active" }`, "{\t\"status\":\"active\"}", `{"created_at":"2026-01-02T03:04:05+01:00"}`,
		`{"status":"a",}`, `{"status":"a"`, `{,}`, `{"status" "a"}`, strings.Replace(line, `"status":"pending"`, `"status":"pend\ning"`, 1)} {
		for _, in := range []string{`{"forwards":[` + f + `]}`, `{"host":"h","forwards":[` + f + `],"pid":5}`, `{"forwards":[` + f + `],"forwards":[` + line + `]}`,
			`{"forwards":[` + line + `],"forwards":[` + f + `]}`, `{"forwards":` + f + `}`, `{"a\"forwards":[` + f + `]}`, `{"connection":{"forwards":[` + f + `]}}`} {
			sameSnapshot(t, []byte(in))
		}
	}
}

func FuzzSnapshotJSON(f *testing.F) {
	f.Add([]byte(`{"host":"h","forwards":[{"container_id":"a","local_port":1,"created_at":"2026-01-02T03:04:05Z"}],"pid":1}`))
	f.Add([]byte(`{"forwards": [{"reason":"a\\","status":"}","local_port":0}, {}]}`))
	f.Add(encodeState(&snapshot{Forwards: []forwardInfo{{Status: active}}}))
	f.Fuzz(func(t *testing.T, in []byte) {
		if utf8.Valid(in) { // clean drops what is no UTF-8 from either
			sameSnapshot(t, in)
		}
	})
}
