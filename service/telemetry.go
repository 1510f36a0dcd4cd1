package service

import (
	"context"
	"strings"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/stats"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
	"github.com/twilight-sidecar/twilight/telemetry"
)

// instrumented makes spans and metrics of unary calls. A lease's stream lasts for hours: its steps have
// spans instead.
func (s *Server) instrumented() []grpc.ServerOption {
	t := s.config.Telemetry
	if t == nil {
		return nil
	}
	return []grpc.ServerOption{grpc.StatsHandler(otelgrpc.NewServerHandler(
		otelgrpc.WithTracerProvider(t.TracerProvider()),
		otelgrpc.WithMeterProvider(t.MeterProvider()),
		otelgrpc.WithPropagators(telemetry.Propagator()),
		otelgrpc.WithFilter(func(info *stats.RPCTagInfo) bool {
			return info.FullMethodName != twilightv1.TwilightService_Lease_FullMethodName &&
				!strings.HasPrefix(info.FullMethodName, "/"+healthpb.Health_ServiceDesc.ServiceName+"/")
		}),
	))}
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
		return l.telemetry.BeginStep(ctx, received, &telemetry.Step{
			Cache: r.Step.GetCacheId(), ID: r.Step.GetStepId(), IndexOnly: r.Step.GetIndexOnly(),
			Sequences: r.Step.GetSequences(), Lengths: r.Step.GetLengths(), FirstValid: r.Step.GetFirstValid(),
			TraceParent: r.Step.GetTraceparent(), TraceState: r.Step.GetTracestate(),
		})
	case *twilightv1.LeaseRequest_Layer:
		return l.telemetry.BeginLayer(ctx, received, r.Layer.GetCacheId(), int(r.Layer.GetLayer()))
	}
	return l.telemetry.Begin(ctx, requestKind(req), received)
}

// end tells that a request is answered.
func (l *lease) end(req *twilightv1.LeaseRequest, resp *twilightv1.LeaseResponse) {
	var failure *telemetry.Failure
	if e := resp.GetError(); e != nil {
		failure = &telemetry.Failure{Code: codeName(e.GetCode()), Field: e.GetField(), Message: e.GetMessage()}
	}
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

// codeName is a code as telemetry has it: "invalid_argument".
func codeName(code twilightv1.ErrorCode) string {
	return strings.ToLower(strings.TrimPrefix(code.String(), "ERROR_CODE_"))
}
