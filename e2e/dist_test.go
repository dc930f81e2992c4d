package e2e

// dist_test.go: what is installed and released: the version that builds of all kinds name, the archives, and what starts
// rdhpf at login.

import (
	"encoding/xml"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// clone is a checkout of HEAD, for what it is like where nothing has changed.
func clone(t *testing.T) (dir, commit string) {
	t.Helper()
	if testing.Short() {
		t.Skip("building takes long, and this is -short")
	}
	if _, err := os.Stat("../.git"); err != nil {
		t.Skip("this is no git checkout")
	}
	needTool(t, "git")
	needTool(t, "make")
	dir = filepath.Join(t.TempDir(), "clone")
	in(t, "..", "git", "-c", "safe.directory=*", "clone", "-q", "--no-tags", ".", dir)
	return dir, strings.TrimSpace(in(t, dir, "git", "rev-parse", "HEAD"))[:12]
}

// in runs a command in a directory and returns what it prints.
func in(t *testing.T, dir, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOFLAGS=-buildvcs=auto") // whatever this machine has set
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return string(out)
}

func TestVersion(t *testing.T) {
	dir, commit := clone(t)
	names := func(what, dir, want string, flags ...string) {
		t.Helper()
		in(t, dir, "go", append(append([]string{"build"}, flags...), "-o", "rdhpf", ".")...)
		if got := in(t, dir, "./rdhpf", "version"); got != "rdhpf "+want+" "+runtime.Version()+"\n" {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	archive := func() (tree string) {
		t.Helper()
		tree = t.TempDir()
		in(t, dir, "sh", "-c", `git archive HEAD | tar -x -C "$1"`, "sh", tree)
		return tree
	}
	devel, tagged := "devel ("+commit+")", "v1.2.3 ("+commit+")"
	names("git", dir, devel)
	names("archive", archive(), devel, "-buildvcs=false")
	in(t, dir, "git", "tag", "v1.2.3")
	names("git, tagged", dir, tagged)
	vendored := archive()
	in(t, vendored, "go", "mod", "vendor")
	names("archive, tagged and vendored", vendored, tagged, "-mod=vendor", "-buildvcs=false")
	if err := os.WriteFile(filepath.Join(dir, "LICENSE"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	names("git, changed", dir, "v1.2.3+dirty ("+commit+")")
	in(t, dir, "git", "-c", "user.name=x", "-c", "user.email=x@example.com", "commit", "-qam", "Test")
	commit = strings.TrimSpace(in(t, dir, "git", "rev-parse", "HEAD"))[:12]
	names("git, after a tag", dir, "devel ("+commit+")")
	names("archive, after a tag", archive(), "devel ("+commit+")")
}

// Two machines get the same archives; two builds, in different places, stand for them.
func TestDist(t *testing.T) {
	dir, commit := clone(t)
	needTool(t, "sha256sum")
	target := runtime.GOOS + "/" + runtime.GOARCH
	dist := func() (sums string) {
		t.Helper()
		in(t, dir, "make", "-s", "dist", "TARGETS="+target+" darwin/arm64")
		body, err := os.ReadFile(filepath.Join(dir, "dist", "SHA256SUMS"))
		if err != nil {
			t.Fatal(err)
		}
		return string(body)
	}
	first := dist()
	if second := dist(); first != second || strings.Count(first, "\n") != 2 {
		t.Errorf("the sums are\n%s and then\n%s", first, second)
	}
	name := "rdhpf-devel-" + commit + "-" + strings.ReplaceAll(target, "/", "-")
	in(t, dir, "tar", "-xf", "dist/"+name+".tar.gz")
	var files []string
	err := filepath.WalkDir(filepath.Join(dir, name), func(path string, e os.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			path, err = filepath.Rel(filepath.Join(dir, name), path)
			files = append(files, path)
		}
		return err
	})
	if want := []string{"LICENSE", "README.md", "contrib/rdhpf.plist", "contrib/rdhpf@.service", "rdhpf"}; err != nil || !slices.Equal(files, want) {
		t.Errorf("the archive has %q (%v), want %q", files, err, want)
	}
	if got := in(t, dir, name+"/rdhpf", "version"); !strings.Contains(got, commit) {
		t.Errorf("version says %q, want %s", got, commit)
	}
}

func TestInstall(t *testing.T) {
	dir, commit := clone(t)
	root := t.TempDir()
	in(t, dir, "make", "-s", "install", "PREFIX=/opt/x", "DESTDIR="+root)
	if got := in(t, root, "./opt/x/bin/rdhpf", "version"); !strings.Contains(got, commit) {
		t.Errorf("version says %q, want %s", got, commit)
	}
	unit, err := os.ReadFile(root + "/opt/x/share/systemd/user/rdhpf@.service")
	if err != nil || !strings.Contains(string(unit), "\nExecStart=/opt/x/bin/rdhpf run ") || strings.Contains(string(unit), "/usr/local") {
		t.Errorf("the unit is %v, %s", err, unit)
	}
	in(t, dir, "make", "-s", "uninstall", "PREFIX=/opt/x", "DESTDIR="+root)
	if left := in(t, root, "find", ".", "-type", "f"); left != "" {
		t.Errorf("uninstall leaves %s", left)
	}
}

// The names of units lead back to the host, and systemd has nothing to say against the unit.
func TestSystemdUnit(t *testing.T) {
	needTool(t, "systemd-analyze")
	needTool(t, "systemd-escape")
	unit, err := os.ReadFile("../contrib/rdhpf@.service")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", dir)
	t.Setenv("HOME", dir)
	for host, want := range map[string]string{
		"ssh://user@host": `rdhpf@ssh:--user\x40host.service`, "builder": "rdhpf@builder.service", "my-builder": `rdhpf@my\x2dbuilder.service`,
	} {
		name := strings.TrimSpace(in(t, dir, "systemd-escape", "--template=rdhpf@.service", host))
		if name != want {
			t.Errorf("%s is %s, want %s", host, name, want)
		}
		if back := strings.TrimSpace(in(t, dir, "systemd-escape", "--unescape", "--instance", name)); back != host {
			t.Errorf("%s is %s again", host, back)
		}
	}
	// rdhpf need not be installed, but something has to be.
	there := strings.ReplaceAll(string(unit), "/usr/local/bin/rdhpf", "/bin/sh")
	if err := os.WriteFile(filepath.Join(dir, "rdhpf@.service"), []byte(there), 0o644); err != nil {
		t.Fatal(err)
	}
	if complaint := in(t, dir, "systemd-analyze", "verify", "--user", "--man=no", "./rdhpf@.service"); complaint != "" {
		t.Error(complaint)
	}
}

func TestLaunchdAgent(t *testing.T) {
	f, err := os.Open("../contrib/rdhpf.plist")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var agent struct {
		XMLName xml.Name `xml:"plist"`
		Keys    []string `xml:"dict>key"`
		Args    []string `xml:"dict>array>string"`
	}
	d := xml.NewDecoder(f)
	if err := d.Decode(&agent); err != nil {
		t.Fatal(err)
	}
	if want := []string{"Label", "ProgramArguments", "RunAtLoad", "KeepAlive", "ThrottleInterval", "StandardErrorPath"}; !slices.Equal(agent.Keys, want) {
		t.Errorf("its keys are %q, want %q", agent.Keys, want)
	}
	if want := []string{"/usr/local/bin/rdhpf", "run", "-host=ssh://user@host"}; !slices.Equal(agent.Args, want) {
		t.Errorf("it runs %q, want %q", agent.Args, want)
	}
}
