package selector

// Weigher is a Selector that knows how the attention of a row is spread over its tokens, other than by the
// scores of a Ranker, which estimate logits or bound them.
type Weigher interface {
	Selector
	// Weights writes the attention that the valid positions get of the row's queries to weights, [Len-First],
	// up to a factor. None is negative.
	Weights(weights []float32, row *Row)
}

// Allocator is a Selector that shares a layer's budget out among the lists of a sequence. Before rows are
// selected each is weighed; what Share makes of the weights are then the rows' TokenBudgets.
type Allocator interface {
	Stateful // whose Needs say Shares

	// Weigh writes how the row's attention is spread over its valid positions to weights, [Len-First],
	// the sum being that of the other lists too, and returns the mean budget of the sequence's lists.
	Weigh(weights []float32, row *Row) (mean int)

	// Share sets the budgets of lists of n tokens, given their weights, [len(budgets)][n].
	Share(budgets []int, weights []float32, mean int)
}
