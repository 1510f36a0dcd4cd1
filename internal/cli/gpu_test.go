package cli

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/twilight-sidecar/twilight/gpu"
)

func TestDevice(t *testing.T) {
	t.Parallel()
	replay := []string{
		"replay", "--capture", "../../testdata/smollm2-demo.safetensors", "--config", "../../benchmark/configs/config_full.json",
		"--target", daemon(t), "--device",
	}
	bench := []string{"bench", "--target", daemon(t), "--tokens", "64", "--device"}
	opened := func(string, gpu.RegionKind) (GPU, error) { return nil, errors.New("opened") }
	for _, tc := range []struct {
		args []string
		open OpenGPU
		says []string
	}{
		// There is no twilight-engine beside a test.
		{append(replay, "cuda"), nil, []string{"--device cuda", "twilight-engine", "make build-cuda"}},
		{append(bench, "cuda"), nil, []string{"--device cuda", "twilight-engine", "make build-cuda"}},
		{append(replay, "cuda"), opened, []string{"--device cuda", "no such GPU"}},
		{append(bench, "GPU-7"), opened, []string{"--device GPU-7", "no such GPU"}},
	} {
		var out, errs bytes.Buffer
		if code := run(t.Context(), tc.args, &out, &errs, tc.open); code != exitFailed || out.Len() > 0 {
			t.Errorf("%q exited %d and printed %q", tc.args, code, &out)
		}
		for _, what := range tc.says {
			if !strings.Contains(errs.String(), what) {
				t.Errorf("%q says %q, not %q", tc.args, &errs, what)
			}
		}
	}
}
