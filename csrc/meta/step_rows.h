// Parameters that hold another value in each inner step, such as MAML++'s rows of batch norm (Antoniou et al. 2019, section 4):
// row k from step k's support pass on, up to the query pass behind that step. The start holds row 0.
#pragma once

#include <vector>

#include "meta/inner_loop.h"
#include "program/program.h"
#include "program/schedule.h"

namespace fastmaml {

class StepRows {
 public:
  StepRows(Schedule& out, const Program& net, const InnerLoop& loop);

  void put(int k, Operand phi) const;  // phi's entries become row k
  // The gradient by row k: what lambda holds for its entries in front of step k > 0. It does not go on from there; that of row 0
  // stays in lambda.
  void collect(int k, Operand lambda, Operand rows_grad) const;
  int64_t size() const { return size_; }  // R

 private:
  struct Part {
    int64_t in_phi, in_row, size;
  };
  Schedule& out_;
  std::vector<Part> parts_;
  int64_t size_;
  Operand rows_;  // [K, R]
};

// The parameters of InnerLoop::rows with their offsets in a row. Throws where the network does not have one.
std::vector<Param> step_row_params(const Program& net, const InnerLoop& loop);

}  // namespace fastmaml
