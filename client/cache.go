package client

import (
	"context"

	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

// CacheSpec says where a KV cache lies. The element at (page p, KV head h, token-in-page t, dimension
// d) is at base + p*Page + h*Head + t*Token + d*size.
type CacheSpec struct {
	DType    DType
	PageSize int // tokens
	NumPages int // page ids are 0..NumPages-1
	K        Strides
	V        Strides // zero: as K
	// NullPage, if not nil, is a page id that pads tables and holds no tokens.
	NullPage *int32
	// Layers has as many entries as Geometry.Layers.
	Layers []CacheLayer
	// MaxTokens is needed where PageSize is not a multiple of 16: the most tokens that all live sequences
	// hold together. 0 means NumPages*PageSize.
	MaxTokens int
}

// Strides are distances in bytes.
type Strides struct{ Page, Head, Token int }

// CacheLayer is where one layer starts.
type CacheLayer struct {
	Layer int // the model's layer index
	K, V  Location
	// KScales and VScales, for F8E4M3 caches: real value = stored * scale. nil means 1; else one scale,
	// or one per KV head.
	KScales, VScales []float32
}

// Location is a place in a buffer, in bytes.
type Location struct {
	Buffer *Buffer
	Offset int
}

func (l Location) proto() *twilightv1.Location {
	if l.Buffer == nil {
		return nil
	}
	return &twilightv1.Location{RegionId: l.Buffer.id, Offset: uint64(l.Offset)}
}

func (s Strides) proto() *twilightv1.Strides {
	return &twilightv1.Strides{Page: uint64(s.Page), Head: uint64(s.Head), Token: uint64(s.Token)}
}

func (spec *CacheSpec) proto() *twilightv1.RegisterCache {
	m := &twilightv1.RegisterCache{
		Dtype:     twilightv1.DataType(spec.DType),
		PageSize:  uint32(spec.PageSize),
		NumPages:  uint32(spec.NumPages),
		KStrides:  spec.K.proto(),
		NullPage:  spec.NullPage,
		MaxTokens: uint64(spec.MaxTokens),
	}
	if spec.V != (Strides{}) {
		m.VStrides = spec.V.proto()
	}
	for _, l := range spec.Layers {
		m.Layers = append(m.Layers, &twilightv1.CacheLayer{
			Layer: uint32(l.Layer), K: l.K.proto(), V: l.V.proto(), KScales: l.KScales, VScales: l.VScales,
		})
	}
	return m
}

// Cache is a registered KV cache with its shadow in the daemon.
type Cache struct {
	session *Session
	id      uint32
	request *twilightv1.RegisterCache
	buffers map[*Buffer]struct{}
	size    ShadowSize

	// stepping holds an item from the start of a step until its outcome is known. It guards what follows.
	stepping chan struct{}
	tables   *tables
	lease    *lease // whose daemon has the tables
	lastStep uint64
	message  twilightv1.LeaseRequest
	arming   arming

	steps armedSteps
}

// ShadowSize is what a cache's shadow takes.
type ShadowSize struct {
	Bytes    uint64
	PerToken float64 // over all layers and KV heads
}

// RegisterCache says where a KV cache lies and takes the shadow for it.
func (s *Session) RegisterCache(ctx context.Context, spec CacheSpec) (*Cache, error) {
	c := &Cache{
		session:  s,
		request:  spec.proto(),
		buffers:  make(map[*Buffer]struct{}),
		stepping: make(chan struct{}, 1),
		tables:   newTables(spec.PageSize),
	}
	for _, l := range spec.Layers {
		c.buffers[l.K.Buffer], c.buffers[l.V.Buffer] = struct{}{}, struct{}{}
	}
	unlock, err := s.lockRegistrations(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	for b := range c.buffers {
		if err := b.usable(s); err != nil {
			return nil, err
		}
	}
	l, err := s.current()
	if err != nil {
		return nil, err
	}
	s.lastCache++
	c.id = s.lastCache
	c.request.CacheId = c.id
	if err := c.register(ctx, l); err != nil {
		return nil, err
	}
	s.caches[c.id] = c
	return c, nil
}

// ShadowBytes tells what RegisterCache would take, and takes nothing.
func (s *Session) ShadowBytes(ctx context.Context, spec CacheSpec) (ShadowSize, error) {
	l, err := s.current()
	if err != nil {
		return ShadowSize{}, err
	}
	m := spec.proto()
	m.CacheId, m.SizeOnly = 1, true
	res, err := l.do(ctx, &twilightv1.LeaseRequest{Request: &twilightv1.LeaseRequest_RegisterCache{RegisterCache: m}})
	return shadowSize(res), err
}

func shadowSize(res *twilightv1.LeaseResponse) ShadowSize {
	r := res.GetCacheRegistered()
	return ShadowSize{Bytes: r.GetShadowBytes(), PerToken: r.GetShadowBytesPerToken()}
}

// register registers the cache on a lease.
func (c *Cache) register(ctx context.Context, l *lease) error {
	res, err := l.register(ctx,
		&twilightv1.LeaseRequest{Request: &twilightv1.LeaseRequest_RegisterCache{RegisterCache: c.request}},
		c.releaseRequest())
	if err != nil {
		return err
	}
	c.size = shadowSize(res)
	return nil
}

func (c *Cache) releaseRequest() *twilightv1.LeaseRequest {
	return &twilightv1.LeaseRequest{Request: &twilightv1.LeaseRequest_ReleaseCache{
		ReleaseCache: &twilightv1.ReleaseCache{CacheId: c.id},
	}}
}

// Shadow is what the cache's shadow takes.
func (c *Cache) Shadow() ShadowSize { return c.size }

// Close gives the cache's shadow back. Its steps are over, armed ones too.
func (c *Cache) Close(ctx context.Context) error {
	if err := c.close(ctx); err != nil {
		return err
	}
	select {
	case c.stepping <- struct{}{}:
		defer func() { <-c.stepping }()
	case <-ctx.Done():
		return ctx.Err()
	}
	return c.arming.close(ctx)
}

func (c *Cache) close(ctx context.Context) error {
	s := c.session
	unlock, err := s.lockRegistrations(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if s.caches[c.id] != c {
		return errorf(ErrClosed, "", "cache %d is closed", c.id)
	}
	if l, err := s.current(); err == nil {
		if err := l.giveBack(ctx, c.releaseRequest()); err != nil {
			return err
		}
	}
	delete(s.caches, c.id)
	return nil
}
