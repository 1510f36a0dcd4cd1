package pruner

import "github.com/twilight-sidecar/twilight/internal/registry"

// EstimatorConfig is an estimator's configuration: a pointer to a struct whose json tags are the keys
// that a config may set beside "type". All keys have defaults or are checked by Validate.
type EstimatorConfig interface {
	// Validate reports the first value out of range as a *fault.Error whose field is the key.
	Validate() error
	// New makes the estimator. The configuration must be valid and is not kept.
	New() Estimator
}

// Config is a pruner's configuration, as EstimatorConfig is an estimator's.
type Config interface {
	Validate() error
	New() Pruner
}

// EstimatorMethod is an estimator's entry in a registry.
type EstimatorMethod = registry.Method[EstimatorConfig]

// Method is a pruner's entry in a registry.
type Method = registry.Method[Config]
