// A pool's sizes as kernels take them.
#pragma once

#include "cuda/kernels/pool2d.cuh"
#include "cuda/operands.h"

namespace fastmaml::FASTMAML_CUDA_NS {

inline PoolSizes pool_sizes(const Pool2d& s, int64_t examples) {
  check_sizes("pool2d", {examples * (s.H + s.KH) * (s.W + s.KW) * (s.C + 3), examples * s.OH * s.OW * (s.C + 3)});
  return {int(examples), int(s.C),        int(s.H),        int(s.W),     int(s.OH),    int(s.OW),          int(s.KH),
          int(s.KW),     int(s.stride_h), int(s.stride_w), int(s.pad_h), int(s.pad_w), s.count_include_pad};
}

inline bool windows_side_by_side(const Pool2d& s) { return s.stride_h == s.KH && s.stride_w == s.KW && s.pad_h == 0 && s.pad_w == 0; }

}  // namespace fastmaml::FASTMAML_CUDA_NS
