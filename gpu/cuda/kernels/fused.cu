// A layer in one launch, for rows that run sparsely: a cluster of blocks a list row, whose blocks own
// every C-th chunk. What is linear runs on the tensor cores: chunk bounds, INT4 estimates, logits and
// the sum of values. Nothing between the stages leaves shared memory.
#include <cooperative_groups.h>

#include "tensor.cuh"

namespace cg = cooperative_groups;

// An estimate's code is how far it lies below the row's largest chunk bound, in steps of 1/256 octave of
// weight. Bins hold 32 codes: 256 of them are 32 octaves, and what is lighter shares the last.
constexpr int kFine = 256, kBinCodes = 32, kBins = 256;
constexpr int kNoToken = 65535, kMargin = 16 * kFine; // estimates may lie somewhat above the bound
constexpr int kMaxCluster = 8;

// T: the cache's type. D: head size of keys and values. N: tiles of heads. A block's dynamic shared memory
// is laid out by fusedShared in fused.go.
template <int T, int D, int N, int Threads>
__device__ __forceinline__ void fused(const Layer &l)
{
	constexpr int W = Threads / 32, kHeads = N * kHeadsATile, kSteps = D / 16;
	constexpr int kPerLane = D / 64; // 16-byte words of an INT4 record that a lane reads
	extern __shared__ __align__(128) uint8_t memory[];
	__shared__ Queries<D, N> q;
	__shared__ uint2 bound_b[N][2 * kSteps][32], int4_b[N][kSteps][32];
	__shared__ float offset[kHeads], sum[kHeads], constant[kHeads], top[kHeads];
	__shared__ u32 ceiling_key[kHeads], least[kHeads], coarse[kHeads][kBins], fine[kHeads][kBinCodes];
	__shared__ float weights[kHeads][kBins], before[kHeads], wanted[kHeads], ceiling[kHeads], share[kHeads];
	__shared__ int base_code[kHeads], cut[kHeads]; // code of the largest estimate, and the last kept
	__shared__ u32 histogram[4][256], scan[32], bin, left, prefix;
	__shared__ int selected, tokens, kept, retry;
	__shared__ long long since;

	cg::cluster_group cluster = cg::this_cluster();
	const int C = cluster.num_blocks(), rank = C > 1 ? cluster.block_rank() : 0;
	const int row = blockIdx.x / C, tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
	const RowIndex r = row_index(l, row);
	const int from = l.first[r.sequence], length = l.lengths[r.sequence], budget = l.budgets[r.sequence];
	const int path = path_of(l, r.sequence);
	if (path != kSparse) { // all blocks of the cluster
		if (path == kVoid && rank == 0 && !l.lists_only)
			for (int i = tid; i < l.asking * D; i += Threads)
				write1(l.output + r.sequence * l.output_row + (r.query_head + i / D) * l.output_head +
					       i % D * element_size(l.output_dtype), 0, l.output_dtype);
		if (l.bad[r.sequence] && l.paths[r.sequence] != kVoid && tid == 0)
			atomicOr(&l.flags[r.sequence * l.kv_heads + r.kv_head], kBadRow);
		return;
	}
	if (tid == 0)
		since = clock64();
	auto stage_ends = [&](int stage) { // as seen by the row's first thread
		if (rank > 0 || tid > 0)
			return;
		long long now = clock64();
		atomicAdd(reinterpret_cast<u64 *>(l.stage_cycles) + stage, u64(now - since));
		since = now;
	};
	const int G = l.asking, kv_heads = l.kv_heads;
	const int first = from / kChunk, chunks = (length + kChunk - 1) / kChunk - first;
	const int own = (chunks - rank + C - 1) / C; // chunk i of the block is first + i*C + rank
	const int room = l.fused_own, cap = l.fused_cap;
	auto sync = [&] { C > 1 ? cluster.sync() : __syncthreads(); };
	auto remote = [&](auto *p, int of) { return C > 1 ? cluster.map_shared_rank(p, of) : p; };
	auto total = [&](u32 *p) { // of the cluster's blocks; all reads are under way at once
		u32 v = *p;
		if (C > 1) {
			u32 x[kMaxCluster];
#pragma unroll
			for (int i = 0; i < kMaxCluster; i++)
				x[i] = i < C ? *cluster.map_shared_rank(p, i) : 0;
			v = 0;
#pragma unroll
			for (int i = 0; i < kMaxCluster; i++)
				v += x[i];
		}
		return v;
	};
	float *scores = reinterpret_cast<float *>(memory);
	uint16_t *codes = reinterpret_cast<uint16_t *>(scores + room);	 // [G][cap*16]
	uint16_t *list = codes;						 // [cap*16] kept tokens, once codes are read
	int *ids = reinterpret_cast<int *>(codes + int64_t(G) * cap * kChunk); // [cap] shadow chunks
	uint16_t *places = reinterpret_cast<uint16_t *>(ids + cap);	 // [cap] chunks of the block
	uint8_t *masks = reinterpret_cast<uint8_t *>(places + cap);	 // [cap*2] a bit a token

	read_queries(l, r, q);
	if (tid < kHeads) {
		ceiling_key[tid] = 0;
		least[tid] = kNoToken;
		double p = l.p[r.sequence];
		share[tid] = tid < G ? float(p > 0 ? p : l.thresholds[r.query_head + tid]) : 1;
	}
	for (int i = tid; i < kHeads * kBins; i += Threads)
		coarse[i / kBins][i % kBins] = 0;
	for (int i = tid; i < kHeads * kBinCodes; i += Threads)
		fine[i / kBinCodes][i % kBinCodes] = 0;
	for (int i = tid; i < 4 * 256; i += Threads)
		histogram[i / 256][i % 256] = 0;
	if (tid == 0)
		selected = tokens = kept = retry = 0;
	__syncthreads();
	const float *mean = l.mean + r.kv_head * D, *spread = l.spread + r.kv_head * D;
	for (int h = warp; h < kHeads; h += W) {
		float largest = 0, m = 0, s = 0;
		for (int d = lane; d < D; d += 32) {
			float x = q.raw[h][d], e = x * (spread[d] == 0 ? 1 : spread[d]);
			largest = fmaxf(largest, fmaxf(fabsf(x), fabsf(e)));
			m += x * mean[d];
			s += e;
		}
		largest = warp_max(largest);
		m = warp_sum(m);
		s = warp_sum(s);
		if (lane == 0) {
			if (!isfinite(largest) || !isfinite(s))
				retry = 1;
			q.up[h] = power_below(largest);
			constant[h] = m;
			sum[h] = s;
		}
	}
	__syncthreads();
	split_for_keys<T>(q);
	auto pack = [&](auto at, int low, int d0, int d1) { // high or low halves of two elements
		float x = at(d0), y = at(d1), hx = __half2float(__float2half_rn(x)), hy = __half2float(__float2half_rn(y));
		return low ? Half<F16>::pack(x - hx, y - hy) : Half<F16>::pack(hx, hy);
	};
	for (int i = tid; i < N * kSteps * 32; i += Threads) {
		int n = i / (kSteps * 32), s = i / 32 % kSteps, ig = i % 32 / 4, it = i % 4, h = n * kHeadsATile + ig / 2, low = ig & 1;
		float down = 1 / q.up[h];
		auto equal = [&](int d) { return q.raw[h][d] * (spread[d] == 0 ? 1 : spread[d]) * down; };
		auto sixteenth = [&](int d) { return equal(d) / 16; }; // high nibbles read sixteenfold
		int d = 16 * s + 2 * it, e = 8 * (4 * (s / 2) + it) + 4 * (s % 2);
		u32 b0 = pack(equal, low, d, d + 1), b1 = pack(sixteenth, low, d + 8, d + 9);
		int4_b[n][s][i % 32] = make_uint2(b0, b1);
		for (int half = 0; half < 2; half++) {
			auto sided = [&](int d) { return (half ? fminf(q.raw[h][d], 0) : fmaxf(q.raw[h][d], 0)) * down; };
			bound_b[n][half * kSteps + s][i % 32] = make_uint2(pack(sided, low, e, e + 1), pack(sided, low, e + 2, e + 3));
		}
	}
	__syncthreads();
	// Codes are read as 1024 + code: what that adds is taken off again.
	for (int h = warp; h < kHeads; h += W) {
		float x = 0;
		for (int i = lane; i < kSteps * 8; i += 32) {
			uint2 b = int4_b[h / kHeadsATile][i / 8][(h % kHeadsATile * 2 + i % 2) * 4 + i / 2 % 4];
			float2 x0 = __half22float2(reinterpret_cast<__half2 &>(b.x)), x1 = __half22float2(reinterpret_cast<__half2 &>(b.y));
			x += x0.x + x0.y + x1.x + x1.y;
		}
		x = warp_sum(x);
		if (lane == 0)
			offset[h] = 1024 * x;
	}
	__syncthreads();

	// Chunk bounds, 16 chunks a warp.
	const int keep = min(max(budget, l.pin_first + (l.pin_current && !(l.pin_first && chunks == 1))), chunks);
	{
		float highest[N];
#pragma unroll
		for (int n = 0; n < N; n++)
			highest[n] = -kInfinity;
		auto id = [&](int i) { return i < own + 16 ? shadow_chunk(l, r.sequence, first + min(i, own - 1) * C + rank) : 0; };
		int upper_id = own > 0 ? id(warp * 16 + g) : 0, lower_id = own > 0 ? id(warp * 16 + g + 8) : 0;
		for (int base = warp * 16; base < own; base += W * 16) {
			auto record = [&](int id) { return l.bounds + (int64_t(id) * kv_heads + r.kv_head) * bounds_bytes(D) + t * 16; };
			const uint8_t *upper = record(upper_id), *lower = record(lower_id);
			upper_id = id(base + W * 16 + g); // the next ones' are on their way meanwhile
			lower_id = id(base + W * 16 + g + 8);
			float c[N][4] = {};
#pragma unroll
			for (int part = 0; part < 2; part++) {
				uint4 a[kSteps / 2], b[kSteps / 2];
#pragma unroll
				for (int j = 0; j < kSteps / 2; j++) {
					a[j] = load16(upper + (part * kSteps / 2 + j) * 64);
					b[j] = load16(lower + (part * kSteps / 2 + j) * 64);
				}
#pragma unroll
				for (int j = 0; j < kSteps / 2; j++)
#pragma unroll
					for (int n = 0; n < N; n++) {
						uint2 b0 = bound_b[n][part * kSteps + 2 * j][lane], b1 = bound_b[n][part * kSteps + 2 * j + 1][lane];
						mma(c[n], a[j].x, b[j].x, a[j].y, b[j].y, b0.x, b0.y);
						mma(c[n], a[j].z, b[j].z, a[j].w, b[j].w, b1.x, b1.y);
					}
			}
			float x = 0, y = 0;
#pragma unroll
			for (int n = 0; n < N; n++) {
				float scale = q.up[n * kHeadsATile + t]; // heads that are not there add 0
				float upper_bound = (c[n][0] + c[n][1]) * scale, lower_bound = (c[n][2] + c[n][3]) * scale;
				highest[n] = fmaxf(highest[n], fmaxf(upper_bound, lower_bound));
				x += upper_bound;
				y += lower_bound;
			}
			for (int o = 1; o < 4; o <<= 1) {
				x += __shfl_xor_sync(kAll, x, o);
				y += __shfl_xor_sync(kAll, y, o);
			}
			auto put = [&](int i, float score) {
				if (i >= own)
					return;
				if (!isfinite(score))
					retry = 1;
				int chunk = i * C + rank;
				if ((l.pin_first && chunk == 0) || (l.pin_current && chunk == chunks - 1))
					score = kInfinity;
				scores[i] = score + 0.f;
			};
			if (t == 0)
				put(base + g, x), put(base + g + 8, y);
		}
#pragma unroll
		for (int n = 0; n < N; n++) {
			for (int o = 4; o < 32; o <<= 1)
				highest[n] = fmaxf(highest[n], __shfl_xor_sync(kAll, highest[n], o));
			if (g == 0)
				atomicMax(&ceiling_key[n * kHeadsATile + t], key_of(highest[n]));
		}
	}

	// The best `keep` chunks: their keys' cut, digit by digit.
	u32 cut_key = 0;
	int ties = 0;
	if (keep < chunks) {
		if (tid == 0)
			prefix = 0, left = keep;
		__syncthreads();
		for (int level = 0; level < 4; level++) {
			const int shift = 24 - 8 * level;
			const u32 known = prefix, mask = level == 0 ? 0 : kAll << (shift + 8);
			for (int i = tid; i < own; i += Threads) {
				u32 key = key_of(scores[i]);
				if ((key & mask) == known)
					atomicAdd(&histogram[level][key >> shift & 255], 1);
			}
			sync();
			u32 mine = tid < 256 ? total(&histogram[level][255 - tid]) : 0, all, above = block_scan(mine, scan, all), want = left;
			__syncthreads();
			if (above < want && want <= above + mine) {
				bin = 255 - tid;
				prefix = known | bin << shift;
				left = want - above;
			}
			__syncthreads();
		}
		// Of those equal to the last, lower blocks take theirs first.
		int used = 0;
		for (int i = 0; i < rank; i++)
			used += *remote(&histogram[3][bin], i);
		ties = max(0, int(left) - used);
		cut_key = prefix;
	} else {
		sync();
	}
	if (tid < kHeads) {
		u32 key = 0;
		for (int i = 0; i < C; i++)
			key = max(key, remote(ceiling_key, i)[tid]);
		float bound = float_of(key);
		if (l.softcap > 0)
			bound = softcap(bound / kLog2e, l.softcap) * kLog2e;
		ceiling[tid] = bound + float(kMargin) / kFine;
	}
	{
		const int each = (own + Threads - 1) / Threads, begin = min(tid * each, own), end = min(begin + each, own);
		u32 count = 0, all;
		for (int i = begin; i < end; i++) {
			u32 key = keep < chunks ? key_of(scores[i]) : kAll;
			count += key > cut_key ? 1 : key == cut_key ? 1 << 16 : 0;
		}
		u32 at = block_scan(count, scan, all); // low half: above the cut; high half: equal
		int tied = at >> 16, k = (at & 0xffff) + min(tied, ties);
		for (int i = begin; i < end; i++) {
			u32 key = keep < chunks ? key_of(scores[i]) : kAll;
			if (key < cut_key || (key == cut_key && tied++ >= ties))
				continue;
			if (k < cap) {
				places[k] = i;
				ids[k] = shadow_chunk(l, r.sequence, first + i * C + rank);
			}
			k++;
		}
		int n = (all & 0xffff) + min(int(all >> 16), ties);
		if (tid == 0) {
			selected = min(n, cap);
			if (n > cap)
				retry = 1;
		}
		__syncthreads();
	}
	const int n = selected;
	stage_ends(0);

	// INT4 estimates, a chunk a tile.
	{
		constexpr int U = kPerLane > 1 ? 4 : 8;
		int best[N];
#pragma unroll
		for (int j = 0; j < N; j++)
			best[j] = kNoToken;
		for (int base = warp * U; base < n; base += W * U) {
			uint4 v[U][kPerLane];
			u32 sa[U], sb[U];
#pragma unroll
			for (int u = 0; u < U; u++) {
				const uint8_t *record = l.int4 + (int64_t(ids[min(base + u, n - 1)]) * kv_heads + r.kv_head) * int4_bytes(D);
#pragma unroll
				for (int j = 0; j < kPerLane; j++)
					v[u][j] = load16(record + j * 512 + lane * 16);
				sa[u] = __ldg(reinterpret_cast<const u32 *>(record + D * 8) + g);
				sb[u] = __ldg(reinterpret_cast<const u32 *>(record + D * 8) + g + 8);
			}
#pragma unroll
			for (int u = 0; u < U; u++) {
				if (base + u >= n)
					break;
				float c[N][4] = {};
#pragma unroll
				for (int s = 0; s < kSteps; s++) {
					const uint4 &part = v[u][s / 4];
					u32 w = s % 4 == 0 ? part.x : s % 4 == 1 ? part.y : s % 4 == 2 ? part.z : part.w, w8 = w >> 8;
#pragma unroll
					for (int j = 0; j < N; j++) {
						uint2 b = int4_b[j][s][lane];
						mma(c[j], (w & 0x000f000f) | 0x64006400, (w8 & 0x000f000f) | 0x64006400,
						    (w & 0x00f000f0) | 0x64006400, (w8 & 0x00f000f0) | 0x64006400, b.x, b.y);
					}
				}
				int position = (first + places[base + u] * C + rank) * kChunk + g;
				float2 a = __half22float2(reinterpret_cast<__half2 &>(sa[u])), b = __half22float2(reinterpret_cast<__half2 &>(sb[u]));
#pragma unroll
				for (int j = 0; j < N; j++) {
					int h = j * kHeadsATile + t;
					if (h >= G)
						continue;
					float base_logit = constant[h];
					float x = a.x * ((c[j][0] + c[j][1] - offset[h]) * q.up[h]) + (a.y * sum[h] + base_logit);
					float y = b.x * ((c[j][2] + c[j][3] - offset[h]) * q.up[h]) + (b.y * sum[h] + base_logit);
					if (l.softcap > 0) {
						x = softcap(x / kLog2e, l.softcap) * kLog2e;
						y = softcap(y / kLog2e, l.softcap) * kLog2e;
					}
					auto code = [&](float estimate, int position) {
						if (position < from || position >= length)
							return kNoToken;
						float below = (ceiling[h] - estimate) * kFine;
						if (!(below >= 0)) // NaN too
							retry = 1;
						return int(fminf(fmaxf(below, 0), kNoToken - 1));
					};
					int cx = code(x, position), cy = code(y, position + 8);
					best[j] = min(best[j], min(cx, cy));
					uint16_t *to = codes + (int64_t(h) * cap + base + u) * kChunk + g;
					to[0] = cx;
					to[8] = cy;
				}
			}
		}
#pragma unroll
		for (int j = 0; j < N; j++) {
			for (int o = 4; o < 32; o <<= 1)
				best[j] = min(best[j], __shfl_xor_sync(kAll, best[j], o));
			if (g == 0 && j * kHeadsATile + t < G)
				atomicMin(&least[j * kHeadsATile + t], u32(best[j]));
		}
	}
	sync();
	if (tid < G) {
		u32 code = kNoToken;
		for (int i = 0; i < C; i++)
			code = min(code, remote(least, i)[tid]);
		base_code[tid] = code;
		cut[tid] = kNoToken - 1;
		top[tid] = ceiling[tid] - float(code) / kFine;
		if (code + kBins * kBinCodes >= kNoToken)
			retry = 1; // the bound is too far off for codes to tell weights apart
	}
	__syncthreads();

	// The first of n weights with which the sum reaches want, else the last; sum becomes what lies before
	// it. For a warp.
	auto reach = [&](const float *w, int n, float want, float &sum) {
		int at = n - 1;
		float start = sum;
		for (int base = 0; base < n; base += 32) {
			float mine = w[base + lane], through = mine;
			for (int o = 1; o < 32; o <<= 1) {
				float other = __shfl_up_sync(kAll, through, o);
				if (lane >= o)
					through += other;
			}
			u32 reached = __ballot_sync(kAll, start + through >= want);
			int in = reached ? __ffs(reached) - 1 : 31;
			sum = __shfl_sync(kAll, start + through - mine, in);
			if (reached) {
				at = base + in;
				break;
			}
			start = __shfl_sync(kAll, start + through, 31);
		}
		return at;
	};
	// Calls f with the block's codes of a head, 8 at a time, and the first one's index.
	auto each_eight = [&](int h, auto f) {
		const uint4 *words = reinterpret_cast<const uint4 *>(codes + int64_t(h) * cap * kChunk);
		for (int i = tid; i < n * 2; i += Threads) {
			uint4 word = words[i];
			f(reinterpret_cast<const uint16_t *>(&word));
		}
	};

	// Top-p: weights are summed as integers by bins; the bin in which the sum reaches p is counted code by
	// code.
	if (l.prunes == kPruneTopP) {
		for (int h = 0; h < G; h++) {
			const int from_code = base_code[h];
			each_eight(h, [&](const uint16_t *c) {
#pragma unroll
				for (int k = 0; k < 8; k++) {
					int d = c[k] - from_code;
					if (c[k] != kNoToken)
						atomicAdd(&coarse[h][min(d / kBinCodes, kBins - 1)],
							  __float2uint_rn(4096 * exp2_fast(d % kBinCodes * (-1.f / kFine))));
				}
			});
		}
		sync();
		for (int i = tid; i < G * kBins; i += Threads)
			weights[i / kBins][i % kBins] =
				float(total(&coarse[i / kBins][i % kBins])) * exp2_fast(i % kBins * (-float(kBinCodes) / kFine));
		__syncthreads();
		for (int h = warp; h < G; h += W) {
			float all = 0;
			for (int i = lane; i < kBins; i += 32)
				all += weights[h][i];
			float want = share[h] * warp_sum(all), sum = 0;
			int at = reach(weights[h], kBins, want, sum);
			if (lane == 0)
				wanted[h] = want, before[h] = sum, cut[h] = at;
		}
		__syncthreads();
		for (int h = 0; h < G; h++) {
			const int from_code = base_code[h] + cut[h] * kBinCodes;
			each_eight(h, [&](const uint16_t *c) {
#pragma unroll
				for (int k = 0; k < 8; k++)
					if (u32(c[k] - from_code) < kBinCodes)
						atomicAdd(&fine[h][c[k] - from_code], 1);
			});
		}
		sync();
		for (int h = warp; h < G; h += W) {
			weights[h][lane] = 4096 * float(total(&fine[h][lane])) * exp2_fast((cut[h] * kBinCodes + lane) * (-1.f / kFine));
			__syncwarp();
			float sum = before[h];
			int at = reach(weights[h], kBinCodes, wanted[h], sum);
			if (lane == 0)
				cut[h] = cut[h] == kBins - 1 || share[h] >= 1 ? kNoToken - 1 : base_code[h] + cut[h] * kBinCodes + at;
		}
		__syncthreads();
	}

	// The union of what the heads keep, ascending: a bit a token, then a list. A warp has a run of tokens,
	// a lane 8 at a time.
	{
		const int groups = n * 2, run = ((groups + W - 1) / W + 31) / 32 * 32, begin = min(warp * run, groups),
			  end = min(begin + run, groups);
		int count = 0, valid = 0, all;
		for (int i = begin + lane; i < end; i += 32) {
			u32 mask = 0;
			for (int h = 0; h < G; h++) {
				uint4 word = reinterpret_cast<const uint4 *>(codes + int64_t(h) * cap * kChunk)[i];
				const uint16_t *c = reinterpret_cast<const uint16_t *>(&word);
				const int last = cut[h];
#pragma unroll
				for (int k = 0; k < 8; k++) {
					mask |= (c[k] <= last ? 1u : 0u) << k;
					valid += h == 0 && c[k] != kNoToken;
				}
			}
			masks[i] = mask;
			count += __popc(mask);
		}
		valid = warp_sum(valid);
		if (lane == 0)
			atomicAdd(&tokens, valid);
		count = warp_sum(count);
		int at = block_scan(lane == 0 ? count : 0, reinterpret_cast<int *>(scan), all);
		at = __shfl_sync(kAll, at, 0);
		for (int i = begin + lane; i - lane < end; i += 32) {
			u32 mask = i < end ? masks[i] : 0;
			int mine = __popc(mask), through = mine;
			for (int o = 1; o < 32; o <<= 1) {
				int other = __shfl_up_sync(kAll, through, o);
				if (lane >= o)
					through += other;
			}
			for (int to = at + through - mine; mask; mask &= mask - 1)
				list[to++] = uint16_t(i * 8 + __ffs(mask) - 1);
			at += __shfl_sync(kAll, through, 31);
		}
		if (tid == 0)
			kept = all;
		__syncthreads();
	}
	const int nk = kept;
	stage_ends(1);
	if (l.kept_masks) {
		// For twilight_expand: 16 bits a chunk of the row.
		uint16_t *out = l.kept_masks + int64_t(row) * l.chunk_stride;
		for (int i = tid; i < own; i += Threads)
			out[i * C + rank] = 0;
		__syncthreads();
		for (int k = tid; k < n; k += Threads)
			out[places[k] * C + rank] = uint16_t(masks[2 * k] | masks[2 * k + 1] << 8);
	}

	// Attention over the list, 16 tokens a warp. The estimates' largest logit steadies the softmax; a
	// warp whose logits rise far above goes on from its own.
	constexpr int kPart = D + 2;
	float *parts = scores; // over scores and codes
	if (!l.lists_only) {
		Attention<T, D, N> attention;
#pragma unroll
		for (int j = 0; j < N; j++)
			attention.steady[j] = j * kHeadsATile + t < G ? top[j * kHeadsATile + t] : 0;
		for (int base = warp * 16; base < nk; base += W * 16)
			attention.tile(l, r, q, [&](int k) {
				int x = list[min(base + k, nk - 1)];
				return (first + places[x / kChunk] * C + rank) * kChunk + x % kChunk;
			}, nk - base);
		__syncthreads(); // scores, codes and the list are no longer needed
		attention.gather(G, parts);
	}
	sync();
	for (int i = rank * Threads + tid; i < G * D && !l.lists_only; i += C * Threads) {
		int h = i / D, d = i % D;
		float high[kMaxCluster], w[kMaxCluster], v[kMaxCluster];
#pragma unroll
		for (int c = 0; c < kMaxCluster; c++) {
			const float *of = remote(parts, c < C ? c : 0) + h * kPart;
			high[c] = c < C ? of[0] : -kInfinity, w[c] = of[1], v[c] = of[2 + d];
		}
		float sink = l.sinks ? l.sinks[r.query_head + h] * kLog2e : -kInfinity, most = sink, x = 0;
#pragma unroll
		for (int c = 0; c < kMaxCluster; c++)
			most = fmaxf(most, high[c]);
		float s = exp2_fast(sink - most);
#pragma unroll
		for (int c = 0; c < kMaxCluster; c++) {
			float shrink = exp2_fast(high[c] - most);
			s += w[c] * shrink;
			x += v[c] * shrink;
		}
		write1(l.output + r.sequence * l.output_row + (r.query_head + h) * l.output_head + d * element_size(l.output_dtype),
		       x / s, l.output_dtype);
	}
	stage_ends(2);
	if (rank == 0 && tid == 0) {
		int all_kept = 0, all_tokens = 0, again = 0;
		for (int c = 0; c < C; c++) {
			all_kept += *remote(&kept, c);
			all_tokens += *remote(&tokens, c);
			again |= *remote(&retry, c);
		}
		l.kept[row] = all_kept;
		l.candidate_tokens[row] = all_tokens;
		if (again)
			atomicOr(&l.flags[r.sequence * kv_heads + r.kv_head], kRetry);
	}
	if (C > 1)
		cluster.sync(); // others may still read this block's memory
}

#define FUSED(name, type, dim, tiles, threads, blocks) \
	extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Layer l) \
	{ \
		fused<type, dim, tiles, threads>(l); \
	}

FUSED(twilight_fused_fp16_128_4_256, F16, 128, 1, 256, 2)
FUSED(twilight_fused_fp16_128_4_512, F16, 128, 1, 512, 1)
FUSED(twilight_fused_fp16_128_8_256, F16, 128, 2, 256, 1)
FUSED(twilight_fused_fp16_64_4_256, F16, 64, 1, 256, 2)
FUSED(twilight_fused_fp16_64_4_512, F16, 64, 1, 512, 1)
FUSED(twilight_fused_fp16_64_8_256, F16, 64, 2, 256, 1)
FUSED(twilight_fused_bf16_128_4_256, BF16, 128, 1, 256, 2)
FUSED(twilight_fused_bf16_128_4_512, BF16, 128, 1, 512, 1)
FUSED(twilight_fused_bf16_128_8_256, BF16, 128, 2, 256, 1)
FUSED(twilight_fused_bf16_64_4_256, BF16, 64, 1, 256, 2)
FUSED(twilight_fused_bf16_64_4_512, BF16, 64, 1, 512, 1)
FUSED(twilight_fused_bf16_64_8_256, BF16, 64, 2, 256, 1)
