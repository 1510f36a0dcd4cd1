package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/bench"
	"github.com/twilight-sidecar/twilight/internal/replay"
)

// GPU is one that this process owns memory of, as an engine does.
type GPU interface {
	replay.GPUMemory
	bench.Engine
	// Close frees the memory.
	Close() error
}

// OpenGPU takes the GPU of a UUID, to lend its memory in one of the ways.
type OpenGPU func(uuid string, kind gpu.RegionKind) (GPU, error)

// place says where the memory of the engine lies that a command plays.
type place struct {
	Device string `aliases:"backend" default:"host" placeholder:"DEVICE" help:"Where the engine's memory lies: host, cuda for the GPU that the daemon serves, or a GPU's UUID (host)."`
	Lend   string `enum:"ipc,vmm" default:"ipc" help:"How a GPU's memory is lent: ipc, as one allocation, or vmm, by the chunks of virtual memory management (ipc)."`
}

const hostDevice = "host"

// gpuSource gives commands their GPU, or gives them to the binary that has one.
type gpuSource struct {
	open OpenGPU
	args []string
}

// engineBinary is twilight, linked with the CUDA driver.
const engineBinary = "twilight-engine"

// onGPU tells whether the memory is a GPU's. In a process that cannot have any it does not return, unless
// the binary that can is not there: that runs in its place.
func (p *place) onGPU(source *gpuSource) (bool, error) {
	if p.Device == hostDevice {
		return false, nil
	}
	if source.open != nil {
		return true, nil
	}
	self, err := os.Executable()
	if err != nil {
		return false, err
	}
	path := filepath.Join(filepath.Dir(self), engineBinary)
	err = unix.Exec(path, append([]string{engineBinary}, source.args...), os.Environ())
	if errors.Is(err, unix.ENOENT) {
		return false, fmt.Errorf("--device %s needs %s beside %s: make it with 'make build-cuda'", p.Device, engineBinary, self)
	}
	return false, fmt.Errorf("--device %s: %s: %w", p.Device, path, err)
}

// open finds the device that is meant among those that the daemon serves, and takes it.
func (p *place) open(ctx context.Context, conn *client.Client, source *gpuSource) (GPU, error) {
	c, err := conn.Capabilities(ctx, nil)
	if err != nil {
		return nil, err
	}
	var found []string
	for _, d := range c.GetDevices() {
		if d.GetBackend() == "cuda" && (p.Device == "cuda" || p.Device == d.GetId()) {
			found = append(found, d.GetId())
		}
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("--device %s: the daemon serves no such GPU: 'twilight capabilities' lists its devices", p.Device)
	case 1:
		return source.open(found[0], map[string]gpu.RegionKind{"ipc": gpu.CUDAIPC, "vmm": gpu.CUDAVMM}[p.Lend])
	}
	return nil, fmt.Errorf("--device %s: the daemon serves %s: name one", p.Device, strings.Join(found, ", "))
}
