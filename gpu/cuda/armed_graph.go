//go:build linux && cgo && cuda

package cuda

import (
	"cmp"
	"encoding/binary"
	"errors"
	"math"
	"math/bits"
	"slices"
	"unsafe"

	"gorgonia.org/cu"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
	"github.com/twilight-sidecar/twilight/gpu/cuda/kernels"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
)

// stepGraph is the layers of a step, for every batch of its key.
type stepGraph struct {
	key     graphKey
	made    bool // exec is there; otherwise layers are launched one by one
	exec    drv.Graph
	calls   []layerCall // by layer of the step
	lists   []gpu.ListBuffer
	request []gpu.LayerRequest
	image   imageLayout
	results resultsLayout
	// finished is what Finished holds once a layer's kernels are over, by layer of the step. watch reads it
	// while the graph's next step is given, so it is set once.
	finished   []uint32
	operations int // that a stream is given, if one by one
	users      int // armed steps
	used       uint32
}

// graphKey is all that a graph's launches and the addresses in them follow from.
type graphKey struct {
	rows, chunkStride, tableStride, keepMost, works int
	sparse, dense, long, lent                       bool // any row; as long as the fused kernel takes
	layout                                          int  // of words and tensors
	status                                          drv.Ptr
	image, results, scratch, table, vtable          drv.Ptr
	work, carry                                     drv.Ptr
}

// imageLayout says where in the memory that the host fills for each step a batch has what.
type imageLayout struct {
	lengths, first, bad, sparse, dense, p, budgets int
	goes, run, plan                                int
	chunkIDs                                       int
	rest                                           int // tables' changes, and work
}

func (c *cache) imageLayout(rows, layers, chunkStride int) (at imageLayout) {
	var image carver
	image.take(int(unsafe.Sizeof(kernels.Step{})))
	at = imageLayout{
		lengths: image.take(4 * rows), first: image.take(4 * rows), bad: image.take(4 * rows),
		sparse: image.take(4 * rows), dense: image.take(4 * rows), p: image.take(8 * rows), budgets: image.take(4 * rows),
		goes: image.take(4 * layers), run: image.take(4 * layers), plan: image.take(4 * kernels.PlanWords * (layers + 1)),
	}
	if c.spec.PageSize%kv.ChunkTokens != 0 {
		at.chunkIDs = image.take(4 * rows * chunkStride)
	}
	at.rest = image.used
	return at
}

// resultsLayout says where results lie: of the batch, if it was read on the device, then those of each
// layer; behind what is copied back, the works that strayed.
type resultsLayout struct {
	lengths, first, bad                   int
	indexed, badSlot, numListed, training int
	layers                                []int
	back, drift, size                     int
}

// give gives a step to the stream, on the owner's thread.
func (a *armer) give(s *armedStep) error {
	c := a.cache
	l, t := c.lease, &c.batch
	key := graphKey{layout: a.layoutOf(s.layers), status: s.status, works: 1, lent: s.batch.rows > 0}
	if key.lent {
		if err := a.lentShape(s, &key); err != nil {
			return err
		}
	} else {
		if err := t.fit(); err != nil {
			return err
		}
		key.rows = len(s.rows)
		for b := range s.rows {
			key.add(l, &s.rows[b], s.crossover)
		}
		for j := range s.work {
			key.works = max(key.works, ceilPower(s.work[j].n))
		}
	}
	if err := t.fitCarry(key.rows); err != nil {
		return err
	}
	key.carry = t.carry.ptr
	key.long = t.longest >= l.device.options.FusedFrom
	key.chunkStride, key.tableStride = t.chunkStride, t.stride
	key.table = t.tables.ptr
	if t.valuesDiffer && !key.lent { // a batch in memory has one table
		key.vtable = key.table + uint64(4*t.rows*t.stride)
	}
	image := c.imageLayout(key.rows, len(s.layers), key.chunkStride)
	used, err := a.fillImage(s, &image)
	if err != nil {
		return err
	}
	key.image = a.image.ptr
	if s.graph, err = a.graph(s, key); err != nil {
		return err
	}
	a.given++
	s.given = a.given
	if err := a.launch(s, used); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	s.busy = true
	s.graph.users++
	s.graph.used = s.given
	a.queue = append(a.queue, s)
	a.waiting++
	a.signal.Wake()
	return nil
}

// add takes in a row of the batch.
func (k *graphKey) add(l *lease, row *kv.SeqRow, crossover int) {
	path, _ := l.method.path(math.MaxInt, row, crossover) // of a layer that may run sparsely
	switch path {
	case pipeline.Sparse:
		k.sparse = true
		_, chunks := l.method.budget(row, 0)
		k.keepMost = max(k.keepMost, bucket(chunks))
	case pipeline.Dense:
		k.dense = true
	case pipeline.Void:
	}
}

// layoutOf numbers where words and tensors lie.
func (a *armer) layoutOf(layers []armedLayer) int {
	if !slices.Equal(a.layout, layers) {
		a.layout = append(a.layout[:0], layers...)
		a.layouts++
	}
	return a.layouts
}

// fillImage writes what the device is to know of a step, and returns how many bytes that is.
func (a *armer) fillImage(s *armedStep, at *imageLayout) (used int, err error) {
	c := a.cache
	t := &c.batch
	patches, entries := 0, 0
	if s.batch.rows == 0 {
		for b, row := range c.tracker.Rows() {
			if n := len(row.Table) - t.placed[b].n; n > 0 {
				patches++
				entries += n
			}
		}
		if t.valuesDiffer {
			entries *= 2
		}
	}
	var image carver
	image.used = at.rest
	patchesAt, entriesAt := image.take(patches*int(unsafe.Sizeof(kernels.Patch{}))), image.take(4*entries)
	worksAt := image.take(16 * len(a.works))
	if s.batch.rows > 0 {
		worksAt = image.used
	}
	used = image.used
	if err := errors.Join(s.image.reserve(used), a.image.reserve(used)); err != nil {
		return 0, err
	}
	out := s.image.data
	clear(out[:at.rest])
	*(*kernels.Step)(unsafe.Pointer(unsafe.SliceData(out))) = kernels.Step{
		ID: a.given + 1, Layers: int32(len(s.layers)), Patches: int32(patches),
		PatchesAt: int32(patchesAt), EntriesAt: int32(entriesAt),
		GoAt: int32(at.goes), RunAt: int32(at.run), PlanAt: int32(at.plan),
	}
	goes, run := int32s(out[at.goes:][:4*len(s.layers)]), int32s(out[at.run:][:4*len(s.layers)])
	for j := range s.layers {
		goes[j], run[j] = kernels.Go, 1
	}
	if s.batch.rows > 0 {
		return used, nil
	}
	for b := range s.rows {
		row := &s.rows[b]
		put := func(column int, v int) { binary.NativeEndian.PutUint32(out[column+4*b:], uint32(v)) }
		put(at.lengths, row.Len)
		put(at.first, row.First)
		path, _ := c.lease.method.path(math.MaxInt, row, s.crossover)
		put(at.sparse, int(path))
		if path != pipeline.Void {
			path = pipeline.Dense
		}
		put(at.dense, int(path))
		amount, _ := c.lease.method.budget(row, 0)
		put(at.budgets, amount)
	}
	a.putTables(out, at, patchesAt, entriesAt)
	for j := range s.work {
		w := &s.work[j]
		plan := int32s(out[at.plan+4*kernels.PlanWords*j:][:4*kernels.PlanWords])
		plan[0], plan[1] = int32(worksAt/16+w.from), int32(w.n)
		if w.training.level > 0 {
			plan[2] = 1
		}
	}
	putWorks(out[worksAt:], a.works)
	return used, nil
}

// putTables writes what is new of the batch's tables, and the rows' chunks.
func (a *armer) putTables(out []byte, at *imageLayout, patchesAt, entriesAt int) {
	t := &a.cache.batch
	next, written := patchesAt, 0
	for b, row := range a.cache.tracker.Rows() {
		if at.chunkIDs > 0 {
			copy(out[at.chunkIDs+4*b*t.chunkStride:], bytesOf(row.Chunks))
		}
		from := t.placed[b].n
		t.placed[b].n = len(row.Table)
		n := len(row.Table) - from
		if n <= 0 {
			continue
		}
		patch := (*kernels.Patch)(unsafe.Pointer(&out[next]))
		*patch = kernels.Patch{To: int32(b*t.stride + from), From: int32(written), Count: int32(n)}
		next += int(unsafe.Sizeof(*patch))
		copy(out[entriesAt+4*written:], bytesOf(row.Table[from:]))
		written += n
		if t.valuesDiffer {
			patch.Differ = 1
			copy(out[entriesAt+4*written:], bytesOf(row.VTable[from:]))
			written += n
		}
	}
}

// maxGraphs is how many sizes of batches are kept.
const maxGraphs = 64

// graph returns the graph for a key, on the owner's thread.
func (a *armer) graph(s *armedStep, key graphKey) (*stepGraph, error) {
	key.results, key.scratch = a.results.ptr, a.scratch.ptr
	for _, g := range a.graphs {
		if g.key == key {
			return g, a.make(g, s)
		}
	}
	if len(a.graphs) == maxGraphs {
		if err := a.forgetGraph(); err != nil {
			return nil, err
		}
	}
	g := &stepGraph{key: key, image: a.cache.imageLayout(key.rows, len(s.layers), key.chunkStride)}
	if err := a.build(g, s); err != nil {
		return nil, err
	}
	a.graphs = append(a.graphs, g)
	return g, a.make(g, s)
}

// forgetGraph gives up the graph that was used longest ago. Of those in use there are fewer.
func (a *armer) forgetGraph() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	oldest := -1
	for i, g := range a.graphs {
		if g.users == 0 && (oldest < 0 || g.used < a.graphs[oldest].used) {
			oldest = i
		}
	}
	g := a.graphs[oldest]
	a.graphs = slices.Delete(a.graphs, oldest, oldest+1)
	return g.destroy()
}

// destroy gives a graph back.
func (g *stepGraph) destroy() error {
	if !g.made {
		return nil
	}
	return g.exec.Destroy()
}

// build prepares the layers of a graph.
func (a *armer) build(g *stepGraph, s *armedStep) error {
	c, key := a.cache, &g.key
	layers := len(s.layers)
	g.calls, g.lists, g.request = make([]layerCall, layers), make([]gpu.ListBuffer, layers), make([]gpu.LayerRequest, layers)
	for j := range layers {
		g.request[j].Query = &gpu.Tensor{}
		if s.layers[j].lists != 0 {
			g.lists[j].Capacity = s.layers[j].capacity
			g.request[j].ListBuffer = &g.lists[j]
		}
	}
	// What takes how much is known once all are laid out.
	scratch := 0
	r := &g.results
	var results carver
	r.lengths, r.first, r.bad = results.take(4*key.rows), results.take(4*key.rows), results.take(4*key.rows)
	r.indexed = results.take(32)
	r.badSlot, r.numListed, r.training = r.indexed+4, r.indexed+8, r.indexed+16
	for j := range layers {
		if err := a.describe(g, s, j); err != nil {
			return err
		}
		_, bytes := c.layout()
		scratch = max(scratch, bytes)
		r.layers = append(r.layers, results.take(c.call.back.end))
	}
	r.back = results.used
	each := 0
	if !key.lent {
		each = 4 * key.works
	}
	r.drift = results.take(layers * each)
	tickets := results.take(layers * 4 * int(c.call.desc.Rows))
	r.size = results.used
	if err := errors.Join(a.results.reserve(r.size), a.scratch.reserve(scratch)); err != nil {
		return err
	}
	key.results, key.scratch = a.results.ptr, a.scratch.ptr

	return a.bindLayers(g, s, tickets, each)
}

// bindLayers completes the calls of a graph.
func (a *armer) bindLayers(g *stepGraph, s *armedStep, tickets, each int) error {
	c, key, r := a.cache, &g.key, &g.results
	for j := range g.calls {
		if err := a.describe(g, s, j); err != nil {
			return err
		}
		c.layout()
		call := &c.call
		call.bind(key.results+uint64(r.layers[j]), key.scratch)
		call.desc.DriftFlags, call.desc.Tickets = 0, key.results+uint64(tickets+j*4*int(call.desc.Rows))
		if each > 0 {
			call.desc.DriftFlags = key.results + uint64(r.drift+j*each)
		}
		g.calls[j] = *call
		g.calls[j].scratch = nil
		g.operations += call.operations()
	}
	return nil
}

// operations is how many a stream is given for a layer, about.
func (a *layerCall) operations() int {
	switch {
	case !a.fused:
		return 12
	case a.dense || a.desc.OutLists != 0:
		return 6
	}
	return 3
}

// mostAtOnce is how many operations a step launches one by one, at most: behind a wait, a stream takes a
// thousand or so before the driver blocks.
const mostAtOnce = 400

// make makes a graph of the layers, once nothing waits in the process: the driver might block until the wait
// ends. Until then they are launched one by one, if they are not too many.
func (a *armer) make(g *stepGraph, s *armedStep) (err error) {
	if g.made || limbo.waiting() && g.operations <= mostAtOnce {
		return nil
	}
	stream := a.cache.lease.stream
	g.exec, err = drv.Capture(stream, func() error { return a.enqueue(g, s, stream) })
	g.made = err == nil
	return err
}

// enqueue gives a stream the layers, one by one.
func (a *armer) enqueue(g *stepGraph, s *armedStep, stream cu.Stream) error {
	c := a.cache
	l := c.lease
	checked := c.batch.checked
	c.batch.checked = true // begin and check have come before
	l.launchOn(stream)
	defer func() {
		c.batch.checked = checked
		l.launchOn(l.stream)
	}()
	ops := &a.giving
	ops.Reset()
	var finished []uint32
	count := uint32(0)
	for j := range g.calls {
		ops.Wait(s.layers[j].ready, 1)
		if err := ops.Run(stream); err != nil {
			return err
		}
		c.call = g.calls[j]
		*(*kernels.Layer)(l.block.Pointer()) = c.call.desc
		if err := c.launch(s.layers[j].layer); err != nil {
			return err
		}
		if g.finished == nil {
			count += uint32(c.call.last)
			finished = append(finished, count)
		}
		ops.Reset()
		ops.WaitAtLeast(g.key.image+uint64(g.image.goes+4*j), kernels.Go)
		ops.Write(s.layers[j].done, 1)
		ops.Write(a.state.ptr+stateReached, uint32(j+1))
	}
	if g.finished == nil {
		g.finished = finished
	}
	return ops.Run(stream)
}

// describe makes the cache's call that of a layer of a graph, up to its layout.
func (a *armer) describe(g *stepGraph, s *armedStep, j int) error {
	c, key, layer := a.cache, &g.key, &s.layers[j]
	call := &c.call
	*call = layerCall{req: &g.request[j], rows: make([]kv.SeqRow, key.rows), captured: true}
	c.describe(layer.layer)
	d, at := &call.desc, &g.image
	image := key.image
	d.Queries, d.QueryRow, d.QueryHead = layer.query.at, layer.query.row, layer.query.head
	d.Output, d.OutputRow, d.OutputHead = layer.output.at, layer.output.row, layer.output.head
	d.OutLists, d.OutCounts, d.OutCapacity = layer.lists, layer.counts, int32(layer.capacity)

	d.Batch = int32(key.rows)
	d.Table, d.VTable = key.table, cmp.Or(key.vtable, key.table)
	d.TableStride, d.ChunkStride = int32(key.tableStride), int32(key.chunkStride)
	d.P, d.Budgets = image+uint64(at.p), image+uint64(at.budgets)
	d.Lengths, d.First, d.Bad = image+uint64(at.lengths), image+uint64(at.first), image+uint64(at.bad)
	if at.chunkIDs > 0 {
		d.ChunkIDs = image + uint64(at.chunkIDs)
	}
	d.Work, d.Works = image, int32(key.works)
	if key.lent {
		r := key.results
		d.Lengths, d.First, d.Bad = r+uint64(g.results.lengths), r+uint64(g.results.first), r+uint64(g.results.bad)
		d.Work = a.shadow.work.ptr
	}
	d.Go, d.Run = image+uint64(at.goes+4*j), image+uint64(at.run+4*j)
	d.Plan = image + uint64(at.plan+4*kernels.PlanWords*j)
	d.Gate, d.Status, d.Finished, d.News = a.state.ptr+stateGate, s.status, a.state.ptr+stateFinished, newsPtr(a)
	d.Order = int32(j + 1)

	longest, _ := c.lease.method.path(c.layers[layer.layer].model, &kv.SeqRow{Len: math.MaxInt32}, 0)
	d.Paths = image + uint64(at.sparse)
	call.sparse, call.dense = key.sparse, key.dense
	if longest != pipeline.Sparse {
		d.Paths = image + uint64(at.dense)
		call.sparse, call.dense = false, key.sparse || key.dense
	}
	if call.sparse {
		call.keepMost = key.keepMost
	}
	if key.carry != 0 {
		c.batch.carryLayout(d, key.rows)
	}
	if key.lent && c.layers[layer.layer].slot == noSlot {
		d.Plan = image + uint64(at.plan+4*kernels.PlanWords*len(s.layers)) // of nothing to index
	}
	var err error
	c.batch.longest = 0
	if key.long {
		c.batch.longest = math.MaxInt
	}
	call.plan, call.fused, err = c.lease.fused.plan(c)
	return err
}

func newsPtr(a *armer) drv.Ptr {
	return drv.Ptr(uintptr(unsafe.Pointer(unsafe.SliceData(a.news.data))))
}

// launch gives the stream a step.
func (a *armer) launch(s *armedStep, used int) error {
	l, g := a.cache.lease, s.graph
	if err := s.back.reserve(g.results.back); err != nil {
		return err
	}
	limbo.enter()
	errs := []error{
		upload(a.image.ptr, s.image.data[:used], a.stream),
		zero(a.results.ptr, g.results.size, a.stream),
	}
	var ops drv.MemOps
	ops.Wait(s.begun, s.id)
	errs = append(errs, ops.Run(a.stream))

	*(*kernels.Layer)(l.block.Pointer()) = g.calls[0].desc
	a.begin.Set(1, a.image.ptr)
	a.begin.Set(2, a.state.ptr+stateGate)
	a.begin.Set(3, a.state.ptr+stateReached)
	errs = append(errs, a.begin.Run(1, 1))
	if g.key.lent {
		if counts := g.calls[0].desc.CarryCounts; counts != 0 {
			errs = append(errs, zero(counts, 4*int(g.calls[0].desc.Rows), a.stream))
		}
		errs = append(errs, a.lent.read(a, s))
	} else if g.key.rows > 0 {
		a.check.Set(1, g.calls[0].desc.Bad)
		errs = append(errs, a.check.Run(g.key.rows, 1))
	}
	if g.made {
		errs = append(errs, g.exec.Launch(a.stream))
	} else {
		errs = append(errs, a.enqueue(g, s, a.stream))
	}
	if g.key.lent {
		errs = append(errs, a.lent.book(a, s))
	}
	errs = append(errs,
		download(s.back.data[:g.results.back], a.results.ptr, a.stream),
		a.signal.Behind(a.stream))
	return errors.Join(errs...)
}

// tokensOf is how many tokens a work indexes.
func tokensOf(w *kv.ChunkWork) uint64 { return uint64(bits.OnesCount16(w.Fresh)) }
