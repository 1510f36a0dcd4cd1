//go:build linux && cgo && cuda

package cuda

import (
	"context"
	"testing"
	"time"

	"github.com/twilight-sidecar/twilight/gpu"
)

// TestArmedAllocations has armed steps allocate nothing for a layer, and next to nothing for a step.
func TestArmedAllocations(t *testing.T) {
	d := newDevice(t)
	allocations := func(layers int) float64 {
		// Long enough for all steps to be of one size, and so of one graph: to make one allocates.
		m := newMeeting(t, d, nil, meetingGeometry(layers), gpu.CUDAIPC, 1, 2048, 128)
		// An engine on the CPU, so that its side allocates nothing either.
		words := mapped{}.Alloc(t, 4096).(ringer)
		lent, err := m.cache.lease.Import(context.Background(), words.Region(t, 4096, true))
		if err != nil {
			t.Fatal(err)
		}
		a := &m.armed
		for _, at := range []*gpu.Span{&a.Begun, &a.Status} {
			at.Memory = lent
		}
		for i := range a.Layers {
			a.Layers[i].Ready.Memory, a.Layers[i].Done.Memory = lent, lent
		}
		step := func() {
			m.arm()
			for at := uint64(0); at < a.Begun.Offset; at += 4 {
				words.Store(int(at), 0)
			}
			words.Ring(int(a.Begun.Offset), a.ID)
			for i := range a.Layers {
				words.Ring(int(a.Layers[i].Ready.Offset), 1)
				if !poll(words, int(a.Layers[i].Done.Offset), 1, 10*time.Second) {
					t.Fatalf("layer %d is not done", i)
				}
			}
			m.end()
		}
		for range 20 {
			step()
		}
		return testing.AllocsPerRun(50, step)
	}
	few, many := allocations(2), allocations(16)
	t.Logf("%v allocations a step of 2 layers, %v of 16", few, many)
	const most = 20
	if many > few+1 || few > most {
		t.Errorf("%v allocations a step of 2 layers, %v of 16: want as many, and at most %d", few, many, most)
	}
}
