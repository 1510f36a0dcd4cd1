package capture

import (
	"math"
	"testing"

	"github.com/twilight-sidecar/twilight/testdata"
)

// TestShiftKeys: attention stays what it was, but for F16's last bits of the shifted channels.
func TestShiftKeys(t *testing.T) {
	t.Parallel()
	plain, shifted := mustDecode(t, testdata.SmolLM2), mustDecode(t, testdata.SmolLM2)
	if err := ShiftKeys(shifted, map[int]float32{3: 16, 60: -32}); err != nil {
		t.Fatal(err)
	}
	if got, want := shifted.Keys(1, 1)[3], plain.Keys(1, 1)[3]+16; math.Abs(float64(got-want)) > 0x1p-6 {
		t.Errorf("channel 3 of the first key is %v, want %v", got, want)
	}
	var err RelErr
	for layer := range plain.Layers {
		for head := range plain.QueryHeads {
			want, _ := plain.Dense(layer, 0, head, nil)
			got, _ := shifted.Dense(layer, 0, head, nil)
			out := make([]float32, len(got))
			for i := range out {
				out[i] = float32(got[i])
			}
			err.Add(out, want)
		}
	}
	if err.Value() > .01 {
		t.Errorf("shifted keys change the outputs by %v", err.Value())
	}
}

func TestShiftKeysRefuses(t *testing.T) {
	t.Parallel()
	for name, by := range map[string]map[int]float32{
		"no such channel": {64: 1}, "negative channel": {-1: 1}, "too far": {0: 1e6},
	} {
		if err := ShiftKeys(mustDecode(t, testdata.SmolLM2), by); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
