// The forward pass and its tangent, a node of the network after the other.
#include <stdexcept>

#include "program/passes.h"

namespace fastmaml {
namespace {

class ForwardWalk {
 public:
  ForwardWalk(Schedule& out, const Program& net, Tape& tape, Pass pass, Operand buffers)
      : out_(out), net_(net), tape_(tape), pass_(pass), buffers_(buffers) {}

  void node(int i) {
    const Node& node = net_.nodes[i];
    const int in = node.inputs[0], made = i + 1;
    const int64_t size = tape_.examples * net_.values[made].size();
    const Operand x = tape_.value[in], x_dot = tangent() ? tape_.dot[in] : Operand{};
    switch (node.kind) {
      case NodeKind::linear:
        product(node, made, size, x, x_dot, Op::linear_fwd, Op::linear_fwd_jvp, Op::linear_fwd_dual);
        return;
      case NodeKind::conv2d:
        product(node, made, size, x, x_dot, Op::conv2d_fwd, Op::conv2d_fwd_jvp, Op::conv2d_fwd_dual);
        return;
      case NodeKind::batch_norm:
        batch_norm(node, i, size, x, x_dot);
        return;
      case NodeKind::norm_pool_act:
        norm_pool_act(node, i, size, x, x_dot);
        return;
      case NodeKind::group_norm:
        group_norm(node, i, size, x, x_dot);
        return;
      case NodeKind::pointwise:
        if (primal()) step(Op::pointwise_fwd, node, {tape_.value[made] = out_.arena(size), x});
        if (x_dot) step(Op::pointwise_fwd_jvp, node, {tape_.dot[made] = out_.arena(size), x, x_dot});
        return;
      case NodeKind::max_pool2d:
        if (primal()) {
          tape_.value[made] = out_.arena(size);
          tape_.saved[i] = out_.arena(size, Type::index);
          step(Op::max_pool2d_fwd, node, {tape_.value[made], tape_.saved[i], x});
        }
        if (x_dot) step(Op::max_pool2d_fwd_jvp, node, {tape_.dot[made] = out_.arena(size), x_dot, tape_.saved[i]});
        return;
      case NodeKind::avg_pool2d:
        linear_map(Op::avg_pool2d_fwd, node, made, size, x, x_dot);
        return;
      case NodeKind::flatten: {
        const Flatten& f = std::get<Flatten>(node.layer);
        if (f.C == 1 || f.H * f.W == 1) {  // the same order already
          if (primal()) tape_.value[made] = x;
          if (tangent()) tape_.dot[made] = x_dot;
        } else {
          linear_map(Op::flatten_fwd, node, made, size, x, x_dot);
        }
        return;
      }
      case NodeKind::add: {
        const int other = node.inputs[1];
        const Layer flat = Vector{size};
        if (primal()) out_.step(Op::add, flat, 1, {tape_.value[made] = out_.arena(size), x, tape_.value[other]});
        if (!tangent()) return;
        const Operand b = tape_.dot[other];
        if (x_dot && b)
          out_.step(Op::add, flat, 1, {tape_.dot[made] = out_.arena(size), x_dot, b});
        else
          tape_.dot[made] = x_dot ? x_dot : b;
        return;
      }
    }
  }

 private:
  Schedule& out_;
  const Program& net_;
  Tape& tape_;
  const Pass pass_;
  const Operand buffers_;

  bool primal() const { return is_primal(pass_); }
  bool tangent() const { return is_tangent(pass_); }

  void step(Op op, const Node& node, std::initializer_list<Operand> operands) { step(op, node, node.layer, operands); }

  void step(Op op, const Node& node, const Layer& layer, std::initializer_list<Operand> operands) {
    out_.step(op, layer, tape_.examples, operands, node.support_stats ? tape_.stat_examples : tape_.examples);
  }

  // What the tangent of a layer takes of its value.
  Operand if_rectified(const Rectified& y, int made) const { return y.on ? tape_.value[made] : Operand{}; }

  void product(const Node& node, int made, int64_t size, Operand x, Operand x_dot, Op fwd, Op fwd_jvp, Op fwd_dual) {
    const Operand w = param_of(net_, tape_.params, node.weight), b = param_of(net_, tape_.params, node.bias);
    const Operand w_dot = param_of(net_, tape_.params_dot, node.weight), b_dot = param_of(net_, tape_.params_dot, node.bias);
    if (primal()) tape_.value[made] = out_.arena(size);
    if (tangent()) tape_.dot[made] = out_.arena(size);
    if (pass_ == Pass::primal) step(fwd, node, {tape_.value[made], x, w, b});
    if (pass_ == Pass::tangent)
      step(fwd_jvp, node, {tape_.dot[made], x, x_dot, w, w_dot, b_dot, if_rectified(rectified_output(node.layer), made)});
    if (pass_ == Pass::dual) step(fwd_dual, node, {tape_.value[made], tape_.dot[made], x, x_dot, w, w_dot, b, b_dot});
  }

  void linear_map(Op op, const Node& node, int made, int64_t size, Operand x, Operand x_dot) {
    if (primal()) step(op, node, {tape_.value[made] = out_.arena(size), x});
    if (x_dot) step(op, node, {tape_.dot[made] = out_.arena(size), x_dot});
  }

  void batch_norm(const Node& node, int i, int64_t size, Operand x, Operand x_dot) {
    const BatchNorm& shape = std::get<BatchNorm>(node.layer);
    const Operand gamma = param_of(net_, tape_.params, node.weight), beta = param_of(net_, tape_.params, node.bias);
    if (primal()) {
      const Operand stats = tape_.saved[i] = statistics(node, shape, x);
      step(Op::batch_norm_fwd, node, {tape_.value[i + 1] = out_.arena(size), x, stats, gamma, beta});
    }
    if (!tangent()) return;
    const Operand gamma_dot = param_of(net_, tape_.params_dot, node.weight), beta_dot = param_of(net_, tape_.params_dot, node.bias);
    if (!x_dot && !gamma_dot && !beta_dot) return;
    tape_.saved_dot[i] = statistics_dot(node, shape, x, x_dot, tape_.saved[i]);
    step(Op::batch_norm_fwd_jvp, node,
         {tape_.dot[i + 1] = out_.arena(size), x, x_dot, tape_.saved[i], tape_.saved_dot[i], gamma, gamma_dot, beta_dot});
  }

  Operand statistics(const Node& node, const BatchNorm& shape, Operand x) {
    const Operand stats = out_.arena(3 * shape.C);
    if (!shape.frozen) {
      step(Op::batch_norm_stats, node, shape, {stats, x});
      return stats;
    }
    if (!buffers_) throw std::logic_error("a frozen batch norm needs buffers");
    step(Op::batch_norm_frozen_stats, node, shape,
         {stats, offset(buffers_, net_.buffers[node.mean].offset), offset(buffers_, net_.buffers[node.var].offset)});
    return stats;
  }

  Operand statistics_dot(const Node& node, const BatchNorm& shape, Operand x, Operand x_dot, Operand stats) {
    if (!x_dot || shape.frozen) return {};
    const Operand stats_dot = out_.arena(2 * shape.C);
    step(Op::batch_norm_stats_jvp, node, shape, {stats_dot, x, x_dot, stats});
    return stats_dot;
  }

  void norm_pool_act(const Node& node, int i, int64_t size, Operand x, Operand x_dot) {
    const NormPoolAct& shape = std::get<NormPoolAct>(node.layer);
    const Operand gamma = param_of(net_, tape_.params, node.weight), beta = param_of(net_, tape_.params, node.bias), none;
    if (primal()) {
      const Operand stats = tape_.saved[i] = statistics(node, shape.norm, x);
      const Operand y = tape_.value[i + 1] = out_.arena(size);
      if (shape.pooled) tape_.tap[i] = out_.arena(size, Type::tap);
      tape_.winner[i] = shape.pooled ? out_.arena(size) : x;
      step(Op::norm_pool_act_fwd, node, {y, tape_.tap[i], shape.pooled ? tape_.winner[i] : none, x, stats, gamma, beta});
    }
    if (!tangent()) return;
    const Operand gamma_dot = param_of(net_, tape_.params_dot, node.weight), beta_dot = param_of(net_, tape_.params_dot, node.bias);
    if (!x_dot && !gamma_dot && !beta_dot) return;
    tape_.saved_dot[i] = statistics_dot(node, shape.norm, x, x_dot, tape_.saved[i]);
    const bool picks = shape.pooled && x_dot;
    tape_.winner_dot[i] = picks ? out_.arena(size) : x_dot;
    step(Op::norm_pool_act_fwd_jvp, node,
         {tape_.dot[i + 1] = out_.arena(size), picks ? tape_.winner_dot[i] : none, tape_.tap[i], tape_.winner[i], x_dot, tape_.saved[i],
          tape_.saved_dot[i], gamma, gamma_dot, beta, beta_dot});
  }

  void group_norm(const Node& node, int i, int64_t size, Operand x, Operand x_dot) {
    const int64_t stats = 2 * tape_.examples * std::get<GroupNorm>(node.layer).groups;
    const Operand gamma = param_of(net_, tape_.params, node.weight), beta = param_of(net_, tape_.params, node.bias);
    if (primal())
      step(Op::group_norm_fwd, node, {tape_.value[i + 1] = out_.arena(size), tape_.saved[i] = out_.arena(stats), x, gamma, beta});
    if (!tangent()) return;
    const Operand gamma_dot = param_of(net_, tape_.params_dot, node.weight), beta_dot = param_of(net_, tape_.params_dot, node.bias);
    if (!x_dot && !gamma_dot && !beta_dot) return;
    step(Op::group_norm_fwd_jvp, node,
         {tape_.dot[i + 1] = out_.arena(size), tape_.saved_dot[i] = out_.arena(stats), x, x_dot, tape_.saved[i], gamma, gamma_dot, beta_dot,
          if_rectified(rectified_output(node.layer), i + 1)});
  }
};

}  // namespace

void forward(Schedule& out, const Program& net, Tape& tape, Pass pass, Operand x, Operand x_dot, Operand buffers) {
  if (is_primal(pass)) {
    tape.value.assign(net.values.size(), {});
    tape.saved.assign(net.nodes.size(), {});
    tape.tap.assign(net.nodes.size(), {});
    tape.winner.assign(net.nodes.size(), {});
    tape.value[0] = x;
  }
  if (is_tangent(pass)) {
    tape.dot.assign(net.values.size(), {});
    tape.saved_dot.assign(net.nodes.size(), {});
    tape.winner_dot.assign(net.nodes.size(), {});
    tape.dot[0] = x_dot;
  }
  ForwardWalk walk(out, net, tape, pass, buffers);
  for (size_t i = 0; i < net.nodes.size(); ++i) walk.node(int(i));
}

}  // namespace fastmaml
