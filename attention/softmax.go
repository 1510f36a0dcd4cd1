package attention

import (
	"math"

	"github.com/viterin/vek/vek32"
)

// lowest is where exp(x) is about to leave the normal float32 numbers. Below -88 vek32.Exp is wrong.
const lowest = -87

// Exp replaces logits, none NaN, by exp(logit - shift), at least exp(-87).
func Exp(logits []float32, shift float32) {
	vek32.SubNumber_Inplace(logits, shift)
	vek32.MaximumNumber_Inplace(logits, lowest)
	vek32.Exp_Inplace(logits)
}

// Softcap replaces logits by softcap*tanh(logit/softcap), good to an ulp of softcap. One NaN makes all
// of them NaN. A softcap of 0 leaves them.
func Softcap(logits []float32, softcap float32) {
	if softcap <= 0 {
		return
	}
	sum := vek32.Sum(logits)
	vek32.MulNumber_Inplace(logits, 2/softcap)
	vek32.MinimumNumber_Inplace(logits, 40) // tanh is 1 long before, vek32.Exp wrong from 88 on
	Exp(logits, 0)
	vek32.AddNumber_Inplace(logits, 1)
	vek32.Inv_Inplace(logits)
	vek32.MulNumber_Inplace(logits, -2*softcap) // tanh(x) = 1 - 2/(exp(2x)+1)
	vek32.AddNumber_Inplace(logits, softcap)
	if sum != sum { // lost above
		vek32.AddNumber_Inplace(logits, sum)
	}
}

// shift returns what to subtract from logits before their exponentials are taken, and the sink's, which
// joins the sum that normalises them; -Inf for no sink. The sum is NaN if a logit is NaN or +Inf.
func shift(logits []float32, sink float32) (by float32, sum float64) {
	if s := float64(vek32.Sum(logits)); s != s || s > math.MaxFloat32 {
		return 0, math.NaN()
	}
	by = max(vek32.Max(logits), sink)
	return by, math.Exp(float64(sink - by))
}
