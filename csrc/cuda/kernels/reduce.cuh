// Sums over the threads of a block, always by the same tree: first the lanes of each warp, then the warps one after the other.
#pragma once

#include "cuda/device.h"

namespace fastmaml::FASTMAML_CUDA_NS {

// Every thread of the block gets the sums. The block must have whole warps.
template <int kSums>
__device__ __forceinline__ void block_sum(double (&x)[kSums]) {
  __shared__ double of_warp[32][kSums];
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
#pragma unroll
    for (int with = 16; with > 0; with /= 2) x[k] += __shfl_xor_sync(0xffffffffu, x[k], with);
    if (threadIdx.x % 32 == 0) of_warp[warp][k] = x[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    x[k] = of_warp[0][k];
    for (int w = 1; w < warps; ++w) x[k] += of_warp[w][k];
  }
  __syncthreads();  // of_warp may be written again after this
}

// Mean and sum of squared deviations of n numbers. Merging them does not cancel (Chan, Golub, LeVeque 1979).
struct Moments {
  double n = 0, mean = 0, squares = 0;

  __device__ void merge(const Moments& more) {
    if (more.n == 0) return;
    const double all = n + more.n, difference = more.mean - mean, share = more.n / all;
    mean += difference * share;
    squares += more.squares + difference * difference * n * share;
    n = all;
  }
};

// Lane 0 gets the moments of the numbers of all lanes.
__device__ __forceinline__ Moments warp_moments(Moments x) {
#pragma unroll
  for (int by = 16; by > 0; by /= 2) {
    Moments more;
    more.n = __shfl_down_sync(0xffffffffu, x.n, by);
    more.mean = __shfl_down_sync(0xffffffffu, x.mean, by);
    more.squares = __shfl_down_sync(0xffffffffu, x.squares, by);
    if (int(threadIdx.x % 32) < by) x.merge(more);
  }
  return x;
}

// Every thread of the block gets the moments of all its numbers. The block must have whole warps.
__device__ __forceinline__ Moments block_moments(Moments x) {
  __shared__ double of_warp[32][3];
  x = warp_moments(x);
  if (threadIdx.x % 32 == 0) {
    of_warp[threadIdx.x / 32][0] = x.n;
    of_warp[threadIdx.x / 32][1] = x.mean;
    of_warp[threadIdx.x / 32][2] = x.squares;
  }
  __syncthreads();
  x = Moments{of_warp[0][0], of_warp[0][1], of_warp[0][2]};
  for (int w = 1; w < int(blockDim.x / 32); ++w) x.merge(Moments{of_warp[w][0], of_warp[w][1], of_warp[w][2]});
  __syncthreads();  // of_warp may be written again after this
  return x;
}

// The threads that share a piece of work: the whole block, or one warp.
struct BlockTeam {
  static __device__ int rank() { return threadIdx.x; }
  static __device__ int size() { return blockDim.x; }
  template <int kSums>
  static __device__ void sum(double (&x)[kSums]) {
    block_sum(x);
  }
  static __device__ Moments moments(const Moments& x) { return block_moments(x); }
};

struct WarpTeam {
  static __device__ int rank() { return threadIdx.x % 32; }
  static __device__ int size() { return 32; }
  template <int kSums>
  static __device__ void sum(double (&x)[kSums]) {
#pragma unroll
    for (int k = 0; k < kSums; ++k)
#pragma unroll
      for (int with = 16; with > 0; with /= 2) x[k] += __shfl_xor_sync(0xffffffffu, x[k], with);
  }
  static __device__ Moments moments(Moments x) {
    x = warp_moments(x);
    return {__shfl_sync(0xffffffffu, x.n, 0), __shfl_sync(0xffffffffu, x.mean, 0), __shfl_sync(0xffffffffu, x.squares, 0)};
  }
};

}  // namespace fastmaml::FASTMAML_CUDA_NS
