package keepall

import (
	"slices"
	"testing"

	"github.com/twilight-sidecar/twilight/pruner"
)

func TestPrune(t *testing.T) {
	t.Parallel()
	c := &pruner.Candidates{Logits: []float32{-90, 3, 0}, P: .1}
	if got := Method().Default().New().Prune([]int32{-7}, c); !slices.Equal(got, []int32{-7, 0, 1, 2}) {
		t.Errorf("kept %v, want 0, 1, 2 after what was there", got)
	}
}
