// Package host is the CPU as a device: engine memory is mapped from file descriptors, caches read-only,
// and the rows of a layer are shared out to a pool of workers, one (sequence, KV head) at a time.
//
// What comes back does not depend on the number of workers, nor on who else is served.
//
// An engine can shrink a file after lending it, and its pages are then gone. Workers turn the fault
// into fault.DataLoss for that engine; its neighbours and the process go on. Sealing a memfd by
// F_SEAL_SHRINK rules that out.
package host
