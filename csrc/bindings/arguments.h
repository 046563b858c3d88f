// The arrays of one call. Torch tensors are checked, moved into the engine's type and layout, and bound to a Schedule's arguments.
// Results are moved back (executor.h). Uses torch's stable ABI: one compiled module runs with every torch from 2.10 on.
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
  // All other real tensors and the results have the type of `params` (float32 or float64).
  CallArguments(std::string text, const std::string& backend, const Tensor& params);

  const Program& program() const { return *program_; }
  int64_t tasks() const { return tasks_; }

  // Inputs. A tensor that does not fit raises std::invalid_argument with the tensor's name and shape.
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
    bool uniform;  // only [rows] numbers are bound: each row repeats one number, and the plan supports this
  };
  Rates rates(const Tensor& rates, const InnerLoop& loop);                               // [1, P] or [K, P]
  void step_rows(const std::optional<Tensor>& rows, const InnerLoop& loop);              // [K, R]
  bool state(const std::optional<Tensor>& state, int64_t vectors);                       // [T, vectors P]; false where absent
  bool shared(Arg arg, const char* name, const std::optional<Tensor>& x, int64_t size);  // [size] for all tasks; false where absent
  void buffers(const Tensor& buffers);                                                   // [B]
  void numbers(Arg arg, std::initializer_list<double> values);                           // for all tasks
  // run() refuses this input [tasks, ..] if a number is not finite. Inputs on a device are not checked.
  void finite(const char* name, const Tensor& x);

  // The tape of a linearisation, for products with its curvature: [T, size in `call`'s Schedule] for each type (tapes.cpp).
  struct Tapes {
    Tensor real, index, tap;
  };
  Tapes new_tapes(const CallSpec& call);                 // uninitialised, for run() to fill
  void finish(Tapes& tapes) const;                       // after run()
  void tapes(const CallSpec& call, const Tapes& tapes);  // as an input

  // Declares results. This object holds them until a function below hands them out.
  void result(Arg arg, int64_t size);                             // [size] for each task
  void params_result(Arg arg, std::optional<int64_t> rows = {});  // [P] or [rows, P] for each task, for params() below
  // Results summed over the tasks: a weighted sum, or the mean without weights. Call task_weights once, before the others.
  void task_weights(const std::optional<Tensor>& w);              // [T]
  void summed_params(Arg arg, std::optional<int64_t> rows = {});  // [P] or [rows, P], for params() below
  void summed_step_rows(Arg arg, const InnerLoop& loop);          // [K, R], for step_rows() below

  void run(const CallSpec& call);

  Tensor nothing() const;                                  // [0], for a result that was not requested
  Tensor values(Arg arg) const;                            // [T], for a result of size 1
  Tensor values(Arg arg, int64_t size) const;              // [T, size]
  Tensor outputs(Arg arg, int64_t examples) const;         // [T, N, *output]
  Tensor inputs(Arg arg, int64_t examples) const;          // [T, N, *input]
  Tensor params(Arg arg) const;                            // [T, P] or [T, rows, P] after params_result; without T after summed_params
  Tensor step_rows(Arg arg, const InnerLoop& loop) const;  // [T, K, R]; without T after summed_step_rows

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
  std::vector<Tensor> kept_;  // keeps the Views' memory alive
  struct Vectors {            // vectors of parameters, held until the plan says in which order it reads them
    Arg arg;
    Tensor tensor;
    int64_t count;  // number of vectors, for all tasks or for each
    bool of_tasks;
  };
  std::vector<Vectors> vectors_;
  struct Made {  // a result that the plan writes in its own place and order
    Arg arg;
    Sizes sizes;                   // with the tasks' axis; without it if summed
    bool summed, of_params;        // of_params: parameters; false: step rows
    std::optional<Tensor> tensor;  // where the plan writes, if no move is needed
    void* sum = nullptr;           // else the place of the sum
  };
  const Made* find_made(Arg arg) const;
  std::optional<Tensor> task_weights_;
  std::vector<Made> made_;
  std::shared_ptr<const Plan> plan_;
  std::unique_ptr<Executor> executor_;
};

}  // namespace fastmaml
