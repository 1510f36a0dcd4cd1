package replay

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/twilight-sidecar/twilight/client"
)

const entryBytes = 4 // of lists and their counts

// listRows is the most list rows of a layer.
func (e *engine) listRows() int { return e.Capture.QueryHeads }

// listBytes is what a layer's lists take, their counts included.
func (e *engine) listBytes() int { return e.listRows() * (e.Capture.Tokens() + 1) * entryBytes }

// describe says where the tensors of armed steps lie.
func (e *engine) describe(ctx context.Context) (err error) {
	c, g := e.Capture, e.session.Geometry()
	if e.lists, err = e.Memory.Lend(ctx, e.session, len(c.Layers)*e.listBytes(), client.ReadWrite); err != nil {
		return err
	}
	query, output := c.QueryHeads*c.KDim*g.Query.Size(), c.QueryHeads*c.VDim*g.Output.Size()
	e.how.Results = true
	for i := range c.Layers {
		lists := i * e.listBytes()
		e.how.Layers = append(e.how.Layers, client.ArmedLayer{
			Layer:  c.Layers[i].Index,
			Query:  client.Tensor{Location: client.Location{Buffer: e.query.Lent(), Offset: i * query}},
			Output: client.Tensor{Location: client.Location{Buffer: e.output.Lent(), Offset: i * output}},
			ListBuffer: &client.ListBuffer{
				Counts:   client.Location{Buffer: e.lists.Lent(), Offset: lists},
				Lists:    client.Location{Buffer: e.lists.Lent(), Offset: lists + e.listRows()*entryBytes},
				Capacity: c.Tokens(),
			},
		})
	}
	if gpu, ok := e.Memory.(GPUMemory); ok {
		return e.describeStreams(ctx, gpu)
	}
	return nil
}

// describeStreams makes a GPU's streams run and release armed steps.
func (e *engine) describeStreams(ctx context.Context, gpu GPUMemory) (err error) {
	if e.words, err = e.Memory.Lend(ctx, e.session, client.WordBytes(len(e.how.Layers)), client.ReadWrite); err != nil {
		return err
	}
	e.how.Words = e.words.Lent()
	if e.how.Release, err = gpu.NewStream(); err != nil {
		return err
	}
	e.stream, err = gpu.NewStream()
	return err
}

// decodeArmed runs a step whose token is in the cache, armed.
func (e *engine) decodeArmed(ctx context.Context, j *judge, step int) error {
	c, g := e.Capture, e.session.Geometry()
	query, output := len(e.query.Bytes())/len(c.Layers), len(e.output.Bytes())/len(c.Layers)
	for i := range c.Layers {
		g.EncodeQuery(e.query.Bytes()[i*query:][:0], c.Layers[i].Q[step*c.QueryHeads*c.KDim:][:c.QueryHeads*c.KDim])
	}
	clear(e.output.Bytes())
	if err := errors.Join(e.query.Push(), e.output.Push()); err != nil {
		return err
	}
	start := time.Now()
	batch := e.batch(c.N+step+1, false)
	batch.Trace = client.TraceOf(ctx)
	armed, err := e.cache.Arm(ctx, batch, e.how)
	if err != nil {
		return err
	}
	run := e.runOnHost
	if e.stream != nil {
		run = e.runOnStream
	}
	if err := run(ctx, armed); err != nil {
		return err
	}
	e.facts.Decode += time.Since(start)
	results, err := armed.Results(ctx)
	if err := errors.Join(err, e.output.Pull(), e.lists.Pull()); err != nil {
		return err
	}
	for i, r := range results {
		if err := e.readLists(i, r); err != nil {
			return err
		}
		if err := j.take(i, r, g.DecodeOutput(nil, e.output.Bytes()[i*output:][:output])); err != nil {
			return err
		}
	}
	return nil
}

func (e *engine) runOnHost(ctx context.Context, a *client.Armed) error {
	for i := range e.how.Layers {
		a.Layer(i).Ready()
		if err := a.Layer(i).Wait(ctx); err != nil {
			return err
		}
	}
	return nil
}

// runOnStream gives the stream all layers at once.
func (e *engine) runOnStream(ctx context.Context, a *client.Armed) error {
	defer context.AfterFunc(ctx, a.Cancel)() // which lets the stream go on
	var given error
	for i := range e.how.Layers {
		if given = errors.Join(a.Layer(i).ReadyOn(e.stream), a.Layer(i).WaitOn(e.stream)); given != nil {
			a.Cancel()
			break
		}
	}
	err := errors.Join(given, e.stream.Synchronize(), e.words.Pull())
	return errors.Join(err, a.Finish(ctx, binary.LittleEndian.Uint32(e.words.Bytes())))
}

// readLists takes a layer's lists from the buffer.
func (e *engine) readLists(layer int, r *client.LayerResult) error {
	counts := e.lists.Bytes()[layer*e.listBytes():][:e.listBytes()]
	lists := counts[e.listRows()*entryBytes:]
	if len(r.Kept) > e.listRows() {
		return fmt.Errorf("the daemon answered %d list rows, at most %d were expected", len(r.Kept), e.listRows())
	}
	for row, kept := range r.Kept {
		if n := binary.LittleEndian.Uint32(counts[row*entryBytes:]); n != kept || int(n) > e.Capture.Tokens() {
			return fmt.Errorf("list row %d has %d tokens, but the daemon counts %d kept", row, n, kept)
		}
		list := lists[row*e.Capture.Tokens()*entryBytes:]
		for i := range kept {
			r.Lists = append(r.Lists, int32(binary.LittleEndian.Uint32(list[i*entryBytes:])))
		}
	}
	return nil
}
