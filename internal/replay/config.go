package replay

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/twilight-sidecar/twilight/pipeline/methods"
	"github.com/twilight-sidecar/twilight/selector"
)

// Overrides change single keys of a Twilight config. Zero fields change nothing.
type Overrides struct {
	Group       string  // "union" or "per_query_head"
	P           float64 // the share of a top_p pruner
	TokenBudget int     // the selector's, and what SnapKV leaves of a prompt; those without stay as they are
	// NoPruner takes pruner and estimator out: what is kept then are the candidates.
	NoPruner bool
}

// Apply changes a config. What it does not touch stays as it is, unknown keys included: judging those is
// the daemon's part.
func (o Overrides) Apply(config []byte) ([]byte, error) {
	keys := make(map[string]json.RawMessage)
	if err := decodeObject(config, &keys); err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	if o.Group != "" {
		keys["group"] = quote(o.Group)
	}
	if o.P != 0 {
		pruner, err := method(keys, "weight_pruner")
		if err != nil {
			return nil, err
		}
		if !strings.EqualFold(pruner.kind, "top_p") {
			return nil, fmt.Errorf("config: weight_pruner is %q; p belongs to a top_p pruner", pruner.kind)
		}
		pruner.keys["threshold"], _ = json.Marshal(o.P)
		keys["weight_pruner"] = pruner.marshal()
	}
	if o.TokenBudget != 0 {
		selector, err := method(keys, "selector")
		if err != nil {
			return nil, err
		}
		if hasBudget(selector.kind) {
			selector.keys["token_budget"], _ = json.Marshal(o.TokenBudget)
			delete(selector.keys, "sparsity_rate") // it would go first
			keys["selector"] = selector.marshal()
		}
		compressor, err := method(keys, "compressor")
		if err != nil {
			return nil, err
		}
		if isSnapKV(compressor.kind) {
			compressor.keys["max_capacity_prompt"], _ = json.Marshal(o.TokenBudget)
			keys["compressor"] = compressor.marshal()
		}
	}
	if o.NoPruner {
		keys["weight_pruner"] = json.RawMessage(`{"type": "none"}`)
		keys["weight_estimator"] = json.RawMessage(`{"type": "none"}`)
	}
	return json.MarshalIndent(keys, "", "  ")
}

// HasBudget says whether Overrides.TokenBudget would matter to a config. To one that cannot be read it does not.
func HasBudget(config []byte) bool {
	keys := make(map[string]json.RawMessage)
	if err := decodeObject(config, &keys); err != nil {
		return false
	}
	var coverage float64 // takes its place
	_ = json.Unmarshal(keys["coverage"], &coverage)
	selector, err1 := method(keys, "selector")
	compressor, err2 := method(keys, "compressor")
	return err1 == nil && err2 == nil && (isSnapKV(compressor.kind) || coverage == 0 && hasBudget(selector.kind))
}

func isSnapKV(kind string) bool { return strings.EqualFold(kind, "snap_kv") }

// hasBudget says whether selectors of a type have a token_budget: so it is with types nobody knows, for
// the daemon to refuse.
func hasBudget(kind string) bool {
	all, err := methods.New()
	if err != nil {
		return true
	}
	method, err := all.Selectors.Lookup(kind)
	if err != nil {
		return true
	}
	return selector.HasBudget(method.Default())
}

// part is one method of a config.
type part struct {
	kind string
	keys map[string]json.RawMessage
}

func method(keys map[string]json.RawMessage, name string) (part, error) {
	p := part{kind: "none", keys: make(map[string]json.RawMessage)}
	raw, has := keys[name]
	if !has {
		return p, nil
	}
	if err := decodeObject(raw, &p.keys); err != nil {
		return p, fmt.Errorf("config: %s: %w", name, err)
	}
	if kind, has := p.keys["type"]; has {
		if err := json.Unmarshal(kind, &p.kind); err != nil {
			return p, fmt.Errorf("config: %s.type: %w", name, err)
		}
	}
	return p, nil
}

func decodeObject(raw []byte, keys *map[string]json.RawMessage) error {
	if err := json.Unmarshal(raw, keys); err != nil {
		return err
	}
	if *keys == nil {
		return errors.New("is null, expected a JSON object")
	}
	return nil
}

func (p part) marshal() json.RawMessage {
	raw, _ := json.Marshal(p.keys) // of raw messages, which were valid
	return raw
}

func quote(s string) json.RawMessage {
	raw, _ := json.Marshal(s)
	return raw
}
