package client

import (
	"context"

	"go.opentelemetry.io/otel/propagation"

	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

// Batch is one decode iteration, or with IndexOnly a prefill.
type Batch struct {
	Sequences []Sequence
	// Ended are sequences that are over. An id may end and start anew in one step.
	Ended []uint64
	// Slots, if not nil, are exactly the token slots (page*PageSize + offset) written since the last step,
	// -1 for padding; writing offset 0 of a page restarts the page. They take the place of the rule that
	// a sequence's new tokens are those beyond its last length. PageSize must be a multiple of 16.
	Slots []int64
	// IndexOnly indexes what is new in all layers now; no Layer follows.
	IndexOnly bool
	Trace     Trace
}

// Sequence is a row of a batch. Positions count from the table's start, left padding included.
type Sequence struct {
	// ID is the engine's name for the sequence, at least 1. With Slots all rows of a batch may have 0.
	ID uint64
	// Len is the tokens in the cache, this step's included; 0 computes nothing for the row.
	Len int
	// First is the position of the first real token.
	First int
	// Table holds the page ids of the whole sequence, in each step; pages beyond Len are ignored. The
	// SDK sends what changed.
	Table []int32
	// VTable, if not nil, holds the page ids of V where they differ.
	VTable []int32
	// UnchangedPrefix claims that the first n tokens are as the daemon last indexed them under these
	// pages, a prefix-cache hit: what it has of them is kept. PrefixOf is the sequence they were indexed
	// for, needed where PageSize is not a multiple of 16; 0 means this one.
	UnchangedPrefix int
	PrefixOf        uint64
	// TruncateTo, if > 0, first takes back all tokens from this position on. To take back all, end the
	// sequence.
	TruncateTo int
}

// Trace is the W3C trace context of the engine's step.
type Trace struct{ Parent, State string } // the headers traceparent and tracestate

// TraceOf is the trace context of the OpenTelemetry span that ctx stands in, zero if there is none.
func TraceOf(ctx context.Context) Trace {
	headers := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(ctx, headers)
	return Trace{Parent: headers["traceparent"], State: headers["tracestate"]}
}

// IndexStats counts what indexing did, tokens once per layer.
type IndexStats struct {
	TokensIndexed uint64 // read and written to the shadow
	TokensClaimed uint64 // kept from being indexed again by claims
	ChunksDrifted uint64 // chunks whose keys stray far from what equalisation was frozen on
	Retrainings   uint32 // times that a layer's statistics were refreshed and its shadow rebuilt
}

func indexStats(m *twilightv1.IndexStats) IndexStats {
	return IndexStats{
		TokensIndexed: m.GetTokensIndexed(),
		TokensClaimed: m.GetTokensClaimed(),
		ChunksDrifted: m.GetChunksDrifted(),
		Retrainings:   m.GetStatisticsRefreshed(),
	}
}

// Step is the current step of a cache, until the next one.
type Step struct {
	// Index tells what an IndexOnly step indexed.
	Index IndexStats

	cache *Cache
	lease *lease
	id    uint64
}

// Step declares a batch and makes it the cache's current step. A refused step changes nothing. If ctx
// ends first, the step may or may not have become current; the next one waits until that is known.
func (c *Cache) Step(ctx context.Context, b Batch) (*Step, error) {
	select {
	case c.stepping <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	call, step, err := c.startStep(ctx, &b)
	if err != nil {
		<-c.stepping
		return nil, err
	}
	res, err := call.wait(ctx)
	if err != nil {
		return nil, err
	}
	step.Index = indexStats(res.GetStepResult().GetIndex())
	return step, nil
}

// startStep sends a step, which releases c.stepping once its outcome is known.
func (c *Cache) startStep(ctx context.Context, b *Batch) (*call, *Step, error) {
	l, m, err := c.buildStep(b)
	if err != nil {
		return nil, nil, err
	}
	m.Armed, m.Device = nil, nil
	step := &Step{cache: c, lease: l, id: m.GetStepId()}
	call, err := c.sendStep(ctx, l, m, nil)
	return call, step, err
}

// buildStep packs a batch for the lease that is there. The message is the cache's own.
func (c *Cache) buildStep(b *Batch) (*lease, *twilightv1.Step, error) {
	l, err := c.session.current()
	if err != nil {
		return nil, nil, err
	}
	if c.lease != l {
		c.tables.forget()
		c.lease = l
		c.arming.known = false
	}
	m, err := c.tables.build(b)
	if err != nil {
		return nil, nil, err
	}
	if c.lastStep++; uint32(c.lastStep) == 0 { // which no word may hold
		c.lastStep++
	}
	m.CacheId, m.StepId = c.id, c.lastStep
	return l, m, nil
}

// sendStep sends a step. Once its outcome is known, refused, if not nil, hears of an error.
func (c *Cache) sendStep(ctx context.Context, l *lease, m *twilightv1.Step, refused func(error)) (*call, error) {
	c.message.Request = &twilightv1.LeaseRequest_Step{Step: m}
	return l.start(ctx, &c.message, func(_ *twilightv1.LeaseResponse, err error) {
		if err == nil {
			c.tables.commit()
		} else if refused != nil {
			refused(err)
		}
		<-c.stepping
	})
}

// Cancel tells the daemon that no layer of the step follows. What it has indexed stays right.
func (s *Step) Cancel(ctx context.Context) error {
	_, err := s.lease.do(ctx, cancelRequest(s.cache.id, s.id))
	return err
}

func cancelRequest(cacheID uint32, stepID uint64) *twilightv1.LeaseRequest {
	return &twilightv1.LeaseRequest{Request: &twilightv1.LeaseRequest_CancelStep{
		CancelStep: &twilightv1.CancelStep{CacheId: cacheID, StepId: stepID},
	}}
}
