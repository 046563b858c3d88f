// Moves numbers: vectors into another order, and pieces of memory to a recording's places.
#pragma once

#include "cuda/kernels/operands.cuh"

namespace fastmaml::FASTMAML_CUDA_NS {

// out[r][i] = x[r][index[i]].  blockIdx.y = first r.     out, x [rows, size]
template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads) gather(T* out, const T* x, const int* index, int64_t rows, int size) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  const int from = index[i];
  for (int64_t r = blockIdx.y; r < rows; r += gridDim.y) out[r * size + i] = x[r * size + from];
}

inline constexpr int kPieces = 64;

struct PieceList {
  unsigned char* to[kPieces];
  const unsigned char* from[kPieces];
  int64_t bytes[kPieces];
};

// blockIdx.y = piece. Copies 16 bytes at a time if both ends of the piece allow, else 4.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) copy_pieces(PieceList list) {
  const int piece = blockIdx.y;
  unsigned char* const to = list.to[piece];
  const unsigned char* const from = list.from[piece];
  const int64_t bytes = list.bytes[piece], first = int64_t(blockIdx.x) * kThreads + threadIdx.x, step = int64_t(gridDim.x) * kThreads;
  const bool wide = (reinterpret_cast<unsigned long long>(to) | reinterpret_cast<unsigned long long>(from)) % 16 == 0;
  const int64_t chunks = wide ? bytes / 16 : 0;
  for (int64_t i = first; i < chunks; i += step) reinterpret_cast<Chunk<float>*>(to)[i] = reinterpret_cast<const Chunk<float>*>(from)[i];
  for (int64_t i = chunks * 4 + first; i < bytes / 4; i += step)
    reinterpret_cast<uint32_t*>(to)[i] = reinterpret_cast<const uint32_t*>(from)[i];
}

}  // namespace fastmaml::FASTMAML_CUDA_NS
