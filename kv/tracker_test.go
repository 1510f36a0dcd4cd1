package kv

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/twilight-sidecar/twilight/internal/fault"
)

func mustTracker(t testing.TB, cfg TrackerConfig) *Tracker {
	t.Helper()
	tracker, err := NewTracker(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return tracker
}

func mustStep(t testing.TB, tracker *Tracker, s *Step) {
	t.Helper()
	if err := tracker.Step(s); err != nil {
		t.Fatal(err)
	}
}

// fresh indexes a layer and returns how many tokens that took.
func fresh(tracker *Tracker, layer int) (n int) {
	for _, w := range tracker.Pending(nil, layer) {
		for ; w.Fresh != 0; w.Fresh &= w.Fresh - 1 {
			n++
		}
	}
	return n
}

// pageTracker has sequence 1 with 20 tokens on pages 1 and 2, page 9 of no meaning behind them, and
// sequence 2 with 30 tokens, 18 of them padding, on null page 0 and page 3.
func pageTracker(t testing.TB) *Tracker { return newPageTracker(t, 9, 7) }

// vPageTracker has page 9 behind sequence 1's values only.
func vPageTracker(t testing.TB) *Tracker { return newPageTracker(t, 7, 9) }

func newPageTracker(t testing.TB, behind, vBehind int32) *Tracker {
	tracker := mustTracker(t, TrackerConfig{
		PageSize: 16, NumPages: 8, NullPage: 0, Layers: 2, MaxBatch: 3, MaxSequenceTokens: 100,
	})
	mustStep(t, tracker, &Step{
		Sequences: []uint64{1, 2}, Lengths: []int32{20, 30}, FirstValid: []int32{0, 18},
		TableCounts: []uint32{3, 2}, TableEntries: []int32{1, 2, behind, 0, 3}, VTableEntries: []int32{1, 2, vBehind, 0, 3},
	})
	return tracker
}

// tokenTracker has sequences 1 of 20 and 2 of 30 tokens in slots of their own, and 3 chunks left.
func tokenTracker(t testing.TB) *Tracker {
	tracker := mustTracker(t, TrackerConfig{
		PageSize: 1, NumPages: 1000, NullPage: -1, Layers: 2, MaxTokens: 48, MaxBatch: 2, MaxSequenceTokens: 100,
	})
	s := &Step{Sequences: []uint64{1, 2}, Lengths: []int32{20, 30}, TableCounts: []uint32{20, 30}}
	for i := range int32(50) {
		s.TableEntries = append(s.TableEntries, i)
	}
	mustStep(t, tracker, s)
	return tracker
}

func TestStepRefuses(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		tracker func(testing.TB) *Tracker
		step    Step
		kind    fault.Kind
		field   string
	}{
		"too many rows": {
			pageTracker, Step{Sequences: []uint64{1, 2, 3, 4}, Lengths: make([]int32, 4)}, fault.Exhausted, "lengths",
		},
		"no names": {pageTracker, Step{Lengths: []int32{1}}, fault.Invalid, "sequences"},
		"names missing by slots": {
			pageTracker, Step{BySlots: true, Sequences: []uint64{1}, Lengths: []int32{20, 0}}, fault.Invalid, "sequences",
		},
		"name twice":     {pageTracker, Step{Sequences: []uint64{1, 1}, Lengths: []int32{20, 20}}, fault.Invalid, "sequences[1]"},
		"new name twice": {pageTracker, newRows(7, 7), fault.Invalid, "sequences[1]"},
		"short column": {
			pageTracker,
			Step{Sequences: []uint64{1, 2}, Lengths: []int32{0, 0}, FirstValid: []int32{0}},
			fault.Invalid, "first_valid",
		},
		"negative length":       {pageTracker, Step{Sequences: []uint64{1}, Lengths: []int32{-1}}, fault.Invalid, "lengths[0]"},
		"length over the limit": {pageTracker, Step{Sequences: []uint64{1}, Lengths: []int32{101}}, fault.Exhausted, "lengths[0]"},
		"shorter":               {pageTracker, Step{Sequences: []uint64{1}, Lengths: []int32{19}}, fault.Precondition, "lengths[0]"},
		"shorter than truncate_to": {
			pageTracker,
			Step{Sequences: []uint64{1}, Lengths: []int32{17}, TruncateTo: []int32{18}},
			fault.Precondition, "lengths[0]",
		},
		"truncate_to above": {
			pageTracker,
			Step{Sequences: []uint64{1}, Lengths: []int32{20}, TruncateTo: []int32{21}},
			fault.OutOfRange, "claims.truncate_to[0]",
		},
		"truncate_to below": {
			pageTracker,
			Step{Sequences: []uint64{1}, Lengths: []int32{20}, TruncateTo: []int32{-2}},
			fault.OutOfRange, "claims.truncate_to[0]",
		},
		"truncate_to of a new sequence": {
			pageTracker, with(newRows(7), func(s *Step) { s.TruncateTo = []int32{1} }),
			fault.OutOfRange, "claims.truncate_to[0]",
		},
		"first_valid at length": {
			pageTracker, with(newRows(7), func(s *Step) { s.FirstValid = []int32{16} }), fault.OutOfRange, "first_valid[0]",
		},
		"first_valid negative": {
			pageTracker, with(newRows(7), func(s *Step) { s.FirstValid = []int32{-1} }), fault.OutOfRange, "first_valid[0]",
		},
		"first_valid changes": {
			pageTracker,
			Step{Sequences: []uint64{2}, Lengths: []int32{30}, FirstValid: []int32{17}},
			fault.Precondition, "first_valid[0]",
		},
		"first_valid goes": {pageTracker, Step{Sequences: []uint64{2}, Lengths: []int32{30}}, fault.Precondition, "first_valid[0]"},
		"void row with entries": {
			pageTracker, with(newRows(7), func(s *Step) { s.Lengths[0] = 0 }), fault.Invalid, "lengths[0]",
		},
		"void row that truncates": {
			pageTracker, Step{Sequences: []uint64{1}, Lengths: []int32{0}, TruncateTo: []int32{3}}, fault.Invalid, "lengths[0]",
		},
		"counts do not sum": {
			pageTracker, with(newRows(7), func(s *Step) { s.TableCounts[0] = math.MaxUint32 }), fault.Invalid, "table.entries",
		},
		"entries without counts": {
			pageTracker,
			Step{Sequences: []uint64{1}, Lengths: []int32{20}, TableEntries: []int32{1}},
			fault.Invalid, "table.entries",
		},
		"V entries missing": {
			pageTracker, with(newRows(7, 8), func(s *Step) { s.VTableEntries = []int32{1} }), fault.Invalid, "table.v_entries",
		},
		"gap in the table": {
			pageTracker, Step{
				Sequences: []uint64{1}, Lengths: []int32{20},
				TableStarts: []uint32{4}, TableCounts: []uint32{1}, TableEntries: []int32{1},
			}, fault.OutOfRange, "table.starts[0]",
		},
		"gap in a new table": {
			pageTracker, with(newRows(7), func(s *Step) { s.TableStarts = []uint32{1} }), fault.OutOfRange, "table.starts[0]",
		},
		"table over the limit": {
			pageTracker, Step{
				Sequences: []uint64{7}, Lengths: []int32{16}, TableCounts: []uint32{8}, TableEntries: make([]int32, 8),
			}, fault.Exhausted, "table.counts[0]",
		},
		"table too short": {
			pageTracker, with(newRows(7), func(s *Step) { s.Lengths[0] = 17 }), fault.OutOfRange, "lengths[0]",
		},
		"table cut too short": {
			pageTracker,
			Step{Sequences: []uint64{1}, Lengths: []int32{20}, TableCounts: []uint32{1}, TableEntries: []int32{1}},
			fault.OutOfRange, "lengths[0]",
		},
		"page beyond the cache": {
			pageTracker, with(newRows(6, 7), func(s *Step) { s.TableEntries[1] = 8 }), fault.OutOfRange, "table.entries[1]",
		},
		"page negative": {
			pageTracker, with(newRows(6, 7), func(s *Step) { s.TableEntries[1] = -1 }), fault.OutOfRange, "table.entries[1]",
		},
		"null page": {
			pageTracker, with(newRows(6, 7), func(s *Step) { s.TableEntries[1] = 0 }), fault.OutOfRange, "table.entries[1]",
		},
		"V page beyond the cache": {
			pageTracker, with(newRows(6, 7), func(s *Step) { s.VTableEntries = []int32{1, 8} }),
			fault.OutOfRange, "table.v_entries[1]",
		},
		"growth onto no page":      {pageTracker, Step{Sequences: []uint64{1}, Lengths: []int32{33}}, fault.OutOfRange, "lengths[0]"},
		"growth onto no page of V": {vPageTracker, Step{Sequences: []uint64{1}, Lengths: []int32{33}}, fault.OutOfRange, "lengths[0]"},
		"growth onto no page of V among new ones": {
			vPageTracker, Step{
				Sequences: []uint64{1}, Lengths: []int32{49}, TableStarts: []uint32{3},
				TableCounts: []uint32{1}, TableEntries: []int32{4},
			}, fault.OutOfRange, "lengths[0]",
		},
		"page replaced by none": {
			pageTracker,
			Step{Sequences: []uint64{1}, Lengths: []int32{20}, TableCounts: []uint32{2}, TableEntries: []int32{8, 2}},
			fault.OutOfRange, "table.entries[0]",
		},
		"page of V replaced by none": {
			pageTracker, Step{
				Sequences: []uint64{1}, Lengths: []int32{20}, TableCounts: []uint32{2},
				TableEntries: []int32{1, 2}, VTableEntries: []int32{8, 2},
			}, fault.OutOfRange, "table.v_entries[0]",
		},
		"claim above": {
			pageTracker, with(newRows(7), func(s *Step) { s.UnchangedPrefix = []int32{17} }),
			fault.OutOfRange, "claims.unchanged_prefix[0]",
		},
		"claim negative": {
			pageTracker, with(newRows(7), func(s *Step) { s.UnchangedPrefix = []int32{-1} }),
			fault.OutOfRange, "claims.unchanged_prefix[0]",
		},
		"claim of an unknown sequence": {
			tokenTracker, Step{
				Sequences: []uint64{7}, Lengths: []int32{1}, TableCounts: []uint32{1}, TableEntries: []int32{1},
				UnchangedPrefix: []int32{1}, PrefixOf: []uint64{9},
			}, fault.NotFound, "claims.prefix_of[0]",
		},
		"end of an unknown sequence": {pageTracker, Step{Ended: []uint64{1, 9}}, fault.NotFound, "ended[1]"},
		"end twice":                  {pageTracker, Step{Ended: []uint64{1, 1}}, fault.NotFound, "ended[1]"},
		"slots in sequence mode": {
			tokenTracker, Step{BySlots: true, Sequences: []uint64{1}, Lengths: []int32{20}}, fault.Unsupported, "slots",
		},
		"slots by length": {
			pageTracker, Step{Sequences: []uint64{1}, Lengths: []int32{20}, Slots: []int64{1}}, fault.Invalid, "slots",
		},
		"claims by slots": {
			pageTracker,
			Step{BySlots: true, Sequences: []uint64{1}, Lengths: []int32{20}, TruncateTo: []int32{-1}},
			fault.Invalid, "claims",
		},
		"slot beyond the cache": {pageTracker, Step{BySlots: true, Slots: []int64{-1, 128}}, fault.OutOfRange, "slots.slots[1]"},
		"slot negative":         {pageTracker, Step{BySlots: true, Slots: []int64{-2}}, fault.OutOfRange, "slots.slots[0]"},
		"anonymous without table": {
			pageTracker, Step{BySlots: true, Lengths: []int32{16}}, fault.OutOfRange, "lengths[0]",
		},
		"out of chunks": {
			tokenTracker, Step{
				Sequences: []uint64{1, 3}, Lengths: []int32{33, 33}, TableStarts: []uint32{20, 0},
				TableCounts: []uint32{13, 33}, TableEntries: make([]int32, 46),
			}, fault.Exhausted, "lengths",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tracker := c.tracker(t)
			rows := slices.Clone(tracker.Rows())
			err := tracker.Step(&c.step)
			var f *fault.Error
			if !errors.As(err, &f) || f.Kind != c.kind || f.Field != c.field {
				t.Fatalf("got %v, want %v of %s", err, c.kind, c.field)
			}
			if c.kind == fault.Exhausted && f.Requested <= f.Available {
				t.Errorf("%d requested, %d available: %v", f.Requested, f.Available, f)
			}
			if diff := cmp.Diff(rows, tracker.Rows()); diff != "" {
				t.Errorf("rows changed:\n%s", diff)
			}
		})
	}
}

// newRows starts sequences with 16 tokens on a page each.
func newRows(ids ...uint64) Step {
	s := Step{Sequences: ids}
	for i := range ids {
		s.Lengths = append(s.Lengths, 16)
		s.TableCounts = append(s.TableCounts, 1)
		s.TableEntries = append(s.TableEntries, int32(5+i))
	}
	return s
}

func with(s Step, change func(*Step)) Step {
	change(&s)
	return s
}

func TestShorterSaysHow(t *testing.T) {
	t.Parallel()
	err := pageTracker(t).Step(&Step{Sequences: []uint64{1}, Lengths: []int32{7}})
	const want = "lengths[0]: 7 tokens are fewer than the 20 that the sequence has: " +
		"forget the rest by claims.truncate_to 7 or less (it is -1)"
	if err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestNewTrackerRefuses(t *testing.T) {
	t.Parallel()
	good := TrackerConfig{PageSize: 16, NumPages: 8, NullPage: -1, Layers: 2, MaxBatch: 3, MaxSequenceTokens: 100}
	for field, spoil := range map[string]func(*TrackerConfig){
		"page_size":           func(c *TrackerConfig) { c.PageSize = 0 },
		"num_pages":           func(c *TrackerConfig) { c.NumPages, c.PageSize = math.MaxInt32, 1<<20 },
		"null_page":           func(c *TrackerConfig) { c.NullPage = 8 },
		"layers":              func(c *TrackerConfig) { c.Layers = 0 },
		"max_tokens":          func(c *TrackerConfig) { c.MaxTokens = -1 },
		"max_batch":           func(c *TrackerConfig) { c.MaxBatch = 0 },
		"max_sequence_tokens": func(c *TrackerConfig) { c.MaxSequenceTokens = math.MaxInt32 + 1 },
	} {
		cfg := good
		spoil(&cfg)
		_, err := NewTracker(cfg)
		var f *fault.Error
		if !errors.As(err, &f) || f.Field != field {
			t.Errorf("%s: got %v", field, err)
		}
	}
}

func TestNumChunks(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		pageSize, pages, tokens, want int
	}{
		{16, 10, 0, 10},
		{64, 10, 5, 40},
		{1, 100, 0, 7 + 2*5},
		{24, 10, 50, 4 + 2*5},
	} {
		cfg := TrackerConfig{
			PageSize: c.pageSize, NumPages: c.pages, MaxTokens: c.tokens, Layers: 1, MaxBatch: 5, MaxSequenceTokens: 9,
		}
		n, err := cfg.NumChunks()
		if err != nil || n != c.want || mustTracker(t, cfg).NumChunks() != n {
			t.Errorf("%+v: %d chunks, %v, want %d", cfg, n, err, c.want)
		}
	}
}

func TestDecodeIndexesOneToken(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		tracker *Tracker
		tokens  int
		step    Step
	}{
		"page mode": {pageTracker(t), 20 + 12, Step{Sequences: []uint64{1}, Lengths: []int32{21}}},
		"sequence mode": {tokenTracker(t), 20 + 30, Step{
			Sequences: []uint64{1}, Lengths: []int32{21},
			TableStarts: []uint32{20}, TableCounts: []uint32{1}, TableEntries: []int32{900},
		}},
	} {
		if n := fresh(c.tracker, 0); n != c.tokens {
			t.Errorf("%s: %d tokens are fresh at first, want %d", name, n, c.tokens)
		}
		mustStep(t, c.tracker, &c.step)
		if n := fresh(c.tracker, 0); n != 1 {
			t.Errorf("%s: %d tokens are fresh after one more", name, n)
		}
	}
}

// TestLateLayer indexes one layer every step and another only at the end.
func TestLateLayer(t *testing.T) {
	t.Parallel()
	tracker := pageTracker(t)
	for length := int32(20); length <= 32; length++ {
		mustStep(t, tracker, &Step{Sequences: []uint64{1}, Lengths: []int32{length}})
		fresh(tracker, 0)
	}
	if n := fresh(tracker, 0); n != 0 {
		t.Errorf("%d tokens are fresh in the layer in time", n)
	}
	if n := fresh(tracker, 1); n != 32 {
		t.Errorf("%d tokens are fresh in the late layer, want 32", n)
	}
}

// TestPageReuse gives a page to another sequence with a claim and without.
func TestPageReuse(t *testing.T) {
	t.Parallel()
	for claim, want := range map[int32]int{0: 16, 9: 7, 16: 0} {
		tracker := pageTracker(t)
		fresh(tracker, 0)
		mustStep(t, tracker, &Step{
			Sequences: []uint64{7}, Lengths: []int32{16}, TableCounts: []uint32{1}, TableEntries: []int32{1},
			UnchangedPrefix: []int32{claim}, Ended: []uint64{1},
		})
		if n := fresh(tracker, 0); n != want {
			t.Errorf("claim of %d: %d tokens are fresh, want %d", claim, n, want)
		}
		if n := tracker.Claimed(0); n != uint64(claim) {
			t.Errorf("claim of %d: %d tokens count as claimed", claim, n)
		}
		if n := tracker.Claimed(0); n != 0 {
			t.Errorf("claim of %d: %d tokens count again", claim, n)
		}
	}
}

// TestForkedChunkDetaches shares a prefix, then rolls one of the two sequences back into it.
func TestForkedChunkDetaches(t *testing.T) {
	t.Parallel()
	tracker := tokenTracker(t)
	fresh(tracker, 0)
	fork := &Step{
		Sequences: []uint64{3}, Lengths: []int32{20}, TableCounts: []uint32{20}, TableEntries: make([]int32, 20),
		UnchangedPrefix: []int32{20}, PrefixOf: []uint64{1},
	}
	mustStep(t, tracker, fork)
	if n := fresh(tracker, 0); n != 4 {
		t.Fatalf("the fork has %d fresh tokens, want the 4 behind its whole chunk", n)
	}
	mustStep(t, tracker, &Step{Sequences: []uint64{1, 3}, Lengths: []int32{12, 20}, TruncateTo: []int32{10, -1}})
	rows := tracker.Rows()
	if rows[0].Chunks[0] == rows[1].Chunks[0] {
		t.Error("the chunk is still shared")
	}
	if n := fresh(tracker, 0); n != 12 {
		t.Errorf("%d tokens are fresh, want the 12 of the detached chunk", n)
	}
}

// TestForeignWrites writes, twice, into a chunk of a sequence that is not in the batch. What is known of
// the batch's own chunks is given up once.
func TestForeignWrites(t *testing.T) {
	t.Parallel()
	tracker := pageTracker(t)
	fresh(tracker, 0)
	q := tracker.live[2]
	for _, c := range []struct{ slot, known int }{{63, 1}, {17, 0}, {18, 2}} {
		mustStep(t, tracker, &Step{
			BySlots: true, Sequences: []uint64{2}, Lengths: []int32{32}, FirstValid: []int32{18},
			Slots: []int64{int64(c.slot)},
		})
		if q.known[0] != c.known {
			t.Errorf("slot %d: %d chunks are known before indexing, want %d", c.slot, q.known[0], c.known)
		}
		fresh(tracker, 0)
		if q.known[0] != 2 {
			t.Errorf("slot %d: %d chunks are known after indexing, want 2", c.slot, q.known[0])
		}
	}
	mustStep(t, tracker, &Step{Sequences: []uint64{1}, Lengths: []int32{20}})
	if n := fresh(tracker, 0); n != 2 {
		t.Errorf("%d tokens of the other sequence are fresh, want the 2 written", n)
	}
}

// TestClaimAgain claims what the row shares already, and more of it.
func TestClaimAgain(t *testing.T) {
	t.Parallel()
	tracker := tokenTracker(t)
	for _, c := range []struct{ length, claim int32 }{{16, 16}, {16, 16}, {30, 30}} {
		mustStep(t, tracker, &Step{
			Sequences: []uint64{3}, Lengths: []int32{c.length}, TableCounts: []uint32{30}, TableEntries: make([]int32, 30),
			UnchangedPrefix: []int32{c.claim}, PrefixOf: []uint64{2},
		})
		if refs := tracker.pool.refs[tracker.Rows()[0].Chunks[0]]; refs != 2 {
			t.Fatalf("the shared chunk is held %d times, want 2", refs)
		}
	}
}

func TestRefusalKeepsChunks(t *testing.T) {
	t.Parallel()
	tracker := tokenTracker(t)
	refs, free := slices.Clone(tracker.pool.refs), slices.Clone(tracker.pool.free)
	err := tracker.Step(&Step{
		Sequences: []uint64{2, 3}, Lengths: []int32{16, 100}, TruncateTo: []int32{3, -1}, TableCounts: []uint32{0, 100},
		TableEntries: make([]int32, 100), UnchangedPrefix: []int32{0, 16}, PrefixOf: []uint64{0, 1}, Ended: []uint64{1},
	})
	if !errors.Is(err, fault.Exhausted) {
		t.Fatal(err)
	}
	if !slices.Equal(refs, tracker.pool.refs) || !slices.Equal(free, tracker.pool.free) {
		t.Errorf("refs %v, free %v, were %v and %v", tracker.pool.refs, tracker.pool.free, refs, free)
	}
}

// TestEpochsComeRound invalidates a layer until its epoch has the number again that old marks carry.
func TestEpochsComeRound(t *testing.T) {
	t.Parallel()
	tracker := pageTracker(t)
	fresh(tracker, 1)
	for range 1 << 16 {
		tracker.Invalidate(1)
	}
	if n := fresh(tracker, 1); n != 32 {
		t.Errorf("%d tokens are fresh, want all 32", n)
	}
}

func TestTooManySequences(t *testing.T) {
	t.Parallel()
	tracker := mustTracker(t, TrackerConfig{
		PageSize: 16, NumPages: 2, NullPage: -1, Layers: 1, MaxBatch: maxSequences, MaxSequenceTokens: 16,
	})
	s := Step{TableEntries: make([]int32, maxSequences)}
	for id := range uint64(maxSequences) {
		s.Sequences = append(s.Sequences, id)
		s.Lengths = append(s.Lengths, 1)
		s.TableCounts = append(s.TableCounts, 1)
	}
	mustStep(t, tracker, &s)
	more := newRows(maxSequences)
	more.TableEntries[0] = 1
	var f *fault.Error
	if err := tracker.Step(&more); !errors.As(err, &f) || f.Kind != fault.Exhausted || f.Requested != 1 || f.Available != 0 {
		t.Errorf("one more: %v", err)
	}
	more.Ended = []uint64{5}
	mustStep(t, tracker, &more)
}

// decodeLoop decodes sequences, a token a step, by steps of one kind.
type decodeLoop struct {
	tracker *Tracker
	step    Step
	from    int // tokens at the start
	tick    int
	work    []ChunkWork
}

const (
	loopLayers = 32
	loopTicks  = 512
)

var loopKinds = []string{"page mode", "anonymous", "sequence mode"}

func newDecodeLoop(t testing.TB, kind string, sequences, tokens int) *decodeLoop {
	pageSize := 16
	if kind == "sequence mode" {
		pageSize = 1
	}
	pages := (tokens + loopTicks) / pageSize
	d := &decodeLoop{from: tokens}
	d.tracker = mustTracker(t, TrackerConfig{
		PageSize: pageSize, NumPages: sequences * pages, NullPage: -1, Layers: loopLayers,
		MaxBatch: sequences, MaxSequenceTokens: tokens + loopTicks,
	})
	s := &d.step
	for i := range sequences {
		s.Sequences = append(s.Sequences, uint64(i)+1)
		s.Lengths = append(s.Lengths, int32(tokens))
		s.TableCounts = append(s.TableCounts, uint32(pages))
		for p := range pages {
			s.TableEntries = append(s.TableEntries, int32(p*sequences+i))
		}
	}
	if kind == "anonymous" {
		s.Sequences, s.BySlots = nil, true
	}
	mustStep(t, d.tracker, s)
	d.index()
	if kind != "anonymous" {
		s.TableCounts, s.TableEntries = nil, nil
	}
	return d
}

func (d *decodeLoop) index() {
	for layer := range loopLayers {
		d.work = d.tracker.Pending(d.work[:0], layer)
	}
}

// next declares one token more for all sequences. It reports whether it is time to rewind.
func (d *decodeLoop) next(t testing.TB) bool {
	s := &d.step
	pages := len(s.TableEntries) / len(s.Lengths)
	s.TruncateTo, s.Slots = s.TruncateTo[:0], s.Slots[:0]
	for i := range s.Lengths {
		pos := d.from + d.tick
		s.Lengths[i] = int32(pos) + 1
		if s.BySlots {
			s.Slots = append(s.Slots, int64(s.TableEntries[i*pages+pos/16])*16+int64(pos%16))
		}
	}
	mustStep(t, d.tracker, s)
	d.tick++
	return d.tick == loopTicks
}

// rewind goes back to the start.
func (d *decodeLoop) rewind(t testing.TB) {
	s := &d.step
	d.tick = 0
	for i := range s.Lengths {
		s.Lengths[i] = int32(d.from)
		if !s.BySlots {
			s.TruncateTo = append(s.TruncateTo, int32(d.from))
		}
	}
	mustStep(t, d.tracker, s)
	d.index()
}

func TestStepsAllocateNothing(t *testing.T) {
	for _, kind := range loopKinds {
		d := newDecodeLoop(t, kind, 3, 640)
		lap := func() {
			again := d.next(t)
			d.index()
			if again {
				d.rewind(t)
			}
		}
		for range loopTicks {
			lap()
		}
		if n := testing.AllocsPerRun(100, lap); n != 0 {
			t.Errorf("%s: %v allocations a step", kind, n)
		}
	}
}

func benchmarkLoop(b *testing.B, run func(b *testing.B, d *decodeLoop)) {
	for _, kind := range loopKinds {
		for _, sequences := range []int{1, 64} {
			b.Run(fmt.Sprintf("%s/%d", kind, sequences), func(b *testing.B) {
				run(b, newDecodeLoop(b, kind, sequences, 32<<10))
			})
		}
	}
}

func BenchmarkStep(b *testing.B) {
	benchmarkLoop(b, func(b *testing.B, d *decodeLoop) {
		for b.Loop() {
			if d.next(b) {
				b.StopTimer()
				d.rewind(b)
				b.StartTimer()
			}
		}
	})
}

// BenchmarkStepAndPending steps and asks all layers. ns/layer is the whole, spread over them.
func BenchmarkStepAndPending(b *testing.B) {
	benchmarkLoop(b, func(b *testing.B, d *decodeLoop) {
		for b.Loop() {
			again := d.next(b)
			d.index()
			if again {
				b.StopTimer()
				d.rewind(b)
				b.StartTimer()
			}
		}
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/loopLayers, "ns/layer")
	})
}

// BenchmarkPrefill starts a sequence of 128k tokens and indexes all layers.
func BenchmarkPrefill(b *testing.B) {
	const tokens = 128 << 10
	for _, pageSize := range []int{16, 1} {
		b.Run(fmt.Sprintf("pages of %d", pageSize), func(b *testing.B) {
			tracker := mustTracker(b, TrackerConfig{
				PageSize: pageSize, NumPages: tokens / pageSize, NullPage: -1, Layers: loopLayers,
				MaxBatch: 1, MaxSequenceTokens: tokens,
			})
			s := Step{
				Sequences: []uint64{1}, Lengths: []int32{tokens}, TableCounts: []uint32{uint32(tokens / pageSize)},
				TableEntries: make([]int32, tokens/pageSize),
			}
			for i := range s.TableEntries {
				s.TableEntries[i] = int32(i)
			}
			var work []ChunkWork
			for b.Loop() {
				mustStep(b, tracker, &s)
				s.Ended = []uint64{1}
				for layer := range loopLayers {
					work = tracker.Pending(work[:0], layer)
				}
			}
		})
	}
}

// FuzzStep feeds trackers of both modes arbitrary columns.
func FuzzStep(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte("\x00\x02\x01\x01\x02\x01\x14\x1e\x00\x01\x02\x02\x01\x02\x03\x04"))
	f.Add([]byte("\x01\x01\x01\x01\x21\x01\x00\x01\x03\x01\x02\x03\x02\x01\x05\x01\x01\x01\x02\x01\x01\x10"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, pageSize := range []int{16, 7} {
			tracker := mustTracker(t, TrackerConfig{
				PageSize: pageSize, NumPages: 9, NullPage: 0, Layers: 2, MaxTokens: 90, MaxBatch: 3, MaxSequenceTokens: 70,
			})
			for in := feed(data); len(in) > 0; {
				err := tracker.Step(in.step())
				var fe *fault.Error
				if err != nil && (!errors.As(err, &fe) || fe.Field == "" || fe.Text == "") {
					t.Fatalf("refused by %#v", err)
				}
				layer := int(in.next()) % 2
				for _, w := range tracker.Pending(nil, layer) {
					row := tracker.Rows()[w.Row]
					if row.Chunks[w.Chunk] != w.ID || w.ID < 0 || int(w.ID) >= tracker.NumChunks() || w.Fresh&^w.Valid != 0 {
						t.Fatalf("work %+v for row %+v", w, row)
					}
				}
				if again := tracker.Pending(nil, layer); len(again) > 0 {
					t.Fatalf("still pending: %+v", again)
				}
			}
		}
	})
}

// feed makes steps of bytes.
type feed []byte

func (f *feed) next() byte {
	if len(*f) == 0 {
		return 0
	}
	b := (*f)[0]
	*f = (*f)[1:]
	return b
}

// value is mostly small, now and then extreme.
func (f *feed) value() int64 {
	switch b := f.next(); b {
	case 255:
		return -1
	case 254:
		return math.MaxInt64
	case 253:
		return math.MinInt64
	case 252:
		return math.MaxInt32
	default:
		return int64(b)
	}
}

func column[T ~int32 | ~uint32 | ~int64 | ~uint64](f *feed, n int) []T {
	switch f.next() % 8 {
	case 0, 1, 2:
		return nil
	case 3:
		n = int(f.next() % 5)
	}
	c := make([]T, n)
	for i := range c {
		c[i] = T(f.value())
	}
	return c
}

func (f *feed) step() *Step {
	rows := int(f.next() % 5)
	s := &Step{
		BySlots:     f.next()%3 == 1,
		Sequences:   column[uint64](f, rows),
		FirstValid:  column[int32](f, rows),
		TableStarts: column[uint32](f, rows),
		TableCounts: column[uint32](f, rows),
		Ended:       column[uint64](f, int(f.next()%3)),
	}
	for range rows {
		s.Lengths = append(s.Lengths, int32(f.value()))
	}
	entries := 0
	for _, n := range s.TableCounts {
		entries += int(n % 64)
	}
	s.TableEntries = column[int32](f, entries)
	s.VTableEntries = column[int32](f, entries)
	s.UnchangedPrefix = column[int32](f, rows)
	s.PrefixOf = column[uint64](f, rows)
	s.TruncateTo = column[int32](f, rows)
	s.Slots = column[int64](f, int(f.next()%4))
	return s
}
