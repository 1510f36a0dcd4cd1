//go:build linux && cgo && cuda

package cuda

import (
	"errors"
	"sync"
	"unsafe"

	"gorgonia.org/cu"

	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
	"github.com/twilight-sidecar/twilight/gpu/cuda/kernels"
)

// graphNodes is how many nodes the graphs of armed steps have together. For so many there is room from the
// start: to make more may block while a stream waits for a word.
const graphNodes = 48 << 10

// makeGraphRoom makes the driver keep that room, on the owner's thread.
func (d *Device) makeGraphRoom() error {
	stream, err := d.streams.take()
	if err != nil {
		return err
	}
	defer d.streams.give(stream)
	block := drv.NewBlock(int(unsafe.Sizeof(kernels.Layer{})))
	defer block.Free()
	launch := drv.NewLaunch(d.kernels.Armed.Poison, stream, 1, block)
	defer launch.Free()
	const each = 1 << 10
	var graphs []drv.Graph
	for len(graphs) < graphNodes/each && err == nil {
		var g drv.Graph
		g, err = drv.Capture(stream, func() error {
			for range each {
				if err := launch.Run(1, 1); err != nil {
					return err
				}
			}
			return nil
		})
		if err == nil {
			graphs = append(graphs, g)
		}
	}
	for _, g := range graphs {
		err = errors.Join(err, g.Destroy())
	}
	return err
}

// streams keeps streams for leases to come: to make one may block while another waits for a word.
type streams struct {
	mu   sync.Mutex
	idle []cu.Stream
}

// manyStreams is more than a process should use: those of leases with armed steps take three.
const manyStreams = 64

func (s *streams) make() error {
	for range manyStreams {
		stream, err := cu.MakeStream(cu.NonBlocking)
		if err != nil {
			return drv.Wrap("cuStreamCreate", err)
		}
		s.idle = append(s.idle, stream)
	}
	return nil
}

func (s *streams) take() (cu.Stream, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	last := len(s.idle) - 1
	if last < 0 {
		stream, err := cu.MakeStream(cu.NonBlocking)
		return stream, drv.Wrap("cuStreamCreate", err)
	}
	stream := s.idle[last]
	s.idle = s.idle[:last]
	return stream, nil
}

// give takes back streams that have nothing to do.
func (s *streams) give(streams ...cu.Stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.idle = append(s.idle, streams...)
}

func (s *streams) destroy() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for i := range s.idle {
		errs = append(errs, drv.Wrap("cuStreamDestroy", s.idle[i].Destroy()))
	}
	s.idle = nil
	return errors.Join(errs...)
}
