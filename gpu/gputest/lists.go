package gputest

import (
	"encoding/binary"
	"slices"
	"testing"

	"github.com/twilight-sidecar/twilight/gpu"
)

// testLists takes lists in a buffer, whole and cut, and without attention.
func testLists(t *testing.T, s *suite) {
	for name, config := range map[string]string{"union": quest, "per_query_head": questPerHead, "dense": keepAll} {
		t.Run(name, func(t *testing.T) {
			setup := standard()
			setup.config = config
			e := s.engine(t, setup)
			rows := []seq{{0, 320, 21}, {2, 0, 0}, {1, 37, 0}}
			want := e.decode(rows...)
			for _, capacity := range []int{1, 40, 1000} {
				for i := range e.models {
					e.checkListBuffer(i, rows, want[i], capacity)
				}
			}
			for i := range e.models {
				e.checkListsOnly(i, rows, want[i], false)
				e.checkListsOnly(i, rows, want[i], true)
			}
		})
	}
}

// checkListBuffer takes the lists of a layer in a buffer.
func (e *engine) checkListBuffer(layer int, rows []seq, want *gpu.LayerResult, capacity int) {
	e.t.Helper()
	const entry, gap = 4, 64
	lists := listsOf(want)
	countsAt := gap + len(lists)*capacity*entry + gap
	size := countsAt + len(lists)*entry + gap
	buffer := e.suite.memory.Alloc(e.t, size)
	memory := must(e.lease.Import(e.t.Context(), buffer.Region(e.t, size, true)))(e.t)

	// What lies behind a list's end is the engine's own.
	expected := slices.Repeat([]byte{0xa5}, size)
	buffer.Write(0, expected)
	var truncated []uint32
	for r, list := range lists {
		if len(list) > capacity {
			list = list[:capacity]
			truncated = append(truncated, uint32(r))
		}
		binary.LittleEndian.PutUint32(expected[countsAt+r*entry:], uint32(len(list)))
		for j, n := range list {
			binary.LittleEndian.PutUint32(expected[gap+(r*capacity+j)*entry:], uint32(n))
		}
	}

	request := e.request(layer, rows)
	request.ListBuffer = &gpu.ListBuffer{
		Lists:    gpu.Span{Memory: memory, Offset: gap},
		Counts:   gpu.Span{Memory: memory, Offset: uint64(countsAt)},
		Capacity: capacity,
	}
	got := e.run(request)
	written := make([]byte, size)
	if buffer.Read(0, written); !slices.Equal(written, expected) {
		e.t.Errorf("layer %d, capacity %d: the buffer holds something else than the lists", layer, capacity)
	}
	if !slices.Equal(got.Truncated, truncated) {
		e.t.Errorf("layer %d, capacity %d: truncated %v, want %v", layer, capacity, got.Truncated, truncated)
	}
	if len(got.Lists) != 0 {
		e.t.Errorf("layer %d: lists are in the message too", layer)
	}
	got.Lists = want.Lists
	same(e.t, "lists in a buffer", []*gpu.LayerResult{want}, []*gpu.LayerResult{got})
	if err := memory.Release(); err != nil {
		e.t.Error(err)
	}
}

// checkListsOnly leaves attention to the engine: lists as before, no output anywhere.
func (e *engine) checkListsOnly(layer int, rows []seq, want *gpu.LayerResult, inMemory bool) {
	e.t.Helper()
	size := len(want.Output)
	buffer := e.suite.memory.Alloc(e.t, size)
	expected := slices.Repeat([]byte{0xa5}, size)
	buffer.Write(0, expected)
	request := e.request(layer, rows)
	request.ListsOnly = true
	if inMemory {
		request.Output = &gpu.Tensor{Memory: must(e.lease.Import(e.t.Context(), buffer.Region(e.t, size, true)))(e.t)}
	}
	got := e.run(request)
	written := make([]byte, size)
	if buffer.Read(0, written); !slices.Equal(written, expected) || len(got.Output) != 0 {
		e.t.Errorf("layer %d: lists only, yet there is an output", layer)
	}
	got.Output = want.Output
	same(e.t, "lists only", []*gpu.LayerResult{want}, []*gpu.LayerResult{got})
}
