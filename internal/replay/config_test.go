package replay

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestOverrides(t *testing.T) {
	t.Parallel()
	const config = `{"selector": {"type": "Quest", "sparsity_rate": 0.5}, "weight_pruner": {"type": "Top_P", "threshold": 0.85},
		"weight_estimator": {"type": "min_max_quant"}, "unknown": [1]}`
	for name, tc := range map[string]struct {
		o    Overrides
		in   string
		want string
	}{
		"nothing": {Overrides{}, config, config},
		"all": {
			Overrides{Group: "union", P: 0.5, TokenBudget: 64},
			config,
			`{"selector": {"type": "Quest", "token_budget": 64}, "weight_pruner": {"type": "Top_P", "threshold": 0.5},
			"weight_estimator": {"type": "min_max_quant"}, "unknown": [1], "group": "union"}`,
		},
		"no pruner": {
			Overrides{NoPruner: true},
			config,
			`{"selector": {"type": "Quest", "sparsity_rate": 0.5}, "weight_pruner": {"type": "none"},
			"weight_estimator": {"type": "none"}, "unknown": [1]}`,
		},
		"budget of a compressor": {
			Overrides{TokenBudget: 96},
			`{"compressor": {"type": "SNAP_KV", "window_size": 8}, "selector": {"type": "none"}}`,
			`{"compressor": {"type": "SNAP_KV", "window_size": 8, "max_capacity_prompt": 96}, "selector": {"type": "none"}}`,
		},
		"budget of none": {Overrides{TokenBudget: 64}, `{"selector": {"type": "Full"}}`, `{"selector": {"type": "Full"}}`},
		"budget without": {Overrides{TokenBudget: 64}, `{}`, `{}`},
	} {
		got, err := tc.o.Apply([]byte(tc.in))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if diff := cmp.Diff(decoded(t, []byte(tc.want)), decoded(t, got)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestHasBudget(t *testing.T) {
	t.Parallel()
	for config, want := range map[string]bool{
		`{"selector": {"type": "Quest"}}`:                   true,
		`{"selector": {"type": "quest"}, "coverage": 0}`:    true,
		`{"selector": {"type": "quest"}, "coverage": 0.97}`: false,
		`{"selector": {"type": "none"}}`:                    false,
		`{"compressor": {"type": "snap_kv"}}`:               true,
		`{"compressor": {"type": "none"}}`:                  false,
		`{"selector": {"type": "magicpig"}}`:                false,
		`{}`:                                                false,
		`[]`:                                                false,
	} {
		if got := HasBudget([]byte(config)); got != want {
			t.Errorf("%s: %v", config, got)
		}
	}
}

func decoded(t *testing.T, data []byte) (v any) {
	t.Helper()
	if err := json.Unmarshal(data, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestOverridesRefuse(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		o         Overrides
		in, names string
	}{
		{Overrides{}, ``, "config"},
		{Overrides{}, `null`, "config"},
		{Overrides{}, `[]`, "config"},
		{Overrides{P: 0.5}, `{}`, "top_p"},
		{Overrides{P: 0.5}, `{"weight_pruner": {"type": "threshold"}}`, `"threshold"`},
		{Overrides{P: 0.5}, `{"weight_pruner": null}`, "weight_pruner"},
		{Overrides{P: 0.5}, `{"weight_pruner": {"type": 3}}`, "weight_pruner.type"},
		{Overrides{TokenBudget: 3}, `{"selector": 3}`, "selector"},
		{Overrides{TokenBudget: 3}, `{"compressor": 3}`, "compressor"},
	} {
		if _, err := tc.o.Apply([]byte(tc.in)); err == nil || !strings.Contains(err.Error(), tc.names) {
			t.Errorf("%+v of %s: error %v does not name %s", tc.o, tc.in, err, tc.names)
		}
	}
}
