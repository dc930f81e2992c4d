package main

// peercred_linux.go: whose process is at the other end of a unix socket.

import "golang.org/x/sys/unix"

// peerUID returns the uid of the peer of a connected unix socket.
func peerUID(fd int) (int, error) {
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return -1, err
	}
	return int(cred.Uid), nil
}
