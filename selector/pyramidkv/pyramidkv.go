package pyramidkv

import (
	"math"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/registry"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/selector"
)

// Config holds the method's keys.
type Config struct {
	// Selector is what gets the budgets.
	Selector registry.Stage[selector.Config] `json:"selector"`
	// TokenBudget is the mean of the layers' budgets.
	TokenBudget int `json:"token_budget"`
	// SparsityRate, if not -1, replaces TokenBudget by this share of the row's valid tokens, rounded up.
	SparsityRate float64 `json:"sparsity_rate"`
	// Beta is how many times TokenBudget is what the last layer gets.
	Beta float64 `json:"beta"`
	// NumLayers is how many layers the model has. It has no default.
	NumLayers int `json:"num_layers"`
}

// Default is the original's beta, and the budget that Twilight selects before it prunes.
func Default() *Config { return &Config{TokenBudget: 8192, SparsityRate: -1, Beta: 20} }

// Method is the entry for a registry.
func Method() selector.Method {
	return selector.Method{Type: "pyramidkv", Default: func() selector.Config { return Default() }}
}

var _ selector.Wrapper = (*Config)(nil)

// Wraps implements selector.Wrapper.
func (c *Config) Wraps() *registry.Stage[selector.Config] { return &c.Selector }

// Validate implements selector.Config.
func (c *Config) Validate() error {
	switch {
	case !(c.Beta >= 1) || math.IsInf(c.Beta, 1):
		return fault.Newf(fault.Invalid, "beta", "beta is %v, expected a finite number of at least 1", c.Beta)
	case c.NumLayers == 0:
		return fault.Newf(fault.Invalid, "num_layers", "num_layers is missing or 0: say how many layers the model has")
	case c.NumLayers < 0 || c.NumLayers > math.MaxInt32:
		return fault.Newf(fault.Invalid, "num_layers", "num_layers is %d, expected 1..%d", c.NumLayers, math.MaxInt32)
	}
	if err := selector.CheckBudget(c.TokenBudget, c.SparsityRate); err != nil {
		return err
	}
	return selector.CheckWrapped(&c.Selector)
}

// New implements selector.Config.
func (c *Config) New() selector.Selector {
	return pyramid{selector.Wrapped{Selector: c.Selector.Config.New()}, *c}
}

type pyramid struct {
	selector.Wrapped
	config Config
}

// Fits implements selector.Fitter.
func (p pyramid) Fits(layer int, g *kv.Geometry) error {
	if layer >= p.config.NumLayers {
		return fault.Newf(fault.Invalid, "num_layers",
			"num_layers is %d, but there is a layer %d: say how many the model has", p.config.NumLayers, layer)
	}
	return p.Wrapped.Fits(layer, g)
}

// Select implements selector.Selector.
func (p pyramid) Select(dst []int32, row *selector.Row) []int32 {
	mean := row.Budget(p.config.TokenBudget, p.config.SparsityRate)
	return p.SelectBudget(dst, row, p.config.budget(mean, row.Len-row.First, row.Layer))
}

// budget is that of a layer, of n tokens, where the mean over layers is given.
func (c *Config) budget(mean, n, layer int) int {
	if mean >= n || c.NumLayers == 1 {
		return mean
	}
	least := float64(mean) / c.Beta
	most := 2*float64(mean) - least
	if most > float64(n) {
		most = float64(n)
		least = 2*float64(mean) - most
	}
	share := float64(layer) / float64(c.NumLayers-1)
	return max(1, int(math.Round(most-(most-least)*share)))
}
