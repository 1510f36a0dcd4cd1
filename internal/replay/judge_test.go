package replay

import (
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/internal/capture"
)

// tiny is a random capture: 2 layers, 4 query heads over 2 KV heads, 5 tokens and 2 steps.
func tiny() *capture.Capture {
	random := rand.New(rand.NewPCG(1, 2))
	values := func(n int) []float32 {
		s := make([]float32, n)
		for i := range s {
			s[i] = float32(random.NormFloat64())
		}
		return s
	}
	c := &capture.Capture{N: 5, Steps: 2, QueryHeads: 4, KVHeads: 2, KDim: 3, VDim: 2, Scale: 0.5}
	for _, index := range []int{3, 8} {
		c.Layers = append(c.Layers, capture.Layer{Index: index, K: values(2 * 7 * 3), V: values(2 * 7 * 2), Q: values(2 * 4 * 3)})
	}
	return c
}

// plainAttention is softmax attention of one head over some tokens, and the share of the weight of all
// tokens that they hold.
func plainAttention(c *capture.Capture, layer, step, head int, list []int32) (out []float32, mass float64) {
	l, kvHead := c.Layers[layer], head/(c.QueryHeads/c.KVHeads)
	weight := func(token int) float64 {
		dot := 0.0
		for d := range c.KDim {
			dot += float64(l.Q[(step*c.QueryHeads+head)*c.KDim+d]) * float64(l.K[(kvHead*c.Tokens()+token)*c.KDim+d])
		}
		return math.Exp(c.Scale * dot)
	}
	all, some := 0.0, 0.0
	for token := range c.N + step + 1 {
		all += weight(token)
	}
	for _, token := range list {
		some += weight(int(token))
	}
	out = make([]float32, c.VDim)
	for d := range out {
		sum := 0.0
		for _, token := range list {
			sum += weight(int(token)) / some * float64(l.V[(kvHead*c.Tokens()+int(token))*c.VDim+d])
		}
		out[d] = float32(sum)
	}
	return out, some / all
}

// answers plays a daemon that keeps the last 2+layer+row tokens of each list row.
func answers(c *capture.Capture, rows, step, layer int) (*client.LayerResult, []float32, []float64) {
	r := &client.LayerResult{EstimatedMass: []float32{0.5, 1}}
	var output []float32
	var masses []float64
	for row := range rows {
		n := 2 + layer + row
		list := make([]int32, n)
		for i := range list {
			list[i] = int32(c.N + step + 1 - n + i)
		}
		r.Kept, r.Candidates = append(r.Kept, uint32(n)), append(r.Candidates, uint32(n+1))
		r.Paths, r.Reasons = append(r.Paths, client.PathSparse), append(r.Reasons, 0)
		r.Lists = append(r.Lists, list...)
		for head := row * c.QueryHeads / rows; head < (row+1)*c.QueryHeads/rows; head++ {
			out, mass := plainAttention(c, layer, step, head, list)
			output, masses = append(output, out...), append(masses, mass)
		}
	}
	return r, output, masses
}

func TestReportAgainstPlain(t *testing.T) {
	t.Parallel()
	for _, rows := range []int{2, 4} { // union, per query head
		c, facts := tiny(), Facts{}
		j := newJudge(c, &facts)
		var kept, mass, headErr, diff, norm float64
		worst := math.Inf(1)
		for step := range c.Steps {
			for layer := range c.Layers {
				r, output, masses := answers(c, rows, step, layer)
				if err := j.take(layer, r, output); err != nil {
					t.Fatal(err)
				}
				for head, m := range masses {
					mass, worst = mass+m, min(worst, m)
					kept += float64(r.Kept[head*rows/c.QueryHeads])
					every := make([]int32, c.N+step+1)
					for i := range every {
						every[i] = int32(i)
					}
					dense, _ := plainAttention(c, layer, step, head, every)
					var d, n float64
					for i, x := range dense {
						d += math.Pow(float64(output[head*c.VDim+i]-x), 2)
						n += float64(x) * float64(x)
					}
					headErr, diff, norm = headErr+math.Sqrt(d/n), diff+d, norm+n
				}
			}
			if err := j.judge(step); err != nil {
				t.Fatal(err)
			}
		}
		r := j.report()
		const all = 2 * 2 * 4
		for name, pair := range map[string][2]float64{
			"mean_kept":         {r.MeanKept, kept / all},
			"mean_candidates":   {r.MeanCandidates, kept/all + 1},
			"mean_true_mass":    {r.MeanTrueMass, mass / all},
			"worst_true_mass":   {r.WorstTrueMass, worst},
			"mean_head_rel_err": {r.MeanHeadRelErr, headErr / all},
			"rel_err":           {r.RelErr, math.Sqrt(diff / norm)},
			"estimated mass":    {r.Facts.EstimatedMass, 0.75},
		} {
			if math.Abs(pair[0]-pair[1]) > 1e-5*pair[1] {
				t.Errorf("%d rows: %s is %v, want %v", rows, name, pair[0], pair[1])
			}
		}
		if !math.IsNaN(r.Facts.EstimatedCoverage) {
			t.Errorf("coverage %v was estimated by nobody", r.Facts.EstimatedCoverage)
		}
		if want := (Range{2, 2 + 1 + rows - 1}); r.Facts.Kept != want {
			t.Errorf("kept %v, want %v", r.Facts.Kept, want)
		}
		last := r.Layers[1].Heads[3]
		if r.Layers[1].Layer != 8 || last.Head != 3 || !slices.Equal(last.KeptPerStep, []int{2 + rows, 2 + rows}) || last.Kept != float64(2+rows) {
			t.Errorf("%d rows: the last head is %+v", rows, last)
		}
		if r.Facts.PerQueryHead != (rows == 4) || r.Facts.Rows != 2*2*rows {
			t.Errorf("%d rows: facts are %+v", rows, r.Facts)
		}
	}
}

func TestJudgeRefusesWhatCannotBe(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		spoil func(*client.LayerResult, []float32)
		names string
	}{
		"rows":       {func(r *client.LayerResult, _ []float32) { r.Kept = append(r.Kept, 1) }, "list rows"},
		"columns":    {func(r *client.LayerResult, _ []float32) { r.Candidates = r.Candidates[1:] }, "candidates"},
		"short list": {func(r *client.LayerResult, _ []float32) { r.Lists = r.Lists[1:] }, "counts"},
		"long list":  {func(r *client.LayerResult, _ []float32) { r.Lists = append(r.Lists, 1) }, "listed"},
		"unordered":  {func(r *client.LayerResult, _ []float32) { slices.Reverse(r.Lists) }, "ascending"},
		"future":     {func(r *client.LayerResult, _ []float32) { r.Lists[1] = 6 }, "ascending"},
		"NaN":        {func(_ *client.LayerResult, out []float32) { out[5] = float32(math.NaN()) }, "query head 2"},
	} {
		c := tiny()
		j := newJudge(c, new(Facts))
		var err error
		for layer := range c.Layers {
			r, output, _ := answers(c, 2, 0, layer)
			if layer == 0 {
				tc.spoil(r, output)
			}
			if err = j.take(layer, r, output); err != nil {
				break
			}
		}
		if err == nil {
			err = j.judge(0)
		}
		if err == nil || !strings.Contains(err.Error(), tc.names) {
			t.Errorf("%s: error %v does not say %q", name, err, tc.names)
		}
	}
}
