//go:build linux && cgo && cuda

package engine

import (
	_ "embed"
	"errors"
	"unsafe"

	"gorgonia.org/cu"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
)

//go:embed load.fatbin
var loadFatbin string

const halfBytes = 2

// Tensors are keys, values and queries in fp16: planes [pages][PageSize][KVHeads][Dim], queries [Sequences]
// [QueryHeads][Dim].
type Tensors struct {
	PageSize, KVHeads, Dim, QueryHeads int
	// Tables hold the page ids of each sequence; together they name every page once.
	Tables [][]int32
}

func (t *Tensors) pages() int { return len(t.Tables) * len(t.Tables[0]) }

// PlaneBytes is what keys take, and values.
func (t *Tensors) PlaneBytes() int { return t.pages() * t.PageSize * t.KVHeads * t.Dim * halfBytes }

// QueryBytes is what queries take.
func (t *Tensors) QueryBytes() int { return len(t.Tables) * t.QueryHeads * t.Dim * halfBytes }

// FillPlanes writes keys and values at two offsets. Both are normal; half of a key's variance is common to
// 16 tokens of a sequence.
func (m *Memory) FillPlanes(t *Tensors, keys, values int, seed uint64) error {
	places := make([]int32, t.pages())
	for s, table := range t.Tables {
		for i, page := range table {
			places[page] = int32(s*len(table) + i)
		}
	}
	return m.gpu.with(places, func(places drv.Ptr) error {
		return m.gpu.launch("load_fill", m.gpu.sms*8, m.at+drv.Ptr(keys), m.at+drv.Ptr(values), places,
			uint64(t.PlaneBytes()/halfBytes), uint64(t.PageSize), uint64(t.KVHeads), uint64(t.Dim), seed)
	})
}

// FillQueries writes queries at an offset. The standard deviation of a row's logits lies between 3.6 and
// 4.5, from 40,000 tokens on between 4 and 4.9; heads of a group share .64 of their variance.
func (m *Memory) FillQueries(t *Tensors, offset int, seed uint64) error {
	return m.gpu.do(func() error {
		l, blocks, err := m.queries(t, offset, seed)
		if err != nil {
			return err
		}
		defer l.Free()
		return l.Run(blocks, 1)
	})
}

// queries is the launch that does so.
func (m *Memory) queries(t *Tensors, offset int, seed uint64) (l drv.Launch, blocks int, err error) {
	low, high := uint64(360), uint64(450)
	if len(t.Tables[0])*t.PageSize >= 40_000 {
		low, high = 400, 490
	}
	n := len(t.Tables) * t.QueryHeads * t.Dim
	l, err = m.gpu.prepare("load_queries", loadThreads, m.at+drv.Ptr(offset),
		uint64(len(t.Tables)), uint64(t.QueryHeads), uint64(t.QueryHeads/t.KVHeads), uint64(t.Dim), low, high, seed)
	return l, (n + loadThreads - 1) / loadThreads, err
}

// Logits are the products of a query head with the keys of all tokens of a sequence, in fp32.
func (m *Memory) Logits(t *Tensors, keys, queries, sequence, head int) ([]float32, error) {
	table := t.Tables[sequence]
	logits := make([]float32, len(table)*t.PageSize)
	k := m.at + drv.Ptr(keys+head/(t.QueryHeads/t.KVHeads)*t.Dim*halfBytes)
	q := m.at + drv.Ptr(queries+(sequence*t.QueryHeads+head)*t.Dim*halfBytes)
	size := int64(4 * len(logits))
	err := m.gpu.with(table, func(table drv.Ptr) error {
		out, err := cu.MemAlloc(size)
		if err != nil {
			return drv.Wrap("cuMemAlloc", err)
		}
		err = m.gpu.launch("load_logits", (len(logits)+loadThreads-1)/loadThreads, k, q, table, drv.Ptr(out),
			uint64(len(logits)), uint64(t.PageSize), uint64(t.KVHeads), uint64(t.Dim))
		if err == nil {
			err = drv.Wrap("cuMemcpyDtoH", cu.MemcpyDtoH(unsafe.Pointer(unsafe.SliceData(logits)), out, size))
		}
		return errors.Join(err, drv.Wrap("cuMemFree", cu.MemFree(out)))
	})
	return logits, err
}

// ReadRate returns the bytes a second at which a kernel that does nothing else reads memory: the best of
// some runs over size bytes.
func (g *GPU) ReadRate(size int) (float64, error) {
	m, err := g.Alloc(gpu.CUDAIPC, size, 0)
	if err != nil {
		return 0, err
	}
	best := 0.0
	err = g.do(func() error {
		for range 5 {
			ms, err := timed(func() error {
				const word = 16
				return g.launchWide("load_read", g.sms*8, 512, m.at, uint64(size/word), m.at)
			})
			if err != nil {
				return err
			}
			best = max(best, float64(size)/ms*1e3)
		}
		return nil
	})
	return best, errors.Join(err, m.Release())
}

// timed returns how many milliseconds of the device f takes.
func timed(f func() error) (ms float64, err error) {
	var events [2]cu.Event
	for i := range events {
		if events[i], err = cu.MakeEvent(cu.DefaultEvent); err != nil {
			return 0, drv.Wrap("cuEventCreate", err)
		}
		defer func() { err = errors.Join(err, drv.Wrap("cuEventDestroy", cu.DestroyEvent(&events[i]))) }()
	}
	if err := events[0].Record(cu.Stream{}); err != nil {
		return 0, drv.Wrap("cuEventRecord", err)
	}
	if err := f(); err != nil {
		return 0, err
	}
	if err := events[1].Record(cu.Stream{}); err != nil {
		return 0, drv.Wrap("cuEventRecord", err)
	}
	if err := events[1].Synchronize(); err != nil {
		return 0, drv.Wrap("cuEventSynchronize", err)
	}
	ms, err = events[0].Elapsed(events[1])
	return ms, drv.Wrap("cuEventElapsedTime", err)
}

// with runs f on a copy of numbers in the device's memory.
func (g *GPU) with(numbers []int32, f func(drv.Ptr) error) error {
	return g.do(func() error {
		size := int64(4 * len(numbers))
		at, err := cu.MemAlloc(size)
		if err != nil {
			return drv.Wrap("cuMemAlloc", err)
		}
		err = drv.Wrap("cuMemcpyHtoD", cu.MemcpyHtoD(at, unsafe.Pointer(unsafe.SliceData(numbers)), size))
		if err == nil {
			err = f(drv.Ptr(at))
		}
		return errors.Join(err, drv.Wrap("cuMemFree", cu.MemFree(at))) // which waits for what was launched
	})
}

const loadThreads = 256

func (g *GPU) launch(name string, blocks int, args ...uint64) error {
	return g.launchWide(name, blocks, loadThreads, args...)
}

func (g *GPU) launchWide(name string, blocks, threads int, args ...uint64) error {
	l, err := g.prepare(name, threads, args...)
	if err != nil {
		return err
	}
	defer l.Free()
	return l.Run(blocks, 1)
}

func (g *GPU) prepare(name string, threads int, args ...uint64) (drv.Launch, error) {
	f, err := g.module.Function(name)
	if err != nil {
		return drv.Launch{}, drv.Wrap("cuModuleGetFunction", err)
	}
	l := drv.NewLaunch(f, cu.Stream{}, threads, drv.Block{})
	for i, a := range args {
		l.Set(i, a)
	}
	return l, nil
}
