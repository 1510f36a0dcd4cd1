// Package workers keeps GPUs out of the daemon's process: a lease on a GPU is a process of its own, a
// worker, which serves the lease's stream at its own socket. What one engine's lease does to its GPU
// context, or a driver to its process, stays there; a worker that is killed gives its memory back at once.
//
// The daemon's side is Supervisor: it starts workers, keeps spares of them warm, opens leases on them,
// watches them, gathers what they have to tell, and ends them. The worker's side is Main. Between the two is
// a socket pair, on which the worker serves proto/twilight/worker/v1.
package workers
