package main

// call.go: the client's end of the socket of a running instance.

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// dialInstance connects to a running instance, which must be ours or root's.
func dialInstance(path string) (*net.UnixConn, error) {
	conn, err := (&net.Dialer{Timeout: dialTimeout}).Dial("unix", path)
	if err != nil {
		return nil, err
	}
	uc := conn.(*net.UnixConn)
	if !allowed(uc) {
		uc.Close()
		return nil, fmt.Errorf("%s belongs to another user's process", path)
	}
	return uc, nil
}

// call asks a running instance and decodes its answer into result.
func call(path, method string, result any) error {
	conn, err := dialInstance(path)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(dialTimeout + callTimeout))
	if method == "status" || method == "health" {
		conn.SetDeadline(time.Now().Add(dialTimeout))
	}
	if _, err := fmt.Fprintf(conn, `{"method":%q,"params":{}}`+"\n", method); err != nil {
		return err
	}
	return readReply(bufio.NewReaderSize(io.LimitReader(conn, maxStateFile), 1<<20), result)
}

// readReply reads one answer in the plain dialect into result, a pointer.
func readReply(r *bufio.Reader, result any) error {
	reply := struct {
		Result any     `json:"result"`
		Error  *string `json:"error"`
	}{Result: result}
	line, err := r.ReadString('\n')
	if err == nil {
		if snap, ok := result.(*snapshot); ok {
			err = unmarshalSnapshot(line, &reply, snap)
		} else {
			err = json.Unmarshal([]byte(line), &reply)
		}
	}
	if err != nil {
		return fmt.Errorf("reading the answer: %w", err)
	}
	if reply.Error != nil {
		return errors.New(printable(*reply.Error, 1000))
	}
	return nil
}
