package e2e

// Tools that know nothing of rdhpf, on its engine socket: a container is reachable as soon as
// its start has returned, and many requests at once need no connection of their own.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// toolEnv is the environment in which tools use the run's engine.
func (p *runProc) toolEnv() []string {
	p.t.Helper()
	out, errs, _ := p.tell("env", "-json")
	var vars map[string]string
	if err := json.Unmarshal([]byte(out), &vars); err != nil {
		p.t.Fatalf("env -json: %v: %q, %q", err, out, errs)
	}
	env := p.environment()
	for name, value := range vars {
		env = append(env, name+"="+value)
	}
	return env
}

// tool runs a program to its end and returns what it printed.
func tool(env []string, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 4*patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env, cmd.WaitDelay = env, patience // what it started may hold the pipes
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(errs.Bytes()))
	}
	return strings.TrimSpace(string(out)), err
}

// conflictOf returns why a local port that the engine picked at random is in conflict, "" if it
// is not: this machine may use the port for something else. It waits until status names that.
func (p *runProc) conflictOf(port int) (reason string) {
	p.t.Helper()
	eventually(p.t, fmt.Sprintf("status names who holds %d", port), func() error {
		f := p.forward(port)
		if f == nil || f.Status != conflict {
			return nil
		}
		if reason = f.Reason; !strings.Contains(reason, "(") {
			return errors.New(reason)
		}
		return nil
	})
	return reason
}

// byLabel lists the rig's containers that have a label, running or not.
func (g *testRig) byLabel(t *testing.T, label string) (all []listedBox) {
	t.Helper()
	filters := fmt.Sprintf(`{"label":[%q]}`, label)
	if err := g.call("GET", "/containers/json?all=1&filters="+url.QueryEscape(filters), nil, &all); err != nil {
		t.Fatal(err)
	}
	return all
}

type listedBox struct {
	ID     string
	Labels map[string]string
	Ports  []struct{ PublicPort int }
}

func TestE2ETestcontainers(t *testing.T) {
	g := needRig(t)
	if out, err := exec.Command("go", "-C", "testcontainers", "mod", "download").CombinedOutput(); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("testcontainers-go cannot be had: %v: %s", err, out)
		}
		t.Skipf("testcontainers-go cannot be had: %v: %s", err, out)
	}
	t.Cleanup(func() {
		for _, b := range g.byLabel(t, "org.testcontainers") {
			if err := g.call("DELETE", "/containers/"+b.ID+"?force=1", nil, nil); err != nil {
				t.Errorf("cleaning up: %v", err)
			}
		}
	})
	p := newRun(t, g, "")
	env := []string{"TESTCONTAINERS_RYUK_DISABLED=true", "RIG_IMAGE=" + g.env["RIG_IMAGE"], "TEST_RDHPF=" + program, "TEST_HOST=" + p.host}
	out, errs, code := p.rdhpfWith(env, "run", "-host", p.host, "-quiet", "--",
		"go", "test", "-C", "testcontainers", "-race", "-count=3", "-parallel=5", "-v", "./...")
	rounds := 0
	for _, line := range strings.Split(out, "\n") {
		if strings.Contains(line, "in conflict") {
			t.Log(strings.TrimSpace(line))
		}
		if strings.Contains(line, "at the first connect") {
			rounds++
		}
	}
	if code != 0 || rounds != 3 {
		t.Errorf("%d rounds and exit status %d, want 3 and 0:\n%s%s", rounds, code, out, errs)
	}
	if errs != "" {
		t.Errorf("stderr: %q", errs)
	}
	p.leftNothing()
}

func TestE2EDockerRun(t *testing.T) {
	g := needRig(t)
	const boxes, atOnce, label = 50, 4, "rdhpf-e2e-docker-run"
	for _, c := range []struct {
		name, alias string
		random      bool
	}{{"p", "", false}, {"P", "", true}, {"P over 25 ms", "-delay", true}} {
		t.Run(c.name, func(t *testing.T) {
			p := startRun(t, g, c.alias)
			env, ports := p.toolEnv(), 0
			if !c.random {
				ports = freePorts(t, boxes)
			}
			type look struct {
				name string
				port int
				got  string
				err  error
			}
			run := func(i int) (l look) {
				l.name, l.port = fmt.Sprintf("run%d", i), ports+i
				args := []string{"run", "-d", "--name", l.name, "--label", label}
				if c.random {
					args = append(args, "-P")
				} else {
					args = append(args, "-p", fmt.Sprintf("%d:80", l.port))
				}
				if _, l.err = tool(env, "docker", append(args, g.env["RIG_IMAGE"], "-name", l.name)...); l.err != nil {
					return l
				}
				if c.random {
					var out string
					if out, l.err = tool(env, "docker", "port", l.name, "80/tcp"); l.err != nil {
						return l
					}
					_, four, _ := strings.Cut("\n"+out, "\n0.0.0.0:") // the port of IPv6 can be another
					four, _, _ = strings.Cut(four, "\n")
					if l.port, l.err = strconv.Atoi(four); l.err != nil {
						return l
					}
				}
				l.got, l.err = tool(env, "curl", "--noproxy", "*", "-sS", "-m", "30", "http://"+localAddr(l.port)+"/")
				return l
			}
			todo, looks := make(chan int, boxes), make(chan look, boxes)
			for i := range boxes {
				todo <- i
			}
			close(todo)
			var wg sync.WaitGroup
			for range atOnce {
				wg.Go(func() {
					for i := range todo {
						looks <- run(i)
					}
				})
			}
			t.Cleanup(func() {
				wg.Wait()
				for _, b := range g.byLabel(t, label) {
					if err := g.call("DELETE", "/containers/"+b.ID+"?force=1", nil, nil); err != nil {
						t.Errorf("cleaning up: %v", err)
					}
				}
			})
			answered, conflicts := 0, 0
			rm := []string{"rm", "-f"}
			for range boxes {
				l := <-looks
				rm = append(rm, l.name)
				if l.err == nil && l.got == "hello from "+l.name {
					answered++
					continue
				}
				if c.random {
					if reason := p.conflictOf(l.port); reason != "" {
						t.Logf("%s: %d is in conflict: %s", l.name, l.port, reason)
						conflicts++
						continue
					}
				}
				t.Errorf("%s: %d answered %q, %v; its forward is %+v", l.name, l.port, l.got, l.err, p.forward(l.port))
			}
			t.Logf("%d of %d answered at the first connect, %d in conflict", answered, boxes-conflicts, conflicts)
			if answered == 0 {
				t.Error("none answered")
			}
			if _, err := tool(env, "docker", rm...); err != nil {
				t.Fatal(err)
			}
			for i := range boxes {
				if c.random {
					break // the next outgoing connection may get such a port
				}
				if err := refused(ports + i); err != nil {
					t.Errorf("after docker rm: %v", err)
				}
			}
		})
	}
}

// TestE2ECompose has compose start, scale and remove 20 services again and again. Each round
// makes many requests at once, for which a server allows too few connections and sessions.
// RDHPF_COMPOSE_ROUNDS is how many; with it, a round over ssh:// is timed as well.
func TestE2ECompose(t *testing.T) {
	g := needRig(t)
	needTool(t, "docker-compose")
	rounds := 3
	if s := os.Getenv("RDHPF_COMPOSE_ROUNDS"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		rounds = n
	}
	const services, scaled, project = 20, 5, "rdhpfe2e"
	port := freePorts(t, services-1)
	var text strings.Builder
	fmt.Fprintf(&text, "version: '3'\nservices:\n")
	for i := range services - 1 {
		fmt.Fprintf(&text, "  s%d:\n    image: %s\n    command: [-name, s%d]\n    ports: ['%d:80']\n", i, g.env["RIG_IMAGE"], i, port+i)
	}
	fmt.Fprintf(&text, "  many:\n    image: %s\n    command: [-name, many]\n    ports: ['80']\n", g.env["RIG_IMAGE"])
	file := filepath.Join(t.TempDir(), "docker-compose.yml")
	if err := os.WriteFile(file, []byte(text.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	compose := func(env []string, args ...string) error {
		_, err := tool(env, "docker-compose", append([]string{"-f", file, "-p", project}, args...)...)
		return err
	}
	p := startRun(t, g, "-defaults")
	t.Cleanup(func() {
		if err := compose(append(p.environment(), "DOCKER_HOST=unix://"+g.env["RIG_DOCKER"]), "down", "-t", "1"); err != nil {
			t.Errorf("cleaning up: %v", err)
		}
	})
	// up and down are a round but for what they are checked by.
	up, scale, down := []string{"up", "-d"}, []string{"up", "-d", "--scale", fmt.Sprintf("many=%d", scaled)}, []string{"down"}

	env, conflicts, took := p.toolEnv(), 0, make([]time.Duration, 0, rounds)
	for round := range rounds {
		var all time.Duration
		step := func(args []string) {
			t.Helper()
			began := time.Now()
			if err := compose(env, args...); err != nil {
				t.Fatalf("round %d: %v", round+1, err)
			}
			all += time.Since(began)
		}
		step(up)
		for i := range services - 1 {
			if got, err := httpGet(port + i); err != nil || got != fmt.Sprintf("hello from s%d\n", i) {
				t.Errorf("round %d: s%d answers %q, %v; its forward is %+v", round+1, i, got, err, p.forward(port+i))
			}
		}
		step(scale)
		many := g.byLabel(t, "com.docker.compose.service=many")
		if len(many) != scaled {
			t.Errorf("round %d: many runs %d times, want %d", round+1, len(many), scaled)
		}
		for _, b := range many {
			if len(b.Ports) == 0 {
				t.Errorf("round %d: %s has no port", round+1, b.ID)
				continue
			}
			at := b.Ports[0].PublicPort
			if got, err := httpGet(at); err != nil || got != "hello from many\n" {
				reason := p.conflictOf(at)
				if reason == "" {
					t.Errorf("round %d: %d answers %q, %v; its forward is %+v", round+1, at, got, err, p.forward(at))
					continue
				}
				t.Logf("round %d: %d is in conflict: %s", round+1, at, reason)
				conflicts++
			}
		}
		step(down)
		for i := range services - 1 {
			if err := refused(port + i); err != nil {
				t.Errorf("round %d, after down: %v", round+1, err)
			}
		}
		took = append(took, all.Round(100*time.Millisecond))
	}
	t.Logf("%d rounds of up, scale and down through the socket: %v; %d random ports in conflict", rounds, took, conflicts)

	if os.Getenv("RDHPF_COMPOSE_ROUNDS") == "" {
		return // what follows takes minutes
	}
	began := time.Now()
	var failed []string
	for _, args := range [][]string{up, scale, down} {
		if err := compose(append(p.environment(), "DOCKER_HOST=ssh://"+p.host), args...); err != nil {
			failed = append(failed, err.Error())
		}
	}
	t.Logf("the same over ssh://: %v, %d of 3 commands failed\n%s", time.Since(began).Round(100*time.Millisecond), len(failed), strings.Join(failed, "\n"))
}
