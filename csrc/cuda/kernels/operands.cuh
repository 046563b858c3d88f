// Kernels' view of an op's operands, and access to 16 bytes of them at a time.
#pragma once

#include "cuda/device.h"

namespace fastmaml::FASTMAML_CUDA_NS {

// Task t's numbers start at data + t * task_stride.
template <class T>
struct PerTask {
  T* data = nullptr;  // null: absent
  int64_t task_stride = 0;
  __device__ T* of(int64_t task) const { return data ? data + task * task_stride : nullptr; }
};

template <class T>
inline constexpr int kChunk = 16 / int(sizeof(T));  // what one 16-byte access holds

template <class T, int n = kChunk<T>>
struct alignas(n * sizeof(T)) Chunk {
  T at[n];
};

// The chunk at `from`. kWide: by one access. Otherwise its first `count` numbers, then zeros.
template <bool kWide, int n, class T>
__device__ __forceinline__ Chunk<T, n> load(const T* from, int count) {
  if constexpr (kWide) {
    return *reinterpret_cast<const Chunk<T, n>*>(from);
  } else {
    Chunk<T, n> chunk;
#pragma unroll
    for (int j = 0; j < n; ++j) chunk.at[j] = j < count ? from[j] : T(0);
    return chunk;
  }
}

template <bool kWide, int n, class T>
__device__ __forceinline__ void store(T* to, const Chunk<T, n>& chunk, int count) {
  if constexpr (kWide) {
    *reinterpret_cast<Chunk<T, n>*>(to) = chunk;
  } else {
#pragma unroll
    for (int j = 0; j < n; ++j)
      if (j < count) to[j] = chunk.at[j];
  }
}

}  // namespace fastmaml::FASTMAML_CUDA_NS
