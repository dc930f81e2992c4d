//go:build !linux

package main

// termios_other.go: the requests that read and set a terminal's modes.

import "golang.org/x/sys/unix"

const getModes, setModes = unix.TIOCGETA, unix.TIOCSETA
