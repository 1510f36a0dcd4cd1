// Package kv says what a KV cache is: element types, strided views of engine memory, page tables,
// sequences, and which parts of a cache a shadow already covers.
//
// It is pure bookkeeping and arithmetic: no I/O, no locks. Nothing here writes engine memory.
package kv

// ChunkTokens is the number of adjacent tokens of a sequence that form a chunk, the unit of the
// shadow. Chunk c of a sequence covers table positions [16c, 16c+16).
const ChunkTokens = 16
