package client

import (
	"errors"
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"

	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

// mirror applies table updates as proto TableUpdate says.
type mirror map[uint64][]entry

func (m mirror) apply(t *rapid.T, s *twilightv1.Step) {
	for _, id := range s.GetEnded() {
		if _, ok := m[id]; !ok {
			t.Fatalf("ended %d, which the daemon does not know", id)
		}
		delete(m, id)
	}
	k, v := s.GetTable().GetEntries(), s.GetTable().GetVEntries()
	if len(v) == 0 {
		v = k
	}
	for i, id := range s.GetSequences() {
		start, count := s.GetTable().GetStarts()[i], s.GetTable().GetCounts()[i]
		if count == 0 {
			continue
		}
		if int(start) > len(m[id]) {
			t.Fatalf("row %d starts at %d of a table of %d", i, start, len(m[id]))
		}
		table := m[id][:start]
		for j := range count {
			table = append(table, entry{k[j], v[j]})
		}
		m[id] = table
		k, v = k[count:], v[count:]
	}
	if len(k) != 0 {
		t.Fatalf("%d entries belong to no row", len(k))
	}
}

// The daemon's tables are the engine's after every accepted step, whatever was refused or lost between.
func TestTablesFollowTheEngine(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		pageSize := rapid.SampledFrom([]int{1, 3, 16}).Draw(t, "page size")
		sdk, daemon := newTables(pageSize), mirror{}
		pages := map[uint64][]entry{} // the engine's
		t.Repeat(map[string]func(*rapid.T){
			"step": func(t *rapid.T) {
				var b Batch
				for _, id := range rapid.SliceOfNDistinct(rapid.Uint64Range(1, 5), 0, 5, rapid.ID).Draw(t, "ids") {
					if _, live := pages[id]; live && rapid.Bool().Draw(t, "end") {
						b.Ended = append(b.Ended, id)
						delete(pages, id)
						if rapid.Bool().Draw(t, "only end") {
							continue
						}
					}
					table := pages[id]
					table = slices.Clone(table[:rapid.IntRange(0, len(table)).Draw(t, "keep")])
					for range rapid.IntRange(0, 3).Draw(t, "grow") {
						page := rapid.Int32Range(0, 9).Draw(t, "page")
						table = append(table, entry{page, page + int32(rapid.IntRange(0, 1).Draw(t, "split"))})
					}
					s := Sequence{ID: id, Table: []int32{}, VTable: []int32{}}
					for _, e := range table {
						s.Table, s.VTable = append(s.Table, e.k), append(s.VTable, e.v)
					}
					if len(table) > 0 && !rapid.Bool().Draw(t, "void") {
						s.Len = len(table)*pageSize - rapid.IntRange(0, pageSize-1).Draw(t, "spare")
						pages[id] = table
					}
					if spare := rapid.IntRange(0, 2).Draw(t, "reserved pages"); spare > 0 {
						s.Table, s.VTable = append(s.Table, make([]int32, spare)...), append(s.VTable, make([]int32, spare)...)
					}
					b.Sequences = append(b.Sequences, s)
				}
				m, err := sdk.build(&b)
				if err != nil {
					t.Fatal(err)
				}
				if rapid.Bool().Draw(t, "refused") { // and sent again
					if m, err = sdk.build(&b); err != nil {
						t.Fatal(err)
					}
				}
				daemon.apply(t, m)
				sdk.commit()
			},
			"lose": func(*rapid.T) {
				clear(daemon)
				sdk.forget()
			},
			"": func(t *rapid.T) {
				for id, table := range daemon {
					if !slices.Equal(table, pages[id]) {
						t.Fatalf("sequence %d: the daemon has %v, the engine %v", id, table, pages[id])
					}
				}
			},
		})
	})
}

func TestStepSendsOnlyChanges(t *testing.T) {
	t.Parallel()
	sdk := newTables(16)
	table := []int32{7, 3, 9, 4}
	for _, step := range []struct {
		len, start, count int
	}{
		{48, 0, 3}, {48, 3, 0}, {49, 3, 1}, {50, 4, 0}, {64, 4, 0},
	} {
		m, err := sdk.build(&Batch{Sequences: []Sequence{{ID: 1, Len: step.len, Table: table}}})
		if err != nil {
			t.Fatal(err)
		}
		if got := m.GetTable(); int(got.GetStarts()[0]) != step.start || len(got.GetEntries()) != step.count {
			t.Errorf("length %d: sent %v from %v, want %d entries from %d", step.len, got.GetEntries(), got.GetStarts(), step.count, step.start)
		}
		sdk.commit()
	}
	if m := sdk.message.GetClaims(); len(m.GetTruncateTo())+len(m.GetUnchangedPrefix())+len(m.GetPrefixOf()) != 0 {
		t.Errorf("claims %v were sent though none was made", m)
	}
}

// What a fresh lease is told of a sequence's past would be wrong or refused.
func TestLostSequencesBringNoPast(t *testing.T) {
	t.Parallel()
	sdk := newTables(7)
	b := &Batch{
		Sequences: []Sequence{
			{ID: 1, Len: 8, Table: []int32{0, 1}, UnchangedPrefix: 7, TruncateTo: 8},
			{ID: 2, Len: 8, Table: []int32{0, 2}, UnchangedPrefix: 7, PrefixOf: 3},
			{ID: 4, Len: 8, Table: []int32{0, 3}, UnchangedPrefix: 7, PrefixOf: 2},
		},
		Ended: []uint64{3},
	}
	first := &Batch{Sequences: []Sequence{{ID: 1, Len: 9, Table: []int32{0, 1}}, {ID: 3, Len: 8, Table: []int32{0, 5}}}}
	if _, err := sdk.build(first); err != nil {
		t.Fatal(err)
	}
	sdk.commit()

	m, err := sdk.build(b)
	if err != nil {
		t.Fatal(err)
	}
	if got := m.GetClaims(); !slices.Equal(got.GetUnchangedPrefix(), []int32{7, 7, 7}) ||
		!slices.Equal(got.GetPrefixOf(), []uint64{0, 3, 2}) || !slices.Equal(got.GetTruncateTo(), []int32{8, -1, -1}) ||
		!slices.Equal(m.GetEnded(), []uint64{3}) {
		t.Errorf("on the first lease: %v", m)
	}
	sdk.forget()
	if m, err = sdk.build(b); err != nil {
		t.Fatal(err)
	}
	if got := m.GetClaims(); !slices.Equal(got.GetUnchangedPrefix(), []int32{0, 0, 7}) ||
		!slices.Equal(got.GetPrefixOf(), []uint64{0, 0, 2}) || len(got.GetTruncateTo()) != 0 || len(m.GetEnded()) != 0 {
		t.Errorf("on a fresh lease: %v", m)
	}
	sdk.commit()
	if len(sdk.lost) != 0 {
		t.Errorf("sequences %v are still taken for lost", sdk.lost)
	}
}

func TestBatchIsChecked(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		batch Batch
		code  Code
		field string
	}{
		"no id":          {Batch{Sequences: []Sequence{{Len: 1, Table: []int32{0}}}}, ErrInvalid, "step.sequences[0]"},
		"mixed ids":      {Batch{Slots: []int64{}, Sequences: []Sequence{{}, {ID: 1}}}, ErrInvalid, "step.sequences[1]"},
		"V table length": {Batch{Sequences: []Sequence{{ID: 1, Table: []int32{0}, VTable: []int32{}}}}, ErrInvalid, "step.table.v_entries"},
		"length":         {Batch{Sequences: []Sequence{{ID: 1, Len: math.MaxInt32 + 1}}}, ErrOutOfRange, "step.lengths[0]"},
		"first":          {Batch{Sequences: []Sequence{{ID: 1, First: math.MinInt32 - 1}}}, ErrOutOfRange, "step.first_valid[0]"},
	} {
		_, err := newTables(16).build(&tc.batch)
		var e *Error
		if !errors.As(err, &e) || e.Code != tc.code || e.Field != tc.field {
			t.Errorf("%s: got %v, want %v at %s", name, err, tc.code, tc.field)
		}
	}
	if _, err := newTables(16).build(&Batch{Slots: []int64{}, Sequences: []Sequence{{}, {}}}); err != nil {
		t.Errorf("anonymous rows with slots: %v", err)
	}
}
