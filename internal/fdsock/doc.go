// Package fdsock carries file descriptors beside gRPC, which cannot: SCM_RIGHTS packets on a
// SOCK_SEQPACKET Unix socket bring them, and one-time tokens name them in the lease. The comment on
// SharedMemory in proto/twilight/v1/memory.proto is the packet's specification.
package fdsock
