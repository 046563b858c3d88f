// linear and conv2d of the emulated CUDA table against the reference (cuda_op_checks.h).
#include "cuda_op_checks.h"
#include "cuda_product_cases.h"

namespace fastmaml {
namespace {

void products() {
  for (const auto& cases : {large_product_cases(), small_product_cases(), rectified_cases()})
    for (const ProductCase& c : cases) check_ops(ops_of(c), c.layer, c.N, c.tasks);
}

}  // namespace
}  // namespace fastmaml

int main(int count, char** names) {
  using namespace fastmaml;
  return run_groups({{"products", products}}, count, names, Covers::products);
}
