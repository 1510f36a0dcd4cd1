//go:build linux && cgo && cuda

package cuda

import (
	"errors"
	"fmt"

	"gorgonia.org/cu"

	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
)

// mpsEnabled is CU_DEVICE_ATTRIBUTE_MPS_ENABLED, of CUDA 12.4 and later: contexts are an MPS server's.
const mpsEnabled cu.DeviceAttribute = 133

// Found is a visible GPU.
type Found struct {
	UUID, Name  string
	MemoryBytes uint64
	Capability  string // as in "9.0"
	MPS         bool   // contexts are an MPS server's
}

// List tells the visible GPUs, and makes no context.
func List() ([]Found, error) {
	n, err := cu.NumDevices()
	if err != nil {
		return nil, drv.Wrap("cuDeviceGetCount", err)
	}
	var list []Found
	for i := range n {
		device, err := cu.GetDevice(i)
		if err != nil {
			return nil, drv.Wrap("cuDeviceGet", err)
		}
		uuid, uuidErr := drv.UUID(device)
		name, nameErr := device.Name()
		memory, memoryErr := device.TotalMem()
		major, majorErr := device.Attribute(cu.ComputeCapabilityMajor)
		minor, minorErr := device.Attribute(cu.ComputeCapabilityMinor)
		if err := errors.Join(uuidErr, nameErr, memoryErr, majorErr, minorErr); err != nil {
			return nil, fmt.Errorf("GPU %d: %w", i, err)
		}
		mps, _ := device.Attribute(mpsEnabled) // an older driver does not know it
		list = append(list, Found{
			UUID: uuid, Name: name, MemoryBytes: uint64(memory), Capability: fmt.Sprintf("%d.%d", major, minor), MPS: mps == 1,
		})
	}
	return list, nil
}
