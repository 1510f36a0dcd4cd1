package pipeline

import (
	"math"
	"slices"

	"github.com/viterin/vek/vek32"

	"github.com/twilight-sidecar/twilight/attention"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/selector"
)

// covers tells whether a row's candidates are as many as coverage takes.
func (p *Pipeline) covers(row *Row) bool { return p.config.Coverage > 0 && row.TokenBudget == 0 }

// grow takes candidates until each query head's coverage reaches the target, an eighth more at a time, and
// fills the logits of all. It reports whether all are finite.
func (p *Pipeline) grow(s *Scratch, row *Row) (finite bool) {
	ranking := &s.selector.Ranking
	most := len(ranking.Scores)
	if p.config.CoverageCeiling > 0 {
		most = min(most, max(ranking.Taken, ceilDiv(p.config.CoverageCeiling, ranking.Unit)))
	}
	logits := s.logits.shape(len(s.estimator.Queries), row.Len-row.First) // by position
	for more := s.candidates; ; more = s.more {
		if !p.logits(s, &s.moreLogits, more) {
			return false
		}
		for h, some := range s.moreLogits.rows {
			for i, position := range more {
				logits[h][int(position)-row.First] = some[i]
			}
		}
		s.exp(s.moreLogits.rows)
		s.cover.add(&s.selector, more, s.moreLogits.rows, s.tops)
		if ranking.Taken == most || s.cover.reaches(p.config.Coverage) {
			break
		}
		s.more = ranking.Take(s.more[:0], &s.selector, min(most, ranking.Taken+max(1, ranking.Taken/8)))
	}
	s.candidates = ranking.Candidates(s.candidates[:0], &s.selector)
	for h := range logits {
		for i, position := range s.candidates {
			logits[h][i] = logits[h][int(position)-row.First]
		}
		logits[h] = logits[h][:len(s.candidates)]
	}
	return true
}

// cover estimates, from a ranking, what a row's candidates hold of the softmax weight of all its tokens.
//
// Of the units taken the logarithm y of their weight is known, and of all units a score x. A line through
// the points (x, y), by least squares, forecasts y for the other units, with the variance of a new point:
// that of the residuals and of the line itself, so that few points and far extrapolation count as what
// they are, uncertain. Weights being log-normal, a unit's is then exp(mean + variance/2), but no more than
// all its tokens have at their bound. The first and the current chunk are no points, since sinks and
// neighbours weigh more than their scores say.
//
// Tried with Quest, coverage .97, per query head, on layers 2, 9, 17 and 25 of SmolLM2-135M: 4096 tokens
// of three texts (the public capture's, code, prose), 288 rows each. Mean candidates, mean and worst true
// coverage:
//
//	true weights known         1011 .974 .97    902 .975 .97   1156 .975 .97
//	this                       1306 .984 .88   1209 .986 .89   1475 .982 .54
//	first and current as well  1507 .988 .95   1320 .986 .09   1584 .985 .54
//	residuals' variance only   1273 .983 .88   1186 .982 .09   1445 .982 .54
//	no variance                 974 .965 .41   1014 .974 .09   1218 .965 .28
//	half a deviation instead   1185 .976 .41   1150 .981 .09   1376 .973 .42
//	lower half of the scores   1147 .968 .73   1120 .975 .09   1365 .971 .56
//	twice the variance         1606 .991 .95   1446 .992 .92   1858 .992 .95
//	a quarter more at a time   1373 .986 .88   1261 .988 .92   1549 .984 .54
//	bounds of 8 tokens         1265 .985 .94   1218 .988 .94   1444 .985 .58
//	bounds of 4 tokens         1230 .986 .94   1198 .989 .95   1444 .988 .94
//
// The last two take twice and four times the memory. Never letting the line fall changed nothing. The .54
// is a row with two needles, ranked 85th and 117th of 257.
//
// Of 6144 tokens of other code the worst row has .80. There the larger of exp(variance/2) and the mean of
// exp(residual) (smearing: Duan, JASA 78(383), 1983) gives .95, for 1% more candidates here and there; it
// wants the points twice, and the other texts' worst rows stay as they are.
type cover struct {
	ranking  *selector.Ranking
	from, to int    // positions, between the first and the current chunk, of units that can be points
	taken    []bool // by unit
	heads    []forecast
	units    []int32   // that add takes up
	ends     []int32   // of their positions
	weights  []float32 // theirs
	others   []int32   // units that are not taken
	rest     []float32 // their scores
	guess    []float32 // and their weights
}

// begin starts with the row that a selector was asked about. Of its ranking it changes the bounds.
func (c *cover) begin(row *selector.Row, softcap float32) {
	c.ranking = &row.Ranking
	units := len(c.ranking.Scores)
	c.from = (row.First/kv.ChunkTokens + 1) * kv.ChunkTokens
	c.to = (row.Len - 1) / kv.ChunkTokens * kv.ChunkTokens
	c.taken = slices.Grow(c.taken[:0], units)[:units]
	clear(c.taken)
	c.heads = c.heads[:0]
	for h := range row.Queries {
		scores := c.ranking.Scores
		if len(c.ranking.Bounds) > 0 {
			scores = c.ranking.Bounds[h]
			attention.Softcap(scores, softcap)
		}
		c.heads = append(c.heads, forecast{scores: scores, top: math.Inf(-1)})
	}
}

// add takes up candidates, whole units of them, with weights exp(logit - top), [heads][positions].
func (c *cover) add(row *selector.Row, positions []int32, weights [][]float32, tops []float32) {
	if len(c.taken) == 0 {
		return
	}
	unit, first := c.ranking.Unit, row.First/c.ranking.Unit
	c.units, c.ends = c.units[:0], c.ends[:0]
	points := [2]int{} // which of the units are points
	for i := 0; i < len(positions); {
		u := int(positions[i]) / unit
		i = inUnit(positions, i, unit)
		c.taken[u-first] = true
		c.units, c.ends = append(c.units, int32(u-first)), append(c.ends, int32(i))
		if u*unit < c.from {
			points[0] = len(c.units)
		}
		if (u+1)*unit <= c.to {
			points[1] = len(c.units)
		}
	}
	c.weights = slices.Grow(c.weights[:0], len(c.units))[:len(c.units)]
	for h := range c.heads {
		from := int32(0)
		for i, end := range c.ends {
			c.weights[i] = sum(weights[h][from:end])
			from = end
		}
		c.heads[h].take(c.units, c.weights, float64(tops[h]), points[0], points[1])
	}
	c.others = c.others[:0]
	for u, taken := range c.taken {
		if !taken {
			c.others = append(c.others, int32(u))
		}
	}
}

// sum adds up a unit's weights: mostly as many as make a call of vek32 cost more than its work.
func sum(weights []float32) float32 {
	var a, b, c, d float32
	for ; len(weights) >= 4; weights = weights[4:] {
		a += weights[0]
		b += weights[1]
		c += weights[2]
		d += weights[3]
	}
	for _, w := range weights {
		a += w
	}
	return a + b + (c + d)
}

// inUnit is where the positions end that share a unit with positions[i], the first of them.
func inUnit(positions []int32, i, unit int) int {
	end := (positions[i]/int32(unit) + 1) * int32(unit)
	most := min(i+int(end-positions[i]), len(positions))
	if positions[most-1] < end {
		return most
	}
	for i++; positions[i] < end; i++ {
	}
	return i
}

// reaches tells whether every query head's coverage does.
func (c *cover) reaches(target float64) bool {
	for h := range c.heads {
		if !(1/(1+c.outside(h)) >= target) {
			return false
		}
	}
	return true
}

// outside estimates the weight of all tokens that are no candidates, relative to the candidates'; NaN if
// it cannot tell.
func (c *cover) outside(h int) float64 {
	f := &c.heads[h]
	switch {
	case len(c.taken) == 0:
		return math.NaN() // no ranking
	case len(c.others) == 0:
		return 0
	}
	c.rest = slices.Grow(c.rest[:0], len(c.others))[:len(c.others)]
	for i, u := range c.others {
		c.rest[i] = f.scores[u]
	}
	if f.n < leastPoints || !isFinite(vek32.Sum(c.rest)) {
		return math.NaN() // too few for a line, or a unit has no bound
	}
	level, slope, bend, centre := f.curve()
	c.guess = slices.Grow(c.guess[:0], len(c.rest))[:len(c.rest)]
	away := c.rest
	vek32.SubNumber_Inplace(away, float32(centre))
	vek32.MulNumber_Into(c.guess, away, float32(bend))
	vek32.AddNumber_Inplace(c.guess, float32(slope))
	vek32.Mul_Inplace(c.guess, away)
	vek32.AddNumber_Inplace(c.guess, float32(level-f.top))
	if len(c.ranking.Bounds) > 0 {
		vek32.AddNumber_Inplace(away, float32(centre-f.top+math.Log(float64(c.ranking.Unit))))
		vek32.Minimum_Inplace(c.guess, away)
	}
	vek32.MinimumNumber_Inplace(c.guess, mostLog)
	attention.Exp(c.guess, 0)
	return float64(vek32.Sum(c.guess)) / f.inside
}

const (
	leastPoints = 4  // that a line is fitted to
	mostLog     = 80 // the candidates' share is as good as nil long before
)

// forecast is what a query head's estimate is made from.
type forecast struct {
	scores      []float32 // x, by unit
	top, inside float64   // weight of the candidates, in units of exp(top)

	n                int     // points
	x0, y0           float64 // the first of them; sums are over differences to it
	x, y, xx, xy, yy float64
}

// take adds units of weights, in units of exp(top), of which those from..to are points. It overwrites weights.
func (f *forecast) take(units []int32, weights []float32, top float64, from, to int) {
	if top > f.top {
		f.inside *= math.Exp(f.top - top)
		f.top = top
	}
	f.inside += float64(vek32.Sum(weights)) * math.Exp(top-f.top)
	if from >= to {
		return
	}
	vek32.Log_Inplace(weights[from:to])
	for i, u := range units[from:to] {
		if x := f.scores[u]; isFinite(x) {
			f.point(float64(x), float64(weights[from+i])+top)
		}
	}
}

func (f *forecast) point(x, y float64) {
	if f.n == 0 {
		f.x0, f.y0 = x, y
	}
	x, y = x-f.x0, y-f.y0
	f.n++
	f.x += x
	f.y += y
	f.xx += x * x
	f.xy += x * y
	f.yy += y * y
}

// curve gives mean + variance/2 of y at x as level + away*(slope + bend*away), away = x - centre.
func (f *forecast) curve() (level, slope, bend, centre float64) {
	n := float64(f.n)
	xx, xy, yy := f.xx-f.x*f.x/n, f.xy-f.x*f.y/n, f.yy-f.y*f.y/n
	if xx > 0 {
		slope = xy / xx
	}
	half := max(0, yy-slope*xy) / (n - 2) / 2 // of the residuals' variance
	if xx > 0 {
		bend = half / xx
	}
	return f.y0 + f.y/n + half*(1+1/n), slope, bend, f.x0 + f.x/n
}

func isFinite(f float32) bool { return f-f == 0 }

func ceilDiv(a, b int) int { return (a + b - 1) / b }
