package cli

import (
	"context"
	"errors"
	"fmt"
	"io"

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
	o := bench.StepOptions{
		Step: bench.Step{
			QueryHeads: c.KVHeads * c.Group, KVHeads: c.KVHeads, Dim: c.Dim, Batch: c.Batch, Tokens: c.Tokens,
			PageSize: c.PageSize, Layers: c.Layers,
		},
		Rounds: c.Rounds,
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
