// Keys to shadow: training the equalisation, and bringing chunk records up to date. What the numbers
// mean is said by pruner/minmaxquant and selector/quest; only their places are this device's own.
#pragma once
#include "device.cuh"

constexpr int kMaxDim = 256;
constexpr int kLaneDims = kMaxDim / 32;
constexpr float kDriftFactor = 4, kScaleRange = 16;

// Products and sums are rounded one by one, as the host's are: records are the same bits.
template <int T>
__device__ __forceinline__ float key_at(const uint8_t *token, int d, float scale)
{
	return __fmul_rn(Element<T>::real(reinterpret_cast<const typename Element<T>::Type *>(token)[d]), scale);
}

// Trains KV heads' equalisation on the first `level` valid tokens of sequence b: a block a head.
template <int T>
__device__ void train(const Layer &l, int b, int level)
{
	__shared__ float largest[32];
	int head = blockIdx.x, first = l.first[b], d = threadIdx.x;
	bool known = true;
	for (int i = d; i < level; i += blockDim.x)
		known &= on_page(l, b, first + i);
	if (!__syncthreads_and(known))
		return;
	float scale = l.k.scales[head], mean = 0, root = 0, reach = 0;
	if (d < l.k_dim) {
		double sum = 0, square = 0, most = 0;
#pragma unroll 8
		for (int i = 0; i < level; i++)
			sum += key_at<T>(token(l, l.k, l.table, b, head, first + i), d, scale);
		mean = float(sum / level);
#pragma unroll 8
		for (int i = 0; i < level; i++) {
			double x = __fsub_rn(key_at<T>(token(l, l.k, l.table, b, head, first + i), d, scale), mean);
			square = __dadd_rn(square, __dmul_rn(x, x));
			most = fmax(most, fabs(x));
		}
		root = float(sqrt(sqrt(square / level)));
		reach = float(most);
		if (!isfinite(mean) || !isfinite(root))
			mean = root = reach = 0;
	}
	float top = warp_max(root);
	if (d % 32 == 0)
		largest[d / 32] = top;
	__syncthreads();
	for (int w = 0; w < int(blockDim.x / 32); w++)
		top = fmaxf(top, largest[w]);
	if (d < l.k_dim) {
		l.mean[head * l.k_dim + d] = mean;
		l.spread[head * l.k_dim + d] = fmaxf(root, top / kScaleRange);
		l.reach[head * l.k_dim + d] = reach;
	}
}

// fp16 rounded outwards; what lies beyond its range becomes infinite.
__device__ __forceinline__ __half outwards(float x, bool up) { return up ? __float2half_ru(x) : __float2half_rd(x); }

// Quantises a warp's vector of n elements, that of lane + 32 j in x[j], as internal/lowbit does. whole: all
// are finite. Returns scale and zero.
__device__ __half2 quantise(const float (&x)[kLaneDims], int n, int bits, bool symmetric, bool whole, uint8_t *codes)
{
	int lane = threadIdx.x & 31;
	float top = (1 << bits) - (symmetric ? 2 : 1), least = kInfinity, most = -kInfinity;
#pragma unroll
	for (int j = 0; j < kLaneDims; j++) {
		if (lane + 32 * j >= n)
			break;
		least = fminf(least, x[j]);
		most = fmaxf(most, x[j]);
	}
	most = warp_max(most);
	least = -warp_max(-least);
	if (symmetric) {
		most = fmaxf(most, -least);
		least = -most;
	}
	__half2 stored = __floats2half2_rn(whole ? (most - least) / top : kNaN, least);
	float2 real = __half22float2(stored);
	if (symmetric)
		real.y = __fmul_rn(-top / 2, real.x);
	bool coded = real.x > 0 && isfinite(real.x) && isfinite(real.y);
#pragma unroll
	for (int j = 0; j < kLaneDims; j++) {
		int d = lane + 32 * j;
		if (d >= n)
			break;
		float code = __fadd_rn(__fmul_rn(__fsub_rn(x[j], real.y), 1 / real.x), .5f);
		codes[d] = coded ? uint8_t(fminf(fmaxf(code, 0), top)) : 0;
	}
	return stored;
}

// Packs the fresh tokens' codes, n of each, into a record: a warp.
__device__ void pack(uint8_t *record, u32 fresh, const uint8_t *codes, int n, int bits)
{
	int size = (n * bits + 7) / 8, each = 8 / bits;
	for (; fresh; fresh &= fresh - 1) {
		int t = __ffs(fresh) - 1;
		for (int i = threadIdx.x & 31; i < size; i += 32) {
			u32 byte = 0;
			for (int k = 0; k < each && i * each + k < n; k++)
				byte |= u32(codes[t * n + i * each + k]) << (k * bits);
			record[t * size + i] = byte;
		}
	}
}

// Labels a chunk's fresh tokens: a warp.
template <int T>
__device__ void index_labels(const Layer &l, int b, int chunk, int head, u32 fresh, uint8_t *record, uint8_t *codes)
{
	int lane = threadIdx.x & 31, n = l.label_dim;
	const int32_t *channels = l.channels + head * n;
	float scale = l.k.scales[head];
	for (u32 left = fresh; left; left &= left - 1) {
		int t = __ffs(left) - 1;
		const uint8_t *from = token(l, l.k, l.table, b, head, chunk * kChunk + t);
		float label[kLaneDims];
		bool whole = true;
#pragma unroll
		for (int j = 0; j < kLaneDims; j++) {
			if (lane + 32 * j >= n)
				break;
			label[j] = key_at<T>(from, channels[lane + 32 * j], scale);
			whole &= isfinite(label[j]);
		}
		whole = __all_sync(kAll, whole);
		__half2 stored = quantise(label, n, l.label_bits, false, whole, codes + t * n);
		if (lane == 0)
			reinterpret_cast<__half2 *>(record)[t] = stored;
	}
	__syncwarp();
	pack(record + kChunk * 4, fresh, codes, n, l.label_bits);
	__syncwarp();
}

// Indexes a chunk for one KV head: a warp. codes is its scratch, [kChunk][k_dim].
template <int T>
__device__ void index_chunk(const Layer &l, int work, int head, uint8_t *codes)
{
	const int32_t *w = l.work + 4 * int64_t(work);
	int b = w[0], chunk = w[1], id = w[2], lane = threadIdx.x & 31, dims = l.k_dim;
	u32 valid = w[3] & 0xffff, fresh = u32(w[3]) >> 16;
	// Work and tables are written apart: no page is read that is not there.
	if (id < 0 || id >= l.chunks || !__all_sync(kAll, !(valid >> lane & 1) || on_page(l, b, chunk * kChunk + lane)))
		return;
	const bool estimates = l.estimates != kEstimateExact;
	float scale = l.k.scales[head];
	float high[kLaneDims], low[kLaneDims], mean[kLaneDims], inverse[kLaneDims], limit[kLaneDims];
#pragma unroll
	for (int j = 0; j < kLaneDims; j++) {
		int d = lane + 32 * j;
		high[j] = low[j] = 0;
		bool trained = estimates && d < dims;
		mean[j] = trained ? l.mean[head * dims + d] : 0;
		float spread = trained ? l.spread[head * dims + d] : 0, reach = trained ? l.reach[head * dims + d] : 0;
		inverse[j] = spread == 0 || !l.equalise ? 1 : 1 / spread;
		limit[j] = spread == 0	  ? kInfinity
			   : !l.equalise ? kDriftFactor * fmaxf(reach, spread * spread)
					 : kDriftFactor * fmaxf(reach / spread, spread);
	}
	const int64_t record = int64_t(id) * l.kv_heads + head;
	uint8_t *int4 = l.int4 + record * int4_bytes(dims);
	uint8_t *coded = l.codes + record * code_bytes(dims, l.code_bits, l.code_symmetric);
	if (l.ranks == kRankLabels && l.channels)
		index_labels<T>(l, b, chunk, head, fresh, l.labels + record * code_bytes(l.label_dim, l.label_bits, 0), codes);
	bool finite = true, drifted = false, any = false;
	for (u32 left = valid; left; left &= left - 1) {
		int t = __ffs(left) - 1;
		const uint8_t *from = token(l, l.k, l.table, b, head, chunk * kChunk + t);
		float key[kLaneDims];
		bool whole = true;
#pragma unroll
		for (int j = 0; j < kLaneDims; j++) {
			int d = lane + 32 * j;
			if (d >= dims)
				break;
			key[j] = key_at<T>(from, d, scale);
			whole &= isfinite(key[j]);
			high[j] = any ? fmaxf(high[j], key[j]) : key[j];
			low[j] = any ? fminf(low[j], key[j]) : key[j];
		}
		any = true;
		whole = __all_sync(kAll, whole);
		finite &= whole;
		if (!estimates || !(fresh >> t & 1))
			continue;
#pragma unroll
		for (int j = 0; j < kLaneDims; j++) {
			if (lane + 32 * j >= dims)
				break;
			key[j] = __fmul_rn(__fsub_rn(key[j], mean[j]), inverse[j]);
			drifted |= fabsf(key[j]) > limit[j];
		}
		__half2 stored = quantise(key, dims, l.code_bits, l.code_symmetric, whole, codes + t * dims);
		if (lane != 0)
			continue;
		if (l.estimates == kEstimateInt4)
			reinterpret_cast<__half2 *>(int4 + dims * 8)[t] = stored;
		else if (l.code_symmetric)
			reinterpret_cast<__half *>(coded)[t] = __low2half(stored);
		else
			reinterpret_cast<__half2 *>(coded)[t] = stored;
	}
	if (__any_sync(kAll, drifted) && lane == 0)
		if (atomicExch(l.drift_flags + work, 1u) == 0)
			atomicAdd(l.drifted, 1u);

	if (l.selects == kSelectQuest) {
		__half *bounds = reinterpret_cast<__half *>(l.bounds + record * bounds_bytes(dims));
#pragma unroll
		for (int j = 0; j < kLaneDims; j++) {
			int d = lane + 32 * j;
			if (d >= dims)
				break;
			// One channel spoils the bound for good.
			bounds[d] = finite ? outwards(high[j], true) : __ushort_as_half(0x7c00);
			bounds[dims + d] = outwards(low[j], false);
		}
	}
	__syncwarp();
	if (l.estimates == kEstimateCodes)
		pack(coded + kChunk * (l.code_symmetric ? 2 : 4), fresh, codes, dims, l.code_bits);
	if (l.estimates != kEstimateInt4)
		return;
	// In the order in which lanes of an m16n8k16 tile hold a, four tokens' codes of a channel pair a
	// word, so that they become halves by masking: tokens g and g+8, channels 2t, 2t+1, 2t+8, 2t+9.
	int g = lane >> 2, t = lane & 3;
	u32 keep = (fresh >> g & 1 ? 0 : 0x00ff00ffu) | (fresh >> (g + 8) & 1 ? 0 : 0xff00ff00u);
	auto code = [&](int token, int d) { return u32(codes[token * dims + d] & 15); }; // anything where not fresh
	for (int s = 0; s < dims / 16; s++) {
		u32 word = 0;
		for (int e = 0; e < 2; e++) {
			int d = 16 * s + 2 * t + e;
			word |= (code(g, d) | code(g, d + 8) << 4) << (16 * e);
			word |= (code(g + 8, d) | code(g + 8, d + 8) << 4) << (16 * e + 8);
		}
		u32 *at = reinterpret_cast<u32 *>(int4) + int4_word(dims / 16, s, lane);
		*at = (*at & keep) | (word & ~keep);
	}
	__syncwarp();
}
