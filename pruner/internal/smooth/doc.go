// Package smooth estimates logits from keys in few bits whose channels were evened out first: what the
// estimators below pruner/ that quantise have in common. A few channels with large means or ranges
// otherwise leave the others no codes.
//
//	mean[d], s[d] = sqrt(standard deviation of k[d])    of the layer's and KV head's first keys
//	Centre      k' = k - mean is quantised, q asked, and q.mean added
//	Equalise    k' = (k - mean) / s is quantised, q' = q * s asked, and q.mean added
//
// so that either way it is q.k itself that is estimated, and smoothing costs a row no more than a fold of
// its queries. No s is less than 1/16 of the head's largest.
//
// Mean and s are trained on the first 16, 64, 256, 1024 and 4096 valid tokens of the longest sequence of
// a batch, then frozen; at each of these the layer's chunks are quantised anew, a third more work in all.
// An untrained head has mean 0 and s 1. A key further from the mean than 4 times any that it was trained
// on is reported as drift; its estimate is coarser, not wrong.
package smooth
