// Attention on the tensor cores for the chain of kernels, in place of twilight_attend.
#include "tensor.cuh"

constexpr int kDenseThreads = 128;
constexpr float kNone = -1e30f; // below all logits

// Attention over all of a row, or over a list made before, in `splits` parts for twilight_combine: a block
// a (part, list row).
template <int T, int D, int N>
__device__ __forceinline__ void dense(const Layer &l)
{
	if (idle(l))
		return;
	extern __shared__ __align__(128) uint8_t memory[];
	__shared__ Queries<D, N> q;
	constexpr int W = kDenseThreads / 32, kPart = D + 2;
	float *parts = reinterpret_cast<float *>(memory); // [W][asking][kPart]
	const int row = blockIdx.y, part = blockIdx.x, tid = threadIdx.x, warp = tid >> 5;
	const RowIndex r = row_index(l, row);
	const int path = path_of(l, r.sequence);
	if (path == kVoid)
		return;
	const bool all = path == kDense || not_finite(l, r);
	const int from = l.first[r.sequence], total = all ? l.lengths[r.sequence] - from : l.kept[row];
	const int per = part_size(l, total), begin = part * per, end = min(begin + per, total);
	if (begin >= total)
		return;
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
	for (int i = tid; i < l.asking * kPart; i += kDenseThreads)
		l.partial[(int64_t(row) * l.splits + part) * l.asking * kPart + i] = i % kPart == 0 ? parts[i] / kLog2e : parts[i];
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
