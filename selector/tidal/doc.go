// Package tidal is the TidalDecode selector (Yang et al., arXiv 2410.05076, section 3): tokens that matter
// in one layer matter in the next ones too, so few layers look for them and the others reuse what was
// found.
//
//	layers before the first of reselection_layers   candidates = all valid tokens
//	a selection layer                               candidates = all valid tokens; it leaves a list of
//	                                                the token_budget tokens with the largest q.k
//	the layers that follow                          candidates = that list
//
// A selection layer is each of reselection_layers, and whatever layer finds no list to reuse: one that was
// left in this step, for the same list of the row, by a lower layer that is not below the layer's own
// reselection layer. So layers may come in any order, more than once, or not at all (the model's first two
// are mostly dense, and a cache may hold some layers only): none ever sees the list of a higher layer, of
// another stretch of layers, or of another step, and what it costs is full attention in one more layer.
//
// The original takes one layer behind the dense ones and one in the middle that tests find for a model:
// 2 and 13 for Llama 3 8B, the default, 2 and 7 for Llama 2 7B. Each KV head leaves a list to its own,
// ranked by the sum over the query heads that ask; ties go to the lower position, and pinned chunks count
// towards the budget. What pruning leaves of a selection layer's candidates does not change the list.
//
// It keeps nothing of the keys, and of a list 4 bytes for each token, KV head and sequence of the batch
// until the next step. Cost: a selection layer reads all keys of the row, once more than full attention
// does; the others compute nothing.
package tidal
