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

// Copy makes s a copy of from, in the memory that it has.
func (s *Step) Copy(from *Step) {
	*s = Step{
		Sequences:  append(s.Sequences[:0], from.Sequences...),
		Lengths:    append(s.Lengths[:0], from.Lengths...),
		FirstValid: append(s.FirstValid[:0], from.FirstValid...),

		TableStarts:   append(s.TableStarts[:0], from.TableStarts...),
		TableCounts:   append(s.TableCounts[:0], from.TableCounts...),
		TableEntries:  append(s.TableEntries[:0], from.TableEntries...),
		VTableEntries: append(s.VTableEntries[:0], from.VTableEntries...),

		UnchangedPrefix: append(s.UnchangedPrefix[:0], from.UnchangedPrefix...),
		PrefixOf:        append(s.PrefixOf[:0], from.PrefixOf...),
		TruncateTo:      append(s.TruncateTo[:0], from.TruncateTo...),

		BySlots: from.BySlots,
		Slots:   append(s.Slots[:0], from.Slots...),

		Ended: append(s.Ended[:0], from.Ended...),
	}
}

// IndexStats counts what indexing did, tokens once per layer.
type IndexStats struct {
	TokensIndexed       uint64
	TokensClaimed       uint64
	ChunksDrifted       uint64
	StatisticsRefreshed uint32
}
