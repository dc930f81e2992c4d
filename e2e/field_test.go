package e2e

// field_test.go: servers, keys and configurations as people have them: an sshd of its
// own on the remote host, and aliases for it.

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// field is a directory with the configurations of an sshd and of ssh.
type field struct {
	t   *testing.T
	g   *testRig
	dir string

	sshd func(config string) // starts another
}

// Ports of the field's sshd.
const (
	fieldBanner = 2301 + iota // with two attempts at authentication
	fieldLogin                // asks for another account
	fieldForced               // forces the command docker system dial-stdio
	fieldSix                  // of an sshd that listens and connects over IPv6 only
)

// newField starts the sshd and writes aliases, each with its lines of ssh_config, in which
// DIR is the field's directory.
func newField(t *testing.T, aliases map[string]string) *field {
	t.Helper()
	g := needRig(t)
	f := &field{t: t, g: g, dir: t.TempDir()}
	rig := g.env["RIG_DIR"]
	f.write("banner", "A private system.\nAll is logged.\n")
	f.write("sshd_config", fmt.Sprintf(`Port %d
Port %d
Port %d
ListenAddress %s
HostKey %s/host_key
AuthorizedKeysFile %s/authorized_keys
PidFile none
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
MaxAuthTries 2
Banner %s/banner
SetEnv SHLVL=1 DOCKER_HOST=unix://%s
Match LocalPort %[2]d
	ForceCommand echo 'Please login as the user "admin".'; exec sleep 60
Match LocalPort %[3]d
	ForceCommand docker system dial-stdio
`, fieldBanner, fieldLogin, fieldForced, g.env["RIG_ADDR"], rig, rig, f.dir, g.env["RIG_DOCKER"]))
	config, ownKeys := "", "none"
	for name, lines := range aliases {
		config += fmt.Sprintf("Host %s\n%s\n", name, strings.ReplaceAll(lines, "DIR", f.dir))
		if strings.Contains(lines, "IdentityFile") {
			ownKeys += "," + name
		}
	}
	f.write("ssh_config", config+fmt.Sprintf(`Match all
HostName %s
HostKeyAlias %s
User root
IdentitiesOnly yes
IdentityAgent none
UserKnownHostsFile %s/known_hosts
GlobalKnownHostsFile /dev/null
StrictHostKeyChecking yes
Match !originalhost %s
IdentityFile %[3]s/key
`, g.env["RIG_ADDR"], g.env["RIG_HOST"], rig, ownKeys))
	f.wrap("exec ")
	sshd, err := exec.LookPath("sshd")
	if err != nil {
		sshd = "/usr/sbin/sshd"
	}
	f.sshd = func(config string) {
		background(t, "nsenter", "--net=/run/netns/"+g.env["RIG_NS"], sshd, "-D", "-e", "-f", f.path(config))
	}
	f.sshd("sshd_config")
	eventually(t, "the field's sshd", func() error {
		c, err := net.Dial("tcp", net.JoinHostPort(g.env["RIG_ADDR"], fmt.Sprint(fieldForced)))
		if err == nil {
			c.Close()
		}
		return err
	})
	return f
}

func (f *field) path(name string) string { return filepath.Join(f.dir, name) }

func (f *field) write(name, text string) {
	f.t.Helper()
	if err := os.WriteFile(f.path(name), []byte(text), 0o600); err != nil {
		f.t.Fatal(err)
	}
}

// wrap makes ssh on PATH a script that runs the real one with the field's configuration.
func (f *field) wrap(how string) {
	f.t.Helper()
	real := ""
	for _, dir := range filepath.SplitList(os.Getenv("PATH")) {
		if path := filepath.Join(dir, "ssh"); !strings.HasPrefix(dir, f.g.env["RIG_DIR"]) && real == "" {
			if _, err := os.Stat(path); err == nil {
				real = path
			}
		}
	}
	f.write("ssh", fmt.Sprintf("#!/bin/sh\n%s%s -F %s \"$@\"\n", how, real, f.path("ssh_config")))
	if err := os.Chmod(f.path("ssh"), 0o700); err != nil {
		f.t.Fatal(err)
	}
}

// run prepares a run for an alias.
func (f *field) run(alias string, args ...string) *runProc {
	f.t.Helper()
	p := newRun(f.t, f.g, "", args...)
	p.host, p.args[2] = alias, alias
	p.env = append(p.env, "PATH="+f.dir+":"+f.g.env["RIG_BIN"]+":"+os.Getenv("PATH"))
	return p
}

// key makes a key pair, and returns the path of the private key.
func (f *field) key(name, passphrase string) string {
	f.t.Helper()
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", f.path(name)).CombinedOutput(); err != nil {
		f.t.Fatalf("%v: %s", err, out)
	}
	return f.path(name)
}

func TestE2EFieldReasons(t *testing.T) {
	rig := needRig(t).env["RIG_DIR"]
	cases := map[string]struct {
		config string
		says   []string
	}{
		"toomany": {"Port 2301\nIdentityFile DIR/k1\nIdentityFile DIR/k2\nIdentityFile DIR/k3\nIdentityFile DIR/k4",
			[]string{"Too many authentication failures", "IdentitiesOnly"}},
		"openkey":   {"IdentityFile DIR/open", []string{"DIR/open' are too open", "chmod 600"}},
		"passkey":   {"IdentityFile DIR/pass", []string{"Permission denied (publickey", "ssh-add", "ssh -o BatchMode=yes passkey"}},
		"nokey":     {"IdentityFile DIR/none", []string{"DIR/none: No such file", "Permission denied (publickey"}},
		"login":     {"Port 2302", []string{`did not start docker, but printed: Please login as the user "admin".`}},
		"proxy":     {"ProxyCommand sh -c 'echo no ticket, run tsh login >&2; exit 1'", []string{"ssh: no ticket, run tsh login"}},
		"mute":      {"ProxyCommand false", []string{"the ProxyCommand or jump host ended", "ssh mute"}},
		"jumpdown":  {"ProxyJump 127.0.0.1:1", []string{"port 1: Connection refused"}},
		"beyond":    {"HostName 127.0.0.1\nPort 1\nProxyJump hop", []string{"connect failed", "the jump host cannot reach the host"}},
		"hop":       {"Port 2301", nil},
		"changed":   {"UserKnownHostsFile " + rig + "/known_hosts.changed", []string{"has changed", "ssh-keygen -R '"}},
		"stranger":  {"HostKeyAlias stranger", []string{"host key is known for stranger", "ssh stranger"}},
		"nocipher":  {"Ciphers 3des-cbc", []string{"no matching cipher found", "ssh nocipher"}},
		"nothere":   {"Port 1", []string{"port 1: Connection refused"}},
		"patience2": {"ConnectTimeout 2\nProxyCommand sleep 60", []string{"timed out"}},
	}
	aliases := make(map[string]string)
	for name := range cases {
		aliases[name] = cases[name].config
	}
	f := newField(t, aliases)
	for _, k := range []string{"k1", "k2", "k3", "k4"} {
		f.key(k, "")
	}
	f.key("pass", "secret")
	accepted, err := os.ReadFile(rig + "/key") // ssh loads only these
	if err != nil {
		t.Fatal(err)
	}
	f.write("open", string(accepted))
	if err := os.Chmod(f.path("open"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, c := range cases {
		if c.says == nil {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := f.run(name)
			p.t = t
			p.start()
			p.exits(1)
			lines := strings.Split(p.log(), "\n")
			for _, want := range append(c.says, "rdhpf: cannot connect to ssh://"+name+": ") {
				want = strings.ReplaceAll(want, "DIR", f.dir)
				if last := lines[len(lines)-1]; !strings.Contains(last, want) {
					t.Errorf("%q does not hold %q", last, want)
				}
			}
			p.leftNothing()
		})
	}
}

// An unknown option ends ssh before it connects; the reason stands in its first line.
func TestE2EFieldUnknownOption(t *testing.T) {
	f := newField(t, map[string]string{"odd": "FooBar yes"})
	p := f.run("odd")
	p.start()
	p.exits(1)
	if log := p.log(); !strings.Contains(log, "Bad configuration option: foobar") {
		t.Errorf("said %q", log)
	}
}

func TestE2EFieldForcedDialStdio(t *testing.T) {
	f := newField(t, map[string]string{"forced": fmt.Sprintf("Port %d", fieldForced)})
	port := freePorts(t, 1)
	b := f.g.boot(t, port)
	p := f.run("forced")
	p.start()
	p.waitLine("connected to ")
	b.answers(port)
	b.remove()
	refuses(t, port)
}

// A banner explains nothing that happens later.
func TestE2EFieldBanner(t *testing.T) {
	f := newField(t, map[string]string{"banner": fmt.Sprintf("Port %d", fieldBanner)})
	p := f.run("banner")
	p.start()
	p.waitLine("connected to ")
	if err := syscall.Kill(p.masterPid(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	p.waitLine("again after ")
	if log := p.log(); strings.Contains(log, "All is logged") || !strings.Contains(log, "connection lost: ssh ended: signal: killed") {
		t.Errorf("said %q", log)
	}
}

func TestE2EFieldScriptThatStays(t *testing.T) {
	f := newField(t, nil)
	f.wrap("")
	port := freePorts(t, 1)
	b := f.g.boot(t, port)
	p := f.run("any")
	p.start()
	p.waitLine("connected to ")
	b.answers(port)
	if f.g.endConnections(t) == 0 {
		t.Fatal("there was no connection to end")
	}
	p.waitLine("again after ")
	b.answers(port)
	p.signal(syscall.SIGTERM)
	p.exits(0)
	p.leftNothing()
}

// With -retry the first failure is no lost connection, and a slow attempt gives a sign of
// life.
func TestE2EFieldRetry(t *testing.T) {
	f := newField(t, map[string]string{"nothere": "Port 1", "slow": "ProxyCommand sh -c 'sleep 2; exec nc %h 22'"})
	p := f.run("nothere", "-retry")
	p.start()
	p.waitLine("cannot connect to ssh://nothere: ssh: connect to host")
	p.never("connection lost")
	slow := f.run("slow")
	slow.start()
	slow.waitLine("connecting to ssh://slow")
	slow.waitLine("connected to ssh://slow")
}

// A server that connects over IPv6 only cannot be asked for 127.0.0.1.
func TestE2EFieldInet6(t *testing.T) {
	g := needRig(t)
	f := newField(t, map[string]string{"six": fmt.Sprintf("ProxyCommand nsenter --net=/run/netns/%s nc ::1 %d", g.env["RIG_NS"], fieldSix)})
	f.write("six_config", fmt.Sprintf("AddressFamily inet6\nListenAddress ::1\nPort %d\nHostKey %s/host_key\nAuthorizedKeysFile %[2]s/authorized_keys\n"+
		"PidFile none\nUsePAM no\nStrictModes no\nPermitRootLogin prohibit-password\nSetEnv SHLVL=1 DOCKER_HOST=unix://%s\n",
		fieldSix, g.env["RIG_DIR"], g.env["RIG_DOCKER"]))
	f.sshd("six_config")
	port := freePorts(t, 1)
	b := g.boot(t, port)
	p := f.run("six", "-retry") // the server may not listen yet
	p.start()
	p.waitLine("connected to ")
	p.becomes(port, "active", "")
	b.answers(port)
}

// The connection that the user's ssh keeps to the jump host is dead: it is told how to end it.
func TestE2EFieldDeadJumpMaster(t *testing.T) {
	f := newField(t, map[string]string{"hop": "ControlMaster auto\nControlPath DIR/hop.ctl\nControlPersist yes", "far": "ProxyJump hop\nConnectTimeout 2"})
	ssh := exec.Command(f.path("ssh"), "hop", "true")
	if out, err := ssh.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	check, err := exec.Command(f.path("ssh"), "-O", "check", "hop").CombinedOutput()
	var pid int
	if _, scan := fmt.Sscanf(string(check), "Master running (pid=%d)", &pid); err != nil || scan != nil {
		t.Fatalf("%v: %s", err, check)
	}
	t.Cleanup(func() { syscall.Kill(pid, syscall.SIGKILL) })
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	p := f.run("far")
	p.start()
	p.exits(1)
	p.waitLine("if ssh keeps a connection to the jump host that is dead, end it: ssh -O exit ssh://hop")
	p = f.run("far", "-retry") // and makes a connection of its own
	p.start()
	p.waitLine("connected to ")
	p.signal(syscall.SIGTERM)
	p.exits(0)
}
