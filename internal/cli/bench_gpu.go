package cli

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/internal/bench"
	"github.com/twilight-sidecar/twilight/kv"
)

// runOnGPU times a step that a daemon runs on the engine's GPU.
func (c *benchCmd) runOnGPU(ctx context.Context, term *terminal, source *gpuSource) (err error) {
	if c.DType != kv.F16.String() {
		return fmt.Errorf("--dtype is %s: on a GPU the data are %v", c.DType, kv.F16)
	}
	configs, err := c.configs()
	if err != nil {
		return err
	}
	if len(c.Config) == 0 { // of the built-in ones what the devices of GPUs serve in one kernel
		configs = []benchConfig{configs[0], configs[len(configs)-1]}
	}
	conn, err := c.dialServing(ctx, patience)
	if err != nil {
		return err
	}
	defer conn.Close()
	gpu, err := c.open(ctx, conn, source)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, gpu.Close()) }()
	if c.Armed {
		return c.runArmed(ctx, term, conn, gpu, configs[len(configs)-1])
	}
	o := bench.StepOptions{
		Step: c.step(c.Layers), Rounds: c.Rounds,
	}
	for _, config := range configs {
		o.Configs = append(o.Configs, bench.Named{Name: config.name, Config: config.config})
	}
	bar := newProgress(term.err)
	o.Progress = bar.show
	report, err := bench.RunStep(ctx, conn, gpu, o)
	bar.clear()
	if err != nil {
		return err
	}
	if c.JSON {
		return printJSON(term.out, report)
	}
	printStep(term.out, report, c.Markdown)
	return nil
}

// step is one of so many layers.
func (c *benchCmd) step(layers int) bench.Step {
	return bench.Step{
		QueryHeads: c.KVHeads * c.Group, KVHeads: c.KVHeads, Dim: c.Dim, Batch: c.Batch, Tokens: c.Tokens,
		PageSize: c.PageSize, Layers: layers,
	}
}

// armedSteps is how many are timed for each of --rounds.
const armedSteps = 50

// runArmed times how engine and daemon meet.
func (c *benchCmd) runArmed(ctx context.Context, term *terminal, conn *client.Client, engine bench.StreamEngine, config benchConfig) error {
	layers := []int{32, 80}
	if c.Layers != 0 {
		layers = []int{c.Layers}
	}
	bar := newProgress(term.err)
	var reports []*bench.ArmedReport
	for _, n := range layers {
		r, err := bench.RunArmed(ctx, conn, engine, bench.ArmedOptions{
			Step: c.step(n), Config: bench.Named{Name: config.name, Config: config.config}, Steps: c.Rounds * armedSteps, Progress: bar.show,
		})
		bar.clear()
		if err != nil {
			return fmt.Errorf("%d layers: %w", n, err)
		}
		reports = append(reports, r)
	}
	if c.JSON {
		return printJSON(term.out, reports)
	}
	printArmed(term.out, reports, c.Markdown)
	return nil
}

func printArmed(w io.Writer, reports []*bench.ArmedReport, markdown bool) {
	r := reports[0]
	fmt.Fprintf(w, "%s, %s: %d sequences of %d tokens, %d steps each; us a layer\n\n", r.Device, r.Config, r.Batch, r.Tokens, r.Steps)
	t := &table{text: 1, header: []string{"way", "layers", "kernels", "added p50", "p99"}}
	for _, r := range reports {
		for _, way := range r.Ways {
			t.add(way.Name, fmt.Sprint(r.Layers), fmt.Sprintf("%.1f", r.Kernels), fmt.Sprintf("%.1f", way.P50), fmt.Sprintf("%.1f", way.P99))
		}
	}
	if markdown {
		t.markdown(w)
	} else {
		t.print(w)
	}
}

func printStep(w io.Writer, r *bench.StepReport, markdown bool) {
	fmt.Fprintf(w, "%s, reads %.0f GB/s\n", r.Device, r.ReadRate/1e9)
	fmt.Fprintf(w, "%d sequences of %d tokens, %d query heads over %d KV heads, dim %d, fp16, pages of %d, %d layers in turn\n\n",
		r.Batch, r.Tokens, r.QueryHeads, r.KVHeads, r.Dim, r.PageSize, r.Layers)
	t := &table{header: []string{
		"config", "device us", "speedup", "service us", "declare us", "MB read", "of read", "index", "select", "prune", "attend",
		"candidates", "kept", "true mass", "worst", "error", "shadow B/token", "dense rows",
	}}
	for _, run := range r.Results {
		t.add(run.Name, spread(run.Device, 1), spread(run.Speedup, 1), spread(run.Service, 1), spread(run.Declare, 1),
			fmt.Sprintf("%.2f", run.ReadBytes/1e6), share(run.ReadShare),
			share(run.Stages.Index), share(run.Stages.Select), share(run.Stages.Prune), share(run.Stages.Attend),
			tokens(run.Candidates), fmt.Sprintf("%.1f (%d-%d)", run.Kept, run.KeptMin, run.KeptMax),
			share(run.TrueMass), share(run.WorstTrueMass), relErr(run.OutputError),
			tokens(run.ShadowPerToken), fmt.Sprintf("%d of %d", run.Dense, run.Rows))
	}
	if markdown {
		t.markdown(w)
	} else {
		t.print(w)
	}
}
