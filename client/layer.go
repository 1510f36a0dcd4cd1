package client

import (
	"context"
	"iter"
	"sync"
	"time"

	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

// Layer asks for one attention layer of a step with B sequences. R is the number of list rows:
// B*KVHeads under group mode "union", B*QueryHeads under "per_query_head".
type Layer struct {
	// Layer is the model's layer index, as in CacheLayer.
	Layer int

	// Query is [B, QueryHeads, KDim] of the geometry's query dtype, packed, and travels in the message.
	// QueryAt, in its place, says where it lies in a buffer. Without either the layer is only indexed.
	Query   []byte
	QueryAt *Tensor
	// Output says where [B, QueryHeads, VDim] of the output dtype goes; nil: LayerResult.Output. The
	// buffer must be lent ReadWrite.
	Output *Tensor

	// Lists asks for LayerResult.Lists; ListBuffer, in its place, says where the lists go.
	Lists      bool
	ListBuffer *ListBuffer
	// ListsOnly leaves attention to the engine.
	ListsOnly bool

	// P and TokenBudget override the config's top-p share and the selector's budget: nil, or a value for
	// each sequence, 0 for the config's.
	P           []float32
	TokenBudget []uint32

	// Observation is what the engine saw of its prefill, sent once with the first message of the layer
	// after it. Refused where no method of the config takes it.
	Observation *Observation
}

// Observation is what the prefill of every sequence of a step saw, for methods that start from it: which
// parts, their documentation says. The prefill ended before the query's position or, in a layer without a
// query, with the sequence's last. Tensors are packed, and travel in the message or lie in a buffer.
type Observation struct {
	// WindowQueries, or WindowQueriesAt, are the queries of the prefill's last Window positions:
	// [B, Window, QueryHeads, KDim] of the geometry's query dtype.
	Window          int
	WindowQueries   []byte
	WindowQueriesAt *Location
	// Mass, or MassAt, is the softmax weight that each position got from all queries of the prefill:
	// fp32 [B, QueryHeads, MassTokens]. What lies past a sequence's prefill is ignored.
	MassTokens int
	Mass       []byte
	MassAt     *Location
}

// Tensor is where a tensor [B, heads, dim] lies. Strides are in bytes; 0 means packed.
type Tensor struct {
	Location
	RowStride, HeadStride int
}

// ListBuffer is where pruned lists go. A list longer than Capacity is cut and named in
// LayerResult.Truncated.
type ListBuffer struct {
	Lists    Location // int32 [R, Capacity], ascending token positions
	Counts   Location // int32 [R], entries written of each list
	Capacity int
}

// Path is how a list row was computed.
type Path = twilightv1.Path

// Reason is why a list row was not computed sparsely; the generated type documents its values.
type Reason = twilightv1.PathReason

// The paths.
const (
	PathSparse = twilightv1.Path_PATH_SPARSE // selected, pruned, attended over the kept tokens
	PathDense  = twilightv1.Path_PATH_DENSE  // attended over all tokens
	PathVoid   = twilightv1.Path_PATH_VOID   // nothing computed
)

// LayerResult is a layer's answer. Columns of R are ordered by sequence, then head. It is the caller's.
type LayerResult struct {
	// Candidates and Kept count tokens (R). A dense row keeps every valid token.
	Candidates, Kept []uint32
	Paths            []Path   // R
	Reasons          []Reason // R
	// Lists holds the rows' lists one behind another, Kept[r] ascending positions each; see RowLists.
	Lists []int32
	// Truncated are the rows whose list did not fit the ListBuffer.
	Truncated []uint32
	// Output is [B, QueryHeads, VDim] of the output dtype, packed; Geometry.DecodeOutput reads it.
	Output []byte

	// EstimatedMass is the share of softmax weight that the kept tokens hold as the daemon estimates it,
	// EstimatedCoverage that of the candidates: B*QueryHeads values, or none where it cannot tell.
	EstimatedMass, EstimatedCoverage []float32

	// Audited are indices into B*QueryHeads for which the daemon also attended densely; TrueMass and
	// OutputError tell what it found.
	Audited               []uint32
	TrueMass, OutputError []float32

	Index  IndexStats
	Timing Timing
	Read   Read
}

// Read is what a layer read, in bytes, without what audits and indexing did: of the engine's cache, and of
// the daemon's shadow.
type Read struct{ Cache, Shadow uint64 }

// Timing is time spent on the device. Stages are summed over rows that ran in parallel; Wall is not.
type Timing struct{ Wall, Index, Select, Prune, Attend time.Duration }

// RowLists yields each list row with its list. Lists must have been asked for.
func (r *LayerResult) RowLists() iter.Seq2[int, []int32] {
	return func(yield func(int, []int32) bool) {
		rest := r.Lists
		for row, n := range r.Kept {
			n = min(n, uint32(len(rest)))
			if !yield(row, rest[:n:n]) {
				return
			}
			rest = rest[n:]
		}
	}
}

// Layer indexes a layer of the step and, with a query, runs it. Its slices are free again once it
// returns. Calls for several layers may be in flight; the daemon serves them in the order sent. If ctx
// ends first, the layer may still run, and write its output, until a later request is answered.
func (s *Step) Layer(ctx context.Context, layer Layer) (*LayerResult, error) {
	m := layerMessages.Get().(*layerMessage)
	call, err := s.lease.start(ctx, m.set(s, &layer), nil)
	m.clear()
	layerMessages.Put(m)
	if err != nil {
		return nil, err
	}
	res, err := call.wait(ctx)
	if err != nil {
		return nil, err
	}
	return layerResult(res.GetLayerResult()), nil
}

// layerMessage is a request with all that it may point to, for reuse.
type layerMessage struct {
	request       twilightv1.LeaseRequest
	layer         twilightv1.LeaseRequest_Layer
	body          twilightv1.Layer
	inline        twilightv1.Layer_QueryInline
	at            twilightv1.Layer_QueryTensor
	query, output tensorMessage
	list          twilightv1.ListBuffer
	lists, counts twilightv1.Location
}

type tensorMessage struct {
	tensor twilightv1.Tensor
	at     twilightv1.Location
}

// gRPC has encoded a message, and lets go of it, when Send returns.
var layerMessages = sync.Pool{New: func() any { return new(layerMessage) }}

func (m *layerMessage) set(s *Step, l *Layer) *twilightv1.LeaseRequest {
	b := &m.body
	b.CacheId, b.StepId, b.Layer = s.cache.id, s.id, uint32(l.Layer)
	switch {
	case l.QueryAt != nil:
		m.at.QueryTensor = m.query.set(l.QueryAt)
		b.Query = &m.at
	case l.Query != nil:
		m.inline.QueryInline = l.Query
		b.Query = &m.inline
	}
	if l.Output != nil {
		b.OutputTensor = m.output.set(l.Output)
	}
	switch {
	case l.ListBuffer != nil:
		b.ListMode = twilightv1.ListMode_LIST_MODE_BUFFER
		setLocation(&m.lists, l.ListBuffer.Lists)
		setLocation(&m.counts, l.ListBuffer.Counts)
		m.list.Lists, m.list.Counts, m.list.Capacity = &m.lists, &m.counts, uint32(l.ListBuffer.Capacity)
		b.ListBuffer = &m.list
	case l.Lists:
		b.ListMode = twilightv1.ListMode_LIST_MODE_INLINE
	}
	b.P, b.TokenBudget, b.ListsOnly = l.P, l.TokenBudget, l.ListsOnly
	b.Observation = observation(l.Observation)
	m.layer.Layer = b
	m.request.Request = &m.layer
	return &m.request
}

// observation makes a message that is not reused: observations are rare.
func observation(o *Observation) *twilightv1.Observation {
	if o == nil {
		return nil
	}
	m := &twilightv1.Observation{Window: uint32(o.Window), MassTokens: uint32(o.MassTokens)}
	switch {
	case o.WindowQueriesAt != nil:
		m.WindowQueries = &twilightv1.Observation_WindowQueriesAt{WindowQueriesAt: location(o.WindowQueriesAt)}
	case o.WindowQueries != nil:
		m.WindowQueries = &twilightv1.Observation_WindowQueriesInline{WindowQueriesInline: o.WindowQueries}
	}
	switch {
	case o.MassAt != nil:
		m.Mass = &twilightv1.Observation_MassAt{MassAt: location(o.MassAt)}
	case o.Mass != nil:
		m.Mass = &twilightv1.Observation_MassInline{MassInline: o.Mass}
	}
	return m
}

func location(l *Location) *twilightv1.Location {
	m := &twilightv1.Location{}
	setLocation(m, *l)
	return m
}

// clear lets go of the caller's slices.
func (m *layerMessage) clear() {
	b := &m.body
	b.Query, b.OutputTensor, b.ListBuffer = nil, nil, nil
	b.ListMode = twilightv1.ListMode_LIST_MODE_UNSPECIFIED
	b.P, b.TokenBudget, b.Observation = nil, nil, nil
	m.inline.QueryInline = nil
}

func (m *tensorMessage) set(t *Tensor) *twilightv1.Tensor {
	setLocation(&m.at, t.Location)
	m.tensor.At, m.tensor.RowStride, m.tensor.HeadStride = &m.at, uint64(t.RowStride), uint64(t.HeadStride)
	return &m.tensor
}

func setLocation(m *twilightv1.Location, l Location) {
	m.RegionId, m.Offset = 0, uint64(l.Offset)
	if l.Buffer != nil {
		m.RegionId = l.Buffer.id
	}
}

func layerResult(m *twilightv1.LayerResult) *LayerResult {
	t := m.GetTiming()
	return &LayerResult{
		Candidates: m.GetCandidates(), Kept: m.GetKept(),
		Paths: m.GetPaths(), Reasons: m.GetReasons(),
		Lists: m.GetLists(), Truncated: m.GetTruncated(),
		Output:        m.GetOutput(),
		EstimatedMass: m.GetEstimatedMass(), EstimatedCoverage: m.GetEstimatedCoverage(),
		Audited: m.GetAudited(), TrueMass: m.GetTrueMass(), OutputError: m.GetOutputError(),
		Index: indexStats(m.GetIndex()),
		Timing: Timing{
			Wall: time.Duration(t.GetWallNs()), Index: time.Duration(t.GetIndexNs()), Select: time.Duration(t.GetSelectNs()),
			Prune: time.Duration(t.GetPruneNs()), Attend: time.Duration(t.GetAttendNs()),
		},
		Read: Read{Cache: m.GetCacheBytesRead(), Shadow: m.GetShadowBytesRead()},
	}
}
