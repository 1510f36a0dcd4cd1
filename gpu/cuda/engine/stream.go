//go:build linux && cgo && cuda

package engine

import (
	"runtime"

	"gorgonia.org/cu"

	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
)

// Stream is work that a GPU does in order. It serves one caller at a time.
type Stream struct {
	gpu    *GPU
	stream cu.Stream
	ops    drv.MemOps
}

// NewStream makes a stream. Make those of a process before any waits for a word.
func (g *GPU) NewStream() (*Stream, error) {
	s := &Stream{gpu: g}
	err := g.current(func() (err error) {
		s.stream, err = cu.MakeStream(cu.NonBlocking)
		return drv.Wrap("cuStreamCreate", err)
	})
	return s, err
}

// Close ends a stream that has nothing to do.
func (s *Stream) Close() error {
	return s.gpu.current(func() error { return drv.Wrap("cuStreamDestroy", s.stream.Destroy()) })
}

// current runs f with the device's context current.
func (g *GPU) current(f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cu.SetCurrentContext(g.primary); err != nil {
		return drv.Wrap("cuCtxSetCurrent", err)
	}
	return f()
}

// Word is a word of a memory that a stream writes, behind all that it was given before, or waits for.
type Word struct {
	Memory *Memory
	Offset int
	Value  uint32
	Wait   bool // until it is Value
}

// Words gives the stream words to write and to wait for, in order.
func (s *Stream) Words(words ...Word) error {
	s.ops.Reset()
	for _, w := range words {
		at := w.Memory.at + drv.Ptr(w.Offset)
		if w.Wait {
			s.ops.Wait(at, w.Value)
		} else {
			s.ops.Write(at, w.Value)
		}
	}
	return s.gpu.current(func() error { return s.ops.Run(s.stream) })
}

// Copy gives the stream n bytes to copy.
func (s *Stream) Copy(to *Memory, toOffset int, from *Memory, fromOffset, n int) error {
	return s.gpu.current(func() error {
		return drv.Wrap("cuMemcpyDtoDAsync", cu.MemcpyDtoDAsync(cu.DevicePtr(to.at+drv.Ptr(toOffset)),
			cu.DevicePtr(from.at+drv.Ptr(fromOffset)), int64(n), s.stream))
	})
}

// Queries is the work of writing queries.
type Queries struct {
	stream *Stream
	launch drv.Launch
	blocks int
}

// Queries prepares what Memory.FillQueries does.
func (s *Stream) Queries(m *Memory, t *Tensors, offset int, seed uint64) (*Queries, error) {
	q := &Queries{stream: s}
	err := s.gpu.current(func() (err error) {
		q.launch, q.blocks, err = m.queries(t, offset, seed)
		return err
	})
	if err == nil {
		q.launch.On(s.stream)
	}
	return q, err
}

// Launch gives it to the stream.
func (q *Queries) Launch() error {
	return q.stream.gpu.current(func() error { return q.launch.Run(q.blocks, 1) })
}

// Close frees it.
func (q *Queries) Close() { q.launch.Free() }

// Synchronize waits until the stream has done everything.
func (s *Stream) Synchronize() error {
	return s.gpu.current(func() error { return drv.Wrap("cuStreamSynchronize", s.stream.Synchronize()) })
}

// Graph is work that was captured, to be done again and again.
type Graph struct {
	stream *Stream
	graph  drv.Graph
}

// Capture makes a graph of what f gives the stream, which does none of it. f stays on its thread.
func (s *Stream) Capture(f func() error) (*Graph, error) {
	g := &Graph{stream: s}
	err := s.gpu.current(func() (err error) {
		g.graph, err = drv.Capture(s.stream, f)
		return err
	})
	return g, err
}

// Launch gives the graph to its stream.
func (g *Graph) Launch() error {
	return g.stream.gpu.current(func() error { return g.graph.Launch(g.stream.stream) })
}

// Close frees the graph, which must not be running.
func (g *Graph) Close() error { return g.stream.gpu.current(g.graph.Destroy) }
