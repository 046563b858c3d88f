// What test_emulator (the ordinary build) and test_race (the race build) both do: clean kernels and planted faults, in every order.
#pragma once

#include <cmath>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "cuda/emulated/emu.h"
#include "emulator_kernels.h"
#include "planted_faults.h"

namespace fastmaml {

inline int passed = 0, failed = 0;

inline void expect(bool ok, const std::string& what, const std::string& detail = "") {
  ok ? ++passed : ++failed;
  std::printf("%s  %s  %s\n", ok ? "ok  " : "FAIL", what.c_str(), detail.c_str());
}

// A device buffer.
template <class T>
struct Buffer {
  T* data;
  size_t size;
  explicit Buffer(size_t n) : data(static_cast<T*>(emu::allocate(n * sizeof(T)))), size(n) {}
  Buffer(size_t n, unsigned seed) : Buffer(n) {
    std::mt19937 random(seed);
    for (size_t i = 0; i < n; ++i) data[i] = T(int(random() % 201) - 100) / (std::is_integral_v<T> ? T(1) : T(64));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { emu::free(data); }
};

template <class T>
void expect_product(const std::string& what, const Buffer<T>& out, const Buffer<T>& a, const Buffer<T>& b, int m, int n, int k,
                    double tolerance) {
  double worst = 0;
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      double sum = 0;
      for (int l = 0; l < k; ++l) sum += double(a.data[i * k + l]) * double(b.data[l * n + j]);
      const double error = std::fabs(double(out.data[i * n + j]) - sum) / (1 + std::fabs(sum));
      worst = std::isnan(error) ? INFINITY : std::fmax(worst, error);
    }
  expect(worst <= tolerance, what + " " + std::to_string(m) + " x " + std::to_string(n) + " x " + std::to_string(k), std::to_string(worst));
}

inline void clean_kernels(const std::string& order) {
  for (const auto& [m, n, k] : {std::tuple{1, 4, 4}, {5, 12, 8}, {33, 36, 20}, {64, 32, 16}}) {
    const Buffer<float> a(size_t(m * k), 1), b(size_t(k * n), 2), out(size_t(m * n)), blocked(size_t(m * n));
    example::gemm_tiled(out.data, a.data, b.data, m, n, k);
    expect_product(order + " tiled", out, a, b, m, n, k, 1e-5);  // sums of k float products
    example::gemm_blocked(blocked.data, a.data, b.data, m, n, k);
    expect_product(order + " blocked", blocked, a, b, m, n, k, 1e-5);
  }
  const Buffer<double> a(9 * 7, 1), b(7 * 11, 2), out(9 * 11);
  example::gemm_tiled(out.data, a.data, b.data, 9, 11, 7);
  expect_product(order + " tiled double", out, a, b, 9, 11, 7, 1e-13);

  for (const bool bf16 : {false, true}) {  // operands of 8 bits: exact in both types
    const Buffer<float> left(16 * 48, 3), right(48 * 8, 4), product(16 * 8);
    example::gemm_tensor(bf16, product.data, left.data, right.data, 48);
    expect_product(order + (bf16 ? " bf16" : " tf32"), product, left, right, 16, 8, 48, 1e-5);
  }

  const Buffer<float> x(1000, 5), total(1);
  example::sum(total.data, x.data, 1000);
  double want = 0;
  for (size_t i = 0; i < x.size; ++i) want += double(x.data[i]);
  expect(std::fabs(*total.data - want) < 1e-3, order + " sum by shuffles", std::to_string(*total.data - want));

  const Buffer<int> numbers(128, 6), counts(3);
  int odd = 0;
  for (size_t i = 0; i < 128; ++i) odd += numbers.data[i] % 2 != 0;
  counts.data[0] = counts.data[2] = 0;
  example::count(counts.data, numbers.data);
  expect(counts.data[0] == odd && counts.data[1] == odd && counts.data[2] == odd, order + " votes and atomics", std::to_string(odd));
}

// Every function of the device language on the threads of one block, against what CUDA's manual says.
inline void language(const std::string& order) {
  const Buffer<int> out(13 * 64);
  example::language(out.data);
  const auto row = [&](int r, const std::string& what, auto want) {
    int wrong = 0;
    for (int t = 0; t < 64; ++t) wrong += out.data[r * 64 + t] != int(want(t));
    expect(wrong == 0, order + " " + what, std::to_string(wrong) + " wrong");
  };
  const auto value = [](int t) { return 3 * t + 1; };
  row(0, "shfl", [&](int t) { return value(t / 8 * 8 + 5); });
  row(1, "shfl_up", [&](int t) { return value(t % 32 < 3 ? t : t - 3); });
  row(2, "shfl_down", [&](int t) { return value(t % 16 + 3 < 16 ? t + 3 : t); });
  row(3, "any", [](int t) { return t < 32; });
  row(4, "all", [](int t) { return t < 32; });
  row(5, "syncthreads_or", [](int) { return 1; });
  row(6, "syncthreads_and", [](int) { return 0; });
  row(7, "reduce_add", [](int t) { return t < 32 ? -496 : -1520; });
  row(8, "reduce_max", [](int t) { return t < 32 ? 31 : 63; });
  row(9, "reduce_xor", [](int) { return 0; });
  row(10, "ballot of halves", [](int t) { return t % 32 < 16 ? 0x0000aaaau : 0xaaaa0000u; });
  row(11, "bits", [](int t) {
    int ones = 0, leading = 32, first = 0;
    for (int b = 0; b < 6; ++b)
      if (t >> b & 1) {
        ++ones;
        leading = 31 - b;
        if (!first) first = b + 1;
      }
    return ones + 100 * leading + 10000 * first;
  });
  const int* atomic = out.data + 12 * 64;
  expect(atomic[0] == 63 && atomic[1] == -63 && atomic[2] == 7 && atomic[3] == 6, order + " atomics");
}

inline void set_order(int i) {
  emu::set_order(i == 0 ? emu::Order::ascending : i == 1 ? emu::Order::descending : emu::Order::random, unsigned(i));
}
inline constexpr int kOrders = 5;
inline const char* const kOrderNames[kOrders] = {"ascending", "descending", "random 2", "random 3", "random 4"};

// What the fault made launch() say; "nan" where it said nothing and computed one, "" where it went unnoticed.
inline std::string run_fault(const planted::Fault& fault) {
  const Buffer<float> out(64), x(64, 9);
  for (size_t i = 0; i < out.size; ++i) out.data[i] = 0;
  try {
    fault.run(out.data, x.data);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  for (size_t i = 0; i < out.size; ++i)
    if (std::isnan(out.data[i])) return "nan";
  return "";
}

}  // namespace fastmaml
