// A layer as a chain of kernels: any shape, any device. The arithmetic is the reference's; sums that
// decide anything are of integers, so that results do not depend on the order of threads.
#include "device.cuh"
#include "index.cuh"

// Checks ids and lengths before anything reads memory by them: a block a sequence.
extern "C" __global__ void twilight_check(const __grid_constant__ Layer l, int32_t *found)
{
	int b = blockIdx.x;
	int length = l.lengths[b], first = l.first[b];
	if (length == 0) {
		if (threadIdx.x == 0)
			found[b] = 0;
		return;
	}
	int pages = (length + l.page_size - 1) / l.page_size;
	bool bad = length < 1 || first < 0 || first >= length || pages > l.table_stride ||
		   (length + kChunk - 1) / kChunk > l.chunk_stride;
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

// Begins an armed layer, and tells whether it is to run. For a warp of its first kernel.
__device__ __forceinline__ bool begin(const Layer &l)
{
	const volatile u32 *gate = l.gate;
	u32 go = *reinterpret_cast<volatile u32 *>(l.go);
	bool stop = go != kGo || l.plan[2] || int32_t(gate[0] - gate[1]) <= 0;
	stop = __any_sync(kAll, stop);
	if (stop && threadIdx.x % 32 == 0) {
		*reinterpret_cast<volatile u32 *>(l.run) = 0;
		if (go == kGo)
			park(l);
	}
	if (!stop && blockIdx.x == 0 && threadIdx.x == 0 && *reinterpret_cast<const volatile u32 *>(l.status))
		park(l); // the engine gave it up
	return !stop;
}

// Indexes the layer's work: a warp a (chunk, KV head).
extern "C" __global__ void __launch_bounds__(128) twilight_index(const __grid_constant__ Layer l)
{
	extern __shared__ uint8_t codes[];
	int warp = threadIdx.x / 32, first = 0, works = l.works;
	if (l.plan) {
		first = l.plan[0];
		works = l.plan[1];
	}
	if (l.go && !begin(l))
		return;
	uint8_t *mine = codes + warp * kChunk * l.k_dim;
	for (int64_t i = int64_t(blockIdx.x) * 4 + warp; i < int64_t(works) * l.kv_heads; i += int64_t(gridDim.x) * 4) {
		int work = int(i / l.kv_heads), head = int(i % l.kv_heads);
		const int32_t *w = l.work + 4 * int64_t(first + work);
		switch (l.cache_dtype) {
		case F32:
			index_chunk<F32>(l, w, work, head, mine);
			break;
		case F16:
			index_chunk<F16>(l, w, work, head, mine);
			break;
		case BF16:
			index_chunk<BF16>(l, w, work, head, mine);
			break;
		default:
			index_chunk<F8E4M3>(l, w, work, head, mine);
		}
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
	if (idle(l))
		return;
	int i = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x & 31;
	if (i >= l.batch * l.query_heads)
		return;
	int b = i / l.query_heads, head = i % l.query_heads, dims = l.k_dim;
	int kv_head = head / (l.query_heads / l.kv_heads);
	const uint8_t *query = l.queries + b * l.query_row + head * l.query_head;
	float *q = l.q + int64_t(i) * dims;
	float factor = l.query_scale * l.softmax_scale;
	if (path_of(l, b) == kVoid) {
		if (l.bad[b] && lane == 0)
			atomicOr(&l.flags[b * l.kv_heads + kv_head], kBadRow);
		return;
	}
	float most = 0, constant = 0, sum = 0;
	for (int d = lane; d < dims; d += 32) {
		float stored = read1(query + d * element_size(l.query_dtype), l.query_dtype);
		if (!isfinite(stored * l.query_scale)) {
			atomicMax(reinterpret_cast<u64 *>(l.bad_query),
				  ~((u64(i) * dims + d) << 32 | __float_as_uint(stored * l.query_scale)));
			park(l);
		}
		float x = stored * factor;
		q[d] = x;
		float equal = l.estimates == kEstimateInt4 ? x * channel_scale(l, kv_head, d) : x;
		most = fmaxf(most, fmaxf(fabsf(x), fabsf(equal)));
		if (l.estimates == kEstimateInt4)
			constant += x * l.mean[kv_head * dims + d];
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
	if (idle(l))
		return;
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

// The best chunks of a list row, ascending, ties going to the lower chunk: a block a row.
extern "C" __global__ void twilight_select(const __grid_constant__ Layer l)
{
	if (idle(l))
		return;
	__shared__ int scan[32];
	int row = blockIdx.x, tid = threadIdx.x;
	RowIndex r = row_index(l, row);
	if (path_of(l, r.sequence) != kSparse)
		return;
	int from = l.first[r.sequence], length = l.lengths[r.sequence];
	int first = from / kChunk, n = (length + kChunk - 1) / kChunk - first;
	int pins = l.pin_first + (l.pin_current && !(l.pin_first && n == 1));
	int keep = l.selects == kSelectAll ? n : min(max(l.budgets[r.sequence], pins), n);
	int32_t *out = l.candidates + int64_t(row) * l.candidate_stride;
	const float *scores = l.scores + int64_t(row) * l.chunk_stride;
	u32 cut = 0;
	int ties = 0;
	if (keep < n)
		cut = kth_key([&](int i) { return scores[i]; }, n, keep, ties);
	int written = 0, tied = 0;
	for (int base = 0; base < n; base += blockDim.x) {
		int i = base + tid;
		u32 key = i < n ? (keep == n ? kAll : key_of(scores[i] + 0.f)) : 0;
		bool tie = i < n && keep < n && key == cut;
		int all, before = block_scan(int(tie), scan, all);
		bool kept = i < n && (keep == n || key > cut || (tie && tied + before < ties));
		tied += all;
		before = block_scan(int(kept), scan, all);
		if (kept)
			out[written + before] = first + i;
		written += all;
	}
	if (tid == 0) {
		l.num_candidates[row] = written;
		// All chunks are whole but the first and the last of the row.
		int tokens = written * kChunk;
		if (out[0] == first)
			tokens -= from - first * kChunk;
		if (out[written - 1] == first + n - 1)
			tokens -= (first + n) * kChunk - length;
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

// INT4 estimates of the candidates' logits: a warp a chunk at a time.
extern "C" __global__ void twilight_estimate(const __grid_constant__ Layer l)
{
	if (idle(l))
		return;
	int row = blockIdx.y, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
	RowIndex r = row_index(l, row);
	if (path_of(l, r.sequence) != kSparse)
		return;
	int dims = l.k_dim, steps = dims / 16, n = l.num_candidates[row];
	int from = l.first[r.sequence], length = l.lengths[r.sequence];
	const int32_t *candidates = l.candidates + int64_t(row) * l.candidate_stride;
	int query = r.sequence * l.query_heads + r.query_head;
	int64_t stride = int64_t(l.candidate_stride) * kChunk;
	for (int i = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; i < n; i += gridDim.x * (blockDim.x / 32)) {
		int chunk = candidates[i];
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
				int h = h0 + 2 * t + (k & 1), position = chunk * kChunk + g + (k >> 1) * 8;
				if (h >= l.asking)
					continue;
				const float *sums = l.q_sums + 4 * (query + h);
				float2 scale = k >> 1 ? lower : upper;
				float logit = scale.x * (c[k] * sums[2]) + (scale.y * sums[1] + sums[0]);
				if (l.softcap > 0)
					logit = softcap(logit, l.softcap);
				bool valid = position >= from && position < length;
				if (valid && !isfinite(logit))
					atomicOr(&l.flags[r.sequence * l.kv_heads + r.kv_head], kNotFinite);
				l.logits[(int64_t(row) * l.asking + h) * stride + i * kChunk + position % kChunk] =
					valid ? logit : -kInfinity;
			}
		}
	}
}

// Exact logits of the candidates, for the estimator "none": a warp a token and head at a time.
template <int T>
__device__ void exact(const Layer &l)
{
	if (idle(l))
		return;
	int row = blockIdx.y, lane = threadIdx.x & 31;
	RowIndex r = row_index(l, row);
	if (path_of(l, r.sequence) != kSparse)
		return;
	int dims = l.k_dim, n = l.num_candidates[row] * kChunk;
	int from = l.first[r.sequence], length = l.lengths[r.sequence];
	const int32_t *candidates = l.candidates + int64_t(row) * l.candidate_stride;
	int query = r.sequence * l.query_heads + r.query_head;
	int64_t stride = int64_t(l.candidate_stride) * kChunk;
	float scale = l.k.scales[r.kv_head];
	for (int i = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; i < n; i += gridDim.x * (blockDim.x / 32)) {
		int position = candidates[i / kChunk] * kChunk + i % kChunk;
		bool valid = position >= from && position < length;
		float key[8] = {};
		if (valid && lane * 8 < dims)
			read8<T>(key, token(l, l.k, l.table, r.sequence, r.kv_head, position) + lane * 8 * sizeof(typename Element<T>::Type),
				 l.aligned);
		for (int h = 0; h < l.asking; h++) {
			float sum = 0;
			if (lane * 8 < dims)
				for (int k = 0; k < 8; k++)
					sum += key[k] * l.q[int64_t(query + h) * dims + lane * 8 + k];
			float logit = warp_sum(sum) * scale;
			if (l.softcap > 0)
				logit = softcap(logit, l.softcap);
			if (lane == 0) {
				if (valid && !isfinite(logit))
					atomicOr(&l.flags[r.sequence * l.kv_heads + r.kv_head], kNotFinite);
				l.logits[(int64_t(row) * l.asking + h) * stride + i] = valid ? logit : -kInfinity;
			}
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
	int first = l.first[r.sequence] / kChunk, n = (l.lengths[r.sequence] + kChunk - 1) / kChunk - first;
	int taken = l.num_candidates[row], tid = threadIdx.x;
	if (taken == n)
		return 0;
	const int32_t *candidates = l.candidates + int64_t(row) * l.candidate_stride;
	const float *logits = l.logits + (int64_t(row) * l.asking + head) * l.candidate_stride * kChunk;
	const float *bounds = l.head_bounds + (int64_t(row) * l.asking + head) * l.chunk_stride;
	constexpr int kLeastPoints = 4;
	constexpr float kMostLog = 80;
	auto relative = [&](float bound) {
		if (l.softcap > 0)
			bound = softcap(bound, l.softcap);
		return bound - top;
	};
	double shift = n > 1 && isfinite(bounds[1]) ? relative(bounds[1]) : 0; // keeps the squares small
	double sums[7] = {}; // of the points: 1, x, y, x*x, x*y, y*y; of all candidates: weight
	for (int i = tid; i < taken; i += blockDim.x) {
		float sum = 0;
		for (int t = 0; t < kChunk; t++) {
			float logit = logits[i * kChunk + t];
			sum += logit == -kInfinity ? 0 : expf(fmaxf(logit - top, kLowest));
		}
		sums[6] += sum;
		int c = candidates[i] - first;
		if (c < 1 || c >= n - 1 || !isfinite(bounds[c]))
			continue;
		double x = relative(bounds[c]) - shift, y = log(double(sum));
		sums[0] += 1, sums[1] += x, sums[2] += y, sums[3] += x * x, sums[4] += x * y, sums[5] += y * y;
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
	for (int c = tid, at = 0; c < n; c += blockDim.x) {
		while (at < taken && candidates[at] - first < c)
			at++;
		if (at < taken && candidates[at] - first == c)
			continue;
		known &= isfinite(bounds[c]);
		float bound = relative(bounds[c]), away = float(bound - centre);
		float guess = (float(bend) * away + float(slope)) * away + float(level);
		weight += expf(fmaxf(fminf(fminf(guess, bound + logf(kChunk)), kMostLog), kLowest));
	}
	weight = block_sum(weight, scan);
	return __syncthreads_and(known) ? weight / sums[6] : kNaN;
}

// Where a head's candidates are cut: a block a (list row, asking head). cuts holds the least key kept
// and the last candidate kept that has just it.
extern "C" __global__ void twilight_cut(const __grid_constant__ Layer l)
{
	if (idle(l))
		return;
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
	double share = l.p[r.sequence];
	if (l.over_all && relative == relative)
		share *= 1 + relative;
	if (l.prunes == kPruneNone || share >= 1) {
		if (tid == 0)
			*result = {0, 0, most, coverage, 0};
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
	if (idle(l))
		return;
	__shared__ int scan[32];
	__shared__ u64 kept_weight[16];
	int row = blockIdx.x, tid = threadIdx.x;
	RowIndex r = row_index(l, row);
	if (path_of(l, r.sequence) != kSparse || not_finite(l, r))
		return;
	int n = l.num_candidates[row] * kChunk, from = l.first[r.sequence], length = l.lengths[r.sequence];
	const int32_t *candidates = l.candidates + int64_t(row) * l.candidate_stride;
	int64_t stride = int64_t(l.candidate_stride) * kChunk;
	const float *logits = l.logits + int64_t(row) * l.asking * stride;
	const CutResult *cuts = l.cuts + int64_t(row) * l.asking;
	int32_t *out = l.lists + int64_t(row) * l.candidate_stride * kChunk;
	if (tid < l.asking)
		kept_weight[tid] = 0;
	__syncthreads();
	int written = 0;
	for (int base = 0; base < n; base += blockDim.x) {
		int i = base + tid, position = 0, all;
		bool kept = false;
		if (i < n) {
			position = candidates[i / kChunk] * kChunk + i % kChunk;
			bool valid = position >= from && position < length;
			if (l.prunes == kPruneNone)
				kept = valid;
			else if (valid) {
				for (int h = 0; h < l.asking; h++) {
					u32 key = key_of(logits[h * stride + i] + 0.f);
					kept |= key > cuts[h].key || (key == cuts[h].key && i < cuts[h].ties_end);
				}
				for (int h = 0; kept && h < l.asking; h++)
					atomicAdd(&kept_weight[h], weight(logits[h * stride + i], cuts[h].most));
			}
		}
		int before = block_scan(int(kept), scan, all);
		if (kept)
			out[written + before] = position;
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
	if (idle(l))
		return;
	using E = typename Element<T>::Type;
	constexpr int kWarps = 4, kBatch = N <= 4 ? 4 : 2;
	extern __shared__ float shared[];
	int row = blockIdx.y, part = blockIdx.x, tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
	RowIndex r = row_index(l, row);
	int path = path_of(l, r.sequence);
	if (path == kVoid)
		return;
	bool dense = path == kDense || not_finite(l, r);
	int from = l.first[r.sequence], total = dense ? l.lengths[r.sequence] - from : l.kept[row];
	const int32_t *list = l.lists + int64_t(row) * l.candidate_stride * kChunk;
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
			if (reads_k)
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
	int stride = l.v_dim + 2;
#pragma unroll
	for (int h = 0; h < N; h++) {
		float top = most[h];
		for (int o = lanes; o < 32; o <<= 1)
			top = fmaxf(top, __shfl_xor_sync(kAll, top, o));
		float shrink = top == -kInfinity ? 0 : __expf(most[h] - top);
		sum[h] *= shrink;
		for (int o = lanes; o < 32; o <<= 1)
			sum[h] += __shfl_xor_sync(kAll, sum[h], o);
		float *to = merge + (warp * N + h) * stride;
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
	for (int i = tid; i < l.asking * stride; i += blockDim.x) {
		int h = i / stride, k = i % stride;
		float top = merge[h * stride], x = 0;
		for (int w = 1; w < kWarps; w++)
			top = fmaxf(top, merge[(w * N + h) * stride]);
		for (int w = 0; w < kWarps; w++) {
			const float *of = merge + (w * N + h) * stride;
			x += of[0] == -kInfinity ? 0 : of[k] * __expf(of[0] - top);
		}
		l.partial[((int64_t(row) * l.splits + part) * l.asking + h) * stride + k] = k == 0 ? top : x;
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
__device__ __forceinline__ void combine(const Layer &l)
{
	if (idle(l))
		return;
	int b = blockIdx.x / l.query_heads, head = blockIdx.x % l.query_heads;
	int row = blockIdx.x / l.asking, asking = blockIdx.x % l.asking, stride = l.v_dim + 2;
	uint8_t *out = l.output + b * l.output_row + head * l.output_head;
	int size = element_size(l.output_dtype);
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
extern "C" __global__ void twilight_combine(const __grid_constant__ Layer l)
{
	combine(l);
	finish(l);
}

// Makes lists of what the fused kernel kept, a bit a token: a block a list row.
extern "C" __global__ void twilight_expand(const __grid_constant__ Layer l)
{
	if (idle(l))
		return;
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
__device__ __forceinline__ void lists(const Layer &l)
{
	if (idle(l))
		return;
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
	if (l.out_capacity)
		n = min(n, l.out_capacity);
	bool dense = path_of(l, b) == kDense || not_finite(l, r);
	const int32_t *list = l.lists + int64_t(row) * l.candidate_stride * kChunk;
	for (int i = threadIdx.x; i < n; i += blockDim.x)
		l.out_lists[at + i] = dense ? l.first[b] + i : list[i];
	if (threadIdx.x == 0 && l.out_counts)
		l.out_counts[row] = n;
}
extern "C" __global__ void twilight_lists(const __grid_constant__ Layer l)
{
	lists(l);
	finish(l);
}

// Offsets by which the host checks its idea of Layer.
extern "C" __device__ const uint32_t twilight_layout[] = {
	sizeof(Layer), offsetof(Layer, lengths), offsetof(Layer, queries), offsetof(Layer, int4), offsetof(Layer, q),
	offsetof(Layer, lists), offsetof(Layer, go), offsetof(Layer, batch), offsetof(Layer, softmax_scale), sizeof(CutResult),
};
