// What the kernels share: element types, fragments of tensor-core tiles, ordered keys, block-wide scans.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "layer.h"

using u64 = unsigned long long;
using u32 = uint32_t;

constexpr u32 kAll = 0xffffffffu;
constexpr float kInfinity = __builtin_inff(), kNaN = __builtin_nanf(""), kLargest = 3.402823466e38f;

template <int T>
struct Element;
template <>
struct Element<F32> {
	using Type = float;
	static __device__ float real(float x) { return x; }
};
template <>
struct Element<F16> {
	using Type = __half;
	static __device__ float real(__half x) { return __half2float(x); }
};
template <>
struct Element<BF16> {
	using Type = __nv_bfloat16;
	static __device__ float real(__nv_bfloat16 x) { return __bfloat162float(x); }
};
template <>
struct Element<F8E4M3> {
	using Type = uint8_t;
	// The bits, moved to fp16's places, are the value times 2^-8; only NaN is apart.
	static __device__ float real(uint8_t x)
	{
		if ((x & 0x7f) == 0x7f)
			return kNaN;
		return __half2float(__ushort_as_half((u32(x & 0x80) << 8) | (u32(x & 0x7f) << 7))) * 256.f;
	}
};

// Reads 8 adjacent elements, in words of 16 or 8 bytes where they are aligned.
template <int T>
__device__ __forceinline__ void read8(float (&out)[8], const uint8_t *at, bool aligned)
{
	using E = typename Element<T>::Type;
	E raw[8];
	if (aligned) {
		using Word = typename std::conditional<sizeof(E) == 1, uint2, uint4>::type;
#pragma unroll
		for (int i = 0; i < int(sizeof raw / sizeof(Word)); i++)
			reinterpret_cast<Word *>(raw)[i] = __ldg(reinterpret_cast<const Word *>(at) + i);
	} else {
#pragma unroll
		for (int i = 0; i < 8; i++)
			raw[i] = reinterpret_cast<const E *>(at)[i];
	}
#pragma unroll
	for (int i = 0; i < 8; i++)
		out[i] = Element<T>::real(raw[i]);
}

__device__ __forceinline__ float read1(const uint8_t *at, int dtype)
{
	switch (dtype) {
	case F32:
		return *reinterpret_cast<const float *>(at);
	case F16:
		return Element<F16>::real(*reinterpret_cast<const __half *>(at));
	case BF16:
		return Element<BF16>::real(*reinterpret_cast<const __nv_bfloat16 *>(at));
	}
	return Element<F8E4M3>::real(*at);
}

__device__ __forceinline__ void write1(uint8_t *at, float x, int dtype)
{
	switch (dtype) {
	case F32:
		*reinterpret_cast<float *>(at) = x;
		break;
	case F16:
		*reinterpret_cast<__half *>(at) = __float2half_rn(x);
		break;
	case BF16:
		*reinterpret_cast<__nv_bfloat16 *>(at) = __float2bfloat16_rn(x);
		break;
	}
}

__device__ __forceinline__ int element_size(int dtype) { return dtype == F32 ? 4 : dtype == F8E4M3 ? 1 : 2; }

// A position's page in a table, and its token within the page.
struct Place {
	int page, offset;
};
__device__ __forceinline__ Place place(const Layer &l, const int32_t *table, int b, int position)
{
	int entry = l.page_shift >= 0 ? position >> l.page_shift : position / l.page_size;
	return {__ldg(table + int64_t(b) * l.table_stride + entry), position - entry * l.page_size};
}

// Whether a position of sequence b lies on a page that exists.
__device__ __forceinline__ bool on_page(const Layer &l, int b, int position)
{
	if (b < 0 || b >= l.batch || position < 0 || position / l.page_size >= l.table_stride)
		return false;
	int page = place(l, l.table, b, position).page;
	return page >= 0 && page < l.num_pages;
}

// The token at a position of sequence b, head h. The table has passed check.
__device__ __forceinline__ const uint8_t *token(const Layer &l, const Plane &plane, const int32_t *table, int b, int h,
						int position)
{
	Place p = place(l, table, b, position);
	return plane.base + p.page * plane.page + h * plane.head + p.offset * plane.token;
}

__device__ __forceinline__ int shadow_chunk(const Layer &l, int b, int chunk)
{
	if (l.chunk_ids)
		return __ldg(l.chunk_ids + int64_t(b) * l.chunk_stride + chunk);
	Place p = place(l, l.table, b, chunk * kChunk);
	return p.page * (l.page_size / kChunk) + p.offset / kChunk;
}

__host__ __device__ inline int64_t int4_bytes(int dim) { return dim * 8 + kChunk * 4; }
__host__ __device__ inline int64_t code_bytes(int dim, int bits, int symmetric)
{
	return kChunk * ((symmetric ? 2 : 4) + (dim * bits + 7) / 8);
}
__host__ __device__ inline int64_t bounds_bytes(int dim) { return dim * 4; }

// Keys order as floats do: a larger float has a larger key. Finite floats lie between 1 and 2^32-2.
__device__ __forceinline__ u32 key_of(float x)
{
	u32 u = __float_as_uint(x);
	return u >> 31 ? ~u : u | 0x80000000u;
}
__device__ __forceinline__ float float_of(u32 key)
{
	return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// c += a.b for a tile of 16x16 by 16x8.
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1)
{
	asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
	    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
	    : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// What a channel is divided by.
__device__ __forceinline__ float channel_scale(const Layer &l, int kv_head, int d)
{
	float s = l.spread[kv_head * l.k_dim + d];
	return s == 0 || !l.equalise ? 1 : s;
}

// Where a lane's word of step s lies in an INT4 record: four steps at a time are adjacent, so that a
// lane reads them in 16 bytes; what is left over follows.
__host__ __device__ inline int int4_word(int steps, int s, int lane)
{
	int whole = steps / 4 * 4;
	return s < whole ? s / 4 * 128 + lane * 4 + s % 4 : s * 32 + lane;
}

// cap*tanh(x/cap), rounded as attention.Softcap does: where it is all but cap, the last bits matter.
__device__ __forceinline__ float softcap(float x, float cap)
{
	float twice = expf(fmaxf(fminf(__fmul_rn(x, 2 / cap), 40), -87));
	return __fadd_rn(__fmul_rn(1 / __fadd_rn(twice, 1), -2 * cap), cap);
}

// The least logit that weights tell apart, relative to the largest.
constexpr float kLowest = -87;

// Weights as integers, so that sums are the same in any order.
constexpr float kUnit = 1099511627776.f; // 2^40
__device__ __forceinline__ u64 weight(float logit, float max) { return __float2ull_rn(expf(logit - max) * kUnit); }

template <typename V>
__device__ __forceinline__ V warp_sum(V v)
{
	for (int o = 16; o; o >>= 1)
		v += __shfl_xor_sync(kAll, v, o);
	return v;
}
__device__ __forceinline__ float warp_max(float v)
{
	for (int o = 16; o; o >>= 1)
		v = fmaxf(v, __shfl_xor_sync(kAll, v, o));
	return v;
}

// The sum of v over lower threads of the block, and over all in total. shared holds one V per warp.
template <typename V>
__device__ V block_scan(V v, V *shared, V &total)
{
	int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
	V inclusive = v;
	for (int o = 1; o < 32; o <<= 1) {
		V other = __shfl_up_sync(kAll, inclusive, o);
		if (lane >= o)
			inclusive += other;
	}
	__syncthreads();
	if (lane == 31)
		shared[warp] = inclusive;
	__syncthreads();
	V before = 0;
	total = 0;
	for (int w = 0; w < warps; w++) {
		if (w == warp)
			before = total;
		total += shared[w];
	}
	return before + inclusive - v;
}

__device__ __forceinline__ int path_of(const Layer &l, int b) { return l.bad[b] ? kVoid : l.paths[b]; }

// Tokens of a list of n, or of a whole row, that each of the attention kernels' parts takes.
__device__ __forceinline__ int part_size(const Layer &l, int n)
{
	constexpr int kLeast = 64, kStep = 16; // enough to be worth a block
	return max((n + l.splits - 1) / l.splits + kStep - 1, kLeast) / kStep * kStep;
}

struct RowIndex {
	int sequence, kv_head, query_head; // query_head: the first that asks
};
__device__ __forceinline__ RowIndex row_index(const Layer &l, int row)
{
	int per = l.query_heads / l.asking, b = row / per, q = row % per * l.asking;
	return {b, q / (l.query_heads / l.kv_heads), q};
}

// Whether a row that was to run sparsely runs densely, as an estimate of it was not finite.
__device__ __forceinline__ bool not_finite(const Layer &l, RowIndex r)
{
	return l.flags[r.sequence * l.kv_heads + r.kv_head] & kNotFinite;
}

// The k-th largest of n numbers, 1 <= k <= n, as a key, and how many of those equal to it are among the
// k largest. None may be NaN. For a block of at least 256 threads.
template <typename F>
__device__ u32 kth_key(F number, int n, int k, int &ties)
{
	__shared__ int histogram[256], scan[32], left;
	__shared__ u32 prefix;
	int tid = threadIdx.x;
	if (tid == 0)
		prefix = 0, left = k;
	for (int shift = 24; shift >= 0; shift -= 8) {
		for (int i = tid; i < 256; i += blockDim.x)
			histogram[i] = 0;
		__syncthreads();
		u32 known = prefix, mask = shift == 24 ? 0 : kAll << (shift + 8);
		for (int i = tid; i < n; i += blockDim.x) {
			float x = number(i);
			u32 key = key_of(x + 0.f);
			if (x == x && (key & mask) == known)
				atomicAdd(&histogram[key >> shift & 255], 1);
		}
		__syncthreads();
		int digit = 255 - tid, count = tid < 256 ? histogram[digit] : 0, total, want = left;
		int above = block_scan(count, scan, total);
		__syncthreads();
		if (tid < 256 && above < want && want <= above + count) {
			prefix = known | u32(digit) << shift;
			left = want - above;
		}
		__syncthreads();
	}
	ties = left;
	u32 found = prefix;
	__syncthreads();
	return found;
}

// The block's sum of v, the same for any order of threads' arrival.
__device__ inline double block_sum(double v, double *shared)
{
	double total;
	block_scan(v, shared, total);
	return total;
}
