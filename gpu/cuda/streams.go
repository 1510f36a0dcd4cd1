//go:build linux && cgo && cuda

package cuda

import (
	"errors"
	"sync"

	"gorgonia.org/cu"

	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
)

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
