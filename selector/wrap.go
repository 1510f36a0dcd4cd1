package selector

import (
	"reflect"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/registry"
	"github.com/twilight-sidecar/twilight/kv"
)

// Wrapper is the Config of a method that gives budgets to another selector, which its key "selector" names
// and configures.
type Wrapper interface {
	Config
	// Wraps is where a config's parser puts the other.
	Wraps() *registry.Stage[Config]
}

// CheckWrapped reports what is wrong with the selector that a wrapper names.
func CheckWrapped(wrapped *registry.Stage[Config]) error {
	if wrapped.Config == nil {
		return fault.Newf(fault.Invalid, "selector", "selector is missing: name the one that is to get the budgets")
	}
	if err := wrapped.Config.Validate(); err != nil {
		return fault.In("selector", err)
	}
	if NeedsOf(wrapped.Config.New()).Shares {
		return fault.Newf(fault.Invalid, "selector.type",
			"selector %q shares its budget out by itself: name the one that it wraps", wrapped.Type)
	}
	if !HasBudget(wrapped.Config) {
		return fault.Newf(fault.Invalid, "selector.type",
			"selector %q has no token_budget that could be set for it: take one that has", wrapped.Type)
	}
	return nil
}

// HasBudget says whether a selector has the key token_budget, which a Row's TokenBudget replaces.
func HasBudget(c Config) bool {
	for key := range reflect.TypeOf(c).Elem().Fields() {
		if key.Tag.Get("json") == "token_budget" {
			return true
		}
	}
	return false
}

// Wrapped is what a wrapper's selector has of the one it wraps.
type Wrapped struct{ Selector }

var (
	_ Fitter   = Wrapped{}
	_ Stateful = Wrapped{}
)

// SelectBudget selects with another budget.
func (w Wrapped) SelectBudget(dst []int32, row *Row, budget int) []int32 {
	own := row.TokenBudget
	row.TokenBudget = budget
	dst = w.Select(dst, row)
	row.TokenBudget = own
	return dst
}

// Needs implements Stateful.
func (w Wrapped) Needs() Needs { return NeedsOf(w.Selector) }

// Fits implements Fitter.
func (w Wrapped) Fits(layer int, g *kv.Geometry) error {
	if fitter, ok := w.Selector.(Fitter); ok {
		return fault.In("selector", fitter.Fits(layer, g))
	}
	return nil
}
