package figure

import (
	"bytes"
	"encoding/xml"
	"image/png"
	"strings"
	"testing"
)

func some() []Series {
	return []Series{
		{Method: "quest", Points: []Point{{256, .2, .3}, {1024, .03, .8}}},
		{Method: "quest", Pruner: "top_p 0.85", Points: []Point{{60, .25, .2}}},
		{Method: "streaming", Points: []Point{{4, 3, 0}, {256, 0, 1}}}, // beyond the scale
		{Method: "oracle_topk", Pruner: "top_p 0.95", Points: []Point{{.5, .1, .9}}},
	}
}

func TestSVG(t *testing.T) {
	t.Parallel()
	var file bytes.Buffer
	if err := Write(&file, "svg", some()); err != nil {
		t.Fatal(err)
	}
	texts := make(map[string]int)
	for d := xml.NewDecoder(&file); ; {
		token, err := d.Token()
		if token == nil {
			if err.Error() != "EOF" {
				t.Fatal(err)
			}
			break
		}
		if text, ok := token.(xml.CharData); ok {
			texts[strings.TrimSpace(string(text))]++
		}
	}
	// A panel of each method for both figures.
	for text, times := range map[string]int{
		"quest": 2, "streaming": 2, "oracle_topk": 2, "head error": 1, "worst mass": 1, "mean kept tokens": 6,
		"fixed budgets": 1, "top_p 0.85": 1, "top_p 0.95": 1,
	} {
		if texts[text] != times {
			t.Errorf("%q stands there %d times, want %d", text, texts[text], times)
		}
	}
}

func TestPNG(t *testing.T) {
	t.Parallel()
	var file bytes.Buffer
	if err := Write(&file, "png", some()); err != nil {
		t.Fatal(err)
	}
	image, err := png.Decode(&file)
	if err != nil {
		t.Fatal(err)
	}
	colours := make(map[[3]uint32]bool)
	for y := range image.Bounds().Dy() {
		for x := range image.Bounds().Dx() {
			r, g, b, _ := image.At(x, y).RGBA()
			colours[[3]uint32{r >> 8, g >> 8, b >> 8}] = true
		}
	}
	for _, style := range pruners[:2] {
		r, g, b, _ := style.RGBA()
		if !colours[[3]uint32{r >> 8, g >> 8, b >> 8}] {
			t.Errorf("no point has colour %v", style.Color)
		}
	}
}

func TestNothing(t *testing.T) {
	t.Parallel()
	for _, series := range [][]Series{nil, {{Method: "quest", Points: []Point{{100, .1, .5}}}}} {
		if err := Write(&bytes.Buffer{}, "svg", series); err != nil {
			t.Errorf("%d series: %v", len(series), err)
		}
	}
	if err := Write(&bytes.Buffer{}, "gif", nil); err == nil {
		t.Error("a format that nobody knows is drawn")
	}
}
