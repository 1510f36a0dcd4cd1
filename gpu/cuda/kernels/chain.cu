// A layer as a chain of kernels: any shape, any device. The arithmetic is the reference's; sums that
// decide anything are of integers, so that results do not depend on the order of threads.
#include "device.cuh"
#include "index.cuh"

// Checks ids and lengths before anything reads memory by them: a block a sequence.
extern "C" __global__ void twilight_check(const __grid_constant__ Layer l, int32_t *found)
{
	int b = blockIdx.x;
	int length = l.lengths[b], first = l.first[b];
	if (l.carry_counts) // a step begins with nothing left by the last one
		for (int i = threadIdx.x; i < l.rows / l.batch; i += blockDim.x)
			l.carry_counts[b * (l.rows / l.batch) + i] = 0;
	bool bad = length < 1 || first < 0 || first >= length || length > int64_t(l.table_stride) * l.page_size ||
		   length > int64_t(l.chunk_stride) * kChunk;
	int pages = bad ? 0 : (length + l.page_size - 1) / l.page_size;
	if (!bad) {
		for (int i = first / l.page_size + threadIdx.x; i < pages; i += blockDim.x) {
			int k = l.table[int64_t(b) * l.table_stride + i], v = l.vtable[int64_t(b) * l.table_stride + i];
			bad |= k < 0 || k >= l.num_pages || v < 0 || v >= l.num_pages || k == l.null_page;
		}
		if (l.chunk_ids)
			for (int i = threadIdx.x + first / kChunk; i < (length + kChunk - 1) / kChunk; i += blockDim.x) {
				int id = l.chunk_ids[int64_t(b) * l.chunk_stride + i];
				bad |= id < 0 || id >= l.chunks;
			}
	}
	bad = __syncthreads_or(bad);
	if (threadIdx.x == 0)
		found[b] = bad;
}

extern "C" __global__ void twilight_train(const __grid_constant__ Layer l, uint64_t sequence, uint64_t level)
{
	switch (l.cache_dtype) {
	case F32:
		return train<F32>(l, int(sequence), int(level));
	case F16:
		return train<F16>(l, int(sequence), int(level));
	case BF16:
		return train<BF16>(l, int(sequence), int(level));
	default:
		return train<F8E4M3>(l, int(sequence), int(level));
	}
}

// Indexes the layer's work: a warp a (chunk, KV head).
extern "C" __global__ void __launch_bounds__(128) twilight_index(const __grid_constant__ Layer l)
{
	extern __shared__ uint8_t codes[];
	int warp = threadIdx.x / 32;
	int64_t i = int64_t(blockIdx.x) * 4 + warp;
	if (i >= int64_t(l.works) * l.kv_heads)
		return;
	int work = int(i / l.kv_heads), head = int(i % l.kv_heads);
	uint8_t *mine = codes + warp * kChunk * l.k_dim;
	switch (l.cache_dtype) {
	case F32:
		return index_chunk<F32>(l, work, head, mine);
	case F16:
		return index_chunk<F16>(l, work, head, mine);
	case BF16:
		return index_chunk<BF16>(l, work, head, mine);
	default:
		return index_chunk<F8E4M3>(l, work, head, mine);
	}
}

// x = high + low to about 22 bits.
__device__ __forceinline__ void split(float x, __half &high, __half &low)
{
	high = __float2half_rn(x);
	low = __float2half_rn(x - __half2float(high));
}

// Scales queries and lays them out for the tensor cores: a warp a query head.
extern "C" __global__ void twilight_queries(const __grid_constant__ Layer l)
{
	int i = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x & 31;
	if (i >= l.batch * l.query_heads)
		return;
	int b = i / l.query_heads, head = i % l.query_heads, dims = l.k_dim;
	int kv_head = head / (l.query_heads / l.kv_heads);
	const uint8_t *query = l.queries + b * l.query_row + head * l.query_head;
	float *q = l.q + int64_t(i) * dims;
	float factor = l.query_scale * l.softmax_scale;
	if (path_of(l, b) == kVoid) {
		if (l.bad[b] && l.paths[b] != kVoid && lane == 0)
			atomicOr(&l.flags[b * l.kv_heads + kv_head], kBadRow);
		return;
	}
	float most = 0, constant = 0, sum = 0;
	for (int d = lane; d < dims; d += 32) {
		float stored = read1(query + d * element_size(l.query_dtype), l.query_dtype);
		if (!isfinite(stored * l.query_scale))
			atomicMax(reinterpret_cast<u64 *>(l.bad_query),
				  ~((u64(i) * dims + d) << 32 | __float_as_uint(stored * l.query_scale)));
		float x = stored * factor;
		q[d] = x;
		float equal = l.estimates != kEstimateExact ? x * channel_scale(l, kv_head, d) : x;
		most = fmaxf(most, fmaxf(fabsf(x), fabsf(equal)));
		if (l.estimates != kEstimateExact)
			constant += x * l.mean[kv_head * dims + d];
		if (l.estimates == kEstimateCodes)
			reinterpret_cast<float *>(l.q_int4)[int64_t(i) * dims + d] = equal;
		sum += equal;
	}
	most = warp_max(most);
	constant = warp_sum(constant);
	sum = warp_sum(sum);
	// A power of two that brings the query near 1, so that halves hold it.
	int exponent = most > 0 && isfinite(most) ? max(ilogbf(most), -100) : 0;
	float down = ldexpf(1, -exponent);
	if (lane == 0) {
		l.q_sums[4 * i] = constant;
		l.q_sums[4 * i + 1] = sum;
		l.q_sums[4 * i + 2] = ldexpf(1, exponent);
		if (!isfinite(most))
			atomicOr(&l.flags[b * l.kv_heads + kv_head], kNotFinite);
	}
	__syncwarp();
	__half *high = reinterpret_cast<__half *>(l.q_bounds + int64_t(i) * 2 * dims), *low = high + 2 * dims;
	for (int at = lane; at < 2 * dims; at += 32) {
		int s = at / 16, t = at % 16 / 4, k = at % 4;
		int e = 8 * (4 * (s / 2) + t) + 4 * (s % 2) + k;
		float x = q[e % dims] * down;
		split(e < dims ? fmaxf(x, 0) : fminf(x, 0), high[at], low[at]);
	}
	if (l.estimates != kEstimateInt4)
		return;
	high = reinterpret_cast<__half *>(l.q_int4 + int64_t(i) * dims), low = high + dims;
	for (int at = lane; at < dims; at += 32) {
		int s = at / 16, t = at % 16 / 4, k = at % 4;
		int d = 16 * s + 2 * t + (k & 1) + (k >> 1) * 8;
		// High nibbles enter the tile sixteenfold.
		float x = q[d] * channel_scale(l, kv_head, d) * down;
		split(k >> 1 ? x / 16 : x, high[at], low[at]);
	}
}

// Quest's bounds, summed over the heads that ask: a warp for 16 chunks of a list row.
extern "C" __global__ void twilight_scores(const __grid_constant__ Layer l)
{
	int row = blockIdx.y, tile = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x & 31;
	RowIndex r = row_index(l, row);
	if (path_of(l, r.sequence) != kSparse)
		return;
	int first = l.first[r.sequence] / kChunk, end = (l.lengths[r.sequence] + kChunk - 1) / kChunk;
	int chunk = first + tile * 16;
	if (chunk >= end)
		return;
	int g = lane >> 2, t = lane & 3, dims = l.k_dim;
	auto record = [&](int c) {
		int id = shadow_chunk(l, r.sequence, min(c, end - 1));
		return reinterpret_cast<const uint4 *>(l.bounds + (int64_t(id) * l.kv_heads + r.kv_head) * bounds_bytes(dims)) + t;
	};
	const uint4 *upper = record(chunk + g), *lower = record(chunk + g + 8);
	float sum_upper = 0, sum_lower = 0;
	auto put_bound = [&](int c, int h, float bound, float &sum) {
		if (!isfinite(bound))
			bound = kInfinity;
		sum += bound;
		if (c < end)
			l.head_bounds[(int64_t(row) * l.asking + h) * l.chunk_stride + c - first] = bound;
	};
	for (int h0 = 0; h0 < l.asking; h0 += 8) {
		float c[4] = {};
		bool asks = h0 + g < l.asking;
		const uint2 *q = reinterpret_cast<const uint2 *>(
			l.q_bounds + int64_t(r.sequence * l.query_heads + r.query_head + (asks ? h0 + g : 0)) * 2 * dims);
		for (int j = 0; j < dims / 16; j++) {
			uint4 a = __ldg(upper + 4 * j), b = __ldg(lower + 4 * j);
			for (int part = 0; part < 2; part++) {
				uint2 q0 = q[part * dims / 2 + (2 * j) * 4 + t], q1 = q[part * dims / 2 + (2 * j + 1) * 4 + t];
				if (!asks)
					q0 = q1 = make_uint2(0, 0);
				mma(c, a.x, b.x, a.y, b.y, q0.x, q0.y);
				mma(c, a.z, b.z, a.w, b.w, q1.x, q1.y);
			}
		}
		for (int k = 0; k < 2; k++) {
			int h = h0 + 2 * t + k;
			if (h < l.asking) {
				float up = l.q_sums[4 * (r.sequence * l.query_heads + r.query_head + h) + 2];
				put_bound(chunk + g, h, c[k] * up, sum_upper);
				put_bound(chunk + g + 8, h, c[k + 2] * up, sum_lower);
			}
		}
	}
	for (int o = 1; o < 4; o <<= 1) {
		sum_upper += __shfl_xor_sync(kAll, sum_upper, o);
		sum_lower += __shfl_xor_sync(kAll, sum_lower, o);
	}
	if (t != 0)
		return;
	float *scores = l.scores + int64_t(row) * l.chunk_stride;
	auto put = [&](int c, float score) {
		if (c >= end)
			return;
		if (!isfinite(score))
			score = kLargest;
		if ((l.pin_first && c == first) || (l.pin_current && c == end - 1))
			score = kInfinity;
		scores[c - first] = score + 0.f;
	};
	put(chunk + g, sum_upper);
	put(chunk + g + 8, sum_lower);
}

// What a selector that ranks tokens does with a row.
enum Pick { kTakeAll, kTakeEnds, kTakeBest, kTakeCarried, kLeaveBest };
__device__ __forceinline__ Pick pick(const Layer &l, int row, int budget, int tokens)
{
	if (l.selects == kSelectEnds)
		return kTakeEnds;
	bool listed = l.ranks == kRankChannels || l.ranks == kRankLabels;
	if (budget >= tokens || l.ranks == kRankNone || (listed && !l.channels))
		return kTakeAll;
	if (l.selects == kSelectTokens)
		return kTakeBest;
	if (l.reselection < 0)
		return kTakeAll;
	int left = l.carry_layers[row];
	return l.carry_counts[row] > 0 && l.reselection <= left && left < l.layer ? kTakeCarried : kLeaveBest;
}

// What a list row ranks tokens by: the sum of the queries that ask, and of its channels those that count.
// A block a list row, a thread a channel.
extern "C" __global__ void twilight_rank_query(const __grid_constant__ Layer l)
{
	__shared__ float sums[kMaxDim], sizes[kMaxDim];
	int row = blockIdx.x, d = threadIdx.x;
	RowIndex r = row_index(l, row);
	if (path_of(l, r.sequence) != kSparse)
		return;
	const float *q = l.q + int64_t(r.sequence * l.query_heads + r.query_head) * l.k_dim;
	if (d < l.k_dim) {
		float sum = 0, size = 0;
		for (int h = 0; h < l.asking; h++) {
			float x = q[int64_t(h) * l.k_dim + d];
			sum = __fadd_rn(sum, x);
			size = __fadd_rn(size, fabsf(x));
		}
		sums[d] = sum;
		sizes[d] = size;
	}
	__syncthreads();
	if (d >= l.k_dim)
		return;
	float *out = l.q_rank + int64_t(row) * l.k_dim;
	const int32_t *channels = l.channels + r.kv_head * l.label_dim;
	bool counts = l.ranks == kRankKeys;
	if (l.ranks == kRankLargest) {
		int larger = 0;
		for (int other = 0; other < l.k_dim; other++)
			larger += sizes[other] > sizes[d] || (sizes[other] == sizes[d] && other < d);
		counts = larger < l.rank_channels;
	}
	if (l.ranks == kRankLabels) {
		if (l.channels && d < l.label_dim)
			out[d] = sums[channels[d]];
		return;
	}
	for (int i = 0; l.ranks == kRankChannels && l.channels && i < l.label_dim; i++)
		counts |= channels[i] == d;
	out[d] = counts ? sums[d] : 0;
}

// Notes a token's score, `at` counting from the row's first chunk.
__device__ __forceinline__ void put_score(const Layer &l, int row, int from, int length, int at, float score)
{
	int first = from / kChunk, chunk = at / kChunk, last = (length - 1) / kChunk - first, position = first * kChunk + at;
	if (!isfinite(score))
		score = kLargest;
	if ((l.pin_first && chunk == 0) || (l.pin_current && chunk == last))
		score = kInfinity;
	if (position < from || position >= length)
		score = -kInfinity;
	l.scores[int64_t(row) * l.chunk_stride * kChunk + at] = score + 0.f;
}

// Scores of tokens by their keys: as many lanes a token as its head size takes.
template <int T>
__device__ void rank_keys(const Layer &l)
{
	int row = blockIdx.y, lane = threadIdx.x & 31;
	RowIndex r = row_index(l, row);
	int from = l.first[r.sequence], length = l.lengths[r.sequence];
	Pick how = path_of(l, r.sequence) == kSparse ? pick(l, row, l.budgets[r.sequence], length - from) : kTakeAll;
	if (how != kTakeBest && how != kLeaveBest)
		return;
	int lanes = l.k_dim <= 64 ? 8 : l.k_dim <= 128 ? 16 : 32, groups = 32 / lanes, d = lane % lanes * 8;
	int first = from / kChunk, n = ((length + kChunk - 1) / kChunk - first) * kChunk;
	float q[8] = {}, scale = l.k.scales[r.kv_head];
	for (int k = 0; k < 8 && d < l.k_dim; k++)
		q[k] = l.q_rank[int64_t(row) * l.k_dim + d + k];
	int step = gridDim.x * (blockDim.x / 32) * groups;
	for (int base = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * groups; base < n; base += step) {
		int at = base + lane / lanes, position = first * kChunk + at;
		float key[8] = {}, sum = 0;
		if (position >= from && position < length && d < l.k_dim)
			read8<T>(key, token(l, l.k, l.table, r.sequence, r.kv_head, position) + d * sizeof(typename Element<T>::Type),
				 l.aligned);
		for (int k = 0; k < 8; k++)
			sum += key[k] * q[k];
		for (int o = lanes / 2; o; o >>= 1)
			sum += __shfl_xor_sync(kAll, sum, o);
		if (lane % lanes == 0)
			put_score(l, row, from, length, at, sum * scale);
	}
}
extern "C" __global__ void twilight_rank_keys(const __grid_constant__ Layer l)
{
	switch (l.cache_dtype) {
	case F32:
		return rank_keys<F32>(l);
	case F16:
		return rank_keys<F16>(l);
	case BF16:
		return rank_keys<BF16>(l);
	default:
		return rank_keys<F8E4M3>(l);
	}
}

// The sum of query[i]*code i over n codes of some bits; queries and codes are of the same places.
__device__ __forceinline__ float code_dot(const float *query, const uint8_t *codes, int n, int bits)
{
	float sum = 0;
	int each = 8 / bits;
	u32 mask = (1u << bits) - 1;
	for (int i = 0; i < n; i += each) {
		u32 byte = __ldg(codes + i / each);
		for (int k = 0; k < each && i + k < n; k++)
			sum += query[i + k] * float(byte >> (k * bits) & mask);
	}
	return sum;
}

// Scores of tokens by their labels: a thread a token.
extern "C" __global__ void twilight_rank_labels(const __grid_constant__ Layer l)
{
	__shared__ float label[kMaxDim];
	__shared__ double scan[32];
	int row = blockIdx.y, tid = threadIdx.x;
	RowIndex r = row_index(l, row);
	int from = l.first[r.sequence], length = l.lengths[r.sequence];
	if (path_of(l, r.sequence) != kSparse || pick(l, row, l.budgets[r.sequence], length - from) != kTakeBest)
		return;
	for (int i = tid; i < l.label_dim; i += blockDim.x)
		label[i] = l.q_rank[int64_t(row) * l.k_dim + i];
	__syncthreads();
	double mine = 0;
	for (int i = tid; i < l.label_dim; i += blockDim.x)
		mine += label[i];
	float sum = float(block_sum(mine, scan));
	int first = from / kChunk, n = ((length + kChunk - 1) / kChunk - first) * kChunk;
	int64_t size = code_bytes(l.label_dim, l.label_bits, 0), each = (l.label_dim * l.label_bits + 7) / 8;
	for (int at = blockIdx.x * blockDim.x + tid; at < n; at += gridDim.x * blockDim.x) {
		int chunk = first + at / kChunk, t = at % kChunk;
		const uint8_t *record = l.labels + (int64_t(shadow_chunk(l, r.sequence, chunk)) * l.kv_heads + r.kv_head) * size;
		float2 scale = __half22float2(reinterpret_cast<const __half2 *>(record)[t]);
		float dot = code_dot(label, record + kChunk * 4 + t * each, l.label_dim, l.label_bits);
		put_score(l, row, from, length, at, scale.x * dot + scale.y * sum);
	}
}

// The tokens of a chunk that lie in [from, to), a bit each.
__device__ __forceinline__ u32 tokens_between(int chunk, int from, int to)
{
	int base = chunk * kChunk, a = min(max(from - base, 0), kChunk), b = min(max(to - base, 0), kChunk);
	return b > a ? (1u << b) - (1u << a) : 0;
}

// Writes the chunks of which mask, called for each in turn by a block, takes tokens, as far as there is room.
template <typename F>
__device__ void put_chunks(int first, int n, F mask, int32_t *chunks, uint16_t *masks, int room, int &taken, int &tokens)
{
	__shared__ int scan[32];
	int mine = 0;
	taken = 0;
	for (int base = 0; base < n; base += blockDim.x) {
		int c = base + threadIdx.x;
		u32 bits = mask(c);
		int all, before = block_scan(int(bits != 0), scan, all);
		if (taken + before >= room)
			bits = 0;
		if (bits) {
			chunks[taken + before] = first + c;
			masks[taken + before] = bits;
		}
		taken = min(taken + all, room);
		mine += __popc(bits);
	}
	block_scan(mine, scan, tokens);
}

// The candidates of a list row, ascending, ties going to the lower chunk or token: a block a row.
extern "C" __global__ void twilight_select(const __grid_constant__ Layer l)
{
	__shared__ int scan[32];
	int row = blockIdx.x, tid = threadIdx.x;
	RowIndex r = row_index(l, row);
	if (path_of(l, r.sequence) != kSparse)
		return;
	int from = l.first[r.sequence], length = l.lengths[r.sequence], budget = l.budgets[r.sequence];
	int first = from / kChunk, n = (length + kChunk - 1) / kChunk - first, taken, tokens;
	int32_t *chunks = l.candidates + int64_t(row) * l.candidate_stride;
	uint16_t *masks = l.candidate_masks + int64_t(row) * l.candidate_stride;
	auto valid = [&](int c) { return c < n ? tokens_between(first + c, from, length) : 0; };
	u32 cut = 0;
	int ties = 0, tied = 0;
	const float *scores = l.scores + int64_t(row) * l.chunk_stride * (l.selects == kSelectQuest ? 1 : kChunk);
	auto best_tokens = [&](int c) {
		u32 above = 0, equal = 0, kept = 0;
		for (u32 left = valid(c); left; left &= left - 1) {
			int t = __ffs(left) - 1;
			u32 key = key_of(scores[c * kChunk + t]);
			above |= u32(key > cut) << t;
			equal |= u32(key == cut) << t;
		}
		int all, room = ties - tied - block_scan(__popc(equal), scan, all);
		for (tied += all; equal && room > 0; room--, equal &= equal - 1)
			kept |= equal & -equal;
		return above | kept;
	};
	auto cut_tokens = [&] {
		int pins = (l.pin_first ? __popc(valid(0)) : 0) + (l.pin_current && !(l.pin_first && n == 1) ? __popc(valid(n - 1)) : 0);
		int keep = min(max(budget, pins), length - from);
		cut = kth_key([&](int i) { return scores[i]; }, n * kChunk, keep, ties);
	};
	if (l.selects == kSelectQuest) {
		int pins = l.pin_first + (l.pin_current && !(l.pin_first && n == 1));
		int keep = min(max(budget, pins), n);
		if (keep < n)
			cut = kth_key([&](int i) { return scores[i]; }, n, keep, ties);
		put_chunks(first, n, [&](int c) {
			u32 key = c < n ? (keep == n ? kAll : key_of(scores[c])) : 0;
			bool tie = c < n && keep < n && key == cut;
			int all, before = block_scan(int(tie), scan, all);
			bool kept = keep == n || key > cut || (tie && tied + before < ties);
			tied += all;
			return kept ? valid(c) : 0;
		}, chunks, masks, l.candidate_stride, taken, tokens);
	} else {
		switch (pick(l, row, budget, length - from)) {
		case kTakeAll:
			put_chunks(first, n, valid, chunks, masks, l.candidate_stride, taken, tokens);
			break;
		case kTakeEnds: {
			int recent = max(from, length - budget), sinks = min(length, from + l.sinks_first);
			put_chunks(first, n, [&](int c) {
				return valid(c) & (tokens_between(first + c, from, sinks) | tokens_between(first + c, recent, length));
			}, chunks, masks, l.candidate_stride, taken, tokens);
			break;
		}
		case kTakeBest:
			cut_tokens();
			put_chunks(first, n, best_tokens, chunks, masks, l.candidate_stride, taken, tokens);
			break;
		case kTakeCarried: {
			const int32_t *left = l.carry_chunks + int64_t(row) * l.chunk_stride;
			const uint16_t *left_masks = l.carry_masks + int64_t(row) * l.chunk_stride;
			int count = 0;
			taken = min(l.carry_counts[row], l.candidate_stride);
			for (int i = tid; i < taken; i += blockDim.x) {
				chunks[i] = left[i];
				masks[i] = left_masks[i];
				count += __popc(left_masks[i]);
			}
			block_scan(count, scan, tokens);
			break;
		}
		case kLeaveBest:
			cut_tokens();
			put_chunks(first, n, best_tokens, l.carry_chunks + int64_t(row) * l.chunk_stride,
				   l.carry_masks + int64_t(row) * l.chunk_stride, l.chunk_stride, taken, tokens);
			if (tid == 0) {
				l.carry_counts[row] = taken;
				l.carry_layers[row] = l.layer;
			}
			put_chunks(first, n, valid, chunks, masks, l.candidate_stride, taken, tokens);
			break;
		}
	}
	if (tid == 0) {
		l.num_candidates[row] = taken;
		l.candidate_tokens[row] = tokens;
	}
}

// Small integers in two halves' low bits as numbers: 1024 has them as its last bits.
__device__ __forceinline__ u32 halves(u32 codes)
{
	codes |= 0x64006400;
	const __half2 offset = __half2half2(__ushort_as_half(0x6400));
	__half2 x = __hsub2(reinterpret_cast<const __half2 &>(codes), offset);
	return reinterpret_cast<u32 &>(x);
}

// One of a row's n candidate chunks or, of index n, the chunk of its first valid token.
struct Candidate {
	const Layer &l;
	RowIndex r;
	int row, index, chunk;
	u32 mask; // its tokens whose logits are wanted
	bool is_first;

	__device__ Candidate(const Layer &l, int row, RowIndex r, int i, int n) : l(l), r(r), row(row), index(i), is_first(i == n)
	{
		int64_t at = int64_t(row) * l.candidate_stride + i;
		chunk = is_first ? l.first[r.sequence] / kChunk : l.candidates[at];
		mask = is_first ? 1u << l.first[r.sequence] % kChunk : l.candidate_masks[at];
	}

	// Notes the logit of token t for the h-th head that asks.
	__device__ void put(int h, int t, float logit)
	{
		bool wanted = mask >> t & 1;
		if (wanted && !isfinite(logit))
			atomicOr(&l.flags[r.sequence * l.kv_heads + r.kv_head], kNotFinite);
		if (l.softcap > 0)
			logit = softcap(logit, l.softcap);
		int64_t head = int64_t(row) * l.asking + h;
		if (!is_first)
			l.logits[(head * l.candidate_stride + index) * kChunk + t] = wanted ? logit : -kInfinity;
		else if (wanted)
			l.first_logits[head] = logit;
	}
};

// INT4 estimates of the candidates' logits: a warp a chunk at a time.
extern "C" __global__ void twilight_estimate(const __grid_constant__ Layer l)
{
	int row = blockIdx.y, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
	RowIndex r = row_index(l, row);
	if (path_of(l, r.sequence) != kSparse)
		return;
	int dims = l.k_dim, steps = dims / 16, n = l.num_candidates[row];
	int query = r.sequence * l.query_heads + r.query_head;
	for (int i = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; i <= n; i += gridDim.x * (blockDim.x / 32)) {
		Candidate candidate(l, row, r, i, n);
		int chunk = candidate.chunk;
		const uint8_t *record =
			l.int4 + (int64_t(shadow_chunk(l, r.sequence, chunk)) * l.kv_heads + r.kv_head) * int4_bytes(dims);
		const u32 *words = reinterpret_cast<const u32 *>(record);
		const __half2 *scales = reinterpret_cast<const __half2 *>(record + dims * 8);
		float2 upper = __half22float2(scales[g]), lower = __half22float2(scales[g + 8]);
		for (int h0 = 0; h0 < l.asking; h0 += 8) {
			bool asks = h0 + g < l.asking;
			const uint2 *q = reinterpret_cast<const uint2 *>(l.q_int4 + int64_t(query + (asks ? h0 + g : 0)) * dims);
			float c[4] = {};
			for (int s = 0; s < steps; s++) {
				u32 w = __ldg(words + int4_word(steps, s, lane)), w8 = w >> 8;
				u32 a0 = halves(w & 0x000f000f), a1 = halves(w8 & 0x000f000f);
				u32 a2 = halves(w & 0x00f000f0), a3 = halves(w8 & 0x00f000f0);
				for (int part = 0; part < 2; part++) {
					uint2 x = q[part * dims / 4 + s * 4 + t];
					if (!asks)
						x = make_uint2(0, 0);
					mma(c, a0, a1, a2, a3, x.x, x.y);
				}
			}
			for (int k = 0; k < 4; k++) {
				int h = h0 + 2 * t + (k & 1);
				if (h >= l.asking)
					continue;
				const float *sums = l.q_sums + 4 * (query + h);
				float2 scale = k >> 1 ? lower : upper;
				float logit = scale.x * (c[k] * sums[2]) + (scale.y * sums[1] + sums[0]);
				candidate.put(h, g + (k >> 1) * 8, logit);
			}
		}
	}
}

// Estimates from codes of other widths: a warp a chunk at a time, two lanes a token.
extern "C" __global__ void twilight_estimate_codes(const __grid_constant__ Layer l)
{
	int row = blockIdx.y, lane = threadIdx.x & 31, t = lane / 2, half = lane % 2;
	RowIndex r = row_index(l, row);
	if (path_of(l, r.sequence) != kSparse)
		return;
	int dims = l.k_dim, n = l.num_candidates[row], query = r.sequence * l.query_heads + r.query_head;
	int params = l.code_symmetric ? 2 : 4, size = dims * l.code_bits / 8;
	for (int i = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; i <= n; i += gridDim.x * (blockDim.x / 32)) {
		Candidate candidate(l, row, r, i, n);
		const uint8_t *record = l.codes + (int64_t(shadow_chunk(l, r.sequence, candidate.chunk)) * l.kv_heads + r.kv_head) *
							  code_bytes(dims, l.code_bits, l.code_symmetric);
		float2 scale;
		if (l.code_symmetric) {
			scale.x = __half2float(reinterpret_cast<const __half *>(record)[t]);
			scale.y = -float((1 << l.code_bits) - 2) / 2 * scale.x;
		} else {
			scale = __half22float2(reinterpret_cast<const __half2 *>(record)[t]);
		}
		for (int h = 0; h < l.asking; h++) {
			const float *q = reinterpret_cast<const float *>(l.q_int4) + int64_t(query + h) * dims;
			const float *sums = l.q_sums + 4 * (query + h);
			float dot = code_dot(q + half * dims / 2, record + kChunk * params + t * size + half * size / 2, dims / 2, l.code_bits);
			dot += __shfl_xor_sync(kAll, dot, 1);
			if (half == 0)
				candidate.put(h, t, scale.x * dot + (scale.y * sums[1] + sums[0]));
		}
	}
}

// Exact logits of the candidates, for the estimator "none": a warp a token and head at a time.
template <int T>
__device__ void exact(const Layer &l)
{
	int row = blockIdx.y, lane = threadIdx.x & 31;
	RowIndex r = row_index(l, row);
	if (path_of(l, r.sequence) != kSparse)
		return;
	int dims = l.k_dim, n = l.num_candidates[row], query = r.sequence * l.query_heads + r.query_head;
	float scale = l.k.scales[r.kv_head];
	int step = gridDim.x * (blockDim.x / 32);
	for (int i = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; i < (n + 1) * kChunk; i += step) {
		Candidate candidate(l, row, r, i / kChunk, n);
		int t = i % kChunk;
		bool wanted = candidate.mask >> t & 1;
		float key[8] = {};
		if (wanted && lane * 8 < dims)
			read8<T>(key, token(l, l.k, l.table, r.sequence, r.kv_head, candidate.chunk * kChunk + t) +
					      lane * 8 * sizeof(typename Element<T>::Type), l.aligned);
		for (int h = 0; h < l.asking; h++) {
			float sum = 0;
			if (wanted && lane * 8 < dims)
				for (int k = 0; k < 8; k++)
					sum += key[k] * l.q[int64_t(query + h) * dims + lane * 8 + k];
			float logit = warp_sum(sum) * scale;
			if (lane == 0)
				candidate.put(h, t, logit);
		}
	}
}
extern "C" __global__ void twilight_exact(const __grid_constant__ Layer l)
{
	switch (l.cache_dtype) {
	case F32:
		return exact<F32>(l);
	case F16:
		return exact<F16>(l);
	case BF16:
		return exact<BF16>(l);
	default:
		return exact<F8E4M3>(l);
	}
}

// Estimates the softmax weight of all tokens that are no candidates of a head, for each unit of the
// candidates' own; NaN if it cannot tell. What it does is said by pipeline/coverage.go. For a block.
__device__ double outside(const Layer &l, RowIndex r, int row, int head, float top)
{
	__shared__ double scan[32];
	const int from = l.first[r.sequence], length = l.lengths[r.sequence], first = from / kChunk, tid = threadIdx.x;
	const int n = (length + kChunk - 1) / kChunk - first, taken = l.num_candidates[row];
	const bool tokens = l.selects == kSelectTokens;
	if (l.candidate_tokens[row] == length - from)
		return 0;
	if (!tokens && l.selects != kSelectQuest)
		return kNaN; // no ranking
	const int32_t *candidates = l.candidates + int64_t(row) * l.candidate_stride;
	const uint16_t *masks = l.candidate_masks + int64_t(row) * l.candidate_stride;
	const float *logits = l.logits + (int64_t(row) * l.asking + head) * l.candidate_stride * kChunk;
	const float *bounds = l.head_bounds + (int64_t(row) * l.asking + head) * l.chunk_stride;
	const float *scores = l.scores + int64_t(row) * l.chunk_stride * kChunk; // of tokens
	constexpr int kLeastPoints = 4;
	constexpr float kMostLog = 80;
	auto relative = [&](float bound) {
		if (l.softcap > 0)
			bound = softcap(bound, l.softcap);
		return bound - top;
	};
	double shift = 0; // keeps the squares small
	if (n > 1 && tokens)
		shift = isfinite(scores[kChunk]) ? scores[kChunk] : 0;
	else if (n > 1)
		shift = isfinite(bounds[1]) ? relative(bounds[1]) : 0;
	double sums[7] = {}; // of the points: 1, x, y, x*x, x*y, y*y; of all candidates: weight
	auto point = [&](double x, double y) {
		sums[0] += 1, sums[1] += x, sums[2] += y, sums[3] += x * x, sums[4] += x * y, sums[5] += y * y;
	};
	for (int i = tid; i < taken; i += blockDim.x) {
		int c = candidates[i] - first;
		bool inner = c >= 1 && c < n - 1;
		float sum = 0;
		for (u32 left = masks[i]; left; left &= left - 1) {
			int t = __ffs(left) - 1;
			float w = expf(fmaxf(logits[i * kChunk + t] - top, kLowest));
			sum += w;
			if (tokens && inner && isfinite(scores[c * kChunk + t]))
				point(scores[c * kChunk + t] - shift, log(double(w)));
		}
		sums[6] += sum;
		if (!tokens && inner && isfinite(bounds[c]))
			point(relative(bounds[c]) - shift, log(double(sum)));
	}
	for (double &sum : sums)
		sum = block_sum(sum, scan);
	double points = sums[0];
	if (points < kLeastPoints)
		return kNaN;
	double xx = sums[3] - sums[1] * sums[1] / points, xy = sums[4] - sums[1] * sums[2] / points,
	       yy = sums[5] - sums[2] * sums[2] / points;
	double slope = xx > 0 ? xy / xx : 0, half = fmax(0., yy - slope * xy) / (points - 2) / 2, bend = xx > 0 ? half / xx : 0;
	double level = sums[2] / points + half * (1 + 1 / points), centre = shift + sums[1] / points;

	bool known = true;
	double weight = 0;
	auto guess = [&](float x) {
		float away = float(x - centre);
		return (float(bend) * away + float(slope)) * away + float(level);
	};
	auto add = [&](float guess) { weight += expf(fmaxf(fminf(guess, kMostLog), kLowest)); };
	for (int c = tid, at = 0; c < n; c += blockDim.x) {
		while (at < taken && candidates[at] - first < c)
			at++;
		u32 had = at < taken && candidates[at] - first == c ? masks[at] : 0;
		if (tokens) {
			for (u32 left = tokens_between(first + c, from, length) & ~had; left; left &= left - 1)
				add(guess(scores[c * kChunk + __ffs(left) - 1]));
		} else if (!had) {
			known &= isfinite(bounds[c]);
			float bound = relative(bounds[c]);
			add(fminf(guess(bound), bound + logf(kChunk)));
		}
	}
	weight = block_sum(weight, scan);
	return __syncthreads_and(known) ? weight / sums[6] : kNaN;
}

// Where a head's candidates are cut: a block a (list row, asking head). cuts holds the least key kept
// and the last candidate kept that has just it.
extern "C" __global__ void twilight_cut(const __grid_constant__ Layer l)
{
	constexpr int kBins = 2048;
	__shared__ u64 histogram[kBins];
	__shared__ u64 scan[32];
	__shared__ float warps[32];
	__shared__ u32 prefix;
	__shared__ u64 left, whole;
	int row = blockIdx.x / l.asking, head = blockIdx.x % l.asking, tid = threadIdx.x;
	RowIndex r = row_index(l, row);
	if (path_of(l, r.sequence) != kSparse || not_finite(l, r))
		return;
	int n = l.num_candidates[row] * kChunk;
	const float *logits = l.logits + (int64_t(row) * l.asking + head) * l.candidate_stride * kChunk;
	CutResult *result = l.cuts + int64_t(row) * l.asking + head;

	float most = -kInfinity;
	for (int i = tid; i < n; i += blockDim.x)
		most = fmaxf(most, logits[i]);
	most = warp_max(most);
	if ((tid & 31) == 0)
		warps[tid / 32] = most;
	__syncthreads();
	most = warps[0];
	for (int w = 1; w < int(blockDim.x / 32); w++)
		most = fmaxf(most, warps[w]);

	double relative = outside(l, r, row, head, most); // weight of other tokens for each unit of the candidates'
	float coverage = float(1 / (1 + relative));
	int query = r.sequence * l.query_heads + r.query_head + head;
	if (tid == 0)
		l.coverage[query] = coverage;
	const bool limits = l.min_budget || l.max_budget; // lists go by the heads' shares, so that wholes are asked for
	auto sum_weights = [&] {
		u64 mine = 0, total;
		for (int i = tid; i < n; i += blockDim.x)
			mine += weight(logits[i], most);
		block_scan(mine, scan, total);
		return total;
	};
	if (l.prunes == kPruneThreshold) {
		float lowest = l.first_logits[int64_t(row) * l.asking + head] - float(l.thresholds[r.query_head + head]);
		u64 total = sum_weights();
		CutResult cut = {key_of(lowest + 0.f), 0, most, coverage, total};
		if (!(most > lowest)) { // the heaviest stays
			int best = n;
			for (int i = tid; i < n; i += blockDim.x)
				if (logits[i] == most)
					best = min(best, i);
			if (tid == 0)
				left = n;
			__syncthreads();
			atomicMin(&left, u64(best));
			__syncthreads();
			cut.key = key_of(most + 0.f);
			cut.ties_end = int(left) + 1;
		}
		if (tid == 0)
			*result = cut;
		return;
	}
	double share = l.p[r.sequence] > 0 ? l.p[r.sequence] : l.thresholds[r.query_head + head];
	if (l.over_all && relative == relative)
		share *= 1 + relative;
	if (l.prunes == kPruneNone || share >= 1) {
		u64 total = limits ? sum_weights() : 0;
		if (tid == 0)
			*result = {0, 0, most, coverage, total};
		return;
	}
	// Three digits of 11, 11 and 10 bits; each pass sums the weights of the keys that share the digits known.
	if (tid == 0)
		prefix = 0;
	for (int level = 0; level < 3; level++) {
		int shift = level == 0 ? 21 : level == 1 ? 10 : 0, bins = level == 2 ? 1024 : kBins;
		u32 mask = level == 0 ? 0 : level == 1 ? kAll << 21 : kAll << 10;
		for (int i = tid; i < bins; i += blockDim.x)
			histogram[i] = 0;
		__syncthreads();
		u32 known = prefix;
		for (int i = tid; i < n; i += blockDim.x) {
			u32 key = key_of(logits[i] + 0.f);
			if ((key & mask) == known)
				atomicAdd(&histogram[key >> shift & (bins - 1)], weight(logits[i], most));
		}
		__syncthreads();
		int each = bins / blockDim.x;
		u64 mine = 0, total;
		for (int k = 0; k < each; k++)
			mine += histogram[bins - 1 - (tid * each + k)];
		u64 above = block_scan(mine, scan, total);
		if (level == 0 && tid == 0) {
			whole = total;
			left = max(u64(ceil(share * double(total))), u64(1));
		}
		__syncthreads();
		u64 want = left;
		__syncthreads();
		if (above < want && want <= above + mine)
			for (int k = 0; k < each; k++) {
				int bin = bins - 1 - (tid * each + k);
				u64 in = histogram[bin];
				if (want <= above + in) {
					prefix = known | u32(bin) << shift;
					left = want - above;
					break;
				}
				above += in;
			}
		__syncthreads();
	}
	u32 cut = prefix;
	u64 one = max(weight(float_of(cut), most), u64(1));
	int ties = int((left + one - 1) / one), seen = 0, last = n;
	for (int base = 0; base < n && seen < ties; base += blockDim.x) {
		int i = base + tid, all;
		bool tie = i < n && key_of(logits[i] + 0.f) == cut;
		int before = block_scan(int(tie), reinterpret_cast<int *>(scan), all);
		if (tie && seen + before == ties - 1)
			left = i;
		seen += all;
		__syncthreads();
	}
	if (seen >= ties)
		last = int(left) + 1;
	if (tid == 0)
		*result = {cut, last, most, coverage, whole};
}

// The union of what the asking heads keep, ascending: a block a list row.
extern "C" __global__ void twilight_compact(const __grid_constant__ Layer l)
{
	__shared__ int scan[32];
	__shared__ u64 kept_weight[16];
	int row = blockIdx.x, tid = threadIdx.x;
	RowIndex r = row_index(l, row);
	if (path_of(l, r.sequence) != kSparse || not_finite(l, r))
		return;
	int n = l.num_candidates[row] * kChunk;
	const int32_t *candidates = l.candidates + int64_t(row) * l.candidate_stride;
	const uint16_t *masks = l.candidate_masks + int64_t(row) * l.candidate_stride;
	int64_t stride = int64_t(l.candidate_stride) * kChunk;
	const float *logits = l.logits + int64_t(row) * l.asking * stride;
	const CutResult *cuts = l.cuts + int64_t(row) * l.asking;
	int32_t *out = l.lists + int64_t(row) * stride, *out_at = l.use_estimates ? l.list_at + int64_t(row) * stride : nullptr;
	auto is_candidate = [&](int i) { return i < n && masks[i / kChunk] >> i % kChunk & 1; };
	auto heads_keep = [&](int i) {
		if (!is_candidate(i))
			return false;
		bool kept = l.prunes == kPruneNone;
		for (int h = 0; h < l.asking && !kept; h++) {
			u32 key = key_of(logits[h * stride + i] + 0.f);
			kept = key > cuts[h].key || (key == cuts[h].key && i < cuts[h].ties_end);
		}
		return kept;
	};

	// Where budgets ask for more or for fewer, lists are the heaviest by shares.
	bool limited = false;
	u32 cut = 0;
	int ties = 0, tied = 0;
	float *shares = l.shares + int64_t(row) * stride;
	if (l.min_budget || l.max_budget) {
		int mine = 0, kept;
		for (int i = tid; i < n; i += blockDim.x)
			mine += heads_keep(i);
		block_scan(mine, scan, kept);
		int want = min(max(kept, l.min_budget), l.candidate_tokens[row]);
		if (l.max_budget)
			want = min(want, l.max_budget);
		limited = want != kept;
		if (limited) {
			for (int i = tid; i < n; i += blockDim.x) {
				float share = is_candidate(i) ? 0 : -kInfinity;
				for (int h = 0; h < l.asking && share >= 0; h++)
					share += float(double(weight(logits[h * stride + i], cuts[h].most)) / double(cuts[h].total));
				bool is = heads_keep(i);
				if (share >= 0 && (want > kept) == is)
					share = is ? kLargest : -1;
				shares[i] = share;
			}
			cut = kth_key([&](int i) { return shares[i]; }, n, want, ties);
		}
	}

	if (tid < l.asking)
		kept_weight[tid] = 0;
	__syncthreads();
	int written = 0;
	for (int base = 0; base < n; base += blockDim.x) {
		int i = base + tid, all;
		bool kept = i < n && heads_keep(i);
		if (limited) {
			u32 key = i < n ? key_of(shares[i] + 0.f) : 0;
			bool tie = i < n && key == cut;
			int before = block_scan(int(tie), scan, all);
			kept = i < n && (key > cut || (tie && tied + before < ties));
			tied += all;
		}
		for (int h = 0; kept && h < l.asking && l.prunes != kPruneNone; h++)
			atomicAdd(&kept_weight[h], weight(logits[h * stride + i], cuts[h].most));
		int before = block_scan(int(kept), scan, all);
		if (kept) {
			out[written + before] = candidates[i / kChunk] * kChunk + i % kChunk;
			if (out_at)
				out_at[written + before] = i;
		}
		written += all;
	}
	__syncthreads();
	if (tid == 0)
		l.kept[row] = written;
	if (tid < l.asking) {
		const CutResult &cut = cuts[tid];
		l.mass[int64_t(r.sequence) * l.query_heads + r.query_head + tid] =
			cut.total == 0 || written == l.candidate_tokens[row]
				? cut.coverage
				: cut.coverage * fminf(1, float(double(kept_weight[tid]) / double(cut.total)));
	}
}

// Attention over a row's list, or over all of it, in `splits` parts: a block a (part, list row). Lanes
// hold 8 elements each, as many lanes a token as its head size takes; partial results go to scratch.
template <int T, int N>
__device__ void attend(const Layer &l)
{
	using E = typename Element<T>::Type;
	constexpr int kWarps = 4, kBatch = N <= 4 ? 4 : 2;
	extern __shared__ float shared[];
	int row = blockIdx.y, part = blockIdx.x, tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
	RowIndex r = row_index(l, row);
	int path = path_of(l, r.sequence);
	if (path == kVoid || (l.only_dense && path != kDense))
		return;
	bool dense = path == kDense || not_finite(l, r), known = l.use_estimates && !dense; // logits are
	int from = l.first[r.sequence], total = dense ? l.lengths[r.sequence] - from : l.kept[row];
	const int64_t stride = int64_t(l.candidate_stride) * kChunk;
	const int32_t *list = l.lists + row * stride, *list_at = l.list_at + row * stride;
	const float *logits = l.logits + row * l.asking * stride;
	int query = r.sequence * l.query_heads + r.query_head;
	int wide = max(l.k_dim, l.v_dim);
	int lanes = wide <= 64 ? 8 : wide <= 128 ? 16 : 32; // of a token
	int groups = 32 / lanes, group = lane / lanes, place = lane % lanes * 8;
	bool reads_k = place < l.k_dim, reads_v = place < l.v_dim;

	for (int i = tid; i < N * l.k_dim; i += blockDim.x) {
		int h = i / l.k_dim;
		shared[i] = h < l.asking ? l.q[int64_t(query + h) * l.k_dim + i % l.k_dim] : 0;
	}
	__syncthreads();

	float most[N], sum[N], out[N][8];
#pragma unroll
	for (int h = 0; h < N; h++) {
		most[h] = -kInfinity;
		sum[h] = 0;
#pragma unroll
		for (int k = 0; k < 8; k++)
			out[h][k] = 0;
	}
	float k_scale = l.k.scales[r.kv_head];
	int per = part_size(l, total), begin = part * per, end = min(begin + per, total);
	if (begin >= total)
		return;
	for (int base = begin + warp * groups * kBatch; base < end; base += kWarps * groups * kBatch) {
		float key[kBatch][8] = {}, value[kBatch][8] = {};
		bool here[kBatch];
#pragma unroll
		for (int u = 0; u < kBatch; u++) {
			int i = base + u * groups + group;
			here[u] = i < end;
			if (!here[u])
				continue;
			int position = dense ? from + i : __ldg(list + i);
			if (reads_k && !known)
				read8<T>(key[u], token(l, l.k, l.table, r.sequence, r.kv_head, position) + place * sizeof(E), l.aligned);
			if (reads_v)
				read8<T>(value[u], token(l, l.v, l.vtable, r.sequence, r.kv_head, position) + place * sizeof(E), l.aligned);
		}
#pragma unroll
		for (int h = 0; h < N; h++) {
			float dot[kBatch];
			float top = most[h];
			const float *q = shared + h * l.k_dim + place;
#pragma unroll
			for (int u = 0; u < kBatch; u++) {
				dot[u] = 0;
				if (reads_k) {
#pragma unroll
					for (int k = 0; k < 8; k++)
						dot[u] += q[k] * key[u][k];
				}
				for (int o = lanes / 2; o; o >>= 1)
					dot[u] += __shfl_xor_sync(kAll, dot[u], o);
				dot[u] *= k_scale;
				if (l.softcap > 0)
					dot[u] = softcap(dot[u], l.softcap);
				if (known)
					dot[u] = here[u] && h < l.asking ? logits[h * stride + list_at[base + u * groups + group]] : 0;
				if (here[u])
					top = dot[u] != dot[u] ? dot[u] : fmaxf(top, dot[u]);
			}
			if (top == -kInfinity)
				continue;
			float shrink = __expf(most[h] - top);
			sum[h] *= shrink;
#pragma unroll
			for (int k = 0; k < 8; k++)
				out[h][k] *= shrink;
#pragma unroll
			for (int u = 0; u < kBatch; u++) {
				float w = here[u] ? __expf(dot[u] - top) : 0;
				sum[h] += w;
#pragma unroll
				for (int k = 0; k < 8; k++)
					out[h][k] += w * value[u][k];
			}
			most[h] = top;
		}
	}

	// Lane groups, then warps, meet at a common maximum, in a fixed order.
	float *merge = shared + N * l.k_dim; // [warps][N][v_dim+2]
	const int parts = l.v_dim + 2;
#pragma unroll
	for (int h = 0; h < N; h++) {
		float top = most[h];
		for (int o = lanes; o < 32; o <<= 1)
			top = fmaxf(top, __shfl_xor_sync(kAll, top, o));
		float shrink = top == -kInfinity ? 0 : __expf(most[h] - top);
		sum[h] *= shrink;
		for (int o = lanes; o < 32; o <<= 1)
			sum[h] += __shfl_xor_sync(kAll, sum[h], o);
		float *to = merge + (warp * N + h) * parts;
#pragma unroll
		for (int k = 0; k < 8; k++) {
			float x = out[h][k] * shrink;
			for (int o = lanes; o < 32; o <<= 1)
				x += __shfl_xor_sync(kAll, x, o);
			if (group == 0 && reads_v)
				to[2 + place + k] = x;
		}
		if (lane == 0) {
			to[0] = top;
			to[1] = sum[h];
		}
	}
	__syncthreads();
	for (int i = tid; i < l.asking * parts; i += blockDim.x) {
		int h = i / parts, k = i % parts;
		float top = merge[h * parts], x = 0;
		for (int w = 1; w < kWarps; w++)
			top = fmaxf(top, merge[(w * N + h) * parts]);
		for (int w = 0; w < kWarps; w++) {
			const float *of = merge + (w * N + h) * parts;
			x += of[0] == -kInfinity ? 0 : of[k] * __expf(of[0] - top);
		}
		l.partial[((int64_t(row) * l.splits + part) * l.asking + h) * parts + k] = k == 0 ? top : x;
	}
}

template <int N>
__device__ __forceinline__ void attend_any(const Layer &l)
{
	switch (l.cache_dtype) {
	case F32:
		return attend<F32, N>(l);
	case F16:
		return attend<F16, N>(l);
	case BF16:
		return attend<BF16, N>(l);
	default:
		return attend<F8E4M3, N>(l);
	}
}
// For up to N asking heads.
extern "C" __global__ void __launch_bounds__(128) twilight_attend1(const __grid_constant__ Layer l) { attend_any<1>(l); }
extern "C" __global__ void __launch_bounds__(128) twilight_attend2(const __grid_constant__ Layer l) { attend_any<2>(l); }
extern "C" __global__ void __launch_bounds__(128) twilight_attend4(const __grid_constant__ Layer l) { attend_any<4>(l); }
extern "C" __global__ void __launch_bounds__(128) twilight_attend8(const __grid_constant__ Layer l) { attend_any<8>(l); }
extern "C" __global__ void __launch_bounds__(128) twilight_attend16(const __grid_constant__ Layer l) { attend_any<16>(l); }

// Sums the parts of a query head's attention, its sink's weight included, and writes its output.
extern "C" __global__ void twilight_combine(const __grid_constant__ Layer l)
{
	int b = blockIdx.x / l.query_heads, head = blockIdx.x % l.query_heads;
	int row = blockIdx.x / l.asking, asking = blockIdx.x % l.asking, stride = l.v_dim + 2;
	uint8_t *out = l.output + b * l.output_row + head * l.output_head;
	int size = element_size(l.output_dtype);
	if (l.only_dense && path_of(l, b) != kDense)
		return;
	if (path_of(l, b) == kVoid) {
		for (int d = threadIdx.x; d < l.v_dim; d += blockDim.x)
			write1(out + d * size, 0, l.output_dtype);
		return;
	}
	RowIndex r = row_index(l, row);
	bool dense = path_of(l, b) == kDense || not_finite(l, r);
	int total = dense ? l.lengths[b] - l.first[b] : l.kept[row];
	int splits = (total + part_size(l, total) - 1) / part_size(l, total);
	const float *parts = l.partial + (int64_t(row) * l.splits * l.asking + asking) * stride;
	int64_t step = int64_t(l.asking) * stride;
	float top = l.sinks ? l.sinks[head] : -kInfinity;
	for (int s = 0; s < splits; s++)
		top = parts[s * step] != parts[s * step] ? parts[s * step] : fmaxf(top, parts[s * step]);
	float sum = l.sinks ? __expf(l.sinks[head] - top) : 0;
	for (int s = 0; s < splits; s++)
		if (parts[s * step] != -kInfinity)
			sum += parts[s * step + 1] * __expf(parts[s * step] - top);
	float scale = l.v.scales[head / (l.query_heads / l.kv_heads)] / sum;
	for (int d = threadIdx.x; d < l.v_dim; d += blockDim.x) {
		float x = 0;
		for (int s = 0; s < splits; s++)
			if (parts[s * step] != -kInfinity)
				x += parts[s * step + 2 + d] * __expf(parts[s * step] - top);
		write1(out + d * size, x * scale, l.output_dtype);
	}
}

// Computes query heads densely, too: a block an audited query head. Twice over the keys, for the logits and
// for the sum of values.
template <int T>
__device__ void audit(const Layer &l)
{
	using E = typename Element<T>::Type;
	__shared__ float q[kMaxDim], out[8][kMaxDim], tops[32];
	__shared__ double scan[32];
	const int group = l.query_heads / l.kv_heads, audited = l.audited[blockIdx.x / group], tid = threadIdx.x;
	const int lane = tid & 31, warp = tid >> 5, warps = blockDim.x >> 5; // 8
	const int b = audited / l.kv_heads, kv_head = audited % l.kv_heads, head = kv_head * group + blockIdx.x % group;
	const int row = (b * l.query_heads + head) / l.asking;
	const RowIndex r = row_index(l, row);
	if (path_of(l, b) != kSparse || not_finite(l, r))
		return; // nothing is left out
	const int from = l.first[b], n = l.lengths[b] - from, wide = max(l.k_dim, l.v_dim);
	const int lanes = wide <= 64 ? 8 : wide <= 128 ? 16 : 32, groups = 32 / lanes, place = lane % lanes * 8;
	float *logits = l.audit_logits + int64_t(blockIdx.x) * l.audit_stride;
	float *result = l.audit_results + 2 * blockIdx.x;
	const uint8_t *query = l.queries + b * l.query_row + head * l.query_head;
	for (int d = tid; d < l.k_dim; d += blockDim.x)
		q[d] = read1(query + d * element_size(l.query_dtype), l.query_dtype) * (l.query_scale * l.softmax_scale);
	__syncthreads();
	float most = -kInfinity, scale = l.k.scales[kv_head];
	for (int base = warp * groups; base < n; base += warps * groups) {
		int i = base + lane / lanes;
		float key[8] = {}, dot = 0;
		if (i < n && place < l.k_dim) {
			read8<T>(key, token(l, l.k, l.table, b, kv_head, from + i) + place * sizeof(E), l.aligned);
			for (int k = 0; k < 8; k++)
				dot += key[k] * q[place + k];
		}
		for (int o = lanes / 2; o; o >>= 1)
			dot += __shfl_xor_sync(kAll, dot, o);
		dot *= scale;
		if (l.softcap > 0)
			dot = softcap(dot, l.softcap);
		if (i < n && lane % lanes == 0)
			logits[i] = dot;
		if (i < n)
			most = fmaxf(most, dot);
	}
	most = warp_max(most);
	if (lane == 0)
		tops[warp] = most;
	__syncthreads();
	for (int w = 0; w < warps; w++)
		most = fmaxf(most, tops[w]);
	double all = 0, kept = 0;
	for (int i = tid; i < n; i += blockDim.x)
		all += expf(logits[i] - most);
	const int32_t *list = l.lists + int64_t(row) * l.candidate_stride * kChunk;
	for (int i = tid; i < l.kept[row]; i += blockDim.x)
		kept += expf(logits[list[i] - from] - most);
	all = block_sum(all, scan);
	kept = block_sum(kept, scan);
	if (tid == 0) {
		result[0] = float(kept / all);
		result[1] = kNaN;
	}
	if (l.lists_only)
		return;

	float sum[8] = {};
	for (int base = warp * groups; base < n; base += warps * groups) {
		int i = base + lane / lanes;
		if (i >= n || place >= l.v_dim)
			continue;
		float value[8], w = expf(logits[i] - most);
		read8<T>(value, token(l, l.v, l.vtable, b, kv_head, from + i) + place * sizeof(E), l.aligned);
		for (int k = 0; k < 8; k++)
			sum[k] += w * value[k];
	}
	for (int k = 0; k < 8; k++) {
		for (int o = lanes; o < 32; o <<= 1)
			sum[k] += __shfl_xor_sync(kAll, sum[k], o);
		if (lane < lanes && place < l.v_dim)
			out[warp][place + k] = sum[k];
	}
	__syncthreads();
	double off = 0, norm = 0;
	double total = all + (l.sinks ? exp(double(l.sinks[head]) - most) : 0);
	const uint8_t *output = l.output + b * l.output_row + head * l.output_head;
	for (int d = tid; d < l.v_dim; d += blockDim.x) {
		double dense = 0;
		for (int w = 0; w < warps; w++)
			dense += out[w][d];
		dense *= l.v.scales[kv_head] / total;
		double x = read1(output + d * element_size(l.output_dtype), l.output_dtype) - dense;
		off += x * x;
		norm += dense * dense;
	}
	off = block_sum(off, scan);
	norm = block_sum(norm, scan);
	if (tid == 0)
		result[1] = off == 0 ? 0 : float(sqrt(off / norm));
}
extern "C" __global__ void __launch_bounds__(256) twilight_audit(const __grid_constant__ Layer l)
{
	switch (l.cache_dtype) {
	case F32:
		return audit<F32>(l);
	case F16:
		return audit<F16>(l);
	case BF16:
		return audit<BF16>(l);
	default:
		return audit<F8E4M3>(l);
	}
}

// Makes lists of what the fused kernel kept, a bit a token: a block a list row.
extern "C" __global__ void twilight_expand(const __grid_constant__ Layer l)
{
	__shared__ int scan[32];
	int row = blockIdx.x, tid = threadIdx.x, written = 0;
	RowIndex r = row_index(l, row);
	if (path_of(l, r.sequence) != kSparse)
		return;
	int first = l.first[r.sequence] / kChunk, n = (l.lengths[r.sequence] + kChunk - 1) / kChunk - first;
	const uint16_t *masks = l.kept_masks + int64_t(row) * l.chunk_stride;
	int32_t *out = l.lists + int64_t(row) * l.candidate_stride * kChunk;
	for (int base = 0; base < n; base += blockDim.x) {
		u32 mask = base + tid < n ? masks[base + tid] : 0;
		int all, at = written + block_scan(__popc(mask), scan, all);
		for (; mask; mask &= mask - 1)
			out[at++] = (first + base + tid) * kChunk + __ffs(mask) - 1;
		written += all;
	}
}

// Copies the rows' lists to where the caller wants them: cut to a capacity each or, if that is 0, one
// behind another. A block a list row.
extern "C" __global__ void twilight_lists(const __grid_constant__ Layer l)
{
	__shared__ u64 scan[32];
	int row = blockIdx.x;
	auto length = [&](int r) {
		RowIndex i = row_index(l, r);
		int path = path_of(l, i.sequence);
		if (path == kVoid)
			return 0;
		return path == kDense || not_finite(l, i) ? l.lengths[i.sequence] - l.first[i.sequence] : l.kept[r];
	};
	u64 at = u64(row) * l.out_capacity, before = 0;
	if (l.out_capacity == 0) {
		for (int r = threadIdx.x; r < row; r += blockDim.x)
			before += length(r);
		block_scan(before, scan, at);
	}
	RowIndex r = row_index(l, row);
	int n = length(row), b = r.sequence;
	n = min(u64(n), l.out_capacity ? l.out_capacity : at < l.out_room ? l.out_room - at : 0);
	bool dense = path_of(l, b) == kDense || not_finite(l, r);
	const int32_t *list = l.lists + int64_t(row) * l.candidate_stride * kChunk;
	for (int i = threadIdx.x; i < n; i += blockDim.x)
		l.out_lists[at + i] = dense ? l.first[b] + i : list[i];
	if (threadIdx.x == 0 && l.out_counts)
		l.out_counts[row] = n;
}

// Offsets by which the host checks its idea of Layer.
extern "C" __device__ const uint32_t twilight_layout[] = {
	sizeof(Layer), offsetof(Layer, lengths), offsetof(Layer, queries), offsetof(Layer, int4), offsetof(Layer, q),
	offsetof(Layer, lists), offsetof(Layer, audited), offsetof(Layer, batch), offsetof(Layer, softmax_scale), sizeof(CutResult),
};
