package main

// termios_linux.go: the requests that read and set a terminal's modes.

import "golang.org/x/sys/unix"

const getModes, setModes = unix.TCGETS, unix.TCSETS
