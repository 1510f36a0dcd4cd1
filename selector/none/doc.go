// Package none is the trivial selector, "Full" in the paper: every valid token is a candidate, so that
// the pruner alone decides (Twilight, arXiv 2502.02770, section 5).
//
// It keeps nothing of the keys and costs nothing but the estimator's pass over all tokens.
package none
