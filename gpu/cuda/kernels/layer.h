// What every kernel is called with, by value: addresses, and sizes that hold for a whole batch bucket.
// What changes from step to step lies in device memory behind it, so that a captured launch stays right.
// layer.go mirrors Layer, and the module's twilight_layout lets the host check that both agree.
#pragma once
#include <cstddef>
#include <cstdint>

constexpr int kChunk = 16; // tokens of a chunk, kv.ChunkTokens

enum DType : int32_t { F32 = 1, F16, BF16, F8E4M3 }; // kv.DType

enum Path : int32_t { kSparse = 1, kDense, kVoid }; // pipeline.Path

// Why a row did not run as it was to. kRetry: the fused kernel gave up, the chain is to run.
enum Flag : int32_t { kBadRow = 1, kNotFinite = 2, kRetry = 4 };

// K or V of one cache layer in the engine's memory, distances in bytes.
struct Plane {
	const uint8_t *base;
	int64_t page, head, token;
	const float *scales; // one per KV head
};

// Where a head's candidates are cut: kept are those with a larger key, and the first with just this one.
struct CutResult {
	uint32_t key;
	int32_t ties_end; // index behind the last candidate kept that has just `key`
	float most;       // the largest logit
	float coverage;
	uint64_t total; // weight of all candidates; 0 where all are kept
};

// A list row is a (sequence, KV head), asked by the group's query heads, or with per_query_head a
// (sequence, query head); `asking` query heads ask each.
struct Layer {
	Plane k, v;

	// The batch, B sequences.
	const int32_t *lengths, *first; // [B]
	const int32_t *table, *vtable;  // [B][table_stride] page ids
	const int32_t *chunk_ids;       // [B][chunk_stride] shadow chunks; null: they follow from the page
	const int32_t *bad;             // [B] not 0 where twilight_check found ids or lengths out of range, or no tokens
	const int32_t *paths;           // [B] Path
	const double *p;                // [B] share to keep in place of thresholds; 0: none
	const double *thresholds;       // [Hq] the pruner's
	const int32_t *budgets;         // [B] what to select: chunks, or tokens where tokens are ranked

	const uint8_t *queries; // [B][Hq][Dk], strides in bytes
	int64_t query_row, query_head;
	uint8_t *output; // [B][Hq][Dv]
	int64_t output_row, output_head;
	const float *sinks; // [Hq] or null

	// The layer's shadow: per chunk and KV head an INT4 record and an fp16 [max|min]; per KV head the
	// equalisation [Dk]: mean, s (0: not trained, 1 is meant) and the largest |k - mean|.
	uint8_t *int4, *bounds;
	uint8_t *codes;          // or estimates in other widths: internal/lowbit's records
	uint8_t *labels;         // Double Sparsity's: the same of channels [Hkv][label_dim]
	const int32_t *channels; // ascending in weight
	float *mean, *spread, *reach;
	const int32_t *work; // [works][4]: row, chunk, shadow chunk, valid | fresh << 16
	uint32_t *drifted, *drift_flags; // how many of the works strayed; which
	uint64_t *bad_query; // of the first query element that is not finite, flat index << 32 | bits; inverted

	// Scratch.
	float *q;            // [B*Hq][Dk] scaled queries
	uint32_t *q_bounds;  // [B*Hq][2][2*Dk/16][4][2] pairs of halves for scoring: high parts, low parts
	uint32_t *q_int4;    // [B*Hq][2][Dk/16][4][2] likewise for estimating; for codes [B*Hq][Dk] floats
	float *q_sums;       // [B*Hq][4]: q.mean, sum, what the halves are scaled by, unused
	float *q_rank;       // [R][Dk] what tokens are ranked by: a query, or a label
	float *scores;       // [R][chunk_stride], of tokens [R][chunk_stride*16]
	float *head_bounds;  // [R][asking][chunk_stride]
	int32_t *candidates; // [R][candidate_stride] chunks, ascending
	uint16_t *candidate_masks; // which of their tokens are candidates
	int32_t *num_candidates;
	float *logits;       // [R][asking][candidate_stride*16], -inf where no candidate is
	float *first_logits; // [R][asking] of the first valid token
	CutResult *cuts;     // [R][asking]
	float *shares;       // [R][candidate_stride*16] of the heads' weights, where budgets limit lists
	int32_t *list_at;    // [R][candidate_stride*16] where in logits the list's tokens are
	int32_t *tickets; // [R] parts of a row that are done; 0 between launches
	float *partial;  // [R][splits][asking][Dv+2]

	// Results, by list row.
	int32_t *lists; // [R][candidate_stride*16]
	int32_t *kept, *candidate_tokens;
	int32_t *flags; // [B*Hkv]
	float *mass, *coverage;          // [B*Hq]
	uint64_t out_room;               // entries of out_lists, where lists lie one behind another
	int32_t *out_lists, *out_counts; // where twilight_lists puts lists
	uint16_t *kept_masks; // [R][chunk_stride] tokens kept of each chunk, by the fused kernel; or null
	uint64_t *stage_cycles; // [3] clock cycles of the fused kernel's rows to select, prune and attend

	// What a layer of the step left to later ones: candidates, as above, and which layer it was.
	int32_t *carry_layers, *carry_counts; // [R]
	int32_t *carry_chunks;                // [R][chunk_stride]
	uint16_t *carry_masks;

	// Query heads that are computed densely, too: audits of KV heads.
	const int32_t *audited; // [audits] b*Hkv + KV head
	float *audit_logits;    // [audits*G][audit_stride]
	float *audit_results;   // [audits*G][2] true mass, error of the output

	int32_t batch, query_heads, kv_heads, asking, rows;
	int32_t k_dim, v_dim;
	int32_t page_size, num_pages, null_page, chunks;
	int32_t page_shift; // log2 of page_size, or -1
	int32_t table_stride, chunk_stride, candidate_stride;
	int32_t out_capacity; // 0: lists lie one behind another
	int32_t cache_dtype, query_dtype, output_dtype;
	int32_t aligned; // every vector of K and V starts at a multiple of 16 bytes
	int32_t works, splits;
	int32_t fused_own, fused_cap; // chunks that a block of the fused kernel has room for, and candidates
	int32_t lists_only;
	int32_t pin_first, pin_current;
	int32_t over_all; // p is a share of all tokens' weight
	int32_t selects, ranks, estimates, prunes; // Selects, Ranks, Estimates, Prunes
	int32_t sinks_first;                // tokens that kSelectEnds takes of the front
	int32_t rank_channels;              // that kRankLargest looks at
	int32_t label_dim, label_bits;
	int32_t code_bits, code_symmetric, equalise;
	int32_t layer, reselection;         // the model's index, and that of the layer it follows or is; -1: none
	int32_t min_budget, max_budget;     // of a list; 0: no limit
	int32_t use_estimates;              // in attention
	int32_t only_dense;                 // attend for dense rows only
	int32_t audits, audit_stride;
	float softmax_scale, softcap, query_scale;
};

// kSelectEnds: the first and the last tokens. kSelectTokens: the best by rank. kSelectCarried: those that
// an earlier layer found to be the best, or all.
enum Selects : int32_t { kSelectAll, kSelectQuest, kSelectEnds, kSelectTokens, kSelectCarried };
// What tokens are ranked by: keys, their channels in which the query is largest, given channels, labels.
enum Ranks : int32_t { kRankNone, kRankKeys, kRankLargest, kRankChannels, kRankLabels };
enum Estimates : int32_t { kEstimateExact, kEstimateInt4, kEstimateCodes };
enum Prunes : int32_t { kPruneNone, kPruneTopP, kPruneThreshold };
