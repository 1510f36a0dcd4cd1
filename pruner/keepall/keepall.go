package keepall

import "github.com/twilight-sidecar/twilight/pruner"

// Config has no keys.
type Config struct{}

// Method is the entry for a registry.
func Method() pruner.Method {
	return pruner.Method{Type: "none", Default: func() pruner.Config { return &Config{} }}
}

// Validate implements pruner.Config.
func (*Config) Validate() error { return nil }

// New implements pruner.Config.
func (*Config) New() pruner.Pruner { return all{} }

type all struct{}

func (all) Prune(dst []int32, c *pruner.Candidates) []int32 {
	for i := range c.Logits {
		dst = append(dst, int32(i))
	}
	return dst
}
