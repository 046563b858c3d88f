// Kernels with one fault each: what the emulator and the race build must find.
#include "cuda/launch.h"
#include "planted_faults.h"

namespace fastmaml::FASTMAML_CUDA_NS {

// ---------------------------------------------------------------- races

__global__ void missing_barrier(float* out, const float* x) {
  __shared__ float tile[64];
  tile[threadIdx.x] = x[threadIdx.x];
  out[threadIdx.x] = tile[63 - threadIdx.x];
}

__global__ void missing_barrier_before_reuse(float* out, const float* x) {
  __shared__ float tile[64];
  for (int turn = 0; turn < 2; ++turn) {
    tile[threadIdx.x] = x[threadIdx.x] + turn;
    __syncthreads();
    out[threadIdx.x] = tile[(threadIdx.x + 32) % 64];
  }
}

__global__ void missing_syncwarp(float* out, const float* x) {
  __shared__ float tile[64];
  tile[threadIdx.x] = x[threadIdx.x];
  out[threadIdx.x] = tile[threadIdx.x ^ 1];
}

// The values are handed over by a shuffle, which orders no memory.
__global__ void shuffle_for_syncwarp(float* out, const float* x) {
  __shared__ float tile[64];
  tile[threadIdx.x] = x[threadIdx.x];
  const float other = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
  out[threadIdx.x] = tile[threadIdx.x ^ 1] - other;
}

// Lanes 0 to 15 wait for one another, and read what the other half has written.
__global__ void syncwarp_of_another_half(float* out, const float* x) {
  __shared__ float tile[64];
  tile[threadIdx.x] = x[threadIdx.x];
  __syncwarp(threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u);
  out[threadIdx.x] = tile[threadIdx.x ^ 16];
}

__global__ void same_word_of_two_blocks(float* out, const float*) {
  if (threadIdx.x == 0) out[0] = blockIdx.x;
}

__global__ void reads_what_another_block_writes(float* out, const float*) {
  if (threadIdx.x == 0) out[blockIdx.x + 1] = out[blockIdx.x];
}

__global__ void same_bytes(float* out, const float*) {
  unsigned char* bytes = reinterpret_cast<unsigned char*>(out);
  bytes[threadIdx.x / 2] = static_cast<unsigned char>(threadIdx.x);
}

__global__ void atomic_and_plain(float* out, const float*) {
  int* count = reinterpret_cast<int*>(out);
  if (threadIdx.x < 32)
    atomicAdd(count, 1);
  else
    *count = 0;
}

__global__ void missing_barrier_after_wait(float* out, const float* x) {
  FASTMAML_SHARED;
  float* tile = reinterpret_cast<float*>(shared_bytes);
  async_copy<4>(tile + threadIdx.x, x + threadIdx.x);
  async_commit();
  async_wait<0>();
  out[threadIdx.x] = tile[threadIdx.x ^ 32];
  __syncthreads();
}

// ---------------------------------------------------------------- bounds

__global__ void writes_past_the_end(float* out, const float* x) { out[threadIdx.x + 1] = x[threadIdx.x]; }
__global__ void writes_far_before(float* out, const float* x) { out[int(threadIdx.x) - 5000] = x[threadIdx.x]; }
__global__ void reads_past_the_end(float* out, const float* x) { out[threadIdx.x] = x[threadIdx.x + 1]; }
__global__ void reads_null(float* out, const float* x) { out[threadIdx.x] = x[threadIdx.x]; }

__global__ void dynamic_shared_overrun(float* out, const float* x) {
  FASTMAML_SHARED;
  float* tile = reinterpret_cast<float*>(shared_bytes);
  tile[threadIdx.x + 1] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x + 1];
}

__global__ void static_shared_overrun(float* out, const float* x) {
  __shared__ float tile[2][32];
  tile[0][threadIdx.x] = x[threadIdx.x];  // the second half of the block writes the second row
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x / 32][threadIdx.x % 32];
}

__global__ void local_overrun(float* out, const float* x) {
  float terms[4] = {1, 2, 3, 4};
  out[threadIdx.x] = terms[threadIdx.x % 5] + x[threadIdx.x];
}

__global__ void misaligned(float* out, const float* x) {
  if (threadIdx.x == 0) *reinterpret_cast<float4*>(out) = *reinterpret_cast<const float4*>(x + 1);
}

__device__ float deep(const float* x, int depth) {
  float sum[1024];
  for (int i = 0; i < 1024; ++i) sum[i] = x[0] + i;
  return depth == 0 ? sum[3] : deep(sum, depth - 1) + sum[depth];
}
__global__ void stack_overflow(float* out, const float* x) { out[threadIdx.x] = deep(x, 1000); }

// ---------------------------------------------------------------- barriers

__global__ void barrier_after_return(float* out, const float* x) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  out[threadIdx.x] = x[threadIdx.x];
}

__global__ void two_barriers(float* out, const float* x) {
  if (threadIdx.x < 32) {
    out[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
  } else {
    __syncthreads();
    out[threadIdx.x] = x[threadIdx.x];
  }
}

__global__ void barrier_against_shuffle(float* out, const float* x) {
  float value = x[threadIdx.x];
  if (threadIdx.x == 5)
    __syncthreads();
  else
    value = __shfl_xor_sync(0xffffffffu, value, 1);
  out[threadIdx.x] = value;
}

__global__ void masks_that_differ(float* out, const float* x) {
  out[threadIdx.x] = __shfl_xor_sync(threadIdx.x % 32 == 3 ? 0x0000000fu : 0xffffffffu, x[threadIdx.x], 1);
}

__global__ void mask_names_returned(float* out, const float* x) {
  if (threadIdx.x % 32 == 31) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
}

__global__ void mask_without_itself(float* out, const float* x) { out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, x[threadIdx.x], 1); }

// ---------------------------------------------------------------- cp.async

__global__ void missing_wait(float* out, const float* x) {
  FASTMAML_SHARED;
  float* tile = reinterpret_cast<float*>(shared_bytes);
  async_copy<4>(tile + threadIdx.x, x + threadIdx.x);
  async_commit();
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x ^ 32];
}

// Two groups, and the wait leaves one of them.
__global__ void waits_for_too_few(float* out, const float* x) {
  FASTMAML_SHARED;
  float* tile = reinterpret_cast<float*>(shared_bytes);
  for (int half = 0; half < 2; ++half) {
    async_copy<4>(tile + 64 * half + threadIdx.x, x + threadIdx.x);
    async_commit();
  }
  async_wait<1>();
  __syncthreads();
  out[threadIdx.x] = tile[64 + (threadIdx.x ^ 32)];
  async_wait<0>();
}

__global__ void missing_commit(float* out, const float* x) {
  FASTMAML_SHARED;
  float* tile = reinterpret_cast<float*>(shared_bytes);
  async_copy<4>(tile + threadIdx.x, x + threadIdx.x);
  async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x ^ 32];
}

}  // namespace fastmaml::FASTMAML_CUDA_NS

// ---------------------------------------------------------------- launch

namespace fastmaml::planted {

using namespace fastmaml::FASTMAML_CUDA_NS;

#define FAULT(kernel, blocks, shared, checked, watched) \
  {#kernel, [](float* out, const float* x) { launch(kernel, dim3(blocks), dim3(64), shared, 0, out, x); }, checked, watched}

const std::vector<Fault>& faults() {
  constexpr const char *silent = "", *nan = "nan";
  constexpr size_t tile = 64 * sizeof(float);
  static const std::vector<Fault> all = {
      FAULT(missing_barrier, 1, 0, nan, "race: it "),
      FAULT(missing_barrier_before_reuse, 1, 0, silent, "race: it "),
      FAULT(missing_syncwarp, 1, 0, nan, "no __syncwarp"),
      FAULT(shuffle_for_syncwarp, 1, 0, silent, "no __syncwarp"),
      FAULT(syncwarp_of_another_half, 1, 0, nan, "no __syncwarp"),
      FAULT(missing_barrier_after_wait, 1, tile, nan, "race: it "),
      FAULT(same_word_of_two_blocks, 2, 0, silent, "race: it writes global memory"),
      FAULT(reads_what_another_block_writes, 2, 0, silent, "race: it "),
      FAULT(same_bytes, 1, 0, silent, "race: it writes"),
      FAULT(atomic_and_plain, 1, 0, silent, "race: it "),
      FAULT(writes_past_the_end, 1, 0, "out of bounds", "out of bounds: it writes beside a buffer of 256 bytes"),
      FAULT(writes_far_before, 1, 0, "out of bounds", "out of bounds: it writes beside a buffer of 256 bytes"),
      FAULT(reads_past_the_end, 1, 0, "0 bytes past the end of a buffer of 256 bytes", "out of bounds: it reads beside a buffer"),
      {"reads_null", [](float* out, const float*) { launch(reads_null, dim3(1), dim3(64), 0, 0, out, nullptr); }, "belongs to no buffer",
       "belongs to no buffer"},
      FAULT(dynamic_shared_overrun, 1, tile, "0 bytes past the end of the dynamic shared memory of 256 bytes",
            "beside dynamic shared memory"),
      FAULT(static_shared_overrun, 1, 0, "of an array of type 'float [32]'", "of an array of type 'float [32]'"),
      FAULT(local_overrun, 1, 0, "out of bounds: index 4", "out of bounds: index 4"),
      FAULT(misaligned, 1, 0, "misaligned access", "misaligned access"),
      FAULT(stack_overflow, 1, 0, "its local variables need more than", "its local variables need more than"),
      FAULT(barrier_after_return, 1, 0, "divergent barrier", "divergent barrier"),
      FAULT(two_barriers, 1, 0, "divergent barrier", "divergent barrier"),
      FAULT(barrier_against_shuffle, 1, 0, "deadlock: thread (5, 0, 0) waits in __syncthreads", "deadlock"),
      FAULT(masks_that_differ, 1, 0, "deadlock", "deadlock"),
      FAULT(mask_names_returned, 1, 0, "a mask that names", "a mask that names"),
      FAULT(mask_without_itself, 1, 0, "does not name its own lane", "does not name its own lane"),
      FAULT(missing_wait, 1, tile, "never waited for its cp.async", "missing wait"),
      FAULT(waits_for_too_few, 1, 2 * tile, nan, "missing wait"),
      FAULT(missing_commit, 1, tile, "never waited for its cp.async", "missing wait"),
  };
  return all;
}

}  // namespace fastmaml::planted
