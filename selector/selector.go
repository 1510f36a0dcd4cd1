// Package selector holds what every token selector shares. A selector picks, for each row, a generous
// set of candidate tokens (I0) whose attention may matter; each method is a folder below this one.
package selector

import "github.com/twilight-sidecar/twilight/kv"

// Selector picks candidates. Implementations hold configuration only and are safe for concurrent use;
// what a call needs besides is in the Row.
type Selector interface {
	// Shadow returns what the method keeps of the keys, nil for nothing.
	Shadow() kv.Shadow

	// Select appends the candidates of a row to dst: positions in [row.First, row.Len), ascending,
	// each once, never none. Pins are within the budget.
	Select(dst []int32, row *Row) []int32
}

// Row is what a selector may look at: one KV head of one sequence, asked by one query head or by all
// that share it. Its slices belong to the caller and are read-only but for Carry, Ranking, KeysRead and Scratch.
type Row struct {
	// Layer is the model's layer index, Head the KV head.
	Layer, Head int

	// Queries holds the asking query heads, [n][Dim], each multiplied by the softmax scale: one head
	// under "per_query_head", the whole group under "union", whose candidates are ranked by the sum of
	// the heads' scores.
	Queries [][]float32
	Dim     int

	// First and Len bound the valid positions: [First, Len), at least one.
	First, Len int

	// Keys reads the row's exact keys.
	Keys kv.Reader
	// Records reads the selector's own shadow; nil if it declares none.
	Records kv.Records

	// Carry is what earlier layers of the step left to the same list of the row: (sequence, KV head), and
	// query head under "per_query_head". Nil unless the method Needs it.
	Carry *Carry
	// Scores is the attention that each position got so far from the query heads that share the list,
	// [Len]: in the prefill, where the engine tells, and in the steps before this one, of those that kept
	// the position. Nil unless the method Needs it.
	Scores []float32

	// TokenBudget, if > 0, replaces the configured budget.
	TokenBudget int
	// PinFirst and PinCurrent make the chunk of the first valid token and that of the last token
	// candidates, whatever their score.
	PinFirst, PinCurrent bool

	// Ranking is what a Ranker selected by: set by its Select, unless every token is a candidate, and
	// valid until the next Select with this Row. It must be empty before.
	Ranking Ranking

	// KeysRead grows by the exact keys that Select reads.
	KeysRead int

	// Scratch is reused by the method from call to call with this Row.
	Scratch Scratch
}

// Scratch is memory that a method reuses between calls with one Row.
type Scratch struct {
	F32 []float32
	I32 []int32
	// A wrapper's own: what it selects only to see the ranking, and weights.
	Unused  []int32
	Weights []float32
}
