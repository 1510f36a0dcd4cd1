//go:build linux && cgo && cuda

package cuda

import (
	"context"
	"errors"
	"math/bits"
	"slices"
	"time"
	"unsafe"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
	"github.com/twilight-sidecar/twilight/gpu/cuda/kernels"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
)

// cache is a registered cache. The lease's lock guards it.
type cache struct {
	lease   *lease
	spec    gpu.CacheSpec // without Layers
	layers  []layer
	byModel map[int]int // the model's layer index to that in layers
	tracker *kv.Tracker
	chunks  int
	stepped bool
	closed  bool

	shadow  buffer
	charged uint64
	fixed   buffer // of layers: scales, thresholds, channels
	trained []int  // by layer: the level its heads were trained at, 0 before the first
	work    []kv.ChunkWork
	batch   batch
	call    layerCall
}

var _ gpu.Cache = (*cache)(nil)

func (l *lease) newCache(ctx context.Context, p *plan) (*cache, error) {
	tracker, err := kv.NewTracker(p.tracker)
	if err != nil {
		return nil, err
	}
	c := &cache{
		lease: l, spec: *p.spec, layers: p.layers, byModel: make(map[int]int, len(p.layers)), tracker: tracker,
		chunks: p.chunks, charged: p.shadow, trained: make([]int, len(p.layers)),
	}
	c.spec.Layers = nil
	c.batch.cache = c
	for i := range c.layers {
		c.byModel[c.layers[i].model] = i
	}
	err = l.device.owner.do(ctx, func() error {
		if err := c.allocate(); err != nil {
			return errors.Join(err, c.release())
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

// allocate takes the cache's device memory, on the owner's thread.
func (c *cache) allocate() error {
	if err := c.shadow.reserve(max(int(c.charged), 1)); err != nil {
		return err
	}
	// Head records start as zeros; so do chunk records, of which parts are read before they are written.
	if err := zero(c.shadow.ptr, int(c.charged), c.lease.stream); err != nil {
		return err
	}
	return c.fix()
}

// fix puts what stays the same of each layer on the device.
func (c *cache) fix() error {
	l, g := c.lease, &c.lease.geometry
	var space carver
	var data []byte
	put := func(to *drv.Ptr, values []byte) {
		*to = uint64(space.take(len(values)))
		data = append(append(data, values...), make([]byte, space.used-len(data)-len(values))...)
	}
	var addresses []*drv.Ptr
	for i := range c.layers {
		layer := &c.layers[i]
		for j := range layer.planes {
			put(&layer.planes[j].Scales, bytesOf(layer.scales[j]))
			addresses = append(addresses, &layer.planes[j].Scales)
		}
		put(&layer.thresholds, bytesOf(l.method.thresholds(layer.model, g.QueryHeads)))
		addresses = append(addresses, &layer.thresholds)
		if channels := l.method.labels(layer.model); channels != nil {
			put(&layer.channels, bytesOf(channels))
			addresses = append(addresses, &layer.channels)
		}
	}
	if err := errors.Join(c.fixed.reserve(len(data)), l.out.reserve(len(data))); err != nil {
		return err
	}
	for _, address := range addresses {
		*address += c.fixed.ptr
	}
	copy(l.out.data, data)
	if err := upload(c.fixed.ptr, l.out.data[:len(data)], l.stream); err != nil {
		return err
	}
	return l.wait()
}

// release gives the cache's device memory back, on the owner's thread.
func (c *cache) release() error {
	return errors.Join(c.shadow.free(), c.fixed.free(), c.batch.free())
}

func (c *cache) liesIn(m *memory) bool {
	return slices.ContainsFunc(c.layers, func(l layer) bool {
		return l.extents[0].memory == m || l.extents[1].memory == m
	})
}

func (c *cache) ShadowBytes() uint64 { return c.charged }

func (c *cache) Step(ctx context.Context, step *kv.Step) error {
	c.lease.mu.Lock()
	defer c.lease.mu.Unlock()
	if err := c.usable(ctx); err != nil {
		return err
	}
	if err := c.tracker.Step(step); err != nil {
		return err
	}
	c.stepped = true
	c.batch.note(step)
	if c.lease.method.config.DenseBelow == pipeline.ByCost {
		c.batch.crossover = c.crossover()
	}
	return nil
}

func (c *cache) usable(ctx context.Context) error {
	if c.closed {
		return errClosed
	}
	return ctx.Err()
}

var errNoStep = fault.Newf(fault.Precondition, "step_id", "the cache has no step yet: declare one first")

func (c *cache) Index(ctx context.Context) (kv.IndexStats, error) {
	c.lease.mu.Lock()
	defer c.lease.mu.Unlock()
	var stats kv.IndexStats
	if err := c.usable(ctx); err != nil {
		return stats, err
	}
	if !c.stepped {
		return stats, errNoStep
	}
	for i := range c.layers {
		var res gpu.LayerResult
		err := c.lease.device.owner.do(ctx, func() error {
			return c.run(i, &gpu.LayerRequest{Layer: c.layers[i].model}, &res)
		})
		if err != nil {
			return stats, explain(err)
		}
		stats.TokensIndexed += res.Index.TokensIndexed
		stats.TokensClaimed += res.Index.TokensClaimed
		stats.ChunksDrifted += res.Index.ChunksDrifted
		stats.StatisticsRefreshed += res.Index.StatisticsRefreshed
	}
	return stats, nil
}

func (c *cache) Layer(ctx context.Context, req *gpu.LayerRequest, res *gpu.LayerResult) error {
	c.lease.mu.Lock()
	defer c.lease.mu.Unlock()
	start := time.Now()
	if err := c.usable(ctx); err != nil {
		return err
	}
	i, ok := c.byModel[req.Layer]
	if !ok {
		return fault.Newf(fault.NotFound, "layer", "the cache has no layer %d: name one of its own", req.Layer)
	}
	if !c.stepped {
		return errNoStep
	}
	if req.Observation != nil {
		return fault.Newf(fault.Unsupported, "observation",
			"is set, but no method of the lease's config takes what it holds: leave it out")
	}
	if err := c.lease.device.owner.do(ctx, func() error { return c.run(i, req, res) }); err != nil {
		return explain(err)
	}
	res.Timing.Wall = time.Since(start)
	return nil
}

// Arm implements gpu.Cache. Info declares no armed steps.
func (c *cache) Arm(context.Context, *gpu.ArmedStep) error {
	return fault.Newf(fault.Unsupported, "armed", "device %s arms no steps: run layers one by one", c.lease.device.uuid)
}

// CancelArmed implements gpu.Cache.
func (c *cache) CancelArmed(uint32) {}

func (c *cache) Close() error {
	c.lease.mu.Lock()
	defer c.lease.mu.Unlock()
	return c.close()
}

// close frees the cache under the lease's lock.
func (c *cache) close() error {
	if c.closed {
		return nil
	}
	c.closed = true
	delete(c.lease.caches, c)
	err := c.lease.device.owner.do(context.Background(), c.release)
	c.lease.device.give(c.lease, c.charged)
	return explain(err)
}

// training says that a layer's heads are to be trained on a row's first level valid tokens.
type training struct{ row, level int }

// pending takes what the layer has to index, and what to train before: on the first sequence to reach
// the highest level, if none reached it before.
func (c *cache) pending(i int) (t training) {
	c.work = c.work[:0]
	if c.layers[i].slot == noSlot {
		return t
	}
	t.level = c.trained[i]
	for b, row := range c.tracker.Rows() {
		if level := c.lease.method.level(row.Len - row.First); level > t.level {
			t = training{b, level}
		}
	}
	if t.level == c.trained[i] {
		t.level = 0
	} else {
		c.tracker.Invalidate(i)
	}
	if c.lease.method.indexes() {
		c.work = c.tracker.Pending(c.work, i)
	}
	return t
}

// batch is the current step on the device. Rows keep their place from step to step, so that only what
// changed of their tables is copied.
type batch struct {
	cache *cache

	columns       buffer // lengths, first, bad: [3][B]
	tables        buffer // [rows][stride], and V's behind it if they differ
	chunkIDs      buffer // [rows][chunkStride], where they do not follow from pages
	carry         buffer // what layers leave to later ones, where the method wants that
	rows, stride  int    // of tables
	chunkStride   int
	valuesDiffer  bool
	current       bool     // the device has all of it
	checked       bool     // and has checked it
	placed        []placed // by row
	longest, most int      // tokens, pages
	crossover     int      // valid tokens from which rows are to be sparse, where costs decide
}

// placed says what a row of tables holds: the first n entries of a sequence's table.
type placed struct {
	sequence uint64
	n        int
}

// note takes in a step that the tracker has accepted.
func (t *batch) note(s *kv.Step) {
	rows := t.cache.tracker.Rows()
	for b, row := range rows {
		if b == len(t.placed) {
			t.placed = append(t.placed, placed{})
		}
		p := &t.placed[b]
		if row.Sequence == 0 || p.sequence != row.Sequence {
			*p = placed{sequence: row.Sequence}
		} else if len(s.TableCounts) > 0 && s.TableCounts[b] > 0 {
			start := 0
			if len(s.TableStarts) > 0 {
				start = int(s.TableStarts[b])
			}
			p.n = min(p.n, start)
		}
	}
	clear(t.placed[len(rows):])
	t.current, t.checked = false, false
}

// put brings the device up to date, on the owner's thread.
func (t *batch) put() error {
	if t.current {
		return nil
	}
	l, rows := t.cache.lease, t.cache.tracker.Rows()
	differ := false
	t.longest, t.most = 1, 1
	for _, row := range rows {
		t.longest = max(t.longest, row.Len)
		t.most = max(t.most, len(row.Table))
		differ = differ || unsafe.SliceData(row.Table) != unsafe.SliceData(row.VTable)
	}
	if t.most > t.stride || len(rows) > t.rows || differ && !t.valuesDiffer {
		t.rows, t.stride = max(t.rows, ceilPower(len(rows))), max(t.stride, ceilPower(t.most))
		t.valuesDiffer = t.valuesDiffer || differ
		size := t.rows * t.stride * 4
		if t.valuesDiffer {
			size *= 2
		}
		if err := t.tables.reserve(size); err != nil {
			t.rows, t.stride = 0, 0
			return err
		}
		for b := range t.placed {
			t.placed[b].n = 0
		}
	}
	t.chunkStride = (t.longest + kv.ChunkTokens - 1) / kv.ChunkTokens
	if l.method.selects == kernels.SelectCarried {
		if err := t.carry.reserve(t.carryLayout(&kernels.Layer{})); err != nil {
			return err
		}
	}

	ids := t.cache.spec.PageSize%kv.ChunkTokens != 0
	var space carver
	columns := space.take(3 * len(rows) * 4)
	fresh, chunkIDs := space.used, 0
	for b, row := range rows {
		if n := len(row.Table) - t.placed[b].n; n > 0 {
			space.take(4 * n)
			if t.valuesDiffer {
				space.take(4 * n)
			}
		}
	}
	if ids {
		chunkIDs = space.take(len(rows) * t.chunkStride * 4)
	}
	if err := errors.Join(l.out.reserve(space.used), t.columns.reserve(3*len(rows)*4)); err != nil {
		return err
	}
	out := l.out.data
	column := int32s(out[columns:][:3*len(rows)*4])
	for b, row := range rows {
		column[b], column[len(rows)+b], column[2*len(rows)+b] = int32(row.Len), int32(row.First), 0
	}
	if err := upload(t.columns.ptr, bytesOf(column), l.stream); err != nil {
		return err
	}
	space.used = fresh
	for b, row := range rows {
		from := t.placed[b].n
		if from >= len(row.Table) {
			t.placed[b].n = len(row.Table)
			continue
		}
		for k, table := range [][]int32{row.Table, row.VTable} {
			if k == 1 && !t.valuesDiffer {
				break
			}
			entries := out[space.take(4*(len(table)-from)):][:4*(len(table)-from)]
			copy(entries, bytesOf(table[from:]))
			at := t.tables.ptr + uint64(4*((k*t.rows+b)*t.stride+from))
			if err := upload(at, entries, l.stream); err != nil {
				return err
			}
		}
		t.placed[b].n = len(row.Table)
	}
	if ids {
		if err := t.chunkIDs.reserve(len(rows) * t.chunkStride * 4); err != nil {
			return err
		}
		all := out[chunkIDs:][:len(rows)*t.chunkStride*4]
		for b, row := range rows {
			copy(all[b*t.chunkStride*4:], bytesOf(row.Chunks))
		}
		if err := upload(t.chunkIDs.ptr, all, l.stream); err != nil {
			return err
		}
	}
	if err := l.wait(); err != nil { // the staging memory is used again
		return err
	}
	t.current = true
	return nil
}

// fill puts the batch's addresses into d.
func (t *batch) fill(d *kernels.Layer) {
	n := len(t.cache.tracker.Rows())
	d.Lengths = t.columns.ptr
	d.First = d.Lengths + uint64(4*n)
	d.Bad = d.First + uint64(4*n)
	d.Table, d.VTable = t.tables.ptr, t.tables.ptr
	if t.valuesDiffer {
		d.VTable += uint64(4 * t.rows * t.stride)
	}
	if t.cache.spec.PageSize%kv.ChunkTokens != 0 {
		d.ChunkIDs = t.chunkIDs.ptr
	}
	d.Batch = int32(n)
	d.TableStride, d.ChunkStride = int32(t.stride), int32(t.chunkStride)
	if t.carry.size > 0 {
		t.carryLayout(d)
	}
}

// carryLayout puts the addresses of what layers leave to later ones into d, and returns its size.
func (t *batch) carryLayout(d *kernels.Layer) int {
	l := t.cache.lease
	lists := len(t.cache.tracker.Rows()) * l.geometry.QueryHeads / l.asking()
	var space carver
	d.CarryLayers = t.carry.ptr + uint64(space.take(4*lists))
	d.CarryCounts = t.carry.ptr + uint64(space.take(4*lists))
	d.CarryChunks = t.carry.ptr + uint64(space.take(4*lists*t.chunkStride))
	d.CarryMasks = t.carry.ptr + uint64(space.take(2*lists*t.chunkStride))
	return space.used
}

func (t *batch) free() error {
	return errors.Join(t.columns.free(), t.tables.free(), t.chunkIDs.free(), t.carry.free())
}

func ceilPower(n int) int { return 1 << bits.Len(uint(max(n, 1)-1)) }

// int32s views bytes, aligned as the staging memory is, as integers.
func int32s(b []byte) []int32 {
	return unsafe.Slice((*int32)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/4)
}

// shadowAddresses puts the addresses of a layer's records into d.
func (c *cache) shadowAddresses(i int, d *kernels.Layer) {
	g, m, slot := &c.lease.geometry, &c.lease.method, c.layers[i].slot
	if slot == noSlot {
		return
	}
	heads, chunks := indexed(c.layers)*g.KVHeads, c.chunks
	at := c.shadow.ptr
	part := func(perHead int) (address drv.Ptr) {
		address = at + uint64(slot*g.KVHeads*perHead)
		at += uint64(heads * perHead)
		return address
	}
	if m.estimates != kernels.EstimateExact {
		d.Mean = part(4 * g.KDim)
		d.Spread = part(4 * g.KDim)
		d.Reach = part(4 * g.KDim)
	}
	switch m.estimates {
	case kernels.EstimateInt4:
		d.Int4 = part(chunks * kernels.Int4Bytes(g.KDim))
	case kernels.EstimateCodes:
		d.Codes = part(chunks * kernels.CodeBytes(g.KDim, m.codeBits, m.symmetric))
	}
	if m.ranks == kernels.RankLabels {
		d.Labels = part(chunks * kernels.CodeBytes(m.labelDim, m.labelBits, false))
	}
	if m.selects == kernels.SelectQuest {
		d.Bounds = part(chunks * kernels.BoundsBytes(g.KDim))
	}
}
