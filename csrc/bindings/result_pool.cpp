#include "bindings/result_pool.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>

#include "ops/huge_pages.h"

// Exists since torch 2.11; null in torch 2.10.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(void* data, int64_t dims, const int64_t* sizes, const int64_t* strides,
                                                                int64_t offset, int32_t dtype, int32_t device_type, int32_t device_index,
                                                                AtenTensorHandle* made, int32_t layout, const uint8_t* metadata,
                                                                int64_t metadata_size, void (*gone)(void* data, void* context),
                                                                void* context);

namespace fastmaml {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr size_t kPooled = size_t(64) << 10;  // for this size and above, malloc may fetch new pages at each call
constexpr size_t kHeld = size_t(256) << 20;   // most bytes kept for later calls

struct Block {
  void* data;
  size_t bytes;
};

class Pool {
 public:
  Block* take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = idle_.end();
      for (auto b = idle_.begin(); b != idle_.end(); ++b)
        if ((*b)->bytes >= bytes && (*b)->bytes <= 2 * bytes && (best == idle_.end() || (*b)->bytes < (*best)->bytes)) best = b;
      if (best != idle_.end()) {
        Block* block = *best;
        idle_.erase(best);
        held_ -= block->bytes;
        return block;
      }
    }
    bytes = (bytes + 63) / 64 * 64;
    auto block = std::make_unique<Block>(Block{std::aligned_alloc(64, bytes), bytes});
    if (!block->data) throw std::bad_alloc();
    ask_for_huge_pages(block->data, bytes);
    return block.release();
  }

  void give(Block* block) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (held_ + block->bytes <= kHeld) {
        held_ += block->bytes;
        return idle_.push_back(block);
      }
    }
    drop(block);
  }

  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::for_each(idle_.begin(), idle_.end(), drop);
    idle_.clear();
    held_ = 0;
  }

 private:
  static void drop(Block* block) {
    std::free(block->data);
    delete block;
  }

  std::mutex mutex_;
  std::vector<Block*> idle_;
  size_t held_ = 0;  // bytes
};

Pool& pool() {
  static auto* made = new Pool;  // never destroyed: tensors may be freed while the process ends
  return *made;
}

void give_back(void*, void* block) { pool().give(static_cast<Block*>(block)); }

}  // namespace

Tensor empty_on_host(const std::vector<int64_t>& sizes, ScalarType type) {
  const bool single = type == ScalarType::Float;
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  size_t bytes = single ? sizeof(float) : sizeof(double);
  for (int64_t size : sizes) bytes *= size_t(size);
  const int32_t dtype = single ? aoti_torch_dtype_float32() : aoti_torch_dtype_float64(), cpu = aoti_torch_device_type_cpu();
  const int64_t dims = int64_t(sizes.size());
  AtenTensorHandle made = nullptr;
  if (bytes < kPooled || !torch_from_blob) {  // not stable::empty, which calls torch's dispatcher and takes three times as long
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes.data(), strides.data(), dtype, cpu, 0, &made));
    return Tensor(made);
  }
  Block* block = pool().take(bytes);
  const AOTITorchError failed = torch_from_blob(block->data, dims, sizes.data(), strides.data(), 0, dtype, cpu, -1, &made,
                                                aoti_torch_layout_strided(), nullptr, 0, give_back, block);
  if (failed) pool().give(block);
  STABLE_TORCH_ERROR_CODE_CHECK(failed);
  return Tensor(made);
}

void release_results() { pool().release(); }

}  // namespace fastmaml
