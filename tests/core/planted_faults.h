// Kernels with one fault each (planted_faults.cu), and the words by which the emulator must name it.
#pragma once

#include <vector>

namespace fastmaml::planted {

struct Fault {
  const char* name;
  void (*run)(float* out, const float* x);  // both [64]
  const char* checked;                      // of the emulator; "nan": it computes NaN in some order, "": may go unnoticed
  const char* watched;                      // of the race build, in every order
};
const std::vector<Fault>& faults();

}  // namespace fastmaml::planted
