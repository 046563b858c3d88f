// The one include of the kernels: CUDA under nvcc and NVRTC, the emulator under g++ (FASTMAML_EMULATED).
// Also a few operations for which CUDA C++ has no function. Kernels and launchers live in namespace fastmaml::FASTMAML_CUDA_NS.
#pragma once

#ifdef FASTMAML_EMULATED
#include "cuda/emulated/cuda_emu.h"
#define FASTMAML_CUDA_NS cuda_emulated
#else
#define FASTMAML_CUDA_NS cuda
#ifdef __CUDACC_RTC__
using int64_t = long long;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
#else
#include <cuda_runtime.h>

#include <cstdint>
#endif
// The dynamic shared memory of the block, under one name: FASTMAML_SHARED; float* tile = reinterpret_cast<float*>(shared_bytes);
#define FASTMAML_SHARED extern __shared__ __align__(16) unsigned char shared_bytes[]
#endif

// A device function that is not inlined. Large functions called in turn by one kernel then keep to their own registers.
// (CUDA's own keyword is a macro that breaks g++'s standard library.)
#ifdef FASTMAML_EMULATED
#define FASTMAML_NOINLINE __attribute__((noinline))
#else
#define FASTMAML_NOINLINE __noinline__
#endif

namespace fastmaml::FASTMAML_CUDA_NS {

// Behind a switch that knows all cases: a kernel that gets here ends with an error, and computes nothing.
#ifdef FASTMAML_EMULATED
[[noreturn]] inline void no_such_case() { __builtin_trap(); }
#else
__device__ __forceinline__ void no_such_case() {
  __trap();
  __builtin_unreachable();
}
#endif

// ---------------------------------------------------------------- copies from global to shared memory
// Start copies, commit() them as a group, and wait<n>() until at most the n latest groups are in flight.
// A barrier must follow before other threads read the copies.
// `from` must be aligned to kBytes (4, 8 or 16). If !valid, `from` is not read and zeros are written.
#ifdef FASTMAML_EMULATED

template <int kBytes>
void async_copy(void* shared, const void* from, bool valid = true, emu::Where where = emu::Where::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emu::async_copy(shared, from, kBytes, valid, where);
}
inline void async_copy16(void* shared, const void* from, bool valid = true, emu::Where where = emu::Where::current()) {
  emu::async_copy(shared, from, 16, valid, where);
}
inline void async_commit() { emu::async_commit(); }
template <int kLeft>
void async_wait() {
  emu::async_wait(kLeft);
}

#else

template <int kBytes>
__device__ __forceinline__ void async_copy(void* shared, const void* from, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#if __CUDA_ARCH__ >= 800
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? kBytes : 0;  // the rest is filled with zeros
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes), "r"(bytes) : "memory");
#else
  const unsigned* words = static_cast<const unsigned*>(from);
  for (int i = 0; i < kBytes / 4; ++i) static_cast<unsigned*>(shared)[i] = valid ? words[i] : 0u;
#endif
}
__device__ __forceinline__ void async_copy16(void* shared, const void* from, bool valid = true) { async_copy<16>(shared, from, valid); }
__device__ __forceinline__ void async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kLeft>
__device__ __forceinline__ void async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

#endif

// ---------------------------------------------------------------- tensor cores (sm_80 and later)
// The whole warp computes d += a b. Lane l with g = l / 4, q = l % 4 holds
//   m16n8k8, tf32:   a = A[g][q], A[g+8][q], A[g][q+4], A[g+8][q+4]      b = B[q][g], B[q+4][g]
//   m16n8k16, bf16:  a = A[g][2q..], A[g+8][2q..], A[g][2q+8..], A[g+8][2q+8..]      b = B[2q..][g], B[2q+8..][g]   (pairs, low half first)
//   both:            d = D[g][2q], D[g][2q+1], D[g+8][2q], D[g+8][2q+1]
#ifdef FASTMAML_EMULATED

inline uint32_t to_tf32(float x) { return emu::to_tf32(x); }
inline uint32_t to_bf16x2(float low, float high) { return emu::to_bf16(low) | emu::to_bf16(high) << 16; }
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], emu::Where where = emu::Where::current()) {
  emu::mma_m16n8k8_tf32(d, a, b, where);
}
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], emu::Where where = emu::Where::current()) {
  emu::mma_m16n8k16_bf16(d, a, b, where);
}

#else

// Rounded to the nearest number with 10 bits of mantissa, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits = 0;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#endif
  return bits;
}
// A pair, rounded to the nearest numbers with 7 bits of mantissa, ties to even.
__device__ __forceinline__ uint32_t to_bf16x2(float low, float high) {
  uint32_t bits = 0;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
#endif
  return bits;
}
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

#endif

}  // namespace fastmaml::FASTMAML_CUDA_NS
