//go:build !linux

package main

// spawn_other.go: children outlive a kill -9 of this process here; the next
// start sweeps them away.

import (
	"os/exec"
	"syscall"
)

// startChild starts cmd in a session of its own.
func startChild(cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd.Start()
}
