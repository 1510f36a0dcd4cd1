package client

import (
	"fmt"
	"math"
	"slices"

	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

// tables remembers the page tables that the daemon has, so that a step sends only what changed. build
// packs a step; commit books it once the daemon has accepted it.
type tables struct {
	pageSize int
	known    map[uint64][]entry
	// lost are the sequences that an earlier lease knew and this one does not. What a batch says of their
	// past is left out: this lease has indexed none of it.
	lost map[uint64]struct{}

	last    columns // of the step last built, reused by the next
	message twilightv1.Step
	update  twilightv1.TableUpdate
	claims  twilightv1.Claims
	slots   twilightv1.WrittenSlots
}

// columns are a batch, packed as proto Step has it.
type columns struct {
	sequences                   []uint64
	lengths, firstValid         []int32
	starts, counts              []uint32
	entries                     []entry
	k, v                        []int32 // of entries
	unchangedPrefix, truncateTo []int32
	prefixOf                    []uint64
	ended                       []uint64
	endedLost                   []uint64 // of the batch's, those that are not sent
}

// entry is the page, or slot, of K and of V.
type entry struct{ k, v int32 }

func newTables(pageSize int) *tables {
	return &tables{pageSize: max(pageSize, 1), known: make(map[uint64][]entry), lost: make(map[uint64]struct{})}
}

// forget makes every known sequence a lost one: the lease is another.
func (t *tables) forget() {
	for id := range t.known {
		t.lost[id] = struct{}{}
	}
	clear(t.known)
}

// build packs a batch. The message is t's own, valid until the next build.
func (t *tables) build(b *Batch) (*twilightv1.Step, error) {
	c := &t.last
	c.reset()
	for _, id := range b.Ended {
		if _, lost := t.lost[id]; lost {
			c.endedLost = append(c.endedLost, id)
		} else {
			c.ended = append(c.ended, id)
		}
	}
	anonymous := b.Slots != nil && len(b.Sequences) > 0 && b.Sequences[0].ID == 0
	for i := range b.Sequences {
		s := &b.Sequences[i]
		if err := s.check(i, anonymous); err != nil {
			return nil, err
		}
		if !anonymous {
			c.sequences = append(c.sequences, s.ID)
		}
		c.lengths = append(c.lengths, int32(s.Len))
		c.firstValid = append(c.firstValid, int32(s.First))
		t.addClaims(s)
		t.addTable(s, slices.Contains(b.Ended, s.ID))
	}

	m := &t.message
	m.Sequences, m.Lengths, m.FirstValid, m.Ended = c.sequences, c.lengths, unless(c.firstValid, 0), c.ended
	m.IndexOnly = b.IndexOnly
	m.Traceparent, m.Tracestate = b.Trace.Parent, b.Trace.State
	t.update.Starts, t.update.Counts, t.update.Entries, t.update.VEntries = c.starts, c.counts, c.k, c.v
	if slices.Equal(c.k, c.v) {
		t.update.VEntries = nil
	}
	t.claims.UnchangedPrefix = unless(c.unchangedPrefix, 0)
	t.claims.PrefixOf = unless(c.prefixOf, 0)
	t.claims.TruncateTo = unless(c.truncateTo, -1)
	m.Table, m.Claims, m.Slots = &t.update, &t.claims, nil
	if b.Slots != nil {
		t.slots.Slots = b.Slots
		m.Slots = &t.slots
	}
	return m, nil
}

func (c *columns) reset() {
	*c = columns{
		sequences: c.sequences[:0], lengths: c.lengths[:0], firstValid: c.firstValid[:0],
		starts: c.starts[:0], counts: c.counts[:0], entries: c.entries[:0], k: c.k[:0], v: c.v[:0],
		unchangedPrefix: c.unchangedPrefix[:0], truncateTo: c.truncateTo[:0], prefixOf: c.prefixOf[:0],
		ended: c.ended[:0], endedLost: c.endedLost[:0],
	}
}

// unless leaves out a column that says nothing: all its values are usual.
func unless[T comparable](column []T, usual T) []T {
	if slices.ContainsFunc(column, func(x T) bool { return x != usual }) {
		return column
	}
	return nil
}

// addClaims appends what a sequence says of its past.
func (t *tables) addClaims(s *Sequence) {
	unchanged, prefixOf, truncateTo := int32(s.UnchangedPrefix), s.PrefixOf, int32(-1)
	if s.TruncateTo != 0 {
		truncateTo = int32(s.TruncateTo)
	}
	if _, lost := t.lost[s.ID]; lost {
		unchanged, prefixOf, truncateTo = 0, 0, -1
	} else if _, lost := t.lost[prefixOf]; lost {
		unchanged, prefixOf = 0, 0
	}
	c := &t.last
	c.unchangedPrefix = append(c.unchangedPrefix, unchanged)
	c.prefixOf = append(c.prefixOf, prefixOf)
	c.truncateTo = append(c.truncateTo, truncateTo)
}

// addTable appends what changed in a sequence's table.
func (t *tables) addTable(s *Sequence, afresh bool) {
	has := t.known[s.ID] // none for anonymous rows, whose id is 0
	if afresh {
		has = nil
	}
	pages := min(len(s.Table), (max(s.Len, 0)+t.pageSize-1)/t.pageSize)
	start := 0
	for start < pages && start < len(has) && s.entry(start) == has[start] {
		start++
	}
	if start == pages && 0 < pages && pages < len(has) {
		// The daemon's table ends behind what it is sent: the last entry, sent again, shortens it, so that
		// a page that comes back later counts as new.
		start--
	}
	c := &t.last
	c.starts = append(c.starts, uint32(start))
	c.counts = append(c.counts, uint32(pages-start))
	for i := start; i < pages; i++ {
		e := s.entry(i)
		c.entries, c.k, c.v = append(c.entries, e), append(c.k, e.k), append(c.v, e.v)
	}
}

// commit books the step last built, which the daemon has accepted.
func (t *tables) commit() {
	c := &t.last
	for _, id := range c.ended {
		delete(t.known, id)
	}
	for _, id := range c.endedLost {
		delete(t.lost, id)
	}
	entries := c.entries
	for i, id := range c.sequences {
		if count := c.counts[i]; count > 0 {
			t.known[id] = append(t.known[id][:c.starts[i]], entries[:count]...)
			delete(t.lost, id)
			entries = entries[count:]
		}
	}
}

func (s *Sequence) entry(i int) entry {
	if s.VTable == nil {
		return entry{s.Table[i], s.Table[i]}
	}
	return entry{s.Table[i], s.VTable[i]}
}

// check refuses what would not survive the way into the columns.
func (s *Sequence) check(i int, anonymous bool) error {
	if anonymous != (s.ID == 0) {
		return errorf(ErrInvalid, fmt.Sprintf("step.sequences[%d]", i),
			"is %d; ids start at 1, or are 0 in all rows of a batch with slots", s.ID)
	}
	if s.VTable != nil && len(s.VTable) != len(s.Table) {
		return errorf(ErrInvalid, "step.table.v_entries", "row %d has %d entries for V and %d for K; give equally many",
			i, len(s.VTable), len(s.Table))
	}
	for _, column := range []struct {
		name  string
		value int
	}{
		{"step.lengths", s.Len},
		{"step.first_valid", s.First},
		{"step.claims.unchanged_prefix", s.UnchangedPrefix},
		{"step.claims.truncate_to", s.TruncateTo},
	} {
		if column.value < math.MinInt32 || column.value > math.MaxInt32 {
			return errorf(ErrOutOfRange, fmt.Sprintf("%s[%d]", column.name, i), "is %d; positions are 32-bit", column.value)
		}
	}
	return nil
}
