package capture

import "fmt"

// ShiftKeys adds by[d] to channel d of every key of c, in place, rounded to F16. All logits of a query
// move by the same, so attention stays what it was but for that rounding; for quantisers the shifted
// channels become outliers, as some models have them (channel means of 20 times the mean |k|).
func ShiftKeys(c *Capture, by map[int]float32) error {
	for d, shift := range by {
		if d < 0 || d >= c.KDim {
			return fmt.Errorf("capture: key channel %d does not exist, expected 0..%d", d, c.KDim-1)
		}
		for l := range c.Layers {
			for i := d; i < len(c.Layers[l].K); i += c.KDim {
				h := halfFromFloat(c.Layers[l].K[i] + shift)
				if h&0x7c00 == 0x7c00 {
					return fmt.Errorf("capture: key channel %d shifted by %v leaves the range of F16, +-65504", d, shift)
				}
				c.Layers[l].K[i] = halfToFloat(h)
			}
		}
	}
	return nil
}
