package main

// screen.go: terminals: how many columns a text takes there, and the screen of `rdhpf status -watch`.

import (
	"errors"
	"io"
	"os"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// wideRunes take two columns: those with East_Asian_Width W or F in EastAsianWidth.txt of Unicode 15.0. Ranges are joined
// where nothing printable lies between them.
var wideRunes = &unicode.RangeTable{
	R16: []unicode.Range16{{0x1100, 0x115f, 1}, {0x231a, 0x231b, 1}, {0x2329, 0x232a, 1}, {0x23e9, 0x23ec, 1}, {0x23f0, 0x23f0, 1},
		{0x23f3, 0x23f3, 1}, {0x25fd, 0x25fe, 1}, {0x2614, 0x2615, 1}, {0x2648, 0x2653, 1}, {0x267f, 0x267f, 1}, {0x2693, 0x2693, 1},
		{0x26a1, 0x26a1, 1}, {0x26aa, 0x26ab, 1}, {0x26bd, 0x26be, 1}, {0x26c4, 0x26c5, 1}, {0x26ce, 0x26ce, 1}, {0x26d4, 0x26d4, 1},
		{0x26ea, 0x26ea, 1}, {0x26f2, 0x26f3, 1}, {0x26f5, 0x26f5, 1}, {0x26fa, 0x26fa, 1}, {0x26fd, 0x26fd, 1}, {0x2705, 0x2705, 1},
		{0x270a, 0x270b, 1}, {0x2728, 0x2728, 1}, {0x274c, 0x274c, 1}, {0x274e, 0x274e, 1}, {0x2753, 0x2755, 1}, {0x2757, 0x2757, 1},
		{0x2795, 0x2797, 1}, {0x27b0, 0x27b0, 1}, {0x27bf, 0x27bf, 1}, {0x2b1b, 0x2b1c, 1}, {0x2b50, 0x2b50, 1}, {0x2b55, 0x2b55, 1},
		{0x2e80, 0x303e, 1}, {0x3041, 0x3247, 1}, {0x3250, 0x4dbf, 1}, {0x4e00, 0xa4c6, 1}, {0xa960, 0xa97c, 1}, {0xac00, 0xd7a3, 1},
		{0xf900, 0xfad9, 1}, {0xfe10, 0xfe6b, 1}, {0xff01, 0xff60, 1}, {0xffe0, 0xffe6, 1}},
	R32: []unicode.Range32{{0x16fe0, 0x1b2fb, 1}, {0x1f004, 0x1f004, 1}, {0x1f0cf, 0x1f0cf, 1}, {0x1f18e, 0x1f18e, 1},
		{0x1f191, 0x1f19a, 1}, {0x1f200, 0x1f320, 1}, {0x1f32d, 0x1f335, 1}, {0x1f337, 0x1f37c, 1}, {0x1f37e, 0x1f393, 1},
		{0x1f3a0, 0x1f3ca, 1}, {0x1f3cf, 0x1f3d3, 1}, {0x1f3e0, 0x1f3f0, 1}, {0x1f3f4, 0x1f3f4, 1}, {0x1f3f8, 0x1f43e, 1},
		{0x1f440, 0x1f440, 1}, {0x1f442, 0x1f4fc, 1}, {0x1f4ff, 0x1f53d, 1}, {0x1f54b, 0x1f54e, 1}, {0x1f550, 0x1f567, 1},
		{0x1f57a, 0x1f57a, 1}, {0x1f595, 0x1f596, 1}, {0x1f5a4, 0x1f5a4, 1}, {0x1f5fb, 0x1f64f, 1}, {0x1f680, 0x1f6c5, 1},
		{0x1f6cc, 0x1f6cc, 1}, {0x1f6d0, 0x1f6d2, 1}, {0x1f6d5, 0x1f6df, 1}, {0x1f6eb, 0x1f6ec, 1}, {0x1f6f4, 0x1f6fc, 1},
		{0x1f7e0, 0x1f7f0, 1}, {0x1f90c, 0x1f93a, 1}, {0x1f93c, 0x1f945, 1}, {0x1f947, 0x1f9ff, 1}, {0x1fa70, 0x1faf8, 1},
		{0x20000, 0x323af, 1}},
}

// runeColumns returns how many columns a printable rune takes. Combining marks take none, nor do the vowels and finals of
// conjoining Hangul.
func runeColumns(r rune) int {
	switch {
	case r < 0x300:
		return 1
	case unicode.In(r, unicode.Mn, unicode.Me), r >= 0x1160 && r <= 0x11ff:
		return 0
	case unicode.Is(wideRunes, r):
		return 2
	}
	return 1
}

// textColumns returns how many columns a text takes. Our own escape sequences, for colours, take none.
func textColumns(s string) (n int) {
	escape := false
	for _, r := range s {
		if escape = escape || r == '\x1b'; !escape {
			n += runeColumns(r)
		}
		escape = escape && r != 'm'
	}
	return n
}

// cut returns as much of s as fits into width columns, with … for the rest. Escape sequences stay, so that no colour does.
func cut(s string, width int) string {
	if textColumns(s) <= width {
		return s
	}
	var b strings.Builder
	used, escape := 0, false
	for _, r := range s {
		if escape = escape || r == '\x1b'; escape {
			b.WriteRune(r)
		} else if used < width {
			if used += runeColumns(r); used < width {
				b.WriteRune(r)
			} else {
				b.WriteRune('…')
				used = width
			}
		}
		escape = escape && r != 'm'
	}
	return b.String()
}

// cutFront returns the end of s, as much as fits into width columns, with … for the rest.
func cutFront(s string, width int) string {
	if textColumns(s) <= width {
		return s
	}
	for textColumns(s) >= width && s != "" {
		_, size := utf8.DecodeRuneInString(s)
		s = s[size:]
	}
	return "…" + s
}

// isTerminal says whether f is one: only terminals have a size.
func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	return err == nil
}

// terminalSize returns the size of a terminal, 0 where it is not known or f is none.
func terminalSize(f *os.File) (columns, rows int) {
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0, 0
	}
	return int(size.Col), int(size.Row)
}

// screen is a screen of our own on the terminal, in place of the shell's. Where stdin is a terminal, too, keys come at
// once and are not echoed.
type screen struct {
	w     io.Writer
	on    bool
	modes *unix.Termios // of stdin before; nil: it is no terminal
}

// enter also takes the screen back from a shell that took it unasked, after a SIGSTOP.
func (s *screen) enter() error {
	if modes, err := unix.IoctlGetTermios(int(os.Stdin.Fd()), getModes); err == nil {
		if !s.on {
			before := *modes
			s.modes = &before
		}
		modes.Lflag &^= unix.ICANON | unix.ECHO
		modes.Cc[unix.VMIN], modes.Cc[unix.VTIME] = 1, 0
		unix.IoctlSetTermios(int(os.Stdin.Fd()), setModes, modes)
	}
	s.on = true
	_, err := io.WriteString(s.w, "\x1b[?1049h\x1b[?25l\x1b[?7l")
	return err
}

func (s *screen) leave() {
	if !s.on {
		return
	}
	s.on = false
	io.WriteString(s.w, "\x1b[?7h\x1b[?25h\x1b[?1049l")
	if s.modes != nil {
		unix.IoctlSetTermios(int(os.Stdin.Fd()), setModes, s.modes)
	}
}

// suspend gives the shell its screen and stops the process. SIGTSTP would not stop it, for the runtime never gives up the
// handler of a signal that was once caught; SIGSTOP would do so even where no shell could continue it.
func (s *screen) suspend() {
	s.leave()
	unix.Kill(os.Getpid(), unix.SIGTTOU)
}

// draw shows as much of a text as there is room for, if the terminal is ours. Again takes it back first.
func (s *screen) draw(text string, again bool) error {
	group, err := unix.IoctlGetInt(int(os.Stdout.Fd()), unix.TIOCGPGRP)
	if inBackground := err == nil && group != unix.Getpgrp(); inBackground || !s.on && !again {
		return nil
	}
	if again {
		if err := s.enter(); err != nil {
			return err
		}
	}
	columns, rows := terminalSize(os.Stdout)
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	if rows > 0 && len(lines) > rows {
		lines = append(lines[:rows-1], "…")
	}
	for i, line := range lines {
		if columns > 0 {
			lines[i] = cut(line, columns)
		}
	}
	// Each line is cleared before it is written: after a full one the cursor still stands on its last character.
	text = "\x1b[H\x1b[K" + strings.Join(lines, "\r\n\x1b[K")
	if len(lines) != rows {
		text += "\r\n\x1b[J"
	}
	_, err = io.WriteString(s.w, text)
	return err
}

// readKeys sends what is typed until f ends.
func readKeys(f *os.File, keys chan<- byte) {
	buf := make([]byte, 1)
	for {
		if _, err := f.Read(buf); err != nil {
			return
		}
		keys <- buf[0]
	}
}

// awaitHangup closes gone once nobody can read any more what is written to f.
func awaitHangup(f *os.File, gone chan<- struct{}) {
	for {
		fds := []unix.PollFd{{Fd: int32(f.Fd())}}
		_, err := unix.Poll(fds, -1)
		switch {
		case errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN):
		case err == nil && fds[0].Revents&(unix.POLLERR|unix.POLLHUP) != 0:
			close(gone)
			return
		default: // this system cannot tell
			return
		}
	}
}
