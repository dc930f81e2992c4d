//go:build linux

// Bench measures rdhpf against a rig of its own and prints a table: what was
// measured, beside a reference of the same run and the goal. Run it as root
// from the project's root, where `e2e/rig/rig install` has been:
//
//	go run ./e2e/rig/bench [-n FACTOR] [-only REGEXP]
//
// A missed goal is no error. Figures are medians; subject and reference take
// turns, for the machine is busy with other things too.
package main

import (
	"flag"
	"fmt"
	"math"
	"os"
	"os/signal"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

// row is one line of the table, all of it as it is printed.
type row struct {
	figure         string
	n              int
	median, p90    string
	reference      string
	relation, goal string
	met            bool
	note           string // below the table
}

// figures are run in this order, which spares starts of containers.
var figures = []struct {
	name    string
	measure func(*bench) ([]row, error)
}{
	{"start", (*bench).startAndKill},
	{"delay", (*bench).startDelayed},
	{"burst", (*bench).burst},
	{"cold", (*bench).coldStart},
	{"idle", (*bench).idle},
	{"reconnect", (*bench).reconnect},
	{"throughput", (*bench).throughput},
	{"connections", (*bench).connections},
	{"docker", (*bench).dockerCommands},
	{"cp", (*bench).dockerCopies},
	{"ports100", (*bench).hundredPorts},
	{"swarm", (*bench).swarm},
	{"ports1000", (*bench).thousandPorts},
}

func main() {
	names := make([]string, len(figures))
	for i, f := range figures {
		names[i] = f.name
	}
	factor := flag.Float64("n", 1, "repeat each measurement this many times as often")
	only := flag.String("only", "", "measure only what this `regexp` matches of: "+strings.Join(names, " "))
	flag.Parse()
	pattern, err := regexp.Compile(*only)
	if err != nil || !(*factor > 0) || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}

	b := &bench{factor: *factor}
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		<-sig
		b.close()
		os.Exit(130)
	}()
	began := time.Now()
	rows, err := b.all(pattern)
	printTable(rows)
	b.close()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	load, _ := os.ReadFile("/proc/loadavg")
	fmt.Printf("\nIn %v, on %d cores with a load average of %.4s over the last minute.\n",
		time.Since(began).Round(time.Second), runtime.NumCPU(), load)
}

// all returns the rows that were measured, also with an error.
func (b *bench) all(pattern *regexp.Regexp) (rows []row, err error) {
	if err := b.open(); err != nil {
		return nil, err
	}
	for _, f := range figures {
		if !pattern.MatchString(f.name) {
			continue
		}
		began := time.Now()
		more, err := f.measure(b)
		fmt.Fprintf(os.Stderr, "bench: %s took %.1f s\n", f.name, time.Since(began).Seconds())
		if err != nil {
			return rows, fmt.Errorf("%s: %w", f.name, err)
		}
		rows = append(rows, more...)
	}
	return rows, nil
}

// times is n, scaled by -n.
func (b *bench) times(n int) int { return max(1, int(math.Round(float64(n)*b.factor))) }

func printTable(rows []row) {
	if len(rows) == 0 {
		return
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "figure\tn\tmedian\tp90\treference\tratio or difference\tgoal\tmet")
	var notes []string
	for _, r := range rows {
		if r.note != "" {
			notes = append(notes, r.note)
			r.figure += fmt.Sprintf(" [%d]", len(notes))
		}
		met := "no"
		if r.met {
			met = "yes"
		}
		fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%s\t%s\t%s\n", r.figure, r.n, r.median, r.p90, r.reference, r.relation, r.goal, met)
	}
	w.Flush()
	for i, note := range notes {
		fmt.Printf("[%d] %s\n", i+1, note)
	}
}
