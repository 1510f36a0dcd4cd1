// Package requestfuzz sends a daemon requests with ids, lengths, strides and offsets of all sorts, of which
// each must be answered in-band, whatever it asks.
package requestfuzz

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/twilight-sidecar/twilight/client"
)

// Fuzzer asks for what is wrong in one place or another, often. All fields but the last two are required.
type Fuzzer struct {
	T      testing.TB // is told of answers that must not be
	Random *rand.Rand

	Session *client.Session
	Cache   *client.Cache
	Spec    client.CacheSpec // as it was registered
	// Layer is a right request for one of the cache's layers, given its index in Spec.Layers; all of its
	// tensors lie in Room.
	Layer func(i int) client.Layer
	Room  *client.Buffer
	// Lend, if not nil, lends memory in some wrong way, and gives back what was taken nevertheless.
	Lend func(ctx context.Context, f *Fuzzer) error

	Served int
	Codes  map[client.Code]int // of refusals

	step *client.Step
}

// Wild is a number below n, or any.
func (f *Fuzzer) Wild(n int) int {
	if f.Random.IntN(8) > 0 {
		return f.Random.IntN(n)
	}
	all := []int{-1, n, n + 1, 1 << 20, math.MaxInt32, math.MinInt32, math.MaxUint32, 1 << 40, -(1 << 40), math.MaxInt64, math.MinInt64}
	return all[f.Random.IntN(len(all))]
}

// Rarely is a wild number in place of x.
func (f *Fuzzer) Rarely(x, n int) int {
	if f.Random.IntN(6) > 0 {
		return x
	}
	return f.Wild(n)
}

func (f *Fuzzer) tell(err error) {
	var refused *client.Error
	switch {
	case err == nil:
		f.Served++
	case !errors.As(err, &refused) || refused.Code > client.ErrDraining && refused.Code != client.ErrClosed:
		f.T.Errorf("the answer is %v", err)
	default:
		f.Codes[refused.Code]++
	}
}

// Request sends a request, or some that belong together. Every answer is counted.
func (f *Fuzzer) Request(ctx context.Context) {
	switch n := f.Random.IntN(20); {
	case n < 7 || f.step == nil:
		step, err := f.Cache.Step(ctx, f.batch(f.Spec.NumPages))
		if f.tell(err); err == nil {
			f.step = step
		}
	case n < 16:
		_, err := f.step.Layer(ctx, f.layer())
		f.tell(err)
	case n < 19:
		f.otherCache(ctx)
	case f.Lend != nil:
		f.tell(f.Lend(ctx, f))
	}
}

// batch names pages below a number, mostly.
func (f *Fuzzer) batch(pages int) (b client.Batch) {
	tokens := f.tokens()
	for range f.Rarely(1+f.Random.IntN(3), 8) % 100 {
		length := f.Rarely(1+f.Random.IntN(tokens), tokens)
		seq := client.Sequence{
			ID: uint64(f.Rarely(1+f.Random.IntN(6), 7)), Len: length, First: f.Rarely(0, 64), TruncateTo: f.Rarely(0, tokens),
			UnchangedPrefix: f.Rarely(0, tokens), PrefixOf: uint64(f.Rarely(0, 7)),
		}
		for range f.Rarely(tokens/f.Spec.PageSize, tokens/f.Spec.PageSize) % 1000 {
			page := f.Random.IntN(pages)
			if f.Random.IntN(500) == 0 {
				page = f.Wild(pages)
			}
			seq.Table = append(seq.Table, int32(page))
		}
		if f.Random.IntN(10) == 0 {
			seq.VTable = slices.Clone(seq.Table[:f.Random.IntN(len(seq.Table)+1)])
		}
		b.Sequences = append(b.Sequences, seq)
	}
	for range f.Rarely(3, 7) % 10 {
		b.Ended = append(b.Ended, uint64(f.Wild(8)))
	}
	if f.Random.IntN(10) == 0 {
		for range 20 {
			b.Slots = append(b.Slots, int64(f.Wild(pages*16)))
		}
	}
	b.IndexOnly = f.Random.IntN(10) == 0
	return b
}

// tokens are what half of the pages hold.
func (f *Fuzzer) tokens() int { return f.Spec.NumPages / 2 * f.Spec.PageSize }

func (f *Fuzzer) location() client.Location {
	b := f.Room
	if f.Random.IntN(10) == 0 {
		b = f.Spec.Layers[0].K.Buffer
	}
	return client.Location{Buffer: b, Offset: 2 * f.Wild(f.Room.Size()/2)}
}

func (f *Fuzzer) tensor(right *client.Tensor) *client.Tensor {
	t := &client.Tensor{Location: right.Location}
	if f.Random.IntN(3) == 0 {
		t.Location = f.location()
	}
	if f.Random.IntN(3) == 0 {
		t.RowStride, t.HeadStride = 2*f.Wild(4096), 2*f.Wild(512)
	}
	return t
}

func (f *Fuzzer) layer() client.Layer {
	l := f.Layer(f.Random.IntN(len(f.Spec.Layers)))
	tokens := f.tokens()
	l.Layer = f.Rarely(l.Layer, 5)
	l.QueryAt, l.Output = f.tensor(l.QueryAt), f.tensor(l.Output)
	if f.Random.IntN(10) == 0 {
		l.QueryAt, l.Query = nil, make([]byte, f.Wild(1<<12)&0xffff)
	}
	l.ListBuffer.Capacity = f.Rarely(l.ListBuffer.Capacity, tokens)
	switch f.Random.IntN(4) {
	case 0:
		l.ListBuffer = nil
	case 1:
		l.ListBuffer.Lists, l.ListBuffer.Counts = f.location(), f.location()
	}
	if f.Random.IntN(6) == 0 {
		for range f.Random.IntN(4) {
			l.P = append(l.P, []float32{0, .5, 1, -1, 2, float32(math.NaN()), float32(math.Inf(1))}[f.Random.IntN(7)])
			l.TokenBudget = append(l.TokenBudget, uint32(f.Wild(tokens)))
		}
	}
	return l
}

// otherCache registers a cache that may lie anywhere, and runs a layer on one that may be.
func (f *Fuzzer) otherCache(ctx context.Context) {
	spec := f.Spec
	spec.DType = client.DType(f.Rarely(int(spec.DType), 6))
	spec.PageSize = f.Rarely(spec.PageSize, 64)
	spec.NumPages = f.Rarely(spec.NumPages, 2*f.Spec.NumPages)
	spec.MaxTokens = f.Rarely(0, 1<<20)
	stride := func(s client.Strides) client.Strides {
		return client.Strides{Page: f.Rarely(s.Page, 1<<16), Head: f.Rarely(s.Head, 1<<12), Token: f.Rarely(s.Token, 1<<10)}
	}
	spec.K = stride(spec.K)
	if f.Random.IntN(4) == 0 {
		spec.V = stride(f.Spec.K)
	}
	spec.Layers = slices.Clone(spec.Layers)
	for i := range spec.Layers {
		l := &spec.Layers[i]
		l.Layer = f.Rarely(l.Layer, 5)
		l.K.Offset, l.V.Offset = f.Rarely(l.K.Offset, l.K.Buffer.Size()), f.Rarely(l.V.Offset, l.V.Buffer.Size())
		if f.Random.IntN(20) == 0 {
			l.KScales = []float32{float32(f.Wild(3))}
		}
	}
	c, err := f.Session.RegisterCache(ctx, spec)
	if f.tell(err); err != nil {
		return
	}
	step, err := c.Step(ctx, f.batch(spec.NumPages))
	if f.tell(err); err == nil {
		l := f.layer()
		l.Layer = spec.Layers[0].Layer
		_, err = step.Layer(ctx, l)
		f.tell(err)
	}
	if err := c.Close(ctx); err != nil {
		f.T.Errorf("a cache does not close: %v", err)
	}
}
