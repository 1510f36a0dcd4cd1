package benchmark

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/doc"
	"go/parser"
	"go/token"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/twilight-sidecar/twilight/pipeline/methods"
)

var update = flag.Bool("update", false, "write config.schema.json anew")

const module = "github.com/twilight-sidecar/twilight/"

// TestConfigSchema: the published schema is that of the code.
func TestConfigSchema(t *testing.T) {
	t.Parallel()
	m, err := methods.New()
	if err != nil {
		t.Fatal(err)
	}
	s := source{t, make(map[string]*doc.Package)}
	want, err := m.Schema(s.describe)
	if err != nil {
		t.Fatal(err)
	}
	want = append(want, '\n')
	if *update {
		if err := os.WriteFile("config.schema.json", want, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if !bytes.Equal(ConfigSchema, want) {
		t.Error("config.schema.json is not current: run go generate ./benchmark")
	}
}

// source reads doc comments.
type source struct {
	t        *testing.T
	packages map[string]*doc.Package
}

// describe implements pipeline.Describe.
func (s source) describe(config reflect.Type, field string) string {
	s.t.Helper()
	pkg := s.load(config.PkgPath())
	for _, typ := range pkg.Types {
		if typ.Name != config.Name() {
			continue
		}
		switch {
		case field != "":
			return s.field(typ, config, field)
		case typ.Name != "Config":
			return s.sentence(typ.Doc, typ.Name)
		}
	}
	return s.sentence(pkg.Synopsis(pkg.Doc), "Package "+pkg.Name)
}

// sentence cuts the name off a comment.
func (s source) sentence(comment, name string) string {
	s.t.Helper()
	text, ok := strings.CutPrefix(strings.Join(strings.Fields(comment), " "), name+" ")
	if !ok {
		s.t.Fatalf("comment %q, expected it to begin with %q", comment, name)
	}
	text = strings.TrimPrefix(text, "is ")
	return strings.ToUpper(text[:1]) + text[1:]
}

// field is the comment of a field with keys in place of names. Fields may share one.
func (s source) field(typ *doc.Type, config reflect.Type, name string) string {
	keys := make(map[string]string)
	for f := range config.Fields() {
		keys[f.Name] = f.Tag.Get("json")
	}
	comment := ""
	for _, f := range typ.Decl.Specs[0].(*ast.TypeSpec).Type.(*ast.StructType).Fields.List {
		if text := f.Doc.Text(); text != "" {
			comment = text
		}
		for _, ident := range f.Names {
			if ident.Name == name && strings.Contains(comment, name) {
				words := regexp.MustCompile(`\b[A-Z]\w*\b`).ReplaceAllStringFunc(comment, func(word string) string {
					if key := keys[word]; key != "" {
						return key
					}
					return word
				})
				return strings.Join(strings.Fields(words), " ")
			}
		}
	}
	s.t.Errorf("%v.%s has no doc comment that names it", config, name)
	return ""
}

// load parses a package of the module.
func (s source) load(path string) *doc.Package {
	s.t.Helper()
	if pkg, ok := s.packages[path]; ok {
		return pkg
	}
	files, err := filepath.Glob(filepath.Join("..", strings.TrimPrefix(path, module), "*.go"))
	if err != nil {
		s.t.Fatal(err)
	}
	var parsed []*ast.File
	set := token.NewFileSet()
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(set, file, nil, parser.ParseComments)
		if err != nil {
			s.t.Fatal(err)
		}
		parsed = append(parsed, f)
	}
	pkg, err := doc.NewFromFiles(set, parsed, path, doc.AllDecls|doc.PreserveAST)
	if err != nil {
		s.t.Fatal(err)
	}
	s.packages[path] = pkg
	return pkg
}

// TestSchemaTakes: the configs in configs/ are valid by the schema, as they stand and with every key.
func TestSchemaTakes(t *testing.T) {
	t.Parallel()
	m, err := methods.New()
	if err != nil {
		t.Fatal(err)
	}
	var files []string
	for _, glob := range []string{"configs/*.json", "configs/*/*.json"} {
		some, err := filepath.Glob(glob)
		if err != nil || len(some) == 0 {
			t.Fatalf("%s: %v, %v", glob, some, err)
		}
		files = append(files, some...)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		texts := [][]byte{text}
		if config, err := m.Parse(text); err == nil {
			whole, err := json.Marshal(config)
			if err != nil {
				t.Fatal(err)
			}
			texts = append(texts, whole)
		}
		for _, text := range texts {
			if err := valid(t, text); err != nil {
				t.Errorf("%s: %v", file, err)
			}
		}
	}
}

// TestSchemaRefuses: what Parse refuses but for ranges is not.
func TestSchemaRefuses(t *testing.T) {
	t.Parallel()
	for _, config := range []string{
		`7`, `{"x": 1}`, `{"coverage": "1"}`, `{"coverage_floor": 1.5}`, `{"group": "per_head"}`, `{"pin_first_chunk": 1}`,
		`{"selector": {}}`, `{"selector": {"type": "seer"}}`, `{"selector": {"type": "none", "token_budget": 9}}`,
		`{"selector": {"type": "adakv"}}`, `{"selector": {"type": "adakv", "selector": {"type": "quest", "k": 1}}}`,
		`{"weight_pruner": {"type": "threshold"}}`, `{"weight_pruner": {"type": "top_p", "treshold": 1}}`,
		`{"weight_pruner": {"type": "top_p", "threshold_by_head": {"0": 1}}}`,
		`{"weight_pruner": {"type": "top_p", "threshold_by_layer": {"0": "1"}}}`,
	} {
		if valid(t, []byte(config)) == nil {
			t.Errorf("%s is valid", config)
		}
	}
	if err := valid(t, []byte(`{"selector": {"type": "full"}, "weight_pruner": {"type": "top_p", "threshold_by_head": {"0": [1, 0.5]}}}`)); err != nil {
		t.Error(err)
	}
}

// valid checks a config by the words of JSON Schema that ours uses.
func valid(t *testing.T, config []byte) error {
	t.Helper()
	var schema map[string]any
	var value any
	if err := errors.Join(json.Unmarshal(ConfigSchema, &schema), json.Unmarshal(config, &value)); err != nil {
		t.Fatal(err)
	}
	return conforms(value, schema, schema)
}

// conforms checks a value by a part of the schema root.
func conforms(value any, schema, root map[string]any) error {
	var errs []error
	check := func(ok bool, word string) {
		if !ok {
			errs = append(errs, fmt.Errorf("%v is against %s: %v", value, word, schema[word]))
		}
	}
	members, isObject := value.(map[string]any)
	elements, isArray := value.([]any)
	number, isNumber := value.(float64)
	for word, of := range schema {
		switch word {
		case "type":
			_, isString := value.(string)
			_, isBool := value.(bool)
			check(map[any]bool{
				"object": isObject, "array": isArray, "number": isNumber, "string": isString, "boolean": isBool,
				"integer": isNumber && number == math.Trunc(number),
			}[of], word)
		case "enum":
			check(slices.Contains(of.([]any), value), word)
		case "required":
			for _, key := range of.([]any) {
				_, has := members[key.(string)]
				check(has, word)
			}
		case "items":
			for _, element := range elements {
				errs = append(errs, conforms(element, of.(map[string]any), root))
			}
		case "properties":
			for key, schema := range of.(map[string]any) {
				if member, has := members[key]; has {
					errs = append(errs, conforms(member, schema.(map[string]any), root))
				}
			}
		case "additionalProperties":
			properties, _ := schema["properties"].(map[string]any)
			for key, member := range members {
				if _, known := properties[key]; known {
					continue
				}
				if schema, ok := of.(map[string]any); ok {
					errs = append(errs, conforms(member, schema, root))
				} else {
					check(of.(bool), word)
				}
			}
		case "oneOf":
			matching := 0
			for _, choice := range of.([]any) {
				if conforms(value, choice.(map[string]any), root) == nil {
					matching++
				}
			}
			check(matching == 1, word)
		case "$ref":
			key := strings.TrimPrefix(of.(string), "#/properties/")
			errs = append(errs, conforms(value, root["properties"].(map[string]any)[key].(map[string]any), root))
		case "$schema", "title", "description", "default":
		default:
			errs = append(errs, fmt.Errorf("the schema says %s, which this test does not know", word))
		}
	}
	return errors.Join(errs...)
}
