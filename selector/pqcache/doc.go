// Package pqcache is the PQCache selector (Zhang et al., arXiv 2407.12820, section 3): keys are product
// quantised, and logits guessed from the codes.
//
//	k = [k_1 .. k_m]             m parts of adjacent channels, as even as can be
//	code_i = argmin over c of ||k_i - C_i[c]||     C_i: 2^b centroids, k-means of the head's first keys
//	score(k) = sum over i of q_i.C_i[code_i]       looked up in m tables of 2^b products
//
// The token_budget best tokens are candidates, ties going to the lower position; pinned chunks come first
// and count towards the budget. The original sums the softmax weights of the query heads that ask; here, as
// everywhere, a row ranks tokens by the sum of the heads' scores. The original always keeps the first 32
// tokens and spends half its budget on the most recent; pins and the budget are the config's here.
//
// Codebooks are trained on the first 2^b, 4*2^b, 16*2^b and 64*2^b valid tokens of the longest sequence of a
// batch, up to 4096 at 6 bits, then frozen; at each of these the layer's tokens are coded anew, which a
// prefill given at once does only once. Later tokens are coded by the nearest centroids, as in the original,
// whose clusters are those of the whole prefill. Lloyd's algorithm starts from evenly spaced tokens, not
// random ones, so that equal keys give equal codes. Before the first level the keys themselves are read.
//
// Memory: m + 1/8 bytes a token and KV head, and 4*2^b*(D+m) a head, shared by all sequences. Cost of a row:
// 2^b*D multiplications for the tables, then m lookups a token. Cost of a token: 2^b*D multiplications,
// and of training, for each of up to 10 rounds, as many for each token of the level.
//
// A token with a value that is not finite is ranked first, so that what is wrong with it is seen.
package pqcache
