//go:build linux && cgo && cuda

package kernels

import (
	"unsafe"

	"github.com/twilight-sidecar/twilight/kv"
)

// Plane is K or V of one cache layer in the engine's memory: addresses and distances in bytes.
type Plane struct {
	Base              uint64
	Page, Head, Token int64
	Scales            uint64 // float[KVHeads]
}

// Layer is what kernels are called with; layer.h says what each field means. Addresses are the
// device's.
type Layer struct {
	K, V Plane

	Lengths, First uint64
	Table, VTable  uint64
	ChunkIDs       uint64
	Bad            uint64
	Paths          uint64
	P, Thresholds  uint64
	Budgets        uint64

	Queries               uint64
	QueryRow, QueryHead   int64
	Output                uint64
	OutputRow, OutputHead int64
	Sinks                 uint64

	Int4, Bounds        uint64
	Codes               uint64
	Labels, Channels    uint64
	Mean, Spread, Reach uint64
	Work                uint64
	Drifted, DriftFlags uint64
	BadQuery            uint64

	Q, QBounds, QInt4, QSums   uint64
	QRank, Scores, HeadBounds  uint64
	Candidates, CandidateMasks uint64
	NumCandidates              uint64
	Logits, FirstLogits, Cuts  uint64
	Shares, ListAt             uint64
	Tickets, Partial           uint64

	Lists                        uint64
	Kept, CandidateTokens, Flags uint64
	Mass, Coverage               uint64
	OutRoom                      uint64
	OutLists, OutCounts          uint64
	KeptMasks, StageCycles       uint64

	CarryLayers, CarryCounts uint64
	CarryChunks, CarryMasks  uint64

	Audited, AuditLogits, AuditResults uint64

	Batch, QueryHeads, KVHeads, Asking, Rows  int32
	KDim, VDim                                int32
	PageSize, NumPages, NullPage, Chunks      int32
	PageShift                                 int32
	TableStride, ChunkStride, CandidateStride int32
	OutCapacity                               int32
	CacheDType, QueryDType, OutputDType       int32
	Aligned                                   int32
	Works, Splits                             int32
	FusedOwn, FusedCap                        int32
	ListsOnly                                 int32
	PinFirst, PinCurrent, OverAll             int32
	Selects, Ranks, Estimates, Prunes         int32
	SinksFirst                                int32
	RankChannels                              int32
	LabelDim, LabelBits                       int32
	CodeBits, CodeSymmetric, Equalise         int32
	Layer, Reselection                        int32
	MinBudget, MaxBudget                      int32
	UseEstimates                              int32
	OnlyDense                                 int32
	Audits, AuditStride                       int32
	SoftmaxScale, Softcap, QueryScale         float32
}

// Enums of layer.h.
const (
	SelectAll     = 0
	SelectQuest   = 1
	SelectEnds    = 2
	SelectTokens  = 3
	SelectCarried = 4

	RankNone     = 0
	RankKeys     = 1
	RankLargest  = 2
	RankChannels = 3
	RankLabels   = 4

	EstimateExact = 0
	EstimateInt4  = 1
	EstimateCodes = 2

	PruneNone      = 0
	PruneTopP      = 1
	PruneThreshold = 2

	FlagBadRow    = 1
	FlagNotFinite = 2
	FlagRetry     = 4

	// CutBytes is the size of a CutResult.
	CutBytes = 24
)

// Int4Bytes is the size of a chunk's INT4 record for one KV head.
func Int4Bytes(dim int) int { return dim*8 + kv.ChunkTokens*4 }

// CodeBytes is the size of a chunk's record of vectors of dim codes for one KV head, as internal/lowbit lays
// it out.
func CodeBytes(dim, bits int, symmetric bool) int {
	params := 4
	if symmetric {
		params = 2
	}
	return kv.ChunkTokens * (params + (dim*bits+7)/8)
}

// BoundsBytes is the size of a chunk's bounds for one KV head.
func BoundsBytes(dim int) int { return dim * 4 }

// layout is what twilight_layout in chain.cu must say.
var layout = []uint32{
	uint32(unsafe.Sizeof(Layer{})),
	uint32(unsafe.Offsetof(Layer{}.Lengths)),
	uint32(unsafe.Offsetof(Layer{}.Queries)),
	uint32(unsafe.Offsetof(Layer{}.Int4)),
	uint32(unsafe.Offsetof(Layer{}.Q)),
	uint32(unsafe.Offsetof(Layer{}.Lists)),
	uint32(unsafe.Offsetof(Layer{}.Audited)),
	uint32(unsafe.Offsetof(Layer{}.Batch)),
	uint32(unsafe.Offsetof(Layer{}.SoftmaxScale)),
	CutBytes,
}
