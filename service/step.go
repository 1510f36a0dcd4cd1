package service

import (
	"context"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

func (l *lease) step(ctx context.Context, req *twilightv1.Step) (*twilightv1.StepResult, error) {
	if err := l.begins(); err != nil {
		return nil, err
	}
	c, err := l.liveCache(req.GetCacheId())
	if err != nil {
		return nil, err
	}
	switch {
	case req.GetStepId() <= c.lastStep:
		return nil, fault.Newf(fault.Precondition, "step_id",
			"is %d, but the cache has had step %d: step ids grow", req.GetStepId(), c.lastStep)
	case req.GetDevice() != nil && !l.info.DeviceBatch:
		return nil, fault.Newf(fault.Unsupported, "device",
			"device %s reads no batches from lent memory: send the columns", l.info.ID)
	case req.GetArmed() != nil:
		return l.arm(ctx, c, req)
	case req.GetDevice() != nil:
		return nil, fault.Newf(fault.Unsupported, "device",
			"is set, but the step is not armed: only armed steps read their batch from lent memory")
	}
	if err := c.device.Step(ctx, kvStep(req)); err != nil {
		return nil, err
	}
	c.lastStep, c.current, c.batch = req.GetStepId(), !req.GetIndexOnly(), len(req.GetLengths())
	answer := &twilightv1.StepResult{}
	if req.GetIndexOnly() {
		stats, err := c.device.Index(ctx)
		if err != nil {
			return nil, err
		}
		answer.Index = indexStats(&stats)
	}
	return answer, nil
}

// kvStep says a step in kv's terms. Columns are shared.
func kvStep(req *twilightv1.Step) *kv.Step {
	return &kv.Step{
		Sequences:       req.GetSequences(),
		Lengths:         req.GetLengths(),
		FirstValid:      req.GetFirstValid(),
		TableStarts:     req.GetTable().GetStarts(),
		TableCounts:     req.GetTable().GetCounts(),
		TableEntries:    req.GetTable().GetEntries(),
		VTableEntries:   req.GetTable().GetVEntries(),
		UnchangedPrefix: req.GetClaims().GetUnchangedPrefix(),
		PrefixOf:        req.GetClaims().GetPrefixOf(),
		TruncateTo:      req.GetClaims().GetTruncateTo(),
		BySlots:         req.GetSlots() != nil,
		Slots:           req.GetSlots().GetSlots(),
		Ended:           req.GetEnded(),
	}
}

// currentStep finds the cache whose current step a request names.
func (l *lease) currentStep(cacheID uint32, stepID uint64) (*cache, error) {
	c, err := l.liveCache(cacheID)
	if err != nil {
		return nil, err
	}
	if c.armed.has(stepID) {
		return nil, fault.Newf(fault.Precondition, "step_id",
			"is %d, an armed step: its layers run when their words are rung", stepID)
	}
	if !c.current {
		return nil, fault.Newf(fault.Precondition, "step_id",
			"is %d, but cache %d has no current step: declare one first", stepID, cacheID)
	}
	if stepID != c.lastStep {
		return nil, fault.Newf(fault.Precondition, "step_id",
			"is %d, but the current step of cache %d is %d: name that, or declare a new one", stepID, cacheID, c.lastStep)
	}
	return c, nil
}

func (l *lease) cancelStep(req *twilightv1.CancelStep) error {
	if c := l.caches[req.GetCacheId()]; c != nil && c.armed.has(req.GetStepId()) {
		c.device.CancelArmed(uint32(req.GetStepId()))
		return nil
	}
	c, err := l.currentStep(req.GetCacheId(), req.GetStepId())
	if err != nil {
		return err
	}
	l.telemetry.CancelStep(req.GetCacheId())
	c.current = false // what was not indexed of it is when next needed
	return nil
}

func (l *lease) layer(ctx context.Context, req *twilightv1.Layer) (*twilightv1.LayerResult, error) {
	c, err := l.currentStep(req.GetCacheId(), req.GetStepId())
	if err != nil {
		return nil, err
	}
	call, err := l.layerRequest(req, c.batch)
	if err != nil {
		return nil, err
	}
	if err := c.device.Layer(ctx, call, &l.result); err != nil {
		return nil, err
	}
	l.warnAudit(ctx, req.GetLayer())
	return l.layerResult()
}

// layerRequest says a request in the device's terms. Sizes are checked by the device.
func (l *lease) layerRequest(req *twilightv1.Layer, batch int) (*gpu.LayerRequest, error) {
	if err := checkModes(req); err != nil {
		return nil, err
	}
	call := &gpu.LayerRequest{
		Layer:       int(req.GetLayer()),
		Lists:       req.GetListMode() == twilightv1.ListMode_LIST_MODE_INLINE,
		ListsOnly:   req.GetListsOnly(),
		P:           req.GetP(),
		TokenBudget: req.GetTokenBudget(),
	}
	var err error
	if call.Observation, err = l.observation(req.GetObservation()); err != nil {
		return nil, err
	}
	switch query := req.GetQuery().(type) {
	case *twilightv1.Layer_QueryInline:
		call.Query = &gpu.Tensor{Inline: query.QueryInline}
	case *twilightv1.Layer_QueryTensor:
		if call.Query, err = l.tensor(query.QueryTensor, "query_tensor"); err != nil {
			return nil, err
		}
	default:
		return call, nil
	}
	if out := req.GetOutputTensor(); out != nil {
		if call.Output, err = l.tensor(out, "output_tensor"); err != nil {
			return nil, err
		}
	} else if !call.ListsOnly {
		g := l.geometry
		size := uint64(batch) * uint64(g.QueryHeads) * uint64(g.VDim) * uint64(g.Output.Size())
		if limit := uint64(l.limits.GetMaxMessageBytes()); size > limit {
			return nil, fault.Exhaustedf("output_tensor", size, limit,
				"is absent, and inline the output would take %d bytes of at most %d: name a buffer", size, limit)
		}
	}
	if buffer := req.GetListBuffer(); buffer != nil {
		call.ListBuffer = &gpu.ListBuffer{Capacity: int(buffer.GetCapacity())}
		if call.ListBuffer.Lists, err = l.span(buffer.GetLists(), "list_buffer.lists"); err != nil {
			return nil, err
		}
		if call.ListBuffer.Counts, err = l.span(buffer.GetCounts(), "list_buffer.counts"); err != nil {
			return nil, err
		}
	}
	return call, nil
}

// checkModes refuses fields that contradict each other, rather than ignore one.
func checkModes(req *twilightv1.Layer) error {
	buffered := req.GetListMode() == twilightv1.ListMode_LIST_MODE_BUFFER
	switch {
	case buffered && req.GetListBuffer() == nil:
		return fault.Newf(fault.Invalid, "list_buffer", "is absent: LIST_MODE_BUFFER needs it")
	case !buffered && req.GetListBuffer() != nil:
		return fault.Newf(fault.Invalid, "list_buffer", "is set, but list_mode is %v: set LIST_MODE_BUFFER or leave it out", req.GetListMode())
	case req.GetListsOnly() && req.GetOutputTensor() != nil:
		return fault.Newf(fault.Invalid, "output_tensor", "is set, but lists_only computes no output: leave one out")
	case req.GetQuery() != nil:
		return nil
	}
	for field, set := range map[string]bool{
		"lists_only":    req.GetListsOnly(),
		"output_tensor": req.GetOutputTensor() != nil,
		"list_mode":     req.GetListMode() != twilightv1.ListMode_LIST_MODE_UNSPECIFIED,
		"p":             len(req.GetP()) > 0,
		"token_budget":  len(req.GetTokenBudget()) > 0,
	} {
		if set {
			return fault.Newf(fault.Invalid, field, "is set, but there is no query: without one a layer is only indexed")
		}
	}
	return nil
}

// observation says an observation in the device's terms, nil if there is none.
func (l *lease) observation(m *twilightv1.Observation) (o *gpu.Observation, err error) {
	if m == nil {
		return nil, nil //nolint:nilnil // an absent part of a request
	}
	o = &gpu.Observation{Window: int(m.GetWindow()), MassTokens: int(m.GetMassTokens())}
	switch queries := m.GetWindowQueries().(type) {
	case *twilightv1.Observation_WindowQueriesInline:
		o.WindowQueries = &gpu.Tensor{Inline: queries.WindowQueriesInline}
	case *twilightv1.Observation_WindowQueriesAt:
		o.WindowQueries, err = l.packed(queries.WindowQueriesAt, "observation.window_queries_at")
	}
	if err != nil {
		return nil, err
	}
	switch mass := m.GetMass().(type) {
	case *twilightv1.Observation_MassInline:
		o.Mass = &gpu.Tensor{Inline: mass.MassInline}
	case *twilightv1.Observation_MassAt:
		o.Mass, err = l.packed(mass.MassAt, "observation.mass_at")
	}
	return o, err
}

func (l *lease) packed(at *twilightv1.Location, field string) (*gpu.Tensor, error) {
	span, err := l.span(at, field)
	return &gpu.Tensor{Memory: span.Memory, Offset: span.Offset}, err
}

func (l *lease) tensor(t *twilightv1.Tensor, field string) (*gpu.Tensor, error) {
	at, err := l.span(t.GetAt(), field+".at")
	if err != nil {
		return nil, err
	}
	return &gpu.Tensor{
		Memory: at.Memory, Offset: at.Offset, RowStride: t.GetRowStride(), HeadStride: t.GetHeadStride(),
	}, nil
}

// layerResult says l.result in the wire's terms. Columns are shared: the answer is encoded before the
// next layer runs.
func (l *lease) layerResult() (*twilightv1.LayerResult, error) {
	r := &l.result
	// A varint of a position has up to 5 bytes.
	if size, limit := 5*uint64(len(r.Lists)), uint64(l.limits.GetMaxMessageBytes()); size > limit {
		return nil, fault.Exhaustedf("list_mode", size, limit,
			"LIST_MODE_INLINE may take %d bytes of at most %d: name a buffer", size, limit)
	}
	timing := &twilightv1.Timing{}
	setTiming(timing, &r.Timing)
	return &twilightv1.LayerResult{
		Candidates:        r.Candidates,
		Kept:              r.Kept,
		Paths:             convert[twilightv1.Path](r.Paths),
		Reasons:           convert[twilightv1.PathReason](r.Reasons),
		Lists:             r.Lists,
		Truncated:         r.Truncated,
		Output:            r.Output,
		EstimatedMass:     r.Mass,
		EstimatedCoverage: r.Coverage,
		Audited:           r.Audited,
		TrueMass:          r.TrueMass,
		OutputError:       r.OutputError,
		Index:             indexStats(&r.Index),
		Timing:            timing,
		CacheBytesRead:    r.Read.Cache,
		ShadowBytesRead:   r.Read.Shadow,
	}, nil
}

func setTiming(m *twilightv1.Timing, t *gpu.Timing) {
	m.WallNs, m.IndexNs = uint64(t.Wall.Nanoseconds()), uint64(t.Index.Nanoseconds())
	m.SelectNs, m.PruneNs = uint64(t.Select.Nanoseconds()), uint64(t.Prune.Nanoseconds())
	m.AttendNs = uint64(t.Attend.Nanoseconds())
}

func indexStats(s *kv.IndexStats) *twilightv1.IndexStats {
	m := &twilightv1.IndexStats{}
	setIndexStats(m, s)
	return m
}

func setIndexStats(m *twilightv1.IndexStats, s *kv.IndexStats) {
	m.TokensIndexed, m.TokensClaimed = s.TokensIndexed, s.TokensClaimed
	m.ChunksDrifted, m.StatisticsRefreshed = s.ChunksDrifted, s.StatisticsRefreshed
}
