// Package snapkv is the SnapKV compressor (Li et al., arXiv 2404.14469, section 4 and listing 1): the
// queries at a prompt's end, its observation window, tell which tokens of the prompt the answer will need.
//
//	weights(w, k) = softmax over k <= w of q[w].k    for the last window_size positions w
//	score(k)      = pool(sum over w of weights(w, k))    for the positions k before the window
//	kept          = the max_capacity_prompt - window_size best k, and the window
//
// pool slides over kernel_size adjacent positions, so that a token brings its neighbours: their mean, zeros
// beyond the ends included (avgpool), or their maximum (maxpool). Ties go to the lower position. A prompt of
// at most max_capacity_prompt tokens is kept whole. Tokens that follow the prompt are all kept; another
// observation compresses anew, all tokens so far being the prompt.
//
// A list shared by a group of query heads is kept by the sum of the heads' scores; the original repeats
// keys, so that each query head keeps its own, which is group mode "per_query_head". Attention sinks of a
// model do not join the softmax. The original drops keys and values for good and saves their memory; a
// sidecar leaves the engine's cache as it is, and saves the reading. Selector and pruner work within what is
// kept: candidates are those of the selector that are kept or follow the prompt.
//
// The window's queries come from the engine, which ran the prefill: with the first message of a layer after
// it. A sequence that would need them and has none is refused.
//
// Memory: 4 bytes for each kept token, (layer, KV head) and list. Cost, once: window_size * N * D
// multiplications for each query head of a prompt of N tokens, and the reading of its keys.
package snapkv
