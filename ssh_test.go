package main

import (
	"errors"
	"os"
	"strings"
	"sync/atomic"
	"testing"
)

// The lines are ssh's own, of OpenSSH 9.2.
func TestExplain(t *testing.T) {
	const proxied = "Connection closed by UNKNOWN port 65535"
	for _, tt := range []struct {
		name, lines, want string
		stubborn          bool
	}{
		{"nothing said", "", "", false},
		{"refused", "ssh: connect to host 192.0.2.1 port 22: Connection refused",
			"ssh: connect to host 192.0.2.1 port 22: Connection refused", false},
		{"no such name", "ssh: Could not resolve hostname box.invalid: Name or service not known",
			"ssh: Could not resolve hostname box.invalid: Name or service not known", false},
		{"the connection is lost", "Connection to 192.0.2.1 closed by remote host.", "ssh: Connection to 192.0.2.1 closed by remote host.", false},
		{"it times out", "Connection timed out during banner exchange\nConnection to 192.0.2.1 port 22 timed out",
			"ssh: Connection to 192.0.2.1 port 22 timed out", false},
		{"a banner, then lost", "This is a private system.\nAll is logged.\nConnection closed by 192.0.2.1 port 22",
			`ssh: Connection closed by 192.0.2.1 port 22; before that it printed "All is logged."`, false},
		{"too many keys", "A banner.\nReceived disconnect from 192.0.2.1 port 22:2: Too many authentication failures\nDisconnected from 192.0.2.1 port 22",
			"ssh: Received disconnect from 192.0.2.1 port 22:2: Too many authentication failures; the agent offers too many keys: " +
				"set IdentitiesOnly and IdentityFile for that host in ssh_config", true},
		{"no key fits", "A banner.\nme@192.0.2.1: Permission denied (publickey).",
			"ssh: me@192.0.2.1: Permission denied (publickey); rdhpf never asks for a password or passphrase: add the key to an agent (ssh-add), " +
				"and see whether this works: ssh -o BatchMode=yes -p 2222 me@box", true},
		{"the key is open to others", "@@@@@@@@\n@         WARNING: UNPROTECTED PRIVATE KEY FILE!          @\n@@@@@@@@\n" +
			"Permissions 0644 for '/home/me/k' are too open.\nIt is required that your private key files are NOT accessible by others.\n" +
			"This private key will be ignored.\nLoad key \"/home/me/k\": bad permissions\nme@192.0.2.1: Permission denied (publickey).",
			"ssh: Permissions 0644 for '/home/me/k' are too open; run chmod 600 on that file", true},
		{"the key is missing", "no such identity: /home/me/k: No such file or directory\nme@192.0.2.1: Permission denied (publickey).",
			"ssh: no such identity: /home/me/k: No such file or directory: me@192.0.2.1: Permission denied (publickey); rdhpf never asks for a " +
				"password or passphrase: add the key to an agent (ssh-add), and see whether this works: ssh -o BatchMode=yes -p 2222 me@box", true},
		{"another host key", "@@@@@\n@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @\n@@@@@\nOffending ED25519 key in /home/me/.ssh/known_hosts:3\n" +
			"Host key for [box]:2222 has changed and you have requested strict checking.\nHost key verification failed.",
			"ssh: Host key for [box]:2222 has changed and you have requested strict checking; if that is expected, remove the old key: ssh-keygen -R '[box]:2222'", true},
		{"an unknown host", "No ED25519 host key is known for box and you have requested strict checking.\nHost key verification failed.",
			"ssh: No ED25519 host key is known for box and you have requested strict checking; connect once and check its key: ssh -p 2222 me@box", true},
		{"an unknown option", "/home/me/.ssh/config: line 2: Bad configuration option: foobar\n/home/me/.ssh/config: terminating, 1 bad configuration options",
			"ssh: /home/me/.ssh/config: line 2: Bad configuration option: foobar; fix that line, or list the option after IgnoreUnknown above it", true},
		{"a configuration open to others", "Bad owner or permissions on /home/me/.ssh/config",
			"ssh: Bad owner or permissions on /home/me/.ssh/config; run chmod 600 on that file", true},
		{"nothing in common", "Unable to negotiate with 192.0.2.1 port 22: no matching host key type found. Their offer: ssh-rsa",
			"ssh: Unable to negotiate with 192.0.2.1 port 22: no matching host key type found. Their offer: ssh-rsa; see whether this works: ssh -p 2222 me@box", true},
		{"a ProxyCommand says why", "tunnel: no ticket, run: tsh login\n" + proxied, "ssh: tunnel: no ticket, run: tsh login", false},
		{"one says it in more lines", "tunnel: no ticket\nkex_exchange_identification: Connection closed by remote host\n" + proxied, "ssh: tunnel: no ticket", false},
		{"one says nothing", "kex_exchange_identification: Connection closed by remote host\n" + proxied,
			"ssh: " + proxied + "; the ProxyCommand or jump host ended; see what this prints: ssh -p 2222 me@box", false},
		{"the jump host refuses", "me@jump: Permission denied (publickey).\n" + proxied,
			"ssh: me@jump: Permission denied (publickey); rdhpf never asks for a password or passphrase: add the key to an agent (ssh-add), " +
				"and see whether this works: ssh -o BatchMode=yes -p 2222 me@box", true},
		{"the jump host is down", "ssh: connect to host jump port 22: No route to host\n" + proxied, "ssh: connect to host jump port 22: No route to host", false},
		{"nothing beyond the jump host", "channel 0: open failed: connect failed: No route to host\nstdio forwarding failed\n" + proxied,
			"ssh: channel 0: open failed: connect failed: No route to host; the jump host cannot reach the host", false},
		{"new warnings of ssh explain nothing", "** WARNING: connection is not using a post-quantum key exchange algorithm.\nConnection closed by 192.0.2.1 port 22",
			"ssh: Connection closed by 192.0.2.1 port 22", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var lines []string
			if tt.lines != "" {
				lines = strings.Split(tt.lines, "\n")
			}
			got := explain(lines, host{user: "me", name: "box", port: 2222})
			if got == nil {
				got = &connectError{}
			}
			if got.said != tt.want || got.stubborn != tt.stubborn {
				t.Errorf("got  %q, %v\nwant %q, %v", got.said, got.stubborn, tt.want, tt.stubborn)
			}
		})
	}
}

func TestOwnJump(t *testing.T) {
	for _, c := range []struct{ jump, want string }{
		{"", ""},
		{"none", "ProxyCommand=/usr/bin/ssh -o ControlPath=none -o BatchMode=yes -W '[%h]:%p' ssh://none"},
		{"me@hop:2222", "ProxyCommand=/usr/bin/ssh -o ControlPath=none -o BatchMode=yes -W '[%h]:%p' ssh://me@hop:2222"},
		{"a,ssh://b,ssh://[fe80::1]:22", "ProxyCommand=/usr/bin/ssh -o ControlPath=none -o BatchMode=yes -J a,ssh://b -W '[%h]:%p' ssh://[fe80::1]:22"},
		{"$(reboot)", ""},
		{"$(reboot),b", ""},
	} {
		prog := sshProgram{path: "/usr/bin/ssh"}
		prog.jumpBy(c.jump)
		if got := strings.Join(prog.ownJump(), " "); got != strings.TrimSpace("-o "+c.want) && (got != "" || c.want != "") {
			t.Errorf("%q: %q, want %q", c.jump, got, c.want)
		}
	}
}

// One question may go unanswered because the machine was suspended; two are proof.
func TestAskedTwice(t *testing.T) {
	t.Parallel()
	for silent := range int32(3) {
		var asked atomic.Int32
		m := &master{control: muxFake(t, newMuxFrame(muxHello).u32(muxVersion).bytes(), func(typ, id uint32) []byte {
			if asked.Add(1) <= silent {
				return []byte{}
			}
			return newMuxFrame(muxAlive).u32(id).u32(42).bytes()
		})}
		var err error
		if m.asked, err = muxDial(m.control, patience); err != nil {
			t.Fatal(err)
		}
		first := m.alive()
		if silent < 2 && first != nil || silent == 2 && !errors.Is(first, os.ErrDeadlineExceeded) {
			t.Errorf("%d questions without an answer: %v", silent, first)
		}
		if again := m.alive(); (again == nil) != (first == nil) || asked.Load() > 3 {
			t.Errorf("%d questions without an answer, then: %v, of %d", silent, again, asked.Load())
		}
		m.stopAsking()
	}
}
