package capture

import (
	"bytes"
	"encoding/binary"
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestDecodeSmall(t *testing.T) {
	t.Parallel()
	f := smallFile()
	f.set("layer.10.k", 0, 0xc000) // -2
	f.set("layer.10.v", 29, 0x0001)
	f.add("something.else", 7)
	c := mustDecode(t, f.bytes(t))
	if c.Layers[0].Index != 1 || c.Layers[1].Index != 10 {
		t.Errorf("layers %d and %d, want 1 and 10", c.Layers[0].Index, c.Layers[1].Index)
	}
	if c.KDim != 4 || c.VDim != 3 || c.Window != 2 {
		t.Errorf("k_dim %d, v_dim %d, window %d, want 4, 3 and 2", c.KDim, c.VDim, c.Window)
	}
	if got := c.Layers[1].K[0]; got != -2 {
		t.Errorf("first key element %v, want -2", got)
	}
	if got := c.Layers[1].V[29]; got != 0x1p-24 {
		t.Errorf("last value element %v, want 2^-24", got)
	}
}

// TestDecodeDTypes stores the same numbers in each type and wants the same capture.
func TestDecodeDTypes(t *testing.T) {
	t.Parallel()
	want := mustDecode(t, smallFile().bytes(t))
	one := math.Float32bits(1)
	for dtype, element := range map[string][]byte{
		"BF16": binary.LittleEndian.AppendUint16(nil, uint16(one>>16)),
		"F32":  binary.LittleEndian.AppendUint32(nil, one),
	} {
		f := smallFile()
		elements := len(f.body) / 2
		f.body = bytes.Repeat(element, elements)
		for _, e := range f.header {
			if e, ok := e.(*entry); ok {
				e.DType = dtype
				e.Offsets[0] *= uint64(len(element)) / 2
				e.Offsets[1] *= uint64(len(element)) / 2
			}
		}
		if diff := cmp.Diff(want, mustDecode(t, f.bytes(t))); diff != "" {
			t.Errorf("%s (-F16 +%s):\n%s", dtype, dtype, diff)
		}
	}
}

// hostile are files that Decode must refuse, each with what the error must say.
var hostile = map[string]struct {
	spoil func(f *file)
	want  string
}{
	"k missing": {
		func(f *file) { f.header["layer.1.kk"] = f.header["layer.1.k"]; delete(f.header, "layer.1.k") },
		`tensor "layer.1.k" is missing, expected shape [kv_heads, n+steps=5, k_dim]`,
	},
	"q missing in a later layer": {
		func(f *file) { f.header["other"] = f.header["layer.10.q"]; delete(f.header, "layer.10.q") },
		`tensor "layer.10.q" is missing, expected shape [steps=2, query_heads=4, k_dim=4]`,
	},
	"no layers": {
		func(f *file) { f.header = map[string]any{"__metadata__": f.meta()}; f.body = nil },
		"no layers; expected tensors named layer.{l}.k",
	},
	"rank": {
		func(f *file) { f.entry("layer.1.k").Shape = []uint64{2, 20} },
		`tensor "layer.1.k" has shape [2 20], expected [kv_heads, n+steps=5, k_dim]`,
	},
	"absurd rank": {
		func(f *file) { f.entry("layer.1.k").Shape = make([]uint64, 1000) },
		`tensor "layer.1.k" has 1000 dimensions`,
	},
	"tokens": {
		func(f *file) { f.meta()["n"] = "4" },
		`tensor "layer.1.k" has shape [2 5 4], expected [kv_heads, n+steps=6, k_dim]`,
	},
	"steps": {
		func(f *file) { f.entry("layer.1.q").Shape = []uint64{1, 8, 4} },
		`tensor "layer.1.q" has shape [1 8 4], expected [steps=2, query_heads, k_dim=4]`,
	},
	"v heads": {
		func(f *file) { f.entry("layer.1.v").Shape = []uint64{1, 5, 6} },
		`tensor "layer.1.v" has shape [1 5 6], expected [kv_heads=2, n+steps=5, v_dim]`,
	},
	"another layer, another shape": {
		func(f *file) { f.entry("layer.10.q").Shape = []uint64{2, 2, 8} },
		`tensor "layer.10.q" has shape [2 2 8], expected [steps=2, query_heads=4, k_dim=4]`,
	},
	"window of other heads": {
		func(f *file) { f.entry("layer.1.q_window").Shape = []uint64{4, 2, 4} },
		`tensor "layer.1.q_window" has shape [4 2 4], expected [window, query_heads=4, k_dim=4]`,
	},
	"mass of other tokens": {
		func(f *file) { f.entry("layer.1.mass").Shape = []uint64{3, 4} },
		`tensor "layer.1.mass" has shape [3 4], expected [query_heads=4, n=3]`,
	},
	"uneven groups": {
		func(f *file) {
			f.header = map[string]any{"__metadata__": f.meta()}
			f.body = nil
			f.add("layer.0.k", 2, 5, 4)
			f.add("layer.0.v", 2, 5, 4)
			f.add("layer.0.q", 2, 3, 4)
		},
		"q has 3 heads, expected a multiple of the 2",
	},
	"zero dimension": {
		func(f *file) {
			f.header = map[string]any{"__metadata__": f.meta()}
			f.body = nil
			f.add("layer.0.k", 0, 5, 4)
		},
		`tensor "layer.0.k" has shape [0 5 4]`,
	},
	"zero by overflow": {
		func(f *file) { f.entry("layer.1.k").Shape = []uint64{1 << 32, 1 << 32, 5} },
		`tensor "layer.1.k" has 80 bytes, expected those of shape [4294967296 4294967296 5] in F16`,
	},
	"size by overflow": {
		func(f *file) { f.entry("layer.1.k").Shape = []uint64{1<<63 + 40} },
		`tensor "layer.1.k" has 80 bytes`,
	},
	"bytes do not fit the shape": {
		func(f *file) { f.entry("layer.1.v").Shape = []uint64{2, 5, 4} },
		`tensor "layer.1.v" has 60 bytes, expected those of shape [2 5 4] in F16`,
	},
	"bytes do not fit the dtype": {
		func(f *file) { f.entry("layer.1.v").DType = "F32" },
		`tensor "layer.1.v" has 60 bytes, expected those of shape [2 5 3] in F32`,
	},
	"integers": {
		func(f *file) { f.entry("layer.1.v").DType = "I16" },
		`tensor "layer.1.v" is I16, expected F16, BF16 or F32`,
	},
	"unknown dtype": {
		func(f *file) { f.entry("layer.1.v").DType = "F8" },
		`tensor "layer.1.v": invalid DType string value "F8"`,
	},
	"overlap": {
		func(f *file) { f.entry("layer.1.v").Offsets[0] -= 2 },
		`tensor "layer.1.v" begins at byte`,
	},
	"two tensors in one place": {
		func(f *file) { f.header["layer.1.k2"] = f.header["layer.1.k"] },
		`tensor "layer.1.k2" begins at byte`,
	},
	"gap": {
		func(f *file) { f.entry("layer.1.v").Offsets[0] += 2 },
		`tensor "layer.1.v" begins at byte`,
	},
	"offsets reversed": {
		func(f *file) { o := &f.entry("layer.1.mass").Offsets; o[1] = o[0] - 2 },
		`tensor "layer.1.mass" ends at byte`,
	},
	"offset beyond the file": {
		func(f *file) { f.entry("layer.1.mass").Offsets[1] = math.MaxUint64 },
		`tensor "layer.1.mass" ends at byte 18446744073709551615`,
	},
	"negative offset": {
		func(f *file) {
			f.header["layer.1.k"] = map[string]any{"dtype": "F16", "shape": []int{2, 5, 4}, "data_offsets": []int{-80, 0}}
		},
		`tensor "layer.1.k": invalid "data_offsets"`,
	},
	"negative dimension": {
		func(f *file) {
			f.header["layer.1.k"] = map[string]any{"dtype": "F16", "shape": []int{-2, -5, 4}, "data_offsets": []int{0, 80}}
		},
		`tensor "layer.1.k": invalid "shape"`,
	},
	"null tensor": {
		func(f *file) { f.header["layer.1.k"] = nil },
		`tensor "layer.1.k": invalid keys`,
	},
	"truncated": {
		func(f *file) { f.body = f.body[:len(f.body)-1] },
		`tensor "layer.1.mass" ends at byte`,
	},
	"bytes after the end": {
		func(f *file) { f.body = append(f.body, 0) },
		"1 bytes follow the last tensor",
	},
	"infinite key": {
		func(f *file) { f.set("layer.10.k", 3, 0x7c00) },
		`tensor "layer.10.k": value 3 is +Inf`,
	},
	"NaN value": {
		func(f *file) { f.set("layer.1.v", 7, 0x7e00) },
		`tensor "layer.1.v": value 7 is NaN`,
	},
	"infinite query": {
		func(f *file) { f.set("layer.1.q", 31, 0xfc00) },
		`tensor "layer.1.q": value 31 is -Inf`,
	},
	"NaN in the window": {
		func(f *file) { f.set("layer.1.q_window", 0, 0x7e00) },
		`tensor "layer.1.q_window": value 0 is NaN`,
	},
	"NaN mass": {
		func(f *file) { f.set("layer.1.mass", 0, 0x7e00) },
		`tensor "layer.1.mass": value 0 is NaN`,
	},
	"layer not a number": {
		func(f *file) { f.add("layer.x.k", 1) },
		`tensor "layer.x.k": layer "x", expected a plain number`,
	},
	"layer spelled oddly": {
		func(f *file) { f.add("layer.01.k", 1) },
		`tensor "layer.01.k": layer "01", expected a plain number`,
	},
	"negative layer": {
		func(f *file) { f.add("layer.-1.k", 1) },
		`tensor "layer.-1.k": layer "-1", expected a plain number`,
	},
	"layer of optional tensors only": {
		func(f *file) { f.add("layer.3.mass", 4, 3) },
		`tensor "layer.3.k" is missing`,
	},
	"no metadata":       {func(f *file) { delete(f.header, "__metadata__") }, `metadata n is ""`},
	"n missing":         {func(f *file) { delete(f.meta(), "n") }, `metadata n is ""`},
	"n not a number":    {func(f *file) { f.meta()["n"] = "3.0" }, `metadata n is "3.0"`},
	"n zero":            {func(f *file) { f.meta()["n"] = "0" }, "n is 0"},
	"n negative":        {func(f *file) { f.meta()["n"] = "-3" }, "n is -3"},
	"n too large":       {func(f *file) { f.meta()["n"] = "9223372036854775807" }, "n is 9223372036854775807"},
	"steps missing":     {func(f *file) { delete(f.meta(), "steps") }, `metadata steps is ""`},
	"steps zero":        {func(f *file) { f.meta()["steps"] = "0" }, "steps is 0"},
	"scale missing":     {func(f *file) { delete(f.meta(), "scale") }, `metadata scale is ""`},
	"scale zero":        {func(f *file) { f.meta()["scale"] = "0" }, "scale is 0"},
	"scale negative":    {func(f *file) { f.meta()["scale"] = "-0.125" }, "scale is -0.125"},
	"scale infinite":    {func(f *file) { f.meta()["scale"] = "Inf" }, "scale is +Inf"},
	"scale NaN":         {func(f *file) { f.meta()["scale"] = "NaN" }, "scale is NaN"},
	"metadata not text": {func(f *file) { f.meta()["n"] = 3 }, "expected string type"},
}

func TestDecodeRefuses(t *testing.T) {
	t.Parallel()
	for name, test := range hostile {
		f := smallFile()
		test.spoil(f)
		if c, err := Decode(f.bytes(t)); err == nil || c != nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: error %v, want %q", name, err, test.want)
		}
	}
}

func TestDecodeRefusesHeaders(t *testing.T) {
	t.Parallel()
	huge := binary.LittleEndian.AppendUint64(nil, math.MaxUint64)
	for name, test := range map[string]struct {
		data []byte
		want string
	}{
		"empty":               {nil, "0 bytes are no safetensors file"},
		"seven bytes":         {make([]byte, 7), "7 bytes are no safetensors file"},
		"no header":           {make([]byte, 8), "header: "},
		"length overflows":    {append(huge, "{}"...), "header of 18446744073709551615 bytes, expected at most 2"},
		"longer than file":    {withHeader("{}", nil)[:9], "header of 2 bytes, expected at most 1"},
		"larger than we read": {withHeader("{}"+strings.Repeat(" ", maxHeader), nil), "header of 1048578 bytes, expected at most 1048576"},
		"not JSON":            {withHeader("{]", nil), "header: "},
		"not an object":       {withHeader("[]", nil), "header: "},
		"null":                {withHeader("null", nil), `metadata n is ""`},
		"nested":              {withHeader(strings.Repeat("[", 1e5), nil), "header: "},
	} {
		c, err := Decode(test.data)
		if err == nil || c != nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: error %v, want %q", name, err, test.want)
		}
	}
}

// TestDecodeTruncated cuts a file at every length.
func TestDecodeTruncated(t *testing.T) {
	t.Parallel()
	data := smallFile().bytes(t)
	for n := range data {
		if _, err := Decode(data[:n:n]); err == nil {
			t.Fatalf("%d of %d bytes were taken for a capture", n, len(data))
		}
	}
}

// FuzzDecode gets header and body apart, so that few inputs end at a wrong header length; lie is
// what the length is wrong by.
func FuzzDecode(f *testing.F) {
	add := func(spoil func(f *file), lie uint64) {
		s := smallFile()
		spoil(s)
		data := s.bytes(f)
		header := data[8 : 8+binary.LittleEndian.Uint64(data)]
		f.Add(lie, header, s.body)
	}
	add(func(*file) {}, 0)
	add(func(*file) {}, 1)
	for _, test := range hostile {
		add(test.spoil, 0)
	}
	f.Fuzz(func(t *testing.T, lie uint64, header, body []byte) {
		data := withHeader(string(header), body)
		binary.LittleEndian.PutUint64(data, uint64(len(header))+lie)
		c, err := Decode(data)
		if err != nil {
			return
		}
		values := 0
		for _, l := range c.Layers {
			values += len(l.K) + len(l.V) + len(l.Q) + len(l.QWindow) + len(l.Mass)
		}
		if 2*values > len(data) {
			t.Fatalf("%d values came out of %d bytes", values, len(data))
		}
		for i := range c.Layers {
			for step := range c.Steps {
				for head := range c.QueryHeads {
					if out, weights := c.Dense(i, step, head, nil); len(out) != c.VDim || len(weights) != c.N+step+1 {
						t.Fatalf("%d outputs of %d weights, want %d of %d", len(out), len(weights), c.VDim, c.N+step+1)
					}
				}
			}
		}
	})
}

// FuzzDecodeOracle wants an error or an oracle, never a panic.
func FuzzDecodeOracle(f *testing.F) {
	f.Add([]byte(`{"n":3,"scale":0.5,"layers":{"1":[[{"norm":1,"out4":[1,2,3,4],"budget":{"0.85":2},"sink4":0.5}]]}}`))
	f.Add([]byte(`{"layers":{"x":[]}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if o, err := DecodeOracle(data); (o == nil) == (err == nil) {
			t.Fatalf("oracle %v, error %v", o, err)
		}
	})
}
