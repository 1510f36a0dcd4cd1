package client_test

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/twilight-sidecar/twilight/client"
	words "github.com/twilight-sidecar/twilight/internal/armed"
)

// gpuStream does what it is given in order, as a GPU's does, on shared memory.
type gpuStream struct{ work chan func() }

func newGPUStream(t *testing.T) *gpuStream {
	s := &gpuStream{make(chan func(), 1024)}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for f := range s.work {
			f()
		}
	}()
	t.Cleanup(func() {
		close(s.work)
		<-ended
	})
	return s
}

func (s *gpuStream) Words(b *client.Buffer, all []client.Word) error {
	for _, w := range all {
		word := words.At(b.Bytes()[w.Offset:])
		if w.Wait {
			s.work <- func() { word.Await(w.Value, time.Minute, func() bool { return false }) }
		} else {
			s.work <- func() { word.Ring(w.Value) }
		}
	}
	return nil
}

func (s *gpuStream) Synchronize() error {
	done := make(chan struct{})
	s.work <- func() { close(done) }
	<-done
	return nil
}

// synchronize fails the test if the stream waits for ever.
func (s *gpuStream) synchronize(t *testing.T) {
	t.Helper()
	done := make(chan struct{})
	s.work <- func() { close(done) }
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatal("the stream waits without end")
	}
}

// onStream makes an engine's steps run on a stream.
func (e *armedEngine) onStream() *gpuStream {
	e.t.Helper()
	var err error
	if e.how.Words, err = e.session.NewBuffer(e.t.Context(), client.WordBytes(layers), client.ReadWrite); err != nil {
		e.t.Fatal(err)
	}
	s := newGPUStream(e.t)
	e.how.Release = newGPUStream(e.t)
	return s
}

// give gives a stream the layers of a step up to one.
func (e *armedEngine) give(s *gpuStream, a *client.Armed, until int) error {
	for i := range until {
		query := e.query(i)
		s.work <- func() { copy(e.queries.Bytes()[i*querySize:], query) }
		if err := errors.Join(a.Layer(i).ReadyOn(s), a.Layer(i).WaitOn(s)); err != nil {
			return err
		}
	}
	return nil
}

func (e *armedEngine) status() uint32 { return words.At(e.how.Words.Bytes()).Load() }

// Steps whose words a stream rings and waits for give the bits that messages give.
func TestArmedOnStream(t *testing.T) {
	t.Parallel()
	const from, steps = 250, 10
	want := bits(t, from, steps)
	e := newArmedEngine(t, dial(t, serve(t, "").Target()), nil)
	s := e.onStream()
	e.grow(from)
	for step := range steps {
		a, err := e.arm()
		if err != nil {
			t.Fatal(err)
		}
		if err := e.give(s, a, layers); err != nil {
			t.Fatal(err)
		}
		s.synchronize(t)
		got := bytes.Clone(e.outputs.Bytes())
		if err := a.Finish(t.Context(), e.status()); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want[step]) {
			t.Fatalf("step %d differs from that by messages", step)
		}
	}
}

// A stream gets through a step that fails, whoever fails it, and the step is not used.
func TestArmedOnStreamFailures(t *testing.T) {
	t.Parallel()
	c := dial(t, serve(t, "").Target())
	e := newArmedEngine(t, c, nil)
	s := e.onStream()
	e.prefill(250)
	testStreamFailure(t, e, s, "cancelled", time.Minute, (*client.Armed).Cancel, client.ErrCancelled)
	testStreamFailure(t, e, s, "overdue", 50*time.Millisecond, func(*client.Armed) {}, client.ErrDeadline)
	testStreamFailure(t, e, s, "connection gone", time.Minute, func(*client.Armed) { c.Close() }, client.ErrLeaseLost)
}

func testStreamFailure(t *testing.T, e *armedEngine, s *gpuStream, name string, timeout time.Duration, fail func(*client.Armed), code client.Code) {
	t.Helper()
	e.how.WaitTimeout = timeout
	a, err := e.arm()
	if err != nil {
		t.Fatal(err)
	}
	if err := e.give(s, a, 1); err != nil {
		t.Fatal(err)
	}
	// The stream waits for a layer that it has not rung.
	if err := a.Layer(1).WaitOn(s); err != nil {
		t.Fatal(err)
	}
	fail(a)
	s.synchronize(t)
	if err := a.Finish(t.Context(), e.status()); !errors.Is(err, code) {
		t.Errorf("%s: %v, want %v", name, err, code)
	}
	e.length--
}
