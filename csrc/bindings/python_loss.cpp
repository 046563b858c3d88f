#include "bindings/python_loss.h"

#include <pybind11/numpy.h>

#include <stdexcept>
#include <vector>

namespace fastmaml {
namespace {

namespace py = pybind11;

// A raw pointer and not a py::object, because a thread may end without the interpreter's lock.
thread_local PyObject* python_loss = nullptr;

// All tasks' operands as arrays in torch's order, and back. The engine keeps channels last.
template <class T>
class Outputs {
 public:
  Outputs(const Call& call) : shape_(call.shape<PythonLoss>()), tasks_(call.tasks), examples_(call.step.examples) {}

  py::array_t<T> empty() const {
    std::vector<py::ssize_t> sizes{tasks_, examples_, shape_.C};
    if (shape_.image) sizes.insert(sizes.end(), {shape_.H, shape_.W});
    return py::array_t<T>(sizes);
  }

  py::array_t<T> read(const View& view) const {
    py::array_t<T> array = empty();
    each(view, [to = array.mutable_data()](T& ours, int64_t torch) mutable { to[torch] = ours; });
    return array;
  }

  void write(const View& view, const py::array_t<T>& array) const {
    each(view, [from = array.data()](T& ours, int64_t torch) { ours = from[torch]; });
  }

 private:
  const PythonLoss& shape_;
  const int64_t tasks_, examples_;

  template <class Visit>
  void each(const View& view, Visit visit) const {
    const int64_t pixels = shape_.H * shape_.W, size = shape_.C * pixels;
    for (int64_t t = 0; t < tasks_; ++t) {
      const Elements<T> task = elements<T>(view, t);
      for (int64_t n = 0; n < examples_; ++n)
        for (int64_t p = 0; p < pixels; ++p)
          for (int64_t c = 0; c < shape_.C; ++c) visit(task[n * size + p * shape_.C + c], (t * examples_ + n) * size + c * pixels + p);
    }
  }
};

// Device memory, in place, described by numpy's and CUDA's array interfaces.
template <class T>
py::object in_place(const View& view, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  py::tuple shape(sizes.size()), bytes(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) {
    shape[i] = sizes[i];
    bytes[i] = strides[i] * int64_t(sizeof(T));
  }
  py::dict interface;
  interface["shape"] = shape;
  interface["strides"] = bytes;
  interface["typestr"] = sizeof(T) == sizeof(float) ? "<f4" : "<f8";
  interface["data"] = py::make_tuple(reinterpret_cast<uintptr_t>(view.data), false);
  interface["version"] = 3;
  return interface;
}

template <class T>
void call_on_device(const Call& call, const char* backend) {
  const PythonLoss& s = call.shape<PythonLoss>();
  const int64_t size = s.C * s.H * s.W;
  const py::object function = py::reinterpret_borrow<py::object>(python_loss);
  const auto outputs = [&](int i) {
    std::vector<int64_t> sizes{call.tasks, call.step.examples, s.C}, strides{call[i].task_stride, size, 1};
    if (s.image) {
      sizes.insert(sizes.end(), {s.H, s.W});
      strides.insert(strides.end(), {s.W * s.C, s.C});
    }
    return in_place<T>(call[i], sizes, strides);
  };
  if (call.step.op == Op::caller_loss)
    function(s.query, s.first_row, outputs(2), py::none(), in_place<T>(call[0], {call.tasks}, {call[0].task_stride}), outputs(1), backend);
  else
    function(s.query, s.first_row, outputs(1), outputs(2), py::none(), outputs(0), backend);
}

template <class T>
void call_in(const Call& call) {
  const PythonLoss& shape = call.shape<PythonLoss>();
  const py::object function = py::reinterpret_borrow<py::object>(python_loss);
  const Outputs<T> outputs(call);
  py::array_t<T> dz = outputs.empty();
  if (call.step.op == Op::caller_loss) {
    py::array_t<T> loss(std::vector<py::ssize_t>{call.tasks});
    function(shape.query, shape.first_row, outputs.read(call[2]), py::none(), loss, dz);
    for (int64_t t = 0; t < call.tasks; ++t) elements<T>(call[0], t)[0] = loss.data()[t];
    outputs.write(call[1], dz);
  } else {
    function(shape.query, shape.first_row, outputs.read(call[1]), outputs.read(call[2]), py::none(), dz);
    outputs.write(call[0], dz);
  }
}

}  // namespace

void set_python_loss(py::object loss) {
  PyObject* before = python_loss;
  python_loss = loss.is_none() ? nullptr : loss.release().ptr();
  Py_XDECREF(before);
}

void call_python_loss(const Call& call, size_t real_bytes, const char* device) {
  const py::gil_scoped_acquire lock;
  if (!python_loss) throw std::invalid_argument("the program's loss is written in Python, but set_python_loss has not been called");
  try {
    if (*device)
      real_bytes == sizeof(float) ? call_on_device<float>(call, device) : call_on_device<double>(call, device);
    else
      real_bytes == sizeof(float) ? call_in<float>(call) : call_in<double>(call);
  } catch (const py::error_already_set& error) {  // the error holds Python objects, so it must not leave the lock
    throw std::runtime_error(std::string("the loss written in Python raised ") + error.what());
  }
}

}  // namespace fastmaml
