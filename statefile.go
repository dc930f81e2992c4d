package main

// statefile.go: the files of an instance: the state file, which tells what it last knew, and which survives it if it
// crashes; their paths, the private directory that holds them, and the lock that makes an instance the only one for its
// host and shows that it is alive.

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
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

// paths are the files of the instance for one host.
type paths struct {
	dir, lock, state, socket, control string
	docker, engine                    string // the engine's socket for tools; ssh's forward of it
	log                               string // of an instance in the background
}

// stateDir returns $RDHPF_DIR, or ~/.rdhpf if that is not set.
func stateDir(getenv func(string) string, home string) (string, error) {
	if dir := getenv("RDHPF_DIR"); dir != "" {
		return filepath.Abs(dir)
	}
	if home == "" {
		return "", errors.New("no home directory: set RDHPF_DIR")
	}
	return filepath.Join(home, ".rdhpf"), nil
}

// hostHash returns the base name of the files of a host, given in canonical form.
func hostHash(host string) string {
	sum := sha256.Sum256([]byte(host))
	return base64.URLEncoding.EncodeToString(sum[:])[:12]
}

func pathsFor(dir, host string) paths { return pathsAt(dir, filepath.Join(dir, hostHash(host))) }

// pathsAt returns the paths that share the prefix base.
func pathsAt(dir, base string) paths {
	return paths{dir, base + ".lock", base + ".state.json", base + ".sock", base + ".ctl", base + ".docker.sock", base + ".engine",
		base + ".log"}
}

// check returns an error if the path of a socket is too long. The limit is 107 bytes on Linux and 103 elsewhere, and ssh
// first binds to a name 17 bytes longer.
func (p paths) check() error {
	limit := 107
	if runtime.GOOS != "linux" {
		limit = 103
	}
	for _, c := range []struct {
		path  string
		limit int
	}{{p.control, limit - 17}, {p.docker, limit}} {
		if strings.Contains(c.path, "${") {
			return fmt.Errorf("the path %s has ${, which ssh would expand: set RDHPF_DIR to another", c.path)
		}
		if len(c.path) > c.limit {
			return fmt.Errorf("the socket path %s is %d bytes long, but at most %d are allowed: set RDHPF_DIR to a shorter path", c.path, len(c.path), c.limit)
		}
	}
	return nil
}

// makeDir creates the directory if it is missing, and rejects one that others could tamper with.
func makeDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("creating the state directory: %w (set RDHPF_DIR to use another)", err)
	}
	return checkDir(dir)
}

// checkDir rejects a directory that is a symbolic link, belongs to another user or is accessible to others.
func checkDir(dir string) error {
	info, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("checking the state directory: %w", err)
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case info.Mode().Type() == fs.ModeSymlink:
		return fmt.Errorf("%s is a symbolic link: rdhpf needs a real directory; set RDHPF_DIR to use another", dir)
	case !info.IsDir():
		return fmt.Errorf("%s is not a directory: rdhpf keeps its state there; set RDHPF_DIR to use another", dir)
	case ok && int(st.Uid) != os.Geteuid():
		return fmt.Errorf("%s belongs to uid %d, not to you: set RDHPF_DIR to use another", dir, st.Uid)
	case info.Mode().Perm()&0o077 != 0:
		return fmt.Errorf("%s is open to other users (mode %04o): run chmod 700 %s", dir, info.Mode().Perm(), dir)
	}
	return nil
}

// heldError means that another process holds the lock. pid is 0 if unknown.
type heldError struct{ pid int }

func (held *heldError) Error() string {
	s := "another rdhpf is running for this host"
	if held.pid > 0 {
		s += fmt.Sprintf(": pid %d", held.pid)
	}
	return s + " (rdhpf status shows what it is doing, rdhpf stop stops it)"
}

// ownLock is the lock that this process took last. It belongs to the process, which must not open the file a second time:
// closing that descriptor would release the lock.
var ownLock atomic.Pointer[os.File]

// lockInstance takes the lock for the life of the process. The file is never renamed or removed.
func lockInstance(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the instance lock: %w", err)
	}
	for {
		err := unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
		if err == nil {
			ownLock.Store(f)
			return f, nil
		}
		held := false
		var pid int
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			if pid, held, err = lockHolder(f); err == nil && !held {
				continue // the holder has just exited
			}
		}
		f.Close()
		if held {
			return nil, &heldError{pid}
		}
		return nil, fmt.Errorf("locking %s: %w", path, err)
	}
}

// goneAfter is how long the files of a host that rdhpf no longer runs for are kept.
const goneAfter = 90 * 24 * time.Hour

// sweepDir removes the files of instances that ended long ago.
func sweepDir(dir string, now time.Time) {
	all, _ := instances(dir)
	for _, p := range all {
		newest := time.Time{}
		for _, path := range []string{p.lock, p.state} {
			if info, err := os.Lstat(path); err == nil && info.ModTime().After(newest) {
				newest = info.ModTime()
			}
		}
		if own := ownLock.Load(); now.Sub(newest) < goneAfter || own != nil && own.Name() == p.lock {
			continue
		}
		f, err := os.OpenFile(p.lock, os.O_RDWR|syscall.O_NOFOLLOW, 0)
		if err != nil {
			continue
		}
		if unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}) == nil {
			for _, path := range []string{p.state, p.log, p.log + ".1", p.lock} {
				os.Remove(path)
			}
			for _, path := range []string{p.socket, p.control, p.docker, p.engine} {
				removeSocket(path)
			}
		}
		f.Close()
	}
}

// lockHolder returns the holder of the lock, without taking it.
func lockHolder(f *os.File) (pid int, held bool, err error) {
	lock := unix.Flock_t{Type: unix.F_RDLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_GETLK, &lock); err != nil {
		return 0, false, fmt.Errorf("asking who holds %s: %w", f.Name(), err)
	}
	return int(lock.Pid), lock.Type != unix.F_UNLCK, nil
}

// lockedBy reports whether a live instance holds the lock, and its pid (0 if unknown). It never takes the lock.
func lockedBy(path string) (pid int, held bool, err error) {
	if own := ownLock.Load(); own != nil && own.Name() == path {
		if _, err := own.Stat(); err == nil { // it is open
			return os.Getpid(), true, nil
		}
	}
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, false, nil
	} else if err != nil {
		return 0, false, fmt.Errorf("checking the instance lock: %w", err)
	}
	defer f.Close()
	return lockHolder(f)
}
