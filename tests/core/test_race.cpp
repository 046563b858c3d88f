// Does the race build find every planted fault in every order of threads, and nothing in clean kernels?
#include "emulator_cases.h"

namespace fastmaml {
namespace {

void planted_faults() {
  for (const planted::Fault& fault : planted::faults())
    for (int i = 0; i < kOrders; ++i) {
      set_order(i);
      const std::string said = run_fault(fault);
      expect(said.find(fault.watched) != std::string::npos, std::string(fault.name) + " " + kOrderNames[i], said);
    }
}

// Global memory as the threads ask for it: every block of the product fetches its rows of a and columns of b once.
void requested_bytes() {
  const int m = 64, n = 32, k = 16;
  const Buffer<float> a(size_t(m * k), 1), b(size_t(k * n), 2), out(size_t(m * n));
  emu::reset_counts();
  example::gemm_blocked(out.data, a.data, b.data, m, n, k);
  const emu::Kernel gemm = emu::kernels().begin()->second;
  const int64_t blocks = 2, read = blocks * (32 * k + k * 32) * 4, written = int64_t(m) * n * 4;
  expect(gemm.launches == 1 && gemm.bytes_read == read && gemm.bytes_written == written, "bytes of a product",
         std::to_string(gemm.bytes_read) + " read, " + std::to_string(gemm.bytes_written) + " written");
  const Buffer<double> x(1000, 5), total(1);
  emu::reset_counts();
  example::sum(total.data, x.data, 1000);
  const emu::Kernel sum = emu::kernels().begin()->second;
  expect(sum.bytes_read == 8000 && sum.bytes_written == 8, "bytes of a sum");
}

}  // namespace
}  // namespace fastmaml

int main() {
  using namespace fastmaml;
  for (int i = 0; i < kOrders; ++i) {
    set_order(i);
    clean_kernels(kOrderNames[i]);
  }
  requested_bytes();
  planted_faults();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
