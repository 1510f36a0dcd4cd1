package capture

import (
	"cmp"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"math/bits"
	"os"
	"regexp"
	"slices"
	"strconv"

	"github.com/nlpodyssey/safetensors"
)

const (
	maxHeader = 1 << 20 // bytes; JSON takes many times its size once parsed
	maxRank   = 8
)

// Open reads the capture in a file. Its errors name the file.
func Open(path string) (*Capture, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("capture: %w", err)
	}
	c, err := Decode(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// Decode reads the capture in data, which may come from anywhere and is not kept. What it
// allocates is in proportion to len(data). A tensor that is missing, misshapen, misplaced or not
// finite is refused by name.
func Decode(data []byte) (*Capture, error) {
	meta, body, err := readHeader(data)
	if err != nil {
		return nil, err
	}
	infos := meta.Tensors()
	if err := checkPlaces(infos, uint64(len(body))); err != nil {
		return nil, err
	}
	c := &Capture{Meta: meta.Metadata()}
	if err := c.readMeta(); err != nil {
		return nil, err
	}
	indices, err := layerIndices(infos)
	if err != nil {
		return nil, err
	}
	c.Layers = make([]Layer, len(indices))
	for i, index := range indices {
		c.Layers[i].Index = index
		for _, t := range c.tensors(&c.Layers[i]) {
			if err := t.read(infos[t.name], body); err != nil {
				return nil, err
			}
		}
	}
	if err := c.check(); err != nil {
		return nil, err
	}
	return c, nil
}

// readHeader splits a safetensors file into its header and the tensors' bytes. Of the library it
// uses the parser alone: its other checks do not name the tensor and its limit is 100 MB.
func readHeader(data []byte) (meta safetensors.Metadata, body []byte, err error) {
	if len(data) < 8 {
		return meta, nil, fmt.Errorf("capture: %d bytes are no safetensors file, expected a length in the first 8",
			len(data))
	}
	n, rest := binary.LittleEndian.Uint64(data), data[8:]
	if n > maxHeader || n > uint64(len(rest)) {
		return meta, nil, fmt.Errorf("capture: header of %d bytes, expected at most %d", n, min(maxHeader, len(rest)))
	}
	if err := json.Unmarshal(rest[:n], &meta); err != nil {
		// The text is cut because the library quotes whatever the file holds.
		return meta, nil, fmt.Errorf("capture: header: %.300s", err.Error())
	}
	return meta, rest[n:], nil
}

// checkPlaces makes sure that the tensors, in the order of their offsets, fill the size bytes of
// the body without a gap or an overlap, each with as many bytes as its shape and dtype take.
func checkPlaces(infos map[string]*safetensors.TensorInfo, size uint64) error {
	names := slices.SortedFunc(maps.Keys(infos), func(a, b string) int {
		x, y := infos[a].DataOffsets, infos[b].DataOffsets
		return cmp.Or(slices.Compare(x[:], y[:]), cmp.Compare(a, b))
	})
	next := uint64(0)
	for _, name := range names {
		info := infos[name]
		begin, end := info.DataOffsets[0], info.DataOffsets[1]
		if begin != next {
			return fmt.Errorf("capture: tensor %q begins at byte %d, expected %d: tensors follow one another",
				name, begin, next)
		}
		if end < begin || end > size {
			return fmt.Errorf("capture: tensor %q ends at byte %d, expected %d..%d: the file may be truncated",
				name, end, begin, size)
		}
		if len(info.Shape) > maxRank {
			return fmt.Errorf("capture: tensor %q has %d dimensions, expected at most %d",
				name, len(info.Shape), maxRank)
		}
		if n, ok := byteSize(info); !ok || n != end-begin {
			return fmt.Errorf("capture: tensor %q has %d bytes, expected those of shape %v in %v",
				name, end-begin, info.Shape, info.DType)
		}
		next = end
	}
	if next != size {
		return fmt.Errorf("capture: %d bytes follow the last tensor, expected none", size-next)
	}
	return nil
}

// byteSize returns the bytes that a tensor's shape and dtype take; ok is false on overflow.
func byteSize(info *safetensors.TensorInfo) (n uint64, ok bool) {
	n = info.DType.Size()
	for _, d := range info.Shape {
		var overflow uint64
		if overflow, n = bits.Mul64(n, d); overflow != 0 {
			return 0, false
		}
	}
	return n, true
}

func (c *Capture) readMeta() (err error) {
	if c.N, err = strconv.Atoi(c.Meta["n"]); err != nil {
		return fmt.Errorf("capture: metadata n is %.40q, expected the number of prefill tokens", c.Meta["n"])
	}
	if c.Steps, err = strconv.Atoi(c.Meta["steps"]); err != nil {
		return fmt.Errorf("capture: metadata steps is %.40q, expected the number of decode steps", c.Meta["steps"])
	}
	if c.Scale, err = strconv.ParseFloat(c.Meta["scale"], 64); err != nil {
		return fmt.Errorf("capture: metadata scale is %.40q, expected the factor of q.k in a logit", c.Meta["scale"])
	}
	return c.checkSizes()
}

var layerTensor = regexp.MustCompile(`^layer\.(.*)\.(k|v|q|q_window|mass)$`)

// layerIndices returns the numbers of the layers that have a tensor, ascending.
func layerIndices(infos map[string]*safetensors.TensorInfo) ([]int, error) {
	seen := make(map[int]bool)
	for name := range infos {
		match := layerTensor.FindStringSubmatch(name)
		if match == nil {
			continue
		}
		index, err := strconv.Atoi(match[1])
		if err != nil || index < 0 || strconv.Itoa(index) != match[1] {
			return nil, fmt.Errorf("capture: tensor %q: layer %q, expected a plain number", name, match[1])
		}
		seen[index] = true
	}
	return slices.Sorted(maps.Keys(seen)), nil
}

// read decodes a tensor and sets the sizes that its shape is the first to tell. The place that
// info names must have been checked.
func (t tensor) read(info *safetensors.TensorInfo, body []byte) error {
	if info == nil {
		if t.optional {
			return nil
		}
		return fmt.Errorf("capture: tensor %q is missing, expected shape %v", t.name, t.shape)
	}
	bad := len(info.Shape) != len(t.shape)
	for i := 0; !bad && i < len(t.shape); i++ {
		size := *t.shape[i].size
		bad = info.Shape[i] == 0 || size != 0 && info.Shape[i] != uint64(size)
	}
	if bad {
		return fmt.Errorf("capture: tensor %q has shape %v, expected %v", t.name, info.Shape, t.shape)
	}
	for i, d := range t.shape {
		*d.size = int(info.Shape[i]) // fits: no dimension exceeds the file's bytes
	}

	b := body[info.DataOffsets[0]:info.DataOffsets[1]]
	values := make([]float32, len(b)/int(info.DType.Size()))
	switch info.DType {
	case safetensors.F16:
		for i := range values {
			values[i] = halfToFloat(binary.LittleEndian.Uint16(b[2*i:]))
		}
	case safetensors.BF16:
		for i := range values {
			values[i] = math.Float32frombits(uint32(binary.LittleEndian.Uint16(b[2*i:])) << 16)
		}
	case safetensors.F32:
		for i := range values {
			values[i] = math.Float32frombits(binary.LittleEndian.Uint32(b[4*i:]))
		}
	default:
		return fmt.Errorf("capture: tensor %q is %v, expected F16, BF16 or F32", t.name, info.DType)
	}
	*t.values = values
	return nil
}
