// Package h2o is the Heavy-Hitter Oracle selector (Zhang et al., arXiv 2306.14048, section 4): few tokens
// get most of the attention over time, and those that did so far will go on.
//
//	score(k)   = softmax weight that position k got from all queries so far
//	candidates = the last recent_share of token_budget, and the best k before them
//
// Ties go to the lower position; pinned chunks come first and count towards the budget. Each step adds what
// the kept tokens got: weights over what the pruner left, which sum to 1 for each query head, by the
// estimator's logits (type none: the true ones). The next step sees it, so that running a layer twice
// counts once. A list that a group shares is scored by the sum over its query heads.
//
// The original drops a token for good once it ranks last. Here none is lost, and the set is the same while
// the budget is: a token outside the set gains nothing and those within lose nothing, so that whatever
// ranked before it does so ever after. A budget that grows brings tokens back, best first.
//
// Scores start from the prefill's, the mass that an engine may send with the first message of a layer after
// it. Without, they start from 0, and the tokens of a prompt rank by position until steps tell them apart.
// Rows that a step computes densely (dense_below, say) gain nothing. Tokens that are rolled back, or
// overwritten by slots, lose their score; what a sequence takes over from another's prefix starts from 0.
//
// Memory: 4 bytes for each token, (layer, KV head) and list of a live sequence, and 8 more for each that the
// last step kept; the shadow's size counts 12. It keeps nothing of the keys. Cost: no multiplications, O(N)
// to pick the best.
package h2o
