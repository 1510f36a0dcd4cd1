// Package sparq is the SparQ selector (Ribar et al., arXiv 2312.04985, section 4): logits are guessed from
// the few channels in which the query is large, read from the keys themselves.
//
//	R = the r channels with the largest |q[d]|
//	score(k) = sum over d in R of q[d] * k[d]
//
// The token_budget best tokens are candidates, ties going to the lower position; pinned chunks come first
// and count towards the budget. The original reads an eighth of the channels, which is what r 0 means.
//
// A row asked by several query heads reads one set of channels, those with the largest sum of |q[d]| over
// the heads, as the original does for grouped queries, and ranks tokens by the sum of the heads' scores.
// The original sums weights there, made by a softmax whose temperature makes up for the missing channels.
// Of a single head the temperature cannot change the ranking: it matters for the second step only, which
// gives the weight outside the candidates to the mean of all values. That step is not selection; it is
// left out, as the original leaves it out for grouped queries.
//
// It keeps nothing of the keys. Cost: r multiplications a token. The original stores keys a second time,
// channel by channel, and reads r of them; in an engine's cache the channels of a token lie side by side,
// so that whole keys are read here, and what is saved is none of the reading.
package sparq
