// Package methods lists all methods that a config can name. A new method is entered here, and only
// here.
package methods

import (
	"errors"

	nocompressor "github.com/twilight-sidecar/twilight/compressor/none"
	"github.com/twilight-sidecar/twilight/compressor/snapkv"
	"github.com/twilight-sidecar/twilight/internal/registry"
	"github.com/twilight-sidecar/twilight/pipeline"
	"github.com/twilight-sidecar/twilight/pruner/exact"
	"github.com/twilight-sidecar/twilight/pruner/keepall"
	"github.com/twilight-sidecar/twilight/pruner/maxquant"
	"github.com/twilight-sidecar/twilight/pruner/minmaxquant"
	"github.com/twilight-sidecar/twilight/pruner/threshold"
	"github.com/twilight-sidecar/twilight/pruner/topp"
	"github.com/twilight-sidecar/twilight/selector/adakv"
	"github.com/twilight-sidecar/twilight/selector/ds"
	"github.com/twilight-sidecar/twilight/selector/duo"
	"github.com/twilight-sidecar/twilight/selector/h2o"
	"github.com/twilight-sidecar/twilight/selector/magicpig"
	"github.com/twilight-sidecar/twilight/selector/none"
	"github.com/twilight-sidecar/twilight/selector/oracle"
	"github.com/twilight-sidecar/twilight/selector/pqcache"
	"github.com/twilight-sidecar/twilight/selector/pyramidkv"
	"github.com/twilight-sidecar/twilight/selector/quest"
	"github.com/twilight-sidecar/twilight/selector/sparq"
	"github.com/twilight-sidecar/twilight/selector/streaming"
	"github.com/twilight-sidecar/twilight/selector/tidal"
)

// New makes the registries. It fails if two methods share a name.
func New() (*pipeline.Methods, error) {
	compressors, err1 := registry.New("compressor", nocompressor.Method(), snapkv.Method())
	selectors, err2 := registry.New("selector",
		none.Method(), quest.Method(), ds.Method(), streaming.Method(), sparq.Method(), oracle.Method(),
		pqcache.Method(), magicpig.Method(), duo.Method(), tidal.Method(), h2o.Method(), pyramidkv.Method(), adakv.Method())
	estimators, err3 := registry.New("weight_estimator", exact.Method(), minmaxquant.Method(), maxquant.Method())
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

// Inline puts into a config what the files hold that it names, as a daemon never opens a file for an
// engine: what a client does before it sends one. read gets the paths as the config has them.
func Inline(config []byte, read func(path string) ([]byte, error)) ([]byte, error) {
	config, err := ds.Inline(config, read)
	if err != nil {
		return nil, err
	}
	return duo.Inline(config, read)
}
