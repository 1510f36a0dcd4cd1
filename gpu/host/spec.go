package host

import (
	"slices"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
)

// layer is one layer of a cache.
type layer struct {
	model   int // the model's layer index
	slot    int // its place in the shadows; noSlot if the layer is skipped
	k, v    kv.Plane
	extents [2]extent // of k and v
}

// noSlot is the slot of a layer without shadows.
const noSlot = -1

// layers checks where a spec's layers lie and returns views of them.
func (l *lease) layers(of *gpu.CacheSpec) ([]layer, error) {
	checked, err := served.Layers(of, &l.geometry, l.pipeline.Fits)
	if err != nil {
		return nil, err
	}
	layers := make([]layer, len(checked))
	slots := 0
	for i := range layers {
		layers[i].model, layers[i].slot = of.Layers[i].Layer, noSlot
		if !l.pipeline.Skips(layers[i].model) {
			layers[i].slot = slots
			slots++
		}
		for j, to := range []*kv.Plane{&layers[i].k, &layers[i].v} {
			p := &checked[i][j]
			e, data, err := l.locate(p.At.Memory, p.At.Offset, p.Size, of.DType.Size(), p.Field)
			if err != nil {
				return nil, err
			}
			layers[i].extents[j] = e
			*to = kv.Plane{
				Data:       data,
				PageStride: int(p.Strides.Page), HeadStride: int(p.Strides.Head), TokenStride: int(p.Strides.Token),
				PageSize: of.PageSize, DType: of.DType, Dim: p.Dim, Scales: slices.Clone(p.Scales),
			}
		}
	}
	return layers, nil
}

// locate finds size bytes of elements of some bytes each in one of the lease's memories.
func (l *lease) locate(mem gpu.Memory, offset, size uint64, element int, field string) (extent, []byte, error) {
	m, ok := mem.(*memory)
	if !ok || m.lease != l {
		return extent{}, nil, fault.Newf(fault.NotFound, field, "the region is not of this lease: register it here")
	}
	if offset%uint64(element) != 0 {
		return extent{}, nil, fault.Newf(fault.Invalid, field+".offset",
			"offset %d must be a multiple of the element size %d", offset, element)
	}
	data, err := m.bytes(offset, size, field)
	return extent{m, offset, offset + size, field}, data, err
}
