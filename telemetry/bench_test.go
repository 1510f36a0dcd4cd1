package telemetry

import (
	"slices"
	"testing"
)

// BenchmarkLayer tells what a layer of 64 sequences costs, and BenchmarkStep what a step of them, where
// they are sampled and where not.
func BenchmarkLayer(b *testing.B) {
	for name, parent := range parents {
		b.Run(name, func(b *testing.B) {
			told, recorder := started(b)
			l := leased(told, 1)
			defer l.Close()
			addCache(l)
			stepped(l, 1, parent, slices.Repeat([]int32{1000}, 64)...)
			r := result(64, 200)
			b.ReportAllocs()
			for b.Loop() {
				layered(l, 4, r)
				recorder.Reset()
			}
		})
	}
}

// BenchmarkStep is documented at BenchmarkLayer.
func BenchmarkStep(b *testing.B) {
	for name, parent := range parents {
		b.Run(name, func(b *testing.B) {
			told, recorder := started(b)
			l := leased(told, 1)
			defer l.Close()
			addCache(l)
			lengths := slices.Repeat([]int32{1000}, 64)
			id := uint64(0)
			b.ReportAllocs()
			for b.Loop() {
				id++
				stepped(l, id, parent, lengths...)
				recorder.Reset()
			}
		})
	}
}

var parents = map[string]string{"sampled": sampledParent, "not": otherParent}
