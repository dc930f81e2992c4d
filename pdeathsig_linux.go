package main

// spawn_linux.go: children that do not outlive this process, not even when it
// is killed with -9.

import (
	"os/exec"
	"runtime"
	"sync"
	"syscall"
)

var (
	spawner     = make(chan func())
	spawnerOnce sync.Once
)

// startChild starts cmd in a session of its own and has the kernel kill it when
// this process ends. Pdeathsig fires when the thread that forked ends, so one
// thread does it and stays for life.
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
