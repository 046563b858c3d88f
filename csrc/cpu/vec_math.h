// Math on vec.h's vectors that needs intrinsics. A separate file, because <immintrin.h> costs GCC a second in each including file.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "cpu/vec.h"

FASTMAML_CPU_BEGIN

// The square root of every lane. Compilers keep std::sqrt scalar because of errno, so the instruction is named.
template <class V>
inline __attribute__((always_inline)) V square_root(V x) {
  if constexpr (std::is_floating_point_v<V>) {
    return std::sqrt(x);
  } else {
    constexpr bool kFloats = sizeof(x[0]) == sizeof(float);
#ifdef __AVX512F__
    if constexpr (sizeof(V) == 64) {  // masked with all ones: GCC 12 warns about an undefined source in the plain intrinsic
      return kFloats ? V(_mm512_maskz_sqrt_ps(__mmask16(-1), __m512(x))) : V(_mm512_maskz_sqrt_pd(__mmask8(-1), __m512d(x)));
    }
#endif
#ifdef __AVX__
    if constexpr (sizeof(V) == 32) return kFloats ? V(_mm256_sqrt_ps(__m256(x))) : V(_mm256_sqrt_pd(__m256d(x)));
    if constexpr (sizeof(V) == 64) {
      __m256 half[2];
      std::memcpy(half, &x, sizeof(V));
      for (__m256& h : half) h = kFloats ? _mm256_sqrt_ps(h) : __m256(_mm256_sqrt_pd(__m256d(h)));
      std::memcpy(&x, half, sizeof(V));
      return x;
    }
#endif
#ifdef __SSE2__
    if constexpr (sizeof(V) == 16) return kFloats ? V(_mm_sqrt_ps(__m128(x))) : V(_mm_sqrt_pd(__m128d(x)));
#endif
    for (size_t i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = std::sqrt(x[i]);
    return x;
  }
}

// a b + c, rounded once if the machine has FMA. For results on whose bits two functions must agree:
// the compiler may contract a * b + c in one place and not in another.
template <class V>
inline __attribute__((always_inline)) V multiply_add(V a, V b, V c) {
#if defined(__FMA__)
  if constexpr (std::is_floating_point_v<V>) {
    return std::fma(a, b, c);
  } else {
    constexpr bool kFloats = sizeof(a[0]) == sizeof(float);
#ifdef __AVX512F__
    if constexpr (sizeof(V) == 64)
      return kFloats ? V(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c))) : V(_mm512_fmadd_pd(__m512d(a), __m512d(b), __m512d(c)));
#endif
    if constexpr (sizeof(V) == 32)
      return kFloats ? V(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c))) : V(_mm256_fmadd_pd(__m256d(a), __m256d(b), __m256d(c)));
    if constexpr (sizeof(V) == 64) {  // 16 lanes where registers hold 8
      V sum;
      for (int half = 0; half < 2; ++half) {
        __m256 x, y, z;
        const auto at = [half](auto& whole) { return reinterpret_cast<char*>(&whole) + half * sizeof(x); };
        std::memcpy(&x, at(a), sizeof(x));
        std::memcpy(&y, at(b), sizeof(x));
        std::memcpy(&z, at(c), sizeof(x));
        z = kFloats ? _mm256_fmadd_ps(x, y, z) : __m256(_mm256_fmadd_pd(__m256d(x), __m256d(y), __m256d(z)));
        std::memcpy(at(sum), &z, sizeof(x));
      }
      return sum;
    }
    for (size_t i = 0; i < sizeof(V) / sizeof(a[0]); ++i) c[i] = std::fma(a[i], b[i], c[i]);
    return c;
  }
#elif defined(__FP_FAST_FMA) && defined(__FP_FAST_FMAF)
  if constexpr (std::is_floating_point_v<V>) {
    return std::fma(a, b, c);
  } else {
    for (size_t i = 0; i < sizeof(V) / sizeof(a[0]); ++i) c[i] = std::fma(a[i], b[i], c[i]);
    return c;
  }
#else
  return a * b + c;
#endif
}

FASTMAML_CPU_END
