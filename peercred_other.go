//go:build darwin || freebsd

package main

// peercred_other.go: whose process is at the other end of a unix socket.

import "golang.org/x/sys/unix"

// peerUID returns the uid of the peer of a connected unix socket.
func peerUID(fd int) (int, error) {
	const solLocal = 0 // SOL_LOCAL
	cred, err := unix.GetsockoptXucred(fd, solLocal, unix.LOCAL_PEERCRED)
	if err != nil {
		return -1, err
	}
	return int(cred.Uid), nil
}
