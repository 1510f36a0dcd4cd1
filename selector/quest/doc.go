// Package quest is the Quest selector (Tang et al., arXiv 2406.10774, section 3): chunks of adjacent
// tokens are ranked by an upper bound on their logits, and the best are candidates whole.
//
// A chunk keeps the largest and the smallest value of each key channel. No key of the chunk can then
// score higher with a query q than
//
//	bound(q) = sum over d of max(q[d]*max[d], q[d]*min[d])
//
// A row asked by several query heads ranks chunks by the sum of their bounds. The max(1, ceil(budget /
// chunk_size)) best chunks are kept, ties going to the lower chunk; pinned chunks come first and count
// towards that number, which is at least theirs. A partly filled chunk counts as one.
//
// Memory: 4*D bytes for each 16 tokens of a KV head, fp16 rounded outwards, so that the bound holds.
// Cost: 2*D multiplications for each chunk and query head, and O(chunks) to pick the best.
//
// A chunk that holds a value beyond fp16, or one that is not finite, has no finite bound: it is always
// ranked first, so that what is wrong with it is seen.
package quest
