package main

// Tests of the state file: what is made of a good, a bad and a hostile one, and that a reader never sees half of one,
// whatever happens to the disk. And of an instance's paths, of the folder they are in and of its lock. The lock is one of
// the process, so other holders are other processes: this test program, run as TestLockHelper.

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unicode"

	"golang.org/x/sys/unix"
)

// stateBody is a state file as rdhpf writes it.
func stateBody(t *testing.T, snap *snapshot) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "x.state.json")
	if err := writeState(path, snap); err != nil {
		t.Fatal(err)
	}
	body, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// oneLine fails where err is none, or no line that a terminal can be shown.
func oneLine(t *testing.T, err error) {
	t.Helper()
	if err == nil {
		t.Error("no error")
	} else if strings.ContainsFunc(err.Error(), unicode.IsControl) || len(err.Error()) > 1000 {
		t.Errorf("%q is not one plain line", err)
	}
}

func TestDecodeState(t *testing.T) {
	const fine = `"host": "ssh://h", "updated_at": "2025-11-27T15:30:45Z"`
	for _, c := range []struct{ name, in, warning, failure string }{
		{"least", `{"version": "1.0", ` + fine + `}`, "", ""},
		{"the seed's", `{"version": "1.0", ` + fine + `, "pid": 12345, "started_at": "2025-11-27T15:00:00Z", "forwards": [
			{"container_id": "abc123def456", "local_port": 8080, "remote_port": 8080, "status": "active", "reason": "",
			"created_at": "2025-11-27T15:01:23Z", "updated_at": "2025-11-27T15:01:24Z"}]}`, "", ""},
		{"unknown fields", `{"version": "1.0", ` + fine + `, "new": {"a": [1]}, "forwards": [{"local_port": 1, "newer": null}]}`, "", ""},
		{"null lists", `{"version": "1.0", ` + fine + `, "forwards": null, "skipped": null, "warnings": null}`, "", ""},
		{"no version", `{` + fine + `}`, "State file has no version; it may be misread.", ""},
		{"other version", `{"version": "2.0", ` + fine + `}`, `State file has version "2.0", but this rdhpf knows only "1.0"; it may be misread.`, ""},
		{"hostile version", `{"version": "9\u001b[31m\n", ` + fine + `}`, `State file has version "9[31m ", but this rdhpf`, ""},
		{"version that is no text", `{"version": 1, ` + fine + `}`, "", "version"},
		{"empty", ``, "", "incomplete or not a state file"},
		{"space", " \n", "", "incomplete or not a state file"},
		{"array", `[]`, "", "incomplete or not a state file"},
		{"text", `"x"`, "", "incomplete or not a state file"},
		{"number", `1`, "", "incomplete or not a state file"},
		{"null", `null`, "", "host or updated_at is missing"},
		{"empty object", `{}`, "", "host or updated_at is missing"},
		{"foreign object", `{"auths": {}}`, "", "host or updated_at is missing"},
		{"host that is no text", `{"host": 1}`, "", "host"},
		{"host of nothing printable", `{"host": "\u001b\u200b", "updated_at": "2025-11-27T15:30:45Z"}`, "", "host or updated_at is missing"},
		{"no host", `{"updated_at": "2025-11-27T15:30:45Z"}`, "", "host or updated_at is missing"},
		{"no updated_at", `{"host": "ssh://h"}`, "", "host or updated_at is missing"},
		{"updated_at that is no time", `{"host": "ssh://h", "updated_at": "yesterday"}`, "", "incomplete or not a state file"},
		{"updated_at of the year 10000", `{"host": "ssh://h", "updated_at": "10000-01-01T00:00:00Z"}`, "", "incomplete or not a state file"},
		{"port out of range", `{"version": "1.0", ` + fine + `, "forwards": [{"local_port": 70000}]}`, "", "local_port"},
		{"port below 0", `{"version": "1.0", ` + fine + `, "forwards": [{"local_port": -1}]}`, "", "local_port"},
		{"forwards that are none", `{"version": "1.0", ` + fine + `, "forwards": {}}`, "", "forwards"},
		{"two", `{"version": "1.0", ` + fine + `}{}`, "", "after top-level value"},
		{"binary", "\x00\xff\x1b[31m", "", "incomplete or not a state file"},
		{"deep", strings.Repeat("[", 100000), "", "incomplete or not a state file"},
	} {
		snap, warning, err := decodeState([]byte(c.in))
		if c.failure != "" {
			oneLine(t, err)
			if err != nil && !strings.Contains(err.Error(), c.failure) || snap != nil || warning != "" {
				t.Errorf("%s: %v, %q, %v; want an error with %q", c.name, snap, warning, err, c.failure)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if !strings.HasPrefix(warning, c.warning) || c.warning == "" && warning != "" {
			t.Errorf("%s: warning %q, want %q", c.name, warning, c.warning)
		}
		if snap.Forwards == nil || snap.Skipped == nil || snap.Warnings == nil {
			t.Errorf("%s: a list is nil", c.name)
		}
		for _, f := range snap.Forwards {
			if f.LocalAddress != "127.0.0.1" || f.RemoteAddress != "127.0.0.1" {
				t.Errorf("%s: the addresses of a forward without are %q and %q", c.name, f.LocalAddress, f.RemoteAddress)
			}
		}
	}
}

// A file that was cut off anywhere is told as such: never a part of the truth.
func TestTornState(t *testing.T) {
	body := stateBody(t, tableSnapshot())
	path := filepath.Join(t.TempDir(), "x.state.json")
	whole := len(bytes.TrimRight(body, "\n"))
	for n := 0; n <= len(body); n++ {
		snap, warning, err := decodeState(body[:n])
		if n >= whole {
			if err != nil || warning != "" || len(snap.Forwards) != 3 {
				t.Errorf("all but %d bytes: %v, %q, %v", len(body)-n, snap, warning, err)
			}
			continue
		}
		oneLine(t, err)
		if snap != nil || err == nil {
			t.Fatalf("%d bytes of %d: %v, %v", n, len(body), snap, err)
		}
		if n%100 != 0 {
			continue
		}
		if err := os.WriteFile(path, body[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		snap, _, err = readState(path)
		oneLine(t, err)
		if snap != nil || err == nil || !strings.Contains(err.Error(), path) {
			t.Fatalf("a file of %d bytes of %d: %v, %v", n, len(body), snap, err)
		}
	}
	// Torn the other way: zeros where a crash lost the data.
	for n := 0; n < whole; n++ {
		lost := append(bytes.Clone(body[:n]), make([]byte, len(body)-n)...)
		if snap, _, err := decodeState(lost); err == nil {
			t.Fatalf("zeros from byte %d: %v", n, snap)
		}
	}
}

func TestReadState(t *testing.T) {
	body := stateBody(t, tableSnapshot())
	for _, c := range []struct {
		name string
		make func(path string) error
		want string // "" = it can be read
	}{
		{"good", func(p string) error { return os.WriteFile(p, body, 0o600) }, ""},
		{"empty", func(p string) error { return os.WriteFile(p, nil, 0o600) }, "it is empty"},
		{"foreign", func(p string) error { return os.WriteFile(p, []byte("[]"), 0o600) }, "not a state file"},
		{"symlink", func(p string) error {
			if err := os.WriteFile(p+".target", body, 0o600); err != nil {
				return err
			}
			return os.Symlink(p+".target", p)
		}, "symbolic links"},
		{"directory", func(p string) error { return os.Mkdir(p, 0o700) }, "not a regular file that belongs to you"},
		{"fifo", func(p string) error { return unix.Mkfifo(p, 0o600) }, "not a regular file that belongs to you"},
		{"too long", func(p string) error {
			if err := os.WriteFile(p, body, 0o600); err != nil {
				return err
			}
			return os.Truncate(p, maxStateFile+1) // a hole
		}, strconv.Itoa(maxStateFile)},
		{"somebody else's", func(p string) error {
			if os.Geteuid() != 0 {
				return errors.ErrUnsupported
			}
			if err := os.WriteFile(p, body, 0o644); err != nil {
				return err
			}
			return os.Chown(p, 12345, 12345)
		}, "not a regular file that belongs to you"},
		{"unreadable", func(p string) error {
			if os.Geteuid() == 0 {
				return errors.ErrUnsupported
			}
			return os.WriteFile(p, body, 0)
		}, "permission denied"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "x.state.json")
			if err := c.make(path); errors.Is(err, errors.ErrUnsupported) {
				t.Skip("needs another user")
			} else if err != nil {
				t.Fatal(err)
			}
			type result struct {
				snap *snapshot
				err  error
			}
			done := make(chan result, 1)
			go func() {
				snap, _, err := readState(path)
				done <- result{snap, err}
			}()
			var r result
			select {
			case r = <-done:
			case <-time.After(patience):
				t.Fatal("it hangs")
			}
			if c.want == "" {
				if r.err != nil || string(mustJSON(r.snap)) != string(mustJSON(tableSnapshot())) {
					t.Errorf("got %s, %v", mustJSON(r.snap), r.err)
				}
				return
			}
			oneLine(t, r.err)
			if r.snap != nil || r.err == nil || !strings.Contains(r.err.Error(), c.want) || !strings.Contains(r.err.Error(), path) {
				t.Errorf("got %v, %v", r.snap, r.err)
			}
		})
	}
	if _, _, err := readState(filepath.Join(t.TempDir(), "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

func TestAge(t *testing.T) {
	now := time.Now()
	for _, c := range []struct {
		at   time.Time
		old  time.Duration
		text string
	}{
		{now, 0, "fresh"},
		{now.Add(-10 * time.Second), 10 * time.Second, "fresh"},
		{now.Add(-10*time.Second - 1), 10*time.Second + 1, "stale"},
		{now.Add(-45 * time.Second), 45 * time.Second, "stale"},
		{now.Add(time.Second), -time.Second, "fresh"}, // clocks are read twice
		{now.Add(time.Second + 1), -time.Second - 1, "stale"},
		{time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC), -1 << 63, "stale"},
		{time.Date(1, 1, 1, 0, 0, 0, 1, time.UTC), 1<<63 - 1, "stale"},
	} {
		old, fresh := age(utc(c.at), now)
		if old != c.old || fresh != (c.text == "fresh") {
			t.Errorf("%v at %v: %v, fresh %v; want %v, %s", c.at, now, old, fresh, c.old, c.text)
		}
	}
}

// What rdhpf status says of a state file's age, in the seed's words.
func TestReadReport(t *testing.T) {
	const ended = "No rdhpf is running for this host: process 12345 has ended; this is what it wrote last."
	h := host{user: "user", name: "host"}
	for _, c := range []struct {
		name     string
		updated  time.Duration // before now
		running  bool
		stale    bool
		warnings []string
	}{
		{"fresh", 2 * time.Second, true, false, nil},
		{"old, of a live one", 45 * time.Second, true, true, nil},
		{"45 s", 45 * time.Second, false, true, []string{"State file is 45s old. rdhpf may not be running.", ended}},
		{"days", 53 * time.Hour, false, true, []string{"State file is 2d5h old. rdhpf may not be running.", ended}},
		{"future", -time.Hour, false, true, []string{"State file is from the future. rdhpf may not be running.", ended}},
		{"fresh, of a dead one", time.Second, false, true, []string{ended}},
		{"absurd", 0, false, true, []string{"State file is 106751d23h old. rdhpf may not be running.", ended}},
	} {
		path := pathsFor(t.TempDir(), h.String()).state
		snap := tableSnapshot()
		snap.UpdatedAt = tableNow.Add(-c.updated)
		if c.name == "absurd" {
			snap.UpdatedAt = time.Date(2, 1, 1, 0, 0, 0, 0, time.UTC)
		}
		if err := writeState(path, snap); err != nil {
			t.Fatal(err)
		}
		r, err := readReport(path, c.running, tableNow)
		if err != nil || r == nil {
			t.Fatalf("%s: %v, %v", c.name, r, err)
		}
		if strings.Join(r.warnings, "\n") != strings.Join(c.warnings, "\n") || r.Stale != c.stale {
			t.Errorf("%s: stale %v, %q; want %v, %q", c.name, r.Stale, r.warnings, c.stale, c.warnings)
		}
	}
}

func FuzzStateFile(f *testing.F) {
	f.Add(mustJSON(tableSnapshot()))
	f.Add(mustJSON(&report{snapshot: hostileSnapshot()}))
	f.Add([]byte(`{"host":"a","updated_at":"0001-01-01T00:00:00.5-23:59","forwards":[{"created_at":"9999-12-31T23:59:59-23:59"}],"last_event_at":null}`))
	f.Add([]byte("{\"host\":\"\xa9\",\"updated_at\":\"0000-01-01T00:00:00Z\"}"))
	f.Add([]byte(`{"host":1}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, body []byte) {
		snap, warning, err := decodeState(body)
		if err != nil {
			oneLine(t, err)
			return
		}
		if snap.Forwards == nil || snap.Skipped == nil || snap.Warnings == nil {
			t.Error("a list is nil")
		}
		r := &report{snapshot: snap, Source: "file"}
		var b bytes.Buffer
		fmt.Fprintln(&b, warning)
		b.WriteString(table(r, tableNow, tableStyle{wide: true}))
		h := snap.health(tableNow)
		printHealth(&b, &h, tableNow)
		for _, c := range b.String() {
			if c != '\n' && !unicode.IsPrint(c) {
				t.Errorf("%q is printed", c)
			}
		}
		again, _, err := decodeState(mustJSON(r))
		if err != nil || string(mustJSON(again)) != string(mustJSON(snap)) {
			t.Errorf("what was read cannot be written and read again: %v", err)
		}
	})
}

// numbered is a snapshot that says n all over, so that a mix of two shows.
func numbered(n int) *snapshot {
	snap := tableSnapshot()
	snap.PID, snap.Engine = n, strings.Repeat(strconv.Itoa(n)+" ", 100)
	for i := range snap.Forwards {
		snap.Forwards[i].Reason = strconv.Itoa(n)
	}
	return snap
}

// numberOf returns what a numbered snapshot says.
func numberOf(snap *snapshot) (int, error) {
	n := snap.PID
	want := numbered(n)
	if snap.Engine != want.Engine || !reflect.DeepEqual(snap.Forwards, want.Forwards) {
		return 0, fmt.Errorf("it is no state that was ever posted: %s", mustJSON(snap))
	}
	return n, nil
}

// keeper runs keepState.
type keeper struct {
	board   *board
	path    string
	stop    func() // and wait
	trouble chan error
	temps   atomic.Int64 // times that trouble came with a temporary file left
}

func keep(t *testing.T, dir string, snap *snapshot) *keeper {
	t.Helper()
	k := &keeper{board: newBoard(snap), path: filepath.Join(dir, "x.state.json"), trouble: make(chan error, 100)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		keepState(ctx, k.path, k.board, func(err error) {
			if _, missing := os.Lstat(k.path + ".tmp"); missing == nil {
				k.temps.Add(1)
			}
			k.trouble <- err
		})
	}()
	k.stop = sync.OnceFunc(func() {
		cancel()
		<-done
	})
	t.Cleanup(k.stop)
	eventually(t, "the state file is written", func() error {
		_, _, err := readState(k.path)
		return err
	})
	return k
}

func (k *keeper) read(t *testing.T) *snapshot {
	t.Helper()
	snap, warning, err := readState(k.path)
	if err != nil || warning != "" {
		t.Fatalf("%q, %v", warning, err)
	}
	return snap
}

func TestKeepState(t *testing.T) {
	t.Run("private, fresh, removed", func(t *testing.T) {
		k := keep(t, t.TempDir(), numbered(1))
		info, err := os.Lstat(k.path)
		if err != nil || info.Mode() != 0o600 {
			t.Errorf("mode is %v, %v", info.Mode(), err)
		}
		first := k.read(t).UpdatedAt
		eventually(t, "it is written again though nothing changes", func() error {
			snap := k.read(t)
			if n, err := numberOf(snap); err != nil || n != 1 {
				return fmt.Errorf("it says %d, %v", n, err)
			}
			if !snap.UpdatedAt.After(first.Add(beatEvery)) {
				return errors.New("it is not")
			}
			return nil
		})
		if d := k.read(t).UpdatedAt.Sub(first); d > maxStateAge {
			t.Errorf("it was not written for %v", d)
		}
		k.stop()
		if left, err := os.ReadDir(filepath.Dir(k.path)); err != nil || len(left) > 0 {
			t.Errorf("left at the end: %v, %v", left, err)
		}
		if len(k.trouble) > 0 {
			t.Errorf("trouble: %v", <-k.trouble)
		}
	})
	t.Run("nobody's business", func(t *testing.T) {
		old := syscall.Umask(0)
		defer syscall.Umask(old)
		k := keep(t, t.TempDir(), numbered(1))
		if info, err := os.Lstat(k.path); err != nil || info.Mode() != 0o600 {
			t.Errorf("with no umask its mode is %v, %v", info.Mode(), err)
		}
	})
	t.Run("changes", func(t *testing.T) {
		k := keep(t, t.TempDir(), numbered(0))
		writes, last := 0, k.read(t).UpdatedAt
		look := func() int {
			snap := k.read(t)
			if !snap.UpdatedAt.Equal(last) {
				writes, last = writes+1, snap.UpdatedAt
			}
			n, err := numberOf(snap)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		start := time.Now()
		for n := 1; n <= 300; n++ {
			k.board.post(numbered(n))
			look()
			time.Sleep(time.Millisecond)
		}
		eventually(t, "the last change is in the file", func() error {
			if n := look(); n != 300 {
				return fmt.Errorf("it has %d", n)
			}
			return nil
		})
		// One a writeTogether; the first change waits for nobody.
		took := time.Since(start)
		if most := int(took/writeTogether) + 2; writes > most {
			t.Errorf("300 changes in %v made %d writes, want %d at most", took, writes, most)
		}
	})
}

// The readers see a whole state each time, and never an older one than before.
func TestStateFileReaders(t *testing.T) {
	reads := 100_000
	if testing.Short() {
		reads = 5_000
	}
	const readers = 4
	read := func(t *testing.T, path string) {
		var wg sync.WaitGroup
		for range readers {
			wg.Add(1)
			go func() {
				defer wg.Done()
				last, seen := 0, []byte(nil)
				for range reads / readers / 2 {
					body, err := os.ReadFile(path)
					if err != nil {
						t.Error(err)
						return
					}
					if bytes.Equal(body, seen) {
						continue
					}
					seen = body
					snap, _, err := decodeState(body)
					if err != nil {
						t.Errorf("%v: %q", err, body)
						return
					}
					n, err := numberOf(snap)
					if err != nil || n < last {
						t.Errorf("%d after %d, %v", n, last, err)
						return
					}
					last = n
				}
			}()
		}
		wg.Wait()
	}
	t.Run("posted without a pause", func(t *testing.T) {
		k := keep(t, t.TempDir(), numbered(1))
		end := make(chan struct{})
		var posts sync.WaitGroup
		posts.Add(1)
		go func() {
			defer posts.Done()
			for n := 2; ; n++ {
				select {
				case <-end:
					return
				default:
					k.board.post(numbered(n))
				}
			}
		}()
		read(t, k.path)
		close(end)
		posts.Wait()
	})
	t.Run("written without a pause", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "x.state.json")
		if err := writeState(path, numbered(1)); err != nil {
			t.Fatal(err)
		}
		end := make(chan struct{})
		var writes sync.WaitGroup
		writes.Add(1)
		go func() {
			defer writes.Done()
			for n := 2; ; n++ {
				select {
				case <-end:
					return
				default:
					if err := writeState(path, numbered(n)); err != nil {
						t.Error(err)
						return
					}
				}
			}
		}()
		read(t, path)
		close(end)
		writes.Wait()
	})
}

// smallDisk mounts a file system of 64 KiB until the end of the test.
func smallDisk(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "rdhpf-test", dir).CombinedOutput(); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("mount: %v: %s", err, out)
		}
		t.Skipf("it takes a tmpfs of its own: mount: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", "-l", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	return dir
}

func TestStateDiskTrouble(t *testing.T) {
	remount := func(t *testing.T, dir, how string) {
		t.Helper()
		// It is refused for the moment in which the file is being written.
		eventually(t, "remount "+how, func() error {
			if out, err := exec.Command("mount", "-o", "remount,"+how, dir).CombinedOutput(); err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
	}
	for _, c := range []struct {
		name       string
		want       error
		spoil, fix func(t *testing.T, dir string)
	}{
		{"full", syscall.ENOSPC, func(t *testing.T, dir string) {
			f, err := os.Create(filepath.Join(dir, "filler"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := io.Copy(f, zeros{}); !errors.Is(err, syscall.ENOSPC) {
				t.Fatalf("filling the disk: %v", err)
			}
		}, func(t *testing.T, dir string) {
			if err := os.Remove(filepath.Join(dir, "filler")); err != nil {
				t.Fatal(err)
			}
		}},
		{"read-only", syscall.EROFS,
			func(t *testing.T, dir string) { remount(t, dir, "ro") },
			func(t *testing.T, dir string) { remount(t, dir, "rw") }},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := smallDisk(t)
			k := keep(t, dir, numbered(1))
			c.spoil(t, dir)
			k.board.post(numbered(2))
			select {
			case err := <-k.trouble:
				if !errors.Is(err, c.want) {
					t.Fatalf("trouble: %v, want %v", err, c.want)
				}
			case <-time.After(patience):
				t.Fatal("nobody is told")
			}
			for n := 3; n < 100; n++ {
				k.board.post(numbered(n))
				if n, err := numberOf(k.read(t)); err != nil || n > 2 {
					t.Fatalf("meanwhile the file says %d, %v", n, err)
				}
				time.Sleep(time.Millisecond)
			}
			c.fix(t, dir)
			select {
			case err := <-k.trouble:
				if err != nil {
					t.Fatalf("told twice: %v", err)
				}
			case <-time.After(patience):
				t.Fatal("it does not heal")
			}
			eventually(t, "the file has the last state", func() error {
				if n, err := numberOf(k.read(t)); err != nil || n != 99 {
					return fmt.Errorf("it says %d, %v", n, err)
				}
				return nil
			})
			k.stop()
			if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
				t.Errorf("left at the end: %v, %v", left, err)
			}
			if len(k.trouble) > 0 || k.temps.Load() > 0 {
				t.Errorf("%d more calls, %d with a temporary file left", len(k.trouble), k.temps.Load())
			}
		})
	}
}

// zeros never ends.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func TestHostHash(t *testing.T) {
	name := regexp.MustCompile(`^[A-Za-z0-9_-]{12}$`)
	seen := make(map[string]string)
	unsafe := 0
	for i := 0; i < 500; i++ {
		host := fmt.Sprintf("ssh://user@host%d.example.com", i)
		h := hostHash(host)
		if !name.MatchString(h) {
			t.Errorf("hostHash(%q) = %q, no file name of 12 characters", host, h)
		}
		if h != hostHash(host) || seen[h] != "" {
			t.Errorf("hostHash(%q) = %q, also that of %q", host, h, seen[h])
		}
		seen[h] = host
		if strings.ContainsAny(h, "-_") {
			unsafe++ // these would have + or / in the standard alphabet
		}
	}
	if unsafe == 0 {
		t.Error("no hash shows which alphabet it is in")
	}
	// echo -n ssh://user@example.com | openssl dgst -sha256 -binary | basenc --base64url | cut -c 1-12
	if got, want := hostHash("ssh://user@example.com"), "WHhNu7djKMsZ"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestStateDir(t *testing.T) {
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ env, home, want string }{
		{"", "/home/me", "/home/me/.rdhpf"},
		{"/run/x", "/home/me", "/run/x"},
		{"/run/x", "", "/run/x"},
		{"/run//x/../y/", "", "/run/y"},
		{"rel", "/home/me", filepath.Join(here, "rel")},
		{"", "", ""},
	} {
		got, err := stateDir(func(name string) string { return map[string]string{"RDHPF_DIR": c.env}[name] }, c.home)
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("RDHPF_DIR=%q, home %q: %q, %v, want %q", c.env, c.home, got, err, c.want)
		}
		if err != nil && !strings.Contains(err.Error(), "RDHPF_DIR") {
			t.Errorf("%v: no way out", err)
		}
	}
}

func TestPaths(t *testing.T) {
	p := pathsFor("/d", "ssh://h")
	base := "/d/" + hostHash("ssh://h")
	if p.dir != "/d" || p.lock != base+".lock" || p.state != base+".state.json" || p.socket != base+".sock" ||
		filepath.Dir(p.control) != "/d" || !strings.HasPrefix(p.control, base) {
		t.Errorf("%+v", p)
	}
	seen := make(map[string]bool)
	for _, f := range []string{p.lock, p.state, p.socket, p.control, p.docker, p.engine, p.log} {
		if seen[f] {
			t.Errorf("%s twice", f)
		}
		seen[f] = true
	}
	if q := pathsFor("/d", "ssh://other"); q.lock == p.lock || q.control == p.control {
		t.Error("two hosts share files")
	}
	// ssh_config(5) reads % and, where it is quoted at all, spaces; a hash has neither.
	if strings.ContainsAny(p.control, "% \"") {
		t.Errorf("control path %q", p.control)
	}
}

func TestPathsCheck(t *testing.T) {
	control, socket := 90, 107 // bytes
	if runtime.GOOS != "linux" {
		control, socket = 86, 103
	}
	rest := len(pathsFor("/d", "ssh://h").control) - len("d")
	long := func(control int) paths { return pathsFor("/"+strings.Repeat("d", control-rest), "ssh://h") }
	if n := len(long(control).control); n != control {
		t.Fatalf("test is wrong: %d bytes, want %d", n, control)
	}
	if err := long(control).check(); err != nil {
		t.Errorf("%d bytes: %v", control, err)
	}
	p := long(control + 1)
	err := p.check()
	if err == nil {
		t.Fatalf("%d bytes: no error", control+1)
	}
	for _, want := range []string{p.control, strconv.Itoa(control + 1), strconv.Itoa(control), "RDHPF_DIR"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not say %s", err, want)
		}
	}
	p = pathsFor("/d", "ssh://h")
	p.docker = "/" + strings.Repeat("s", socket)
	if err := p.check(); err == nil || !strings.Contains(err.Error(), p.docker) {
		t.Errorf("socket of %d bytes: %v", socket+1, err)
	}
}

func TestMakeDir(t *testing.T) {
	made := func(mode os.FileMode) func(string) error {
		return func(path string) error { return errors.Join(os.Mkdir(path, 0o700), os.Chmod(path, mode)) }
	}
	for _, c := range []struct {
		name string
		prep func(path string) error
		want string // a part of the error; "": none
	}{
		{"missing", func(string) error { return nil }, ""},
		{"there", made(0o700), ""},
		{"read-only", made(0o500), ""},
		{"open to all", made(0o777), "chmod 700"},
		{"open to the group", made(0o750), "chmod 700"},
		{"others may pass", made(0o701), "chmod 700"},
		{"sticky and open", made(0o777 | os.ModeSticky), "chmod 700"},
		{"a symlink to a good one", func(path string) error {
			return errors.Join(os.Mkdir(path+".real", 0o700), os.Symlink(path+".real", path))
		}, "symbolic link"},
		{"a symlink to nothing", func(path string) error { return os.Symlink(path+".none", path) }, path_},
		{"a symlink to itself", func(path string) error { return os.Symlink(path, path) }, path_},
		{"a file", func(path string) error { return os.WriteFile(path, nil, 0o600) }, path_},
		{"below a file", func(path string) error {
			return errors.Join(os.Remove(filepath.Dir(path)), os.WriteFile(filepath.Dir(path), nil, 0o600))
		}, "RDHPF_DIR"},
	} {
		t.Run(c.name, func(t *testing.T) {
			old := syscall.Umask(0)
			defer syscall.Umask(old)
			path := filepath.Join(t.TempDir(), "a", "state")
			if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := c.prep(path); err != nil {
				t.Fatal(err)
			}
			want := strings.ReplaceAll(c.want, path_, path)
			err := makeDir(path)
			if want != "" {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("error %v, want one with %q", err, want)
				}
				if err != nil && !strings.Contains(err.Error(), "RDHPF_DIR") && !strings.Contains(err.Error(), "chmod") {
					t.Errorf("%v: no way out", err)
				}
				return
			}
			info, statErr := os.Lstat(path)
			if err != nil || statErr != nil || info.Mode().Perm()&0o077 != 0 {
				t.Errorf("%v, %v, %v", err, statErr, info)
			}
		})
	}
}

const path_ = "PATH" // stands for the path of the test's folder

func TestMakeDirParents(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a", "b", "c")
	if err := makeDir(path); err != nil {
		t.Fatal(err)
	}
	if err := makeDir(path); err != nil {
		t.Errorf("the second time: %v", err)
	}
}

func TestCheckDirForeign(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		if err := os.Chown(path, 65534, -1); err != nil {
			t.Fatal(err)
		}
	} else {
		path = "/" // root's, for one
	}
	if err := checkDir(path); err == nil || !strings.Contains(err.Error(), "belongs to uid") || !strings.Contains(err.Error(), "RDHPF_DIR") {
		t.Errorf("error %v, want one that says whose it is", err)
	}
	if err := checkDir(filepath.Join(path, "missing")); err == nil {
		t.Error("no error for what is missing")
	}
}

const lockHelperEnv = "RDHPF_TEST_LOCK"

// TestLockHelper is the other process: it takes the lock, says so and keeps it
// until its stdin ends; or it says why not.
func TestLockHelper(t *testing.T) {
	path := os.Getenv(lockHelperEnv)
	if path == "" {
		t.Skip("only of use to other tests")
	}
	f, err := lockInstance(path)
	var held *heldError
	switch {
	case errors.As(err, &held):
		fmt.Printf("\nlock: held by %d: %v\n", held.pid, err)
	case err != nil:
		fmt.Printf("\nlock: error: %v\n", err)
	default:
		fmt.Printf("\nlock: got\n")
		io.Copy(io.Discard, os.Stdin)
		runtime.KeepAlive(f)
	}
}

// locker is a running TestLockHelper.
type locker struct {
	cmd   *exec.Cmd
	stdin io.Closer
	out   *bufio.Scanner
}

func startLocker(t *testing.T, path string) *locker {
	t.Helper()
	l := &locker{cmd: exec.Command(os.Args[0], "-test.run=^TestLockHelper$", "-test.count=1")}
	l.cmd.Env = append(os.Environ(), lockHelperEnv+"="+path, "GORACE=atexit_sleep_ms=0")
	stdin, err := l.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := l.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	l.stdin, l.out = stdin, bufio.NewScanner(stdout)
	if err := l.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.kill() })
	return l
}

// says returns what the helper says of the lock.
func (l *locker) says(t *testing.T) string {
	t.Helper()
	timer := time.AfterFunc(time.Minute, func() { l.cmd.Process.Kill() })
	defer timer.Stop()
	for l.out.Scan() {
		if s, ok := strings.CutPrefix(l.out.Text(), "lock: "); ok {
			return s
		}
	}
	t.Fatalf("the helper said nothing: %v", l.out.Err())
	return ""
}

func (l *locker) pid() int { return l.cmd.Process.Pid }

func (l *locker) kill() {
	l.cmd.Process.Kill()
	l.cmd.Wait()
}

// end has it end by itself.
func (l *locker) end() {
	l.stdin.Close()
	l.cmd.Wait()
}

func TestLockInstance(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.lock")
	first := startLocker(t, path)
	if s := first.says(t); s != "got" {
		t.Fatalf("first: %s", s)
	}
	before, err := os.Lstat(path)
	if err != nil || before.Mode().Perm() != 0o600 {
		t.Fatalf("lock file: %v, %v", before, err)
	}
	want := fmt.Sprintf("held by %d: ", first.pid())
	for i := 0; i < 2; i++ { // the first loser must not have released it
		if s := startLocker(t, path).says(t); !strings.HasPrefix(s, want) || !strings.Contains(s, "another rdhpf is running") {
			t.Fatalf("the loser says %q, want %q…", s, want)
		}
	}
	// This process is a loser as well.
	_, err = lockInstance(path)
	var held *heldError
	if !errors.As(err, &held) || held.pid != first.pid() || !strings.Contains(err.Error(), strconv.Itoa(first.pid())) {
		t.Errorf("error %v, want one that names pid %d", err, first.pid())
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if pid, is, err := lockHolder(f); pid != first.pid() || !is || err != nil {
		t.Errorf("lockHolder: %d, %v, %v, want %d", pid, is, err, first.pid())
	}
	after, err := os.Lstat(path)
	if err != nil || !os.SameFile(before, after) || !after.ModTime().Equal(before.ModTime()) || after.Size() != before.Size() {
		t.Errorf("the losers touched the file: %v, then %v, %v", before, after, err)
	}
	// Killed, it is free when the process is gone; the file stays.
	first.kill()
	if pid, is, err := lockHolder(f); is || err != nil {
		t.Errorf("lockHolder after kill: %d, %v, %v", pid, is, err)
	}
	f.Close()
	second := startLocker(t, path)
	if s := second.says(t); s != "got" {
		t.Fatalf("after kill -9: %s", s)
	}
	second.end()
	after, err = os.Lstat(path)
	if err != nil || !os.SameFile(before, after) {
		t.Errorf("the lock file was replaced or removed: %v", err)
	}
	mine, err := lockInstance(path)
	if err != nil {
		t.Fatalf("after its end: %v", err)
	}
	if s := startLocker(t, path).says(t); !strings.HasPrefix(s, fmt.Sprintf("held by %d: ", os.Getpid())) {
		t.Errorf("the loser says %q, want pid %d", s, os.Getpid())
	}
	mine.Close()
	if s := startLocker(t, path).says(t); s != "got" {
		t.Errorf("after Close: %s", s)
	}
}

// To ask who holds the lock does not release it, not even where the holder asks: closing any descriptor of the file would.
func TestLockedBy(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.lock")
	is := func(what string, pid int, held bool) {
		t.Helper()
		if gotPID, got, err := lockedBy(path); gotPID != pid || got != held || err != nil {
			t.Errorf("%s: %d, %v, %v, want %d, %v", what, gotPID, got, err, pid, held)
		}
	}
	is("no file", 0, false)
	mine, err := lockInstance(path)
	if err != nil {
		t.Fatal(err)
	}
	defer mine.Close()
	want := fmt.Sprintf("held by %d: ", os.Getpid())
	for range 2 {
		is("held here", os.Getpid(), true)
		if s := startLocker(t, path).says(t); !strings.HasPrefix(s, want) {
			t.Fatalf("after the holder has asked, another process says %q, want %q…", s, want)
		}
	}
	mine.Close()
	is("released", 0, false)
	other := startLocker(t, path)
	if s := other.says(t); s != "got" {
		t.Fatal(s)
	}
	is("held elsewhere", other.pid(), true)
	other.end()
	is("free again", 0, false)
}

// Of those started together exactly one wins, and the others name it.
func TestLockTogether(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.lock")
	for round := 0; round < 5; round++ {
		var all []*locker
		for i := 0; i < 4; i++ {
			all = append(all, startLocker(t, path))
		}
		winner, losers := 0, []string{}
		for _, l := range all {
			if s := l.says(t); s != "got" {
				losers = append(losers, s)
			} else if winner != 0 {
				t.Fatalf("pids %d and %d both have the lock", winner, l.pid())
			} else {
				winner = l.pid()
			}
		}
		for _, s := range losers {
			if !strings.HasPrefix(s, fmt.Sprintf("held by %d: ", winner)) {
				t.Errorf("a loser says %q, the winner is %d", s, winner)
			}
		}
		for _, l := range all {
			l.end()
		}
	}
}

func TestLockRefuses(t *testing.T) {
	for _, c := range []struct {
		name string
		prep func(path string) error
	}{
		{"a symlink", func(path string) error {
			return errors.Join(os.WriteFile(path+".real", nil, 0o600), os.Symlink(path+".real", path))
		}},
		{"a symlink to nothing", func(path string) error { return os.Symlink(path+".none", path) }},
		{"a directory", func(path string) error { return os.Mkdir(path, 0o700) }},
		{"no directory to be in", func(path string) error { return os.Remove(filepath.Dir(path)) }},
	} {
		path := filepath.Join(t.TempDir(), "d", "x.lock")
		if err := errors.Join(os.Mkdir(filepath.Dir(path), 0o700), c.prep(path)); err != nil {
			t.Fatal(err)
		}
		f, err := lockInstance(path)
		var held *heldError
		if err == nil || errors.As(err, &held) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: error %v, want one that names the path", c.name, err)
		}
		if f != nil {
			f.Close()
		}
		if _, err := os.Lstat(path + ".none"); err == nil {
			t.Errorf("%s: a file was made through it", c.name)
		}
	}
}

func TestHeldError(t *testing.T) {
	const ways = " (rdhpf status shows what it is doing, rdhpf stop stops it)"
	for pid, want := range map[int]string{4242: "another rdhpf is running for this host: pid 4242" + ways,
		0: "another rdhpf is running for this host" + ways, -1: "another rdhpf is running for this host" + ways} {
		if got := (&heldError{pid}).Error(); got != want {
			t.Errorf("pid %d: %q, want %q", pid, got, want)
		}
	}
}

func TestSweepDir(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	make := func(host string, age time.Duration) paths {
		p := pathsFor(dir, host)
		for _, path := range []string{p.lock, p.state, p.log, p.log + ".1"} {
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chtimes(path, now.Add(-age), now.Add(-age)); err != nil {
				t.Fatal(err)
			}
		}
		return p
	}
	gone, recent, used, held := make("ssh://gone", goneAfter+time.Hour), make("ssh://recent", time.Hour), make("ssh://used", goneAfter+time.Hour), make("ssh://held", goneAfter+time.Hour)
	if err := os.Chtimes(used.state, now, now); err != nil {
		t.Fatal(err)
	}
	if l := startLocker(t, held.lock); l.says(t) != "got" {
		t.Fatal("the lock was not taken")
	}
	sweepDir(dir, now)
	for _, c := range []struct {
		p    paths
		left bool
	}{{gone, false}, {recent, true}, {used, true}, {held, true}} {
		for _, path := range []string{c.p.lock, c.p.state, c.p.log, c.p.log + ".1"} {
			if _, err := os.Lstat(path); (err == nil) != c.left {
				t.Errorf("%s: %v, want it left: %v", path, err, c.left)
			}
		}
	}
}
