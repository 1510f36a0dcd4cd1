package cli

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/twilight-sidecar/twilight/internal/capture"
	"github.com/twilight-sidecar/twilight/selector"
	"github.com/twilight-sidecar/twilight/selector/ds"
	"github.com/twilight-sidecar/twilight/selector/duo"
)

type calibrateCmd struct {
	DS  calibrateDS  `cmd:"" name:"ds" help:"Channel file of Double Sparsity: each head's channels, the heaviest first."`
	Duo calibrateDuo `cmd:"" name:"duo" help:"Head file of DuoAttention: how far each KV head looks."`
}

func (*calibrateCmd) Help() string {
	return `Writes what a method wants to know of a model, from captures of its attention on texts other than
those it will be judged on:

    twilight calibrate ds --capture smollm2-calibration.safetensors --out channels.json
    twilight calibrate duo --capture smollm2-calibration.safetensors --out full_attention_heads.tsv

A config names the file (selector.config_path, selector.heads_path); what sends the config reads it.`
}

type calibrateDS struct {
	Capture []string `type:"existingfile" required:"" placeholder:"FILE" help:"Keys and queries to calibrate on. May be repeated."`
	Out     string   `required:"" placeholder:"FILE" help:"Channel file to write, in the original project's format."`
}

func (*calibrateDS) Help() string {
	return `Channels are ranked by the mean size of queries (q), keys (k) and products (qk) after RoPE; the
original takes q and k before it.`
}

func (c *calibrateDS) Run() error { return calibrate(c.Capture, c.Out, channelFile) }

type calibrateDuo struct {
	Capture    []string `type:"existingfile" required:"" placeholder:"FILE" help:"Keys and queries to calibrate on. May be repeated."`
	SinkSize   int      `default:"64" help:"First tokens that a streaming head sees."`
	RecentSize int      `default:"256" help:"Last tokens that a streaming head sees."`
	Out        string   `required:"" placeholder:"FILE" help:"Head file to write, in the original project's format."`
}

func (*calibrateDuo) Help() string {
	return `An approximation: the original trains a gate for each head on retrieval tasks, through the whole
model; here a head's score is the attention it gives to tokens that a streaming head does not see. Layers
that the captures lack are written like the nearest that they have.`
}

func (c *calibrateDuo) Run() error {
	return calibrate(c.Capture, c.Out, func(captures ...*capture.Capture) ([]byte, error) {
		return headFile(c.SinkSize, c.RecentSize, captures...)
	})
}

func calibrate(files []string, out string, find func(...*capture.Capture) ([]byte, error)) error {
	captures := make([]*capture.Capture, len(files))
	for i, file := range files {
		var err error
		if captures[i], err = capture.Open(file); err != nil {
			return err
		}
	}
	found, err := find(captures...)
	if err != nil {
		return err
	}
	return os.WriteFile(out, found, 0o644) //nolint:gosec // G306: the file is for everyone to read
}

func channelFile(captures ...*capture.Capture) ([]byte, error) {
	var found ds.Calibration
	err := eachSample(captures, func(s *selector.Sample, _ float64) error { return found.Add(s) })
	if err != nil {
		return nil, err
	}
	return json.Marshal(found.File())
}

func headFile(sinks, recent int, captures ...*capture.Capture) ([]byte, error) {
	found := duo.Calibration{SinkSize: sinks, RecentSize: recent}
	if err := eachSample(captures, found.Add); err != nil {
		return nil, err
	}
	return found.File(), nil
}

// eachSample hands over every layer of captures, and by what its logits are scaled.
func eachSample(captures []*capture.Capture, add func(s *selector.Sample, scale float64) error) error {
	for _, c := range captures {
		for i := range c.Layers {
			l := &c.Layers[i]
			sample := selector.Sample{
				Layer: l.Index, KVHeads: c.KVHeads, QueryHeads: c.QueryHeads, Dim: c.KDim, Keys: l.K, Queries: l.Q,
			}
			if err := add(&sample, c.Scale); err != nil {
				return fmt.Errorf("layer %d: %w", l.Index, err)
			}
		}
	}
	return nil
}
