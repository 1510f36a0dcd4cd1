package selector

import (
	"math"

	"github.com/twilight-sidecar/twilight/internal/fault"
)

// CheckBudget reports what is wrong with the keys token_budget and sparsity_rate.
func CheckBudget(tokenBudget int, sparsityRate float64) error {
	if tokenBudget < 1 || tokenBudget > math.MaxInt32 {
		return fault.Newf(fault.Invalid, "token_budget",
			"token_budget is %d, expected 1..%d tokens", tokenBudget, math.MaxInt32)
	}
	if sparsityRate != -1 && !(sparsityRate > 0 && sparsityRate <= 1) {
		return fault.Newf(fault.Invalid, "sparsity_rate",
			"sparsity_rate is %v, expected a share of the length in (0, 1], or -1 to use token_budget", sparsityRate)
	}
	return nil
}

// Budget is the number of candidates that a row is to have: its own TokenBudget, else the share
// sparsityRate of its valid tokens, rounded up, else tokenBudget.
func (r *Row) Budget(tokenBudget int, sparsityRate float64) int {
	switch {
	case r.TokenBudget > 0:
		return r.TokenBudget
	case sparsityRate > 0:
		return int(math.Ceil(sparsityRate * float64(r.Len-r.First)))
	}
	return tokenBudget
}
