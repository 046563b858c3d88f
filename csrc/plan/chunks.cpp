// Splits the examples of a network into chunks. The output of a layer with 2,000 examples leaves the cache before the
// next layer reads it.
//   linear_fwd     of 2,000 rows             linear_fwd     rows 0 .. 191
//   pointwise_fwd  of 2,000 rows        =>   pointwise_fwd  rows 0 .. 191       ...  then rows 192 .. 383 ...
//   linear_bwd_weight  dw                    linear_bwd_weight  a share of dw, added to the other shares
#include "plan/chunks.h"

#include <algorithm>
#include <map>
#include <vector>

#include "plan/slot_uses.h"

namespace fastmaml {
namespace {

constexpr int64_t kRows = 96;  // a chunk has a multiple of this many rows: whole tiles

// How large an operand is. whole: it covers all examples (read, or a sum over them).
// input, output, one: for each example the size of the layer's input, of its output, or one number.
enum class Extent : uint8_t { whole, input, output, one };

const std::map<Op, std::vector<Extent>>& extents() {
  using enum Extent;
  static const std::map<Op, std::vector<Extent>> of{
      {Op::linear_fwd, {output, input, whole, whole}},
      {Op::linear_fwd_jvp, {output, input, input, whole, whole, whole, output}},
      {Op::linear_fwd_dual, {output, output, input, input, whole, whole, whole, whole}},
      {Op::linear_bwd_data, {input, output, whole, input}},
      {Op::linear_bwd_data_jvp, {input, output, output, whole, whole, input}},
      {Op::linear_bwd_data_dual, {input, input, output, output, whole, whole, input}},
      {Op::linear_bwd_weight, {whole, whole, input, output}},
      {Op::linear_bwd_weight_jvp, {whole, whole, input, input, output, output}},
      {Op::pointwise_fwd, {output, input}},
      {Op::pointwise_fwd_jvp, {output, input, input}},
      {Op::pointwise_bwd, {input, input, output}},
      {Op::pointwise_bwd_jvp, {input, input, input, output, output}},
      {Op::pointwise_fwd_dual, {output, output, input, input}},
      {Op::pointwise_bwd_dual, {input, input, input, input, output, output}},
      {Op::cross_entropy, {whole, input, input, one, one}},
      {Op::cross_entropy_jvp, {input, input, input, one, one}},
      {Op::mse, {whole, input, input, input, one}},
      {Op::mse_jvp, {input, input, input, input, one}},
  };
  return of;
}

int64_t row_of(const Layer& layer, Extent extent) {
  if (extent == Extent::one) return 1;
  if (const auto* s = std::get_if<Linear>(&layer)) return extent == Extent::input ? s->in : s->out;
  if (const auto* s = std::get_if<Pointwise>(&layer)) return s->size;
  return std::get<Loss>(layer).size;
}

// Numbers of operand i of a step, where it covers all examples: a layer's weights or bias, or the loss.
int64_t whole_size(const Step& step, const Layer& layer, size_t i) {
  const auto* s = std::get_if<Linear>(&layer);
  if (!s) return 1;
  const bool bias = step.op == Op::linear_bwd_weight || step.op == Op::linear_bwd_weight_jvp ? i == 1
                    : step.op == Op::linear_fwd                                              ? i == 3
                    : step.op == Op::linear_fwd_jvp                                          ? i == 5
                    : step.op == Op::linear_fwd_dual                                         ? i >= 6
                                                                                             : false;
  return bias ? s->out : s->in * s->out;
}

// A loss without weights divides by the number of all examples. A chunk's Step does not know that number.
bool can_take_parts(const Step& step) {
  const auto found = extents().find(step.op);
  if (found == extents().end()) return false;
  const bool loss = step.op == Op::cross_entropy || step.op == Op::cross_entropy_jvp || step.op == Op::mse || step.op == Op::mse_jvp;
  return !loss || step.operand[found->second.size() - 1];
}

// Numbers that a run touches; row > 0: so many for each example.
struct Range {
  Operand at;
  int64_t size, row;
  bool written;
  bool overlaps(const Range& other) const {
    return at.slot == other.at.slot && at.offset < other.at.offset + other.size && other.at.offset < at.offset + size;
  }
};

class Run {
 public:
  Run(const Schedule& schedule, size_t first) : schedule_(schedule), N_(schedule.steps[first].examples) {
    for (end_ = first; end_ < schedule.steps.size() && takes(schedule.steps[end_]); ++end_) {
    }
  }
  size_t end() const { return end_; }
  int64_t numbers() const { return N_ * row_; }

  // Rows of a chunk, or 0 where chunks do not pay. In wide layers the weights already exceed the cache.
  int64_t chunk(const ChunkSizes& sizes) const {
    if (numbers() <= sizes.cached || whole_ > sizes.cached / 8) return 0;
    const int64_t rows = std::max<int64_t>(1, sizes.cached / 2 / row_ / kRows) * kRows;
    return 2 * rows <= N_ ? rows : 0;
  }

 private:
  const Schedule& schedule_;
  const int64_t N_;
  size_t end_;
  int64_t row_ = 0, whole_ = 0;  // numbers of one example, and numbers shared by all examples
  std::vector<Range> ranges_;

  // Adds a Step if a chunk of it needs only the same chunk of the Steps before.
  bool takes(const Step& step) {
    if (!can_take_parts(step) || step.examples != N_) return false;
    const Layer& layer = schedule_.layers[size_t(step.layer)];
    const std::vector<Extent>& extent = extents().at(step.op);
    std::vector<Range> fresh;
    for (size_t i = 0; i < extent.size(); ++i) {
      if (!step.operand[i]) continue;
      const bool whole = extent[i] == Extent::whole;
      const int64_t row = whole ? 0 : row_of(layer, extent[i]), size = whole ? whole_size(step, layer, i) : N_ * row;
      const Range range{step.operand[i], size, row, i < op_outputs(step.op)};
      bool known = false;
      for (const Range& other : ranges_) {
        if (!range.overlaps(other)) continue;
        if (range.at == other.at && range.size == other.size && range.row == other.row && (row > 0 || (!range.written && !other.written)))
          known = true;
        else
          return false;
      }
      if (!known) fresh.push_back(range);
    }
    for (const Range& range : fresh) {
      ranges_.push_back(range);
      row_ += range.row;
      if (range.row == 0) whole_ += range.size;
    }
    return true;
  }
};

class Chunks {
 public:
  // local[slot]: only this run uses the slot
  Chunks(Schedule& out, const std::vector<Step>& steps, const std::vector<bool>& local, int64_t rows)
      : out_(out), steps_(steps), local_(local), rows_(rows) {}

  void write() {
    const int64_t N = steps_.front().examples;
    for (int64_t from = 0; from < N; from += rows_)
      for (const Step& step : steps_) part(step, from, std::min(rows_, N - from));
  }

 private:
  Schedule& out_;
  const std::vector<Step>& steps_;
  const std::vector<bool>& local_;
  const int64_t rows_;
  std::map<int, int> small_;                      // by slot: the small slot for its chunk
  std::map<std::pair<int, int64_t>, int> share_;  // by the place of a sum: the slot that holds a chunk's share

  void part(Step step, int64_t from, int64_t count) {
    const Layer layer = out_.layers[size_t(step.layer)];
    const std::vector<Extent>& extent = extents().at(step.op);
    std::vector<std::pair<Operand, Operand>> sums;  // each sum, and a chunk's share of the sum
    std::vector<int64_t> sizes;
    step.examples = count;
    step.stat_examples = count;
    for (size_t i = 0; i < extent.size(); ++i) {
      Operand& operand = step.operand[i];
      if (!operand) continue;
      if (extent[i] == Extent::whole) {
        if (from == 0 || i >= op_outputs(step.op)) continue;
        const Operand sum = operand;
        sizes.push_back(whole_size(step, layer, i));
        operand = share_of(sum, sizes.back());
        sums.push_back({sum, operand});
        continue;
      }
      const int64_t row = row_of(layer, extent[i]);
      if (local_[size_t(operand.slot)] && operand.offset == 0)
        operand.slot = small_of(operand.slot, row);
      else
        operand.offset += from * row;
    }
    out_.steps.push_back(step);
    out_.phase = step.phase;
    for (size_t i = 0; i < sums.size(); ++i) out_.step(Op::add, Vector{sizes[i]}, 1, {sums[i].first, sums[i].first, sums[i].second});
  }

  int small_of(int slot, int64_t row) {
    const auto [found, fresh] = small_.try_emplace(slot, -1);
    if (fresh) found->second = out_.add_slot(rows_ * row, out_.slots[size_t(slot)].type);
    return found->second;
  }

  Operand share_of(const Operand& sum, int64_t size) {
    const auto [found, fresh] = share_.try_emplace({sum.slot, sum.offset}, -1);
    if (fresh) found->second = out_.add_slot(size);
    return {found->second, 0};
  }
};

// The slots that only this run uses, and only row by row.
std::vector<bool> local_slots(const Schedule& schedule, const std::vector<int>& uses, const std::vector<Step>& run) {
  const size_t slots = schedule.slots.size();
  const std::vector<int> inside = uses_of_slots(run, slots);
  std::vector<bool> local(slots);
  for (size_t slot = 0; slot < slots; ++slot) local[slot] = schedule.slots[slot].arg == Arg::none && inside[slot] == uses[slot];
  for (const Step& step : run) {
    const std::vector<Extent>& extent = extents().at(step.op);
    for (size_t i = 0; i < extent.size(); ++i)
      if (step.operand[i] && (extent[i] == Extent::whole || step.operand[i].offset != 0)) local[size_t(step.operand[i].slot)] = false;
  }
  return local;
}

}  // namespace

Schedule chunk_examples(const Schedule& schedule, const ChunkSizes& sizes) {
  Schedule out{schedule.slots, schedule.layers, {}};
  const std::vector<int> uses = uses_of_slots(schedule.steps, schedule.slots.size());
  for (size_t i = 0; i < schedule.steps.size();) {
    if (!can_take_parts(schedule.steps[i])) {
      out.steps.push_back(schedule.steps[i++]);
      continue;
    }
    const Run run(schedule, i);
    const std::vector<Step> steps(schedule.steps.begin() + std::ptrdiff_t(i), schedule.steps.begin() + std::ptrdiff_t(run.end()));
    if (const int64_t rows = run.chunk(sizes))
      Chunks(out, steps, local_slots(schedule, uses, steps), rows).write();
    else
      out.steps.insert(out.steps.end(), steps.begin(), steps.end());
    i = run.end();
  }
  return out;
}

}  // namespace fastmaml
