package cli

import (
	"fmt"
	"io"
	"strings"
)

// grid shows numbers on a terminal, layers down and heads across. Negative ones are not known.
type grid struct {
	scale
	layers []int
	cells  [][]float64
	format func(float64) string
	unit   string // stands behind the scale
}

// text is a number's, "-" if it is not known.
func (g *grid) text(x float64) string {
	if x < 0 {
		return "-"
	}
	return g.format(x)
}

// number is a right-aligned number on its colour, or behind its shade.
func (g *grid) number(x float64, digits int, depth colours) string {
	text := fmt.Sprintf("%*s", digits, g.text(x))
	switch {
	case depth == noColours:
		return g.swatch(x, depth) + " " + text
	case x < 0:
		return " " + text + " "
	}
	return colour(g.level(x)).background(depth) + " " + text + " \x1b[0m"
}

func (g *grid) swatch(x float64, depth colours) string {
	if x < 0 {
		return " "
	}
	return swatch(g.level(x), depth)
}

// print draws the grid with numbers in its cells, or without where they do not fit.
func (g *grid) print(w io.Writer, depth colours, columns int) {
	const label = "layer %3d  "
	indent := len(fmt.Sprintf(label, 0))
	heads, digits := 0, 0
	for _, row := range g.cells {
		heads = max(heads, len(row))
		for _, x := range row {
			digits = max(digits, len(g.text(x)))
		}
	}
	if heads == 0 || digits == 0 {
		fmt.Fprintf(w, "%*snothing is known yet: %s\n", indent, "", g.unit)
		return
	}
	numbers := indent+heads*(digits+3) <= columns

	var head strings.Builder
	fmt.Fprintf(&head, "%*s", indent, "head  ")
	for h := range heads {
		switch {
		case numbers && depth == noColours:
			fmt.Fprintf(&head, "%*d ", digits+2, h)
		case numbers:
			fmt.Fprintf(&head, "%*d  ", digits+1, h)
		case h%10 == 0:
			fmt.Fprintf(&head, "%-10d", h)
		}
	}
	fmt.Fprintln(w, strings.TrimRight(head.String(), " "))
	for i, row := range g.cells {
		fmt.Fprintf(w, label, g.layers[i])
		for j, x := range row {
			switch {
			case !numbers:
				fmt.Fprint(w, g.swatch(x, depth))
				continue
			case j > 0:
				fmt.Fprint(w, " ")
			}
			fmt.Fprint(w, g.number(x, digits, depth))
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintf(w, "\n%*s%s ", indent, "", g.format(g.least))
	const steps = 2 * len(cividis)
	for i := range steps {
		fmt.Fprint(w, swatch(float64(i)/float64(steps-1), depth))
	}
	fmt.Fprintf(w, " %s %s\n", g.format(g.most), g.unit)
}

// sparkline draws numbers in a line, from 0 up.
func sparkline(numbers []float64) string {
	bars := []rune("▁▂▃▄▅▆▇█")
	most := 0.0
	for _, x := range numbers {
		most = max(most, x)
	}
	var line strings.Builder
	for _, x := range numbers {
		level := 0
		if most > 0 {
			level = min(int(x/most*float64(len(bars))), len(bars)-1)
		}
		line.WriteRune(bars[level])
	}
	return line.String()
}
