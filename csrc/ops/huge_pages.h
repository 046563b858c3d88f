// Pages of 2 MiB for large memory, where the system offers them.
// The first touch of a 4 KiB page costs a page fault. For results as large as all tasks' parameters,
// these faults took a third of a Hessian-vector product.
// Matrices with rows several pages apart also need more pages than the TLB holds.
#pragma once

#include <cstddef>
#include <cstdint>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastmaml {

inline constexpr size_t kHugePage = size_t(2) << 20;

// Only a hint: without huge pages the results are the same.
inline void ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
  if (bytes < 2 * kHugePage) return;
  const uintptr_t from = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage,
                  to = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

}  // namespace fastmaml
