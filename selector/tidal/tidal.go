package tidal

import (
	"fmt"
	"math"
	"slices"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/selector"
)

// Config holds the method's keys.
type Config struct {
	// TokenBudget is how many tokens of a row a selection layer leaves to the next layers.
	TokenBudget int `json:"token_budget"`
	// SparsityRate, if not -1, replaces TokenBudget by this share of the row's valid tokens, rounded up.
	SparsityRate float64 `json:"sparsity_rate"`
	// ReselectionLayers are the model's layers that select, ascending.
	ReselectionLayers []int `json:"reselection_layers"`
}

// Default is the original's choice of layers for Llama 3 8B, and the budget that Twilight selects before
// it prunes.
func Default() *Config {
	return &Config{TokenBudget: 8192, SparsityRate: -1, ReselectionLayers: []int{2, 13}}
}

// Method is the entry for a registry.
func Method() selector.Method {
	return selector.Method{Type: "tidal_decode", Default: func() selector.Config { return Default() }}
}

// Validate implements selector.Config.
func (c *Config) Validate() error {
	if len(c.ReselectionLayers) == 0 {
		return fault.Newf(fault.Invalid, "reselection_layers", "reselection_layers is empty: name at least one layer")
	}
	last := -1
	for i, layer := range c.ReselectionLayers {
		if layer <= last || layer > math.MaxInt32 {
			return fault.Newf(fault.Invalid, fmt.Sprintf("reselection_layers[%d]", i),
				"layer %d must be in [%d, %d]: name layers from 0 up, each once", layer, last+1, math.MaxInt32)
		}
		last = layer
	}
	return selector.CheckBudget(c.TokenBudget, c.SparsityRate)
}

// New implements selector.Config.
func (c *Config) New() selector.Selector {
	t := tidal{*c}
	t.ReselectionLayers = slices.Clone(c.ReselectionLayers)
	return t
}

type tidal struct{ Config }

var _ selector.Stateful = tidal{}

func (tidal) Shadow() kv.Shadow { return nil }

// Needs implements selector.Stateful.
func (tidal) Needs() selector.Needs { return selector.Needs{Carry: true} }

// Select implements selector.Selector.
func (t tidal) Select(dst []int32, row *selector.Row) []int32 {
	stretch, ok := t.stretch(row.Layer)
	budget, n := row.Budget(t.TokenBudget, t.SparsityRate), row.Len-row.First
	if !ok || row.Carry == nil || budget >= n {
		return selector.All(dst, row)
	}
	carry := row.Carry
	if len(carry.List) > 0 && stretch <= carry.Layer && carry.Layer < row.Layer {
		return append(dst, carry.List...)
	}
	f32 := row.Scratch.Floats(n + (1+selector.ExactBlock)*row.Dim)
	scores, query := selector.Take(&f32, n), selector.Take(&f32, row.Dim)
	row.Sum(query)
	selector.Exact(scores, row, query, f32)
	carry.Layer, carry.List = row.Layer, selector.Top(carry.List[:0], row, scores, budget)
	row.Ranking.Reset() // for all are candidates here
	return selector.All(dst, row)
}

// stretch returns the reselection layer that a layer follows or is; false if it is below the first.
func (t tidal) stretch(layer int) (int, bool) {
	i, found := slices.BinarySearch(t.ReselectionLayers, layer)
	if !found {
		i--
	}
	if i < 0 {
		return 0, false
	}
	return t.ReselectionLayers[i], true
}
