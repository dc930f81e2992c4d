package main

// lock.go: the lock that makes an instance the only one for its host, and tells
// whether it lives.

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

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
