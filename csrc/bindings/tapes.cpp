// The tape of a linearisation (program/split.cpp) as torch tensors in the engine's types.
// The tensors are written in place: on the host nothing of this size is copied.
#include <torch/csrc/stable/ops.h>

#include <stdexcept>

#include "bindings/arguments.h"
#include "bindings/tape_sizes.h"

namespace fastmaml {
namespace {

using torch::headeronly::ScalarType;

struct Part {
  Arg read, made;
  Tensor CallArguments::Tapes::* tensor;
  int64_t TapeSizes::* size;
  const char* name;
};
constexpr Part kParts[] = {{Arg::tape, Arg::tape_made, &CallArguments::Tapes::real, &TapeSizes::real, "tape"},
                           {Arg::tape_index, Arg::tape_index_made, &CallArguments::Tapes::index, &TapeSizes::index, "tape_index"},
                           {Arg::tape_tap, Arg::tape_tap_made, &CallArguments::Tapes::tap, &TapeSizes::tap, "tape_tap"}};

ScalarType type_of(Arg made, ScalarType real) {
  return made == Arg::tape_made ? real : made == Arg::tape_index_made ? ScalarType::Int : ScalarType::Char;
}

size_t bytes_of(const Tensor& x) { return size_t(x.numel()) * size_t(x.element_size()); }

}  // namespace

TapeSizes tape_sizes(const Schedule& schedule) {
  TapeSizes sizes;
  for (const Slot& slot : schedule.slots)
    for (const Part& part : kParts)
      if (slot.arg == part.read || slot.arg == part.made) sizes.*part.size = slot.size;
  return sizes;
}

CallArguments::Tapes CallArguments::new_tapes(const CallSpec& call) {
  const TapeSizes sizes = tape_sizes(plan_for(text_, *table_, call)->schedule);
  const auto made = [&](const Part& part) {
    const int64_t size = sizes.*part.size;
    const Tensor x = part.made == Arg::tape_made
                         ? executor_->empty({tasks_, size}, type())
                         : torch::stable::empty({tasks_, size}, type_of(part.made, type()), std::nullopt, callers_device_);
    bind(part.made, x, size);
    return x;
  };
  return {made(kParts[0]), made(kParts[1]), made(kParts[2])};
}

// A device may have replayed a recording. The results are then in the recording's memory and are copied.
void CallArguments::finish(Tapes& tapes) const {
  for (const Part& part : kParts) {
    const Tensor& x = tapes.*part.tensor;
    const void* there = args_[static_cast<int>(part.made)].data;
    if (x.numel() && there != x.const_data_ptr()) executor_->copy(x.mutable_data_ptr(), there, bytes_of(x));
  }
}

void CallArguments::tapes(const CallSpec& call, const Tapes& tapes) {
  const TapeSizes sizes = tape_sizes(plan_for(text_, *table_, call)->schedule);
  for (const Part& part : kParts) {
    const Tensor& x = tapes.*part.tensor;
    const int64_t size = sizes.*part.size;
    expect_place(part.name, x);
    if (x.dim() != 2 || x.size(0) != tasks_ || x.size(1) != size || x.scalar_type() != type_of(part.made, type()) || !x.is_contiguous())
      throw std::invalid_argument(std::string(part.name) + " is not what linearise returned for these arguments: it must be [" +
                                  std::to_string(tasks_) + ", " + std::to_string(size) + "], contiguous and of the same type");
    bind(part.read, x, size);
  }
}

}  // namespace fastmaml
