package replay

import (
	"context"
	"slices"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/internal/capture"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
	"github.com/twilight-sidecar/twilight/pipeline/methods"
)

// lendPrefill lends a buffer for what the prefill saw, where the capture and the config have a use for it.
func (e *engine) lendPrefill(ctx context.Context) (err error) {
	c := e.Capture
	needs := needsOf(e.session.Config())
	wanted := func(l capture.Layer) bool { return needs.Window > 0 && l.QWindow != nil || needs.Mass && l.Mass != nil }
	if !slices.ContainsFunc(c.Layers, wanted) {
		return nil
	}
	window := c.Window * c.QueryHeads * c.KDim * e.session.Geometry().Query.Size()
	e.prefill, err = e.Memory.Lend(ctx, e.session, massAt(window)+c.QueryHeads*c.N*kv.F32.Size(), client.ReadOnly)
	return err
}

// needsOf is what a config needs; nothing if it is not one that is known here.
func needsOf(config string) pipeline.Needs {
	all, err := methods.New()
	if err != nil {
		return pipeline.Needs{}
	}
	parsed, err := all.Parse([]byte(config))
	if err != nil {
		return pipeline.Needs{}
	}
	p, err := pipeline.New(parsed, &kv.Geometry{Layers: 1, KVHeads: 1, QueryHeads: 1})
	if err != nil {
		return pipeline.Needs{}
	}
	return p.Needs()
}

// massAt is where the mass begins in the buffer, behind the window's queries.
func massAt(window int) int { return (window + 3) / 4 * 4 }

// observe writes what the prefill saw in a layer, and says where.
func (e *engine) observe(layer int) (*client.Observation, error) {
	c, l := e.Capture, &e.Capture.Layers[layer]
	if e.prefill == nil || l.QWindow == nil && l.Mass == nil {
		return nil, nil
	}
	o := &client.Observation{}
	end := 0
	if l.QWindow != nil {
		end = len(e.session.Geometry().EncodeQuery(e.prefill.Bytes()[:0], l.QWindow))
		o.Window, o.WindowQueriesAt = c.Window, &client.Location{Buffer: e.prefill.Lent()}
	}
	if l.Mass != nil {
		kv.F32.Encode(e.prefill.Bytes()[massAt(end):], l.Mass)
		o.MassTokens, o.MassAt = c.N, &client.Location{Buffer: e.prefill.Lent(), Offset: massAt(end)}
	}
	return o, e.prefill.Push()
}
