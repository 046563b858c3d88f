// Pages of 2 MiB for large memory, where the system has them for the asking. A fresh page of 4 KiB costs a fault at its first touch, which
// for results as large as all tasks' parameters took a third of a Hessian-vector product; and matrices whose rows lie pages apart ask for
// more pages than a core remembers.
#pragma once

#include <cstddef>
#include <cstdint>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastmaml {

inline constexpr size_t kHugePage = size_t(2) << 20;

// Only a hint: a refusal changes nothing but the time.
inline void ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
  if (bytes < 2 * kHugePage) return;
  const uintptr_t from = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage,
                  to = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

}  // namespace fastmaml
