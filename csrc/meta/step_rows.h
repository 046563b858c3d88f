// Parameters with another value in each inner step, such as MAML++'s rows of batch norm (Antoniou et al. 2019, section 4).
// Row k is used from step k's support pass up to the query pass after step k. The start of the loop holds row 0.
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
  // The gradient by row k > 0: lambda's entries for these parameters before step k. They are taken out of lambda.
  // Row 0's gradient stays in lambda.
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

// The parameters of InnerLoop::rows with their offsets in a row. Throws if the network lacks one.
std::vector<Param> step_row_params(const Program& net, const InnerLoop& loop);

}  // namespace fastmaml
