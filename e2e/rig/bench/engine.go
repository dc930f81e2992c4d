//go:build linux

package main

// engine.go: docker through rdhpf's socket, beside DOCKER_HOST=ssh:// and beside
// the engine's own socket, which nothing on this machine can be faster than.

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"time"
)

const (
	copied     = 200 << 20             // bytes that docker cp moves
	engineGoal = 30 * time.Millisecond // on top of two round trips: docker ps sends two requests
)

// The ways to the engine that are compared.
const (
	socketWay = iota // rdhpf's socket
	sshWay           // DOCKER_HOST=ssh://
	directWay        // the engine's own socket
	ways
)

// dockers runs docker against the engine of the rig, in each of the ways.
type dockers struct {
	b     *bench
	f     *forwarder
	hosts [ways]string // values of DOCKER_HOST
}

// dockersOver returns them over a link that is one of the rig's aliases, with an
// rdhpf to be stopped.
func (b *bench) dockersOver(alias string) (*dockers, []*container, error) {
	f, pool, err := b.following(b.env["RIG_HOST"]+alias, 1)
	if err != nil {
		return nil, nil, err
	}
	path, err := f.dockerSocket()
	if err != nil {
		f.stop()
		return nil, nil, f.explain(err)
	}
	return &dockers{b: b, f: f, hosts: [ways]string{
		socketWay: "unix://" + path,
		sshWay:    "ssh://" + f.host,
		directWay: "unix://" + b.env["RIG_DOCKER"],
	}}, pool, nil
}

// dockerSocket waits until rdhpf knows the way to the engine.
func (f *forwarder) dockerSocket() (string, error) {
	for deadline := time.Now().Add(patience); ; time.Sleep(quiet) {
		out, err := f.command("status", "-host", f.host, "-json").Output()
		if err != nil {
			return "", fmt.Errorf("rdhpf status: %w", err)
		}
		var status struct {
			DockerSocket       string `json:"docker_socket"`
			RemoteDockerSocket string `json:"remote_docker_socket"`
		}
		if err := json.Unmarshal(out, &status); err != nil {
			return "", err
		}
		if status.RemoteDockerSocket != "" {
			return status.DockerSocket, nil
		}
		if time.Now().After(deadline) {
			return "", errors.New("rdhpf does not find the engine's socket")
		}
	}
}

// docker prepares a docker command. Nothing of the user's configuration counts.
func (d *dockers) docker(way int, args ...string) *exec.Cmd {
	cmd := exec.Command("docker", args...)
	cmd.Env = []string{"PATH=" + d.b.env["RIG_BIN"] + ":" + os.Getenv("PATH"), "HOME=" + d.b.tmp, "DOCKER_HOST=" + d.hosts[way]}
	return cmd
}

// run runs a docker command to its end, which is as expected: it exits with a
// status and prints something.
func (d *dockers) run(way, status int, prints string, args ...string) error {
	cmd := d.docker(way, args...)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState.ExitCode() != status || !strings.Contains(string(out), prints) {
		return fmt.Errorf("docker %s over %s: %v: %.2000s", strings.Join(args, " "), d.hosts[way], err, out)
	}
	return nil
}

// timings are how long a docker command took in each way, and the ratios of
// rdhpf's socket to ssh:// in each round.
type timings struct {
	took   [ways]samples
	ratios []float64
}

// compare times a docker command in all ways, in turns, after one round to warm up.
func (d *dockers) compare(rounds int, command func(way int) error) (t timings, err error) {
	for i := range rounds + 1 {
		var took [ways]time.Duration
		for turn := range ways {
			way := (i + turn) % ways
			time.Sleep(quiet)
			if took[way], err = timed(func() error { return command(way) }); err != nil {
				return t, d.f.explain(err)
			}
		}
		if i == 0 {
			continue
		}
		for way := range ways {
			t.took[way].add(took[way])
		}
		t.ratios = append(t.ratios, float64(took[socketWay])/float64(took[sshWay]))
	}
	return t, nil
}

// besideSSH makes the row that compares with ssh://.
func (t timings) besideSSH(figure string) row {
	ratio := median(t.ratios)
	return row{figure: figure, n: len(t.ratios), median: ms(t.took[socketWay].median()), p90: ms(t.took[socketWay].p90()),
		reference: fmt.Sprintf("%s (ssh://), %s (own socket)", ms(t.took[sshWay].median()), ms(t.took[directWay].median())),
		relation:  fmt.Sprintf("%.2f ×", ratio), goal: "≤ 1.00 × of ssh://", met: ratio <= 1}
}

func (b *bench) dockerCommands() (rows []row, err error) {
	for _, link := range []struct {
		alias, where string
		ps, runs     int
	}{
		{"", "", 20, 8},
		{"-delay", ", 25 ms away in each direction", 12, 5},
	} {
		more, err := b.dockerCommandsOver(link.alias, link.where, b.times(link.ps), b.times(link.runs))
		if err != nil {
			return nil, err
		}
		rows = append(rows, more...)
	}
	return rows, nil
}

func (b *bench) dockerCommandsOver(alias, where string, ps, runs int) ([]row, error) {
	d, pool, err := b.dockersOver(alias)
	if err != nil {
		return nil, err
	}
	defer d.f.stop()
	line, err := net.Dial("tcp", pool[0].addrs[0])
	if err != nil {
		return nil, err
	}
	defer line.Close()
	var trips samples
	for range ps {
		trip, err := timed(func() error { return roundTrip(line) })
		if err != nil {
			return nil, d.f.explain(err)
		}
		trips.add(trip)
	}
	list := func(way int) error { return d.run(way, 0, pool[0].id[:12], "ps") }
	first, err := timed(func() error { return list(socketWay) }) // the engine's path is known, but no connection is kept yet
	if err != nil {
		return nil, d.f.explain(err)
	}
	listed, err := d.compare(ps, list)
	if err != nil {
		return nil, err
	}
	ran, err := d.compare(runs, func(way int) error {
		// The image's program ends at once if it is called like this.
		return d.run(way, 1, `unexpected argument "bench"`, "run", "--rm", b.env["RIG_IMAGE"], "bench")
	})
	if err != nil {
		return nil, err
	}
	trip := trips.median()
	own := listed.took[directWay].median()
	r := durations("docker ps"+where, listed.took[socketWay], ms(own)+" (own socket)",
		"+"+ms(listed.took[socketWay].median()-own), listed.took[socketWay].median()-own, 2*trip+engineGoal)
	r.note = fmt.Sprintf("Through rdhpf's socket. The goal is for the difference from the engine's own socket: two round trips, of %s each, and %v. "+
		"The first docker ps, which opens a connection to the engine and so takes a third, took %s.", ms(trip), engineGoal, ms(first))
	return []row{r, listed.besideSSH("the same beside ssh://"), ran.besideSSH("docker run --rm" + where)}, nil
}

func (b *bench) dockerCopies() (rows []row, err error) {
	big := b.tmp + "/big"
	if err := makeRandom(big, copied); err != nil {
		return nil, err
	}
	for _, link := range []struct{ alias, where string }{{"", ""}, {"-delay", ", 25 ms away in each direction"}} {
		more, err := b.dockerCopiesOver(link.alias, link.where, big, b.times(3))
		if err != nil {
			return nil, err
		}
		rows = append(rows, more...)
	}
	rows[0].note = "Random bytes: docker's tools ask for compression over ssh://, which zeros would flatter."
	return rows, nil
}

func (b *bench) dockerCopiesOver(alias, where, big string, rounds int) ([]row, error) {
	d, _, err := b.dockersOver(alias)
	if err != nil {
		return nil, err
	}
	defer d.f.stop()
	var c container
	if err := b.api("POST", "/containers/create", map[string]any{"Image": b.env["RIG_IMAGE"]}, &struct{ ID *string }{&c.id}); err != nil {
		return nil, err
	}
	defer b.remove(&c)
	to, err := d.compare(rounds, func(way int) error {
		return d.run(way, 0, "", "cp", big, c.id+":/big")
	})
	if err != nil {
		return nil, err
	}
	from, err := d.compare(rounds, func(way int) error { return d.fetch(way, c.id+":/big") })
	if err != nil {
		return nil, err
	}
	return []row{to.besideSSH("docker cp of 200 MiB to a container" + where),
		from.besideSSH("docker cp of 200 MiB from a container" + where)}, nil
}

// fetch copies a file of a container to nowhere: the disk here is no part of it.
func (d *dockers) fetch(way int, file string) error {
	cmd := d.docker(way, "cp", file, "-")
	var said strings.Builder
	cmd.Stderr = &said
	tar, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	got, err := io.Copy(io.Discard, tar)
	if err := errors.Join(err, cmd.Wait()); err != nil || got < copied {
		return fmt.Errorf("docker cp over %s sends %d bytes: %v: %.2000s", d.hosts[way], got, err, said.String())
	}
	return nil
}

// makeRandom makes a file of n random bytes.
func makeRandom(path string, n int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.CopyN(f, rand.Reader, n)
	return errors.Join(err, f.Close())
}
