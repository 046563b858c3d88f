#include "plan/stream.h"

#include <algorithm>
#include <map>
#include <optional>
#include <vector>

#include "plan/slot_uses.h"

namespace fastmaml {
namespace {

enum class Extent : uint8_t {
  whole,
  input,
  output
};  // covers all examples, or for each example has the size of the layer's input or output

// The operands of the ops that can take their examples in parts.
const std::map<Op, std::vector<Extent>>& extents() {
  using enum Extent;
  static const std::map<Op, std::vector<Extent>> of{
      {Op::norm_pool_act_bwd_data, {input, output, input, output, whole, whole, whole, whole, whole}},
      {Op::norm_pool_act_bwd_data_jvp,
       {input, output, input, input, output, output, whole, whole, whole, whole, whole, whole, whole, whole, whole}},
      {Op::conv2d_bwd_weight, {whole, whole, input, output}},
      {Op::conv2d_bwd_weight_jvp, {whole, whole, input, input, output, output}},
      {Op::conv2d_bwd_data, {input, output, whole, input}},
      {Op::conv2d_bwd_data_jvp, {input, output, output, whole, whole, input}},
      {Op::conv2d_bwd_data_dual, {input, input, output, output, whole, whole, input}},
  };
  return of;
}

bool makes_gradient(Op op) { return op == Op::norm_pool_act_bwd_data || op == Op::norm_pool_act_bwd_data_jvp; }
bool sums_examples(Op op) { return op == Op::conv2d_bwd_weight || op == Op::conv2d_bwd_weight_jvp; }

int64_t size_of(const Layer& layer, Extent extent) {
  const bool input = extent == Extent::input;
  if (const auto* s = std::get_if<Conv2d>(&layer)) return input ? s->H * s->W * s->C : s->OH * s->OW * s->F;
  const Pool2d& pool = std::get<NormPoolAct>(layer).pool;
  return input ? pool.H * pool.W * pool.C : pool.OH * pool.OW * pool.C;
}

bool writes(const Step& step, int slot) {
  for (size_t i = 0; i < op_outputs(step.op); ++i)
    if (step.operand[i].slot == slot) return true;
  return false;
}
bool touches(const Step& step, int slot) {
  return std::any_of(step.operand.begin(), step.operand.end(), [&](const Operand& o) { return o && o.slot == slot; });
}
// May b run before a?
bool commute(const Step& a, const Step& b) {
  for (const Operand& o : a.operand)
    if (o && (writes(b, o.slot) || (writes(a, o.slot) && touches(b, o.slot)))) return false;
  return true;
}

struct Group {
  std::vector<Step> before;  // sums among the Steps that wait for none of them
  std::vector<Step> steps;   // the first one makes a gradient
  size_t end = 0;            // just after the last one
};

// The Steps from `first` on that take turns. Some make gradients by one layer's output; that layer's convolution Steps
// read them.
std::optional<Group> group_at(const Schedule& schedule, size_t first) {
  const std::vector<Step>& all = schedule.steps;
  const Step& head = all[first];
  if (!makes_gradient(head.op) || head.stat_examples != head.examples) return {};
  Group group{{}, {head}, first + 1};
  bool used = false;
  for (size_t i = first + 1; i < all.size(); ++i) {
    const Step& step = all[i];
    const bool reads = std::any_of(group.steps.begin(), group.steps.end(),
                                   [&](const Step& maker) { return makes_gradient(maker.op) && touches(step, maker.operand[0].slot); });
    const bool same = makes_gradient(step.op) && step.examples == head.examples && step.stat_examples == step.examples && !used &&
                      size_of(schedule.layers[step.layer], Extent::input) == size_of(schedule.layers[head.layer], Extent::input);
    if (extents().count(step.op) && (same || (reads && !makes_gradient(step.op) && step.examples == head.examples))) {
      used = used || reads;
      group.steps.push_back(step);
      group.end = i + 1;
    } else if (!used && std::all_of(group.steps.begin(), group.steps.end(), [&](const Step& s) { return commute(s, step); })) {
      group.before.push_back(step);
    } else {
      break;
    }
  }
  if (!used) return {};
  return group;
}

class Streaming {
 public:
  // local[slot]: only this group uses the slot
  Streaming(Schedule& out, const Group& group, const std::vector<bool>& local, int64_t chunk_numbers) : out_(out), group_(group) {
    const Step& head = group.steps.front();
    N_ = head.examples;
    const int64_t image = size_of(out.layers[head.layer], Extent::input);
    chunk_ = std::max<int64_t>(1, chunk_numbers / image);
    for (const Step& step : group.steps)
      if (makes_gradient(step.op) && local[step.operand[0].slot]) small_[step.operand[0].slot] = out_.add_slot(chunk_ * image);
  }

  void write() {
    for (const Step& step : group_.before) out_.steps.push_back(step);
    for (int64_t from = 0; from < N_; from += chunk_)
      for (const Step& step : group_.steps) part(step, from, std::min(chunk_, N_ - from));
  }

 private:
  Schedule& out_;
  const Group& group_;
  int64_t N_ = 0, chunk_ = 0;
  std::map<int, int> small_;                      // by slot: the small slot for its chunk
  std::map<std::pair<int, int64_t>, int> share_;  // by the place of a sum: the slot that holds a chunk's share

  void part(Step step, int64_t from, int64_t count) {
    const std::vector<Extent>& extent = extents().at(step.op);
    const Layer layer = out_.layers[step.layer];
    step.examples = count;
    for (size_t i = 0; i < extent.size(); ++i) {
      Operand& operand = step.operand[i];
      if (!operand) continue;
      const auto small = small_.find(operand.slot);
      if (small != small_.end())
        operand.slot = small->second;
      else if (extent[i] != Extent::whole)
        operand.offset += from * size_of(layer, extent[i]);
    }
    if (from == 0 || !sums_examples(step.op)) {
      out_.steps.push_back(step);
      return;
    }
    const Conv2d& conv = std::get<Conv2d>(layer);
    const int64_t sizes[] = {conv.KH * conv.KW * conv.C * conv.F, conv.F};
    const std::array<Operand, kMaxOperands> whole = step.operand;
    for (int i : {0, 1})
      if (whole[i]) step.operand[i] = share_of(whole[i], sizes[i]);
    out_.steps.push_back(step);
    out_.phase = step.phase;
    for (int i : {0, 1})
      if (whole[i]) out_.step(Op::add, Vector{sizes[i]}, 1, {whole[i], whole[i], step.operand[i]});
  }

  Operand share_of(const Operand& sum, int64_t size) {
    const auto [found, fresh] = share_.try_emplace({sum.slot, sum.offset}, -1);
    if (fresh) found->second = out_.add_slot(size);
    return {found->second, 0};
  }
};

}  // namespace

Schedule stream(const Schedule& schedule, const StreamSizes& sizes) {
  Schedule out{schedule.slots, schedule.layers, {}};
  const size_t slots = schedule.slots.size();
  const std::vector<int> uses = uses_of_slots(schedule.steps, slots);
  for (size_t i = 0; i < schedule.steps.size();) {
    const std::optional<Group> group = group_at(schedule, i);
    const Step& head = schedule.steps[i];
    if (!group || head.examples * size_of(schedule.layers[head.layer], Extent::input) <= sizes.whole) {
      out.steps.push_back(schedule.steps[i++]);
      continue;
    }
    const std::vector<int> inside = uses_of_slots(group->steps, slots);
    std::vector<bool> local(slots);
    for (size_t slot = 0; slot < slots; ++slot) local[slot] = schedule.slots[slot].arg == Arg::none && inside[slot] == uses[slot];
    Streaming(out, *group, local, sizes.chunk).write();
    i = group->end;
  }
  return out;
}

}  // namespace fastmaml
