#include "meta/step_rows.h"

#include <stdexcept>
#include <string>

#include "program/param_layout.h"
#include "program/passes.h"

namespace fastmaml {

std::vector<Param> step_row_params(const Program& net, const InnerLoop& loop) {
  std::vector<Param> params;
  for (const int row : loop.rows) {
    if (row >= int(net.params.size()))
      throw std::invalid_argument("inner loop \"" + loop.text + "\" names parameter " + std::to_string(row) +
                                  " in rows= of a network with " + std::to_string(net.params.size()));
    Param param = net.params[row];
    param.offset = size_of(params);
    params.push_back(param);
  }
  return params;
}

StepRows::StepRows(Schedule& out, const Program& net, const InnerLoop& loop) : out_(out) {
  const std::vector<Param> params = step_row_params(net, loop);
  size_ = size_of(params);
  if (size_ == 0 || loop.steps == 0) return;
  rows_ = out.external(Arg::step_rows, loop.steps * size_);
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t in_phi = net.params[loop.rows[i]].offset, size = params[i].size;
    if (!parts_.empty() && parts_.back().in_phi + parts_.back().size == in_phi)
      parts_.back().size += size;  // neighbours, such as a scale and its shift
    else
      parts_.push_back({in_phi, params[i].offset, size});
  }
}

void StepRows::put(int k, Operand phi) const {
  for (const Part& part : parts_)
    out_.step(Op::copy, Vector{part.size}, 1, {offset(phi, part.in_phi), offset(rows_, k * size_ + part.in_row)});
}

void StepRows::collect(int k, Operand lambda, Operand rows_grad) const {
  for (const Part& part : parts_) {
    const Operand entries = offset(lambda, part.in_phi);
    out_.step(Op::copy, Vector{part.size}, 1, {offset(rows_grad, k * size_ + part.in_row), entries});
    out_.step(Op::fill_zero, Vector{part.size}, 1, {entries});
  }
}

}  // namespace fastmaml
