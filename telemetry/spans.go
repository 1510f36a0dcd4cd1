package telemetry

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/kv"
)

// attributes are those of all spans that stand next to a lease.
func (l *Lease) attributes() []attribute.KeyValue {
	i := &l.info
	return []attribute.KeyValue{
		attribute.Int64(attrLease, int64(i.ID)),
		attribute.String(attrEngine, i.Engine),
		attribute.String(attrDevice, i.Device),
		attribute.String(attrSelector, i.Method.Selector),
		attribute.String(attrEstimator, i.Method.Estimator),
		attribute.String(attrPruner, i.Method.Pruner),
	}
}

// startStep starts a step's span. What it says is put together only if somebody will read it.
func (l *Lease) startStep(ctx context.Context, s *Step) (context.Context, trace.Span) {
	ctx = propagator.Extract(ctx, (*carrier)(s))
	if parent := trace.SpanFromContext(ctx); l.t.followsParent && parent.SpanContext().IsValid() && !parent.SpanContext().IsSampled() {
		return ctx, parent // what the SDK would decide, with less ado
	}
	ctx, span := l.t.tracer.Start(ctx, spanStep,
		trace.WithTimestamp(l.call.received), trace.WithSpanKind(trace.SpanKindServer))
	if !span.IsRecording() {
		return ctx, span
	}
	span.SetAttributes(append(l.attributes(),
		attribute.Int64(attrCache, int64(s.Cache)),
		attribute.Int64(attrStepID, int64(s.ID)),
		attribute.Bool(attrIndexOnly, s.IndexOnly),
		attribute.Int(attrSequences, len(s.Lengths)),
	)...)
	if l.opened.IsValid() {
		span.AddLink(trace.Link{SpanContext: l.opened})
	}
	return ctx, span
}

// attributes are what is known of a step once it is over.
func (s *step) attributes() []attribute.KeyValue {
	list := []attribute.KeyValue{
		attribute.Int64(attrTokens, int64(s.tokens)),
		attribute.Int(attrLayers, s.answered),
	}
	if s.answered > 0 {
		list = append(list, s.totals.attributes()...)
	}
	return list
}

func (t *totals) attributes() []attribute.KeyValue {
	return []attribute.KeyValue{
		attribute.Int64(attrKeptTokens, int64(t.kept)),
		attribute.Int64(attrValidTokens, int64(t.valid)),
		attribute.Int64(attrReadCache, int64(t.cache)),
		attribute.Int64(attrReadShadow, int64(t.shadow)),
		attribute.Int64(attrReadDense, int64(t.dense)),
	}
}

func failureAttributes(f *Failure) []attribute.KeyValue {
	list := []attribute.KeyValue{attribute.String(attrError, f.Code)}
	if f.Field != "" {
		list = append(list, attribute.String(attrErrorField, f.Field))
	}
	return list
}

func indexAttributes(s *kv.IndexStats) []attribute.KeyValue {
	return []attribute.KeyValue{
		attribute.Int64(attrIndexed, int64(s.TokensIndexed)),
		attribute.Int64(attrClaimed, int64(s.TokensClaimed)),
		attribute.Int64(attrDrifted, int64(s.ChunksDrifted)),
		attribute.Int64(attrRefreshes, int64(s.StatisticsRefreshed)),
	}
}

// layerSpan makes the span of the layer that has been served, and those of its stages.
func (l *Lease) layerSpan(r *gpu.LayerResult, failure *Failure, m *moment) {
	ctx, span := l.t.tracer.Start(l.call.ctx, spanLayer, trace.WithTimestamp(l.call.begun),
		trace.WithAttributes(attribute.Int(attrLayer, l.call.layer)))
	defer span.End(trace.WithTimestamp(m.at))
	if !span.IsRecording() {
		return
	}
	if failure != nil {
		fail(span, failure)
		return
	}
	span.SetAttributes(resultAttributes(r)...)
	span.SetAttributes(indexAttributes(&r.Index)...)
	if c := l.caches[l.call.cache]; c != nil && len(r.Kept) > 0 {
		s := step{valid: c.step.valid} // for the totals of this layer alone
		s.add(r, listsOf(r, len(s.valid)), c.step.tokens*c.tokenBytes)
		span.SetAttributes(s.totals.attributes()...)
	}

	times := busy(&r.Timing)
	sum := 0.0
	for _, t := range times {
		sum += t
	}
	at := m.at.Add(-min(r.Timing.Wall, m.at.Sub(l.call.begun)))
	whole := m.at.Sub(at)
	for i, stage := range [stages]string{spanIndex, spanSelect, spanPrune, spanAttend} {
		if times[i] == 0 {
			continue
		}
		end := at.Add(time.Duration(float64(whole) * min(times[i]/max(sum, whole.Seconds()), 1)))
		_, child := l.t.tracer.Start(ctx, stage, trace.WithTimestamp(at),
			trace.WithAttributes(attribute.Int64(attrStageBusy, int64(times[i]*1e9))))
		child.End(trace.WithTimestamp(end))
		at = end
	}
}

func resultAttributes(r *gpu.LayerResult) []attribute.KeyValue {
	list := []attribute.KeyValue{attribute.Int(attrRows, len(r.Kept))}
	if len(r.Kept) > 0 {
		list = append(list,
			attribute.IntSlice(attrRowCandidates, integers(r.Candidates)),
			attribute.IntSlice(attrRowKept, integers(r.Kept)),
			attribute.StringSlice(attrRowPath, names(pathNames[:], r.Paths)),
			attribute.StringSlice(attrRowReason, names(reasonNames[:], r.Reasons)),
		)
	}
	if len(r.Mass) > 0 {
		list = append(list, attribute.Float64Slice(attrHeadMass, floats(r.Mass)))
	}
	if len(r.Coverage) > 0 {
		list = append(list, attribute.Float64Slice(attrHeadCoverage, floats(r.Coverage)))
	}
	if len(r.Audited) > 0 {
		list = append(list,
			attribute.IntSlice(attrAuditHeads, integers(r.Audited)),
			attribute.Float64Slice(attrAuditMass, floats(r.TrueMass)),
			attribute.Float64Slice(attrAuditError, floats(r.OutputError)),
		)
	}
	return list
}

func integers(column []uint32) []int {
	list := make([]int, min(len(column), maxColumn))
	for i := range list {
		list[i] = int(column[i])
	}
	return list
}

func floats(column []float32) []float64 {
	list := make([]float64, min(len(column), maxColumn))
	for i := range list {
		list[i] = float64(column[i])
	}
	return list
}

func names[T ~uint8](names []string, column []T) []string {
	list := make([]string, min(len(column), maxColumn))
	for i := range list {
		list[i] = name(names, column[i])
	}
	return list
}
