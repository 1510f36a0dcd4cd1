// Package oracle is exact top-k: the tokens with the largest true logits, which no top-k method can beat
// at its own budget. It is there to compare others with.
//
//	score(k) = q.k    summed over the query heads that ask
//
// The max(1, token_budget) tokens with the largest scores are candidates, ties going to the lower
// position; pinned chunks come first and count towards the budget. For one query head that is the most
// softmax weight so many tokens can hold. For a union it is the rule that all selectors follow, not quite
// the most: the largest sums of weights hold .3 to .9 percent more, of 1024 to 128 tokens among 4100.
//
// It keeps nothing of the keys. Cost: all keys of the row are read, as in dense attention, and D
// multiplications for each.
package oracle
