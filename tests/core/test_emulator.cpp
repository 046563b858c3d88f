// Does the emulated device compute what CUDA would, in every order of threads?
#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/emulated/emu.h"
#include "emulator_kernels.h"

namespace fastmaml {
namespace {

int passed = 0, failed = 0;

void expect(bool ok, const std::string& what, const std::string& detail = "") {
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

void clean_kernels(const std::string& order) {
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

double nanoseconds(const std::function<void()>& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count();
}

void costs() {
  const Buffer<float> out(1024);
  for (const int threads : {32, 256, 1024}) {
    const int n = 200000 / threads;
    example::barriers(out.data, threads, 1);
    const double barrier = nanoseconds([&] { example::barriers(out.data, threads, n); }) / n / threads;
    const double shuffle = nanoseconds([&] { example::shuffles(out.data, threads, n); }) / n / threads;
    const double launch = nanoseconds([&] {
                            for (int i = 0; i < 100; ++i) example::barriers(out.data, threads, 0);
                          }) /
                          100;
    std::printf("%4d threads: %.0f ns a barrier, %.0f ns a shuffle (a thread), %.1f us a launch\n", threads, barrier, shuffle,
                launch / 1000);
  }
}

}  // namespace
}  // namespace fastmaml

int main() {
  using namespace fastmaml;
  emu::set_order(emu::Order::ascending);
  clean_kernels("ascending");
  emu::set_order(emu::Order::descending);
  clean_kernels("descending");
  for (unsigned seed = 1; seed <= 3; ++seed) {
    emu::set_order(emu::Order::random, seed);
    clean_kernels("random " + std::to_string(seed));
  }
  costs();
  std::printf("%d passed, %d failed, %ld launches of %zu kernels\n", passed, failed, long(emu::launches()), emu::kernels().size());
  return failed != 0;
}
