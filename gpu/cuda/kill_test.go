//go:build linux && cgo && cuda

package cuda

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"gorgonia.org/cu"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
	"github.com/twilight-sidecar/twilight/internal/fault"
)

var kills = flag.Int("kills", 3, "how often TestEngineKilled kills an engine in each state")

// TestEngineKilled kills engines in the middle of armed steps, beside one that works and must not notice. A
// lease whose engine died ends at once, and gives the GPU's memory back.
func TestEngineKilled(t *testing.T) {
	d := newDevice(t)
	beside := newMeeting(t, d, nil, meetingGeometry(4), gpu.CUDAIPC, 1, 512, 1<<14)
	beside.messages(6)
	for _, kind := range []gpu.RegionKind{gpu.CUDAIPC, gpu.SharedMemory} {
		for _, state := range []struct {
			name  string
			until int // layers rung
			begin bool
		}{{"idle", 0, false}, {"waiting", 1, true}, {"late in the step", 7, true}} {
			var worst, returned time.Duration
			for i := range 1 + *kills {
				process, err := spawnEngine()
				if err != nil {
					t.Fatal(err)
				}
				before := free(t, d)
				m := newMeeting(t, d, process, meetingGeometry(8), kind, 1, 2048, 256)
				m.messages(6)
				m.pipelined(3, false)
				m.arm()
				if state.begin {
					req := m.request
					req.Replay.Step, req.Replay.Until, req.Replay.Eager = m.armed.ID, state.until, true
					go func() { _ = process.enc.Encode(&req) }() // it is not answered
				}
				beside.pipelined(3, false)
				time.Sleep(time.Duration(rand.IntN(3000)) * time.Microsecond) //nolint:gosec // any time
				if err := process.cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
				_ = process.cmd.Wait()
				start := time.Now()
				m.close()
				closed := time.Since(start)
				if err := <-m.ended; !isKind(err, fault.Unavailable) {
					t.Errorf("%s: the step ended with %v", state.name, err)
				}
				if i == 0 {
					continue // what this process keeps for later is not there yet
				}
				for free(t, d) < before && time.Since(start) < 5*time.Second {
					time.Sleep(time.Millisecond)
				}
				if after := free(t, d); after < before {
					t.Errorf("%s: %d bytes are not given back", state.name, before-after)
				}
				worst, returned = max(worst, closed), max(returned, time.Since(start))
				beside.pipelined(3, false)
			}
			fmt.Printf("engine killed, words in %v, %s: %d times; lease closed within %v, memory back within %v\n",
				kind, state.name, *kills, worst.Round(100*time.Microsecond), returned.Round(100*time.Microsecond))
		}
	}
}

func isKind(err error, kind fault.Kind) bool {
	f, ok := err.(*fault.Error) //nolint:errorlint // as it is
	return ok && f.Kind == kind
}

// free is how much memory the GPU has left.
func free(t *testing.T, d *Device) (bytes int64) {
	t.Helper()
	err := d.owner.do(context.Background(), func() (err error) {
		bytes, _, err = cu.MemInfo()
		return drv.Wrap("cuMemGetInfo", err)
	})
	if err != nil {
		t.Fatal(err)
	}
	return bytes
}
