//go:build linux && cgo && cuda

package cuda

import (
	"math"

	"github.com/twilight-sidecar/twilight/gpu/cuda/kernels"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
	"github.com/twilight-sidecar/twilight/pruner/minmaxquant"
	"github.com/twilight-sidecar/twilight/pruner/topp"
	"github.com/twilight-sidecar/twilight/selector/quest"
)

// method is a config as the kernels run it.
type method struct {
	config                     *pipeline.Config
	selects, estimates, prunes int32
	quest                      quest.Config
	p                          float64
	levels                     []int // at which the estimator's heads are trained
	perQueryHead, plain        bool  // plain: the config names no method at all
}

// newMethod checks a geometry and a config.
func newMethod(g *kv.Geometry, cfg *pipeline.Config) (method, error) {
	if err := checkGeometry(g); err != nil {
		return method{}, fault.In("geometry", err)
	}
	if err := cfg.Validate(); err != nil {
		return method{}, fault.In("config", err)
	}
	m, err := choose(cfg)
	return m, fault.In("config", err)
}

// choose finds the kernels that do what a config asks for, and refuses what none does.
func choose(cfg *pipeline.Config) (method, error) {
	m := method{config: cfg, perQueryHead: cfg.Group == pipeline.PerQueryHead, plain: true}
	refuse := func(field, kind, name string) error {
		return fault.Newf(fault.Unsupported, field, "%s %q does not run on this GPU: choose another, or the host device", kind, name)
	}
	if cfg.Compressor.Type != "none" {
		return m, refuse("compressor.type", "compressor", cfg.Compressor.Type)
	}
	switch c := cfg.Selector.Config.(type) {
	case *quest.Config:
		if c.ChunkSize != kv.ChunkTokens {
			return m, fault.Newf(fault.Unsupported, "selector.chunk_size",
				"chunks of %d tokens do not run on this GPU: use %d", c.ChunkSize, kv.ChunkTokens)
		}
		m.selects, m.quest, m.plain = kernels.SelectQuest, *c, false
	default:
		if cfg.Selector.Type != "none" {
			return m, refuse("selector.type", "selector", cfg.Selector.Type)
		}
	}
	switch c := cfg.Estimator.Config.(type) {
	case *minmaxquant.Config:
		if c.QuantBit != 4 {
			return m, fault.Newf(fault.Unsupported, "weight_estimator.quant_bit",
				"estimates from %d bits do not run on this GPU: use 4", c.QuantBit)
		}
		m.estimates, m.plain = kernels.EstimateInt4, false
		m.levels = c.New().Shadow().TrainLevels()
	default:
		if cfg.Estimator.Type != "none" {
			return m, refuse("weight_estimator.type", "estimator", cfg.Estimator.Type)
		}
	}
	switch c := cfg.Pruner.Config.(type) {
	case *topp.Config:
		if len(c.ThresholdByLayer)+len(c.ThresholdByHead)+c.MinBudget+c.MaxBudget > 0 {
			return m, fault.Newf(fault.Unsupported, "weight_pruner",
				"thresholds by layer or head and budgets of lists do not run on this GPU: leave them out")
		}
		m.prunes, m.p, m.plain = kernels.PruneTopP, c.Threshold, false
	default:
		if cfg.Pruner.Type != "none" {
			return m, refuse("weight_pruner.type", "pruner", cfg.Pruner.Type)
		}
	}
	if cfg.Coverage > 0 {
		return m, fault.Newf(fault.Unsupported, "coverage",
			"candidates by coverage do not run on this GPU: leave it out, and give the selector a budget")
	}
	if cfg.UseEstimatedWeights {
		return m, fault.Newf(fault.Unsupported, "use_estimated_weights_in_attn",
			"attention by estimates does not run on this GPU: leave it out")
	}
	return m, nil
}

// indexes tells whether the method keeps a shadow.
func (m *method) indexes() bool {
	return m.selects == kernels.SelectQuest || m.estimates == kernels.EstimateInt4
}

// headBytes and chunkBytes are what a (layer, KV head), and a chunk in it, take of the shadow.
func (m *method) headBytes(dim int) int {
	if m.estimates == kernels.EstimateInt4 {
		return 3 * 4 * dim
	}
	return 0
}

func (m *method) chunkBytes(dim int) (n int) {
	if m.estimates == kernels.EstimateInt4 {
		n += kernels.Int4Bytes(dim)
	}
	if m.selects == kernels.SelectQuest {
		n += kernels.BoundsBytes(dim)
	}
	return n
}

// level is the training level that a sequence of n valid tokens reaches, 0 for none.
func (m *method) level(n int) int {
	reached := 0
	for _, level := range m.levels {
		if level <= n {
			reached = level
		}
	}
	return reached
}

// path says how a row of a layer runs, as far as the host can tell.
func (m *method) path(layer int, row *kv.SeqRow) (pipeline.Path, pipeline.Reason) {
	switch {
	case row.Len == 0:
		return pipeline.Void, pipeline.Empty
	case m.plain:
		return pipeline.Dense, pipeline.Configured
	case m.config.SkipFirstTwoLayers && layer < 2:
		return pipeline.Dense, pipeline.SkippedLayer
	case row.Len-row.First < m.config.DenseBelow:
		return pipeline.Dense, pipeline.ShortContext
	}
	return pipeline.Sparse, 0
}

// chunks returns how many chunks of a row become candidates, pins aside, and how many it has. budget, if
// > 0, is in tokens and replaces the configured one.
func (m *method) chunks(row *kv.SeqRow, budget int) (keep, all int) {
	all = ceilDiv(row.Len, kv.ChunkTokens) - row.First/kv.ChunkTokens
	if m.selects == kernels.SelectAll {
		return all, all
	}
	switch {
	case budget > 0:
	case m.quest.SparsityRate > 0:
		budget = int(math.Ceil(m.quest.SparsityRate * float64(row.Len-row.First)))
	default:
		budget = m.quest.TokenBudget
	}
	return min(max(1, ceilDiv(budget, kv.ChunkTokens)), all), all
}

// pins is how many chunks of a row with that many are candidates whatever their score.
func (m *method) pins(all int) int {
	n := 0
	if m.config.PinFirstChunk {
		n++
	}
	if m.config.PinCurrentChunk {
		n++
	}
	return min(n, all)
}

func ceilDiv(a, b int) int { return (a + b - 1) / b }
