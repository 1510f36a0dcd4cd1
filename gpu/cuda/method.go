//go:build linux && cgo && cuda

package cuda

import (
	"math"
	"slices"
	"strconv"

	"github.com/twilight-sidecar/twilight/gpu/cuda/kernels"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
	"github.com/twilight-sidecar/twilight/pruner"
	"github.com/twilight-sidecar/twilight/pruner/maxquant"
	"github.com/twilight-sidecar/twilight/pruner/minmaxquant"
	"github.com/twilight-sidecar/twilight/pruner/threshold"
	"github.com/twilight-sidecar/twilight/pruner/topp"
	"github.com/twilight-sidecar/twilight/selector/ds"
	"github.com/twilight-sidecar/twilight/selector/oracle"
	"github.com/twilight-sidecar/twilight/selector/quest"
	"github.com/twilight-sidecar/twilight/selector/sparq"
	"github.com/twilight-sidecar/twilight/selector/streaming"
	"github.com/twilight-sidecar/twilight/selector/tidal"
)

// What choose finds kernels for.
var (
	selectors  = []string{"none", "quest", "streaming", "oracle_topk", "tidal_decode", "ds", "sparq"}
	estimators = []string{"none", "min_max_quant", "max_quant"}
	pruners    = []string{"none", "top_p", "threshold"}
)

// method is a config as the kernels run it.
type method struct {
	config                            *pipeline.Config
	pipeline                          *pipeline.Pipeline // knows which layers the config serves
	selects, ranks, estimates, prunes int32
	perQueryHead, plain               bool // plain: the config names no method at all

	// The selector's.
	tokenBudget  int
	sparsityRate float64
	sinks        int                // of streaming
	rankChannels int                // of sparq
	reselection  []int              // of tidal_decode
	channels     map[string][][]int // of ds
	labelDim     int
	labelBits    int

	// The estimator's.
	codeBits             int
	symmetric, equalises bool
	levels               []int // at which its heads are trained

	// The pruner's.
	limited pruner.Limited
}

// newMethod checks a geometry and a config.
func newMethod(g *kv.Geometry, cfg *pipeline.Config) (method, error) {
	if err := served.Geometry(g); err != nil {
		return method{}, fault.In("geometry", err)
	}
	p, err := pipeline.New(cfg, g)
	if err != nil {
		return method{}, fault.In("config", err)
	}
	m, err := choose(cfg)
	m.pipeline = p
	return m, fault.In("config", err)
}

// choose finds the kernels that do what a config asks for, and refuses what none does.
func choose(cfg *pipeline.Config) (method, error) {
	m := method{
		config: cfg, perQueryHead: cfg.Group == pipeline.PerQueryHead, sparsityRate: -1,
		plain: cfg.Selector.Type == "none" && cfg.Estimator.Type == "none" && cfg.Pruner.Type == "none",
	}
	refuse := func(field, kind, name string) error {
		return fault.Newf(fault.Unsupported, field, "%s %q does not run on this GPU: choose another, or the host device", kind, name)
	}
	if cfg.Compressor.Type != "none" {
		return m, refuse("compressor.type", "compressor", cfg.Compressor.Type)
	}
	if !m.chooseSelector(cfg.Selector.Config) && cfg.Selector.Type != "none" {
		return m, refuse("selector.type", "selector", cfg.Selector.Type)
	}
	if c, ok := cfg.Selector.Config.(*quest.Config); ok && c.ChunkSize != kv.ChunkTokens {
		return m, fault.Newf(fault.Unsupported, "selector.chunk_size",
			"chunks of %d tokens do not run on this GPU: use %d", c.ChunkSize, kv.ChunkTokens)
	}
	switch c := cfg.Estimator.Config.(type) {
	case *minmaxquant.Config:
		m.estimates, m.codeBits, m.equalises = kernels.EstimateCodes, c.QuantBit, true
		m.levels = c.New().Shadow().TrainLevels()
		if c.QuantBit == 4 {
			m.estimates = kernels.EstimateInt4
		}
	case *maxquant.Config:
		m.estimates, m.codeBits, m.symmetric = kernels.EstimateCodes, c.QuantBit, true
		m.levels = c.New().Shadow().TrainLevels()
	default:
		if cfg.Estimator.Type != "none" {
			return m, refuse("weight_estimator.type", "estimator", cfg.Estimator.Type)
		}
	}
	switch c := cfg.Pruner.Config.(type) {
	case *topp.Config:
		m.prunes, m.limited = kernels.PruneTopP, c.Limits.New(c.Threshold)
	case *threshold.Config:
		m.prunes, m.limited = kernels.PruneThreshold, c.Limits.New(c.Threshold)
	default:
		if cfg.Pruner.Type != "none" {
			return m, refuse("weight_pruner.type", "pruner", cfg.Pruner.Type)
		}
	}
	if cfg.Coverage > 0 {
		return m, fault.Newf(fault.Unsupported, "coverage",
			"candidates by coverage do not run on this GPU: leave it out, and give the selector a budget")
	}
	return m, nil
}

// chooseSelector reports whether there are kernels for a selector.
func (m *method) chooseSelector(config any) bool {
	switch c := config.(type) {
	case *quest.Config:
		m.selects, m.tokenBudget, m.sparsityRate = kernels.SelectQuest, c.TokenBudget, c.SparsityRate
	case *streaming.Config:
		m.selects, m.tokenBudget, m.sinks = kernels.SelectEnds, c.TokenBudget, c.NumSinks
	case *oracle.Config:
		m.selects, m.ranks, m.tokenBudget, m.sparsityRate = kernels.SelectTokens, kernels.RankKeys, c.TokenBudget, c.SparsityRate
	case *tidal.Config:
		m.selects, m.ranks, m.tokenBudget, m.sparsityRate = kernels.SelectCarried, kernels.RankKeys, c.TokenBudget, c.SparsityRate
		m.reselection = slices.Clone(c.ReselectionLayers)
	case *sparq.Config:
		m.selects, m.ranks, m.tokenBudget, m.sparsityRate = kernels.SelectTokens, kernels.RankLargest, c.TokenBudget, c.SparsityRate
		m.rankChannels = c.R
	case *ds.Config:
		m.selects, m.ranks, m.tokenBudget, m.sparsityRate = kernels.SelectTokens, kernels.RankLabels, c.TokenBudget, c.SparsityRate
		m.labelDim, m.labelBits, m.channels = c.R, c.QuantBit, c.Channels
		if m.labelBits == ds.Unquantised {
			m.ranks = kernels.RankChannels
		}
	default:
		return false
	}
	return true
}

// describe fills in what a layer's description says of the method; model is the model's layer index.
func (m *method) describe(d *kernels.Layer, model int) {
	d.Selects, d.Ranks, d.Estimates, d.Prunes = m.selects, m.ranks, m.estimates, m.prunes
	d.PinFirst, d.PinCurrent = truth(m.config.PinFirstChunk), truth(m.config.PinCurrentChunk)
	d.OverAll, d.UseEstimates = truth(m.config.POver == pipeline.OverAll), truth(m.config.UseEstimatedWeights)
	d.SinksFirst = int32(min(m.sinks, math.MaxInt32/2)) // a position and this are still an int32
	d.RankChannels = int32(m.rankChannels)
	if m.rankChannels == 0 {
		d.RankChannels = max(1, (d.KDim+4)/8)
	}
	d.LabelDim, d.LabelBits = int32(m.labelDim), int32(m.labelBits)
	d.CodeBits, d.CodeSymmetric, d.Equalise = int32(m.codeBits), truth(m.symmetric), truth(m.equalises)
	least, most := m.limited.Budget()
	d.MinBudget, d.MaxBudget = int32(least), int32(most)
	d.Layer, d.Reselection = int32(model), -1
	for _, layer := range m.reselection {
		if layer <= model {
			d.Reselection = int32(layer)
		}
	}
}

func truth(is bool) int32 {
	if is {
		return 1
	}
	return 0
}

// thresholds are the pruner's for the query heads of a layer.
func (m *method) thresholds(model, queryHeads int) []float64 {
	of := make([]float64, queryHeads)
	for h := range of {
		of[h] = m.limited.Threshold(&pruner.Candidates{Layer: model, QueryHead: h})
	}
	return of
}

// labels are the channels that the labels of a layer are made of, [KV heads][labelDim]; nil if it has none.
func (m *method) labels(model int) (channels []int32) {
	for _, list := range m.channels[strconv.Itoa(model)] {
		for _, channel := range list[:m.labelDim] {
			channels = append(channels, int32(channel))
		}
	}
	return channels
}

// ranksTokens tells whether candidates are tokens chosen by scores.
func (m *method) ranksTokens() bool { return m.ranks != kernels.RankNone }

// indexes tells whether the method keeps a shadow.
func (m *method) indexes() bool { return m.chunkBytes(kernels.DimStep) > 0 }

// headBytes and chunkBytes are what a (layer, KV head), and a chunk in it, take of the shadow.
func (m *method) headBytes(dim int) int {
	if m.estimates == kernels.EstimateExact {
		return 0
	}
	return 3 * 4 * dim
}

func (m *method) chunkBytes(dim int) (n int) {
	switch m.estimates {
	case kernels.EstimateInt4:
		n += kernels.Int4Bytes(dim)
	case kernels.EstimateCodes:
		n += kernels.CodeBytes(dim, m.codeBits, m.symmetric)
	}
	if m.selects == kernels.SelectQuest {
		n += kernels.BoundsBytes(dim)
	}
	if m.ranks == kernels.RankLabels {
		n += kernels.CodeBytes(m.labelDim, m.labelBits, false)
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

// path says how a row of a layer runs, as far as the host can tell. Rows of fewer tokens than crossover are
// faster by dense attention.
func (m *method) path(layer int, row *kv.SeqRow, crossover int) (pipeline.Path, pipeline.Reason) {
	tokens := row.Len - row.First
	switch {
	case row.Len == 0:
		return pipeline.Void, pipeline.Empty
	case m.plain:
		return pipeline.Dense, pipeline.Configured
	case m.config.SkipFirstTwoLayers && layer < 2:
		return pipeline.Dense, pipeline.SkippedLayer
	case m.config.DenseBelow == pipeline.ByCost && tokens < crossover && m.prunes == kernels.PruneNone && m.tokens(tokens, 0) > tokens*7/8:
		return pipeline.Dense, pipeline.KeptNearlyAll
	case tokens < m.config.DenseBelow, m.config.DenseBelow == pipeline.ByCost && tokens < crossover:
		return pipeline.Dense, pipeline.ShortContext
	}
	return pipeline.Sparse, 0
}

// budget returns what a row is to select, in chunks or, where tokens are ranked, in tokens, and how many
// chunks its candidates can lie in. own, if > 0, is in tokens and replaces the configured budget.
func (m *method) budget(row *kv.SeqRow, own int) (amount, chunks int) {
	tokens := m.tokens(row.Len-row.First, own)
	all := ceilDiv(row.Len, kv.ChunkTokens) - row.First/kv.ChunkTokens
	const pins = 2 // chunks, at most
	switch m.selects {
	case kernels.SelectQuest:
		keep := min(max(1, ceilDiv(tokens, kv.ChunkTokens)), all)
		return keep, min(max(keep, pins), all)
	case kernels.SelectEnds:
		// Either end may begin and end within a chunk.
		return tokens, min(ceilDiv(m.sinks, kv.ChunkTokens)+ceilDiv(tokens, kv.ChunkTokens)+2, all)
	case kernels.SelectTokens:
		return tokens, min(tokens+pins, all)
	}
	return tokens, all
}

// tokens is how many of n valid ones are to be candidates, which may be more than there are.
func (m *method) tokens(n, own int) int {
	switch {
	case own > 0:
		return own
	case m.selects == kernels.SelectAll:
		return n
	case m.sparsityRate > 0:
		return int(math.Ceil(m.sparsityRate * float64(n)))
	}
	return m.tokenBudget
}

func ceilDiv(a, b int) int { return (a + b - 1) / b }
