// Package maxquant is the estimator that Twilight's code calls max_quant: logits from a copy of the keys
// in few bits, quantised symmetrically per token and KV head. It is the plain alternative to
// min_max_quant, of which the paper (arXiv 2502.02770, section 4.2) says nothing.
//
//	scale = max |k| / (2^(b-1) - 1)    over the token's channels, stored as fp16
//	code  = clamp(round(k / scale), -(2^(b-1) - 1), 2^(b-1) - 1)
//	q.k  ~= scale * q.code
//
// With smooth_k, channels are centred first, which q.k' + q.mean = q.k makes up for:
//
//	mean[d] of the layer's and KV head's first keys;  k' = k - mean is quantised
//
// Mean is trained on the first 16, 64, 256, 1024 and 4096 valid tokens of the longest sequence of a batch,
// then frozen; at each of these the layer's chunks are quantised anew. A key further from the mean than 4
// times any that it was trained on is reported as drift; its estimate is coarser, not wrong.
//
// Two things differ from Twilight's code. Its codes run to 2^b - 1 either way, which takes b+1 bits; these
// fit b. And it takes off each channel's minimum over all tokens, which pushes all codes to one side and
// changes with every step; the mean is what its quantiser is at home with.
//
// Memory: b*D/8 + 2 bytes a token and KV head, and 12*D a head with smooth_k. Cost: b*D/8 bytes read a
// candidate, unpacked once for all query heads that ask, and D multiplications for each of them.
//
// A token with a value that is not finite has a NaN estimate.
package maxquant
