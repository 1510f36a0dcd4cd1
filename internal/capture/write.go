package capture

import (
	"encoding/binary"
	"fmt"
	"io"
	"maps"
	"math"
	"strconv"

	"github.com/nlpodyssey/safetensors"
)

// Write writes c as a safetensors file: F16, mass F32. Values that F16 cannot hold are rounded to
// the nearest it can; one too large for it is an error that names its tensor. The metadata is
// c.Meta with n, steps, scale and layers set to what c holds. Equal captures give equal bytes.
func Write(w io.Writer, c *Capture) error {
	if err := c.check(); err != nil {
		return err
	}
	views := make(map[string]safetensors.TensorView)
	indices := make([]int, len(c.Layers))
	for i := range c.Layers {
		indices[i] = c.Layers[i].Index
		for _, t := range c.tensors(&c.Layers[i]) {
			if *t.values == nil {
				continue
			}
			view, err := t.view()
			if err != nil {
				return err
			}
			views[t.name] = view
		}
	}
	meta := maps.Clone(c.Meta)
	if meta == nil {
		meta = make(map[string]string)
	}
	meta["n"], meta["steps"] = strconv.Itoa(c.N), strconv.Itoa(c.Steps)
	meta["scale"] = strconv.FormatFloat(c.Scale, 'g', -1, 64)
	meta["layers"] = formatInts(indices)
	if err := safetensors.SerializeToWriter(views, meta, w); err != nil {
		return fmt.Errorf("capture: write: %w", err)
	}
	return nil
}

// view encodes a checked tensor.
func (t tensor) view() (safetensors.TensorView, error) {
	sizes := make([]uint64, len(t.shape))
	for i, d := range t.shape {
		sizes[i] = uint64(*d.size)
	}
	data := make([]byte, 0, len(*t.values)*int(t.dtype.Size()))
	for i, x := range *t.values {
		if t.dtype == safetensors.F32 {
			data = binary.LittleEndian.AppendUint32(data, math.Float32bits(x))
			continue
		}
		h := halfFromFloat(x)
		if h&0x7fff == 0x7c00 {
			return safetensors.TensorView{}, fmt.Errorf(
				"capture: tensor %q: value %d is %v, expected at most 65504, the largest F16", t.name, i, x)
		}
		data = binary.LittleEndian.AppendUint16(data, h)
	}
	return safetensors.NewTensorView(t.dtype, sizes, data)
}
