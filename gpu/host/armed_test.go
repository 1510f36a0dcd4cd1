package host

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/armed"
	"github.com/twilight-sidecar/twilight/internal/fault"
)

// armedProblem is a problem whose steps are armed.
type armedProblem struct {
	*problem
	layers int
	data   []byte // words, then the query, then the output
	fd     int
	step   gpu.ArmedStep
	ended  chan error
}

const wordsSize = 4096

func newArmedProblem(t testing.TB, d *Device, layers, sequences, tokens int) *armedProblem {
	t.Helper()
	p := &armedProblem{problem: newDeepProblem(t, d, questTopP, layers, sequences, tokens), layers: layers, ended: make(chan error, 2)}
	fd, err := share(append(make([]byte, wordsSize), append(p.query, make([]byte, len(p.query))...)...))
	if err != nil {
		t.Fatal(err)
	}
	size := wordsSize + 2*len(p.query)
	if p.data, err = unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		t.Fatal(err)
	}
	p.fd = fd
	t.Cleanup(func() { _ = unix.Munmap(p.data); unix.Close(fd) })
	lent := p.importFile(t, fd, size, true)
	span := func(word int) gpu.Span {
		return gpu.Span{Memory: lent, Offset: uint64(word * armed.WordBytes)}
	}
	p.step = gpu.ArmedStep{
		Begun: span(0), Status: span(1), Step: p.problem.step,
		Done: func(r *gpu.ArmedResult) { p.ended <- r.Err },
	}
	for i := range layers {
		p.step.Layers = append(p.step.Layers, gpu.ArmedLayer{
			Layer: i, Ready: span(2 + i), Done: span(2 + layers + i),
			Query:  gpu.Tensor{Memory: lent, Offset: wordsSize},
			Output: gpu.Tensor{Memory: lent, Offset: uint64(wordsSize + len(p.query))},
		})
	}
	return p
}

func (p *armedProblem) word(i int) *armed.Word { return armed.At(p.data[i*armed.WordBytes:]) }

func (p *armedProblem) arm(t testing.TB) {
	t.Helper()
	p.step.ID++
	if err := p.cache.Arm(t.Context(), &p.step); err != nil {
		t.Fatal(err)
	}
}

// replay runs the step with the given id, armed before.
func (p *armedProblem) replay(t testing.TB, id uint32) {
	t.Helper()
	for i := range 1 + 2*p.layers {
		p.word(1 + i).Store(0)
	}
	p.word(0).Ring(id)
	for i := range p.layers {
		p.word(2 + i).Ring(1)
		if !p.word(2+p.layers+i).Await(1, 10*time.Second, func() bool { return false }) {
			t.Fatal("not done")
		}
	}
	if err := <-p.ended; err != nil {
		t.Fatal(err)
	}
}

// In the steady state a layer of an armed step allocates nothing, and a step what does not grow with its
// layers.
func TestArmedAllocations(t *testing.T) {
	var perStep [2]float64
	for i, layers := range []int{2, 34} {
		p := newArmedProblem(t, newDevice(t, Options{Workers: 2}), layers, 4, 300)
		step := func() {
			p.arm(t)
			p.replay(t, p.step.ID)
		}
		for range 50 { // until each worker has met each row
			step()
		}
		perStep[i] = testing.AllocsPerRun(50, step)
	}
	perLayer := (perStep[1] - perStep[0]) / 32
	t.Logf("%v allocations in a step of 2 layers, %v in one of 34: %v a layer", perStep[0], perStep[1], perLayer)
	if perStep[1] > 20 || perLayer > 0.1 {
		t.Error("that is too many")
	}
}

// Memory that is cut short under an armed step ends it, wherever it waits, and nothing else.
func TestArmedMemoryGone(t *testing.T) {
	t.Parallel()
	d := newDevice(t, Options{Workers: 2})
	for begun, field := range map[bool]string{false: "armed.step", true: "armed.layers[0].ready"} {
		p := newArmedProblem(t, d, 2, 1, 100)
		p.arm(t)
		if begun {
			p.word(0).Ring(p.step.ID)
		}
		slot := &p.cache.(*cache).armed.slots[0]
		for w := slot.waiting.Load(); w == nil || (w == slot.begun) == begun; w = slot.waiting.Load() {
			time.Sleep(time.Millisecond)
		}
		if err := unix.Ftruncate(p.fd, 0); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-p.ended:
			wantFault(t, err, fault.DataLoss, field)
		case <-time.After(10 * time.Second):
			t.Fatal("the step waits in memory that is gone")
		}
		p.run(t) // what needs none of that memory goes on
	}
}

// BenchmarkArmed runs the layers of armed steps, the next armed while one runs, beside calls of Layer: what
// words cost.
func BenchmarkArmed(b *testing.B) {
	const layers = 32
	// The engine is another process in life: its waits must not take a turn from the device's goroutines.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + 2))
	for _, tokens := range []int{0, 4096} {
		d := newDevice(b, Options{Workers: 2})
		p := newArmedProblem(b, d, layers, 1, max(tokens, 16))
		if tokens == 0 {
			clear(p.step.Step.Lengths)
			p.step.Step.TableCounts, p.step.Step.TableEntries = nil, nil
			p.step.Step.Ended = p.step.Step.Sequences
		}
		b.Run(fmt.Sprintf("tokens=%d/words", tokens), func(b *testing.B) {
			b.ReportAllocs()
			p.arm(b)
			p.step.Step.Ended = nil
			for n := 0; b.Loop(); n++ {
				if n%layers == 0 {
					id := p.step.ID
					p.arm(b)
					p.replay(b, id)
				}
			}
			p.cache.CancelArmed(p.step.ID)
			if err := <-p.ended; err == nil {
				b.Error("a step that never began succeeded")
			}
		})
		b.Run(fmt.Sprintf("tokens=%d/calls", tokens), func(b *testing.B) {
			b.ReportAllocs()
			if err := p.cache.Step(b.Context(), p.step.Step); err != nil {
				b.Fatal(err)
			}
			result := &gpu.LayerResult{}
			requests := make([]gpu.LayerRequest, layers)
			for i := range requests {
				l := &p.step.Layers[i]
				requests[i] = gpu.LayerRequest{Layer: i, Query: &l.Query, Output: &l.Output}
			}
			for n := 0; b.Loop(); n++ {
				if err := p.cache.Layer(b.Context(), &requests[n%layers], result); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
