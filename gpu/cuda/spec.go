//go:build linux && cgo && cuda

package cuda

import (
	"slices"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
	"github.com/twilight-sidecar/twilight/gpu/cuda/kernels"
	"github.com/twilight-sidecar/twilight/gpu/internal/spec"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
)

var served = spec.Limits{DTypes: cacheDTypes, MaxDim: kernels.MaxDim, DimStep: kernels.DimStep, MaxGroup: kernels.MaxGroup}

// layer is one layer of a cache.
type layer struct {
	model   int // the model's layer index
	slot    int // its place in the shadow; noSlot if the layer is skipped
	planes  [2]kernels.Plane
	scales  [2][]float32 // one per KV head
	extents [2]extent    // of k and v
	aligned bool         // every vector starts at a multiple of 16 bytes

	thresholds, channels drv.Ptr // the method's
}

// noSlot is the slot of a layer without a shadow.
const noSlot = -1

// layers checks a spec and says where its layers lie.
func (l *lease) layers(of *gpu.CacheSpec) ([]layer, error) {
	checked, err := served.Layers(of, &l.geometry, l.method.pipeline.Fits)
	if err != nil {
		return nil, err
	}
	layers := make([]layer, len(checked))
	slots := 0
	for i := range layers {
		layers[i].model, layers[i].slot = of.Layers[i].Layer, noSlot
		if !l.method.pipeline.Skips(layers[i].model) {
			layers[i].slot = slots
			slots++
		}
		layers[i].aligned = true
		for j := range checked[i] {
			p := &checked[i][j]
			e, at, err := l.locate(p.At.Memory, p.At.Offset, p.Size, of.DType.Size(), p.Field)
			if err != nil {
				return nil, err
			}
			layers[i].extents[j] = e
			layers[i].planes[j] = kernels.Plane{
				Base: at, Page: int64(p.Strides.Page), Head: int64(p.Strides.Head), Token: int64(p.Strides.Token),
			}
			if (at|p.Strides.Page|p.Strides.Head|p.Strides.Token)%16 != 0 {
				layers[i].aligned = false
			}
			layers[i].scales[j] = slices.Repeat([]float32{1}, l.geometry.KVHeads)
			if n := len(p.Scales); n > 0 {
				layers[i].scales[j] = slices.Repeat(p.Scales, l.geometry.KVHeads/n)
			}
		}
	}
	return layers, nil
}

// indexed is how many layers are not skipped.
func indexed(layers []layer) (n int) {
	for i := range layers {
		if layers[i].slot != noSlot {
			n++
		}
	}
	return n
}

// locate finds size bytes, aligned to elements of the given size, in one of the lease's memories.
func (l *lease) locate(mem gpu.Memory, offset, size uint64, element int, field string) (extent, drv.Ptr, error) {
	m, ok := mem.(*memory)
	if !ok || m.lease != l {
		return extent{}, 0, fault.Newf(fault.NotFound, field, "the region is not of this lease: register it here")
	}
	if (m.base+offset)%uint64(element) != 0 {
		return extent{}, 0, fault.Newf(fault.Invalid, field+".offset",
			"the address at offset %d must be a multiple of the element size %d", offset, element)
	}
	at, err := m.at(offset, size, field)
	return extent{m, offset, offset + size, field}, at, err
}

// writable refuses to write where nothing may be written: memory lent read-only, and caches.
func (l *lease) writable(e extent) error {
	if !e.memory.writable {
		return fault.Newf(fault.Permission, e.field, "the region is lent read-only: lend it read-write")
	}
	for c := range l.caches {
		for i := range c.layers {
			for _, k := range c.layers[i].extents {
				if e.overlaps(k) {
					return fault.Newf(fault.Permission, e.field,
						"bytes [%d, %d) of the region are part of a cache, which is never written: use others", e.from, e.to)
				}
			}
		}
	}
	return nil
}

// tensor is a checked [rows, heads, dim] on the device.
type tensor struct {
	at        drv.Ptr
	row, head int64 // strides in bytes
}

// lentTensor checks a tensor in lent memory, whose fields start with name.
func (l *lease) lentTensor(t *gpu.Tensor, rows, heads, dim int, dtype kv.DType, name string) (tensor, extent, error) {
	row, head, size, err := spec.Tensor(t, rows, heads, dim, dtype, name)
	if err != nil {
		return tensor{}, extent{}, err
	}
	e, at, err := l.locate(t.Memory, t.Offset, size, dtype.Size(), name+".at")
	return tensor{at, int64(row), int64(head)}, e, err
}
