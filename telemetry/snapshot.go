package telemetry

import (
	"cmp"
	"context"
	"encoding/hex"
	"slices"
	"strconv"
	"time"
)

// Snapshot is what the budget page shows.
type Snapshot struct {
	Version  string  `json:"version"`
	Instance string  `json:"instance"` // another one after a restart
	Uptime   float64 `json:"uptime_s"`
	Draining bool    `json:"draining"`
	// TraceURL is where a trace is found, {trace_id} for its id; "" if nobody said.
	TraceURL string          `json:"trace_url"`
	Leases   []LeaseSnapshot `json:"leases"` // by id
}

// LeaseSnapshot is what a lease's heads keep. Columns by layer, then head, are means of about the last
// 16 steps; an empty row is not known.
type LeaseSnapshot struct {
	ID          uint64  `json:"id"`
	Engine      string  `json:"engine"`
	Device      string  `json:"device"`
	Selector    string  `json:"selector"`
	Estimator   string  `json:"estimator"`
	Pruner      string  `json:"pruner"`
	Age         float64 `json:"age_s"`
	Regions     int     `json:"regions"`
	Caches      int     `json:"caches"`
	LentBytes   uint64  `json:"lent_bytes"`
	ShadowBytes uint64  `json:"shadow_bytes"`
	QueryHeads  int     `json:"query_heads"`
	ListHeads   int     `json:"list_heads"` // those that keep tokens of their own
	// TraceID is the last sampled step's, "" if none was.
	TraceID string `json:"trace_id"`

	Steps       uint64 `json:"steps"`
	KeptTokens  uint64 `json:"kept_tokens"`  // sum over rows, layers and steps
	ValidTokens uint64 `json:"valid_tokens"` // what dense attention would have kept
	ReadBytes   uint64 `json:"read_bytes"`   // of caches and shadows
	DenseBytes  uint64 `json:"dense_bytes"`  // what dense attention would have read

	Layers     []int       `json:"layers"`     // the model's indices
	Kept       [][]float64 `json:"kept"`       // by list head
	Candidates [][]float64 `json:"candidates"` // by list head
	Mass       [][]float64 `json:"mass"`       // by query head
	TrueMass   [][]float64 `json:"true_mass"`  // by query head, -1 where none was audited
	Error      [][]float64 `json:"error"`      // likewise

	Sequences []string `json:"sequences"` // names of those that are followed, last seen first
	Sequence  string   `json:"sequence"`  // the one that Budget is of
	Budget    []Tokens `json:"budget"`    // by step, the last 256
}

// Tokens is a step of a sequence: means over its layers and heads.
type Tokens struct {
	Step       uint64  `json:"step"`
	Length     int32   `json:"length"`
	Kept       float32 `json:"kept"`
	Candidates float32 `json:"candidates"`
}

// Snapshot tells what leases keep now, those of sources, too. sequence names the one whose budget is told,
// where a lease has it; 0 stands for the last seen.
func (t *Telemetry) Snapshot(ctx context.Context, sequence uint64) *Snapshot {
	_, others := t.gather(ctx, sequence)
	s := &Snapshot{
		Version: t.options.Version, Instance: t.options.Instance, Uptime: time.Since(t.start).Seconds(),
		Draining: t.metrics.draining.Load(), TraceURL: t.options.TraceURL,
		Leases: append(t.leaseSnapshots(sequence), others...),
	}
	slices.SortFunc(s.Leases, func(a, b LeaseSnapshot) int { return cmp.Compare(a.ID, b.ID) })
	return s
}

// leaseSnapshots tells of the leases that are served here.
func (t *Telemetry) leaseSnapshots(sequence uint64) []LeaseSnapshot {
	t.mu.Lock()
	leases := make([]*Lease, 0, len(t.leases))
	for l := range t.leases {
		leases = append(leases, l)
	}
	t.mu.Unlock()
	snapshots := make([]LeaseSnapshot, 0, len(leases))
	for _, l := range leases {
		snapshots = append(snapshots, l.snapshot(sequence))
	}
	return snapshots
}

func (l *Lease) snapshot(sequence uint64) LeaseSnapshot {
	l.mu.Lock()
	defer l.mu.Unlock()
	i, b := &l.info, &l.budget
	s := LeaseSnapshot{
		ID: i.ID, Engine: i.Engine, Device: i.Device,
		Selector: i.Method.Selector, Estimator: i.Method.Estimator, Pruner: i.Method.Pruner,
		Age: time.Since(l.since).Seconds(), Regions: l.regions, Caches: len(l.caches),
		LentBytes: l.lent, ShadowBytes: l.shadow, QueryHeads: i.Geometry.QueryHeads, ListHeads: i.ListHeads,
		Steps: b.steps, KeptTokens: b.totals.kept, ValidTokens: b.totals.valid,
		ReadBytes: b.totals.cache + b.totals.shadow, DenseBytes: b.totals.dense,
		Layers: []int{}, Sequences: []string{}, Budget: []Tokens{},
	}
	if b.trace.IsValid() {
		s.TraceID = hex.EncodeToString(b.trace[:])
	}
	for _, layer := range b.layers {
		s.Layers = append(s.Layers, layer.layer)
		s.Kept = append(s.Kept, values(layer.kept))
		s.Candidates = append(s.Candidates, values(layer.candidates))
		s.Mass = append(s.Mass, values(layer.mass))
		s.TrueMass = append(s.TrueMass, values(layer.trueMass))
		s.Error = append(s.Error, values(layer.outError))
	}
	tracks := make([]*track, 0, len(b.tracks))
	for _, t := range b.tracks {
		tracks = append(tracks, t)
	}
	slices.SortFunc(tracks, func(a, b *track) int { return cmp.Or(cmp.Compare(b.seen, a.seen), cmp.Compare(a.id, b.id)) })
	for _, t := range tracks {
		s.Sequences = append(s.Sequences, strconv.FormatUint(t.id, 10))
	}
	if chosen := b.tracks[sequence]; chosen != nil {
		tracks = []*track{chosen}
	}
	if len(tracks) > 0 {
		s.Sequence, s.Budget = strconv.FormatUint(tracks[0].id, 10), tracks[0].tokens()
	}
	return s
}

// values are means; nil if none is known, -1 where one is not.
func values(means []mean) []float64 {
	list := make([]float64, len(means))
	known := false
	for i, m := range means {
		list[i] = m.value
		if m.n == 0 {
			list[i] = -1
		}
		known = known || m.n > 0
	}
	if !known {
		return []float64{}
	}
	return list
}

// tokens are the points that a track still has, oldest first.
func (t *track) tokens() []Tokens {
	list := make([]Tokens, 0, min(t.count, trackSteps))
	for i := t.count - min(t.count, trackSteps); i < t.count; i++ {
		p := t.points[i%trackSteps]
		list = append(list, Tokens{p.step, p.tokens, p.kept, p.candidates})
	}
	return list
}
