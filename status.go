package main

// status.go: what is known about the instance for a host, from wherever it can
// be known: its socket, else its state file, else lsof.

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// report is what `rdhpf status -json` prints: a snapshot, and how far to trust it.
type report struct {
	*snapshot
	Source  string `json:"source"`  // socket, file or lsof
	Running bool   `json:"running"` // a live instance has the lock
	Stale   bool   `json:"stale"`   // what is shown may no longer be so

	warnings []string // for a person
}

// errNotRunning says that there is no live instance.
type errNotRunning struct{ text string }

func (e *errNotRunning) Error() string { return e.text }

// errMute says that there is a live instance of which nothing more is known.
type errMute struct{ error }

func notFound(host string) error {
	return &errNotRunning{fmt.Sprintf("No running instance found for %s. Start one with: rdhpf run -host %s", host, host)}
}

// inspect finds out about the instance whose files are at p. Without a host the
// files tell it, and nothing is asked of lsof.
func inspect(ctx context.Context, p paths, h *host) (*report, error) {
	if err := checkDir(p.dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	snap := &snapshot{}
	asked := call(p.socket, "status", snap)
	if asked == nil {
		snap.clean()
		return &report{snapshot: snap, Source: "socket", Running: true}, nil
	}
	pid, held, err := lockedBy(p.lock)
	if err != nil {
		return nil, err
	}
	r := &report{Source: "file", Running: held}
	var unread error
	r.snapshot, unread = r.fromFile(p.state, time.Now())
	if r.snapshot != nil {
		if held && pid > 0 && pid != r.PID {
			r.Stale = true
			r.warnings = append(r.warnings, fmt.Sprintf("State file is of process %d, and process %d runs now.", r.PID, pid))
		}
		return r, nil
	}
	if held && unread != nil {
		return nil, errMute{fmt.Errorf("rdhpf (pid %d) is running and does not answer: %w; %w", pid, asked, unread)}
	} else if held {
		return nil, errMute{fmt.Errorf("rdhpf (pid %d) is running and does not answer: %w", pid, asked)}
	}
	if h != nil {
		if found := seenByLsof(ctx, *h); len(found) > 0 {
			now := utc(time.Now())
			return &report{Source: "lsof", Stale: true, snapshot: &snapshot{Version: stateVersion, Host: h.String(), UpdatedAt: now,
				Connection: connection{State: "unknown"}, Warnings: []string{}, Forwards: found, Skipped: []skippedPort{}},
				warnings: append(warned(unread), "No rdhpf is running; these ports are those on which an ssh to that host listens.")}, nil
		}
		if unread == nil {
			return nil, notFound(h.String())
		}
		return nil, &errNotRunning{fmt.Sprintf("%v. %v", unread, notFound(h.String()))}
	}
	return nil, unread
}

func warned(err error) []string {
	if err == nil {
		return nil
	}
	return []string{err.Error()}
}

// fromFile reads the state file, and says in r how far it can be trusted. It
// returns neither a snapshot nor an error where there is none.
func (r *report) fromFile(path string, now time.Time) (*snapshot, error) {
	snap, warning, err := readState(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	if pathsFor(filepath.Dir(path), snap.Host).state != path {
		return nil, fmt.Errorf("state file %s is of another host, %s", path, snap.Host)
	}
	if warning != "" {
		r.warnings = append(r.warnings, warning)
	}
	old, fresh := age(snap.UpdatedAt, now)
	switch {
	case fresh:
	case old < 0:
		r.warnings = append(r.warnings, "State file is from the future. rdhpf may not be running.")
	default:
		r.warnings = append(r.warnings, fmt.Sprintf("State file is %s old. rdhpf may not be running.", ageText(old)))
	}
	if !r.Running {
		r.warnings = append(r.warnings, fmt.Sprintf("No rdhpf is running for this host: process %d has ended, this is what it wrote last.", snap.PID))
	}
	r.Stale = !fresh || !r.Running
	return snap, nil
}

// seenByLsof lists the loopback ports on which an ssh to the host listens. Of the
// containers behind them nothing is known.
func seenByLsof(ctx context.Context, h host) []forwardInfo {
	ctx, cancel := context.WithTimeout(ctx, lsofTimeout)
	defer cancel()
	all, _ := listeners(ctx)
	args := make(map[int][]string)
	var found []forwardInfo
	for _, l := range all {
		if l.command != "ssh" || !l.addr.Addr().IsLoopback() {
			continue
		}
		if _, ok := args[l.pid]; !ok {
			out, _ := exec.CommandContext(ctx, "ps", "-ww", "-o", "args=", "-p", strconv.Itoa(l.pid)).Output()
			args[l.pid] = strings.Fields(string(out))
		}
		if !slices.ContainsFunc(args[l.pid], h.isNamedBy) {
			continue
		}
		found = append(found, forwardInfo{ContainerID: "unknown", LocalPort: l.addr.Port(), LocalAddress: l.addr.Addr().String(),
			RemoteAddress: loopback4.String(), Status: pending, Reason: reasonProbing})
	}
	var wg sync.WaitGroup
	for i := range found {
		f := &found[i]
		wg.Add(1)
		go func() {
			defer wg.Done()
			if (&master{}).probe(ctx, netip.AddrPortFrom(addrOf(f.LocalAddress), f.LocalPort), 0) == probeAnswered {
				f.Status, f.Reason = active, ""
			} else {
				f.Reason = reasonSilent
			}
		}()
	}
	wg.Wait()
	return found
}

// isNamedBy says whether an argument of ssh is this host.
func (h host) isNamedBy(arg string) bool {
	if h.user != "" && strings.Contains(arg, "@") && !strings.HasPrefix(arg, h.user+"@") {
		return false
	}
	_, name, found := strings.Cut(arg, "@")
	if !found {
		name = arg
	}
	return strings.EqualFold(name, h.name)
}

// instances returns the paths of all instances that left files in the folder.
func instances(dir string) ([]paths, error) {
	if err := checkDir(dir); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("looking for instances: %w", err)
	}
	var all []paths
	for _, e := range entries {
		if base, ok := strings.CutSuffix(e.Name(), ".lock"); ok {
			all = append(all, pathsAt(dir, filepath.Join(dir, base)))
		}
	}
	return all, nil
}

// inspectAll reports on every instance in the folder. broken is what there is to
// say of those that could not be inspected.
func inspectAll(ctx context.Context, dir string) (found []*report, broken []error, err error) {
	all, err := instances(dir)
	if err != nil {
		return nil, nil, err
	}
	for _, p := range all {
		switch r, err := inspect(ctx, p, nil); {
		case err != nil:
			broken = append(broken, err)
		case r != nil:
			found = append(found, r)
		}
	}
	return found, broken, nil
}
