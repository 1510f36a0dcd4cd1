package client

import (
	"context"
	"time"

	"github.com/twilight-sidecar/twilight/internal/armed"
)

// Stream is work that the engine's GPU does in order. The SDK makes no calls of a GPU's driver: the engine
// implements it, as by cuStreamWriteValue32 and cuStreamWaitValue32.
type Stream interface {
	// Words gives the stream words of a buffer to write, each behind all that the stream was given before,
	// and to wait for until they have their value, in order. It does not wait for that.
	Words(b *Buffer, words []Word) error
}

// Releaser is a stream that never waits for a word.
type Releaser interface {
	Stream
	// Synchronize waits until the stream has done everything.
	Synchronize() error
}

// Word is a 32-bit word of a buffer that a stream writes or waits for.
type Word struct {
	Offset int // in bytes, a multiple of 4
	Value  uint32
	Wait   bool
}

// WordBytes is the size of the words by which so many layers meet the daemon: status, ready of each layer,
// done of each layer, then step, as proto/twilight/v1/ARMED.md says.
func WordBytes(layers int) int { return (2 + 2*layers) * armed.WordBytes }

// releaseEvery is how often a stream is released that nobody else releases.
const releaseEvery = time.Millisecond

// Number is what the word step holds in this step, which a captured graph copies there.
func (a *Armed) Number() uint32 { return uint32(a.id) }

// ReadyOn lets a stream tell the daemon, behind what it was given before, that the layer's query and its
// tokens' K and V are in place. The first layer's begins the step: the stream must have taken the status of
// the step before.
func (w LayerWords) ReadyOn(s Stream) error {
	if err := w.armed.beginOn(s); err != nil {
		return err
	}
	return s.Words(w.armed.words.buffer, []Word{{Offset: w.armed.words.offset(1 + w.layer), Value: 1}})
}

// WaitOn makes a stream wait until the layer's output is in place. Layers are waited for in order. The
// output may be used only if Finish says so.
//
// The stream goes on without the daemon's help: when the lease is lost, and at the latest after
// Arming.WaitTimeout from the step's beginning.
func (w LayerWords) WaitOn(s Stream) error {
	a := w.armed
	if err := a.beginOn(s); err != nil {
		return err
	}
	if w.layer != a.next {
		a.fail(errorf(ErrPrecondition, "", "layer %d of the step is waited for, layer %d is next", w.layer, a.next), true)
		return a.failure.Load()
	}
	a.next++
	return s.Words(a.words.buffer, []Word{{Offset: a.words.offset(1 + a.words.layers + w.layer), Value: 1, Wait: true}})
}

// Begun says that a replay of a captured graph, which begins the step by itself, was given to its stream.
// It ends with Finish as others do.
func (a *Armed) Begun() error {
	if a.release == nil {
		return errorf(ErrPrecondition, "", "the step was armed without Arming.Words and Release, so no stream can run it")
	}
	if !a.begun {
		a.begun = true
		a.overdue = time.AfterFunc(a.timeout, func() {
			a.fail(errorf(ErrDeadline, "", "the step was not over within %v", a.timeout), true)
		})
		a.given.Store(true)
	}
	if a.stopped() {
		a.startRelease()
		return a.failure.Load()
	}
	return nil
}

// beginOn begins the step unless it has begun.
func (a *Armed) beginOn(s Stream) error {
	begins := !a.begun
	if begins && a.stopped() {
		return a.failure.Load()
	}
	if err := a.Begun(); err != nil || !begins {
		return err
	}
	words := make([]Word, 0, 2+2*a.words.layers)
	for i := range 1 + 2*a.words.layers {
		words = append(words, Word{Offset: a.words.offset(i)})
	}
	return s.Words(a.words.buffer, append(words, Word{Offset: a.words.offset(1 + 2*a.words.layers), Value: a.Number()}))
}

// Finish ends a step that a stream ran, once the stream is through with it. status is the word at the start
// of Arming.Words, which the stream copied behind the last layer. Without an error the step's outputs may be
// used; with one, none may.
func (a *Armed) Finish(ctx context.Context, status uint32) error {
	a.over.Store(true)
	if a.overdue != nil {
		a.overdue.Stop()
	}
	if status != 0 && a.failure.Load() == nil {
		a.awaitReason(ctx)
		a.fail(&Error{Code: Code(status), Message: "the step failed"}, true)
	}
	a.finishOnce.Do(func() { close(a.finished) })
	a.releaseOnce.Do(func() { close(a.released) })
	<-a.released // or the next step would be released with this one
	if e := a.failure.Load(); e != nil {
		return e
	}
	return nil
}

// startRelease lets the engine's stream get through a step that failed, until Finish.
func (a *Armed) startRelease() {
	if a.release == nil || !a.given.Load() || a.over.Load() {
		return
	}
	a.releaseOnce.Do(func() { go a.keepReleasing(uint32(a.failure.Load().Code)) })
}

func (a *Armed) keepReleasing(code uint32) {
	defer close(a.released)
	ticker := time.NewTicker(releaseEvery)
	defer ticker.Stop()
	words := []Word{{Offset: a.words.offset(0), Value: code}}
	for i := range a.words.layers {
		words = append(words, Word{Offset: a.words.offset(1 + a.words.layers + i), Value: 1})
	}
	for {
		// Errors mean that the engine's GPU is lost, which it learns by itself.
		_ = a.release.Words(a.words.buffer, words)
		_ = a.release.Synchronize()
		select {
		case <-a.finished:
			return
		case <-a.cache.session.over:
			return
		case <-ticker.C:
		}
	}
}
