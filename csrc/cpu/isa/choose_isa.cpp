#include "cpu/isa/choose_isa.h"

#include <atomic>
#include <stdexcept>

#include "ops/ops.h"

#ifndef FASTMAML_ISAS  // builds with sanitizers define fewer
#if defined(__x86_64__)
#define FASTMAML_ISAS(X) X(portable, true) X(avx2, avx2()) X(avx2x16, avx2()) X(avx512, avx512())
#else
#define FASTMAML_ISAS(X) X(portable, true)
#endif
#endif

namespace fastmaml {
namespace cpu {
#define X(name, runs)                      \
  namespace name {                         \
  const OpTable& table(size_t real_bytes); \
  }
FASTMAML_ISAS(X)
#undef X
}  // namespace cpu

namespace {

#if defined(__x86_64__)
bool avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
[[maybe_unused]] bool avx512() {
  return avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq");
}
#endif

struct Isa {
  const char* name;
  bool (*runs)();
  const OpTable& (*table)(size_t);
};

const Isa kIsas[] = {
#define X(name, test) {#name, []() -> bool { return test; }, cpu::name::table},
    FASTMAML_ISAS(X)
#undef X
};

// avx2x16 runs the 16-lane code on AVX2 machines, for tests. It is never the default.
const Isa* default_isa() {
  const Isa* best = &kIsas[0];
  for (const Isa& isa : kIsas)
    if (isa.runs() && std::string(isa.name) != "avx2x16") best = &isa;
  return best;
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> isa{default_isa()};
  return isa;
}

}  // namespace

std::vector<std::string> available_cpu_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas)
    if (isa.runs()) names.push_back(isa.name);
  return names;
}

std::string cpu_isa() { return current().load()->name; }

void set_cpu_isa(const std::string& name) {
  if (name.empty()) {
    current() = default_isa();
    return;
  }
  std::string known;
  for (const Isa& isa : kIsas) {
    if (name == isa.name) {
      if (!isa.runs()) throw std::invalid_argument("this machine has no " + name + " instructions");
      current() = &isa;
      return;
    }
    known += std::string(known.empty() ? "" : ", ") + isa.name;
  }
  throw std::invalid_argument("unknown instruction set \"" + name + "\"; choose one of " + known);
}

const OpTable& cpu_ops(size_t real_bytes) { return current().load()->table(real_bytes); }

}  // namespace fastmaml
