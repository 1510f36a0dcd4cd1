package pruner

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
)

// Limits are the keys that a pruner with a threshold has beside it. A list is what attention runs over:
// that of a row under "union", of a query head under "per_query_head".
type Limits struct {
	// ThresholdByLayer replaces threshold in single layers, by the model's index.
	ThresholdByLayer map[string]float64 `json:"threshold_by_layer"`
	// ThresholdByHead replaces threshold, and ThresholdByLayer, in single layers, by a number for each
	// query head of the model.
	ThresholdByHead map[string][]float64 `json:"threshold_by_head"`
	// MinBudget is the least number of tokens in a list: where pruning leaves fewer, the heaviest of the
	// other candidates are kept as well.
	MinBudget int `json:"min_budget"`
	// MaxBudget is the largest number of tokens in a list: where pruning leaves more, the heaviest of them
	// are kept. 0 sets no limit.
	MaxBudget int `json:"max_budget"`
}

// NoLimits are the defaults.
func NoLimits() Limits {
	return Limits{ThresholdByLayer: map[string]float64{}, ThresholdByHead: map[string][]float64{}}
}

// Validate reports the first value out of range as a *fault.Error. isValid tells which thresholds are
// not, expected says so in words.
func (l *Limits) Validate(isValid func(threshold float64) bool, expected string) error {
	check := func(threshold float64, field string) error {
		if isValid(threshold) {
			return nil
		}
		return fault.Newf(fault.Invalid, field, "threshold is %v, expected %s", threshold, expected)
	}
	for _, layer := range slices.Sorted(maps.Keys(l.ThresholdByLayer)) {
		field := fmt.Sprintf("threshold_by_layer[%q]", layer)
		if err := checkLayer(layer, field); err != nil {
			return err
		}
		if err := check(l.ThresholdByLayer[layer], field); err != nil {
			return err
		}
	}
	for _, layer := range slices.Sorted(maps.Keys(l.ThresholdByHead)) {
		field := fmt.Sprintf("threshold_by_head[%q]", layer)
		if err := checkLayer(layer, field); err != nil {
			return err
		}
		for h, threshold := range l.ThresholdByHead[layer] {
			if err := check(threshold, fmt.Sprintf("%s[%d]", field, h)); err != nil {
				return err
			}
		}
	}
	switch {
	case l.MinBudget < 0 || l.MinBudget > math.MaxInt32:
		return fault.Newf(fault.Invalid, "min_budget", "min_budget is %d, expected 0..%d tokens", l.MinBudget, math.MaxInt32)
	case l.MaxBudget < 0 || l.MaxBudget > math.MaxInt32:
		return fault.Newf(fault.Invalid, "max_budget",
			"max_budget is %d, expected 1..%d tokens, or 0 for no limit", l.MaxBudget, math.MaxInt32)
	case l.MaxBudget > 0 && l.MaxBudget < l.MinBudget:
		return fault.Newf(fault.Invalid, "max_budget",
			"max_budget is %d, expected no less than min_budget, which is %d", l.MaxBudget, l.MinBudget)
	}
	return nil
}

// checkLayer makes sure that the index of a layer is in its only spelling.
func checkLayer(layer, field string) error {
	if n, err := strconv.ParseUint(layer, 10, 31); err != nil || strconv.FormatUint(n, 10) != layer {
		return fault.Newf(fault.Invalid, field, "layer %q is no index of a layer, expected a number from 0", layer)
	}
	return nil
}

// Limited is what Limits are to a pruner, which embeds it.
type Limited struct {
	threshold   float64
	byLayer     map[int]float64
	byHead      map[int][]float64
	least, most int
}

// New makes what a pruner embeds. l must be valid and is not kept.
func (l *Limits) New(threshold float64) Limited {
	limited := Limited{
		threshold: threshold,
		byLayer:   make(map[int]float64, len(l.ThresholdByLayer)),
		byHead:    make(map[int][]float64, len(l.ThresholdByHead)),
		least:     l.MinBudget, most: l.MaxBudget,
	}
	for layer, threshold := range l.ThresholdByLayer {
		index, _ := strconv.Atoi(layer) // was valid
		limited.byLayer[index] = threshold
	}
	for layer, thresholds := range l.ThresholdByHead {
		index, _ := strconv.Atoi(layer)
		limited.byHead[index] = slices.Clone(thresholds)
	}
	return limited
}

// Threshold is that of a query head.
func (l *Limited) Threshold(c *Candidates) float64 {
	if heads := l.byHead[c.Layer]; c.QueryHead < len(heads) {
		return heads[c.QueryHead]
	}
	if threshold, ok := l.byLayer[c.Layer]; ok {
		return threshold
	}
	return l.threshold
}

// Budget implements Limiter.
func (l *Limited) Budget() (least, most int) { return l.least, l.most }

// Fits implements Limiter.
func (l *Limited) Fits(layer int, g *kv.Geometry) error {
	if heads, ok := l.byHead[layer]; ok && len(heads) != g.QueryHeads {
		return fault.Newf(fault.Invalid, fmt.Sprintf("threshold_by_head[%q]", strconv.Itoa(layer)),
			"layer %d has %d thresholds, expected one for each of its %d query heads", layer, len(heads), g.QueryHeads)
	}
	return nil
}
