// Package streaming is the StreamingLLM selector (Xiao et al., arXiv 2309.17453): the sequence's first
// tokens, attention sinks that take the weight which has nowhere else to go, and its most recent ones.
//
//	candidates = the first num_sinks valid tokens and the last token_budget tokens
//
// It looks at neither queries nor keys, keeps nothing, and costs nothing; what lies between is out of
// reach, whatever the query asks for. The set is exactly that of Twilight's config: pins, which are for
// methods that rank, add nothing to it, and a row's own TokenBudget stands for token_budget.
//
// The original also gives the tokens new positions within the cache, so that positions never grow past
// those of training. A sidecar gets keys with their rotations applied and can't.
package streaming
