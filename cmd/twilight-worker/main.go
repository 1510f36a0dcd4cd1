//go:build linux && cgo && cuda

// Command twilight-worker serves one lease on one GPU, for the twilightd that starts it.
package main

import (
	"os"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/cuda"
	"github.com/twilight-sidecar/twilight/service/workers"
)

func main() {
	os.Exit(workers.Main(os.Args[1:], os.Stdout, os.Stderr, workers.Backend{List: list, Open: open}))
}

func list() ([]workers.GPU, error) {
	found, err := cuda.List()
	var gpus []workers.GPU
	for _, g := range found {
		gpus = append(gpus, workers.GPU(g))
	}
	return gpus, err
}

func open(s *workers.Settings, lost func(error)) (gpu.Device, error) {
	return cuda.New(cuda.Options{UUID: s.Device, ShadowBytes: s.ShadowBytes, Lost: lost})
}
