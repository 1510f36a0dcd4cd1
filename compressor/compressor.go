// Package compressor holds what every prompt compressor shares. A compressor drops tokens of a prompt
// once and for all, by what its last queries attended to: none of them is a candidate in any later step.
// Each method is a folder below this one.
package compressor

import (
	"github.com/twilight-sidecar/twilight/internal/registry"
	"github.com/twilight-sidecar/twilight/kv"
)

// Compressor picks the tokens of a prompt that stay. Implementations hold configuration only and are safe
// for concurrent use.
type Compressor interface {
	// Window is how many of the prompt's last queries the method looks at.
	Window() int
	// KeepsAll says whether all of n prompt tokens stay, whatever the queries.
	KeepsAll(n int) bool
	// Compress appends what stays of a prompt to dst: positions in [row.First, row.Len), ascending, each
	// once. KeepsAll of the prompt is false.
	Compress(dst []int32, row *Row) []int32
}

// Row is what a compressor may look at: one KV head of one sequence's prompt, asked by one query head or by
// all that share it. Its slices are the caller's, and read-only but for Scratch.
type Row struct {
	// Queries holds, for each asking query head, those of the positions [Len-Window, Len), [Window][Dim],
	// each multiplied by the softmax scale.
	Queries [][]float32
	Dim     int
	// Softcap shapes logits as attention does; 0 for none.
	Softcap float32

	// First and Len bound the prompt's valid positions: [First, Len), more than Window.
	First, Len int
	Keys       kv.Reader

	// Scratch is reused by the method from call to call with this Row.
	Scratch []float32
}

// Config is a method's configuration: a pointer to a struct whose json tags are the keys that a config
// may set beside "type". All keys have defaults.
type Config interface {
	// Validate reports the first value out of range as a *fault.Error whose field is the key.
	Validate() error
	// New makes the compressor, nil for one that drops nothing. The configuration must be valid and is
	// not kept.
	New() Compressor
}

// Method is a compressor's entry in a registry.
type Method = registry.Method[Config]
