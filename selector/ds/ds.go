package ds

import (
	"strconv"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/selector"
)

type ds struct {
	tokenBudget  int
	sparsityRate float64
	labels       labels
}

var _ selector.Fitter = ds{}

func (d ds) Shadow() kv.Shadow {
	if d.labels.format.Bits == Unquantised {
		return nil
	}
	return d.labels
}

// Fits implements selector.Fitter.
func (d ds) Fits(layer int, g *kv.Geometry) error {
	heads := d.labels.lists[layer]
	field := "channels[" + strconv.Quote(strconv.Itoa(layer)) + "]"
	if len(heads) != g.KVHeads {
		return fault.Newf(fault.Invalid, field,
			"layer %d has %d lists of channels, expected one for each of its %d KV heads", layer, len(heads), g.KVHeads)
	}
	for h, list := range heads {
		for i, channel := range list {
			if int(channel) >= g.KDim {
				return fault.Newf(fault.Invalid, field+"["+strconv.Itoa(h)+"]["+strconv.Itoa(i)+"]",
					"channel is %d, but keys have %d channels: the lists are another model's", channel, g.KDim)
			}
		}
	}
	return nil
}

// Unit implements selector.Ranker.
func (ds) Unit() int { return 1 }

// Select implements selector.Selector.
func (d ds) Select(dst []int32, row *selector.Row) []int32 {
	budget, n := row.Budget(d.tokenBudget, d.sparsityRate), row.Len-row.First
	list := d.labels.list(row.Layer, row.Head)
	if budget >= n || list == nil {
		return selector.All(dst, row)
	}
	if d.labels.format.Bits == Unquantised {
		return d.selectExact(dst, row, list, budget)
	}
	head := row.Records.Head()
	if !seeded(head) {
		return selector.All(dst, row)
	}
	r := d.labels.r
	f32 := row.Scratch.Floats(n + row.Dim + r)
	scores, query, label := selector.Take(&f32, n), selector.Take(&f32, row.Dim), selector.Take(&f32, r)
	row.Sum(query)
	for i, channel := range list {
		label[i] = query[channel]
	}
	row.Scratch.I32 = selector.All(row.Scratch.I32[:0], row)
	d.labels.format.Dots([][]float32{scores}, label, []float32{0}, row.Records, row.Scratch.I32)
	return selector.Top(dst, row, scores, budget)
}

// selectExact ranks by the channels of the keys themselves.
func (d ds) selectExact(dst []int32, row *selector.Row, list []uint16, budget int) []int32 {
	n, dim := row.Len-row.First, row.Dim
	f32 := row.Scratch.Floats(n + (2+selector.ExactBlock)*dim)
	scores, sum, query := selector.Take(&f32, n), selector.Take(&f32, dim), selector.Take(&f32, dim)
	row.Sum(sum)
	clear(query)
	for _, channel := range list {
		if int(channel) < dim {
			query[channel] = sum[channel]
		}
	}
	selector.Exact(scores, row, query, f32)
	return selector.Top(dst, row, scores, budget)
}
