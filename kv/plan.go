package kv

import (
	"fmt"

	"github.com/twilight-sidecar/twilight/internal/fault"
)

// planner holds what a step will do, worked out before anything changes. Its memory is reused.
type planner struct {
	step     uint64 // counts steps, refused ones too
	rows     []rowPlan
	starting map[uint64]struct{} // ids of sequences that the step starts

	lost []effect // tokens that become pending
	kept []effect // tokens that do not because of a claim
	ids  []int32  // sequence mode: new chunk ids of all rows, toAllocate where there is none yet
}

// effect names tokens of a chunk.
type effect struct {
	chunk  int32
	tokens uint16
}

const (
	noChunk    int32 = -1
	toAllocate int32 = -2
)

// rowPlan is what a step will do to one row.
type rowPlan struct {
	void bool
	seq  *sequence // nil if the row starts one
	id   uint64

	first, length int
	// keep is how many tokens are left of the last step. Those in [keep, end) are new or forgotten.
	keep, end int

	// table and entries are the old table and what replaces it from index start on; vEntries is nil
	// where V's are the same. The new table has pages entries, the first changed of them as before.
	table, entries, vEntries []int32
	start, changed, pages    int

	// claim is how many tokens of changed pages are as before. Sequence mode: in place of that, chunks
	// [share, shareEnd) may come from source.
	claim           int
	source          *sequence
	share, shareEnd int

	stable         int // chunks below keep their id and tokens
	idFrom, idStop int // sequence mode: the new ids of chunks from stable on, in planner.ids
}

// page returns entry i of the new table.
func (p *rowPlan) page(i int) int32 {
	if i < p.start {
		return p.table[i]
	}
	return p.entries[i-p.start]
}

// vPage returns entry i of the new table of V.
func (p *rowPlan) vPage(i int) int32 {
	switch {
	case i >= p.start && p.vEntries != nil:
		return p.vEntries[i-p.start]
	case i < p.start && p.seq.vtable != nil:
		return p.seq.vtable[i]
	}
	return p.page(i)
}

// placed says whether entry i of the new table was not there before.
func (p *rowPlan) placed(i int) bool {
	return i >= p.changed && i < p.pages && (i >= len(p.table) || p.page(i) != p.table[i])
}

func (p *planner) reset() {
	clear(p.rows)
	clear(p.starting)
	p.rows, p.lost, p.kept, p.ids = p.rows[:0], p.lost[:0], p.kept[:0], p.ids[:0]
}

// plan checks a step and works out what it does.
func (t *Tracker) plan(s *Step) error {
	p := &t.planner
	p.step++
	if err := t.checkColumns(s); err != nil {
		return err
	}
	for i, id := range s.Ended {
		q := t.live[id]
		if q == nil || q.ended == p.step {
			return fault.Newf(fault.NotFound, at("ended", i), "sequence %d is not alive: end each once", id)
		}
		q.ended = p.step
	}
	entry := 0
	for b := range s.Lengths {
		p.rows = append(p.rows, rowPlan{})
		if err := t.planRow(s, b, entry, &p.rows[b]); err != nil {
			return err
		}
		entry += int(value(s.TableCounts, b, 0))
	}
	if n := len(t.live) - len(s.Ended) + len(p.starting); n > maxSequences {
		return fault.Exhaustedf("sequences", uint64(len(p.starting)), uint64(maxSequences-(n-len(p.starting))),
			"%d sequences would be alive, the limit is %d: end some", n, maxSequences)
	}
	switch {
	case t.pool != nil:
		return t.planChunks(s.Ended)
	case s.BySlots:
		return t.planSlots(s)
	}
	t.planPages()
	return nil
}

func (t *Tracker) checkColumns(s *Step) error {
	rows := len(s.Lengths)
	if rows > t.cfg.MaxBatch {
		return fault.Exhaustedf("lengths", uint64(rows), uint64(t.cfg.MaxBatch),
			"the batch has %d rows, the limit is %d: send less at once", rows, t.cfg.MaxBatch)
	}
	if s.BySlots {
		if t.pool != nil {
			return fault.Newf(fault.Unsupported, "slots",
				"page_size %d is not a multiple of %d: declare lengths instead", t.cfg.PageSize, ChunkTokens)
		}
		if len(s.UnchangedPrefix)+len(s.PrefixOf)+len(s.TruncateTo) > 0 {
			return fault.Newf(fault.Invalid, "claims", "claims qualify lengths, which slots replace: send either")
		}
	} else if len(s.Slots) > 0 {
		return fault.Newf(fault.Invalid, "slots", "there are %d, but the step is not by slots", len(s.Slots))
	} else if len(s.Sequences) != rows {
		return fault.Newf(fault.Invalid, "sequences", "there are %d for %d lengths: name each row", len(s.Sequences), rows)
	}
	for _, c := range [...]struct {
		field string
		n     int
	}{
		{"sequences", len(s.Sequences)},
		{"first_valid", len(s.FirstValid)},
		{"table.starts", len(s.TableStarts)},
		{"table.counts", len(s.TableCounts)},
		{"claims.unchanged_prefix", len(s.UnchangedPrefix)},
		{"claims.prefix_of", len(s.PrefixOf)},
		{"claims.truncate_to", len(s.TruncateTo)},
	} {
		if c.n != 0 && c.n != rows {
			return fault.Newf(fault.Invalid, c.field, "there are %d for %d lengths: give as many or none", c.n, rows)
		}
	}
	var counts uint64
	for _, n := range s.TableCounts {
		counts += uint64(n)
	}
	if counts != uint64(len(s.TableEntries)) {
		return fault.Newf(fault.Invalid, "table.entries", "there are %d, but table.counts sums to %d",
			len(s.TableEntries), counts)
	}
	if len(s.VTableEntries) != 0 && len(s.VTableEntries) != len(s.TableEntries) {
		return fault.Newf(fault.Invalid, "table.v_entries", "there are %d, but %d entries: give as many or none",
			len(s.VTableEntries), len(s.TableEntries))
	}
	return nil
}

// planRow checks row b, whose table entries start at index entry, and fills p but for its chunks.
func (t *Tracker) planRow(s *Step, b, entry int, p *rowPlan) error {
	count := int(value(s.TableCounts, b, 0))
	length := int(s.Lengths[b])
	truncate := int(value(s.TruncateTo, b, -1))
	p.id = value(s.Sequences, b, 0)
	switch {
	case length < 0:
		return fault.Newf(fault.Invalid, at("lengths", b), "%d is negative: say 0 for a void row", length)
	case length > t.cfg.MaxSequenceTokens:
		return fault.Exhaustedf(at("lengths", b), uint64(length), uint64(t.cfg.MaxSequenceTokens),
			"%d tokens are more than the limit of %d", length, t.cfg.MaxSequenceTokens)
	case length == 0:
		if len(s.Sequences) > 0 && (count > 0 || truncate >= 0) {
			return fault.Newf(fault.Invalid, at("lengths", b),
				"length 0 makes the row void, so that its table entries and truncate_to would be lost: leave them out")
		}
		p.void = true
		return nil
	}

	p.first, p.length = int(value(s.FirstValid, b, 0)), length
	if p.first < 0 || p.first >= length {
		return fault.Newf(fault.OutOfRange, at("first_valid", b), "%d is not in [0, %d)", p.first, length)
	}
	p.entries = s.TableEntries[entry : entry+count]
	if len(s.VTableEntries) > 0 && count > 0 {
		p.vEntries = s.VTableEntries[entry : entry+count]
	}
	if err := t.planIdentity(s, b, p); err != nil {
		return err
	}
	if err := t.planLength(s, b, truncate, p); err != nil {
		return err
	}
	if err := t.planTable(s, b, entry, p); err != nil {
		return err
	}
	return t.planClaim(s, b, p)
}

// planIdentity finds the row's sequence.
func (t *Tracker) planIdentity(s *Step, b int, p *rowPlan) error {
	step := t.planner.step
	if len(s.Sequences) == 0 {
		p.seq = t.anon.find(p, t.cfg.PageSize, step)
	} else if q := t.live[p.id]; q != nil && q.ended != step {
		p.seq = q
	} else {
		if _, ok := t.planner.starting[p.id]; ok {
			return errTwice(b, p.id)
		}
		t.planner.starting[p.id] = struct{}{}
	}
	q := p.seq
	if q == nil {
		return nil
	}
	if q.seen == step {
		return errTwice(b, p.id)
	}
	q.seen = step
	if q.first != p.first {
		return fault.Newf(fault.Precondition, at("first_valid", b),
			"sequence %d started with %d, not %d: end it to start anew", p.id, q.first, p.first)
	}
	p.table = q.table
	return nil
}

func errTwice(b int, id uint64) error {
	return fault.Newf(fault.Invalid, at("sequences", b), "sequence %d is in the batch already: name each once", id)
}

// planLength finds which tokens are new or forgotten.
func (t *Tracker) planLength(s *Step, b, truncate int, p *rowPlan) error {
	old := 0
	if p.seq != nil {
		old = p.seq.length
	}
	p.keep, p.end = old, max(old, p.length)
	if s.BySlots {
		return nil
	}
	if truncate < -1 || truncate > old {
		return fault.Newf(fault.OutOfRange, at("claims.truncate_to", b),
			"%d is neither -1 nor in [0, %d], the sequence's length", truncate, old)
	}
	if truncate >= 0 {
		p.keep = truncate
	}
	if p.length < p.keep {
		return fault.Newf(fault.Precondition, at("lengths", b),
			"%d tokens are fewer than the %d that the sequence has: forget the rest by claims.truncate_to %d or less (it is %d)",
			p.length, p.keep, p.length, truncate)
	}
	return nil
}

// planTable checks a row's table as far as valid tokens lie on it, and finds what changes.
func (t *Tracker) planTable(s *Step, b, entry int, p *rowPlan) error {
	p.start = len(p.table)
	if len(p.entries) > 0 {
		p.start = int(value(s.TableStarts, b, 0))
	}
	if p.start > len(p.table) {
		return fault.Newf(fault.OutOfRange, at("table.starts", b),
			"index %d is beyond the end of the table, %d: leave no gap", p.start, len(p.table))
	}
	p.pages = p.start + len(p.entries)
	need := ceilDiv(p.length, t.cfg.PageSize)
	switch {
	case p.pages > t.maxTable:
		return fault.Exhaustedf(at("table.counts", b), uint64(p.pages), uint64(t.maxTable),
			"the table would have %d entries, but %d hold the longest sequence allowed", p.pages, t.maxTable)
	case p.pages < need:
		return fault.Newf(fault.OutOfRange, at("lengths", b),
			"%d tokens need %d table entries of %d tokens, there are %d: send the rest",
			p.length, need, t.cfg.PageSize, p.pages)
	}
	p.changed = p.start + commonPrefix(p.entries, p.table[p.start:])

	// Unchanged pages below the old length have been checked before.
	padding, checked := p.first/t.cfg.PageSize, 0
	if p.seq != nil {
		checked = ceilDiv(p.seq.length, t.cfg.PageSize)
	}
	for i := max(padding, min(p.changed, checked)); i < need; i++ {
		if page := p.page(i); !t.holds(page) {
			return t.errPage(p, b, i, page, "table.entries", entry)
		}
	}
	if p.vEntries == nil && (p.seq == nil || p.seq.vtable == nil) {
		return nil
	}
	for i := max(padding, min(p.start, checked)); i < need; i++ {
		if page := p.vPage(i); !t.holds(page) {
			return t.errPage(p, b, i, page, "table.v_entries", entry)
		}
	}
	return nil
}

func commonPrefix(a, b []int32) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return n
}

// holds says whether a page can hold tokens.
func (t *Tracker) holds(page int32) bool {
	return page >= 0 && int(page) < t.cfg.NumPages && page != t.cfg.NullPage
}

// errPage says that index i of row b's table holds no tokens.
func (t *Tracker) errPage(p *rowPlan, b, i int, page int32, field string, entry int) error {
	if i >= p.start {
		field = at(field, entry+i-p.start)
	} else {
		field = at("lengths", b)
	}
	return fault.Newf(fault.OutOfRange, field,
		"the %d tokens reach index %d of the table, where page %d is not in [0, %d) or is the null page: "+
			"put one there that holds them", p.length, i, page, t.cfg.NumPages)
}

// planClaim finds which tokens of changed pages are as before.
func (t *Tracker) planClaim(s *Step, b int, p *rowPlan) error {
	claim := int(value(s.UnchangedPrefix, b, 0))
	if claim < 0 || claim > p.length {
		return fault.Newf(fault.OutOfRange, at("claims.unchanged_prefix", b),
			"%d is not in [0, %d], the row's length", claim, p.length)
	}
	p.claim = claim
	if p.seq != nil && p.keep < p.seq.length {
		p.claim = min(claim, p.keep) // what is forgotten is not as before
	}
	p.stable = min(p.keep, p.length, p.changed*t.cfg.PageSize) / ChunkTokens
	of := value(s.PrefixOf, b, 0)
	if t.pool == nil || of == 0 || claim == 0 {
		return nil
	}
	source := t.live[of]
	if source == nil {
		return fault.Newf(fault.NotFound, at("claims.prefix_of", b),
			"sequence %d is neither alive nor ends in this step: say 0 to have the prefix indexed", of)
	}
	if source == p.seq {
		return nil
	}
	p.claim, p.source = 0, source
	p.share = max(p.stable, ceilDiv(max(source.first, p.first), ChunkTokens))
	p.shareEnd = max(p.share, min(claim, source.length)/ChunkTokens)
	return nil
}

func at(field string, i int) string { return fmt.Sprintf("%s[%d]", field, i) }

// value returns column[i], or absent if there is no column.
func value[T any](column []T, i int, absent T) T {
	if len(column) == 0 {
		return absent
	}
	return column[i]
}
