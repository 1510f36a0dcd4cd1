package cli

import (
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// terminal is where a command prints: results on out, progress and errors on err.
type terminal struct{ out, err io.Writer }

// isTerminal tells whether people see what is written to w as it comes.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// colours are what may be printed.
type colours int

const (
	noColours colours = iota
	palette256
	trueColour
)

// coloursOf follows NO_COLOR (no-color.org) and what the terminal says of itself.
func coloursOf(w io.Writer) colours {
	term := os.Getenv("TERM")
	switch {
	case os.Getenv("NO_COLOR") != "" || term == "dumb" || !isTerminal(w):
		return noColours
	case os.Getenv("COLORTERM") == "truecolor" || os.Getenv("COLORTERM") == "24bit":
		return trueColour
	}
	return palette256
}

// columnsOf is the width of a terminal, or what fits a page.
func columnsOf(w io.Writer) int {
	const page = 100
	if f, ok := w.(*os.File); ok {
		if size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil && size.Col > 0 {
			return int(size.Col)
		}
	}
	return page
}

// progress rewrites one line of a terminal; elsewhere it is silent.
type progress struct {
	w    io.Writer
	live bool
}

func newProgress(w io.Writer) *progress { return &progress{w: w, live: isTerminal(w)} }

func (p *progress) show(format string, args ...any) {
	if p.live {
		fmt.Fprint(p.w, "\r\x1b[K", fmt.Sprintf(format, args...))
	}
}

func (p *progress) clear() { p.show("") }

// bar shows how much of all is done.
func (p *progress) bar(what string, done, all float64) {
	const width = 30
	cells := int(done / all * width)
	p.show("[%s%s] %s", strings.Repeat("=", cells), strings.Repeat(" ", width-cells), what)
}

// table aligns columns: the first, which are text, to the left, all others to the right.
type table struct {
	header []string
	text   int // columns of text
	rows   [][]string
}

func (t *table) add(cells ...string) { t.rows = append(t.rows, cells) }

func (t *table) widths() []int {
	widths := make([]int, len(t.header))
	for _, row := range append([][]string{t.header}, t.rows...) {
		for i, cell := range row {
			widths[i] = max(widths[i], len([]rune(cell)))
		}
	}
	return widths
}

func (t *table) print(w io.Writer) {
	widths := t.widths()
	for _, row := range append([][]string{t.header}, t.rows...) {
		var line strings.Builder
		for i, cell := range row {
			if i < t.text {
				fmt.Fprintf(&line, "%-*s  ", widths[i], cell)
			} else {
				fmt.Fprintf(&line, "%*s  ", widths[i], cell)
			}
		}
		fmt.Fprintln(w, strings.TrimRight(line.String(), " "))
	}
}

func (t *table) markdown(w io.Writer) {
	fmt.Fprintf(w, "| %s |\n|%s%s\n", strings.Join(t.header, " | "),
		strings.Repeat("---|", t.text), strings.Repeat("---:|", len(t.header)-t.text))
	for _, row := range t.rows {
		fmt.Fprintf(w, "| %s |\n", strings.Join(row, " | "))
	}
}

// share is a number in [0, 1] that matters near 1.
func share(x float64) string { return fmt.Sprintf("%.3f", x) }

// tokens is a mean number of tokens.
func tokens(x float64) string { return fmt.Sprintf("%.1f", x) }

// relErr is a relative error, whatever its size.
func relErr(x float64) string {
	if x != 0 && x < 1e-3 {
		return fmt.Sprintf("%.1e", x)
	}
	return fmt.Sprintf("%.4f", x)
}
