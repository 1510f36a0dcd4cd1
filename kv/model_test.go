package kv

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"math/bits"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/internal/fault"
)

// TestTrackerModel drives a Tracker beside a slow, obvious model of it and of its engine. The engine
// puts a new version into every token slot it writes, so that an index entry that outlived its token
// shows.
func TestTrackerModel(t *testing.T) {
	t.Parallel()
	for _, pageSize := range []int{16, 32, 64, 1, 7, 24} {
		for _, nullPage := range []int32{-1, 0, 1} {
			t.Run(fmt.Sprintf("pages of %d, null page %d", pageSize, nullPage), func(t *testing.T) {
				t.Parallel()
				rapid.Check(t, func(t *rapid.T) { runModel(t, pageSize, nullPage) })
			})
		}
	}
}

func runModel(t *rapid.T, pageSize int, nullPage int32) {
	m := newModel(t, pageSize, nullPage)
	actions := map[string]func(*rapid.T){
		"":           m.invariants,
		"step":       m.stepByLength,
		"step again": m.stepByLength,
		"refused":    m.stepRefused,
		"index":      m.index,
		"index more": m.index,
		"invalidate": m.invalidate,
	}
	if m.paged {
		actions["named slots"] = m.stepBySlots
		actions["anonymous slots"] = m.stepAnonymous
	}
	t.Repeat(actions)
}

const (
	modelLayers = 3
	modelTokens = 150 // of a sequence
	modelBatch  = 4
)

// modelChunk is a shadow chunk, in all layers.
type modelChunk struct {
	id     int32 // -1 until seen
	layers [modelLayers]struct{ have, covered uint16 }
	// version is that of the content that is indexed.
	version [modelLayers][ChunkTokens]int
}

type modelToken struct {
	chunk *modelChunk
	bit   int
}

// modelSequence is a sequence as the engine sees it. A void row is one of no length.
type modelSequence struct {
	id            uint64
	first, length int
	table, vtable []int32       // vtable is nil where it is table
	content       []int         // sequence mode: versions by position
	chunks        []*modelChunk // sequence mode
}

type model struct {
	cfg     TrackerConfig
	tracker *Tracker
	paged   bool

	version int
	content []int         // page mode: versions by slot
	chunks  []*modelChunk // page mode
	live    map[uint64]*modelSequence
	batch   []*modelSequence
	claimed [modelLayers]uint64
}

func newModel(t *rapid.T, pageSize int, nullPage int32) *model {
	m := &model{
		cfg: TrackerConfig{
			PageSize: pageSize, NumPages: 12*16/pageSize + 6, NullPage: nullPage,
			Layers: modelLayers, MaxBatch: modelBatch, MaxSequenceTokens: modelTokens,
			MaxTokens: rapid.SampledFrom([]int{0, 60, 200}).Draw(t, "max tokens"),
		},
		paged: pageSize%ChunkTokens == 0,
		live:  map[uint64]*modelSequence{},
	}
	var err error
	if m.tracker, err = NewTracker(m.cfg); err != nil {
		t.Fatal(err)
	}
	if m.paged {
		m.content = make([]int, m.cfg.NumPages*pageSize)
		for id := range m.tracker.NumChunks() {
			m.chunks = append(m.chunks, &modelChunk{id: int32(id)})
		}
	}
	return m
}

func (m *model) slot(table []int32, pos int) int {
	return int(table[pos/m.cfg.PageSize])*m.cfg.PageSize + pos%m.cfg.PageSize
}

func (m *model) chunk(q *modelSequence, c int) *modelChunk {
	if m.paged {
		return m.chunks[m.slot(q.table, c*ChunkTokens)/ChunkTokens]
	}
	return q.chunks[c]
}

func (m *model) written(q *modelSequence, pos int) int {
	if m.paged {
		return m.content[m.slot(q.table, pos)]
	}
	return q.content[pos]
}

// holds says whether page can hold tokens.
func (m *model) holds(page int32) bool {
	return page >= 0 && int(page) < m.cfg.NumPages && page != m.cfg.NullPage
}

func (m *model) drawPage(t *rapid.T) int32 {
	page := rapid.Int32Range(0, int32(m.cfg.NumPages)-1).Draw(t, "page")
	if page == m.cfg.NullPage {
		page++
	}
	return page
}

// modelRow is a row of a step as the engine means it.
type modelRow struct {
	old, q   *modelSequence // before, nil if the step starts it, and after
	start    int            // of the table entries sent, count in number
	count    int
	truncate int
	claim    int
	of       uint64
}

// kept is the number of tokens left of the last step.
func (r *modelRow) kept() int {
	switch {
	case r.truncate >= 0:
		return r.truncate
	case r.old != nil:
		return r.old.length
	}
	return 0
}

// placed says whether a position lies on a page that the step puts there.
func (m *model) placed(r *modelRow, pos int) bool {
	i := pos / m.cfg.PageSize
	return i < len(r.q.table) && (r.old == nil || i >= len(r.old.table) || r.old.table[i] != r.q.table[i])
}

func drawGrowth(t *rapid.T, from int) int {
	return rapid.OneOf(
		rapid.IntRange(from, min(from+3, modelTokens)), rapid.IntRange(from, modelTokens),
	).Draw(t, "length")
}

// drawRow draws what becomes of a sequence by length.
func (m *model) drawRow(t *rapid.T, id uint64, old *modelSequence) modelRow {
	r := modelRow{old: old, q: &modelSequence{id: id}, truncate: -1}
	if rapid.IntRange(0, 9).Draw(t, "void") == 0 {
		return r
	}
	keep := 0
	if old != nil {
		copied := *old
		r.q, keep = &copied, old.length
		if rapid.IntRange(0, 4).Draw(t, "truncates") == 0 {
			r.truncate = rapid.IntRange(0, old.length).Draw(t, "truncate")
			keep = r.truncate
		}
	} else if rapid.Bool().Draw(t, "padded") {
		r.q.first = rapid.IntRange(0, 40).Draw(t, "first")
	}
	r.q.length = drawGrowth(t, max(keep, r.q.first+1))
	m.drawTable(t, &r)
	if rapid.Bool().Draw(t, "claims") {
		r.claim = rapid.OneOf(rapid.Just(r.q.length), rapid.IntRange(0, r.q.length)).Draw(t, "claim")
	}
	return r
}

// drawTable draws a change of the row's table that leaves it with all pages that its tokens need.
func (m *model) drawTable(t *rapid.T, r *modelRow) {
	q, had := r.q, len(r.q.table)
	padding, need := q.first/m.cfg.PageSize, ceilDiv(q.length, m.cfg.PageSize)
	start := had
	if rapid.IntRange(0, 3).Draw(t, "replaces") == 0 {
		start = rapid.IntRange(0, had).Draw(t, "start")
	}
	for i := padding; i < min(start, need); i++ {
		if !m.holds(q.table[i]) || q.vtable != nil && !m.holds(q.vtable[i]) {
			start = i
		}
	}
	end := max(start, need)
	if end < ceilDiv(modelTokens, m.cfg.PageSize) && rapid.Bool().Draw(t, "spare page") {
		end++
	}
	r.start, r.count = start, end-start
	if r.count == 0 {
		return
	}
	table := slices.Clone(q.table[:start])
	for i := start; i < end; i++ {
		needed := i >= padding && i < need
		switch {
		case i < had && (m.holds(q.table[i]) || !needed) && rapid.Bool().Draw(t, "same page"):
			table = append(table, q.table[i])
		case !needed && rapid.Bool().Draw(t, "no page"):
			table = append(table, rapid.SampledFrom([]int32{-1, m.cfg.NullPage, math.MaxInt32}).Draw(t, "padding"))
		default:
			table = append(table, m.drawPage(t))
		}
	}
	q.table = table
}

// drawSource draws whose prefix a row of sequence mode claims. The claim has to be true: it ends where
// the row keeps tokens that are not the source's, or the row replaces its whole table.
func (m *model) drawSource(t *rapid.T, r *modelRow) {
	if len(m.live) == 0 || r.claim == 0 || rapid.Bool().Draw(t, "own") {
		return
	}
	r.of = rapid.SampledFrom(slices.Sorted(maps.Keys(m.live))).Draw(t, "of")
	source := m.live[r.of]
	if source == r.old {
		return
	}
	if r.old != nil && rapid.Bool().Draw(t, "keeps pages") {
		same := 0
		for same < min(r.kept(), source.length) && r.old.content[same] == source.content[same] {
			same++
		}
		if same < min(r.kept(), source.length) {
			r.claim = min(r.claim, same)
		}
		return
	}
	r.start, r.count, r.q.table = 0, len(r.q.table), slices.Clone(r.q.table)
	for i := range r.q.table {
		for !m.holds(r.q.table[i]) || r.old != nil && i < len(r.old.table) && r.old.table[i] == r.q.table[i] {
			r.q.table[i] = m.drawPage(t)
		}
	}
}

// pack declares rows. Columns that say nothing are left out.
func (m *model) pack(t *rapid.T, rows []modelRow) *Step {
	s := &Step{}
	withV := rapid.IntRange(0, 3).Draw(t, "v") == 0
	for _, r := range rows {
		q := r.q
		s.Sequences = append(s.Sequences, q.id)
		s.Lengths = append(s.Lengths, int32(q.length))
		s.FirstValid = append(s.FirstValid, int32(q.first))
		s.TableStarts = append(s.TableStarts, uint32(r.start))
		s.TableCounts = append(s.TableCounts, uint32(r.count))
		s.UnchangedPrefix = append(s.UnchangedPrefix, int32(r.claim))
		s.PrefixOf = append(s.PrefixOf, r.of)
		s.TruncateTo = append(s.TruncateTo, int32(r.truncate))

		entries := q.table[r.start:][:r.count]
		s.TableEntries = append(s.TableEntries, entries...)
		v := entries
		if withV {
			v = slices.Clone(entries)
			for i := range v {
				if m.holds(v[i]) {
					v[i] = m.drawPage(t)
				}
			}
			s.VTableEntries = append(s.VTableEntries, v...)
		}
		if r.count > 0 && (withV || q.vtable != nil) {
			had := q.vtable
			if had == nil {
				had = q.table
			}
			q.vtable = append(slices.Clone(had[:r.start]), v...)
		}
	}
	s.FirstValid, s.PrefixOf = leaveOut(s.FirstValid, 0), leaveOut(s.PrefixOf, 0)
	s.UnchangedPrefix, s.TruncateTo = leaveOut(s.UnchangedPrefix, 0), leaveOut(s.TruncateTo, -1)
	s.TableStarts, s.TableCounts = leaveOut(s.TableStarts, 0), leaveOut(s.TableCounts, 0)
	return s
}

func leaveOut[T comparable](column []T, absent T) []T {
	if slices.ContainsFunc(column, func(v T) bool { return v != absent }) {
		return column
	}
	return nil
}

// drawStep draws a batch by length.
func (m *model) drawStep(t *rapid.T) ([]modelRow, *Step) {
	var ended []uint64
	for _, id := range slices.Sorted(maps.Keys(m.live)) {
		if rapid.IntRange(0, 7).Draw(t, "ends") == 0 {
			ended = append(ended, id)
		}
	}
	var rows []modelRow
	for _, id := range rapid.SliceOfNDistinct(rapid.Uint64Range(1, 5), 0, modelBatch, rapid.ID).Draw(t, "sequences") {
		old := m.live[id]
		if slices.Contains(ended, id) {
			old = nil
		}
		r := m.drawRow(t, id, old)
		if !m.paged && r.q.length > 0 {
			m.drawSource(t, &r)
		}
		rows = append(rows, r)
	}
	s := m.pack(t, rows)
	s.Ended = ended
	return rows, s
}

func (m *model) stepByLength(t *rapid.T) {
	rows, s := m.drawStep(t)
	e := m.effects(rows, s.Ended)
	err := m.tracker.Step(s)
	if !m.paged && e.chunks > m.tracker.NumChunks() {
		if !errors.Is(err, fault.Exhausted) {
			t.Fatalf("%d chunks of %d: got %v", e.chunks, m.tracker.NumChunks(), err)
		}
		return
	}
	if err != nil {
		t.Fatalf("step %+v: %v", s, err)
	}
	for _, id := range s.Ended {
		delete(m.live, id)
	}
	m.commit(t, rows, e, true)
}

// modelEffects is what a step does to tokens.
type modelEffects struct {
	lost, kept []modelToken
	written    []int // slots, in page mode
	contents   [][]int
	lists      [][]*modelChunk // by row, in sequence mode
	chunks     int             // in use afterwards, in sequence mode
}

// effects says what a step by length means, token by token. It changes nothing.
func (m *model) effects(rows []modelRow, ended []uint64) *modelEffects {
	e := &modelEffects{contents: make([][]int, len(rows)), lists: make([][]*modelChunk, len(rows))}
	holders := map[*modelChunk]int{}
	hold := func(chunks []*modelChunk, n int) {
		for _, c := range chunks {
			if holders[c] += n; holders[c] == 0 || c == nil {
				delete(holders, c)
			}
		}
	}
	for id, q := range m.live {
		if !slices.Contains(ended, id) {
			hold(q.chunks, 1)
		}
	}
	// Claims come before all changes.
	shared := make([][]*modelChunk, len(rows))
	for i, r := range rows {
		source := m.live[r.of]
		if m.paged || r.of == 0 || source == r.old || r.q.length == 0 {
			continue
		}
		shared[i] = make([]*modelChunk, ceilDiv(r.q.length, ChunkTokens))
		unchanged := 0
		for unchanged < r.kept() && !m.placed(&r, unchanged) {
			unchanged++
		}
		for c := range shared[i] {
			from, to := c*ChunkTokens, (c+1)*ChunkTokens
			if to > unchanged && from >= max(source.first, r.q.first) && to <= min(source.length, r.claim) {
				shared[i][c] = source.chunks[c]
			}
		}
		hold(shared[i], 1)
	}
	for i, r := range rows {
		q := r.q
		if q.length == 0 {
			continue
		}
		var old modelSequence
		if r.old != nil {
			old = *r.old
		}
		keep, claim := r.kept(), r.claim
		if keep < old.length {
			claim = min(claim, keep)
		}
		placed := func(pos int) bool { return m.placed(&r, pos) }
		if m.paged {
			for pos := range len(q.table) * m.cfg.PageSize {
				if !m.holds(q.table[pos/m.cfg.PageSize]) ||
					!placed(pos) && (pos < keep || pos >= max(q.length, old.length)) {
					continue
				}
				slot := m.slot(q.table, pos)
				token := modelToken{m.chunks[slot/ChunkTokens], slot % ChunkTokens}
				if pos < claim {
					e.kept = append(e.kept, token)
					continue
				}
				e.lost = append(e.lost, token)
				if pos < q.length {
					e.written = append(e.written, slot)
				}
			}
			continue
		}

		own := claim
		if shared[i] != nil {
			own = 0
		}
		for pos := range q.length {
			var version int
			switch {
			case shared[i] != nil && pos < min(r.claim, m.live[r.of].length):
				version = m.live[r.of].content[pos]
			case pos < keep && (!placed(pos) || pos < own):
				version = old.content[pos]
			default:
				m.version++
				version = m.version
			}
			e.contents[i] = append(e.contents[i], version)
		}
		for c := range ceilDiv(q.length, ChunkTokens) {
			chunk := &modelChunk{id: -1}
			switch {
			case c < q.first/ChunkTokens:
				chunk = nil
			case shared[i] != nil && shared[i][c] != nil:
				chunk = shared[i][c]
				holders[chunk]--
				for bit := range ChunkTokens {
					e.kept = append(e.kept, modelToken{chunk, bit})
				}
			case c*ChunkTokens < keep:
				var lost, kept []modelToken
				for bit := range ChunkTokens {
					token := modelToken{old.chunks[c], bit}
					switch pos := c*ChunkTokens + bit; {
					case pos < keep && !placed(pos):
					case pos < own:
						kept = append(kept, token)
					default:
						lost = append(lost, token)
					}
				}
				// What others hold as well stays theirs when it changes.
				if pure := len(lost) == 0 || c*ChunkTokens+ChunkTokens > old.length; pure || holders[old.chunks[c]] == 1 {
					chunk = old.chunks[c]
					e.lost, e.kept = append(e.lost, lost...), append(e.kept, kept...)
				}
			}
			e.lists[i] = append(e.lists[i], chunk)
		}
		hold(old.chunks, -1)
		hold(e.lists[i], 1)
	}
	e.chunks = len(holders)
	return e
}

// commit makes rows the batch.
func (m *model) commit(t *rapid.T, rows []modelRow, e *modelEffects, named bool) {
	m.batch, m.claimed = nil, [modelLayers]uint64{}
	for i, r := range rows {
		m.batch = append(m.batch, r.q)
		if r.q.length == 0 {
			continue
		}
		r.q.content, r.q.chunks = e.contents[i], e.lists[i]
		if named {
			m.live[r.q.id] = r.q
		}
	}
	for _, x := range e.lost {
		for l := range x.chunk.layers {
			x.chunk.layers[l].have &^= 1 << x.bit
		}
	}
	for _, slot := range e.written {
		m.version++
		m.content[slot] = m.version
	}
	for _, x := range e.kept {
		for l := range x.chunk.layers {
			m.claimed[l] += uint64(x.chunk.layers[l].have >> x.bit & 1)
		}
	}
	m.checkRows(t)
}

func (m *model) checkRows(t *rapid.T) {
	rows := m.tracker.Rows()
	if len(rows) != len(m.batch) {
		t.Fatalf("%d rows, want %d", len(rows), len(m.batch))
	}
	ids := map[int32]*modelChunk{}
	for r, q := range m.batch {
		want := SeqRow{Sequence: q.id}
		if q.length > 0 {
			want = SeqRow{Sequence: q.id, First: q.first, Len: q.length, Table: q.table, VTable: q.vtable}
			if q.vtable == nil {
				want.VTable = q.table
			}
			for c := range ceilDiv(q.length, ChunkTokens) {
				id := int32(-1)
				if c >= q.first/ChunkTokens {
					chunk := m.chunk(q, c)
					if chunk.id < 0 {
						chunk.id = rows[r].Chunks[c]
					}
					id = chunk.id
					if ids[id] == nil {
						ids[id] = chunk
					} else if ids[id] != chunk {
						t.Fatalf("chunk id %d is used twice", id)
					}
				}
				want.Chunks = append(want.Chunks, id)
			}
		}
		if diff := cmp.Diff(want, rows[r]); diff != "" {
			t.Fatalf("row %d (-want +got):\n%s", r, diff)
		}
	}
}

// stepBySlots steps named sequences with exact slots.
func (m *model) stepBySlots(t *rapid.T) {
	var rows []modelRow
	for _, id := range rapid.SliceOfNDistinct(rapid.Uint64Range(1, 5), 0, modelBatch, rapid.ID).Draw(t, "sequences") {
		r := modelRow{old: m.live[id], q: &modelSequence{id: id}, truncate: -1}
		if rapid.IntRange(0, 9).Draw(t, "void") != 0 {
			from := 1
			if r.old != nil {
				copied := *r.old
				r.q = &copied
				from = r.q.length
				if rapid.IntRange(0, 4).Draw(t, "shorter") == 0 {
					from = r.q.first + 1
				}
			}
			r.q.length = drawGrowth(t, from)
			m.drawTable(t, &r)
		}
		rows = append(rows, r)
	}
	m.bySlots(t, rows, true)
}

// stepAnonymous steps rows without names: mostly those of the last such step, in any order.
func (m *model) stepAnonymous(t *rapid.T) {
	var rows []modelRow
	for _, before := range append(slices.Clone(m.batch), &modelSequence{}) {
		if len(rows) == modelBatch || rapid.IntRange(0, 9).Draw(t, "leaves") == 0 {
			continue
		}
		copied := *before
		r := modelRow{q: &copied, truncate: -1}
		r.q.id, r.q.vtable = 0, nil
		r.q.length = drawGrowth(t, max(1, r.q.length))
		m.drawTable(t, &r)
		r.start, r.count = 0, len(r.q.table)
		rows = append(rows, r)
	}
	m.bySlots(t, rapid.Permutation(rows).Draw(t, "rows"), false)
}

func (m *model) bySlots(t *rapid.T, rows []modelRow, named bool) {
	s := m.pack(t, rows)
	s.BySlots = true
	if !named {
		s.Sequences = nil
	}
	e := &modelEffects{contents: make([][]int, len(rows)), lists: make([][]*modelChunk, len(rows))}
	for _, slot := range rapid.SliceOfN(rapid.IntRange(-1, len(m.content)-1), 0, 8).Draw(t, "slots") {
		s.Slots = append(s.Slots, int64(slot))
		if slot < 0 {
			continue
		}
		e.written = append(e.written, slot)
		last := slot
		if slot%m.cfg.PageSize == 0 {
			last = slot + m.cfg.PageSize - 1
		}
		for ; slot <= last; slot++ {
			e.lost = append(e.lost, modelToken{m.chunks[slot/ChunkTokens], slot % ChunkTokens})
		}
	}
	if err := m.tracker.Step(s); err != nil {
		t.Fatalf("step %+v: %v", s, err)
	}
	m.commit(t, rows, e, named)
}

// stepRefused spoils a good step and looks that nothing came of it.
func (m *model) stepRefused(t *rapid.T) {
	rows, s := m.drawStep(t)
	var good []int
	for b, r := range rows {
		if r.q.length > 0 {
			good = append(good, b)
		}
	}
	if len(good) == 0 {
		return
	}
	b := rapid.SampledFrom(good).Draw(t, "spoilt")
	s.FirstValid = slices.Grow(s.FirstValid, len(rows))[:len(rows)]
	if s.TruncateTo == nil {
		s.TruncateTo = slices.Repeat([]int32{-1}, len(rows))
	}
	if s.UnchangedPrefix == nil {
		s.UnchangedPrefix = make([]int32, len(rows))
	}
	spoil := map[string]func(){
		"lengths negative":    func() { s.Lengths[b] = -1 },
		"lengths too long":    func() { s.Lengths[b] = modelTokens + 1 },
		"first_valid":         func() { s.FirstValid[b] = s.Lengths[b] },
		"truncate_to":         func() { s.TruncateTo[b] = modelTokens + 1 },
		"unchanged_prefix":    func() { s.UnchangedPrefix[b] = s.Lengths[b] + 1 },
		"sequences":           func() { s.Sequences = append(s.Sequences, 9) },
		"ended":               func() { s.Ended = append(s.Ended, 99) },
		"table.entries":       func() { s.TableEntries = append(s.TableEntries, 1) },
		"table.v_entries":     func() { s.VTableEntries = make([]int32, len(s.TableEntries)+1) },
		"table.counts":        func() { s.TableCounts = append(s.TableCounts, 1) },
		"slots without rule":  func() { s.Slots = []int64{0} },
		"first_valid changed": func() { s.FirstValid[b]--; s.Lengths[b] = max(s.Lengths[b], 1) },
	}
	if rows[b].old == nil && rows[b].q.first > 0 {
		delete(spoil, "first_valid changed")
	}
	spoil[rapid.SampledFrom(slices.Sorted(maps.Keys(spoil))).Draw(t, "how")]()

	before := slices.Clone(m.tracker.Rows())
	for i, r := range before {
		before[i].Table, before[i].VTable, before[i].Chunks = slices.Clone(r.Table), slices.Clone(r.VTable), slices.Clone(r.Chunks)
	}
	err := m.tracker.Step(s)
	var f *fault.Error
	if !errors.As(err, &f) || f.Field == "" {
		t.Fatalf("spoilt step %+v: %v", s, err)
	}
	if diff := cmp.Diff(before, m.tracker.Rows()); diff != "" {
		t.Fatalf("rows changed (-before +after):\n%s", diff)
	}
}

// index does what a device does in one layer, and compares it with what has to be done.
func (m *model) index(t *rapid.T) {
	layer := rapid.IntRange(0, modelLayers-1).Draw(t, "layer")
	want := map[*modelChunk]ChunkWork{}
	for _, q := range m.batch {
		for c := q.first / ChunkTokens; c*ChunkTokens < q.length; c++ {
			var valid uint16
			for bit := range ChunkTokens {
				if pos := c*ChunkTokens + bit; q.first <= pos && pos < q.length {
					valid |= 1 << bit
				}
			}
			chunk := m.chunk(q, c)
			state := &chunk.layers[layer]
			if fresh := valid &^ state.have; fresh != 0 || state.covered != state.have {
				state.have |= valid
				state.covered = state.have
				want[chunk] = ChunkWork{ID: chunk.id, Valid: state.have, Fresh: want[chunk].Fresh | fresh}
			}
		}
	}
	for _, w := range m.tracker.Pending(nil, layer) {
		q := m.batch[w.Row]
		chunk := m.chunk(q, w.Chunk)
		for bit := range ChunkTokens {
			if w.Fresh>>bit&1 == 0 {
				continue
			}
			if m.paged {
				chunk.version[layer][bit] = m.content[int(w.ID)*ChunkTokens+bit]
			} else {
				chunk.version[layer][bit] = q.content[w.Chunk*ChunkTokens+bit]
			}
		}
		w.Row, w.Chunk = 0, 0
		if diff := cmp.Diff(want[chunk], w); diff != "" {
			t.Fatalf("layer %d, chunk %d (-want +got):\n%s", layer, w.ID, diff)
		}
		delete(want, chunk)
	}
	if len(want) > 0 {
		t.Fatalf("layer %d: not indexed: %v", layer, slices.Collect(maps.Values(want)))
	}

	for r, q := range m.batch {
		for pos := q.first; pos < q.length; pos++ {
			chunk, bit := m.chunk(q, pos/ChunkTokens), pos%ChunkTokens
			if chunk.version[layer][bit] != m.written(q, pos) {
				t.Fatalf("layer %d, row %d, token %d: version %d is indexed, %d written",
					layer, r, pos, chunk.version[layer][bit], m.written(q, pos))
			}
			if !m.paged && bits.OnesCount16(chunk.layers[layer].covered) != min(pos/16*16+16, q.length)-max(pos/16*16, q.first) {
				t.Fatalf("layer %d, row %d, token %d: %016b is covered", layer, r, pos, chunk.layers[layer].covered)
			}
		}
	}
	if got := m.tracker.Claimed(layer); got != m.claimed[layer] {
		t.Fatalf("layer %d: %d tokens claimed, want %d", layer, got, m.claimed[layer])
	}
	m.claimed[layer] = 0
}

func (m *model) invalidate(t *rapid.T) {
	layer := rapid.IntRange(0, modelLayers-1).Draw(t, "layer")
	m.tracker.Invalidate(layer)
	m.claimed[layer] = 0
	reset := func(c *modelChunk) {
		if c != nil {
			c.layers[layer].have, c.layers[layer].covered = 0, 0
		}
	}
	for _, c := range m.chunks {
		reset(c)
	}
	for _, q := range m.live {
		for _, c := range q.chunks {
			reset(c)
		}
	}
}

// invariants checks what the tracker counts by counting anew.
func (m *model) invariants(t *rapid.T) {
	held := make([]int32, m.tracker.NumChunks())
	count := func(q *sequence) {
		chunks := q.chunks[q.first/ChunkTokens:]
		if m.paged {
			chunks = chunks[:max(0, q.reach-q.first/ChunkTokens)]
		}
		for _, id := range chunks {
			held[id]++
		}
	}
	for _, q := range m.tracker.live {
		count(q)
	}
	for _, q := range m.tracker.anon.rows {
		if q != nil {
			count(q)
		}
	}
	if m.paged {
		if !slices.Equal(held, m.tracker.relied) {
			t.Fatalf("relied is %v, want %v", m.tracker.relied, held)
		}
		return
	}
	if !slices.Equal(held, m.tracker.pool.refs) {
		t.Fatalf("refs are %v, want %v", m.tracker.pool.refs, held)
	}
	var free []int32
	for id, n := range held {
		if n == 0 {
			free = append(free, int32(id))
		}
	}
	if got := slices.Sorted(slices.Values(m.tracker.pool.free)); !slices.Equal(free, got) {
		t.Fatalf("%v are free, want %v", got, free)
	}
}
