package host

import (
	"context"
	"crypto/sha256"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/shm"
)

// memory is a mapped region. The lease's lock guards data, not its bytes.
type memory struct {
	lease    *lease
	size     uint64
	writable bool
	data     []byte // nil once released
}

var _ gpu.Memory = (*memory)(nil)

// mapRegion maps a region and closes its descriptors.
func mapRegion(region *gpu.Region) ([]byte, error) {
	defer closeAll(region.Chunks)
	if region.Kind != gpu.SharedMemory {
		return nil, fault.Newf(fault.Unsupported, "kind",
			"this device is the CPU and cannot import %v: lend shared memory by a file descriptor", region.Kind)
	}
	return shm.Map(region)
}

func closeAll(chunks []gpu.Chunk) {
	for _, c := range chunks {
		if c.FD >= 0 {
			unix.Close(c.FD)
		}
	}
}

func (m *memory) Size() uint64 { return m.size }

func (m *memory) Writable() bool { return m.writable }

func (m *memory) Digest(ctx context.Context, offset uint64, length uint32) (sum [32]byte, err error) {
	m.lease.mu.Lock()
	defer m.lease.mu.Unlock()
	if err := m.lease.usable(ctx); err != nil {
		return sum, err
	}
	data, err := m.bytes(offset, uint64(length), "probe")
	if err != nil {
		return sum, err
	}
	err = guard(func() error {
		sum = sha256.Sum256(data)
		return nil
	})
	return sum, m.lease.explain(err, extent{m, offset, offset + uint64(length), "probe"})
}

func (m *memory) Release() error {
	m.lease.mu.Lock()
	defer m.lease.mu.Unlock()
	if m.data == nil {
		return nil
	}
	if m.lease.cached(extent{memory: m, to: m.size}) {
		return fault.Newf(fault.Precondition, "region_id", "a cache lies in the region: release the cache first")
	}
	for c := range m.lease.caches {
		if c.armed.uses(m) {
			return fault.Newf(fault.Precondition, "region_id",
				"an armed step uses the region: wait for its end or cancel it first")
		}
	}
	delete(m.lease.memories, m)
	return m.unmap()
}

func (m *memory) unmap() error {
	data := m.data
	m.data = nil
	return unix.Munmap(data)
}

// bytes returns a checked range. field is the place that asks for it.
func (m *memory) bytes(offset, length uint64, field string) ([]byte, error) {
	if m.data == nil {
		return nil, fault.Newf(fault.NotFound, field, "the region was released: register it again")
	}
	if offset > m.size || length > m.size-offset {
		return nil, fault.Newf(fault.OutOfRange, field+".offset",
			"%d bytes at offset %d must lie in the region, which has %d bytes", length, offset, m.size)
	}
	return m.data[offset:][:length:length], nil
}

// extent is a range of a memory's bytes, and the field of the request that names it.
type extent struct {
	memory   *memory
	from, to uint64
	field    string
}

// holds tells whether the address is one of the extent's.
func (e extent) holds(address uintptr) bool {
	if e.memory == nil || e.memory.data == nil {
		return false
	}
	at := uint64(address) - uint64(uintptr(unsafe.Pointer(unsafe.SliceData(e.memory.data))))
	return e.from <= at && at < e.to
}

func (e extent) overlaps(o extent) bool {
	return e.memory == o.memory && e.from < o.to && o.from < e.to
}

// cached tells whether a cache lies in e.
func (l *lease) cached(e extent) bool {
	for c := range l.caches {
		for i := range c.layers {
			if e.overlaps(c.layers[i].extents[0]) || e.overlaps(c.layers[i].extents[1]) {
				return true
			}
		}
	}
	return false
}
