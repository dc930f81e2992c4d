package main

// Tests of the JSON-RPC dialects: the examples of the specification of 2.0 as
// they stand there, what the other two dialects answer, and what no client in
// its right mind sends.

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"runtime"
	"strings"
	"testing"
)

// rpcTestServer knows the methods of the examples of the specification, and
// remembers what it was asked for.
type rpcTestServer struct{ called []string }

func (s *rpcTestServer) handle(req *rpcRequest) (any, *rpcError) {
	s.called = append(s.called, req.method)
	var list []float64
	var named struct{ Minuend, Subtrahend float64 }
	switch req.method {
	case "subtract":
		if json.Unmarshal(req.params, &list) == nil && len(list) == 2 {
			return list[0] - list[1], nil
		}
		if json.Unmarshal(req.params, &named) == nil {
			return named.Minuend - named.Subtrahend, nil
		}
		return nil, &rpcError{rpcBadParams, "Invalid params"}
	case "sum":
		total := 0.0
		json.Unmarshal(req.params, &list)
		for _, n := range list {
			total += n
		}
		return total, nil
	case "get_data":
		return []any{"hello", 5}, nil
	case "update", "notify_hello", "notify_sum":
		return true, nil
	case "nothing":
		return nil, nil
	case "fail":
		return nil, &rpcError{rpcFailed, "it <failed>"}
	}
	return nil, &rpcError{rpcNoMethod, "Method not found"}
}

// sameJSON says whether two texts are the same JSON, numbers to the digit.
func sameJSON(t *testing.T, a, b []byte) bool {
	t.Helper()
	var values [2]any
	for i, text := range [][]byte{a, b} {
		dec := json.NewDecoder(bytes.NewReader(text))
		dec.UseNumber()
		if err := dec.Decode(&values[i]); err != nil {
			t.Fatalf("no JSON: %v: %q", err, text)
		}
	}
	return reflect.DeepEqual(values[0], values[1])
}

const (
	parseError2     = `{"jsonrpc":"2.0","error":{"code":-32700,"message":"Parse error"},"id":null}`
	invalidRequest2 = `{"jsonrpc":"2.0","error":{"code":-32600,"message":"Invalid Request"},"id":null}`
	parseErrorPlain = `{"result":null,"error":"Parse error"}`
	invalidPlain    = `{"result":null,"error":"Invalid Request"}`
)

func TestRPC(t *testing.T) {
	long := strings.Repeat("7", 10_000)
	deep := func(n int) string { return strings.Repeat("[", n) + strings.Repeat("]", n) }
	tests := []struct {
		name, line string
		want       string // "" for no answer
		called     string // the methods, in turn
	}{
		// The examples of the JSON-RPC 2.0 specification, section 7, in its order.
		{"positional", `{"jsonrpc": "2.0", "method": "subtract", "params": [42, 23], "id": 1}`,
			`{"jsonrpc": "2.0", "result": 19, "id": 1}`, "subtract"},
		{"positional, the other way", `{"jsonrpc": "2.0", "method": "subtract", "params": [23, 42], "id": 2}`,
			`{"jsonrpc": "2.0", "result": -19, "id": 2}`, "subtract"},
		{"named", `{"jsonrpc": "2.0", "method": "subtract", "params": {"subtrahend": 23, "minuend": 42}, "id": 3}`,
			`{"jsonrpc": "2.0", "result": 19, "id": 3}`, "subtract"},
		{"named, the other way", `{"jsonrpc": "2.0", "method": "subtract", "params": {"minuend": 42, "subtrahend": 23}, "id": 4}`,
			`{"jsonrpc": "2.0", "result": 19, "id": 4}`, "subtract"},
		{"notification", `{"jsonrpc": "2.0", "method": "update", "params": [1,2,3,4,5]}`, "", "update"},
		{"notification of what there is not", `{"jsonrpc": "2.0", "method": "foobar"}`, "", "foobar"},
		{"non-existent method", `{"jsonrpc": "2.0", "method": "foobar", "id": "1"}`,
			`{"jsonrpc": "2.0", "error": {"code": -32601, "message": "Method not found"}, "id": "1"}`, "foobar"},
		{"invalid JSON", `{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]`, parseError2, ""},
		{"invalid request", `{"jsonrpc": "2.0", "method": 1, "params": "bar"}`, invalidRequest2, ""},
		{"batch, invalid JSON", `[
			{"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},
			{"jsonrpc": "2.0", "method"
		]`, parseError2, ""},
		{"empty array", `[]`, invalidRequest2, ""},
		{"invalid batch, not empty", `[1]`, `[` + invalidRequest2 + `]`, ""},
		{"invalid batch", `[1,2,3]`, `[` + invalidRequest2 + `,` + invalidRequest2 + `,` + invalidRequest2 + `]`, ""},
		{"batch", `[
			{"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},
			{"jsonrpc": "2.0", "method": "notify_hello", "params": [7]},
			{"jsonrpc": "2.0", "method": "subtract", "params": [42,23], "id": "2"},
			{"foo": "boo"},
			{"jsonrpc": "2.0", "method": "foo.get", "params": {"name": "myself"}, "id": "5"},
			{"jsonrpc": "2.0", "method": "get_data", "id": "9"}
		]`, `[
			{"jsonrpc": "2.0", "result": 7, "id": "1"},
			{"jsonrpc": "2.0", "result": 19, "id": "2"},
			{"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null},
			{"jsonrpc": "2.0", "error": {"code": -32601, "message": "Method not found"}, "id": "5"},
			{"jsonrpc": "2.0", "result": ["hello", 5], "id": "9"}
		]`, "sum notify_hello subtract foo.get get_data"},
		{"batch of notifications", `[
			{"jsonrpc": "2.0", "method": "notify_sum", "params": [1,2,4]},
			{"jsonrpc": "2.0", "method": "notify_hello", "params": [7]}
		]`, "", "notify_sum notify_hello"},

		// 2.0, what the specification says without an example.
		{"2.0 id a fraction", `{"jsonrpc":"2.0","method":"sum","id":1.50}`, `{"jsonrpc":"2.0","result":0,"id":1.50}`, "sum"},
		{"2.0 id null", `{"jsonrpc":"2.0","method":"sum","id":null}`, `{"jsonrpc":"2.0","result":0,"id":null}`, "sum"},
		{"2.0 id empty", `{"jsonrpc":"2.0","method":"sum","id":""}`, `{"jsonrpc":"2.0","result":0,"id":""}`, "sum"},
		{"2.0 id no integer can hold", `{"jsonrpc":"2.0","method":"sum","id":` + long + `}`, `{"jsonrpc":"2.0","result":0,"id":` + long + `}`, "sum"},
		{"2.0 id no float can hold", `{"jsonrpc":"2.0","method":"sum","id":-1e999}`, `{"jsonrpc":"2.0","result":0,"id":-1e999}`, "sum"},
		{"2.0 id with what HTML minds", `{"jsonrpc":"2.0","method":"sum","id":"<a&b>\u2028"}`, `{"jsonrpc":"2.0","result":0,"id":"<a&b>\u2028"}`, "sum"},
		{"2.0 id an object", `{"jsonrpc":"2.0","method":"sum","id":{"a":1}}`, invalidRequest2, ""},
		{"2.0 id an array", `{"jsonrpc":"2.0","method":"sum","id":[1]}`, invalidRequest2, ""},
		{"2.0 id true", `{"jsonrpc":"2.0","method":"sum","id":true}`, invalidRequest2, ""},
		{"2.0 failed", `{"jsonrpc":"2.0","method":"fail","id":1}`, `{"jsonrpc":"2.0","error":{"code":-32000,"message":"it <failed>"},"id":1}`, "fail"},
		{"2.0 failed, nobody wants to know", `{"jsonrpc":"2.0","method":"fail"}`, "", "fail"},
		{"2.0 result null", `{"jsonrpc":"2.0","method":"nothing","id":1}`, `{"jsonrpc":"2.0","result":null,"id":1}`, "nothing"},
		{"2.0 params null", `{"jsonrpc":"2.0","method":"sum","params":null}`, invalidRequest2, ""},
		{"2.0 params a string", `{"jsonrpc":"2.0","method":"sum","params":"x"}`, invalidRequest2, ""},
		{"2.0 no method", `{"jsonrpc":"2.0"}`, invalidRequest2, ""},
		{"2.0 empty method", `{"jsonrpc":"2.0","method":""}`, invalidRequest2, ""},
		{"2.0 method null", `{"jsonrpc":"2.0","method":null}`, invalidRequest2, ""},
		{"another version", `{"jsonrpc":"3.0","method":"sum"}`, invalidRequest2, ""},
		{"version a number", `{"jsonrpc":2.0,"method":"sum"}`, invalidRequest2, ""},
		{"version null", `{"jsonrpc":null,"method":"sum"}`, invalidRequest2, ""},
		{"members are case sensitive", `{"jsonrpc":"2.0","Method":"sum","METHOD":"sum"}`, invalidRequest2, ""},
		{"2.0 members that it does not know", `{"jsonrpc":"2.0","method":"sum","id":1,"x":[{}],"":0}`, `{"jsonrpc":"2.0","result":0,"id":1}`, "sum"},
		{"2.0 the last of two", `{"jsonrpc":"2.0","method":"sum","method":"fail","method":"get_data","id":1,"id":2}`, `{"jsonrpc":"2.0","result":["hello",5],"id":2}`, "get_data"},
		{"2.0 escaped", `{"json\u0072pc":"\u0032.0","meth\u006fd":"\u0073um","id":"\u0041"}`, `{"jsonrpc":"2.0","result":0,"id":"A"}`, "sum"},
		{"2.0 nested", `{"jsonrpc":"2.0","method":"get_data","params":` + deep(5000) + `,"id":1}`,
			`{"jsonrpc":"2.0","result":["hello",5],"id":1}`, "get_data"},
		{"2.0 nested too deep", `{"jsonrpc":"2.0","method":"sum","params":` + deep(100_000) + `,"id":1}`, parseError2, ""},
		{"batch nested too deep", deep(100_000), parseError2, ""},
		{"batch never closed", strings.Repeat("[", 100_000), parseError2, ""},
		{"batch with other dialects", `[{"method":"sum"},{"method":"sum","id":1},{"method":"sum","id":null},null,"x",[]]`,
			`[` + invalidRequest2 + `,` + strings.Replace(invalidRequest2, "null", "1", 1) + strings.Repeat(`,`+invalidRequest2, 4) + `]`, ""},
		{"batch of 16", `[` + strings.Repeat(`{"jsonrpc":"2.0","method":"sum"},`, 15) + `{"jsonrpc":"2.0","method":"sum","id":1}]`,
			`[{"jsonrpc":"2.0","result":0,"id":1}]`, strings.TrimSpace(strings.Repeat("sum ", 16))},
		{"batch of 17", `[` + strings.Repeat(`{"jsonrpc":"2.0","method":"sum"},`, 16) + `{"jsonrpc":"2.0","method":"sum","id":1}]`,
			`{"jsonrpc":"2.0","error":{"code":-32600,"message":"Invalid Request: over 16 in a batch"},"id":null}`, ""},

		// 1.0: what has an id and no version.
		{"1.0", `{"method":"sum","params":[1,2],"id":7}`, `{"id":7,"result":3,"error":null}`, "sum"},
		{"1.0 id a string", `{"method":"sum","params":[1,2],"id":"a"}`, `{"id":"a","result":3,"error":null}`, "sum"},
		{"1.0 id a fraction", `{"method":"sum","params":[1,2],"id":0.5}`, `{"id":0.5,"result":3,"error":null}`, "sum"},
		{"1.0 id false", `{"method":"sum","params":[1,2],"id":false}`, `{"id":false,"result":3,"error":null}`, "sum"},
		{"1.0 id an object", `{"method":"sum","params":[1,2],"id":{"a":[1, 2]}}`, `{"id":{"a":[1,2]},"result":3,"error":null}`, "sum"},
		{"1.0 notification", `{"method":"sum","params":[1,2],"id":null}`, "", "sum"},
		{"1.0 notification that fails", `{"method":"fail","params":[],"id":null}`, "", "fail"},
		{"1.0 failed", `{"method":"fail","params":[],"id":1}`, `{"id":1,"result":null,"error":"it <failed>"}`, "fail"},
		{"1.0 non-existent method", `{"method":"x","params":[],"id":1}`, `{"id":1,"result":null,"error":"Method not found"}`, "x"},
		{"1.0 params null", `{"method":"sum","params":null,"id":1}`, `{"id":1,"result":0,"error":null}`, "sum"},
		{"1.0 no params", `{"method":"sum","id":1}`, `{"id":1,"result":0,"error":null}`, "sum"},
		{"1.0 invalid", `{"method":7,"params":[],"id":1}`, `{"id":1,"result":null,"error":"Invalid Request"}`, ""},
		{"1.0 no request, so no notification", `{"method":7,"params":[],"id":null}`, `{"id":null,"result":null,"error":"Invalid Request"}`, ""},
		{"1.0 params a string", `{"method":"sum","params":"x","id":1}`, `{"id":1,"result":null,"error":"Invalid Request"}`, ""},

		// The plain form: neither.
		{"plain", `{"method":"sum","params":[1,2]}`, `{"result":3,"error":null}`, "sum"},
		{"plain, no params", `{"method":"sum"}`, `{"result":0,"error":null}`, "sum"},
		{"plain, empty params", `{"method":"sum","params":{}}`, `{"result":0,"error":null}`, "sum"},
		{"plain, params null", `{"method":"sum","params":null}`, `{"result":0,"error":null}`, "sum"},
		{"plain, result null", `{"method":"nothing"}`, `{"result":null,"error":null}`, "nothing"},
		{"plain, failed", `{"method":"fail"}`, `{"result":null,"error":"it <failed>"}`, "fail"},
		{"plain, non-existent method", `{"method":"x"}`, `{"result":null,"error":"Method not found"}`, "x"},
		{"plain, spaced out", " \t\r\n{ \"method\" :\t\"sum\" , \"params\" : [ 1 , 2 ] }\r\n ", `{"result":3,"error":null}`, "sum"},
		{"plain, invalid JSON", `{"method":"sum"`, parseErrorPlain, ""},
		{"plain, two on a line", `{"method":"sum"} {"method":"sum"}`, parseErrorPlain, ""},
		{"plain, nested too deep", strings.Repeat(`{"a":`, 100_000), parseErrorPlain, ""},
		{"nothing", ``, parseErrorPlain, ""},
		{"white space", " \t ", parseErrorPlain, ""},
		{"binary", "\x00\xff\x1b[31m", parseErrorPlain, ""},
		{"another protocol", "GET / HTTP/1.1", parseErrorPlain, ""},
		{"null", `null`, invalidPlain, ""},
		{"true", `true`, invalidPlain, ""},
		{"number", `-1e999`, invalidPlain, ""},
		{"string", `"status"`, invalidPlain, ""},
		{"empty object", `{}`, invalidPlain, ""},
		{"method an object", `{"method":{}}`, invalidPlain, ""},
		{"params a number", `{"method":"sum","params":3}`, invalidPlain, ""},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			var s rpcTestServer
			got := rpcAnswer([]byte(tc.line), s.handle)
			switch {
			case tc.want == "" || got == nil:
				if tc.want != "" || got != nil {
					t.Errorf("answer %s, want %s", got, tc.want)
				}
			case !sameJSON(t, got, []byte(tc.want)):
				t.Errorf("answer %s, want %s", got, tc.want)
			}
			if called := strings.Join(s.called, " "); called != tc.called {
				t.Errorf("called %q, want %q", called, tc.called)
			}
		})
	}
}

// Programs take the answers apart by hand too: the order of members is kept.
func TestRPCBytes(t *testing.T) {
	for line, want := range map[string]string{
		`{"method":"sum","params":{}}`:                        `{"result":0,"error":null}`,
		`{"id":3,"method":"fail","params":[]}`:                `{"id":3,"result":null,"error":"it \u003cfailed\u003e"}`,
		`{"id":3,"method":"sum","params":[],"jsonrpc":"2.0"}`: `{"jsonrpc":"2.0","result":0,"id":3}`,
	} {
		if got := rpcAnswer([]byte(line), new(rpcTestServer).handle); string(got) != want {
			t.Errorf("%s: answer %s, want %s", line, got, want)
		}
	}
}

func TestRPCNotification(t *testing.T) {
	for _, tc := range []struct{ line, want string }{
		{`{"method":"subscribe"}`, `{"result":{"a":1},"error":null}`},
		{`{"method":"subscribe","id":5}`, `{"id":null,"method":"status","params":[{"a":1}]}`},
		{`{"method":"subscribe","id":5,"jsonrpc":"2.0"}`, `{"jsonrpc":"2.0","method":"status","params":{"a":1}}`},
	} {
		req, bad := rpcParseRequest(json.RawMessage(tc.line))
		if bad != nil {
			t.Fatalf("%s: %v", tc.line, bad)
		}
		if got := req.notification(map[string]int{"a": 1}); string(got) != tc.want {
			t.Errorf("%s: notification %s, want %s", tc.line, got, tc.want)
		}
	}
}

// A line of little things costs about what it is long.
func TestRPCMemory(t *testing.T) {
	line := []byte("[" + strings.Repeat("1,", maxLine/2) + "1]")
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	answer := rpcAnswer(line, new(rpcTestServer).handle)
	runtime.ReadMemStats(&after)
	if grown := after.TotalAlloc - before.TotalAlloc; grown > 16*maxLine {
		t.Errorf("%d bytes were allocated for %d", grown, len(line))
	}
	if !strings.Contains(string(answer), "over 16 in a batch") {
		t.Errorf("answer %.200s", answer)
	}
}

func TestRPCNoParams(t *testing.T) {
	for params, ok := range map[string]bool{
		``: true, `null`: true, `{}`: true, `[]`: true, `[{}]`: true, `[null]`: true, "[\t{ } ]": true,
		`{"a":1}`: false, `[1]`: false, `[{},{}]`: false, `[[]]`: false, `{"":{}}`: false, `[""]`: false,
	} {
		bad := (&rpcRequest{method: "status", params: json.RawMessage(params)}).noParams()
		if ok != (bad == nil) {
			t.Errorf("params %s: %v", params, bad)
		} else if bad != nil && (bad.Code != rpcBadParams || bad.Message != "Invalid params: status takes none") {
			t.Errorf("params %s: %+v", params, bad)
		}
	}
}

func FuzzRPC(f *testing.F) {
	for _, line := range []string{
		`{"jsonrpc": "2.0", "method": "subtract", "params": [42, 23], "id": 1}`,
		`{"jsonrpc":"2.0","method":"fail","id":"<\u2028>"}`,
		`{"jsonrpc":"2.0","method":"sum"}`,
		`{"jsonrpc":"1.0","method":"sum","id":1}`,
		`{"jsonrpc":"2.0","method":"sum","id":[1e9]}`,
		`[{"jsonrpc":"2.0","method":"sum","id":null},{"method":"sum","id":3},1,[],{}]`,
		`[{"jsonrpc":"2.0","method":"sum"}]`, `[]`, `[1`, `[[]]`,
		`{"method":"sum","params":[1],"id":{"a":"\r"}}`, `{"method":"fail","id":0.10}`, `{"method":"x","id":null}`,
		`{"method":"sum","params":{}}`, `{"method":"fail"}`, `{"method":1}`, `{"method":"sum","params":3,"id":-0}`,
		`{"id":1,"id":2,"method":"sum","method":"fail"}`,
		`{"jsonrpc"`, `null`, "\xff", "", " \t\r\n", `{"a":{"a":{"a":[[[[`,
	} {
		f.Add([]byte(line))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		var s rpcTestServer
		answer := rpcAnswer(bytes.Clone(line), s.handle)
		if answer == nil {
			if !json.Valid(bytes.TrimSpace(line)) || len(s.called) == 0 {
				t.Errorf("%q is no notification and has no answer", line)
			}
			return
		}
		if bytes.ContainsAny(answer, "\r\n") || !json.Valid(answer) {
			t.Fatalf("%q: the answer is no line of JSON: %q", line, answer)
		}
		if answer[0] != '[' {
			rpcCheckAnswer(t, line, answer)
			return
		}
		var requests, answers []json.RawMessage
		if json.Unmarshal(line, &requests) != nil || json.Unmarshal(answer, &answers) != nil {
			t.Fatalf("%q: an array answers what is none: %s", line, answer)
		}
		if len(answers) == 0 || len(answers) > len(requests) {
			t.Fatalf("%q: %d answers to %d requests", line, len(answers), len(requests))
		}
		for _, a := range answers {
			rpcCheckAnswer(t, nil, a)
			if !bytes.HasPrefix(a, []byte(`{"jsonrpc"`)) {
				t.Errorf("%q: a batch has an answer that is no 2.0: %s", line, a)
			}
		}
	})
}

// rpcCheckAnswer checks one answer, and that it carries the id of the request
// where that is known.
func rpcCheckAnswer(t *testing.T, request, answer []byte) {
	t.Helper()
	var a, r map[string]json.RawMessage
	if err := json.Unmarshal(answer, &a); err != nil {
		t.Fatalf("answer %s: %v", answer, err)
	}
	json.Unmarshal(request, &r)
	_, hasResult := a["result"]
	errText, hasError := a["error"]
	id, hasID := a["id"]
	if _, two := a["jsonrpc"]; two {
		var e rpcError
		switch {
		case string(a["jsonrpc"]) != `"2.0"` || !hasID || hasResult == hasError || len(a) != 3:
			t.Errorf("%q: no 2.0 answer: %s", request, answer)
		case hasError && (json.Unmarshal(errText, &e) != nil || e.Code >= 0 || e.Message == ""):
			t.Errorf("%q: no 2.0 error: %s", request, answer)
		case request != nil && r["id"] == nil && string(id) != "null":
			t.Errorf("%q: an id from nowhere: %s", request, answer)
		case request != nil && string(id) == "null" && r["id"] != nil && string(r["id"]) != "null" && e.Code != rpcInvalid:
			t.Errorf("%q: the id is lost: %s", request, answer)
		case string(id) != "null" && request != nil && !sameJSON(t, id, r["id"]):
			t.Errorf("%q: another id: %s", request, answer)
		}
		return
	}
	var message *string
	if err := json.Unmarshal(errText, &message); err != nil || !hasError || !hasResult || message != nil && string(a["result"]) != "null" {
		t.Errorf("%q: no answer of 1.0 or the plain form: %s", request, answer)
	}
	if want := fmt.Sprint(r["id"] != nil); fmt.Sprint(hasID) != want || hasID && !sameJSON(t, id, r["id"]) {
		t.Errorf("%q: another id: %s", request, answer)
	}
}
