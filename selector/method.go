package selector

import "github.com/twilight-sidecar/twilight/internal/registry"

// Config is a method's configuration: a pointer to a struct whose json tags are the keys that a config
// may set beside "type". All keys have defaults or are checked by Validate.
type Config interface {
	// Validate reports the first value out of range as a *fault.Error whose field is the key.
	Validate() error
	// New makes the selector. The configuration must be valid and is not kept.
	New() Selector
}

// Method is a selector's entry in a registry.
type Method = registry.Method[Config]
