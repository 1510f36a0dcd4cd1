package host

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/internal/spec"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
)

// entryBytes is the size of an int32 in a list buffer.
const entryBytes = 4

// call is a call of Layer, shared by its tasks. Task b*Hkv+h is the row of sequence b and KV head h.
type call struct {
	layer   int // index in the cache's layers
	request *gpu.LayerRequest
	answer  *gpu.LayerResult
	rows    []kv.SeqRow

	query, output tensor
	observed      observed
	lists, counts extent // a list buffer's
	listData      []byte // nil without
	countData     []byte

	tasks   int
	queries []float32         // decoded, [B][Hq][KDim]
	results []pipeline.Result // by task, and those of larger batches
	shares  shares
}

func (c *cache) Layer(ctx context.Context, request *gpu.LayerRequest, answer *gpu.LayerResult) error {
	c.lease.mu.Lock()
	defer c.lease.mu.Unlock()
	if err := c.usable(ctx); err != nil {
		return err
	}
	if err := c.armed.idle(); err != nil {
		return err
	}
	return c.layer(ctx, request, answer)
}

// layer is Layer under the lease's lock.
func (c *cache) layer(ctx context.Context, request *gpu.LayerRequest, answer *gpu.LayerResult) error {
	start := time.Now()
	i, err := c.index(request.Layer, "layer")
	if err != nil {
		return err
	}
	if !c.stepped {
		return errNoStep
	}
	a := &c.call
	*a = call{
		layer: i, request: request, answer: answer, rows: c.tracker.Rows(),
		queries: a.queries, results: a.results, shares: a.shares,
	}
	defer func() { *a = call{queries: a.queries, results: a.results, shares: a.shares} }() // nothing of the caller's is kept
	if err := c.run(ctx, a); err != nil {
		return c.lease.explain(err, a.query.extent, a.output.extent, a.lists, a.counts,
			a.observed.extents[0], a.observed.extents[1],
			c.layers[i].extents[0], c.layers[i].extents[1])
	}
	answer.Timing.Wall = time.Since(start)
	return nil
}

// index is where the cache has one of the model's layers.
func (c *cache) index(layer int, field string) (int, error) {
	i, ok := c.byModel[layer]
	if !ok {
		return 0, fault.Newf(fault.NotFound, field, "the cache has no layer %d: name one of its own", layer)
	}
	return i, nil
}

func (c *cache) run(ctx context.Context, a *call) error {
	*a.answer = gpu.LayerResult{
		Candidates: a.answer.Candidates[:0], Kept: a.answer.Kept[:0],
		Paths: a.answer.Paths[:0], Reasons: a.answer.Reasons[:0],
		Lists: a.answer.Lists[:0], Truncated: a.answer.Truncated[:0], Output: a.answer.Output[:0],
		Mass: a.answer.Mass[:0], Coverage: a.answer.Coverage[:0],
		Audited: a.answer.Audited[:0], TrueMass: a.answer.TrueMass[:0], OutputError: a.answer.OutputError[:0],
	}
	pool := c.lease.device.pool
	if a.request.Query != nil {
		if err := c.prepare(a); err != nil {
			return err
		}
		if err := pool.do(ctx, c.job, len(a.rows), c.queryTask); err != nil {
			return err
		}
	}
	if err := c.prepareObservation(a); err != nil {
		return err
	}
	if a.request.Observation != nil {
		if err := pool.do(ctx, c.job, len(a.rows), c.windowTask); err != nil {
			return err
		}
	}
	busy, err := c.indexLayer(ctx, a.layer, &a.answer.Index)
	if err != nil {
		return err
	}
	a.answer.Timing.Index = busy
	if a.request.Observation != nil {
		if err := pool.do(ctx, c.job, len(a.rows)*c.lease.geometry.KVHeads, c.observeTask); err != nil {
			return err
		}
	}
	if a.request.Query == nil {
		return nil
	}
	if c.lease.needs.Shares {
		a.shares.shape(a.rows, c.lease.geometry.KVHeads*c.lease.lists)
		if err := pool.do(ctx, c.job, a.tasks, c.weighTask); err != nil {
			return err
		}
		if err := pool.do(ctx, c.job, len(a.rows), c.shareTask); err != nil {
			return err
		}
	}
	if err := pool.do(ctx, c.job, a.tasks, c.attendTask); err != nil {
		return err
	}
	c.finish(a)
	return nil
}

// prepare checks a request and makes room for its results.
func (c *cache) prepare(a *call) error {
	l, g, r := c.lease, &c.lease.geometry, a.request
	batch := len(a.rows)
	if err := spec.Overrides(r, batch); err != nil {
		return err
	}
	var err error
	if a.query, err = l.tensor(r.Query, batch, g.QueryHeads, g.KDim, g.Query, &queryField); err != nil {
		return err
	}
	if err := c.prepareOutput(a); err != nil {
		return err
	}
	if err := c.prepareLists(a, batch); err != nil {
		return err
	}

	a.queries = sized(a.queries, batch*g.QueryHeads*g.KDim)
	a.tasks = batch * g.KVHeads
	if more := a.tasks - len(a.results); more > 0 {
		a.results = append(a.results, make([]pipeline.Result, more)...)
	}
	listRows := a.tasks * l.lists
	a.answer.Candidates, a.answer.Kept = sized(a.answer.Candidates, listRows), sized(a.answer.Kept, listRows)
	a.answer.Paths, a.answer.Reasons = sized(a.answer.Paths, listRows), sized(a.answer.Reasons, listRows)
	a.answer.Mass = sized(a.answer.Mass, batch*g.QueryHeads)
	a.answer.Coverage = sized(a.answer.Coverage, batch*g.QueryHeads)
	return nil
}

// prepareOutput finds where outputs go.
func (c *cache) prepareOutput(a *call) (err error) {
	g, batch := &c.lease.geometry, len(a.rows)
	if a.request.ListsOnly {
		return nil
	}
	if a.request.Output == nil {
		vector := g.VDim * g.Output.Size()
		a.answer.Output = sized(a.answer.Output, batch*g.QueryHeads*vector)
		a.output = packed(a.answer.Output, g.QueryHeads, vector)
		return nil
	}
	a.output, err = c.lease.tensor(a.request.Output, batch, g.QueryHeads, g.VDim, g.Output, &outputField)
	if err != nil || a.request.Output.Memory == nil {
		return err
	}
	return c.lease.writable(a.output.extent)
}

// prepareLists finds the buffer that lists go to, if one was given.
func (c *cache) prepareLists(a *call, batch int) (err error) {
	buffer := a.request.ListBuffer
	if buffer == nil {
		return nil
	}
	if err := spec.ListCapacity(buffer); err != nil {
		return err
	}
	size := uint64(batch*c.lease.geometry.KVHeads*c.lease.lists) * entryBytes
	for _, p := range []struct {
		at     gpu.Span
		size   uint64
		name   string
		extent *extent
		data   *[]byte
	}{
		{buffer.Lists, size * uint64(buffer.Capacity), "list_buffer.lists", &a.lists, &a.listData},
		{buffer.Counts, size, "list_buffer.counts", &a.counts, &a.countData},
	} {
		if *p.extent, *p.data, err = c.lease.locate(p.at.Memory, p.at.Offset, p.size, entryBytes, p.name); err != nil {
			return err
		}
		if err := c.lease.writable(*p.extent); err != nil {
			return err
		}
	}
	return nil
}

// readQuery decodes the queries of a sequence.
func (c *cache) readQuery(_, b int) error {
	g, a := &c.lease.geometry, &c.call
	if a.rows[b].Len == 0 {
		return nil
	}
	for h := range g.QueryHeads {
		q := a.queries[(b*g.QueryHeads+h)*g.KDim:][:g.KDim]
		g.Query.Decode(q, a.query.at(b, h))
		for d := range q {
			if g.QueryScale != 1 {
				q[d] *= g.QueryScale
			}
			if math.IsNaN(float64(q[d])) || math.IsInf(float64(q[d]), 0) {
				return fault.Newf(fault.Invalid, fmt.Sprintf("query[%d][%d][%d]", b, h, d),
					"%v must be finite", q[d])
			}
		}
	}
	return nil
}

// attend runs a row and writes what came of it.
func (c *cache) attend(worker, task int) error {
	g, a, s := &c.lease.geometry, &c.call, &c.lease.scratch[worker]
	b, head := task/g.KVHeads, task%g.KVHeads
	seq, result := &a.rows[b], &a.results[task]
	if seq.Len == 0 {
		c.void(a, task)
		return nil
	}

	group := g.Group()
	c.setRow(s, task)
	c.setQuery(s, task)
	if c.lease.needs.Shares && a.shares.means[b] > 0 {
		s.row.Budgets = a.shares.budgets[task*c.lease.lists:][:c.lease.lists]
	}
	c.lease.pipeline.Run(&s.pipeline, &s.row, result)
	if c.lease.config.Audits(&s.row, b) {
		c.lease.pipeline.Audit(&s.pipeline, &s.row, result)
	}

	for i := range c.lease.lists {
		r := task*c.lease.lists + i
		a.answer.Candidates[r], a.answer.Kept[r] = uint32(result.Candidates[i]), uint32(result.Kept[i])
		a.answer.Paths[r], a.answer.Reasons[r] = result.Path, result.Reason
		if a.listData != nil {
			storeList(a, r, result, i, seq)
		}
	}
	for i := range group {
		q := task*group + i
		a.answer.Mass[q], a.answer.Coverage[q] = result.Mass[i], result.Coverage[i]
		if !a.request.ListsOnly {
			g.Output.Encode(a.output.at(b, head*group+i), result.Output[i*g.VDim:][:g.VDim])
		}
	}
	return nil
}

// setRow sets s.row to what a task's row has with or without a query.
func (c *cache) setRow(s *scratch, task int) {
	g, a := &c.lease.geometry, &c.call
	b, head := task/g.KVHeads, task%g.KVHeads
	seq, layer := &a.rows[b], &c.layers[a.layer]
	s.row = pipeline.Row{
		Layer: layer.model, KVHead: head,
		Keys: layer.k.Reader(seq.Table, head), Values: layer.v.Reader(seq.VTable, head),
		First: seq.First, Len: seq.Len,
	}
	if c.lease.needs.Carry {
		s.row.Carry = c.carries[task*c.lease.lists:][:c.lease.lists]
	}
	if c.lease.needs.State {
		s.row.State, s.row.Step = c.states.at(b, a.layer, head, g.KVHeads), c.states.step
	}
}

// setQuery sets what s.row has with a query only.
func (c *cache) setQuery(s *scratch, task int) {
	g, a := &c.lease.geometry, &c.call
	b, head := task/g.KVHeads, task%g.KVHeads
	size := g.Group() * g.KDim
	s.row.Queries = a.queries[task*size:][:size]
	s.row.SelectorRecords = c.selector.records(&s.selector, a.layer, head, a.rows[b].Chunks)
	s.row.EstimatorRecords = c.estimator.records(&s.estimator, a.layer, head, a.rows[b].Chunks)
	s.row.ListsOnly = a.request.ListsOnly
	if len(a.request.P) > 0 {
		s.row.P = a.request.P[b]
	}
	if len(a.request.TokenBudget) > 0 {
		s.row.TokenBudget = int(a.request.TokenBudget[b])
	}
}

// void is attend for a sequence of length 0.
func (c *cache) void(a *call, task int) {
	g := &c.lease.geometry
	for i := range c.lease.lists {
		r := task*c.lease.lists + i
		a.answer.Candidates[r], a.answer.Kept[r] = 0, 0
		a.answer.Paths[r], a.answer.Reasons[r] = pipeline.Void, pipeline.Empty
		if a.listData != nil {
			binary.LittleEndian.PutUint32(a.countData[r*entryBytes:], 0)
		}
	}
	group := g.Group()
	for i := range group {
		q := task*group + i
		a.answer.Mass[q], a.answer.Coverage[q] = 0, 0
		if !a.request.ListsOnly {
			clear(a.output.at(task/g.KVHeads, task%g.KVHeads*group+i)[:g.VDim*g.Output.Size()])
		}
	}
}

// storeList writes list i of a row to the list buffer, as list row r, cut to its capacity.
func storeList(a *call, r int, result *pipeline.Result, i int, seq *kv.SeqRow) {
	capacity := a.request.ListBuffer.Capacity
	n := min(result.Kept[i], capacity)
	data := a.listData[r*capacity*entryBytes:]
	for j := range n {
		binary.LittleEndian.PutUint32(data[j*entryBytes:], uint32(entry(result, i, j, seq)))
	}
	binary.LittleEndian.PutUint32(a.countData[r*entryBytes:], uint32(n))
}

// entry is position j of list i. A dense row has no list but keeps every valid position.
func entry(result *pipeline.Result, i, j int, seq *kv.SeqRow) int32 {
	if result.Lists == nil {
		return int32(seq.First + j)
	}
	return result.Lists[i][j]
}

// finish gathers what tasks cannot write side by side.
func (c *cache) finish(a *call) {
	g, answer := &c.lease.geometry, a.answer
	known, covered := false, false
	for task := range a.tasks {
		seq, result := &a.rows[task/g.KVHeads], &a.results[task]
		if seq.Len == 0 {
			continue
		}
		answer.Timing.Select += result.Timing.Select
		answer.Timing.Prune += result.Timing.Prune
		answer.Timing.Attend += result.Timing.Attend
		c.countRead(&answer.Read, a, seq, result)
		for i := range result.Mass {
			known = known || !math.IsNaN(float64(result.Mass[i]))
			covered = covered || !math.IsNaN(float64(result.Coverage[i]))
		}
		for i := range result.TrueMass {
			answer.Audited = append(answer.Audited, uint32(task*g.Group()+i))
		}
		answer.TrueMass = append(answer.TrueMass, result.TrueMass...)
		answer.OutputError = append(answer.OutputError, result.OutputError...)
		for i, kept := range result.Kept {
			switch {
			case a.request.ListBuffer != nil:
				if kept > a.request.ListBuffer.Capacity {
					answer.Truncated = append(answer.Truncated, uint32(task*c.lease.lists+i))
				}
			case a.request.Lists:
				for j := range kept {
					answer.Lists = append(answer.Lists, entry(result, i, j, seq))
				}
			}
		}
	}
	if !known {
		answer.Mass = answer.Mass[:0]
	}
	if !covered {
		answer.Coverage = answer.Coverage[:0]
	}
}

// countRead adds what a row read. A selector reads the records of all chunks, or keys, an estimator the
// records of its candidates, or their keys if it keeps none; attention reads keys and values, but no keys
// whose logits are known.
func (c *cache) countRead(read *gpu.Read, a *call, seq *kv.SeqRow, result *pipeline.Result) {
	keys, values := &c.layers[a.layer].k, &c.layers[a.layer].v
	k, v := uint64(keys.Dim*keys.DType.Size()), uint64(values.Dim*values.DType.Size())
	if a.request.ListsOnly {
		v = 0
	}
	if result.Path == pipeline.Dense {
		if !a.request.ListsOnly {
			read.Cache += uint64(seq.Len-seq.First) * (k + v)
		}
		return
	}
	read.Cache += uint64(result.KeysSelected) * k
	for i, kept := range result.Kept {
		candidates, kept := uint64(result.Candidates[i]), uint64(kept)
		if c.selector != nil {
			read.Shadow += uint64(c.selector.headBytes + len(seq.Chunks)*c.selector.chunkBytes)
		}
		if c.estimator == nil {
			read.Cache += candidates*k + kept*v
			continue
		}
		read.Shadow += uint64(c.estimator.headBytes) + candidates*uint64(c.estimator.chunkBytes)/kv.ChunkTokens
		if !a.request.ListsOnly {
			read.Cache += kept * (k + v)
		}
	}
}

// sized returns s with length n and any content.
func sized[T any](s []T, n int) []T { return slices.Grow(s[:0], n)[:n] }
