package capture

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/nlpodyssey/safetensors"
)

// Capture is the attention input of some layers of one sequence. Only the functions of this
// package that return a Capture write it; afterwards any number of goroutines may read it.
type Capture struct {
	Meta       map[string]string // the file's metadata as stored, n, steps and scale included
	N          int               // prefill tokens
	Steps      int               // decode steps; step s stands at position N+s
	QueryHeads int               // a multiple of KVHeads
	KVHeads    int
	KDim       int // elements of a key and of a query, per head
	VDim       int // elements of a value and of an output, per head
	Window     int // queries in a QWindow; 0 if no layer has one
	Scale      float64
	Layers     []Layer // ascending by Index, all of the same shapes
}

// Layer holds one layer's tensors, row-major, with the exact values that the file stores.
type Layer struct {
	Index   int       // the layer's number in the model
	K       []float32 // [KVHeads, N+Steps, KDim]
	V       []float32 // [KVHeads, N+Steps, VDim]
	Q       []float32 // [Steps, QueryHeads, KDim]
	QWindow []float32 // [Window, QueryHeads, KDim], the prefill's last queries; nil if absent
	Mass    []float32 // [QueryHeads, N], attention received from all prefill queries; nil if absent
}

// Tokens returns the number of positions that the keys and values cover: N+Steps.
func (c *Capture) Tokens() int { return c.N + c.Steps }

// Group returns how many query heads share a KV head. Query head h reads KV head h/Group().
func (c *Capture) Group() int { return c.QueryHeads / c.KVHeads }

// Keys returns the keys of a KV head, [Tokens, KDim]: a view, not a copy. Here and in the other
// methods, layer counts within c.Layers; it is not the layer's number in the model.
func (c *Capture) Keys(layer, kvHead int) []float32 {
	return row(c.Layers[layer].K, kvHead, c.Tokens()*c.KDim)
}

// Values returns the values of a KV head, [Tokens, VDim]: a view, not a copy.
func (c *Capture) Values(layer, kvHead int) []float32 {
	return row(c.Layers[layer].V, kvHead, c.Tokens()*c.VDim)
}

// Query returns the query of a decode step and query head, [KDim]: a view, not a copy.
func (c *Capture) Query(layer, step, head int) []float32 {
	return row(c.Layers[layer].Q, step*c.QueryHeads+head, c.KDim)
}

// row returns the i-th run of size elements.
func row(s []float32, i, size int) []float32 { return s[i*size : (i+1)*size : (i+1)*size] }

// Cut returns a deep copy of c with only the given layers (numbers in the model) and KV heads,
// each with the query heads that read it. Both lists must be ascending and not empty. The kept
// heads are renumbered from 0; the metadata's layers and kv_heads say which they were.
func Cut(c *Capture, layers, kvHeads []int) (*Capture, error) {
	byIndex := make(map[int]Layer, len(c.Layers))
	for _, l := range c.Layers {
		byIndex[l.Index] = l
	}
	isLayer := func(l int) bool { _, ok := byIndex[l]; return ok }
	isHead := func(h int) bool { return 0 <= h && h < c.KVHeads }
	if err := checkPicks("layer", layers, isLayer); err != nil {
		return nil, err
	}
	if err := checkPicks("KV head", kvHeads, isHead); err != nil {
		return nil, err
	}

	cut := *c
	cut.KVHeads, cut.QueryHeads = len(kvHeads), len(kvHeads)*c.Group()
	cut.Meta = maps.Clone(c.Meta)
	if cut.Meta == nil {
		cut.Meta = make(map[string]string)
	}
	cut.Meta["layers"], cut.Meta["kv_heads"] = formatInts(layers), formatInts(kvHeads)
	cut.Window, cut.Layers = 0, make([]Layer, len(layers))
	for i, index := range layers {
		l := byIndex[index]
		if l.QWindow != nil {
			cut.Window = c.Window
		}
		cut.Layers[i] = Layer{
			Index:   index,
			K:       pick(l.K, c.KVHeads, c.Tokens()*c.KDim, kvHeads),
			V:       pick(l.V, c.KVHeads, c.Tokens()*c.VDim, kvHeads),
			Q:       pick(l.Q, c.KVHeads, c.Group()*c.KDim, kvHeads),
			QWindow: pick(l.QWindow, c.KVHeads, c.Group()*c.KDim, kvHeads),
			Mass:    pick(l.Mass, c.KVHeads, c.Group()*c.N, kvHeads),
		}
	}
	return &cut, nil
}

// pick reads s as [any, count, size] and keeps the listed entries of its second dimension.
func pick(s []float32, count, size int, kept []int) []float32 {
	var picked []float32
	for block := range slices.Chunk(s, count*size) {
		for _, i := range kept {
			picked = append(picked, row(block, i, size)...)
		}
	}
	return picked
}

func checkPicks(what string, picks []int, exists func(int) bool) error {
	if len(picks) == 0 {
		return fmt.Errorf("capture: cut: no %s given; name at least one", what)
	}
	for i, p := range picks {
		if !exists(p) {
			return fmt.Errorf("capture: cut: the capture has no %s %d", what, p)
		}
		if i > 0 && p <= picks[i-1] {
			return fmt.Errorf("capture: cut: %s %d follows %d; list each once, ascending", what, p, picks[i-1])
		}
	}
	return nil
}

// formatInts writes a list as the metadata spells it: [2, 9, 17].
func formatInts(list []int) string {
	return strings.ReplaceAll(fmt.Sprint(list), " ", ", ")
}

// dim is one dimension of a tensor. A size of 0 is not known yet.
type dim struct {
	name string
	size *int
}

type shape []dim

func (s shape) String() string {
	dims := make([]string, len(s))
	for i, d := range s {
		dims[i] = d.name
		if *d.size > 0 {
			dims[i] = fmt.Sprintf("%s=%d", d.name, *d.size)
		}
	}
	return "[" + strings.Join(dims, ", ") + "]"
}

// tensor ties a name and a shape to the slice of a Layer that holds the values.
type tensor struct {
	name     string
	shape    shape
	values   *[]float32
	optional bool
	dtype    safetensors.DType // as written; any of the three is read
}

// tensors is the format: what layer l of c has or may have.
func (c *Capture) tensors(l *Layer) []tensor {
	n, steps, window, tokens := dim{"n", &c.N}, dim{"steps", &c.Steps}, dim{"window", &c.Window}, c.Tokens()
	positions := dim{"n+steps", &tokens}
	queryHeads, kvHeads := dim{"query_heads", &c.QueryHeads}, dim{"kv_heads", &c.KVHeads}
	kDim, vDim := dim{"k_dim", &c.KDim}, dim{"v_dim", &c.VDim}
	const half, single = safetensors.F16, safetensors.F32
	name := func(suffix string) string { return fmt.Sprintf("layer.%d.%s", l.Index, suffix) }
	return []tensor{
		{name("k"), shape{kvHeads, positions, kDim}, &l.K, false, half},
		{name("v"), shape{kvHeads, positions, vDim}, &l.V, false, half},
		{name("q"), shape{steps, queryHeads, kDim}, &l.Q, false, half},
		{name("q_window"), shape{window, queryHeads, kDim}, &l.QWindow, true, half},
		{name("mass"), shape{queryHeads, n}, &l.Mass, true, single},
	}
}

// checkSizes holds the metadata's numbers to their ranges. Positions are int32 on the wire.
func (c *Capture) checkSizes() error {
	for _, d := range []dim{{"n", &c.N}, {"steps", &c.Steps}} {
		if *d.size < 1 || *d.size > math.MaxInt32/2 {
			return fmt.Errorf("capture: %s is %d, expected 1..%d", d.name, *d.size, math.MaxInt32/2)
		}
	}
	if !(c.Scale > 0) || math.IsInf(c.Scale, 1) {
		return fmt.Errorf("capture: scale is %v, expected a positive number", c.Scale)
	}
	return nil
}

// check reports the first thing that keeps c from being a capture.
func (c *Capture) check() error {
	if err := c.checkSizes(); err != nil {
		return err
	}
	if len(c.Layers) == 0 {
		return errors.New("capture: no layers; expected tensors named layer.{l}.k, .v and .q")
	}
	if c.KVHeads < 1 || c.QueryHeads%c.KVHeads != 0 {
		return fmt.Errorf("capture: tensor q has %d heads, expected a multiple of the %d that k has",
			c.QueryHeads, c.KVHeads)
	}
	last := -1
	for i := range c.Layers {
		l := &c.Layers[i]
		if l.Index <= last {
			return fmt.Errorf("capture: layer %d follows layer %d, expected ascending numbers from 0",
				l.Index, last)
		}
		last = l.Index
		for _, t := range c.tensors(l) {
			if err := t.check(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (t tensor) check() error {
	if t.optional && *t.values == nil {
		return nil
	}
	rest := len(*t.values) // divided, not multiplied: a product of sizes could overflow
	for _, d := range t.shape {
		if *d.size < 1 || rest%*d.size != 0 {
			rest = 0
			break
		}
		rest /= *d.size
	}
	if rest != 1 {
		return fmt.Errorf("capture: tensor %q has %d values, expected shape %v", t.name, len(*t.values), t.shape)
	}
	for i, x := range *t.values {
		if x-x != 0 {
			return fmt.Errorf("capture: tensor %q: value %d is %v, expected finite numbers", t.name, i, x)
		}
	}
	return nil
}
