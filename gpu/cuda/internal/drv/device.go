//go:build linux && cgo && cuda

package drv

import (
	"gorgonia.org/cu"

	"github.com/twilight-sidecar/twilight/internal/fault"
)

// Find returns the GPU of a UUID, or the only one if that is empty.
func Find(uuid string) (cu.Device, string, error) {
	n, err := cu.NumDevices()
	if err != nil {
		return 0, "", Wrap("cuDeviceGetCount", err)
	}
	var names []string
	for i := range n {
		device, err := cu.GetDevice(i)
		if err != nil {
			return 0, "", Wrap("cuDeviceGet", err)
		}
		name, err := UUID(device)
		if err != nil {
			return 0, "", err
		}
		if name == uuid || uuid == "" && n == 1 {
			return device, name, nil
		}
		names = append(names, name)
	}
	return 0, "", fault.Newf(fault.NotFound, "device", "%q names none of the visible GPUs %q: name one", uuid, names)
}
