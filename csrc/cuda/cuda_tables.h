// The op tables of the CUDA backend, on a device and emulated on the host. Needs no CUDA headers.
#pragma once

#include "ops/ops.h"

namespace fastmaml {

const OpTable& cuda_ops(size_t real_bytes);
const OpTable& cuda_emulated_ops(size_t real_bytes);

// float32, with large layers' products on tensor cores if another precision is chosen. tf32 rounds operands to 10 bits of mantissa.
// The others split operands in two for three times the work: tf32x3 keeps 21 bits; bf16x3 keeps 16 and is twice as fast.
enum class Precision { float32, tf32, tf32x3, bf16x3 };
const OpTable& cuda_tensor_ops(Precision precision);
const OpTable& cuda_emulated_tensor_ops(Precision precision);

// The CUDA library exports two functions. extern "C" fastmaml_cuda_table has this type.
// const char* fastmaml_cuda_stamp() names the sources of the build.
using CudaTable = const OpTable* (*)(Precision, size_t real_bytes);

}  // namespace fastmaml
