//go:build linux

package e2e

// podman_test.go: the program with a real podman, in the place of docker: its service runs on
// the rig's remote host, and the account there has podman only.

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// Ports of podman's sshd.
const (
	podmanSet   = 2310 + iota // CONTAINER_HOST names the socket
	podmanUnset               // nothing names it: the host's URL has to
)

// engineAt is the rig with another engine, which listens on a socket.
func (g *testRig) engineAt(socket string) *testRig {
	other := *g
	other.engine = &http.Client{Timeout: 5 * patience, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}
	return &other
}

// needPodman starts podman's service, and an sshd for an account that has podman and no
// docker. Where podman cannot run a container that publishes a port the test is skipped.
func needPodman(t *testing.T) (f *field, g *testRig, socket string) {
	t.Helper()
	needTool(t, "podman")
	f = newField(t, map[string]string{"podman": fmt.Sprintf("Port %d", podmanSet), "podman-told": fmt.Sprintf("Port %d", podmanUnset)})
	rig := f.g.env["RIG_DIR"]
	dir, err := os.MkdirTemp(rig, "podman") // what a killed test leaves goes with the rig
	if err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(dir, "podman.sock")
	// Its own limits are higher than some machines allow, and its own locks are the machine's.
	f.write("containers.conf", fmt.Sprintf(`[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
tmp_dir = "%s/tmp"
[network]
network_config_dir = "%[1]s/networks"
`, dir))
	podman := []string{"--net=/run/netns/" + f.g.env["RIG_NS"], "unshare", "--mount", "sh", "-c", `mount -t tmpfs podman /run/netns && exec "$@"`, "sh",
		"env", "-u", "CONTAINER_HOST", "CONTAINERS_CONF=" + f.path("containers.conf"),
		"podman", "--root", dir + "/root", "--runroot", dir + "/run", "--storage-driver", "vfs"} // its mounts end with it
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	load := exec.Command("sh", "-c", `docker -H "$0" save "$1" | { shift; exec nsenter "$@"; }`)
	load.Args = append(load.Args, "unix://"+f.g.env["RIG_DOCKER"], f.g.env["RIG_IMAGE"])
	load.Args = append(append(load.Args, podman...), "load")
	if out, err := load.CombinedOutput(); err != nil {
		t.Skipf("podman cannot run here: %v: %s", err, out)
	}
	background(t, "nsenter", append(podman[:len(podman):len(podman)], "system", "service", "--time=0", "unix://"+socket)...)
	g = f.g.engineAt(socket)
	eventually(t, "podman's service", func() error { return g.call("GET", "/_ping", nil, nil) })
	trial, err := g.tryCreate(t, boxSpec{ports: []boxPort{{host: freePorts(t, 1), private: 80}}})
	if err == nil {
		err = g.call("POST", "/containers/"+trial.id+"/start", nil, nil)
	}
	if err != nil {
		t.Skipf("podman cannot run a container here: %v", err)
	}
	trial.remove()

	if err := os.Mkdir(f.path("bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	path, _ := exec.LookPath("podman")
	if err := os.Symlink(path, f.path("bin/podman")); err != nil {
		t.Fatal(err)
	}
	f.write("podman_config", fmt.Sprintf("Port %d\nPort %d\nListenAddress %s\nHostKey %s/host_key\nAuthorizedKeysFile %[4]s/authorized_keys\n"+
		"PidFile none\nUsePAM no\nStrictModes no\nPermitRootLogin prohibit-password\nSetEnv SHLVL=1 PATH=%[5]s:%[4]s/nodocker\n"+
		"Match LocalPort %[1]d\nSetEnv SHLVL=1 PATH=%[5]s:%[4]s/nodocker CONTAINER_HOST=unix://%[6]s\n",
		podmanSet, podmanUnset, f.g.env["RIG_ADDR"], rig, f.path("bin"), socket))
	f.sshd("podman_config")
	return f, g, socket
}

func TestE2EPodmanReal(t *testing.T) {
	f, g, socket := needPodman(t)
	port := freePorts(t, 5)
	web := g.bootSpec(t, boxSpec{args: []string{"-listen", "80,81,82"},
		ports: []boxPort{{host: port, private: 80}, {host: port + 1, private: 81}, {host: port + 2, private: 82}}})
	frozen := g.boot(t, port+3)
	frozen.do("pause")
	host := g.bootSpec(t, boxSpec{args: []string{"-listen", fmt.Sprint(port + 4)}, network: "host"})
	g.bootSpec(t, boxSpec{network: "none"})

	p := f.run("podman", "-retry") // the server may not listen yet
	p.start()
	p.waitLine("connected to ssh://podman, Libpod/")
	for i := range 3 {
		web.answers(port + i)
		p.becomes(port+i, active, "")
	}
	p.becomes(port+3, pending, "container paused")
	frozen.do("unpause")
	frozen.answers(port + 3)
	p.becomes(port+3, active, "")
	frozen.do("pause")
	p.becomes(port+3, pending, "container paused")

	late := g.bootSpec(t, boxSpec{args: []string{"-mode", "none"}, network: "host"})
	eventually(t, "the containers on the host's network are skipped", func() error {
		names := map[string]bool{host.name: true, late.name: true}
		skipped := p.status().Skipped
		for _, s := range skipped {
			if !names[s.Name] || !strings.HasPrefix(s.Reason, "host network: ") {
				return fmt.Errorf("skipped: %+v", s)
			}
		}
		if len(skipped) != len(names) {
			return fmt.Errorf("skipped: %+v", skipped)
		}
		return nil
	})

	for _, how := range []string{"stop?t=0", "kill"} {
		web.do(how)
		for i := range 3 {
			refuses(t, port+i)
		}
		web.do("start")
		for i := range 3 {
			web.answers(port + i)
		}
	}
	web.rename(web.name + "-new")
	eventually(t, "the new name", func() error {
		fw := p.forward(port + 2)
		if fw == nil || fw.ContainerName != web.name || fw.ContainerID != web.id[:12] || fw.ContainerPort != 82 || !strings.Contains(fw.Image, f.g.env["RIG_IMAGE"]) {
			return fmt.Errorf("the forward is %+v", fw)
		}
		return nil
	})
	web.remove()
	for i := range 3 {
		refuses(t, port+i)
	}

	p.signal(syscall.SIGTERM)
	p.exits(0)
	p.leftNothing()
	told := f.run("podman-told")
	told.host = "podman-told" + socket
	told.args[2] = "ssh://" + told.host
	told.start()
	told.waitLine("connected to ssh://" + told.host + ", Libpod/")
	frozen.do("unpause")
	frozen.answers(port + 3)
}

// Tools reach podman, too, through the engine's socket; and the answers of its own API are
// held until the ports have followed.
func TestE2EPodmanSocket(t *testing.T) {
	f, g, socket := needPodman(t)
	port := freePorts(t, 2)
	b := g.create(t, boxSpec{ports: []boxPort{{host: port, private: 80}, {host: port + 1, private: 81}}})
	p := f.run("podman", "-retry")
	p.start()
	p.waitLine("connected to ")
	near := g.engineAt(p.engineSocket())
	for _, api := range []string{"/v4.0.0/libpod", "/v1.41"} {
		for range 3 {
			if err := near.call("POST", api+"/containers/"+b.id+"/start", nil, nil); err != nil {
				t.Fatal(err)
			}
			for i := range 2 {
				if refused(port+i) == nil {
					t.Errorf("%d is closed when the start of %s returns", port+i, api)
				}
			}
			if err := near.call("POST", api+"/containers/"+b.id+"/stop?t=0&timeout=0", nil, nil); err != nil {
				t.Fatal(err)
			}
			for i := range 2 {
				if err := refused(port + i); err != nil {
					t.Errorf("when the stop of %s returns: %v", api, err)
				}
			}
		}
	}
	b.do("start")
	if got := dockerAt(t, p.engineSocket()).must("ps", "-q"); got != b.id[:12] {
		t.Errorf("docker ps: %q, want %q", got, b.id[:12])
	}
	ps := exec.Command("podman", "--remote", "--url", "unix://"+p.engineSocket(), "ps", "--quiet")
	if out, err := ps.CombinedOutput(); err != nil || strings.TrimSpace(string(out)) != b.id[:12] {
		t.Errorf("podman ps: %q, %v, want %q", out, err, b.id[:12])
	}
	out, _, _ := p.tell("env", "-json")
	if !strings.Contains(out, `"`+socket+`"`) {
		t.Errorf("env says %s, the socket on the remote host is %s", out, socket)
	}
}
