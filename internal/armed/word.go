package armed

import (
	"encoding/binary"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// WordBytes is the size of a word, and its alignment.
const WordBytes = 4

// slice is how long a wait sleeps without looking again, should a wake be lost.
const slice = time.Second

// spins is how often a wait looks before it sleeps: some microseconds, less than it takes to wake.
const spins = 1 << 11

// Word is a 32-bit word in memory that processes share. It is little-endian there.
type Word struct{ v atomic.Uint32 }

// At is the word at the start of data, which must be aligned to WordBytes and have as many.
func At(data []byte) *Word {
	_ = data[WordBytes-1]
	return (*Word)(unsafe.Pointer(unsafe.SliceData(data)))
}

// Load reads the word. What was written before its value was rung is then seen.
func (w *Word) Load() uint32 { return little(w.v.Load()) }

// Store writes the word and wakes nobody.
func (w *Word) Store(v uint32) { w.v.Store(little(v)) }

// Fail writes v if the word is 0: the first failure is the one that is told.
func (w *Word) Fail(v uint32) { w.v.CompareAndSwap(0, little(v)) }

// Ring writes the word, behind all that was written before, and wakes who waits for it.
func (w *Word) Ring(v uint32) {
	w.Store(v)
	w.Wake()
}

// Await waits until the word is v and tells whether it is: not if timeout passed or, at a look, stopped
// said so. Stop makes it look.
func (w *Word) Await(v uint32, timeout time.Duration, stopped func() bool) bool {
	for range spins {
		if w.Load() == v {
			return true
		}
	}
	for start := time.Now(); ; {
		now := w.Load()
		if now == v {
			return true
		}
		left := timeout - time.Since(start)
		if left <= 0 || stopped() {
			return false
		}
		w.sleep(now, min(left, slice))
	}
}

// The futex operations, those that reach other processes.
const (
	futexWait = 0
	futexWake = 1
)

// Stop makes a waiter look whose stopped has just become true. It need not be there any more.
func (w *Word) Stop() {
	w.Wake()
	// It may have looked just before, and be about to sleep.
	time.AfterFunc(time.Millisecond, w.Wake)
	time.AfterFunc(20*time.Millisecond, w.Wake)
}

// Wake makes all waiters look.
func (w *Word) Wake() {
	const all = 1<<31 - 1
	_, _, _ = unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(w)), futexWake, all, 0, 0, 0)
}

// sleep waits until the word is woken, if it is still v.
func (w *Word) sleep(v uint32, d time.Duration) {
	t := unix.NsecToTimespec(int64(d))
	// However it returns, the caller looks again.
	_, _, _ = unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(w)), futexWait, uintptr(little(v)),
		uintptr(unsafe.Pointer(&t)), 0, 0)
}

// little turns a word of this machine into one of the memory, and back.
func little(v uint32) uint32 {
	var b [WordBytes]byte
	binary.LittleEndian.PutUint32(b[:], v)
	return binary.NativeEndian.Uint32(b[:])
}
