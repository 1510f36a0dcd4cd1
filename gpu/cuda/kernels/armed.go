//go:build linux && cgo && cuda

package kernels

import (
	_ "embed"
	"unsafe"

	"gorgonia.org/cu"

	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
)

//go:embed armed.fatbin
var armed string

// Armed are the kernels of armed steps, besides those of their layers.
type Armed struct {
	Begin, Halt, Fail, Poison cu.Function

	BatchRows, BatchSlots, BatchForget, BatchChunks, BatchWork, BatchBook cu.Function
}

// Step is what twilight_begin reads; armed.h says what each field means.
type Step struct {
	ID                   uint32
	Layers, Patches      int32
	PatchesAt, EntriesAt int32
	GoAt, RunAt, PlanAt  int32
}

// Patch is a change of a table.
type Patch struct{ To, From, Count, Differ int32 }

// Batch is what the kernels that read a batch in the engine's memory are called with.
type Batch struct {
	Lengths, Table, First, Slots uint64

	OwnLengths, OwnFirst, Bad uint64
	OwnTable                  uint64
	SparsePaths, DensePaths   uint64
	Budgets                   uint64

	Masks, Wanted     uint64
	Listed, NumListed uint64
	Work, Plan        uint64
	Go, Run           uint64
	Gate, News        uint64
	Indexed           uint64
	Trained, BadSlot  uint64
	Training          uint64

	Rate                                                                 float64
	Rows, Stride, OwnStride, MaxLength, NumSlots                         int32
	PageSize, NumPages, NullPage, Chunks                                 int32
	Layers, Plain, DenseBelow, SelectAll, TokenBudget, Indexes, InTokens int32
	Levels                                                               [MaxLevels]int32
}

// Enums of layer.h.
const (
	Park = 0
	Go   = 1
	Skip = 2

	NewsStep   = 0
	NewsParked = 1
	NewsSlot   = 2
	NewsWords  = 3
)

// PlanWords are the words of a layer's plan. MaxLevels is how many training levels a method has at most.
const (
	PlanWords = 4
	MaxLevels = 4
)

// armedLayout is what twilight_armed_layout in armed.cu must say.
var armedLayout = []uint32{
	uint32(unsafe.Sizeof(Step{})),
	uint32(unsafe.Sizeof(Patch{})),
	uint32(unsafe.Sizeof(Batch{})),
	uint32(unsafe.Offsetof(Batch{}.OwnLengths)),
	uint32(unsafe.Offsetof(Batch{}.Masks)),
	uint32(unsafe.Offsetof(Batch{}.Rate)),
	uint32(unsafe.Offsetof(Batch{}.Levels)),
}

// loadArmed loads them.
func (k *Kernels) loadArmed() error {
	module, err := cu.LoadFatBinary(armed)
	if err != nil {
		return drv.Wrap("cuModuleLoadFatBinary", err)
	}
	if err := checkLayout(module, "twilight_armed_layout", armedLayout); err != nil {
		return err
	}
	a := &k.Armed
	for name, f := range map[string]*cu.Function{
		"begin": &a.Begin, "halt": &a.Halt, "fail": &a.Fail, "poison": &a.Poison, "batch_rows": &a.BatchRows,
		"batch_slots": &a.BatchSlots, "batch_forget": &a.BatchForget, "batch_chunks": &a.BatchChunks,
		"batch_work": &a.BatchWork, "batch_book": &a.BatchBook,
	} {
		if *f, err = find(module, "twilight_"+name); err != nil {
			return err
		}
	}
	return nil
}
