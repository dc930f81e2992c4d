/*
Rdhpf forwards the ports that containers publish on a remote Docker host to localhost.

Usage:

	rdhpf run [-map PUBLISHED=LOCAL,…] [-skip PORTS] [-only PORTS] [-no-probe PORTS]
	          [-bind ADDRESSES] [-no-docker-socket] [-retry] [-detach]
	          [-quiet] [-log-level debug|info|warn|error] [-log-format text|json] [HOST]
	rdhpf run [-wait TIME] [other flags] [HOST] -- COMMAND [ARGUMENT…]
	rdhpf status [-host HOST] [-wide] [-json] [-watch]
	rdhpf status [-host HOST] [-wide] [-json] -wait TIME [PORT…]
	rdhpf port [-host HOST] NAME [PORT]
	rdhpf env [-host HOST] [-shell sh|fish] [-json] [-unset]
	rdhpf health | pause | resume | reload | stop [-host HOST] [-json]
	rdhpf completion bash|zsh|fish
	rdhpf version

HOST is ssh://[user@]host[:port][/path/to/docker.sock], user@host, or an alias from
ssh_config. Without it rdhpf uses the host that docker would use: that of DOCKER_HOST,
of DOCKER_CONTEXT or of the current context.

Run keeps one connection open, using the installed ssh with your ssh_config, keys
and agent; it never asks for a password. It forwards every published TCP port of
every running container to the same port of 127.0.0.1 and ::1, until it is interrupted.
PORTS is a list of ports and ranges, such as 22,8000-8099.

	-map 80=8080          forward a published port to another local port
	-skip, -only PORTS    forward all ports but these, or only these
	-bind ADDRESSES       listen on these addresses rather than 127.0.0.1,::1
	-no-probe PORTS       never probe these ports to see whether they answer, for
	                      programs that accept a single connection
	-detach               go on in the background once connected; what is said
	                      from then on is in a .log file

Labels on a container or compose service do the same for its ports: rdhpf.map=80=8080,443=8443
(of published ports, or else of the container's own), rdhpf.skip=true, rdhpf.probe=false.
Rules that contradict each other are not guessed at: such a port is not forwarded, and status
says why.

Run also serves the remote engine on a local socket, so that docker, compose and test
libraries use it as if it were here; -no-docker-socket leaves that out. Env prints the
variables that tools need for it: eval "$(rdhpf env)". A container's ports are open by the
time docker run or start returns.

With a command, run waits until it is connected and the ports are open, or with -wait
until they are active; it then runs the command with these variables and exits with its
status (128 plus the number of a signal that ended it). If an instance for the host is
running already, it is used and left running; otherwise one runs for as long as the command.

config.json can hold the same settings, for all hosts and for single ones. Flags
take precedence, and reload rereads the file:

	{
	  "map": {"80": 8080}, "skip": [22, "8000-8099"], "no_probe": [2345],
	  "hosts": {"ssh://user@host": {"only": ["1-1023"], "bind": ["127.0.0.1"]}}
	}

Status, run from another shell, shows what is forwarded and why anything is not. It
asks the running instance, or else reads its last state file, or else uses lsof to find
a listening rdhpf or ssh. With -wait it exits as soon as the instance has verified that
the ports are active. Health exits with 0 only if the instance has verified that
everything works. Pause closes all local ports but keeps the connection; resume
reopens them. Port prints the local address of a container's or compose service's port, as
docker port does: curl $(rdhpf port web 80).

Files are in ~/.rdhpf, or in the directory named by RDHPF_DIR, and private to you. The
socket there speaks JSON-RPC; see docs/protocol.md.

The exit status is 0 for success, 1 for a failure, 2 for an error in the command line,
and 3 if there is no running instance.
*/
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	exitFailure    = 1
	exitUsage      = 2
	exitNotRunning = 3
)

// usageError is an error in the command line.
type usageError struct{ error }

func main() {
	err := dispatch(os.Args[1:])
	var usage usageError
	var absent *errNotRunning
	var ended *commandEnd
	switch {
	case err == nil:
	case errors.As(err, &absent):
		if absent.text != "" {
			fmt.Fprintln(os.Stderr, absent.text)
		}
		os.Exit(exitNotRunning)
	case errors.Is(err, errUnhealthy):
		os.Exit(exitFailure)
	case errors.As(err, &ended):
		if ended.error != nil {
			fmt.Fprintf(os.Stderr, "rdhpf: %v\n", ended.error)
		}
		os.Exit(ended.status)
	case errors.As(err, &usage):
		fmt.Fprintf(os.Stderr, "rdhpf: %v\n", err)
		os.Exit(exitUsage)
	default:
		fmt.Fprintf(os.Stderr, "rdhpf: %v\n", err)
		os.Exit(exitFailure)
	}
}

// command is a command of rdhpf. Dispatch, help, completion and suggestions are made from the
// table of them.
type command struct {
	name     string
	args     string // besides flags, as help writes them
	does     string
	examples [2]string

	// setup defines the flags and returns what runs once they are parsed: it takes the
	// arguments, and those that follow --, nil if there is no --.
	setup func(f *flag.FlagSet) func(args, after []string) error
}

func commands() []command {
	return []command{
		{"run", "[HOST] [-- COMMAND [ARGUMENT…]]", "forward ports until interrupted, or while a command runs",
			[2]string{"rdhpf run -detach ssh://user@host", "rdhpf run -map 80=8080 -- go test ./..."}, runCommand},
		{"status", "[PORT…]", "show what is forwarded, and why anything is not",
			[2]string{"rdhpf status -wide", "rdhpf status -wait 30s 8080"}, statusCommand},
		{"port", "NAME [PORT]", "print where a container's port is on this machine",
			[2]string{"rdhpf port web", "curl $(rdhpf port web 80)"}, portCommand},
		{"env", "", "print the variables with which tools use the remote engine",
			[2]string{`eval "$(rdhpf env)"`, "rdhpf env -shell fish | source"}, envCommand},
		{"health", "", "exit with 0 if everything works, else say what does not",
			[2]string{"rdhpf health", "rdhpf health -json | jq .traffic"}, tellCommand},
		{"pause", "", "close all local ports but keep the connection",
			[2]string{"rdhpf pause", "rdhpf pause -host builder"}, tellCommand},
		{"resume", "", "open the ports again",
			[2]string{"rdhpf resume", "rdhpf resume -host builder"}, tellCommand},
		{"reload", "", "read config.json again",
			[2]string{"rdhpf reload", "rdhpf reload -host builder"}, tellCommand},
		{"stop", "", "stop the running instance",
			[2]string{"rdhpf stop", "rdhpf stop -host builder"}, tellCommand},
		{"completion", "bash|zsh|fish", "print a script that completes commands in your shell",
			[2]string{"source <(rdhpf completion bash)", "rdhpf completion fish > ~/.config/fish/completions/rdhpf.fish"}, completionCommand},
		{"version", "", "print the version", [2]string{"rdhpf version", "rdhpf version | cut -d' ' -f2"}, versionCommand},
	}
}

func findCommand(name string) (command, bool) {
	all := commands()
	i := slices.IndexFunc(all, func(c command) bool { return c.name == name })
	if i < 0 {
		return command{}, false
	}
	return all[i], true
}

// usage is the help on all commands.
func usage() string {
	var b strings.Builder
	b.WriteString("rdhpf brings the ports and the engine of a remote Docker host to this machine.\n\n")
	for _, c := range commands() {
		fmt.Fprintf(&b, "  rdhpf %-12s%s\n", c.name, c.does)
	}
	b.WriteString("\nStart with: rdhpf run ssh://user@host\nHelp on a command: rdhpf COMMAND -h\n")
	return b.String()
}

// dispatch runs the command that the words of the command line name.
func dispatch(words []string) error {
	if len(words) == 0 {
		fmt.Fprint(os.Stderr, usage())
		return usageError{errors.New("no command given")}
	}
	name, words := words[0], words[1:]
	switch name {
	case "help", "-h", "-help", "--help":
		if len(words) == 0 {
			fmt.Print(usage())
			return nil
		}
		name, words = words[0], []string{"-h"}
	case "-version", "--version":
		name = "version"
	case completeCommand:
		return complete(os.Stdout, words)
	}
	c, ok := findCommand(name)
	if !ok {
		var names []string
		for _, c := range commands() {
			names = append(names, c.name)
		}
		return usageError{fmt.Errorf("unknown command %q: %s", name, didYouMean(name, names, "see rdhpf help"))}
	}
	f := flag.NewFlagSet(c.name, flag.ContinueOnError)
	run := c.setup(f)
	args, after, err := parseWords(f, words)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Print(c.help(f))
		return nil
	case err != nil:
		return usageError{err}
	case c.args == "" && len(args)+len(after) > 0:
		return usageError{unexpected(c.name, append(args, after...)[0])}
	}
	return run(args, after)
}

// help is the help on a command, which fits on a terminal of 80 columns and 24 lines.
func (c command) help(f *flag.FlagSet) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Usage: rdhpf %s\n\n%s%s\n", strings.TrimSpace(c.name+" [FLAG…] "+c.args), strings.ToUpper(c.does[:1]), c.does[1:]+".")
	var rows [][2]string
	width := 0
	f.VisitAll(func(fl *flag.Flag) {
		value, about := describe(fl)
		rows = append(rows, [2]string{strings.TrimSpace("-" + fl.Name + " " + value), about})
		width = max(width, len(rows[len(rows)-1][0]))
	})
	if len(rows) > 0 {
		b.WriteString("\n")
	}
	for _, row := range rows {
		fmt.Fprintf(&b, "  %-*s  %s\n", width, row[0], row[1])
	}
	fmt.Fprintf(&b, "\nExamples:\n  %s\n  %s\n", c.examples[0], c.examples[1])
	return b.String()
}

// describe returns what help calls the value of a flag, "" if it takes none, and what the flag does. In its
// definition the value stands in backquotes, before the rest.
func describe(fl *flag.Flag) (value, about string) {
	value, about = flag.UnquoteUsage(fl)
	return value, strings.TrimPrefix(about, value+" ")
}

// parseWords parses flags and arguments, in any order, up to --.
func parseWords(f *flag.FlagSet, words []string) (args, after []string, err error) {
	f.SetOutput(io.Discard)
	f.Usage = func() {}
	for {
		if err := f.Parse(words); err != nil {
			return nil, nil, explainFlag(f, err)
		}
		rest := f.Args()
		if n := len(words) - len(rest); n > 0 && words[n-1] == "--" {
			return args, append([]string{}, rest...), nil
		}
		if len(rest) == 0 {
			return args, nil, nil
		}
		args, words = append(args, rest[0]), rest[1:]
	}
}

// explainFlag returns an error of package flag in the words of this program.
func explainFlag(f *flag.FlagSet, err error) error {
	text := err.Error()
	if name, ok := strings.CutPrefix(text, "flag provided but not defined: -"); ok {
		if instead := bygone[name]; instead != "" {
			return fmt.Errorf("there is no -%s any more: use %s", name, instead)
		}
		var names []string
		f.VisitAll(func(fl *flag.Flag) { names = append(names, "-"+fl.Name) })
		return fmt.Errorf("unknown flag -%s: %s", name, didYouMean("-"+name, names, "see rdhpf "+f.Name()+" -h"))
	}
	if name, ok := strings.CutPrefix(text, "flag needs an argument: -"); ok {
		value, about := describe(f.Lookup(name))
		return fmt.Errorf("-%s needs a value: -%[1]s %s: %s", name, value, about)
	}
	if text, ok := strings.CutPrefix(text, "invalid value "); ok {
		value, text, _ := strings.Cut(text, " for flag ")
		name, why, _ := strings.Cut(text, ": ")
		return fmt.Errorf("%s %s: %s", name, value, why)
	}
	if text, ok := strings.CutPrefix(text, "invalid boolean value "); ok {
		value, text, _ := strings.Cut(text, " for ")
		name, _, _ := strings.Cut(text, ": ")
		return fmt.Errorf("%s %s: want true, false or no value", name, value)
	}
	return err
}

// bygone are flags of earlier versions, and what replaces them.
var bygone = map[string]string{
	"format":  "-json, or nothing for the table",
	"trace":   "-log-level debug",
	"verbose": "-log-level debug",
}

// unexpected is the error about an argument where there should be none.
func unexpected(command, arg string) error {
	if strings.Contains(arg, "@") || strings.Contains(arg, "://") {
		return fmt.Errorf("unexpected argument %q: name the host with -host %s", arg, arg)
	}
	return fmt.Errorf("unexpected argument %q: see rdhpf %s -h", arg, command)
}

// didYouMean suggests the name that word was meant to be, or else says otherwise.
func didYouMean(word string, names []string, otherwise string) string {
	best, least := "", 3 // more edits than that make another word
	for _, name := range names {
		if len(word) > 1 && strings.HasPrefix(name, word) {
			return "did you mean " + name + "?"
		}
		if n := edits(word, name); n < least && n < len(word)-1 {
			best, least = name, n
		}
	}
	if best == "" {
		return otherwise
	}
	return "did you mean " + best + "?"
}

// edits is the number of characters to insert, delete or replace that make b of a.
func edits(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

func versionCommand(*flag.FlagSet) func(args, after []string) error {
	return func([]string, []string) error {
		_, err := fmt.Println("rdhpf " + version())
		return err
	}
}

// archived is the tag and the commit that git archive fills in, see .gitattributes.
const archived = "$Format:%(describe:tags=true,abbrev=12) %H$"

// version returns the tag, the commit and the Go version this was built from, such as "v1.2.3 (0123456789ab) go1.26.0".
func version() string {
	v, commit, _ := strings.Cut(archived, " ")
	if info, ok := debug.ReadBuildInfo(); ok && strings.HasPrefix(archived, "$") {
		v, commit = info.Main.Version, ""
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				commit = s.Value
			}
		}
	}
	v, dirty := strings.CutSuffix(v, "+dirty")
	// Behind a tag, git describes a commit as v1.2.3-4-g0123456789ab, and Go as v1.2.4-0.20060102150405-0123456789ab.
	if behind := regexp.MustCompile(`[-.]\d+-g?([0-9a-f]{12,})$`).FindStringSubmatch(v); behind != nil {
		v, commit = "", behind[1]
	}
	v = cmp.Or(strings.Trim(v, "()"), "devel")
	if dirty {
		v += "+dirty"
	}
	if commit != "" {
		v += " (" + commit[:12] + ")"
	}
	return v + " " + runtime.Version()
}

// runFlags are the flags of run, checked.
type runFlags struct {
	runOptions
	hostFlag        string
	noDocker, quiet bool
	level           slog.Level
	format          string
	command         []string // to run; nil: none
	wait            time.Duration
}

// define defines the flags of run.
func (r *runFlags) define(f *flag.FlagSet) {
	r.flags, r.format = config{mapped: make(map[uint16]uint16)}, "text"
	f.StringVar(&r.hostFlag, "host", "", "`HOST` ssh://[user@]host[:port] or an alias (default: docker's)")
	f.Func("bind", "`ADDRESSES` listen on these (default 127.0.0.1,::1)", addAddresses(&r.flags.bind))
	f.Func("map", "`PUBLISHED=LOCAL` use another local port, as in 80=8080,81=8081", addMaps(r.flags.mapped))
	f.Func("skip", "`PORTS` do not forward these, such as 22,8000-8099", addRanges(&r.flags.skip))
	f.Func("only", "`PORTS` forward these and no others", addRanges(&r.flags.only))
	f.Func("no-probe", "`PORTS` never probe these: they take one connection only", addRanges(&r.flags.noProbe))
	f.BoolVar(&r.noDocker, "no-docker-socket", false, "do not serve the remote engine on a local socket")
	f.BoolVar(&r.detach, "detach", false, "run in the background; return once connected")
	f.BoolVar(&r.retry, "retry", false, "keep trying if the first connection fails")
	f.Func("wait", "`TIME` wait up to this for active ports before the command", addTime(&r.wait))
	f.Func("log-level", "`LEVEL` print messages from debug, info, warn or error on", func(s string) error {
		if r.level.UnmarshalText([]byte(s)) != nil {
			return errors.New("want debug, info, warn or error")
		}
		return nil
	})
	f.Func("log-format", "`FORMAT` print messages as text or json", func(s string) error {
		if r.format = s; s != "text" && s != "json" {
			return errors.New("want text or json")
		}
		return nil
	})
	f.BoolVar(&r.quiet, "quiet", false, "print only errors, as -log-level error does")
}

// check takes the arguments and finds the host.
func (r *runFlags) check(args, after []string) error {
	switch {
	case len(args) == 1 && r.hostFlag == "":
		r.hostFlag = args[0]
	case len(args) > 0:
		return usageError{fmt.Errorf("unexpected argument %q: see rdhpf run -h (a command to run follows --)", args[len(args)-1])}
	}
	if r.command = after; after != nil && len(after) == 0 {
		return usageError{errors.New("-- is followed by no command")}
	} else if after != nil && r.detach {
		return usageError{errors.New("-detach and a command exclude each other: with a command, rdhpf runs as long as it does")}
	} else if after == nil && r.wait != 0 {
		return usageError{errors.New("-wait needs a command to run: rdhpf run -wait 30s -- COMMAND")}
	}
	if r.docker = !r.noDocker; r.quiet {
		r.level = slog.LevelError
	}
	home, _ := os.UserHomeDir()
	var err error
	if r.dir, err = stateDir(os.Getenv, home); err != nil {
		return err
	}
	r.host, err = findHost(r.hostFlag, r.dir, home)
	return err
}

// addTime parses a flag that is a time.
func addTime(to *time.Duration) func(string) error {
	return func(s string) (err error) {
		if *to, err = time.ParseDuration(s); err != nil {
			if _, err := strconv.ParseFloat(s, 64); err == nil {
				return fmt.Errorf("a time has a unit, such as %ss", s)
			}
			return errors.New("want a time, such as 30s")
		}
		if *to <= 0 {
			return errors.New("want a positive time, such as 30s")
		}
		return nil
	}
}

func runCommand(f *flag.FlagSet) func(args, after []string) error {
	r := &runFlags{}
	r.define(f)
	return func(args, after []string) error {
		if err := r.check(args, after); err != nil {
			return err
		}
		return r.run()
	}
}

// run runs the instance, and the command if there is one.
func (r *runFlags) run() error {
	if r.detach && os.Getenv(detachedVar) == "" {
		return detach(r)
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	log, end := newLogger(r.stderr(), r.level, r.format, func(error) {
		if r.command == nil {
			stop()
		}
	})
	defer end()
	if os.Getenv("RDHPF_LOG_LEVEL") != "" {
		log.Warn("RDHPF_LOG_LEVEL has no effect any more: use -log-level")
	}
	if r.log = log; r.command != nil {
		return runAround(r.runOptions, r.command, r.wait)
	}
	stopOnSignal(stop)
	return run(ctx, r.runOptions)
}

// stopOnSignal calls stop on the first signal and ends the process on the second. Once it has returned, a first signal
// never ends the process without cleanup.
func stopOnSignal(stop func()) {
	// Otherwise a write to a closed stderr would kill the process before cleanup.
	signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE)
	c := make(chan os.Signal, 2)
	for _, sig := range []os.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP} {
		if !signal.Ignored(sig) { // ignored under nohup and in a script's background jobs
			signal.Notify(c, sig)
		}
	}
	go func() {
		<-c
		stop()
		sig := <-c
		signal.Reset(sig)
		syscall.Kill(os.Getpid(), sig.(syscall.Signal))
	}()
}
