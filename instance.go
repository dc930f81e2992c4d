package main

import (
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// lock.go: the lock that makes an instance the only one for its host, and tells
// whether it lives.

// paths are the files of the instance for one host.
type paths struct {
	dir, lock, state, socket, control string
}

// stateDir is $RDHPF_DIR, else ~/.rdhpf.
func stateDir(getenv func(string) string, home string) (string, error) {
	if dir := getenv("RDHPF_DIR"); dir != "" {
		return filepath.Abs(dir)
	}
	if home == "" {
		return "", errors.New("there is no home directory: set RDHPF_DIR")
	}
	return filepath.Join(home, ".rdhpf"), nil
}

// hostHash names the files of a host, given in canonical form.
func hostHash(host string) string {
	sum := sha256.Sum256([]byte(host))
	return base64.URLEncoding.EncodeToString(sum[:])[:12]
}

func pathsFor(dir, host string) paths { return pathsAt(dir, filepath.Join(dir, hostHash(host))) }

// pathsAt returns the files that share the name base.
func pathsAt(dir, base string) paths {
	return paths{dir, base + ".lock", base + ".state.json", base + ".sock", base + ".ctl"}
}

// check refuses a folder in which a socket's path would be too long: ssh binds
// under a name 17 bytes longer, and the kernel takes 107 on Linux, 103 elsewhere.
func (p paths) check() error {
	limit := 107
	if runtime.GOOS != "linux" {
		limit = 103
	}
	for _, c := range []struct {
		path  string
		limit int
	}{{p.control, limit - 17}, {p.socket, limit}} {
		if len(c.path) > c.limit {
			return fmt.Errorf("%s is %d bytes long, and a socket's path can have %d here: set RDHPF_DIR to a shorter directory", c.path, len(c.path), c.limit)
		}
	}
	return nil
}

// makeDir creates the folder if it is missing, and refuses one that others could
// have a hand in.
func makeDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("making the state directory: %w (RDHPF_DIR sets another)", err)
	}
	return checkDir(dir)
}

// checkDir refuses a folder that is a symlink, somebody else's or open to others.
func checkDir(dir string) error {
	info, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("looking at the state directory: %w", err)
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case info.Mode().Type() == fs.ModeSymlink:
		return fmt.Errorf("%s is a symbolic link: rdhpf wants a directory of its own; RDHPF_DIR sets another", dir)
	case !info.IsDir():
		return fmt.Errorf("%s is no directory: rdhpf keeps its state there; RDHPF_DIR sets another", dir)
	case ok && int(st.Uid) != os.Geteuid():
		return fmt.Errorf("%s belongs to uid %d and not to you: RDHPF_DIR sets another", dir, st.Uid)
	case info.Mode().Perm()&0o077 != 0:
		return fmt.Errorf("%s is open to other users (mode %04o): run chmod 700 %s", dir, info.Mode().Perm(), dir)
	}
	return nil
}

// heldError says that another live process has the lock. pid is 0 where the
// system does not tell.
type heldError struct{ pid int }

func (e *heldError) Error() string {
	s := "another rdhpf is running for this host"
	if e.pid > 0 {
		s += fmt.Sprintf(": pid %d", e.pid)
	}
	return s + " (rdhpf status shows what it does, rdhpf stop ends it)"
}

// lockInstance takes the lock for the life of the process. The file is never
// renamed nor removed. It is a lock of the process, so nothing in this process
// may open the file a second time: closing that would release it.
func lockInstance(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the instance lock: %w", err)
	}
	for {
		err := unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
		if err == nil {
			return f, nil
		}
		held := false
		var pid int
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			if pid, held, err = lockHolder(f); err == nil && !held {
				continue // it ended just now
			}
		}
		f.Close()
		if held {
			return nil, &heldError{pid}
		}
		return nil, fmt.Errorf("locking %s: %w", path, err)
	}
}

// lockHolder asks the kernel who holds the lock, without ever taking it.
func lockHolder(f *os.File) (pid int, held bool, err error) {
	lock := unix.Flock_t{Type: unix.F_RDLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_GETLK, &lock); err != nil {
		return 0, false, fmt.Errorf("asking who holds %s: %w", f.Name(), err)
	}
	return int(lock.Pid), lock.Type != unix.F_UNLCK, nil
}

// lockedBy tells whether a live instance holds the lock, and its pid (0 where
// the system does not tell). It never takes the lock.
func lockedBy(path string) (pid int, held bool, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, false, nil
	} else if err != nil {
		return 0, false, fmt.Errorf("looking at the instance lock: %w", err)
	}
	defer f.Close()
	return lockHolder(f)
}
