package telemetry

import (
	"context"
	"errors"
	"fmt"
	"net/http/httptest"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel/trace"
	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/kv"
)

// counted is what is told, a line for each sample, without what depends on the clock.
func counted(t testing.TB, told *Telemetry) []string {
	t.Helper()
	data, err := producer{told}.Produce(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, s := range samplesOf(data[0].Metrics) {
		s.Sum, s.Exemplars = 0, nil
		if s.Unit == "s" {
			s.Buckets = nil
		}
		lines = append(lines, fmt.Sprint(s))
	}
	slices.Sort(lines)
	return lines
}

// reporting is telemetry that is gathered by another.
func reporting(t testing.TB) *Telemetry {
	t.Helper()
	told, err := Start(t.Context(), Options{Gathered: true})
	if err != nil {
		t.Fatal(err)
	}
	return told
}

// A process that gathers tells what one would that did it all, also of those that are gone.
func TestGather(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(r *rapid.T) {
		alone, gathering := reporting(t), reporting(t)
		compare := func(when string) {
			if diff := cmp.Diff(counted(t, alone), counted(t, gathering)); diff != "" {
				r.Fatalf("%s, alone and gathered: %s", when, diff)
			}
			got, want := gathering.Snapshot(t.Context(), 0).Leases, alone.Snapshot(t.Context(), 0).Leases
			for _, list := range [][]LeaseSnapshot{got, want} {
				for i := range list {
					list[i].Age = 0
				}
			}
			if !reflect.DeepEqual(got, want) {
				r.Fatalf("%s gathered %+v\nalone %+v", when, got, want)
			}
		}
		id := uint64(0)
		for range rapid.IntRange(0, 3).Draw(r, "processes") {
			other := reporting(t)
			source := gathering.Gather(other.Report)
			var leases []*Lease
			for range rapid.IntRange(0, 2).Draw(r, "leases") {
				id++
				steps := rapid.IntRange(0, 3).Draw(r, "steps")
				for _, told := range []*Telemetry{alone, other} {
					l := leased(told, id)
					leases = append(leases, l)
					addCache(l)
					l.Lent(1, 4096)
					for i := range steps {
						stepped(l, uint64(i+1), "", 100)
						for layer := range 3 {
							layered(l, 4+layer, result(1, uint32(20*(i+1))))
						}
					}
					l.BeginStep(context.Background(), l.Received(), &Step{Cache: 1, ID: 9})
					l.EndStep(&kv.IndexStats{}, &Failure{Code: "internal"})
				}
			}
			compare("while all live")
			var last []byte
			switch rapid.IntRange(0, 2).Draw(r, "end") {
			case 0:
				continue
			case 1: // else it is killed
				var err error
				if last, err = other.Report(t.Context(), 0); err != nil {
					r.Fatal(err)
				}
			}
			for _, l := range leases {
				l.Close()
			}
			source.End(last)
			source.End(nil)
			compare("after an end")
		}
	})
}

// A source that does not answer is told as it last was, and holds nobody up for long.
func TestSilentSource(t *testing.T) {
	t.Parallel()
	told, _ := started(t)
	other := reporting(t)
	l := leased(other, 1)
	defer l.Close()
	answers := true
	source := told.Gather(func(ctx context.Context, sequence uint64) ([]byte, error) {
		if !answers {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		return other.Report(ctx, sequence)
	})
	if err := source.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	answers = false
	if lines := counted(t, told); !slices.ContainsFunc(lines, func(s string) bool { return strings.Contains(s, metricOpened.text+" 2 [] 1") }) {
		t.Errorf("counted %s", strings.Join(lines, "\n"))
	}
	if leases := told.Snapshot(t.Context(), 0).Leases; len(leases) > 0 {
		t.Errorf("leases of a silent source: %v", leases)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := source.Refresh(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("a refresh of a silent source: %v", err)
	}
	nobody := (*Telemetry)(nil).Gather(other.Report)
	if err := nobody.Refresh(t.Context()); err != nil {
		t.Error(err)
	}
	nobody.End(nil)
}

// A report that comes late does not take back what a later one counted.
func TestLateReport(t *testing.T) {
	t.Parallel()
	told, other := reporting(t), reporting(t)
	early, err := other.Report(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	leased(other, 1).Close()
	next := other.Report
	source := told.Gather(func(ctx context.Context, sequence uint64) ([]byte, error) { return next(ctx, sequence) })
	before := counted(t, told)
	next = func(context.Context, uint64) ([]byte, error) { return early, nil }
	if diff := cmp.Diff(before, counted(t, told)); diff != "" {
		t.Errorf("after the late report: %s", diff)
	}
	source.End(early)
	if diff := cmp.Diff(before, counted(t, told)); diff != "" {
		t.Errorf("after the end: %s", diff)
	}
}

// Exemplars of other processes lead to their traces; each bucket keeps its last one.
func TestGatheredExemplars(t *testing.T) {
	t.Parallel()
	told, _ := started(t)
	other := reporting(t)
	span := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}, TraceFlags: trace.FlagsSampled})
	other.metrics.answered(StepRequest, "", 0, time.Millisecond, &moment{at: time.Now(), span: span})
	told.metrics.answered(StepRequest, "", 0, time.Millisecond, &moment{at: time.Now().Add(-time.Hour), span: span.WithTraceID(trace.TraceID{3})})
	told.Gather(other.Report)
	answer := httptest.NewRecorder()
	request := httptest.NewRequest("GET", "/metrics", nil)
	request.Header.Set("Accept", "application/openmetrics-text")
	told.Handler(Admin{}).ServeHTTP(answer, request)
	body := answer.Body.String()
	if !strings.Contains(body, `trace_id="01000000000000000000000000000000"`) || strings.Contains(body, `trace_id="03`) {
		t.Errorf("exemplars: %s", regexp.MustCompile(`(?m)^.*trace_id.*$`).FindAllString(body, -1))
	}
}

// FuzzReport reads reports of processes that have gone mad.
func FuzzReport(f *testing.F) {
	other := reporting(f)
	l := leased(other, 1)
	addCache(l)
	stepped(l, 1, "", 100)
	layered(l, 4, result(1, 20))
	report, err := other.Report(f.Context(), 0)
	if err != nil {
		f.Fatal(err)
	}
	l.Close()
	f.Add(report)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		told := reporting(t)
		told.Gather(func(context.Context, uint64) ([]byte, error) { return data, nil }).End(data)
		told.Gather(func(context.Context, uint64) ([]byte, error) { return data, nil })
		counted(t, told)
		told.Snapshot(t.Context(), 1)
	})
}
