package host

import (
	"context"
	"math/bits"
	"sync/atomic"
	"time"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
)

// cache is a registered cache. The lease's lock guards it; while a job runs, workers read all of it and
// write what belongs to their task.
type cache struct {
	lease   *lease
	layers  []layer
	byModel map[int]int // the model's layer index to that in layers
	tracker *kv.Tracker
	paging  kv.TrackerConfig
	stepped bool
	closed  bool

	arena               []byte
	taken               uint64  // of the device's bytes
	selector, estimator *shadow // nil for a method that keeps nothing
	carries             carries // nil for a method that carries nothing
	states              *states // nil for methods that remember nothing
	stateBytes          uint64  // that carries and states may take
	job                 *job
	armed               *armer
	indexing            indexing
	call                call
	// Methods bound once, so that calls allocate nothing.
	trainTask, indexTask, queryTask, windowTask, observeTask task
	weighTask, shareTask, attendTask                         task
}

var _ gpu.Cache = (*cache)(nil)

// indexing is what index's tasks share.
type indexing struct {
	layer   int
	rows    []kv.SeqRow
	work    []kv.ChunkWork
	drifted atomic.Uint64
	busy    atomic.Int64 // nanoseconds

	// Training: of this shadow's head records, on the first level valid tokens of row.
	shadow *shadow
	row    int
	level  int
}

func (c *cache) ShadowBytes() uint64 { return uint64(len(c.arena)) + c.stateBytes }

func (c *cache) Step(ctx context.Context, step *kv.Step) error {
	c.lease.mu.Lock()
	defer c.lease.mu.Unlock()
	if err := c.usable(ctx); err != nil {
		return err
	}
	if err := c.armed.idle(); err != nil {
		return err
	}
	return c.declare(step)
}

// check tells whether declare would accept a step now.
func (c *cache) check(step *kv.Step) error {
	if c.states != nil {
		if err := c.states.check(step); err != nil {
			return err
		}
	}
	return c.tracker.Check(step)
}

// declare makes a batch the current one.
func (c *cache) declare(step *kv.Step) error {
	if c.states != nil {
		if err := c.states.check(step); err != nil {
			return err
		}
	}
	if err := c.tracker.Step(step); err != nil {
		return err
	}
	if c.states != nil {
		c.states.begin(step, c.tracker.Rows(), c.layers[0].k.PageSize)
	}
	c.stepped = true
	if c.lease.needs.Carry {
		c.carries.begin(len(step.Lengths) * c.lease.geometry.KVHeads * c.lease.lists)
	}
	return nil
}

func (c *cache) usable(ctx context.Context) error {
	if c.closed {
		return errClosed
	}
	return ctx.Err()
}

func (c *cache) Index(ctx context.Context) (kv.IndexStats, error) {
	c.lease.mu.Lock()
	defer c.lease.mu.Unlock()
	var stats kv.IndexStats
	if err := c.usable(ctx); err != nil {
		return stats, err
	}
	if err := c.armed.idle(); err != nil {
		return stats, err
	}
	if !c.stepped {
		return stats, errNoStep
	}
	for i := range c.layers {
		if _, err := c.indexLayer(ctx, i, &stats); err != nil {
			return stats, c.lease.explain(err, c.layers[i].extents[:]...)
		}
	}
	return stats, nil
}

var errNoStep = fault.Newf(fault.Precondition, "step_id", "the cache has no step yet: declare one first")

// indexLayer brings the shadow of a layer up to date with the current step, adds to stats what it did,
// and returns the time that took, summed over workers. After an error the layer counts as not indexed
// at all.
func (c *cache) indexLayer(ctx context.Context, i int, stats *kv.IndexStats) (time.Duration, error) {
	if c.selector == nil && c.estimator == nil || c.layers[i].slot == noSlot {
		return 0, nil
	}
	x := &c.indexing
	x.layer, x.rows = i, c.tracker.Rows()
	x.drifted.Store(0)
	x.busy.Store(0)
	for _, s := range []*shadow{c.selector, c.estimator} {
		if s == nil || !x.reaches(s) {
			continue
		}
		c.tracker.Invalidate(i)
		if err := c.lease.device.pool.do(ctx, c.job, s.heads, c.trainTask); err != nil {
			s.forget(i)
			return 0, err
		}
		s.trained[i] = x.level
		stats.StatisticsRefreshed++
	}

	x.work = c.tracker.Pending(x.work[:0], i)
	if err := c.lease.device.pool.do(ctx, c.job, len(x.work), c.indexTask); err != nil {
		c.tracker.Invalidate(i)
		return 0, err
	}
	for _, w := range x.work {
		stats.TokensIndexed += uint64(bits.OnesCount16(w.Fresh))
	}
	stats.TokensClaimed += c.tracker.Claimed(i)
	stats.ChunksDrifted += x.drifted.Load()
	return time.Duration(x.busy.Load()), nil
}

// reaches tells whether a sequence reaches a training level that s has not, and sets up the training:
// on the first sequence to reach the highest.
func (x *indexing) reaches(s *shadow) bool {
	x.shadow, x.level = s, s.trained[x.layer]
	reached := false
	for b, row := range x.rows {
		if level := s.level(row.Len - row.First); level > x.level {
			x.row, x.level, reached = b, level, true
		}
	}
	return reached
}

func (c *cache) trainHead(worker, head int) error {
	start := time.Now()
	x := &c.indexing
	row := &x.rows[x.row]
	keys := c.lease.scratch[worker].keyBuffer(x.level * x.shadow.dim)
	c.layers[x.layer].k.Reader(row.Table, head).Read(keys, row.First, row.First+x.level)
	x.shadow.method.Train(x.shadow.head(x.layer, head), keys, x.shadow.dim)
	x.busy.Add(int64(time.Since(start)))
	return nil
}

func (c *cache) indexChunk(worker, i int) error {
	start := time.Now()
	x := &c.indexing
	work, k := &x.work[i], &c.layers[x.layer].k
	table, first := x.rows[work.Row].Table, work.Chunk*kv.ChunkTokens
	from, to := bits.TrailingZeros16(work.Valid), bits.Len16(work.Valid)
	keys := c.lease.scratch[worker].keyBuffer(kv.ChunkTokens * k.Dim)
	drifted := false
	for head := range c.lease.geometry.KVHeads {
		k.Reader(table, head).Read(keys[from*k.Dim:to*k.Dim], first+from, first+to)
		for _, s := range []*shadow{c.selector, c.estimator} {
			if s != nil && s.method.Index(s.head(x.layer, head), s.chunk(x.layer, head, work.ID),
				keys, k.Dim, work.Valid, work.Fresh) {
				drifted = true
			}
		}
	}
	if drifted {
		x.drifted.Add(1)
	}
	x.busy.Add(int64(time.Since(start)))
	return nil
}

func (c *cache) Close() error {
	c.armed.close()
	c.lease.mu.Lock()
	defer c.lease.mu.Unlock()
	return c.free()
}

// free is Close under the lease's lock.
func (c *cache) free() error {
	if c.closed {
		return nil
	}
	c.closed = true
	delete(c.lease.caches, c)
	arena := c.arena
	c.arena, c.selector, c.estimator, c.carries, c.states = nil, nil, nil, nil, nil
	c.lease.device.give(c.lease, c.taken)
	return freeArena(arena)
}
