//go:build linux

package main

// measure.go: how it is measured: looking at a port until it answers or
// refuses, medians, and what /proc says of a process.

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

const (
	pause    = 200 * time.Microsecond // between two looks at a port
	patience = 60 * time.Second       // until what is awaited counts as an error
)

// samples are durations of one kind.
type samples []time.Duration

func (s *samples) add(d time.Duration) { *s = append(*s, d) }

func (s samples) median() time.Duration { return median(s) }

// p90 is what nine of ten do not exceed.
func (s samples) p90() time.Duration {
	if len(s) == 0 {
		return 0
	}
	return slices.Sorted(slices.Values(s))[(len(s)*9-1)/10]
}

func median[S ~[]T, T time.Duration | float64](s S) T {
	if len(s) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(s))
	return (sorted[(len(s)-1)/2] + sorted[len(s)/2]) / 2
}

// ms prints a duration in milliseconds, the unit of every goal.
func ms(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d)/1e6) }

// look connects and asks.
func look(addr string) error {
	c, err := net.DialTimeout("tcp", addr, patience)
	if err != nil {
		return err
	}
	defer c.Close()
	return ask(c)
}

// ask sends a request and waits for the first bytes of the answer.
func ask(c net.Conn) error {
	c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write([]byte("GET / HTTP/1.0\r\n\r\n")); err != nil {
		return err
	}
	var b [512]byte
	n, err := c.Read(b[:])
	if n > 0 {
		if !bytes.HasPrefix(b[:n], []byte("HTTP/1.")) {
			return fmt.Errorf("%s answers %q", c.RemoteAddr(), b[:n])
		}
		return nil
	}
	return err
}

// answers waits until addr answers, looking all the time.
func answers(addr string) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(pause) {
		err := look(addr)
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s does not answer: %w", addr, err)
		}
	}
}

// allAnswer waits until all answer. It waits for one to accept before it turns
// to the next, so that its looks do not hold up what they look at.
func allAnswer(addrs []string) error {
	failed := make(chan error, len(addrs))
	for _, a := range addrs {
		for deadline := time.Now().Add(patience); ; time.Sleep(pause) {
			c, err := net.Dial("tcp", a)
			if err == nil {
				go func() {
					defer c.Close()
					if ask(c) == nil {
						failed <- nil
						return
					}
					failed <- answers(a)
				}()
				break
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("%s does not answer: %w", a, err)
			}
		}
	}
	var all error
	for range addrs {
		all = errors.Join(all, <-failed)
	}
	return all
}

// refuses waits until addr refuses connections.
func refuses(addr string) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(pause) {
		c, err := net.DialTimeout("tcp", addr, patience)
		switch {
		case errors.Is(err, syscall.ECONNREFUSED):
			return nil
		case err != nil:
			return err
		}
		c.Close()
		if time.Now().After(deadline) {
			return fmt.Errorf("%s still accepts connections", addr)
		}
	}
}

// timed is how long f takes.
func timed(f func() error) (time.Duration, error) {
	began := time.Now()
	err := f()
	return time.Since(began), err
}

// listening counts who of ports listens on 127.0.0.1, disturbing nobody: the
// kernel prints listeners before connections.
func listening(ports map[int]bool) (int, error) {
	f, err := os.Open("/proc/net/tcp")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	lines := bufio.NewScanner(bufio.NewReaderSize(f, 1<<18))
	lines.Scan()
	count := 0
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 4 || fields[3] != "0A" {
			break
		}
		ip, hex, _ := strings.Cut(fields[1], ":")
		if port, err := strconv.ParseUint(hex, 16, 16); err == nil && ip == "0100007F" && ports[int(port)] {
			count++
		}
	}
	return count, lines.Err()
}

// procStat returns state and parent of a process; no state when it is gone.
func procStat(pid int) (state string, parent int) {
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := strings.Cut(string(stat), ") ")
	fmt.Sscan(rest, &state, &parent)
	return
}

// living says whether a process has not ended, waited for or not.
func living(pid int) bool {
	state, _ := procStat(pid)
	return state != "" && state != "Z" && state != "X"
}

// descendants are the pids of what pid started, directly or not.
func descendants(pid int) []int {
	entries, _ := os.ReadDir("/proc")
	children := map[int][]int{}
	for _, e := range entries {
		p, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if _, parent := procStat(p); living(p) {
			children[parent] = append(children[parent], p)
		}
	}
	all := slices.Clone(children[pid])
	for i := 0; i < len(all); i++ {
		all = append(all, children[all[i]]...)
	}
	return all
}

// memory is what a process holds, in bytes.
type memory struct{ rss, pss, peak int }

func memoryOf(pid int) (m memory, err error) {
	for _, f := range []struct {
		file, field string
		into        *int
	}{{"status", "VmRSS:", &m.rss}, {"status", "VmHWM:", &m.peak}, {"smaps_rollup", "Pss:", &m.pss}} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, f.file))
		if err != nil {
			return m, err
		}
		_, rest, _ := strings.Cut(string(text), "\n"+f.field)
		fields := strings.Fields(rest)
		if len(fields) == 0 {
			return m, fmt.Errorf("/proc/%d/%s has no %s", pid, f.file, f.field)
		}
		kib, err := strconv.Atoi(fields[0])
		if err != nil {
			return m, err
		}
		*f.into = kib << 10
	}
	return m, nil
}

func mib(bytes int) string { return fmt.Sprintf("%.1f MiB", float64(bytes)/(1<<20)) }

// cpuOf is the CPU time of a process so far. Its clock has nanoseconds, where
// utime and stime in /proc have ticks of 10 ms.
func cpuOf(pid int) (time.Duration, error) {
	const schedClock = 2 // CPUCLOCK_SCHED of the kernel's posix-timers.h
	clock := int32(^pid<<3 | schedClock)
	var ts syscall.Timespec
	if _, _, errno := syscall.Syscall(syscall.SYS_CLOCK_GETTIME, uintptr(clock), uintptr(unsafe.Pointer(&ts)), 0); errno != 0 {
		return 0, fmt.Errorf("CPU time of process %d: %w", pid, errno)
	}
	return time.Duration(ts.Nano()), nil
}
