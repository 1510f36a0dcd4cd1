// Package armedtest has streams for tests without a GPU.
package armedtest

import (
	"time"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/internal/armed"
)

// Stream stands in for a GPU's, on buffers of shared memory: it does what it was given when it is waited for.
type Stream struct {
	// At is where a buffer's memory is; nil: where client.Buffer.Bytes says.
	At func(*client.Buffer) []byte
	// Change, if not nil, says what is done in place of words.
	Change func([]client.Word) ([]client.Word, error)

	work []func()
}

// Words implements client.Stream.
func (s *Stream) Words(b *client.Buffer, words []client.Word) (err error) {
	if s.Change != nil {
		if words, err = s.Change(words); err != nil {
			return err
		}
	}
	at := (*client.Buffer).Bytes
	if s.At != nil {
		at = s.At
	}
	for _, w := range words {
		s.work = append(s.work, func() {
			word := armed.At(at(b)[w.Offset:])
			if w.Wait {
				word.Await(w.Value, time.Minute, func() bool { return false })
			} else {
				word.Ring(w.Value)
			}
		})
	}
	return nil
}

// Synchronize implements client.Releaser.
func (s *Stream) Synchronize() error {
	for _, f := range s.work {
		f()
	}
	s.work = s.work[:0]
	return nil
}
