package main

// files.go: the lock and the socket of a running instance, which it makes again
// where somebody removes or replaces them.

import (
	"context"
	"errors"
	"fmt"
	"os"
)

// listen makes the socket and serves on it until ctx ends, or until it listens
// anew.
func (r *runner) listen(ctx context.Context) error {
	l, err := listenSocket(r.paths.socket)
	if err == nil {
		r.socket, err = os.Lstat(r.paths.socket)
	}
	if err != nil {
		return fmt.Errorf("making the socket for rdhpf status: %w", err)
	}
	if r.listener != nil {
		r.listener.Close()
	}
	r.listener = l
	r.start(func() { (&server{board: r.board, ask: r.ask, stop: r.quit}).serve(ctx, l) })
	return nil
}

// unlisten removes the socket, where it is still ours.
func (r *runner) unlisten() {
	if !replaced(r.paths.socket, r.socket) {
		removeSocket(r.paths.socket)
	}
}

// keepFiles sees that the lock and the socket are where others look for them. An
// error says that another instance has the lock by now.
func (r *runner) keepFiles(ctx context.Context) error {
	info, err := r.lock.Stat()
	if err != nil || replaced(r.paths.lock, info) {
		if makeDir(r.paths.dir) != nil {
			return nil // who writes the state file tells of that
		}
		lock, err := lockInstance(r.paths.lock)
		if errors.As(err, new(*heldError)) {
			return fmt.Errorf("somebody removed %s meanwhile: %w", r.paths.lock, err)
		} else if err != nil {
			return nil
		}
		r.lock.Close()
		r.lock = lock
		r.log.Warn(fmt.Sprintf("somebody removed or replaced %s: made again", r.paths.lock))
	}
	if !replaced(r.paths.socket, r.socket) {
		return nil
	}
	said := r.socketErr
	if r.socketErr = r.listen(ctx); r.socketErr == nil {
		r.log.Warn(fmt.Sprintf("somebody removed or replaced %s: made again", r.paths.socket))
	} else if said == nil {
		r.log.Warn(r.socketErr.Error())
	}
	return nil
}
