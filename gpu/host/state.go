package host

import (
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
	"github.com/twilight-sidecar/twilight/selector"
)

// carries holds what layers of the current step leave to later ones: lists by (sequence of the batch,
// KV head, list).
type carries []selector.Carry

// begin empties the lists for a step of n.
func (c *carries) begin(n int) {
	if more := n - len(*c); more > 0 {
		*c = append(*c, make([]selector.Carry, more)...)
	}
	for i := range *c {
		(*c)[i].List = (*c)[i].List[:0]
	}
}

// states holds what methods remember of the live sequences of a cache.
type states struct {
	perSequence int // layers times KV heads
	limit       int // of all sequences' tokens
	scored      bool

	live    map[uint64]*remembered
	tokens  int
	step    uint64        // counts steps
	rows    []*remembered // of the current step; nil where void
	attempt uint64        // counts steps, refused ones too
}

// remembered is what is remembered of a sequence.
type remembered struct {
	length int
	states []pipeline.State // by layer, then KV head
	ended  uint64           // the last attempt at a step that named it among those over
}

func newStates(perSequence, limit int, scored bool) *states {
	return &states{perSequence: perSequence, limit: limit, scored: scored, live: make(map[uint64]*remembered)}
}

// check refuses a step whose sequences cannot be remembered. What else is wrong with it, the tracker tells.
func (s *states) check(step *kv.Step) error {
	s.attempt++
	if len(step.Sequences) == 0 && len(step.Lengths) > 0 {
		return fault.Newf(fault.Unsupported, "sequences",
			"are absent, but a method of the config remembers each sequence from step to step: name the rows")
	}
	if len(step.Sequences) != len(step.Lengths) {
		return nil
	}
	tokens := s.tokens
	for _, id := range step.Ended {
		if r := s.live[id]; r != nil && r.ended != s.attempt {
			r.ended = s.attempt
			tokens -= r.length
		}
	}
	for b, length := range step.Lengths {
		if length <= 0 {
			continue
		}
		tokens += int(length)
		if r := s.live[step.Sequences[b]]; r != nil && r.ended != s.attempt {
			tokens -= r.length
		}
	}
	if tokens > s.limit {
		return fault.Exhaustedf("lengths", uint64(tokens), uint64(s.limit),
			"the live sequences would have %d tokens, room for what methods remember is registered for %d: "+
				"end some, or register the cache with more max_tokens", tokens, s.limit)
	}
	return nil
}

// begin brings the states up to a step that the tracker has made the current one.
func (s *states) begin(step *kv.Step, rows []kv.SeqRow, pageSize int) {
	s.step++
	for _, id := range step.Ended {
		if r := s.live[id]; r != nil {
			s.tokens -= r.length
			delete(s.live, id)
		}
	}
	written := slotsByPage(step, pageSize, s.scored)
	s.rows = s.rows[:0]
	for b := range rows {
		row := &rows[b]
		if row.Len == 0 {
			s.rows = append(s.rows, nil)
			continue
		}
		r := s.live[row.Sequence]
		if r == nil {
			r = &remembered{states: make([]pipeline.State, s.perSequence)}
			s.live[row.Sequence] = r
		}
		s.rows = append(s.rows, r)
		left := min(r.length, row.Len)
		if len(step.TruncateTo) > 0 && step.TruncateTo[b] >= 0 {
			left = min(left, int(step.TruncateTo[b]))
		}
		if left < r.length {
			for i := range r.states {
				r.states[i].Truncate(left)
			}
		}
		r.forget(written, row, pageSize)
		s.tokens += row.Len - r.length
		r.length = row.Len
	}
}

// slotsByPage returns the written slots' offsets by page.
func slotsByPage(step *kv.Step, pageSize int, wanted bool) map[int32][]int {
	if !wanted || len(step.Slots) == 0 {
		return nil
	}
	written := make(map[int32][]int)
	for _, slot := range step.Slots {
		if slot >= 0 {
			page := int32(slot / int64(pageSize))
			written[page] = append(written[page], int(slot%int64(pageSize)))
		}
	}
	return written
}

// forget forgets the scores of tokens that were written anew; writing offset 0 of a page restarts it.
func (r *remembered) forget(written map[int32][]int, row *kv.SeqRow, pageSize int) {
	if len(written) == 0 {
		return
	}
	for i := 0; i*pageSize < r.length; i++ {
		for _, offset := range written[row.Table[i]] {
			from, to := i*pageSize+offset, i*pageSize+offset+1
			if offset == 0 {
				to = from + pageSize
			}
			for j := range r.states {
				r.states[j].Forget(from, to)
			}
		}
	}
}

// at returns the state of a row of the current step.
func (s *states) at(b, layer, head, heads int) *pipeline.State {
	return &s.rows[b].states[layer*heads+head]
}
