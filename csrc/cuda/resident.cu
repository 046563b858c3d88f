// Launches the resident walk: one launch for the whole Schedule, with a block for every task.
#include <stdexcept>
#include <string>

#include "cuda/cuda_ops.h"
#include "cuda/kernels/resident.cuh"
#include "cuda/launch.h"
#include "cuda/resident_code.h"

namespace fastmaml::FASTMAML_CUDA_NS {
namespace {

// 227 KB on sm_90, which is also the value without a device; 163 KB on sm_80, 99 KB on sm_86, sm_89 and sm_120.
size_t fast_bytes() {
  int bytes = 227 * 1024;
#ifndef FASTMAML_EMULATED
  int device = 0, asked = 0;
  if (cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&asked, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess)
    bytes = asked;
#endif
  return size_t(bytes);
}

template <class T>
void launch_resident(const ResidentCode& code, const void* steps, const View* args, void* arena, int64_t tasks, uintptr_t stream) {
  ResidentArgs pointers;
  for (int a = 0; a < kArgs; ++a) {
    if (code.element_bytes[size_t(a)] && !args[a]) throw std::invalid_argument(std::string("argument ") + arg_name(Arg(a)) + " is missing");
    pointers.data[a] = static_cast<unsigned char*>(args[a].data);
    pointers.task_stride[a] = args[a].task_stride * code.element_bytes[size_t(a)];
  }
  // If no Step uses the scratch, no thread reads its address.
  const int64_t scratch_at = int64_t(code.shared_bytes) - int64_t(resident_scratch_bytes<T>());
  launch(resident<T>, dim3(unsigned(tasks)), dim3(code.threads), code.shared_bytes, stream, static_cast<const ResidentStep*>(steps),
         code.count, pointers, static_cast<unsigned char*>(arena), int64_t(code.arena_bytes), int(scratch_at));
}

template <class T>
constexpr ResidentWalk kWalk{fast_bytes, resident_code<T>, launch_resident<T>};

}  // namespace

template <class T>
void add_resident(OpTable& table) {
  table.resident = &kWalk<T>;
}
template void add_resident<float>(OpTable&);
template void add_resident<double>(OpTable&);

}  // namespace fastmaml::FASTMAML_CUDA_NS
