package kv

// Geometry is the shape of the attention that a lease serves.
type Geometry struct {
	Layers     int // layers in the lease's caches
	QueryHeads int // Hq, a multiple of KVHeads
	KVHeads    int // Hkv
	KDim       int // elements of a key or query head
	VDim       int // elements of a value or output head

	// Scale and Softcap shape logits: l = Scale*(q.k), then Softcap*tanh(l/Softcap) if Softcap > 0.
	Scale   float32
	Softcap float32
	// Sinks, if not nil, holds one logit per query head that joins the softmax's denominator.
	Sinks []float32

	Query      DType
	QueryScale float32 // real query = stored * QueryScale; 1 unless Query is F8E4M3
	Output     DType
}

// Group returns G, the number of query heads that share a KV head.
func (g *Geometry) Group() int { return g.QueryHeads / g.KVHeads }
