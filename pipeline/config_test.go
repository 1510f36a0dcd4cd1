package pipeline_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/pipeline"
	"github.com/twilight-sidecar/twilight/pipeline/methods"
)

// tb is what a testing.T and a rapid.T have in common.
type tb interface {
	Helper()
	Fatal(args ...any)
}

func parse(t tb, config string) (*pipeline.Config, error) {
	t.Helper()
	m, err := methods.New()
	if err != nil {
		t.Fatal(err)
	}
	return m.Parse([]byte(config))
}

func mustParse(t tb, config string) *pipeline.Config {
	t.Helper()
	c, err := parse(t, config)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// The configs that Twilight ships, as far as their methods exist here.
const (
	quest1024 = `{
		"compressor": {"type": "none"},
		"selector": {"type": "quest", "token_budget": 1024, "chunk_size": 16},
		"weight_estimator": {"type": "none"},
		"weight_pruner": {"type": "none"},
		"skip_first_two_layers": true
	}`
	questTwilight = `{
		"compressor": {"type": "none"},
		"selector": {"type": "quest", "token_budget": 8192, "chunk_size": 16},
		"weight_estimator": {"type": "min_max_quant", "quant_bit": 4},
		"weight_pruner": {"type": "top_p", "threshold": 0.85},
		"skip_first_two_layers": true
	}`
)

// rest is what our own keys are unless set.
const rest = `, "group": "union", "pin_first_chunk": true, "pin_current_chunk": true, "dense_below": 0, "p_over": "candidates"` + noCoverage + noAudit + `}`

const (
	noCoverage = `, "coverage": 0, "coverage_floor": 512, "coverage_ceiling": 0`
	noAudit    = `, "audit": 0, "audit_mass_floor": 0, "audit_error_ceiling": 0`
	noLimits   = `, "threshold_by_layer": {}, "threshold_by_head": {}, "min_budget": 0, "max_budget": 0`
)

func TestParse(t *testing.T) {
	t.Parallel()
	const (
		noCompressor = `"compressor": {"type": "none"}, `
		skip         = `"skip_first_two_layers": true, "use_estimated_weights_in_attn": false`
		noStages     = noCompressor + `"selector": {"type": "none"}, "weight_estimator": {"type": "none"}, "weight_pruner": {"type": "none"}, `
	)
	for name, test := range map[string]struct{ config, want string }{
		"empty is the default": {" \n", `{` + noCompressor + `
			"selector": {"type": "quest", "token_budget": 8192, "sparsity_rate": 0.25, "chunk_size": 16},
			"weight_estimator": {"type": "min_max_quant", "quant_bit": 4, "equalize": true},
			"weight_pruner": {"type": "top_p", "threshold": 0.85` + noLimits + `}, ` + skip + rest},
		"nothing": {`{}`, `{` + noStages + skip + rest},
		"quest_1024": {quest1024, `{` + noCompressor + `
			"selector": {"type": "quest", "token_budget": 1024, "sparsity_rate": -1, "chunk_size": 16},
			"weight_estimator": {"type": "none"}, "weight_pruner": {"type": "none"}, ` + skip + rest},
		"quest_twi": {questTwilight, `{` + noCompressor + `
			"selector": {"type": "quest", "token_budget": 8192, "sparsity_rate": -1, "chunk_size": 16},
			"weight_estimator": {"type": "min_max_quant", "quant_bit": 4, "equalize": true},
			"weight_pruner": {"type": "top_p", "threshold": 0.85` + noLimits + `}, ` + skip + rest},
		"case and alias of types": {`{"selector": {"type": "FULL"}, "weight_estimator": {"type": "Min_Max_Quant"}, "weight_pruner": {"type": "TOP_P"}}`, `{` + noCompressor + `
			"selector": {"type": "none"}, "weight_estimator": {"type": "min_max_quant", "quant_bit": 4, "equalize": true},
			"weight_pruner": {"type": "top_p", "threshold": 0.85` + noLimits + `}, ` + skip + rest},
		"wrapped": {`{"selector": {"type": "PyramidKV", "num_layers": 9, "selector": {"token_budget": 7, "type": "H2O"}}}`, `{` + noCompressor + `
			"selector": {"type": "pyramidkv", "selector": {"type": "h2o", "token_budget": 7, "sparsity_rate": -1, "recent_share": 0.5},
			"token_budget": 8192, "sparsity_rate": -1, "beta": 20, "num_layers": 9},
			"weight_estimator": {"type": "none"}, "weight_pruner": {"type": "none"}, ` + skip + rest},
		"all keys": {`{"skip_first_two_layers": false, "use_estimated_weights_in_attn": true, "group": "per_query_head",
			"pin_first_chunk": false, "pin_current_chunk": false, "dense_below": 512, "p_over": "all",
			"coverage": 0.97, "coverage_floor": 256, "coverage_ceiling": 4096,
			"audit": 0.001, "audit_mass_floor": 0.7, "audit_error_ceiling": 0.3,
			"weight_pruner": {"threshold": -2.5, "threshold_by_layer": {"0": 1, "17": -7.5}, "threshold_by_head": {"3": [1.5, -2]},
				"min_budget": 16, "max_budget": 1024, "type": "threshold"},
			"weight_estimator": {"quant_bit": 8, "equalize": false, "type": "min_max_quant"},
			"selector": {"chunk_size": 32, "sparsity_rate": 0.5, "token_budget": 7, "type": "quest"}, "compressor": {"type": "none"}}`, `{` + noCompressor + `
			"selector": {"type": "quest", "token_budget": 7, "sparsity_rate": 0.5, "chunk_size": 32},
			"weight_estimator": {"type": "min_max_quant", "quant_bit": 8, "equalize": false},
			"weight_pruner": {"type": "threshold", "threshold": -2.5, "threshold_by_layer": {"0": 1, "17": -7.5},
				"threshold_by_head": {"3": [1.5, -2]}, "min_budget": 16, "max_budget": 1024},
			"skip_first_two_layers": false, "use_estimated_weights_in_attn": true, "group": "per_query_head",
			"pin_first_chunk": false, "pin_current_chunk": false, "dense_below": 512, "p_over": "all",
			"coverage": 0.97, "coverage_floor": 256, "coverage_ceiling": 4096,
			"audit": 0.001, "audit_mass_floor": 0.7, "audit_error_ceiling": 0.3}`},
	} {
		got, err := json.Marshal(mustParse(t, test.config))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(compact(t, test.want), string(got)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func compact(t *testing.T, config string) string {
	t.Helper()
	var b bytes.Buffer
	if err := json.Compact(&b, []byte(config)); err != nil {
		t.Fatalf("the test's own JSON is broken: %v", err)
	}
	return b.String()
}

func TestParseRefuses(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		config, field, text string
		kind                fault.Kind
	}{
		"not JSON":         {`{"group"`, "", "unexpected EOF", fault.Invalid},
		"an array":         {`[1]`, "", "expected a JSON object", fault.Invalid},
		"a number":         {`7`, "", "expected a JSON object", fault.Invalid},
		"garbage":          {`selector: quest`, "", "invalid character", fault.Invalid},
		"cut short":        {`{"group": "union"`, "", "unexpected EOF", fault.Invalid},
		"cut short within": {`{"selector": {"type": "quest"`, "", "unexpected EOF", fault.Invalid},
		"trailing data":    {`{} {}`, "", "goes on after", fault.Invalid},
		"trailing comma":   {"{\n\"group\": \"union\",\n}", "", "line 3: invalid character", fault.Invalid},

		"unknown key":       {`{"weight_prunner": {}}`, "weight_prunner", `unknown key "weight_prunner": did you mean "weight_pruner"? Known here: compressor, selector, weight_estimator, weight_pruner, skip_first_two_layers,`, fault.Invalid},
		"unknown stage key": {`{"weight_pruner": {"type": "top_p", "treshold": 0.9}}`, "weight_pruner.treshold", `unknown key "treshold": did you mean "threshold"? Known here: type, threshold, threshold_by_layer,`, fault.Invalid},
		"other method's":    {`{"selector": {"type": "none", "token_budget": 9}}`, "selector.token_budget", `unknown key "token_budget"; known here: type`, fault.Invalid},
		"another case":      {`{"Group": "union"}`, "Group", `did you mean "group"?`, fault.Invalid},
		"duplicate":         {`{"group": "union", "group": "union"}`, "group", "twice", fault.Invalid},
		"stage twice":       {`{"selector": {"type": "none"}, "selector": {"type": "none"}}`, "selector", "twice", fault.Invalid},
		"duplicate within":  {`{"weight_pruner": {"type": "top_p", "threshold": 0.9, "threshold": 0.8}}`, "weight_pruner.threshold", "twice", fault.Invalid},
		"two types":         {`{"weight_pruner": {"type": "top_p", "type": "none"}}`, "weight_pruner.type", "twice", fault.Invalid},

		"stage is no object":  {`{"selector": "quest"}`, "selector", "expected an object", fault.Invalid},
		"stage is null":       {`{"selector": null}`, "selector", "expected an object", fault.Invalid},
		"no type":             {`{"selector": {"token_budget": 9}}`, "selector.type", "missing", fault.Invalid},
		"type is a number":    {`{"selector": {"type": 9}}`, "selector.type", "expected a string", fault.Invalid},
		"unknown selector":    {`{"selector": {"type": "seer", "r": 64}}`, "selector.type", `selector type "seer" is not available; available: `, fault.Unsupported},
		"misspelt selector":   {`{"selector": {"type": "Queest"}}`, "selector.type", `did you mean "quest"?`, fault.Unsupported},
		"misspelt alias":      {`{"selector": {"type": "ful"}}`, "selector.type", `did you mean "full"?`, fault.Unsupported},
		"unknown estimator":   {`{"weight_estimator": {"type": "h_threshold"}}`, "weight_estimator.type", `available: max_quant, min_max_quant, none`, fault.Unsupported},
		"unknown pruner":      {`{"weight_pruner": {"type": "h_threshold"}}`, "weight_pruner.type", `available: none, threshold, top_p`, fault.Unsupported},
		"unknown compressor":  {`{"compressor": {"type": "squeeze"}}`, "compressor.type", `compressor type "squeeze" is not available; available: none, snap_kv`, fault.Unsupported},
		"string for a number": {`{"weight_pruner": {"type": "top_p", "threshold": "0.9"}}`, "weight_pruner.threshold", "expected a number", fault.Invalid},
		"fraction":            {`{"selector": {"type": "quest", "token_budget": 10.5}}`, "selector.token_budget", "expected an integer", fault.Invalid},
		"beyond int64":        {`{"dense_below": 99999999999999999999}`, "dense_below", "expected an integer", fault.Invalid},
		"number for a flag":   {`{"pin_first_chunk": 1}`, "pin_first_chunk", "expected true or false", fault.Invalid},
		"list for an object":  {`{"selector": {"type": "ds", "channels": []}}`, "selector.channels", "expected an object", fault.Invalid},
		"null":                {`{"group": null}`, "group", "expected a string", fault.Invalid},
		"object for a number": {`{"dense_below": {}}`, "dense_below", "expected an integer", fault.Invalid},

		"wraps nothing":       {`{"selector": {"type": "pyramidkv", "num_layers": 9}}`, "selector.selector", "missing", fault.Invalid},
		"wraps no stage":      {`{"selector": {"type": "pyramidkv", "num_layers": 9, "selector": "quest"}}`, "selector.selector", "expected an object", fault.Invalid},
		"wraps the unknown":   {`{"selector": {"type": "pyramidkv", "selector": {"type": "seer"}}}`, "selector.selector.type", "not available", fault.Unsupported},
		"wraps itself":        {`{"selector": {"type": "pyramidkv", "selector": {"type": "PyramidKV"}}}`, "selector.selector.type", "wraps itself", fault.Invalid},
		"wraps all tokens":    {`{"selector": {"type": "pyramidkv", "num_layers": 9, "selector": {"type": "none"}}}`, "selector.selector.type", "no token_budget", fault.Invalid},
		"unknown key there":   {`{"selector": {"type": "pyramidkv", "num_layers": 9, "selector": {"type": "quest", "budget": 1}}}`, "selector.selector.budget", "known here: type, token_budget", fault.Invalid},
		"bad value there":     {`{"selector": {"type": "pyramidkv", "num_layers": 9, "selector": {"type": "quest", "chunk_size": 3}}}`, "selector.selector.chunk_size", "multiple of 16", fault.Invalid},
		"compressed coverage": {`{"coverage": 0.9, "selector": {"type": "quest"}, "compressor": {"type": "snap_kv"}}`, "coverage", `compressor "snap_kv" drops tokens`, fault.Unsupported},

		"group":         {`{"group": "per_head"}`, "group", `"per_head", expected "union" or "per_query_head"`, fault.Invalid},
		"p_over":        {`{"p_over": ""}`, "p_over", `expected "candidates" or "all"`, fault.Invalid},
		"dense_below":   {`{"dense_below": -2}`, "dense_below", "expected 0..", fault.Invalid},
		"p of 0":        {`{"weight_pruner": {"type": "top_p", "threshold": 0}}`, "weight_pruner.threshold", "(0, 1]", fault.Invalid},
		"no t":          {`{"weight_pruner": {"type": "threshold"}}`, "weight_pruner.threshold", "missing", fault.Invalid},
		"token_budget":  {`{"selector": {"type": "quest", "token_budget": 0}}`, "selector.token_budget", "expected 1..", fault.Invalid},
		"chunk_size":    {`{"selector": {"type": "quest", "chunk_size": 24}}`, "selector.chunk_size", "multiple of 16", fault.Invalid},
		"sparsity_rate": {`{"selector": {"type": "quest", "sparsity_rate": 1.5}}`, "selector.sparsity_rate", "(0, 1]", fault.Invalid},
		"coverage":      {`{"selector": {"type": "quest"}, "coverage": 1.01}`, "coverage", "(0, 1]", fault.Invalid},
		"floor":         {`{"coverage_floor": -1}`, "coverage_floor", "expected 0..", fault.Invalid},
		"ceiling":       {`{"coverage_ceiling": 511}`, "coverage_ceiling", "no less than coverage_floor, which is 512", fault.Invalid},
		"audit":         {`{"audit": 1.01}`, "audit", "in [0, 1]", fault.Invalid},
		"mass floor":    {`{"audit_mass_floor": -0.1}`, "audit_mass_floor", "(0, 1]", fault.Invalid},
		"error ceiling": {`{"audit_error_ceiling": -1}`, "audit_error_ceiling", "no warnings", fault.Invalid},
		"no ranking":    {`{"selector": {"type": "streaming"}, "coverage": 0.9}`, "coverage", `selector "streaming"`, fault.Unsupported},
		"by layer":      {`{"weight_pruner": {"type": "top_p", "threshold_by_layer": {"3": 0}}}`, `weight_pruner.threshold_by_layer["3"]`, "(0, 1]", fault.Invalid},
		"layer twice":   {`{"weight_pruner": {"type": "top_p", "threshold_by_layer": {"3": 1, "3": 1}}}`, `weight_pruner.threshold_by_layer["3"]`, "twice", fault.Invalid},
		"by no layer":   {`{"weight_pruner": {"type": "top_p", "threshold_by_layer": [1]}}`, `weight_pruner.threshold_by_layer`, "expected an object", fault.Invalid},
		"by head":       {`{"weight_pruner": {"type": "top_p", "threshold_by_head": {"3": [1, "1"]}}}`, `weight_pruner.threshold_by_head["3"][1]`, "expected a number", fault.Invalid},
		"by no head":    {`{"weight_pruner": {"type": "top_p", "threshold_by_head": {"3": null}}}`, `weight_pruner.threshold_by_head["3"]`, "expected a list", fault.Invalid},
		"max_budget":    {`{"weight_pruner": {"type": "top_p", "min_budget": 9, "max_budget": 8}}`, "weight_pruner.max_budget", "min_budget, which is 9", fault.Invalid},
		"quant_bit":     {`{"weight_estimator": {"type": "min_max_quant", "quant_bit": 3}}`, "weight_estimator.quant_bit", "expected 2, 4 or 8", fault.Invalid},
	} {
		_, err := parse(t, test.config)
		if f, ok := errors.AsType[*fault.Error](err); !ok {
			t.Errorf("%s: error %v, want a *fault.Error", name, err)
		} else if f.Field != test.field || f.Kind != test.kind || !strings.Contains(f.Text, test.text) {
			t.Errorf("%s: field %q, kind %v, text %q, want %q, %v, a text with %q", name, f.Field, f.Kind, f.Text, test.field, test.kind, test.text)
		}
	}
}

// TestParseFindsAll: every fault is named, each in its place, what is a consequence of another is not.
func TestParseFindsAll(t *testing.T) {
	t.Parallel()
	_, err := parse(t, `{
		"selector": {"type": "quest", "token_budget": 0, "chunk_size": 24, "sparsity_rate": "1", "budget": 1, "type": "none"},
		"weight_estimator": {"type": "min_max", "quant_bit": 3},
		"weight_pruner": {"type": "threshold", "min_budget": -1, "threshold_by_head": {"x": [], "3": [1e300, true, 1e301]}},
		"groop": "union", "group": 1, "p_over": "both", "coverage": 0.5
	}`)
	var faults pipeline.Faults
	if !errors.As(err, &faults) {
		t.Fatalf("error %v, want Faults", err)
	}
	var got []string
	for _, f := range faults {
		got = append(got, f.Field)
	}
	want := []string{
		"selector.sparsity_rate", "selector.budget", "selector.type", "selector.token_budget", "selector.chunk_size",
		"weight_estimator.type",
		`weight_pruner.threshold_by_head["3"][1]`, "weight_pruner.min_budget", "weight_pruner.threshold",
		"groop", "group", "p_over",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	one, ok := errors.AsType[*fault.Error](err)
	if !ok || one.Field != want[0] || !errors.Is(err, fault.Unsupported) || !errors.Is(err, fault.Invalid) {
		t.Fatalf("as one fault: %v", one)
	}
	for _, name := range want[1:] {
		if !strings.Contains(one.Text, "; "+name+": ") || !strings.Contains(err.Error(), "\n"+name+": ") {
			t.Errorf("%q does not name %s", one.Text, name)
		}
	}
}

// TestManyFaults: what is told of a config does not grow with it.
func TestManyFaults(t *testing.T) {
	t.Parallel()
	var b strings.Builder
	for i := range 5000 {
		fmt.Fprintf(&b, `"key %d%s": 1, `, i, strings.Repeat("x", 500))
	}
	_, err := parse(t, `{`+b.String()+`"group": "union"}`)
	if one, _ := errors.AsType[*fault.Error](err); len(one.Error()) > 10000 || !strings.HasSuffix(one.Text, "; and 79 more") {
		t.Errorf("%d bytes, ending in %q", len(one.Error()), one.Text[len(one.Text)-20:])
	}
}

// FuzzParseConfig: whatever comes in, the answer is a *fault.Error or a config that marshals to JSON
// which parses to the same config.
func FuzzParseConfig(f *testing.F) {
	for _, seed := range []string{
		"", "{}", quest1024, questTwilight, `{"group":"per_query_head","p_over":"all","dense_below":7}`,
		`{"weight_pruner":{"type":"threshold","threshold":1e-320}}`, `{"group":"union","group":1}`, `{"a":[{"b":[]}]}`,
		`{"weight_pruner":{"type":"top_p","threshold_by_layer":{"0":1},"threshold_by_head":{"1":[0.5, 1]},"max_budget":9}}`,
		`{"coverage":0.9,"coverage_ceiling":600,"selector":{"type":"quest"}}`, `{"weight_pruner":{"type":"threshold","threshold_by_head":[]}}`,
		`{"selector":{"type":"quest","sparsity_rate":0.1,"chunk_size":32},"skip_first_two_layers":null}`, `{} x`,
		`{"selector":{"type":"pyramidkv","num_layers":2,"selector":{"type":"h2o"}},"compressor":{"type":"snap_kv"}}`, "\xff{\"\xff\":0}",
	} {
		f.Add([]byte(seed))
	}
	m, err := methods.New()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := m.Parse(data)
		if err != nil {
			if f, ok := errors.AsType[*fault.Error](err); !ok || f.Text == "" {
				t.Fatalf("error %#v", err)
			}
			return
		}
		first, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		again, err := m.Parse(first)
		if err != nil {
			t.Fatalf("%s: %v", first, err)
		}
		second, err := json.Marshal(again)
		if err != nil || string(first) != string(second) {
			t.Fatalf("%s became %s (%v)", first, second, err)
		}
	})
}

func TestNewChecksConfig(t *testing.T) {
	t.Parallel()
	c := *mustParse(t, "")
	c.DenseBelow = math.MaxInt32 + 1
	if _, err := pipeline.New(&c, geometry(1, 8, 8)); !errors.Is(err, fault.Invalid) {
		t.Errorf("error %v, want Invalid", err)
	}
}
