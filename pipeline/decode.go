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
	again bool // the key came before
}

// members splits a JSON object.
func members(data []byte) ([]member, error) {
	broken := func(err error) error {
		where := ""
		if syntax, ok := errors.AsType[*json.SyntaxError](err); ok {
			where = fmt.Sprintf("line %d: ", 1+bytes.Count(data[:min(int(syntax.Offset), len(data))], []byte("\n")))
		} else if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return fault.Newf(fault.Invalid, "", "config is not a JSON object: %s%v", where, err)
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
		m.again = seen[m.key]
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

// twice is the fault of a key that came before.
func twice(key string) error { return fault.Newf(fault.Invalid, "", "key %q comes twice", short(key)) }

// key is a field of a struct that has a json tag.
type key struct {
	name  string
	value reflect.Value
	owner reflect.Type // the struct that declares it, which may be embedded
	field string
}

// keysOf lists the keys of the struct that target points to.
func keysOf(target any) (keys []key) {
	fields := reflect.ValueOf(target).Elem()
	for i := range fields.NumField() {
		field, value := fields.Type().Field(i), fields.Field(i)
		if field.Anonymous {
			keys = append(keys, keysOf(value.Addr().Interface())...)
			continue
		}
		keys = append(keys, key{field.Tag.Get("json"), value, fields.Type(), field.Name})
	}
	return keys
}

// valueOf is that of a key.
func valueOf(keys []key, name string) (value reflect.Value, ok bool) {
	for _, k := range keys {
		if k.name == name {
			return k.value, true
		}
	}
	return reflect.Value{}, false
}

// assign stores members in the struct that target points to. Keys in special are left to its functions. It
// reports every key that is neither, and every value of another type, with what is expected; those leave
// their fields as they are.
func assign(target any, list []member, special map[string]func(json.RawMessage) error) error {
	keys := keysOf(target)
	var known []string
	for name := range special {
		if _, ok := valueOf(keys, name); !ok {
			known = append(known, name)
		}
	}
	for _, k := range keys {
		known = append(known, k.name)
	}
	var faults Faults
	for _, m := range list {
		value, ok := valueOf(keys, m.key)
		switch handle := special[m.key]; {
		case m.again:
			faults.add(short(m.key), twice(m.key))
		case handle != nil:
			faults.add(m.key, handle(m.value))
		case ok:
			faults.add(m.key, decode(m.value, value))
		default:
			name, hint := short(m.key), "; known here"
			if near := nearest(name, known); near != "" {
				hint = fmt.Sprintf(": did you mean %q? Known here", near)
			}
			faults.add(name, fault.Newf(fault.Invalid, "", "unknown key %q%s: %s", name, hint, strings.Join(known, ", ")))
		}
	}
	return faults.err()
}

// decode stores a JSON value in a field, which stays as it is if the value is of another type.
func decode(value json.RawMessage, field reflect.Value) error {
	decoded := reflect.New(field.Type()).Elem()
	expected := ""
	switch field.Kind() {
	case reflect.Map:
		return decodeMap(value, field)
	case reflect.Slice:
		return decodeSlice(value, field)
	case reflect.Bool:
		expected = "true or false"
	case reflect.Int:
		expected = "an integer"
	case reflect.String:
		expected = "a string"
	default:
		expected = "a number"
	}
	if string(value) == "null" || json.Unmarshal(value, decoded.Addr().Interface()) != nil {
		return fault.Newf(fault.Invalid, "", "value is %s, expected %s", clip(value), expected)
	}
	field.Set(decoded)
	return nil
}

// decodeMap decodes an object whose keys are not known.
func decodeMap(value json.RawMessage, field reflect.Value) error {
	if value[0] != '{' {
		return fault.Newf(fault.Invalid, "", "value is %s, expected an object", clip(value))
	}
	list, err := members(value)
	if err != nil {
		return err
	}
	var faults Faults
	decoded := reflect.MakeMap(field.Type())
	for _, m := range list {
		path, element := fmt.Sprintf("[%q]", short(m.key)), reflect.New(field.Type().Elem()).Elem()
		if m.again {
			faults.add(path, twice(m.key))
		}
		faults.add(path, decode(m.value, element))
		decoded.SetMapIndex(reflect.ValueOf(m.key), element)
	}
	if len(faults) == 0 {
		field.Set(decoded)
	}
	return faults.err()
}

func decodeSlice(value json.RawMessage, field reflect.Value) error {
	var list []json.RawMessage
	if value[0] != '[' || json.Unmarshal(value, &list) != nil {
		return fault.Newf(fault.Invalid, "", "value is %s, expected a list", clip(value))
	}
	var faults Faults
	decoded := reflect.MakeSlice(field.Type(), len(list), len(list))
	for i, element := range list {
		faults.add(fmt.Sprintf("[%d]", i), decode(element, decoded.Index(i)))
	}
	if len(faults) == 0 {
		field.Set(decoded)
	}
	return faults.err()
}

// clip quotes no more of what was sent than helps to find it.
func clip(data []byte) string {
	const most = 40
	if data = bytes.TrimSpace(data); len(data) > most {
		return fmt.Sprintf("%q...", data[:most])
	}
	return fmt.Sprintf("%q", data)
}

// short cuts a key that nobody meant to be one.
func short(key string) string { return fmt.Sprintf("%.60s", key) }

// nearest is the known name that an unknown one was probably meant to be, "" if none is near.
func nearest(name string, known []string) string {
	best, least := "", max(1, len(name)/3)+1
	for _, candidate := range known {
		if difference := len(name) - len(candidate); max(difference, -difference) >= least {
			continue // nor does a long name cost much
		}
		if n := distance(strings.ToLower(name), strings.ToLower(candidate)); n < least {
			best, least = candidate, n
		}
	}
	return best
}

// distance is how many letters of a must be inserted, deleted, replaced or swapped with their neighbour to
// make it b (optimal string alignment).
func distance(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := range len(a) {
		for j := range len(b) {
			replaced := rows[i][j]
			if a[i] != b[j] {
				replaced++
			}
			rows[i+1][j+1] = min(replaced, rows[i][j+1]+1, rows[i+1][j]+1)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				rows[i+1][j+1] = min(rows[i+1][j+1], rows[i-1][j-1]+1)
			}
		}
	}
	return rows[len(a)][len(b)]
}
