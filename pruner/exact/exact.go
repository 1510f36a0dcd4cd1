package exact

import (
	"slices"

	"github.com/viterin/vek/vek32"

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
	const block = 64 // tokens: their keys stay in the first cache for all queries
	row.Scratch = slices.Grow(row.Scratch[:0], block*row.Dim)
	at := 0
	for some := range slices.Chunk(positions, block) {
		keys := row.Scratch[:len(some)*row.Dim]
		row.Keys.Gather(keys, some)
		for i, query := range row.Queries {
			vek32.MatMul_Into(logits[i][at:at+len(some)], keys, query, row.Dim)
		}
		at += len(some)
	}
}
