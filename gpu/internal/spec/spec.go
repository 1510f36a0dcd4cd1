// Package spec is what every device checks of what an engine says: geometries, where caches and tensors
// lie, and what single rows ask for. Where memory is, devices know.
package spec

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"slices"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
)

// Limits are what a device serves.
type Limits struct {
	DTypes   []kv.DType // of caches, queries and, but for fp8, outputs
	MaxDim   int        // head sizes are multiples of DimStep up to this
	DimStep  int
	MaxGroup int
}

// Geometry refuses what has no meaning, and what is not served.
func (l *Limits) Geometry(g *kv.Geometry) error {
	for _, f := range []struct {
		name  string
		value int
		min   int
	}{{"num_layers", g.Layers, 1}, {"kv_heads", g.KVHeads, 1}, {"query_heads", g.QueryHeads, g.KVHeads}} {
		if f.value < f.min || f.value > math.MaxInt32 {
			return fault.Newf(fault.Invalid, f.name, "%d must be in [%d, 2^31)", f.value, f.min)
		}
	}
	for _, d := range []struct {
		name string
		dim  int
	}{{"k_dim", g.KDim}, {"v_dim", g.VDim}} {
		switch {
		case d.dim < 1 || d.dim > l.MaxDim:
			return fault.Newf(fault.Unsupported, d.name, "%d must be in [1, %d]", d.dim, l.MaxDim)
		case d.dim%l.DimStep != 0:
			return fault.Newf(fault.Unsupported, d.name,
				"%d is not served: use a multiple of %d up to %d", d.dim, l.DimStep, l.MaxDim)
		}
	}
	switch {
	case g.QueryHeads%g.KVHeads != 0:
		return fault.Newf(fault.Invalid, "query_heads", "%d must be a multiple of kv_heads, %d", g.QueryHeads, g.KVHeads)
	case g.Group() > l.MaxGroup:
		return fault.Newf(fault.Unsupported, "query_heads",
			"%d for %d KV heads make a group of more than %d", g.QueryHeads, g.KVHeads, l.MaxGroup)
	case g.Scale == 0 || !finite(g.Scale):
		return fault.Newf(fault.Invalid, "softmax_scale", "%v must be finite and not 0", g.Scale)
	case !(g.Softcap >= 0) || !finite(g.Softcap):
		return fault.Newf(fault.Invalid, "logit_softcap", "%v must be finite, and 0 or more", g.Softcap)
	case g.Sinks != nil && len(g.Sinks) != g.QueryHeads:
		return fault.Newf(fault.Invalid, "sinks",
			"%d must be none or one for each of the %d query heads", len(g.Sinks), g.QueryHeads)
	case !slices.Contains(l.DTypes, g.Query):
		return fault.Newf(fault.Unsupported, "query_dtype", "%v is not served: use one of %v", g.Query, l.DTypes)
	case !(g.QueryScale > 0) || !finite(g.QueryScale):
		return fault.Newf(fault.Invalid, "query_scale", "%v must be finite and positive", g.QueryScale)
	case g.QueryScale != 1 && g.Query != kv.F8E4M3:
		return fault.Newf(fault.Invalid, "query_scale", "%v is for fp8 queries: use 1 with %v", g.QueryScale, g.Query)
	case g.Output == kv.F8E4M3 || !slices.Contains(l.DTypes, g.Output):
		return fault.Newf(fault.Unsupported, "output_dtype", "%v is not served: use fp32, fp16 or bf16", g.Output)
	}
	for i, s := range g.Sinks {
		if !finite(s) {
			return fault.Newf(fault.Invalid, fmt.Sprintf("sinks[%d]", i), "%v must be finite", s)
		}
	}
	return nil
}

func finite(f float32) bool { return f-f == 0 }

// Plane is K or V of a layer of a cache, of which all but its place in memory is checked.
type Plane struct {
	At      gpu.Span
	Strides gpu.Strides // 0 where they are never taken
	Dim     int
	Scales  []float32 // nil, one, or one for each KV head
	Size    uint64    // bytes from the first to behind the last vector
	Field   string    // that At is a value of
}

// Layers checks a cache of a geometry and returns K and V of its layers. fits tells what keeps the lease's
// config from serving a layer of the model.
func (l *Limits) Layers(spec *gpu.CacheSpec, g *kv.Geometry, fits func(layer int) error) ([][2]Plane, error) {
	if !slices.Contains(l.DTypes, spec.DType) {
		return nil, fault.Newf(fault.Unsupported, "dtype",
			"caches of %v are not served: use one of %v", spec.DType, l.DTypes)
	}
	if len(spec.Layers) != g.Layers {
		return nil, fault.Newf(fault.Invalid, "layers",
			"the cache has %d layers but the lease's geometry %d: give as many", len(spec.Layers), g.Layers)
	}
	layers := make([][2]Plane, len(spec.Layers))
	first := make(map[int]int, len(layers))
	for i := range layers {
		s, field := &spec.Layers[i], fmt.Sprintf("layers[%d]", i)
		if j, ok := first[s.Layer]; ok {
			return nil, fault.Newf(fault.Invalid, field+".layer",
				"layer %d is that of layers[%d] already: name each once", s.Layer, j)
		}
		first[s.Layer] = i
		var misfit *fault.Error
		if err := fits(s.Layer); errors.As(err, &misfit) {
			return nil, fault.Newf(misfit.Kind, field+".layer", "layer %d does not fit the lease's config: %v", s.Layer, misfit)
		} else if err != nil {
			return nil, err
		}
		layers[i] = [2]Plane{
			{At: s.K, Strides: spec.K, Dim: g.KDim, Scales: s.KScales, Field: field + ".k"},
			{At: s.V, Strides: spec.V, Dim: g.VDim, Scales: s.VScales, Field: field + ".v"},
		}
		for j, strides := range []string{"k_strides", "v_strides"} {
			if err := layers[i][j].check(spec, g.KVHeads, strides); err != nil {
				return nil, err
			}
		}
	}
	return layers, nil
}

// check checks a plane's scales and strides, and sets its size.
func (p *Plane) check(spec *gpu.CacheSpec, heads int, strides string) (err error) {
	field := p.Field + "_scales"
	switch n := len(p.Scales); {
	case n > 0 && spec.DType != kv.F8E4M3:
		return fault.Newf(fault.Invalid, field, "a cache of %v has no scales: leave them out", spec.DType)
	case n > 1 && n != heads:
		return fault.Newf(fault.Invalid, field,
			"%d scales must be none, one, or one for each of the %d KV heads", n, heads)
	}
	for i, s := range p.Scales {
		if !(s > 0) || !finite(s) {
			return fault.Newf(fault.Invalid, fmt.Sprintf("%s[%d]", field, i), "%v must be positive and finite", s)
		}
	}
	p.Size, err = reach([]axis{
		{"page", spec.NumPages, &p.Strides.Page},
		{"head", heads, &p.Strides.Head},
		{"token", spec.PageSize, &p.Strides.Token},
	}, p.Dim, spec.DType, strides)
	return err
}

// Inline checks a [rows, heads, dim] that came in a message.
func Inline(data []byte, rows, heads, dim int, dtype kv.DType, field string) error {
	if size := rows * heads * dim * dtype.Size(); len(data) != size {
		return fault.Newf(fault.Invalid, field,
			"%d bytes must be %d, those of [%d, %d, %d] in %v", len(data), size, rows, heads, dim, dtype)
	}
	return nil
}

// Tensor returns the strides of a [rows, heads, dim] in memory, whose fields start with name, and the bytes
// from its first to behind its last vector.
func Tensor(t *gpu.Tensor, rows, heads, dim int, dtype kv.DType, name string) (row, head, size uint64, err error) {
	head = cmp.Or(t.HeadStride, uint64(dim*dtype.Size()))
	row = cmp.Or(t.RowStride, Mul(uint64(heads), head))
	size, err = reach([]axis{{"row_stride", rows, &row}, {"head_stride", heads, &head}}, dim, dtype, name)
	if rows == 0 {
		size = 0
	}
	return row, head, size, err
}

// Overrides checks what the sequences of a batch ask for by themselves.
func Overrides(req *gpu.LayerRequest, batch int) error {
	if len(req.P) != 0 && len(req.P) != batch {
		return fault.Newf(fault.Invalid, "p", "%d values must be none or one for each of the %d sequences", len(req.P), batch)
	}
	for b, p := range req.P {
		if !(p >= 0 && p <= 1) {
			return fault.Newf(fault.Invalid, fmt.Sprintf("p[%d]", b), "%v must be in [0, 1]", p)
		}
	}
	if len(req.TokenBudget) != 0 && len(req.TokenBudget) != batch {
		return fault.Newf(fault.Invalid, "token_budget",
			"%d values must be none or one for each of the %d sequences", len(req.TokenBudget), batch)
	}
	return nil
}

// ListCapacity checks that of a list buffer.
func ListCapacity(b *gpu.ListBuffer) error {
	if b.Capacity < 1 || b.Capacity > math.MaxInt32 {
		return fault.Newf(fault.Invalid, "list_buffer.capacity", "%d entries must be in [1, 2^31)", b.Capacity)
	}
	return nil
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

// Add returns the sum, or the largest number if that overflows.
func Add(a, b uint64) uint64 {
	sum, carry := bits.Add64(a, b, 0)
	return sum | -carry
}

// Mul returns the product, or the largest number if that overflows.
func Mul(a, b uint64) uint64 {
	high, low := bits.Mul64(a, b)
	if high != 0 {
		return math.MaxUint64
	}
	return low
}
