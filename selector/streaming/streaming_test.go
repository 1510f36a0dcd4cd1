package streaming

import (
	"errors"
	"math"
	"slices"
	"testing"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/selector"
)

// TestSelect: the set is exactly the sinks and the recent tokens, whatever else a row says.
func TestSelect(t *testing.T) {
	t.Parallel()
	span := func(from, to int32) (list []int32) {
		for p := from; p < to; p++ {
			list = append(list, p)
		}
		return list
	}
	for name, test := range map[string]struct {
		config      Config
		first, last int // of the row
		own         int // budget of the row
		want        []int32
	}{
		"sinks and recent": {Config{30, 4}, 0, 1000, 0, append(span(0, 4), span(970, 1000)...)},
		"left padding":     {Config{30, 4}, 33, 1000, 0, append(span(33, 37), span(970, 1000)...)},
		"no sinks":         {Config{30, 0}, 0, 1000, 0, span(970, 1000)},
		"own budget":       {Config{30, 4}, 0, 1000, 2, append(span(0, 4), span(998, 1000)...)},
		"they meet":        {Config{6, 4}, 0, 10, 0, span(0, 10)},
		"they overlap":     {Config{8, 4}, 0, 10, 0, span(0, 10)},
		"fewer than sinks": {Config{8, 4}, 2, 5, 0, span(2, 5)},
		"one token":        {Config{1, 0}, 7, 8, 0, span(7, 8)},
	} {
		for _, pin := range []bool{false, true} {
			row := &selector.Row{First: test.first, Len: test.last, TokenBudget: test.own, PinFirst: pin, PinCurrent: pin}
			s := test.config.New()
			if got := s.Select([]int32{-7}, row); got[0] != -7 || !slices.Equal(got[1:], test.want) {
				t.Errorf("%s, pins %v: %v, want %v after what was there", name, pin, got, test.want)
			}
			if s.Shadow() != nil {
				t.Error("it keeps a shadow")
			}
		}
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	if err := Method().Default().Validate(); err != nil {
		t.Errorf("default: %v", err)
	}
	for field, bad := range map[string][]Config{
		"token_budget": {{0, 4}, {-1, 4}, {math.MaxInt32 + 1, 4}},
		"num_sinks":    {{1, -1}, {1, math.MaxInt32 + 1}},
	} {
		for _, c := range bad {
			var f *fault.Error
			if err := c.Validate(); !errors.As(err, &f) || f.Field != field {
				t.Errorf("%+v: error %v, want one about %s", c, err, field)
			}
		}
	}
}
