package host

import (
	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/internal/spec"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
)

// tensor is a checked [rows, heads, dim] in lent memory or in a message.
type tensor struct {
	data      []byte // from the first element on
	row, head int    // strides in bytes
	extent    extent // empty for a message's
}

// at returns the vector of (row, head) and what follows it.
func (t *tensor) at(row, head int) []byte { return t.data[row*t.row+head*t.head:] }

// packed is a tensor in data, which has its size.
func packed(data []byte, heads, vector int) tensor {
	return tensor{data: data, row: heads * vector, head: vector}
}

// tensorField names a request's field that is a tensor: in the message, in memory, and where in memory.
type tensorField struct{ inline, lent, at string }

var (
	queryField  = tensorField{"query_inline", "query_tensor", "query_tensor.at"}
	outputField = tensorField{"output_inline", "output_tensor", "output_tensor.at"}
)

// tensor checks t, which field names.
func (l *lease) tensor(t *gpu.Tensor, rows, heads, dim int, dtype kv.DType, field *tensorField) (tensor, error) {
	if t.Memory == nil {
		return packed(t.Inline, heads, dim*dtype.Size()), spec.Inline(t.Inline, rows, heads, dim, dtype, field.inline)
	}
	row, head, size, err := spec.Tensor(t, rows, heads, dim, dtype, field.lent)
	if err != nil {
		return tensor{}, err
	}
	e, data, err := l.locate(t.Memory, t.Offset, size, dtype.Size(), field.at)
	return tensor{data: data, row: int(row), head: int(head), extent: e}, err
}

// writable refuses to write where nothing may be written: memory lent read-only, and caches.
func (l *lease) writable(e extent) error {
	if !e.memory.writable {
		return fault.Newf(fault.Permission, e.field, "the region is lent read-only: lend it read-write")
	}
	if l.cached(e) {
		return fault.Newf(fault.Permission, e.field,
			"bytes [%d, %d) of the region belong to a cache, which is never written: use others", e.from, e.to)
	}
	return nil
}
