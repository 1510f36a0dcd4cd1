// Package engine owns memory of a GPU as an inference engine does: it allocates it, writes and reads it,
// exports it to other processes, and fills it with data for benchmarks. A process cannot import what it
// exported, so tests and tools run it in a process of its own. Build with the tag cuda.
package engine
