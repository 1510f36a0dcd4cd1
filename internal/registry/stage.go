package registry

import "encoding/json"

// Stage is a method that a config chose, by its type, aliases resolved.
type Stage[C any] struct {
	Type   string // "" if none is chosen yet
	Config C
}

// MarshalJSON writes the method's keys behind its type, as Twilight has them.
func (s Stage[C]) MarshalJSON() ([]byte, error) {
	if s.Type == "" {
		return []byte("null"), nil
	}
	name, err := json.Marshal(s.Type)
	if err != nil {
		return nil, err
	}
	keys, err := json.Marshal(s.Config)
	if err != nil {
		return nil, err
	}
	if string(keys) != "{}" {
		keys = append([]byte(","), keys[1:]...)
	} else {
		keys = keys[1:]
	}
	return append(append([]byte(`{"type":`), name...), keys...), nil
}
