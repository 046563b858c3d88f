// Where the backward pass leaves the gradient by the parameters.
#pragma once

#include <vector>

#include "program/passes.h"

namespace fastmaml {

// A vector over all parameters, written by the layers in turn; what layers share is added up.
class ParamGrad {
 public:
  ParamGrad(Schedule& out, const Program& net, Operand vector)
      : out_(out), net_(net), vector_(vector), written_(net.params.size(), false), tied_(net.params.size(), -1) {
    for (const Node& node : net.nodes)
      for (int param : {node.weight, node.bias})
        if (param >= 0) ++tied_[param];
  }

  bool wanted() const { return bool(vector_); }

  // Where a layer writes its gradient. `scratch`: give a slot even where nobody wants the result.
  Operand target(int param, int64_t size, bool scratch = false) {
    if (param < 0 || !vector_) return scratch ? out_.arena(size) : Operand{};
    if (tied_[param]) return out_.arena(size);  // batch norm reads its own share again
    return param_of(net_, vector_, param);
  }

  void wrote(int param, Operand where) {
    if (param < 0 || !vector_) return;
    const int64_t size = net_.params[param].size;
    const Operand sum = param_of(net_, vector_, param);
    if (written_[param])
      out_.step(Op::add, Vector{size}, 1, {sum, sum, where});
    else if (tied_[param])
      out_.step(Op::copy, Vector{size}, 1, {sum, where});
    written_[param] = true;
  }

  void clear_unwritten() {
    if (!vector_) return;
    for (size_t p = 0; p < written_.size(); ++p)
      if (!written_[p]) out_.step(Op::fill_zero, Vector{net_.params[p].size}, 1, {param_of(net_, vector_, int(p))});
  }

 private:
  Schedule& out_;
  const Program& net_;
  const Operand vector_;
  std::vector<bool> written_;
  std::vector<int> tied_;  // layers that share the parameter, less one
};

}  // namespace fastmaml
