/*
Rdhpf makes the ports that containers publish on a remote Docker host answer on
127.0.0.1.

Usage:

	rdhpf run [-host HOST] [-map PUBLISHED=LOCAL,…] [-skip PORTS] [-only PORTS] [-bind ADDR]
	          [-retry] [-log-level debug|info|warn|error] [-log-format text|json]
	rdhpf status [-host HOST] [-wide] [-json] [-watch]
	rdhpf status [-host HOST] -wait TIME [PORT…]
	rdhpf health | pause | resume | reload | stop [-host HOST] [-json]
	rdhpf version

HOST is ssh://[user@]host[:port][/path/to/docker.sock], user@host, or an alias of
ssh_config. Without it rdhpf takes what docker would: DOCKER_HOST, DOCKER_CONTEXT
or the current context.

Run keeps one connection of the ssh that you have, with your ssh_config, keys
and agent; it never asks for a password. It forwards every published TCP port of
every running container to the same port of 127.0.0.1, or to what -map says, and
goes on until it is interrupted. Reload reads the same settings from config.json.

Status tells, from another shell, what is forwarded and why something is not. It
asks the running instance, else reads what it wrote last, else looks with lsof
for an ssh that listens. Health exits with 0 only when all is well. Pause closes
all local ports and keeps the connection, resume opens them again.

Files are in ~/.rdhpf, or where RDHPF_DIR says, and private to you. The socket
there speaks JSON-RPC, see docs/protocol.md.

Rdhpf exits with 0 when all was well, 1 after a failure, 2 when it was called
wrongly, 3 when there is no live instance to tell of.
*/
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	exitFailure    = 1
	exitUsage      = 2
	exitNotRunning = 3
)

// usageError is a mistake in the command line.
type usageError struct{ error }

func main() {
	err := command(os.Args[1:])
	var usage usageError
	var absent *errNotRunning
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
	case errors.As(err, &absent):
		if absent.text != "" {
			fmt.Fprintln(os.Stderr, absent.text)
		}
		os.Exit(exitNotRunning)
	case errors.Is(err, errUnhealthy):
		os.Exit(exitFailure)
	case errors.As(err, &usage):
		fmt.Fprintf(os.Stderr, "rdhpf: %v\n", err)
		os.Exit(exitUsage)
	default:
		fmt.Fprintf(os.Stderr, "rdhpf: %v\n", err)
		os.Exit(exitFailure)
	}
}

const usage = `rdhpf makes the published ports of a remote Docker host answer on localhost.

  rdhpf run -host ssh://user@host   forward until interrupted
  rdhpf status                      what is forwarded, and why something is not
  rdhpf health                      exit 0 if all is well, else say why not
  rdhpf pause, rdhpf resume         close all local ports, open them again
  rdhpf reload                      read config.json again
  rdhpf stop                        end the running instance
  rdhpf version                     print the version

rdhpf COMMAND -h lists a command's flags.
`

func command(args []string) error {
	if len(args) == 0 {
		fmt.Fprint(os.Stderr, usage)
		return usageError{errors.New("no command")}
	}
	switch args[0] {
	case "run":
		return runCommand(args[1:])
	case "status":
		return statusCommand(args[1:])
	case "health", "pause", "resume", "reload", "stop":
		return tellCommand(args[0], args[1:])
	case "version", "-version", "--version":
		fmt.Println("rdhpf " + version())
		return nil
	case "help", "-h", "-help", "--help":
		fmt.Print(usage)
		return nil
	}
	return usageError{fmt.Errorf("there is no command %q: see rdhpf help", args[0])}
}

// version is what the build says of itself.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := strings.Trim(info.Main.Version, "()")
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && len(s.Value) >= 12 && v == "devel" {
			v += " " + s.Value[:12]
		}
	}
	return v + " " + info.GoVersion
}

// parseFlags parses what takes flags only.
func parseFlags(f *flag.FlagSet, args []string) error {
	err := parseFlagsAndArgs(f, args)
	if err == nil && f.NArg() > 0 {
		err = usageError{fmt.Errorf("%q is one argument too many: see rdhpf %s -h", f.Arg(0), f.Name())}
	}
	return err
}

// parseFlagsAndArgs prints the help that is asked for.
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
		return usageError{fmt.Errorf("%w: see rdhpf %s -h", err, f.Name())}
	}
	return nil
}

func runCommand(args []string) error {
	f := flag.NewFlagSet("run", flag.ContinueOnError)
	hostFlag := f.String("host", "", "remote Docker `host`: ssh://[user@]host[:port][/socket] (default: what docker would take)")
	flags := config{mapped: make(map[uint16]uint16)}
	f.Func("bind", "local `address` to listen on (default 127.0.0.1)", func(s string) (err error) {
		flags.bind, err = parseBind(s)
		return err
	})
	f.Func("map", "`published=local`: forward to another local port; several with commas", addMap(flags.mapped))
	f.Func("skip", "`ports` not to forward: 22,8000-8099", addRanges(&flags.skip))
	f.Func("only", "forward these `ports` only", addRanges(&flags.only))
	retry := f.Bool("retry", false, "keep trying when the first connection fails")
	level := slog.LevelInfo
	f.TextVar(&level, "log-level", slog.LevelInfo, "print what is at least that important: debug, info, warn or error")
	format := f.String("log-format", "text", "text or json")
	if err := parseFlags(f, args); err != nil {
		return err
	}
	if *format != "text" && *format != "json" {
		return usageError{fmt.Errorf("-log-format %q: want text or json", *format)}
	}
	home, _ := os.UserHomeDir()
	h, err := resolveHost(*hostFlag, os.Getenv, home)
	if err != nil && *hostFlag != "" {
		return usageError{err}
	} else if err != nil {
		return err
	}
	dir, err := stateDir(os.Getenv, home)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	stopOnSignal(stop)
	log, end := newLogger(os.Stderr, level, *format, func(error) { stop() })
	defer end()
	return run(ctx, runOptions{host: h, dir: dir, flags: flags, retry: *retry, log: log})
}

// stopOnSignal has stop called at the first signal and the process ended at the
// second. From its return on no signal ends the process without a cleanup.
func stopOnSignal(stop func()) {
	// Without this a write to a closed stderr would kill us before we clean up.
	signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE)
	c := make(chan os.Signal, 2)
	for _, sig := range []os.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP} {
		if !signal.Ignored(sig) { // nohup, or a script's background job
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
