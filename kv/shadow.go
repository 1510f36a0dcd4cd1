package kv

// Shadow is what a method derives from the keys and keeps itself. It is declared once per method, and
// held by the device: one head record for each (layer, KV head), one chunk record for each (layer, KV
// head, chunk). Records are plain bytes, so that every backend can hold them. Implementations are
// stateless and safe for concurrent use.
type Shadow interface {
	// HeadBytes and ChunkBytes give record sizes for keys of dim elements; either may be 0.
	HeadBytes(dim int) int
	ChunkBytes(dim int) int

	// TrainLevels lists, ascending, the token counts at which head records are (re)trained; nil if
	// there is nothing to train. When the longest sequence of a batch first reaches a level that the
	// layer has not reached, the head records of the layer are trained on that sequence's first
	// `level` valid tokens and the layer's chunk records are rebuilt. Past the last level they are
	// frozen. What a head record holds is thus a function of content, not of the order of steps.
	TrainLevels() []int

	// Train writes a head record from keys [n][dim]. Before the first level a head record is zeros,
	// and Index must give that a meaning.
	Train(head []byte, keys []float32, dim int)

	// Index brings a chunk record up to date. keys is [ChunkTokens][dim], meaningful for the tokens in
	// valid; bit i stands for the chunk's token i. fresh, a subset of valid, marks tokens whose keys
	// changed or are new; the record is right for all others. What covers the chunk as a whole must
	// afterwards cover exactly valid. It reports whether keys strayed far from what the head record
	// was trained on.
	Index(head, chunk []byte, keys []float32, dim int, valid, fresh uint16) (drifted bool)
}

// Seeder is a Shadow whose head records start from something else than zeros.
type Seeder interface {
	Shadow
	// Seed writes the head record, zeros so far, that a KV head of a layer, by the model's index, starts
	// with.
	Seed(head []byte, layer, kvHead, dim int)
}

// Records reads a shadow's records for one (layer, KV head) of one sequence.
type Records interface {
	// Head returns the head record. Chunk returns the record of the sequence's chunk c. Both are
	// read-only and valid until the layer ends.
	Head() []byte
	Chunk(c int) []byte
}
