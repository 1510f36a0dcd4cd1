package host

import "github.com/twilight-sidecar/twilight/kv"

// shares holds what the lists of a layer are weighed by, and the budgets that they get for it.
type shares struct {
	weights []float32 // by sequence: [KV heads][lists][valid tokens]
	offsets []int     // of each sequence's, and their end
	means   []int     // by sequence; 0 where its rows are dense
	budgets []int     // by task, then list
}

// shape makes room for rows of so many lists each.
func (s *shares) shape(rows []kv.SeqRow, lists int) {
	s.offsets = append(s.offsets[:0], 0)
	total := 0
	for b := range rows {
		total += lists * (rows[b].Len - rows[b].First)
		s.offsets = append(s.offsets, total)
	}
	s.weights = sized(s.weights, total)
	s.budgets = sized(s.budgets, lists*len(rows))
	s.means = sized(s.means, len(rows))
}

// weigh weighs the lists of a row.
func (c *cache) weigh(worker, task int) error {
	g, a, s := &c.lease.geometry, &c.call, &c.lease.scratch[worker]
	b, head := task/g.KVHeads, task%g.KVHeads
	n := a.rows[b].Len - a.rows[b].First
	if n == 0 {
		return nil
	}
	c.setRow(s, task)
	c.setQuery(s, task)
	size := c.lease.lists * n
	mean := c.lease.pipeline.Weigh(&s.pipeline, &s.row, a.shares.weights[a.shares.offsets[b]+head*size:][:size])
	if head == 0 { // as all others of the sequence
		a.shares.means[b] = mean
	}
	return nil
}

// share shares out the budget of a sequence.
func (c *cache) share(_, b int) error {
	a := &c.call
	if a.rows[b].Len == 0 || a.shares.means[b] == 0 {
		return nil
	}
	lists := c.lease.geometry.KVHeads * c.lease.lists
	weights := a.shares.weights[a.shares.offsets[b]:a.shares.offsets[b+1]]
	c.lease.pipeline.Share(a.shares.budgets[b*lists:][:lists], weights, a.shares.means[b])
	return nil
}
