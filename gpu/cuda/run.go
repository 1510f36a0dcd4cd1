//go:build linux && cgo && cuda

package cuda

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"time"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
	"github.com/twilight-sidecar/twilight/gpu/cuda/kernels"
	"github.com/twilight-sidecar/twilight/gpu/internal/spec"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
)

// The stages that are timed; an event lies before each and one behind the last.
const (
	stageIndex = iota
	stageSelect
	stagePrune
	stageAttend
	stages
)

// layerCall is a run of a layer.
type layerCall struct {
	req   *gpu.LayerRequest
	res   *gpu.LayerResult
	rows  []kv.SeqRow
	desc  kernels.Layer
	query tensor

	training  training
	indexed   bool // the shadow is up to date
	fused     bool // run by the fused kernel
	plan      fusedPlan
	paths     []pipeline.Path
	reasons   []pipeline.Reason
	sparse    bool      // any row runs sparsely
	dense     bool      // any row runs densely
	audited   []int32   // b*Hkv + KV head of what is computed densely, too
	keepMost  int       // candidate chunks of a sparse row
	outBytes  int       // of an inline output
	back      back      // where results lie
	copyLists int       // tokens of lists asked for inline, at most
	scratch   []*uint64 // addresses of desc that lie in the lease's scratch
}

// back says where the results of a call lie, from the start of the buffer that is copied back.
type back struct {
	badQuery, flags, kept, candidates, mass, coverage, cycles, audits, output, drifted, end int
}

// run runs a layer, on the owner's thread.
func (c *cache) run(i int, req *gpu.LayerRequest, res *gpu.LayerResult) error {
	*res = gpu.LayerResult{
		Candidates: res.Candidates[:0], Kept: res.Kept[:0], Paths: res.Paths[:0], Reasons: res.Reasons[:0],
		Lists: res.Lists[:0], Truncated: res.Truncated[:0], Output: res.Output[:0],
		Mass: res.Mass[:0], Coverage: res.Coverage[:0],
		Audited: res.Audited[:0], TrueMass: res.TrueMass[:0], OutputError: res.OutputError[:0],
	}
	a := &c.call
	*a = layerCall{
		req: req, res: res, rows: c.tracker.Rows(), paths: a.paths[:0], reasons: a.reasons[:0], scratch: a.scratch[:0],
		audited: a.audited[:0],
	}
	c.describe(i)
	if req.Query != nil {
		if err := c.prepare(i); err != nil {
			return err
		}
	}
	if err := c.batch.put(); err != nil {
		return err
	}
	c.batch.fill(&a.desc)
	a.training = c.pending(i)
	var err error
	if a.plan, a.fused, err = c.lease.fused.plan(c); err == nil {
		err = c.execute(i)
	}
	if errors.Is(err, errRetry) {
		index := res.Index
		a.fused, a.training, c.work = false, training{}, c.work[:0]
		err = c.execute(i)
		res.Index = index
	}
	if err != nil && !a.indexed {
		// What was booked as indexed may not be.
		c.tracker.Invalidate(i)
		if a.training.level > 0 {
			c.trained[i] = 0
		}
	}
	return err
}

// errRetry says that the fused kernel gave up on a row.
var errRetry = errors.New("fused kernel gave up")

// describe fills in what a layer's description says of the lease and the layer.
func (c *cache) describe(i int) {
	l, a := c.lease, &c.call
	g, m, layer := &l.geometry, &l.method, &c.layers[i]
	d := &a.desc
	*d = kernels.Layer{
		K: layer.planes[0], V: layer.planes[1], Sinks: l.sinks.ptr,
		QueryHeads: int32(g.QueryHeads), KVHeads: int32(g.KVHeads), Asking: int32(l.asking()),
		Rows: int32(len(a.rows) * g.QueryHeads / l.asking()),
		KDim: int32(g.KDim), VDim: int32(g.VDim),
		PageSize: int32(c.spec.PageSize), NumPages: int32(c.spec.NumPages), NullPage: c.spec.NullPage,
		Chunks: int32(c.chunks), PageShift: -1,
		CacheDType: int32(c.spec.DType), QueryDType: int32(g.Query), OutputDType: int32(g.Output),
		SoftmaxScale: g.Scale, Softcap: g.Softcap, QueryScale: g.QueryScale,
	}
	if page := uint(c.spec.PageSize); page&(page-1) == 0 {
		d.PageShift = int32(bits.TrailingZeros(page))
	}
	d.Aligned = truth(layer.aligned)
	if layer.slot != noSlot {
		m.describe(d, layer.model)
	}
	d.Thresholds, d.Channels = layer.thresholds, layer.channels
	c.shadowAddresses(i, d)
}

// prepare checks a request and plans its rows.
func (c *cache) prepare(i int) error {
	l, a := c.lease, &c.call
	g, req, batch := &l.geometry, a.req, len(a.rows)
	if err := spec.Overrides(req, batch); err != nil {
		return err
	}
	if vector := g.KDim * g.Query.Size(); req.Query.Memory == nil {
		if err := spec.Inline(req.Query.Inline, batch, g.QueryHeads, g.KDim, g.Query, "query_inline"); err != nil {
			return err
		}
		a.query = tensor{0, int64(g.QueryHeads * vector), int64(vector)}
	} else {
		var err error
		if a.query, _, err = l.lentTensor(req.Query, batch, g.QueryHeads, g.KDim, g.Query, "query_tensor"); err != nil {
			return err
		}
	}
	if err := c.prepareOutput(); err != nil {
		return err
	}
	if err := c.prepareLists(); err != nil {
		return err
	}
	for b := range a.rows {
		row := &a.rows[b]
		path, reason := l.method.path(c.layers[i].model, row, c.batch.crossover)
		a.paths, a.reasons = append(a.paths, path), append(a.reasons, reason)
		a.copyLists += row.Len - row.First
		for head := range g.KVHeads {
			of := pipeline.Row{Layer: c.layers[i].model, KVHead: head, Len: row.Len}
			if path != pipeline.Void && l.method.config.Audits(&of, b) {
				a.audited = append(a.audited, int32(b*g.KVHeads+head))
			}
		}
		if path == pipeline.Dense {
			a.dense = true
		}
		if path != pipeline.Sparse {
			continue
		}
		a.sparse = true
		_, chunks := l.method.budget(row, c.budget(b))
		a.keepMost = max(a.keepMost, chunks)
	}
	a.copyLists *= g.QueryHeads / l.asking()
	return nil
}

func (c *cache) budget(b int) int {
	if budgets := c.call.req.TokenBudget; len(budgets) > 0 {
		return int(min(budgets[b], math.MaxInt32))
	}
	return 0
}

// prepareOutput finds where outputs go.
func (c *cache) prepareOutput() error {
	l, a := c.lease, &c.call
	g, batch := &l.geometry, len(a.rows)
	if a.req.ListsOnly {
		return nil
	}
	vector := g.VDim * g.Output.Size()
	if a.req.Output == nil {
		a.outBytes = batch * g.QueryHeads * vector
		a.desc.OutputRow, a.desc.OutputHead = int64(g.QueryHeads*vector), int64(vector)
		return nil
	}
	if a.req.Output.Memory == nil {
		return fault.Newf(fault.Invalid, "output_tensor", "the output must lie in lent memory, or be left out to come inline")
	}
	t, e, err := l.lentTensor(a.req.Output, batch, g.QueryHeads, g.VDim, g.Output, "output_tensor")
	if err != nil {
		return err
	}
	a.desc.Output, a.desc.OutputRow, a.desc.OutputHead = t.at, t.row, t.head
	return l.writable(e)
}

// prepareLists finds the buffer that lists go to, if one was given.
func (c *cache) prepareLists() error {
	l, a := c.lease, &c.call
	buffer := a.req.ListBuffer
	if buffer == nil {
		return nil
	}
	if err := spec.ListCapacity(buffer); err != nil {
		return err
	}
	const entry = 4
	size := uint64(a.desc.Rows) * entry
	for _, p := range []struct {
		at   gpu.Span
		size uint64
		name string
		to   *uint64
	}{
		{buffer.Lists, size * uint64(buffer.Capacity), "list_buffer.lists", &a.desc.OutLists},
		{buffer.Counts, size, "list_buffer.counts", &a.desc.OutCounts},
	} {
		e, at, err := l.locate(p.at.Memory, p.at.Offset, p.size, entry, p.name)
		if err != nil {
			return err
		}
		if err := l.writable(e); err != nil {
			return err
		}
		*p.to = at
	}
	a.desc.OutCapacity = int32(buffer.Capacity)
	return nil
}

// execute copies in, launches, and copies out.
func (c *cache) execute(i int) error {
	l, a := c.lease, &c.call
	a.desc.Works = int32(len(c.work))
	if err := c.reserve(); err != nil {
		return err
	}
	if err := c.sendInputs(); err != nil {
		return err
	}
	if err := c.launch(i); err != nil {
		return errors.Join(err, l.wait())
	}
	if err := download(l.back.data[:a.back.end], l.results.ptr, l.stream); err != nil {
		return err
	}
	if err := l.wait(); err != nil {
		return err
	}
	a.indexed = true
	return c.collect(i)
}

// tensorCores tells whether the tensor cores may attend for the call: they read 16 bytes at a time, and
// halves of a bf16 number are not enough for an fp32 output.
func (c *cache) tensorCores() bool {
	return c.call.desc.Aligned != 0 && (c.spec.DType == kv.F16 || c.lease.geometry.Output != kv.F32)
}

// attendBlocks is how many blocks of the attention kernels a multiprocessor runs at once.
const attendBlocks = 4

// reserve lays out the call's memory and sees that there is as much.
func (c *cache) reserve() error {
	l, a := c.lease, &c.call
	g, d := &l.geometry, &a.desc
	batch, rows, asking := int(d.Batch), int(d.Rows), int(d.Asking)
	queries := batch * g.QueryHeads

	var results carver
	a.back = back{
		badQuery: results.take(8), flags: results.take(4 * batch * g.KVHeads), kept: results.take(4 * rows),
		candidates: results.take(4 * rows), mass: results.take(4 * queries), coverage: results.take(4 * queries),
		cycles: results.take(8 * 3), audits: results.take(8 * len(a.audited) * g.Group()),
		output:  results.take(a.outBytes),
		drifted: results.take(4),
	}
	a.back.end = results.used
	// What stays behind: drift, work by work, and rows' tickets.
	results.take(4 * len(c.work))
	tickets := results.take(4 * rows)

	d.FusedOwn, d.FusedCap, d.CandidateStride = int32(a.plan.room), int32(a.plan.capacity), int32(a.keepMost)
	d.ListsOnly, d.OnlyDense = truth(a.req.ListsOnly), truth(a.fused)
	d.Audits, d.AuditStride = int32(len(a.audited)), d.ChunkStride*kv.ChunkTokens
	var scratch carver
	a.scratch = a.scratch[:0]
	place := func(to *uint64, size int) {
		*to = uint64(scratch.take(size))
		a.scratch = append(a.scratch, to)
	}
	tokens, chunks := a.keepMost*kv.ChunkTokens, int(d.ChunkStride)
	inlineLists := a.req.Lists && a.req.ListBuffer == nil
	if c.asksQueries() {
		place(&d.Q, queries*g.KDim*4)
		place(&d.QBounds, queries*g.KDim*8)
		place(&d.QInt4, queries*g.KDim*4)
		place(&d.QSums, queries*16)
	}
	if c.attends() {
		// As many blocks as run at once. A row takes fewer if there is not work enough.
		d.Splits = int32(max(1, l.device.sms*attendBlocks/max(rows, 1)))
		place(&d.Partial, rows*int(d.Splits)*asking*(g.VDim+2)*4)
	}
	switch {
	case a.req.Query == nil || !a.sparse:
	case a.fused:
		if a.wantsLists() {
			place(&d.KeptMasks, rows*chunks*2)
			place(&d.Lists, rows*tokens*4)
		}
	default:
		if l.method.ranksTokens() {
			place(&d.QRank, rows*g.KDim*4)
			place(&d.Scores, rows*chunks*kv.ChunkTokens*4)
		} else {
			place(&d.Scores, rows*chunks*4)
			place(&d.HeadBounds, rows*asking*chunks*4)
		}
		place(&d.Candidates, rows*a.keepMost*4)
		place(&d.CandidateMasks, rows*a.keepMost*2)
		place(&d.NumCandidates, rows*4)
		place(&d.Logits, rows*asking*tokens*4)
		place(&d.FirstLogits, rows*asking*4)
		place(&d.Cuts, rows*asking*kernels.CutBytes)
		place(&d.Lists, rows*tokens*4)
		if d.MinBudget > 0 || d.MaxBudget > 0 {
			place(&d.Shares, rows*tokens*4)
		}
		if d.UseEstimates != 0 {
			place(&d.ListAt, rows*tokens*4)
		}
	}
	if len(a.audited) > 0 {
		place(&d.AuditLogits, len(a.audited)*g.Group()*int(d.AuditStride)*4)
	}
	if inlineLists && a.req.Query != nil {
		place(&d.OutLists, 4*a.copyLists)
		d.OutRoom = uint64(a.copyLists)
	}
	err := errors.Join(l.results.reserve(results.used), l.scratch.reserve(scratch.used), l.back.reserve(results.used))
	if err != nil {
		return err
	}
	for _, to := range a.scratch {
		*to += l.scratch.ptr
	}
	at := l.results.ptr
	d.BadQuery, d.Flags, d.Kept = at+uint64(a.back.badQuery), at+uint64(a.back.flags), at+uint64(a.back.kept)
	d.CandidateTokens = at + uint64(a.back.candidates)
	d.Mass, d.Coverage = at+uint64(a.back.mass), at+uint64(a.back.coverage)
	d.StageCycles, d.AuditResults = at+uint64(a.back.cycles), at+uint64(a.back.audits)
	d.Drifted = at + uint64(a.back.drifted)
	d.DriftFlags, d.Tickets = at+uint64(a.back.end), at+uint64(tickets)
	if a.outBytes > 0 {
		d.Output = at + uint64(a.back.output)
	}
	return zero(at, results.used, l.stream)
}

// sendInputs copies the description and what hangs on it to the device.
func (c *cache) sendInputs() error {
	l, a := c.lease, &c.call
	d, batch := &a.desc, len(a.rows)
	var inputs carver
	at := [...]int{
		inputs.take(4 * batch), inputs.take(8 * batch), inputs.take(4 * batch), inputs.take(16 * len(c.work)),
		inputs.take(4 * len(a.audited)), 0,
	}
	inline := a.req.Query != nil && a.req.Query.Memory == nil
	if inline {
		at[5] = inputs.take(len(a.req.Query.Inline))
	}
	if err := errors.Join(l.inputs.reserve(inputs.used), l.out.reserve(inputs.used)); err != nil {
		return err
	}
	base, out := l.inputs.ptr, l.out.data
	d.Paths, d.P, d.Budgets = base+uint64(at[0]), base+uint64(at[1]), base+uint64(at[2])
	d.Work, d.Audited = base+uint64(at[3]), base+uint64(at[4])
	d.Queries, d.QueryRow, d.QueryHead = a.query.at, a.query.row, a.query.head
	if inline {
		d.Queries = base + uint64(at[5])
		copy(out[at[5]:], a.req.Query.Inline)
	}
	for b, path := range a.paths {
		binary.NativeEndian.PutUint32(out[at[0]+4*b:], uint32(path))
		p := 0.0
		if len(a.req.P) > 0 {
			p = float64(a.req.P[b])
		}
		binary.NativeEndian.PutUint64(out[at[1]+8*b:], math.Float64bits(p))
		amount, _ := l.method.budget(&a.rows[b], c.budget(b))
		binary.NativeEndian.PutUint32(out[at[2]+4*b:], uint32(amount))
	}
	copy(out[at[4]:], bytesOf(a.audited))
	works := int32s(out[at[3]:][:16*len(c.work)])
	for i, w := range c.work {
		works[4*i], works[4*i+1], works[4*i+2] = int32(w.Row), int32(w.Chunk), w.ID
		works[4*i+3] = int32(uint32(w.Valid) | uint32(w.Fresh)<<16)
	}
	*(*kernels.Layer)(l.block.Pointer()) = *d
	return upload(base, out[:inputs.used], l.stream)
}

// launch runs the kernels of a layer.
func (c *cache) launch(i int) error {
	l, a := c.lease, &c.call
	d, k := &a.desc, &l.launches
	var err error
	run := func(launch drv.Launch, x, y int) {
		if err == nil && x > 0 && y > 0 {
			err = launch.Run(x, y)
		}
	}
	mark := func(stage int) {
		if err == nil {
			err = drv.Wrap("cuEventRecord", l.events[stage].Record(l.stream))
		}
	}
	mark(stageIndex)
	if !c.batch.checked {
		k.check.Set(1, d.Bad)
		run(k.check, len(a.rows), 1)
	}
	if a.training.level > 0 {
		k.train.Set(1, uint64(a.training.row))
		k.train.Set(2, uint64(a.training.level))
		run(k.train, int(d.KVHeads), 1)
	}
	const warps = 4
	run(k.index, ceilDiv(len(c.work)*int(d.KVHeads), warps), 1)
	mark(stageSelect)
	if err == nil {
		c.batch.checked = true
		if a.training.level > 0 {
			c.trained[i] = a.training.level
		}
	}
	if a.req.Query == nil {
		mark(stagePrune)
		mark(stageAttend)
		mark(stages)
		return err
	}

	rows := int(d.Rows)
	if a.fused {
		if err == nil {
			err = l.fused.run(a.plan, rows)
		}
		mark(stagePrune)
		mark(stageAttend)
		if a.wantsLists() {
			run(k.expand, rows, 1)
		}
	}
	if c.asksQueries() {
		run(k.queries, ceilDiv(len(a.rows)*int(d.QueryHeads), warps), 1)
	}
	if !a.fused {
		c.launchChain(run, mark)
	}
	switch dense, ok := c.denseLaunch(); {
	case !c.attends():
	case ok:
		run(dense, int(d.Splits), rows)
	default:
		run(k.attend, int(d.Splits), rows)
		run(k.combine, len(a.rows)*int(d.QueryHeads), 1)
	}
	if d.OutLists != 0 {
		run(k.lists, rows, 1)
	}
	mark(stages)
	run(k.audit, len(a.audited)*l.geometry.Group(), 1)
	return err
}

// launchChain runs the kernels that make the rows' lists.
func (c *cache) launchChain(run func(launch drv.Launch, x, y int), mark func(stage int)) {
	l, a := c.lease, &c.call
	d, k := &a.desc, &l.launches
	const warps = 4
	rows := int(d.Rows)
	if a.sparse {
		switch {
		case d.Selects == kernels.SelectQuest:
			run(k.scores, ceilDiv(int(d.ChunkStride), warps*16), rows)
		case d.Ranks == kernels.RankLabels:
			run(k.rankQuery, rows, 1)
			run(k.rankLabels, min(ceilDiv(int(d.ChunkStride)*kv.ChunkTokens, 128), 64), rows)
		case d.Ranks != kernels.RankNone:
			run(k.rankQuery, rows, 1)
			run(k.rankKeys, min(ceilDiv(int(d.ChunkStride)*kv.ChunkTokens, warps*4), 256), rows)
		}
		run(k.choose, rows, 1)
	}
	mark(stagePrune)
	if a.sparse {
		switch d.Estimates {
		case kernels.EstimateInt4:
			run(k.estimate, min(ceilDiv(a.keepMost+1, warps), 64), rows)
		case kernels.EstimateCodes:
			run(k.estimateCodes, min(ceilDiv(a.keepMost+1, warps), 64), rows)
		default:
			run(k.exact, min(ceilDiv((a.keepMost+1)*kv.ChunkTokens, warps), 256), rows)
		}
		run(k.cut, rows*int(d.Asking), 1)
		run(k.compact, rows, 1)
	}
	mark(stageAttend)
}

// attends tells whether rows are attended over by a kernel of its own.
func (c *cache) attends() bool {
	a := &c.call
	return a.req.Query != nil && !a.req.ListsOnly && (!a.fused || a.dense)
}

// asksQueries tells whether a kernel of its own has to look at the queries.
func (c *cache) asksQueries() bool {
	a := &c.call
	_, alone := c.denseLaunch()
	return a.req.Query != nil && (!a.fused && a.sparse || (a.dense || !a.sparse) && (!alone || a.req.ListsOnly))
}

// denseLaunch is the attention kernel on the tensor cores, if it can serve the call.
func (c *cache) denseLaunch() (drv.Launch, bool) {
	launch, ok := c.lease.dense[c.spec.DType]
	return launch, ok && c.tensorCores() && c.call.desc.UseEstimates == 0
}

// wantsLists tells whether anybody looks at the lists of a layer that runs in the fused kernel.
func (a *layerCall) wantsLists() bool {
	return a.req.Lists || a.req.ListBuffer != nil || len(a.audited) > 0
}

// collect turns what came back into the answer.
func (c *cache) collect(i int) error {
	l, a := c.lease, &c.call
	data, res := l.back.data, a.res
	for _, w := range c.work {
		res.Index.TokensIndexed += uint64(bits.OnesCount16(w.Fresh))
	}
	res.Index.TokensClaimed = c.tracker.Claimed(i)
	res.Index.ChunksDrifted = uint64(binary.NativeEndian.Uint32(data[a.back.drifted:]))
	if a.training.level > 0 {
		res.Index.StatisticsRefreshed = 1
	}
	if err := c.collectTiming(); err != nil {
		return err
	}
	if a.req.Query == nil {
		return nil
	}
	if bad := binary.NativeEndian.Uint64(data[a.back.badQuery:]); bad != 0 {
		return c.badQuery(^bad)
	}

	g := &l.geometry
	if a.fused {
		for i := range len(a.rows) * g.KVHeads {
			if binary.NativeEndian.Uint32(data[a.back.flags+4*i:])&kernels.FlagRetry != 0 {
				return errRetry
			}
		}
	}
	asking, perKV := int(a.desc.Asking), g.Group()/int(a.desc.Asking)
	at := func(column, r int) uint32 { return binary.NativeEndian.Uint32(data[column+4*r:]) }
	total, known, covered, unknown := 0, false, false, float32(math.NaN())
	for r := range int(a.desc.Rows) {
		b := r * asking / g.QueryHeads
		row := &a.rows[b]
		path, reason := a.paths[b], a.reasons[b]
		kept, candidates := at(a.back.kept, r), at(a.back.candidates, r)
		switch flags := at(a.back.flags, r/perKV); {
		case flags&kernels.FlagBadRow != 0:
			path, reason = pipeline.Void, pipeline.BadRow
		case path == pipeline.Sparse && flags&kernels.FlagNotFinite != 0:
			path, reason = pipeline.Dense, pipeline.NotFinite
		}
		share := float32(1)
		switch path {
		case pipeline.Dense:
			kept = uint32(row.Len - row.First)
			candidates = kept
		case pipeline.Void:
			kept, candidates, share = 0, 0, 0
		case pipeline.Sparse:
		}
		res.Paths, res.Reasons = append(res.Paths, path), append(res.Reasons, reason)
		res.Kept, res.Candidates = append(res.Kept, kept), append(res.Candidates, candidates)
		for h := range asking {
			mass, coverage := share, share
			switch {
			case path == pipeline.Sparse && a.fused:
				mass, coverage = unknown, unknown
			case path == pipeline.Sparse:
				mass = math.Float32frombits(at(a.back.mass, r*asking+h))
				coverage = math.Float32frombits(at(a.back.coverage, r*asking+h))
			}
			known = known || path != pipeline.Void && mass == mass
			covered = covered || path != pipeline.Void && coverage == coverage
			res.Mass, res.Coverage = append(res.Mass, mass), append(res.Coverage, coverage)
		}
		if buffer := a.req.ListBuffer; buffer != nil && int(kept) > buffer.Capacity {
			res.Truncated = append(res.Truncated, uint32(r))
		}
		total += int(kept)
		if path != pipeline.Dense || r%perKV == 0 { // lists of a KV head that are dense are one
			c.countRead(row, path, uint64(candidates), uint64(kept))
		}
	}
	c.collectAudits()
	if !known {
		res.Mass = res.Mass[:0]
	}
	if !covered {
		res.Coverage = res.Coverage[:0]
	}
	res.Output = append(res.Output, data[a.back.output:][:a.outBytes]...)
	if a.req.Lists && a.req.ListBuffer == nil {
		return c.fetchLists(min(total, a.copyLists))
	}
	return nil
}

// countRead adds what a list row read, by what the methods' records hold: a selector reads the records of
// all chunks, an estimator those of its candidates, or their keys if it keeps no records; attention reads keys
// and values, but no keys whose logits are known.
func (c *cache) countRead(row *kv.SeqRow, path pipeline.Path, candidates, kept uint64) {
	g, read := &c.lease.geometry, &c.call.res.Read
	k, v := uint64(g.KDim*c.spec.DType.Size()), uint64(g.VDim*c.spec.DType.Size())
	if c.call.req.ListsOnly {
		v = 0
	}
	switch path {
	case pipeline.Void:
		return
	case pipeline.Dense:
		if !c.call.req.ListsOnly {
			read.Cache += kept * (k + v)
		}
		return
	case pipeline.Sparse:
	}
	selector, estimator := c.lease.method.pipeline.Shadows()
	if selector != nil {
		read.Shadow += uint64(selector.HeadBytes(g.KDim) + len(row.Chunks)*selector.ChunkBytes(g.KDim))
	}
	if estimator == nil {
		read.Cache += candidates*k + kept*v
		return
	}
	read.Shadow += uint64(estimator.HeadBytes(g.KDim)) + candidates*uint64(estimator.ChunkBytes(g.KDim))/kv.ChunkTokens
	if !c.call.req.ListsOnly {
		read.Cache += kept * (k + v)
	}
}

// collectAudits reads what audits found. A row that was dense holds all the attention without error.
func (c *cache) collectAudits() {
	l, a := c.lease, &c.call
	group := l.geometry.Group()
	found := l.back.data[a.back.audits:]
	for i, row := range a.audited {
		switch a.res.Paths[int(row)*group/l.asking()] {
		case pipeline.Void:
			continue
		case pipeline.Dense:
			for h := range group {
				a.res.Audited = append(a.res.Audited, uint32(int(row)*group+h))
				a.res.TrueMass, a.res.OutputError = append(a.res.TrueMass, 1), append(a.res.OutputError, 0)
			}
		case pipeline.Sparse:
			for h := range group {
				at := 8 * (i*group + h)
				a.res.Audited = append(a.res.Audited, uint32(int(row)*group+h))
				a.res.TrueMass = append(a.res.TrueMass, math.Float32frombits(binary.NativeEndian.Uint32(found[at:])))
				a.res.OutputError = append(a.res.OutputError, math.Float32frombits(binary.NativeEndian.Uint32(found[at+4:])))
			}
		}
	}
}

// fetchLists copies the lists, which lie one behind another.
func (c *cache) fetchLists(total int) error {
	l, a := c.lease, &c.call
	if err := l.back.reserve(4 * total); err != nil {
		return err
	}
	if err := download(l.back.data[:4*total], a.desc.OutLists, l.stream); err != nil {
		return err
	}
	if err := l.wait(); err != nil {
		return err
	}
	a.res.Lists = append(a.res.Lists, int32s(l.back.data[:4*total])...)
	return nil
}

// badQuery names the element that a kernel found not to be finite.
func (c *cache) badQuery(found uint64) error {
	g := &c.lease.geometry
	at, value := int(found>>32), math.Float32frombits(uint32(found))
	d, head := at%g.KDim, at/g.KDim
	return fault.Newf(fault.Invalid, fmt.Sprintf("query[%d][%d][%d]", head/g.QueryHeads, head%g.QueryHeads, d),
		"%v must be finite", value)
}

func (c *cache) collectTiming() error {
	l, t := c.lease, &c.call.res.Timing
	for stage, to := range []*time.Duration{
		stageIndex: &t.Index, stageSelect: &t.Select, stagePrune: &t.Prune, stageAttend: &t.Attend,
	} {
		ms, err := l.events[stage].Elapsed(l.events[stage+1])
		if err != nil {
			return drv.Wrap("cuEventElapsedTime", err)
		}
		*to = time.Duration(ms * float64(time.Millisecond))
	}
	if c.call.fused {
		c.splitTiming(t)
	}
	return nil
}

// splitTiming spreads the time of the fused kernel over its stages, as its rows spent their cycles. It stands
// in Select.
func (c *cache) splitTiming(t *gpu.Timing) {
	var cycles [3]float64
	sum := 0.0
	for i := range cycles {
		cycles[i] = float64(binary.NativeEndian.Uint64(c.lease.back.data[c.call.back.cycles+8*i:]))
		sum += cycles[i]
	}
	if sum == 0 {
		return
	}
	took := float64(t.Select)
	t.Select = time.Duration(took * cycles[0] / sum)
	t.Prune += time.Duration(took * cycles[1] / sum)
	t.Attend += time.Duration(took * cycles[2] / sum)
}
