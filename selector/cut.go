package selector

import "math"

// Cut tells the k largest scores, 1 <= k <= len(scores), from the others: they are all those above cut
// and the first ties of those equal to it. Scores must not be NaN.
//
// It is a radix select, one digit of 8 bits a pass: O(len(scores)), whatever the scores.
func Cut(scores []float32, k int) (cut float32, ties int) {
	var prefix, mask uint32
	for shift := 24; shift >= 0; shift -= 8 {
		var count [256]int
		for _, s := range scores {
			if key := ordered(s); key&mask == prefix {
				count[key>>shift&255]++
			}
		}
		digit := 255
		for ; count[digit] < k; digit-- {
			k -= count[digit]
		}
		prefix |= uint32(digit) << shift
		mask |= 255 << shift
	}
	if prefix>>31 == 1 {
		return math.Float32frombits(prefix &^ (1 << 31)), k
	}
	return math.Float32frombits(^prefix), k
}

// ordered maps floats to integers of the same order; -0 and +0 are one.
func ordered(f float32) uint32 {
	bits := math.Float32bits(f + 0)
	if bits>>31 == 1 {
		return ^bits
	}
	return bits | 1<<31
}
