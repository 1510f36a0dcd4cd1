// Attention on the tensor cores, for head sizes 64 and 128 and 16-bit caches. Logits are in units of
// binary logarithms.
//
// Columns of a tile are the query heads' high and low halves in turn, so that up to four heads are asked
// with the precision of float32 at the price of eight columns.
#pragma once
#include "device.cuh"

constexpr float kLog2e = 1.4426950408889634f;
constexpr int kHeadsATile = 4;

__device__ __forceinline__ float exp2_fast(float x)
{
	float y;
	asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
	return y;
}

__device__ __forceinline__ uint4 load16(const void *p)
{
	uint4 r;
	asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
	    : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
	    : "l"(p));
	return r;
}

// 16-bit elements as the tensor cores take them.
template <int T>
struct Half;
template <>
struct Half<F16> {
	static __device__ u32 pack(float a, float b)
	{
		__half2 h = __floats2half2_rn(a, b);
		return reinterpret_cast<u32 &>(h);
	}
	static __device__ float round(float x) { return __half2float(__float2half_rn(x)); }
	static __device__ void mma16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1)
	{
		mma(c, a0, a1, a2, a3, b0, b1);
	}
};
template <>
struct Half<BF16> {
	static __device__ u32 pack(float a, float b)
	{
		__nv_bfloat162 h = __floats2bfloat162_rn(a, b);
		return reinterpret_cast<u32 &>(h);
	}
	static __device__ float round(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }
	static __device__ void mma16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1)
	{
		asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
		    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
		    : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
	}
};


// Queries that ask a list row, in shared memory.
template <int D, int N>
struct Queries {
	static constexpr int kHeads = N * kHeadsATile;
	float raw[kHeads][D];
	float up[kHeads]; // a power of two: halves hold raw / up
	uint2 keys[N][D / 16][32];
};

// Reads the queries of list row r. For all threads of a block.
template <int D, int N>
__device__ void read_queries(const Layer &l, RowIndex r, Queries<D, N> &q)
{
	const float factor = l.query_scale * l.softmax_scale * kLog2e;
	for (int i = threadIdx.x; i < q.kHeads * D; i += blockDim.x) {
		int h = i / D, d = i % D;
		q.raw[h][d] = 0;
		if (h < l.asking)
			q.raw[h][d] = read1(l.queries + r.sequence * l.query_row + (r.query_head + h) * l.query_head +
						    d * element_size(l.query_dtype), l.query_dtype) * factor;
	}
}

// The power of two below x, or one that divides without overflow.
__device__ __forceinline__ float power_below(float x)
{
	return x > 0 && isfinite(x) ? fmaxf(__int_as_float(__float_as_int(x) & 0x7f800000), 0x1p-100f) : 1;
}

// Splits queries into what lane (g, t) holds of b: four elements of head g/2, high or low halves by g's
// parity. Keys are read 16 bytes at a time: two steps share a lane's 8 elements.
template <int T, int D, int N>
__device__ void split_for_keys(Queries<D, N> &q)
{
	using H = Half<T>;
	constexpr int kSteps = D / 16;
	for (int i = threadIdx.x; i < N * kSteps * 32; i += blockDim.x) {
		int n = i / (kSteps * 32), s = i / 32 % kSteps, ig = i % 32 / 4, it = i % 4, h = n * kHeadsATile + ig / 2;
		int e = 8 * (4 * (s / 2) + it) + 4 * (s % 2);
		float v[4], down = 1 / q.up[h];
		for (int k = 0; k < 4; k++) {
			float x = q.raw[h][e + k] * down, high = H::round(x);
			v[k] = ig & 1 ? x - high : high;
		}
		q.keys[n][s][i % 32] = make_uint2(H::pack(v[0], v[1]), H::pack(v[2], v[3]));
	}
}

// A warp's share of a row's attention.
template <int T, int D, int N>
struct Attention {
	using H = Half<T>;
	static constexpr int kSteps = D / 16;
	static constexpr int kRise = 10; // how far a logit may rise above what steadies the softmax

	float o[N][kSteps][4] = {}, weight[N] = {}, steady[N];

	// Attends over 16 tokens, of which n are there. position(k) is the k-th token's, for any k.
	template <typename F>
	__device__ __forceinline__ void tile(const Layer &l, RowIndex r, const Queries<D, N> &q, F position, int n)
	{
		const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
		const uint8_t *ka = token(l, l.k, l.table, r.sequence, r.kv_head, position(g)) + t * 16;
		const uint8_t *kb = token(l, l.k, l.table, r.sequence, r.kv_head, position(g + 8)) + t * 16;
		uint4 a[kSteps / 2], b[kSteps / 2], v[4][D / 64];
#pragma unroll
		for (int j = 0; j < kSteps / 2; j++)
			a[j] = load16(ka + j * 64), b[j] = load16(kb + j * 64);
#pragma unroll
		for (int i = 0; i < 4; i++) { // tokens 2t, 2t+1, 2t+8, 2t+9
			const uint8_t *from =
				token(l, l.v, l.vtable, r.sequence, r.kv_head, position(2 * t + (i & 1) + (i >> 1) * 8)) + g * 16;
#pragma unroll
			for (int j = 0; j < D / 64; j++)
				v[i][j] = load16(from + j * 128);
		}
		u32 p0[N], p1[N];
#pragma unroll
		for (int m = 0; m < N; m++) {
			float c[4] = {};
#pragma unroll
			for (int j = 0; j < kSteps / 2; j++) {
				uint2 b0 = q.keys[m][2 * j][lane], b1 = q.keys[m][2 * j + 1][lane];
				H::mma16(c, a[j].x, b[j].x, a[j].y, b[j].y, b0.x, b0.y);
				H::mma16(c, a[j].z, b[j].z, a[j].w, b[j].w, b1.x, b1.y);
			}
			const int h = m * kHeadsATile + t;
			float x = (c[0] + c[1]) * q.up[h], y = (c[2] + c[3]) * q.up[h];
			if (l.softcap > 0) {
				x = softcap(x / kLog2e, l.softcap) * kLog2e;
				y = softcap(y / kLog2e, l.softcap) * kLog2e;
			}
			bool in_x = h < l.asking && g < n, in_y = h < l.asking && g + 8 < n;
			float high = fmaxf(in_x ? x : -kInfinity, in_y ? y : -kInfinity);
			if (__any_sync(kAll, high > steady[m] + kRise)) {
				for (int s = 4; s < 32; s <<= 1)
					high = fmaxf(high, __shfl_xor_sync(kAll, high, s));
				float risen = fmaxf(high, steady[m]), shrink = exp2_fast(steady[m] - risen);
				steady[m] = risen;
				weight[m] *= shrink;
				// Columns 2t and 2t+1 of o are heads 2t%4 and (2t+1)%4.
				float even = __shfl_sync(kAll, shrink, 2 * t % 4), odd = __shfl_sync(kAll, shrink, (2 * t + 1) % 4);
#pragma unroll
				for (int s = 0; s < kSteps; s++)
					o[m][s][0] *= even, o[m][s][1] *= odd, o[m][s][2] *= even, o[m][s][3] *= odd;
			}
			x = in_x ? exp2_fast(x - steady[m]) : 0;
			y = in_y ? exp2_fast(y - steady[m]) : 0;
			weight[m] += x + y;
			// As b of the next product: lane (g, t) holds tokens 2t, 2t+1 of head g%4, high halves for g < 4.
			auto half = [&](float w) {
				float high = H::round(w);
				return g < 4 ? high : w - high;
			};
			const int source = 8 * t + (g & 3);
			float w0 = __shfl_sync(kAll, x, source), w1 = __shfl_sync(kAll, x, source + 4);
			float w8 = __shfl_sync(kAll, y, source), w9 = __shfl_sync(kAll, y, source + 4);
			p0[m] = H::pack(half(w0), half(w1));
			p1[m] = H::pack(half(w8), half(w9));
		}
		// a is V transposed: channels down, tokens across. Rows g and g+8 of tile s are two adjacent channels.
#pragma unroll
		for (int j = 0; j < D / 64; j++) {
			const u32 *q0 = &v[0][j].x, *q1 = &v[1][j].x, *q8 = &v[2][j].x, *q9 = &v[3][j].x;
#pragma unroll
			for (int s = 0; s < 4; s++)
#pragma unroll
				for (int m = 0; m < N; m++)
					H::mma16(o[m][j * 4 + s], __byte_perm(q0[s], q1[s], 0x5410), __byte_perm(q0[s], q1[s], 0x7632),
						 __byte_perm(q8[s], q9[s], 0x5410), __byte_perm(q8[s], q9[s], 0x7632), p0[m], p1[m]);
		}
	}

	// Sums a block's warps at a common maximum, in a fixed order, to [asking][2+D] at the start of parts,
	// shared memory for [warps][asking][2+D]: maximum, weight, weighted values.
	__device__ __forceinline__ void gather(int asking, float *parts)
	{
		constexpr int kPart = D + 2;
		const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, g = lane >> 2, t = lane & 3;
#pragma unroll
		for (int m = 0; m < N; m++) {
			for (int s = 4; s < 32; s <<= 1)
				weight[m] += __shfl_xor_sync(kAll, weight[m], s);
			int h = m * kHeadsATile + t;
			if (g == 0 && h < asking) {
				parts[(warp * asking + h) * kPart] = steady[m];
				parts[(warp * asking + h) * kPart + 1] = weight[m];
			}
#pragma unroll
			for (int s = 0; s < kSteps; s++)
#pragma unroll
				for (int k = 0; k < 4; k++) {
					// High and low halves' columns are two lanes apart.
					float x = o[m][s][k] + __shfl_xor_sync(kAll, o[m][s][k], 2);
					int head = m * kHeadsATile + 2 * (t & 1) + (k & 1);
					if (t < 2 && head < asking)
						parts[(warp * asking + head) * kPart + 2 + s / 4 * 64 + g * 8 + 2 * (s % 4) + (k >> 1)] = x;
				}
		}
		__syncthreads();
		for (int h = warp; h < asking; h += warps) {
			float high = parts[h * kPart];
			for (int w = 1; w < warps; w++)
				high = fmaxf(high, parts[(w * asking + h) * kPart]);
			for (int k = 1 + lane; k < kPart; k += 32) {
				float x = 0;
				for (int w = 0; w < warps; w++)
					x += parts[(w * asking + h) * kPart + k] * exp2_fast(parts[(w * asking + h) * kPart] - high);
				parts[h * kPart + k] = x;
			}
			__syncwarp();
			if (lane == 0)
				parts[h * kPart] = high;
		}
	}
};
