//go:build linux && cgo && cuda

package cuda

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"time"
	"unsafe"

	"gorgonia.org/cu"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
	"github.com/twilight-sidecar/twilight/gpu/cuda/kernels"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
)

const (
	// look is how often watch looks at a step that runs, in milliseconds; the end of one wakes it.
	look = 1
	// attention is how long it then looks without pause, as one parked layer is seldom alone.
	attention = 2 * time.Millisecond
	// stuck is how long a stream may take to do what nothing keeps it from.
	stuck = 10 * time.Second
)

// watch is the goroutine, with a thread of its own, that looks after the armed steps of a cache.
func (a *armer) watch(started chan<- error) {
	runtime.LockOSThread() // never unlocked
	defer close(a.ended)
	device := a.cache.lease.device
	primary, err := device.device.RetainPrimaryCtx()
	if err == nil {
		err = cu.SetCurrentContext(primary)
	}
	started <- drv.Wrap("cuDevicePrimaryCtxRetain", err)
	if err != nil {
		return
	}
	defer func() { _ = device.device.ReleasePrimaryCtx() }()

	var busy time.Time // until when it does not sleep
	for {
		a.mu.Lock()
		var s *armedStep
		if len(a.queue) > 0 {
			s = a.queue[0]
		}
		closed := a.closed
		a.mu.Unlock()
		switch {
		case s == nil && closed:
			return
		case s == nil:
			a.first = 0
			a.signal.Wait(-1)
		default:
			acted, err := a.attend(s)
			if err != nil {
				a.abandon(s, err)
			}
			if acted {
				busy = time.Now().Add(attention)
			} else if time.Now().After(busy) {
				a.signal.Wait(look)
			}
		}
	}
}

// attend does what the first step needs, and tells whether that was anything.
func (a *armer) attend(s *armedStep) (acted bool, err error) {
	now := time.Now()
	if a.first != s.given {
		a.first, a.progress, a.since = s.given, -1, now
	}
	if a.over(s) {
		return true, a.finish(s, nil, len(s.layers))
	}
	if cause := s.cause.Load(); cause != nil {
		return true, a.fail(s, cause)
	}
	if a.hears(kernels.NewsStep) != s.given {
		if now.Sub(a.since) > s.timeout {
			return true, a.fail(s, fault.Newf(fault.Deadline, "armed.step", "was not rung within %v", s.timeout))
		}
		return false, nil
	}
	progress, finished, err := a.reached()
	if err != nil {
		return true, err
	}
	if progress != a.progress {
		a.progress, a.since = progress, now
	}
	if slot := a.hears(kernels.NewsSlot); slot > 0 {
		c := a.cache
		return true, a.fail(s, fault.Newf(fault.OutOfRange, fmt.Sprintf("device.slots.slots[%d]", slot-1),
			"is neither -1 nor in [0, %d)", c.spec.PageSize*c.spec.NumPages))
	}
	if parked := int(a.hears(kernels.NewsParked)); parked > 0 {
		return a.unpark(s, parked-1, finished)
	}
	if now.Sub(a.since) > s.timeout && progress < len(s.layers) {
		return true, a.fail(s, fault.Newf(fault.Deadline, fmt.Sprintf("armed.layers[%d].ready", progress), "was not rung within %v", s.timeout))
	}
	return false, nil
}

// over tells whether the stream is through with a step.
func (a *armer) over(s *armedStep) bool { return int32(a.signal.Count()-s.given) >= 0 }

// reached is how many layers of the step that runs were rung, and how many blocks of their kernels are over.
func (a *armer) reached() (layers int, finished uint32, err error) {
	words := a.news.data[4*(foundAt+1):][:8]
	if err := download(words, a.state.ptr+stateReached, a.help); err != nil {
		return 0, 0, err
	}
	err = a.helped()
	return int(binary.NativeEndian.Uint32(words)), binary.NativeEndian.Uint32(words[4:]), err
}

// helped waits until the stream that helps has done all. It has nothing to wait for.
func (a *armer) helped() error {
	for start := time.Now(); ; {
		if done, err := drv.Done(a.help); done || err != nil {
			return err
		}
		if time.Since(start) > stuck {
			return a.isStuck("a stream that waits for nothing")
		}
	}
}

// isStuck tells of work that can neither end nor be ended.
func (a *armer) isStuck(what string) error {
	err := fault.Newf(fault.Unavailable, "", "the GPU does not get through %s: this worker cannot go on, open a lease anew", what)
	a.cache.lease.device.owner.lost(err)
	return err
}

// unpark does what a layer needs that has parked the stream.
func (a *armer) unpark(s *armedStep, j int, finished uint32) (acted bool, err error) {
	if finished != s.graph.finished[j] {
		return true, nil // its kernels still run
	}
	g := s.graph
	call := &g.calls[j]
	results := s.back.data[g.results.layers[j]:][:call.back.end]
	status := a.news.data[4*(foundAt+1):][:4]
	err = errors.Join(
		download(status, s.status, a.help),
		download(results, g.key.results+uint64(g.results.layers[j]), a.help),
		a.helped())
	if err != nil {
		return true, err
	}
	if binary.NativeEndian.Uint32(status) != 0 {
		return true, a.fail(s, fault.Newf(fault.Cancelled, "armed.status", "the engine gave the step up"))
	}
	bad := binary.NativeEndian.Uint64(results[call.back.badQuery:])
	if bad == 0 {
		bad, err = a.runLayer(s, j)
	}
	var refused *fault.Error
	switch {
	case err != nil && !errors.As(err, &refused):
		return true, err
	case bad != 0:
		errors.As(a.cache.badQuery(^bad), &refused)
	case err == nil:
		return true, a.letGo(s, j)
	}
	errors.As(fault.In(fmt.Sprintf("armed.layers[%d]", j), refused), &refused)
	return true, a.fail(s, refused)
}

// letGo lets the stream go on behind a layer that the host ran.
func (a *armer) letGo(s *armedStep, j int) error {
	g := s.graph
	uint32s(a.news.data)[kernels.NewsParked] = 0
	a.since = time.Now()
	a.ops.Reset()
	if s.batch.rows > 0 && j == len(s.layers)-1 && s.training.level > 0 {
		a.ops.Write(a.state.ptr+stateTrained, uint32(s.training.level))
	}
	a.ops.Write(g.key.image+uint64(g.image.run+4*j), 1)
	a.ops.Write(g.key.image+uint64(g.image.goes+4*j), kernels.Go)
	return a.ops.Run(a.help)
}

// runLayer runs a layer by the lease's stream, and returns what BadQuery holds.
func (a *armer) runLayer(s *armedStep, j int) (bad uint64, err error) {
	c, g := a.cache, s.graph
	l := c.lease
	t := training{}
	if s.batch.rows == 0 {
		t = s.work[j].training
	} else {
		found := a.news.data[4*(foundAt+2):][:16]
		err := errors.Join(
			download(found[:8], g.key.results+uint64(g.results.training), a.help),
			download(found[8:12], a.state.ptr+stateTrained, a.help), a.helped())
		if err != nil {
			return 0, err
		}
		reached := binary.NativeEndian.Uint64(found)
		if level := int(reached >> 32); level > int(binary.NativeEndian.Uint32(found[8:])) {
			t = training{row: int(^uint32(reached)), level: level}
		}
		s.training = t
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	err = l.device.owner.do(context.Background(), func() error {
		retry := errRetry
		if t.level > 0 || !g.calls[j].fused {
			bad, retry = a.runOnce(s, j, t, false)
		}
		if errors.Is(retry, errRetry) {
			s.work[j].chain = true
			bad, retry = a.runOnce(s, j, training{}, true)
		}
		return retry
	})
	return bad, err
}

// runOnce does so on the owner's thread, by the chain of kernels or as planned.
func (a *armer) runOnce(s *armedStep, j int, t training, chain bool) (bad uint64, err error) {
	c, g := a.cache, s.graph
	l, call := c.lease, &c.call
	*call = g.calls[j]
	call.rows, call.training, call.captured = s.rows, t, false
	d := &call.desc
	d.Go, d.Run, d.Finished = 0, 0, 0 // it runs whatever they say
	if chain {
		call.fused = false
	}
	drift := d.DriftFlags
	_, scratch := c.layout()
	if err := l.scratch.reserve(scratch); err != nil {
		return 0, err
	}
	results := g.key.results + uint64(g.results.layers[j])
	call.bind(results, l.scratch.ptr)
	d.DriftFlags = drift
	if err := zero(results, call.back.drift, l.stream); err != nil {
		return 0, err
	}
	if drift != 0 {
		if err := zero(drift, 4*int(d.Works), l.stream); err != nil {
			return 0, err
		}
	}
	*(*kernels.Layer)(l.block.Pointer()) = *d
	checked, trained := c.batch.checked, c.trained[s.layers[j].layer]
	c.batch.checked = true
	err = c.launch(s.layers[j].layer)
	c.batch.checked = checked
	if s.batch.rows == 0 {
		c.trained[s.layers[j].layer] = trained // by what was armed since
	}
	if err != nil {
		return 0, errors.Join(err, l.wait())
	}
	data := s.back.data[g.results.layers[j]:][:call.back.end]
	if err := errors.Join(download(data, results, l.stream), l.wait()); err != nil {
		return 0, err
	}
	if call.fused && call.retries(data, l.geometry.KVHeads) {
		return 0, errRetry
	}
	return binary.NativeEndian.Uint64(data[call.back.badQuery:]), nil
}

// fail fails a step and all behind it.
func (a *armer) fail(s *armedStep, cause *fault.Error) error {
	// The driver itself may not get through.
	defer time.AfterFunc(2*stuck, func() { _ = a.isStuck("the end of an armed step") }).Stop()
	s.cause.CompareAndSwap(nil, cause)
	cause = s.cause.Load()
	a.mu.Lock()
	last := a.queue[len(a.queue)-1]
	a.mu.Unlock()
	begun, err := a.halt(last.given, s)
	if err != nil {
		return err
	}
	if !begun {
		return a.finish(s, cause, 0)
	}
	id := s.id // a step that is over may be armed anew
	j, err := a.await(s)
	if err != nil {
		return err
	}
	if j == len(s.layers) {
		// It was too late to fail it, but those behind it are halted.
		err := a.finish(s, nil, j)
		a.cancelAll(fault.Newf(fault.Cancelled, "", "step %d, which was armed before it, was to fail", id))
		return err
	}

	launches := a.cache.lease.device.kernels.Armed
	block := drv.NewBlock(int(unsafe.Sizeof(kernels.Layer{})))
	defer block.Free()
	tell, poison := drv.NewLaunch(launches.Fail, a.help, 1, drv.Block{}), drv.NewLaunch(launches.Poison, a.help, 128, block)
	defer tell.Free()
	defer poison.Free()
	tell.Set(0, s.status)
	tell.Set(1, uint64(cause.Kind.Code()))
	errs := []error{tell.Run(1, 1)}
	g := s.graph
	for i := j; i < len(s.layers) && g.key.rows > 0; i++ {
		*(*kernels.Layer)(block.Pointer()) = g.calls[i].desc
		errs = append(errs, poison.Run(g.key.rows*a.cache.lease.geometry.QueryHeads, 1))
	}
	a.ops.Reset()
	for i := j; i < len(s.layers); i++ {
		a.ops.Write(s.layers[i].done, 1)
	}
	errs = append(errs, a.ops.Run(a.help), a.helped())
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := a.drain(s, false); err != nil {
		return err
	}
	return a.finish(s, cause, j)
}

// halt makes no layer run that has not begun, of a step and all before it, and tells whether s has begun.
func (a *armer) halt(given uint32, s *armedStep) (begun bool, err error) {
	halt := drv.NewLaunch(a.cache.lease.device.kernels.Armed.Halt, a.help, 1, drv.Block{})
	defer halt.Free()
	halt.Set(0, a.state.ptr+stateGate)
	halt.Set(1, uint64(given))
	halt.Set(2, newsPtr(a)+4*foundAt)
	if err := errors.Join(halt.Run(1, 1), a.helped()); err != nil {
		return false, err
	}
	return a.hears(foundAt) == s.given, nil
}

// await makes the stream park, and returns the layer: all, if the step ends before.
func (a *armer) await(s *armedStep) (int, error) {
	for start := time.Now(); ; {
		if a.over(s) {
			return len(s.layers), nil
		}
		if a.hears(kernels.NewsStep) != s.given {
			return 0, nil // it was halted before it began: no layer runs, and none says so
		}
		if parked := int(a.hears(kernels.NewsParked)); parked > 0 {
			if _, finished, err := a.reached(); err != nil || finished == s.graph.finished[parked-1] {
				return parked - 1, err
			}
		}
		if err := a.ring(s); err != nil {
			return 0, err
		}
		if time.Since(start) > stuck {
			return 0, a.isStuck("an armed step")
		}
		time.Sleep(100 * time.Microsecond)
	}
}

// ring rings all that a step waits for in place of the engine.
func (a *armer) ring(s *armedStep) error {
	a.ops.Reset()
	for i := range s.layers {
		a.ops.Write(s.layers[i].ready, 1)
	}
	return errors.Join(a.ops.Run(a.help), a.helped())
}

// drain makes the stream get through a step that was halted, again and again, since others may write the
// same words. Nobody needs the words that it rings then. begin makes it begin, too.
func (a *armer) drain(s *armedStep, begin bool) error {
	g := s.graph
	for start := time.Now(); !a.over(s); {
		a.ops.Reset()
		if begin {
			a.ops.Write(s.begun, s.id)
		}
		for i := range s.layers {
			a.ops.Write(g.key.image+uint64(g.image.goes+4*i), kernels.Skip)
		}
		if err := errors.Join(a.ops.Run(a.help), a.ring(s)); err != nil {
			return err
		}
		if time.Since(start) > stuck {
			return a.isStuck("an armed step that was halted")
		}
		time.Sleep(50 * time.Microsecond)
	}
	return nil
}

// flush makes the stream get through steps that failed before they began. Engine and watch are quiet; it
// runs on the owner's thread.
func (a *armer) flush() error {
	for a.waiting > 0 {
		s := &a.slots[0]
		for i := range a.slots {
			if a.slots[i].given == a.given-uint32(a.waiting)+1 {
				s = &a.slots[i]
			}
		}
		if _, err := a.halt(s.given, s); err != nil {
			return err
		}
		if err := a.drain(s, true); err != nil {
			return err
		}
		a.mu.Lock()
		a.left(s)
		a.mu.Unlock()
		if err := limbo.leave(); err != nil {
			return err
		}
	}
	return nil
}

// left books that the stream is through with a step. a.mu is held.
func (a *armer) left(s *armedStep) {
	a.waiting--
	s.graph.users--
	s.busy = false
}

// abandon answers all steps when the driver fails.
func (a *armer) abandon(s *armedStep, err error) {
	if sticky(err) {
		a.cache.lease.device.owner.lost(explain(err))
	}
	a.mu.Lock()
	answered := len(a.queue) == 0 || a.queue[0].given != a.first
	a.mu.Unlock()
	if answered {
		return // what failed is to give back what waited for its end
	}
	var cause *fault.Error
	if !errors.As(explain(err), &cause) {
		cause = fault.Newf(fault.Internal, "", "the step failed (%v): report it", err)
	}
	_ = a.finish(s, cause, 0)
}

// finish takes a step out of the queue, with all behind it if it failed, and answers.
func (a *armer) finish(s *armedStep, cause *fault.Error, layers int) error {
	a.answer = gpu.ArmedResult{ID: s.id}
	for len(a.layers) < layers {
		a.layers = append(a.layers, gpu.LayerResult{})
	}
	over := a.over(s)
	if over {
		for j := range layers {
			a.collect(s, j, &a.layers[j])
		}
		a.answer.Layers = a.layers[:layers]
	}
	done, id := s.done, s.id
	if cause == nil {
		a.mu.Lock()
		a.queue = slices.Delete(a.queue, 0, 1)
		a.left(s)
		a.mu.Unlock()
		err := limbo.leave()
		done(&a.answer)
		return err
	}

	a.answer.Err = cause
	type ended struct {
		id   uint32
		done func(*gpu.ArmedResult)
	}
	var behind []ended
	l := a.cache.lease
	l.mu.Lock()
	a.mu.Lock()
	a.lose(s, layers)
	for _, b := range a.queue[1:] {
		a.lose(b, 0)
		behind = append(behind, ended{b.id, b.done})
	}
	a.queue = a.queue[:0]
	if over {
		a.left(s)
	}
	a.mu.Unlock()
	l.mu.Unlock()
	var err error
	if over {
		err = limbo.leave()
	}
	done(&a.answer)
	for _, b := range behind {
		b.done(&gpu.ArmedResult{
			ID: b.id, Err: fault.Newf(fault.Cancelled, "", "step %d, which was armed before it, failed", id),
		})
	}
	return err
}

// collect makes a layer's answer.
func (a *armer) collect(s *armedStep, j int, res *gpu.LayerResult) {
	c, g := a.cache, s.graph
	*res = gpu.LayerResult{
		Candidates: res.Candidates[:0], Kept: res.Kept[:0], Paths: res.Paths[:0], Reasons: res.Reasons[:0],
		Truncated: res.Truncated[:0], Mass: res.Mass[:0], Coverage: res.Coverage[:0],
	}
	call := &a.call
	paths, reasons := call.paths[:0], call.reasons[:0]
	*call = g.calls[j]
	data := s.back.data[g.results.layers[j]:]
	t := training{}
	if s.batch.rows > 0 {
		if j == 0 {
			a.readRows(s)
		}
		res.Index.TokensIndexed = uint64(binary.NativeEndian.Uint32(s.back.data[g.results.indexed:]))
		t = s.training
	} else {
		w := &s.work[j]
		res.Index.TokensIndexed, res.Index.TokensClaimed = w.tokens, w.claimed
		t = w.training
	}
	if s.work[j].chain {
		call.fused = false
	}
	if t.level > 0 {
		res.Index.StatisticsRefreshed = 1
	}
	res.Index.ChunksDrifted = uint64(binary.NativeEndian.Uint32(data[call.back.drifted:]))
	for b := range s.rows {
		path, reason := c.lease.method.path(c.layers[s.layers[j].layer].model, &s.rows[b], s.crossover)
		if s.batch.rows > 0 && int32s(s.back.data[g.results.bad:])[b] != 0 {
			reason = pipeline.BadRow
		}
		paths, reasons = append(paths, path), append(reasons, reason)
	}
	call.rows, call.paths, call.reasons, call.res = s.rows, paths, reasons, res
	c.collectRows(call, data)
}

// readRows takes the rows of a batch that was read on the device.
func (a *armer) readRows(s *armedStep) {
	r := &s.graph.results
	at := func(column, b int) int { return int(int32(binary.NativeEndian.Uint32(s.back.data[column+4*b:]))) }
	s.rows = s.rows[:0]
	for b := range s.batch.rows {
		s.rows = append(s.rows, kv.SeqRow{First: at(r.first, b), Len: at(r.lengths, b)})
	}
}
