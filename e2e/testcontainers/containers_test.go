// Package testcontainers is a module of its own, so that rdhpf does not depend on what
// it requires. TestE2ETestcontainers in the folder above runs it on a rig.
package testcontainers

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/testcontainers/testcontainers-go"
)

const (
	containers = 50
	// patience bounds what has to come. It is long, for a machine can be busy.
	patience = 30 * time.Second
)

// TestFirstConnect connects to the random port of each container as soon as it has
// started, once and without waiting for anything.
func TestFirstConnect(t *testing.T) {
	image := os.Getenv("RIG_IMAGE")
	if image == "" {
		t.Skip("needs a rig: TestE2ETestcontainers runs this test")
	}
	var answered, conflicts atomic.Int32
	t.Run("containers", func(t *testing.T) { // ends when all have been looked at
		for i := range containers {
			t.Run(fmt.Sprint(i), func(one *testing.T) {
				one.Parallel()
				name := fmt.Sprintf("tc%d", i)
				c, err := testcontainers.Run(t.Context(), image, testcontainers.WithExposedPorts("80/tcp"),
					testcontainers.WithCmd("-name", name))
				testcontainers.CleanupContainer(t, c, testcontainers.StopTimeout(0))
				if err != nil {
					one.Fatal(err)
				}
				addr, err := c.PortEndpoint(one.Context(), "80/tcp", "")
				if err != nil {
					one.Fatal(err)
				}
				got, err := get(addr)
				if err == nil && got == fmt.Sprintf("hello from %s\n", name) {
					answered.Add(1)
				} else if reason := conflictOf(one, addr); reason != "" {
					one.Logf("%s: %s is in conflict: %s", name, addr, reason)
					conflicts.Add(1)
				} else {
					one.Errorf("%s: %s answered %q, %v", name, addr, got, err)
				}
			})
		}
	})
	t.Logf("%d of %d answered at the first connect, %d in conflict", answered.Load(), containers-conflicts.Load(), conflicts.Load())
	if answered.Load() == 0 {
		t.Error("none answered")
	}
}

// get asks once, on a connection of its own.
func get(addr string) (string, error) {
	client := http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + addr + "/")
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

// conflictOf returns why a local port is in conflict, "" if it is not: what the engine picks
// at random, this machine may use for something else. It waits until rdhpf status names that.
func conflictOf(t *testing.T, addr string) (reason string) {
	t.Helper()
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		out, _ := exec.Command(os.Getenv("TEST_RDHPF"), "status", "-host", os.Getenv("TEST_HOST"), "-json").Output()
		var status struct {
			Forwards []forward `json:"forwards"`
		}
		if err := json.Unmarshal(out, &status); err != nil {
			t.Fatalf("status -json: %v: %q", err, out)
		}
		i := slices.IndexFunc(status.Forwards, func(f forward) bool { return f.Port.String() == port })
		switch {
		case i < 0:
			t.Logf("status has no %s", addr)
			return reason
		case status.Forwards[i].Status != "conflict":
			t.Logf("status has %+v", status.Forwards[i])
			return reason
		}
		if reason = status.Forwards[i].Reason; strings.Contains(reason, "(") {
			return reason
		}
		if time.Now().After(deadline) {
			t.Fatalf("status names nobody who holds %s: %s", addr, reason)
		}
	}
}

type forward struct {
	Port   json.Number `json:"local_port"`
	Status string      `json:"status"`
	Reason string      `json:"reason"`
}
