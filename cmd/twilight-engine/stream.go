//go:build linux && cgo && cuda

package main

import (
	"fmt"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/gpu/cuda/engine"
)

// stream is a GPU's, as the SDK knows it: its words lie in what a lender lent. A graph may capture it. It
// serves one caller at a time.
type stream struct {
	*engine.Stream
	lender *lender
	words  []engine.Word // kept for the next
}

// lentMemory is where a buffer starts.
type lentMemory struct {
	memory *engine.Memory
	offset int
}

// NewStream implements replay.GPUMemory and bench.StreamEngine.
func (l *lender) NewStream() (client.Releaser, error) {
	s, err := l.GPU.NewStream()
	if err != nil {
		return nil, err
	}
	l.streams = append(l.streams, s)
	return &stream{Stream: s, lender: l}, nil
}

// Words implements client.Stream.
func (s *stream) Words(b *client.Buffer, words []client.Word) error {
	found, ok := s.lender.lent.Load(b)
	if !ok {
		return fmt.Errorf("a buffer of %d bytes is not memory of this GPU's lender: have it lend the words", b.Size())
	}
	lent := found.(lentMemory)
	s.words = s.words[:0]
	for _, w := range words {
		s.words = append(s.words, engine.Word{Memory: lent.memory, Offset: lent.offset + w.Offset, Value: w.Value, Wait: w.Wait})
	}
	return s.Stream.Words(s.words...)
}
