package replay

import (
	"fmt"
	"math"
	"runtime"

	"golang.org/x/sync/errgroup"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/internal/capture"
)

// judge compares what the daemon answers with dense attention over the capture.
type judge struct {
	capture *capture.Capture
	answers []answer   // of the step at hand, by layer
	rows    [][]judged // by layer, then [step][query head]
	facts   *Facts     // what is seen besides

	mass, coverage mean // as the daemon estimates them
}

// answer is what the daemon said of a layer of a step.
type answer struct {
	result *client.LayerResult
	lists  [][]int32 // by list row
	output []float32 // [query heads][VDim]
}

func newJudge(c *capture.Capture, facts *Facts) *judge {
	j := &judge{capture: c, answers: make([]answer, len(c.Layers)), rows: make([][]judged, len(c.Layers)), facts: facts}
	for layer := range j.rows {
		j.rows[layer] = make([]judged, c.Steps*c.QueryHeads)
	}
	facts.Dense = make(map[client.Reason]int)
	facts.Kept.Min, facts.Candidates.Min = math.MaxInt, math.MaxInt
	return j
}

// take keeps a layer's answer until the step is judged.
func (j *judge) take(layer int, r *client.LayerResult, output []float32) error {
	c := j.capture
	rows := len(r.Kept)
	if rows != c.KVHeads && rows != c.QueryHeads {
		return fmt.Errorf("the daemon answered %d list rows, expected one for each of %d KV or %d query heads",
			rows, c.KVHeads, c.QueryHeads)
	}
	if len(r.Candidates) != rows || len(r.Paths) != rows || len(r.Reasons) != rows {
		return fmt.Errorf("the daemon answered %d kept, %d candidates, %d paths and %d reasons, expected equally many",
			rows, len(r.Candidates), len(r.Paths), len(r.Reasons))
	}
	j.facts.PerQueryHead = rows == c.QueryHeads && rows != c.KVHeads
	a := answer{result: r, output: output}
	listed := 0
	for row, list := range r.RowLists() {
		if len(list) != int(r.Kept[row]) {
			return fmt.Errorf("list row %d has %d tokens, but the daemon counts %d kept", row, len(list), r.Kept[row])
		}
		listed += len(list)
		a.lists = append(a.lists, list)
		if r.Paths[row] != client.PathSparse {
			j.facts.Dense[r.Reasons[row]]++
		}
	}
	if listed != len(r.Lists) {
		return fmt.Errorf("the daemon listed %d tokens, but counts %d kept", len(r.Lists), listed)
	}
	for i, x := range output {
		if x-x != 0 {
			return fmt.Errorf("output %d of query head %d is %v", i%c.VDim, i/c.VDim, x)
		}
	}
	j.facts.Rows += rows
	j.facts.Read.Cache += r.Read.Cache
	j.facts.Read.Shadow += r.Read.Shadow
	j.mass.add(r.EstimatedMass)
	j.coverage.add(r.EstimatedCoverage)
	j.answers[layer] = a
	return nil
}

// judge computes dense attention for the step that was taken.
func (j *judge) judge(step int) error {
	c := j.capture
	var workers errgroup.Group
	heads := make(chan [2]int)
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() error {
			var scratch capture.Scratch
			var err error
			for at := range heads {
				if err == nil {
					err = j.head(step, at[0], at[1], &scratch)
				}
			}
			return err
		})
	}
	for layer := range c.Layers {
		for head := range c.QueryHeads {
			heads <- [2]int{layer, head}
		}
	}
	close(heads)
	return workers.Wait()
}

func (j *judge) head(step, layer, head int, scratch *capture.Scratch) error {
	c, a := j.capture, j.answers[layer]
	row := head
	if len(a.lists) == c.KVHeads {
		row = head / c.Group()
	}
	dense, weights := c.Dense(layer, step, head, scratch)
	mass, err := capture.Mass(weights, a.lists[row])
	if err != nil {
		return fmt.Errorf("layer %d, list row %d: %w", c.Layers[layer].Index, row, err)
	}
	to := &j.rows[layer][step*c.QueryHeads+head]
	to.candidates, to.kept, to.mass = int(a.result.Candidates[row]), int(a.result.Kept[row]), mass
	to.err.Add(a.output[head*c.VDim:][:c.VDim], dense)
	return nil
}

// report sums up all steps.
func (j *judge) report() *Report {
	c := j.capture
	r := &Report{Figures: Figures{Steps: c.Steps, WorstTrueMass: math.Inf(1)}}
	var all capture.RelErr
	for layer, rows := range j.rows {
		var pooled capture.RelErr
		l := Layer{Layer: c.Layers[layer].Index}
		for head := range c.QueryHeads {
			h := Head{Head: head, WorstTrueMass: math.Inf(1)}
			var over capture.RelErr
			for step := range c.Steps {
				at := rows[step*c.QueryHeads+head]
				h.KeptPerStep = append(h.KeptPerStep, at.kept)
				h.Candidates += float64(at.candidates)
				h.Kept += float64(at.kept)
				h.TrueMass += at.mass
				h.WorstTrueMass = min(h.WorstTrueMass, at.mass)
				over.Merge(at.err)
				j.facts.Kept.include(at.kept)
				j.facts.Candidates.include(at.candidates)
				r.MeanHeadRelErr += at.err.Value()
			}
			r.MeanCandidates += h.Candidates
			r.MeanKept += h.Kept
			r.MeanTrueMass += h.TrueMass
			r.WorstTrueMass = min(r.WorstTrueMass, h.WorstTrueMass)
			steps := float64(c.Steps)
			h.Candidates, h.Kept, h.TrueMass, h.RelErr = h.Candidates/steps, h.Kept/steps, h.TrueMass/steps, over.Value()
			pooled.Merge(over)
			l.Heads = append(l.Heads, h)
		}
		l.RelErr = pooled.Value()
		all.Merge(pooled)
		r.Layers = append(r.Layers, l)
	}
	n := float64(len(c.Layers) * c.Steps * c.QueryHeads)
	r.MeanCandidates /= n
	r.MeanKept /= n
	r.MeanTrueMass /= n
	r.MeanHeadRelErr /= n
	r.RelErr = all.Value()
	j.facts.EstimatedMass, j.facts.EstimatedCoverage = j.mass.value(), j.coverage.value()
	r.Facts = *j.facts
	return r
}

// mean is that of what the daemon estimates; NaN where it cannot tell.
type mean struct {
	sum float64
	n   int
}

func (m *mean) add(values []float32) {
	for _, x := range values {
		m.sum += float64(x)
		m.n++
	}
}

func (m *mean) value() float64 { return m.sum / float64(m.n) }
