package armed

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func never() bool { return false }

// mapTwice maps a page of shared memory at two addresses, as two processes have it.
func mapTwice(t testing.TB) (a, b []byte) {
	t.Helper()
	fd, err := unix.MemfdCreate("words", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	const size = 4096
	if err := unix.Ftruncate(fd, size); err != nil {
		t.Fatal(err)
	}
	maps := make([][]byte, 2)
	for i := range maps {
		if maps[i], err = unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Munmap(maps[i]) })
	}
	return maps[0], maps[1]
}

// What is written before a ring is seen after the wait, however long either side takes.
func TestAwait(t *testing.T) {
	t.Parallel()
	a, b := mapTwice(t)
	const rounds, there, back, data = 3000, 0, 64, 128
	var pair sync.WaitGroup
	pair.Go(func() {
		for i := range uint32(rounds) {
			if !At(b[there:]).Await(i+1, time.Minute, never) || b[data] != byte(i) {
				t.Errorf("round %d: %d", i, b[data])
			}
			At(b[back:]).Ring(i + 1)
		}
	})
	for i := range uint32(rounds) {
		if i%100 == 0 {
			time.Sleep(time.Millisecond) // the other sleeps by now
		}
		a[data] = byte(i)
		At(a[there:]).Ring(i + 1)
		if !At(a[back:]).Await(i+1, time.Minute, never) {
			t.Errorf("round %d: no answer", i)
		}
	}
	pair.Wait()
}

func TestAwaitEnds(t *testing.T) {
	t.Parallel()
	a, b := mapTwice(t)
	if At(a).Await(1, time.Millisecond, never) {
		t.Error("a word that nobody rang was 1")
	}
	// A wake alone is no ring, but makes a waiter see that it is to stop.
	for range 50 {
		var stop atomic.Bool
		ended := make(chan bool)
		go func() { ended <- At(a).Await(1, time.Minute, stop.Load) }()
		At(b).Wake()
		stop.Store(true)
		At(b).Stop()
		if <-ended {
			t.Error("a word that nobody rang was 1")
		}
	}
	// Memory order within the word: little-endian.
	At(a).Store(0x04030201)
	if b[0] != 1 || b[3] != 4 || At(b).Load() != 0x04030201 {
		t.Errorf("stored as %v", b[:WordBytes])
	}
	At(a).Fail(7)
	At(a).Store(0)
	At(a).Fail(7)
	At(a).Fail(8)
	if got := At(b).Load(); got != 7 {
		t.Errorf("status is %d, want the first failure's", got)
	}
}

func TestAwaitAllocations(t *testing.T) {
	a, _ := mapTwice(t)
	if n := testing.AllocsPerRun(20, func() { At(a).Await(1, time.Millisecond, never); At(a[8:]).Ring(1) }); n != 0 {
		t.Errorf("%v allocations, want none", n)
	}
}

func BenchmarkRoundTrip(b *testing.B) {
	x, y := mapTwice(b)
	go func() {
		for i := uint32(1); At(y).Await(i, time.Minute, never); i++ {
			if At(y[64:]).Ring(i); int(i) >= b.N {
				return
			}
		}
	}()
	for i := range b.N {
		At(x).Ring(uint32(i + 1))
		At(x[64:]).Await(uint32(i+1), time.Minute, never)
	}
}
