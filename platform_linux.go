package main

// platform_linux.go: children that do not outlive this process, even if it is killed by SIGKILL; the requests that read and
// set a terminal's modes.

import (
	"os/exec"
	"runtime"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

var (
	spawner     = make(chan func())
	spawnerOnce sync.Once
)

// startChild starts cmd in its own session and has the kernel kill it when this
// process ends. Pdeathsig fires when the forking thread exits, so all forks happen
// on one thread that never exits.
func startChild(cmd *exec.Cmd) error {
	spawnerOnce.Do(func() {
		go func() {
			runtime.LockOSThread()
			for f := range spawner {
				f()
			}
		}()
	})
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	err := make(chan error)
	spawner <- func() { err <- cmd.Start() }
	return <-err
}

const getModes, setModes = unix.TCGETS, unix.TCSETS
