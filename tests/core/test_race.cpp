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

}  // namespace
}  // namespace fastmaml

int main() {
  using namespace fastmaml;
  for (int i = 0; i < kOrders; ++i) {
    set_order(i);
    clean_kernels(kOrderNames[i]);
  }
  planted_faults();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
