//go:build linux && cgo && cuda

package cuda

import (
	"cmp"
	"fmt"
	"math"
	"math/bits"
	"slices"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
	"github.com/twilight-sidecar/twilight/gpu/cuda/kernels"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
)

// layer is one layer of a cache.
type layer struct {
	model   int // the model's layer index
	planes  [2]kernels.Plane
	scales  [2][]float32 // one per KV head
	extents [2]extent    // of k and v
	aligned bool         // every vector starts at a multiple of 16 bytes
}

// layers checks a spec and says where its layers lie.
func (l *lease) layers(spec *gpu.CacheSpec) ([]layer, error) {
	g := &l.geometry
	if !slices.Contains(cacheDTypes, spec.DType) {
		return nil, fault.Newf(fault.Unsupported, "dtype",
			"caches of %v are not served: use one of %v", spec.DType, cacheDTypes)
	}
	if len(spec.Layers) != g.Layers {
		return nil, fault.Newf(fault.Invalid, "layers",
			"the cache has %d layers but the lease's geometry %d: give as many", len(spec.Layers), g.Layers)
	}

	layers := make([]layer, len(spec.Layers))
	first := make(map[int]int, len(layers))
	for i := range layers {
		s, field := &spec.Layers[i], fmt.Sprintf("layers[%d]", i)
		if j, ok := first[s.Layer]; ok {
			return nil, fault.Newf(fault.Invalid, field+".layer",
				"layer %d is that of layers[%d] already: name each once", s.Layer, j)
		}
		first[s.Layer] = i
		layers[i].model = s.Layer
		layers[i].aligned = true
		for j, p := range []struct {
			at      gpu.Span
			strides gpu.Strides
			dim     int
			scales  []float32
			name    string
		}{
			{s.K, spec.K, g.KDim, s.KScales, "k"},
			{s.V, spec.V, g.VDim, s.VScales, "v"},
		} {
			var err error
			if layers[i].scales[j], err = l.headScales(spec.DType, p.scales, field+"."+p.name+"_scales"); err != nil {
				return nil, err
			}
			size, err := reach([]axis{
				{"page", spec.NumPages, &p.strides.Page},
				{"head", g.KVHeads, &p.strides.Head},
				{"token", spec.PageSize, &p.strides.Token},
			}, p.dim, spec.DType, p.name+"_strides")
			if err != nil {
				return nil, err
			}
			var at drv.Ptr
			layers[i].extents[j], at, err = l.locate(p.at.Memory, p.at.Offset, size, spec.DType.Size(), field+"."+p.name)
			if err != nil {
				return nil, err
			}
			layers[i].planes[j] = kernels.Plane{
				Base: at, Page: int64(p.strides.Page), Head: int64(p.strides.Head), Token: int64(p.strides.Token),
			}
			if (at|p.strides.Page|p.strides.Head|p.strides.Token)%16 != 0 {
				layers[i].aligned = false
			}
		}
	}
	return layers, nil
}

// headScales checks scales and returns one for each KV head.
func (l *lease) headScales(t kv.DType, scales []float32, field string) ([]float32, error) {
	heads := l.geometry.KVHeads
	switch {
	case len(scales) == 0:
		return slices.Repeat([]float32{1}, heads), nil
	case t != kv.F8E4M3:
		return nil, fault.Newf(fault.Invalid, field, "a cache of %v has no scales: leave them out", t)
	case len(scales) != 1 && len(scales) != heads:
		return nil, fault.Newf(fault.Invalid, field,
			"%d scales must be none, one, or one for each of the %d KV heads", len(scales), heads)
	}
	for i, s := range scales {
		if !(s > 0) || math.IsInf(float64(s), 1) {
			return nil, fault.Newf(fault.Invalid, fmt.Sprintf("%s[%d]", field, i), "%v must be positive and finite", s)
		}
	}
	return slices.Repeat(scales, heads/len(scales)), nil
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
	vector := dim * dtype.Size()
	head := cmp.Or(t.HeadStride, uint64(vector))
	row := cmp.Or(t.RowStride, mul(uint64(heads), head))
	size, err := reach([]axis{{"row_stride", rows, &row}, {"head_stride", heads, &head}}, dim, dtype, name)
	if err != nil {
		return tensor{}, extent{}, err
	}
	if rows == 0 {
		size = 0
	}
	e, at, err := l.locate(t.Memory, t.Offset, size, dtype.Size(), name+".at")
	return tensor{at, int64(row), int64(head)}, e, err
}

// axis is a dimension of a strided array, and its stride in bytes.
type axis struct {
	name   string
	n      int
	stride *uint64
}

// reach is the number of bytes from the first to behind the last vector of a strided array of vectors
// of dim elements. Strides must be multiples of the element size, and vectors apart: in ascending order,
// each stride steps over all that smaller ones reach. Strides that are never taken are set to 0.
func reach(axes []axis, dim int, t kv.DType, field string) (uint64, error) {
	slices.SortStableFunc(axes, func(a, b axis) int { return cmp.Compare(*a.stride, *b.stride) })
	element := uint64(t.Size())
	size := uint64(dim) * element
	for _, a := range axes {
		if a.n <= 1 {
			*a.stride = 0
			continue
		}
		if *a.stride%element != 0 {
			return 0, fault.Newf(fault.Invalid, field+"."+a.name,
				"%d bytes must be a multiple of the element size %d", *a.stride, element)
		}
		if *a.stride < size {
			return 0, fault.Newf(fault.Invalid, field+"."+a.name,
				"%d bytes let elements overlap: use at least %d", *a.stride, size)
		}
		high, steps := bits.Mul64(*a.stride, uint64(a.n-1))
		sum, carry := bits.Add64(size, steps, 0)
		if high != 0 || carry != 0 {
			return 0, fault.Newf(fault.OutOfRange, field+"."+a.name,
				"%d steps of %d bytes lie beyond any region: use smaller ones", a.n-1, *a.stride)
		}
		size = sum
	}
	return size, nil
}

// add and mul saturate.
func add(a, b uint64) uint64 {
	if sum, carry := bits.Add64(a, b, 0); carry == 0 {
		return sum
	}
	return math.MaxUint64
}

func mul(a, b uint64) uint64 {
	if high, low := bits.Mul64(a, b); high == 0 {
		return low
	}
	return math.MaxUint64
}
