package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
	"github.com/twilight-sidecar/twilight/telemetry"
)

// watched serves budgets of a lease whose two heads keep 10 and 100 of 1000 tokens.
func watched(t *testing.T) string {
	t.Helper()
	told, err := telemetry.Start(t.Context(), telemetry.Options{Version: "v1"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = told.Shutdown(context.Background()) })
	l := told.OpenLease(t.Context(), telemetry.LeaseInfo{
		ID: 3, Engine: "an engine", Device: "host", ListHeads: 2, Method: telemetry.Method{Selector: "quest", Estimator: "none", Pruner: "top_p"},
		Geometry: &kv.Geometry{Layers: 1, QueryHeads: 2, KVHeads: 1, KDim: 8, VDim: 8},
	})
	l.AddCache(1, &gpu.CacheSpec{DType: kv.F16, Layers: []gpu.CacheLayer{{Layer: 7}}}, 2048)
	l.BeginStep(t.Context(), l.Received(), &telemetry.Step{Cache: 1, ID: 1, Sequences: []uint64{42}, Lengths: []int32{1000}})
	l.EndStep(&kv.IndexStats{}, nil)
	l.BeginLayer(t.Context(), l.Received(), 1, 7)
	l.EndLayer(&gpu.LayerResult{
		Kept: []uint32{10, 100}, Candidates: []uint32{250, 250}, Mass: []float32{.8, .9}, Coverage: []float32{.9, .95},
		Paths: []pipeline.Path{pipeline.Sparse, pipeline.Sparse}, Reasons: make([]pipeline.Reason, 2), Read: gpu.Read{Cache: 4000},
	}, nil)
	server := httptest.NewServer(told.Handler(telemetry.Admin{Local: true}))
	t.Cleanup(server.Close)
	return server.URL
}

func TestBudgets(t *testing.T) {
	t.Parallel()
	url := watched(t)
	for _, test := range []struct {
		args []string
		want []string
	}{
		{nil, []string{
			"lease 3  an engine on host: quest -> none -> top_p; 0 B lent, 2.0 KiB of shadow", "1 steps, 5.5% of the tokens kept, 8.0 times fewer",
			"layer   7     10.0 █ 100.0", "sequence 42, step 1: 55.0 kept of 250.0 candidates of 1000", "kept  █",
		}},
		{[]string{"--measure", "mass"}, []string{"layer   7    0.800 █ 0.900"}},
		{[]string{"--measure", "error"}, []string{"nothing is known yet: error of the output"}},
	} {
		var out, errs bytes.Buffer
		if code := run(t.Context(), append([]string{"budgets", "--admin", url, "--once"}, test.args...), &out, &errs, nil); code != exitOK {
			t.Fatalf("%v: exit code %d: %s", test.args, code, errs.String())
		}
		for _, want := range test.want {
			if !strings.Contains(out.String(), want) {
				t.Errorf("%v: printed\n%s\nnot %q", test.args, out.String(), want)
			}
		}
	}
}

// Snapshots follow each other until the command is interrupted, which is how it ends well.
func TestBudgetsFollow(t *testing.T) {
	t.Parallel()
	url := watched(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out := &interrupter{lines: 2, interrupt: cancel}
	var errs bytes.Buffer
	if code := run(ctx, []string{"budgets", "--admin", url, "--json"}, out, &errs, nil); code != exitOK {
		t.Fatalf("exit code %d: %s", code, errs.String())
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	var s telemetry.Snapshot
	if len(lines) < 2 || json.Unmarshal([]byte(lines[1]), &s) != nil || len(s.Leases) != 1 || s.Leases[0].Kept[0][1] != 100 {
		t.Errorf("printed %s", out.String())
	}
}

// interrupter interrupts once it has taken some lines.
type interrupter struct {
	bytes.Buffer
	lines     int
	interrupt func()
}

func (i *interrupter) Write(p []byte) (int, error) {
	n, err := i.Buffer.Write(p)
	if bytes.Count(i.Bytes(), []byte("\n")) >= i.lines {
		i.interrupt()
	}
	return n, err
}

func TestBudgetsRefusals(t *testing.T) {
	t.Parallel()
	for target, want := range map[string]string{"ftp://x": "unix:///PATH", "tcp://127.0.0.1:1": "refused", "unix:///none/x": "no such file"} {
		var out, errs bytes.Buffer
		if code := run(t.Context(), []string{"budgets", "--admin", target, "--once"}, &out, &errs, nil); code != exitFailed || !strings.Contains(errs.String(), want) {
			t.Errorf("%s: exit code %d, said %q", target, code, errs.String())
		}
	}
}
