// Kernels with a planted fault, and the same kernels mended: what tests/instruments/test_simt_faults.py expects to be reported, and not.
#include <cuda_runtime.h>

#include <cstring>
#include <vector>

namespace {

constexpr int kThreads = 64;

struct Data {
  float* values;      // [kThreads * blocks]
  unsigned* counter;  // [1]
  float* nothing;     // nullptr
};

// ---- races -----------------------------------------------------------------------------------------------------------

template <bool kMended>
__global__ void missing_barrier(Data data) {
  __shared__ float s[kThreads];
  s[threadIdx.x] = 1.0f;
  if (kMended) __syncthreads();
  data.values[blockIdx.x * kThreads + threadIdx.x] = s[kThreads - 1 - threadIdx.x];
}

// Read, then overwritten by another warp.
template <bool kMended>
__global__ void write_after_read(Data data) {
  extern __shared__ float s_dynamic[];
  s_dynamic[threadIdx.x] = 1.0f;
  __syncthreads();
  const float other = s_dynamic[(threadIdx.x + 32) % kThreads];
  if (kMended) __syncthreads();
  s_dynamic[threadIdx.x] = other;
}

template <bool kMended>
__global__ void missing_syncwarp(Data data) {
  __shared__ float s[kThreads];
  s[threadIdx.x] = 1.0f;
  const float shuffled = __shfl_xor_sync(0xffffffffu, 1.0f, 1);  // orders no memory
  if (kMended) __syncwarp();
  data.values[blockIdx.x * kThreads + threadIdx.x] = s[threadIdx.x ^ 1] + shuffled;
}

// A barrier of one half of the lanes does not order the other.
template <bool kMended>
__global__ void syncwarp_of_others(Data data) {
  __shared__ float s[kThreads];
  s[threadIdx.x] = 1.0f;
  const bool low = threadIdx.x % 32 < 16;
  __syncwarp(low ? 0x0000ffffu : 0xffff0000u);
  data.values[blockIdx.x * kThreads + threadIdx.x] = s[threadIdx.x ^ (kMended ? 8 : 16)];
}

template <bool kMended>
__global__ void blocks_write_one_byte(Data data) {
  if (threadIdx.x == 0) reinterpret_cast<unsigned char*>(data.values)[kMended ? blockIdx.x : 5] = 7;  // the same value
}

template <bool kMended>
__global__ void block_reads_what_another_writes(Data data) {
  const unsigned block = kMended ? blockIdx.x : (blockIdx.x + 1) % gridDim.x;
  const float read = data.values[block * kThreads + threadIdx.x];
  data.values[blockIdx.x * kThreads + threadIdx.x] = read + 1.0f;
}

// The last block adds what all have written; kMissing says which fence is left out.
template <int kMissing>
__device__ void add_by_ticket(Data data) {
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    data.values[blockIdx.x] = 1.0f;
    if (kMissing != 1) __threadfence();
    is_last = atomicAdd(data.counter, 1u) == gridDim.x - 1;
    if (kMissing != 2) __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  const float partial = threadIdx.x < gridDim.x ? data.values[threadIdx.x] : 0.0f;
  data.values[kThreads + threadIdx.x] = partial;
  if (threadIdx.x == 0) *data.counter = 0;
}
template <bool kMended>
__global__ void ticket_without_release(Data data) {
  add_by_ticket<kMended ? 0 : 1>(data);
}
template <bool kMended>
__global__ void ticket_without_acquire(Data data) {
  add_by_ticket<kMended ? 0 : 2>(data);
}

template <bool kMended>
__global__ void plain_and_atomic(Data data) {
  if (threadIdx.x == 0) atomicAdd(data.counter, 1u);
  if (threadIdx.x == 1 && blockIdx.x == 0) {
    if (kMended) atomicAdd(data.counter, 0u);
    else *data.counter = 0;
  }
}

template <bool kMended>
__global__ void races_by_memcpy(Data data) {
  const size_t bytes = sizeof(float) * blockDim.x / 4;
  if (threadIdx.x == 0) memcpy(data.values + blockIdx.x * (kMended ? 16 : 15), data.values + 2 * kThreads, bytes);
}

template <bool kMended>
__global__ void writes_another_threads_variable(Data data) {
  __shared__ float* s_pointer;
  float local = 0.0f;
  if (threadIdx.x == 0) s_pointer = &local;
  __syncthreads();
  if (threadIdx.x == (kMended ? 0 : 1)) *s_pointer = 1.0f;
  __syncthreads();
  if (threadIdx.x == 0) data.values[blockIdx.x] = local;
}

// ---- meetings --------------------------------------------------------------------------------------------------------

template <bool kMended>
__global__ void divergent_barrier(Data) {
  if (kMended || threadIdx.x < 40) __syncthreads();
  __syncwarp();
}

template <bool kMended>
__global__ void ended_before_barrier(Data) {
  if (!kMended && threadIdx.x == 7) return;
  __syncthreads();
}

template <bool kMended>
__global__ void barriers_of_two_kinds(Data) {
  if (kMended || threadIdx.x < 32) __syncthreads();
  else __syncthreads_or(1);
}

template <bool kMended>
__global__ void shuffle_without_a_lane(Data data) {
  if (kMended || threadIdx.x != 5) data.values[blockIdx.x * kThreads + threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  __syncthreads();
}

template <bool kMended>
__global__ void ended_before_ballot(Data data) {
  if (!kMended && threadIdx.x == 33) return;
  data.values[blockIdx.x * kThreads + threadIdx.x] = static_cast<float>(__ballot_sync(0xffffffffu, 1));
}

template <bool kMended>
__global__ void shuffles_of_two_masks(Data data) {
  const unsigned mask = kMended || threadIdx.x % 2 ? 0xffffffffu : 0x55555555u;
  data.values[blockIdx.x * kThreads + threadIdx.x] = __shfl_sync(mask, 1.0f, 0);
}

template <bool kMended>
__global__ void mask_without_the_caller(Data data) {
  data.values[blockIdx.x * kThreads + threadIdx.x] = __shfl_sync(kMended ? 0xffffffffu : 0x0000ffffu, 1.0f, 0);
}

template <bool kMended>
__global__ void mask_of_lanes_that_are_not_there(Data data) {
  const unsigned mask = kMended ? 0xffffffffu >> (64 - blockDim.x) : 0xffffffffu;
  if (threadIdx.x >= 32) data.values[blockIdx.x * kThreads + threadIdx.x] = static_cast<float>(__any_sync(mask, 1));
}

template <bool kMended>
__global__ void reads_a_lane_outside_the_mask(Data data) {
  if (threadIdx.x < 8) data.values[blockIdx.x * kThreads + threadIdx.x] = __shfl_sync(0xffu, 1.0f, kMended ? 7 : 8);
}

template <bool kMended>
__global__ void width_that_is_no_power_of_two(Data data) {
  data.values[blockIdx.x * kThreads + threadIdx.x] = __shfl_down_sync(0xffffffffu, 1.0f, 1, kMended ? 16 : 12);
}

// ---- memory ----------------------------------------------------------------------------------------------------------

__attribute__((noinline)) int depth_of(volatile int* levels) {
  volatile char frame[256];
  frame[*levels & 255] = 1;
  return (*levels)-- > 0 ? depth_of(levels) + frame[0] : 0;
}
template <bool kMended>
__global__ void recursion_without_end(Data data) {
  volatile int levels = kMended ? 3 : 1 << 30;
  data.values[blockIdx.x * kThreads + threadIdx.x] = static_cast<float>(depth_of(&levels));
}

template <bool kMended>
__global__ void null_pointer(Data data) {
  if (threadIdx.x == 3 && blockIdx.x == 0) *(kMended ? data.values : data.nothing) = 1.0f;
}

template <bool kMended>
__global__ void division_by_zero(Data data) {
  volatile int divisor = kMended ? 1 : 0;
  data.values[blockIdx.x * kThreads + threadIdx.x] = static_cast<float>(7 / divisor);
}

template <bool kMended>
__global__ void global_read_beyond_the_end(Data data) {
  const float read = data.values[blockIdx.x * kThreads + threadIdx.x + (kMended ? 0 : 1)];
  __syncthreads();
  data.values[blockIdx.x * kThreads + threadIdx.x] = read;
}

template <bool kMended>
__global__ void global_write_before_the_beginning(Data data) {
  data.values[static_cast<int>(blockIdx.x * kThreads + threadIdx.x) - (kMended ? 0 : 1)] = 1.0f;
}

template <bool kMended>
__global__ void dynamic_shared_beyond_the_end(Data data) {
  extern __shared__ float s_dynamic[];
  s_dynamic[threadIdx.x + (kMended ? 0 : 1)] = 1.0f;
}

template <bool kMended>
__global__ void static_shared_beyond_the_end(Data data) {
  __shared__ float s[kThreads];
  s[threadIdx.x] = 1.0f;
  __syncthreads();
  data.values[blockIdx.x * kThreads + threadIdx.x] = s[threadIdx.x + (kMended ? 0 : 1)];
}

template <bool kMended>
__global__ void misaligned_vector_load(Data data) {
  if (threadIdx.x >= 8) return;
  const float4 loaded = __ldg(reinterpret_cast<const float4*>(data.values + 4 * threadIdx.x + (kMended ? 0 : 1)));
  data.values[blockIdx.x * kThreads + 32 + threadIdx.x] = loaded.x + loaded.w;
}

template <bool kMended>
__global__ void integer_overflow(Data data) {
  const int big = 0x7fffffff - kThreads + (kMended ? 0 : 2);
  data.values[blockIdx.x * kThreads + threadIdx.x] = static_cast<float>(big + static_cast<int>(threadIdx.x));
}

template <bool kMended>
__global__ void uninitialised_shared(Data data) {
  __shared__ float s[kThreads];
  if (kMended || threadIdx.x % 2) s[threadIdx.x] = 1.0f;
  data.values[blockIdx.x * kThreads + threadIdx.x] = s[threadIdx.x];
}

// No fault: shows the order in which threads run.
template <bool kMended>
__global__ void last_writer(Data data) {
  data.values[0] = static_cast<float>(blockIdx.x * kThreads + threadIdx.x);
}

// ---- by name ---------------------------------------------------------------------------------------------------------

struct Fault {
  const char* name;
  void (*faulty)(Data);
  void (*mended)(Data);
};
#define FAULT(name) {#name, name<false>, name<true>}
const Fault kFaults[] = {
    FAULT(missing_barrier),
    FAULT(write_after_read),
    FAULT(missing_syncwarp),
    FAULT(syncwarp_of_others),
    FAULT(blocks_write_one_byte),
    FAULT(block_reads_what_another_writes),
    FAULT(ticket_without_release),
    FAULT(ticket_without_acquire),
    FAULT(plain_and_atomic),
    FAULT(races_by_memcpy),
    FAULT(writes_another_threads_variable),
    FAULT(divergent_barrier),
    FAULT(ended_before_barrier),
    FAULT(barriers_of_two_kinds),
    FAULT(shuffle_without_a_lane),
    FAULT(ended_before_ballot),
    FAULT(shuffles_of_two_masks),
    FAULT(mask_without_the_caller),
    FAULT(mask_of_lanes_that_are_not_there),
    FAULT(reads_a_lane_outside_the_mask),
    FAULT(width_that_is_no_power_of_two),
    FAULT(recursion_without_end),
    FAULT(null_pointer),
    FAULT(division_by_zero),
    FAULT(global_read_beyond_the_end),
    FAULT(global_write_before_the_beginning),
    FAULT(dynamic_shared_beyond_the_end),
    FAULT(static_shared_beyond_the_end),
    FAULT(misaligned_vector_load),
    FAULT(integer_overflow),
    FAULT(uninitialised_shared),
    FAULT(last_writer),
};

}  // namespace

// Runs one of them on data of its own, whose first values it leaves in `values` [kThreads]. Returns the cudaError_t; -1 for no
// such name.
extern "C" int run_fault(const char* name, int mended, int blocks, int threads, float* values) {
  std::vector<float> data(blocks * kThreads + kThreads, 1.0f);
  if (strstr(name, "global_") == name) data.resize(blocks * kThreads);  // nothing is left beyond the end
  data.shrink_to_fit();
  std::vector<unsigned> counter(1, 0u);
  for (const Fault& fault : kFaults) {
    if (strcmp(fault.name, name) != 0) continue;
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks;
    config.blockDim = threads;
    config.dynamicSmemBytes = sizeof(float) * kThreads;
    const Data argument = {data.data(), counter.data(), nullptr};
    const cudaError_t error = cudaLaunchKernelEx(&config, mended ? fault.mended : fault.faulty, argument);
    memcpy(values, data.data(), sizeof(float) * kThreads);
    return error;
  }
  return -1;
}
