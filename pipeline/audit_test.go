package pipeline_test

import (
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/internal/kvtest"
	"github.com/twilight-sidecar/twilight/pipeline"
)

// TestAudit compares audits with dense attention done plainly in float64. An audit leaves the result as
// it is.
func TestAudit(t *testing.T) {
	t.Parallel()
	var s pipeline.Scratch
	var res pipeline.Result
	rapid.Check(t, func(t *rapid.T) {
		e, _ := draw(t)
		e.ListsOnly = rapid.Bool().Draw(t, "lists only")
		p := e.run(t, &s, &res)
		if len(res.TrueMass) != 0 || len(res.OutputError) != 0 {
			t.Fatalf("audited before: %v", res.TrueMass)
		}
		output, kept := slices.Clone(res.Output), slices.Clone(res.Kept)
		p.Audit(&s, &e.Row, &res)
		if !slices.Equal(output, res.Output) || !slices.Equal(kept, res.Kept) {
			t.Fatal("the audit changed the result")
		}
		for h := range e.Group() {
			mass, relErr := e.audited(&res, h)
			if math.Abs(mass-float64(res.TrueMass[h])) > 1e-4 {
				t.Fatalf("head %d: true mass %v, want %v", h, res.TrueMass[h], mass)
			}
			got := float64(res.OutputError[h])
			if e.ListsOnly && res.Path == pipeline.Sparse {
				if got == got {
					t.Fatalf("head %d: error %v of no output", h, got)
				}
				continue
			}
			if math.Abs(got-relErr) > 1e-3*max(1, relErr) {
				t.Fatalf("head %d: error %v, want %v", h, got, relErr)
			}
		}
	})
}

// audited is the true mass of what query head h keeps, and the error of its output.
func (e *example) audited(res *pipeline.Result, h int) (mass, relErr float64) {
	if res.Path == pipeline.Dense {
		return 1, 0
	}
	list := res.Lists[0]
	if len(res.Lists) > 1 {
		list = res.Lists[h]
	}
	top := math.Inf(-1)
	for position := e.First; position < e.Len; position++ {
		top = max(top, e.capped(e.dot(h, position)))
	}
	var all, kept float64
	dense := make([]float64, e.VDim)
	for position := e.First; position < e.Len; position++ {
		w := math.Exp(e.capped(e.dot(h, position)) - top)
		all += w
		if _, is := slices.BinarySearch(list, int32(position)); is {
			kept += w
		}
		for d := range dense {
			dense[d] += w * float64(e.values[position*e.VDim+d])
		}
	}
	total := all
	if e.Sinks != nil {
		total += math.Exp(float64(e.Sinks[e.KVHead*e.Group()+h]) - top)
	}
	if len(res.Output) > 0 {
		var off, norm float64
		for d := range dense {
			want := dense[d] / total
			off += (float64(res.Output[h*e.VDim+d]) - want) * (float64(res.Output[h*e.VDim+d]) - want)
			norm += want * want
		}
		relErr = math.Sqrt(off / norm)
	}
	return kept / all, relErr
}

// Audits pick their share of rows, the same each time, wherever they lie.
func TestAudits(t *testing.T) {
	t.Parallel()
	for _, share := range []float64{0, .001, .25, 1} {
		config := pipeline.Config{Audit: share}
		picked, rows := 0.0, 0.0
		for layer := range 32 {
			for head := range 8 {
				for sequence := range 16 {
					for length := 1000; length < 1050; length++ {
						row := pipeline.Row{Layer: layer, KVHead: head, Len: length}
						is := config.Audits(&row, sequence)
						if is != config.Audits(&row, sequence) {
							t.Fatal("a row is picked or not")
						}
						if is {
							picked++
						}
						rows++
					}
				}
			}
		}
		if deviation := math.Sqrt(share * (1 - share) / rows); math.Abs(picked/rows-share) > 5*deviation {
			t.Errorf("%v of the rows, want %v", picked/rows, share)
		}
	}
}

func TestAuditAllocatesNothing(t *testing.T) {
	e := fixed(t, questINT4, 1000, 4, 128)
	var s pipeline.Scratch
	var res pipeline.Result
	p := e.run(t, &s, &res)
	kvtest.NoAllocation(t, func() { p.Audit(&s, &e.Row, &res) })
}
