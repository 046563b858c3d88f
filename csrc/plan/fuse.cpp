#include "plan/fuse.h"

#include <algorithm>
#include <limits>
#include <optional>

namespace fastmaml {
namespace {

constexpr Op kNormPoolActOps[] = {Op::norm_pool_act_fwd,        Op::norm_pool_act_fwd_jvp,
                                  Op::norm_pool_act_bwd_weight, Op::norm_pool_act_bwd_weight_jvp,
                                  Op::norm_pool_act_bwd_data,   Op::norm_pool_act_bwd_data_jvp};

constexpr int kNobody = -1;

// For each value: the one node that reads it, or kNobody.
std::vector<int> only_readers(const Program& net) {
  std::vector<int> reader(net.values.size(), kNobody), reads(net.values.size(), 0);
  for (size_t i = 0; i < net.nodes.size(); ++i)
    for (int v : net.nodes[i].inputs) {
      reader[v] = int(i);
      ++reads[v];
    }
  ++reads[net.output];
  for (size_t v = 0; v < reads.size(); ++v)
    if (reads[v] != 1) reader[v] = kNobody;
  return reader;
}

// A tap and its complement must fit a byte.
bool taps_fit(const Pool2d& pool) { return pool.KH * pool.KW <= int64_t(std::numeric_limits<int8_t>::max()) + 1; }

// Leaky ReLUs with a negative slope are not fused. The sign of y no longer gives the mask, and the max-pool winner may
// change.
bool rectifies(const Pointwise& f) { return f.kind == Pointwise::Kind::relu || (f.kind == Pointwise::Kind::leaky_relu && f.number > 0); }

double slope_of(const Pointwise& f) { return f.kind == Pointwise::Kind::relu ? 0.0 : f.number; }

Pool2d no_pool(const Shape& x) { return {x.C, x.H, x.W, x.H, x.W, 1, 1, 1, 1, 0, 0, true}; }

// The network without its absorbed nodes.
Program without(const Program& net, std::vector<Node> nodes, const std::vector<bool>& absorbed) {
  Program out = net;
  out.nodes.clear();
  out.values = {net.values[0]};
  std::vector<int> now(net.values.size(), 0);  // the new index of each remaining value
  for (size_t i = 0; i < nodes.size(); ++i) {
    if (absorbed[i]) continue;
    for (int& v : nodes[i].inputs) v = now[v];
    now[i + 1] = int(out.values.size());
    out.nodes.push_back(nodes[i]);
    out.values.push_back(net.values[i + 1]);
  }
  out.output = now[net.output];
  return out;
}

Program join_norm_pool_act(const Program& net) {
  const std::vector<int> reader = only_readers(net);
  std::vector<Node> nodes = net.nodes;  // by the value they make, minus one; absorbed nodes are marked below
  std::vector<bool> absorbed(nodes.size(), false);
  for (size_t i = 0; i < nodes.size(); ++i) {
    if (nodes[i].kind != NodeKind::batch_norm) continue;
    int pool = reader[i + 1];
    if (pool != kNobody && nodes[pool].kind != NodeKind::max_pool2d) pool = kNobody;
    const int act = reader[pool == kNobody ? i + 1 : pool + 1];
    if (act == kNobody || nodes[act].kind != NodeKind::pointwise) continue;
    const Pointwise& f = std::get<Pointwise>(nodes[act].layer);
    if (!rectifies(f) || (pool != kNobody && !taps_fit(std::get<Pool2d>(nodes[pool].layer)))) continue;
    Node fused = nodes[i];
    fused.kind = NodeKind::norm_pool_act;
    fused.layer = NormPoolAct{std::get<BatchNorm>(nodes[i].layer),
                              pool == kNobody ? no_pool(net.values[nodes[i].inputs[0]]) : std::get<Pool2d>(nodes[pool].layer),
                              pool != kNobody, slope_of(f)};
    nodes[act] = fused;
    absorbed[i] = true;
    if (pool != kNobody) absorbed[pool] = true;
  }
  return without(net, std::move(nodes), absorbed);
}

bool is_product(NodeKind kind) { return kind == NodeKind::linear || kind == NodeKind::conv2d; }

void rectify_output(Layer& layer, Rectified how) {
  if (auto* s = std::get_if<Linear>(&layer)) s->y = how;
  if (auto* s = std::get_if<Conv2d>(&layer)) s->y = how;
  if (auto* s = std::get_if<GroupNorm>(&layer)) s->y = how;
}

void rectify_input(Layer& layer, Rectified how) {
  if (auto* s = std::get_if<Linear>(&layer)) s->x = how;
  if (auto* s = std::get_if<Conv2d>(&layer)) s->x = how;
}

// Joins a rectifier to the layers around it, if both directions are possible.
// Forward: a linear, conv2d or group_norm layer rectifies its output, if only the rectifier reads that output.
// Backward: the one linear or conv2d layer that reads y (flattened or not) masks the gradient that it writes.
// A group norm can also mask the gradient that it reads, so y may have any readers.
Program join_rectifiers(const Program& net) {
  const std::vector<int> reader = only_readers(net);
  std::vector<Node> nodes = net.nodes;
  std::vector<bool> absorbed(nodes.size(), false);
  for (size_t i = 0; i < nodes.size(); ++i) {
    const int act = rectified_output(nodes[i].layer).on ? kNobody : reader[i + 1];
    if (act == kNobody || nodes[act].kind != NodeKind::pointwise || !rectifies(std::get<Pointwise>(nodes[act].layer))) continue;
    const bool norm = nodes[i].kind == NodeKind::group_norm;
    int next = reader[act + 1];
    while (next != kNobody && nodes[next].kind == NodeKind::flatten) next = reader[next + 1];
    const bool masked = next != kNobody && is_product(nodes[next].kind);
    if (!norm && !(masked && is_product(nodes[i].kind))) continue;
    const Rectified how{true, slope_of(std::get<Pointwise>(nodes[act].layer))};
    if (masked) rectify_input(nodes[next].layer, how);
    rectify_output(nodes[i].layer, how);
    nodes[act] = nodes[i];
    absorbed[i] = true;
  }
  return without(net, std::move(nodes), absorbed);
}

// A pointwise function and its tangent at the same x, in either order.
std::optional<Step> fused(const Step& a, const Step& b) {
  if (a.op == Op::pointwise_fwd_jvp || a.op == Op::pointwise_bwd_jvp) {
    if (b.op == Op::pointwise_fwd || b.op == Op::pointwise_bwd) return fused(b, a);
    return {};
  }
  const auto& [value, tangent] = std::pair(a.operand, b.operand);
  Step both = b;
  if (a.op == Op::pointwise_fwd && b.op == Op::pointwise_fwd_jvp && value[1] == tangent[1]) {
    both.op = Op::pointwise_fwd_dual;
    both.operand = {value[0], tangent[0], tangent[1], tangent[2]};
  } else if (a.op == Op::pointwise_bwd && b.op == Op::pointwise_bwd_jvp && value[1] == tangent[1] && value[2] == tangent[3]) {
    both.op = Op::pointwise_bwd_dual;
    both.operand = {value[0], tangent[0], tangent[1], tangent[2], tangent[3], tangent[4]};
  } else {
    return {};
  }
  return both;
}

Schedule join_pointwise(Schedule schedule) {
  std::vector<Step> joint;
  for (const Step& step : schedule.steps) {
    const std::optional<Step> both = joint.empty() ? std::nullopt : fused(joint.back(), step);
    if (both)
      joint.back() = *both;
    else
      joint.push_back(step);
  }
  schedule.steps = std::move(joint);
  return schedule;
}

// Joins rate_grad g lambda;  adjoint_update lambda hu;  scale_by_rate u rate lambda.
// adjoint_update is required, with one or both of the others.
Schedule join_sgd_adjoint(Schedule schedule) {
  const std::vector<Step> parts = std::move(schedule.steps);
  schedule.steps.clear();
  for (size_t i = 0; i < parts.size(); ++i) {
    const auto follows = [&](size_t at, Op op, const Operand& lambda, int role) {
      return at < parts.size() && parts[at].op == op && parts[at].operand[role] == lambda;
    };
    const Step* rate_grad =
        parts[i].op == Op::rate_grad && follows(i + 1, Op::adjoint_update, parts[i].operand[2], 0) ? &parts[i] : nullptr;
    const size_t at = rate_grad ? i + 1 : i;
    const Operand lambda = parts[at].operand[0];
    const Step* scale = parts[at].op == Op::adjoint_update && follows(at + 1, Op::scale_by_rate, lambda, 2) ? &parts[at + 1] : nullptr;
    if (!rate_grad && !scale) {
      schedule.steps.push_back(parts[i]);
      continue;
    }
    const auto of = [](const Step* step, int role) { return step ? step->operand[role] : Operand{}; };
    Step fused = parts[at];
    fused.op = Op::sgd_adjoint;
    fused.operand = {lambda, of(rate_grad, 0), of(scale, 0), parts[at].operand[1], of(rate_grad, 1), of(scale, 1)};
    schedule.steps.push_back(fused);
    i = scale ? at + 1 : at;
  }
  return schedule;
}

}  // namespace

Program with_torch_weights(const Program& net) {
  Program out = net;
  for (Node& node : out.nodes)
    if (auto* s = std::get_if<Linear>(&node.layer)) {
      s->out_in = true;
      out.params[size_t(node.weight)].order = Param::Order::torch;
    }
  return out;
}

Program fuse(const Program& net, const Capabilities& backend) {
  Program out = backend.out_in ? with_torch_weights(net) : net;
  if (std::all_of(std::begin(kNormPoolActOps), std::end(kNormPoolActOps), backend.supports)) out = join_norm_pool_act(out);
  if (backend.rectifies) out = join_rectifiers(out);
  return out;
}

Schedule fuse(Schedule schedule, const std::function<bool(Op)>& supports) {
  if (supports(Op::pointwise_fwd_dual) && supports(Op::pointwise_bwd_dual)) schedule = join_pointwise(std::move(schedule));
  return supports(Op::sgd_adjoint) ? join_sgd_adjoint(std::move(schedule)) : schedule;
}

}  // namespace fastmaml
