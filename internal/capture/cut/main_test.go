package main

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/twilight-sidecar/twilight/internal/capture"
	"github.com/twilight-sidecar/twilight/testdata"
)

// inputs writes the embedded files where the command can read them.
func inputs(t *testing.T) (dir, in, oracle string) {
	t.Helper()
	dir = t.TempDir()
	in, oracle = filepath.Join(dir, "in.safetensors"), filepath.Join(dir, "in.json")
	for path, data := range map[string][]byte{in: testdata.SmolLM2, oracle: testdata.SmolLM2Oracle} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir, in, oracle
}

func TestRun(t *testing.T) {
	t.Parallel()
	dir, in, oracle := inputs(t)
	out, oracleOut := filepath.Join(dir, "out.safetensors"), filepath.Join(dir, "out.json")
	args := []string{
		"--in", in, "--out", out, "--oracle-in", oracle, "--oracle-out", oracleOut,
		"--layers", "2, 17", "--kv-heads", "1", "--origin", "a test",
	}
	var files [2][]byte
	for i := range files {
		if err := run(args); err != nil {
			t.Fatal(err)
		}
		var err error
		if files[i], err = os.ReadFile(out); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(files[0], files[1]) {
		t.Error("two runs gave different files")
	}

	whole, err := capture.Decode(testdata.SmolLM2)
	if err != nil {
		t.Fatal(err)
	}
	cut, err := capture.Decode(files[0])
	if err != nil {
		t.Fatal(err)
	}
	if cut.QueryHeads != 3 || cut.Meta["origin"] != "a test" || !strings.Contains(cut.Meta["cut"], "layers [2, 17], KV heads [1]") {
		t.Errorf("%d query heads, metadata %v", cut.QueryHeads, cut.Meta)
	}
	for i, from := range []int{0, 2} {
		if !slices.Equal(cut.Values(i, 0), whole.Values(from, 1)) || !slices.Equal(cut.Query(i, 7, 2), whole.Query(from, 7, 5)) {
			t.Errorf("layer %d has other values or queries", cut.Layers[i].Index)
		}
	}

	want, err := capture.DecodeOracle(testdata.SmolLM2Oracle)
	if err != nil {
		t.Fatal(err)
	}
	delete(want.Layers, 9)
	for _, steps := range want.Layers {
		for s := range steps {
			steps[s] = steps[s][3:]
		}
	}
	data, err := os.ReadFile(oracleOut)
	if err != nil {
		t.Fatal(err)
	}
	got, err := capture.DecodeOracle(data)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("oracle (-want +got):\n%s", diff)
	}
}

func TestRunRefuses(t *testing.T) {
	t.Parallel()
	dir, in, _ := inputs(t)
	out := filepath.Join(dir, "out.safetensors")
	for name, test := range map[string]struct {
		args []string
		want string
	}{
		"no input":         {[]string{"--in", filepath.Join(dir, "none")}, "none"},
		"no layers":        {[]string{"--in", in, "--out", out, "--kv-heads", "0"}, "no layer given"},
		"not a number":     {[]string{"--layers", "2,x"}, `"x" is no number`},
		"another's oracle": {[]string{"--in", in, "--out", out, "--layers", "2", "--kv-heads", "0", "--oracle-in", in}, "oracle"},
	} {
		if err := run(test.args); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: error %v, want %q", name, err, test.want)
		}
	}
}
