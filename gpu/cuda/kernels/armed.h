// What the kernels of armed steps are called with. armed.go mirrors it.
#pragma once
#include "layer.h"

// Entries of a row's tables that are new: `count` of them.
struct Patch {
	int32_t to;   // index into the table
	int32_t from; // index into the entries; V's, if they differ, lie `count` behind
	int32_t count, differ;
};

// A step as twilight_begin finds it, in memory that the host fills for each.
struct Step {
	uint32_t id;    // counts a cache's armed steps, from 1
	int32_t layers;
	int32_t patches;
	int32_t patches_at, entries_at; // bytes from here
	int32_t go_at, run_at;          // [layers]
	int32_t plan_at;                // [layers][4]
};

// A batch in the engine's memory, and where what is made of it goes.
struct Batch {
	const int32_t *lengths, *table, *first; // [rows], [rows][stride], [rows] or null
	const int64_t *slots;

	int32_t *own_lengths, *own_first, *bad; // [rows]
	int32_t *own_table;                     // [rows][own_stride]
	int32_t *sparse_paths, *dense_paths;    // [rows], of layers that may run sparsely, and of the others
	int32_t *budgets;                       // [rows] Layer's

	// What the shadows of all layers hold, by chunk: tokens indexed | tokens covered << 16; and what this
	// step adds, of the chunks that are listed: row, chunk, shadow chunk, unused.
	uint32_t *masks, *wanted;
	int32_t *listed, *num_listed;
	int32_t *work, *plan;        // Layer's
	uint32_t *go, *run;          // Layer's, [layers]
	uint32_t *gate, *news;
	uint32_t *indexed;           // how many tokens are new
	uint32_t *trained, *bad_slot; // the level at which all layers are trained; of a slot out of range, inverted
	uint64_t *training;          // the highest level that a row reaches << 32 | ~row

	double rate; // share of a row's tokens that become candidates, or 0
	int32_t rows, stride, own_stride, max_length, num_slots;
	int32_t page_size, num_pages, null_page, chunks;
	int32_t layers, plain, dense_below, select_all, token_budget, indexes, in_tokens;
	int32_t levels[4]; // at which heads are trained, ascending; 0 behind the last
};
