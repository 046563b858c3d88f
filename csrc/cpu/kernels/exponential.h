// exp, exp - 1 and log of whole vectors or of one number: Taylor series after the usual reductions.
// Errors are one or two ulp. NaN stays NaN.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <bit>
#include <limits>

#include "cpu/vec.h"

FASTMAML_CPU_BEGIN

template <class V>
struct Scalar {
  using type = std::remove_cvref_t<decltype(V{}[0])>;
};
template <>
struct Scalar<float> {
  using type = float;
};
template <>
struct Scalar<double> {
  using type = double;
};

// Constants of IEEE numbers.
template <class T>
struct Ieee {
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  static constexpr int kBits = std::numeric_limits<T>::digits - 1, kBias = std::numeric_limits<T>::max_exponent - 1;
  static constexpr T kRound = T(3) * T(Int(1) << (kBits - 1));  // adding and subtracting this rounds to the nearest integer
  static constexpr int kExpTerms = sizeof(T) == 4 ? 7 : 13, kLogTerms = sizeof(T) == 4 ? 5 : 11;
  static constexpr T kLn2High = sizeof(T) == 4 ? T(0.693359375) : T(0x1.62e42fee00000p-1);  // so short that n times this is exact
  static constexpr T kLn2Low = T(0.693147180559945309417232121458L - static_cast<long double>(kLn2High));
  static constexpr T kLeast = sizeof(T) == 4 ? T(-87.0) : T(-708.0);  // below this the exponential is 0
};

template <class V>
using BitsOf = std::conditional_t<std::is_arithmetic_v<V>, typename Ieee<typename Scalar<V>::type>::Int, decltype(V{} < V{})>;

template <class V>
inline __attribute__((always_inline)) BitsOf<V> bits_of(V x) {
  return std::bit_cast<BitsOf<V>>(x);
}

template <class V>
struct Reduced {
  V power;  // 2^n
  V rest;   // e^r - 1;  e^x = power (1 + rest)
};

template <class T>
constexpr T one_over_factorial(int k) {
  long double factorial = 1;
  for (; k > 1; --k) factorial *= k;
  return T(1 / factorial);
}

template <class V>
inline __attribute__((always_inline)) Reduced<V> reduce(V x) {
  using T = typename Scalar<V>::type;
  using I = Ieee<T>;
  // n is read from the low bits of the rounded sum, because a conversion could meet a NaN.
  const V rounded = x * T(1.44269504088896340736L) + I::kRound, n = rounded - I::kRound;
  const V r = (x - n * I::kLn2High) - n * I::kLn2Low;
  V sum = V{} + one_over_factorial<T>(I::kExpTerms);
  for (int k = I::kExpTerms - 1; k >= 2; --k) sum = sum * r + one_over_factorial<T>(k);
  const V rest = (r * r) * sum + r;
  const BitsOf<V> power = (bits_of(rounded) - std::bit_cast<typename I::Int>(I::kRound) + I::kBias) << I::kBits;
  return {std::bit_cast<V>(power), rest};
}

// Below kLeast the result is set separately, because n would not fit an exponent.
template <class V>
inline __attribute__((always_inline)) V at_least(V x) {
  const V least = V{} + Ieee<typename Scalar<V>::type>::kLeast;
  return x < least ? least : x;
}

// e^x for x <= 0
template <class V>
inline __attribute__((always_inline)) V exp_negative(V x) {
  using T = typename Scalar<V>::type;
  const Reduced<V> e = reduce(at_least(x));
  const V value = e.power * e.rest + e.power;
  return x < V{} + Ieee<T>::kLeast ? V{} : value;
}

// e^x - 1 for x <= 0
template <class V>
inline __attribute__((always_inline)) V expm1_negative(V x) {
  using T = typename Scalar<V>::type;
  const Reduced<V> e = reduce(at_least(x));  // a tiny power vanishes in power - 1
  return e.power * e.rest + (e.power - T(1));
}

// 1 / x for x from 1 to 2, within an ulp. A wide division takes as long as ten other instructions.
// One step of Newton's method squares the estimate's error of 2^-14.
template <class V>
inline __attribute__((always_inline)) V reciprocal(V x) {
  using T = typename Scalar<V>::type;
#ifdef __AVX512F__
  if constexpr (std::is_same_v<T, float> && sizeof(V) == 64) {
    const V estimate = std::bit_cast<V>(_mm512_maskz_rcp14_ps(0xffff, std::bit_cast<__m512>(x)));
    return estimate + estimate * (T(1) - x * estimate);
  }
#endif
  return T(1) / x;
}

// log x for positive, normal x
template <class V>
inline __attribute__((always_inline)) V log_positive(V x) {
  using T = typename Scalar<V>::type;
  using I = Ieee<T>;
  using Int = typename I::Int;
  constexpr Int kHalf = std::bit_cast<Int>(T(0.70710678118654752440));
  const BitsOf<V> n = (bits_of(x) - kHalf) >> I::kBits;  // x = 2^n m,  m from sqrt(1/2) to sqrt(2)
  const V m = std::bit_cast<V>(bits_of(x) - (n << I::kBits));
  const V f = (m - T(1)) / (m + T(1)), f2 = f * f;  // log m = 2 (f + f^3/3 + f^5/5 + ...)
  V sum = V{} + T(1) / T(2 * I::kLogTerms + 1);
  for (int k = I::kLogTerms - 1; k > 0; --k) sum = sum * f2 + T(1) / T(2 * k + 1);
  V power;
  if constexpr (std::is_arithmetic_v<V>)
    power = V(n);
  else
    power = __builtin_convertvector(n, V);
  const V log_m = T(2) * f + (T(2) * f) * (f2 * sum);
  const V value = power * I::kLn2High + (power * I::kLn2Low + log_m);
  return x == x ? value : x;
}

FASTMAML_CPU_END
