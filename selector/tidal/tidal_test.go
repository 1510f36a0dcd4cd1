package tidal

import (
	"errors"
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/kvtest"
	"github.com/twilight-sidecar/twilight/internal/selectortest"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/selector"
	"github.com/twilight-sidecar/twilight/selector/oracle"
)

// TestReuse asks layers in any order, some twice, and holds each against what the last selection of its
// stretch found, by exact top-k.
func TestReuse(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		const layers = 12
		e := selectortest.Draw(t)
		config := Config{
			TokenBudget:  rapid.IntRange(1, 400).Draw(t, "token_budget"),
			SparsityRate: rapid.SampledFrom([]float64{-1, .1, 1}).Draw(t, "sparsity_rate"),
		}
		for layer := range layers {
			if rapid.Bool().Draw(t, "reselects") {
				config.ReselectionLayers = append(config.ReselectionLayers, layer)
			}
		}
		top := (&oracle.Config{TokenBudget: config.TokenBudget, SparsityRate: config.SparsityRate}).New()
		s, all := config.New(), selector.All(nil, &e.Row)
		var carry selector.Carry
		var left []int32 // by the layer leftBy
		leftBy := -1
		for range 20 {
			e.Layer = rapid.IntRange(0, layers-1).Draw(t, "layer")
			e.Queries[0][0]++ // each layer asks something else
			stretch := -1
			for _, layer := range config.ReselectionLayers {
				if layer <= e.Layer {
					stretch = layer
				}
			}
			e.Carry = &carry
			want := all
			if stretch >= 0 && stretch <= leftBy && leftBy < e.Layer {
				want = left
			} else if selected := top.Select(nil, &e.Row); stretch >= 0 && len(selected) < len(all) {
				left, leftBy = selected, e.Layer
			}
			if got := s.Select([]int32{-7}, &e.Row); got[0] != -7 || !slices.Equal(got[1:], want) {
				t.Fatalf("layer %d: selected %v, want %v after what was there", e.Layer, got, want)
			}
		}
		e.Carry = nil
		if got := s.Select(nil, &e.Row); !slices.Equal(got, all) {
			t.Fatalf("without what others left: selected %v, want all", got)
		}
	})
}

// TestStep: through the layers of a real step the first selects, and all others reuse its list.
func TestStep(t *testing.T) {
	t.Parallel()
	c := selectortest.Capture(t)
	config := Default()
	config.TokenBudget, config.ReselectionLayers = 512, []int{c.Layers[0].Index}
	s := config.New()
	for kvHead := range c.KVHeads {
		var carry selector.Carry
		for l := range c.Layers {
			row := &selector.Row{
				Layer: c.Layers[l].Index, Head: kvHead, Dim: c.KDim, Len: c.N + 1, Carry: &carry,
				Keys: kvtest.Reader(kv.F16, c.Keys(l, kvHead), c.KDim),
			}
			for h := range c.Group() {
				row.Queries = append(row.Queries, c.Query(l, 0, kvHead*c.Group()+h))
			}
			got := s.Select(nil, row)
			if l == 0 && len(got) != row.Len || l > 0 && !slices.Equal(got, carry.List) {
				t.Errorf("layer %d: %d candidates of %d tokens, %d were left", row.Layer, len(got), row.Len, len(carry.List))
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
		"token_budget":          {{0, -1, []int{2}}},
		"sparsity_rate":         {{1, 2, []int{2}}},
		"reselection_layers":    {{1, -1, nil}},
		"reselection_layers[0]": {{1, -1, []int{-1}}, {1, -1, []int{math.MaxInt32 + 1}}},
		"reselection_layers[1]": {{1, -1, []int{2, 2}}, {1, -1, []int{13, 2}}},
	} {
		for _, c := range bad {
			var f *fault.Error
			if err := c.Validate(); !errors.As(err, &f) || f.Field != field {
				t.Errorf("%+v: error %v, want one about %s", c, err, field)
			}
		}
	}
}

func TestNoAllocation(t *testing.T) {
	const dim, length = 128, 1000
	keys := make([]float32, length*dim)
	for i := range keys {
		keys[i] = float32(i % 11)
	}
	var carry selector.Carry
	row := &selector.Row{
		Queries: [][]float32{keys[:dim], keys[dim : 2*dim]}, Dim: dim, Len: length, TokenBudget: 300,
		Keys: kvtest.Reader(kv.F16, keys, dim), PinFirst: true, Carry: &carry,
	}
	s := Default().New()
	var dst []int32
	kvtest.NoAllocation(t, func() {
		for _, row.Layer = range []int{2, 3, 13, 14} {
			dst = s.Select(dst[:0], row)
		}
	})
}
