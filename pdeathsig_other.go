//go:build !linux

package main

// pdeathsig_other.go: on these systems children survive a SIGKILL of this process;
// the next start ends them.

import (
	"os/exec"
	"syscall"
)

// startChild starts cmd in its own session.
func startChild(cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd.Start()
}
