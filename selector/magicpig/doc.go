// Package magicpig is the MagicPIG selector (Chen et al., arXiv 2410.16179, section 4): keys are hashed so
// that those which point the query's way often get its hash, and the ones that do so twice are candidates.
//
//	h_l(x) = the K signs of x.w for K random w, for each of L tables    (SimHash)
//	candidates = keys with h_l(k - mean) = h_l(q) in at least two tables
//
// besides the first num_sinks and the last window tokens and the pinned chunks. With p = 1 - angle(q, k -
// mean)/pi, a key is a candidate with probability
//
//	1 - (1 - p^K)^L - L * p^K * (1 - p^K)^(L-1)
//
// so that the number of candidates is not set but comes of K, L and the row; a row's own TokenBudget has no
// say in it. A row asked by several query heads has the candidates of each.
//
// That is half of the method. In the original the candidates are a sample, and attention divides each one's
// weight by its probability, so that the sum estimates that over all tokens: a few keys stand for many like
// them. Pruner and attention here take candidates for what they are, and what was not drawn is lost. This
// approximates MagicPIG at best where the weight is on few keys.
//
// The w are normal, drawn from seed, the same for all layers and heads; queries are not centred, as softmax
// does not see a common shift of all keys. Mean is that of the first 16, 64, 256, 1024 and 4096 valid tokens
// of the longest sequence of a batch, then frozen; at each of these the layer's tokens are hashed anew.
//
// Memory: 2*L bytes a token and KV head, more than fp16 keys take from L = D on: the original keeps its
// tables in the host's memory, beside the keys. Cost: K*L*D multiplications for a token and for a query,
// and L/4 word comparisons a token and query head. The original looks buckets up instead and touches only
// what is in them; tables of all keys cannot be kept by 16-token chunks that sequences share.
//
// A token with a value that is not finite is always a candidate, so that what is wrong with it is seen.
package magicpig
