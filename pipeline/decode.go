package pipeline

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"

	"github.com/twilight-sidecar/twilight/internal/fault"
)

// member is a key of a JSON object with its value.
type member struct {
	key   string
	value json.RawMessage
}

// members splits a JSON object. Unlike json.Unmarshal it refuses a key that comes twice.
func members(data []byte) ([]member, error) {
	broken := func(err error) error {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return fault.Newf(fault.Invalid, "", "config is not a JSON object: %v", err)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	switch open, err := dec.Token(); {
	case err != nil:
		return nil, broken(err)
	case open != json.Delim('{'):
		return nil, fault.Newf(fault.Invalid, "", "config is %s, expected a JSON object", clip(data))
	}
	var list []member
	seen := make(map[string]bool)
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return nil, broken(err)
		}
		m := member{key: key.(string)} // what else could open a member is a syntax error
		if err := dec.Decode(&m.value); err != nil {
			return nil, broken(err)
		}
		if seen[m.key] {
			return nil, fault.Newf(fault.Invalid, m.key, "key %q comes twice", m.key)
		}
		seen[m.key] = true
		list = append(list, m)
	}
	if _, err := dec.Token(); err != nil {
		return nil, broken(err)
	}
	if rest := bytes.TrimSpace(data[dec.InputOffset():]); len(rest) > 0 {
		return nil, fault.Newf(fault.Invalid, "", "config goes on after its JSON object: %s", clip(rest))
	}
	return list, nil
}

// assign stores members in the struct that target points to, by the fields' json tags. Keys in special
// are left to its functions. A key that is neither, or a value of another type, is an error that names
// the key and what is expected.
func assign(target any, list []member, special map[string]func(json.RawMessage) error) error {
	fields := reflect.ValueOf(target).Elem()
	byKey := make(map[string]reflect.Value)
	var known []string
	for i := range fields.NumField() {
		key := fields.Type().Field(i).Tag.Get("json")
		byKey[key] = fields.Field(i)
		known = append(known, key)
	}
	for key := range special {
		if _, ok := byKey[key]; !ok {
			known = append([]string{key}, known...)
		}
	}
	for _, m := range list {
		field, ok := byKey[m.key]
		switch handle := special[m.key]; {
		case handle != nil:
			if err := handle(m.value); err != nil {
				return fault.In(m.key, err)
			}
		case !ok:
			return fault.Newf(fault.Invalid, m.key, "key %q is unknown; known here: %s", m.key, strings.Join(known, ", "))
		default:
			if err := decode(m, field.Addr().Interface()); err != nil {
				return err
			}
		}
	}
	return nil
}

// decode stores a member's value, which must have the type that target points to.
func decode(m member, target any) error {
	if string(m.value) != "null" && json.Unmarshal(m.value, target) == nil {
		return nil
	}
	expected := "a number"
	switch reflect.TypeOf(target).Elem().Kind() {
	case reflect.Bool:
		expected = "true or false"
	case reflect.Int:
		expected = "an integer"
	case reflect.String:
		expected = "a string"
	case reflect.Map:
		expected = "an object"
	case reflect.Slice:
		expected = "an array"
	default:
	}
	return fault.Newf(fault.Invalid, m.key, "%s is %s, expected %s", m.key, clip(m.value), expected)
}

// clip quotes no more of what was sent than helps to find it.
func clip(data []byte) string {
	const most = 40
	if data = bytes.TrimSpace(data); len(data) > most {
		return fmt.Sprintf("%q...", data[:most])
	}
	return fmt.Sprintf("%q", data)
}
