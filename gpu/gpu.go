// Package gpu is the boundary to compute devices: it imports an engine's memory, holds the shadow,
// indexes, and runs the layers of decode steps. gpu/host is the CPU, gpu/cuda NVIDIA GPUs; gpu/gputest
// is the suite that every Device must pass.
//
// What is wrong with a request is a *fault.Error, whose field is named as in proto/twilight/v1.
//
// A Device serves many leases at once. A Lease and what hangs on it serve one caller at a time, except
// Close and CancelArmed, which may come at any moment. Armed steps run beside all that.
package gpu

import (
	"context"
	"time"

	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
)

// Device is a place where layers can run. What Info does not declare is refused with fault.Unsupported.
type Device interface {
	Info() Info

	// ShadowBytesPerToken is what the shadow takes for a token, over all layers and KV heads of g, whose
	// layers are taken for the model's first.
	ShadowBytesPerToken(g *kv.Geometry, cfg *pipeline.Config) (float64, error)

	// Open reserves the device for a geometry and a config.
	Open(ctx context.Context, g *kv.Geometry, cfg *pipeline.Config) (Lease, error)

	// SelfTest runs a layer of known result through the device. Nothing is served before it passed.
	SelfTest(ctx context.Context) error

	// Close ends all leases and frees the device. It may be called twice.
	Close() error
}

// Info is what a device declares it can do.
type Info struct {
	ID      string // "host", or a GPU's UUID
	Backend string // "host" or "cuda"
	Name    string

	ShadowBytesTotal, ShadowBytesFree uint64
	Limits                            Limits

	CacheDTypes, QueryDTypes []kv.DType
	HeadSizes                []int // nil: all from 1 to MaxHeadSize
	MaxHeadSize              int
	MaxGroup                 int

	Selectors, Estimators, Pruners, Compressors []string

	Kernels     []string
	Regions     []RegionKind
	ArmedSteps  bool
	DeviceBatch bool
}

// Limits bound what one lease may ask for.
type Limits struct {
	// Batch is the most rows of a step.
	Batch int
	// SequenceTokens is the most tokens of one sequence.
	SequenceTokens int
	// ShadowBytes is what the lease's caches may take together.
	ShadowBytes uint64
}

// Lease is one engine's use of a device.
type Lease interface {
	// Import maps a region of the engine's memory. It takes ownership of region's descriptors, also
	// when it fails.
	Import(ctx context.Context, region *Region) (Memory, error)

	// NewCache describes a cache in imported memory and takes its shadow.
	NewCache(ctx context.Context, spec *CacheSpec) (Cache, error)

	// ShadowBytes is what NewCache would take, and what of that grows with tokens, for each.
	ShadowBytes(spec *CacheSpec) (total uint64, perToken float64, err error)

	// Close waits for running work, then releases every cache and memory. It may be called twice.
	Close() error
}

// RegionKind is a way for memory to reach the device.
type RegionKind uint8

// The kinds, as in proto RegionKind.
const (
	SharedMemory RegionKind = iota + 1
	CUDAIPC
	CUDAVMM
	CUDAFabric
)

func (k RegionKind) String() string {
	switch k {
	case SharedMemory:
		return "shared memory"
	case CUDAIPC:
		return "CUDA IPC"
	case CUDAVMM:
		return "CUDA VMM"
	case CUDAFabric:
		return "CUDA fabric"
	}
	return "unknown"
}

// Region is memory that an engine lends.
type Region struct {
	Kind     RegionKind
	Size     uint64
	Writable bool
	// Device is the UUID of the GPU that holds it, "" for shared memory.
	Device string
	// Offset is the region's first byte: in the file, from the allocation's base, or from the first
	// chunk's start.
	Offset uint64
	// Chunks is the one descriptor or handle of the memory, or for VMM and fabric all of its physical
	// chunks in address order.
	Chunks []Chunk
}

// Chunk is one descriptor (FD, owned by the Region) or handle of a region's memory.
type Chunk struct {
	FD     int // -1 without
	Handle []byte
	Size   uint64
}

// Memory is an imported region.
type Memory interface {
	Size() uint64
	Writable() bool

	// Digest returns the SHA-256 of length bytes at offset, as the device reads them.
	Digest(ctx context.Context, offset uint64, length uint32) ([32]byte, error)

	// Release unmaps the memory once nothing runs on it. It fails with fault.Precondition while a cache lies
	// in it or an armed step uses it.
	Release() error
}

// Span is a place in imported memory.
type Span struct {
	Memory Memory
	Offset uint64
}

// Strides are byte distances from one page, KV head and token to the next.
type Strides struct{ Page, Head, Token uint64 }

// CacheSpec says where a cache lies. Sizes and offsets are checked by NewCache.
type CacheSpec struct {
	DType              kv.DType
	PageSize, NumPages int
	K, V               Strides
	NullPage           int32 // -1: none
	Layers             []CacheLayer
	// MaxTokens bounds the tokens of all live sequences where PageSize is no multiple of 16, or where
	// methods remember something of each sequence; 0 means NumPages*PageSize.
	MaxTokens int
}

// CacheLayer is where one layer's keys and values start.
type CacheLayer struct {
	Layer            int // the model's layer index
	K, V             Span
	KScales, VScales []float32 // nil, one, or one per KV head
}

// Cache is a registered cache with its shadow and its current step.
type Cache interface {
	ShadowBytes() uint64

	// Step makes the batch the current one. A refused step leaves the previous one current. While steps are
	// armed, Step, Index and Layer fail with fault.Precondition.
	Step(ctx context.Context, step *kv.Step) error

	// Index indexes what the current step made new in all layers.
	Index(ctx context.Context) (kv.IndexStats, error)

	// Layer indexes one layer of the current step and, if req has a query, runs it. res is
	// overwritten; its slices are reused.
	Layer(ctx context.Context, req *LayerRequest, res *LayerResult) error

	// Arm declares a batch whose layers meet the engine at words, by proto/twilight/v1/ARMED.md. It can be
	// armed while another step runs, and begins after that. A refused step changes nothing. The step is
	// the caller's again once Arm returns, but for Done.
	Arm(ctx context.Context, step *ArmedStep) error

	// CancelArmed fails an armed step, and those behind it, with fault.Cancelled. It does not wait; a step
	// that is not armed, or not any more, is none of its business.
	CancelArmed(id uint32)

	// Close waits for running work, fails what is armed with fault.Unavailable, and frees the shadow. It may
	// be called twice.
	Close() error
}

// The bounds of ArmedStep.WaitTimeout.
const (
	DefaultWaitTimeout = 5 * time.Second
	MaxWaitTimeout     = time.Minute
)

// MaxArmed is how many steps of a cache can be armed at a time: one that runs and one behind it.
const MaxArmed = 2

// ArmedStep is a step whose layers meet the engine at words, 32 bits each, in writable memory.
type ArmedStep struct {
	// ID is what the word Begun holds once the step has begun: not 0, and another in each step.
	ID            uint32
	Begun, Status Span
	// Step is the batch; Batch, in its place, tells where it will lie when the step begins. Behind a step
	// with a Batch only another can be armed.
	Step  *kv.Step
	Batch *DeviceBatch
	// Layers are in the order in which they run, each at most once.
	Layers []ArmedLayer
	// WaitTimeout bounds the device's wait for any one word; 0 means DefaultWaitTimeout.
	WaitTimeout time.Duration
	// Done is called once, when the device has let go of the words and tensors of a step that was armed.
	// Later steps wait for its return. It must not call the lease or what hangs on it.
	Done func(*ArmedResult)
}

// DeviceBatch is a batch of anonymous rows that lies in memory. A row that fails its checks is void, with
// pipeline.BadRow; a slot that does fails the step.
type DeviceBatch struct {
	Rows    int
	Lengths Span // int32 [Rows]
	// Table is int32 [Rows, TableStride]: the page ids of each row.
	Table       Span
	TableStride int
	// Slots is int64 [NumSlots]: the slots written since the last step, -1 for padding.
	Slots    Span
	NumSlots int
	// FirstValid is int32 [Rows], or of no Memory: 0.
	FirstValid Span
	// MaxLength bounds the lengths.
	MaxLength int
}

// ArmedLayer is a layer of an ArmedStep. Query and output lie in memory.
type ArmedLayer struct {
	Layer       int
	Ready, Done Span
	Query       Tensor
	Output      Tensor
	ListBuffer  *ListBuffer
}

// ArmedResult is what became of an armed step. It is valid until Done returns.
type ArmedResult struct {
	ID uint32
	// Err is why the step failed.
	Err error
	// Layers are those that were done, in order, without lists and outputs.
	Layers []LayerResult
}

// Tensor is [B, heads, dim] in imported memory or, with a nil Memory, packed in Inline. Zero strides
// mean packed.
type Tensor struct {
	Inline                []byte
	Memory                Memory
	Offset                uint64
	RowStride, HeadStride uint64
}

// ListBuffer takes pruned lists: int32 [R, Capacity] at Lists and their lengths, int32 [R], at Counts.
type ListBuffer struct {
	Lists, Counts Span
	Capacity      int
}

// LayerRequest asks for one layer of the current step.
type LayerRequest struct {
	Layer int
	// Query is nil to index only.
	Query *Tensor
	// Output is nil to have it in LayerResult.Output.
	Output *Tensor
	// Lists asks for LayerResult.Lists; ListBuffer, if not nil, takes the lists in its place.
	Lists      bool
	ListBuffer *ListBuffer
	// ListsOnly leaves attention to the engine.
	ListsOnly bool
	// P and TokenBudget are nil, or per sequence; 0 keeps the config's.
	P           []float32
	TokenBudget []uint32
	// Observation is what the engine saw of its prefill, which ended before the query's position or,
	// without a query, with the last one; nil without.
	Observation *Observation
}

// Observation is what the prefill of every row of the step saw, for methods that start from it. Tensors
// are packed. A part may be absent: nil, and of no length.
type Observation struct {
	// WindowQueries are the queries of the prefill's last Window positions, [B, Window, Hq, KDim] of the
	// query dtype.
	WindowQueries *Tensor
	Window        int
	// Mass is the softmax weight that each position got from all queries of the prefill, fp32
	// [B, Hq, MassTokens]. What lies behind a row's prefill is ignored.
	Mass       *Tensor
	MassTokens int
}

// LayerResult is a layer's answer. Columns of R are ordered by sequence, then head.
type LayerResult struct {
	Candidates, Kept []uint32 // R
	Paths            []pipeline.Path
	Reasons          []pipeline.Reason
	Lists            []int32 // the rows' lists, Kept[r] entries each
	Truncated        []uint32
	Output           []byte
	Mass, Coverage   []float32 // B*Hq, or empty where unknown
	// Audited are indices into B*Hq of the query heads that were also computed densely. TrueMass is the
	// share of softmax weight that their kept tokens hold, OutputError ||out-dense||/||dense||, NaN with
	// ListsOnly.
	Audited               []uint32
	TrueMass, OutputError []float32
	Index                 kv.IndexStats
	Timing                Timing
	Read                  Read
}

// Read is what a layer read, in bytes, without what audits and indexing did: of the engine's cache, and
// of the shadow. Devices may count by what the methods' records hold rather than watch each access.
type Read struct{ Cache, Shadow uint64 }

// Timing is how long a layer took. Stages are summed over rows that ran in parallel.
type Timing struct {
	Wall, Index time.Duration
	pipeline.Timing
}
