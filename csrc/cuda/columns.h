// Launches kernels/columns.cuh, and lays out the scratch of sums that are cut into parts.
#pragma once

#include <algorithm>

#include "cuda/choose.h"
#include "cuda/kernels/columns.cuh"
#include "cuda/launch.h"
#include "cuda/operands.h"

namespace fastmaml::FASTMAML_CUDA_NS {

inline int parts_of(const Columns& s) { return (s.rows + s.part_rows - 1) / s.part_rows; }

template <class T>
dim3 column_grid(const Columns& s, int64_t tasks) {
  const int across = s.lanes * kChunk<T>;
  return dim3(unsigned(tasks), unsigned(parts_of(s)), unsigned((s.C + across - 1) / across));
}

inline dim3 column_block(const Columns& s) { return dim3(unsigned(s.lanes * s.row_lanes)); }

template <class T, class F>
void launch_column_map(const Call& call, const F& f, int64_t rows, int64_t C, bool wide) {
  check_sizes(op_name(call.step.op), {rows * C});
  const Columns s = choose_column_map(rows, C, kChunk<T>);
  launch(map_columns<T, F>, column_grid<T>(s, call.tasks), column_block(s), 0, call.stream, f, s, wide);
}

// The scratch of a sum whose rows are cut: parts [tasks at once, parts, 2, C].
struct ColumnParts {
  int64_t tasks, doubles;  // tasks that share the scratch at once; doubles for one task
  ColumnParts(const Columns& s, int64_t channels_across)
      : tasks(choose_tasks_at_once(parts_of(s) * ((s.C + channels_across - 1) / channels_across))),
        doubles(parts_of(s) > 1 ? int64_t(parts_of(s)) * 2 * s.C : 0) {}
  size_t bytes() const { return size_t(tasks * doubles) * sizeof(double); }
};

template <class T>
ColumnParts column_parts(const Columns& s) {
  return {s, s.lanes * kChunk<T>};
}

template <class T>
size_t column_scratch_bytes(int64_t rows, int64_t C) {
  return column_parts<T>(choose_column_sum(rows, C, kChunk<T>)).bytes();
}

// Runs body(first, tasks, parts): once for all tasks with parts null, or in turn for as many tasks as share the scratch.
template <class T, class Body>
void for_column_parts(const Call& call, const Columns& s, Body body) {
  if (parts_of(s) == 1) return body(0, call.tasks, static_cast<double*>(nullptr));
  const int64_t at_once = column_parts<T>(s).tasks;
  for (int64_t first = 0; first < call.tasks; first += at_once)
    body(first, std::min(at_once, call.tasks - first), static_cast<double*>(call.scratch));
}

template <class T>
PerTask<T> from_task(PerTask<T> x, int64_t task) {
  if (x.data) x.data += task * x.task_stride;
  return x;
}

// out0, out1 [C] = scale times the two sums of f over the rows. f_of(first) is f for the tasks from `first` on.
template <class T, class FOf>
void launch_column_sums(const Call& call, FOf f_of, PerTask<T> out0, PerTask<T> out1, double scale, int64_t rows, int64_t C, bool wide) {
  check_sizes(op_name(call.step.op), {rows * C});
  const Columns s = choose_column_sum(rows, C, kChunk<T>);
  for_column_parts<T>(call, s, [&](int64_t first, int64_t tasks, double* parts) {
    const auto f = f_of(first);
    const PerTask<T> to0 = from_task(out0, first), to1 = from_task(out1, first);
    launch(sum_columns<T, std::decay_t<decltype(f)>>, column_grid<T>(s, tasks), column_block(s), 0, call.stream, f, to0, to1, scale, parts,
           s, wide);
    if (!parts) return;
    constexpr int kThreads = 128;
    launch(sum_column_parts<T>, dim3(unsigned(tasks), unsigned((2 * C + kThreads - 1) / kThreads)), dim3(kThreads), 0, call.stream, to0,
           to1, scale, parts, parts_of(s), s.C);
  });
}

}  // namespace fastmaml::FASTMAML_CUDA_NS
