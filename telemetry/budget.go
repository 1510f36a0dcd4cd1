package telemetry

import (
	"slices"

	"go.opentelemetry.io/otel/trace"

	"github.com/twilight-sidecar/twilight/gpu"
)

const (
	// window is about how many steps the budget page's means reach back.
	window = 16
	// maxTracks bounds the sequences that are followed in each lease: those last seen.
	maxTracks = 64
	// trackSteps bounds the steps that are kept of each.
	trackSteps = 256
)

// mean is a running mean of about the last window values.
type mean struct {
	value float64
	n     int
}

// add takes a value, unless it is NaN: not known.
func (m *mean) add(x float64) {
	if x != x {
		return
	}
	m.n = min(m.n+1, window)
	m.value += (x - m.value) / float64(m.n)
}

// budget is what a lease's heads and sequences kept lately. Its lease guards it.
type budget struct {
	layers []*layerBudget
	tracks map[uint64]*track
	totals totals
	steps  uint64
	trace  trace.TraceID // of the last sampled step
}

func newBudget() budget { return budget{tracks: make(map[uint64]*track)} }

// layerBudget is a layer's means by head.
type layerBudget struct {
	layer                              int
	kept, candidates                   []mean // by list head
	mass, coverage, trueMass, outError []mean // by query head
}

// layer finds or makes the budget of a layer.
func (b *budget) layer(index, listHeads, queryHeads int) *layerBudget {
	for _, l := range b.layers {
		if l.layer == index {
			return l
		}
	}
	l := &layerBudget{
		layer: index,
		kept:  make([]mean, listHeads), candidates: make([]mean, listHeads),
		mass: make([]mean, queryHeads), coverage: make([]mean, queryHeads),
		trueMass: make([]mean, queryHeads), outError: make([]mean, queryHeads),
	}
	at, _ := slices.BinarySearchFunc(b.layers, index, func(l *layerBudget, i int) int { return l.layer - i })
	b.layers = slices.Insert(b.layers, at, l)
	return l
}

// add takes a result: for each head the mean of the sequences that are not void.
func (l *layerBudget) add(r *gpu.LayerResult, valid []int32) {
	addColumn(l.kept, r.Kept, valid)
	addColumn(l.candidates, r.Candidates, valid)
	addColumn(l.mass, r.Mass, valid)
	addColumn(l.coverage, r.Coverage, valid)
	for i := range min(len(r.Audited), len(r.TrueMass), len(r.OutputError)) {
		head := int(r.Audited[i]) % len(l.mass)
		l.trueMass[head].add(float64(r.TrueMass[i]))
		l.outError[head].add(float64(r.OutputError[i]))
	}
}

func addColumn[T uint32 | float32](means []mean, column []T, valid []int32) {
	if len(column) < len(means)*len(valid) {
		return // unknown
	}
	for h := range means {
		sum, n := 0.0, 0
		for b := range valid {
			x := float64(column[b*len(means)+h])
			if valid[b] > 0 && x == x {
				sum += x
				n++
			}
		}
		if n > 0 {
			means[h].add(sum / float64(n))
		}
	}
}

// track is what a sequence kept in its last steps.
type track struct {
	id     uint64
	seen   uint64 // the lease's steps when it was last in one
	points [trackSteps]point
	count  uint64 // points ever made; the last is at (count-1) % trackSteps

	rows, kept, candidates uint64 // of the current step
}

// point is a step of a sequence: means over its layers and heads.
type point struct {
	step             uint64
	tokens           int32
	kept, candidates float32
}

func (t *track) add(rows, kept, candidates uint64) {
	t.rows += rows
	t.kept += kept
	t.candidates += candidates
}

// follow appends the tracks of a step's sequences to dst, the longest unseen giving way to new ones.
func (b *budget) follow(dst []*track, s *Step) []*track {
	b.steps++
	for _, id := range s.Sequences {
		t := b.tracks[id]
		if t == nil && id != 0 {
			t = b.newTrack(id)
		}
		if t != nil {
			t.seen = b.steps
		}
		dst = append(dst, t)
	}
	return dst
}

// newTrack makes a track, in place of the one longest unseen if there are many. It is nil if all of those
// are in use.
func (b *budget) newTrack(id uint64) *track {
	if len(b.tracks) >= maxTracks {
		var oldest *track
		for _, t := range b.tracks {
			if t.seen < b.steps && (oldest == nil || t.seen < oldest.seen) {
				oldest = t
			}
		}
		if oldest == nil {
			return nil
		}
		delete(b.tracks, oldest.id)
	}
	t := &track{id: id}
	b.tracks[id] = t
	return t
}

// stepped takes a step that is over.
func (b *budget) stepped(s *step) {
	b.totals.kept += s.totals.kept
	b.totals.valid += s.totals.valid
	b.totals.cache += s.totals.cache
	b.totals.shadow += s.totals.shadow
	b.totals.dense += s.totals.dense
	for i, t := range s.tracks {
		if t == nil || t.rows == 0 {
			continue
		}
		t.points[t.count%trackSteps] = point{
			step: s.id, tokens: s.valid[i],
			kept: float32(t.kept) / float32(t.rows), candidates: float32(t.candidates) / float32(t.rows),
		}
		t.count++
		t.rows, t.kept, t.candidates = 0, 0, 0
	}
}
