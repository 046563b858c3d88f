// copy, also between the two layouts of tasks. In a lane walk, only copy and the losses' labels see task-major operands
// that tasks do not share.
#include <array>

#include "cpu/kernels/transpose.h"
#include "cpu/layout.h"

FASTMAML_CPU_BEGIN
namespace {

// One group: between kLanes rows of `size` numbers, one for each task, and lanes.
template <class T>
struct Group {
  static constexpr int64_t L = kLanes<T>;
  using Square = std::array<Vec<T>, L>;
  std::array<T*, L> task;
  T* lanes;

  Group(const View& task_major, const View& in_lanes, int64_t group, int64_t tasks)
      : lanes(static_cast<T*>(in_lanes.data) + group * in_lanes.task_stride * L) {
    for (int64_t l = 0; l < L; ++l) {
      // Lanes without a task hold the last task again, so that they compute ordinary numbers.
      const int64_t t = group * L + l < tasks ? group * L + l : tasks - 1;
      task[l] = static_cast<T*>(task_major.data) + t * task_major.task_stride;
    }
  }

  void to_lanes(int64_t size) const {
    int64_t i = 0;
    for (; i + L <= size; i += L) {
      Square square;
      for (int64_t l = 0; l < L; ++l) square[l] = load<Vec<T>>(task[l] + i);
      transpose_blocks<L / 2>(square);
      for (int64_t l = 0; l < L; ++l) store(lanes + (i + l) * L, square[l]);
    }
    for (; i < size; ++i)
      for (int64_t l = 0; l < L; ++l) lanes[i * L + l] = task[l][i];
  }

  void from_lanes(int64_t size, int64_t tasks) const {
    int64_t i = 0;
    for (; i + L <= size; i += L) {
      Square square;
      for (int64_t l = 0; l < L; ++l) square[l] = load<Vec<T>>(lanes + (i + l) * L);
      transpose_blocks<L / 2>(square);
      for (int64_t l = 0; l < tasks; ++l) store(task[l] + i, square[l]);
    }
    for (; i < size; ++i)
      for (int64_t l = 0; l < tasks; ++l) task[l][i] = lanes[i * L + l];
  }
};

template <class T>
void copy_lanes(const Call& call) {
  constexpr int64_t L = kLanes<T>;
  const int64_t size = std::get_if<Vector>(&call.layer)->size;
  const View &out = call[0], &x = call[1];
  for (int64_t g = 0; g < LaneMajor<T>::groups(call); ++g) {
    const int64_t tasks = call.tasks - g * L < L ? call.tasks - g * L : L;
    if (out.lanes == 1 && x.lanes == 1) {
      for (int64_t t = g * L; t < g * L + tasks; ++t) std::memcpy(at<T>(call, 0, t), at<T>(call, 1, t), size_t(size) * sizeof(T));
    } else if (out.lanes == 1) {
      Group<T>(out, x, g, call.tasks).from_lanes(size, tasks);
    } else if (x.lanes == 1 && x.task_stride == 0) {
      const auto to = LaneMajor<T>::operand(call, 0, g);
      const auto from = LaneMajor<T>::shared(call, 1, g);
      for (int64_t i = 0; i < size; ++i) to.put(i, from.template get<Vec<T>>(i));
    } else if (x.lanes == 1) {
      Group<T>(x, out, g, call.tasks).to_lanes(size);
    } else {
      const auto to = LaneMajor<T>::operand(call, 0, g), from = LaneMajor<T>::operand(call, 1, g);
      std::memcpy(to.data, from.data, size_t(size * L) * sizeof(T));
    }
  }
}

template <class T>
void copy_tasks(const Call& call) {
  const size_t bytes = size_t(std::get_if<Vector>(&call.layer)->size) * sizeof(T);
  for (int64_t t = 0; t < call.tasks; ++t) std::memcpy(at<T>(call, 0, t), at<T>(call, 1, t), bytes);
}

}  // namespace

template <class Layout>
void add_copy_op(OpTable& table) {
  using T = typename Layout::Type;
  set_op(table, Op::copy, std::is_same_v<Layout, TaskMajor<T>> ? copy_tasks<T> : copy_lanes<T>);
}
FASTMAML_BOTH_LAYOUTS(add_copy_op)

FASTMAML_CPU_END
