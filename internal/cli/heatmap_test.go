package cli

import (
	"bytes"
	"math"
	"strings"
	"testing"

	"github.com/twilight-sidecar/twilight/internal/replay"
)

// report has layers x heads cells, cell i of which keeps start*factor^i tokens.
func report(layers, heads int, start, factor float64) *replay.Report {
	r := &replay.Report{Figures: replay.Figures{Steps: 1}, Facts: replay.Facts{Tokens: 1000, KVHeads: 1}}
	for l := range layers {
		layer := replay.Layer{Layer: l}
		for h := range heads {
			layer.Heads = append(layer.Heads, replay.Head{Head: h, Kept: start * math.Pow(factor, float64(l*heads+h))})
		}
		r.Layers = append(r.Layers, layer)
	}
	return r
}

func TestScale(t *testing.T) {
	t.Parallel()
	m := newHeatmap(report(1, 5, 1, 10))
	for i, want := range []float64{0, .25, .5, .75, 1} {
		kept := math.Pow(10, float64(i))
		if got := m.level(kept); math.Abs(got-want) > 1e-9 || math.Abs(m.at(got)-kept) > 1e-6 {
			t.Errorf("level of %v is %v, want %v", kept, got, want)
		}
	}
	if flat := newHeatmap(report(2, 2, 30, 1)); flat.level(30) != 0 || flat.at(0.5) != 30 {
		t.Error("a map of one number has no scale")
	}
}

// Lighter means more, on any terminal, and text can be read on every colour.
func TestColours(t *testing.T) {
	t.Parallel()
	light := func(c rgb) float64 { return .299*float64(c.r) + .587*float64(c.g) + .114*float64(c.b) }
	for i := range 100 {
		a, b := colour(float64(i)/100), colour(float64(i+1)/100)
		if light(a) >= light(b) {
			t.Errorf("level %d is %v, the next %v", i, a, b)
		}
	}
	if colour(0) != cividis[0] || colour(1) != cividis[len(cividis)-1] {
		t.Errorf("ends are %v and %v", colour(0), colour(1))
	}
	if (rgb{0, 0, 0}).cube() != 16 || (rgb{255, 255, 255}).cube() != 231 || (rgb{255, 0, 0}).cube() != 196 {
		t.Error("wrong place in the colour cube")
	}
}

func TestHeatmapPrint(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name    string
		r       *replay.Report
		depth   colours
		columns int
		want    string
	}{
		{"numbers", report(2, 2, 1, 5), noColours, 80, "" +
			"     head      0     1\n" +
			"layer   0      1 ░   5\n" +
			"layer   1  ▓  25 █ 125\n"},
		{"narrow", report(1, 20, 1, 2), noColours, 40, "" +
			"     head  0         10\n" +
			"layer   0     ░░░░░▒▒▒▒▓▓▓▓▓███\n"},
		{"256 colours", report(1, 2, 1, 5), palette256, 80, "\x1b[48;5;"},
		{"true colour", report(1, 2, 1, 5), trueColour, 80, "\x1b[48;2;254;232;56m\x1b[38;2;0;0;0m 5 \x1b[0m\n"},
	} {
		var out bytes.Buffer
		newHeatmap(tc.r).print(&out, tc.depth, tc.columns)
		if !strings.Contains(out.String(), tc.want) {
			t.Errorf("%s: printed\n%s", tc.name, out.String())
		}
	}
}

func TestTable(t *testing.T) {
	t.Parallel()
	x := table{text: 1, header: []string{"name", "n"}}
	x.add("a", "100")
	x.add("löng", "")
	var plain, markdown bytes.Buffer
	x.print(&plain)
	x.markdown(&markdown)
	if want := "name    n\na     100\nlöng\n"; plain.String() != want {
		t.Errorf("printed %q, want %q", plain.String(), want)
	}
	if want := "| name | n |\n|---|---:|\n| a | 100 |\n| löng |  |\n"; markdown.String() != want {
		t.Errorf("printed %q, want %q", markdown.String(), want)
	}
}

func TestNumbers(t *testing.T) {
	t.Parallel()
	for got, want := range map[string]string{
		relErr(0): "0.0000", relErr(.0123): "0.0123", relErr(.000123): "1.2e-04", share(.9999): "1.000", tokens(12.34): "12.3",
		bytesText(1023): "1023 B", bytesText(1536): "1.5 KiB", bytesText(1 << 40): "1.0 TiB", bytesText(1 << 50): "1024.0 TiB",
	} {
		if got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}
