package main

// rpc.go: JSON-RPC in three dialects, told apart by the request: the plain form
// without an id, JSON-RPC 1.0 with one (what Go's net/rpc/jsonrpc speaks), and
// JSON-RPC 2.0. From a line to the line that answers it; no I/O.

import (
	"bytes"
	"encoding/json"
	"fmt"
)

// The codes of JSON-RPC 2.0, and ours.
const (
	rpcParse      = -32700
	rpcInvalid    = -32600
	rpcNoMethod   = -32601
	rpcBadParams  = -32602
	rpcFailed     = -32000 // what was asked for could not be done
	maxBatch      = 16     // with a thousand forwards each answer is large
	dialectPlain  = ""
	dialectOne    = "1.0"
	dialectTwo    = "2.0"
	noticeOfState = "status" // method of the notifications that follow a subscribe
)

type rpcError struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
}

func (e *rpcError) Error() string { return e.Message }

// rpcRequest is a request that was understood.
type rpcRequest struct {
	dialect string
	method  string
	params  json.RawMessage
	id      json.RawMessage // nil: none
	notice  bool            // nobody wants an answer
	batched bool
}

// rpcHandler does what a request asks for. The result must marshal.
type rpcHandler func(*rpcRequest) (any, *rpcError)

// rpcAnswer answers one line, nil where none is due.
func rpcAnswer(line []byte, handle rpcHandler) []byte {
	line = bytes.TrimSpace(line)
	if len(line) > 0 && line[0] == '[' {
		return rpcBatch(line, handle)
	}
	if !json.Valid(line) {
		return rpcUnparsed(line)
	}
	return rpcOne(line, handle, false)
}

// rpcUnparsed answers what is no JSON, in the dialect that it seems to be meant in.
func rpcUnparsed(line []byte) []byte {
	if bytes.Contains(line, []byte(`"jsonrpc"`)) {
		return (&rpcRequest{dialect: dialectTwo}).answer(nil, &rpcError{rpcParse, "Parse error"})
	}
	return (&rpcRequest{}).answer(nil, &rpcError{rpcParse, "Parse error"})
}

// rpcBatch answers a batch: an array of answers, nil where none is due.
func rpcBatch(line []byte, handle rpcHandler) []byte {
	two := &rpcRequest{dialect: dialectTwo}
	if !json.Valid(line) {
		return two.answer(nil, &rpcError{rpcParse, "Parse error"})
	}
	var batch []json.RawMessage
	dec := json.NewDecoder(bytes.NewReader(line))
	dec.Token()
	for dec.More() { // not at once: a line of "[1,1,1…" makes half a million
		if len(batch) == maxBatch {
			return two.answer(nil, &rpcError{rpcInvalid, fmt.Sprintf("Invalid Request: over %d in a batch", maxBatch)})
		}
		var v json.RawMessage
		dec.Decode(&v) // it is valid
		batch = append(batch, v)
	}
	if len(batch) == 0 {
		return two.answer(nil, &rpcError{rpcInvalid, "Invalid Request"})
	}
	var answers [][]byte
	for _, v := range batch {
		if a := rpcOne(v, handle, true); a != nil {
			answers = append(answers, a)
		}
	}
	if answers == nil {
		return nil
	}
	return append(append([]byte{'['}, bytes.Join(answers, []byte{','})...), ']')
}

// rpcOne answers one request, nil where none is due.
func rpcOne(v json.RawMessage, handle rpcHandler, batched bool) []byte {
	req, bad := rpcParseRequest(v)
	if batched {
		req.batched = true
		if req.dialect != dialectTwo {
			req.dialect, bad = dialectTwo, &rpcError{rpcInvalid, "Invalid Request"}
		}
	}
	if bad != nil {
		return req.answer(nil, bad)
	}
	result, failed := handle(req)
	if req.notice {
		return nil
	}
	return req.answer(result, failed)
}

// rpcParseRequest always returns a request that can be answered.
func rpcParseRequest(v json.RawMessage) (*rpcRequest, *rpcError) {
	req := &rpcRequest{}
	invalid := &rpcError{rpcInvalid, "Invalid Request"}
	if v[0] != '{' {
		return req, invalid
	}
	m := make(map[string]json.RawMessage)
	dec := json.NewDecoder(bytes.NewReader(v))
	dec.Token()
	for dec.More() { // not at once: a line of members makes a big map
		name, _ := dec.Token()
		var value json.RawMessage
		dec.Decode(&value) // it is valid
		switch name {
		case "jsonrpc", "id", "method", "params":
			m[name.(string)] = value
		}
	}
	id, hasID := m["id"]
	if version, ok := m["jsonrpc"]; ok {
		req.dialect = dialectTwo
		var s string
		if json.Unmarshal(version, &s) != nil || s != dialectTwo {
			return req, invalid
		}
		if hasID && (id[0] == '{' || id[0] == '[' || id[0] == 't' || id[0] == 'f') {
			return req, invalid
		}
		req.notice = !hasID
	} else if hasID {
		req.dialect = dialectOne
		req.notice = string(id) == "null"
	}
	if hasID {
		req.id = id
	}
	var method any
	json.Unmarshal(m["method"], &method)
	name, isString := method.(string)
	params := m["params"]
	structured := len(params) == 0 || params[0] == '{' || params[0] == '[' || string(params) == "null" && req.dialect != dialectTwo
	if !isString || name == "" || !structured {
		req.notice = false // it is no request at all, so no notification either
		return req, invalid
	}
	req.method, req.params = name, params
	return req, nil
}

// answer builds the answer to a request in its dialect. A result that is JSON
// already is taken as it is: a long one is not read again.
func (req *rpcRequest) answer(result any, failed *rpcError) []byte {
	id := req.id
	if id == nil {
		id = json.RawMessage("null")
	}
	switch {
	case req.dialect == dialectTwo && failed != nil:
		return join(`{"jsonrpc":"2.0","error":`, mustJSON(failed), `,"id":`, id, `}`)
	case req.dialect == dialectTwo:
		return join(`{"jsonrpc":"2.0","result":`, rawJSON(result), `,"id":`, id, `}`)
	}
	head, message := `{"result":`, json.RawMessage("null")
	if req.id != nil {
		head = `{"id":` + string(id) + `,"result":`
	}
	if failed != nil { // net/rpc takes an error that is a string, and no other
		message = mustJSON(failed.Message)
	}
	return join(head, rawJSON(result), `,"error":`, message, `}`)
}

// notification builds one of the lines that follow the answer to a subscribe.
func (req *rpcRequest) notification(status any) []byte {
	switch req.dialect {
	case dialectTwo:
		return join(`{"jsonrpc":"2.0","method":"`+noticeOfState+`","params":`, rawJSON(status), `}`)
	case dialectOne:
		return join(`{"id":null,"method":"`+noticeOfState+`","params":[`, rawJSON(status), `]}`)
	}
	return req.answer(status, nil)
}

// join joins texts and JSON into one line.
func join(parts ...any) (line []byte) {
	for _, p := range parts {
		switch p := p.(type) {
		case string:
			line = append(line, p...)
		case json.RawMessage:
			line = append(line, p...)
		case []byte:
			line = append(line, p...)
		}
	}
	return line
}

func rawJSON(v any) json.RawMessage {
	if raw, ok := v.(json.RawMessage); ok {
		return raw
	}
	return mustJSON(v)
}

// mustJSON marshals what was made here, and so can be.
func mustJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

// noParams refuses parameters: no method takes any. net/rpc/jsonrpc always sends
// one, in an array.
func (req *rpcRequest) noParams() *rpcError {
	var compact bytes.Buffer
	json.Compact(&compact, req.params)
	switch compact.String() {
	case "", "null", "{}", "[]", "[{}]", "[null]":
		return nil
	}
	return &rpcError{rpcBadParams, "Invalid params: " + req.method + " takes none"}
}
