// Clean kernels in the three styles of the backend, for the tests of the emulator. nvcc and g++ compile this file as it is.
#include "cuda/launch.h"
#include "emulator_kernels.h"

namespace fastmaml::FASTMAML_CUDA_NS {

// out [m, n] = a [m, k] b [k, n], a value a thread, tiles in static shared memory.
template <class T, int kTile>
__global__ void tiled_gemm(T* out, const T* a, const T* b, int m, int n, int k) {
  __shared__ T tile_a[kTile][kTile + 1], tile_b[kTile][kTile + 1];
  const int row = blockIdx.y * kTile + threadIdx.y, column = blockIdx.x * kTile + threadIdx.x;
  T sum = 0;
  for (int k0 = 0; k0 < k; k0 += kTile) {
    tile_a[threadIdx.y][threadIdx.x] = row < m && k0 + threadIdx.x < k ? a[row * k + k0 + threadIdx.x] : T(0);
    tile_b[threadIdx.y][threadIdx.x] = k0 + threadIdx.y < k && column < n ? b[(k0 + threadIdx.y) * n + column] : T(0);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTile; ++i) sum += tile_a[threadIdx.y][i] * tile_b[i][threadIdx.x];
    __syncthreads();
  }
  if (row < m && column < n) out[row * n + column] = sum;
}

// The same, 4 x 4 values a thread, double-buffered cp.async into dynamic shared memory. n and k are multiples of 4.
__global__ __launch_bounds__(64) void blocked_gemm(float* out, const float* a, const float* b, int m, int n, int k) {
  constexpr int kRows = 32, kColumns = 32, kDepth = 8, kThreads = 64, kStage = (kRows + kColumns) * kDepth;
  FASTMAML_SHARED;
  float* stages = reinterpret_cast<float*>(shared_bytes);
  const int row0 = blockIdx.y * kRows, column0 = blockIdx.x * kColumns;
  const int row = threadIdx.x / 8 * 4, column = threadIdx.x % 8 * 4;

  const auto fetch = [&](int k0, float* stage) {
    for (int i = threadIdx.x; i < kRows * kDepth / 4; i += kThreads) {  // a: rows of kDepth
      const int r = i / (kDepth / 4), c = i % (kDepth / 4) * 4;
      async_copy16(stage + r * kDepth + c, a + (row0 + r) * k + k0 + c, row0 + r < m && k0 + c < k);
    }
    for (int i = threadIdx.x; i < kColumns * kDepth / 4; i += kThreads) {  // b: rows of kColumns
      const int r = i / (kColumns / 4), c = i % (kColumns / 4) * 4;
      async_copy16(stage + kRows * kDepth + r * kColumns + c, b + (k0 + r) * n + column0 + c, k0 + r < k && column0 + c < n);
    }
    async_commit();
  };

  float sum[4][4] = {};
  fetch(0, stages);
  for (int k0 = 0, turn = 0; k0 < k; k0 += kDepth, turn ^= 1) {
    if (k0 + kDepth < k) {
      fetch(k0 + kDepth, stages + (turn ^ 1) * kStage);
      async_wait<1>();
    } else {
      async_wait<0>();
    }
    __syncthreads();
    const float *tile_a = stages + turn * kStage, *tile_b = tile_a + kRows * kDepth;
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      const float4 right = *reinterpret_cast<const float4*>(tile_b + i * kColumns + column);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float left = tile_a[(row + r) * kDepth + i];
        sum[r][0] = fmaf(left, right.x, sum[r][0]);
        sum[r][1] = fmaf(left, right.y, sum[r][1]);
        sum[r][2] = fmaf(left, right.z, sum[r][2]);
        sum[r][3] = fmaf(left, right.w, sum[r][3]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < 4; ++r)
    if (row0 + row + r < m && column0 + column < n)
      *reinterpret_cast<float4*>(out + (row0 + row + r) * n + column0 + column) = make_float4(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
}

// out [16, 8] = a [16, k] b [k, 8] by one warp. k is a multiple of 16.
template <bool kBf16>
__global__ void tensor_gemm(float* out, const float* a, const float* b, int k) {
  const int g = threadIdx.x / 4, q = threadIdx.x % 4;
  float d[4] = {};
  for (int k0 = 0; k0 < k; k0 += kBf16 ? 16 : 8) {
    const float *rows = a + k0, *columns = b + k0 * 8;
    if constexpr (kBf16) {
      const auto pair = [](float low, float high) { return (__float_as_uint(high) & 0xffff0000u) | __float_as_uint(low) >> 16; };
      const auto a2 = [&](int r, int c) { return pair(rows[r * k + c], rows[r * k + c + 1]); };
      const auto b2 = [&](int r) { return pair(columns[r * 8 + g], columns[(r + 1) * 8 + g]); };
      mma_m16n8k16_bf16(d, {a2(g, 2 * q), a2(g + 8, 2 * q), a2(g, 2 * q + 8), a2(g + 8, 2 * q + 8)}, {b2(2 * q), b2(2 * q + 8)});
    } else {
      const auto a1 = [&](int r, int c) { return to_tf32(rows[r * k + c]); };
      mma_m16n8k8_tf32(d, {a1(g, q), a1(g + 8, q), a1(g, q + 4), a1(g + 8, q + 4)},
                       {to_tf32(columns[q * 8 + g]), to_tf32(columns[(q + 4) * 8 + g])});
    }
  }
  out[g * 8 + 2 * q] = d[0];
  out[g * 8 + 2 * q + 1] = d[1];
  out[(g + 8) * 8 + 2 * q] = d[2];
  out[(g + 8) * 8 + 2 * q + 1] = d[3];
}

template <class T>
__device__ T warp_sum(T value) {
  for (int by = 16; by > 0; by /= 2) value += __shfl_down_sync(0xffffffffu, value, by);
  return value;
}

// One block: out [0] = sum of x [n].
template <class T>
__global__ void sum_block(T* out, const T* x, int n) {
  __shared__ T partial[32];
  T value = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) value += x[i];
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  value = warp_sum(threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : T(0));
  if (threadIdx.x == 0) *out = value;
}

// counts [3]: a ballot's, a vote's and an atomic's number of odd x [128], in one block of 128.
__global__ void count_odd(int* counts, const int* x) {
  const bool odd = x[threadIdx.x] % 2 != 0;
  const unsigned lanes = __ballot_sync(0xffffffffu, odd);
  if (threadIdx.x % 32 == 0) atomicAdd(&counts[0], __popc(lanes));
  const int all = __syncthreads_count(odd);
  if (threadIdx.x == 0) counts[1] = all;
  if (odd) atomicAdd(&counts[2], 1);
}

// out [13, 64]: a row for each function; the last for atomics.
__global__ void use_language(int* out) {
  constexpr unsigned kAll = 0xffffffffu;
  const int t = threadIdx.x, value = 3 * t + 1;
  const unsigned half = t % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  out[t] = __shfl_sync(kAll, value, 5, 8);
  out[64 + t] = __shfl_up_sync(kAll, value, 3);
  out[128 + t] = int(__shfl_down_sync(kAll, double(value), 3, 16));
  out[192 + t] = __any_sync(kAll, t == 7);
  out[256 + t] = __all_sync(kAll, t < 40);
  out[320 + t] = __syncthreads_or(t == 3);
  out[384 + t] = __syncthreads_and(t < 63);
  out[448 + t] = __reduce_add_sync(kAll, -t);
  out[512 + t] = int(__reduce_max_sync(kAll, unsigned(t)));
  out[576 + t] = int(__reduce_xor_sync(kAll, unsigned(t) & 1));
  out[640 + t] = int(__ballot_sync(half, t % 2));
  out[704 + t] = __popc(t) + 100 * __clz(t) + 10000 * __ffs(t);
  int* atomic = out + 768;
  if (t < 4) atomic[t] = 0;
  __syncthreads();
  atomicMax(&atomic[0], t);
  atomicMin(&atomic[1], -t);
  atomicExch(&atomic[2], 7);
  if (atomicCAS(&atomic[3], 0, 5) == 0) atomicAdd(&atomic[3], 1);
}

// Each block follows a program of `steps` rows: what every thread touches (w: writes word w - 1, -w: reads it, 0: nothing), and then
// what orders them (0: nothing, 1: __syncwarp, 2: __syncthreads).
__global__ void follow_program(float* out, float* words, const int* program, int steps) {
  const int row = blockDim.x + 1;
  program += blockIdx.x * steps * row;
  float sum = 0;
  for (int step = 0; step < steps; ++step, program += row) {
    const int touched = program[threadIdx.x], order = program[blockDim.x];
    if (touched > 0) words[touched - 1] = threadIdx.x;
    if (touched < 0) sum += words[-touched - 1];
    if (order == 1) __syncwarp();
    if (order == 2) __syncthreads();
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

template <class T>
__global__ void many_barriers(T* out, int barriers) {
  for (int i = 0; i < barriers; ++i) __syncthreads();
  if (threadIdx.x == 0) *out = 1;
}
template <class T>
__global__ void many_shuffles(T* out, int shuffles) {
  T value = T(threadIdx.x);
  for (int i = 0; i < shuffles; ++i) value = __shfl_xor_sync(0xffffffffu, value, 1);
  out[threadIdx.x] = value;
}

}  // namespace fastmaml::FASTMAML_CUDA_NS

// ---------------------------------------------------------------- launch

namespace fastmaml::example {

using namespace fastmaml::FASTMAML_CUDA_NS;

static unsigned blocks(int n, int size) { return unsigned((n + size - 1) / size); }

template <class T>
void gemm_tiled(T* out, const T* a, const T* b, int m, int n, int k) {
  launch(tiled_gemm<T, 8>, dim3(blocks(n, 8), blocks(m, 8)), dim3(8, 8), 0, 0, out, a, b, m, n, k);
}
template void gemm_tiled(float*, const float*, const float*, int, int, int);
template void gemm_tiled(double*, const double*, const double*, int, int, int);

void gemm_blocked(float* out, const float* a, const float* b, int m, int n, int k) {
  launch(blocked_gemm, dim3(blocks(n, 32), blocks(m, 32)), dim3(64), 2 * 64 * 8 * sizeof(float), 0, out, a, b, m, n, k);
}
void gemm_tensor(bool bf16, float* out, const float* a, const float* b, int k) {
  launch(bf16 ? tensor_gemm<true> : tensor_gemm<false>, dim3(1), dim3(32), 0, 0, out, a, b, k);
}
template <class T>
void sum(T* out, const T* x, int n) {
  launch(sum_block<T>, dim3(1), dim3(128), 0, 0, out, x, n);
}
template void sum(float*, const float*, int);
template void sum(double*, const double*, int);

void count(int* counts, const int* x) { launch(count_odd, dim3(1), dim3(128), 0, 0, counts, x); }
void language(int* out) { launch(use_language, dim3(1), dim3(64), 0, 0, out); }
void program(float* out, float* words, const int* program, int blocks, int threads, int steps) {
  launch(follow_program, dim3(blocks), dim3(threads), 0, 0, out, words, program, steps);
}
void barriers(float* out, int threads, int n) { launch(many_barriers<float>, dim3(1), dim3(threads), 0, 0, out, n); }
void shuffles(float* out, int threads, int n) { launch(many_shuffles<float>, dim3(1), dim3(threads), 0, 0, out, n); }

}  // namespace fastmaml::example
