#include "bindings/arrays.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "bindings/caller_loss.h"
#include "bindings/threads.h"
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

Sizes joined(Sizes head, const Sizes& tail) {
  head.insert(head.end(), tail.begin(), tail.end());
  return head;
}

void expect_sizes(const char* name, const Tensor& x, const Sizes& expected) {
  if (sizes_of(x) != expected) throw std::invalid_argument(described(name, x) + " must be " + to_string(expected));
}

void expect_cpu(const char* name, const Tensor& x) {
  if (!x.is_cpu()) throw std::invalid_argument(described(name, x) + " must be on the CPU for the cpu and reference backends");
}

Tensor empty(const Sizes& sizes, ScalarType type) { return stable::empty(sizes, type); }

void* data_of(const Tensor& x) { return const_cast<void*>(x.const_data_ptr()); }

bool interleaved(const Shape& shape) { return shape.image && shape.C > 1 && shape.H * shape.W > 1; }

// [rows, a, b] -> [rows, b, a]
Tensor swapped(const Tensor& x, int64_t rows, int64_t a, int64_t b) {
  return stable::contiguous(stable::transpose(stable::view(x, {rows, a, b}), 1, 2));
}

template <class T>
void params_both_ways(const std::vector<Param>& params, bool from_torch, void* to, const void* from, int64_t count) {
  const int64_t size = size_of(params);
  in_parallel(count, [&](int64_t i) {
    T* target = static_cast<T*>(to) + i * size;
    const T* source = static_cast<const T*>(from) + i * size;
    if (from_torch)
      params_from_torch(params, target, source, 1);
    else
      params_to_torch(params, target, source, 1);
  });
}

}  // namespace

Arrays::Arrays(std::string text, const std::string& backend, const Tensor& params) : text_(std::move(text)), program_(program_of(text_)) {
  expect_cpu("params", params);
  callers_type_ = params.scalar_type();
  if (callers_type_ != ScalarType::Float && callers_type_ != ScalarType::Double)
    throw std::invalid_argument(described("params", params) + " must be float32 or float64");
  table_ = &table_named(backend, callers_type_ == ScalarType::Float ? sizeof(float) : sizeof(double));
}

// ---------------------------------------------------------------- inputs

Tensor Arrays::real(const char* name, const Tensor& x) {
  expect_cpu(name, x);
  if (x.scalar_type() != callers_type_)
    throw std::invalid_argument(described(name, x) + " must have the type of the parameters, " +
                                (callers_type_ == ScalarType::Float ? "float32" : "float64"));
  const ScalarType type = element_bytes() == sizeof(float) ? ScalarType::Float : ScalarType::Double;
  return stable::contiguous(type == callers_type_ ? x : stable::to(x, type));
}

void Arrays::bind(Arg arg, void* data, int64_t task_stride) { args_[static_cast<int>(arg)] = {data, task_stride, 1}; }

void Arrays::bind(Arg arg, const Tensor& x, int64_t task_stride) {
  kept_.push_back(x);
  bind(arg, data_of(x), task_stride);
}

void Arrays::images(Arg arg, const Tensor& x, const Shape& shape) {
  const int64_t rows = x.size(0) * x.size(1);
  bind(arg, interleaved(shape) ? swapped(x, rows, shape.C, shape.H * shape.W) : x, x.size(1) * shape.size());
}

int64_t Arrays::examples(Arg arg, const char* name, const Tensor& x) {
  const Sizes sizes = sizes_of(x), input = dims_of(program_->input_shape());
  if (sizes.size() != 2 + input.size() || !std::equal(input.begin(), input.end(), sizes.begin() + 2))
    throw std::invalid_argument(described(name, x) + " does not fit input " + to_string(input) + " as [tasks, examples, *input]");
  if (sizes[0] < 1 || sizes[1] < 1) throw std::invalid_argument(described(name, x) + " holds no " + (sizes[0] < 1 ? "tasks" : "examples"));
  if (tasks_ < 0) tasks_ = sizes[0];
  if (sizes[0] != tasks_)
    throw std::invalid_argument(described(name, x) + " holds " + std::to_string(sizes[0]) + " tasks where the others hold " +
                                std::to_string(tasks_));
  images(arg, real(name, x), program_->input_shape());
  return sizes[1];
}

void Arrays::targets(Arg arg, const char* name, const Tensor& y, int64_t examples) {
  if (program_->loss.kind == Loss::Kind::caller) return;  // whose loss holds them
  if (program_->loss.kind != Loss::Kind::cross_entropy) return outputs(arg, name, y, examples);
  expect_cpu(name, y);
  if (y.scalar_type() != ScalarType::Long) throw std::invalid_argument(described(name, y) + " must hold labels as int64");
  expect_sizes(name, y, {tasks_, examples});
  const Tensor labels = stable::contiguous(y);
  const int64_t* label = labels.const_data_ptr<int64_t>();
  const int64_t classes = program_->loss.size;
  for (int64_t i = 0; i < labels.numel(); ++i)
    if (label[i] < 0 || label[i] >= classes)
      throw std::invalid_argument(described(name, y) + " holds label " + std::to_string(label[i]) + " for a network with " +
                                  std::to_string(classes) + " outputs");
  bind(arg, labels, examples);
}

void Arrays::outputs(Arg arg, const char* name, const Tensor& dy, int64_t examples) {
  expect_sizes(name, dy, joined({tasks_, examples}, dims_of(program_->output_shape())));
  images(arg, real(name, dy), program_->output_shape());
}

bool Arrays::weights(Arg arg, const char* name, const std::optional<Tensor>& w, int64_t examples) {
  if (!w) return false;
  expect_sizes(name, *w, {tasks_, examples});
  bind(arg, real(name, *w), examples);
  return true;
}

void Arrays::move_params(Arg arg, const Params& params, const Tensor& from, int64_t count, int64_t task_stride) {
  void* to = place_->take(size_t(count * size_of(params)) * element_bytes());
  if (element_bytes() == sizeof(float))
    params_both_ways<float>(params, true, to, data_of(from), count);
  else
    params_both_ways<double>(params, true, to, data_of(from), count);
  bind(arg, to, task_stride);
}

void Arrays::shared_params(Arg arg, const char* name, const Tensor& params) {
  expect_sizes(name, params, {program_->param_count});
  move_params(arg, program_->params, real(name, params), 1, 0);
}

void Arrays::params_of_tasks(Arg arg, const char* name, const Tensor& params) {
  expect_sizes(name, params, {tasks_, program_->param_count});
  move_params(arg, program_->params, real(name, params), tasks_, program_->param_count);
}

void Arrays::params(Arg arg, const char* name, const Tensor& params) {
  if (params.dim() == 1)
    shared_params(arg, name, params);
  else
    params_of_tasks(arg, name, params);
}

int64_t Arrays::rates(const Tensor& rates, int64_t inner_steps) {
  const int64_t rows = rates.dim() == 2 ? rates.size(0) : 0;
  if (rows < 1 || (rows != 1 && rows != inner_steps) || rates.size(1) != program_->param_count)
    throw std::invalid_argument(described("rates", rates) + " must be " + to_string({1, program_->param_count}) + " or " +
                                to_string({inner_steps, program_->param_count}));
  move_params(Arg::rates, program_->params, real("rates", rates), rows, 0);
  return rows;
}

void Arrays::step_rows(const std::optional<Tensor>& rows, const InnerLoop& loop) {
  const Params params = step_row_params(*program_, loop);
  if (params.empty()) {
    if (rows) throw std::invalid_argument(described("step_rows", *rows) + " are given to an inner loop without rows=");
    return;
  }
  if (!rows) throw std::invalid_argument("step_rows are missing: the inner loop is \"" + loop.text + "\"");
  expect_sizes("step_rows", *rows, {loop.steps, size_of(params)});
  move_params(Arg::step_rows, params, real("step_rows", *rows), loop.steps, 0);
}

bool Arrays::state(const std::optional<Tensor>& state, int64_t vectors) {
  if (!state) return false;
  expect_sizes("state", *state, {tasks_, vectors * program_->param_count});
  move_params(Arg::state, program_->params, real("state", *state), tasks_ * vectors, vectors * program_->param_count);
  return vectors > 0;
}

bool Arrays::shared(Arg arg, const char* name, const std::optional<Tensor>& x, int64_t size) {
  if (!x) return false;
  expect_sizes(name, *x, {size});
  bind(arg, real(name, *x), 0);
  return true;
}

void Arrays::buffers(const Tensor& buffers) {
  expect_sizes("buffers", buffers, {program_->buffer_count});
  bind(Arg::buffers, real("buffers", buffers), 0);
}

void Arrays::numbers(Arg arg, std::initializer_list<double> values) {
  void* to = place_->take(values.size() * element_bytes());
  if (element_bytes() == sizeof(float))
    std::copy(values.begin(), values.end(), static_cast<float*>(to));
  else
    std::copy(values.begin(), values.end(), static_cast<double*>(to));
  bind(arg, to, 0);
}

// ---------------------------------------------------------------- results

void Arrays::result(Arg arg, int64_t size) { bind(arg, place_->take(size_t(tasks_ * size) * element_bytes()), size); }

void Arrays::run(const Work& work) {
  const std::shared_ptr<const Plan> plan = plan_for(text_, *table_, work);
  Run run{*table_, plan->schedule, plan->workspace, args_.data(), tasks_};
  const int workers = static_cast<int>(std::min<int64_t>(tasks_, thread_count()));
  if (plan->takes_resident()) {  // what the emulator calls device memory is the host's
    const ResidentCode& code = plan->resident;
    std::byte* arena = place_->arenas.get(0, size_t(tasks_) * code.arena_bytes);
    table_->resident->launch(code, code.steps.data(), args_.data(), arena, tasks_, run.stream);
  } else if (table_->whole_batch) {
    if (program_->loss.kind == Loss::Kind::caller) run.caller = [this](const Call& call) { call_callers_loss(call, element_bytes()); };
    run_layered(run, place_->arenas);
  } else if (program_->loss.kind == Loss::Kind::caller) {
    run.caller = [this](const Call& call) { call_callers_loss(call, element_bytes()); };
    run_segments(run, place_->arenas, workers, in_parallel);
  } else {
    run_resident(run, place_->arenas, workers, in_parallel);
  }
}

Tensor Arrays::in_callers_type(Tensor x) const { return x.scalar_type() == callers_type_ ? x : stable::to(x, callers_type_); }

Tensor Arrays::copy_of(const void* data, std::initializer_list<int64_t> sizes) const {
  const Tensor x = empty(sizes, element_bytes() == sizeof(float) ? ScalarType::Float : ScalarType::Double);
  if (x.numel()) std::memcpy(x.mutable_data_ptr(), data, size_t(x.numel()) * element_bytes());
  return x;
}

Tensor Arrays::values(Arg arg) const { return in_callers_type(copy_of(args_[static_cast<int>(arg)].data, {tasks_})); }

Tensor Arrays::values(Arg arg, int64_t size) const { return in_callers_type(copy_of(args_[static_cast<int>(arg)].data, {tasks_, size})); }

Tensor Arrays::from_images(Arg arg, int64_t examples, const Shape& shape) const {
  const int64_t rows = tasks_ * examples;
  Tensor x = copy_of(args_[static_cast<int>(arg)].data, {rows, shape.size()});
  if (interleaved(shape)) x = swapped(x, rows, shape.H * shape.W, shape.C);
  return in_callers_type(stable::view(x, joined({tasks_, examples}, dims_of(shape))));
}

Tensor Arrays::outputs(Arg arg, int64_t examples) const { return from_images(arg, examples, program_->output_shape()); }

Tensor Arrays::inputs(Arg arg, int64_t examples) const { return from_images(arg, examples, program_->input_shape()); }

Tensor Arrays::to_torch(const Params& params, const void* engine, int64_t count) const {
  const bool single = element_bytes() == sizeof(float);
  const Tensor x = empty({count, size_of(params)}, single ? ScalarType::Float : ScalarType::Double);
  if (single)
    params_both_ways<float>(params, false, x.mutable_data_ptr(), engine, count);
  else
    params_both_ways<double>(params, false, x.mutable_data_ptr(), engine, count);
  return in_callers_type(x);
}

Tensor Arrays::params(Arg arg) const { return to_torch(program_->params, args_[static_cast<int>(arg)].data, tasks_); }

Tensor Arrays::params(Arg arg, int64_t rows) const {
  const Tensor x = to_torch(program_->params, args_[static_cast<int>(arg)].data, tasks_ * rows);
  return stable::view(x, {tasks_, rows, program_->param_count});
}

Tensor Arrays::step_rows(Arg arg, const InnerLoop& loop) const {
  const Params params = step_row_params(*program_, loop);
  const Tensor x = to_torch(params, args_[static_cast<int>(arg)].data, tasks_ * loop.steps);
  return stable::view(x, {tasks_, loop.steps, size_of(params)});
}

void* Arrays::reduced(Arg arg, int64_t size, const std::optional<Tensor>& task_weights) {
  std::optional<Tensor> weights;
  if (task_weights) {
    expect_sizes("task_weights", *task_weights, {tasks_});
    weights = real("task_weights", *task_weights);
  }
  void* sum = place_->take(size_t(size) * element_bytes());
  table_->tree_reduce(sum, args_[static_cast<int>(arg)].data, weights ? data_of(*weights) : nullptr, tasks_, size, 0);
  return sum;
}

Tensor Arrays::reduced_params(Arg arg, int64_t rows, const std::optional<Tensor>& task_weights) {
  return to_torch(program_->params, reduced(arg, rows * program_->param_count, task_weights), rows);
}

Tensor Arrays::reduced_step_rows(Arg arg, const InnerLoop& loop, const std::optional<Tensor>& task_weights) {
  const Params params = step_row_params(*program_, loop);
  return to_torch(params, reduced(arg, loop.steps * size_of(params), task_weights), loop.steps);
}

}  // namespace fastmaml
