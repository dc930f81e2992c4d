//go:build !linux

package main

// platform_other.go: on these systems children survive a SIGKILL of this process; the next start ends them. The requests
// that read and set a terminal's modes.

import (
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

// startChild starts cmd in its own session.
func startChild(cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd.Start()
}

const getModes, setModes = unix.TIOCGETA, unix.TIOCSETA
