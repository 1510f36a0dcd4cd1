package selector_test

import (
	"encoding/json"
	"errors"
	"io/fs"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/twilight-sidecar/twilight/selector"
)

// inline is Inline for a type whose file is a JSON value, under limit if the selector says so.
func inline(config string, files map[string]string) (string, error) {
	out, err := selector.Inline([]byte(config), "ds", "path", "lists",
		func(path string) ([]byte, error) {
			if file, has := files[path]; has {
				return []byte(file), nil
			}
			return nil, fs.ErrNotExist
		},
		func(file []byte, keys map[string]json.RawMessage) (any, error) {
			if _, has := keys["refuse"]; has {
				return nil, errors.New("refused")
			}
			return json.RawMessage(file), nil
		})
	return string(out), err
}

func TestInline(t *testing.T) {
	t.Parallel()
	files := map[string]string{"a.json": `[1, 2]`}
	for config, want := range map[string]string{
		`{"selector": {"type": "DS", "path": "a.json", "r": 8, "lists": {}}, "weight_pruner": {"type": "none"}}`: `{"selector": {"type": "DS", "r": 8, "lists": [1, 2]}, "weight_pruner": {"type": "none"}}`,

		`{"selector": {"type": "wrapper", "selector": {"type": "ds", "path": "a.json"}, "path": "b.json"}}`: `{"selector": {"type": "wrapper", "selector": {"type": "ds", "lists": [1, 2]}, "path": "b.json"}}`,
	} {
		got, err := inline(config, files)
		if err != nil {
			t.Fatal(err)
		}
		var x, y any
		if err := errors.Join(json.Unmarshal([]byte(got), &x), json.Unmarshal([]byte(want), &y)); err != nil || !cmp.Equal(x, y) {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

func TestInlineLeavesOthers(t *testing.T) {
	t.Parallel()
	for _, config := range []string{
		``, `x`, `null`, `[]`, `7`, `{}`, `{"selector": null}`, `{"selector": 7}`, `{"selector": {}}`,
		`{"selector": {"type": 7}}`,
		`{"selector": {"type": "quest", "path": "a.json"}}`,
		`{"selector": {"type": "ds"}}`,
		`{"selector": {"type": "ds", "path": ""}}`,
		`{"selector": {"type": "ds", "path": 7}}`,
		`{"selector": {"path": "a.json"}}`,
		`{"selector": {"type": "wrapper", "selector": {"type": "quest", "path": "a.json"}}}`,
		`{"selector": {"type": "wrapper", "selector": null}}`,
	} {
		if got, err := inline(config, nil); err != nil || got != config {
			t.Errorf("%s became %s, error %v", config, got, err)
		}
	}
}

func TestInlineSaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	files := map[string]string{"a.json": `{}`, "b.json": `not JSON`}
	for config, want := range map[string]string{
		`{"selector": {"type": "ds", "path": "no.json"}}`:                "selector.path: file does not exist",
		`{"selector": {"type": "ds", "path": "a.json", "refuse": true}}`: "selector.path: a.json: refused",
		`{"selector": {"type": "ds", "path": "b.json"}}`:                 "selector.path: b.json: json: ",
	} {
		if _, err := inline(config, files); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: error %v, want %s", config, err, want)
		}
	}
	if _, err := inline(`{"selector": {"type": "ds", "path": "no.json"}}`, nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v hides what happened", err)
	}
}
