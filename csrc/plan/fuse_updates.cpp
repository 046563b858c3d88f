#include "plan/fuse_updates.h"

#include <algorithm>
#include <optional>
#include <vector>

namespace fastmaml {
namespace {

struct Update {
  size_t step;  // index of the Step
  bool adjoint;
  Operand to, from, g, rate;
  int64_t size;
};

std::optional<Update> update_at(const Schedule& schedule, size_t i) {
  const Step& step = schedule.steps[i];
  const auto& of = step.operand;
  const Layer& layer = schedule.layers[size_t(step.layer)];
  if (step.op == Op::uniform_update) return Update{i, false, of[0], of[1], of[2], of[3], std::get<Vector>(layer).size};
  if (step.op != Op::axpy || !of[1]) return {};
  const Axpy& axpy = std::get<Axpy>(layer);
  if (axpy.factor != -1) return {};
  return Update{i, true, of[0], of[0], of[2], of[1], axpy.size};
}

struct Range {
  int64_t from, to;  // of a vector
  bool overlaps(const Range& other) const { return from < other.to && other.from < to; }
};

struct Writer {
  size_t step;
  Range range;  // its weights, followed by its bias
  bool fuses = false;
};

Operand part(Operand vector, int64_t from) { return {vector.slot, vector.offset + from}; }

// The Steps that make the update's gradient, in the order of their ranges. Empty if other Steps also write or read the
// gradient.
std::vector<Writer> writers_of(const Schedule& schedule, const Update& update) {
  const Slot& slot = schedule.slots[size_t(update.g.slot)];
  if (slot.arg != Arg::none || update.g.offset != 0 || slot.size != update.size) return {};
  std::vector<Writer> writers;
  int64_t covered = 0;
  for (size_t s = 0; s < schedule.steps.size(); ++s) {
    const Step& step = schedule.steps[s];
    const bool uses = std::any_of(step.operand.begin(), step.operand.end(), [&](Operand o) { return o.slot == update.g.slot; });
    if (s == update.step || !uses) continue;
    if (s > update.step || step.op != (update.adjoint ? Op::linear_bwd_weight_jvp : Op::linear_bwd_weight)) return {};
    const Linear& layer = std::get<Linear>(schedule.layers[size_t(step.layer)]);
    const Operand w = step.operand[0], b = step.operand[1];
    const int64_t weights = layer.in * layer.out;
    if (w.slot != update.g.slot || (b && b != part(w, weights))) return {};
    const Range range{w.offset, w.offset + weights + (b ? layer.out : 0)};
    covered += range.to - range.from;
    writers.push_back({s, range});
  }
  std::sort(writers.begin(), writers.end(), [](const Writer& a, const Writer& b) { return a.range.from < b.range.from; });
  return covered == update.size ? writers : std::vector<Writer>{};
}

// Can this writer write into `to`, if every other writer does so too?
// A Step reads either one parameter through an operand, or all parameters from there on.
bool can_join(const Schedule& schedule, const Update& update, const Writer& writer) {
  for (size_t s = update.adjoint ? writer.step + 1 : 0; s < update.step; ++s)
    for (const Operand& operand : schedule.steps[s].operand) {
      if (operand.slot != update.to.slot) continue;
      const int64_t at = operand.offset - update.to.offset;
      const bool one = std::holds_alternative<Linear>(schedule.layers[size_t(schedule.steps[s].layer)]);
      if (!one || Range{at, at + 1}.overlaps(writer.range)) return false;
    }
  return true;
}

Step fused(const Step& product, const Update& update, const Writer& writer, const Linear& layer) {
  Step step = product;
  const Operand to = part(update.to, writer.range.from), from = part(update.from, writer.range.from);
  const bool bias = bool(product.operand[1]);
  const Operand to_b = bias ? part(to, layer.in * layer.out) : Operand{}, from_b = bias ? part(from, layer.in * layer.out) : Operand{};
  const auto& of = product.operand;
  if (update.adjoint) {
    step.op = Op::linear_adjoint;
    step.operand = {to, to_b, of[2], of[3], of[4], of[5], update.rate};
  } else {
    step.op = Op::linear_update;
    step.operand = {to, to_b, of[2], of[3], from, from_b, update.rate};
  }
  return step;
}

}  // namespace

Schedule fuse_updates(Schedule schedule, const std::function<bool(Op)>& supports) {
  if (!supports(Op::linear_update) || !supports(Op::linear_adjoint)) return schedule;
  for (size_t i = 0; i < schedule.steps.size(); ++i) {
    const std::optional<Update> update = update_at(schedule, i);
    if (!update) continue;
    std::vector<Writer> writers = writers_of(schedule, *update);
    int64_t joining = 0;
    for (Writer& writer : writers)
      if (can_join(schedule, *update, writer)) {
        writer.fuses = true;
        joining += writer.range.to - writer.range.from;
      }
    if (2 * joining < update->size || joining == 0) continue;
    std::vector<Range> left;  // for the update itself
    for (const Writer& writer : writers) {
      Step& step = schedule.steps[writer.step];
      if (writer.fuses)
        step = fused(step, *update, writer, std::get<Linear>(schedule.layers[size_t(step.layer)]));
      else if (!left.empty() && left.back().to == writer.range.from)
        left.back().to = writer.range.to;
      else
        left.push_back(writer.range);
    }
    const Step whole = schedule.steps[i];
    schedule.steps.erase(schedule.steps.begin() + int64_t(i));
    for (const Range& range : left) {
      Step some = whole;
      const int64_t size = range.to - range.from;
      some.layer = schedule.add_layer(update->adjoint ? Layer(Axpy{size, -1}) : Layer(Vector{size}));
      for (Operand& operand : some.operand)
        if (operand && operand != update->rate) operand.offset += range.from;
      schedule.steps.insert(schedule.steps.begin() + int64_t(i++), some);
    }
    --i;
  }
  return schedule;
}

}  // namespace fastmaml
