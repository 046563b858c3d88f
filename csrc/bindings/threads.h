// Parallel loops on torch's own thread pool, called through libtorch. No second OpenMP runtime enters the process.
#pragma once

#include <cstdint>
#include <functional>

namespace fastmaml {

int thread_count();                                                     // torch.get_num_threads()
void in_parallel(int64_t n, const std::function<void(int64_t)>& body);  // a ParallelFor (ops/ops.h)
int threads_seen();                                                     // how many threads one in_parallel really used

}  // namespace fastmaml
