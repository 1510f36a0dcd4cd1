package gputest

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/fault"
)

// testLifetimes releases things in right and wrong orders.
func testLifetimes(t *testing.T, s *suite) {
	rows := []seq{{0, 320, 0}}
	t.Run("memory", func(t *testing.T) {
		e := s.engine(t, standard())
		const offset, length = 100, 1000
		if sum := must(e.lent.Digest(t.Context(), offset, length))(t); sum != sha256.Sum256(e.bytes[offset:][:length]) {
			t.Error("Digest is not that of the bytes lent")
		}
		if e.lent.Size() != uint64(len(e.bytes)) || e.lent.Writable() {
			t.Errorf("size %d, writable %v: want %d, false", e.lent.Size(), e.lent.Writable(), len(e.bytes))
		}
		refused(t, e.lent.Release(), fault.Precondition, "region_id")
		e.check(rows, e.decode(rows...))
		for range 2 {
			if err := e.cache.Close(); err != nil {
				t.Error(err)
			}
		}
		for range 2 {
			if err := e.lent.Release(); err != nil {
				t.Error(err)
			}
		}
		_, err := e.lent.Digest(t.Context(), offset, length)
		refused(t, err, fault.NotFound, "probe")
		_, err = e.lease.NewCache(t.Context(), e.spec)
		refused(t, err, fault.NotFound, "layers[0].k")
		unavailable(t, e)
	})

	t.Run("two caches in one region", func(t *testing.T) {
		e := s.engine(t, standard())
		second := must(e.lease.NewCache(t.Context(), e.spec))(t)
		if err := e.cache.Close(); err != nil {
			t.Error(err)
		}
		refused(t, e.lent.Release(), fault.Precondition, "region_id")
		e.cache = second
		e.check(rows, e.decode(rows...))
	})

	t.Run("closing what runs", func(t *testing.T) {
		for _, close := range []func(e *engine) error{
			func(e *engine) error { return e.cache.Close() },
			func(e *engine) error { return e.lease.Close() },
		} {
			e := s.engine(t, standard())
			want := e.decode(rows...)
			request := e.request(0, rows)
			var group sync.WaitGroup
			group.Go(func() {
				for {
					result := &gpu.LayerResult{}
					if err := e.cache.Layer(t.Context(), request, result); err != nil {
						refused(t, err, fault.Unavailable, "")
						return
					}
					same(t, "while closing", want[:1], []*gpu.LayerResult{result})
				}
			})
			if err := close(e); err != nil {
				t.Error(err)
			}
			group.Wait()
			unavailable(t, e)
		}
	})

	t.Run("a closed lease", func(t *testing.T) {
		e := s.engine(t, standard())
		for range 2 {
			if err := e.lease.Close(); err != nil {
				t.Error(err)
			}
		}
		unavailable(t, e)
		_, err := e.lease.Import(t.Context(), e.buffer.Region(t, len(e.bytes), false))
		refused(t, err, fault.Unavailable, "")
		_, err = e.lease.NewCache(t.Context(), e.spec)
		refused(t, err, fault.Unavailable, "")
		_, _, err = e.lease.ShadowBytes(e.spec)
		refused(t, err, fault.Unavailable, "")
		_, err = e.lent.Digest(t.Context(), 0, 1)
		refused(t, err, fault.Unavailable, "")
		if err := e.lent.Release(); err != nil {
			t.Error(err)
		}
	})

	t.Run("closing the device", func(t *testing.T) {
		e := s.engine(t, standard())
		e.step(e.batch(rows...))
		for range 2 {
			if err := s.device.Close(); err != nil {
				t.Error(err)
			}
		}
		unavailable(t, e)
		_, err := s.device.Open(t.Context(), &e.geometry, s.parse(t, e.config))
		refused(t, err, fault.Unavailable, "")
	})
}

// unavailable fails the test unless the engine's cache is closed.
func unavailable(t testing.TB, e *engine) {
	t.Helper()
	rows := []seq{{0, 320, 0}}
	refused(t, e.cache.Step(t.Context(), e.batch(rows...)), fault.Unavailable, "")
	refused(t, e.cache.Layer(t.Context(), e.request(0, rows), &gpu.LayerResult{}), fault.Unavailable, "")
	_, err := e.cache.Index(t.Context())
	refused(t, err, fault.Unavailable, "")
}

// testShadowBytes holds what shadows take against what was said before, and the limit.
func testShadowBytes(t *testing.T, s *suite) {
	before := s.device.Info().ShadowBytesFree
	setup := standard()
	e := s.engine(t, setup)
	told, each, err := e.lease.ShadowBytes(e.spec)
	if err != nil {
		t.Fatal(err)
	}
	if took := e.cache.ShadowBytes(); took != told {
		t.Errorf("the shadow takes %d bytes, told were %d", took, told)
	}
	if free := s.device.Info().ShadowBytesFree; free > before-told {
		t.Errorf("%d bytes are free, %d were before the shadow took %d", free, before, told)
	}
	perToken := must(s.device.ShadowBytesPerToken(&e.geometry, s.parse(t, e.config)))(t)
	tokens := e.layout.NumPages * e.layout.PageSize
	if perToken != each {
		t.Errorf("a token takes %v bytes, told were %v", each, perToken)
	}
	if perToken <= 0 || math.Abs(float64(told)/(perToken*float64(tokens))-1) > 0.1 {
		t.Errorf("%d bytes for %d tokens, but %v each", told, tokens, perToken)
	}

	setup.shape.PageSize = 7
	sequences := s.engine(t, setup)
	spec := *sequences.spec
	spec.MaxTokens = math.MaxInt32
	_, err = sequences.lease.NewCache(t.Context(), &spec)
	refused(t, err, fault.Exhausted, "num_pages")
	var limit *fault.Error
	if errors.As(err, &limit) && (limit.Requested <= limit.Available || limit.Available == 0) {
		t.Errorf("%d bytes were asked for, %d are left", limit.Requested, limit.Available)
	}
	for _, lease := range []gpu.Lease{e.lease, sequences.lease} {
		if err := lease.Close(); err != nil {
			t.Error(err)
		}
	}
	if after := s.device.Info().ShadowBytesFree; after != before {
		t.Errorf("%d bytes are free after all is closed, %d were before", after, before)
	}
}

// testLeaks registers and releases, successfully and not, and counts what stays open.
func testLeaks(t *testing.T, s *suite) {
	e := s.engine(t, standard())
	rows := []seq{{0, 320, 0}}
	e.check(rows, e.decode(rows...))
	config := s.parse(t, e.config)
	shadow := e.cache.ShadowBytes()
	cycle := func() {
		// All that a lease has goes with it.
		lease := must(s.device.Open(t.Context(), &e.geometry, config))(t)
		must(lease.NewCache(t.Context(), e.layout.Spec(
			must(lease.Import(t.Context(), e.buffer.Region(t, len(e.bytes), true)))(t), 0)))(t)
		if err := lease.Close(); err != nil {
			t.Fatal(err)
		}

		region := e.buffer.Region(t, len(e.bytes), false)
		region.Size++
		if _, err := e.lease.Import(t.Context(), region); err == nil {
			t.Fatal("a region beyond the file's end was imported")
		}
		lent := must(e.lease.Import(t.Context(), e.buffer.Region(t, len(e.bytes), false)))(t)
		spec := e.layout.Spec(lent, 0)
		cache := must(e.lease.NewCache(t.Context(), spec))(t)
		spec.NumPages++
		if _, err := e.lease.NewCache(t.Context(), spec); err == nil {
			t.Fatal("a cache beyond its region was registered")
		}
		if err := cache.Step(t.Context(), e.batch(rows...)); err != nil {
			t.Fatal(err)
		}
		if err := cache.Close(); err != nil {
			t.Fatal(err)
		}
		if err := lent.Release(); err != nil {
			t.Fatal(err)
		}
	}
	cycle()
	files, free := openFiles(t), s.device.Info().ShadowBytesFree
	mappings, size := mapped(t)
	const cycles = 1000
	for range cycles {
		cycle()
	}
	if now := openFiles(t); now > files {
		t.Errorf("%d files are open, %d were", now, files)
	}
	// The Go runtime maps memory of its own now and then.
	now, nowSize := mapped(t)
	if now > mappings+20 || nowSize > size+cycles*shadow/2 {
		t.Errorf("%d mappings of %d bytes, there were %d of %d", now, nowSize, mappings, size)
	}
	if now := s.device.Info().ShadowBytesFree; now != free {
		t.Errorf("%d bytes of shadow are free, %d were", now, free)
	}
}

func openFiles(t testing.TB) int {
	t.Helper()
	return len(must(os.ReadDir("/proc/self/fd"))(t))
}

// mapped counts the mappings of this process and their bytes.
func mapped(t testing.TB) (n int, size uint64) {
	t.Helper()
	for line := range strings.Lines(string(must(os.ReadFile("/proc/self/maps"))(t))) {
		var from, to uint64
		if _, err := fmt.Sscanf(line, "%x-%x ", &from, &to); err != nil {
			t.Fatal(err)
		}
		n, size = n+1, size+to-from
	}
	return n, size
}

// testNeighbours runs leases at the same time: each gets the bits that it gets alone.
func testNeighbours(t *testing.T, s *suite) {
	const steps, first = 6, 290
	decode := func(e *engine) (results []*gpu.LayerResult) {
		for n := first; n < first+steps; n++ {
			results = append(results, e.decode(seq{0, n, 0}, seq{1, n - 200, 3}, seq{2, n, 0})...)
		}
		return results
	}
	var setups []setup
	for i, config := range []string{quest, questPerHead, keepAll, quest} {
		setup := standard()
		setup.config, setup.seed = config, uint64(i+1)
		setup.geometry.QueryHeads = 2 * (i + 1)
		setup.shape.PageSize = []int{16, 7}[i%2]
		setups = append(setups, setup)
	}
	alone := make([][]*gpu.LayerResult, len(setups))
	engines := make([]*engine, len(setups))
	for i, setup := range setups {
		alone[i] = decode(s.engine(t, setup))
		engines[i] = s.engine(t, setup)
	}
	together := make([][]*gpu.LayerResult, len(setups))
	var group sync.WaitGroup
	for i, e := range engines {
		group.Go(func() { together[i] = decode(e) })
	}
	group.Wait()
	if slices.ContainsFunc(together, func(r []*gpu.LayerResult) bool { return r == nil }) {
		t.Fatal("a lease failed beside others")
	}
	for i := range setups {
		same(t, "beside others", alone[i], together[i])
	}
}
