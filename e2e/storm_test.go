package e2e

// Faults that come in numbers: storms of restarts, a thousand forwards, hundreds
// of connections, few file descriptors, events missed by the hundred.

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"
)

// holding is what a process holds.
type holding struct{ fds, children int }

// holds is what the run and its ssh hold.
func (p *runProc) holds() (run, ssh holding) {
	p.t.Helper()
	return holdingOf(p.t, p.cmd.Process.Pid), holdingOf(p.t, p.masterPid())
}

func holdingOf(t *testing.T, pid int) holding {
	t.Helper()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return holding{fds: len(fds), children: len(children(pid))}
}

// returnsTo waits until the run and its ssh hold no more than before.
func (p *runProc) returnsTo(before, master holding) {
	p.t.Helper()
	eventually(p.t, "all that was taken is given back", func() error {
		now, ssh := p.holds()
		if now.fds > before.fds+2 || now.children > before.children || ssh.fds > master.fds+2 {
			return fmt.Errorf("run %+v, ssh %+v; before %+v, %+v", now, ssh, before, master)
		}
		return nil
	})
}

func TestE2ERestartStorm(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 4)
	p := startRun(t, g, "")
	var boxes []*box
	for i := 0; i < 4; i++ {
		boxes = append(boxes, g.boot(t, port+i))
		boxes[i].answers(port + i)
	}
	before, master := p.holds()
	var wg sync.WaitGroup
	for i, b := range boxes {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for n := 0; n < 50; n++ {
				if err := g.call("POST", "/containers/"+b.id+"/restart?t=0", nil, nil); err != nil {
					t.Errorf("restart %d of %s: %v", n, b.name, err)
				}
				if i == 3 && n%10 == 9 { // one of them is gone for a moment now and then
					g.call("POST", "/containers/"+b.id+"/kill", nil, nil)
					g.call("POST", "/containers/"+b.id+"/start", nil, nil)
				}
			}
		}()
	}
	wg.Wait()
	over := time.Now()
	for i, b := range boxes {
		b.answers(port + i)
		p.becomes(port+i, active, "")
	}
	took("200 restarts: all active", over)
	if n := len(p.status().Forwards); n != len(boxes) {
		t.Errorf("%d forwards, want %d", n, len(boxes))
	}
	p.returnsTo(before, master)
	p.never("connection lost")
}

// More happens while the run is away than an engine's event log holds.
func TestE2EManyEventsMissed(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 3)
	stays, goes := g.boot(t, port), g.boot(t, port+1)
	p := startRun(t, g, "")
	stays.answers(port)
	goes.answers(port + 1)
	p.signal(syscall.SIGSTOP)
	t.Cleanup(func() { p.signal(syscall.SIGCONT) })
	for n := 0; n < 300; n++ { // an engine replays 256
		goes.rename(fmt.Sprintf("%s-%d", goes.name[:4], n))
		if n%100 == 0 {
			goes.do("restart?t=0")
		}
	}
	goes.do("kill")
	born := g.boot(t, port+2)
	p.signal(syscall.SIGCONT)
	syscall.Kill(p.masterPid(), syscall.SIGKILL)
	killed := time.Now()
	born.answers(port + 2)
	took("hundreds of events missed: all answers", killed)
	stays.answers(port)
	refuses(t, port+1)
}

func TestE2EThousandForwards(t *testing.T) {
	g := needRig(t)
	const boxes, each = 10, 100 // an engine takes its time for each port
	port := freePorts(t, boxes*each)
	p := startRun(t, g, "")
	first := g.boot(t, port) // that it is seen shows that events are followed
	p.becomes(port, active, "")
	first.remove()
	refuses(t, port)
	before, master := p.holds()
	var all []*box
	for b := 0; b < boxes; b++ {
		spec := boxSpec{args: []string{"-listen", fmt.Sprintf("1000-%d", 999+each)}}
		for i := 0; i < each; i++ {
			spec.ports = append(spec.ports, boxPort{ip: "127.0.0.1", host: port + b*each + i, private: 1000 + i})
		}
		all = append(all, g.bootSpec(t, spec))
	}
	published := time.Now()
	eventually(t, "all thousand are active", func() error {
		n := 0
		for _, f := range p.status().Forwards {
			if f.Status == active {
				n++
			}
		}
		if n != boxes*each {
			return fmt.Errorf("%d are", n)
		}
		return nil
	})
	took("1,000 forwards, the last published: all active", published)
	for b, box := range all {
		for i := 0; i < each; i += 10 {
			if err := box.answering(port + b*each + i); err != nil {
				t.Error(err)
			}
		}
	}
	var wg sync.WaitGroup
	for _, b := range all {
		wg.Add(1)
		go func() {
			defer wg.Done()
			b.rig.call("POST", "/containers/"+b.id+"/kill", nil, nil)
		}()
	}
	wg.Wait()
	for until := time.Now().Add(10 * patience); ; time.Sleep(100 * time.Millisecond) { // for the engine, that takes its time
		var list []struct{ ID string }
		if err := g.call("GET", "/containers/json", nil, &list); err != nil {
			t.Fatal(err)
		}
		if len(list) == 0 {
			break
		}
		if time.Now().After(until) {
			t.Fatalf("the engine still lists %d containers", len(list))
		}
	}
	eventually(t, "all thousand are gone", func() error {
		if n := len(p.status().Forwards); n > 0 {
			return fmt.Errorf("%d are left", n)
		}
		return nil
	})
	p.returnsTo(before, master)
}

// zeroStream is a stream of zero bytes; counted tells what passed.
type zeroStream struct{ left int64 }

func (z *zeroStream) Read(b []byte) (int, error) {
	if z.left == 0 {
		return 0, io.EOF
	}
	n := min(int64(len(b)), z.left)
	clear(b[:n])
	z.left -= n
	return int(n), nil
}

func TestE2EGigabytes(t *testing.T) {
	g := needRig(t)
	const size = 1 << 30
	port := freePorts(t, 1)
	b := g.boot(t, port)
	startRun(t, g, "")
	b.answers(port)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 5 * time.Minute}
	resp, err := client.Get(fmt.Sprintf("http://%s/bytes?n=%d", localAddr(port), size))
	if err != nil {
		t.Fatal(err)
	}
	sum, want := sha256.New(), sha256.New()
	n, err := io.Copy(sum, resp.Body)
	resp.Body.Close()
	io.Copy(want, &zeroStream{size})
	if err != nil || n != size || string(sum.Sum(nil)) != string(want.Sum(nil)) {
		t.Errorf("down came %d bytes, %v", n, err)
	}
	resp, err = client.Post(fmt.Sprintf("http://%s/sink", localAddr(port)), "application/octet-stream", &zeroStream{size})
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	said, err := io.ReadAll(resp.Body)
	if got := string(said); err != nil || got != fmt.Sprintf("%d\n", size) && got != fmt.Sprint(size) {
		t.Errorf("the other end counted %q, %v", said, err)
	}
}

func TestE2EFiveHundredConnections(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 1)
	b := g.boot(t, port, "-mode", "echo")
	p := startRun(t, g, "", "-log-level", "debug")
	p.becomes(port, active, "")
	before, master := p.holds()
	const conns = 500
	ready := make(chan struct{})
	errs := make(chan error, conns)
	connecting := make(chan struct{}, 64) // ssh listens with a backlog of 128
	var dialled sync.WaitGroup
	dialled.Add(conns)
	for i := 0; i < conns; i++ {
		go func() {
			errs <- func() error {
				connecting <- struct{}{}
				c, err := net.Dial("tcp", localAddr(port))
				<-connecting
				dialled.Done()
				if err != nil {
					return err
				}
				defer c.Close()
				<-ready
				c.SetDeadline(time.Now().Add(2 * patience))
				text := fmt.Sprintf("connection %d of %s", i, b.name)
				if _, err := io.WriteString(c, text); err != nil {
					return err
				}
				c.(*net.TCPConn).CloseWrite()
				got, err := io.ReadAll(c)
				if err == nil && string(got) != text {
					err = fmt.Errorf("%q came back for %q", got, text)
				}
				return err
			}()
		}()
	}
	dialled.Wait()
	close(ready)
	for i := 0; i < conns; i++ {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	p.returnsTo(before, master)
}

// With 64 file descriptors there are not enough for every port.
func TestE2EFewDescriptors(t *testing.T) {
	needTool(t, "prlimit")
	g := needRig(t)
	const ports = 100
	port := freePorts(t, ports+1)
	spec := boxSpec{args: []string{"-listen", fmt.Sprintf("1000-%d", 999+ports)}}
	for i := 0; i < ports; i++ {
		spec.ports = append(spec.ports, boxPort{host: port + i, private: 1000 + i})
	}
	b := g.bootSpec(t, spec)
	p := newRun(t, g, "")
	p.wrap = []string{"prlimit", "--nofile=64:64"}
	p.start()
	p.waitLine("connected to ")
	eventually(t, "some are active, and the others say why not", func() error {
		works, says := 0, 0
		for _, f := range p.status().Forwards {
			switch {
			case f.Status == active:
				works++
			case f.Reason != reasonProbing && f.Reason != reasonSilent && f.Reason != "":
				says++
			}
		}
		if works < 10 || says < 10 {
			return fmt.Errorf("%d work, %d say why not", works, says)
		}
		return nil
	})
	// It recovers: with fewer ports to forward there are enough.
	b.remove()
	one := g.boot(t, port+ports)
	one.answers(port + ports)
	p.becomes(port+ports, active, "")
	eventually(t, "nothing else is left", func() error {
		if n := len(p.status().Forwards); n != 1 {
			return fmt.Errorf("%d forwards", n)
		}
		return nil
	})
}

// The folder is on a file system that fills up.
func TestE2EDiskFull(t *testing.T) {
	g := needRig(t)
	port := freePorts(t, 2)
	b := g.boot(t, port)
	p := newRun(t, g, "")
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", p.dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, out)
	}
	t.Cleanup(func() { exec.Command("umount", "-l", p.dir).Run() })
	p.start()
	p.waitLine("connected to ")
	b.answers(port)
	ballast := filepath.Join(p.dir, "ballast")
	f, err := os.Create(ballast)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(f, &zeroStream{1 << 20}); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	f.Close()
	p.waitLine("warning: the state file cannot be written: ")
	if old, err := os.ReadFile(p.paths().state); err != nil || !json.Valid(old) {
		t.Errorf("the old state file: %v: %q", err, old)
	}
	g.boot(t, port+1).answers(port + 1)
	if out, _, code := p.tell("health"); code != 1 || out[:8] != "degraded" {
		t.Errorf("health: %d, %s", code, out)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	emptied := time.Now()
	p.waitLine("the state file can be written again")
	took("the disk has room again: the state file is written", emptied)
	p.signal(syscall.SIGTERM) // before its folder is unmounted
	p.exits(0)
	p.leftNothing()
}
