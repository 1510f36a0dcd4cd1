package kv

import (
	"math/bits"
	"slices"
)

// apply does what plan worked out; it cannot fail.
func (t *Tracker) apply(s *Step) {
	p := &t.planner
	// First all known parts are cut back, so that no sequence seems to rely on tokens that it gives up
	// in this very step.
	for _, id := range s.Ended {
		t.retire(t.live[id])
		delete(t.live, id)
	}
	t.dropAnonymous()
	for i := range p.rows {
		if r := &p.rows[i]; r.seq != nil {
			t.lower(r.seq, r.stable)
		}
	}

	t.rows, t.batch = t.rows[:0], t.batch[:0]
	for i := range p.rows {
		t.applyRow(&p.rows[i], len(s.Sequences) > 0)
	}
	t.clear(p.lost)
	clear(t.claimed)
	for _, e := range p.kept {
		for layer := range t.claimed {
			t.claimed[layer] += uint64(bits.OnesCount16(t.masks.at(layer, e.chunk).have & e.tokens))
		}
	}
	if len(s.Sequences) == 0 {
		t.keepAnonymous()
	}
}

// clear makes tokens pending in all layers. If that hits the known part of a sequence, all are given
// up: those of the batch are looked through again, and absent ones do not get in the way twice.
func (t *Tracker) clear(lost []effect) {
	hit := false
	for _, e := range lost {
		if t.masks.clear(e.chunk, e.tokens) && t.relied != nil && t.relied[e.chunk] > 0 {
			hit = true
		}
	}
	if !hit {
		return
	}
	for _, q := range t.live {
		t.lower(q, 0)
	}
	for _, q := range t.batch {
		if q != nil {
			t.lower(q, 0)
		}
	}
}

// applyRow makes r the next row of the batch.
func (t *Tracker) applyRow(r *rowPlan, named bool) {
	if r.void {
		t.rows = append(t.rows, SeqRow{Sequence: r.id})
		t.batch = append(t.batch, nil)
		return
	}
	q := r.seq
	if q == nil {
		q = t.newSequence(r)
		if named {
			t.live[q.id] = q
		}
	}
	switch {
	case r.vEntries != nil && q.vtable == nil:
		q.vtable = append(slices.Clone(q.table[:r.start]), r.vEntries...)
	case r.vEntries != nil:
		q.vtable = append(q.vtable[:r.start], r.vEntries...)
	case q.vtable != nil:
		q.vtable = append(q.vtable[:r.start], r.entries...)
	}
	q.table = append(q.table[:r.start], r.entries...)
	q.length = r.length
	t.applyChunks(r, q)

	row := SeqRow{Sequence: q.id, First: q.first, Len: q.length, Table: q.table, VTable: q.table, Chunks: q.chunks}
	if q.vtable != nil {
		row.VTable = q.vtable
	}
	t.rows = append(t.rows, row)
	t.batch = append(t.batch, q)
}

func (t *Tracker) applyChunks(r *rowPlan, q *sequence) {
	q.chunks = q.chunks[:r.stable]
	if t.pool != nil {
		for _, id := range t.planner.ids[r.idFrom:r.idStop] {
			if id == toAllocate {
				id = t.pool.alloc()
				t.masks.clear(id, 1<<ChunkTokens-1)
			}
			q.chunks = append(q.chunks, id)
		}
		return
	}
	for c := r.stable; c*ChunkTokens < q.length; c++ {
		id := noChunk
		if c >= q.first/ChunkTokens {
			id = q.table[c/t.perPage]*int32(t.perPage) + int32(c%t.perPage)
		}
		q.chunks = append(q.chunks, id)
	}
}

func (t *Tracker) newSequence(r *rowPlan) *sequence {
	var q *sequence
	if last := len(t.spare) - 1; last >= 0 {
		q = t.spare[last]
		t.spare = t.spare[:last]
		*q = sequence{table: q.table[:0], chunks: q.chunks[:0], known: q.known}
	} else {
		q = &sequence{known: make([]int, t.cfg.Layers)}
	}
	q.id, q.first = r.id, r.first
	return q
}

// retire forgets a sequence but for its memory, which a batch's worth is kept of.
func (t *Tracker) retire(q *sequence) {
	t.lower(q, 0)
	if len(t.spare) < t.cfg.MaxBatch {
		t.spare = append(t.spare, q)
	}
}

// anonymous recognises rows without names by the page of their last token, from one step to the next,
// so that what is known of their chunks is not looked up again. A row that goes unrecognised, or is
// taken for another, costs time but is served right: by slots, nothing else depends on identity.
type anonymous struct {
	rows   []*sequence // of the last step; nil where void
	byTail []int32     // by page: index in rows, if that row ends on the page
}

// find returns the last step's row that p goes on with, nil if there is none.
func (a *anonymous) find(p *rowPlan, pageSize int, step uint64) *sequence {
	tail := (p.length - 1) / pageSize
	for i := tail; i >= max(tail-1, 0); i-- {
		if i >= len(p.entries) {
			continue
		}
		page := p.entries[i]
		if page < 0 || int(page) >= len(a.byTail) || int(a.byTail[page]) >= len(a.rows) {
			continue
		}
		q := a.rows[a.byTail[page]]
		if q != nil && q.tail(pageSize) == page && q.first == p.first && q.seen != step {
			return q
		}
	}
	return nil
}

func (q *sequence) tail(pageSize int) int32 { return q.table[(q.length-1)/pageSize] }

// dropAnonymous retires the last step's anonymous rows that do not go on.
func (t *Tracker) dropAnonymous() {
	for _, q := range t.anon.rows {
		if q != nil && q.seen != t.planner.step {
			t.retire(q)
		}
	}
	t.anon.rows = t.anon.rows[:0]
}

func (t *Tracker) keepAnonymous() {
	t.anon.rows = append(t.anon.rows, t.batch...)
	for i, q := range t.anon.rows {
		if q != nil {
			t.anon.byTail[q.tail(t.cfg.PageSize)] = int32(i)
		}
	}
}
