package bench

import (
	"cmp"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/viterin/vek/vek32"

	"github.com/twilight-sidecar/twilight/internal/simd"
)

// Machine is what runs the bench.
type Machine struct {
	CPU    string `json:"cpu"`
	Cores  int    `json:"cores"`
	Kernel string `json:"kernel"`
	// CacheBytes is the size of the last cache, 0 if unknown. A virtual machine shares it with others.
	CacheBytes uint64 `json:"cache_bytes"`
	// Load is the load average of the last minute, "" if unknown.
	Load string `json:"load"`
}

// ThisMachine describes the machine, whose processor has a name.
func ThisMachine(cpu string) Machine {
	m := Machine{CPU: cpu, Cores: runtime.NumCPU(), Kernel: cmp.Or(simd.Instructions(), "plain Go")}
	if load, err := os.ReadFile("/proc/loadavg"); err == nil {
		m.Load, _, _ = strings.Cut(string(load), " ")
	}
	// The kernel counts caches up from the first.
	for i := 0; ; i++ {
		size, err := os.ReadFile(fmt.Sprintf("/sys/devices/system/cpu/cpu0/cache/index%d/size", i))
		if err != nil {
			return m
		}
		var kib uint64
		if _, err := fmt.Sscanf(string(size), "%dK", &kib); err == nil {
			m.CacheBytes = kib * 1024
		}
	}
}

// together runs f once for each of n numbers, on as many goroutines as workers, and returns how long that
// took.
func together(workers, n int, f func(i int)) time.Duration {
	var next atomic.Int64
	var running sync.WaitGroup
	start := time.Now()
	for range workers {
		running.Go(func() {
			for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
				f(int(i))
			}
		})
	}
	running.Wait()
	return time.Since(start)
}

// sink keeps results, lest they be not computed.
var sink atomic.Uint64

// read returns the bytes a second at which workers read memory from one end to the other.
func read(workers int, memory []byte) float64 {
	const piece = 1 << 18
	took := together(workers, len(memory)/piece, func(i int) {
		floats := unsafe.Slice((*float32)(unsafe.Pointer(&memory[i*piece])), piece/4)
		sink.Store(uint64(vek32.Sum(floats)))
	})
	return float64(len(memory)/piece*piece) / took.Seconds()
}

// multiply returns the operations a second of workers that multiply fp32 vectors, which the first cache
// holds, by four queries each: the fastest that there is here.
func multiply(workers int) float64 {
	const dim, vectors, heads, rounds, pieces = 128, 32, 4, 100, 40
	took := together(workers, pieces, func(int) {
		row := make([]byte, dim*4)
		out, queries, rows := make([][]float32, heads), make([][]float32, heads), make([][]byte, vectors)
		for h := range heads {
			out[h], queries[h] = make([]float32, vectors), make([]float32, dim)
		}
		for i := range rows {
			rows[i] = row
		}
		for range rounds {
			simd.Dots(simd.F32, out, 0, queries, rows, vectors)
		}
		sink.Store(uint64(out[0][0]))
	})
	return 2 * dim * vectors * heads * rounds * pieces / took.Seconds()
}
