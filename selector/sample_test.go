package selector_test

import (
	"testing"

	"github.com/twilight-sidecar/twilight/selector"
)

func TestSample(t *testing.T) {
	t.Parallel()
	count := func(n int) []float32 {
		x := make([]float32, n)
		for i := range x {
			x[i] = float32(i)
		}
		return x
	}
	good := selector.Sample{KVHeads: 2, QueryHeads: 6, Dim: 4, Keys: count(2 * 5 * 4), Queries: count(3 * 6 * 4)}
	if err := good.Check(); err != nil {
		t.Fatal(err)
	}
	if good.Tokens() != 5 || good.Asking() != 3 || good.Group() != 3 {
		t.Errorf("%d tokens, %d asking, groups of %d, want 5, 3 and 3", good.Tokens(), good.Asking(), good.Group())
	}
	if k, q := good.Head(1), good.Query(2, 5); len(k) != 20 || k[0] != 20 || len(q) != 4 || q[0] != 68 {
		t.Errorf("head 1 is %v, query 5 of token 2 is %v", k, q)
	}
	for name, change := range map[string]func(s *selector.Sample){
		"no KV heads":         func(s *selector.Sample) { s.KVHeads = 0 },
		"no query heads":      func(s *selector.Sample) { s.QueryHeads = 0 },
		"no channels":         func(s *selector.Sample) { s.Dim = 0 },
		"no multiple":         func(s *selector.Sample) { s.QueryHeads = 5 },
		"negative layer":      func(s *selector.Sample) { s.Layer = -1 },
		"part of a key":       func(s *selector.Sample) { s.Keys = s.Keys[1:] },
		"part of a query":     func(s *selector.Sample) { s.Queries = s.Queries[1:] },
		"no keys":             func(s *selector.Sample) { s.Keys = nil },
		"no queries":          func(s *selector.Sample) { s.Queries = nil },
		"queries without key": func(s *selector.Sample) { s.Queries = count(6 * 6 * 4) },
	} {
		bad := good
		change(&bad)
		if bad.Check() == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
