// Package figure draws what methods give for the tokens that they keep: the error of their outputs, and the
// attention that the worst row keeps. Each method has a panel, with the fixed budgets of all others behind
// its own, so that panels compare.
package figure

import (
	"bytes"
	"image/color"
	"io"
	"math"
	"slices"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

// Point is a run of a method.
type Point struct {
	Kept      float64 // mean tokens
	HeadError float64 // mean relative error of the outputs of single heads
	WorstMass float64 // least share of the attention that a row keeps
}

// Series is a method with several budgets of candidates.
type Series struct {
	Method string // names the panel
	Pruner string // "" for none: all candidates are kept, a fixed budget
	Points []Point
}

// metric is what rows of panels show.
type metric struct {
	label     string
	of        func(Point) float64
	scale     plot.Normalizer
	ticks     plot.ConstantTicks
	low, high float64
}

var metrics = [...]metric{
	{
		"head error", func(p Point) float64 { return p.HeadError },
		plot.LogScale{},
		plot.ConstantTicks{
			{Value: .01, Label: "0.01"}, {Value: .03, Label: "0.03"}, {Value: .1, Label: "0.1"}, {Value: .3, Label: "0.3"}, {Value: 1, Label: "1"},
		},
		.008, 1,
	},
	{
		"worst mass", func(p Point) float64 { return p.WorstMass },
		plot.LinearScale{},
		plot.ConstantTicks{{Value: 0, Label: "0"}, {Value: .5, Label: "0.5"}, {Value: 1, Label: "1"}},
		0, 1,
	},
}

var tens = plot.ConstantTicks{
	{Value: 1, Label: "1"},
	{Value: 10, Label: "10"},
	{Value: 100, Label: "100"},
	{Value: 1000, Label: "1000"},
	{Value: 10000, Label: "10k"},
	{Value: 100000, Label: "100k"},
}

// Colours that people with and without colour blindness tell apart (Okabe and Ito, Color Universal Design,
// 2008); shapes tell pruners apart besides.
var (
	fixed   = color.RGBA{0, 114, 178, 255}
	others  = draw.GlyphStyle{Color: color.RGBA{200, 200, 200, 255}, Shape: draw.CircleGlyph{}, Radius: 1}
	grid    = color.RGBA{238, 238, 238, 255}
	pruners = []draw.GlyphStyle{
		{Color: color.RGBA{213, 94, 0, 255}, Shape: draw.CircleGlyph{}},
		{Color: color.RGBA{0, 158, 115, 255}, Shape: draw.PyramidGlyph{}},
		{Color: color.RGBA{204, 121, 167, 255}, Shape: draw.BoxGlyph{}},
		{Color: color.RGBA{230, 159, 0, 255}, Shape: draw.CrossGlyph{}},
	}
)

const (
	columns                 = 5
	panelWidth, panelHeight = 146, 140 // points, as all lengths
	titleHeight             = 20
	legendHeight            = 26
	textSize                = 10
)

// Write draws the series in a format, "svg" or "png".
func Write(w io.Writer, format string, series []Series) error {
	methods, prunes := names(series)
	across := min(columns, max(1, len(methods)))
	down := (len(methods) + across - 1) / across
	var panels [][]*plot.Plot
	for _, m := range metrics {
		for row := range down {
			line := make([]*plot.Plot, across)
			for column := range line {
				i := row*across + column
				if i >= len(methods) {
					continue
				}
				p, err := m.panel(methods[i], series, prunes)
				if err != nil {
					return err
				}
				if column == 0 {
					p.Y.Label.Text = m.label
				}
				if i+across >= len(methods) {
					p.X.Label.Text = "mean kept tokens"
				}
				line[column] = p
			}
			panels = append(panels, line)
		}
	}

	width, height := vg.Length(max(across, 3)*panelWidth), vg.Length(len(panels)*panelHeight+legendHeight)
	file, err := draw.NewFormattedCanvas(width, height, format)
	if err != nil {
		return err
	}
	canvas := draw.New(file)
	canvas.SetColor(color.White)
	canvas.Fill(canvas.Path())
	legend(draw.Crop(canvas, 0, 0, height-legendHeight, 0), prunes)
	if len(panels) > 0 && down > 0 {
		tiles := draw.Tiles{
			Rows: len(panels), Cols: across, PadX: 8, PadY: titleHeight, PadLeft: 4, PadRight: 8, PadTop: titleHeight, PadBottom: 4,
		}
		title := panels[0][0].Title.TextStyle
		title.Font, title.XAlign, title.YAlign = sans(textSize+1), draw.XCenter, draw.YBottom
		for i, line := range plot.Align(panels, tiles, draw.Crop(canvas, 0, 0, 0, -legendHeight)) {
			for j, at := range line {
				if p := panels[i][j]; p != nil {
					p.Draw(at)
					// The plot's own would stand in the middle of panel and axis together.
					data := p.DataCanvas(at)
					at.FillText(title, vg.Point{X: data.Center().X, Y: data.Max.Y + 6}, methods[i%down*across+j])
				}
			}
		}
	}
	var drawn bytes.Buffer
	if _, err := file.WriteTo(&drawn); err != nil {
		return err
	}
	// Where the font is missing, one of the same widths does.
	_, err = io.WriteString(w, strings.ReplaceAll(drawn.String(),
		"font-family:Liberation Sans;", "font-family:Liberation Sans,Arial,Helvetica,sans-serif;"))
	return err
}

// names lists the methods and the pruners, each once.
func names(series []Series) (methods, prunes []string) {
	for _, s := range series {
		if !slices.Contains(methods, s.Method) {
			methods = append(methods, s.Method)
		}
		if s.Pruner != "" && !slices.Contains(prunes, s.Pruner) {
			prunes = append(prunes, s.Pruner)
		}
	}
	slices.Sort(methods)
	slices.Sort(prunes)
	return methods, prunes
}

// panel shows a method.
func (m *metric) panel(method string, series []Series, prunes []string) (*plot.Plot, error) {
	p := plot.New()
	for _, axis := range []*plot.Axis{&p.X, &p.Y} {
		axis.Label.TextStyle.Font, axis.Tick.Label.Font = sans(textSize), sans(textSize-1)
		axis.Padding, axis.Width, axis.Tick.Width = 0, .5, .5
	}
	p.X.Scale, p.X.Tick.Marker = plot.LogScale{}, tens
	p.X.Min, p.X.Max = extent(series)
	p.Y.Scale, p.Y.Tick.Marker, p.Y.Min, p.Y.Max = m.scale, m.ticks, m.low, m.high
	lines := plotter.NewGrid()
	lines.Vertical.Color, lines.Horizontal.Color = grid, grid
	p.Add(lines)
	for _, s := range series {
		if s.Pruner == "" && s.Method != method {
			if err := m.add(p, s.Points, others, .8); err != nil {
				return nil, err
			}
		}
	}
	for _, s := range series {
		if s.Method != method {
			continue
		}
		style, width := draw.GlyphStyle{Color: fixed, Shape: draw.CircleGlyph{}, Radius: 1.5}, vg.Length(1.5)
		if s.Pruner != "" {
			style, width = pruners[slices.Index(prunes, s.Pruner)%len(pruners)], .5
			style.Radius = 2.6
		}
		if err := m.add(p, s.Points, style, width); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// add draws points, and a line through them.
func (m *metric) add(p *plot.Plot, points []Point, style draw.GlyphStyle, width vg.Length) error {
	xys := make(plotter.XYs, len(points))
	for i, at := range points {
		xys[i] = plotter.XY{X: max(1, at.Kept), Y: min(max(m.of(at), m.low), m.high)}
	}
	slices.SortFunc(xys, func(a, b plotter.XY) int { return int(math.Copysign(1, a.X-b.X)) })
	line, dots, err := plotter.NewLinePoints(xys)
	if err != nil {
		return err
	}
	line.Color, line.Width, dots.GlyphStyle = style.Color, width, style
	p.Add(line)
	if style != others || len(points) == 1 {
		p.Add(dots)
	}
	return nil
}

// extent is the range of kept tokens, with some room.
func extent(series []Series) (least, most float64) {
	least, most = math.Inf(1), 2
	for _, s := range series {
		for _, p := range s.Points {
			least, most = min(least, p.Kept), max(most, p.Kept)
		}
	}
	const room = 1.3
	return max(1, min(least, most/2)/room), most * room
}

// legend tells in a line what the styles mean.
func legend(at draw.Canvas, prunes []string) {
	type entry struct {
		name  string
		style draw.GlyphStyle
		width vg.Length
	}
	entries := []entry{
		{"fixed budgets", draw.GlyphStyle{Color: fixed, Shape: draw.CircleGlyph{}, Radius: 1.5}, 1.5},
		{"of other methods", others, .8},
	}
	for i, name := range prunes {
		style := pruners[i%len(pruners)]
		style.Radius = 2.6
		entries = append(entries, entry{name, style, .5})
	}
	width := at.Size().X / vg.Length(len(entries))
	for i, e := range entries {
		l := plot.NewLegend()
		l.Top, l.Left, l.YOffs, l.XOffs, l.Padding = true, true, -6, 8, 4
		l.TextStyle.Font = sans(textSize)
		l.Add(e.name, &plotter.Line{LineStyle: draw.LineStyle{Color: e.style.Color, Width: e.width}}, &plotter.Scatter{GlyphStyle: e.style})
		from := vg.Length(i) * width
		l.Draw(draw.Crop(at, from, from+width-at.Size().X, 0, 0))
	}
}

func sans(size vg.Length) font.Font {
	return font.Font{Typeface: "Liberation", Variant: "Sans", Size: size}
}
