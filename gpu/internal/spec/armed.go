package spec

import (
	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
)

// Armed checks what an armed step says of itself.
func Armed(step *gpu.ArmedStep) error {
	switch {
	case step.ID == 0:
		return fault.Newf(fault.Invalid, "step_id", "has 0 in its low 32 bits, which says that no step has begun: skip it")
	case len(step.Layers) == 0:
		return fault.Newf(fault.Invalid, "armed.layers", "is empty: name the layers that the step runs")
	case step.WaitTimeout < 0 || step.WaitTimeout > gpu.MaxWaitTimeout:
		return fault.Newf(fault.OutOfRange, "armed.wait_timeout_ms", "%v must be in [0, %v]", step.WaitTimeout, gpu.MaxWaitTimeout)
	}
	return nil
}

// The elements of a batch in lent memory, in bytes.
const (
	EntryBytes = 4 // of lengths, tables and first valid positions
	SlotBytes  = 8
)

// Part is an array of a batch in lent memory.
type Part struct {
	At      gpu.Span
	Size    uint64
	Element int // bytes, and what At is aligned to
	Name    string
}

// The parts of a batch, by their places. FirstValid may be of no memory, and is absent then.
const (
	Lengths = iota
	Table
	Slots
	FirstValid
	batchParts
)

// Batch checks a batch that lies in memory, and tells where. What is in it devices check.
func Batch(b *gpu.DeviceBatch, pageSize int, limits *gpu.Limits) (parts [batchParts]Part, err error) {
	switch {
	case pageSize%kv.ChunkTokens != 0:
		return parts, fault.Newf(fault.Unsupported, "slots",
			"page_size %d is not a multiple of %d: send the batch in the message", pageSize, kv.ChunkTokens)
	case b.Rows < 1 || b.Rows > limits.Batch:
		return parts, fault.Exhaustedf("batch", uint64(max(b.Rows, 0)), uint64(limits.Batch),
			"%d rows are not in [1, %d]", b.Rows, limits.Batch)
	case b.MaxLength < 1 || b.MaxLength > limits.SequenceTokens:
		return parts, fault.Exhaustedf("max_length", uint64(max(b.MaxLength, 0)), uint64(limits.SequenceTokens),
			"%d tokens are not in [1, %d]", b.MaxLength, limits.SequenceTokens)
	case b.TableStride < (b.MaxLength+pageSize-1)/pageSize:
		return parts, fault.Newf(fault.Invalid, "table_stride",
			"%d entries hold fewer than max_length %d tokens in pages of %d", b.TableStride, b.MaxLength, pageSize)
	case b.NumSlots < 0:
		return parts, fault.Newf(fault.Invalid, "num_slots", "%d must be 0 or more", b.NumSlots)
	case b.Slots.Memory == nil:
		return parts, fault.Newf(fault.Invalid, "slots", "is absent: its rows have no names, so the slots written must be told")
	}
	rows := uint64(b.Rows)
	return [batchParts]Part{
		Lengths:    {b.Lengths, rows * EntryBytes, EntryBytes, "lengths"},
		Table:      {b.Table, Mul(rows, Mul(uint64(b.TableStride), EntryBytes)), EntryBytes, "table"},
		Slots:      {b.Slots, Mul(uint64(b.NumSlots), SlotBytes), SlotBytes, "slots"},
		FirstValid: {b.FirstValid, rows * EntryBytes, EntryBytes, "first_valid"},
	}, nil
}
