// Package duo is the DuoAttention selector (Xiao et al., arXiv 2410.10819, section 3): a model's KV heads
// are either retrieval heads, which need all tokens, or streaming heads, which do with the first and the
// most recent ones.
//
//	retrieval head   candidates = all valid tokens
//	streaming head   candidates = the first sink_size and the last recent_size valid tokens
//
// A head is a retrieval head if its score is at least threshold. If sparsity is set, scores only rank: of n
// heads the ceil(sparsity * (n-1)) with the lowest scores stream, as the original's quantile has it, and
// all at 1; among equals the first in the order of layers, which the original leaves to chance.
//
// Scores come with the config, under heads: a daemon opens no file for an engine. Inline reads the original
// project's head files; Calibration makes such files, without the training that the original does.
//
// The set is exactly that: pins, which are for methods that rank, add nothing to it. A row's own
// TokenBudget stands for recent_size; retrieval heads have no budget. Pruning what they keep is up to the
// pruner. It keeps nothing of the keys and costs nothing. What the original gains on top, that streaming
// heads store no other tokens and prefill without them, is the engine's business.
package duo
