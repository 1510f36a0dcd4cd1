package client

import (
	"math"

	"github.com/twilight-sidecar/twilight/kv"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

// DType is an element type.
type DType = kv.DType

// The element types.
const (
	F32    = kv.F32
	F16    = kv.F16
	BF16   = kv.BF16
	F8E4M3 = kv.F8E4M3
)

// Geometry is the shape of the attention that a session serves. An engine with several kinds of
// attention layers opens a session for each.
type Geometry struct {
	Layers     int // layers in the session's caches, not necessarily all of the model's
	QueryHeads int // Hq, a multiple of KVHeads
	KVHeads    int // Hkv
	KDim       int // elements of a key or query head
	VDim       int // elements of a value or output head; 0 means KDim

	// Scale and Softcap shape logits: l = Scale*(q.k), then Softcap*tanh(l/Softcap) if Softcap > 0.
	// A Scale of 0 means 1/sqrt(KDim).
	Scale, Softcap float32
	// Sinks, if not nil, holds one logit per query head that joins the softmax's denominator.
	Sinks []float32

	Query      DType
	QueryScale float32 // real query = stored * QueryScale; 0 means 1; others need an F8E4M3 Query
	Output     DType   // 0 means Query's
}

func (g Geometry) withDefaults() Geometry {
	if g.VDim == 0 {
		g.VDim = g.KDim
	}
	if g.Scale == 0 && g.KDim > 0 {
		g.Scale = float32(1 / math.Sqrt(float64(g.KDim)))
	}
	if g.QueryScale == 0 {
		g.QueryScale = 1
	}
	if g.Output == 0 {
		g.Output = g.Query
	}
	return g
}

func (g Geometry) proto() *twilightv1.Geometry {
	g = g.withDefaults()
	return &twilightv1.Geometry{
		NumLayers:    uint32(g.Layers),
		QueryHeads:   uint32(g.QueryHeads),
		KvHeads:      uint32(g.KVHeads),
		KDim:         uint32(g.KDim),
		VDim:         uint32(g.VDim),
		SoftmaxScale: g.Scale,
		LogitSoftcap: g.Softcap,
		Sinks:        g.Sinks,
		QueryDtype:   twilightv1.DataType(g.Query),
		QueryScale:   g.QueryScale,
		OutputDtype:  twilightv1.DataType(g.Output),
	}
}

// EncodeQuery appends q, real values, to dst as the geometry stores queries.
func (g Geometry) EncodeQuery(dst []byte, q []float32) []byte {
	g = g.withDefaults()
	if g.QueryScale != 1 {
		stored := make([]float32, len(q))
		for i, x := range q {
			stored[i] = x / g.QueryScale
		}
		q = stored
	}
	at := len(dst)
	dst = append(dst, make([]byte, len(q)*g.Query.Size())...)
	g.Query.Encode(dst[at:], q)
	return dst
}

// DecodeOutput appends the values of out, an output as the geometry stores it, to dst.
func (g Geometry) DecodeOutput(dst []float32, out []byte) []float32 {
	g = g.withDefaults()
	at := len(dst)
	dst = append(dst, make([]float32, len(out)/g.Output.Size())...)
	g.Output.Decode(dst[at:], out)
	return dst
}
