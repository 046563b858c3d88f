// The backward pass and its tangent, from the last node of the network to the first.
#include "program/param_grad.h"
#include "program/passes.h"

namespace fastmaml {
namespace {

class BackwardWalk {
 public:
  BackwardWalk(Schedule& out, const Program& net, Tape& tape, Pass pass, Operand grad, Operand grad_dot, bool want_input)
      : out_(out),
        net_(net),
        tape_(tape),
        pass_(pass),
        grad_(out, net, grad),
        grad_dot_(out, net, grad_dot),
        needed_(net.values.size(), false),
        masked_(net.values.size(), false),
        centered_(net.values.size(), false) {
    needed_[0] = want_input;
    for (size_t i = 0; i < net.nodes.size(); ++i) {
      const Node& node = net.nodes[i];
      bool need = node.weight >= 0 || node.bias >= 0;
      for (int v : node.inputs) need = need || needed_[v];
      needed_[i + 1] = need;
    }
    std::vector<int> readers(net.values.size(), 0);
    for (const Node& node : net.nodes)
      for (int v : node.inputs) ++readers[v];
    for (const Node& node : net.nodes) {
      const bool centers = (node.kind == NodeKind::batch_norm && !std::get<BatchNorm>(node.layer).frozen) ||
                           (node.kind == NodeKind::norm_pool_act && !std::get<NormPoolAct>(node.layer).norm.frozen);
      if (centers && readers[node.inputs[0]] == 1 && node.inputs[0] != net.output) centered_[node.inputs[0]] = true;
    }
    for (size_t i = net.nodes.size(); i-- > 0;) {
      const Node& node = net.nodes[i];
      const bool through = node.kind == NodeKind::flatten && masked_[i + 1];
      if (through || rectified_input(node.layer).on) masked_[size_t(node.inputs[0])] = true;
    }
  }

  void node(int i) {
    const Node& node = net_.nodes[i];
    const int made = i + 1;
    if (!needed_[made] || !tape_.d[made]) return;
    const int in = node.inputs[0];
    dy_ = tape_.d[made];
    dy_dot_ = tangent() ? tape_.d_dot[made] : Operand{};
    x_ = tape_.value[in];
    x_dot_ = tangent() ? tape_.dot[in] : Operand{};
    size_ = tape_.examples * net_.values[in].size();
    switch (node.kind) {
      case NodeKind::linear:
        product(node, made, {Op::linear_bwd_data, Op::linear_bwd_data_jvp, Op::linear_bwd_data_dual}, Op::linear_bwd_weight,
                Op::linear_bwd_weight_jvp);
        return;
      case NodeKind::conv2d:
        product(node, made, {Op::conv2d_bwd_data, Op::conv2d_bwd_data_jvp, Op::conv2d_bwd_data_dual}, Op::conv2d_bwd_weight,
                Op::conv2d_bwd_weight_jvp);
        return;
      case NodeKind::batch_norm:
        batch_norm(node, i);
        return;
      case NodeKind::norm_pool_act:
        norm_pool_act(node, i);
        return;
      case NodeKind::group_norm:
        group_norm(node, i);
        return;
      case NodeKind::pointwise:
        if (primal()) step(Op::pointwise_bwd, node, {new_d(), x_, dy_});
        if (tangent()) step(Op::pointwise_bwd_jvp, node, {new_d_dot(), x_, x_dot_, dy_, dy_dot_});
        return contribute(in);
      case NodeKind::max_pool2d:
        if (primal()) step(Op::max_pool2d_bwd, node, {new_d(), dy_, tape_.saved[i]});
        if (tangent()) step(Op::max_pool2d_bwd, node, {new_d_dot(), dy_dot_, tape_.saved[i]});
        return contribute(in);
      case NodeKind::avg_pool2d:
        return linear_map(Op::avg_pool2d_bwd, node, in);
      case NodeKind::flatten: {
        const Flatten& f = std::get<Flatten>(node.layer);
        if (f.C != 1 && f.H * f.W != 1) return linear_map(Op::flatten_bwd, node, in);
        d_ = dy_;
        d_dot_ = dy_dot_;
        return contribute(in);
      }
      case NodeKind::add:
        for (int v : node.inputs) {
          d_ = dy_;
          d_dot_ = dy_dot_;
          if (needed_[v]) contribute(v);
        }
        return;
    }
  }

  void finish() {
    if (primal()) grad_.clear_unwritten();
    if (tangent()) grad_dot_.clear_unwritten();
  }

 private:
  struct DataOps {
    Op primal, tangent, dual;
  };

  Schedule& out_;
  const Program& net_;
  Tape& tape_;
  const Pass pass_;
  ParamGrad grad_, grad_dot_;
  std::vector<bool> needed_;         // by value: does a parameter (or a wanted input) lie upstream?
  std::vector<bool> masked_;         // by value: has its reader gone back through the rectifier that made it?
  std::vector<bool> centered_;       // by value: does a batch norm alone read it, and take its mean off?
  Operand x_, x_dot_, dy_, dy_dot_;  // of the current node
  Operand d_, d_dot_;                // what it contributes to its input's gradient
  int64_t size_ = 0;                 // elements of its input

  bool primal() const { return is_primal(pass_); }
  bool tangent() const { return is_tangent(pass_); }
  Operand new_d() { return d_ = out_.arena(size_); }
  Operand new_d_dot() { return d_dot_ = out_.arena(size_); }

  void step(Op op, const Node& node, std::initializer_list<Operand> operands) {
    out_.step(op, node.layer, tape_.examples, operands, node.support_stats ? tape_.stat_examples : tape_.examples);
  }

  void accumulate(Operand& sum, Operand more, int64_t size) {
    if (!sum) {
      sum = more;
      return;
    }
    const Operand both = out_.arena(size);
    out_.step(Op::add, Vector{size}, 1, {both, sum, more});
    sum = both;
  }

  void contribute(int v) {
    const int64_t size = tape_.examples * net_.values[v].size();
    if (primal()) accumulate(tape_.d[v], d_, size);
    if (tangent()) accumulate(tape_.d_dot[v], d_dot_, size);
  }

  void linear_map(Op op, const Node& node, int in) {
    if (!needed_[in]) return;
    if (primal()) step(op, node, {new_d(), dy_});
    if (tangent()) step(op, node, {new_d_dot(), dy_dot_});
    contribute(in);
  }

  void product(const Node& node, int made, DataOps data, Op weight, Op weight_jvp) {
    const Operand w = param_of(net_, tape_.params, node.weight), w_dot = param_of(net_, tape_.params_dot, node.weight);
    // A bias that a batch norm takes off again has no gradient: nobody writes it, and finish() makes it zero.
    const int bias = centered_[made] ? -1 : node.bias;
    const int64_t w_size = net_.params[node.weight].size, b_size = bias < 0 ? 0 : net_.params[bias].size;
    if (primal() && grad_.wanted()) {
      const Operand dw = grad_.target(node.weight, w_size), db = grad_.target(bias, b_size);
      step(weight, node, {dw, db, x_, dy_});
      grad_.wrote(node.weight, dw);
      grad_.wrote(bias, db);
    }
    if (tangent()) {
      const Operand dw = grad_dot_.target(node.weight, w_size), db = grad_dot_.target(bias, b_size);
      step(weight_jvp, node, {dw, db, x_, x_dot_, dy_, dy_dot_});
      grad_dot_.wrote(node.weight, dw);
      grad_dot_.wrote(bias, db);
    }
    const int in = node.inputs[0];
    if (!needed_[in]) return;
    const Operand mask = rectified_input(node.layer).on ? x_ : Operand{};
    if (pass_ == Pass::primal) step(data.primal, node, {new_d(), dy_, w, mask});
    if (pass_ == Pass::tangent) step(data.tangent, node, {new_d_dot(), dy_, dy_dot_, w, w_dot, mask});
    if (pass_ == Pass::dual) {
      new_d();
      new_d_dot();
      step(data.dual, node, {d_, d_dot_, dy_, dy_dot_, w, w_dot, mask});
    }
    contribute(in);
  }

  void batch_norm(const Node& node, int i) {
    const int64_t C = std::get<BatchNorm>(node.layer).C;
    const int in = node.inputs[0];
    const Operand gamma = param_of(net_, tape_.params, node.weight), gamma_dot = param_of(net_, tape_.params_dot, node.weight);
    const Operand stats = tape_.saved[i], stats_dot = tangent() ? tape_.saved_dot[i] : Operand{};
    if (primal()) {
      const Operand dgamma = grad_.target(node.weight, C, true), dbeta = grad_.target(node.bias, C, true);
      step(Op::batch_norm_bwd_weight, node, {dgamma, dbeta, x_, dy_, stats});
      if (needed_[in]) step(Op::batch_norm_bwd_data, node, {new_d(), x_, dy_, stats, gamma, dgamma, dbeta});
      grad_.wrote(node.weight, dgamma);
      grad_.wrote(node.bias, dbeta);
      tape_.saved_grad[2 * i] = dgamma;
      tape_.saved_grad[2 * i + 1] = dbeta;
    }
    if (tangent()) {
      const Operand dgamma = tape_.saved_grad[2 * i], dbeta = tape_.saved_grad[2 * i + 1];
      const Operand dgamma_dot = grad_dot_.target(node.weight, C, true), dbeta_dot = grad_dot_.target(node.bias, C, true);
      step(Op::batch_norm_bwd_weight_jvp, node, {dgamma_dot, dbeta_dot, x_, x_dot_, dy_, dy_dot_, stats, stats_dot});
      if (needed_[in])
        step(Op::batch_norm_bwd_data_jvp, node,
             {new_d_dot(), x_, x_dot_, dy_, dy_dot_, stats, stats_dot, gamma, gamma_dot, dgamma, dbeta, dgamma_dot, dbeta_dot});
      grad_dot_.wrote(node.weight, dgamma_dot);
      grad_dot_.wrote(node.bias, dbeta_dot);
    }
    if (needed_[in]) contribute(in);
  }

  void norm_pool_act(const Node& node, int i) {
    const int64_t C = std::get<NormPoolAct>(node.layer).norm.C;
    const int in = node.inputs[0];
    const Operand gamma = param_of(net_, tape_.params, node.weight), gamma_dot = param_of(net_, tape_.params_dot, node.weight);
    const Operand beta = param_of(net_, tape_.params, node.bias);
    const Operand stats = tape_.saved[i], tap = tape_.tap[i], winner = tape_.winner[i];
    if (primal()) {
      const Operand dgamma = grad_.target(node.weight, C, true), dbeta = grad_.target(node.bias, C, true);
      step(Op::norm_pool_act_bwd_weight, node, {dgamma, dbeta, winner, dy_, stats, gamma, beta});
      if (needed_[in]) step(Op::norm_pool_act_bwd_data, node, {new_d(), tap, x_, dy_, stats, gamma, beta, dgamma, dbeta});
      grad_.wrote(node.weight, dgamma);
      grad_.wrote(node.bias, dbeta);
      tape_.saved_grad[2 * i] = dgamma;
      tape_.saved_grad[2 * i + 1] = dbeta;
    }
    if (tangent()) {
      const Operand dgamma = tape_.saved_grad[2 * i], dbeta = tape_.saved_grad[2 * i + 1];
      const Operand dgamma_dot = grad_dot_.target(node.weight, C, true), dbeta_dot = grad_dot_.target(node.bias, C, true);
      step(Op::norm_pool_act_bwd_weight_jvp, node,
           {dgamma_dot, dbeta_dot, winner, tape_.winner_dot[i], dy_, dy_dot_, stats, tape_.saved_dot[i], gamma, beta});
      if (needed_[in])
        step(Op::norm_pool_act_bwd_data_jvp, node,
             {new_d_dot(), tap, x_, x_dot_, dy_, dy_dot_, stats, tape_.saved_dot[i], gamma, gamma_dot, beta, dgamma, dbeta, dgamma_dot,
              dbeta_dot});
      grad_dot_.wrote(node.weight, dgamma_dot);
      grad_dot_.wrote(node.bias, dbeta_dot);
    }
    if (needed_[in]) contribute(in);
  }

  void group_norm(const Node& node, int i) {
    const int64_t C = std::get<GroupNorm>(node.layer).channels;
    const int in = node.inputs[0], made = i + 1;
    const Operand gamma = param_of(net_, tape_.params, node.weight), gamma_dot = param_of(net_, tape_.params_dot, node.weight);
    const Operand none, y = rectified_output(node.layer).on && !masked_[made] ? tape_.value[made] : none;
    if (primal()) {
      const Operand dgamma = grad_.target(node.weight, C, true), dbeta = grad_.target(node.bias, C, true);
      step(Op::group_norm_bwd, node, {needed_[in] ? new_d() : none, dgamma, dbeta, x_, dy_, tape_.saved[i], gamma, y});
      grad_.wrote(node.weight, dgamma);
      grad_.wrote(node.bias, dbeta);
    }
    if (tangent()) {
      const Operand dgamma = grad_dot_.target(node.weight, C, true), dbeta = grad_dot_.target(node.bias, C, true);
      step(Op::group_norm_bwd_jvp, node,
           {needed_[in] ? new_d_dot() : none, dgamma, dbeta, x_, x_dot_, dy_, dy_dot_, tape_.saved[i], tape_.saved_dot[i], gamma, gamma_dot,
            y});
      grad_dot_.wrote(node.weight, dgamma);
      grad_dot_.wrote(node.bias, dbeta);
    }
    if (needed_[in]) contribute(in);
  }
};

}  // namespace

void backward(Schedule& out, const Program& net, Tape& tape, Pass pass, Operand dy, Operand dy_dot, Operand grad, Operand grad_dot,
              bool want_input) {
  if (is_primal(pass)) {
    tape.d.assign(net.values.size(), {});
    tape.saved_grad.assign(2 * net.nodes.size(), {});
    tape.d[net.output] = dy;
  }
  if (is_tangent(pass)) {
    tape.d_dot.assign(net.values.size(), {});
    tape.d_dot[net.output] = dy_dot;
  }
  BackwardWalk walk(out, net, tape, pass, grad, grad_dot, want_input);
  for (size_t i = net.nodes.size(); i-- > 0;) walk.node(int(i));
  walk.finish();
}

}  // namespace fastmaml
