package exact

import (
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pruner"
)

// Config has no keys.
type Config struct{}

// Method is the entry for a registry.
func Method() pruner.EstimatorMethod {
	return pruner.EstimatorMethod{Type: "none", Default: func() pruner.EstimatorConfig { return &Config{} }}
}

// Validate implements pruner.EstimatorConfig.
func (*Config) Validate() error { return nil }

// New implements pruner.EstimatorConfig.
func (*Config) New() pruner.Estimator { return exact{} }

type exact struct{}

func (exact) Shadow() kv.Shadow { return nil }
func (exact) Exact() bool       { return true }

func (exact) Logits(logits [][]float32, row *pruner.Row, positions []int32) {
	const block = 256 // tokens: their places stay in the first cache
	for at := 0; at < len(positions); at += block {
		n := min(block, len(positions)-at)
		row.Keys.LocateAt(&row.Vectors, positions[at:min(at+n+kv.Ahead, len(positions))])
		row.Vectors.Dots(logits, at, row.Queries, n)
	}
}
