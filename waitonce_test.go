package main

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestWaitOnce makes requests on one connection while there is no link: those of one command wait for it only once.
func TestWaitOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &proxy{board: newBoard(&snapshot{Connection: connection{State: reconnecting, LastError: "no route"}})}
		var waits time.Duration
		h := p.waitOnce(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			time.Sleep(waits)
			p.fail(w, req, errors.New("none"))
		}))
		ask := func(c *toolConn) time.Duration {
			t.Helper()
			began := time.Now()
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequestWithContext(context.WithValue(t.Context(), toolKey{}, c), "GET", "/_ping", nil))
			if w.Code != http.StatusServiceUnavailable || !strings.Contains(w.Body.String(), "no route") {
				t.Errorf("answered %d, %s", w.Code, w.Body)
			}
			return time.Since(began)
		}
		c, other := new(toolConn), new(toolConn)
		for i, step := range []struct {
			conn         *toolConn
			after, waits time.Duration
			want         time.Duration
		}{
			{c, 0, holdFor, holdFor},
			{c, 0, holdFor, 0},
			{other, 0, holdFor, holdFor},
			{c, 0, holdFor, holdFor}, // much later
			{c, sameCommand - time.Millisecond, holdFor, 0},
			{c, time.Millisecond, holdFor, holdFor}, // what failed at once is not what counts
			{new(toolConn), 0, time.Second, time.Second},
			{other, 0, time.Second, time.Second}, // this one has not waited to the end
			{other, 0, holdFor, holdFor},
		} {
			time.Sleep(step.after)
			waits = step.waits
			if got := ask(step.conn); got != step.want {
				t.Errorf("request %d took %v, want %v", i, got, step.want)
			}
		}
	})
}
