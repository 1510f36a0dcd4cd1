// Attention on the tensor cores, in place of twilight_attend and twilight_combine and, for rows that are
// dense, of twilight_queries.
#include "tensor.cuh"

constexpr int kDenseThreads = 128;
constexpr float kNone = -1e30f; // below all logits

// Writes the outputs of a list row's heads: the sums of its parts, [count][asking][D+2] and `step` apart, and
// of the sinks' weights. Logits are binary logarithms.
template <int D, typename F>
__device__ void write_outputs(const Layer &l, RowIndex r, F parts, int count, int step)
{
	constexpr int kPart = D + 2;
	for (int i = threadIdx.x; i < l.asking * D; i += kDenseThreads) {
		int h = i / D, d = i % D, head = r.query_head + h;
		auto of = [&](int s, int k) { return parts(s * step + h * kPart + k); };
		float top = l.sinks ? l.sinks[head] * kLog2e : -kInfinity;
		for (int s = 0; s < count; s++)
			top = fmaxf(top, of(s, 0));
		float sum = l.sinks ? exp2_fast(l.sinks[head] * kLog2e - top) : 0, x = 0;
		for (int s = 0; s < count; s++) {
			float shrink = exp2_fast(of(s, 0) - top);
			sum += of(s, 1) * shrink;
			x += of(s, 2 + d) * shrink;
		}
		write1(l.output + r.sequence * l.output_row + head * l.output_head + d * element_size(l.output_dtype), x / sum,
		       l.output_dtype);
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
		if (!isfinite(x))
			atomicMax(reinterpret_cast<u64 *>(l.bad_query),
				  ~((u64(r.sequence * l.query_heads + head) * D + d) << 32 | __float_as_uint(x)));
	}
}

// Attention over all of a row, or over a list made before, in parts: a block a (part, list row), of which the
// last one to end writes the row's outputs.
template <int T, int D, int N>
__device__ __forceinline__ void dense(const Layer &l)
{
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
			write1(l.output + r.sequence * l.output_row + (r.query_head + i / D) * l.output_head +
				       i % D * element_size(l.output_dtype), 0, l.output_dtype);
		if (l.bad[r.sequence] && l.paths[r.sequence] != kVoid && tid == 0)
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
	if (count == 1)
		return write_outputs<D>(l, r, [&](int i) { return parts[i]; }, 1, 0);
	const int step = l.asking * kPart;
	float *partial = l.partial + int64_t(row) * l.splits * step;
	for (int i = tid; i < step; i += kDenseThreads)
		partial[part * step + i] = parts[i];
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
	// Past the first cache, which may hold a line of this from before it was written.
	write_outputs<D>(l, r, [&](int i) { return __ldcg(partial + i); }, count, step);
}

#define DENSE(name, type, dim, tiles, blocks) \
	extern "C" __global__ void __launch_bounds__(kDenseThreads, blocks) name(const __grid_constant__ Layer l) \
	{ \
		dense<type, dim, tiles>(l); \
	}
DENSE(twilight_dense_fp16_128_4, F16, 128, 1, 4)
DENSE(twilight_dense_fp16_128_8, F16, 128, 2, 3)
DENSE(twilight_dense_fp16_64_4, F16, 64, 1, 4)
DENSE(twilight_dense_fp16_64_8, F16, 64, 2, 4)
DENSE(twilight_dense_bf16_128_4, BF16, 128, 1, 4)
DENSE(twilight_dense_bf16_128_8, BF16, 128, 2, 3)
DENSE(twilight_dense_bf16_64_4, BF16, 64, 1, 4)
DENSE(twilight_dense_bf16_64_8, BF16, 64, 2, 4)
