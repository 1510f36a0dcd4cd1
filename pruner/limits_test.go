package pruner

import (
	"errors"
	"testing"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
)

func isShare(x float64) bool { return x > 0 && x <= 1 }

func TestValidate(t *testing.T) {
	t.Parallel()
	for field, limits := range map[string]Limits{
		``:                                  {},
		`threshold_by_layer["x"]`:           {ThresholdByLayer: map[string]float64{"x": .5}},
		`threshold_by_layer["07"]`:          {ThresholdByLayer: map[string]float64{"07": .5}},
		`threshold_by_layer["-1"]`:          {ThresholdByLayer: map[string]float64{"-1": .5, "2": .5}},
		`threshold_by_layer["3"]`:           {ThresholdByLayer: map[string]float64{"3": 2}},
		`threshold_by_head[""]`:             {ThresholdByHead: map[string][]float64{"": nil}},
		`threshold_by_head["3"][1]`:         {ThresholdByHead: map[string][]float64{"3": {.5, 0}}},
		`min_budget`:                        {MinBudget: -1},
		`max_budget`:                        {MinBudget: 5, MaxBudget: 4},
		`threshold_by_layer["99999999999"]`: {ThresholdByLayer: map[string]float64{"99999999999": .5}},
	} {
		f, _ := errors.AsType[*fault.Error](limits.Validate(isShare, "a share"))
		if field == "" && f != nil || field != "" && (f == nil || f.Field != field) {
			t.Errorf("%+v: error %v, want one about %q", limits, f, field)
		}
	}
}

func TestFits(t *testing.T) {
	t.Parallel()
	limits := Limits{ThresholdByHead: map[string][]float64{"1": {.5, .6}, "2": {}}}
	limited, g := limits.New(.9), &kv.Geometry{QueryHeads: 2, KVHeads: 1}
	for layer, field := range []string{"", "", `threshold_by_head["2"]`, ""} {
		f, _ := errors.AsType[*fault.Error](limited.Fits(layer, g))
		if field == "" && f != nil || field != "" && (f == nil || f.Field != field) {
			t.Errorf("layer %d: error %v, want one about %q", layer, f, field)
		}
	}
	// Where they do not fit, thresholds are the next best.
	if got := limited.Threshold(&Candidates{Layer: 1, QueryHead: 2}); got != .9 {
		t.Errorf("threshold %v of a head that has none, want .9", got)
	}
}
