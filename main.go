/*
Rdhpf forwards the ports that containers publish on a remote Docker host to localhost.

Usage:

	rdhpf run [-host HOST] [-map PUBLISHED=LOCAL,…] [-skip PORTS] [-only PORTS] [-no-probe PORTS]
	          [-bind ADDRESSES] [-no-docker-socket] [-retry] [-detach]
	          [-quiet] [-log-level debug|info|warn|error] [-log-format text|json]
	rdhpf run [-wait TIME] [other flags] -- COMMAND [ARGUMENT…]
	rdhpf env [-host HOST] [-shell sh|fish] [-json] [-unset]
	rdhpf status [-host HOST] [-wide] [-json] [-watch]
	rdhpf status [-host HOST] [-wide] [-json] -wait TIME [PORT…]
	rdhpf health | pause | resume | reload | stop [-host HOST] [-json]
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
	                      programs that accept a single connection; the label
	                      rdhpf.probe=false on a container does the same
	-detach               go on in the background once connected; what is said
	                      from then on is in a .log file

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
reopens them.

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
	err := command(os.Args[1:])
	var usage usageError
	var absent *errNotRunning
	var ended *commandEnd
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
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

const usage = `rdhpf forwards the published ports of a remote Docker host to localhost.

  rdhpf run -host ssh://user@host   forward ports until interrupted
  rdhpf run -detach -host …         the same in the background, until rdhpf stop
  rdhpf run -- COMMAND              run a command that uses the remote engine and its ports
  rdhpf env                         print the variables with which docker uses the remote engine
  rdhpf status                      show what is forwarded, and why something is not
  rdhpf health                      exit with 0 if everything works, else say what does not
  rdhpf pause, rdhpf resume         close all local ports, open them again
  rdhpf reload                      read config.json again
  rdhpf stop                        stop the running instance
  rdhpf version                     print the version

rdhpf COMMAND -h lists the flags of a command.
`

func command(args []string) error {
	if len(args) == 0 {
		fmt.Fprint(os.Stderr, usage)
		return usageError{errors.New("no command given")}
	}
	switch args[0] {
	case "run":
		return runCommand(args[1:])
	case "status":
		return statusCommand(args[1:])
	case "env":
		return envCommand(args[1:])
	case "health", "pause", "resume", "reload", "stop":
		return tellCommand(args[0], args[1:])
	case "version", "-version", "--version":
		fmt.Println("rdhpf " + version())
		return nil
	case "help", "-h", "-help", "--help":
		fmt.Print(usage)
		return nil
	}
	if args[0] == "completion" {
		return usageError{errors.New("there is no completion any more")}
	}
	return usageError{fmt.Errorf("unknown command %q: see rdhpf help", args[0])}
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

// parseFlags parses the command line of a command that takes only flags.
func parseFlags(f *flag.FlagSet, args []string) error {
	err := parseFlagsAndArgs(f, args)
	if err == nil && f.NArg() > 0 {
		err = usageError{fmt.Errorf("unexpected argument %q: see rdhpf %s -h", f.Arg(0), f.Name())}
	}
	return err
}

// parseFlagsAndArgs parses a command line and prints the help if requested.
func parseFlagsAndArgs(f *flag.FlagSet, args []string) error {
	f.SetOutput(io.Discard)
	err := f.Parse(args)
	if errors.Is(err, flag.ErrHelp) {
		f.SetOutput(os.Stdout)
		fmt.Printf("Usage of rdhpf %s:\n", f.Name())
		f.PrintDefaults()
		return err
	}
	if err != nil {
		for _, old := range bygone {
			if strings.HasSuffix(err.Error(), "not defined: -"+old.flag) {
				return usageError{fmt.Errorf("there is no -%s any more: use %s", old.flag, old.instead)}
			}
		}
		return usageError{fmt.Errorf("%w: see rdhpf %s -h", err, f.Name())}
	}
	return nil
}

// bygone are flags of earlier versions.
var bygone = []struct{ flag, instead string }{
	{"format", "-json, or nothing for the table"},
	{"trace", "-log-level debug"},
	{"verbose", "-log-level debug"},
}

// runFlags are the flags of run, checked.
type runFlags struct {
	runOptions
	level   slog.Level
	format  string
	command []string // to run; nil: none
	wait    time.Duration
}

func parseRunFlags(args []string) (r runFlags, err error) {
	f := flag.NewFlagSet("run", flag.ContinueOnError)
	hostFlag := f.String("host", "", "remote Docker `host`: ssh://[user@]host[:port][/socket] (default: the one docker uses)")
	r.flags = config{mapped: make(map[uint16]uint16)}
	f.Func("bind", "local `addresses` to listen on, separated by commas (default 127.0.0.1,::1)", addAddresses(&r.flags.bind))
	f.Func("map", "`published=local`: forward to another local port; separate several with commas", addMaps(r.flags.mapped))
	f.Func("skip", "`ports` not to forward, such as 22,8000-8099", addRanges(&r.flags.skip))
	f.Func("only", "forward only these `ports`", addRanges(&r.flags.only))
	f.Func("no-probe", "never probe these `ports`, for programs that accept a single connection", addRanges(&r.flags.noProbe))
	noDocker := f.Bool("no-docker-socket", false, "do not serve the remote engine on a local socket")
	f.BoolVar(&r.retry, "retry", false, "keep trying when the first connection fails")
	f.BoolVar(&r.detach, "detach", false, "run in the background; return once connected")
	f.DurationVar(&r.wait, "wait", 0, "before running a command, wait up to this `time` until all ports are active")
	f.TextVar(&r.level, "log-level", slog.LevelInfo, "print messages of this `level` and above: debug, info, warn or error")
	f.StringVar(&r.format, "log-format", "text", "`format` of the messages: text or json")
	quiet := f.Bool("quiet", false, "print only errors, as -log-level error does")
	if err := parseFlagsAndArgs(f, args); err != nil {
		return r, err
	}
	if r.docker = !*noDocker; *quiet {
		r.level = slog.LevelError
	}
	isCommand := len(args) > f.NArg() && args[len(args)-f.NArg()-1] == "--"
	switch {
	case !isCommand && f.NArg() > 0:
		err = fmt.Errorf("unexpected argument %q: see rdhpf run -h (a command to run follows --)", f.Arg(0))
	case isCommand && f.NArg() == 0:
		err = errors.New("-- is followed by no command")
	case isCommand && r.detach:
		err = errors.New("-detach and a command exclude each other: with a command, rdhpf runs as long as it does")
	case !isCommand && r.wait != 0:
		err = errors.New("-wait needs a command to run: rdhpf run -wait 30s -- COMMAND")
	case r.wait < 0:
		err = errors.New("-wait wants a positive time, like 30s")
	case r.format != "text" && r.format != "json":
		err = fmt.Errorf("-log-format %q: want text or json", r.format)
	}
	if err != nil {
		return r, usageError{err}
	}
	if isCommand {
		r.command = f.Args()
	}
	home, _ := os.UserHomeDir()
	if r.dir, err = stateDir(os.Getenv, home); err != nil {
		return r, err
	}
	r.host, err = findHost(*hostFlag, r.dir, home)
	return r, err
}

func runCommand(args []string) error {
	r, err := parseRunFlags(args)
	if err != nil {
		return err
	}
	if r.detach && os.Getenv(detachedVar) == "" {
		return detach(r, args)
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
