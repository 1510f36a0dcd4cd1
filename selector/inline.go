package selector

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
)

// Inline puts into a Twilight config what a file holds that its selector names, as a daemon never opens a
// file for an engine: clients call it, by way of the methods, before they send a config. If the config's
// selector is of the given type and names a file under pathKey, convert turns the file into the value
// that replaces it under key; it may look at the selector's keys. So it is with a selector that another
// one wraps. Any other config, and what is no config at all, is returned as it is.
func Inline(
	config []byte, typ, pathKey, key string, read func(path string) ([]byte, error),
	convert func(file []byte, keys map[string]json.RawMessage) (any, error),
) ([]byte, error) {
	stages := value[map[string]json.RawMessage](config)
	keys := value[map[string]json.RawMessage](stages["selector"])
	if _, wraps := keys["selector"]; wraps {
		wrapper, err := Inline(stages["selector"], typ, pathKey, key, read, convert)
		if err != nil {
			return nil, fmt.Errorf("selector.%w", err)
		}
		if bytes.Equal(wrapper, stages["selector"]) {
			return config, nil
		}
		stages["selector"] = wrapper
		return json.Marshal(stages)
	}
	path := value[string](keys[pathKey])
	if !strings.EqualFold(value[string](keys["type"]), typ) || path == "" {
		return config, nil
	}
	file, err := read(path)
	if err != nil {
		return nil, fmt.Errorf("selector.%s: %w", pathKey, err)
	}
	content, err := convert(file, keys)
	if err != nil {
		return nil, fmt.Errorf("selector.%s: %s: %w", pathKey, path, err)
	}
	if keys[key], err = json.Marshal(content); err != nil {
		return nil, fmt.Errorf("selector.%s: %s: %w", pathKey, path, err)
	}
	delete(keys, pathKey)
	if stages["selector"], err = json.Marshal(keys); err != nil {
		return nil, err
	}
	return json.Marshal(stages)
}

// value reads a JSON value of a type; of anything else it makes the zero value.
func value[T any](data []byte) (v T) {
	if json.Unmarshal(data, &v) != nil {
		return *new(T)
	}
	return v
}
