package kv

import "slices"

// pool hands out chunk ids and counts who holds them. Between begin and undo or the next begin,
// acquire and release can be taken back.
type pool struct {
	refs    []int32 // by chunk
	free    []int32 // a stack
	journal []int32 // id for acquire, ^id for release
}

func newPool(chunks int) *pool {
	p := &pool{refs: make([]int32, chunks), free: make([]int32, chunks)}
	for i := range p.free {
		p.free[i] = int32(chunks - 1 - i)
	}
	return p
}

func (p *pool) begin() { p.journal = p.journal[:0] }

func (p *pool) acquire(id int32) {
	p.refs[id]++
	p.journal = append(p.journal, id)
}

func (p *pool) release(id int32) {
	p.refs[id]--
	if p.refs[id] == 0 {
		p.free = append(p.free, id)
	}
	p.journal = append(p.journal, ^id)
}

// undo takes back all since begin; nothing may have been allocated.
func (p *pool) undo() {
	for _, id := range slices.Backward(p.journal) {
		if id >= 0 {
			p.refs[id]--
			continue
		}
		id = ^id
		if p.refs[id] == 0 {
			p.free = p.free[:len(p.free)-1]
		}
		p.refs[id]++
	}
	p.begin()
}

// alloc takes a free chunk; there must be one.
func (p *pool) alloc() int32 {
	last := len(p.free) - 1
	id := p.free[last]
	p.free = p.free[:last]
	p.refs[id] = 1
	return id
}
