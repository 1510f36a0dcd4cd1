package host

import (
	"encoding/binary"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/internal/spec"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
)

// lentBatch is where a batch lies; of no rows if it came with the step.
type lentBatch struct {
	rows, stride, maxLength      int
	lengths, table, slots, first []byte // first is nil without
	extents                      [4]extent
	bad                          []bool // by row, of the batch last read
}

// locateBatch finds a batch. What is in it is checked when it is read.
func (c *cache) locateBatch(b *lentBatch, from *gpu.DeviceBatch) error {
	parts, err := spec.Batch(from, c.paging.PageSize, &c.lease.device.options.Limits)
	if err != nil {
		return err
	}
	for i, to := range [len(parts)]*[]byte{&b.lengths, &b.table, &b.slots, &b.first} {
		part := &parts[i]
		if part.At.Memory == nil && i == spec.FirstValid {
			continue
		}
		b.extents[i], *to, err = c.lease.locate(part.At.Memory, part.At.Offset, part.Size, part.Element, part.Name)
		if err != nil {
			return err
		}
		b.extents[i].field = "device." + part.Name
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
		BySlots: true, Slots: sized(step.Slots, len(b.slots)/spec.SlotBytes),
	}
	for i := range step.Slots {
		step.Slots[i] = int64(binary.LittleEndian.Uint64(b.slots[i*spec.SlotBytes:]))
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
	return int32(binary.LittleEndian.Uint32(data[i*spec.EntryBytes:]))
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
