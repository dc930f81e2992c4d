package main

import (
	"flag"
	"io"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

// The help on each command fits on a terminal, and its examples are commands that exist.
func TestHelp(t *testing.T) {
	texts := map[string]string{"": usage()}
	for _, c := range commands() {
		f := flag.NewFlagSet(c.name, flag.ContinueOnError)
		c.setup(f)
		texts[c.name] = c.help(f)
		for _, example := range c.examples {
			i := strings.Index(example, "rdhpf "+c.name)
			if i < 0 {
				t.Errorf("%s: example %q is of another command", c.name, example)
				continue
			}
			for _, word := range strings.Fields(strings.Trim(example[i:], `)"`)) {
				if word == "|" || word == "--" {
					break
				}
				if name, isFlag := strings.CutPrefix(word, "-"); isFlag && f.Lookup(strings.Trim(name, `)"`)) == nil {
					t.Errorf("%s: example %q has an unknown flag %s", c.name, example, word)
				}
			}
		}
	}
	for name, text := range texts {
		lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
		if len(lines) > 24 {
			t.Errorf("help on %q has %d lines", name, len(lines))
		}
		for _, line := range lines {
			if utf8.RuneCountInString(line) > 80 {
				t.Errorf("help on %q has a line of %d columns: %s", name, utf8.RuneCountInString(line), line)
			}
		}
	}
}

func TestParseWords(t *testing.T) {
	for _, c := range []struct {
		words       string
		args, after string // of after: - if there is no --
		host        string
		json        bool
		err         string
	}{
		{"", "", "-", "", false, ""},
		{"a b", "a b", "-", "", false, ""},
		{"a -json b", "a b", "-", "", true, ""},
		{"a -host h b -json", "a b", "-", "h", true, ""},
		{"--host=h a", "a", "-", "h", false, ""},
		{"a --", "a", "", "", false, ""},
		{"a -- b -json", "a", "b -json", "", false, ""},
		{"-- -json -- c", "", "-json -- c", "", false, ""},
		{"a -json -- b", "a", "b", "", true, ""},
		{"a -h", "", "-", "", false, flag.ErrHelp.Error()},
		{"a -host", "", "-", "", false, "-host needs a value: -host HOST: of it"},
		{"-jon", "", "-", "", false, "unknown flag -jon: did you mean -json?"},
		{"-trace", "", "-", "", false, "there is no -trace any more: use -log-level debug"},
		{"-json=1s", "", "-", "", false, `-json "1s": want true, false or no value`},
	} {
		f := flag.NewFlagSet("x", flag.ContinueOnError)
		host := f.String("host", "", "`HOST` of it")
		asJSON := f.Bool("json", false, "print it")
		args, after, err := parseWords(f, strings.Fields(c.words))
		text := ""
		if err != nil {
			text = err.Error()
		}
		got := strings.Join(after, " ")
		if after == nil {
			got = "-"
		}
		if text != c.err || err == nil && (strings.Join(args, " ") != c.args || got != c.after || *host != c.host || *asJSON != c.json) {
			t.Errorf("%q: args %q, after %q, host %q, json %v, %v", c.words, args, after, *host, *asJSON, err)
		}
	}
}

func TestDidYouMean(t *testing.T) {
	names := []string{"run", "status", "port", "stop", "completion"}
	for word, want := range map[string]string{"stat": "status", "st": "status", "stauts": "status", "prot": "port", "rum": "run", "compeltion": "completion",
		"s": "", "": "", "up": "", "ruin": "run", "exec": "", "statistics-of-everything": "", "run\x1b": "run"} {
		if want = strings.TrimPrefix("did you mean "+want+"?", "did you mean ?"); want == "" {
			want = "no"
		}
		if got := didYouMean(word, names, "no"); got != want {
			t.Errorf("%q: %s, want %s", word, got, want)
		}
	}
	for _, c := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"", "abc", 3}, {"abc", "", 3}, {"kitten", "sitting", 3}, {"flaw", "lawn", 2}, {"ab", "ba", 2}} {
		if got := edits(c.a, c.b); got != c.want {
			t.Errorf("from %q to %q: %d edits, want %d", c.a, c.b, got, c.want)
		}
	}
}

func FuzzParseWords(f *testing.F) {
	f.Add("-host h a -- b")
	f.Add("-json=maybe -host")
	f.Add("run -map 80 -\x00")
	f.Fuzz(func(t *testing.T, line string) {
		words := strings.Split(line, " ")
		for _, c := range commands() {
			fs := flag.NewFlagSet(c.name, flag.ContinueOnError)
			c.setup(fs)
			args, after, err := parseWords(fs, slices.Clone(words))
			if len(args)+len(after) > len(words) || err != nil && err.Error() == "" {
				t.Errorf("%q: %q, %q, %v", words, args, after, err)
			}
		}
		complete(io.Discard, words)
	})
}
