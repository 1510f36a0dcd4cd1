package service

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

func TestLifecycle(t *testing.T) {
	t.Parallel()
	fake := newFake()
	fake.onLayer = func(_ context.Context, req *gpu.LayerRequest, res *gpu.LayerResult) error {
		*res = gpu.LayerResult{
			Candidates: []uint32{9}, Kept: []uint32{3}, Lists: []int32{1, 5, 7}, Output: req.Query.Inline,
			Mass: []float32{0.5, 0.25}, Timing: gpu.Timing{Wall: 5}, Read: gpu.Read{Cache: 300, Shadow: 20},
		}
		return nil
	}
	d := start(t, Config{}, fake)
	e := d.open()

	if got := e.must(registerRegionWithProbe(e)).GetRegionRegistered().GetSha256(); len(got) != 32 {
		t.Errorf("probe answered %x", got)
	}
	sizeOnly := registerCache(1)
	sizeOnly.GetRegisterCache().SizeOnly = true
	for _, req := range []*twilightv1.LeaseRequest{sizeOnly, registerCache(1)} {
		got := e.must(req).GetCacheRegistered()
		if got.GetShadowBytes() != 128 || got.GetShadowBytesPerToken() != 12.5 {
			t.Errorf("cache registered: %v", got)
		}
	}
	index := step(1)
	index.GetStep().IndexOnly = true
	if got := e.must(index).GetStepResult().GetIndex().GetTokensIndexed(); got != 7 {
		t.Errorf("index_only indexed %d tokens, want 7", got)
	}
	e.must(step(2))
	got := e.must(layer(2)).GetLayerResult()
	if len(got.GetOutput()) != 128 || len(got.GetLists()) != 3 || got.GetKept()[0] != 3 ||
		got.GetCandidates()[0] != 9 || got.GetEstimatedMass()[1] != 0.25 || got.GetTiming().GetWallNs() != 5 ||
		got.GetCacheBytesRead() != 300 || got.GetShadowBytesRead() != 20 {
		t.Errorf("layer result: %v", got)
	}
	e.must(request(&twilightv1.CancelStep{CacheId: 1, StepId: 2}))
	e.must(request(&twilightv1.ReleaseCache{CacheId: 1}))
	e.must(request(&twilightv1.ReleaseRegion{RegionId: 1}))
	if n := fake.memories.Load() + fake.caches.Load(); n != 0 {
		t.Errorf("%d memories and caches are left", n)
	}
	if err := e.stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := e.stream.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("the stream ended by %v", err)
	}
	// The engine may count on it: at the stream's end everything is released.
	if n := fake.leases.Load(); n != 0 {
		t.Errorf("%d leases are left", n)
	}
	for _, secret := range [][]byte{e.opened.GetToken()} {
		for _, form := range []string{string(secret), hex.EncodeToString(secret), base64.StdEncoding.EncodeToString(secret)} {
			if strings.Contains(d.log.String(), form) {
				t.Error("the log tells a token")
			}
		}
	}
	if !strings.Contains(d.log.String(), `"engine":"test"`) {
		t.Error("the log does not name the engine")
	}
}

func registerRegionWithProbe(e *engine) *twilightv1.LeaseRequest {
	req := e.region(1)
	req.GetRegisterRegion().Probe = &twilightv1.DigestProbe{Length: 16}
	return req
}

// Every refusal is in-band, names its field, and changes nothing.
func TestRefusals(t *testing.T) {
	t.Parallel()
	fake := newFake()
	d := start(t, Config{Limits: Limits{MessageBytes: 4096, Regions: 2, Caches: 2}}, fake)
	e, neighbour := d.ready(), d.ready()
	used := e.lend(testRegionBytes)
	e.must(registerRegion(2, 5, used))

	edit := func(req *twilightv1.LeaseRequest, f func(*twilightv1.LeaseRequest)) *twilightv1.LeaseRequest {
		f(req)
		return req
	}
	region := func(f func(*twilightv1.RegisterRegion)) *twilightv1.LeaseRequest {
		return edit(registerRegion(1, 2, make([]byte, 16)), func(r *twilightv1.LeaseRequest) { f(r.GetRegisterRegion()) })
	}
	cache := func(f func(*twilightv1.RegisterCache)) *twilightv1.LeaseRequest {
		return edit(registerCache(2), func(r *twilightv1.LeaseRequest) { f(r.GetRegisterCache()) })
	}
	stepOf := func(f func(*twilightv1.Step)) *twilightv1.LeaseRequest {
		return edit(step(2), func(r *twilightv1.LeaseRequest) { f(r.GetStep()) })
	}
	layerOf := func(f func(*twilightv1.Layer)) *twilightv1.LeaseRequest {
		return edit(layer(1), func(r *twilightv1.LeaseRequest) { f(r.GetLayer()) })
	}
	at := func(region uint32, generation uint64) *twilightv1.Location {
		return &twilightv1.Location{RegionId: region, Generation: generation}
	}
	type code = twilightv1.ErrorCode
	const (
		invalid      = twilightv1.ErrorCode_ERROR_CODE_INVALID_ARGUMENT
		notFound     = twilightv1.ErrorCode_ERROR_CODE_NOT_FOUND
		exists       = twilightv1.ErrorCode_ERROR_CODE_ALREADY_EXISTS
		stale        = twilightv1.ErrorCode_ERROR_CODE_STALE_GENERATION
		precondition = twilightv1.ErrorCode_ERROR_CODE_FAILED_PRECONDITION
		outOfRange   = twilightv1.ErrorCode_ERROR_CODE_OUT_OF_RANGE
		unsupported  = twilightv1.ErrorCode_ERROR_CODE_UNSUPPORTED
		exhausted    = twilightv1.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED
		dataLoss     = twilightv1.ErrorCode_ERROR_CODE_DATA_LOSS
	)
	tests := []struct {
		name  string
		req   *twilightv1.LeaseRequest
		code  code
		field string
	}{
		{"no request", &twilightv1.LeaseRequest{}, invalid, "request"},
		{"too large", edit(layer(1), func(r *twilightv1.LeaseRequest) {
			r.GetLayer().Query = &twilightv1.Layer_QueryInline{QueryInline: make([]byte, 5000)}
		}), exhausted, ""},

		{"region id 0", region(func(r *twilightv1.RegisterRegion) { r.RegionId = 0 }), invalid, "register_region.region_id"},
		{"empty region", region(func(r *twilightv1.RegisterRegion) { r.Size = 0 }), invalid, "register_region.size"},
		{"no access", region(func(r *twilightv1.RegisterRegion) { r.Access = 0 }), invalid, "register_region.access"},
		{"no kind", region(func(r *twilightv1.RegisterRegion) { r.Kind = nil }), invalid, "register_region.kind"},
		{"same generation", region(func(r *twilightv1.RegisterRegion) { r.Generation = 1 }), exists, "register_region.region_id"},
		{"lower generation", region(func(r *twilightv1.RegisterRegion) { r.RegionId, r.Generation = 2, 4 }), stale, "register_region.generation"},
		{"too many regions", region(func(r *twilightv1.RegisterRegion) { r.RegionId = 3 }), exhausted, "register_region"},
		{"short token", region(func(r *twilightv1.RegisterRegion) { r.GetSharedMemory().FdToken = []byte{1} }), invalid, "register_region.shared_memory.fd_token"},
		{"unknown token", region(func(r *twilightv1.RegisterRegion) {}), notFound, "register_region.shared_memory.fd_token"},
		{"used token", region(func(r *twilightv1.RegisterRegion) { r.GetSharedMemory().FdToken = used }), notFound, "register_region.shared_memory.fd_token"},
		{"offset off page", region(func(r *twilightv1.RegisterRegion) { r.GetSharedMemory().Offset = 1 }), invalid, "register_region.shared_memory.offset"},
		{"overflowing offset", region(func(r *twilightv1.RegisterRegion) { r.GetSharedMemory().Offset = 1<<64 - 4096 }), outOfRange, "register_region.shared_memory.offset"},
		{"GPU of shared memory", region(func(r *twilightv1.RegisterRegion) { r.Device = "GPU-1" }), invalid, "register_region.device"},
		{"undeclared kind", region(func(r *twilightv1.RegisterRegion) {
			r.Kind = &twilightv1.RegisterRegion_CudaIpc{CudaIpc: &twilightv1.CudaIpc{Handle: make([]byte, 64)}}
		}), unsupported, "register_region.cuda_ipc"},
		{"probe outside", region(func(r *twilightv1.RegisterRegion) {
			r.Probe = &twilightv1.DigestProbe{Offset: testRegionBytes - 4, Length: 5}
		}), outOfRange, "register_region.probe"},
		{"other digest", region(func(r *twilightv1.RegisterRegion) {
			r.GetSharedMemory().FdToken = e.lend(testRegionBytes)
			r.Probe = &twilightv1.DigestProbe{Length: 5, ExpectedSha256: make([]byte, 32)}
		}), dataLoss, "register_region.probe.expected_sha256"},
		{"region in use", request(&twilightv1.ReleaseRegion{RegionId: 1}), precondition, "release_region.region_id"},
		{"unknown region", request(&twilightv1.ReleaseRegion{RegionId: 9}), notFound, "release_region.region_id"},

		{"cache id taken", registerCache(1), exists, "register_cache.cache_id"},
		{"cache in no region", cache(func(r *twilightv1.RegisterCache) { r.Layers[0].V = at(9, 1) }), notFound, "register_cache.layers[0].v.region_id"},
		{"cache in an old region", cache(func(r *twilightv1.RegisterCache) { r.Layers[0].K = at(2, 4) }), stale, "register_cache.layers[0].k.generation"},
		{"cache in a future region", cache(func(r *twilightv1.RegisterCache) { r.Layers[0].K = at(2, 6) }), notFound, "register_cache.layers[0].k.generation"},
		{"cache without V", cache(func(r *twilightv1.RegisterCache) { r.Layers[0].V = nil }), invalid, "register_cache.layers[0].v"},
		{"undeclared dtype", cache(func(r *twilightv1.RegisterCache) { r.Dtype = twilightv1.DataType_DATA_TYPE_F8_E4M3 }), unsupported, "register_cache.dtype"},
		{"dtype of no name", cache(func(r *twilightv1.RegisterCache) { r.Dtype = 99 }), invalid, "register_cache.dtype"},
		{"no pages", cache(func(r *twilightv1.RegisterCache) { r.NumPages = 0 }), invalid, "register_cache.num_pages"},
		{"negative null page", cache(func(r *twilightv1.RegisterCache) { r.NullPage = new(int32(-1)) }), outOfRange, "register_cache.null_page"},
		{"endless tokens", cache(func(r *twilightv1.RegisterCache) { r.MaxTokens = 1 << 63 }), outOfRange, "register_cache.max_tokens"},
		{"more layers than geometry", cache(func(r *twilightv1.RegisterCache) {
			r.Layers = append(r.Layers, &twilightv1.CacheLayer{Layer: 1, K: at(1, 1), V: at(1, 1)})
		}), invalid, "register_cache.layers"},
		{"a layer twice", cache(func(r *twilightv1.RegisterCache) { r.Layers = append(r.Layers, r.Layers[0]) }), invalid, "register_cache"},
		{"scale of 0", cache(func(r *twilightv1.RegisterCache) { r.Layers[0].KScales = []float32{0} }), invalid, "register_cache.layers[0].k_scales[0]"},
		{"unknown cache to release", request(&twilightv1.ReleaseCache{CacheId: 9}), notFound, "release_cache.cache_id"},

		{"unknown cache", stepOf(func(s *twilightv1.Step) { s.CacheId = 9 }), notFound, "step.cache_id"},
		{"step id that does not grow", step(1), precondition, "step.step_id"},
		{"sequences unlike lengths", stepOf(func(s *twilightv1.Step) { s.Sequences = nil }), invalid, "step"},
		{"device batch", stepOf(func(s *twilightv1.Step) {
			s.Device = &twilightv1.DeviceBatch{Batch: 1, Lengths: at(1, 1), Table: at(1, 1), TableStride: 1, Slots: at(1, 1), MaxLength: 1}
		}), unsupported, "step.device"},
		{"armed step", stepOf(func(s *twilightv1.Step) {
			tensor := &twilightv1.Tensor{At: at(1, 1)}
			s.Armed = &twilightv1.Armed{Step: at(1, 1), Status: at(1, 1), Layers: []*twilightv1.ArmedLayer{
				{Ready: at(1, 1), Done: at(1, 1), Query: tensor, Output: tensor},
			}}
		}), unsupported, "step.armed"},
		{"cancelled step of another id", request(&twilightv1.CancelStep{CacheId: 1, StepId: 7}), precondition, "cancel_step.step_id"},

		{"layer of another step", layer(7), precondition, "layer.step_id"},
		{"layer of an unknown cache", layerOf(func(l *twilightv1.Layer) { l.CacheId = 9 }), notFound, "layer.cache_id"},
		{"query in no region", layerOf(func(l *twilightv1.Layer) {
			l.Query = &twilightv1.Layer_QueryTensor{QueryTensor: &twilightv1.Tensor{At: at(9, 1)}}
		}), notFound, "layer.query_tensor.at.region_id"},
		{"output in an old region", layerOf(func(l *twilightv1.Layer) {
			l.OutputTensor = &twilightv1.Tensor{At: at(2, 1)}
		}), stale, "layer.output_tensor.at.generation"},
		{"window queries in no region", layerOf(func(l *twilightv1.Layer) {
			l.Observation = &twilightv1.Observation{
				Window: 1, WindowQueries: &twilightv1.Observation_WindowQueriesAt{WindowQueriesAt: at(9, 1)},
			}
		}), notFound, "layer.observation.window_queries_at.region_id"},
		{"mass in an old region", layerOf(func(l *twilightv1.Layer) {
			l.Observation = &twilightv1.Observation{
				MassTokens: 1, Mass: &twilightv1.Observation_MassAt{MassAt: at(2, 1)},
			}
		}), stale, "layer.observation.mass_at.generation"},
		{"window too wide", layerOf(func(l *twilightv1.Layer) {
			l.Observation = &twilightv1.Observation{Window: 4097}
		}), invalid, "layer.observation.window"},
		{"list mode of no name", layerOf(func(l *twilightv1.Layer) { l.ListMode = 9 }), invalid, "layer.list_mode"},
		{"no list buffer", layerOf(func(l *twilightv1.Layer) { l.ListMode = twilightv1.ListMode_LIST_MODE_BUFFER }), invalid, "layer.list_buffer"},
		{"list buffer for nothing", layerOf(func(l *twilightv1.Layer) {
			l.ListBuffer = &twilightv1.ListBuffer{Capacity: 1, Lists: at(1, 1), Counts: at(1, 1)}
		}), invalid, "layer.list_buffer"},
		{"list buffer in no region", layerOf(func(l *twilightv1.Layer) {
			l.ListMode = twilightv1.ListMode_LIST_MODE_BUFFER
			l.ListBuffer = &twilightv1.ListBuffer{Capacity: 1, Lists: at(1, 1), Counts: at(9, 1)}
		}), notFound, "layer.list_buffer.counts.region_id"},
		{"lists only, with an output", layerOf(func(l *twilightv1.Layer) {
			l.ListsOnly, l.OutputTensor = true, &twilightv1.Tensor{At: at(1, 1)}
		}), invalid, "layer.output_tensor"},
		{"lists without a query", layerOf(func(l *twilightv1.Layer) { l.Query, l.ListsOnly = nil, true }), invalid, "layer.lists_only"},
	}
	for _, tc := range tests {
		resp := e.ask(tc.req)
		got := resp.GetError()
		if got.GetCode() != tc.code || got.GetField() != tc.field || got.GetMessage() == "" {
			t.Errorf("%s: got %v, want code %v and field %q", tc.name, resp, tc.code, tc.field)
		}
		if tc.code == exhausted && got.GetRequested() <= got.GetAvailable() {
			t.Errorf("%s: asked %d of %d", tc.name, got.GetRequested(), got.GetAvailable())
		}
		e.must(layer(1))
		neighbour.must(layer(1))
	}
	if memories, caches := fake.memories.Load(), fake.caches.Load(); memories != 3 || caches != 2 {
		t.Errorf("%d memories and %d caches are left, want 3 and 2", memories, caches)
	}
}

func TestRequestIDZero(t *testing.T) {
	t.Parallel()
	e := start(t, Config{}, newFake()).ready()
	if err := e.stream.Send(step(9)); err != nil {
		t.Fatal(err)
	}
	if got := e.receive(0).GetError(); got.GetField() != "request_id" {
		t.Errorf("answer %v", got)
	}
	e.must(layer(1))
}

func TestLayerAfterTheStep(t *testing.T) {
	t.Parallel()
	e := start(t, Config{}, newFake()).open()
	e.must(e.region(1))
	e.must(registerCache(1))
	refused := func(name string, req *twilightv1.LeaseRequest) {
		t.Helper()
		if got := e.ask(req).GetError(); got.GetCode() != twilightv1.ErrorCode_ERROR_CODE_FAILED_PRECONDITION {
			t.Errorf("%s: %v", name, got)
		}
	}
	refused("before any step", layer(1))
	index := step(3)
	index.GetStep().IndexOnly = true
	e.must(index)
	refused("of an index_only step", layer(3))
	e.must(step(4))
	e.must(layer(4))
	e.must(request(&twilightv1.CancelStep{CacheId: 1, StepId: 4}))
	refused("of a cancelled step", layer(4))
	refused("a step id again after its cancellation", step(4))
}

func TestRefusedStepLeavesThePreviousOne(t *testing.T) {
	t.Parallel()
	fake := newFake()
	fake.onStep = func(s *kv.Step) error {
		if s.Lengths[0] < 0 {
			return fault.Newf(fault.Invalid, "lengths[0]", "is negative")
		}
		return nil
	}
	e := start(t, Config{}, fake).ready()
	bad := step(2)
	bad.GetStep().Lengths[0] = -1
	if got := e.ask(bad).GetError(); got.GetField() != "step.lengths[0]" {
		t.Errorf("answer %v", got)
	}
	e.must(layer(1))
	e.must(step(2))
}

// A region is replaced: what lay in it is stale, and released.
func TestGenerations(t *testing.T) {
	t.Parallel()
	fake := newFake()
	d := start(t, Config{}, fake)
	e := d.ready()

	failed := registerRegion(1, 2, make([]byte, 16))
	if got := e.ask(failed).GetError(); got == nil {
		t.Fatal("a region without a descriptor was registered")
	}
	e.must(layer(1)) // nothing was replaced

	e.must(registerRegion(1, 2, e.lend(testRegionBytes)))
	if memories, caches := fake.memories.Load(), fake.caches.Load(); memories != 1 || caches != 0 {
		t.Errorf("%d memories and %d caches are left, want 1 and none", memories, caches)
	}
	for _, req := range []*twilightv1.LeaseRequest{layer(1), step(2), request(&twilightv1.CancelStep{CacheId: 1, StepId: 1})} {
		if got := e.ask(req).GetError(); got.GetCode() != twilightv1.ErrorCode_ERROR_CODE_STALE_GENERATION {
			t.Errorf("%v: answer %v", req, got)
		}
	}
	e.must(request(&twilightv1.ReleaseCache{CacheId: 1}))
	again := registerCache(1)
	again.GetRegisterCache().Layers[0].K.Generation = 2
	again.GetRegisterCache().Layers[0].V.Generation = 2
	e.must(again)
	e.must(step(1))
	e.must(layer(1))
}

// Memory of a GPU comes in chunks, by descriptors or handles.
func TestChunks(t *testing.T) {
	t.Parallel()
	fake := newFake()
	fake.info.ID = "GPU-1"
	fake.info.Regions = []gpu.RegionKind{gpu.CUDAIPC, gpu.CUDAVMM, gpu.CUDAFabric}
	var got *gpu.Region
	var inodes []uint64
	fake.onImport = func(region *gpu.Region) error {
		got, inodes = region, nil
		for _, chunk := range region.Chunks {
			var st unix.Stat_t
			if unix.Fstat(chunk.FD, &st) == nil {
				inodes = append(inodes, st.Ino)
			}
		}
		return nil
	}
	e := start(t, Config{}, fake).open()
	files := []*shared{share(t), share(t)}
	region := func(id uint32, size uint64) *twilightv1.RegisterRegion {
		return &twilightv1.RegisterRegion{
			RegionId: id, Size: size, Access: twilightv1.Access_ACCESS_READ_ONLY, Device: "GPU-1",
		}
	}
	vmm := func(id uint32, size uint64, chunks ...*twilightv1.CudaVmm_Chunk) *twilightv1.LeaseRequest {
		r := region(id, size)
		r.Kind = &twilightv1.RegisterRegion_CudaVmm{CudaVmm: &twilightv1.CudaVmm{Chunks: chunks, Offset: 100}}
		return request(r)
	}
	chunk := func(token []byte, size uint64) *twilightv1.CudaVmm_Chunk {
		return &twilightv1.CudaVmm_Chunk{FdToken: token, Size: size}
	}
	first, second := e.lendFD(files[0].fd), e.lendFD(files[1].fd)
	refused := func(name string, req *twilightv1.LeaseRequest, code twilightv1.ErrorCode, field string) {
		t.Helper()
		if err := e.ask(req).GetError(); err.GetCode() != code || err.GetField() != field {
			t.Errorf("%s: answer %v", name, err)
		}
	}
	const outOfRange = twilightv1.ErrorCode_ERROR_CODE_OUT_OF_RANGE
	refused("behind the chunks", vmm(1, 101, chunk(first, 100), chunk(second, 100)), outOfRange, "register_region.cuda_vmm.offset")
	overflowing := vmm(1, 50, chunk(first, 100), chunk(second, 100))
	overflowing.GetRegisterRegion().GetCudaVmm().Offset = 1<<64 - 50
	refused("overflowing", overflowing, outOfRange, "register_region.cuda_vmm.offset")
	refused("a token of nothing", vmm(1, 50, chunk(first, 100), chunk(make([]byte, 16), 100)),
		twilightv1.ErrorCode_ERROR_CODE_NOT_FOUND, "register_region.cuda_vmm.chunks[1].fd_token")
	elsewhere := vmm(1, 50, chunk(first, 100), chunk(second, 100))
	elsewhere.GetRegisterRegion().Device = "GPU-2"
	refused("of another GPU", elsewhere, twilightv1.ErrorCode_ERROR_CODE_INVALID_ARGUMENT, "register_region.device")
	refused("shared memory", registerRegion(1, 1, make([]byte, 16)),
		twilightv1.ErrorCode_ERROR_CODE_UNSUPPORTED, "register_region.shared_memory")

	e.must(vmm(1, 100, chunk(first, 100), chunk(second, 100)))
	want := &gpu.Region{Kind: gpu.CUDAVMM, Size: 100, Device: "GPU-1", Offset: 100, Chunks: []gpu.Chunk{{Size: 100}, {Size: 100}}}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(gpu.Chunk{}, "FD")); diff != "" {
		t.Error("VMM region (-want +got):", diff)
	}
	if !slices.Equal(inodes, []uint64{files[0].inode(t), files[1].inode(t)}) {
		t.Errorf("descriptors of files %v, in another order", inodes)
	}

	handle := slices.Repeat([]byte{7}, 64)
	ipc := region(2, 100)
	ipc.Kind = &twilightv1.RegisterRegion_CudaIpc{CudaIpc: &twilightv1.CudaIpc{Handle: handle, Offset: 5}}
	e.must(request(ipc))
	want = &gpu.Region{Kind: gpu.CUDAIPC, Size: 100, Device: "GPU-1", Offset: 5, Chunks: []gpu.Chunk{{FD: -1, Handle: handle, Size: 100}}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error("IPC region (-want +got):", diff)
	}
	fabric := region(3, 100)
	fabric.Kind = &twilightv1.RegisterRegion_CudaFabric{CudaFabric: &twilightv1.CudaFabric{
		Chunks: []*twilightv1.CudaFabric_Chunk{{Handle: handle, Size: 60}, {Handle: handle, Size: 40}},
	}}
	e.must(request(fabric))
	want = &gpu.Region{Kind: gpu.CUDAFabric, Size: 100, Device: "GPU-1", Chunks: []gpu.Chunk{
		{FD: -1, Handle: handle, Size: 60}, {FD: -1, Handle: handle, Size: 40},
	}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error("fabric region (-want +got):", diff)
	}
}

func TestDeviceErrors(t *testing.T) {
	t.Parallel()
	fake := newFake()
	errs := make(chan error, 1)
	fake.onLayer = func(context.Context, *gpu.LayerRequest, *gpu.LayerResult) error {
		err := <-errs
		if err != nil && err.Error() == "panic" {
			panic("at 0xc0ffee")
		}
		return err
	}
	d := start(t, Config{}, fake)
	e := d.ready()
	for kind, row := range errorCodes {
		errs <- fmt.Errorf("wrapped: %w", fault.Newf(fault.Kind(kind), "query[1]", "is wrong"))
		got := e.ask(layer(1)).GetError()
		if got.GetCode() != row.code || got.GetField() != "layer.query[1]" || got.GetMessage() != "is wrong" {
			t.Errorf("%v: answer %v", fault.Kind(kind), got)
		}
	}
	for _, tc := range []struct {
		err  error
		code twilightv1.ErrorCode
		log  string
	}{
		{errors.New("address 0xdead"), twilightv1.ErrorCode_ERROR_CODE_INTERNAL, "0xdead"},
		{errors.New("panic"), twilightv1.ErrorCode_ERROR_CODE_INTERNAL, "0xc0ffee"},
		{context.Canceled, twilightv1.ErrorCode_ERROR_CODE_CANCELLED, ""},
		{context.DeadlineExceeded, twilightv1.ErrorCode_ERROR_CODE_DEADLINE_EXCEEDED, ""},
	} {
		errs <- tc.err
		got := e.ask(layer(1)).GetError()
		if got.GetCode() != tc.code || strings.Contains(got.GetMessage(), "0x") {
			t.Errorf("%v: answer %v", tc.err, got)
		}
		if !strings.Contains(d.log.String(), tc.log) {
			t.Errorf("%v: the log does not tell", tc.err)
		}
	}
	if !strings.Contains(d.log.String(), "fakeCache") {
		t.Error("the log has no stack of the panic")
	}
	errs <- nil
	e.must(layer(1))
}

func TestInlineAnswersAreBounded(t *testing.T) {
	t.Parallel()
	fake := newFake()
	fake.onLayer = func(_ context.Context, _ *gpu.LayerRequest, res *gpu.LayerResult) error {
		res.Lists = make([]int32, 1000)
		return nil
	}
	e := start(t, Config{Limits: Limits{MessageBytes: 2048}}, fake).ready()
	if got := e.ask(layer(1)).GetError(); got.GetField() != "layer.list_mode" ||
		got.GetCode() != twilightv1.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED {
		t.Errorf("long lists: answer %v", got)
	}
	many := request(&twilightv1.Step{
		CacheId: 1, StepId: 2, Lengths: make([]int32, 100), Sequences: make([]uint64, 100),
	})
	e.must(many)
	if got := e.ask(layer(2)).GetError(); got.GetField() != "layer.output_tensor" || got.GetRequested() != 100*2*16*4 {
		t.Errorf("large output: answer %v", got)
	}
}

func TestOversizedMessage(t *testing.T) {
	t.Parallel()
	const limit = 1 << 16
	fake := newFake()
	d := start(t, Config{Limits: Limits{MessageBytes: limit}}, fake)
	e, neighbour := d.ready(), d.ready()
	query := func(n int) *twilightv1.LeaseRequest {
		return request(&twilightv1.Layer{CacheId: 1, StepId: 1, Query: &twilightv1.Layer_QueryInline{QueryInline: make([]byte, n)}})
	}
	got := e.ask(query(limit * 3 / 2)).GetError()
	if got.GetCode() != twilightv1.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED || got.GetAvailable() != limit || got.GetRequested() <= limit {
		t.Errorf("answer %v", got)
	}
	e.must(layer(1))

	// Beyond what gRPC takes the stream ends, and the lease with it.
	e.send(query(limit * hardLimitFactor))
	if _, err := e.stream.Recv(); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("the stream ended by %v", err)
	}
	eventually(t, "the lease ended", func() bool { return fake.leases.Load() == 1 })
	neighbour.must(layer(1))
}

// However a stream ends, its lease is released and its neighbour goes on.
func TestEnds(t *testing.T) {
	t.Parallel()
	running := make(chan struct{}, 1)
	fake := newFake()
	fake.onLayer = func(ctx context.Context, req *gpu.LayerRequest, _ *gpu.LayerResult) error {
		if req.Layer != 7 {
			return nil
		}
		running <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	}
	d := start(t, Config{
		Limits:    Limits{MessageBytes: 1 << 20},
		keepalive: keepalive.ServerParameters{Time: time.Second, Timeout: 100 * time.Millisecond},
	}, fake)
	neighbour := d.ready()
	slow := func(e *engine) {
		req := layer(1)
		req.GetLayer().Layer = 7
		e.send(req)
		<-running
	}
	// An engine on a connection of its own.
	apart := func() (*engine, *grpc.ClientConn, *cutConn) {
		cut := &cutConn{silent: make(chan struct{})}
		conn, client := d.dial(grpc.WithContextDialer(func(ctx context.Context, path string) (net.Conn, error) {
			var dialer net.Dialer
			var err error
			cut.Conn, err = dialer.DialContext(ctx, "unix", d.path)
			return cut, err
		}))
		e := openOn(t, client)
		e.prepare()
		return e, conn, cut
	}
	ends := map[string]func(){
		"closed by the engine": func() { _ = d.ready().stream.CloseSend() },
		"cancelled":            func() { d.ready().cancel() },
		"cancelled while a layer runs": func() {
			e := d.ready()
			slow(e)
			e.cancel()
		},
		"connection closed": func() {
			e, conn, _ := apart()
			slow(e)
			conn.Close()
		},
		"killed amid a message": func() {
			e, _, cut := apart()
			e.send(layer(1))
			// A frame that announces more than follows.
			if _, err := cut.Conn.Write([]byte{0, 0x40, 0, 0, 0, 0, 0, 0, 1, 0, 0}); err != nil {
				t.Error(err)
			}
			cut.Close()
		},
		"silent": func() {
			e, _, cut := apart()
			slow(e)
			close(cut.silent)
		},
	}
	for name, end := range ends {
		end()
		eventually(t, name+": released", func() bool {
			return fake.leases.Load() == 1 && fake.memories.Load() == 1 && fake.caches.Load() == 1
		})
		neighbour.must(layer(1))
	}
}

func TestRequestsAreServedInOrder(t *testing.T) {
	t.Parallel()
	e := start(t, Config{}, newFake()).ready()
	first := e.lastID + 1
	for i := range 500 {
		e.send(step(uint64(2 + i)))
		e.send(layer(uint64(2 + i)))
	}
	for id := first; id <= e.lastID; id++ {
		if got := e.receive(id).GetError(); got != nil {
			t.Fatalf("request %d: %v", id, got)
		}
	}
}

func TestTokens(t *testing.T) {
	t.Parallel()
	fake := newFake()
	d := start(t, Config{}, fake)
	e := d.ready()
	use := func(ctx context.Context) error {
		stream, err := d.client.Lease(ctx)
		if err != nil {
			return err
		}
		_, err = stream.Recv()
		return err
	}
	for name, tc := range map[string]struct {
		ctx  context.Context
		code codes.Code
	}{
		"none":    {t.Context(), codes.InvalidArgument},
		"short":   {withToken(t.Context(), []byte("short")), codes.InvalidArgument},
		"two":     {withToken(withToken(t.Context(), e.opened.GetToken()), e.opened.GetToken()), codes.InvalidArgument},
		"unknown": {withToken(t.Context(), make([]byte, 32)), codes.NotFound},
		"used":    {withToken(t.Context(), e.opened.GetToken()), codes.NotFound},
	} {
		if err := use(tc.ctx); status.Code(err) != tc.code {
			t.Errorf("%s: stream ended by %v, want %v", name, err, tc.code)
		}
	}
	e.must(layer(1))
}

func TestLeaseWaitsOnlySoLong(t *testing.T) {
	t.Parallel()
	fake := newFake()
	d := start(t, Config{OpenTimeout: 20 * time.Millisecond}, fake)
	opened, err := d.client.OpenLease(t.Context(), openRequest())
	if err != nil {
		t.Fatal(err)
	}
	released(t, fake)
	stream, err := d.client.Lease(withToken(t.Context(), opened.GetToken()))
	if err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.NotFound {
		t.Errorf("a late stream ended by %v", err)
	}
}

// A lease belongs to the user who opened it.
func TestAnotherUser(t *testing.T) {
	t.Parallel()
	uids := make(chan uint32, 3)
	fake := newFake()
	own := uint32(syscall.Geteuid())
	d := start(t, Config{
		AllowedUIDs: []uint32{own + 1},
		peerUID:     func(syscall.Conn) (uint32, error) { return <-uids, nil },
	}, fake)
	as := func(uid uint32) twilightv1.TwilightServiceClient {
		uids <- uid
		conn, client := d.dial()
		conn.Connect()
		eventually(t, "connected", func() bool { return len(uids) == 0 })
		return client
	}
	if _, err := as(own+2).OpenLease(t.Context(), openRequest()); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a stranger opened a lease: %v", err)
	}
	mine, allowed := as(own), as(own+1)
	opened, err := mine.OpenLease(t.Context(), openRequest())
	if err != nil {
		t.Fatal(err)
	}
	stream, err := allowed.Lease(withToken(t.Context(), opened.GetToken()))
	if err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.PermissionDenied {
		t.Errorf("another user's stream ended by %v", err)
	}
	// The token is still good for its owner.
	stream, err = mine.Lease(withToken(t.Context(), opened.GetToken()))
	if err != nil {
		t.Fatal(err)
	}
	e := &engine{t: t, opened: opened, stream: stream}
	e.must(e.region(1))
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	released(t, fake)
}

// goneStream brings one request, of an engine that is gone by then.
type goneStream struct {
	leaseStream
	ctx    context.Context
	cancel context.CancelFunc
}

func (s *goneStream) Context() context.Context { return s.ctx }

func (s *goneStream) Recv() (*twilightv1.LeaseRequest, error) {
	s.cancel()
	return layer(1), nil
}

func (s *goneStream) Send(*twilightv1.LeaseResponse) error { return s.ctx.Err() }

// A stream that ends while a request comes in ends its lease, whether the request was still served or not.
func TestStreamEndsUnderRequest(t *testing.T) {
	t.Parallel()
	device := newFake()
	s := start(t, Config{}, device)
	for range 100 {
		l, err := s.newLease(t.Context(), 1, openRequest(), device)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() {
			l.stream = &goneStream{ctx: ctx, cancel: cancel}
			ended <- l.serve(l.stream)
			l.close()
		}()
		select {
		case err := <-ended:
			if !errors.Is(err, context.Canceled) {
				t.Errorf("ended with %v", err)
			}
		case <-time.After(deadline):
			t.Fatal("the lease goes on")
		}
	}
	released(t, device)
}
