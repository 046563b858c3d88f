// The walks of a Schedule (run_layered, run_resident, run_segments) for ops that are host functions.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

#include "ops/huge_pages.h"
#include "ops/ops.h"
#include "ops/step_clock.h"
#include "ops/tree_sum.h"

namespace fastmaml {
namespace {

using Args = std::array<View, kArgs>;

// The arguments, starting at task `first`.
Args args_from(const Run& run, int64_t first) {
  Args args;
  std::copy(run.args, run.args + kArgs, args.begin());
  for (const Slot& slot : run.schedule.slots) {
    if (slot.arg == Arg::none) continue;
    View& view = args[static_cast<int>(slot.arg)];
    if (view)
      view.data = static_cast<std::byte*>(view.data) + size_t(first * view.task_stride) * element_bytes(slot.type, run.table.real_bytes);
  }
  return args;
}

// Runs Steps [from, to) for `count` tasks. Their slots start at `arena`; their arguments are `args`.
void walk(const Run& run, const Args& args, int64_t worker, std::byte* arena, std::byte* scratch, int64_t count, size_t from, size_t to) {
  const Schedule& schedule = run.schedule;
  StepClock* const clock = run.clocks ? run.clocks + worker : nullptr;
  if (clock) clock->start();
  std::array<View, kMaxOperands> views;
  for (size_t s = from; s < to; ++s) {
    const Step& step = schedule.steps[s];
    for (int i = 0; i < kMaxOperands; ++i) {
      const Operand& operand = step.operand[i];
      View& view = views[i];
      if (!operand) {
        view = {};
        continue;
      }
      const Slot& slot = schedule.slots[operand.slot];
      const size_t bytes = element_bytes(slot.type, run.table.real_bytes);
      if (slot.arg != Arg::none) {
        view = args[static_cast<int>(slot.arg)];
        view.data = static_cast<std::byte*>(view.data) + operand.offset * bytes;
      } else {
        view.data = arena + (run.workspace.offset[operand.slot] + operand.offset * bytes) * run.lanes;
        view.task_stride = int64_t(run.workspace.task_bytes / bytes);
        view.lanes = run.lanes;
      }
    }
    const Call call{step, schedule.layers[step.layer], views.data(), count, scratch, run.stream};
    if (is_python_loss(step.op))
      run.python_loss(call);
    else
      run.table.run[static_cast<int>(step.op)](call);
    if (clock) clock->finished(s);
  }
}

// Hands the groups of tasks out to `workers`, one at a time. A result does not depend on which worker made it.
template <class Body>
void over_groups(int64_t groups, int workers, const ParallelFor& parallel_for, const Body& body) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t worker) {
    for (int64_t g = next++; g < groups; g = next++) body(worker, g);
  };
  if (workers <= 1)
    work(0);
  else
    parallel_for(workers, work);
}

bool has_python_loss(const Schedule& schedule) {
  return std::any_of(schedule.steps.begin(), schedule.steps.end(), [](const Step& step) { return is_python_loss(step.op); });
}

// arena bytes of all tasks
size_t slot_bytes(const Run& run) {
  const size_t groups = (run.tasks + run.lanes - 1) / run.lanes;
  return groups * run.lanes * run.workspace.task_bytes;
}

bool is_summed(const Run& run, Arg arg) {
  return run.sums && std::any_of(run.sums->begin(), run.sums->end(), [arg](const TreeSum& sum) { return sum.arg() == arg; });
}

void check(const Run& run) {
  if (run.lanes != run.table.lanes && run.table.lanes != kAnyLanes)
    throw std::invalid_argument(std::string("backend ") + run.table.backend + " has no layout of " + std::to_string(run.lanes) +
                                " tasks in lanes in this table");
  for (const Slot& slot : run.schedule.slots)
    if (slot.arg != Arg::none && slot.size > 0 && !run.args[static_cast<int>(slot.arg)] && !is_summed(run, slot.arg))
      throw std::invalid_argument(std::string("argument ") + arg_name(slot.arg) + " is missing");
  if (!run.python_loss && has_python_loss(run.schedule))
    throw std::invalid_argument("a loss written in Python needs a function, and this run has none");
}

}  // namespace

void run_layered(const Run& run, Arenas& arenas) { run_layered(run, arenas.get(0, layered_bytes(run))); }

void run_layered(const Run& run, std::byte* arena) {
  check(run);
  walk(run, args_from(run, 0), 0, arena, arena + slot_bytes(run), run.tasks, 0, run.schedule.steps.size());
}

size_t layered_bytes(const Run& run) { return slot_bytes(run) + run.workspace.scratch_bytes; }

void run_resident(const Run& run, Arenas& arenas, int workers, const ParallelFor& parallel_for) {
  check(run);
  if (has_python_loss(run.schedule)) throw std::invalid_argument("run_resident cannot walk a loss written in Python; use run_segments");
  const int64_t groups = (run.tasks + run.lanes - 1) / run.lanes;
  const size_t slots = run.lanes * run.workspace.task_bytes, bytes = slots + run.workspace.scratch_bytes;
  workers = int(std::min<int64_t>(std::max(workers, 1), groups));
  arenas.reserve(workers, bytes);
  over_groups(groups, workers, parallel_for, [&](int64_t worker, int64_t group) {
    std::byte* arena = arenas.get(int(worker), bytes);
    const int64_t first = group * run.lanes, count = std::min<int64_t>(run.lanes, run.tasks - first);
    if (run.before && !run.before(first, count)) return;
    Args args = args_from(run, first);
    if (run.sums)
      for (TreeSum& sum : *run.sums) args[static_cast<int>(sum.arg())] = {sum.take(), sum.size(), 1};
    walk(run, args, worker, arena, arena + slots, count, 0, run.schedule.steps.size());
    if (run.sums)
      for (TreeSum& sum : *run.sums) sum.give(group, args[static_cast<int>(sum.arg())].data);
  });
}

void run_segments(const Run& run, Arenas& arenas, int workers, const ParallelFor& parallel_for) {
  check(run);
  const std::vector<Step>& steps = run.schedule.steps;
  const int64_t groups = (run.tasks + run.lanes - 1) / run.lanes;
  const size_t slots = run.lanes * run.workspace.task_bytes, all = groups * slots;
  workers = int(std::min<int64_t>(std::max(workers, 1), groups));
  std::byte* arena = arenas.get(0, all + workers * run.workspace.scratch_bytes);
  for (size_t from = 0; from < steps.size();) {
    size_t to = from;
    while (to < steps.size() && !is_python_loss(steps[to].op)) ++to;
    over_groups(groups, workers, parallel_for, [&](int64_t worker, int64_t group) {
      const int64_t first = group * run.lanes;
      std::byte* scratch = arena + all + worker * run.workspace.scratch_bytes;
      walk(run, args_from(run, first), worker, arena + group * slots, scratch, std::min<int64_t>(run.lanes, run.tasks - first), from, to);
    });
    if (to < steps.size()) walk(run, args_from(run, 0), 0, arena, nullptr, run.tasks, to, to + 1);
    from = to + 1;
  }
}

Arenas::~Arenas() {
  for (Block& block : blocks_) std::free(block.data);
}

std::byte* Arenas::get(int worker, size_t bytes) {
  if (worker >= int(blocks_.size()) || blocks_[worker].bytes < bytes || !blocks_[worker].data) reserve(worker + 1, bytes);
  return blocks_[worker].data;
}

void Arenas::reserve(int workers, size_t bytes) {
  if (workers > int(blocks_.size())) blocks_.resize(workers);
  bytes = std::max<size_t>((bytes + 63) / 64 * 64, 64);
  for (int w = 0; w < workers; ++w) {
    Block& block = blocks_[w];
    if (block.bytes >= bytes) continue;
    std::free(block.data);
    block = {static_cast<std::byte*>(std::aligned_alloc(64, bytes)), bytes};
    if (!block.data) {
      block.bytes = 0;
      throw std::bad_alloc();
    }
    ask_for_huge_pages(block.data, bytes);
    ++allocations_;
  }
  high_water_ = std::max(high_water_, bytes);
}

}  // namespace fastmaml
