package telemetry

import (
	"time"

	"go.opentelemetry.io/otel/attribute"
)

// WorkerState is what a worker, a process that serves a lease on a GPU, is at.
type WorkerState int32

// The states. NoWorker is before and after them.
const (
	NoWorker WorkerState = iota
	WorkerStarting
	WorkerSpare
	WorkerLeased
	WorkerEnding
	workerStates
)

var workerStateNames = [workerStates]string{"", "starting", "spare", "leased", "ending"}

// workers adds up what becomes of workers. Its metrics guard it.
type workers struct {
	states [workerStates]int64
	starts histogram
	opens  [2]histogram // cold, warm
	ends   map[string]uint64
	gpus   map[string]gpuState
}

type gpuState struct{ usable, mps bool }

var warmth = [2]string{"cold", "warm"}

func newWorkers() workers {
	return workers{
		starts: newHistogram(secondsBounds), opens: [2]histogram{newHistogram(secondsBounds), newHistogram(secondsBounds)},
		ends: make(map[string]uint64), gpus: make(map[string]gpuState),
	}
}

// workers runs change under the lock; a nil Telemetry does not.
func (t *Telemetry) workers(change func(w *workers)) {
	if t == nil {
		return
	}
	t.metrics.mu.Lock()
	defer t.metrics.mu.Unlock()
	change(&t.metrics.workers)
}

// MoveWorker tells that a worker goes from one state to another.
func (t *Telemetry) MoveWorker(from, to WorkerState) {
	t.workers(func(w *workers) {
		w.states[from]--
		w.states[to]++
	})
}

// StartedWorker tells how long a worker took from its start until it could serve.
func (t *Telemetry) StartedWorker(took time.Duration) {
	t.workers(func(w *workers) { w.starts.add(took.Seconds(), &moment{}) })
}

// LeasedWorker tells how long a lease took to be opened on a worker: on a spare, if warm, or on one that was
// started for it.
func (t *Telemetry) LeasedWorker(warm bool, took time.Duration) {
	t.workers(func(w *workers) {
		i := 0
		if warm {
			i = 1
		}
		w.opens[i].add(took.Seconds(), &moment{})
	})
}

// EndedWorker tells in which of a few ways a worker ended.
func (t *Telemetry) EndedWorker(reason string) {
	t.workers(func(w *workers) { w.ends[reason]++ })
}

// GPU tells how a GPU stands: whether leases can be opened on it, and whether its workers are an MPS server's.
func (t *Telemetry) GPU(id string, usable, mps bool) {
	t.workers(func(w *workers) { w.gpus[id] = gpuState{usable, mps} })
}

// page tells nothing where there are no GPUs.
func (w *workers) page(p *page) {
	if len(w.gpus) == 0 {
		return
	}
	for state := WorkerStarting; state < workerStates; state++ {
		p.sum(metricWorkers, false, w.states[state], attribute.String(attrWorkerState, workerStateNames[state]))
	}
	p.histogram(metricWorkerStart, &w.starts)
	for i := range w.opens {
		p.histogram(metricWorkerOpen, &w.opens[i], attribute.String(attrWorkerStart, warmth[i]))
	}
	for reason, n := range w.ends {
		p.sum(metricWorkerEnds, true, int64(n), attribute.String(attrReason, reason))
	}
	for id, g := range w.gpus {
		device := attribute.String(attrDevice, id)
		p.gauge(metricGPUUsable, number(g.usable), device)
		p.gauge(metricGPUMPS, number(g.mps), device)
	}
}

func number(b bool) int64 {
	if b {
		return 1
	}
	return 0
}
