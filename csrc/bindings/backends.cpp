#include "bindings/backends.h"

#include <dlfcn.h>

#include <atomic>
#include <stdexcept>

#include "cuda/cuda_tables.h"
#include "plan/named.h"

namespace fastmaml {
namespace {

#define FASTMAML_TEXT_OF(x) #x
#define FASTMAML_TEXT(x) FASTMAML_TEXT_OF(x)
constexpr const char* kStamp = FASTMAML_TEXT(FASTMAML_STAMP);

std::atomic<CudaTable> cuda_table{nullptr};  // from the library, which is never unloaded

CudaTable loaded_cuda_table() {
  if (CudaTable table = cuda_table) return table;
  throw std::invalid_argument("backend \"cuda\" is not loaded: build its library by `make cuda`; with nvcc the first use builds it");
}

Precision precision_named(const std::string& name) {
  return named<Precision>(
      "precision", name,
      {{"float32", Precision::float32}, {"tf32", Precision::tf32}, {"tf32x3", Precision::tf32x3}, {"bf16x3", Precision::bf16x3}});
}

const OpTable* emulated_table([[maybe_unused]] Precision precision, [[maybe_unused]] size_t real_bytes) {
#ifdef __linux__  // the emulator reads ELF symbols
  return precision == Precision::float32 ? &cuda_emulated_ops(real_bytes) : &cuda_emulated_tensor_ops(precision);
#else
  throw std::invalid_argument("backend \"cuda_emulated\" needs Linux");
#endif
}

const OpTable* cpu_table(Precision, size_t real_bytes) { return &cpu_ops(real_bytes); }
const OpTable* reference_table(Precision, size_t) { return &reference_ops(); }
const OpTable* cuda_library_table(Precision precision, size_t real_bytes) { return loaded_cuda_table()(precision, real_bytes); }

}  // namespace

const OpTable& table_named(const std::string& name, size_t real_bytes) {
  const size_t colon = name.find(':');
  const CudaTable table = named<CudaTable>(
      "backend", name.substr(0, colon),
      {{"cpu", cpu_table}, {"reference", reference_table}, {"cuda", cuda_library_table}, {"cuda_emulated", emulated_table}});
  const Precision precision = colon == std::string::npos ? Precision::float32 : precision_named(name.substr(colon + 1));
  if (precision != Precision::float32 && (table == cpu_table || table == reference_table || real_bytes != sizeof(float)))
    throw std::invalid_argument("precision \"" + name.substr(colon + 1) + "\" is for float32 on the CUDA backends");
  return *table(precision, real_bytes);
}

void load_cuda(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(path + " does not load: " + dlerror());
  const auto stamp = reinterpret_cast<const char* (*)()>(dlsym(library, "fastmaml_cuda_stamp"));
  const auto table = reinterpret_cast<CudaTable>(dlsym(library, "fastmaml_cuda_table"));
  if (!stamp || !table) throw std::runtime_error(path + " is not fastmaml's CUDA library");
  if (std::string(stamp()) != kStamp)
    throw std::runtime_error(path + " was built from other sources than the compiled module; run `make cuda` again");
  cuda_table = table;
}

bool cuda_loaded() { return cuda_table != nullptr; }

void try_cuda() {
  const Device& device = *loaded_cuda_table()(Precision::float32, sizeof(float))->device;
  const Device::Piece nothing{nullptr, nullptr, 0};
  device.copy(&nothing, 1, 0);
}

}  // namespace fastmaml
