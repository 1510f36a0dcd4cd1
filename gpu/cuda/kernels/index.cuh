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

// Indexes a chunk for one KV head: a warp. w is the work, the layer's `work`-th. codes is its scratch,
// [kChunk][k_dim].
template <int T>
__device__ void index_chunk(const Layer &l, const int32_t *w, int work, int head, uint8_t *codes)
{
	int b = w[0], chunk = w[1], id = w[2], lane = threadIdx.x & 31, dims = l.k_dim;
	u32 valid = w[3] & 0xffff, fresh = u32(w[3]) >> 16;
	float scale = l.k.scales[head];
	float high[kLaneDims], low[kLaneDims], mean[kLaneDims], inverse[kLaneDims], limit[kLaneDims];
#pragma unroll
	for (int j = 0; j < kLaneDims; j++) {
		int d = lane + 32 * j;
		high[j] = low[j] = 0;
		bool trained = l.estimates == kEstimateInt4 && d < dims;
		mean[j] = trained ? l.mean[head * dims + d] : 0;
		float spread = trained ? l.spread[head * dims + d] : 0;
		inverse[j] = spread == 0 ? 1 : 1 / spread;
		limit[j] = spread == 0 ? kInfinity : kDriftFactor * fmaxf(l.reach[head * dims + d] / spread, spread);
	}
	int64_t record = int64_t(id) * l.kv_heads + head;
	uint8_t *int4 = l.int4 + record * int4_bytes(dims);
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
		if (l.estimates != kEstimateInt4 || !(fresh >> t & 1))
			continue;
		float least = kInfinity, most = -kInfinity;
#pragma unroll
		for (int j = 0; j < kLaneDims; j++) {
			if (lane + 32 * j >= dims)
				break;
			key[j] = __fmul_rn(__fsub_rn(key[j], mean[j]), inverse[j]);
			drifted |= fabsf(key[j]) > limit[j];
			least = fminf(least, key[j]);
			most = fmaxf(most, key[j]);
		}
		most = warp_max(most);
		least = -warp_max(-least);
		__half2 stored = __floats2half2_rn(whole ? (most - least) / 15 : kNaN, least);
		float2 real = __half22float2(stored);
		bool coded = real.x > 0 && isfinite(real.x) && isfinite(real.y);
#pragma unroll
		for (int j = 0; j < kLaneDims; j++) {
			int d = lane + 32 * j;
			if (d >= dims)
				break;
			float code = __fadd_rn(__fmul_rn(__fsub_rn(key[j], real.y), 1 / real.x), .5f);
			codes[t * dims + d] = coded ? uint8_t(fminf(fmaxf(code, 0), 15)) : 0;
		}
		if (lane == 0)
			reinterpret_cast<__half2 *>(int4 + dims * 8)[t] = stored;
	}
	if (__any_sync(kAll, drifted) && lane == 0 && l.drift_flags)
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
	if (l.estimates != kEstimateInt4)
		return;
	__syncwarp();
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
