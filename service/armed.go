package service

import (
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/fault"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

// armedCache is what the service knows of a cache's armed steps. All but what its comments except belongs
// to the goroutine of serve.
type armedCache struct {
	// step says where words and tensors lie; the next may be as before. lists are what its layers point to.
	step  gpu.ArmedStep
	lists []gpu.ListBuffer
	batch gpu.DeviceBatch
	known bool // step is of regions that are all there
	// regions are those that armed steps may use.
	regions []uint32
	// ids are the last steps that were armed.
	ids []uint64

	// pending counts armed steps that are not done. The device's goroutine counts down.
	pending *atomic.Int32
	// answered holds an item for each step whose StepResult was sent, which comes before its ArmedStepDone.
	answered chan struct{}
	// message is the device's goroutine's, reused.
	message *armedMessage
}

func newArmedCache() armedCache {
	return armedCache{
		pending: new(atomic.Int32), answered: make(chan struct{}, gpu.MaxArmed+1), message: newArmedMessage(),
	}
}

// has tells whether a step is armed, or was a moment ago.
func (a *armedCache) has(stepID uint64) bool { return slices.Contains(a.ids, stepID) }

// arm serves a step whose layers meet the engine at words.
func (l *lease) arm(ctx context.Context, c *cache, req *twilightv1.Step) (*twilightv1.StepResult, error) {
	switch {
	case !l.info.ArmedSteps:
		return nil, fault.Newf(fault.Unsupported, "armed", "device %s arms no steps: send Layer messages", l.info.ID)
	case req.GetIndexOnly():
		return nil, fault.Newf(fault.Invalid, "index_only", "is set, but an armed step runs layers: leave one out")
	}
	a := &c.armed
	if err := l.describe(a, req.GetArmed()); err != nil {
		return nil, fault.In("armed", err)
	}
	a.step.Step, a.step.Batch = kvStep(req), nil
	if device := req.GetDevice(); device != nil {
		a.step.Step, a.step.Batch = nil, &a.batch
		if err := l.describeBatch(a, device); err != nil {
			return nil, fault.In("device", err)
		}
	}
	id, results := req.GetStepId(), req.GetArmed().GetLayerResults()
	layers := make([]int, len(a.step.Layers))
	for i := range layers {
		layers[i] = a.step.Layers[i].Layer
	}
	a.step.ID = uint32(id)
	a.step.WaitTimeout = time.Duration(req.GetArmed().GetWaitTimeoutMs()) * time.Millisecond
	pending, answered, message := a.pending, a.answered, a.message
	a.step.Done = func(r *gpu.ArmedResult) {
		<-answered
		pending.Add(-1)
		l.telemetry.ArmedDone(req.GetCacheId(), id, layers, r.Layers, failureFrom(fault.In("step", r.Err)))
		l.armedDone(message.set(req.GetCacheId(), id, r, results), r.Err)
	}
	pending.Add(1)
	if err := c.device.Arm(ctx, &a.step); err != nil {
		pending.Add(-1)
		return nil, err
	}
	a.known = true
	const remembered = 2 * gpu.MaxArmed
	if len(a.ids) == remembered {
		a.ids = slices.Delete(a.ids, 0, 1)
	}
	a.ids = append(a.ids, id)
	l.arming = c
	c.lastStep, c.current, c.batch = id, false, 0
	return &twilightv1.StepResult{Armed: true}, nil
}

// answeredArmed lets the end of a step that was armed be told, behind its StepResult.
func (l *lease) answeredArmed() {
	if l.arming != nil {
		l.arming.armed.answered <- struct{}{} // there is room for all that can be armed
		l.arming = nil
	}
}

// armedDone tells the end of an armed step.
func (l *lease) armedDone(m *armedMessage, failure error) {
	if failure != nil {
		e, _ := toError(fault.In("step", failure))
		m.done.Error = e
		if e.GetCode() == twilightv1.ErrorCode_ERROR_CODE_INTERNAL {
			l.logger.Error("armed step failed", "step_id", m.done.GetStepId(), "error", failure)
		}
	}
	_ = l.send(&m.response) // a stream that is gone needs no telling
}

// describe says where a step's words and tensors lie, in the device's terms.
func (l *lease) describe(a *armedCache, req *twilightv1.Armed) error {
	if req.GetAsBefore() {
		if !a.known {
			return fault.Newf(fault.Precondition, "as_before",
				"is set, but there is no armed step before, or a region of it is gone: say it whole")
		}
		return nil
	}
	a.known = false
	if a.pending.Load() == 0 {
		a.regions = a.regions[:0]
	}
	a.step.Layers = slices.Grow(a.step.Layers[:0], len(req.GetLayers()))[:len(req.GetLayers())]
	a.lists = slices.Grow(a.lists[:0], len(req.GetLayers()))[:len(req.GetLayers())]
	if err := l.armedSpan(a, &a.step.Begun, req.GetStep(), "step"); err != nil {
		return err
	}
	if err := l.armedSpan(a, &a.step.Status, req.GetStatus(), "status"); err != nil {
		return err
	}
	for i, layer := range req.GetLayers() {
		if err := l.describeLayer(a, i, layer); err != nil {
			return fault.In(fmt.Sprintf("layers[%d]", i), err)
		}
	}
	return nil
}

func (l *lease) describeLayer(a *armedCache, i int, req *twilightv1.ArmedLayer) error {
	layer, list := &a.step.Layers[i], &a.lists[i]
	*layer = gpu.ArmedLayer{Layer: int(req.GetLayer())}
	for _, tensor := range []struct {
		to   *gpu.Tensor
		from *twilightv1.Tensor
		name string
	}{
		{&layer.Query, req.GetQuery(), "query"},
		{&layer.Output, req.GetOutput(), "output"},
	} {
		var at gpu.Span
		if err := l.armedSpan(a, &at, tensor.from.GetAt(), "at"); err != nil {
			return fault.In(tensor.name, err)
		}
		*tensor.to = gpu.Tensor{
			Memory: at.Memory, Offset: at.Offset,
			RowStride: tensor.from.GetRowStride(), HeadStride: tensor.from.GetHeadStride(),
		}
	}
	if err := l.armedSpan(a, &layer.Ready, req.GetReady(), "ready"); err != nil {
		return err
	}
	if err := l.armedSpan(a, &layer.Done, req.GetDone(), "done"); err != nil {
		return err
	}
	if buffer := req.GetLists(); buffer != nil {
		*list = gpu.ListBuffer{Capacity: int(buffer.GetCapacity())}
		layer.ListBuffer = list
		if err := l.armedSpan(a, &list.Lists, buffer.GetLists(), "lists.lists"); err != nil {
			return err
		}
		return l.armedSpan(a, &list.Counts, buffer.GetCounts(), "lists.counts")
	}
	return nil
}

// describeBatch says where a batch lies that the device reads when the step begins.
func (l *lease) describeBatch(a *armedCache, req *twilightv1.DeviceBatch) error {
	a.batch = gpu.DeviceBatch{
		Rows: int(req.GetBatch()), TableStride: int(req.GetTableStride()),
		NumSlots: int(req.GetNumSlots()), MaxLength: int(req.GetMaxLength()),
	}
	for _, part := range []struct {
		to   *gpu.Span
		from *twilightv1.Location
		name string
	}{
		{&a.batch.Lengths, req.GetLengths(), "lengths"},
		{&a.batch.Table, req.GetTable(), "table"},
		{&a.batch.Slots, req.GetSlots(), "slots"},
		{&a.batch.FirstValid, req.GetFirstValid(), "first_valid"},
	} {
		if part.from == nil {
			continue
		}
		if err := l.armedSpan(a, part.to, part.from, part.name); err != nil {
			return err
		}
	}
	return nil
}

// armedSpan is span, and remembers the region.
func (l *lease) armedSpan(a *armedCache, to *gpu.Span, at *twilightv1.Location, field string) (err error) {
	if *to, err = l.span(at, field); err == nil && !slices.Contains(a.regions, at.GetRegionId()) {
		a.regions = append(a.regions, at.GetRegionId())
	}
	return err
}

// notArmed refuses to take away a region that armed steps use. Those of caches that lie in it end with
// them.
func (l *lease) notArmed(regionID uint32) error {
	for id, c := range l.caches {
		if _, lies := c.regions[regionID]; lies || c.armed.pending.Load() == 0 || !slices.Contains(c.armed.regions, regionID) {
			continue
		}
		return fault.Newf(fault.Precondition, "region_id",
			"region %d is used by an armed step of cache %d: wait for its end, or cancel it", regionID, id)
	}
	return nil
}

// forgetArmed makes no step be as before that used a region.
func (l *lease) forgetArmed(regionID uint32) {
	for _, c := range l.caches {
		if slices.Contains(c.armed.regions, regionID) {
			c.armed.known = false
		}
	}
}

// armedMessage is an ArmedStepDone, whose memory is reused: gRPC has encoded it when Send returns.
type armedMessage struct {
	response twilightv1.LeaseResponse
	done     twilightv1.ArmedStepDone
	layers   []*armedLayerMessage
	results  []*twilightv1.LayerResult
}

type armedLayerMessage struct {
	result  twilightv1.LayerResult
	index   twilightv1.IndexStats
	timing  twilightv1.Timing
	paths   []twilightv1.Path
	reasons []twilightv1.PathReason
}

func newArmedMessage() *armedMessage {
	m := &armedMessage{}
	m.response.Response = &twilightv1.LeaseResponse_ArmedStepDone{ArmedStepDone: &m.done}
	return m
}

// set makes m tell what became of a step. Columns are shared.
func (m *armedMessage) set(cacheID uint32, stepID uint64, r *gpu.ArmedResult, results bool) *armedMessage {
	m.done.CacheId, m.done.StepId, m.done.Error, m.done.Layers = cacheID, stepID, nil, nil
	if !results {
		return m
	}
	for len(m.layers) < len(r.Layers) {
		layer := new(armedLayerMessage)
		layer.result.Index, layer.result.Timing = &layer.index, &layer.timing
		m.layers, m.results = append(m.layers, layer), append(m.results, &layer.result)
	}
	for i := range r.Layers {
		m.layers[i].set(&r.Layers[i])
	}
	m.done.Layers = m.results[:len(r.Layers)]
	return m
}

func (m *armedLayerMessage) set(r *gpu.LayerResult) {
	m.paths, m.reasons = m.paths[:0], m.reasons[:0]
	for i := range r.Paths {
		m.paths = append(m.paths, twilightv1.Path(r.Paths[i]))
		m.reasons = append(m.reasons, twilightv1.PathReason(r.Reasons[i]))
	}
	to := &m.result
	to.Candidates, to.Kept, to.Paths, to.Reasons = r.Candidates, r.Kept, m.paths, m.reasons
	to.Truncated, to.EstimatedMass, to.EstimatedCoverage = r.Truncated, r.Mass, r.Coverage
	to.Audited, to.TrueMass, to.OutputError = r.Audited, r.TrueMass, r.OutputError
	setIndexStats(&m.index, &r.Index)
	setTiming(&m.timing, &r.Timing)
	to.CacheBytesRead, to.ShadowBytesRead = r.Read.Cache, r.Read.Shadow
}
