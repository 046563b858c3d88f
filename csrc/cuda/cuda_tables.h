// The op tables of the CUDA backend, on a device and emulated on the host. Needs nothing of CUDA.
#pragma once

#include "ops/ops.h"

namespace fastmaml {

const OpTable& cuda_ops(size_t real_bytes);
const OpTable& cuda_emulated_ops(size_t real_bytes);

// float32 with the products of large layers on tensor cores, whose operands are rounded to TF32 (10 bits of mantissa) or, for three times
// the work, split in two: in TF32 to keep 21 bits, or in BF16, twice as fast, to keep 16.
enum class Precision { float32, tf32, tf32x3, bf16x3 };
const OpTable& cuda_tensor_ops(Precision precision);
const OpTable& cuda_emulated_tensor_ops(Precision precision);

// What the shared library of the CUDA backend exports: extern "C" fastmaml_cuda_table and, for the sources it was built from,
// const char* fastmaml_cuda_stamp().
using CudaTable = const OpTable* (*)(Precision, size_t real_bytes);

}  // namespace fastmaml
