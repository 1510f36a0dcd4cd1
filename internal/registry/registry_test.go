package registry

import (
	"errors"
	"slices"
	"testing"

	"github.com/twilight-sidecar/twilight/internal/fault"
)

func method(name string, aliases ...string) Method[string] {
	return Method[string]{Type: name, Aliases: aliases, Default: func() string { return "default of " + name }}
}

func TestLookup(t *testing.T) {
	t.Parallel()
	r, err := New("selector", method("quest"), method("none", "full", "all"), method("DS"))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"quest": "quest", "QUEST": "quest", "Full": "none", "none": "none", "ALL": "none", "ds": "DS",
	} {
		if m, err := r.Lookup(name); err != nil || m.Type != want || m.Default() != "default of "+want {
			t.Errorf("Lookup(%q) = %q, %v, want %q", name, m.Type, err, want)
		}
	}
	if got, want := r.Types(), []string{"DS", "none", "quest"}; !slices.Equal(got, want) {
		t.Errorf("Types() = %q, want %q", got, want)
	}
	for _, name := range []string{"", "que", "quest "} {
		_, err := r.Lookup(name)
		var f *fault.Error
		if !errors.Is(err, fault.Unsupported) || !errors.As(err, &f) || f.Field != "type" {
			t.Errorf("Lookup(%q): error %v, want one of kind Unsupported about the field type", name, err)
		}
	}
	_, err = r.Lookup("ds2")
	if want := `type: selector type "ds2" is not available; available: DS, none (full, all), quest`; err == nil || err.Error() != want {
		t.Errorf("error %q, want %q", err, want)
	}
}

func TestDuplicates(t *testing.T) {
	t.Parallel()
	for name, methods := range map[string][]Method[string]{
		"two types":          {method("a"), method("a")},
		"another case":       {method("a"), method("A")},
		"alias after type":   {method("a"), method("b", "a")},
		"type after alias":   {method("b", "a"), method("a")},
		"two aliases":        {method("a", "c"), method("b", "c")},
		"own alias":          {method("a", "A")},
		"an alias twice":     {method("a", "b", "b")},
		"last of many names": {method("x", "y"), method("a", "b", "Y")},
	} {
		if r, err := New("pruner", methods...); !errors.Is(err, fault.AlreadyExists) {
			t.Errorf("%s: %v, error %v, want AlreadyExists", name, r, err)
		}
	}
}

func TestRefusedMethodLeavesNoTrace(t *testing.T) {
	t.Parallel()
	r, err := New("pruner", method("a"))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Add(method("b", "fresh", "a")); err == nil {
		t.Fatal("a taken alias was accepted")
	}
	if err := r.Add(method("fresh", "b")); err != nil {
		t.Errorf("names of the refused method are taken: %v", err)
	}
}
