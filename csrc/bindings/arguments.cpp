#include "bindings/arguments.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <stdexcept>

#include "bindings/backends.h"
#include "bindings/python_loss.h"
#include "meta/step_rows.h"
#include "program/param_layout.h"

namespace fastmaml {
namespace {

namespace stable = torch::stable;
using Sizes = std::vector<int64_t>;
using torch::headeronly::ScalarType;

std::string to_string(const Sizes& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

Sizes sizes_of(const Tensor& x) { return Sizes(x.sizes().begin(), x.sizes().end()); }

// "support_x [4, 5, 3, 28, 28]"
std::string described(const char* name, const Tensor& x) { return std::string(name) + " " + to_string(sizes_of(x)); }

Sizes dims_of(const Shape& shape) { return shape.image ? Sizes{shape.C, shape.H, shape.W} : Sizes{shape.C}; }

Sizes concatenated(Sizes head, const Sizes& tail) {
  head.insert(head.end(), tail.begin(), tail.end());
  return head;
}

void expect_sizes(const char* name, const Tensor& x, const Sizes& expected) {
  if (sizes_of(x) != expected) throw std::invalid_argument(described(name, x) + " must be " + to_string(expected));
}

int64_t numbers_in(const Sizes& sizes) { return std::accumulate(sizes.begin(), sizes.end(), int64_t(1), std::multiplies<int64_t>()); }

void* data_of(const Tensor& x) { return const_cast<void*>(x.const_data_ptr()); }

bool interleaved(const Shape& shape) { return shape.image && shape.C > 1 && shape.H * shape.W > 1; }

// torch::stable::contiguous calls torch's dispatcher even if nothing is to do; this costs a microsecond
Tensor without_gaps(const Tensor& x) { return x.is_contiguous() ? x : stable::contiguous(x); }

// [rows, a, b] -> [rows, b, a]
Tensor swapped(const Tensor& x, int64_t rows, int64_t a, int64_t b) {
  return stable::contiguous(stable::transpose(stable::view(x, {rows, a, b}), 1, 2));
}

}  // namespace

CallArguments::CallArguments(std::string text, const std::string& backend, const Tensor& params)
    : text_(std::move(text)), program_(program_of(text_)), callers_type_(params.scalar_type()), callers_device_(params.device()) {
  if (callers_type_ != ScalarType::Float && callers_type_ != ScalarType::Double)
    throw std::invalid_argument(described("params", params) + " must be float32 or float64");
  table_ = &table_named(backend, callers_type_ == ScalarType::Float ? sizeof(float) : sizeof(double));
  const bool on_cuda = std::string_view(table_->backend) == "cuda";
  if (on_cuda != params.is_cuda() || (!on_cuda && !params.is_cpu()))
    throw std::invalid_argument(described("params", params) + " must be on " + (on_cuda ? "a CUDA device" : "the CPU") + " for backend " +
                                table_->backend);
  executor_ = table_->device ? device_executor(*table_, params) : host_executor();
}

// ---------------------------------------------------------------- inputs

void CallArguments::expect_place(const char* name, const Tensor& x) const {
  if (x.device() != callers_device_) throw std::invalid_argument(described(name, x) + " is not on the device of the parameters");
}

const Tensor& CallArguments::of_callers_type(const char* name, const Tensor& x) const {
  expect_place(name, x);
  if (x.scalar_type() != callers_type_)
    throw std::invalid_argument(described(name, x) + " must have the type of the parameters, " +
                                (callers_type_ == ScalarType::Float ? "float32" : "float64"));
  return x;
}

Tensor CallArguments::real(const char* name, const Tensor& x) {
  of_callers_type(name, x);
  return without_gaps(type() == callers_type_ ? x : stable::to(x, type()));
}

void CallArguments::bind(Arg arg, void* data, int64_t task_stride) { args_[static_cast<int>(arg)] = {data, task_stride, 1}; }

void CallArguments::bind(Arg arg, const Tensor& x, int64_t task_stride) {
  kept_.push_back(x);
  bind(arg, data_of(x), task_stride);
}

void CallArguments::images(Arg arg, const Tensor& x, const Shape& shape) {
  const int64_t rows = x.size(0) * x.size(1);
  bind(arg, interleaved(shape) ? swapped(x, rows, shape.C, shape.H * shape.W) : x, x.size(1) * shape.size());
}

int64_t CallArguments::examples(Arg arg, const char* name, const Tensor& x) {
  const Sizes sizes = sizes_of(x), input = dims_of(program_->input_shape());
  if (sizes.size() != 2 + input.size() || !std::equal(input.begin(), input.end(), sizes.begin() + 2))
    throw std::invalid_argument(described(name, x) + " does not fit input " + to_string(input) + " as [tasks, examples, *input]");
  if (sizes[0] < 1 || sizes[1] < 1) throw std::invalid_argument(described(name, x) + " holds no " + (sizes[0] < 1 ? "tasks" : "examples"));
  if (tasks_ < 0) tasks_ = sizes[0];
  if (sizes[0] != tasks_)
    throw std::invalid_argument(described(name, x) + " holds " + std::to_string(sizes[0]) + " tasks, but the other inputs hold " +
                                std::to_string(tasks_));
  images(arg, real(name, x), program_->input_shape());
  return sizes[1];
}

void CallArguments::targets(Arg arg, const char* name, const Tensor& y, int64_t examples) {
  switch (target_of(program_->loss.kind)) {
    case Target::nothing:  // the loss written in Python holds them
      return;
    case Target::row:
      return outputs(arg, name, y, examples);
    case Target::label:
      return labels(arg, name, y, examples);
  }
}

void CallArguments::labels(Arg arg, const char* name, const Tensor& y, int64_t examples) {
  expect_place(name, y);
  if (y.scalar_type() != ScalarType::Long) throw std::invalid_argument(described(name, y) + " must hold labels as int64");
  expect_sizes(name, y, {tasks_, examples});
  const Tensor labels = without_gaps(y);
  const int64_t* label = labels.const_data_ptr<int64_t>();
  const int64_t classes = program_->loss.size;
  const int64_t seen =
      labels.is_cpu() ? labels.numel()
                      : 0;  // labels on a device are not read here, since the host would wait; kernels treat unknown labels as no class
  for (int64_t i = 0; i < seen; ++i)
    if (label[i] < 0 || label[i] >= classes)
      throw std::invalid_argument(described(name, y) + " holds label " + std::to_string(label[i]) + " for a network with " +
                                  std::to_string(classes) + " outputs");
  bind(arg, labels, examples);
}

void CallArguments::outputs(Arg arg, const char* name, const Tensor& dy, int64_t examples) {
  expect_sizes(name, dy, concatenated({tasks_, examples}, dims_of(program_->output_shape())));
  images(arg, real(name, dy), program_->output_shape());
}

bool CallArguments::weights(Arg arg, const char* name, const std::optional<Tensor>& w, int64_t examples) {
  if (!w) return false;
  expect_sizes(name, *w, {tasks_, examples});
  bind(arg, real(name, *w), examples);
  return true;
}

void CallArguments::shared_params(Arg arg, const char* name, const Tensor& params) {
  expect_sizes(name, params, {program_->param_count});
  vectors_.push_back({arg, real(name, params), 1, false});
}

void CallArguments::params_of_tasks(Arg arg, const char* name, const Tensor& params) {
  expect_sizes(name, params, {tasks_, program_->param_count});
  vectors_.push_back({arg, real(name, params), 1, true});
}

void CallArguments::params(Arg arg, const char* name, const Tensor& params) {
  if (params.dim() == 1)
    shared_params(arg, name, params);
  else
    params_of_tasks(arg, name, params);
}

CallArguments::Rates CallArguments::rates(const Tensor& rates, const InnerLoop& loop) {
  const int64_t P = program_->param_count, rows = rates.dim() == 2 ? rates.size(0) : 0;
  if (rows < 1 || (rows != 1 && rows != loop.steps) || rates.size(1) != P)
    throw std::invalid_argument(described("rates", rates) + " must be " + to_string({1, P}) + " or " + to_string({loop.steps, P}));
  const bool one = rates.stride(1) == 0 && (rows == 1 || rates.stride(0) == 1) && type() == callers_type_;
  if (P > 1 && one && takes_uniform_rate(*table_, loop)) {
    bind(Arg::rates, of_callers_type("rates", rates), 0);
    return {rows, true};
  }
  vectors_.push_back({Arg::rates, real("rates", rates), rows, false});
  return {rows, false};
}

void CallArguments::step_rows(const std::optional<Tensor>& rows, const InnerLoop& loop) {
  const Params params = step_row_params(*program_, loop);
  if (params.empty()) {
    if (rows) throw std::invalid_argument(described("step_rows", *rows) + " are given to an inner loop without rows=");
    return;
  }
  if (!rows) throw std::invalid_argument("step_rows are missing: the inner loop is \"" + loop.text + "\"");
  expect_sizes("step_rows", *rows, {loop.steps, size_of(params)});
  const Tensor from = real("step_rows", *rows);
  void* to = take(loop.steps * size_of(params));
  executor_->reorder(params, true, to, data_of(from), loop.steps, element_bytes());
  bind(Arg::step_rows, to, 0);
  kept_.push_back(from);
}

bool CallArguments::state(const std::optional<Tensor>& state, int64_t vectors) {
  if (!state) return false;
  expect_sizes("state", *state, {tasks_, vectors * program_->param_count});
  vectors_.push_back({Arg::state, real("state", *state), vectors, true});
  return vectors > 0;
}

bool CallArguments::shared(Arg arg, const char* name, const std::optional<Tensor>& x, int64_t size) {
  if (!x) return false;
  expect_sizes(name, *x, {size});
  bind(arg, real(name, *x), 0);
  return true;
}

void CallArguments::buffers(const Tensor& buffers) {
  expect_sizes("buffers", buffers, {program_->buffer_count});
  bind(Arg::buffers, real("buffers", buffers), 0);
}

void CallArguments::numbers(Arg arg, std::initializer_list<double> values) {
  void* to = take(int64_t(values.size()));
  executor_->numbers(to, values.begin(), values.size(), element_bytes());
  bind(arg, to, 0);
}

void CallArguments::finite(const char* name, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  if (!x.is_cpu() || (type != ScalarType::Float && type != ScalarType::Double)) return;
  const Tensor& whole = kept_.emplace_back(without_gaps(x));
  executor_->expect_finite(name, data_of(whole), x.numel() / tasks_, type == ScalarType::Float ? sizeof(float) : sizeof(double));
}

// ---------------------------------------------------------------- results

void CallArguments::result(Arg arg, int64_t size) { bind(arg, take(tasks_ * size), size); }

void CallArguments::params_result(Arg arg, std::optional<int64_t> rows) {
  const int64_t P = program_->param_count;
  made_.push_back({arg, rows ? Sizes{tasks_, *rows, P} : Sizes{tasks_, P}, false, true, {}});
}

void CallArguments::summed_params(Arg arg, std::optional<int64_t> rows) {
  const int64_t P = program_->param_count;
  made_.push_back({arg, rows ? Sizes{*rows, P} : Sizes{P}, true, true, {}});
}

void CallArguments::summed_step_rows(Arg arg, const InnerLoop& loop) {
  made_.push_back({arg, {loop.steps, size_of(step_row_params(*program_, loop))}, true, false, {}});
}

void CallArguments::task_weights(const std::optional<Tensor>& w) {
  if (!w) return;
  expect_sizes("task_weights", *w, {tasks_});
  task_weights_ = real("task_weights", *w);
}

void CallArguments::run(const CallSpec& call) {
  plan_ = plan_for(text_, *table_, call);
  for (const Vectors& v : vectors_) {
    const int64_t size = v.count * program_->param_count;
    if (as_torch()) {
      bind(v.arg, data_of(v.tensor), v.of_tasks ? size : 0);
      continue;
    }
    void* to = take((v.of_tasks ? tasks_ : 1) * size);
    if (v.of_tasks)
      executor_->reorder_tasks(params(), to, data_of(v.tensor), tasks_, v.count, element_bytes());
    else
      executor_->reorder(params(), true, to, data_of(v.tensor), v.count, element_bytes());
    bind(v.arg, to, v.of_tasks ? size : 0);
  }
  for (Made& made : made_) {
    const int64_t size = numbers_in(made.sizes);
    if (made.of_params && as_torch()) made.tensor = executor_->empty(made.sizes, type());
    void* const place = made.tensor ? made.tensor->mutable_data_ptr() : take(size);
    if (made.summed)
      executor_->sum(made.arg, made.sum = place, task_weights_ ? data_of(*task_weights_) : nullptr, size);
    else
      bind(made.arg, place, size / tasks_);
  }
  executor_->run(plan_, args_.data(), tasks_,
                 [this](const Call& call) { call_python_loss(call, element_bytes(), table_->device ? table_->backend : ""); });
}

Tensor CallArguments::in_callers_type(Tensor x) const { return x.scalar_type() == callers_type_ ? x : stable::to(x, callers_type_); }

Tensor CallArguments::copy_of(Arg arg, const Sizes& sizes) const {
  const Tensor x = executor_->empty(sizes, type());
  if (x.numel()) executor_->copy(x.mutable_data_ptr(), args_[static_cast<int>(arg)].data, size_t(x.numel()) * element_bytes());
  return in_callers_type(x);
}

Tensor CallArguments::nothing() const { return executor_->empty({0}, callers_type_); }

Tensor CallArguments::values(Arg arg) const { return copy_of(arg, {tasks_}); }

Tensor CallArguments::values(Arg arg, int64_t size) const { return copy_of(arg, {tasks_, size}); }

Tensor CallArguments::from_images(Arg arg, int64_t examples, const Shape& shape) const {
  const Sizes sizes = concatenated({tasks_, examples}, dims_of(shape));
  if (!interleaved(shape)) return copy_of(arg, sizes);
  const int64_t rows = tasks_ * examples;
  return stable::view(swapped(copy_of(arg, {rows, shape.size()}), rows, shape.H * shape.W, shape.C), sizes);
}

Tensor CallArguments::outputs(Arg arg, int64_t examples) const { return from_images(arg, examples, program_->output_shape()); }

Tensor CallArguments::inputs(Arg arg, int64_t examples) const { return from_images(arg, examples, program_->input_shape()); }

Tensor CallArguments::to_torch(const Params& params, const void* engine, const Sizes& sizes) const {
  const Tensor x = executor_->empty(sizes, type());
  const int64_t size = size_of(params);  // 0 if the network has only activations
  if (size) executor_->reorder(params, false, x.mutable_data_ptr(), engine, numbers_in(sizes) / size, element_bytes());
  return in_callers_type(x);
}

// On the host, with parameters in torch's order, the plan reads and writes torch's memory without a copy.
bool CallArguments::as_torch() const { return plan_->as_torch(); }

const CallArguments::Made* CallArguments::find_made(Arg arg) const {
  const auto made = std::find_if(made_.begin(), made_.end(), [arg](const Made& m) { return m.arg == arg; });
  return made == made_.end() ? nullptr : &*made;
}

Tensor CallArguments::params(Arg arg) const {
  const Made* made = find_made(arg);
  if (!made) throw std::logic_error("no params_result for this argument");
  if (made->tensor) return in_callers_type(*made->tensor);
  return to_torch(params(), made->summed ? made->sum : args_[static_cast<int>(arg)].data, made->sizes);
}

Tensor CallArguments::step_rows(Arg arg, const InnerLoop& loop) const {
  const Params params = step_row_params(*program_, loop);
  if (const Made* made = find_made(arg)) return to_torch(params, made->sum, made->sizes);
  return to_torch(params, args_[static_cast<int>(arg)].data, {tasks_, loop.steps, size_of(params)});
}
}  // namespace fastmaml
