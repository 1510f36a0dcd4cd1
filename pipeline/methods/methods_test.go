package methods

import (
	"errors"
	"slices"
	"testing"
)

func TestNew(t *testing.T) {
	t.Parallel()
	m, err := New()
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []struct {
		name      string
		got, want []string
	}{
		{"compressors", m.Compressors.Types(), []string{"none", "snap_kv"}},
		{"selectors", m.Selectors.Types(), []string{
			"adakv", "ds", "duo", "h2o", "magicpig", "none", "oracle_topk", "pqcache", "pyramidkv", "quest", "sparq", "streaming",
			"tidal_decode",
		}},
		{"estimators", m.Estimators.Types(), []string{"max_quant", "min_max_quant", "none"}},
		{"pruners", m.Pruners.Types(), []string{"none", "threshold", "top_p"}},
	} {
		if !slices.Equal(kind.got, kind.want) {
			t.Errorf("%s: %q, want %q", kind.name, kind.got, kind.want)
		}
	}
	// A config has a "none" for every stage that is left out.
	if s, err := m.Selectors.Lookup("none"); err != nil || s.Default().Validate() != nil {
		t.Errorf("selector none: %v, or its defaults are out of range", err)
	}
}

func TestInline(t *testing.T) {
	t.Parallel()
	for name, config := range map[string]string{
		"ds":  `{"selector": {"type": "ds", "config_path": "f"}}`,
		"duo": `{"selector": {"type": "duo", "heads_path": "f"}}`,
	} {
		lost := errors.New("lost")
		if _, err := Inline([]byte(config), func(string) ([]byte, error) { return nil, lost }); !errors.Is(err, lost) {
			t.Errorf("%s: error %v, want what reading gives", name, err)
		}
	}
	const plain = `{"selector": {"type": "quest"}}`
	if got, err := Inline([]byte(plain), nil); err != nil || string(got) != plain {
		t.Errorf("%s, %v, want the config as it was", got, err)
	}
}
