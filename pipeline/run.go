package pipeline

import (
	"math"
	"math/bits"
	"slices"
	"time"

	"github.com/viterin/vek/vek32"

	"github.com/twilight-sidecar/twilight/attention"
	"github.com/twilight-sidecar/twilight/compressor"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pruner"
	"github.com/twilight-sidecar/twilight/selector"
)

// Pipeline runs rows of one geometry by one config. It is safe for concurrent use.
type Pipeline struct {
	config      Config
	geometry    kv.Geometry
	compressor  compressor.Compressor // nil for none
	selector    selector.Selector
	estimator   pruner.Estimator
	pruner      pruner.Pruner
	least, most int  // tokens of a list; most is 0 for no limit
	scores      bool // the selector looks at those of a State
}

// New makes a pipeline. A config out of range is a *fault.Error.
func New(cfg *Config, g *kv.Geometry) (*Pipeline, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	p := &Pipeline{
		config:     *cfg,
		geometry:   *g,
		compressor: cfg.Compressor.Config.New(),
		selector:   cfg.Selector.Config.New(),
		estimator:  cfg.Estimator.Config.New(),
		pruner:     cfg.Pruner.Config.New(),
	}
	p.scores = selector.NeedsOf(p.selector).Scores
	if limiter, ok := p.pruner.(pruner.Limiter); ok {
		p.least, p.most = limiter.Budget()
	}
	return p, nil
}

// Shadows returns what the selector and the estimator keep of the keys; either may be nil.
func (p *Pipeline) Shadows() (selector, estimator kv.Shadow) {
	return p.selector.Shadow(), p.estimator.Shadow()
}

// Fits reports what keeps the config from serving a layer, by the model's index, as a *fault.Error whose
// field is the config's key at fault.
func (p *Pipeline) Fits(layer int) error {
	if p.Skips(layer) {
		return nil
	}
	if fitter, ok := p.selector.(selector.Fitter); ok {
		if err := fitter.Fits(layer, &p.geometry); err != nil {
			return fault.In("selector", err)
		}
	}
	if limiter, ok := p.pruner.(pruner.Limiter); ok {
		return fault.In("weight_pruner", limiter.Fits(layer, &p.geometry))
	}
	return nil
}

// Skips says whether all rows of a layer, by the model's index, are dense, whatever the methods: it needs
// neither shadows nor states.
func (p *Pipeline) Skips(layer int) bool { return p.config.SkipFirstTwoLayers && layer < 2 }

// Scratch is memory that Run reuses from row to row. The zero value is ready; one Scratch serves one
// goroutine and one Pipeline.
type Scratch struct {
	compressor compressor.Row
	windows    matrix // scaled queries of a prompt's end, [G][window*KDim]
	selector   selector.Row
	estimator  pruner.Row
	pruner     pruner.Candidates
	attention  attention.Scratch
	attended   attention.Row
	scaled     matrix // queries times softmax scale, [G][KDim]
	logits     matrix // [heads][candidates]
	weights    matrix // [heads][candidates]
	first      matrix // logit of the first valid token, [heads][1]
	candidates []int32
	more       []int32   // candidates that join those before
	moreLogits matrix    // [heads][more]
	tops       []float32 // largest logits, [heads]
	cover      cover
	kept       []int32  // indices into candidates
	isKept     []uint64 // a bit for each candidate, by any head
	audit      audit
	shares     []float32 // of the candidates in the heads' weights
}

// matrix is rows of equal length in one piece of memory.
type matrix struct {
	flat []float32
	rows [][]float32
}

func (m *matrix) shape(rows, columns int) [][]float32 {
	m.flat = slices.Grow(m.flat[:0], rows*columns)[:rows*columns]
	m.rows = m.rows[:0]
	for r := range rows {
		m.rows = append(m.rows, m.flat[r*columns:(r+1)*columns:(r+1)*columns])
	}
	return m.rows
}

// Run computes a row. It does not fail: what cannot be computed sparsely is computed densely, and res
// says why.
func (p *Pipeline) Run(s *Scratch, row *Row, res *Result) {
	p.prepare(s, row, res)
	res.Path, res.Reason = Sparse, 0
	p.open(row)
	if reason := p.denseReason(row); reason != 0 {
		p.dense(s, row, res, reason)
		return
	}
	heads := len(res.Mass)
	step := heads
	if p.config.Group == PerQueryHead {
		step = 1
	}
	for from := 0; from < heads; from += step {
		if !p.sparse(s, row, res, from, from+step) {
			p.gainNothing(row)
			p.dense(s, row, res, NotFinite)
			return
		}
	}
	res.Lists, res.KeysSelected = res.lists, s.selector.KeysRead
}

func (p *Pipeline) denseReason(row *Row) Reason {
	c := &p.config
	switch {
	case c.Compressor.Type == none && c.Selector.Type == none && c.Estimator.Type == none && c.Pruner.Type == none:
		return Configured
	case p.Skips(row.Layer):
		return SkippedLayer
	case row.Len-row.First < c.DenseBelow:
		return ShortContext
	}
	return 0
}

// prepare sizes the result and tells the stages about the row.
func (p *Pipeline) prepare(s *Scratch, row *Row, res *Result) {
	g := &p.geometry
	heads, lists := g.Group(), p.lists()
	res.lists = slices.Grow(res.lists[:0], lists)[:lists]
	res.Kept = slices.Grow(res.Kept[:0], lists)[:lists]
	res.Candidates = slices.Grow(res.Candidates[:0], lists)[:lists]
	res.Mass = slices.Grow(res.Mass[:0], heads)[:heads]
	res.Coverage = slices.Grow(res.Coverage[:0], heads)[:heads]
	res.Output = res.Output[:0]
	if !row.ListsOnly {
		res.Output = slices.Grow(res.Output, heads*g.VDim)[:heads*g.VDim]
	}
	res.Lists, res.KeysSelected, res.Timing = nil, 0, Timing{}
	res.TrueMass, res.OutputError = res.TrueMass[:0], res.OutputError[:0]
	p.ask(s, row)
	s.estimator = pruner.Row{
		Dim: g.KDim, Keys: row.Keys, Records: row.EstimatorRecords, Scratch: s.estimator.Scratch, Vectors: s.estimator.Vectors,
	}
	s.attended = attention.Row{Queries: s.scaled.rows, Keys: row.Keys, Values: row.Values, Softcap: g.Softcap}
	if g.Sinks != nil {
		s.attended.Sinks = g.Sinks[row.KVHead*heads:][:heads]
	}
}

// ask scales the queries and tells the selector about the row.
func (p *Pipeline) ask(s *Scratch, row *Row) {
	g := &p.geometry
	heads := g.Group()
	s.scaled.shape(heads, g.KDim)
	vek32.MulNumber_Into(s.scaled.flat, row.Queries[:heads*g.KDim], g.Scale)
	s.selector = selector.Row{
		Layer: row.Layer, Head: row.KVHead,
		Dim: g.KDim, First: row.First, Len: row.Len,
		Keys: row.Keys, Records: row.SelectorRecords,
		TokenBudget: row.TokenBudget,
		PinFirst:    p.config.PinFirstChunk, PinCurrent: p.config.PinCurrentChunk,
		Ranking: s.selector.Ranking, Scratch: s.selector.Scratch,
	}
	if p.covers(row) {
		s.selector.TokenBudget = max(1, p.config.CoverageFloor)
	}
}

// dense attends over all valid tokens.
func (p *Pipeline) dense(s *Scratch, row *Row, res *Result, reason Reason) {
	start := time.Now()
	res.Path, res.Reason = Dense, reason
	for i := range res.Kept {
		res.Kept[i], res.Candidates[i] = row.Len-row.First, row.Len-row.First
	}
	for h := range res.Mass {
		res.Mass[h], res.Coverage[h] = 1, 1
	}
	if !row.ListsOnly {
		attention.Dense(res.Output, &s.attention, &s.attended, row.First, row.Len)
	}
	res.Timing.Attend += time.Since(start)
}

// sparse selects, prunes and attends for the query heads from..to, which share candidates and list. It
// reports false, leaving their results open, if an estimate is not finite.
func (p *Pipeline) sparse(s *Scratch, row *Row, res *Result, from, to int) (finite bool) {
	start := time.Now()
	queries := s.scaled.rows[from:to]
	s.selector.Queries, s.estimator.Queries = queries, queries
	list := from / len(queries)
	p.candidates(s, row, list)
	s.cover.begin(&s.selector, p.geometry.Softcap)
	selected := time.Now()
	res.Timing.Select += selected.Sub(start)

	if !p.estimate(s, row) {
		return false
	}
	coverage := res.Coverage[from:to]
	for h := range queries {
		coverage[h] = p.prune(s, row, h, row.KVHead*p.geometry.Group()+from+h)
	}
	p.limit(s)
	res.lists[list] = s.list(res.lists[list][:0], res.Mass[from:to], coverage)
	if p.scores {
		row.State.lists[list].gain(res.lists[list], s.kept, s.weights.rows)
	}
	res.Candidates[list], res.Kept[list] = len(s.candidates), len(res.lists[list])
	pruned := time.Now()
	res.Timing.Prune += pruned.Sub(selected)

	if !row.ListsOnly {
		p.attend(s, res, from, to, res.lists[list])
		res.Timing.Attend += time.Since(pruned)
	}
	return true
}

// candidates selects those of a list, of what the compressor left.
func (p *Pipeline) candidates(s *Scratch, row *Row, list int) {
	if row.Budgets != nil {
		s.selector.TokenBudget = row.Budgets[list]
	}
	if row.Carry != nil {
		s.selector.Carry = &row.Carry[list]
	}
	if p.scores {
		s.selector.Scores = row.State.lists[list].scores[:row.Len]
	}
	s.selector.Ranking.Reset()
	s.candidates = p.selector.Select(s.candidates[:0], &s.selector)
	if p.compressor == nil {
		return
	}
	selected := len(s.candidates)
	s.candidates = row.State.within(s.candidates, list, row.Len)
	if len(s.candidates) < selected {
		s.selector.Ranking.Reset() // it is of whole chunks
	}
}

// estimate fills the logits, softcapped, and the weights of the candidates, and of these it takes more if
// coverage asks for it. It reports whether all estimates are finite.
func (p *Pipeline) estimate(s *Scratch, row *Row) (finite bool) {
	grows := p.covers(row) && len(s.selector.Ranking.Scores) > 0
	if grows {
		finite = p.grow(s, row)
	} else {
		finite = p.logits(s, &s.logits, s.candidates)
	}
	if !finite {
		return false
	}
	heads, logits := len(s.logits.rows), s.logits.rows
	s.kept = append(s.kept[:0], int32(row.First))
	if s.candidates[0] == s.kept[0] {
		first := s.first.shape(heads, 1)
		for h := range heads {
			first[h][0] = logits[h][0]
		}
	} else if !p.logits(s, &s.first, s.kept) {
		return false
	}
	weights := s.weights.shape(heads, len(s.candidates))
	for h := range heads {
		copy(weights[h], logits[h])
	}
	s.exp(weights)
	if !grows {
		s.cover.add(&s.selector, s.candidates, weights, s.tops)
	}
	words := (len(s.candidates) + 63) / 64
	s.isKept = slices.Grow(s.isKept[:0], words)[:words]
	clear(s.isKept)
	return true
}

// logits shapes and fills the softcapped logits for positions. It reports whether all are finite.
func (p *Pipeline) logits(s *Scratch, logits *matrix, positions []int32) (finite bool) {
	rows := logits.shape(len(s.estimator.Queries), len(positions))
	p.estimator.Logits(rows, &s.estimator, positions)
	if !allFinite(logits.flat) {
		return false
	}
	attention.Softcap(logits.flat, p.geometry.Softcap)
	return true
}

// exp replaces logits by weights exp(logit - top) and sets the tops.
func (s *Scratch) exp(logits [][]float32) {
	s.tops = s.tops[:0]
	for _, row := range logits {
		top := vek32.Max(row)
		s.tops = append(s.tops, top)
		attention.Exp(row, top)
	}
}

func allFinite(x []float32) bool {
	return isFinite(vek32.Sum(x)) || !slices.ContainsFunc(x, func(f float32) bool { return !isFinite(f) })
}

// prune marks what the h-th head keeps and returns its candidates' estimated coverage.
func (p *Pipeline) prune(s *Scratch, row *Row, h, queryHead int) (coverage float32) {
	outside := 0.0 // relative to the candidates' weight
	if len(s.candidates) < row.Len-row.First {
		outside = s.cover.outside(h)
	}
	s.pruner = pruner.Candidates{
		Layer: row.Layer, QueryHead: queryHead,
		Logits: s.logits.rows[h], Weights: s.weights.rows[h], FirstLogit: s.first.rows[h][0], P: row.P,
		Scratch: s.pruner.Scratch,
	}
	if p.config.POver == OverAll && outside == outside {
		s.pruner.Outside = outside
	}
	s.kept = p.pruner.Prune(s.kept[:0], &s.pruner)
	for _, i := range s.kept {
		s.isKept[i/64] |= 1 << (i % 64)
	}
	return float32(1 / (1 + outside))
}

// limit marks more candidates as kept, or fewer, where the pruner's limits ask for it: the heaviest by the
// sum of their shares in the heads' weights, ties by lower position.
func (p *Pipeline) limit(s *Scratch) {
	if p.least == 0 && p.most == 0 {
		return
	}
	kept := 0
	for _, word := range s.isKept {
		kept += bits.OnesCount64(word)
	}
	want := min(max(kept, p.least), len(s.candidates))
	if p.most > 0 {
		want = min(want, p.most)
	}
	if want == kept {
		return
	}
	s.shares = slices.Grow(s.shares[:0], len(s.candidates))[:len(s.candidates)]
	clear(s.shares)
	for _, weights := range s.weights.rows {
		total := vek32.Sum(weights)
		for i, w := range weights {
			s.shares[i] += w / total
		}
	}
	for i := range s.shares {
		switch is := s.isKept[i/64]>>(i%64)&1 == 1; {
		case want > kept && is:
			s.shares[i] = math.MaxFloat32
		case want < kept && !is:
			s.shares[i] = -1
		}
	}
	clear(s.isKept)
	least, ties := selector.Cut(s.shares, want)
	for i, share := range s.shares {
		if share > least || share == least && ties > 0 {
			s.isKept[i/64] |= 1 << (i % 64)
		}
		if share == least {
			ties--
		}
	}
}

// list appends the positions that any head keeps to dst, sets s.kept to their indices, and each head's
// mass to its estimated weight of them.
func (s *Scratch) list(dst []int32, mass, coverage []float32) []int32 {
	s.kept = s.kept[:0]
	for w, word := range s.isKept {
		for ; word != 0; word &= word - 1 {
			i := 64*w + bits.TrailingZeros64(word)
			s.kept = append(s.kept, int32(i))
			dst = append(dst, s.candidates[i])
		}
	}
	for h, weights := range s.weights.rows {
		mass[h] = coverage[h]
		if len(s.kept) == len(weights) {
			continue
		}
		sum := 0.0
		for _, i := range s.kept {
			sum += float64(weights[i])
		}
		mass[h] *= min(1, float32(sum/float64(vek32.Sum(weights))))
	}
	return dst
}

// attend writes the outputs of the query heads from..to over a list. Logits that are known are not
// computed again.
func (p *Pipeline) attend(s *Scratch, res *Result, from, to int, list []int32) {
	row := s.attended
	row.Queries = row.Queries[from:to]
	if row.Sinks != nil {
		row.Sinks = row.Sinks[from:to]
	}
	out := res.Output[from*p.geometry.VDim : to*p.geometry.VDim]
	if !p.estimator.Exact() && !p.config.UseEstimatedWeights {
		attention.Sparse(out, &s.attention, &row, list)
		return
	}
	logits := s.logits.rows
	for h := range logits {
		for i, candidate := range s.kept {
			logits[h][i] = logits[h][candidate]
		}
		logits[h] = logits[h][:len(list)]
	}
	attention.Weighted(out, &s.attention, &row, list, logits)
}
