package host

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
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
func (l *lease) layers(spec *gpu.CacheSpec) ([]layer, error) {
	g := &l.geometry
	if !slices.Contains(dtypes, spec.DType) {
		return nil, fault.Newf(fault.Unsupported, "dtype",
			"caches of %v are not served: use one of %v", spec.DType, dtypes)
	}
	if len(spec.Layers) != g.Layers {
		return nil, fault.Newf(fault.Invalid, "layers",
			"the cache has %d layers but the lease's geometry %d: give as many", len(spec.Layers), g.Layers)
	}

	layers := make([]layer, len(spec.Layers))
	first := make(map[int]int, len(layers))
	slots := 0
	for i := range layers {
		s, field := &spec.Layers[i], fmt.Sprintf("layers[%d]", i)
		if j, ok := first[s.Layer]; ok {
			return nil, fault.Newf(fault.Invalid, field+".layer",
				"layer %d is that of layers[%d] already: name each once", s.Layer, j)
		}
		first[s.Layer] = i
		layers[i].model, layers[i].slot = s.Layer, noSlot
		if !l.pipeline.Skips(s.Layer) {
			layers[i].slot = slots
			slots++
		}
		var misfit *fault.Error
		if err := l.pipeline.Fits(s.Layer); errors.As(err, &misfit) {
			return nil, fault.Newf(misfit.Kind, field+".layer", "layer %d does not fit the lease's config: %v", s.Layer, misfit)
		} else if err != nil {
			return nil, err
		}
		for j, p := range []struct {
			plane   *kv.Plane
			at      gpu.Span
			strides gpu.Strides
			dim     int
			scales  []float32
			name    string
		}{
			{&layers[i].k, s.K, spec.K, g.KDim, s.KScales, "k"},
			{&layers[i].v, s.V, spec.V, g.VDim, s.VScales, "v"},
		} {
			if err := l.checkScales(spec.DType, p.scales, field+"."+p.name+"_scales"); err != nil {
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
			var data []byte
			layers[i].extents[j], data, err = l.locate(p.at.Memory, p.at.Offset, size, spec.DType.Size(), field+"."+p.name)
			if err != nil {
				return nil, err
			}
			*p.plane = kv.Plane{
				Data:       data,
				PageStride: int(p.strides.Page), HeadStride: int(p.strides.Head), TokenStride: int(p.strides.Token),
				PageSize: spec.PageSize, DType: spec.DType, Dim: p.dim, Scales: slices.Clone(p.scales),
			}
		}
	}
	return layers, nil
}

func (l *lease) checkScales(t kv.DType, scales []float32, field string) error {
	switch {
	case len(scales) == 0:
		return nil
	case t != kv.F8E4M3:
		return fault.Newf(fault.Invalid, field, "a cache of %v has no scales: leave them out", t)
	case len(scales) != 1 && len(scales) != l.geometry.KVHeads:
		return fault.Newf(fault.Invalid, field,
			"%d scales must be none, one, or one for each of the %d KV heads", len(scales), l.geometry.KVHeads)
	}
	for i, s := range scales {
		if !(s > 0) || math.IsInf(float64(s), 1) {
			return fault.Newf(fault.Invalid, fmt.Sprintf("%s[%d]", field, i), "%v must be positive and finite", s)
		}
	}
	return nil
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

// axis is a dimension of a strided array, and its stride in bytes.
type axis struct {
	name   string
	n      int
	stride *uint64
}

// reach is the number of bytes from the first to behind the last vector of a strided array of vectors
// of dim elements. Strides must be multiples of the element size, and vectors apart: in ascending order, each
// stride steps over all that smaller ones reach. Strides that are never taken are set to 0.
func reach(axes []axis, dim int, t kv.DType, field string) (uint64, error) {
	for i := 1; i < len(axes); i++ { // sorts; a library's sort would make axes escape
		for j := i; j > 0 && *axes[j].stride < *axes[j-1].stride; j-- {
			axes[j], axes[j-1] = axes[j-1], axes[j]
		}
	}
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
