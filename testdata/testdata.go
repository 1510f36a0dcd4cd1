// Package testdata embeds a real attention capture, for the demo and for tests. README.md tells
// its origin and licences.
package testdata

import _ "embed"

// SmolLM2 is a capture in the format of internal/capture: layers 2, 9 and 17 of
// SmolLM2-135M-Instruct with 2 KV heads and their 6 query heads, 4096 prefill tokens, what their last 64
// asked and what attention each got, and 8 decode steps. Do not modify it.
//
//go:embed smollm2-demo.safetensors
var SmolLM2 []byte

// SmolLM2Oracle holds figures of dense attention on SmolLM2, computed in float64 by another
// program, as JSON. Do not modify it.
//
//go:embed smollm2-demo.oracle.json
var SmolLM2Oracle []byte
