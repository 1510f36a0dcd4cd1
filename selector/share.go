package selector

// Scale is what a Ranker's scores are on.
type Scale uint8

// The scales.
const (
	// Logits: scores of a single query estimate its logits, or bound them.
	Logits Scale = iota + 1
	// Weights: scores are softmax weights, up to a factor, of all the row's queries together.
	Weights
)

// Ranker is a Selector that tells how it ranks: its Select sets Row.Ranking where that is wanted, or
// Row.Bounds if it ranks chunks, and neither if there is nothing to rank.
type Ranker interface {
	Selector
	Ranks() Scale
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
