// Encodes a Schedule for the resident walk: every Step's settings, every slot's place, and the stages. Or says why it cannot.
#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>

#include "cuda/choose.h"
#include "cuda/kernels/batch_norm.cuh"
#include "cuda/kernels/resident_step.cuh"
#include "cuda/map_ops.h"
#include "cuda/resident_code.h"

namespace fastmaml::FASTMAML_CUDA_NS {
namespace {

// The kernel's static arrays, and those of the sums over a block.
constexpr size_t kStaticShared = 3 * 1024;

// ---------------------------------------------------------------- Steps

// A Step before its encoding. `operands`: indices of the Schedule's operands, in the kernel's order.
struct Draft {
  ResidentStep step = {};
  const Step* from = nullptr;
  std::vector<int> operands = {};  // -1: absent
  int64_t products = 0;            // multiplications in products of two matrices
  bool uses_scratch = false;
};

template <class T>
int64_t chunks_of(int64_t numbers) {
  return (numbers + kChunk<T> - 1) / kChunk<T>;
}

// How many threads can work on a Step of this layer.
template <class T>
int64_t width_of(const Step& step, const Layer& layer) {
  const int64_t N = step.examples;
  if (const auto* s = std::get_if<Linear>(&layer)) return std::max(std::max(N, s->in) * chunks_of<T>(s->out), N * chunks_of<T>(s->in));
  if (const auto* s = std::get_if<BatchNorm>(&layer)) return N * s->spatial * chunks_of<T>(s->C);
  if (const auto* s = std::get_if<GroupNorm>(&layer)) return N * s->groups * 32;
  if (const auto* s = std::get_if<Loss>(&layer)) return N * s->size;
  if (const auto* s = std::get_if<Flatten>(&layer)) return N * s->C * s->H * s->W;
  return chunks_of<T>(map_size(step, layer)) / 2;
}

template <class T>
class Drafts {
 public:
  Drafts(const Schedule& schedule, unsigned threads) : threads_(threads) {
    for (const Step& step : schedule.steps) add(step, schedule.layers[size_t(step.layer)]);
  }

  std::vector<Draft> all;

 private:
  const unsigned threads_;

  template <class S>
  Draft& draft(const Step& step, const S& settings) {
    static_assert(sizeof(S) <= sizeof ResidentStep::settings && std::is_trivially_copyable_v<S>);
    Draft& d = all.emplace_back();
    d.step.op = step.op;
    std::memcpy(d.step.settings, &settings, sizeof settings);
    d.from = &step;
    for (int i = 0; i < kMaxOperands; ++i) d.operands.push_back(i);
    return d;
  }

  template <class Map>
  void map(const Step& step, const Layer& layer) {
    draft(step, Map::function(layer)).step.size = int32_t(map_size(step, layer));
  }

  template <Op op>
  void pointwise(const Step& step, const Layer& layer) {
    const bool smooth = !is_rectifier(std::get<Pointwise>(layer).kind);
    smooth ? map<PointwiseOp<T, op, Smoothing<T>>>(step, layer) : map<PointwiseOp<T, op, Rectifying<T>>>(step, layer);
    all.back().step.smooth = smooth;
  }

  void flatten(const Step& step, int64_t rows, int64_t cols) { draft(step, TransposeSettings{int(step.examples), int(rows), int(cols)}); }

  // operands: out out' a a' b b' bias bias' sums
  void product(Op op, const Step& step, ProductSize size, std::vector<int> operands) {
    const bool dual = op == Op::linear_fwd_dual || op == Op::linear_bwd_data_dual;
    Draft& d = draft(step, choose_resident_tiles<T>(size, dual, threads_));
    d.step.op = op;
    operands.resize(kMaxOperands, -1);
    const auto has = [&](int i) { return operands[size_t(i)] >= 0 && step.operand[size_t(operands[size_t(i)])]; };
    d.products = size.rows * size.cols * size.depth * (has(1) ? 3 : has(3) ? 2 : 1);
    d.operands = std::move(operands);
  }

  void linear(const Step& step, const Linear& s) {
    const int64_t N = step.examples;
    const ProductSize fwd{N, s.out, s.in}, data{N, s.in, s.out}, weight{s.in, s.out, N};
    switch (step.op) {
      case Op::linear_fwd:
        return product(Op::linear_fwd, step, fwd, {0, -1, 1, -1, 2, -1, 3});
      case Op::linear_fwd_jvp:
        return product(Op::linear_fwd, step, fwd, {0, -1, 1, 2, 4, 3, 5});
      case Op::linear_fwd_dual:
        if (step.operand[3]) return product(Op::linear_fwd_dual, step, fwd, {0, 1, 2, 3, 4, 5, 6, 7});
        product(Op::linear_fwd, step, fwd, {0, -1, 2, -1, 4, -1, 6});  // the first layer: two products with the same x
        return product(Op::linear_fwd, step, fwd, {1, -1, 2, -1, 5, -1, 7});
      case Op::linear_bwd_data:
        return product(Op::linear_bwd_data, step, data, {0, -1, 1, -1, 2});
      case Op::linear_bwd_data_jvp:
        return product(Op::linear_bwd_data, step, data, {0, -1, 1, 2, 4, 3});
      case Op::linear_bwd_data_dual:
        return product(Op::linear_bwd_data_dual, step, data, {0, 1, 2, 3, 4, 5});
      case Op::linear_bwd_weight:
        return product(Op::linear_bwd_weight, step, weight, {0, -1, 2, -1, 3, -1, -1, -1, 1});
      case Op::linear_bwd_weight_jvp:
        return product(Op::linear_bwd_weight, step, weight, {0, -1, 2, 3, 5, 4, -1, -1, 1});
      default:
        throw std::logic_error(std::string("the resident walk has no ") + op_name(step.op));
    }
  }

  Columns columns(int64_t rows, int64_t C) const { return choose_columns(rows, C, kChunk<T>, 32, threads_); }

  void batch_norm(const Step& step, const BatchNorm& s, bool sums) {
    const int64_t rows = step.examples * s.spatial, stat_rows = step.stat_examples * s.spatial;
    const bool of_stats = step.op == Op::batch_norm_stats || step.op == Op::batch_norm_stats_jvp;
    const int inside = s.frozen ? 0 : int(stat_rows);
    const ColumnSettings settings{columns(of_stats ? stat_rows : rows, s.C), inside, s.eps, 1.0 / double(stat_rows)};
    draft(step, settings).uses_scratch = sums;
  }

  void group_norm(const Step& step, const GroupNorm& s, bool sums) {
    const int64_t width = s.channels / s.groups, rows = step.examples * s.spatial;
    const Groups groups{int(step.examples), int(s.spatial), int(s.channels), int(s.groups), int(width), int(chunks_of<T>(width))};
    draft(step, GroupSettings{groups, columns(rows, s.channels), s.eps}).uses_scratch = sums;
  }

  void add(const Step& step, const Layer& layer) {
    switch (step.op) {
#define FASTMAML_MAP(op) \
  case Op::op:           \
    return map<MapOp<T, Op::op>>(step, layer);
      FASTMAML_RESIDENT_MAPS(FASTMAML_MAP)
#undef FASTMAML_MAP
      case Op::pointwise_fwd:
        return pointwise<Op::pointwise_fwd>(step, layer);
      case Op::pointwise_fwd_jvp:
      case Op::pointwise_bwd:
        return pointwise<Op::pointwise_bwd>(step, layer);
      case Op::pointwise_bwd_jvp:
        return pointwise<Op::pointwise_bwd_jvp>(step, layer);
      case Op::flatten_fwd: {
        const Flatten& s = std::get<Flatten>(layer);
        return flatten(step, s.H * s.W, s.C);
      }
      case Op::flatten_bwd: {
        const Flatten& s = std::get<Flatten>(layer);
        return flatten(step, s.C, s.H * s.W);
      }
      case Op::linear_fwd:
      case Op::linear_fwd_jvp:
      case Op::linear_fwd_dual:
      case Op::linear_bwd_data:
      case Op::linear_bwd_data_jvp:
      case Op::linear_bwd_data_dual:
      case Op::linear_bwd_weight:
      case Op::linear_bwd_weight_jvp:
        return linear(step, std::get<Linear>(layer));
      case Op::batch_norm_stats:
      case Op::batch_norm_stats_jvp:
      case Op::batch_norm_bwd_weight:
      case Op::batch_norm_bwd_weight_jvp:
        return batch_norm(step, std::get<BatchNorm>(layer), true);
      case Op::batch_norm_frozen_stats:
      case Op::batch_norm_fwd:
      case Op::batch_norm_fwd_jvp:
      case Op::batch_norm_bwd_data:
      case Op::batch_norm_bwd_data_jvp:
        return batch_norm(step, std::get<BatchNorm>(layer), false);
      case Op::group_norm_fwd:
      case Op::group_norm_fwd_jvp:
        return group_norm(step, std::get<GroupNorm>(layer), false);
      case Op::group_norm_bwd:
      case Op::group_norm_bwd_jvp:
        return group_norm(step, std::get<GroupNorm>(layer), true);
      case Op::cross_entropy:
      case Op::cross_entropy_jvp:
      case Op::mse:
      case Op::mse_jvp: {
        const Loss& s = std::get<Loss>(layer);
        draft(step, LossSettings{{int(step.examples), int(s.size), choose_loss_lanes(s.size)}, s.smoothing});
        return;
      }
      case Op::clip_norm:
      case Op::clip_norm_adjoint: {
        const Clip& s = std::get<Clip>(layer);
        draft(step, ClipSettings{s.limit}).step.size = int32_t(s.size);
        return;
      }
      case Op::cg_start:
      case Op::cg_step:
        draft(step, 0).step.size = int32_t(std::get<Vector>(layer).size);
        return;
      default:
        throw std::logic_error(std::string("the resident walk has no ") + op_name(step.op));
    }
  }
};

// ---------------------------------------------------------------- places

// Where a task's slots lie, and the share of reads and writes in shared memory.
struct Places {
  std::vector<Place> of_slot;
  size_t shared_bytes = 0, arena_bytes = 0;
  size_t all_bytes = 0;  // shared memory for all slots
  double in_shared = 1;
};

// How often a Step touches an operand's numbers. A product reads them again for every tile.
double touches(const Draft& draft) { return draft.products > 0 ? 8 : 1; }

// Gives all ranges a place in one memory. Returns its size.
size_t pack(const std::vector<LiveRange>& ranges, int memory, std::vector<Place>& of_slot) {
  Packing packing;
  for (const LiveRange& range : ranges) of_slot[size_t(range.slot)] = {memory, uint32_t(packing.put(range))};
  return packing.bytes();
}

// All slots go to shared memory if they fit. Otherwise, slots with the most touches for their size and time come first.
Places place(const Schedule& schedule, const std::vector<Draft>& drafts, size_t real_bytes, size_t shared_bytes) {
  Places places;
  places.of_slot.resize(schedule.slots.size());
  std::vector<LiveRange> ranges = live_ranges(schedule, real_bytes);
  largest_first(ranges);
  // One Step longer than their live ranges. The next Step then does not overwrite a slot still being read, and both may share a stage.
  std::vector<LiveRange> longer = ranges;
  for (LiveRange& range : longer) ++range.last;
  places.shared_bytes = pack(longer, kInShared, places.of_slot);
  if (places.shared_bytes <= shared_bytes) return places;
  places.shared_bytes = places.all_bytes = pack(ranges, kInShared, places.of_slot);
  if (places.shared_bytes <= shared_bytes) return places;

  std::vector<double> touched(schedule.slots.size(), 0);
  for (const Draft& draft : drafts)
    for (const int i : draft.operands)
      if (i >= 0 && draft.from->operand[size_t(i)]) touched[size_t(draft.from->operand[size_t(i)].slot)] += touches(draft);
  const auto worth = [&](const LiveRange& range) { return touched[size_t(range.slot)] / double(range.last - range.first + 1); };
  std::stable_sort(ranges.begin(), ranges.end(), [&](const LiveRange& a, const LiveRange& b) { return worth(a) > worth(b); });
  Packing part;
  std::vector<LiveRange> rest;
  double in_shared = 0, in_all = 0;  // numbers touched
  for (const LiveRange& range : ranges) {
    const double traffic = touched[size_t(range.slot)] * double(range.bytes);
    in_all += traffic;
    if (part.end_of(range) > shared_bytes) {
      rest.push_back(range);
      continue;
    }
    places.of_slot[size_t(range.slot)] = {kInShared, uint32_t(part.put(range))};
    in_shared += traffic;
  }
  largest_first(rest);
  places.shared_bytes = part.bytes();
  places.arena_bytes = pack(rest, kInArena, places.of_slot);
  places.in_shared = in_shared / in_all;
  return places;
}

// ---------------------------------------------------------------- stages

// A Step's access to a memory: bytes from .. to - 1.
struct Access {
  int memory;
  size_t from, to;
  bool writes;
  bool hinders(const Access& other) const {
    return (writes || other.writes) && memory == other.memory && from < other.to && other.from < to;
  }
};

// Groups consecutive independent Steps into stages.
class Stages {
 public:
  explicit Stages(std::vector<ResidentStep>& steps) : steps_(steps) {}

  void add(ResidentStep step, const std::vector<Access>& accesses) {
    const bool hindered = std::any_of(accesses.begin(), accesses.end(), [&](const Access& a) {
      return std::any_of(stage_.begin(), stage_.end(), [&](const Access& b) { return a.hinders(b); });
    });
    if (hindered || in_stage_ == kStageSteps) {
      in_stage_ = 0;
      stage_.clear();
    }
    step.in_turn = uint8_t(in_stage_++);
    steps_.push_back(step);
    steps_[steps_.size() - size_t(in_stage_)].stage = uint8_t(in_stage_);
    stage_.insert(stage_.end(), accesses.begin(), accesses.end());
  }

 private:
  std::vector<ResidentStep>& steps_;
  int in_stage_ = 0;
  std::vector<Access> stage_;
};

std::string kilobytes(size_t bytes) { return std::to_string((bytes + 1023) / 1024) + " KB"; }

// Why the walk cannot take this Schedule, for any size of memory.
std::optional<std::string> unfit(const Schedule& schedule, size_t real_bytes) {
  for (const Step& step : schedule.steps) {
    if (is_python_loss(step.op)) return "a loss written in Python needs all tasks at once";
    if (!has_resident(step.op)) return std::string("the resident walk has no ") + op_name(step.op);
    const Layer& layer = schedule.layers[size_t(step.layer)];
    if (rectified_output(layer).on || rectified_input(layer).on)
      return std::string("the resident walk has no rectifier in ") + op_name(step.op);
  }
  for (const Slot& slot : schedule.slots)
    if (slot.size > std::numeric_limits<int32_t>::max() / int64_t(real_bytes)) return "an array of a task is larger than 2 GB";
  return {};
}

}  // namespace

bool has_resident(Op op) {
  switch (op) {
#define FASTMAML_MAP(op) case Op::op:
    FASTMAML_RESIDENT_MAPS(FASTMAML_MAP)
#undef FASTMAML_MAP
#define FASTMAML_STEP(op) case Op::op:
    FASTMAML_RESIDENT_STEPS(FASTMAML_STEP)
#undef FASTMAML_STEP
    case Op::pointwise_fwd:
    case Op::pointwise_fwd_jvp:
    case Op::pointwise_bwd:
    case Op::pointwise_bwd_jvp:
    case Op::flatten_fwd:
    case Op::flatten_bwd:
    case Op::linear_fwd:
    case Op::linear_fwd_jvp:
    case Op::linear_fwd_dual:
    case Op::linear_bwd_data:
    case Op::linear_bwd_data_jvp:
    case Op::linear_bwd_data_dual:
    case Op::linear_bwd_weight:
    case Op::linear_bwd_weight_jvp:
      return true;
    default:
      return false;
  }
}

template <class T>
size_t resident_scratch_bytes() {
  return std::max(sizeof(ColumnSums<T>), sizeof(ColumnMoments<T>));
}
template size_t resident_scratch_bytes<float>();
template size_t resident_scratch_bytes<double>();

template <class T>
ResidentCode resident_code(const Schedule& schedule, size_t fast_bytes) {
  ResidentCode code;
  if (const auto why = unfit(schedule, sizeof(T))) return code.refusal = *why, code;
  int64_t width = 1;
  for (const Step& step : schedule.steps) width = std::max(width, width_of<T>(step, schedule.layers[size_t(step.layer)]));
  code.threads = choose_resident_threads(width);
  const std::vector<Draft> drafts = Drafts<T>(schedule, code.threads).all;

  int64_t products = 0;
  bool scratch = false;
  for (const Draft& draft : drafts) {
    products += draft.products;
    scratch = scratch || draft.uses_scratch;
  }
  if (!drafts.empty() && products / int64_t(drafts.size()) > kMostResidentProducts) {
    code.refusal = "its Steps take " + std::to_string(products / int64_t(drafts.size())) + " products each, more than the " +
                   std::to_string(kMostResidentProducts) + " at which one block for a task is still fast";
    return code;
  }

  const size_t reserved = kStaticShared + (scratch ? resident_scratch_bytes<T>() : 0);
  const size_t room = fast_bytes > reserved ? fast_bytes - reserved : 0;
  const Places places = place(schedule, drafts, sizeof(T), room);
  if (places.in_shared < kLeastInShared) {
    code.refusal = "a task needs " + kilobytes(places.all_bytes + reserved) + " of shared memory, or most of them, and a block has " +
                   kilobytes(fast_bytes);
    return code;
  }
  code.shared_bytes = places.shared_bytes + reserved - kStaticShared;
  code.arena_bytes = places.arena_bytes;

  std::vector<ResidentStep> steps;
  Stages stages(steps);
  for (const Draft& draft : drafts) {
    ResidentStep step = draft.step;
    std::vector<Access> accesses;
    if (draft.uses_scratch) accesses.push_back({kInScratch, 0, 1, true});
    for (size_t i = 0; i < kMaxOperands; ++i) {
      if (draft.operands[i] < 0) continue;
      const fastmaml::Operand& operand = draft.from->operand[size_t(draft.operands[i])];
      if (!operand) continue;
      const Slot& slot = schedule.slots[size_t(operand.slot)];
      const size_t bytes = element_bytes(slot.type, sizeof(T));
      Place at = places.of_slot[size_t(operand.slot)];
      if (slot.arg != Arg::none) at = {kFirstArg + static_cast<int>(slot.arg), 0};
      accesses.push_back(
          {at.memory, at.offset, at.offset + size_t(slot.size) * bytes, size_t(draft.operands[i]) < op_outputs(draft.from->op)});
      at.offset += uint32_t(size_t(operand.offset) * bytes);
      step.place[i] = at;
    }
    stages.add(step, accesses);
  }
  code.count = int(steps.size());
  steps.resize(steps.size() + kStageSteps);  // the kernel reads one stage ahead
  code.steps.resize(steps.size() * sizeof(ResidentStep));
  std::memcpy(code.steps.data(), steps.data(), code.steps.size());
  for (const Slot& slot : schedule.slots)
    if (slot.arg != Arg::none && slot.size > 0)
      code.element_bytes[static_cast<size_t>(slot.arg)] = uint8_t(element_bytes(slot.type, sizeof(T)));
  return code;
}
template ResidentCode resident_code<float>(const Schedule&, size_t);
template ResidentCode resident_code<double>(const Schedule&, size_t);

}  // namespace fastmaml::FASTMAML_CUDA_NS
