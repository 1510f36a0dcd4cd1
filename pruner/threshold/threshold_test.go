package threshold

import (
	"errors"
	"math"
	"slices"
	"testing"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/pruner"
)

func TestPrune(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		t      float64
		first  float32
		logits []float32
		want   []int32
	}{
		"above first - t":            {3, 5, []float32{5, 2.5, 1, 9}, []int32{0, 1, 3}},
		"equal is not above":         {3, 5, []float32{5, 2, 1}, []int32{0}},
		"negative t":                 {-1, 5, []float32{5, 6, 6.5, 7}, []int32{2, 3}},
		"first is no candidate":      {1, 10, []float32{5, 9.5, 1}, []int32{1}},
		"none passes: the largest":   {1, 10, []float32{5, 8, 1, 8}, []int32{1}},
		"none passes, all negative":  {0, 0, []float32{-5, -1, -2}, []int32{1}},
		"one candidate, far too low": {1, 10, []float32{-100}, []int32{0}},
	} {
		p := (&Config{Threshold: test.t}).New()
		got := p.Prune([]int32{-7}, &pruner.Candidates{Logits: test.logits, FirstLogit: test.first})
		if got[0] != -7 || !slices.Equal(got[1:], test.want) {
			t.Errorf("%s: kept %v, want %v after what was there", name, got, test.want)
		}
	}
}

func TestThresholds(t *testing.T) {
	t.Parallel()
	config := &Config{Threshold: 3}
	config.ThresholdByLayer = map[string]float64{"2": 1}
	config.ThresholdByHead = map[string][]float64{"3": {0, 2}}
	p := config.New()
	for _, test := range []struct{ layer, head, want int }{{0, 0, 3}, {2, 0, 1}, {3, 0, 0}, {3, 1, 2}} {
		c := &pruner.Candidates{Layer: test.layer, QueryHead: test.head, Logits: []float32{4.5, 3.5, 2.5, 1.5}, FirstLogit: 5}
		if got := p.Prune(nil, c); len(got) != max(1, test.want) {
			t.Errorf("%+v: kept %v", test, got)
		}
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	for _, x := range []float64{-3, 0, 12.5} {
		if err := (&Config{Threshold: x}).Validate(); err != nil {
			t.Errorf("t %v: %v", x, err)
		}
	}
	for _, c := range []pruner.Config{Method().Default(), &Config{Threshold: math.Inf(1)}, &Config{Threshold: -1e300}} {
		var f *fault.Error
		if err := c.Validate(); !errors.As(err, &f) || f.Field != "threshold" {
			t.Errorf("%+v: error %v, want one about threshold", c, err)
		}
	}
}
