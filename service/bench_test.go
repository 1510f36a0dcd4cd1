package service

import (
	"context"
	"net"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

// BenchmarkRoundTrip tells what a lease adds to gRPC: medians over a Unix socket of an empty unary call
// and of a message there and back on a stream, both to a server that only echoes, and of a layer and a
// step of a lease on a device that computes nothing.
func BenchmarkRoundTrip(b *testing.B) {
	echoing := startEcho(b)
	echoStream, err := echoing.Lease(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	lease := start(b, Config{}, newFake()).ready().stream
	exchange := func(stream grpc.BidiStreamingClient[twilightv1.LeaseRequest, twilightv1.LeaseResponse], req *twilightv1.LeaseRequest) {
		req.RequestId = 1
		if err := stream.Send(req); err != nil {
			b.Fatal(err)
		}
		if resp, err := stream.Recv(); err != nil || resp.GetError() != nil {
			b.Fatal(resp, err)
		}
	}
	index := layer(1)
	index.GetLayer().Query = nil
	stepID := uint64(1)
	for _, bench := range []struct {
		name string
		run  func()
	}{
		{"call", func() {
			if _, err := echoing.GetCapabilities(b.Context(), &twilightv1.GetCapabilitiesRequest{}); err != nil {
				b.Fatal(err)
			}
		}},
		{"echo", func() { exchange(echoStream, index) }},
		{"layer", func() { exchange(lease, index) }},
		{"step", func() {
			stepID++
			exchange(lease, step(stepID))
		}},
	} {
		b.Run(bench.name, func(b *testing.B) {
			times := make([]time.Duration, 0, 1<<16)
			for b.Loop() {
				start := time.Now()
				bench.run()
				times = append(times, time.Since(start))
			}
			slices.Sort(times)
			b.ReportMetric(float64(times[len(times)/2].Nanoseconds()), "p50-ns")
		})
	}
}

func startEcho(b *testing.B) twilightv1.TwilightServiceClient {
	b.Helper()
	path := filepath.Join(shortTempDir(b), "echo.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		b.Fatal(err)
	}
	server := grpc.NewServer()
	twilightv1.RegisterTwilightServiceServer(server, echo{})
	go func() { _ = server.Serve(l) }()
	b.Cleanup(server.Stop)
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { conn.Close() })
	return twilightv1.NewTwilightServiceClient(conn)
}

// echo answers everything with nothing.
type echo struct {
	twilightv1.UnimplementedTwilightServiceServer
}

func (echo) GetCapabilities(context.Context, *twilightv1.GetCapabilitiesRequest) (*twilightv1.GetCapabilitiesResponse, error) {
	return &twilightv1.GetCapabilitiesResponse{}, nil
}

func (echo) Lease(stream leaseStream) error {
	for {
		req, err := stream.Recv()
		if err != nil {
			return nil //nolint:nilerr // the client hung up
		}
		if err := stream.Send(&twilightv1.LeaseResponse{RequestId: req.GetRequestId()}); err != nil {
			return err
		}
	}
}
