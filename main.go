/*
Rdhpf makes the ports that containers publish on a remote Docker host answer on
127.0.0.1.

Usage:

	rdhpf run [-host HOST] [-bind ADDR] [-retry] [-log-level LEVEL] [-log-format text|json]
	rdhpf version

HOST is ssh://[user@]host[:port][/path/to/docker.sock], user@host, or an alias of
ssh_config. Without it rdhpf takes what docker would: DOCKER_HOST, DOCKER_CONTEXT
or the current context.

Rdhpf keeps one connection of the ssh that you have, with your ssh_config, keys
and agent; it never asks for a password. It forwards every published TCP port of
every running container, and goes on until it is interrupted. Its files are in
~/.rdhpf, or where RDHPF_DIR says.

It exits with 0 when all was well, 1 after a failure, 2 when it was called
wrongly.
*/
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	exitFailure = 1
	exitUsage   = 2
)

// usageError is a mistake in the command line.
type usageError struct{ error }

func main() {
	err := command(os.Args[1:])
	var usage usageError
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
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
	f.SetOutput(io.Discard)
	err := f.Parse(args)
	if errors.Is(err, flag.ErrHelp) {
		f.SetOutput(os.Stdout)
		fmt.Printf("Usage of rdhpf %s:\n", f.Name())
		f.PrintDefaults()
		return err
	}
	if err == nil && f.NArg() > 0 {
		err = fmt.Errorf("%q is one argument too many", f.Arg(0))
	}
	if err != nil {
		return usageError{fmt.Errorf("%w: see rdhpf %s -h", err, f.Name())}
	}
	return nil
}

func runCommand(args []string) error {
	f := flag.NewFlagSet("run", flag.ContinueOnError)
	hostFlag := f.String("host", "", "remote Docker `host`: ssh://[user@]host[:port][/socket] (default: what docker would take)")
	bind := f.String("bind", "127.0.0.1", "local `address` to listen on")
	retry := f.Bool("retry", false, "keep trying when the first connection fails")
	level := slog.LevelInfo
	f.TextVar(&level, "log-level", slog.LevelInfo, "print what is at least that important: debug, info, warn or error")
	format := f.String("log-format", "text", "text or json")
	if err := parseFlags(f, args); err != nil {
		return err
	}
	cfg := &config{}
	var err error
	if cfg.bind, err = netip.ParseAddr(*bind); err != nil || cfg.bind.Zone() != "" {
		return usageError{fmt.Errorf("-bind %q is no address: want one like 127.0.0.1 or ::1", *bind)}
	}
	cfg.bind = cfg.bind.Unmap()
	if *format != "text" && *format != "json" {
		return usageError{fmt.Errorf("-log-format %q: want text or json", *format)}
	}
	home, _ := os.UserHomeDir()
	h, err := resolveHost(*hostFlag, os.Getenv, home)
	if err != nil {
		return err
	}
	dir, err := stateDir(os.Getenv, home)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	go func() { stopOnSignal(stop) }()
	log := newLogger(os.Stderr, level, *format, func(error) { stop() })
	if !cfg.bind.IsLoopback() {
		log.Warn(fmt.Sprintf("listening on %s: others on the network can reach the forwarded ports", cfg.bind))
	}
	return run(ctx, runOptions{host: h, dir: dir, cfg: cfg, retry: *retry, log: log})
}

// stopOnSignal calls stop at the first signal and ends the process at the
// second.
func stopOnSignal(stop func()) {
	// Without this a write to a closed stderr would kill us before we clean up.
	signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE)
	c := make(chan os.Signal, 2)
	signal.Notify(c, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	<-c
	stop()
	sig := <-c
	signal.Reset(sig)
	syscall.Kill(os.Getpid(), sig.(syscall.Signal))
}
