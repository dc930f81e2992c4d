package main

// The state file, which tells what a running instance last knew, and which survives it if it crashes.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
	"time"
)

const (
	writeTogether = 20 * time.Millisecond // changes this close together are written at once
	maxStateAge   = 10 * time.Second
	maxStateFile  = 64 << 20
)

// keepState writes the state file at each change and every 2 s until ctx ends, then removes it. It calls troubled with
// the error when writing begins to fail, and with nil when it works again.
func keepState(ctx context.Context, path string, b *board, troubled func(error)) {
	failing := false
	beat := time.NewTimer(0)
	defer beat.Stop()
	for ctx.Err() == nil {
		snap, next := b.look()
		err := writeState(path, snap.at(time.Now()))
		if (err != nil) != failing {
			failing = err != nil
			troubled(err)
		}
		beat.Reset(untilBeat())
		select {
		case <-ctx.Done():
		case <-beat.C:
		case <-next:
			select {
			case <-ctx.Done():
			case <-time.After(writeTogether):
			}
		}
	}
	os.Remove(path)
}

// writeState replaces the file as a whole, or leaves it as it was. Only the holder of the lock calls it, so nobody else
// uses the temporary name.
func writeState(path string, snap *snapshot) (err error) {
	body, err := json.MarshalIndent(snap, "", "  ")
	if err != nil {
		return err
	}
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
	_, err = f.Write(append(body, '\n'))
	if closed := f.Close(); err == nil {
		err = closed
	}
	if err != nil {
		return err
	}
	return os.Rename(temp, path)
}

// readState reads a state file. warning says what may be wrong with one that could be read.
func readState(path string) (snap *snapshot, warning string, err error) {
	defer func() {
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("state file %s: %w; a running rdhpf replaces it", path, err)
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
		return nil, "", errors.New("it is not a regular file that belongs to you")
	}
	body, err := io.ReadAll(io.LimitReader(f, maxStateFile+1))
	switch {
	case err != nil:
		return nil, "", err
	case len(body) == 0:
		return nil, "", errors.New("it is empty")
	case len(body) > maxStateFile:
		return nil, "", fmt.Errorf("it is longer than %d bytes", maxStateFile)
	}
	return decodeState(body)
}

// decodeState decodes and checks a state file; unknown fields are fine.
func decodeState(body []byte) (snap *snapshot, warning string, err error) {
	snap = &snapshot{}
	if err := json.Unmarshal(body, snap); err != nil {
		return nil, "", fmt.Errorf("it is incomplete or not a state file: %s", printable(err.Error(), maxText))
	}
	snap.clean()
	if snap.Host == "" || snap.UpdatedAt.IsZero() {
		return nil, "", errors.New("it is not a state file: host or updated_at is missing")
	}
	switch snap.Version {
	case stateVersion:
	case "":
		warning = "State file has no version; it may be misread."
	default:
		warning = fmt.Sprintf("State file has version %q, but this rdhpf knows only %q; it may be misread.", printable(snap.Version, 20), stateVersion)
	}
	return snap, warning, nil
}

// age returns how old something written at t is. ok is false if that is stale: too old, or from the future.
func age(t, now time.Time) (d time.Duration, ok bool) {
	d = now.Round(0).Sub(t)
	return d, d >= -time.Second && d <= maxStateAge
}
