//go:build e2e

// Package e2e runs the daemon with the tools that people watch it by.
package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// patience bounds every wait.
const patience = time.Minute

// run starts a command that ends with the test.
func run(t *testing.T, env []string, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), env...)
	log := &bytes.Buffer{}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("%s said:\n%.4000s", name, log)
		}
	})
}

// span is one of Jaeger's.
type span struct {
	TraceID, SpanID, OperationName, ProcessID string
	References                                []struct{ RefType, SpanID string }
	Tags                                      []struct {
		Key   string
		Value any
	}
}

func (s *span) tag(key string) any {
	for _, t := range s.Tags {
		if t.Key == key {
			return t.Value
		}
	}
	return nil
}

func (s *span) parent() string {
	for _, r := range s.References {
		if r.RefType == "CHILD_OF" {
			return r.SpanID
		}
	}
	return ""
}

func get(t *testing.T, url string, into any) bool {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return err == nil && json.Unmarshal(body, into) == nil
}

// TestTraceBackend decodes a real capture with a traced engine, and finds in Jaeger what every head kept,
// on the layer spans under the engine's own.
func TestTraceBackend(t *testing.T) {
	bin, root := os.Getenv("BIN"), os.Getenv("ROOT")
	folder, err := os.MkdirTemp("", "tw")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(folder) })
	run(t, nil, os.Getenv("JAEGER"))
	for end := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		if conn, err := net.Dial("tcp", "127.0.0.1:4317"); err == nil {
			conn.Close()
			break
		}
		if time.Now().After(end) {
			t.Fatal("Jaeger does not listen")
		}
	}
	otlp := []string{"OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4317", "OTEL_EXPORTER_OTLP_PROTOCOL=grpc", "OTEL_METRICS_EXPORTER=none"}
	target := "unix://" + filepath.Join(folder, "s")
	run(t, otlp, filepath.Join(bin, "twilightd"), "--listen", target)
	replay := exec.Command(filepath.Join(bin, "twilight"), "replay", "--target", target, "--json",
		"--capture", filepath.Join(root, "testdata/smollm2-demo.safetensors"), "--config", filepath.Join(root, "telemetry/e2e/config.json"))
	replay.Env = append(append(os.Environ(), otlp...), "OTEL_TRACES_SAMPLER=always_on")
	replay.Stderr = os.Stderr
	out, err := replay.Output()
	if err != nil {
		t.Fatal(err)
	}
	var report struct {
		Steps  int
		Layers []struct {
			Layer int
			Heads []struct{ Kept, Candidates float64 }
		}
	}
	if err := json.Unmarshal(out, &report); err != nil {
		t.Fatal(err)
	}

	// Mean kept tokens by layer and head, as the spans have them.
	kept := make(map[string]float64)
	steps := 0
	for end := time.Now().Add(patience); steps != report.Steps; time.Sleep(200 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d steps in Jaeger, want %d", steps, report.Steps)
		}
		clear(kept)
		steps = gather(t, kept, report.Steps, len(report.Layers))
	}
	for _, l := range report.Layers {
		for h, head := range l.Heads {
			if got := kept[fmt.Sprint(l.Layer, " ", h)]; math.Abs(got-head.Kept) > 1e-6 {
				t.Errorf("layer %d, head %d: spans say %v tokens kept, the engine saw %v", l.Layer, h, got, head.Kept)
			}
		}
	}
	t.Logf("%d steps, %d layers, %d budgets by head found in Jaeger under the engine's spans", steps, len(report.Layers), len(kept))
}

// gather adds up what the spans say, and returns how many whole steps there are.
func gather(t *testing.T, kept map[string]float64, steps, layers int) (whole int) {
	t.Helper()
	var answer struct {
		Data []struct {
			Spans     []span
			Processes map[string]struct{ ServiceName string }
		}
	}
	if !get(t, "http://127.0.0.1:16686/api/traces?service=twilight-replay&limit=100", &answer) {
		return 0
	}
	for _, trace := range answer.Data {
		byID := make(map[string]*span)
		for i := range trace.Spans {
			byID[trace.Spans[i].SpanID] = &trace.Spans[i]
		}
		found := 0
		for i := range trace.Spans {
			s := &trace.Spans[i]
			step := byID[s.parent()]
			if s.OperationName != "twilight.layer" || step == nil {
				continue
			}
			engine := byID[step.parent()]
			if step.OperationName != "twilight.step" || engine == nil || engine.OperationName != "twilight.replay.step" ||
				trace.Processes[engine.ProcessID].ServiceName != "twilight-replay" || trace.Processes[s.ProcessID].ServiceName != "twilightd" {
				t.Fatalf("layer under %v under %v", step, engine)
			}
			found++
			var heads []float64
			if err := json.Unmarshal([]byte(fmt.Sprint(s.tag("twilight.row.kept"))), &heads); err != nil {
				t.Fatalf("twilight.row.kept is %v: %v", s.tag("twilight.row.kept"), err)
			}
			for h, n := range heads {
				kept[fmt.Sprint(s.tag("twilight.layer.index"), " ", h)] += n / float64(steps)
			}
		}
		if found == layers {
			whole++
		}
	}
	return whole
}
