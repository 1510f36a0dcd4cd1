// What an armed step needs besides its layers' kernels.
#include "armed.h"
#include "device.cuh"

namespace {

template <typename T>
__device__ T *at(Step *s, int offset) { return reinterpret_cast<T *>(reinterpret_cast<uint8_t *>(s) + offset); }

__device__ void tell(uint32_t *news, int what, u32 value)
{
	__threadfence_system();
	reinterpret_cast<volatile u32 *>(news)[what] = value;
}

// Whether step `id` was halted. Of this and twilight_halt one sees what the other wrote.
__device__ bool enter(uint32_t *gate, u32 id)
{
	auto *both = reinterpret_cast<u64 *>(gate);
	for (u64 old = *reinterpret_cast<volatile u64 *>(both), seen;; old = seen) {
		seen = atomicCAS(both, old, (old >> 32 << 32) | id);
		if (seen == old)
			return int32_t(id - u32(old >> 32)) <= 0;
	}
}

} // namespace

// Begins a step: one block. Tables are brought up to date; if it was halted, all layers are parked.
extern "C" __global__ void __launch_bounds__(1024)
twilight_begin(const __grid_constant__ Layer l, Step *s, uint32_t *gate, uint32_t *reached)
{
	__shared__ bool halted;
	if (threadIdx.x == 0) {
		*reinterpret_cast<volatile u32 *>(reached) = *reinterpret_cast<volatile u32 *>(l.finished) = 0;
		halted = enter(gate, s->id);
		if (!halted) {
			for (int i : {kNewsParked, kNewsSlot})
				tell(l.news, i, 0);
			tell(l.news, kNewsStep, s->id);
		}
	}
	__syncthreads();
	if (halted) {
		for (int i = threadIdx.x; i < s->layers; i += blockDim.x)
			at<u32>(s, s->go_at)[i] = kPark;
		return;
	}
	auto *table = const_cast<int32_t *>(l.table), *vtable = const_cast<int32_t *>(l.vtable);
	const int32_t *entries = at<int32_t>(s, s->entries_at);
	for (int p = 0; p < s->patches; p++) {
		Patch patch = at<Patch>(s, s->patches_at)[p];
		for (int i = threadIdx.x; i < patch.count; i += blockDim.x) {
			table[patch.to + i] = entries[patch.from + i];
			if (patch.differ)
				vtable[patch.to + i] = entries[patch.from + patch.count + i];
		}
	}
}

// Halts step `id` and all before it. found becomes the step that has begun last.
extern "C" __global__ void twilight_halt(uint32_t *gate, uint64_t id, uint32_t *found)
{
	auto *both = reinterpret_cast<u64 *>(gate);
	for (u64 old = *reinterpret_cast<volatile u64 *>(both), seen;; old = seen) {
		seen = atomicCAS(both, old, (old & 0xffffffffu) | id << 32);
		if (seen == old)
			break;
	}
	tell(found, 0, *reinterpret_cast<volatile u32 *>(gate));
}

// Says that a step failed, unless somebody did before.
extern "C" __global__ void twilight_fail(uint32_t *status, uint64_t code)
{
	if (*reinterpret_cast<volatile u32 *>(status) == 0)
		*reinterpret_cast<volatile u32 *>(status) = u32(code);
	__threadfence_system();
}

// Makes a layer's output NaN: a block a query head of a row.
extern "C" __global__ void twilight_poison(const __grid_constant__ Layer l)
{
	int b = blockIdx.x / l.query_heads, head = blockIdx.x % l.query_heads;
	uint8_t *out = l.output + b * l.output_row + head * l.output_head;
	for (int d = threadIdx.x; d < l.v_dim; d += blockDim.x)
		write1(out + d * element_size(l.output_dtype), kNaN, l.output_dtype);
}

// Takes over a row of the batch, void if it is wrong: a block a row.
extern "C" __global__ void twilight_batch_rows(const __grid_constant__ Batch b)
{
	int row = blockIdx.x, length = b.lengths[row], first = b.first ? b.first[row] : 0;
	if (*reinterpret_cast<volatile u32 *>(b.go) != kGo)
		return;
	__shared__ int shared[2]; // the engine may change them meanwhile
	if (threadIdx.x == 0)
		shared[0] = length, shared[1] = first;
	__syncthreads();
	length = shared[0], first = shared[1];
	bool bad = length < 0 || length > b.max_length || first < 0 || (length > 0 && first >= length);
	if (!bad && length > 0) {
		int pages = (length + b.page_size - 1) / b.page_size;
		for (int i = threadIdx.x; i < pages; i += blockDim.x) {
			int page = b.table[int64_t(row) * b.stride + i];
			bool valid = page >= 0 && page < b.num_pages && page != b.null_page;
			bad |= !valid && i >= first / b.page_size;
			b.own_table[int64_t(row) * b.own_stride + i] = valid ? page : 0;
		}
	}
	bad = __syncthreads_or(bad);
	if (threadIdx.x)
		return;
	bool none = bad || length == 0;
	int n = length - first, all = (length + kChunk - 1) / kChunk - first / kChunk, keep = all;
	if (!b.select_all) {
		double budget = b.rate > 0 ? ceil(b.rate * n) : b.token_budget;
		keep = b.in_tokens ? int(budget) : min(max(1, int((budget + kChunk - 1) / kChunk)), all);
	}
	b.own_lengths[row] = none ? 0 : length;
	b.own_first[row] = none ? 0 : first;
	b.bad[row] = bad;
	b.sparse_paths[row] = none ? kVoid : b.plain || n < b.dense_below ? kDense : kSparse;
	b.dense_paths[row] = none ? kVoid : kDense;
	b.budgets[row] = none ? 0 : keep;
	u64 level = 0;
	for (int i = 0; i < 4 && !none && b.levels[i] && b.levels[i] <= n; i++)
		level = b.levels[i];
	if (level)
		atomicMax(reinterpret_cast<u64 *>(b.training), level << 32 | u32(~row));
}

// Forgets the tokens of slots that were written; all of a page whose first is.
extern "C" __global__ void twilight_batch_slots(const __grid_constant__ Batch b)
{
	int i = blockIdx.x * blockDim.x + threadIdx.x;
	if (i >= b.num_slots || *reinterpret_cast<volatile u32 *>(b.go) != kGo)
		return;
	int64_t slot = *reinterpret_cast<const volatile int64_t *>(b.slots + i);
	if (slot == -1)
		return;
	if (slot < 0 || slot >= int64_t(b.num_pages) * b.page_size) {
		atomicMax(b.bad_slot, ~u32(i));
		return;
	}
	int chunk = int(slot / kChunk);
	if (slot % b.page_size)
		atomicAnd(b.masks + chunk, ~(1u << (slot % kChunk)));
	else
		for (int c = 0; c < b.page_size / kChunk; c++)
			atomicAnd(b.masks + chunk + c, 0xffff0000u);
}

namespace {

__device__ bool trains(const Batch &b) { return int(*b.training >> 32) > int(*b.trained); }

} // namespace

// Forgets all, if heads are about to be trained.
extern "C" __global__ void twilight_batch_forget(const __grid_constant__ Batch b)
{
	if (*reinterpret_cast<volatile u32 *>(b.go) != kGo || !trains(b))
		return;
	for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < b.chunks; i += gridDim.x * blockDim.x)
		b.masks[i] = 0;
}

// Lists the chunks of a row that have something to index: blocks of a row.
extern "C" __global__ void twilight_batch_chunks(const __grid_constant__ Batch b)
{
	int row = blockIdx.y, length = b.own_lengths[row], first = b.own_first[row];
	if (*reinterpret_cast<volatile u32 *>(b.go) != kGo || !b.indexes)
		return;
	int perPage = b.page_size / kChunk, end = (length + kChunk - 1) / kChunk;
	for (int c = first / kChunk + blockIdx.x * blockDim.x + threadIdx.x; c < end; c += gridDim.x * blockDim.x) {
		int id = b.own_table[int64_t(row) * b.own_stride + c / perPage] * perPage + c % perPage;
		u32 from = max(first - c * kChunk, 0), to = min(length - c * kChunk, kChunk);
		u32 span = (1u << to) - (1u << from), mask = b.masks[id], have = mask & 0xffff, covered = mask >> 16;
		if ((span & ~have) == 0 && covered == have)
			continue;
		if (atomicOr(b.wanted + id, span | 1u << 31) == 0) {
			int at = atomicAdd(b.num_listed, 1);
			b.listed[4 * at] = row;
			b.listed[4 * at + 1] = c;
			b.listed[4 * at + 2] = id;
		}
	}
}

// Makes work of what is listed, the same for all layers.
extern "C" __global__ void twilight_batch_work(const __grid_constant__ Batch b)
{
	if (*reinterpret_cast<volatile u32 *>(b.go) != kGo)
		return;
	int n = *b.num_listed, start = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
	for (int i = start; i < n; i += step) {
		int id = b.listed[4 * i + 2];
		u32 have = b.masks[id] & 0xffff, want = b.wanted[id] & 0xffff, fresh = want & ~have;
		b.work[4 * i] = b.listed[4 * i];
		b.work[4 * i + 1] = b.listed[4 * i + 1];
		b.work[4 * i + 2] = id;
		b.work[4 * i + 3] = int(have | want | fresh << 16);
		atomicAdd(b.indexed, __popc(fresh));
	}
	u32 slot = *b.bad_slot;
	if (start == 0 && slot)
		tell(b.news, kNewsSlot, ~slot + 1);
	for (int l = start; l < b.layers; l += step) {
		b.plan[4 * l] = 0;
		b.plan[4 * l + 1] = n;
		b.plan[4 * l + 2] = slot || trains(b);
	}
}

// Books what a step has indexed, unless it failed.
extern "C" __global__ void twilight_batch_book(const __grid_constant__ Batch b)
{
	bool ran = int32_t(b.gate[0] - b.gate[1]) > 0;
	for (int l = threadIdx.x; l < b.layers; l += blockDim.x)
		ran = ran && b.run[l];
	ran = __syncthreads_and(ran);
	int n = *b.num_listed;
	for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
		const int32_t *w = b.work + 4 * i;
		u32 valid = w[3] & 0xffff;
		if (ran)
			b.masks[w[2]] = valid | valid << 16;
		b.wanted[w[2]] = 0;
	}
}

// Offsets by which the host checks its idea of these.
extern "C" __device__ const uint32_t twilight_armed_layout[] = {
	sizeof(Step), sizeof(Patch), sizeof(Batch), offsetof(Batch, own_lengths), offsetof(Batch, masks),
	offsetof(Batch, rate), offsetof(Batch, levels),
};
