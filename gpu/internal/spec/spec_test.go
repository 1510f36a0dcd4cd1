package spec

import (
	"errors"
	"math"
	"math/bits"
	"testing"

	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
)

// TestTensor: what is accepted has all its vectors apart and reaches as far as told, element by element.
func TestTensor(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		rows, heads, dim := rapid.IntRange(1, 5).Draw(t, "rows"), rapid.IntRange(1, 5).Draw(t, "heads"), rapid.IntRange(1, 6).Draw(t, "dim")
		stride := rapid.Map(rapid.Uint64Range(0, 60), func(n uint64) uint64 { return 2 * n })
		in := &gpu.Tensor{RowStride: stride.Draw(t, "row stride"), HeadStride: stride.Draw(t, "head stride")}
		row, head, size, err := Tensor(in, rows, heads, dim, kv.F16, "x")
		used, overlaps, reached := map[uint64]bool{}, false, uint64(0)
		at := func(given, packed uint64) uint64 {
			if given == 0 {
				return packed
			}
			return given
		}
		wantHead := at(in.HeadStride, uint64(2*dim))
		wantRow := at(in.RowStride, uint64(heads)*wantHead)
		for b := range uint64(rows) {
			for h := range uint64(heads) {
				for d := range uint64(dim) {
					byteAt := b*wantRow + h*wantHead + 2*d
					overlaps = overlaps || used[byteAt]
					used[byteAt] = true
					reached = max(reached, byteAt+2)
				}
			}
		}
		switch {
		case err == nil && overlaps:
			t.Fatalf("[%d, %d, %d] by %d and %d overlaps", rows, heads, dim, wantRow, wantHead)
		case err == nil && size != reached:
			t.Fatalf("[%d, %d, %d] by %d and %d reaches %d bytes, told were %d", rows, heads, dim, wantRow, wantHead, reached, size)
		case err == nil && (rows > 1 && row != wantRow || heads > 1 && head != wantHead):
			t.Fatalf("strides %d and %d, want %d and %d", row, head, wantRow, wantHead)
		case err != nil && in.RowStride == 0 && in.HeadStride == 0:
			t.Fatalf("packed: %v", err)
		}
	})
}

// TestHugeStrides: no product wraps around.
func TestHugeStrides(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		rows := rapid.IntRange(2, math.MaxInt32).Draw(t, "rows")
		in := &gpu.Tensor{RowStride: rapid.Uint64().Draw(t, "row stride") &^ 3, HeadStride: 64}
		_, _, size, err := Tensor(in, rows, 1, 16, kv.F32, "x")
		if err != nil {
			return
		}
		high, low := bits.Mul64(in.RowStride, uint64(rows-1))
		if in.RowStride == 0 {
			low = 64 * uint64(rows-1)
		}
		if high != 0 || size != low+64 {
			t.Fatalf("%d rows of stride %d reach %d bytes", rows, in.RowStride, size)
		}
	})
}

func TestOverrides(t *testing.T) {
	t.Parallel()
	for field, req := range map[string]*gpu.LayerRequest{
		"":             {P: []float32{0, 1}, TokenBudget: []uint32{0, 7}},
		"p":            {P: []float32{1}},
		"p[1]":         {P: []float32{1, float32(math.NaN())}},
		"token_budget": {TokenBudget: []uint32{1, 2, 3}},
	} {
		refused(t, Overrides(req, 2), field)
	}
}

// refused checks which field an error names; "" is that of no error.
func refused(t *testing.T, err error, field string) {
	t.Helper()
	var f *fault.Error
	if (err != nil) != (field != "") || err != nil && (!errors.As(err, &f) || f.Field != field) {
		t.Errorf("%q: %v", field, err)
	}
}

func TestArmed(t *testing.T) {
	t.Parallel()
	layers := []gpu.ArmedLayer{{}}
	for field, step := range map[string]gpu.ArmedStep{
		"":                      {ID: 1, Layers: layers, WaitTimeout: gpu.MaxWaitTimeout},
		"step_id":               {Layers: layers},
		"armed.layers":          {ID: 1},
		"armed.wait_timeout_ms": {ID: 1, Layers: layers, WaitTimeout: gpu.MaxWaitTimeout + 1},
	} {
		refused(t, Armed(&step), field)
	}
}

// A batch of memory is told with the bytes of each part, or refused by the field that is wrong.
func TestBatch(t *testing.T) {
	t.Parallel()
	somewhere := gpu.Span{Memory: anywhere{}}
	limits := gpu.Limits{Batch: 3, SequenceTokens: 100}
	batch := func(change func(*gpu.DeviceBatch)) *gpu.DeviceBatch {
		b := &gpu.DeviceBatch{Rows: 3, TableStride: 4, NumSlots: 5, MaxLength: 64, Slots: somewhere}
		change(b)
		return b
	}
	parts, err := Batch(batch(func(*gpu.DeviceBatch) {}), 16, &limits)
	refused(t, err, "")
	for i, size := range [...]uint64{Lengths: 12, Table: 48, Slots: 40, FirstValid: 12} {
		if parts[i].Size != size {
			t.Errorf("%s has %d bytes, want %d", parts[i].Name, parts[i].Size, size)
		}
	}
	_, err = Batch(batch(func(*gpu.DeviceBatch) {}), 8, &limits)
	refused(t, err, "slots")
	for field, change := range map[string]func(*gpu.DeviceBatch){
		"batch":        func(b *gpu.DeviceBatch) { b.Rows = 4 },
		"max_length":   func(b *gpu.DeviceBatch) { b.MaxLength = 101 },
		"table_stride": func(b *gpu.DeviceBatch) { b.TableStride = 3 },
		"num_slots":    func(b *gpu.DeviceBatch) { b.NumSlots = -1 },
		"slots":        func(b *gpu.DeviceBatch) { b.Slots = gpu.Span{} },
	} {
		_, err := Batch(batch(change), 16, &limits)
		refused(t, err, field)
	}
}

// anywhere is memory of which only that it is there counts.
type anywhere struct{ gpu.Memory }
