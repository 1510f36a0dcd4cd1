package kv

import "github.com/twilight-sidecar/twilight/internal/fault"

// touched returns the tokens of chunk c that are forgotten, new, or on a placed page.
func (p *rowPlan) touched(c, pageSize int) uint16 {
	base := c * ChunkTokens
	tokens := span(p.keep-base, p.end-base)
	for i := base / pageSize; i*pageSize < base+ChunkTokens; i++ {
		if p.placed(i) {
			tokens |= span(i*pageSize-base, (i+1)*pageSize-base)
		}
	}
	return tokens
}

// planPages finds what rows do to the chunks of their pages.
func (t *Tracker) planPages() {
	for i := range t.planner.rows {
		p := &t.planner.rows[i]
		if p.void {
			continue
		}
		stop := p.end
		if p.changed < p.pages {
			stop = max(stop, p.pages*t.cfg.PageSize)
		}
		stop = min(ceilDiv(stop, ChunkTokens), p.pages*t.perPage)
		for c := p.stable; c < stop; c++ {
			page := p.page(c / t.perPage)
			if page < 0 || int(page) >= t.cfg.NumPages {
				continue // padding
			}
			t.planner.effect(page*int32(t.perPage)+int32(c%t.perPage), c, p.touched(c, t.cfg.PageSize), p.claim)
		}
	}
}

// effect notes that tokens of a chunk, its sequence's chunk c, are touched.
func (p *planner) effect(chunk int32, c int, touched uint16, claim int) {
	claimed := span(0, claim-c*ChunkTokens)
	if tokens := touched &^ claimed; tokens != 0 {
		p.lost = append(p.lost, effect{chunk, tokens})
	}
	if tokens := touched & claimed; tokens != 0 {
		p.kept = append(p.kept, effect{chunk, tokens})
	}
}

// planSlots finds the tokens that lie in written slots.
func (t *Tracker) planSlots(s *Step) error {
	p, size := &t.planner, int64(t.cfg.PageSize)
	for i, slot := range s.Slots {
		if slot == -1 {
			continue
		}
		if slot < 0 || slot >= size*int64(t.cfg.NumPages) {
			return fault.Newf(fault.OutOfRange, at("slots.slots", i), "%d is neither -1 nor in [0, %d)",
				slot, size*int64(t.cfg.NumPages))
		}
		chunk := int32(slot / ChunkTokens)
		if slot%size != 0 {
			p.lost = append(p.lost, effect{chunk, 1 << (slot % ChunkTokens)})
			continue
		}
		for c := range int32(t.perPage) {
			p.lost = append(p.lost, effect{chunk + c, 1<<ChunkTokens - 1})
		}
	}
	return nil
}

// planChunks finds the ids that the rows' chunks will have in sequence mode. It takes what is shared
// and gives back what goes; what is new is left to be allocated, of which there is enough.
func (t *Tracker) planChunks(ended []uint64) error {
	t.pool.begin()
	for i := range t.planner.rows {
		p := &t.planner.rows[i]
		for c := p.share; c < p.shareEnd; c++ {
			t.pool.acquire(p.source.chunks[c])
		}
	}
	for _, id := range ended {
		t.releaseFrom(t.live[id], 0)
	}
	need := 0
	for i := range t.planner.rows {
		need += t.planRowChunks(&t.planner.rows[i])
	}
	if left := len(t.pool.free); need > left {
		t.pool.undo()
		return fault.Exhaustedf("lengths", uint64(need), uint64(left),
			"the step needs %d new chunks of %d tokens, %d are left of %d: end sequences, or register with more max_tokens",
			need, ChunkTokens, left, t.NumChunks())
	}
	return nil
}

// planRowChunks does so for a row and returns how many chunks it has to allocate.
func (t *Tracker) planRowChunks(p *rowPlan) (need int) {
	p.idFrom = len(t.planner.ids)
	for c := p.stable; c*ChunkTokens < p.length; c++ {
		id := toAllocate
		switch {
		case c < p.first/ChunkTokens:
			id = noChunk
		case c >= p.share && c < p.shareEnd:
			id = p.source.chunks[c]
			t.planner.kept = append(t.planner.kept, effect{id, 1<<ChunkTokens - 1})
		case c*ChunkTokens < p.keep:
			own, touched := p.seq.chunks[c], p.touched(c, t.cfg.PageSize)
			// A shared chunk stays with those whose tokens do not change.
			if touched&^span(0, p.claim-c*ChunkTokens) == 0 || t.pool.refs[own] == 1 {
				id = own
				t.pool.acquire(id)
				t.planner.effect(id, c, touched, p.claim)
			}
		}
		if id == toAllocate {
			need++
		}
		t.planner.ids = append(t.planner.ids, id)
	}
	p.idStop = len(t.planner.ids)
	if p.seq != nil {
		t.releaseFrom(p.seq, p.stable)
	}
	return need
}

// releaseFrom gives back the chunks of a sequence from chunk c on.
func (t *Tracker) releaseFrom(q *sequence, c int) {
	for _, id := range q.chunks[min(c, len(q.chunks)):] {
		if id != noChunk {
			t.pool.release(id)
		}
	}
}
