// Package ds is the Double Sparsity selector (Yang et al., arXiv 2408.07092, section 3): logits are guessed
// from a few channels that carry most of them whatever the text, found offline, of which a copy in few
// bits is kept beside the keys, the label cache.
//
//	R = the first r channels of the (layer, KV head)'s list
//	label = the key's channels R, quantised per token: code = round((k - min) / scale) in quant_bit bits,
//	        scale = (max - min) / (2^quant_bit - 1), over R
//	score(k) = sum over d in R of q[d] * label[d]
//
// The token_budget best tokens are candidates, ties going to the lower position; pinned chunks come first
// and count towards the budget. A row asked by several query heads ranks tokens by the sum of their
// scores. quant_bit 32 is no label cache: the channels are read from the keys.
//
// The lists come with the config, under channels, for every layer and KV head, in the channel order of the
// engine's cache: a daemon opens no file for an engine. Inline makes them of the original project's channel
// files; Calibrate makes such files. The original asks each query head by its own list where they are ranked
// by q or qk; with grouped queries that takes a label cache for each query head. Here the heads of a group
// share one list, that with the smallest sums of ranks in theirs.
//
// Memory: r*quant_bit/8 + 4 bytes a token and KV head, and 2*r a head. Cost: as many bytes read a token,
// and r multiplications for all query heads together.
package ds
