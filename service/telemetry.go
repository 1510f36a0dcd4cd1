package service

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"go.opentelemetry.io/otel/propagation"
	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
	"github.com/twilight-sidecar/twilight/telemetry"
)

// unaryTelemetry makes spans and metrics of unary calls.
func (s *Server) unaryTelemetry(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	received, _ := metadata.FromIncomingContext(ctx)
	ctx, end := s.config.Telemetry.BeginCall(ctx, strings.TrimPrefix(info.FullMethod, "/"), headers(received))
	resp, err := next(ctx, req)
	status := status.Code(err)
	switch status {
	case codes.Unknown, codes.DeadlineExceeded, codes.Unimplemented, codes.Internal, codes.Unavailable, codes.DataLoss:
		end(code.Code(status).String(), true)
	default:
		end(code.Code(status).String(), false)
	}
	return resp, err
}

// headers carries the trace context of a call.
type headers metadata.MD

var _ propagation.TextMapCarrier = headers(nil)

func (h headers) Get(key string) string {
	if values := metadata.MD(h).Get(key); len(values) > 0 {
		return values[0]
	}
	return ""
}

func (h headers) Set(key, value string) { metadata.MD(h).Set(key, value) }
func (h headers) Keys() []string        { return slices.Collect(maps.Keys(h)) }

// traceParent is the W3C trace context of the span that ctx stands in, "" for none.
func traceParent(ctx context.Context) string {
	carrier := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(ctx, carrier)
	return carrier["traceparent"]
}

// withTraceParent is ctx within the span of a traceParent.
func withTraceParent(ctx context.Context, parent string) context.Context {
	return propagation.TraceContext{}.Extract(ctx, propagation.MapCarrier{"traceparent": parent})
}

// newTelemetry tells of a lease that is opened.
func (s *Server) newTelemetry(ctx context.Context, id uint64, engine string, info *gpu.Info, g *kv.Geometry, c *pipeline.Config) *telemetry.Lease {
	lists := g.KVHeads
	if c.Group == pipeline.PerQueryHead {
		lists = g.QueryHeads
	}
	return s.config.Telemetry.OpenLease(ctx, telemetry.LeaseInfo{
		ID: id, Engine: engine, Device: info.ID, Geometry: g, ListHeads: lists,
		Method: telemetry.Method{Selector: c.Selector.Type, Estimator: c.Estimator.Type, Pruner: c.Pruner.Type},
	})
}

// requestKind is the kind of a request that is neither a step nor a layer.
func requestKind(req *twilightv1.LeaseRequest) telemetry.Request {
	switch req.GetRequest().(type) {
	case *twilightv1.LeaseRequest_RegisterRegion:
		return telemetry.RegisterRegion
	case *twilightv1.LeaseRequest_ReleaseRegion:
		return telemetry.ReleaseRegion
	case *twilightv1.LeaseRequest_RegisterCache:
		return telemetry.RegisterCache
	case *twilightv1.LeaseRequest_ReleaseCache:
		return telemetry.ReleaseCache
	case *twilightv1.LeaseRequest_CancelStep:
		return telemetry.CancelStep
	}
	return telemetry.OtherRequest
}

// begin tells that a request is served; the context returned is for what serves it.
func (l *lease) begin(ctx context.Context, req *twilightv1.LeaseRequest, received time.Time) context.Context {
	switch r := req.GetRequest().(type) {
	case *twilightv1.LeaseRequest_Step:
		l.told = telemetry.Step{
			Cache: r.Step.GetCacheId(), ID: r.Step.GetStepId(), IndexOnly: r.Step.GetIndexOnly(),
			Sequences: r.Step.GetSequences(), Lengths: r.Step.GetLengths(), FirstValid: r.Step.GetFirstValid(),
			TraceParent: r.Step.GetTraceparent(), TraceState: r.Step.GetTracestate(),
		}
		return l.telemetry.BeginStep(ctx, received, &l.told)
	case *twilightv1.LeaseRequest_Layer:
		return l.telemetry.BeginLayer(ctx, received, r.Layer.GetCacheId(), int(r.Layer.GetLayer()))
	}
	return l.telemetry.Begin(ctx, requestKind(req), received)
}

// end tells that a request is answered.
func (l *lease) end(req *twilightv1.LeaseRequest, resp *twilightv1.LeaseResponse) {
	failure := failureOf(resp.GetError())
	switch req.GetRequest().(type) {
	case *twilightv1.LeaseRequest_Step:
		index := resp.GetStepResult().GetIndex()
		l.telemetry.EndStep(&kv.IndexStats{
			TokensIndexed:       index.GetTokensIndexed(),
			TokensClaimed:       index.GetTokensClaimed(),
			ChunksDrifted:       index.GetChunksDrifted(),
			StatisticsRefreshed: index.GetStatisticsRefreshed(),
		}, failure)
	case *twilightv1.LeaseRequest_Layer:
		l.telemetry.EndLayer(&l.result, failure)
	default:
		l.telemetry.End(failure)
	}
}

// failureFrom is an error as telemetry has it; nil for none.
func failureFrom(err error) *telemetry.Failure {
	if err == nil {
		return nil
	}
	e, _ := toError(err)
	return failureOf(e)
}

func failureOf(e *twilightv1.Error) *telemetry.Failure {
	if e == nil {
		return nil
	}
	return &telemetry.Failure{Code: codeName(e.GetCode()), Field: e.GetField(), Message: e.GetMessage()}
}

// codeName is a code as telemetry has it: "invalid_argument".
func codeName(code twilightv1.ErrorCode) string {
	return strings.ToLower(strings.TrimPrefix(code.String(), "ERROR_CODE_"))
}
