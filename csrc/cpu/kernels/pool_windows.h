// The windows of a pool on [N, H, W, C], and max-pool taps as vectors.
#pragma once

#include "cpu/vec_math.h"
#include "program/layers.h"

FASTMAML_CPU_BEGIN

// Calls f(tap, input pixel) for the taps inside the image, of the window that starts at row h0, column w0.
template <class F>
inline __attribute__((always_inline)) void for_taps(const Pool2d& s, int64_t n, int64_t h0, int64_t w0, F f) {
  for (int64_t kh = 0; kh < s.KH; ++kh)
    for (int64_t kw = 0; kw < s.KW; ++kw) {
      const int64_t h = h0 + kh, w = w0 + kw;
      if (h >= 0 && h < s.H && w >= 0 && w < s.W) f(int32_t(kh * s.KW + kw), (n * s.H + h) * s.W + w);
    }
}

// Do the windows cover the image without overlap or padding? Then every covered pixel is written exactly once.
inline bool tiles(const Pool2d& s) { return s.stride_h == s.KH && s.stride_w == s.KW && s.pad_h == 0 && s.pad_w == 0; }

// Integers as wide as V's numbers, so that one mask serves both. For a single number: any integer.
template <class V>
struct IntOf {
  using type = int32_t;
};
template <>
struct IntOf<Vec<float>> {
  using type = Vec<int32_t>;
};
template <>
struct IntOf<Vec<double>> {
  using type = Vec<int64_t>;
};

// Converts between bytes and such integers. Compilers do this lane by lane on some machines, so the instructions are named.
template <class I>
inline __attribute__((always_inline)) I load_bytes(const int8_t* p) {
  if constexpr (std::is_arithmetic_v<I>) {
    return I(*p);
  } else {
    [[maybe_unused]] constexpr bool kFour = sizeof(I{}[0]) == 4;
#ifdef __AVX512F__
    if constexpr (sizeof(I) == 64) {  // a mask of all ones, for the reason in vec_math.h
      if constexpr (kFour)
        return I(_mm512_maskz_cvtepi8_epi32(__mmask16(-1), _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
      else
        return I(_mm512_maskz_cvtepi8_epi64(__mmask8(-1), _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    }
#endif
#ifdef __AVX2__
    if constexpr (sizeof(I) == 32 && kFour) return I(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#endif
    constexpr int64_t kCount = sizeof(I) / sizeof(I{}[0]);
    I v{};
    for (int64_t i = 0; i < kCount; ++i) v[i] = p[i];
    return v;
  }
}
template <class I>
inline __attribute__((always_inline)) void store_bytes(int8_t* p, I v) {
  if constexpr (std::is_arithmetic_v<I>) {
    *p = int8_t(v);
  } else {
    [[maybe_unused]] constexpr bool kFour = sizeof(I{}[0]) == 4;
#ifdef __AVX512F__
    if constexpr (sizeof(I) == 64) {
      if constexpr (kFour)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_maskz_cvtepi32_epi8(__mmask16(-1), __m512i(v)));
      else
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm512_maskz_cvtepi64_epi8(__mmask8(-1), __m512i(v)));
      return;
    }
#endif
#ifdef __AVX2__
    if constexpr (sizeof(I) == 32 && kFour) {
      const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(__m256i(v)), _mm256_extracti128_si256(__m256i(v), 1));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
      return;
    }
#endif
    constexpr int64_t kCount = sizeof(I) / sizeof(I{}[0]);
    for (int64_t i = 0; i < kCount; ++i) p[i] = int8_t(v[i]);
  }
}

FASTMAML_CPU_END
