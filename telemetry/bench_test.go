package telemetry

import (
	"fmt"
	"slices"
	"testing"

	"github.com/twilight-sidecar/twilight/gpu"
)

var parents = map[string]string{"sampled": sampledParent, "not": otherParent}

// eachBatch runs a benchmark with batches of 1 and 64 sequences, sampled and not.
func eachBatch(b *testing.B, run func(l *Lease, sequences int, parent string)) {
	for name, parent := range parents {
		for _, sequences := range []int{1, 64} {
			b.Run(fmt.Sprintf("%s/%d", name, sequences), func(b *testing.B) {
				told, recorder := started(b)
				l := leased(told, 1)
				defer l.Close()
				addCache(l)
				stepped(l, 1, parent, slices.Repeat([]int32{1000}, sequences)...)
				b.ReportAllocs()
				for b.Loop() {
					run(l, sequences, parent)
					recorder.Reset()
				}
			})
		}
	}
}

// BenchmarkLayer tells what a layer costs.
func BenchmarkLayer(b *testing.B) {
	results := map[int]*gpu.LayerResult{1: result(1, 200), 64: result(64, 200)}
	eachBatch(b, func(l *Lease, sequences int, _ string) { layered(l, 4, results[sequences]) })
}

// BenchmarkStep tells what a step costs beside its layers.
func BenchmarkStep(b *testing.B) {
	id, lengths := uint64(1), slices.Repeat([]int32{1000}, 64)
	eachBatch(b, func(l *Lease, sequences int, parent string) {
		id++
		stepped(l, id, parent, lengths[:sequences]...)
	})
}
