package host

import (
	"errors"
	"fmt"
	"math"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
)

// maxWindow bounds an observation's window, as the proto does.
const maxWindow = 4096

// observed is a request's observation: as it came, and decoded as far as methods look at it.
type observed struct {
	window, massTokens int
	queryData          []byte // [B][window][Hq][KDim] of the query dtype
	massData           []byte // [B][Hq][massTokens] fp32
	extents            [2]extent

	queries []float32 // [B][Hq][window][KDim]
	mass    []float32 // [B][Hq][massTokens]
}

// prepareObservation checks the request's observation, and that rows which need one have it.
func (c *cache) prepareObservation(a *call) error {
	l, g, o := c.lease, &c.lease.geometry, a.request.Observation
	if o == nil && (!l.needs.State || a.request.Query == nil) {
		return nil
	}
	if o != nil {
		if err := c.locateObservation(a, o); err != nil {
			return err
		}
		if a.observed.queries == nil && a.observed.mass == nil {
			return fault.Newf(fault.Unsupported, "observation",
				"is set, but no method of the lease's config takes what it holds: leave it out")
		}
	}
	for b := range a.rows {
		seq := &a.rows[b]
		if seq.Len == 0 {
			continue
		}
		if o != nil && o.Mass != nil && o.MassTokens < a.prompt(b) {
			return fault.Newf(fault.Invalid, "observation.mass_tokens",
				"%d are fewer than the %d tokens of prompt [%d]: send the mass of each", o.MassTokens, a.prompt(b), b)
		}
		var of *pipeline.Observation
		if o != nil {
			of = &pipeline.Observation{Prompt: a.prompt(b), Window: a.observed.window}
		}
		for head := range g.KVHeads {
			row := pipeline.Row{
				Layer: c.layers[a.layer].model, First: seq.First, Len: seq.Len,
				State: c.states.at(b, a.layer, head, g.KVHeads),
			}
			var f *fault.Error
			if err := l.pipeline.CheckObserved(&row, of); errors.As(err, &f) {
				return fault.Newf(f.Kind, f.Field, "%s (sequence [%d] of the step)", f.Text, b)
			}
		}
	}
	return nil
}

// prompt is the position behind the prefill's last token: that of the query, if there is one, follows it.
func (a *call) prompt(b int) int {
	if a.request.Query != nil {
		return a.rows[b].Len - 1
	}
	return a.rows[b].Len
}

// locateObservation finds the parts of an observation and makes room to decode them.
func (c *cache) locateObservation(a *call, o *gpu.Observation) (err error) {
	l, g, x := c.lease, &c.lease.geometry, &a.observed
	heads := len(a.rows) * g.QueryHeads
	limit := l.device.options.Limits.SequenceTokens
	switch {
	case (o.Window != 0) != (o.WindowQueries != nil):
		return fault.Newf(fault.Invalid, "observation.window",
			"%d queries are announced, and window_queries are there: %v", o.Window, o.WindowQueries != nil)
	case o.Window < 0 || o.Window > maxWindow:
		return fault.Newf(fault.Invalid, "observation.window", "%d must be in [1, %d]", o.Window, maxWindow)
	case (o.MassTokens != 0) != (o.Mass != nil):
		return fault.Newf(fault.Invalid, "observation.mass_tokens",
			"%d tokens are announced, and mass is there: %v", o.MassTokens, o.Mass != nil)
	case o.MassTokens < 0 || o.MassTokens > limit:
		return fault.Newf(fault.Invalid, "observation.mass_tokens", "%d must be in [1, %d]", o.MassTokens, limit)
	case o.WindowQueries == nil && o.Mass == nil:
		return fault.Newf(fault.Invalid, "observation", "is empty: send window_queries, mass, or both")
	}
	if o.WindowQueries != nil {
		n := heads * o.Window * g.KDim
		x.queryData, x.extents[0], err = l.packed(o.WindowQueries, n, g.Query, "observation.window_queries")
		if err != nil {
			return err
		}
		if x.window = o.Window; l.needs.Window > 0 {
			x.queries = make([]float32, n)
		}
	}
	if o.Mass != nil {
		n := heads * o.MassTokens
		x.massData, x.extents[1], err = l.packed(o.Mass, n, kv.F32, "observation.mass")
		if err != nil {
			return err
		}
		if x.massTokens = o.MassTokens; l.needs.Mass {
			x.mass = make([]float32, n)
		}
	}
	return nil
}

// packed returns n packed elements that t holds, or locates. field is that of t, but for its ending.
func (l *lease) packed(t *gpu.Tensor, n int, dtype kv.DType, field string) ([]byte, extent, error) {
	size := n * dtype.Size()
	if t.Memory == nil {
		if len(t.Inline) != size {
			return nil, extent{}, fault.Newf(fault.Invalid, field+"_inline",
				"%d bytes must be %d, those of %d values in %v", len(t.Inline), size, n, dtype)
		}
		return t.Inline, extent{}, nil
	}
	e, data, err := l.locate(t.Memory, t.Offset, uint64(size), dtype.Size(), field+"_at")
	return data, e, err
}

// readObservation decodes what the engine saw of a sequence.
func (c *cache) readObservation(_, b int) error {
	g, a := &c.lease.geometry, &c.call
	x := &a.observed
	if a.rows[b].Len == 0 {
		return nil
	}
	vector := g.KDim * g.Query.Size()
	for h := range g.QueryHeads {
		at := b*g.QueryHeads + h
		if x.queries != nil {
			for w := range x.window {
				q := x.queries[(at*x.window+w)*g.KDim:][:g.KDim]
				g.Query.Decode(q, x.queryData[((b*x.window+w)*g.QueryHeads+h)*vector:])
				for d := range q {
					q[d] *= g.QueryScale
				}
				if d := notFinite(q); d >= 0 {
					return fault.Newf(fault.Invalid, fmt.Sprintf("observation.window_queries[%d][%d][%d][%d]", b, w, h, d),
						"%v must be finite", q[d])
				}
			}
		}
		if x.mass != nil {
			mass := x.mass[at*x.massTokens:][:x.massTokens]
			kv.F32.Decode(mass, x.massData[at*x.massTokens*kv.F32.Size():])
			for n, m := range mass[:a.prompt(b)] {
				if !(m >= 0) || math.IsInf(float64(m), 1) {
					return fault.Newf(fault.Invalid, fmt.Sprintf("observation.mass[%d][%d][%d]", b, h, n),
						"%v must be finite, and 0 or more", m)
				}
			}
		}
	}
	return nil
}

// notFinite returns the index of the first value that is not finite, -1 if all are.
func notFinite(x []float32) int {
	for i, f := range x {
		if f-f != 0 {
			return i
		}
	}
	return -1
}

// observe starts a row's state from what the engine saw.
func (c *cache) observe(worker, task int) error {
	g, a, s := &c.lease.geometry, &c.call, &c.lease.scratch[worker]
	b := task / g.KVHeads
	if a.rows[b].Len == 0 {
		return nil
	}
	x, group := &a.observed, g.Group()
	o := pipeline.Observation{Prompt: a.prompt(b), Window: x.window}
	if x.queries != nil {
		n := group * x.window * g.KDim
		o.Queries = x.queries[task*n:][:n]
	}
	if x.mass != nil {
		n := group * x.massTokens
		o.Mass = x.mass[task*n:][:n]
	}
	c.setRow(s, task)
	c.lease.pipeline.Observe(&s.pipeline, &s.row, &o)
	return nil
}
