package none

import (
	"slices"
	"testing"

	"github.com/twilight-sidecar/twilight/selector"
)

func TestSelect(t *testing.T) {
	t.Parallel()
	s := Method().Default().New()
	if s.Shadow() != nil {
		t.Error("it keeps a shadow")
	}
	for _, test := range []struct {
		first, length int
		want          []int32
	}{
		{0, 1, []int32{0}},
		{0, 4, []int32{0, 1, 2, 3}},
		{3, 6, []int32{3, 4, 5}},
	} {
		// A budget and pins change nothing.
		row := &selector.Row{First: test.first, Len: test.length, TokenBudget: 1, PinFirst: true}
		if got := s.Select(nil, row); !slices.Equal(got, test.want) {
			t.Errorf("[%d, %d): %v, want %v", test.first, test.length, got, test.want)
		}
	}
}
