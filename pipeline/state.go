package pipeline

import (
	"slices"

	"github.com/viterin/vek/vek32"

	"github.com/twilight-sidecar/twilight/compressor"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/selector"
)

// Needs is what a config wants of a device besides shadows.
type Needs struct {
	// Carry: rows need Row.Carry.
	Carry bool
	// Shares: rows need Row.Budgets.
	Shares bool
	// State: rows need Row.State and Row.Step, and so sequences need names.
	State bool
	// Window is how many of a prompt's last queries an Observation should hold, Mass whether it should
	// hold the mass. Neither: none is taken.
	Window int
	Mass   bool
}

// Needs returns what the pipeline's methods need.
func (p *Pipeline) Needs() Needs {
	s := selector.NeedsOf(p.selector)
	n := Needs{Carry: s.Carry, Shares: s.Shares, State: s.Scores || p.compressor != nil, Mass: s.Scores}
	if p.compressor != nil {
		n.Window = p.compressor.Window()
	}
	return n
}

// StateBytesPerToken is what carries and states take for a token of a sequence, over all KV heads of some
// layers that are not skipped, at most.
func (p *Pipeline) StateBytesPerToken(layers int) int {
	const position, score = 4, 4
	perList := 0
	if p.compressor != nil {
		perList += position
	}
	needs := selector.NeedsOf(p.selector)
	if needs.Scores {
		perList += score + position + score
	}
	perList *= layers
	if needs.Carry {
		perList += position
	}
	if needs.Shares {
		perList += score
	}
	return perList * p.geometry.KVHeads * p.lists()
}

// lists is how many lists a row has.
func (p *Pipeline) lists() int {
	if p.config.Group == PerQueryHead {
		return p.geometry.Group()
	}
	return 1
}

// State is what a config's methods remember of a (sequence, layer, KV head) from step to step. The zero
// value is that of a new sequence. It serves one caller at a time.
type State struct {
	// Of the compressor: whether it has had its chance, and behind which position all tokens are kept.
	compressed bool
	prompt     int
	lists      []past
}

// past is what is remembered of a list.
type past struct {
	kept []int32 // below State.prompt, by the compressor

	// scores[p] is the attention that position p got in steps that are over; gains are what the positions
	// got in the given step, which counts once it is over, however often a layer of it runs.
	scores    []float32
	step      uint64
	positions []int32
	gains     []float32
}

// Truncate forgets the tokens from position n on. It is called between steps.
func (s *State) Truncate(n int) {
	if n == 0 {
		*s = State{}
		return
	}
	s.prompt = min(s.prompt, n)
	for i := range s.lists {
		past := &s.lists[i]
		past.settle()
		past.scores = past.scores[:min(n, len(past.scores))]
		end, _ := slices.BinarySearch(past.kept, int32(n))
		past.kept = past.kept[:end]
	}
}

// Forget forgets the scores of the positions [from, to), whose tokens were overwritten. It is called
// between steps.
func (s *State) Forget(from, to int) {
	for i := range s.lists {
		past := &s.lists[i]
		past.settle()
		n := len(past.scores)
		clear(past.scores[min(from, n):min(to, n)])
	}
}

// settle adds the last step's gains to the scores.
func (p *past) settle() {
	for i, position := range p.positions {
		if int(position) < len(p.scores) {
			p.scores[position] += p.gains[i]
		}
	}
	p.positions, p.gains = p.positions[:0], p.gains[:0]
}

// open makes the list ready for a row of length tokens in a step.
func (p *past) open(step uint64, length int) {
	if p.step != step {
		p.settle()
		p.step = step
	}
	n := len(p.scores)
	if length > cap(p.scores) {
		grown := make([]float32, n, (length+room-1)/room*room)
		copy(grown, p.scores)
		p.scores = grown
	}
	if length > n {
		p.scores = p.scores[:length]
		clear(p.scores[n:])
	}
}

// room is by how many tokens scores grow at a time: few, for them to take what they are counted as.
const room = 256

// gain notes what the positions of a list got of each query head's weights, in place of what the step
// gained before. kept are the positions' indices in weights.
func (p *past) gain(positions, kept []int32, weights [][]float32) {
	p.positions = append(p.positions[:0], positions...)
	p.gains = slices.Grow(p.gains[:0], len(kept))[:len(kept)]
	clear(p.gains)
	for _, w := range weights {
		sum := float32(0)
		for _, i := range kept {
			sum += w[i]
		}
		for j, i := range kept {
			p.gains[j] += w[i] / sum
		}
	}
}

// within drops the candidates that the compressor dropped. If none is left it is the last token alone.
func (s *State) within(candidates []int32, list, length int) []int32 {
	kept, n := s.lists[list].kept, 0
	for _, position := range candidates {
		if int(position) < s.prompt {
			for len(kept) > 0 && kept[0] < position {
				kept = kept[1:]
			}
			if len(kept) == 0 || kept[0] != position {
				continue
			}
		}
		candidates[n] = position
		n++
	}
	if n == 0 {
		return append(candidates[:0], int32(length-1))
	}
	return candidates[:n]
}

// shape makes room for a state's lists.
func (p *Pipeline) shape(s *State) {
	if len(s.lists) == 0 {
		s.lists = make([]past, p.lists())
	}
}

// open makes the row's state ready for a step.
func (p *Pipeline) open(row *Row) {
	if row.State == nil || p.Skips(row.Layer) {
		return
	}
	p.shape(row.State)
	row.State.compressed = true // what nobody has compressed by now is kept
	if p.scores {
		for i := range row.State.lists {
			row.State.lists[i].open(row.Step, row.Len)
		}
	}
}

// gainNothing takes back what the row's step gained, as it turns out dense.
func (p *Pipeline) gainNothing(row *Row) {
	if row.State == nil {
		return
	}
	for i := range row.State.lists {
		past := &row.State.lists[i]
		past.positions, past.gains = past.positions[:0], past.gains[:0]
	}
}

// Observation is what an engine saw of a row's prefill. Its slices are read-only.
type Observation struct {
	// Prompt is the position behind the prefill's last token.
	Prompt int
	// Queries are those of the prefill's last Window positions, real, not scaled: [G][Window][KDim]. Nil
	// without.
	Queries []float32
	Window  int
	// Mass is the softmax weight that each position got from all queries of the prefill: [G][n], n at
	// least Prompt. Nil without.
	Mass []float32
}

// CheckObserved reports why a row of a layer cannot run yet, or why the observation that comes with it, nil
// without, does not do: as a *fault.Error whose field is a key of Layer. Of the observation it looks at
// Prompt and Window.
func (p *Pipeline) CheckObserved(row *Row, observed *Observation) error {
	c := p.compressor
	if c == nil || p.Skips(row.Layer) {
		return nil
	}
	prompt := row.Len - 1
	if observed != nil {
		prompt = observed.Prompt
	}
	tokens := prompt - row.First
	switch {
	case c.KeepsAll(tokens):
		return nil
	case observed != nil && observed.Window == 0:
		return fault.Newf(fault.Invalid, "observation.window_queries_inline",
			"are absent, but compressor %s has to see the last %d of a prompt of %d tokens: send them",
			p.config.Compressor.Type, c.Window(), tokens)
	case observed != nil && observed.Window < c.Window():
		return fault.Newf(fault.Invalid, "observation.window",
			"%d queries are fewer than the window_size of compressor %s, %d: send as many",
			observed.Window, p.config.Compressor.Type, c.Window())
	case observed == nil && !row.State.compressed:
		return fault.Newf(fault.Precondition, "observation",
			"is absent, but compressor %s has to see the last %d queries of a prompt of %d tokens: send them "+
				"with the first message of the layer after the prefill",
			p.config.Compressor.Type, c.Window(), tokens)
	}
	return nil
}

// Observe starts the row's State from what the engine saw. Of the row it reads what does not belong to a
// step; CheckObserved has passed.
func (p *Pipeline) Observe(s *Scratch, row *Row, o *Observation) {
	if p.Skips(row.Layer) {
		return
	}
	p.shape(row.State)
	lists, heads := p.lists(), p.geometry.Group()/p.lists()
	row.State.compressed, row.State.prompt = true, 0
	compress := p.compressor != nil && !p.compressor.KeepsAll(o.Prompt-row.First)
	if compress {
		p.window(s, row, o)
		row.State.prompt = o.Prompt
	}
	for list := range lists {
		past := &row.State.lists[list]
		if compress {
			s.compressor.Queries = s.windows.rows[list*heads : (list+1)*heads]
			past.kept = p.compressor.Compress(past.kept[:0], &s.compressor)
		}
		if n := len(o.Mass) / p.geometry.Group(); n > 0 {
			past.start(o.Mass[list*heads*n:(list+1)*heads*n], n, o.Prompt)
		}
	}
}

// window tells the compressor about the row.
func (p *Pipeline) window(s *Scratch, row *Row, o *Observation) {
	g, window := &p.geometry, p.compressor.Window()
	s.windows.shape(g.Group(), window*g.KDim)
	for h, queries := range s.windows.rows {
		vek32.MulNumber_Into(queries, o.Queries[((h+1)*o.Window-window)*g.KDim:][:window*g.KDim], g.Scale)
	}
	s.compressor = compressor.Row{
		Dim: g.KDim, Softcap: g.Softcap, First: row.First, Len: o.Prompt, Keys: row.Keys,
		Scratch: s.compressor.Scratch,
	}
}

// start sets the scores to the sum of the heads' masses, [heads][n].
func (p *past) start(mass []float32, n, prompt int) {
	p.positions, p.gains = p.positions[:0], p.gains[:0]
	p.scores = slices.Grow(p.scores[:0], prompt)[:prompt]
	clear(p.scores)
	for head := range slices.Chunk(mass, n) {
		vek32.Add_Inplace(p.scores, head[:prompt])
	}
}
