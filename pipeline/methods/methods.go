// Package methods lists all methods that a config can name. A new method is entered here, and only
// here.
package methods

import (
	"errors"

	"github.com/twilight-sidecar/twilight/internal/registry"
	"github.com/twilight-sidecar/twilight/pipeline"
	"github.com/twilight-sidecar/twilight/pruner/exact"
	"github.com/twilight-sidecar/twilight/pruner/keepall"
	"github.com/twilight-sidecar/twilight/pruner/minmaxquant"
	"github.com/twilight-sidecar/twilight/pruner/threshold"
	"github.com/twilight-sidecar/twilight/pruner/topp"
	"github.com/twilight-sidecar/twilight/selector/none"
	"github.com/twilight-sidecar/twilight/selector/quest"
)

// New makes the registries. It fails if two methods share a name.
func New() (*pipeline.Methods, error) {
	compressors, err1 := registry.New("compressor", noCompressor())
	selectors, err2 := registry.New("selector", none.Method(), quest.Method())
	estimators, err3 := registry.New("weight_estimator", exact.Method(), minmaxquant.Method())
	pruners, err4 := registry.New("weight_pruner", keepall.Method(), threshold.Method(), topp.Method())
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return nil, err
	}
	return &pipeline.Methods{
		Compressors: compressors,
		Selectors:   selectors,
		Estimators:  estimators,
		Pruners:     pruners,
	}, nil
}

// noCompressor leaves the cache as the prefill made it.
func noCompressor() registry.Method[pipeline.Compressor] {
	return registry.Method[pipeline.Compressor]{
		Type:    "none",
		Default: func() pipeline.Compressor { return &uncompressed{} },
	}
}

type uncompressed struct{}

func (*uncompressed) Validate() error { return nil }
