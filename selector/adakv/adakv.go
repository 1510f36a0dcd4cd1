package adakv

import (
	"math"

	"github.com/viterin/vek/vek32"

	"github.com/twilight-sidecar/twilight/attention"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/registry"
	"github.com/twilight-sidecar/twilight/selector"
)

// Config holds the method's keys.
type Config struct {
	// Selector is what gets the budgets.
	Selector registry.Stage[selector.Config] `json:"selector"`
	// TokenBudget is the mean of the budgets of a layer's lists.
	TokenBudget int `json:"token_budget"`
	// SparsityRate, if not -1, replaces TokenBudget by this share of the row's valid tokens, rounded up.
	SparsityRate float64 `json:"sparsity_rate"`
	// FloorAlpha is the share of TokenBudget that each list gets in any case.
	FloorAlpha float64 `json:"floor_alpha"`
}

// Default is the original's floor, and the budget that Twilight selects before it prunes.
func Default() *Config { return &Config{TokenBudget: 8192, SparsityRate: -1, FloorAlpha: .2} }

// Method is the entry for a registry.
func Method() selector.Method {
	return selector.Method{Type: "adakv", Default: func() selector.Config { return Default() }}
}

var _ selector.Wrapper = (*Config)(nil)

// Wraps implements selector.Wrapper.
func (c *Config) Wraps() *registry.Stage[selector.Config] { return &c.Selector }

// Validate implements selector.Config.
func (c *Config) Validate() error {
	if !(c.FloorAlpha >= 0 && c.FloorAlpha <= 1) {
		return fault.Newf(fault.Invalid, "floor_alpha",
			"floor_alpha is %v, expected a share of the budget in [0, 1]", c.FloorAlpha)
	}
	if err := selector.CheckBudget(c.TokenBudget, c.SparsityRate); err != nil {
		return err
	}
	if err := selector.CheckWrapped(&c.Selector); err != nil {
		return err
	}
	inner := c.Selector.Config.New()
	_, ranks := inner.(selector.Ranker)
	if _, weighs := inner.(selector.Weigher); !ranks && !weighs {
		return fault.Newf(fault.Invalid, "selector.type",
			"selector %q ranks no tokens by which budgets could be shared out: take one that does", c.Selector.Type)
	}
	return nil
}

// New implements selector.Config.
func (c *Config) New() selector.Selector {
	return adaKV{selector.Wrapped{Selector: c.Selector.Config.New()}, *c}
}

type adaKV struct {
	selector.Wrapped
	config Config
}

var _ selector.Allocator = adaKV{}

// Needs implements selector.Stateful.
func (a adaKV) Needs() selector.Needs {
	needs := a.Wrapped.Needs()
	needs.Shares = true
	return needs
}

// Select implements selector.Selector.
func (a adaKV) Select(dst []int32, row *selector.Row) []int32 {
	return a.SelectBudget(dst, row, row.Budget(a.config.TokenBudget, a.config.SparsityRate))
}

// Weigh implements selector.Allocator. The weights sum to the number of the row's queries.
func (a adaKV) Weigh(weights []float32, row *selector.Row) (mean int) {
	mean = row.Budget(a.config.TokenBudget, a.config.SparsityRate)
	if mean >= len(weights) {
		return mean
	}
	queries := row.Queries
	if weigher, ok := a.Selector.(selector.Weigher); ok {
		f32 := row.Scratch.Floats(len(weights))
		weigher.Weights(f32, row)
		clear(weights)
		add(weights, f32, float32(len(queries)))
		return mean
	}
	clear(weights)
	for h := range queries {
		row.Queries = queries[h : h+1]
		add(weights, a.softmax(row), 1)
	}
	row.Queries = queries
	return mean
}

// softmax returns weights of the row's valid positions, [Len-First], by the scores that the wrapped selector
// ranks them by, up to a factor; none if it does not rank them.
func (a adaKV) softmax(row *selector.Row) []float32 {
	first, current := row.PinFirst, row.PinCurrent
	row.PinFirst, row.PinCurrent = false, false
	row.Ranking.Reset()
	row.Scratch.Unused = a.SelectBudget(row.Scratch.Unused[:0], row, 1)
	row.PinFirst, row.PinCurrent = first, current
	r := &row.Ranking
	if len(r.Scores) == 0 {
		return nil
	}
	attention.Exp(r.Scores, vek32.Max(r.Scores))
	if r.Unit == 1 {
		return r.Scores
	}
	row.Scratch.Weights = row.Scratch.Weights[:0]
	for p := row.First; p < row.Len; p++ {
		row.Scratch.Weights = append(row.Scratch.Weights, r.Scores[p/r.Unit-row.First/r.Unit])
	}
	return row.Scratch.Weights
}

// add adds to weights the scores, scaled to a sum; evenly where scores tell nothing.
func add(weights, scores []float32, sum float32) {
	total := float32(0)
	if len(scores) > 0 {
		total = vek32.Sum(scores)
	}
	if !(total > 0) {
		vek32.AddNumber_Inplace(weights, sum/float32(len(weights)))
		return
	}
	vek32.MulNumber_Inplace(scores, sum/total)
	vek32.Add_Inplace(weights, scores)
}

// Share implements selector.Allocator.
func (a adaKV) Share(budgets []int, weights []float32, mean int) {
	n := len(weights) / len(budgets)
	if mean >= n {
		for i := range budgets {
			budgets[i] = mean
		}
		return
	}
	cut, ties := selector.Cut(weights, mean*len(budgets))
	for i := range budgets {
		count := 0
		for _, w := range weights[i*n : (i+1)*n] {
			switch {
			case w > cut:
				count++
			case w == cut && ties > 0:
				ties--
				count++
			}
		}
		share := (1-a.config.FloorAlpha)*float64(count) + a.config.FloorAlpha*float64(mean)
		budgets[i] = max(1, int(math.Round(share)))
	}
}
