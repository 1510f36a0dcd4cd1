package pipeline

import "github.com/twilight-sidecar/twilight/selector"

// Weigh writes how the attention of a row's lists is spread over its valid positions to weights,
// [lists][Len-First], and returns the mean budget of the lists, 0 if the row is dense, whose weights are left
// as they are. It is for a pipeline that Needs Shares: all KV heads of a sequence are weighed, then Share is
// called, then they run.
func (p *Pipeline) Weigh(s *Scratch, row *Row, weights []float32) (mean int) {
	p.open(row)
	if p.denseReason(row) != 0 {
		return 0
	}
	p.ask(s, row)
	lists, heads, n := p.lists(), p.geometry.Group()/p.lists(), row.Len-row.First
	for list := range lists {
		s.selector.Queries = s.scaled.rows[list*heads : (list+1)*heads]
		if p.scores {
			s.selector.Scores = row.State.lists[list].scores[:row.Len]
		}
		mean = p.selector.(selector.Allocator).Weigh(weights[list*n:(list+1)*n], &s.selector)
	}
	return mean
}

// Share sets the budgets of all lists of a sequence and layer, by KV head and list, from their weights, in
// the same order, and the mean that Weigh returned.
func (p *Pipeline) Share(budgets []int, weights []float32, mean int) {
	p.selector.(selector.Allocator).Share(budgets, weights, mean)
}
