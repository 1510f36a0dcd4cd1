package simd

import (
	"fmt"
	"os"
	"runtime/debug"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fenced returns a page between two that cannot be read.
func fenced(t *testing.T) []byte {
	t.Helper()
	page := os.Getpagesize()
	mapped, err := unix.Mmap(-1, 0, 3*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(mapped) })
	for _, part := range [][]byte{mapped[:page], mapped[2*page:]} {
		if err := unix.Mprotect(part, unix.PROT_NONE); err != nil {
			t.Fatal(err)
		}
	}
	return mapped[page : 2*page]
}

// TestReadsNothingElse runs the kernels on vectors that start behind an unmapped page, and on vectors that
// end before one.
func TestReadsNothingElse(t *testing.T) {
	t.Parallel()
	page := fenced(t)
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true)) // to tell where it failed
	for dim := 1; dim <= 130; dim++ {
		for _, typ := range types {
			size := typ.Bytes(dim)
			first, last := page[:size:size], page[len(page)-size:]
			run(typ, [][]byte{first, last, first, last, last}, dim)
		}
		for _, bits := range []int{2, 4, 8} {
			for _, heads := range []int{1, 4} {
				q := NewCodeQueries(bits, make([]float32, heads*dim), make([]float32, heads))
				size := 3 * CodeBytes(bits, dim)
				for _, codes := range [][]byte{page[:size], page[len(page)-size:]} {
					q.Dots(sevens(heads, 3), 0, codes, make([]float32, 6), codes)
				}
			}
		}
	}
}

// run runs all kernels of a type.
func run(typ Type, vectors [][]byte, dim int) {
	for _, heads := range []int{1, 4} {
		Dots(typ, sevens(heads, len(vectors)), 0, sevens(heads, dim), vectors, len(vectors))
		Add(typ, sevens(heads, dim), sevens(heads, len(vectors)), 0, vectors, len(vectors))
	}
	Decode(typ, make([]float32, dim), vectors[0])
}

// TestFaultsPanic takes the memory away under the kernels.
func TestFaultsPanic(t *testing.T) {
	t.Parallel()
	fd, err := unix.MemfdCreate("simd", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	page := os.Getpagesize()
	if err := unix.Ftruncate(fd, int64(2*page)); err != nil {
		t.Fatal(err)
	}
	mapped, err := unix.Mmap(fd, 0, 2*page, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(mapped) }()
	if err := unix.Ftruncate(fd, int64(page)); err != nil {
		t.Fatal(err)
	}
	base := uintptr(unsafe.Pointer(&mapped[0]))
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	fault := func(f func()) (address uintptr) {
		defer func() {
			if e, ok := recover().(interface{ Addr() uintptr }); ok {
				address = e.Addr() - base
			}
		}()
		f()
		return 0
	}
	const dim = 64
	for _, typ := range types {
		// The last vector reaches into the page that is gone.
		size := typ.Bytes(dim)
		there, gone := mapped[:size:size], mapped[page-size/2:][:size:size]
		vectors := [][]byte{there, there, there, gone}
		for _, heads := range []int{1, 4} {
			out, queries, sums := sevens(heads, 4), sevens(heads, dim), sevens(heads, dim)
			kernels := map[string]func(){
				"dots":   func() { Dots(typ, out, 0, queries, vectors, 4) },
				"decode": func() { Decode(typ, queries[0], gone) },
				"add":    func() { Add(typ, sums, out, 0, vectors, 4) },
			}
			for name, f := range kernels {
				if at := fault(f); at < uintptr(page) || at >= uintptr(page+size) {
					t.Errorf("%v, %d heads, %s: the fault is at %#x, want %#x", typ, heads, name, at, page)
				}
			}
			// What is only asked of memory may be gone.
			Dots(typ, out, 0, queries, vectors, 3)
			if want := fmt.Sprint(out[0][:3]); want != fmt.Sprint(out[heads-1][:3]) {
				t.Errorf("%v: heads alike give %v and %v", typ, out[0], out[heads-1])
			}
		}
	}
}
