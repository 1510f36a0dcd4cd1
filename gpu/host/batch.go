package host

import (
	"encoding/binary"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/internal/spec"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
)

// slotBytes is the size of a slot in lent memory.
const slotBytes = 8

// lentBatch is where a batch lies; of no rows if it came with the step.
type lentBatch struct {
	rows, stride, maxLength      int
	lengths, table, slots, first []byte // first is nil without
	extents                      [4]extent
	bad                          []bool // by row, of the batch last read
}

// locateBatch finds a batch. What is in it is checked when it is read.
func (c *cache) locateBatch(b *lentBatch, from *gpu.DeviceBatch) (err error) {
	limits := &c.lease.device.options.Limits
	switch size := c.paging.PageSize; {
	case size%kv.ChunkTokens != 0:
		return fault.Newf(fault.Unsupported, "slots",
			"page_size %d is not a multiple of %d: send the batch in the message", size, kv.ChunkTokens)
	case from.Rows < 1 || from.Rows > limits.Batch:
		return fault.Exhaustedf("batch", uint64(max(from.Rows, 0)), uint64(limits.Batch),
			"%d rows are not in [1, %d]", from.Rows, limits.Batch)
	case from.MaxLength < 1 || from.MaxLength > limits.SequenceTokens:
		return fault.Exhaustedf("max_length", uint64(max(from.MaxLength, 0)), uint64(limits.SequenceTokens),
			"%d tokens are not in [1, %d]", from.MaxLength, limits.SequenceTokens)
	case from.TableStride < (from.MaxLength+size-1)/size:
		return fault.Newf(fault.Invalid, "table_stride",
			"%d entries hold fewer than max_length %d tokens in pages of %d", from.TableStride, from.MaxLength, size)
	case from.NumSlots < 0:
		return fault.Newf(fault.Invalid, "num_slots", "%d must be 0 or more", from.NumSlots)
	case from.Slots.Memory == nil:
		return fault.Newf(fault.Invalid, "slots", "is absent: its rows have no names, so the slots written must be told")
	}
	rows := uint64(from.Rows)
	for i, part := range [...]struct {
		at      gpu.Span
		n       uint64
		element int
		name    string
		data    *[]byte
	}{
		{from.Lengths, rows, entryBytes, "lengths", &b.lengths},
		{from.Table, spec.Mul(rows, uint64(from.TableStride)), entryBytes, "table", &b.table},
		{from.Slots, uint64(from.NumSlots), slotBytes, "slots", &b.slots},
		{from.FirstValid, rows, entryBytes, "first_valid", &b.first},
	} {
		if part.at.Memory == nil && part.data == &b.first {
			continue
		}
		b.extents[i], *part.data, err = c.lease.locate(part.at.Memory, part.at.Offset,
			spec.Mul(part.n, uint64(part.element)), part.element, part.name)
		if err != nil {
			return err
		}
		b.extents[i].field = "device." + part.name
	}
	b.rows, b.stride, b.maxLength = from.Rows, from.TableStride, from.MaxLength
	return nil
}

func (b *lentBatch) uses(m *memory) bool {
	for i := range b.extents {
		if b.extents[i].memory == m {
			return true
		}
	}
	return false
}

// readBatch reads the batch of a step that has begun and makes it current.
func (a *armer) readBatch(s *armedStep) error {
	c := a.cache
	c.lease.mu.Lock()
	defer c.lease.mu.Unlock()
	s.lent.read(&s.batch, &c.paging)
	return fault.In("device", c.declare(&s.batch))
}

// read reads each value once, for it may change, and makes bad rows void.
func (b *lentBatch) read(step *kv.Step, paging *kv.TrackerConfig) {
	*step = kv.Step{
		Lengths: sized(step.Lengths, b.rows), FirstValid: sized(step.FirstValid, b.rows),
		TableCounts: sized(step.TableCounts, b.rows), TableEntries: step.TableEntries[:0],
		BySlots: true, Slots: sized(step.Slots, len(b.slots)/slotBytes),
	}
	for i := range step.Slots {
		step.Slots[i] = int64(binary.LittleEndian.Uint64(b.slots[i*slotBytes:]))
	}
	b.bad = sized(b.bad, b.rows)
	for row := range b.rows {
		length, first := entryAt(b.lengths, row), int32(0)
		if b.first != nil {
			first = entryAt(b.first, row)
		}
		before := len(step.TableEntries)
		b.bad[row] = length < 0 || int(length) > b.maxLength || first < 0 || length > 0 && first >= length
		if !b.bad[row] {
			pages := (int(length) + paging.PageSize - 1) / paging.PageSize
			for i := range pages {
				page := entryAt(b.table, row*b.stride+i)
				step.TableEntries = append(step.TableEntries, page)
				valid := page >= 0 && int(page) < paging.NumPages && page != paging.NullPage
				b.bad[row] = b.bad[row] || !valid && i >= int(first)/paging.PageSize
			}
		}
		if b.bad[row] || length == 0 {
			length, first = 0, 0
			step.TableEntries = step.TableEntries[:before]
		}
		step.Lengths[row], step.FirstValid[row] = length, first
		step.TableCounts[row] = uint32(len(step.TableEntries) - before)
	}
}

func entryAt(data []byte, i int) int32 {
	return int32(binary.LittleEndian.Uint32(data[i*entryBytes:]))
}

// mark says of bad rows that they are.
func (b *lentBatch) mark(r *gpu.LayerResult, l *lease) {
	if b.rows == 0 {
		return
	}
	perRow := l.geometry.KVHeads * l.lists
	for row, bad := range b.bad {
		for i := range perRow {
			if bad {
				r.Reasons[row*perRow+i] = pipeline.BadRow
			}
		}
	}
}
