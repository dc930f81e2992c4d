package main

// peer.go: who is at the other end of a unix socket, and whether anybody still is.

import (
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// allowed says whether the peer is us or root.
func allowed(conn *net.UnixConn) bool {
	raw, err := conn.SyscallConn()
	if err != nil {
		return false
	}
	uid := -1
	raw.Control(func(fd uintptr) { uid, err = peerUID(int(fd)) })
	return err == nil && (uid == 0 || uid == os.Geteuid())
}

// left says whether the peer has closed its end, and not only stopped sending.
func (c *client) left() bool {
	raw, err := c.conn.SyscallConn()
	if err != nil {
		return true
	}
	poll := []unix.PollFd{{Events: unix.POLLOUT}}
	raw.Control(func(fd uintptr) {
		poll[0].Fd = int32(fd)
		unix.Poll(poll, 0)
	})
	return poll[0].Revents&unix.POLLHUP != 0
}
