// linear and conv2d on emulated tensor cores against the reference.
#include "cuda_op_checks.h"
#include "cuda_product_cases.h"

namespace fastmaml {
namespace {

// On tensor cores: operands that keep 10 bits of their mantissa, or 21, or 16. Rounded to TF32, each of two factors is off by 2^-11 of
// itself at most. In BF16 high is off by 2^-9, high + low by 2^-18, and low low, which is left out, is 2^-18 of the product at most:
// together 3 2^-18.
void tensor_products() {
  struct Mode {
    const char* name;
    Precision precision;
    double allowed;  // of the largest number of the result, whose rounding errors do not all point the same way
  };
  for (const auto& [mode, precision, allowed] : {Mode{"tf32", Precision::tf32, 0x1p-9},
                                                 {"tf32x3", Precision::tf32x3, double(kTolerance<float>)},
                                                 {"bf16x3", Precision::bf16x3, 0x1p-16}}) {
    double largest = 0;
    std::vector<ProductCase> cases = large_product_cases();
    const std::vector<ProductCase> with_rectifiers = large_rectified_cases();
    cases.insert(cases.end(), with_rectifiers.begin(), with_rectifiers.end());
    for (const ProductCase& sizes : cases)
      for (Op op : ops_of(sizes)) {
        const Case c{op, sizes.layer, sizes.N, sizes.tasks};
        const std::string name = name_of(c, 4, mode);
        Operands given = draw_all<float>(c);
        const std::set<size_t> absent = absences(c)[0];
        for (size_t k : absent) given.values[k].clear();
        const OpTable& table = cuda_emulated_tensor_ops(precision);
        const auto on_tensor_cores = [&](const How& how) { return run<float>(table, c, given, how, emu::allocate, emu::free); };
        const Operands got = on_tensor_cores({});
        const Worst w = worst(c, got, definition(c, given, got));
        report(w.error <= allowed, name, w.where);
        largest = std::max(largest, w.error);
        if (emu::watched() && precision != Precision::tf32) continue;  // the same loads, with the same barriers
        How unaligned;
        unaligned.aligned = false;
        emu::set_order(emu::Order::random, 5);
        report(same_bits(got, 0, on_tensor_cores(unaligned), c.tasks, op_outputs(op)), name + ": the same bits where nothing is aligned");
        emu::set_order(emu::Order::ascending);
      }
    std::printf("%-7s largest error %.1e, allowed %.1e\n", mode, largest, allowed);
  }
}

}  // namespace
}  // namespace fastmaml

int main(int count, char** names) {
  using namespace fastmaml;
  return run_groups({{"tensor", tensor_products}}, count, names, nullptr);
}
