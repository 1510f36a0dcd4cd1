//go:build linux && cgo && cuda

package kernels

import (
	_ "embed"
	"fmt"
	"slices"
	"unsafe"

	"gorgonia.org/cu"

	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
	"github.com/twilight-sidecar/twilight/kv"
)

//go:embed chain.fatbin
var chain string

//go:embed dense.fatbin
var dense string

//go:embed fused.fatbin
var fused string

// Kernels are the functions of the modules, in the current context.
type Kernels struct {
	Check, Train, Index, Queries, Scores, RankQuery, RankKeys, RankLabels, Select cu.Function
	Estimate, EstimateCodes, Exact, Cut, Compact, Combine, Audit, Expand, Lists   cu.Function

	attend map[int]cu.Function

	// Dense are the variants of attention on the tensor cores, Fused those of the fused kernel; of the
	// latter there are none before compute capability 9.0.
	Dense, Fused []Tensor
}

// Tensor is a variant of a kernel that uses the tensor cores.
type Tensor struct {
	Function  cu.Function
	DType     kv.DType
	Dim       int // of keys and values
	Heads     int // that ask a list row, at most
	Threads   int
	Static    int // bytes of shared memory that a block takes in any case
	MaxShared int // bytes that it can take besides
}

// HeadsATile is how many heads a tensor core's tile takes. MaxCluster is the largest cluster that every
// device takes.
const (
	HeadsATile = 4
	MaxCluster = 8
)

// Load loads the module into the current context, every function of it at once: later, with a stream
// waiting, the driver might block.
func Load(device cu.Device) (*Kernels, error) {
	module, err := cu.LoadFatBinary(chain)
	if err != nil {
		return nil, drv.Wrap("cuModuleLoadFatBinary", err)
	}
	if err := checkLayout(module); err != nil {
		return nil, err
	}
	k := &Kernels{attend: make(map[int]cu.Function)}
	for name, f := range map[string]*cu.Function{
		"check": &k.Check, "train": &k.Train, "index": &k.Index, "queries": &k.Queries, "scores": &k.Scores,
		"rank_query": &k.RankQuery, "rank_keys": &k.RankKeys, "rank_labels": &k.RankLabels, "select": &k.Select,
		"estimate": &k.Estimate, "estimate_codes": &k.EstimateCodes, "exact": &k.Exact, "cut": &k.Cut,
		"compact": &k.Compact, "combine": &k.Combine, "audit": &k.Audit, "expand": &k.Expand, "lists": &k.Lists,
	} {
		if *f, err = module.Function("twilight_" + name); err != nil {
			return nil, drv.Wrap("cuModuleGetFunction "+name, err)
		}
	}
	for _, n := range attendSizes {
		f, err := module.Function(fmt.Sprintf("twilight_attend%d", n))
		if err == nil {
			err = drv.SetSharedLimit(f, AttendShared(n, MaxDim, MaxDim))
		}
		if err != nil {
			return nil, drv.Wrap("cuModuleGetFunction attend", err)
		}
		k.attend[n] = f
	}
	return k, k.loadTensor(device)
}

// loadTensor loads what uses the tensor cores.
func (k *Kernels) loadTensor(device cu.Device) error {
	major, err := device.Attribute(cu.ComputeCapabilityMajor)
	if err != nil {
		return drv.Wrap("cuDeviceGetAttribute", err)
	}
	most, err := drv.MaxShared(device)
	if err != nil {
		return err
	}
	attention, err := cu.LoadFatBinary(dense)
	if err != nil {
		return drv.Wrap("cuModuleLoadFatBinary", err)
	}
	var layers cu.Module
	if major >= 9 {
		if layers, err = cu.LoadFatBinary(fused); err != nil {
			return drv.Wrap("cuModuleLoadFatBinary", err)
		}
	}
	find := func(module cu.Module, v *Tensor, format string, args ...any) error {
		name := fmt.Sprintf(format, args...)
		if v.Function, err = module.Function(name); err != nil {
			return drv.Wrap("cuModuleGetFunction "+name, err)
		}
		fixed, err := drv.StaticShared(v.Function)
		if err != nil {
			return err
		}
		v.Static, v.MaxShared = fixed, most-fixed
		return drv.SetSharedLimit(v.Function, v.MaxShared)
	}
	for _, dtype := range []kv.DType{kv.F16, kv.BF16} {
		for _, dim := range []int{64, 128} {
			for _, heads := range []int{4, 8} {
				v := Tensor{DType: dtype, Dim: dim, Heads: heads, Threads: 128}
				if err := find(attention, &v, "twilight_dense_%v_%d_%d", dtype, dim, heads); err != nil {
					return err
				}
				k.Dense = append(k.Dense, v)
			}
			for _, v := range []Tensor{{Heads: 4, Threads: 256}, {Heads: 4, Threads: 512}, {Heads: 8, Threads: 256}} {
				if major < 9 {
					break
				}
				v.DType, v.Dim = dtype, dim
				if err := find(layers, &v, "twilight_fused_%v_%d_%d_%d", dtype, dim, v.Heads, v.Threads); err != nil {
					return err
				}
				k.Fused = append(k.Fused, v)
			}
		}
	}
	return nil
}

// DenseShared is the dynamic shared memory of an attention kernel on the tensor cores.
func (t *Tensor) DenseShared(asking int) int { return t.Threads / 32 * asking * (t.Dim + 2) * 4 }

// MaxDim and MaxGroup are the largest head size and group that the kernels take. Head sizes are
// multiples of DimStep.
const (
	MaxDim   = 256
	MaxGroup = 16
	DimStep  = 16
)

// attendWarps is kWarps of attend.
const attendWarps = 4

var attendSizes = []int{1, 2, 4, 8, 16}

// Attend returns the attention kernel for a number of asking heads, and for how many it was made.
func (k *Kernels) Attend(asking int) (f cu.Function, size int) {
	i, _ := slices.BinarySearch(attendSizes, asking)
	return k.attend[attendSizes[i]], attendSizes[i]
}

// AttendShared is the dynamic shared memory of an attention kernel made for size asking heads.
func AttendShared(size, kDim, vDim int) int {
	return 4 * (size*kDim + attendWarps*size*(vDim+2))
}

// IndexShared is the dynamic shared memory of Index.
func IndexShared(kDim int) int { return 4 * kv.ChunkTokens * kDim }

func checkLayout(module cu.Module) error {
	at, size, err := module.Global("twilight_layout")
	if err != nil {
		return drv.Wrap("cuModuleGetGlobal", err)
	}
	compiled := make([]uint32, size/4)
	if err := cu.MemcpyDtoH(unsafe.Pointer(unsafe.SliceData(compiled)), at, size); err != nil {
		return drv.Wrap("cuMemcpyDtoH", err)
	}
	if !slices.Equal(compiled, layout) {
		return fmt.Errorf("the kernels were compiled for another layout %v of Layer than %v: make kernels", compiled, layout)
	}
	return nil
}
