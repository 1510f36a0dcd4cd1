package service

import (
	"bytes"
	"context"
	"fmt"
	"math/bits"
	"slices"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/fdsock"
	"github.com/twilight-sidecar/twilight/kv"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

// region is one generation of lent memory.
type region struct {
	generation uint64
	memory     gpu.Memory
}

// cache is a registered cache. It is stale, and all but forgotten, once one of its regions is replaced.
type cache struct {
	device  gpu.Cache
	regions map[uint32]struct{} // those it lies in

	stale bool
	// lastStep is the last step that was accepted; it is current until it is over.
	lastStep uint64
	current  bool
	batch    int // rows of it

	armed armedCache
}

func (l *lease) registerRegion(ctx context.Context, req *twilightv1.RegisterRegion) (*twilightv1.RegionRegistered, error) {
	if err := l.begins(); err != nil {
		return nil, err
	}
	id := req.GetRegionId()
	old := l.regions[id]
	switch limit := uint64(l.limits.GetMaxRegions()); {
	case old == nil && uint64(len(l.regions)) >= limit:
		return nil, fault.Exhaustedf("", 1, 0, "all %d regions of the lease are taken: release one first", limit)
	case old != nil && req.GetGeneration() == old.generation:
		return nil, fault.Newf(fault.AlreadyExists, "region_id",
			"region %d is registered in generation %d already: release it, or raise the generation", id, old.generation)
	case old != nil && req.GetGeneration() < old.generation:
		return nil, fault.Newf(fault.StaleGeneration, "generation",
			"is %d, but region %d is registered in generation %d: raise it", req.GetGeneration(), id, old.generation)
	}
	if old != nil {
		if err := l.notArmed(id); err != nil {
			return nil, err
		}
	}
	probe := req.GetProbe()
	if probe != nil && (probe.GetOffset() > req.GetSize() || uint64(probe.GetLength()) > req.GetSize()-probe.GetOffset()) {
		return nil, fault.Newf(fault.OutOfRange, "probe", "%d bytes at offset %d lie outside of the region's %d bytes",
			probe.GetLength(), probe.GetOffset(), req.GetSize())
	}
	spec, field, tokens := regionSpec(req)
	if err := l.checkRegion(spec, field); err != nil {
		return nil, err
	}
	if err := l.claim(spec, tokens); err != nil {
		return nil, err
	}
	memory, err := l.device.Import(ctx, spec) // which owns the descriptors
	if err != nil {
		return nil, err
	}
	answer := &twilightv1.RegionRegistered{}
	if probe != nil {
		if answer.Sha256, err = digest(ctx, memory, probe); err != nil {
			l.unmap(memory)
			return nil, fault.In("probe", err)
		}
	}
	if old != nil {
		l.retire(id, old)
	}
	l.regions[id] = &region{generation: req.GetGeneration(), memory: memory}
	l.telemetry.Lent(1, int64(memory.Size()))
	return answer, nil
}

// regionSpec says a registration in the device's terms, but for descriptors, whose tokens it lists. field
// is that of its kind.
func regionSpec(req *twilightv1.RegisterRegion) (spec *gpu.Region, field string, tokens []fdsock.Token) {
	spec = &gpu.Region{
		Size:     req.GetSize(),
		Writable: req.GetAccess() == twilightv1.Access_ACCESS_READ_WRITE,
		Device:   req.GetDevice(),
	}
	switch kind := req.GetKind().(type) {
	case *twilightv1.RegisterRegion_SharedMemory:
		spec.Kind, spec.Offset, field = gpu.SharedMemory, kind.SharedMemory.GetOffset(), "shared_memory"
		spec.Chunks = []gpu.Chunk{{FD: -1, Size: spec.Size}}
		tokens = []fdsock.Token{fdsock.Token(kind.SharedMemory.GetFdToken())}
	case *twilightv1.RegisterRegion_CudaIpc:
		spec.Kind, spec.Offset, field = gpu.CUDAIPC, kind.CudaIpc.GetOffset(), "cuda_ipc"
		spec.Chunks = []gpu.Chunk{{FD: -1, Handle: kind.CudaIpc.GetHandle(), Size: spec.Size}}
	case *twilightv1.RegisterRegion_CudaVmm:
		spec.Kind, spec.Offset, field = gpu.CUDAVMM, kind.CudaVmm.GetOffset(), "cuda_vmm"
		for _, chunk := range kind.CudaVmm.GetChunks() {
			spec.Chunks = append(spec.Chunks, gpu.Chunk{FD: -1, Size: chunk.GetSize()})
			tokens = append(tokens, fdsock.Token(chunk.GetFdToken()))
		}
	case *twilightv1.RegisterRegion_CudaFabric:
		spec.Kind, spec.Offset, field = gpu.CUDAFabric, kind.CudaFabric.GetOffset(), "cuda_fabric"
		for _, chunk := range kind.CudaFabric.GetChunks() {
			spec.Chunks = append(spec.Chunks, gpu.Chunk{FD: -1, Handle: chunk.GetHandle(), Size: chunk.GetSize()})
		}
	}
	return spec, field, tokens
}

// checkRegion refuses by name what the device does not import, and a region that leaves its memory.
func (l *lease) checkRegion(spec *gpu.Region, field string) error {
	if !slices.Contains(l.info.Regions, spec.Kind) {
		return fault.Newf(fault.Unsupported, field,
			"device %s does not import %v: it takes %v", l.info.ID, spec.Kind, l.info.Regions)
	}
	home := l.info.ID
	if spec.Kind == gpu.SharedMemory {
		home = ""
	}
	if spec.Device != home {
		return fault.Newf(fault.Invalid, "device", "is %q: %v for this lease must say %q", spec.Device, spec.Kind, home)
	}
	end, overflow := bits.Add64(spec.Offset, spec.Size, 0)
	chunked := spec.Kind == gpu.CUDAVMM || spec.Kind == gpu.CUDAFabric
	if overflow != 0 || chunked && !hold(spec.Chunks, end) {
		return fault.Newf(fault.OutOfRange, field+".offset",
			"%d bytes at offset %d lie outside of the memory", spec.Size, spec.Offset)
	}
	return nil
}

// hold tells whether chunks have n bytes together.
func hold(chunks []gpu.Chunk, n uint64) bool {
	for _, chunk := range chunks {
		if chunk.Size >= n {
			return true
		}
		n -= chunk.Size
	}
	return false
}

// claim gives a region the descriptors that were sent for it.
func (l *lease) claim(spec *gpu.Region, tokens []fdsock.Token) error {
	if len(tokens) == 0 {
		return nil
	}
	if l.inbox == nil {
		return fault.Newf(fault.Unsupported, "",
			"the lease is not on a Unix socket, and only there can descriptors be sent: connect to one")
	}
	fds, missing := l.inbox.Claim(tokens)
	if missing >= 0 {
		field := "shared_memory.fd_token"
		if spec.Kind == gpu.CUDAVMM {
			field = fmt.Sprintf("cuda_vmm.chunks[%d].fd_token", missing)
		}
		return fault.Newf(fault.NotFound, field,
			"no descriptor was sent under this token, or it was used: send one to fd_endpoint first")
	}
	for i, fd := range fds {
		spec.Chunks[i].FD = fd
	}
	return nil
}

func digest(ctx context.Context, memory gpu.Memory, probe *twilightv1.DigestProbe) ([]byte, error) {
	sum, err := memory.Digest(ctx, probe.GetOffset(), probe.GetLength())
	if err != nil {
		return nil, err
	}
	if want := probe.GetExpectedSha256(); len(want) > 0 && !bytes.Equal(want, sum[:]) {
		return nil, fault.Newf(fault.DataLoss, "expected_sha256",
			"the %d bytes at offset %d that the daemon reads have another digest: this is not the memory that was meant",
			probe.GetLength(), probe.GetOffset())
	}
	return sum[:], nil
}

// retire releases a region that was replaced, and what its caches hold.
func (l *lease) retire(id uint32, old *region) {
	for cacheID, c := range l.caches {
		if _, lies := c.regions[id]; lies && !c.stale {
			l.closeCache(cacheID, c)
			c.stale, c.current = true, false
		}
	}
	l.forgetArmed(id)
	l.unmap(old.memory)
	l.telemetry.Lent(-1, -int64(old.memory.Size()))
}

// unmap releases memory that nothing of the lease refers to any more.
func (l *lease) unmap(memory gpu.Memory) {
	if err := memory.Release(); err != nil {
		l.logger.Error("region: release", "error", err)
	}
}

func (l *lease) releaseRegion(req *twilightv1.ReleaseRegion) error {
	id := req.GetRegionId()
	r := l.regions[id]
	if r == nil {
		return noRegion("region_id", id)
	}
	for cacheID, c := range l.caches {
		if _, lies := c.regions[id]; lies && !c.stale {
			return fault.Newf(fault.Precondition, "region_id",
				"region %d holds cache %d: release the cache first", id, cacheID)
		}
	}
	if err := l.notArmed(id); err != nil {
		return err
	}
	if err := r.memory.Release(); err != nil {
		return err
	}
	l.forgetArmed(id)
	delete(l.regions, id)
	l.telemetry.Lent(-1, -int64(r.memory.Size()))
	return nil
}

func noRegion(field string, id uint32) error {
	return fault.Newf(fault.NotFound, field, "the lease has no region %d: register it first", id)
}

// span finds the region of a location. Offsets are checked by the device, against what it reads there.
func (l *lease) span(at *twilightv1.Location, field string) (gpu.Span, error) {
	r := l.regions[at.GetRegionId()]
	switch {
	case r == nil:
		return gpu.Span{}, noRegion(field+".region_id", at.GetRegionId())
	case at.GetGeneration() < r.generation:
		return gpu.Span{}, fault.Newf(fault.StaleGeneration, field+".generation",
			"is %d, but region %d was replaced by generation %d: use that", at.GetGeneration(), at.GetRegionId(), r.generation)
	case at.GetGeneration() > r.generation:
		return gpu.Span{}, fault.Newf(fault.NotFound, field+".generation",
			"is %d, but region %d is registered in generation %d: register the new one first",
			at.GetGeneration(), at.GetRegionId(), r.generation)
	}
	return gpu.Span{Memory: r.memory, Offset: at.GetOffset()}, nil
}

func (l *lease) registerCache(ctx context.Context, req *twilightv1.RegisterCache) (*twilightv1.CacheRegistered, error) {
	if err := l.begins(); err != nil {
		return nil, err
	}
	id := req.GetCacheId()
	_, taken := l.caches[id]
	switch limit := uint64(l.limits.GetMaxCaches()); {
	case req.GetSizeOnly():
	case taken:
		return nil, fault.Newf(fault.AlreadyExists, "cache_id", "cache %d is registered already: release it first", id)
	case uint64(len(l.caches)) >= limit:
		return nil, fault.Exhaustedf("", 1, 0, "all %d caches of the lease are taken: release one first", limit)
	}
	spec, regions, err := l.cacheSpec(req)
	if err != nil {
		return nil, err
	}
	size, perToken, err := l.device.ShadowBytes(spec)
	if err != nil {
		return nil, err
	}
	answer := &twilightv1.CacheRegistered{ShadowBytes: size, ShadowBytesPerToken: perToken}
	if req.GetSizeOnly() {
		return answer, nil
	}
	made, err := l.device.NewCache(ctx, spec)
	if err != nil {
		return nil, err
	}
	l.caches[id] = &cache{device: made, regions: regions, armed: newArmedCache()}
	l.telemetry.AddCache(id, spec, made.ShadowBytes())
	return answer, nil
}

// cacheSpec says a registration in the device's terms, and which regions it names.
func (l *lease) cacheSpec(req *twilightv1.RegisterCache) (*gpu.CacheSpec, map[uint32]struct{}, error) {
	dtype := kv.DType(req.GetDtype())
	if !slices.Contains(l.info.CacheDTypes, dtype) {
		return nil, nil, fault.Newf(fault.Unsupported, "dtype",
			"is %v: device %s takes caches of %v", dtype, l.info.ID, l.info.CacheDTypes)
	}
	if have, want := len(req.GetLayers()), l.geometry.Layers; have != want {
		return nil, nil, fault.Newf(fault.Invalid, "layers", "has %d layers: the lease's geometry says %d", have, want)
	}
	// More would not fit the address space, nor an int.
	if most := uint64(1) << 48; req.GetMaxTokens() > most {
		return nil, nil, fault.Newf(fault.OutOfRange, "max_tokens", "is %d: at most %d", req.GetMaxTokens(), most)
	}
	spec := &gpu.CacheSpec{
		DType:     dtype,
		PageSize:  int(req.GetPageSize()),
		NumPages:  int(req.GetNumPages()),
		K:         strides(req.GetKStrides()),
		V:         strides(req.GetKStrides()),
		NullPage:  -1,
		Layers:    make([]gpu.CacheLayer, len(req.GetLayers())),
		MaxTokens: int(req.GetMaxTokens()),
	}
	if req.GetVStrides() != nil {
		spec.V = strides(req.GetVStrides())
	}
	if req.NullPage != nil {
		if spec.NullPage = req.GetNullPage(); spec.NullPage < 0 {
			return nil, nil, fault.Newf(fault.OutOfRange, "null_page", "is %d: leave it out if there is none", spec.NullPage)
		}
	}
	regions := make(map[uint32]struct{})
	for i, layer := range req.GetLayers() {
		field := fmt.Sprintf("layers[%d]", i)
		k, err := l.span(layer.GetK(), field+".k")
		if err != nil {
			return nil, nil, err
		}
		v, err := l.span(layer.GetV(), field+".v")
		if err != nil {
			return nil, nil, err
		}
		regions[layer.GetK().GetRegionId()] = struct{}{}
		regions[layer.GetV().GetRegionId()] = struct{}{}
		spec.Layers[i] = gpu.CacheLayer{
			Layer: int(layer.GetLayer()), K: k, V: v, KScales: layer.GetKScales(), VScales: layer.GetVScales(),
		}
	}
	return spec, regions, nil
}

func strides(s *twilightv1.Strides) gpu.Strides {
	return gpu.Strides{Page: s.GetPage(), Head: s.GetHead(), Token: s.GetToken()}
}

func (l *lease) releaseCache(req *twilightv1.ReleaseCache) error {
	c := l.caches[req.GetCacheId()]
	if c == nil {
		return noCache(req.GetCacheId())
	}
	if !c.stale {
		l.closeCache(req.GetCacheId(), c)
	}
	delete(l.caches, req.GetCacheId())
	return nil
}

func noCache(id uint32) error {
	return fault.Newf(fault.NotFound, "cache_id", "the lease has no cache %d: register it first", id)
}

func (l *lease) closeCache(id uint32, c *cache) {
	l.telemetry.RemoveCache(id)
	if err := c.device.Close(); err != nil {
		l.logger.Error("cache: close", "error", err)
	}
}

// liveCache finds a cache whose memory is as it was registered.
func (l *lease) liveCache(id uint32) (*cache, error) {
	c := l.caches[id]
	if c == nil {
		return nil, noCache(id)
	}
	if c.stale {
		return nil, fault.Newf(fault.StaleGeneration, "cache_id",
			"cache %d lay in a region that was replaced: release it and register it anew", id)
	}
	return c, nil
}
