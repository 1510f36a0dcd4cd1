// Package service serves the wire contract of proto/twilight/v1: it opens leases, turns their messages
// into calls of a gpu.Device, and faults into errors. It is the only room that makes gRPC statuses.
//
// Everything that an engine registers hangs on its lease, whose stream is served by one goroutine:
// when the stream ends, in whatever way, the device's side of the lease is closed, which waits for what
// runs and releases the rest.
package service
