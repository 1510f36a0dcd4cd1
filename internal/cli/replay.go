package cli

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/twilight-sidecar/twilight/internal/capture"
	"github.com/twilight-sidecar/twilight/internal/cliconf"
	"github.com/twilight-sidecar/twilight/internal/layout"
	"github.com/twilight-sidecar/twilight/internal/replay"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline/methods"
	"github.com/twilight-sidecar/twilight/telemetry"
)

// patience is how long a command waits for a daemon that is starting.
const patience = 10 * time.Second

// flushLimit bounds what sending the last spans may take.
const flushLimit = 2 * time.Second

type replayCmd struct {
	connection
	place
	Capture  string        `type:"existingfile" required:"" placeholder:"FILE" help:"Keys, values and queries of a model: safetensors, as internal/capture describes it."`
	Config   string        `type:"existingfile" required:"" placeholder:"FILE" help:"Twilight JSON config, as in benchmark/configs."`
	Group    string        `enum:",union,per_query_head" default:"" placeholder:"MODE" help:"What the query heads of a KV head share, in place of the config's: union or per_query_head."`
	P        float64       `placeholder:"P" help:"Share of attention to keep, in place of the config's."`
	Layout   string        `enum:"nhd,hnd,packed,slots,contiguous" default:"nhd" help:"How the cache lies in memory: nhd, hnd, packed, slots or contiguous (nhd)."`
	PageSize int           `default:"16" placeholder:"N" help:"Tokens of a page; slots and contiguous have their own (16)."`
	DType    string        `name:"dtype" enum:"fp16,bf16,fp32,fp8" default:"fp16" help:"Element type of the cache: fp16, bf16, fp32 or fp8 (fp16)."`
	Seed     uint64        `default:"1" help:"Shuffles the cache's pages (1)."`
	Armed    bool          `help:"Arm each step: its layers meet the daemon at words in lent memory, without messages."`
	Pace     time.Duration `default:"0s" placeholder:"DURATION" help:"Least time from a step to the next, to watch them come."`
	JSON     bool          `name:"json" help:"Print the report as JSON, and nothing else, on stdout."`
}

func (*replayCmd) Help() string {
	return `Plays an engine: lends the capture's keys and values in shared memory or on a GPU, prefills, decodes step by step, and
compares every output with dense attention computed here in float64.

    twilightd --listen unix:///tmp/tw.sock &
    twilight replay --target unix:///tmp/tw.sock --capture testdata/smollm2-demo.safetensors \
        --config benchmark/configs/config_quest_twi.json

With --device cuda the memory is a GPU's, lent by CUDA IPC; twilight-engine, beside twilight, then runs this.

Sends its side of the traces where the OTEL_* variables say, as twilightd does:

    export OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4317 OTEL_EXPORTER_OTLP_PROTOCOL=grpc
    OTEL_TRACES_SAMPLER=always_on twilight replay ...

Waits up to 10 s for the daemon to serve. With --json, "heads" are query heads; under union those of a
group share "kept". Errors are ||out-dense||/||dense||, masses shares of the true softmax weight.`
}

func (c *replayCmd) Run(ctx context.Context, term *terminal, source *gpuSource) error {
	onGPU, err := c.onGPU(source)
	if err != nil {
		return err
	}
	loaded, err := capture.Open(c.Capture)
	if err != nil {
		return err
	}
	config, err := readConfig(c.Config, replay.Overrides{Group: c.Group, P: c.P}, fromFiles)
	if err != nil {
		return err
	}
	dtype, err := kv.ParseDType(c.DType)
	if err != nil {
		return err
	}
	conn, err := c.dialServing(ctx, patience)
	if err != nil {
		return err
	}
	defer conn.Close()
	o := replay.Options{
		Capture: loaded, Config: config, Layout: layout.Kind(c.Layout), PageSize: c.PageSize, DType: dtype, Seed: c.Seed,
		Armed: c.Armed, Pace: c.Pace,
	}
	if onGPU {
		gpu, err := c.open(ctx, conn, source)
		if err != nil {
			return err
		}
		defer gpu.Close()
		o.Device, o.Memory = gpu.UUID(), gpu
	}
	told, err := telemetry.Start(ctx, telemetry.Options{Service: "twilight-replay", Version: cliconf.Version(), Instance: rand.Text()})
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushLimit)
		defer cancel()
		if err := told.Shutdown(ctx); err != nil {
			fmt.Fprintf(term.err, "twilight: spans were not sent: %v\n", err)
		}
	}()
	bar := newProgress(term.err)
	o.Tracer = told.TracerProvider().Tracer("github.com/twilight-sidecar/twilight/cmd/twilight")
	o.Progress = func(done, all int) { bar.bar("replay", float64(done), float64(all)) }
	report, err := replay.Run(ctx, conn, o)
	bar.clear()
	if err != nil {
		return err
	}
	if c.JSON {
		return printJSON(term.out, report)
	}
	describe(term.out, report, loaded)
	printHeads(term.out, report)
	return nil
}

// readConfig reads a Twilight config and changes it.
func readConfig(path string, o replay.Overrides, inline inliner) (string, error) {
	config, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	if config, err = inline(config, path); err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	changed, err := o.Apply(config)
	if err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	return string(changed), nil
}

// inliner puts into the config of a file what the files hold that it names.
type inliner func(config []byte, path string) ([]byte, error)

// fromFiles finds the files that a config names from where it lies.
func fromFiles(config []byte, path string) ([]byte, error) {
	return methods.Inline(config, func(name string) ([]byte, error) {
		if !filepath.IsAbs(name) {
			name = filepath.Join(filepath.Dir(path), name)
		}
		return os.ReadFile(name)
	})
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// describe tells what ran.
func describe(w io.Writer, r *replay.Report, c *capture.Capture) {
	f := r.Facts
	fmt.Fprintf(w, "capture  %s: %d layers, %d query heads over %d KV heads, %d tokens, %d steps\n",
		cmp.Or(c.Meta["model"], "unnamed"), len(r.Layers), f.QueryHeads, f.KVHeads, c.N, r.Steps)
	fmt.Fprintf(w, "config   %s\n", summary(r.Config))
	fmt.Fprintf(w, "memory   %s of %v cache lent, %s of shadow (%.0f bytes a token)\n",
		bytesText(uint64(f.CacheBytes)), f.DType, bytesText(f.Shadow.Bytes), f.Shadow.PerToken)
	fmt.Fprintf(w, "read     %s a row, %.0f%% of it shadow\n", bytesText(uint64(r.BytesPerRow())),
		100*float64(f.Read.Shadow)/float64(max(1, f.Read.Cache+f.Read.Shadow)))
	if text := denseText(r); text != "" {
		fmt.Fprintf(w, "dense    %s\n", text)
	}
	fmt.Fprintln(w)
}

// arrow stands between the stages of a summary.
const arrow = " -> "

// summary says a config in a line.
func summary(config json.RawMessage) string {
	var all map[string]any
	if json.Unmarshal(config, &all) != nil {
		return string(config)
	}
	var parts []string
	for _, stage := range []string{"selector", "weight_estimator", "weight_pruner"} {
		keys, _ := all[stage].(map[string]any)
		words := []string{fmt.Sprint(keys["type"])}
		delete(keys, "type")
		for _, key := range slices.Sorted(maps.Keys(keys)) {
			words = append(words, fmt.Sprintf("%s=%v", key, keys[key]))
		}
		parts = append(parts, strings.Join(words, " "))
	}
	return fmt.Sprintf("%s, group %v", strings.Join(parts, arrow), all["group"])
}

// denseText tells which rows were not computed sparsely, and why.
func denseText(r *replay.Report) string {
	var parts []string
	for _, reason := range slices.Sorted(maps.Keys(r.Facts.Dense)) {
		name := strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(reason.String(), "PATH_REASON_"), "_", " "))
		parts = append(parts, fmt.Sprintf("%d of %d list rows: %s", r.Facts.Dense[reason], r.Facts.Rows, name))
	}
	return strings.Join(parts, "; ")
}

func printHeads(w io.Writer, r *replay.Report) {
	t := table{text: 1, header: []string{"layer", "head", "candidates", "kept", "true mass", "worst", "error"}}
	for _, l := range r.Layers {
		for _, h := range l.Heads {
			t.add(fmt.Sprintf("%5d", l.Layer), fmt.Sprint(h.Head), tokens(h.Candidates), tokens(h.Kept),
				share(h.TrueMass), share(h.WorstTrueMass), relErr(h.RelErr))
		}
	}
	t.add("  all", "", tokens(r.MeanCandidates), tokens(r.MeanKept), share(r.MeanTrueMass), share(r.WorstTrueMass), relErr(r.RelErr))
	t.print(w)
}
