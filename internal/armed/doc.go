// Package armed is what both sides of an armed step share: the words in lent memory, in which engine and
// daemon meet without messages, and waiting for them on a CPU. The protocol is in
// proto/twilight/v1/ARMED.md; this package's model test exhausts its interleavings.
package armed
