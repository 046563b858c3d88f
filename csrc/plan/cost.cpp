#include "plan/cost.h"

#include <algorithm>
#include <array>
#include <initializer_list>
#include <stdexcept>

namespace fastmaml {
namespace {

std::vector<Role> parse_roles(Op op) {
  std::string_view text = op_roles(op);
  std::vector<Role> out;
  while (!text.empty()) {
    const size_t end = std::min(text.find(' '), text.size());
    const std::string_view word = text.substr(0, end);
    const bool optional = word.front() == '[';
    out.push_back({optional ? word.substr(1, word.size() - 2) : word, optional});
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return out;
}

// x, x_dot, dx and dx_dot have the size of x.
bool one_of(std::string_view role, std::initializer_list<std::string_view> names) {
  if (role.ends_with("_dot")) role.remove_suffix(4);
  for (const std::string_view name : names)
    if (role == name || (role.size() == name.size() + 1 && role.front() == 'd' && role.substr(1) == name)) return true;
  return false;
}

struct OperandSize {
  std::string_view role;
  int64_t N;

  int64_t operator()(const Vector& s) const {
    if (role == "state") return 5;
    if (role == "settings") return 3;
    return role == "history" || role == "lam" ? 1 : N * s.size;
  }
  int64_t operator()(const Axpy& s) const { return role == "alpha" ? 1 : s.size; }
  int64_t operator()(const Clip& s) const { return s.size; }
  int64_t operator()(const Momentum& s) const { return s.size; }
  int64_t operator()(const Adam& s) const { return role == "step_count" ? 1 : s.size; }
  int64_t operator()(const PythonLoss& s) const { return role == "loss" ? 1 : N * s.C * s.H * s.W; }
  int64_t operator()(const Add& s) const { return N * s.size; }
  int64_t operator()(const Linear& s) const {
    if (role == "rate") return 1;
    return one_of(role, {"x"}) ? N * s.in : one_of(role, {"y"}) ? N * s.out : one_of(role, {"w", "w_next", "w_adj"}) ? s.in * s.out : s.out;
  }
  int64_t operator()(const Conv2d& s) const {
    if (one_of(role, {"x"})) return N * s.C * s.H * s.W;
    if (one_of(role, {"y"})) return N * s.F * s.OH * s.OW;
    return one_of(role, {"w"}) ? s.KH * s.KW * s.C * s.F : s.F;
  }
  int64_t operator()(const BatchNorm& s) const {
    if (one_of(role, {"x", "y"})) return N * s.spatial * s.C;
    return role == "stats" ? 3 * s.C : role == "stats_dot" ? 2 * s.C : s.C;
  }
  int64_t operator()(const GroupNorm& s) const {
    if (one_of(role, {"x", "y"})) return N * s.spatial * s.channels;
    return one_of(role, {"stats"}) ? N * s.groups * 2 : s.channels;
  }
  int64_t operator()(const Pointwise& s) const { return N * s.size; }
  int64_t operator()(const Pool2d& s) const { return one_of(role, {"x"}) ? N * s.H * s.W * s.C : N * s.OH * s.OW * s.C; }
  int64_t operator()(const NormPoolAct& s) const {
    if (one_of(role, {"x"})) return N * s.pool.H * s.pool.W * s.pool.C;
    if (one_of(role, {"y", "winner"}) || role == "tap") return N * s.pool.OH * s.pool.OW * s.pool.C;
    return (*this)(s.norm);
  }
  int64_t operator()(const Flatten& s) const { return N * s.H * s.W * s.C; }
  int64_t operator()(const Loss& s) const { return role == "loss" ? 1 : role == "labels" || role == "weights" ? N : N * s.size; }
};

// The column of op.h.
int work_of(const Step& step) {
  const auto has = [&](int operand) { return bool(step.operand[size_t(operand)]) ? 1 : 0; };
  switch (step.op) {
#define X(name, outputs, in_place, work, roles) \
  case Op::name:                                \
    return work;
    FASTMAML_ALL_OPS(X)
#undef X
  }
  throw std::logic_error("not an op");
}

// How many numbers lie side by side; sizes_of asks products for sizes of their own.
struct Channels {
  int64_t operator()(const BatchNorm& s) const { return s.C; }
  int64_t operator()(const GroupNorm& s) const { return s.channels; }
  int64_t operator()(const Pool2d& s) const { return s.C; }
  int64_t operator()(const NormPoolAct& s) const { return s.pool.C; }
  int64_t operator()(const Flatten& s) const { return s.C; }
  int64_t operator()(const Loss& s) const { return s.size; }
  int64_t operator()(const Pointwise&) const { return 1; }
  int64_t operator()(const Add&) const { return 1; }
  int64_t operator()(const PythonLoss&) const { return 1; }
  int64_t operator()(const Vector&) const { return 1; }
  int64_t operator()(const Axpy&) const { return 1; }
  int64_t operator()(const Clip&) const { return 1; }
  int64_t operator()(const Momentum&) const { return 1; }
  int64_t operator()(const Adam&) const { return 1; }
  int64_t operator()(const Linear&) const { return 1; }
  int64_t operator()(const Conv2d&) const { return 1; }
};

std::string image(int64_t C, int64_t H, int64_t W) { return std::to_string(C) + "x" + std::to_string(H) + "x" + std::to_string(W); }

struct Words {
  std::string operator()(const Vector& s) const { return "vector " + std::to_string(s.size); }
  std::string operator()(const Axpy& s) const { return "vector " + std::to_string(s.size); }
  std::string operator()(const Clip& s) const { return "vector " + std::to_string(s.size); }
  std::string operator()(const Momentum& s) const { return "vector " + std::to_string(s.size); }
  std::string operator()(const Adam& s) const { return "vector " + std::to_string(s.size); }
  std::string operator()(const Add& s) const { return "vector " + std::to_string(s.size); }
  std::string operator()(const PythonLoss& s) const { return "loss " + image(s.C, s.H, s.W); }
  std::string operator()(const Linear& s) const { return "linear " + std::to_string(s.in) + " to " + std::to_string(s.out); }
  std::string operator()(const Conv2d& s) const {
    return "conv2d " + image(s.C, s.H, s.W) + " to " + image(s.F, s.OH, s.OW) + ", " + std::to_string(s.KH) + "x" + std::to_string(s.KW);
  }
  std::string operator()(const BatchNorm& s) const { return "batch_norm " + std::to_string(s.C) + "x" + std::to_string(s.spatial); }
  std::string operator()(const GroupNorm& s) const {
    return "group_norm " + std::to_string(s.channels) + "x" + std::to_string(s.spatial) + ", " + std::to_string(s.groups) + " groups";
  }
  std::string operator()(const Pointwise& s) const { return pointwise_name(s.kind) + (" " + std::to_string(s.size)); }
  std::string operator()(const Pool2d& s) const { return "pool2d " + image(s.C, s.H, s.W) + " to " + image(s.C, s.OH, s.OW); }
  std::string operator()(const NormPoolAct& s) const {
    return "norm_pool_act " + image(s.pool.C, s.pool.H, s.pool.W) + " to " + image(s.pool.C, s.pool.OH, s.pool.OW);
  }
  std::string operator()(const Flatten& s) const { return "flatten " + image(s.C, s.H, s.W); }
  std::string operator()(const Loss& s) const { return "loss " + std::to_string(s.size); }
};

}  // namespace

std::vector<Role> roles(Op op) {
  static const std::array<std::vector<Role>, kOps> all = [] {
    std::array<std::vector<Role>, kOps> parsed;
    for (int op = 0; op < kOps; ++op) parsed[size_t(op)] = parse_roles(static_cast<Op>(op));
    return parsed;
  }();
  return all[static_cast<size_t>(op)];
}

int64_t operand_size(const Layer& layer, std::string_view role, int64_t examples) { return std::visit(OperandSize{role, examples}, layer); }

size_t operand_element_bytes(std::string_view role, size_t real_bytes) {
  return role == "index" ? sizeof(int32_t) : role == "tap" ? sizeof(int8_t) : role == "labels" ? sizeof(int64_t) : real_bytes;
}

Cost cost_of(const Step& step, const Layer& layer, size_t real_bytes) {
  Cost cost;
  int64_t largest = 0;
  const std::vector<Role> all = roles(step.op);
  for (size_t i = 0; i < all.size(); ++i) {
    if (!step.operand[i]) continue;
    const int64_t size = operand_size(layer, all[i].name, step.examples);
    const bool twice = i < op_outputs(step.op) && op_in_place(step.op);
    cost.bytes += double(size) * double(operand_element_bytes(all[i].name, real_bytes)) * (twice ? 2 : 1);
    largest = std::max(largest, size);
  }
  if (const auto* s = std::get_if<Linear>(&layer))
    cost.products = 2.0 * double(step.examples * s->in * s->out) * work_of(step);
  else if (const auto* s = std::get_if<Conv2d>(&layer))
    cost.products = 2.0 * double(step.examples * s->OH * s->OW * s->F) * double(s->KH * s->KW * s->C) * work_of(step);
  else
    cost.other = double(largest) * work_of(step);
  return cost;
}

std::vector<int64_t> sizes_of(const Step& step, const Layer& layer) {
  const int64_t N = step.examples;
  if (const auto* s = std::get_if<Linear>(&layer)) return {N, s->in, s->out, 1};
  if (const auto* s = std::get_if<Conv2d>(&layer)) return {N * s->OH * s->OW, s->KH * s->KW * s->C, s->F, s->OW};
  const int64_t channels = std::visit(Channels(), layer);
  int64_t largest = 0;
  const std::vector<Role> all = roles(step.op);
  for (size_t i = 0; i < all.size(); ++i)
    if (step.operand[i]) largest = std::max(largest, operand_size(layer, all[i].name, N));
  return {std::max<int64_t>(largest / channels, 1), channels};
}

std::string words_of(const Layer& layer) { return std::visit(Words(), layer); }

}  // namespace fastmaml
