package selector

import "math"

// Cut tells the k largest scores, 1 <= k <= len(scores), from the others: they are all those above cut
// and the first ties of those equal to it. Scores must not be NaN.
//
// It is a radix select, digits of 11, 11 and 10 bits: O(len(scores)), whatever the scores.
func Cut(scores []float32, k int) (cut float32, ties int) {
	const most = 1<<11 - 1
	found := uint32(0) // digits
	for _, digit := range [...]struct{ shift, bits int }{{21, 11}, {10, 11}, {0, 10}} {
		var count [most + 1]int
		top := uint32(1)<<digit.bits - 1
		for _, s := range scores {
			if key := ordered(s) >> digit.shift; key>>digit.bits == found {
				count[key&top&most]++
			}
		}
		d := top
		for ; count[d&most] < k; d-- {
			k -= count[d&most]
		}
		found = found<<digit.bits | d
	}
	if found>>31 == 1 {
		return math.Float32frombits(found &^ (1 << 31)), k
	}
	return math.Float32frombits(^found), k
}

// ordered maps floats to integers of the same order; -0 and +0 are one.
func ordered(f float32) uint32 {
	bits := math.Float32bits(f + 0)
	if bits>>31 == 1 {
		return ^bits
	}
	return bits | 1<<31
}
