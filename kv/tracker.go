package kv

import (
	"math"

	"github.com/twilight-sidecar/twilight/internal/fault"
)

// maxSequences bounds the live sequences of a tracker, and so what an engine that never ends one can
// make it remember.
const maxSequences = 1 << 16

// TrackerConfig says what a Tracker keeps track of.
type TrackerConfig struct {
	PageSize, NumPages int
	NullPage           int32 // holds no tokens; -1 for none
	Layers             int

	// MaxTokens bounds the tokens of all live sequences together where PageSize is not a multiple of
	// ChunkTokens; 0 means NumPages*PageSize.
	MaxTokens int
	// MaxBatch bounds the rows of a step, MaxSequenceTokens the tokens of a row.
	MaxBatch, MaxSequenceTokens int
}

// NumChunks returns the number of chunk ids that a tracker uses, or why it cannot be made.
//
// Where pages are whole chunks, they are the pages' chunks. Otherwise they are those of MaxTokens, and
// two more for each row of a batch: a sequence leaves its last chunk partly filled, and shares the
// chunk that a claimed prefix ends in with nobody.
func (c *TrackerConfig) NumChunks() (int, error) {
	for _, f := range [...]struct {
		name     string
		value    int
		min, max int
	}{
		{"page_size", c.PageSize, 1, math.MaxInt32},
		{"num_pages", c.NumPages, 1, math.MaxInt32},
		{"null_page", int(c.NullPage), -1, c.NumPages - 1},
		{"layers", c.Layers, 1, math.MaxInt32},
		{"max_tokens", c.MaxTokens, 0, math.MaxInt32 * ChunkTokens},
		{"max_batch", c.MaxBatch, 1, math.MaxInt32},
		{"max_sequence_tokens", c.MaxSequenceTokens, 1, math.MaxInt32},
	} {
		if f.value < f.min || f.value > f.max {
			return 0, fault.Newf(fault.OutOfRange, f.name, "%d is not in [%d, %d]", f.value, f.min, f.max)
		}
	}
	chunks := c.NumPages * c.PageSize / ChunkTokens
	if !c.pagesAreChunks() {
		tokens := c.MaxTokens
		if tokens == 0 {
			tokens = c.NumPages * c.PageSize
		}
		chunks = ceilDiv(tokens, ChunkTokens) + 2*c.MaxBatch
	}
	if chunks > math.MaxInt32 {
		return 0, fault.Exhaustedf("num_pages", uint64(chunks), math.MaxInt32,
			"%d chunks of %d tokens are more than the %d that one cache can have: register a smaller one",
			chunks, ChunkTokens, math.MaxInt32)
	}
	return chunks, nil
}

func (c *TrackerConfig) pagesAreChunks() bool { return c.PageSize%ChunkTokens == 0 }

// Tracker knows the sequences of a cache and their page tables, and which tokens of which layer a
// shadow covers. Step declares a batch; Pending then tells, layer by layer and in any order, what has
// to be indexed. Steps only mark tokens as changed: a layer that is late or never asked costs nothing
// and stays right. It serves one caller at a time.
//
// Where pages are whole chunks (page mode) a chunk's id follows from its page, and sequences that share
// pages share chunks. Otherwise (sequence mode) chunks belong to sequences, which share them by claims.
type Tracker struct {
	cfg      TrackerConfig
	perPage  int // page mode: chunks of a page
	maxTable int
	masks    masks
	pool     *pool    // sequence mode, else nil
	claimed  []uint64 // by layer

	live map[uint64]*sequence
	anon anonymous

	rows  []SeqRow
	batch []*sequence // of rows; nil where void

	// relied counts, by chunk, the sequences whose known part it is in; only in page mode, where one
	// sequence may change what another knows.
	relied []int32
	// listed, by chunk, is its index in Pending's list, if that entry is the chunk's.
	listed []int32

	planner planner
	spare   []*sequence
}

// sequence is what the tracker knows of one sequence. Its chunks below first are padding, with id -1.
type sequence struct {
	id            uint64
	first, length int
	table, vtable []int32 // vtable is nil where V's ids are K's
	chunks        []int32

	// known spares Pending what it has seen: chunks below known[layer] are full and indexed. reach is
	// at least the highest of them; the chunks below are the sequence's known part.
	known []int
	reach int

	ended, seen uint64 // the last steps, by number, that ended it and that had it in a row
}

// SeqRow is one row of the current batch.
type SeqRow struct {
	Sequence   uint64  // 0 for anonymous rows
	First, Len int     // valid positions are [First, Len); both 0 for a void row
	Table      []int32 // page ids of K
	VTable     []int32 // page ids of V; Table itself where they are the same
	Chunks     []int32 // shadow chunk ids by the sequence's chunk; -1 below First's
}

// ChunkWork is a chunk to index in one layer. Bit i stands for the chunk's token i.
type ChunkWork struct {
	Row, Chunk int   // index into Rows, and the chunk of its sequence
	ID         int32 // shadow chunk id
	// Valid are the tokens that are indexed, and covered as a whole, afterwards; Fresh those of them
	// whose keys are new. Fresh is 0 if only tokens went. Valid may hold tokens beyond the row, which
	// another sequence has on the same page.
	Valid, Fresh uint16
}

// NewTracker makes a tracker. It takes about 6 bytes for each layer and chunk.
func NewTracker(cfg TrackerConfig) (*Tracker, error) {
	chunks, err := cfg.NumChunks()
	if err != nil {
		return nil, err
	}
	t := &Tracker{
		cfg:      cfg,
		maxTable: ceilDiv(cfg.MaxSequenceTokens, cfg.PageSize),
		masks:    newMasks(cfg.Layers, chunks),
		claimed:  make([]uint64, cfg.Layers),
		live:     make(map[uint64]*sequence),
		listed:   make([]int32, chunks),
	}
	if cfg.pagesAreChunks() {
		t.perPage = cfg.PageSize / ChunkTokens
		t.relied = make([]int32, chunks)
		t.anon.byTail = make([]int32, cfg.NumPages)
	} else {
		t.pool = newPool(chunks)
	}
	t.planner.starting = make(map[uint64]struct{})
	return t, nil
}

// NumChunks returns the number of chunk ids, which are 0 to NumChunks-1.
func (t *Tracker) NumChunks() int { return len(t.listed) }

// Rows returns the current batch. It is read-only and valid until the next Step that succeeds.
func (t *Tracker) Rows() []SeqRow { return t.rows }

// Step makes s the current batch. It takes time in the rows and in what changed, not in the sequences'
// lengths. A step that is refused, with a *fault.Error that names the field as proto Step does, changes
// nothing.
func (t *Tracker) Step(s *Step) error {
	defer t.planner.reset()
	if err := t.plan(s); err != nil {
		return err
	}
	t.apply(s)
	return nil
}

// Check tells whether Step would accept s now, and changes nothing.
func (t *Tracker) Check(s *Step) error {
	defer t.planner.reset()
	return t.plan(s)
}

// Pending appends to dst what a layer, by its index in the cache, has to index for the current batch,
// each chunk id once, and books it as done: if it is not, Invalidate the layer. It looks at the chunks
// that are new or not yet full; at all of them only after a sequence changed tokens of another.
func (t *Tracker) Pending(dst []ChunkWork, layer int) []ChunkWork {
	base := len(dst)
	for r, q := range t.batch {
		if q == nil {
			continue
		}
		for c := max(q.known[layer], q.first/ChunkTokens); c < len(q.chunks); c++ {
			id := q.chunks[c]
			valid, fresh := t.masks.add(layer, id, span(q.first-c*ChunkTokens, q.length-c*ChunkTokens))
			if valid == 0 {
				continue
			}
			if i := base + int(t.listed[id]); i < len(dst) && dst[i].ID == id {
				dst[i].Valid = valid
				dst[i].Fresh |= fresh
				continue
			}
			t.listed[id] = int32(len(dst) - base)
			dst = append(dst, ChunkWork{Row: r, Chunk: c, ID: id, Valid: valid, Fresh: fresh})
		}
		q.known[layer] = q.length / ChunkTokens
		t.extend(q, q.known[layer])
	}
	return dst
}

// Claimed returns how many tokens the current step's claims kept from being indexed again in a layer,
// and resets the count.
func (t *Tracker) Claimed(layer int) uint64 {
	n := t.claimed[layer]
	t.claimed[layer] = 0
	return n
}

// Invalidate makes nothing of a layer count as indexed.
func (t *Tracker) Invalidate(layer int) {
	t.masks.invalidate(layer)
	t.claimed[layer] = 0
	for _, q := range t.live {
		q.known[layer] = 0
	}
	for _, q := range t.anon.rows {
		if q != nil {
			q.known[layer] = 0
		}
	}
}

// extend moves the known part of a sequence up to chunk c.
func (t *Tracker) extend(q *sequence, c int) {
	if t.relied != nil {
		for i := max(q.reach, q.first/ChunkTokens); i < c; i++ {
			t.relied[q.chunks[i]]++
		}
	}
	q.reach = max(q.reach, c)
}

// lower moves the known part of a sequence down to chunk c, in all layers.
func (t *Tracker) lower(q *sequence, c int) {
	if c >= q.reach {
		return
	}
	if t.relied != nil {
		for i := max(c, q.first/ChunkTokens); i < q.reach; i++ {
			t.relied[q.chunks[i]]--
		}
	}
	q.reach = c
	for i := range q.known {
		q.known[i] = min(q.known[i], c)
	}
}

func ceilDiv(a, b int) int { return (a + b - 1) / b }
