// Does the emulated device compute what CUDA would, in every order of threads, and say what is wrong with a kernel?
#include <chrono>
#include <functional>

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
  }
  planted_faults();
  costs();
  std::printf("%d passed, %d failed, %ld launches of %zu kernels\n", passed, failed, long(emu::launches()), emu::kernels().size());
  return failed != 0;
}
