package methods

import (
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
		{"compressors", m.Compressors.Types(), []string{"none"}},
		{"selectors", m.Selectors.Types(), []string{"none", "quest"}},
		{"estimators", m.Estimators.Types(), []string{"min_max_quant", "none"}},
		{"pruners", m.Pruners.Types(), []string{"none", "threshold", "top_p"}},
	} {
		if !slices.Equal(kind.got, kind.want) {
			t.Errorf("%s: %q, want %q", kind.name, kind.got, kind.want)
		}
	}
	for _, name := range m.Selectors.Types() {
		// A config has a "none" for every stage that is left out.
		if s, err := m.Selectors.Lookup(name); err != nil || s.Default().Validate() != nil {
			t.Errorf("selector %q: %v, or its defaults are out of range", name, err)
		}
	}
}
