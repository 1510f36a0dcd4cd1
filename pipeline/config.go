package pipeline

import (
	"bytes"
	"encoding/json"
	"math"
	"slices"

	"github.com/twilight-sidecar/twilight/compressor"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/registry"
	"github.com/twilight-sidecar/twilight/pruner"
	"github.com/twilight-sidecar/twilight/selector"
)

// Config says how rows are computed: a Twilight JSON config with our own keys beside Twilight's. It is
// made by Methods.Parse, marshals to JSON with every key and its value, and is not to be changed once
// used.
type Config struct {
	Compressor Stage[compressor.Config]      `json:"compressor"`
	Selector   Stage[selector.Config]        `json:"selector"`
	Estimator  Stage[pruner.EstimatorConfig] `json:"weight_estimator"`
	Pruner     Stage[pruner.Config]          `json:"weight_pruner"`

	// SkipFirstTwoLayers leaves the model's layers 0 and 1 dense.
	SkipFirstTwoLayers bool `json:"skip_first_two_layers"`
	// UseEstimatedWeights attends with the estimated logits in place of the true ones.
	UseEstimatedWeights bool `json:"use_estimated_weights_in_attn"`

	// Group says what the query heads that share a KV head have in common.
	Group Group `json:"group"`
	// PinFirstChunk and PinCurrentChunk make the chunk of the first valid token and that of the last
	// token candidates, whatever their score.
	PinFirstChunk   bool `json:"pin_first_chunk"`
	PinCurrentChunk bool `json:"pin_current_chunk"`
	// DenseBelow is the number of valid tokens below which rows are dense.
	DenseBelow int `json:"dense_below"`
	// POver says of what top_p's p is a share.
	POver POver `json:"p_over"`
}

// Group is a group mode.
type Group string

// The group modes.
const (
	// Union: one list of candidates for each row, chosen by the sum of the query heads' scores;
	// estimates and pruning for each query head; the row keeps the union, and each head attends over it.
	Union Group = "union"
	// PerQueryHead: everything for each query head.
	PerQueryHead Group = "per_query_head"
)

// POver is what p is a share of.
type POver string

// The wholes.
const (
	// OverCandidates: the candidates' weight.
	OverCandidates POver = "candidates"
	// OverAll: that and the estimated weight of all other tokens. Where there is no estimate, as
	// Result.Coverage tells, it is OverCandidates.
	OverAll POver = "all"
)

// Stage is a method that a config chose.
type Stage[C any] = registry.Stage[C]

// Methods are what a config can choose from.
type Methods struct {
	Compressors *registry.Registry[compressor.Config]
	Selectors   *registry.Registry[selector.Config]
	Estimators  *registry.Registry[pruner.EstimatorConfig]
	Pruners     *registry.Registry[pruner.Config]
}

// defaultConfig is the paper's usual setting, with the p and the bits that Twilight ships: candidates a
// quarter of the length, estimates in 4 bits.
const defaultConfig = `{
	"selector": {"type": "quest", "sparsity_rate": 0.25},
	"weight_estimator": {"type": "min_max_quant", "quant_bit": 4},
	"weight_pruner": {"type": "top_p", "threshold": 0.85}
}`

// none is the type of the method of each kind that does nothing: of a stage that a config leaves out.
const none = "none"

// Parse reads a Twilight JSON config; empty data means the default config. A stage that is left out is
// "none", a key that is left out has its default. All else that is not exactly as expected is refused:
// unknown and repeated keys, values of another type or out of range, methods that do not exist, data
// after the object. Errors are *fault.Error, whose field is the path of the key.
func (m *Methods) Parse(data []byte) (*Config, error) {
	if len(bytes.TrimSpace(data)) == 0 {
		data = []byte(defaultConfig)
	}
	list, err := members(data)
	if err != nil {
		return nil, err
	}
	c := &Config{
		SkipFirstTwoLayers: true,
		Group:              Union,
		PinFirstChunk:      true,
		PinCurrentChunk:    true,
		POver:              OverCandidates,
	}
	stages := map[string]func(json.RawMessage) error{
		"compressor":       func(data json.RawMessage) error { return parse(&c.Compressor, data, m.Compressors) },
		"selector":         func(data json.RawMessage) error { return parse(&c.Selector, data, m.Selectors) },
		"weight_estimator": func(data json.RawMessage) error { return parse(&c.Estimator, data, m.Estimators) },
		"weight_pruner":    func(data json.RawMessage) error { return parse(&c.Pruner, data, m.Pruners) },
	}
	for key, stage := range stages {
		if err := stage(json.RawMessage(`{"type": "` + none + `"}`)); err != nil {
			return nil, fault.In(key, err)
		}
	}
	if err := assign(c, list, stages); err != nil {
		return nil, err
	}
	return c, c.Validate()
}

// Validate reports the first value out of range as a *fault.Error.
func (c *Config) Validate() error {
	switch c.Group {
	case Union, PerQueryHead:
	default:
		return fault.Newf(fault.Invalid, "group", "group is %q, expected %q or %q", c.Group, Union, PerQueryHead)
	}
	switch c.POver {
	case OverCandidates, OverAll:
	default:
		return fault.Newf(fault.Invalid, "p_over", "p_over is %q, expected %q or %q", c.POver, OverCandidates, OverAll)
	}
	if c.DenseBelow < 0 || c.DenseBelow > math.MaxInt32 {
		return fault.Newf(fault.Invalid, "dense_below", "dense_below is %d, expected 0..%d tokens", c.DenseBelow, math.MaxInt32)
	}
	for _, stage := range []struct {
		key    string
		config interface{ Validate() error }
	}{
		{"compressor", c.Compressor.Config},
		{"selector", c.Selector.Config},
		{"weight_estimator", c.Estimator.Config},
		{"weight_pruner", c.Pruner.Config},
	} {
		if err := stage.config.Validate(); err != nil {
			return fault.In(stage.key, err)
		}
	}
	return nil
}

// parse reads a stage, and what it wraps; around are the types that wrap it.
func parse[C any](s *Stage[C], data json.RawMessage, methods *registry.Registry[C], around ...string) error {
	if data[0] != '{' {
		return fault.Newf(fault.Invalid, "", "value is %s, expected an object with the key type", clip(data))
	}
	list, err := members(data)
	if err != nil {
		return err
	}
	s.Type = ""
	for _, m := range list {
		if m.key == "type" {
			if err := decode(m, &s.Type); err != nil {
				return err
			}
		}
	}
	if s.Type == "" {
		return fault.Newf(fault.Invalid, "type", "type is missing or empty; available: %s", methods)
	}
	method, err := methods.Lookup(s.Type)
	if err != nil {
		return err
	}
	if slices.Contains(around, method.Type) {
		return fault.Newf(fault.Invalid, "type", "%q wraps itself: name another selector", method.Type)
	}
	s.Type, s.Config = method.Type, method.Default()
	special := map[string]func(json.RawMessage) error{
		"type": func(json.RawMessage) error { return nil }, // is done
	}
	if wrapper, ok := any(s.Config).(selector.Wrapper); ok {
		special["selector"] = func(data json.RawMessage) error {
			selectors := any(methods).(*registry.Registry[selector.Config])
			return parse(wrapper.Wraps(), data, selectors, append(around, s.Type)...)
		}
	}
	return assign(s.Config, list, special)
}
