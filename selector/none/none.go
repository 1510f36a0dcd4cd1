package none

import (
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/selector"
)

// Config has no keys.
type Config struct{}

// Method is the entry for a registry.
func Method() selector.Method {
	return selector.Method{
		Type:    "none",
		Aliases: []string{"full"},
		Default: func() selector.Config { return &Config{} },
	}
}

// Validate implements selector.Config.
func (*Config) Validate() error { return nil }

// New implements selector.Config.
func (*Config) New() selector.Selector { return all{} }

type all struct{}

func (all) Shadow() kv.Shadow { return nil }

func (all) Select(dst []int32, row *selector.Row) []int32 { return selector.All(dst, row) }
