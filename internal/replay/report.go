package replay

import (
	"encoding/json"
	"time"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/internal/capture"
)

// Report is how a replay went. Heads are query heads: under "union" those of a group share candidates
// and kept. Mass is the share of true softmax weight over all tokens. Relative errors are
// ||out-dense||/||dense|| over all outputs concerned. Means without another word are over every
// (layer, step, head).
type Report struct {
	Config json.RawMessage `json:"config"` // as it ran: every key with its value
	Figures
	Layers []Layer `json:"layers"`

	Facts Facts `json:"-"`
}

// Figures sum up a Report.
type Figures struct {
	Steps          int     `json:"steps"`
	MeanKept       float64 `json:"mean_kept"`
	MeanCandidates float64 `json:"mean_candidates"`
	MeanTrueMass   float64 `json:"mean_true_mass"`
	WorstTrueMass  float64 `json:"worst_true_mass"`
	// MeanHeadRelErr is the mean of the single outputs' errors.
	MeanHeadRelErr float64 `json:"mean_head_rel_err"`
	RelErr         float64 `json:"rel_err"`
}

// Layer is a layer of a Report.
type Layer struct {
	Layer  int     `json:"layer"`
	RelErr float64 `json:"rel_err"`
	Heads  []Head  `json:"heads"`
}

// Head is a query head of a Layer, over the steps.
type Head struct {
	Head          int     `json:"head"`
	Candidates    float64 `json:"candidates"` // mean
	Kept          float64 `json:"kept"`       // mean
	KeptPerStep   []int   `json:"kept_per_step"`
	TrueMass      float64 `json:"true_mass"` // mean
	WorstTrueMass float64 `json:"worst_true_mass"`
	RelErr        float64 `json:"rel_err"`
}

// Facts are what a Report's reader may want to know besides.
type Facts struct {
	Tokens     int // prefill and steps
	QueryHeads int
	KVHeads    int
	// PerQueryHead says that each query head had a list of its own.
	PerQueryHead bool
	DType        client.DType
	CacheBytes   int
	Shadow       client.ShadowSize

	Kept, Candidates Range // of a (layer, step, head)
	// EstimatedMass and EstimatedCoverage are means of what the daemon estimates; NaN if it does not.
	EstimatedMass, EstimatedCoverage float64
	// Dense counts list rows that were not computed sparsely, by reason.
	Dense map[client.Reason]int
	Rows  int // list rows in all

	// Read is what all layers of all steps read.
	Read client.Read

	Prefill time.Duration // indexing the prefill, as the engine waits for it
	Decode  time.Duration // all steps and layers, likewise
}

// BytesPerRow is the mean of what a KV head of a layer read in a step, of cache and shadow together.
func (r *Report) BytesPerRow() float64 {
	rows := r.Steps * len(r.Layers) * r.Facts.KVHeads
	return float64(r.Facts.Read.Cache+r.Facts.Read.Shadow) / float64(rows)
}

// Range is the least and the most of something.
type Range struct{ Min, Max int }

func (r *Range) include(n int) {
	r.Min, r.Max = min(r.Min, n), max(r.Max, n)
}

// judged is one (layer, step, query head).
type judged struct {
	candidates, kept int
	mass             float64
	err              capture.RelErr
}
