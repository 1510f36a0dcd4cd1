package capture

import (
	"encoding/binary"
	"encoding/json"
	"math"
	"testing"

	"pgregory.net/rapid"
)

// file is a safetensors file in pieces that a test can spoil before they are put together.
type file struct {
	header map[string]any
	body   []byte
}

type entry struct {
	DType   string    `json:"dtype"`
	Shape   []uint64  `json:"shape"`
	Offsets [2]uint64 `json:"data_offsets"`
}

// smallFile is a valid capture: layers 1 and 10, n=3, 2 steps, 4 query heads over 2 KV heads, keys
// of 4 and values of 3 elements. All elements are 1, in F16.
func smallFile() *file {
	f := &file{header: map[string]any{
		"__metadata__": map[string]any{"n": "3", "steps": "2", "scale": "0.5"},
	}}
	for _, layer := range []string{"layer.10.", "layer.1."} {
		f.add(layer+"k", 2, 5, 4)
		f.add(layer+"v", 2, 5, 3)
		f.add(layer+"q", 2, 4, 4)
		f.add(layer+"q_window", 2, 4, 4)
		f.add(layer+"mass", 4, 3)
	}
	return f
}

func (f *file) add(name string, shape ...uint64) {
	size := uint64(2)
	for _, d := range shape {
		size *= d
	}
	begin := uint64(len(f.body))
	f.header[name] = &entry{"F16", shape, [2]uint64{begin, begin + size}}
	for range size / 2 {
		f.body = binary.LittleEndian.AppendUint16(f.body, 0x3c00)
	}
}

func (f *file) entry(name string) *entry { return f.header[name].(*entry) }

func (f *file) meta() map[string]any { return f.header["__metadata__"].(map[string]any) }

// set overwrites element i of a tensor whose elements take 2 bytes.
func (f *file) set(name string, i int, bits uint16) {
	binary.LittleEndian.PutUint16(f.body[f.entry(name).Offsets[0]+uint64(2*i):], bits)
}

func (f *file) bytes(tb testing.TB) []byte {
	header, err := json.Marshal(f.header)
	if err != nil {
		tb.Fatal(err)
	}
	return withHeader(string(header), f.body)
}

func withHeader(header string, body []byte) []byte {
	data := binary.LittleEndian.AppendUint64(nil, uint64(len(header)))
	return append(append(data, header...), body...)
}

func mustDecode(tb testing.TB, data []byte) *Capture {
	tb.Helper()
	c, err := Decode(data)
	if err != nil {
		tb.Fatal(err)
	}
	return c
}

// halves draws n numbers that F16 holds, every kind of them.
func halves(t *rapid.T, label string, n int) []float32 {
	finite := rapid.Uint16().Filter(func(h uint16) bool { return h&0x7c00 != 0x7c00 })
	values := make([]float32, n)
	for i := range values {
		values[i] = halfToFloat(finite.Draw(t, label))
	}
	return values
}

// captures draws a small capture; layers may lack q_window and mass.
func captures(t *rapid.T) *Capture {
	size := func(label string, most int) int { return rapid.IntRange(1, most).Draw(t, label) }
	c := &Capture{
		Meta:    rapid.MapOfN(rapid.StringMatching(`m[a-zé<"\\]*`), rapid.String(), 0, 3).Draw(t, "meta"),
		N:       size("n", 5),
		Steps:   size("steps", 3),
		KVHeads: size("kv heads", 3),
		KDim:    size("k dim", 6),
		VDim:    size("v dim", 6),
		Scale:   rapid.Float64Range(1e-3, 10).Draw(t, "scale"),
	}
	c.QueryHeads = c.KVHeads * size("group", 3)
	window := size("window", 3)

	index := -1
	for range size("layers", 3) {
		index += 1 + rapid.IntRange(0, 50).Draw(t, "gap")
		l := Layer{
			Index: index,
			K:     halves(t, "k", c.KVHeads*c.Tokens()*c.KDim),
			V:     halves(t, "v", c.KVHeads*c.Tokens()*c.VDim),
			Q:     halves(t, "q", c.Steps*c.QueryHeads*c.KDim),
		}
		if rapid.Bool().Draw(t, "has window") {
			c.Window = window
			l.QWindow = halves(t, "q_window", window*c.QueryHeads*c.KDim)
		}
		if rapid.Bool().Draw(t, "has mass") {
			l.Mass = make([]float32, c.QueryHeads*c.N)
			for i := range l.Mass {
				l.Mass[i] = rapid.Float32Range(0, math.MaxFloat32).Draw(t, "mass")
			}
		}
		c.Layers = append(c.Layers, l)
	}
	return c
}
