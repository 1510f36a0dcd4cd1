package host

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/viterin/vek/vek32"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

func TestPoolRunsEachTaskOnce(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		p := newPool(rapid.IntRange(1, 5).Draw(t, "workers"))
		defer p.close()
		var owners sync.WaitGroup
		for range rapid.IntRange(1, 4).Draw(t, "owners") {
			sizes := rapid.SliceOfN(rapid.IntRange(0, 200), 1, 5).Draw(t, "sizes")
			owners.Go(func() {
				j := newJob()
				for _, n := range sizes {
					runs := make([]atomic.Int32, n)
					if err := p.do(context.Background(), j, n, func(_, i int) error {
						runs[i].Add(1)
						return nil
					}); err != nil {
						t.Errorf("do: %v", err)
					}
					for i := range runs {
						if got := runs[i].Load(); got != 1 {
							t.Errorf("task %d ran %d times", i, got)
						}
					}
				}
			})
		}
		owners.Wait()
	})
}

func TestPoolReturnsTheLowestError(t *testing.T) {
	t.Parallel()
	p := newPool(4)
	defer p.close()
	j := newJob()
	for range 200 {
		err := p.do(t.Context(), j, 100, func(_, i int) error {
			switch {
			case i == 17:
				time.Sleep(20 * time.Microsecond) // so that later ones fail first
				return errors.New("17")
			case i > 17:
				return fmt.Errorf("%d", i)
			}
			return nil
		})
		if err == nil || err.Error() != "17" {
			t.Fatalf("error %v, want that of task 17", err)
		}
	}
}

func TestPoolCancels(t *testing.T) {
	t.Parallel()
	p := newPool(2)
	defer p.close()
	j := newJob()
	ctx, cancel := context.WithCancel(t.Context())
	var ran atomic.Int32
	err := p.do(ctx, j, 1000, func(_, i int) error {
		if i == 3 {
			cancel()
		}
		if i >= 3 { // else the other worker could be done with all before the owner says so
			<-ctx.Done()
			for !j.stop.Load() {
				time.Sleep(time.Millisecond)
			}
		}
		ran.Add(1)
		return nil
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want %v", err, context.Canceled)
	}
	if ran.Load() == 1000 {
		t.Error("all tasks ran")
	}
	if err := p.do(t.Context(), j, 10, func(_, _ int) error { return nil }); err != nil {
		t.Errorf("after a cancelled run: %v", err)
	}
}

// A worker at a long job must turn to another that waits, before the long one is done.
func TestPoolTakesTurns(t *testing.T) {
	t.Parallel()
	p := newPool(1)
	defer p.close()
	var short atomic.Bool
	var owners sync.WaitGroup
	started := make(chan struct{})
	owners.Go(func() {
		if err := p.do(t.Context(), newJob(), 2, func(_, i int) error {
			if i == 1 {
				if !short.Load() {
					return errors.New("the short job had to wait for the long one")
				}
				return nil
			}
			close(started)
			for waiting := 0; waiting < 2; time.Sleep(2 * turn) {
				p.mu.Lock()
				waiting = len(p.jobs)
				p.mu.Unlock()
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	})
	<-started
	if err := p.do(t.Context(), newJob(), 1, func(_, _ int) error {
		short.Store(true)
		return nil
	}); err != nil {
		t.Error(err)
	}
	owners.Wait()
}

func TestPoolIsClosed(t *testing.T) {
	t.Parallel()
	p := newPool(2)
	p.close()
	if err := p.do(t.Context(), newJob(), 1, func(_, _ int) error { return nil }); !errors.Is(err, errClosed) {
		t.Errorf("error %v, want %v", err, errClosed)
	}
}

func TestPoolSurvivesPanics(t *testing.T) {
	t.Parallel()
	p := newPool(2)
	defer p.close()
	err := p.do(t.Context(), newJob(), 10, func(_, i int) error {
		if i == 4 {
			panic("four")
		}
		return nil
	})
	var c *crash
	if !errors.As(err, &c) || c.value != "four" || c.address != 0 || len(c.stack) == 0 {
		t.Errorf("error %#v, want the panic of task 4", err)
	}
}

// A fault on memory whose file was cut short is an error with the address, whatever code meets it:
// compiled Go, the runtime's assembly, a library's.
func TestPoolSurvivesFaults(t *testing.T) {
	t.Parallel()
	p := newPool(2)
	defer p.close()
	const size = 1 << 16
	lent := truncated(t, size)
	var own [2][]float32 // by worker
	for worker := range own {
		own[worker] = make([]float32, size/4)
	}
	lost := floatsOf(lent)
	for name, touch := range map[string]func(own []float32){
		"load":     func(own []float32) { own[0] = lost[100] },
		"store":    func([]float32) { lost[100] = 1 },
		"copy":     func(own []float32) { copy(own, lost) },
		"copy to":  func(own []float32) { copy(lost, own) },
		"clear":    func([]float32) { clear(lost) },
		"vek read": func(own []float32) { own[0] = vek32.Dot(own, lost) },
		"vek write": func(own []float32) {
			vek32.MulNumber_Into(lost, own, 2)
		},
	} {
		for range 20 {
			err := p.do(t.Context(), newJob(), 8, func(worker, _ int) error {
				touch(own[worker])
				return nil
			})
			var c *crash
			if !errors.As(err, &c) || !(extent{memory: &memory{data: lent}, to: size}).holds(c.address) {
				t.Fatalf("%s: error %v, want a fault in the mapping", name, err)
			}
		}
		var c *crash
		if err := guard(func() error { touch(own[0]); return nil }); !errors.As(err, &c) || c.address == 0 {
			t.Errorf("%s, guarded: error %v, want a fault", name, err)
		}
	}
}

// truncated maps a file of size bytes that is empty by now.
func truncated(t *testing.T, size int) []byte {
	t.Helper()
	fd, err := unix.MemfdCreate("host-test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		t.Fatal(err)
	}
	data, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Munmap(data); err != nil {
			t.Error(err)
		}
	})
	if err := unix.Ftruncate(fd, 0); err != nil {
		t.Fatal(err)
	}
	return data
}
