// Package none leaves the prompt as the prefill made it.
package none

import "github.com/twilight-sidecar/twilight/compressor"

// Config has no keys.
type Config struct{}

// Method is the entry for a registry.
func Method() compressor.Method {
	return compressor.Method{Type: "none", Default: func() compressor.Config { return &Config{} }}
}

// Validate implements compressor.Config.
func (*Config) Validate() error { return nil }

// New implements compressor.Config.
func (*Config) New() compressor.Compressor { return nil }
