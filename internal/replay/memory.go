package replay

import (
	"context"

	"github.com/twilight-sidecar/twilight/client"
)

// Memory is where an engine has what it lends.
type Memory interface {
	// Lend makes a buffer, zeroed, and lends it on a session, for as long as that is open.
	Lend(ctx context.Context, s *client.Session, size int, access client.Access) (Buffer, error)
}

// GPUMemory is memory of a GPU, at which armed steps run by a stream of it.
type GPUMemory interface {
	Memory
	// NewStream makes a stream that writes and waits for words of what Lend made.
	NewStream() (client.Releaser, error)
}

// Buffer is lent memory, and the host's view of it.
type Buffer interface {
	// Lent is what requests name.
	Lent() *client.Buffer
	// Bytes is the memory itself, or a copy on the host.
	Bytes() []byte
	// Push brings what the host wrote to the memory, Pull what the daemon wrote to the host.
	Push() error
	Pull() error
}

// sharedMemory is the host's own.
type sharedMemory struct{}

func (sharedMemory) Lend(ctx context.Context, s *client.Session, size int, access client.Access) (Buffer, error) {
	b, err := s.NewBuffer(ctx, size, access)
	return shared{b}, err
}

type shared struct{ *client.Buffer }

func (b shared) Lent() *client.Buffer { return b.Buffer }
func (shared) Push() error            { return nil }
func (shared) Pull() error            { return nil }
