package telemetry

import (
	"sync"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/pipeline"
)

// Method is what a config chose, by the methods' names.
type Method struct{ Selector, Estimator, Pruner string }

// seriesKey names a series; overLayer stands for all beyond maxSeries.
type seriesKey struct {
	Method
	layer int
}

const overLayer = -1

// The paths and reasons that are counted, indexed by their values.
var (
	pathNames   = [...]string{"", "sparse", "dense", "void"}
	reasonNames = [...]string{
		"", "configured", "skipped_layer", "short_context", "kept_nearly_all", "unsupported_shape", "empty", "bad_row", "not_finite",
	}
)

// name is that of a path or reason, of a device that may know more of them than we do.
func name[T ~uint8](names []string, value T) string {
	if int(value) < len(names) {
		return names[value]
	}
	return "other"
}

// The stages, in the order that a row takes.
const (
	stageIndex = iota
	stageSelect
	stagePrune
	stageAttend
	stages
)

var stageNames = [stages]string{"index", "select", "prune", "attend"}

// busy are the stages' times in seconds.
func busy(t *gpu.Timing) [stages]float64 {
	return [stages]float64{t.Index.Seconds(), t.Select.Seconds(), t.Prune.Seconds(), t.Attend.Seconds()}
}

// series adds up what a method did in a layer, over all leases.
type series struct {
	mu                                 sync.Mutex
	kept, candidates, valid            histogram
	mass, coverage, trueMass, outError histogram
	duration                           histogram
	stages                             [stages]histogram
	rows                               [len(pathNames) + 1][len(reasonNames) + 1]uint64
	readCache, readShadow, readDense   uint64
}

func newSeries() *series {
	s := &series{
		kept: newHistogram(tokenBounds), candidates: newHistogram(tokenBounds), valid: newHistogram(tokenBounds),
		mass: newHistogram(shareBounds), coverage: newHistogram(shareBounds),
		trueMass: newHistogram(shareBounds), outError: newHistogram(errorBounds),
		duration: newHistogram(secondsBounds),
	}
	for i := range s.stages {
		s.stages[i] = newHistogram(secondsBounds)
	}
	return s
}

// add takes a layer's result. valid holds the sequences' valid tokens.
func (s *series) add(r *gpu.LayerResult, valid []int32, dense uint64, m *moment) {
	s.mu.Lock()
	defer s.mu.Unlock()
	lists := listsOf(r, len(valid))
	for i := range lists * len(valid) {
		path, reason := r.Paths[i], r.Reasons[i]
		s.rows[min(int(path), len(pathNames))][min(int(reason), len(reasonNames))]++
		if path == pipeline.Void {
			continue
		}
		s.kept.add(float64(r.Kept[i]), m)
		s.candidates.add(float64(r.Candidates[i]), m)
		s.valid.add(float64(valid[i/lists]), m)
	}
	addShares(&s.mass, r.Mass, valid, m)
	addShares(&s.coverage, r.Coverage, valid, m)
	addShares(&s.trueMass, r.TrueMass, nil, m)
	addShares(&s.outError, r.OutputError, nil, m)
	s.duration.add(r.Timing.Wall.Seconds(), m)
	for i, seconds := range busy(&r.Timing) {
		if seconds > 0 {
			s.stages[i].add(seconds, m)
		}
	}
	s.readCache += r.Read.Cache
	s.readShadow += r.Read.Shadow
	s.readDense += dense
}

// listsOf is how many lists each of so many sequences has in a result: none if it lacks a column.
func listsOf(r *gpu.LayerResult, sequences int) int {
	n := len(r.Kept)
	if sequences == 0 || len(r.Candidates) != n || len(r.Paths) != n || len(r.Reasons) != n {
		return 0
	}
	return n / sequences
}

// addShares takes those values that are known. valid, if not empty, tells which sequences are void: values
// then has the same number for each.
func addShares(h *histogram, values []float32, valid []int32, m *moment) {
	for i, v := range values {
		if v == v && (len(valid) == 0 || valid[i*len(valid)/len(values)] > 0) {
			h.add(float64(v), m)
		}
	}
}
