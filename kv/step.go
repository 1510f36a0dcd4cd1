package kv

// Step declares a batch: what Step of proto/twilight/v1/step.proto says, in Go's terms. Optional
// columns are nil; all others have the length of Lengths. The tracker keeps no reference to it.
type Step struct {
	Sequences  []uint64 // nil only with Slots: anonymous rows
	Lengths    []int32
	FirstValid []int32

	TableStarts   []uint32
	TableCounts   []uint32
	TableEntries  []int32
	VTableEntries []int32

	UnchangedPrefix []int32
	PrefixOf        []uint64
	TruncateTo      []int32

	// BySlots says that Slots, possibly empty, replace the by-length rule.
	BySlots bool
	Slots   []int64

	Ended []uint64
}

// IndexStats counts what indexing did, tokens once per layer.
type IndexStats struct {
	TokensIndexed       uint64
	TokensClaimed       uint64
	ChunksDrifted       uint64
	StatisticsRefreshed uint32
}
