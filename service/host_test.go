package service

import (
	"bytes"
	"context"
	"encoding/binary"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/proto"

	"github.com/twilight-sidecar/twilight/gpu/host"
	"github.com/twilight-sidecar/twilight/internal/fdsock"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
	"github.com/twilight-sidecar/twilight/telemetry"
)

// everything is a config under which attention is exact and all of the pipeline's stages run.
const everything = `{"selector": {"type": "none"}, "skip_first_two_layers": false, "group": "per_query_head",
	"weight_estimator": {"type": "none"}, "weight_pruner": {"type": "top_p", "threshold": 1.0}}`

func startHost(t testing.TB, config Config) *daemon {
	t.Helper()
	return start(t, config, host.New(host.Options{Methods: allMethods(t), Workers: 2}))
}

// shared is memory that a test lends: the cache of registerCache, and room behind it.
type shared struct {
	fd    int
	bytes []byte
}

const (
	heads, dim  = 2, 16
	sharedPlane = 8 * 16 * dim * 4 // 8 pages of 16 tokens
	sharedRoom  = 2 * sharedPlane  // where the cache ends
)

// share makes such memory, with random keys and values.
func share(t testing.TB) *shared {
	t.Helper()
	fd, err := unix.MemfdCreate(t.Name(), unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Ftruncate(fd, testRegionBytes); err != nil {
		t.Fatal(err)
	}
	mapped, err := unix.Mmap(fd, 0, testRegionBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(mapped) })
	r := rand.New(rand.NewPCG(1, 2))
	for i := 0; i < sharedRoom; i += 4 {
		binary.LittleEndian.PutUint32(mapped[i:], math.Float32bits(float32(r.NormFloat64())))
	}
	return &shared{fd: fd, bytes: mapped}
}

func (m *shared) inode(t testing.TB) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(m.fd, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func (m *shared) float(at int) float64 {
	return float64(math.Float32frombits(binary.LittleEndian.Uint32(m.bytes[at:])))
}

// dense is attention of one query head over the first n tokens of pages 0, 1, ....
func (m *shared) dense(q []float32, n int) []float64 {
	weights, sum, largest := make([]float64, n), 0.0, math.Inf(-1)
	for i := range weights {
		for d := range q {
			weights[i] += 0.25 * float64(q[d]) * m.float((i*dim+d)*4)
		}
		largest = max(largest, weights[i])
	}
	out := make([]float64, dim)
	for i := range weights {
		w := math.Exp(weights[i] - largest)
		sum += w
		for d := range out {
			out[d] += w * m.float(sharedPlane+(i*dim+d)*4)
		}
	}
	for d := range out {
		out[d] /= sum
	}
	return out
}

func encode(values []float32) []byte {
	b := make([]byte, 4*len(values))
	for i, v := range values {
		binary.LittleEndian.PutUint32(b[4*i:], math.Float32bits(v))
	}
	return b
}

func randomQuery() []float32 {
	r := rand.New(rand.NewPCG(3, 4))
	q := make([]float32, heads*dim)
	for i := range q {
		q[i] = float32(r.NormFloat64())
	}
	return q
}

// Queries, outputs and lists travel inline and in lent memory, and mean the same.
func TestAttention(t *testing.T) {
	t.Parallel()
	memory := share(t)
	e := startHost(t, Config{}).openWith(everything)
	e.must(registerRegion(1, 1, e.lendFD(memory.fd)))
	e.must(registerCache(1))
	e.must(step(1))
	q := randomQuery()
	inline := layer(1)
	inline.GetLayer().Query = &twilightv1.Layer_QueryInline{QueryInline: encode(q)}
	inline.GetLayer().ListMode = twilightv1.ListMode_LIST_MODE_INLINE
	got := e.must(inline).GetLayerResult()

	var wrong, norm float64
	for h := range heads {
		want := memory.dense(q[h*dim:][:dim], 20)
		for d := range want {
			x := float64(math.Float32frombits(binary.LittleEndian.Uint32(got.GetOutput()[(h*dim+d)*4:])))
			wrong += (x - want[d]) * (x - want[d])
			norm += want[d] * want[d]
		}
	}
	if relErr := math.Sqrt(wrong / norm); !(relErr <= 1e-5) {
		t.Errorf("relative error %g", relErr)
	}
	if !slices.Equal(got.GetKept(), []uint32{20, 20}) || len(got.GetLists()) != 40 ||
		!slices.Equal(got.GetPaths(), []twilightv1.Path{twilightv1.Path_PATH_SPARSE, twilightv1.Path_PATH_SPARSE}) {
		t.Errorf("answer %v", got)
	}

	const queryAt, outputAt, listsAt, countsAt = sharedRoom, sharedRoom + 1024, sharedRoom + 2048, sharedRoom + 4096
	at := func(offset uint64) *twilightv1.Location {
		return &twilightv1.Location{RegionId: 1, Generation: 1, Offset: offset}
	}
	copy(memory.bytes[queryAt:], encode(q))
	lent := request(&twilightv1.Layer{
		CacheId: 1, StepId: 1,
		Query:        &twilightv1.Layer_QueryTensor{QueryTensor: &twilightv1.Tensor{At: at(queryAt)}},
		OutputTensor: &twilightv1.Tensor{At: at(outputAt)},
		ListMode:     twilightv1.ListMode_LIST_MODE_BUFFER,
		ListBuffer:   &twilightv1.ListBuffer{Capacity: 5, Lists: at(listsAt), Counts: at(countsAt)},
	})
	other := e.must(lent).GetLayerResult()
	if output := memory.bytes[outputAt:][:len(got.GetOutput())]; !bytes.Equal(output, got.GetOutput()) || len(other.GetOutput()) != 0 {
		t.Error("the output in lent memory is another")
	}
	if !slices.Equal(other.GetTruncated(), []uint32{0, 1}) || binary.LittleEndian.Uint32(memory.bytes[countsAt:]) != 5 {
		t.Errorf("cut lists: answer %v", other)
	}
	for i := range 5 {
		if got := binary.LittleEndian.Uint32(memory.bytes[listsAt+4*i:]); got != uint32(i) {
			t.Errorf("list entry %d is %d", i, got)
		}
	}
}

// openWith opens a lease with a config.
func (d *daemon) openWith(config string) *engine {
	d.t.Helper()
	req := openRequest()
	req.ConfigJson = config
	return openWith(d.t, d.client, req)
}

// What is wrong with a request is told by the names of its fields, whoever finds it.
func TestBadInput(t *testing.T) {
	t.Parallel()
	d := startHost(t, Config{})
	memory := share(t)
	engines := []*engine{d.openWith(everything), d.openWith(everything)}
	good := layer(1)
	good.GetLayer().Query = &twilightv1.Layer_QueryInline{QueryInline: encode(randomQuery())}
	var want []byte
	for _, e := range engines {
		e.must(registerRegion(1, 1, e.lendFD(memory.fd)))
		e.must(registerCache(1))
		e.must(step(1))
		want = e.must(good).GetLayerResult().GetOutput()
	}
	e, neighbour := engines[0], engines[1]
	neighbour.must(neighbour.region(5))
	readOnly := registerRegion(2, 1, e.lendFD(memory.fd))
	readOnly.GetRegisterRegion().Access = twilightv1.Access_ACCESS_READ_ONLY
	e.must(readOnly)

	file, err := os.Open("/proc/self/exe") // open for reading only
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()

	region := func(edit func(*twilightv1.RegisterRegion)) *twilightv1.LeaseRequest {
		req := registerRegion(3, 1, nil)
		edit(req.GetRegisterRegion())
		if req.GetRegisterRegion().GetSharedMemory().GetFdToken() == nil {
			req.GetRegisterRegion().GetSharedMemory().FdToken = e.lend(testRegionBytes)
		}
		return req
	}
	cache := func(edit func(*twilightv1.RegisterCache)) *twilightv1.LeaseRequest {
		req := registerCache(2)
		edit(req.GetRegisterCache())
		return req
	}
	stepOf := func(edit func(*twilightv1.Step)) *twilightv1.LeaseRequest {
		req := step(2)
		edit(req.GetStep())
		return req
	}
	layerOf := func(edit func(*twilightv1.Layer)) *twilightv1.LeaseRequest {
		req := proto.CloneOf(good)
		edit(req.GetLayer())
		return req
	}
	query := func(at int, v float64) *twilightv1.LeaseRequest {
		q := randomQuery()
		q[at] = float32(v)
		return layerOf(func(l *twilightv1.Layer) { l.Query = &twilightv1.Layer_QueryInline{QueryInline: encode(q)} })
	}
	at := func(region uint32, offset uint64) *twilightv1.Location {
		return &twilightv1.Location{RegionId: region, Generation: 1, Offset: offset}
	}
	const (
		invalid      = twilightv1.ErrorCode_ERROR_CODE_INVALID_ARGUMENT
		notFound     = twilightv1.ErrorCode_ERROR_CODE_NOT_FOUND
		precondition = twilightv1.ErrorCode_ERROR_CODE_FAILED_PRECONDITION
		outOfRange   = twilightv1.ErrorCode_ERROR_CODE_OUT_OF_RANGE
		exhausted    = twilightv1.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED
		denied       = twilightv1.ErrorCode_ERROR_CODE_PERMISSION_DENIED
		unsupported  = twilightv1.ErrorCode_ERROR_CODE_UNSUPPORTED
	)
	for _, tc := range []struct {
		name  string
		req   *twilightv1.LeaseRequest
		code  twilightv1.ErrorCode
		field string
	}{
		{"more than the file has", region(func(r *twilightv1.RegisterRegion) { r.Size *= 2 }), outOfRange, "register_region.size"},
		{"offset behind the file", region(func(r *twilightv1.RegisterRegion) { r.GetSharedMemory().Offset = 1 << 40 }), outOfRange, "register_region.size"},
		{"file open for reading only", region(func(r *twilightv1.RegisterRegion) {
			r.Size, r.GetSharedMemory().FdToken = 4096, e.lendFD(int(file.Fd()))
		}), denied, "register_region.access"},

		{"overflowing offset", cache(func(c *twilightv1.RegisterCache) { c.Layers[0].K.Offset = 1<<64 - 4 }), outOfRange, "register_cache.layers[0].k.offset"},
		{"offset off element", cache(func(c *twilightv1.RegisterCache) { c.Layers[0].V.Offset = 2 }), invalid, "register_cache.layers[0].v.offset"},
		{"cache behind the region", cache(func(c *twilightv1.RegisterCache) { c.NumPages = 1 << 20 }), outOfRange, "register_cache.layers[0].k.offset"},
		{"overflowing strides", cache(func(c *twilightv1.RegisterCache) {
			c.KStrides.Page, c.NumPages = 1<<48, 1<<31-1
		}), outOfRange, "register_cache.k_strides.page"},
		{"overlapping tokens", cache(func(c *twilightv1.RegisterCache) { c.KStrides.Token = 4 }), invalid, "register_cache.k_strides.token"},
		{"scales of an fp32 cache", cache(func(c *twilightv1.RegisterCache) { c.Layers[0].KScales = []float32{2} }), invalid, "register_cache.layers[0].k_scales"},
		{"another engine's region", cache(func(c *twilightv1.RegisterCache) { c.Layers[0].K = at(5, 0) }), notFound, "register_cache.layers[0].k.region_id"},

		{"negative length", stepOf(func(s *twilightv1.Step) { s.Lengths[0] = -1 }), invalid, "step.lengths[0]"},
		{"shrinking without truncation", stepOf(func(s *twilightv1.Step) { s.Lengths[0] = 19 }), precondition, "step.lengths[0]"},
		{"page out of range", stepOf(func(s *twilightv1.Step) { s.Table.Entries[1] = 8 }), outOfRange, "step.table.entries[1]"},
		{"negative page", stepOf(func(s *twilightv1.Step) { s.Table.Entries[1] = -1 }), outOfRange, "step.table.entries[1]"},
		{"short table", stepOf(func(s *twilightv1.Step) { s.Lengths[0] = 33 }), outOfRange, "step.lengths[0]"},
		{"unknown sequence ended", stepOf(func(s *twilightv1.Step) { s.Ended = []uint64{9} }), notFound, "step.ended[0]"},
		{"too many rows", stepOf(func(s *twilightv1.Step) {
			s.Sequences, s.Lengths, s.Table = make([]uint64, 5000), make([]int32, 5000), nil
		}), exhausted, "step.lengths"},

		{"no such layer", layerOf(func(l *twilightv1.Layer) { l.Layer = 1 }), notFound, "layer.layer"},
		{"short query", layerOf(func(l *twilightv1.Layer) {
			l.Query = &twilightv1.Layer_QueryInline{QueryInline: make([]byte, 127)}
		}), invalid, "layer.query_inline"},
		{"NaN in a query", query(3, math.NaN()), invalid, "layer.query[0][0][3]"},
		{"an observation that nothing takes", layerOf(func(l *twilightv1.Layer) {
			l.Observation = &twilightv1.Observation{
				MassTokens: 1, Mass: &twilightv1.Observation_MassInline{MassInline: make([]byte, heads*4)},
			}
		}), unsupported, "layer.observation"},
		{"mass of another size", layerOf(func(l *twilightv1.Layer) {
			l.Observation = &twilightv1.Observation{
				MassTokens: 2, Mass: &twilightv1.Observation_MassInline{MassInline: make([]byte, heads*4)},
			}
		}), invalid, "layer.observation.mass_inline"},
		{"Inf in a query", query(dim, math.Inf(-1)), invalid, "layer.query[0][1][0]"},
		{"p for more rows", layerOf(func(l *twilightv1.Layer) { l.P = []float32{0.5, 0.5} }), invalid, "layer.p"},
		{"query behind the region", layerOf(func(l *twilightv1.Layer) {
			l.Query = &twilightv1.Layer_QueryTensor{QueryTensor: &twilightv1.Tensor{At: at(1, testRegionBytes-4)}}
		}), outOfRange, "layer.query_tensor.at.offset"},
		{"output in a read-only region", layerOf(func(l *twilightv1.Layer) {
			l.OutputTensor = &twilightv1.Tensor{At: at(2, sharedRoom)}
		}), denied, "layer.output_tensor.at"},
		{"output over the cache", layerOf(func(l *twilightv1.Layer) { l.OutputTensor = &twilightv1.Tensor{At: at(1, 0)} }), denied, "layer.output_tensor.at"},
		{"lists in a read-only region", layerOf(func(l *twilightv1.Layer) {
			l.ListMode = twilightv1.ListMode_LIST_MODE_BUFFER
			l.ListBuffer = &twilightv1.ListBuffer{Capacity: 5, Lists: at(2, sharedRoom), Counts: at(1, sharedRoom)}
		}), denied, "layer.list_buffer.lists"},
		{"another engine's buffer", layerOf(func(l *twilightv1.Layer) {
			l.OutputTensor = &twilightv1.Tensor{At: at(5, 0)}
		}), notFound, "layer.output_tensor.at.region_id"},
	} {
		got := e.ask(tc.req).GetError()
		if got.GetCode() != tc.code || got.GetField() != tc.field || got.GetMessage() == "" {
			t.Errorf("%s: got %v, want code %v and field %q", tc.name, got, tc.code, tc.field)
		}
		for _, e := range engines {
			if got := e.must(good).GetLayerResult().GetOutput(); !bytes.Equal(got, want) {
				t.Fatalf("%s: outputs changed", tc.name)
			}
		}
	}
}

// A file that is cut short under the daemon costs its own lease a request, and nobody else anything.
func TestMemoryThatVanishes(t *testing.T) {
	t.Parallel()
	d := startHost(t, Config{})
	e, neighbour := d.ready(), d.ready()
	memory := share(t)
	e.must(registerRegion(2, 1, e.lendFD(memory.fd)))
	other := registerCache(2)
	for _, at := range []*twilightv1.Location{other.GetRegisterCache().Layers[0].K, other.GetRegisterCache().Layers[0].V} {
		at.RegionId = 2
	}
	e.must(other)
	if err := unix.Ftruncate(memory.fd, 0); err != nil {
		t.Fatal(err)
	}
	second := step(1)
	second.GetStep().CacheId = 2
	e.must(second)
	gone := layer(1)
	gone.GetLayer().CacheId = 2
	if got := e.ask(gone).GetError(); got.GetCode() != twilightv1.ErrorCode_ERROR_CODE_DATA_LOSS {
		t.Errorf("answer %v", got)
	}
	e.must(layer(1))
	neighbour.must(layer(1))
}

// openFiles counts this process's descriptors and mappings of memory files of a name.
func openFiles(t *testing.T, name string) (fds, mappings int) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + entry.Name()); err == nil && strings.Contains(target, name) {
			fds++
		}
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	return fds, strings.Count(string(maps), name)
}

func TestThousandRegistrations(t *testing.T) {
	t.Parallel()
	d := startHost(t, Config{})
	fd, err := unix.MemfdCreate(t.Name(), unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, testRegionBytes); err != nil {
		t.Fatal(err)
	}
	for range 10 {
		e := d.open()
		for id := uint32(1); id <= 100; id++ {
			e.must(registerRegion(id, 1, e.lendFD(fd)))
			cache := registerCache(id)
			for _, at := range []*twilightv1.Location{cache.GetRegisterCache().Layers[0].K, cache.GetRegisterCache().Layers[0].V} {
				at.RegionId = id
			}
			switch id % 4 {
			case 0: // released by the engine
				e.must(cache)
				e.must(request(&twilightv1.ReleaseCache{CacheId: id}))
				e.must(request(&twilightv1.ReleaseRegion{RegionId: id}))
			case 1: // replaced
				e.must(registerRegion(id, 2, e.lendFD(fd)))
			case 2: // refused
				cache.GetRegisterCache().NumPages = 1 << 30
				if e.ask(cache).GetError() == nil {
					t.Fatal("a cache larger than its region was registered")
				}
			case 3: // sent, and never claimed
				e.lendFD(fd)
			}
		}
		if _, mappings := openFiles(t, t.Name()); mappings == 0 {
			t.Fatal("nothing is mapped: the counts mean nothing")
		}
		e.cancel()
		eventually(t, "all that the lease had is closed", func() bool {
			fds, mappings := openFiles(t, t.Name())
			return fds == 1 && mappings == 0
		})
	}
}

// FuzzLeaseRequest sends a lease whatever messages the bytes hold: there is always an answer, and a
// refusal always names its code.
func FuzzLeaseRequest(f *testing.F) {
	f.Add(fuzzInput(f, registerRegion(1, 1, fuzzToken(0)), registerCache(1), step(1), layer(1)))
	replaced := registerRegion(1, 2, fuzzToken(1))
	f.Add(fuzzInput(f, registerRegion(1, 1, fuzzToken(0)), registerCache(1), replaced, layer(1), request(&twilightv1.ReleaseCache{CacheId: 1})))
	f.Add(fuzzInput(f, &twilightv1.LeaseRequest{}, request(&twilightv1.CancelStep{}), request(&twilightv1.ReleaseRegion{RegionId: 1})))
	f.Add([]byte{1})
	watching, err := telemetry.Start(f.Context(), telemetry.Options{})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = watching.Shutdown(context.Background()) })
	d := startHost(f, Config{Telemetry: watching})
	memory := share(f)
	ctx := peer.NewContext(f.Context(), &peer.Peer{AuthInfo: unixPeer{uid: uint32(os.Geteuid())}})
	f.Fuzz(func(t *testing.T, input []byte) {
		l, err := d.newLease(ctx, 1, openRequest(), d.config.Devices[0])
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			l.close()
			if fds, mappings := openFiles(t, f.Name()); fds != 1 || mappings != 1 {
				t.Errorf("the lease left %d descriptors and %d mappings", fds-1, mappings-1)
			}
		}()
		tokens, err := fdsock.Send(ctx, d.path+fdSuffix, l.token[:], slices.Repeat([]int{memory.fd}, fuzzTokens)...)
		if err != nil {
			t.Fatal(err)
		}
		reader := bytes.NewReader(input)
		for {
			req := &twilightv1.LeaseRequest{}
			if err := (protodelim.UnmarshalOptions{MaxSize: 1 << 16}).UnmarshalFrom(reader, req); err != nil {
				break // as gRPC refuses what it cannot decode
			}
			if shared := req.GetRegisterRegion().GetSharedMemory(); shared != nil {
				for i, token := range tokens {
					if bytes.Equal(shared.GetFdToken(), fuzzToken(i)) {
						shared.FdToken = token[:]
					}
				}
			}
			resp := l.answer(ctx, req, time.Now())
			if resp.GetRequestId() != req.GetRequestId() || resp.Response == nil {
				t.Fatalf("%v: answer %v", req, resp)
			}
			if e := resp.GetError(); e != nil && (e.GetMessage() == "" ||
				e.GetCode() == twilightv1.ErrorCode_ERROR_CODE_UNSPECIFIED || e.GetCode() == twilightv1.ErrorCode_ERROR_CODE_INTERNAL) {
				t.Fatalf("%v: answer %v", req, resp)
			}
		}
	})
}

const fuzzTokens = 2

// fuzzToken stands for the i-th descriptor that the fuzzed engine has sent.
func fuzzToken(i int) []byte { return append(make([]byte, 15), byte(i+1)) }

func fuzzInput(f *testing.F, requests ...*twilightv1.LeaseRequest) []byte {
	f.Helper()
	var b bytes.Buffer
	for i, req := range requests {
		req.RequestId = uint64(i + 1)
		if _, err := protodelim.MarshalTo(&b, req); err != nil {
			f.Fatal(err)
		}
	}
	return b.Bytes()
}
