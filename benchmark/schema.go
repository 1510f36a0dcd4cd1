// Package benchmark holds the configs that methods are compared by, and the JSON Schema of all configs.
package benchmark

import _ "embed"

// ConfigSchema is the JSON Schema of what a Twilight config may say. Its descriptions are the doc comments of
// the structs that configs are read into.
//
//go:generate go test -run ^TestConfigSchema$ . -update
//go:embed config.schema.json
var ConfigSchema []byte
