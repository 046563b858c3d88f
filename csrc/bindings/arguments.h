// The arrays of one call: torch tensors are checked, moved into the engine's type and layout, bound to the arguments of a Schedule,
// and the results are moved back (executor.h). Through torch's stable ABI: what is compiled here runs with every torch from 2.10 on.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "bindings/executor.h"

namespace fastmaml {

class CallArguments {
 public:
  // The type of `params` (float32 or float64) is that of all other real tensors and of the results.
  CallArguments(std::string text, const std::string& backend, const Tensor& params);

  const Program& program() const { return *program_; }
  int64_t tasks() const { return tasks_; }

  // Inputs. A tensor that does not fit raises std::invalid_argument with its name and shape in the sentence.
  int64_t examples(Arg arg, const char* name, const Tensor& x);                               // [T, N, *input]; returns N
  void targets(Arg arg, const char* name, const Tensor& y, int64_t examples);                 // labels [T, N], or [T, N, *output]
  void labels(Arg arg, const char* name, const Tensor& y, int64_t examples);                  // [T, N]
  void outputs(Arg arg, const char* name, const Tensor& dy, int64_t examples);                // [T, N, *output]
  bool weights(Arg arg, const char* name, const std::optional<Tensor>& w, int64_t examples);  // [T, N]; false where absent
  void shared_params(Arg arg, const char* name, const Tensor& params);                        // [P] for all tasks
  void params(Arg arg, const char* name, const Tensor& params);                               // [P] for all tasks, or [T, P]
  void params_of_tasks(Arg arg, const char* name, const Tensor& params);                      // [T, P]
  struct Rates {
    int64_t rows;
    bool uniform;  // bound are [rows] numbers: the tensor repeats each of them, and the plan can make use of that
  };
  Rates rates(const Tensor& rates, const InnerLoop& loop);                               // [1, P] or [K, P]
  void step_rows(const std::optional<Tensor>& rows, const InnerLoop& loop);              // [K, R]
  bool state(const std::optional<Tensor>& state, int64_t vectors);                       // [T, vectors P]; false where absent
  bool shared(Arg arg, const char* name, const std::optional<Tensor>& x, int64_t size);  // [size] for all tasks; the same
  void buffers(const Tensor& buffers);                                                   // [B]
  void numbers(Arg arg, std::initializer_list<double> values);                           // for all tasks
  // Of an input [tasks, ..] of real numbers that run() refuses if one of them is not finite. A device is not asked.
  void finite(const char* name, const Tensor& x);

  // What a linearisation leaves for the products with its curvature, by type: [T, its size in `call`'s Schedule] (tapes.cpp).
  struct Tapes {
    Tensor real, index, tap;
  };
  Tapes new_tapes(const CallSpec& call);                 // where it will be
  void finish(Tapes& tapes) const;                       // it is there
  void tapes(const CallSpec& call, const Tapes& tapes);  // as an input

  // Where the results will be. They live in this object until a function below hands them out.
  void result(Arg arg, int64_t size);                             // [size] a task
  void params_result(Arg arg, std::optional<int64_t> rows = {});  // [P] or [rows, P] a task, for params() below
  // Of a result their weighted sum over the tasks, their mean without weights. Once before they are asked for:
  void task_weights(const std::optional<Tensor>& w);              // [T]
  void summed_params(Arg arg, std::optional<int64_t> rows = {});  // [P] or [rows, P], for params() below
  void summed_step_rows(Arg arg, const InnerLoop& loop);          // [K, R], for step_rows() below

  void run(const CallSpec& call);

  Tensor nothing() const;                                  // [0], for a result that was not asked for
  Tensor values(Arg arg) const;                            // [T], for a result of size 1
  Tensor values(Arg arg, int64_t size) const;              // [T, size]
  Tensor outputs(Arg arg, int64_t examples) const;         // [T, N, *output]
  Tensor inputs(Arg arg, int64_t examples) const;          // [T, N, *input]
  Tensor params(Arg arg) const;                            // [T, P] or [T, rows, P] of a params_result, without T of a summed one
  Tensor step_rows(Arg arg, const InnerLoop& loop) const;  // [T, K, R] of a result of K x R, without T of a summed one

 private:
  using Type = torch::headeronly::ScalarType;
  size_t element_bytes() const { return table_->real_bytes; }
  Type type() const { return element_bytes() == sizeof(float) ? Type::Float : Type::Double; }
  void expect_place(const char* name, const Tensor& x) const;
  const Tensor& of_callers_type(const char* name, const Tensor& x) const;
  Tensor real(const char* name, const Tensor& x);  // checked, in the table's type, contiguous
  void bind(Arg arg, const Tensor& x, int64_t task_stride);
  void bind(Arg arg, void* data, int64_t task_stride);
  void images(Arg arg, const Tensor& x, const Shape& shape);  // [T, N, *shape] -> [T, N, H, W, C]
  Tensor from_images(Arg arg, int64_t examples, const Shape& shape) const;
  using Params = Executor::Params;
  void* take(int64_t numbers) { return executor_->take(size_t(numbers) * element_bytes()); }
  using Sizes = std::vector<int64_t>;
  const Params& params() const { return plan_->program->params; }  // in the plan's order
  bool as_torch() const;
  Tensor to_torch(const Params& params, const void* engine, const Sizes& sizes) const;  // sizes: [..., numbers in `params`]
  Tensor copy_of(Arg arg, const Sizes& sizes) const;
  Tensor in_callers_type(Tensor x) const;

  std::string text_;
  std::shared_ptr<const Program> program_;
  const OpTable* table_;
  Type callers_type_;
  torch::stable::Device callers_device_;
  int64_t tasks_ = -1;
  std::array<View, kArgs> args_{};
  std::vector<Tensor> kept_;  // what the Views point into
  struct Vectors {            // over the parameters, until the plan tells in which order it reads them
    Arg arg;
    Tensor tensor;
    int64_t count;  // of them, for all tasks or of each
    bool of_tasks;
  };
  std::vector<Vectors> vectors_;
  struct Made {  // a result that is made where and as the plan has it
    Arg arg;
    Sizes sizes;                   // with the tasks, or where they are summed without
    bool summed, of_params;        // or of step rows
    std::optional<Tensor> tensor;  // where the plan writes it, if that needs no move
    void* sum = nullptr;           // else, where it is summed
  };
  const Made* find_made(Arg arg) const;
  std::optional<Tensor> task_weights_;
  std::vector<Made> made_;
  std::shared_ptr<const Plan> plan_;
  std::unique_ptr<Executor> executor_;
};

}  // namespace fastmaml
