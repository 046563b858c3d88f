// launch(kernel, grid, block, shared_bytes, stream, arguments...) starts a kernel: by <<<>>> under nvcc, otherwise by the emulator.
// A kernel that cannot start throws std::runtime_error with one sentence.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/device.h"

namespace fastmaml::FASTMAML_CUDA_NS {

#ifdef FASTMAML_EMULATED

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, uintptr_t /* stream */, Args&&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "a kernel is launched with all its arguments");
  using Call = emu::Call<Params...>;
  const Call call{kernel, {static_cast<Params>(args)...}};
  emu::launch_or_keep({reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, &Call::run, &call},
                      [&] { return std::make_shared<const Call>(call); });
}

#else

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  if (status == cudaErrorInsufficientDriver) throw std::runtime_error("no CUDA driver on this machine");
  if (status == cudaErrorNoDevice) throw std::runtime_error("no CUDA device on this machine");
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline void check_launch(cudaError_t status, const void* kernel) {
  if (status == cudaSuccess) return;
  const char* name = nullptr;
  if (cudaFuncGetName(&name, kernel) != cudaSuccess || !name) name = "a kernel";
  check(status, name);
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, uintptr_t stream, Args&&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "a kernel is launched with all its arguments");
  const void* symbol = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 * 1024)  // above this, a device must be asked for it
    check_launch(cudaFuncSetAttribute(symbol, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)), symbol);
  // clang-format off
  kernel<<<grid, block, shared_bytes, reinterpret_cast<cudaStream_t>(stream)>>>(static_cast<Params>(args)...);
  // clang-format on
  check_launch(cudaGetLastError(), symbol);
}

#endif

}  // namespace fastmaml::FASTMAML_CUDA_NS
