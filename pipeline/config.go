package pipeline

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strings"

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
	// Compressor shrinks the cache after the prefill.
	Compressor Stage[compressor.Config] `json:"compressor"`
	// Selector picks the candidates, a generous set of tokens whose attention may matter.
	Selector Stage[selector.Config] `json:"selector"`
	// Estimator guesses the candidates' attention logits.
	Estimator Stage[pruner.EstimatorConfig] `json:"weight_estimator"`
	// Pruner cuts the candidates down to the tokens that attention runs over, by those guesses.
	Pruner Stage[pruner.Config] `json:"weight_pruner"`

	// SkipFirstTwoLayers leaves the model's layers 0 and 1 dense.
	SkipFirstTwoLayers bool `json:"skip_first_two_layers"`
	// UseEstimatedWeights attends with the estimated logits in place of the true ones.
	UseEstimatedWeights bool `json:"use_estimated_weights_in_attn"`

	// Group says what the query heads that share a KV head have in common: their candidates and their
	// list, or nothing.
	Group Group `json:"group"`
	// PinFirstChunk and PinCurrentChunk make the chunk of the first valid token and that of the last
	// token candidates, whatever their score.
	PinFirstChunk   bool `json:"pin_first_chunk"`
	PinCurrentChunk bool `json:"pin_current_chunk"`
	// DenseBelow is the number of valid tokens below which rows are dense. With -1, ByCost, a GPU has those
	// dense, step by step, for which that is as fast, and the host device none.
	DenseBelow int `json:"dense_below"`
	// POver says of what top_p's p is a share: of the candidates' weight, or of the estimated weight of
	// all tokens.
	POver POver `json:"p_over"`
	// Coverage, if not 0, is the share of softmax weight that the candidates of each query head are to
	// hold, as far as it can be estimated, in place of the selector's budget. 1 takes every token.
	Coverage float64 `json:"coverage"`
	// CoverageFloor and CoverageCeiling are the least and the largest number of tokens that coverage
	// makes candidates. A ceiling of 0 is none.
	CoverageFloor   int `json:"coverage_floor"`
	CoverageCeiling int `json:"coverage_ceiling"`

	// Audit is the share of rows that are computed densely, too, to tell the true mass that their tokens
	// hold and the error of their output. It costs that share of dense attention.
	Audit float64 `json:"audit"`
	// AuditMassFloor is the true mass below which an audited query head is worth a warning in the
	// daemon's log; 0 for never.
	AuditMassFloor float64 `json:"audit_mass_floor"`
	// AuditErrorCeiling is the relative error of the output above which an audited query head is worth a
	// warning in the daemon's log; 0 for never.
	AuditErrorCeiling float64 `json:"audit_error_ceiling"`
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

// ByCost is the DenseBelow that leaves the choice to the device.
const ByCost = -1

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

// Values lists the group modes.
func (Group) Values() []string { return []string{string(Union), string(PerQueryHead)} }

// Values lists the wholes.
func (POver) Values() []string { return []string{string(OverCandidates), string(OverAll)} }

// Stage is a method that a config chose.
type Stage[C interface{ Validate() error }] = registry.Stage[C]

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

// newConfig has the defaults of all keys but the stages.
func newConfig() *Config {
	return &Config{
		SkipFirstTwoLayers: true,
		Group:              Union,
		PinFirstChunk:      true,
		PinCurrentChunk:    true,
		POver:              OverCandidates,
		CoverageFloor:      512,
	}
}

// Parse reads a Twilight JSON config; empty data means the default config. A stage that is left out is
// "none", a key that is left out has its default. All else that is not exactly as expected is refused:
// unknown and repeated keys, values of another type or out of range, methods that do not exist, data
// after the object. Errors are a *fault.Error, whose field is the path of the key, or Faults if there are
// several.
func (m *Methods) Parse(data []byte) (*Config, error) {
	if len(bytes.TrimSpace(data)) == 0 {
		data = []byte(defaultConfig)
	}
	list, err := members(data)
	if err != nil {
		return nil, err
	}
	c := newConfig()
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
	var faults Faults
	faults.add("", assign(c, list, stages))
	faults.add("", c.ownFaults())
	if len(faults) == 0 { // else what follows from a fault could pass for another
		faults.add("", c.Validate())
	}
	if err := faults.err(); err != nil {
		return nil, err
	}
	return c, nil
}

// Validate reports values out of range, as Parse does, but of each method only the first.
func (c *Config) Validate() error {
	var faults Faults
	faults.add("", c.ownFaults())
	faults.add("compressor", c.Compressor.Config.Validate())
	faults.add("selector", c.Selector.Config.Validate())
	faults.add("weight_estimator", c.Estimator.Config.Validate())
	faults.add("weight_pruner", c.Pruner.Config.Validate())
	if c.Coverage > 0 && len(faults) == 0 {
		if c.Compressor.Type != none {
			faults.add("coverage", fault.Newf(fault.Unsupported, "",
				"coverage takes whole chunks, of which compressor %q drops tokens: leave one of them out", c.Compressor.Type))
		}
		if _, ranks := c.Selector.Config.New().(selector.Ranker); !ranks {
			faults.add("coverage", fault.Newf(fault.Unsupported, "",
				"coverage takes tokens by their scores, but selector %q gives none: choose another, or leave coverage out",
				c.Selector.Type))
		}
	}
	return faults.err()
}

// ownFaults are those of keys that are no method's.
func (c *Config) ownFaults() error {
	var faults Faults
	expect := func(ok bool, key, format string, args ...any) {
		if !ok {
			faults.add(key, fault.Newf(fault.Invalid, "", format, args...))
		}
	}
	expect(slices.Contains(c.Group.Values(), string(c.Group)), "group",
		"group is %q, expected %q or %q", c.Group, Union, PerQueryHead)
	expect(slices.Contains(c.POver.Values(), string(c.POver)), "p_over",
		"p_over is %q, expected %q or %q", c.POver, OverCandidates, OverAll)
	expect(c.DenseBelow >= ByCost && c.DenseBelow <= math.MaxInt32, "dense_below",
		"dense_below is %d, expected 0..%d tokens, or %d to go by costs", c.DenseBelow, math.MaxInt32, ByCost)
	expect(c.Coverage >= 0 && c.Coverage <= 1, "coverage",
		"coverage is %v, expected a share of softmax weight in (0, 1], or 0 to go by the selector's budget", c.Coverage)
	expect(c.CoverageFloor >= 0 && c.CoverageFloor <= math.MaxInt32, "coverage_floor",
		"coverage_floor is %d, expected 0..%d tokens", c.CoverageFloor, math.MaxInt32)
	ceiling := c.CoverageCeiling
	expect(ceiling >= 0 && ceiling <= math.MaxInt32, "coverage_ceiling",
		"coverage_ceiling is %d, expected 1..%d tokens, or 0 for no limit", ceiling, math.MaxInt32)
	expect(ceiling == 0 || ceiling >= c.CoverageFloor, "coverage_ceiling",
		"coverage_ceiling is %d, expected no less than coverage_floor, which is %d", ceiling, c.CoverageFloor)
	expect(c.Audit >= 0 && c.Audit <= 1, "audit", "audit is %v, expected a share of the rows in [0, 1]", c.Audit)
	expect(c.AuditMassFloor >= 0 && c.AuditMassFloor <= 1, "audit_mass_floor",
		"audit_mass_floor is %v, expected a share of softmax weight in (0, 1], or 0 for no warnings", c.AuditMassFloor)
	expect(c.AuditErrorCeiling >= 0 && !math.IsInf(c.AuditErrorCeiling, 0), "audit_error_ceiling",
		"audit_error_ceiling is %v, expected a relative error, or 0 for no warnings", c.AuditErrorCeiling)
	return faults.err()
}

// parse reads a stage, and what it wraps; around are the types that wrap it.
func parse[C interface{ Validate() error }](
	s *Stage[C], data json.RawMessage, methods *registry.Registry[C], around ...string,
) error {
	if data[0] != '{' {
		return fault.Newf(fault.Invalid, "", "value is %s, expected an object with the key type", clip(data))
	}
	list, err := members(data)
	if err != nil {
		return err
	}
	var faults Faults
	s.Type = ""
	for _, m := range list {
		if m.key == "type" && !m.again {
			faults.add("type", decode(m.value, reflect.ValueOf(&s.Type).Elem()))
		}
	}
	if s.Type == "" {
		faults.add("type", fault.Newf(fault.Invalid, "", "type is missing or empty; available: %s", methods))
		return faults.err()
	}
	method, err := methods.Lookup(s.Type)
	if err != nil {
		unknown, _ := errors.AsType[*fault.Error](err)
		if near := nearest(s.Type, names(methods)); near != "" {
			unknown.Text += fmt.Sprintf("; did you mean %q?", near)
		}
		faults.add("", unknown)
		return faults.err()
	}
	if slices.Contains(around, method.Type) {
		faults.add("type", fault.Newf(fault.Invalid, "", "%q wraps itself: name another selector", method.Type))
		return faults.err()
	}
	s.Type, s.Config = method.Type, method.Default()
	special := map[string]func(json.RawMessage) error{
		"type": func(json.RawMessage) error { return nil }, // is done
	}
	lost := false // what it wraps
	if wrapper, ok := any(s.Config).(selector.Wrapper); ok {
		special["selector"] = func(data json.RawMessage) error {
			selectors := any(methods).(*registry.Registry[selector.Config])
			err := parse(wrapper.Wraps(), data, selectors, append(around, s.Type)...)
			lost = wrapper.Wraps().Config == nil
			return err
		}
	}
	faults.add("", assign(s.Config, list, special))
	if !lost {
		faults.add("", outOfRange(s.Config, method.Default()))
	}
	return faults.err()
}

// names are all that a type can be called.
func names[C any](methods *registry.Registry[C]) []string {
	list := methods.Types()
	for _, name := range list {
		if method, err := methods.Lookup(name); err == nil {
			list = append(list, method.Aliases...)
		}
	}
	return list
}

// outOfRange reports each key out of range, though Validate reports only the first: it gives that its
// default, and asks again. A key that has no valid default ends the search.
func outOfRange[C interface{ Validate() error }](config, defaults C) error {
	var faults Faults
	keys, spare := keysOf(config), keysOf(defaults)
	reset := make(map[string]bool)
	for {
		first, ok := errors.AsType[*fault.Error](config.Validate())
		if !ok {
			return faults.err()
		}
		name := first.Field
		if end := strings.IndexAny(name, ".["); end >= 0 {
			name = name[:end]
		}
		if reset[name] {
			return faults.err()
		}
		reset[name] = true
		faults.add("", first)
		if value, ok := valueOf(keys, name); ok {
			unset, _ := valueOf(spare, name)
			value.Set(unset)
		}
	}
}
