//go:build linux && cgo && cuda

package cuda

import (
	"errors"

	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
	"github.com/twilight-sidecar/twilight/internal/fault"
)

var errClosed = fault.Newf(fault.Unavailable, "", "the lease is closed: open another")

// sticky tells whether an error ended the context.
func sticky(err error) bool {
	var code drv.Code
	return errors.As(err, &code) && code.Sticky()
}

// explain turns what the driver says into what the engine is told.
func explain(err error) error {
	var code drv.Code
	if !errors.As(err, &code) {
		return err
	}
	switch {
	case sticky(err):
		return fault.Newf(fault.Unavailable, "",
			"the GPU's context was lost (%v): this worker cannot go on, open a lease anew", err)
	case code == drv.OutOfMemory:
		return fault.Newf(fault.Exhausted, "",
			"the GPU has no memory left for the daemon's work: leave it more, or use smaller batches or sequences")
	}
	return fault.Newf(fault.Internal, "", "the CUDA driver failed (%v): report it", err)
}
