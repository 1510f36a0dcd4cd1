package selector

import "math"

// Ranker is a Selector that scores a row's tokens and takes the best. By the Row's Ranking others can
// estimate what it left behind, and take more.
type Ranker interface {
	Selector
	// Unit is how many adjacent tokens share a score.
	Unit() int
}

// Ranking is the order in which a row's units become candidates. The zero value is that of no method.
// A unit is the valid positions in [u*Unit, (u+1)*Unit) for some u; units are counted from that of the
// row's First on.
type Ranking struct {
	Unit int
	// Scores has a number for each unit, none NaN: the largest come first, ties by lower unit. Pinned
	// units have +Inf.
	Scores []float32
	// Bounds, if the method has them, are upper bounds on the logits of each query before softcap,
	// [n][units]. +Inf is none.
	Bounds [][]float32
	// Taken is how many units are candidates.
	Taken int

	taken cut // tells which
}

// Reset empties r but keeps its memory.
func (r *Ranking) Reset() { *r = Ranking{Bounds: r.Bounds[:0]} }

// Take makes n units candidates in all, Taken <= n <= len(Scores), 0 < n, and appends the positions in those
// that were not to dst, ascending.
func (r *Ranking) Take(dst []int32, row *Row, n int) []int32 {
	before := cut{least: float32(math.Inf(1))}
	if r.Taken > 0 {
		before = r.taken
	}
	least, ties := Cut(r.Scores, n)
	r.Taken, r.taken = n, cut{least, ties}
	return r.between(dst, row, before)
}

// Candidates appends the positions in all units that are taken, at least one, to dst, ascending.
func (r *Ranking) Candidates(dst []int32, row *Row) []int32 {
	return r.between(dst, row, cut{least: float32(math.Inf(1))})
}

// between appends the positions in units that are taken, but were not before.
func (r *Ranking) between(dst []int32, row *Row, before cut) []int32 {
	taken := r.taken
	first := row.First / r.Unit
	for i, score := range r.Scores {
		had := before.takes(score)
		if !taken.takes(score) || had {
			continue
		}
		from := (first + i) * r.Unit
		for p := max(row.First, from); p < min(row.Len, from+r.Unit); p++ {
			dst = append(dst, int32(p))
		}
	}
	return dst
}

// cut tells the best units from the others when shown all of them in order.
type cut struct {
	least float32
	ties  int // units of that score that are yet to be taken
}

func (c *cut) takes(score float32) bool {
	if score == c.least && c.ties > 0 {
		c.ties--
		return true
	}
	return score > c.least
}
