// Package pipeline runs one attention layer for one row: select candidates, prune them, attend over
// what is kept. It is the reference that every device is checked against, and what gpu/host runs.
package pipeline

import (
	"time"

	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/selector"
)

// Path is how a row was computed.
type Path uint8

// Reason says why a row was not computed sparsely; 0 if it was.
type Reason uint8

// The paths, numbered as in proto Path.
const (
	Sparse Path = iota + 1
	Dense
	Void
)

// The reasons, numbered as in proto PathReason.
const (
	Configured Reason = iota + 1
	SkippedLayer
	ShortContext
	KeptNearlyAll
	UnsupportedShape
	Empty
	BadRow
	NotFinite
)

// Row is one KV head of one sequence. Its slices are read-only.
type Row struct {
	Layer, KVHead int       // the model's layer index
	Queries       []float32 // [G][KDim], real values, not scaled
	Keys, Values  kv.Reader
	First, Len    int // valid positions are [First, Len); at least one

	// SelectorRecords and EstimatorRecords read the shadows that Pipeline.Shadows names; nil where it
	// names none.
	SelectorRecords, EstimatorRecords kv.Records

	// Carry has an entry for each list, if Pipeline.Needs asks for it: empty when the row's step begins,
	// and handed from layer to layer.
	Carry []selector.Carry
	// State is the row's own, if Pipeline.Needs asks for one. Step tells the steps of a State apart.
	State *State
	Step  uint64

	P           float32 // overrides the pruner's share if > 0
	TokenBudget int     // overrides the selector's budget, and coverage, if > 0
	Budgets     []int   // by list, from Pipeline.Share; override TokenBudget if not nil
	ListsOnly   bool    // leave Result.Output unset
}

// Result is what became of a Row. Its slices are reused by the next Run with it.
type Result struct {
	// One entry under "union", G under "per_query_head".
	Lists      [][]int32 // kept positions, ascending; nil for dense rows, which keep [First, Len)
	Kept       []int
	Candidates []int
	// KeysSelected are the exact keys that the selector read, for all lists.
	KeysSelected int

	Path   Path
	Reason Reason

	Output []float32 // [G][VDim]

	// Mass and Coverage estimate, per query head, the share of softmax weight over all valid tokens
	// that kept tokens and candidates hold; NaN where the methods cannot tell.
	Mass, Coverage []float32

	Timing Timing

	// TrueMass is, per query head, the share of softmax weight that kept tokens hold, and OutputError
	// ||out-dense||/||dense||, NaN with ListsOnly. They are set by Audit.
	TrueMass, OutputError []float32

	lists [][]int32 // what Lists is cut from
}

// Timing is how long the stages of a row took.
type Timing struct {
	Select, Prune, Attend time.Duration
}
