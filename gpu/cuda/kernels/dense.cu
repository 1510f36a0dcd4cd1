// Attention on the tensor cores, in place of twilight_attend and twilight_combine and, for rows that are
// dense, of twilight_queries.
#include "tensor.cuh"

constexpr int kDenseThreads = 128;
constexpr float kNone = -1e30f; // below all logits

// The address of an output's element.
__device__ __forceinline__ uint8_t *output_at(const Layer &l, RowIndex r, int h, int d)
{
	return l.output + r.sequence * l.output_row + (r.query_head + h) * l.output_head + d * element_size(l.output_dtype);
}

// The logit, binary, of a head's sink.
__device__ __forceinline__ float sink(const Layer &l, RowIndex r, int h)
{
	return l.sinks ? l.sinks[r.query_head + h] * kLog2e : -kInfinity;
}

// Sums the parts of a list row's attention and writes its outputs: a block. Partial sums lie in scratch,
// [R][splits][asking][D] and, behind them all, maxima and weights, [R][splits][asking][2]. They are read past
// the first cache, which may hold a line of them from before it was written. shrink is memory for
// [count][asking].
template <int D>
__device__ void combine(const Layer &l, RowIndex r, const float *values, const float *stats, int count, float *shrink)
{
	__shared__ float sums[16];
	const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, asking = l.asking;
	for (int h = warp; h < asking; h += kDenseThreads / 32) {
		float top = sink(l, r, h), sum = 0;
		for (int s = lane; s < count; s += 32)
			top = fmaxf(top, __ldcg(stats + (s * asking + h) * 2));
		top = warp_max(top);
		for (int s = lane; s < count; s += 32) {
			float x = exp2_fast(__ldcg(stats + (s * asking + h) * 2) - top);
			shrink[s * asking + h] = x;
			sum += x * __ldcg(stats + (s * asking + h) * 2 + 1);
		}
		sum = warp_sum(sum);
		if (lane == 0)
			sums[h] = sum + exp2_fast(sink(l, r, h) - top);
	}
	__syncthreads();
	const int quads = asking * D / 4;
	for (int i = threadIdx.x; i < quads; i += kDenseThreads) {
		const int h = i * 4 / D, d = i * 4 % D;
		const float4 *from = reinterpret_cast<const float4 *>(values) + i;
		float x[4] = {};
#pragma unroll 8
		for (int s = 0; s < count; s++) {
			float4 v = __ldcg(from + int64_t(s) * quads);
			float w = shrink[s * asking + h];
			x[0] += w * v.x, x[1] += w * v.y, x[2] += w * v.z, x[3] += w * v.w;
		}
		for (int k = 0; k < 4; k++)
			write1(output_at(l, r, h, d + k), x[k] / sums[h], l.output_dtype);
	}
}

// Notes the first of a list row's query elements that is not finite, as twilight_queries does.
template <int D>
__device__ void check_queries(const Layer &l, RowIndex r)
{
	for (int i = threadIdx.x; i < l.asking * D; i += kDenseThreads) {
		int head = r.query_head + i / D, d = i % D;
		float x = read1(l.queries + r.sequence * l.query_row + head * l.query_head + d * element_size(l.query_dtype),
				l.query_dtype) * l.query_scale;
		if (!isfinite(x)) {
			atomicMax(reinterpret_cast<u64 *>(l.bad_query),
				  ~((u64(r.sequence * l.query_heads + head) * D + d) << 32 | __float_as_uint(x)));
			park(l);
		}
	}
}

// Attention over all of a row, or over a list made before, in parts: a block a (part, list row), of which the
// last one to end writes the row's outputs.
template <int T, int D, int N>
__device__ __forceinline__ void dense(const Layer &l)
{
	if (idle(l))
		return;
	extern __shared__ __align__(128) uint8_t memory[];
	__shared__ Queries<D, N> q;
	__shared__ bool last;
	constexpr int W = kDenseThreads / 32, kPart = D + 2;
	float *parts = reinterpret_cast<float *>(memory); // [W][asking][kPart]
	const int row = blockIdx.y, part = blockIdx.x, tid = threadIdx.x, warp = tid >> 5;
	const RowIndex r = row_index(l, row);
	const int path = path_of(l, r.sequence);
	if (path == kVoid) {
		for (int i = tid; i < l.asking * D && part == 0; i += kDenseThreads)
			write1(output_at(l, r, i / D, i % D), 0, l.output_dtype);
		if (l.bad[r.sequence] && tid == 0)
			atomicOr(&l.flags[r.sequence * l.kv_heads + r.kv_head], kBadRow);
		return;
	}
	if (l.only_dense && path != kDense)
		return;
	const bool all = path == kDense || not_finite(l, r);
	const int from = l.first[r.sequence], total = all ? l.lengths[r.sequence] - from : l.kept[row];
	const int per = part_size(l, total), begin = part * per, end = min(begin + per, total), count = (total + per - 1) / per;
	if (begin >= total)
		return;
	if (part == 0 && path == kDense)
		check_queries<D>(l, r);
	const int32_t *list = l.lists + int64_t(row) * l.candidate_stride * kChunk;
	read_queries(l, r, q);
	__syncthreads();
	for (int h = warp; h < q.kHeads; h += W) {
		float largest = 0;
		for (int d = tid & 31; d < D; d += 32)
			largest = fmaxf(largest, fabsf(q.raw[h][d]));
		largest = warp_max(largest);
		if ((tid & 31) == 0)
			q.up[h] = power_below(largest);
	}
	__syncthreads();
	split_for_keys<T>(q);
	__syncthreads();

	Attention<T, D, N> attention;
#pragma unroll
	for (int j = 0; j < N; j++)
		attention.steady[j] = kNone; // the first logits raise it
	for (int base = begin + warp * 16; base < end; base += W * 16)
		attention.tile(l, r, q, [&](int k) {
			int i = min(base + k, end - 1);
			return all ? from + i : __ldg(list + i);
		}, end - base);
	attention.gather(l.asking, parts);
	__syncthreads();
	if (count == 1) {
		for (int i = tid; i < l.asking * D; i += kDenseThreads) {
			const float *of = parts + i / D * kPart;
			float top = fmaxf(of[0], sink(l, r, i / D)), shrink = exp2_fast(of[0] - top);
			float sum = of[1] * shrink + exp2_fast(sink(l, r, i / D) - top);
			write1(output_at(l, r, i / D, i % D), of[2 + i % D] * shrink / sum, l.output_dtype);
		}
		return;
	}
	const int64_t before = int64_t(row) * l.splits * l.asking;
	float *values = l.partial + before * D, *stats = l.partial + int64_t(l.rows) * l.splits * l.asking * D + before * 2;
	for (int i = tid; i < l.asking * D; i += kDenseThreads)
		values[int64_t(part) * l.asking * D + i] = parts[i / D * kPart + 2 + i % D];
	if (tid < l.asking * 2)
		stats[part * l.asking * 2 + tid] = parts[tid / 2 * kPart + tid % 2];
	__threadfence();
	__syncthreads();
	if (tid == 0) {
		last = atomicAdd(&l.tickets[row], 1) == count - 1;
		if (last)
			l.tickets[row] = 0; // for the next launch
	}
	__syncthreads();
	if (!last)
		return;
	__threadfence();
	combine<D>(l, r, values, stats, count, parts);
}

#define DENSE(name, type, dim, tiles, blocks) \
	extern "C" __global__ void __launch_bounds__(kDenseThreads, blocks) name(const __grid_constant__ Layer l) \
	{ \
		dense<type, dim, tiles>(l); \
		finish(l); \
	}
DENSE(twilight_dense_fp16_128_4, F16, 128, 1, 4)
DENSE(twilight_dense_fp16_128_8, F16, 128, 2, 3)
DENSE(twilight_dense_fp16_64_4, F16, 64, 1, 4)
DENSE(twilight_dense_fp16_64_8, F16, 64, 2, 4)
DENSE(twilight_dense_bf16_128_4, BF16, 128, 1, 4)
DENSE(twilight_dense_bf16_128_8, BF16, 128, 2, 3)
DENSE(twilight_dense_bf16_64_4, BF16, 64, 1, 4)
DENSE(twilight_dense_bf16_64_8, BF16, 64, 2, 4)
