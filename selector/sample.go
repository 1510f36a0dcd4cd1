package selector

import "fmt"

// Sample is what attention saw of a text in one layer, after RoPE: what methods are calibrated on.
type Sample struct {
	Layer                    int // the model's index
	KVHeads, QueryHeads, Dim int

	Keys    []float32 // [KVHeads][Tokens][Dim]
	Queries []float32 // [n][QueryHeads][Dim], those of the text's last n tokens, 1 <= n <= Tokens
}

// Check reports sizes that do not fit each other.
func (s *Sample) Check() error {
	if s.Layer < 0 || s.KVHeads < 1 || s.Dim < 1 || s.QueryHeads < 1 || s.QueryHeads%s.KVHeads != 0 {
		return fmt.Errorf(
			"sample of layer %d with %d query heads, %d KV heads and %d channels, expected a positive multiple of heads",
			s.Layer, s.QueryHeads, s.KVHeads, s.Dim)
	}
	tokens, n := s.Tokens(), s.Asking()
	if n < 1 || tokens < n || len(s.Keys) != tokens*s.KVHeads*s.Dim || len(s.Queries) != n*s.QueryHeads*s.Dim {
		return fmt.Errorf(
			"sample of layer %d with %d values of keys and %d of queries, expected whole tokens and a key for each query",
			s.Layer, len(s.Keys), len(s.Queries))
	}
	return nil
}

// Tokens is how many tokens have keys.
func (s *Sample) Tokens() int { return len(s.Keys) / (s.KVHeads * s.Dim) }

// Asking is how many tokens have queries.
func (s *Sample) Asking() int { return len(s.Queries) / (s.QueryHeads * s.Dim) }

// Head returns the keys of a KV head, [Tokens][Dim].
func (s *Sample) Head(kvHead int) []float32 {
	n := s.Tokens() * s.Dim
	return s.Keys[kvHead*n:][:n]
}

// Query returns the query of the i-th asking token, token Tokens-Asking+i, by a query head, [Dim].
func (s *Sample) Query(i, head int) []float32 {
	return s.Queries[(i*s.QueryHeads+head)*s.Dim:][:s.Dim]
}

// Group is how many query heads share a KV head.
func (s *Sample) Group() int { return s.QueryHeads / s.KVHeads }
