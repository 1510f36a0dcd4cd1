package cli

import (
	"fmt"
	"html"
	"io"
	"math"
	"strings"

	"github.com/twilight-sidecar/twilight/internal/replay"
)

// scale maps numbers to levels, 0 for the least to 1 for the most of them.
type scale struct {
	least, most float64
	logarithmic bool
}

// scaleOf spans numbers that are not negative, which stands for unknown. A logarithmic scale begins no
// lower than at floor, and a linear one has none.
func scaleOf(floor float64, rows ...[]float64) scale {
	s := scale{least: math.Inf(1), logarithmic: floor > 0}
	for _, row := range rows {
		for _, x := range row {
			if x >= 0 {
				s.least, s.most = min(s.least, max(x, floor)), max(s.most, x, floor)
			}
		}
	}
	return s
}

// level is where a number lies on the scale, in [0, 1].
func (s scale) level(x float64) float64 {
	switch {
	case !(s.most > s.least):
		return 0
	case s.logarithmic:
		return min(max(math.Log(x/s.least)/math.Log(s.most/s.least), 0), 1)
	}
	return min(max((x-s.least)/(s.most-s.least), 0), 1)
}

// at is the number at a level.
func (s scale) at(level float64) float64 {
	if s.logarithmic {
		return s.least * math.Pow(s.most/s.least, level)
	}
	return s.least + level*(s.most-s.least)
}

// heatmap shows kept tokens, layers down and query heads across, on a logarithmic scale.
type heatmap struct {
	scale
	report *replay.Report
	grid   grid
}

func newHeatmap(r *replay.Report) *heatmap {
	g := grid{
		format: func(x float64) string { return fmt.Sprintf("%.0f", x) },
		unit:   fmt.Sprintf("of %d tokens kept (logarithmic)", r.Facts.Tokens),
	}
	for _, l := range r.Layers {
		row := make([]float64, len(l.Heads))
		for i, h := range l.Heads {
			row[i] = h.Kept
		}
		g.layers, g.cells = append(g.layers, l.Layer), append(g.cells, row)
	}
	g.scale = scaleOf(1, g.cells...)
	return &heatmap{scale: g.scale, report: r, grid: g}
}

// print draws the map on a terminal.
func (m *heatmap) print(w io.Writer, depth colours, columns int) { m.grid.print(w, depth, columns) }

// rgb is a colour.
type rgb struct{ r, g, b uint8 }

// cividis is a scale that people see alike with and without colour blindness, dark to light
// (Nunez, Anderton and Renslow, PLoS ONE 13(7), 2018).
var cividis = [...]rgb{
	{0, 34, 78},
	{18, 53, 112},
	{59, 73, 108},
	{87, 93, 109},
	{112, 113, 115},
	{138, 134, 120},
	{165, 156, 116},
	{195, 179, 105},
	{225, 204, 85},
	{254, 232, 56},
}

func colour(level float64) rgb {
	at := level * float64(len(cividis)-1)
	i := min(int(at), len(cividis)-2)
	part := at - float64(i)
	mix := func(a, b uint8) uint8 { return uint8(math.Round(float64(a) + part*(float64(b)-float64(a)))) }
	from, to := cividis[i], cividis[i+1]
	return rgb{mix(from.r, to.r), mix(from.g, to.g), mix(from.b, to.b)}
}

func (c rgb) String() string { return fmt.Sprintf("#%02x%02x%02x", c.r, c.g, c.b) }

// dark tells whether white text reads better than black on the colour.
func (c rgb) dark() bool { return 299*int(c.r)+587*int(c.g)+114*int(c.b) < 128000 }

// background switches a terminal's colours.
func (c rgb) background(depth colours) string {
	text := rgb{0, 0, 0}
	if c.dark() {
		text = rgb{255, 255, 255}
	}
	if depth == trueColour {
		return fmt.Sprintf("\x1b[48;2;%d;%d;%dm\x1b[38;2;%d;%d;%dm", c.r, c.g, c.b, text.r, text.g, text.b)
	}
	return fmt.Sprintf("\x1b[48;5;%dm\x1b[38;5;%dm", c.cube(), text.cube())
}

// cube is the nearest colour of the 6x6x6 cube of a 256-colour terminal.
func (c rgb) cube() int {
	nearest := func(x uint8) int { return (int(x)*5 + 127) / 255 }
	return 16 + 36*nearest(c.r) + 6*nearest(c.g) + nearest(c.b)
}

// shades stand in for colours.
var shades = []string{" ", "░", "▒", "▓", "█"}

// swatch is a level's colour, or its shade.
func swatch(level float64, depth colours) string {
	if depth == noColours {
		return shades[int(math.Round(level*float64(len(shades)-1)))]
	}
	return colour(level).background(depth) + " \x1b[0m"
}

// svg draws the map as a picture.
func (m *heatmap) svg(w io.Writer) error {
	const (
		cellW, cellH, gap = 78, 52, 3
		left, margin      = 90, 24
		scaleW, scaleH    = 320, 14
		letterW, lineH    = 7, 19 // of a note, about
	)
	r := m.report
	layers, heads := len(r.Layers), len(r.Layers[0].Heads)
	title := "Tokens that each head keeps"
	notes := append([]string{
		fmt.Sprintf("%.0f of %d tokens hold %.1f%% of the attention (means of %d layers, %d heads and %d steps)",
			r.MeanKept, r.Facts.Tokens, 100*r.MeanTrueMass, layers, heads, r.Steps),
	}, strings.SplitAfter(summary(r.Config), arrow)...)
	width, top := max(left+heads*cellW, left+scaleW)+margin, 58+lineH*len(notes)+46
	for _, note := range notes {
		width = max(width, margin+letterW*len(note)+margin)
	}
	height := top + layers*cellH + 90

	var b strings.Builder
	text := func(x, y int, class, anchor, s string) {
		fmt.Fprintf(&b, `<text x="%d" y="%d" class="%s" text-anchor="%s">%s</text>`+"\n", x, y, class, anchor, html.EscapeString(s))
	}
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img" aria-label="%s">
<style>
text { font-family: system-ui, sans-serif; font-size: 13px; fill: #1f2328 }
.title { font-size: 18px; font-weight: 600 }
.note { font-size: 12px; fill: #59636e }
.kept { font-size: 16px; font-weight: 600 }
.mass { font-size: 11px }
.light { fill: #fff }
</style>
<rect width="100%%" height="100%%" fill="#fff"/>
`, width, height, width, height, title)
	text(margin, 34, "title", "start", title)
	for i, note := range notes {
		text(margin, 58+i*lineH, "note", "start", note)
	}

	group := heads / r.Facts.KVHeads
	for kv := range r.Facts.KVHeads {
		from, to := left+kv*group*cellW, left+(kv+1)*group*cellW-gap
		text((from+to)/2, top-36, "note", "middle", fmt.Sprintf("KV head %d", kv))
		fmt.Fprintf(&b, `<path d="M%d %dH%d" stroke="#8c959f"/>`+"\n", from+gap, top-29, to-gap)
	}
	for h := range heads {
		text(left+h*cellW+(cellW-gap)/2, top-10, "label", "middle", fmt.Sprintf("head %d", h))
	}
	for i, l := range r.Layers {
		y := top + i*cellH
		text(left-12, y+29, "label", "end", fmt.Sprintf("layer %d", l.Layer))
		for j, h := range l.Heads {
			x, c, light := left+j*cellW, colour(m.level(h.Kept)), ""
			if c.dark() {
				light = " light"
			}
			fmt.Fprintf(&b, "<g><title>layer %d, head %d: %.1f of %.1f candidates kept; they hold %.3f of the attention, "+
				"%.3f in the worst step; the output's error is %s</title>\n",
				l.Layer, h.Head, h.Kept, h.Candidates, h.TrueMass, h.WorstTrueMass, relErr(h.RelErr))
			fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%d" height="%d" rx="4" fill="%s"/>`+"\n", x, y, cellW-gap, cellH-gap, c)
			text(x+(cellW-gap)/2, y+24, "kept"+light, "middle", fmt.Sprintf("%.0f", h.Kept))
			text(x+(cellW-gap)/2, y+40, "mass"+light, "middle", fmt.Sprintf("%.1f%%", 100*h.TrueMass))
			b.WriteString("</g>\n")
		}
	}

	y := top + layers*cellH + 22
	b.WriteString(`<defs><linearGradient id="scale">`)
	for i, c := range cividis {
		fmt.Fprintf(&b, `<stop offset="%.3f" stop-color="%s"/>`, float64(i)/float64(len(cividis)-1), c)
	}
	fmt.Fprintf(&b, `</linearGradient></defs><rect x="%d" y="%d" width="%d" height="%d" rx="3" fill="url(#scale)"/>`+"\n",
		left, y, scaleW, scaleH)
	const marks = 4
	for i := range marks {
		level := float64(i) / (marks - 1)
		text(left+int(level*scaleW), y+scaleH+16, "note", "middle", fmt.Sprintf("%.0f", m.at(level)))
	}
	text(left, y+scaleH+36, "note", "start", "tokens kept (logarithmic); below, the share of the attention they hold")
	b.WriteString("</svg>\n")
	_, err := io.WriteString(w, b.String())
	return err
}
