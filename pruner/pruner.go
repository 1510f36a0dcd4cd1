// Package pruner holds what weight estimators and pruners share. An estimator guesses the candidates'
// attention logits without reading their exact keys; a pruner cuts candidates (I0) down to the tokens
// that attention runs over (I1). Each method is a folder below this one.
package pruner

import "github.com/twilight-sidecar/twilight/kv"

// Estimator guesses logits. Implementations hold configuration only and are safe for concurrent use.
type Estimator interface {
	// Shadow returns what the method keeps of the keys, nil for nothing.
	Shadow() kv.Shadow

	// Exact says that logits are those of the keys themselves.
	Exact() bool

	// Logits writes the estimate of Queries[n] . key(positions[i]) to logits[n][i], before softcap.
	// positions ascend.
	Logits(logits [][]float32, row *Row, positions []int32)
}

// Row is what an estimator may look at: one KV head of one sequence and the query heads that ask.
type Row struct {
	// Queries is [n][Dim], each multiplied by the softmax scale.
	Queries [][]float32
	Dim     int
	// Keys reads the row's exact keys; only exact estimators may.
	Keys kv.Reader
	// Records reads the estimator's own shadow; nil if it declares none.
	Records kv.Records
	// Scratch and Vectors are reused by the method from call to call with this Row.
	Scratch []float32
	Vectors kv.Vectors
}

// Pruner cuts one query head's candidates. Implementations hold configuration only and are safe for
// concurrent use.
type Pruner interface {
	// Prune appends to dst the indices into c.Logits of the kept candidates, ascending, at least one.
	Prune(dst []int32, c *Candidates) []int32
}

// Limiter is a Pruner with Limits, of which Prune knows nothing but the thresholds.
type Limiter interface {
	Pruner
	// Budget is the least and the largest number of tokens in a list; most is 0 where there is no limit.
	Budget() (least, most int)
	// Fits reports what keeps the limits from serving a layer of a model, by the model's index, as a
	// *fault.Error whose field is the config's key at fault.
	Fits(layer int, g *kv.Geometry) error
}

// Candidates is one query head's view of its candidates.
type Candidates struct {
	// Layer and QueryHead are the model's indices.
	Layer, QueryHead int
	// Logits after scale and softcap, one per candidate, finite, and Weights, what softmax makes of
	// them before normalisation: exp(logit - the largest logit), in (0, 1].
	Logits, Weights []float32
	// FirstLogit is that of the sequence's first valid token, candidate or not.
	FirstLogit float32
	// P, if > 0, replaces the configured share.
	P float32
	// Outside is the estimated softmax weight of the tokens that are no candidates, relative to the
	// weight of all candidates; 0 unless p is to be taken over all tokens.
	Outside float64
	// Scratch is reused by the method from call to call.
	Scratch []int32
}
