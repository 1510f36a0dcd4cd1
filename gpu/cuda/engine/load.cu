// The data of benchmarks, what they need to know of it, and the bandwidth below them.
#include <cstdint>
#include <cuda_fp16.h>

typedef uint32_t u32;

__device__ __forceinline__ u32 hash(u32 x)
{
	x = (x ^ x >> 16) * 0x7feb352du;
	x = (x ^ x >> 15) * 0x846ca68bu;
	return x ^ x >> 16;
}

// About normal with variance 1: the sum of four uniform 16-bit numbers.
__device__ __forceinline__ float normal(u32 a, u32 b)
{
	u32 h = hash(a * 0x9e3779b9u + hash(b)), k = hash(h ^ 0x68bc21ebu);
	int sum = int(h & 0xffff) + int(h >> 16) + int(k & 0xffff) + int(k >> 16) - 131070;
	return sum * (1.7320508f / 65536);
}

// Keys and values [pages][page][heads][dim] in fp16, n of each. Half of a key's variance is common to 16
// tokens of a sequence, as a context's keys have neighbours like them. places tells of each page which of
// all sequences' pages it is; without it they lie in order.
extern "C" __global__ void load_fill(__half *k, __half *v, const int *places, uint64_t n, uint64_t page, uint64_t heads,
				     uint64_t dim, uint64_t seed)
{
	for (uint64_t i = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x; i < n; i += gridDim.x * uint64_t(blockDim.x)) {
		u32 d = i % dim, h = i / dim % heads, slot = i / dim / heads;
		u32 token = places ? places[slot / page] * u32(page) + slot % u32(page) : slot;
		float common = normal(u32(seed) ^ (token / 16 * 131 + h) ^ 0x1234567, d);
		float own = normal(u32(seed) ^ token, (h * u32(dim) + d) * 2);
		k[i] = __float2half(.7071f * (common + own));
		v[i] = __float2half(normal(u32(seed) ^ token, (h * u32(dim) + d) * 2 + 1));
	}
}

// Queries [batch][heads][dim]: a row's spread lies between low and high hundredths, and the heads of a
// group share .64 of their variance.
extern "C" __global__ void load_queries(__half *q, uint64_t batch, uint64_t heads, uint64_t group, uint64_t dim,
					uint64_t low, uint64_t high, uint64_t seed)
{
	uint64_t i = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x;
	if (i >= batch * heads * dim)
		return;
	u32 d = i % dim, h = i / dim % heads, b = i / dim / heads;
	float u = (hash(u32(seed) * 77 + b * 1000 + u32(h / group)) & 0xffff) / 65536.f;
	float spread = (low + (high - low) * u) / 100;
	float shared = normal(u32(seed) + 11, (b * 256 + u32(h / group)) * dim + d);
	float own = normal(u32(seed) + 13, (b * 256 + h) * dim + d);
	q[i] = __float2half(spread * (group > 1 ? .8f * shared + .6f * own : own));
}

// q.k of a query [dim] and the keys of a head, in fp32, for n tokens of the pages of a table.
extern "C" __global__ void load_logits(const __half *k, const __half *q, const int *table, float *out, uint64_t n,
				       uint64_t page, uint64_t heads, uint64_t dim)
{
	uint64_t token = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x;
	if (token >= n)
		return;
	const __half *key = k + (table[token / page] * page + token % page) * heads * dim;
	float sum = 0;
	for (uint64_t d = 0; d < dim; d++)
		sum += __half2float(key[d]) * __half2float(q[d]);
	out[token] = sum;
}

// Reads n 16-byte words: the bandwidth that nothing exceeds.
extern "C" __global__ void load_read(const uint4 *data, uint64_t n, u32 *sink)
{
	u32 sum = 0;
	uint64_t stride = gridDim.x * uint64_t(blockDim.x);
	for (uint64_t i = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x; i < n; i += 4 * stride) {
		uint4 x[4];
#pragma unroll
		for (int k = 0; k < 4; k++)
			x[k] = i + k * stride < n ? __ldcs(data + i + k * stride) : make_uint4(0, 0, 0, 0);
#pragma unroll
		for (int k = 0; k < 4; k++)
			sum += x[k].x ^ x[k].y ^ x[k].z ^ x[k].w;
	}
	if (sum == 0x12345678)
		*sink = sum;
}
