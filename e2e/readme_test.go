//go:build linux

package e2e

// readme_test.go: every command of the README, run on the rig in the README's order, and
// what the transcripts show compared with what is printed.

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// readmeCommand is a command with what the README shows of its output.
type readmeCommand struct{ section, line, output string }

// readmeCommands returns the commands of all blocks. Those of a transcript have a $.
func readmeCommands(t *testing.T) (all []readmeCommand) {
	t.Helper()
	body, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	section, language := "", ""
	add := func(line string) { all = append(all, readmeCommand{section: section, line: line}) }
	for line := range strings.Lines(string(body)) {
		line = strings.TrimSuffix(line, "\n")
		if name, ok := strings.CutPrefix(line, "```"); ok {
			language = name
			continue
		}
		switch command, ok := strings.CutPrefix(line, "$ "); {
		case language == "" && strings.HasPrefix(line, "## "):
			section = line[3:]
		case language == "sh" && line != "":
			add(line)
		case language == "console" && ok:
			add(command)
		case language == "console":
			all[len(all)-1].output += line + "\n"
		case language == "yaml":
			if _, command, ok := strings.Cut(line, "run: "); ok {
				add(command)
			}
		case language == "make" && strings.HasPrefix(line, "\t"):
			add(line[1:])
		}
	}
	return all
}

// changing is what differs from one run to the next.
var changing = []struct {
	what *regexp.Regexp
	name string
}{
	{regexp.MustCompile(`\b[0-9a-f]{64}\b`), "LONG"},
	{regexp.MustCompile(`\b[0-9a-f]{12}\b`), "IDENTIFIER"},
	{regexp.MustCompile(`\b\d\d:\d\d:\d\d\b`), "TIME"},
	{regexp.MustCompile(`/\S*/\.rdhpf/[\w-]{12}`), "FILES"},
	{regexp.MustCompile(`pid \d+`), "PID"},
	{regexp.MustCompile(`Docker/\S+`), "ENGINE"},
	{regexp.MustCompile(` (\d+[hms])+ *`), " AGE "},
	{regexp.MustCompile(`-{20,}`), "RULE"},
	{regexp.MustCompile(` +\n`), "\n"},
}

func unchanging(s string) string {
	for _, c := range changing {
		s = c.what.ReplaceAllString(s, c.name)
	}
	return s
}

func TestE2EReadme(t *testing.T) {
	for _, tool := range []string{"docker", "docker-compose", "jq", "curl"} {
		needTool(t, tool)
	}
	for _, port := range []int{3000, 8080, 8081} {
		if !locallyFree(port) {
			if os.Getenv("CI") == "true" {
				t.Fatalf("port %d of the README is taken", port)
			}
			t.Skipf("port %d of the README is taken", port)
		}
	}
	f := newField(t, map[string]string{"builder": "", "staging": ""})
	repo, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	rig := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("docker", append([]string{"--host", "unix://" + f.g.env["RIG_DOCKER"]}, args...)...).CombinedOutput(); err != nil {
			t.Errorf("docker %q: %v: %s", args, err, out)
		}
	}
	rig("tag", f.g.env["RIG_IMAGE"], "my-image")
	f.write("docker-compose.yml", "version: '3'\nservices:\n  cache:\n    image: my-image\n")
	f.write("go.mod", "module example\n")
	f.write("example_test.go", "package example\n")
	f.write("integration-tests", "#!/bin/sh\nexec docker ps\n")
	f.write("preamble", `
export GOCACHE="$(go env GOCACHE)" GOPATH="$(go env GOPATH)" GORACE=atexit_sleep_ms=10
export HOME=$PWD PATH="$PWD:$(dirname "$PROGRAM"):$PATH" GITHUB_ENV=$PWD/env
unset DOCKER_HOST DOCKER_CONTEXT RDHPF_DIR
go() { if [[ $1 == install ]]; then command go -C "$REPO" build -o /dev/null .; else command go "$@"; fi; }
make() { command make -n -C "$REPO" "$@" >/dev/null; }
systemctl() { :; }
launchctl() { :; }
loginctl() { :; }
curl() { command curl -sS "$@"; } # as it is on a terminal
journalctl() { :; }
systemd-escape() { :; }
cp() { :; }
sudo() { "$@"; }
afresh() { eval "$(rdhpf env -unset)"; docker context use default >/dev/null 2>&1; rdhpf stop -host "${1:-builder}" >/dev/null 2>&1; }
remove() { docker --host "unix://$RIG" rm -f "$@" >/dev/null; }
`)
	if err := os.Chmod(f.path("integration-tests"), 0o700); err != nil {
		t.Fatal(err)
	}
	commands := readmeCommands(t)
	var script strings.Builder
	script.WriteString(". ./preamble\n")
	for i, c := range commands {
		if strings.HasPrefix(c.line, "rdhpf run -detach ") {
			words := strings.Fields(strings.Split(c.line, " #")[0])
			script.WriteString("afresh " + words[len(words)-1] + "\n")
		}
		if strings.HasPrefix(c.section, "Forward ") { // of what does not answer
			script.WriteString("remove dns 2>/dev/null\n")
		}
		fmt.Fprintf(&script, "echo '@@%d'\n{ %s\n} 2>&1 || echo \"@@failed with $?\"\n", i, c.line)
	}
	script.WriteString("echo @@\nafresh; remove web api; docker --host \"unix://$RIG\" rmi my-image >/dev/null\n")
	cmd := exec.Command("bash", "-c", script.String())
	cmd.Dir = f.dir
	cmd.Env = append(os.Environ(), "PROGRAM="+program, "REPO="+repo, "RIG="+f.g.env["RIG_DOCKER"])
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		t.Errorf("%v", err)
	}
	rest := out.String()
	for i, c := range commands {
		_, rest, _ = strings.Cut(rest, fmt.Sprintf("@@%d\n", i))
		got, _, _ := strings.Cut(rest, fmt.Sprintf("@@%d\n", i+1))
		got, _, _ = strings.Cut(got, "@@\n")
		switch {
		case strings.Contains(got, "@@failed"):
			t.Errorf("%s: %s\n%s", c.section, c.line, got)
		case c.output != "" && unchanging(got) != unchanging(c.output):
			t.Errorf("%s: %s\n got %s\nwant %s", c.section, c.line, unchanging(got), unchanging(c.output))
		}
	}
	if len(commands) < 20 {
		t.Errorf("the README has %d commands", len(commands))
	}
}
