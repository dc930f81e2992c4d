package main

// statefile.go: the files of an instance: their paths, the folder they live in
// and the state file.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"syscall"
	"time"
)

const (
	writeTogether = 20 * time.Millisecond // what changes within it after a change is in the same write
	maxStateAge   = 10 * time.Second
	maxStateFile  = 64 << 20
)

// keepState writes the state file at each change and every 2 s until ctx ends,
// then removes it. troubled is called when writing begins to fail, with why, and
// when it works again, with nil.
func keepState(ctx context.Context, path string, b *board, troubled func(error)) {
	failing := false
	last := time.NewTimer(0)
	var shown *snapshot
	var body []byte
	for {
		snap, next := b.look()
		if now := time.Now(); snap == shown {
			body = redate(body, now)
		} else {
			shown, body = snap, encodeState(snap.at(now))
		}
		err := writeState(path, body)
		if (err != nil) != failing {
			failing = err != nil
			troubled(err)
		}
		last.Reset(untilBeat())
		select {
		case <-ctx.Done():
		case <-last.C:
		case <-next:
			select {
			case <-ctx.Done():
			case <-time.After(writeTogether):
			}
		}
		if ctx.Err() != nil {
			os.Remove(path)
			return
		}
	}
}

func encodeState(snap *snapshot) []byte {
	body, err := json.MarshalIndent(snap, "", "  ")
	if err != nil {
		panic(err) // it was made here
	}
	return append(body, '\n')
}

// redate returns body with another updated_at, whose first occurrence is the
// snapshot's own. It saves encoding all that is the same.
func redate(body []byte, now time.Time) []byte {
	field := []byte(`"updated_at":`)
	head, rest, _ := bytes.Cut(body, field)
	space, _, _ := bytes.Cut(rest, []byte(`"`))
	_, tail, _ := bytes.Cut(rest, []byte(","))
	return slices.Concat(head, field, space, mustJSON(utc(now)), []byte(","), tail)
}

// writeState replaces the file as a whole, or leaves it as it was. Only the
// holder of the lock calls it, so the temporary name is nobody else's.
func writeState(path string, body []byte) (err error) {
	temp := path + ".tmp"
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(temp)
		}
	}()
	_, err = f.Write(body)
	if closed := f.Close(); err == nil {
		err = closed
	}
	if err != nil {
		return err
	}
	return os.Rename(temp, path)
}

// readState reads a state file. warning says what may be wrong with it, though
// it could be read.
func readState(path string) (snap *snapshot, warning string, err error) {
	defer func() {
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("state file %s: %w; a running rdhpf writes a new one", path, err)
		}
	}()
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, "", err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, "", err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !info.Mode().IsRegular() || ok && int(st.Uid) != os.Geteuid() {
		return nil, "", errors.New("it is no regular file of yours")
	}
	body, err := io.ReadAll(io.LimitReader(f, maxStateFile+1))
	switch {
	case err != nil:
		return nil, "", err
	case len(body) == 0:
		return nil, "", errors.New("it is empty")
	case len(body) > maxStateFile:
		return nil, "", fmt.Errorf("it is over %d bytes long", maxStateFile)
	}
	return decodeState(body)
}

// decodeState decodes and checks a state file; fields it does not know are fine.
func decodeState(body []byte) (snap *snapshot, warning string, err error) {
	snap = &snapshot{}
	if err := unmarshalSnapshot(string(body), snap, snap); err != nil {
		return nil, "", fmt.Errorf("it is torn or no state file: %s", printable(err.Error(), maxText))
	}
	snap.clean()
	if snap.Host == "" || snap.UpdatedAt.IsZero() {
		return nil, "", errors.New("it is no state file: host or updated_at is missing")
	}
	switch snap.Version {
	case stateVersion:
	case "":
		warning = "State file has no version; what it says may be misread."
	default:
		warning = fmt.Sprintf("State file has version %q and this rdhpf knows %q; what it says may be misread.", printable(snap.Version, 20), stateVersion)
	}
	return snap, warning, nil
}

// age returns how old what was written at t is. ok is false where it is stale:
// too old, or from the future, which is no age at all.
func age(t, now time.Time) (d time.Duration, ok bool) {
	d = now.Round(0).Sub(t)
	return d, d >= -time.Second && d <= maxStateAge
}
