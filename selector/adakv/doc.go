// Package adakv is the Ada-KV budget allocator (Feng et al., arXiv 2407.11550, section 4 and algorithm 1)
// around any selector that ranks: heads whose attention is spread get many tokens, those that look at few
// get few.
//
//	total    = token_budget for each list of the layer
//	f(i)     = how many of the total largest weights of all lists are list i's
//	budget   = (1 - floor_alpha) * f(i) + floor_alpha * token_budget
//
// The lists are those of one sequence: of its KV heads or, in group mode "per_query_head", of its query heads.
// No choice of as many tokens for the layer holds more weight than the total largest; the floor is the
// original's safeguard. Ties go to the lower list, budgets are rounded, and at least 1. What a list's
// budget buys is up to the wrapped selector, whose own token_budget is not used; a row's own TokenBudget, and
// sparsity_rate, stand for token_budget.
//
// The original weighs by the attention of a prompt's last queries, once. Here each step's own query is
// weighed, by the wrapped selector's estimates, a softmax over the row for each query head: true logits
// (oracle_topk), those of some channels (sparq, ds: flatter than the truth) or of codes (pqcache), and for
// quest its bounds, of which all tokens of a chunk have the same. A softcap is left out. The weights of
// h2o are its scores, which are accumulated attention, as the original's are.
//
// Memory: 4 bytes for each token, KV head and list of a batch, while a layer runs. Cost: the wrapped
// selector's ranking once more, for each query head, and O(N) to share out. All rows of a layer are
// weighed before any is selected.
package adakv
