// Does the emulated device compute what CUDA would, in every order of threads, and say what is wrong with a kernel?
#include <algorithm>
#include <chrono>
#include <functional>
#include <thread>
#include <vector>

#include "emulator_cases.h"

namespace fastmaml {
namespace {

void planted_faults() {
  for (const planted::Fault& fault : planted::faults()) {
    const std::string want = fault.checked;
    bool seen = want.empty();
    for (int i = 0; i < kOrders; ++i) {
      set_order(i);
      const std::string said = run_fault(fault);
      if (want == "nan")
        seen = seen || said == want;
      else
        expect(said.find(want) != std::string::npos, std::string(fault.name) + " " + kOrderNames[i], said);
    }
    if (want == "nan") expect(seen, std::string(fault.name) + " shows in some order");
  }
}

// The names are nvcc's, and what ran is among what was compiled.
void kernels_by_name() {
  const std::vector<std::string> compiled = emu::compiled_kernels();
  for (const auto& [name, kernel] : emu::kernels())
    expect(std::binary_search(compiled.begin(), compiled.end(), name), "compiled: " + name, std::to_string(kernel.launches) + " launches");
  const emu::Kernel sum = emu::kernels()["_ZN8fastmaml4cuda9sum_blockIfEEvPT_PKS2_i"];
  expect(sum.launches == kOrders && sum.blocks == kOrders && sum.threads == 128 * kOrders, "sum_block<float> was counted");
}

// One launch at a time, from any thread of the host, each with shared memory of its own.
void host_threads() {
  std::vector<std::thread> threads;
  std::vector<int> wrong(4);
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([t, &wrong] {
      const Buffer<double> x(1000, unsigned(t)), total(1);
      double want = 0;
      for (size_t i = 0; i < x.size; ++i) want += x.data[i];
      for (int i = 0; i < 50; ++i) {
        example::sum(total.data, x.data, 1000);
        wrong[size_t(t)] += *total.data != want;  // multiples of 1 / 64: no rounding
      }
    });
  for (std::thread& thread : threads) thread.join();
  expect(wrong == std::vector<int>(4), "four threads launch at a time");
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
  for (int i = 0; i < kOrders; ++i) {
    set_order(i);
    clean_kernels(kOrderNames[i]);
    language(kOrderNames[i]);
  }
  kernels_by_name();
  host_threads();
  planted_faults();
  costs();
  std::printf("%d passed, %d failed, %ld launches of %zu kernels\n", passed, failed, long(emu::launches()), emu::kernels().size());
  return failed != 0;
}
