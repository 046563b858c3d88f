// conv2d of the emulated CUDA table against the reference (cuda_op_checks.h).
#include "cuda_op_checks.h"
#include "cuda_product_cases.h"

int main(int count, char** names) {
  using namespace fastmaml;
  return run_groups({{"conv2d", [] { check_products(is_conv2d); }}}, count, names, is_conv2d);
}
