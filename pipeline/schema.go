package pipeline

import (
	"encoding/json"
	"maps"
	"reflect"

	"github.com/twilight-sidecar/twilight/internal/registry"
	"github.com/twilight-sidecar/twilight/selector"
)

// Describe says in words what a field of a config's struct is or, for the field "", what the method is
// whose config the struct is; "" says nothing.
type Describe func(config reflect.Type, field string) string

// object is a JSON object.
type object map[string]any

// Schema writes the JSON Schema (draft 2020-12) of the configs that Parse reads. Ranges are left to Parse,
// and of the case of types, which Parse does not mind, it knows one.
func (m *Methods) Schema(describe Describe) ([]byte, error) {
	schema := describe.object(newConfig())
	schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	schema["title"] = "Twilight config"
	properties := schema["properties"].(object)
	for key, stage := range map[string]object{
		"compressor":       stageSchema(m.Compressors, describe),
		"selector":         stageSchema(m.Selectors, describe),
		"weight_estimator": stageSchema(m.Estimators, describe),
		"weight_pruner":    stageSchema(m.Pruners, describe),
	} {
		maps.Copy(properties[key].(object), stage)
	}
	return json.MarshalIndent(schema, "", "  ")
}

// stageSchema is one of the methods.
func stageSchema[C any](methods *registry.Registry[C], describe Describe) object {
	var choices []object
	for _, name := range methods.Types() {
		method, err := methods.Lookup(name)
		if err != nil {
			continue // is there
		}
		config := method.Default()
		choice := describe.object(config)
		choice["title"] = name
		choice["description"] = describe(reflect.TypeOf(config).Elem(), "")
		choice["properties"].(object)["type"] = object{"enum": append([]string{name}, method.Aliases...)}
		choice["required"] = append(choice["required"].([]string), "type")
		if _, ok := any(config).(selector.Wrapper); ok {
			choice["properties"].(object)["selector"].(object)["$ref"] = "#/properties/selector"
			choice["required"] = append(choice["required"].([]string), "selector")
		}
		choices = append(choices, choice)
	}
	return object{"oneOf": choices, "default": object{"type": none}}
}

// object is the schema of the struct that defaults points to. A key whose default is no JSON has none: it
// is required.
func (describe Describe) object(defaults any) object {
	properties, required := make(object), []string{}
	for _, k := range keysOf(defaults) {
		property := valueSchema(k.value.Type())
		if text := describe(k.owner, k.field); text != "" {
			property["description"] = text
		}
		properties[k.name] = property
		if k.value.Kind() == reflect.Struct {
			continue // a stage
		}
		if text, err := json.Marshal(k.value.Interface()); err == nil {
			property["default"] = json.RawMessage(text)
		} else {
			required = append(required, k.name)
		}
	}
	return object{"type": "object", "properties": properties, "required": required, "additionalProperties": false}
}

func valueSchema(t reflect.Type) object {
	if e, ok := reflect.TypeAssert[interface{ Values() []string }](reflect.Zero(t)); ok {
		return object{"enum": e.Values()}
	}
	switch t.Kind() {
	case reflect.Bool:
		return object{"type": "boolean"}
	case reflect.Int:
		return object{"type": "integer"}
	case reflect.String:
		return object{"type": "string"}
	case reflect.Map:
		return object{"type": "object", "additionalProperties": valueSchema(t.Elem())}
	case reflect.Slice:
		return object{"type": "array", "items": valueSchema(t.Elem())}
	case reflect.Struct:
		return object{}
	default:
		return object{"type": "number"}
	}
}
