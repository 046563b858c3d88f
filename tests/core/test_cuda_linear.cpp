// linear of the emulated CUDA table against the reference (cuda_op_checks.h).
#include "cuda_op_checks.h"
#include "cuda_product_cases.h"

int main(int count, char** names) {
  using namespace fastmaml;
  return run_groups({{"linear", [] { check_products(is_linear); }}}, count, names, is_linear);
}
