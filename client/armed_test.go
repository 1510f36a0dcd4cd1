package client_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"github.com/twilight-sidecar/twilight/client"
)

// armedEngine is an engine that arms its steps.
type armedEngine struct {
	*engine
	queries, outputs *client.Buffer
	how              client.Arming
}

const (
	querySize  = queryHeads * dim * 4
	outputSize = queryHeads * dim * 4
)

func newArmedEngine(t *testing.T, c *client.Client, onState func(client.State, error)) *armedEngine {
	t.Helper()
	e := &armedEngine{engine: newEngine(t, c, onState)}
	e.lend()
	return e
}

// lend makes the buffers that every step uses.
func (e *armedEngine) lend() {
	e.t.Helper()
	var err error
	if e.queries, err = e.session.NewBuffer(e.t.Context(), layers*querySize, client.ReadOnly); err != nil {
		e.t.Fatal(err)
	}
	if e.outputs, err = e.session.NewBuffer(e.t.Context(), layers*outputSize, client.ReadWrite); err != nil {
		e.t.Fatal(err)
	}
	e.how.WaitTimeout = 20 * time.Second
	for i := range layers {
		e.how.Layers = append(e.how.Layers, client.ArmedLayer{
			Layer:  i,
			Query:  client.Tensor{Location: client.Location{Buffer: e.queries, Offset: i * querySize}},
			Output: client.Tensor{Location: client.Location{Buffer: e.outputs, Offset: i * outputSize}},
		})
	}
}

// prefill has tokens indexed.
func (e *armedEngine) prefill(length int) {
	e.t.Helper()
	e.grow(length)
	b := e.batch()
	b.IndexOnly = true
	if _, err := e.cache.Step(e.t.Context(), b); err != nil {
		e.t.Fatal(err)
	}
}

// arm grows by a token and arms a step.
func (e *armedEngine) arm() (*client.Armed, error) {
	e.grow(e.length + 1)
	a, err := e.cache.Arm(e.t.Context(), e.batch(), e.how)
	if err != nil {
		e.length--
	}
	return a, err
}

// ready puts a layer's query in place and rings.
func (e *armedEngine) ready(a *client.Armed, layer int) {
	copy(e.queries.Bytes()[layer*querySize:], e.query(layer))
	a.Layer(layer).Ready()
}

// replay runs the layers of an armed step from a layer on, and returns the outputs of all.
func (e *armedEngine) replay(a *client.Armed, from int) ([]byte, error) {
	for i := from; i < layers; i++ {
		e.ready(a, i)
		if err := a.Layer(i).Wait(e.t.Context()); err != nil {
			return nil, err
		}
	}
	return bytes.Clone(e.outputs.Bytes()), nil
}

// retry decodes the step that follows a failure: the daemon has the last one's length, or nothing.
func (e *armedEngine) retry(t *testing.T, want []byte) {
	t.Helper()
	if err := e.session.WaitLive(t.Context()); err != nil {
		t.Fatal(err)
	}
	e.grow(e.length + 1)
	b := e.batch()
	b.Sequences[0].TruncateTo = e.length - 1
	a, err := e.cache.Arm(t.Context(), b, e.how)
	if err != nil {
		t.Fatal(err)
	}
	got, err := e.replay(a, 0)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("the step after a failure differs from that of an undisturbed engine")
	}
	e.length--
}

// Armed steps, each armed while the one before runs, give the bits that messages give, and results.
func TestArmed(t *testing.T) {
	t.Parallel()
	const from, steps = 250, 30
	want := bits(t, from, steps)
	e := newArmedEngine(t, dial(t, serve(t, "").Target()), nil)
	e.how.Results = true
	e.grow(from)
	next, err := e.arm()
	if err != nil {
		t.Fatal(err)
	}
	for step := range steps {
		a := next
		e.ready(a, 0)
		if err := a.Layer(0).Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		if step%3 > 0 && step < steps-1 { // with its tokens, which are beyond this step's length
			e.length++
			b := e.batch()
			e.length--
			if next, err = e.cache.Arm(t.Context(), b, e.how); err != nil {
				t.Fatal(err)
			}
		}
		got, err := e.replay(a, 1)
		if err != nil || !bytes.Equal(got, want[step]) {
			t.Fatalf("step %d: differs, or failed with %v", step, err)
		}
		results, err := a.Results(t.Context())
		if err != nil || len(results) != layers || len(results[1].Kept) != kvHeads || results[1].Index.TokensIndexed == 0 {
			t.Fatalf("step %d: results %+v, error %v", step, results, err)
		}
		if step%3 > 0 && step < steps-1 {
			e.grow(e.length + 1)
		} else if next, err = e.arm(); err != nil {
			t.Fatal(err)
		}
	}
	next.Cancel()
	if _, err := next.Results(t.Context()); !errors.Is(err, client.ErrCancelled) {
		t.Errorf("a cancelled step: %v", err)
	}
	// And by messages again.
	if _, err := e.cache.Step(t.Context(), e.batch()); err != nil {
		t.Error(err)
	}
	if err := e.cache.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if err := e.session.Close(); err != nil {
		t.Error(err)
	}
}

// A batch that the daemon reads when the step begins gives the bits of the message's.
func TestArmedDeviceBatch(t *testing.T) {
	t.Parallel()
	const from = 100
	want := bits(t, from, 1)[0]
	e := newArmedEngine(t, dial(t, serve(t, "").Target()), nil)
	e.grow(from + 1)
	batch, err := e.session.NewBuffer(t.Context(), 8192, client.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	at := func(offset int) client.Location { return client.Location{Buffer: batch, Offset: offset} }
	e.how.Device = &client.DeviceBatch{
		Rows: 1, Lengths: at(0), Table: at(64), TableStride: len(e.table), Slots: at(4096), NumSlots: e.length, MaxLength: maxTokens,
	}
	a, err := e.cache.Arm(t.Context(), client.Batch{}, e.how)
	if err != nil {
		t.Fatal(err)
	}
	binary.LittleEndian.PutUint32(batch.Bytes(), uint32(e.length))
	for i, page := range e.table {
		binary.LittleEndian.PutUint32(batch.Bytes()[64+4*i:], uint32(page))
	}
	for n := range e.length {
		slot := int(e.table[n/e.layout.PageSize])*e.layout.PageSize + n%e.layout.PageSize
		binary.LittleEndian.PutUint64(batch.Bytes()[4096+8*n:], uint64(slot))
	}
	if got, err := e.replay(a, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("differs, or failed with %v", err)
	}
	if err := e.session.Close(); err != nil {
		t.Error(err)
	}
}

// Whatever ends a step, its waits end by a typed error, and the next step is right.
func TestArmedFailures(t *testing.T) {
	t.Parallel()
	const from = 120
	want := bits(t, from, 1)[0]
	e := newArmedEngine(t, dial(t, serve(t, "").Target()), nil)
	e.grow(from)
	for name, tc := range map[string]struct {
		fail func(a *client.Armed) error
		code client.Code
	}{
		"cancelled before it began": {func(a *client.Armed) error {
			a.Cancel()
			e.ready(a, 0)
			return a.Layer(0).Wait(t.Context())
		}, client.ErrCancelled},
		"cancelled while it waits": {func(a *client.Armed) error {
			time.AfterFunc(10*time.Millisecond, a.Cancel)
			return a.Layer(0).Wait(t.Context())
		}, client.ErrCancelled},
		"cancelled between layers": {func(a *client.Armed) error {
			e.ready(a, 0)
			if err := a.Layer(0).Wait(t.Context()); err != nil {
				return err
			}
			a.Cancel()
			e.ready(a, 1)
			return a.Layer(1).Wait(t.Context())
		}, client.ErrCancelled},
		"a query that is no number": {func(a *client.Armed) error {
			copy(e.queries.Bytes(), bytes.Repeat([]byte{0xff}, querySize))
			a.Layer(0).Ready()
			return a.Layer(0).Wait(t.Context())
		}, client.ErrInvalid},
		"out of order": {func(a *client.Armed) error {
			e.ready(a, 1)
			return a.Layer(1).Wait(t.Context())
		}, client.ErrPrecondition},
		"begun too early": {func(a *client.Armed) error {
			second, err := e.cache.Arm(t.Context(), e.batch(), e.how)
			if err != nil {
				return err
			}
			if _, err := e.cache.Arm(t.Context(), e.batch(), e.how); !errors.Is(err, client.ErrPrecondition) {
				t.Errorf("a third armed step: %v", err)
			}
			e.ready(second, 0)
			err = second.Layer(0).Wait(t.Context())
			a.Cancel()
			return err
		}, client.ErrPrecondition},
	} {
		a, err := e.arm()
		if err != nil {
			t.Fatal(err)
		}
		if err := tc.fail(a); !errors.Is(err, tc.code) {
			t.Errorf("%s: %v, want %v", name, err, tc.code)
		}
		e.length--
		e.retry(t, want)
	}

	// Only a context that ends fails nothing.
	a, err := e.cache.Arm(t.Context(), truncated(e, from), e.how)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
	defer cancel()
	if err := a.Layer(0).Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a wait that was given up: %v", err)
	}
	if got, err := e.replay(a, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("afterwards: differs, or failed with %v", err)
	}

	// Refusals name the field.
	e.how.Layers[1].Output.Buffer = e.kv
	_, err = e.cache.Arm(t.Context(), truncated(e, from), e.how)
	var refused *client.Error
	if !errors.As(err, &refused) || refused.Field != "step.armed.layers[1].output.at" || refused.Code != client.ErrPermission {
		t.Errorf("an output in a read-only buffer: %v", err)
	}
	e.how.Layers[1].Output.Buffer = e.outputs
	if err := e.queries.Close(t.Context()); err != nil {
		t.Errorf("a buffer that no armed step uses any more: %v", err)
	}
	if _, err = e.cache.Arm(t.Context(), truncated(e, from), e.how); !errors.Is(err, client.ErrNotFound) {
		t.Errorf("a query in a buffer that is closed: %v", err)
	}
	if err := e.session.Close(); err != nil {
		t.Error(err)
	}
}

// truncated is the batch of the token behind a length, again.
func truncated(e *armedEngine, length int) client.Batch {
	e.grow(length + 1)
	b := e.batch()
	b.Sequences[0].TruncateTo = length
	e.length = length + 1
	return b
}

// A buffer that an armed step uses is not given back; closing the cache or session ends the wait.
func TestArmedClose(t *testing.T) {
	t.Parallel()
	c := dial(t, serve(t, "").Target())
	for name, end := range map[string]func(e *armedEngine) error{
		"cache":   func(e *armedEngine) error { return e.cache.Close(t.Context()) },
		"session": func(e *armedEngine) error { return e.session.Close() },
	} {
		e := newArmedEngine(t, c, nil)
		e.grow(50)
		a, err := e.arm()
		if err != nil {
			t.Fatal(err)
		}
		if err := e.outputs.Close(t.Context()); !errors.Is(err, client.ErrPrecondition) {
			t.Errorf("%s: a buffer in use was closed: %v", name, err)
		}
		waited := make(chan error)
		go func() { waited <- a.Layer(0).Wait(t.Context()) }()
		time.Sleep(5 * time.Millisecond)
		if err := end(e); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := <-waited; err == nil {
			t.Errorf("%s: the wait ended without an error", name)
		}
		if err := a.Layer(0).Wait(t.Context()); err == nil {
			t.Errorf("%s: a wait afterwards ended without an error", name)
		}
		if err := e.session.Close(); err != nil {
			t.Error(err)
		}
	}
}
