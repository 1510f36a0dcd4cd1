//go:build linux && cgo && cuda

package cuda

import (
	"errors"
	"slices"
	"unsafe"

	"gorgonia.org/cu"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
	"github.com/twilight-sidecar/twilight/gpu/cuda/kernels"
	"github.com/twilight-sidecar/twilight/gpu/internal/spec"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
)

const batchBytes = int(unsafe.Sizeof(kernels.Batch{}))

// lentBatch is where a batch lies that is read when its step begins; of no rows if it came with the step.
type lentBatch struct {
	rows, stride, maxLength, numSlots int
	lengths, table, slots, first      drv.Ptr
}

// locateBatch finds a batch. What is in it is checked on the device.
func (c *cache) locateBatch(s *armedStep, from *gpu.DeviceBatch) error {
	parts, err := spec.Batch(from, c.spec.PageSize, &c.lease.device.options.Limits)
	if err != nil {
		return err
	}
	if m := &c.lease.method; m.selects != kernels.SelectAll && m.selects != kernels.SelectQuest {
		return fault.Newf(fault.Unsupported, "",
			"a batch in memory is not served with selector %q: send it in the message", m.config.Selector.Type)
	}
	b := &s.batch
	for i, to := range [len(parts)]*drv.Ptr{&b.lengths, &b.table, &b.slots, &b.first} {
		part := &parts[i]
		if part.At.Memory == nil && i == spec.FirstValid {
			continue
		}
		var e extent
		e, *to, err = c.lease.locate(part.At.Memory, part.At.Offset, part.Size, part.Element, part.Name)
		if err != nil {
			return err
		}
		s.extents = append(s.extents, e)
	}
	b.rows, b.stride, b.maxLength, b.numSlots = from.Rows, from.TableStride, from.MaxLength, from.NumSlots
	return nil
}

// lentShadow is what the device knows of its shadow while batches lie in memory: as kv.Tracker does, but
// of all layers at once.
type lentShadow struct {
	known  bool
	masks  buffer // [chunks], then wanted
	listed buffer // [chunks][4]
	work   buffer // [chunks][4]
}

func (s *lentShadow) free() error { return errors.Join(s.masks.free(), s.listed.free(), s.work.free()) }

// lentShape sees that there is room for a batch in memory, and completes the key of its graph.
func (a *armer) lentShape(s *armedStep, key *graphKey) error {
	c := a.cache
	t, m, sh := &c.batch, &c.lease.method, &a.shadow
	key.rows = s.batch.rows
	longest := kv.SeqRow{Len: s.batch.maxLength}
	s.crossover = 0
	if m.config.DenseBelow == pipeline.ByCost {
		s.crossover = c.crossoverOf(slices.Repeat([]int{longest.Len}, key.rows))
	}
	key.add(c.lease, &longest, s.crossover)
	if max(m.config.DenseBelow, s.crossover) > 0 && key.sparse {
		key.dense = true // as rows may be that short
	}
	// Blocks for what a decode step indexes; each takes more if there is more.
	key.works = ceilPower(2 * key.rows)
	t.chunkStride, t.longest = bucket(ceilDiv(longest.Len, kv.ChunkTokens)), longest.Len
	if err := t.grow(key.rows, ceilDiv(longest.Len, c.spec.PageSize), false); err != nil {
		return err
	}
	t.misplace()
	if !sh.known {
		err := errors.Join(sh.masks.reserve(8*c.chunks), sh.listed.reserve(16*c.chunks), sh.work.reserve(16*c.chunks))
		if err == nil {
			err = zero(sh.masks.ptr, 8*c.chunks, a.stream)
		}
		if err != nil {
			return err
		}
		var ops drv.MemOps
		ops.Write(a.state.ptr+stateTrained, uint32(c.leastTrained()))
		if err := ops.Run(a.stream); err != nil {
			return err
		}
		sh.known, a.forgetting = true, true
	}
	key.work = sh.work.ptr
	return nil
}

// lentLaunches are the kernels that read a batch, ready to be launched behind begin.
type lentLaunches struct {
	rows, slots, forget, chunks, work, bookkeeping drv.Launch
}

func newLentLaunches(k *kernels.Armed, stream cu.Stream, block drv.Block) (l lentLaunches) {
	for _, p := range []struct {
		launch *drv.Launch
		f      cu.Function
	}{
		{&l.rows, k.BatchRows},
		{&l.slots, k.BatchSlots},
		{&l.forget, k.BatchForget},
		{&l.chunks, k.BatchChunks},
		{&l.work, k.BatchWork},
		{&l.bookkeeping, k.BatchBook},
	} {
		*p.launch = drv.NewLaunch(p.f, stream, lentThreads, block)
	}
	return l
}

const lentThreads = 256

func (l *lentLaunches) free() {
	for _, launch := range []drv.Launch{l.rows, l.slots, l.forget, l.chunks, l.work, l.bookkeeping} {
		launch.Free()
	}
}

// read gives the stream what makes a step's batch the current one.
func (l *lentLaunches) read(a *armer, s *armedStep) error {
	c, g, from := a.cache, s.graph, &s.batch
	m, at, r := &c.lease.method, &g.image, &g.results
	image, results := g.key.image, g.key.results
	b := (*kernels.Batch)(a.block.Pointer())
	*b = kernels.Batch{
		Lengths: from.lengths, Table: from.table, First: from.first, Slots: from.slots,
		OwnLengths: results + uint64(r.lengths), OwnFirst: results + uint64(r.first), Bad: results + uint64(r.bad),
		OwnTable:    g.key.table,
		SparsePaths: image + uint64(at.sparse), DensePaths: image + uint64(at.dense), Budgets: image + uint64(at.budgets),
		Masks: a.shadow.masks.ptr, Wanted: a.shadow.masks.ptr + uint64(4*c.chunks), Listed: a.shadow.listed.ptr,
		NumListed: results + uint64(r.numListed), Work: a.shadow.work.ptr,
		Plan: image + uint64(at.plan), Go: image + uint64(at.goes), Run: image + uint64(at.run),
		Gate: a.state.ptr + stateGate, News: newsPtr(a), Indexed: results + uint64(r.indexed),
		Trained: a.state.ptr + stateTrained, BadSlot: results + uint64(r.badSlot), Training: results + uint64(r.training),
		Rate: max(m.sparsityRate, 0),
		Rows: int32(from.rows), Stride: int32(from.stride), OwnStride: int32(g.key.tableStride),
		MaxLength: int32(from.maxLength), NumSlots: int32(from.numSlots),
		PageSize: int32(c.spec.PageSize), NumPages: int32(c.spec.NumPages), NullPage: c.spec.NullPage, Chunks: int32(c.chunks),
		Layers: int32(len(s.layers)), DenseBelow: int32(max(m.config.DenseBelow, s.crossover)), TokenBudget: int32(m.tokenBudget),
	}
	for _, flag := range []struct {
		is bool
		to *int32
	}{{m.plain, &b.Plain}, {m.selects == kernels.SelectAll, &b.SelectAll}, {m.indexes(), &b.Indexes}, {m.selects != kernels.SelectQuest, &b.InTokens}} {
		if flag.is {
			*flag.to = 1
		}
	}
	for i, level := range m.levels {
		b.Levels[i] = int32(level)
	}
	blocks := c.lease.device.sms
	err := l.rows.Run(from.rows, 1)
	if from.numSlots > 0 {
		err = errors.Join(err, l.slots.Run(ceilDiv(from.numSlots, lentThreads), 1))
	}
	return errors.Join(err, l.forget.Run(blocks, 1), l.chunks.Run(ceilDiv(g.key.chunkStride, lentThreads), from.rows),
		l.work.Run(blocks, 1))
}

// book gives the stream what remembers what the step has indexed.
func (l *lentLaunches) book(a *armer, _ *armedStep) error {
	return l.bookkeeping.Run(a.cache.lease.device.sms, 1)
}
