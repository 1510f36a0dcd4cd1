// Package bench times decode layers of the CPU device, and the machine below them.
//
// A machine is as fast as its memory and its arithmetic: it is measured how fast the workers read memory
// that no cache holds, and how fast they multiply vectors that the first cache holds. A layer's limit is
// the longer of its bytes at the one and its operations at the other rate.
//
// The load is that of a decode step: one layer of one sequence at a time. Keys are normal, half of their
// variance shared by the 16 tokens of a chunk; values are normal; the query heads of a group correlate by
// 0.64, and the logits' standard deviation is 3.6 to 4.5, another for each row. Sequences take turns, with
// pages of their own in random order, so that a layer finds none of its data in a cache that is smaller
// than all of them.
//
// What is compared takes turns as well: on a machine with other work, ratios of one run mean something
// where times do not.
package bench
